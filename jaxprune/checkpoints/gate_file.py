"""The file with the gates of many tasks, one bit per unit, that stands beside the weights of a shared folder.

`gates.safetensors` has one tensor of bytes per task, `gates:TASK`. Unit `i` is bit `i % 8`, counted from the lowest, of
byte `i // 8`; 1 is open. The units are those of all sites of the task's kinds, in the order of the axis table; the bits
that are left over are 0. Where closed units are replaced by calibration means, `means:TASK` holds those of the closed
units, float32, site by site.

The header says for every task the kinds and the digest of its sites and their widths, how the gates were made, and a
checksum of all of it; and the digest of the model, as `load` gives it: gates do not work with other weights.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.checkpoints.tensors import TensorFile, write_tensors
from jaxprune.checkpoints.weights import refuse
from jaxprune.compaction import check_biases
from jaxprune.models import Model
from jaxprune.units import KINDS, Gates, Params, check_gates, check_means, mean_shapes, widths

GATES = "gates.safetensors"
METADATA = "jaxprune_gates"
FORMAT = 1
_FIELDS: dict[str, tuple[type, ...]] = {  # of one task in the header, as in `PackedGates`
    "kinds": (list,),
    "units": (int,),
    "sites": (str,),
    "means": (list, type(None)),
    "record": (dict,),
    "checksum": (str,),  # of the model's digest, the task's name, the other fields and the tensors
}


class PackedGates(NamedTuple):
    """The gates of one task as they are in the file."""

    kinds: tuple[str, ...]  # of units, in the order of `KINDS`
    units: int  # at all sites of these kinds
    sites: str  # digest of the names and widths of these sites
    bits: np.ndarray  # uint8, ceil(units / 8) bytes
    means: tuple[str, ...] | None  # sites whose closed units are replaced; None: all are replaced by zero
    values: np.ndarray  # float32, what the closed units of these sites are replaced by, one after the other
    record: Mapping[str, Any]  # how the gates were made


class GateFile(NamedTuple):
    """The gates of many tasks, and the model that they belong to."""

    model: str  # its digest
    tasks: Mapping[str, PackedGates]

    def task(self, name: str, where: Path) -> PackedGates:
        """The gates of one task.

        Raises:
            ValueError: If there are none, with the tasks there are.
        """
        if name not in self.tasks:
            close = difflib.get_close_matches(name, self.tasks, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where} has no task {name!r}; it has: {', '.join(sorted(self.tasks))}.{hint}")
        return self.tasks[name]


def pack(
    model: Model,
    params: Params,
    gates: Mapping[str, Any],
    means: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> PackedGates:
    """Packs the gates of one task. Of the parameters only the shapes are read.

    Args:
        model: The architecture.
        params: The dense parameters.
        gates: Site name to gates `[units]`, each 0 or 1; a missing site is open.
        means: What closed units are replaced by, as `compact` takes it.
        record: How the gates were made, as JSON can hold it.

    Raises:
        ValueError: If the gates or means do not fit the parameters, a gate is neither 0 nor 1, a mean is not finite, or
            there is no bias for it to go into.
        TypeError: If the record cannot be written as JSON.
    """
    json.dumps(record or {}, allow_nan=False)  # found here, where the task is known
    arrays = {name: np.asarray(gate, np.float32) for name, gate in gates.items()}
    replaced = {name: np.asarray(mean, np.float32) for name, mean in (means or {}).items()}
    check_gates(model, params, arrays)
    check_means(model, params, replaced)
    refuse(
        "only gates of 0 and 1, `[units]`, and finite means can be shared (a model with others needs its own folder)",
        one_row_per_example=[name for name, gate in arrays.items() if gate.ndim != 1],
        neither_0_nor_1=[
            f"{name} holds {gate[~np.isin(gate, (0, 1))].flat[0]}"
            for name, gate in arrays.items()
            if not np.isin(gate, (0, 1)).all()
        ],
        means_that_are_not_finite=[name for name, mean in replaced.items() if not np.isfinite(mean).all()],
    )
    check_biases(model, params, [name for name, gate in arrays.items() if name in replaced and not gate.all()])
    named = {name.rpartition(".")[2] for name in arrays}
    kinds = tuple(kind for kind in KINDS if kind in named)
    width = widths(model.axes, params, kinds)
    whole = np.concatenate([np.zeros(0), *(arrays.get(name, np.ones(units)) for name, units in width.items())])
    sites = tuple(name for name in width if name in replaced)
    values = [replaced[name][arrays[name] == 0].reshape(-1) for name in sites if name in arrays]
    return PackedGates(
        kinds=kinds,
        units=len(whole),
        sites=_digest_sites(width),
        bits=np.packbits(whole.astype(bool), bitorder="little"),
        means=None if means is None else sites,
        values=np.concatenate([np.zeros(0, np.float32), *values]),
        record=dict(record or {}),
    )


def unpack(
    model: Model, params: Params, packed: PackedGates
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """The gates of one task and what its closed units are replaced by, 0 at open units; None: zero everywhere.

    `compact` gives with both the same bits as with what was packed. Of the parameters only the shapes are read.

    Raises:
        ValueError: If they do not fit the parameters.
    """
    width = widths(model.axes, params, packed.kinds)
    if packed.sites != _digest_sites(width):
        raise ValueError(
            f"they are for {packed.units:,} {' and '.join(packed.kinds)}, at sites and of widths that are not those of "
            f"the model, which has {sum(width.values()):,}"
        )
    bits = np.unpackbits(packed.bits, count=packed.units, bitorder="little").astype(np.float32)
    parts = np.split(bits, np.cumsum(list(width.values()))[:-1]) if width else []
    gates = dict(zip(width, parts, strict=True))
    if "heads" in packed.kinds and len(set(packed.kinds) - {"neurons"}) > 1:
        # heads of some modules and channels of others: what is open was not gated, and the two may share a parameter
        gates = {name: gate for name, gate in gates.items() if not gate.all()}
    if not packed.means:
        return gates, None
    shapes = mean_shapes(model.axes, params)
    if odd := [name for name in packed.means if name not in shapes or name not in width]:
        raise ValueError(f"they have means of {', '.join(odd)}, where the model has none")
    means = {name: np.zeros(shapes[name], np.float32) for name in packed.means}
    closed = {name: gates[name] == 0 if name in gates else np.zeros(width[name], bool) for name in means}
    sizes = [mean[closed[name]].size for name, mean in means.items()]
    if sum(sizes) != len(packed.values):
        raise ValueError(f"they have {len(packed.values):,} means for closed units that need {sum(sizes):,}")
    for (name, mean), values in zip(means.items(), np.split(packed.values, np.cumsum(sizes)[:-1]), strict=True):
        mean[closed[name]] = values.reshape(mean[closed[name]].shape)
    return gates, means


def to_bytes(file: GateFile) -> bytes:
    """The content of `gates.safetensors`.

    Raises:
        ValueError: If the name of a task cannot be used, or its record cannot be written as JSON.
    """
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, dict[str, Any]] = {}
    for task, own in sorted(file.tasks.items()):
        check_name(task)
        tensors[f"gates:{task}"] = own.bits
        if own.means is not None:
            tensors[f"means:{task}"] = own.values
        entries[task] = _entry(own) | {"checksum": _checksum(file.model, task, own)}
    header = {"format": FORMAT, "model": file.model, "tasks": entries}
    content = io.BytesIO()
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    write_tensors(content, tensors, {METADATA: text})
    return content.getvalue()


def read(path: Path) -> GateFile:
    """Reads `gates.safetensors`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or something in it is not known; the error lists everything.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} is not a shared folder: it has no {GATES}. `jaxprune share` or jp.save_shared writes one."
        )
    with TensorFile(path) as file:
        wrong, header = _read_header(file.metadata)
        tasks: Mapping[str, Any] = header.get("tasks", {})
        expected = {f"gates:{task}": "U8" for task in tasks}
        expected |= {f"means:{task}": "F32" for task, own in tasks.items() if own["means"] is not None}
        found = {name: entry.dtype for name, entry in file.entries.items()}
        wrong += [f"{name} is in its header and not in its tensors" for name in expected if name not in found]
        wrong += [f"{name} is not in its header" for name in found if name not in expected and header]
        wrong += [
            f"{name} is {found[name]} of shape {list(file.entries[name].shape)}, expected {dtype} with one axis"
            for name, dtype in expected.items()
            if name in found and (found[name] != dtype or len(file.entries[name].shape) != 1)
        ]
        packed = {}
        if not wrong:
            packed = {task: _packed(file, task, own) for task, own in tasks.items()}
            for task, own in packed.items():
                if _checksum(header["model"], task, own) != tasks[task]["checksum"]:
                    wrong.append(f"the gates of {task!r} are not those that were written: their checksum is another")
                elif len(own.bits) != -(-own.units // 8):
                    wrong.append(f"the gates of {task!r} have {len(own.bits):,} bytes for {own.units:,} units")
                elif np.unpackbits(own.bits, bitorder="little")[own.units :].any():
                    wrong.append(f"the gates of {task!r} have bits behind the last of {own.units:,} units")
                elif not np.isfinite(own.values).all():
                    wrong.append(f"the means of {task!r} hold NaN or infinity")
    if wrong:
        raise ValueError(f"{path} cannot be used: {'; '.join(wrong)}. Share the tasks again.")
    return GateFile(header["model"], packed)


def check_name(task: str) -> None:
    """Refuses names of tasks that could not be asked for by `FOLDER#TASK`.

    Raises:
        ValueError: If it is one.
    """
    if not task or not task.isprintable() or "#" in task:
        raise ValueError(f"the task's name {task!r} must have at least one letter, all of them printable, and no '#'.")


def _read_header(metadata: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with the header, and the header; empty if something is."""
    if METADATA not in metadata:
        return [f"it holds no gates, its metadata has no {METADATA!r}"], {}
    try:
        header = json.loads(metadata[METADATA])
        json.dumps(header, allow_nan=False)  # NaN is no JSON either
    except (ValueError, RecursionError) as error:
        return [f"its header is not JSON ({error})"], {}
    if not isinstance(header, dict) or type(header.get("format")) is not int or header["format"] != FORMAT:
        own = header.get("format") if isinstance(header, dict) else header
        return [f"its format is {str(own)[:80]!r}, this version of jaxprune reads {FORMAT}"], {}
    if header.keys() != {"format", "model", "tasks"}:
        return [f"its header has {sorted(header)}, expected format, model and tasks"], {}
    if not isinstance(header["model"], str) or not isinstance(header["tasks"], dict):
        return ["its header does not name a model and tasks"], {}
    wrong = []
    for task, own in header["tasks"].items():
        if not isinstance(own, dict) or own.keys() != _FIELDS.keys():
            wrong.append(f"task {task!r} must have exactly the fields {', '.join(_FIELDS)}")
            continue
        wrong += [
            f"{name} of task {task!r} is {str(own[name])[:80]!r}"
            for name, kinds in _FIELDS.items()
            if type(own[name]) not in kinds
        ]
        if isinstance(own["kinds"], list) and own["kinds"] != [kind for kind in KINDS if kind in own["kinds"]]:
            wrong.append(f"task {task!r} has units of the kinds {str(own['kinds'])[:80]}, known: {', '.join(KINDS)}")
        if isinstance(own["means"], list) and not all(isinstance(name, str) for name in own["means"]):
            wrong.append(f"task {task!r} has means of {str(own['means'])[:80]}, expected names of sites")
    return wrong, {} if wrong else header


def _packed(file: TensorFile, task: str, own: Mapping[str, Any]) -> PackedGates:
    means = None if own["means"] is None else tuple(own["means"])
    return PackedGates(
        kinds=tuple(own["kinds"]),
        units=own["units"],
        sites=own["sites"],
        bits=file.read(f"gates:{task}"),
        means=means,
        values=np.zeros(0, np.float32) if means is None else file.read(f"means:{task}"),
        record=own["record"],
    )


def _entry(own: PackedGates) -> dict[str, Any]:
    """What the header says of one task, but for the checksum."""
    means = None if own.means is None else list(own.means)
    return {
        "kinds": list(own.kinds),
        "units": own.units,
        "sites": own.sites,
        "means": means,
        "record": dict(own.record),
    }


def _checksum(model: str, task: str, own: PackedGates) -> str:
    text = json.dumps([model, task, _entry(own)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode() + own.bits.tobytes() + own.values.astype("<f4").tobytes()).hexdigest()


def _digest_sites(width: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps(list(width.items())).encode()).hexdigest()


def units_record(kept: Mapping[str, np.ndarray], had: Mapping[str, int]) -> dict[str, Any]:
    """The part of a pruning record that says which units stay.

    Args:
        kept: Site name to the indices of the units that stay, rising.
        had: Site name to how many there were.
    """
    return {
        "units": {"had": sum(had.values()), "kept": sum(len(index) for index in kept.values())},
        "sites": {
            name: {"had": had[name], "kept": len(index), "which": _ranges(index)} for name, index in kept.items()
        },
    }


def units_kept(name: str, site: Any) -> tuple[int, np.ndarray]:
    """How many units a site of a record had, and which of them stay.

    Args:
        name: Of the site.
        site: What `pruning_record` says of it: `{"had": 12, "which": "0-3,7"}`.

    Raises:
        ValueError: If it says something else.
    """
    try:
        pairs = [part.split("-") for part in site["which"].split(",") if part]
        kept = [unit for pair in pairs for unit in range(int(pair[0]), int(pair[-1]) + 1)]
        fits = kept == sorted(set(kept)) and (not kept or kept[-1] < site["had"])
    except (KeyError, TypeError, ValueError, AttributeError):
        kept, fits = [], False
    if not fits:
        raise ValueError(f"pruning.json says of {name} {str(site)[:80]!r}: expected the units it had, and which stay.")
    return int(site["had"]), np.asarray(kept, int)


def recorded_gates(record: Mapping[str, Any]) -> Gates:
    """The gates that `pruning_record` was made of, 1 where a unit stays and 0 elsewhere.

    Raises:
        ValueError: If the record does not say which units stay.
    """
    gates = {}
    for name, site in record["sites"].items():
        had, kept = units_kept(name, site)
        gates[name] = jnp.asarray(np.isin(np.arange(had), kept).astype(np.float32))
    return gates


def _ranges(index: np.ndarray) -> str:
    """Sorted whole numbers in short: `0-3,7`."""
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1) if len(index) else []
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)

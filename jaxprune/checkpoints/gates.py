"""The files that say which of a dense model's units stay: `pruning.json` of one pruned model, a gate file of many.

A gate file has one bit per unit and lies beside the weights of a shared folder:

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
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from jaxprune.checkpoints.files import COUNT, DIGEST, misfits_of, parse_header, read_json
from jaxprune.checkpoints.tensors import TensorFile
from jaxprune.checkpoints.weights import refuse
from jaxprune.compaction import check_biases
from jaxprune.models import Model
from jaxprune.units import KINDS, Gates, Params, check_gates, check_means, mean_shapes, widths

PRUNING = "pruning.json"
_RUN = "[0-9]{1,9}(-[0-9]{1,9})?"
_SITE = {"had": range(2**24), "kept?": COUNT, "which": re.compile(f"({_RUN}(,{_RUN})*)?")}
_MOST_UNITS = 2**26  # of a whole model
_LENGTH = (float, [float], None)
_RECORD = {  # what is read of it; `save` may be given more
    "settings?": {"length?": _LENGTH, ...: object},
    "scores?": {"model?": (str, None), ...: object},
    "sites?": {...: _SITE},
    "run?": {...: object},
    "rounds?": [{...: object}],
    ...: object,
}


def read_pruning(path: str | Path) -> dict[str, Any]:
    """The record that `save` wrote of how a model was pruned.

    Raises:
        FileNotFoundError: If the folder has no such record.
        ValueError: If it cannot be read.
    """
    file = Path(path) / PRUNING
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: the model was not pruned, or not saved by jaxprune.")
    check_record(record := read_json(file), str(file))
    return record


def check_record(record: Mapping[str, Any], name: str = PRUNING) -> None:
    """Refuses a record of a pruning in which an entry that is read is not what it should be.

    Raises:
        ValueError: If there is one.
    """
    if problems := misfits_of(record, _RECORD):
        raise ValueError(f"{name} cannot be used: {'; '.join(problems[:5])}.")


def units_record(remaining: Mapping[str, np.ndarray], had: Mapping[str, int]) -> dict[str, Any]:
    """The part of the record that says which units stay.

    Args:
        remaining: Site name to the indices of the units that stay, rising.
        had: Site name to the number of units before.
    """
    return {
        "units": {"had": sum(had.values()), "kept": sum(len(index) for index in remaining.values())},
        "sites": {
            name: {"had": had[name], "kept": len(index), "which": _ranges(index)} for name, index in remaining.items()
        },
    }


def kept_units(name: str, site: Any) -> tuple[int, np.ndarray]:
    """The number of units that a site had, and those that stay, from its entry: `{"had": 12, "which": "0-3,7"}`.

    Raises:
        ValueError: If the entry says something else.
    """
    if not (problems := misfits_of(site, _SITE, f"sites.{name}")):
        runs = [(int(run[0]), int(run[-1]) + 1) for part in site["which"].split(",") if (run := part.split("-"))[0]]
        ends = [end for run in runs for end in run]
        if ends == sorted(ends) and max(ends, default=0) <= site["had"]:  # else nothing is made of them
            units = np.concatenate([np.zeros(0, int), *(np.arange(*run) for run in runs)])
            if (np.diff(units) > 0).all() and len(units) == site.get("kept", len(units)):
                return site["had"], units
        problems = [f"sites.{name} is {str(site)[:80]}, expected rising numbers below had, and as many as kept"]
    raise ValueError(f"{PRUNING} does not say which units stay: {'; '.join(problems)}.")


def recorded_gates(record: Mapping[str, Any]) -> Gates:
    """The gates of a record: 1 where a unit stays and 0 elsewhere.

    Raises:
        ValueError: If the record does not say which units stay.
    """
    sites = {name: kept_units(name, site) for name, site in record["sites"].items()}
    if (units := sum(had for had, _ in sites.values())) > _MOST_UNITS:
        raise ValueError(f"{PRUNING} says that the model had {units:,} units, expected at most {_MOST_UNITS:,}.")
    return {name: jnp.zeros(had, jnp.float32).at[left].set(1.0) for name, (had, left) in sites.items()}


def _ranges(index: np.ndarray) -> str:
    """Sorted whole numbers in short: `0-3,7`."""
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1) if len(index) else []
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


GATES = "gates.safetensors"
METADATA = "jaxprune_gates"
FORMAT = 1
_TASK = {  # in the header, as in `StoredGates`
    "kinds": [re.compile("|".join(KINDS))],
    "units": COUNT,
    "sites": DIGEST,
    "means": ([str], None),
    "record": {...: object},
    "checksum": DIGEST,  # of the model's digest, the task's name, the other fields and the tensors
}
_HEADER = {"format": range(FORMAT, FORMAT + 1), "model": DIGEST, "tasks": {...: _TASK}}


class StoredGates(NamedTuple):
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
    tasks: Mapping[str, StoredGates]

    def task(self, name: str, where: Path) -> StoredGates:
        """The gates of one task.

        Raises:
            ValueError: If there are none, with the tasks there are.
        """
        if name not in self.tasks:
            close = difflib.get_close_matches(name, self.tasks, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where} has no task {name!r}; it has: {', '.join(sorted(self.tasks))}.{hint}")
        return self.tasks[name]


def pack_gates(
    model: Model,
    params: Params,
    gates: Mapping[str, Any],
    means: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> StoredGates:
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
    return StoredGates(
        kinds=kinds,
        units=len(whole),
        sites=_digest_sites(width),
        bits=np.packbits(whole.astype(bool), bitorder="little"),
        means=None if means is None else sites,
        values=np.concatenate([np.zeros(0, np.float32), *values]),
        record=dict(record or {}),
    )


def unpack_gates(
    model: Model, params: Params, stored: StoredGates
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """The gates of one task and what its closed units are replaced by, 0 at open units; None: zero everywhere.

    `compact` gives with both the same bits as with what was stored. Of the parameters only the shapes are read.

    Raises:
        ValueError: If they do not fit the parameters.
    """
    width = widths(model.axes, params, stored.kinds)
    if stored.sites != _digest_sites(width):
        raise ValueError(
            f"they are for {stored.units:,} {' and '.join(stored.kinds)}, at sites and of widths that are not those of "
            f"the model, which has {sum(width.values()):,}"
        )
    bits = np.unpackbits(stored.bits, count=stored.units, bitorder="little").astype(np.float32)
    parts = np.split(bits, np.cumsum(list(width.values()))[:-1]) if width else []
    gates = dict(zip(width, parts, strict=True))
    if "heads" in stored.kinds and len(set(stored.kinds) - {"neurons"}) > 1:
        # heads of some modules and channels of others: what is open was not gated, and the two may share a parameter
        gates = {name: gate for name, gate in gates.items() if not gate.all()}
    if not stored.means:
        return gates, None
    shapes = mean_shapes(model.axes, params)
    if odd := [name for name in stored.means if name not in shapes or name not in width]:
        raise ValueError(f"they have means of {', '.join(odd)}, where the model has none")
    means = {name: np.zeros(shapes[name], np.float32) for name in stored.means}
    closed = {name: gates[name] == 0 if name in gates else np.zeros(width[name], bool) for name in means}
    sizes = [mean[closed[name]].size for name, mean in means.items()]
    if sum(sizes) != len(stored.values):
        raise ValueError(f"they have {len(stored.values):,} means for closed units that need {sum(sizes):,}")
    for (name, mean), values in zip(means.items(), np.split(stored.values, np.cumsum(sizes)[:-1]), strict=True):
        mean[closed[name]] = values.reshape(mean[closed[name]].shape)
    return gates, means


def to_bytes(file: GateFile) -> bytes:
    """The content of `gates.safetensors`.

    Raises:
        ValueError: If the name of a task cannot be used, or its record cannot be written as JSON.
    """
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, dict[str, Any]] = {}
    for task, stored in sorted(file.tasks.items()):
        check_name(task)
        tensors[f"gates:{task}"] = stored.bits
        if stored.means is not None:
            tensors[f"means:{task}"] = stored.values
        entries[task] = _entry(stored) | {"checksum": _checksum(file.model, task, stored)}
    header = {"format": FORMAT, "model": file.model, "tasks": entries}
    return save(tensors, {METADATA: json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)})


def read_gates(path: Path) -> GateFile:
    """Reads `gates.safetensors`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or something in it is not known; the error lists everything.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} is not a shared folder: it has no {GATES}. `jaxprune share` or jp.save_shared writes one."
        )
    tasks: dict[str, StoredGates] = {}
    with TensorFile(path) as file:
        if METADATA not in file.metadata:
            raise ValueError(f"{path} cannot be used: it holds no gates, its metadata has no {METADATA!r}.")
        problems, header = parse_header(file.metadata[METADATA], _HEADER)
        entries: Mapping[str, Any] = header["tasks"] if header else {}
        expected = {f"gates:{task}": "U8" for task in entries}
        expected |= {f"means:{task}": "F32" for task, entry in entries.items() if entry["means"] is not None}
        problems += [f"{name} is in its header and not in its tensors" for name in expected if name not in file.entries]
        problems += [f"{name} is not in its header" for name in file.entries if name not in expected and header]
        problems += [
            f"{name} is {tensor.dtype} of shape {list(tensor.shape)}, expected {expected[name]} with one axis"
            for name, tensor in file.entries.items()
            if name in expected and (tensor.dtype != expected[name] or len(tensor.shape) != 1)
        ]
        for task, entry in ({} if problems else entries).items():
            tasks[task] = stored = _stored(file, task, entry)
            if stored.kinds != tuple(kind for kind in KINDS if kind in stored.kinds):
                problems.append(f"tasks.{task}.kinds is {entry['kinds']}, expected some of {', '.join(KINDS)} in order")
            elif _checksum(header["model"], task, stored) != entry["checksum"]:
                problems.append(f"the gates of {task!r} are not those that were written: their checksum is another")
            elif len(stored.bits) != -(-stored.units // 8):
                problems.append(f"the gates of {task!r} have {len(stored.bits):,} bytes for {stored.units:,} units")
            elif np.unpackbits(stored.bits, bitorder="little")[stored.units :].any():
                problems.append(f"the gates of {task!r} have bits behind the last of {stored.units:,} units")
            elif not np.isfinite(stored.values).all():
                problems.append(f"the means of {task!r} hold NaN or infinity")
    if problems:
        raise ValueError(f"{path} cannot be used: {'; '.join(problems)}. Share the tasks again.")
    return GateFile(header["model"], tasks)


def check_name(task: str) -> None:
    """Refuses names of tasks that could not be asked for by `FOLDER#TASK`.

    Raises:
        ValueError: If it is one.
    """
    if not task or not task.isprintable() or "#" in task:
        raise ValueError(f"the task's name {task!r} must have at least one letter, all of them printable, and no '#'.")


def _stored(file: TensorFile, task: str, entry: Mapping[str, Any]) -> StoredGates:
    means = None if entry["means"] is None else tuple(entry["means"])
    values = np.zeros(0, np.float32) if means is None else file.read(f"means:{task}")
    facts = {name: entry[name] for name in ("units", "sites", "record")}
    return StoredGates(tuple(entry["kinds"]), bits=file.read(f"gates:{task}"), means=means, values=values, **facts)


def _entry(stored: StoredGates) -> dict[str, Any]:
    """The header's entry of one task, but for the checksum."""
    return {name: getattr(stored, name) for name in _TASK if name != "checksum"}


def _checksum(model: str, task: str, stored: StoredGates) -> str:
    text = json.dumps([model, task, _entry(stored)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode() + stored.bits.tobytes() + stored.values.astype("<f4").tobytes()).hexdigest()


def _digest_sites(width: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps(list(width.items())).encode()).hexdigest()

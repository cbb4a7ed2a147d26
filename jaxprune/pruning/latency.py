"""Measured latency: whole forward passes side by side, and tables of what a model's modules take by their width.

A row of a table is of all modules of one shape, such as the attention of every layer: seconds by heads. The rest of a
pass, embeddings, norms and task head, is what a model takes whose modules are all of width 0. A table holds for one
device, version of JAX, batch and length; it is kept on disk, and one of another device is refused. Its times are those
of the quickest of many passes, taken in turns: whatever else a machine does can only add to them.

A table adds up modules that were measured one by one; a whole model may take longer or less. So what was selected by a
table is measured beside the dense model, and the budget that the table is asked for is corrected by the ratio.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.checkpoints.files import COUNT, parse_header, read_private, write_atomic, write_private
from jaxprune.models import (
    LABELS,
    WORDS,
    BlockSettings,
    Mask,
    Model,
    State,
    block_compiled,
    enter,
    mask_of,
    model_inputs,
    model_layers,
)
from jaxprune.models.cost import Length, checked_length
from jaxprune.units import Gates, Intervention, Params, Site, axes_of, flatten, path_name, resize, sites, subtree
from jaxprune.units import Path as ParameterPath
from jaxprune.units import widths as widths_of

Tokens: TypeAlias = int | tuple[int, int]  # of an example; of a text-to-text model those it reads and those it writes

LAYERS = 4  # in which a module is measured at most: more weights than fit into most caches
ROOM = 1 << 30  # bytes of weights that the modules of a row may take together
EVEN = 8  # neurons are measured at multiples of it: vectors of most CPUs hold as many numbers
WHOLE = "whole"  # what programs of whole models are named by, others by site or stack
WHOLES = 5  # whole models that the sums of modules are compared with
LEAST = 5  # rounds
ENOUGH = 60.0  # seconds

_FORMAT = 1


class Timing(NamedTuple):
    """The time of one forward pass, in seconds."""

    median: float
    p95: float  # 95th percentile
    batch: int  # examples per pass
    length: Tokens  # tokens per example, none of them padding; of text-to-text those written, too
    device: str
    least: float  # the quickest pass


class LatencyComparison(NamedTuple):
    """Several models measured in turns."""

    latencies: tuple[Timing, ...]
    speedups: tuple[float, ...]  # median over the rounds of (time of the first model) / (time of this one)


def latency(
    model: Model,
    params: Params,
    *,
    batch: int = 1,
    length: Tokens = 128,
    head: str | None = None,
    repeats: int = 20,
    warmup: int = 3,
) -> Timing:
    """Measures the forward pass, compiled as one program; see `compare_latency`."""
    compared = compare_latency([(model, params)], batch=batch, length=length, head=head, repeats=repeats, warmup=warmup)
    return compared.latencies[0]


def compare_latency(
    models: Sequence[tuple[Model, Params]],
    *,
    batch: int = 1,
    length: Tokens = 128,
    head: str | None = None,
    repeats: int = 20,
    warmup: int = 3,
) -> LatencyComparison:
    """Measures several models side by side: A B A B, so that a change of the machine's load meets all of them.

    Args:
        models: Pairs of a model and its parameters; the first is what the others are compared with.
        batch: Examples per pass.
        length: Tokens per example; of a text-to-text model those it reads and those it writes.
        head: The task head; None is the only one. A model without task heads runs up to its last hidden state.
        repeats: Rounds that are timed; in a round every model runs once, and is waited for.
        warmup: Rounds before, the first of which compiles.

    Returns:
        One `Timing` and one speed-up per model.

    Raises:
        ValueError: If there is no model, a number is less than 1, or a model cannot read that many tokens.
    """
    if not models:
        raise ValueError("there is no model to measure.")
    _check_positive(batch=batch, length=length, repeats=repeats, warmup=warmup)
    passes = [_forward_pass(model, params, batch, length, head) for model, params in models]
    for _ in range(warmup):
        for run in passes:
            run()
    seconds = np.array([[_seconds(run) for run in passes] for _ in range(repeats)])
    device = jax.devices()[0]
    name = f"{os.cpu_count()}-core CPU" if device.platform == "cpu" else device.device_kind
    return LatencyComparison(
        tuple(
            Timing(float(np.median(taken)), float(np.percentile(taken, 95)), batch, length, name, float(taken.min()))
            for taken in seconds.T
        ),
        tuple(float(ratio) for ratio in np.median(seconds[:, :1] / seconds, axis=0)),
    )


def compare_latencies(
    models: Sequence[tuple[Model, Params]],
    batches: Sequence[int],
    *,
    length: Length,
    head: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[dict[str, Any]]]:
    """Latencies of several models at each batch size, measured in turns, and speed-ups over the first, as records.

    Args:
        models: Architectures and their parameters, of any widths.
        batches: Examples in a pass.
        length: Mean tokens of an example; they are rounded up.
        head: The task head; None is the only one.
        progress: Called with the number of finished batch sizes, and of all.
    """
    tokens, records = whole_tokens(models[0][0], length), [[] for _ in models]
    for done, batch in enumerate(batches, 1):
        timings = compare_latency(models, batch=batch, length=tokens, head=head)
        for record, (timing, speedup) in zip(records, zip(*timings, strict=True), strict=True):
            record.append({**timing._asdict(), "speedup": speedup})
        if progress is not None:
            progress(done, len(batches))
    return records


def _check_positive(**numbers: Any) -> None:
    for name, value in numbers.items():
        if np.min(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _forward_pass(model: Model, params: Params, batch: int, length: Tokens, head: str | None) -> Callable[[], Any]:
    """A function that runs one forward pass and waits for it; its inputs are on the device already."""
    inputs, params = _inputs(model, batch, length), jax.device_put(params)
    if model.answers_in_text and model.head(head) == WORDS:
        inputs |= dict(zip(LABELS, (jnp.zeros((batch, 2), jnp.int32), jnp.zeros((batch, 2))), strict=True))
    return lambda: jax.block_until_ready(_forward(model, params, inputs, head))


def _inputs(model: Model, batch: int, length: Tokens) -> dict[str, jax.Array]:
    """A batch without padding, `[batch, length]` tokens that are all the same."""
    inputs = {}
    lengths = np.atleast_1d(np.asarray(checked_length(model, length)))
    for stack, tokens in zip(model.stacks, lengths, strict=True):
        ids, mask = stack.inputs[:2]
        inputs[ids] = jnp.full((batch, int(tokens)), model.config.pad_id + 1, jnp.int32)
        inputs[mask] = jnp.ones((batch, int(tokens)), jnp.int32)
    return inputs


@partial(jax.jit, static_argnums=(0, 3))
def _forward(model: Model, params: Params, batch: dict[str, jax.Array], head: str | None) -> Any:
    """The logits; the hidden states of a model without task heads, of which XLA would otherwise compute nothing."""
    returns = () if model.heads or model.answers_in_text else ("hidden",)
    output = model.apply(params, batch, head=head, returns=returns)
    return output.logits, output.hidden


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The device, the programs and the model that a table holds for."""

    device: str
    jax: str  # its version
    flags: str  # given to the compiler
    model: str  # digest of the configuration and of the names, shapes and types of all parameters
    batch: int  # examples per pass
    length: Tokens  # per example, none of them padding

    @property
    def key(self) -> str:
        """A name that no other conditions have."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The seconds that modules of one shape take by their width."""

    sites: tuple[str, ...]  # whose modules have this shape, whatever their own widths
    widths: tuple[int, ...]  # measured, narrowest first: 0 to the widest there is
    seconds: tuple[float, ...]  # of each, beyond a module of width 0

    def rising(self) -> np.ndarray:
        """The closest seconds `[widths]` that nowhere fall: where a wider module was quicker, both get their mean."""
        from scipy.optimize import isotonic_regression  # slow to import

        return isotonic_regression(np.maximum(self.seconds, 0.0)).x


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """The seconds that a forward pass takes by the widths of its modules.

    The rows are scaled to what whole passes of several widths took, by the median of these; the last one of `wholes`
    had no part in it and shows how far predictions are to be trusted.
    """

    conditions: Conditions
    rows: tuple[Row, ...]
    fixed: float  # a pass with all modules of width 0
    scale: float  # what the rows were multiplied by; 1 where modules add up to passes by themselves
    wholes: tuple[tuple[float, float], ...]  # passes of several widths, the first with all units: predicted, measured

    def row(self, site: str) -> Row:
        """The row of a site.

        Raises:
            ValueError: If there is none.
        """
        for row in self.rows:
            if site in row.sites:
                return row
        raise ValueError(f"the latency table has no row for {site}: measure the table for this model.")

    def steps(self, site: str, units: int) -> list[tuple[int, float]]:
        """The widths that a module may be given, and the seconds of each, narrowest first.

        Those that were measured, up to the `units` that it has. A width is left out where a wider one takes no longer,
        so both numbers rise.
        """
        row = self.row(site)
        widths = [*(width for width in row.widths if width < units), units]
        seconds = np.interp(widths, row.widths, row.rising())
        last = len(widths) - 1
        return [(widths[i], float(seconds[i])) for i in range(last + 1) if i == last or seconds[i] < seconds[i + 1]]

    def predict(self, widths: Mapping[str, int]) -> float:
        """The seconds of a forward pass of a model with these widths, between measured ones on a straight line.

        Args:
            widths: Units of every site.

        Raises:
            ValueError: If a site has no row.
        """
        rising = {row: row.rising() for row in self.rows}
        rows = {name: self.row(name) for name in widths}
        return self.fixed + math.fsum(
            float(np.interp(units, rows[name].widths, rising[rows[name]])) for name, units in widths.items()
        )


def measure_latency_table(
    model: Model,
    params: Params,
    *,
    batch: int = 1,
    length: Tokens = 128,
    points: int = 16,
    rounds: int = 40,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measures what modules take by their width, on this device.

    A module of some width stands in up to `LAYERS` compiled layers whose other modules have width 0, and what these
    layers take without it is subtracted. All programs run in turns, so that a change of the machine's load meets all of
    them, and other weights have taken the place of a module's in the caches, as in a whole model. The quickest pass of
    each counts. Whole passes of several widths, each after one that is not timed, say what the sums are scaled by.

    Args:
        model: The architecture.
        params: Parameters of any widths; the values do not matter.
        batch: Examples per pass.
        length: Tokens per example, none of them padding; of a text-to-text model those it reads and those it writes.
        points: Widths of a row at most, beside 0. Rows of at most twice as many heads have all of them.
        rounds: Passes of every program that are timed; after `LEAST` of them, what takes longer than `ENOUGH` ends.
        progress: Called with what is done, and how much there is to do.

    Returns:
        The table; `write_table` keeps it.

    Raises:
        ValueError: If a number is less than 1, the model cannot read that many tokens, or has no units.
    """
    _check_positive(batch=batch, length=length, points=points, rounds=rounds)
    groups = _groups(model, params)
    if not groups:
        raise ValueError("this model has no units: there is nothing to measure by width.")
    programs, grids, wholes = _programs(model, params, groups, batch, length, points)
    least = _quickest(programs, rounds, progress)
    rows = []
    for (stack, group), counts in zip(groups, grids, strict=True):
        beyond = [(least[group[0].name, width] - least[stack, count]) / count for width, count in counts.items()]
        names = tuple(site.name for site in group)
        rows.append(Row(sites=names, widths=(0, *counts), seconds=(0.0, *beyond)))
    known, fixed = conditions(model, params, batch=batch, length=length), least[WHOLE, 0]
    table = LatencyTable(conditions=known, rows=tuple(rows), fixed=fixed, scale=1.0, wholes=())
    pairs = [(table.predict(width), least[WHOLE, i]) for i, width in enumerate(wholes) if i]
    ratios = [(measured - fixed) / (predicted - fixed) for predicted, measured in pairs[:-1] if predicted > fixed]
    scale = max(float(np.median(ratios)), 0.0) if ratios else 1.0
    scaled = tuple(replace(row, seconds=tuple(scale * seconds for seconds in row.seconds)) for row in rows)
    compared = tuple((fixed + scale * (predicted - fixed), measured) for predicted, measured in pairs)
    return replace(table, rows=scaled, scale=scale, wholes=compared)


def kept_table(
    folder: Path,
    model: Model,
    params: Params,
    *,
    batch: int,
    length: Tokens,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Reads the table in a folder that holds here, for this batch and length; measures and writes it if missing."""
    known = conditions(model, params, batch=batch, length=length)
    if (table := known_table(folder, known)) is None:
        table = measure_latency_table(model, params, batch=batch, length=length, progress=progress)
        write_private(table_file(folder, known), _to_json(table))
    return table


def known_table(folder: Path, known: Conditions) -> LatencyTable | None:
    """The table of some conditions in a folder of the cache; None if there is none, or something else in its place."""
    content = read_private(table_file(folder, known))
    problems, table = ([""], None) if content is None else _parse(content)
    return None if problems or table is None or table.conditions != known else table


def table_file(folder: Path, known: Conditions) -> Path:
    """The file in a folder where the table of some conditions is kept."""
    return folder / f"{known.key}.json"


def _groups(model: Model, params: Params) -> list[tuple[str, list[Site]]]:
    """Sites whose modules have the same shape but for their widths, the widest first, and their stack."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    width = widths_of(model.axes, params)
    for site in sites(model.axes, params):
        shapes = []
        for path, leaf in flatten(subtree(params, site.module)).items():
            axes = axes_of(model.axes, (*site.module, *path))
            shape = tuple(size for name, size in zip(axes, leaf.shape, strict=True) if name != site.kind)
            shapes.append((path, shape, str(leaf.dtype)))
        local = tuple(step for step in site.module if not isinstance(step, int))
        groups.setdefault((local, site.kind, tuple(shapes)), []).append(site)
    ordered = [sorted(group, key=lambda site: -width[site.name]) for group in groups.values()]
    return [(group[0].stack, group) for group in ordered if width[group[0].name]]


def _grid(kind: str, most: int, points: int) -> list[int]:
    """The widths to measure: all numbers of heads if they are few, else multiples of a step; and all units."""
    step = 1 if kind == "heads" and most <= 2 * points else math.ceil(most / points)
    step = step if kind == "heads" else EVEN * math.ceil(step / EVEN)
    return [*range(step, most, step), most]


Programs: TypeAlias = dict[tuple[str, int], Callable[[], Any]]  # site or stack and width or layers -> a pass


def _programs(
    model: Model, params: Params, groups: list[tuple[str, list[Site]]], batch: int, length: Tokens, points: int
) -> tuple[Programs, list[dict[int, int]], list[dict[str, int]]]:
    """The passes to run; for each group its widths and in how many layers each stands; the widths of whole models."""
    every, width = sites(model.axes, params), widths_of(model.axes, params)
    entered = _entered(model, params, model_inputs(model, params, _inputs(model, batch, length)))
    empty = resize(model.axes, params, dict.fromkeys(every, 0))
    programs: Programs = {}
    grids: list[dict[int, int]] = []
    for stack, group in groups:
        grid = _grid(group[0].kind, width[group[0].name], points)
        size = sum(leaf.nbytes for leaf in flatten(subtree(params, group[0].module)).values())
        layers = max(1, min(LAYERS, int(ROOM / (size * sum(grid) / grid[-1]))))
        counts = {units: min(layers, sum(width[site.name] >= units for site in group)) for units in grid}
        for units, count in counts.items():
            modules = [site.module for site in group[:count]]
            small = resize(model.axes, params, {site: units if site in group[:count] else 0 for site in every})
            programs[group[0].name, units] = _run_of(model, small, modules, entered[stack])
            programs.setdefault((stack, count), _run_of(model, empty, modules, entered[stack]))
        grids.append(counts)
    random = np.random.default_rng(0)
    wholes = [dict.fromkeys(width, 0), *(dict(width) for _ in range(WHOLES))]  # empty, whole, then widths by lot
    for drawn in wholes[2:]:
        for (_, group), grid in zip(groups, grids, strict=True):
            for site in group:
                drawn[site.name] = int(random.choice([0, *(units for units in grid if units <= width[site.name])]))
    head = model.heads[0] if model.heads else None  # they cost next to nothing, and about the same
    for i, drawn in enumerate(wholes):
        small = resize(model.axes, params, {site: drawn[site.name] for site in every})
        programs[WHOLE, i] = _forward_pass(model, small, batch, length, head)
    return programs, grids, wholes


def _entered(model: Model, params: Params, inputs: dict[str, jax.Array]) -> dict[str, tuple[State, Mask]]:
    """The input of the first layer of every stack, as if the stacks before it had no layers."""
    state, entered = None, {}
    for layer in model_layers(model, params):
        if layer.entry is not None:
            state = enter(model, layer, inputs, state)
            entered[layer.stack.name] = state, mask_of(layer, inputs)
    return entered


def _run_of(
    model: Model, params: Params, modules: Sequence[ParameterPath], entered: tuple[State, Mask]
) -> Callable[[], Any]:
    """A function that runs the layers of some modules, one after the other, and waits for them."""
    every = model_layers(model, params)
    layers = [layer for module in modules for layer in every if module[: len(layer.path)] == layer.path]
    settings = tuple(BlockSettings(kind=layer.kind) for layer in layers)
    weights = jax.device_put([layer.params for layer in layers])
    return lambda: jax.block_until_ready(_layers(model, settings, weights, *entered))


@partial(jax.jit, static_argnums=(0, 1))
def _layers(model: Model, settings: tuple[BlockSettings, ...], layers: list[Params], state: State, mask: Mask) -> State:
    for static, params in zip(settings, layers, strict=True):
        state, _ = block_compiled(model, static, params, state, mask, Intervention(), None)
    return state


def _quickest(
    programs: Programs, rounds: int, progress: Callable[[int, int], None] | None
) -> dict[tuple[str, int], float]:
    """The seconds of the quickest pass of every program."""
    total, done, begun = len(programs) * (rounds + 1), 0, time.perf_counter()
    least = dict.fromkeys(programs, math.inf)
    for number in range(rounds + 1):
        for name, run in programs.items():
            if number == 0 or name[0] == WHOLE:
                run()  # compiles, or brings the weights back into the caches
            least[name] = min(least[name], _seconds(run)) if number else math.inf
            done += 1
            if progress is not None:
                progress(done, total)
        if number == 0:
            begun = time.perf_counter()
        if number >= LEAST and time.perf_counter() - begun > ENOUGH:
            break
    if progress is not None and done < total:
        progress(total, total)
    return least


def whole_tokens(model: Model, length: Length) -> int | tuple[int, int]:
    """A mean length as tokens that can be run: rounded up, and no more than the model reads."""
    rounded = [
        max(1, min(math.ceil(tokens), model.max_length))
        for tokens in np.atleast_1d(np.asarray(checked_length(model, length)))
    ]
    return (rounded[0], rounded[1]) if len(rounded) == 2 else rounded[0]


def conditions(model: Model, params: Params, *, batch: int, length: Tokens) -> Conditions:
    """The conditions of a table of this model that is measured here and now."""
    return Conditions(
        device=device_label(),
        jax=jax.__version__,
        flags=os.environ.get("XLA_FLAGS", ""),
        model=shapes_digest(model, params),
        batch=batch,
        length=length,
    )


def device_label() -> str:
    """The device that programs run on: a CPU's model and the cores that there are for this process."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = known.get("model name") or platform.processor() or platform.machine()
    family = "-".join(known[key] for key in ("cpu family", "model", "stepping") if key in known)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} {family}".strip() + f", {cores} cores"


def shapes_digest(model: Model, params: Params) -> str:
    """The SHA-256 of the configuration and of the names, shapes and types of all parameters; not of their values."""
    config = {name: value for name, value in asdict(model.config).items() if name not in ("raw", "task_heads")}
    arrays = [[path_name(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in flatten(params).items()]
    return hashlib.sha256(json.dumps([config, arrays], sort_keys=True).encode()).hexdigest()


def check_table(table: LatencyTable, model: Model, params: Params) -> None:
    """Refuses a table that does not hold here.

    Raises:
        ValueError: If it was measured on another device, with another version of JAX or other compiler flags, or for
            parameters of other shapes.
    """
    known = table.conditions
    here = conditions(model, params, batch=known.batch, length=known.length)
    words = {"device": "on", "jax": "with jax", "flags": "with XLA_FLAGS", "model": "for a model with the shapes"}
    for name, word in words.items():
        stored, expected = (str(getattr(of, name))[: 12 if name == "model" else None] for of in (known, here))
        if getattr(known, name) != getattr(here, name):
            raise ValueError(
                f"this latency table does not hold here: it was measured {word} {stored!r}, this is {expected!r}. "
                "Measure a table of this model on this device."
            )


def write_table(path: Path, table: LatencyTable) -> Path:
    """Writes a table as JSON; the file is the old one or the new one, whatever happens."""
    return write_atomic(path, _to_json(table))


def _to_json(table: LatencyTable) -> bytes:
    return (json.dumps({"format": _FORMAT, **asdict(table)}, indent=1) + "\n").encode()


_SCHEMA = {
    "format": range(_FORMAT, _FORMAT + 1),
    "conditions": {
        **dict.fromkeys(("device", "jax", "flags", "model"), str),
        "batch": range(1, 2**31),
        "length": (range(1, 2**31), [range(1, 2**31)]),
    },
    "rows": [{"sites": [str], "widths": [COUNT], "seconds": [float]}],
    "fixed": float,
    "scale": float,
    "wholes": [[float]],
}


def read_table(path: Path) -> LatencyTable:
    """Reads what `write_table` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no latency table {path}.")
    problems, table = _parse(path.read_bytes())
    if problems or table is None:
        raise ValueError(f"{path} is no latency table: {'; '.join(problems)}.")
    return table


def _parse(text: bytes) -> tuple[list[str], LatencyTable | None]:
    """The problems of a table in JSON, and the table."""
    problems, content = parse_header(text.decode(errors="replace"), _SCHEMA)
    if content is not None:
        del content["format"]
        content["rows"] = tuple(Row(**{name: tuple(each) for name, each in row.items()}) for row in content["rows"])
        content["wholes"] = tuple(map(tuple, content["wholes"]))
        content["conditions"] = known = Conditions(**content["conditions"])
        if not isinstance(known.length, int):
            content["conditions"] = replace(known, length=tuple(known.length))
        problems = [
            f"the row of {', '.join(row.sites[:1])} needs rising widths from 0, and seconds of each"
            for row in content["rows"]
            if row.widths[:1] != (0,) or (np.diff(row.widths) <= 0).any() or len(row.seconds) != len(row.widths)
        ]
        if content["fixed"] < 0:
            problems.append(f"fixed is {content['fixed']}, expected seconds from 0 upwards")
        if np.shape(known.length) not in ((), (2,)) or any(len(pair) != 2 for pair in content["wholes"]):
            problems.append("length is one number or two, and wholes are pairs")
    return problems, None if content is None or problems else LatencyTable(**content)


class Trial(NamedTuple):
    """A selection by the table, and what it took."""

    asked: float  # of the table, in the unit of the target
    measured: float
    gates: Gates


class LatencySearch(NamedTuple):
    """All selections, and which of them is nearest to the target."""

    trials: tuple[Trial, ...]
    best: int  # the first of equals

    @property
    def gates(self) -> Gates:
        """The nearest selection."""
        return self.trials[self.best].gates


def search_latency(
    choose: Callable[[float], Gates],
    measure: Callable[[Gates], float],
    target: float,
    *,
    least: float,
    most: float,
    tolerance: float = 0.05,
    tries: int = 4,
) -> LatencySearch:
    """Selects until what is measured is near the target.

    After a measurement that is off by a factor, the table is asked for the last budget divided by that factor. It ends
    within the tolerance, after so many tries, or as soon as a selection has the widths of an earlier one.

    Args:
        choose: Selects by a budget, such as a partial of `select`.
        measure: What a selection takes, in the unit of the target: seconds, or a fraction of the dense model's.
        target: What it should take.
        least: The smallest budget that can be asked for.
        most: The largest that makes sense, that of the dense model.
        tolerance: How far from the target is near enough, as a fraction of it.
        tries: Selections at most; each is compiled and timed.

    Returns:
        The tries, and the nearest of them; the factor counts, so that half is as far as double.

    Raises:
        ValueError: If `tries` is below 1, the target is not above 0, or as `choose`.
    """
    if tries < 1 or not target > 0:
        raise ValueError(f"tries must be at least 1 and target above 0, got {tries} and {target}.")
    done: list[Trial] = []
    asked = target
    while True:
        gates = choose(asked)
        if any(_widths(gates) == _widths(trial.gates) for trial in done):
            break
        done.append(Trial(asked, measure(gates), gates))
        factor = done[-1].measured / target
        if len(done) == tries or abs(factor - 1.0) <= tolerance:
            break
        asked = min(max(asked / factor, least), most)
    return LatencySearch(tuple(done), min(range(len(done)), key=lambda i: abs(math.log(done[i].measured / target))))


def _widths(gates: Gates) -> dict[str, int]:
    return {name: int(np.count_nonzero(gate)) for name, gate in gates.items()}

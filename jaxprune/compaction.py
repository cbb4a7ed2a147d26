"""Makes a pruned model smaller: slices away closed units and folds what is left of their gates into the weights.

A fractional gate goes into the rows of the kernel that reads the unit; one of a query channel, which no kernel reads,
into what makes the query. What a closed unit is replaced by goes, through the kernel that reads it, into the bias
behind it. One axis table says which array has units along which axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.units import (
    KINDS,
    UNITS,
    UNREAD,
    AnyModel,
    AxisTable,
    Gates,
    Params,
    Path,
    Site,
    axes_of,
    check_gates,
    flatten,
    has_units,
    lengths,
    merge_units,
    path_name,
    readers,
    reads,
    resize,
    sites,
    subtree,
    take_units,
    takes_gate,
    unflatten,
    unit_axes,
    widths,
)

SHAPES = 8  # widths of a kind of module, at most, see `fewer_shapes`


def compact(
    model: AnyModel, params: Params, gates: Mapping[str, Any], means: Mapping[str, Any] | None = None
) -> Params:
    """Removes the units whose gate is 0. Runs on the host, in NumPy.

    It keeps the function: for the same `model`, `apply(params, x, gates, means=means)` equals
    `apply(compact(model, params, gates, means), x)` up to rounding. A gate that is neither 0 nor 1 multiplies the rows
    of the kernel that reads the unit; any finite number will do. `(1 - gate) * mean` goes through that kernel into the
    bias behind it. Products are taken in float32, sums in float64; the result has the type of the parameter.

    All heads of a module keep as many channels as the one that has the most open: where `select` made the gates, those
    are all that are open; in other heads the first closed ones stay, too, with weights of zero.

    Args:
        model: The architecture.
        params: Parameters of any widths; they are not changed.
        gates: Site name to gates `[units]`. A site that is not named stays as it is.
        means: Site name to what a closed unit is replaced by, `[units]`, or `[heads, channels]` for heads; a missing
            one is zero.

    Returns:
        Parameters in the same structure. Arrays that do not change are the same objects as in `params`, not copies: do
        not donate one of the two while the other is in use.

    Raises:
        ValueError: If the gates or means do not fit the parameters or are not finite, gates have one row per example
            or are for units of two kinds that share a parameter, or there is no map that reads the units, or no bias
            behind it, for the means to go into.
    """
    gates = {name: np.asarray(gate, np.float32) for name, gate in gates.items()}
    means = {name: np.asarray(mean, np.float32) for name, mean in (means or {}).items()}
    check_gates(model, params, gates)
    places = {site.name: site for site in sites(model.axes, params, KINDS)}
    _refuse([f"gates of {name} have one row per example" for name, gate in gates.items() if gate.ndim != 1])
    _refuse([f"gates of {name} hold NaN or infinity" for name, gate in gates.items() if not np.isfinite(gate).all()])
    _refuse([f"means of {name}: there is no such site" for name in means if name not in places])
    _refuse([f"means of {name}: no kernel reads its units" for name in means if places[name].kind in UNREAD])
    small = {path: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for path, leaf in flatten(params).items()}
    for name, gate in gates.items():
        arrays = flatten(subtree(params, places[name].module))
        changed = compact_site(model.axes, arrays, places[name], gate, means.get(name))
        small |= {path: jax.device_put(array) for path, array in changed.items()}  # asarray compiles for every shape
    return unflatten(small)


def verify(
    model: AnyModel,
    params: Params,
    run: Callable[[Params, Gates | None], Any],
    *,
    kinds: tuple[str, ...] = UNITS,
    tolerance: float = 1e-4,
) -> float:
    """Tries whether a model of your own obeys its gates: units that are removed are missed as closed ones are.

    Args:
        model: Its axes.
        params: Its parameters.
        run: A function of parameters and gates, None if all are open, that returns an array, such as the logits of a
            few examples. It must be deterministic.
        kinds: The kinds of units that it has gates for.
        tolerance: By how much the outputs may differ, as a fraction of the largest.

    Returns:
        How much they differ.

    Raises:
        ValueError: Naming the sites whose gates do something else than `compact`, and what that may be.
    """
    random, width = np.random.default_rng(0), widths(model.axes, params, kinds)
    tried = {name: random.choice([0.0, 0.5, 1.0, 1.5], units).astype(np.float32) for name, units in width.items()}

    def differs(gates: Mapping[str, Any], power: int = 1) -> float:
        folded = {name: gate**power for name, gate in gates.items()}
        expected = np.asarray(run(params, jax.device_put(dict(gates))), np.float64)
        try:
            found = np.asarray(run(compact(model, params, folded), None), np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the model does not run without some units of {', '.join(gates)}: it must read widths from the shapes "
                f"of its arrays. It says: {error}"
            ) from error
        return float(np.abs(found - expected).max(initial=0.0) / (np.abs(expected).max(initial=0.0) or 1.0))

    if (error := differs(tried)) <= tolerance:
        return error
    problems = []
    for name, gate in tried.items():
        if differs({name: gate}) <= tolerance:
            continue
        if np.array_equal(run(params, None), run(params, {name: jnp.zeros(width[name])})):
            problems.append(f"the gate of {name} multiplies nothing")
        elif differs({name: gate}, 2) <= tolerance:
            problems.append(f"the gate of {name} multiplies twice")
        else:
            problems.append(
                f"the gate of {name} is not where the kernel with {name.rpartition('.')[2]} as first axis reads them, "
                "or an axis is named wrongly"
            )
    raise ValueError(f"removing units and closing them differ by {error:.1e}: {'; '.join(problems) or 'together'}.")


def compacted_shapes(model: AnyModel, params: Params, gates: Mapping[str, Any]) -> Params:
    """The shapes and types (`jax.ShapeDtypeStruct`) of what `compact` gives. Of the parameters only theirs are read.

    Args:
        model: The architecture.
        params: Parameters of any widths, or their shapes.
        gates: Site name to gates `[units]`, as for `compact`.

    Raises:
        ValueError: If the gates do not fit the parameters.
    """
    check_gates(model, params, gates)
    flat = flatten(params)
    small = {path: list(leaf.shape) for path, leaf in flat.items()}
    for site in sites(model.axes, params, KINDS):
        for path in flat if site.name in gates else ():
            axes = axes_of(model.axes, path)
            if path[: len(site.module)] == site.module and has_units(axes, site.kind):
                units = unit_axes(axes, site.kind)
                remaining = _open_units(np.asarray(gates[site.name], np.float32), [small[path][i] for i in units])
                for i, size in zip(units, remaining.shape, strict=True):
                    small[path][i] = size
    return unflatten({path: jax.ShapeDtypeStruct(tuple(small[path]), leaf.dtype) for path, leaf in flat.items()})


def fewer_shapes(model: AnyModel, params: Params, small: Params) -> Params:
    """A compacted model with units of zero, so that its modules have one of a few widths, and computes the same.

    Layers of equal shape share compiled programs, and so do several selections from the same model: what runs once or
    twice is sooner done with a little more to compute and less to compile.

    Args:
        model: The architecture.
        params: The dense parameters.
        small: What is left of them.
    """
    dense = lengths(model.axes, params)
    widths = {
        site: min(math.ceil(width / step) * step, dense[site])
        for site, width in lengths(model.axes, small).items()
        for step in [math.ceil(dense[site] / SHAPES) or 1]
    }
    return unflatten(jax.device_put(flatten(resize(model.axes, small, widths))))


def check_biases(model: AnyModel, params: Params, names: Collection[str]) -> None:
    """Refuses means at sites with no bias for them to go into. Of the parameters only the paths are read.

    Raises:
        ValueError: Naming every such site.
    """
    flat = flatten(params)
    kernels = {name: path for name, path in readers(model.axes, params, KINDS).items() if name in names}
    _refuse([_homeless(name, path) for name, path in kernels.items() if (*path[:-1], "bias") not in flat])


def compact_site(
    table: AxisTable, arrays: Mapping[Path, Any], site: Site, gate: np.ndarray, mean: np.ndarray | None
) -> dict[Path, np.ndarray]:
    """The arrays of one site's module that change.

    Args:
        table: The family's axis table.
        arrays: All arrays of the module, by their paths within it.
        site: The site.
        gate: Its gates, float32 `[units]`.
        mean: What its closed units are replaced by; None is zero.

    Returns:
        New arrays by full path.
    """
    changed: dict[Path, np.ndarray] = {}
    for local, leaf in arrays.items():
        path = (*site.module, *local)
        axes = axes_of(table, path)
        if not has_units(axes, site.kind) or (gate == 1.0).all():
            continue
        array = np.asarray(leaf)
        remaining = _open_units(gate, [array.shape[i] for i in unit_axes(axes, site.kind)])
        if mean is not None and reads(axes):
            bias = (*local[:-1], "bias")
            if bias not in arrays:
                _refuse([_homeless(site.name, path)])
            kernel, _ = merge_units(array, axes, site.kind)
            changed[(*site.module, *bias)] = _shift(kernel, gate, mean, np.asarray(arrays[bias]), site.name)
        if takes_gate(axes, site.kind):
            changed[path] = take_units(array, axes, site.kind, remaining, gate[remaining])
        elif remaining.size < gate.size:
            changed[path] = take_units(array, axes, site.kind, remaining)
    return changed


def _open_units(gate: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The indices of the units that stay, in order and in the shape of their axes, padded with closed ones."""
    closed = (gate == 0.0).reshape(math.prod(shape[:-1]), shape[-1])
    most = int((~closed).sum(1).max(initial=0))
    places = np.sort(np.argsort(closed, axis=1, kind="stable")[:, :most], axis=1)  # the open ones, then closed ones
    return (places + np.arange(len(closed))[:, None] * shape[-1]).reshape(*shape[:-1], most)


def _shift(kernel: np.ndarray, gate: np.ndarray, mean: np.ndarray, bias: np.ndarray, name: str) -> np.ndarray:
    """The bias with `(1 - gate) * mean` added, seen through the kernel, whose first axis is that of the units."""
    if mean.shape != kernel.shape[:-1] or not np.isfinite(mean).all():
        _refuse([f"means of {name} must be finite, of shape {kernel.shape[:-1]}, and have shape {mean.shape}"])
    rows = (1.0 - gate.astype(np.float64)).reshape(-1, *[1] * (mean.ndim - 1)) * mean
    added = rows.reshape(-1) @ kernel.astype(np.float64).reshape(-1, kernel.shape[-1])
    return (bias.astype(np.float64) + added).astype(bias.dtype)


def _homeless(name: str, path: Path) -> str:
    return f"means of {name} have nowhere to go: {path_name(path)} has no bias"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(f"the model cannot be compacted: {'; '.join(problems)}.")

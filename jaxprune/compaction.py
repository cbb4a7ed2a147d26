"""Makes a pruned model smaller: slices away closed units and folds what is left of their gates into the weights.

A fractional gate goes into the rows of the kernel that reads the unit. What a closed unit is replaced by goes, through
that kernel, into the bias behind it. One axis table says which array has units along which axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.gates import (
    AxisTable,
    Params,
    Path,
    Site,
    axes_of,
    check_gates,
    flatten,
    path_name,
    reads,
    sites,
    subtree,
    unflatten,
)
from jaxprune.models import Model


def compact(model: Model, params: Params, gates: Mapping[str, Any], means: Mapping[str, Any] | None = None) -> Params:
    """Removes the units whose gate is 0. Runs on the host, in NumPy.

    It keeps the function: for the same `model`, `apply(params, x, gates, means=means)` equals
    `apply(compact(model, params, gates, means), x)` up to rounding. A gate that is neither 0 nor 1 multiplies the rows
    of the kernel that reads the unit; any finite number will do. `(1 - gate) * mean` goes through that kernel into the
    bias behind it. Products are taken in float32, sums in float64; the result has the type of the parameter.

    Args:
        model: The architecture.
        params: Parameters of any widths; they are not changed.
        gates: Site name to gates `[units]`. A site that is not named stays as it is.
        means: Site name to what a closed unit is replaced by, `[units]`, or `[units, head_dim]` for heads; a missing
            one is zero.

    Returns:
        Parameters in the same structure. Arrays that do not change are the same objects as in `params`, not copies: do
        not donate one of the two while the other is in use.

    Raises:
        ValueError: If the gates or means do not fit the parameters or are not finite, gates have one row per example,
            or the map that reads the units has no bias for the means to go into.
    """
    gates = {name: np.asarray(gate, np.float32) for name, gate in gates.items()}
    means = {name: np.asarray(mean, np.float32) for name, mean in (means or {}).items()}
    check_gates(model, params, gates)
    places = {site.name: site for site in sites(model.axes, params)}
    _refuse([f"gates of {name} have one row per example" for name, gate in gates.items() if gate.ndim != 1])
    _refuse([f"gates of {name} hold NaN or infinity" for name, gate in gates.items() if not np.isfinite(gate).all()])
    _refuse([f"means of {name}: there is no such site" for name in means if name not in places])
    small = {path: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for path, leaf in flatten(params).items()}
    for name, gate in gates.items():
        changed = _compact_site(
            model.axes, flatten(subtree(params, places[name].module)), places[name], gate, means.get(name)
        )
        small |= {path: jnp.asarray(array) for path, array in changed.items()}
    return unflatten(small)


def _compact_site(
    table: AxisTable, arrays: Mapping[Path, Any], site: Site, gate: np.ndarray, mean: np.ndarray | None
) -> dict[Path, np.ndarray]:
    """The arrays of one site's module that change, by full path."""
    kept = np.flatnonzero(gate)
    changed: dict[Path, np.ndarray] = {}
    for local, leaf in arrays.items():
        path = (*site.module, *local)
        axes = axes_of(table, path)
        if site.kind not in axes or (gate == 1.0).all():
            continue
        array = np.asarray(leaf)
        if reads(axes, path):
            if mean is not None:
                bias = (*local[:-1], "bias")
                if bias not in arrays:
                    _refuse([f"means of {site.name} have nowhere to go: {path_name(path)} has no bias"])
                changed[(*site.module, *bias)] = _shift(array, gate, mean, np.asarray(arrays[bias]), site.name)
            changed[path] = _scale(array[kept], gate[kept])
        elif len(kept) < len(gate):
            changed[path] = np.take(array, kept, axes.index(site.kind))
    return changed


def _scale(kernel: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """The kernel with every unit's rows multiplied by its gate."""
    if (gate == 1.0).all():
        return kernel
    return (kernel.astype(np.float32) * gate.reshape(-1, *[1] * (kernel.ndim - 1))).astype(kernel.dtype)


def _shift(kernel: np.ndarray, gate: np.ndarray, mean: np.ndarray, bias: np.ndarray, name: str) -> np.ndarray:
    """The bias with `(1 - gate) * mean` added, seen through the kernel."""
    if mean.shape != kernel.shape[:-1] or not np.isfinite(mean).all():
        _refuse([f"means of {name} must be finite, of shape {kernel.shape[:-1]}, and have shape {mean.shape}"])
    rows = (1.0 - gate.astype(np.float64)).reshape(-1, *[1] * (mean.ndim - 1)) * mean
    added = rows.reshape(-1) @ kernel.astype(np.float64).reshape(-1, kernel.shape[-1])
    return (bias.astype(np.float64) + added).astype(bias.dtype)


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ValueError(f"the model cannot be compacted: {'; '.join(wrong)}.")

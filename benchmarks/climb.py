"""Shared parts of methods that repair a pruned model from the bottom up: rows, budget, and the climb itself.

The climb visits every module (an attention, a feed-forward network) once, in the order in which they run. What is below
is finished, what is above is still dense. A visit decides which units stay and may change what reads them. Units are
closed by gates and stay in the arrays, so that no new shape is ever compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import eigh

from jaxprune.data.batches import Batch, encode, pack
from jaxprune.data.tasks import Example, Task
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import (
    BlockSettings,
    Layer,
    Mask,
    Model,
    State,
    advance,
    enter,
    layer_entries,
    mask_of,
    model_inputs,
    model_layers,
)
from jaxprune.models.cost import Length, matmul_flops, unit_costs
from jaxprune.pruning.selection import SLACK
from jaxprune.units import UNITS, Intervention, Params, Path, flatten, open_gates, readers, subtree, unflatten, widths

_SETTINGS = BlockSettings(returns=(*UNITS, "residual"))

Masks: TypeAlias = dict[str, np.ndarray]  # site name -> one float32 multiplier per unit


class Calibration(NamedTuple):
    """The rows that a method reads, and its budget."""

    head: str  # the task head
    batches: tuple[Batch, ...]
    costs: Mapping[str, float]  # FLOPs of one unit of every site
    budget: float  # FLOPs that may stay


class Sums(NamedTuple):
    """Sums over the tokens that are no padding, float64: all that least squares for one module needs."""

    gram: Float[np.ndarray, "k k"]  # of the gated values
    cross: Float[np.ndarray, "k e"]  # of the gated values with the target


class Visit(NamedTuple):
    """A module of the current model, and the model around it."""

    site: str  # of its units
    layer: int  # its place among the layers
    params: Params  # of the current model
    masks: Masks  # of the current model; from here up as they were before the climb
    kernel: Float[np.ndarray, "units *channels e"]  # what reads the units
    states: Sequence[Any]  # what its layer reads in the current model, one per batch
    sums: Callable[[np.ndarray], Sums]  # of this module, from its mask; target: dense residual sum - residual - bias


# What stays of a module's units, and what reads them if that changes
Decision: TypeAlias = tuple[np.ndarray, np.ndarray | None]


def prepare(
    model: Model,
    params: Params,
    task: Task,
    rows: Sequence[Example],
    *,
    flops: float,
    length: Length | None,
    head: str | None,
    batch_size: int,
    max_length: int | None,
) -> Calibration:
    """Tokenises the calibration rows and counts what may stay.

    Raises:
        ValueError: If the model answers in text, `flops` is out of range, or the task head does not fit the task.
    """
    refuse_text(model)
    head = fitting_head(model, task, head)
    encoded = encode(model, rows, max_length=max_length)
    costs, budget = allowance(model, params, flops, encoded.mean_length if length is None else length)
    return Calibration(head, tuple(pack(encoded, batch_size=batch_size)), costs, budget)


def refuse_text(model: Model) -> None:
    """Refuses models that answer in text.

    Raises:
        ValueError: If it does.
    """
    if model.answers_in_text:
        raise ValueError("this method was described for encoders with task heads; the model answers in text.")


def allowance(model: Model, params: Params, flops: float, length: Length) -> tuple[dict[str, float], float]:
    """The FLOPs of one unit of every site, and what of all of them may stay.

    Raises:
        ValueError: If `flops` is not in (0, 1].
    """
    if not 0 < flops <= 1:
        raise ValueError(f"flops must lie in (0, 1], got {flops}.")
    costs = unit_costs(model, params, matmul_flops(model, length))
    whole = sum(units * costs[name] for name, units in widths(model.axes, params).items())
    return costs, (flops + SLACK) * whole


def open_masks(model: Model, params: Params) -> Masks:
    """Ones for all heads and neurons."""
    return {name: np.array(gate) for name, gate in open_gates(model, params).items()}


def reader_of(model: Model, params: Params, site: str) -> Float[np.ndarray, "units *channels e"]:
    """The kernel that reads the units of a site."""
    return np.asarray(subtree(params, _kernels(model, params)[site]), np.float64)


def is_whole(masks: Mapping[str, np.ndarray], site: str) -> bool:
    """True if nothing was removed up to a site."""
    names = list(masks)
    return all((masks[name] == 1.0).all() for name in names[: names.index(site) + 1])


def pooled(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The units of all sites, one after the other."""
    return np.concatenate([np.zeros(0), *parts.values()])


def open_only(like: Mapping[str, np.ndarray], kept: np.ndarray) -> Masks:
    """Masks that are open for some of the pooled units."""
    flat = np.zeros(sum(map(len, like.values())), np.float32)
    flat[kept] = 1.0
    ends = np.cumsum([len(own) for own in like.values()])
    return dict(zip(like, np.split(flat, ends[:-1]), strict=True)) if like else {}


def solve_damped(
    gram: Float[np.ndarray, "k k"], right: Float[np.ndarray, " k *e"], damping: float
) -> Float[np.ndarray, " k *e"]:
    """Solves `(gram + damping) x = right`; what rounding made of eigenvalues of zero is zero again."""
    values, vectors = eigh(gram)
    return vectors @ ((vectors.T @ right).T / (np.maximum(values, 0.0) + damping)).T


def kind_of(site: str) -> str:
    """The kind of a site's units: `"3.ffn.neurons"` has neurons."""
    return site.rpartition(".")[2]


def climb(
    model: Model,
    params: Params,
    masks: Mapping[str, np.ndarray],
    batches: Sequence[Mapping[str, Any]],
    decide: Callable[[Visit], Decision],
) -> tuple[Params, Masks]:
    """Visits all modules from the bottom up.

    Args:
        model: The architecture.
        params: The dense parameters.
        masks: Those of the model before the climb.
        batches: The rows; hidden states wait on the host.
        decide: What is done to a module.

    Returns:
        The parameters in the shapes of `params`, and the masks; `compact` takes both.
    """
    flat, masks = flatten(params), dict(masks)
    inputs = [model_inputs(model, params, batch) for batch in batches]
    dense: list[Any] = [None] * len(inputs)
    current: list[Any] = [None] * len(inputs)
    for place, whole in enumerate(model_layers(model, params)):
        own, targets = _readers(model, params, whole), []
        for i, batch in enumerate(inputs):
            dense[i] = jax.device_get(enter(model, whole, batch, dense[i]))
            current[i] = dense[i] if current[i] is None else current[i]
            dense[i], found = jax.device_get(_targets(model, own, whole.params, dense[i], mask_of(whole, batch)))
            targets.append(found)
        for reader in own:
            site = f"{whole.name}.{reader.site}"
            kernel = (*whole.path, *reader.kernel)
            layer = model_layers(model, unflatten(flat))[place]
            sums = partial(_sums, model, reader, layer, masks, current, inputs, targets)
            masks[site], changed = decide(
                Visit(site, place, unflatten(flat), masks, np.asarray(flat[kernel], np.float64), current, sums)
            )
            if changed is not None:
                flat[kernel] = jnp.asarray(changed, flat[kernel].dtype)
        layer = model_layers(model, unflatten(flat))[place]
        gates: Any = masks
        for i, batch in enumerate(inputs):
            current[i] = jax.device_get(advance(model, [layer], batch, current[i], Intervention(gates)))
    return unflatten(flat), masks


class _Reader(NamedTuple):
    """The kernel that reads the units of one module, by local names: layers of equal shape share programs."""

    module: str  # "ffn"
    site: str  # "ffn.neurons"
    kernel: Path  # ("ffn", "down", "kernel")


def _kernels(model: Model, params: Params) -> dict[str, Path]:
    """The paths of the kernels that read units, by site, in the order in which the modules run."""
    return readers(model.axes, params)


def _readers(model: Model, params: Params, layer: Layer) -> tuple[_Reader, ...]:
    """The readers of a layer, in the order in which its modules run."""
    found = []
    for name, path in _kernels(model, params).items():
        if path[: len(layer.path)] == layer.path:
            local, site = path[len(layer.path) :], name.removeprefix(f"{layer.name}.")
            found.append(_Reader(site.rpartition(".")[0], site, local))
    return tuple(found)


@partial(jax.jit, static_argnums=(0, 1))
def _targets(
    model: Model, places: tuple[_Reader, ...], params: Params, state: State, mask: Mask
) -> tuple[State, dict[str, Float[Array, "b t e"]]]:
    """The layer's output, and the residual sum behind every module."""
    after, found = model.block(params, state, mask, settings=_SETTINGS)
    flat, sums = flatten(params), {}
    for module, site, kernel in places:
        values, weight = found[site].astype(jnp.float32), flat[kernel].astype(jnp.float32)
        output = jnp.tensordot(values, weight, weight.ndim - 1, precision="highest")
        sums[module] = found[f"{module}.residual"].astype(jnp.float32) + output + _bias(flat, kernel)
    return after, sums


def _sums(
    model: Model,
    reader: _Reader,
    layer: Layer,
    masks: Mapping[str, np.ndarray],
    states: Sequence[Any],
    inputs: Sequence[Mapping[str, Array]],
    targets: Sequence[Mapping[str, Any]],
    mask: np.ndarray,
) -> Sums:
    """The sums of one module over all batches, with its units gated by `mask`."""
    gates = layer_entries(masks, layer.name) | {reader.site: mask}
    total = None
    for state, batch, target in zip(states, inputs, targets, strict=True):
        found = _products(model, reader, layer.params, state, mask_of(layer, batch), gates, target[reader.module])
        own = [np.asarray(array, np.float64) for array in found]
        total = own if total is None else [one + other for one, other in zip(total, own, strict=True)]
    if total is None or not all(np.isfinite(array).all() for array in total):
        raise ValueError(f"{layer.name}.{reader.module}: there are no rows, or an activation is not finite.")
    return Sums(*total)


@partial(jax.jit, static_argnums=(0, 1))
def _products(
    model: Model, reader: _Reader, params: Params, state: State, mask: Mask, gates: Any, target: Float[Array, "b t e"]
) -> tuple[Float[Array, "k k"], Float[Array, "k e"]]:
    """The products of a module's gated values with themselves, and with what is missing from its residual sum."""
    found = model.block(params, state, mask, Intervention(gates), settings=_SETTINGS)[1]
    values = found[reader.site].astype(jnp.float32)
    missing = target - found[f"{reader.module}.residual"].astype(jnp.float32) - _bias(flatten(params), reader.kernel)
    there = mask.tokens[..., None].astype(jnp.float32)
    a = (values.reshape(*there.shape[:2], -1) * there).reshape(there.size, -1)
    y = (missing * there).reshape(there.size, -1)
    product = partial(jnp.matmul, precision="highest")
    return product(a.T, a), product(a.T, y)


def _bias(flat: Mapping[Path, Array], kernel: Path) -> Float[Array, " e"]:
    return flat[(*kernel[:-1], "bias")].astype(jnp.float32)

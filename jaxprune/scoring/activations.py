"""Statistics of the gated values, one layer at a time, and what a closed unit is replaced by.

A closed unit is worth zero, or its mean over the calibration tokens: `g * h + (1 - g) * mean`. Scoring and compaction
must use the same, so the means are kept with the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.evaluation.likelihood import answered
from jaxprune.models import BlockSettings, Mask, Model, State, enter, mask_of, model_layers
from jaxprune.units import UNITS, UNREAD, Gates, Params, sites

# (values [b, t, units(, channels)] float32, mask [b, t]) -> [b, units] or [b, units, channels]
Statistic: TypeAlias = Callable[[Array, Array], Array]

# (model, params, batches, kinds of units) -> what a closed unit is replaced by; a missing site is zero
Closed: TypeAlias = Callable[[Model, Params, Iterable[Mapping[str, Any]], tuple[str, ...]], Gates]


def magnitudes(values: Array) -> Float[Array, "b t u"]:
    """The size of each unit's value at each token: `|h|` of a neuron, the norm over the channels of a head."""
    return jnp.abs(values) if values.ndim == 3 else jnp.sqrt(jnp.square(values).sum(tuple(range(3, values.ndim))))


def token_mean(values: Array, mask: Bool[Array, "b t"]) -> Array:
    """The mean over each example's own tokens; 0 for a row without tokens."""
    tokens = jnp.maximum(mask.sum(1), 1).astype(jnp.float32)
    return token_sum(values, mask) / tokens.reshape(-1, *[1] * (values.ndim - 2))


def token_sum(values: Array, mask: Bool[Array, "b t"]) -> Array:
    """The sum over each example's tokens."""
    return jnp.where(mask.reshape(*mask.shape, *[1] * (values.ndim - 2)), values, 0.0).sum(1)


def site_statistics(
    model: Model, params: Params, batch: Mapping[str, Any], statistic: Statistic, kinds: tuple[str, ...] = UNITS
) -> dict[str, Array]:
    """One statistic of the gated values at every site, for every example. Only one layer's values exist at a time.

    Args:
        model: The architecture.
        params: Parameters.
        batch: As for `Model.apply`; of a text-to-text model with `candidates` and `labels`, see `answered`.
        statistic: Takes the values `[b, t, units]` (heads: `[b, t, units, channels]`) in float32 and the mask `[b, t]`.
        kinds: Kinds of units.

    Returns:
        Site name to what `statistic` returns.
    """
    inputs = answered(model, params, batch)
    state, statistics = None, {}
    for layer in model_layers(model, params):
        state = enter(model, layer, inputs, state)
        settings = BlockSettings(kind=layer.kind, returns=kinds)
        state, values = _block_statistics(model, settings, statistic, layer.params, state, mask_of(layer, inputs))
        statistics |= {f"{layer.name}.{name}": value for name, value in values.items()}
    return statistics


@partial(jax.jit, static_argnums=(0, 1, 2))
def _block_statistics(
    model: Model, settings: BlockSettings, statistic: Statistic, params: Params, state: State, mask: Mask
) -> tuple[State, dict[str, Array]]:
    state, values = model.block(params, state, mask, settings=settings)
    return state, {name: statistic(value.astype(jnp.float32), mask.tokens) for name, value in values.items()}


def zero(model: Model, params: Params, batches: Iterable[Mapping[str, Any]], kinds: tuple[str, ...] = UNITS) -> Gates:
    """A closed unit is worth nothing."""
    return {}


def calibration_means(
    model: Model, params: Params, batches: Iterable[Mapping[str, Any]], kinds: tuple[str, ...] = UNITS
) -> Gates:
    """A closed unit is worth its mean over all tokens of the batches, padding left out. Costs one forward pass.

    Returns:
        Site name to `[units]`, for heads to `[heads, channels]`, float32.

    Raises:
        ValueError: If the batches hold no token, or query channels are asked for: their values are multiplied with the
            keys, and no bias behind them can stand for a mean.
    """
    if set(UNREAD) & set(kinds):
        raise ValueError("a closed query channel has no mean to be worth, since no kernel reads it: use closed=zero.")
    sums: dict[str, Array] = {}
    tokens: list[dict[str, Array]] = []
    for batch in batches:
        batch = answered(model, params, batch)
        sums = _add_rows(sums, site_statistics(model, params, batch, token_sum, kinds))
        tokens.append({stack.name: batch[stack.inputs[1]].sum() for stack in model.stacks})
    counts = {name: sum(int(counted[name]) for counted in tokens) for name in (tokens[0] if tokens else {})}
    if not counts or not all(counts.values()):
        raise ValueError("the batches hold no token: there is nothing to take means of.")
    return {site.name: sums[site.name] / counts[site.stack] for site in sites(model.axes, params, kinds)}


@jax.jit
def _add_rows(sums: dict[str, Array], more: dict[str, Array]) -> dict[str, Array]:
    return {name: value.sum(0) + sums.get(name, 0.0) for name, value in more.items()}

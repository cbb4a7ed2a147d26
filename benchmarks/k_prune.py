"""Re-implementation of K-prune from its description: knowledge is measured, cut and repaired, module by module.

It shares no code with the authors' and was not checked against it. Where the description leaves something open, a
docstring says what was chosen.

References:
    Park et al., Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from climb import (
    Calibration,
    Decision,
    Masks,
    Sums,
    Visit,
    climb,
    is_whole,
    kind_of,
    open_masks,
    open_only,
    pooled,
    prepare,
    reader_of,
    refuse_text,
    solve_damped,
)
from jaxtyping import Array, Float

from jaxprune.compaction import compact
from jaxprune.data.tasks import Example, Task
from jaxprune.models import BlockSettings, Mask, Model, State, enter, layer_entries, mask_of, model_inputs, model_layers
from jaxprune.models.cost import Length
from jaxprune.models.running import Prefix, forward
from jaxprune.units import Gates, Intervention, Params


class Knowledge(NamedTuple):
    """The knowledge that is lost with each unit of a site."""

    predictive: Float[np.ndarray, " units"]  # of what the model says
    representational: Float[np.ndarray, " units"]  # of what the module adds


def k_prune(
    model: Model,
    params: Params,
    task: Task,
    *,
    rows: Sequence[Example],
    flops: float,
    length: Length | None = None,
    head: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    temperature: float = 2.0,
    predictive: float = 1.0,
    representational: float = 2.5e-4,
    head_weight: float | None = None,
    ridge: float = 1e-5,
) -> Params:
    """Prunes for one task module by module, as re-implemented here.

    From the bottom up, attention before feed-forward network: `knowledge` of all units from here up is measured in the
    current model; a threshold on `(predictive K_pred + representational K_rep) / FLOPs of the unit` is found with which
    what stays just fits the budget that is left; this module alone is cut there, and `tune` fits what reads its units.

    Chosen here: the square is taken per row and summed over the rows, so `representational` weighs less the more rows
    there are (2.5e-4 was published for about 100,000 tokens). Before anything is cut the divergence and its gradient
    are zero: the first module is ranked by representational knowledge alone. The threshold lies at the end of the
    longest prefix of the ranking that the budget pays for. A module is not tuned as long as nothing was removed up to
    it: its weights solve the problem.

    Args:
        model: An encoder with task heads.
        params: The dense parameters.
        task: The task.
        rows: Calibration rows, whose labels are not read; about 100,000 tokens in the paper.
        flops: Fraction of the layers' FLOPs that may stay.
        length: Tokens per example; None is the mean of the rows.
        head: The task head; by default the one of the task's name, else the only one.
        batch_size: Rows that are computed together; it does not change the result.
        max_length: Tokens to which a text is cut; by default 128.
        temperature: Of the divergence.
        predictive: Weight of the predictive knowledge.
        representational: Weight of the representational knowledge.
        head_weight: What scores of heads are multiplied by; None is the number of their channels.
        ridge: See `tune`.

    Returns:
        The small parameters.

    Raises:
        ValueError: If the model answers in text, `flops` is not in (0, 1], or the head is a regression.
    """
    options: dict[str, Any] = {"length": length, "head": head, "batch_size": batch_size, "max_length": max_length}
    return k_prune_batches(
        model,
        params,
        prepare(model, params, task, rows, flops=flops, **options),
        temperature=temperature,
        predictive=predictive,
        representational=representational,
        head_weight=head_weight,
        ridge=ridge,
    )


def k_prune_batches(
    model: Model,
    params: Params,
    calibration: Calibration,
    *,
    temperature: float = 2.0,
    predictive: float = 1.0,
    representational: float = 2.5e-4,
    head_weight: float | None = None,
    ridge: float = 1e-5,
) -> Params:
    """`k_prune` of rows that are tokenised."""
    refuse_text(model)
    chosen = model.head(calibration.head)
    if chosen.regression:
        raise ValueError(f"K-prune compares probabilities of labels, and the head {chosen.name!r} is a regression.")
    teacher = [np.asarray(forward(model, params, batch, head=chosen.name)[0]) for batch in calibration.batches]

    def decide(visit: Visit) -> Decision:
        found = knowledge(model, visit, calibration, teacher, temperature)
        ranked = {}
        for name, (own, shown) in found.items():
            channels = _channels(model, visit, name)
            weight = channels if head_weight is None or kind_of(name) != "heads" else head_weight
            ranked[name] = weight * (predictive * own + representational * shown) / calibration.costs[name]
        below = [name for name in visit.masks if name not in found]
        spent = sum(float(visit.masks[name].sum()) * calibration.costs[name] for name in below)
        mask = above_threshold(ranked, calibration.costs, calibration.budget - spent)[visit.site]
        if not mask.any() or is_whole(visit.masks | {visit.site: mask}, visit.site):
            return mask, None
        return mask, tune(visit.sums(mask), visit.kernel, mask, ridge)

    tuned, masks = climb(model, params, open_masks(model, params), calibration.batches, decide)
    return compact(model, tuned, masks)


def knowledge(
    model: Model, visit: Visit, calibration: Calibration, teacher: Sequence[np.ndarray], temperature: float
) -> dict[str, Knowledge]:
    """The knowledge lost with every unit from this module up, measured in the current model.

    Predictive: `1/2 g^2` summed over the rows, `g` the gradient of `T^2 KL(dense || current)` of a row with respect to
    a mask. Representational: the token mean of `h_i^2` times the mean over the outputs of `W_out[i]^2`. A head has the
    mean over its channels, each with a mask of its own.
    """
    layers = model_layers(model, visit.params)[visit.layer :]
    names = [name for name in visit.masks if any(name.startswith(f"{layer.name}.") for layer in layers)]
    masks = {
        _channel_site(name): np.repeat(visit.masks[name], _channels(model, visit, name)) for name in names
    }  # one entry per channel, or per neuron
    slopes, squares = ({name: np.zeros(len(mask)) for name, mask in masks.items()} for _ in range(2))
    tokens = 0.0
    for batch, state, logits in zip(calibration.batches, visit.states, teacher, strict=True):
        rows = len(batch["weight"])
        gates = {name: jnp.asarray(np.tile(mask, (rows, 1))) for name, mask in masks.items()}
        start = Prefix(state, visit.layer)
        found, pull = forward(model, visit.params, batch, Intervention(gates), head=calibration.head, prefix=start)
        for name, own in pull(_divergence_slope(found, logits, batch["weight"], temperature))[0].items():
            slopes[name] += 0.5 * np.square(np.asarray(own, np.float64)).sum(0)
        inputs = model_inputs(model, visit.params, batch)
        tokens += float(inputs["attention_mask"].sum())
        for layer in layers:
            state = enter(model, layer, inputs, state)
            own = layer_entries(masks, layer.name)
            state, sums = _squares(model, layer.params, state, mask_of(layer, inputs), own)
            for name, value in sums.items():
                squares[f"{layer.name}.{name}"] += np.asarray(value, np.float64)
    found = {}
    for name in names[names.index(visit.site) :]:
        own, units = _channel_site(name), len(visit.masks[name])
        read = np.square(reader_of(model, visit.params, name)).mean(-1).reshape(-1)
        lost = slopes[own], squares[own] / tokens * read
        found[name] = Knowledge(*(value.reshape(units, -1).mean(1) for value in lost))
    return found


def above_threshold(scores: Mapping[str, np.ndarray], costs: Mapping[str, float], budget: float) -> Masks:
    """Keeps the units with the highest scores, as many as the budget pays for before the first that it does not."""
    values, each = pooled(scores), pooled({name: np.full(len(scores[name]), costs[name]) for name in scores})
    order = np.argsort(-values, kind="stable")
    return open_only(scores, order[: np.searchsorted(np.cumsum(each[order]), budget, side="right")])


def tune(
    sums: Sums, kernel: Float[np.ndarray, "units *channels e"], mask: np.ndarray, ridge: float
) -> Float[np.ndarray, "units *channels e"]:
    """The kernel for the units that stay, by least squares: `min |A W - Y|^2`; the rows of the others stay as they are.

    Chosen here: a ridge towards zero of `ridge` times the mean square of the inputs, so that directions which the rows
    do not show are zero and not noise; the bias stays.
    """
    matrix = kernel.reshape(len(sums.gram), -1).copy()
    rows = np.flatnonzero(np.repeat(mask, len(matrix) // len(mask)))
    gram = sums.gram[np.ix_(rows, rows)]
    size = float(np.trace(gram)) / len(rows)
    if size > 0.0:
        matrix[rows] = solve_damped(gram, sums.cross[rows], ridge * size)
    return matrix.reshape(kernel.shape)


def _channel_site(name: str) -> str:
    """The site of the channels of heads; neurons have their own."""
    return f"{name.removesuffix('heads')}channels" if kind_of(name) == "heads" else name


def _channels(model: Model, visit: Visit, name: str) -> int:
    """The number of channels of a head; 1 for neurons."""
    return math.prod(reader_of(model, visit.params, name).shape[1:-1])


@jax.jit
def _divergence_slope(
    logits: Float[Array, "b l"], teacher: Float[Array, "b l"], weight: Float[Array, " b"], temperature: float
) -> Float[Array, "b l"]:
    """The gradient of `T^2 KL(dense || current)` of every row with respect to the current logits."""
    scaled = partial(jax.nn.softmax, axis=1)
    return temperature * (scaled(logits / temperature) - scaled(teacher / temperature)) * weight[:, None]


@partial(jax.jit, static_argnums=0)
def _squares(model: Model, params: Params, state: State, mask: Mask, gates: Gates) -> tuple[State, dict[str, Array]]:
    """The layer's output, and the sum of every channel's and neuron's square over the tokens, by local name."""
    settings = BlockSettings(returns=("channels", "neurons"))
    state, found = model.block(params, state, mask, Intervention(gates), settings=settings)
    there = mask.tokens[..., None]
    return state, {
        name: jnp.where(there, jnp.square(value.astype(jnp.float32)), 0.0).sum((0, 1)) for name, value in found.items()
    }

"""Re-implementation of Kwon et al. 2022 from its description: Fisher masks, rearranged, then rescaled.

It shares no code with the authors' and was not checked against it. Where the description leaves something open, a
docstring says what was chosen.

References:
    Kwon et al., A Fast Post-Training Pruning Framework for Transformers, 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    refuse_text,
    solve_damped,
)
from jaxtyping import Float

from jaxprune.compaction import compact
from jaxprune.data.tasks import Example, Task
from jaxprune.models import Model
from jaxprune.models.cost import Length
from jaxprune.scoring.attribution import Context, GradientActivation
from jaxprune.scoring.objectives import log_probability, negative_squared_error, signed
from jaxprune.units import Params

FISHER_BATCH = 32  # rows whose mean loss is differentiated together (Kwon et al.)
LARGEST_SCALE = 10.0  # a module with a larger one is not rescaled (Kwon et al.)


def kwon(
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
) -> Params:
    """Prunes for one task with the Fisher information of masks, as re-implemented here.

    The gradient of the mean loss of 32 rows with respect to a unit's mask; its square, summed over such batches, is the
    importance. `split` chooses how many heads and neurons stay and which, `rearrange` exchanges units within a module,
    `rescale` gives every unit that stays a number.

    Chosen here: a batch is 32 rows in the order given, whatever their lengths (its gradient is the mean of those of its
    rows, so that rows of equal length can be computed together); in a regression the loss is the squared error.

    Args:
        model: An encoder with task heads.
        params: The dense parameters.
        task: The task.
        rows: Calibration rows with labels; 2,048 in the paper.
        flops: Fraction of the layers' FLOPs that may stay.
        length: Tokens per example; None is the mean of the rows.
        head: The task head; by default the one of the task's name, else the only one.
        batch_size: Rows that are computed together; it does not change the result.
        max_length: Tokens to which a text is cut; by default 128.

    Returns:
        The small parameters.

    Raises:
        ValueError: If the model answers in text, `flops` is not in (0, 1], or a row has no label.
    """
    options: dict[str, Any] = {"length": length, "head": head, "batch_size": batch_size, "max_length": max_length}
    if any(row.label is None for row in rows):
        raise ValueError("the Fisher information of this method is that of the labels: give rows that have one.")
    return kwon_batches(model, params, prepare(model, params, task, rows, flops=flops, **options))


def kwon_batches(model: Model, params: Params, calibration: Calibration) -> Params:
    """`kwon` of rows that are tokenised."""
    refuse_text(model)
    gradients = batch_gradients(model, params, calibration)
    masks = split(importance(gradients), calibration.costs, calibration.budget)
    masks = {name: rearrange(mask, gradients[name]) for name, mask in masks.items()}
    _, masks = climb(model, params, masks, calibration.batches, rescale)
    return compact(model, params, masks)


def batch_gradients(model: Model, params: Params, calibration: Calibration, size: int = FISHER_BATCH) -> Masks:
    """The gradients of the mean loss of `size` successive rows with respect to all masks: `[batches, units]`."""
    regression = model.head(calibration.head).regression
    criterion = GradientActivation(
        objective=negative_squared_error if regression else log_probability, examples=signed
    )  # value times gradient, summed over tokens: the gradient with respect to a mask of one
    rows: dict[str, list[np.ndarray]] = {}
    for batch in calibration.batches:
        there = batch["weight"] > 0
        for name, value in criterion(model, params, batch, Context(head=calibration.head)).scores.items():
            rows.setdefault(name, []).append(-np.asarray(value, np.float64)[there])  # a loss is minus an objective
    order = np.argsort(np.concatenate([batch["index"][batch["weight"] > 0] for batch in calibration.batches]))
    starts = np.arange(0, len(order), size)
    counts = np.diff(np.append(starts, len(order)))[:, None]
    return {
        name: np.add.reduceat(np.concatenate(rows[name])[order], starts) / counts for name in open_masks(model, params)
    }


def importance(gradients: Mapping[str, np.ndarray]) -> Masks:
    """The sum over batches of the squared gradient."""
    return {name: np.square(gradient).sum(0) for name, gradient in gradients.items()}


def split(scores: Mapping[str, np.ndarray], costs: Mapping[str, float], budget: float) -> Masks:
    """Keeps the heads and neurons whose scores have the largest sum, within a budget.

    For every number of heads, none included, the most neurons that fit; the best of each kind over all layers. Of equal
    sums that with the most heads.

    Args:
        scores: Site name to scores, not negative.
        costs: Site name to the cost of one unit.
        budget: The most that all units together may cost.

    Returns:
        Site name to a mask of zeros and ones.
    """
    order, gain, price = {}, {}, {}
    for kind in ("heads", "neurons"):
        own = {name: value for name, value in scores.items() if kind_of(name) == kind}
        values, each = pooled(own), pooled({name: np.full(len(own[name]), costs[name]) for name in own})
        order[kind] = np.argsort(-values, kind="stable")
        gain[kind], price[kind] = (np.concatenate([[0.0], np.cumsum(x[order[kind]])]) for x in (values, each))
    neurons = np.searchsorted(price["neurons"], budget - price["heads"], side="right") - 1  # -1: the heads cost more
    sums = np.where(neurons < 0, -np.inf, gain["heads"] + gain["neurons"][neurons])
    heads = len(sums) - 1 - int(sums[::-1].argmax())
    found: Masks = {}
    for kind, kept in (("heads", heads), ("neurons", int(neurons[heads]))):
        own = {name: value for name, value in scores.items() if kind_of(name) == kind}
        found |= open_only(own, order[kind][:kept])
    return {name: found[name] for name in scores}


def rearrange(mask: np.ndarray, gradients: Float[np.ndarray, "b units"]) -> np.ndarray:
    """Exchanges closed units for open ones so that `sum_b (sum of the closed units' g_b)^2` becomes small.

    Chosen here: one pass. The open units are offered from the least important up; each is closed, and that closed unit
    is opened, perhaps the same, without which the sum is least. The number of units stays, and the sum never grows.

    Args:
        mask: Of one module, zeros and ones.
        gradients: Of its units, one row per batch.
    """
    squares = np.square(gradients).sum(0)
    closed = [int(i) for i in np.flatnonzero(mask == 0)]
    offered = [int(i) for i in np.argsort(squares, kind="stable") if mask[i] != 0]
    for unit in offered if closed else ():
        closed.append(unit)
        total = gradients[:, closed].sum(1)
        without = squares[closed] - 2.0 * (total @ gradients[:, closed])  # |total - g_i|^2 - |total|^2
        closed.pop(int(without.argmin()))
    found = np.ones_like(mask)
    found[closed] = 0.0
    return found


def rescale(visit: Visit) -> Decision:
    """One number per unit that stays, by least squares towards the dense model's residual sum.

    Minimises `|sum_i s_i c_i - y|^2 + |s - 1|^2`, damping 1, with `c_i` what unit i adds to its residual and `y` the
    dense residual sum less the current residual and the bias. Left at 1 where a number is not finite or above 10 in
    size, and as long as nothing was removed up to here.

    Chosen here: the target is the dense model, all masks open, in its own hidden states; the normal equations are
    solved directly, which is where an iterative solver converges to, so that not converged means not finite; every
    token that is no padding counts, in all layers; a module that is skipped does not stop the climb.
    """
    mask = visit.masks[visit.site]
    kept = np.flatnonzero(mask)
    if not kept.size or is_whole(visit.masks, visit.site):
        return mask, None
    scales = unit_scales(visit.sums(mask), visit.kernel, kept)
    if not np.isfinite(scales).all() or np.abs(scales).max() > LARGEST_SCALE:
        return mask, None
    rescaled = mask.copy()
    rescaled[kept] = scales
    return rescaled, None


def unit_scales(
    sums: Sums, kernel: Float[np.ndarray, "units *channels e"], kept: np.ndarray
) -> Float[np.ndarray, " kept"]:
    """The numbers that `rescale` finds for the units that stay; 1 where a unit's values are zero."""
    matrix = kernel.reshape(len(sums.gram), -1)
    each = np.arange(kernel.shape[0]).repeat(len(matrix) // kernel.shape[0])  # the unit of every row
    member = (each[:, None] == kept).astype(np.float64)
    between = member.T @ (sums.gram * (matrix @ matrix.T)) @ member  # the units' contributions with each other
    towards = member.T @ (sums.cross * matrix).sum(1)
    return 1.0 + solve_damped(between, towards - between.sum(1), 1.0)

"""Prunes while any optax optimizer trains: weights, updates and moments of what is pruned are zero, exactly.

It wraps the optimizer, as a link in a chain could not reach the moments of the others. Weights are ranked only at the
steps of the schedule, behind `jax.lax.cond`; every other step costs a selection by the masks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxprune.sparse.masks import Masks, apply_masks, choose, is_hole, join_masks, start_masks
from jaxprune.sparse.matrices import Matrix, Prunable, find_matrices, pruned_leaves
from jaxprune.sparse.patterns import Pattern, Unstructured
from jaxprune.sparse.saliency import WeightCriterion, WeightMagnitude, add_step
from jaxprune.sparse.schedules import Schedule


class SparseState(NamedTuple):
    """The state of a `sparse_optimizer`: a pytree of arrays."""

    inner: optax.OptState  # of the optimizer that is wrapped
    masks: Masks  # True where a weight stays
    totals: tuple[Float[Array, ...], ...]  # what the criterion has accumulated, per matrix; () if nothing
    step: Int[Array, ""]  # updates done


def sparse_optimizer(
    inner: optax.GradientTransformation,
    *,
    schedule: Schedule,
    prunable: Prunable,
    criterion: WeightCriterion = WeightMagnitude(),
    pattern: Pattern = Unstructured(),
    together: bool = False,
    masks: Masks | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it prunes by a schedule while it trains.

    At every step exactly as many weights are pruned as the schedule says, and after `optax.apply_updates` all of them
    are 0.0, if they were finite. A pruned weight stays pruned, and counts for the optimizer as if it were not there:
    its gradient is 0 before the optimizer sees it (so that clipping by the norm does not count it), and so is every
    entry of the optimizer's state that belongs to it, in all parts of the state that have the structure and shapes of
    the parameters. Factored moments, as Adafactor's, have other shapes and stay as they are.

    The weights are ranked as they stand before the update, with this step's gradient in the criterion's total; the
    zeros are part of the same update. Nothing may be chained after it: other updates would not be those zeros.

    Args:
        inner: The whole optimizer, clipping and weight decay included.
        schedule: When to prune, and to which sparsity.
        prunable: What is pruned; for the models of this package `linear_maps(model)`. See `jaxprune.sparse.matrices`.
        criterion: How weights are scored. A weight whose score is not a number goes first.
        pattern: Which weights may be zero together.
        together: Whether all matrices are ranked together, so that some lose more than others.
        masks: What is pruned from the first update on, such as what `one_shot` returned; None: nothing.

    Returns:
        An optimizer whose state is a `SparseState`. Its `update` needs the parameters and passes extra arguments on.
        Works under `jax.jit`, with donated and with sharded arrays; with equal bits of the weights the masks are equal
        however the arrays are sharded. Under `jax.vmap` a `cond` runs both branches: every step would rank.

    Raises:
        ValueError: If the schedule ends at a sparsity that the pattern cannot have; from `init` and `update`, as
            `jaxprune.sparse.matrices.find_matrices`, or if a matrix does not fit the pattern or there are no
            parameters.

    References:
        Zhu and Gupta 2017, arXiv 1710.01878; Xu et al. 2021, arXiv 2104.08682.

    Example:
        A plain MLP and a loop of your own:

        >>> import jax, jax.numpy as jnp, optax
        >>> import jaxprune as jp
        >>> def predict(params, x):
        ...     return jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["out"]["kernel"]
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {
        ...     "hidden": {"kernel": jax.random.normal(keys[0], (8, 20)), "bias": jnp.zeros(20)},
        ...     "out": {"kernel": jax.random.normal(keys[1], (20, 1))},
        ... }
        >>> x = jax.random.normal(keys[2], (64, 8))
        >>> y = x[:, :1] * x[:, 1:2]
        >>> optimizer = jp.sparse_optimizer(
        ...     optax.adamw(1e-2),
        ...     schedule=jp.schedules.cubic_schedule(0.9, steps=100, prunings=10),
        ...     prunable=lambda path, array: path[-1] == "kernel",
        ... )
        >>> state = optimizer.init(params)
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.grad(lambda p: jnp.mean((predict(p, x) - y) ** 2))(params)
        ...     updates, state = optimizer.update(grads, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> jp.sparse.sparsity_of(state.masks).arrays
        {'hidden.kernel': (144, 160), 'out.kernel': (18, 20)}
        >>> int((params["hidden"]["kernel"] == 0).sum())
        144
    """
    pattern.check_final(schedule.final)
    optimizer = optax.with_extra_args_support(inner)

    def table(matrices: tuple[Matrix, ...]) -> np.ndarray:
        """The numbers of weights that stay after 0, 1, ... prunings; the first is never used."""
        return np.stack([pattern.keep(matrices, sparsity, together) for sparsity in (0.0, *schedule.sparsities)])

    def init(params: optax.Params) -> SparseState:
        matrices = find_matrices(params, prunable)
        table(tuple(filter(None, matrices)))  # refuses what does not fit the pattern before the first step
        leaves, structure = jax.tree.flatten(params)
        weights = pruned_leaves(leaves, matrices)
        first = join_masks(structure, matrices, start_masks(structure, matrices, weights, masks))
        totals = [jnp.zeros_like(w, dtype=jnp.float32) for w in weights] if criterion.accumulates else []
        return SparseState(optimizer.init(params), first, tuple(totals), jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, SparseState]:
        if params is None:
            raise ValueError("sparse_optimizer ranks and zeroes weights: call update(grads, state, params).")
        matrices = find_matrices(params, prunable)
        pruned = tuple(filter(None, matrices))
        leaves, structure = jax.tree.flatten(params)
        weights, slopes = (pruned_leaves(tree, matrices) for tree in (leaves, structure.flatten_up_to(updates)))
        totals = tuple(add_step(criterion, *arrays) for arrays in zip(state.totals, weights, slopes, strict=False))
        step = jnp.asarray(optax.safe_increment(state.step))
        keep, before = jnp.asarray(table(pruned))[schedule.done(step)], jax.tree.leaves(state.masks)
        chosen = _ranked(pruned, pattern, criterion, schedule.due(step), keep, before, weights, list(totals))
        after = join_masks(structure, matrices, chosen)
        updates, moved = optimizer.update(apply_masks(updates, after), state.inner, params, **extra)
        updates = jax.tree.map(
            lambda mask, update, weight: update if is_hole(mask) else _towards_zero(mask, update, weight),
            *(after, updates, params),
            is_leaf=is_hole,
        )
        return updates, SparseState(_zero_moments(moved, params, after), after, totals, step)

    return optax.GradientTransformationExtraArgs(init, update)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ranked(
    matrices: tuple[Matrix, ...],
    pattern: Pattern,
    criterion: WeightCriterion,
    due: Bool[Array, ""],
    keep: Array,
    masks: list[Array],
    weights: list[Array],
    totals: list[Array],
) -> list[Array]:
    """The masks, chosen again if that is due."""
    now = keep, masks, weights, totals
    return jax.lax.cond(due, partial(choose, matrices, pattern, criterion), lambda _, masks, *rest: masks, *now)


def _towards_zero(mask: Array, update: Array, weight: Array) -> Array:
    """The update of a weight that stays; of one that is pruned, minus the weight: their sum is exactly 0."""
    wide = jnp.promote_types(update.dtype, weight.dtype)  # a narrower type would round the weight
    return jnp.where(mask, update.astype(wide), -weight.astype(wide))


def _zero_moments(state: optax.OptState, params: optax.Params, masks: Masks) -> optax.OptState:
    """Zeroes what belongs to pruned weights in all parts of a state that have the structure of the parameters.

    Parts of an optimizer of some parameters alone (`optax.masked`, `optax.partition`) have holes for the others.
    """
    structure, holes = jax.tree.structure(params, is_leaf=is_hole), jax.tree.leaves(masks, is_leaf=is_hole)

    def like(node: Any) -> bool:
        return jax.tree.structure(node, is_leaf=is_hole) == structure

    def zero(node: Any) -> Any:
        if not like(node):
            return node
        return jax.tree.unflatten(structure, list(map(_zero, holes, jax.tree.leaves(node, is_leaf=is_hole))))

    return jax.tree.map(zero, state, is_leaf=like)


def _zero(mask: Any, moment: Any) -> Any:
    if is_hole(mask) or is_hole(moment) or moment.shape != mask.shape or not jnp.issubdtype(moment.dtype, jnp.number):
        return moment
    return jnp.where(mask, moment, jnp.zeros((), moment.dtype))

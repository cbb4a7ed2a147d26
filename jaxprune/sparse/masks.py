"""Sets the weights that matter least to zero, once or while an optimizer trains, by masks that say which they are.

A *mask* is a boolean array in the shape of a parameter, True where the weight stays; *sparsity* is the fraction of
weights that are zero. (Gates multiply whole units; a mask knows single weights.) Masks are a pytree in the structure of
the parameters, with `optax.MaskedNode()`, which has no leaves, where a parameter is not pruned. What is pruned is said
by `prunable`, see `jaxprune.sparse.patterns`.

The criteria of `jaxprune.scoring` score whole units; those here score every weight of a matrix.

`sparse_optimizer` prunes while any optax optimizer trains: weights, updates and moments of what is pruned are zero,
exactly. It wraps the optimizer, as a link in a chain could not reach the moments of the others. Weights are ranked only
at the steps of the schedule, behind `jax.lax.cond`; every other step costs a selection by the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxprune.sparse.patterns import Matrix, Pattern, Prunable, Unstructured, find_matrices, leaf_name, pruned_leaves
from jaxprune.sparse.schedules import Schedule, check_sparsity


class WeightCriterion(Protocol):
    """A score for weights: a frozen dataclass, called with float32 arrays in the shape of a parameter.

    Higher means more needed. Gradients are those of the loss, as the optimizer gets them.
    """

    accumulates: ClassVar[bool]  # whether there is a total of the gradients; it starts at zero

    def add(
        self, total: Float[Array, ...], weight: Float[Array, ...], gradient: Float[Array, ...]
    ) -> Float[Array, ...]:
        """The total after another step, with the weights at which the gradient was taken."""
        ...

    def __call__(self, weight: Float[Array, ...], total: Float[Array, ...] | None) -> Float[Array, ...]:
        """The scores; the total is None if nothing is accumulated."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightMagnitude:
    """`|w|`: the smallest weights go first.

    References:
        Han, Pool, Tran and Dally, Learning both Weights and Connections, 2015, arXiv 1506.02626.
    """

    accumulates: ClassVar[bool] = False

    def add(self, total: Array, weight: Array, gradient: Array) -> Array:
        """Adds nothing."""
        return total

    def __call__(self, weight: Array, total: Array | None) -> Array:
        """The absolute values."""
        return jnp.abs(weight)


@dataclass(frozen=True, kw_only=True)
class _Accumulating:
    """A criterion with a total that decays."""

    decay: float = 1.0  # of the total, per step; 1: all steps count alike
    accumulates: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}.")


@dataclass(frozen=True, kw_only=True)
class WeightMovement(_Accumulating):
    """`-Σ w ∂loss/∂w` over the steps: weights that training moves towards zero go first. Signed.

    The paper also lets gradients through to weights that are zero, so that they may come back; here they do not.

    References:
        Sanh, Wolf and Rush, Movement Pruning, 2020, arXiv 2005.07683, eq. 3, up to the learning rate.
    """

    def add(self, total: Array, weight: Array, gradient: Array) -> Array:
        """Adds one step."""
        return self.decay * total - weight * gradient

    def __call__(self, weight: Array, total: Array | None) -> Array:
        """The total."""
        return jnp.zeros_like(weight) if total is None else total


@dataclass(frozen=True, kw_only=True)
class WeightFisher(_Accumulating):
    """`w^2 E[g^2] / 2`: by how much the loss rises without the weight, to second order and weight by weight.

    The diagonal of the Hessian is approximated by the mean square of the gradients that the optimizer gets. These are
    means over a batch, so it is not the Fisher information of single examples, and it is smaller the larger the batch.
    The mean is exponential and not corrected for its start: that is one factor for all weights.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, 1989, eq. 5 (the saliency); Theis et al., Faster gaze prediction
        with dense networks and Fisher pruning, 2018, arXiv 1801.05787 (squared gradients in place of the Hessian).
    """

    decay: float = 0.999

    def add(self, total: Array, weight: Array, gradient: Array) -> Array:
        """Adds one step; with a decay of 1 it is a sum."""
        return self.decay * total + (1.0 - self.decay if self.decay < 1 else 1.0) * jnp.square(gradient)

    def __call__(self, weight: Array, total: Array | None) -> Array:
        """The saliencies."""
        return jnp.zeros_like(weight) if total is None else 0.5 * jnp.square(weight) * total


def add_step(criterion: WeightCriterion, total: Array, weight: Array, gradient: Array) -> Array:
    """The criterion's total after a step, in float32."""
    return criterion.add(total, weight.astype(jnp.float32), gradient.astype(jnp.float32))


Masks: TypeAlias = Any  # the structure of the parameters: boolean arrays, and MaskedNode() for what is not pruned


def masks_of(params: Any, prunable: Prunable) -> Masks:
    """The masks of weights that are not zero, such as those of a file that holds a sparse model.

    Raises:
        TypeError, ValueError: As `find_matrices`.
    """
    leaves, structure = jax.tree.flatten(params)
    matrices = find_matrices(params, prunable)
    return join_masks(structure, matrices, [_not_zero(leaf) for leaf in pruned_leaves(leaves, matrices)])


def _not_zero(weight: Array) -> Bool[Array, ...]:
    """By the bits without the sign, as a comparison of floats takes the smallest of them as zero on some devices."""
    weight = jnp.asarray(weight)
    unsigned = jnp.dtype(f"uint{8 * weight.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(weight, unsigned) << jnp.ones((), unsigned) != 0


def apply_masks(params: Any, masks: Masks) -> Any:
    """The parameters with exactly 0 where a mask is False, whatever stood there; what has no mask stays as it is."""
    return jax.tree.map(
        lambda mask, weight: weight if is_hole(mask) else jnp.where(mask, weight, jnp.zeros((), weight.dtype)),
        masks,
        params,
        is_leaf=is_hole,
    )


class Sparsity(NamedTuple):
    """The number of weights that are zero, of how many."""

    zeros: int
    size: int
    arrays: dict[str, tuple[int, int]]  # dotted path -> zeros, size

    @property
    def fraction(self) -> float:
        """The zeros as a fraction of all weights; 0 if there is no weight."""
        return self.zeros / self.size if self.size else 0.0


def sparsity_of(tree: Any, prunable: Prunable | None = None) -> Sparsity:
    """Counts zeros. Runs on the host.

    Of masks it counts the weights that are pruned. Of parameters it counts over all of them, embeddings and biases
    included, unless `prunable` says which: these are two different ratios, say which you quote.

    Args:
        tree: Masks or parameters.
        prunable: Which arrays to count; None: all.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    counted = leaves if prunable is None else pruned_leaves(leaves, find_matrices(tree, prunable))
    arrays = {leaf_name(path): (int(np.sum(np.asarray(array) == 0)), int(array.size)) for path, array in counted}
    zeros, size = (sum(counts[i] for counts in arrays.values()) for i in (0, 1))
    return Sparsity(zeros, size, arrays)


def one_shot(
    params: Any,
    sparsity: float,
    *,
    prunable: Prunable,
    criterion: WeightCriterion = WeightMagnitude(),
    pattern: Pattern = Unstructured(),
    together: bool = False,
    gradients: Any = None,
    masks: Masks | None = None,
) -> tuple[Any, Masks]:
    """Prunes once, without training.

    Exactly `floor(sparsity * size + 1/2)` weights of each matrix become zero, those with the lowest scores; ties go by
    index. A larger sparsity prunes a superset. Works inside `jax.jit` and on sharded arrays.

    Args:
        params: Any pytree of arrays, such as the parameters of a Flax module.
        sparsity: Fraction of the weights that become zero, in [0, 1).
        prunable: What is pruned.
        criterion: How weights are scored. A weight whose score is not a number goes first.
        pattern: Which weights may be zero together.
        together: Whether all matrices are ranked together, so that some lose more than others.
        gradients: Of the loss, in the structure of the parameters, for a criterion that needs them: taken as one step.
        masks: What was pruned before and stays pruned, counted in `sparsity`; None: nothing.

    Returns:
        The parameters, with zeros, and the masks.

    Raises:
        TypeError: As `find_matrices`.
        ValueError: If `sparsity` is outside [0, 1) or not the pattern's, a criterion lacks its gradients, a matrix does
            not fit the pattern, or as `find_matrices`.
    """
    check_sparsity("sparsity", sparsity)
    pattern.check_final(sparsity)
    leaves, structure = jax.tree.flatten(params)
    matrices = find_matrices(params, prunable)
    weights, pruned = pruned_leaves(leaves, matrices), tuple(filter(None, matrices))
    totals = []
    if criterion.accumulates:
        if gradients is None:
            raise ValueError(f"{type(criterion).__name__} scores weights by gradients: give gradients.")
        slopes = pruned_leaves(structure.flatten_up_to(gradients), matrices)
        totals = [add_step(criterion, jnp.zeros(w.shape), w, g) for w, g in zip(weights, slopes, strict=True)]
    before = start_masks(structure, matrices, weights, masks)
    keep = jnp.asarray(pattern.keep(pruned, sparsity, together))
    after = join_masks(structure, matrices, choose(pruned, pattern, criterion, keep, before, weights, totals))
    return apply_masks(params, after), after


@partial(jax.jit, static_argnums=(0, 1, 2))
def choose(
    matrices: tuple[Matrix, ...],
    pattern: Pattern,
    criterion: WeightCriterion,
    keep: Array,
    masks: Sequence[Bool[Array, ...]],
    weights: Sequence[Float[Array, ...]],
    totals: Sequence[Float[Array, ...]],
) -> list[Bool[Array, ...]]:
    """The masks of the weights that stay, each a subset of the one before. `totals` is empty if there are none."""
    sums = totals or [None] * len(weights)
    scores = [criterion(w.astype(jnp.float32), total) for w, total in zip(weights, sums, strict=True)]
    return pattern(matrices, scores, masks, keep)


def start_masks(
    structure: Any, matrices: Sequence[Matrix | None], weights: Sequence[Array], masks: Masks
) -> list[Array]:
    """The masks to begin with, as new arrays: those that are given, else all True.

    Raises:
        ValueError: If the masks that are given are of other parameters.
    """
    if masks is None:
        return [jnp.ones_like(weight, dtype=bool) for weight in weights]
    given, expected = jax.tree.structure(masks), jax.tree.structure(join_masks(structure, matrices, weights))
    if given != expected:
        raise ValueError(f"masks must be of the parameters that are pruned, {expected}; got {given}.")
    leaves = jax.tree.leaves(masks)
    pairs = zip(filter(None, matrices), leaves, strict=True)
    differing = [matrix.name for matrix, mask in pairs if mask.shape != matrix.shape]
    if differing:
        raise ValueError(f"masks must have the shapes of their parameters; those of {', '.join(differing)} do not.")
    return [jnp.array(mask, dtype=bool, copy=True) for mask in leaves]


def join_masks(structure: Any, matrices: Sequence[Matrix | None], masks: Sequence[Any]) -> Masks:
    """The pytree of masks from those of the pruned leaves."""
    rest = iter(masks)
    leaves = [optax.MaskedNode() if matrix is None else next(rest) for matrix in matrices]
    return jax.tree.unflatten(structure, leaves)


def is_hole(node: Any) -> bool:
    """True for the placeholder of a parameter that is not pruned."""
    return isinstance(node, optax.MaskedNode)


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
        prunable: What is pruned; for the models of this package `linear_maps(model)`. See `jaxprune.sparse.patterns`.
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
            `jaxprune.sparse.patterns.find_matrices`, or if a matrix does not fit the pattern or there are no
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

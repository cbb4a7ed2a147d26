"""Sets the weights that matter least to zero, once, and the masks that say which they are.

A *mask* is a boolean array in the shape of a parameter, True where the weight stays; *sparsity* is the fraction of
weights that are zero. (Gates multiply whole units; a mask knows single weights.) Masks are a pytree in the structure of
the parameters, with `optax.MaskedNode()`, which has no leaves, where a parameter is not pruned. What is pruned is said
by `prunable`, see `jaxprune.sparse.matrices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxprune.sparse.matrices import Matrix, Prunable, find_matrices, leaf_name, pruned_leaves
from jaxprune.sparse.patterns import Pattern, Unstructured
from jaxprune.sparse.saliency import WeightCriterion, WeightMagnitude, add_step
from jaxprune.sparse.schedules import check_sparsity

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

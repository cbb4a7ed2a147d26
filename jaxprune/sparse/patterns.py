"""The parameters that are pruned weight by weight, and the patterns of their zeros: any, N of M, or whole blocks.

Exactly as many weights become zero as asked for. In an attention's output kernel `[heads, channels, embed]`
groups and blocks run over the channels of a head, and on into the next head where they do not divide its channels.

A parameter is taken as the matrix `[inputs, outputs]` of its linear map. The axes that the map contracts, the inputs,
come first: one axis of an attention's query kernel `[embed, heads, channels]`, two of its output kernel `[heads,
channels, embed]`. Inputs and outputs are numbered row by row over their axes.

`prunable` says what is pruned, for any pytree of parameters: a function of a parameter's path (`("layers", 3, "ffn",
"up", "kernel")`) and of the array, of which it may use shape and type, or a pytree in the structure of the parameters.
It gives the number of input axes, and 0 or False for a parameter that is not pruned; True is 1, a kernel `[inputs,
outputs]`. For the models of this package it is `linear_maps(model)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxprune.units import KINDS, Path, axes_of, has_units, input_axes, is_kernel, path_name

if TYPE_CHECKING:
    from jaxprune.models import Model


Prunable: TypeAlias = Callable[[Path, Any], int] | Any  # the function, or a pytree of its results
PROJECTION = "projection"  # a student's, in distillation, beside its parameters; it goes before the student is saved


class Matrix(NamedTuple):
    """A parameter that is pruned."""

    name: str  # dotted path, such as "layers.3.ffn.up.kernel"
    shape: tuple[int, ...]
    inputs: int  # how many leading axes the linear map contracts

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def sides(self) -> tuple[int, int]:
        """The numbers of inputs and outputs."""
        return math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])


def linear_maps(model: Model) -> Callable[[Path, Any], int]:
    """Returns the `prunable` for a model of this package: the weights of the linear maps of all layers.

    These are the query, key, value and output kernels of every attention and the kernels of every FFN, as in arXiv
    2104.08682; not embeddings, biases, norms and task heads. It is read from the family's axis table.
    """

    def inputs(path: Path, array: Any) -> int:
        if path[0] == PROJECTION:
            return 0
        axes = axes_of(model.axes, path)
        prunable = is_kernel(axes) and any(has_units(axes, kind) for kind in KINDS)
        return input_axes(axes) if prunable else 0

    return inputs


def find_matrices(params: Any, prunable: Prunable) -> tuple[Matrix | None, ...]:
    """The leaves of a pytree that are pruned, in the order of its leaves; None for the others.

    Raises:
        TypeError: If a parameter that is to be pruned is not a floating-point array.
        ValueError: If `prunable` gives what is no number of input axes for some parameter, has another structure than
            the parameters, or names none of them.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    if callable(prunable):
        counts = [prunable(_plain(path), array) for path, array in leaves]
    else:
        counts, given = jax.tree.flatten(prunable)
        if given != structure:
            raise ValueError(f"prunable must have the structure of the parameters, {structure}; got {given}.")
    matrices = tuple(
        _matrix(leaf_name(path), array, inputs) for (path, array), inputs in zip(leaves, counts, strict=True)
    )
    if leaves and not any(matrices):
        raise ValueError(f"prunable names none of the {len(leaves)} parameters: nothing would be pruned.")
    return matrices


def _matrix(name: str, array: Any, inputs: Any) -> Matrix | None:
    """One parameter as a matrix; None if it is not pruned."""
    shape = tuple(array.shape)
    if not isinstance(inputs, int | np.integer | np.bool_) or inputs < 0 or 0 < len(shape) <= inputs:
        raise ValueError(
            f"prunable must give the number of leading axes that are inputs, fewer than there are, or False; "
            f"{name} has shape {shape}, got {inputs!r}."
        )
    if inputs and len(shape) < 2:
        raise ValueError(f"a matrix has two axes or more; {name} has shape {shape}: leave it out.")
    if inputs and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"only floating-point weights are pruned; {name} is {array.dtype}: leave it out.")
    return Matrix(name, shape, int(inputs)) if inputs else None


def pruned_leaves(leaves: Sequence[Any], matrices: Sequence[Matrix | None]) -> list[Any]:
    """The leaves that are pruned."""
    return [leaf for leaf, matrix in zip(leaves, matrices, strict=True) if matrix is not None]


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, from the path that JAX gives."""
    return path_name(_plain(path)) or "the array"


def _plain(path: tuple[Any, ...]) -> Path:
    """A path without the kinds of the containers: keys, indices and field names."""
    names = ("key", "idx", "name")
    return tuple(next((getattr(step, name) for name in names if hasattr(step, name)), str(step)) for step in path)


Arrays: TypeAlias = Sequence[Array]  # one per matrix, in its shape
LARGEST = 2**31 - 1  # entries that are ranked together: counts are int32


def ordered_bits(scores: Float[Array, ...], alive: Bool[Array, ...]) -> UInt32[Array, ...]:
    """Unsigned integers in the order of the scores.

    Entries that are not alive come first (0), then those whose score is not a number (1), then minus infinity up to
    infinity. The two zeros are equal.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign, infinity = jnp.uint32(1 << 31), jnp.uint32(0x7F800000)
    # Of two negative floats the larger has the smaller bits; minus zero becomes zero
    rising = jnp.where(bits > sign, ~bits, bits | sign)
    return jnp.where(alive, jnp.where((bits & ~sign) > infinity, jnp.uint32(1), rising), jnp.uint32(0))


def keep_best(
    scores: Sequence[Float[Array, ...]], alive: Sequence[Bool[Array, ...]], keep: Int[Array, ...]
) -> list[Bool[Array, ...]]:
    """Keeps exactly so many of the entries that are alive, those with the highest scores.

    Equal to a stable sort by falling score: ties go by index, row by row and, if the arrays are ranked together, array
    by array. Keeping fewer keeps a subset. If fewer are alive than are to be kept, these are kept.

    It does not sort. The threshold is built bit by bit: the bits of a float, read as an unsigned integer, are in the
    order of the floats, and 32 times it is counted how many are at or above a candidate. Ties at the threshold are
    resolved by the same search over the index. All of it is comparisons and integer sums: arrays may be sharded in any
    way, the number to keep may be traced, and nothing larger than the scores is stored. The program grows with the
    number of different shapes, not of arrays.

    Args:
        scores: Arrays of any shapes; float32 inside. An entry that is not a number is kept last.
        alive: Of the same shapes; the others are never kept.
        keep: How many stay, int32: `[arrays]` in each array, or `[]` in all of them together.

    Returns:
        True where an entry stays; in the shapes of `scores`.

    Raises:
        ValueError: If more than 2^31 - 1 entries are ranked together.
    """
    if not scores:
        return []
    together, sizes = keep.ndim == 0, [math.prod(array.shape) for array in scores]
    most = sum(sizes) if together else max(sizes)
    check_size(most)
    groups: dict[tuple[int, ...], list[int]] = {}  # arrays of one shape are searched as one
    for index, array in enumerate(scores):
        groups.setdefault(array.shape, []).append(index)
    # All lists below have one entry per group
    stacks = [jnp.stack([ordered_bits(scores[i], alive[i]) for i in group]) for group in groups.values()]
    offsets = [[sum(sizes[:i]) if together else 0 for i in group] for group in groups.values()]
    places = [_positions(shape, starts) for shape, starts in zip(groups, offsets, strict=True)]

    def spread(numbers: list[Array]) -> list[Array]:
        """Numbers, one per array, against the stacks."""
        return [n.reshape(-1, *(1,) * (stack.ndim - 1)) for n, stack in zip(numbers, stacks, strict=True)]

    def count(chosen: list[Array]) -> list[Array]:
        """The number chosen in each array; together, of all, as often."""
        rows = [array.sum(tuple(range(1, array.ndim)), dtype=jnp.int32) for array in chosen]
        total = jnp.stack([row.sum() for row in rows]).sum()
        return [jnp.broadcast_to(total, row.shape) for row in rows] if together else rows

    def search(bits: int, passes: Array | int, fits: Callable[[list[Array]], list[Array]]) -> list[Array]:
        """The largest unsigned integers that fit, one per array, built from the highest bit down."""

        def narrow(step: Array, best: list[Array]) -> list[Array]:
            larger = [old | (jnp.uint32(1 << (bits - 1)) >> step.astype(jnp.uint32)) for old in best]
            return jax.tree.map(jnp.where, fits(larger), larger, best)

        return jax.lax.fori_loop(0, passes, narrow, [jnp.zeros(len(group), jnp.uint32) for group in groups.values()])

    left = count([stack > jnp.uint32(0) for stack in stacks])
    asked = [
        jnp.broadcast_to(keep, alive.shape) if together else keep[np.asarray(group)]
        for alive, group in zip(left, groups.values(), strict=True)
    ]
    wanted = [jnp.clip(number, 0, alive) for number, alive in zip(asked, left, strict=True)]
    compare = partial(jax.tree.map, jnp.greater_equal)
    threshold = search(32, 32, lambda at: compare(count(compare(stacks, spread(at))), wanted))
    above = jax.tree.map(jnp.greater, stacks, spread(threshold))
    tied = jax.tree.map(jnp.equal, stacks, spread(threshold))
    room = jax.tree.map(jnp.subtract, wanted, count(above))  # for ties
    excess = jax.tree.map(jnp.greater, count(tied), room)

    def first_ties(bound: list[Array]) -> list[Array]:
        return [ties & (place < end) for ties, place, end in zip(tied, places, spread(bound), strict=True)]

    bits, any_excess = most.bit_length(), jnp.concatenate(excess).any()
    bound = search(bits, jnp.where(any_excess, bits, 0), lambda bound: compare(room, count(first_ties(bound))))
    everything = jnp.uint32(most)  # every index is below it
    bound = [jnp.where(many, end, everything) for many, end in zip(excess, bound, strict=True)]
    chosen = jax.tree.map(jnp.logical_or, above, first_ties(bound))
    rows = {i: stack[row] for stack, group in zip(chosen, groups.values(), strict=True) for row, i in enumerate(group)}
    return [rows[i] for i in range(len(scores))]


def check_size(entries: int) -> None:
    """Refuses more entries than can be ranked together."""
    if entries > LARGEST:
        raise ValueError(f"at most {LARGEST} weights can be ranked together, got {entries}.")


def _positions(shape: tuple[int, ...], offsets: Sequence[int]) -> UInt32[Array, ...]:
    """The index of every entry of a stack of arrays, counted row by row from each array's offset."""
    index = jnp.asarray(offsets, jnp.uint32).reshape(-1, *(1,) * len(shape))
    for axis in range(len(shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, (1, *shape), axis + 1)
        index = index + along * jnp.uint32(math.prod(shape[axis + 1 :]))
    return index


class Pattern(Protocol):
    """A choice of the weights that stay: a frozen dataclass, since it is a static argument of a compiled program."""

    def keep(self, matrices: Sequence[Matrix], sparsity: float, together: bool) -> np.ndarray:
        """The number that stays at a sparsity, int32, as the call takes it; refuses matrices that do not fit."""
        ...

    def check_final(self, sparsity: float) -> None:
        """Refuses a sparsity at which the pattern cannot end."""
        ...

    def __call__(self, matrices: Sequence[Matrix], scores: Arrays, masks: Arrays, keep: Array) -> list[Array]:
        """The masks of the weights that stay, each a subset of the one that is given; `keep` as of the method."""
        ...


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Any weight may be zero: exactly `floor(sparsity * size + 1/2)` of each matrix, or of all of them together.

    Ties go by index, row by row: the later ones become zero.
    """

    def keep(self, matrices: Sequence[Matrix], sparsity: float, together: bool) -> np.ndarray:
        """Weights that stay: `[matrices]` in each, `[]` in all together."""
        return _left([matrix.size for matrix in matrices], sparsity, together)

    def check_final(self, sparsity: float) -> None:
        """Any sparsity is possible."""

    def __call__(self, matrices: Sequence[Matrix], scores: Arrays, masks: Arrays, keep: Array) -> list[Array]:
        """Keeps the weights with the highest scores."""
        return keep_best(scores, masks, keep)


@dataclass(frozen=True, kw_only=True)
class NM:
    """Of every `m` consecutive inputs of an output, `n` weights stay: what sparse matrix units read (2 of 4).

    Its sparsity is `1 - n / m`, and a schedule has to end there. On the way, `floor(sparsity * m + 1/2)` weights of
    each group are zero: from 4 of 4 over 3 of 4 to 2 of 4. Ties go by index: the earlier input stays.

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, arXiv 2104.08378.
    """

    n: int = 2  # weights that stay
    m: int = 4  # consecutive inputs

    def __post_init__(self):
        if not 1 <= self.n < self.m:
            raise ValueError(f"n must be at least 1 and less than m, got n={self.n} and m={self.m}.")

    def check_final(self, sparsity: float) -> None:
        """Refuses another sparsity than that of the pattern.

        Raises:
            ValueError: With the sparsity that it must be.
        """
        if abs(sparsity * self.m - (self.m - self.n)) > 1e-6:
            raise ValueError(
                f"{self.n} of {self.m} weights stay, a sparsity of {1 - self.n / self.m:.6g}, got {sparsity}: "
                "give that sparsity, or take Unstructured()."
            )

    def keep(self, matrices: Sequence[Matrix], sparsity: float, together: bool) -> np.ndarray:
        """Weights that stay in each group, `[]`.

        Raises:
            ValueError: If the inputs of a matrix are no multiple of `m`, or matrices are ranked together.
        """
        _divide(matrices, "inputs", 0, self.m)
        if together:
            raise ValueError("together must be False for an N:M pattern: weights compete within their group alone.")
        return np.asarray(max(self.n, self.m - pruned_of(sparsity, self.m)), np.int32)

    def __call__(self, matrices: Sequence[Matrix], scores: Arrays, masks: Arrays, keep: Array) -> list[Array]:
        """Keeps the weights with the highest scores in each group: a weight's rank is how many are before it."""
        chosen = []
        earlier = jnp.asarray(np.tri(self.m, k=-1, dtype=bool))[:, :, None]  # [m, m, 1]: the second is before the first
        for matrix, score, mask in zip(matrices, scores, masks, strict=True):
            inputs, outputs = matrix.sides
            keys = ordered_bits(score, mask).reshape(inputs // self.m, self.m, outputs)
            one, other = keys[:, :, None], keys[:, None]
            rank = ((other > one) | ((other == one) & earlier)).sum(2, dtype=jnp.int32)
            chosen.append((rank < keep).reshape(matrix.shape) & mask)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Block:
    """Blocks of `inputs` x `outputs` weights are zero as a whole; a block's score is the sum over its weights.

    Exactly `floor(sparsity * blocks + 1/2)` blocks of each matrix, or of all together, become zero; ties go by index.
    Where a block lies on several devices, its sum may be rounded otherwise than on one.
    """

    inputs: int  # consecutive inputs
    outputs: int  # consecutive outputs

    def __post_init__(self):
        for name in ("inputs", "outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def check_final(self, sparsity: float) -> None:
        """Any sparsity is possible."""

    def keep(self, matrices: Sequence[Matrix], sparsity: float, together: bool) -> np.ndarray:
        """Blocks that stay: `[matrices]` in each, `[]` in all together.

        Raises:
            ValueError: If the inputs or outputs of a matrix cannot be divided.
        """
        _divide(matrices, "inputs", 0, self.inputs)
        _divide(matrices, "outputs", 1, self.outputs)
        return _left([matrix.size // (self.inputs * self.outputs) for matrix in matrices], sparsity, together)

    def __call__(self, matrices: Sequence[Matrix], scores: Arrays, masks: Arrays, keep: Array) -> list[Array]:
        """Keeps the blocks with the highest scores."""
        cut = [self._blocks(matrix) for matrix in matrices]
        sums = [score.reshape(shape).sum((1, 3)) for score, shape in zip(scores, cut, strict=True)]
        alive = [mask.reshape(shape).any((1, 3)) for mask, shape in zip(masks, cut, strict=True)]
        best = keep_best(sums, alive, keep)
        return [
            jnp.broadcast_to(blocks[:, None, :, None], shape).reshape(mask.shape) & mask
            for blocks, shape, mask in zip(best, cut, masks, strict=True)
        ]

    def _blocks(self, matrix: Matrix) -> tuple[int, int, int, int]:
        inputs, outputs = matrix.sides
        return inputs // self.inputs, self.inputs, outputs // self.outputs, self.outputs


def pruned_of(sparsity: float, size: int) -> int:
    """The number of zeros among `size` weights at a sparsity: rounded to the nearest, halves up."""
    return math.floor(sparsity * size + 0.5)


def _left(sizes: Sequence[int], sparsity: float, together: bool) -> np.ndarray:
    whole = [sum(sizes)] if together else sizes
    check_size(max(whole, default=0))
    left = [size - pruned_of(sparsity, size) for size in whole]
    return np.asarray(left[0] if together else left, np.int32)


def _divide(matrices: Sequence[Matrix], what: str, side: int, by: int) -> None:
    uneven = [f"{matrix.name} has {matrix.sides[side]}" for matrix in matrices if matrix.sides[side] % by]
    if uneven:
        more = f" and {len(uneven) - 3} more" if len(uneven) > 3 else ""
        raise ValueError(
            f"the {what} of every matrix must be a multiple of {by}: {', '.join(uneven[:3])}{more}. "
            "Leave these out by prunable, or take Unstructured()."
        )

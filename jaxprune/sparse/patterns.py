"""Which weights of a matrix may be zero together: any of them, N of M along the inputs, or whole blocks.

Inputs and outputs are those of `jaxprune.sparse.matrices`: in an attention's output kernel `[heads, channels, embed]`
groups and blocks run over the channels of a head, and on into the next head where they do not divide its channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.sparse.bisection import check_size, keep_best, ordered_bits
from jaxprune.sparse.matrices import Matrix


class Pattern(Protocol):
    """What a pattern does; a frozen dataclass, since it is a static argument of a compiled program."""

    def keep(self, matrices: Sequence[Matrix], sparsity: float, together: bool) -> np.ndarray:
        """How many stay at a sparsity, int32, in the form that the call takes. Refuses what does not fit."""
        ...

    def check_final(self, sparsity: float) -> None:
        """Refuses a sparsity at which the pattern cannot end."""
        ...

    def __call__(
        self,
        matrices: Sequence[Matrix],
        scores: Sequence[Float[Array, ...]],
        masks: Sequence[Bool[Array, ...]],
        keep: Int[Array, ...],
    ) -> list[Bool[Array, ...]]:
        """The masks of the weights that stay, each a subset of the one that is given."""
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

    def __call__(
        self,
        matrices: Sequence[Matrix],
        scores: Sequence[Float[Array, ...]],
        masks: Sequence[Bool[Array, ...]],
        keep: Int[Array, ...],
    ) -> list[Bool[Array, ...]]:
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

    def __call__(
        self,
        matrices: Sequence[Matrix],
        scores: Sequence[Float[Array, ...]],
        masks: Sequence[Bool[Array, ...]],
        keep: Int[Array, ...],
    ) -> list[Bool[Array, ...]]:
        """Keeps the weights with the highest scores in each group: a weight's rank is how many are before it."""
        kept = []
        earlier = jnp.asarray(np.tri(self.m, k=-1, dtype=bool))[:, :, None]  # [m, m, 1]: the second is before the first
        for matrix, score, mask in zip(matrices, scores, masks, strict=True):
            inputs, outputs = matrix.sides
            keys = ordered_bits(score, mask).reshape(inputs // self.m, self.m, outputs)
            own, other = keys[:, :, None], keys[:, None]
            rank = ((other > own) | ((other == own) & earlier)).sum(2, dtype=jnp.int32)
            kept.append((rank < keep).reshape(matrix.shape) & mask)
        return kept


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

    def __call__(
        self,
        matrices: Sequence[Matrix],
        scores: Sequence[Float[Array, ...]],
        masks: Sequence[Bool[Array, ...]],
        keep: Int[Array, ...],
    ) -> list[Bool[Array, ...]]:
        """Keeps the blocks with the highest scores."""
        cut = [self._blocks(matrix) for matrix in matrices]
        sums = [score.reshape(shape).sum((1, 3)) for score, shape in zip(scores, cut, strict=True)]
        alive = [mask.reshape(shape).any((1, 3)) for mask, shape in zip(masks, cut, strict=True)]
        best = keep_best(sums, alive, keep)
        return [
            jnp.broadcast_to(own[:, None, :, None], shape).reshape(mask.shape) & mask
            for own, shape, mask in zip(best, cut, masks, strict=True)
        ]

    def _blocks(self, matrix: Matrix) -> tuple[int, int, int, int]:
        inputs, outputs = matrix.sides
        return inputs // self.inputs, self.inputs, outputs // self.outputs, self.outputs


def pruned_of(sparsity: float, size: int) -> int:
    """How many of `size` are zero at a sparsity: rounded to the nearest, halves up."""
    return math.floor(sparsity * size + 0.5)


def _left(sizes: Sequence[int], sparsity: float, together: bool) -> np.ndarray:
    whole = [sum(sizes)] if together else sizes
    check_size(max(whole, default=0))
    left = [size - pruned_of(sparsity, size) for size in whole]
    return np.asarray(left[0] if together else left, np.int32)


def _divide(matrices: Sequence[Matrix], what: str, side: int, by: int) -> None:
    wrong = [f"{matrix.name} has {matrix.sides[side]}" for matrix in matrices if matrix.sides[side] % by]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the {what} of every matrix must be a multiple of {by}: {', '.join(wrong[:3])}{more}. "
            "Leave these out by prunable, or take Unstructured()."
        )

"""Which entries of arrays are the best: exactly so many, whatever the ties, without a sort.

The threshold is found bit by bit: the bits of a float, read as an unsigned integer, are in the order of the floats, and
32 times it is counted how many are at or above a candidate. Ties at the threshold go by index, lower ones first, by the
same search over the index. All of it is comparisons and integer sums: arrays may be sharded in any way, the number to
keep may be traced, and nothing larger than the scores is stored. The program does not grow with the number of arrays,
only with the number of different shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

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

    Args:
        scores: Arrays of any shapes; float32 inside. An entry that is not a number is kept last.
        alive: Of the same shapes; the others are never kept.
        keep: How many stay, int32: `[arrays]` in each array, or `[]` in all of them together.

    Returns:
        True where an entry stays; in the shapes of `scores`.

    Raises:
        ValueError: If more than 2^31 - 1 entries are ranked together.
    """
    together = keep.ndim == 0
    sizes = [math.prod(array.shape) for array in scores]
    most = sum(sizes) if together else max(sizes, default=0)
    check_size(most)
    keys = [ordered_bits(*pair) for pair in zip(scores, alive, strict=True)]
    groups: dict[tuple[int, ...], list[int]] = {}  # arrays of one shape are searched as one
    for index, key in enumerate(keys):
        groups.setdefault(key.shape, []).append(index)
    order = jnp.asarray([index for own in groups.values() for index in own], jnp.int32)
    stacks = [jnp.stack([keys[index] for index in own]) for own in groups.values()]
    places = [
        _positions(shape, [sum(sizes[:index]) if together else 0 for index in own]) for shape, own in groups.items()
    ]
    starts = [0]
    for own in groups.values():
        starts.append(starts[-1] + len(own))

    def spread(numbers: Array, group: int) -> Array:
        """The numbers of one group's arrays, one per array, against its stack."""
        own = numbers[starts[group] : starts[group + 1]]
        return own.reshape(-1, *(1,) * (stacks[group].ndim - 1))

    def count(chosen: Callable[[int], Array]) -> Array:
        """How many are chosen in each array, in the order of the groups; together, of all, as often."""
        rows = [chosen(group) for group in range(len(stacks))]
        counts = jnp.concatenate([row.sum(tuple(range(1, row.ndim)), dtype=jnp.int32) for row in rows])
        return jnp.broadcast_to(counts.sum(), counts.shape) if together else counts

    def search(bits: int, passes: Array | int, fits: Callable[[Array], Array]) -> Array:
        """The largest unsigned integers that fit, one per array, built from the highest bit down."""

        def narrow(step: Array, found: Array) -> Array:
            candidate = found | (jnp.uint32(1 << (bits - 1)) >> step.astype(jnp.uint32))
            return jnp.where(fits(candidate), candidate, found)

        return jax.lax.fori_loop(0, passes, narrow, jnp.zeros(len(keys), jnp.uint32))

    if not keys:
        return []
    left = count(lambda g: stacks[g] > jnp.uint32(0))
    wanted = jnp.clip(jnp.broadcast_to(keep, left.shape) if together else keep[order], 0, left)
    threshold = search(32, 32, lambda at: count(lambda g: stacks[g] >= spread(at, g)) >= wanted)
    above = count(lambda g: stacks[g] > spread(threshold, g))
    tied = count(lambda g: stacks[g] == spread(threshold, g))
    excess = above + tied > wanted
    bits = most.bit_length()

    def few(bound: Array) -> Array:  # ties with an index below the bound
        within = count(lambda g: (stacks[g] == spread(threshold, g)) & (places[g] < spread(bound, g)))
        return within <= wanted - above

    bound = search(bits, jnp.where(excess.any(), bits, 0), few)
    bound = jnp.where(excess, bound, jnp.uint32(most))  # every index is below it
    kept: list[Array] = [jnp.zeros(())] * len(keys)
    for group, own in enumerate(groups.values()):
        at = spread(threshold, group)
        chosen = (stacks[group] > at) | ((stacks[group] == at) & (places[group] < spread(bound, group)))
        for row, index in enumerate(own):
            kept[index] = chosen[row]
    return kept


def check_size(entries: int) -> None:
    """Refuses more entries than can be ranked together.

    Raises:
        ValueError: If there are more than 2^31 - 1.
    """
    if entries > LARGEST:
        raise ValueError(f"at most {LARGEST} weights can be ranked together, got {entries}.")


def _positions(shape: tuple[int, ...], offsets: Sequence[int]) -> UInt32[Array, ...]:
    """The index of every entry of a stack of arrays, counted row by row from each array's offset."""
    index = jnp.asarray(offsets, jnp.uint32).reshape(-1, *(1,) * len(shape))
    for axis in range(len(shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, (1, *shape), axis + 1)
        index = index + along * jnp.uint32(math.prod(shape[axis + 1 :]))
    return index

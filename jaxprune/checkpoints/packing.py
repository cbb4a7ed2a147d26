"""Packs sparse arrays: the weights that are not zero, and where they are; the way back gives the same bits.

A packed array is up to three plain ones. `values` are the weights that are kept, in order. Where they are is said by
`bits`, one bit per weight, or by `deltas`, one byte per kept weight: how many zeros stand before it, 255 for a run of
255 zeros that goes on. The smaller of the two is taken; with neither, every weight has a value. `scales` are there if
the values are int8: a weight is its value times the scale of its column, which is an output of the matrix.

Zero is the bit pattern of +0 and nothing else: -0.0 is a value like any other. docs/packed_files.md has all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxprune.checkpoints.tensors import FLOATS, blocks
from jaxprune.units import AxisTable, Params, axes_of, flatten, path_name, unflatten

INT8 = "I8"
ENCODINGS = {"all": (), "bits": ("bits",), "deltas": ("deltas",)}  # -> the part that says where the values are
STORED = {"bits": "U8", "deltas": "U8", "scales": "F32"}  # part -> its type; that of the values is described
RUN = 255  # zeros of a delta that no weight follows; also one more than the most zeros before a weight
_LARGEST = 127  # int8, symmetric: -128 is not used
_CHUNK = 2**15  # bytes of deltas or of bits that are taken at once
_DESCRIPTION = 300  # bytes that the names and the description of the parts add to a file, about


class Description(NamedTuple):
    """How an array is packed."""

    dtype: str  # of the array, as safetensors files call it: "F32"
    shape: tuple[int, ...]
    values: str  # type of the values: that of the array, or "I8"
    encoding: str  # a key of `ENCODINGS`
    count: int  # of the values

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[str, ...]:
        """The arrays that it is packed into."""
        return ("values", *ENCODINGS[self.encoding], *["scales"] * (self.values == INT8))


@dataclass(frozen=True)
class Lazy:
    """An array that is made when it is written, and not kept."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.make()


class Packed(NamedTuple):
    """An array without its zeros."""

    how: Description
    parts: Mapping[str, Any]  # part -> array, or what has its `len` and gives its slices

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts.values())


def pack(array: Any, *, dtype: np.dtype | None = None, columns: int | None = None) -> Packed:
    """Packs an array into as few bytes as its zeros allow.

    `unpack(pack(array))` has the bits of `array`, NaN and -0.0 included. With `columns` the values are int8: a weight
    then differs from what it was by at most half the scale of its column, what was zero stays zero, and what is rounded
    to zero is not stored. In a column whose largest weight is at least 1e-35, half the scale is at most 1/253 of it,
    and packing the result again changes nothing.

    Args:
        array: Floats of any shape, on any device. The values are read from it again when they are used.
        dtype: The type to store; None is the array's own.
        columns: Makes int8 values with this many scales; weight `i` of the flat array has scale `i % columns`.

    Returns:
        The parts; the values are made when they are asked for.

    Raises:
        TypeError: If it is no array of float32, float16 or bfloat16.
        ValueError: If it is to be rounded to int8 and holds NaN, infinity or values near the largest float.
    """
    names = {kind: name for name, kind in FLOATS.items()}
    kind = dtype or np.dtype(array.dtype)
    if array.dtype not in names:
        raise TypeError(f"only float32, float16 and bfloat16 can be packed, got {array.dtype}.")
    shape, size = tuple(array.shape), math.prod(array.shape)
    scales = None if columns is None else column_scales(array, columns)
    pieces = [np.packbits(kept, bitorder="little") for _, kept in _stored(array, kind, scales)]
    bits = np.concatenate([np.empty(0, np.uint8), *pieces])
    count = int(np.bitwise_count(bits).sum())
    stored, where = np.dtype(kind if scales is None else np.int8), {"bits": bits}
    if count < len(bits) and len(deltas := _deltas(bits, size)) < len(bits):  # a delta is a byte, or more
        where = {"deltas": deltas}
    encoding = next(iter(where))
    if count * stored.itemsize + len(where[encoding]) >= size * stored.itemsize:
        count, encoding, where = size, "all", {}

    def values() -> np.ndarray:
        found = (block if encoding == "all" else block[kept] for block, kept in _stored(array, kind, scales))
        return np.concatenate([np.empty(0, stored), *found])

    parts: dict[str, Any] = {"values": Lazy(stored, (count,), values), **where}
    if scales is not None:
        parts["scales"] = scales
    return Packed(Description(names[kind], shape, INT8 if columns else names[kind], encoding, count), parts)


def unpack(packed: Packed) -> np.ndarray:
    """The array, with all its zeros."""
    how = packed.how
    array = np.zeros(how.size, FLOATS[how.dtype])
    for start, places, values in runs(packed, max(1, how.size)):
        array[start + places] = values
    return array.reshape(how.shape)


def runs(packed: Packed, step: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields what is kept in runs of weights of the flat array, each only a little larger in memory than it is packed.

    Args:
        packed: The array; its parts are read piece by piece.
        step: Weights in a run; the last may be shorter.

    Yields:
        The weight at which a run begins, the places in it that are kept, and their values in the type of the array.
    """
    how, parts = packed.how, packed.parts
    values = np.asarray(parts["values"]) if isinstance(parts["values"], Lazy) else parts["values"]
    scales = parts["scales"][:] if how.values == INT8 else None
    repeated = None if scales is None else np.resize(scales, len(scales) + min(step, how.size))
    taken = 0
    for start, places in _places(how, parts, step):
        own = values[taken : taken + len(places)]
        taken += len(places)
        if scales is not None and repeated is not None:
            own = own.astype(np.float32) * repeated[start % len(scales) :][places]
        yield start, places, own.astype(FLOATS[how.dtype], copy=False)


def column_scales(array: Any, columns: int) -> np.ndarray:
    """One float32 per column: 127 times it is at least the column's largest weight, and every multiple is exact.

    They are rounded up to 16 significant bits, so that a product with 7 bits needs no rounding.

    Raises:
        ValueError: If a weight is NaN or infinite, or 127 times the scale would be.
    """
    matrix = np.asarray(array).reshape(-1, columns).astype(np.float32, copy=False)
    largest = np.maximum(matrix.max(0, initial=0.0), np.float32(0) - matrix.min(0, initial=0.0))  # never -0.0
    scales = ((largest / np.float32(_LARGEST)).view(np.uint32) + np.uint32(0xFF)) & np.uint32(0xFFFFFF00)
    scales = scales.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(scales * np.float32(_LARGEST)).all():
            raise ValueError("cannot round NaN, infinity or values near the largest float to int8.")
    return scales


def linear_maps(table: AxisTable, params: Params) -> dict[str, int]:
    """The weights that sparse pruning is about, the kernels of the layers, by name; and how many outputs each has."""
    kernels = {path: array for path, array in flatten(params).items() if path[-1] == "kernel" and "layers" in path}
    inputs = {path: 2 if axes_of(table, path)[0] == "heads" else 1 for path in kernels}  # axes; a head has channels
    return {path_name(path): math.prod(array.shape[inputs[path] :]) for path, array in kernels.items()}


def pack_tensors(
    tensors: Mapping[str, Any], *, dtype: np.dtype | None = None, columns: Mapping[str, int] | None = None
) -> tuple[dict[str, Any], dict[str, Description]]:
    """Packs what becomes smaller by it: the tensors of a file, `NAME.values` and so on, and how they are packed.

    Args:
        tensors: Name to array.
        dtype: The type to store; None is each array's own.
        columns: Which tensors get int8 values, and how many columns they have.

    Raises:
        TypeError: If an array has another type than float32, float16 or bfloat16.
        ValueError: Naming every tensor with a value that is NaN, infinite or too large for its type.
    """
    other = {name: str(array.dtype) for name, array in tensors.items() if array.dtype not in FLOATS.values()}
    if other:
        raise TypeError(f"only float32, float16 and bfloat16 can be saved, got {other}.")
    stored: dict[str, Any] = {}
    described: dict[str, Description] = {}
    bad = []
    for name, array in tensors.items():
        kind, own = dtype or np.dtype(array.dtype), (columns or {}).get(name)
        if not all(np.isfinite(block).all() for block in _blocks(array, kind)):
            bad.append(name)
            continue
        packed = pack_if_smaller(array, kind, own)
        if packed is not None:
            stored |= {f"{name}.{part}": value for part, value in packed.parts.items()}
            described[name] = packed.how
        elif array.dtype == kind:
            stored[name] = array
        else:
            stored[name] = Lazy(kind, tuple(array.shape), partial(_cast, array, kind))
    if bad:
        raise ValueError(f"cannot save NaN, infinity or values too large for the type: {', '.join(bad)}.")
    return stored, described


def pack_if_smaller(array: Any, kind: np.dtype, columns: int | None) -> Packed | None:
    """The array in a type without its zeros, if that makes a file smaller."""
    packed = pack(array, dtype=kind, columns=columns or None)
    return packed if packed.nbytes + _DESCRIPTION < packed.how.size * kind.itemsize else None


def rounded(params: Params, columns: Mapping[str, int], dtype: np.dtype | None = None) -> Params:
    """What is read again if these tensors get int8 values, and all are stored in a type; each is made when it is used.

    Args:
        params: The parameters.
        columns: Which tensors get int8 values, and how many columns they have.
        dtype: The type of the file, and of what is made; None is each array's own.
    """

    def unpacked(array: Any, kind: np.dtype, own: int | None) -> np.ndarray:
        packed = pack_if_smaller(array, kind, own) if own else None
        return _cast(array, kind) if packed is None else unpack(packed)

    flat = flatten(params)
    for path, array in flat.items():
        kind, own = dtype or np.dtype(array.dtype), columns.get(path_name(path))
        if own or kind != array.dtype:
            flat[path] = Lazy(kind, tuple(array.shape), partial(unpacked, array, kind, own))
    return unflatten(flat)


def densify(params: Params) -> Params:
    """Makes the sparse arrays of `load(..., sparse=True)` dense; inside a jit, only that needs the memory."""
    import jax
    from jax.experimental.sparse import BCOO

    def is_sparse(leaf: Any) -> bool:
        return isinstance(leaf, BCOO)

    return jax.tree.map(lambda leaf: leaf.todense() if is_sparse(leaf) else leaf, params, is_leaf=is_sparse)


def _cast(array: Any, kind: np.dtype) -> np.ndarray:
    return np.asarray(array).astype(kind)


def _blocks(array: Any, kind: np.dtype) -> Iterator[np.ndarray]:
    """The array in flat blocks of a type; what is too large for it becomes infinite."""
    for block in blocks(array):
        with np.errstate(over="ignore"):
            yield block.astype(kind, copy=False)


def _stored(array: Any, kind: np.dtype, scales: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The array in flat blocks as its values are stored, and which of them are not zero."""
    if scales is None:
        for block in _blocks(array, kind):
            yield block, block.view(f"u{kind.itemsize}") != 0  # -0.0 has a bit
        return
    start, divisors = 0, np.where(scales > 0, scales, np.float32(1))
    for block in _blocks(array, FLOATS["F32"]):
        if not start:  # the first block is the longest
            divisors = np.resize(divisors, len(scales) + len(block))
        own = divisors[start % len(scales) :][: len(block)]
        start += len(block)
        rounded = np.rint(block / own).astype(np.int8)
        yield rounded, rounded != 0


def _deltas(bits: np.ndarray, size: int) -> np.ndarray:
    """Bits as deltas: a byte per weight that is kept, and one per 255 zeros in a row, those at the end included."""
    pieces, last = [], -1  # the last weight that was kept
    for first in range(0, len(bits), _CHUNK):
        kept = np.flatnonzero(np.unpackbits(bits[first : first + _CHUNK], bitorder="little")) + 8 * first
        if not len(kept):
            continue
        zeros = np.diff(kept, prepend=last) - 1
        long = zeros // RUN
        piece = np.full(len(kept) + int(long.sum()), RUN, np.uint8)
        piece[np.cumsum(long + 1) - 1] = zeros % RUN
        pieces.append(piece)
        last = int(kept[-1])
    return np.concatenate([np.empty(0, np.uint8), *pieces, np.full((size - 1 - last) // RUN, RUN, np.uint8)])


def _places(how: Description, parts: Mapping[str, Any], step: int) -> Iterator[tuple[int, np.ndarray]]:
    """Where the values are: of every run its first weight, and the places in it."""
    if how.encoding == "deltas":
        yield from _places_of_deltas(parts["deltas"], how.size, step)
        return
    for start in range(0, how.size, step):
        stop = min(start + step, how.size)
        if how.encoding == "all":
            yield start, np.arange(stop - start)
        else:
            bits = np.unpackbits(parts["bits"][start // 8 : -(-stop // 8)], bitorder="little").view(bool)
            yield start, np.flatnonzero(bits[start % 8 : start % 8 + stop - start])


def _places_of_deltas(deltas: Any, size: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
    reached, taken, known = 0, 0, np.empty(0, np.int64)  # weights and deltas so far; places that are not given yet
    for start in range(0, size, step):
        stop = min(start + step, size)
        while reached < stop and taken < len(deltas):
            piece = deltas[taken : taken + _CHUNK]
            ends = reached + np.cumsum(piece + (piece < RUN), dtype=np.int64)
            known = np.concatenate([known, ends[piece < RUN] - 1])
            reached, taken = int(ends[-1]), taken + len(piece)
        cut = int(np.searchsorted(known, stop))
        yield start, known[:cut] - start
        known = known[cut:]

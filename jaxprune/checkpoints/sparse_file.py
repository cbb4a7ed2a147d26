"""Packs sparse arrays: the weights that are not zero, and where they are; the way back gives the same bits.

A packed array is up to three plain ones. `values` are the weights that are kept, in order. Where they are is said by
`bits`, one bit per weight, or by `deltas`, one byte per kept weight: how many zeros stand before it, 255 for a run of
255 zeros that goes on. The smaller of the two is taken; with neither, every weight has a value. `scales` are there if
the values are int8: a weight is its value times the scale of its column, which is an output of the matrix.

Zero is the bit pattern of +0 and nothing else: -0.0 is a value like any other. docs/packed_files.md has all of it.

Opens safetensors files in which some tensors are packed; they look as if they were not.

What is packed is said in the header: under `"packed"` in the metadata, JSON with a version and a description of every
packed tensor. None of it is trusted: a file is refused, with one error that lists everything, unless every part is
there with the type and the length that its description asks for, and as many weights have a place as have a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxprune.checkpoints.tensors import FLOATS, Entry, TensorFile, blocks
from jaxprune.units import AxisTable, Params, axes_of, flatten, input_axes, path_name, unflatten

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
    return {
        path_name(path): math.prod(array.shape[input_axes(axes_of(table, path)) :]) for path, array in kernels.items()
    }


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


METADATA = "packed"  # the name of the descriptions in the metadata of a file
VERSION = 1  # of the layout
_FIELDS = ("dtype", "shape", "values", "encoding", "count")
_TYPES = {name: kind for name, kind in FLOATS.items()} | {"U8": np.dtype(np.uint8), INT8: np.dtype(np.int8)}
_MOST = 2**63  # weights of one tensor
_SLICE = 2**20  # bytes that one tensor has in memory while it is read
_PIECE = 2**20  # bytes of bits or deltas that are checked at once


class FilePart(NamedTuple):
    """A flat tensor of an open file that is read slice by slice."""

    file: BinaryIO
    entry: Entry

    def __len__(self) -> int:
        return self.entry.shape[0]

    def __getitem__(self, part: Any) -> np.ndarray:
        kind = _TYPES[self.entry.dtype]
        first, last, _ = part.indices(len(self))
        self.file.seek(self.entry.start + first * kind.itemsize)
        return np.frombuffer(self.file.read(max(0, last - first) * kind.itemsize), kind)


class PackedFile(TensorFile):
    """A `TensorFile` whose packed tensors have the type and the shape, and give the values, that they unpack to."""

    def __init__(self, path: str | Path):
        """Opens a file, packed or not, and checks its header and where the values of its packed tensors are.

        Raises:
            ValueError: If the file is not a complete safetensors file, or its packed tensors are damaged.
        """
        super().__init__(path)
        self.packed: dict[str, Packed] = {}  # by the name of the tensor
        try:
            problems = self._unite(*_descriptions(self.metadata)) if METADATA in self.metadata else []
            if problems:
                raise ValueError("; ".join(problems))
        except ValueError as error:
            self._file.close()
            raise ValueError(f"the packed tensors of {path} cannot be read: {error}. Save it again.") from error

    def slices(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """As those of `TensorFile`: dense blocks of rows, one of them in memory at a time."""
        if name not in self.packed:
            yield from super().slices(name)
            return
        packed = self.packed[name]
        kind, inner = FLOATS[packed.how.dtype], packed.how.shape[1:]
        width = math.prod(inner)
        step = max(1, _SLICE // max(1, width * kind.itemsize))
        block = np.zeros(min(step * width, packed.how.size), kind)
        for start, places, values in runs(packed, step * width) if packed.how.size else ():
            block[:] = 0
            block[places] = values
            rows = min(len(block), packed.how.size - start) // width
            yield slice(start // width, start // width + rows), block[: rows * width].reshape(rows, *inner)

    def nonzeros(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of a packed tensor, and where in the flat tensor they are."""
        packed = self.packed[name]
        places, values = np.empty(packed.how.count, np.int64), np.empty(packed.how.count, FLOATS[packed.how.dtype])
        taken = 0
        for start, own, found in runs(packed, _SLICE):
            places[taken : taken + len(own)] = own + start
            values[taken : taken + len(own)] = found
            taken += len(own)
        return places, values

    def stored_bytes(self, name: str) -> int:
        """The bytes of a tensor in the file."""
        entries = [part.entry for part in self.packed[name].parts.values()] if name in self.packed else []
        return sum(entry.stop - entry.start for entry in entries or [self.entries[name]])

    def _unite(self, described: Mapping[str, Description], problems: list[str]) -> list[str]:
        """Puts the packed tensors in the place of their parts, and says what is wrong with them."""
        parts = dict(self.entries)
        for name, how in described.items():
            own = {part: parts.get(f"{name}.{part}") for part in how.parts}
            wrong = [f"there is a tensor {name} as well"] * (name in parts)
            wrong += [fault for part, entry in own.items() if (fault := _misfit(how, part, entry))]
            if not wrong:
                found = {part: FilePart(self._file, entry) for part, entry in own.items() if entry is not None}
                wrong = _misplaced(how, found)
                values = found["values"].entry
                self.packed[name] = Packed(how, found)
                self.entries[name] = Entry(how.dtype, how.shape, values.start, values.stop)
                for part in own:
                    self.entries.pop(f"{name}.{part}", None)
            problems += [f"{name}: {fault}" for fault in wrong]
        return problems


def descriptions_text(described: Mapping[str, Description]) -> str:
    """What the metadata of a file hold under `METADATA`."""
    tensors = {name: {**how._asdict(), "shape": list(how.shape)} for name, how in described.items()}
    return json.dumps({"version": VERSION, "tensors": tensors}, separators=(",", ":"))


def _descriptions(metadata: Mapping[str, str]) -> tuple[dict[str, Description], list[str]]:
    """The descriptions that make sense, and what is wrong with the others."""
    try:
        content = json.loads(metadata[METADATA], object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"their description is not valid JSON ({error})") from error
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or version != VERSION:
        raise ValueError(f"their layout has version {str(version)[:80]!r}, this version of jaxprune reads {VERSION}")
    if sorted(content) != ["tensors", "version"] or not isinstance(content["tensors"], dict):
        raise ValueError(f"they are described by {sorted(content)}, expected version and tensors")
    described, problems = {}, []
    for name, fields in content["tensors"].items():
        wrong = _nonsense(fields)
        if wrong:
            problems.append(f"{name}: {wrong}")
        else:
            described[name] = Description(**{**fields, "shape": tuple(fields["shape"])})
    return described, problems


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _nonsense(fields: Any) -> str | None:
    """What is wrong with a description on its own."""
    if not isinstance(fields, dict) or sorted(fields) != sorted(_FIELDS):
        return f"it is described by {str(fields)[:80]}, expected {', '.join(_FIELDS)}"
    dtype, shape, values, encoding, count = (fields[name] for name in _FIELDS)
    if not isinstance(dtype, str) or dtype not in FLOATS:
        return f"dtype is {str(dtype)[:80]!r}, expected {', '.join(FLOATS)}"
    if values not in (dtype, INT8):
        return f"values are {str(values)[:80]!r}, expected {dtype} or {INT8}"
    if not isinstance(encoding, str) or encoding not in ENCODINGS:
        return f"encoding is {str(encoding)[:80]!r}, expected {', '.join(ENCODINGS)}"
    if not isinstance(shape, list) or len(shape) > 32 or not all(_is_count(size) for size in (*shape, count)):
        return f"shape is {str(shape)[:80]} and count {str(count)[:80]}, expected counts"
    if math.prod(shape) >= _MOST or count > math.prod(shape) or (encoding == "all" and count != math.prod(shape)):
        return f"count is {count}, which does not fit the shape {shape} with encoding {encoding}"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _misfit(how: Description, part: str, entry: Entry | None) -> str | None:
    """What is wrong with the type or the length of a part."""
    if entry is None:
        return f"{part} are missing"
    kind = how.values if part == "values" else STORED[part]
    if entry.dtype != kind or len(entry.shape) != 1:
        return f"{part} are {entry.dtype} of shape {list(entry.shape)}, expected {kind} with one axis"
    length, wanted = entry.shape[0], {"values": how.count, "bits": -(-how.size // 8)}.get(part)
    if wanted is not None and length != wanted:
        return f"there are {length} {part}, expected {wanted}"
    if part == "scales" and (how.size % length if length else how.size):
        return f"there are {length} scales, which do not divide its {how.size} weights into columns"
    return None


def _misplaced(how: Description, parts: Mapping[str, FilePart]) -> list[str]:
    """What is wrong with where the values are."""
    if how.encoding == "all":
        return []
    found, covered = 0, how.size
    if how.encoding == "bits":
        found = sum(int(np.bitwise_count(piece).sum()) for piece in _pieces(parts["bits"]))
        last = parts["bits"][len(parts["bits"]) - 1 :]
        if how.size % 8 and int(last[0]) >> how.size % 8:
            return ["bits are set behind its last weight"]
    else:
        covered = 0
        for piece in _pieces(parts["deltas"]):
            kept = int(np.count_nonzero(piece < RUN))
            found, covered = found + kept, covered + int(piece.sum(dtype=np.int64)) + kept
    wrong = [f"{how.encoding} place {found} values, and there are {how.count}"] if found != how.count else []
    if not 0 <= how.size - covered < RUN:
        wrong.append(f"deltas end at weight {covered} of {how.size}")
    return wrong


def _pieces(part: FilePart) -> Iterator[np.ndarray]:
    for first in range(0, len(part), _PIECE):
        yield part[first : first + _PIECE]

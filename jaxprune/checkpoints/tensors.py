"""Reads safetensors files by memory map, a slice at a time, and writes them without a second copy in memory.

A safetensors file is eight bytes (the length of the header, little-endian), a JSON header (name to type, shape and byte
range) and the bytes of the tensors. Nothing in it is executed. The header is not trusted: a file is refused, with one
error, unless its tensors cover the data exactly once and lie within the file.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
BYTES = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)}
_READ = FLOATS | BYTES
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}  # per element, of every type there is
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_MAX_AXES = 64  # of one tensor; NumPy's limit
_SLICE = 2**20  # bytes of a file that are mapped at once


class Entry(NamedTuple):
    """Where one tensor is in its file."""

    dtype: str  # as the file calls it: "F32"
    shape: tuple[int, ...]
    start: int  # first byte, counted from the beginning of the file
    stop: int  # one past the last byte


class TensorFile:
    """An open safetensors file: what it holds, and its tensors slice by slice. Close it, or use it in a `with`."""

    def __init__(self, path: str | Path):
        """Opens a file and checks its header.

        Raises:
            ValueError: If the file is not a complete safetensors file.
        """
        self.path = Path(path)
        self._file = open(self.path, "rb")  # noqa: SIM115, kept open: a file renamed over this one changes nothing
        try:
            self.entries, self.metadata = _read_header(self._file)
        except ValueError as error:
            self._file.close()
            raise ValueError(
                f"{path} is not a complete safetensors file: {error}. Download it or save it again."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()

    def slices(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields a tensor of floats or bytes in blocks of rows, each mapped from the file and valid until the next one.

        Only one block is in memory at a time. A tensor without axes is one block of shape `[1]`.
        """
        entry = self.entries[name]
        dtype, rows = _READ[entry.dtype], entry.shape[0] if entry.shape else 1
        inner = entry.shape[1:]
        row_bytes = math.prod(inner) * dtype.itemsize
        step = max(1, _SLICE // max(1, row_bytes))
        for first in range(0, rows if row_bytes else 0, step):
            last = min(first + step, rows)
            start, size = entry.start + first * row_bytes, (last - first) * row_bytes
            mapped = np.memmap(self._file, np.uint8, "r", offset=start, shape=(size,))
            yield slice(first, last), mapped.view(np.ndarray).view(dtype).reshape(last - first, *inner)

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor of floats or bytes."""
        entry = self.entries[name]
        array = np.empty(entry.shape or (1,), _READ[entry.dtype])
        for rows, block in self.slices(name):
            array[rows] = block
        return array.reshape(entry.shape)


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    *,
    dtype: np.dtype | None = None,
    kinds: Mapping[str, np.dtype] = FLOATS,
) -> None:
    """Writes arrays as a safetensors file, block by block.

    Args:
        file: An open file.
        tensors: Name to array. They are ordered by name within one item size.
        metadata: Strings for the header.
        dtype: The type to write; None is each array's own.
        kinds: The types that arrays may have, by the names that the file has for them: `FLOATS`, `BYTES` or both.

    Raises:
        TypeError: If an array has another type.
        ValueError: If a value is NaN or infinite, or too large for `dtype`; it names every such tensor.
    """
    known = {kind: name for name, kind in kinds.items()}
    other = {name: str(array.dtype) for name, array in tensors.items() if array.dtype not in known}
    if other:
        *names, last = map(str, known)
        raise TypeError(f"only {', '.join(names)} and {last} can be saved, got {other}.")
    own = {name: dtype or np.dtype(array.dtype) for name, array in tensors.items()}
    order = sorted(tensors, key=lambda name: (-own[name].itemsize, name))  # every array is aligned to its items
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        stop = start + math.prod(tensors[name].shape) * own[name].itemsize
        header[name] = {"dtype": known[own[name]], "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    bad = [name for name in order if not _write_array(file, tensors[name], own[name])]
    if bad:
        raise ValueError(f"cannot save NaN, infinity or values too large for the type: {', '.join(bad)}.")


def blocks(array: Any) -> Iterator[np.ndarray]:
    """The elements of an array on the host in order, as flat blocks of about a megabyte."""
    flat = np.ascontiguousarray(array).reshape(-1)
    step = max(1, _SLICE // flat.itemsize)
    for first in range(0, flat.size, step):
        yield flat[first : first + step]


def _write_array(file: BinaryIO, array: Any, dtype: np.dtype) -> bool:
    finite = True
    for block in blocks(array):
        with np.errstate(over="ignore"):  # found by the next line
            block = block.astype(dtype, copy=False)
        finite = finite and bool(np.isfinite(block).all())
        file.write(block.view(np.uint8).data)
    return finite


def _read_header(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"it has only {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"its header claims {length} bytes, more than the {_MAX_HEADER} allowed")
    if 8 + length > size:
        raise ValueError(f"its header claims {length} bytes and the file has {size}: it is truncated or something else")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    try:
        json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"its header holds half of a character ({error})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    entries = {name: _entry(name, fields, 8 + length) for name, fields in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != position:
            raise ValueError(f"tensor {name!r} starts at byte {entry.start}, expected {position} (overlap or gap)")
        position = entry.stop
    if position != size:
        raise ValueError(f"its tensors end at byte {position} and the file has {size}: it is truncated or too long")
    return entries, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"its header names twice: {twice}")
    return found


def _entry(name: str, fields: Any, offset: int) -> Entry:
    if not isinstance(fields, dict) or sorted(fields) != ["data_offsets", "dtype", "shape"]:
        raise ValueError(f"tensor {name!r} is described by {str(fields)[:80]}, expected dtype, shape and data_offsets")
    dtype, shape, span = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise ValueError(f"tensor {name!r} has type {dtype!r}, known: {', '.join(_BYTES)}")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise ValueError(f"tensor {name!r} has shape {str(shape)[:80]} and bytes {str(span)[:80]}, expected counts")
    if math.prod(shape) * _BYTES[dtype] != span[1] - span[0]:
        raise ValueError(f"tensor {name!r} of shape {shape} and type {dtype} does not fill the bytes {span}")
    return Entry(dtype, tuple(shape), offset + span[0], offset + span[1])


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_AXES
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )

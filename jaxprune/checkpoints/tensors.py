"""Safetensors files, compressed or not: read slice by slice, written without a second copy in memory; their digests.

A safetensors file is eight bytes (the length of the header, little-endian), a JSON header (name to type, shape and byte
range) and the bytes of the tensors. Nothing in it is executed. The header is not trusted: a file is refused, with one
error, unless its tensors cover the data exactly once and lie within the file.

Only mapped slices keep loading within its bounds of memory: the reader of safetensors maps whole files. A digest is the
SHA-256 of parameters or of a model, computed once for arrays that cannot change.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import __version__
from jaxprune.checkpoints.files import COUNT, misfits_of, without_duplicates
from jaxprune.models import Model
from jaxprune.units import Params, flatten, path_name

COMPRESSED = ".zst"  # ending of the names of files that zstd compressed
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
TYPES = FLOATS | {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)}  # of the arrays that are read and written
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
SIZES |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}  # per element, of every type there is
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_MAX_AXES = 64  # of one tensor; NumPy's limit
_EXPANSION = 200  # times the size of a packed file that its tensors may have, and
_SLACK = 2**26  # bytes beyond
_SLICE = 2**19  # bytes of a file that are mapped at once
_FRAME = 2**22  # bytes that are compressed at once; more need more memory and save little
_LEVEL = 9  # of zstd; 19 makes files a tenth smaller and takes seventy times as long (benchmarks/packing.py)


class Entry(NamedTuple):
    """The place of one tensor in its file."""

    dtype: str  # as the file calls it: "F32"
    shape: tuple[int, ...]
    start: int  # first byte, counted from the beginning of the file
    stop: int  # one past the last byte


class TensorFile:
    """An open safetensors file: what it holds, and its tensors slice by slice. Close it, or use it in a `with`.

    One whose name ends in `.zst` is expanded on the way, or into a temporary file if it is not read from front to back.
    """

    units: Mapping[str, Sequence[int]] = {}  # kind of units to their number in every layer, if the file says so

    def __init__(self, path: str | Path):
        """Opens a file and checks its header.

        Raises:
            ValueError: If the file is not a complete safetensors file.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():  # reading a pipe would wait for ever
            raise ValueError(f"{self.path} is no file: name a safetensors file.")
        self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115, stays the same if another is renamed over it
        self._stream: Any = None  # of a compressed file
        self._position = 0  # in the stream
        self._size = size = os.fstat(self._file.fileno()).st_size
        try:
            if self.path.suffix == COMPRESSED:
                self._start()
                self.entries, self.metadata, self._stop = _read_header(self._read, None)
                self._check_expansion(self._stop)
            else:
                self.entries, self.metadata, self._stop = _read_header(self._file.read, size)
                _check_end(self._stop, size)
        except ValueError as error:
            self._file.close()
            raise self._incomplete(error) from error
        self._stored = dict(self.entries)

    def _check_expansion(self, claimed: int) -> None:
        """Refuses tensors that take far more memory than the file: a sparse model takes at most 30 times as much."""
        if claimed > (most := _SLACK + _EXPANSION * self._size):
            raise ValueError(f"its {self._size:,} bytes claim tensors of {claimed:,}, expected at most {most:,}")

    def _incomplete(self, reason: object) -> ValueError:
        return ValueError(f"{self.path} is not a complete safetensors file: {reason}. Download it or save it again.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()
        if self._stream is not None:
            self._stream.close()

    def slices(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields a tensor of floats or bytes in blocks of rows, each mapped from the file and valid until the next one.

        Only one block is in memory at a time. A tensor without axes is one block of shape `[1]`.
        """
        entry = self._stored[name]
        dtype, rows = TYPES[entry.dtype], entry.shape[0] if entry.shape else 1
        inner = entry.shape[1:]
        row_bytes = math.prod(inner) * dtype.itemsize
        step = max(1, _SLICE // max(1, row_bytes))
        for first in range(0, rows if row_bytes else 0, step):
            last = min(first + step, rows)
            start, size = entry.start + first * row_bytes, (last - first) * row_bytes
            yield slice(first, last), self._bytes(start, size).view(dtype).reshape(last - first, *inner)

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor of floats or bytes."""
        entry = (self.entries if name in self.entries else self._stored)[name]
        array = np.empty(entry.shape or (1,), TYPES[entry.dtype])
        for rows, block in self.slices(name):
            array[rows] = block
        return array.reshape(entry.shape)

    def _bytes(self, start: int, size: int) -> np.ndarray:
        """Bytes of the file, expanded; valid until the next ones."""
        if self._stream is not None and start < self._position:
            self._expand()
        if self._stream is None:
            return np.memmap(self._file, np.uint8, "r", offset=start, shape=(size,)).view(np.ndarray)
        try:
            while self._position < start and self._read(min(start - self._position, _SLICE)):
                pass
            content = self._read(size)
            if len(content) < size or self._position == self._stop:
                _check_end(self._stop, self._position + len(self._read(1)))
        except ValueError as error:
            raise self._incomplete(error) from error
        return np.frombuffer(content, np.uint8)

    def _start(self) -> None:
        import pyarrow  # half a second

        self._file.seek(0)
        file = open(os.dup(self._file.fileno()), "rb")  # noqa: SIM115, the stream closes it
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        self._position = 0

    def _read(self, size: int) -> bytes:
        """The next bytes of the stream."""
        try:
            content = self._stream.read(size)
        except OSError as error:
            if error.errno:  # of a disk, not of the compression
                raise
            raise ValueError(f"it cannot be expanded ({error})") from error
        self._position += len(content)
        return content

    def _expand(self) -> None:
        """Puts a temporary file in the place of the stream."""
        plain: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115
        self._start()
        try:
            while self._position <= self._stop and (piece := self._read(_SLICE)):
                plain.write(piece)
            _check_end(self._stop, self._position)
        except ValueError as error:
            plain.close()
            raise self._incomplete(error) from error
        plain.flush()
        self._file.close()
        self._stream.close()
        self._file, self._stream = plain, None


class Writer(Protocol):
    """An open file, or what compresses into one."""

    def write(self, data: Any, /) -> Any:
        """Writes bytes."""
        ...


class Compressor:
    """Compresses bytes into an open file, frame by frame, as zstd reads them; `finish` writes the last frame."""

    def __init__(self, file: BinaryIO):
        import pyarrow  # half a second

        self._file, self._codec = file, pyarrow.Codec("zstd", compression_level=_LEVEL)
        self._pending = bytearray()

    def write(self, data: Any, /) -> None:
        """Adds bytes."""
        self._pending += data
        if len(self._pending) >= _FRAME:
            self.finish()

    def finish(self) -> None:
        """Compresses and writes what was added."""
        if self._pending:
            self._file.write(self._codec.compress(bytes(self._pending), asbytes=True))
            self._pending.clear()


def write_tensors(
    file: Writer,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    *,
    dtypes: Mapping[str, np.dtype] | None = None,
) -> None:
    """Writes arrays as a safetensors file, block by block.

    Args:
        file: An open file.
        tensors: Name to array. They are ordered by name within one item size.
        metadata: Strings for the header.
        dtypes: Types to write; an array that is not named keeps its own.

    Raises:
        TypeError: If an array has a type that is not in `TYPES`.
        ValueError: If a value is NaN or infinite, or too large for its type; it names every such tensor.
    """
    names = {kind: name for name, kind in TYPES.items()}
    if unknown := {name: str(array.dtype) for name, array in tensors.items() if array.dtype not in names}:
        raise TypeError(f"only {', '.join(map(str, names))} can be saved, got {unknown}.")
    kinds = {name: np.dtype(array.dtype) for name, array in tensors.items()} | dict(dtypes or {})
    # Every array is aligned to its items; scales come first, so that a compressed file is read from front to back.
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, not name.endswith(".scales"), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        stop = start + math.prod(tensors[name].shape) * kinds[name].itemsize
        header[name] = {"dtype": names[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    bad = [name for name in order if not _write_array(file, tensors[name], kinds[name])]
    if bad:
        raise ValueError(f"cannot save NaN, infinity or values too large for the type: {', '.join(bad)}.")


def blocks(array: Any) -> Iterator[np.ndarray]:
    """The elements of an array on the host in order, as flat blocks of about a megabyte."""
    flat = np.ascontiguousarray(array).reshape(-1)
    step = max(1, _SLICE // flat.itemsize)
    for first in range(0, flat.size, step):
        yield flat[first : first + step]


def _write_array(file: Writer, array: Any, dtype: np.dtype) -> bool:
    finite = True
    for block in blocks(array):
        with np.errstate(over="ignore"):  # found by the next line
            block = block.astype(dtype, copy=False)
        finite = finite and bool(np.isfinite(block).all())
        file.write(block.view(np.uint8).data)
    return finite


def _check_end(stop: int, size: int) -> None:
    if stop != size:
        raise ValueError(f"its tensors end at byte {stop} and the file has {size}: it is truncated or too long")


def _read_header(read: Callable[[int], bytes], size: int | None) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The tensors, the metadata, and where the last tensor ends; None: it is not known how large the file is."""
    first = read(8)
    if len(first) < 8:
        raise ValueError(f"it has only {len(first)} bytes")
    length = int.from_bytes(first, "little")
    if length > _MAX_HEADER:
        raise ValueError(f"its header claims {length} bytes, more than the {_MAX_HEADER} allowed")
    if size is not None and 8 + length > size:
        raise ValueError(f"its header claims {length} bytes and the file has {size}: it is truncated or something else")
    try:
        header = json.loads(read(length).decode(), object_pairs_hook=without_duplicates)
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
    return entries, metadata, position


def _entry(name: str, fields: Any, offset: int) -> Entry:
    if not isinstance(fields, dict) or sorted(fields) != ["data_offsets", "dtype", "shape"]:
        raise ValueError(f"tensor {name!r} is described by {str(fields)[:80]}, expected dtype, shape and data_offsets")
    dtype, shape, span = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"tensor {name!r} has type {dtype!r}, known: {', '.join(SIZES)}")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise ValueError(f"tensor {name!r} has shape {str(shape)[:80]} and bytes {str(span)[:80]}, expected counts")
    if math.prod(shape) * SIZES[dtype] != span[1] - span[0]:
        raise ValueError(f"tensor {name!r} of shape {shape} and type {dtype} does not fill the bytes {span}")
    return Entry(dtype, tuple(shape), offset + span[0], offset + span[1])


def _are_sizes(values: Any) -> bool:
    return len(values) <= _MAX_AXES and not misfits_of(values, [COUNT]) if isinstance(values, list) else False


# Paths and identities of arrays -> references that remove the entry when an array goes, and their digest.
_known: dict[tuple[Any, ...], tuple[list[Any], str]] = {}


def params_digest(params: Params) -> str:
    """The SHA-256 of names, shapes, types and values: equal for equal parameters, on whatever device they are.

    That of JAX arrays is computed once and remembered for as long as all of them live; NumPy arrays may change.
    """
    flat = flatten(params)
    key = tuple((path, id(array)) for path, array in flat.items())
    if key in _known:
        return _known[key][1]
    sha = hashlib.sha256()
    for path, array in flat.items():
        sha.update(json.dumps([path_name(path), str(array.dtype), list(array.shape)]).encode())
        for block in blocks(array):
            sha.update(block.view(np.uint8).data)
    digest = sha.hexdigest()
    if flat and all(isinstance(array, jax.Array) for array in flat.values()):
        _known[key] = ([weakref.ref(array, partial(_forget, key)) for array in flat.values()], digest)
    return digest


def _forget(key: tuple[Any, ...], _: Any) -> None:
    _known.pop(key, None)


def model_digest(model: Model, params: Params) -> str:
    """The SHA-256 of the configuration, the task heads and the parameters; see `params_digest`."""
    heads = [asdict(model.head(name)) for name in model.heads]
    content = [json.loads(model.config.raw), heads, params_digest(params)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"jaxprune": __version__, "jax": jax.__version__}


def sealed(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A header as JSON holds it, with a checksum over its other entries and over all arrays by name, shape and type."""
    plain = json.loads(json.dumps({name: value for name, value in header.items() if name != "checksum"}))
    text = json.dumps([plain, params_digest(dict(arrays))], sort_keys=True)
    return plain | {"checksum": hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> bool:
    """True if the checksum of a header is that of `sealed`."""
    return header.get("checksum") == sealed(header, arrays)["checksum"]

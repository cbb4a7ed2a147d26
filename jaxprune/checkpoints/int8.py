"""Small files of sparse weights: kernels rounded to int8, and the packed layout of version 0.1, which is read only.

A rounded kernel is stored as int8, with `KERNEL.scales`, one float32 per output: a weight is its value
times the scale of its output. The metadata of the file name the type that each such kernel had, under `"int8"`.
docs/packed_files.md has all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.checkpoints.tensors import FLOATS, Entry, TensorFile, are_sizes, without_duplicates
from jaxprune.units import AxisTable, Params, axes_of, flatten, input_axes, path_name, unflatten

INT8 = "int8"  # in the metadata of a file: name -> type of the kernels that are rounded
PACKED = "packed"  # the same of the tensors that version 0.1 stored without their zeros
_LARGEST = 127  # int8, symmetric: -128 is not used
_RUN = 255  # zeros that no weight follows, in the packed files of version 0.1
_PACKED_FIELDS = {"dtype", "shape", "values", "encoding", "count"}


@dataclass(frozen=True)
class Lazy:
    """An array that is made when it is used, and not kept."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.make()


def linear_maps(table: AxisTable, params: Params) -> dict[str, int]:
    """The weights that sparse pruning is about, the kernels of the layers, by name; and how many outputs each has."""
    kernels = {path: array for path, array in flatten(params).items() if path[-1] == "kernel" and "layers" in path}
    return {
        path_name(path): math.prod(array.shape[input_axes(axes_of(table, path)) :])
        for path, array in kernels.items()
        if array.size
    }


def output_scales(array: Any, outputs: int) -> np.ndarray:
    """One float32 per output: 127 times it is at least the output's largest weight, and every multiple is exact.

    They are rounded up to 16 significant bits, so that a product with 7 bits needs no rounding.

    Raises:
        ValueError: If a weight is NaN or infinite, or 127 times the scale would be.
    """
    matrix = np.asarray(array).reshape(-1, outputs).astype(np.float32, copy=False)
    largest = np.maximum(matrix.max(0, initial=0.0), np.float32(0) - matrix.min(0, initial=0.0))  # never -0.0
    scales = ((largest / np.float32(_LARGEST)).view(np.uint32) + np.uint32(0xFF)) & np.uint32(0xFFFFFF00)
    scales = scales.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(scales * np.float32(_LARGEST)).all():
            raise ValueError("cannot round NaN, infinity or values near the largest float to int8.")
    return scales


def round_to_int8(array: Any, scales: np.ndarray) -> np.ndarray:
    """The weights in units of their outputs' scales: a weight then differs by at most half a scale, a zero not at all.

    In an output whose largest weight is at least 1e-35, half the scale is at most 1/253 of it, and rounding the result
    again changes nothing.
    """
    matrix = np.asarray(array).reshape(-1, len(scales)).astype(np.float32, copy=False)
    return np.rint(matrix / np.where(scales > 0, scales, np.float32(1))).astype(np.int8).reshape(array.shape)


def from_int8(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights in float32."""
    with np.errstate(invalid="ignore", over="ignore"):  # of damaged scales; whoever reads the weights refuses those
        weights = values.reshape(-1, len(scales)).astype(np.float32)
        weights *= scales
        return weights.reshape(values.shape)


def int8_tensors(arrays: Mapping[str, Any], outputs: Mapping[str, int]) -> dict[str, Any]:
    """The tensors of a file in which some are rounded; the values are made when they are written."""
    tensors = dict(arrays)
    for name, count in outputs.items():
        scales = output_scales(arrays[name], count)
        tensors[name] = Lazy(np.dtype(np.int8), arrays[name].shape, partial(round_to_int8, arrays[name], scales))
        tensors[f"{name}.scales"] = scales
    return tensors


def reread(
    params: Params, outputs: Mapping[str, int], stored: np.dtype | None = None, read: np.dtype | None = None
) -> Params:
    """The parameters as they are read from a file in which some are rounded; each is made when it is used.

    Args:
        params: What is saved.
        outputs: Which tensors are rounded to int8, and how many outputs they have.
        stored: The type of the file; None is each array's own.
        read: The type in which they are read; None is that of the file.
    """

    def make(array: Any, kind: np.dtype, count: int | None) -> np.ndarray:
        array = np.asarray(array)
        if count:
            scales = output_scales(array, count)
            array = from_int8(round_to_int8(array, scales), scales)
        with np.errstate(over="ignore"):  # `save` refuses what is too large
            return array.astype(kind).astype(read or kind)

    flat = flatten(params)
    for path, array in flat.items():
        kind, count = stored or np.dtype(array.dtype), outputs.get(path_name(path))
        if count or not array.dtype == kind == (read or kind):
            flat[path] = Lazy(read or kind, tuple(array.shape), partial(make, array, kind, count))
    return unflatten(flat)


def sparse_if_smaller(array: np.ndarray) -> Any:
    """The array on the device; sparse (`BCOO`) where that takes less memory: below about a third of the weights."""
    from jax.experimental.sparse import BCOO

    nonzero = array.view(f"u{array.itemsize}") != 0  # -0.0 is a value
    if not array.ndim or np.count_nonzero(nonzero) * (array.itemsize + 4 * array.ndim) >= array.nbytes:
        return jax.device_put(array)
    values, places = jax.device_put((array[nonzero], np.argwhere(nonzero).astype(np.int32)))
    return BCOO((values, places), shape=array.shape, indices_sorted=True, unique_indices=True)


def densify(params: Params) -> Params:
    """Makes the sparse arrays of `load(..., sparse=True)` dense; inside a jit, only that needs the memory."""
    from jax.experimental.sparse import BCOO

    def is_sparse(leaf: Any) -> bool:
        return isinstance(leaf, BCOO)

    return jax.tree.map(lambda leaf: leaf.todense() if is_sparse(leaf) else leaf, params, is_leaf=is_sparse)


class WeightFile(TensorFile):
    """A `TensorFile` whose rounded and packed tensors look as they were: their type, their shape and their values."""

    def __init__(self, path: str | Path):
        """Opens a file, and checks its header and what it says of tensors that are stored in another way.

        Raises:
            ValueError: If the file is not a complete safetensors file, or such tensors are damaged.
        """
        super().__init__(path)
        self._scales: dict[str, np.ndarray] = {}  # by the name of the kernel
        self._packed: dict[str, dict[str, Any]] = {}  # descriptions by the name of the tensor
        try:
            for name, dtype in self._described(INT8).items():
                self._add_rounded(name, dtype)
            for name, fields in self._described(PACKED).items():
                self._add_packed(name, fields)
        except (ValueError, RecursionError) as error:
            self._file.close()
            raise ValueError(f"the int8 or packed tensors of {path} cannot be read: {error}. Save it again.") from error

    def slices(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """The blocks, as those of `TensorFile`; a packed tensor is one."""
        if name in self._packed:
            array = self._unpacked(name, **self._packed[name])
            yield slice(0, len(array)), array
            return
        for rows, block in super().slices(name):
            if name in self._scales:
                block = from_int8(block, self._scales[name]).astype(FLOATS[self.entries[name].dtype], copy=False)
            yield rows, block

    def _described(self, key: str) -> dict[str, Any]:
        if key not in self.metadata:
            return {}
        content = json.loads(self.metadata[key], object_pairs_hook=without_duplicates)
        if key == PACKED and isinstance(content, dict):
            if content.keys() != {"version", "tensors"} or str(content["version"]) != "1":  # nor True
                raise ValueError(f"they are described by {str(content)[:80]}, expected version 1 and tensors")
            content = content["tensors"]
        if not isinstance(content, dict):
            raise ValueError(f"they are described by {str(content)[:80]}, expected an object of names")
        return content

    def _add_rounded(self, name: str, dtype: Any) -> None:
        entry, scales = self._stored.get(name), self._stored.get(f"{name}.scales")
        if dtype not in list(FLOATS) or entry is None or entry.dtype != "I8" or scales is None or scales.dtype != "F32":
            raise ValueError(f"{name} must be I8, with scales in F32, and of one of the types {', '.join(FLOATS)}")
        width = math.prod(entry.shape[1:])
        if len(scales.shape) != 1 or not scales.shape[0] or len(entry.shape) < 2 or width % scales.shape[0]:
            raise ValueError(f"{name} of shape {list(entry.shape)} has scales of shape {list(scales.shape)}")
        self._scales[name] = self.read(f"{name}.scales")
        self.entries[name] = entry._replace(dtype=dtype)
        del self.entries[f"{name}.scales"]

    def _add_packed(self, name: str, fields: Any) -> None:
        if not isinstance(fields, dict) or fields.keys() != _PACKED_FIELDS:
            raise ValueError(f"{name} is described by {str(fields)[:80]}, expected {', '.join(sorted(_PACKED_FIELDS))}")
        dtype, shape, kind, encoding, count = (fields[k] for k in ("dtype", "shape", "values", "encoding", "count"))
        if dtype not in list(FLOATS) or kind not in (dtype, "I8") or encoding not in ("all", "bits", "deltas"):
            raise ValueError(f"{name} is described by {str(fields)[:200]}: a type or an encoding is unknown")
        if not are_sizes(shape) or not are_sizes([count]) or name in self._stored:
            raise ValueError(f"{name} is described by {str(fields)[:200]}: no counts, or it is there as well")
        parts = {"values": kind} | ({} if encoding == "all" else {encoding: "U8"})
        parts |= {"scales": "F32"} if kind == "I8" else {}
        for part, type_of_part in parts.items():
            entry = self._stored.get(f"{name}.{part}")
            if entry is None or entry.dtype != type_of_part or len(entry.shape) != 1:
                raise ValueError(f"{name}.{part} is missing, or not {type_of_part} with one axis")
            self.entries.pop(f"{name}.{part}", None)
        values = self._stored[f"{name}.values"]
        if values.shape != (count,) or (encoding == "all" and count != math.prod(shape)):
            raise ValueError(f"{name} has {values.shape[0]} values, expected {count} for the shape {shape}")
        self._packed[name] = fields
        self.entries[name] = Entry(dtype, tuple(shape), values.start, values.stop)

    def _unpacked(self, name: str, dtype: str, shape: list[int], values: str, encoding: str, count: int) -> np.ndarray:
        """A packed tensor with its zeros; one without axes has one."""
        size, weights = math.prod(shape), self.read(f"{name}.values")
        if encoding == "bits":  # one per weight, 1 where there is a value
            bits = np.unpackbits(self.read(f"{name}.bits"), bitorder="little")
            places, fits = np.flatnonzero(bits[:size]), len(bits) == -(-size // 8) * 8 and not bits[size:].any()
        elif encoding == "deltas":  # the zeros before each value; 255 is a run of zeros without one
            deltas = self.read(f"{name}.deltas")
            ends = np.cumsum(deltas + (deltas < _RUN).astype(np.int64))
            places, fits = ends[deltas < _RUN] - 1, 0 <= size - (int(ends[-1]) if len(ends) else 0) < _RUN
        else:
            places, fits = np.arange(size), True
        if values == "I8":
            scales = self.read(f"{name}.scales")
            fits = fits and (size % len(scales) == 0 if len(scales) else not size)
        if not fits or len(places) != count:
            raise ValueError(
                f"the packed tensor {name} of {self.path} is damaged: its {encoding} or scales do not place {count:,} "
                f"values among {size:,} weights. Save it again."
            )
        if values == "I8":
            with np.errstate(invalid="ignore", over="ignore"):
                weights = weights.astype(np.float32) * scales[places % max(1, len(scales))]
        array = np.zeros(size, FLOATS[dtype])
        array[places] = weights
        return array.reshape(shape or (1,))

"""Weights in files, sparse ones packed (compressed, if asked for as int8), and their fit to a model's parameters.

Fitting is exact and in bounded memory. The packed layout of version 0.1 is still read.

A rounded kernel is stored as int8, with `KERNEL.scales`, one float32 per output: a weight is its value
times the scale of its output. The metadata of the file name the type that each such kernel had, under `"int8"`.
docs/packed_files.md has all of it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.checkpoints.files import COUNT, parse_header, read_json
from jaxprune.checkpoints.gguf import GGUF, GGUFFile
from jaxprune.checkpoints.tensors import COMPRESSED, FLOATS, SIZES, Entry, TensorFile
from jaxprune.compaction import compact_site
from jaxprune.models import Model, family
from jaxprune.units import (
    KINDS,
    UNIT_AXES,
    AxisTable,
    Params,
    Site,
    axes_of,
    flatten,
    input_axes,
    lengths,
    path_name,
    shapes_at,
    sites,
    unflatten,
)
from jaxprune.units import Path as ParamPath

INT8 = "int8"  # in the metadata of a file: name -> type of the kernels that are rounded
PACKED = "packed"  # the same of the tensors that version 0.1 stored without their zeros
_DESCRIBED = {  # schemas of both
    INT8: {...: re.compile("|".join(FLOATS))},
    PACKED: {"version": range(1, 2), "tensors": {...: {
        "dtype": re.compile("|".join(FLOATS)), "shape": [COUNT], "values": re.compile("I8|" + "|".join(FLOATS)),
        "encoding": re.compile("all|bits|deltas"), "count": COUNT,
    }}},
}  # fmt: skip
_LARGEST = 127  # int8, symmetric: -128 is not used
_RUN = 255  # zeros that no weight follows, in the packed files of version 0.1


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
            self._check_expansion(sum(math.prod(e.shape) * SIZES[e.dtype] for e in self.entries.values()))
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
        problems, content = parse_header(self.metadata.get(key, "{}"), _DESCRIBED[key] if key in self.metadata else {})
        if problems:
            raise ValueError("; ".join(problems))
        return content.get("tensors", {}) if key == PACKED else content

    def _add_rounded(self, name: str, dtype: Any) -> None:
        entry, scales = self._stored.get(name), self._stored.get(f"{name}.scales")
        if entry is None or entry.dtype != "I8" or scales is None or scales.dtype != "F32":
            raise ValueError(f"{name} must be I8, with scales in F32")
        width = math.prod(entry.shape[1:])
        if len(scales.shape) != 1 or not scales.shape[0] or len(entry.shape) < 2 or width % scales.shape[0]:
            raise ValueError(f"{name} of shape {list(entry.shape)} has scales of shape {list(scales.shape)}")
        self._scales[name] = self.read(f"{name}.scales")
        self.entries[name] = entry._replace(dtype=dtype)
        del self.entries[f"{name}.scales"]

    def _add_packed(self, name: str, fields: dict[str, Any]) -> None:
        dtype, shape, kind, encoding, count = (fields[k] for k in ("dtype", "shape", "values", "encoding", "count"))
        if kind not in (dtype, "I8") or name in self._stored:
            raise ValueError(f"{name} is described by {str(fields)[:200]}: other types, or it is there as well")
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


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ALIGNMENT = 64  # bytes; JAX adopts host memory that is aligned so, and copies other memory
_WRAPPERS = ("module.", "_orig_mod.")
_LEGACY = re.compile(r"(LayerNorm\.|layer_norm\.)(gamma|beta)$")  # as TensorFlow called a norm's weight and bias


def as_theirs(array: Any, inputs: int | None) -> Any:
    """Our array, seen as the tensor of Hugging Face: PyTorch keeps [out, in], and heads x head size as one."""
    if not inputs:
        return array if inputs is None else array.reshape(math.prod(array.shape))
    return array.reshape(math.prod(array.shape[:inputs]), math.prod(array.shape[inputs:])).T


class Source(NamedTuple):
    """A tensor in an open file."""

    file: WeightFile | GGUFFile
    name: str

    @property
    def entry(self) -> Entry:
        """Its type, shape and place."""
        return self.file.entries[self.name]


class Parameter(NamedTuple):
    """One array to make."""

    path: ParamPath
    source: Source
    shape: tuple[int, ...]
    inputs: int | None  # how many axes of a kernel PyTorch keeps last, as one; 0: a bias with one; None: the same array


def stored_type(model: Model) -> str:
    """The type of the weights in the file that a model was loaded from; float32 if there are several."""
    if model.source is None:
        return "float32"
    with contextlib.ExitStack() as files:
        kinds = {source.entry.dtype for source in open_tensors(model.source, files).values()} & set(FLOATS)
    return str(FLOATS[kinds.pop()]) if len(kinds) == 1 else "float32"


def weights_file(folder: Path) -> Path | None:
    """The one file with all weights of a folder, compressed or not; None if there is none."""
    files = (folder / name for name in (WEIGHTS, WEIGHTS + COMPRESSED))
    return next((file for file in files if file.is_file()), None)


def open_tensors(folder: Path, files: contextlib.ExitStack) -> dict[str, Source]:
    """Every tensor of a folder by name, from one safetensors file or from those that an index names.

    Args:
        folder: The folder.
        files: Closes the files.

    Raises:
        FileNotFoundError: If there are no safetensors files, or some are missing.
        ValueError: If a file or the index is damaged, or they disagree.
    """
    there = [name for name in (WEIGHTS, WEIGHTS + COMPRESSED, INDEX) if (folder / name).is_file()]
    if len(there) > 1:
        warnings.warn(f"{folder} has {' and '.join(there)}: only {there[0]} is read.", stacklevel=2)
    if (weights := weights_file(folder)) is not None:
        file = files.enter_context(WeightFile(weights))
        return {name: Source(file, name) for name in file.entries}
    if not (folder / INDEX).is_file() and (folder / GGUF).is_file():
        file = files.enter_context(GGUFFile(folder / GGUF))
        return {name: Source(file, name) for name in file.entries}
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(_no_weights(folder))
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensor to file.")
    foreign = sorted(n for n in set(index.values()) if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", n))
    if foreign:
        raise ValueError(f"{folder / INDEX} names files that are not safetensors files of this folder: {foreign}.")
    absent = sorted(name for name in set(index.values()) if not (folder / name).is_file())
    if absent:
        raise FileNotFoundError(f"{folder / INDEX} names files that are not there: {absent}. Download them again.")
    shards = {name: files.enter_context(WeightFile(folder / name)) for name in sorted(set(index.values()))}
    found = {name: Source(shards[shard], name) for name, shard in index.items() if name in shards[shard].entries}
    elsewhere = [f"{t} in {name}" for name, shard in shards.items() for t in shard.entries if index.get(t) != name]
    missing = [f"{name} in {shard}" for name, shard in index.items() if name not in found]
    if any(name.partition(" in ")[0] in index for name in elsewhere):
        refuse(f"{folder / INDEX} and its files disagree", missing=missing, unknown=elsewhere)
    for names, what in ((missing, "names more than its files hold"), (elsewhere, "names less than its files hold")):
        if names:  # a tensor that the model needs is refused as missing
            warnings.warn(f"{folder / INDEX} {what}, tensors that are left out: {_some(names)}.", stacklevel=2)
    return found


def check_layers(model: Model, tensors: Mapping[str, Source], folder: Path) -> None:
    """Refuses a configuration with more layers than the tensors' names have numbers, before any layer is described.

    Raises:
        ValueError: If it has.
    """
    numbers = {step for name in tensors for step in name.split(".") if step.isdecimal()}
    if model.config.layers > len(numbers):
        raise ValueError(
            f"the weights in {folder} do not fit its {CONFIG}: it has {model.config.layers:,} layers, "
            f"and the names of the tensors number {len(numbers):,}."
        )


def _no_weights(folder: Path) -> str:
    if not (folder / "pytorch_model.bin").exists() and not (folder / "pytorch_model.bin.index.json").exists():
        return f"{folder} has neither {WEIGHTS} nor {INDEX}; pickled weights (.bin, .pt, .h5) are not read."
    return (
        f"{folder} has only pytorch_model.bin, a pickle: loading one can run any code, so jaxprune never does. "
        "If you trust it, convert it where PyTorch is installed (for a bare encoder: AutoModel, AutoTokenizer):\n"
        "  from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        f"  AutoModelForSequenceClassification.from_pretrained({str(folder)!r}).save_pretrained('converted')\n"
        f"  AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained('converted')"
    )


def unwrap(tensors: dict[str, Source], folder: Path) -> dict[str, Source]:
    """The tensors without what PyTorch puts before all their names when a model is compiled or on several devices."""
    wrapped = tensors
    for prefix in _WRAPPERS * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): source for name, source in tensors.items()}
    if tensors is not wrapped:
        first, plain = next(iter(wrapped)), next(iter(tensors))
        warnings.warn(f"the tensors of {folder} are read without {first.removesuffix(plain)!r}.", stacklevel=2)
    return tensors


def fit_tying(config: Any, tensors: Mapping[str, Source], *, hugging_face: bool) -> Any:
    """The configuration of a model; of one that answers in text, with an output layer if the tensors have one.

    An output layer that equals the table of embeddings is the table.
    """
    if not config.answers_in_text:
        return config
    module = family(config.model_type)
    if not hugging_face:  # what `save` writes says what it has: only folders of older versions may say less
        return module.with_tying(config, config.tied and "language.out.kernel" not in tensors)
    stored = {name.removeprefix(module.PREFIXES[config.model_type]): source for name, source in tensors.items()}
    output = stored.get(module.OUTPUT)
    table = next((stored[name] for name in module.TABLES if name in stored), output)
    return module.with_tying(config, output is None or table is None or _is_equal(table, output))


def _is_equal(one: Source, other: Source) -> bool:
    """True if two tensors hold the same values; their blocks are compared one by one."""
    if one == other or one.entry[:2] != other.entry[:2] or one.entry.dtype not in FLOATS:
        return one == other
    blocks = zip(one.file.slices(one.name), other.file.slices(other.name), strict=True)
    return all(np.array_equal(first, second) for (_, first), (_, second) in blocks)


def fit_hugging_face(model: Model, tensors: Mapping[str, Source], folder: Path) -> list[Parameter]:
    """Finds every parameter of a model among the tensors of a Hugging Face checkpoint.

    Raises:
        ValueError: Listing every tensor that is unknown, missing, there twice, or of a wrong shape or type.
    """
    module, config = family(model.config.model_type), model.config
    names, dense, ignored = module.checkpoint_names(config), _as_stored(model, tensors), module.ignored_names(config)
    stored: dict[str, str] = {}  # the name without prefix, in today's spelling -> the name in the file
    twice = []
    for name in tensors:
        plain = _LEGACY.sub(_today, name.removeprefix(module.PREFIXES[config.model_type]))
        if plain in stored:
            twice.append(f"{stored[plain]} and {name}")
        stored[plain] = name
    differing = []
    if config.answers_in_text:  # one table, which a file may hold under another of its names or under several
        tables = [name for name in (*module.TABLES, *[module.OUTPUT] * config.tied) if name in stored]
        differing = [
            f"{stored[tables[0]]} and {stored[name]}"
            for name in tables[1:]
            if not _is_equal(tensors[stored[tables[0]]], tensors[stored[name]])
        ]
        stored |= {module.TABLES[0]: stored[tables[0]]} if tables else {}
    wanted = {plain for plain, _ in names.values()}
    parts = {plain.partition(".")[0] for plain in wanted}  # of the model: what else they hold would change its result
    unknown = {
        name: plain.partition(".")[0] in parts and tensors[name].entry.dtype in FLOATS  # others are buffers
        for plain, name in stored.items()
        if plain not in wanted and not any(fnmatch.fnmatchcase(plain, pattern) for pattern in ignored)
    }
    inputs = {
        path: {"copy": None, "split_bias": 0}.get(kind, input_axes(axes_of(model.axes, path)))
        for path, (_, kind) in names.items()
    }
    shapes = {path: jax.eval_shape(partial(as_theirs, inputs=inputs[path]), dense[path]).shape for path in names}
    entries = {path: tensors[stored[plain]].entry for path, (plain, _) in names.items() if plain in stored}
    refuse(
        f"the weights in {folder} do not fit its {CONFIG}",
        unknown=[name for name, needed in unknown.items() if needed],
        missing=[plain for plain, _ in names.values() if plain not in stored],
        twice=twice,
        names_of_one_table_that_differ=differing,
        wrong_shape=[
            f"{stored[names[path][0]]} is {list(entry.shape)}, expected {list(shapes[path])}"
            for path, entry in entries.items()
            if entry.shape != shapes[path]
        ],
        wrong_type=_wrong_types({stored[names[path][0]]: entry for path, entry in entries.items()}),
    )
    if unknown:
        listed = _some([*unknown])
        warnings.warn(f"{len(unknown)} tensors of {folder} are no part of the model: {listed}.", stacklevel=2)
    return [
        Parameter(path, tensors[stored[plain]], dense[path].shape, inputs[path]) for path, (plain, _) in names.items()
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _today(match: re.Match[str]) -> str:
    return match[1] + {"gamma": "weight", "beta": "bias"}[match[2]]


def fit_own(model: Model, tensors: Mapping[str, Source], folder: Path) -> list[Parameter]:
    """Finds every parameter of a model among the tensors of a folder that `save` wrote.

    Raises:
        ValueError: Listing every tensor that is unknown, missing, or of a wrong shape or type.
    """
    refuse(
        f"the weights in {folder} do not fit its {CONFIG}",
        **misfits(model, {name: source.entry.shape for name, source in tensors.items()}),
        wrong_type=_wrong_types({name: source.entry for name, source in tensors.items()}),
    )
    return [
        Parameter(path, source, source.entry.shape, None)
        for path, source in ((path, tensors[path_name(path)]) for path in _dense(model))
    ]


def misfits(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """The problems of parameters of these names and shapes; units may be fewer than in the configuration."""
    expected = {path_name(path): (path, array.shape) for path, array in _dense(model).items()}
    problems: list[str] = []
    units: dict[tuple[str, str], dict[str, int]] = {}
    for name in (name for name in expected if name in shapes):
        (path, full), shape = expected[name], shapes[name]
        axes = axes_of(model.axes, path)
        if len(shape) != len(full) or any(
            size > most or (size < most and axis not in UNIT_AXES)
            for axis, size, most in zip(axes, shape, full, strict=True)
        ):
            problems.append(f"{name} is {list(shape)}, expected {list(full)} or fewer heads or neurons or channels")
            continue
        for axis, size in zip(axes, shape, strict=True):
            if axis in UNIT_AXES:
                units.setdefault((path_name(path[:-2]), axis), {})[name] = size
    for (module, axis), sizes in units.items():
        if len(set(sizes.values())) > 1:
            problems.append(f"{module} has a different number of {axis} in its arrays: {sizes}")
    return {
        "unknown": [name for name in shapes if name not in expected],
        "missing": [name for name in expected if name not in shapes],
        "wrong_shape": problems,
    }


@lru_cache(maxsize=8)
def _dense(model: Model) -> Mapping[ParamPath, jax.ShapeDtypeStruct]:
    return flatten(jax.eval_shape(model.initialise, jax.random.key(0)))


def _as_stored(model: Model, tensors: Mapping[str, Source]) -> Mapping[ParamPath, jax.ShapeDtypeStruct]:
    """The dense parameters, but each layer with as many units as its file says, if it does."""
    dense, units = unflatten(_dense(model)), {}
    for source in tensors.values():
        units |= source.file.units
    widths = {site: units[site.kind][site.layer] for site in lengths(model.axes, dense) if site.kind in units}
    shapes = shapes_at(model.axes, dense, widths)
    return {path: jax.ShapeDtypeStruct(shapes[path], array.dtype) for path, array in _dense(model).items()}


def _wrong_types(entries: Mapping[str, Entry]) -> list[str]:
    allowed = ", ".join(FLOATS)
    return [f"{name} is {e.dtype}, expected {allowed}" for name, e in entries.items() if e.dtype not in FLOATS]


def refuse(message: str, **problems: list[str]) -> None:
    """Raises one error that lists everything, if there is anything."""
    listed = [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(f"{message}; {'; '.join(listed)}.")


def convert(parameters: list[Parameter], dtype: np.dtype | None, folder: Path, *, sparse: bool = False) -> Params:
    """Reads the parameters onto the device in the order of the files; those that take less memory so are `sparse`.

    Raises:
        ValueError: If there are none of these, or as `read_arrays`.
    """
    ordered = sorted(parameters, key=lambda parameter: (parameter.source.file.path, parameter.source.entry.start))
    make = sparse_if_smaller if sparse else jax.device_put
    flat = {path: make(array) for path, array in read_arrays(ordered, dtype, folder)}
    if sparse and not any(hasattr(array, "todense") for array in flat.values()):
        raise ValueError(
            f"nothing in {folder} has so many zeros that it takes less memory: load it without sparse=True."
        )
    return unflatten({path: flat[path] for path, *_ in parameters})


def read_arrays(
    parameters: Iterable[Parameter], dtype: np.dtype | None, folder: Path
) -> Iterator[tuple[ParamPath, np.ndarray]]:
    """Reads the parameters in this order, slice by slice, into arrays that share no memory with the files.

    Raises:
        ValueError: In the end, naming every tensor with a value that is NaN, infinite or too large for `dtype` (None is
            each tensor's own).
    """
    problems: dict[str, list[str]] = {"NaN_or_infinite": [], f"too_large_for_{dtype}": []}
    not_finite, too_large = problems.values()
    for path, source, shape, inputs in parameters:
        kind = FLOATS[source.entry.dtype] if dtype is None else dtype
        array = _aligned(shape, kind)
        view = as_theirs(array, inputs)
        finite = fits = True
        for rows, block in source.file.slices(source.name):
            with np.errstate(over="ignore"):  # found two lines below
                converted = block.astype(kind, copy=False)
            if not np.isfinite(converted).all():
                fits, finite = False, finite and bool(np.isfinite(block).all())
            view[rows] = converted
        if not fits:
            (too_large if finite else not_finite).append(source.name)
        yield path, array
    refuse(f"the weights in {folder} cannot be used", **problems)


def read_later(parameters: Iterable[Parameter], dtype: np.dtype | None, folder: Path) -> Params:
    """The parameters as arrays that are read when they are used, and not kept; in the order of `parameters`."""

    def reader(parameter: Parameter) -> Lazy:
        kind = FLOATS[parameter.source.entry.dtype] if dtype is None else dtype
        return Lazy(kind, parameter.shape, lambda: dict(read_arrays([parameter], kind, folder))[parameter.path])

    return unflatten({parameter.path: reader(parameter) for parameter in parameters})


def shapes_of(parameters: list[Parameter]) -> Params:
    """The shapes of parameters that were not read yet, in the place of the arrays."""
    return unflatten({each.path: jax.ShapeDtypeStruct(each.shape, np.float32) for each in parameters})


def read_compacted(
    model: Model,
    parameters: list[Parameter],
    gates: Mapping[str, np.ndarray],
    means: Mapping[str, np.ndarray],
    dtype: np.dtype | None,
    folder: Path,
) -> Params:
    """Reads the parameters without the units whose gate is 0, bit by bit as `compact` makes them of the dense ones.

    One array, or one module where means are folded in, is read, cut and put on the device before the next one is read:
    besides the result at most one dense module is in memory.

    Args:
        model: The architecture.
        parameters: What to read, in the order of `flatten`.
        gates: Site name to gates, float32 `[units]`, which fit the parameters.
        means: Site name to what its closed units are replaced by; a missing one is zero.
        dtype: The type of the arrays; None is each tensor's own.
        folder: For the error.

    Raises:
        ValueError: As `read_arrays`, even where a bad value is cut away.
    """
    gated: dict[ParamPath, list[Site]] = {}
    for site in sites(model.axes, shapes_of(parameters), KINDS):
        if site.name in gates:
            gated.setdefault(site.module, []).append(site)

    def module(path: ParamPath) -> ParamPath:
        """The gated module that a parameter belongs to; none is at the root."""
        return next((path[:size] for size in range(len(path)) if path[:size] in gated), ())

    def together(path: ParamPath) -> ParamPath:
        """A key shared by arrays that must be cut together: means go through a kernel into a bias."""
        place = module(path)
        return place if any(site.name in means for site in gated.get(place, ())) else path

    def cut(arrays: dict[ParamPath, np.ndarray]) -> dict[ParamPath, np.ndarray]:
        place = module(next(iter(arrays)))
        local = {path[len(place) :]: array for path, array in arrays.items()}
        for site in gated.get(place, ()):  # each cuts other arrays: there is one kind of unit per tensor
            arrays |= compact_site(model.axes, local, site, gates[site.name], means.get(site.name))
        return arrays

    flat: dict[ParamPath, jax.Array] = {}
    for _, read in groupby(read_arrays(parameters, dtype, folder), lambda item: together(item[0])):
        for path, array in cut(dict(read)).items():  # no name here keeps a dense array alive
            flat[path] = jax.device_put(array)
    return unflatten(flat)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that `jax.device_put` takes over on a CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return memory[offset : offset + size].view(dtype).reshape(shape)

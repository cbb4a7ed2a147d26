"""Fits the tensors of a checkpoint to the parameters of a model, exactly, and converts them in bounded memory."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.checkpoints.files import read_json
from jaxprune.checkpoints.int8 import Lazy, WeightFile, sparse_if_smaller
from jaxprune.checkpoints.tensors import COMPRESSED, FLOATS, Entry
from jaxprune.compaction import compact_site
from jaxprune.models import Model, family
from jaxprune.units import KINDS, Params, Site, axes_of, flatten, input_axes, path_name, sites, unflatten
from jaxprune.units import Path as ParamPath

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ALIGNMENT = 64  # bytes; JAX adopts host memory that is aligned so, and copies other memory
_LEGACY = re.compile(r"(LayerNorm\.|layer_norm\.)(gamma|beta)$")  # as TensorFlow called a norm's weight and bias


def _as_theirs(array: Any, inputs: int | None) -> Any:
    """Our array, seen as the tensor of Hugging Face: PyTorch keeps [out, in], and heads x head size as one."""
    if not inputs:
        return array if inputs is None else array.reshape(math.prod(array.shape))
    return array.reshape(math.prod(array.shape[:inputs]), math.prod(array.shape[inputs:])).T


class Source(NamedTuple):
    """A tensor in an open file."""

    file: WeightFile
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
    if (weights := weights_file(folder)) is not None:
        file = files.enter_context(WeightFile(weights))
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
    refuse(
        f"{folder / INDEX} and its files disagree",
        missing=[f"{name} in {shard}" for name, shard in index.items() if name not in shards[shard].entries],
        unknown=[f"{t} in {name}" for name, shard in shards.items() for t in shard.entries if index.get(t) != name],
    )
    return {name: Source(shards[shard], name) for name, shard in index.items()}


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


def fit_hugging_face(model: Model, tensors: Mapping[str, Source], folder: Path) -> list[Parameter]:
    """Finds every parameter of a model among the tensors of a Hugging Face checkpoint.

    Raises:
        ValueError: Listing every tensor that is unknown, missing, there twice, or of a wrong shape or type.
    """
    module, config = family(model.config.model_type), model.config
    names, dense, ignored = module.checkpoint_names(config), _dense(model), module.ignored_names(config)
    stored: dict[str, str] = {}  # the name without prefix, in today's spelling -> the name in the file
    twice = []
    for name in tensors:
        plain = _LEGACY.sub(_today, name.removeprefix(module.PREFIXES[config.model_type]))
        if plain in stored:
            twice.append(f"{stored[plain]} and {name}")
        stored[plain] = name
    wanted = {plain for plain, _ in names.values()}
    inputs = {
        path: {"copy": None, "split_bias": 0}.get(kind, input_axes(axes_of(model.axes, path)))
        for path, (_, kind) in names.items()
    }
    shapes = {path: jax.eval_shape(partial(_as_theirs, inputs=inputs[path]), dense[path]).shape for path in names}
    entries = {path: tensors[stored[plain]].entry for path, (plain, _) in names.items() if plain in stored}
    refuse(
        f"the weights in {folder} do not fit its {CONFIG}",
        unknown=[
            name
            for plain, name in stored.items()
            if plain not in wanted and not any(fnmatch.fnmatchcase(plain, pattern) for pattern in ignored)
        ],
        missing=[plain for plain, _ in names.values() if plain not in stored],
        twice=twice,
        wrong_shape=[
            f"{stored[names[path][0]]} is {list(entry.shape)}, expected {list(shapes[path])}"
            for path, entry in entries.items()
            if entry.shape != shapes[path]
        ],
        wrong_type=_wrong_types({stored[names[path][0]]: entry for path, entry in entries.items()}),
    )
    return [
        Parameter(path, tensors[stored[plain]], dense[path].shape, inputs[path]) for path, (plain, _) in names.items()
    ]


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
            size > most or (size < most and axis not in KINDS)
            for axis, size, most in zip(axes, shape, full, strict=True)
        ):
            problems.append(f"{name} is {list(shape)}, expected {list(full)} or fewer heads or neurons or channels")
            continue
        for axis, size in zip(axes, shape, strict=True):
            if axis in KINDS:
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


def _wrong_types(entries: Mapping[str, Entry]) -> list[str]:
    allowed = ", ".join(FLOATS)
    return [f"{name} is {e.dtype}, expected {allowed}" for name, e in entries.items() if e.dtype not in FLOATS]


def refuse(message: str, **problems: list[str]) -> None:
    """Raises one error that lists everything, if there is anything."""
    listed = [f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(f"{message}; {'; '.join(listed)}.")


def convert(parameters: list[Parameter], dtype: np.dtype | None, folder: Path) -> Params:
    """Reads the parameters onto the device, as `read_arrays` does, in the order of the files."""
    flat = {path: jax.device_put(array) for path, array in read_arrays(in_file_order(parameters), dtype, folder)}
    return unflatten({path: flat[path] for path, *_ in parameters})


def in_file_order(parameters: Iterable[Parameter]) -> list[Parameter]:
    """The parameters in the order of their files."""
    return sorted(parameters, key=lambda parameter: (parameter.source.file.path, parameter.source.entry.start))


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
        view = _as_theirs(array, inputs)
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


def read_sparse(parameters: list[Parameter], dtype: np.dtype | None, folder: Path) -> Params:
    """Reads the parameters as `convert` does; those that take less memory so are sparse (`BCOO`).

    Raises:
        ValueError: If there are none, or a value is NaN, infinite or too large for `dtype`; it names every tensor.
    """
    ordered = read_arrays(in_file_order(parameters), dtype, folder)
    flat = {path: sparse_if_smaller(array) for path, array in ordered}
    if not any(hasattr(array, "todense") for array in flat.values()):
        raise ValueError(
            f"nothing in {folder} has so many zeros that it takes less memory: load it without sparse=True."
        )
    return unflatten({path: flat[path] for path, *_ in parameters})


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

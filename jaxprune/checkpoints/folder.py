"""Reads models from Hugging Face's files and its own, and writes its own.

A model is a folder. Our own holds `config.json` (the Hugging Face configuration plus a `jaxprune` section with the task
heads), `model.safetensors` (one tensor per parameter, named by its path; the shapes are the widths), the tokenizer's
files and, for a pruned model, `pruning.json`. Zeros can be left out of the weights: see
`jaxprune.checkpoints.sparse_file`. A shared folder also holds `gates.safetensors`, the gates of many tasks: see
`jaxprune.checkpoints.shared`. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxprune.checkpoints.files import (
    check_writable,
    folder_for,
    interrupted,
    is_leftover,
    read_json,
    recall,
    remember,
    stamp_of,
)
from jaxprune.checkpoints.gate_file import GATES, GateFile, unpack
from jaxprune.checkpoints.gate_file import read as read_gates
from jaxprune.checkpoints.slicing import read_compacted, shapes_of
from jaxprune.checkpoints.sparse_file import METADATA, descriptions_text, linear_maps, pack_tensors, rounded
from jaxprune.checkpoints.tensors import BYTES, FLOATS, blocks, write_tensors
from jaxprune.checkpoints.weights import (
    CONFIG,
    WEIGHTS,
    Parameter,
    check_layers,
    convert,
    fit_hugging_face,
    fit_own,
    misfits,
    open_tensors,
    read_arrays,
    read_sparse,
    refuse,
)
from jaxprune.models import Model, TaskHead, family
from jaxprune.units import Params, flatten, path_name, unflatten, widths
from jaxprune.units import Path as ParamPath

PRUNING = "pruning.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
_DOWNLOADED = ("*.json", "model*.safetensors", GATES, *TOKENIZER_FILES)  # from the hub: never a pickle
_FORMAT = 1  # of our own folder


class Outline(NamedTuple):
    """A model whose parameters were read, and none of them kept."""

    model: Model
    shapes: Params  # `jax.ShapeDtypeStruct` in the place of the arrays
    digest: str  # its `model_digest`


class Opened(NamedTuple):
    """A model whose files are open and whose parameters are not read yet."""

    model: Model
    folder: Path
    parameters: list[Parameter]


def load(
    path_or_hub_id: str | Path,
    *,
    task: str | None = None,
    dtype: DTypeLike | None = jnp.float32,
    revision: str | None = None,
    sparse: bool = False,
) -> tuple[Model, Params]:
    """Reads a model and its parameters.

    A Hugging Face checkpoint (one safetensors file or several, with or without the base model's prefix) or a folder
    that `save` wrote. Every parameter is written once and every tensor is used or known to be no part of the model.
    The files are mapped and converted in slices: at most 1.3 times the parameters' bytes are allocated.

    With `task` the parameters are those of one task of a shared folder, bit by bit what `compact` makes of the dense
    ones: `load(path, task=task)[1]` equals `compact(*load(path), gates, means)`. Units are cut away as the weights are
    read: at most 1.3 times the bytes of the result are allocated, and those of one dense module.

    Args:
        path_or_hub_id: A folder, or the name of a repository on the Hugging Face hub. As text, `"FOLDER#TASK"` names a
            task as well, unless there is a folder of this name.
        task: A task of a shared folder (`save_shared`); None is the dense model.
        dtype: Type of the parameters: float32, bfloat16, float16, or None for the type of each tensor in the file.
            The default does not depend on the file, so half-precision files compute in full precision.
        revision: Branch, tag or commit on the hub.
        sparse: Whether what `save` packed stays sparse: arrays of the same shapes of `jax.experimental.sparse.BCOO`,
            for which memory is taken by kept weight. `densify` makes them dense again, also inside a jit.

    Returns:
        The model and its parameters.

    Raises:
        FileNotFoundError: If there is no such folder or repository, the folder has no weights that can be read, or
            it is asked for a task and is not a shared folder.
        ValueError: If the files are damaged, the configuration is not supported, or the two do not fit each other; the
            error lists everything that is unknown, missing, or has a wrong shape, type or value. If there is no such
            task, or the gates belong to other weights.
    """
    target = None if dtype is None else np.dtype(dtype)
    if target is not None and target not in FLOATS.values():
        raise ValueError(f"dtype must be float32, bfloat16, float16 or None, got {target}.")
    if task is None:
        path_or_hub_id, task = split_task(path_or_hub_id)
    with opened(path_or_hub_id, revision) as found:
        model, folder, parameters = found
        if task is None:
            return model, (read_sparse if sparse else convert)(parameters, target, folder)
        if sparse:
            raise ValueError(f"sparse=True is for the whole model, not for task {task!r}: leave one of them out.")
        file = read_gates(folder / GATES)
        packed = file.task(task, folder / GATES)
        try:
            gates, means = unpack(model, shapes_of(parameters), packed)
        except ValueError as error:
            raise ValueError(f"the gates of {task!r} in {folder / GATES} do not fit the weights: {error}.") from error
        check_belongs(file, found)
        return model, read_compacted(model, parameters, gates, means or {}, target, folder)


def outline(path_or_hub_id: str | Path, *, revision: str | None = None, memory: Path | None = None) -> Outline:
    """Reads a model as `load` does, and keeps its shapes and its digest.

    It is for what needs no values. One array after the other is in memory, or none where the digest is remembered.

    Args:
        path_or_hub_id: As for `load`; a task of a shared folder is loaded.
        revision: Branch, tag or commit on the hub.
        memory: Folder where digests are remembered by their files' stamps; None: all weights are read.

    Raises:
        FileNotFoundError: As `load`.
        ValueError: As `load`.
    """
    name, task = split_task(path_or_hub_id)
    if task is not None:
        model, params = load(name, task=task, revision=revision)
        shapes = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in flatten(params).items()}
        return Outline(model, unflatten(shapes), model_digest(model, params))
    with opened(name, revision) as found:
        files, shapes = _files(found), shapes_of(found.parameters)
        stamp = None if memory is None else stamp_of(files)
        digest = None if memory is None else recall(memory, stamp)
        if digest is None:
            own = {parameter.path: parameter for parameter in found.parameters}
            arrays = read_arrays((own[path] for path in flatten(shapes)), FLOATS["F32"], found.folder)
            weights = _digest((path, array.dtype, array.shape, blocks(array)) for path, array in arrays)
            digest = _model_digest(found.model, weights)
            if memory is not None:
                remember(memory, stamp, files, digest)
        return Outline(found.model, shapes, digest)


def digest_keeper(path_or_hub_id: str | Path, memory: Path) -> Callable[[str], None]:
    """Made before a model is loaded, takes its `model_digest` afterwards: the next `outline` need not compute it."""
    name, task = split_task(path_or_hub_id)
    if task is not None:
        return lambda digest: None
    with opened(name) as found:
        files = _files(found)
    stamp = stamp_of(files)
    return lambda digest: remember(memory, stamp, files, digest)


def _files(found: Opened) -> set[Path]:
    return {found.folder / CONFIG, *(own.source.file.path for own in found.parameters)}


def split_task(name: str | Path) -> tuple[str | Path, str | None]:
    """Splits `FOLDER#TASK`; None where no task is named. A folder that really has such a name is no task's."""
    folder, mark, task = name.rpartition("#") if isinstance(name, str) else ("", "", "")
    return (name, None) if not mark or Path(name).expanduser().is_dir() else (folder, task)


@contextlib.contextmanager
def opened(path_or_hub_id: str | Path, revision: str | None = None) -> Iterator[Opened]:
    """The model of a folder or repository and where its parameters are, while the files are open; see `load`."""
    folder = _find(path_or_hub_id, revision)
    raw = read_json(folder / CONFIG)
    section = raw.pop("jaxprune", None)
    try:
        module = family(raw.get("model_type") if isinstance(raw.get("model_type"), str) else None)
        config = module.parse_config(raw, None if section is None else _task_heads(section))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    model = Model(config, folder.absolute())
    with contextlib.ExitStack() as files:
        tensors = open_tensors(folder, files)
        check_layers(model, tensors, folder)
        fit = fit_hugging_face if section is None else fit_own
        yield Opened(model, folder, fit(model, tensors, folder))


def save(
    path: str | Path,
    model: Model,
    params: Params,
    *,
    pruning: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dtype: DTypeLike | None = None,
    extra: Mapping[str, bytes] | None = None,
    packed: Literal["exact", "int8"] | None = None,
) -> Path:
    """Writes a model folder. A crash leaves the folder that was there, or the new one.

    `load(path, dtype=None)` gives back the same bits, packed or not; `packed="int8"` rounds the layers' kernels.

    Args:
        path: The folder.
        model: The model; the tokenizer's files are copied from where it was loaded.
        params: Its parameters, of any widths.
        pruning: What was removed and why, for `pruning.json`; the digest and the widths of the result are added.
        overwrite: Whether a folder that `save` wrote may be replaced. No other folder ever is.
        dtype: Type in the file: float32, bfloat16, float16, or None for each array's own.
        extra: Other files of the folder, such as a model card.
        packed: Leaves the zeros of sparse weights out of the file. "exact" keeps every bit of what is not zero; "int8"
            also rounds the kernels of the layers, sparse or not, to one byte per weight and one scale per output: the
            error is at most 1/253 of the output's largest weight. Tensors that would not become smaller stay as they
            are.

    Returns:
        The path.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        TypeError: If the parameters are sparse: `densify` them first.
        ValueError: If the parameters are not this model's, or are not finite in the type in which they are saved.
    """
    path = Path(path)
    if packed not in (None, "exact", "int8"):
        raise ValueError(f"packed must be 'exact', 'int8' or None, got {packed!r}.")
    target = None if dtype is None else np.dtype(dtype)
    if target is not None and target not in FLOATS.values():
        raise ValueError(f"dtype must be float32, bfloat16, float16 or None, got {target}.")
    check_destination(interrupted(path) or path, overwrite)
    sparse = [path_name(steps) for steps, array in flatten(params).items() if hasattr(array, "todense")]
    if sparse:
        raise TypeError(f"sparse parameters cannot be saved: {', '.join(sparse)}. Make them dense with jp.densify.")
    named = {path_name(steps): array for steps, array in flatten(params).items()}
    refuse("parameters do not fit the model", **misfits(model, {name: tuple(a.shape) for name, a in named.items()}))
    columns = linear_maps(model.axes, params) if packed == "int8" else {}
    files = dict(extra or {}) | _tokenizer_files(model)
    if pruning is not None:
        result = {"digest": model_digest(model, rounded(params, columns)), "widths": widths(model.axes, params)}
        files[PRUNING] = _json_bytes({**pruning, "pruned": result})
    for name in files:
        if name in (CONFIG, WEIGHTS, "", "..") or Path(name).name != name:
            raise ValueError(f"extra file {name!r}: not a file name, or one that is written anyway.")
    stored = {str(np.dtype(target or array.dtype)) for array in named.values()}
    section = {
        "format": _FORMAT,
        "dtype": stored.pop() if len(stored) == 1 else "mixed",
        "heads": [asdict(model.head(name)) for name in model.heads],
        "files": sorted({CONFIG, WEIGHTS, *files}),
    }
    files[CONFIG] = _json_bytes({**json.loads(model.config.raw), "jaxprune": section})
    metadata = {"format": "jaxprune", "version": str(_FORMAT)}
    if packed is not None:
        named, described = pack_tensors(named, dtype=target, columns=columns)
        metadata[METADATA], target = descriptions_text(described), None
    with folder_for(path, overwrite=overwrite) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with open(folder / WEIGHTS, "wb") as file:
            write_tensors(file, named, metadata, dtype=target, kinds=FLOATS if packed is None else FLOATS | BYTES)
    return path


def as_loaded(
    model: Model,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    packed: Literal["exact", "int8"] | None = None,
) -> Params:
    """The parameters that `load` gives, in float32, for those that `save` writes with these arguments.

    They are `params` themselves where nothing is rounded.
    """
    columns = linear_maps(model.axes, params) if packed == "int8" else {}
    kinds = {np.dtype(dtype or array.dtype) for array in flatten(params).values()}
    if not columns and kinds == {np.dtype(np.float32)}:
        return params
    with np.errstate(over="ignore"):  # `save` refuses what is too large
        flat = flatten(rounded(params, columns, None if dtype is None else np.dtype(dtype)))
        return unflatten({path: jnp.asarray(np.asarray(array), jnp.float32) for path, array in flat.items()})


def digest(params: Params) -> str:
    """The SHA-256 of names, shapes, types and values: equal for equal parameters, on whatever device they are."""
    return _digest((path, array.dtype, array.shape, blocks(array)) for path, array in flatten(params).items())


def _digest(arrays: Iterable[tuple[ParamPath, np.dtype, tuple[int, ...], Iterable[np.ndarray]]]) -> str:
    """The digest of arrays that come in blocks, which are taken as `dtype`."""
    found = hashlib.sha256()
    for path, dtype, shape, parts in arrays:
        found.update(json.dumps([path_name(path), str(dtype), list(shape)]).encode())
        for part in parts:
            found.update(part.astype(dtype, copy=False).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def model_digest(model: Model, params: Params) -> str:
    """The SHA-256 of the configuration, the task heads and the parameters."""
    return _model_digest(model, digest(params))


def _model_digest(model: Model, weights: str) -> str:
    heads = [asdict(model.head(name)) for name in model.heads]
    known = [json.loads(model.config.raw), heads, weights]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def saved_digest(model: Model, params: Params, dtype: DTypeLike | None = None) -> str:
    """The `model_digest` of what `load` will give for parameters that `save` writes with this `dtype`."""

    def parts(array: Any) -> Iterator[np.ndarray]:
        with np.errstate(over="ignore"):  # `save` refuses what is too large
            yield from (block.astype(dtype or array.dtype) for block in blocks(array))

    kind = np.dtype(np.float32)
    flat = flatten(params).items()
    return _model_digest(model, _digest((path, kind, array.shape, parts(array)) for path, array in flat))


def opened_digest(found: Opened, dtype: np.dtype | None = FLOATS["F32"]) -> str:
    """The `model_digest` of what `load` gives for a folder that `save` wrote, a slice of it in memory at a time.

    Args:
        found: The model and its open files.
        dtype: The type of the parameters; None is each tensor's own.
    """
    weights = _digest(
        (
            own.path,
            dtype or FLOATS[own.source.entry.dtype],
            own.shape,
            (block for _, block in own.source.file.slices(own.source.name)),
        )
        for own in found.parameters
    )
    return _model_digest(found.model, weights)


def check_belongs(file: GateFile, found: Opened) -> None:
    """Refuses gates of another model than the one in the folder; reads all weights once.

    Raises:
        ValueError: If they are.
    """
    if any(own.layout != "copy" for own in found.parameters):
        raise ValueError(f"{found.folder} has gates, but not the weights of a folder that jaxprune saved.")
    if file.model != (own := opened_digest(found)):
        raise ValueError(
            f"{found.folder / GATES} belongs to another model: its gates were made for {file.model[:12]}, the weights "
            f"beside it are {own[:12]}. Share the tasks of these weights again."
        )


def read_pruning(path: str | Path) -> dict[str, Any]:
    """What `save` recorded about how a model was pruned.

    Raises:
        FileNotFoundError: If the folder has no such record.
        ValueError: If it cannot be read.
    """
    file = Path(path) / PRUNING
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: the model was not pruned, or not saved by jaxprune.")
    return read_json(file)


def _find(path_or_hub_id: str | Path, revision: str | None) -> Path:
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a local folder: revision={revision!r} is for models on the hub.")
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file: give the folder that holds {CONFIG}.")
    old = interrupted(folder)
    if old is not None:
        raise FileNotFoundError(f"no folder {folder}: saving it was interrupted. Its old content is {old}: rename it.")
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no folder {folder}.")
    from huggingface_hub import errors, snapshot_download

    offline = OSError, ValueError, errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] of a proxy, say

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOADED), ignore_patterns="*/*"))
    except offline as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"no folder {name}, and the hub does not give it either: {reason}") from error


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return np.asarray(value).tolist()
        raise TypeError(f"{type(value).__name__} cannot be written to JSON: {value!r}.")

    return (json.dumps(content, indent=2, default=plain) + "\n").encode()


def _task_heads(section: Any) -> tuple[TaskHead, ...]:
    if not isinstance(section, dict) or section.get("format") != _FORMAT:
        found = section.get("format") if isinstance(section, dict) else section
        raise ValueError(f"the jaxprune section has format {found!r}, this version reads {_FORMAT}: update jaxprune.")
    unknown = sorted(set(section) - {"format", "dtype", "heads", "files"})
    if unknown or not isinstance(section.get("heads"), list):
        raise ValueError(f"the jaxprune section has no list of heads, or unknown entries {unknown}.")
    return tuple(map(_task_head, section["heads"]))


def _task_head(fields: Any) -> TaskHead:
    kinds = {"name": str, "labels": list, "regression": bool, "pooling": str, "dense": str | None}
    fits = isinstance(fields, dict) and fields.keys() == kinds.keys()
    if not fits or not all(isinstance(fields[name], kind) for name, kind in kinds.items()):
        raise ValueError(f"task head {fields!r} must have exactly the fields {', '.join(kinds)}.")
    if not all(isinstance(label, str) for label in fields["labels"]):
        raise ValueError(f"task head {fields['name']!r} has labels that are not text: {fields['labels']!r}.")
    return TaskHead(**{**fields, "labels": tuple(fields["labels"])})


def check_destination(path: Path, overwrite: bool) -> None:
    """Refuses a folder that cannot be written, and to replace anything but a folder with only what `save` wrote."""
    check_writable(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file: choose another name.")
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or replace it with --overwrite.")
    section = read_json(path / CONFIG).get("jaxprune") if (path / CONFIG).is_file() else None
    if not isinstance(section, dict) or not (path / WEIGHTS).is_file():
        raise FileExistsError(f"{path} is not a folder that jaxprune saved: it is not replaced, choose another name.")
    known = section.get("files", [])
    foreign = sorted(own.name for own in path.iterdir() if own.name not in known and not is_leftover(own.name, known))
    if foreign:
        raise FileExistsError(f"{path} also holds files that were not saved with the model: {foreign}: move them away.")


def _tokenizer_files(model: Model) -> dict[str, bytes]:
    if model.source is None:
        return {}
    if not model.source.is_dir():
        raise FileNotFoundError(f"{model.source}, from which the model was loaded, is gone, and the tokenizer with it.")
    found = (model.source / name for name in TOKENIZER_FILES)
    return {file.name: file.read_bytes() for file in found if file.is_file()}

"""Reads models from Hugging Face's files and its own, and writes its own.

A model is a folder. Our own holds `config.json` (the Hugging Face configuration plus a `jaxprune` section with the task
heads), `model.safetensors` (one tensor per parameter, named by its path; the shapes are the widths), the tokenizer's
files and, for a pruned model, `pruning.json`. The weights can be compressed, and rounded to int8: see
`jaxprune.checkpoints.weights`. A shared folder also holds `gates.safetensors`, the gates of many tasks: see
`jaxprune.checkpoints.shared`. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxprune.checkpoints.files import (
    check_replaceable,
    check_writable,
    folder_for,
    interrupted,
    is_leftover,
    misfits_of,
    read_json,
    recall,
    remember,
    stamp_of,
)
from jaxprune.checkpoints.gates import GATES, PRUNING, GateFile, check_record, read_gates, unpack_gates
from jaxprune.checkpoints.gguf import unpacked
from jaxprune.checkpoints.tensors import COMPRESSED, FLOATS, Compressor, blocks, model_digest, write_tensors
from jaxprune.checkpoints.weights import (
    CONFIG,
    INT8,
    WEIGHTS,
    Parameter,
    check_layers,
    convert,
    fit_hugging_face,
    fit_own,
    fit_tying,
    int8_tensors,
    linear_maps,
    misfits,
    open_tensors,
    read_compacted,
    read_later,
    refuse,
    reread,
    shapes_of,
    unwrap,
    weights_file,
)
from jaxprune.models import Model, TaskHead, family
from jaxprune.models.tokenizers import (
    OTHER_FILES,
    TOKENIZER_FILES,
    files_of_kind,
    run_tokenizer,
    tokenizer_files,
    versions_of,
)
from jaxprune.units import Params, flatten, path_name, unflatten, widths

_DOWNLOADED = (
    "*.json",
    "model*.safetensors",
    WEIGHTS + COMPRESSED,
    GATES,
    *TOKENIZER_FILES,
)  # from the hub: never a pickle
_FORMAT = 1  # of our own folder
_TRIED = "Two films, 1 café: great!"  # what a tokenizer and its copy must read alike
_OWN_TYPE = "jaxprune"  # the model type in our own `config.json`: nobody else takes the folder for one of theirs
_HEAD = {"name": str, "labels": [str], "regression": bool, "pooling": str, "dense": (str, None)}
_SECTION = {"format": range(_FORMAT, _FORMAT + 1), "heads": [_HEAD], "dtype?": str, "files?": [str], "model_type?": str}


class Outline(NamedTuple):
    """A model whose parameters were read, and none of them kept."""

    model: Model
    shapes: Params  # `jax.ShapeDtypeStruct` in the place of the arrays
    digest: str  # its `model_digest`


class Opened(NamedTuple):
    """A model whose files are open and whose parameters are not read yet."""

    model: Model
    folder: Path  # or GGUF file
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
        path_or_hub_id: A folder, a GGUF file, or the name of a repository on the Hugging Face hub. As text,
            `"FOLDER#TASK"` names a task as well, unless there is a folder of this name.
        task: A task of a shared folder (`save_shared`); None is the dense model.
        dtype: Type of the parameters: float32, bfloat16, float16, or None for the type of each tensor in the file.
            The default does not depend on the file, so half-precision files compute in full precision.
        revision: Branch, tag or commit on the hub.
        sparse: Whether arrays with so many zeros that it takes less memory are sparse, `jax.experimental.sparse.BCOO`
            of the same shapes. `jp.densify` makes them dense again, also inside a jit.

    Returns:
        The model and its parameters.

    Raises:
        FileNotFoundError: If there is no such folder or repository, the folder has no weights that can be read, or
            it is asked for a task and is not a shared folder.
        ValueError: If the files are damaged, the configuration is not supported, or the two do not fit each other; the
            error lists everything that is unknown, missing, or has a wrong shape, type or value. If there is no such
            task, or the gates belong to other weights.
    """
    target = checked_type(dtype)
    if task is None:
        path_or_hub_id, task = split_task(path_or_hub_id)
    with opened(path_or_hub_id, revision) as files:
        model, folder, parameters = files
        if task is None:
            return model, convert(parameters, target, folder, sparse=sparse)
        if sparse:
            raise ValueError(f"sparse=True is for the whole model, not for task {task!r}: leave one of them out.")
        file = read_gates(folder / GATES)
        stored = file.task(task, folder / GATES)
        try:
            gates, means = unpack_gates(model, shapes_of(parameters), stored)
        except ValueError as error:
            raise ValueError(f"the gates of {task!r} in {folder / GATES} do not fit the weights: {error}.") from error
        check_belongs(file, files)
        return model, read_compacted(model, parameters, gates, means or {}, target, folder)


def checked_type(dtype: DTypeLike | None) -> np.dtype | None:
    """A type of parameters.

    Raises:
        ValueError: If it is none.
    """
    kind = None if dtype is None else np.dtype(dtype)
    if kind is not None and kind not in FLOATS.values():
        raise ValueError(f"dtype must be float32, bfloat16, float16 or None, got {kind}.")
    return kind


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
    with opened(name, revision) as files:
        read, shapes = _read_files(files), shapes_of(files.parameters)
        stamp = None if memory is None else stamp_of(read)
        digest = None if memory is None else recall(memory, stamp)
        if digest is None:
            digest = opened_digest(files)
            if memory is not None:
                remember(memory, stamp, read, digest)
        return Outline(files.model, shapes, digest)


def digest_keeper(path_or_hub_id: str | Path, memory: Path) -> Callable[[str], None]:
    """Made before a model is loaded, takes its `model_digest` afterwards: the next `outline` need not compute it."""
    name, task = split_task(path_or_hub_id)
    if task is not None:
        return lambda digest: None
    with opened(name) as files:
        read = _read_files(files)
    stamp = stamp_of(read)
    return lambda digest: remember(memory, stamp, read, digest)


def _read_files(files: Opened) -> set[Path]:
    read = {parameter.source.file.path for parameter in files.parameters}
    return read if files.folder.is_file() else {files.folder / CONFIG, *read}


def split_task(name: str | Path) -> tuple[str | Path, str | None]:
    """Splits `FOLDER#TASK`; None where no task is named. A folder or file that really has such a name is no task's."""
    folder, mark, task = name.rpartition("#") if isinstance(name, str) else ("", "", "")
    return (name, None) if not mark or Path(name).expanduser().exists() else (folder, task)


@contextlib.contextmanager
def opened(path_or_hub_id: str | Path, revision: str | None = None) -> Iterator[Opened]:
    """The model of a folder or repository and where its parameters are, while the files are open; see `load`."""
    place = _find(path_or_hub_id, revision)
    folder = unpacked(place) if place.is_file() else place
    raw = read_json(folder / CONFIG)
    section = raw.pop("jaxprune", None)
    if raw.get("model_type") == _OWN_TYPE and isinstance(section, dict):  # not in folders of version 0.1
        raw["model_type"] = section.get("model_type")
    try:
        heads = None if section is None else _task_heads(section)
        config = family(raw.get("model_type")).parse_config(raw, heads)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place / CONFIG}: {str(error)[:2000]}") from error
    with contextlib.ExitStack() as files:
        tensors = open_tensors(folder, files)
        tensors = unwrap(tensors, place) if section is None else tensors
        model = Model(fit_tying(config, tensors, hugging_face=section is None), folder.absolute())
        check_layers(model, tensors, place)
        fit = fit_hugging_face if section is None else fit_own
        yield Opened(model, place, fit(model, tensors, place))


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
    docs/packed_files.md says what packed files look like, and how small they are.

    Args:
        path: The folder.
        model: The model; the tokenizer's files are copied from where it was loaded.
        params: Its parameters, of any widths.
        pruning: What was removed and why, for `pruning.json`; the digest and the widths of the result are added.
        overwrite: Whether a folder that `save` wrote may be replaced. No other folder ever is.
        dtype: Type in the file: float32, bfloat16, float16, or None for each array's own.
        extra: Other files of the folder, such as a model card.
        packed: Compresses the weights, by which zeros take hardly any room. "exact" keeps every bit; "int8" also rounds
            the kernels of the layers, sparse or not, to one byte per weight and one scale per output: the error is at
            most 1/253 of the output's largest weight.

    Returns:
        The path.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        TypeError: If the parameters are sparse: `densify` them first.
        ValueError: If the parameters are not this model's, or are not finite in the type in which they are saved; if
            the tokenizer's files would not make the same tokenizer.
    """
    path = Path(path)
    if packed not in (None, "exact", "int8"):
        raise ValueError(f"packed must be 'exact', 'int8' or None, got {packed!r}.")
    target = checked_type(dtype)
    check_destination(interrupted(path) or path, overwrite)
    arrays = {path_name(steps): array for steps, array in flatten(params).items()}
    if sparse := [name for name, array in arrays.items() if hasattr(array, "todense")]:
        raise TypeError(f"sparse parameters cannot be saved: {', '.join(sparse)}. Make them dense with jp.densify.")
    refuse("parameters do not fit the model", **misfits(model, {name: tuple(a.shape) for name, a in arrays.items()}))
    if other := {name: str(array.dtype) for name, array in arrays.items() if array.dtype not in FLOATS.values()}:
        raise TypeError(f"only float32, float16 and bfloat16 can be saved, got {other}.")
    kinds = {name: target or np.dtype(array.dtype) for name, array in arrays.items()}
    outputs = linear_maps(model.axes, params) if packed == "int8" else {}
    if large := [name for name in outputs if not _is_finite(arrays[name], kinds[name])]:
        raise ValueError(f"cannot save NaN, infinity or values too large for the type: {', '.join(large)}.")
    tokenizer = tokenizer_of(model)
    files = files_of_tokenizer(model, tokenizer)
    taken = files | ({} if pruning is None else {PRUNING: b""})
    if other := [name for name, content in (extra or {}).items() if taken.get(name, content) != content]:
        raise ValueError(f"extra files {', '.join(other)}: the tokenizer or `pruning` has these, with other content.")
    files |= extra or {}
    if pruning is not None:
        result = {"digest": model_digest(model, reread(params, outputs)), "widths": widths(model.axes, params)}
        files[PRUNING] = json_bytes({**pruning, "pruned": result})
        check_record(json.loads(files[PRUNING]))
    weights = WEIGHTS if packed is None else WEIGHTS + COMPRESSED
    for name in files:
        if name in (CONFIG, WEIGHTS, WEIGHTS + COMPRESSED, "", "..") or Path(name).name != name:
            raise ValueError(f"extra file {name!r}: not a file name, or one that is written anyway.")
    stored = set(map(str, kinds.values()))
    section = {
        "format": _FORMAT,
        "model_type": model.config.model_type,
        "dtype": stored.pop() if len(stored) == 1 else "mixed",
        "heads": [asdict(model.head(name)) for name in model.heads],
        "files": sorted({CONFIG, weights, *files}),
    }
    files[CONFIG] = json_bytes({**json.loads(model.config.raw), "model_type": _OWN_TYPE, "jaxprune": section})
    metadata = {"format": "jaxprune", "version": str(_FORMAT)}
    if outputs:
        names = {kind: name for name, kind in FLOATS.items()}
        metadata[INT8] = json.dumps({name: names[kinds.pop(name)] for name in outputs})
    with folder_for(path, overwrite=overwrite) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with open(folder / weights, "wb") as file:
            writer = file if packed is None else Compressor(file)
            write_tensors(writer, int8_tensors(arrays, outputs), metadata, dtypes=kinds)
            if isinstance(writer, Compressor):
                writer.finish()
        check_tokenizer(model, tokenizer, folder, path)
    return path


def _is_finite(array: Any, kind: np.dtype) -> bool:
    with np.errstate(over="ignore"):
        return all(np.isfinite(block.astype(kind, copy=False)).all() for block in blocks(array))


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
    outputs = linear_maps(model.axes, params) if packed == "int8" else {}
    flat = flatten(reread(params, outputs, checked_type(dtype), FLOATS["F32"]))
    if all(array is flat[path] for path, array in flatten(params).items()):
        return params
    return unflatten({path: jnp.asarray(np.asarray(array)) for path, array in flat.items()})


def saved_digest(model: Model, params: Params, dtype: DTypeLike | None = None) -> str:
    """The `model_digest` of what `load` will give for parameters that `save` writes with this `dtype`."""
    return model_digest(model, reread(params, {}, checked_type(dtype), FLOATS["F32"]))


def opened_digest(files: Opened, dtype: np.dtype | None = FLOATS["F32"]) -> str:
    """The `model_digest` of what `load` gives for an open folder; one array is in memory at a time.

    Args:
        files: The model and its open files.
        dtype: The type of the parameters; None is each tensor's own.
    """
    return model_digest(files.model, read_later(files.parameters, dtype, files.folder))


def check_belongs(file: GateFile, files: Opened) -> None:
    """Refuses gates of another model than the one in the folder; reads all weights once.

    Raises:
        ValueError: If they are.
    """
    if any(parameter.inputs is not None for parameter in files.parameters):
        raise ValueError(f"{files.folder} has gates, but not the weights of a folder that jaxprune saved.")
    if file.model != (digest := opened_digest(files)):
        raise ValueError(
            f"{files.folder / GATES} belongs to another model: its gates were made for {file.model[:12]}, the weights "
            f"beside it are {digest[:12]}. Share the tasks of these weights again."
        )


def _find(path_or_hub_id: str | Path, revision: str | None) -> Path:
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".gguf"):
        if revision is not None:
            raise ValueError(f"{folder} is not on the hub: revision={revision!r} is for those that are.")
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file: give the folder that holds {CONFIG}, or a .gguf file.")
    old = interrupted(folder)
    if old is not None:
        raise FileNotFoundError(f"no folder {folder}: saving it was interrupted. Its old content is {old}: rename it.")
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no folder {folder}.")
    from huggingface_hub import errors, snapshot_download

    offline = OSError, ValueError, errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] of a proxy, say

    def download(patterns: Sequence[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns], ignore_patterns="*/*"))

    try:
        folder = download(_DOWNLOADED)
        more = set(files_of_kind(folder)) - set(TOKENIZER_FILES)
        return download(sorted(more)) if more else folder
    except offline as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"no folder {name}, and the hub does not give it either: {reason}") from error


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON file; arrays are lists there."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return np.asarray(value).tolist()
        raise TypeError(f"{type(value).__name__} cannot be written to JSON: {value!r}.")

    return (json.dumps(content, indent=2, default=plain) + "\n").encode()


def _task_heads(section: Any) -> tuple[TaskHead, ...]:
    version = section.get("format") if isinstance(section, dict) else section
    if misfits_of(version, _SECTION["format"]):
        raise ValueError(f"the jaxprune section has format {version!r}, this version reads {_FORMAT}: update jaxprune.")
    if problems := misfits_of(section, _SECTION, "jaxprune"):
        raise ValueError("; ".join(problems))
    return tuple(TaskHead(**{**fields, "labels": tuple(fields["labels"])}) for fields in section["heads"])


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
    if not isinstance(section, dict) or weights_file(path) is None:
        raise FileExistsError(f"{path} is not a folder that jaxprune saved: it is not replaced, choose another name.")
    known = section.get("files", [])
    if problems := misfits_of(known, [str], "jaxprune.files"):
        raise FileExistsError(f"{path} is not replaced, its {CONFIG} is damaged ({'; '.join(problems)}): move it away.")
    names = (entry.name for entry in path.iterdir())
    foreign = sorted(name for name in names if name not in known and not is_leftover(name, known))
    if foreign:
        raise FileExistsError(f"{path} also holds files that were not saved with the model: {foreign}: move them away.")
    check_replaceable(path)


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of a model; None if it has none that can be read, or none of its files can be left behind.

    Then all of them have the usual names, so the copy is the same without a look at it, which takes seconds if nobody
    has imported transformers yet.
    """
    if model.source is None:
        return None
    if not model.source.is_dir():
        raise FileNotFoundError(f"{model.source}, from which the model was loaded, is gone, and the tokenizer with it.")
    names = [name for name, *_ in versions_of(model.source) if not OTHER_FILES.fullmatch(name)]
    if set(names) <= set(TOKENIZER_FILES) and "transformers" not in sys.modules:
        return None
    try:
        return model.tokenizer
    except FileNotFoundError as error:
        if names:
            copied = ", ".join(sorted(set(names) & set(TOKENIZER_FILES))) or "none of its files"
            warnings.warn(f"{error} Saved with the model, as it stands: {copied}.", stacklevel=3)
        return None


def files_of_tokenizer(model: Model, tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer, byte by byte; of one that cannot be read those that are usual."""
    names = TOKENIZER_FILES if tokenizer is None else tokenizer_files(tokenizer)
    files = [] if model.source is None else [model.source / name for name in names]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def check_tokenizer(model: Model, tokenizer: Any, saved: Path, path: Path) -> None:
    """Opens the tokenizer of a saved folder, unless the model has none, and compares the two."""
    if tokenizer is None:
        return

    def facts(each: Any) -> tuple[Any, ...]:
        tokens = None
        with contextlib.suppress(ValueError):  # a vocabulary may lack what is tried
            tokens = run_tokenizer(each, _TRIED)["input_ids"]
        return type(each), len(each), tokens

    try:
        copy = facts(Model(model.config, saved).tokenizer)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not saved, as its copy of the tokenizer cannot be opened: {error}") from error
    if copy != facts(tokenizer):
        raise ValueError(
            f"{path} is not saved, as its copy of the tokenizer in {model.source} is another one: say in its "
            "tokenizer_config.json which tokenizer_class it is."
        )

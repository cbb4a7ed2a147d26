"""Writes models for other programs: a Hugging Face folder that transformers loads without code of ours.

There all layers have the same widths. So every module is filled up with units whose weights are zero, as many as the
widest has, which changes nothing that is computed. The families say in which words (`uniform` in `jaxprune.models`).
What was written is read back and compared before it takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxprune.checkpoints.files import check_writable, folder_for
from jaxprune.checkpoints.folder import (
    as_loaded,
    check_tokenizer,
    checked_type,
    files_of_tokenizer,
    json_bytes,
    load,
    tokenizer_of,
)
from jaxprune.checkpoints.tensors import model_digest, versions, write_tensors
from jaxprune.checkpoints.weights import CONFIG, WEIGHTS, as_theirs, stored_type
from jaxprune.models import Model, Stack, family
from jaxprune.units import (
    Params,
    Path,
    axes_of,
    fill,
    flatten,
    input_axes,
    lengths,
    path_name,
    sites,
    unflatten,
    widths,
)

EXPORT = "export.json"  # in the folder: how it was made
HEADS = "heads.safetensors"  # task heads of a form that no class of transformers has
TOLERANCE = 1e-4  # of the largest logit, in float32
WIDTHS = ("heads", "groups", "query_heads", "neurons")  # the kinds of units whose numbers a configuration holds
_OUTSIDE = ("classifier", "qa_outputs", "pre_classifier", "lm_head")  # parts of a checkpoint without the base's prefix
_ROWS, _TOKENS = 3, 24  # of random text, which an export is compared on


class Written(NamedTuple):
    """Units of one kind, by layer; `query_heads` are those of one group."""

    fewest: int
    most: int
    written: int  # in every layer


@dataclass(frozen=True)
class Uniform:
    """A model in which all layers have the same widths, and which computes the same."""

    model: Model
    params: Params
    units: Mapping[str, Written]
    left_out: tuple[str, ...]  # layers without units
    heads: Params  # task heads that stand beside the model, as they are
    head: str | None  # the name of the head inside


def uniform(model: Model, params: Params, head: str | None = None) -> Uniform:
    """Makes all layers as wide as the widest, in the words of Hugging Face.

    Units are added whose weights are zero. Layers without units are left out if they return what they are given.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        head: The task head to keep; None keeps the only one, or else none.

    Raises:
        ValueError: If there is no such head.
    """
    if model.heads:
        named = model.config.task_heads if head is None else (model.head(head),)
        model, params = (
            model.with_heads(named),
            params | {"heads": {own.name: params["heads"][own.name] for own in named}},
        )
    module = family(model.config.model_type)
    layers = {stack.name: _needed_layers(model, params, stack, module.IDLE) for stack in model.stacks}
    flat = _renumbered(model, module.aligned(model.config, params), layers)
    found: dict[str, list[int]] = {}
    for site, count in lengths(model.axes, unflatten(flat)).items():
        found.setdefault(site.kind, []).append(count)
    raw = module.uniform(model.config, {kind: max(counts) for kind, counts in found.items()}, layers)
    written = Model(family(raw["model_type"]).parse_config(raw), model.source)
    shapes = flatten(jax.eval_shape(written.initialise, jax.random.key(0)))
    places = {("heads", *written.heads, *path[2:]) if path[0] == "heads" else path: path for path in flat}
    filled = unflatten({place: fill(flat[places[place]], shape.shape) for place, shape in shapes.items()})
    after = {site.kind: count for site, count in lengths(written.axes, filled).items()}
    return Uniform(
        written,
        filled,
        {kind: Written(min(found[kind]), max(found[kind]), after[kind]) for kind in WIDTHS if kind in found},
        tuple(
            path_name((*stack.path, i))
            for stack in model.stacks
            for i in range(stack.layers)
            if i not in layers[stack.name]
        ),
        {} if written.heads else params.get("heads", {}),
        next(iter(model.heads), None) if written.heads else None,
    )


def _needed_layers(model: Model, params: Params, stack: Stack, idle: bool) -> tuple[int, ...]:
    """The layers of a stack that do something; one stays in any case."""
    if not idle:
        return tuple(range(stack.layers))
    units = {site.layer for site in sites(model.axes, params) if site.stack == stack.name}
    counts = widths(model.axes, params)
    busy = {site.layer for site in sites(model.axes, params) if site.stack == stack.name and counts[site.name]}
    for path, array in flatten(params).items():
        if path[: len(stack.path)] == stack.path and path[-1] == "bias" and np.any(np.asarray(array)):
            busy.add(int(path[len(stack.path)]))
    return tuple(sorted(busy)) or (min(units),)


def _renumbered(model: Model, params: Params, layers: Mapping[str, tuple[int, ...]]) -> dict[Path, Any]:
    """The parameters of some layers, which are counted anew, and all others."""
    flat: dict[Path, Any] = {}
    for path, array in flatten(params).items():
        for stack in model.stacks:
            depth = len(stack.path)
            if path[:depth] == stack.path:
                kept = layers[stack.name]
                if path[depth] in kept:
                    flat[(*stack.path, kept.index(int(path[depth])), *path[depth + 1 :])] = array
                break
        else:
            flat[path] = array
    return flat


def tensors_of(model: Model, params: Params) -> dict[str, Any]:
    """The parameters of a dense model under the names, and in the layout, of Hugging Face."""
    module, raw = family(model.config.model_type), json.loads(model.config.raw)
    prefix = "" if raw["architectures"][0].endswith("Model") else module.PREFIXES[model.config.model_type]
    flat, tensors = flatten(params), {}
    for path, (name, kind) in module.checkpoint_names(model.config).items():
        inputs = {"copy": None, "split_bias": 0}.get(kind, input_axes(axes_of(model.axes, path)))
        outside = name.partition(".")[0] in _OUTSIDE
        tensors[name if outside else prefix + name] = np.ascontiguousarray(as_theirs(np.asarray(flat[path]), inputs))
    return tensors


def export(
    path: str | FilePath,
    model: Model,
    params: Params,
    *,
    head: str | None = None,
    dtype: DTypeLike | None = None,
    check: bool = True,
    overwrite: bool = False,
    extra: Callable[[dict[str, Any]], Mapping[str, bytes]] | None = None,
) -> dict[str, Any]:
    """Writes a folder that transformers loads without code of ours, and compares the two.

    Llama and Qwen2 with other heads than their width says are written as Mistral or Seed-OSS, which have the same
    blocks. Of task heads those of a form that transformers has are inside; others stand beside an encoder without head,
    in `heads.safetensors`, under the names that they have in `params`. `export.json` says what was done.

    Args:
        path: The folder.
        model: The model; the tokenizer's files are copied from where it was loaded.
        params: Its parameters, of any widths.
        head: The task head to keep; None keeps all.
        dtype: Type in the file: float32, bfloat16 or float16; None is that of the file the model came from.
        check: Whether the folder is read back as a checkpoint of Hugging Face's, and compared on random tokens: logits,
            or of an encoder without head the last hidden states, may differ by 1e-4 of the largest.
        overwrite: Whether a folder that this function wrote may be replaced. No other ever is.
        extra: Makes other files of the folder from the record, such as a model card.

    Returns:
        The record, as `export.json` holds it.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        ValueError: If there is no such head, the values do not fit the type, or the folder does not compute the same.
    """
    path, target = FilePath(path), checked_type(stored_type(model) if dtype is None else dtype)
    check_exportable(path, overwrite)
    made = uniform(model, params, head)
    raw = json.loads(made.model.config.raw)
    raw.pop("torch_dtype", None)
    raw |= {"dtype": str(target), "transformers_version": version("transformers")}
    tokenizer = tokenizer_of(model)
    record = {
        "format": "hf",
        "class": raw["architectures"][0],
        "model": model_digest(model, params),
        "dtype": str(target),
        "units": {kind: each._asdict() for kind, each in made.units.items()},
        "left_out": list(made.left_out),
        "parameters": {"model": _count(params), "written": _count(made.params) + _count(made.heads)},
        "heads": {"inside": made.head, "beside": [*made.heads]},
        "versions": versions() | {"transformers": version("transformers")},
    }
    files = files_of_tokenizer(model, tokenizer)
    with folder_for(path, overwrite=overwrite) as folder:
        files[CONFIG] = json_bytes(dict(sorted(raw.items())))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        _write(folder / WEIGHTS, tensors_of(made.model, made.params), target)
        if made.heads:
            _write(folder / HEADS, {path_name(p): np.asarray(a) for p, a in flatten(made.heads).items()}, target)
        check_tokenizer(model, tokenizer, folder, path)
        record["check"] = _compared(model, as_loaded(model, params, dtype=target), made, folder) if check else None
        for name, content in ({} if extra is None else extra(record)).items():
            (folder / name).write_bytes(content)
        (folder / EXPORT).write_bytes(json_bytes(record))
    return record


def check_exportable(path: FilePath, overwrite: bool) -> None:
    """Refuses a place that cannot be written, and to replace anything but an export."""
    check_writable(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or replace it with --overwrite.")
    if not path.is_dir() or not (path / EXPORT).is_file():
        raise FileExistsError(f"{path} is not a folder that was exported: it is not replaced, choose another name.")


def _write(file: FilePath, tensors: Mapping[str, Any], dtype: np.dtype | None) -> None:
    with open(file, "wb") as stream:
        write_tensors(stream, tensors, {"format": "pt"}, dtypes={} if dtype is None else dict.fromkeys(tensors, dtype))


def _count(params: Params) -> int:
    return sum(int(array.size) for array in flatten(params).values())


def _compared(model: Model, params: Params, made: Uniform, folder: FilePath) -> dict[str, Any]:
    """The largest difference between what the export and the model give for random tokens.

    Raises:
        ValueError: If it is too large.
    """
    batch, hidden = _random_batch(model), not (model.answers_in_text or made.model.heads)
    expected = _ours(model, params, batch, made.head, hidden)
    found = _ours(*load(folder), batch, None, hidden)
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
    if not error <= TOLERANCE:
        raise ValueError(
            f"the export is not written: read back, its {'states' if hidden else 'logits'} differ by {error:.1e} of "
            f"the largest, more than {TOLERANCE:.0e}. That is a fault of jaxprune: please report it."
        )
    return {"of": "hidden states" if hidden else "logits", "error": error, "tolerance": TOLERANCE}


def _random_batch(model: Model) -> dict[str, np.ndarray]:
    """Rows of random tokens, of which one is shorter."""
    random, config = np.random.default_rng(0), model.config
    length = min(_TOKENS, config.max_length)

    def rows(length: int) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = random.integers(0, config.vocab, (_ROWS, length)), np.ones((_ROWS, length), np.int32)
        ids = np.where(ids == config.pad_id, (config.pad_id + 1) % config.vocab, ids).astype(np.int32)
        mask[-1, max(1, length // 2) :] = 0
        ids[mask == 0] = config.pad_id
        return ids, mask

    ids, mask = rows(length)
    batch = {"input_ids": ids, "attention_mask": mask}
    if len(model.stacks) > 1:
        written, mask = rows(max(2, length // 4))
        batch |= {"decoder_input_ids": written, "decoder_attention_mask": mask}
    return batch


def _ours(model: Model, params: Params, batch: dict[str, np.ndarray], head: str | None, hidden: bool) -> np.ndarray:
    if hidden:
        states = model.with_heads(()).apply(params, batch, returns=("hidden",)).hidden
        assert states is not None
        return _of_tokens(states[len(states) - 1], batch)
    logits = model.apply(params, batch, head=head).logits
    assert logits is not None
    return _of_tokens(logits.swapaxes(1, 2) if model.head(head).spans else logits, batch)


def _of_tokens(values: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The values of all tokens that are not padding; those of whole rows as they are."""
    array, mask = np.asarray(values, np.float64), batch.get("decoder_attention_mask", batch["attention_mask"])
    return array[mask == 1] if array.ndim == 3 else array

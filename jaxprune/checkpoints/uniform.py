"""Models whose layers all have the same widths, as most other programs need them, in the words of Hugging Face.

Every module is filled up with units whose weights are zero, as many as the widest has, which changes nothing that is
computed. The families say which configuration that is (`uniform` in `jaxprune.models`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.checkpoints.tensors import model_digest, versions
from jaxprune.checkpoints.weights import as_theirs
from jaxprune.models import Model, Stack, family
from jaxprune.units import (
    Params,
    Path,
    Site,
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

TOLERANCE = 1e-4  # of the largest logit, in float32
WIDTHS = ("heads", "groups", "query_heads", "neurons")  # the kinds of units whose numbers a configuration holds
_OUTSIDE = ("classifier", "qa_outputs", "pre_classifier", "lm_head")  # parts of a checkpoint without the base's prefix
_ROWS, _TOKENS = 3, 24  # of random text, which an export is compared on


class Written(NamedTuple):
    """Units of one kind, by layer; `query_heads` are those of one group."""

    fewest: int
    most: int
    written: int | None  # in every layer; None: each has its own number
    filled: int  # modules that have more than in the model


@dataclass(frozen=True)
class Filled:
    """A model whose layers were filled up to widths that another program can have, and which computes the same."""

    model: Model
    params: Params
    before: Mapping[Site, int]  # units at every site that stays, along the last of their axes
    left_out: tuple[str, ...]  # layers without units
    heads: Params  # task heads that stand beside the model, as they are
    head: str | None  # the name of the head inside

    @property
    def units(self) -> dict[str, Written]:
        """The kinds of units whose numbers a configuration holds, as they were and as they are written."""
        after, found = lengths(self.model.axes, self.params), {}
        for kind in WIDTHS:
            pairs = [(count, after[site]) for site, count in self.before.items() if site.kind == kind]
            if pairs:
                before, written = zip(*pairs, strict=True)
                same, filled = len({*written}) == 1, sum(old < new for old, new in pairs)
                found[kind] = Written(min(before), max(before), written[0] if same else None, filled)
        return found


def uniform(model: Model, params: Params, head: str | None = None, multiple_of: int = 1) -> Filled:
    """Makes all layers as wide as the widest, in the words of Hugging Face.

    Units are added whose weights are zero. Layers without units are left out if they return what they are given.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        head: The task head to keep; None keeps all.
        multiple_of: Neurons of a layer are made a multiple of this.

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
    before, needed = lengths(model.axes, unflatten(flat)), {}
    for site, count in before.items():
        needed[site.kind] = max(count, needed.get(site.kind, 0))
    needed["neurons"] += -needed["neurons"] % multiple_of
    raw = module.uniform(model.config, needed, layers)
    written = Model(family(raw["model_type"]).parse_config(raw), model.source)
    shapes = flatten(jax.eval_shape(written.initialise, jax.random.key(0)))
    places = {("heads", *written.heads, *path[2:]) if path[0] == "heads" else path: path for path in flat}
    filled = unflatten({place: fill(flat[places[place]], shape.shape) for place, shape in shapes.items()})
    return Filled(
        written,
        filled,
        before,
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


def _count(params: Params) -> int:
    return sum(int(array.size) for array in flatten(params).values())


def described(model: Model, params: Params, made: Filled | None, head: str | None = None) -> dict[str, Any]:
    """The facts in the record of every export; one at the model's own widths has nothing filled up, and one head."""
    units = {} if made is None else made.units
    written = _count(params) if made is None else _count(made.params) + _count(made.heads)
    return {
        "model": model_digest(model, params),
        "units": {kind: each._asdict() for kind, each in units.items()},
        "left_out": [] if made is None else list(made.left_out),
        "parameters": {"model": _count(params), "written": written},
        "heads": {"inside": head if made is None else made.head, "beside": [] if made is None else [*made.heads]},
        "versions": versions() | {"transformers": version("transformers")},
    }


def compared(
    model: Model,
    params: Params,
    run: Callable[[Mapping[str, Any]], Any],
    head: str | None,
    *,
    hidden: bool = False,
    tolerance: float | None = TOLERANCE,
) -> dict[str, Any]:
    """The largest difference between what an export that was read back and the model give for random tokens.

    Args:
        model: The model.
        params: Its parameters, as they were written.
        run: What the export gives for a batch.
        head: The head that both have.
        hidden: Whether they are compared by their last hidden states.
        tolerance: By how much of the largest they may differ; None: by any.

    Raises:
        ValueError: If they differ by more.
    """
    batch, spans = _random_batch(model), not hidden and model.head(head).spans
    expected, found = (_of_tokens(each(batch), batch, spans) for each in (runner(model, params, head, hidden), run))
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
    if tolerance is not None and not error <= tolerance:
        raise ValueError(
            f"the export is not written: read back, its {'states' if hidden else 'logits'} differ by {error:.1e} of "
            f"the largest, more than {tolerance:.0e}. That is a fault of jaxprune: please report it."
        )
    return {"of": "hidden states" if hidden else "logits", "error": error, "tolerance": tolerance}


def runner(model: Model, params: Params, head: str | None, hidden: bool = False) -> Callable[[Mapping[str, Any]], Any]:
    """Makes a function from a batch to the logits of a head, or to the last hidden states."""

    def run(batch: Mapping[str, Any]) -> Any:
        if not hidden:
            return model.apply(params, batch, head=head).logits
        states = model.with_heads(()).apply(params, batch, returns=("hidden",)).hidden
        assert states is not None
        return states[len(states) - 1]

    return run


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


def _of_tokens(values: Any, batch: Mapping[str, np.ndarray], spans: bool) -> np.ndarray:
    """The values of all tokens that are not padding; those of whole rows as they are."""
    array, mask = np.asarray(values, np.float64), batch.get("decoder_attention_mask", batch["attention_mask"])
    array = array.swapaxes(1, 2) if spans else array
    return array[mask == 1] if array.ndim == 3 else array

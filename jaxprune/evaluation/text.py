"""The answers of a text-to-text model: the likelihood of given ones, and the text it writes by itself.

A *target* is the tokens of an answer, end of sequence included, `[b, u]`; `IGNORED` fills it up. The candidates of an
example, one per label, are `[b, labels, u]`.

Generated text is, token by token, always the most likely next token. The encoder runs once, in the programs that
`Model.apply` uses. One program writes all tokens: it caches the keys and values of the tokens before, computes those of
the encoder's output once, and ends early when every row has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxprune.data.batches import IGNORED
from jaxprune.models import (
    LANGUAGE,
    Cache,
    Mask,
    Model,
    State,
    advance,
    check_intervention,
    layer_intervention,
    mask_of,
    model_inputs,
    model_layers,
    part,
    prompt_inputs,
    readout_compiled,
    repeat_rows,
)
from jaxprune.models.tokenizers import run_tokenizer
from jaxprune.units import Intervention, Params

MOST_ROWS = 512  # answers that are decoded together: it sets the memory, not the result


def teacher_forced(model: Model, batch: Mapping[str, Any], targets: Int[Array, "b u"] | np.ndarray) -> dict[str, Any]:
    """The batch with the decoder's inputs for a target: the start token, then the target but for its last token."""
    return {**batch, **_shifted(model, jnp.asarray(targets))}


@partial(jax.jit, static_argnums=0)
def _shifted(model: Model, targets: Int[Array, "b u"]) -> dict[str, Array]:
    real = targets != IGNORED
    first = jnp.full((targets.shape[0], 1), model.config.start_id, jnp.int32)
    inputs = jnp.concatenate([first, jnp.where(real, targets, model.config.pad_id)[:, :-1].astype(jnp.int32)], axis=1)
    return dict(zip(model.stacks[-1].inputs[:2], (inputs, real), strict=True))


def rank(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    candidates: Int[Array, "b l u"] | np.ndarray,
    intervention: Intervention = Intervention(),
) -> Float[Array, "b l"]:
    """The log-likelihood, in nats, of every candidate answer. The encoder runs once for all of them.

    Args:
        batch: `input_ids` and `attention_mask`.
        candidates: The tokens of the answers.
    """
    candidates = jnp.asarray(candidates)
    rows, labels, length = candidates.shape
    encoded = prompt_inputs(model, params, batch)
    check_intervention(model, params, encoded, intervention)
    layers, last = model_layers(model, params), model.stacks[-1].layers
    memory = advance(model, layers[:-last], encoded, None, intervention)
    output = part(params, model.readout_places(LANGUAGE))
    together = max(1, min(labels, MOST_ROWS // rows))
    likelihoods = []
    for first in range(0, labels, together):
        some = _filled(candidates[:, first : first + together], together)
        state, tiled = repeat_rows((memory, encoded), together)
        targets = some.reshape(rows * together, length)
        tiled = model_inputs(model, params, teacher_forced(model, tiled, targets))
        state = advance(model, layers[-last:], tiled, state, intervention)
        logits = readout_compiled(model, LANGUAGE, output, state, mask_of(layers[-1], tiled), None)
        likelihoods.append(_log_likelihood(logits, targets).reshape(rows, together))
    return jnp.concatenate(likelihoods, axis=1)[:, :labels]


def _filled(candidates: Int[Array, "b l u"], labels: int) -> Int[Array, "b k u"]:
    """The last group of labels, filled up to the size of the others so that they share their programs."""
    missing = labels - candidates.shape[1]
    return jnp.pad(candidates, [(0, 0), (0, missing), (0, 0)], mode="edge") if missing else candidates


@jax.jit
def _log_likelihood(logits: Float[Array, "b u v"], targets: Int[Array, "b u"]) -> Float[Array, " b"]:
    index = jnp.maximum(targets, 0)[..., None]
    each = jnp.take_along_axis(logits, index, axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(targets != IGNORED, each, 0.0).sum(1)


def answered(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The model's inputs, with the answer that the decoder is to read.

    This is the answer of the example's label, or without one (label -1) the likeliest candidate. A batch that has
    decoder inputs, and one of a model that does not answer in text, stay as they are.
    """
    if not model.answers_in_text or model.stacks[-1].inputs[0] in batch:
        return model_inputs(model, params, batch)
    candidates = candidates_in(batch)
    labels = jnp.asarray(batch["labels"], jnp.int32)

    def likeliest() -> Int[Array, " b"]:
        return jnp.where(labels < 0, rank(model, params, batch, candidates).argmax(1).astype(jnp.int32), labels)

    if isinstance(labels, Tracer):
        labels = jax.lax.cond((labels < 0).any(), likeliest, lambda: labels)
    elif (np.asarray(labels) < 0).any():
        labels = likeliest()
    return model_inputs(model, params, teacher_forced(model, batch, candidates_of(candidates, labels)))


def candidates_in(batch: Mapping[str, Any]) -> Int[Array, "b l u"]:
    """The candidates of a batch.

    Raises:
        ValueError: If there are none.
    """
    if "candidates" not in batch:
        raise ValueError(f"the batch has no 'candidates' [batch, labels, tokens]; it has {sorted(batch)}.")
    return jnp.asarray(batch["candidates"], jnp.int32)


@jax.jit
def candidates_of(candidates: Int[Array, "b l u"] | np.ndarray, labels: Int[Array, " b"]) -> Int[Array, "b u"]:
    """One candidate of every example."""
    return jnp.take_along_axis(candidates, labels[:, None, None], axis=1)[:, 0]


def without_end(targets: Int[Array, "b u"], end: int) -> Int[Array, "b u"]:
    """The targets without their last token if it is the end of the sequence."""
    return jnp.where(targets == end, IGNORED, targets)


def generate(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    intervention: Intervention = Intervention(),
) -> Int[Array, "b n"]:
    """Generates the most likely next token until the end token, row by row: greedy, as Hugging Face's `generate`.

    Rows do not affect each other. With gates the text is that of the compacted model.

    Args:
        batch: What a Hugging Face tokenizer returns, padded on any side: `input_ids` and `attention_mask`, each
            `[b, t]`. Other keys are ignored, those of the decoder too.
        max_new_tokens: The most tokens to write. One program is compiled for each number and shape.
        intervention: Gates `[units]` by site name, or `[b, units]` for one row per example, and what closed units are
            replaced by.

    Returns:
        int32 tokens `[b, max_new_tokens]`: those after the start token. Once a row has given the end token, which is
        there too, it is padded with `pad_id`.

    Raises:
        TypeError: If `max_new_tokens` is not an integer, indices are not, or the gates or means are no dicts of arrays.
        ValueError: If the model does not answer in text, `max_new_tokens` is less than 1 or more than the model reads,
            or for what `Model.apply` refuses in a batch, gates, means or parameters.
    """
    if not model.answers_in_text:
        raise ValueError(f"a {model.config.model_type} model does not answer in text: there is nothing to generate.")
    if not isinstance(max_new_tokens, int | np.integer) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens must be an integer, got {type(max_new_tokens).__name__}.")
    if not 1 <= max_new_tokens <= model.max_length:
        raise ValueError(f"max_new_tokens must lie in 1 to {model.max_length}, got {max_new_tokens}.")
    inputs = prompt_inputs(model, params, batch)
    check_intervention(model, params, inputs, intervention)
    layers, writer = model_layers(model, params), model.stacks[-1]
    encoded = advance(model, layers[: -writer.layers], inputs, None, intervention)
    decoding = tuple(
        _Layer(layer.params, layer_intervention(intervention, layer.name)) for layer in layers[-writer.layers :]
    )
    entry, output = part(params, model.embed_places(writer.name)), part(params, model.readout_places(LANGUAGE))
    decoder = _Decoder(entry, decoding, output)
    return _write(model, int(max_new_tokens), decoder, encoded, inputs[model.stacks[0].inputs[1]])


def texts(model: Model, tokens: Int[Array, "b n"] | np.ndarray) -> list[str]:
    """The texts that tokens stand for, by the model's tokenizer, without special tokens.

    Raises:
        FileNotFoundError: If the model has no tokenizer.
    """
    return run_tokenizer(model.tokenizer.batch_decode, np.asarray(tokens).tolist(), skip_special_tokens=True)


class _Layer(NamedTuple):
    """A layer's parameters, gates and means."""

    params: Params
    intervention: Intervention


class _Decoder(NamedTuple):
    """The parameters that the generating program reads."""

    entry: Params  # for `Model.embed`
    layers: tuple[_Layer, ...]
    output: Params  # for `Model.readout`


class _Written(NamedTuple):
    """The text generated so far."""

    count: Int[Array, ""]
    tokens: Int[Array, "b n"]
    last: Int[Array, " b"]  # what the decoder reads next
    ended: Bool[Array, " b"]
    caches: tuple[Cache, ...]  # one per layer: their widths differ


@partial(jax.jit, static_argnums=(0, 1))
def _write(model: Model, length: int, decoder: _Decoder, encoded: State, mask: Bool[Array, "b s"]) -> Int[Array, "b n"]:
    rows, config, writer = mask.shape[0], model.config, model.stacks[-1]

    def read(token: Int[Array, " b"]) -> State:
        inputs = {writer.inputs[0]: token[:, None]}
        return model.embed(decoder.entry, inputs, stack=writer.name, before=encoded)

    def unfinished(text: _Written) -> Bool[Array, ""]:
        return (text.count < length) & ~text.ended.all()

    def write(text: _Written) -> _Written:
        hidden, caches = read(text.last).hidden, []
        for layer, cache in zip(decoder.layers, text.caches, strict=True):
            hidden, cache = model.step(layer.params, hidden, cache, text.count, mask, layer.intervention)
            caches.append(cache)
        state, masks = State(hidden, memory), Mask(jnp.ones((rows, 1), bool), mask)
        best = model.readout(decoder.output, state, masks, LANGUAGE)[:, 0].argmax(-1).astype(jnp.int32)
        token = jnp.where(text.ended, config.pad_id, best)
        tokens = jax.lax.dynamic_update_slice_in_dim(text.tokens, token[:, None], text.count, axis=1)
        return _Written(text.count + 1, tokens, token, text.ended | (token == config.end_id), tuple(caches))

    start = jnp.full(rows, config.start_id, jnp.int32)
    memory: Any = read(start).memory
    nothing = _Written(
        count=jnp.zeros((), jnp.int32),
        tokens=jnp.full((rows, length), config.pad_id, jnp.int32),
        last=start,
        ended=jnp.zeros(rows, bool),
        caches=tuple(model.prepare(layer.params, memory, length) for layer in decoder.layers),
    )
    return jax.lax.while_loop(unfinished, write, nothing).tokens

"""The answers of a text-to-text model: the likelihood of given ones, and the text it writes by itself.

A *target* is the tokens of an answer, end of sequence included, `[b, u]`; `IGNORED` fills it up. The candidates of an
example, one per label, are `[b, labels, u]`.

Generated text is, token by token, the most likely next token, or one that is drawn. The encoder runs once, in the
programs that `Model.apply` uses. One program writes all tokens: it caches the keys and values of the tokens before,
computes those of the encoder's output once, and ends early when every row has ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxprune.checkpoints.files import read_json
from jaxprune.data.batches import IGNORED
from jaxprune.models import (
    ANSWER,
    LABELS,
    LANGUAGE,
    NOWHERE,
    Cache,
    Mask,
    Model,
    State,
    advance,
    check_intervention,
    embed_compiled,
    layer_intervention,
    model_inputs,
    model_layers,
    part,
    prompt_inputs,
    readout_compiled,
    readout_mask,
    repeat_rows,
)
from jaxprune.models.tokenizers import run_tokenizer
from jaxprune.units import Intervention, Params

MOST_ROWS = 512  # answers that are decoded together, and their logits: they set the memory, not the result
MOST_LOGITS = 2**28


def teacher_forced(model: Model, batch: Mapping[str, Any], targets: Int[Array, "b u"] | np.ndarray) -> dict[str, Any]:
    """The batch with the inputs for a target: a start token or the prompt, then the target but for its last token."""
    if model.continues:
        ids, mask = (jnp.asarray(batch[name]) for name in model.stacks[-1].inputs[:2])
        return {**batch, **_continued(model, ids, mask.astype(bool), jnp.asarray(targets))}
    return {**batch, **_shifted(model, jnp.asarray(targets))}


def worded(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The inputs of the head `WORDS`: the prompt, and for each label the first token of its candidate."""
    words = candidates_in(batch)[:, :, 0]
    bias = batch.get("label_bias", np.zeros(words.shape, np.float32))
    inputs = teacher_forced(model, batch, words[:, :1])
    return model_inputs(model, params, inputs | dict(zip(LABELS, (words, bias), strict=True)))


def _right_aligned(ids: Int[Array, "b t"], mask: Bool[Array, "b t"]) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """The tokens of every row at its end, in their order, and where they are."""
    order = jnp.argsort(mask.astype(jnp.int32), axis=1, stable=True)
    return jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(mask, order, axis=1)


@partial(jax.jit, static_argnums=0)
def _continued(
    model: Model, ids: Int[Array, "b t"], mask: Bool[Array, "b t"], targets: Int[Array, "b u"]
) -> dict[str, Array]:
    """Prompts with all but the last token of a target behind them, so that all targets stand at the same places."""
    ids, mask = _right_aligned(ids, mask)
    real = targets != IGNORED
    answer = jnp.where(real, targets, model.config.pad_id)[:, :-1].astype(jnp.int32)
    arrays = (jnp.concatenate([ids, answer], axis=1), jnp.concatenate([mask, real[:, :-1]], axis=1), real)
    return dict(zip(model.stacks[-1].inputs, arrays, strict=True))


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
        batch: `input_ids` and `attention_mask`; a `label_bias` `[b, labels]` of a calibration is added. Of a
            candidate's tokens the first `candidates_read` `[b, labels]` are only read.
        candidates: The tokens of the answers.
    """
    candidates = jnp.asarray(candidates)
    rows, labels, length = candidates.shape
    bias = jnp.asarray(batch.get("label_bias", 0.0), jnp.float32)
    encoded = prompt_inputs(model, params, batch)
    check_intervention(model, params, encoded, intervention)
    layers, last = model_layers(model, params), model.stacks[-1].layers
    if model.continues:
        targets = asked_for(candidates, batch.get("candidates_read"))
        return _rank_next(model, params, encoded, candidates, targets, intervention) + bias
    memory = advance(model, layers[:-last], encoded, None, intervention)
    output = part(params, model.readout_places(LANGUAGE))
    together = _together(model, candidates)
    likelihoods = []
    for first in range(0, labels, together):
        some = _filled(candidates[:, first : first + together], together)
        tiled = repeat_rows(encoded, together)
        targets = some.reshape(rows * together, length)
        tiled = model_inputs(model, params, teacher_forced(model, tiled, targets))
        state = advance(model, layers[-last:], tiled, memory, intervention)
        logits = readout_compiled(model, LANGUAGE, output, state, readout_mask(LANGUAGE, layers[-1], tiled), None)
        likelihoods.append(likelihood_of(logits, targets).reshape(rows, together))
    return jnp.concatenate(likelihoods, axis=1)[:, :labels] + bias


def _together(model: Model, candidates: Int[Array, "b l u"]) -> int:
    """The number of candidates of each row that are read at once."""
    rows, labels, length = candidates.shape
    return max(1, min(labels, MOST_ROWS // rows, MOST_LOGITS // (rows * length * model.config.vocab)))


def _rank_next(
    model: Model,
    params: Params,
    inputs: Mapping[str, Array],
    candidates: Int[Array, "b l u"],
    asked: Int[Array, "b l u"],
    intervention: Intervention,
) -> Float[Array, "b l"]:
    """`rank` where answers go on from their prompts, which are read once: all candidates share keys and values."""
    rows, labels, length = candidates.shape
    layers, stack = model_layers(model, params), model.stacks[-1]
    entry, output = part(params, model.embed_places(stack.name)), part(params, model.readout_places(LANGUAGE))
    ids, mask = _right_aligned(*(inputs[name] for name in stack.inputs[:2]))
    before = ids.shape[1] - 1

    def run(tokens: Array, caches: Sequence[Cache] | None, mask: Array, at: int) -> tuple[State, list[Cache]]:
        state = embed_compiled(model, stack.name, entry, {stack.inputs[0]: tokens}, None, None)
        caches = [_empty(model, layer.params, state, mask.shape[1]) for layer in layers] if caches is None else caches
        extended = []
        for layer, cache in zip(layers, caches, strict=True):
            local = layer_intervention(intervention, layer.name)
            state, cache = _step(model, layer.kind, layer.params, state, cache, jnp.int32(at), Mask(mask), local)
            extended.append(cache)
        return state, extended

    mask = jnp.concatenate([mask, jnp.ones((rows, length - 1), bool)], axis=1)
    caches = run(ids[:, :before], None, mask, 0)[1] if before else None
    together = 1 if length == 1 else _together(model, candidates)  # of single tokens all are read off one pass
    places, likelihoods = Mask(jnp.ones((rows * together, length), bool)), []
    for first in range(0, 1 if length == 1 else labels, together):
        targets = _filled(candidates[:, first : first + together], together).reshape(rows * together, length)
        last, read, room = repeat_rows((ids[:, before:], caches, mask), together)
        answer = jnp.where(targets[:, :-1] != IGNORED, targets[:, :-1], model.config.pad_id)
        state, _ = run(jnp.concatenate([last, answer], axis=1), read, room, before)
        logits = readout_compiled(model, LANGUAGE, output, state, places, None)
        if length == 1:
            return _log_likelihoods(logits[:, 0], candidates[:, :, 0])
        wanted = _filled(asked[:, first : first + together], together).reshape(rows * together, length)
        likelihoods.append(likelihood_of(logits, wanted).reshape(rows, together))
    return jnp.concatenate(likelihoods, axis=1)[:, :labels]


@partial(jax.jit, static_argnums=(0, 3))
def _empty(model: Model, params: Params, state: State, length: int) -> Cache:
    return model.prepare(params, state, length)


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    model: Model,
    kind: str,
    params: Params,
    state: State,
    cache: Cache,
    position: Array,
    mask: Mask,
    intervention: Intervention,
) -> tuple[State, Cache]:
    """`Model.step`, compiled: one program for all layers of equal kind and shape."""
    return model.step(params, state, cache, position, mask, intervention, kind=kind)


def _filled(candidates: Int[Array, "b l u"], labels: int) -> Int[Array, "b k u"]:
    """The last group of labels, filled up to the size of the others so that they share their programs."""
    missing = labels - candidates.shape[1]
    return jnp.pad(candidates, [(0, 0), (0, missing), (0, 0)], mode="edge") if missing else candidates


@jax.jit
def _log_likelihoods(logits: Float[Array, "b v"], tokens: Int[Array, "b l"]) -> Float[Array, "b l"]:
    each = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), jnp.maximum(tokens, 0), axis=-1)
    return jnp.where(tokens != IGNORED, each, NOWHERE)


@jax.jit
def likelihood_of(logits: Float[Array, "b u v"], targets: Int[Array, "b u"]) -> Float[Array, " b"]:
    """The log-likelihood, in nats, of answers whose tokens' logits are at hand."""
    index = jnp.maximum(targets, 0)[..., None]
    each = jnp.take_along_axis(logits, index, axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    real = targets != IGNORED
    return jnp.where(real.any(1), jnp.where(real, each, 0.0).sum(1), NOWHERE)  # without a token it is no candidate


def answered(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The model's inputs, with the answer that the decoder is to read.

    This is the answer of the example's label, or without one (label -1) the likeliest candidate. A batch that has
    decoder inputs, and one of a model that does not answer in text, stay as they are.
    """
    stack = model.stacks[-1]
    if not model.answers_in_text or (ANSWER if model.continues else stack.inputs[0]) in batch:
        return model_inputs(model, params, batch)
    candidates = candidates_in(batch)
    labels = jnp.asarray(batch["labels"], jnp.int32)
    unread = model.continues and candidates.shape[2] == 1  # the last token of an answer is asked for and not read

    def likeliest() -> Int[Array, " b"]:
        return jnp.where(labels < 0, rank(model, params, batch, candidates).argmax(1).astype(jnp.int32), labels)

    if unread:
        labels = jnp.maximum(labels, 0)
    elif isinstance(labels, Tracer):
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


def asked_for(candidates: Int[Array, "b l u"], read: Any) -> Int[Array, "b l u"]:
    """The candidates without the first tokens of each that are only read, `[b, l]`; None: all are asked for."""
    if read is None:
        return candidates
    return jnp.where(jnp.arange(candidates.shape[2]) < jnp.asarray(read)[..., None], IGNORED, candidates)


@jax.jit
def candidates_of(candidates: Int[Array, "b l u"] | np.ndarray, labels: Int[Array, " b"]) -> Int[Array, "b u"]:
    """One candidate of every example."""
    return jnp.take_along_axis(candidates, labels[:, None, None], axis=1)[:, 0]


def without_end(targets: Int[Array, "b u"], ends: Sequence[int]) -> Int[Array, "b u"]:
    """The targets without their last token if it is the end of the sequence."""
    return jnp.where(jnp.isin(targets, jnp.asarray(ends, jnp.int32)), IGNORED, targets)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draws of the next token, in place of the likeliest one."""

    temperature: float = 1.0  # what the logits are divided by: below 1 the likely tokens become likelier
    top_p: float = 1.0  # only the likeliest tokens are drawn whose probabilities together reach this
    key: int | Array = 0  # a seed or a `jax.random.key`; every row and token has its own part of it

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be a positive number, got {self.temperature}; greedy needs no sampling."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")


def generate(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    intervention: Intervention = Intervention(),
) -> Int[Array, "b n"]:
    """Generates token after token until the end token, row by row: the most likely one, or one that is drawn.

    Without sampling it is Hugging Face's greedy `generate`. Rows do not affect each other. With gates the text is that
    of the compacted model.

    Args:
        batch: What a Hugging Face tokenizer returns, padded on any side: `input_ids` and `attention_mask`, each
            `[b, t]`. Other keys are ignored, those of the decoder too.
        max_new_tokens: The most tokens to write. One program is compiled for each number and shape.
        sampling: How tokens are drawn; None takes the likeliest.
        stop: Tokens that end a text besides those of the configuration.
        intervention: Gates `[units]` by site name, or `[b, units]` for one row per example, and what closed units are
            replaced by.

    Returns:
        int32 tokens `[b, max_new_tokens]`: those after the start token. Once a row has given the end token, which is
        there too, it is padded with `pad_id`.

    Raises:
        TypeError: If `max_new_tokens` is not an integer, indices are not, or the gates or means are no dicts of arrays.
        ValueError: If the model does not answer in text, `max_new_tokens` is less than 1 or more than the model reads
            (in a decoder behind the prompt), or for what `Model.apply` refuses in a batch, gates, means or parameters.
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
    rows, tokens = inputs[model.stacks[0].inputs[0]].shape
    if model.continues and tokens + max_new_tokens > model.max_length:
        raise ValueError(
            f"the prompt has {tokens} tokens and {max_new_tokens} are to follow; the model reads {model.max_length}."
        )
    drawn = None
    if sampling is not None:
        key = jax.random.key(sampling.key) if isinstance(sampling.key, int) else sampling.key
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))
        drawn = _Drawn(jnp.float32(sampling.temperature), jnp.float32(sampling.top_p), keys)
    encoded = advance(model, layers[: -writer.layers], inputs, None, intervention)
    writing = tuple(
        _Layer(layer.params, layer_intervention(intervention, layer.name)) for layer in layers[-writer.layers :]
    )
    entry, output = part(params, model.embed_places(writer.name)), part(params, model.readout_places(LANGUAGE))
    ends = jnp.asarray((*model.config.end_ids, *stop), jnp.int32)
    return _write(model, int(max_new_tokens), _Writer(entry, writing, output), encoded, inputs, ends, drawn)


def texts(model: Model, tokens: Int[Array, "b n"] | np.ndarray) -> list[str]:
    """The texts that tokens stand for, by the model's tokenizer, without special tokens.

    Raises:
        FileNotFoundError: If the model has no tokenizer.
    """
    return run_tokenizer(model.tokenizer.batch_decode, np.asarray(tokens).tolist(), skip_special_tokens=True)


def stop_tokens(model: Model) -> tuple[int, ...]:
    """The tokens that end a text by the model's `generation_config.json`, if its folder has one."""
    file = None if model.source is None else model.source / "generation_config.json"
    if file is None or not file.is_file():
        return ()
    ends = read_json(file).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and 0 <= end < model.config.vocab for end in ends):
        raise ValueError(f"eos_token_id in {file} is {ends}, expected tokens from 0 to {model.config.vocab - 1}.")
    return tuple(ends)


def encode_prompts(model: Model, prompts: Sequence[str], *, chat: bool = False) -> dict[str, np.ndarray]:
    """The batch of some prompts, padded, for `generate`.

    Args:
        model: A model with a tokenizer.
        prompts: Texts.
        chat: Whether each is what a user says first, to be put into the tokenizer's chat template.

    Raises:
        FileNotFoundError: If the model has no tokenizer.
        ValueError: If there is no prompt, one has no tokens, or the tokenizer has no chat template.
    """
    tokenizer, texts = model.tokenizer, list(prompts)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template: ask it without chat.")
    if chat:
        talks = [[{"role": "user", "content": text}] for text in texts]
        texts = run_tokenizer(tokenizer.apply_chat_template, talks, tokenize=False, add_generation_prompt=True)
    ids = run_tokenizer(tokenizer, texts, add_special_tokens=not chat, padding=False, verbose=False)["input_ids"]
    if not ids or not all(ids):
        raise ValueError("a prompt has no tokens: give a text to go on from.")
    tokens = np.full((len(ids), max(map(len, ids))), model.config.pad_id, np.int32)
    for row, known in zip(tokens, ids, strict=True):
        row[: len(known)] = known
    lengths = np.array([[len(known)] for known in ids])
    return {"input_ids": tokens, "attention_mask": np.arange(tokens.shape[1]) < lengths}


class _Layer(NamedTuple):
    """A layer's parameters, gates and means."""

    params: Params
    intervention: Intervention


class _Writer(NamedTuple):
    """The parameters that the generating program reads."""

    entry: Params  # for `Model.embed`
    layers: tuple[_Layer, ...]
    output: Params  # for `Model.readout`


class _Drawn(NamedTuple):
    """The settings of `Sampling` as arrays, and the randomness of every row."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    keys: Array  # [b]

    def next(self, logits: Float[Array, "b v"], count: Int[Array, ""]) -> Int[Array, " b"]:
        """One token for every row."""
        logits = logits / self.temperature
        ordered = jnp.sort(logits, axis=1, descending=True)
        shares = jax.nn.softmax(ordered, axis=1)
        before = jnp.cumsum(shares, axis=1) - shares  # the probability of all that are likelier
        least = jnp.where(before < self.top_p, ordered, jnp.inf).min(1, keepdims=True)
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, count)
        return jax.vmap(jax.random.categorical)(keys, jnp.where(logits >= least, logits, -jnp.inf))


class _Written(NamedTuple):
    """The text generated so far."""

    count: Int[Array, ""]
    tokens: Int[Array, "b n"]
    last: Int[Array, "b 1"]  # what is read next
    ended: Bool[Array, " b"]
    caches: tuple[Cache, ...]  # one per layer: their widths differ


@partial(jax.jit, static_argnums=(0, 1))
def _write(
    model: Model,
    length: int,
    writer: _Writer,
    encoded: State | None,
    inputs: dict[str, Array],
    ends: Int[Array, " e"],
    drawn: _Drawn | None,
) -> Int[Array, "b n"]:
    config, stack = model.config, model.stacks[-1]
    if stack.memory is None:  # the text goes on from the prompt
        prompt, mask = _right_aligned(*(inputs[name] for name in stack.inputs[:2]))
    else:
        rows = inputs[stack.memory].shape[0]
        prompt, mask = jnp.full((rows, 1), config.start_id, jnp.int32), jnp.ones((rows, 1), bool)
    rows, before = prompt.shape[0], prompt.shape[1] - 1
    mask = jnp.concatenate([mask, jnp.ones((rows, length - 1), bool)], axis=1)
    masks = Mask(mask, None if stack.memory is None else inputs[stack.memory])

    def read(tokens: Int[Array, "b s"], caches: tuple[Cache, ...], position: Array) -> tuple[State, tuple[Cache, ...]]:
        state, extended = entered(tokens), []
        for layer, kind, cache in zip(writer.layers, stack.kinds, caches, strict=True):
            state, cache = model.step(layer.params, state, cache, position, masks, layer.intervention, kind=kind)
            extended.append(cache)
        return state, tuple(extended)

    def entered(tokens: Int[Array, "b s"]) -> State:
        return model.embed(writer.entry, {stack.inputs[0]: tokens}, stack=stack.name, before=encoded)

    def unfinished(text: _Written) -> Bool[Array, ""]:
        return (text.count < length) & ~text.ended.all()

    def write(text: _Written) -> _Written:
        state, caches = read(text.last, text.caches, before + text.count)
        logits = model.readout(writer.output, state, Mask(jnp.ones((rows, 1), bool), masks.memory), LANGUAGE)
        token = logits[:, 0].argmax(-1) if drawn is None else drawn.next(logits[:, 0], text.count)
        token = jnp.where(text.ended, config.pad_id, token.astype(jnp.int32))
        tokens = jax.lax.dynamic_update_slice_in_dim(text.tokens, token[:, None], text.count, axis=1)
        return _Written(text.count + 1, tokens, token[:, None], text.ended | jnp.isin(token, ends), caches)

    first = entered(prompt[:, -1:])
    caches = tuple(model.prepare(layer.params, first, before + length) for layer in writer.layers)
    if before:
        _, caches = read(prompt[:, :-1], caches, jnp.zeros((), jnp.int32))
    nothing = _Written(
        count=jnp.zeros((), jnp.int32),
        tokens=jnp.full((rows, length), config.pad_id, jnp.int32),
        last=prompt[:, -1:],
        ended=jnp.zeros(rows, bool),
        caches=caches,
    )
    return jax.lax.while_loop(unfinished, write, nothing).tokens

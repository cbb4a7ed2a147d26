"""The BERT family: `bert`, `roberta`, `xlm-roberta` and `distilbert` encoders with heads for labels and for spans.

Devlin et al. 2019, Liu et al. 2019, Conneau et al. 2020, Sanh et al. 2019. They share post-norm blocks and differ in
position indices, segment embeddings, the layer before the classifier and the names in their checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxprune.models import NOWHERE, Model, Places, Stack, State, TaskHead
from jaxprune.models.bert_config import EncoderConfig
from jaxprune.models.bert_config import parse_config as parse_config
from jaxprune.models.bert_config import with_heads as with_heads
from jaxprune.models.layers import (
    ACTIVATIONS,
    Affine,
    Embedding,
    LayerNorm,
    TokenReduction,
    attend,
    attention_sites,
    dropout,
    gate,
)
from jaxprune.models.parts import Part, bind, describe
from jaxprune.models.parts import initialise as initialise_part
from jaxprune.units import Gates, Params, Path

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert")
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "distilbert": "distilbert."}

AXES: dict[str, tuple[str, ...]] = {
    "embeddings.word.embedding": ("vocab", "embed"),
    "embeddings.position.embedding": ("positions", "embed"),
    "embeddings.token_type.embedding": ("segments", "embed"),
    "embeddings.norm.*": ("embed",),
    "layers.*.attention.out.kernel": ("heads", "channels", "embed"),
    "layers.*.attention.out.bias": ("embed",),
    "layers.*.attention.norm.*": ("embed",),
    "layers.*.attention.value.kernel": ("embed", "heads", "channels"),
    "layers.*.attention.value.bias": ("heads", "channels"),
    "layers.*.attention.*.kernel": ("embed", "heads", "query_channels"),  # query, key
    "layers.*.attention.*.bias": ("heads", "query_channels"),
    "layers.*.ffn.up.kernel": ("embed", "neurons"),
    "layers.*.ffn.up.bias": ("neurons",),
    "layers.*.ffn.down.kernel": ("neurons", "embed"),
    "layers.*.ffn.down.bias": ("embed",),
    "layers.*.ffn.norm.*": ("embed",),
    "heads.*.dense.kernel": ("embed", "pooled"),
    "heads.*.dense.bias": ("pooled",),
    "heads.*.out.kernel": ("pooled", "labels"),
    "heads.*.out.bias": ("labels",),
}


def build(config: EncoderConfig) -> Model:
    """The model of a configuration."""
    return Model(config)


Gated: TypeAlias = Callable[[str, Array], Array]  # (local name of a site, its values) -> the values times their gates


class Embeddings(nnx.Module):
    """Word, position and segment embeddings, normalised."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.word = Embedding(config.vocab, config.embed, rngs=rngs)
        self.position = Embedding(config.positions, config.embed, rngs=rngs)
        self.segments = config.segments > 0
        if self.segments:
            self.token_type = Embedding(config.segments, config.embed, rngs=rngs)
        self.norm = LayerNorm(config.embed, config.eps)

    def __call__(self, ids: Array, positions: Array, segments: Array) -> Float[Array, "b t d"]:
        x = self.word(ids) + self.position(positions)
        return self.norm(x + self.token_type(segments) if self.segments else x)


class Attention(nnx.Module):
    """Self-attention over the heads that are there, then the residual and its norm."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        d, n, h = config.embed, config.attention_heads, config.head_dim
        self.query = Affine((d, n, h), (n, h), rngs=rngs)
        self.key = Affine((d, n, h), (n, h), rngs=rngs)
        self.value = Affine((d, n, h), (n, h), rngs=rngs)
        self.out = Affine((n, h, d), (d,), rngs=rngs)
        self.norm = LayerNorm(d, config.eps)
        self.rates = (config.attention_dropout, 0.0 if config.model_type == "distilbert" else config.hidden_dropout)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t"],
        scale: float,
        gated: Gated,
        key: Array | None,
        scores: bool,
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        inner, outer = (None, None) if key is None else jax.random.split(key)
        if self.query.kernel.shape[1] == 0:  # no head is left: what stays is the output's bias
            b, t, _ = x.shape
            query, mixed = (jnp.zeros((b, t, 0, own.kernel.shape[2]), x.dtype) for own in (self.query, self.value))
            raw, y = jnp.zeros((b, 0, t, t), jnp.float32), jnp.broadcast_to(self.out.bias[...], x.shape).astype(x.dtype)
        else:
            query = gated("attention.query_channels", self.query(x))
            mixed, raw = attend(
                query,
                self.key(x),
                self.value(x),
                mask,
                scale=scale,
                rate=self.rates[0],
                dropout_key=inner,
                scores=scores,
            )
            mixed = gated("attention.channels", gated("attention.heads", mixed))
            y = self.out(mixed)
        found = attention_sites("attention", query, mixed, raw if scores else None)
        return self.norm(x + dropout(y, self.rates[1], outer)), found | {"attention.residual": x}


class FeedForward(nnx.Module):
    """Two affine maps with a non-linearity between them, then the residual and its norm."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        d, f = config.embed, config.neurons
        self.up = Affine((d, f), (f,), rngs=rngs)
        self.down = Affine((f, d), (d,), rngs=rngs)
        self.norm = LayerNorm(d, config.eps)
        self.activation = config.activation
        self.rate = config.hidden_dropout

    def __call__(
        self, x: Float[Array, "b t d"], gated: Gated, key: Array | None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        if self.up.kernel.shape[1] == 0:  # no neuron is left: what stays is the output's bias
            inner = jnp.zeros((*x.shape[:2], 0), x.dtype)
            y = jnp.broadcast_to(self.down.bias[...], x.shape).astype(x.dtype)
        else:
            inner = gated("ffn.neurons", ACTIVATIONS[self.activation](self.up(x)))
            y = self.down(inner)
        return self.norm(x + dropout(y, self.rate, key)), {"ffn.neurons": inner, "ffn.residual": x}


class Block(nnx.Module):
    """One layer: attention, then the feed-forward network."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)


class Classifier(nnx.Module):
    """A task head on the pooled hidden state, or for spans on that of every token."""

    def __init__(self, config: EncoderConfig, head: TaskHead, *, rngs: nnx.Rngs):
        d = config.embed
        if head.dense is not None:
            self.dense = Affine((d, d), (d,), rngs=rngs)
        self.out = Affine((d, len(head.labels)), (len(head.labels),), rngs=rngs)
        self.activation = head.dense
        self.pooling = head.pooling
        self.rate = 0.0 if head.spans else config.head_dropout  # BERT's own head for SQuAD drops nothing

    def __call__(
        self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"], key: Array | None
    ) -> Float[Array, "b l"] | Float[Array, "b l t"]:
        hidden = hidden.astype(jnp.float32)
        if self.pooling == "none":
            pooled = hidden
        elif self.pooling == "mean":
            tokens = jnp.maximum(mask.sum(1, keepdims=True), 1).astype(jnp.float32)
            pooled = jnp.where(mask[..., None], hidden, 0.0).sum(1) / tokens
        else:
            pooled = hidden[:, 0]
        if self.activation is not None:
            pooled = ACTIVATIONS[self.activation](self.dense(pooled))
        logits = self.out(dropout(pooled, self.rate, key))
        return jnp.where(mask[:, None], logits.swapaxes(1, 2), NOWHERE) if self.pooling == "none" else logits


def _without_heads(config: EncoderConfig) -> EncoderConfig:
    return replace(config, task_heads=(), raw="")


@lru_cache
def _embeddings(config: EncoderConfig) -> Part:
    return describe(lambda rngs: Embeddings(config, rngs=rngs))


@lru_cache
def _block(config: EncoderConfig) -> Part:
    return describe(lambda rngs: Block(config, rngs=rngs))


@lru_cache
def _classifier(config: EncoderConfig, head: TaskHead) -> Part:
    return describe(lambda rngs: Classifier(config, head, rngs=rngs))


def stacks(config: EncoderConfig) -> tuple[Stack, ...]:
    """The stacks of layers; see `Model.stacks`."""
    return (Stack("", config.layers, ("layers",)),)


def tied_places(config: EncoderConfig) -> tuple[tuple[Path, ...], ...]:
    """There are none; see `Model.tied_places`."""
    return ()


def embed_places(config: EncoderConfig, stack: str) -> Places:
    """Where the parameters are that `embed` reads; see `Model.embed_places`."""
    return ("embeddings",)


def readout_places(config: EncoderConfig, head: TaskHead) -> Places:
    """Where the parameters are that `readout` reads; see `Model.readout_places`."""
    return ("heads", head.name)


def embed(
    config: EncoderConfig,
    params: Params,
    batch: Mapping[str, Array],
    stack: str,
    before: State | None,
    key: Array | None,
) -> Array:
    """The embedding output `[b, t, d]`; see `Model.embed`."""
    ids = batch["input_ids"]
    segments = batch.get("token_type_ids", jnp.zeros_like(ids))
    if config.first_position:  # RoBERTa counts the tokens that are not padding
        real = (ids != config.pad_id).astype(jnp.int32)
        positions = jnp.cumsum(real, axis=1) * real + config.pad_id
    else:
        positions = jnp.arange(ids.shape[1])[None]
    module = bind(_embeddings(_without_heads(config)), params)
    return dropout(module(ids, positions, segments), config.hidden_dropout, key)


def block(
    config: EncoderConfig,
    params: Params,
    hidden: Array,
    mask: Array,
    gates: Gates,
    means: Gates,
    tokens: TokenReduction,
    key: Array | None,
    scores: bool,
    known: Mapping[str, Array],
) -> tuple[Array, dict[str, Array]]:
    """One layer; see `Model.block`."""
    module = bind(_block(_without_heads(config)), params)

    def gated(name: str, values: Array) -> Array:
        return gate(known.get(name, values), gates.get(name), means.get(name), mask, tokens)

    first, second = (None, None) if key is None else jax.random.split(key)
    scale = config.head_dim**-0.5  # Vaswani et al. 2017, eq. 1; removing query channels does not change it
    hidden, attention = module.attention(hidden, mask, scale, gated, first, scores)
    hidden, ffn = module.ffn(hidden, gated, second)
    return hidden, attention | ffn


def readout(
    config: EncoderConfig, params: Params, hidden: Array, mask: Array, head: TaskHead, key: Array | None
) -> Array:
    """The logits `[b, l]`, of spans `[b, 2, t]`; see `Model.readout`."""
    return bind(_classifier(_without_heads(config), head), params)(hidden, mask, key)


def initialise(config: EncoderConfig, key: Array) -> Params:
    """Random parameters of the whole model."""
    first, last, *rest = jax.random.split(key, 2 + config.layers)
    block = lambda rngs: Block(config, rngs=rngs)  # noqa: E731  one for all layers
    params = {
        "embeddings": initialise_part(lambda rngs: Embeddings(config, rngs=rngs), first),
        "layers": {i: initialise_part(block, k) for i, k in enumerate(rest)},
    }
    if config.task_heads:
        keys = jax.random.split(last, len(config.task_heads))
        heads = zip(config.task_heads, keys, strict=True)
        params["heads"] = {head.name: initialise_head(config, head, k) for head, k in heads}
    return params


def initialise_head(config: EncoderConfig, head: TaskHead, key: Array) -> Params:
    """Random parameters of one task head."""
    return initialise_part(lambda rngs: Classifier(config, head, rngs=rngs), key)


def checkpoint_names(config: EncoderConfig) -> dict[Path, tuple[str, str]]:
    """Where every parameter stands in a Hugging Face checkpoint, without the optional base prefix.

    Returns:
        Path to (name, kind). Kinds: `copy`; `linear` ([out, in] there, [in, out] here); `split_out` and `split_bias`
        (heads and head size are one axis there); `merge_in` (the same on the input side).
    """
    distil = config.model_type == "distilbert"
    layer = "transformer.layer.{}." if distil else "encoder.layer.{}."
    names: dict[Path, tuple[str, str]] = {
        ("embeddings", "word", "embedding"): ("embeddings.word_embeddings.weight", "copy"),
        ("embeddings", "position", "embedding"): ("embeddings.position_embeddings.weight", "copy"),
        ("embeddings", "norm", "scale"): ("embeddings.LayerNorm.weight", "copy"),
        ("embeddings", "norm", "bias"): ("embeddings.LayerNorm.bias", "copy"),
    }
    if config.segments:
        names["embeddings", "token_type", "embedding"] = ("embeddings.token_type_embeddings.weight", "copy")
    for i in range(config.layers):
        for module, theirs, weight, bias in _DISTILBERT_LAYER if distil else _BERT_LAYER:
            path, name = ("layers", i, *module.split(".")), layer.format(i) + theirs
            leaf = "scale" if weight == "copy" else "kernel"
            names[*path, leaf] = (f"{name}.weight", weight)
            names[*path, "bias"] = (f"{name}.bias", bias)
    for head in config.task_heads:
        dense, out = _HEAD_NAMES["spans" if head.spans else config.model_type]
        for module, name in (("dense", dense), ("out", out)):
            if module == "out" or head.dense is not None:
                names["heads", head.name, module, "kernel"] = (f"{name}.weight", "linear")
                names["heads", head.name, module, "bias"] = (f"{name}.bias", "copy")
    return names


def ignored_names(config: EncoderConfig) -> tuple[str, ...]:
    """Patterns of tensors that checkpoints carry and that are no part of the encoder and its task head."""
    always = ("embeddings.position_ids", "cls.*", "lm_head.*", "vocab_*")
    pooler_is_ours = config.model_type == "bert" and any(head.dense is not None for head in config.task_heads)
    return always if pooler_is_ours else (*always, "pooler.*")


_BERT_LAYER = (  # our module, their name, kind of the weight, kind of the bias
    ("attention.query", "attention.self.query", "split_out", "split_bias"),
    ("attention.key", "attention.self.key", "split_out", "split_bias"),
    ("attention.value", "attention.self.value", "split_out", "split_bias"),
    ("attention.out", "attention.output.dense", "merge_in", "copy"),
    ("attention.norm", "attention.output.LayerNorm", "copy", "copy"),
    ("ffn.up", "intermediate.dense", "linear", "copy"),
    ("ffn.down", "output.dense", "linear", "copy"),
    ("ffn.norm", "output.LayerNorm", "copy", "copy"),
)
_DISTILBERT_LAYER = (
    ("attention.query", "attention.q_lin", "split_out", "split_bias"),
    ("attention.key", "attention.k_lin", "split_out", "split_bias"),
    ("attention.value", "attention.v_lin", "split_out", "split_bias"),
    ("attention.out", "attention.out_lin", "merge_in", "copy"),
    ("attention.norm", "sa_layer_norm", "copy", "copy"),
    ("ffn.up", "ffn.lin1", "linear", "copy"),
    ("ffn.down", "ffn.lin2", "linear", "copy"),
    ("ffn.norm", "output_layer_norm", "copy", "copy"),
)
_HEAD_NAMES = {  # the layer before the output, the output
    "bert": ("pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
    "spans": ("", "qa_outputs"),  # of all of them: there is no layer before the output
}

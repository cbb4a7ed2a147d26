"""The BERT family: `bert`, `roberta`, `xlm-roberta` and `distilbert` encoders with heads for labels and for spans.

Devlin et al. 2019, Liu et al. 2019, Conneau et al. 2020, Sanh et al. 2019. They share post-norm blocks and differ in
position indices, segment embeddings, the layer before the classifier and the names in their checkpoints.

What a BERT-family configuration says, and what of it is supported.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxprune.models import ENDS, NOWHERE, Model, Places, Stack, State, TaskHead
from jaxprune.models.layers import (
    ACTIVATIONS,
    Affine,
    Embedding,
    LayerNorm,
    Part,
    TokenReduction,
    attend,
    attention_sites,
    bind,
    describe,
    dropout,
    gate,
)
from jaxprune.models.layers import initialise as initialise_part
from jaxprune.units import Gates, Params, Path


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the architecture is. Sizes are those of fresh parameters; running a model reads them from the arrays."""

    model_type: str
    vocab: int
    positions: int
    segments: int  # 0: no segment embeddings
    embed: int
    layers: int
    attention_heads: int
    neurons: int
    activation: str
    eps: float
    pad_id: int
    first_position: int  # index of the first token's position
    hidden_dropout: float
    attention_dropout: float
    head_dropout: float
    task_heads: tuple[TaskHead, ...]
    raw: str  # the Hugging Face configuration as read, canonical JSON

    answers_in_text: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    @property
    def max_length(self) -> int:
        """The most tokens an example may have."""
        return self.positions - self.first_position

    @property
    def head_dim(self) -> int:
        """The size of a head, before any of its channels is removed."""
        return self.embed // self.attention_heads


def parse_config(raw: Mapping[str, Any], task_heads: tuple[TaskHead, ...] | None = None) -> EncoderConfig:
    """Reads a Hugging Face configuration.

    Args:
        raw: The content of `config.json`, without a `jaxprune` section.
        task_heads: The heads; None reads the one of a `...ForSequenceClassification` or `...ForQuestionAnswering`
            model, if it is one.

    Raises:
        ValueError: Listing every value that is missing or not supported.
    """
    kind = raw["model_type"]
    names = _DISTILBERT_NAMES if kind == "distilbert" else _BERT_NAMES
    value = {ours: raw.get(theirs, _DEFAULTS.get(theirs)) for ours, theirs in names.items()}
    wrong = [f"{name} is missing" for name in names.values() if name not in raw and name not in _DEFAULTS]
    wrong += [
        f"{name} is {raw[name]!r}, supported: {', '.join(map(repr, values))}"
        for name, values in _SUPPORTED.items()
        if name in raw and raw[name] not in values
    ]

    def expect(name: str, found: Any, fits: bool, expected: str) -> None:
        if not fits and f"{name} is missing" not in wrong:
            wrong.append(f"{name} is {found!r}, expected {expected}")

    for ours in ("vocab", "positions", "embed", "layers", "attention_heads", "neurons"):
        expect(names[ours], value[ours], _is_count(value[ours]) and value[ours] > 0, "a positive integer")
    head_dropout_name = "seq_classif_dropout" if kind == "distilbert" else "classifier_dropout"
    head_dropout = raw.get(head_dropout_name, _DEFAULTS.get(head_dropout_name))
    head_dropout = value["hidden_dropout"] if head_dropout is None else head_dropout
    rates = {names[ours]: value[ours] for ours in ("hidden_dropout", "attention_dropout")}
    for name, rate in (rates | {head_dropout_name: head_dropout}).items():
        expect(name, rate, _is_number(rate) and 0 <= rate < 1, "a number in [0, 1)")
    activation = value["activation"]
    known = isinstance(activation, str) and activation in ACTIVATIONS
    expect(names["activation"], activation, known, f"one of {', '.join(ACTIVATIONS)}")
    eps = 1e-12 if kind == "distilbert" else raw.get("layer_norm_eps", 1e-12)  # DistilBERT's is not a setting
    expect("layer_norm_eps", eps, _is_number(eps) and 0 < eps < 1, "a small positive number")
    segments = 0 if kind == "distilbert" else raw.get("type_vocab_size", 2)
    expect("type_vocab_size", segments, _is_count(segments), "a number of segments")
    counts_from_padding = kind in ("roberta", "xlm-roberta")
    pad_id = raw.get("pad_token_id", 1 if counts_from_padding else 0)
    if pad_id is None and not counts_from_padding:
        pad_id = 0  # a model without padding: only RoBERTa's positions depend on it
    expect("pad_token_id", pad_id, _is_count(pad_id), "a token index")
    value.update(pad_id=pad_id)
    first_position = 0
    if not wrong:
        first_position = value["pad_id"] + 1 if counts_from_padding else 0
        heads = value["attention_heads"]
        expect("pad_token_id", pad_id, value["pad_id"] < value["vocab"], f"one of the {value['vocab']} tokens")
        expect(names["positions"], value["positions"], value["positions"] > first_position, f"over {first_position}")
        expect(names["embed"], value["embed"], value["embed"] % heads == 0, f"a multiple of the {heads} heads")
    if task_heads is None and not wrong:
        task_heads, refused = _head_of(raw)
        wrong += refused
    if wrong:
        raise ValueError(f"config.json of a {kind} model cannot be used: {'; '.join(wrong)}.")
    config = EncoderConfig(
        model_type=kind,
        **value,
        segments=segments,
        eps=float(eps),
        first_position=first_position,
        head_dropout=float(head_dropout),
        task_heads=(),
        raw=json.dumps(raw, sort_keys=True),
    )
    return with_heads(config, task_heads or ())


_BERT_NAMES = {
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "attention_heads": "num_attention_heads",
    "neurons": "intermediate_size",
    "activation": "hidden_act",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_DISTILBERT_NAMES = _BERT_NAMES | {
    "embed": "dim",
    "layers": "n_layers",
    "attention_heads": "n_heads",
    "neurons": "hidden_dim",
    "activation": "activation",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
}
_DEFAULTS = {  # what Hugging Face assumes where a file does not say
    "hidden_act": "gelu",
    "activation": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "max_position_embeddings": 512,
}
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # settings that change what is computed
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "problem_type": (None, "single_label_classification", "regression"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _head_of(raw: Mapping[str, Any]) -> tuple[tuple[TaskHead, ...], list[str]]:
    """The task head of a Hugging Face model, named "default", and what is wrong with its description."""
    if "ForQuestionAnswering" in str(raw.get("architectures")):
        return (TaskHead(name="default", labels=ENDS, pooling="none"),), []
    if "ForSequenceClassification" not in str(raw.get("architectures")):
        return (), []
    names, count = raw.get("id2label"), raw.get("num_labels", 2)
    if not names and not (_is_count(count) and count < 2**20):  # beyond, they are not made up before they are found
        return (), [f"num_labels is {count!r}, expected a number of labels below {2**20:,}"]
    names = names or {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(names, Mapping):
        return (), [f"id2label is {names!r}, expected an object from index to label"]
    if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        return (), [f"id2label has the keys {sorted(names)}, expected 0 to {len(names) - 1}"]
    by_index = {int(i): str(label) for i, label in names.items()}
    labels = tuple(by_index[i] for i in range(len(by_index)))
    problem = raw.get("problem_type")
    regression = problem == "regression" or (problem is None and len(labels) == 1)
    if regression and len(labels) != 1:
        return (), [f"problem_type is regression with {len(labels)} outputs, supported: 1"]
    dense = "relu" if raw["model_type"] == "distilbert" else "tanh"
    return (TaskHead(name="default", labels=labels, regression=regression, dense=dense),), []


def with_heads(config: EncoderConfig, task_heads: tuple[TaskHead, ...]) -> EncoderConfig:
    """The same architecture with other task heads.

    Raises:
        ValueError: If two heads share a name or a head is not usable.
    """
    names = Counter(head.name for head in task_heads)
    for head in task_heads:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", head.name) or names[head.name] > 1:
            raise ValueError(
                f"task head {head.name!r}: names must differ and be made of letters, digits, _ and -, letter first."
            )
        if not head.labels or (head.regression and len(head.labels) != 1):
            raise ValueError(f"task head {head.name!r} has {len(head.labels)} labels.")
        if head.pooling not in ("first", "mean", "none"):
            raise ValueError(
                f"task head {head.name!r}: pooling must be 'first', 'mean' or 'none', got {head.pooling!r}."
            )
        if head.spans and (head.labels != ENDS or head.regression):
            raise ValueError(f"task head {head.name!r} is for spans: its labels are {ENDS}, got {head.labels}.")
        if head.dense is not None and head.dense not in ACTIVATIONS:
            raise ValueError(f"task head {head.name!r}: dense must be None or an activation, got {head.dense!r}.")
    return replace(config, task_heads=tuple(task_heads))


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

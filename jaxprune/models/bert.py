"""The BERT family of encoders, with heads for labels and for spans: `MODEL_TYPES` lists its types.

Devlin et al. 2019, Liu et al. 2019, Conneau et al. 2020, Sanh et al. 2019; with the arrays of BERT also ERNIE (Sun et
al. 2020) and ELECTRA (Clark et al. 2020), with those of RoBERTa CamemBERT (Martin et al. 2020) and data2vec (Baevski et
al. 2022). They share post-norm blocks and differ in position indices, segment embeddings, the layer before the
classifier and the names in their checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxprune.models.layers import (
    ACTIVATIONS,
    ENDS,
    Affine,
    Classifier,
    ConfigReader,
    Embedding,
    LayerNorm,
    Part,
    Sites,
    TaskHead,
    attend,
    bind,
    check_heads,
    describe,
    dropout,
    dropout_of,
    is_count,
)
from jaxprune.models.layers import initialise as initialise_part
from jaxprune.models.running import Mask, Places, Stack, State
from jaxprune.units import Params, Path, TakesGate


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The architecture. Sizes are those of fresh parameters; running a model reads them from the arrays."""

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
    kind, reader = raw["model_type"], ConfigReader(raw, _SUPPORTED)
    distil, counts_from_padding = kind == "distilbert", kind in _ROBERTAS
    names = _DISTILBERT_NAMES if distil else _BERT_NAMES
    value = {size: reader.size(names[size]) for size in ("vocab", "embed", "layers", "attention_heads", "neurons")}
    value["positions"] = reader.size(names["positions"], 512)
    value |= {rate: reader.rate(names[rate], 0.1) for rate in ("hidden_dropout", "attention_dropout")}
    head_dropout = raw.get(names["head_dropout"], 0.2 if distil else None)
    head_dropout = value["hidden_dropout"] if head_dropout is None else reader.rate(names["head_dropout"], head_dropout)
    value["activation"] = reader.activation(names["activation"], "gelu")
    eps = 1e-12 if distil else reader.eps("layer_norm_eps", 1e-12)  # DistilBERT's is not a setting
    segments = 0 if distil else reader.get("type_vocab_size", is_count, "a number of segments", 2)
    given: Any = raw.get("pad_token_id", int(counts_from_padding))
    pad_id: Any = 0 if not counts_from_padding and given is None else given  # only RoBERTa's positions depend on it
    reader.expect("pad_token_id", pad_id, is_count(pad_id), "a token index")
    if kind == "electra":  # smaller ones have a projection between the embeddings and the layers
        width, embed = reader.size("embedding_size", 128), value["embed"]
        reader.expect("embedding_size", width, width == embed, f"hidden_size, {embed}: projections are not supported")
    first_position = 0
    if not reader.problems:
        first_position = int(pad_id) + 1 if counts_from_padding else 0
        vocab, positions, heads = value["vocab"], value["positions"], value["attention_heads"]
        reader.expect("pad_token_id", pad_id, pad_id < vocab, f"one of the {vocab} tokens")
        reader.expect(names["positions"], positions, positions > first_position, f"over {first_position}")
        reader.expect(names["embed"], value["embed"], value["embed"] % heads == 0, f"a multiple of the {heads} heads")
    if task_heads is None and not reader.problems:
        task_heads, refused = _head_of(raw)
        reader.problems += refused
    reader.check()
    config = EncoderConfig(
        model_type=kind,
        **value,
        segments=segments,
        eps=float(eps),
        pad_id=int(pad_id),
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
    "head_dropout": "classifier_dropout",
}
_DISTILBERT_NAMES = _BERT_NAMES | {
    "embed": "dim",
    "layers": "n_layers",
    "attention_heads": "n_heads",
    "neurons": "hidden_dim",
    "activation": "activation",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "head_dropout": "seq_classif_dropout",
}
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # settings that change what is computed
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "use_task_id": (False, None),  # of ERNIE: embeddings of tasks
    "problem_type": (None, "single_label_classification", "regression"),
}


def _head_of(raw: Mapping[str, Any]) -> tuple[tuple[TaskHead, ...], list[str]]:
    """The task head of a Hugging Face model, named "default", and the problems of its description."""
    if "ForQuestionAnswering" in str(raw.get("architectures")):
        return (TaskHead(name="default", labels=ENDS, pooling="none"),), []
    if "ForSequenceClassification" not in str(raw.get("architectures")):
        return (), []
    names, count = raw.get("id2label"), raw.get("num_labels", 2)
    if not names and not (is_count(count) and count < 2**20):  # beyond, they are not made up before they are found
        return (), [f"num_labels is {count!r}, expected a number of labels below {2**20:,}"]
    names = names or {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(names, Mapping):
        return (), [f"id2label is {names!r}, expected an object from index to label"]
    if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        return (), [f"id2label has the keys {sorted(names)}, expected 0 to {len(names) - 1}"]
    if odd := [type(label).__name__ for label in names.values() if type(label) not in (str, int, float)]:
        return (), [f"id2label has a label of type {odd[0]}, expected text"]
    by_index = {int(i): str(label) for i, label in names.items()}
    labels = tuple(by_index[i] for i in range(len(by_index)))
    problem = raw.get("problem_type")
    regression = problem == "regression" or (problem is None and len(labels) == 1)
    if regression and len(labels) != 1:
        return (), [f"problem_type is regression with {len(labels)} outputs, supported: 1"]
    dense = {"distilbert": "relu", "electra": "gelu"}.get(raw["model_type"], "tanh")
    return (TaskHead(name="default", labels=labels, regression=regression, dense=dense),), []


def with_heads(config: EncoderConfig, task_heads: tuple[TaskHead, ...]) -> EncoderConfig:
    """The same architecture with other task heads; see `Model.with_heads`."""
    check_heads(task_heads)
    return replace(config, task_heads=tuple(task_heads))


PREFIXES = {
    "bert": "bert.",
    "ernie": "ernie.",
    "electra": "electra.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "camembert": "roberta.",
    "data2vec-text": "data2vec_text.",
    "distilbert": "distilbert.",
}
MODEL_TYPES = tuple(PREFIXES)
_ROBERTAS = ("roberta", "xlm-roberta", "camembert", "data2vec-text")  # count positions from the padding's index

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
    "layers.*.attention.query.kernel": TakesGate(("embed", "heads", "query_channels")),
    "layers.*.attention.query.bias": TakesGate(("heads", "query_channels")),
    "layers.*.attention.key.kernel": ("embed", "heads", "query_channels"),
    "layers.*.attention.key.bias": ("heads", "query_channels"),
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
    """Self-attention over the remaining heads, then the residual and its norm."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        d, n, h = config.embed, config.attention_heads, config.head_dim
        self.query = Affine((d, n, h), (n, h), rngs=rngs)
        self.key = Affine((d, n, h), (n, h), rngs=rngs)
        self.value = Affine((d, n, h), (n, h), rngs=rngs)
        self.out = Affine((n, h, d), (d,), rngs=rngs)
        self.norm = LayerNorm(d, config.eps)
        self.rates = (config.attention_dropout, 0.0 if config.model_type == "distilbert" else config.hidden_dropout)

    def __call__(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "b t"], scale: float, sites: Sites, key: Array | None
    ) -> Float[Array, "b t d"]:
        inner, outer = (None, None) if key is None else jax.random.split(key)
        if self.query.kernel.shape[1] == 0:  # no head is left: the output's bias is all that stays
            b, t, _ = x.shape
            query, mixed = (jnp.zeros((b, t, 0, side.kernel.shape[2]), x.dtype) for side in (self.query, self.value))
            raw, y = jnp.zeros((b, 0, t, t), jnp.float32), jnp.broadcast_to(self.out.bias[...], x.shape).astype(x.dtype)
        else:
            query = sites.gate("attention.query_channels", self.query(x))
            mixed, raw = attend(
                query,
                self.key(x),
                self.value(x),
                mask,
                scale=scale,
                drop=dropout_of(self.rates[0], inner),
                scores=sites.wants("attention.scores"),
            )
            mixed = sites.gate("attention.channels", sites.gate("attention.heads", mixed))
            y = self.out(mixed)
        sites.keep_attention("attention", query, mixed, raw, mask)
        sites.keep("attention.residual", x)
        return self.norm(x + dropout(y, self.rates[1], outer))


class FeedForward(nnx.Module):
    """Two affine maps with a non-linearity between them, then the residual and its norm."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        d, f = config.embed, config.neurons
        self.up = Affine((d, f), (f,), rngs=rngs)
        self.down = Affine((f, d), (d,), rngs=rngs)
        self.norm = LayerNorm(d, config.eps)
        self.activation = config.activation
        self.rate = config.hidden_dropout

    def __call__(self, x: Float[Array, "b t d"], sites: Sites, key: Array | None) -> Float[Array, "b t d"]:
        if self.up.kernel.shape[1] == 0:  # no neuron is left: the output's bias is all that stays
            inner = jnp.zeros((*x.shape[:2], 0), x.dtype)
            y = jnp.broadcast_to(self.down.bias[...], x.shape).astype(x.dtype)
        else:
            inner = sites.gate("ffn.neurons", ACTIVATIONS[self.activation](self.up(x)))
            y = self.down(inner)
        sites.keep("ffn.neurons", inner)
        sites.keep("ffn.residual", x)
        return self.norm(x + dropout(y, self.rate, key))


class Block(nnx.Module):
    """One layer: attention, then the feed-forward network."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)


def _without_heads(config: EncoderConfig) -> EncoderConfig:
    return replace(config, task_heads=(), raw="")


@lru_cache
def _embeddings(config: EncoderConfig) -> Part:
    return describe(lambda rngs: Embeddings(config, rngs=rngs))


@lru_cache
def _block(config: EncoderConfig) -> Part:
    return describe(lambda rngs: Block(config, rngs=rngs))


def _make_classifier(config: EncoderConfig, head: TaskHead, rngs: nnx.Rngs) -> Classifier:
    return Classifier(config.embed, head, config.head_dropout, rngs=rngs)


@lru_cache
def _classifier(config: EncoderConfig, head: TaskHead) -> Part:
    return describe(lambda rngs: _make_classifier(config, head, rngs))


# The functions of a family, which `Model` calls


def stacks(config: EncoderConfig) -> tuple[Stack, ...]:
    """The stacks of layers; see `Model.stacks`."""
    inputs = ("input_ids", "attention_mask", "token_type_ids", "answerable")
    return (Stack("", ("layers",), ("",) * config.layers, inputs),)


def tied_places(config: EncoderConfig) -> tuple[tuple[Path, ...], ...]:
    """There are none; see `Model.tied_places`."""
    return ()


def embed_places(config: EncoderConfig, stack: str) -> Places:
    """The places of the parameters that `embed` reads; see `Model.embed_places`."""
    return ("embeddings",)


def readout_places(config: EncoderConfig, head: TaskHead) -> Places:
    """The places of the parameters that `readout` reads; see `Model.readout_places`."""
    return ("heads", head.name)


def products(path: Path, lengths: tuple[float, ...]) -> tuple[float, float, float]:
    """The number of products of a kernel; see `Model.products`."""
    (tokens,) = lengths
    return tokens, tokens, tokens if "attention" in path else 0.0


def embed(
    config: EncoderConfig,
    params: Params,
    batch: Mapping[str, Array],
    stack: str,
    before: State | None,
    key: Array | None,
) -> State:
    """The embedding output `[b, t, d]`; see `Model.embed`."""
    ids = batch["input_ids"]
    segments = batch.get("token_type_ids", jnp.zeros_like(ids))
    if config.first_position:  # RoBERTa counts the tokens that are not padding
        real = (ids != config.pad_id).astype(jnp.int32)
        positions = jnp.cumsum(real, axis=1) * real + config.pad_id
    else:
        positions = jnp.arange(ids.shape[1])[None]
    module = bind(_embeddings(_without_heads(config)), params)
    return State(dropout(module(ids, positions, segments), config.hidden_dropout, key))


def block(
    config: EncoderConfig, kind: str, params: Params, state: State, mask: Mask, sites: Sites, key: Array | None
) -> State:
    """One layer; see `Model.block`."""
    module = bind(_block(_without_heads(config)), params)
    first, second = (None, None) if key is None else jax.random.split(key)
    scale = config.head_dim**-0.5  # Vaswani et al. 2017, eq. 1; removing query channels does not change it
    hidden = module.attention(state.hidden, mask.tokens, scale, sites, first)
    return State(module.ffn(hidden, sites, second))


def readout(
    config: EncoderConfig, params: Params, state: State, mask: Mask, head: TaskHead, key: Array | None
) -> Array:
    """The logits `[b, l]`, of spans `[b, 2, t]`; see `Model.readout`."""
    return bind(_classifier(_without_heads(config), head), params)(state.hidden, mask.tokens, key)


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
    return initialise_part(lambda rngs: _make_classifier(config, head, rngs), key)


def checkpoint_names(config: EncoderConfig) -> dict[Path, tuple[str, str]]:
    """The places of all parameters in a Hugging Face checkpoint, without the optional base prefix.

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
        for module, weight, bias, *theirs in _LAYER:
            path, name = ("layers", i, *module.split(".")), layer.format(i) + theirs[distil]
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
    """Patterns of tensors in checkpoints that no model reads: a buffer. Heads of the pre-training are named."""
    return ("embeddings.position_ids",)


_LAYER = (  # our module, kind of its weight, kind of its bias, its name in BERT's checkpoints and in DistilBERT's
    ("attention.query", "split_out", "split_bias", "attention.self.query", "attention.q_lin"),
    ("attention.key", "split_out", "split_bias", "attention.self.key", "attention.k_lin"),
    ("attention.value", "split_out", "split_bias", "attention.self.value", "attention.v_lin"),
    ("attention.out", "merge_in", "copy", "attention.output.dense", "attention.out_lin"),
    ("attention.norm", "copy", "copy", "attention.output.LayerNorm", "sa_layer_norm"),
    ("ffn.up", "linear", "copy", "intermediate.dense", "ffn.lin1"),
    ("ffn.down", "linear", "copy", "output.dense", "ffn.lin2"),
    ("ffn.norm", "copy", "copy", "output.LayerNorm", "output_layer_norm"),
)
_HEAD_NAMES = {  # the layer before the output, the output
    **dict.fromkeys((*_ROBERTAS, "electra"), ("classifier.dense", "classifier.out_proj")),
    **dict.fromkeys(("bert", "ernie"), ("pooler.dense", "classifier")),
    "distilbert": ("pre_classifier", "classifier"),
    "spans": ("", "qa_outputs"),  # of all of them: there is no layer before the output
}


# What other programs read: all layers have the same widths there

IDLE = False  # a layer without units still normalises
_CLASSES = {
    "bert": "Bert",
    "ernie": "Ernie",
    "electra": "Electra",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "data2vec-text": "Data2VecText",
    "distilbert": "DistilBert",
}


def uniform(config: EncoderConfig, units: Mapping[str, int], layers: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The Hugging Face configuration of a model whose layers all have at least these neurons, and all heads.

    With one task head of a form that such models have, it is theirs; else the model has no head.
    """
    distil = config.model_type == "distilbert"
    raw: dict[str, Any] = {**json.loads(config.raw)}
    for name in ("id2label", "label2id", "num_labels", "problem_type"):
        raw.pop(name, None)
    raw[(_DISTILBERT_NAMES if distil else _BERT_NAMES)["neurons"]] = max(units["neurons"], 1)
    name, heads = _CLASSES[config.model_type], config.task_heads
    raw["architectures"] = [f"{name}Model"]
    if len(heads) == 1:
        (head,) = heads
        labels = (
            {}
            if head.spans
            else {
                "id2label": {str(i): label for i, label in enumerate(head.labels)},
                "label2id": {label: i for i, label in enumerate(head.labels)},
                "problem_type": "regression" if head.regression else "single_label_classification",
            }
        )
        form = f"{name}For{'QuestionAnswering' if head.spans else 'SequenceClassification'}"
        theirs, problems = _head_of(raw | labels | {"architectures": [form]})
        if not problems and (theirs[0].pooling, theirs[0].dense) == (head.pooling, head.dense):
            raw |= labels | {"architectures": [form]}
    return raw


def aligned(config: EncoderConfig, params: Params) -> Params:
    """The parameters: no two layers share any that depend on their units."""
    return params

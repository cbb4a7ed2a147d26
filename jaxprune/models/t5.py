"""The T5 family: encoder-decoders that answer in text (`t5`, which covers T5 1.0, T5 1.1 and FLAN-T5, and `mt5`).

Raffel et al. 2020, Xue et al. 2021, Chung et al. 2022. Pre-norm layers without biases, attention that is not scaled and
adds a bias for the relative position. Hugging Face keeps one table of these biases per stack; here every layer has its
own copy, so that a head that is removed takes its column along.

Types: float32 and bfloat16. float16 overflows in the feed-forward networks of the larger checkpoints: a file may hold
it, nothing is computed in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxprune.models.layers import (
    ACTIVATIONS,
    ConfigReader,
    Embedding,
    Linear,
    Part,
    RMSNorm,
    Sites,
    TaskHead,
    attend,
    bind,
    describe,
    dropout,
    dropout_of,
    is_count,
    product,
    sum_tokens,
)
from jaxprune.models.layers import initialise as initialise_part
from jaxprune.models.running import Cache, KeysValues, Mask, Places, Stack, State
from jaxprune.units import Intervention, Params, Path, TakesGate, axes_of, flatten, unflatten

MAX_LENGTH = 1 << 20  # tokens; relative positions know no end, this only refuses nonsense


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The architecture. Sizes are those of fresh parameters; running a model reads them from the arrays."""

    model_type: str
    vocab: int
    embed: int
    head_dim: int
    attention_heads: int
    neurons: int
    encoder_layers: int
    decoder_layers: int
    buckets: int  # of relative positions
    max_distance: int  # tokens; all beyond share a bucket
    activation: str
    gated: bool  # whether the neurons are `activation(gating(x)) * up(x)`
    tied: bool  # whether the embeddings are the output layer too
    scaled: bool  # whether the decoder's output is divided by the square root of its size
    eps: float
    pad_id: int
    start_id: int  # the decoder's first input
    end_id: int
    dropout: float
    raw: str  # the Hugging Face configuration as read, canonical JSON

    task_heads: tuple[TaskHead, ...] = ()  # there are none: tasks are told apart by their prompts

    answers_in_text: ClassVar[bool] = True
    ends_answers: ClassVar[bool] = True  # with a token of its own

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return (self.end_id,)

    @property
    def layers(self) -> int:
        """The layers of the deeper stack."""
        return max(self.encoder_layers, self.decoder_layers)

    @property
    def segments(self) -> int:
        """There are no segment embeddings."""
        return 0

    @property
    def max_length(self) -> int:
        """The most tokens an example may have."""
        return MAX_LENGTH


_NAMES = {
    "vocab": "vocab_size",
    "embed": "d_model",
    "head_dim": "d_kv",
    "attention_heads": "num_heads",
    "neurons": "d_ff",
    "encoder_layers": "num_layers",
}
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # settings that change what is computed
    "is_decoder": (False, None),
    "is_encoder_decoder": (True, None),
    "pruned_heads": ({}, None),
}


def parse_config(raw: Mapping[str, Any], task_heads: tuple[TaskHead, ...] | None = None) -> T5Config:
    """Reads a Hugging Face configuration.

    Args:
        raw: The content of `config.json`, without a `jaxprune` section.
        task_heads: Must be empty or None: a text-to-text model has none.

    Raises:
        ValueError: Listing every value that is missing or not supported.
    """
    kind, reader = raw["model_type"], ConfigReader(raw, _SUPPORTED)
    value = {ours: reader.size(theirs) for ours, theirs in _NAMES.items()}
    decoder_layers = raw.get("num_decoder_layers")
    layers = value["encoder_layers"] if decoder_layers is None else reader.size("num_decoder_layers")
    buckets_name, distance_name = "relative_attention_num_buckets", "relative_attention_max_distance"
    buckets, distance = reader.size(buckets_name, 32), reader.size(distance_name, 128)
    reader.expect(buckets_name, buckets, is_count(buckets) and buckets > 0 and buckets % 4 == 0, "a multiple of 4")
    if is_count(buckets) and is_count(distance):
        reader.expect(distance_name, distance, distance > buckets // 2, "more than half of the buckets")
    rate, eps = reader.rate("dropout_rate", 0.1), reader.eps("layer_norm_epsilon", 1e-6)
    projection = raw.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    gated, activation = str(projection).startswith("gated-"), str(projection).removeprefix("gated-")
    activation = "gelu_new" if projection == "gated-gelu" else activation  # the approximation by tanh, as in T5 1.1
    known = f"one of {', '.join(ACTIVATIONS)}, or gated-…"
    reader.expect("feed_forward_proj", projection, activation in ACTIVATIONS, known)

    def token(name: str, default: Any) -> Any:
        fits = lambda index: is_count(index) and (not is_count(value["vocab"]) or index < value["vocab"])  # noqa: E731
        return reader.get(name, fits, "the index of a token", default)

    pad_id, end_id = token("pad_token_id", 0), token("eos_token_id", 1)
    start_id = token("decoder_start_token_id", raw.get("pad_token_id", 0))
    tied = raw.get("tie_word_embeddings", True)
    reader.expect("tie_word_embeddings", tied, isinstance(tied, bool), "true or false")
    scaled = raw.get("scale_decoder_outputs")
    reader.expect("scale_decoder_outputs", scaled, scaled in (True, False, None), "true or false")
    if task_heads:
        reader.problems.append(f"it has the task heads {', '.join(head.name for head in task_heads)}, supported: none")
    reader.check()
    # T5 1.0 scales and T5 1.1 does not, which only the flag told before there was a setting; mT5 never scales.
    scaled = kind == "t5" and bool(raw.get("scale_decoder_outputs", tied))
    return T5Config(
        model_type=kind,
        **value,
        decoder_layers=layers,
        buckets=buckets,
        max_distance=distance,
        activation=activation,
        gated=gated,
        tied=tied,
        scaled=scaled,
        eps=float(eps),
        pad_id=pad_id,
        start_id=start_id,
        end_id=end_id,
        dropout=float(rate),
        raw=json.dumps(raw, sort_keys=True),
    )


def with_heads(config: T5Config, task_heads: tuple[TaskHead, ...]) -> T5Config:
    """The configuration itself.

    Raises:
        ValueError: If there are task heads.
    """
    if task_heads:
        raise ValueError(
            f"a {config.model_type} model answers in text and has no task heads, got "
            f"{', '.join(head.name for head in task_heads)}: give the task a prompt instead."
        )
    return config


MODEL_TYPES = ("t5", "mt5")
PREFIXES = {"t5": "", "mt5": ""}

_ATTENTION = {
    "out.kernel": ("heads", "channels", "embed"),
    "norm.scale": ("embed",),
    "value.kernel": ("embed", "heads", "channels"),
    "query.kernel": TakesGate(("embed", "heads", "query_channels")),
    "key.kernel": ("embed", "heads", "query_channels"),
}
_LAYER = {
    **{f"attention.{name}": axes for name, axes in _ATTENTION.items()},
    "attention.relative.embedding": ("buckets", "heads"),
    **{f"cross.{name}": axes for name, axes in _ATTENTION.items()},
    "ffn.gating.kernel": ("embed", "neurons"),
    "ffn.up.kernel": ("embed", "neurons"),
    "ffn.down.kernel": ("neurons", "embed"),
    "ffn.norm.scale": ("embed",),
}
AXES: dict[str, tuple[str, ...]] = {
    "embeddings.word.embedding": ("vocab", "embed"),
    **{f"encoder.layers.*.{name}": axes for name, axes in _LAYER.items() if not name.startswith("cross.")},
    **{f"decoder.layers.*.{name}": axes for name, axes in _LAYER.items()},
    "*.norm.scale": ("embed",),
    "language.out.kernel": ("embed", "vocab"),
}


class Attention(nnx.Module):
    """Normalised input, attention over the remaining heads, and the residual."""

    def __init__(self, config: T5Config, name: str, *, rngs: nnx.Rngs):
        d, n, h = config.embed, config.attention_heads, config.head_dim
        self.name = name  # what the names of its sites begin with
        self.norm = RMSNorm(d, config.eps)
        self.query = Linear((d, n, h), (d * h) ** -0.5, rngs=rngs)  # attention is not scaled, so this is
        self.key = Linear((d, n, h), d**-0.5, rngs=rngs)
        self.value = Linear((d, n, h), d**-0.5, rngs=rngs)
        self.out = Linear((n, h, d), (n * h) ** -0.5, inputs=2, rngs=rngs)
        if name == "attention":  # the encoder's output has no positions relative to the decoder's
            self.relative = Embedding(config.buckets, n, d**-0.5, rngs=rngs)
        self.rate = config.dropout

    def __call__(
        self,
        x: Float[Array, "b t d"],
        memory: Float[Array, "b s d"] | None,
        mask: Bool[Array, "b *t s"],
        buckets: Array | None,
        sites: Sites,
        key: Array | None,
    ) -> Float[Array, "b t d"]:
        """The output; `memory` is attended to, or if it is None the input itself.

        A memory of fewer rows is that of several rows each, which are next to each other: it is read once for them.
        """
        y = self.norm(x)
        query = self.query(y)  # first: gradients are added up in this order
        read = self.read(y if memory is None else memory)
        if memory is not None and memory.shape[0] < x.shape[0]:
            read = KeysValues(*(jnp.repeat(each, x.shape[0] // memory.shape[0], axis=0) for each in read))
        return self.mix(x, query, read, mask, buckets, sites, key)

    def read(self, x: Float[Array, "b s d"]) -> KeysValues:
        """The keys and values to attend to."""
        return KeysValues(self.key(x), self.value(x))

    def mix(
        self,
        x: Float[Array, "b t d"],
        query: Float[Array, "b t n h"],
        read: KeysValues,
        mask: Bool[Array, "b *t s"],
        buckets: Array | None,
        sites: Sites,
        key: Array | None = None,
    ) -> Float[Array, "b t d"]:
        """The output of the module, given its queries, keys and values."""
        inner, outer = (None, None) if key is None else jax.random.split(key)
        b, t, _ = x.shape
        sites.keep(f"{self.name}.residual", x)
        if self.query.kernel.shape[1] == 0:  # no head is left, and there is no bias: the residual is all
            query, mixed = (jnp.zeros((b, t, 0, side.kernel.shape[2]), x.dtype) for side in (self.query, self.value))
            raw = jnp.zeros((b, 0, t, read.keys.shape[1]), jnp.float32)
            sites.keep_attention(self.name, query, mixed, raw, mask)
            return x
        bias = None if buckets is None else self.relative(buckets).transpose(2, 0, 1)
        query = sites.gate(f"{self.name}.query_channels", query)
        mixed, raw = attend(
            query,
            read.keys,
            read.values,
            mask,
            scale=1.0,
            bias=bias,
            drop=dropout_of(self.rate, inner),
            scores=sites.wants(f"{self.name}.scores"),
        )
        mixed = sites.gate(f"{self.name}.channels", sites.gate(f"{self.name}.heads", mixed))
        sites.keep_attention(self.name, query, mixed, raw, mask)
        return x + dropout(self.out(mixed), self.rate, outer)


class FeedForward(nnx.Module):
    """Normalised input, a non-linearity between two linear maps, and the residual."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        d, f = config.embed, config.neurons
        self.norm = RMSNorm(d, config.eps)
        if config.gated:
            self.gating = Linear((d, f), d**-0.5, rngs=rngs)
        self.up = Linear((d, f), d**-0.5, rngs=rngs)
        self.down = Linear((f, d), f**-0.5, rngs=rngs)
        self.activation = config.activation
        self.gated = config.gated
        self.rate = config.dropout

    def __call__(self, x: Float[Array, "b t d"], sites: Sites, key: Array | None) -> Float[Array, "b t d"]:
        sites.keep("ffn.residual", x)
        if self.up.kernel.shape[1] == 0:  # no neuron is left: the residual is all
            sites.keep("ffn.neurons", jnp.zeros((*x.shape[:2], 0), x.dtype))
            return x
        first, second = (None, None) if key is None else jax.random.split(key)
        y, activation = self.norm(x), ACTIVATIONS[self.activation]
        inner = activation(self.gating(y)) * self.up(y) if self.gated else activation(self.up(y))
        inner = sites.gate("ffn.neurons", inner)
        sites.keep("ffn.neurons", inner)
        return x + dropout(self.down(dropout(inner, self.rate, first)), self.rate, second)


class Block(nnx.Module):
    """One layer: attention, in a decoder attention to the encoder's output, then the feed-forward network."""

    def __init__(self, config: T5Config, decoder: bool, *, rngs: nnx.Rngs):
        self.attention = Attention(config, "attention", rngs=rngs)
        if decoder:
            self.cross = Attention(config, "cross", rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)


def bucket_of(distance: Array | np.ndarray, buckets: int, max_distance: int, *, both_ways: bool) -> Array:
    """The bucket of a relative position (key's position minus the query's).

    Half of the buckets are for single positions, the others grow with the logarithm of the distance up to
    `max_distance`. In an encoder, the second half of all buckets is for positions to the right; a decoder sees none.

    References:
        Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, 2020.
    """
    distance = jnp.asarray(distance)
    first = jnp.zeros_like(distance)
    if both_ways:
        buckets //= 2
        first = jnp.where(distance > 0, buckets, 0)
    steps = jnp.abs(distance) if both_ways else jnp.maximum(-distance, 0)
    single = buckets // 2
    growth = jnp.log(jnp.maximum(steps, 1).astype(jnp.float32) / single) / math.log(max_distance / single)
    far = jnp.minimum(single + (growth * (buckets - single)).astype(steps.dtype), buckets - 1)
    return first + jnp.where(steps < single, steps, far)


def _positions(config: T5Config, queries: Array, keys: Array, *, both_ways: bool) -> Array:
    distance = keys[None, :] - queries[:, None]
    return bucket_of(distance, config.buckets, config.max_distance, both_ways=both_ways)


# The functions of a family, which `Model` calls


def stacks(config: T5Config) -> tuple[Stack, ...]:
    """The stacks of layers; see `Model.stacks`."""
    read, written = ("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")
    kinds = ("encoder",) * config.encoder_layers, ("decoder",) * config.decoder_layers
    return (
        Stack("encoder", ("encoder", "layers"), kinds[0], read),
        Stack("decoder", ("decoder", "layers"), kinds[1], written, memory=read[1], causal=True),
    )


_WORD, _LANGUAGE = ("embeddings", "word"), ("language", "out")


def embed_places(config: T5Config, stack: str) -> Places:
    """The places of the parameters that `embed` reads; see `Model.embed_places`."""
    return {"word": _WORD} if stack == "encoder" else {"word": _WORD, "norm": ("encoder", "norm")}


def readout_places(config: T5Config, head: TaskHead) -> Places:
    """The places of the parameters that `readout` reads; see `Model.readout_places`."""
    return {"norm": ("decoder", "norm"), **({"word": _WORD} if config.tied else {"out": _LANGUAGE})}


def products(path: Path, lengths: tuple[float, ...]) -> tuple[float, float, float]:
    """The number of products of a kernel; see `Model.products`. Cross-attention's keys come from the encoder."""
    read, written = lengths
    queries = written if path[0] == "decoder" else read
    keys = read if "cross" in path else queries
    return keys if path[-2] in ("key", "value") else queries, queries, 0.0 if "ffn" in path else keys


@lru_cache
def _embedding(config: T5Config) -> Part:
    return describe(lambda rngs: Embedding(config.vocab, config.embed, rngs=rngs))


@lru_cache
def _norm(config: T5Config) -> Part:
    return describe(lambda rngs: RMSNorm(config.embed, config.eps))


@lru_cache
def _output(config: T5Config) -> Part:
    return describe(lambda rngs: Linear((config.embed, config.vocab), 1.0, rngs=rngs))


@lru_cache
def _block(config: T5Config, decoder: bool) -> Part:
    return describe(lambda rngs: Block(config, decoder, rngs=rngs))


def embed(
    config: T5Config,
    params: Params,
    batch: Mapping[str, Array],
    stack: str,
    before: State | None,
    key: Array | None,
) -> State:
    """The input of a stack's first layer; see `Model.embed`. The decoder gets the encoder's normalised output."""
    if params["word"]["embedding"].dtype == jnp.float16:
        raise TypeError("the feed-forward networks of T5 overflow in float16: load the model in float32 or bfloat16.")
    word = bind(_embedding(config), params["word"])
    if before is None:
        return State(dropout(word(batch["input_ids"]), config.dropout, key))
    first, second = (None, None) if key is None else jax.random.split(key)
    memory = bind(_norm(config), params["norm"])(before.hidden)
    hidden = dropout(word(batch["decoder_input_ids"]), config.dropout, first)
    return State(hidden, dropout(memory, config.dropout, second))


def block(
    config: T5Config, kind: str, params: Params, state: State, mask: Mask, sites: Sites, key: Array | None
) -> State:
    """One layer; see `Model.block`."""
    decoder = kind == "decoder"
    module = bind(_block(config, decoder), params)
    keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
    places = jnp.arange(state.hidden.shape[1])
    allowed = mask.tokens[:, None, :] & (places[None, :] <= places[:, None]) if decoder else mask.tokens
    buckets = _positions(config, places, places, both_ways=not decoder)
    hidden = module.attention(state.hidden, None, allowed, buckets, sites, keys[0])
    if decoder:
        hidden = module.cross(hidden, state.memory, mask.memory, None, sites, keys[1])
    return State(module.ffn(hidden, sites, keys[2]), state.memory)


def prepare(config: T5Config, params: Params, state: State, length: int) -> Cache:
    """An empty cache of one decoder layer; see `Model.prepare`."""
    module, memory = bind(_block(config, True), params), state.memory
    shapes = (side.kernel.shape[1:] for side in (module.attention.key, module.attention.value))
    return Cache(KeysValues.empty(state, length, shapes), module.cross.read(memory))


def step(
    config: T5Config,
    kind: str,
    params: Params,
    state: State,
    cache: Cache,
    position: Array,
    mask: Mask,
    intervention: Intervention,
) -> tuple[State, Cache]:
    """One decoder layer for one token; see `Model.step`."""
    module, hidden = bind(_block(config, True), params), state.hidden
    sites = Sites(intervention, jnp.ones(hidden.shape[:2], bool), sum_tokens, (), {})
    y = module.attention.norm(hidden)
    cache = cache.extended(position, module.attention.read(y))
    places = jnp.arange(cache.tokens.keys.shape[1])
    allowed = mask.tokens & (places <= position)
    buckets = _positions(config, position[None], places, both_ways=False)
    hidden = module.attention.mix(hidden, module.attention.query(y), cache.tokens, allowed, buckets, sites)
    query = module.cross.query(module.cross.norm(hidden))
    hidden = module.cross.mix(hidden, query, cache.memory, mask.memory, None, sites)
    return State(module.ffn(hidden, sites, None), state.memory), cache


def readout(
    config: T5Config, params: Params, state: State, mask: Mask, head: TaskHead, key: Array | None
) -> Float[Array, "b t v"]:
    """The logits of the next token; see `Model.readout`."""
    hidden = bind(_norm(config), params["norm"])(state.hidden)
    hidden = dropout(hidden, config.dropout, key).astype(jnp.float32)
    if config.scaled:
        hidden = hidden * config.embed**-0.5
    if not config.tied:
        return bind(_output(config), params["out"])(hidden)
    table = params["word"]["embedding"]
    return product(hidden.astype(table.dtype), table, axis=1)


def initialise(config: T5Config, key: Array) -> Params:
    """Random parameters of the whole model; the tables of relative positions are the same in all layers of a stack."""
    keys = iter(jax.random.split(key, 2 + config.encoder_layers + config.decoder_layers))
    params: Params = {
        "embeddings": {
            "word": initialise_part(lambda rngs: Embedding(config.vocab, config.embed, 1.0, rngs=rngs), next(keys))
        }
    }
    for stack in stacks(config):
        decoder = stack.name == "decoder"
        block = lambda rngs, decoder=decoder: Block(config, decoder, rngs=rngs)  # noqa: E731  one for all layers
        layers = {i: initialise_part(block, next(keys)) for i in range(stack.layers)}
        table = layers[0]["attention"]["relative"]["embedding"]
        for layer in layers.values():
            layer["attention"]["relative"] = {"embedding": table + 0.0}  # arrays of their own: training donates them
        params[stack.name] = {
            "layers": layers,
            "norm": initialise_part(lambda rngs: RMSNorm(config.embed, config.eps), jax.random.key(0)),
        }
    if not config.tied:
        scale = config.embed**-0.5
        make = lambda rngs: Linear((config.embed, config.vocab), scale, rngs=rngs)  # noqa: E731
        params["language"] = {"out": initialise_part(make, next(keys))}
    return params


def initialise_head(config: T5Config, head: TaskHead, key: Array) -> Params:
    """There are no task heads to initialise.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"a {config.model_type} model has no task heads.")


def tied_places(config: T5Config) -> tuple[tuple[Path, ...], ...]:
    """Parameters that are one in a Hugging Face model: training must give them the same gradient."""
    return tuple(
        tuple((*stack.path, i, "attention", "relative", "embedding") for i in range(stack.layers))
        for stack in stacks(config)
    )


# The names that the table has in checkpoints, and that of the output layer
TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
OUTPUT = "lm_head.weight"


def with_tying(config: T5Config, tied: bool) -> T5Config:
    """The configuration as the tensors say, whatever its flag: version 5 of transformers always writes that as true."""
    if tied == config.tied:
        return config
    raw = json.loads(config.raw) | {"tie_word_embeddings": tied}
    raw |= {"scale_decoder_outputs": config.scaled} if config.model_type == "t5" else {}
    return replace(config, tied=tied, raw=json.dumps(raw, sort_keys=True))


def checkpoint_names(config: T5Config) -> dict[Path, tuple[str, str]]:
    """The places of all parameters in a Hugging Face checkpoint; kinds as in the BERT family."""
    names: dict[Path, tuple[str, str]] = {(*_WORD, "embedding"): (TABLES[0], "copy")}
    if not config.tied:
        names[*_LANGUAGE, "kernel"] = (OUTPUT, "linear")
    for stack in stacks(config):
        decoder = stack.name == "decoder"
        names[stack.name, "norm", "scale"] = (f"{stack.name}.final_layer_norm.weight", "copy")
        table = f"{stack.name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for i in range(stack.layers):
            path, theirs = (*stack.path, i), f"{stack.name}.block.{i}.layer."
            modules = [("attention", "0.SelfAttention", 0)] + [("cross", "1.EncDecAttention", 1)] * decoder
            for module, name, place in modules:
                for ours, letter in (("query", "q"), ("key", "k"), ("value", "v")):
                    names[*path, module, ours, "kernel"] = (f"{theirs}{name}.{letter}.weight", "split_out")
                names[*path, module, "out", "kernel"] = (f"{theirs}{name}.o.weight", "merge_in")
                names[*path, module, "norm", "scale"] = (f"{theirs}{place}.layer_norm.weight", "copy")
            names[*path, "attention", "relative", "embedding"] = (table, "copy")
            place = 2 if decoder else 1
            inner = f"{theirs}{place}.DenseReluDense."
            up = {"gating": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
            for ours, their in (up | {"down": "wo"}).items():
                names[*path, "ffn", ours, "kernel"] = (f"{inner}{their}.weight", "linear")
            names[*path, "ffn", "norm", "scale"] = (f"{theirs}{place}.layer_norm.weight", "copy")
    return names


def ignored_names(config: T5Config) -> tuple[str, ...]:
    """Patterns of tensors in checkpoints that are copies or that no model reads."""
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in files from before 2021
    return (*TABLES, unused, *([OUTPUT] if config.tied else []))


# What other programs read: all layers have the same widths there

IDLE = True  # a layer without units returns what it is given: it can be left out
_CLASSES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}


def uniform(config: T5Config, units: Mapping[str, int], layers: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The Hugging Face configuration of a model whose layers all have at least these heads and neurons."""
    return json.loads(config.raw) | {
        "architectures": [_CLASSES[config.model_type]],
        "num_heads": max(units["heads"], 1),
        "d_ff": max(units["neurons"], 1),
        "num_layers": len(layers["encoder"]),
        "num_decoder_layers": len(layers["decoder"]),
        "tie_word_embeddings": config.tied,
    }


def aligned(config: T5Config, params: Params) -> Params:
    """The parameters with the heads of every stack at the places of one table of relative positions.

    Hugging Face keeps one table per stack, so a head needs the same place in all layers; those of other layers are zero
    there. Heads that differ in their column are at different places.
    """
    flat = flatten(params)
    for stack in stacks(config):
        tables = {i: flat[(*stack.path, i, *_RELATIVE)] for i in params[stack.name]["layers"]}
        columns: list[bytes] = []
        places: dict[int, list[int]] = {}
        for i, table in tables.items():
            free, places[i] = [*range(len(columns))], []
            for column in np.asarray(table).T:
                found = next((place for place in free if columns[place] == column.tobytes()), len(columns))
                columns += [column.tobytes()] * (found == len(columns))
                free = [place for place in free if place != found]
                places[i].append(found)
        whole = np.zeros((config.buckets, len(columns)), np.asarray(next(iter(tables.values()))).dtype)
        for i, table in tables.items():
            whole[:, places[i]] = table
        for path, array in flat.items():
            if path[: len(stack.path)] == stack.path and path[len(stack.path) + 1] == "attention":
                axes = axes_of(AXES, path)
                if "heads" in axes:
                    flat[path] = _placed(array, axes.index("heads"), places[int(path[len(stack.path)])], len(columns))
        for i in tables:
            flat[(*stack.path, i, *_RELATIVE)] = whole
    return unflatten(flat)


def _placed(array: Any, axis: int, places: list[int], count: int) -> np.ndarray:
    """An array whose entries along an axis are at other places of a longer one, zero elsewhere."""
    array = np.moveaxis(np.asarray(array), axis, 0)
    moved = np.zeros((count, *array.shape[1:]), array.dtype)
    moved[places] = array
    return np.moveaxis(moved, 0, axis)


_RELATIVE = ("attention", "relative", "embedding")

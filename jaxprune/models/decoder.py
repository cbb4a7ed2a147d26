"""Decoders, from one table of differences: `llama`, `mistral`, `qwen2`, `qwen3`, `seed_oss` and `gemma3_text`.

Touvron et al. 2023, Jiang et al. 2023, Yang et al. 2024 and 2025, ByteDance 2025, Gemma Team 2025. Pre-norm layers with
rotary positions (Su et al. 2021), grouped queries (Ainslie et al. 2023) and gated feed-forward networks. They differ in
biases, norms, windows and the scale of their embeddings.

A *group* is a key-value head with the query heads that share it: removing one makes the cache smaller. Rotary positions
couple the channels of a head in pairs, so single channels are no units here.

Types: float32 and bfloat16. The residual stream of trained decoders overflows in float16: a file may hold it, but
nothing is computed in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxprune.models.layers import (
    ACTIVATIONS,
    Affine,
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
    is_number,
    product,
    sum_tokens,
)
from jaxprune.models.layers import initialise as initialise_part
from jaxprune.models.running import ANSWER, Cache, KeysValues, Mask, Places, Stack, State
from jaxprune.units import Intervention, Params, Path

SLIDING, GLOBAL = "sliding_attention", "full_attention"  # the kinds of layers


class _Type(NamedTuple):
    """The facts in which a model type differs from the others, and that its `config.json` does not say."""

    head_dim: int | None = None  # the default; None: the width divided by the heads
    biases: tuple[bool | str, bool | str] = (False, False)  # of query, key and value, and of the output: or the setting
    ffn_bias: bool | str = False
    head_norms: bool = False  # norms of queries and keys, head by head
    gemma: bool = False  # norms multiply by 1 + w and stand after each module, too; embeddings are scaled
    windows: str = "none"  # the layers with a sliding window: "none", "all" or "some"
    activation: str = "hidden_act"  # the setting's name
    tied: bool = False  # the default

    @property
    def offset(self) -> float:
        """The number that norms add to their scale."""
        return 1.0 if self.gemma else 0.0


_TYPES = {
    "llama": _Type(biases=("attention_bias", "attention_bias"), ffn_bias="mlp_bias"),
    "mistral": _Type(windows="all"),
    "qwen2": _Type(biases=(True, False), windows="some"),
    "qwen3": _Type(head_dim=128, biases=("attention_bias", "attention_bias"), head_norms=True, windows="some"),
    "seed_oss": _Type(head_dim=128, biases=("attention_bias", "attention_out_bias"), ffn_bias="mlp_bias"),
    "gemma3_text": _Type(
        head_dim=256,
        biases=("attention_bias", "attention_bias"),
        head_norms=True,
        gemma=True,
        windows="some",
        activation="hidden_activation",
        tied=True,
    ),
}
MODEL_TYPES = tuple(_TYPES)
PREFIXES = dict.fromkeys(MODEL_TYPES, "model.")


class Rotary(NamedTuple):
    """Rotary positions: the base of the wavelengths, and how these are stretched for long texts."""

    theta: float
    kind: str = "default"  # "linear" divides all frequencies by the factor; "llama3" the low ones, smoothly
    factor: float = 1.0
    low: float = 1.0  # of "llama3": wavelengths over `length / low` tokens are stretched in full ...
    high: float = 4.0  # ... and those below `length / high` not at all
    length: int = 0  # tokens of the pre-training

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per token of every pair of channels, `[head_dim / 2]` float32."""
        rates = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        if self.kind == "linear":
            rates = rates / self.factor
        elif self.kind == "llama3":
            turns = self.length * rates / (2 * math.pi)  # in the pre-training's length
            share = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
            rates = (1 - share) * rates / self.factor + share * rates
        return rates.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The architecture. Sizes are those of fresh parameters; running a model reads them from the arrays."""

    model_type: str
    vocab: int
    positions: int
    embed: int
    attention_heads: int
    groups: int
    head_dim: int
    neurons: int
    kinds: tuple[str, ...]  # of the layers: with a sliding window or without
    window: int  # tokens that a sliding layer attends to; 0 where there is none
    rotary: tuple[tuple[str, Rotary], ...]  # kind of layer to its positions
    scale: float  # of the products of queries and keys
    activation: str
    biases: tuple[bool, bool, bool]  # of query, key and value; of the attention's output; of the feed-forward network
    eps: float
    cap: float | None  # the bound on the logits, by tanh
    tied: bool  # whether the embeddings are the output layer, too
    pad_id: int
    end_ids: tuple[int, ...]
    attention_dropout: float
    residual_dropout: float
    raw: str  # the Hugging Face configuration as read, canonical JSON

    task_heads: tuple[TaskHead, ...] = ()  # there are none: tasks are told apart by their prompts

    answers_in_text: ClassVar[bool] = True
    ends_answers: ClassVar[bool] = False  # a label's word stands for it, whatever comes after

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.kinds)

    @property
    def segments(self) -> int:
        """There are no segment embeddings."""
        return 0

    @property
    def max_length(self) -> int:
        """The most tokens an example may have."""
        return self.positions

    @property
    def type(self) -> _Type:
        """The facts of the model type."""
        return _TYPES[self.model_type]


_SUPPORTED: dict[str, tuple[Any, ...]] = {  # settings that change what is computed
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "partial_rotary_factor": (1.0, 1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
}


def parse_config(raw: Mapping[str, Any], task_heads: tuple[TaskHead, ...] | None = None) -> DecoderConfig:
    """Reads a Hugging Face configuration.

    Args:
        raw: The content of `config.json`, without a `jaxprune` section.
        task_heads: Must be empty or None: a decoder has none.

    Raises:
        ValueError: Listing every value that is missing or not supported.
    """
    kind, reader = _TYPES[raw["model_type"]], ConfigReader(raw, _SUPPORTED)
    embed: Any = reader.size("hidden_size")
    layers = reader.size("num_hidden_layers")
    heads, vocab = reader.size("num_attention_heads"), reader.size("vocab_size")
    neurons, positions = reader.size("intermediate_size"), reader.size("max_position_embeddings")
    sizes = all(map(is_count, (embed, layers, heads, vocab, neurons, positions)))
    groups = heads if raw.get("num_key_value_heads") is None else reader.size("num_key_value_heads")
    head_dim: Any = reader.size("head_dim") if raw.get("head_dim") is not None else kind.head_dim
    if head_dim is None and sizes and embed and heads:
        reader.expect("hidden_size", embed, embed % heads == 0, f"a multiple of the {heads} heads, or a head_dim")
        head_dim = embed // heads
    if sizes and is_count(groups) and groups:
        reader.expect("num_attention_heads", heads, heads % groups == 0, f"a multiple of the {groups} key-value heads")
    if head_dim is not None and is_count(head_dim):
        reader.expect("head_dim", head_dim, head_dim % 2 == 0, "an even number: rotary positions turn pairs")
    if "ForCausalLM" not in str(raw.get("architectures") or "ForCausalLM"):
        reader.problems.append(f"architectures is {raw['architectures']!r}, supported: one ...ForCausalLM")
    layer_kinds, window = _windows(reader, kind, layers if is_count(layers) else 0)
    rotary = tuple((name, _rotary(reader, name, kind)) for name in sorted(set(layer_kinds)))
    inner, outer, ffn = (_flag(reader, bias) for bias in (*kind.biases, kind.ffn_bias))
    scalar: Any = reader.size("query_pre_attn_scalar", 256) if kind.gemma else head_dim
    cap: Any = raw.get("final_logit_softcapping") if kind.gemma else None
    reader.expect("final_logit_softcapping", cap, cap is None or (is_number(cap) and cap > 0), "a positive number")
    tied = raw.get("tie_word_embeddings", kind.tied)
    reader.expect("tie_word_embeddings", tied, isinstance(tied, bool), "true or false")
    activation = reader.activation(kind.activation, "gelu_pytorch_tanh" if kind.gemma else "silu")
    eps = reader.eps("rms_norm_eps", 1e-6)
    rates = (reader.rate("attention_dropout", 0.0), reader.rate("residual_dropout", 0.0))
    pad, ends = raw.get("pad_token_id"), raw.get("eos_token_id")
    ends = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    for name, index in (("pad_token_id", pad), *(("eos_token_id", end) for end in ends)):
        fits = index is None or (is_count(index) and (not is_count(vocab) or index < vocab))
        reader.expect(name, index, fits, "the index of a token")
    if task_heads:
        reader.problems.append(f"it has the task heads {', '.join(head.name for head in task_heads)}, supported: none")
    reader.check()
    return DecoderConfig(
        model_type=raw["model_type"],
        vocab=vocab,
        positions=positions,
        embed=embed,
        attention_heads=heads,
        groups=groups,
        head_dim=int(head_dim or 0),
        neurons=neurons,
        kinds=layer_kinds,
        window=window,
        rotary=rotary,
        scale=float(scalar) ** -0.5,
        activation=activation,
        biases=(inner, outer, ffn),
        eps=float(eps),
        cap=None if cap is None else float(cap),
        tied=tied,
        pad_id=int(pad if pad is not None else next(iter(ends), 0)),
        end_ids=tuple(ends),
        attention_dropout=float(rates[0]),
        residual_dropout=float(rates[1]) if raw["model_type"] == "seed_oss" else 0.0,
        raw=json.dumps(raw, sort_keys=True),
    )


def _flag(reader: ConfigReader, bias: bool | str) -> bool:
    """True if there is a bias: a fact of the model type, or a setting."""
    if isinstance(bias, bool):
        return bias
    value = reader.raw.get(bias, reader.raw["model_type"] == "seed_oss" and bias == "attention_bias")
    reader.expect(bias, value, isinstance(value, bool), "true or false")
    return bool(value)


def _windows(reader: ConfigReader, kind: _Type, layers: int) -> tuple[tuple[str, ...], int]:
    """The kind of every layer, and the tokens that a sliding one attends to."""
    raw = reader.raw
    used = kind.windows == "all" or (kind.windows == "some" and (kind.gemma or raw.get("use_sliding_window", False)))
    size = raw.get("sliding_window", 4096) if used else None
    reader.expect("sliding_window", size, size is None or (is_count(size) and size > 0), "a number of tokens")
    kinds = (SLIDING if kind.windows == "all" and size is not None else GLOBAL,) * layers
    if kind.windows == "some" and (named := raw.get("layer_types")) is not None:
        fits = isinstance(named, list) and len(named) == layers and set(named) <= {SLIDING, GLOBAL}
        reader.expect("layer_types", named, fits, f"{layers} of {SLIDING!r} and {GLOBAL!r}")
        kinds = tuple(named) if fits else kinds
    elif kind.gemma:
        pattern = reader.size("sliding_window_pattern", 6)
        kinds = tuple(SLIDING if not is_count(pattern) or (i + 1) % pattern else GLOBAL for i in range(layers))
    elif kind.windows == "some" and size is not None:
        first = reader.get("max_window_layers", is_count, "a number of layers", 28)
        kinds = tuple(SLIDING if is_count(first) and i >= first else GLOBAL for i in range(layers))
    if SLIDING in kinds and size is None:
        reader.problems.append("layer_types has sliding layers, and no sliding_window says how many tokens they read")
    return kinds, int(size or 0) if SLIDING in kinds and is_count(size) else 0


_ROTARY = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rotary(reader: ConfigReader, layer: str, kind: _Type) -> Rotary:
    """The rotary positions of the layers of a kind, from the settings of transformers 5 or of earlier versions."""
    raw, local = reader.raw, kind.gemma and layer == SLIDING
    given: Any = raw.get("rope_parameters")
    if isinstance(given, Mapping) and set(given) & {SLIDING, GLOBAL}:
        given = given.get(layer)
    elif given is None:
        given = {} if local else raw.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        reader.problems.append(f"the rotary positions of {layer} are {given!r}, expected an object")
        return Rotary(1.0)
    settings = {name: value for name, value in given.items() if value is not None}
    form = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    usual = (10_000.0 if local else 1_000_000.0) if kind.gemma else 10_000.0
    theta = settings.pop("rope_theta", raw.get("rope_local_base_freq" if local else "rope_theta", usual))
    if form not in _ROTARY:
        reader.problems.append(f"the rotary positions of {layer} are {form!r}, supported: {', '.join(_ROTARY)}")
        return Rotary(1.0)
    if form == "llama3":
        settings.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    if settings.get("partial_rotary_factor") == 1.0:
        del settings["partial_rotary_factor"]
    wanted, numbers = set(_ROTARY[form]), {"rope_theta": theta, **settings}
    unread = {"original_max_position_embeddings"} if form != "llama3" else set()
    if set(settings) - unread != wanted:
        reader.problems.append(
            f"the rotary positions of {layer} ({form}) have {sorted(settings)}, expected {sorted(wanted)}"
        )
        return Rotary(1.0)
    if wrong := {name: value for name, value in numbers.items() if not is_number(value) or not 0 < value < 1e12}:
        reader.problems.append(f"the rotary positions of {layer} have {wrong}, expected positive numbers")
        return Rotary(1.0)
    low, high = float(settings.get("low_freq_factor", 1.0)), float(settings.get("high_freq_factor", 4.0))
    if low >= high:
        reader.problems.append(f"low_freq_factor is {low} and high_freq_factor {high}, expected a larger one")
        return Rotary(1.0)
    length = int(settings.get("original_max_position_embeddings", 0)) if form == "llama3" else 0
    return Rotary(float(theta), form, float(settings.get("factor", 1.0)), low, high, length)


def with_heads(config: DecoderConfig, task_heads: tuple[TaskHead, ...]) -> DecoderConfig:
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


_QUERIES = ("embed", "groups", "queries", "head_dim")
AXES: dict[str, tuple[str, ...]] = {
    "embeddings.word.embedding": ("vocab", "embed"),
    "layers.*.attention.out.kernel": ("groups", "queries", "head_dim", "embed"),
    "layers.*.attention.out.bias": ("embed",),
    "layers.*.attention.norm.scale": ("embed",),
    "layers.*.attention.after.scale": ("embed",),
    "layers.*.attention.value.kernel": ("embed", "groups", "head_dim"),
    "layers.*.attention.value.bias": ("groups", "head_dim"),
    "layers.*.attention.query.kernel": _QUERIES,
    "layers.*.attention.query.bias": _QUERIES[1:],
    "layers.*.attention.query_norm.scale": ("head_dim",),
    "layers.*.attention.key.kernel": ("embed", "groups", "head_dim"),
    "layers.*.attention.key.bias": ("groups", "head_dim"),
    "layers.*.attention.key_norm.scale": ("head_dim",),
    "layers.*.ffn.gating.kernel": ("embed", "neurons"),
    "layers.*.ffn.gating.bias": ("neurons",),
    "layers.*.ffn.up.kernel": ("embed", "neurons"),
    "layers.*.ffn.up.bias": ("neurons",),
    "layers.*.ffn.down.kernel": ("neurons", "embed"),
    "layers.*.ffn.down.bias": ("embed",),
    "layers.*.ffn.norm.scale": ("embed",),
    "layers.*.ffn.after.scale": ("embed",),
    "norm.scale": ("embed",),
    "language.out.kernel": ("embed", "vocab"),
}


def rotate(x: Float[Array, "b t *n h"], angles: Float[Array, "b t h/2"]) -> Float[Array, "b t *n h"]:
    """Turns the channels `i` and `i + h / 2` of every head by the angle of their pair, in float32."""
    shape = (*angles.shape[:2], *[1] * (x.ndim - 3), angles.shape[2])
    cos, sin = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _map(kernel: tuple[int, ...], bias: tuple[int, ...], biased: bool, rngs: nnx.Rngs) -> Affine | Linear:
    return Affine(kernel, bias, rngs=rngs) if biased else Linear(kernel, 0.02, len(kernel) - len(bias), rngs=rngs)


def _bias_alone(part: Affine | Linear, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The output of a map that no unit is left to feed."""
    y = jnp.zeros_like(x)
    return y + part.bias[...].astype(x.dtype) if isinstance(part, Affine) else y


class Attention(nnx.Module):
    """Normalised input, attention over the remaining groups and their query heads, and the residual."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        d, g, h, kind = config.embed, config.groups, config.head_dim, config.type
        queries, (inner, outer, _) = config.attention_heads // g, config.biases
        self.norm = RMSNorm(d, config.eps, kind.offset)
        self.query = _map((d, g, queries, h), (g, queries, h), inner, rngs)
        self.key = _map((d, g, h), (g, h), inner, rngs)
        self.value = _map((d, g, h), (g, h), inner, rngs)
        self.out = _map((g, queries, h, d), (d,), outer, rngs)
        if kind.head_norms:
            self.query_norm = RMSNorm(h, config.eps, kind.offset)
            self.key_norm = RMSNorm(h, config.eps, kind.offset)
        if kind.gemma:
            self.after = RMSNorm(d, config.eps, kind.offset)
        self.head_norms, self.gemma, self.scale = kind.head_norms, kind.gemma, config.scale
        self.rates = (config.attention_dropout, config.residual_dropout)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Float[Array, "b t h/2"],
        before: Callable[[KeysValues], KeysValues],
        allowed: Bool[Array, "b t s"],
        sites: Sites,
        key: Array | None,
    ) -> Float[Array, "b t d"]:
        """The output; `before` is given the keys and values of these tokens, and returns those to attend to."""
        inner, outer = (None, None) if key is None else jax.random.split(key)
        sites.keep("attention.residual", x)
        y = self.norm(x)
        query, key_, value = self.query(y), self.key(y), self.value(y)
        if self.head_norms:
            query, key_ = self.query_norm(query), self.key_norm(key_)
        read = before(KeysValues(rotate(key_, angles), value))
        if math.prod(query.shape[2:4]):
            mixed, raw = attend(
                rotate(query, angles),
                read.keys,
                read.values,
                allowed,
                scale=self.scale,
                drop=dropout_of(self.rates[0], inner),
                scores=sites.wants("attention.scores"),
            )
            mixed = sites.gate("attention.query_heads", sites.gate("attention.groups", mixed))
            y = self.out(mixed)
        else:  # no head is left: the output's bias is all that stays
            mixed, raw = query, jnp.zeros((x.shape[0], 0, x.shape[1], read.keys.shape[1]), jnp.float32)
            y = _bias_alone(self.out, x)
        for name, kept in (("groups", mixed), ("query_heads", mixed), ("scores", raw), ("allowed", allowed)):
            sites.keep(f"attention.{name}", kept)
        return x + dropout(self.after(y) if self.gemma else y, self.rates[1], outer)


class FeedForward(nnx.Module):
    """Normalised input, neurons `activation(gating(x)) * up(x)`, a linear map of them, and the residual."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        d, f, kind, biased = config.embed, config.neurons, config.type, config.biases[2]
        self.norm = RMSNorm(d, config.eps, kind.offset)
        self.gating = _map((d, f), (f,), biased, rngs)
        self.up = _map((d, f), (f,), biased, rngs)
        self.down = _map((f, d), (d,), biased, rngs)
        if kind.gemma:
            self.after = RMSNorm(d, config.eps, kind.offset)
        self.activation, self.gemma, self.rate = config.activation, kind.gemma, config.residual_dropout

    def __call__(self, x: Float[Array, "b t d"], sites: Sites, key: Array | None) -> Float[Array, "b t d"]:
        sites.keep("ffn.residual", x)
        if self.up.kernel.shape[1]:
            y = self.norm(x)
            inner = sites.gate("ffn.neurons", ACTIVATIONS[self.activation](self.gating(y)) * self.up(y))
            y = self.down(inner)
        else:  # no neuron is left: the output's bias is all that stays
            inner = jnp.zeros((*x.shape[:2], 0), x.dtype)
            y = _bias_alone(self.down, x)
        sites.keep("ffn.neurons", inner)
        return x + dropout(self.after(y) if self.gemma else y, self.rate, key)


class Block(nnx.Module):
    """One layer: attention, then the feed-forward network."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)


def _angles(config: DecoderConfig, kind: str, positions: Array) -> Float[Array, "b t h/2"]:
    """The angles by which the channels of tokens are turned."""
    return positions[..., None].astype(jnp.float32) * dict(config.rotary)[kind].frequencies(config.head_dim)


def _allowed(config: DecoderConfig, kind: str, queries: Array, keys: Array) -> Bool[Array, "t s"]:
    """True where a query may attend to a key, by their places."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & (distance < config.window) if kind == SLIDING else distance >= 0


def positions_of(tokens: Bool[Array, "b t"]) -> Array:
    """The position of every token, counted from the first that is no padding; 0 before it."""
    return jnp.maximum(jnp.cumsum(tokens.astype(jnp.int32), axis=1) - 1, 0)


# The functions of a family, which `Model` calls


def stacks(config: DecoderConfig) -> tuple[Stack, ...]:
    """The stacks of layers; see `Model.stacks`."""
    return (
        Stack("", ("layers",), config.kinds, ("input_ids", "attention_mask", ANSWER), causal=True, recomputes=True),
    )


_WORD, _LANGUAGE = ("embeddings", "word"), ("language", "out")


def embed_places(config: DecoderConfig, stack: str) -> Places:
    """The places of the parameters that `embed` reads; see `Model.embed_places`."""
    return {"word": _WORD}


def readout_places(config: DecoderConfig, head: TaskHead) -> Places:
    """The places of the parameters that `readout` reads; see `Model.readout_places`."""
    return {"norm": ("norm",), **({"word": _WORD} if config.tied else {"out": _LANGUAGE})}


def products(path: Path, lengths: tuple[float, ...]) -> tuple[float, float, float]:
    """The number of products of a kernel; see `Model.products`. Those of attention are booked on the query heads."""
    (tokens,) = lengths
    attends = "attention" in path and path[-2] in ("query", "out")
    return tokens, tokens, 2.0 * tokens if attends else 0.0


def tied_places(config: DecoderConfig) -> tuple[tuple[Path, ...], ...]:
    """There are none; see `Model.tied_places`."""
    return ()


@lru_cache
def _embedding(config: DecoderConfig) -> Part:
    return describe(lambda rngs: Embedding(config.vocab, config.embed, rngs=rngs))


def _make_norm(config: DecoderConfig, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(config.embed, config.eps, config.type.offset)


@lru_cache
def _norm(config: DecoderConfig) -> Part:
    return describe(lambda rngs: _make_norm(config, rngs))


@lru_cache
def _output(config: DecoderConfig) -> Part:
    return describe(lambda rngs: Linear((config.embed, config.vocab), 0.02, rngs=rngs))


@lru_cache
def _block(config: DecoderConfig) -> Part:
    return describe(lambda rngs: Block(config, rngs=rngs))


def embed(
    config: DecoderConfig,
    params: Params,
    batch: Mapping[str, Array],
    stack: str,
    before: State | None,
    key: Array | None,
) -> State:
    """The input of the first layer; see `Model.embed`."""
    table = params["word"]["embedding"]
    if table.dtype == jnp.float16:
        raise TypeError("the residual stream of decoders overflows in float16: load the model in float32 or bfloat16.")
    hidden = bind(_embedding(config), params["word"])(batch["input_ids"])
    return State(hidden * jnp.asarray(config.embed**0.5, table.dtype) if config.type.gemma else hidden)


def block(
    config: DecoderConfig, kind: str, params: Params, state: State, mask: Mask, sites: Sites, key: Array | None
) -> State:
    """One layer; see `Model.block`."""
    module, keys = bind(_block(config), params), [None] * 2 if key is None else list(jax.random.split(key))
    places = jnp.arange(state.hidden.shape[1])
    allowed = mask.tokens[:, None, :] & _allowed(config, kind, places, places)
    angles = _angles(config, kind, positions_of(mask.tokens))
    hidden = module.attention(state.hidden, angles, lambda read: read, allowed, sites, keys[0])
    return State(module.ffn(hidden, sites, keys[1]))


def prepare(config: DecoderConfig, params: Params, state: State, length: int) -> Cache:
    """An empty cache of one layer; see `Model.prepare`."""
    module = bind(_block(config), params)
    shapes = (side.kernel.shape[1:] for side in (module.attention.key, module.attention.value))
    return Cache(KeysValues.empty(state, length, shapes))


def step(
    config: DecoderConfig,
    kind: str,
    params: Params,
    state: State,
    cache: Cache,
    position: Array,
    mask: Mask,
    intervention: Intervention,
) -> tuple[State, Cache]:
    """One layer for the next tokens; see `Model.step`."""
    module, tokens = bind(_block(config), params), state.hidden.shape[1]
    sites = Sites(intervention, jnp.ones(state.hidden.shape[:2], bool), sum_tokens, (), {})
    positions = jax.lax.dynamic_slice_in_dim(positions_of(mask.tokens), position, tokens, axis=1)
    places = jnp.arange(mask.tokens.shape[1])
    allowed = mask.tokens[:, None, :] & _allowed(config, kind, position + places[:tokens], places)
    caches = [cache]

    def before(read: KeysValues) -> KeysValues:
        caches.append(cache.extended(position, read))
        return caches[-1].tokens

    hidden = module.attention(state.hidden, _angles(config, kind, positions), before, allowed, sites, None)
    return State(module.ffn(hidden, sites, None)), caches[-1]


def readout(
    config: DecoderConfig, params: Params, state: State, mask: Mask, head: TaskHead, key: Array | None
) -> Float[Array, "b t v"]:
    """The logits of the next token; see `Model.readout`."""
    hidden = bind(_norm(config), params["norm"])(state.hidden[:, -mask.tokens.shape[1] :])
    if config.tied:
        table = params["word"]["embedding"]
        logits = product(hidden.astype(table.dtype), table, axis=1)
    else:
        logits = bind(_output(config), params["out"])(hidden).astype(jnp.float32)
    return logits if config.cap is None else config.cap * jnp.tanh(logits / config.cap)


def initialise(config: DecoderConfig, key: Array) -> Params:
    """Random parameters of the whole model."""
    keys = iter(jax.random.split(key, 2 + config.layers))
    make = lambda rngs: Block(config, rngs=rngs)  # noqa: E731  one for all layers
    params: Params = {
        "embeddings": {
            "word": initialise_part(lambda rngs: Embedding(config.vocab, config.embed, rngs=rngs), next(keys))
        },
        "layers": {i: initialise_part(make, next(keys)) for i in range(config.layers)},
        "norm": initialise_part(lambda rngs: _make_norm(config, rngs), jax.random.key(0)),
    }
    if not config.tied:
        out = lambda rngs: Linear((config.embed, config.vocab), 0.02, rngs=rngs)  # noqa: E731
        params["language"] = {"out": initialise_part(out, next(keys))}
    return params


def initialise_head(config: DecoderConfig, head: TaskHead, key: Array) -> Params:
    """There are no task heads to initialise.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"a {config.model_type} model has no task heads.")


_NAMES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.norm": "input_layernorm",
    "ffn.gating": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.norm": "post_attention_layernorm",
}
_GEMMA_NAMES = _NAMES | {
    "attention.after": "post_attention_layernorm",
    "ffn.norm": "pre_feedforward_layernorm",
    "ffn.after": "post_feedforward_layernorm",
}


TABLES, OUTPUT = ("embed_tokens.weight",), "lm_head.weight"  # in checkpoints; see the T5 family


def with_tying(config: DecoderConfig, tied: bool) -> DecoderConfig:
    """The configuration, with an output layer where the tensors have another one than the table."""
    if tied or not config.tied:
        return config
    raw = json.loads(config.raw) | {"tie_word_embeddings": False}
    return replace(config, tied=False, raw=json.dumps(raw, sort_keys=True))


def checkpoint_names(config: DecoderConfig) -> dict[Path, tuple[str, str]]:
    """The places of all parameters in a Hugging Face checkpoint; kinds as in the BERT family."""
    names: dict[Path, tuple[str, str]] = {
        (*_WORD, "embedding"): ("embed_tokens.weight", "copy"),
        ("norm", "scale"): ("norm.weight", "copy"),
    }
    if not config.tied:
        names[*_LANGUAGE, "kernel"] = ("lm_head.weight", "linear")
    theirs = _GEMMA_NAMES if config.type.gemma else _NAMES
    for i in range(config.layers):
        for path in _block(config).paths:
            module, name, leaf = (str(step) for step in path)
            heads = module == "attention" and name in ("query", "key", "value")
            kind = "copy" if leaf == "scale" else "split_out" if heads else "linear"
            if leaf == "bias":
                kind = "split_bias" if heads else "copy"
            elif (module, name) == ("attention", "out"):
                kind = "merge_in"
            place = f"layers.{i}.{theirs[f'{module}.{name}']}"
            names["layers", i, *path] = (f"{place}.{'bias' if leaf == 'bias' else 'weight'}", kind)
    return names


def ignored_names(config: DecoderConfig) -> tuple[str, ...]:
    """Patterns of tensors in checkpoints that no model reads: a copy of the table, and buffers of old versions."""
    return ("layers.*.self_attn.rotary_emb.inv_freq", *(["lm_head.weight"] if config.tied else []))


# What other programs read: all layers have the same widths there

IDLE = True  # a layer without units, and without biases, returns what it is given: it can be left out
_FOREIGN = {  # settings that only the type itself knows
    "llama": ("attention_bias", "mlp_bias", "pretraining_tp", "is_llama_config", "rope_interleaved"),
    "qwen2": ("use_sliding_window", "max_window_layers", "sliding_window", "layer_types", "use_mrope"),
}
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "seed_oss": "SeedOss",
    "gemma3_text": "Gemma3",
}


def uniform(config: DecoderConfig, units: Mapping[str, int], layers: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The Hugging Face configuration of a model whose layers all have at least these units.

    `llama` and `qwen2` refuse or misread heads whose sizes do not add up to the width. Then a type with the same blocks
    stands for them: `mistral` where there are no biases, else `seed_oss`.

    Args:
        config: The dense model's.
        units: "groups", "query_heads" of one group, and "neurons".
        layers: The layers that stay of every stack.
    """
    raw, kind, kept = json.loads(config.raw), config.model_type, layers[""]
    groups, queries = max(units["groups"], 1), max(units["query_heads"], 1)
    if config.type.gemma:
        groups, queries = _dividing(config, groups, queries)
    kinds = [config.kinds[i] for i in kept]
    heads = groups * queries
    odd = heads != config.attention_heads or (kind == "qwen2" and heads * config.head_dim != config.embed)
    if kind in _FOREIGN and odd and SLIDING not in kinds:
        for name in _FOREIGN[kind]:
            raw.pop(name, None)
        inner, outer, ffn = config.biases
        kind = "seed_oss" if any(config.biases) else "mistral"
        raw |= (
            {"attention_bias": inner, "attention_out_bias": outer, "mlp_bias": ffn, "residual_dropout": 0.0}
            if kind == "seed_oss"
            else {"sliding_window": None}
        )
        if not {"rope_theta", "rope_parameters"} & raw.keys():
            raw["rope_theta"] = dict(config.rotary)[GLOBAL].theta
    if config.type.windows == "some" and SLIDING in config.kinds:
        raw["layer_types"] = kinds
    return raw | {
        "model_type": kind,
        "architectures": [f"{_CLASSES[kind]}ForCausalLM"],
        "num_hidden_layers": len(kept),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": config.head_dim,
        "intermediate_size": max(units["neurons"], 1),
        "tie_word_embeddings": config.tied,
    }


def _dividing(config: DecoderConfig, groups: int, queries: int) -> tuple[int, int]:
    """The smallest numbers of heads, of at least these, that divide the width, as some programs ask for."""
    most = config.attention_heads // config.groups
    offered = [(g, q) for g in range(groups, config.groups + 1) for q in range(queries, most + 1)]
    fitting = [pair for pair in offered if config.embed % (pair[0] * pair[1]) == 0]
    return min(fitting or [(config.groups, most)], key=lambda pair: pair[0] * pair[1])


def aligned(config: DecoderConfig, params: Params) -> Params:
    """The parameters: no two layers share any that depend on their units."""
    return params

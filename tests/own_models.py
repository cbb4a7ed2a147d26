"""Flax modules as their users write them: a vision transformer of `nnx.Linear`, and a Qwen3 of einsums."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxprune as jp

PATCHES, PIXELS, EMBED, HEADS, HEAD_DIM, NEURONS, LABELS = 6, 12, 16, 4, 8, 24, 5


class Attention(nnx.Module):
    """Heads side by side in the output of a linear map, as it reads them from there."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(EMBED, rngs=rngs)
        self.query, self.key, self.value = (nnx.Linear(EMBED, HEADS * HEAD_DIM, rngs=rngs) for _ in range(3))
        self.out = nnx.Linear(HEADS * HEAD_DIM, EMBED, rngs=rngs)
        self.heads = jp.own.Gate(jnp.ones(HEADS))

    def __call__(self, x: Any) -> Any:
        x = self.norm(x)
        query, key, value = (each(x).reshape(*x.shape[:2], -1, HEAD_DIM) for each in (self.query, self.key, self.value))
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(HEAD_DIM))
        mixed = jnp.einsum("bnts,bsnh->btnh", weights, value) * self.heads[...][:, None]
        return self.out(mixed.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(EMBED, rngs=rngs)
        self.up, self.down = nnx.Linear(EMBED, NEURONS, rngs=rngs), nnx.Linear(NEURONS, EMBED, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.neurons = jp.own.Gate(jnp.ones(NEURONS))

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.down(nnx.gelu(self.up(self.norm(x))) * self.neurons[...]))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention, self.mlp = Attention(rngs), FeedForward(rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(x)
        return x + self.mlp(x)


class VisionTransformer(nnx.Module):
    """Patches `[b, patches, pixels]` to logits `[b, labels]`."""

    def __init__(self, rngs: nnx.Rngs, layers: int = 2):
        self.patches = nnx.Linear(PIXELS, EMBED, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs(), (PATCHES, EMBED)))
        self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
        self.out = nnx.Linear(EMBED, LABELS, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        x = self.patches(images) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(1))


VISION_AXES: Any = {
    "patches.kernel": ("pixels", "embed"),
    "patches.bias": ("embed",),
    "position": ("patches", "embed"),
    "blocks.*.*.norm.*": ("embed",),
    **{f"blocks.*.attention.{name}.kernel": ("embed", ("heads", "head_dim")) for name in ("query", "key", "value")},
    **{f"blocks.*.attention.{name}.bias": (("heads", "head_dim"),) for name in ("query", "key", "value")},
    "blocks.*.attention.out.kernel": (("heads", "head_dim"), "embed"),
    "blocks.*.mlp.up.kernel": ("embed", "neurons"),
    "blocks.*.mlp.up.bias": ("neurons",),
    "blocks.*.mlp.down.kernel": ("neurons", "embed"),
    "blocks.*.*.*.bias": ("embed",),
    "out.kernel": ("embed", "labels"),
    "out.bias": ("labels",),
}
VISION_SIZES = {"head_dim": HEAD_DIM}

GROUPS, QUERIES, VOCABULARY = 2, 3, 31


class Einsum(nnx.Module):
    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs):
        self.w = nnx.Param(0.2 * jax.random.normal(rngs.params(), shape))

    def __call__(self, equation: str, x: Any) -> Any:
        return jnp.einsum(equation, x, self.w[...])


class RMSNorm(nnx.Module):
    def __init__(self, size: int):
        self.w = nnx.Param(jnp.ones(size))

    def __call__(self, x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * self.w[...]


def rotate(x: Any) -> Any:
    """Rotary positions of `[b, t, heads, channels]`."""
    angles = jnp.arange(1.0 * x.shape[1])[:, None] / 10_000 ** jnp.linspace(0.0, 1.0, HEAD_DIM // 2, endpoint=False)
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class GroupedAttention(nnx.Module):
    """Query heads in one axis, of which so many next to each other share a key and a value head."""

    def __init__(self, rngs: nnx.Rngs):
        self.q_proj = Einsum((EMBED, GROUPS * QUERIES, HEAD_DIM), rngs)
        self.kv_proj = Einsum((2, EMBED, GROUPS, HEAD_DIM), rngs)
        self.o_proj = Einsum((GROUPS * QUERIES, HEAD_DIM, EMBED), rngs)
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.groups = jp.own.Gate(jnp.ones(GROUPS))

    def __call__(self, x: Any) -> Any:
        query = rotate(self.q_norm(self.q_proj("btd,dnh->btnh", x)))
        key, value = self.kv_proj("bsd,cdkh->cbskh", x)
        key = rotate(self.k_norm(key))
        b, t, groups, _ = key.shape
        query = query.reshape(b, t, groups, query.shape[2] // max(groups, 1), HEAD_DIM)
        scores = jnp.einsum("btkgh,bskh->bkgts", query, key) / math.sqrt(HEAD_DIM)
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf))
        mixed = jnp.einsum("bkgts,bskh->btkgh", weights, value) * self.groups[...][:, None, None]
        return self.o_proj("btnh,nhd->btd", mixed.reshape(b, t, -1, HEAD_DIM))


class GatedMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.gate_proj, self.up_proj = (nnx.Linear(EMBED, NEURONS, use_bias=False, rngs=rngs) for _ in range(2))
        self.down_proj = nnx.Linear(NEURONS, EMBED, use_bias=False, rngs=rngs)
        self.neurons = jp.own.Gate(jnp.ones(NEURONS))

    def __call__(self, x: Any) -> Any:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x) * self.neurons[...])


class DecoderLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(EMBED), RMSNorm(EMBED)
        self.attn, self.mlp = GroupedAttention(rngs), GatedMLP(rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nnx.Module):
    """Tokens `[b, t]` to logits `[b, t, vocabulary]`, the embedding tied."""

    def __init__(self, rngs: nnx.Rngs, layers: int = 2):
        self.embedder = nnx.Embed(VOCABULARY, EMBED, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(rngs) for _ in range(layers)])
        self.final_norm = RMSNorm(EMBED)

    def __call__(self, tokens: Any) -> Any:
        x = self.embedder(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(self.final_norm(x))


QWEN3_AXES: Any = {
    "embedder.embedding": ("vocabulary", "embed"),
    "layers.*.input_layernorm.w": ("embed",),
    "layers.*.post_attention_layernorm.w": ("embed",),
    "layers.*.attn.q_proj.w": ("embed", ("groups", "queries"), "head_dim"),
    "layers.*.attn.kv_proj.w": ("key and value", "embed", "groups", "head_dim"),
    "layers.*.attn.o_proj.w": (("groups", "queries"), "head_dim", "embed"),
    "layers.*.attn.*.w": ("head_dim",),
    "layers.*.mlp.down_proj.kernel": ("neurons", "embed"),
    "layers.*.mlp.*.kernel": ("embed", "neurons"),
    "final_norm.w": ("embed",),
}

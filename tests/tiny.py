"""Tiny random models, batches and gates that the tests share.

The weights are random but not small: logits differ by about 1 between examples, so every gate matters.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import Model, TaskHead, family
from jaxprune.units import UNITS, Gates, Params, axes_of, flatten, input_axes, unflatten, widths

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert")
NUMERIC_TYPES = ("bert", "distilbert")  # for laws of numbers: the others differ in positions and names
TEXT_TYPES = ("t5", "mt5")  # answer in text; t5 is T5 1.0 here, mt5 the later architecture
# Decoders: a plain one, one with biases, one with norms of heads, and one with windows and norms after each module
DECODER_TYPES = ("llama", "qwen2", "qwen3", "gemma3_text")
LENGTH = 64  # the most tokens a tiny model reads


def tiny_config(
    model_type: str, *, layers: int = 2, embed: int = 16, attention_heads: int = 4, neurons: int = 32, vocab: int = 60
) -> dict[str, Any]:
    """The Hugging Face configuration of a tiny model, as in a `config.json`; without dropout."""
    if model_type in TEXT_TYPES:
        return {
            "model_type": model_type,
            "vocab_size": vocab,
            "d_model": embed,
            "d_kv": 3,
            "d_ff": neurons,
            "num_layers": layers,
            "num_decoder_layers": layers + 1,
            "num_heads": attention_heads,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
            "feed_forward_proj": "relu" if model_type == "t5" else "gated-gelu",
            "tie_word_embeddings": model_type == "t5",
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }
    if model_type == "distilbert":
        return {
            "model_type": model_type,
            "vocab_size": vocab,
            "max_position_embeddings": LENGTH,
            "dim": embed,
            "n_layers": layers,
            "n_heads": attention_heads,
            "hidden_dim": neurons,
            "activation": "gelu",
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
            "pad_token_id": 0,
        }
    if model_type in DECODER_TYPES:
        gemma = model_type == "gemma3_text"
        return {
            "model_type": model_type,
            "vocab_size": vocab,
            "max_position_embeddings": LENGTH,
            "hidden_size": embed,
            "num_hidden_layers": layers,
            "num_attention_heads": attention_heads,
            "num_key_value_heads": attention_heads // 2,
            "head_dim": 6,
            "intermediate_size": neurons,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": gemma,
            "rope_theta": 100.0,  # else tiny heads hardly turn within a few tokens
        } | ({"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 9} if gemma else {})
    roberta = model_type != "bert"
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "max_position_embeddings": LENGTH + (2 if roberta else 0),  # RoBERTa's positions begin after the padding's
        "hidden_size": embed,
        "num_hidden_layers": layers,
        "num_attention_heads": attention_heads,
        "intermediate_size": neurons,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-5 if roberta else 1e-12,
        "pad_token_id": 1 if roberta else 0,
        "type_vocab_size": 1 if roberta else 2,
    }


def tiny_model(
    model_type: str = "bert",
    *,
    layers: int = 2,
    embed: int = 16,
    attention_heads: int = 4,
    neurons: int = 32,
    vocab: int = 60,
    heads: tuple[TaskHead, ...] | None = None,
    seed: int = 0,
) -> tuple[Model, Params]:
    """A tiny model and its random float32 parameters.

    Without `heads` it has one, named "task", with three labels and the dense layer that is usual in the family; one
    that answers in text has none.
    """
    raw = tiny_config(
        model_type, layers=layers, embed=embed, attention_heads=attention_heads, neurons=neurons, vocab=vocab
    )
    if heads is None and model_type in (*TEXT_TYPES, *DECODER_TYPES):
        heads = ()
    elif heads is None:
        dense = "relu" if model_type == "distilbert" else "tanh"
        heads = (TaskHead(name="task", labels=("no", "maybe", "yes"), dense=dense),)
    module = family(model_type)
    model = Model(module.parse_config(raw, heads))
    return model, lively(model, seed)


@lru_cache
def shapes(model: Model) -> Params:
    """The shapes of a model's parameters, traced once: many tests ask for the same model."""
    return jax.eval_shape(model.initialise, jax.random.key(0))


def lively(model: Model, seed: int = 0) -> Params:
    """Parameters in which everything matters: no bias is zero, no kernel is small."""
    random = np.random.default_rng(seed)
    flat = {}
    for path, array in flatten(shapes(model)).items():
        draw = random.standard_normal(array.shape)
        if path[-1] == "kernel":
            axes = axes_of(model.axes, path)
            inputs = input_axes(axes)
            outputs = len(axes) - inputs  # the axes that are not contracted
            fan_in = int(np.prod(array.shape[: len(axes) - outputs]))
            value = 1.5 * draw / np.sqrt(max(fan_in, 1))
        elif path[-1] == "embedding":
            value = draw
        else:
            value = (1.0 if path[-1] == "scale" else 0.0) + 0.2 * draw
        flat[path] = jax.device_put(value.astype(array.dtype))  # jnp.asarray would compile for every shape
    return unflatten(flat)


def tiny_batch(model: Model, rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    """A padded batch: the first row is `length` tokens long, the others are shorter or equal, at least 2.

    A model that answers in text gets decoder inputs of at most five tokens, too.
    """
    random = np.random.default_rng(seed)
    lengths = random.integers(min(2, length), length + 1, rows)
    lengths[:1] = length
    mask = np.arange(length) < lengths[:, None]
    pad = model.config.pad_id
    ids = np.where(mask, random.integers(pad + 1, model.config.vocab, mask.shape), pad)
    batch = {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}
    if model.config.segments:
        second = np.arange(length) >= lengths[:, None] // 2
        batch["token_type_ids"] = (second & mask & (model.config.segments > 1)).astype(np.int32)
    if len(model.stacks) > 1:
        decoded = np.arange(5) < random.integers(2, 6, rows)[:, None]
        ids = np.where(decoded, random.integers(2, model.config.vocab, decoded.shape), pad)
        ids[:, 0] = model.config.start_id
        batch |= {"decoder_input_ids": ids.astype(np.int32), "decoder_attention_mask": decoded.astype(np.int32)}
    return batch


def random_gates(
    model: Model, params: Params, seed: int = 0, fractional: bool = False, kinds: tuple[str, ...] = UNITS
) -> Gates:
    """Random gates for every site, about half of them closed; with `fractional` the others lie in [0, 1.5)."""
    random = np.random.default_rng(seed)
    gates = {}
    for name, units in widths(model.axes, params, kinds).items():
        gate = (random.random(units) < 0.5).astype(np.float32)
        if fractional:
            gate *= (1.5 * random.random(units)).astype(np.float32)
        gates[name] = jnp.asarray(gate)
    return gates

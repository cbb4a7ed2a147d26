"""Tiny models written as GGUF files and as folders of Hugging Face's, by the names and layouts of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensors

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OF_GEMMA = MODULES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EOS, TOKENS = 1, [f"<{i}>" for i in range(40)]


def config_of(architecture: str, width: int = 32) -> dict[str, Any]:
    """The configuration of a tiny model with 4 heads in 2 groups and 2 layers."""
    gemma = architecture == "gemma3"
    config = {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "intermediate_size": 2 * width,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": gemma or architecture == "qwen2",
        "eos_token_id": EOS,
    }
    window = {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": width // 4}
    return config | (window if gemma else {})


def tensors_of(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """Random tensors as Hugging Face calls them."""
    d, f, h, kind = config["hidden_size"], config["intermediate_size"], config["head_dim"], config["model_type"]
    queries, keys = (config[name] * h for name in ("num_attention_heads", "num_key_value_heads"))
    maps = {"q_proj": (queries, d), "k_proj": (keys, d), "v_proj": (keys, d)}
    inner: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in maps.items()}
    if kind == "qwen2" or config.get("attention_bias"):
        inner |= {f"self_attn.{name}.bias": shape[:1] for name, shape in maps.items()}
    if config.get("attention_bias"):
        inner["self_attn.o_proj.bias"] = (d,)
    if kind in ("qwen3", "gemma3_text"):
        inner |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
    inner |= {"self_attn.o_proj.weight": (d, queries), "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d)}
    norms = ("input", "post_attention", *(("pre_feedforward", "post_feedforward") if kind == "gemma3_text" else ()))
    inner |= {"mlp.down_proj.weight": (d, f)} | {f"{name}_layernorm.weight": (d,) for name in norms}
    shapes = {
        f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in inner.items()
    }
    shapes |= {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def place_of(name: str, config: Mapping[str, Any]) -> str:
    """The name of llama.cpp."""
    outer = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in outer:
        return f"{outer[name]}.weight"
    module, _, leaf = name.removeprefix("model.layers.").rpartition(".")
    layer, _, module = module.partition(".")
    return f"blk.{layer}.{(OF_GEMMA if config['model_type'] == 'gemma3_text' else MODULES)[module]}.{leaf}"


def order_of(name: str, config: Mapping[str, Any]) -> np.ndarray | None:
    """The order of the rows in a GGUF file; None where it stays."""
    if config["model_type"] != "llama" or not any(part in name for part in ("q_proj", "k_proj")):
        return None
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    return np.arange(heads * config["head_dim"]).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    kind: str = "F32",
    settings: Mapping[str, Any] | None = None,
    more: Tensors | None = None,
    without: tuple[str, ...] = (),
) -> Tensors:
    """Writes a GGUF file whose matrices have a type, and gives what it then holds, as Hugging Face has it."""
    architecture = {theirs: name for name, theirs in ARCHITECTURES.items()}[config["model_type"]]
    writer, held = gguf.GGUFWriter(path, architecture), {}
    about: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if architecture == "gemma3":
        names = {"sliding_window": "sliding_window", "sliding_window_pattern": "sliding_window_pattern"}
        about |= {f"attention.{name}": config[theirs] for theirs, name in names.items()}
    about = {f"{architecture}.{name}": value for name, value in about.items()}
    for name, value in (
        about | {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.eos_token_id": EOS, **(settings or {})}
    ).items():
        if name not in without and value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(name, value)
    for name, array in tensors.items():
        place, order = place_of(name, config), order_of(name, config)
        array = array if order is None else array[order]
        shift = architecture == "gemma3" and name.endswith("norm.weight")
        array = array + np.float32(1) if shift else array
        own = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        stored = rounded(array, own)
        if place not in without:
            writer.add_tensor(place, stored, raw_dtype=own)
        array = gguf.quants.dequantize(stored, own)
        held[name] = (array if order is None else array[np.argsort(order)]) - np.float32(shift)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def rounded(array: np.ndarray, kind: Any) -> np.ndarray:
    """The bytes of a matrix in a type; random ones with finite scales where there is no function that rounds."""
    if kind.name in ("F32", "F16"):
        return array.astype(np.float32 if kind.name == "F32" else np.float16)
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (array.shape[0], array.shape[1] // weights * size)
        return np.random.default_rng(array.size).integers(0, 60, shape).astype(np.uint8)

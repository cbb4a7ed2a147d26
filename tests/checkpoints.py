"""Tiny Hugging Face checkpoints, written with NumPy alone. The names and shapes are PyTorch's, listed here by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tiny import tiny_config

PREFIX = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "distilbert": "distilbert."}
CLASS = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
LABELS = ("negative", "neutral", "positive")

Tensors = dict[str, np.ndarray]


def classifier_config(model_type: str, **sizes: int) -> dict[str, Any]:
    """The `config.json` of a `...ForSequenceClassification` model."""
    return tiny_config(model_type, **sizes) | {
        "architectures": [f"{CLASS[model_type]}ForSequenceClassification"],
        "id2label": {str(i): label for i, label in enumerate(LABELS)},
    }


def encoder_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """PyTorch's name and shape of every tensor of an encoder, without prefix."""
    distil = config["model_type"] == "distilbert"
    d, f = (config["dim"], config["hidden_dim"]) if distil else (config["hidden_size"], config["intermediate_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], d),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
    }
    if not distil:
        shapes["embeddings.token_type_embeddings.weight"] = (config["type_vocab_size"], d)
    for i in range(config["n_layers"] if distil else config["num_hidden_layers"]):
        if distil:
            layer = f"transformer.layer.{i}."
            square = ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"]
            norms, up, down = ["sa_layer_norm", "output_layer_norm"], "ffn.lin1", "ffn.lin2"
        else:
            layer = f"encoder.layer.{i}."
            square = [f"attention.self.{name}" for name in ("query", "key", "value")] + ["attention.output.dense"]
            norms, up, down = ["attention.output.LayerNorm", "output.LayerNorm"], "intermediate.dense", "output.dense"
        for name, out, into in (*((name, d, d) for name in square), (up, f, d), (down, d, f)):
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = (out, into), (out,)
        for name in norms:
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (d,)
    return shapes


def classifier_tensors(config: Mapping[str, Any], *, prefix: bool = True, seed: int = 0) -> Tensors:
    """Random float32 tensors of a classifier, under the names that PyTorch saves."""
    model_type = config["model_type"]
    base = PREFIX[model_type] if prefix else ""
    d = config["dim"] if model_type == "distilbert" else config["hidden_size"]
    shapes = {base + name: shape for name, shape in encoder_shapes(config).items()}
    dense, out = {
        "bert": (f"{base}pooler.dense", "classifier"),
        "distilbert": ("pre_classifier", "classifier"),
    }.get(model_type, ("classifier.dense", "classifier.out_proj"))
    shapes |= {f"{dense}.weight": (d, d), f"{dense}.bias": (d,)}
    shapes |= {f"{out}.weight": (len(LABELS), d), f"{out}.bias": (len(LABELS),)}
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Tensors, *, shards: int = 1) -> Path:
    """Writes a Hugging Face folder: one safetensors file, or several and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def write_classifier(folder: Path, model_type: str = "bert") -> Path:
    """A tiny, valid Hugging Face classifier."""
    config = classifier_config(model_type)
    return write_checkpoint(folder, config, classifier_tensors(config))


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data

"""Makes `tests/golden`: tiny Hugging Face checkpoints, batches, and the logits that PyTorch computes for them.

With them the parity with PyTorch is tested where PyTorch is not installed. Run it again when a model type is added:

    make test-reference   # installs PyTorch
    .venv/bin/python tests/make_golden.py
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = (1, 7, 13)
POSITIONS = max(LENGTHS)  # the longest batch uses every position there is
VOCAB, SEGMENTS = 40, 3
CASES: dict[str, dict[str, Any]] = {
    "bert": {"activation": "gelu", "labels": 3},
    "roberta": {"activation": "gelu_new", "labels": 2},
    "xlm-roberta": {"activation": "relu", "labels": 1},  # a regression
    "distilbert": {"activation": "gelu", "labels": 4},
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "seed_oss", "gemma3_text")


def random_classifier(
    model_type: str,
    *,
    activation: str = "gelu",
    labels: int = 3,
    embed: int = 24,
    heads: int = 3,
    neurons: int = 19,
    layers: int = 2,
    seed: int = 0,
    task: str = "SequenceClassification",
) -> Any:
    """A PyTorch classifier for inference, with weights large enough for every one of them to matter."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    settings: dict[str, Any] = {"vocab_size": VOCAB, "num_labels": labels, "attn_implementation": "eager"}
    if model_type == "distilbert":
        settings |= {"dim": embed, "n_heads": heads, "hidden_dim": neurons, "n_layers": layers}
        settings |= {"activation": activation, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    else:
        roberta = model_type in ("roberta", "xlm-roberta", "camembert", "data2vec-text")
        settings |= {"embedding_size": embed} if model_type == "electra" else {}
        settings |= {"hidden_size": embed, "num_attention_heads": heads, "intermediate_size": neurons}
        settings |= {"num_hidden_layers": layers, "hidden_act": activation, "pad_token_id": int(roberta)}
        settings |= {"max_position_embeddings": POSITIONS + 2 * roberta, "layer_norm_eps": 1e-5 if roberta else 1e-12}
        settings |= {"type_vocab_size": 1 if roberta else SEGMENTS}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = random.standard_normal(tuple(parameter.shape))
            if parameter.ndim == 1:
                value = 0.2 * draw + (1.0 if name.lower().endswith("norm.weight") else 0.0)
            else:
                value = draw if "embeddings" in name else 1.5 * draw / np.sqrt(parameter.shape[1])
            parameter.copy_(torch.tensor(value, dtype=parameter.dtype))
    return model


def random_batch(model: Any, length: int, *, rows: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch padded on the right; its first row has no padding. Segments where the model has several."""
    random = np.random.default_rng([seed, length])
    lengths = random.integers(1, length + 1, rows)
    lengths[0] = length
    mask = np.arange(length) < lengths[:, None]
    pad = model.config.pad_token_id
    batch = {"input_ids": np.where(mask, random.integers(pad + 1, VOCAB, mask.shape), pad), "attention_mask": mask * 1}
    if getattr(model.config, "type_vocab_size", 1) > 1:
        batch["token_type_ids"] = mask * random.integers(0, SEGMENTS, mask.shape)
    return batch


def run(model: Any, batch: Mapping[str, np.ndarray], **settings: bool) -> Any:
    """The results of PyTorch."""
    torch = importlib.import_module("torch")
    with torch.no_grad():
        return model(**{name: torch.tensor(array) for name, array in batch.items()}, **settings)


def random_gates(model: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Gates for every site, a third of them closed and a third open, under our names."""
    random = np.random.default_rng(seed)
    config = model.config
    gates = {}
    for i in range(config.num_hidden_layers):
        for site, units in (("attention.heads", config.num_attention_heads), ("ffn.neurons", _neurons(config))):
            gates[f"{i}.{site}"] = np.resize([0.0, 1.0, 0.5], units)[random.permutation(units)].astype(np.float32)
    return gates


def scale_columns(model: Any, gates: Mapping[str, np.ndarray]) -> None:
    """Does in PyTorch what gates do: scales the columns of the weights that read each unit."""
    torch = importlib.import_module("torch")
    modules = dict(model.named_modules())
    distil = model.config.model_type == "distilbert"
    layer = "distilbert.transformer.layer" if distil else f"{model.base_model_prefix}.encoder.layer"
    readers = {
        "attention.heads": "attention.out_lin" if distil else "attention.output.dense",
        "ffn.neurons": "ffn.lin2" if distil else "output.dense",
    }
    with torch.no_grad():
        for name, gate in gates.items():
            index, site = name.split(".", 1)
            weight = modules[f"{layer}.{index}.{readers[site]}"].weight
            weight *= torch.tensor(np.repeat(gate, weight.shape[1] // len(gate)))


def _neurons(config: Any) -> int:
    return config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size


def make(folder: Path, model_type: str) -> None:
    """Writes one checkpoint and what PyTorch computes with it."""
    shutil.rmtree(folder, ignore_errors=True)
    model = random_classifier(model_type, **CASES[model_type])
    model.save_pretrained(folder)
    batches = [random_batch(model, length) for length in (min(LENGTHS), max(LENGTHS))]
    logits = [run(model, batch).logits.tolist() for batch in batches]
    gates = random_gates(model)
    scale_columns(model, gates)
    write(
        folder,
        gates={name: gate.tolist() for name, gate in gates.items()},
        batches=[{name: array.tolist() for name, array in batch.items()} for batch in batches],
        logits=logits,
        gated_logits=run(model, batches[-1]).logits.tolist(),  # of the last batch
    )


def make_decoder(folder: Path, model_type: str) -> None:
    """Writes one decoder, its logits for a batch with padding on both sides, and the text it writes."""
    torch, cases = importlib.import_module("torch"), importlib.import_module("test_reference_decoders")
    shutil.rmtree(folder, ignore_errors=True)
    random = np.random.default_rng(len(model_type))
    model = cases.lively(model_type, cases.random_config(model_type, random), 0)
    model.save_pretrained(folder)
    ids, mask = random.integers(3, 60, (3, 9)), np.ones((3, 9), np.int64)
    mask[1, :4] = mask[2, 7:] = 0
    places = np.maximum(mask.cumsum(1) - 1, 0)
    logits = run(model, {"input_ids": ids, "attention_mask": mask, "position_ids": places}).logits.numpy()
    left = {"input_ids": torch.tensor(ids[:2]), "attention_mask": torch.tensor(mask[:2])}
    text = model.generate(**left, max_new_tokens=5, do_sample=False, pad_token_id=0)[:, 9:].tolist()
    batch = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    write(folder, batch=batch, logits=[[[float(f"{z:.6g}") for z in t] for t in row] for row in logits], text=text)


def write(folder: Path, **content: Any) -> None:
    """Writes what PyTorch computed, with the versions."""
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", "numpy")}
    content = {
        "made_by": "tests/make_golden.py",
        "versions": {"python": platform.python_version(), **versions},
    } | content
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    (folder / "golden.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    for model_type in CASES:
        make(GOLDEN / model_type, model_type)
    for model_type in DECODERS:
        make_decoder(GOLDEN / model_type, model_type)

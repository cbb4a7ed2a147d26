"""Logits and greedy text of decoders equal those of Hugging Face's PyTorch models, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxprune as jp

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4  # of the scale: float32, other order of sums
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTARY = (
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    LLAMA3 | {"rope_theta": 300.0, "original_max_position_embeddings": 16},
)
CONFIGS = 5  # random ones of every type


def random_config(model_type: str, random: np.random.Generator) -> dict[str, Any]:
    """Settings of a tiny model: what its type offers, drawn."""
    groups = int(random.choice([1, 2, 3]))
    queries = int(random.choice([1, 2, 3, 8]))
    config: dict[str, Any] = {
        "vocab_size": 60,
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        # of Llama and Gemma the heads have to divide the width
        "hidden_size": groups * queries * 2 if model_type in ("llama", "gemma3_text") else 18,
        "head_dim": int(random.choice([4, 6, 10])),
        "intermediate_size": 21,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "tie_word_embeddings": bool(random.integers(2)),
        "hidden_activation" if model_type == "gemma3_text" else "hidden_act": str(
            random.choice(["silu", "gelu_pytorch_tanh", "relu"])
        ),
        "rms_norm_eps": float(random.choice([1e-6, 1e-2])),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type != "gemma3_text":
        config["rope_parameters"] = dict(ROTARY[random.integers(len(ROTARY))])
    if model_type in ("llama", "qwen3", "seed_oss", "gemma3_text"):
        config["attention_bias"] = bool(random.integers(2))
    if model_type in ("llama", "seed_oss"):
        config["mlp_bias"] = bool(random.integers(2))
    if model_type == "seed_oss":
        config["attention_out_bias"] = bool(random.integers(2))
    if model_type == "mistral":
        config["sliding_window"] = [None, 3][random.integers(2)]
    if model_type in ("qwen2", "qwen3"):
        used = bool(random.integers(2))
        config |= {"use_sliding_window": used, "sliding_window": 4, "max_window_layers": int(random.integers(3))}
    if model_type == "gemma3_text":
        config |= {
            "sliding_window": int(random.choice([3, 5])),
            "layer_types": [["sliding_attention", "full_attention"][i] for i in random.integers(2, size=3)],
            "query_pre_attn_scalar": int(random.choice([4, 25])),
            "final_logit_softcapping": [None, 5.0][random.integers(2)],
        }
    return config


def lively(model_type: str, config: dict[str, Any], seed: int) -> Any:
    """A model of transformers in which everything matters: no bias is zero, no norm's scale is one."""
    import transformers

    torch = pytest.importorskip("torch")

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("seed", range(CONFIGS))
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "seed_oss", "gemma3_text"])
def test_logits_and_text_equal_hugging_face(model_type: str, seed: int, tmp_path: Path):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng([seed, len(model_type)])
    theirs = lively(model_type, random_config(model_type, random), seed)
    theirs.save_pretrained(tmp_path)
    model, params = jp.load(tmp_path)
    ids, mask = random.integers(3, 60, (3, 11)), np.ones((3, 11), np.int64)
    mask[1, :4] = mask[2, 7:] = 0  # padding on the left, and on the right
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        expected = theirs(**given, position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))).logits.numpy()
        left = {name: rows[:2] for name, rows in given.items()}
        text = theirs.generate(**left, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 11:].numpy()
    logits = np.asarray(model.apply(params, {"input_ids": ids, "attention_mask": mask}).logits)
    real = mask.astype(bool)
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=TOLERANCE * np.abs(expected).max())
    written = jp.generate(model, params, {name: rows.numpy() for name, rows in left.items()}, max_new_tokens=6)
    np.testing.assert_array_equal(np.asarray(written)[:, : text.shape[1]], text)

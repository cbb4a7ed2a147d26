"""llama.cpp itself loads what `jp.export` writes, and computes the same (make test-runtimes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_export import pruned, usual

import jaxprune as jp

llama_cpp: Any = pytest.importorskip("llama_cpp")

# Its GELU is looked up in a table of float16; all else is float32 here, the cache included
TOLERANCES = {"llama": 1e-4, "qwen2": 1e-4, "qwen3": 1e-4, "seed_oss": 1e-4, "gemma3_text": 1e-3}
PLAIN = {"n_ctx": 64, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0, "flash_attn": False}


@pytest.mark.parametrize("kinds", [("groups", "neurons"), ("neurons",)])
@pytest.mark.parametrize("model_type", TOLERANCES)
def test_llama_cpp_computes_the_same(model_type: str, kinds: tuple[str, ...], tmp_path: Path):
    model, params = usual(model_type)
    small = pruned(model, params, 2, kinds=kinds)
    jp.export(tmp_path / "model.gguf", model, small, to="gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), **PLAIN)
    ids = list(range(5, 25))
    theirs.eval(ids)
    batch = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int32)}
    expected = np.asarray(model.apply(small, batch).logits)[0]
    found = np.array(theirs.scores[: len(ids)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[model_type] * np.abs(expected).max())

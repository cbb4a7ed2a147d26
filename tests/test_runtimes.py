"""llama.cpp itself loads what `jp.export` writes, and computes the same (make test-runtimes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_export import GGUF, UNEVEN, alike, uneven, usual

import jaxprune as jp
from jaxprune.models import Model
from jaxprune.units import Params

llama_cpp: Any = pytest.importorskip("llama_cpp")

# Its GELU is looked up in a table of float16; all else is float32 here, the cache included
TOLERANCES = {"gemma3_text": 2e-3}
PLAIN = {"n_ctx": 64, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0, "flash_attn": False}


@pytest.mark.parametrize("model_type", GGUF)
def test_llama_cpp_computes_the_same(model_type: str, tmp_path: Path):
    model, params = usual(model_type)
    assert_same(model, alike(model, params), tmp_path)


@pytest.mark.parametrize("case", UNEVEN)
def test_llama_cpp_computes_the_same_where_layers_differ(case: str, tmp_path: Path):
    assert_same(*uneven(case), tmp_path)


def assert_same(model: Model, small: Params, tmp_path: Path) -> None:
    jp.export(tmp_path / "model.gguf", model, small, to="gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), **PLAIN)
    ids = list(range(5, 25))
    theirs.eval(ids)
    batch = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int32)}
    expected = np.asarray(model.apply(small, batch).logits)[0]
    found = np.array(theirs.scores[: len(ids)])
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=TOLERANCES.get(model.config.model_type, 1e-4) * np.abs(expected).max()
    )

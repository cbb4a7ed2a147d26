"""transformers itself loads what `jp.export` writes, without code of ours, and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_export import DECODERS, ENCODERS, KINDS, logits, of_type, pruned
from tiny import random_gates, tiny_batch

import jaxprune as jp
from jaxprune.checkpoints.tensors import TensorFile

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4


def theirs(folder: Path, batch: Any) -> Any:
    """What the class that the folder names gives, and whether all of its parameters were in the file."""
    import transformers

    torch = pytest.importorskip("torch")
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    unread = {
        name for names in (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]) for name in names
    }
    assert unread <= {"pooler.dense.weight", "pooler.dense.bias"}
    with torch.no_grad():
        return model.eval()(**{name: torch.tensor(np.asarray(ids, np.int64)) for name, ids in batch.items()})


def real(values: Any, batch: Any) -> np.ndarray:
    array, mask = np.asarray(values), batch.get("decoder_attention_mask", batch["attention_mask"])
    return array[mask == 1] if array.ndim == 3 else array


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", [*ENCODERS, "t5", "mt5", *DECODERS])
def test_logits_of_an_export_are_those_of_the_model(model_type: str, seed: int, tmp_path: Path):
    decoder = model_type in DECODERS
    model, params = of_type(model_type, layers=3, **({"attention_heads": 8} if decoder else {}))
    small = pruned(model, params, seed, **({"kinds": KINDS} if decoder and seed else {}))
    jp.export(tmp_path / "out", model, small)
    batch = tiny_batch(model)
    expected = logits(model, small, batch)
    found = real(theirs(tmp_path / "out", batch).logits, batch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("name", ["model", "text_model"])
def test_the_bundled_models_leave_the_house(name: str, tmp_path: Path):
    model, params = jp.load(jp.bundled_model() if name == "model" else jp.bundled_text_model())
    small = jp.compact(model, params, random_gates(model, params))
    jp.export(tmp_path / "out", model, small, dtype="float32")
    batch = tiny_batch(model, length=20)
    out = theirs(tmp_path / "out", batch)
    if name == "text_model":
        found, expected = real(out.logits, batch), logits(model, small, batch)
    else:  # its heads stand beside the encoder, and take the mean over the tokens: as the card of the folder says
        with TensorFile(tmp_path / "out" / "heads.safetensors") as file:
            kernel, bias = (file.read(f"sst2.out.{leaf}") for leaf in ("kernel", "bias"))
        mask = batch["attention_mask"][..., None]
        found = (np.asarray(out.last_hidden_state) * mask).sum(1) / mask.sum(1) @ kernel + bias
        expected = logits(model, small, batch, head="sst2")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())

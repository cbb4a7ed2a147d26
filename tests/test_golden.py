"""Law 8 where PyTorch is not installed: logits equal those that it computed when `make_golden.py` ran."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import CASES, DECODERS, GOLDEN
from tiny import MODEL_TYPES

from jaxprune.checkpoints.folder import load
from jaxprune.evaluation.text import generate
from jaxprune.models import family

TOLERANCE = 1e-4  # of the logits' scale: float32, other order of sums


def test_every_model_type_has_golden_logits():
    assert set(CASES) == set(MODEL_TYPES) < set(family("bert").MODEL_TYPES)  # the others are compared with PyTorch
    assert set(DECODERS) == set(family("llama").MODEL_TYPES)


@pytest.mark.parametrize("model_type", CASES)
def test_golden_logits(model_type: str):
    golden = json.loads((GOLDEN / model_type / "golden.json").read_text())
    assert {"torch", "transformers"} <= golden["versions"].keys()
    model, params = load(GOLDEN / model_type)
    gates = {name: jnp.asarray(values, jnp.float32) for name, values in golden["gates"].items()}
    batches = [{name: np.asarray(rows, np.int32) for name, rows in batch.items()} for batch in golden["batches"]]
    found = [model.apply(params, batch).logits for batch in batches]
    found.append(model.apply(params, batches[-1], gates).logits)
    for ours, expected in zip(found, [*golden["logits"], golden["gated_logits"]], strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("model_type", DECODERS)
def test_golden_logits_and_text_of_decoders(model_type: str):
    golden = json.loads((GOLDEN / model_type / "golden.json").read_text())
    model, params = load(GOLDEN / model_type)
    batch = {name: np.asarray(rows, np.int32) for name, rows in golden["batch"].items()}
    expected, real = np.asarray(golden["logits"]), batch["attention_mask"].astype(bool)
    found = np.asarray(model.apply(params, batch).logits)
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=TOLERANCE * np.abs(expected).max())
    left = {name: rows[:2] for name, rows in batch.items()}
    written = np.asarray(generate(model, params, left, max_new_tokens=5))
    text = np.asarray(golden["text"])
    np.testing.assert_array_equal(written[:, : text.shape[1]], text)

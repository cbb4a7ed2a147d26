"""Greedy text equals that of Hugging Face's PyTorch models, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_reference_t5 import KINDS, random_batch, random_t5, saved

from jaxprune.checkpoints.folder import load
from jaxprune.evaluation.text import generate

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module", autouse=True)
def torch() -> Any:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def random_writer(kind: str, **own: int) -> Any:
    """A random PyTorch model that does not only repeat the token it reads, as one with large tied embeddings would."""
    torch = pytest.importorskip("torch")

    model = random_t5(kind, **({"pad_token_id": 0, "decoder_start_token_id": 0} | own))
    with torch.no_grad():
        model.shared.weight.mul_(0.3)
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(3.0)
    return model


def source(length: int, seed: int, *, left: bool = False) -> dict[str, np.ndarray]:
    """Three rows, two of them padded."""
    batch = random_batch(length, 1, seed)
    names = ("input_ids", "attention_mask")
    return {name: batch[name][:, ::-1].copy() if left else batch[name] for name in names}


def theirs(model: Any, batch: dict[str, np.ndarray], limit: int) -> np.ndarray:
    """The text PyTorch generates after the start token, padded to the limit: it stops where the last row has ended.

    Without its cache: that has a place for every layer of the encoder, and the decoder has more (transformers 5.23).
    """
    torch = pytest.importorskip("torch")

    arrays = {name: torch.from_numpy(array).long() for name, array in batch.items()}
    with torch.no_grad():
        tokens = model.generate(**arrays, do_sample=False, num_beams=1, max_new_tokens=limit, use_cache=False).numpy()
    assert (tokens[:, 0] == model.config.decoder_start_token_id).all()
    return np.pad(tokens[:, 1:], ((0, 0), (0, limit + 1 - tokens.shape[1])), constant_values=model.config.pad_token_id)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_text_equals_hugging_face(kind: str, left: bool, tmp_path: Path):
    other = random_writer(kind)
    model, params = load(saved(tmp_path, kind, other))
    for length, limit in ((1, 1), (7, 5), (33, 26)):  # 26 is beyond the largest distance, 20
        batch = source(length, length, left=left)
        expected = theirs(other, batch, limit)
        np.testing.assert_array_equal(generate(model, params, batch, max_new_tokens=limit), expected)
    assert np.unique(expected).size > 3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_end_where_those_of_hugging_face_end(kind: str, tmp_path: Path):
    batch, limit = source(11, 3), 24
    free = theirs(random_writer(kind, pad_token_id=2, decoder_start_token_id=5), batch, limit)
    ended = []
    for place in (0, 2, 5):
        end = int(free[1, place])
        other = random_writer(kind, eos_token_id=end, pad_token_id=2, decoder_start_token_id=5)
        model, params = load(saved(tmp_path / str(place), kind, other))
        expected = theirs(other, batch, limit)
        np.testing.assert_array_equal(generate(model, params, batch, max_new_tokens=limit), expected)
        ended += [(row == end).any() for row in expected]
    assert True in ended and False in ended

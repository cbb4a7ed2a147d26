"""Weights are hashed once: whatever asks for the digest of arrays that cannot change gets the one that is known."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from commands import Place, place
from tiny import tiny_model

import jaxprune as jp
from jaxprune.checkpoints import tensors as digests
from jaxprune.checkpoints.folder import saved_digest
from jaxprune.checkpoints.tensors import model_digest, params_digest
from jaxprune.pruning.selection import pruning_record
from jaxprune.scoring.criteria import Magnitude
from jaxprune.scoring.run import Scoring
from jaxprune.scoring.scores import check_scores
from jaxprune.units import flatten

__all__ = ["place"]  # a fixture


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of everything that is hashed for digests, in bytes."""
    sizes: list[int] = []

    class Counting:
        def __init__(self, data: bytes = b""):
            self._sha = hashlib.sha256(data)

        def update(self, data: Any) -> None:
            if not isinstance(data, bytes):  # names and shapes
                sizes.append(memoryview(data).nbytes)
            self._sha.update(data)

        def hexdigest(self) -> str:
            return self._sha.hexdigest()

    monkeypatch.setattr(digests, "hashlib", SimpleNamespace(sha256=Counting))
    return sizes


def weights_of(params: Any) -> int:
    return sum(array.nbytes for array in flatten(params).values())


def test_weights_are_hashed_once_from_loading_to_saving(place: Place, tmp_path: Path, hashed: list[int]):
    model, params = jp.load(place.model)
    task = jp.load_task("mood", data=place.data)
    scoring = Scoring(criterion=Magnitude(), rows=jp.Rows(examples=8))
    scores = jp.score(model, params, task, scoring)
    gates = jp.select(model, params, scores, jp.budgets.Units(0.5))
    check_scores(model, params, scores)
    small = jp.compact(model, params, gates)
    record = pruning_record(scores, gates)
    named = hashed.copy()
    jp.save(tmp_path / "out", model, small, pruning=record)
    assert model_digest(model, small) == model_digest(*jp.load(tmp_path / "out"))
    more = sum(hashed) - sum(named)
    assert more == 2 * weights_of(small)  # once as it is saved, once as other arrays that were loaded
    digests_of_scores = sum(array.nbytes for array in (*scores.values.values(), *gates.values()))
    assert sum(named) == weights_of(params) + digests_of_scores


@pytest.mark.slow
def test_digests_are_forgotten_with_their_arrays():
    gc.collect()  # what other tests left
    before = set(digests._known)
    _, params = tiny_model()
    first = params_digest(params)
    assert len(digests._known.keys() - before) == 1
    assert params_digest(jax.tree.map(lambda array: array, params)) == first  # another dict of the same arrays
    assert len(digests._known.keys() - before) == 1
    params["embeddings"]["norm"]["bias"] = params["embeddings"]["norm"]["bias"] + 1
    gc.collect()
    assert not digests._known.keys() - before
    assert params_digest(params) != first


def test_arrays_that_may_change_are_hashed_again():
    _, params = tiny_model()
    params = jax.tree.map(np.array, params)
    first = params_digest(params)
    params["embeddings"]["norm"]["bias"][0] += 1
    assert params_digest(params) != first


def test_what_is_saved_as_it_is_has_the_digest_that_is_known(hashed: list[int]):
    model, params = tiny_model()
    model_digest(model, params)
    known = sum(hashed)
    assert saved_digest(model, params) == model_digest(model, params) and sum(hashed) == known
    assert saved_digest(model, params, np.float16) != model_digest(model, params) and sum(hashed) == 2 * known

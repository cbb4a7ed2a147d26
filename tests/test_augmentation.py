"""Copies of train rows: which words may change, what stays, and that no held-out text gets in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from commands import Place, place, record_of, run
from test_likelihood import speaker
from test_training import encoder, moods

from jaxprune.cli.training import AUGMENTATION
from jaxprune.data.augmentation import Augmentation, augment, copies_of, word_candidates
from jaxprune.data.splits import Example, marks, row_key, rows_of
from jaxprune.data.tasks import Task, load_task
from jaxprune.models import Model
from jaxprune.units import Params

__all__ = ["place"]  # a fixture

EVERY = Augmentation(frequent=0, copies=3, candidates=2, probability=1.0)


def arranged() -> tuple[Model, Params]:
    """A model in which film and book have one direction, dog nearly theirs, and all other words one of their own."""
    model, params = encoder()
    table = np.zeros((model.config.vocab, model.config.embed), np.float32)
    ids = {w: model.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("film", "book", "dog", "sun")}
    for word, vector in {"film": (2, 0), "book": (3, 0), "dog": (1, 0.5), "sun": (0, 1)}.items():
        table[ids[word], :2] = vector
    return model, params | {"embeddings": params["embeddings"] | {"word": {"embedding": jnp.asarray(table)}}}


def test_candidates_are_the_most_similar_words_by_cosine():
    model, params = arranged()
    found = word_candidates(model, params, ["Film dog", "dog nowhere"], EVERY)
    assert found == {"film": ("book", "dog"), "dog": found["dog"]}
    assert set(found["dog"]) == {"book", "film"}  # the same direction, whatever the length
    assert word_candidates(model, params, ["film dog dog"], replace(EVERY, frequent=1)).keys() == {"film"}
    more = word_candidates(model, params, ["film"], replace(EVERY, candidates=10_000))["film"]
    assert "film" not in more and len(more) == len(set(more))


def test_a_copy_by_hand():
    candidates = {"film": ("book",), "dog": ("sun",)}
    rows = [Example(text="The Film, not the dog's!", label=1), Example(text="dog", pair="a film", label=0)]
    found = list(copies_of(rows, candidates, EVERY, set()))
    assert found == [Example(text="The Book, not the sun's!", label=1), Example(text="sun", pair="a book", label=0)]


def test_copies_differ_from_all_rows_and_from_what_is_held_out():
    model, params = encoder()
    task = moods()
    settings = Augmentation(frequent=0, copies=8, candidates=3)
    rows = task.rows("train")
    candidates = word_candidates(model, params, [row.text for row in rows], settings)
    copies = list(copies_of(rows, candidates, settings, set()))
    keys = [row_key(copy) for copy in copies]
    assert len(keys) == len(set(keys)) and not set(keys) & {row_key(row) for row in rows} and len(copies) > 1000
    held = set(keys[:100])
    assert not held & {row_key(copy) for copy in copies_of(rows, candidates, settings, held)}
    labels = {row_key(row): row.label for row in rows}
    assert {copy.label for copy in copies} == set(labels.values())


def test_copies_depend_on_their_row_and_the_seed_alone():
    candidates = {"film": ("book", "sun", "dog"), "old": ("long", "red")}
    rows = [Example(text=f"{a} film {b} old", label=0) for a in ("the", "a") for b in ("is", "was")]
    one = list(copies_of(rows, candidates, EVERY, set()))
    other = list(copies_of(rows[::-1], candidates, EVERY, set()))
    assert sorted(map(row_key, one)) == sorted(map(row_key, other))
    third = list(copies_of(rows, candidates, replace(EVERY, seed=1), set()))
    assert [row.text for row in third] != [row.text for row in one]


def test_the_probability_is_that_of_a_word():
    candidates = {"old": ("red",)}
    rows = [Example(text=" ".join(["old"] * 40 + [str(i)]), label=0) for i in range(200)]
    settings = Augmentation(copies=1, probability=0.4)
    changed = [copy.text.split().count("red") for copy in copies_of(rows, candidates, settings, set())]
    assert np.mean(changed) == pytest.approx(16, abs=4 * (40 * 0.24 / 200) ** 0.5)  # four standard errors


def test_a_task_with_copies_keeps_its_other_splits():
    model, params = encoder()
    task = moods()
    found = augment(model, params, task, Augmentation(frequent=0, copies=2))
    assert found.rows("train")[: len(task.rows("train"))] == task.rows("train")
    assert all(found.rows(split) == task.rows(split) for split in ("calibration", "dev", "test"))
    held = {row_key(row) for split in ("calibration", "dev", "test") for row in task.rows(split)}
    assert not held & {row_key(row) for row in found.rows("train")}


def test_a_text_to_text_model_knows_words_too():
    model, params = speaker()
    found = word_candidates(model, params, ["good bad film"], Augmentation(frequent=0))
    assert found and all(len(own) >= 1 and word not in own for word, own in found.items())


def test_what_cannot_be_copied_is_refused():
    model, params = encoder()
    with pytest.raises(ValueError, match="no word of the train rows of 'moods' can be exchanged"):
        augment(model, params, moods(), Augmentation(frequent=10_000))
    with pytest.raises(ValueError, match="no train rows to copy"):
        augment(model, params, replace(moods(), splits={**moods().splits, "train": ()}))
    with pytest.raises(ValueError, match="asks for spans"):
        augment(model, params, replace(moods(), spans=True))
    for wrong in ({"copies": 0}, {"candidates": 0}, {"frequent": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            Augmentation(**wrong)
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"probability must lie in \(0, 1\]"):
            Augmentation(probability=wrong)


def test_augment_writes_a_data_set(place: Place, tmp_path: Path):
    more = tmp_path / "more"
    how = ("augment", place.model, "--task", "mood", "--data", place.data, "-o", more, "--frequent", 2, "--copies", 4)
    record = record_of(*how)
    before, after = (load_task("mood", data=data) for data in (place.data, more))
    assert isinstance(before, Task)
    for split in ("calibration", "dev", "test"):
        assert before.digest(split) == after.digest(split) == record["rows"][split]
    assert len(after.rows("train")) == record["sizes"]["train"] > 3 * len(before.rows("train"))
    held = marks(rows_of(row for split in ("calibration", "dev", "test") for row in after.rows(split)))
    assert not held & {row_key(row) for row in after.rows("train")} and not after.dropped
    assert json.loads((more / "mood" / AUGMENTATION).read_text()) == record
    files = {file.name: file.read_bytes() for file in (more / "mood").iterdir()}
    again = run(*how)
    assert again.exit_code == 0 and "of an earlier run" in " ".join(again.stderr.split())
    assert "a row" in again.stdout and max(map(len, again.stdout.splitlines()[:-1])) <= 80
    other = run(*how, "--seed", 1)
    assert other.exit_code == 2 and "exists already" in other.stderr
    assert {file.name: file.read_bytes() for file in (more / "mood").iterdir()} == files
    for damaged in (b"[]", b"{}", b"\xff", b"[" * 100_000, json.dumps(record | {"examples": 5}).encode()):
        (more / "mood" / AUGMENTATION).write_bytes(damaged)
        refused = run(*how)
        assert refused.exit_code == 2 and f"{AUGMENTATION} cannot be used: " in refused.stderr
    assert run(*how, "--seed", 1, "--overwrite").exit_code == 0
    assert (more / "mood" / "train.jsonl").read_bytes() != files["train.jsonl"]
    mine = tmp_path / "mine" / "mood"
    mine.mkdir(parents=True)
    refused = run(*how[:7], mine.parent, "--frequent", 2, "--overwrite")
    assert refused.exit_code == 2 and "it is not replaced" in refused.stderr and not list(mine.iterdir())


def test_an_interrupted_augmentation_leaves_nothing(place: Place, tmp_path: Path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxprune.cli.training._first_copies", stop)
    more = tmp_path / "more"
    result = run("augment", place.model, "--task", "mood", "--data", place.data, "-o", more, "--frequent", 2)
    assert result.exit_code == 130 and not (more / "mood").exists()
    assert not list(more.glob("*"))

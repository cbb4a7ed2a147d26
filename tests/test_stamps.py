"""Remembered digests of files, and when they are forgotten; models of which only shapes and digest are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import write_classifier
from commands import place, record_of, run, scored
from tiny import tiny_model

from jaxprune.checkpoints import files as stamps
from jaxprune.checkpoints import folder as checkpoint
from jaxprune.checkpoints.files import private_folder, recall, remember, stamp_of
from jaxprune.checkpoints.folder import load, outline, save
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.cli import terminal
from jaxprune.pruning.budgets import Flops
from jaxprune.pruning.selection import select
from jaxprune.scoring.scores import load_scores
from jaxprune.units import flatten

__all__ = ["place", "scored"]  # fixtures


DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for digests, which takes those of files that were just written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stamps, "SETTLED", -1.0)
    folder = terminal.digests_folder()
    assert folder is not None
    return folder


def test_a_stamp_is_another_one_after_any_change(memory, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"de")
    files, before = {one, two}, stamp_of({one, two})
    remember(memory, before, files, DIGEST)
    assert stamp_of([two, one]) == before and recall(memory, before) == DIGEST
    times = one.stat()
    one.write_bytes(b"abd")
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same place, size and time of writing
    assert stamp_of(files) != before and recall(memory, stamp_of(files)) is None
    remember(memory, before, files, "f" * 64)  # the files changed while they were read
    assert recall(memory, before) == DIGEST


def test_what_changed_just_now_is_not_remembered(memory, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    monkeypatch.setattr(stamps, "SETTLED", 60.0)
    assert stamp_of([file]) is None
    remember(memory, None, [file], DIGEST)
    assert recall(memory, None) is None and not memory.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": 3}', '{"digest": "of another model"}', "null"])
def test_a_damaged_memory_is_as_good_as_none(memory, content):
    memory.mkdir(parents=True)
    (memory / "stamp.json").write_text(content)
    assert recall(memory, "stamp") is None


def test_a_memory_is_private_and_nothing_in_it_is_followed(memory, tmp_path):
    """Whoever may write into a cache may say which scores belong to which model, and where a file is written to."""
    (file := tmp_path / "file").write_bytes(b"abc")
    stamp = stamp_of([file])
    remember(memory, stamp, [file], DIGEST)
    entry = memory / f"{stamp}.json"
    assert memory.stat().st_mode & 0o777 == 0o700 and recall(memory, stamp) == DIGEST
    entry.rename(tmp_path / "elsewhere")
    for poison in (
        lambda: entry.symlink_to(tmp_path / "elsewhere"),
        lambda: entry.hardlink_to(tmp_path / "elsewhere"),
        lambda: os.mkfifo(entry),
        lambda: entry.write_bytes(json.dumps({"digest": DIGEST}).encode() + b" " * 2**24),
    ):
        poison()
        assert recall(memory, stamp) is None
        entry.unlink()
    before = (tmp_path / "elsewhere").read_bytes()
    entry.symlink_to(tmp_path / "elsewhere")
    remember(memory, stamp, [file], "f" * 64)
    assert (tmp_path / "elsewhere").read_bytes() == before
    assert recall(memory, stamp) == "f" * 64 and not entry.is_symlink()


def test_a_memory_that_others_could_write_into_is_closed_or_not_used(memory, tmp_path):
    (file := tmp_path / "file").write_bytes(b"abc")
    stamp = stamp_of([file])
    remember(memory, stamp, [file], DIGEST)
    memory.chmod(0o777)
    assert recall(memory, stamp) == DIGEST and memory.stat().st_mode & 0o777 == 0o700
    memory.chmod(0o777)
    (memory / "link").symlink_to(file)  # somebody was here
    assert not private_folder(memory)
    (memory / "link").unlink()
    memory.rename(tmp_path / "real")
    memory.symlink_to(tmp_path / "real")
    assert not private_folder(memory) and recall(memory, stamp) is None
    remember(memory, "a" * 64, [file], DIGEST)
    assert [entry.name for entry in (tmp_path / "real").iterdir()] == [f"{stamp}.json"]


def test_programs_are_compiled_into_a_private_folder_or_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    updates: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    terminal.keep_compiled_programs()
    folder = terminal.cache_folder()
    assert updates["jax_compilation_cache_dir"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    updates.clear()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    terminal.keep_compiled_programs()
    assert "jax_compilation_cache_dir" not in updates and "compiled programs are not kept" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_changes_nothing(memory, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    memory.parent.parent.mkdir(parents=True)
    memory.parent.write_text("a file where a folder should be")
    remember(memory, stamp_of([file]), [file], DIGEST)
    stamp = stamp_of([file])
    assert recall(memory, stamp) is None
    file.unlink()
    remember(memory, stamp, [file], DIGEST)  # nor do files that are gone


@pytest.mark.parametrize("how", [{}, {"dtype": np.float16}, {"packed": "exact"}, {"packed": "int8"}])
def test_an_outline_has_the_digest_and_the_shapes_of_what_load_gives(tmp_path, how):
    folder = save(tmp_path / "model", *tiny_model(), **how)
    loaded, dense = load(folder)
    found = outline(folder)
    assert found.model == loaded and found.digest == model_digest(loaded, dense)
    wanted = {path: (array.shape, array.dtype) for path, array in flatten(dense).items()}
    assert {path: (own.shape, own.dtype) for path, own in flatten(found.shapes).items()} == wanted


def test_an_outline_of_a_hugging_face_folder(tmp_path):
    folder = write_classifier(tmp_path / "model")
    assert outline(folder).digest == model_digest(*load(folder))


def test_weights_are_read_once_for_all_plans(place, scored, memory, monkeypatch):
    asked = ("plan", place.model, "--scores", scored, "--flops", 0.5)
    first = record_of(*asked)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_later", lambda *_: pytest.fail("the weights are read again"))
        assert record_of(*asked) == first
    (kept,) = memory.iterdir()
    kept.unlink()
    assert record_of(*asked) == first and kept.is_file()


def test_scoring_remembers_for_the_first_plan(place, memory, tmp_path, monkeypatch):
    rows = ("--task", "mood", "--data", place.data, "--criterion", "magnitude")
    assert run("score", place.model, *rows, "-o", tmp_path / "scores").exit_code == 0
    monkeypatch.setattr(checkpoint, "read_later", lambda *_: pytest.fail("the weights are read again"))
    assert record_of("plan", place.model, "--scores", tmp_path / "scores", "--flops", 0.5)["command"] == "plan"


def test_a_plan_notices_that_the_weights_have_changed(place, scored, memory, tmp_path):
    model, params = load(place.model)
    folder = save(tmp_path / "model", model, params)
    asked = ("plan", folder, "--scores", scored, "--flops", 0.5)
    assert run(*asked).exit_code == 0
    file = folder / "model.safetensors"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    result = run(*asked)
    assert result.exit_code == 2 and "belong to another model" in result.stderr


def test_shapes_are_enough_to_select(place, scored):
    scores = load_scores(scored)
    model, params = load(place.model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    found = select(model, shapes, scores, Flops(0.5))
    wanted = select(model, params, scores, Flops(0.5))
    assert found.keys() == wanted.keys() and all((found[name] == wanted[name]).all() for name in wanted)

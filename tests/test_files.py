"""A crash leaves the old file or folder, or the new one; nothing that is not ours is ever replaced."""

from __future__ import annotations

import itertools
import json
import os
import pty
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_classifier
from tiny import tiny_model

from jaxprune.checkpoints import files
from jaxprune.checkpoints.files import (
    check_file,
    check_writable,
    folder_for,
    interrupted,
    remove_folder,
    write_atomic,
)
from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.tensors import TensorFile, model_digest


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Single files


def test_write_atomic_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "scores.json"
    assert write_atomic(path, b"one") == path
    write_atomic(str(path), lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["scores.json"]


def test_write_atomic_keeps_the_old_file_if_the_new_one_fails(tmp_path):
    path = write_atomic(tmp_path / "scores.json", b"old")

    def fails(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fails)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["scores.json"]


def test_write_atomic_follows_a_symbolic_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = write_atomic(tmp_path / "elsewhere" / "scores.json", b"old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    write_atomic(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def special(path: Path, kind: str) -> Path:
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(os.path.relpath(path))  # names of sockets are short
    elif kind == "a device":
        path.symlink_to(os.ttyname(pty.openpty()[1]))  # where nobody can make files
    else:
        path.symlink_to("elsewhere")
    return path


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_nothing_but_files_and_folders_is_replaced(tmp_path, monkeypatch, kind: str):
    monkeypatch.chdir(tmp_path)
    path = special(tmp_path / "out", kind)
    before = path.stat()
    for refused in (lambda: check_file(path, True), lambda: write_atomic(path, b"new")):
        with pytest.raises(FileExistsError, match=f"out is {kind}, which is never replaced"):
            refused()
    with pytest.raises(FileExistsError), folder_for(path, overwrite=True):
        pass
    with pytest.raises(ValueError, match="is no file"):
        TensorFile(path)
    assert path.stat() == before and names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a symbolic link"])
def test_a_folder_with_something_else_under_a_known_name_is_not_replaced(tmp_path, monkeypatch, kind: str):
    model, params = tiny_model()
    monkeypatch.chdir(tmp_path)
    out = save(tmp_path / "out", model, params, extra={"card.md": b"old"})
    (out / "card.md").unlink()
    special(out / "card.md", kind)
    with pytest.raises(FileExistsError, match=f"card.md is {kind}, which is never replaced"):
        save(out, model, params, overwrite=True)
    with pytest.raises(FileExistsError, match=f"card.md is {kind}"), folder_for(out, overwrite=True):
        pass
    assert names(out) == ["card.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o400])
def test_a_file_keeps_its_mode(tmp_path, mode: int):
    path = write_atomic(tmp_path / "scores.json", b"one")
    usual = (tmp_path / "usual").touch() or (tmp_path / "usual").stat().st_mode
    assert path.stat().st_mode == usual
    path.chmod(mode)
    modes = []

    def write(file: Any) -> None:
        modes.append(stat.S_IMODE(os.stat(file.fileno()).st_mode))
        file.write(b"two")

    write_atomic(path, write)
    assert path.read_bytes() == b"two" and stat.S_IMODE(path.stat().st_mode) == mode
    assert modes == [0o600]  # nobody else reads it before it has its mode


def test_a_private_folder_and_private_files_stay_private(tmp_path):
    out = tmp_path / "out"
    for content in (("config", "weights"), ("config", "packed", "weights")):
        with folder_for(out, overwrite=True) as fresh:
            for name in content:
                (fresh / name).touch()
            assert not out.exists() or stat.S_IMODE(fresh.stat().st_mode) == 0o700
        if "packed" not in content:
            out.chmod(0o750)
            (out / "config").chmod(0o640)
            (out / "weights").chmod(0o600)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in (out, *out.iterdir())}
    assert modes == {"out": 0o750, "config": 0o640, "weights": 0o600, "packed": 0o600}


def test_links_that_lead_to_each_other_are_refused_before_any_work(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    for path in (tmp_path / "one", tmp_path / "one" / "out"):
        for refused in (check_writable, lambda path: check_file(path, True), lambda path: write_atomic(path, b"")):
            with pytest.raises(OSError, match="Too many levels of symbolic links"):
                refused(path)


# Folders


def test_save_makes_missing_folders_and_fills_an_empty_one(tmp_path):
    model, params = tiny_model()
    save(tmp_path / "a" / "b", model, params)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", model, params)
    assert names(tmp_path / "empty") == names(tmp_path / "a" / "b") == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["a", "empty"]


def test_save_does_not_replace_without_overwrite(tmp_path):
    model, params = tiny_model()
    _, other = tiny_model(seed=1)
    save(tmp_path / "out", model, params)
    with pytest.raises(
        FileExistsError, match=r"out exists already: choose another name, or replace it with --overwrite"
    ):
        save(tmp_path / "out", model, other)
    assert model_digest(*load(tmp_path / "out")) == model_digest(model, params)
    save(tmp_path / "out", model, other, overwrite=True)
    assert model_digest(*load(tmp_path / "out")) == model_digest(model, other)
    assert names(tmp_path) == ["out"]


def test_overwriting_leaves_no_old_file_behind(tmp_path):
    model, params = tiny_model()
    save(tmp_path / "out", model, params, pruning={}, extra={"README.md": b"# card"})
    assert names(tmp_path / "out") == ["README.md", "config.json", "model.safetensors", "pruning.json"]
    save(tmp_path / "out", model, params, overwrite=True)
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_a_model_can_be_saved_over_the_folder_it_came_from(tmp_path):
    model, params = tiny_model()
    save(tmp_path / "out", model, params, extra={"vocab.txt": b"[PAD]\n"})
    model, params = load(tmp_path / "out")
    save(tmp_path / "out", model, params, overwrite=True)
    again = load(tmp_path / "out")
    assert model_digest(*again) == model_digest(model, params)
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == b"[PAD]\n"


def test_overwrite_never_touches_what_save_did_not_write(tmp_path):
    model, params = tiny_model()
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("ten years")
    with pytest.raises(FileExistsError, match="not a folder that jaxprune saved"):
        save(thesis, model, params, overwrite=True)
    original = write_classifier(tmp_path / "hf")
    with pytest.raises(FileExistsError, match="not a folder that jaxprune saved"):
        save(original, model, params, overwrite=True)
    ours = save(tmp_path / "out", model, params)
    (ours / "notes.txt").write_text("do not lose")
    with pytest.raises(FileExistsError, match=r"files that were not saved with the model: \['notes.txt'\]"):
        save(ours, model, params, overwrite=True)
    with pytest.raises(FileExistsError, match=r"notes.txt is a file: choose another name"):
        save(ours / "notes.txt", model, params, overwrite=True)
    assert (ours / "notes.txt").read_text() == "do not lose"
    assert names(thesis) == ["thesis.tex"]
    assert names(tmp_path) == ["hf", "out", "thesis"]


def test_extra_files_do_not_lose_to_those_that_are_written(tmp_path):
    model, params = tiny_model()
    model = replace(model, source=save(tmp_path / "in", model, params, extra={"vocab.txt": b"[PAD]\n"}))
    for extra in ({"vocab.txt": b"mine"}, {"pruning.json": b"{}"}):
        with pytest.raises(ValueError, match=f"extra files {next(iter(extra))}: the tokenizer or `pruning` has"):
            save(tmp_path / "out", model, params, extra=extra, pruning={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "../card.md", "sub/card.md", ".."])
def test_extra_files_have_plain_names_of_their_own(tmp_path, name):
    model, params = tiny_model()
    with pytest.raises(ValueError, match="not a file name, or one that is written anyway"):
        save(tmp_path / "out", model, params, extra={name: b""})
    assert names(tmp_path) == []


def test_the_current_folder_and_those_above_it_are_refused(tmp_path, monkeypatch):
    model, params = tiny_model()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for path in (".", "..", tmp_path / "empty"):
        with pytest.raises((ValueError, FileExistsError), match=r"current folder|exists already"):
            save(path, model, params)
    save("out", model, params)
    assert names(tmp_path / "empty") == ["out"]


def test_a_symbolic_link_to_a_folder_stays_one(tmp_path):
    model, params = tiny_model()
    save(tmp_path / "real", model, params)
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", model, tiny_model(seed=1)[1], overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert model_digest(*load(tmp_path / "real")) != model_digest(model, params)
    assert names(tmp_path) == ["link", "real"]


def test_a_model_whose_tokenizer_is_gone_is_not_saved_without_it(tmp_path):
    source = write_classifier(tmp_path / "hf")
    model, params = load(source)
    source.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"hf, from which the model was loaded, is gone, and the tokenizer with it"
    ):
        save(tmp_path / "out", model, params)


def test_an_error_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def fails(overwrite: bool) -> None:
        with folder_for(tmp_path / "out", overwrite=overwrite) as fresh:
            (fresh / "new").touch()
            raise KeyboardInterrupt

    for overwrite in (False, True):
        with pytest.raises(KeyboardInterrupt):
            fails(overwrite)
        assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    def write() -> None:
        with folder_for(tmp_path / "out") as fresh:
            (fresh / "new").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(FileExistsError, match=r"out exists already and is not an empty folder"):
        write()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


def test_two_saves_at_once_do_not_disturb_each_other(tmp_path):
    with folder_for(tmp_path / "out", overwrite=True) as slow:
        (slow / "slow").touch()
        with folder_for(tmp_path / "out", overwrite=True) as fast:
            (fast / "fast").touch()
        assert names(tmp_path / "out") == ["fast"] and names(slow) == ["slow"]
    assert names(tmp_path / "out") == ["slow"]
    assert names(tmp_path) == ["out"]


# Systems that cannot swap two folders in one step


def test_two_renames_do_what_the_swap_does(tmp_path):
    for name in ("fresh", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files._rename_twice(tmp_path / "fresh", tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["fresh"]
    with pytest.raises(FileNotFoundError):
        files._rename_twice(tmp_path / "absent", tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["fresh"]


def test_a_crash_between_two_renames_is_found_and_repaired(tmp_path):
    model, params = tiny_model()
    out = save(tmp_path / "out", model, params)
    old = out.rename(tmp_path / ".out.old-0123abcd")
    (tmp_path / ".out.saving-0123abcd").mkdir()
    assert interrupted(out) == old
    with pytest.raises(FileNotFoundError, match=r"saving it was interrupted. Its old content is .*\.out\.old-0123abcd"):
        load(out)
    with pytest.raises(FileExistsError, match="--overwrite"):
        save(out, model, params)
    save(out, model, tiny_model(seed=1)[1], overwrite=True)
    assert names(tmp_path) == ["out"] and interrupted(out) is None


def test_a_folder_is_removed_and_what_a_crash_left_of_it(tmp_path):
    for name in ("out", ".out.saving-0123abcd", "outer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_folder(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["outer"]
    remove_folder(tmp_path / "out")  # nothing is there
    remove_folder(tmp_path / "none" / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["outer"]


def test_only_what_a_dead_save_of_the_same_name_left_is_removed(tmp_path):
    ours = {"out", ".out.saving-0123abcd", ".out.saving-89abcdef", ".out.old-0123abcd"}
    others = {".out.saving-mine", ".outer.saving-0123abcd", "x.saving-0123abcd"}
    for name in ours | others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with folder_for(tmp_path / "out", overwrite=True):
        assert set(names(tmp_path)) & ours == {"out"}
    assert set(names(tmp_path)) == {"out", *others}


# Crashes

WRITER = """
import itertools, sys
from pathlib import Path
from jaxprune.checkpoints.files import folder_for, write_atomic
root = Path(sys.argv[1])
print("ready", flush=True)
for turn in itertools.count():
    with folder_for(root / "out", overwrite=True) as fresh:
        for part in range(8):
            (fresh / str(part)).write_text(f"{turn} " * 2000)
    write_atomic(root / "file", f"{turn} ".encode() * 2000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_kill_9_leaves_whole_folders_and_whole_files(tmp_path, seed):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    for _ in itertools.repeat(None, 2000):  # the first turn must be over: until then there is no old one
        if (tmp_path / "file").exists():
            break
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.05))
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    contents = {(tmp_path / "out" / str(part)).read_text() for part in range(8)}
    assert len(names(tmp_path / "out")) == 8 and len(contents) == 1
    words = (contents.pop() + (tmp_path / "file").read_text()).split()
    assert len(words) == 4000 and len(set(words[:2000])) == len(set(words[2000:])) == 1
    with folder_for(tmp_path / "out", overwrite=True):
        pass
    write_atomic(tmp_path / "file", b"")
    assert names(tmp_path) == ["file", "out"]  # what the killed process left is gone


SAVER = """
import itertools, sys
import jaxprune as jp
first, second = jp.load(sys.argv[1]), jp.load(sys.argv[2])
print("ready", flush=True)
for model, params in itertools.cycle((second, first)):
    jp.save(sys.argv[3], model, params, overwrite=True)
"""


@pytest.mark.slow
def test_kill_9_during_save_leaves_the_old_model_or_the_new_one(tmp_path):
    digests = set()
    for seed in (0, 1):
        model, params = tiny_model(seed=seed)
        save(tmp_path / str(seed), model, params)
        digests.add(model_digest(model, params))
    save(tmp_path / "out", *load(tmp_path / "0"))
    for seed in range(3):
        command = [sys.executable, "-c", SAVER, *(str(tmp_path / name) for name in ("0", "1", "out"))]
        saver = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert saver.stdout is not None and saver.stdout.readline() == b"ready\n"
        time.sleep(random.Random(seed).uniform(0, 0.1))
        saver.send_signal(signal.SIGKILL)
        saver.communicate()
        assert model_digest(*load(tmp_path / "out")) in digests
    save(tmp_path / "out", *load(tmp_path / "0"), overwrite=True)
    assert names(tmp_path) == ["0", "1", "out"]


FULL = """
import resource, sys
import jaxprune as jp
model, params = jp.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes; the weights have more
try:
    jp.save(sys.argv[1], model, params, overwrite=True)
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
def test_a_disk_without_room_leaves_the_old_folder_and_nothing_else(tmp_path):
    model, params = tiny_model()
    out = save(tmp_path / "out", model, params)
    assert (out / "model.safetensors").stat().st_size > 20_000
    run = subprocess.run([sys.executable, "-c", FULL, str(out)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("OSError ") and "File too large" in run.stdout
    assert names(tmp_path) == ["out"]
    assert model_digest(*load(out)) == model_digest(model, params)
    assert json.loads((out / "config.json").read_text())["jaxprune"]["files"] == names(out)

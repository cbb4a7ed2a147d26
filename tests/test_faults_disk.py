"""Full disks, folders that cannot be written, two processes with one output: one clear error, or one whole result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Place, place, run
from faults import Server, record
from tiny import tiny_model

from jaxprune.checkpoints.files import write_atomic
from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.tensors import model_digest

__all__ = ["place"]  # a fixture

ROOT = os.geteuid() == 0
NO_ROOT = "only root can mount a file system or make a folder immutable"
ROWS = ("--task", "mood", "--data", "{data}")
COMMANDS: dict[str, tuple[str, ...]] = {
    "score": ("score", "{model}", *ROWS, "--examples", "40", "--batch-size", "4", "--nodes", "2"),
    "finetune": ("finetune", "{model}", *ROWS, "--epochs", "1", "--batch-size", "32"),
    "prune": ("prune", "{model}", *ROWS, "--examples", "16", "--nodes", "2", "--flops", "0.5", "--measure", "0"),
}
ROOM = {"score": 1_500, "finetune": 20_000, "prune": 20_000}  # bytes; less than a file that the command writes
BESIDE = {"score": {"out.partial"}, "finetune": {"out.state"}, "prune": {"out.scores.safetensors"}}
TURNS = 5


@pytest.fixture(scope="module")
def server(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    if not ROOT:
        pytest.skip(NO_ROOT)
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def arguments(command: str, place: Place, *more: object) -> tuple[str, ...]:
    given = [argument.format(model=place.model, data=place.data) for argument in COMMANDS[command]]
    return (*given, *map(str, more))


def output(path: Path) -> dict[str, bytes]:
    """The bytes of a score file, or of every file of a folder."""
    return {str(f.relative_to(path)): f.read_bytes() for f in ([path] if path.is_file() else sorted(path.iterdir()))}


def fill(folder: Path) -> Path:
    """Takes all the room that a file system has left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(512))
            except OSError:
                return filler


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_error_and_leaves_the_old_result(server, place, small_disk, command):
    out = small_disk / "out"
    first = server.run(*arguments(command, place, "-o", out))
    assert first.code == 0, first.output
    old, filler = output(out), fill(small_disk)
    full = server.run(*arguments(command, place, "--seed", 1, "-o", out, "--overwrite"))
    assert full.code == 2, full.output
    assert len(full.errors) == 1 and "No space left on device" in full.errors[0] and "out" in full.errors[0]
    assert output(out) == old
    assert not [entry for entry in small_disk.iterdir() if entry.name.startswith(".")]
    filler.unlink()
    again = server.run(*arguments(command, place, "--seed", 1, "-o", out, "--overwrite"))
    assert again.code == 0, again.output
    assert output(out) != old
    assert {entry.name for entry in small_disk.iterdir()} - BESIDE["prune"] == {"out"}
    record(f"full_disk_{command}", {"file_system": "1 MB", "errors": 1, "succeeded_afterwards": 1})


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_may_not_grow_is_one_error_and_leaves_the_old_result(server, place, tmp_path, command):
    out = tmp_path / "out"
    first = server.run(*arguments(command, place, "-o", out))
    assert first.code == 0, first.output
    old = output(out)
    limited = server.run(*arguments(command, place, "--seed", 1, "-o", out, "--overwrite"), file_bytes=ROOM[command])
    assert limited.code == 2, limited.output
    assert len(limited.errors) == 1 and f"File too large: {out}" in limited.errors[0]
    assert output(out) == old
    assert {entry.name for entry in tmp_path.iterdir()} <= {"out", *BESIDE[command]}
    again = server.run(*arguments(command, place, "--seed", 1, "-o", out, "--overwrite"))
    assert again.code == 0, again.output
    assert output(out) != old
    record(f"file_limit_{command}", {"bytes": ROOM[command], "errors": 1, "succeeded_afterwards": 1})


def unwritable(folder: Path, kind: str) -> None:
    if kind == "permissions":
        if ROOT:
            pytest.skip("root may write whatever the permissions")
        folder.chmod(0o555)
        return
    if not ROOT:
        pytest.skip(NO_ROOT)
    steps = {
        "immutable": [["chattr", "+i", folder]],
        "mount": [["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder]],
    }
    for step in steps[kind]:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{step[0]} does not work here: {done.stderr.strip()}")


def writable_again(folder: Path, kind: str) -> None:
    folder.chmod(0o755) if kind == "permissions" else None
    undo = {"immutable": ["chattr", "-i", folder], "mount": ["umount", folder]}.get(kind)
    if undo is not None and ROOT:
        subprocess.run(undo, capture_output=True)


@pytest.mark.parametrize("kind", ["permissions", "immutable", "mount"])
def test_a_folder_that_cannot_be_written_is_found_before_any_work(place, tmp_path, kind):
    folder = tmp_path / "kept"
    folder.mkdir()
    try:
        unwritable(folder, kind)
        for command in COMMANDS:  # the model does not exist: had anything been read, that would be the error
            given = arguments(command, place._replace(model=tmp_path / "absent"), "-o", folder / "new" / "out")
            result = run(*given)
            assert result.exit_code == 2
            assert f"no permission to write into {folder}" in result.stderr
            assert result.stderr.count("jaxprune: error: ") == 1
    finally:
        writable_again(folder, kind)
    assert list(folder.iterdir()) == []


def test_a_write_that_fails_names_the_file(tmp_path):
    def fails(file) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as error:
        write_atomic(tmp_path / "scores", fails)
    assert error.value.filename == str(tmp_path / "scores")


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_two_commands_with_one_output_leave_one_whole_result(server, place, tmp_path, command):
    expected = []
    for seed in (1, 2):
        out = tmp_path / str(seed) / "out"
        alone = server.run(*arguments(command, place, "--seed", seed, "-o", out))
        assert alone.code == 0, alone.output
        expected.append(mentions(output(out), out.parent))
    counts: Counter[str] = Counter()
    for turn in range(TURNS):
        shared = tmp_path / "shared"
        both = [
            server.start(*arguments(command, place, "--seed", seed, "-o", shared / "out", "--overwrite"))
            for seed in ((1, 2) if turn % 2 else (2, 1))
        ]
        ended = [child.wait() for child in both]
        assert {one.code for one in ended} <= {0, 2} and 0 in {one.code for one in ended}, ended
        assert all(len(one.errors) == (one.code == 2) for one in ended), ended
        found = mentions(output(shared / "out"), shared)
        assert found in expected
        names = {entry.name for entry in shared.iterdir()}
        assert names <= {"out", *BESIDE[command]}
        counts["both_succeeded" if {one.code for one in ended} == {0} else "one_was_refused"] += 1
        counts["something_left_to_go_on_from"] += bool(names & {"out.partial", "out.state"})
        shutil.rmtree(shared)
    record(f"two_at_once_{command}", {"turns": TURNS, **counts})


def mentions(found: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The files, with the folder's path, which a record may name, replaced by one word."""
    return {name: data.replace(bytes(folder), b"FOLDER") for name, data in found.items()}


SAVER = """
import sys
import jaxprune as jp
models = [jp.load(folder) for folder in sys.argv[1:3]]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(30):
    jp.save(sys.argv[3], *models[turn % 2], overwrite=True)
"""


@pytest.mark.faults
def test_two_processes_that_save_one_folder_leave_one_whole_model(tmp_path):
    digests = set()
    for seed in (0, 1):
        model, params = tiny_model(seed=seed)
        save(tmp_path / str(seed), model, params)
        digests.add(model_digest(model, params))
    orders = (("0", "1"), ("1", "0"))
    savers = [
        subprocess.Popen(
            [sys.executable, "-c", SAVER, *(str(tmp_path / name) for name in (*order, "out"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for order in orders
    ]  # fmt: skip
    for saver in savers:
        assert saver.stdout is not None and saver.stdout.readline() == "ready\n"
    errors = []
    for saver in savers:
        assert saver.stdin is not None
        saver.stdin.write("go\n")
        saver.stdin.flush()
    for saver in savers:
        errors += [line for line in saver.communicate()[1].splitlines() if "Error" in line]
        assert saver.returncode == 0 or len(errors) == 1, errors
    assert model_digest(*load(tmp_path / "out")) in digests
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0", "1", "out"]
    record("two_savers", {"saves": 60, "errors": errors})

"""kill -9 at random moments: nothing half-written is left behind, and the same command ends with the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Place, place
from faults import Server, record

from jaxprune.checkpoints.folder import load
from jaxprune.checkpoints.tensors import TensorFile
from jaxprune.scoring.scores import load_scores

__all__ = ["place"]  # a fixture

SEED = 20260101
KILLS = 20  # of each command, that met a process at work
ROWS = ("--task", "mood", "--data", "{data}")
COMMANDS: dict[str, tuple[str, ...]] = {
    "score": ("score", "{model}", *ROWS, "--examples", "40", "--batch-size", "1", "--nodes", "8"),
    "finetune": ("finetune", "{model}", *ROWS, "--task", "topic", "--epochs", "4", "--batch-size", "4"),
    "prune": ("prune", "{model}", *ROWS, "--examples", "40", "--batch-size", "1", "--flops", "0.5", "--measure", "0"),
    "rounds": (
        "prune", "{model}", *ROWS, "--examples", "40", "--batch-size", "8", "--criterion", "gradient-activation",
        "--flops", "0.4", "--measure", "0", "--rounds", "3", "--recover", "reconstruct", "--recover-rounds", "each",
    ),
    "sparsify": (
        "sparsify", "{model}", "--teacher", "{model}", *ROWS, "--steps", "60", "--batch-size", "8", "--prunings", "20",
        "--evaluate-every", "10",
    ),
    "sweep": (
        "sweep", "{model}", *ROWS, "--criterion", "integrated-gradients", "--criterion", "random",
        "--flops", "0.8,0.5", "--seeds", "2", "--examples", "16", "--nodes", "2",
    ),
}  # fmt: skip
STATE = {  # what may lie beside the output until the command has ended, without its beginning
    "score": {".partial"},
    "finetune": {".state"},
    "prune": {".scores.safetensors", ".scores.safetensors.partial"},
    "rounds": {
        ".scores.safetensors", ".scores.safetensors.partial",
        ".rounds", ".rounds.scores.safetensors", ".rounds.scores.safetensors.partial",
    },
    "sparsify": {".state"},
    "sweep": set(),
}  # fmt: skip
KEPT = {"prune": {".scores.safetensors"}, "rounds": {".scores.safetensors"}}  # and what stays


@pytest.fixture(scope="module")
def server(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("logs")) as server:
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name, and its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def results(folder: Path) -> dict[str, bytes]:
    """`contents` of what a command left, with the output's path, which a record may name, replaced by one word."""
    return {name: data.replace(bytes(folder), b"FOLDER") for name, data in contents(folder).items()}


def being_written(folder: Path) -> bool:
    """True if there is a file or folder with a hidden name."""
    with contextlib.suppress(FileNotFoundError):  # gone while it was looked at
        return any(".saving-" in name for _, *names in os.walk(folder) for own in names for name in own)
    return False


def check(command: str, folder: Path) -> None:
    """Whatever the moment of the kill: every file under its final name is whole, everything else is hidden."""
    shown = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".out")}
    assert shown <= {"out", *(f"out{ending}" for ending in STATE[command])}
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file():
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.name == "model.safetensors":
            load(file.parent)
        elif file.suffix in (".partial", ".state"):
            with TensorFile(file) as tensors:
                assert tensors.entries
        elif file.name.endswith(".scores.safetensors") or (command, file.name) == ("score", "out"):
            load_scores(file)


def kill_until_done(server: Server, command: str, place: Place, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills a command at random moments, most of them of runs that go on where one was killed."""
    names = {"model": place.model, "data": place.data}
    given = [argument.format(**names) for argument in COMMANDS[command]]
    calm, stormy = folder / "calm", folder / "stormy"
    for own in (calm, stormy):
        own.mkdir()
    whole = server.run(*given, "-o", folder / "warm")  # compiles
    assert whole.code == 0, whole.output
    begun = time.monotonic()
    whole = server.run(*given, "-o", calm / "out")
    lasted = time.monotonic() - begun
    assert whole.code == 0, whole.output
    expected, draw = results(calm), random.Random(seed)
    counts: Counter[str] = Counter()
    print(f"{command}: seed {seed}, a run takes {lasted:.1f} s")
    while counts["killed"] < kills:
        child = server.start(*given, "-o", stormy / "out")
        time.sleep(draw.uniform(0, lasted))
        if draw.random() < 0.5:  # wait until something is being written, which is seldom and short
            ends = time.monotonic() + lasted
            while time.monotonic() < ends and not being_written(stormy):
                time.sleep(0.0005)
        child.kill()
        ended = child.wait()
        check(command, stormy)
        if ended.code == -signal.SIGKILL:
            counts["killed"] += 1
            counts["something_half_written_was_hidden"] += being_written(stormy)
            counts["something_to_go_on_from"] += any(not e.name.startswith(".") for e in stormy.iterdir())
        else:
            assert ended.code == 0, ended.output
            counts["ended_before_the_kill"] += 1
        if (stormy / "out").exists() and (command != "sweep" or ended.code == 0):
            done = {
                name: data for name, data in results(stormy).items() if ended.code == 0 or Path(name).parts[0] == "out"
            }
            assert done.items() <= expected.items()
            shutil.rmtree(stormy)
            stormy.mkdir()
        assert counts["ended_before_the_kill"] < 5 * kills, "too few kills meet the command at work."
    ended = server.run(*given, "-o", stormy / "out")
    assert ended.code == 0, ended.output
    found = results(stormy)
    assert found.keys() == expected.keys()  # nothing is left beside the result
    assert {name for name in found if found[name] != expected[name]} == set()
    assert {entry.name for entry in stormy.iterdir()} == {"out", *(f"out{e}" for e in KEPT.get(command, ()))}
    return dict(counts) | {"seed": seed, "files_compared": len(found)}


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_kills_leave_nothing_half_written_and_the_same_bits_at_the_end(server, place, tmp_path, command):
    found = kill_until_done(server, command, place, tmp_path, KILLS, SEED)
    record(f"kill_{command}", found)

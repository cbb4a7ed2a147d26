"""A tiny model with two task heads, its data, and a way to run commands on them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny import tiny_model
from typer import testing
from typer.testing import CliRunner, Result

from jaxprune.__main__ import app
from jaxprune.checkpoints.folder import save
from jaxprune.models import TaskHead

# The commands are made once; typer would make them again for every run, which takes longer than most of these.
testing._get_command = cache(testing._get_command)  # pyright: ignore[reportPrivateImportUsage]
WORDS = Path(__file__).parent / "data" / "words"
TASKS = {"mood": ("bad", "good"), "topic": ("animal", "sky", "text")}
VOCABULARY = ("the", "a", "film", "book", "dog", "sun", "is", "was", "not", "very", "good", "bad", "long", "old", "red")


class Place(NamedTuple):
    """The paths of a test's files."""

    model: Path
    data: Path
    folder: Path


def run(*arguments: Any) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="jaxprune")


def record_of(*arguments: Any) -> dict[str, Any]:
    """The JSON object that a command prints, after making sure that it prints nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C and the end of a terminal reach this process and its children, even in the background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(*arguments: Any, **settings: str) -> subprocess.Popen[str]:
    """Starts a command in a process of its own."""
    with interruptible():
        return subprocess.Popen(
            [sys.executable, "-m", "jaxprune", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240.0) -> None:
    """Waits until a condition holds; the process must still be alive then."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("it took too long.")


def write_rows(file: Path, labels: tuple[str, ...], rows: int, seed: int) -> None:
    """Writes sentences of random words with random labels."""
    random = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        for i in range(rows):
            words = random.choice(VOCABULARY, random.integers(4, 12))
            stream.write(json.dumps({"sentence": " ".join(words), "label": labels[i % len(labels)]}) + "\n")


def make_place(folder: Path) -> Place:
    """Writes a model that knows both tasks, and rows for all splits."""
    heads = tuple(TaskHead(name=name, labels=labels, pooling="mean") for name, labels in TASKS.items())
    model, params = tiny_model(heads=heads)
    save(folder / "model", replace(model, source=WORDS), params)
    for i, (name, labels) in enumerate(TASKS.items()):
        for j, (split, rows) in enumerate({"train": 240, "validation": 40, "test": 60}.items()):
            write_rows(folder / "data" / name / f"{split}.jsonl", labels, rows, 10 * i + j)
    return Place(folder / "model", folder / "data", folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The model and its data."""
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def scored(place: Place) -> Path:
    """A score file of the first task."""
    file = place.folder / "mood.safetensors"
    rows = ("--task", "mood", "--data", place.data, "--criterion", "taylor", "--examples", 16)
    assert run("score", place.model, *rows, "-o", file).exit_code == 0
    return file

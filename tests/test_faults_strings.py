"""Hostile text in data, labels and names is read as text, or refused with one error, and never acts on a terminal."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from commands import WORDS, Place, place, run
from faults import record
from tiny import tiny_model
from typer.testing import Result

from jaxprune.checkpoints.folder import load, save
from jaxprune.data.tasks import load_task
from jaxprune.models import TaskHead

__all__ = ["place"]  # a fixture

STRINGS = {
    "control characters": "good\x01\x02\x08\x0b\x7f film",
    "null": "good\x00film",
    "markup": "[red]good[/red] [/] [/bold] [link=x]",
    "escape sequences": "\x1b[31mgood\x1b[0m\x1b]0;title\x07 \x9b2J",
    "both": "[red]\x1b[31mgood[/] [/bold] \x1b]0;title\x07 \x9b2J",
    "lines": "good\r\nfilm\u2028\u2029\x85",
    "folders": "../../good/film",
    "right to left": "\u202egood\u202c \u05d0\u05d1 \u200f\u2066",
    "combining": "g\u0301\u0302o\u0303" + "\u0300" * 300,
    "formula": "=cmd|' /C calc'!A0",
    "emoji": ":smile: \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "long": "good " * 200_000,
    "long word": "x" * 1_000_000,
}
REFUSED = {"surrogate": "good \ud800 film", "empty": "", "blank": " \t\n"}
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # what changes a terminal's state
QUICK = ("both",)  # run with the other tests
COUNTS: Counter[str] = Counter()


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def check(result: Result) -> str:
    """Nothing of it acts on a terminal; an error is one line. Returns how it ended."""
    assert result.exit_code in (0, 2), (result.exception, result.stderr[-2000:])
    assert not UNSAFE.search(result.stdout + result.stderr)
    if result.exit_code:
        assert result.stderr.count("jaxprune: error: ") == 1
    COUNTS["accepted" if result.exit_code == 0 else "refused"] += 1
    return "accepted" if result.exit_code == 0 else "refused"


def rows_with(folder: Path, name: str, text: str | None, labels: tuple[str, ...]) -> Path:
    """A task of 48 + 24 + 24 rows; `text` is in some of each split."""
    own = folder / "data" / name
    own.mkdir(parents=True)
    for split, rows in {"train": 48, "validation": 24, "test": 24}.items():
        with (own / f"{split}.jsonl").open("w") as file:
            for i in range(rows):
                words = f"{split} film {i}"
                if text is not None and not i % 8:
                    words = f"{text} {split} {i}" if text.strip() else text
                file.write(json.dumps({"sentence": words, "label": labels[i % len(labels)]}) + "\n")
    return folder / "data"


def commands(place: Place, data: Path, task: str, out: Path, *more: str) -> list[Result]:
    rows = ("--task", task, "--data", data, *more)
    few = ("--examples", 8, "--batch-size", 8, "--nodes", 1)
    return [
        run("evaluate", place.model, *rows, "--limit", 8),
        run("score", place.model, *rows, *few, "-o", out / "scores"),
        run("prune", place.model, *rows, *few, "--flops", 0.5, "--measure", 0, "--limit", 8, "-o", out / "small"),
    ]


def check_text(place: Place, folder: Path, text: str, expected: str) -> None:
    data = rows_with(folder, "mood", text, ("bad", "good"))
    before, out = everything(place.folder), folder / "out"
    ended = {check(result) for result in commands(place, data, "mood", out)}
    assert ended == {expected}
    made = {entry.relative_to(out).parts[0] for entry in everything(out)} if expected == "accepted" else set()
    wanted = {"scores", "small", "small.scores.safetensors", "small.answers.safetensors"}
    assert made == (wanted if expected == "accepted" else set())
    assert {p for p in everything(place.folder) - before if "compiled" not in p.parts} == set()
    assert {entry.name for entry in folder.iterdir()} <= {"data", "out"}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.faults) for k in STRINGS])
def test_any_text_can_be_scored_and_pruned_for(place, tmp_path, kind):
    check_text(place, tmp_path, STRINGS[kind], "accepted")


@pytest.mark.faults
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_refused_by_its_line(place, tmp_path, kind):
    check_text(place, tmp_path, REFUSED[kind], "refused")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: "):
        load_task("mood", data=tmp_path / "data")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.faults) for k in STRINGS])
def test_any_label_is_kept_by_saving_and_loading_and_shown_safely(place, tmp_path, kind):
    labels = tuple(sorted(("bad", STRINGS[kind].strip())))  # the order in which they are read
    model, params = tiny_model(heads=(TaskHead(name="mood", labels=labels, pooling="mean"),))
    out = save(tmp_path / "model", replace(model, source=WORDS), params)
    again, found = load(out)
    assert again.head("mood").labels == labels
    save(tmp_path / "again", again, found)
    assert load(tmp_path / "again")[0] == again
    data = rows_with(tmp_path, "mood", None, labels)
    before = {entry for entry in everything(tmp_path)}
    ended = [check(result) for result in commands(place._replace(model=out), data, "mood", tmp_path / "out")]
    assert set(ended) == {"accepted"}
    assert {entry.relative_to(tmp_path).parts[0] for entry in everything(tmp_path) - before} == {"out"}


NAMES = {
    "up": "../outside",
    "absolute": "/tmp/../etc",
    "null": "a\x00b",
    "long": "x" * 1_000_000,
    "surrogate": "a\udc80b",
    "escape sequences": "\x1b[31mred",
    "markup": "[/red][bold]",
    "both": "\x1b[31m[/red][bold]",
    "lines": "one\ntwo",
    "right to left": "\u202eabc",
    "empty": "",
    "option": "--help",
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.faults) for k in NAMES])
def test_a_task_that_is_not_there_is_one_error_whatever_its_name(place, tmp_path, kind):
    for result in commands(place, place.data, NAMES[kind], tmp_path / "out"):
        assert check(result) == "refused"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["[red] [bold]", *(pytest.param(name, marks=pytest.mark.faults) for name in ("\x1b[31mred\x07", "=cmd()"))]
)
def test_a_folder_of_any_name_is_a_task(place, tmp_path, name):
    data = rows_with(tmp_path, name, None, ("bad", "good"))
    ended = {check(result) for result in commands(place, data, name, tmp_path / "out", "--head", "mood")}
    assert ended == {"accepted"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"data", "out"}


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for kind, name in NAMES.items() if kind not in ("long", "null")])
def test_a_head_has_a_plain_name(place, name):
    model, _ = load(place.model)
    with pytest.raises(ValueError, match="made of letters, digits"):
        model.with_heads((TaskHead(name=name, labels=("a", "b")),))


@pytest.mark.faults
def test_the_counts_are_recorded():
    if not COUNTS:
        pytest.skip("run together with the tests above")
    record("strings", dict(COUNTS))

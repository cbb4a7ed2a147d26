"""The command that shares a model among tasks, and what other commands do with the model of one task."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from choices import chosen
from commands import TASKS, Place, place, record_of, run
from hand_tables import hand_table
from test_checkpoint import assert_same
from tiny import tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import GATES
from jaxprune.checkpoints.shared import load_gates
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.compaction import compact
from jaxprune.data.tasks import load_task
from jaxprune.evaluation.evaluate import evaluate
from jaxprune.pruning.budgets import Latency, Units
from jaxprune.pruning.latency import write_table
from jaxprune.pruning.selection import select
from jaxprune.scoring.scores import Scores, load_scores, save_scores
from jaxprune.units import widths

__all__ = ["place"]  # a fixture

HALF = ("--flops", 0.5)


def write_scores(file: Path, model: Path, task: str, seed: int, kinds: Sequence[str] = ("heads", "neurons")) -> Path:
    """A score file as from `score`, without the work."""
    own, params = load(model)
    random = np.random.default_rng(seed)
    values: Any = {
        name: random.random(units).astype(np.float32) for name, units in widths(own.axes, params, kinds).items()
    }
    header = {
        "format": 2, "criterion": {"name": "Random"}, "task": task, "split": "calibration", "head": task,
        "examples": 0, "largest": False, "keys": [[0, seed]], "model": model_digest(own, params), "data": [],
        "max_length": 64, "mean_length": 9.5 + seed, "completeness": None, "versions": {"jax": "0"},
    }  # fmt: skip
    return save_scores(file, Scores(values, header))


@pytest.fixture(scope="module")
def scored(place: Place) -> dict[str, Path]:
    """A score file for each of two tasks, and for a third one."""
    names = (*TASKS, "third")
    return {
        task: write_scores(place.folder / f"{task}.safetensors", place.model, task, i) for i, task in enumerate(names)
    }


@pytest.fixture(scope="module")
def shared(place: Place, scored: dict[str, Path]) -> Path:
    """A shared folder with two tasks."""
    out = place.folder / "shared"
    result = run("share", place.model, "--scores", scored["mood"], "--scores", scored["topic"], *HALF, "-o", out)
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture
def copied(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "shared"))


def test_every_task_is_selected_by_itself_within_the_budget(place, scored, tmp_path):
    out = tmp_path / "shared"
    how = (
        "--units",
        0.6,
        "--multiple-of",
        "neurons=4",
        "--floor",
        "heads=1",
        "--allocation",
        "global",
        "--protect",
        "1.ffn.neurons",
    )
    files = ("--scores", scored["mood"], "--scores", scored["topic"])
    record = record_of("share", place.model, *files, *how, "-o", out)
    model, params = load(place.model)
    settings: dict[str, Any] = {"multiple_of": {"neurons": 4}, "floor": {"heads": 1}, "protect": ["1.ffn.neurons"]}
    for row in record["tasks"]:
        gates = select(
            model, params, load_scores(scored[row["task"]]), **chosen(units=0.6, allocation="global", **settings)
        )
        assert_same(load(out, task=row["task"])[1], compact(model, params, gates))
        kept = sum(int(np.asarray(gate).sum()) for gate in gates.values())
        assert (row["after"]["units"], row["before"]["units"]) == (kept, 72)
        assert row["selection"]["units"] == 0.6 and row["selection"]["length"] == row["before"]["length"]
        assert row["gates_bytes"] == 9 and row["means_bytes"] == 0
    assert [row["task"] for row in record["tasks"]] == record["all_tasks"] == ["mood", "topic"]
    assert record["gates_file_bytes"] == (out / GATES).stat().st_size
    assert record["model"] == model_digest(model, params) and not record["added"]
    own = load_gates(out)["mood"].record
    assert own["settings"] == {"units": 0.6, "allocation": "global", "length": 9.5, "uniform": False, **settings}
    assert own["scores"]["criterion"] == {"name": "Random"} and len(own["digests"]["scores"]) == 64


def test_share_ends_with_a_table(place, scored, tmp_path):
    result = run("share", place.model, "--scores", scored["mood"], *HALF, "-o", tmp_path / "s")
    assert result.exit_code == 0, result.stderr
    for part in ("task", "units kept", "FLOPs kept", "bytes of gates", "mood", "/72", "one bit per unit"):
        assert part in result.stdout
    assert f"Next: jaxprune inspect {tmp_path / 's'}#mood" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(tmp_path) not in line) <= 80


def test_a_task_is_added_without_writing_the_weights(copied, scored):
    before = load(copied, task="mood")[1]
    inode = (copied / "model.safetensors").stat().st_ino
    record = record_of("share", copied, "--scores", scored["third"], "--flops", 0.4)
    assert record["added"] and record["all_tasks"] == ["mood", "third", "topic"]
    assert [row["task"] for row in record["tasks"]] == ["third"] and record["output"] == str(copied)
    assert (copied / "model.safetensors").stat().st_ino == inode
    assert_same(load(copied, task="mood")[1], before)
    again = run("share", copied, "--scores", scored["third"], "--flops", 0.6)
    assert again.exit_code == 2 and "has gates of third already: replace them with --overwrite" in again.stderr
    other = record_of("share", copied, "--scores", scored["third"], "--flops", 0.6, "--overwrite")
    assert other["tasks"][0]["after"]["units"] > record["tasks"][0]["after"]["units"]


def test_tasks_may_be_of_other_kinds_of_units_and_replace_closed_ones_by_means(place, copied, tmp_path):
    model, params = load(place.model)
    file = write_scores(tmp_path / "a", place.model, "cut", 5, ("channels", "query_channels", "neurons"))
    scores = load_scores(file)
    means: Any = {"1.ffn.neurons": np.arange(32, dtype=np.float32)}
    save_scores(tmp_path / "b", Scores(scores.values, dict(scores.header) | {"task": "mean"}, means))
    record = record_of("share", copied, "--scores", file, "--scores", tmp_path / "b", "--units", 0.5)
    gates = select(model, params, scores, Units(0.5))
    assert_same(load(copied, task="cut")[1], compact(model, params, gates))
    assert_same(load(copied, task="mean")[1], compact(model, params, gates, means))
    closed = int((np.asarray(gates["1.ffn.neurons"]) == 0).sum())
    assert [row["means_bytes"] for row in record["tasks"]] == [0, 4 * closed]
    assert record["tasks"][0]["before"]["units"] == 2 * (16 + 16 + 32)


def test_a_budget_of_latency_goes_by_a_table(place, scored, tmp_path):
    table = write_table(tmp_path / "table.json", hand_table(*load(place.model), length=10))
    how = ("--latency", 0.7, "--latency-table", table)
    record_of("share", place.model, "--scores", scored["mood"], *how, "-o", tmp_path / "shared")
    model, params = load(place.model)
    gates = select(model, params, load_scores(scored["mood"]), Latency(0.7, table=hand_table(model, params, length=10)))
    assert_same(load(tmp_path / "shared", task="mood")[1], compact(model, params, gates))


def test_half_precision_stays(place, scored, tmp_path):
    save(tmp_path / "half", *load(place.model), dtype="float16")
    file = write_scores(tmp_path / "scores", tmp_path / "half", "mood", 0)
    run("share", tmp_path / "half", "--scores", file, *HALF, "-o", tmp_path / "shared")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "shared")]
    assert weights[0] == weights[1]
    assert run("share", tmp_path / "shared", "--scores", file, *HALF, "--overwrite").exit_code == 0


# The model of one task in other commands


def test_commands_take_the_model_of_one_task(place, shared, scored, tmp_path):
    rows = ("--task", "mood", "--data", place.data)
    model, small = load(shared, task="mood")
    [found] = record_of("evaluate", f"{shared}#mood", *rows)["results"]
    assert found == json.loads(json.dumps(evaluate(model, small, load_task("mood", data=place.data)).to_json()))
    own = write_scores(tmp_path / "again", shared, "mood", 3)
    assert run("plan", shared, "--scores", own, *HALF).exit_code == 0  # the dense model, as ever
    how = ("--criterion", "magnitude", "--units", 0.5, "--no-evaluate", "--measure", 0)
    record = record_of("prune", f"{shared}#mood", *rows, *how, "-o", tmp_path / "smaller")
    assert record["before"]["units"] == sum(widths(model.axes, small).values())
    card = (tmp_path / "smaller" / "README.md").read_text()
    assert "`shared#mood`" in card and str(shared) not in card and "base_model" not in card


def test_inspect_shows_what_a_task_has_left(shared, scored):
    record = record_of("inspect", f"{shared}#topic", "--scores", scored["topic"])
    model, small = load(shared, task="topic")
    kept = widths(model.axes, small)
    assert [row["heads"] for row in record["layers"]] == [[kept[f"{i}.attention.heads"], 4] for i in (0, 1)]
    assert [row["neurons"] for row in record["layers"]] == [[kept[f"{i}.ffn.neurons"], 32] for i in (0, 1)]
    assert record["pruned"]["flops"] == 0.5 and record["tasks"] == []
    assert record["total"]["mean_scores"]["heads"] > 0.5  # of random numbers in [0, 1), the larger ones stay
    whole = record_of("inspect", shared)
    assert whole["tasks"] == ["mood", "topic"] and whole["pruned"] is None
    assert "Gates of mood, topic" in run("inspect", shared).stdout


# Bad input

BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "no budget": (("share", "{model}", "--scores", "{mood}", "-o", "{new}"), "exactly one budget"),
    "no scores": (("share", "{model}", "--flops", 0.5, "-o", "{new}"), "--scores"),
    "one task twice": (
        ("share", "{model}", "--scores", "{mood}", "--scores", "{mood}", "--flops", 0.5, "-o", "{new}"),
        "are both of task 'mood': name one score file per task",
    ),
    "scores of another model": (
        ("share", "{other}", "--scores", "{mood}", "--flops", 0.5, "-o", "{new}"),
        "mood.safetensors: these scores belong to another model",
    ),
    "a folder that is there": (
        ("share", "{model}", "--scores", "{mood}", "--flops", 0.5, "-o", "{shared}"),
        "exists already.*--overwrite",
    ),
    "a folder that is no shared one": (
        ("share", "{model}", "--scores", "{mood}", "--flops", 0.5),
        "is not a shared folder: it has no gates.safetensors",
    ),
    "a task that is there": (("share", "{shared}", "--scores", "{mood}", "--flops", 0.5), "has gates of mood already"),
    "an unreachable budget": (
        ("share", "{model}", "--scores", "{mood}", "--units", 0.3, "--protect", 0, "-o", "{new}"),
        "smallest reachable fraction",
    ),
    "an unknown task": (("evaluate", "{shared}#moo", "--task", "mood", "--data", "{data}"), "Did you mean 'mood'"),
    "a task of a model without": (("inspect", "{model}#mood"), "is not a shared folder"),
    "a task of nothing": (("inspect", "./no#mood"), "no folder no"),
    "damaged gates": (("inspect", "{damaged}#mood"), "gates.safetensors is not a complete safetensors file"),
    "adding to damaged gates": (("share", "{damaged}", "--scores", "{third}", "--flops", 0.5), "not a complete"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(place, shared, scored, tmp_path, case):
    arguments, message = BAD[case]
    names = {**scored, "model": place.model, "data": place.data, "shared": shared, "new": tmp_path / "new"}
    if "{other}" in arguments:
        names["other"] = save(tmp_path / "other", *tiny_model())
    if any("{damaged}" in str(word) for word in arguments):
        names["damaged"] = shutil.copytree(shared, tmp_path / "damaged")
        (tmp_path / "damaged" / GATES).write_bytes((shared / GATES).read_bytes()[:-1])
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    result = run(*(str(word).format(**names) for word in arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before


def test_share_has_examples():
    assert "Examples: jaxprune share " in run("share", "--help").stdout


def test_gates_are_packed_with_their_exact_weights_alone(shared: Path, tmp_path: Path):
    for change in (("--half",), ("--values", "int8")):
        refused = run("pack", shared, *change, "-o", tmp_path / "small")
        assert refused.exit_code == 2 and "FOLDER#TASK" in refused.stderr and not (tmp_path / "small").exists()
    record_of("pack", shared, "-o", tmp_path / "exact")
    assert load(f"{tmp_path / 'exact'}#mood")[1]
    record_of("pack", f"{shared}#mood", "--half", "-o", tmp_path / "one")
    assert not (tmp_path / "one" / "gates.safetensors").exists() and load(tmp_path / "one")[1]

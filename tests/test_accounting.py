"""`plan` predicts a loss, and `prune --loss-report` shows it beside the truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Place, place, record_of, run

from jaxprune.checkpoints.folder import load
from jaxprune.checkpoints.gates import read_pruning, recorded_gates
from jaxprune.data.splits import row_key
from jaxprune.data.tasks import Rows, load_task
from jaxprune.pruning.budgets import Units
from jaxprune.pruning.loss import LossReporting, loss_report
from jaxprune.pruning.selection import select
from jaxprune.scoring.objectives import log_probability
from jaxprune.scoring.scores import load_scores

__all__ = ["place"]  # a fixture

CHEAP = ("--criterion", "gradient-activation", "--objective", "log-probability", "--examples", 16)
QUICK = ("--units", 0.5, "--measure", 0, "--no-evaluate", "--recover", "none")


@pytest.fixture(scope="module")
def scored(place: Place) -> Path:
    file = place.folder / "mood.safetensors"
    assert run("score", place.model, "--task", "mood", "--data", place.data, *CHEAP, "-o", file).exit_code == 0
    return file


@pytest.fixture(scope="module")
def pruned(place: Place, scored: Path) -> tuple[Path, dict[str, Any]]:
    out = place.folder / "small"
    rows = ("--task", "mood", "--data", place.data, "--allocation", "per-layer")
    return out, record_of("prune", place.model, "--scores", scored, *rows, *QUICK, "--loss-report", "-o", out)


@pytest.mark.slow
def test_a_plan_predicts_what_the_report_compares_with(place, scored, pruned):
    planned = record_of("plan", place.model, "--scores", scored, "--units", 0.5)
    found = pruned[1]["receipt"]
    assert planned["prediction"] == found["prediction"]
    assert planned["objective"] == found["objective"] == "log_probability"
    scores = load_scores(scored)
    assert scores.signed is not None
    gates = select(*load(place.model), scores, Units(0.5))
    by_hand = sum(float(np.asarray(own) @ (1 - np.asarray(gates[name]))) for name, own in scores.signed.items())
    assert found["prediction"]["estimate"] == pytest.approx(by_hand, abs=1e-6)
    assert abs(by_hand) <= found["prediction"]["at_most"]
    shown = run("plan", place.model, "--scores", scored, "--units", 0.5).stdout
    assert re.search(rf"all .* {by_hand:.4f} *\n", shown)
    assert "loss predicted" in shown and "first order, at open gates" in " ".join(shown.split())


def test_the_report_is_that_of_the_rows_that_were_scored(place, scored, pruned):
    out, record = pruned
    found = record["receipt"]
    model, params = load(place.model)
    task, scores = load_task("mood", data=place.data), load_scores(scored)
    rows = [row for row in task.rows("calibration") if row_key(row) in scores.rows]
    gates = recorded_gates(read_pruning(out))
    true = loss_report(
        model, params, task, gates, LossReporting(rows=Rows(examples=tuple(rows)), nodes=8, objective=log_probability)
    )
    assert (found["examples"], found["labels"], found["nodes"]) == (16, "gold", 8)
    for name, value in {"lost": true.lost, "found": true.attributed, "error": true.error}.items():
        assert found[name] == pytest.approx(value, abs=1e-5)
    for name, own in (("layers", true.layers()), ("modules", true.modules())):
        assert found[name] == pytest.approx(own, abs=1e-5)
    assert sum(found["layers"].values()) == pytest.approx(found["found"], abs=1e-5)
    assert read_pruning(out)["receipt"] == found
    card = (out / "README.md").read_text()
    assert f"| all | {found['prediction']['estimate']:.4f} | {found['lost']:.4f} |" in card
    assert card.count("## What was lost") == 1


def test_several_tasks_have_a_report_each(place, tmp_path):
    rows = ("--task", "mood", "--task", "topic", "--data", place.data)
    options = (*rows, "--criterion", "magnitude", *QUICK, "--loss-report")
    result = run("prune", place.model, *options, "-o", tmp_path / "both")
    assert result.exit_code == 0, result.stderr
    found = read_pruning(tmp_path / "both")["receipts"]
    assert [own["task"] for own in found] == ["mood", "topic"]
    assert [own["objective"] for own in found] == ["probability", "probability"]
    assert "No prediction of the loss: Magnitude attributes no objective to units." in " ".join(result.stdout.split())
    assert (tmp_path / "both" / "README.md").read_text().count("## What was lost") == 1


BAD = {
    "no rows": (("--loss-report",), "nothing to measure the loss of mood with: name the task"),
    "other task": (("--loss-report", "--task", "topic"), "nothing to measure the loss of mood with"),
    "nothing removed": (("--loss-report", "--task", "mood", "--units", 1), "all gates are open"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(place, scored, tmp_path, case):
    options, message = BAD[case]
    data = ("--data", place.data) if "--task" in options else ()
    budget = QUICK[2:] if "--units" in options else QUICK
    result = run("prune", place.model, "--scores", scored, *options, *data, *budget, "-o", tmp_path / "small")
    assert result.exit_code == 2, (result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("jaxprune: error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), result.stderr
    assert not (tmp_path / "small").exists()

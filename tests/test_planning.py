"""The commands `plan` and `prune` by memory and by latency: what is predicted, what is measured, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Place, place, record_of, run, scored
from hand_tables import FIXED, HEAD, NEURON, hand_table

from jaxprune.checkpoints.folder import load
from jaxprune.checkpoints.gates import read_pruning
from jaxprune.cli import terminal
from jaxprune.cli.options import BYTES, SECONDS, read_amount
from jaxprune.models.cost import flops, memory, parameters
from jaxprune.pruning import latency as latency_table
from jaxprune.pruning.budgets import Rules, Units
from jaxprune.pruning.latency import LatencyTable, conditions, read_table, table_file, write_table
from jaxprune.pruning.selection import select
from jaxprune.scoring.scores import load_scores
from jaxprune.units import widths

__all__ = ["place", "scored"]  # fixtures

DENSE = FIXED + 2 * (4 * HEAD + 32 * NEURON)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for latency tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return terminal.cache_folder("latency")


@pytest.fixture(scope="module")
def table(place: Place) -> Path:
    return write_table(place.folder / "table.json", hand_table(*load(place.model)))


def written(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "budget",
    [
        ("--flops", 0.5),
        ("--parameters", 0.4, "--allocation=global"),
        ("--units", 0.3, "--floor", "heads=1"),
        ("--memory", 0.8),
        ("--memory", "20kB"),
        ("--latency", 0.6, "--latency-table", "{table}"),
        ("--latency", "20ms", "--latency-table", "{table}", "--allocation=global"),
    ],
)
def test_a_plan_is_what_prune_then_does(place, scored, table, cache, tmp_path, budget):
    budget = tuple(str(part).format(table=table) for part in budget)
    before = written(place.folder)
    planned = record_of("plan", place.model, "--scores", scored, *budget)
    assert written(place.folder) == before and not cache.exists()
    out = tmp_path / "small"
    pruned = record_of("prune", place.model, "--scores", scored, *budget, "-o", out, "--measure", 0)
    assert planned["selection"] == pruned["selection"]
    if tried := pruned.get("latency_budget"):  # measured, and corrected: what the table was asked for in the end
        asked = tried["tries"][tried["best"]]["asked"]
        text = f"{asked!r}s" if "latency_seconds" in tried["asked"] else repr(asked)
        planned = record_of("plan", place.model, "--scores", scored, "--latency", text, *budget[2:])
    for name in ("widths", "kinds"):
        assert planned[name] == pruned[name]
    for when in ("before", "after"):
        assert planned[when].items() <= pruned[when].items()
    model, small = load(out)
    after = planned["after"]
    assert after["parameters"] == parameters(small) and after["memory"] == memory(small)
    assert after["flops"] == flops(model, small, after["length"])
    assert {name: kept for name, (_, kept) in planned["widths"].items()} == widths(model.axes, small)


def test_the_layers_of_a_plan(place, scored):
    record = record_of("plan", place.model, "--scores", scored, "--units", 0.5, "--allocation=global")
    model, params = load(place.model)
    scores = load_scores(scored)
    gates = select(model, params, scores, Units(0.5), rules=Rules(allocation="global"))
    *layers, whole = record["layers"]
    assert [row["layer"] for row in layers] == ["0", "1"] and whole["layer"] == "all"
    for i, row in enumerate(layers):
        assert row["heads"] == [int(gates[f"{i}.attention.heads"].sum()), 4]
        assert row["neurons"] == [int(gates[f"{i}.ffn.neurons"].sum()), 32]
    values = np.concatenate([np.asarray(scores.values[name]) for name in gates]).astype(np.float64)
    kept = np.concatenate([np.asarray(gates[name]) for name in gates])
    positive = np.maximum(values, 0.0)
    assert whole["score_kept"] == record["score_kept"] == pytest.approx(positive @ kept / positive.sum())
    assert record["latency"] is None


@pytest.mark.parametrize("floor", [0, 1])
def test_a_plan_names_attentions_without_a_head(place, scored, floor):
    asked = ("plan", place.model, "--scores", scored, "--units", 0.1, "--floor", f"heads={floor}")
    found = [kept for name, (_, kept) in record_of(*asked)["widths"].items() if name.endswith(".heads")]
    shown = run(*asked).stdout
    assert ("No head stays in" in shown) == (0 in found) == (floor == 0)


def test_a_plan_by_latency_shows_predictions_and_the_steps(place, scored, table):
    options = ("--scores", scored, "--latency", 0.6, "--latency-table", table, "--allocation=global")
    record = record_of("plan", place.model, *options)
    found = record["latency"]
    assert found["asked"] == {"latency": 0.6} and (found["batch"], found["length"]) == (1, 12)
    assert found["predicted"]["before"] == pytest.approx(DENSE)
    kept = {name: units for name, (_, units) in record["widths"].items()}
    by_hand = FIXED + sum(units * (HEAD if "heads" in name else NEURON) for name, units in kept.items())
    assert found["predicted"]["after"] == pytest.approx(by_hand)
    assert 0.5 < found["predicted"]["ratio"] <= 0.6
    assert record["before"]["length"] == 12  # the table says for how many tokens
    shown = " ".join(run("plan", place.model, *options).stdout.split())
    for text in (
        "what would stay",
        "score kept",
        "predicted ms, 1 x 12 tokens",
        "0.attention.heads and 1 more",
        "8: 0.8",
    ):
        assert text in shown


def test_other_budgets_are_predicted_where_there_is_a_table(place, scored, cache):
    options = ("plan", place.model, "--scores", scored, "--flops", 0.5, "--length", 12)
    assert record_of(*options)["latency"] is None
    assert "no latency table" in " ".join(run(*options).stdout.split())
    model, params = load(place.model)
    made = hand_table(model, params)
    write_table(table_file(cache, made.conditions), made)
    found = record_of(*options)["latency"]
    assert found["asked"] == {} and found["predicted"]["before"] == pytest.approx(DENSE)
    assert record_of(*options, "--latency-batch", 2)["latency"] is None


def test_a_table_is_measured_once_and_kept(place, scored, cache, monkeypatch):
    model, params = load(place.model)
    calls: list[Any] = []

    def measured(model: Any, params: Any, *, progress: Any, **how: Any) -> LatencyTable:
        calls.append(how)
        return hand_table(model, params, **how)

    monkeypatch.setattr(latency_table, "measure_latency_table", measured)
    options = ("plan", place.model, "--scores", scored, "--latency", 0.7, "--length", 10.2, "--latency-batch", 3)
    first, second = record_of(*options), record_of(*options)
    assert first == second and calls == [{"batch": 3, "length": 11}]
    file = table_file(cache, conditions(model, params, batch=3, length=11))
    assert read_table(file) == hand_table(model, params, batch=3, length=11)
    assert (first["latency"]["batch"], first["latency"]["length"]) == (3, 11)


@pytest.mark.parametrize("asked", [("0.6", {"latency": 0.6}), ("20ms", {"latency_seconds": 0.02})])
def test_prune_measures_what_was_predicted(place, scored, table, tmp_path, asked):
    out, (text, expected) = tmp_path / "small", asked
    budget = ("--latency", text, "--latency-table", table)
    record = record_of("prune", place.model, "--scores", scored, *budget, "-o", out, "--measure", 2)
    found = record["latency_budget"]
    assert found["asked"] == expected
    assert [own["batch"] for own in record["after"]["latency"]] == [1, 2]  # that of the budget, and the one asked for
    before, after = (record[name]["latency"][0] for name in ("before", "after"))
    assert before["length"] == after["length"] == 12
    assert found["measured"] == {
        "before": before["least"],
        "after": after["least"],
        "ratio": after["least"] / before["least"],
        "median_ratio": 1 / after["speedup"],
    }
    assert 0 < after["least"] <= after["median"] <= after["p95"]
    tries, best = found["tries"], found["tries"][found["best"]]
    assert tries[0]["asked"] == next(iter(expected.values())) and len(tries) <= 4
    assert found["predicted"]["after"] <= best["asked"] * (DENSE if "latency" in expected else 1.0) * (1 + 1e-9)
    settings = read_pruning(out)["settings"]
    assert {name: settings[name] for name in expected} == expected
    shown = run("prune", place.model, "--scores", scored, *budget, "-o", out, "--measure", 0, "--overwrite")
    assert "Latency budget, 1 x 12 tokens" in shown.stdout and "predicted" in shown.stdout
    assert "selections were measured" in " ".join(shown.stdout.split())
    assert "Latency budget" in (out / "README.md").read_text()


def test_several_tasks_share_a_budget_of_memory_or_latency(place, scored, table, tmp_path):
    other = tmp_path / "topic.safetensors"
    rows = ("--task", "topic", "--data", place.data, "--criterion", "taylor", "--examples", 16)
    assert run("score", place.model, *rows, "-o", other).exit_code == 0
    both = ("prune", place.model, "--scores", scored, "--scores", other, "--measure", 0, "-o")
    latency = ("--latency", 0.6, "--latency-table", table)
    record = record_of(*both, tmp_path / "pooled", *latency)
    found = record["latency_budget"]
    assert found["predicted"]["ratio"] <= found["tries"][found["best"]]["asked"] * (1 + 1e-9)
    refused = run(*both, tmp_path / "union", *latency, "--together", "union")
    assert refused.exit_code == 2 and "needs pooled scores" in refused.stderr
    for way in ("pooled", "union", "intersection"):
        out = tmp_path / f"memory-{way}"
        record = record_of(*both, out, "--memory", 0.8, "--together", way)
        assert 0.7 < record["kept"]["memory"] <= 0.8
        assert memory(load(out)[1]) == record["after"]["memory"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.5", {"memory": 0.5}),
        ("1", {"memory": 1.0}),
        (".25", {"memory": 0.25}),
        ("40MB", {"memory_bytes": 4e7}),
        ("1.5 GiB", {"memory_bytes": 1.5 * 2**30}),
        ("2e3kB", {"memory_bytes": 2e6}),
        ("7B", {"memory_bytes": 7.0}),
    ],
)
def test_amounts_are_read(text, found):
    assert read_amount("memory", text, "bytes", BYTES) == found
    assert read_amount("memory", None, "bytes", BYTES) == {}


@pytest.mark.parametrize(
    "text", ["", "0", "0ms", "-5ms", "5 parsecs", "ms", "1.2.3s", "2", "nan", "inf", "1e999s", "5MS"]
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match=r"--latency .*a fraction in .*; got"):
        read_amount("latency", text, "seconds", SECONDS)

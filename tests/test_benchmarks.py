"""The speed benchmark runs on a tiny model, and what it compares computes the same numbers."""

from __future__ import annotations

import importlib
import json
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from commands import make_place
from hand_tables import hand_table
from tiny import tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.data.augmentation import Augmentation
from jaxprune.units import widths


@pytest.fixture
def speed() -> Any:
    return importlib.import_module("speed")


@pytest.fixture
def setting(speed: Any) -> Any:
    model, params = tiny_model(neurons=64)
    return speed.Setting(model=model, params=params, head="task", folder="tiny", batch=4, length=8, nodes=2, repeats=2)


def check(parts: dict[str, Any]) -> None:
    """Times are positive, quartiles enclose medians, and all of it is JSON."""
    assert json.loads(json.dumps(parts, allow_nan=False)) == parts
    for found in parts.values():
        assert set(found) == {"seconds", "ratios", "facts"}
        for values in (*found["seconds"].values(), *found["ratios"].values()):
            low, high = values["quartiles"]
            assert 0 < low <= values["median"] <= high


def test_a_part_without_pytorch(speed: Any, setting: Any, monkeypatch: Any, capsys: Any):
    monkeypatch.setattr("timing.PEERS", ("a_package_that_nobody_has",))
    parts = speed.measure(setting, ["gradient"])
    check(parts)
    assert "PyTorch is left out: a_package_that_nobody_has not installed" in capsys.readouterr().err
    assert list(parts["gradient"]["seconds"]) == ["jaxprune"] and parts["gradient"]["ratios"] == {}


@pytest.mark.reference  # it needs no PyTorch, but compiles more than the other target has time for
def test_a_pruned_model_is_timed_beside_its_flops_and_scoring_beside_the_limit(speed: Any, setting: Any, capsys: Any):
    parts = speed.measure(setting, ["pruned", "limit"])
    check(parts)
    speed.show(parts)
    assert "share of the limit" in capsys.readouterr().out.replace("\n", " ")
    assert len(parts["pruned"]["ratios"]) == 2
    assert all(ratio["flops_ratio"] >= 2 for ratio in parts["pruned"]["ratios"].values())


def test_environment_names_device_versions_and_settings(speed: Any, setting: Any):
    found = speed.environment(setting, 2)
    assert set(found) == {"device", "machine", "threads", "versions", "commit", "settings"}
    assert found["versions"]["jax"] and found["versions"]["python"] and "captum" in found["versions"]
    assert found["settings"]["nodes"] == 2 and found["settings"]["folder"] == "tiny"


@pytest.mark.reference  # it compiles much
def test_a_text_to_text_model_is_timed_too(speed: Any):
    model, params = tiny_model("t5", neurons=64)
    own = speed.Setting(model=model, params=params, head=None, folder="tiny", batch=4, length=8, nodes=2, repeats=2)
    parts = speed.measure(own, [name for name in speed.TEXT_PARTS if name != "memory"])
    check(parts)
    assert list(parts) == ["gradient", "pruned", "limit"]
    assert speed.environment(own, 2)["settings"]["written"] == own.lengths[1]


@pytest.mark.reference
def test_both_sides_compute_the_same_numbers(speed: Any, setting: Any):
    pytest.importorskip("torch")
    pytest.importorskip("captum")
    parts = speed.measure(setting, ["joint", "layer", "gradient"])
    check(parts)
    assert set(parts["joint"]["seconds"]) == {"jaxprune", "autograd", "captum"}
    assert set(parts["layer"]["ratios"]) == {"captum / jaxprune"}
    differences = [value for found in parts.values() for name, value in found["facts"].items() if "difference" in name]
    assert len(differences) == 4 and max(differences) < importlib.import_module("timing").AGREEMENT


@pytest.mark.reference
def test_times_of_different_numbers_are_refused(speed: Any, setting: Any, monkeypatch: Any):
    pytest.importorskip("torch")
    pytest.importorskip("captum")
    theirs = speed.peer(setting)
    monkeypatch.setattr(speed, "peer", lambda _: theirs)
    theirs.gated.readout[0].weight.data *= 1.1
    with pytest.raises(ValueError, match="the numbers do not agree"):
        speed.gradient(setting)


@pytest.mark.slow
def test_budgets_of_latency_are_predicted_and_measured(monkeypatch: Any, capsys: Any):
    budgets = importlib.import_module("latency_budget")
    monkeypatch.setattr(budgets, "measure_latency_table", hand_table)
    model, params = tiny_model()
    random = np.random.default_rng(0)
    scores = {name: random.random(units) for name, units in widths(model.axes, params).items()}
    found = budgets.measure(model, params, scores, [0.8, 0.5], batch=1, length=8, repeats=2)
    assert json.loads(json.dumps(found, allow_nan=False))
    assert [(row["budget"], row["scope"]) for row in found["rows"]] == [
        (budget, scope) for budget in (0.8, 0.5) for scope in ("same fraction", "competing")
    ]
    for row in found["rows"]:
        nearest = min(row["tries"], key=lambda own: abs(np.log(own[1] / row["budget"])))
        assert 0 < row["predicted"] <= nearest[0] * (1 + 1e-9) and row["measured"] > 0
        assert row["tries"][0] == [row["budget"], row["by_table"]] and len(row["tries"]) <= budgets.TRIES
    budgets.show(found)
    assert "competing" in capsys.readouterr().out


def test_plans_are_timed_with_the_model_remembered_and_without(monkeypatch: Any, tmp_path: Any):
    planning = importlib.import_module("planning")
    monkeypatch.setattr(planning, "prepare", lambda folder: (folder / "model", folder / "scores"))
    remembered = []

    def plan(model: Any, scores: Any, budget: tuple[str, ...], cache: Any) -> tuple[float, float]:
        remembered.append(cache.exists())
        cache.mkdir(exist_ok=True)
        return 3.0 if remembered[-1] else 5.0, 2.0

    monkeypatch.setattr(planning, "plan", plan)
    monkeypatch.setattr(planning.stamps, "SETTLED", -1.0)
    found = planning.measure(tmp_path, repeats=2)
    assert remembered == 3 * [False, *len(planning.BUDGETS) * [True]]
    assert [own["clock"]["most"] for own in found.values()] == [5.0, *len(planning.BUDGETS) * [3.0]]


def test_compressors_are_compared_with_the_former_layout(capsys: Any):
    """Every way is read back before it is timed."""
    packing = importlib.import_module("packing")
    model, params = tiny_model(embed=32, neurons=64)
    rows = packing.measure(model, params, [0.95], repeats=1)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["values"] for row in rows] == list(packing.VALUES)
    for row in rows:
        assert row["packed_bytes"] < row["plain_bytes"] and set(row["ways"]) == {"xz", "zstd 3", "zstd 9", "zstd 19"}
        assert all(way["size"] == way["bytes"] / row["packed_bytes"] for way in row["ways"].values())
    packing.show({"rows": rows})
    assert "zstd 19" in capsys.readouterr().out


@pytest.mark.slow
def test_sparse_products_are_those_of_dense_weights(capsys: Any):
    """Every way is compared with the dense product before it is timed, the Pallas kernel interpreted."""
    benchmark = importlib.import_module("sparse_compute")
    rows = benchmark.measure([0.5, 0.9], [32], shape=(64, 96), repeats=1)
    assert [row["sparsity"] for row in rows] == [0.5, 0.9] and "2:4" in rows[0]["ways"]
    assert all(own["ratio"]["median"] > 0 for row in rows for own in row["ways"].values())
    assert rows[0]["ways"]["2:4"]["zeros"] == 0.5
    benchmark.show({"shape": [64, 96], "device": "cpu", "rows": rows})
    assert "BCSR" in capsys.readouterr().out
    with pytest.raises(ValueError, match="differs from the dense product"):
        benchmark.check("a way", np.ones((2, 2)), np.full((2, 2), 1.1))


@pytest.mark.parametrize(
    ("best", "tried"), [(0, {0, 1, 2}), (1, {0, 1, 2}), (2, {1, 2, 3}), (3, {1, 2, 3, 4}), (4, {1, 2, 3, 4})]
)
def test_a_learning_rate_is_found_from_neighbour_to_neighbour(best: int, tried: set[int]):
    benchmark = importlib.import_module("sparsebert")
    choices = (0, 1, 2, 3, 4)
    found = benchmark.climb(choices, 2, lambda choice: -abs(choice - best))
    assert set(found) == tried and max(found, key=lambda choice: found[choice]) == best


@pytest.mark.reference  # it needs no PyTorch, but trains more students than the other target has time for
def test_orders_of_pruning_and_distilling_are_compared(tmp_path: Any, monkeypatch: Any):
    benchmark, tables = importlib.import_module("sparsebert"), importlib.import_module("tables_sparse")
    place = make_place(tmp_path)
    model, _ = load(place.model)
    start = save(tmp_path / "start", model.with_heads(()), model.with_heads(()).initialise(jax.random.key(3)))
    monkeypatch.setattr(benchmark, "RATES", (1e-3,))
    monkeypatch.setattr(benchmark, "FIRST", 1e-3)
    monkeypatch.setattr(benchmark, "Augmentation", partial(Augmentation, frequent=1))
    out = tmp_path / "record.json"
    arguments = ["--start", start, "--data", place.data, "--work", tmp_path / "work", "-o", out, "--tasks", "mood"]
    settings = ["--steps", 6, "--batch-size", 8, "--prunings", 2, "--copies", 2]
    settings += ["--contested", 0.8, "--sparsities", "0.5,0.8"]
    monkeypatch.setattr("sys.argv", ["sparsebert.py", *map(str, [*arguments, *settings])])
    benchmark.main()
    record = json.loads(out.read_text())
    orders = record["orders"]["sparsities"]["0.8"]
    assert set(record["rates"]["best"]) == set(orders["rows"]) == set(benchmark.ORDERS)
    assert set(orders["claims"]) < set(benchmark.ORDERS)
    for own in orders["rows"].values():
        assert own["mood"]["not_zero"] == pytest.approx(0.2 * own["mood"]["linear_maps"], abs=12)
    monkeypatch.setattr(tables, "record", lambda _: record)
    for name, make in tables.SPARSE_TABLES.items():
        if not name.startswith("sparse-compute"):
            assert make().endswith("\n")
    before = (tmp_path / "work").stat().st_mtime
    benchmark.main()  # everything is there already
    assert json.loads(out.read_text())["orders"] == record["orders"] and (tmp_path / "work").stat().st_mtime == before

"""Selection: exact counts, ties by index, the largest result not above the budget, monotone in the budget."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from choices import chosen
from tiny import random_gates, tiny_model

from jaxprune.checkpoints.tensors import model_digest
from jaxprune.compaction import compact
from jaxprune.models import Model
from jaxprune.models.cost import elements, flops, matmul_flops, prunable_parameters, unit_costs
from jaxprune.pruning.budgets import NAMES, Flops, Parameters, Rules, Units
from jaxprune.pruning.pooling import intersection, union
from jaxprune.pruning.selection import per_layer_l2, pruning_record, select, thresholds
from jaxprune.scoring.scores import Scores, check_scores
from jaxprune.units import Gates, Params, open_gates, sites, widths

LENGTH = 11.5
RATIOS = (0.01, 0.07, 0.1, 0.29, 0.3, 1 / 3, 0.5, 0.58, 0.7, 0.9, 1.0)
BUDGETS = ("units", "parameters", "flops")


@pytest.fixture(scope="module")
def dense() -> tuple[Model, Params]:
    return tiny_model("bert", layers=3, neurons=30)


@pytest.fixture(scope="module")
def uneven(dense) -> tuple[Model, Params]:
    """A model with another width at every site, one of them empty."""
    model, params = dense
    return model, compact(model, params, random_gates(model, params, 3) | {"1.attention.heads": np.zeros(4)})


def random_scores(model: Model, params: Params, seed: int, *, levels: int | None = None) -> dict[str, np.ndarray]:
    """Scores of both signs; with `levels` there are many ties."""
    random = np.random.default_rng(seed)
    values = {name: random.standard_normal(units) for name, units in widths(model.axes, params).items()}
    return values if levels is None else {name: np.round(levels * value) for name, value in values.items()}


def budget(name: str, fraction: float) -> dict[str, Any]:
    return {name: fraction, "length": LENGTH} if name == "flops" else {name: fraction}


def kept(gates: Gates) -> dict[str, list[int]]:
    return {name: np.flatnonzero(np.asarray(gate)).tolist() for name, gate in gates.items()}


def cost_of(model: Model, params: Params, name: str) -> float:
    if name == "units":
        return sum(widths(model.axes, params).values())
    return prunable_parameters(model, params) if name == "parameters" else flops(model, params, LENGTH)


def site_costs(model: Model, params: Params, name: str) -> dict[str, float]:
    if name == "units":
        return dict.fromkeys(widths(model.axes, params), 1.0)
    return unit_costs(model, params, elements if name == "parameters" else matmul_flops(model, LENGTH))


def ordered_blocks(
    model: Model,
    params: Params,
    scores: dict[str, np.ndarray],
    cost: dict[str, float],
    allocation: str,
    **settings: Any,
) -> tuple[list[tuple[str, list[int]]], int]:
    """All blocks in the order in which they are kept, written plainly; and how many of them are forced."""
    multiple_of, floor = settings.get("multiple_of", {}), settings.get("floor", {})
    protect = settings.get("protect", ())
    entries = []
    for place, site in enumerate(sites(model.axes, params)):
        values = scores[site.name]
        ranked = sorted(range(len(values)), key=lambda unit, values=values: (-values[unit], unit))
        size = multiple_of.get(site.kind, 1)
        for start in range(0, len(ranked), size):
            block = ranked[start : start + size]
            forced = start < floor.get(site.kind, 0) or site.layer in protect or site.name in protect
            if allocation == "per_layer":
                order = Fraction(start + len(block), len(ranked))
            else:
                order = -sum(Fraction(float(values[unit])) for unit in block) / len(block) / Fraction(cost[site.name])
            entries.append((not forced, order, place, start, site.name, block))
    if allocation == "per_kind":
        kinds = {site.name: site.kind for site in sites(model.axes, params)}
        for kind in set(kinds.values()):
            own = sorted((entry for entry in entries if kinds[entry[4]] == kind), key=lambda entry: entry[1:4])
            total, before = sum(len(entry[5]) for entry in own), 0
            for entry in own:
                before += len(entry[5])
                entries[entries.index(entry)] = (entry[0], Fraction(before, total), *entry[2:])
    entries.sort(key=lambda entry: entry[:4])
    return [entry[4:] for entry in entries], sum(not entry[0] for entry in entries)


@pytest.mark.parametrize("allocation", ["per_layer", "per_kind", "global"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_selection_by_count_is_exact(uneven, ratio, allocation):
    model, params = uneven
    width = widths(model.axes, params)
    scores = random_scores(model, params, 0)
    gates = select(model, params, scores, Units(ratio), rules=Rules(allocation=allocation))
    assert list(gates) == list(width)
    assert all(gate.dtype == jnp.float32 and gate.shape == (width[name],) for name, gate in gates.items())
    assert {float(value) for gate in gates.values() for value in gate} <= {0.0, 1.0}
    count = sum(map(len, kept(gates).values()))
    exact = {1 / 3: Fraction(1, 3)}.get(ratio, Fraction(str(ratio)))
    assert count == math.floor(exact * sum(width.values()))
    if allocation == "global":
        everything = np.concatenate([scores[name] for name in width])
        stays = np.concatenate([np.asarray(gate) for gate in gates.values()]) == 1.0
        assert everything[stays].min(initial=np.inf) > everything[~stays].max(initial=-np.inf)


def test_every_site_keeps_the_same_fraction(dense):
    model, params = dense
    scores = random_scores(model, params, 0)
    gates = select(model, params, scores, Units(0.5))
    assert {name: len(units) for name, units in kept(gates).items()} == {
        name: units // 2 for name, units in widths(model.axes, params).items()
    }
    for name, units in kept(gates).items():
        assert set(units) == set(np.argsort(-scores[name])[: len(units)])


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
def test_a_percentage_of_a_hundred_units_is_that_many(allocation):
    model, params = tiny_model("bert", layers=1, neurons=96)
    scores = random_scores(model, params, 0)
    for percent in range(1, 101):
        gates = select(model, params, scores, Units(percent / 100), rules=Rules(allocation=allocation))
        assert sum(map(len, kept(gates).values())) == percent  # 0.29 * 100 is less than 29 in binary


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_no_site_keeps_a_larger_fraction_than_another_could(uneven, name, ratio):
    model, params = uneven
    gates = select(model, params, random_scores(model, params, 0), **chosen(**budget(name, ratio)))
    counts = {site: (len(units), widths(model.axes, params)[site]) for site, units in kept(gates).items()}
    highest = max(Fraction(count, units) for count, units in counts.values() if units)
    assert all(Fraction(count + 1, units) >= highest for count, units in counts.values() if units)


def test_ties_are_broken_by_index(dense):
    model, params = dense
    scores = {name: np.full(units, 0.1) for name, units in widths(model.axes, params).items()}
    found = kept(select(model, params, scores, Units(0.5), rules=Rules(allocation="global")))
    assert found == {  # 51 of 3 * (4 + 30): the first sites, and of the second layer's neurons the first
        "0.attention.heads": [0, 1, 2, 3],
        "0.ffn.neurons": list(range(30)),
        "1.attention.heads": [0, 1, 2, 3],
        "1.ffn.neurons": list(range(13)),
        "2.attention.heads": [],
        "2.ffn.neurons": [],
    }
    found = kept(select(model, params, scores, Units(0.5)))
    assert all(units == list(range(len(units))) for units in found.values())
    found = kept(select(model, params, scores, Units(0.5), rules=Rules(allocation="global", multiple_of=8)))
    assert found["1.ffn.neurons"] == list(range(8))  # 51 - 38 = 13, of which 8 can be paid


def test_ties_between_equal_scores_in_one_site(dense):
    model, params = dense
    scores = {name: np.zeros(units) for name, units in widths(model.axes, params).items()}
    scores["0.ffn.neurons"][[3, 7, 20]] = 1.0
    found = kept(select(model, params, scores, Units(5 / 102), rules=Rules(allocation="global")))
    assert found["0.attention.heads"] == [0, 1]
    assert found["0.ffn.neurons"] == [3, 7, 20]


SETTINGS = (
    {},
    {"multiple_of": {"neurons": 8}},
    {"multiple_of": {"neurons": 4, "heads": 2}, "floor": {"heads": 1, "neurons": 5}},
    {"protect": (2, "0.ffn.neurons")},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("allocation", ["per_layer", "per_kind", "global"])
@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("seed", range(2))
def test_largest_result_not_above_the_budget(uneven, seed, name, allocation, settings):
    model, params = uneven
    # Whole-number scores in the second round: many ties.
    scores = random_scores(model, params, seed, levels=None if seed == 0 else 1)
    cost = site_costs(model, params, name)
    blocks, forced = ordered_blocks(model, params, scores, cost, allocation, **settings)
    whole = cost_of(model, params, name)
    for ratio in RATIOS:
        prefixes = [0.0]
        for site, block in blocks:
            prefixes.append(prefixes[-1] + cost[site] * len(block))
        fitting = max(count for count, spent in enumerate(prefixes) if spent <= (ratio + 1e-9) * whole)
        arguments = budget(name, ratio) | settings | {"allocation": allocation}
        if fitting < forced:
            with pytest.raises(ValueError, match="smallest reachable fraction"):
                select(model, params, scores, **chosen(**arguments))
            continue
        expected: dict[str, list[int]] = {site: [] for site in widths(model.axes, params)}
        for site, block in blocks[:fitting]:
            expected[site] = sorted(expected[site] + block)
        gates = select(model, params, scores, **chosen(**arguments))
        assert kept(gates) == expected
        assert cost_of(model, compact(model, params, gates), name) <= ratio * whole * (1 + 1e-8)
        if fitting < len(blocks):
            assert prefixes[fitting + 1] > ratio * whole


@pytest.mark.parametrize("multiple_of", [None, {"neurons": 8}, 4])
@pytest.mark.parametrize("allocation", ["per_layer", "per_kind", "global"])
@pytest.mark.parametrize("name", BUDGETS)
def test_selection_is_monotone_in_the_budget(uneven, name, allocation, multiple_of):
    model, params = uneven
    scores = random_scores(model, params, 1, levels=2)
    smaller: dict[str, list[int]] = {site: [] for site in widths(model.axes, params)}
    for ratio in np.linspace(0.02, 1.0, 50):
        gates = select(
            model,
            params,
            scores,
            **chosen(**budget(name, float(ratio)), allocation=allocation, multiple_of=multiple_of),
        )
        larger = kept(gates)
        assert all(set(smaller[site]) <= set(larger[site]) for site in larger)
        smaller = larger
    assert smaller == kept(open_gates(model, params))


@pytest.mark.parametrize("ratio", RATIOS[:-1])
@pytest.mark.parametrize("name", BUDGETS)
def test_global_selection_is_a_threshold_on_score_per_cost(dense, name, ratio):
    model, params = dense
    scores = random_scores(model, params, 2)
    cost = site_costs(model, params, name)
    gates = select(model, params, scores, **chosen(**budget(name, ratio), allocation="global"))
    density = np.concatenate([scores[site] / cost[site] for site in scores])
    price = np.concatenate([np.full(len(scores[site]), cost[site]) for site in scores])
    stays = np.concatenate([np.asarray(gates[site]) for site in scores]) == 1.0
    threshold = density[~stays].max()
    np.testing.assert_array_equal(stays, density > threshold)
    left = ratio * price.sum() - price[stays].sum()
    assert -1e-9 * price.sum() <= left < price[~stays][density[~stays].argmax()]  # short by less than one unit


def test_heads_and_neurons_compete_by_score_per_flop(dense):
    model, params = dense
    cost = unit_costs(model, params, matmul_flops(model, LENGTH))
    scores = {name: np.full(units, cost[name]) for name, units in widths(model.axes, params).items()}
    scores["2.attention.heads"] = 1.001 * scores["2.attention.heads"]
    scores["2.ffn.neurons"] = 1.002 * scores["2.ffn.neurons"]
    ratio = (4 * cost["2.attention.heads"] + 30 * cost["2.ffn.neurons"]) / flops(model, params, LENGTH)
    found = kept(select(model, params, scores, Flops(ratio, length=LENGTH), rules=Rules(allocation="global")))
    assert [name for name, units in found.items() if units] == ["2.attention.heads", "2.ffn.neurons"]


@pytest.mark.parametrize("allocation", ["per_layer", "per_kind", "global"])
@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.5, 0.95])
def test_widths_are_multiples_or_whole(uneven, ratio, allocation):
    model, params = uneven
    scores = random_scores(model, params, 4)
    gates = select(
        model,
        params,
        scores,
        Flops(ratio, length=LENGTH),
        rules=Rules(allocation=allocation, multiple_of={"neurons": 8}),
    )
    for name, units in kept(gates).items():
        if name.endswith("neurons"):
            assert len(units) % 8 == 0 or len(units) == widths(model.axes, params)[name]


@pytest.mark.parametrize("allocation", ["per_layer", "per_kind", "global"])
def test_a_floor_is_kept_at_every_site(dense, allocation):
    model, params = dense
    scores = {name: np.arange(units) - 1000.0 * int(name[0]) for name, units in widths(model.axes, params).items()}
    gates = select(
        model, params, scores, Units(0.2), rules=Rules(allocation=allocation, floor={"heads": 1, "neurons": 3})
    )
    assert all(len(units) >= (1 if name.endswith("heads") else 3) for name, units in kept(gates).items())
    assert kept(gates)["2.attention.heads"][-1] == 3  # the best one
    gates = select(model, params, scores, Units(0.5), rules=Rules(allocation=allocation, floor=5))
    assert all(len(units) >= min(5, 4 if name.endswith("heads") else 30) for name, units in kept(gates).items())
    gates = select(
        model, params, scores, Units(0.5), rules=Rules(allocation=allocation, floor={"neurons": 3}, multiple_of=8)
    )
    assert all(len(units) >= 8 for name, units in kept(gates).items() if name.endswith("neurons"))


@pytest.mark.parametrize("allocation", ["per_layer", "per_kind", "global"])
def test_protected_layers_and_sites_stay_whole(dense, allocation):
    model, params = dense
    scores = {name: -np.ones(units) for name, units in widths(model.axes, params).items()}
    scores["1.ffn.neurons"] += 10
    gates = select(
        model, params, scores, Units(0.7), rules=Rules(allocation=allocation, protect=(0, "2.attention.heads"))
    )
    found = kept(gates)
    for name in ("0.attention.heads", "0.ffn.neurons", "2.attention.heads"):
        assert len(found[name]) == widths(model.axes, params)[name]
    assert sum(map(len, found.values())) == math.floor(0.7 * 102)


def test_sites_without_scores_stay_open_and_count(dense):
    model, params = dense
    scores = {name: v for name, v in random_scores(model, params, 0).items() if name.endswith("heads")}
    gates = select(model, params, scores, Units(96 / 102))
    assert {name: len(units) for name, units in kept(gates).items()} == {
        name: 2 if name.endswith("heads") else 30 for name in widths(model.axes, params)
    }
    with pytest.raises(ValueError, match=r"sites without scores keep more. The smallest reachable fraction is 0.8824"):
        select(model, params, scores, Units(0.5))


def test_an_unreachable_budget_names_the_smallest_fraction_that_can_be_reached(dense):
    model, params = dense
    scores = random_scores(model, params, 0)
    with pytest.raises(ValueError, match=r"flops=0.5 cannot be reached: .* smallest reachable fraction is 0.6667"):
        select(model, params, scores, Flops(0.5, length=LENGTH), rules=Rules(protect=(0, 2)))
    gates = select(model, params, scores, Flops(0.6667, length=LENGTH), rules=Rules(protect=(0, 2)))
    assert len(kept(gates)["1.ffn.neurons"]) == 0


def test_the_best_units_of_an_empty_budget_are_none(dense):
    model, params = dense
    found = kept(select(model, params, random_scores(model, params, 0), Units(0.001)))
    assert not any(found.values())


def test_a_model_without_units_has_nothing_to_select(dense):
    model, params = dense
    empty = compact(model, params, {name: np.zeros(units) for name, units in widths(model.axes, params).items()})
    gates = select(model, empty, open_gates(model, empty), Parameters(0.5))
    assert {name: gate.shape for name, gate in gates.items()} == dict.fromkeys(widths(model.axes, params), (0,))


def test_normalisation_changes_the_ranking_between_sites(dense):
    model, params = dense
    scores = random_scores(model, params, 5)
    scores["0.ffn.neurons"] = 1000.0 * scores["0.ffn.neurons"]
    raw = kept(select(model, params, scores, Units(0.1), rules=Rules(allocation="global")))
    assert [name for name, units in raw.items() if units] == ["0.ffn.neurons"]
    found = kept(select(model, params, scores, Units(0.1), rules=Rules(allocation="global", normalise=per_layer_l2)))
    assert sum(bool(units) for units in found.values()) > 1
    by_hand = {name: value / np.sqrt((value**2).sum()) for name, value in scores.items()}
    assert found == kept(select(model, params, by_hand, Units(0.1), rules=Rules(allocation="global")))
    assert per_layer_l2({"a": np.zeros(3)})["a"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "exactly one budget of units, .*; got none"),
        ({"units": 0.5, "flops": 0.5}, ValueError, "got units, flops"),
        ({"units": 0.0}, ValueError, r"units must lie in \(0, 1\], got 0.0"),
        ({"parameters": 1.01}, ValueError, r"parameters must lie in \(0, 1\], got 1.01"),
        ({"units": -0.5}, ValueError, "must lie in"),
        ({"units": float("nan")}, ValueError, "must lie in"),
        ({"units": "half"}, TypeError, "units must be a number"),
        ({"units": True}, TypeError, "units must be a number"),
        ({"flops": 0.5}, ValueError, "a FLOPs budget needs length="),
        ({"flops": 0.5, "length": 0}, ValueError, "length must be a positive number"),
        ({"units": 0.5, "multiple_of": {"channels": 8}}, ValueError, r"multiple_of names \['channels'\]"),
        ({"units": 0.5, "multiple_of": 0}, ValueError, "multiple_of of heads must be at least 1"),
        ({"units": 0.5, "multiple_of": 1.5}, TypeError, "must be a whole number"),
        ({"units": 0.5, "floor": -1}, ValueError, "floor of heads must be at least 0"),
        ({"units": 0.5, "protect": (7,)}, ValueError, r"protect names \[7\]: .* Layers: \[0, 1, 2\]"),
        ({"units": 0.5, "protect": ("0.ffn",)}, ValueError, r"protect names \['0.ffn'\]"),
        ({"units": 0.5, "protect": "0.ffn.neurons"}, TypeError, "protect must be a collection"),
        ({"units": 0.5, "normalise": lambda scores: {}}, ValueError, "normalised scores .* is missing"),
    ],
)
def test_what_is_out_of_range_is_refused(dense, settings, error, message):
    model, params = dense
    with pytest.raises(error, match=message):
        select(model, params, random_scores(model, params, 0), **chosen(**settings))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.ffn.neurons", np.full(30, np.nan), "0.ffn.neurons holds NaN or infinity"),
        ("0.ffn.neurons", np.full(30, -np.inf), "0.ffn.neurons holds NaN or infinity"),
        ("0.ffn.neurons", np.ones(31), r"0.ffn.neurons has shape \(31,\) for 30 units"),
        ("0.ffn.neurons", np.ones((2, 30)), r"0.ffn.neurons has shape \(2, 30\) for 30 units"),
        ("7.ffn.neurons", np.ones(30), "7.ffn.neurons is not a site"),
    ],
)
def test_scores_that_do_not_fit_are_refused(dense, name, value, message):
    model, params = dense
    with pytest.raises(ValueError, match=message):
        select(model, params, random_scores(model, params, 0) | {name: value}, Units(0.5))


def scores_of(model: Model, params: Params, **header: Any) -> Scores:
    values = {name: jnp.asarray(value, jnp.float32) for name, value in random_scores(model, params, 0).items()}
    return Scores(values, {"model": model_digest(model, params), "criterion": {"name": "Random"}} | header)


def test_scores_of_another_model_are_refused(dense):
    model, params = dense
    scores = scores_of(model, params)
    check_scores(model, params, scores)
    _, other = tiny_model("bert", layers=3, neurons=30, seed=1)
    with pytest.raises(ValueError, match="these scores belong to another model"):
        check_scores(model, other, scores)


def test_the_length_is_that_of_the_scored_examples(dense):
    model, params = dense
    scores = scores_of(model, params, mean_length=40.25)
    found = kept(select(model, params, scores, Flops(0.4), rules=Rules(allocation="global")))
    assert found == kept(select(model, params, scores, Flops(0.4, length=40.25), rules=Rules(allocation="global")))
    assert found != kept(select(model, params, scores, Flops(0.4, length=4.0), rules=Rules(allocation="global")))


def test_the_record_says_how_the_model_was_made(dense):
    model, params = dense
    scores = scores_of(model, params, mean_length=40.25, data=["abc"])
    settings: dict[str, Any] = {"flops": 0.5, "multiple_of": {"neurons": 8}, "protect": (0,), "normalise": per_layer_l2}
    gates = select(model, params, scores, **chosen(**settings))
    record = pruning_record(scores, gates, **chosen(**settings))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    known = {name: value for name, value in record["settings"].items() if value is not None}
    assert known == settings | {
        "allocation": "per_layer",
        "protect": [0],
        "uniform": False,
        "normalise": "per_layer_l2",
    }
    assert set(record["settings"]) == {*NAMES, "length", *(field.name for field in fields(Rules))}
    assert record["scores"]["model"] == model_digest(model, params)
    assert record["scores"]["criterion"] == {"name": "Random"}
    assert record["digests"]["means"] is None
    assert {name: site["kept"] for name, site in record["sites"].items()} == {
        name: len(units) for name, units in kept(gates).items()
    }
    assert record["units"] == {"had": 102, "kept": sum(map(len, kept(gates).values()))}
    assert record["sites"]["0.ffn.neurons"] == {"had": 30, "kept": 30, "which": "0-29"}
    for name, units in kept(gates).items():
        spans = [span.split("-") for span in record["sites"][name]["which"].split(",") if span]
        assert [unit for span in spans for unit in range(int(span[0]), int(span[-1]) + 1)] == units


def test_the_record_changes_with_scores_gates_and_means(dense):
    model, params = dense
    scores = scores_of(model, params)
    gates = select(model, params, scores, Units(0.5))
    record = pruning_record(scores, gates)
    moved = Scores({name: value + 1 for name, value in scores.values.items()}, scores.header, gates)
    assert record["digests"]["scores"] != pruning_record(moved, gates)["digests"]["scores"]
    assert pruning_record(moved, gates)["digests"]["means"] is not None
    other = select(model, params, scores, Units(0.4))
    assert record["digests"]["gates"] != pruning_record(scores, other)["digests"]["gates"]


def test_the_record_of_plain_scores():
    record = pruning_record(
        {"0.ffn.neurons": np.ones(3), "0.attention.heads": np.ones(2)}, {"0.ffn.neurons": np.eye(3)[1]}
    )
    assert record["sites"] == {
        "0.ffn.neurons": {"had": 3, "kept": 1, "which": "1"},
        "0.attention.heads": {"had": 2, "kept": 2, "which": "0-1"},
    }
    with pytest.raises(TypeError, match="note cannot be written as JSON"):
        pruning_record({}, {}, note=object())


def test_thresholds_are_the_budgets_from_which_units_stay():
    model, params = tiny_model()
    scores = random_scores(model, params, 0)
    cases: tuple[dict[str, Any], ...] = (
        {"units": 1.0},
        {"flops": 1.0, "length": 9, "allocation": "global"},
        {"parameters": 1.0, "multiple_of": {"neurons": 8}, "floor": 1, "protect": ("1.attention.heads",)},
    )
    for settings in cases:
        (name,) = settings.keys() & {"units", "flops", "parameters"}
        found = thresholds(model, params, scores, **chosen(**settings))
        for fraction in (0.45, 0.5, 0.75, 0.93, 1.0):
            gates = select(model, params, scores, **chosen(**{**settings, name: fraction}))
            for site, gate in gates.items():
                np.testing.assert_array_equal(np.asarray(gate) == 1, found[site] <= fraction + 1e-9)


def test_random_gates_join_and_meet():
    model, params = tiny_model()
    tasks = [random_gates(model, params, seed) for seed in range(3)]
    every, common = union(*tasks), intersection(*tasks)
    for own in tasks:
        for name, gate in own.items():
            assert (np.asarray(every[name]) >= np.asarray(gate)).all()
            assert (np.asarray(common[name]) <= np.asarray(gate)).all()
            assert every[name].dtype == common[name].dtype == jnp.float32
    for name in every:
        stacked = np.stack([np.asarray(own[name]) for own in tasks])
        np.testing.assert_array_equal(every[name], stacked.any(0))
        np.testing.assert_array_equal(common[name], stacked.all(0))
        np.testing.assert_array_equal(union(tasks[0])[name], tasks[0][name])
        np.testing.assert_array_equal(union(tasks[2], tasks[0], tasks[1])[name], every[name])


def test_gates_that_do_not_go_together_are_refused():
    a = {"0.attention.heads": jnp.ones(4)}
    for combine in (union, intersection):
        with pytest.raises(ValueError, match="at least one task"):
            combine()
        with pytest.raises(ValueError, match=r"0.attention.heads has the shapes \(4,\), \(3,\)"):
            combine(a, {"0.attention.heads": jnp.ones(3)})
        with pytest.raises(ValueError, match=r"1.ffn.neurons has the shapes none, \(3,\)"):
            combine(a, a | {"1.ffn.neurons": jnp.ones(3)})
        with pytest.raises(ValueError, match=r"holds 0.5, expected 0 or 1"):
            combine(a, {"0.attention.heads": jnp.asarray([1.0, 0, 0.5, 1])})


def test_no_kind_starves_another(dense):
    model, params = dense
    rng = np.random.default_rng(0)
    scores = {
        name: rng.random(units) * (1e-6 if name.endswith("heads") else 1.0)
        for name, units in widths(model.axes, params).items()
    }
    shares = {}
    for allocation in ("per_layer", "per_kind", "global"):
        gates = select(model, params, scores, Flops(0.5, length=LENGTH), rules=Rules(allocation=allocation))
        heads = np.concatenate([gate for name, gate in gates.items() if name.endswith("heads")])
        shares[allocation] = float(heads.mean())
    assert shares["global"] < 0.1 and shares["per_kind"] == pytest.approx(0.5, abs=0.1)
    gates = select(model, params, scores, Flops(0.5, length=LENGTH), rules=Rules(allocation="per_kind"))
    names = [name for name in gates if name.endswith("heads")]
    ranked = np.concatenate([scores[name] for name in names])
    stays = np.concatenate([np.asarray(gates[name]) for name in names]) == 1
    assert ranked[stays].min() > ranked[~stays].max()  # heads of all layers compete


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ValueError, match="allocation must be one of auto, per_layer, per_kind, global, measured"):
        Rules(allocation="fair")

"""Uniform widths: all layers keep as many units of a kind, the best of each, within every budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hand_tables import hand_table
from test_budgets import random_scores
from test_measured_allocation import MEASURING, scores_of, setting
from test_whole_layers import of_layers
from tiny import tiny_model

import jaxprune as jp
from jaxprune.compaction import compact
from jaxprune.models.layers import TaskHead
from jaxprune.pruning.allocation import allocate
from jaxprune.pruning.budgets import Budget, Cache, Flops, Latency, Memory, Parameters, Rules, Units
from jaxprune.pruning.pooling import kept_by_any, pooled
from jaxprune.pruning.selection import ladders, select
from jaxprune.units import Gates, site_of, widths

BUDGETS = (Units(0.6), Parameters(0.5), Flops(0.4, length=8), Memory(0.8), Cache(0.5), Latency(0.6))
UNIFORM = Rules(uniform=True, allocation="per_layer")


def kept(gates: Gates) -> dict[str, set[int]]:
    """The numbers of units that the sites of every kind keep."""
    counts: dict[str, set[int]] = {}
    for name, gate in gates.items():
        counts.setdefault(name.rpartition(".")[2], set()).add(int(np.asarray(gate).sum()))
    return counts


@pytest.mark.parametrize("allocation", ["per_layer", "per_kind", "global"])
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.name)
@pytest.mark.parametrize("model_type", ["bert", "t5", "llama"])
def test_all_layers_keep_as_many_of_their_best(model_type: str, budget: Budget, allocation: str):
    if isinstance(budget, Cache) and model_type == "bert":
        pytest.skip("it has no cache")
    if isinstance(budget, Latency) and allocation == "per_kind":
        pytest.skip("a table knows no share of a kind")
    model, params = tiny_model(model_type, layers=3, attention_heads=8 if model_type == "llama" else 4)
    scores, rules = random_scores(model, params), Rules(uniform=True, allocation=allocation)
    if isinstance(budget, Flops) and model_type == "t5":
        budget = replace(budget, length=(8, 3))
    if isinstance(budget, Latency):
        budget = replace(budget, table=hand_table(model, params, length=(12, 3) if model_type == "t5" else 12))
    gates = select(model, params, scores, budget, rules=rules)
    assert all(len(numbers) == 1 for numbers in kept(gates).values())
    for name, gate in gates.items():
        chosen = np.asarray(gate) == 1
        assert min(scores[name][chosen], default=9) >= max(scores[name][~chosen], default=-9)
    choices = ladders(model, params, scores, budget, rules)  # within it, and short of it by less than the next step
    at = choices.places(gates)
    wider = [
        each.costs[i + 1] - each.costs[i] for each, i in zip(choices.steps, at, strict=True) if i < len(each.costs) - 1
    ]
    assert choices.cost(at) <= choices.limit + 1e-9
    assert choices.limit - choices.cost(at) < max(wider, default=np.inf)


def test_a_smaller_budget_keeps_some_of_what_a_larger_one_keeps():
    model, params = tiny_model("bert", layers=3)
    scores, rules = random_scores(model, params), Rules(uniform=True, allocation="global", multiple_of={"neurons": 4})
    before = None
    for fraction in (0.9, 0.6, 0.3):
        gates = select(model, params, scores, Parameters(fraction), rules=rules)
        assert all(number % 4 == 0 for number in kept(gates)["neurons"])
        assert before is None or all(np.all(np.asarray(gates[name]) <= np.asarray(before[name])) for name in gates)
        before = gates


def test_several_tasks_have_uniform_widths():
    model, params = tiny_model("bert", layers=3)
    several = [random_scores(model, params, seed) for seed in (0, 1)]
    for together in (pooled, kept_by_any):
        gates = together(model, params, several, Units(0.5), rules=UNIFORM)
        assert all(len(numbers) == 1 for numbers in kept(gates).values())


def test_of_scores_that_rank_layers_whole_ones_go():
    model, params = tiny_model("llama", attention_heads=8, layers=4)
    gates = select(model, params, of_layers(model, params), Parameters(0.7), rules=Rules(uniform=True))
    sizes = widths(model.axes, params)
    left = {name: int(np.asarray(gate).sum()) for name, gate in gates.items()}
    assert all(units in (0, sizes[name]) for name, units in left.items())
    layers = [{site_of(name).layer for name, units in left.items() if bool(units) == some} for some in (True, False)]
    assert len(layers[0]) == 2 and len(layers[1]) == 2 and not layers[0] & layers[1]


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_measured_widths_are_uniform(model_type: str):
    model, params, task = setting(model_type)
    scores, rules = scores_of(model, params), Rules(uniform=True)
    found = allocate(model, params, task, scores, Parameters(0.5), MEASURING, rules=rules)
    assert all(len(numbers) == 1 for numbers in kept(found.gates).values())
    assert found.loss <= min(found.starts.values())
    choices = ladders(model, params, scores, Parameters(0.5), rules)
    assert len(choices.sites) == 2 and choices.cost(choices.places(found.gates)) <= choices.limit


def test_layers_of_other_widths_are_refused():
    model, params = tiny_model("bert")
    uneven = compact(model, params, {"0.ffn.neurons": np.r_[np.ones(8), np.zeros(24)].astype(np.float32)})
    with pytest.raises(ValueError, match="uniform widths need as many neurons in all layers; they have 8 to 32"):
        select(model, uneven, random_scores(model, uneven), Units(0.5), rules=UNIFORM)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_an_export_of_uniform_widths_costs_nothing(model_type: str, tmp_path: Path):
    heads = (TaskHead(name="mood", labels=("bad", "good"), dense="tanh"),) if model_type == "bert" else None
    model, params = tiny_model(model_type, heads=heads, layers=3)
    kinds = {
        name: score for name, score in random_scores(model, params).items() if model_type != "bert" or "neurons" in name
    }
    small = compact(model, params, select(model, params, kinds, Units(0.7), rules=UNIFORM))
    record = jp.export(tmp_path / "out", model, small)
    assert all(each["fewest"] == each["written"] for each in record["units"].values())
    assert record["parameters"]["model"] == record["parameters"]["written"] < jp.parameters(params)

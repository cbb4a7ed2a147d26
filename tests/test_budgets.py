"""Budgets of memory and latency: never exceeded, as much as fits, and what cannot be reached is named."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import jax
import numpy as np
import pytest
from choices import chosen
from hand_tables import hand_table
from tiny import random_gates, tiny_batch, tiny_model

from jaxprune.compaction import compact
from jaxprune.models.cost import elements, memory, unit_costs, weight_bytes
from jaxprune.pruning.budgets import Latency, Memory, Rules
from jaxprune.pruning.selection import select, thresholds
from jaxprune.units import Gates, widths

MODEL_TYPES = ("bert", "t5")
FRACTIONS = (0.45, 0.6, 0.85, 1.0)


def random_scores(model, params, seed=0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(units) for name, units in widths(model.axes, params).items()}


def counts(gates: Gates) -> dict[str, int]:
    return {name: int(np.asarray(gate).sum()) for name, gate in gates.items()}


def above_zero(scores, gates) -> float:
    return sum(float(np.maximum(scores[name], 0.0) @ np.asarray(gate, np.float64)) for name, gate in gates.items())


def table_of(model, params, **how):
    return hand_table(model, params, length=(12, 3) if len(model.stacks) > 1 else 12, **how)


# memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bytes_are_those_of_the_arrays(model_type, dtype):
    model, params = tiny_model(model_type)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    assert memory(params) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    size = np.dtype(jax.tree.leaves(params)[0].dtype).itemsize
    count = unit_costs(model, params, elements)
    assert unit_costs(model, params, weight_bytes(params)) == {name: size * own for name, own in count.items()}


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_memory_is_the_most_within_the_budget(model_type, allocation):
    model, params = tiny_model(model_type, layers=3)
    scores, whole = random_scores(model, params), memory(params)
    costs = unit_costs(model, params, weight_bytes(params))
    before = -1
    for fraction in (0.7, 0.8, 0.9, 1.0):
        gates = select(model, params, scores, Memory(fraction), rules=Rules(allocation=allocation))
        small = memory(compact(model, params, gates))
        assert fraction * whole - max(costs.values()) < small <= fraction * whole
        assert small > before
        before = small
        same = select(model, params, scores, Memory(bytes=fraction * whole), rules=Rules(allocation=allocation))
        assert counts(same) == counts(gates)


def test_memory_of_channels_and_thresholds():
    model, params = tiny_model()
    kinds = ("channels", "query_channels", "neurons")
    scores = {name: np.random.default_rng(1).random(units) for name, units in widths(model.axes, params, kinds).items()}
    gates = select(model, params, scores, Memory(0.8))
    assert memory(compact(model, params, gates)) <= 0.8 * memory(params)
    own = random_scores(model, params)
    found = thresholds(model, params, own, Memory(0.5), rules=Rules(allocation="global"))
    for fraction in (0.72, 0.9):
        gates = select(model, params, own, Memory(fraction), rules=Rules(allocation="global"))
        for name, gate in gates.items():
            np.testing.assert_array_equal(np.asarray(gate) == 1.0, found[name] <= fraction + 1e-9)


def test_the_smallest_memory_is_named_and_can_be_reached():
    model, params = tiny_model()
    scores = random_scores(model, params)
    empty = memory(compact(model, params, {name: np.zeros(len(own), np.float32) for name, own in scores.items()}))
    share = np.ceil(1e4 * empty / memory(params)) / 1e4
    with pytest.raises(
        ValueError, match=rf"memory=0.1 cannot be reached: .* never pruned.* fraction is {share}, "
    ) as e:
        select(model, params, scores, Memory(0.1))
    assert counts(select(model, params, scores, Memory(float(share)))).keys() == scores.keys()
    named = float(str(e.value).rpartition(", ")[2].removesuffix(" MB."))
    assert empty <= 1e6 * named <= empty + 1e3
    select(model, params, scores, Memory(bytes=1e6 * named))
    with pytest.raises(ValueError, match=r"memory_bytes=5 cannot be reached"):
        select(model, params, scores, Memory(bytes=5))


# latency


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_prediction_never_exceeds_its_budget(model_type, allocation, seed):
    model, params = tiny_model(model_type, layers=3)
    random, scores = np.random.default_rng(seed), random_scores(model, params, seed)
    noise = {units: float(random.normal(1.0, 0.2)) for units in range(64)}  # as rows are that were measured
    table = table_of(
        model, params, seconds=lambda kind, units: noise[units] * units * (1e-3 if kind == "heads" else 1e-4)
    )
    dense, before = table.predict(widths(model.axes, params)), 0.0
    for fraction in FRACTIONS:
        gates = select(model, params, scores, Latency(fraction, table=table), rules=Rules(allocation=allocation))
        small = compact(model, params, gates)
        assert widths(model.axes, small) == counts(gates)
        assert table.predict(counts(gates)) <= fraction * dense * (1 + 1e-9)
        same = select(
            model, params, scores, Latency(seconds=fraction * dense, table=table), rules=Rules(allocation=allocation)
        )
        assert counts(same) == counts(gates)
        kept = above_zero(scores, gates)
        assert allocation == "per_layer" or kept >= before
        before = kept
    assert counts(gates) == widths(model.axes, params)  # where there is room, nothing goes


@pytest.mark.parametrize("seed", range(4))
def test_competing_units_are_chosen_as_well_as_can_be(seed):
    model, params = tiny_model(layers=2, neurons=24)
    scores, width = random_scores(model, params, seed), widths(model.axes, params)
    table = table_of(model, params, seconds=lambda kind, units: units**0.8 * (1e-3 if kind == "heads" else 2e-4))
    budget = 0.5 * table.predict(width)
    best = 0.0
    for own in product(*([each for each, _ in table.steps(name, units)] for name, units in width.items())):
        if table.predict(dict(zip(width, own, strict=True))) <= budget:
            kept = sum(
                np.sort(np.maximum(scores[name], 0.0))[::-1][:units].sum()
                for name, units in zip(width, own, strict=True)
            )
            best = max(best, float(kept))
    gates = select(model, params, scores, Latency(seconds=budget, table=table), rules=Rules(allocation="global"))
    assert above_zero(scores, gates) == pytest.approx(best, rel=1e-12)
    for name, gate in gates.items():  # the best units of every site
        chosen = np.asarray(gate) == 1.0
        assert not chosen.any() or chosen.all() or scores[name][chosen].min() >= scores[name][~chosen].max()


def test_per_layer_keeps_the_same_fraction_everywhere():
    model, params = tiny_model(layers=4)
    gates = select(model, params, random_scores(model, params), Latency(0.6, table=table_of(model, params)))
    shares = [own / widths(model.axes, params)[name] for name, own in counts(gates).items()]
    assert max(shares) - min(shares) <= 0.25


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_modules_that_are_not_needed_go_entirely_and_the_function_stays(model_type):
    model, params = tiny_model(model_type, layers=3)
    scores = random_scores(model, params, 4)
    gone = [name for name in scores if ".1." in f".{name}"]  # layer 1 of every stack
    scores = {name: np.abs(own) * (0.0 if name in gone else 1.0) for name, own in scores.items()}
    table = table_of(model, params)
    others = {name: 0 if name in gone else units for name, units in widths(model.axes, params).items()}
    budget = {"latency_seconds": table.predict(others), "table": table, "allocation": "global"}
    gates = select(model, params, scores, **chosen(**budget))
    assert counts(gates) == others
    small, batch = compact(model, params, gates), tiny_batch(model)
    full, pruned = (
        np.asarray(model.apply(own, batch, gated).logits) for own, gated in ((params, gates), (small, None))
    )
    np.testing.assert_allclose(pruned, full, atol=2e-5 * float(np.abs(full).max()))
    assert min(counts(select(model, params, scores, **chosen(**budget, floor=1))).values()) >= 1


def test_floor_multiples_and_protection_hold_by_latency():
    model, params = tiny_model(layers=3, neurons=30)
    scores = random_scores(model, params)
    table = table_of(model, params, step=7)
    rules = {"multiple_of": {"neurons": 8}, "floor": {"heads": 2}, "protect": (0, "2.ffn.neurons")}
    for allocation in ("per_layer", "global"):
        gates = counts(
            select(model, params, scores, **chosen(latency=0.8, table=table, allocation=allocation, **rules))
        )
        assert gates["0.attention.heads"] == 4 and gates["0.ffn.neurons"] == gates["2.ffn.neurons"] == 30
        assert gates["1.ffn.neurons"] % 8 == 0 or gates["1.ffn.neurons"] == 30
        assert min(gates[f"{i}.attention.heads"] for i in range(3)) >= 2
        assert table.predict(gates) <= 0.8 * table.predict(widths(model.axes, params)) * (1 + 1e-9)


def test_sites_without_scores_stay_whole():
    model, params = tiny_model()
    scores = {"1.ffn.neurons": np.arange(32.0)}
    gates = counts(
        select(model, params, scores, Latency(0.95, table=table_of(model, params)), rules=Rules(allocation="global"))
    )
    assert gates | {"1.ffn.neurons": 32} == widths(model.axes, params) and gates["1.ffn.neurons"] < 32


def test_the_smallest_latency_is_named_and_can_be_reached():
    model, params = tiny_model()
    scores, table = random_scores(model, params), table_of(model, params)
    with pytest.raises(ValueError, match=r"latency=0\.1 cannot be reached: .*fraction is 0\.3087, 10\.0 ms\.") as e:
        select(model, params, scores, Latency(0.1, table=table))  # 10 ms of 10 + 2 (8 + 3.2)
    assert "never pruned" in str(e.value)
    assert set(counts(select(model, params, scores, Latency(seconds=0.01, table=table))).values()) == {0}
    with pytest.raises(ValueError, match=r"latency_seconds=0\.005 cannot be reached"):
        select(model, params, scores, Latency(seconds=0.005, table=table))
    with pytest.raises(ValueError, match=r"fraction is 0\.4321, 14\.0 ms"):
        select(model, params, scores, Latency(0.1, table=table), rules=Rules(floor={"heads": 1}))


def test_what_a_latency_budget_cannot_have_is_refused():
    model, params = tiny_model()
    scores, table = random_scores(model, params), table_of(model, params)
    with pytest.raises(ValueError, match="needs table="):
        select(model, params, scores, Latency(0.5))
    with pytest.raises(ValueError, match=r"latency must lie in \(0, 1\], got 2"):
        select(model, params, scores, Latency(2, table=table))
    with pytest.raises(ValueError, match="latency_seconds must lie above 0, got 0"):
        select(model, params, scores, Latency(seconds=0, table=table))
    with pytest.raises(ValueError, match=r"exactly one budget .* got flops, latency"):
        select(model, params, scores, **chosen(flops=0.5, latency=0.5, length=9, table=table))
    with pytest.raises(ValueError, match="no threshold by latency"):
        thresholds(model, params, scores, Latency(0.5, table=table))
    elsewhere = replace(table, conditions=replace(table.conditions, device="another device"))
    with pytest.raises(ValueError, match="measured on 'another device'"):
        select(model, params, scores, Latency(0.5, table=elsewhere))
    small = compact(model, params, random_gates(model, params))
    with pytest.raises(ValueError, match="for a model with the shapes"):
        select(model, small, random_scores(model, small), Latency(0.5, table=table))
    channels = {"0.attention.channels": np.ones(16)}
    with pytest.raises(ValueError, match="needs scores of heads or groups or neurons, these are of channels"):
        select(model, params, channels, Latency(0.5, table=table))

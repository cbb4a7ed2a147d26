"""Whole layers that go, by block influence, and the cache of keys and values as a cost and a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import record_of, run, write_rows
from hand_tables import hand_table
from test_likelihood import ANSWERS
from tiny import random_gates, tiny_batch, tiny_model

import jaxprune as jp
from jaxprune.checkpoints.folder import load, save
from jaxprune.compaction import compact
from jaxprune.models import Model, enter, model_inputs, model_layers, run_layer
from jaxprune.models.cost import cache
from jaxprune.models.running import ANSWER
from jaxprune.pruning.budgets import Cache, Flops, Latency, Memory, Parameters, Rules, Units, read_budget
from jaxprune.pruning.pooling import pooled
from jaxprune.pruning.prune import check_scope, select_left
from jaxprune.pruning.selection import check_selection, select, thresholds
from jaxprune.scoring.criteria import BlockInfluence
from jaxprune.scoring.scores import Scores, properties_of
from jaxprune.units import Params, site_of, widths

PROMPT = 'template: "mood : {sentence} ?"\nwords: {good: " very good", bad: " bad"}\n'


def random_scores(model: Model, params: Params, kinds: tuple[str, ...] = ("heads", "groups", "neurons")) -> Any:
    random = np.random.default_rng(0)
    return {name: random.random(units) for name, units in widths(model.axes, params, kinds).items()}


def counts(gates: Any) -> dict[str, int]:
    return {name: int(np.asarray(gate).sum()) for name, gate in gates.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "t5"])
def test_the_cache_is_what_generation_keeps_for_a_token(model_type: str, dtype: str):
    model, dense = tiny_model(model_type, attention_heads=8)
    dense = jax.tree.map(lambda leaf: leaf.astype(dtype), dense)
    for params in (dense, compact(model, dense, random_gates(model, dense, 1))):
        inputs, state, kept = model_inputs(model, params, tiny_batch(model)), None, 0
        for layer in model_layers(model, params):
            state = enter(model, layer, inputs, state)
            if layer.stack == model.stacks[-1]:  # one row, one token written, and if there is a memory one read
                one = jax.tree.map(lambda part: part[:1, :1], state)
                room = jax.eval_shape(lambda own, one: model.prepare(own, one, 1), layer.params, one)
                kept += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(room))
            state = run_layer(model, layer, inputs, state)[0]
        assert cache(model, params) == kept > 0


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_a_budget_of_cache_takes_what_is_cached_and_nothing_else(model_type: str, allocation: str):
    model, params = tiny_model(model_type, attention_heads=8, layers=3)
    scores, rules, whole = random_scores(model, params), Rules(allocation=allocation), cache(model, params)
    cached = {name for name in scores if "neurons" not in name and "encoder" not in name}
    from_on, sizes = thresholds(model, params, scores, Cache(0.5), rules=rules), widths(model.axes, params)
    for fraction in (0.01, 0.3, 0.5, 1.0):
        gates = select(model, params, scores, Cache(fraction), rules=rules)
        left = counts(gates)
        assert {name: units for name, units in left.items() if name not in cached} == {
            name: units for name, units in sizes.items() if name not in cached
        }
        small = compact(model, params, gates)
        unit = whole / sum(sizes[name] for name in cached)
        assert fraction * whole - unit < cache(model, small) == unit * sum(left[name] for name in cached)
        assert cache(model, small) <= fraction * whole
        for name, gate in gates.items():
            np.testing.assert_array_equal(np.asarray(gate) == 1.0, from_on[name] <= fraction + 1e-9)
    kind = "groups" if model_type == "llama" else "heads"
    left = counts(select(model, params, scores, Cache(0.6), rules=replace(rules, multiple_of=2, floor={kind: 2})))
    assert {left[name] % 2 for name in cached} == {0} and min(left[name] for name in cached) >= 2


def test_what_a_budget_of_cache_cannot_have_is_refused():
    model, params = tiny_model("llama", attention_heads=8)
    with pytest.raises(ValueError, match=r"cache=0.2 cannot be reached: .* smallest reachable fraction is 0.25"):
        select(model, params, random_scores(model, params), Cache(0.2), rules=Rules(floor={"groups": 1}))
    queries = random_scores(model, params, ("query_heads", "neurons"))
    with pytest.raises(ValueError, match=r"cache cannot be reduced: .* of query_heads and neurons, which cost none"):
        check_selection(model, params, Cache(0.5), Rules(), queries)
    encoder = tiny_model()
    with pytest.raises(ValueError, match="the model writes no text, so it keeps no cache: give a budget of flops"):
        check_selection(*encoder, Cache(0.5), Rules(), widths(encoder[0].axes, encoder[1]))
    assert cache(*encoder) == 0
    assert read_budget({"cache": 0.5}) == jp.budgets.Cache(0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, a task and a prompt for it."""
    folder = tmp_path_factory.mktemp("decoder")
    model, params = tiny_model("llama", attention_heads=8, layers=3)
    save(folder / "model", replace(model, source=ANSWERS), params)
    for i, (split, rows) in enumerate({"train": 240, "validation": 40, "test": 60}.items()):
        write_rows(folder / "data" / "mood" / f"{split}.jsonl", ("bad", "good"), rows, i)
    (folder / "prompt.yaml").write_text(PROMPT)
    return folder


def asked(place: Path) -> tuple[Any, ...]:
    rows = ("--task", "mood", "--data", place / "data", "--prompt", place / "prompt.yaml")
    return (place / "model", *rows, "--examples", 16, "--limit", 16, "--recover", "none", "--measure", 0)


def test_a_decoder_is_pruned_to_a_cache(place: Path, tmp_path: Path):
    out, scores = tmp_path / "small", tmp_path / "small.scores.safetensors"
    record = record_of("prune", *asked(place), "--criterion", "activation", "--cache", 0.5, "-o", out)
    assert record["kept"]["cache"] == 0.5 and record["selection"]["cache"] == 0.5
    model, params = load(out)
    assert record["after"]["cache"] == cache(model, params) == 3 * 2 * (2 * 6) * 4  # layers, groups, channels, bytes
    assert set(widths(model.axes, params, ("neurons",)).values()) == {32}
    assert "cache, kB per token" in (out / "README.md").read_text()
    planned = record_of("plan", place / "model", "--scores", scores, "--cache", 0.5)
    assert planned["after"].items() <= record["after"].items()
    assert "Cache: 288 bytes per token." in " ".join(run("inspect", out).stdout.split())
    assert record_of("inspect", out)["cache"] == 288


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5"])
def test_block_influence_is_how_far_a_layer_turns_its_input(model_type: str):
    model, params = tiny_model(model_type, layers=3)
    batch = tiny_batch(model)
    batch |= {ANSWER: batch["attention_mask"]}  # there is nothing more to answer
    found = BlockInfluence()(model, params, batch).scores
    assert found.keys() == widths(model.axes, params).keys()
    states = iter(model.apply(params, batch, returns=("hidden",)).hidden or ())
    expected = {}
    for stack in model.stacks:
        mask, x = batch[stack.inputs[1]].astype(bool), np.asarray(next(states), np.float64)
        for i in range(stack.layers):
            y = np.asarray(next(states), np.float64)
            cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            expected[stack.name, i] = [1 - own[real].mean() for own, real in zip(cosine, mask, strict=True)]
            x = y
    assert np.min(list(expected.values())) > 0.01
    for name, value in found.items():
        site = site_of(name)
        np.testing.assert_allclose(value[:, -1], expected[site.stack, site.layer], rtol=1e-4)
        np.testing.assert_array_equal(value, value[:, :1].repeat(value.shape[1], 1))


INFLUENCE = {0: 0.31, 1: 0.299, 2: 0.9, 3: 0.3}  # nearly alike: what units cost must not matter
BY_LAYER = Rules(allocation="global")


def of_layers(model: Model, params: Params) -> Scores:
    """Scores as block influence makes them."""
    sizes = widths(model.axes, params).items()
    values: Any = {name: np.full(units, INFLUENCE[site_of(name).layer], np.float32) for name, units in sizes}
    return Scores(values, {"properties": properties_of(BlockInfluence())})


@pytest.mark.parametrize(
    "budget", [Flops(0.5, length=200), Flops(0.5, length=2), Parameters(0.5), Units(0.5), Cache(0.5), Memory(0.56)]
)
def test_whole_layers_go_whatever_their_units_cost(budget: Any):
    model, params = tiny_model("llama", attention_heads=8, layers=4)
    scores, sizes = of_layers(model, params), widths(model.axes, params)
    gates = select(model, params, scores, budget, rules=BY_LAYER)
    cached = {name for name in sizes if "groups" in name or not isinstance(budget, Cache)}
    gone = {name for name in cached if site_of(name).layer in (1, 3)}  # those with the least influence
    part = {name for name in gone if isinstance(budget, Memory) and site_of(name).layer == 3}
    assert {name: units for name, units in counts(gates).items() if name not in part} == {
        name: 0 if name in gone else units for name, units in sizes.items() if name not in part
    }
    for again in (
        pooled(model, params, [scores, scores], budget, rules=BY_LAYER),
        select_left(model, params, scores, {}, budget, BY_LAYER),
    ):
        assert counts(again) == counts(gates)
    with pytest.raises(ValueError, match="block-influence rank layers"):
        check_scope(scores.properties, Rules(allocation="per_layer"))


def test_of_the_last_layer_goes_what_is_still_too_much():
    model, params = tiny_model("llama", attention_heads=8, layers=4)
    left = counts(select(model, params, of_layers(model, params), Parameters(0.7), rules=BY_LAYER))
    assert left["1.attention.groups"] == left["1.ffn.neurons"] == 0
    assert 0 < left["3.attention.groups"] + left["3.ffn.neurons"] < 36
    assert left["0.attention.groups"] == left["2.attention.groups"] == 4
    assert left["0.ffn.neurons"] == left["2.ffn.neurons"] == 32


def test_whole_layers_go_by_latency():
    model, params = tiny_model(layers=4)
    table, sizes = hand_table(model, params, length=12), widths(model.axes, params)
    wanted = {name: 0 if site_of(name).layer in (1, 3) else units for name, units in sizes.items()}
    budget = Latency(seconds=table.predict(wanted), table=table)
    assert counts(select(model, params, of_layers(model, params), budget, rules=BY_LAYER)) == wanted


def test_a_decoder_loses_whole_layers(place: Path, tmp_path: Path):
    out = tmp_path / "small"
    how = ("--criterion", "block-influence", "--flops", 0.7, "--allocation=global", "-o", out)
    record = record_of("prune", *asked(place), *how)
    assert 0.5 < record["kept"]["flops"] <= 0.7
    model, params = load(out)
    sizes = widths(model.axes, params)
    (gone,) = {site_of(name).layer for name, units in sizes.items() if not units}
    assert sizes[f"{gone}.attention.groups"] == sizes[f"{gone}.ffn.neurons"] == 0
    states = model.apply(params, tiny_batch(model), returns=("hidden",)).hidden or ()
    np.testing.assert_array_equal(states[gone], states[gone + 1])  # what is left of the layer is the identity
    evaluated = record_of("evaluate", out, *asked(place)[1:7], "--limit", 16)["results"]
    assert evaluated[0]["metrics"] == record["after"]["evaluation"]["metrics"]
    assert len(jp.generate(model, params, tiny_batch(model), max_new_tokens=3)) == 3
    shown = run(
        "plan", place / "model", "--scores", f"{out}.scores.safetensors", "--flops", 0.7, "--allocation", "per-layer"
    )
    assert shown.exit_code == 2 and "--allocation global" in shown.stderr

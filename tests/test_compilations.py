"""Compilations, and the cost of one quadrature node: counted, not timed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_batch, tiny_config, tiny_model

from jaxprune.compaction import compact
from jaxprune.models import (
    BlockSettings,
    Mask,
    Model,
    State,
    TaskHead,
    advance,
    bert,
    block_compiled,
    layer_entries,
    mask_of,
    model_inputs,
    model_layers,
    running,
    t5,
    values_compiled,
)
from jaxprune.models.layers import max_tokens
from jaxprune.pruning.budgets import Rules, Units
from jaxprune.pruning.selection import select
from jaxprune.scoring.attribution import GradientActivation, IntegratedGradients, layer
from jaxprune.scoring.criteria import Fisher, LeaveOneOut, Wanda
from jaxprune.scoring.objectives import calibration_means, every
from jaxprune.scoring.run import score_batches
from jaxprune.training.joint_loss import joint_loss_and_gradients
from jaxprune.units import Intervention, widths

COMPILED = "/jax/core/compile/backend_compile_duration"  # one event per program


@pytest.fixture(scope="module")
def compiled() -> Iterator[list[int]]:
    """A counter of compiled programs, in a list of one number."""
    count = [0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        count[0] += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    before = count[0]
    jax.jit(lambda x: x + 1)(np.ones(3))
    assert count[0] > before, f"jax no longer reports {COMPILED}"
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


class Watched(list[dict[str, np.ndarray]]):
    """Batches that note how many programs are compiled when each is fetched."""

    def __init__(self, batches: list[dict[str, np.ndarray]], compiled: list[int]):
        super().__init__(batches)
        self.compiled, self.seen = compiled, []

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(self.compiled[0])
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "criterion",
    [
        pytest.param(IntegratedGradients(nodes=5, chunk=2), marks=pytest.mark.slow),
        IntegratedGradients(nodes=2, path=layer, labels=every),
        GradientActivation(tokens=max_tokens, closed=calibration_means),
        Fisher(),
        Wanda(),
        pytest.param(LeaveOneOut(chunk=3), marks=pytest.mark.slow),
    ],
)
def test_no_compilation_after_the_first_batch_of_each_length(criterion: Any, compiled: list[int]):
    model, params = tiny_model(layers=1, neurons=24)  # widths of its own: nothing is compiled yet
    batches = [
        tiny_batch(model, 4, length, seed) | {"labels": np.array([0, 1, 2, 1], np.int32)}
        for seed, length in enumerate((7, 5, 7, 5, 7))
    ]
    watched = Watched(batches, compiled)
    score_batches(model, params, watched, criterion)
    seen = watched.seen[-5:]  # the passes over the batches before are for the means
    assert seen[0] < seen[1] < seen[2]
    assert seen[2] == seen[3] == seen[4]


@pytest.mark.parametrize(
    "criterion",
    [
        pytest.param(IntegratedGradients(nodes=2, labels=every), marks=pytest.mark.slow),
        GradientActivation(),
        pytest.param(Wanda(), marks=pytest.mark.slow),
    ],
)
def test_nor_with_a_text_to_text_model(criterion: Any, compiled: list[int]):
    model, params = tiny_model("mt5", layers=1, neurons=24)
    answers = np.array([[[5, 6, 1], [7, 1, -100]]], np.int32).repeat(4, 0)
    more = {"labels": np.array([0, 1, 1, 0], np.int32), "candidates": answers}
    batches = []
    for seed, length in enumerate((7, 5, 7, 5, 7)):
        own = tiny_batch(model, 4, length, seed)
        batches.append({name: own[name] for name in ("input_ids", "attention_mask")} | more)
    watched = Watched(batches, compiled)
    score_batches(model, params, watched, criterion)
    seen = watched.seen[-5:]
    assert seen[0] < seen[1] < seen[2]
    assert seen[2] == seen[3] == seen[4]


@pytest.mark.parametrize(
    "criterion", [GradientActivation(), pytest.param(IntegratedGradients(nodes=2, path=layer), marks=pytest.mark.slow)]
)
def test_a_deep_model_compiles_no_more_than_a_shallow_one(criterion: Any, compiled: list[int]):
    programs = []
    for layers in (2, 6):
        model, params = tiny_model(layers=layers)
        batch = tiny_batch(model) | {"labels": np.array([0, 1, 2], np.int32)}
        jax.clear_caches()
        before = compiled[0]
        criterion(model, params, batch)
        programs.append(compiled[0] - before)
    assert programs[0] > 0 and programs[1] <= 2 * programs[0], programs


def test_a_deep_student_compiles_no_more_than_a_shallow_one(compiled: list[int]):
    programs = []
    for layers in (1, 3):
        model, params = tiny_model(layers=layers)
        batch, key = tiny_batch(model), jax.random.key(0)
        jax.clear_caches()
        before = compiled[0]
        joint_loss_and_gradients((model, params), (model, params), batch, key=key)
        programs.append(compiled[0] - before)
        joint_loss_and_gradients((model, params), (model, params), batch, key=key)
        assert compiled[0] - before == programs[-1]  # nor in the next step
    assert programs[0] == programs[1] > 0


def flops_of(function: Any, *args: Any) -> float:
    cost = function.lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def test_one_node_costs_two_forward_passes():
    """The function of one node: a forward pass that keeps what the backward pass needs, and the backward pass.

    At the widths of BERT-base and 128 tokens, with one gate per unit and example. Nothing is run.
    """
    raw = tiny_config("bert", layers=2, embed=768, attention_heads=12, neurons=3072, vocab=100)
    head = TaskHead(name="task", labels=("no", "yes"), dense="tanh")
    model = Model(bert.parse_config(raw, (head,)))
    params = jax.eval_shape(model.initialise, jax.random.key(0))
    state = State(cast(Any, jax.ShapeDtypeStruct((2, 128, 768), jnp.float32)))
    mask = Mask(cast(Any, jax.ShapeDtypeStruct((2, 128), jnp.bool_)))
    units = {"attention.heads": 12, "ffn.neurons": 3072}
    gates: Any = {name: jax.ShapeDtypeStruct((2, n), jnp.float32) for name, n in units.items()}
    before = (params["layers"][1], state, {})
    arrays = (before, mask, Intervention(gates, {}), None)
    settings = BlockSettings()
    forward = flops_of(block_compiled, model, settings, *before[:2], mask, Intervention(), None)
    for inner in (False, True):  # the lowest layer, whose input is not differentiated, and any other
        static = (model, settings, False, inner)
        output, saved = jax.eval_shape(partial(running._block_forward, *static), *arrays)
        pullback = saved.restore(before)
        node = flops_of(running._block_forward, *static, *arrays) + flops_of(running._pull, pullback, output)
        assert 1.5 * forward < node <= 2.1 * forward


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_node_of_a_text_to_text_model_costs_two_forward_passes(stack: str):
    """At the widths of FLAN-T5-base, 128 tokens read and written."""
    raw = tiny_config("mt5", layers=2, embed=768, attention_heads=12, neurons=2048, vocab=100) | {"d_kv": 64}
    model = Model(t5.parse_config(raw, ()))
    params = jax.eval_shape(model.initialise, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    batch = dict.fromkeys(names, tokens)
    [place] = [i for i, own in enumerate(model_layers(model, params)) if own.name == f"{stack}.1"]

    def before(params: Any, batch: Any) -> Any:
        inputs = model_inputs(model, params, batch)
        layers = model_layers(model, params)
        return advance(model, layers[:place], inputs), mask_of(layers[place], inputs)

    state, mask = jax.eval_shape(before, params, batch)
    layer, units = model_layers(model, params)[place], widths(model.axes, params)
    gates: Any = {
        name: jax.ShapeDtypeStruct((2, count), jnp.float32) for name, count in layer_entries(units, layer.name).items()
    }
    arrays = ((layer.params, state, {}), mask, Intervention(gates, {}), None)
    settings = BlockSettings(kind=layer.kind)
    forward = flops_of(block_compiled, model, settings, layer.params, state, mask, Intervention(), None)
    static = (model, settings, False, True)
    output, saved = jax.eval_shape(partial(running._block_forward, *static), *arrays)
    pullback = saved.restore((layer.params, state, {}))
    node = flops_of(running._block_forward, *static, *arrays) + flops_of(running._pull, pullback, output)
    assert 1.5 * forward < node <= 2.1 * forward


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_selection_and_compaction_compile_nothing(model_type: str, compiled: list[int]):
    model, params = tiny_model(model_type, layers=3, neurons=37)
    random = np.random.default_rng(0)
    scores = {name: random.random(count).astype(np.float32) for name, count in widths(model.axes, params).items()}
    before = compiled[0]
    small = compact(model, params, select(model, params, scores, Units(0.5), rules=Rules(allocation="global")))
    assert compiled[0] == before
    shapes, all_shapes = ({array.shape for array in jax.tree.leaves(own)} for own in (small, params))
    assert len(shapes - all_shapes) > 3


def test_what_the_lowest_gates_multiply_is_not_computed_again():
    raw = tiny_config("bert", layers=1, embed=768, attention_heads=12, neurons=3072, vocab=100)
    model = Model(bert.parse_config(raw, ()))
    params = jax.eval_shape(model.initialise, jax.random.key(0))["layers"][0]
    state = State(cast(Any, jax.ShapeDtypeStruct((2, 128, 768), jnp.float32)))
    mask = Mask(cast(Any, jax.ShapeDtypeStruct((2, 128), jnp.bool_)))
    known = {"attention.heads": jax.ShapeDtypeStruct((2, 128, 12, 64), jnp.float32)}
    gates: Any = {"attention.heads": jax.ShapeDtypeStruct((2, 12), jnp.float32)}
    whole, rest = (
        flops_of(
            running._block_forward,
            *(model, BlockSettings(), False, False, (params, state, own), mask, Intervention(gates, {}), None),
        )
        for own in ({}, known)
    )
    first = flops_of(values_compiled, model, BlockSettings(returns=("attention.heads",)), params, state, mask)
    products = 2 * 2 * 128 * (3 * 768 * 768 + 2 * 128 * 768)  # of queries, keys, values, scores and their mixture
    assert products < first < 1.1 * products
    assert whole - rest > 0.99 * first - 0.01 * whole

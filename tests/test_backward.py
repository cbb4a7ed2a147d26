"""Gradients compiled block by block equal those of the whole model at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import NUMERIC_TYPES, lively, random_gates, tiny_batch, tiny_config, tiny_model

from jaxprune.compaction import compact
from jaxprune.models import (
    BlockSettings,
    Mask,
    Model,
    State,
    TaskHead,
    enter,
    family,
    mask_of,
    model_inputs,
    model_layers,
    part,
    values_compiled,
)
from jaxprune.models.layers import TokenReduction, absolute_tokens, max_tokens, squared_tokens, sum_tokens
from jaxprune.models.running import Gradients, Prefix, forward
from jaxprune.units import Gates, Intervention, Params, open_gates, widths

ROWS, LENGTH = 3, 9


def cotangent(labels: int = 3, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((ROWS, labels)), jnp.float32)


def per_example(gates: Gates, seed: int = 0) -> Gates:
    random = np.random.default_rng(seed)
    return {n: jnp.asarray(random.uniform(0.2, 1, (ROWS, g.shape[0])), jnp.float32) for n, g in gates.items()}


def means_for(model: Model, params: Params) -> Gates:
    random = np.random.default_rng(5)
    sizes = widths(model.axes, params)
    shapes = {name: (units, 4) if name.endswith("heads") else (units,) for name, units in sizes.items()}
    return {name: jnp.asarray(random.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def weighted(model: Model, params: Params, batch: Any, gates: Gates | None, toward: jax.Array, **settings: Any) -> Any:
    """One number whose gradient with respect to the logits is `toward`, by `Model.apply`."""
    found = model.apply(params, batch, gates, **settings).logits
    assert found is not None
    return (found * toward).sum()


def assert_same(found: Any, expected: Any) -> None:
    """Equal trees, within float32 rounding of each array's scale: other order of sums.

    The gradient of a key's bias is zero in exact arithmetic: only the rounding of large sums is left.
    """
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max((float(jnp.abs(leaf).max(initial=0.0)) for leaf in jax.tree.leaves(expected)), default=0.0)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(float(jnp.abs(other).max(initial=0.0)), 0.01 * largest, 1e-3)
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale)


# Here, where all optimisation is on: the sums of less optimised code have more rounding than the tolerance allows.
@pytest.mark.reference
@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
@pytest.mark.parametrize("rows", [False, True])
def test_gate_gradients_equal_those_of_apply(model_type: str, rows: bool):
    model, params = tiny_model(model_type)
    batch, toward = tiny_batch(model, ROWS, LENGTH), cotangent()
    gates = random_gates(model, params, fractional=True)
    gates = per_example(gates) if rows else gates
    expected = jax.jit(jax.grad(lambda g: weighted(model, params, batch, g, toward)))(gates)
    logits, pull = forward(model, params, batch, Intervention(gates))
    np.testing.assert_allclose(logits, np.asarray(model.apply(params, batch, gates).logits), rtol=1e-5, atol=1e-5)
    found, weights = pull(toward)
    assert weights is None and list(found) == list(gates)
    assert_same(found, expected)


@pytest.mark.parametrize("weights", [False, True])
def test_what_a_forward_pass_keeps_shares_the_weights(weights: bool):
    model, params = tiny_model()
    _, pull = forward(
        model,
        params,
        tiny_batch(model, ROWS, LENGTH),
        Intervention(per_example(open_gates(model, params))),
        gradients=Gradients(weights=weights),
    )
    layers = [step for step in pull.steps if step.layer is not None]
    assert [step.layer for step in layers] == ["0", "1"]
    for step in layers:
        kept = {id(leaf) for leaf in jax.tree.leaves(step.pullback)}
        module = part(params, step.places)
        kernels = [module["ffn"][name]["kernel"] for name in ("up", "down")]
        kernels += [module["attention"]["out"]["kernel"]]
        assert all(id(kernel) in kept for kernel in kernels)


def test_gates_towards_means():
    model, params = tiny_model()
    batch, toward, means = tiny_batch(model, ROWS, LENGTH), cotangent(), means_for(*tiny_model())
    gates = per_example(open_gates(model, params))
    expected = jax.jit(jax.grad(lambda g: weighted(model, params, batch, g, toward, means=means)))(gates)
    logits, pull = forward(model, params, batch, Intervention(gates, means))
    np.testing.assert_allclose(
        logits, np.asarray(model.apply(params, batch, gates, means=means).logits), rtol=1e-5, atol=1e-5
    )
    assert_same(pull(toward)[0], expected)


@pytest.mark.parametrize("names", [("1.ffn.neurons",), ("1.attention.heads", "2.ffn.neurons"), ()])
def test_only_named_gates_are_differentiated(names: tuple[str, ...]):
    model, params = tiny_model(layers=3)
    batch, toward = tiny_batch(model, ROWS, LENGTH), cotangent()
    some = {name: gate for name, gate in random_gates(model, params, fractional=True).items() if name in names}
    expected = jax.jit(jax.grad(lambda g: weighted(model, params, batch, g, toward)))(some)
    _, pull = forward(model, params, batch, Intervention(some))
    assert len(pull.steps) == (3 if names else 1)  # layers below the lowest gate are not differentiated
    assert_same(pull(toward)[0], expected)


@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_weight_gradients_equal_those_of_apply(model_type: str):
    heads = (TaskHead(name="task", labels=("a", "b", "c"), dense="tanh"), TaskHead(name="other", labels=("a", "b")))
    rate = 0.3
    dropout = {"dropout": rate, "attention_dropout": rate, "seq_classif_dropout": rate}
    if model_type != "distilbert":
        dropout = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate, "classifier_dropout": rate}
    module = family(model_type)
    model = Model(module.parse_config(tiny_config(model_type) | dropout, heads))
    params = lively(model)
    batch, toward, key = tiny_batch(model, ROWS, LENGTH), cotangent(), jax.random.key(7)

    def total(used: Params) -> Any:
        return weighted(model, used, batch, None, toward, head="task", key=key)

    used = params | {"heads": {"task": params["heads"]["task"]}}
    expected = jax.jit(jax.grad(total))(used)
    logits, pull = forward(model, params, batch, head="task", gradients=Gradients(weights=True), key=key)
    np.testing.assert_allclose(
        logits, np.asarray(model.apply(params, batch, head="task", key=key).logits), rtol=1e-5, atol=1e-5
    )
    gates, found = pull(toward)
    assert gates == {} and found is not None and list(found["layers"]) == [0, 1]
    assert_same(found, expected)


def test_gates_and_weights_together():
    model, params = tiny_model()
    batch, toward = tiny_batch(model, ROWS, LENGTH), cotangent()
    gates = random_gates(model, params, fractional=True)
    expected = jax.jit(jax.grad(lambda g, p: weighted(model, p, batch, g, toward), argnums=(0, 1)))(gates, params)
    assert_same(
        forward(model, params, batch, Intervention(gates), gradients=Gradients(weights=True))[1](toward),
        expected,
    )


def test_a_pullback_is_linear_and_can_be_used_again():
    model, params = tiny_model()
    gates = open_gates(model, params)
    _, pull = forward(model, params, tiny_batch(model, ROWS, LENGTH), Intervention(gates))
    one, two = cotangent(seed=1), cotangent(seed=2)
    expected = jax.tree.map(lambda a, b: 2.0 * a - b, pull(one)[0], pull(two)[0])
    assert_same(pull(2.0 * one - two)[0], expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_starting_at_a_layer_changes_nothing(layer: int):
    model, params = tiny_model(layers=2)
    batch, toward = tiny_batch(model, ROWS, LENGTH), cotangent()
    states = model.apply(params, batch, returns=("hidden",)).hidden
    assert states is not None
    gates = {name: gate for name, gate in open_gates(model, params).items() if int(name.split(".")[0]) >= layer}
    logits, pull = forward(model, params, batch, Intervention(gates), prefix=Prefix(State(states[layer]), layer))
    expected, whole = forward(model, params, batch, Intervention(gates))
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)
    assert_same(pull(toward)[0], whole(toward)[0])


def test_pruned_and_empty_layers():
    model, params = tiny_model()
    closed = random_gates(model, params) | {"0.attention.heads": jnp.zeros(4), "1.ffn.neurons": jnp.zeros(32)}
    small = compact(model, params, closed)
    batch, toward = tiny_batch(model, ROWS, LENGTH), cotangent()
    gates = open_gates(model, small)
    assert gates["0.attention.heads"].size == gates["1.ffn.neurons"].size == 0
    expected = jax.jit(jax.grad(lambda g: weighted(model, small, batch, g, toward)))(gates)
    assert_same(forward(model, small, batch, Intervention(gates))[1](toward)[0], expected)


def test_gates_of_integers_have_gradients_too():
    model, params = tiny_model()
    batch, toward = tiny_batch(model, ROWS, LENGTH), cotangent()
    whole = {name: jnp.ones(units, jnp.int32) for name, units in widths(model.axes, params).items()}
    expected = forward(model, params, batch, Intervention(open_gates(model, params)))[1](toward)[0]
    assert_same(forward(model, params, batch, Intervention(whole))[1](toward)[0], expected)


# Reductions over tokens


def explicit(params: Params, x: jax.Array, attended: jax.Array, gates: Gates, means: Gates) -> jax.Array:
    """The output of a BERT layer, written out, with one gate per token: heads `[b, t, n]`, neurons `[b, t, f]`."""
    attention, ffn = params["attention"], params["ffn"]

    def norm(y: jax.Array, part: Params) -> jax.Array:
        centred = y - y.mean(-1, keepdims=True)
        deviation = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return centred / deviation * part["scale"] + part["bias"]

    g = gates["0.attention.heads"][..., None]
    mixed = g * attended + (1 - g) * means["0.attention.heads"]
    out = jnp.einsum("btnh,nhd->btd", mixed, attention["out"]["kernel"]) + attention["out"]["bias"]
    x = norm(x + out, attention["norm"])
    g = gates["0.ffn.neurons"]
    inner = x @ ffn["up"]["kernel"] + ffn["up"]["bias"]
    inner = 0.5 * inner * (1 + jax.scipy.special.erf(inner / np.sqrt(2)))  # GELU
    inner = g * inner + (1 - g) * means["0.ffn.neurons"]
    return norm(x + inner @ ffn["down"]["kernel"] + ffn["down"]["bias"], ffn["norm"])


def reduced(slopes: np.ndarray, tokens: TokenReduction, mask: np.ndarray) -> np.ndarray:
    """One number per example and unit, from the gradients of one gate per token."""
    slopes = np.where(mask[..., None], slopes, 0.0)
    if tokens is max_tokens:
        return np.where(mask[..., None], slopes, -np.inf).max(1)
    each: dict[Any, np.ndarray] = {
        sum_tokens: slopes,
        absolute_tokens: np.abs(slopes),
        squared_tokens: slopes**2,
    }
    return each[tokens].sum(1)


@pytest.mark.parametrize("closed_at_means", [False, True])
@pytest.mark.parametrize("value", [1.0, 0.6])
def test_token_reductions_equal_one_gate_per_token(value: float, closed_at_means: bool):
    heads = (TaskHead(name="task", labels=("a", "b", "c"), pooling="mean"),)  # so that every token has a gradient
    model, params = tiny_model(layers=1, heads=heads)
    batch, toward = tiny_batch(model, ROWS, LENGTH), cotangent()
    mask = batch["attention_mask"] > 0
    means = means_for(model, params) if closed_at_means else {}
    zeros = {"0.attention.heads": jnp.zeros((4, 4)), "0.ffn.neurons": jnp.zeros(32)}
    output = model.apply(params, batch, returns=("hidden", "sites"))
    assert output.hidden is not None and output.sites is not None
    x, attended = output.hidden[0], output.sites["0.attention.heads"]
    sizes = widths(model.axes, params)
    each = {name: jnp.full((ROWS, LENGTH, units), value) for name, units in sizes.items()}

    def total(gates: Gates) -> jax.Array:
        hidden = explicit(params["layers"][0], x, attended, gates, means or zeros)
        return (
            model.readout(params["heads"]["task"], State(hidden), Mask(jnp.asarray(mask)), model.head()) * toward
        ).sum()

    expected_total, slopes = jax.jit(jax.value_and_grad(total))(each)
    per_row = {name: gate[:, 0] for name, gate in each.items()}
    per_batch = {name: gate[0, 0] for name, gate in each.items()}
    for tokens in (sum_tokens, absolute_tokens, squared_tokens, max_tokens):
        expected = {name: reduced(np.asarray(slope), tokens, mask) for name, slope in slopes.items()}
        logits, pull = forward(model, params, batch, Intervention(per_row, means), gradients=Gradients(tokens=tokens))
        np.testing.assert_allclose((logits * toward).sum(), expected_total, rtol=1e-4)
        assert_same(pull(toward)[0], expected)
    assert_same(
        forward(model, params, batch, Intervention(per_batch, means), gradients=Gradients(tokens=max_tokens))[1](
            toward
        )[0],
        {name: slope.sum(0) for name, slope in expected.items()},
    )


def test_token_reductions_leave_the_other_gradients_alone():
    model, params = tiny_model()
    batch, toward = tiny_batch(model, ROWS, LENGTH), cotangent()
    gates = random_gates(model, params, fractional=True)
    expected = forward(model, params, batch, Intervention(gates), gradients=Gradients(weights=True))[1](toward)[1]
    found = forward(
        model,
        params,
        batch,
        Intervention(gates),
        gradients=Gradients(weights=True, tokens=absolute_tokens),
    )[1](toward)[1]
    assert_same(found, expected)


# What is refused


def test_what_does_not_fit_is_refused():
    model, params = tiny_model()
    batch = tiny_batch(model, ROWS, LENGTH)
    gates = open_gates(model, params)
    states = model.apply(params, batch, returns=("hidden",)).hidden
    assert states is not None
    later = Prefix(State(states[1]), 1)
    with pytest.raises(ValueError, match="cannot start at layer 1: gates of layer 0 come before it"):
        forward(model, params, batch, Intervention(gates), prefix=later)
    with pytest.raises(ValueError, match="cannot start at layer 1: the weights come before it"):
        forward(model, params, batch, gradients=Gradients(weights=True), prefix=later)
    with pytest.raises(ValueError, match=r"5\.ffn\.neurons is not a site"):
        forward(model, params, batch, Intervention({"5.ffn.neurons": jnp.ones(32)}))
    with pytest.raises(ValueError, match=r"0\.ffn\.neurons has gates for 2 examples, the batch has 3"):
        forward(model, params, batch, Intervention({"0.ffn.neurons": jnp.ones((2, 32))}))
    with pytest.raises(ValueError, match=r"means do not fit the parameters: 0.ffn.neurons has shape \(3,\)"):
        forward(model, params, batch, Intervention(gates, {"0.ffn.neurons": jnp.ones(3)}))
    with pytest.raises(ValueError, match="no task head 'other'; it has: task"):
        forward(model, params, batch, Intervention(gates), head="other")
    with pytest.raises(ValueError, match=r"the parameters have no 'heads\.task'"):
        forward(model, params | {"heads": {}}, batch, Intervention(gates))
    with pytest.raises(ValueError, match="the parameters have the layers"):
        forward(model, params | {"layers": {0: params["layers"][0]}}, batch)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_known_values_change_nothing(model_type: str):
    model, params = tiny_model(model_type)
    batch = tiny_batch(model, ROWS, LENGTH)
    gates = random_gates(model, params, fractional=True)
    logits, pull = forward(model, params, batch, Intervention(gates))
    inputs = model_inputs(model, params, batch)
    layer = model_layers(model, params)[0]
    state = enter(model, layer, inputs, None)
    settings = BlockSettings(kind=layer.kind, returns=("attention.heads",))
    known = values_compiled(model, settings, layer.params, state, mask_of(layer, inputs))
    found, other = forward(model, params, batch, Intervention(gates), prefix=Prefix(state, 0, known))
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    toward = jnp.asarray(np.random.default_rng(0).standard_normal(logits.shape), jnp.float32)
    assert_same(other(toward)[0], pull(toward)[0])
    wrong = {name: value + 1.0 for name, value in known.items()}  # and they are what is used
    changed = forward(model, params, batch, Intervention(gates), prefix=Prefix(state, 0, wrong))[0]
    assert np.abs(changed - logits).max() > 0.01

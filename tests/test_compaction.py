"""Compaction keeps the function, whatever is removed, folded or replaced."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import NUMERIC_TYPES, random_gates, tiny_batch, tiny_model

from jaxprune.compaction import SHAPES, compact, compacted_shapes, fewer_shapes
from jaxprune.models import Model
from jaxprune.units import Gates, flatten, open_gates, sites, subtree, unflatten, widths

TOLERANCE = 2e-5  # of the logits' scale: float32, the sums run in another order


def assert_same_logits(found, expected, tolerance=TOLERANCE):
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(float(np.abs(expected).max()), 1.0))


def logits(model: Model, params, batch, gates: Gates | None = None, means: Gates | None = None) -> np.ndarray:
    return np.asarray(model.apply(params, batch, gates, means=means).logits)


def random_means(model: Model, params, seed: int) -> Gates:
    """Like calibration means: `[neurons]`, `[heads, head_dim]`."""
    random = np.random.default_rng(seed)
    shapes = {
        name: subtree(params, ("layers", int(name[0]), "attention", "out", "kernel")).shape[:2]
        if name.endswith("heads")
        else (units,)
        for name, units in widths(model.axes, params).items()
    }
    return {name: jnp.asarray(random.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def closed(model: Model, params, *names: str) -> Gates:
    """All gates open but those of some sites."""
    return {name: gate * float(name not in names) for name, gate in open_gates(model, params).items()}


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_compaction_keeps_the_function(model_type, seed, fractional):
    model, params = tiny_model(model_type, seed=seed)
    batch, gates = tiny_batch(model, seed=seed), random_gates(model, params, seed, fractional)
    small = compact(model, params, gates)
    assert widths(model.axes, small) == {name: int((np.asarray(gate) != 0).sum()) for name, gate in gates.items()}
    expected = logits(model, params, batch, gates)
    assert float(np.abs(expected - logits(model, params, batch)).max()) > 0.1  # the gates do matter
    assert_same_logits(logits(model, small, batch), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_means_are_folded_into_the_bias(model_type, seed):
    model, params = tiny_model(model_type, seed=seed)
    batch, gates = tiny_batch(model, seed=seed), random_gates(model, params, seed, fractional=True)
    means = random_means(model, params, seed)
    expected = logits(model, params, batch, gates, means=means)
    assert float(np.abs(expected - logits(model, params, batch, gates)).max()) > 0.1
    assert_same_logits(logits(model, compact(model, params, gates, means), batch), expected)


@pytest.mark.parametrize("with_means", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ("0.attention.heads",),
        ("1.ffn.neurons",),
        ("0.attention.heads", "0.ffn.neurons"),
        ("0.attention.heads", "0.ffn.neurons", "1.attention.heads", "1.ffn.neurons"),
    ],
)
def test_compaction_to_zero_width_keeps_the_function(names, with_means):
    model, params = tiny_model("bert")
    batch, gates = tiny_batch(model), closed(model, params, *names)
    means = random_means(model, params, 0) if with_means else None
    small = compact(model, params, gates, means)
    assert {name for name, units in widths(model.axes, small).items() if units == 0} == set(names)
    assert_same_logits(logits(model, small, batch), logits(model, params, batch, gates, means=means))


@pytest.mark.parametrize("model_type", NUMERIC_TYPES[1:])
def test_compaction_to_nothing_keeps_the_function(model_type):
    model, params = tiny_model(model_type)
    batch, gates = tiny_batch(model), closed(model, params, *widths(model.axes, params))
    assert_same_logits(logits(model, compact(model, params, gates), batch), logits(model, params, batch, gates))


@pytest.mark.parametrize("seed", range(2))
def test_a_compacted_model_can_be_compacted_again(seed):
    model, params = tiny_model("bert", seed=seed)
    batch = tiny_batch(model, seed=seed)
    once = compact(model, params, random_gates(model, params, seed))
    gates = random_gates(model, once, seed + 10, fractional=True)
    means = random_means(model, once, seed)
    twice = compact(model, once, gates, means)
    assert_same_logits(logits(model, twice, batch), logits(model, once, batch, gates, means=means))


@pytest.mark.parametrize("kind", ["units", "channels"])
@pytest.mark.parametrize("model_type", (*NUMERIC_TYPES, "t5"))
def test_shapes_are_known_before_anything_is_cut(model_type, kind):
    model, params = tiny_model(model_type)
    kinds = ("heads", "neurons") if kind == "units" else ("channels", "query_channels", "neurons")
    gates = random_gates(model, params, kinds=kinds)
    empty = next(name for name in gates if name.endswith("0.ffn.neurons"))
    gates[empty] = 0.0 * gates[empty]
    shapes = compacted_shapes(model, jax.eval_shape(lambda: params), gates)
    small = compact(model, params, gates)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), small
    )
    with pytest.raises(ValueError, match="gates do not fit"):
        compacted_shapes(model, params, {"3.ffn.nothing": np.ones(4)})


def test_two_compactions_equal_one():
    model, params = tiny_model("bert")
    first = random_gates(model, params, 0)
    small = compact(model, params, first)
    second = random_gates(model, small, 1)
    both = {}
    for name, gate in first.items():
        both[name] = np.zeros(len(gate), np.float32)
        both[name][np.flatnonzero(np.asarray(gate))] = np.asarray(second[name])
    expected = flatten(compact(model, params, both))
    found = flatten(compact(model, small, second))
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path])


def test_compaction_keeps_16_bit_types():
    model, params = tiny_model("bert")
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    batch, gates, means = tiny_batch(model), random_gates(model, params, 0, True), random_means(model, params, 0)
    small = compact(model, half, gates, means)
    assert {array.dtype for array in jax.tree.leaves(small)} == {jnp.dtype(jnp.bfloat16)}
    expected = logits(model, half, batch, gates, means=means)
    # The gated kernel and the bias are rounded to 8 bits of mantissa, in each of two layers.
    assert_same_logits(logits(model, small, batch), expected, tolerance=0.05)


def test_the_model_stays_the_same_static_argument():
    model, params = tiny_model("bert")
    batch = {name: jnp.asarray(value) for name, value in tiny_batch(model).items()}
    before, number = hash(model), 0

    @partial(jax.jit, static_argnums=0)
    def run(model, params, batch):
        nonlocal number
        number += 1
        return model.apply(params, batch).logits

    small = compact(model, params, random_gates(model, params))
    again = compact(model, params, random_gates(model, params))
    assert (hash(model), type(small)) == (before, dict)
    assert flatten(small).keys() == flatten(params).keys()
    for tree in (params, small, again):
        run(model, tree, batch)
    assert number == 2  # two shapes


@pytest.mark.parametrize("model_type", ["bert", "t5", "llama"])
def test_units_of_zero_make_fewer_shapes_and_keep_the_function(model_type):
    model, params = tiny_model(model_type, layers=1, neurons=61)
    gates, batch = random_gates(model, params, 3), tiny_batch(model, 4, 7, 0)
    small = compact(model, params, gates)
    wide = fewer_shapes(model, params, small)
    np.testing.assert_allclose(
        jnp.asarray(model.apply(wide, batch).logits), jnp.asarray(model.apply(small, batch).logits), atol=2e-5
    )
    (site, *_) = sites(model.axes, params, ("neurons",))
    found = set()
    for width in range(62):
        gate = {site.name: (np.arange(61) < width).astype(np.float32)}
        left = widths(model.axes, fewer_shapes(model, params, compact(model, params, gate)))[site.name]
        assert width <= left <= 61
        found.add(left)
    assert len(found) == SHAPES + 1 and 0 in found


def test_unchanged_arrays_are_shared_and_the_parameters_stay():
    model, params = tiny_model("bert")
    copies = {path: np.array(array) for path, array in flatten(params).items()}
    small = flatten(compact(model, params, {"1.ffn.neurons": random_gates(model, params)["1.ffn.neurons"]}))
    changed = {
        ("layers", 1, "ffn", "up", "kernel"),
        ("layers", 1, "ffn", "up", "bias"),
        ("layers", 1, "ffn", "down", "kernel"),
    }
    assert {path for path, array in flatten(params).items() if small[path] is not array} == changed
    assert all(isinstance(array, jax.Array) for array in small.values())
    for path, array in flatten(params).items():
        np.testing.assert_array_equal(array, copies[path])


def test_open_gates_change_nothing():
    model, params = tiny_model("bert")
    small = flatten(compact(model, params, open_gates(model, params), random_means(model, params, 0)))
    assert all(small[path] is array for path, array in flatten(params).items())


def test_host_arrays_become_device_arrays():
    model, params = tiny_model("bert")
    host = jax.tree.map(np.asarray, params)
    small = compact(model, host, random_gates(model, params))
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(small))


def test_folding_by_hand():
    model, params = tiny_model("bert", layers=1, embed=2, attention_heads=1, neurons=3)
    flat = flatten(params)
    down, bias = ("layers", 0, "ffn", "down", "kernel"), ("layers", 0, "ffn", "down", "bias")
    flat[down] = jnp.asarray([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    flat[bias] = jnp.asarray([0.5, 0.25])
    gates = {"0.ffn.neurons": jnp.asarray([0.0, 1.0, 0.75])}
    means = {"0.ffn.neurons": jnp.asarray([3.0, 7.0, 2.0])}
    small = flatten(compact(model, unflatten(flat), gates, means))
    np.testing.assert_array_equal(small[down], [[10.0, 20.0], [75.0, 150.0]])
    # 1 * 3 * (1, 2) for the closed neuron, nothing for the open one, 0.25 * 2 * (100, 200) for the third
    np.testing.assert_array_equal(small[bias], [0.5 + 3.0 + 50.0, 0.25 + 6.0 + 100.0])


def test_means_need_a_bias():
    model, params = tiny_model("bert")
    flat = flatten(params)
    del flat["layers", 0, "ffn", "down", "bias"]
    gates = {"0.ffn.neurons": np.zeros(32)}
    with pytest.raises(ValueError, match=r"means of 0.ffn.neurons have nowhere to go: .*ffn.down.kernel has no bias"):
        compact(model, unflatten(flat), gates, {"0.ffn.neurons": np.ones(32)})


@pytest.mark.parametrize(
    ("gates", "means", "message"),
    [
        ({"0.ffn.neuron": np.ones(32)}, None, "0.ffn.neuron is not a site"),
        ({"0.ffn.neurons": np.ones(31)}, None, "31 gates for 32 units"),
        ({"0.ffn.neurons": np.ones((3, 32))}, None, "one row per example"),
        ({"0.ffn.neurons": np.full(32, np.nan)}, None, "NaN or infinity"),
        ({"0.ffn.neurons": np.full(32, np.inf)}, None, "NaN or infinity"),
        ({}, {"9.ffn.neurons": np.ones(32)}, "means of 9.ffn.neurons: there is no such site"),
        ({"0.ffn.neurons": np.zeros(32)}, {"0.ffn.neurons": np.ones(31)}, r"shape \(32,\), and have shape \(31,\)"),
        ({"0.ffn.neurons": np.zeros(32)}, {"0.ffn.neurons": np.full(32, np.nan)}, "must be finite"),
        (
            {"0.attention.heads": np.zeros(4)},
            {"0.attention.heads": np.ones(4)},
            r"shape \(4, 4\), and have shape \(4,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(gates, means, message):
    model, params = tiny_model("bert")
    with pytest.raises(ValueError, match=message):
        compact(model, params, gates, means)

"""Gates: what they multiply, what they may be, and how the axis table tells where they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import NUMERIC_TYPES, random_gates, tiny_batch, tiny_model

from jaxprune.compaction import compact
from jaxprune.models import Mask, Model, State
from jaxprune.models.layers import absolute_tokens, gate, sum_tokens
from jaxprune.units import (
    UNITS,
    Gates,
    Intervention,
    Params,
    axes_of,
    check_gates,
    check_means,
    flatten,
    open_gates,
    path_name,
    reads,
    sites,
    subtree,
    unflatten,
    widths,
    without,
)

LOCAL = ("attention.heads", "ffn.neurons")


def logits(model: Model, params: Params, batch: Any, gates: Gates | None = None, **settings: Any) -> np.ndarray:
    return np.asarray(model.apply(params, batch, gates, **settings).logits)


def gated_values(model: Model, params: Params, batch: Any, gates: Gates | None = None, **settings: Any) -> Any:
    found = model.apply(params, batch, gates, returns=("sites",), **settings).sites
    assert found is not None
    return found


# What gates do


@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_gates_of_ones_change_nothing(model_type: str):
    model, params = tiny_model(model_type)
    batch = tiny_batch(model)
    expected = logits(model, params, batch)
    np.testing.assert_allclose(logits(model, params, batch, open_gates(model, params)), expected, rtol=1e-6, atol=1e-6)
    assert np.abs(logits(model, params, batch, random_gates(model, params)) - expected).max() > 0.1


def test_no_gates_multiply_nothing():
    model, params = tiny_model()
    hidden, mask = State(jnp.zeros((2, 5, 16))), Mask(jnp.ones((2, 5), bool))
    own = {name: jnp.ones(units) for name, units in zip(LOCAL, (4, 32), strict=True)}

    def multiplications(gates: Gates | None) -> int:
        program = jax.make_jaxpr(lambda g: model.block(params["layers"][0], hidden, mask, Intervention(g)))(gates)
        return str(program).count(" mul ")

    assert multiplications(None) == multiplications({}) == multiplications(own) - 2


def test_missing_sites_are_open():
    model, params = tiny_model()
    batch = tiny_batch(model)
    some = {"1.ffn.neurons": random_gates(model, params)["1.ffn.neurons"]}
    expected = logits(model, params, batch, open_gates(model, params) | some)
    np.testing.assert_allclose(logits(model, params, batch, some), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(logits(model, params, batch, {}), logits(model, params, batch))


def test_gates_per_example_equal_one_example_at_a_time():
    model, params = tiny_model()
    batch = tiny_batch(model)
    each = [random_gates(model, params, seed, fractional=True) for seed in range(3)]
    together = logits(model, params, batch, {name: jnp.stack([g[name] for g in each]) for name in each[0]})
    for row, gates in enumerate(each):
        one = {name: array[row : row + 1] for name, array in batch.items()}
        np.testing.assert_allclose(together[row], logits(model, params, one, gates)[0], rtol=1e-5, atol=1e-5)


def test_a_gate_multiplies_each_head_and_each_neuron():
    model, params = tiny_model(layers=1)
    batch = tiny_batch(model)
    gates = random_gates(model, params, fractional=True)
    heads = {"0.attention.heads": gates["0.attention.heads"]}
    neurons = {"0.ffn.neurons": gates["0.ffn.neurons"]}
    values = gated_values(model, params, batch)
    found = gated_values(model, params, batch, heads)["0.attention.heads"]
    expected = values["0.attention.heads"] * heads["0.attention.heads"][:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    found = gated_values(model, params, batch, neurons)["0.ffn.neurons"]
    np.testing.assert_allclose(found, values["0.ffn.neurons"] * neurons["0.ffn.neurons"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_a_closed_gate_equals_a_kernel_without_the_unit(model_type: str):
    model, params = tiny_model(model_type)
    batch = tiny_batch(model)
    gates = random_gates(model, params)
    flat = flatten(params)
    for i in range(2):
        heads, neurons = gates[f"{i}.attention.heads"], gates[f"{i}.ffn.neurons"]
        flat["layers", i, "attention", "out", "kernel"] *= heads[:, None, None]
        flat["layers", i, "ffn", "down", "kernel"] *= neurons[:, None]
    expected = logits(model, unflatten(flat), batch)
    np.testing.assert_allclose(logits(model, params, batch, gates), expected, rtol=1e-5, atol=1e-5)


def test_a_closed_gate_leads_to_the_mean():
    model, params = tiny_model(layers=1)
    batch = tiny_batch(model)
    values = gated_values(model, params, batch)
    means = {"0.attention.heads": jnp.arange(16.0).reshape(4, 4), "0.ffn.neurons": jnp.arange(32.0)}
    half = {name: jnp.zeros(units).at[0].set(0.25) for name, units in widths(model.axes, params).items()}
    for name, mean in means.items():
        own = half[name].reshape(-1, *[1] * (mean.ndim - 1))
        found = gated_values(model, params, batch, {name: half[name]}, means=means)[name]
        np.testing.assert_allclose(found, own * values[name] + (1 - own) * mean, rtol=1e-6, atol=1e-5)
    # Where a gate is open, or missing, the mean does not matter.
    open_ = logits(model, params, batch, open_gates(model, params), means=means)
    np.testing.assert_allclose(open_, logits(model, params, batch), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(logits(model, params, batch, means=means), logits(model, params, batch))


@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_closed_sites_equal_zero_width_modules(model_type: str):
    model, params = tiny_model(model_type)
    batch = tiny_batch(model)
    closed = {name: jnp.zeros(units) for name, units in widths(model.axes, params).items()}
    small = compact(model, params, closed)
    assert set(widths(model.axes, small).values()) == {0}
    emptied = without(model.axes, params, sites(model.axes, params))
    jax.tree.map(np.testing.assert_array_equal, small, emptied)
    np.testing.assert_allclose(logits(model, small, batch), logits(model, params, batch, closed), rtol=1e-5, atol=1e-5)
    found = model.apply(small, batch, open_gates(model, small), returns=("sites", "scores"))
    assert found.sites is not None and found.scores is not None
    assert [array.shape for array in found.sites.values()] == [(3, 9, 0, 4), (3, 9, 0)] * 2
    assert [array.shape for array in found.scores] == [(3, 0, 9, 9)] * 2


@pytest.mark.parametrize("tokens", [sum_tokens, absolute_tokens])
def test_gates_stay_float32_in_half_precision(tokens: Any):
    values = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 50)), jnp.bfloat16)
    mask = jnp.ones((2, 3), bool)
    gates = jnp.full(50, 0.7041, jnp.float32)  # bfloat16 has 0.703125 and 0.70703125
    found = gate(values, gates, None, mask, tokens)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, (values.astype(jnp.float32) * gates).astype(jnp.bfloat16))
    assert (found != values * gates.astype(jnp.bfloat16)).mean() > 0.2
    slope = jax.grad(lambda g: gate(values, g, None, mask, tokens).astype(jnp.float32).sum())(gates)
    assert slope.dtype == jnp.float32
    assert (slope != slope.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.5


def test_a_difference_that_bfloat16_has_not_moves_a_half_precision_model():
    model, params = tiny_model(layers=1)
    params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    batch = tiny_batch(model)
    one, other = ({"0.ffn.neurons": jnp.full(32, value)} for value in (0.7041, 0.703125))
    assert one["0.ffn.neurons"].astype(jnp.bfloat16)[0] == 0.703125
    one, other = (gated_values(model, params, batch, gates)["0.ffn.neurons"] for gates in (one, other))
    assert one.dtype == other.dtype == jnp.bfloat16
    assert (one != other).mean() > 0.2


# What is refused


@pytest.mark.parametrize(
    ("gates", "error", "message"),
    [
        ({"2.ffn.neurons": jnp.ones(32)}, ValueError, r"2\.ffn\.neurons is not a site.*Sites: 0\.attention\.heads"),
        ({"0.ffn.heads": jnp.ones(32)}, ValueError, "0.ffn.heads is not a site"),
        ({"0.ffn.neurons": jnp.ones(31)}, ValueError, "0.ffn.neurons has 31 gates for 32 units"),
        ({"0.ffn.neurons": jnp.ones(())}, ValueError, "0.ffn.neurons has 0 axes, expected"),
        ({"0.ffn.neurons": jnp.ones((3, 9, 32))}, ValueError, "0.ffn.neurons has 3 axes, expected"),
        ({"0.ffn.neurons": jnp.ones((2, 32))}, ValueError, "0.ffn.neurons has gates for 2 examples, the batch has 3"),
        ({"0.attention.heads": [1.0] * 4}, TypeError, "0.attention.heads is a list: use jnp.asarray"),
        ([jnp.ones(4)], TypeError, "gates must be a dict from site name to array, got list"),
    ],
)
def test_gates_that_do_not_fit_are_refused(gates: Any, error: type[Exception], message: str):
    model, params = tiny_model()
    with pytest.raises(error, match=message):
        model.apply(params, tiny_batch(model), gates)


def test_everything_wrong_is_in_one_error():
    model, params = tiny_model()
    with pytest.raises(ValueError, match=r"heads has 5 gates for 4 units; 7\.ffn\.neurons is not a site"):
        check_gates(model, params, {"0.attention.heads": jnp.ones(5), "7.ffn.neurons": jnp.ones(32)})


@pytest.mark.parametrize(
    ("means", "error", "message"),
    [
        ({"0.ffn.neuron": jnp.ones(32)}, ValueError, "means do not fit the parameters: 0.ffn.neuron is not a site"),
        ({"0.ffn.neurons": jnp.ones(31)}, ValueError, r"0.ffn.neurons has shape \(31,\), expected \(32,\)"),
        ({"0.attention.heads": jnp.ones(4)}, ValueError, r"0.attention.heads has shape \(4,\), expected \(4, 4\)"),
        ({"0.ffn.neurons": 0.0}, TypeError, "0.ffn.neurons is a float"),
        ([], TypeError, "means must be a dict"),
    ],
)
def test_means_that_do_not_fit_are_refused(means: Any, error: type[Exception], message: str):
    model, params = tiny_model()
    with pytest.raises(error, match=message):
        model.apply(params, tiny_batch(model), open_gates(model, params), means=means)
    with pytest.raises(error, match=message):
        check_means(model, params, means)


# Where gates are


def test_sites_are_in_the_order_of_layers_and_of_the_axis_table():
    model, params = tiny_model(layers=12)
    names = [site.name for site in sites(model.axes, params)]
    assert names == [f"{layer}.{local}" for layer in range(12) for local in LOCAL]  # 10 comes after 9
    assert list(open_gates(model, params)) == list(widths(model.axes, params)) == names
    site = sites(model.axes, params)[-1]
    assert site == ("11.ffn.neurons", "neurons", ("layers", 11, "ffn"), 11, "")


def test_widths_are_those_of_the_arrays():
    model, params = tiny_model()
    gates = {"0.attention.heads": jnp.array([0.0, 1, 1, 0]), "1.ffn.neurons": jnp.ones(32).at[:5].set(0)}
    small = compact(model, params, gates)
    assert list(widths(model.axes, small).values()) == [2, 32, 4, 27]
    assert {name: gate.shape for name, gate in open_gates(model, small).items()} == {
        name: (units,) for name, units in widths(model.axes, small).items()
    }


def test_encoder_layers_come_before_decoder_layers():
    table = {
        "*.*.self.out.kernel": ("heads", "head_dim", "embed"),
        "*.*.cross.out.kernel": ("heads", "head_dim", "embed"),
        "*.*.ffn.gate.kernel": ("embed", "neurons"),
        "*.*.ffn.up.kernel": ("embed", "neurons"),
        "*.*.ffn.down.kernel": ("neurons", "embed"),
    }
    heads, up, down = np.zeros((2, 3, 4)), np.zeros((4, 5)), np.zeros((5, 4))
    ffn = {"gate": {"kernel": up}, "up": {"kernel": up}, "down": {"kernel": down}}
    block = {"self": {"out": {"kernel": heads}}, "ffn": ffn}
    params = {"decoder": {0: block | {"cross": {"out": {"kernel": heads}}}}, "encoder": {0: block, 1: block}}
    assert widths(table, params) == {
        "encoder.0.self.heads": 2,
        "encoder.0.ffn.neurons": 5,
        "encoder.1.self.heads": 2,
        "encoder.1.ffn.neurons": 5,
        "decoder.0.self.heads": 2,
        "decoder.0.cross.heads": 2,
        "decoder.0.ffn.neurons": 5,
    }


@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_the_axis_table_names_every_axis(model_type: str):
    model, params = tiny_model(model_type)
    sizes: dict[str, set[int]] = {}
    readers: Counter[str] = Counter()
    for path, array in flatten(params).items():
        axes = axes_of(model.axes, path)
        assert len(axes) == array.ndim, path_name(path)
        readers.update([axes[0]] if reads(axes) else [])
        for axis, size in zip(axes, array.shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
    assert {axis for axis, found in sizes.items() if len(found) > 1} == set()  # one name, one size
    assert set(UNITS) - {"groups"} <= set(sizes)
    assert readers == {"heads": 2, "neurons": 2}


def test_what_has_no_named_axes_is_refused():
    model, _ = tiny_model()
    with pytest.raises(ValueError, match=r"no axis names for parameter 'layers\.0\.ffn\.gate\.kernel'"):
        axes_of(model.axes, ("layers", 0, "ffn", "gate", "kernel"))


@pytest.mark.parametrize("name", ["{}", "layers_{}"])
def test_layers_are_numbers_or_names_that_end_in_one(name: str):
    model, params = tiny_model()
    named = params | {"layers": {name.format(i): params["layers"][0] for i in (10, 2)}}
    found = sites(model.axes, named)
    assert [(site.layer, site.stack) for site in found] == [(2, ""), (2, ""), (10, ""), (10, "")]
    assert found[0].name == f"{name.format(2)}.attention.heads"


# Nested dicts


def test_flattening_and_back():
    nested = {"b": {10: {"x": 1}, 9: {"x": 2}}, "a": {"y": 3}}
    flat = flatten(nested)
    assert list(flat.items()) == [(("a", "y"), 3), (("b", 9, "x"), 2), (("b", 10, "x"), 1)]
    assert unflatten(flat) == nested
    assert path_name(("b", 10, "x")) == "b.10.x"


def test_a_part_that_is_not_there_is_an_error_that_says_what_is():
    nested = {"b": {9: {"x": 2}}}
    assert subtree(nested, ("b", 9)) == {"x": 2}
    assert subtree(nested, ()) is nested
    with pytest.raises(ValueError, match=r"no 'b\.8'; there they have: 9"):
        subtree(nested, ("b", 8, "x"))
    with pytest.raises(ValueError, match=r"no 'b\.9\.x\.y'; there they have: nothing"):
        subtree(nested, ("b", 9, "x", "y"))

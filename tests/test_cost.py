"""Costs: hand numbers, the program's own matrix products, additivity."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import NUMERIC_TYPES, random_gates, tiny_config, tiny_model

from jaxprune.compaction import compact
from jaxprune.models import Mask, Model, State, family
from jaxprune.models.cost import (
    elements,
    file_size,
    flops,
    matmul_flops,
    parameters,
    prunable_parameters,
    unit_costs,
)
from jaxprune.units import Params, widths


def shapes_of(**sizes: int) -> tuple[Model, Params]:
    """A BERT without task heads and the shapes of its parameters, without computing any."""
    module = family("bert")
    model = Model(module.parse_config(tiny_config("bert", **sizes), ()))
    return model, jax.eval_shape(model.initialise, jax.random.key(0))


BERT_BASE = {"layers": 12, "embed": 768, "attention_heads": 12, "neurons": 3072, "vocab": 30522}
MINILM_L6 = {"layers": 6, "embed": 384, "attention_heads": 12, "neurons": 1536, "vocab": 30522}


def test_bert_base_by_hand():
    model, params = shapes_of(**BERT_BASE)
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert weights == 84_934_656
    assert prunable_parameters(model, params) == weights + 12 * (3 * 768 + 3072)  # with the biases of q, k, v and up
    products = 2 * 128 * weights + 12 * 2 * (2 * 128 * 128 * 768)  # 2 per multiply-add; q.k and probabilities.v
    assert flops(model, params, 128) == products == 22_347_251_712
    outputs_and_norms = 12 * (2 * 768 + 4 * 768)
    embeddings = (30522 + 64 + 2) * 768 + 2 * 768
    assert parameters(params) == weights + 12 * (3 * 768 + 3072) + outputs_and_norms + embeddings


@pytest.mark.parametrize(
    ("sizes", "length", "neurons"),
    [(MINILM_L6, 24, 66), (MINILM_L6, 384, 96), (BERT_BASE, 48, 132), (BERT_BASE, 384, 160)],
)
def test_one_head_costs_many_neurons(sizes, length, neurons):
    model, params = shapes_of(**sizes)
    costs = unit_costs(model, params, matmul_flops(model, length))
    # (8 d h L + 4 h L^2) / (4 d L) = 2 h + h L / d
    assert costs["0.attention.heads"] / costs["0.ffn.neurons"] == pytest.approx(neurons, rel=1e-12)


def test_unit_costs_by_hand():
    model, params = tiny_model("bert", embed=8, attention_heads=2, neurons=6)
    count = unit_costs(model, params, elements)
    assert count["0.attention.heads"] == 3 * (8 * 4 + 4) + 4 * 8  # q, k, v with biases; out
    assert count["1.ffn.neurons"] == 8 + 1 + 8  # up, its bias; down
    cost = unit_costs(model, params, matmul_flops(model, 10.5))  # a mean length
    assert cost["0.attention.heads"] == 2 * 10.5 * 4 * (8 * 4) + 2 * 2 * 4 * 10.5**2
    assert cost["1.ffn.neurons"] == 2 * 10.5 * 2 * 8


def dot_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products in a program, 2 per multiply-add."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += dot_flops(inner)
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_flops_are_those_of_the_program(model_type, seed):
    model, params = tiny_model(model_type, layers=3, seed=seed)
    small = compact(model, params, random_gates(model, params, seed) | {"1.attention.heads": np.zeros(4)})
    length = 7 + seed
    hidden, mask = State(jnp.ones((1, length, 16))), Mask(jnp.ones((1, length), bool))
    for tree in (params, small):
        found = sum(
            dot_flops(jax.make_jaxpr(lambda p: model.block(p, hidden, mask)[0].hidden)(own).jaxpr)
            for own in tree["layers"].values()
        )
        assert flops(model, tree, length) == found


def test_flops_are_close_to_the_compiled_ones():
    model, params = shapes_of(**(BERT_BASE | {"layers": 1}))
    hidden, mask = State(jnp.ones((1, 128, 768))), Mask(jnp.ones((1, 128), bool))
    compiled = jax.jit(lambda p: model.block(p, hidden, mask)[0].hidden).lower(params["layers"][0]).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    # The compiler also counts softmax, norms, biases and the activation: 1.6 % here.
    assert analysis["flops"] == pytest.approx(flops(model, params, 128), rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_additive(seed):
    model, params = tiny_model("bert", seed=seed)
    gates = random_gates(model, params, seed)
    small = compact(model, params, gates)
    removed = {name: int((np.asarray(gate) == 0).sum()) for name, gate in gates.items()}
    for tree in (small, compact(model, params, {name: np.zeros(len(gate)) for name, gate in gates.items()})):
        assert unit_costs(model, tree, elements) == unit_costs(model, params, elements)
        assert unit_costs(model, tree, matmul_flops(model, 9)) == unit_costs(model, params, matmul_flops(model, 9))
    cost = unit_costs(model, params, matmul_flops(model, 9))
    assert flops(model, params, 9) - flops(model, small, 9) == sum(removed[name] * cost[name] for name in removed)
    count = unit_costs(model, params, elements)
    assert parameters(params) - parameters(small) == sum(removed[name] * count[name] for name in removed)
    assert prunable_parameters(model, params) - prunable_parameters(model, small) == parameters(params) - parameters(
        small
    )


def test_a_model_without_units_costs_nothing():
    model, params = tiny_model("bert")
    empty = compact(model, params, {name: np.zeros(units) for name, units in widths(model.axes, params).items()})
    assert flops(model, empty, 128) == prunable_parameters(model, empty) == 0
    assert parameters(empty) == parameters(params) - prunable_parameters(model, params)


@pytest.mark.parametrize("length", [0, -1, float("nan"), float("inf")])
def test_length_must_be_positive(length):
    model, params = tiny_model("bert")
    with pytest.raises(ValueError, match="length must be a positive number of tokens"):
        flops(model, params, length)


def test_file_size(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(10))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(7))
    (tmp_path / "config.json").write_bytes(bytes(100))
    assert file_size(tmp_path) == 17
    assert file_size(tmp_path / "config.json") == 100
    with pytest.raises(FileNotFoundError, match="nowhere"):
        file_size(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \*.safetensors"):
        file_size(tmp_path / "empty")

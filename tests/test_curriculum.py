"""What a student learns from what: settings, layer maps, heads and widths."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_gates, tiny_model

import jaxprune as jp
from jaxprune.training.distillation import surviving_heads
from jaxprune.training.joint_loss import (
    Distillation,
    head_index,
    initialise_projection,
    last,
    match_layers,
    one_to_one,
    uniform,
    without_projection,
)


def test_the_defaults_are_those_of_sparse_bert():
    assert Distillation() == Distillation.sparse_bert()
    assert Distillation().weights == {"attention": 1.0, "embeddings": 1.0, "hidden": 1.0, "logits": 1.0}
    regression = Distillation.sparse_bert(regression=True).weights
    assert regression == {"attention": 1.0, "embeddings": 1.0, "hidden": 1.0, "labels": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": -1.0}, "weights must be at least 0"),
        ({"labels": float("nan")}, "weights must be at least 0"),
        ({"attention": 0.0, "embeddings": 0.0, "hidden": 0.0, "logits": 0.0}, "one of them positive"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


def test_layer_maps():
    assert one_to_one(3, 3) == uniform(3, 3) == last(3, 3) == (0, 1, 2)
    assert uniform(3, 12) == (3, 7, 11) and uniform(4, 6) == (0, 2, 3, 5)
    assert last(2, 6) == (4, 5)
    with pytest.raises(ValueError, match="student has 2 layers, the teacher 3: choose a layer map"):
        one_to_one(2, 3)
    for layers in (uniform, last):
        with pytest.raises(ValueError, match="student has 4 layers, the teacher only 3"):
            layers(4, 3)


def test_layers_are_matched_stack_by_stack():
    model, teacher = tiny_model("t5", layers=1)[0], tiny_model("t5", layers=3)[0]
    assert match_layers(last, model, teacher) == {
        "encoder.0": "encoder.2",
        "decoder.0": "decoder.2",
        "decoder.1": "decoder.3",
    }
    encoder = tiny_model(layers=2)[0]
    assert match_layers(lambda *_: (None, 1), encoder, encoder) == {"0": None, "1": "1"}
    with pytest.raises(ValueError, match="both be encoders or both text-to-text"):
        match_layers(one_to_one, encoder, teacher)
    for wrong in ((0,), (1, 0), (0, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match=r"must give 2 rising numbers below 2 \(or None\), got"):
            match_layers(lambda *_, wrong=wrong: wrong, encoder, encoder)


def test_surviving_heads_are_those_of_the_record():
    model, params = tiny_model()
    gates = random_gates(model, params, seed=3)
    gates["1.attention.heads"] = jnp.zeros(4)
    record = jp.pruning_record({name: np.ones(len(gate), np.float32) for name, gate in gates.items()}, gates)
    found = surviving_heads(record)
    assert found == {n: tuple(np.flatnonzero(g)) for n, g in gates.items() if n.endswith("heads")}
    assert found["1.attention.heads"] == ()
    assert surviving_heads(
        {"sites": {"0.attention.heads": {"which": "0-2,5,7-8"}, "0.ffn.neurons": {"which": "1"}}}
    ) == {"0.attention.heads": (0, 1, 2, 5, 7, 8)}
    with pytest.raises(ValueError, match="a record of a pruning has 'sites'"):
        surviving_heads({})


def test_heads_are_matched_or_refused():
    assert head_index("x", 3, 3, {}) is head_index("x", 3, 3, {"x": (0, 1, 2)}) is None
    assert np.asarray(head_index("x", 2, 3, {"x": (0, 2)})).tolist() == [0, 2]
    assert np.asarray(head_index("x", 0, 3, {"x": ()})).tolist() == []
    with pytest.raises(ValueError, match=r"x: the student has 2 heads, the teacher 3. .*attention=0"):
        head_index("x", 2, 3, {})
    for wrong in ((0,), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="x: heads must name 2 of the teacher's 3 heads"):
            head_index("x", 2, 3, {"x": wrong})


def test_a_projection_goes_from_width_to_width_and_is_dropped():
    (model, params), (teacher, _) = tiny_model(embed=8), tiny_model(embed=16)
    found = initialise_projection(model, teacher, jax.random.key(0))
    assert {name: own.shape for name, own in found.items()} == {"embeddings": (8, 16), "hidden": (8, 16)}
    assert without_projection(params | {"projection": found}) == params

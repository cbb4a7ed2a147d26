"""Predictions of the loss: sums by hand, what they are exact for, and none where scores attribute no objective."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_gates, tiny_batch, tiny_model

from jaxprune.models import Model
from jaxprune.pruning.loss import LossReporting, _Lost, predict_loss
from jaxprune.scoring.attribution import GradientActivation, IntegratedGradients, layer
from jaxprune.scoring.criteria import Fisher, Gradient, Magnitude, Taylor
from jaxprune.scoring.objectives import absolute, log_probability, margin, maximum, signed, squared
from jaxprune.scoring.scores import Scores, describe
from jaxprune.units import Gates, open_gates

HEADS, NEURONS = "0.attention.heads", "1.ffn.neurons"
VALUES: Gates = {HEADS: jnp.array([4.0, 1.0]), NEURONS: jnp.array([9.0, 0.25, 1.0])}
SIGNED: Gates = {HEADS: jnp.array([-3.0, 0.5]), NEURONS: jnp.array([2.0, -0.25, 1.0])}
GATES: Gates = {HEADS: jnp.array([1.0, 0.0]), NEURONS: jnp.array([0.0, 0.0, 1.0]), "1.attention.heads": jnp.zeros(2)}


def scores_of(criterion: Any, signs: Gates | None = None, expected: float | None = None) -> Scores:
    completeness = None if expected is None else {"expected": expected}
    return Scores(VALUES, {"criterion": describe(criterion), "completeness": completeness}, signed=signs)


def test_a_prediction_by_hand():
    """The second head and the first two neurons go: 0.5 + 2 - 0.25 with signs, 1 + 9 + 0.25 without."""
    found = predict_loss(scores_of(IntegratedGradients(), SIGNED, 0.4), GATES).to_json()
    assert (found["estimate"], found["at_most"], found["everything"]) == (2.25, 10.25, 0.4)
    assert found["layers"] == {"0": {"estimate": 0.5, "at_most": 1.0}, "1": {"estimate": 1.75, "at_most": 9.25}}
    assert list(found["modules"]) == ["0.attention", "1.ffn"]
    assert sum(own["estimate"] for own in found["modules"].values()) == found["estimate"]


@pytest.mark.parametrize(
    ("criterion", "signs", "expected"),
    [
        (GradientActivation(), SIGNED, (2.25, 10.25)),
        (GradientActivation(examples=signed), None, (10.25, None)),  # the scores have signs of their own
        (GradientActivation(examples=squared), SIGNED, (2.25, 1.0 + 3.0 + 0.5)),  # roots
        (IntegratedGradients(start=0.5), SIGNED, (4.5, 20.5)),  # half of the way
        (IntegratedGradients(examples=maximum), SIGNED, (2.25, None)),
        (IntegratedGradients(), None, (None, 10.25)),  # a file of format 2
        (Taylor(), SIGNED, (2.25, 10.25)),
        (Fisher(), SIGNED, (2.25, 4.5)),
        (Magnitude(), None, (None, None)),
        (Gradient(), None, (None, None)),
    ],
)
def test_what_a_criterion_can_predict(criterion: Any, signs: Gates | None, expected: tuple[float | None, ...]):
    found = predict_loss(scores_of(criterion, signs), GATES)
    assert (found.total, found.at_most) == expected
    assert found.everything is None
    if expected == (None, None):
        assert found.meaning == f"{type(criterion).__name__} attributes no objective to units"
        assert found.to_json()["layers"] == {}


def test_only_a_joint_path_from_closed_gates_knows_what_everything_loses():
    for criterion in (IntegratedGradients(start=0.5), IntegratedGradients(path=layer)):
        assert predict_loss(scores_of(criterion, SIGNED, 0.4), GATES).everything is None


def test_gates_of_other_scores_are_refused():
    with pytest.raises(ValueError, match=r"do not fit the scores of 1\.ffn\.neurons"):
        predict_loss(scores_of(Taylor()), GATES | {NEURONS: jnp.ones(4)})


# what the estimates are


def batch_of(model: Model) -> dict[str, np.ndarray]:
    batch = tiny_batch(model, 4, 7)
    batch["labels"] = np.arange(4) % 3
    if model.answers_in_text:
        random = np.random.default_rng(0)
        candidates = random.integers(2, 60, (4, 3, 3))
        candidates[:, :, -1] = model.config.end_id
        batch = {name: value for name, value in batch.items() if not name.startswith("decoder")}
        batch["candidates"] = candidates.astype(np.int32)
    return batch


def measured(criterion: Any, model: Model, params: Any, batch: Any) -> Scores:
    """Scores of one batch."""
    found = criterion(model, params, batch)
    signs = {name: jnp.asarray(value).mean(0) for name, value in found.signed.items()}
    values = {name: value.mean(0) for name, value in found.scores.items()}
    completeness = {name: float(value.mean()) for name, value in found.completeness.items()} or None
    return Scores(values, {"criterion": describe(criterion), "completeness": completeness}, signed=signs or None)


def lost(selected: Gates, objective: Any, model: Model, params: Any, batch: Any) -> float:
    return float(
        _Lost(selected, LossReporting(nodes=1, objective=objective))(model, params, batch)
        .completeness["expected"]
        .mean()
    )


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_signs_beside_the_scores_are_those_of_signed_scores(model_type: str):
    model, params = tiny_model(model_type)
    batch, gates = batch_of(model), random_gates(model, params, 1)
    own = [
        measured(GradientActivation(examples=how, objective=log_probability), model, params, batch)
        for how in (absolute, squared, signed)
    ]
    found = [predict_loss(scores, gates) for scores in own]
    assert found[0].total == found[1].total == found[2].total
    assert own[2].signed is None
    first, second = found[0].at_most, found[1].at_most
    assert found[0].total is not None and first is not None and second is not None
    assert abs(found[0].total) <= first <= second * (1 + 1e-6)  # the root of a mean square is at least the mean size


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_integrated_gradients_predict_the_loss_of_everything(model_type: str):
    """Completeness: where all units go, the estimate is what the path found, and its ends are what is lost."""
    model, params = tiny_model(model_type)
    batch = batch_of(model)
    nothing = {name: 0.0 * gate for name, gate in open_gates(model, params).items()}
    scores = measured(IntegratedGradients(nodes=2, objective=log_probability), model, params, batch)
    predicted = predict_loss(scores, nothing)
    assert predicted.total == pytest.approx(scores.header["completeness"]["found"], rel=1e-5)
    assert predicted.everything == pytest.approx(lost(nothing, log_probability, model, params, batch), rel=1e-5)


def test_gradient_activation_predicts_to_first_order():
    """The slope of the loss where gates begin to close, by differences to both sides."""
    model, params = tiny_model()
    batch, gates, part = batch_of(model), random_gates(model, params, 2), 1e-2
    scores = measured(GradientActivation(objective=margin), model, params, batch)
    ends = [{name: 1.0 + side * (1.0 - gate) for name, gate in gates.items()} for side in (part, -part)]
    opened, closed = (lost(end, margin, model, params, batch) for end in ends)
    assert (closed - opened) / (2 * part) == pytest.approx(predict_loss(scores, gates).total, abs=2e-3)  # part squared

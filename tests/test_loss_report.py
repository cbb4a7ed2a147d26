"""The loss report sums to what was lost, and gives nothing to units that stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_gates, tiny_batch, tiny_model

import jaxprune as jp
from jaxprune.data.tasks import Example
from jaxprune.models import TaskHead
from jaxprune.pruning.loss import LossReporting, _Lost, loss_report, scored_rows
from jaxprune.scoring.attribution import Context
from jaxprune.scoring.objectives import calibration_means, log_probability
from jaxprune.scoring.run import score_batches
from jaxprune.units import UNITS

LABELS, WORDS = ("no", "maybe", "yes"), Path(__file__).parent / "data" / "words"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_the_report_sums_to_the_score_lost(model_type: str):
    model, params = jp.load(jp.bundled_model() if model_type == "bert" else jp.bundled_text_model())
    task = jp.load_task("sst2", data=jp.bundled_data())
    rows = task.rows("calibration")[:16]
    scores = jp.score(model, params, task, jp.Scoring(criterion=jp.criteria.Magnitude(), rows=jp.Rows(examples=4)))
    gates = jp.select(model, params, scores, jp.budgets.Units(0.7))
    found = loss_report(model, params, task, gates, LossReporting(rows=jp.Rows(examples=rows, batch_size=8)))
    assert found.attributed == pytest.approx(sum(float(own.sum()) for own in found.units.values()), abs=1e-5)
    assert abs(found.attributed - found.lost) <= found.error + 1e-6
    assert found.error < 0.02
    for sums in (found.modules(), found.layers()):
        assert sum(sums.values()) == pytest.approx(found.attributed, abs=1e-5)
    for name, gate in gates.items():
        assert (found.units[name][np.asarray(gate) == 1.0] == 0.0).all()


@pytest.mark.parametrize("seed", range(2))
def test_what_is_lost_is_the_difference_of_the_objectives(seed: int):
    model, params = tiny_model(layers=1)
    gates, batch = random_gates(model, params, seed), tiny_batch(model, 6, 7, seed)
    batch["labels"] = np.arange(6) % 3
    selected = {name: jnp.asarray((np.asarray(gate) > 0).astype(np.float32)) for name, gate in gates.items()}
    found = _Lost(selected, LossReporting(nodes=64, objective=log_probability))(model, params, batch)
    closed = jp.compact(model, params, selected)
    values = [
        jax.nn.log_softmax(jnp.asarray(model.apply(own, batch).logits))[np.arange(6), batch["labels"]]
        for own in (params, closed)
    ]
    np.testing.assert_allclose(found.completeness["expected"], values[0] - values[1], atol=2e-5)
    np.testing.assert_allclose(found.completeness["found"], found.completeness["expected"], atol=1e-3)


def test_closed_units_may_be_replaced_by_means():
    model, params = tiny_model(layers=1)
    selected, batch = random_gates(model, params, 3), tiny_batch(model, 6, 7, 3)
    batch["labels"] = np.arange(6) % 3
    means = calibration_means(model, params, [batch], UNITS)
    criterion = _Lost(selected, LossReporting(nodes=1, objective=log_probability), means)
    _, sums, _ = score_batches(model, params, [batch], criterion, Context(means=means))
    values = [
        jax.nn.log_softmax(jnp.asarray(model.apply(own, batch).logits))[np.arange(6), batch["labels"]].mean()
        for own in (params, jp.compact(model, params, selected, means))
    ]
    assert sums is not None and sums["expected"] == pytest.approx(float(values[0] - values[1]), abs=2e-5)


def reviews(rows: int) -> jp.Task:
    words = ["the film was not very good", "a bad book", "the sun is old and the dog is red and long"]
    every = tuple(Example(f"{word} {'very ' * i}good", None, i % 3) for i in range(rows // 3) for word in words)
    return jp.Task(name="reviews", splits={"calibration": every, "test": every}, labels=LABELS)


def test_texts_that_are_cut_and_rows_that_are_gone_are_counted():
    model, params = tiny_model(heads=(TaskHead(name="reviews", labels=LABELS, pooling="mean"),))
    model, task = replace(model, source=WORDS), reviews(12)
    scoring = jp.Scoring(criterion=jp.criteria.GradientActivation(), rows=jp.Rows(examples=12, max_length=10))
    scores, gates = jp.score(model, params, task, scoring), random_gates(model, params, 3)
    rows = scored_rows(model, params, task, scores)
    selected = {name: (np.asarray(gate) > 0).astype(np.float32) for name, gate in gates.items()}
    reporting = LossReporting(rows=jp.Rows(examples=rows, max_length=10), nodes=1)
    report = loss_report(model, params, task, selected, reporting)
    assert report.truncated == scores.header["truncated"] > 0 and report.cut_off == 0
    with pytest.warns(UserWarning, match=r"only 9 of the 12 rows that were scored are among the calibration rows"):
        assert len(scored_rows(model, params, reviews(9), scores)) == 9


def test_open_gates_lose_nothing():
    model, params = tiny_model()
    task = jp.load_task("sst2", data=jp.bundled_data())
    with pytest.raises(ValueError, match="nothing is lost"):
        loss_report(model, params, task, jp.open_gates(model, params))

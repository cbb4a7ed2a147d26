"""Metrics worked out by hand, and an evaluation that batching does not change and that refuses what it must."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_gates, tiny_model

from jaxprune.data.batches import encode, make_batches, pack
from jaxprune.data.records import pair_labels
from jaxprune.data.tasks import Example, Rows, Task, draw, row_key
from jaxprune.evaluation.evaluate import (
    METRICS,
    Evaluation,
    accuracy,
    evaluate,
    f1,
    fitting_head,
    matthews,
    pearson,
    predict,
    spearman,
)
from jaxprune.models import Model, TaskHead
from jaxprune.units import Intervention, Params

WORDS = Path(__file__).parent / "data" / "words"
HEADS = (
    TaskHead(name="reviews", labels=("no", "maybe", "yes"), pooling="mean"),
    TaskHead(name="score", labels=("score",), regression=True),
    TaskHead(name="pairs", labels=("different", "same"), dense="tanh"),
)


def array(*values: float) -> np.ndarray:
    return np.array(values)


# Metrics


def test_accuracy_and_f1_by_hand():
    predicted, labels = array(1, 1, 1, 0, 0, 0), array(1, 1, 0, 1, 0, 0)
    assert accuracy(predicted, labels) == 4 / 6
    assert f1(predicted, labels) == 4 / 6  # 2 hits, 1 false alarm, 1 miss: 2 * 2 / (2 * 2 + 1 + 1)
    assert f1(array(1, 1, 1), array(1, 0, 0)) == 0.5  # 2 / (2 + 2)
    assert f1(array(0, 0), array(0, 1)) == 0.0 and f1(array(0, 0), array(0, 0)) == 0.0
    with pytest.raises(ValueError, match="F1 is of two classes, 0 and 1; the labels reach 2"):
        f1(array(0, 1), array(0, 2))


def test_matthews_by_hand():
    predicted, labels = array(1, 1, 1, 0, 0, 0), array(1, 1, 0, 1, 0, 0)
    # (2 * 2 - 1 * 1) / sqrt(3 * 3 * 3 * 3)
    assert matthews(predicted, labels) == pytest.approx(3 / 9)
    assert matthews(labels, labels) == pytest.approx(1) and matthews(1 - labels, labels) == pytest.approx(-1)
    assert matthews(array(1, 1, 1), array(1, 0, 1)) == 0.0
    # three classes, Gorodkin: (correct * n - sum p_k t_k) / sqrt((n^2 - sum p_k^2) (n^2 - sum t_k^2))
    # predicted 0 1 2 2, true 0 1 2 1: (3 * 4 - (1 + 2 + 2)) / sqrt((16 - 6) (16 - 6))
    assert matthews(array(0, 1, 2, 2), array(0, 1, 2, 1)) == pytest.approx(7 / 10)


def test_correlations_by_hand():
    one, other = array(1, 2, 3, 4), array(2, 4, 6, 80)
    # centred: -1.5 -0.5 0.5 1.5 and -21 -19 -17 57; products 31.5 + 9.5 - 8.5 + 85.5 = 118
    assert pearson(one, other) == pytest.approx(118 / (5 * (21**2 + 19**2 + 17**2 + 57**2)) ** 0.5)
    assert spearman(one, other) == pytest.approx(1) and spearman(one, -other) == pytest.approx(-1)
    # ranks with a tie: 1 2.5 2.5 4 against 1 2 3 4
    assert spearman(array(0, 5, 5, 9), one) == pytest.approx((2.25 + 2.25) / (4.5 * 5) ** 0.5)
    assert pearson(array(1, 1), array(1, 2)) == 0.0 and spearman(array(1, 2), array(3, 3)) == 0.0


def test_the_table_names_the_primary_metric_first():
    labels, scores = np.array([0, 1, 1, 0]), np.array([0.1, 2.0, 1.0, 0.2])
    assert METRICS["accuracy"](labels, labels) == {"accuracy": 1.0}
    assert list(METRICS["accuracy_f1"](labels, labels)) == ["accuracy", "f1"]
    assert list(METRICS["matthews"](labels, labels)) == ["matthews", "accuracy"]
    found = METRICS["pearson_spearman"](scores, labels)
    assert list(found) == ["pearson_spearman", "pearson", "spearman"]
    assert found["pearson_spearman"] == (found["pearson"] + found["spearman"]) / 2


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_those_of_scikit_learn_and_scipy(seed: int):
    reference = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(seed)
    for classes in (2, 5):
        predicted, labels = random.integers(0, classes, 60), random.integers(0, classes, 60)
        assert accuracy(predicted, labels) == pytest.approx(reference.accuracy_score(labels, predicted))
        assert matthews(predicted, labels) == pytest.approx(reference.matthews_corrcoef(labels, predicted), abs=1e-12)
        if classes == 2:
            assert f1(predicted, labels) == pytest.approx(reference.f1_score(labels, predicted))
    one, other = random.normal(size=60), random.integers(0, 6, 60) / 2  # the second has ties
    assert pearson(one, other) == pytest.approx(stats.pearsonr(one, other).statistic, abs=1e-12)
    assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)


# Models


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def tiny(request: pytest.FixtureRequest) -> tuple[Model, Params]:
    model, params = tiny_model(request.param, heads=HEADS)
    return replace(model, source=WORDS), params


def examples(rows: int, seed: int = 0) -> tuple[Example, ...]:
    random = np.random.default_rng(seed)
    words = ["the", "a", "film", "book", "dog", "sun", "is", "was", "not", "very", "good", "bad", "long", "old"]
    found = {" ".join(random.choice(words, random.integers(1, 30))): None for _ in range(3 * rows)}
    return tuple(Example(text, None, int(random.integers(0, 3))) for text in list(found)[:rows])


def reviews(rows: int = 45, **facts: Any) -> Task:
    splits = {"train": (), "calibration": examples(20, 1), "dev": (), "test": examples(rows)}
    return Task(**{"name": "reviews", "splits": splits, "labels": ("no", "maybe", "yes")} | facts)


def test_logits_come_in_the_order_of_the_examples_however_they_are_batched(tiny: tuple[Model, Params]):
    model, params = tiny
    rows = examples(45)
    logits = predict(model, params, rows, head="reviews")
    assert logits.shape == (45, 3) and logits.dtype == np.float32
    encoded = model.tokenizer([rows[44].text], return_tensors="np")  # one example alone, without any padding
    alone = np.asarray(model.apply(params, encoded, head="reviews").logits)[0]
    np.testing.assert_allclose(logits[44], alone, atol=1e-5)
    order = np.random.default_rng(0).permutation(45)
    shuffled = predict(model, params, [rows[i] for i in order], head="reviews", batch_size=7)
    np.testing.assert_allclose(shuffled, logits[order], atol=1e-5)
    np.testing.assert_allclose(predict(model, params, rows[:10], head="reviews", batch_size=64), logits[:10], atol=1e-5)


def test_gates_and_means_reach_the_model(tiny: tuple[Model, Params]):
    model, params = tiny
    rows = examples(5)
    gates = random_gates(model, params)
    means = {name: jnp.full_like(gate, 0.5) for name, gate in gates.items() if "neurons" in name}
    [batch] = make_batches(model, rows, batch_size=5)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    for own in (None, means):
        expected = np.asarray(model.apply(params, inputs, gates, head="pairs", means=own).logits)
        found = predict(model, params, rows, head="pairs", intervention=Intervention(gates, own))
        np.testing.assert_allclose(found, expected[np.argsort(batch["index"])], atol=1e-5)


def test_evaluation_compares_predictions_with_labels(tiny: tuple[Model, Params]):
    model, params = tiny
    task = reviews()
    logits = predict(model, params, task.rows("test"), head="reviews")
    labels = np.array([example.label for example in task.rows("test")])
    found = evaluate(model, params, task, rows=Rows(batch_size=8))
    assert found.n == 45 and found.head == "reviews" and found.split == "test"
    assert found.primary == ("accuracy", found["accuracy"]) == ("accuracy", np.mean(logits.argmax(1) == labels))
    assert found.chance == np.bincount(labels).max() / 45
    seen: list[tuple[int, int]] = []
    again = evaluate(model, params, task, progress=lambda *at: seen.append(at), rows=Rows(batch_size=8))
    assert again == found and seen == [(done, 6) for done in range(1, 7)]


def test_evaluation_of_a_regression(tiny: tuple[Model, Params]):
    model, params = tiny
    rows = tuple(replace(example, label=float(i % 5)) for i, example in enumerate(examples(30)))
    task = reviews(splits={"test": rows}, labels=("score",), regression=True, metric="pearson_spearman")
    found = evaluate(model, params, task, head="score")
    values = predict(model, params, rows, head="score")[:, 0]
    assert found["pearson"] == pytest.approx(pearson(values, np.arange(30) % 5))
    assert found.chance == 0.0 and found.primary[0] == "pearson_spearman"


def test_a_limit_takes_a_stratified_draw(tiny: tuple[Model, Params]):
    model, params = tiny
    task = reviews(60)
    found = evaluate(model, params, task, rows=Rows(examples=20))
    assert found.n == 20 and found == evaluate(model, params, task, rows=Rows(examples=20))
    drawn = draw(task, 20, 0, split="test")
    logits = predict(model, params, drawn, head="reviews")
    assert found["accuracy"] == np.mean(logits.argmax(1) == [example.label for example in drawn])
    assert evaluate(model, params, task, rows=Rows(examples=1_000)).n == 60


def test_truncated_texts_are_reported(tiny: tuple[Model, Params]):
    model, params = tiny
    found = evaluate(model, params, reviews(), rows=Rows(max_length=12))
    assert found.truncated == encode(model, reviews().rows("test"), max_length=12).truncated > 0
    assert f"{found.truncated} truncated" in str(found)


def test_nothing_is_compiled_after_the_first_batch_of_each_shape(tiny: tuple[Model, Params]):
    model, params = tiny
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    encoded = encode(model, examples(40))
    assert len(pack(encoded, batch_size=6)) > len(pack(encoded, batch_size=6).shapes)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        predict(model, params, encoded, head="reviews", batch_size=6)
        assert compiled  # six rows: a shape that no other test has
        compiled.clear()
        predict(model, params, encoded, head="reviews", batch_size=6)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Refusals


def test_rows_used_for_scoring_are_refused(tiny: tuple[Model, Params]):
    model, params = tiny
    task = reviews()
    scored = {row_key(example) for example in task.rows("calibration")}
    evaluate(model, params, task, rows=Rows(exclude=scored, examples=5))
    leaked = [row_key(replace(example, text=example.text.upper() + "!")) for example in task.rows("test")[:3]]
    with pytest.raises(ValueError, match="3 of the 45 test rows of 'reviews' are among the 23 rows used for scoring"):
        evaluate(model, params, task, rows=Rows(exclude=[*scored, *leaked], examples=5))


def test_the_head_must_fit_the_task(tiny: tuple[Model, Params]):
    model, params = tiny
    assert fitting_head(model, reviews()) == "reviews"
    renamed = reviews(name="films")
    with pytest.raises(ValueError, match=r"3 task heads .* name one"):
        evaluate(model, params, renamed)
    assert evaluate(model, params, renamed, head="reviews", rows=Rows(examples=5)).head == "reviews"
    with pytest.raises(ValueError, match="has 2 labels, different, same; 'films' has others, no, maybe, yes"):
        evaluate(model, params, renamed, head="pairs")
    with pytest.raises(ValueError, match="'score' is a regression, but 'films' is a classification"):
        evaluate(model, params, renamed, head="score")


@pytest.mark.parametrize(
    ("labels", "ordered", "error"),
    [
        (("No", "maybe", "YES"), False, ""),
        (("0", "1", "2"), False, ""),  # generic: by place
        (("LABEL_1", "LABEL_2", "LABEL_3"), False, ""),
        (("Yes", "Maybe", "No"), False, "no, maybe, yes; 'reviews' has the same in another order, Yes, Maybe, No"),
        (("Yes", "Maybe", "No"), True, "the same in another order"),
        (("bad", "fair", "good"), False, "3 labels, no, maybe, yes; 'reviews' has others, bad, fair, good. .*labels="),
        (("bad", "fair", "good"), True, ""),  # in the order of the logits, says the user
        (("no", "yes", "well"), False, "others"),
        (("2", "1", "0"), False, "others"),  # numbers that do not rise are not their places
        (("no", "yes"), True, "others"),
    ],
)
def test_labels_of_head_and_data_pair_by_name_or_are_refused(
    tiny: tuple[Model, Params], labels: tuple[str, ...], ordered: bool, error: str
):
    model, _ = tiny
    task = replace(reviews(labels=labels), ordered=ordered)
    by_place = pytest.warns(UserWarning, match=rf"by their places: {', '.join(labels)} of 'reviews' are no, maybe, yes")
    allowed = by_place if labels[0] in ("0", "LABEL_1") else nullcontext()
    with pytest.raises(ValueError, match=error) if error else allowed:
        assert fitting_head(model, task) == "reviews"


def test_labels_that_differ_in_case_alone_pair_as_they_are_written():
    assert pair_labels(("US", "us"), ("us", "US")) == (1, 0)
    assert pair_labels(("bad", "good"), ("GOOD", "Bad")) == (1, 0)
    assert pair_labels(("LABEL_0", "LABEL_1"), ("neg", "pos")) == (0, 1)
    assert pair_labels(("LABEL_1", "LABEL_0"), ("neg", "pos")) is None


def test_an_empty_split_and_broken_logits_are_refused(tiny: tuple[Model, Params]):
    model, params = tiny
    with pytest.raises(ValueError, match="'reviews' has no dev rows"):
        evaluate(model, params, reviews(), rows=Rows(split="dev"))
    broken = dict(params) | {"heads": {**params["heads"]}}
    head = params["heads"]["reviews"]
    broken["heads"]["reviews"] = {**head, "out": {**head["out"], "bias": head["out"]["bias"] * np.float32("nan")}}
    with pytest.raises(ValueError, match="the logits of 45 of 45 examples are not finite"):
        evaluate(model, broken, reviews())


def test_an_evaluation_prints_on_one_line_and_goes_into_json():
    found = Evaluation(
        task="mrpc", split="dev", head="mrpc", metrics={"accuracy": 0.8125, "f1": 0.86}, chance=0.684, n=1_408
    )
    assert str(found) == "mrpc dev: accuracy 81.2, f1 86.0 (chance 68.4, 1,408 examples)"
    assert json.loads(json.dumps(found.to_json())) == {
        "task": "mrpc", "split": "dev", "head": "mrpc", "metrics": {"accuracy": 0.8125, "f1": 0.86}, "chance": 0.684,
        "n": 1_408, "truncated": 0, "generated": False, "primary": "accuracy", "calibration": "none",
    }  # fmt: skip


@pytest.mark.parametrize(
    "names", [("matthews", "accuracy"), ("f1", "exact_match"), ("pearson_spearman", "pearson"), ("accuracy", "f1")]
)
def test_the_primary_metric_stays_the_first_in_a_file_that_sorts_names(names: tuple[str, ...]):
    metrics = {name: 0.5 + 0.1 * place for place, name in enumerate(names)}
    found = Evaluation(task="t", split="dev", head="t", metrics=metrics, chance=0.1, n=9, truncated=1, generated=True)
    again = Evaluation.from_json(json.loads(json.dumps(found.to_json(), sort_keys=True)))
    assert again == found and again.primary == found.primary == (names[0], 0.5)

"""Spans: tokens by hand, the likeliest one by brute force, the laws with a head for them, training and commands."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CLASS, PREFIX, encoder_shapes, write_checkpoint
from commands import record_of, run
from passes import logits_of, sites_of, token_slopes
from tiny import MODEL_TYPES, random_gates, tiny_batch, tiny_config, tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.compaction import compact
from jaxprune.data.batches import LONGEST, best_spans, encode, make_batches, text_of, tokenise, usable_rows
from jaxprune.data.prompts import prompt_for
from jaxprune.data.splits import Answer, Example
from jaxprune.data.tasks import Rows, Task, row_key
from jaxprune.evaluation.evaluate import evaluate, find_answers, fitting_head, predict, squad
from jaxprune.models import ENDS, NOWHERE, Model, TaskHead
from jaxprune.models.layers import contribution
from jaxprune.pruning.budgets import Units
from jaxprune.pruning.checks import Checking, check
from jaxprune.pruning.loss import LossReporting, loss_report
from jaxprune.pruning.recoveries import Recovery, recover
from jaxprune.pruning.selection import select
from jaxprune.scoring import criteria as baselines
from jaxprune.scoring.attribution import Context, GradientActivation, IntegratedGradients
from jaxprune.scoring.objectives import (
    OfSpan,
    every,
    find_targets,
    gold,
    log_probability,
    margin,
    negative_squared_error,
    objective_for,
    predicted,
    probability,
    sampled,
    signed,
    value_and_cotangent,
)
from jaxprune.scoring.run import Scoring, score
from jaxprune.training.finetuning import FineTuning, finetune
from jaxprune.units import Params, open_gates

WORDS = Path(__file__).parent / "data" / "words"
SPANS = TaskHead(name="find", labels=ENDS, pooling="none")
MOOD = TaskHead(name="mood", labels=("bad", "good"))


def spans_model(model_type: str = "bert", layers: int = 1, **sizes: Any) -> tuple[Model, Params]:
    model, params = tiny_model(model_type, layers=layers, heads=(SPANS, MOOD), **sizes)
    return replace(model, source=WORDS), params


def spans_batch(model: Model, rows: int = 4, length: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch whose tokens from the third on may hold the answer, and answers."""
    batch = tiny_batch(model, rows, length, seed)
    batch["attention_mask"][:, :6] = 1
    answerable = (batch["attention_mask"] > 0) & (np.arange(length) >= 2)
    labels = np.array([[2 + i % 3, 3 + i % 3] for i in range(rows)], np.int32)
    return batch | {"answerable": answerable, "labels": labels, "index": np.arange(rows, dtype=np.int32)}


def example(question: str, context: str, *texts: str) -> Example:
    return Example(question, context, answers=tuple(Answer(context.index(text), text) for text in texts))


# Tokens


def test_tokens_of_an_answer_by_hand():
    model, _ = spans_model()
    rows = [
        example("is it good?", "The old DOG, not\tthe cat.", "old DOG"),
        example("who?", "a red book books", "books"),
        Example("who?", "a red book", answers=()),  # not known
    ]
    encoded = encode(model, rows)
    # [CLS] is it good ? [SEP] the old dog , not the cat . [SEP]
    # [CLS] [UNK] ? [SEP] a red book book ##s [SEP]
    assert encoded.lengths.tolist() == [15, 10, 8] and encoded.max_length == 64 and encoded.truncated == 0
    assert encoded.labels.tolist() == [[7, 8], [7, 8], [-1, -1]]
    assert encoded.characters is not None
    characters = np.split(encoded.characters, encoded.offsets[1:-1])
    assert characters[0].tolist() == [[0, 0]] * 6 + [
        [0, 3], [4, 7], [8, 11], [11, 12], [13, 16], [17, 20], [21, 24], [24, 25], [0, 0]
    ]  # fmt: skip
    assert text_of(rows[0], characters[0], (7, 8)) == "old DOG"
    assert text_of(rows[0], characters[0], (8, 11)) == "DOG, not\tthe"
    batch = encoded.batch([1, 0], 16, 3)
    assert [np.flatnonzero(own).tolist() for own in batch["answerable"]] == [[*range(4, 9)], [*range(6, 14)], []]
    assert batch["labels"].tolist() == [[7, 8], [7, 8], [0, 0]] and batch["weight"].tolist() == [1, 1, 0]


def test_the_context_alone_is_cut():
    model, _ = spans_model()
    context = "the old dog was in the red book and the cat was not in it"
    rows = [
        example("who was very old?", context, "dog"),
        example("who was very old?", context, "red book and"),
        example("who was very old?", context, "cat", "dog"),  # the second one is not cut off
        example("who?", context, "cat"),
    ]
    encoded = encode(model, rows, max_length=15)
    # [CLS] [UNK] was very old ? [SEP] the old dog was in the red [SEP]
    assert encoded.lengths.tolist() == [15] * 4 and encoded.truncated == 4
    assert encoded.labels.tolist() == [[9, 9], [-1, -1], [9, 9], [-1, -1]]
    task = Task(name="find", splits={"train": tuple(rows), "dev": ()}, labels=ENDS, spans=True)
    usable = usable_rows(model, task, Rows(split="train", max_length=15))
    assert usable.cut_off == 2 and usable.task.rows("train") == (rows[0], rows[2])
    for settings in (Rows(split="train"), Rows(split="dev"), Rows(examples=(rows[1],), max_length=15)):
        assert usable_rows(model, task, settings)[:2] == (task, 0)
    others = usable_rows(model, task, Rows(split="train", max_length=15, exclude=[row_key(rows[3])]))
    assert others.cut_off == 1 and others.task.rows("train") == (rows[0], rows[2])
    with pytest.raises(ValueError, match="the answers of all train rows of 'find' are cut off: raise max_length"):
        usable_rows(model, replace(task, splits={"train": (rows[3],)}), Rows(split="train", max_length=15))
    with pytest.raises(ValueError, match="max_length must leave room for the context beside the question, got 8"):
        encode(model, rows, max_length=8)


def test_a_long_question_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxprune.data.batches.QUESTION", 4)
    row = example("good good good good good good", "the dog is old", "old")
    encoded = encode(spans_model()[0], [row, replace(row, text="good")], max_length=4 + 3 + 4)  # 3 special ones
    assert encoded.lengths.tolist() == [11, 8] and encoded.truncated == 1
    assert encoded.labels.tolist() == [[9, 9], [6, 6]]


def test_examples_that_cannot_be_questions_are_refused():
    model, _ = spans_model()
    with pytest.raises(ValueError, match="the examples have answers, but no second text"):
        encode(model, [Example("who?", answers=())])
    with pytest.raises(ValueError, match="example 1 has no answers, but others have"):
        encode(model, [example("who?", "a dog", "dog"), Example("who?", "a dog")])
    slow = SimpleNamespace(
        model_max_length=64, pad_token_id=0, model_input_names=["input_ids"], num_special_tokens_to_add=lambda pair: 3
    )
    with pytest.raises(ValueError, match="SimpleNamespace does not say where its tokens stand: spans need"):
        encode(slow, [Example("who?", "a dog", answers=())])


# The likeliest span


@pytest.mark.parametrize(("tokens", "longest"), [(1, LONGEST), (7, LONGEST), (7, 3), (7, 1), (40, LONGEST)])
def test_the_likeliest_span_is_that_of_brute_force(tokens: int, longest: int):
    logits = np.random.default_rng(tokens).integers(-3, 4, (20, 2, tokens)).astype(np.float32)  # with ties
    found = np.asarray(best_spans(jnp.asarray(logits), longest))
    for (start, end), span in zip(logits, found, strict=True):
        pairs = [(i, j) for i in range(tokens) for j in range(i, min(i + longest, tokens))]
        assert tuple(span) == max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])  # the first of equals


# Models


@pytest.mark.filterwarnings("ignore:2 tensors of .* are no part of the model. bert.pooler")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_are_of_every_token(model_type: str, tmp_path: Path):
    """Hugging Face's checkpoints for question answering load, and their logits are `hidden @ W.T + b`."""
    config = tiny_config(model_type) | {"architectures": [f"{CLASS[model_type]}ForQuestionAnswering"]}
    random = np.random.default_rng(0)
    shapes = {PREFIX[model_type] + name: shape for name, shape in encoder_shapes(config).items()}
    shapes |= {"qa_outputs.weight": (2, 16), "qa_outputs.bias": (2,)}
    if model_type == "bert":  # older ones carry a pooler that nothing reads
        shapes |= {"bert.pooler.dense.weight": (16, 16), "bert.pooler.dense.bias": (16,)}
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model, params = load(write_checkpoint(tmp_path / "theirs", config, tensors))
    assert model.head() == TaskHead(name="default", labels=ENDS, pooling="none") and model.head().spans
    batch = tiny_batch(model)
    output = model.apply(params, batch, returns=("hidden",))
    assert output.hidden is not None
    expected = np.asarray(output.hidden[-1]) @ tensors["qa_outputs.weight"].T + tensors["qa_outputs.bias"]
    expected = np.where(batch["attention_mask"][:, None] > 0, expected.swapaxes(1, 2), NOWHERE)
    np.testing.assert_allclose(np.asarray(output.logits), expected, rtol=1e-5, atol=1e-5)
    again, found = load(save(tmp_path / "ours", model, params))  # law 6
    assert again == model and model_digest(again, found) == model_digest(model, params)


def test_padding_changes_nothing_and_only_answerable_tokens_count():
    model, params = spans_model()
    batch = spans_batch(model)
    found = np.asarray(logits_of(model, params, batch, head="find"))
    assert found.shape == (4, 2, 9) and (found[:, :, :2] == NOWHERE).all() and (found[:, :, 2:6] > NOWHERE).all()
    wide = {name: np.pad(a, [(0, 0), (0, 4)]) if name != "labels" and a.ndim == 2 else a for name, a in batch.items()}
    again = np.asarray(logits_of(model, params, wide, head="find"))
    np.testing.assert_allclose(again[..., :9], found, rtol=1e-5, atol=1e-5)
    assert (again[..., 9:] == NOWHERE).all()
    free = {name: array for name, array in batch.items() if name != "answerable"}
    every_token = np.asarray(logits_of(model, params, free, head="find"))
    np.testing.assert_array_equal(every_token[..., 2:6], found[..., 2:6])
    assert (every_token[..., :2] > NOWHERE).all()


@pytest.mark.parametrize(
    "head",
    [TaskHead(name="a", labels=("no", "yes"), pooling="none"), TaskHead(name="a", labels=ENDS[::-1], pooling="none"),
     TaskHead(name="a", labels=("score",), regression=True, pooling="none")],
)  # fmt: skip
def test_a_head_for_spans_has_a_start_and_an_end(head: TaskHead):
    with pytest.raises(ValueError, match=r"task head 'a' is for spans: its labels are \('start', 'end'\), got"):
        tiny_model()[0].with_heads((head,))


def test_a_digest_from_before_spans_still_holds():
    """Heads have the fields they had, so older folders load and older score files belong to their models."""
    assert set(vars(SPANS)) == {"name", "labels", "regression", "pooling", "dense"}


# Objectives


def test_objectives_are_the_mean_of_start_and_end_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.3, 0.6]]]))
    logits = jnp.pad(logits, [(0, 0), (0, 0), (0, 2)], constant_values=NOWHERE)  # two tokens that hold no answer
    target = jnp.array([[0, 2]])
    by_hand = {
        probability: (0.5 + 0.6) / 2,
        log_probability: (np.log(0.5) + np.log(0.6)) / 2,
        margin: (np.log(0.5 / 0.5) + np.log(0.6 / 0.4)) / 2,
    }
    for objective, expected in by_hand.items():
        own = objective_for(objective, SPANS)
        value, slope = value_and_cotangent(own, logits, target)
        np.testing.assert_allclose(value, [expected], rtol=1e-5, atol=1e-6)
        assert (np.asarray(slope)[..., 3:] == 0).all() and (np.asarray(slope)[..., :3] != 0).all()
        assert own == objective_for(objective, SPANS) and hash(own) == hash(OfSpan(objective))  # compiled once
    assert objective_for(None, SPANS) == OfSpan(probability)
    value, slope = value_and_cotangent(OfSpan(probability), logits, jnp.array([[-1, -1]]))  # not known
    assert float(value[0]) == 0 and not np.asarray(slope).any()
    with pytest.raises(ValueError, match="negative_squared_error does not fit task head 'find', which is for spans"):
        objective_for(negative_squared_error, SPANS)


def test_targets_are_given_predicted_or_drawn():
    logits = np.full((2, 2, 5), NOWHERE, np.float32)
    logits[:, 0, 1:4], logits[:, 1, 1:4] = [0.0, 5.0, 1.0], [9.0, 1.0, 2.0]  # the likeliest end comes before the start
    given, index = jnp.array([[1, 1], [2, 3]]), jnp.arange(2)
    logits = jnp.asarray(logits)
    (own,), (weight,) = find_targets(gold, logits, given, index, jax.random.key(0))
    assert own.tolist() == given.tolist() and weight.tolist() == [1, 1]
    (own,), _ = find_targets(predicted, logits, given, index, jax.random.key(0))
    assert own.tolist() == [[1, 1]] * 2  # 0 + 9 > 5 + 2
    (own,), _ = find_targets(sampled, logits, given, index, jax.random.key(0))
    assert own.shape == (2, 2) and ((own >= 1) & (own <= 3)).all()
    with pytest.raises(ValueError, match="labels=every would take a backward pass for every span: use labels=pred"):
        find_targets(every, logits, given, index, jax.random.key(0))


# Laws


@pytest.mark.parametrize("fractional", [False, True])
def test_compaction_keeps_the_function(fractional: bool):
    model, params = spans_model(layers=2)
    batch, gates = spans_batch(model), random_gates(model, params, 1, fractional)
    expected = np.asarray(logits_of(model, params, batch, gates, head="find"))
    found = np.asarray(logits_of(model, compact(model, params, gates), batch, head="find"))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_gradient_times_activation():
    model, params = spans_model()
    model = model.with_heads((SPANS,))
    batch = spans_batch(model)
    found = GradientActivation(examples=signed)(model, params, batch).scores
    labels = jnp.asarray(batch["labels"])
    slopes = token_slopes(model, params, batch, lambda logits: OfSpan(probability)(logits, labels).sum())
    values = sites_of(model, params, batch)
    for name, slope in slopes.items():
        product = np.where(batch["attention_mask"][..., None] > 0, contribution(values[name], slope), 0.0)
        np.testing.assert_allclose(found[name], product.sum(1), rtol=1e-4, atol=1e-6)


def test_completeness():
    model, params = spans_model()
    batch = spans_batch(model)
    criterion = IntegratedGradients(nodes=40, chunk=20, objective=log_probability)
    [found], [[complete]], _ = criterion.attributions(model, params, batch, Context(head="find"))
    ones = open_gates(model, params)
    ends = [
        OfSpan(log_probability)(logits_of(model, params, batch, gates, head="find"), jnp.asarray(batch["labels"]))
        for gates in (ones, {name: jnp.zeros_like(gate) for name, gate in ones.items()})
    ]
    np.testing.assert_allclose(complete.expected, ends[0] - ends[1], atol=1e-5)
    total = sum(value.sum(1) for value in found.values())
    np.testing.assert_allclose(total, complete.expected, atol=2e-4)  # the error of the quadrature, in nats


@pytest.mark.parametrize(
    "criterion",
    [
        GradientActivation(labels=sampled),
        pytest.param(IntegratedGradients(nodes=2, labels=predicted), marks=pytest.mark.slow),
    ],
)
def test_padding_reordering_and_splitting_change_nothing(criterion: Any):
    model, params = spans_model()
    batch = spans_batch(model)
    found = criterion(model, params, batch, Context(head="find")).scores
    wide = {name: np.pad(a, [(0, 0), (0, 4)]) if name != "labels" and a.ndim == 2 else a for name, a in batch.items()}
    order = np.array([2, 0, 3, 1])
    for own, rows in (
        (wide, np.arange(4)),
        ({name: array[order] for name, array in batch.items()}, order),
        ({name: array[:2] for name, array in batch.items()}, np.arange(2)),
    ):
        again = criterion(model, params, own, Context(head="find")).scores
        for name, value in again.items():
            np.testing.assert_allclose(value, np.asarray(found[name])[rows], rtol=1e-4, atol=1e-6)


# Evaluation


COLOURS = ("red", "warm", "cold", "short")


def questions(rows: int = 60, seed: int = 0) -> tuple[Example, ...]:
    """Rows that say what a thing is, among other words; no text occurs twice."""
    random = np.random.default_rng(seed)
    found: dict[str, Example] = {}
    while len(found) < rows:
        words = list(random.choice(["the", "a", "film", "book", "dog", "sun", "was", "not"], random.integers(3, 9)))
        words.insert(int(random.integers(len(words) + 1)), str(random.choice(COLOURS)))
        context = " ".join(words)
        answer = next(word for word in words if word in COLOURS)
        found[context] = example("it is?", context, answer)
    return tuple(found.values())


def task_of(rows: tuple[Example, ...], train: int = 0, **facts: Any) -> Task:
    held = rows[train:]
    third = len(held) // 3
    splits = {
        "train": rows[:train], "calibration": held[:third], "dev": held[third : 2 * third], "test": held[2 * third :],
    }  # fmt: skip
    usual = {"name": "find", "splits": splits, "labels": ENDS, "spans": True, "metric": "squad", "grouped": True}
    return Task(**usual | facts)


def test_evaluation_compares_the_likeliest_spans_with_answers():
    model, params = spans_model()
    task = task_of(questions(60))
    rows = task.rows("test")
    encoded = encode(model, rows)
    logits = predict(model, params, rows, head="find")
    assert logits.shape == (20, 2, encoded.lengths.max()) and encoded.characters is not None
    spans = np.asarray(best_spans(jnp.asarray(logits)))
    characters = np.split(encoded.characters, encoded.offsets[1:-1])
    texts = [text_of(*own) for own in zip(rows, characters, spans, strict=True)]
    assert find_answers(model, params, rows, head="find", batch_size=7) == texts
    assert all(row.pair and text and text in row.pair for row, text in zip(rows, texts, strict=True))
    found = evaluate(model, params, task)
    assert found.metrics == squad(texts, [row.answers or () for row in rows]) and found.head == "find"
    assert found.primary[0] == "f1" and found.chance == 0.0 and found.n == 20
    assert evaluate(model, params, task, rows=Rows(batch_size=7)) == found
    assert evaluate(model, params, task, rows=Rows(examples=9)).n == 9
    unknown = [replace(row, answers=()) for row in rows]
    assert find_answers(model, params, unknown, head="find") == texts


def test_an_answer_that_is_cut_off_counts_as_not_found():
    model, params = spans_model()
    perfect = example("it is?", "red " * 3 + "the " * 9 + "cold", "red")
    task = task_of((perfect, perfect, perfect))
    far = replace(perfect, answers=(Answer((perfect.pair or "").index("cold"), "cold"),))
    found = evaluate(model, params, replace(task, splits={"test": (far,) * 2}), rows=Rows(max_length=14))
    assert found.n == 2 and found.truncated == 2 and found["f1"] == found["exact_match"] == 0.0


def test_head_and_task_must_be_of_one_kind():
    model, params = spans_model()
    task = task_of(questions(9))
    assert fitting_head(model, task) == "find"
    with pytest.raises(ValueError, match="the head 'mood' is a classification, but 'find' is for spans"):
        evaluate(model, params, task, head="mood")
    labelled = Task(name="mood", splits={"test": (Example("good", None, 1),)}, labels=("bad", "good"))
    with pytest.raises(ValueError, match="the head 'find' is for spans, but 'mood' is a classification"):
        evaluate(model, params, labelled, head="find")
    with pytest.raises(ValueError, match=r"by a head for spans, .* known ones; task head 'mood' is a class"):
        find_answers(model, params, task.rows("test"), head="mood")
    with pytest.raises(ValueError, match=r"with answers=\(\) or known ones; its examples have no answers"):
        find_answers(model, params, [Example("who?", "a dog")], head="find")
    broken = {**params, "heads": {"find": jax.tree.map(lambda a: a * np.float32("nan"), params["heads"]["find"])}}
    with pytest.raises(ValueError, match="the logits of 3 of 3 examples are not finite"):
        evaluate(model, broken, task)


def test_text_to_text_models_refuse_spans():
    model, params = tiny_model("t5")
    with pytest.raises(ValueError, match="task 'find' is for spans; a prompt needs a task with labels"):
        evaluate(model, params, task_of(questions(9)))
    with pytest.raises(ValueError, match="task 'find' is for spans"):
        prompt_for(task_of(questions(9)))


# Scoring, checking, repairing


def test_scores_leave_out_what_is_cut_off_and_count_it(monkeypatch: pytest.MonkeyPatch):
    model, params = spans_model()
    near = questions(30)
    texts = [f"{row.pair} the dog was not in a very long film old" for row in near[:4]]
    far = tuple(Example("it is?", text, answers=(Answer(len(text) - 3, "old"),)) for text in texts)
    task = task_of(near, splits={"calibration": (*near[:10], *far), "dev": near[10:20], "test": near[20:]})
    read: list[int] = []
    monkeypatch.setattr("jaxprune.data.batches.tokenise", lambda *given: read.append(len(given[1])) or tokenise(*given))
    found = score(model, params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=10, max_length=16)))
    assert found.header["cut_off"] == 4 and found.header["examples"] == 10
    assert read == [14]  # rows are tokenised once, to find the cut ones and to score
    same = score(
        model, params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=near[:10], max_length=16))
    )
    for name, value in found.values.items():
        np.testing.assert_allclose(value, same.values[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="examples must lie in 1 to 10"):
        score(model, params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=11, max_length=16)))
    with pytest.raises(ValueError, match="4 of 4 examples have no answer within 16 tokens: leave them out, raise max"):
        score(model, params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=far, max_length=16)))
    unknown = tuple(replace(row, answers=()) for row in near[:10])
    with pytest.raises(ValueError, match="10 of 10 examples have no label: use labels=predicted"):
        score(model, params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=unknown)))
    score(model, params, task, Scoring(criterion=GradientActivation(labels=predicted), rows=Rows(examples=unknown)))
    score(model, params, task, Scoring(criterion=baselines.Fisher(), rows=Rows(examples=unknown)))


@pytest.mark.slow
def test_scores_of_spans_are_checked_and_repaired():
    model, params = spans_model()
    task = task_of(questions(60))
    scores = score(model, params, task, Scoring(criterion=IntegratedGradients(nodes=4), rows=Rows(examples=16)))
    assert scores.header["completeness"] is not None and scores.header["max_length"] == 64
    few = Checking(units=8, examples=8, orders=2, fractions=(0.5,), limit=8)
    found = {own.name: own for own in check(model, params, task, scores, checking=few)}
    assert set(found) == {"completeness", "removal of heads", "removal of neurons", "deletion"}
    assert found["removal of neurons"].value is not None
    assert found["deletion"].facts["metric"] == "f1"
    gates = select(model, params, scores, Units(0.5))
    small = compact(model, params, gates)
    repaired, recovery = recover(model, params, small, task, Recovery(rows=Rows(examples=16)))
    assert recovery.examples == 16 and recovery.cut_off == 0 and evaluate(model, repaired, task).n == 20
    far = example("it is?", "the " * 60 + "red", "red")  # its answer is cut off
    longer = replace(task, splits={**task.splits, "calibration": (*task.rows("calibration"), far)})
    _, recovery = recover(model, params, small, longer, Recovery(rows=Rows(examples=1_000)))
    assert recovery.cut_off == 1 and recovery.examples == len(task.rows("calibration"))
    report = loss_report(model, params, task, gates, LossReporting(rows=Rows(examples=8), nodes=8))
    assert abs(report.attributed - report.lost) <= report.error + 1e-5


# Training


def moods() -> Task:
    random = np.random.default_rng(1)
    texts = list(dict.fromkeys(" ".join(random.choice(["good", "bad", "a", "film"], 6)) for _ in range(300)))[:150]
    rows = tuple(Example(text, None, int(text.count("good") > text.count("bad"))) for text in texts)
    return Task(
        name="mood", labels=("bad", "good"),
        splits={"train": rows[:90], "calibration": rows[90:100], "dev": rows[100:125], "test": rows[125:]},
    )  # fmt: skip


@pytest.mark.slow
def test_a_head_for_spans_learns_beside_others_and_beside_old_ones():
    model, _ = tiny_model(layers=1, embed=32, neurons=64, heads=(MOOD,))
    model, params = replace(model, source=WORDS), model.initialise(jax.random.key(0))
    far = example("it is?", "the " * 60 + "red", "red")
    rows = questions(330)
    task = task_of((far, *rows), train=241)
    training = FineTuning(epochs=6, batch_size=16, learning_rate=1e-2, dev_limit=30)
    both = finetune(model, params, [task, moods()], training)
    assert both.model.heads == ("find", "mood") and both.model.head("find") == SPANS and both.cut_off == {"find": 1}
    found = evaluate(both.model, both.params, task)
    assert found["exact_match"] > 0.9 and found["f1"] >= found["exact_match"]
    new = [Example("it is?", "a Warm film", answers=())]
    assert find_answers(both.model, both.params, new, head="find") == ["Warm"]
    short = replace(training, steps=2, keep_heads=True)
    alone = finetune(model, params, [task], short)
    assert alone.model.heads == ("mood", "find")
    jax.tree.map(np.testing.assert_array_equal, alone.params["heads"]["mood"], params["heads"]["mood"])
    again = finetune(alone.model, alone.params, [task], short)
    assert again.model.heads == ("mood", "find")  # one of the task's own name is trained anew


# Commands


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head for labels, and two tasks for spans."""
    folder = tmp_path_factory.mktemp("spans")
    model, params = tiny_model(layers=1, heads=(MOOD,))
    save(folder / "model", replace(model, source=WORDS), params)
    for name, seed in (("squad", 0), ("mlqa_en_dev", 1)):
        file = folder / "data" / name / "validation.jsonl"
        file.parent.mkdir(parents=True)
        with file.open("w") as stream:
            for i, row in enumerate(questions(160, seed)):
                answers = [own._asdict() for own in row.answers or ()]
                cell = {"text": [own["text"] for own in answers], "answer_start": [own["start"] for own in answers]}
                stored = {"id": str(i), "title": "", "context": row.pair, "question": row.text, "answers": cell}
                stream.write(json.dumps(stored) + "\n")
    return folder


@pytest.mark.slow
def test_commands_do_for_spans_what_they_do_for_labels(place: Path):
    data, spans = ("--data", place / "data"), place / "spans"
    recipe = ("--epochs", 1, "--batch-size", 16, "--learning-rate", 1e-2)
    made = record_of("finetune", place / "model", "--task", "mlqa_en_dev", *data, *recipe, "--keep-heads", "-o", spans)
    assert list(made["epochs"][0][0]["metrics"]) == ["f1", "exact_match"]
    assert made["tasks"]["mlqa_en_dev"]["cut_off"] == 0
    task = ("--task", "squad", "--head", "mlqa_en_dev", *data)  # trained on one, tested on the other
    [tested] = record_of("evaluate", spans, *task)["results"]
    assert tested["task"] == "squad" and tested["primary"] == "f1"
    few, scores = ("--examples", 8, "--batch-size", 8), place / "s.safetensors"
    scored = record_of("score", spans, *task, *few, "--nodes", 2, "-o", scores)
    assert scored["cut_off"] == 0 and scored["max_length"] == 64
    small = place / "small"
    how = ("--units", 0.5, "--recover", "bias", "--recover-examples", 8, "--measure", "0", "--batch-size", 8)
    pruned = record_of("prune", spans, "--scores", scores, *task, *how, "-o", small)
    assert list(pruned["after"]["evaluation"]["metrics"]) == ["f1", "exact_match"]
    assert "find_answers(" in (small / "README.md").read_text()
    assert load(small)[0].heads == ("mood", "mlqa_en_dev")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "model", "--task", "squad"), "the head 'mood' is a classification, but 'squad' is for spans."),
        (("evaluate", "model", "--task", "squad", "--label-names", "a,b"), "squad: answers need a question,"),
        (("finetune", "model", "--task", "squad", "-o", "no"), "'squad' has no train rows"),
        (("evaluate", "model", "--task", "squad", "--prompt", "t5"), "task 'squad' is for spans; a prompt needs"),
    ],
)
def test_bad_input_is_one_line(place: Path, arguments: tuple[str, ...], message: str):
    named = [str(place / own) if own in ("model", "no") else own for own in arguments]
    result = run(*named, "--data", place / "data")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr


def test_nothing_of_a_batch_of_labels_changes():
    model, _ = spans_model()
    [batch] = make_batches(model, [Example("the dog", "a cat", 1)], batch_size=2)
    assert "answerable" not in batch and batch["labels"].shape == (2,)


@pytest.mark.reference  # it needs no PyTorch, but compiles more than the other target has time for
def test_the_benchmark_trains_once_and_prunes_to_all_budgets(place: Path, tmp_path: Path, monkeypatch: Any):
    benchmark, tables = importlib.import_module("spans"), importlib.import_module("tables_recovery")
    out, work = tmp_path / "record.json", tmp_path / "work"
    arguments = ["--start", place / "model", "--data", place / "data", "--work", work, "-o", out, "--epochs", 1]
    monkeypatch.setattr("sys.argv", ["spans.py", *map(str, [*arguments, "--max-length", 32, "--draws", 2])])
    monkeypatch.setattr(benchmark, "BUDGETS", (0.8, 0.5))
    benchmark.main()
    record = json.loads(out.read_text())
    assert record["dense"]["rows"]["train"] > 100 and not list(work.glob("*.state"))
    for rows in record["budgets"]["rows"].values():
        for budget, own in rows.items():
            assert own["flops"] <= float(budget) and len(own["f1"]) == 2
    monkeypatch.setattr(tables, "record", lambda _: record)
    assert all(f"{way}, F1" in tables.spans() for way in benchmark.WAYS) and "Dense, dev" in tables.spans_setting()

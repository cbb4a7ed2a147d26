"""Answers of text-to-text models: ranked, attributed under teacher forcing, chosen by prompts, trained."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretraining import Corruption, Pretraining, corrupt, pretrain
from test_t5 import asked
from test_training import moods
from tiny import TEXT_TYPES, tiny_model

from jaxprune.checkpoints.tensors import params_digest
from jaxprune.data.batches import IGNORED, encode, encode_words, pack
from jaxprune.data.prompts import Prompt
from jaxprune.data.tasks import Example, Rows, Task
from jaxprune.evaluation import text as likelihood
from jaxprune.evaluation.evaluate import evaluate, predict
from jaxprune.evaluation.text import answered, candidates_of, rank, teacher_forced, without_end
from jaxprune.models import Model
from jaxprune.models.layers import max_tokens
from jaxprune.scoring.attribution import Context, GradientActivation, IntegratedGradients, layer
from jaxprune.scoring.criteria import Activation, BlockInfluence, Fisher, LeaveOneOut, Taylor, Wanda
from jaxprune.scoring.objectives import (
    every,
    gold,
    log_probability,
    margin,
    predicted,
    probability,
    sampled,
    signed,
    value_and_cotangent,
)
from jaxprune.scoring.run import Scoring, score
from jaxprune.training.finetuning import FineTuning, finetune
from jaxprune.training.loop import Step
from jaxprune.units import Params, open_gates

ANSWERS = Path(__file__).parent / "data" / "answers"
PROMPT = Prompt(template="mood : {text} ?", words=("bad", "very good"))
TRAINING = FineTuning(epochs=2, batch_size=16, learning_rate=3e-2, optimizer="adafactor", weight_decay=0.0)


def speaker(model_type: str = "t5") -> tuple[Model, Params]:
    """A tiny model with a tokenizer."""
    model, _ = tiny_model(model_type, embed=32, neurons=64)
    return replace(model, source=ANSWERS), model.initialise(jax.random.key(0))


def asked_moods() -> Task:
    """A task with a prompt: does a text say good or bad?"""
    return replace(moods(), prompt=PROMPT)


def by_hand(model: Model, params: Params, batch: Any, label: int) -> np.ndarray:
    """The log-likelihood of one candidate, token by token."""
    targets = batch["candidates"][:, label]
    found = model.apply(params, teacher_forced(model, batch, targets)).logits
    assert found is not None
    each = np.asarray(jax.nn.log_softmax(found))
    return np.array([sum(each[i, j, t] for j, t in enumerate(row) if t != IGNORED) for i, row in enumerate(targets)])


# Ranking


def test_teacher_forcing_by_hand():
    model, _ = tiny_model("t5")
    found = teacher_forced(model, {"input_ids": np.ones((2, 3))}, np.array([[7, 8, 1], [9, 1, IGNORED]]))
    assert found["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 9, 1]]
    assert found["decoder_attention_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert without_end(jnp.array([[7, 1, IGNORED]]), (1,)).tolist() == [[7, IGNORED, IGNORED]]


@pytest.mark.parametrize("most", [1, 7, 512])
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_candidates_are_ranked_by_their_likelihood(model_type: str, most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(likelihood, "MOST_ROWS", most)  # how many are decoded together changes nothing
    model, params = tiny_model(model_type)
    batch = asked(model, labels=5)
    found = np.asarray(rank(model, params, batch, batch["candidates"]))
    for label in range(5):
        np.testing.assert_allclose(found[:, label], by_hand(model, params, batch, label), rtol=1e-5, atol=1e-5)
    assert (found < 0).all() and np.ptp(found, axis=0).min() > 0.1  # examples differ


def test_an_example_without_a_label_gets_the_likeliest_answer():
    model, params = tiny_model("t5")
    batch = asked(model)
    best = rank(model, params, batch, batch["candidates"]).argmax(1)
    found = answered(model, params, batch | {"labels": np.array([-1, 2, -1], np.int32)})
    expected = candidates_of(batch["candidates"], jnp.array([best[0], 2, best[2]]))
    np.testing.assert_array_equal(found["decoder_input_ids"][:, 1:], jnp.maximum(expected, 0)[:, :-1])
    with pytest.raises(ValueError, match="the batch has no 'candidates'"):
        answered(model, params, {name: batch[name] for name in ("input_ids", "attention_mask", "labels")})


# Attribution


@pytest.mark.parametrize("objective", [probability, log_probability, margin])
def test_the_objective_of_a_text_is_the_sum_over_its_tokens(objective: Any):
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.standard_normal((2, 3, 9)), jnp.float32)
    target = jnp.array([[4, 5, IGNORED], [8, IGNORED, IGNORED]])
    value, slope = value_and_cotangent(objective, logits, target)
    each = [[objective(logits[i, j][None], target[i, j][None])[0] for j in range(n)] for i, n in ((0, 2), (1, 1))]
    np.testing.assert_allclose(value, [sum(own) for own in each], rtol=1e-5)
    assert np.abs(slope[0, 2]).max() == 0 and np.abs(slope[1, 1:]).max() == 0 and np.abs(slope[0, 1]).max() > 0


def test_the_end_of_sequence_is_read_but_not_attributed():
    model, params = tiny_model("t5", layers=1)
    batch = asked(model, labels=2)
    target = candidates_of(batch["candidates"], jnp.asarray(batch["labels"]))

    def total(gates: Any) -> jax.Array:
        logits = model.apply(params, teacher_forced(model, batch, target), gates).logits
        assert logits is not None
        shares = jax.nn.softmax(logits)
        picked = jnp.take_along_axis(shares, jnp.maximum(target, 0)[..., None], 2)[..., 0]
        return jnp.where((target != IGNORED) & (target != 1), picked, 0.0).sum()

    ones = open_gates(model, params)
    found = GradientActivation(examples=signed)(model, params, batch).scores
    step = 1e-2
    for name in ("encoder.0.ffn.neurons", "decoder.1.cross.heads"):
        up, down = (total(ones | {name: ones[name].at[1].add(sign * step)}) for sign in (1, -1))
        np.testing.assert_allclose(found[name][:, 1].sum(), (up - down) / (2 * step), rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("labels", [predicted, sampled, every])
def test_label_free_scores_need_no_labels(labels: Any):
    model, params = tiny_model("t5", layers=1)
    batch = asked(model)
    blind = batch | {"labels": np.full(3, -1, np.int32)}
    criterion = GradientActivation(labels=labels)
    key = jax.random.key(1)
    found, expected = (criterion(model, params, one, Context(key=key)).scores for one in (blind, batch))
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows)
    likelihoods = rank(model, params, batch, batch["candidates"])
    if labels is predicted:
        own = GradientActivation(labels=gold)(model, params, batch | {"labels": likelihoods.argmax(1)}).scores
    elif labels is every:
        shares = jax.nn.softmax(likelihoods, axis=1)
        each = [batch | {"labels": np.full(3, y, np.int32)} for y in range(3)]
        parts = [GradientActivation()(model, params, one).scores for one in each]
        own = {name: sum(shares[:, y, None] * part[name] for y, part in enumerate(parts)) for name in expected}
    else:
        return
    for name, rows in expected.items():
        np.testing.assert_allclose(own[name], rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "criterion",
    [
        IntegratedGradients(nodes=2, path=layer),
        GradientActivation(tokens=max_tokens),
        Taylor(),
        Fisher(),
        Wanda(),
        Activation(),
        BlockInfluence(),
        LeaveOneOut(chunk=3),
    ],
    ids=lambda own: type(own).__name__,
)
def test_every_criterion_scores_a_text_to_text_model(criterion: Any):
    model, params = tiny_model("t5", layers=1)
    found = criterion(model, params, asked(model), Context(key=jax.random.key(0))).scores
    names = [name for name in open_gates(model, params) if not isinstance(criterion, LeaveOneOut) or "heads" in name]
    assert sorted(found) == sorted(names)
    assert all(np.isfinite(rows).all() and np.abs(rows).max() > 0 for rows in found.values())


def test_leaving_a_head_out_by_hand():
    model, params = tiny_model("mt5", layers=1)
    batch = asked(model, labels=2)
    found = LeaveOneOut(objective=log_probability, examples=signed)(model, params, batch).scores
    target = candidates_of(batch["candidates"], jnp.asarray(batch["labels"]))
    inputs = teacher_forced(model, batch, target)
    name = "decoder.0.cross.heads"
    closed = open_gates(model, params) | {name: jnp.array([1.0, 0.0, 1.0, 1.0])}
    values = [
        value_and_cotangent(log_probability, model.apply(params, inputs, gates).logits, without_end(target, (1,)))[0]
        for gates in (None, closed)
    ]
    np.testing.assert_allclose(found[name][:, 1], values[0] - values[1], rtol=1e-4, atol=1e-5)


# Prompts and words


def test_prompts_in_batches_by_hand():
    model, _ = speaker()
    vocabulary = model.tokenizer.get_vocab()
    encoded = encode(model, [Example("the film was good", None, 1), Example("a dog", None, 0)], prompt=PROMPT)
    words = ["mood", ":", "the", "film", "was", "good", "?"]
    assert encoded.input_ids[:8].tolist() == [*(vocabulary[word] for word in words), 1]
    assert encoded.candidates is not None
    bad, very, good = (vocabulary[word] for word in ("bad", "very", "good"))
    assert encoded.candidates.tolist() == [[bad, 1, IGNORED], [very, good, 1]]
    assert encoded.mean_length == [7.0, 2.5]
    [batch] = pack(encoded, batch_size=3)
    assert batch["candidates"].shape == (3, 2, 3) and batch["labels"].tolist() == [1, 0, 0]


def test_a_long_text_is_cut_and_the_prompt_is_not():
    model, _ = speaker()
    pair = Prompt(template="sentence1 : {text} sentence2 : {pair} ? answer :", words=("yes", "no"))
    rows = [Example("the dog is very old", "sun " * 40, 0), Example("a " * 60, "a book", 1), Example("a", "b", 1)]
    encoded = encode(model, rows, prompt=pair, max_length=20)
    assert encoded.truncated == 2 and encoded.lengths.max() <= 20
    texts = [model.tokenizer.decode(encoded.input_ids[a:b]) for a, b in pairwise(encoded.offsets)]
    assert texts[0].startswith("sentence1 : the dog is very old sentence2 : sun sun")
    assert texts[1].endswith("a sentence2 : a book ? answer : </s>")
    with pytest.raises(ValueError, match="the prompt alone has 8 tokens, max_length is 5"):
        encode(model, rows, prompt=pair, max_length=5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the prompt has no words to answer with"),
        (("bad", "excellent"), "'excellent' has characters that the tokenizer does not know"),
        (("bad", "BAD"), "the words 'bad' and 'BAD' have the same tokens"),
        (("bad", "good " * 40), "has 40 tokens, at most 31 are possible"),
        (("bad", "\u200b"), "has no tokens|does not know"),
    ],
)
def test_words_that_cannot_be_answers(words: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        encode_words(speaker()[0], words)


def test_a_tokenizer_that_is_not_the_models_is_refused():
    model, _ = speaker()
    other = replace(model, config=replace(model.config, end_id=5))
    with pytest.raises(ValueError, match="ends a text with 1 and pads with 0, the model with 5 and 0"):
        encode_words(other, ("bad", "good"))
    small = replace(model, config=replace(model.config, vocab=20))
    with pytest.raises(ValueError, match="the tokenizer has 37 tokens, the model 20"):
        encode_words(small, ("bad", "good"))
    with pytest.raises(ValueError, match="the model answers in text: say with prompt= what it is asked"):
        encode(model, [Example("a dog")])


def test_tasks_that_cannot_be_asked():
    model, params = speaker()
    with pytest.raises(ValueError, match="there is no built-in prompt for the task 'moods'"):
        evaluate(model, params, moods())
    encoder, weights = tiny_model("bert")
    with pytest.raises(ValueError, match="the model has task heads, it does not answer prompts"):
        evaluate(encoder, weights, asked_moods())


# Training


@pytest.mark.slow
def test_a_text_to_text_model_learns_a_task_and_resumes_to_the_same_bits(tmp_path: Path):
    model, params = speaker()
    task = asked_moods()
    whole = finetune(model, params, [task], TRAINING)
    assert whole.model == model and whole.evaluations[-1][0]["accuracy"] > 0.85

    def stop(step: Step) -> None:
        if step.step == 4:
            raise KeyboardInterrupt

    short = replace(TRAINING, steps=8, evaluate_every=4)
    brief = finetune(model, params, [task], short)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, params, [task], short, state=tmp_path / "state", progress=stop)
    again = finetune(model, params, [task], short, state=tmp_path / "state")
    assert params_digest(again.params) == params_digest(brief.params) and again.evaluations == brief.evaluations
    tables = [own["attention"]["relative"]["embedding"] for own in again.params["decoder"]["layers"].values()]
    for table in tables[1:]:
        np.testing.assert_array_equal(table, tables[0])
    scores = score(model, whole.params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=12)))
    assert scores.header["prompt"]["words"] == ["bad", "very good"] and scores.header["head"] == "language"
    assert len(scores.header["mean_length"]) == 2
    found = predict(model, whole.params, task.rows("test")[:5], prompt=PROMPT)
    assert found.shape == (5, 2) and (found < 0).all()


def test_corrupted_spans_give_back_the_text():
    random = np.random.default_rng(0)
    windows, sentinels = random.integers(20, 60, (50, 40)), np.arange(2, 12)
    kind = Corruption(window=40, noise=0.2, span=2.5)
    assert kind.counts == (8, 3)
    inputs, targets = corrupt(windows, kind, sentinels, 1, random)
    assert inputs.shape == (50, 36) and targets.shape == (50, 12)
    for window, read, answer in zip(windows, inputs, targets, strict=True):
        assert read[-1] == answer[-1] == 1
        spans: dict[int, list[int]] = {}
        for token in answer[:-1]:
            if token in sentinels:
                spans[int(token)] = []
                last = int(token)
            else:
                spans[last].append(int(token))
        assert list(spans) == [2, 3, 4] and all(spans.values())
        rebuilt = [t for token in read[:-1] for t in (spans[int(token)] if int(token) in spans else [int(token)])]
        assert rebuilt == window.tolist()
    with pytest.raises(ValueError, match="a window has 3 spans, the tokenizer has 2 sentinels"):
        corrupt(windows, kind, sentinels[:2], 1, random)


@pytest.mark.slow
def test_pretraining_learns_and_resumes_to_the_same_bits(tmp_path: Path):
    model, params = speaker()
    stream = np.tile(np.arange(20, 36), 200).astype(np.int32)  # after 20 comes 21: there is something to learn
    recipe = Pretraining(steps=60, batch_size=8, learning_rate=3e-2, corruption=Corruption(window=16, noise=0.25))
    losses: list[float] = []
    pretrain(model, params, stream, np.arange(3, 9), recipe, progress=lambda step: losses.append(step.loss))
    assert losses[-1] < 0.6 * losses[0]

    def stop(step: Step) -> None:
        if step.step == 10:
            raise KeyboardInterrupt

    state, recipe = tmp_path / "state", recipe._replace(steps=12)
    whole = pretrain(model, params, stream, np.arange(3, 9), recipe)
    with pytest.raises(KeyboardInterrupt):
        pretrain(model, params, stream, np.arange(3, 9), recipe, state=state, progress=stop)
    assert params_digest(pretrain(model, params, stream, np.arange(3, 9), recipe, state=state)) == params_digest(whole)
    with pytest.raises(ValueError, match="another run"):
        pretrain(model, params, stream, np.arange(3, 9), recipe._replace(seed=1), state=state)
    with pytest.raises(ValueError, match="the texts give 2 windows of 16 tokens"):
        pretrain(model, params, stream[:40], np.arange(3, 9), recipe)

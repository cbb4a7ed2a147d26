"""Multiple choice: rows with choices of their own, ranked behind their context, scored and pruned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import record_of, run
from test_decoders import ANSWERS
from tiny import tiny_model

import jaxprune as jp
from jaxprune.data.batches import IGNORED, encode, pack
from jaxprune.data.prompts import prompt_of, with_shots
from jaxprune.data.tasks import Example, Rows, Task, load_task
from jaxprune.evaluation.evaluate import evaluate, final, free_match, predict
from jaxprune.evaluation.text import generate, texts
from jaxprune.models import Model
from jaxprune.scoring.attribution import GradientActivation
from jaxprune.scoring.objectives import signed
from jaxprune.scoring.run import Scoring, score
from jaxprune.units import Params

WORDS = ("the", "film", "was", "good", "bad", "very", "mood", "is")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(count: int = 90) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        context, *choices = (" ".join(random.choice(WORDS, random.integers(1, 7))) for _ in range(5))
        kept = list(dict.fromkeys(choices))[: 3 + i % 2]
        rows.append({"context": f"{context} {i}", "choices": kept, "label": int(random.integers(len(kept)))})
    return rows


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(write(tmp_path_factory.mktemp("data") / "asked.jsonl", rows_of()))


@pytest.fixture(scope="module")
def decoder() -> tuple[Model, Params]:
    model, params = tiny_model("llama")
    return replace(model, source=ANSWERS), params


def test_rows_with_choices_are_a_task(task: Task):
    assert task.choices and task.columns == ("context",) and task.labels == ("0", "1", "2", "3")
    row = task.rows("test")[0]
    given = next(each for each in rows_of() if each["context"] == row.text)
    assert (list(row.choices or ()), row.label) == (given["choices"], given["label"]) and row.pair is None


def test_likelihoods_are_those_of_each_choice_by_itself(task: Task, decoder: tuple[Model, Params]):
    model, params = decoder
    rows = task.rows("test")
    encoded = encode(model, rows, prompt=prompt_of(model, task))
    found = predict(model, params, encoded, batch_size=4)
    tokenizer = model.tokenizer
    expected = np.full(found.shape, -1e9)
    for place, row in enumerate(rows):
        context = tokenizer(row.text)["input_ids"]
        for label, choice in enumerate(row.choices or ()):
            answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            ids = np.pad([*context, *answer], (0, 40 - len(context) - len(answer)))[None]
            mask = np.arange(40)[None] < len(context) + len(answer)
            logits: Any = model.apply(params, {"input_ids": ids, "attention_mask": mask}).logits
            each = jax.nn.log_softmax(logits[0])[len(context) - 1 + np.arange(len(answer)), answer]
            expected[place, label] = each.sum()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)
    result = evaluate(model, params, task, rows=Rows(batch_size=4))
    labels = [row.label for row in rows]
    sizes = np.array([[*map(len, row.choices or ()), 1][:4] for row in rows])
    assert result["accuracy"] == pytest.approx(np.mean(expected.argmax(1) == labels))
    assert result["accuracy_norm"] == pytest.approx(np.mean((expected / sizes).argmax(1) == labels))
    assert result.chance == pytest.approx(np.mean([1 / len(row.choices or ()) for row in rows]))


def test_batches_hold_the_choices_of_their_rows(task: Task, decoder: tuple[Model, Params]):
    model, _ = decoder
    encoded = encode(model, task.rows("test"), prompt=prompt_of(model, task))
    assert encoded.candidates is not None
    for batch in pack(encoded, batch_size=4):
        for index, candidates in zip(batch["index"], batch["candidates"], strict=True):
            if index >= 0:
                own = encoded.candidates[index]
                np.testing.assert_array_equal(candidates, own[:, : candidates.shape[1]])
                assert (own[:, candidates.shape[1] :] == IGNORED).all()
    some = encoded.take([5, 2])
    assert some.candidates is not None
    np.testing.assert_array_equal(some.candidates[1], encoded.candidates[2][:, : some.candidates.shape[2]])
    written = [(encoded.candidates[i, label] != IGNORED).sum() for i, label in enumerate(encoded.labels)]
    assert encoded.mean_length == pytest.approx(encoded.lengths.mean() + np.mean(written) - 1)


def test_a_context_is_cut_at_its_beginning(task: Task, decoder: tuple[Model, Params]):
    model, _ = decoder
    short, whole = (encode(model, task.rows("test"), max_length=n, prompt=prompt_of(model, task)) for n in (4, 30))
    assert short.truncated > 0 and not whole.truncated
    for i in range(len(short)):
        kept, given = (each.input_ids[each.offsets[i] : each.offsets[i + 1]] for each in (short, whole))
        assert kept.tolist()[-3:] == given.tolist()[-3:] and len(kept) == min(4, len(given))


def test_units_are_scored_by_the_right_choice(task: Task, decoder: tuple[Model, Params]):
    model, params = decoder
    scoring = Scoring(criterion=GradientActivation(), rows=Rows(examples=8, batch_size=4))
    scores = score(model, params, task, scoring)
    assert scores.header["head"] == "language"
    turned = [
        replace(row, label=(int(row.label or 0) + 1) % len(row.choices or ())) for row in task.rows("calibration")
    ]
    other = score(model, params, replace(task, splits={**task.splits, "calibration": tuple(turned)}), scoring)
    assert any(not np.array_equal(other.values[name], rows) for name, rows in scores.values.items())


def test_of_a_suffix_alone_the_likelihood_counts(decoder: tuple[Model, Params], tmp_path: Path):
    model, params = decoder
    changes = ({"suffix": f" the {WORDS[i % 8]} mood"} for i in range(90))
    rows = [row | {"context": f"{row['context']} "} | more for row, more in zip(rows_of(), changes, strict=True)]
    task = load_task(write(tmp_path / "rows.jsonl", rows))
    tested, tokenizer = task.rows("test")[:4], model.tokenizer

    def likelihoods(row: Any, choice: str, gates: Any = None) -> jax.Array:
        """The log-likelihoods of the suffix's tokens."""
        before, option, after = (
            tokenizer(part, add_special_tokens=i == 0)["input_ids"]
            for i, part in enumerate((row.text.rstrip(), f" {choice}", row.suffix))
        )
        ids = np.array([before + option + after])
        logits: Any = model.apply(params, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, gates).logits
        return jax.nn.log_softmax(logits[0, -len(after) - 1 : -1])[np.arange(len(after)), np.array(after)]

    encoded = encode(model, tested, prompt=prompt_of(model, task))
    for row, own in zip(tested, predict(model, params, encoded, batch_size=4), strict=True):
        for choice, found in zip(row.choices or (), own, strict=False):
            np.testing.assert_allclose(found, likelihoods(row, choice).sum(), rtol=2e-5, atol=2e-4)
    assert list(evaluate(model, params, task).metrics) == ["accuracy"]
    row = tested[0]
    right = (row.choices or ())[int(row.label or 0)]
    scoring = Scoring(criterion=GradientActivation(examples=signed), rows=Rows(examples=(row,)))
    slopes = jax.grad(lambda gates: jnp.exp(likelihoods(row, right, gates)).sum())(jp.open_gates(model, params))
    for name, value in score(model, params, task, scoring).values.items():
        np.testing.assert_allclose(value, slopes[name], rtol=1e-3, atol=1e-5)


def test_a_suffix_in_some_splits_is_refused(tmp_path: Path):
    write(tmp_path / "train.jsonl", rows_of(40))
    write(tmp_path / "test.jsonl", [row | {"suffix": "at last"} for row in rows_of(20)])
    with pytest.raises(ValueError, match="has a column 'suffix', and other splits have none"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"choices": ["one"]}, "'choices' must be two texts or more, got"),
        ({"choices": "one"}, "'choices' must be two texts or more, got 'one'"),
        ({"choices": ["one", ""]}, "'choices' must be two texts or more"),
        ({"choices": ["one", "two"], "label": 3}, "the label is 3, of 2 choices, counted from 0"),
        ({"label": 9}, "label"),
        ({"label": None}, "label"),
    ],
)
def test_rows_that_are_no_choices(tmp_path: Path, change: dict[str, Any], expected: str):
    rows = rows_of(40)
    rows[7] |= change
    with pytest.raises(ValueError, match=rf"rows.jsonl.*{expected}"):
        load_task(write(tmp_path / "rows.jsonl", rows))


def test_models_and_prompts_that_do_not_fit(task: Task):
    encoder, params = tiny_model("bert")
    with pytest.raises(ValueError, match="use a decoder"):
        encode(replace(encoder, source=ANSWERS), [Example("a", choices=("b", "c"), label=0)])
    with pytest.raises(ValueError, match="has 3 labels, no, maybe, yes"):
        evaluate(replace(encoder, source=ANSWERS), params, task)


def test_the_commands_prune_for_multiple_choice(tmp_path: Path, decoder: tuple[Model, Params]):
    jp.save(tmp_path / "model", *decoder)
    data = write(tmp_path / "asked.jsonl", rows_of())
    asked = ("--task", data, "--batch-size", 4)
    settings = ("--criterion", "gradient-activation", "--examples", 8, "--flops", 0.6, "--recover", "none")
    out = tmp_path / "small"
    run("prune", tmp_path / "model", *asked, *settings, "--measure", 0, "-o", out)
    [result] = record_of("evaluate", out, *asked)["results"]
    assert set(result["metrics"]) == {"accuracy", "accuracy_norm"} and result["n"] > 10


# Free answers


def test_free_answers_are_written_and_compared(decoder: tuple[Model, Params], tmp_path: Path):
    rows = [{"question": f"the film was {i}", "answer": f"good {i % 3}\n#### {i % 3:,}"} for i in range(60)]
    file = write(tmp_path / "sums.jsonl", rows)
    task = load_task(file)
    assert task.choices and task.metric == "exact_match" and task.columns == ("question",)
    model, params = decoder
    prompt = prompt_of(model, task)
    assert prompt is not None and prompt.render(task.rows("test")[0]).endswith("\nAnswer:")
    shown = with_shots(prompt, task, 3)
    assert shown.template.count("####") == 3 and shown.template.endswith(prompt.template)
    found = score(model, params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=8, max_length=32)))
    assert found.header["head"] == "language" and all(np.isfinite(value).all() for value in found.values.values())
    result = evaluate(model, params, task, rows=Rows(max_length=32))
    encoded = encode(model, task.rows("test"), max_length=32, prompt=prompt)
    batch = pack(encoded, batch_size=len(encoded))[0]
    most = model.max_length - batch["input_ids"].shape[1]
    written = texts(model, generate(model, params, batch, max_new_tokens=most))
    answers = [(task.rows("test")[i].choices or ("",))[0] for i in batch["index"]]
    assert result.generated and result.metrics == free_match(written, answers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 2 + 2\n#### 1,234 \nQuestion: more ####", "1234"),
        ("####-5.", "-5"),
        ("#### $1.50", "1.50"),
        (" The answer.\n\nQuestion: what", "answer"),
        ("", ""),
    ],
)
def test_what_is_compared_of_a_free_answer(text: str, expected: str):
    assert final(text) == expected

"""Running text: read, cut into windows, told token by token, scored and pruned."""

from __future__ import annotations

import copy
import json
import shutil
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
from jaxprune.data.batches import encode, pack
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Rows, Task, load_task
from jaxprune.evaluation.evaluate import Evaluation, evaluate
from jaxprune.models import Model
from jaxprune.scoring.attribution import GradientActivation
from jaxprune.scoring.objectives import log_probability, signed
from jaxprune.scoring.run import Scoring, score
from jaxprune.units import Params, open_gates

WORDS = ("the", "film", "was", "good", "bad", "very", "mood", "is")


def paragraphs(count: int = 120, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(5, 30))) + f" {i}" for i in range(count)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    file = tmp_path_factory.mktemp("data") / "book.txt"
    file.write_text("\n\n".join(paragraphs()) + "\n")
    return load_task(file)


@pytest.fixture(scope="module")
def decoder() -> tuple[Model, Params]:
    model, params = tiny_model("llama")
    return replace(model, source=ANSWERS), params


def tokens_of(model: Model, task: Task, split: str) -> list[int]:
    text = "\n\n".join(row.text for row in task.rows(split))
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text_file_is_running_text(task: Task):
    assert task.running and task.windows is None and "running text" in task.notes[0]
    assert set(paragraphs()) == {
        part for rows in task.splits.values() for row in rows for part in row.text.split("\n\n")
    }


def test_rows_without_labels_are_running_text(tmp_path: Path):
    texts = {split: [t for part in paragraphs(seed=i) for t in (part, "")] for i, split in enumerate(("train", "test"))}
    for split, some in texts.items():
        rows = "".join(json.dumps({"text": text, "group": "a"}) + "\n" for text in some)
        (tmp_path / f"{split}.jsonl").write_text(rows)
    found = load_task(tmp_path)
    assert found.running and any("group" in note for note in found.notes)
    assert "\n\n".join(row.text for row in found.rows("test")) == "\n\n".join(texts["test"])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a", "sentiment": 1}], "no column 'label'"),
        ([{"text": "a"}, {"text": 3}], "line 2: 'text' must be text"),
        ([{"text": " "}], "has no text"),
        ([{"text": "a b c"}], "too little to cut"),
    ],
)
def test_what_is_no_running_text(rows: list[dict[str, Any]], expected: str, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=expected):
        load_task(file)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [None, 7])
def test_windows_ask_for_every_token_once(bos: bool, stride: int | None, task: Task, decoder: Any, tmp_path: Path):
    model, _ = decoder
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer = copy.deepcopy(model.tokenizer)
        tokenizer.bos_token = first = tokenizer.convert_ids_to_tokens(3)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{first} $A", special_tokens=[(first, 3)])
        shutil.copytree(ANSWERS, tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        model = replace(model, source=tmp_path / "model")
    cut = jp.windows(model, task, tokens=20, stride=stride)
    assert cut.windows is not None and cut.windows.bos == bos
    ids = tokens_of(model, task, "test")
    windows = [row.window for row in cut.rows("test") if row.window]
    assert all(2 <= len(window.read) + len(window.asked) <= 20 for window in windows)
    assert all(window.read[0] == 3 for window in windows if bos)
    asked, place = [token for window in windows for token in window.asked], 0 if bos else 1
    if stride is None and not bos:  # the first token of each is only read
        expected = [ids[i] for i in range(len(ids)) if i % 20]
        assert asked == expected
        return
    assert asked == ids[place:]
    for window in windows:  # what is read stands right before what is asked for
        read = window.read[bos:]
        assert read == tuple(ids[place - len(read) : place]) and window.asked == tuple(
            ids[place : place + len(window.asked)]
        )
        place += len(window.asked)


def test_the_likelihood_is_that_of_each_window(task: Task, decoder: tuple[Model, Params]):
    model, params = decoder
    cut = jp.windows(model, task, tokens=24, stride=9)
    rows = cut.rows("test")[:6]
    found = evaluate(model, params, cut, rows=Rows(examples=rows, batch_size=3))
    total = count = 0
    for row in rows:
        assert row.window is not None
        ids = np.array([[*row.window.read, *row.window.asked]])
        logits: Any = model.apply(params, {"input_ids": ids, "attention_mask": np.ones_like(ids)}).logits
        each = jax.nn.log_softmax(logits[0, :-1])[np.arange(ids.shape[1] - 1), ids[0, 1:]]
        total += float(each[len(row.window.read) - 1 :].sum())
        count += len(row.window.asked)
    assert found.primary == ("log_likelihood", pytest.approx(total / count, rel=1e-5))
    assert found["perplexity"] == pytest.approx(np.exp(-total / count), rel=1e-4)
    assert found.chance == pytest.approx(-np.log(model.config.vocab)) and "stride 9, no BOS" in str(found)
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_attributions_are_gradients_of_the_likelihood(task: Task, decoder: tuple[Model, Params]):
    model, params = decoder
    cut = jp.windows(model, task, tokens=16)
    rows = cut.rows("calibration")[:3]
    criterion = GradientActivation(objective=log_probability, examples=signed)
    found = score(model, params, cut, Scoring(criterion=criterion, rows=Rows(examples=rows)))
    ids = np.array([[*row.window.read, *row.window.asked] for row in rows if row.window])

    def likelihood(gates: Any) -> jax.Array:
        logits: Any = model.apply(params, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, gates).logits
        each = jax.nn.log_softmax(logits[:, :-1])
        return jnp.take_along_axis(each, ids[:, 1:, None], axis=2).sum() / len(rows)

    slopes = jax.grad(likelihood)({name: jnp.ones_like(gate) for name, gate in open_gates(model, params).items()})
    for name, value in found.values.items():
        np.testing.assert_allclose(value, slopes[name], rtol=1e-3, atol=1e-4)
    assert "windows of 16 tokens" in found.header["prompt"]["name"] and found.header["max_length"] == 16


def test_a_batch_has_as_many_rows_as_there_is_room_for(task: Task, decoder: tuple[Model, Params], monkeypatch: Any):
    model, _ = decoder
    monkeypatch.setattr("jaxprune.data.batches.MOST_LOGITS", 3 * 15 * model.config.vocab)
    cut = jp.windows(model, task, tokens=16)
    encoded = encode(model, cut.rows("test"), prompt=prompt_of(model, cut))
    assert pack(encoded, batch_size=32)[0]["input_ids"].shape[0] == 3


def test_what_windows_refuse(task: Task, decoder: tuple[Model, Params]):
    model, params = decoder
    bert, weights = tiny_model("bert")
    for asked, expected in (
        (lambda: jp.windows(model, task, tokens=1), "2 to"),
        (lambda: jp.windows(model, task, tokens=16, stride=17), "1 to 16"),
        (lambda: jp.windows(bert, task), "for decoders"),
        (lambda: jp.windows(model, jp.windows(model, task)), "already"),
        (lambda: evaluate(model, params, task), "cut it into windows first"),
        (lambda: evaluate(bert, weights, task), "name their column with label="),
        (lambda: evaluate(model, params, jp.windows(model, task), rows=Rows(max_length=9)), "cut shorter ones"),
    ):
        with pytest.raises(ValueError, match=expected):
            asked()


def test_the_command_prunes_for_running_text(decoder: tuple[Model, Params], tmp_path: Path):
    jp.save(tmp_path / "model", *decoder)
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(paragraphs()))
    told = ("--task", file, "--window", 24)
    record = record_of(
        "prune", tmp_path / "model", *told, "--examples", 8, "--criterion", "gradient-activation", "--flops", 0.7,
        "--recover", "reconstruct", "-o", tmp_path / "small",
    )  # fmt: skip
    assert "windows of 24 tokens" in record["prompt"]["name"]
    assert "jp.windows(model, jp.load_task" in (tmp_path / "small" / "README.md").read_text()
    found = record_of("evaluate", tmp_path / "small", *told, "--stride", 8)["results"][0]
    assert found["windows"] == {"tokens": 24, "stride": 8, "bos": False} and found["primary"] == "log_likelihood"
    shown = run("evaluate", tmp_path / "small", *told)
    assert "perplexity" in shown.stdout and "%" not in shown.stdout.split("perplexity")[1].split("\n")[0]
    assert "no running text" not in shown.stderr
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(paragraphs())))
    refused = run("evaluate", tmp_path / "small", "--task", rows, "--window", 24)
    assert refused.exit_code == 2 and "--window" in refused.stderr

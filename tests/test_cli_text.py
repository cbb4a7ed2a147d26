"""The same commands on a text-to-text model: nothing about it is special but the prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import record_of, run, write_rows
from hand_tables import hand_table
from test_likelihood import ANSWERS
from tiny import tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import read_pruning
from jaxprune.pruning.latency import write_table
from jaxprune.units import widths

PROMPT = """\
template: "mood : {sentence} ?"
words:
  good: very good
  bad: bad
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a task and a prompt for it."""
    folder = tmp_path_factory.mktemp("text")
    model, _ = tiny_model("t5", embed=32, neurons=64)
    save(folder / "model", replace(model, source=ANSWERS), model.initialise(jax.random.key(0)))
    for i, (split, rows) in enumerate({"train": 240, "validation": 40, "test": 60}.items()):
        write_rows(folder / "data" / "mood" / f"{split}.jsonl", ("bad", "good"), rows, i)
    (folder / "prompt.yaml").write_text(PROMPT)
    return folder


def asked(place: Path, *, prompt: str = "prompt.yaml") -> tuple[str | Path, ...]:
    return ("--task", "mood", "--data", place / "data", "--prompt", place / prompt)


def test_scored_pruned_inspected_and_asked_again(place: Path, tmp_path: Path):
    scores, small = tmp_path / "scores.safetensors", tmp_path / "small"
    how = ("--criterion", "gradient-activation", "--examples", 16)
    scored = record_of("score", place / "model", *asked(place), *how, "-o", scores)
    assert scored["prompt"]["words"] == ["bad", "very good"] and scored["prompt"]["template"] == "mood : {text} ?"
    read, written = scored["mean_length"]
    assert 7 < read < 16 and 2 < written < 3
    record = record_of(
        "prune", place / "model", "--scores", scores, *asked(place), "--flops", 0.5, "--measure", 2, "-o", small
    )
    assert record["kept"]["flops"] <= 0.5 and record["before"]["length"] == [read, written]
    assert record["before"]["latency"][0]["length"] == [int(np.ceil(read)), 3]
    model, params = load(small)
    assert widths(model.axes, params)["decoder.1.cross.heads"] == 2
    assert read_pruning(small)["settings"]["length"] == [read, written]
    card = (small / "README.md").read_text()
    assert "Prompt(" in card and "mood : {text} ?" in card and "task head" not in card
    table = write_table(tmp_path / "table.json", hand_table(*load(place / "model"), length=(9, 3)))
    planned = record_of("plan", place / "model", "--scores", scores, "--latency", 0.7, "--latency-table", table)
    assert planned["latency"]["length"] == planned["before"]["length"] == [9, 3]
    assert 0.5 < planned["latency"]["predicted"]["ratio"] <= 0.7 and len(planned["layers"]) == 6
    shown = record_of("inspect", small, "--scores", scores)
    assert [row["layer"] for row in shown["layers"]] == [
        "encoder 0",
        "encoder 1",
        "decoder 0",
        "decoder 1",
        "decoder 2",
    ]
    for more in ((), ("--generate",)):
        [found] = record_of("evaluate", small, *asked(place), *more)["results"]
        assert found["n"] == 60 and found["generated"] == bool(more)
    assert found["metrics"]["accuracy"] <= 0.6  # random weights hardly ever write a word and then end


@pytest.mark.slow
def test_a_student_learns_by_the_prompt_and_says_so(place: Path, tmp_path: Path):
    out = tmp_path / "sparse"
    how = ("--steps", 2, "--batch-size", 8, "--prunings", 1, "--sparsity", 0.5, "--limit", 10, "--dev-limit", 10)
    record = record_of("sparsify", place / "model", "--teacher", place / "model", *asked(place), *how, "-o", out)
    assert record["prompt"]["words"] == ["bad", "very good"] and record["heads"] == []
    card = (out / "README.md").read_text()
    assert "Prompt(" in card and "mood : {text} ?" in card and "task head" not in card
    assert record_of("evaluate", out, *asked(place), "--limit", 10)["results"][0]["n"] == 10


@pytest.mark.slow
def test_channels_are_pruned(place: Path, tmp_path: Path):
    kinds = ("--kinds", "channels,query_channels,neurons", "--criterion", "magnitude", "--allocation", "per-layer")
    record = record_of(
        "prune",
        place / "model",
        *asked(place),
        *kinds,
        "--units",
        0.5,
        "--measure",
        0,
        "--no-evaluate",
        "-o",
        tmp_path / "a",
    )
    model, params = load(tmp_path / "a")
    own = params["encoder"]["layers"][0]["attention"]
    assert own["value"]["kernel"].shape[1] == own["query"]["kernel"].shape[1] == 4  # every head, with fewer channels
    assert own["value"]["kernel"].shape[2] < 3 and record["kept"]["prunable_parameters"] < 0.8
    assert np.isfinite(np.asarray(params["decoder"]["layers"][2]["cross"]["out"]["kernel"])).all()
    assert model.answers_in_text
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Neurons, channels of values and channels of queries and keys that the task" in card
    assert f"| units: neurons, channels and query channels | {record['before']['units']:,} |" in card
    assert record["kept"]["units"] == pytest.approx(0.5, abs=0.02) and record["before"]["units"] == 5 * 64 + 8 * 2 * 12
    shown = record_of("inspect", tmp_path / "a", "-o", tmp_path / "a.png")
    assert shown["kinds"] == ["heads", "neurons", "channels", "query_channels"]
    kept = own["value"]["kernel"].shape[2]
    assert shown["layers"][0]["channels"] == [4 * kept, 12] and shown["layers"][0]["heads"] == [4, 4]
    table = run("inspect", tmp_path / "a").stdout
    assert shown["total"]["parameters"] == record["after"]["prunable_parameters"]
    assert "channels" in table and f"{4 * kept}/12" in table


@pytest.mark.slow
def test_finetuned_with_prompts(place: Path, tmp_path: Path):
    how = ("--epochs", 1, "--learning-rate", 0.02, "--optimizer", "adafactor", "--dev-limit", 20)
    record = record_of("finetune", place / "model", *asked(place), *how, "-o", tmp_path / "tuned")
    assert record["recipe"]["optimizer"] == "adafactor" and len(record["epochs"]) == 1
    assert load(tmp_path / "tuned")[0].answers_in_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "flan"), "there is no built-in prompt for the task 'mood'"),
        ((), "there is no built-in prompt for the task 'mood'; give one in a YAML file"),
        (("--prompt", "none.yaml"), "none.yaml"),
    ],
)
def test_a_task_without_a_prompt(place: Path, tmp_path: Path, arguments: tuple[str, ...], message: str):
    result = run("score", place / "model", "--task", "mood", "--data", place / "data", *arguments, "-o", tmp_path / "s")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('template: "mood : {sentence}"\nwords: [bad]\n', "1 words for 2 labels"),
        ('template: "mood : {title}"\nwords: [bad, good]\n', "names the column 'title'"),
        ('template: "mood : {sentence}"\nwords: [bad, splendid]\n', "the word 'splendid' has characters"),
        ('template: "mood"\nwords: [bad, good]\n', "never uses the text"),
        ("template: [1]\n", "prompt.yaml:1"),
    ],
)
def test_a_prompt_that_cannot_be_used(place: Path, tmp_path: Path, content: str, message: str):
    own = tmp_path / "prompt.yaml"
    own.write_text(content)
    data = ("--task", "mood", "--data", place / "data", "--prompt", own)
    result = run("prune", place / "model", *data, "--examples", 8, "--flops", 0.5, "-o", tmp_path / "small")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.strip().count("\n") == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompt.yaml"]


def test_a_length_of_two_numbers(place: Path, tmp_path: Path):
    data = (*asked(place), "--criterion", "magnitude", "--flops", 0.5, "--no-evaluate", "--measure", 0)
    record = record_of("prune", place / "model", *data, "--length", "30,2", "-o", tmp_path / "a")
    assert record["selection"]["length"] == [30.0, 2.0]
    for length, message in (("30", "length must be two numbers"), ("a,b", "--length 'a,b' is no number of tokens")):
        result = run("prune", place / "model", *data, "--length", length, "-o", tmp_path / "b")
        assert result.exit_code == 2 and message in result.stderr
    assert json.loads((tmp_path / "a" / "pruning.json").read_text())["settings"]["length"] == [30.0, 2.0]
    assert not (tmp_path / "b").exists()

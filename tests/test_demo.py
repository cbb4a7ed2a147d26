"""The demo prunes a multi-task model for one task in three ways of equal cost, and tests all of its tasks."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest
from commands import TASKS, WORDS, Place, place, record_of, run, write_rows
from tiny import tiny_model

from jaxprune.bundled import bundled_text_model
from jaxprune.checkpoints.folder import load, save
from jaxprune.cli.demo import VARIANTS, Plan, explain, next_steps
from jaxprune.data.tasks import Rows, load_task
from jaxprune.evaluation.evaluate import evaluate
from jaxprune.models import TaskHead
from jaxprune.scoring.scores import load_scores

__all__ = ["place"]  # a fixture


@pytest.fixture(scope="module")
def data(place: Place):
    """Folders as the bundled ones: calibration, validation and test rows, none to train on; one task without a head."""
    folder = place.folder / "bundled"
    for i, (name, labels) in enumerate({**TASKS, "weather": ("dry", "wet")}.items()):
        for j, (split, rows) in enumerate({"calibration": 140, "validation": 20, "test": 170}.items()):
            write_rows(folder / name / f"{split}.jsonl", labels, rows, 100 + 10 * i + j)
    return folder


@pytest.fixture(scope="module")
def shown(place: Place, data):
    out = place.folder / "demo"
    return out, record_of("demo", "--model", place.model, "--data", data, "--task", "topic", "-o", out)


def test_every_task_with_a_head_is_tested_in_every_variant(place, data, shown):
    _, record = shown
    assert [row["task"] for row in record["tasks"]] == ["topic", "mood"]
    assert [row["n"] for row in record["tasks"]] == [len(load_task("topic", data=data).rows("test")), Plan().other_rows]
    model, params = load(place.model)
    for row in record["tasks"]:
        assert tuple(row["values"]) == VARIANTS
        limit = None if row["task"] == "topic" else Plan().other_rows
        wanted = evaluate(model, params, load_task(row["task"], data=data), rows=Rows(examples=limit))
        assert row["values"]["dense"] == wanted.primary[1]
        assert row["chance"] == wanted.chance


def test_model_scores_and_picture_are_saved(place, data, shown):
    out, record = shown
    model, small = load(out / "model")
    task = load_task("topic", data=data)
    assert evaluate(model, small, task).primary[1] == record["tasks"][0]["values"]["attribution"]
    assert record["kept"]["flops"] <= 0.5
    header = load_scores(out / "topic.scores.safetensors").header
    assert header["examples"] == 128
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "results.json").read_text()) == record


def test_every_site_of_a_kind_keeps_the_same_share(shown):
    out, _ = shown
    sites = json.loads((out / "model" / "pruning.json").read_text())["sites"]
    for kind in ("heads", "neurons"):
        assert len({site["kept"] for name, site in sites.items() if name.endswith(kind)}) == 1


def test_it_can_be_run_again_and_explains_itself(place, data, shown):
    out, record = shown
    result = run("demo", "--model", place.model, "--data", data, "--task", "topic", "-o", out)
    assert result.exit_code == 0, result.stderr
    for word in (*VARIANTS, "chance", "topic", "mood", "MFLOPs", "Next:"):
        assert word in result.stdout
    assert "integrated gradients, 8 nodes" in explain(record)
    assert str(record["tasks"][0]["n"]) in explain(record)


def test_what_to_type_next_can_be_typed(shown):
    _, record = shown
    for line in next_steps(record):
        program, command, *rest = shlex.split(line)
        assert program == "jaxprune"
        known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", run(command, "--help").stdout))
        assert {word for word in rest if word.startswith("-")} <= known


@pytest.mark.slow
def test_a_model_with_one_head_of_another_name(place, data, tmp_path):
    model, params = tiny_model(heads=(TaskHead(name="default", labels=TASKS["topic"], pooling="mean"),))
    save(tmp_path / "model", replace(model, source=WORDS), params)
    record = record_of("demo", "--model", tmp_path / "model", "--data", data, "--task", "topic", "-o", tmp_path / "out")
    assert [row["task"] for row in record["tasks"]] == ["topic"]
    assert "One model, one task." in explain(record) and "other tasks" not in explain(record)
    assert f"--scores {record['files']['scores']}" in next_steps(record)[1] and str(tmp_path) in next_steps(record)[1]


@pytest.mark.slow
def test_a_text_to_text_model(tmp_path):
    model, params = tiny_model("t5", vocab=8000)
    save(tmp_path / "model", replace(model, source=bundled_text_model()), params)
    labels = {"sst2": ("negative", "positive"), "cola": ("unacceptable", "acceptable")}
    for i, (name, own) in enumerate(labels.items()):
        for j, (split, rows) in enumerate({"calibration": 130, "validation": 20, "test": 24}.items()):
            write_rows(tmp_path / "data" / name / f"{split}.jsonl", own, rows, 10 * i + j)
    record = record_of("demo", "--model", tmp_path / "model", "--data", tmp_path / "data", "-o", tmp_path / "out")
    assert [row["task"] for row in record["tasks"]] == ["sst2", "cola"]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert len(record["before"]["length"]) == 2


def test_sst2_is_said_to_be_of_another_domain(shown):
    _, record = shown
    text = " ".join(explain(record | {"task": "sst2", "tasks": [record["tasks"][0] | {"task": "sst2"}]}).split())
    assert "SST-2" in text and "never seen" in text


def test_bad_input(place, data, tmp_path):
    arguments = ("demo", "--model", place.model, "--data", data)
    unknown = run(*arguments, "--task", "weathr", "-o", tmp_path / "out")
    assert unknown.exit_code == 2 and "weather" in unknown.stderr
    headless = run(*arguments, "--task", "weather", "-o", tmp_path / "out")
    assert headless.exit_code == 2 and "task heads" in headless.stderr
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "mine.txt").write_text("keep")
    foreign = run(*arguments, "--task", "topic", "-o", tmp_path / "out")
    assert foreign.exit_code == 2 and "not a folder that jaxprune saved" in foreign.stderr


@pytest.mark.slow
def test_the_demo_of_a_decoder(tmp_path):
    from test_gguf import byte_vocabulary
    from transformers import PreTrainedTokenizerFast

    tokenizer, tokens, _ = byte_vocabulary()
    named = {"bos_token": "<bot>", "eos_token": "<end>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(tmp_path / "tokenizer")
    model, params = tiny_model("llama", vocab=len(tokens))
    save(tmp_path / "model", replace(model, source=tmp_path / "tokenizer"), params)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
    record = record_of("demo", "--model", tmp_path / "model", "-o", tmp_path / "out")
    assert [row["metric"] for row in record["tasks"]] == ["accuracy"] * 3 + ["log_likelihood"]
    assert record["answers"].keys() == {"asked", "dense", "attribution"} and record["kept"]["flops"] <= 0.8
    assert "3 tasks" in explain(record) and (tmp_path / "out" / "comparison.png").stat().st_size > 1000
    assert load(tmp_path / "out" / "model")[0].config.model_type == "llama"

"""The models that come with the package are small, are what their cards say, and do their tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxprune as jp
from jaxprune.evaluation.text import texts

pytestmark = pytest.mark.slow
MODELS = {"model": (jp.bundled_model(), 32e6), "text_model": (jp.bundled_text_model(), 20e6)}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_small(name: str):
    folder, most = MODELS[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= most


@pytest.mark.parametrize("name", MODELS)
def test_the_card_has_the_figures_of_the_results(name: str):
    folder, _ = MODELS[name]
    results, card = json.loads((folder / "results.json").read_text()), (folder / "README.md").read_text()
    assert f"{(folder / 'model.safetensors').stat().st_size:,} bytes" in card
    assert len(results["tasks"]) >= 7
    for task, own in results["tasks"].items():
        dev, test = (100 * own[split]["metrics"][own[split]["primary"]] for split in ("dev", "test"))
        assert f"| {task} | {dev:.1f} | {own['dev']['n']:,} | {test:.1f} | {own['test']['n']:,} |" in card


def test_the_text_model_answers_by_its_prompt():
    model, params = jp.load(jp.bundled_text_model())
    task = jp.load_task("snips", data=jp.bundled_data())
    found = jp.evaluate(model, params, task, rows=jp.Rows(examples=42))
    expected = json.loads((Path(jp.bundled_text_model()) / "results.json").read_text())["tasks"]["snips"]["test"]
    assert found["accuracy"] > expected["metrics"]["accuracy"] - 0.15  # 42 rows are 5 % at one deviation
    prompt, rows = jp.prompts.prompt_for(task), task.rows("test")[:8]
    batch = dict(model.tokenizer([prompt.render(row) for row in rows], padding=True, return_tensors="np"))
    written = texts(model, jp.generate(model, params, batch, max_new_tokens=8))
    assert len(set(written)) > 1 and set(written) <= set(prompt.words)

"""Every command takes a decoder: scored by label words, pruned, repaired, shared, drawn, distilled and asked again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import record_of, run
from test_decoders import ANSWERS
from tiny import tiny_model

import jaxprune as jp

pytestmark = pytest.mark.slow
WORDS = ("the", "film", "was", "very", "mood", "is")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, random = tmp_path_factory.mktemp("decoder"), np.random.default_rng(0)
    model, params = tiny_model("llama")
    jp.save(place / "model", replace(model, source=ANSWERS), params)
    (place / "mood").mkdir()
    for split, count in (("train", 120), ("validation", 24), ("test", 30)):
        rows = []
        for i in range(count):
            label = int(random.integers(2))
            text = f"{' '.join(random.choice(WORDS, 5))} {('bad', 'good')[label]} {split} {i}"
            rows.append(json.dumps({"text": text, "label": ("lost", "won")[label]}) + "\n")
        (place / "mood" / f"{split}.jsonl").write_text("".join(rows))
    (place / "prompt.yaml").write_text('template: "{text} is"\nwords: {lost: bad, won: good}\n')
    return place


@pytest.fixture(scope="module")
def rows(folder: Path) -> tuple[Any, ...]:
    return "--task", "mood", "--data", folder, "--prompt", folder / "prompt.yaml"


@pytest.fixture(scope="module")
def scores(folder: Path, rows: tuple[Any, ...]) -> Path:
    for name in ("gradient-activation", "wanda"):
        record_of("score", folder / "model", *rows, "--examples", 16, "--criterion", name, "-o", folder / name)
    return folder / "gradient-activation"


@pytest.fixture(scope="module")
def pruned(folder: Path, rows: tuple[Any, ...]) -> Path:
    """Pruned, repaired and measured, with a report of the loss."""
    repair = ("--recover", "reconstruct", "--recover-examples", 16)
    how = ("--flops", 0.6, "--examples", 16, "--criterion", "gradient-activation", "--loss-report", *repair)
    record = record_of("prune", folder / "model", *rows, *how, "-o", folder / "small")
    assert record["after"]["latency"] and record["kept"]["flops"] <= 0.6 and record["recovery"]
    return folder / "small"


def test_a_pruned_decoder_answers_and_writes(pruned: Path, rows: tuple[Any, ...]):
    (result,) = record_of("evaluate", pruned, *rows)["results"]
    assert result["head"] == "words" and 0 <= result["metrics"]["accuracy"] <= 1
    (written,) = record_of("generate", pruned, "the film was", "--max-new-tokens", 4)["results"]
    assert isinstance(written["text"], str)


def test_a_decoder_is_drawn_and_compared(folder: Path, pruned: Path, scores: Path):
    record_of("inspect", pruned, "--scores", scores, "-o", folder / "units.png")
    record_of("compare", scores, folder / "wanda", "-o", folder / "overlap.png")
    assert (folder / "units.png").stat().st_size > 1000 < (folder / "overlap.png").stat().st_size


def test_a_decoder_is_planned_and_pruned_by_latency(folder: Path, scores: Path, rows: tuple[Any, ...]):
    for budget in (("--flops", 0.5), ("--cache", 0.5), ("--latency", 0.7)):
        assert record_of("plan", folder / "model", "--scores", scores, *budget)["kept"]
    how = ("--latency", 0.7, "--examples", 16, "--criterion", "gradient-activation", "-o", folder / "fast")
    assert record_of("prune", folder / "model", *rows, *how)["latency_budget"]


def test_a_decoder_is_pruned_in_rounds_shared_and_swept(folder: Path, scores: Path, rows: tuple[Any, ...]):
    how = ("--flops", 0.6, "--examples", 16, "--criterion", "gradient-activation", "--allocation=per-kind")
    assert len(record_of("prune", folder / "model", *rows, *how, "--rounds", 2, "-o", folder / "rounds")["rounds"]) == 2
    record_of("share", folder / "model", "--scores", scores, "--flops", 0.5, "-o", folder / "shared")
    assert record_of("evaluate", f"{folder / 'shared'}#mood", *rows)["results"]
    swept = ("--criterion", "wanda", "--flops", 0.5, "--examples", 16, "--limit", 20, "--seeds", 1)
    assert len(record_of("sweep", folder / "model", *rows, *swept, "-o", folder / "sweep")["rows"]) == 1


def test_a_decoder_learns_from_its_teacher(folder: Path, pruned: Path, rows: tuple[Any, ...]):
    learn = ("--teacher", folder / "model", *rows, "--epochs", 1)
    record = record_of("sparsify", folder / "model", *learn, "--sparsity", 0.8, "-o", folder / "sparse")
    kept = record["weights"]["student"]
    assert kept["linear_maps_not_zero"] < 0.3 * kept["linear_maps"]
    record_of("distill", pruned, *learn, "-o", folder / "taught")  # its groups learn from those they were
    assert jp.load(folder / "taught")[0].config.model_type == "llama"


def test_no_attention_without_a_group_goes_unsaid(folder: Path, scores: Path):
    shown = run("plan", folder / "model", "--scores", scores, "--cache", 0.25, "--allocation=global")
    assert "groups=1" in shown.stdout

"""Files written before the rebuild still load and give the same answers; see tests/data/before/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import record_of

from jaxprune.checkpoints.folder import load
from jaxprune.checkpoints.gates import read_pruning
from jaxprune.checkpoints.shared import load_gates
from jaxprune.scoring.scores import load_scores
from jaxprune.units import flatten, path_name

BEFORE = Path(__file__).parent / "data" / "before"
FACTS = json.loads((BEFORE / "expected.json").read_text())
TEXT = ("--prompt", BEFORE / "prompt.yaml")


@pytest.mark.parametrize("name", FACTS)
def test_models_give_the_same_logits(name: str):
    with np.load(BEFORE / "expected.npz") as stored:
        arrays = dict(stored)
    kind = "t5" if "t5" in name else "bert"
    model, params = load(f"{BEFORE / name}")
    batch = {key.partition(":")[2]: array for key, array in arrays.items() if key.startswith(f"{kind}:")}
    head = None if kind == "t5" else name.partition("#")[2] or "mood"
    logits = np.asarray(model.apply(params, batch, head=head).logits)
    np.testing.assert_allclose(logits, arrays[name], rtol=0, atol=1e-5 * np.abs(arrays[name]).max())


@pytest.mark.parametrize("name", FACTS)
def test_models_are_inspected_and_evaluated_alike(name: str):
    task = name.partition("#")[2] or "mood"
    assert record_of("inspect", BEFORE / name)["total"] == FACTS[name]["units"]
    asked = ("--task", task, "--data", BEFORE / "rows", *(TEXT if "t5" in name else ()))
    [result] = record_of("evaluate", BEFORE / name, *asked)["results"]
    assert result["metrics"] == pytest.approx(FACTS[name]["metrics"], abs=1e-6)


@pytest.mark.parametrize(("scores", "source", "name"), [("mood", "bert", "pruned"), ("text", "t5", "pruned_t5")])
def test_score_files_select_the_same_units(scores: str, source: str, name: str, tmp_path: Path):
    assert (load_scores(BEFORE / f"{scores}.safetensors").means is not None) == (scores == "mood")
    how = ("--flops", 0.5, "--measure", 0, "--no-evaluate")
    record_of("prune", BEFORE / source, "--scores", BEFORE / f"{scores}.safetensors", *how, "-o", tmp_path / "out")
    new, old = read_pruning(tmp_path / "out"), read_pruning(BEFORE / name)
    assert new["sites"] == old["sites"] and new["units"] == old["units"]
    assert new["digests"] == old["digests"]  # of scores, means and gates
    small, expected = (flatten(load(folder)[1]) for folder in (tmp_path / "out", BEFORE / name))
    for path, array in expected.items():
        np.testing.assert_allclose(np.asarray(small[path]), np.asarray(array), atol=1e-6, err_msg=path_name(path))


def test_tasks_are_added_to_a_shared_folder(tmp_path: Path):
    files = [argument for task in ("mood", "topic") for argument in ("--scores", BEFORE / f"{task}.safetensors")]
    record_of("share", BEFORE / "bert", *files, "--flops", 0.5, "-o", tmp_path / "out")
    new, old = load_gates(tmp_path / "out"), load_gates(BEFORE / "shared")
    assert new.keys() == old.keys() == {"mood", "topic"}
    for task, own in old.items():
        assert own.record["scores"] == new[task].record["scores"]
        for site, gate in own.gates.items():
            np.testing.assert_array_equal(np.asarray(new[task].gates[site]), np.asarray(gate))

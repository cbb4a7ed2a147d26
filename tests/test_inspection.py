"""The widths, costs and scores of a model, in table and picture; other models' scores are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import Place, place, record_of, run
from tiny import tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import kept_units, read_pruning, recorded_gates
from jaxprune.compaction import compact
from jaxprune.models.cost import costs
from jaxprune.pruning.inspection import inspect
from jaxprune.pruning.selection import pruning_record
from jaxprune.scoring.scores import load_scores
from jaxprune.sparse.masks import one_shot
from jaxprune.sparse.patterns import linear_maps
from jaxprune.units import widths

__all__ = ["place"]  # a fixture


@pytest.fixture(scope="module")
def scored(place: Place) -> Path:
    file = place.folder / "mood.safetensors"
    rows = ("--task", "mood", "--data", place.data, "--criterion", "random", "--seed", 3)
    assert run("score", place.model, *rows, "-o", file).exit_code == 0
    return file


@pytest.fixture(scope="module")
def small(place: Place, scored: Path) -> Path:
    out = place.folder / "small"
    options = ("--units", 0.4, "--allocation=global", "--measure", "0", "-o", out)
    assert run("prune", place.model, "--scores", scored, *options).exit_code == 0
    return out


def test_a_dense_model_has_all_it_had(place):
    record = record_of("inspect", place.model)
    model, params = load(place.model)
    counted = costs(model, params, 64)
    assert [layer["heads"] for layer in record["layers"]] == [[4, 4]] * 2
    assert [layer["neurons"] for layer in record["layers"]] == [[32, 32]] * 2
    assert record["total"]["parameters"] == counted["prunable_parameters"]
    assert (record["length"], record["flops"]) == (64, counted["flops"])  # the longest text of a tiny model
    assert [layer["flops_share"] for layer in record["layers"]] == [0.5, 0.5]
    assert record["pruned"] is record["scores"] is None


def test_a_pruned_model_has_some_of_what_it_had(small):
    record = record_of("inspect", small)
    model, params = load(small)
    width = widths(model.axes, params)
    for i, layer in enumerate(record["layers"]):
        assert layer["heads"] == [width[f"{i}.attention.heads"], 4]
        assert layer["neurons"] == [width[f"{i}.ffn.neurons"], 32]
    assert record["total"]["parameters"] == costs(model, params, 9)["prunable_parameters"]
    assert sum(layer["flops_share"] for layer in record["layers"]) == pytest.approx(1)
    assert record["pruned"]["units"] == 0.4
    result = run("inspect", small)
    kept = record["layers"][0]["neurons"][0]
    assert re.search(rf"^ *0 +\S+ +{kept}/32 ", result.stdout, re.MULTILINE), result.stdout
    assert "of the y units before pruning" in " ".join(result.stdout.split())
    assert "Task heads: mood, topic." in result.stdout


def test_scores_of_the_model_itself(place, scored):
    record = record_of("inspect", place.model, "--scores", scored)
    values = {name: np.asarray(value, np.float64) for name, value in load_scores(scored).values.items()}
    first = record["layers"][0]
    assert first["mean_scores"]["heads"] == values["0.attention.heads"].mean()
    assert first["mean_scores"]["neurons"] == values["0.ffn.neurons"].mean()
    own = values["0.attention.heads"].sum() + values["0.ffn.neurons"].sum()
    assert first["score_share"] == pytest.approx(own / sum(value.sum() for value in values.values()))
    assert record["length"] == load_scores(scored).header["mean_length"]


def test_scores_that_a_model_was_pruned_by(place, scored, small):
    """The units that stay have the best scores, so their mean is that of the best."""
    values = load_scores(scored).values
    record = record_of("inspect", small, "--scores", scored)
    for i, layer in enumerate(record["layers"]):
        kept = layer["heads"][0]
        best = np.sort(np.asarray(values[f"{i}.attention.heads"], np.float64))[::-1][:kept]
        assert layer["mean_scores"]["heads"] == (pytest.approx(best.mean()) if kept else None)


def test_scores_of_another_model_are_refused(place, small, tmp_path):
    file = tmp_path / "s.safetensors"
    rows = ("--task", "mood", "--data", place.data, "--criterion", "magnitude")
    assert run("score", small, *rows, "-o", file).exit_code == 0
    assert run("inspect", small, "--scores", file).exit_code == 0
    result = run("inspect", place.model, "--scores", file, "-o", tmp_path / "p.png")
    assert result.exit_code == 2
    assert "cannot be used with these parameters" in result.stderr
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(("ending", "dark"), [("png", ()), ("svg", ("--dark",))])
def test_pictures(small, scored, tmp_path, ending, dark):
    out, again = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    record = record_of("inspect", small, "--scores", scored, "-o", out, *dark)
    assert record["picture"] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert run("inspect", small, "--scores", scored, "-o", again, *dark).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    without = run("inspect", small, "-o", out, "--overwrite", *dark)
    assert without.exit_code == 0, without.stderr
    assert again.read_bytes() != out.read_bytes()


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_a_sparse_model_shows_its_zeros(tmp_path, model_type):
    model, params = tiny_model(model_type)
    sparse, _ = one_shot(params, 0.75, prunable=linear_maps(model))
    save(tmp_path / "sparse", model, sparse)
    record = record_of("inspect", tmp_path / "sparse")
    assert [row["zeros"] for row in (*record["layers"], record["total"])] == [0.75] * (len(record["layers"]) + 1)
    shown = run("inspect", tmp_path / "sparse").stdout
    assert shown.count("75.0") == len(record["layers"]) + 1 and max(map(len, shown.splitlines())) <= 80
    save(tmp_path / "dense", model, params)
    assert {row["zeros"] for row in record_of("inspect", tmp_path / "dense")["layers"]} == {None}


def test_bad_input(place, small, tmp_path):
    form = run("inspect", place.model, "-o", tmp_path / "a.jpg")
    assert form.exit_code == 2 and "must end with .png or .svg" in form.stderr
    (tmp_path / "a.png").write_text("mine")
    there = run("inspect", place.model, "-o", tmp_path / "a.png")
    assert there.exit_code == 2 and "--overwrite" in there.stderr
    assert (tmp_path / "a.png").read_text() == "mine"


@pytest.mark.parametrize("which", ["0-99", "3,1", "x", None, "0-9999999999", "0-999999999", "2,2", "1-0"])
def test_a_record_that_does_not_fit_is_refused(small, tmp_path, which):
    out = tmp_path / "small"
    out.mkdir()
    for file in small.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    content: dict[str, Any] = json.loads((out / "pruning.json").read_text())
    content["sites"]["0.ffn.neurons"]["which"] = which
    (out / "pruning.json").write_text(json.dumps(content))
    result = run("inspect", out)
    assert result.exit_code == 2
    assert "0.ffn.neurons" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": [1]}, r"sites is \[1\], expected an object"),
        ({"sites": {"0.ffn.neurons": 3}}, "sites.0.ffn.neurons is 3, expected an object"),
        (
            {"sites": {"0.ffn.neurons": {"had": 10**30, "which": "0"}}},
            "sites.0.ffn.neurons.had is 10+, expected a whole number",
        ),
        ({"sites": {"0.ffn.neurons": {"had": True, "which": "0"}}}, "sites.0.ffn.neurons.had is True"),
        ({"settings": {"length": "16"}}, "settings.length is '16', expected a finite number or a list or null"),
        ({"settings": {"length": 10**400}}, "settings.length is 10"),
        ({"scores": 5}, "scores is 5, expected an object"),
    ],
)
def test_a_record_of_which_an_entry_is_wrong_is_refused_by_its_name(tmp_path, change, message):
    (tmp_path / "pruning.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=rf"pruning.json cannot be used: {message}"):
        read_pruning(tmp_path)


def test_gates_are_not_made_of_more_units_than_a_model_has():
    site = {"had": 2**24 - 1, "which": "0"}
    with pytest.raises(ValueError, match="had 167,772,150 units, expected at most 67,108,864"):
        recorded_gates({"sites": {f"{i}.ffn.neurons": site for i in range(10)}})


def test_units_that_were_exchanged_in_the_record_are_refused(small, tmp_path):
    """As many stay as the weights have, and they are others."""
    out = tmp_path / "small"
    shutil.copytree(small, out)
    content: dict[str, Any] = json.loads((out / "pruning.json").read_text())
    site = content["sites"]["0.ffn.neurons"]
    had, left = kept_units("0.ffn.neurons", site)
    assert 0 < len(left) < had
    gone = next(i for i in range(had) if i not in left)
    site["which"] = ",".join(map(str, sorted([gone, *left[1:]])))
    (out / "pruning.json").write_text(json.dumps(content))
    result = run("inspect", out)
    assert result.exit_code == 2 and "pruning.json names other units than when it was written" in result.stderr


def test_weights_that_changed_since_the_record_are_said(small, tmp_path):
    model, params = load(small)
    out = tmp_path / "small"
    shutil.copytree(small, out)
    assert "not those" not in run("inspect", out).stderr
    save(tmp_path / "other", model, jax.tree.map(lambda array: array * 2, params))
    shutil.copy(tmp_path / "other" / "model.safetensors", out / "model.safetensors")
    result = run("inspect", out)
    assert result.exit_code == 0
    said = " ".join(result.stderr.split())
    assert "are not those that its pruning.json was written with" in said


def test_fractional_gates_and_sites_without_gates_are_told_from_an_edited_record(tmp_path):
    model, params = tiny_model()
    gates = {"0.ffn.neurons": np.linspace(0, 1, 32).astype(np.float32).round(2)}
    scores = {"0.ffn.neurons": gates["0.ffn.neurons"], "1.ffn.neurons": np.ones(32, np.float32)}
    record = json.loads(json.dumps(pruning_record(scores, gates)))
    layers, _ = inspect(model, compact(model, params, gates), pruning=record)
    assert layers["layers"][0]["neurons"] == [31, 32]


@pytest.mark.slow
def test_it_needs_neither_transformers_nor_datasets(small):
    code = f"""
import sys
from jaxprune.__main__ import main
sys.argv = ["jaxprune", "inspect", {str(small)!r}]
try:
    main()
except SystemExit as stop:
    print("IMPORTED", stop.code, *sorted({{name.split(".")[0] for name in sys.modules}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    code, *imported = done.stderr.rpartition("IMPORTED ")[2].split()
    assert code == "0", done.stderr
    assert set(imported) & {"transformers", "datasets", "torch", "matplotlib"} == set()

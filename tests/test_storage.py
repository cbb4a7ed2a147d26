"""`jaxprune pack` writes what `save` writes, counts bytes as they are in the file, and loses no file of the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_classifier
from commands import record_of, run
from test_packing import sparsified
from tiny import tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import read_pruning
from jaxprune.checkpoints.tensors import params_digest
from jaxprune.checkpoints.weights import linear_maps
from jaxprune.units import flatten, path_name

KEPT = {"README.md": b"# card\n", "vocab.txt": b"[PAD]\n"}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a twentieth of the weights in its layers."""
    model, params = tiny_model(embed=32, neurons=64)
    folder = tmp_path_factory.mktemp("place") / "sparse"
    return save(folder, model, sparsified(model, params, 0.05), pruning={"seed": 3}, extra=KEPT)


def test_pack_and_unpack_keep_every_bit_and_every_file(sparse, tmp_path):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    record = record_of("pack", sparse, "-o", packed)
    again = record_of("pack", packed, "--unpack", "-o", dense)
    for name in ("model.safetensors", "pruning.json", "config.json", *KEPT):
        assert (dense / name).read_bytes() == (sparse / name).read_bytes(), name
    names = {file.name for file in sparse.iterdir()}
    assert {file.name for file in packed.iterdir()} == names - {"model.safetensors"} | {"model.safetensors.zst"}
    assert params_digest(load(packed)[1]) == params_digest(load(sparse)[1])
    model, params = load(sparse)
    names = linear_maps(model.axes, params)
    count = sum(array.size for path, array in flatten(params).items() if path_name(path) in names)
    assert record["linear_weights"] == count and record["density"] == pytest.approx(0.05, abs=1e-3)
    assert record["before"] == {"file": (sparse / "model.safetensors").stat().st_size}
    assert record["after"] == {"file": (packed / "model.safetensors.zst").stat().st_size}
    assert record["ratios"]["file"] > 3  # the embeddings stay
    assert (again["before"], again["after"]) == (record["after"], record["before"])


def test_pack_rounds_to_int8_if_asked(sparse, tmp_path):
    record = record_of("pack", sparse, "-o", tmp_path / "out", "--values", "int8")
    assert record["values"] == "int8" and record["ratios"]["file"] > 3
    _, found = load(tmp_path / "out")
    _, exact = load(sparse)
    assert params_digest(found) != params_digest(exact)
    assert read_pruning(tmp_path / "out")["seed"] == 3
    for ours, theirs in zip(flatten(found).values(), flatten(exact).values(), strict=True):
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= np.abs(theirs).max() / 253


def test_pack_shows_bytes_ratio_and_density(sparse, tmp_path):
    result = run("pack", sparse, "-o", tmp_path / "out", "--half")
    assert result.exit_code == 0, result.stderr
    for part in ("the weights", "before", "smaller", "5.0 % of the", "Model: "):
        assert part in result.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["jaxprune"]["dtype"] == "float16"


def test_a_dense_model_of_hugging_face_does_not_become_smaller_without_rounding(tmp_path):
    source = write_classifier(tmp_path / "hf")
    record = record_of("pack", source, "-o", tmp_path / "exact")
    assert record["density"] == 1 and record["ratios"]["file"] < 1.3
    assert params_digest(load(tmp_path / "exact")[1]) == params_digest(load(source)[1])
    result = run("pack", source, "-o", tmp_path / "exact", "--overwrite")
    assert "Without zeros little becomes smaller: --values int8" in " ".join(result.stdout.split())
    assert record_of("pack", source, "-o", tmp_path / "int8", "--values", "int8")["ratios"]["file"] > 1.5


def test_a_model_can_be_packed_over_itself(sparse, tmp_path):
    one = record_of("pack", sparse, "-o", tmp_path / "out")
    two = record_of("pack", tmp_path / "out", "-o", tmp_path / "out", "--overwrite")
    assert two["before"] == two["after"] == one["after"]


def test_files_that_are_not_packed_are_named(sparse, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(sparse, folder)
    (folder / "mine.txt").touch()
    (folder / "vocab.txt").unlink()
    said = " ".join(run("pack", folder, "-o", tmp_path / "out").stderr.split())
    assert "has files that are not there, which are left out: vocab.txt." in said
    assert "has files that its config.json does not list, which are left out: mine.txt." in said
    config = json.loads((folder / "config.json").read_text())
    config["jaxprune"]["files"].append("../elsewhere")
    (folder / "config.json").write_text(json.dumps(config))
    result = run("pack", folder, "-o", tmp_path / "other")
    assert result.exit_code == 2 and "lists '../elsewhere' among its files" in result.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--values", "int4"), "--values is exact or int8, got 'int4'"),
        (("--values", "int8", "--unpack"), "--values says how to pack, but --unpack writes a dense file"),
    ],
)
def test_wrong_options_end_with_one_line_and_nothing_written(sparse, tmp_path, options, message):
    result = run("pack", sparse, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_and_a_taken_folder_end_with_one_line(sparse, tmp_path):
    result = run("pack", sparse, "-o", sparse)
    assert result.exit_code == 2 and "exists already" in result.stderr
    broken = write_classifier(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"{}")
    result = run("pack", broken, "-o", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "model.safetensors" in result.stderr
    assert not (tmp_path / "out").exists()

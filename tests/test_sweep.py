"""A sweep gives what pruning and testing one by one give, in a fixed order, and resumes after an interruption."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import Place, place, record_of, run

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.tensors import sealed
from jaxprune.compaction import compact
from jaxprune.data.tasks import Rows, load_task
from jaxprune.evaluation.evaluate import evaluate
from jaxprune.models.cost import costs, ratios
from jaxprune.pruning.budgets import Flops, Rules
from jaxprune.pruning.inspection import Combination, Sweeping, combinations
from jaxprune.pruning.selection import select
from jaxprune.scoring.criteria import Magnitude, Random
from jaxprune.scoring.scores import load_scores
from jaxprune.units import Intervention

__all__ = ["place"]  # a fixture

TASKS = ("--task", "mood", "--task", "topic")
CRITERIA = ("integrated-gradients", "magnitude", "random")
NAMED = tuple(word for name in CRITERIA for word in ("--criterion", name))
SMALL = ("--examples", 16, "--batch-size", 8, "--limit", 24)
SETTINGS = (*TASKS, *NAMED, *SMALL, "--nodes", 2, "--flops", "0.7,0.4", "--seeds", 2)


def arguments(place: Place, out: Path, *more: Any) -> tuple[Any, ...]:
    return ("sweep", place.model, "--data", place.data, *SETTINGS, "-o", out, *more)


@pytest.fixture(scope="module")
def swept(place: Place) -> tuple[Path, dict[str, Any]]:
    out = place.folder / "sweep"
    return out, record_of(*arguments(place, out))


def bits(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_rows_are_all_combinations_in_order(swept):
    _, record = swept
    seeds = {"integrated-gradients": 2, "magnitude": 1, "random": 2}
    wanted = [
        (task, name, seed, budget)
        for task in ("mood", "topic")
        for name in CRITERIA
        for seed in range(seeds[name])
        for budget in (0.7, 0.4)
    ]
    assert [tuple(row[name] for name in ("task", "criterion", "seed", "flops")) for row in record["rows"]] == wanted
    sweeping = Sweeping(criteria={"m": Magnitude(), "r": Random()}, seeds=2, budgets=[0.5])
    assert combinations(["a"], sweeping) == [
        Combination("a", "m", 0, 0.5),
        Combination("a", "r", 0, 0.5),
        Combination("a", "r", 1, 0.5),
    ]


def test_the_files_hold_the_rows_and_the_scores(swept):
    out, record = swept
    saved = json.loads((out / "results.json").read_text())
    assert saved["rows"] == record["rows"] and saved["settings"] == record["settings"]
    with (out / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in row.items()} for row in record["rows"]] == table
    scored = {(row["task"], row["criterion"], row["seed"]) for row in record["rows"]}
    assert {file.name for file in (out / "scores").iterdir()} == {
        f"{task}.{name}.{seed}.safetensors" for task, name, seed in scored
    }
    for task in ("mood", "topic"):
        assert (out / f"{task}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{task}.svg").read_text()


@pytest.mark.parametrize("name", CRITERIA)
def test_a_row_is_what_pruning_and_testing_give(place, swept, name):
    out, record = swept
    row = [row for row in record["rows"] if (row["task"], row["criterion"]) == ("topic", name)][-1]
    scores = load_scores(out / "scores" / f"topic.{name}.{row['seed']}.safetensors")
    model, params = load(place.model)
    task = load_task("topic", data=place.data)
    small = compact(model, params, select(model, params, scores, Flops(row["flops"])))
    found = evaluate(model, small, task, rows=Rows(examples=24, batch_size=8))
    assert (row["metric"], row["value"]) == found.primary
    assert (row["n"], row["chance"]) == (24, found.chance)
    assert row["dense"] == evaluate(model, params, task, rows=Rows(examples=24, batch_size=8)).primary[1]
    length = scores.header["mean_length"]
    left = ratios(costs(model, params, length), costs(model, small, length))
    assert row["flops_kept"] == pytest.approx(left["flops"], rel=1e-12)
    assert row["units_kept"] == left["units"]
    assert row["parameters_kept"] == pytest.approx(left["parameters"], rel=1e-12)


def test_seeds_draw_other_rows(swept):
    out, _ = swept
    drawn = [load_scores(out / "scores" / f"mood.integrated-gradients.{seed}.safetensors") for seed in (0, 1)]
    assert drawn[0].rows != drawn[1].rows
    assert {scores.header["criterion"]["nodes"] for scores in drawn} == {2}


def test_a_sweep_that_was_stopped_goes_on_to_the_same_bits(place, swept, tmp_path):
    whole, out = swept[0], tmp_path / "sweep"
    shutil.copytree(whole, out)
    record = json.loads((out / "results.json").read_text())
    record["rows"] = record["rows"][:7]  # what the file holds after seven combinations
    (out / "results.json").write_text(json.dumps(sealed(record, {})))
    for file in (*out.glob("topic.*"), out / "results.csv", out / "scores" / "mood.random.0.safetensors"):
        file.unlink()
    result = run(*arguments(place, out))
    assert result.exit_code == 0, result.stderr
    assert bits(out) == bits(whole)


def test_what_is_done_is_not_computed_again(place, swept, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(swept[0], out)
    shutil.rmtree(out / "scores")
    record = json.loads((out / "results.json").read_text())
    record["rows"][3]["value"] = 0.125  # not a multiple of 1 / 24, so computing it would give something else
    (out / "results.json").write_text(json.dumps(sealed(record, {})))
    again = record_of(*arguments(place, out))
    assert again["rows"] == record["rows"]
    assert not (out / "scores").exists()


def test_the_table_shows_mean_and_extremes(place, swept):
    out, record = swept
    result = run(*arguments(place, out))
    row = next(row for row in record["rows"] if row["criterion"] == "magnitude")
    value = f"{100 * row['value']:.1f}"
    share = f"{100 * row['flops_kept']:.1f} %"
    assert re.search(rf"magnitude +{share} +[\d.]+ % +1 +{value} +{value} +{value}", result.stdout), result.stdout
    assert "choices belong to dev" in result.stdout
    assert f"{out}/topic.svg" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--examples", 8), "examples is 8, was 16"),
        (("--flops", "0.5"), r"budgets is \[0.5\], was \[0.7, 0.4\]"),
        (("--split", "dev"), 'split is "dev", was "test"'),
        (("--allocation=global",), 'selection.allocation is "global", was "per_layer"'),
        (("--nodes", 3), "criteria.integrated-gradients.nodes is 3, was 2"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(place, swept, change, message):
    out, before = swept[0], bits(swept[0])
    result = run(*arguments(place, out, *change))
    assert result.exit_code == 2
    assert re.search(f"holds another sweep: .*{message}", result.stderr), result.stderr
    assert bits(out) == before


def test_results_that_were_edited_are_refused(place, swept, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(swept[0], out)
    record = json.loads((out / "results.json").read_text())
    record["rows"][3]["value"] = 0.125
    (out / "results.json").write_text(json.dumps(record))
    result = run(*arguments(place, out))
    assert result.exit_code == 2 and "was edited or is damaged, its checksum is another" in result.stderr


def test_rows_that_changed_do_not_go_on(place, swept, tmp_path):
    """Without case and punctuation they are the same."""
    out, before = swept[0], bits(swept[0])
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    (file,) = data.rglob("topic/test.*")
    file.write_text(re.sub(r"\b(the|a) ", lambda word: word[0].upper(), file.read_text()))
    assert file.read_text() != next(place.data.rglob("topic/test.*")).read_text()
    given = [str(data) if option == str(place.data) else option for option in map(str, arguments(place, out))]
    result = run(*given)
    assert result.exit_code == 2 and "holds another sweep: tasks.topic.test is" in result.stderr
    assert bits(out) == before


def test_another_model_is_refused(place, swept, tmp_path):
    model, params = load(place.model)
    save(tmp_path / "other", model, params | changed(params))
    result = run("sweep", tmp_path / "other", *arguments(place, swept[0])[2:])
    assert result.exit_code == 2
    assert "holds another sweep: model is" in result.stderr


def changed(params: Any) -> dict[str, Any]:
    """The parameters' layers with one value doubled."""
    layers = dict(params["layers"])
    feed = layers[0]["ffn"]
    layers[0] = {**layers[0], "ffn": {**feed, "up": {**feed["up"], "bias": 2 * feed["up"]["bias"]}}}
    return {"layers": layers}


def test_means_of_closed_units_and_global_selection(place, tmp_path):
    options = (
        "--task",
        "mood",
        "--criterion",
        "taylor",
        "--closed",
        "mean",
        "--allocation=global",
        "--multiple-of",
        "neurons=4",
    )
    arguments = (*options, *SMALL, "--flops", 0.5, "--seeds", 1, "--split", "dev", "-o", tmp_path / "out", "--dark")
    (row,) = record_of("sweep", place.model, "--data", place.data, *arguments)["rows"]
    scores = load_scores(tmp_path / "out" / "scores" / "mood.taylor.0.safetensors")
    model, params = load(place.model)
    gates = select(model, params, scores, Flops(0.5), rules=Rules(allocation="global", multiple_of={"neurons": 4}))
    small = compact(model, params, gates, scores.means)
    found = evaluate(
        model, small, load_task("mood", data=place.data), rows=Rows(split="dev", examples=24, batch_size=8)
    )
    assert scores.means
    assert row["value"] == found.primary[1]


def test_top_layers_always_compares_all_layers(place, tmp_path):
    options = ("--task", "mood", "--criterion", "top-layers", "--flops", 0.5, "--seeds", 1, *SMALL, "-o", tmp_path)
    (row,) = record_of("sweep", place.model, "--data", place.data, *options)["rows"]
    scores = load_scores(tmp_path / "scores" / "mood.top-layers.0.safetensors")
    model, params = load(place.model)
    gates = select(model, params, scores, Flops(0.5), rules=Rules(allocation="global"))
    assert (
        row["value"]
        == evaluate(
            model,
            params,
            load_task("mood", data=place.data),
            rows=Rows(examples=24, batch_size=8),
            intervention=Intervention(gates),
        ).primary[1]
    )
    assert {float(gate.sum()) for name, gate in gates.items() if name.startswith("1.")} == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--criterion", "random", "--criterion", "magnitude", "--nodes", 4), "random or magnitude has no --nodes"),
        (("--criterion", "random", "--criterion", "random"), "names one twice"),
        (("--criterion", "tailor"), "Did you mean 'taylor'"),
        (("--criterion", "random", "--flops", "0.5,half"), "--flops takes fractions"),
        (("--criterion", "random", "--flops", "0.5,0.5"), "each once"),
        (("--criterion", "random", "--flops", "1.5"), "takes fractions in 0 to 1"),
        (("--criterion", "random", "--seeds", 0), "seeds must be at least 1"),
        (("--criterion", "random", "--split", "dust"), "split 'dust'"),
        (("--criterion", "random", "--task", "mood"), "must differ in their names"),
    ],
)
def test_bad_input_is_refused_before_any_work(place, tmp_path, change, message):
    result = run("sweep", place.model, "--data", place.data, "--task", "mood", *change, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_other_results_is_refused(place, tmp_path):
    (tmp_path / "results.json").write_text('{"command": "demo"}')
    result = run(*arguments(place, tmp_path))
    assert result.exit_code == 2
    assert "holds no sweep" in result.stderr

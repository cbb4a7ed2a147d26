"""Checks of scores: removal is what closing a unit does, verdicts follow their rules, and checks can fail."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TASKS, VOCABULARY, make_place, record_of, run
from passes import logits_of
from test_cli_text import asked
from test_cli_text import place as text_place
from test_compilations import compiled
from tiny import tiny_batch, tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.data.tasks import Example, Rows, Task, load_task
from jaxprune.evaluation.evaluate import predict
from jaxprune.models import Model
from jaxprune.pruning.checks import (
    Checking,
    check,
    completeness_check,
    correlation_within,
    judge_deletion,
    sample_units,
)
from jaxprune.scoring.attribution import Context, GradientActivation, IntegratedGradients
from jaxprune.scoring.criteria import LeaveOneOut, Magnitude, Removal, TopLayers
from jaxprune.scoring.objectives import calibration_means, every, probability, signed
from jaxprune.scoring.run import Scoring, score, score_batches
from jaxprune.scoring.scores import Scores, load_scores, save_scores
from jaxprune.units import Params, flatten, open_gates, unflatten

__all__ = ["compiled", "text_place"]  # fixtures

FEW = Checking(units=40, examples=24, orders=5, fractions=(0.3, 0.5), limit=60)
LITTLE = ("--units", 40, "--examples", 24, "--orders", 5, "--fractions", "0.3,0.5", "--limit", 60)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of which half of the units do next to nothing, and texts whose labels are what it predicts."""
    made = make_place(tmp_path_factory.mktemp("checks"))
    model, params = load(made.model)
    flat, random = flatten(params), np.random.default_rng(0)
    for path, array in flat.items():
        if path[-2:] in (("out", "kernel"), ("down", "kernel")):  # their first axis is that of the units
            idle = random.permutation(array.shape[0]) < array.shape[0] // 2
            flat[path] = array * np.where(idle, 0.01, 1.0).astype(np.float32).reshape(-1, *[1] * (array.ndim - 1))
    texts = dict.fromkeys(" ".join(random.choice(VOCABULARY, random.integers(4, 12))) for _ in range(1500))
    rows = [Example(text) for text in texts]
    bias = ("heads", "topic", "out", "bias")
    flat[bias] -= predict(model, unflatten(flat), rows, head="topic").mean(0)  # every label is predicted now and then
    params = unflatten(flat)
    made = made._replace(model=save(made.folder / "idle", model, params))
    predicted = predict(model, params, rows, head="topic").argmax(1)
    each = [np.flatnonzero(predicted == label)[:200] for label in range(3)]
    balanced = random.permutation(np.concatenate([own[: min(map(len, each))] for own in each]))
    splits = np.split(balanced, [len(balanced) // 2, 3 * len(balanced) // 4])
    for split, own in zip(("train", "validation", "test"), splits, strict=True):
        lines = [json.dumps({"sentence": rows[i].text, "label": TASKS["topic"][predicted[i]]}) for i in own]
        (made.data / "topic" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return made


@pytest.fixture(scope="module")
def known(place: Any) -> tuple[Model, Params, Task]:
    return *load(place.model), load_task("topic", data=place.data)


@pytest.fixture(scope="module")
def scores(known: tuple[Model, Params, Task]) -> Scores:
    return score(*known, Scoring(criterion=GradientActivation(), rows=Rows(examples=60)))


@pytest.fixture(scope="module")
def files(place: Any, scores: Scores) -> dict[str, Path]:
    model, _ = load(place.model)
    save(place.folder / "other", model, model.initialise(jax.random.key(5)))
    return {
        "model": place.model,
        "data": place.data,
        "other": place.folder / "other",
        "scores": save_scores(place.folder / "s.safetensors", scores),
        "reversed": save_scores(place.folder / "reversed.safetensors", reverse(scores)),
        "strangers": save_scores(
            place.folder / "strangers.safetensors", dataclasses.replace(scores, rows=("0" * 16,) * 60)
        ),
        "own": save_scores(
            place.folder / "own.safetensors",
            changed(scores, objective="mine"),
        ),
        "picture": place.folder / "picture.png",
    }


def changed(scores: Scores, **header: Any) -> Scores:
    return dataclasses.replace(scores, header=dict(scores.header) | header)


def reverse(scores: Scores) -> Scores:
    return dataclasses.replace(scores, values={name: -value for name, value in scores.values.items()})


# removal


@pytest.mark.parametrize("chunk", [3])
def test_removal_is_what_closing_a_unit_does(chunk: int):
    model, params = tiny_model()
    batch = tiny_batch(model, 4) | {"labels": np.array([0, 1, 2, 1], np.int32)}
    units = {"1.ffn.neurons": [3, 0, 31, 7], "0.attention.heads": [2], "0.ffn.neurons": []}
    found = Removal(units=units, chunk=chunk, examples=signed)(model, params, batch).scores
    ones, target = open_gates(model, params), jnp.asarray(batch["labels"])
    end = probability(logits_of(model, params, batch, ones), target)
    assert {name: value.shape for name, value in found.items()} == {name: (4, len(own)) for name, own in units.items()}
    for name, chosen in units.items():
        for i, unit in enumerate(chosen):
            logits = logits_of(model, params, batch, ones | {name: ones[name].at[unit].set(0.0)})
            np.testing.assert_allclose(found[name][:, i], end - probability(logits, target), atol=1e-5)


def test_removal_of_heads_is_leave_one_out_and_of_channels_has_means():
    model, params = tiny_model()
    batch = tiny_batch(model, 4) | {"labels": np.array([0, 1, 2, 1], np.int32)}
    heads = {"0.attention.heads": [0, 3], "1.attention.heads": [1]}
    lost = LeaveOneOut(labels=every)(model, params, batch).scores
    found = Removal(units=heads, labels=every)(model, params, batch).scores
    for name, units in heads.items():
        np.testing.assert_allclose(found[name], lost[name][:, np.array(units)], atol=1e-6)
    means = calibration_means(model, params, [batch], ("channels",))
    criterion = Removal(units={"1.attention.channels": [5]}, closed=calibration_means, examples=signed)
    gates = open_gates(model, params, ("channels",))
    gates["1.attention.channels"] = gates["1.attention.channels"].at[5].set(0.0)
    target = jnp.asarray(batch["labels"])
    end = probability(logits_of(model, params, batch), target)
    without = probability(logits_of(model, params, batch, gates, means=means), target)
    found = criterion(model, params, batch, Context(means=means)).scores["1.attention.channels"]
    np.testing.assert_allclose(found[:, 0], end - without, atol=1e-5)


def test_no_unit_is_compiled_for(compiled: list[int]):
    model, params = tiny_model(layers=1, neurons=40)
    batch = tiny_batch(model, 4) | {"labels": np.array([0, 1, 2, 1], np.int32)}
    seen = []
    for units in ([0, 1, 2, 3], [9, 30, 4, 4], list(range(0, 40, 10)), [39, 38, 37, 36]):
        score_batches(model, params, [batch], Removal(units={"0.ffn.neurons": units}, chunk=2))
        seen.append(compiled[0])
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_units_that_do_not_exist_are_refused():
    model, params = tiny_model(layers=1)
    batch = tiny_batch(model, 3) | {"labels": np.zeros(3, np.int32)}
    with pytest.raises(ValueError, match=r"9.ffn.neurons is not a site of the model"):
        Removal(units={"9.ffn.neurons": [0]})(model, params, batch)
    with pytest.raises(ValueError, match=r"0.ffn.neurons has the units 0 to 31, got 32"):
        Removal(units={"0.ffn.neurons": [32]})(model, params, batch)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        Removal(units={}, chunk=0)


# rules, by hand


def test_units_are_sampled_from_all_sites_alike():
    random = np.random.default_rng(0)
    values = {f"{i}.ffn.neurons": random.random(size) for i, size in enumerate((100, 100, 3, 0))}
    values["0.attention.heads"] = random.random(4)
    found = sample_units(values, 43, seed=1)
    sizes = {name: len(units) for name, units in found.items()}
    assert sizes == {"0.ffn.neurons": 20, "1.ffn.neurons": 20, "2.ffn.neurons": 3, "0.attention.heads": 4}
    assert all(units == sorted(set(units)) for units in found.values())
    ranks = np.argsort(np.argsort(values["0.ffn.neurons"]))[found["0.ffn.neurons"]]
    assert sorted(ranks // 5) == list(range(20))  # one of each twentieth of the ranking
    assert found == sample_units(values, 43, seed=1) != sample_units(values, 43, seed=2)


def test_a_correlation_within_sites_by_hand():
    """Correlations 1 and 0.8 of four units each: mean 0.9, atanh 1.472; variance (1 + 0.405) * 2 / 4, so +- 1.643."""
    pairs = [
        (np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4])),
        (np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])),
        (np.array([1.0, 2, 3]), np.array([3.0, 2, 1])),  # too few
        (np.array([1.0, 2, 3, 4]), np.ones(4)),  # no ranks
    ]
    correlation, interval = correlation_within(pairs)
    assert correlation == pytest.approx(0.9)
    assert interval == pytest.approx((np.tanh(1.4722 - 1.6428), np.tanh(1.4722 + 1.6428)), abs=1e-4)
    assert correlation_within(pairs[2:]) == (None, None)


def test_areas_are_judged_by_what_random_orders_reach():
    """Random areas 0.5, 0.6 and 0.7: mean 0.6, deviation 0.1, so another one lies within 4.3027 * 0.1 * sqrt(4 / 3)."""
    random, spread = [0.5, 0.6, 0.7], 0.43027 * np.sqrt(4 / 3)

    def verdict(own: float, reverse: float, lose: bool = True) -> str:
        found, most = judge_deletion(own, reverse, random, something_to_lose=lose)
        assert most == pytest.approx(0.6 + spread, abs=1e-5)
        return found

    above, below = 0.6 + spread + 0.01, 0.6 - spread - 0.01
    assert verdict(above, 0.3) == "pass"
    assert verdict(above, above + 0.01) == "fail"  # the reversed order is better
    assert verdict(above, above) == "undecided"
    assert verdict(0.7, 0.3) == "undecided"
    assert verdict(0.5, 0.55) == "fail"
    assert verdict(below, below - 0.1) == "fail"
    assert verdict(above, 0.3, lose=False) == "undecided"


def test_completeness_is_read_from_the_header():
    def verdict(**found: Any) -> tuple[str, float | None]:
        own = completeness_check(Scores({}, {"completeness": found or None}))
        return own.verdict, own.value

    assert verdict() == ("does not apply", None)
    assert verdict(relative=0.01, error=0.001, size=0.1) == ("pass", 0.01)
    assert verdict(relative=0.06, error=0.006, size=0.1) == ("fail", 0.06)
    assert verdict(relative=None, error=1e-6, size=1e-5) == ("undecided", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orders": 1}, "orders must be at least 2, got 1"),
        ({"units": 0}, "units must be at least 1, got 0"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"fractions": ()}, r"fractions must lie in \(0, 1\), got \(\)"),
        ({"fractions": (0.5, 1.0)}, r"fractions must lie in \(0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Checking(**settings)


# scores of a model


def test_good_scores_pass_and_reversed_ones_fail(known: tuple[Model, Params, Task], scores: Scores):
    found = {own.name: own for own in check(*known, scores, checking=FEW)}
    assert [own.verdict for own in found.values()] == ["does not apply", "pass", "pass", "pass"], found
    assert found["removal of heads"].facts["units"] == 8  # all there are
    wrong = {own.name: own for own in check(*known, reverse(scores), checking=FEW)}
    assert [own.verdict for own in wrong.values()] == ["does not apply", "fail", "fail", "fail"], wrong
    values = [own["removal of neurons"].value or 0 for own in (found, wrong)]
    assert values[1] == pytest.approx(-values[0], abs=0.05)  # other units are sampled
    areas, turned = found["deletion"].facts["areas"], wrong["deletion"].facts["areas"]
    assert turned["lowest first"] == areas["highest first"] < areas["lowest first"] == turned["highest first"]
    assert {name: area for name, area in areas.items() if "random" in name} == {
        name: area for name, area in turned.items() if "random" in name
    }


def test_true_removal_correlates_with_itself(known: tuple[Model, Params, Task]):
    model, params, task = known
    truth = score(model, params, task, Scoring(criterion=LeaveOneOut(), rows=Rows(examples=24)))
    found = {own.name: own for own in check(model, params, task, truth, checking=FEW)}
    assert found["removal of heads"].value == pytest.approx(1.0)
    assert set(found) == {"completeness", "removal of heads", "deletion"}


@pytest.mark.parametrize(
    "criterion", [Magnitude(), TopLayers(), IntegratedGradients(nodes=2, closed=calibration_means)]
)
def test_other_scores_are_checked_too(known: tuple[Model, Params, Task], criterion: Any):
    found = check(*known, score(*known, Scoring(criterion=criterion, rows=Rows(examples=16))), checking=FEW)
    applies = isinstance(criterion, IntegratedGradients)
    assert (found[0].verdict == "does not apply") == (not applies)
    assert all(own.verdict in ("pass", "fail", "undecided") for own in found[1:])


def test_a_model_at_chance_shows_nothing(known: tuple[Model, Params, Task], scores: Scores):
    model, params, task = known
    dev = tuple(dataclasses.replace(row, label=((row.label or 0) + 1) % 3) for row in task.rows("dev"))
    wrong = dataclasses.replace(task, splits=dict(task.splits) | {"dev": dev})
    [*_, deletion] = check(model, params, wrong, scores, checking=FEW)
    assert deletion.facts["dense"] == 0.0 and deletion.verdict == "undecided"


def test_there_must_be_calibration_rows(known: tuple[Model, Params, Task], scores: Scores):
    model, params, task = known
    none = dataclasses.replace(task, splits=dict(task.splits) | {"calibration": ()})
    with pytest.raises(ValueError, match="'topic' has no calibration rows: the rows that were scored are needed"):
        check(model, params, none, scores, checking=FEW)


# the command


def test_the_command_passes(files: dict[str, Path], tmp_path: Path):
    arguments = ("check", files["model"], "--scores", files["scores"], "--task", "topic", "--data", files["data"])
    picture = tmp_path / "c.svg"
    record = record_of(*arguments, *LITTLE, "-o", picture)
    assert record["verdict"] == "pass" and record["command"] == "check"
    assert [own["name"] for own in record["checks"]] == [
        "completeness", "removal of heads", "removal of neurons", "deletion",
    ]  # fmt: skip
    assert record["checks"][3]["facts"]["fractions"] == [0.3, 0.5]
    assert picture.read_text().lstrip().startswith("<?xml") and record["picture"] == str(picture)


def test_the_command_fails_for_reversed_scores(files: dict[str, Path]):
    arguments = ("check", files["model"], "--scores", files["reversed"], "--task", "topic", "--data", files["data"])
    result = run(*arguments, *LITTLE)
    assert result.exit_code == 1, result.stderr
    assert re.search(r"removal of neurons +fail", result.stdout) and re.search(r"deletion +fail", result.stdout)
    assert "Verdict: fail" in result.stdout and "lowest first" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "error" not in result.stderr


CHECK = ("check", "{model}", "--scores", "{scores}", "--task", "topic", "--data", "{data}")
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "scores of another model": (("check", "{other}", *CHECK[2:]), "belong to another model"),
    "another task": ((*CHECK[:5], "mood", *CHECK[6:]), "the scores are of task 'topic', not of 'mood'"),
    "other rows": ((*CHECK[:3], "{strangers}", *CHECK[4:]), "none of the 1 rows that were scored is among the"),
    "no scores": ((*CHECK[:3], "no", *CHECK[4:]), "no is no file"),
    "no data": ((*CHECK[:7], "no"), "no does not exist"),
    "an objective of one's own": ((*CHECK[:3], "{own}", *CHECK[4:]), "made with objective 'mine', which is none of"),
    "no such rows": ((*CHECK, "--split", "dust", *LITTLE), "no split 'dust'"),
    "one order": ((*CHECK, "--orders", 1), "orders must be at least 2, got 1"),
    "no fractions": ((*CHECK, "--fractions", "few"), "--fractions takes fractions in 0 to 1 such as"),
    "all deleted": ((*CHECK, "--fractions", "1"), r"fractions must lie in \(0, 1\)"),
    "no picture": ((*CHECK, "-o", "picture.jpg"), "must end with .png or .svg"),
    "no task": (CHECK[:4], "Missing option '--task'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(files: dict[str, Path], case: str):
    arguments, message = BAD[case]
    result = run(*(str(argument).format(**files) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("checking")]
    assert len(lines) == 1 and re.search(message, lines[0]), result.stderr


@pytest.mark.slow
def test_a_text_to_text_model_is_checked(text_place: Path, tmp_path: Path):
    file = tmp_path / "s.safetensors"
    how = ("--criterion", "integrated-gradients", "--nodes", 2, "--examples", 16)
    assert run("score", text_place / "model", *asked(text_place), *how, "-o", file).exit_code == 0
    result = run(
        "check", text_place / "model", "--scores", file, *asked(text_place), "--units", 20, "--examples", 8,
        "--orders", 2, "--fractions", "0.5", "--limit", 16, "--json",
    )  # fmt: skip
    assert result.exit_code in (0, 1), result.stderr
    record = json.loads(result.stdout)
    assert [own["name"] for own in record["checks"]][1:3] == ["removal of heads", "removal of neurons"]
    assert record["checks"][1]["facts"]["units"] == 20 and record["checks"][1]["facts"]["sites"] == 8
    prompt = tmp_path / "other.yaml"
    prompt.write_text((text_place / "prompt.yaml").read_text().replace("mood :", "sentiment :"))
    other = run("check", text_place / "model", "--scores", file, *asked(text_place)[:-1], prompt)
    assert other.exit_code == 2 and "of the prompt" in other.stderr


def test_loaded_scores_are_those_that_were_checked(files: dict[str, Path], scores: Scores):
    assert load_scores(files["scores"]).header == scores.header

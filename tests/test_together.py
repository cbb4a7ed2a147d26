"""One model for several tasks: within the budget whatever the way, and by one command that resumes."""

from __future__ import annotations

import bisect
import json
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from choices import chosen
from commands import Place, place, record_of, run, start, wait_for
from tiny import tiny_model

from jaxprune.checkpoints.folder import load, model_digest
from jaxprune.checkpoints.gates import read_pruning
from jaxprune.data.tasks import Rows, load_task
from jaxprune.evaluation.evaluate import evaluate
from jaxprune.pruning.budgets import Flops, Rules, Units
from jaxprune.pruning.pooling import (
    intersection,
    kept_by_all,
    kept_by_any,
    mean_closed,
    mean_length,
    mean_scores,
    pooled,
    union,
)
from jaxprune.pruning.prune import Pruning, prune
from jaxprune.pruning.prune import Together as Way
from jaxprune.pruning.selection import select, thresholds
from jaxprune.scoring.scores import Scores, load_scores, save_scores
from jaxprune.units import Gates, sites, widths

__all__ = ["place"]  # a fixture

WAYS = (pooled, kept_by_any, kept_by_all)
BUDGETS = ("units", "parameters", "flops")
LENGTH = 9
FEW = ("--examples", 16, "--batch-size", 8, "--nodes", 2)
QUICK = (*FEW, "--measure", "0", "--recover", "none")
BOTH = ("--task", "mood", "--task", "topic")


def random_scores(count: int, model_type: str = "bert") -> tuple[Any, Any, list[dict[str, np.ndarray]]]:
    model, params = tiny_model(model_type, layers=3)
    random = np.random.default_rng(count)
    width = widths(model.axes, params)
    return model, params, [{name: random.random(units) for name, units in width.items()} for _ in range(count)]


def spent(costs: dict[str, float], gates: Gates) -> float:
    """The share of all units' costs."""
    total = sum(costs[name] * len(gate) for name, gate in gates.items())
    return sum(costs[name] * float(np.asarray(gate).sum()) for name, gate in gates.items()) / total


def within(a: Gates, b: Gates) -> bool:
    return all((np.asarray(a[name]) <= np.asarray(b[name])).all() for name in b)


def same(a: Gates, b: Gates) -> bool:
    return within(a, b) and within(b, a) and list(a) == list(b)


# laws


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("way", WAYS)
def test_the_budget_is_spent_and_never_exceeded(way: Way, name: str, allocation: str):
    model, params, scores = random_scores(3)
    costs = chosen(**{name: 1.0}, length=LENGTH)["budget"].unit_costs(model, params)
    block = max(costs.values()) / sum(costs[site] * units for site, units in widths(model.axes, params).items())
    smaller = None
    for fraction in (0.05, 0.3, 0.5, 0.51, 0.8, 1.0):
        gates = way(model, params, scores, **chosen(**{name: fraction}, length=LENGTH, allocation=allocation))
        assert fraction - block < spent(costs, gates) <= fraction + 1e-9
        assert list(gates) == [site.name for site in sites(model.axes, params)]
        assert smaller is None or within(smaller, gates)  # a larger budget keeps all of a smaller one
        smaller = gates


@pytest.mark.parametrize("way", WAYS)
def test_encoder_and_decoder_share_one_budget(way: Way):
    model, params, scores = random_scores(2, "t5")
    length = (9.5, 3.0)
    gates = way(model, params, scores, Flops(0.5, length=length))
    assert 0.48 < spent(Flops(1.0, length=length).unit_costs(model, params), gates) <= 0.5 + 1e-9


@pytest.mark.parametrize("allocation", ["per_layer", "global"])
@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize(("way", "join"), [(kept_by_any, union), (kept_by_all, intersection)])
def test_union_and_intersection_are_those_at_the_largest_budget_that_fits(way, join, name, allocation):
    model, params, scores = random_scores(2)
    costs, budget = chosen(**{name: 1.0}, length=LENGTH)["budget"].unit_costs(model, params), 0.4
    settings: dict[str, Any] = {"length": LENGTH, "allocation": allocation}
    found = [thresholds(model, params, own, **chosen(**settings, **{name: 1.0})) for own in scores]
    steps = sorted({float(b) for own in found for site in own.values() for b in site})  # where something changes

    def joined(step: int) -> Gates:
        at = {**settings, name: min(1.0, steps[step])}
        return join(*(select(model, params, own, **chosen(**at)) for own in scores))

    first = bisect.bisect(range(len(steps)), budget + 1e-9, key=lambda step: spent(costs, joined(step)))
    gates = way(model, params, scores, **chosen(**settings, **{name: budget}))
    assert 0 < first < len(steps)
    assert within(joined(first - 1), gates) and within(gates, joined(first))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{"units": 0.4}, {"flops": 0.6, "length": LENGTH, "allocation": "global"}])
def test_several_equal_tasks_are_one(way, settings):
    model, params, (scores,) = random_scores(1)
    assert same(
        way(model, params, [scores] * 3, **chosen(**settings)), select(model, params, scores, **chosen(**settings))
    )
    other = {name: value + 0.01 for name, value in scores.items()}
    assert same(
        way(model, params, [scores, other], **chosen(**settings)),
        way(model, params, [other, scores], **chosen(**settings)),
    )


@pytest.mark.parametrize("way", WAYS)
def test_settings_hold_for_the_result(way):
    model, params, scores = random_scores(2)
    settings: dict[str, Any] = {"multiple_of": {"neurons": 8}, "floor": {"heads": 2}, "protect": ("1.ffn.neurons",)}
    gates = way(model, params, scores, **chosen(units=0.6, **settings))
    kept = {name: int(np.asarray(gate).sum()) for name, gate in gates.items()}
    assert all(count % 8 == 0 for name, count in kept.items() if name.endswith("neurons"))
    assert all(count >= 2 for name, count in kept.items() if name.endswith("heads"))
    assert kept["1.ffn.neurons"] == 32
    assert sum(kept.values()) <= 0.6 * 3 * 36


def test_sites_without_scores_stay():
    model, params, scores = random_scores(2)
    heads = [{name: value for name, value in own.items() if name.endswith("heads")} for own in scores]
    for way in WAYS:
        gates = way(model, params, heads, Units(0.95))
        assert all(np.asarray(gate).all() for name, gate in gates.items() if name.endswith("neurons"))
        assert sum(float(np.asarray(gate).sum()) for gate in gates.values()) == int(0.95 * 3 * 36)


# numbers by hand


def test_every_task_weighs_the_same():
    """Totals 4 and 100: a quarter, half and a quarter, and a tenth, none and nine tenths; their means."""
    one = {"0.attention.heads": jnp.asarray([1.0, -2.0]), "0.ffn.neurons": jnp.asarray([1.0])}
    other = {"0.attention.heads": jnp.asarray([10.0, 0.0]), "0.ffn.neurons": jnp.asarray([90.0])}
    found = mean_scores([one, other])
    np.testing.assert_allclose(found["0.attention.heads"], [0.175, -0.25])
    np.testing.assert_allclose(found["0.ffn.neurons"], [0.575])
    nothing = {name: 0 * value for name, value in one.items()}
    np.testing.assert_allclose(mean_scores([one, nothing])["0.attention.heads"], [0.125, -0.25])


def test_lengths_and_closed_values_are_means():
    means = [{"0.ffn.neurons": jnp.asarray(value)} for value in ([1.0, 2.0], [3.0, 0.0])]
    scores = [Scores({}, {"mean_length": length}, own) for length, own in zip((4, 9.0), means, strict=True)]
    np.testing.assert_allclose((mean_closed(scores) or {})["0.ffn.neurons"], [2.0, 1.0])
    assert mean_length(scores) == 6.5
    assert mean_length([Scores({}, {"mean_length": own}) for own in ([4, 2], [6, 4.0])]) == [5.0, 3.0]
    assert mean_closed([Scores({}, {}), Scores({}, {})]) is None
    with pytest.raises(ValueError, match="score all with the same --closed"):
        mean_closed([scores[0], Scores({}, {})])


def test_rules_for_channels_are_accepted_and_refused_alike_with_one_and_with_two_tasks(place):
    model, params = load(place.model)
    tasks = [load_task(name, data=place.data) for name in ("mood", "topic")]
    channels = widths(model.axes, params, ("channels", "query_channels"))
    digest = model_digest(model, params)
    header = {"model": digest, "mean_length": 9.0, "head": "mood", "rows": [], "criterion": {"name": "Random"}}
    scores = [
        Scores(
            {name: jnp.arange(units, dtype=jnp.float32) for name, units in channels.items()}, header | {"task": name}
        )
        for name in ("mood", "topic")
    ]
    for count in (1, 2):
        rules = Rules(multiple_of={"channels": 2, "query_channels": 2}, allocation="per_layer")
        settings = Pruning(rules=rules, recovery=None)
        pruned = prune(model, params, tasks[:count], Units(0.8), settings, scores=scores[:count])
        heads = widths(model.axes, params)["0.attention.heads"]
        assert all(int(gate.sum()) % (2 * heads) == 0 for name, gate in pruned.gates.items() if name in channels)
        refused = replace(settings, rules=Rules(multiple_of={"heads": 2}))
        with pytest.raises(ValueError, match=r"multiple_of names \['heads'\]"):
            prune(model, params, tasks[:count], Units(0.8), refused, scores=scores[:count])


# the command


@pytest.fixture(scope="module")
def scored(place: Place) -> dict[str, Path]:
    files = {name: place.folder / f"{name}.safetensors" for name in ("mood", "topic")}
    for name, file in files.items():
        assert run("score", place.model, "--task", name, "--data", place.data, *FEW, "-o", file).exit_code == 0
    mood = load_scores(files["mood"])
    for name, other in {
        "other": Scores(mood.values, {**mood.header, "model": "f" * 64}),
        "closed": Scores(mood.values, mood.header, {"0.ffn.neurons": jnp.ones(32)}),
    }.items():
        files[name] = save_scores(place.folder / f"{name}.safetensors", other)
    return files


@pytest.fixture(scope="module")
def pruned(place: Place) -> tuple[Path, dict[str, Any]]:
    out = place.folder / "both"
    options = ("--data", place.data, *QUICK, "--limit", 20, "--flops", 0.5, "-o", out)
    return out, record_of("prune", place.model, *BOTH, *options)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_prune_for_two_tasks_scores_both_and_tests_both(place, scored, pruned):
    out, record = pruned
    for name in ("mood", "topic"):
        kept = place.folder / f"both.{name}.scores.safetensors"
        assert kept.read_bytes() == scored[name].read_bytes()
    assert not (place.folder / "both.scores.safetensors").exists()
    assert record["together"] == "pooled"
    assert [(own["task"], own["head"]) for own in record["tasks"]] == [("mood", "mood"), ("topic", "topic")]
    assert [own["labels"] for own in record["tasks"]] == [["bad", "good"], ["animal", "sky", "text"]]
    assert record["kept"]["flops"] <= 0.5 and not {"task", "criterion", "scores"} & record.keys()
    for when, (model, params) in {"before": load(place.model), "after": load(out)}.items():
        wanted = [
            evaluate(model, params, load_task(n, data=place.data), rows=Rows(examples=20)).to_json()
            for n in ("mood", "topic")
        ]
        assert record[when]["evaluations"] == json.loads(json.dumps(wanted))
        assert "evaluation" not in record[when]


def test_pruning_json_and_the_card_name_all_tasks(scored, pruned):
    out, record = pruned
    pruning = read_pruning(out)
    assert [header["task"] for header in pruning["scores"]["tasks"]] == ["mood", "topic"]
    assert pruning["scores"]["model"] == load_scores(scored["mood"]).header["model"]
    assert all("rows" not in header for header in pruning["scores"]["tasks"])
    assert len(set(pruning["digests"]["scores"])) == 2
    assert pruning["settings"] == record["selection"] and pruning["settings"]["together"] == "pooled"
    assert pruning["results"]["after"]["evaluations"] == record["after"]["evaluations"]
    card = (out / "README.md").read_text()
    assert "pruned for `mood` and `topic`" in card
    assert "the tasks `mood` and `topic` together need least" in card
    assert "heads `mood` and `topic` are for these tasks" in card
    assert len(re.findall(r"- Criterion for `(?:mood|topic)`: `IntegratedGradients`", card)) == 2
    assert "Labels of `topic`, in the order of the logits: `animal`, `sky`, `text`." in card
    assert "jaxprune evaluate FOLDER --task mood --task topic" in card
    assert card.count("20 test examples") == 2
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(out)), names)
    assert names["logits"].shape == (1, 2)


def test_a_model_for_two_tasks_can_be_inspected_with_the_scores_of_either(scored, pruned):
    for name in ("mood", "topic"):
        assert record_of("inspect", pruned[0], "--scores", scored[name])["pruned"]["together"] == "pooled"


@pytest.mark.parametrize(("name", "way"), [("pooled", pooled), ("union", kept_by_any), ("intersection", kept_by_all)])
def test_from_scores_as_the_library_does_it(place, scored, pruned, tmp_path, name, way):
    files = ("--scores", scored["mood"], "--scores", scored["topic"])
    options = ("--together", name, "--flops", 0.5, "--measure", "0", "-o", tmp_path / "small")
    record = record_of("prune", place.model, *files, *options)
    assert "evaluations" not in record["before"]
    model, params = load(place.model)
    scores = [load_scores(scored[task]) for task in ("mood", "topic")]
    length = float(np.mean([own.header["mean_length"] for own in scores]))
    gates = way(model, params, [own.values for own in scores], Flops(0.5, length=length))
    assert record["widths"] == {site: [len(gate), int(gate.sum())] for site, gate in gates.items()}
    which = {site: own["which"] for site, own in read_pruning(tmp_path / "small")["sites"].items()}
    for site, gate in gates.items():
        assert [unit for unit in range(len(gate)) if gate[unit]] == units_of(which[site])
    assert record["together"] == way.__name__
    assert (weights(tmp_path / "small") == weights(pruned[0])) == (name == "pooled")


def units_of(text: str) -> list[int]:
    pairs = [part.split("-") for part in text.split(",") if part]
    return [unit for pair in pairs for unit in range(int(pair[0]), int(pair[-1]) + 1)]


def test_one_score_file_may_be_tested_on_several_tasks(place, scored, tmp_path):
    options = ("--scores", scored["mood"], "--units", 0.5, "--limit", 10, "--measure", "0", "--allocation", "per-layer")
    record = record_of("prune", place.model, *options, *BOTH, "--data", place.data, "-o", tmp_path / "two")
    one = record_of("prune", place.model, *options, "--task", "mood", "--data", place.data, "-o", tmp_path / "one")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert [own["task"] for own in record["after"]["evaluations"]] == ["mood", "topic"]
    assert record["after"]["evaluations"][0] == one["after"]["evaluation"]
    assert [own["task"] for own in record["tasks"]] == ["mood"]


def test_a_table_for_two_tasks(place, tmp_path):
    options = ("--data", place.data, *QUICK, "--limit", 10, "--units", 0.5, "-o", tmp_path / "small")
    result = run("prune", place.model, *BOTH, *options)
    assert result.exit_code == 0, result.stderr
    for text in ("mood, 10 test examples", "topic, 10 test examples", "small.mood.scores.safetensors, "):
        assert text in result.stdout
    assert "testing before, topic" in result.stderr


def test_rows_that_another_task_holds_out_are_not_scored(place, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    leaked = (data / "topic" / "test.jsonl").read_text().splitlines()[:5]
    with (data / "mood" / "train.jsonl").open("a") as stream:
        stream.writelines(json.dumps(json.loads(line) | {"label": "bad"}) + "\n" for line in leaked)
    result = run("prune", place.model, *BOTH, "--data", data, *QUICK, "--units", 0.5, "-o", tmp_path / "small")
    assert result.exit_code == 0, result.stderr
    assert "mood: 5 rows dropped, held out in topic" in result.stderr


@pytest.mark.slow
def test_an_interrupted_run_goes_on_after_the_scores_that_are_finished(place, tmp_path):
    settings = (*BOTH, "--data", place.data, "--examples", 40, "--batch-size", 1, "--path", "layer", "--units", 0.5)
    arguments = ("prune", place.model, *settings, "--measure", "0", "--limit", 10, "-o")
    out = tmp_path / "small"
    mood, topic = (tmp_path / f"small.{name}.scores.safetensors" for name in ("mood", "topic"))
    process = start(*arguments, out)
    wait_for(topic.with_name(f"{topic.name}.partial").exists, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert mood.exists() and not topic.exists() and not out.exists()
    made = mood.stat().st_mtime_ns

    again = run(*arguments, out)
    assert again.exit_code == 0, again.stderr
    assert again.stderr.count("of an earlier run with the same settings") == 1
    assert mood.stat().st_mtime_ns == made and topic.exists()
    assert not list(tmp_path.glob("*.partial"))
    assert run(*arguments, tmp_path / "whole").exit_code == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert topic.read_bytes() == (tmp_path / "whole.topic.scores.safetensors").read_bytes()


TASKS = ("prune", "{model}", "--data", "{data}", *BOTH, "-o", "{new}")
SCORES = ("prune", "{model}", "-o", "{new}", "--units", "0.5", "--scores", "{mood}")
BAD: dict[str, tuple[Sequence[Any], str]] = {
    "the same task twice": ((*TASKS, "--units", 0.5, "--task", "mood"), "tasks must differ.*got mood, topic, mood"),
    "the same file twice": ((*SCORES, "--scores", "{topic}", "--scores", "{mood}"), "mood.safetensors is named twice"),
    "scores of another model": (
        (*SCORES, "--scores", "{other}"),
        "mood.safetensors and .*other.safetensors hold scores of different models",
    ),
    "all of another model": (("prune", "{small}", *SCORES[2:], "--scores", "{topic}"), "cannot be used with these"),
    "other closed values": ((*SCORES, "--scores", "{closed}"), "same --closed"),
    "together with none": ((*SCORES, "--together", "union"), "--together is for several tasks"),
    "unknown way": ((*TASKS, "--units", 0.5, "--together", "both"), "none of pooled, union, intersection"),
    "a head of other labels": ((*TASKS, "--units", 0.5, "--head", "mood"), "the head 'mood' has 2 labels"),
    "scores and scoring": ((*SCORES, "--scores", "{topic}", "--nodes", 4), "--nodes"),
    "rows of nothing": ((*SCORES, "--scores", "{topic}", "--limit", 4), "--limit: for testing"),
    "layers compared within a layer": (
        (*TASKS, "--units", 0.5, "--criterion", "top-layers", "--allocation", "per-layer"),
        "top-layers.*--allocation global",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(place, scored, pruned, tmp_path, case):
    arguments, message = BAD[case]
    names = {"model": place.model, "data": place.data, "new": tmp_path / "new", "small": pruned[0], **scored}
    result = run(*(str(argument).format(**names) for argument in arguments))
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("jaxprune: error: ") and re.search(message, line), line
    assert list(tmp_path.iterdir()) == []

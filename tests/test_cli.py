"""The commands do what the library does, print what was asked for, refuse bad input in one line, and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import classifier_config, classifier_tensors, write_checkpoint
from commands import WORDS, Place, interruptible, place, record_of, run, start, wait_for
from hand_tables import hand_table
from tiny import tiny_batch, tiny_model

from jaxprune import __version__
from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import read_pruning, recorded_gates
from jaxprune.checkpoints.tensors import TensorFile
from jaxprune.cli import options
from jaxprune.data.tasks import Rows, load_task, remove_leaks
from jaxprune.evaluation.evaluate import evaluate
from jaxprune.models import TaskHead
from jaxprune.pruning.budgets import Flops
from jaxprune.pruning.latency import write_table
from jaxprune.pruning.selection import select
from jaxprune.scoring import attribution
from jaxprune.scoring import criteria as baselines
from jaxprune.scoring.objectives import predicted
from jaxprune.scoring.run import Scoring, score
from jaxprune.scoring.scores import load_scores
from jaxprune.units import widths

__all__ = ["place"]  # a fixture

FEW = ("--examples", 16, "--batch-size", 8, "--nodes", 2)
QUICK = (*FEW, "--measure", "0", "--recover", "none")


@pytest.fixture(scope="module")
def scored(place: Place) -> Path:
    file = place.folder / "mood.safetensors"
    assert run("score", place.model, "--task", "mood", "--data", place.data, *FEW, "-o", file).exit_code == 0
    return file


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# what the commands do


def test_score_writes_what_the_library_scores(place, tmp_path):
    out = tmp_path / "s.safetensors"
    options = ("--seed", 3, "--labels", "predicted", "--path", "layer")
    record = record_of("score", place.model, "--task", "mood", "--data", place.data, *FEW, *options, "-o", out)
    model, params = load(place.model)
    criterion = attribution.IntegratedGradients(nodes=2, labels=predicted, path=attribution.layer)
    task = load_task("mood", data=place.data)
    wanted = score(model, params, task, Scoring(criterion=criterion, rows=Rows(examples=16, key=3, batch_size=8)))
    found = load_scores(out)
    assert found.header == wanted.header
    for name, value in wanted.values.items():
        np.testing.assert_array_equal(found.values[name], value)
    assert record["output"] == str(out)
    assert record["criterion"] == wanted.header["criterion"]
    assert record["units"] == 2 * (4 + 32)
    assert not list(tmp_path.glob("*.partial"))


def test_score_says_what_comes_next(place, tmp_path):
    result = run("score", place.model, "--task", "mood", "--data", place.data, *FEW, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "completeness" in result.stdout
    assert f"jaxprune prune {place.model} --scores" in result.stdout
    assert "scoring mood: 2 of 2" in result.stderr


def test_prune_from_scores_and_on_the_way_give_the_same_model(place, scored, tmp_path):
    rows = ("--task", "mood", "--data", place.data)
    one = record_of("prune", place.model, "--scores", scored, "--flops", 0.5, "-o", tmp_path / "a", "--measure", "0")
    asked = (*rows, *QUICK, "--allocation", "per-layer", "--flops", 0.5)
    two = record_of("prune", place.model, *asked, "-o", tmp_path / "b")
    assert one["recovery"] is None and two["recovery"] is None
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert "evaluation" not in one["before"]
    assert one["widths"] == two["widths"]
    model, params = load(place.model)
    gates = select(model, params, load_scores(scored), Flops(0.5))
    small = load(tmp_path / "a")[1]
    assert widths(model.axes, small) == {name: int(gate.sum()) for name, gate in gates.items()}


def test_the_record_of_prune_holds_ratios_and_speedups(place, tmp_path):
    out = tmp_path / "small"
    rows = ("--task", "mood", "--data", place.data, "--limit", 20, "--measure", "2,3", "--length", 12)
    record = record_of("prune", place.model, *rows, *FEW, "--flops", 0.5, "-o", out)
    before, after = record["before"], record["after"]
    model, params = load(place.model)
    task = load_task("mood", data=place.data)
    assert before["evaluation"] == json.loads(
        json.dumps(evaluate(model, params, task, rows=Rows(examples=20)).to_json())
    )
    assert after["evaluation"] == json.loads(json.dumps(evaluate(*load(out), task, rows=Rows(examples=20)).to_json()))
    assert before["units"] == 72
    assert record["kept"]["flops"] == after["flops"] / before["flops"] <= 0.5
    assert record["kept"]["file_bytes"] == len(weights(out)) / len(weights(place.model))
    assert record["speedup"]["theoretical"] == before["flops"] / after["flops"]
    assert [found["batch"] for found in record["speedup"]["measured"]] == [2, 3]
    assert {found["length"] for found in (*before["latency"], *after["latency"])} == {12}
    assert all(0 < found["median"] <= found["p95"] for found in before["latency"])
    assert read_pruning(out)["settings"]["flops"] == 0.5
    assert read_pruning(out)["results"]["after"]["evaluation"] == after["evaluation"]


def test_prune_ends_with_a_table(place, scored, tmp_path):
    result = run(
        "prune", place.model, "--scores", scored, "--task", "mood", "--data", place.data, "--parameters", 0.4,
        "-o", tmp_path / "small", "--measure", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for row in ("accuracy, %", "units: heads and neurons", "parameters of units", "parameters, all", "MFLOPs", "MB"):
        assert row in result.stdout
    assert re.search(r"latency, ms, 2 x \d+ tokens +[\d.]+ +[\d.]+ +[\d.]+ x", result.stdout)
    assert "95th percentile" in result.stdout
    assert "CPU" in result.stdout


@pytest.mark.parametrize("method", ["bias", "rescale", "reconstruct"])
def test_prune_recovers_what_it_cut(place, scored, tmp_path, method):
    rows = ("--task", "mood", "--data", place.data, "--limit", 20, "--measure", "0", "--flops", 0.4)
    arguments = ("prune", place.model, "--scores", scored, *rows)
    record = record_of(*arguments, "--recover", method, "--recover-examples", 24, "-o", tmp_path / "repaired")
    plain = record_of(*arguments, "--recover", "none", "-o", tmp_path / "plain")
    found = record["recovery"]
    assert plain["recovery"] is None and found["examples"] == 24
    assert all(own["after"] <= own["before"] for own in found["modules"].values())
    assert any(own["after"] < own["before"] for own in found["modules"].values())
    assert weights(tmp_path / "repaired") != weights(tmp_path / "plain")
    assert read_pruning(tmp_path / "repaired")["recovery"] == found
    assert found["method"]["name"] in (tmp_path / "repaired" / "README.md").read_text()


def test_a_model_that_is_scored_on_the_way_is_repaired(place, scored, tmp_path):
    rows = ("--task", "mood", "--data", place.data, "--flops", 0.5, "--no-evaluate", "--measure", "0")
    scoring = record_of("prune", place.model, *FEW, *rows, "-o", tmp_path / "a")
    assert scoring["recovery"]["method"]["name"] == "Reconstruction"
    asked = ("--recover", "reconstruct", *FEW[2:4])
    by_file = record_of("prune", place.model, "--scores", scored, *rows, *asked, "-o", tmp_path / "b")
    again = record_of("prune", place.model, *FEW, *rows, *asked[:2], "-o", tmp_path / "c")
    assert by_file["recovery"] == scoring["recovery"] == again["recovery"]
    plain = record_of("prune", place.model, "--scores", scored, *rows, "-o", tmp_path / "e")
    assert plain["recovery"] is None  # a file needs no rows
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")
    one_by_one = run("prune", place.model, *FEW, *rows, "--batch-size", 1, "-o", tmp_path / "d")
    assert one_by_one.exit_code == 0, one_by_one.stderr  # what is not asked for refuses no batch size


def test_recovery_from_few_rows_warns(place, scored, tmp_path):
    rows = ("--task", "mood", "--data", place.data, "--no-evaluate", "--measure", "0", "--flops", 0.9)
    how = ("--recover", "reconstruct", "--recover-examples", 4, "--max-length", 6)
    result = run("prune", place.model, "--scores", scored, *rows, *how, "-o", tmp_path / "small")
    assert result.exit_code == 0, result.stderr
    assert "Warning: " in result.stderr and "more inputs than there are tokens" in " ".join(result.stderr.split())


@pytest.mark.parametrize(("option", "name"), [("--recover-examples", "examples"), ("--batch-size", "batch_size")])
def test_recovery_refuses_too_few_rows_before_any_work(place, tmp_path, option, name):
    how = ("--task", "mood", "--data", place.data, "--flops", 0.5, "--recover", "reconstruct", option, 3)
    result = run("prune", place.model, *how, "-o", tmp_path / "small")
    assert result.exit_code == 2 and f"recovery needs {name} of at least 4" in result.stderr
    assert not list(tmp_path.iterdir())


def test_recovery_needs_rows(place, scored, tmp_path):
    result = run(
        "prune", place.model, "--scores", scored, "--flops", 0.5, "--recover", "reconstruct", "-o", tmp_path / "small"
    )
    assert result.exit_code == 2 and "nothing to recover with: name a task" in result.stderr
    assert not (tmp_path / "small").exists()


def test_prune_writes_a_model_card(place, scored, tmp_path):
    out, rows = tmp_path / "small", ("--task", "mood", "--data", place.data, "--limit", 20)
    arguments = ("prune", place.model, "--scores", scored, *rows, "--flops", 0.5, "-o", out, "--measure", "0")
    record = record_of(*arguments)
    card = (out / "README.md").read_text()
    value = 100 * record["after"]["evaluation"]["metrics"]["accuracy"]
    assert re.search(rf"\| accuracy, % .*\| {value:.1f} \|", card)
    assert str(place.model) not in card  # its place on this machine is nobody's business
    assert "`bad`, `good`" in card
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(out)).replace("a text", "the film was good"), names)
    assert names["logits"].shape == (1, 2)
    assert run(*arguments, "--overwrite").exit_code == 0  # the card is a file of the folder
    assert (out / "README.md").read_text() == card


def test_options_of_selection_arrive(place, scored, tmp_path):
    record = record_of(
        "prune", place.model, "--scores", scored, "--units", 0.8, "--allocation=global", "--multiple-of", "neurons=8",
        "--floor", "heads=2", "--protect", 0, "--protect", "1.attention.heads", "--normalise", "l2",
        "--measure", "0", "-o", tmp_path / "small",
    )  # fmt: skip
    found = {name: value for name, value in record["selection"].items() if value is not None and name != "length"}
    assert found == {
        "units": 0.8, "allocation": "global", "multiple_of": {"neurons": 8}, "floor": {"heads": 2},
        "protect": [0, "1.attention.heads"], "uniform": False, "normalise": "per_layer_l2",
    }  # fmt: skip


def test_mean_values_of_closed_units_are_folded_in(place, tmp_path):
    rows = ("--task", "mood", "--data", place.data)
    record = record_of(
        "prune", place.model, *rows, *QUICK, "--closed", "mean", "--units", 0.5, "-o", tmp_path / "small"
    )
    scores = load_scores(record["scores"])
    model, params = load(place.model)
    gates, batch = recorded_gates(read_pruning(tmp_path / "small")), tiny_batch(model)
    masked = np.asarray(model.apply(params, batch, gates, head="mood", means=scores.means).logits)
    small = np.asarray(model.apply(load(tmp_path / "small")[1], batch, head="mood").logits)
    np.testing.assert_allclose(small, masked, atol=1e-4)  # sums in another order
    assert scores.means


def test_half_precision_stays(place, scored, tmp_path):
    model, params = load(place.model)
    save(tmp_path / "half", model, params, dtype="float16")
    rows = ("--task", "mood", "--data", place.data)
    run("prune", tmp_path / "half", *rows, *QUICK, "--units", 0.5, "-o", tmp_path / "small")
    with TensorFile(tmp_path / "small" / "model.safetensors") as file:
        assert {entry.dtype for entry in file.entries.values()} == {"F16"}


def test_evaluate_prints_what_the_library_measures(place):
    record = record_of(
        "evaluate", place.model, "--task", "mood", "--task", "topic", "--data", place.data, "--split", "dev"
    )
    model, params = load(place.model)
    wanted = [
        evaluate(model, params, load_task(n, data=place.data), rows=Rows(split="dev")).to_json()
        for n in ("mood", "topic")
    ]
    assert record["results"] == json.loads(json.dumps(wanted))
    table = run("evaluate", place.model, "--task", "mood", "--data", place.data, "--limit", 10).stdout
    assert re.search(r"mood +test +10 +accuracy [\d.]+ +50\.0", table)


def test_own_files_need_only_columns(place, tmp_path):
    lines = (place.data / "mood" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    file = tmp_path / "mine.csv"
    file.write_text("words,verdict\n" + "".join(f"{row['sentence']},{row['label']}\n" for row in rows))
    columns = ("--task", file, "--text", "words", "--label", "verdict", "--label-names", "bad,good", "--head", "mood")
    record = record_of("evaluate", place.model, *columns)
    assert record["results"][0]["task"] == "mine"


def test_finetune_writes_a_model_and_how_it_was_made(place, tmp_path):
    out = tmp_path / "multi"
    rows = ("--task", "mood", "--task", "topic", "--data", place.data, "--rows", "mood=32", "--rows", "topic=32")
    arguments = ("finetune", place.model, *rows, "--epochs", 2, "--batch-size", 16, "--half", "-o", out)
    record = record_of(*arguments)
    assert load(out)[0].heads == ("mood", "topic")
    assert json.loads((out / "finetuning.json").read_text()) == record
    assert len(record["epochs"]) == 2
    assert record["recipe"]["rows"] == {"mood": 32, "topic": 32}
    assert set(record["tasks"]["mood"]["digests"]) == {"train", "calibration", "dev", "test"}
    assert not (tmp_path / "multi.state").exists()
    with TensorFile(out / "model.safetensors") as file:
        assert {entry.dtype for entry in file.entries.values()} == {"F16"}


def test_finetune_shows_leaks_and_epochs(place, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    leaked = (data / "topic" / "test.jsonl").read_text().splitlines()[:5]
    with (data / "mood" / "train.jsonl").open("a") as stream:
        stream.writelines(json.dumps(json.loads(line) | {"label": "bad"}) + "\n" for line in leaked)
    rows = ("--task", "mood", "--task", "topic", "--data", data, "--rows", "mood=16", "--rows", "topic=16")
    result = run("finetune", place.model, *rows, "--epochs", 1, "--batch-size", 16, "-o", tmp_path / "multi")
    assert result.exit_code == 0, result.stderr
    assert "mood: 5 rows dropped, held out in topic" in result.stderr
    assert "epoch 1 of 1, dev" in result.stderr
    assert "the best on dev" in result.stdout


# names of tasks


def test_a_task_is_named_on_the_command_line(tmp_path):
    rows = "text,label\n" + "".join(f"text number {i},{i % 2}\n" for i in range(60))
    model, _ = tiny_model(heads=(TaskHead(name="mood", labels=("1", "0")), TaskHead(name="topic", labels=("a", "b"))))
    said: list[str] = []
    loaded = {}
    for name in ("отзывы", "оценки"):
        (tmp_path / f"{name}.csv").write_text(rows)
        watch: Any = SimpleNamespace(say=said.append)
        derived = options.RowOptions().load(str(tmp_path / f"{name}.csv"), watch)
        assert derived.name == "task" and said.pop().startswith(f"task: '{name}' is called 'task'")
        loaded[name] = options.RowOptions().load(f"mood={tmp_path / f'{name}.csv'}", watch, model)
    assert [task.name for task in loaded.values()] == ["mood", "mood"] and not said
    assert loaded["отзывы"].labels == ("1", "0")  # of the head of that name
    with pytest.raises(ValueError, match=r"two tasks are named 'mood'; .* write --task NAME=FILE"):
        remove_leaks(list(loaded.values()))


# streams


@pytest.mark.parametrize(
    ("model", "stderr"), [("none", "<&- 2>&-"), pytest.param("{model}", "2>/dev/full", marks=pytest.mark.slow)]
)
def test_stdout_gets_nothing_but_the_result_whatever_stderr_is(place, model: str, stderr: str):
    command = (sys.executable, "-m", "jaxprune", "inspect", model.format(model=place.model), "--json")
    done = subprocess.run(f"{shlex.join(command)} {stderr}", shell=True, stdout=subprocess.PIPE, text=True)
    assert done.returncode == (2 if model == "none" else 0)
    assert done.stdout == "" if model == "none" else json.loads(done.stdout)["command"] == "inspect"


# resuming


@pytest.mark.slow
def test_a_scoring_run_that_was_interrupted_and_killed_ends_with_the_same_bits(place, tmp_path):
    settings = ("--task", "mood", "--data", place.data, "--examples", 40, "--batch-size", 1, "--path", "layer")
    out, whole = tmp_path / "s.safetensors", tmp_path / "whole.safetensors"
    part = tmp_path / "s.safetensors.partial"
    arguments = ("score", place.model, *settings, "--nodes", 8, "-o", out)

    first = start(*arguments)
    wait_for(part.exists, first)
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate()
    assert first.returncode == 130, stderr
    assert stdout == ""
    assert "interrupted; run the same command again to resume" in stderr
    assert "Traceback" not in stderr

    before = part.read_bytes()
    second = start(*arguments)
    wait_for(lambda: part.read_bytes() != before, second)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert part.exists() and not out.exists()

    assert run(*arguments).exit_code == 0
    assert run(*arguments[:-1], whole).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not part.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_not_lost_in_a_callback_that_swallows_it(number: signal.Signals):
    from jaxprune.cli.terminal import working

    with interruptible():
        before = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt) as raised, working() as bars:
            bar = bars.open("work")
            bar(0, 2)
            with contextlib.suppress(KeyboardInterrupt):  # as a library's callback may
                signal.raise_signal(number)
            bar(1, 2)
        assert raised.value.args == (number,)
        with pytest.raises(KeyboardInterrupt) as raised, working(), contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)  # where nothing is called any more
        assert raised.value.args == (number,)
        assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_training_that_is_told_to_end_saves_its_state(place, tmp_path, monkeypatch, number: signal.Signals):
    from jaxprune.cli.terminal import Bar

    show, out = Bar.__call__, tmp_path / "out"
    arguments = ("finetune", place.model, "--task", "mood", "--data", place.data, "--epochs", 1, "-o", out)
    monkeypatch.setattr(Bar, "__call__", lambda *seen: signal.raise_signal(number) or show(*seen))
    with interruptible():
        ended = run(*arguments)
    assert ended.exit_code == 128 + number
    assert ended.stderr.endswith("interrupted; run the same command again to resume\n")
    assert ended.stdout == "" and (tmp_path / "out.state").is_file() and not out.exists()
    monkeypatch.undo()
    assert run(*arguments).exit_code == 0 and out.is_dir()


def test_ctrl_c_is_one_whatever_a_library_makes_of_it():
    from jaxprune.cli.terminal import working

    with interruptible(), pytest.raises(KeyboardInterrupt) as raised, working():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:  # as C code does whose callback was interrupted
            raise SystemError("returned a result with an exception set") from error
    assert isinstance(raised.value.__cause__, SystemError)
    with pytest.raises(SystemError, match="of its own"), working():
        raise SystemError("of its own")


def test_a_warning_is_said_once(tmp_path, capfd):
    from jaxprune.cli.terminal import working

    config = classifier_config("bert")
    folder = write_checkpoint(tmp_path / "hf", config, classifier_tensors(config) | {"cls.bias": np.zeros(1, "f")})
    with working():
        for _ in range(2):
            load(folder)
    assert capfd.readouterr().err.count("cls.bias") == 1


def test_prune_does_not_score_twice(place, tmp_path):
    out, kept = tmp_path / "small", tmp_path / "small.scores.safetensors"
    arguments = ("prune", place.model, "--task", "mood", "--data", place.data, *QUICK, "--units", 0.5, "-o", out)
    assert run(*arguments).exit_code == 0
    made, model = kept.stat().st_mtime_ns, weights(out)
    shutil.rmtree(out)  # as if it had been interrupted after scoring
    again = run(*arguments)
    assert again.exit_code == 0, again.stderr
    assert "an earlier run with the same settings" in again.stderr
    assert kept.stat().st_mtime_ns == made
    assert weights(out) == model
    shutil.rmtree(out)
    refused = run(*arguments, "--seed", 1)
    assert refused.exit_code == 2 and not out.exists() and kept.stat().st_mtime_ns == made
    assert re.search(r"scores that were made with other settings \(keys is .*, was \[\[0, 0\]\]", refused.stderr)
    assert run(*arguments).exit_code == 0
    other = run(*arguments, "--seed", 1, "--overwrite")
    assert other.exit_code == 0, other.stderr
    assert "was made with other settings, and is replaced" in " ".join(other.stderr.split())
    assert kept.stat().st_mtime_ns > made
    assert load_scores(kept).header["keys"] == [[0, 1]]


def test_fewer_rows_than_are_asked_for_are_counted(place, scored, tmp_path):
    rows = ("--task", "mood", "--data", place.data, "--limit", 999)
    said = " ".join(run("evaluate", place.model, *rows).stderr.split())
    assert said.count("mood: --limit is 999, and there are 60 test rows: all of them are taken") == 1
    more = ("--units", 0.5, "--measure", "0", "--recover", "bias", "--recover-examples", 998, "-o", tmp_path / "small")
    said = " ".join(run("prune", place.model, "--scores", scored, *rows, *more).stderr.split())
    assert said.count("--limit is 999, and there are 60 test rows") == 1
    assert said.count("--recover-examples is 998, and there are 60 calibration rows") == 1
    assert "is 1,000" not in run("evaluate", place.model, *rows[:-1], 60).stderr


# bad input

PRUNE = ("prune", "{model}", "--scores", "{scores}", "-o", "{new}")
SCORE = ("score", "{model}", "--task", "mood", "--data", "{data}", "-o", "{new}")
BAD: dict[str, tuple[Sequence[Any], str]] = {
    "unknown task": (("score", "{model}", "--task", "moods", "-o", "{new}"), "unknown task 'moods'"),
    "missing data": (("score", "{model}", "--task", "mood", "--data", "no", "-o", "{new}"), "no does not exist"),
    "missing model": (("score", "./no", "--task", "mood", "--data", "{data}", "-o", "{new}"), "no folder no"),
    "broken model": (("score", "{broken}", "--task", "mood", "--data", "{data}", "-o", "{new}"), "not a complete"),
    "missing column": ((*SCORE, "--text", "words"), "no column 'words'"),
    "unknown head": ((*SCORE, "--head", "weather"), "no task head 'weather'"),
    "too many examples": ((*SCORE, "--examples", 9999), "error: --examples must lie in 1 to"),
    "no such seed": ((*SCORE, "--seed", 10**30), "--seed must be at least 0 and at most 2,147,483,647, got 10000000"),
    "a number with lines": ((*SCORE, "--examples", "1_0"), "'--examples': .*'1_0' is no whole number in plain digits"),
    "a fraction with lines": ((*PRUNE, "--flops", "0.5_0"), "'--flops': .*'0.5_0' is no number in plain digits"),
    "nothing to learn": (
        ("finetune", "{model}", "--task", "mood", "--learning-rate", 0, "-o", "{new}"),
        "error: --learning-rate must be above 0, got 0.0",
    ),
    "negative seed": ((*SCORE, "--seed", -1), "--seed must be at least 0"),
    "too many nodes": ((*SCORE, "--nodes", 100_000), "--nodes must be at least 1 and at most 4,096"),
    "too large a batch": ((*SCORE, "--batch-size", 10**9), "--batch-size must be at least 1 and at most 65,536"),
    "no rows to test on": (("evaluate", "{model}", "--task", "mood", "--limit", 0), "--limit must be at least 1"),
    "an infinite fraction": ((*PRUNE, "--flops", "inf"), "--flops must be a finite number of at least 0"),
    "a multiple of nothing": (
        (*PRUNE, "--units", 0.5, "--multiple-of", "neurons=0"),
        "--multiple-of must be at least 1",
    ),
    "digits of another script": ((*PRUNE, "--memory", "\u0664MB"), "--memory takes a fraction in"),
    "more than there is": ((*PRUNE, "--memory", "1e30MB"), "--memory must lie above 0, and be no more than"),
    "a multiple without end": ((*PRUNE, "--units", 0.5, "--multiple-of", 10**30), "--multiple-of takes whole numbers"),
    "a superscript": ((*PRUNE, "--units", 0.5, "--floor", "heads=²"), "--floor takes NAME=NUMBER"),
    "a pass too large": ((*PRUNE, "--units", 0.5, "--measure", 10**9), "--measure must be at least 0 and at most"),
    "a length without end": ((*PRUNE, "--units", 0.5, "--length", "1e30"), "--length '1e30' is no number of tokens"),
    "an argument of the library": ((*SCORE, "--criterion", "fisher", "--start", 2), "criterion fisher has no --start"),
    "too few nodes": ((*SCORE, "--nodes", 0), "nodes must be at least 1"),
    "too long": ((*SCORE, "--examples", 8, "--max-length", 999), "only 64 positions"),
    "unknown criterion": ((*SCORE, "--criterion", "tailor"), "taylor.*Did you mean 'taylor'"),
    "unknown path": ((*SCORE, "--path", "straight"), "none of joint, layer"),
    "option of another criterion": (
        (*SCORE, "--criterion", "taylor", "--nodes", 4, "--path", "layer"),
        "taylor has no --nodes, --path; it has --labels, --closed",
    ),
    "layers compared within a layer": (
        (
            "prune",
            "{model}",
            "--task",
            "mood",
            "--data",
            "{data}",
            "--criterion",
            "top-layers",
            "--allocation",
            "per-layer",
            "--flops",
            0.5,
            "-o",
            "{new}",
        ),
        "top-layers and block-influence rank layers.*--allocation global",
    ),
    "option of no criterion": ((*SCORE, "--criterion", "top-layers", "--nodes", 4), "it has no options"),
    "impossible tokens": ((*SCORE, "--tokens", "max"), "not possible with integrated gradients"),
    "score file exists": ((*SCORE[:-1], "{scores}"), "exists already.*--overwrite"),
    "score file is a folder": ((*SCORE[:-1], "{model}"), "is a folder"),
    "below a file": ((*SCORE[:-1], "{scores}/s.safetensors"), "is not a folder"),
    "no budget": (PRUNE, "exactly one budget"),
    "two budgets": ((*PRUNE, "--flops", 0.5, "--units", 0.5), "exactly one budget.*got units, flops"),
    "budget out of range": ((*PRUNE, "--flops", 1.5), r"must lie in \(0, 1\]"),
    "unreachable budget": ((*PRUNE, "--units", 0.3, "--protect", 0), "smallest reachable fraction"),
    "unknown layer": ((*PRUNE, "--units", 0.3, "--protect", 9), r"protect names \[9\]"),
    "multiple of what": ((*PRUNE, "--units", 0.3, "--multiple-of", "neurons:8"), "NAME=NUMBER"),
    "unknown kind": ((*PRUNE, "--units", 0.3, "--multiple-of", "layers=8"), "kinds of units"),
    "no scores": (("prune", "{model}", "--scores", "no", "--units", 0.5, "-o", "{new}"), "jaxprune score"),
    "no score file": (
        ("prune", "{model}", "--scores", "{model}/model.safetensors", "--units", 0.5, "-o", "{new}"),
        "holds no scores",
    ),
    "damaged scores": (("prune", "{model}", "--scores", "{damaged}", "--units", 0.5, "-o", "{new}"), "not a complete"),
    "scores of another model": (("prune", "{other}", *PRUNE[2:], "--units", 0.5), "belong to another model"),
    "scores and scoring": ((*PRUNE, "--units", 0.5, "--nodes", 4, "--seed", 1), "--seed, --nodes"),
    "rows of nothing": ((*PRUNE, "--units", 0.5, "--data", "{data}", "--limit", 5), "--data, --limit: for testing"),
    "nothing to score": (("prune", "{model}", "--units", 0.5, "-o", "{new}"), "--task"),
    "folder exists": (("prune", "{model}", "--scores", "{scores}", "--units", 0.5, "-o", "{model}"), "exists already"),
    "foreign folder": ((*PRUNE[:-1], "{data}", "--units", 0.5, "--overwrite"), "not a folder that jaxprune saved"),
    "memory in no unit": ((*PRUNE, "--memory", "40XB"), "--memory takes a fraction .* B, kB, MB.*got '40XB'"),
    "memory without a unit": ((*PRUNE, "--memory", "40"), r"--memory needs a unit: a fraction in \(0, 1\].*got '40'"),
    "no memory": ((*PRUNE, "--memory", "1kB"), "memory_bytes=1000 cannot be reached: .*smallest reachable fraction is"),
    "no latency": ((*PRUNE, "--latency", "0ms"), "--latency must lie above 0.*got '0ms'"),
    "negative latency": ((*PRUNE, "--latency", "-1ms"), "--latency takes a fraction.*us; got '-1ms'"),
    "latency of 1.5": (
        (*PRUNE, "--latency", "1.5"),
        r"--latency needs a unit: a fraction in \(0, 1\].*got '1.5'",
    ),
    "latency and units": ((*PRUNE, "--latency", "0.5", "--units", 0.5), "exactly one budget.*got units, latency"),
    "table of another device": ((*PRUNE, "--latency", "0.5", "--latency-table", "{elsewhere}"), "on 'another device'"),
    "no table": ((*PRUNE, "--latency", "0.5", "--latency-table", "{data}"), "no latency table"),
    "damaged table": ((*PRUNE, "--latency", "0.5", "--latency-table", "{scores}"), "is no latency table"),
    "table of another length": (
        (*PRUNE, "--latency", "0.5", "--latency-table", "{table}", "--length", 9),
        "is for 1 examples of 12 tokens, but 1 of 9 are asked for",
    ),
    "table of another batch": (
        (*PRUNE, "--latency", "0.5", "--latency-table", "{table}", "--latency-batch", 2),
        "is for 1 examples of 12 tokens, but 2 of 12 are asked for",
    ),
    "latency by scores of another model": (
        ("prune", "{other}", *PRUNE[2:], "--latency", "0.5", "--latency-table", "{table}"),
        "belong to another model",
    ),
    "no examples in a pass": ((*PRUNE, "--latency", "0.5", "--latency-batch", 0), "--latency-batch must be at least 1"),
    "unreachable latency": (
        (*PRUNE, "--latency", "1ms", "--latency-table", "{table}"),
        r"latency_seconds=0\.001 cannot be reached: .*smallest reachable fraction is 0\.3087, 10\.0 ms",
    ),
    "plan without a budget": (("plan", "{model}", "--scores", "{scores}"), "exactly one budget"),
    "plan with two": (
        ("plan", "{model}", "--scores", "{scores}", "--memory", 0.9, "--latency", 0.5),
        "exactly one budget.*got memory, latency",
    ),
    "plan without scores": (("plan", "{model}", "--flops", 0.5), "Missing option '--scores'"),
    "plan of another model": (("plan", "{other}", "--scores", "{scores}", "--flops", 0.5), "belong to another model"),
    "bad measure": ((*PRUNE, "--units", 0.5, "--measure", "many"), "--measure takes whole numbers"),
    "unknown split": (("evaluate", "{model}", "--task", "mood", "--data", "{data}", "--split", "dust"), "split 'dust'"),
    "rows of no task": (
        ("finetune", "{model}", "--task", "mood", "--data", "{data}", "--rows", "topic=8", "-o", "{new}"),
        "rows names topic",
    ),
    "no epochs": (
        ("finetune", "{model}", "--task", "mood", "--data", "{data}", "--epochs", 0, "-o", "{new}"),
        "epochs must be at least 1",
    ),
    "unknown pooling": (
        ("finetune", "{model}", "--task", "mood", "--data", "{data}", "--pooling", "median", "-o", "{new}"),
        "pooling",
    ),
    "finetuned folder exists": (("finetune", "{model}", "--task", "mood", "-o", "{model}"), "exists already"),
    "unknown option": ((*SCORE, "--node", 4), "No such option.*--help"),
    "missing option": (("score", "{model}", "-o", "{new}"), "Missing option '--task'"),
    "not a number": ((*SCORE, "--examples", "few"), "'--examples'"),
    "unknown command": (("compress", "{model}"), "compress"),
}


@pytest.fixture(scope="module")
def names(place: Place, scored: Path) -> dict[str, Path]:
    folder = place.folder
    shutil.copytree(place.model, folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(weights(place.model)[:-100])
    (folder / "damaged.safetensors").write_bytes(scored.read_bytes()[:-8])
    model, _ = load(place.model)
    save(folder / "other", model, model.initialise(jax.random.key(5)))
    table = hand_table(*load(place.model))
    elsewhere = dataclasses.replace(table, conditions=dataclasses.replace(table.conditions, device="another device"))
    return {
        "model": place.model,
        "data": place.data,
        "scores": scored,
        "broken": folder / "broken",
        "damaged": folder / "damaged.safetensors",
        "other": folder / "other",
        "table": write_table(folder / "table.json", table),
        "elsewhere": write_table(folder / "elsewhere.json", elsewhere),
        "new": folder / "new",
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(names, case):
    arguments, message = BAD[case]
    filled = [str(argument).format(**names) for argument in arguments]
    result = run(*filled)
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("jaxprune: error: ")]
    assert len(lines) == 1 and lines[0] == result.stderr.splitlines()[-1], result.stderr
    assert re.search(message, lines[0]), lines[0]
    assert not names["new"].exists()


def test_an_error_of_the_library_can_be_traced(monkeypatch):
    monkeypatch.setenv("JAXPRUNE_TRACEBACK", "1")
    assert isinstance(run("evaluate", "./no", "--task", "mood").exception, FileNotFoundError)


def test_test_rows_must_not_have_been_scored(place, tmp_path):
    """A task whose test rows are the calibration rows of the one that was scored."""
    task = load_task("mood", data=place.data)
    data = tmp_path / "data" / "mood"
    shutil.copytree(place.data / "mood", data)
    with (data / "test.jsonl").open("w") as stream:
        for row in task.rows("calibration"):
            stream.write(json.dumps({"sentence": row.text, "label": task.labels[int(row.label or 0)]}) + "\n")
    scores = tmp_path / "s.safetensors"
    assert run("score", place.model, "--task", "mood", "--data", place.data, *FEW, "-o", scores).exit_code == 0
    rows = ("--task", "mood", "--data", tmp_path / "data")
    result = run("prune", place.model, "--scores", scores, *rows, "--units", 0.5, "-o", tmp_path / "small")
    assert result.exit_code == 2
    assert "rows used for scoring" in result.stderr
    assert not (tmp_path / "small").exists()


def test_wrong_settings_are_refused_before_any_work(place, tmp_path):
    rows = ("--task", "mood", "--data", place.data)
    for budget in (("--flops", 2), ("--flops", 0.5, "--protect", 7), ()):
        result = run("prune", place.model, *rows, *budget, "-o", tmp_path / "small")
        assert result.exit_code == 2
        assert "scoring" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# what a process imports, prints and keeps


@pytest.mark.slow
def test_pruning_from_scores_imports_neither_transformers_nor_datasets(place, scored, tmp_path):
    rows = ("--no-evaluate", "--task", "mood", "--data", place.data, "--allocation", "per-layer", "--json")
    arguments = ("prune", place.model, "--scores", scored, "--flops", 0.5, "-o", tmp_path / "small", *rows)
    code = f"""
import sys
from jaxprune.__main__ import main
sys.argv = ["jaxprune", *{list(map(str, arguments))!r}]
try:
    main()
except SystemExit as stop:
    print("IMPORTED", stop.code, *sorted({{name.split(".")[0] for name in sys.modules}}), file=sys.stderr)
"""
    settings = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    settings["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, check=True)
    code, *imported = done.stderr.rpartition("IMPORTED ")[2].split()
    assert code == "0", done.stderr
    assert set(imported) & {"transformers", "datasets", "torch", "matplotlib"} == set()
    assert "jax" in imported
    assert json.loads(done.stdout)["command"] == "prune"  # one JSON object on stdout, and nothing else
    assert any((tmp_path / "cache" / "jaxprune" / "compiled").rglob("*-cache"))


@pytest.mark.slow
def test_an_error_in_a_process_of_its_own():
    process = start("evaluate", "./no", "--task", "mood", "--json")
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (2, "")
    assert stderr.splitlines() == ["jaxprune: error: no folder no."]


# names and help


def test_every_name_stands_for_something():
    for option, known in options.FUNCTIONS.items():
        found = [options.find(option, name) for name in known]
        real = [id(thing) for thing in found if thing is not None]  # others are read as they are
        assert len(set(real)) == len(real) and (real or option in ("calibration", "allocation", "to", "dtype"))


def test_every_criterion_and_every_setting_has_a_name():
    kinds = {
        thing
        for module in (attribution, baselines)
        for name, thing in vars(module).items()
        if dataclasses.is_dataclass(thing) and thing.__module__ == module.__name__ and name[0] != "_"
        if hasattr(thing, "examples")
    }
    named = {options.find("criterion", name) for name in options.FUNCTIONS["criterion"]}
    assert named == kinds - {baselines.Removal}  # for chosen units, not for all
    settings = {field.name for kind in named for field in dataclasses.fields(kind) if field.init}
    assert settings == set(options.SETTINGS.values())


def test_help_tells_the_true_defaults():
    own = attribution.IntegratedGradients()
    assert (own.nodes, own.chunk, own.start) == (8, 1, 0.0)
    assert own.path is options.find("path", "joint")
    assert own.rule is options.find("rule", "gauss-legendre")
    assert own.labels is options.find("labels", "gold")
    assert own.examples is options.find("examples-reduction", "absolute")
    assert own.closed is options.find("closed", "zero")
    assert attribution.GradientActivation().tokens is options.find("tokens", "sum")
    assert baselines.Fisher().labels is options.find("labels", "sampled")


@pytest.mark.parametrize(
    "name",
    ["score", "prune", "sweep", "inspect", "compare", "evaluate", "finetune", "sparsify", "distill", "augment", "demo"],
)
def test_every_command_has_an_example(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?: jaxprune {name} ", result.stdout)


def test_without_a_command_there_is_help():
    assert "Usage: jaxprune" in run().stdout
    assert run("--version").stdout == f"jaxprune {__version__}\n"


def test_a_model_without_tokenizer_can_be_pruned_from_scores_only(tmp_path):
    model, params = tiny_model()
    save(tmp_path / "model", model, params)
    assert not list((tmp_path / "model").glob("vocab*"))
    assert WORDS.exists()
    result = run("evaluate", tmp_path / "model", "--task", "mood", "--data", tmp_path)
    assert result.exit_code == 2

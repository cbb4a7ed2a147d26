"""Scoring a task, the score file, merging, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import tiny_model

from jaxprune.checkpoints.files import write_atomic
from jaxprune.checkpoints.tensors import model_digest, sealed, write_tensors
from jaxprune.data.batches import encode
from jaxprune.data.tasks import Example, Rows, Task, draw, row_key
from jaxprune.models import Model, TaskHead
from jaxprune.scoring.attribution import Context, GradientActivation, IntegratedGradients, layer
from jaxprune.scoring.criteria import Activation, Fisher, LeaveOneOut, Magnitude, Random
from jaxprune.scoring.objectives import calibration_means, every, margin, maximum, predicted
from jaxprune.scoring.run import PARTIAL, SAVE_EVERY, Scoring, kept_scores, score, score_batches
from jaxprune.scoring.scores import FORMAT, METADATA, Scores, describe, load_scores, merge, save_scores, with_relative
from jaxprune.units import Params, widths

WORDS = Path(__file__).parent / "data" / "words"
VOCABULARY = [word for word in (WORDS / "vocab.txt").read_text().split() if word.isalpha()]
HEADS = (
    TaskHead(name="moods", labels=("sad", "glad"), pooling="mean"),
    TaskHead(name="stars", labels=("score",), regression=True),
)


def texts(rows: int, seed: int = 0) -> tuple[Example, ...]:
    random = np.random.default_rng(seed)
    words = [random.choice(VOCABULARY, random.integers(3, 20)) for _ in range(rows)]
    return tuple(Example(" ".join(own), None, row % 2) for row, own in enumerate(words))


def scoring(criterion: Any, until_stable: float | None = None, **rows: Any) -> Scoring:
    return Scoring(criterion=criterion, rows=Rows(**rows), until_stable=until_stable)


@pytest.fixture(scope="module")
def model_and_params() -> tuple[Model, Params]:
    model, params = tiny_model(heads=HEADS)
    return dataclasses.replace(model, source=WORDS), params


@pytest.fixture(scope="module")
def task() -> Task:
    rows = texts(60)
    splits = {"train": rows[:10], "calibration": rows[10:40], "dev": rows[40:50], "test": rows[50:]}
    return Task(name="moods", splits=splits, labels=("sad", "glad"))


@pytest.fixture(scope="module")
def scores(model_and_params: tuple[Model, Params], task: Task) -> Scores:
    return score(
        *model_and_params, task, Scoring(criterion=IntegratedGradients(nodes=2), rows=Rows(examples=12, batch_size=4))
    )


PARTS = ("values", "means", "variance", "halves", "signed")


def equal(a: Scores, b: Scores) -> bool:
    return (
        a.header == b.header
        and a.rows == b.rows
        and all(
            x.keys() == y.keys() and all(np.array_equal(np.asarray(x[name]), np.asarray(y[name])) for name in x)
            for x, y in ((getattr(a, part) or {}, getattr(b, part) or {}) for part in PARTS)
        )
    )


# Scoring


def test_scores_say_how_they_were_made(model_and_params: tuple[Model, Params], task: Task, scores: Scores):
    model, params = model_and_params
    assert {name: value.shape for name, value in scores.values.items()} == {
        name: (units,) for name, units in widths(model.axes, params).items()
    }
    header = dict(scores.header)
    assert header["criterion"] == {
        "name": "IntegratedGradients",
        "nodes": 2,
        "chunk": 1,
        "path": "joint",
        "start": 0.0,
        "rule": "gauss_legendre",
        "objective": None,
        "labels": "gold",
        "tokens": "sum_tokens",
        "examples": "absolute",
        "closed": "zero",
        "kinds": ["heads", "neurons"],
    }
    assert [header[name] for name in ("task", "head", "split", "examples")] == ["moods", "moods", "calibration", 12]
    assert header["model"] == model_digest(model, params) and header["keys"] == [[0, 0]]
    assert len(scores.rows) == 12 and set(scores.rows) <= {row_key(row) for row in task.rows("calibration")}
    assert 5 < header["mean_length"] < 22 and header["max_length"] == 64 and len(header["data"]) == 1
    assert set(header["completeness"]) == {"expected", "found", "error", "size", "relative"} and scores.means is None
    json.dumps(header)


def test_the_criterion_is_called_on_every_batch(model_and_params: tuple[Model, Params], task: Task, scores: Scores):
    """One batch of all examples, without `score`."""
    model, params = model_and_params
    rows = [row for row in task.rows("calibration") if row_key(row) in scores.rows]
    batch = dict(model.tokenizer([row.text for row in rows], padding=True, return_tensors="np"))
    batch["labels"] = np.array([row.label for row in rows])
    found = IntegratedGradients(nodes=2)(model, params, batch, Context(head="moods"))
    for name, value in found.scores.items():
        np.testing.assert_allclose(scores.values[name], value.mean(0), rtol=1e-4, atol=1e-7)
    for name, value in found.completeness.items():
        assert scores.header["completeness"][name] == pytest.approx(float(value.mean()), rel=1e-4, abs=1e-7)


def test_progress_counts_finished_batches(model_and_params: tuple[Model, Params], task: Task):
    seen = []
    score(
        *model_and_params,
        task,
        Scoring(criterion=Activation(), rows=Rows(examples=10, batch_size=4)),
        progress=lambda *n: seen.append(n),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_examples_may_be_given(model_and_params: tuple[Model, Params], task: Task):
    rows = task.rows("calibration")[:5]
    found = score(*model_and_params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=rows)))
    assert found.header["split"] == "given" and found.rows == tuple(sorted(map(row_key, rows)))


@pytest.mark.parametrize("criterion", [Random(), Magnitude()])
def test_criteria_that_read_no_example_say_so(model_and_params: tuple[Model, Params], task: Task, criterion: Any):
    found = score(*model_and_params, task, Scoring(criterion=criterion, rows=Rows(key=3)))
    again = score(*model_and_params, task, Scoring(criterion=criterion, rows=Rows(key=jax.random.key(3))))
    assert equal(found, again) and found.header["keys"] == [[0, 3]]
    assert (found.header["examples"], found.rows, found.header["completeness"]) == (0, (), None)


def test_labels_are_needed_only_by_criteria_that_use_them(model_and_params: tuple[Model, Params], task: Task):
    rows = tuple(dataclasses.replace(row, label=None) for row in task.rows("calibration")[:4])
    for criterion in (
        GradientActivation(labels=predicted),
        Fisher(),
        Activation(),
        IntegratedGradients(nodes=1, labels=every),
    ):
        score(*model_and_params, task, Scoring(criterion=criterion, rows=Rows(examples=rows)))
    with pytest.raises(ValueError, match="4 of 4 examples have no label: use labels=predicted, sampled or every"):
        score(*model_and_params, task, Scoring(rows=Rows(examples=rows)))


def test_what_cannot_be_scored_is_refused(model_and_params: tuple[Model, Params], task: Task):
    model, params = model_and_params
    with pytest.raises(ValueError, match=r"examples must lie in 1 to 30, the calibration rows of 'moods', got 31"):
        score(model, params, task, Scoring(rows=Rows(examples=31)))
    with pytest.raises(ValueError, match="label 2 is outside 0 to 1, the labels of head 'moods'"):
        score(model, params, task, Scoring(rows=Rows(examples=(Example("a dog", None, 2),))))
    with pytest.raises(ValueError, match="the model has no task head 'ratings'"):
        score(model, params, task, Scoring(head="ratings"))
    with pytest.raises(ValueError, match="the head 'stars' is a regression, but 'moods' is a classification"):
        score(model, params, task, Scoring(head="stars"))
    with pytest.raises(ValueError, match="there are no examples"):
        score(model, params, task, Scoring(rows=Rows(examples=())))
    with pytest.raises(ValueError, match="there are no examples to score"):
        score_batches(model, params, [], GradientActivation(), Context(head="moods"))
    with pytest.raises(ValueError, match="means were given, but this criterion closes units to zero"):
        score(model, params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=4)), means={})
    broken = params | {"heads": jax.tree.map(lambda x: x * jnp.nan, params["heads"])}
    with pytest.raises(ValueError, match=r"scores of 0.attention.heads, .* are not finite"):
        score(model, broken, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=4)))


def test_means_are_kept_with_the_scores(model_and_params: tuple[Model, Params], task: Task):
    model, params = model_and_params
    rows = task.rows("calibration")[:6]
    criterion = GradientActivation(closed=calibration_means)
    found = score(model, params, task, Scoring(criterion=criterion, rows=Rows(examples=rows, batch_size=4)))
    batch = dict(model.tokenizer([row.text for row in rows], padding=True, return_tensors="np"))
    expected = calibration_means(model, params, [batch])
    assert found.means is not None and found.means.keys() == expected.keys()
    for name, mean in expected.items():
        np.testing.assert_allclose(found.means[name], mean, rtol=1e-4, atol=1e-6)
    given = score(
        model, params, task, Scoring(criterion=criterion, rows=Rows(examples=rows, batch_size=4)), means=found.means
    )
    assert equal(found, given)


# Files


def test_saved_scores_load_bit_for_bit(tmp_path: Path, scores: Scores):
    means = {"0.attention.heads": jnp.arange(16.0).reshape(4, 4), "1.ffn.neurons": jnp.arange(32.0)}
    for found in (scores, dataclasses.replace(scores, means=means)):
        path = save_scores(tmp_path / "scores.safetensors", found)
        assert equal(load_scores(path), found)


def test_keys_of_rows_are_bytes_beside_the_scores(tmp_path: Path, scores: Scores):
    """The header has a limit of 100 MB, so it must not grow with the rows."""
    rows = tuple(f"{i:016x}" for i in range(100_000))
    path = save_scores(tmp_path / "scores.safetensors", dataclasses.replace(scores, rows=rows))
    assert int.from_bytes(path.read_bytes()[:8], "little") < 5_000
    assert load_scores(path).rows == rows


@pytest.mark.parametrize(("name", "closed"), [("mood", "calibration_means"), ("text", "zero")])
def test_files_that_hold_the_keys_in_their_header_still_load(tmp_path: Path, name: str, closed: str):
    found = load_scores(Path(__file__).parent / "data" / "before" / f"{name}.safetensors")
    assert found.header["format"] == 3 and "rows" not in found.header
    assert len(found.rows) == found.header["examples"] == 8
    assert found.header["criterion"]["closed"] == closed
    assert found.properties["by_layer"] and "path from closed to open gates" in found.properties["meaning"]
    again = load_scores(save_scores(tmp_path / "scores.safetensors", found))
    assert equal(again, dataclasses.replace(found, header=dict(found.header) | {"format": FORMAT}))


def test_keys_of_rows_that_do_not_fit_are_refused(tmp_path: Path, scores: Scores):
    path = tmp_path / "scores.safetensors"
    values = {"0.ffn.neurons": np.zeros(3, np.float32)}
    header = {METADATA: json.dumps(dict(scores.header))}
    for rows in ({}, {"rows": np.zeros((12, 7), np.uint8)}):
        write_atomic(path, lambda file, own=values | rows: write_tensors(file, own, header))
        with pytest.raises(ValueError, match="has no tensor 'rows' of type U8 with 8 bytes for every row"):
            load_scores(path)


def test_reading_scores_imports_neither_transformers_nor_datasets(tmp_path: Path, scores: Scores):
    path = save_scores(tmp_path / "scores.safetensors", scores)
    code = (
        f"import sys; from jaxprune.scoring.scores import load_scores; load_scores({str(path)!r}); print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"transformers", "datasets", "torch"} & set(run.stdout.split()) == set()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, scores: Scores):
    path = save_scores(tmp_path / "scores.safetensors", scores)
    whole = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        load_scores(path)

    for size in (0, 5, 100, len(whole) - 1):
        with pytest.raises(ValueError, match="is not a complete safetensors file"):
            read(whole[:size])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        read(b"hello, this is some text and nothing else")
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_scores(tmp_path)

    def refuses(message: str, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        write_atomic(path, lambda file: write_tensors(file, tensors, metadata))
        with pytest.raises(ValueError, match=message):
            load_scores(path)

    values = {"0.ffn.neurons": np.zeros(3, np.float32)}
    header = json.dumps(dict(scores.header))
    refuses("holds no scores: its metadata has no 'jaxprune_scores'", values, {"format": "pt"})
    refuses("its header is not JSON", values, {METADATA: "{"})
    refuses(r"its format is \[\], this version", values, {METADATA: "[]"})
    refuses("its format is 9, this version of jaxprune reads 1, 2, 3, 4", values, {METADATA: '{"format": 9}'})
    refuses("criterion is missing; ", values, {METADATA: '{"format": 1}'})
    changed = json.dumps(dict(scores.header) | {"task": 5})
    refuses("task is 5, expected text", values, {METADATA: changed})
    refuses("0.ffn.neurons is F16, expected F32", {"0.ffn.neurons": np.zeros(3, np.float16)}, {METADATA: header})
    refuses(
        r"has shape \[3, 2\], expected one axis", {"0.ffn.neurons": np.zeros((3, 2), np.float32)}, {METADATA: header}
    )
    values |= {"rows": np.zeros((0, 8), np.uint8)}
    write_atomic(path, lambda file: write_tensors(file, values, {METADATA: header}))
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(ValueError, match=r"0.ffn.neurons holds NaN or infinity"):
        load_scores(path)


def test_scores_that_are_not_finite_are_not_written(tmp_path: Path, scores: Scores):
    values = scores.values | {"1.ffn.neurons": jnp.full(32, jnp.inf)}
    with pytest.raises(ValueError, match=r"1.ffn.neurons"):
        save_scores(tmp_path / "scores.safetensors", dataclasses.replace(scores, values=values))
    assert list(tmp_path.iterdir()) == []


def test_settings_are_described_by_name():
    assert describe(LeaveOneOut(objective=margin, labels=every)) == {
        "name": "LeaveOneOut",
        "chunk": 1,
        "objective": "margin",
        "labels": "every",
        "examples": "absolute",
        "closed": "zero",
    }
    assert describe(Activation()) == {"name": "Activation", "examples": "absolute"}


def test_the_relative_error_is_left_out_where_it_means_nothing():
    found = {"expected": 0.1, "found": 0.12, "error": 0.02, "size": 0.1}
    assert with_relative(found) == found | {"relative": pytest.approx(0.2)}
    assert with_relative(found | {"size": 1e-4})["relative"] is None


# Merging


@pytest.mark.parametrize("criterion", [IntegratedGradients(nodes=2, path=layer), GradientActivation(examples=maximum)])
def test_scores_of_two_halves_combine_to_the_whole(model_and_params: tuple[Model, Params], task: Task, criterion: Any):
    rows = task.rows("calibration")[:9]
    parts = [
        score(*model_and_params, task, Scoring(criterion=criterion, rows=Rows(examples=part)))
        for part in (rows[:2], rows[2:])
    ]
    whole = score(*model_and_params, task, Scoring(criterion=criterion, rows=Rows(examples=rows)))
    merged = merge(*parts)
    for name, value in whole.values.items():
        np.testing.assert_allclose(merged.values[name], value, rtol=1e-4, atol=1e-7)
    assert set(merged.header) == set(whole.header) - {"encoded"}  # that is of one order of all rows
    for name in merged.header:
        value = whole.header[name]
        if name == "completeness":
            assert value is None or merged.header[name] == pytest.approx(value, rel=1e-4, abs=1e-7)
        elif name == "stability":
            assert value is None or merged.header[name]["halves"] == value["halves"]
        elif name != "data":  # the digests of both parts
            assert (
                merged.header[name] == pytest.approx(value)
                if isinstance(value, float)
                else merged.header[name] == value
            )
    assert len(merged.header["data"]) == 2


def test_scores_that_do_not_belong_together_are_not_merged(
    model_and_params: tuple[Model, Params], task: Task, scores: Scores
):
    def changed(**fields: Any) -> Scores:
        return dataclasses.replace(scores, header=dict(scores.header) | fields, rows=("0" * 16,))

    with pytest.raises(ValueError, match="12 examples are in both"):
        merge(scores, scores)
    for field, value in (("model", "0" * 64), ("task", "stars"), ("head", "stars"), ("prompt", {"name": "flan"}),
                         ("criterion", {"name": "Random"})):  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot be merged: {field} differs"):
            merge(scores, changed(**{field: value}))
    with pytest.raises(ValueError, match="made without examples have nothing to merge"):
        merge(scores, changed(examples=0))
    with pytest.raises(ValueError, match="closed units have other means"):
        merge(scores, dataclasses.replace(changed(), means={"0.ffn.neurons": jnp.ones(32)}))
    fewer = {name: value for name, value in scores.values.items() if "heads" in name}
    with pytest.raises(ValueError, match="they are of other sites or numbers of units"):
        merge(scores, dataclasses.replace(changed(), values=fewer))


# Interruptions


class Interrupted(Exception):
    """A stand-in for Ctrl-C."""


@pytest.mark.parametrize(
    "criterion",
    [IntegratedGradients(nodes=1), Fisher(), GradientActivation(closed=calibration_means, examples=maximum)],
)
def test_a_run_that_goes_on_equals_an_uninterrupted_one(
    model_and_params: tuple[Model, Params], task: Task, tmp_path: Path, criterion: Any
):
    path = tmp_path / "partial.safetensors"
    settings: Any = {"criterion": criterion, "examples": 24, "batch_size": 4, "key": 7}
    counted: list[int] = []

    def interrupt(done: int, total: int) -> None:
        if done == SAVE_EVERY:
            raise Interrupted

    whole = score(*model_and_params, task, scoring(**settings))
    with pytest.raises(Interrupted):
        score(*model_and_params, task, scoring(**settings), progress=interrupt, resume=path)
    assert path.exists()
    found = score(
        *model_and_params, task, scoring(**settings), progress=lambda done, _: counted.append(done), resume=path
    )
    assert equal(found, whole) and not path.exists()
    assert counted == [SAVE_EVERY, SAVE_EVERY + 1, SAVE_EVERY + 2]  # those before were not computed again


def test_running_totals_do_not_grow_with_the_rows(model_and_params: tuple[Model, Params], tmp_path: Path):
    task = Task(name="moods", splits={"calibration": texts(200)}, labels=("sad", "glad"))
    sizes = []

    def interrupt(done: int, total: int) -> None:
        if done == SAVE_EVERY:
            raise Interrupted

    for examples in (20, 200):
        path = tmp_path / f"{examples}.safetensors"
        settings = scoring(Activation(), examples=examples, batch_size=4)
        with pytest.raises(Interrupted):
            score(*model_and_params, task, settings, progress=interrupt, resume=path)
        sizes.append(path.stat().st_size)
    assert sizes[1] <= sizes[0] + 8  # a digit more, and the header is a multiple of 8 bytes


def respelt(task: Task) -> Task:
    """The task with rows that are spelt otherwise: without case and punctuation they are the same."""
    rows = tuple(dataclasses.replace(row, text=f"{row.text.capitalize()}.") for row in task.rows("calibration"))
    return dataclasses.replace(task, splits={**task.splits, "calibration": rows})


def interrupted(model: Model, params: Params, task: Task, path: Path, settings: Scoring) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == SAVE_EVERY:
            raise Interrupted

    with pytest.raises(Interrupted):
        score(model, params, task, settings, progress=interrupt, resume=path)


def test_rows_that_changed_are_not_scored_on_nor_are_their_scores_taken(
    model_and_params: tuple[Model, Params], task: Task, tmp_path: Path
):
    model, params = model_and_params
    settings, path = scoring(Activation(), examples=24, batch_size=4), tmp_path / "scores.safetensors"
    interrupted(model, params, task, path, settings)
    with pytest.raises(ValueError, match="was begun with other settings \\(encoded is"):
        score(model, params, respelt(task), settings, resume=path)
    save_scores(path, score(model, params, task, settings, resume=path))
    assert kept_scores(path, model, params, task, settings) is not None
    assert kept_scores(path, model, params, respelt(task), settings) is None
    given = task.rows("calibration")[:8]
    save_scores(path, score(model, params, task, scoring(Activation(), examples=given)))
    assert kept_scores(path, model, params, task, scoring(Activation(), examples=given)) is not None
    assert kept_scores(path, model, params, task, scoring(Activation(), examples=given[::-1])) is None


def test_scores_of_another_version_are_made_anew(
    model_and_params: tuple[Model, Params], task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings, path = scoring(Activation(), examples=8), tmp_path / "scores.safetensors"
    save_scores(path, score(*model_and_params, task, settings))
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    assert kept_scores(path, *model_and_params, task, settings) is None


def test_totals_that_were_edited_are_refused(model_and_params: tuple[Model, Params], task: Task, tmp_path: Path):
    path, settings = tmp_path / "partial.safetensors", scoring(Activation(), examples=24, batch_size=4)
    interrupted(*model_and_params, task, path, settings)
    arrays = load_file(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[PARTIAL])
    one, other = "scores:0.ffn.neurons", "scores:1.ffn.neurons"
    swapped = arrays | {one: arrays[other], other: arrays[one]}
    edits: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (swapped, {}, "checksum"),
        (arrays | {one: arrays[one] * 2}, {}, "checksum"),
        (arrays, {"done": header["done"] - 1}, "checksum"),
        (arrays, {"done": "4"}, "done is '4', expected a count"),
        (arrays, {"done": -1}, "done is -1"),
        (arrays, {"settings": 5}, "settings is 5, expected an object"),
        (arrays, {"checksum": "no"}, "checksum is 'no', expected a digest"),
        ({name: array for name, array in arrays.items() if name != "weight"}, {}, "no weight"),
        (arrays | {"theirs:x": arrays[one]}, {}, "it holds 'theirs:x'"),
        (arrays | {"weight": arrays["weight"].astype(np.int8)}, {}, "weight is I8"),
    ]
    for changed, changes, message in edits:
        save_file(changed, path, {PARTIAL: json.dumps(header | changes)})
        with pytest.raises(ValueError, match=f"is damaged \\(.*{message}.*remove it to start again"):
            score(*model_and_params, task, settings, resume=path)
    count = {"done": header["done"] - 1}  # whoever makes a checksum anew meets what the totals must fit
    sums = {name: array for name, array in arrays.items() if name != one}
    for changed, changes, message in ((arrays, count, "other examples"), (sums, {}, "other sites or units")):
        save_file(changed, path, {PARTIAL: json.dumps(sealed(header | changes, changed))})
        with pytest.raises(ValueError, match=message):
            score(*model_and_params, task, settings, resume=path)


def test_a_score_file_that_was_edited_is_refused(tmp_path: Path, scores: Scores):
    path = save_scores(tmp_path / "scores.safetensors", scores)
    arrays, one, other = load_file(path), "0.ffn.neurons", "1.ffn.neurons"
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[METADATA])
    edits: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (arrays | {one: arrays[other], other: arrays[one]}, {}, "its checksum is another"),
        (arrays | {"rows": arrays["rows"][::-1].copy()}, {}, "its checksum is another"),
        (arrays, {"task": "another"}, "its checksum is another"),
        (arrays, {"checksum": 5}, "checksum"),
    ]
    for changed, changes, message in edits:
        save_file(changed, path, {METADATA: json.dumps(header | changes)})
        with pytest.raises(ValueError, match=message):
            load_scores(path)
    bare = {name: value for name, value in header.items() if name != "checksum"}
    for other in (bare, header | {"format": 4}):
        save_file(arrays, path, {METADATA: json.dumps(other)})
        with pytest.raises(ValueError, match="checksum"):
            load_scores(path)
    save_file(arrays, path, {METADATA: json.dumps(bare | {"format": 4})})  # those had none
    assert np.array_equal(load_scores(path).values[one], arrays[one])


def test_a_run_goes_on_only_with_its_own_settings(model_and_params: tuple[Model, Params], task: Task, tmp_path: Path):
    path = tmp_path / "partial.safetensors"
    model, params = model_and_params

    def interrupt(done: int, total: int) -> None:
        if done == SAVE_EVERY:
            raise Interrupted

    settings: Any = {"examples": 24, "batch_size": 4}
    with pytest.raises(Interrupted):
        score(model, params, task, scoring(criterion=Activation(), **settings), progress=interrupt, resume=path)
    with pytest.raises(ValueError, match=r"was begun with other settings \(criterion\.name is .GradientActi"):
        score(model, params, task, scoring(criterion=GradientActivation(), **settings), resume=path)
    with pytest.raises(ValueError, match=r"was begun with other settings \(.*data.*\)"):
        score(model, params, task, scoring(criterion=Activation(), key=1, **settings), resume=path)
    with pytest.raises(ValueError, match=r"was begun with other settings \(batch_size is 5, was 4"):
        score(model, params, task, scoring(criterion=Activation(), **(settings | {"batch_size": 5})), resume=path)
    other = jax.tree.map(lambda x: x + 1.0, params)
    with pytest.raises(ValueError, match=r"was begun with other settings \(model is .*, was [^;]*\): remove it"):
        score(model, other, task, scoring(criterion=Activation(), **settings), resume=path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        score(model, params, task, scoring(criterion=Activation(), **settings), resume=path)
    save_scores(path, score(model, params, task, Scoring(criterion=Activation(), rows=Rows(examples=4))))
    with pytest.raises(ValueError, match="does not hold an interrupted scoring run"):
        score(model, params, task, scoring(criterion=Activation(), **settings), resume=path)
    assert PARTIAL != METADATA


def test_texts_that_were_cut_are_counted(model_and_params: tuple[Model, Params], task: Task):
    whole, cut = (
        score(*model_and_params, task, scoring(GradientActivation(), examples=12, max_length=n)) for n in (None, 4)
    )
    assert "truncated" not in whole.header and cut.header["truncated"] > 0
    encoded = encode(model_and_params[0], draw(task, 12, jax.random.key(0)), max_length=4)
    assert cut.header["truncated"] == encoded.truncated
    other = dataclasses.replace(cut, rows=("0" * 16,))
    assert merge(cut, other).header["truncated"] == 2 * encoded.truncated

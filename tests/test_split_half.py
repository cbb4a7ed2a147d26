"""Variances and halves of scores, what they say about other examples, and runs that stop when they are stable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Place, place, record_of, run
from test_compilations import compiled
from test_scores import HEADS, WORDS, Interrupted, equal, scoring, texts
from tiny import tiny_model

from jaxprune.checkpoints.files import write_atomic
from jaxprune.checkpoints.tensors import write_tensors
from jaxprune.data.batches import make_batches
from jaxprune.data.splits import half_of
from jaxprune.data.tasks import Example, Rows, Task, draw
from jaxprune.models import Model
from jaxprune.scoring.attribution import Context, GradientActivation, IntegratedGradients, Measured
from jaxprune.scoring.criteria import Activation, Fisher, Magnitude
from jaxprune.scoring.objectives import maximum, signed
from jaxprune.scoring.run import FIRST, Scoring, _choose, add, halves_of, nothing, score, variance_of
from jaxprune.scoring.scores import METADATA, Scores, load_scores, merge, save_scores
from jaxprune.scoring.stability import Stability, least_reliability, needed, noise_of, reliability, stability
from jaxprune.units import Params

__all__ = ["compiled", "place"]  # fixtures


@pytest.fixture(scope="module")
def model_and_params() -> tuple[Model, Params]:
    model, params = tiny_model(layers=1, heads=HEADS)
    return dataclasses.replace(model, source=WORDS), params


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(name="moods", splits={"calibration": texts(100)}, labels=("sad", "glad"))


@pytest.fixture(scope="module")
def scores(model_and_params: tuple[Model, Params], task: Task) -> Scores:
    return score(*model_and_params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=24, batch_size=8)))


def halves_stability(scores: Scores, **settings: Any) -> Stability | None:
    """The stability of the halves in some scores."""
    return stability(scores.halves, scores.header.get("halves"), **settings)


def known(*pairs: list[list[float]], counts: tuple[int, int] = (5, 5)) -> Scores:
    """Scores whose two halves are given, site by site."""
    halves = {f"{i}.ffn.neurons": jnp.asarray(pair) for i, pair in enumerate(pairs)}
    return Scores({name: pair.mean(0) for name, pair in halves.items()}, {"halves": [*counts]}, halves=halves)


def close(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-7)


# numbers by hand


def test_spearman_and_brown_by_hand():
    """Halves of 50 that correlate by 0.6: 2 * 0.6 / 1.6 = 0.75. For 0.9: 0.9 * 0.25 / (0.75 * 0.1) = 3 times 100."""
    noise = noise_of(0.6, (50, 50))
    assert reliability(noise, 100) == pytest.approx(0.75)
    assert reliability(noise, 50) == pytest.approx(0.6)
    assert needed(noise, 0.9) == 300
    assert needed(noise, 0.75) == 100


@pytest.mark.parametrize("correlation", [0.05, 0.5, 0.9])
def test_unequal_halves_follow_horst(correlation: float):
    """Horst 1951: with shares p and q, (sqrt(r^4 + 4 r^2 (1 - r^2) p q) - r^2) / (2 p q (1 - r^2))."""
    p, q, square = 0.3, 0.7, correlation**2
    expected = (np.sqrt(square**2 + 4 * square * (1 - square) * p * q) - square) / (2 * p * q * (1 - square))
    assert reliability(noise_of(correlation, (30, 70)), 100) == pytest.approx(expected)


@pytest.mark.parametrize("correlation", [0.0, -0.4])
def test_halves_that_do_not_agree_promise_nothing(correlation: float):
    noise = noise_of(correlation, (8, 9))
    assert reliability(noise, 1000) == 0.0
    assert needed(noise, 0.9) is None
    assert reliability(noise_of(1.0, (8, 9)), 2) == 1.0
    assert needed(noise_of(1.0, (8, 9)), 0.99) == 1


def test_stability_by_hand():
    """Ranks 1 2 3 4 and 1 3 2 4: correlation 0.8, with all 10 examples 1.6 / 1.8; noise 10 * 0.2 / 1.6 = 1.25 examples.

    Of two units of four, the halves keep 2, 3 and 1, 3: one of three. Two random choices have 0, 1 or 2 in common with
    probabilities 1/6, 4/6 and 1/6: 4/6 * 1/3 + 1/6.
    """
    found = halves_stability(known([[1.0, 2.0, 3.0, 4.0], [0.1, 0.5, 0.3, 9.0]]), target=0.95, fractions=(0.5,))
    assert found is not None
    own = found.kinds["neurons"]
    assert (own.units, found.examples, found.halves) == (4, 10, (5, 5))
    assert own.spearman == own.overall == pytest.approx(0.8)
    assert found.reliability == own.reliability == pytest.approx(1.6 / 1.8)
    assert found.needed == own.needed == 24  # 1.25 * 0.95 / 0.05 = 23.75
    assert own.overlap == (pytest.approx(1 / 3),)
    assert own.chance == (pytest.approx(7 / 18),)
    json.dumps(found.to_json(), allow_nan=False)


def test_sites_count_alike_and_the_worst_kind_decides():
    """One site agrees, the other one is reversed: mean 0, though all units together agree."""
    scores = known([[1.0, 2.0], [1.0, 2.0]], [[11.0, 12.0], [12.0, 11.0]])
    found = halves_stability(scores)
    assert found is not None
    assert found.kinds["neurons"].spearman == 0.0
    assert found.kinds["neurons"].overall == pytest.approx(0.8)
    assert (found.reliability, found.needed) == (0.0, None)
    assert scores.halves is not None
    more = dict(scores.halves) | {"0.attention.heads": jnp.asarray([[1.0, 2.0, 3.0], [2.0, 4.0, 9.0]])}
    found = halves_stability(dataclasses.replace(scores, halves=more))
    assert found is not None
    assert (found.kinds["heads"].reliability, found.reliability) == (1.0, 0.0)
    assert least_reliability(more, (5, 5)) == 0.0


def test_equal_scores_do_not_rank():
    found = halves_stability(known([[1.0, 1.0], [1.0, 2.0]]))
    assert found is not None
    assert (found.reliability, found.needed, found.kinds["neurons"].reliability) == (None, None, None)


def test_the_estimate_is_what_a_second_run_gives():
    """True scores of 2,000 units, and 40 examples of each with five times their spread; then 160, as estimated."""
    random = np.random.default_rng(0)
    truth = random.standard_normal(2000)
    runs = [truth + 5 * random.standard_normal((40, 2000)) for _ in range(2)]
    halves = {"0.ffn.neurons": np.stack([runs[0][:15].mean(0), runs[0][15:].mean(0)])}
    found = least_reliability(halves, (15, 25))
    second = np.corrcoef(runs[0].mean(0), runs[1].mean(0))[0, 1]
    assert found == pytest.approx(second, abs=0.05)  # ranks, not values, and 2,000 units
    scores = Scores({}, {"halves": [15, 25]}, halves={name: jnp.asarray(own) for name, own in halves.items()})
    told = halves_stability(scores, target=0.8)
    assert told is not None and told.needed is not None
    many = [truth + 5 * random.standard_normal((told.needed, 2000)) for _ in range(2)]
    assert np.corrcoef(many[0].mean(0), many[1].mean(0))[0, 1] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("target", [0.0, 1.0, 1.5, -1.0, float("nan")])
def test_a_target_out_of_range_is_refused(scores: Scores, target: float):
    with pytest.raises(ValueError, match=r"a stability must lie in \(0, 1\), got"):
        halves_stability(scores, target=target)
    with pytest.raises(ValueError, match=r"fractions must lie in \(0, 1\], got 0"):
        halves_stability(scores, fractions=(0.5, 0.0))


# variances and halves


@pytest.mark.parametrize("criterion", [GradientActivation(), IntegratedGradients(nodes=2, examples=signed), Fisher()])
@pytest.mark.parametrize("batch_size", [5, pytest.param(24, marks=pytest.mark.slow)])
def test_the_variance_is_that_of_the_examples(
    model_and_params: tuple[Model, Params], task: Task, criterion: Any, batch_size: int
):
    model, params = model_and_params
    rows = task.rows("calibration")[:12]
    found = score(model, params, task, Scoring(criterion=criterion, rows=Rows(examples=rows, batch_size=batch_size)))
    [batch] = make_batches(model, rows, batch_size=12)
    each = criterion(model, params, batch, Context(head="moods", key=jax.random.key(0))).scores
    first = np.array([half_of(rows[i]) == 0 for i in batch["index"]])
    assert found.header["halves"] == [first.sum(), (~first).sum()]
    assert found.variance is not None and found.halves is not None
    for name, value in each.items():
        exact = np.asarray(value, np.float64)
        np.testing.assert_allclose(found.variance[name], exact.var(0, ddof=1), rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(found.halves[name][0], exact[first].mean(0), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found.halves[name][1], exact[~first].mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_variances_are_sound_far_from_zero(offset: float):
    """With sums of squares, float32 would be wrong by more than the variance itself: 1e6 has steps of 0.06."""
    rows = np.random.default_rng(1).normal(offset, 0.1, (200, 50)).astype(np.float32)
    totals = None
    for part in np.split(rows, 25):
        found = Measured({"0.ffn.neurons": jnp.asarray(part)}, {})
        ones = jnp.ones(8)
        totals = add(False, totals or nothing(False, found), found, ones, ones)
    assert totals is not None
    variance = variance_of(totals)
    assert variance is not None
    np.testing.assert_allclose(variance["0.ffn.neurons"], rows.astype(np.float64).var(0, ddof=1), rtol=2e-2)


def test_padding_is_in_no_half():
    """Two examples and two rows of padding that hold infinity: means 3, halves 2 and 4, variance 2."""
    rows = Measured({"0.ffn.neurons": jnp.asarray([[2.0], [jnp.inf], [4.0], [jnp.nan]])}, {})
    totals = add(False, nothing(False, rows), rows, jnp.array([1.0, 0, 1, 0]), jnp.array([0.0, 1, 1, 0]))
    variance, halves = variance_of(totals), halves_of(totals)
    assert variance is not None and halves is not None
    assert variance["0.ffn.neurons"].tolist() == [2.0]
    assert halves["0.ffn.neurons"].tolist() == [[2.0], [4.0]]
    assert totals.counts.tolist() == [1.0, 1.0]


def test_how_examples_are_ordered_and_batched_changes_nothing(model_and_params: tuple[Model, Params], task: Task):
    rows = task.rows("calibration")[:20]
    how: list[tuple[Any, int]] = [(rows, 32), (rows[::-1], 32), (rows, 3), (rows[::-1], 7)]
    one, *others = (
        score(
            *model_and_params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=own, batch_size=size))
        )
        for own, size in how
    )
    for other in others:
        assert other.header["halves"] == one.header["halves"]
        close(other.variance, one.variance)
        close(other.halves, one.halves)
        close(other.signed, one.signed)


def test_a_half_is_known_by_the_text_alone():
    rows = texts(400)
    assert 160 < sum(map(half_of, rows)) < 240
    assert [half_of(row) for row in rows] == [half_of(Example(row.text.upper() + "!", None, 1)) for row in rows]
    assert half_of(Example("a", "b")) == half_of(Example("b", "a"))


@pytest.mark.parametrize("criterion", [Magnitude(), GradientActivation(examples=maximum)])
def test_scores_that_are_no_means_have_no_variance(
    model_and_params: tuple[Model, Params], task: Task, tmp_path: Path, criterion: Any
):
    found = score(*model_and_params, task, Scoring(criterion=criterion, rows=Rows(examples=8)))
    assert (found.variance, found.halves, found.header["halves"], found.header["stability"]) == (None, None, None, None)
    assert halves_stability(found) is None
    assert equal(load_scores(save_scores(tmp_path / "s.safetensors", found)), found)


def test_one_example_has_no_variance(model_and_params: tuple[Model, Params], task: Task):
    rows = task.rows("calibration")[:1]
    found = score(*model_and_params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=rows)))
    assert found.variance is None and sorted(found.header["halves"]) == [0, 1]
    assert found.header["stability"] is None and halves_stability(found) is None


# files


def test_files_of_the_first_format_load(tmp_path: Path, scores: Scores):
    new = ("halves", "stability")
    header = {name: value for name, value in scores.header.items() if name not in new} | {"format": 1}
    values = {name: np.asarray(value) for name, value in scores.values.items()}
    path = write_atomic(
        tmp_path / "old.safetensors",
        lambda file: write_tensors(file, values, {METADATA: json.dumps(header | {"rows": scores.rows})}),
    )
    old = load_scores(path)
    assert old.header == header and old.rows == scores.rows
    assert old.variance is None and old.halves is None and halves_stability(old) is None
    assert old.signed is None
    other = dataclasses.replace(scores, rows=("0" * 16,))
    merged = merge(old, other)
    assert (merged.variance, merged.halves, merged.header["halves"], merged.header["stability"]) == (None,) * 4
    assert merged.header["examples"] == 48


def test_what_does_not_belong_to_the_scores_is_refused(tmp_path: Path, scores: Scores):
    site = next(iter(scores.values))
    tensors = {name: np.asarray(value) for name, value in scores.values.items()} | {"rows": np.zeros((0, 8), np.uint8)}
    for extra in ("variance", "halves", "signed"):
        tensors |= {f"{extra}:{name}": np.asarray(value) for name, value in getattr(scores, extra).items()}

    def refuses(message: str, changes: dict[str, Any], **header: Any) -> None:
        changed = {name: value for name, value in (tensors | changes).items() if value is not None}
        text = json.dumps(dict(scores.header) | header)
        path = write_atomic(
            tmp_path / "s.safetensors",
            lambda file: write_tensors(file, changed, {METADATA: text}),
        )
        with pytest.raises(ValueError, match=message):
            load_scores(path)

    row = tensors[site]
    refuses(f"thirds:{site} is neither scores nor one of means:SITE", {f"thirds:{site}": row})
    refuses(f"variance:{site} does not fit", {f"variance:{site}": row[:-1]})
    refuses(f"variance:{site} does not fit", {f"variance:{site}": None})
    refuses("variance:9.ffn.neurons does not fit", {"variance:9.ffn.neurons": row})
    refuses(f"halves:{site} does not fit", {f"halves:{site}": row})
    refuses(f"signed:{site} does not fit", {f"signed:{site}": None})
    refuses(f"variance:{site} holds -1", {f"variance:{site}": row * 0 - 1})
    refuses("halves in its header is None, expected two numbers that add up to its examples", {}, halves=None)
    refuses(r"halves in its header is \[1, 2\]", {}, halves=[1, 2])
    refuses("halves is 3, expected a list or null", {}, halves=3)
    refuses("stability is 1, expected an object or null", {}, stability=1)


@pytest.mark.parametrize("cut", [1, 2, 11])
def test_merged_parts_have_the_variance_and_halves_of_the_whole(
    model_and_params: tuple[Model, Params], task: Task, cut: int
):
    rows = task.rows("calibration")[:21]
    whole, *parts = (
        score(*model_and_params, task, Scoring(criterion=GradientActivation(), rows=Rows(examples=own)))
        for own in (rows, rows[:cut], rows[cut:])
    )
    merged = merge(*parts)
    close(merged.variance, whole.variance)
    close(merged.halves, whole.halves)
    close(merged.signed, whole.signed)
    assert merged.header["halves"] == whole.header["halves"]
    found, expected = (own.header["stability"]["reliability"] for own in (merged, whole))
    assert found == pytest.approx(expected, abs=0.01)  # units that are nearly equal may swap ranks
    assert equal(merge(*parts), merged)


# runs that stop by themselves


def test_it_stops_as_soon_as_it_is_stable(model_and_params: tuple[Model, Params], task: Task):
    counted: list[int] = []
    how: Any = {"criterion": Activation(), "batch_size": 8}
    found = score(
        *model_and_params, task, scoring(until_stable=0.6, **how), progress=lambda done, _: counted.append(done)
    )
    assert found.header["until_stable"] == {"target": 0.6, "reached": True, "most": 100}
    assert found.header["examples"] == len(found.rows) == FIRST == 32
    assert counted == [1, 2, 3, 4]  # batches of 8
    assert found.header["stability"]["reliability"] >= 0.6 == found.header["stability"]["target"]


def test_steps_equal_all_at_once(model_and_params: tuple[Model, Params], task: Task):
    """32, 32 more, and 36 more are never stable enough: what comes out are the scores of all 100."""
    how: Any = {"criterion": GradientActivation(), "batch_size": 8}
    found = score(*model_and_params, task, scoring(until_stable=0.9999, **how))
    whole = score(*model_and_params, task, scoring(examples=100, **how))
    assert found.header["until_stable"] == {"target": 0.9999, "reached": False, "most": 100}
    for part in ("values", "variance", "halves", "signed"):
        close(getattr(found, part), getattr(whole, part))
    assert found.rows == whole.rows
    for name in ("data", "halves", "examples"):
        assert found.header[name] == whole.header[name]
    assert found.header["mean_length"] == pytest.approx(whole.header["mean_length"])


def test_a_run_that_stops_equals_one_of_its_examples(model_and_params: tuple[Model, Params], task: Task):
    how: Any = {"criterion": GradientActivation(), "key": 3}
    target = score(*model_and_params, task, scoring(examples=64, **how)).header["stability"]["reliability"] - 1e-3
    found = score(*model_and_params, task, scoring(until_stable=target, **how))
    used = found.header["examples"]
    assert used in (32, 64)
    whole = score(*model_and_params, task, scoring(examples=used, **how))
    assert found.rows == whole.rows
    close(found.values, whole.values)
    assert found.header["mean_length"] == pytest.approx(whole.header["mean_length"])


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_every_step_holds_what_a_draw_of_its_size_holds(labels: int):
    rows = tuple(dataclasses.replace(row, label=i % labels) for i, row in enumerate(texts(150)))
    task = Task(name="moods", splits={"calibration": rows}, labels=tuple(map(str, range(labels))))
    taken, steps = _choose(task, Rows(key=jax.random.key(1)), True, True)
    assert steps == [32, 64, 128, 150] and len(set(taken)) == len(taken) == 150
    for size in steps:
        assert len(set(draw(task, size, jax.random.key(1))) ^ set(taken[:size])) <= 2  # rounded shares of labels


def test_given_examples_and_few_ones_stop_too(model_and_params: tuple[Model, Params], task: Task):
    rows = task.rows("calibration")[:10]
    found = score(*model_and_params, task, Scoring(criterion=Activation(), rows=Rows(examples=rows), until_stable=0.5))
    assert (found.header["split"], found.header["examples"], found.header["until_stable"]["most"]) == ("given", 10, 10)
    found = score(*model_and_params, task, Scoring(criterion=Activation(), rows=Rows(examples=40), until_stable=0.9999))
    assert found.header["examples"] == found.header["until_stable"]["most"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_stable_run_that_goes_on_equals_an_uninterrupted_one(
    model_and_params: tuple[Model, Params], task: Task, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
):
    """It is interrupted within a step, at its end, and in later steps; the file is written after every batch."""
    monkeypatch.setattr("jaxprune.scoring.run.SAVE_EVERY", 1)
    path = tmp_path / "partial.safetensors"
    settings: Any = {"criterion": GradientActivation(), "batch_size": 8, "until_stable": 0.9999, "examples": 80}

    def interrupt(done: int, total: int) -> None:
        if done == stop:
            raise Interrupted

    whole = score(*model_and_params, task, scoring(**settings))
    with pytest.raises(Interrupted):
        score(*model_and_params, task, scoring(**settings), progress=interrupt, resume=path)
    assert path.exists()
    for field, value in (("until_stable", 0.9), ("examples", 81)):
        with pytest.raises(ValueError, match=r"was begun with other settings"):
            score(*model_and_params, task, scoring(**settings | {field: value}), resume=path)
    assert equal(score(*model_and_params, task, scoring(**settings), resume=path), whole) and not path.exists()


def test_a_damaged_file_of_totals_is_refused(model_and_params: tuple[Model, Params], task: Task, tmp_path: Path):
    from jaxprune.checkpoints.tensors import TensorFile
    from jaxprune.scoring.run import PARTIAL

    path = tmp_path / "partial.safetensors"
    settings: Any = {"criterion": Activation(), "examples": 40, "batch_size": 8}

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        score(*model_and_params, task, scoring(**settings), progress=interrupt, resume=path)
    with TensorFile(path) as file:
        arrays, text = {name: file.read(name) for name in file.entries}, file.metadata[PARTIAL]
    for changed, message in (
        ({name: value for name, value in arrays.items() if name != "counts"}, "damaged .no counts"),
        (arrays | {"thirds:0.ffn.neurons": np.zeros(3, np.float32)}, "damaged .it holds 'thirds:0.ffn.neurons'"),
    ):
        write_atomic(path, lambda file, own=changed: write_tensors(file, own, {PARTIAL: text}))
        with pytest.raises(ValueError, match=message):
            score(*model_and_params, task, scoring(**settings), resume=path)


@pytest.mark.slow
def test_steps_compile_nothing_more(model_and_params: tuple[Model, Params], task: Task, compiled: list[int]):
    programs = []
    for target in (0.9999, None):
        jax.clear_caches()
        before = compiled[0]
        how: Any = {"criterion": GradientActivation(), "examples": 100, "batch_size": 8, "until_stable": target}
        score(*model_and_params, task, scoring(**how))
        programs.append(compiled[0] - before)
    assert 0 < programs[0] <= programs[1], programs


def test_what_cannot_become_stable_is_refused(model_and_params: tuple[Model, Params], task: Task):
    with pytest.raises(ValueError, match=r"a stability must lie in \(0, 1\), got 1.5"):
        score(*model_and_params, task, Scoring(until_stable=1.5))
    with pytest.raises(ValueError, match=r"criterion Magnitude reads no example: .* leave until_stable out"):
        score(*model_and_params, task, Scoring(criterion=Magnitude(), until_stable=0.9))
    with pytest.raises(ValueError, match="criterion GradientActivation takes the largest of the examples"):
        score(*model_and_params, task, Scoring(criterion=GradientActivation(examples=maximum), until_stable=0.9))
    with pytest.raises(ValueError, match="examples must lie in 1 to 100"):
        score(*model_and_params, task, Scoring(criterion=Activation(), rows=Rows(examples=101), until_stable=0.9))


# the command


def test_the_command_stops_by_itself(place: Place, tmp_path: Path):
    rows = ("score", place.model, "--task", "mood", "--data", place.data, "--criterion", "activation")
    record = record_of(*rows, "--until-stable", 0.5, "-o", tmp_path / "a")
    assert record["until_stable"]["reached"] and record["examples"] == 32
    assert record["stability"]["reliability"] >= 0.5
    shown = run(*rows, "--until-stable", 0.5, "-o", tmp_path / "b")
    assert "Stopped after 32 of 60 examples" in shown.stdout
    shown = run(*rows, "--until-stable", 0.99999, "--examples", 40, "-o", tmp_path / "c")
    assert "Scored all 40 examples" in shown.stdout and "is below 0.99999. About" in " ".join(shown.stdout.split())
    assert load_scores(tmp_path / "c").header["examples"] == 40


def test_the_command_shows_stability_in_80_columns(place: Place, tmp_path: Path):
    rows = ("score", place.model, "--task", "mood", "--data", place.data, "--examples", 24)
    shown = run(*rows, "--criterion", "gradient-activation", "-o", tmp_path / "a")
    assert shown.exit_code == 0, shown.stderr
    for part in ("between", "second", "kept at", "chance", "Spearman", "more are needed for 0.95"):
        assert part in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines() if str(tmp_path) not in line)
    shown = run(*rows, "--criterion", "gradient-activation", "--examples-reduction", "maximum", "-o", tmp_path / "b")
    assert "Stability: not known, the largest of the examples decides." in shown.stdout
    shown = run(*rows[:-2], "--criterion", "magnitude", "-o", tmp_path / "c")
    assert shown.exit_code == 0 and "tability" not in shown.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--until-stable", 1.5), r"a stability must lie in \(0, 1\), got 1.5"),
        (("--until-stable", "soon"), "'--until-stable'"),
        (("--until-stable", 0.9, "--criterion", "magnitude"), "Magnitude reads no example"),
        (("--until-stable", 0.9, "--examples", 9999), "examples must lie in 1 to 60"),
    ],
)
def test_bad_targets_are_one_line_and_exit_code_2(place: Place, tmp_path: Path, options: Any, message: str):
    import re

    result = run("score", place.model, "--task", "mood", "--data", place.data, "-o", tmp_path / "s", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(message, result.stderr) and result.stderr.count("\n") == 1

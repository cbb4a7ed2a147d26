"""Widths by measured answers: within the budget, no worse than other allocations, and true to what was measured."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from commands import make_place, record_of, run
from hand_tables import hand_table
from test_decoders import ANSWERS, ASKED
from test_spans import questions, spans_model, task_of
from test_training import DATA, lengths, moods
from tiny import tiny_model

import jaxprune as jp
from jaxprune.data.batches import encode
from jaxprune.data.prompts import Prompt, prompt_of
from jaxprune.data.tasks import Rows, Task
from jaxprune.models import Model
from jaxprune.models.layers import TaskHead
from jaxprune.pruning import allocation
from jaxprune.pruning.allocation import Measuring, _Answers, _Asked, _Loss, _Reader, _Step, allocate
from jaxprune.pruning.budgets import Budget, Flops, Latency, Memory, Parameters, Rules, Units
from jaxprune.pruning.pooling import kept_by_any
from jaxprune.pruning.selection import Ladders, ladders, select
from jaxprune.scoring.scores import Scores
from jaxprune.units import Intervention, Params, axes_of, flatten, open_gates, site_of, unflatten

HEADS = (TaskHead(name="moods", labels=("bad", "good")),)
MEASURING = Measuring(rows=Rows(examples=12, batch_size=5))
WRITTEN = Prompt(template="{text} mood", words=("bad", "good"))
TYPES = ("bert", "t5", "llama")


@lru_cache
def setting(model_type: str) -> tuple[Model, Params, Task]:
    """A tiny model, random but for its vocabulary, and a task."""
    if model_type == "bert":
        model, params = tiny_model("bert", heads=HEADS, layers=3)
        return replace(model, source=DATA / "words"), params, moods()
    model, params = tiny_model(model_type, layers=3 if model_type == "llama" else 2)
    return replace(model, source=ANSWERS), params, replace(moods(), prompt=ASKED if model_type == "llama" else WRITTEN)


def scores_of(model: Model, params: Params, seed: int = 0) -> dict[str, np.ndarray]:
    random, kinds = np.random.default_rng(seed), ("groups" if model.continues else "heads", "neurons")
    return {name: random.random(len(gate)) for name, gate in open_gates(model, params, kinds).items()}


def measured(model: Model, params: Params, task: Task, labelled: bool = False) -> tuple[_Reader, _Loss]:
    encoded = encode(model, task.rows("calibration")[:12], prompt=prompt_of(model, task))
    head = "words" if model.continues else "moods" if model.config.task_heads else "language"
    reader = _Reader(model, params, encoded, head, 5)
    return reader, _Loss.of(model, task, reader, reader.answers(), labelled)


def gated(reader: _Reader, gates: Any) -> list[_Step]:
    return [_Step(layer, Intervention(gates)) for layer in reader.layers]


def answers_of(
    model: Model, params: Params, tasks: list[Task], choices: Ladders, measuring: Measuring = MEASURING
) -> _Answers:
    asked = [_Asked.of(model, task, None, measuring.rows) for task in tasks]
    return _Answers(model, params, asked, measuring, None, choices)


def cost_of(choices: Ladders, gates: Any) -> float:
    return choices.cost(choices.places(gates))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize(
    "budget",
    [Flops(0.5, length=8), Units(0.7), Memory(0.9), Parameters(0.3), Latency(0.6, length=8)],
    ids=lambda b: b.name,
)
def test_what_stays_is_within_the_budget_and_short_of_it_by_less_than_a_block(model_type: str, budget: Budget):
    model, params, task = setting(model_type)
    length = (8, 2) if model_type == "t5" and isinstance(budget, Flops) else budget.length
    budget, scores = replace(budget, length=length), scores_of(model, params)
    if isinstance(budget, Latency):
        budget = replace(budget, length=None, table=hand_table(model, params))
    rules = Rules(multiple_of={"neurons": 4})
    found = allocate(model, params, task, scores, budget, replace(MEASURING, rounds=1), rules=rules)
    choices = ladders(model, params, scores, budget, rules)
    at = choices.places(found.gates)
    pairs = zip(choices.steps, at, strict=True)
    more = [each.costs[at_ + 1] - each.costs[at_] for each, at_ in pairs if at_ + 1 < len(each.costs)]
    assert choices.limit - max(more) < choices.cost(at) <= choices.limit
    for name, gate in found.gates.items():  # the best of every module
        kept = scores[name][np.asarray(gate) == 1]
        assert min(kept, default=9) >= max(scores[name][np.asarray(gate) == 0], default=-9)
        assert not name.endswith("neurons") or len(kept) % 4 == 0


@pytest.mark.parametrize("model_type", TYPES)
def test_it_never_loses_more_than_another_allocation_and_does_so_again(model_type: str):
    model, params, task = setting(model_type)
    budget, scores = Parameters(0.4), scores_of(model, params)
    progress: list[tuple[int, int]] = []
    found = allocate(model, params, task, scores, budget, MEASURING, progress=lambda *own: progress.append(own))
    again = allocate(model, params, task, scores, budget, MEASURING)
    assert all(np.array_equal(found.gates[name], again.gates[name]) for name in found.gates)
    assert (found.loss, found.rounds) == (again.loss, again.rounds)
    reader, loss = measured(model, params, replace(task, splits={"calibration": sorted_rows(task, found.rows)}))
    for name, lost in found.starts.items():
        other = select(model, params, scores, budget, rules=Rules(allocation=name))
        assert loss(reader.answers(gated(reader, other))) == pytest.approx(lost, rel=1e-4, abs=1e-6)
        assert found.loss <= lost
    assert loss(reader.answers(gated(reader, found.gates))) == pytest.approx(found.loss, rel=1e-4, abs=1e-6)
    assert found.loss < min(found.starts.values())  # there is something to gain here
    assert progress[-1][0] == progress[-1][1] and progress == sorted(progress)


def sorted_rows(task: Task, keys: tuple[str, ...]) -> tuple[Any, ...]:
    from jaxprune.data.tasks import row_key

    return tuple(row for row in task.rows("calibration") if row_key(row) in keys)


@pytest.mark.parametrize("model_type", TYPES)
def test_nothing_changed_loses_nothing(model_type: str):
    model, params, task = setting(model_type)
    found = allocate(model, params, task, scores_of(model, params), Units(1.0), MEASURING)
    assert found.loss == pytest.approx(0.0, abs=1e-6) and all(np.asarray(gate).all() for gate in found.gates.values())


@pytest.mark.parametrize("model_type", TYPES)
def test_layers_below_a_change_run_once_and_predictions_are_what_was_measured(model_type: str):
    model, params, task = setting(model_type)
    choices = ladders(model, params, scores_of(model, params), Units(0.5), Rules())
    at = np.array([len(each.widths) // 2 for each in choices.steps])
    moves = answers_of(model, params, [task], choices).moves(at, [[0, int(place) + 1] for place in at], lambda: None)
    again = answers_of(model, params, [task], choices)
    assert set(moves.site) == set(range(len(choices.sites)))
    for site, to in zip(moves.site, moves.place, strict=True):
        moved = at.copy()
        moved[site] = to
        whole = again(moved, lambda: None)
        np.testing.assert_allclose(moves.answers(moved), whole, rtol=1e-4, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("calibration", ["none", "batch"])
def test_slopes_and_curvatures_are_those_of_the_loss(labelled: bool, calibration: Any):
    model, params, task = setting("llama")
    task = replace(task, prompt=replace(ASKED, calibration=calibration))
    reader, loss = measured(model, params, task, labelled)
    random = np.random.default_rng(0)
    answers = random.standard_normal(reader.answers().shape)
    changes = random.standard_normal((3, *answers.shape))
    slope, curve = loss.quadratic(answers, changes)
    step = 1e-3
    for i in range(3):
        for j in range(3):
            values = [loss(answers + step * (a * changes[i] + b * changes[j])) for a in (-1, 1) for b in (-1, 1)]
            assert curve[i, j] == pytest.approx(
                (values[3] - values[2] - values[1] + values[0]) / (4 * step**2), rel=1e-3, abs=1e-5
            )
        low, high = (loss(answers + sign * step * changes[i]) for sign in (-1, 1))
        assert slope[i] == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=1e-6)


def with_kernel(params: Params, layer: int, module: str, name: str, change: Any) -> Params:
    flat = flatten(params)
    path = ("layers", layer, module, name, "kernel")
    return unflatten({**flat, path: jnp.asarray(change(np.array(flat[path])))})


def test_a_module_that_does_nothing_gives_all_and_those_that_do_keep_it():
    model, params, task = setting("bert")
    params = with_kernel(params, 1, "ffn", "down", np.zeros_like)
    scores = scores_of(model, params)
    found = allocate(model, params, task, scores, Parameters(0.7), Measuring(rows=MEASURING.rows, rounds=5))
    kept = {name: float(np.asarray(gate).mean()) for name, gate in found.gates.items()}
    assert kept["1.ffn.neurons"] < min(kept["0.ffn.neurons"], kept["2.ffn.neurons"])
    assert found.loss < 0.5 * min(found.starts.values())


def test_a_module_whose_loss_falls_again_when_all_of_it_goes():
    """Two halves that cancel each other: one of them alone does harm, both or none do not."""
    model, params, task = setting("bert")
    half = 16

    def cancelling(kernel: np.ndarray) -> np.ndarray:
        kernel[half:] = -kernel[:half]
        return 4.0 * kernel

    def alike(kernel: np.ndarray) -> np.ndarray:
        kernel[:, half:] = kernel[:, :half]
        return kernel

    params = with_kernel(with_kernel(params, 1, "ffn", "down", cancelling), 1, "ffn", "up", alike)
    flat = flatten(params)
    bias = np.array(flat["layers", 1, "ffn", "up", "bias"])
    bias[half:] = bias[:half]
    params = unflatten({**flat, ("layers", 1, "ffn", "up", "bias"): jnp.asarray(bias)})
    scores = scores_of(model, params) | {"1.ffn.neurons": np.arange(2 * half, 0, -1.0)}
    reader, loss = measured(model, params, task)

    def lost(width: int) -> float:
        return loss(
            reader.answers(gated(reader, {"1.ffn.neurons": jnp.asarray(np.arange(2 * half) < width, jnp.float32)}))
        )

    assert lost(0) < 1e-6 and lost(half) > 100 * max(lost(0), lost(2 * half), 1e-6)
    found = allocate(model, params, task, scores, Parameters(0.8), Measuring(rows=MEASURING.rows, rounds=4))
    assert found.loss < 0.5 * min(found.starts.values())


def test_a_regression_and_running_text_have_losses_of_their_own(tmp_path: Path):
    model, params = tiny_model("bert", heads=(TaskHead(name="lengths", labels=("score",), regression=True),))
    model = replace(model, source=DATA / "words")
    found = allocate(model, params, lengths(moods()), scores_of(model, params), Units(0.5), MEASURING)
    assert 0 < found.loss <= min(found.starts.values())

    model, params, _ = setting("llama")
    texts = [row.text for row in moods().rows("train")]
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(texts[i : i + 4]) for i in range(0, 300, 4)))
    task = jp.windows(model, jp.load_task(tmp_path / "text.txt"), tokens=16)
    found = allocate(model, params, task, scores_of(model, params), Units(0.5), MEASURING)
    assert 0 < found.loss < min(found.starts.values())
    with pytest.raises(ValueError, match="leave labelled out"):
        allocate(model, params, task, scores_of(model, params), Units(0.5), replace(MEASURING, labelled=True))


def test_spans_are_answers_among_the_tokens():
    model, params = spans_model(layers=2)
    task = task_of(questions())
    found = allocate(model, params, task, scores_of(model, params), Units(0.5), MEASURING)
    assert 0 < found.loss < min(found.starts.values()) < 50  # tokens at which none may start or end do not count
    whole = allocate(model, params, task, scores_of(model, params), Units(1.0), MEASURING)
    assert whole.loss == pytest.approx(0.0, abs=1e-6)


def test_labels_may_be_the_aim():
    model, params, task = setting("bert")
    scores, budget = scores_of(model, params), Parameters(0.4)
    found = allocate(model, params, task, scores, budget, replace(MEASURING, labelled=True))
    assert found.loss < min(found.starts.values())
    other = {row: replace(row, label=1 - int(row.label or 0)) for row in task.rows("calibration")}
    turned = replace(task, splits={**task.splits, "calibration": tuple(other[row] for row in task.rows("calibration"))})
    assert allocate(model, params, turned, scores, budget, replace(MEASURING, labelled=True)).loss != found.loss


def test_several_tasks_are_one_loss():
    model, params, task = setting("llama")
    other = replace(task, name="others", prompt=replace(ASKED, template="{text} is it"))
    scores, budget = scores_of(model, params), Parameters(0.4)
    alone = [allocate(model, params, own, scores, budget, MEASURING) for own in (task, other)]
    both = allocate(model, params, [task, other], scores, budget, MEASURING)
    for name in both.starts:
        assert both.starts[name] == pytest.approx(np.mean([own.starts[name] for own in alone]), rel=1e-4)
    choices = ladders(model, params, scores, budget, Rules())
    one, two = (answers_of(model, params, [own], choices) for own in (task, other))
    together, at = answers_of(model, params, [task, other], choices), choices.places(both.gates)
    answers = [own(at, lambda: None) for own in (one, two, together)]
    np.testing.assert_allclose(np.concatenate(answers[:2]), answers[2], rtol=1e-5, atol=1e-6)
    changes = np.random.default_rng(0).standard_normal((2, answers[2].size))
    slope, curve = together.quadratic(answers[2], changes)
    parts = [
        own.quadratic(each, change)
        for own, each, change in zip((one, two), answers, np.split(changes, [answers[0].size], axis=1), strict=False)
    ]
    np.testing.assert_allclose(slope, np.mean([part[0] for part in parts], axis=0), rtol=1e-6)
    np.testing.assert_allclose(curve, np.mean([part[1] for part in parts], axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match="2 tasks, 3 scores"):
        allocate(model, params, [task, other], [Scores({}, {})] * 3, budget, MEASURING)


def test_what_was_measured_is_kept_and_serves_other_budgets(tmp_path: Path):
    model, params, task = setting("bert")
    file = tmp_path / "answers.safetensors"
    scores, kept = scores_of(model, params), replace(MEASURING, file=file)
    runs: list[int] = []
    run = _Reader.answers

    def counted(self: Any, *arguments: Any) -> Any:
        runs.append(1)
        return run(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Reader, "answers", counted)
        first = allocate(model, params, task, scores, Parameters(0.6), kept)
        whole = len(runs)
        again = allocate(model, params, task, scores, Parameters(0.6), kept)
        assert len(runs) == whole + 1 and (again.loss, again.rounds) == (first.loss, first.rounds)  # the dense model's
        other = allocate(model, params, task, scores, Parameters(0.4), kept)
        assert len(runs) - whole - 2 <= 3 + 2 * 4  # starts, and what two rounds lead to
    assert other.known == {"parameters": 0.6, "length": None} and first.known is None
    assert other.loss <= min(other.starts.values())
    with pytest.warns(UserWarning, match="begun anew"):
        fresh = allocate(model, params, task, scores_of(model, params, 1), Parameters(0.4), kept)
    assert fresh.known is None
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is damaged .*remove it"):
        allocate(model, params, task, scores, Parameters(0.4), kept)


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, params, task = setting("llama")
    monkeypatch.setattr(allocation, "SAVE_EVERY", -1)
    scores, kept = scores_of(model, params), replace(MEASURING, file=tmp_path / "answers.safetensors")

    def interrupt(done: int, most: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocate(model, params, task, scores, Parameters(0.5), kept, progress=interrupt)
    found = allocate(model, params, task, scores, Parameters(0.5), kept)
    fresh = allocate(model, params, task, scores, Parameters(0.5), MEASURING)
    assert found.known is None and all(np.array_equal(found.gates[name], fresh.gates[name]) for name in fresh.gates)


@pytest.mark.parametrize("model_type", TYPES)
def test_modules_are_measured_as_a_reconstruction_leaves_them(model_type: str):
    """A unit whose twin stays costs nothing once the twin does its work."""
    model, params, task = setting(model_type)
    site = next(name for name in open_gates(model, params) if name.endswith("ffn.neurons"))
    flat, twins = flatten(params), {}
    for path, array in flat.items():
        axes = axes_of(model.axes, path)
        if path[: len(path_of(site))] == path_of(site) and "neurons" in axes:
            twins[path] = jnp.concatenate([jnp.split(array, 2, axes.index("neurons"))[0]] * 2, axes.index("neurons"))
    params, half = unflatten(flat | twins), jnp.repeat(jnp.array([1.0, 0.0]), 16)
    choices = ladders(model, params, {site: np.arange(32, 0, -1.0)}, Units(0.5), Rules())
    losses = []
    for ridge in (None, 1e-6):
        answers = answers_of(model, params, [task], choices, replace(MEASURING, ridge=ridge))
        losses.append(answers.loss(answers(choices.places({site: half}), lambda: None)))
    assert losses[1] < 1e-3 * losses[0]


def path_of(site: str) -> tuple[Any, ...]:
    return site_of(site).module


def test_what_is_refused():
    model, params, task = setting("bert")
    scores = scores_of(model, params)
    few = replace(task, splits={"calibration": task.rows("calibration")[:7]})
    for refused, message in (
        (lambda: Measuring(rounds=0), "at least 1"),
        (lambda: Measuring(rows=Rows(examples=7)), "at least 8 rows"),
        (lambda: Measuring(ridge=0.0), "above 0"),
        (lambda: allocate(model, params, few, scores, Units(0.5)), "has 7 calibration rows"),
        (lambda: allocate(model, params, task, scores, Latency(0.5)), "needs table="),
        (
            lambda: allocate(model, params, task, scores, Units(0.1), rules=Rules(floor={"neurons": 16})),
            "cannot be reached",
        ),
        (lambda: select(model, params, scores, Units(0.5), rules=Rules(allocation="measured")), "jp.prune"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    pruning = jp.Pruning(rules=Rules(allocation="measured"))
    both = [task, replace(task, name="others")]
    for tasks, settings, message in (
        (both, replace(pruning, together=kept_by_any), "pooled scores alone"),
        (task, replace(pruning, rounds=2), "in rounds"),
    ):
        with pytest.raises(ValueError, match=message):
            jp.prune(model, params, tasks, Units(0.5), settings)


def test_prune_finds_widths_and_records_how(tmp_path: Path):
    place = make_place(tmp_path)
    options = ("--examples", 16, "--recover", "none", "--measure", 0, "--flops", 0.5)
    record = record_of(
        "prune", place.model, "--task", "mood", "--data", place.data, *options, "--allocation", "measured",
        "-o", place.folder / "measured",
    )  # fmt: skip
    found = record["allocation"]
    assert record["selection"]["allocation"] == "measured" and found["loss"] <= min(found["starts"].values())
    assert len(found["rounds"]) == 2 and found["examples"] >= 8
    assert found["measured_at"] is None
    scores = f"{place.folder / 'measured'}.scores.safetensors"
    rows = ("--task", "mood", "--data", place.data, "--recover", "none", "--measure", 0, "--allocation", "measured")
    again = record_of(
        "prune", place.model, "--scores", scores, *rows, "--flops", 0.3, "-o", place.folder / "smaller"
    )["allocation"]  # fmt: skip
    assert again["measured_at"]["flops"] == 0.5 and again["loss"] <= min(again["starts"].values())
    assert sum(each["passes"] for each in again["rounds"]) <= 8
    quick = ("--effort", 1, "--flops", 0.4, "-o", place.folder / "quick", "--overwrite")
    assert len(record_of("prune", place.model, *rows, "--examples", 16, *quick)["allocation"]["rounds"]) == 1
    for effort, message in ((0, "at least 1"), (3, "--allocation is per-layer")):
        own = [*rows[:-1], "per-layer"] if effort else rows
        result = run("prune", place.model, *own, "--examples", 16, *quick[2:], "--effort", effort)
        assert result.exit_code == 2 and message in " ".join(result.output.split())
    refused = run("plan", place.model, "--scores", scores, "--flops", 0.5, "--allocation", "measured")
    assert refused.exit_code == 2 and "prune" in refused.output


class Heard:
    """A watch that remembers what it is told."""

    def __init__(self):
        self.lines: list[str] = []

    def open(self, label: str) -> Any:
        return lambda done, total, note="": None

    def say(self, message: Any) -> None:
        self.lines.append(str(message))


FEW = replace(moods(), splits={**moods().splits, "calibration": moods().rows("calibration")[:7]})
AUTO: dict[str, tuple[Task, Budget, dict[str, Any], str, str]] = {
    "a task": (moods(), Units(0.5), {}, "measured", "measured widths lose"),
    "in rounds": (moods(), Units(0.5), {"rounds": 2}, "per_layer", "in rounds the model changes"),
    "whole layers": (moods(), Units(0.5), {"scoring": jp.Scoring(criterion=jp.criteria.TopLayers())}, "global", "rank"),
    "few rows": (FEW, Units(0.5), {}, "per_layer", "moods has fewer than 8 calibration rows"),
    "a latency": (moods(), Latency(0.9, length=8), {}, "measured", "measured widths lose"),
    "asked otherwise": (moods(), Units(0.5), {"rules": Rules(allocation="per_kind")}, "per_kind", ""),
}


@pytest.mark.parametrize("case", AUTO)
def test_widths_are_measured_where_they_can_be_and_else_it_is_said(case: str):
    task, budget, settings, allocation, said = AUTO[case]
    model, params, _ = setting("bert")
    few = {"scoring": jp.Scoring(criterion=jp.criteria.Magnitude()), "measuring": MEASURING, "recovery": None}
    watch = Heard()
    pruned = jp.prune(model, params, task, budget, jp.Pruning(**few | settings), watch=watch)
    assert pruned.record["settings"]["allocation"] == allocation
    heard = [line for line in watch.lines if "llocation" in line or "measured" in line]
    assert any(said in line for line in heard) if said else not heard


def test_scores_alone_are_selected_by_without_rows():
    model, params, task = setting("bert")
    scores = jp.score(model, params, task, jp.Scoring(criterion=jp.criteria.Magnitude()))
    for tasks in ([], [replace(task, name="other")]):  # no rows, and those of another task
        pruned = jp.prune(model, params, tasks, Units(0.5), jp.Pruning(recovery=None), scores=scores)
        assert pruned.record["settings"]["allocation"] == "per_layer"
        assert pruned.gates.keys() == select(model, params, scores, Units(0.5)).keys()

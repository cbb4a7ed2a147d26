"""The loss of a selection in the objective: predicted from scores, and measured unit by unit.

A *prediction* is a sum over the units that go of their attributions in a score file. With signs it is an estimate,
which takes the units' losses to add up, which they do not; the sum of their sizes bounds the estimate, not the truth.
Scores that attribute no objective, such as magnitudes, predict nothing.

A *report* is the truth: integrated gradients along the straight path from the selected gates to all gates open. What
they give to the closed units sums to what the objective really lost, example by example, up to the quadrature.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.data.batches import pack, usable_rows
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Example, Rows, Task, draw, row_key
from jaxprune.evaluation.evaluate import calibrate, fitting_head
from jaxprune.models import Model
from jaxprune.models.running import forward
from jaxprune.scoring.attribution import AnyBatch, Context, Criterion, Measured, gauss_legendre, quadrature
from jaxprune.scoring.objectives import (
    ExampleReduction,
    Labels,
    Objective,
    absolute,
    calibration_means,
    every,
    gold,
    log_probability,
    margin,
    maximum,
    name_of,
    negative_squared_error,
    open_passes,
    predicted,
    probability,
    sampled,
    signed,
    squared,
    value_and_cotangent,
    weigh,
    zero,
)
from jaxprune.scoring.run import EXAMPLES as EXAMPLES_SCORED
from jaxprune.scoring.run import score_batches
from jaxprune.scoring.scores import Scores, check_scores, objective_name
from jaxprune.units import Gates, Intervention, Params, check_gates

EXAMPLES = 128  # rows of a report, unless asked otherwise
OBJECTIVES = (probability, log_probability, margin, negative_squared_error)  # that a header can name
LABELS = (gold, predicted, sampled, every)
REDUCTIONS = (absolute, signed, squared, maximum)


@dataclass(frozen=True, kw_only=True)
class LossReporting:
    """The settings of a loss report."""

    rows: Rows = Rows(examples=EXAMPLES)
    nodes: int = 16  # quadrature nodes; each costs one forward and one backward pass
    objective: Objective | None = None  # None: the probability, or the negative squared error in a regression
    labels: Labels = gold
    head: str | None = None  # None: the one of the task's name, else the only one

    def __post_init__(self):
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1, got {self.nodes}.")


class LossReport(NamedTuple):
    """The loss of a selection, as means over the examples, in units of the objective."""

    units: Mapping[str, np.ndarray]  # site name to [units]: lost with this unit; 0 where it is open
    lost: float  # objective of the open model - objective of the pruned one
    attributed: float  # the sum of `units`
    error: float  # the mean over the examples of |attributed - lost|
    rows: tuple[str, ...]  # the keys of the examples
    cut_off: int = 0  # rows of span tasks that were not drawn from, because their answers are cut off
    truncated: int = 0  # examples whose texts are cut

    def modules(self) -> dict[str, float]:
        """The loss with each module: `"3.ffn"` to the sum of its units."""
        return _sums(self.units, 1)

    def layers(self) -> dict[str, float]:
        """The loss with each layer: `"3"`, `"decoder.3"`."""
        return _sums(self.units, 2)


def _sums(units: Mapping[str, Any], parts: int) -> dict[str, float]:
    """Sums over the units of all sites that have the same name without its last parts."""
    sums: dict[str, float] = {}
    for site, values in units.items():
        name = ".".join(site.split(".")[:-parts])
        sums[name] = sums.get(name, 0.0) + float(np.asarray(values).sum())
    return sums


class _Lost(Criterion):
    """A criterion that attributes what selected gates lose, example by example, with its sign."""

    examples = signed

    def __init__(self, selected: Gates, reporting: LossReporting, means: Gates | None = None):
        self.selected, self.reporting = selected, reporting
        self.objective, self.labels = reporting.objective, reporting.labels
        self.closed = calibration_means if means else zero

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Attributes a batch; see `Criterion`."""
        chosen, settings, means = model.head(context.head), self.reporting, context.means
        objective = self.objective_of(chosen)
        nodes = list(zip(*quadrature(gauss_legendre, settings.nodes), strict=True))
        run = partial(forward, model, params, intervention=Intervention(means=means), head=chosen.name)
        slopes: list[Gates] = []
        shares: tuple[Array, ...] = ()
        expected = jnp.zeros(())
        for opened in open_passes(model, params, batch, settings.labels, chosen, context.key, run):
            rows = opened.batch["input_ids"]
            pruned = run(opened.batch, intervention=Intervention(_between(self.selected, 0.0, rows), means))[0]
            for target, share in zip(opened.targets, opened.weights, strict=True):
                after, before = (value_and_cotangent(objective, it, target)[0] for it in (opened.logits, pruned))
                expected = expected + share * (after - before)
            totals: list[Gates] = [{name: jnp.zeros(()) for name in self.selected} for _ in opened.targets]
            for point, weight in nodes:
                gates = _between(self.selected, point, rows)
                logits, pull = run(opened.batch, intervention=Intervention(gates, means))
                for i, target in enumerate(opened.targets):
                    totals[i] = _more(totals[i], pull(value_and_cotangent(objective, logits, target)[1])[0], weight)
                del logits, pull  # before the next node needs the memory
            slopes += totals
            shares += opened.weights
        lost = _closed_alone(weigh(signed.each, slopes, shares), self.selected)
        total = jnp.stack([value.sum(1) for value in lost.values()]).sum(0)
        sums = {"expected": expected, "found": total, "error": jnp.abs(total - expected), "size": jnp.abs(expected)}
        return Measured(lost, sums)


def loss_report(
    model: Model,
    params: Params,
    task: Task,
    gates: Mapping[str, Any],
    reporting: LossReporting = LossReporting(),
    *,
    means: Gates | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LossReport:
    """Measures what a selection loses, and with which unit.

    Args:
        model: The architecture.
        params: The dense parameters.
        task: The task; its calibration rows are drawn from.
        gates: Those of `select`, site name to `[units]`: 1 where a unit stays, 0 where it goes.
        reporting: The rows, the objective, and how exactly it is integrated.
        means: What closed units are replaced by; None is zero.
        progress: Called with the number of batches that are finished, and of all.

    Raises:
        ValueError: If the gates do not fit the model, no unit is closed, or there are too few examples.
    """
    selected = {name: jnp.asarray(gate, jnp.float32) for name, gate in gates.items()}
    check_gates(model, params, selected)
    if all(bool((gate == 1.0).all()) for gate in selected.values()):
        raise ValueError("all gates are open: nothing is lost, so there is nothing to attribute.")
    settings = reporting.rows
    key = settings.random
    head = fitting_head(model, task, reporting.head)
    usable, drawn = usable_rows(model, task, settings), settings.examples
    if not isinstance(drawn, tuple):
        count = EXAMPLES if drawn is None else drawn
        drawn = draw(usable.task, count, key, split=settings.split or "calibration")
    encoded = usable.encode(drawn)
    values, sums, _ = score_batches(
        model,
        params,
        pack(calibrate(model, params, task, encoded, head=head), batch_size=settings.batch_size),
        _Lost(selected, reporting, means),
        Context(head, key, means),
        progress,
    )
    if sums is None:
        raise ValueError("there are no examples to attribute.")
    expected, attributed, error = (float(sums[name] or 0.0) for name in ("expected", "found", "error"))
    units = {name: np.asarray(values[name]) for name in selected}
    left_out = usable.cut_off, encoded.truncated
    return LossReport(units, expected, attributed, error, tuple(sorted(map(row_key, drawn))), *left_out)


@jax.jit
def _between(selected: Gates, alpha: Any, rows: Array) -> Gates:
    """The gates at a point of the path, `[b, units]`."""
    return {name: jnp.tile(gate + alpha * (1.0 - gate), (rows.shape[0], 1)) for name, gate in selected.items()}


@jax.jit
def _more(total: Gates, slopes: Gates, weight: Any) -> Gates:
    """Adds the weighted slopes of one node."""
    return {name: total[name] + weight * slopes[name] for name in total}


@jax.jit
def _closed_alone(slopes: Gates, selected: Gates) -> Gates:
    """Each slope times the way that its gate goes: 0 where it is open."""
    return {name: slopes[name] * (1.0 - gate) for name, gate in selected.items()}


class Prediction(NamedTuple):
    """The predicted loss by closing units, mean over the examples, in units of the objective."""

    units: Mapping[str, np.ndarray] | None  # lost with every unit that goes, 0 where it stays; None: no estimate
    sizes: Mapping[str, np.ndarray] | None  # at most that; None: not known
    everything: float | None  # lost if all scored units go, which is measured; None: not known
    meaning: str  # what the numbers are, or why there are none

    @property
    def total(self) -> float | None:
        """The estimate for all units together."""
        return None if self.units is None else sum(_sums(self.units, 2).values())

    @property
    def at_most(self) -> float | None:
        """The bound on the size of the estimate."""
        return None if self.sizes is None else sum(_sums(self.sizes, 2).values())

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain values: in total, by layer and by module."""
        record: dict[str, Any] = {"estimate": self.total, "at_most": self.at_most, "everything": self.everything}
        for name, parts in (("layers", 2), ("modules", 1)):
            columns = {"estimate": self.units, "at_most": self.sizes}
            sums = {column: {} if units is None else _sums(units, parts) for column, units in columns.items()}
            keys = dict.fromkeys([*sums["estimate"], *sums["at_most"]])
            record[name] = {key: {column: values.get(key) for column, values in sums.items()} for key in keys}
        return record | {"meaning": self.meaning}


def predict_loss(scores: Scores, gates: Mapping[str, Any]) -> Prediction:
    """Predicts what closing units loses of the objective that was scored; nothing is computed but sums.

    The signs are in the file beside the scores, or are the scores' own (`examples=signed`); files of format 2 and
    before have lost them unless they are. If a path starts at `start > 0`, its attributions are of a part of the way,
    and are divided by `1 - start`. How far the estimate would be another one with other examples cannot be told: the
    variances in the file are those of single units, whose attributions vary together.

    Args:
        scores: The scores, of any criterion.
        gates: Those of `select`: 1 where a unit stays, 0 where it goes. A site without scores has no prediction.

    Returns:
        The prediction, without numbers where there is none.

    Raises:
        ValueError: If the gates are not of the sites and units that were scored.
    """
    criterion = scores.header["criterion"]
    unlike = [
        name
        for name, value in scores.values.items()
        if name not in gates or np.asarray(gates[name]).shape != np.asarray(value).shape
    ]
    if unlike:
        raise ValueError(f"the gates do not fit the scores of {', '.join(unlike[:6])}: select by these scores.")
    if (meaning := scores.properties["meaning"]) is None:
        return Prediction(None, None, None, f"{criterion['name']} attributes no objective to units")
    if (tokens := criterion.get("tokens", "sum_tokens")) != "sum_tokens":
        return Prediction(None, None, None, f"scores reduced over tokens by {tokens} are no attributions")
    closed = {name: 1.0 - np.asarray(gates[name], np.float64) for name in scores.values}
    share, reduction = part_of_way(scores), criterion.get("examples")

    def lost(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: closed[name] * np.asarray(value, np.float64) / share for name, value in values.items()}

    with_signs = scores.values if reduction == signed.name else scores.signed
    units = None if with_signs is None else lost(with_signs)
    sizes = None
    if reduction == absolute.name:
        sizes = lost(scores.values)
    elif reduction == squared.name:  # the mean size is at most the root of the mean square
        sizes = lost({name: np.sqrt(np.maximum(np.asarray(it, np.float64), 0.0)) for name, it in scores.values.items()})
    if units is None:
        meaning += "; without signs, which this score file has not kept: score again for an estimate"
    return Prediction(units, sizes, _everything(scores), meaning)


def part_of_way(scores: Scores) -> float:
    """The part of the way from a closed to an open gate that attributions are of: less than 1 if a path starts late."""
    start = scores.header["criterion"].get("start", 0.0)
    if not isinstance(start, int | float) or not 0 <= start < 1:
        raise ValueError(f"start in the header of the scores must lie in [0, 1), got {start!r}: score again.")
    return 1.0 - start


def _everything(scores: Scores) -> float | None:
    """The loss if all scored units go: one joint path that starts at closed gates has measured it at its ends."""
    criterion, completeness = scores.header["criterion"], scores.header["completeness"]
    whole = criterion.get("path") == "joint" and part_of_way(scores) == 1.0
    return float(completeness["expected"]) if completeness is not None and whole else None


class Origin(NamedTuple):
    """The objective, labels and reduction that a criterion used."""

    objective: Objective
    labels: Labels | None  # None: the criterion has none
    examples: ExampleReduction  # absolute, if the criterion has none


def origin_of(model: Model, scores: Scores) -> Origin:
    """The objective, labels and reduction of scores.

    Raises:
        ValueError: If one of them is a function of the user's own: it cannot be found by its name.
    """
    criterion = scores.header["criterion"]
    return Origin(
        _named("objective", objective_name(scores, model.head(scores.header["head"])), OBJECTIVES),
        _named("labels", criterion.get("labels"), LABELS),
        _named("examples", criterion.get("examples"), REDUCTIONS) or absolute,
    )


def scored_rows(
    model: Model, params: Params, task: Task, scores: Scores, *, limit: int | None = None, drawn: int = 64, key: int = 0
) -> tuple[Example, ...]:
    """The rows that were scored; for scores that read none, calibration rows.

    Args:
        model: The architecture.
        params: The parameters that were scored.
        task: The task, with the rows that were scored.
        scores: The scores.
        limit: The most rows; None: all of them.
        drawn: How many rows are drawn for scores that read none, if there are as many.
        key: A seed for that draw.

    Raises:
        ValueError: If the scores do not belong to the model, the task or its rows.
    """
    check_scores(model, params, scores)
    header = scores.header
    if header["task"] != task.name:
        raise ValueError(f"the scores are of task {header['task']!r}, not of {task.name!r}: name the task they are of.")
    prompt = prompt_of(model, task)
    expected = None if prompt is None else prompt.to_json()
    if header["examples"] and header.get("prompt") != expected:
        raise ValueError(f"the scores are of the prompt {header.get('prompt')}, this is {expected}: use the same.")
    split = header["split"] if header["split"] != "given" else "calibration"
    task = usable_rows(model, task, Rows(split=split, max_length=header["max_length"])).task
    rows = task.rows(split)
    if not rows:
        raise ValueError(f"{task.name!r} has no {split} rows: the rows that were scored are needed.")
    if not header["examples"]:
        return draw(task, min(drawn, len(rows)), key, split=split)
    wanted = set(scores.rows)
    known = {row_key(row): row for row in rows if row_key(row) in wanted}
    if not known:
        raise ValueError(
            f"none of the {len(wanted)} rows that were scored is among the {len(rows)} {split} rows of {task.name!r}: "
            "give the data that the scores were made with."
        )
    if len(known) < len(wanted):
        warnings.warn(
            f"only {len(known):,} of the {len(wanted):,} rows that were scored are among the {split} rows of "
            f"{task.name!r}: the others are left out.",
            stacklevel=2,
        )
    return tuple(known[key] for key in sorted(known)[:limit])  # keys are hashes: any of the rows


class ScoredLoss:
    """The true loss of the objective by a selection, on the rows and with the settings of its scores."""

    def __init__(
        self,
        model: Model,
        params: Params,
        task: Task,
        scores: Scores,
        *,
        means: Gates | None,
        nodes: int,
        batch_size: int,
        open_bar: Callable[[str], Callable[[int, int], None]],
    ):
        origin = origin_of(model, scores)
        rows = scored_rows(model, params, task, scores, drawn=EXAMPLES_SCORED)
        labelled = all(row.label is not None or row.answers for row in rows)
        self.scores, self.model, self.task, self.open_bar = scores, model, task, open_bar
        self.reporting = LossReporting(
            rows=Rows(examples=rows, batch_size=batch_size, max_length=scores.header["max_length"]),
            nodes=nodes,
            objective=origin.objective,
            labels=origin.labels or (gold if labelled else predicted),
            head=scores.header["head"],
        )
        self.measure = partial(loss_report, model, params, task, reporting=self.reporting, means=means)

    def __call__(self, gates: Gates) -> LossReport:
        """Measures what a selection loses."""
        return self.measure(gates, progress=self.open_bar(f"loss of {self.task.name}"))

    def record(self, gates: Gates, loss: LossReport) -> dict[str, Any]:
        """The loss of a selection, predicted and true, as records hold it."""
        return {
            "task": self.task.name,
            "objective": objective_name(self.scores, self.model.head(self.scores.header["head"])),
            "labels": name_of(self.reporting.labels),
            "examples": len(loss.rows),
            "cut_off": loss.cut_off,
            "truncated": loss.truncated,
            "nodes": self.reporting.nodes,
            "lost": loss.lost,
            "found": loss.attributed,
            "error": loss.error,
            "layers": loss.layers(),
            "modules": loss.modules(),
            "prediction": predict_loss(self.scores, gates).to_json(),
        }


def _named(setting: str, name: str | None, known: Sequence[Any]) -> Any:
    """The function that a header names; None for none."""
    by_name = {name_of(function): function for function in known}
    if name is not None and name not in by_name:
        raise ValueError(
            f"the scores were made with {setting} {name!r}, which is none of {', '.join(by_name)}: a function of your "
            "own cannot be found by its name, so what these scores are of cannot be computed again."
        )
    return None if name is None else by_name[name]

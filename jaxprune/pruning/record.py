"""Builds the record of a pruning, which `checkpoints/gates.py` stores, and finds what its scores were made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxprune.checkpoints.gates import units_record
from jaxprune.checkpoints.tensors import params_digest
from jaxprune.data.batches import usable_rows
from jaxprune.data.prompts import prompt_of
from jaxprune.data.splits import Example, row_key
from jaxprune.data.tasks import Rows, Task, draw
from jaxprune.models import Model
from jaxprune.models.cost import Length, flops, memory, parameters, prunable_parameters
from jaxprune.pruning.budgets import NAMES, Budget, Rules
from jaxprune.pruning.loss import (
    LossReport,
    LossReporting,
    Reselection,
    loss_report,
    part_of_way,
    predict_loss,
    reselect,
)
from jaxprune.pruning.recoveries import RecoveryReport
from jaxprune.pruning.selection import Values, parts_of
from jaxprune.scoring.objectives import (
    ExampleReduction,
    Labels,
    Objective,
    absolute,
    every,
    gold,
    log_probability,
    margin,
    maximum,
    name_of,
    negative_squared_error,
    predicted,
    probability,
    sampled,
    signed,
    squared,
)
from jaxprune.scoring.run import EXAMPLES
from jaxprune.scoring.scores import Scores, check_scores, objective_name
from jaxprune.units import Gates, Params, widths

OBJECTIVES = (probability, log_probability, margin, negative_squared_error)
LABELS = (gold, predicted, sampled, every)
REDUCTIONS = (absolute, signed, squared, maximum)
COUNTED = ("units", "prunable_parameters", "parameters", "memory", "flops", "file_bytes")


def pruning_record(
    scores: Scores | Values,
    gates: Mapping[str, Any],
    budget: Budget | None = None,
    rules: Rules | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Says how a pruned model was made, for `save(..., pruning=...)`.

    Args:
        scores: The scores that were selected by.
        gates: What `select` returned.
        budget: The budget, and
        rules: the rules that were selected by.
        **more: What else is worth keeping. Functions are recorded by name.

    Returns:
        A dict that JSON can hold: the settings, the header of the scores without the keys of single examples, digests
        of scores, means and gates, and for every site the units it had, how many it keeps and which (`"0-3,7"`; a unit
        with a fractional gate is kept).

    Raises:
        TypeError: If a setting cannot be written as JSON.
    """
    values, header = parts_of(scores)
    means = None if isinstance(scores, Mapping) else scores.means
    arrays = {name: np.asarray(gate) for name, gate in gates.items()}
    remaining = {name: np.flatnonzero(gate) for name, gate in arrays.items()}
    for name, value in values.items():  # a site without gates is open
        remaining.setdefault(name, np.arange(len(value)))
    had = {name: len(arrays[name]) if name in arrays else len(values[name]) for name in remaining}
    return {
        "settings": {name: _plain(value, name) for name, value in settings_of(budget, rules, **more).items()},
        "scores": {name: _plain(value, name) for name, value in header.items()},
        "digests": {
            "scores": params_digest(dict(values)),
            "means": params_digest(means) if means else None,  # what closed units are replaced by; None is zero
            "gates": params_digest(arrays),
        },
        **units_record(remaining, had),
    }


def settings_of(budget: Budget | None = None, rules: Rules | None = None, **more: Any) -> dict[str, Any]:
    """A budget and rules in one flat dict, as records hold them."""
    amounts = {} if budget is None else dict.fromkeys((*NAMES, "length")) | budget.settings()
    return amounts | ({} if rules is None else rules.settings()) | more


def _plain(value: Any, name: str) -> Any:
    """A value as JSON can hold it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, name) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax
        return np.asarray(value).tolist()
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    raise TypeError(f"{name} cannot be written as JSON: {value!r}.")


def recovery_record(report: RecoveryReport) -> dict[str, Any]:
    """A recovery as records hold it."""
    modules = {it.module: {"before": it.before, "after": it.after, "chosen": it.chosen} for it in report.modules}
    return {"method": report.method, "examples": report.examples, "modules": modules}


def costs(model: Model, params: Params, length: Length) -> dict[str, Any]:
    """The costs of a model by count, for examples of so many tokens."""
    return {
        "units": sum(widths(model.axes, params).values()),
        "prunable_parameters": prunable_parameters(model, params),
        "parameters": parameters(params),
        "memory": memory(params),
        "flops": flops(model, params, length),
        "length": length,
    }


def ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """The fraction that remains of everything that is counted."""
    return {name: after[name] / before[name] for name in COUNTED if before.get(name)}


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Costs before and after, the fractions that remain, and speed-ups by FLOPs and as measured at each batch size."""
    measured = [{"batch": timing["batch"], "speedup": timing["speedup"]} for timing in after.get("latency", ())]
    theoretical = before["flops"] / after["flops"] if after["flops"] else None
    speedup = {"theoretical": theoretical, "measured": measured}
    return {"before": before, "after": after, "kept": ratios(before, after), "speedup": speedup}


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
    return tuple(known[key] for key in sorted(known)[:limit])  # keys are hashes: any of the rows


class ScoredLoss:
    """The true loss of the objective by a selection, on the rows and with the settings of its scores.

    Args:
        model: The architecture.
        params: The dense parameters.
        task: The task that was scored, with its rows.
        scores: Its scores.
        means: What closed units are replaced by.
        nodes: Quadrature nodes; each costs one forward and one backward pass.
        batch_size: Examples in a batch.
        open_bar: Opens a progress bar, for every selection that is measured.
    """

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
        self.scores, self.nodes, self.model, self.task = scores, nodes, model, task
        self.rows = scored_rows(model, params, task, scores, drawn=EXAMPLES)
        labelled = all(row.label is not None or row.answers for row in self.rows)
        self.labels = origin.labels or (gold if labelled else predicted)
        reporting = LossReporting(
            rows=Rows(examples=self.rows, batch_size=batch_size, max_length=scores.header["max_length"]),
            nodes=nodes,
            objective=origin.objective,
            labels=self.labels,
            examples=absolute if origin.examples.largest else origin.examples,
            head=scores.header["head"],
        )
        self._measure = partial(loss_report, model, params, task, reporting=reporting, means=means)
        self._open_bar = open_bar

    def __call__(self, gates: Gates) -> LossReport:
        """Measures what a selection loses."""
        return self._measure(gates, progress=self._open_bar(f"loss of {self.task.name}"))

    def reselect(self, choose: Callable[[dict[str, np.ndarray]], Gates], rounds: int) -> Reselection:
        """Selects again by what was really lost; see `jaxprune.pruning.loss.reselect`."""
        power = 2 if self.scores.header["criterion"].get("examples") == squared.name else 1
        share = part_of_way(self.scores) ** power  # the report's worth is of all of the way to a closed gate
        values = {name: np.asarray(value, np.float64) / share for name, value in self.scores.values.items()}
        return reselect(values, choose, self, rounds=rounds)

    def record(self, gates: Gates, loss: LossReport, tried: Reselection | None, most: int) -> dict[str, Any]:
        """The loss of a selection, predicted and true, as records hold it."""
        rounds = None
        if tried is not None:
            rounds = [{"lost": it.report.lost, "error": it.report.error, "changed": it.changed} for it in tried.rounds]
        return {
            "task": self.task.name,
            "objective": objective_name(self.scores, self.model.head(self.scores.header["head"])),
            "labels": name_of(self.labels),
            "examples": len(self.rows),
            "nodes": self.nodes,
            "lost": loss.lost,
            "found": loss.attributed,
            "error": loss.error,
            "layers": loss.layers(),
            "modules": loss.modules(),
            "prediction": predict_loss(self.scores, gates).to_json(),
            "rounds": rounds,
            "best": None if tried is None else tried.best,
            "most_rounds": most,
        }


def check_reselection(criterion: Mapping[str, Any], properties: Mapping[str, Any]) -> None:
    """Refuses scores that a true loss cannot be merged with, by `describe` and `properties_of` their criterion."""
    meant = properties["meaning"] is not None
    if not meant or criterion.get("tokens", "sum_tokens") != "sum_tokens":
        tokens = f" with tokens={criterion['tokens']}" if meant else ""
        raise ValueError(
            f"scores of {criterion['name']}{tokens} attribute no objective, so a measured loss cannot be merged with "
            "them: score with an attribution, or leave the re-selection out."
        )
    if criterion.get("examples") == "maximum":
        raise ValueError(
            "scores that are the largest of the examples cannot be merged with a measured loss, which is a mean over "
            "them: score with examples=absolute, or leave the re-selection out."
        )


def _named(setting: str, name: str | None, known: Sequence[Any]) -> Any:
    """The function that a header names; None for none."""
    by_name = {name_of(function): function for function in known}
    if name is not None and name not in by_name:
        raise ValueError(
            f"the scores were made with {setting} {name!r}, which is none of {', '.join(by_name)}: a function of your "
            "own cannot be found by its name, so what these scores are of cannot be computed again."
        )
    return None if name is None else by_name[name]

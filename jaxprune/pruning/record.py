"""Says how a pruned model was made, in a record that JSON can hold: settings, digests, and which units stay.

What scores were made with, found again from the header of their file: rows, objective, labels, reduction.

A header names functions and keys of rows. What they stand for is needed to compare scores with the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.checkpoints.folder import digest
from jaxprune.checkpoints.gate_file import units_record
from jaxprune.data.batches import usable_rows
from jaxprune.data.prompts import prompt_of
from jaxprune.data.splits import Example, row_key
from jaxprune.data.tasks import Rows, Task, draw
from jaxprune.models import Model
from jaxprune.pruning.budgets import NAMES, Budget, Rules
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
    objective_for,
    predicted,
    probability,
    sampled,
    signed,
    squared,
)
from jaxprune.scoring.scores import Scores, check_scores
from jaxprune.units import Params


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
    kept = {name: np.flatnonzero(gate) for name, gate in arrays.items()}
    for name, value in values.items():  # a site without gates is open
        kept.setdefault(name, np.arange(len(value)))
    had = {name: len(arrays[name]) if name in arrays else len(values[name]) for name in kept}
    return {
        "settings": {name: _plain(value, name) for name, value in settings_of(budget, rules, **more).items()},
        "scores": {name: _plain(value, name) for name, value in header.items() if name != "rows"},
        "digests": {
            "scores": digest(dict(values)),
            "means": digest(means) if means else None,  # what closed units are replaced by; None is zero
            "gates": digest(arrays),
        },
        **units_record(kept, had),
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


OBJECTIVES = (probability, log_probability, margin, negative_squared_error)
LABELS = (gold, predicted, sampled, every)
REDUCTIONS = (absolute, signed, squared, maximum)
LIKELIHOOD = ("Gradient", "Taylor", "Fisher")  # criteria that are of the log-likelihood


class Origin(NamedTuple):
    """What a criterion asked for."""

    objective: Objective | None  # None: the task head's own; see `objective_for`
    labels: Labels | None  # None: the criterion has none
    examples: ExampleReduction  # absolute, if the criterion has none


def objective_name(model: Model, scores: Scores) -> str:
    """What was to be kept, such as `probability`; a function of the user's own by its name."""
    criterion, head = scores.header["criterion"], model.head(scores.header["head"])
    if criterion["name"] in LIKELIHOOD:
        return name_of(negative_squared_error if head.regression else log_probability)
    return criterion.get("objective") or name_of(objective_for(None, head))


def origin_of(model: Model, scores: Scores) -> Origin:
    """The objective, labels and reduction of scores.

    Raises:
        ValueError: If one of them is a function of the user's own: it cannot be found by its name.
    """
    criterion = scores.header["criterion"]
    own = criterion["name"] in LIKELIHOOD or criterion.get("objective") is not None
    return Origin(
        _named("objective", objective_name(model, scores) if own else None, OBJECTIVES),
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
    own = None if prompt is None else prompt.to_json()
    if header["examples"] and header.get("prompt") != own:
        raise ValueError(f"the scores were made with the prompt {header.get('prompt')}, this is {own}: use the same.")
    split = header["split"] if header["split"] != "given" else "calibration"
    task = usable_rows(model, task, Rows(split=split, max_length=header["max_length"])).task
    rows = task.rows(split)
    if not rows:
        raise ValueError(f"{task.name!r} has no {split} rows: the rows that were scored are needed.")
    if not header["examples"]:
        return draw(task, min(drawn, len(rows)), key, split=split)
    wanted = set(header["rows"])
    known = {row_key(row): row for row in rows if row_key(row) in wanted}
    if not known:
        raise ValueError(
            f"none of the {len(wanted)} rows that were scored is among the {len(rows)} {split} rows of {task.name!r}: "
            "give the data that the scores were made with."
        )
    return tuple(known[key] for key in sorted(known)[:limit])  # keys are hashes: any of the rows


def _named(setting: str, name: str | None, known: Sequence[Any]) -> Any:
    """The function that a header names; None for none."""
    found = {name_of(function): function for function in known}
    if name is not None and name not in found:
        raise ValueError(
            f"the scores were made with {setting} {name!r}, which is none of {', '.join(found)}: a function of your "
            "own cannot be found by its name, so what these scores are of cannot be computed again."
        )
    return None if name is None else found[name]

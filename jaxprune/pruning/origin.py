"""What scores were made with, found again from the header of their file: rows, objective, labels, reduction.

A header names functions and keys of rows. What they stand for is needed to compare scores with the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprune.data.batches import within_reach
from jaxprune.data.prompts import prompt_of
from jaxprune.data.splits import Example, row_key
from jaxprune.data.tasks import Task, draw
from jaxprune.models import Model
from jaxprune.pruning.selection import select
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
from jaxprune.scoring.scores import Scores
from jaxprune.units import Params

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
    select(model, params, scores, units=1.0)  # refuses scores of another model
    header = scores.header
    if header["task"] != task.name:
        raise ValueError(f"the scores are of task {header['task']!r}, not of {task.name!r}: name the task they are of.")
    prompt = prompt_of(model, task)
    own = None if prompt is None else prompt.to_json()
    if header["examples"] and header.get("prompt") != own:
        raise ValueError(f"the scores were made with the prompt {header.get('prompt')}, this is {own}: use the same.")
    split = header["split"] if header["split"] != "given" else "calibration"
    task, _ = within_reach(model, task, split=split, max_length=header["max_length"])
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

"""Prediction beside truth: what a selection loses by its scores and by its receipt, and a better one by the latter.

Everything is asked for as the scores were: the same rows, objective, labels, head and text length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxprune.cli.workflow import Watch
from jaxprune.data.tasks import Task
from jaxprune.models import Model
from jaxprune.pruning.loss import (
    MEANINGS,
    Choose,
    Receipt,
    Reselection,
    loss_receipt,
    part_of_way,
    predict_loss,
    reselect,
)
from jaxprune.pruning.record import objective_name, origin_of, scored_rows
from jaxprune.scoring.objectives import absolute, gold, name_of, predicted, squared
from jaxprune.scoring.run import EXAMPLES
from jaxprune.scoring.scores import Scores, describe
from jaxprune.units import Gates, Params


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """How the receipt of a pruning is made, and how often units are selected again by it."""

    rounds: int = 0  # the most re-selections; see `reselect`
    nodes: int = 8  # quadrature nodes; each costs one forward and one backward pass
    batch_size: int = 32

    def __post_init__(self):
        for name, least in (("rounds", 0), ("nodes", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of a receipt must be at least {least}, got {getattr(self, name)}.")


class Account(NamedTuple):
    """A selection and what it loses."""

    gates: Gates
    record: dict[str, Any]  # plain values: prediction and truth
    rows: tuple[str, ...]  # the keys of the examples


def check_accounting(scored: Any, accounting: Accounting | None) -> None:
    """Refuses to select again by scores that a receipt cannot be merged with.

    Args:
        scored: Scores, or how they will be made.
        accounting: How the receipt is made; None: there is none.
    """
    if accounting is None or not accounting.rounds:
        return
    criterion = scored.header["criterion"] if isinstance(scored, Scores) else describe(scored.criterion)
    if criterion["name"] not in MEANINGS or criterion.get("tokens", "sum_tokens") != "sum_tokens":
        raise ValueError(
            f"scores of {criterion['name']}{_with(criterion)} attribute no objective, so a receipt cannot be merged "
            "with them: score with an attribution, or leave the re-selection out."
        )
    if criterion.get("examples") == "maximum":
        raise ValueError(
            "scores that are the largest of the examples cannot be merged with a receipt, which is a mean over them: "
            "score with examples=absolute, or leave the re-selection out."
        )


def account_for(
    model: Model,
    params: Params,
    task: Task,
    scores: Scores,
    gates: Gates,
    accounting: Accounting,
    *,
    choose: Choose | None = None,
    means: Gates | None = None,
    watch: Watch,
) -> Account:
    """Says what a selection loses, predicted and true; with rounds, of the best selection that was found.

    Args:
        model: The architecture.
        params: The dense parameters.
        task: The task that was scored.
        scores: Its scores.
        gates: The selection.
        accounting: How the receipt is made.
        choose: How it was selected, by scores at a budget; None: nothing is selected again.
        means: What closed units are replaced by; None are those of the scores.
        watch: Shows the progress.
    """
    origin = origin_of(model, scores)
    rows = scored_rows(model, params, task, scores, drawn=EXAMPLES)
    labels = origin.labels or (gold if all(row.label is not None or row.answers for row in rows) else predicted)

    def account(selected: Gates) -> Receipt:
        return loss_receipt(
            model,
            params,
            task,
            selected,
            examples=rows,
            nodes=accounting.nodes,
            objective=origin.objective,
            labels=labels,
            means=scores.means if means is None else means,
            head=scores.header["head"],
            batch_size=accounting.batch_size,
            max_length=scores.header["max_length"],
            reduction=absolute if origin.examples.largest else origin.examples,
            progress=watch.open(f"receipt of {task.name}"),
        )

    found: Reselection | None = None
    if choose is not None and accounting.rounds:
        found = reselect(_whole_way(scores), choose, account, rounds=accounting.rounds)
        gates, receipt = found.gates, found.receipt
    else:
        receipt = account(gates)
    record = {
        "task": task.name,
        "objective": objective_name(model, scores),
        "labels": name_of(labels),
        "examples": len(rows),
        "nodes": accounting.nodes,
        "lost": receipt.lost,
        "found": receipt.found,
        "error": receipt.error,
        "layers": receipt.layers(),
        "modules": receipt.modules(),
        "prediction": predict_loss(scores, gates).to_json(),
        "rounds": None if found is None else [_round(own.receipt, own.changed) for own in found.rounds],
        "best": None if found is None else found.best,
        "most_rounds": 0 if choose is None else accounting.rounds,
    }
    return Account(gates, record, receipt.rows)


def _with(criterion: Mapping[str, Any]) -> str:
    return f" with tokens={criterion['tokens']}" if criterion["name"] in MEANINGS else ""


def _whole_way(scores: Scores) -> Mapping[str, np.ndarray]:
    """The scores as if they were of all of the way to a closed gate, as the receipt's worth is."""
    power = 2 if scores.header["criterion"].get("examples") == squared.name else 1
    return {name: np.asarray(value, np.float64) / part_of_way(scores) ** power for name, value in scores.values.items()}


def _round(receipt: Receipt, changed: int) -> dict[str, Any]:
    return {"lost": receipt.lost, "error": receipt.error, "changed": changed}

"""Pruning in rounds: what is left is scored again, cut further and, if wanted, repaired, until it fits the budget.

In every round the selection is made among all units of the dense model, with those that are gone ranked below all
others. So budgets, floors, multiples, protected layers and the fractions that are kept of each layer mean in every
round what they mean in one, and the units of all rounds have the indices of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.compaction import compact
from jaxprune.models import Model
from jaxprune.models.cost import memory
from jaxprune.pruning.budgets import Budget, Latency, Rules
from jaxprune.pruning.recovery import RecoveryReport
from jaxprune.pruning.selection import Values, parts_of, select
from jaxprune.scoring.scores import Scores, check_scores
from jaxprune.units import Gates, Params

BELOW = 1e9  # times the largest score: units that are gone stay last, whatever the units of a site cost


class Round(NamedTuple):
    """What one round found, and what it left."""

    number: int  # from 1
    budget: float  # what might stay after it, in the unit of the budget that was given
    scores: Scores | Values  # of the units that were left before it
    gates: Gates  # of all units of the dense model: 1 where one is left
    params: Params  # what is left, repaired if that was asked for
    recovery: RecoveryReport | None


def prune_in_rounds(
    model: Model,
    params: Params,
    score: Callable[[Params], Scores | Values],
    budget: Budget,
    *,
    rules: Rules = Rules(),
    rounds: int,
    repair: Callable[[Params], tuple[Params, RecoveryReport]] | None = None,
    after: Round | None = None,
) -> Iterator[Round]:
    """Prunes to a budget in rounds, in each of which what is left is scored again.

    The last round meets the budget by the law of `select`: what stays costs at most that, and is short of it by less
    than the next block; with `per_layer` it has the widths that one round would give it. One round is `select` and
    `compact`. What a round leaves is `compact(model, params, its gates)`, bit for bit, if nothing is repaired and
    closed units are zero.

    ```python
    def score(small):
        return jp.score(model, small, task)


    *_, last = jp.prune_in_rounds(model, params, score, jp.budgets.Flops(0.3), rounds=3)  # last.params, last.gates
    ```

    Args:
        model: The architecture.
        params: The dense parameters.
        score: Scores what is left; the first time it is called with `params`.
        budget: What may stay in the end, of the dense model. A budget of FLOPs needs a length if the scores do not say
            the mean length of their examples, or say another one in each round.
        rules: How units are chosen within the budget.
        rounds: How many; their budgets are a `geometric` sequence.
        repair: Repairs what is left after a round, such as `lambda small: jp.recover(model, params, small, task)`.
        after: Continue after this round of an earlier run with the same arguments.

    Yields:
        Each round when it is finished.

    Raises:
        ValueError: If `rounds` is less than 1, the budget is one of latency, or as `select`.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds must be a whole number, got {rounds!r}.")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    if isinstance(budget, Latency):
        raise ValueError(
            "a budget of latency is met in one round: its widths come from a table of the dense model, and those of a "
            "smaller budget need not lie within those of a larger one. Give flops, or one round."
        )
    amounts = geometric(rounds, budget.amount, 1.0 if budget.is_fraction else float(memory(params)))
    return _rounds(model, params, score, [budget.at(amount) for amount in amounts], rules, repair, after)


def geometric(rounds: int, end: float, start: float = 1.0) -> tuple[float, ...]:
    """Budgets from `start`, which is not among them, to exactly `end`: every round keeps an equal share.

    So no round changes the model more than another does. With equal differences, the last round would remove a larger
    share of what is left than any before it.
    """
    return (*(start * (end / start) ** (number / rounds) for number in range(1, rounds)), end)


def select_left(
    model: Model,
    params: Params,
    scores: Scores | Values,
    left: Gates,
    budget: Budget,
    *,
    rules: Rules = Rules(),
) -> Gates:
    """Selects among the units that are left, to a budget that is one of the dense model.

    Args:
        model: The architecture.
        params: The dense parameters.
        scores: Of the units that are left.
        left: What this returned at a larger budget, with the same rules. A site that is not named is whole.
        budget: How much of the dense model may stay.
        rules: How units are chosen within the budget.

    Returns:
        Gates of the units of the dense model: open only where `left` is.
    """
    values, header = parts_of(scores)
    normalise = rules.normalise

    def normalise_left(every: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:  # no norm contains what is gone
        return every if normalise is None else with_gone(normalise(units_left(every, left)), left)

    rules = rules if normalise is None else replace(rules, normalise=normalise_left)
    budget = budget.with_length(header.get("mean_length"))
    gates = select(model, params, with_gone(values, left), budget, rules=rules)
    return {name: jax.device_put(np.minimum(gate, left.get(name, 1.0))) for name, gate in gates.items()}


def with_gone(values: Values, left: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores of the units that are left, as scores of all units: those that are gone rank below all others."""
    arrays = {name: np.asarray(value, np.float64) for name, value in values.items()}
    lowest = -BELOW * (1.0 + max((float(np.abs(value).max(initial=0.0)) for value in arrays.values()), default=0.0))
    found = {}
    for name, value in arrays.items():
        found[name] = value if name not in left else np.full(len(left[name]), lowest)
        if name in left:
            found[name][np.flatnonzero(left[name])] = value
    return found


def units_left(values: Mapping[str, Any], left: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores or gates of all units, as those of the units that are left, in order."""
    return {
        name: np.asarray(value)[np.flatnonzero(left[name])] if name in left else np.asarray(value)
        for name, value in values.items()
    }


def _rounds(
    model: Model,
    params: Params,
    score: Callable[[Params], Scores | Values],
    budgets: Sequence[Budget],
    rules: Rules,
    repair: Callable[[Params], tuple[Params, RecoveryReport]] | None,
    after: Round | None,
) -> Iterator[Round]:
    left: Gates = {} if after is None else after.gates
    small, done = (params, 0) if after is None else (after.params, after.number)
    for number, budget in enumerate(budgets[done:], done + 1):
        scores = score(small)
        check_scores(model, small, scores)
        gates = select_left(model, params, scores, left, budget, rules=rules)
        means = scores.means if isinstance(scores, Scores) else None
        small, recovery = compact(model, small, units_left(gates, left), means), None
        if repair is not None:
            small, recovery = repair(small)
        left = gates
        yield Round(number, budget.amount, scores, gates, small, recovery)

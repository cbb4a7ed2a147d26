"""One budget for several tasks: their scores pooled, or the union or intersection of what each keeps.

Whatever the way, what stays costs at most the budget, a larger budget keeps all of a smaller one, and every setting of
`select` holds for the result, but one: the allocation says how each task selects by itself. So a union keeps more, and
an intersection less, in layers where the tasks differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import Model
from jaxprune.models.cost import Length
from jaxprune.pruning.budgets import Budget, Rules
from jaxprune.pruning.selection import Values, parts_of, per_cost, select, thresholds
from jaxprune.scoring.scores import Scores, some
from jaxprune.units import Gates, Params


def pooled(
    model: Model, params: Params, scores: Sequence[Scores | Values], budget: Budget, *, rules: Rules = Rules()
) -> Gates:
    """Selects by the mean of the tasks' scores, each divided by its total, so that every task weighs the same."""
    means: Any = mean_scores(scores)
    merged = Scores(means, {"properties": {"per_cost": any(map(per_cost, scores))}})
    return select(model, params, merged, _at_mean_length(budget, scores), rules=rules)


def kept_by_any(
    model: Model, params: Params, scores: Sequence[Scores | Values], budget: Budget, *, rules: Rules = Rules()
) -> Gates:
    """The union of the units that the tasks keep, each at the same smaller budget: the largest that fits.

    Every task by itself keeps a unit from some budget on (`thresholds`). The union of the selections at a budget `b` of
    each task holds the units whose smallest threshold is at most `b`. So units are taken in the order of that until the
    budget of the union is spent, without a search for `b`, which is the smaller the more the tasks differ. Units with
    the same threshold, the last ones, may be taken for some of the tasks alone.
    """
    return _in_order(model, params, scores, budget, rules, np.minimum)


def kept_by_all(
    model: Model, params: Params, scores: Sequence[Scores | Values], budget: Budget, *, rules: Rules = Rules()
) -> Gates:
    """The intersection of the units that the tasks keep, each at the same larger budget: the largest that fits.

    As `kept_by_any`, in the order of the largest threshold: the budgets of the tasks are larger than that of the
    intersection, which spends its budget nevertheless.
    """
    return _in_order(model, params, scores, budget, rules, np.maximum)


def _in_order(
    model: Model, params: Params, scores: Sequence[Scores | Values], budget: Budget, rules: Rules, combine: np.ufunc
) -> Gates:
    """Keeps units in the order of their smallest or largest threshold, as many as the budget pays for."""
    budget = _at_mean_length(budget, scores)
    unrounded = replace(rules, multiple_of=None)  # units are rounded once, in the end
    each = [thresholds(model, params, task_scores, budget, rules=unrounded) for task_scores in scores]
    costs = budget.unit_costs(model, params)
    merged = {  # divided by their costs, as units that compete are, these have the order that is wanted
        site: (1.0 - combine.reduce([task_thresholds[site] for task_thresholds in each])) * costs[site]
        for site in parts_of(scores[0])[0]
    }
    return select(model, params, merged, budget, rules=replace(rules, allocation="global", normalise=None))


def _at_mean_length(budget: Budget, scores: Sequence[Scores | Values]) -> Budget:
    """The budget at the mean length of the tasks' examples, if their scores say it."""
    lengths = [header["mean_length"] for _, header in map(parts_of, scores) if "mean_length" in header]
    return budget.with_length(mean_of_lengths(lengths)) if len(lengths) == len(scores) else budget


def mean_scores(scores: Sequence[Scores | Values]) -> dict[str, np.ndarray]:
    """The mean of several tasks' scores, each divided by the sum of their sizes (by 1 if that is 0)."""
    arrays = [{site: np.asarray(value, np.float64) for site, value in parts_of(each)[0].items()} for each in scores]
    totals = [sum(float(np.abs(value).sum()) for value in values.values()) or 1.0 for values in arrays]
    return {
        site: np.mean([values[site] / total for values, total in zip(arrays, totals, strict=True)], axis=0)
        for site in arrays[0]
    }


def mean_closed(scores: Sequence[Scores]) -> Gates | None:
    """The values that replace closed units in a model for several tasks: the mean of the tasks'.

    Raises:
        ValueError: If some of the scores replace closed units by means and others by zero, or at other sites.
    """
    means = [each.means or {} for each in scores]
    if len({frozenset(values) for values in means}) > 1:
        raise ValueError("some scores replace closed units by means, others by zero: score all with the same --closed.")
    return {site: jnp.mean(jnp.stack([values[site] for values in means]), axis=0) for site in means[0]} or None


def mean_length(scores: Sequence[Scores]) -> Length:
    """Tokens per example, every task weighing the same."""
    return mean_of_lengths([each.header["mean_length"] for each in scores])


def mean_of_lengths(lengths: Sequence[Length]) -> Length:
    """The mean of several tasks' tokens per example."""
    return np.mean([np.asarray(length, np.float64) for length in lengths], axis=0).tolist()


def union(*gates: Mapping[str, Any]) -> Gates:
    """Open where any of several tasks' gates are: the units that at least one task needs.

    Raises:
        ValueError: If there are none, they are of other sites or numbers of units, or a gate is neither 0 nor 1.
    """
    return {name: jax.device_put(np.maximum.reduce(arrays)) for name, arrays in _same_sites(gates).items()}


def intersection(*gates: Mapping[str, Any]) -> Gates:
    """Open where all of several tasks' gates are: the units that every task needs.

    Raises:
        ValueError: If there are none, they are of other sites or numbers of units, or a gate is neither 0 nor 1.
    """
    return {name: jax.device_put(np.minimum.reduce(arrays)) for name, arrays in _same_sites(gates).items()}


def _same_sites(gates: tuple[Mapping[str, Any], ...]) -> dict[str, list[np.ndarray]]:
    """Several gates, site by site."""
    if not gates:
        raise ValueError("give gates of at least one task.")
    arrays = [{name: np.asarray(gate, np.float32) for name, gate in each.items()} for each in gates]
    shapes = [{name: gate.shape for name, gate in each.items()} for each in arrays]
    names = dict.fromkeys(name for each in arrays for name in each)
    problems = [
        f"{name} has the shapes {', '.join(str(each.get(name, 'none')) for each in shapes)}"
        for name in names
        if len({each.get(name) for each in shapes}) > 1
    ]
    problems += [
        f"{name} holds {gate[~np.isin(gate, (0, 1))][0]}, expected 0 or 1"
        for each in arrays
        for name, gate in each.items()
        if not np.isin(gate, (0, 1)).all()
    ]
    if problems:
        raise ValueError(f"these gates do not go together: {some(problems)}.")
    return {name: [each[name] for each in arrays] for name in arrays[0]}

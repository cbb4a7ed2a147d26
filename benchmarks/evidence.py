"""The primary metric and its intervals: what may be called "beats", "within" or "undecided".

The primary metric is the mean over tasks of `(accuracy - chance) / (dense - chance)`. Intervals are of a paired
hierarchical bootstrap: tasks are drawn, then within each task its rows and its calibration draws, the same rows for all
methods and for the dense model. With one fine-tuned model there is no level of models: the intervals say nothing about
another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 95.0  # of the intervals, percent


class Cell(NamedTuple):
    """One pruned model on the rows of one task."""

    hits: np.ndarray  # [rows] booleans: which rows it gets right
    flops: float  # fraction that it keeps


def retained(cells: Mapping[str, Sequence[Cell]], dense: Mapping[str, Cell], chance: Mapping[str, float]) -> float:
    """The primary metric: the share of the dense model's accuracy above chance that is kept, mean over tasks."""
    shares = []
    for task, own in cells.items():
        accuracy = np.mean([cell.hits.mean() for cell in own])
        shares.append((accuracy - chance[task]) / (dense[task].hits.mean() - chance[task]))
    return float(np.mean(shares))


def summary(
    cells: Mapping[str, Sequence[Cell]], dense: Mapping[str, Cell], chance: Mapping[str, float]
) -> dict[str, Any]:
    """Accuracy by task (mean, and standard deviation over the draws), and the primary metric."""
    tasks = {}
    for task, own in cells.items():
        each = [float(cell.hits.mean()) for cell in own]
        tasks[task] = {
            "accuracy": float(np.mean(each)),
            "deviation": float(np.std(each, ddof=1)) if len(each) > 1 else None,
            "draws": len(each),
            "flops": float(np.mean([cell.flops for cell in own])),
        }
    return {
        "retained": retained(cells, dense, chance),
        "accuracy": float(np.mean([own["accuracy"] for own in tasks.values()])),
        "flops": float(np.mean([own["flops"] for own in tasks.values()])),
        "tasks": tasks,
    }


def compare(
    one: Mapping[str, Sequence[Cell]],
    other: Mapping[str, Sequence[Cell]],
    dense: Mapping[str, Cell],
    chance: Mapping[str, float],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The advantage of `one` over `other` in accuracy above chance, with the interval of the bootstrap.

    Calibration draws are paired by their seed where both have the same number of them.

    Args:
        one: Cells by task, one per calibration draw.
        other: The same tasks.
        dense: The unpruned model on the same rows.
        chance: Accuracy of always giving the most frequent label.
        seed: Of the bootstrap.
    """
    random = np.random.default_rng(seed)
    tasks = list(one)
    chosen = random.integers(len(tasks), size=(RESAMPLES, len(tasks)))  # tasks of every resample, one per place
    total = np.zeros(RESAMPLES)
    for place in range(len(tasks)):
        for index, task in enumerate(tasks):
            own = np.flatnonzero(chosen[:, place] == index)
            if len(own):
                total[own] += _resample(random, len(own), one[task], other[task], dense[task], chance[task])
    differences = total / len(tasks)
    low, high = np.percentile(differences, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return {
        "difference": retained(one, dense, chance) - retained(other, dense, chance),
        "low": float(low),
        "high": float(high),
        "verdict": verdict(float(low), float(high)),
    }


def verdict(low: float, high: float) -> str:
    """`beats` if the whole interval is above 0, `loses` if it is below, else `undecided`."""
    return "beats" if low > 0 else "loses" if high < 0 else "undecided"


def within(found: Mapping[str, Any], margin: float) -> bool:
    """True if a loss (a difference "reference minus this") is certainly less than a margin."""
    return found["high"] < margin


def _resample(
    random: np.random.Generator, count: int, one: Sequence[Cell], other: Sequence[Cell], dense: Cell, chance: float
) -> np.ndarray:
    """Differences of one task in `count` resamples of its rows and calibration draws."""
    rows = len(dense.hits)
    weights = random.multinomial(rows, np.full(rows, 1 / rows), size=count) / rows
    draws = [_weights_of_draws(random, count, len(one))]
    draws.append(draws[0] if len(other) == len(one) else _weights_of_draws(random, count, len(other)))
    accuracies = [
        ((weights @ np.stack([cell.hits for cell in cells], axis=1)) * shares).sum(1)
        for cells, shares in zip((one, other), draws, strict=True)
    ]
    above = np.maximum(weights @ dense.hits - chance, 1e-9)
    return (accuracies[0] - accuracies[1]) / above


def _weights_of_draws(random: np.random.Generator, count: int, draws: int) -> np.ndarray:
    return random.multinomial(draws, np.full(draws, 1 / draws), size=count) / draws

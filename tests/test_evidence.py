"""The benchmarks' primary metric and its bootstrap: real differences are found, others seldom."""

from __future__ import annotations

import numpy as np
import pytest
from evidence import Cell, compare, retained, summary, verdict, within

ROWS = 300
TASKS = ("a", "b", "c", "d")
CHANCE: dict[str, float] = dict.fromkeys(TASKS, 0.5)


def cells(accuracy: float, draws: int, seed: int) -> dict[str, list[Cell]]:
    """Rows that are right with a probability, independently."""
    random = np.random.default_rng(seed)
    return {task: [Cell(random.random(ROWS) < accuracy, 0.5) for _ in range(draws)] for task in TASKS}


def dense(seed: int = 0) -> dict[str, Cell]:
    return {task: own[0] for task, own in cells(0.9, 1, seed).items()}


def test_the_primary_metric_is_the_share_of_accuracy_above_chance():
    hits = {task: [Cell(np.arange(10) < right, 0.5)] for task, right in zip(TASKS, (9, 7, 5, 3), strict=True)}
    full = {task: Cell(np.arange(10) < 9, 1.0) for task in TASKS}
    assert retained(hits, full, CHANCE) == pytest.approx(np.mean([1.0, 0.5, 0.0, -0.5]))
    found = summary(hits, full, CHANCE)
    assert found["retained"] == pytest.approx(0.25)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["tasks"]["b"] == {"accuracy": 0.7, "deviation": None, "draws": 1, "flops": 0.5}


def test_a_real_difference_is_found():
    found = compare(cells(0.85, 5, 1), cells(0.75, 5, 2), dense(), CHANCE)
    assert found["verdict"] == "beats"
    assert found["low"] < found["difference"] < found["high"]
    back = compare(cells(0.75, 5, 2), cells(0.85, 5, 1), dense(), CHANCE)
    assert back["verdict"] == "loses"
    assert back["difference"] == pytest.approx(-found["difference"])


def test_no_difference_is_seldom_found_where_there_is_none():
    found = [compare(cells(0.8, 3, 2 * i), cells(0.8, 3, 2 * i + 1), dense(i), CHANCE) for i in range(8)]
    assert sum(own["verdict"] != "undecided" for own in found) <= 2  # one in twenty is expected


def test_equal_methods_differ_by_nothing():
    same = cells(0.8, 2, 0)
    found = compare(same, same, dense(), CHANCE)
    assert found["difference"] == found["low"] == found["high"] == 0.0


def test_fewer_draws_of_one_method_are_allowed():
    found = compare(cells(0.85, 5, 1), cells(0.75, 20, 2), dense(), CHANCE)
    assert found["verdict"] == "beats"


def test_verdicts():
    assert [verdict(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == ["beats", "loses", "undecided"]
    assert within({"high": 0.009}, 0.01) and not within({"high": 0.011}, 0.01)

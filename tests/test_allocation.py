"""Allocation: the knapsack is the best there is on small instances, and never exceeds its limit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from jaxprune.pruning.selection import Choices, alike, knapsack


def random_choices(seed: int, *, sites: int = 4, whole: bool = False) -> list[Choices]:
    """Rising costs and values of a few widths per site; with `whole`, costs are whole numbers."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(sites):
        count = int(random.integers(1, 6))
        widths = np.concatenate([[0], np.sort(random.choice(np.arange(1, 40), count, replace=False))])
        steps = random.integers(1, 9, count) if whole else random.random(count)
        costs = np.concatenate([[0.0], np.cumsum(steps)]) + (random.integers(0, 3) if whole else random.random())
        values = np.concatenate([[0.0], np.cumsum(random.random(count) * (random.random(count) < 0.8))])
        found.append(Choices(widths, costs, values))
    return found


def best(choices: list[Choices], limit: float) -> float:
    """The largest sum of values within a limit, by trying everything."""
    found = -np.inf
    for taken in product(*(range(len(own.widths)) for own in choices)):
        pairs = list(zip(choices, taken, strict=True))
        if sum(own.costs[i] for own, i in pairs) <= limit * (1 + 1e-12):
            found = max(found, sum(own.values[i] for own, i in pairs))
    return float(found)


def of(choices: list[Choices], widths: np.ndarray, what: str) -> float:
    """The costs or the values of some widths, together."""
    pairs = zip(choices, widths, strict=True)
    return sum(float(getattr(own, what)[list(own.widths).index(width)]) for own, width in pairs)


def limits(choices: list[Choices]) -> list[float]:
    least, most = (sum(float(own.costs[end]) for own in choices) for end in (0, -1))
    return [least + share * (most - least) for share in (0.0, 0.1, 0.35, 0.5, 0.8, 1.0)]


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_equals_brute_force(seed):
    choices = random_choices(seed)
    for limit in limits(choices):
        widths = knapsack(choices, limit)
        assert of(choices, widths, "costs") <= limit * (1 + 1e-9)
        assert of(choices, widths, "values") == pytest.approx(best(choices, limit), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_whole_costs_in_as_many_cells_lose_nothing(seed):
    choices = random_choices(seed, whole=True)
    for limit in limits(choices):
        room = int(limit - sum(own.costs[0] for own in choices))
        widths = knapsack(choices, sum(own.costs[0] for own in choices) + room, max(room, 1))
        assert of(choices, widths, "values") == pytest.approx(best(choices, limit), rel=1e-12)


@pytest.mark.parametrize("cells", [7, 30, 200])
@pytest.mark.parametrize("seed", range(10))
def test_rounding_loses_no_more_than_its_bound(seed, cells):
    choices = random_choices(seed)
    for limit in limits(choices):
        widths = knapsack(choices, limit, cells)
        least = sum(float(own.costs[0]) for own in choices)
        smaller = least + max(1 - len(choices) / cells, 0.0) * (limit - least)
        assert of(choices, widths, "costs") <= limit * (1 + 1e-9)
        assert best(choices, smaller) - 1e-12 <= of(choices, widths, "values") <= best(choices, limit) + 1e-12


def test_a_module_that_is_worth_nothing_stays_where_there_is_room():
    choices = [Choices(np.array([0, 4]), np.array([0.0, 1.0]), np.array([0.0, 0.0]))] * 2
    assert list(knapsack(choices, 2.0)) == [4, 4]
    assert sum(knapsack(choices, 1.5)) == 4


def test_a_knapsack_by_hand():
    choices = [
        Choices(np.array([0, 1, 2]), np.array([0.0, 2.0, 5.0]), np.array([0.0, 3.0, 7.0])),
        Choices(np.array([0, 8]), np.array([0.0, 4.0]), np.array([0.0, 6.0])),
    ]
    assert list(knapsack(choices, 6.0)) == [1, 8]  # 3 + 6, not 7
    assert list(knapsack(choices, 5.0)) == [2, 0]
    assert list(knapsack(choices, 9.0)) == [2, 8]


@pytest.mark.parametrize("seed", range(10))
def test_alike_is_nested_and_keeps_within_its_limit(seed):
    choices, before = random_choices(seed), None
    for limit in limits(choices):
        widths = alike(choices, limit)
        assert of(choices, widths, "costs") <= limit * (1 + 1e-9)
        assert before is None or (before <= widths).all()
        before = widths
    assert list(alike(choices, limits(choices)[-1] * (1 + 1e-9))) == [own.widths[-1] for own in choices]


def test_alike_by_hand():
    one = Choices(np.array([0, 5, 10]), np.array([0.0, 1.0, 3.0]), np.zeros(3))
    other = Choices(np.array([0, 6, 8]), np.array([0.0, 1.0, 2.0]), np.zeros(3))
    assert list(alike([one, other], 1.5)) == [5, 0]  # to half of it; three quarters of the other come next
    assert list(alike([one, other], 2.0)) == [5, 6]
    assert list(alike([one, other], 3.9)) == [5, 6]  # the ten come before the eight, and do not fit


@pytest.mark.parametrize("allocate", [alike, knapsack])
def test_a_limit_below_the_narrowest_widths_is_refused(allocate):
    with pytest.raises(ValueError, match=r"limit must be at least 3\.0"):
        allocate([Choices(np.array([4, 8]), np.array([3.0, 5.0]), np.zeros(2))], 2.0)

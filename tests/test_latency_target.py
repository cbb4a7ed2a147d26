"""A budget of latency is corrected by what was measured, and the nearest selection is kept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.pruning.latency import search_latency
from jaxprune.units import Gates


def gates_of(units: int) -> Gates:
    return {"0.ffn.neurons": jnp.asarray(np.arange(100) < units, jnp.float32)}


def choose(budget: float) -> Gates:
    """A table that takes a unit for a hundredth of the dense model's time."""
    return gates_of(int(100 * budget + 1e-9))


def units(gates) -> int:
    return int(gates["0.ffn.neurons"].sum())


def test_a_table_that_is_right_is_asked_once():
    found = search_latency(choose, lambda gates: units(gates) / 100, 0.5, least=0.01, most=1.0)
    assert [own.asked for own in found.trials] == [0.5] and units(found.gates) == 50


def test_what_takes_longer_than_predicted_gets_a_smaller_budget():
    found = search_latency(choose, lambda gates: 1.25 * units(gates) / 100, 0.5, least=0.01, most=1.0)
    assert [units(own.gates) for own in found.trials] == [50, 40]  # 0.5 / 1.25
    assert found.best == 1 and found.trials[1].measured == pytest.approx(0.5)


def test_fixed_costs_that_the_table_does_not_know_are_met_step_by_step():
    def seconds(gates):
        return 0.2 + 0.8 * units(gates) / 100

    found = search_latency(choose, seconds, 0.5, least=0.01, most=1.0, tolerance=0.02, tries=6)
    assert abs(found.trials[found.best].measured / 0.5 - 1.0) <= 0.02
    assert found.trials[0].measured == pytest.approx(0.6)
    errors = [abs(own.measured - 0.5) for own in found.trials]
    assert errors == sorted(errors, reverse=True)


def test_the_nearest_is_kept_if_none_is_near():
    found = search_latency(choose, lambda gates: {50: 0.8, 31: 0.3}[units(gates)], 0.5, least=0.01, most=1.0, tries=2)
    assert [own.measured for own in found.trials] == [0.8, 0.3] and found.best == 0  # 1.6 times is nearer than 1 / 1.67


def test_it_asks_for_nothing_that_cannot_be_reached():
    found = search_latency(choose, lambda _: 5.0, 0.5, least=0.3, most=1.0)
    assert [own.asked for own in found.trials] == [0.5, 0.3]  # the same widths again: it ends
    found = search_latency(choose, lambda _: 0.01, 0.5, least=0.3, most=0.7)
    assert [own.asked for own in found.trials] == [0.5, 0.7]


@pytest.mark.parametrize(("tries", "target"), [(0, 0.5), (3, 0.0), (3, float("nan"))])
def test_refuses_what_means_nothing(tries, target):
    with pytest.raises(ValueError, match="tries must be at least 1 and target above 0"):
        search_latency(choose, lambda _: 1.0, target, least=0.1, most=1.0, tries=tries)

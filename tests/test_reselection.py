"""Selecting again by the true loss: by hand, never worse than the first selection, and it ends where it repeats."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from tiny import tiny_batch, tiny_model

from jaxprune.pruning.budgets import Units
from jaxprune.pruning.loss import WORTH, LossReport, LossReporting, _Lost, reselect
from jaxprune.pruning.selection import select
from jaxprune.scoring.attribution import GradientActivation
from jaxprune.scoring.objectives import log_probability
from jaxprune.scoring.run import score_batches
from jaxprune.units import Gates

SITE = "0.ffn.neurons"


def keep_two(scores: dict[str, np.ndarray]) -> Gates:
    """The two best of four."""
    gate = np.zeros(4, np.float32)
    gate[np.argsort(-scores[SITE], kind="stable")[:2]] = 1.0
    return {SITE: gate}  # pyright: ignore[reportReturnType] NumPy arrays will do


def report(lost: float, worth: Any) -> LossReport:
    return LossReport({SITE: np.zeros(4)}, lost, lost, 0.0, (), {SITE: np.asarray(worth, np.float64)})


def closed(gates: Gates) -> tuple[int, ...]:
    return tuple(np.flatnonzero(np.asarray(gates[SITE]) == 0).tolist())


def test_rounds_by_hand():
    """Scores 4, 3, 2, 1 close the units 2 and 3. Unit 2 turns out to be worth 9: the mean is 5.5, so unit 1 goes.

    Then unit 1 is worth 8: (3 + 0 + 8) / 3 = 3.7 against (4 + 4 + 0) / 3 = 2.7 for unit 0, which goes next. Then all of
    them are worth nothing, the order stays, and the round after it would be the same.
    """
    reports: dict[tuple[int, ...], LossReport] = {
        (2, 3): report(0.5, [4, 0, 9, 1]),
        (1, 3): report(0.2, [0, 8, 9, 1]),
        (0, 3): report(0.3, [0, 0, 0, 0]),
    }
    seen: list[tuple[int, int]] = []
    found = reselect(
        {SITE: np.array([4.0, 3.0, 2.0, 1.0])},
        keep_two,
        lambda gates: reports[closed(gates)],
        rounds=5,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [closed(own.gates) for own in found.rounds] == [(2, 3), (1, 3), (0, 3)]
    assert [own.changed for own in found.rounds] == [0, 2, 2]
    assert (found.best, closed(found.gates), found.report.lost) == (1, (1, 3), 0.2)
    assert seen == [(1, 6), (2, 6), (3, 6), (6, 6)]


def test_it_ends_where_a_selection_repeats():
    found = reselect({SITE: np.arange(4.0)}, keep_two, lambda _: report(-0.1, np.arange(4.0)), rounds=9)
    assert len(found.rounds) == 1 and found.best == 0


def test_there_are_at_most_as_many_rounds_as_asked_for():
    random = np.random.default_rng(0)
    found = reselect(
        {SITE: random.random(4)}, keep_two, lambda _: report(float(random.random()), 9 * random.random(4)), rounds=2
    )
    assert 1 <= len(found.rounds) <= 3
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        reselect({}, keep_two, lambda _: report(0, np.zeros(4)), rounds=0)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_the_result_never_loses_more_than_the_first_selection(model_type: str):
    model, params = tiny_model(model_type)
    batch = tiny_batch(model, 6, 7)
    batch["labels"] = np.arange(6) % 3
    if model.answers_in_text:
        candidates = np.random.default_rng(0).integers(2, 60, (6, 3, 3))
        batch = {name: value for name, value in batch.items() if not name.startswith("decoder")}
        batch["candidates"] = candidates.astype(np.int32)
    criterion = GradientActivation(objective=log_probability)
    scores = {name: np.asarray(value) for name, value in score_batches(model, params, [batch], criterion)[0].items()}

    def measure(gates: Gates) -> LossReport:
        values, sums, _ = score_batches(
            model, params, [batch], _Lost(gates, LossReporting(nodes=1, objective=log_probability))
        )
        worth = {name: np.asarray(values[f"{WORTH}{name}"]) for name in gates}
        lost = float((sums or {})["expected"] or 0.0)
        return LossReport({}, lost, lost, 0.0, (), worth)

    for units in (0.7, 0.4):
        choose = partial(select, model, params, budget=Units(units))
        found = reselect(scores, choose, measure, rounds=2)
        first = choose(scores)
        assert all(np.array_equal(found.rounds[0].gates[name], gate) for name, gate in first.items())
        assert found.report.lost == min(own.report.lost for own in found.rounds) <= measure(first).lost
        kept = {sum(int(np.asarray(gate).sum()) for gate in own.gates.values()) for own in found.rounds}
        assert len(kept) == 1 and len(found.rounds) > 1  # the same budget, other units

"""Looks at what a selection really loses, and selects again at the same budget, round by round.

Scores are made where all units are open, or on a path from none; what counts is what a unit is worth beside those that
stay. A receipt knows: along its path, from the selected gates to open ones, it measures the slope of every unit. Where
a removed unit's is larger than a kept one's, the two should change places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.pruning.receipt import Receipt
from jaxprune.units import Gates

Choose = Callable[[dict[str, np.ndarray]], Gates]  # scores by site -> gates, such as a partial of `select`
Account = Callable[[Gates], Receipt]  # gates -> what they lose, such as a partial of `loss_receipt`


class Round(NamedTuple):
    """One selection and what it loses."""

    gates: Gates
    receipt: Receipt
    changed: int  # units that are closed here and were open in the round before, or the other way round


class Reselection(NamedTuple):
    """All rounds, the first selection among them."""

    rounds: tuple[Round, ...]
    best: int  # the round that loses least, the first of equals

    @property
    def gates(self) -> Gates:
        """The selection that loses least."""
        return self.rounds[self.best].gates

    @property
    def receipt(self) -> Receipt:
        """And what it loses."""
        return self.rounds[self.best].receipt


def reselect(
    scores: Mapping[str, Any],
    choose: Choose,
    account: Account,
    *,
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Reselection:
    """Selects, looks at the true loss, merges what it shows with the scores, and selects again.

    The scores of round `t` are the mean of the first ones and of what the units were worth in the `t` receipts so far.
    It ends after `rounds`, or as soon as a selection has occurred before. The result never loses more than the first
    selection, on the rows of the account; that is no promise for other rows.

    Args:
        scores: The first scores, in units of the objective, reduced over the examples as the receipts' `worth` is.
        choose: Selects by scores, always at the same budget.
        account: Makes the receipt of a selection, always on the same rows.
        rounds: The most re-selections.
        progress: Called with the number of receipts that are made, and the most there can be.

    Returns:
        All rounds, and which of them lost least.

    Raises:
        ValueError: If `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    sums = {name: np.asarray(value, np.float64) for name, value in scores.items()}
    done: list[Round] = []
    while len(done) <= rounds:
        gates = choose({name: total / (len(done) + 1) for name, total in sums.items()})
        if any(_changed(gates, own.gates) == 0 for own in done):
            break
        receipt = account(gates)
        done.append(Round(gates, receipt, _changed(gates, done[-1].gates) if done else 0))
        if progress is not None:
            progress(len(done), rounds + 1)
        sums = {name: total + np.asarray(receipt.worth[name], np.float64) for name, total in sums.items()}
    if progress is not None:
        progress(rounds + 1, rounds + 1)
    return Reselection(tuple(done), min(range(len(done)), key=lambda i: done[i].receipt.lost))


def _changed(gates: Gates, others: Gates) -> int:
    """Units whose gates differ."""
    return sum(int((np.asarray(gate) != np.asarray(others[name])).sum()) for name, gate in gates.items())

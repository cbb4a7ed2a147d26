"""Meets a budget of latency by measuring what was selected, and asking for more or less where the table was wrong.

A table adds up modules that were measured one by one; a whole model may take longer or less. What counts is the whole:
it runs beside the dense model, and the budget that the table is asked for is corrected by the ratio that is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxprune.units import Gates


class Try(NamedTuple):
    """A selection by the table, and what it took."""

    asked: float  # of the table, in the unit of the target
    measured: float
    gates: Gates


class Met(NamedTuple):
    """All selections, and which of them is nearest to the target."""

    tries: tuple[Try, ...]
    best: int  # the first of equals

    @property
    def gates(self) -> Gates:
        """The nearest selection."""
        return self.tries[self.best].gates


def meet(
    choose: Callable[[float], Gates],
    measure: Callable[[Gates], float],
    target: float,
    *,
    least: float,
    most: float,
    tolerance: float = 0.05,
    tries: int = 4,
) -> Met:
    """Selects until what is measured is near the target.

    After a measurement that is off by a factor, the table is asked for the last budget divided by that factor. It ends
    within the tolerance, after so many tries, or as soon as a selection has the widths of an earlier one.

    Args:
        choose: Selects by a budget, such as a partial of `select`.
        measure: What a selection takes, in the unit of the target: seconds, or a fraction of the dense model's.
        target: What it should take.
        least: The smallest budget that can be asked for.
        most: The largest that makes sense, that of the dense model.
        tolerance: How far from the target is near enough, as a fraction of it.
        tries: Selections at most; each is compiled and timed.

    Returns:
        The tries, and the nearest of them; the factor counts, so that half is as far as double.

    Raises:
        ValueError: If `tries` is below 1, the target is not above 0, or as `choose`.
    """
    if tries < 1 or not target > 0:
        raise ValueError(f"tries must be at least 1 and target above 0, got {tries} and {target}.")
    done: list[Try] = []
    asked = target
    while True:
        gates = choose(asked)
        if any(_widths(gates) == _widths(own.gates) for own in done):
            break
        done.append(Try(asked, measure(gates), gates))
        factor = done[-1].measured / target
        if len(done) == tries or abs(factor - 1.0) <= tolerance:
            break
        asked = min(max(asked / factor, least), most)
    return Met(tuple(done), min(range(len(done)), key=lambda i: abs(math.log(done[i].measured / target))))


def _widths(gates: Gates) -> dict[str, int]:
    return {name: int(np.count_nonzero(gate)) for name, gate in gates.items()}

"""Divides a budget among the sites of a model: how many of its best units each one keeps.

Where every unit of a site costs the same (parameters, FLOPs, bytes), the units stand in blocks, best first, and the
longest prefix of all blocks that the budget pays for is kept: a smaller budget keeps a subset. Where the cost of a
width is measured (seconds), a site has a few widths to choose from, and one is chosen for each: all sites keep about
the same fraction, or the scores that are kept add up to the most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.units import Site

CELLS = 1 << 15  # into which `knapsack` divides what there is to spend


class Blocks(NamedTuple):
    """The blocks of all sites, in site order and best first within a site."""

    site: np.ndarray  # index of the site
    units: np.ndarray  # units in the block
    cost: np.ndarray
    order: np.ndarray  # smaller is kept earlier; ties are kept in the order they stand here
    forced: np.ndarray  # whether it is kept before all others


class Choices(NamedTuple):
    """The widths that a site may have, narrowest first; the last is all its units."""

    widths: np.ndarray  # [choices] units
    costs: np.ndarray  # [choices], not decreasing
    values: np.ndarray  # [choices] what keeping that many of the best units is worth


def cut(
    places: Sequence[Site],
    shapes: Mapping[str, tuple[int, int]],
    costs: Mapping[str, float],
    scores: Mapping[str, np.ndarray],
    ranking: Mapping[str, np.ndarray],
    *,
    per_layer: bool,
    multiple_of: Mapping[str, int],
    floor: Mapping[str, int],
    whole: Collection[str],
) -> Blocks:
    """Cuts every site into blocks.

    Args:
        places: The sites.
        shapes: Of every site the groups that must keep as many units (heads, for channels), and its units.
        costs: Of one unit of every site.
        scores: Of the units of every site; a missing one is zero.
        ranking: The units of every site, best first.
        per_layer: Whether the block after which its site has the smallest fraction comes first; else the one with the
            highest mean score per cost.
        multiple_of: Units in a block, by kind and in each group.
        floor: Units of every group that are kept before all others, by kind.
        whole: Sites that keep all units.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for index, site in enumerate(places):
        (groups, units), cost = shapes[site.name], costs[site.name]
        if not units:
            continue
        starts = np.arange(0, units, groups * multiple_of[site.kind])
        sizes = np.diff(starts, append=units)
        if per_layer:
            order = (starts + sizes) / units
        else:
            score = scores.get(site.name, np.zeros(units))
            best = score[ranking[site.name]]
            below = np.add.reduceat(best - np.repeat(best[starts], sizes), starts)
            means = best[starts] + below / sizes  # this way the mean of equal scores is exactly that score
            order = np.maximum.accumulate(-means / cost)  # rounding must not put a later block first
        forced = np.full(len(starts), True) if site.name in whole else starts < groups * floor[site.kind]
        columns.append((np.full(len(starts), index), sizes, sizes * cost, order, forced))
    if not columns:
        columns.append((np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0), np.zeros(0, bool)))
    return Blocks(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def best_first(scores: np.ndarray, groups: int) -> np.ndarray:
    """The units, best first: the best of every group, then the second best of every group, and so on."""
    if not scores.size:
        return np.zeros(0, int)
    own = scores.reshape(groups, -1)
    order = np.argsort(-own, axis=1, kind="stable") + np.arange(groups)[:, None] * own.shape[1]
    return order.T.reshape(-1)


def sequence(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """The order in which blocks are kept, and what each and all before it cost."""
    order = np.lexsort((np.arange(len(blocks.site)), blocks.order, ~blocks.forced))  # the last key is the first
    return order, np.cumsum(blocks.cost[order])


def prefix(blocks: Blocks, places: int, limit: float) -> np.ndarray:
    """How many units every site keeps: those of the longest prefix of the blocks that costs at most `limit`."""
    order, spent = sequence(blocks)
    kept = order[: int(np.searchsorted(spent, limit, side="right"))]
    return np.bincount(blocks.site[kept], weights=blocks.units[kept], minlength=places).astype(int)


def alike(choices: Sequence[Choices], limit: float) -> np.ndarray:
    """The width of every site, where all keep about the same fraction of their units and cost at most `limit`.

    From the narrowest on, sites get their next wider choice: first the one whose fraction is then the smallest, ties in
    their order. The widths are the last ones before the limit, so those of a smaller limit are nowhere wider.

    Raises:
        ValueError: If the narrowest widths cost more than the limit.
    """
    _check_limit(choices, limit)
    steps = [
        (own.widths[i] / own.widths[-1], index, i) for index, own in enumerate(choices) for i in range(1, len(own[0]))
    ]
    taken = [0] * len(choices)
    spent = sum(float(own.costs[0]) for own in choices)
    for _, index, i in sorted(steps):
        spent += float(choices[index].costs[i] - choices[index].costs[i - 1])
        if spent > limit:
            break
        taken[index] = i
    return np.array([own.widths[i] for own, i in zip(choices, taken, strict=True)], int)


def knapsack(choices: Sequence[Choices], limit: float, cells: int = CELLS) -> np.ndarray:
    """The width of every site, with the largest sum of values that costs at most `limit`.

    A multiple-choice knapsack by dynamic programming (Dudzinski and Walukiewicz 1987). What the narrowest widths leave
    of the limit is divided into cells. Site by site, of all widths whose cost ends in the same cell, those with the
    largest sum are remembered with their exact cost, so the limit is never exceeded. At each site that moves a cost by
    less than one cell, which bounds what is lost: no widths that leave at least `len(choices) / cells` of what there
    is to spend have a larger sum of values. Among equal sums the one with most units wins.

    Args:
        choices: Of every site.
        limit: What the widths may cost together.
        cells: More are finer, and take as many times longer.

    Returns:
        The width of every site.

    Raises:
        ValueError: If the narrowest widths cost more than the limit.
    """
    cell = _check_limit(choices, limit) / cells
    value, units, spent = np.full(cells + 1, -np.inf), np.zeros(cells + 1, int), np.zeros(cells + 1)
    value[0] = 0.0  # of the sites so far: the best that ends in each cell, and what it has spent of what there is
    taken, before = (np.zeros((len(choices), cells + 1), np.int32) for _ in range(2))
    place = np.arange(cells + 1, dtype=np.int32)
    for index, own in enumerate(choices):
        best, most, paid = np.full(cells + 1, -np.inf), np.zeros(cells + 1, int), np.zeros(cells + 1)
        for i, rise in enumerate(own.costs - own.costs[0]):
            ends, moved = _cells_of(spent + rise, cell, cells), int(_cells_of(rise, cell, cells))
            for shift in range(max(moved - 1, 0), min(moved, cells) + 1):  # it ends in one of these two cells
                into, source = slice(shift, None), slice(cells + 1 - shift)
                found, wide = value[source] + own.values[i], units[source] + own.widths[i]
                better = (found > best[into]) | ((found == best[into]) & (wide > most[into]))
                fits = (ends[source] == place[into]) & np.isfinite(found) & better
                for kept, new in ((best, found), (most, wide), (paid, spent[source] + rise)):
                    np.copyto(kept[into], new, where=fits)
                np.copyto(taken[index, into], i, where=fits)
                np.copyto(before[index, into], place[source], where=fits)
        value, units, spent = best, most, paid
    widths, end = np.zeros(len(choices), int), int(np.lexsort((units, value))[-1])
    for index in reversed(range(len(choices))):
        widths[index] = choices[index].widths[taken[index, end]]
        end = before[index, end]
    return widths


def _cells_of(cost: np.ndarray | float, cell: float, cells: int) -> np.ndarray:
    """The cells that costs take, rounded up; one more than there are for all that take more."""
    share = np.asarray(cost, np.float64) / cell if cell > 0 else np.where(np.asarray(cost) > 0, np.inf, 0.0)
    # Binary fractions must not make a cost that is a whole number of cells one more.
    return np.ceil(np.minimum(share * (1 - 1e-12), cells + 1.0)).astype(int)


def _check_limit(choices: Sequence[Choices], limit: float) -> float:
    """What the narrowest widths leave of a limit."""
    room = limit - sum(float(own.costs[0]) for own in choices)
    if room < 0:
        raise ValueError(f"limit must be at least {limit - room}, what the narrowest widths cost; got {limit}.")
    return room

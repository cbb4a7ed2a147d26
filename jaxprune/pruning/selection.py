"""Selection decides which units stay, and so why a unit is kept: scores and a budget in, gates and their record out.

Every site's units are sorted, best first, and cut into blocks of one unit, or of `multiple_of`. The blocks of all sites
stand in one order that does not depend on the budget; the longest prefix that the budget pays for is kept. So a smaller
budget keeps a subset, and the result is short of its budget by less than the next block. An exact knapsack would use
the rest, but its solutions are not nested. Channels are sorted within each head, and a block has one of every head, so
that all heads keep as many.

Time is not a sum over units. A site has the widths to choose from that were measured, and one is chosen for each: all
sites keep about the same fraction, or the scores that are kept add up to the most.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxprune.checkpoints.gates import PRUNING, kept_units, units_record
from jaxprune.checkpoints.tensors import params_digest
from jaxprune.models import Model, order_sites
from jaxprune.models.cost import memory as memory_of
from jaxprune.models.cost import usual_length
from jaxprune.pruning.budgets import NAMES, SLACK, Budget, Latency, Memory, Rules, Units
from jaxprune.pruning.latency import LatencyTable, check_table
from jaxprune.scoring.scores import Scores, fitting_values
from jaxprune.units import KINDS, UNITS, AnyModel, Gates, Params, Site, check_sharing, sites, widths

CELLS = 1 << 15  # into which `knapsack` divides what there is to spend


Values: TypeAlias = Mapping[str, Any]  # site name -> [units] scores


class Candidates(NamedTuple):
    """The units that are selected from, and the rules as they apply to them."""

    sites: tuple[Site, ...]
    width: Mapping[str, int]  # the units of every site
    groups: Mapping[str, int]  # groups of a site that must keep as many units: heads for channels, and for query heads
    scores: Mapping[str, np.ndarray]  # a missing one is zero
    ranking: Mapping[str, np.ndarray]  # the units of every site, best first
    multiple_of: Mapping[str, int]  # by kind
    floor: Mapping[str, int]  # by kind
    whole: frozenset[str]  # sites that keep all units
    per_cost: bool = True  # whether scores are compared per cost

    def best(self, site: Site) -> np.ndarray:
        """The scores of a site, best first."""
        scores = self.scores.get(site.name, np.zeros(self.width[site.name]))
        return scores[self.ranking[site.name]]


class Blocks(NamedTuple):
    """The blocks of all sites, in site order and best first within a site."""

    site: np.ndarray  # index of the site
    units: np.ndarray  # units in the block
    cost: np.ndarray
    order: np.ndarray  # smaller is kept earlier; ties are kept in the order they stand here
    forced: np.ndarray  # whether it is kept before all others
    step: np.ndarray  # blocks with the same number are kept together


class Choices(NamedTuple):
    """The widths that a site may have, narrowest first; the last is all its units."""

    widths: np.ndarray  # [choices] units
    costs: np.ndarray  # [choices], not decreasing
    values: np.ndarray  # [choices] what keeping that many of the best units is worth


class Ladders(NamedTuple):
    """The widths that sites may have, and what they may cost together."""

    candidates: Candidates
    sites: tuple[tuple[Site, ...], ...]  # those with several widths to choose from; some with the same width as others
    steps: tuple[Choices, ...]  # of these sites, together
    limit: float  # of the costs of these sites

    def cost(self, places: np.ndarray) -> float:
        """The cost of widths, by their places on the ladders."""
        return math.fsum(float(each.costs[place]) for each, place in zip(self.steps, places, strict=True))

    def places(self, gates: Gates) -> np.ndarray:
        """The places on the ladders of the widths of a selection."""
        widths = [int(np.asarray(gates[sites[0].name]).sum()) for sites in self.sites]
        return np.array([np.searchsorted(each.widths, w) for each, w in zip(self.steps, widths, strict=True)], int)

    def gates(self, places: np.ndarray) -> Gates:
        """Gates that are open for the best units of every site; a site without a ladder is open."""
        steps = zip(self.sites, self.steps, places, strict=True)
        widths = {site.name: int(each.widths[place]) for sites, each, place in steps for site in sites}
        own = self.candidates
        return _gates(own, [widths.get(site.name, own.width[site.name]) for site in own.sites])

    def gates_of(self, index: int, place: int) -> Gates:
        """The gates of one of the sites, and of those that have its width."""
        some = self.candidates._replace(sites=self.sites[index])
        return _gates(some, [int(self.steps[index].widths[place])] * len(some.sites))


def ladders(model: AnyModel, params: Params, scores: Scores | Values, budget: Budget, rules: Rules) -> Ladders:
    """All widths that the sites of a model may have under some rules.

    Raises:
        ValueError: As `select`.
    """
    if isinstance(budget, Latency):
        candidates, every, limit = _by_table(budget, model, params, scores, rules)
    else:
        plan = _plan(budget, model, params, scores, rules)
        candidates = plan.candidates
        every = [_of_blocks(plan.blocks, index, rules.uniform) for index in range(len(candidates.sites))]
        limit = budget.limit(plan.total) - plan.fixed
    tied, every = _tied(candidates, every, rules, scores)
    free = [len(each.widths) > 1 for each in every]
    pairs = [(sites, each) for sites, each, several in zip(tied, every, free, strict=True) if several]
    limit -= math.fsum(float(each.costs[-1]) for each, several in zip(every, free, strict=True) if not several)
    return Ladders(candidates, tuple(sites for sites, _ in pairs), tuple(each for _, each in pairs), limit)


def _of_blocks(blocks: Blocks, index: int, tied: bool) -> Choices:
    """The widths of one site that whole blocks make; what costs nothing stays, unless it is tied to what does not."""
    own = blocks.site == index
    units, costs = (np.concatenate([[0], np.cumsum(column[own])]) for column in (blocks.units, blocks.cost))
    least = int(blocks.forced[own].sum())
    first = len(units) - 1 if not costs[-1] and not tied else least
    return Choices(units[first:].astype(int), costs[first:], np.zeros(len(units) - first))


def cut(candidates: Candidates, costs: Mapping[str, float], allocation: str) -> Blocks:
    """Cuts every site into blocks.

    Args:
        candidates: What is selected from.
        costs: Of one unit of every site.
        allocation: `per_layer`: the block after which its site has the smallest fraction comes first. `global`: the one
            with the highest mean score per cost. `per_kind`: that one among its kind, and of these the one after which
            its kind has the smallest fraction of its units.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for index, site in enumerate(candidates.sites):
        cost, units = costs[site.name], candidates.width[site.name]
        groups = candidates.groups[site.name]
        if not units:
            continue
        starts = np.arange(0, units, groups * candidates.multiple_of[site.kind])
        sizes = np.diff(starts, append=units)
        if not cost:
            order = np.full(len(starts), -np.inf)  # what costs nothing is kept first
        elif allocation == "per_layer":
            order = (starts + sizes) / units
        else:
            best = candidates.best(site)
            below = np.add.reduceat(best - np.repeat(best[starts], sizes), starts)
            means = best[starts] + below / sizes  # this way the mean of equal scores is exactly that score
            worth = means / cost if candidates.per_cost else means
            order = np.maximum.accumulate(-worth)  # rounding must not put a later block first
        least = units if site.name in candidates.whole else groups * candidates.floor[site.kind]
        columns.append((np.full(len(starts), index), sizes, sizes * cost, order, starts < least))
    if allocation == "per_kind":
        columns = _by_share(candidates.sites, columns)
    if not columns:
        columns.append((np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0), np.zeros(0, bool)))
    site, units, cost, order, forced = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Blocks(site, units, cost, order, forced, step=np.arange(len(site)))


def _together(candidates: Candidates, blocks: Blocks, by_layer: bool) -> Blocks:
    """The blocks tied to each other, so that all layers keep as many units of a kind: the next best of each.

    Of scores that rank whole layers those of a layer.

    Raises:
        ValueError: If the layers have not as many units of a kind to begin with.
    """
    if not len(blocks.site):
        return blocks
    number = {site: i for i, group in enumerate(_alike(candidates, by_layer)) for site in group}
    at = np.array([number[candidates.sites[i]] for i in blocks.site], int)
    first = np.searchsorted(blocks.site, blocks.site)  # the place of a block in its site is counted from here
    place = np.arange(len(at)) - first if by_layer else np.zeros(len(at), int)
    step = np.unique(np.stack([at, place]), axis=1, return_inverse=True)[1].ravel()
    costly = np.isfinite(blocks.order)  # what costs nothing has no say
    counts = np.bincount(step, costly)
    order = np.where(
        counts > 0, np.bincount(step, np.where(costly, blocks.order, 0.0)) / np.maximum(counts, 1), -np.inf
    )
    return blocks._replace(order=order[step], forced=np.bincount(step, blocks.forced)[step] > 0, step=step)


def _alike(candidates: Candidates, by_layer: bool) -> list[tuple[Site, ...]]:
    """The sites that have the same width: those of a kind; of scores that rank whole layers those of a layer."""
    groups: dict[Any, list[Site]] = {}
    for site in candidates.sites:
        groups.setdefault(site.kind if by_layer else (site.stack, site.layer), []).append(site)
    for kind, group in groups.items() if by_layer else ():
        if len(counts := {candidates.width[site.name] for site in group}) > 1:
            raise ValueError(
                f"uniform widths need as many {kind} in all layers; they have {min(counts):,} to {max(counts):,}: "
                "begin with the dense model."
            )
    return [tuple(group) for group in groups.values()]


def _tied(
    candidates: Candidates, choices: Sequence[Choices], rules: Rules, scores: Scores | Values
) -> tuple[list[tuple[Site, ...]], list[Choices]]:
    """The sites that have one width together, and what they may choose from: widths that all of them have."""
    if not rules.uniform:
        return [(site,) for site in candidates.sites], [*choices]
    if not _by_layer(scores):
        raise ValueError("scores that rank whole layers have no uniform widths by latency: give another budget.")
    own, tied, together = dict(zip(candidates.sites, choices, strict=True)), [], []
    for group in _alike(candidates, True):
        widths = sorted(set.intersection(*(set(own[site].widths.tolist()) for site in group)))
        parts = [[column[np.searchsorted(own[site].widths, widths)] for column in own[site][1:]] for site in group]
        costs, values = (np.sum(column, axis=0) for column in zip(*parts, strict=True))
        first = 0 if costs[-1] else len(widths) - 1  # what costs nothing stays
        tied.append(group)
        together.append(Choices(np.array(widths)[first:], costs[first:], values[first:]))
    return tied, together


def _by_share(sites: Sequence[Site], columns: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """The columns of `cut` in the order of the share of their kind's units that they and all better blocks are."""
    for kind in {site.kind for site in sites}:
        own = [
            i for i, (index, *_) in enumerate(columns) if sites[index[0]].kind == kind and np.isfinite(columns[i][3][0])
        ]
        if not own:
            continue
        worth, units = (np.concatenate([columns[i][column] for i in own]) for column in (3, 1))
        ranked = np.argsort(worth, kind="stable")
        share = np.empty(len(ranked))
        share[ranked] = np.cumsum(units[ranked]) / units.sum()
        for i, part in zip(own, np.split(share, np.cumsum([len(columns[i][0]) for i in own])[:-1]), strict=True):
            index, sizes, cost, _, forced = columns[i]
            columns[i] = index, sizes, cost, part, forced
    return columns


def best_first(scores: np.ndarray, groups: int) -> np.ndarray:
    """The units, best first: the best of every group, then the second best of every group, and so on."""
    if not scores.size:
        return np.zeros(0, int)
    grouped = scores.reshape(groups, -1)
    order = np.argsort(-grouped, axis=1, kind="stable") + np.arange(groups)[:, None] * grouped.shape[1]
    return order.T.reshape(-1)


def sequence(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """The order in which blocks are kept, and what each and all before it cost."""
    order = np.lexsort(
        (np.arange(len(blocks.site)), blocks.step, blocks.order, ~blocks.forced)
    )  # the last is the first
    spent, step = np.cumsum(blocks.cost[order]), blocks.step[order]
    last = np.flatnonzero(np.append(step[1:] != step[:-1], True)) if len(step) else np.zeros(0, int)
    return order, spent[last[np.searchsorted(last, np.arange(len(step)))]] if len(step) else spent


def prefix(blocks: Blocks, places: int, limit: float) -> np.ndarray:
    """The number of units that every site keeps: the longest prefix of the blocks that costs at most `limit`."""
    order, spent = sequence(blocks)
    chosen = order[: int(np.searchsorted(spent, limit, side="right"))]
    return np.bincount(blocks.site[chosen], weights=blocks.units[chosen], minlength=places).astype(int)


def alike(choices: Sequence[Choices], limit: float) -> np.ndarray:
    """The width of every site, where all keep about the same fraction of their units and cost at most `limit`.

    From the narrowest on, sites get their next wider choice: first the one whose fraction is then the smallest, ties in
    their order. The widths are the last ones before the limit, so those of a smaller limit are nowhere wider.

    Raises:
        ValueError: If the narrowest widths cost more than the limit.
    """
    _check_limit(choices, limit)
    steps = [
        (site.widths[i] / site.widths[-1], index, i)
        for index, site in enumerate(choices)
        for i in range(1, len(site[0]))
    ]
    taken = [0] * len(choices)
    spent = sum(float(site.costs[0]) for site in choices)
    for _, index, i in sorted(steps):
        spent += float(choices[index].costs[i] - choices[index].costs[i - 1])
        if spent > limit:
            break
        taken[index] = i
    return np.array([site.widths[i] for site, i in zip(choices, taken, strict=True)], int)


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
    for index, site in enumerate(choices):
        best, most, paid = np.full(cells + 1, -np.inf), np.zeros(cells + 1, int), np.zeros(cells + 1)
        for i, rise in enumerate(site.costs - site.costs[0]):
            ends, moved = _cells_of(spent + rise, cell, cells), int(_cells_of(rise, cell, cells))
            for shift in range(max(moved - 1, 0), min(moved, cells) + 1):  # it ends in one of these two cells
                into, source = slice(shift, None), slice(cells + 1 - shift)
                gain, wide = value[source] + site.values[i], units[source] + site.widths[i]
                better = (gain > best[into]) | ((gain == best[into]) & (wide > most[into]))
                fits = (ends[source] == place[into]) & np.isfinite(gain) & better
                for target, new in ((best, gain), (most, wide), (paid, spent[source] + rise)):
                    np.copyto(target[into], new, where=fits)
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
    """The part of a limit that the narrowest widths leave."""
    room = limit - sum(float(site.costs[0]) for site in choices)
    if room < 0:
        raise ValueError(f"limit must be at least {limit - room}, what the narrowest widths cost; got {limit}.")
    return room


class _Plan(NamedTuple):
    """All that a selection by blocks depends on."""

    candidates: Candidates
    blocks: Blocks
    fixed: float  # what stays in any case, beyond the blocks: embeddings, where bytes are counted

    @property
    def total(self) -> float:
        """The cost of the whole model."""
        return self.fixed + float(np.cumsum(self.blocks.cost)[-1] if len(self.blocks.cost) else 0.0)


def select(
    model: AnyModel, params: Params, scores: Scores | Values, budget: Budget, *, rules: Rules = Rules()
) -> Gates:
    """Keeps the units with the highest scores that fit a budget. Runs on the host.

    What stays costs at most the budget, to 1e-9 of the whole; of latency that is what the table predicts. Fractions of
    units, parameters and FLOPs are of what all units of `params` cost together; those of memory and latency of what the
    whole model costs, embeddings included. By `Units` and without `multiple_of`, exactly `floor(fraction * all units)`
    heads and neurons stay, whatever the allocation.

    By allocation `per_layer` the block after which its site has the smallest fraction comes first, ties in site order.
    If all units compete (`global`), the block with the highest mean score per cost comes first, ties by site and then
    by unit; scores of whole layers count as they are, see `Criterion`. If units compete with their own kind alone
    (`per_kind`), they are in that order among these, and all kinds keep about the same fraction of their units: heads
    and neurons differ so much in cost and in score that one may starve the other. Units that cost nothing, as of a
    cache, stay.

    By latency every site has one of the widths in the table, perhaps 0: then the module is not computed. If all units
    compete, the widths are those for which the scores that are kept add up to the most, scores below zero counting as
    zero: a `knapsack`, with its bound on what is lost. A module may be wider at a larger budget and still keep less
    than another one gains, so these selections are not nested.

    All units are heads and neurons; where the scores are of a module's channels or query channels, both of these
    instead of its heads. They cost together what the heads cost, so a budget of FLOPs is a fraction of the same whole.

    Args:
        model: The architecture.
        params: The parameters the scores were made with, or their shapes. Weights are not compared: `check_scores` is
            for that.
        scores: Higher means more needed. Units of sites that have no scores stay, and count as kept.
        budget: How much may stay, such as `Flops(0.5)`.
        rules: How units are chosen within the budget.

    Returns:
        Site name to float32 gates, 1 where the unit stays and 0 elsewhere, for the sites of all units.

    Raises:
        ValueError: If the scores are not finite, do not fit the parameters, or are of a module's heads and of its
            channels, a rule names what does not exist, the table is of another device, version or model, or the budget
            cannot be reached because of what must stay; the error then names the smallest that can.
    """
    if rules.measured:
        raise ValueError(
            "measured widths come from the model's answers to rows, and a selection reads none: prune (jp.prune) finds "
            "them. Give per_layer, per_kind or global here."
        )
    if isinstance(budget, Latency):
        return _select_by_table(budget, model, params, scores, rules)
    return _gates_of_plan(budget, _plan(budget, model, params, scores, rules))


def check_selection(model: Model, params: Params, budget: Budget, rules: Rules, scored: Iterable[str]) -> None:
    """Refuses a budget and rules that cannot be met, before anything is scored.

    A latency that can be reached is known to its table only.

    Args:
        model: The architecture.
        params: The parameters, or their shapes.
        budget: How much may stay; without a length, FLOPs are counted at the usual one.
        rules: How units are chosen within the budget.
        scored: The sites that have scores, or will have.
    """
    every = widths(model.axes, params, KINDS)
    blank = {name: np.zeros(every[name]) for name in scored if name in every}
    countable = Units(1.0) if isinstance(budget, Latency) else budget.with_length(usual_length(model))
    allocation = "per_layer" if rules.measured else rules.allocation  # what can be reached is the same
    select(model, params, blank, countable, rules=replace(rules, normalise=None, allocation=allocation))


def select_units(scores: Values, fraction: float) -> Gates:
    """The gates of `select(..., Units(fraction))`, without a model: the sites are those that have scores.

    Args:
        scores: Site name to finite scores; higher means more needed.
        fraction: Of the units that may stay, in (0, 1].

    Returns:
        Site name to float32 gates, in the order of a model's sites.
    """
    places = order_sites(scores)
    ranked = {site.name: np.asarray(scores[site.name], np.float64) for site in places}
    width, ones = {site: len(value) for site, value in ranked.items()}, dict.fromkeys(ranked, 1)
    candidates = _ranked(tuple(places), width, ones, ranked, Rules())
    return _gates_of_plan(Units(fraction), _Plan(candidates, cut(candidates, ones, "per_layer"), 0.0))


def thresholds(
    model: AnyModel, params: Params, scores: Scores | Values, budget: Budget, *, rules: Rules = Rules()
) -> dict[str, np.ndarray]:
    """The budget from which on each unit stays: `select(..., Flops(b))` keeps those whose threshold is at most `b`.

    Args:
        model: The architecture.
        params: The parameters the scores were made with.
        scores: Higher means more needed.
        budget: Only its kind counts, not how much it is.
        rules: As for `select`.

    Returns:
        Site name to float64 fractions of the budget's kind, for all sites. Units of the same block have the same.

    Raises:
        ValueError: As `select`; also by latency, where a larger budget need not keep all that a smaller one does.
    """
    plan = _plan(budget, model, params, scores, rules)
    order, spent = sequence(plan.blocks)
    reached = np.empty(len(order))
    reached[order] = (plan.fixed + spent) / (plan.total or 1.0)
    result = {}
    for index, site in enumerate(plan.candidates.sites):
        blocks = plan.blocks.site == index  # best first, as the units in the ranking
        result[site.name] = np.empty(plan.candidates.width[site.name])
        result[site.name][plan.candidates.ranking[site.name]] = np.repeat(reached[blocks], plan.blocks.units[blocks])
    return result


def per_layer_l2(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divides the scores of every site by their Euclidean norm; scores that are all zero stay zero."""
    return {name: value / (float(np.linalg.norm(value)) or 1.0) for name, value in scores.items()}


def _plan(budget: Budget, model: AnyModel, params: Params, scores: Scores | Values, rules: Rules) -> _Plan:
    """Puts the blocks of all sites in order; see `select`."""
    costs = budget.with_length(parts_of(scores)[1].get("mean_length")).unit_costs(model, params)
    candidates = _candidates(model, params, scores, rules)
    blocks = cut(candidates, costs, decided(rules, scores).allocation)
    if rules.uniform:
        blocks = _together(candidates, blocks, _by_layer(scores))
    if blocks.cost.size and not blocks.cost.any():
        kinds = " and ".join(dict.fromkeys(site.kind for site in candidates.sites if candidates.width[site.name]))
        raise ValueError(f"{budget.name} cannot be reduced: these scores are of {kinds}, which cost none of it.")
    fixed = memory_of(params) - float(blocks.cost.sum()) if isinstance(budget, Memory) else 0.0
    return _Plan(candidates, blocks, fixed)


def _candidates(model: AnyModel, params: Params, scores: Scores | Values, rules: Rules) -> Candidates:
    """Refuses what does not fit; see `select`."""
    values = parts_of(scores)[0]
    places = _competing(model, params, values)
    every = widths(model.axes, params, KINDS)
    width = {site.name: every[site.name] for site in places}
    ranked = fitting_values(values, width, "scores")
    if rules.normalise is not None:
        ranked = fitting_values(rules.normalise(dict(ranked)), width, "normalised scores", expected=ranked)
    along = {(site.module, site.kind): every[site.name] for site in sites(model.axes, params)}
    groups = {site.name: 1 if site.kind in UNITS else along[site.module, KINDS[site.kind][0]] for site in places}
    return _ranked(places, width, groups, ranked, rules)._replace(per_cost=per_cost(scores))


def _ranked(
    places: tuple[Site, ...],
    width: Mapping[str, int],
    groups: Mapping[str, int],
    scores: Mapping[str, np.ndarray],
    rules: Rules,
) -> Candidates:
    """The candidates, ranked by their scores."""
    kinds = tuple(dict.fromkeys(site.kind for site in places)) or UNITS
    ranking = {name: best_first(scores.get(name, np.zeros(units)), groups[name]) for name, units in width.items()}
    multiple_of, floor = _by_kind("multiple_of", rules.multiple_of, 1, kinds), _by_kind("floor", rules.floor, 0, kinds)
    whole = frozenset({*_protected(places, rules.protect), *(name for name in width if name not in scores)})
    return Candidates(places, width, groups, scores, ranking, multiple_of, floor, whole)


def parts_of(scores: Scores | Values) -> tuple[Values, Mapping[str, Any]]:
    """The scores by site, and what is known about them."""
    return (scores, {}) if isinstance(scores, Mapping) else (scores.values, scores.header)


def decided(rules: Rules, scores: Scores | Values) -> Rules:
    """The rules with the allocation that `auto` stands for in a selection by these scores."""
    return rules.decided(parts_of(scores)[1].get("properties"))


def _by_layer(scores: Scores | Values) -> bool:
    """True unless scores rank whole layers."""
    return (parts_of(scores)[1].get("properties") or {}).get("by_layer", True)


def per_cost(scores: Scores | Values) -> bool:
    """True if scores are compared per cost, see `Criterion`."""
    return (parts_of(scores)[1].get("properties") or {}).get("per_cost", True)


def _competing(model: AnyModel, params: Params, scored: Collection[str]) -> tuple[Site, ...]:
    """The sites that together make up the model, each parameter once: heads, or channels where those are scored.

    Raises:
        ValueError: If the scores are of heads and channels of one module.
    """
    check_sharing(model.axes, params, scored)
    every = sites(model.axes, params, KINDS)
    cut = {site.module for site in every if site.name in scored and site.kind not in UNITS}
    return tuple(site for site in every if (site.kind not in UNITS) == (site.module in cut))


def _by_kind(name: str, value: int | Mapping[str, int] | None, default: int, kinds: tuple[str, ...]) -> dict[str, int]:
    """A rule for every kind of the units; the default also is the least that is allowed."""
    given = value if isinstance(value, Mapping) else dict.fromkeys(kinds, default if value is None else value)
    if unknown := [kind for kind in given if kind not in kinds]:
        raise ValueError(f"{name} names {unknown}; the kinds of units are {', '.join(kinds)}.")
    for kind, number in given.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise TypeError(f"{name} of {kind} must be a whole number, got {number!r}.")
        if number < default:
            raise ValueError(f"{name} of {kind} must be at least {default}, got {number}.")
    return dict.fromkeys(kinds, default) | {kind: int(number) for kind, number in given.items()}


def _protected(places: tuple[Site, ...], protect: Collection[int | str]) -> set[str]:
    """The names of the sites that keep everything."""
    if isinstance(protect, str) or not isinstance(protect, Collection):
        raise TypeError(f'protect must be a collection such as (0, "3.ffn.neurons"), got {protect!r}.')
    matches = {item: {site.name for site in places if item in (site.layer, site.name)} for item in protect}
    if unknown := [item for item, names in matches.items() if not names]:
        layers = sorted({site.layer for site in places})
        raise ValueError(
            f"protect names {unknown}: neither layers nor sites. Layers: {layers}; sites: such as {places[0].name!r}."
        )
    return set().union(*matches.values())


def _gates_of_plan(budget: Budget, plan: _Plan) -> Gates:
    """Gates that are open for the best units of every site, as many as the budget pays for."""
    _, spent = sequence(plan.blocks)
    must = int(plan.blocks.forced.sum())
    _refuse_unreachable(budget, plan.fixed + (float(spent[must - 1]) if must else 0.0), plan.total)
    return _gates(
        plan.candidates, prefix(plan.blocks, len(plan.candidates.sites), budget.limit(plan.total) - plan.fixed)
    )


def _select_by_table(budget: Latency, model: AnyModel, params: Params, scores: Scores | Values, rules: Rules) -> Gates:
    """The widths of the table that a budget of latency pays for; see `select`."""
    candidates, choices, limit = _by_table(budget, model, params, scores, rules)
    how = decided(rules, scores).allocation
    if how == "per_kind":
        raise ValueError("a latency is spent by allocation per_layer or global: its table knows no share of a kind.")
    tied, choices = _tied(candidates, choices, rules, scores)
    found = (alike if how == "per_layer" else knapsack)(choices, limit)
    widths = {site.name: width for group, width in zip(tied, found, strict=True) for site in group}
    return _gates(candidates, [widths[site.name] for site in candidates.sites])


def _by_table(
    budget: Latency, model: AnyModel, params: Params, scores: Scores | Values, rules: Rules
) -> tuple[Candidates, list[Choices], float]:
    """The widths of the table, and the seconds that they may take together."""
    table = budget.table
    if not isinstance(model, Model):
        raise ValueError("only models of a family have latency tables: give a budget of units, parameters or flops.")
    if table is None:
        raise ValueError("a latency budget needs table=, which measure_latency_table makes for this model and device.")
    check_table(table, model, params)
    candidates = _candidates(model, params, scores, rules)
    if other := sorted({site.kind for site in candidates.sites} - set(UNITS)):
        raise ValueError(f"a latency budget needs scores of {' or '.join(UNITS)}, these are of {', '.join(other)}.")
    choices = [_choices(candidates, site, table) for site in candidates.sites]
    total = table.predict(candidates.width)
    _refuse_unreachable(budget, table.fixed + math.fsum(float(site.costs[0]) for site in choices), total)
    return candidates, choices, budget.limit(total) - table.fixed


def least_latency(
    model: AnyModel, params: Params, scores: Scores | Values, table: LatencyTable, *, rules: Rules = Rules()
) -> float:
    """The seconds of the narrowest widths that `select` may choose by a table."""
    candidates = _candidates(model, params, scores, rules)
    return table.fixed + math.fsum(float(_choices(candidates, site, table).costs[0]) for site in candidates.sites)


def _choices(candidates: Candidates, site: Site, table: LatencyTable) -> Choices:
    """The widths that a site may have, and the scores that it then keeps."""
    units, multiple, least = candidates.width[site.name], candidates.multiple_of[site.kind], candidates.floor[site.kind]
    totals = np.concatenate([[0.0], np.cumsum(np.maximum(candidates.best(site), 0.0))])
    cheapest: dict[int, float] = {}
    for width, seconds in table.steps(site.name, units):
        rounded = width if width == units else width - width % multiple
        if width == units or (rounded >= least and site.name not in candidates.whole):
            cheapest.setdefault(rounded, seconds)
    offered = np.array(list(cheapest), int)
    costs = np.array(list(cheapest.values()))
    return Choices(offered, costs, totals[offered] if candidates.per_cost else costs * totals[-1] / max(units, 1))


def _refuse_unreachable(budget: Budget, least: float, total: float) -> None:
    """Refuses a budget below the least that has to stay."""
    if least <= budget.limit(total):
        return
    share = math.ceil(1e4 * (least / total - SLACK)) / 1e4
    others = "what is never pruned, " if budget.counted in ("memory", "latency") else ""
    amount = {"memory": f"{math.ceil(least / 1e3) / 1e3} MB", "latency": f"{math.ceil(1e6 * least) / 1e3} ms"}
    named = f", {amount[budget.counted]}" if others else ""
    raise ValueError(
        f"{budget.name}={budget.amount:.6g} cannot be reached: {others}the floor, protected layers and sites without "
        f"scores keep more. The smallest reachable fraction is {share}{named}."
    )


def _gates(candidates: Candidates, widths: Sequence[int] | np.ndarray) -> Gates:
    gates = {}
    for site, units in zip(candidates.sites, widths, strict=True):
        gate = np.zeros(candidates.width[site.name], np.float32)
        gate[candidates.ranking[site.name][:units]] = 1.0
        gates[site.name] = jax.device_put(gate)  # jnp.asarray would compile a program for every width
    return gates


def pruning_record(
    scores: Scores | Values,
    gates: Mapping[str, Any],
    budget: Budget | None = None,
    rules: Rules | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Says how a pruned model was made, for `save(..., pruning=...)`.

    Args:
        scores: The scores that were selected by.
        gates: What `select` returned.
        budget: The budget, and
        rules: the rules that were selected by.
        **more: What else is worth keeping. Functions are recorded by name.

    Returns:
        A dict that JSON can hold: the settings, the header of the scores without the keys of single examples, digests
        of scores, means and gates, and for every site the units it had, how many it keeps and which (`"0-3,7"`; a unit
        with a fractional gate is kept).

    Raises:
        TypeError: If a setting cannot be written as JSON.
    """
    values, header = parts_of(scores)
    means = None if isinstance(scores, Mapping) else scores.means
    rules = None if rules is None else decided(rules, scores)
    arrays = {name: np.asarray(gate) for name, gate in gates.items()}
    remaining = {name: np.flatnonzero(gate) for name, gate in arrays.items()}
    for name, value in values.items():  # a site without gates is open
        remaining.setdefault(name, np.arange(len(value)))
    had = {name: len(arrays[name]) if name in arrays else len(values[name]) for name in remaining}
    kept = _kept_gates(remaining, had)
    whole = kept.keys() == arrays.keys() and all(np.array_equal(kept[name], arrays[name]) for name in kept)
    return {
        "settings": {name: _plain(value, name) for name, value in settings_of(budget, rules, **more).items()},
        "scores": {name: _plain(value, name) for name, value in header.items()},
        "digests": {
            "scores": params_digest(dict(values)),
            "means": params_digest(means) if means else None,  # what closed units are replaced by; None is zero
            "gates": params_digest(arrays),
            **({} if whole else {"sites": params_digest(kept)}),  # what `sites` says, where that is not the gates
        },
        **units_record(remaining, had),
    }


def _kept_gates(remaining: Mapping[str, np.ndarray], had: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Gates that are 1 where a unit stays and 0 elsewhere."""
    gates = {name: np.zeros(units, np.float32) for name, units in had.items()}
    for name, units in remaining.items():
        gates[name][units] = 1.0
    return gates


def check_record(record: Mapping[str, Any]) -> None:
    """Refuses a record whose sites are not those that its digest of the gates is of.

    Raises:
        ValueError: If it does not say which units stay, or says something else than when it was written.
    """
    digests = record.get("digests")
    expected = digests.get("sites", digests.get("gates")) if isinstance(digests, Mapping) else None
    units = {name: kept_units(name, site) for name, site in record.get("sites", {}).items()}
    had, remaining = {name: unit[0] for name, unit in units.items()}, {name: unit[1] for name, unit in units.items()}
    if expected and expected != params_digest(_kept_gates(remaining, had)):
        raise ValueError(
            f"{PRUNING} names other units than when it was written: its sites have not the digest that it holds of "
            "them. Take the file from where the model came from, or prune again."
        )


def settings_of(budget: Budget | None = None, rules: Rules | None = None, **more: Any) -> dict[str, Any]:
    """A budget and rules in one flat dict, as records hold them."""
    amounts = {} if budget is None else dict.fromkeys((*NAMES, "length")) | budget.settings()
    return amounts | ({} if rules is None else rules.settings()) | more


def _plain(value: Any, name: str) -> Any:
    """A value as JSON can hold it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, name) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax
        return np.asarray(value).tolist()
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    raise TypeError(f"{name} cannot be written as JSON: {value!r}.")

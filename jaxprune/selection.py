"""Chooses which units stay: scores and a budget in, gates out.

There is one algorithm. Every site's units are sorted, best first, and cut into blocks of one unit, or of `multiple_of`.
The blocks of all sites stand in one order that does not depend on the budget; the longest prefix that the budget pays
for is kept. So a smaller budget keeps a subset, and the result is short of its budget by less than the next block.
An exact knapsack would use the rest, but its solutions are not nested.

Channels are sorted within each head, and a block has one of every head, so that all heads keep as many: the best of
each, then the second best, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxprune.batches import Length
from jaxprune.checkpoint import digest, model_digest
from jaxprune.cost import checked_length, elements, matmul_flops, unit_costs
from jaxprune.gates import KINDS, UNITS, Gates, Params, Site, check_sharing, site_of, site_order, sites, widths
from jaxprune.models import Model

if TYPE_CHECKING:
    from jaxprune.scores import Scores

Values: TypeAlias = Mapping[str, Any]  # site name -> [units] scores
Normalise: TypeAlias = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]

SLACK = 1e-9  # of the total cost: 0.29 * 100 is 28.999999999999996 in binary and means 29


class _Blocks(NamedTuple):
    """The blocks of all sites, in site order and best first within a site."""

    site: np.ndarray  # index of the site
    units: np.ndarray  # units in the block
    cost: np.ndarray
    order: np.ndarray  # smaller is kept earlier; ties are kept in the order they stand here
    forced: np.ndarray  # whether it is kept before all others


class _Plan(NamedTuple):
    """All that a selection depends on."""

    budget: str
    fraction: float
    places: tuple[Site, ...]
    width: Mapping[str, int]
    blocks: _Blocks
    ranking: Mapping[str, np.ndarray]  # the units of every site, best first


def select(
    model: Model,
    params: Params,
    scores: Scores | Values,
    *,
    units: float | None = None,
    parameters: float | None = None,
    flops: float | None = None,
    length: Length | None = None,
    per_layer: bool = True,
    multiple_of: int | Mapping[str, int] | None = None,
    floor: int | Mapping[str, int] | None = None,
    protect: Collection[int | str] = (),
    normalise: Normalise | None = None,
) -> Gates:
    """Keeps the units with the highest scores that fit a budget. Runs on the host.

    The budget is a fraction, in (0, 1], of what all units of `params` cost together; exactly one of `units`,
    `parameters` and `flops` must be given. What stays costs at most that, to 1e-9 of the whole. By `units` and without
    `multiple_of`, exactly `floor(fraction * all units)` heads and neurons stay, whether `per_layer` or not.

    All units are heads and neurons; where the scores are of a module's channels or query channels, both of these
    instead of its heads. They cost together what the heads cost, so a budget of FLOPs is a fraction of the same whole.

    Args:
        model: The architecture.
        params: The parameters the scores were made with.
        scores: Higher means more needed. Units of sites that have no scores stay, and count as kept.
        units: Fraction of the units that may stay.
        parameters: Fraction of the prunable parameters (weights and biases of units) that may stay.
        flops: Fraction of the FLOPs per example that may stay; see `jaxprune.cost.flops`.
        length: Tokens per example, for `flops` (of a text-to-text model those read and those written); None is the mean
            length of the examples that were scored.
        per_layer: Whether all sites keep about the same fraction of their units: the block after which its site has the
            smallest fraction comes first, ties in site order. If False, all units compete: the block with the highest
            mean score per cost comes first, ties by site and then by unit.
        multiple_of: Kept units of a site (channels: of a head) are a multiple of this, or all of them: one number, or
            one per kind such as `{"neurons": 8}`.
        floor: At least that many units of every site (channels: of every head) stay, or all it has; one number, or one
            per kind.
        protect: Layers (`0`) and sites (`"3.ffn.neurons"`) that keep all units.
        normalise: Rescales the scores before they are compared, such as `per_layer_l2`.

    Returns:
        Site name to float32 gates, 1 where the unit stays and 0 elsewhere, for the sites of all units.

    Raises:
        ValueError: If there is not exactly one budget or it is out of range, the scores are not finite or belong to
            another model, or are of a module's heads and of its channels, a setting names what does not exist, or the
            budget cannot be reached because of what must stay; the error then names the smallest fraction that can.
    """
    plan = _plan(
        model,
        params,
        scores,
        units=units,
        parameters=parameters,
        flops=flops,
        length=length,
        per_layer=per_layer,
        multiple_of=multiple_of,
        floor=floor,
        protect=protect,
        normalise=normalise,
    )
    return _gates(plan)


def select_units(scores: Values, fraction: float) -> Gates:
    """What `select(units=fraction)` keeps, without a model: the sites are those that have scores.

    Args:
        scores: Site name to finite scores; higher means more needed.
        fraction: Of the units that may stay, in (0, 1].

    Returns:
        Site name to float32 gates, in the order of a model's sites.
    """
    name, fraction = _only_budget({"units": fraction})
    places = tuple(sorted(map(site_of, scores), key=site_order))
    ranked = {site.name: np.asarray(scores[site.name], np.float64) for site in places}
    width = {site: len(value) for site, value in ranked.items()}
    multiple_of, floor = _by_kind("multiple_of", None, 1, 1, UNITS), _by_kind("floor", None, 0, 0, UNITS)
    shapes = {site: (1, size) for site, size in width.items()}
    cut = _cut(places, shapes, dict.fromkeys(width, 1.0), ranked, True, multiple_of, floor, ())
    return _gates(_Plan(name, fraction, places, width, *cut))


def thresholds(model: Model, params: Params, scores: Scores | Values, **settings: Any) -> dict[str, np.ndarray]:
    """From which budget on each unit stays: `select(..., flops=b)` keeps the units whose threshold is at most `b`.

    Args:
        model: The architecture.
        params: The parameters the scores were made with.
        scores: Higher means more needed.
        **settings: The arguments of `select`. Of the budget only the kind counts, not the fraction.

    Returns:
        Site name to float64 fractions of the budget's kind, for all sites. Units of the same block have the same.
    """
    plan = _plan(model, params, scores, **settings)
    sequence, spent = _sequence(plan.blocks)
    reached = np.empty(len(sequence))
    reached[sequence] = spent / (spent[-1] if len(spent) and spent[-1] else 1.0)
    found = {}
    for index, site in enumerate(plan.places):
        own = plan.blocks.site == index  # best first, as the units in the ranking
        found[site.name] = np.empty(plan.width[site.name])
        found[site.name][plan.ranking[site.name]] = np.repeat(reached[own], plan.blocks.units[own])
    return found


def union(*gates: Mapping[str, Any]) -> Gates:
    """Open where any of several tasks' gates are: what all of the tasks together need. Contains each of them.

    Raises:
        ValueError: If there are none, they are of other sites or numbers of units, or a gate is neither 0 nor 1.
    """
    return {name: jnp.asarray(np.maximum.reduce(own)) for name, own in _together(gates).items()}


def intersection(*gates: Mapping[str, Any]) -> Gates:
    """Open where all of several tasks' gates are: what each of the tasks needs. Contained in each of them.

    Raises:
        ValueError: If there are none, they are of other sites or numbers of units, or a gate is neither 0 nor 1.
    """
    return {name: jnp.asarray(np.minimum.reduce(own)) for name, own in _together(gates).items()}


def _together(gates: tuple[Mapping[str, Any], ...]) -> dict[str, list[np.ndarray]]:
    """Several gates, site by site."""
    if not gates:
        raise ValueError("give gates of at least one task.")
    arrays = [{name: np.asarray(gate, np.float32) for name, gate in own.items()} for own in gates]
    shapes = [{name: gate.shape for name, gate in own.items()} for own in arrays]
    names = dict.fromkeys(name for own in arrays for name in own)
    wrong = [
        f"{name} has the shapes {', '.join(str(own.get(name, 'none')) for own in shapes)}"
        for name in names
        if len({own.get(name) for own in shapes}) > 1
    ]
    wrong += [
        f"{name} holds {gate[~np.isin(gate, (0, 1))][0]}, expected 0 or 1"
        for own in arrays
        for name, gate in own.items()
        if not np.isin(gate, (0, 1)).all()
    ]
    if wrong:
        raise ValueError(f"these gates do not go together: {_some(wrong)}.")
    return {name: [own[name] for own in arrays] for name in arrays[0]}


def per_layer_l2(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divides the scores of every site by their Euclidean norm; scores that are all zero stay zero."""
    return {name: value / (float(np.linalg.norm(value)) or 1.0) for name, value in scores.items()}


def pruning_record(scores: Scores | Values, gates: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Says how a pruned model was made, for `save(..., pruning=...)`.

    Args:
        scores: The scores that were selected by.
        gates: What `select` returned.
        **settings: The arguments of `select`, such as `flops=0.5, length=128`, and what else is worth keeping.
            Functions are recorded by name.

    Returns:
        A dict that JSON can hold: the settings, the header of the scores without the keys of single examples, digests
        of scores, means and gates, and for every site the units it had, how many it keeps and which (`"0-3,7"`; a unit
        with a fractional gate is kept).

    Raises:
        TypeError: If a setting cannot be written as JSON.
    """
    values, header = _parts(scores)
    means = None if isinstance(scores, Mapping) else scores.means
    arrays = {name: np.asarray(gate) for name, gate in gates.items()}
    kept = {name: np.flatnonzero(gate) for name, gate in arrays.items()}
    for name, value in values.items():  # a site without gates is open
        kept.setdefault(name, np.arange(len(value)))
    had = {name: len(arrays[name]) if name in arrays else len(values[name]) for name in kept}
    return {
        "settings": {name: _plain(value, name) for name, value in settings.items()},
        "scores": {name: _plain(value, name) for name, value in header.items() if name != "rows"},
        "digests": {
            "scores": digest(dict(values)),
            "means": digest(means) if means else None,  # what closed units are replaced by; None is zero
            "gates": digest(arrays),
        },
        "units": {"had": sum(had.values()), "kept": sum(len(index) for index in kept.values())},
        "sites": {
            name: {"had": had[name], "kept": len(index), "which": _ranges(index)} for name, index in kept.items()
        },
    }


def _plan(
    model: Model,
    params: Params,
    scores: Scores | Values,
    *,
    units: float | None = None,
    parameters: float | None = None,
    flops: float | None = None,
    length: Length | None = None,
    per_layer: bool = True,
    multiple_of: int | Mapping[str, int] | None = None,
    floor: int | Mapping[str, int] | None = None,
    protect: Collection[int | str] = (),
    normalise: Normalise | None = None,
) -> _Plan:
    """Refuses what does not fit, and puts the blocks of all sites in order; see `select`."""
    values, header = _parts(scores)
    name, fraction = _only_budget({"units": units, "parameters": parameters, "flops": flops})
    costs = site_costs(model, params, name, header.get("mean_length") if length is None else length)
    places = _competing(model, params, values)
    every = widths(model.axes, params, KINDS)
    width = {site.name: every[site.name] for site in places}
    ranked = _checked(values, width, "scores")
    _refuse_other_model(model, params, header)
    if normalise is not None:
        ranked = _checked(normalise(dict(ranked)), width, "normalised scores", expected=ranked)
    kinds = tuple(dict.fromkeys(site.kind for site in places))
    heads = {site.module: every[site.name] for site in sites(model.axes, params, ("heads",))}
    blocks, ranking = _cut(
        places,
        {site.name: (heads[site.module] if len(KINDS[site.kind]) > 1 else 1, width[site.name]) for site in places},
        costs,
        ranked,
        per_layer,
        _by_kind("multiple_of", multiple_of, 1, 1, kinds),
        _by_kind("floor", floor, 0, 0, kinds),
        _protected(places, protect),
    )
    return _Plan(name, fraction, places, width, blocks, ranking)


def _parts(scores: Scores | Values) -> tuple[Values, Mapping[str, Any]]:
    """The scores by site, and what is known about them."""
    return (scores, {}) if isinstance(scores, Mapping) else (scores.values, scores.header)


def _only_budget(budgets: Mapping[str, float | None]) -> tuple[str, float]:
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one budget of {', '.join(budgets)}; got {', '.join(given) or 'none'}.")
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}.")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}.")
    return name, float(value)


def _competing(model: Model, params: Params, scored: Collection[str]) -> tuple[Site, ...]:
    """The sites that together make up the model, each parameter once: heads, or channels where those are scored.

    Raises:
        ValueError: If the scores are of heads and channels of one module.
    """
    check_sharing(model.axes, params, scored)
    every = sites(model.axes, params, KINDS)
    cut = {site.module for site in every if site.name in scored and site.kind not in UNITS}
    return tuple(site for site in every if (site.kind not in UNITS) == (site.module in cut))


def site_costs(model: Model, params: Params, budget: str, length: Length | None) -> dict[str, float]:
    """The cost of one unit at every site, of all kinds, for a budget of `units`, `parameters` or `flops`."""
    if budget == "units":
        return dict.fromkeys(widths(model.axes, params, KINDS), 1.0)
    if budget == "parameters":
        return unit_costs(model, params, elements, KINDS)
    if length is None:
        raise ValueError("a FLOPs budget needs length=, tokens per example: these scores do not say their mean length.")
    return unit_costs(model, params, matmul_flops(checked_length(model, length)), KINDS)


def _checked(
    values: Values, width: Mapping[str, int], what: str, expected: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """The scores as float64 arrays, if they fit the model."""
    arrays = {name: np.asarray(value).astype(np.float64) for name, value in values.items()}
    wrong = [f"{name} is not a site" for name in arrays if name not in width]
    wrong += [f"{name} is missing" for name in expected if name not in arrays]
    wrong += [
        f"{name} has shape {array.shape} for {width[name]} units"
        for name, array in arrays.items()
        if name in width and array.shape != (width[name],)
    ]
    wrong += [f"{name} holds NaN or infinity" for name, array in arrays.items() if not np.isfinite(array).all()]
    if wrong:
        raise ValueError(f"the {what} cannot be used with these parameters: {_some(wrong)}. Score this model first.")
    return arrays


def _refuse_other_model(model: Model, params: Params, header: Mapping[str, Any]) -> None:
    made_with = header.get("model")
    if made_with and made_with != (own := model_digest(model, params)):
        raise ValueError(
            f"these scores belong to another model: they were made with {made_with[:12]}, this is {own[:12]} "
            "(other weights, another type of them, or other task heads). Score this model first."
        )


def _by_kind(
    name: str, value: int | Mapping[str, int] | None, default: int, least: int, kinds: tuple[str, ...]
) -> dict[str, int]:
    """A setting for every kind of the units."""
    given = value if isinstance(value, Mapping) else dict.fromkeys(kinds, default if value is None else value)
    if unknown := [kind for kind in given if kind not in kinds]:
        raise ValueError(f"{name} names {unknown}; the kinds of units are {', '.join(kinds)}.")
    for kind, number in given.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise TypeError(f"{name} of {kind} must be a whole number, got {number!r}.")
        if number < least:
            raise ValueError(f"{name} of {kind} must be at least {least}, got {number}.")
    return dict.fromkeys(kinds, default) | {kind: int(number) for kind, number in given.items()}


def _protected(places: tuple[Site, ...], protect: Collection[int | str]) -> set[str]:
    """The names of the sites that keep everything."""
    if isinstance(protect, str) or not isinstance(protect, Collection):
        raise TypeError(f'protect must be a collection such as (0, "3.ffn.neurons"), got {protect!r}.')
    found = {item: {site.name for site in places if item in (site.layer, site.name)} for item in protect}
    if unknown := [item for item, names in found.items() if not names]:
        layers = sorted({site.layer for site in places})
        raise ValueError(
            f"protect names {unknown}: neither layers nor sites. Layers: {layers}; sites: such as {places[0].name!r}."
        )
    return set().union(*found.values())


def _cut(
    places: tuple[Site, ...],
    shapes: Mapping[str, tuple[int, int]],
    costs: Mapping[str, float],
    scores: Mapping[str, np.ndarray],
    per_layer: bool,
    multiple_of: Mapping[str, int],
    floor: Mapping[str, int],
    protected: Collection[str],
) -> tuple[_Blocks, dict[str, np.ndarray]]:
    """Cuts every site into blocks; also the units of every site, best first.

    A site's shape is the number of groups that must keep as many units (heads, for channels), and that of its units.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    ranking: dict[str, np.ndarray] = {}
    for index, site in enumerate(places):
        (groups, units), cost = shapes[site.name], costs[site.name]
        score = scores.get(site.name, np.zeros(units))
        ranking[site.name] = _best_first(score, groups)
        if not units:
            continue
        starts = np.arange(0, units, groups * multiple_of[site.kind])
        sizes = np.diff(starts, append=units)
        if per_layer:
            order = (starts + sizes) / units
        else:
            best_first = score[ranking[site.name]]
            below = np.add.reduceat(best_first - np.repeat(best_first[starts], sizes), starts)
            means = best_first[starts] + below / sizes  # this way the mean of equal scores is exactly that score
            order = np.maximum.accumulate(-means / cost)  # rounding must not put a later block first
        whole = site.name in protected or site.name not in scores
        forced = np.full(len(starts), True) if whole else starts < groups * floor[site.kind]
        columns.append((np.full(len(starts), index), sizes, sizes * cost, order, forced))
    if not columns:
        columns.append((np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0), np.zeros(0, bool)))
    return _Blocks(*(np.concatenate(column) for column in zip(*columns, strict=True))), ranking


def _best_first(scores: np.ndarray, groups: int) -> np.ndarray:
    """The units, best first: the best of every group, then the second best of every group, and so on."""
    if not scores.size:
        return np.zeros(0, int)
    own = scores.reshape(groups, -1)
    order = np.argsort(-own, axis=1, kind="stable") + np.arange(groups)[:, None] * own.shape[1]
    return order.T.reshape(-1)


def _sequence(blocks: _Blocks) -> tuple[np.ndarray, np.ndarray]:
    """The order in which blocks are kept, and what each and all before it cost."""
    sequence = np.lexsort((np.arange(len(blocks.site)), blocks.order, ~blocks.forced))  # the last key is the first
    return sequence, np.cumsum(blocks.cost[sequence])


def _afford(blocks: _Blocks, places: int, name: str, fraction: float) -> np.ndarray:
    """How many units every site keeps."""
    sequence, spent = _sequence(blocks)
    total = spent[-1] if len(spent) else 0.0
    paid = int(np.searchsorted(spent, (fraction + SLACK) * total, side="right"))
    must = int(blocks.forced.sum())
    if paid < must:
        smallest = math.ceil(1e4 * (spent[must - 1] / total - SLACK)) / 1e4
        raise ValueError(
            f"{name}={fraction} cannot be reached: the floor, protected layers and sites without scores keep more. "
            f"The smallest reachable fraction is {smallest}."
        )
    kept = sequence[:paid]
    return np.bincount(blocks.site[kept], weights=blocks.units[kept], minlength=places).astype(int)


def _gates(plan: _Plan) -> Gates:
    """Gates that are open for the best units of every site, as many as the budget pays for."""
    kept = _afford(plan.blocks, len(plan.places), plan.budget, plan.fraction)
    gates = {}
    for site, units_kept in zip(plan.places, kept, strict=True):
        gate = np.zeros(plan.width[site.name], np.float32)
        gate[plan.ranking[site.name][:units_kept]] = 1.0
        gates[site.name] = jnp.asarray(gate)
    return gates


def _some(wrong: list[str]) -> str:
    return "; ".join(wrong[:6]) + (f" and {len(wrong) - 6} more" if len(wrong) > 6 else "")


def _ranges(index: np.ndarray) -> str:
    """Sorted whole numbers in short: `0-3,7`."""
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1) if len(index) else []
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


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

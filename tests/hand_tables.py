"""Latency tables written by hand: a head takes 2 ms, a neuron 0.1 ms, the rest of a pass 10 ms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxprune.models import Model
from jaxprune.pruning.latency import LatencyTable, Row, conditions
from jaxprune.units import Params, sites, widths

HEAD, NEURON, FIXED = 2e-3, 1e-4, 1e-2  # seconds


def hand_table(
    model: Model,
    params: Params,
    *,
    batch: int = 1,
    length: int | tuple[int, int] = 12,
    step: int = 8,
    seconds: Callable[[str, int], float] = lambda kind, units: units * (HEAD if kind == "heads" else NEURON),
) -> LatencyTable:
    """A table that holds for a model on this device; neurons at multiples of `step`."""
    rows: dict[Any, list[str]] = {}
    for site in sites(model.axes, params):
        local = tuple(part for part in site.module if not isinstance(part, int))
        rows.setdefault((local, site.kind), []).append(site.name)
    width = widths(model.axes, params)
    found = []
    for (_, kind), names in rows.items():
        most = max(width[name] for name in names)
        grid = [*range(0, most, 1 if kind == "heads" else step), most]
        found.append(Row(sites=tuple(names), widths=tuple(grid), seconds=tuple(seconds(kind, units) for units in grid)))
    known = conditions(model, params, batch=batch, length=length)
    return LatencyTable(conditions=known, rows=tuple(found), fixed=FIXED, scale=1.0, wholes=((0.02, 0.02),))

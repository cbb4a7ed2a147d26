"""Comparison of scores for several tasks: rank correlation, and overlap of the units that would be kept.

No model is needed. Kinds of units are compared apart: one head costs as much as many neurons, so their scores have no
common scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from jaxprune.models import order_sites
from jaxprune.pruning.selection import select_units
from jaxprune.scoring.scores import Scores
from jaxprune.scoring.stability import FRACTIONS, chance, jaccard, joined, spearman
from jaxprune.units import UNITS


class Group(NamedTuple):
    """Units that are compared with one another: those of one kind, of one layer or of all."""

    layer: str | None  # "3" or "decoder 3"; None: all layers
    kind: str
    sites: tuple[str, ...]


def compare(scores: Mapping[str, Scores], fractions: Sequence[float] = FRACTIONS) -> dict[str, Any]:
    """Compares scores of one model, pair by pair; what is returned is JSON.

    Args:
        scores: At least two, by their names, of the same sites; see `check_same_model`.
        fractions: Of the units that are kept, for the overlap; as a budget of `Units` keeps them.

    Returns:
        `fractions`; `groups`: per layer and kind, then per kind for all layers (`layer` is None), the number of units
        and the overlap by chance at each fraction; `pairs`: the two names, and per group `spearman` and `overlap` at
        each fraction; `mean`: the same, its mean over the pairs. What is not defined is None.

    Raises:
        ValueError: If a fraction is out of range.
    """
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"fractions must lie in (0, 1], got {fraction}.")
    values = {
        name: {site: np.asarray(value, np.float64) for site, value in each.values.items()}
        for name, each in scores.items()
    }
    gates = {name: [select_units(each, fraction) for fraction in fractions] for name, each in values.items()}
    first = next(iter(values))
    groups = grouped(values[first])

    def agreement(a: str, b: str, group: Group) -> dict[str, Any]:
        overlap = [jaccard(*pair, group.sites) for pair in zip(gates[a], gates[b], strict=True)]
        return {"spearman": spearman(*(joined(values[name], group.sites) for name in (a, b))), "overlap": overlap}

    def by_chance(group: Group) -> dict[str, Any]:
        units = {site: len(values[first][site]) for site in group.sites}
        counts = [[(units[site], int(np.asarray(each[site]).sum())) for site in group.sites] for each in gates[first]]
        return {"units": sum(units.values()), "chance": list(map(chance, counts))}

    pairs = [
        {"names": [a, b], "groups": [agreement(a, b, group) for group in groups]} for a, b in combinations(values, 2)
    ]
    by_group = list(zip(*(pair["groups"] for pair in pairs), strict=True))
    return {
        "fractions": list(fractions),
        "groups": [{"layer": group.layer, "kind": group.kind, **by_chance(group)} for group in groups],
        "pairs": pairs,
        "mean": [
            {
                "spearman": _mean(each["spearman"] for each in results),
                "overlap": [_mean(column) for column in zip(*(each["overlap"] for each in results), strict=True)],
            }
            for results in by_group
        ],
    }


def grouped(values: Mapping[str, Any]) -> list[Group]:
    """The groups of some sites: layer by layer, heads before neurons, and then each kind of all layers.

    Heads of self- and of cross-attention in one layer of a decoder count together.
    """
    sites = order_sites(values)
    layers = [*dict.fromkeys(site.layer_name for site in sites), None]
    groups = [
        Group(
            layer if layer is None else layer.replace(".", " "),
            kind,
            tuple(site.name for site in sites if site.kind == kind and layer in (None, site.layer_name)),
        )
        for layer in layers
        for kind in UNITS
    ]
    return [group for group in groups if group.sites]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None

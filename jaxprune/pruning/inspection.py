"""The contents of a model, layer by layer: units, those removed, what they cost, and how scores are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.checkpoints.record import kept_units
from jaxprune.models import Model
from jaxprune.models.cost import Length, elements, matmul_flops, unit_costs, usual_length
from jaxprune.scoring.scores import Scores, check_scores
from jaxprune.units import KINDS, UNITS, Params, Site, sites, widths


class SiteUnits(NamedTuple):
    """The units of a site."""

    site: Site
    had: int  # before pruning
    left: np.ndarray  # indices of those that stay, among those it had
    scores: np.ndarray | None  # of those that stay


def inspect(
    model: Model, params: Params, *, pruning: Mapping[str, Any] | None = None, scores: Scores | None = None
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Counts what a model has in every layer; needs neither a tokenizer nor data.

    Args:
        model: The model, pruned or not.
        params: Its parameters.
        pruning: The record of its pruning, if it was pruned.
        scores: Scores of this model, or of the one that it was pruned from.

    Returns:
        A record of plain values: `layers` and `total`, each with the units of every kind as `[those that stay, those it
        had]` (channels only where the scores or the record name some), the parameters of heads and neurons, their share
        of the FLOPs of all layers, and with scores the means by kind and the share of all scores, by size. And by kind
        per layer the ranks in [0, 1] of the units it had, among all of the kind; 1 without scores, NaN if removed.

    Raises:
        ValueError: If the scores belong to another model, or the record does not fit the parameters.
    """
    recorded = {} if pruning is None else pruning.get("sites", {})
    named = {name.rpartition(".")[2] for name in (*recorded, *({} if scores is None else scores.values))}
    kinds = tuple(kind for kind in KINDS if kind in UNITS or kind in named)
    units = _units(model, params, pruning, scores, kinds)
    length = _length(model, pruning, scores)
    flops = unit_costs(model, params, matmul_flops(model, length))  # those of channels are their heads'
    sizes = unit_costs(model, params, elements)

    def cost(group: Sequence[SiteUnits], costs: Mapping[str, float]) -> float:
        return sum(len(each.left) * costs.get(each.site.name, 0.0) for each in group)

    def size(group: Sequence[SiteUnits]) -> float:
        return sum(float(np.abs(each.scores).sum()) for each in group if each.scores is not None)

    total_flops, total_size = cost(units, flops), size(units)

    def row(name: str, group: Sequence[SiteUnits]) -> dict[str, Any]:
        by_kind = {kind: [each for each in group if each.site.kind == kind] for kind in kinds}
        return {
            "layer": name,
            **{kind: [sum(len(x.left) for x in each), sum(x.had for x in each)] for kind, each in by_kind.items()},
            "parameters": round(cost(group, sizes)),
            "flops_share": cost(group, flops) / total_flops if total_flops else None,
            "mean_scores": {kind: _mean(each) for kind, each in by_kind.items()},
            "score_share": size(group) / total_size if total_size else None,
        }

    names = dict.fromkeys(each.site.layer_name for each in units)
    layers = {name: [each for each in units if each.site.layer_name == name] for name in names}
    record = {
        "flops": total_flops,
        "length": length,
        "kinds": list(kinds),
        "layers": [row(name.replace(".", " "), group) for name, group in layers.items()],
        "total": row("all", units),
    }
    return record, {kind: _ranks(list(layers.values()), kind) for kind in kinds}


def _units(
    model: Model, params: Params, pruning: Mapping[str, Any] | None, scores: Scores | None, kinds: Sequence[str]
) -> list[SiteUnits]:
    """The units of every site of some kinds, with their scores."""
    values: Mapping[str, Any] = {} if scores is None else scores.values
    recorded, made_with = {}, None
    if pruning is not None:
        recorded, about = pruning.get("sites", {}), pruning.get("scores")
        made_with = about.get("model") if isinstance(about, Mapping) else None
    of_dense = scores is not None and made_with is not None and scores.header["model"] == made_with
    if scores is not None and not of_dense:
        check_scores(model, params, scores)
    units, width = [], widths(model.axes, params, kinds)
    for site in sites(model.axes, params, kinds):
        here, stored = width[site.name], recorded.get(site.name)
        had, left = (here, np.arange(here)) if stored is None else kept_units(site.name, stored)
        value = None if site.name not in values else np.asarray(values[site.name], np.float64)
        if len(left) != here or (of_dense and value is not None and len(value) != had):
            raise ValueError(
                f"{site.name} has {here} units, but pruning.json or the scores say {len(left)} of {had}: "
                "the files of the model are not of one save."
            )
        units.append(SiteUnits(site, had, left, value[left] if of_dense and value is not None else value))
    return units


def _length(model: Model, pruning: Mapping[str, Any] | None, scores: Scores | None) -> Length:
    """Tokens per example: as scored, as pruned for, or the usual number."""
    pruned = None if pruning is None else pruning.get("settings", {}).get("length")
    return (scores.header["mean_length"] if scores is not None else pruned) or usual_length(model)


def _mean(units: Sequence[SiteUnits]) -> float | None:
    values = [each.scores for each in units if each.scores is not None and each.scores.size]
    return float(np.concatenate(values).mean()) if values else None


def _ranks(layers: Sequence[Sequence[SiteUnits]], kind: str) -> list[np.ndarray]:
    """Per layer the ranks of the units it had among all of the kind."""
    of_kind = [[each for each in group if each.site.kind == kind] for group in layers]
    scores = [each.scores for group in of_kind for each in group if each.scores is not None]
    ordered = np.sort(np.concatenate(scores)) if scores else np.zeros(0)
    ranks = []
    for group in of_kind:
        strips = [np.full(each.had, np.nan) for each in group]
        for strip, each in zip(strips, group, strict=True):
            places = None if each.scores is None else np.searchsorted(ordered, each.scores)
            strip[each.left] = 1.0 if places is None else places / max(len(ordered) - 1, 1)
        ranks.append(np.concatenate(strips) if strips else np.zeros(0))
    return ranks

"""What a model holds, layer by layer: units, what they cost, what was removed and how scores are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.checkpoints.folder import load, split_task
from jaxprune.checkpoints.gate_file import GATES, read, units_kept
from jaxprune.checkpoints.shared import pruning_of
from jaxprune.cli.render.pictures import check_picture, inspection_figure
from jaxprune.cli.workflow import check_file
from jaxprune.models import Model
from jaxprune.models.cost import Length, checked_length, elements, matmul_flops, parameters, unit_costs, usual_length
from jaxprune.scoring.scores import Scores, check_scores, load_scores
from jaxprune.sparse.masks import sparsity_of
from jaxprune.sparse.matrices import linear_maps
from jaxprune.units import KINDS, UNITS, Params, Site, flatten, sites, widths

STRAY = 1e-3  # a smaller share of zeros is no sparsity


class _Units(NamedTuple):
    """The units of a site."""

    site: Site
    had: int  # before pruning
    kept: np.ndarray  # indices of those that stay, among those it had
    scores: np.ndarray | None  # of those that stay


def inspect_model(
    source: str,
    *,
    scores: Path | None = None,
    picture: Path | None = None,
    dark: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Counts what a model has in every layer; needs neither a tokenizer nor data.

    Args:
        source: The model, pruned or not; `FOLDER#TASK` is that of one task of a shared folder.
        scores: A score file of this model, or of the one that it was pruned from.
        picture: Where to draw it, `.png` or `.svg`.
        dark: Whether the picture is for a dark page.
        overwrite: Whether a picture that is there is replaced.

    Returns:
        Per layer and in total: heads and neurons as `[those that stay, those it had]`, and channels where the scores or
        the record of the pruning name some (`kinds`); the parameters of heads and neurons, their share of the FLOPs of
        all layers; of a sparse model the share of zeros in the linear maps (`zeros`, else None); with scores the means
        by kind and the share of all scores, by size.

    Raises:
        ValueError: If the scores belong to another model, or the record of a pruned model does not fit its weights.
    """
    if picture is not None:
        check_picture(picture)
        check_file(picture, overwrite)
    found = None if scores is None else load_scores(scores)
    model, params = load(source)
    pruning = pruning_of(source, model)
    recorded = {} if pruning is None else pruning.get("sites", {})
    named = {name.rpartition(".")[2] for name in (*recorded, *({} if found is None else found.values))}
    kinds = tuple(kind for kind in KINDS if kind in UNITS or kind in named)
    units = _units(model, params, pruning, found, kinds)
    length = _length(model, pruning, found)
    costs = unit_costs(model, params, matmul_flops(checked_length(model, length)))
    sizes = unit_costs(model, params, elements)
    flops = sum(len(own.kept) * costs.get(own.site.name, 0.0) for own in units)  # those of channels are their heads'
    score = sum(float(np.abs(own.scores).sum()) for own in units if own.scores is not None)

    def row(name: Any, own: Sequence[_Units]) -> dict[str, Any]:
        by_kind = {kind: [each for each in own if each.site.kind == kind] for kind in kinds}
        spent = sum(len(each.kept) * costs.get(each.site.name, 0.0) for each in own)
        return {
            "layer": name,
            **{kind: [sum(len(x.kept) for x in each), sum(x.had for x in each)] for kind, each in by_kind.items()},
            "parameters": round(sum(len(each.kept) * sizes.get(each.site.name, 0.0) for each in own)),
            "flops_share": spent / flops if flops else None,
            "mean_scores": {kind: _mean(each) for kind, each in by_kind.items()},
            "score_share": sum(float(np.abs(each.scores).sum()) for each in own if each.scores is not None) / score
            if score
            else None,
        }

    stacks = list(dict.fromkeys((own.site.stack, own.site.layer) for own in units))
    layers = [[own for own in units if (own.site.stack, own.site.layer) == place] for place in stacks]
    zeros = _zeros(model, params)
    record = {
        "command": "inspect",
        "source": source,
        "model_type": model.config.model_type,
        "heads": list(model.heads),
        "tasks": _tasks(source, model),
        "parameters": parameters(params),
        "flops": flops,
        "length": length,
        "pruned": None if pruning is None else pruning.get("settings"),
        "scores": None if scores is None else str(scores),
        "kinds": list(kinds),
        "layers": [
            row(name := f"{stack} {layer}".strip(), own) | {"zeros": zeros.get(name)}
            for (stack, layer), own in zip(stacks, layers, strict=True)
        ],
        "total": row("all", units) | {"zeros": zeros.get("all")},
    }
    if picture is not None:
        inspection_figure(picture, record, {kind: _ranks(layers, kind) for kind in kinds}, dark=dark)
        record["picture"] = str(picture)
    return record


def _tasks(source: str, model: Model) -> list[str]:
    """The tasks whose gates stand beside the dense model."""
    file = None if model.source is None or split_task(source)[1] is not None else model.source / GATES
    return sorted(read(file).tasks) if file is not None and file.is_file() else []


def _units(
    model: Model, params: Params, pruning: Mapping[str, Any] | None, scores: Scores | None, kinds: Sequence[str]
) -> list[_Units]:
    """The units of every site of some kinds, with their scores."""
    width = widths(model.axes, params, kinds)
    values: Mapping[str, Any] = {} if scores is None else scores.values
    before = pruning is not None and scores is not None and scores.header["model"] == _made_with(pruning)
    if scores is not None and not before:
        check_scores(model, params, scores)
    recorded = {} if pruning is None else pruning.get("sites", {})
    found = []
    for site in sites(model.axes, params, kinds):
        own = recorded.get(site.name)
        had, kept = (width[site.name], np.arange(width[site.name])) if own is None else units_kept(site.name, own)
        value = None if site.name not in values else np.asarray(values[site.name], np.float64)
        if len(kept) != width[site.name] or (before and value is not None and len(value) != had):
            raise ValueError(
                f"{site.name} has {width[site.name]} units, but pruning.json or the scores say {len(kept)} of {had}: "
                "the files of the model are not of one save."
            )
        found.append(_Units(site, had, kept, value[kept] if before and value is not None else value))
    return found


def _made_with(pruning: Mapping[str, Any]) -> str | None:
    """The digest of the model that was pruned."""
    scores = pruning.get("scores")
    return scores.get("model") if isinstance(scores, Mapping) else None


def _length(model: Model, pruning: Mapping[str, Any] | None, scores: Scores | None) -> Length:
    """Tokens per example: as scored, as pruned for, or the usual number."""
    pruned = None if pruning is None else pruning.get("settings", {}).get("length")
    return (scores.header["mean_length"] if scores is not None else pruned) or usual_length(model)


def _mean(units: Sequence[_Units]) -> float | None:
    values = [own.scores for own in units if own.scores is not None]
    joined = np.concatenate(values) if values else np.zeros(0)
    return float(joined.mean()) if joined.size else None


def _ranks(layers: Sequence[Sequence[_Units]], kind: str) -> list[np.ndarray]:
    """Per layer the ranks in [0, 1] of the units it had, among all of the kind; 1 without scores, NaN if removed."""
    own_kind = [[each for each in own if each.site.kind == kind] for own in layers]
    scores = [each.scores for own in own_kind for each in own if each.scores is not None]
    ordered = np.sort(np.concatenate(scores)) if scores else np.zeros(0)
    found = []
    for own in own_kind:
        strips = [np.full(each.had, np.nan) for each in own]
        for strip, each in zip(strips, own, strict=True):
            places = None if each.scores is None else np.searchsorted(ordered, each.scores)
            strip[each.kept] = 1.0 if places is None else places / max(len(ordered) - 1, 1)
        found.append(np.concatenate(strips) if strips else np.zeros(0))
    return found


def _zeros(model: Model, params: Params) -> dict[str, float]:
    """The share of zeros in the linear maps of each layer, and of all; nothing if there is no more than a stray one."""
    maps = linear_maps(model)
    if not any(maps(path, array) for path, array in flatten(params).items()):
        return {}  # it has no layers
    found = sparsity_of(params, maps)
    if found.fraction < STRAY:
        return {}
    counts: dict[str, list[int]] = {}
    for name, own in found.arrays.items():
        stack, _, rest = name.rpartition("layers.")
        for place in (f"{stack.strip('.')} {rest.split('.')[0]}".strip(), "all"):
            counts[place] = [a + b for a, b in zip(counts.get(place, [0, 0]), own, strict=True)]
    return {place: zeros / size for place, (zeros, size) in counts.items() if size}

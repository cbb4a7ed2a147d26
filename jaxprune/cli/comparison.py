"""How far two tasks need the same units: rank correlation of their scores, and overlap of what would be kept.

Scores are enough, no model is loaded. Heads and neurons are compared apart: one head costs as much as many neurons, so
their scores have no common scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from jaxprune.cli.render.pictures import check_picture, overlap_figure
from jaxprune.cli.workflow import check_file
from jaxprune.pruning.selection import select_units
from jaxprune.scoring.scores import Scores, check_same_model, load_scores
from jaxprune.scoring.stability import FRACTIONS, chance, jaccard, joined, spearman
from jaxprune.units import UNITS, site_of, site_order


class Group(NamedTuple):
    """Units that are compared with one another: those of one kind, of one layer or of all."""

    layer: str | None  # "3" or "decoder 3"; None: all layers
    kind: str
    sites: tuple[str, ...]


def compare_scores(
    files: Sequence[Path],
    *,
    fractions: Sequence[float] = FRACTIONS,
    picture: Path | None = None,
    dark: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compares score files of one model, pair by pair.

    Args:
        files: At least two score files, usually one per task.
        fractions: Of the units that are kept, for the overlap; as `select(units=...)` keeps them.
        picture: Where to draw a heat map, `.png` or `.svg`.
        dark: Whether it is for a dark page.
        overwrite: Whether a picture that is there is replaced.

    Returns:
        The files and their names; for every layer and kind of units, and for all layers, how many units there are, and
        the overlap that chance alone gives; for every pair the rank correlation and the overlap at each fraction.

    Raises:
        ValueError: If there are fewer than two files, one is named twice, a fraction is out of range, or they hold
            scores of other models or sites.
    """
    if len(files) < 2:
        raise ValueError(f"a comparison takes two or more score files, got {', '.join(map(str, files)) or 'none'}.")
    if twice := [str(file) for i, file in enumerate(files) if file.resolve() in [it.resolve() for it in files[:i]]]:
        raise ValueError(f"{twice[0]} is named twice: name files of different tasks.")
    if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise ValueError(f"fractions must lie in (0, 1], got {wrong[0]}.")
    if picture is not None:
        check_picture(picture)
        check_file(picture, overwrite)
    scores = {str(file): load_scores(file) for file in files}
    check_same_model(scores)
    names = _names(files, [own.header["task"] for own in scores.values()])
    record = {
        "command": "compare",
        "model": next(iter(scores.values())).header["model"],
        "files": [
            {"name": name, "file": file} | {key: own.header[key] for key in ("task", "criterion", "examples")}
            for name, (file, own) in zip(names, scores.items(), strict=True)
        ],
        **compare(dict(zip(names, scores.values(), strict=True)), fractions),
    }
    if picture is not None:
        overlap_figure(picture, record, dark=dark)
        record["picture"] = str(picture)
    return record


def compare(scores: Mapping[str, Scores], fractions: Sequence[float] = FRACTIONS) -> dict[str, Any]:
    """Compares scores of one model, pair by pair; what is returned is JSON.

    Args:
        scores: At least two, by their names, of the same sites.
        fractions: Of the units that are kept.

    Returns:
        `fractions`; `groups`: per layer and kind, then per kind for all layers (`layer` is None), the number of units
        and the overlap by chance at each fraction; `pairs`: the two names, and per group `spearman` and `overlap` at
        each fraction; `mean`: the same, its mean over the pairs. What is not defined is None.
    """
    values = {
        name: {site: np.asarray(value, np.float64) for site, value in own.values.items()}
        for name, own in scores.items()
    }
    kept = {name: [select_units(own, fraction) for fraction in fractions] for name, own in values.items()}
    first = next(iter(values.values()))
    groups = grouped(first)
    pairs = [
        {
            "names": [a, b],
            "groups": [
                {
                    "spearman": spearman(joined(values[a], group.sites), joined(values[b], group.sites)),
                    "overlap": [jaccard(*own, group.sites) for own in zip(kept[a], kept[b], strict=True)],
                }
                for group in groups
            ],
        }
        for a, b in combinations(values, 2)
    ]
    return {
        "fractions": list(fractions),
        "groups": [
            {
                "layer": group.layer,
                "kind": group.kind,
                "units": len(joined(first, group.sites)),
                "chance": [
                    chance([(len(own[site]), int(np.sum(np.asarray(own[site])))) for site in group.sites])
                    for own in next(iter(kept.values()))
                ],
            }
            for group in groups
        ],
        "pairs": pairs,
        "mean": [
            {
                "spearman": _mean([pair["groups"][i]["spearman"] for pair in pairs]),
                "overlap": [_mean([pair["groups"][i]["overlap"][j] for pair in pairs]) for j in range(len(fractions))],
            }
            for i in range(len(groups))
        ],
    }


def grouped(values: Mapping[str, Any]) -> list[Group]:
    """The groups of some sites: layer by layer, heads before neurons, and then each kind of all layers.

    Heads of self- and of cross-attention in one layer of a decoder count together.
    """
    places = sorted(map(site_of, values), key=site_order)
    layers = dict.fromkeys((site.stack, site.layer) for site in places)
    every = [
        Group(name, kind, tuple(site.name for site in places if site.kind == kind and own(site)))
        for name, own in [
            *((f"{at[0]} {at[1]}".strip(), lambda site, at=at: (site.stack, site.layer) == at) for at in layers),
            (None, lambda _: True),
        ]
        for kind in UNITS
    ]
    return [group for group in every if group.sites]


def _names(files: Sequence[Path], tasks: Sequence[str]) -> list[str]:
    """What files are called: their task, the beginning of their name, or their path, whichever differs for all."""
    for found in (list(tasks), [file.stem for file in files]):
        if len(set(found)) == len(files):
            return found
    return list(map(str, files))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None

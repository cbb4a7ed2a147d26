"""Sanity checks of scores: that they sum to what they should, rank units as removal does, and beat chance.

Every check gives a verdict by a rule that is stated beside it. *Undecided* says that too little was measured to tell:
more units, examples or orders would help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Any, NamedTuple

import numpy as np

from jaxprune.data.splits import Example
from jaxprune.data.tasks import Rows, Task
from jaxprune.evaluation.evaluate import evaluate
from jaxprune.models import Model
from jaxprune.pruning.budgets import Rules, Units
from jaxprune.pruning.loss import origin_of, scored_rows
from jaxprune.pruning.selection import select
from jaxprune.scoring.criteria import Removal
from jaxprune.scoring.objectives import calibration_means, gold, zero
from jaxprune.scoring.run import Scoring, score
from jaxprune.scoring.scores import Scores
from jaxprune.scoring.stability import spearman
from jaxprune.units import Intervention, Params

PASS, FAIL, UNDECIDED, NOT_APPLICABLE = "pass", "fail", "undecided", "does not apply"
MOST_ERROR = 0.05  # of completeness, relative; 8 nodes usually leave less than a tenth of it
LEAST_CORRELATION = 0.2  # with removal; scores that are certainly below are no measure of what removal does
FEWEST_UNITS = 4  # of a site, for a rank correlation with a margin of error
CONFIDENCE = 0.95

Progress = Callable[[int, int, str], None]  # what is done, of how much, and which check it is


@dataclass(frozen=True, kw_only=True)
class Checking:
    """The extent of the checks."""

    units: int = 64  # of each kind, removed one at a time
    examples: int = 64  # the most calibration rows on which they are removed
    chunk: int = 1  # units closed together, each in separate rows; sets the memory, not the result
    orders: int = 5  # random orders of deletion, at least 2
    fractions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the units, deleted
    split: str = "dev"  # rows on which quality is measured while units are deleted
    limit: int | None = 256  # the most of them
    seed: int = 0  # of the sample of units, and of the random orders
    batch_size: int = 32

    def __post_init__(self):
        for name, least in (("orders", 2), ("units", 1), ("examples", 1), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not self.fractions or not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError(f"fractions must lie in (0, 1), got {self.fractions}.")


class Check(NamedTuple):
    """The result of one check."""

    name: str
    verdict: str  # pass, fail, undecided, or does not apply
    value: float | None
    rule: str  # when it passes, and when it fails
    facts: dict[str, Any]  # the numbers behind it, as plain values


def check(
    model: Model,
    params: Params,
    task: Task,
    scores: Scores,
    checking: Checking = Checking(),
    *,
    progress: Progress = lambda done, total, note: None,
) -> list[Check]:
    """Checks scores against the model and the task they were made with.

    *Removal*: units are sampled from all sites alike, and within a site from the lowest to the highest score, and
    really removed, one at a time. The change of the objective is reduced over the examples as the scores are, such as
    the mean of its size. Its rank correlation with the scores is that within a site, mean over the sites, with a 95 %
    interval from Fisher's transformation.

    *Deletion*: the same fraction of the units goes at every site that has scores (of top layers, of all units
    together), lowest scores first, highest first, and in random orders. The area of a curve is the mean of the task's
    primary metric over the fractions; that of another random order would lie within Student's t times the spread of
    those measured, with 95 % confidence.

    Args:
        model: The architecture.
        params: The parameters that were scored.
        task: The task, with the rows that were scored, and rows to measure quality on.
        scores: The scores.
        checking: The extent of the checks.
        progress: Called with what is done of a check, of how much, and its name.

    Returns:
        Completeness; removal, for every kind of units; deletion.

    Raises:
        ValueError: If the scores are of another model or task, its calibration rows are missing, or they were made with
            an objective or labels of the user's own.

    References:
        Bonett and Wright, Sample size requirements for estimating Pearson, Kendall and Spearman correlations, 2000.
    """
    most = checking.examples
    rows = scored_rows(model, params, task, scores, limit=most, drawn=most, key=checking.seed)
    return [
        completeness_check(scores),
        *_removal_checks(model, params, task, scores, rows, checking, progress),
        _deletion_check(model, params, task, scores, checking, progress),
    ]


def completeness_check(scores: Scores) -> Check:
    """Checks that integrated gradients sum to the objective's difference between the ends of their path."""
    completeness = scores.header["completeness"]
    rule = f"relative error at most {MOST_ERROR:g}"
    if completeness is None:
        return Check("completeness", NOT_APPLICABLE, None, rule, {})
    error = completeness["relative"]
    verdict = UNDECIDED if error is None else PASS if error <= MOST_ERROR else FAIL
    return Check("completeness", verdict, error, rule, dict(completeness))


def _removal_checks(
    model: Model,
    params: Params,
    task: Task,
    scores: Scores,
    examples: Sequence[Example],
    checking: Checking,
    progress: Progress,
) -> list[Check]:
    """Checks that scores rank units as their removal does, for every kind of units."""
    values = {site: np.asarray(value, np.float64) for site, value in scores.values.items()}
    sampled = sample_units(values, checking.units, checking.seed)
    origin = origin_of(model, scores)
    removal = Removal(
        units=sampled,
        chunk=checking.chunk,
        objective=origin.objective,
        labels=origin.labels or gold,
        examples=origin.examples,
        closed=zero if scores.means is None else calibration_means,
    )
    rows = Rows(
        examples=tuple(examples),
        key=checking.seed,
        batch_size=checking.batch_size,
        max_length=scores.header["max_length"],
    )
    changes = score(
        model,
        params,
        task,
        Scoring(criterion=removal, rows=rows, head=scores.header["head"]),
        means=scores.means,
        progress=lambda done, total: progress(done, total, "removal"),
    ).values
    rule = f"correlation above 0 with 95 % confidence; fails if it is below {LEAST_CORRELATION:g} with 95 % confidence"
    checks = []
    for kind in dict.fromkeys(site.rpartition(".")[2] for site in sampled):
        places = [site for site in sampled if site.rpartition(".")[2] == kind]
        pairs = [(values[site][sampled[site]], np.asarray(changes[site], np.float64)) for site in places]
        correlation, interval = correlation_within(pairs)
        verdict = UNDECIDED
        if interval is not None:
            verdict = PASS if interval[0] > 0 else FAIL if interval[1] < LEAST_CORRELATION else UNDECIDED
        facts = {
            "units": sum(len(sampled[site]) for site in places),
            "sites": len(places),
            "examples": len(examples),
            "interval": None if interval is None else [*interval],
        }
        checks.append(Check(f"removal of {kind.replace('_', ' ')}", verdict, correlation, rule, facts))
    return checks


def _deletion_check(
    model: Model, params: Params, task: Task, scores: Scores, checking: Checking, progress: Progress
) -> Check:
    """Checks that deleting the lowest scores first does less harm than random orders, and than the reversed order."""
    values = {site: np.asarray(value, np.float64) for site, value in scores.values.items()}
    generator = np.random.default_rng(checking.seed)
    orders = {
        "lowest first": values,
        "highest first": {site: -value for site, value in values.items()},
        **{
            f"random {i + 1}": {site: generator.random(len(value)) for site, value in values.items()}
            for i in range(checking.orders)
        },
    }
    rules = Rules(allocation="per_layer" if scores.properties["by_layer"] else "global")
    rows = Rows(
        split=checking.split,
        batch_size=checking.batch_size,
        examples=checking.limit,
        max_length=scores.header["max_length"],
        exclude=scores.rows,
    )
    total, done = 1 + len(orders) * len(checking.fractions), 0

    def quality(gates: Any) -> Any:
        nonlocal done
        intervention = Intervention(gates, scores.means)
        result = evaluate(model, params, task, head=scores.header["head"], rows=rows, intervention=intervention)
        done += 1
        progress(done, total, "deletion")
        return result

    dense = quality(None)
    sizes = {site: len(gate) for site, gate in select(model, params, values, Units(1.0)).items()}
    share = sum(map(len, values.values())) / sum(sizes.values())  # of the units that have scores
    curves = {
        name: [
            quality(select(model, params, order, Units(1.0 - share * fraction), rules=rules)).primary[1]
            for fraction in checking.fractions
        ]
        for name, order in orders.items()
    }
    metric, whole = dense.primary
    areas = {name: mean(curve) for name, curve in curves.items()}
    random = [area for name, area in areas.items() if name.startswith("random")]
    verdict, reached = judge_deletion(
        areas["lowest first"], areas["highest first"], random, something_to_lose=whole > dense.chance
    )
    facts = {
        "metric": metric,
        "split": checking.split,
        "examples": dense.n,
        "dense": whole,
        "chance": dense.chance,
        "fractions": [*checking.fractions],
        "curves": curves,
        "areas": areas,
        "random": mean(random),
        "random_reaches": reached,
    }
    rule = "area above random orders with 95 % confidence, and above highest first; fails if below one of them"
    return Check("deletion", verdict, areas["lowest first"], rule, facts)


def judge_deletion(
    area: float, reverse: float, random: Sequence[float], *, something_to_lose: bool
) -> tuple[str, float]:
    """The verdict on the area of an order, and what another random order reaches at most, with 95 % confidence.

    Args:
        area: The area of the order to judge.
        reverse: That of the reversed order.
        random: Those of random orders, at least 2.
        something_to_lose: Whether the dense model is better than chance. If not, no order shows anything.
    """
    from scipy.stats import t  # slow to import

    spread = float(t.ppf((1 + CONFIDENCE) / 2, len(random) - 1)) * stdev(random) * math.sqrt(1 + 1 / len(random))
    least, most = mean(random) - spread, mean(random) + spread
    if not something_to_lose:
        return UNDECIDED, most
    if area < least or area < reverse:
        return FAIL, most
    return PASS if area > most and area > reverse else UNDECIDED, most


def sample_units(values: Mapping[str, np.ndarray], count: int, seed: int) -> dict[str, list[int]]:
    """Chooses units of every kind, as many of each site as far as it has them, evenly from low to high scores.

    Args:
        values: Site name to scores `[units]`.
        count: How many of each kind, or all it has.
        seed: Where in its stretch of the ranking a unit is taken from.

    Returns:
        Site name to units in rising order; sites without units are left out.
    """
    generator = np.random.default_rng(seed)
    kinds: dict[str, list[str]] = {}
    for site, value in values.items():
        if len(value):
            kinds.setdefault(site.rpartition(".")[2], []).append(site)
    sampled = {}
    for sites in kinds.values():
        shares = dict.fromkeys(sites, 0)
        left = min(count, sum(len(values[site]) for site in sites))
        while left:
            for site in sites:
                if left and shares[site] < len(values[site]):
                    shares[site] += 1
                    left -= 1
        for site, share in shares.items():
            stretch = len(values[site]) / max(share, 1)
            places = np.floor((np.arange(share) + generator.random(share)) * stretch).astype(int)
            sampled[site] = sorted(np.argsort(values[site], kind="stable")[places].tolist())
    return {site: sampled[site] for site in values if sampled.get(site)}


def correlation_within(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[float | None, tuple[float, float] | None]:
    """The rank correlation within groups, mean over the groups, and its 95 % interval.

    With Fisher's transformation `z = atanh r`, the variance of a group of `n` is `(1 + r² / 2) / (n - 3)` (Bonett and
    Wright 2000). Groups of fewer than four, and those that do not rank, are left out; None if none remain.
    """
    known = [(len(a), r) for a, b in pairs if len(a) >= FEWEST_UNITS and (r := spearman(a, b)) is not None]
    if not known:
        return None, None
    correlation = mean(r for _, r in known)
    variance = sum((1 + correlation**2 / 2) / (n - 3) for n, _ in known) / len(known) ** 2
    centre = math.atanh(min(max(correlation, -0.999999), 0.999999))
    width = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(variance)
    return correlation, (math.tanh(centre - width), math.tanh(centre + width))

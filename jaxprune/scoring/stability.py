"""Stability of scores: how far two halves of the examples agree, how many more are needed, and overlap of selections.

The examples fall into two halves by their texts, see `jaxprune.data.splits.half_of`, and are scored in one pass. The
rank correlation of the halves' scores says how a scoring run with half as many examples agrees with another one.
Spearman and Brown's formula goes from there to any number of examples. It is exact for linear correlation if a unit's
scores in single examples scatter independently around its true score; for rank correlation it is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

FRACTIONS = (0.7, 0.5, 0.3)  # of the units that are kept, for overlaps
_NEGLIGIBLE = 1e-18  # a probability that does not show in a sum of float64


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation, equal scores having their mean rank; None where one side does not rank at all."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    from scipy.stats import rankdata  # slow to import

    x, y = (ranks - ranks.mean() for ranks in map(rankdata, (a, b)))
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def jaccard(a: Mapping[str, Any], b: Mapping[str, Any], sites: Sequence[str]) -> float | None:
    """The units that both keep as a fraction of those that either keeps, at some sites; None if there are none."""
    one, other = (joined(gates, sites) > 0 for gates in (a, b))
    either = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / either if either else None


def chance(sites: Sequence[tuple[int, int]]) -> float | None:
    """The mean overlap of two random choices that keep the same numbers of units.

    The number of units in common is hypergeometric at each site, and at all of them, `I`, has the convolution of these
    probabilities. Of `K` units kept in all, `I` are in both choices and `2 K - I` in either, hence the mean of
    `I / (2 K - I)`. With many units of which a fraction `f` is kept everywhere it is nearly `f / (2 - f)`.

    Args:
        sites: The units and how many of them are kept, `(n, k)`, at each site.

    Returns:
        The mean, exact but for rounding; None if nothing is kept.
    """
    from scipy.stats import hypergeom  # slow to import

    total = sum(count for _, count in sites)
    if not total:
        return None
    least, probabilities = 0, np.ones(1)  # of `I`, from its smallest value on
    for units, count in sites:
        lowest = max(0, 2 * count - units)
        site = hypergeom.pmf(np.arange(lowest, count + 1), units, count, count)
        start, joint = least + lowest, np.convolve(probabilities, site)
        likely = np.flatnonzero(joint > _NEGLIGIBLE)
        least, probabilities = start + int(likely[0]), joint[likely[0] : likely[-1] + 1]
    common = least + np.arange(len(probabilities))
    return float(probabilities @ (common / (2 * total - common)) / probabilities.sum())


def joined(values: Mapping[str, Any], sites: Sequence[str]) -> np.ndarray:
    """The values of several sites, end to end."""
    return np.concatenate([np.asarray(values[site]) for site in sites])


TARGET = 0.95  # rank correlation with another scoring run that is called stable


class KindStability(NamedTuple):
    """The agreement of the two halves on the units of one kind; None where it is not defined."""

    units: int
    spearman: float | None  # rank correlation of the halves within a site, mean over the sites
    overall: float | None  # the same over all sites at once
    reliability: float | None  # `spearman` if each half had all examples: a second run's, with as many other examples
    needed: int | None  # examples with which `reliability` would be the target
    overlap: tuple[float | None, ...]  # units that both halves keep, of those that either keeps, at each fraction
    chance: tuple[float | None, ...]  # the same of random choices


class Stability(NamedTuple):
    """The agreement of scores with those of other examples; see `stability`."""

    examples: int
    halves: tuple[int, int]  # examples in each
    target: float
    reliability: float | None  # the least of the kinds
    needed: int | None  # examples to reach the target, for all kinds; None: no number can be told
    fractions: tuple[float, ...]  # of the units of every site, for the overlap
    kinds: dict[str, KindStability]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, ready for `json.dumps`."""
        kinds = {
            kind: {**each._asdict(), "overlap": [*each.overlap], "chance": [*each.chance]}
            for kind, each in self.kinds.items()
        }
        return {**self._asdict(), "halves": [*self.halves], "fractions": [*self.fractions], "kinds": kinds}


def stability(
    halves: Mapping[str, Any] | None,
    counts: Sequence[int] | None,
    *,
    target: float = TARGET,
    fractions: Sequence[float] = FRACTIONS,
) -> Stability | None:
    """Says from one scoring run how far a second one, with other examples, would agree.

    Args:
        halves: Site name to the mean scores of the two halves, `[2, units]`; None: the scores are no means.
        counts: The examples in each.
        target: The rank correlation to reach, in (0, 1).
        fractions: Of the units of every site that are kept, for the overlap of the halves.

    Returns:
        The stability; None without halves, and if one of them has no example.

    Raises:
        ValueError: If the target or a fraction is out of range.
    """
    check_target(target)
    if outside := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise ValueError(f"fractions must lie in (0, 1], got {outside[0]}.")
    if halves is None or not counts or not all(counts):
        return None
    halves = {site: np.asarray(value, np.float64) for site, value in halves.items()}
    kinds = {}
    for kind, sites in _by_kind(halves).items():
        selections = [
            [{site: _best(half[i], fraction) for site, half in sites.items()} for i in (0, 1)] for fraction in fractions
        ]
        within, noise = _agreement(sites, counts)
        everywhere = np.concatenate(list(sites.values()), axis=1)
        kinds[kind] = KindStability(
            units=everywhere.shape[1],
            spearman=within,
            overall=spearman(everywhere[0], everywhere[1]),
            reliability=None if noise is None else reliability(noise, sum(counts)),
            needed=None if noise is None else needed(noise, target),
            overlap=tuple(jaccard(pair[0], pair[1], list(sites)) for pair in selections),
            chance=tuple(chance([(len(gate), int(gate.sum())) for gate in pair[0].values()]) for pair in selections),
        )
    known = [each.reliability for each in kinds.values() if each.reliability is not None]
    wanted = [each.needed for each in kinds.values() if each.reliability is not None]
    return Stability(
        examples=sum(counts),
        halves=(counts[0], counts[1]),
        target=target,
        reliability=min(known, default=None),
        needed=None if not wanted or None in wanted else max(number for number in wanted if number is not None),
        fractions=tuple(fractions),
        kinds=kinds,
    )


def least_reliability(halves: Mapping[str, Any], counts: Sequence[float]) -> float | None:
    """The least `reliability` of the kinds, as in `Stability`; None if no kind has one.

    Args:
        halves: Site name to the mean scores of the two halves, `[2, units]`.
        counts: The examples in each.
    """
    if not all(counts):
        return None
    arrays = {site: np.asarray(value, np.float64) for site, value in halves.items()}
    noises = [_agreement(sites, counts)[1] for sites in _by_kind(arrays).values()]
    return min((reliability(noise, sum(counts)) for noise in noises if noise is not None), default=None)


def noise_of(correlation: float, counts: Sequence[float]) -> float:
    """The number of examples with which half of the variance between units is noise, from two halves' correlation.

    If the noise of `n` examples is `q / n` of the true variance, halves of `a` and `b` examples correlate by
    `r = 1 / sqrt((1 + q / a) (1 + q / b))`. This is solved for `q`. Two halves of `n / 2` have `q = n (1 - r) / (2 r)`.

    Args:
        correlation: `r`; infinity is returned if it is not positive.
        counts: `a` and `b`.

    References:
        Horst, Estimating total test reliability from parts of unequal length, 1951.
    """
    if correlation <= 0:
        return math.inf
    a, b = counts
    excess = 1 / correlation**2 - 1
    return 2 * excess / ((a + b) / (a * b) + math.sqrt(((a + b) / (a * b)) ** 2 + 4 * excess / (a * b)))


def reliability(noise: float, examples: float) -> float:
    """The correlation of two scoring runs of so many examples each: `1 / (1 + noise / examples)`.

    With `noise_of` two equal halves it is `2 r / (1 + r)`, the formula of Spearman and Brown.

    References:
        Spearman, Correlation calculated from faulty data, 1910. Brown, Some experimental results in the correlation of
        mental abilities, 1910.
    """
    return 1 / (1 + noise / examples)


def needed(noise: float, target: float) -> int | None:
    """The examples with which `reliability` is the target, `noise * target / (1 - target)`; None: no number is enough.

    It is the formula of Spearman and Brown solved for the number: from a reliability `R` of `n` examples to the target
    `T` it takes `n T (1 - R) / (R (1 - T))`.
    """
    return None if math.isinf(noise) else max(1, math.ceil(noise * target / (1 - target) - 1e-9))


def check_target(target: float) -> None:
    """Refuses a reliability that no number of examples can reach, or any.

    Raises:
        ValueError: If it does not lie in (0, 1).
    """
    if not 0 < target < 1:
        raise ValueError(
            f"a stability must lie in (0, 1), got {target}: 0.95 asks that a second run ranks nearly the same."
        )


def _agreement(halves: Mapping[str, np.ndarray], counts: Sequence[float]) -> tuple[float | None, float | None]:
    """The rank correlation within a site, mean over the sites that have one, and the noise that it stands for."""
    known = [value for half in halves.values() if (value := spearman(*half)) is not None]
    return (mean(known), noise_of(mean(known), counts)) if known else (None, None)


def _by_kind(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The sites that have units, by their kind, such as `heads`."""
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for site, value in values.items():
        if value.size:
            kinds.setdefault(site.rpartition(".")[2], {})[site] = value
    return kinds


def _best(scores: np.ndarray, fraction: float) -> np.ndarray:
    """1 for this fraction of the units, rounded down, the ones with the highest scores, ties by index; 0 elsewhere."""
    gates = np.zeros(len(scores))
    gates[np.argsort(-scores, kind="stable")[: math.floor(fraction * len(scores) + 1e-9)]] = 1.0
    return gates

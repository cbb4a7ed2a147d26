"""How far two rankings of the same units agree: rank correlation, and overlap of what would be kept.

Arrays go in and numbers come out; no model is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FRACTIONS = (0.7, 0.5, 0.3)  # of the units that are kept, for overlaps
_NEGLIGIBLE = 1e-18  # a probability that does not show in a sum of float64


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, equal scores having the mean of theirs.

    None where one side does not rank at all: all its scores are equal, or there are fewer than two.
    """
    ranks = [_ranks(values) for values in (a, b)]
    centred = [own - own.mean() for own in ranks if len(own)]
    lengths = [float(own @ own) for own in centred]
    if len(centred) < 2 or not all(lengths):
        return None
    return float(np.clip(centred[0] @ centred[1] / math.sqrt(lengths[0] * lengths[1]), -1.0, 1.0))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values have the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def jaccard(a: Mapping[str, Any], b: Mapping[str, Any], sites: Sequence[str]) -> float | None:
    """Units that both keep at some sites, of those that either keeps; None if neither keeps any."""
    one, other = (joined(gates, sites) > 0 for gates in (a, b))
    either = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / either if either else None


def chance(sites: Sequence[tuple[int, int]]) -> float | None:
    """The mean overlap of two random choices that keep the same numbers of units.

    At a site, `k` of `n` units are kept. Whatever the one choice is, the other, drawn at random, has `i` units in
    common with it with the hypergeometric probability `C(k, i) C(n - k, k - i) / C(n, k)`. Sites are independent, so
    the number in common at all of them, `I`, has the convolution of these probabilities. Of `K` units kept in all, `I`
    are in both choices and `2 K - I` in either, hence the mean of `I / (2 K - I)`. With many units and `k / n = f`
    everywhere it is nearly `f² / (2 f - f²) = f / (2 - f)`: 0.54, 0.33 and 0.18 for 0.7, 0.5 and 0.3; with few it is
    more.

    Args:
        sites: The units and how many of them are kept, `(n, k)`, at each site.

    Returns:
        The mean, exact but for rounding; None if nothing is kept.
    """
    total = sum(kept for _, kept in sites)
    if not total:
        return None
    least, probabilities = 0, np.ones(1)  # of `I`, from its smallest value on
    for units, kept in sites:
        lowest = max(0, 2 * kept - units)
        own = np.exp([_log_hypergeometric(units, kept, common) for common in range(lowest, kept + 1)])
        start, joint = least + lowest, np.convolve(probabilities, own)
        likely = np.flatnonzero(joint > _NEGLIGIBLE)
        least, probabilities = start + int(likely[0]), joint[likely[0] : likely[-1] + 1]
    common = least + np.arange(len(probabilities))
    return float(probabilities @ (common / (2 * total - common)) / probabilities.sum())


def _log_hypergeometric(units: int, kept: int, common: int) -> float:
    """Log-probability that two random choices of `kept` from `units` have `common` in common."""
    return _log_choose(kept, common) + _log_choose(units - kept, kept - common) - _log_choose(units, kept)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def joined(values: Mapping[str, Any], sites: Sequence[str]) -> np.ndarray:
    """The values of several sites, end to end."""
    return np.concatenate([np.asarray(values[site]) for site in sites])

"""FLAP (An et al., Fluctuation-based Adaptive Structured Pruning, AAAI 2024), on this library's own pieces.

A unit counts by how much its value fluctuates about its mean, squared, times the squared weights that read it. Scores
of every module are standardised, and the best of all modules stay: compared as they are, not by what they cost. What
goes is replaced by its mean, which is the bias that the paper adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

import jaxprune as jp
from jaxprune.scoring.objectives import Closed, calibration_means


@dataclass(frozen=True, kw_only=True)
class Fluctuation(jp.criteria.Wanda):
    """`s_i = E[(h_i - E[h_i])^2] |W_out,i|^2`, not to be divided by what a unit costs."""

    closed: Closed = field(default=calibration_means)

    per_cost = False


def standardised(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores of every site less their mean, over their standard deviation."""
    return {name: (own - own.mean()) / (own.std(ddof=1) or 1.0) for name, own in scores.items()}

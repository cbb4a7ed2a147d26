"""What a selection is predicted to lose of the objective, from a score file alone: a sum over the units that go.

An *estimate* is the sum of their attributions, with signs. It takes the units' losses to add up, which they do not:
what was really lost is known by a receipt (`jaxprune.pruning.receipt`). *At most* is the sum of the attributions'
sizes: it bounds the estimate, not the truth. Scores that attribute no objective, such as magnitudes, predict nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune.pruning.receipt import by_layer, by_module
from jaxprune.scoring.objectives import absolute, signed, squared
from jaxprune.scoring.scores import Scores

MEANINGS = {  # criterion -> what its sum over several units is
    "IntegratedGradients": "what the removed units take on the path from closed to open gates",
    "GradientActivation": "first order, at open gates",
    "Taylor": "first order, at open gates",
    "Fisher": "first order, at open gates",
    "LeaveOneOut": "the removed heads one at a time, all else open",
}


class Prediction(NamedTuple):
    """What closing units is predicted to lose, mean over the examples, in units of the objective."""

    units: Mapping[str, np.ndarray] | None  # lost with every unit that goes, 0 where it stays; None: no estimate
    sizes: Mapping[str, np.ndarray] | None  # at most that; None: not known
    everything: float | None  # lost if all scored units go, which is measured; None: not known
    meaning: str  # what the numbers are, or why there are none

    @property
    def total(self) -> float | None:
        """The estimate for all units together."""
        return None if self.units is None else sum(by_layer(self.units).values())

    @property
    def at_most(self) -> float | None:
        """What bounds the size of the estimate."""
        return None if self.sizes is None else sum(by_layer(self.sizes).values())

    def to_json(self) -> dict[str, Any]:
        """As plain values: in total, by layer and by module."""
        found: dict[str, Any] = {"estimate": self.total, "at_most": self.at_most, "everything": self.everything}
        for name, sums in (("layers", by_layer), ("modules", by_module)):
            own = {
                part: {} if units is None else sums(units)
                for part, units in (("estimate", self.units), ("at_most", self.sizes))
            }
            keys = dict.fromkeys([*own["estimate"], *own["at_most"]])
            found[name] = {key: {part: values.get(key) for part, values in own.items()} for key in keys}
        return found | {"meaning": self.meaning}


def predict_loss(scores: Scores, gates: Mapping[str, Any]) -> Prediction:
    """Predicts what closing units loses of the objective that was scored; nothing is computed but sums.

    The signs stand in the file beside the scores, or are the scores' own (`examples=signed`); files of format 2 and
    before have lost them unless they are. If a path starts at `start > 0`, its attributions are of a part of the way,
    and are divided by `1 - start`. How far the estimate would be another one with other examples cannot be told: the
    variances in the file are those of single units, whose attributions vary together.

    Args:
        scores: The scores, of any criterion.
        gates: Those of `select`: 1 where a unit stays, 0 where it goes. A site without scores has no prediction.

    Returns:
        The prediction, without numbers where there is none.

    Raises:
        ValueError: If the gates are not of the sites and units that were scored.
    """
    criterion = scores.header["criterion"]
    wrong = [
        name
        for name, value in scores.values.items()
        if name not in gates or np.asarray(gates[name]).shape != np.asarray(value).shape
    ]
    if wrong:
        raise ValueError(f"the gates do not fit the scores of {', '.join(wrong[:6])}: select by these scores.")
    if criterion["name"] not in MEANINGS:
        return Prediction(None, None, None, f"{criterion['name']} attributes no objective to units")
    if (tokens := criterion.get("tokens", "sum_tokens")) != "sum_tokens":
        return Prediction(None, None, None, f"scores reduced over tokens by {tokens} are no attributions")
    closed = {name: 1.0 - np.asarray(gates[name], np.float64) for name in scores.values}
    share, reduction = part_of_way(scores), criterion.get("examples")

    def lost(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: closed[name] * np.asarray(value, np.float64) / share for name, value in values.items()}

    own = scores.values if reduction == signed.name else scores.signed
    units = None if own is None else lost(own)
    sizes = None
    if reduction == absolute.name:
        sizes = lost(scores.values)
    elif reduction == squared.name:  # the mean size is at most the root of the mean square
        roots = {name: np.sqrt(np.maximum(np.asarray(own, np.float64), 0.0)) for name, own in scores.values.items()}
        sizes = lost(roots)
    meaning = MEANINGS[criterion["name"]]
    if units is None:
        meaning += "; without signs, which this score file has not kept: score again for an estimate"
    return Prediction(units, sizes, _everything(scores), meaning)


def part_of_way(scores: Scores) -> float:
    """The part of the way from a closed to an open gate that attributions are of: less than 1 if a path starts late."""
    start = scores.header["criterion"].get("start", 0.0)
    if not isinstance(start, int | float) or not 0 <= start < 1:
        raise ValueError(f"start in the header of the scores must lie in [0, 1), got {start!r}: score again.")
    return 1.0 - start


def _everything(scores: Scores) -> float | None:
    """What closing all scored units loses: one joint path that starts at closed gates has measured it at its ends."""
    criterion, found = scores.header["criterion"], scores.header["completeness"]
    whole = criterion.get("path") == "joint" and part_of_way(scores) == 1.0
    return float(found["expected"]) if found is not None and whole else None

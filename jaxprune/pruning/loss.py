"""The receipt of a pruning: what of the objective was lost, and which removed unit it was lost with.

Integrated gradients along the straight path from the gates that were selected to all gates open. What they give to the
units that were closed sums to what the objective really lost, example by example, up to the quadrature. The same path
says what the units that stay are worth to what is left.

What a selection is predicted to lose of the objective, from a score file alone: a sum over the units that go.

An *estimate* is the sum of their attributions, with signs. It takes the units' losses to add up, which they do not:
what was really lost is known by a receipt (`jaxprune.pruning.loss`). *At most* is the sum of the attributions'
sizes: it bounds the estimate, not the truth. Scores that attribute no objective, such as magnitudes, predict nothing.

Looks at what a selection really loses, and selects again at the same budget, round by round.

Scores are made where all units are open, or on a path from none; what counts is what a unit is worth beside those that
stay. A receipt knows: along its path, from the selected gates to open ones, it measures the slope of every unit. Where
a removed unit's is larger than a kept one's, the two should change places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.data.batches import pack, usable_rows
from jaxprune.data.tasks import Example, Rows, Task, draw, row_key
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import Model
from jaxprune.models.backward import forward
from jaxprune.scoring.activations import calibration_means, zero
from jaxprune.scoring.attribution import Criterion, Measured, gauss_legendre, quadrature
from jaxprune.scoring.objectives import (
    ExampleReduction,
    Labels,
    Objective,
    absolute,
    gold,
    key_or_default,
    questions,
    signed,
    squared,
    value_and_cotangent,
    weigh,
)
from jaxprune.scoring.run import score_batches
from jaxprune.scoring.scores import Scores
from jaxprune.units import Gates, Intervention, Params, check_gates

WORTH = "worth:"  # before a site's name: what all its units are worth along the path


class Receipt(NamedTuple):
    """What a pruning lost, as means over the examples, in units of the objective."""

    units: Mapping[str, np.ndarray]  # site name to [units]: lost with this unit; 0 where it is open
    lost: float  # objective of the open model - objective of the pruned one
    found: float  # the sum of `units`
    error: float  # the mean over the examples of |found - lost|
    rows: tuple[str, ...]  # the keys of the examples
    worth: Mapping[str, np.ndarray]  # [units], open ones too: mean f(slope along the path), as scores are reduced

    def modules(self) -> dict[str, float]:
        """Lost with each module: `"3.ffn"` to the sum of its units."""
        return by_module(self.units)

    def layers(self) -> dict[str, float]:
        """Lost with each layer."""
        return by_layer(self.units)


def by_module(units: Mapping[str, Any]) -> dict[str, float]:
    """Sums over the units of each module: `"3.ffn"`, `"decoder.3.cross"`."""
    return _sums(units, 1)


def by_layer(units: Mapping[str, Any]) -> dict[str, float]:
    """Sums over the units of each layer: `"3"`, `"decoder.3"`."""
    return _sums(units, 2)


def _sums(units: Mapping[str, Any], parts: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for site, values in units.items():
        name = ".".join(site.split(".")[:-parts])
        found[name] = found.get(name, 0.0) + float(np.asarray(values).sum())
    return found


class _Lost(Criterion):
    """A criterion that attributes what selected gates lose, example by example, with its sign.

    Under the site's name stands what was lost with its closed units, under `worth:SITE` the slopes of all its units,
    reduced as scores are.
    """

    examples = signed

    def __init__(
        self,
        selected: Gates,
        nodes: int,
        objective: Objective | None,
        labels: Labels,
        *,
        reduction: ExampleReduction = absolute,
        means: Gates | None = None,
    ) -> None:
        if reduction.largest:
            raise ValueError(
                f"reduction={reduction.name} is no mean over the examples, and a receipt is: use absolute, signed or "
                "squared."
            )
        self.selected, self.objective, self.labels, self.reduction = selected, objective, labels, reduction
        self.closed = calibration_means if means else zero
        self.points, self.weights = quadrature(gauss_legendre, nodes)

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Mapping[str, Any],
        *,
        head: str | None = None,
        key: Array | None = None,
        means: Gates | None = None,
    ) -> Measured:
        """Attributes a batch; see `Criterion`."""
        chosen = model.head(head)
        objective = self.objective_of(chosen)
        run = partial(forward, model, params, intervention=Intervention(means=means), head=chosen.name)
        slopes: list[Gates] = []
        shares: tuple[Array, ...] = ()
        expected = jnp.zeros(())
        for own in questions(model, params, batch, self.labels, chosen.regression, key, run):
            rows = own.batch["input_ids"]
            pruned = run(own.batch, intervention=Intervention(_between(self.selected, 0.0, rows), means))[0]
            for target, share in zip(own.targets, own.weights, strict=True):
                after, before = (value_and_cotangent(objective, it, target)[0] for it in (own.logits, pruned))
                expected = expected + share * (after - before)
            totals: list[Gates] = [{name: jnp.zeros(()) for name in self.selected} for _ in own.targets]
            for point, weight in zip(self.points, self.weights, strict=True):
                gates = _between(self.selected, point, rows)
                logits, pull = run(own.batch, intervention=Intervention(gates, means))
                for i, target in enumerate(own.targets):
                    totals[i] = _more(totals[i], pull(value_and_cotangent(objective, logits, target)[1])[0], weight)
                del logits, pull  # before the next node needs the memory
            slopes += totals
            shares += own.weights
        lost = _closed_alone(weigh(signed.each, slopes, shares), self.selected)
        found = jnp.stack([value.sum(1) for value in lost.values()]).sum(0)
        sums = {"expected": expected, "found": found, "error": jnp.abs(found - expected), "size": jnp.abs(expected)}
        worth = weigh(self.reduction.each, slopes, shares)
        return Measured(lost | {f"{WORTH}{name}": value for name, value in worth.items()}, sums)


def loss_receipt(
    model: Model,
    params: Params,
    task: Task,
    gates: Mapping[str, Any],
    *,
    examples: int | Sequence[Example] = 128,
    key: Array | int | None = None,
    nodes: int = 16,
    objective: Objective | None = None,
    labels: Labels = gold,
    reduction: ExampleReduction = absolute,
    means: Gates | None = None,
    head: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Receipt:
    """Says what a selection loses, and with which unit.

    Args:
        model: The architecture.
        params: The dense parameters.
        task: The task; its calibration rows are drawn from.
        gates: Those of `select`, site name to `[units]`: 1 where a unit stays, 0 where it goes.
        examples: How many to draw, or the examples themselves.
        key: A seed or a `jax.random.key` for the draw; None is 0.
        nodes: Quadrature nodes; each costs one forward and one backward pass.
        objective: What was to be kept; None is the probability, or the negative squared error in a regression.
        labels: For which labels.
        reduction: How the examples become one number in `worth`: as in the scores that it is to be compared with.
        means: What closed units are replaced by; None is zero.
        head: The task head; by default the one of the task's name, else the only one.
        batch_size: Examples in a batch.
        max_length: Tokens to which a text is cut; by default 128, of spans 384, or the most that the model reads.
        progress: Called with the number of batches that are finished, and of all.

    Returns:
        The receipt.

    Raises:
        ValueError: If the gates do not fit the model, no unit is closed, there are too few examples, or the reduction
            is no mean over them.
    """
    selected = {name: jnp.asarray(gate, jnp.float32) for name, gate in gates.items()}
    check_gates(model, params, selected)
    if all(bool((gate == 1.0).all()) for gate in selected.values()):
        raise ValueError("all gates are open: nothing is lost, so there is nothing to attribute.")
    key = jax.random.key(key) if isinstance(key, int) else key_or_default(key)
    head = fitting_head(model, task, head)
    given = tuple(examples) if isinstance(examples, Sequence) else examples
    usable = usable_rows(model, task, Rows(examples=given, max_length=max_length))
    rows = given if isinstance(given, tuple) else draw(usable.task, given, key)
    encoded = usable.encode(rows)
    values, sums, _ = score_batches(
        model,
        params,
        pack(encoded, batch_size=batch_size),
        _Lost(selected, nodes, objective, labels, reduction=reduction, means=means),
        head=head,
        key=key,
        means=means,
        progress=progress,
    )
    if sums is None:
        raise ValueError("there are no examples to attribute.")
    expected, found, error = (float(sums[name] or 0.0) for name in ("expected", "found", "error"))
    arrays = {name: np.asarray(value) for name, value in values.items()}
    units, worth = ({name: arrays[f"{part}{name}"] for name in selected} for part in ("", WORTH))
    return Receipt(units, expected, found, error, tuple(sorted(map(row_key, rows))), worth)


@jax.jit
def _between(selected: Gates, alpha: Any, rows: Array) -> Gates:
    """The gates at a point of the path, `[b, units]`."""
    return {name: jnp.tile(gate + alpha * (1.0 - gate), (rows.shape[0], 1)) for name, gate in selected.items()}


@jax.jit
def _more(total: Gates, slopes: Gates, weight: Any) -> Gates:
    """Adds the weighted slopes of one node."""
    return {name: total[name] + weight * slopes[name] for name in total}


@jax.jit
def _closed_alone(slopes: Gates, selected: Gates) -> Gates:
    """Each slope times the way that its gate goes: 0 where it is open."""
    return {name: slopes[name] * (1.0 - gate) for name, gate in selected.items()}


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
    if (meaning := scores.properties["meaning"]) is None:
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


Choose = Callable[[dict[str, np.ndarray]], Gates]  # scores by site -> gates, such as a partial of `select`
Account = Callable[[Gates], Receipt]  # gates -> what they lose, such as a partial of `loss_receipt`


class Round(NamedTuple):
    """One selection and what it loses."""

    gates: Gates
    receipt: Receipt
    changed: int  # units that are closed here and were open in the round before, or the other way round


class Reselection(NamedTuple):
    """All rounds, the first selection among them."""

    rounds: tuple[Round, ...]
    best: int  # the round that loses least, the first of equals

    @property
    def gates(self) -> Gates:
        """The selection that loses least."""
        return self.rounds[self.best].gates

    @property
    def receipt(self) -> Receipt:
        """And what it loses."""
        return self.rounds[self.best].receipt


def reselect(
    scores: Mapping[str, Any],
    choose: Choose,
    account: Account,
    *,
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Reselection:
    """Selects, looks at the true loss, merges what it shows with the scores, and selects again.

    The scores of round `t` are the mean of the first ones and of what the units were worth in the `t` receipts so far.
    It ends after `rounds`, or as soon as a selection has occurred before. The result never loses more than the first
    selection, on the rows of the account; that is no promise for other rows.

    Args:
        scores: The first scores, in units of the objective, reduced over the examples as the receipts' `worth` is.
        choose: Selects by scores, always at the same budget.
        account: Makes the receipt of a selection, always on the same rows.
        rounds: The most re-selections.
        progress: Called with the number of receipts that are made, and the most there can be.

    Returns:
        All rounds, and which of them lost least.

    Raises:
        ValueError: If `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    sums = {name: np.asarray(value, np.float64) for name, value in scores.items()}
    done: list[Round] = []
    while len(done) <= rounds:
        gates = choose({name: total / (len(done) + 1) for name, total in sums.items()})
        if any(_changed(gates, own.gates) == 0 for own in done):
            break
        receipt = account(gates)
        done.append(Round(gates, receipt, _changed(gates, done[-1].gates) if done else 0))
        if progress is not None:
            progress(len(done), rounds + 1)
        sums = {name: total + np.asarray(receipt.worth[name], np.float64) for name, total in sums.items()}
    if progress is not None:
        progress(rounds + 1, rounds + 1)
    return Reselection(tuple(done), min(range(len(done)), key=lambda i: done[i].receipt.lost))


def _changed(gates: Gates, others: Gates) -> int:
    """Units whose gates differ."""
    return sum(int((np.asarray(gate) != np.asarray(others[name])).sum()) for name, gate in gates.items())

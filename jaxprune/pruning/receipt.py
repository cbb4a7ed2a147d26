"""The receipt of a pruning: what of the objective was lost, and which removed unit it was lost with.

Integrated gradients along the straight path from the gates that were selected to all gates open. What they give to the
units that were closed sums to what the objective really lost, example by example, up to the quadrature. The same path
says what the units that stay are worth to what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.data.batches import encode, pack, within_reach
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Example, Task, draw, row_key
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import Model
from jaxprune.models.backward import forward
from jaxprune.scoring.activations import calibration_means, zero
from jaxprune.scoring.attribution import Measured
from jaxprune.scoring.integration import gauss_legendre, quadrature
from jaxprune.scoring.objectives import (
    ExampleReduction,
    Labels,
    Objective,
    absolute,
    gold,
    objective_for,
    signed,
    value_and_cotangent,
    weigh,
)
from jaxprune.scoring.questions import key_or_default, questions
from jaxprune.scoring.run import score_batches
from jaxprune.units import Gates, Params, check_gates

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


class _Lost:
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
        objective = objective_for(self.objective, chosen)
        run = partial(forward, model, params, head=chosen.name, means=means)
        slopes: list[Gates] = []
        shares: tuple[Array, ...] = ()
        expected = jnp.zeros(())
        for own in questions(model, params, batch, self.labels, chosen.regression, key, run):
            rows = own.batch["input_ids"]
            pruned = run(own.batch, _between(self.selected, 0.0, rows))[0]
            for target, share in zip(own.targets, own.weights, strict=True):
                after, before = (value_and_cotangent(objective, it, target)[0] for it in (own.logits, pruned))
                expected = expected + share * (after - before)
            totals: list[Gates] = [{name: jnp.zeros(()) for name in self.selected} for _ in own.targets]
            for point, weight in zip(self.points, self.weights, strict=True):
                logits, pull = run(own.batch, _between(self.selected, point, rows))
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
    task, _ = within_reach(model, task, split="calibration", max_length=max_length)
    rows = tuple(examples) if isinstance(examples, Sequence) else draw(task, examples, key)
    encoded = encode(model, rows, max_length=max_length, prompt=prompt_of(model, task))
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

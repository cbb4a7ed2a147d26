"""The receipt of a pruning: what of the objective was lost, and which removed unit it was lost with.

Integrated gradients along the straight path from the gates that were selected to all gates open. What they give to the
units that were closed sums to what the objective really lost, example by example, up to the quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.attribution import Measured, answers_of, examples_of, key_or_default
from jaxprune.batches import encode, pack, within_reach
from jaxprune.evaluation import fitting_head
from jaxprune.gates import Gates, Params, check_gates
from jaxprune.integration import gauss_legendre, quadrature
from jaxprune.models import Model, model_inputs
from jaxprune.models.backward import forward
from jaxprune.objectives import Labels, Objective, find_targets, gold, objective_for, signed, value_and_cotangent
from jaxprune.prompts import prompt_of
from jaxprune.scoring import score_batches
from jaxprune.tasks import Example, Task, draw, row_key


class Receipt(NamedTuple):
    """What a pruning lost, as means over the examples, in units of the objective."""

    units: Mapping[str, np.ndarray]  # site name to [units]: lost with this unit; 0 where it is open
    lost: float  # objective of the open model - objective of the pruned one
    found: float  # the sum of `units`
    error: float  # the mean over the examples of |found - lost|
    rows: tuple[str, ...]  # the keys of the examples

    def modules(self) -> dict[str, float]:
        """Lost with each module: `"3.ffn"` to the sum of its units."""
        found: dict[str, float] = {}
        for site, values in self.units.items():
            name = site.rpartition(".")[0]
            found[name] = found.get(name, 0.0) + float(values.sum())
        return found

    def layers(self) -> dict[str, float]:
        """Lost with each layer."""
        found: dict[str, float] = {}
        for site, values in self.units.items():
            name = ".".join(site.split(".")[:-2])
            found[name] = found.get(name, 0.0) + float(values.sum())
        return found


class _Lost:
    """A criterion that attributes what selected gates lose, example by example, with its sign."""

    examples = signed

    def __init__(self, selected: Gates, nodes: int, objective: Objective | None, labels: Labels) -> None:
        self.selected, self.objective, self.labels = selected, objective, labels
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
        given = examples_of(batch, self.labels, chosen.regression)
        if model.writes_text:
            parts = [
                (answer.batch, (answer.target,), (answer.weight,))
                for answer in answers_of(model, params, batch, self.labels, given, key)
            ]
        else:
            inputs = model_inputs(model, params, batch)
            logits = forward(model, params, inputs, head=chosen.name)[0]
            parts = [(inputs, *find_targets(self.labels, logits, *given, key_or_default(key)))]
        lost: Gates = {name: jnp.zeros(()) for name in self.selected}
        expected = found = jnp.zeros(())
        for inputs, targets, shares in parts:
            gates = [_between(self.selected, alpha, inputs["input_ids"]) for alpha in (0.0, 1.0)]
            ends = [forward(model, params, inputs, own, head=chosen.name, means=means)[0] for own in gates]
            for target, share in zip(targets, shares, strict=True):
                before, after = (value_and_cotangent(objective, logits, target)[0] for logits in ends)
                expected = expected + share * (after - before)
            for point, weight in zip(self.points, self.weights, strict=True):
                own = _between(self.selected, point, inputs["input_ids"])
                logits, pull = forward(model, params, inputs, own, head=chosen.name, means=means)
                for target, share in zip(targets, shares, strict=True):
                    slopes = pull(value_and_cotangent(objective, logits, target)[1])[0]
                    lost = _more(lost, slopes, self.selected, weight * share)
                del logits, pull  # before the next node needs the memory
        found = jnp.stack([value.sum(1) for value in lost.values()]).sum(0)
        sums = {"expected": expected, "found": found, "error": jnp.abs(found - expected), "size": jnp.abs(expected)}
        return Measured(lost, sums)


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
        means: What closed units are replaced by; None is zero.
        head: The task head; by default the one of the task's name, else the only one.
        batch_size: Examples in a batch.
        max_length: Tokens to which a text is cut; by default 128, of spans 384, or the most that the model reads.
        progress: Called with the number of batches that are finished, and of all.

    Returns:
        The receipt.

    Raises:
        ValueError: If the gates do not fit the model, no unit is closed, or there are too few examples.
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
        _Lost(selected, nodes, objective, labels),
        head=head,
        key=key,
        means=means,
        progress=progress,
    )
    if sums is None:
        raise ValueError("there are no examples to attribute.")
    expected, found, error = (float(sums[name] or 0.0) for name in ("expected", "found", "error"))
    units = {name: np.asarray(value) for name, value in values.items()}
    return Receipt(units, expected, found, error, tuple(sorted(map(row_key, rows))))


@jax.jit
def _between(selected: Gates, alpha: Any, rows: Array) -> Gates:
    """The gates at a point of the path, `[b, units]`."""
    return {name: jnp.tile(gate + alpha * (1.0 - gate), (rows.shape[0], 1)) for name, gate in selected.items()}


@jax.jit
def _more(lost: Gates, slopes: Gates, selected: Gates, weight: Array) -> Gates:
    """Adds the weighted slopes of one node, for the units that are closed."""
    return {name: lost[name] + weight[:, None] * slopes[name] * (1.0 - selected[name]) for name in lost}

"""What really changes when single units are removed: the truth that scores stand for, at one forward pass per unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.models import Model, advance, model_layers, repeat_rows
from jaxprune.models.backward import Prefix, forward
from jaxprune.scoring.activations import Closed, zero
from jaxprune.scoring.attribution import Measured, open_prefixes, reduce
from jaxprune.scoring.objectives import (
    ExampleReduction,
    Labels,
    Objective,
    absolute,
    gold,
    objective_for,
    value_and_cotangent,
)
from jaxprune.scoring.questions import Question, questions
from jaxprune.units import KINDS, Gates, Params, sites, widths


@dataclass(frozen=True, kw_only=True, eq=False)
class Removal:
    """`s_i = f(O(all open) - O(unit i closed))` of chosen units: a criterion whose sites have these units alone.

    A unit costs a forward pass from its layer up. Which units they are is an argument of the compiled programs.
    """

    units: Mapping[str, Sequence[int]]  # site name to the units to close, one at a time
    chunk: int = 1  # units closed together, each in rows of its own; sets the memory, not the result
    objective: Objective | None = None  # None: probability, or negative_squared_error in a regression
    labels: Labels = gold
    examples: ExampleReduction = absolute  # f, and the mean or the maximum over the examples
    closed: Closed = zero

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}.")

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
        """Scores a batch; see `Criterion`.

        Raises:
            ValueError: If there is no such site or unit.
        """
        self._check(model, params)
        chosen = model.head(head)
        objective = objective_for(self.objective, chosen)
        run = partial(forward, model, params, head=chosen.name)
        found, weights = [], ()
        for own in questions(model, params, batch, self.labels, chosen.regression, key, run):
            found += self._losses(model, params, own, objective, chosen.name, means)
            weights += own.weights
        return reduce(self.examples, found, weights)

    def _check(self, model: Model, params: Params) -> None:
        have = widths(model.axes, params, KINDS)
        for name, units in self.units.items():
            if name not in have:
                raise ValueError(f"{name} is not a site of the model; its sites are such as {next(iter(have))}.")
            if wrong := [unit for unit in units if not 0 <= unit < have[name]]:
                raise ValueError(f"{name} has the units 0 to {have[name] - 1}, got {wrong[0]}.")

    def _losses(
        self, model: Model, params: Params, asked: Question, objective: Objective, head: str, means: Gates | None
    ) -> list[Gates]:
        """What every target loses with each unit."""
        batch, targets = asked.batch, asked.targets
        ends = [value_and_cotangent(objective, asked.logits, target)[0] for target in targets]
        places = [site for site in sites(model.axes, params, KINDS) if site.name in self.units]
        prefixes = open_prefixes(model, params, batch, {site.layer_name for site in places})
        have = widths(model.axes, params, KINDS)
        found: list[Gates] = [{} for _ in targets]
        for site in places:
            units = np.asarray(self.units[site.name], np.int32)
            together = max(1, min(self.chunk, len(units)))
            prefix = prefixes[site.layer_name]
            rows, state, aims = repeat_rows((batch, prefix.hidden, targets), together)
            lost: list[list[Array]] = [[] for _ in targets]
            for first in range(0, len(units), together):
                some = np.pad(units[first : first + together], (0, max(0, first + together - len(units))), mode="edge")
                gates = {site.name: _all_but(have[site.name], some, batch["input_ids"])}
                logits = _finish(model, params, rows, Prefix(state, prefix.layer), gates, means, head)
                for i, aim in enumerate(aims):
                    lost[i].append(_lost(ends[i], value_and_cotangent(objective, logits, aim)[0]))
            for i, parts in enumerate(lost):
                empty = [jnp.zeros((ends[i].shape[0], 0), jnp.float32)]
                found[i][site.name] = jnp.concatenate(parts or empty, axis=1)[:, : len(units)]
        return found


def _finish(
    model: Model,
    params: Params,
    batch: dict[str, Array],
    prefix: Prefix,
    gates: Gates,
    means: Gates | None,
    head: str,
) -> Float[Array, "b l"]:
    """The logits, from a prefix on, without keeping anything for a backward pass."""
    layers = model_layers(model, params)
    state = advance(model, layers[prefix.layer :], batch, prefix.hidden, gates, means)
    return forward(model, params, batch, head=head, prefix=Prefix(state, len(layers)))[0]


@partial(jax.jit, static_argnums=0)
def _all_but(width: int, closed: Int[Array, " k"], rows: Array) -> Float[Array, "bk n"]:
    """For every row: gates with the first of some units closed, then with the next one closed, and so on."""
    gates = jnp.asarray(closed)[:, None] != jnp.arange(width)
    return jnp.tile(gates.astype(jnp.float32), (rows.shape[0], 1))


@jax.jit
def _lost(end: Float[Array, " b"], closed: Float[Array, " bk"]) -> Float[Array, "b k"]:
    return end[:, None] - closed.reshape(end.shape[0], -1)

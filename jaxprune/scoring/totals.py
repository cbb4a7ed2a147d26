"""What a scoring run adds up on the device, batch by batch, and the file that keeps it while the run goes on.

The totals have as many numbers as there are units, times six, however many examples there are. No example is looked at
twice: the variance over the examples and the scores of their two halves come from the same pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.checkpoints.files import write_atomic
from jaxprune.checkpoints.tensors import TensorFile, write_tensors
from jaxprune.scoring.attribution import Measured
from jaxprune.scoring.scores import with_relative
from jaxprune.units import Gates

PARTIAL = "jaxprune_partial_scores"


class Totals(NamedTuple):
    """What the batches so far add up to. Of largest scores there are neither deviations nor halves."""

    scores: Gates  # [units]: sums, or the largest
    completeness: dict[str, Float[Array, ""]]
    weight: Float[Array, ""]  # examples
    deviations: Gates  # [units]: sums of squared deviations from the mean
    halves: Gates  # [2, units]: the sums of each half
    counts: Float[Array, " halves"]  # examples in each half
    signed: Mapping[str, Array] = {}  # [units]: sums of attributions with their signs


def nothing(largest: bool, found: Measured) -> Totals:
    """The totals of no batch, of the sites and units that were found in one."""
    start = -jnp.inf if largest else 0.0
    units = {name: value.shape[1] for name, value in found.scores.items()}
    spread = {} if largest else units
    return Totals(
        {name: jnp.full(count, start, jnp.float32) for name, count in units.items()},
        {name: jnp.zeros(()) for name in found.completeness},
        jnp.zeros(()),
        {name: jnp.zeros(count) for name, count in spread.items()},
        {name: jnp.zeros((2, count)) for name, count in spread.items()},
        jnp.zeros(2),
        {name: jnp.zeros(value.shape[1]) for name, value in found.signed.items()},
    )


@partial(jax.jit, static_argnums=0)
def add(
    largest: bool, totals: Totals, found: Measured, weight: Float[Array, " b"], second: Float[Array, " b"]
) -> Totals:
    """Adds a batch.

    Deviations of the batch are from its own mean, and combine with those before by the distance of the two means, so
    that nothing large is subtracted from anything large.

    Args:
        largest: Whether scores are the largest over the examples.
        totals: Of the batches before.
        found: What the criterion found.
        weight: 1 for an example, 0 for padding.
        second: 1 where the example is of the second half, 0 where it is of the first.

    References:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    real = weight[:, None] > 0
    shares = jnp.stack([1.0 - second, second]) * weight
    count, before = weight.sum(), totals.weight

    def sum_up(total: Array, rows: Array) -> Array:
        return total + jnp.where(real, weight[:, None] * rows, 0.0).sum(0)

    def combine(total: Array, rows: Array) -> Array:
        return jnp.maximum(total, jnp.where(real, rows, -jnp.inf).max(0)) if largest else sum_up(total, rows)

    def deviate(deviations: Array, total: Array, rows: Array) -> Array:
        mean = jnp.where(real, weight[:, None] * rows, 0.0).sum(0) / jnp.maximum(count, 1.0)
        own = jnp.where(real, weight[:, None] * jnp.square(rows - mean), 0.0).sum(0)
        apart = mean - total / jnp.maximum(before, 1.0)
        return deviations + own + jnp.square(apart) * (before * count / jnp.maximum(before + count, 1.0))

    def part(sums: Array, rows: Array) -> Array:
        return sums + jnp.stack([jnp.where(real, share[:, None] * rows, 0.0).sum(0) for share in shares])

    return Totals(
        {name: combine(total, found.scores[name]) for name, total in totals.scores.items()},
        {name: total + (weight * found.completeness[name]).sum() for name, total in totals.completeness.items()},
        before + count,
        {name: deviate(own, totals.scores[name], found.scores[name]) for name, own in totals.deviations.items()},
        {name: part(sums, found.scores[name]) for name, sums in totals.halves.items()},
        totals.counts + shares.sum(1),
        {name: sum_up(total, found.signed[name]) for name, total in totals.signed.items()},
    )


def finish(largest: bool, totals: Totals) -> Gates:
    """The scores, `[units]`: means over the examples, or the largest.

    Raises:
        ValueError: If a score is not finite.
    """
    count = jnp.ones(()) if largest else totals.weight
    values = {name: total / count for name, total in totals.scores.items()}
    broken = [name for name, value in values.items() if not np.isfinite(np.asarray(value)).all()]
    if broken:
        raise ValueError(f"scores of {', '.join(broken)} are not finite: does the model give finite logits?")
    return values


def variance_of(totals: Totals) -> Gates | None:
    """The variance of a unit's score over the examples, `[units]`, of all of which these are a sample.

    None of fewer than two examples, of largest scores, and where a square is too large for float32.
    """
    count = float(totals.weight)
    if not totals.deviations or count < 2:
        return None
    found = {name: own / (count - 1) for name, own in totals.deviations.items()}
    return found if all(np.isfinite(np.asarray(own)).all() for own in found.values()) else None


def halves_of(totals: Totals) -> Gates | None:
    """The scores of each half of the examples, `[2, units]`; 0 of a half without examples. None of largest scores."""
    counts = jnp.maximum(totals.counts, 1.0)[:, None]
    return {name: sums / counts for name, sums in totals.halves.items()} or None


def signed_of(totals: Totals) -> Gates | None:
    """The mean attribution of every unit with its sign, `[units]`; None where scores are it, or are none."""
    return {name: total / totals.weight for name, total in totals.signed.items()} or None


def completeness_of(totals: Totals) -> dict[str, float | None] | None:
    """The mean over the examples, see `with_relative`; None of a criterion that has none."""
    if not totals.completeness:
        return None
    return with_relative({name: float(total / totals.weight) for name, total in totals.completeness.items()})


class TotalsFile:
    """The file that keeps the running totals of one run."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))

    def save(self, totals: Totals, done: int) -> None:
        """Writes the totals after `done` batches, atomically."""
        arrays = {}
        for field, value in totals._asdict().items():
            named = (
                {f"{field}:{name}": own for name, own in value.items()} if isinstance(value, dict) else {field: value}
            )
            arrays |= {name: np.asarray(own) for name, own in named.items()}
        metadata = {PARTIAL: json.dumps({"settings": self.settings, "done": done})}
        write_atomic(self.path, partial(write_tensors, tensors=arrays, metadata=metadata))

    def load(self) -> tuple[Totals | None, int]:
        """The totals and the number of batches in them; none if there is no file.

        Raises:
            ValueError: If the file is damaged, something else, or belongs to a run with other settings.
        """
        if not self.path.exists():
            return None, 0
        with TensorFile(self.path) as file:
            if PARTIAL not in file.metadata:
                raise ValueError(f"{self.path} does not hold an interrupted scoring run: name another file.")
            try:
                found = json.loads(file.metadata[PARTIAL])
                settings, done = dict(found["settings"]), int(found["done"])
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{self.path} is damaged ({error!r}): remove it to start anew.") from error
            other = [name for name, value in self.settings.items() if settings.get(name) != value]
            if other:
                raise ValueError(
                    f"{self.path} was begun with other settings ({', '.join(other)}): remove it, or name another file."
                )
            arrays = {name: jnp.asarray(file.read(name)) for name in file.entries}
        parts: dict[str, Any] = {name: {} for name in Totals._fields}
        for name, array in arrays.items():
            field, _, site = name.partition(":")
            if field not in parts:
                raise ValueError(f"{self.path} is damaged (it holds {name!r}): remove it to start anew.")
            parts[field] = {**parts[field], site: array} if site else array
        if missing := [name for name in ("weight", "counts") if isinstance(parts[name], dict)]:
            raise ValueError(f"{self.path} is damaged (it has no {' and no '.join(missing)}): remove it to start anew.")
        return Totals(**parts), done

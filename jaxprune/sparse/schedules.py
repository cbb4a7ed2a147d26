"""Pruning schedules: the steps of a training at which weights become zero, and how many are zero after each.

*Sparsity* is the fraction of weights that are zero. A *step* is one update of the optimizer; the first has number 1. A
schedule holds after its steps: with `cubic_schedule(0.95, 1000)`, 95 % of the weights are zero after 1000 updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps at which weights are pruned, and the sparsity after each of them.

    Both are numbers, not functions of a traced step, so that the counts are exact: they are taken in float64 on the
    host, `floor(sparsity * size + 1/2)` weights of a matrix.
    """

    steps: tuple[int, ...]  # rising; the first update is step 1
    sparsities: tuple[float, ...]  # fractions in [0, 1), never falling: a pruned weight stays pruned

    def __post_init__(self):
        if not self.steps or len(self.steps) != len(self.sparsities):
            raise ValueError(
                f"steps and sparsities must be as many, at least one, got {len(self.steps)} and {len(self.sparsities)}."
            )
        if self.steps[0] < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must rise from at least 1, got {self.steps}.")
        for sparsity in self.sparsities:
            check_sparsity("sparsities", sparsity)
        if list(self.sparsities) != sorted(self.sparsities):
            raise ValueError(f"sparsities must not fall, got {self.sparsities}.")

    @property
    def final(self) -> float:
        """The sparsity after the last pruning."""
        return self.sparsities[-1]

    def done(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
        """The number of prunings at `step` or before it."""
        return (jnp.asarray(self.steps, jnp.int32) <= step).sum(dtype=jnp.int32)

    def due(self, step: Int[Array, ""] | int) -> Bool[Array, ""]:
        """True if weights are pruned at `step`."""
        return (jnp.asarray(self.steps, jnp.int32) == step).any()

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The sparsity after `step` updates, float32; 0 before the first pruning. The step may be traced."""
        return jnp.asarray((0.0, *self.sparsities), jnp.float32)[self.done(step)]


def cubic_schedule(final: float, steps: int, *, start: int = 0, initial: float = 0.0, prunings: int = 100) -> Schedule:
    """Prunes fast at first, when much is redundant, and ever more slowly: `s = f + (i - f)(1 - n/N)^3`.

    Here `f` is `final`, `i` is `initial`, and `n` of the `N = steps - start` updates after `start` are done.

    Args:
        final: Sparsity after the last pruning, in [0, 1).
        steps: The update at which it is reached.
        start: Updates before which nothing is pruned.
        initial: Sparsity from which the curve rises. Nothing is pruned at `start` itself.
        prunings: How often weights are pruned, at even distances (rounded down to whole updates), the last time at
            `steps`. If there are fewer updates, at each of them.

    Raises:
        ValueError: If a sparsity is outside [0, 1), they fall, `start` is not within `steps`, or nothing is to be done.

    References:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, arXiv 1710.01878, eq. 1; with `start` and `initial` 0 and 100
        prunings: Xu et al., Rethinking Network Pruning, 2021, arXiv 2104.08682.
    """
    return _curve(lambda left: final + (initial - final) * left**3, final, steps, start, initial, prunings)


def linear_schedule(final: float, steps: int, *, start: int = 0, initial: float = 0.0, prunings: int = 100) -> Schedule:
    """Prunes as much every time: `s = f + (i - f)(1 - n/N)`; arguments and errors are those of `cubic_schedule`."""
    return _curve(lambda left: final + (initial - final) * left, final, steps, start, initial, prunings)


def one_shot_schedule(final: float, step: int) -> Schedule:
    """Prunes once, at one update.

    Raises:
        ValueError: If `final` is outside [0, 1) or `step` is less than 1.
    """
    return Schedule(steps=(step,), sparsities=(final,))


def check_sparsity(name: str, sparsity: float) -> None:
    """Refuses a fraction of zeros outside [0, 1): that is none, or leaves nothing."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"{name} must lie in [0, 1), the fraction of weights that become zero; got {sparsity}.")


def _curve(
    sparsity_of: Callable[[float], float], final: float, steps: int, start: int, initial: float, prunings: int
) -> Schedule:
    check_sparsity("final", final)
    check_sparsity("initial", initial)
    if initial > final:
        raise ValueError(f"initial must be at most final ({final}), got {initial}.")
    if not 0 <= start < steps:
        raise ValueError(f"start must be at least 0 and less than steps ({steps}), got {start}.")
    if prunings < 1:
        raise ValueError(f"prunings must be at least 1, got {prunings}.")
    span, times = steps - start, min(prunings, steps - start)
    after = [span * time // times for time in range(1, times + 1)]  # updates since the start
    # The last is `final` itself: whatever rounding does to the curve, it ends there and is never above it
    sparsities = [min(sparsity_of(1 - done / span), final) for done in after[:-1]]
    return Schedule(steps=tuple(start + done for done in after), sparsities=(*sparsities, final))

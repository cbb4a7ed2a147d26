"""Scores of single weights: by their magnitude, by their movement, by the loss to second order.

The criteria of `jaxprune.scoring` score whole units; these score every weight of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float


class WeightCriterion(Protocol):
    """A score for weights: a frozen dataclass, called with float32 arrays in the shape of a parameter.

    Higher means more needed. Gradients are those of the loss, as the optimizer gets them.
    """

    accumulates: ClassVar[bool]  # whether there is a total of the gradients; it starts at zero

    def add(
        self, total: Float[Array, ...], weight: Float[Array, ...], gradient: Float[Array, ...]
    ) -> Float[Array, ...]:
        """The total after another step, with the weights at which the gradient was taken."""
        ...

    def __call__(self, weight: Float[Array, ...], total: Float[Array, ...] | None) -> Float[Array, ...]:
        """The scores; the total is None if nothing is accumulated."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightMagnitude:
    """`|w|`: the smallest weights go first.

    References:
        Han, Pool, Tran and Dally, Learning both Weights and Connections, 2015, arXiv 1506.02626.
    """

    accumulates: ClassVar[bool] = False

    def add(self, total: Array, weight: Array, gradient: Array) -> Array:
        """Adds nothing."""
        return total

    def __call__(self, weight: Array, total: Array | None) -> Array:
        """The absolute values."""
        return jnp.abs(weight)


@dataclass(frozen=True, kw_only=True)
class _Accumulating:
    """A criterion with a total that decays."""

    decay: float = 1.0  # of the total, per step; 1: all steps count alike
    accumulates: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}.")


@dataclass(frozen=True, kw_only=True)
class WeightMovement(_Accumulating):
    """`-Σ w ∂loss/∂w` over the steps: weights that training moves towards zero go first. Signed.

    The paper also lets gradients through to weights that are zero, so that they may come back; here they do not.

    References:
        Sanh, Wolf and Rush, Movement Pruning, 2020, arXiv 2005.07683, eq. 3, up to the learning rate.
    """

    def add(self, total: Array, weight: Array, gradient: Array) -> Array:
        """Adds one step."""
        return self.decay * total - weight * gradient

    def __call__(self, weight: Array, total: Array | None) -> Array:
        """The total."""
        return jnp.zeros_like(weight) if total is None else total


@dataclass(frozen=True, kw_only=True)
class WeightFisher(_Accumulating):
    """`w^2 E[g^2] / 2`: by how much the loss rises without the weight, to second order and weight by weight.

    The diagonal of the Hessian is approximated by the mean square of the gradients that the optimizer gets. These are
    means over a batch, so it is not the Fisher information of single examples, and it is smaller the larger the batch.
    The mean is exponential and not corrected for its start: that is one factor for all weights.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, 1989, eq. 5 (the saliency); Theis et al., Faster gaze prediction
        with dense networks and Fisher pruning, 2018, arXiv 1801.05787 (squared gradients in place of the Hessian).
    """

    decay: float = 0.999

    def add(self, total: Array, weight: Array, gradient: Array) -> Array:
        """Adds one step; with a decay of 1 it is a sum."""
        return self.decay * total + (1.0 - self.decay if self.decay < 1 else 1.0) * jnp.square(gradient)

    def __call__(self, weight: Array, total: Array | None) -> Array:
        """The saliencies."""
        return jnp.zeros_like(weight) if total is None else 0.5 * jnp.square(weight) * total


def add_step(criterion: WeightCriterion, total: Array, weight: Array, gradient: Array) -> Array:
    """The criterion's total after a step, in float32."""
    return criterion.add(total, weight.astype(jnp.float32), gradient.astype(jnp.float32))

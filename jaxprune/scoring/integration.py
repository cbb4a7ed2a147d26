"""Integrated gradients for any function of gates: quadrature rules, and the path integral of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.units import Gates

Points: TypeAlias = tuple[np.ndarray, np.ndarray]  # nodes in [0, 1] and weights that sum to 1, float64
Rule: TypeAlias = Callable[[int], Points]


class Completeness(NamedTuple):
    """How far the attributions are from what they should sum to."""

    expected: Float[Array, ...]  # objective(end of the path) - objective(its start)
    found: Float[Array, ...]  # sum of all attributions


def gauss_legendre(nodes: int) -> Points:
    """Gauss-Legendre: exact for polynomials of degree `2 nodes - 1`, never at the ends of the path."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return (points + 1) / 2, weights / 2


def riemann(nodes: int) -> Points:
    """The Riemann sum with the midpoints of `nodes` equal steps, as in captum's `riemann_middle`."""
    return (np.arange(nodes) + 0.5) / nodes, np.full(nodes, 1 / nodes)


def trapezoid(nodes: int) -> Points:
    """The trapezoidal rule, both ends included: half the weight at the ends, `1 / (nodes - 1)` inside.

    captum divides by `nodes` instead, so its weights sum to less than 1.

    Raises:
        ValueError: If there are fewer than two nodes.
    """
    if nodes < 2:
        raise ValueError(f"the trapezoidal rule needs at least 2 nodes, got {nodes}.")
    weights = np.full(nodes, 1 / (nodes - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, nodes), weights


def quadrature(rule: Rule, nodes: int, start: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of `∫ f(α) dα` over [start, 1], in float32.

    Raises:
        ValueError: If `nodes` is less than 1 or `start` is outside [0, 1).
    """
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}.")
    if not 0 <= start < 1:
        raise ValueError(f"start must lie in [0, 1), got {start}.")
    points, weights = rule(nodes)
    return (start + (1 - start) * points).astype(np.float32), ((1 - start) * weights).astype(np.float32)


def integrate(
    objective: Callable[[Gates], Float[Array, ""]],
    gates: Gates,
    *,
    nodes: int = 8,
    chunk: int = 1,
    start: float = 0.0,
    rule: Rule = gauss_legendre,
) -> tuple[Gates, Completeness]:
    """Integrates the gradient of `objective` along the straight path from `start * gates` to `gates`.

    Computes `g · ∫ ∇objective(αg) dα` over α in [start, 1], in float32. The attributions carry the unit of `objective`:
    nats when it is a log-probability. They sum to `objective(gates) - objective(start * gates)`, up to the error of
    the quadrature.

    Args:
        objective: The quantity to keep, a pure function of the gates; it must be differentiable by JAX.
        gates: End of the path, normally all ones.
        nodes: Quadrature nodes. Each costs one forward and one backward pass.
        chunk: Nodes evaluated together. Sets the memory, not the result.
        start: Where the path starts, as a fraction of `gates`.
        rule: Makes the nodes and weights.

    Returns:
        One signed attribution per gate, in the structure of `gates`, and their completeness.

    Raises:
        ValueError: If `nodes` or `chunk` is less than 1, or `start` is outside [0, 1).

    References:
        Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, 2017.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    points, weights = quadrature(rule, nodes, start)
    end = jax.tree.map(lambda g: jnp.asarray(g).astype(jnp.float32), gates)

    def at(alpha: Array) -> Gates:
        return jax.tree.map(lambda g: alpha * g, end)

    slopes = jax.lax.map(lambda alpha: jax.grad(objective)(at(alpha)), jnp.asarray(points), batch_size=chunk)
    average = jax.tree.map(lambda s: jnp.einsum("k,k...->...", weights, s, precision=jax.lax.Precision.HIGHEST), slopes)
    attributions = jax.tree.map(jnp.multiply, end, average)
    found = sum((a.sum() for a in jax.tree.leaves(attributions)), jnp.zeros((), jnp.float32))
    return attributions, Completeness(objective(end) - objective(at(jnp.float32(start))), found)

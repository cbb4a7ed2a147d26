"""Derivatives that are written by hand equal those of automatic differentiation, and are finite where it is not."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.models.layers import gelu, masked_softmax, normalise, product

VALUES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 4)), jnp.float32)
MASK = jnp.asarray([[True, True, False, True], [True, True, True, True]])


def plain_softmax(scores: jax.Array) -> jax.Array:
    shares = jnp.where(MASK[:, None, None, :], jnp.exp(scores), 0.0)
    return shares / shares.sum(-1, keepdims=True)


def plain_norm(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)


PAIRS = {
    "gelu": (gelu, lambda x: jax.nn.gelu(x, approximate=False)),
    "softmax": (lambda x: masked_softmax(x, MASK), plain_softmax),
    "norm": (lambda x: normalise(x, 1e-3), plain_norm),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_derivatives_forwards_backwards_and_twice_are_those_of_the_formula(name: str):
    toward, along = jnp.cos(VALUES * 3), jnp.sin(VALUES * 5)

    def derived(function: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, ...]:
        slope = jax.grad(lambda x: (function(x) * toward).sum())
        return *jax.jvp(function, (VALUES,), (along,)), *jax.jvp(slope, (VALUES,), (along,))

    found, expected = (jax.jit(lambda function=function: derived(function))() for function in PAIRS[name])
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=5e-6)


def test_a_row_without_tokens_attends_evenly_and_has_no_gradient():
    mask = jnp.asarray([[True, False, False, False], [False] * 4])
    weights, pull = jax.vjp(lambda x: masked_softmax(x, mask), VALUES)
    np.testing.assert_array_equal(weights[0], np.eye(4, dtype=np.float32)[[0] * 4] * np.ones((3, 1, 1)))
    np.testing.assert_array_equal(weights[1], np.full((3, 4, 4), 0.25, np.float32))
    np.testing.assert_array_equal(pull(VALUES)[0], np.zeros_like(VALUES))


def test_a_backward_pass_keeps_one_array_of_attention_probabilities():
    saved = jax.tree.leaves(jax.vjp(lambda x: masked_softmax(x, MASK), VALUES)[1])
    assert sum(leaf.shape == VALUES.shape for leaf in saved) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_products_of_bfloat16_round_their_operands_forwards_and_backwards_and_sum_in_float32(axis: int):
    random = np.random.default_rng(1)
    shapes = ((2, 3, 8), (5, 8) if axis else (8, 5), (2, 3, 5))
    x, matrix, toward = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)

    def of(x: jax.Array, matrix: jax.Array, toward: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, matrix: product(x, matrix, axis), x, matrix)
        return y, *pull(toward)

    rounded = [value.astype(jnp.bfloat16).astype(jnp.float32) for value in (x, matrix, toward)]
    with jax.default_matmul_precision("bfloat16"):
        found = of(x, matrix, toward)
    assert [value.dtype for value in found] == [jnp.float32] * 3
    for value, expected, exact in zip(found, of(*rounded), of(x, matrix, toward), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
        assert float(jnp.abs(value - exact).max()) > 1e-3

"""Exact counts whatever the scores are: the search over the bits equals a stable sort."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.sparse.patterns import keep_best, ordered_bits

SHAPES = [(5, 8), (5, 8), (3, 2, 4), (7, 1), (4, 0)]  # two are searched as one, one has no entries


def kinds_of_scores(kind: str, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    draw = {
        "random": lambda shape: random.standard_normal(shape),
        "tied": lambda shape: random.integers(-1, 2, shape),
        "constant": lambda shape: np.zeros(shape),
        "zeros of both signs": lambda shape: random.choice([0.0, -0.0], shape),
        "infinite": lambda shape: random.choice([np.inf, -np.inf, 0.0, 1.0], shape),
        "tiny": lambda shape: random.integers(-3, 4, shape) * np.float64(np.finfo(np.float32).smallest_subnormal),
        "broken": lambda shape: random.choice([np.nan, -np.nan, -np.inf, 2.0], shape),
    }[kind]
    return [np.asarray(draw(shape), np.float32) for shape in SHAPES]


KINDS = ("random", "tied", "constant", "zeros of both signs", "infinite", "tiny", "broken")


def by_sorting(scores: np.ndarray, alive: np.ndarray, keep: int) -> np.ndarray:
    """A stable sort by falling score: first what is alive, what is no number after all that are."""
    flat, living = scores.ravel().astype(np.float64), alive.ravel()
    order = np.lexsort((np.where(np.isnan(flat), np.inf, -flat), np.isnan(flat), ~living))  # stable
    kept = np.zeros(flat.size, bool)
    kept[order[: min(keep, int(living.sum()))]] = True
    return kept.reshape(scores.shape)


found = jax.jit(keep_best)  # the numbers to keep are traced: one program for all of them


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.99, 1.0])
def test_it_equals_a_stable_sort(kind, share):
    scores = kinds_of_scores(kind)
    random = np.random.default_rng(1)
    for alive in ([np.ones(s.shape, bool) for s in scores], [random.random(s.shape) < 0.7 for s in scores]):
        keep = np.asarray([round(share * s.size) for s in scores], np.int32)
        kept = found(scores, alive, keep)
        for own, score, living, count in zip(kept, scores, alive, keep, strict=True):
            assert own.sum() == min(count, living.sum())
            np.testing.assert_array_equal(own, by_sorting(score, living, count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 1, 40, 70, 111])
def test_together_it_equals_a_stable_sort_of_all(kind, keep):
    scores, alive = kinds_of_scores(kind), [np.ones(shape, bool) for shape in SHAPES]
    kept = found(scores, alive, np.int32(keep))
    flat, living = (np.concatenate([array.ravel() for array in arrays]) for arrays in (scores, alive))
    assert sum(int(own.sum()) for own in kept) == keep
    np.testing.assert_array_equal(
        np.concatenate([np.asarray(own).ravel() for own in kept]), by_sorting(flat, living, keep)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_are_a_subset_of_more(kind):
    scores, alive = kinds_of_scores(kind), [np.ones(shape, bool) for shape in SHAPES]
    before = found(scores, alive, np.asarray([0] * 5, np.int32))
    for keep in range(1, 41):
        after = found(scores, alive, np.asarray([keep] * 5, np.int32))
        for less, more in zip(before, after, strict=True):
            assert not (less & ~more).any()
        before = after


def test_the_bits_are_in_the_order_of_the_floats():
    rising = jnp.asarray([-np.inf, -3e38, -1.5, -1.0, -1e-45, 0.0, 1e-45, 1.0, 1.5, 3e38, np.inf])
    bits = ordered_bits(rising, jnp.ones(rising.shape, bool))
    assert (np.diff(np.asarray(bits).astype(np.int64)) > 0).all()
    two = ordered_bits(jnp.asarray([0.0, -0.0]), jnp.ones(2, bool))
    assert two[0] == two[1]
    last = ordered_bits(jnp.asarray([np.nan, -np.nan, -np.inf, -np.inf]), jnp.asarray([True, True, True, False]))
    assert last.tolist() == [1, 1, 0x007FFFFF, 0]


def test_half_precision_is_ranked_as_float32():
    scores = [jnp.asarray([[1.0, 3.0], [2.0, 2.0]], jnp.bfloat16)]
    kept = keep_best(scores, [jnp.ones((2, 2), bool)], jnp.asarray([2]))
    assert kept[0].tolist() == [[False, True], [True, False]]  # of the two 2s the first


def test_nothing_is_kept_of_nothing():
    assert keep_best([], [], jnp.zeros(0, jnp.int32)) == []


def test_more_than_an_integer_counts_are_refused():
    scores, alive = ([jax.ShapeDtypeStruct((2**15, 2**15), kind)] * 2 for kind in (jnp.float32, bool))
    with pytest.raises(ValueError, match="at most 2147483647 weights can be ranked together, got 2147483648"):
        jax.eval_shape(keep_best, scores, alive, jax.ShapeDtypeStruct((), jnp.int32))
    jax.eval_shape(keep_best, scores, alive, jax.ShapeDtypeStruct((2,), jnp.int32))  # each is counted by itself


def test_equal_shapes_share_their_loop():
    """The program has as many sums over weights for ten matrices as for one: it does not grow with the layers."""

    def reductions(arrays: int) -> int:
        shapes = [jax.ShapeDtypeStruct((5, 8), jnp.float32)] * arrays
        alive = [jax.ShapeDtypeStruct((5, 8), bool)] * arrays
        text = jax.jit(keep_best).lower(shapes, alive, jax.ShapeDtypeStruct((arrays,), jnp.int32)).as_text()
        return text.count("stablehlo.reduce")

    assert reductions(10) == reductions(1)

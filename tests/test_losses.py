"""Losses on plain arrays: numbers worked out by hand, PyTorch's on random ones, and masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.models import Mask, score_mask
from jaxprune.training.joint_loss import label_loss, mean_squared_error, mean_where, soft_cross_entropy


def test_soft_cross_entropy_by_hand():
    student, teacher = jnp.array([[np.log(3.0), 0.0], [5.0, 5.0]]), jnp.array([[2.0, 2.0], [0.0, np.log(3.0)]])
    # the student says (3/4, 1/4) where the teacher says (1/2, 1/2), then (1/2, 1/2) where it says (1/4, 3/4)
    expected = np.array([-0.5 * np.log(3 / 16), np.log(2.0)], np.float32)
    np.testing.assert_allclose(soft_cross_entropy(student, teacher), expected, rtol=1e-6)
    np.testing.assert_allclose(soft_cross_entropy(2 * student, 2 * teacher, 2.0), 4 * expected, rtol=1e-6)


def test_soft_cross_entropy_has_no_gradient_at_equality():
    teacher = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5)), jnp.float32)
    at_equality = jax.grad(lambda s: soft_cross_entropy(s, teacher, 3.0).sum())(teacher)
    np.testing.assert_allclose(at_equality, jnp.zeros((4, 5)), atol=1e-6)


def test_hard_labels_by_hand():
    each, known = label_loss(jnp.array([[np.log(3.0), 0.0], [0.0, 0.0]]), jnp.array([1, -1]))
    np.testing.assert_allclose(each[0], np.log(4.0), rtol=1e-6)
    assert known.tolist() == [True, False]
    each, known = label_loss(jnp.array([[1.5], [2.0]]), jnp.array([1.0, -1.0]), regression=True)
    np.testing.assert_allclose(each, [0.25, 9.0])
    assert known.tolist() == [True, True]


def test_mean_squared_error_by_hand():
    student = jnp.arange(12, dtype=jnp.float32).reshape(2, 3, 2)
    teacher = jnp.zeros((2, 3, 2))
    mask = jnp.array([[True, True, False], [True, False, False]])
    # the entries 0 1 2 3 and 6 7: (0 + 1 + 4 + 9 + 36 + 49) / 6; a mean of all twelve would be half of it
    assert float(mean_squared_error(student, teacher, mask[:, :, None])) == 16.5
    assert float(mean_squared_error(student, teacher, jnp.zeros((2, 3, 1), bool))) == 0.0
    with pytest.raises(ValueError, match="must have one shape"):
        mean_squared_error(student, teacher[:1], mask[:, :, None])


def test_scores_count_where_query_and_key_are_tokens():
    mask = jnp.array([[True, True, False]])
    found = score_mask(Mask(mask), mask)
    assert found[0, 0].astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    scores = jnp.arange(18, dtype=jnp.float32).reshape(1, 2, 3, 3)
    # 0 1 3 4 of the first head, 9 10 12 13 of the second
    assert float(mean_squared_error(scores, jnp.zeros_like(scores), found)) == (26 + 81 + 100 + 144 + 169) / 8
    memory = jnp.array([[True, False]])
    decoder, earlier = Mask(mask, memory), mask[:, None] & np.tri(3, dtype=bool)
    assert score_mask(decoder, earlier)[0, 0].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert score_mask(decoder, memory)[0, 0].astype(int).tolist() == [[1, 0], [1, 0], [0, 0]]


def test_what_is_masked_may_be_anything_and_gets_no_gradient():
    values, mask = jnp.array([1.0, jnp.inf, jnp.nan, 3.0]), jnp.array([True, False, False, True])
    found, slope = jax.value_and_grad(lambda v: mean_where(v, mask))(values)
    assert float(found) == 2.0 and slope.tolist() == [0.5, 0.0, 0.0, 0.5]


@pytest.mark.reference
def test_losses_equal_pytorch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    random = np.random.default_rng(0)
    student, teacher = (random.standard_normal((6, 4)).astype(np.float32) for _ in "ab")
    ours, theirs = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    temperature = 2.5
    targets = functional.softmax(theirs / temperature, dim=-1)
    reference = functional.cross_entropy(ours / temperature, targets)
    found, slope = jax.value_and_grad(lambda s: soft_cross_entropy(s, teacher, temperature).mean())(student)
    np.testing.assert_allclose(found, temperature**2 * reference.item(), rtol=1e-5)
    (expected,) = torch.autograd.grad(temperature**2 * reference, ours)
    np.testing.assert_allclose(slope, expected.numpy(), atol=1e-6)
    labels = random.integers(0, 4, 6)
    found, known = label_loss(jnp.asarray(student), jnp.asarray(labels, jnp.int32))
    assert known.all()
    np.testing.assert_allclose(found.mean(), functional.cross_entropy(ours, torch.tensor(labels)).item(), rtol=1e-5)

    lengths = np.array([7, 3, 5])
    mask = np.arange(7) < lengths[:, None]
    hidden = [random.standard_normal((3, 7, 8)).astype(np.float32) for _ in "ab"]
    scores = [random.standard_normal((3, 2, 7, 7)).astype(np.float32) for _ in "ab"]
    pairs = [mask[:, None, :, None] & mask[:, None, None, :], mask[:, :, None]]
    for (first, second), chosen, own in zip(
        (scores, hidden), pairs, (lambda mask: score_mask(Mask(mask), mask), lambda mask: mask[:, :, None]), strict=True
    ):
        real = torch.tensor(np.broadcast_to(chosen, first.shape).copy())
        expected = functional.mse_loss(torch.tensor(first)[real], torch.tensor(second)[real]).item()
        found = mean_squared_error(jnp.asarray(first), jnp.asarray(second), own(jnp.asarray(mask)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)

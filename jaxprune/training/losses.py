"""How far a student is from its teacher: losses on plain arrays, over the entries that are not padding.

A *mask* here is true where an entry counts. Means divide by the number of entries that count, so padding a batch
further changes nothing. All sums are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.models import Mask, Masks


def soft_cross_entropy(
    student: Float[Array, "*b l"], teacher: Float[Array, "*b l"], temperature: float | Array = 1.0
) -> Float[Array, "*b"]:
    """The cross-entropy of the student's distribution under the teacher's, per example, in nats.

    `-T^2 sum_l softmax(teacher / T)_l log softmax(student / T)_l`. It is smallest where the two distributions are
    equal: there it is `T^2` times the entropy of the teacher's. The factor `T^2` keeps the size of the gradient as `T`
    grows.

    Args:
        student: Logits.
        teacher: Logits.
        temperature: What both are divided by.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    targets = jax.nn.softmax(teacher.astype(jnp.float32) / temperature)
    return -(temperature**2) * (targets * jax.nn.log_softmax(student.astype(jnp.float32) / temperature)).sum(-1)


def kl_divergence(
    student: Float[Array, "*b l"], teacher: Float[Array, "*b l"], temperature: float | Array = 1.0
) -> Float[Array, "*b"]:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, per example, in nats.

    `soft_cross_entropy` minus what it is at least: its gradient with respect to the student is the same, and it is 0
    where the distributions are equal.

    Args:
        student: Logits.
        teacher: Logits.
        temperature: What both are divided by.
    """
    ours, theirs = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (student, teacher))
    return temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(-1)


def label_loss(
    logits: Float[Array, "*b l"], labels: Array, *, regression: bool = False
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """The loss towards hard labels, per example, and which examples have one.

    Args:
        logits: One number per label; in a regression the first is the prediction.
        labels: `[*b]`. Indices, negative where there is none; in a regression numbers, and all of them count.
        regression: Whether the loss is the squared error instead of the cross-entropy.
    """
    if regression:
        return jnp.square(logits[..., 0].astype(jnp.float32) - labels.astype(jnp.float32)), jnp.ones(labels.shape, bool)
    index = jnp.maximum(labels, 0)[..., None]
    each = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), index, axis=-1)[..., 0]
    return -each, labels >= 0


def mean_squared_error(
    student: Float[Array, "*shape"], teacher: Float[Array, "*shape"], mask: Bool[Array, ...]
) -> Float[Array, ""]:
    """The mean of `(student - teacher)^2` over the entries that the mask allows; 0 if it allows none.

    A plain mean that counts masked entries as 0 is this times the fraction of entries that the mask allows: it shrinks
    when a batch is padded further.

    Args:
        student: Hidden states `[b, t, d]` or attention scores `[b, n, t, s]`.
        teacher: The same shape.
        mask: Broadcasts to that shape: `hidden_mask(mask)` or `score_mask(mask)`.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"the student has {student.shape}, the teacher {teacher.shape}: they must have one shape.")
    return mean_where(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), mask)


def mean_where(values: Float[Array, "*shape"], mask: Bool[Array, ...]) -> Float[Array, ""]:
    """The mean of the values that a mask allows, which broadcasts to their shape; 0 if it allows none.

    Values that it does not allow may be anything, infinite too, and get no gradient.
    """
    repeats = values.size // max(mask.size, 1)  # of every entry of the mask
    count = mask.sum().astype(jnp.float32) * repeats
    return jnp.where(mask, values, 0.0).sum(dtype=jnp.float32) / jnp.maximum(count, 1.0)


def hidden_mask(mask: Mask) -> Bool[Array, "b t 1"]:
    """Which hidden states `[b, t, d]` count: those of tokens."""
    own = mask.own if isinstance(mask, Masks) else mask
    return own[:, :, None]


def score_mask(mask: Mask, module: str = "attention") -> Bool[Array, "b 1 t s"]:
    """Which attention scores `[b, n, t, s]` count: those that the softmax reads, of queries that are tokens.

    In an encoder that is where query and key are tokens; in a decoder's attention to itself, where the key comes no
    later than the query, too; in its attention to the encoder (`cross`), where the key is a token of the encoder.

    Args:
        mask: What the layer reads.
        module: The attention whose scores they are: "attention" or "cross".
    """
    if not isinstance(mask, Masks):
        return mask[:, None, :, None] & mask[:, None, None, :]
    if module == "cross":
        return mask.own[:, None, :, None] & mask.memory[:, None, None, :]
    places = jnp.arange(mask.own.shape[1])
    return score_mask(mask.own) & (places[None, :] <= places[:, None])

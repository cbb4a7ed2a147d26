"""Teaches a small or sparse model, the student, what a larger one, the teacher, computes on the way to its answer.

The student learns the teacher's logits, and on the way its embedding output, the output of every layer and its
attention scores before the softmax. The teacher runs in the same step, without dropout, and nothing of it is stored;
its logits alone may come with the batch. A `Distillation` says what is learned, and with which weight.

A step is a few compiled programs, one for all layers of equal shape. An outer `jax.jit` may trace it as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxprune.models import Model
from jaxprune.models.backward import gradients_at
from jaxprune.training.curriculum import PROJECTION, Distillation
from jaxprune.training.lessons import run
from jaxprune.training.loop import TrainingState, share_gradients
from jaxprune.units import Params, Path, flatten, unflatten

Parts: TypeAlias = dict[str, Float[Array, ""]]  # name of a weight of `Distillation` -> that loss, before its weight


def joint_loss(
    model: Model,
    student: Params,
    teacher_model: Model,
    teacher: Params,
    batch: Mapping[str, Any],
    settings: Distillation | None = None,
    *,
    head: str | None = None,
    heads: Mapping[str, Sequence[int]] | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """The weighted sum of all losses, and each of them.

    Padding never leaks: more padded tokens or rows change nothing. The teacher gets no gradient. A student with the
    teacher's parameters has losses of 0, but for the logits': that is the entropy of the teacher's answer, and its
    gradient 0.

    Args:
        model: The student's architecture.
        student: Its parameters; those of `initialise_projection` under "projection" if its width differs.
        teacher_model: The teacher's architecture.
        teacher: Its parameters.
        batch: As for `Model.apply`, and: `weight`, 0 for rows that are no examples; `labels` or `candidates`, as of
            `make_batches`, if the loss or a text-to-text model needs them (an answer that is missing is the teacher's
            likeliest); `teacher_logits`, if they are known.
        settings: What to learn; None: `Distillation.sparse_bert`, for the task head.
        head: The task head of both; None: the only one of each.
        heads: Which of the teacher's heads the student has, see `surviving_heads`; sites that are not named have all.
        key: Switches the student's dropout on.

    Returns:
        The sum, and what it is the sum of, before the weights.

    Raises:
        ValueError: If student and teacher do not match, or the batch does not fit them.
    """
    settings = settings or Distillation.sparse_bert(regression=model.head(head).regression)
    how = {"head": head, "heads": heads or {}, "key": key, "differentiated": False}
    done = run(model, student, teacher_model, teacher, batch, settings, **how)
    return done.total, done.parts


def joint_loss_and_gradients(
    model: Model,
    student: Params,
    teacher_model: Model,
    teacher: Params,
    batch: Mapping[str, Any],
    settings: Distillation | None = None,
    *,
    head: str | None = None,
    heads: Mapping[str, Sequence[int]] | None = None,
    key: Array | None = None,
) -> tuple[tuple[Float[Array, ""], Parts], Params]:
    """`joint_loss` and its gradient with respect to the student, as `jax.value_and_grad` returns them.

    It compiles no more for a deep student than for a shallow one. Parameters that are not used, such as other task
    heads, get a gradient of 0; those that are one in the original model all get the sum of theirs.
    """
    settings = settings or Distillation.sparse_bert(regression=model.head(head).regression)
    how = {"head": head, "heads": heads or {}, "key": key, "differentiated": True}
    done = run(model, student, teacher_model, teacher, batch, settings, **how)
    flat: dict[Path, Array] = {}
    cotangent = None
    for step in reversed(done.steps):
        if cotangent is None:  # nothing is learned from what comes after
            cotangent = jax.tree.map(jnp.zeros_like, step.output)
        weights = {name: np.float32(settings.weights[name]) for name in step.terms}
        (slopes,) = _pull(step.pullback, (cotangent, weights))
        cotangent = slopes.state
        found = gradients_at(step.places, slopes.params)
        if slopes.matrix is not None:
            found[PROJECTION, step.matrix] = slopes.matrix
        for path, slope in found.items():
            flat[path] = flat[path] + slope if path in flat else slope
    unused = {path: jnp.zeros_like(own) for path, own in flatten(student).items() if path not in flat}
    return (done.total, done.parts), share_gradients(model, unflatten(flat | unused))


@jax.jit
def _pull(pullback: Any, cotangent: Any) -> Any:
    return pullback(cotangent)


def start_student(student: Params, optimizer: optax.GradientTransformation) -> TrainingState:
    """The state before the first step: a copy of the parameters in float32, and the optimizer's state."""
    own = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), student)
    return TrainingState(own, {"student": optimizer.init(own)}, {}, 0)


def distil_step(
    model: Model,
    teacher_model: Model,
    optimizer: optax.GradientTransformation,
    settings: Distillation,
    now: TrainingState,
    teacher: Params,
    batch: Mapping[str, Any],
    key: Array | None,
    *,
    head: str | None = None,
    heads: Mapping[str, Sequence[int]] | None = None,
) -> tuple[TrainingState, tuple[Float[Array, ""], Parts]]:
    """One step of the student. Uses up the state before it.

    Args:
        model: The student's architecture.
        teacher_model: The teacher's.
        optimizer: Any of optax, the whole of it: clipping, learning rate and weight decay included. It is given the
            parameters, so it may be one that prunes. Make it once: another object is compiled again.
        settings: What to learn.
        now: What the step before returned, or `start_student`.
        teacher: The teacher's parameters.
        batch: As for `joint_loss`.
        key: The student's dropout; None: there is none.
        head: The task head of both; None: the only one of each.
        heads: As for `joint_loss`.

    Returns:
        The state after it; the loss before it, and its parts.
    """
    loss, grads = joint_loss_and_gradients(
        model, now.params, teacher_model, teacher, batch, settings, head=head, heads=heads, key=key
    )
    params, moments = _update(optimizer, now.params, now.moments["student"], grads)
    return now._replace(params=params, moments={"student": moments}, done=now.done + 1), loss


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _update(
    optimizer: optax.GradientTransformation, params: Params, moments: optax.OptState, grads: Params
) -> tuple[Params, optax.OptState]:
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer count
        updates, moments = optimizer.update(grads, moments, params)
    moved: Any = optax.apply_updates(params, updates)
    return moved, moments

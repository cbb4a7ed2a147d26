"""Multi-task fine-tuning: every step trains one shared model on one batch of one task.

What is trained is an encoder and that task's head, or a text-to-text model on the words of the label, after the task's
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxprune.checkpoints.tensors import model_digest, versions
from jaxprune.data.batches import IGNORED, Batches, Encoded, digest_encoded, digest_rows, training_batches, usable_rows
from jaxprune.data.tasks import Rows, Task, remove_leaks
from jaxprune.evaluation.evaluate import Evaluation, evaluate
from jaxprune.evaluation.text import candidates_in, candidates_of, teacher_forced
from jaxprune.models import Model, TaskHead
from jaxprune.models.running import Gradients, forward
from jaxprune.training.loop import (
    OPTIMIZERS,
    Run,
    Step,
    Training,
    TrainingState,
    decayed,
    share_gradients,
    train,
    trainable,
)
from jaxprune.units import Params

ENCODER = ""  # names the part of the parameters that is no task head; in a text-to-text model all of them


@dataclass(frozen=True, kw_only=True)
class FineTuning(Training):
    """Settings of a fine-tuning: by default with linear warm-up and decay."""

    epochs: int = 3
    learning_rate: float = 5e-5
    warmup: float = 0.06
    decay: bool = True
    rows: Mapping[str, int] | None = None  # rows of a task in an epoch, drawn again or repeated; other tasks: all once
    pooling: str = "mean"  # of the fresh heads: "first" or "mean"
    dense: str | None = None  # activation of a layer before their output
    keep_heads: bool = False  # whether heads of other names stay: untrained, above an encoder that changes

    def __post_init__(self):
        super().__post_init__()
        for name, rows in (self.rows or {}).items():
            if rows < 1:
                raise ValueError(f"rows of {name!r} must be at least 1, got {rows}.")


class Finetuned(NamedTuple):
    """The result of `finetune`."""

    model: Model
    params: Params  # of the best evaluation
    evaluations: tuple[tuple[Evaluation, ...], ...]  # on dev, normally one per epoch; each in the order of the tasks
    best: int  # the index of the evaluation with the best mean of the primary metrics; the first of equals
    leaks: dict[tuple[str, str], int]  # (task, other): rows of task dropped because they are held out in other
    cut_off: dict[str, int]  # by task for spans: train rows left out because their answer is cut off


def finetune(
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    training: FineTuning = FineTuning(),
    *,
    state: str | Path | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Finetuned:
    """Fine-tunes an encoder, or a text-to-text model, on several tasks at once.

    Rows that are held out in any of the tasks are removed from all of them first; so are train rows for spans whose
    answer is cut off. The same call with the same `state` resumes an interrupted run, and ends with the same bits as
    one that was not interrupted.

    Args:
        model: The model; task heads that it has are replaced by fresh ones, one per task, named as the task.
        params: Its parameters.
        tasks: The tasks, with train and dev rows.
        training: The settings.
        state: File that holds a run in progress; None: it cannot be resumed. It is left in place at the end, so that
            the caller can save the result before deleting it.
        progress: Called every ten steps, and after each evaluation with its `results`.

    Returns:
        The model with its heads, the parameters of the best evaluation, and all evaluations.

    Raises:
        ValueError: If there are no tasks, two have the same name, one has no train or dev rows, the state belongs to
            another run, or the loss is not finite.
        KeyboardInterrupt: After the state was written, if there is a file for it.
    """
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"finetune needs tasks with different names, got {names}.")
    unknown = sorted(set(training.rows or {}) - set(names))
    if unknown:
        raise ValueError(f"rows names {', '.join(unknown)}, which are not among the tasks {', '.join(names)}.")
    cleaned, leaks = remove_leaks(tasks)
    check_rows(cleaned)
    heads = () if model.answers_in_text else tuple(_head_for(task, training) for task in cleaned)
    encoder = {name: part for name, part in params.items() if name != "heads"}
    others = tuple(head for head in model.config.task_heads if training.keep_heads and head.name not in names)
    old = {head.name: params["heads"][head.name] for head in others}
    trained = model.with_heads((*others, *heads))
    identity = {
        "training": training.to_json(),
        "model": model_digest(model.with_heads(others), encoder | ({"heads": old} if old else {})),
        "versions": versions(),
        "tasks": {},
    }
    encoded, cut_off = {}, {}
    for task in cleaned:
        usable = usable_rows(trained, task, Rows(split="train", max_length=training.max_length))
        encoded[task.name] = usable.encode(usable.task.rows("train"))
        encoded[task.name].warn_if_cut(f"train texts of {task.name!r}")
        cut_off |= {task.name: usable.cut_off} if usable.cut_off else {}
        identity["tasks"][task.name] = {
            "labels": list(task.labels),
            "train": digest_encoded(encoded[task.name], usable.task.rows("train")),
            "dev": digest_rows(trained, task, Rows(split="dev", max_length=training.max_length)),
        }
    per_epoch = len(_visits(encoded, training, 0))
    steps = training.steps or training.epochs * per_epoch
    key = jax.random.key(training.seed)
    with jax.numpy_dtype_promotion("standard"):  # optax divides a count by the number of steps
        rates = np.asarray(training.rate(steps)(np.arange(steps)), np.float32)
    optimizer = _optimizer(training.optimizer, training.weight_decay)

    def step(now: TrainingState, visit: tuple[str, Batches, int]) -> tuple[TrainingState, Array]:
        task, batches, index = visit
        batch = batches[index]
        labels, parts, head = jnp.asarray(batch["labels"]), (ENCODER, task), task
        if model.answers_in_text:
            labels, parts, head = candidates_of(candidates_in(batch), labels), (ENCODER,), None
        step_key = jax.random.fold_in(key, now.done) if training.dropout else None
        loss, grads = loss_and_gradients(trained, now.params, batch, labels, head=head, key=step_key)
        now = now._replace(done=now.done + 1)
        return _updated(optimizer, training.clip, rates[now.done - 1], now, grads, parts), loss

    def evaluate_dev(now: TrainingState) -> dict[str, Any]:
        rows = Rows(split="dev", examples=training.dev_limit, max_length=training.max_length)
        return {"results": [evaluate(trained, now.params, task, rows=rows).to_json() for task in cleaned]}

    drawn = {head.name: trained.initialise_head(head.name, jax.random.fold_in(key, i)) for i, head in enumerate(heads)}
    fresh = trainable(encoder | ({"heads": old | drawn} if heads else {}))
    moments = {name: optimizer.init(_part(fresh, name)) for name in (ENCODER, *drawn)}
    run = Run(
        identity=identity,
        steps=steps,
        batches=partial(_visits, encoded, training),
        step=step,
        evaluate=evaluate_dev,
        evaluate_every=training.evaluate_every or per_epoch,
        quality=_quality,
    )
    file = None if state is None else Path(state)
    done = train(run, TrainingState(fresh, moments), file=file, save_every=training.save_every, progress=progress)
    evaluations = tuple(tuple(map(Evaluation.from_json, entry["results"])) for entry in done.history)
    return Finetuned(trained, done.best, evaluations, run.best(done.history), leaks, cut_off)


def check_rows(tasks: Sequence[Task]) -> None:
    """Refuses tasks without rows to train on, or to choose the best parameters by."""
    for task in tasks:
        for split in ("train", "dev"):
            if not task.rows(split):
                raise ValueError(f"{task.name!r} has no {split} rows, which training needs.")


def _head_for(task: Task, training: FineTuning) -> TaskHead:
    pooling = "none" if task.spans else training.pooling
    facts: dict[str, Any] = {"name": task.name, "labels": task.labels, "regression": task.regression}
    return TaskHead(**facts, pooling=pooling, dense=training.dense)


def _quality(evaluation: Mapping[str, Any]) -> float:
    """The mean of the primary metrics."""
    return float(np.mean([Evaluation.from_json(result).primary[1] for result in evaluation["results"]]))


def _visits(encoded: Mapping[str, Encoded], training: FineTuning, epoch: int) -> list[tuple[str, Batches, int]]:
    """The batches of one epoch, of all tasks in random order: the task, its batches in one pass, the index."""
    visits: list[tuple[str, Batches, int]] = []
    for name, rows in encoded.items():
        wanted = math.ceil((training.rows or {}).get(name, len(rows)) / training.batch_size)
        task: list[tuple[str, Batches, int]] = []
        turn = epoch * 1000  # a pass over the rows is an epoch by itself
        while len(task) < wanted:
            batches = training_batches(rows, batch_size=training.batch_size, key=training.seed, epoch=turn)
            task += [(name, batches, index) for index in range(len(batches))]
            turn += 1
        visits += task[:wanted]
    return [visits[i] for i in np.random.default_rng([training.seed, epoch]).permutation(len(visits))]


def loss_and_gradients(
    model: Model,
    params: Params,
    batch: Mapping[str, np.ndarray],
    labels: Any,
    *,
    head: str | None = None,
    key: Array | None = None,
) -> tuple[Array, Params]:
    """The mean loss of a task head towards labels, or of a text-to-text model towards target tokens; its gradient."""
    labels = jnp.asarray(labels)
    inputs = teacher_forced(model, batch, labels) if model.answers_in_text else batch
    logits, pull = forward(model, params, inputs, head=head, gradients=Gradients(weights=True), key=key)
    loss, cotangent = _loss(model.head(head).regression, logits, labels, jnp.asarray(batch["weight"]))
    return loss, share_gradients(model, pull(cotangent)[1] or {})


@partial(jax.jit, static_argnums=0)
def _loss(
    regression: bool, logits: Float[Array, "b *n l"], labels: Array, weight: Float[Array, " b"]
) -> tuple[Array, Float[Array, "b *n l"]]:
    """The mean loss of the labels of the rows that are not padding, and its gradient with respect to the logits."""
    counts = jnp.broadcast_to(weight.reshape(-1, *(1,) * (labels.ndim - 1)), labels.shape)
    if not regression:
        counts = jnp.where(labels != IGNORED, counts, 0.0)

    def mean_loss(logits: Array) -> Array:
        if regression:
            each = jnp.square(logits[:, 0] - labels)
        else:
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return (each * counts).sum() / counts.sum()

    return jax.value_and_grad(mean_loss)(logits)


# The update: the encoder and the head of the task, each with separate moments; other heads stay as they are.


@lru_cache
def _optimizer(name: str, weight_decay: float) -> optax.GradientTransformation:
    """The optimizer of one part of the parameters, before the learning rate."""
    return optax.chain(OPTIMIZERS[name](), optax.add_decayed_weights(weight_decay, decayed))


def _part(params: Params, name: str) -> Params:
    """The encoder, or the head of one task."""
    if name == ENCODER:
        return {name: part for name, part in params.items() if name != "heads"}
    return params["heads"][name]


def _updated(
    optimizer: optax.GradientTransformation,
    clip: float,
    rate: Any,
    now: TrainingState,
    grads: Params,
    parts: tuple[str, ...],
) -> TrainingState:
    """The state after a step of some parts of the parameters."""
    before = tuple(_part(now.params, part) for part in parts), tuple(now.moments[part] for part in parts)
    after, moments = _update(optimizer, clip, *before, tuple(_part(grads, part) for part in parts), jnp.float32(rate))
    params = after[0]
    if "heads" in now.params:
        params = params | {"heads": now.params["heads"] | dict(zip(parts[1:], after[1:], strict=True))}
    return now._replace(params=params, moments=now.moments | dict(zip(parts, moments, strict=True)))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _update(
    optimizer: optax.GradientTransformation,
    clip: float,
    parts: tuple[Params, ...],
    moments: tuple[optax.OptState, ...],
    grads: tuple[Params, ...],
    rate: Array,
) -> tuple[tuple[Params, ...], tuple[optax.OptState, ...]]:
    """One step of some parts of the parameters, clipped by their common norm. Donates parts and moments."""
    clipped: Any = optax.clip_by_global_norm(clip).update(grads, optax.EmptyState())[0]
    after: list[Any] = []
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer count
        for part, gradient, moment in zip(parts, clipped, moments, strict=True):
            updates, moved = optimizer.update(gradient, moment, part)
            after.append((optax.apply_updates(part, jax.tree.map(lambda u: -rate * u, updates)), moved))
    return tuple(part for part, _ in after), tuple(moved for _, moved in after)

"""Multi-task fine-tuning: one shared model, resumable to the same bits.

Every step trains on one batch of one task: an encoder and that task's head, or a text-to-text model on the words of the
label, after the task's prompt. The order of the batches and the dropout
are functions of the seed and the step alone, so a run that was interrupted goes on exactly where its state file says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxprune.checkpoints.folder import model_digest
from jaxprune.data.batches import IGNORED, Batches, Encoded, training_batches, usable_rows
from jaxprune.data.tasks import Rows, Task, remove_leaks
from jaxprune.evaluation.evaluate import Evaluation, evaluate
from jaxprune.evaluation.likelihood import candidates_in, candidates_of, teacher_forced
from jaxprune.models import Model, TaskHead
from jaxprune.models.backward import forward
from jaxprune.training.loop import (
    Step,
    TrainingState,
    decayed,
    read_state,
    run_steps,
    share_gradients,
    write_state,
)
from jaxprune.units import Params

OPTIMIZERS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6),
    "adafactor": lambda: optax.chain(  # Shazeer and Stern 2018
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    ),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to fine-tune: AdamW or Adafactor, with linear warm-up and decay."""

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5  # at its peak; per step
    warmup: float = 0.06  # fraction of the steps
    weight_decay: float = 0.01  # decoupled; kernels and embeddings only
    optimizer: str = "adamw"  # or "adafactor", whose learning rate is relative to the size of each parameter
    clip: float = 1.0  # largest norm of the gradient over all parameters of a step
    max_length: int | None = None  # tokens; None: 128, for spans 384, or what the model reads if that is less
    rows: Mapping[str, int] | None = None  # rows of a task in an epoch, drawn anew or repeated; unnamed tasks: all once
    pooling: str = "mean"  # of the fresh heads: "first" or "mean"
    dense: str | None = None  # activation of a layer before their output
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}.")
        for name, rows in (self.rows or {}).items():
            if rows < 1:
                raise ValueError(f"rows of {name!r} must be at least 1, got {rows}.")
        if not self.learning_rate > 0 or not 0 <= self.warmup <= 1 or self.weight_decay < 0 or not self.clip > 0:
            raise ValueError("learning_rate and clip must be positive, warmup in [0, 1], weight_decay at least 0.")


class Finetuned(NamedTuple):
    """What `finetune` returns."""

    model: Model
    params: Params  # of the epoch with the best mean of the primary metrics on dev
    epochs: tuple[tuple[Evaluation, ...], ...]  # every epoch's evaluations on dev, in the order of the tasks
    best: int  # that epoch, counts from 1
    leaks: dict[tuple[str, str], int]  # (task, other): rows of task dropped because they are held out in other
    cut_off: dict[str, int]  # by task for spans: train rows left out because their answer is cut off


def finetune(
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    *,
    recipe: Recipe | None = None,
    state: str | Path | None = None,
    save_every: int = 200,
    dev_limit: int | None = 1000,
    keep_heads: bool = False,
    progress: Callable[[Step], None] | None = None,
    report: Callable[[int, Evaluation], None] | None = None,
) -> Finetuned:
    """Fine-tunes an encoder, or a text-to-text model, on several tasks at once.

    Rows that are held out in any of the tasks are removed from all of them first; so are train rows for spans whose
    answer is cut off. The same call with the same `state` goes on where an interrupted one stopped, and ends with the
    same bits as one that was not interrupted.

    Args:
        model: The model; task heads that it has are replaced by fresh ones, one per task, named as the task.
        params: Its parameters.
        tasks: The tasks, with train and dev rows.
        recipe: How to train.
        state: File that holds a run in progress; None: it cannot be resumed. It is left in place at the end, so that
            the caller can save the result before deleting it.
        save_every: Steps between two writings of the state.
        dev_limit: The most dev rows of each task to evaluate after an epoch.
        keep_heads: Whether task heads of other names stay. They are not trained, but the encoder below them is: they
            will do worse.
        progress: Called every ten steps.
        report: Called with the epoch, from 1, and each of its evaluations.

    Returns:
        The model with its heads, the parameters of the best epoch, and how it got there.

    Raises:
        ValueError: If there are no tasks, two have the same name, one has no train or dev rows, the state belongs to
            another run, or the loss is not finite.
        KeyboardInterrupt: After the state was written, if there is a file for it.
    """
    recipe = recipe or Recipe()
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"finetune needs tasks with different names, got {names}.")
    cleaned, leaks = remove_leaks(tasks)
    for task in cleaned:
        for split in ("train", "dev"):
            if not task.rows(split):
                raise ValueError(f"{task.name!r} has no {split} rows to fine-tune with.")
    heads = () if model.answers_in_text else tuple(_head_for(task, recipe) for task in cleaned)
    encoder = {name: part for name, part in params.items() if name != "heads"}
    kept = tuple(head for head in model.config.task_heads if keep_heads and head.name not in names)
    old = {head.name: params["heads"][head.name] for head in kept}
    trained = model.with_heads((*kept, *heads))
    run = {
        "recipe": asdict(recipe),
        "model": model_digest(model.with_heads(kept), encoder | ({"heads": old} if old else {})),
        "tasks": {task.name: task.digest("train") for task in cleaned},
        "dev_limit": dev_limit,
    }
    unknown = sorted(set(recipe.rows or {}) - set(names))
    if unknown:
        raise ValueError(f"rows names {', '.join(unknown)}, which are not among the tasks {', '.join(names)}.")
    encoded, cut_off = {}, {}
    for task in cleaned:
        usable = usable_rows(trained, task, Rows(split="train", max_length=recipe.max_length))
        encoded[task.name] = usable.encode(usable.task.rows("train"))
        cut_off |= {task.name: usable.cut_off} if usable.cut_off else {}
    plan = partial(_plan, encoded, recipe)
    per_epoch = len(plan(0)[1])
    steps = per_epoch * recipe.epochs
    key = jax.random.key(recipe.seed)
    fresh = encoder
    if heads:
        drawn = {
            head.name: trained.initialise_head(head.name, jax.random.fold_in(key, i)) for i, head in enumerate(heads)
        }
        fresh = encoder | {"heads": old | drawn}
    fresh = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), fresh)  # ours alone: steps donate it
    now = start_training(fresh, recipe.optimizer, [head.name for head in heads])
    file = None if state is None else Path(state)
    history: list[Any] = []
    if file is not None and file.exists():
        now, history = read_state(file, now, run)
    while len(history) < recipe.epochs:
        epoch = len(history)
        batches, order = plan(epoch)

        def step(now: TrainingState, batches: Any = batches, order: Any = order) -> tuple[TrainingState, Array]:
            name, turn, index = order[now.done % per_epoch]
            rate, own_key = _rate(now.done / steps, recipe), jax.random.fold_in(key, now.done)
            return _step(trained, recipe, now, batches[name][turn][index], name, rate, own_key)

        save = None if file is None else partial(write_state, file, run=run, history=history)
        now = run_steps(step, now, (epoch + 1) * per_epoch, steps, epoch + 1, save, save_every, progress)
        results = []
        for task in cleaned:
            result = evaluate(
                trained, now.params, task, rows=Rows(split="dev", examples=dev_limit, max_length=recipe.max_length)
            )
            results.append(result)
            if report is not None:
                report(epoch + 1, result)
        history.append([result.to_json() for result in results])
        if _best(history) == len(history):
            now = now._replace(best=jax.tree.map(jnp.copy, now.params))
        if file is not None:
            write_state(file, now, run, history)
    epochs = tuple(tuple(Evaluation.from_json(result) for result in results) for results in history)
    return Finetuned(trained, now.best, epochs, _best(history), leaks, cut_off)


def _head_for(task: Task, recipe: Recipe) -> TaskHead:
    pooling = "none" if task.spans else recipe.pooling
    return TaskHead(name=task.name, labels=task.labels, regression=task.regression, pooling=pooling, dense=recipe.dense)


def start_training(params: Params, optimizer: str, heads: Sequence[str] = ()) -> TrainingState:
    """The state before the first step."""
    moments = {name: _optimizer(optimizer).init(_part(params, name)) for name in ("encoder", *heads)}
    return TrainingState(params, moments, {}, 0)


def _plan(
    encoded: Mapping[str, Encoded], recipe: Recipe, epoch: int
) -> tuple[dict[str, list[Batches]], list[tuple[str, int, int]]]:
    """The batches of every task in one epoch, pass by pass, and the order of visits: (task, pass, batch)."""
    batches: dict[str, list[Batches]] = {}
    order: list[tuple[str, int, int]] = []
    for name, rows in encoded.items():
        wanted = math.ceil((recipe.rows or {}).get(name, len(rows)) / recipe.batch_size)
        batches[name], own = [], []
        while len(own) < wanted:
            turn = len(batches[name])
            seed = epoch * 1000 + turn  # a pass over the rows is an epoch of its own
            batches[name].append(training_batches(rows, batch_size=recipe.batch_size, key=recipe.seed, epoch=seed))
            own += [(name, turn, index) for index in range(len(batches[name][-1]))]
        order += own[:wanted]
    order = [order[i] for i in np.random.default_rng([recipe.seed, epoch]).permutation(len(order))]
    return batches, order


def _rate(fraction: float, recipe: Recipe) -> float:
    """The learning rate after this fraction of the steps."""
    rise = fraction / recipe.warmup if recipe.warmup else 1.0
    fall = (1.0 - fraction) / (1.0 - recipe.warmup) if recipe.warmup < 1 else 1.0
    return recipe.learning_rate * min(rise, fall, 1.0)


def _part(params: Params, name: str) -> Params:
    """The encoder, or the head of one task."""
    if name == "encoder":
        return {part: own for part, own in params.items() if part != "heads"}
    return params["heads"][name]


@lru_cache
def _optimizer(name: str) -> optax.GradientTransformation:
    return OPTIMIZERS[name]()  # one object per name: it is a static argument of a compiled step


def _step(
    model: Model,
    recipe: Recipe,
    now: TrainingState,
    batch: Mapping[str, np.ndarray],
    task: str,
    rate: float,
    key: Array,
) -> tuple[TrainingState, Array]:
    how = recipe.optimizer, recipe.weight_decay, recipe.clip, rate
    if model.answers_in_text:
        targets = candidates_of(candidates_in(batch), jnp.asarray(batch["labels"]))
        return text_step(model, now, batch, targets, *how, key)
    logits, pull = forward(model, now.params, batch, head=task, weights=True, key=key)
    labels, weight = jnp.asarray(batch["labels"]), jnp.asarray(batch["weight"])
    loss, cotangent = _loss(model.head(task).regression, logits, labels, weight)
    return _moved(model, now, pull(cotangent)[1], ("encoder", task), *how), loss


def text_step(
    model: Model,
    now: TrainingState,
    batch: Mapping[str, np.ndarray],
    targets: Any,
    optimizer: str,
    weight_decay: float,
    clip: float,
    rate: float,
    key: Array,
) -> tuple[TrainingState, Array]:
    """One step of a text-to-text model towards some targets `[b, u]`; returns the loss before it, too."""
    targets = jnp.asarray(targets)
    logits, pull = forward(model, now.params, teacher_forced(model, batch, targets), weights=True, key=key)
    loss, cotangent = _text_loss(logits, targets, jnp.asarray(batch["weight"]))
    return _moved(model, now, pull(cotangent)[1], ("encoder",), optimizer, weight_decay, clip, rate), loss


def _moved(
    model: Model,
    now: TrainingState,
    grads: Params | None,
    parts: tuple[str, ...],
    optimizer: str,
    weight_decay: float,
    clip: float,
    rate: float,
) -> TrainingState:
    """The state after a step of some parts of the parameters."""
    if grads is None:
        raise ValueError("the backward pass returned no weight gradients.")
    grads = share_gradients(model, grads)
    updated, moments = _update(
        _optimizer(optimizer),
        weight_decay,
        clip,
        (tuple(_part(now.params, part) for part in parts), tuple(now.moments[part] for part in parts)),
        tuple(_part(grads, part) for part in parts),
        jnp.float32(rate),
    )
    params = updated[0]
    if "heads" in now.params:
        params = params | {"heads": now.params["heads"] | dict(zip(parts[1:], updated[1:], strict=True))}
    return now._replace(params=params, moments=now.moments | dict(zip(parts, moments, strict=True)), done=now.done + 1)


@partial(jax.jit, static_argnums=0)
def _loss(
    regression: bool, logits: Float[Array, "b l"], labels: Array, weight: Float[Array, " b"]
) -> tuple[Array, Float[Array, "b l"]]:
    """The mean loss of the rows that are not padding, and its gradient with respect to the logits.

    Of spans it is the mean of the losses of their start and their end.
    """

    def mean_loss(logits: Array) -> Array:
        if regression:
            each = jnp.square(logits[:, 0] - labels)
        else:
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            each = each.reshape(each.shape[0], -1).mean(1)
        return (each * weight).sum() / weight.sum()

    return jax.value_and_grad(mean_loss)(logits)


@jax.jit
def _text_loss(
    logits: Float[Array, "b u v"], targets: Int[Array, "b u"], weight: Float[Array, " b"]
) -> tuple[Array, Float[Array, "b u v"]]:
    """The mean cross-entropy of the target's tokens, and its gradient with respect to the logits."""

    def mean_loss(logits: Array) -> Array:
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        counts = jnp.where(targets != IGNORED, weight[:, None], 0.0)
        return (each * counts).sum() / counts.sum()

    return jax.value_and_grad(mean_loss)(logits)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _update(
    optimizer: optax.GradientTransformation,
    weight_decay: float,
    clip: float,
    now: tuple[tuple[Params, ...], tuple[optax.OptState, ...]],
    grads: tuple[Params, ...],
    rate: Array,
) -> tuple[tuple[Params, ...], tuple[optax.OptState, ...]]:
    """One step of some parts of the parameters, clipped by their common norm. Donates `now`."""
    shrink = jnp.minimum(1.0, clip / jnp.maximum(optax.tree.norm(grads), 1e-12))
    updated, moved = [], []
    for own, own_moments, own_grads in zip(*now, grads, strict=True):
        own_grads = jax.tree.map(lambda g: g * shrink, own_grads)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer count
            updates, own_moments = optimizer.update(own_grads, own_moments, own)
        updated.append(
            jax.tree.map(
                lambda p, u, decays: p - rate * (u + (weight_decay * p if decays else 0.0)), own, updates, decayed(own)
            )
        )
        moved.append(own_moments)
    return tuple(updated), tuple(moved)


def _best(history: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    """The epoch, from 1, with the best mean of the primary metrics; the first of equals."""
    means = [np.mean([Evaluation.from_json(result).primary[1] for result in results]) for results in history]
    return int(np.argmax(means)) + 1

"""Teaches a student for whole epochs, and prunes it on the way if it is asked to; resumable to the same bits.

This is the loop around `jaxprune.training.distillation.distil_step`: rows in batches, AdamW, the metric on
dev every so many steps, and the best parameters that are as sparse as they are to be. The order of the rows and the
dropout are functions of the seed and the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxprune.checkpoints.folder import model_digest
from jaxprune.data.batches import default_length, encode, pack, training_batches
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Rows, Task, remove_leaks
from jaxprune.evaluation.evaluate import Evaluation, evaluate, fitting_head
from jaxprune.models import Model
from jaxprune.scoring.scores import describe
from jaxprune.sparse.masks import masks_of, sparsity_of
from jaxprune.sparse.matrices import linear_maps
from jaxprune.sparse.optimizer import SparsifyState, sparsify
from jaxprune.sparse.patterns import Pattern, Unstructured
from jaxprune.sparse.saliency import WeightCriterion, WeightMagnitude
from jaxprune.sparse.schedules import Schedule
from jaxprune.training.distillation import (
    PROJECTION,
    Distillation,
    distil_step,
    initialise_projection,
    joint_loss,
    start_student,
    without_projection,
)
from jaxprune.training.loop import Step, TrainingState, decayed, read_state, run_steps, write_state
from jaxprune.units import Params

COMPARED = 64  # rows on which the tokens of student and teacher are compared


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How a student is trained: AdamW at a constant rate, or a falling one, with the settings of SparseBERT."""

    epochs: int = 5
    steps: int | None = None  # instead of epochs
    batch_size: int = 32
    learning_rate: float = 3e-5  # per step
    decay: bool = False  # whether it falls linearly, to 0 after the last step; SparseBERT's stays
    weight_decay: float = 0.01  # decoupled; kernels and embeddings only
    clip: float = 1.0  # largest norm of the gradient over all parameters
    dropout: bool = True  # the student's; the teacher never has any
    max_length: int | None = None  # tokens; None: 128, or what the models read if that is less
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not self.learning_rate > 0 or self.weight_decay < 0 or not self.clip > 0:
            raise ValueError("learning_rate and clip must be positive, weight_decay at least 0.")

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of so many steps, without pruning."""
        rate = optax.linear_schedule(self.learning_rate, 0.0, steps) if self.decay else self.learning_rate
        adam = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-6, weight_decay=self.weight_decay, mask=decayed)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


@dataclass(frozen=True, kw_only=True)
class Thinning:
    """How a student is pruned while it learns."""

    schedule: Callable[[int], Schedule]  # of the number of steps, such as `partial(cubic_schedule, 0.95)`
    criterion: WeightCriterion | None = None  # None: `WeightMagnitude()`
    pattern: Pattern | None = None  # None: `Unstructured()`
    together: bool = False  # whether all matrices are ranked together

    def described(self, steps: int) -> dict[str, Any]:
        """All of it, for JSON, of a run of so many steps.

        Raises:
            ValueError: If the schedule is longer than the run.
        """
        schedule = self.schedule(steps)
        if schedule.steps[-1] > steps:
            raise ValueError(
                f"the schedule prunes until step {schedule.steps[-1]:,}, the training has {steps:,}: train longer, or "
                "let it end earlier."
            )
        criterion, pattern = describe(self.criterion or WeightMagnitude()), describe(self.pattern or Unstructured())
        how = {"criterion": criterion, "pattern": pattern, "together": self.together}
        return {"steps": list(schedule.steps), "sparsities": list(schedule.sparsities), **how}


class Exam(NamedTuple):
    """One evaluation of a student on dev."""

    step: int  # steps done
    sparsity: float | None  # of the linear maps; None: nothing is pruned
    losses: dict[str, float]  # of one batch of dev rows, without dropout, by the names of `Distillation`
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, ready for `json.dumps`."""
        return self._asdict() | {"evaluation": self.evaluation.to_json()}


class Taught(NamedTuple):
    """What `distil` returns."""

    model: Model  # with one task head
    params: Params  # those of the best exam
    exams: tuple[Exam, ...]  # in the order of their steps
    best: int  # the index of the exam with the best primary metric, of those at the last sparsity; the first of equals
    steps: int
    leaks: int  # train rows dropped because they are held out
    fresh_head: bool  # whether the student had no task head of its own


def distil(
    model: Model,
    student: Params,
    teacher_model: Model,
    teacher: Params,
    task: Task,
    *,
    settings: Distillation | None = None,
    recipe: Teaching | None = None,
    thinning: Thinning | None = None,
    keep_zeros: bool = False,
    head: str | None = None,
    heads: Mapping[str, Sequence[int]] | None = None,
    state: str | Path | None = None,
    save_every: int = 200,
    evaluate_every: int | None = None,
    dev_limit: int | None = 1000,
    progress: Callable[[Step], None] | None = None,
    report: Callable[[Exam], None] | None = None,
) -> Taught:
    """Teaches a student a task, and prunes it on the way if `thinning` says so.

    A student without a task head of the teacher's labels gets a fresh one in the teacher's form; all its other heads
    are left behind. A student of another width learns through a projection, which is dropped in the end. The same call
    with the same `state` goes on where an interrupted one stopped, and ends with the same bits.

    Args:
        model: The student's architecture.
        student: Its parameters: of a pre-trained model, or of one that was pruned.
        teacher_model: The teacher's architecture.
        teacher: Its parameters, fine-tuned on the task.
        task: The task, with train and dev rows. Labels are read for dev, and for the loss `labels`.
        settings: What to learn; None: `Distillation.sparse_bert`.
        recipe: How to train.
        thinning: How to prune the linear maps on the way; None: not at all.
        keep_zeros: Whether linear maps keep the zeros that they have; while it is pruned, too.
        head: The teacher's task head; None: the one of the task's name, or the only one.
        heads: Which of the teacher's heads the student has, see `surviving_heads`.
        state: File that holds a run in progress; None: it cannot be resumed. It is left in place at the end.
        save_every: Steps between two writings of the state.
        evaluate_every: Steps between two evaluations on dev; None: after each epoch. There is always one at the end.
        dev_limit: The most dev rows to evaluate.
        progress: Called every ten steps.
        report: Called after each evaluation.

    Returns:
        The student with its head, the parameters of its best exam, and how it got there.

    Raises:
        ValueError: If student and teacher do not read the same tokens or do not match otherwise, the task lacks rows,
            the schedule is longer than the training, or the state belongs to another run.
        KeyboardInterrupt: After the state was written, if there is a file for it.
    """
    recipe = recipe or Teaching()
    if task.spans:
        raise ValueError(f"{task.name!r} asks for spans, and losses are of labels: distil another task.")
    for split in ("train", "dev"):
        if not task.rows(split):
            raise ValueError(f"{task.name!r} has no {split} rows to distil with.")
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, got {evaluate_every}.")
    (cleaned,), leaks = remove_leaks([task])
    name = fitting_head(teacher_model, cleaned, head)
    settings = settings or Distillation.sparse_bert(regression=task.regression)
    key = jax.random.key(recipe.seed)
    taught, params, fresh = _with_head(
        model, student, teacher_model, None if teacher_model.answers_in_text else name, key
    )
    if taught.config.embed != teacher_model.config.embed and (settings.hidden or settings.embeddings):
        params = params | {PROJECTION: initialise_projection(taught, teacher_model, jax.random.fold_in(key, 2))}
    prompt = prompt_of(taught, cleaned)
    length = _length(recipe.max_length, taught, teacher_model)
    read = partial(encode, max_length=length, prompt=prompt)
    rows = read(taught, cleaned.rows("train"))
    _check_tokens(taught, teacher_model, cleaned, read)
    per_epoch = len(training_batches(rows, batch_size=recipe.batch_size, key=recipe.seed, epoch=0))
    steps = recipe.steps or recipe.epochs * per_epoch
    every = evaluate_every or per_epoch
    thinned = None if thinning is None else thinning.described(steps)
    optimizer = _optimizer(recipe, thinning, steps, taught, params, keep_zeros)
    run = {
        "recipe": asdict(recipe),
        "settings": describe(settings),
        "thinning": thinned,
        "keep_zeros": keep_zeros,
        "student": model_digest(taught, without_projection(params)),
        "teacher": model_digest(teacher_model, teacher),
        "head": name,
        "heads": {site: list(which) for site, which in (heads or {}).items()},
        "task": {split: cleaned.digest(split) for split in ("train", "dev")},
        "evaluated": [every, dev_limit],
    }
    teacher = jax.tree.map(jnp.asarray, teacher)
    now = start_student(params, optimizer)
    history: list[Any] = []
    file = None if state is None else Path(state)
    if file is not None and file.exists():
        now, history = read_state(file, now, run)
    lesson = pack(read(taught, cleaned.rows("dev")[: recipe.batch_size]), batch_size=recipe.batch_size)[0]

    def examine(now: TrainingState) -> Exam:
        own = without_projection(now.params)
        _, parts = joint_loss(taught, now.params, teacher_model, teacher, lesson, settings, head=name, heads=heads)
        result = evaluate(taught, own, cleaned, rows=Rows(split="dev", examples=dev_limit, max_length=length))
        pruned = now.moments["student"]
        sparsity = sparsity_of(pruned.masks).fraction if isinstance(pruned, SparsifyState) else None
        return Exam(now.done, sparsity, {part: float(loss) for part, loss in parts.items()}, result)

    last = 0 if thinned is None else thinned["steps"][-1]
    while True:
        if (
            now.done
            and (now.done % every == 0 or now.done == steps)
            and now.done not in [own["step"] for own in history]
        ):
            exam = examine(now)
            history.append(exam.to_json())
            if _best(history, last) == len(history) - 1:
                now = now._replace(best=jax.tree.map(jnp.copy, without_projection(now.params)))
            if file is not None:
                write_state(file, now, run, history)
            if report is not None:
                report(exam)
        if now.done >= steps:
            break
        epoch, position = divmod(now.done, per_epoch)
        batches = training_batches(rows, batch_size=recipe.batch_size, key=recipe.seed, epoch=epoch)

        def step(now: TrainingState, batches: Any = batches, start: int = now.done - position) -> Any:
            own = jax.random.fold_in(key, now.done) if recipe.dropout else None
            how = {"head": name, "heads": heads}
            now, (loss, _) = distil_step(
                taught, teacher_model, optimizer, settings, now, teacher, batches[now.done - start], own, **how
            )
            return now, loss

        end = min(steps, (epoch + 1) * per_epoch, (now.done // every + 1) * every)
        save = None if file is None else partial(write_state, file, run=run, history=history)
        now = run_steps(step, now, end, steps, epoch + 1, save, save_every, progress)
    return Taught(taught, now.best, tuple(map(_exam, history)), _best(history, last), steps, sum(leaks.values()), fresh)


def _with_head(
    model: Model, student: Params, teacher_model: Model, name: str | None, key: Array
) -> tuple[Model, Params, bool]:
    """The student with one task head: its own if that has the teacher's labels, else a fresh one in its form."""
    if model.answers_in_text != teacher_model.answers_in_text:
        raise ValueError("student and teacher must both be encoders or both text-to-text models.")
    if name is None:
        return model, student, False
    wanted = teacher_model.head(name)
    encoder = {part: own for part, own in student.items() if part != "heads"}
    if name in model.heads and (own := model.head(name)).labels == wanted.labels and own.kind == wanted.kind:
        return model.with_heads((own,)), encoder | {"heads": {name: student["heads"][name]}}, False
    fresh = model.with_heads((wanted,))
    return fresh, encoder | {"heads": {name: fresh.initialise_head(name, jax.random.fold_in(key, 1))}}, True


def _length(length: int | None, *models: Model) -> int:
    """The tokens to which texts are cut."""
    reach = min(own.max_length for own in models)
    if length is not None and length > reach:
        raise ValueError(f"max_length must be at most {reach}, what student and teacher read; got {length}.")
    return length or min(reach, *(default_length(own, False) for own in models))


def _check_tokens(model: Model, teacher_model: Model, task: Task, read: Callable[..., Any]) -> None:
    """Refuses a teacher that reads other tokens."""
    rows = task.rows("dev")[:COMPARED]
    ours, theirs = read(model, rows), read(teacher_model, rows)
    sizes = [own.config.vocab for own in (model, teacher_model)]
    same = all(np.array_equal(getattr(ours, part), getattr(theirs, part)) for part in ("input_ids", "offsets"))
    if sizes[0] != sizes[1] or not same:
        raise ValueError(
            f"student and teacher must read the same tokens: their vocabularies have {sizes[0]:,} and {sizes[1]:,} "
            f"entries, and {'the same' if same else 'other'} tokens come out of the first rows of {task.name!r}. Start "
            "from the pre-trained model that the teacher was fine-tuned from."
        )


def _optimizer(
    recipe: Teaching, thinning: Thinning | None, steps: int, model: Model, params: Params, keep_zeros: bool
) -> optax.GradientTransformation:
    """The optimizer, once for the whole run: another object would be compiled again."""
    if thinning is None and not keep_zeros:
        return recipe.optimizer(steps)
    masks = masks_of(params, linear_maps(model)) if keep_zeros else None
    how: dict[str, Any] = {"prunable": linear_maps(model), "masks": masks}
    if thinning is None:  # nothing more is pruned
        return sparsify(recipe.optimizer(steps), schedule=Schedule(steps=(1,), sparsities=(0.0,)), **how)
    how |= {"criterion": thinning.criterion, "pattern": thinning.pattern, "together": thinning.together}
    return sparsify(recipe.optimizer(steps), schedule=thinning.schedule(steps), **how)


def _best(history: Sequence[Mapping[str, Any]], last: int) -> int:
    """The index of the exam with the best primary metric, of those after the last pruning; -1: there is none."""
    values = [_exam(own).evaluation.primary[1] if own["step"] >= last else -np.inf for own in history]
    return -1 if np.isneginf(values).all() else int(np.argmax(values))


def _exam(fields: Mapping[str, Any]) -> Exam:
    return Exam(fields["step"], fields["sparsity"], fields["losses"], Evaluation.from_json(fields["evaluation"]))

"""Distillation: a student learns a task from its teacher, and becomes sparse on the way if it is asked to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxprune.checkpoints.files import COUNT, misfits_of
from jaxprune.checkpoints.gates import kept_units
from jaxprune.checkpoints.tensors import model_digest, versions
from jaxprune.data.batches import default_length, digest_encoded, digest_rows, encode, pack, training_batches
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Rows, Task, remove_leaks
from jaxprune.evaluation.evaluate import Evaluation, evaluate, fitting_head
from jaxprune.models import Model
from jaxprune.scoring.scores import describe
from jaxprune.sparse.masks import SparseState, WeightCriterion, WeightMagnitude, masks_of, sparse_optimizer, sparsity_of
from jaxprune.sparse.patterns import PROJECTION, Pattern, Unstructured, linear_maps
from jaxprune.sparse.schedules import Schedule
from jaxprune.training.finetuning import check_rows
from jaxprune.training.joint_loss import (
    HEADS,
    Distillation,
    Pair,
    initialise_projection,
    joint_loss,
    joint_loss_and_gradients,
    without_projection,
)
from jaxprune.training.loop import Run, Step, Training, TrainingState, train, trainable, update
from jaxprune.units import Params

COMPARED = 64  # rows on which the tokens of student and teacher are compared


@dataclass(frozen=True, kw_only=True)
class Sparsification:
    """Settings of a training in which weights of the linear maps become zero, and stay so."""

    schedule: Callable[[int], Schedule] | None = None  # of the number of steps; None: no more zeros than there are
    criterion: WeightCriterion = WeightMagnitude()
    pattern: Pattern = Unstructured()
    together: bool = False  # whether all matrices are ranked together, so that some lose more than others
    keep_zeros: bool = False  # whether weights that are zero at the beginning stay zero

    def schedule_of(self, steps: int) -> Schedule:
        """The schedule of a run of so many steps.

        Raises:
            ValueError: If it is longer than the run.
        """
        if self.schedule is None:
            return Schedule(steps=(1,), sparsities=(0.0,))
        schedule = self.schedule(steps)
        if schedule.steps[-1] > steps:
            raise ValueError(
                f"the schedule prunes until step {schedule.steps[-1]:,}, the training has {steps:,}: train longer, or "
                "let it end earlier."
            )
        return schedule

    def to_json(self, steps: int) -> dict[str, Any] | None:
        """The pruning of a run of so many steps, as plain values; None if there is none."""
        if self.schedule is None:
            return None
        schedule = self.schedule_of(steps)
        return {
            "steps": list(schedule.steps),
            "sparsities": list(schedule.sparsities),
            "criterion": describe(self.criterion),
            "pattern": describe(self.pattern),
            "together": self.together,
        }

    def wrap(
        self, optimizer: optax.GradientTransformation, steps: int, model: Model, params: Params
    ) -> optax.GradientTransformation:
        """The optimizer of a run of so many steps, which prunes if that is asked for."""
        if self.schedule is None and not self.keep_zeros:
            return optimizer
        maps = linear_maps(model)
        return sparse_optimizer(
            optimizer,
            schedule=self.schedule_of(steps),
            prunable=maps,
            criterion=self.criterion,
            pattern=Unstructured() if self.schedule is None else self.pattern,
            together=self.together,
            masks=masks_of(params, maps) if self.keep_zeros else None,
        )


# of the history; a loss may be infinite
_ENTRY = {"step": COUNT, "sparsity": (float, None), "losses": {...: object}, "evaluation": {...: object}}


class StudentEvaluation(NamedTuple):
    """One evaluation of a student on dev."""

    step: int  # steps done
    sparsity: float | None  # of the linear maps; None: nothing is pruned
    losses: dict[str, float]  # of one batch of dev rows, without dropout, by the names of `Distillation`
    evaluation: Evaluation

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> StudentEvaluation:
        """An entry of the training's history.

        Raises:
            ValueError: If it is none.
        """
        if problems := misfits_of(entry, _ENTRY):
            raise ValueError("; ".join(problems))
        fields: dict[str, Any] = dict(entry) | {"evaluation": Evaluation.from_json(entry["evaluation"])}
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, ready for `json.dumps`."""
        return self._asdict() | {"evaluation": self.evaluation.to_json()}


class Distilled(NamedTuple):
    """The result of `distill`."""

    model: Model  # with one task head
    params: Params  # of the best evaluation
    evaluations: tuple[StudentEvaluation, ...]  # in the order of their steps
    best: int  # the index of the best primary metric after the last pruning; the first of equals
    steps: int
    leaks: int  # train rows dropped because they are held out
    fresh_head: bool  # whether the student had no task head of its own


def distill(
    student: Pair,
    teacher: Pair,
    task: Task,
    distillation: Distillation | None = None,
    training: Training = Training(),
    *,
    sparsification: Sparsification = Sparsification(),
    state: str | Path | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Distilled:
    """Trains a student on a task to do as its teacher does; with a schedule in `sparsification` it becomes sparse.

    A student without a task head of the teacher's labels gets a fresh one in the teacher's form; all its other heads
    are left behind. A student of another width learns through a projection, which is dropped in the end. The same call
    with the same `state` resumes an interrupted run, and ends with the same bits.

    Args:
        student: Its model and parameters, as `load` returns them: a pre-trained model, or one that was pruned.
        teacher: The model that was fine-tuned on the task, and its parameters.
        task: The task, with train and dev rows. Labels are read for dev, and for the loss `labels`.
        distillation: What to learn; None: `Distillation.sparse_bert`.
        training: How to train.
        sparsification: How linear maps become sparse on the way; by default they do not.
        state: File that holds a run in progress; None: it cannot be resumed. It is left in place at the end.
        progress: Called every ten steps, and after each evaluation with the fields of a `StudentEvaluation`.

    Returns:
        The student with its head, the parameters of its best evaluation, and all evaluations.

    Raises:
        ValueError: If student and teacher do not read the same tokens or do not match otherwise, the task lacks rows,
            the schedule is longer than the training, or the state belongs to another run.
        KeyboardInterrupt: After the state was written, if there is a file for it.
    """
    teacher_model, teacher_params = teacher[0], jax.tree.map(jnp.asarray, teacher[1])
    if task.spans:
        raise ValueError(f"{task.name!r} asks for spans, and losses are of labels: distill another task.")
    (cleaned,), leaks = remove_leaks([task])
    check_rows([cleaned])
    distillation = distillation or Distillation.sparse_bert(regression=task.regression)
    distillation = replace(distillation, head=fitting_head(teacher_model, cleaned, distillation.head))
    key = jax.random.key(training.seed)
    model, params, fresh = _with_head(student, teacher_model, distillation.head, jax.random.fold_in(key, 1))
    if model.config.embed != teacher_model.config.embed and (distillation.hidden or distillation.embeddings):
        params = params | {PROJECTION: initialise_projection(model, teacher_model, jax.random.fold_in(key, 2))}
    length = _length(training.max_length, model, teacher_model)
    read = partial(encode, max_length=length, prompt=prompt_of(model, cleaned))
    rows = read(model, cleaned.rows("train"))
    rows.warn_if_cut(f"train texts of {task.name!r}")
    _check_tokens(model, teacher_model, cleaned, read)
    batches_of = partial(training_batches, rows, batch_size=training.batch_size, key=training.seed)
    per_epoch = len(batches_of(epoch=0))
    steps = training.steps or training.epochs * per_epoch
    pruning = sparsification.to_json(steps)
    optimizer = sparsification.wrap(training.optimizer_of(steps), steps, model, params)
    identity = {
        "training": training.to_json(),
        "distillation": describe(replace(distillation, heads=None)),
        "sparsification": [pruning, sparsification.keep_zeros],
        "student": model_digest(model, without_projection(params)),
        "teacher": model_digest(teacher_model, teacher_params),
        "heads": {site: list(which) for site, which in (distillation.heads or {}).items()},
        "task": {
            "labels": list(cleaned.labels),
            "train": digest_encoded(rows, cleaned.rows("train")),
            "dev": digest_rows(model, cleaned, Rows(split="dev", max_length=length)),
        },
        "versions": versions(),
    }
    compared = pack(read(model, cleaned.rows("dev")[: training.batch_size]), batch_size=training.batch_size)[0]
    dev = Rows(split="dev", examples=training.dev_limit, max_length=length)

    def step(now: TrainingState, batch: Mapping[str, Any]) -> tuple[TrainingState, Array]:
        own_key = jax.random.fold_in(key, now.done) if training.dropout else None
        pair = model, now.params
        (loss, _), grads = joint_loss_and_gradients(
            pair, (teacher_model, teacher_params), batch, distillation, key=own_key
        )
        return update(optimizer, now, grads), loss

    def evaluate_dev(now: TrainingState) -> dict[str, Any]:
        _, losses = joint_loss((model, now.params), (teacher_model, teacher_params), compared, distillation)
        return {
            "sparsity": sparsity_of(now.moments.masks).fraction if isinstance(now.moments, SparseState) else None,
            "losses": {name: float(loss) for name, loss in losses.items()},
            "evaluation": evaluate(model, without_projection(now.params), cleaned, rows=dev).to_json(),
        }

    def quality(entry: Mapping[str, Any]) -> float:
        if pruning is not None and entry["step"] < pruning["steps"][-1]:
            return -np.inf  # not yet as sparse as asked for
        return StudentEvaluation.from_json(entry).evaluation.primary[1]

    run = Run(
        identity=identity,
        steps=steps,
        batches=lambda epoch: batches_of(epoch=epoch),
        step=step,
        evaluate=evaluate_dev,
        evaluate_every=training.evaluate_every or per_epoch,
        quality=quality,
    )
    file, start = None if state is None else Path(state), trainable(params)
    begun = TrainingState(start, optimizer.init(start))
    done = train(run, begun, file=file, save_every=training.save_every, progress=progress)
    evaluations = tuple(map(StudentEvaluation.from_json, done.history))
    best = run.best(done.history)
    return Distilled(model, without_projection(done.best), evaluations, best, steps, sum(leaks.values()), fresh)


def surviving_heads(record: Mapping[str, Any], had: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
    """The heads of the dense model that a pruned one still has, from the record of one pruning.

    Args:
        record: What `pruning_record` returns, or `read_pruning` reads from a folder.
        had: Of a decoder whose groups were pruned, the query heads of the dense model by site, as `widths` gives them.

    Returns:
        For every site of heads (`"3.attention.heads"`, in decoders `"3.attention.query_heads"`) the indices in the
        dense model.
    """
    if "sites" not in record:
        raise ValueError(f"a record of a pruning has 'sites', this one has {sorted(record)}.")
    found: dict[str, tuple[int, ...]] = {}
    for name, site in record["sites"].items():
        module, _, kind = name.rpartition(".")
        groups, kept = kept_units(name, site)
        queries, rest = divmod((had or {}).get(f"{module}.query_heads", 0), max(groups, 1))
        if kind in HEADS:
            found[name] = tuple(kept.tolist())
        elif kind == "groups" and queries and not rest:
            found[f"{module}.query_heads"] = tuple((kept[:, None] * queries + np.arange(queries)).ravel().tolist())
    return found


def _with_head(student: Pair, teacher_model: Model, name: str | None, key: Array) -> tuple[Model, Params, bool]:
    """The student with one task head: its own if that has the teacher's labels, else a fresh one in its form."""
    model, params = student
    if model.answers_in_text != teacher_model.answers_in_text:
        raise ValueError("student and teacher must both be encoders or both text-to-text models.")
    if teacher_model.answers_in_text or name is None:
        return model, params, False
    wanted = teacher_model.head(name)
    encoder = {name: part for name, part in params.items() if name != "heads"}
    if name in model.heads and (head := model.head(name)).labels == wanted.labels and head.kind == wanted.kind:
        return model.with_heads((head,)), encoder | {"heads": {name: params["heads"][name]}}, False
    fresh = model.with_heads((wanted,))
    return fresh, encoder | {"heads": {name: fresh.initialise_head(name, key)}}, True


def _length(length: int | None, *models: Model) -> int:
    """The tokens to which texts are cut."""
    reach = min(model.max_length for model in models)
    if length is not None and length > reach:
        raise ValueError(f"max_length must be at most {reach}, what student and teacher read; got {length}.")
    return length or min(reach, *(default_length(model, False) for model in models))


def _check_tokens(model: Model, teacher_model: Model, task: Task, read: Callable[..., Any]) -> None:
    """Refuses a teacher that reads other tokens."""
    rows = task.rows("dev")[:COMPARED]
    ours, theirs = read(model, rows), read(teacher_model, rows)
    sizes = [reader.config.vocab for reader in (model, teacher_model)]
    same = all(np.array_equal(getattr(ours, part), getattr(theirs, part)) for part in ("input_ids", "offsets"))
    if sizes[0] != sizes[1] or not same:
        raise ValueError(
            f"student and teacher must read the same tokens: their vocabularies have {sizes[0]:,} and {sizes[1]:,} "
            f"entries, and {'the same' if same else 'other'} tokens come out of the first rows of {task.name!r}. Start "
            "from the pre-trained model that the teacher was fine-tuned from."
        )

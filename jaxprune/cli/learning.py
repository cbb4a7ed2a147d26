"""The commands that train models: fine-tune them, make them sparse, distil them; see `jaxprune.cli.app`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxprune.cli import terminal
from jaxprune.cli.options import (
    BatchOptions,
    Folder,
    Json,
    ModelName,
    OneTask,
    Overwrite,
    RowOptions,
    Tasks,
    choice,
    find,
    grouped,
    measured,
    numbers,
    option,
    training,
)

if TYPE_CHECKING:
    from jaxprune.cli.students import Schooling
    from jaxprune.sparse.patterns import Pattern
    from jaxprune.sparse.schedules import Schedule
    from jaxprune.training.distillation import Sparsification
    from jaxprune.training.joint_loss import Distillation
    from jaxprune.training.loop import Training

taught = partial(option, panel="What is learned")
zeroed = partial(option, panel="What becomes zero")
exchanged = partial(option, panel="Copies")

SPARSITY = 0.95  # of SparseBERT


@dataclass(frozen=True, kw_only=True)
class TeachingOptions:
    """How a student is trained and tested."""

    epochs: Annotated[int, training("Passes over the rows.")] = 5
    steps: Annotated[int | None, training("Instead of passes.")] = None
    learning_rate: Annotated[float, training("Of every step.")] = 3e-5
    decay: Annotated[bool, training("Let the learning rate fall linearly to 0.", "--decay")] = False
    dropout: Annotated[bool, training("Whether the student has it.", "--dropout/--no-dropout")] = True
    seed: Annotated[int, training("Of a new task head, the order of the rows and dropout.")] = 0
    evaluate_every: Annotated[
        int | None, training("Steps between two tests on dev; once an epoch by default.", metavar="STEPS")
    ] = None
    dev_limit: Annotated[int, training("The most dev rows to test on.")] = 1000
    half: Annotated[bool, training("Write the weights in half precision.", "--half")] = False
    packed: Annotated[
        str | None, training("Write no zeros: keep every bit, or round to a byte.", metavar="exact|int8")
    ] = None
    evaluate: Annotated[bool, measured("Test teacher and student in the end.", "--evaluate/--no-evaluate")] = True
    limit: Annotated[int | None, measured("The most test examples.")] = None

    def training(self, batches: BatchOptions) -> Training:
        """How to train."""
        from jaxprune.training.loop import Training

        return Training(
            epochs=self.epochs,
            steps=self.steps,
            learning_rate=self.learning_rate,
            decay=self.decay,
            dropout=self.dropout,
            seed=self.seed,
            evaluate_every=self.evaluate_every,
            dev_limit=self.dev_limit,
            **asdict(batches),
        )


@dataclass(frozen=True, kw_only=True)
class LessonOptions:
    """What a student learns from its teacher."""

    losses: Annotated[
        str | None,
        taught("Losses by commas, with weights; by default the first four.", metavar="attention,embeddings,hidden,..."),
    ] = None
    temperature: Annotated[float, taught("Of the logits.")] = 1.0
    layers: Annotated[str, choice("layers", "Which of the teacher's layers, for another depth", "What is learned")] = (
        "one-to-one"
    )
    head: Annotated[str | None, taught("The teacher's task head; by default the one of the task's name.")] = None

    def settings(self, regression: bool) -> Distillation:
        """What to learn.

        Raises:
            ValueError: If a loss is unknown, named twice, or its weight is no number.
        """
        from jaxprune.training.joint_loss import Distillation

        preset = Distillation.sparse_bert(regression=regression)
        weights: dict[str, Any] = {} if self.losses is None else _losses(self.losses)
        how: dict[str, Any] = {
            "temperature": self.temperature,
            "layers": find("layers", self.layers),
            "head": self.head,
        }
        return replace(preset, **how, **weights)


@dataclass(frozen=True, kw_only=True)
class ThinningOptions:
    """How weights become zero."""

    schedule: Annotated[str, choice("schedule", "How sparsity rises", "What becomes zero")] = "cubic"
    prune_from: Annotated[float, zeroed("Where in the training it begins, as a fraction.")] = 0.0
    prune_until: Annotated[float, zeroed("Where it ends; what follows is recovery.")] = 1.0
    prunings: Annotated[int, zeroed("How often, at even distances.")] = 100
    weights: Annotated[str, choice("weights", "Which go first", "What becomes zero")] = "magnitude"
    pattern: Annotated[
        str, zeroed("Any weights, N of M inputs, or whole blocks, such as 2:4 or 4x4.", metavar="any|N:M|RxC")
    ] = "any"
    together: Annotated[bool, zeroed("All matrices compete, or each loses the same.", "--global/--per-matrix")] = False

    def sparsification(self, sparsity: float | None) -> Sparsification:
        """How to prune on the way; None: to the sparsity of the pattern, or to that of SparseBERT.

        Raises:
            ValueError: If one of the options is none that there is.
        """
        from jaxprune.sparse.patterns import NM
        from jaxprune.sparse.schedules import check_sparsity
        from jaxprune.training.distillation import Sparsification

        pattern = read_pattern(self.pattern)
        if sparsity is None:
            sparsity = 1 - pattern.n / pattern.m if isinstance(pattern, NM) else SPARSITY
        check_sparsity("--sparsity", sparsity)
        if not 0 <= self.prune_from < self.prune_until <= 1:
            raise ValueError(
                f"--prune-from and --prune-until must be fractions of the training, the first below the second; "
                f"got {self.prune_from} and {self.prune_until}."
            )
        return Sparsification(
            schedule=partial(self._schedule, sparsity),
            criterion=find("weights", self.weights)(),
            pattern=pattern,
            together=self.together,
        )

    def _schedule(self, sparsity: float, steps: int) -> Schedule:
        """The schedule of a training of so many steps; what is pruned at once is pruned in the beginning."""
        begin, end = (round(where * steps) for where in (self.prune_from, self.prune_until))
        make = find("schedule", self.schedule)
        if self.schedule == "one-shot":
            return make(sparsity, max(1, begin))
        return make(sparsity, max(1, end), start=min(begin, max(1, end) - 1), prunings=self.prunings)


def read_pattern(text: str) -> Pattern:
    """Reads `any`, `2:4` (of four inputs two stay) or `4x4` (blocks of inputs and outputs).

    Raises:
        ValueError: If it is something else.
    """
    from jaxprune.sparse.patterns import NM, Block, Unstructured

    if text == "any":
        return Unstructured()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(n=int(found[1]), m=int(found[2]))
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(inputs=int(found[1]), outputs=int(found[2]))
    raise ValueError(f"--pattern is any, N:M such as 2:4, or inputs x outputs of a block such as 4x4; got {text!r}.")


def _losses(text: str) -> dict[str, float]:
    """Reads `attention,hidden=0.5`: the weights of all losses, 0 for those that are not named."""
    from jaxprune.training.joint_loss import WEIGHTS

    found: dict[str, float] = dict.fromkeys(map(str, WEIGHTS), 0.0)
    seen = set()
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            value = float(weight or 1.0)
        except ValueError:
            value = float("nan")
        if name not in WEIGHTS or name in seen or not 0 <= value < float("inf"):
            raise ValueError(
                f"--losses takes {', '.join(WEIGHTS)} by commas, each once and with =WEIGHT if that is not 1; "
                f"got {part.strip()!r}."
            )
        seen.add(name)
        found[name] = value
    return found


@grouped
def finetune(
    encoder: ModelName,
    task: Tasks,
    output: Folder,
    rows: RowOptions,
    batches: BatchOptions,
    epochs: Annotated[int, training("Passes over the rows.")] = 3,
    learning_rate: Annotated[float, training("At its peak.")] = 5e-5,
    optimizer: Annotated[
        str, training("Adafactor's rate is relative to each parameter.", metavar="adamw|adafactor")
    ] = "adamw",
    rows_of: Annotated[
        list[str] | None, training("Rows of a task in an epoch; all by default.", "--rows", metavar="sst2=20000")
    ] = None,
    pooling: Annotated[str, training("Of the new task heads.", metavar="first|mean")] = "mean",
    dense: Annotated[
        str | None, training("A layer before their output, by its activation.", metavar="tanh|relu")
    ] = None,
    seed: Annotated[int, training("Of the new heads, the order of the rows and dropout.")] = 0,
    dev_limit: Annotated[int, training("The most dev rows of a task to test on after an epoch.")] = 1000,
    keep_heads: Annotated[
        bool, training("Keep other task heads; the encoder changes under them.", "--keep-heads")
    ] = False,
    half: Annotated[bool, training("Write the weights in half precision.", "--half")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tunes one model on several tasks at once: an encoder with a task head each, or T5 with their prompts.

    Example: [cyan]jaxprune finetune ENCODER --task sst2 --task mrpc --data data -o multi[/cyan]

    Rows that any of the tasks holds out are dropped from the training rows of all. The run is kept in OUTPUT.state.
    Own files in SQuAD's format (question, context, answers) train a head that marks the answer in the context.
    """
    with terminal.working() as bars:
        from jaxprune.cli import workflow
        from jaxprune.cli.render import tables
        from jaxprune.training.finetuning import FineTuning

        settings = FineTuning(
            epochs=epochs,
            learning_rate=learning_rate,
            optimizer=optimizer,
            rows=numbers("--rows", rows_of) or None,
            pooling=pooling,
            dense=dense,
            seed=seed,
            dev_limit=dev_limit,
            keep_heads=keep_heads,
            **asdict(batches),
        )
        record = workflow.finetune_model(
            encoder,
            [rows.of(name) for name in task],
            output,
            settings,
            dtype="float16" if half else None,
            overwrite=overwrite,
            watch=bars,
        )
    best = record["best_epoch"]
    table = tables.evaluation_table(record["epochs"][best - 1], f"epoch {best}, the best on dev")
    terminal.show(record, table, f"Model: {output}", as_json=as_json)


Teacher = Annotated[str, taught("The model that was fine-tuned on the task.", "--teacher", metavar="MODEL")]


@grouped
def sparsify(
    student: ModelName,
    teacher: Teacher,
    task: OneTask,
    output: Folder,
    rows: RowOptions,
    batches: BatchOptions,
    teaching: TeachingOptions,
    lessons: LessonOptions,
    thinning: ThinningOptions,
    sparsity: Annotated[
        float | None, zeroed("Fraction of the layers' weights that become zero; 0.95 by default, or the pattern's.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Makes a pre-trained model sparse while it learns from a fine-tuned teacher (SparseBERT).

    Example: [cyan]jaxprune sparsify PRETRAINED --teacher FINETUNED --task mrpc --data data -o sparse[/cyan]

    The student is the model that the teacher was fine-tuned from. The run is kept in OUTPUT.state.
    """
    with terminal.working() as bars:
        from jaxprune.cli.students import Schooling

        how = Schooling(settings=_settings(lessons), sparsification=thinning.sparsification(sparsity))
        record = _teach(student, teacher, rows.of(task), output, batches, teaching, how, overwrite, bars)
    _show(record, output, as_json)


@grouped
def distill(
    student: ModelName,
    teacher: Teacher,
    task: OneTask,
    output: Folder,
    rows: RowOptions,
    batches: BatchOptions,
    teaching: TeachingOptions,
    lessons: LessonOptions,
    keep_zeros: Annotated[bool, zeroed("Weights that are zero stay zero.", "--keep-zeros")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Lets a smaller model learn from its teacher, such as one that was pruned from it.

    Examples: [cyan]jaxprune distill small --teacher multi --task sst2 --data data -o better[/cyan] after a pruning.
    [cyan]jaxprune distill sparse --teacher multi --task sst2 --data data --keep-zeros -o better[/cyan]

    A pruned student says in its record which heads it has left. The run is kept in OUTPUT.state.
    """
    with terminal.working() as bars:
        from jaxprune.cli.students import Schooling
        from jaxprune.training.distillation import Sparsification

        how = Schooling(settings=_settings(lessons), sparsification=Sparsification(keep_zeros=keep_zeros))
        record = _teach(student, teacher, rows.of(task), output, batches, teaching, how, overwrite, bars)
    _show(record, output, as_json)


def _settings(lessons: LessonOptions) -> Callable[[bool], Distillation]:
    for regression in (False, True):
        lessons.settings(regression)  # refuses what is wrong before anything is read
    return lessons.settings


def _teach(
    student: str,
    teacher: str,
    data: Any,
    output: Path,
    batches: BatchOptions,
    teaching: TeachingOptions,
    how: Schooling,
    overwrite: bool,
    watch: Any,
) -> dict[str, Any]:
    if teaching.packed not in (None, "exact", "int8"):
        raise ValueError(f"--packed is exact or int8, got {teaching.packed!r}.")
    from jaxprune.cli import students, workflow

    measuring = workflow.Measuring(evaluate=teaching.evaluate, limit=teaching.limit, batch_size=batches.batch_size)
    return students.teach_model(
        student,
        teacher,
        data,
        output,
        teaching.training(batches),
        how,
        measuring=measuring,
        dtype="float16" if teaching.half else None,
        packed=teaching.packed,  # pyright: ignore[reportArgumentType]
        overwrite=overwrite,
        watch=watch,
    )


def _show(record: dict[str, Any], output: Path, as_json: bool) -> None:
    from jaxprune.cli.render import tables

    shown = tables.exams_table(record), tables.student_table(record)
    lines = (tables.student_note(record), f"Model: {output}")
    terminal.show(record, *shown, *lines, as_json=as_json)


@grouped
def augment(
    model: ModelName,
    task: OneTask,
    output: Annotated[Path, option("The folder of data sets to write to.", "--output", "-o", metavar="FOLDER")],
    rows: RowOptions,
    copies: Annotated[int, exchanged("Of each train row.")] = 20,
    probability: Annotated[float, exchanged("That a word is exchanged.")] = 0.4,
    candidates: Annotated[int, exchanged("The most similar words that it may become.")] = 15,
    frequent: Annotated[int, exchanged("Words that always stay: the most frequent ones.")] = 50,
    seed: Annotated[int, exchanged("Of what becomes what.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Writes more train rows: copies with words exchanged for others of a similar vector in the model.

    Examples: [cyan]jaxprune augment PRETRAINED --task mrpc --data data -o more[/cyan] and then
    [cyan]jaxprune sparsify PRETRAINED --teacher FINETUNED --task mrpc --data more -o sparse[/cyan]

    Copies keep the label of their row, which may not be true any more: they are for students, who ask their teacher.
    Dev, test and calibration rows are written as they are, and none of their texts is among the copies.
    """
    with terminal.working() as bars:
        from jaxprune.cli.augmentation import augment_model
        from jaxprune.data.augmentation import Augmentation

        settings = Augmentation(
            copies=copies, probability=probability, candidates=candidates, frequent=frequent, seed=seed
        )
        record = augment_model(model, rows.of(task), output, settings, overwrite=overwrite, watch=bars)
    from jaxprune.cli.render import tables

    line = f"Data:   {output}, for --data; task {record['task']}"
    terminal.show(record, tables.augmentation_table(record), line, as_json=as_json)

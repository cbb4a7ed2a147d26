"""The commands that train models, and what they train with: finetune, sparsify, distill, augment."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jaxprune as jp
from jaxprune.checkpoints.files import COUNT
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
    build,
    choice,
    find,
    grouped,
    measured,
    numbers,
    option,
    say_fewer,
    training,
    whole,
)

if TYPE_CHECKING:
    from jaxprune.data.augmentation import Augmentation
    from jaxprune.data.splits import Example
    from jaxprune.evaluation.evaluate import Evaluation
    from jaxprune.models import Model
    from jaxprune.sparse.patterns import Pattern
    from jaxprune.sparse.schedules import Schedule
    from jaxprune.training.loop import Step
    from jaxprune.units import Params

    Pair = tuple[Model, Params]

learned = partial(option, panel="Learning from the teacher")
zeroed = partial(option, panel="Sparsity")
exchanged = partial(option, panel="Copies")

SPARSITY = 0.95  # of SparseBERT
FINETUNING = "finetuning.json"  # in the folder of a fine-tuned model: how it was made, and how well it does
DISTILLATION = "distillation.json"  # in the folder of a student, likewise
AUGMENTATION = "augmentation.json"  # beside rows with copies: how these were made
_AUGMENTED = {  # what is read of it
    "task": str, "train_rows": COUNT, "sizes": {"train": COUNT, ...: COUNT}, "examples": [{...: object}],
    "settings": object, "embeddings": str, "rows": object, ...: object,
}  # fmt: skip
FILES = {"train": "train", "calibration": "calibration", "dev": "validation", "test": "test"}

Half = Annotated[bool, training("Write the weights in half precision.", "--half")]
Teacher = Annotated[str, learned("The model that was fine-tuned on the task.", "--teacher", metavar="MODEL")]


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions:
    """The settings of a fine-tuning."""

    epochs: Annotated[int, training("Passes over the rows.")] = 3
    learning_rate: Annotated[float, training("At its peak.")] = 5e-5
    optimizer: Annotated[
        str, training("Adafactor's rate is relative to each parameter.", metavar="adamw|adafactor")
    ] = "adamw"
    rows_of: Annotated[
        list[str] | None, training("Rows of a task in an epoch; all by default.", "--rows", metavar="sst2=20000")
    ] = None
    pooling: Annotated[str, training("Of the new task heads.", metavar="first|mean|last")] = "mean"
    dense: Annotated[str | None, training("A layer before their output, by its activation.", metavar="tanh|relu")] = (
        None
    )
    seed: Annotated[int, training("Of the new heads, the order of the rows and dropout.", least=0)] = 0
    dev_limit: Annotated[int, training("The most dev rows of a task to test on after an epoch.")] = 1000
    keep_heads: Annotated[bool, training("Keep other task heads; the encoder changes under them.", "--keep-heads")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The training and the tests of a student."""

    epochs: Annotated[int, training("Passes over the rows.")] = 5
    steps: Annotated[int | None, training("Instead of passes.")] = None
    learning_rate: Annotated[float, training("Of every step.")] = 3e-5
    decay: Annotated[bool, training("Let the learning rate fall linearly to 0.", "--decay")] = False
    dropout: Annotated[bool, training("Whether the student has it.", "--dropout/--no-dropout")] = True
    seed: Annotated[int, training("Of a new task head, the order of the rows and dropout.", least=0)] = 0
    evaluate_every: Annotated[
        int | None, training("Steps between two tests on dev; once an epoch by default.", metavar="STEPS")
    ] = None
    dev_limit: Annotated[int, training("The most dev rows to test on.")] = 1000
    half: Half = False
    packed: Annotated[
        str | None, training("Write no zeros: keep every bit, or round to a byte.", metavar="exact|int8")
    ] = None
    evaluate: Annotated[bool, measured("Test teacher and student at the end.", "--evaluate/--no-evaluate")] = True
    limit: Annotated[int | None, measured("The most test examples.")] = None

    def stored(self) -> dict[str, Any]:
        """The form of the weights in the file, as arguments of `save`."""
        if self.packed not in (None, "exact", "int8"):
            raise ValueError(f"--packed is exact or int8, got {self.packed!r}.")
        return {"dtype": "float16" if self.half else None, "packed": self.packed}


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """The losses between a student and its teacher."""

    losses: Annotated[
        str | None,
        learned(
            "Losses by commas, with weights; the first four by default.", metavar="attention,embeddings,hidden,..."
        ),
    ] = None
    temperature: Annotated[float, learned("Of the logits.")] = 1.0
    layers: Annotated[
        str, choice("layers", "The teacher's layers to learn from, for another depth", "Learning from the teacher")
    ] = "one-to-one"
    head: Annotated[str | None, learned("The teacher's task head; by default the one of the task's name.")] = None

    def build(self, *, regression: bool = False) -> jp.Distillation:
        """The settings for a classification or a regression.

        Raises:
            ValueError: If a loss is unknown, named twice, or its weight is no number.
        """
        weights: dict[str, Any] = {} if self.losses is None else read_losses(self.losses)
        settings: dict[str, Any] = {"temperature": self.temperature, "layers": find("layers", self.layers)}
        return replace(jp.Distillation.sparse_bert(regression=regression), head=self.head, **settings, **weights)


@dataclass(frozen=True, kw_only=True)
class SparsificationOptions:
    """The zeros that a training makes."""

    sparsity: Annotated[
        float | None, zeroed("Fraction of the layers' weights that become zero; 0.95 by default, or the pattern's.")
    ] = None
    schedule: Annotated[str, choice("schedule", "How sparsity rises", "Sparsity")] = "cubic"
    prune_from: Annotated[float, zeroed("Where in the training it begins, as a fraction.")] = 0.0
    prune_until: Annotated[float, zeroed("Where it ends; what follows is recovery.")] = 1.0
    prunings: Annotated[int, zeroed("How often, at even distances.")] = 100
    weights: Annotated[str, choice("weights", "Weights that go first", "Sparsity")] = "magnitude"
    pattern: Annotated[
        str, zeroed("Any weights, N of M inputs, or whole blocks, such as 2:4 or 4x4.", metavar="any|N:M|RxC")
    ] = "any"
    together: Annotated[bool, zeroed("All matrices compete, or each loses the same.", "--global/--per-matrix")] = False

    def build(self) -> jp.Sparsification:
        """The settings; without a sparsity, that of the pattern or of SparseBERT.

        Raises:
            ValueError: If one of the options is not possible.
        """
        pattern, sparsity = read_pattern(self.pattern), self.sparsity
        if sparsity is None:
            sparsity = 1 - pattern.n / pattern.m if isinstance(pattern, jp.patterns.NM) else SPARSITY
        jp.schedules.check_sparsity("--sparsity", sparsity)
        if not 0 <= self.prune_from < self.prune_until <= 1:
            raise ValueError(
                f"--prune-from and --prune-until must be fractions of the training, the first below the second; "
                f"got {self.prune_from} and {self.prune_until}."
            )
        schedule, criterion = partial(self._schedule, sparsity), find("weights", self.weights)()
        return jp.Sparsification(schedule=schedule, criterion=criterion, pattern=pattern, together=self.together)

    def _schedule(self, sparsity: float, steps: int) -> Schedule:
        """The schedule of a training of so many steps; what is pruned at once is pruned in the beginning."""
        begin, end = (round(where * steps) for where in (self.prune_from, self.prune_until))
        make = find("schedule", self.schedule)
        if self.schedule == "one-shot":
            return make(sparsity, max(1, begin))
        return make(sparsity, max(1, end), start=min(begin, max(1, end) - 1), prunings=self.prunings)


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """The copies of train rows."""

    copies: Annotated[int, exchanged("Of each train row.")] = 20
    probability: Annotated[float, exchanged("That a word is exchanged.")] = 0.4
    candidates: Annotated[int, exchanged("The most similar words that it may become.")] = 15
    frequent: Annotated[int, exchanged("Words that always stay: the most frequent ones.", least=0)] = 50
    seed: Annotated[int, exchanged("Of the choice of words.", least=0)] = 0


def read_pattern(text: str) -> Pattern:
    """Reads `any`, `2:4` (of four inputs two stay) or `4x4` (blocks of inputs and outputs).

    Raises:
        ValueError: If it is something else.
    """
    if text == "any":
        return jp.patterns.Unstructured()
    if match := re.fullmatch(r"(\d+)([:x])(\d+)", text, re.ASCII):
        first, second = whole("--pattern", match[1], 1), whole("--pattern", match[3], 1)
        return jp.patterns.NM(n=first, m=second) if match[2] == ":" else jp.patterns.Block(inputs=first, outputs=second)
    raise ValueError(f"--pattern is any, N:M such as 2:4, or inputs x outputs of a block such as 4x4; got {text!r}.")


def read_losses(text: str) -> dict[str, float]:
    """Reads `attention,hidden=0.5`: the weights of all losses, 0 for those that are not named."""
    from jaxprune.training.joint_loss import WEIGHTS

    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            value = float(weight or 1.0)
        except ValueError:
            value = float("nan")
        if name not in WEIGHTS or name in weights or not 0 <= value < float("inf"):
            raise ValueError(
                f"--losses takes {', '.join(WEIGHTS)} by commas, each once and with =WEIGHT if that is not 1; "
                f"got {part.strip()!r}."
            )
        weights[name] = value
    return dict.fromkeys(map(str, WEIGHTS), 0.0) | weights


@grouped
def finetune(
    encoder: ModelName,
    task: Tasks,
    output: Folder,
    rows: RowOptions,
    batches: BatchOptions,
    options: FineTuningOptions,
    half: Half = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tunes one model on several tasks at once: an encoder with a task head each, or T5 with their prompts.

    Example: [cyan]jaxprune finetune ENCODER --task sst2 --task mrpc --data data -o multi[/cyan]

    Rows that any of the tasks holds out are dropped from the training rows of all. The run is kept in OUTPUT.state.
    Own files in SQuAD's format (question, context, answers) train a head that marks the answer in the context.
    """
    with terminal.working() as bars:
        from jaxprune.checkpoints.files import check_file
        from jaxprune.checkpoints.folder import check_destination
        from jaxprune.checkpoints.tensors import model_digest
        from jaxprune.cli.render import tables
        from jaxprune.data.tasks import remove_leaks

        settings = build(jp.FineTuning, options, batches, rows=numbers("--rows", options.rows_of) or None)
        check_destination(output, overwrite)
        state = state_of(output)
        check_file(state, True)
        model, params = jp.load(encoder)
        tasks, leaks = remove_leaks([rows.load(name, bars) for name in task])
        for (name, other), count in leaks.items():
            bars.say(f"{name}: {count:,} rows dropped, held out in {other}")
        for each in tasks:
            say_fewer(bars, options.dev_limit, each, "dev", FineTuningOptions.dev_limit, "--dev-limit")
        bar = bars.open("fine-tuning")

        def progress(step: Step) -> None:
            epoch = f"epoch {step.epoch} of {settings.epochs}"
            bar(step.step, step.steps, f"{epoch}, loss {step.loss:.4f}")
            if step.evaluation is not None:
                bars.say(tables.evaluation_table(step.evaluation["results"], f"{epoch}, dev"))

        done = jp.finetune(model, params, tasks, settings, state=state, progress=progress)
        for name, count in done.cut_off.items():
            bars.say(f"{name}: {count:,} train rows left out, their answer is cut off; --max-length reaches further")
        record = {
            "command": "finetune",
            "source": encoder,
            "output": str(output),
            "recipe": settings.to_json(),
            "best_epoch": done.best + 1,
            "epochs": [[result.to_json() for result in epoch] for epoch in done.evaluations],
            "leaks": [{"task": name, "held_out_in": other, "rows": count} for (name, other), count in leaks.items()],
            "tasks": {
                each.name: {
                    "source": each.source,
                    "license": each.license,
                    "rows": each.sizes,
                    **({"cut_off": done.cut_off.get(each.name, 0)} if each.spans else {}),
                    "digests": {split: each.digest(split) for split in each.splits},
                }
                for each in tasks
            },
            "model": model_digest(done.model, done.params),
        }
        extra, dtype = {FINETUNING: as_file(record)}, "float16" if half else None
        jp.save(output, done.model, done.params, extra=extra, overwrite=overwrite, dtype=dtype)
        state.unlink(missing_ok=True)
    best = done.best
    table = tables.evaluation_table(record["epochs"][best], f"epoch {best + 1}, the best on dev")
    terminal.show(record, table, f"Model: {output}", as_json=as_json)


def state_of(output: Path) -> Path:
    """The file that an unfinished training is kept in."""
    return output.with_name(f"{output.name}.state")


def as_file(record: Mapping[str, Any]) -> bytes:
    """A record as the content of a JSON file."""
    return (json.dumps(record, indent=1) + "\n").encode()


@grouped
def sparsify(
    student: ModelName,
    teacher: Teacher,
    task: OneTask,
    output: Folder,
    rows: RowOptions,
    batches: BatchOptions,
    options: TrainingOptions,
    distillation: DistillationOptions,
    zeros: SparsificationOptions,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Makes a pre-trained model sparse while it learns from a fine-tuned teacher (SparseBERT).

    Example: [cyan]jaxprune sparsify PRETRAINED --teacher FINETUNED --task mrpc --data data -o sparse[/cyan]

    The student is the model that the teacher was fine-tuned from. The run is kept in OUTPUT.state.
    """
    with terminal.working() as bars:
        student_run = StudentRun(student, teacher, output, batches, options, distillation, overwrite)
        record = student_run.train(lambda *of: rows.load(task, bars, *of), zeros.build(), bars)
    show_student(record, output, as_json)


@grouped
def distill(
    student: ModelName,
    teacher: Teacher,
    task: OneTask,
    output: Folder,
    rows: RowOptions,
    batches: BatchOptions,
    options: TrainingOptions,
    distillation: DistillationOptions,
    keep_zeros: Annotated[bool, zeroed("Weights that are zero stay zero.", "--keep-zeros")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Lets a smaller model learn from its teacher, such as one that was pruned from it.

    Examples: [cyan]jaxprune distill small --teacher multi --task sst2 --data data -o better[/cyan] after a pruning.
    [cyan]jaxprune distill sparse --teacher multi --task sst2 --data data --keep-zeros -o better[/cyan]

    The record of a pruned student says which heads it has left. The run is kept in OUTPUT.state.
    """
    with terminal.working() as bars:
        student_run = StudentRun(student, teacher, output, batches, options, distillation, overwrite)
        record = student_run.train(
            lambda *of: rows.load(task, bars, *of), jp.Sparsification(keep_zeros=keep_zeros), bars
        )
    show_student(record, output, as_json)


def show_student(record: dict[str, Any], output: Path, as_json: bool) -> None:
    """Shows a student beside its teacher."""
    from jaxprune.cli.render import tables

    shown = tables.evaluations_table(record), tables.student_table(record), tables.student_note(record)
    terminal.show(record, *shown, f"Model: {output}", as_json=as_json)


@dataclass(frozen=True)
class StudentRun:
    """The training of a student, whose folder is written in the end; the run is kept in `OUTPUT.state` until then."""

    source: str
    teacher: str
    output: Path
    batches: BatchOptions
    options: TrainingOptions
    distillation: DistillationOptions
    overwrite: bool

    def train(
        self, load_task: Callable[..., jp.Task], sparsification: jp.Sparsification, bars: terminal.Bars
    ) -> dict[str, Any]:
        """Trains the student, tests it and its teacher, and writes it.

        It is tested as it is written, rounded if it is.
        """
        from jaxprune.checkpoints.files import check_file
        from jaxprune.checkpoints.folder import as_loaded, check_destination
        from jaxprune.checkpoints.shared import pruning_of
        from jaxprune.checkpoints.tensors import model_digest
        from jaxprune.data.prompts import prompt_of
        from jaxprune.evaluation.evaluate import fitting_head
        from jaxprune.scoring.scores import describe

        training, stored = build(jp.Training, self.options, self.batches), self.options.stored()
        self.distillation.build()  # refuses what is wrong before anything is read
        check_destination(self.output, self.overwrite)
        check_file(state_of(self.output), True)
        pairs = {"teacher": jp.load(self.teacher), "student": jp.load(self.source)}
        model, student = pairs["student"]
        task = load_task(pairs["teacher"][0], self.distillation.head)
        say_fewer(bars, self.options.dev_limit, task, "dev", TrainingOptions.dev_limit, "--dev-limit")
        if self.options.evaluate:
            say_fewer(bars, self.options.limit, task, "test")
        settings, pruning = self.distillation.build(regression=task.regression), pruning_of(self.source, model)
        head = fitting_head(pairs["teacher"][0], task, settings.head)
        done = jp.distill(
            pairs["student"],
            pairs["teacher"],
            task,
            replace(settings, head=head, heads=_surviving_heads(pruning, pairs)),
            training,
            sparsification=sparsification,
            state=state_of(self.output),
            progress=_show_steps(sparsification, bars),
        )
        if done.fresh_head:
            bars.say(f"the student had no task head for {task.name}: it got a fresh one in the teacher's form")
        if done.leaks:
            bars.say(f"{task.name}: {done.leaks:,} train rows dropped, held out")
        written = as_loaded(done.model, done.params, **stored)
        digests = {"student": model_digest(model, student), "teacher": model_digest(*pairs["teacher"])}
        pairs["student"] = (done.model, written)
        known = {"student": done.evaluations[done.best].evaluation} if written is done.params else {}
        prompt = prompt_of(done.model, task)
        record = {
            "command": "distill" if sparsification.schedule is None else "sparsify",
            "source": self.source,
            "teacher": self.teacher,
            "output": str(self.output),
            "task": task.name,
            "head": head,
            "heads": list(done.model.heads),
            "labels": list(task.labels),
            "prompt": None if prompt is None else prompt.to_json(),
            "recipe": training.to_json(),
            "settings": describe(replace(settings, head=None)),
            "thinning": sparsification.to_json(done.steps),
            "keep_zeros": sparsification.keep_zeros,
            "stored": stored | {"dtype": stored["dtype"] or "float32"},
            "steps": done.steps,
            "exams": [evaluation.to_json() for evaluation in done.evaluations],
            "best": done.best,
            "leaks": done.leaks,
            "fresh_head": done.fresh_head,
            "rows": task.sizes,
            "digests": {split: task.digest(split) for split in task.splits},
            "results": self._tested(pairs, task, head, known, bars),
            "weights": {who: count_weights(*pair) for who, pair in pairs.items()},
            "models": digests | {"result": model_digest(*pairs["student"])},
        }
        return self._write(done.model, done.params, pruning, record, stored)

    def _write(
        self, model: Model, params: Params, pruning: dict[str, Any] | None, record: dict[str, Any], stored: Any
    ) -> dict[str, Any]:
        """Writes the folder, with a card and a picture."""
        from jaxprune.checkpoints.folder import split_task
        from jaxprune.cli.render.cards import CARD, LEARNED, student_card
        from jaxprune.cli.render.pictures import training_picture
        from jaxprune.models.cost import file_size

        on_hub = not Path(split_task(self.source)[0]).expanduser().exists()
        extra = {
            DISTILLATION: as_file(record),
            CARD: student_card(record, on_hub=on_hub).encode(),
            LEARNED: training_picture(record),
        }
        if pruning is not None:
            pruning = {part: value for part, value in pruning.items() if part != "pruned"}  # `save` says that anew
        jp.save(self.output, model, params, pruning=pruning, overwrite=self.overwrite, extra=extra, **stored)
        state_of(self.output).unlink(missing_ok=True)
        return record | {"file_bytes": file_size(self.output)}

    def _tested(
        self, pairs: Mapping[str, Pair], task: jp.Task, head: str, known: Mapping[str, Evaluation], bars: terminal.Bars
    ) -> dict[str, dict[str, Any]]:
        """Every model on dev, where it is not `known` already, and on test, if that is asked for and there are rows."""
        from jaxprune.data.tasks import remove_leaks

        (clean,), _ = remove_leaks([task])
        limits: dict[str, int | None] = {"dev": self.options.dev_limit}
        if self.options.evaluate and clean.rows("test"):
            limits["test"] = self.options.limit
        results: dict[str, dict[str, Any]] = {who: {} for who in pairs}
        for who, pair in pairs.items():
            for split, limit in limits.items():
                result = known.get(who) if split == "dev" else None
                if result is None:
                    bar = bars.open(f"testing the {who} on {split}")
                    rows = jp.Rows(split=split, examples=limit, **asdict(self.batches))
                    result = jp.evaluate(*pair, clean, rows=rows, head=head, progress=bar)
                results[who][split] = result.to_json()
        return results


def _show_steps(sparsification: jp.Sparsification, bars: terminal.Bars) -> Any:
    """Shows the steps of a training, and its evaluations on dev."""
    from jaxprune.cli.render.tables import evaluation_line

    bar = bars.open("distilling")

    def progress(step: Step) -> None:
        sparse = ""
        if sparsification.schedule is not None:
            schedule = sparsification.schedule_of(step.steps)
            pairs = zip(schedule.steps, schedule.sparsities, strict=True)
            reached = [sparsity for at, sparsity in pairs if at <= step.step] or [0.0]
            sparse = f", {100 * reached[-1]:.1f} % zero"
        bar(step.step, step.steps, f"epoch {step.epoch}, loss {step.loss:.4f}{sparse}")
        if step.evaluation is not None:
            bars.say(evaluation_line(step.evaluation))

    return progress


def count_weights(model: Model, params: Params) -> dict[str, int]:
    """Counts weights, and those that are not zero: in the linear maps of the layers, and in the model."""
    from jaxprune.sparse.masks import sparsity_of
    from jaxprune.sparse.patterns import linear_maps

    maps, every = sparsity_of(params, linear_maps(model)), sparsity_of(params)
    return {
        "linear_maps": maps.size,
        "linear_maps_not_zero": maps.size - maps.zeros,
        "parameters": jp.parameters(params),
        "parameters_not_zero": every.size - every.zeros,
    }


def _surviving_heads(record: Mapping[str, Any] | None, pairs: Mapping[str, Pair]) -> Mapping[str, tuple[int, ...]]:
    """The teacher's heads that a pruned student has, by its record, where it has fewer and was cut from as many."""
    from jaxprune.training.distillation import surviving_heads
    from jaxprune.training.joint_loss import HEADS
    from jaxprune.units import widths

    if record is None or "sites" not in record:
        return {}
    ours, theirs = (widths(model.axes, params, HEADS) for model, params in (pairs["student"], pairs["teacher"]))
    found = surviving_heads(record, theirs)
    had = {site: record["sites"][site]["had"] if site in record["sites"] else theirs.get(site) for site in found}
    return {site: heads for site, heads in found.items() if ours.get(site) != theirs.get(site) == had[site]}


@grouped
def augment(
    model: ModelName,
    task: OneTask,
    output: Annotated[Path, option("The folder of data sets to write to.", "--output", "-o", metavar="FOLDER")],
    rows: RowOptions,
    options: AugmentationOptions,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Writes more train rows: copies with words exchanged for others of a similar vector in the model.

    Examples: [cyan]jaxprune augment PRETRAINED --task mrpc --data data -o more[/cyan] and then
    [cyan]jaxprune sparsify PRETRAINED --teacher FINETUNED --task mrpc --data more -o sparse[/cyan]

    Copies keep the label of their row, which may no longer be true: they are for students, who ask their teacher.
    Dev, test and calibration rows are written as they are, and none of their texts is among the copies.
    """
    with terminal.working() as bars:
        from jaxprune.cli.render import tables
        from jaxprune.data.augmentation import Augmentation

        settings = build(Augmentation, options)
        record = augment_rows(model, lambda: rows.load(task, bars), output, settings, overwrite, bars)
    line = f"Data:   {output}, for --data; task {record['task']}"
    terminal.show(record, tables.augmentation_table(record), line, as_json=as_json)


def augment_rows(
    source: str,
    load_task: Callable[[], jp.Task],
    output: Path,
    settings: Augmentation,
    overwrite: bool,
    bars: terminal.Bars,
) -> dict[str, Any]:
    """Writes the rows of a task, with copies of the train rows, as a data set: `OUTPUT/TASK/train.jsonl` and so on.

    A data set that is there already and was made in the same way is left as it is.
    """
    from jaxprune.checkpoints.files import check_file, folder_for, parse_header
    from jaxprune.checkpoints.tensors import params_digest
    from jaxprune.data.augmentation import augmented

    model, params = jp.load(source)
    task = load_task()
    folder, count = output / task.name, len(task.rows("train"))
    made = {
        "settings": asdict(settings),
        "embeddings": params_digest({"embeddings": params["embeddings"]["word"]}),
        "rows": {split: task.digest(split) for split in task.splits},
    }
    known = folder / AUGMENTATION
    if known.is_file() and not overwrite:
        problems, earlier = parse_header(known.read_bytes().decode(errors="replace"), _AUGMENTED)
        if problems:
            raise ValueError(f"{known} cannot be used: {'; '.join(problems[:5])}. Write it again with --overwrite.")
        if {name: earlier.get(name) for name in made} == made:
            bars.say(f"{folder}: of an earlier run with the same settings")
            return earlier
    if folder.exists() and not (overwrite and known.is_file()):
        hint = "choose another folder, or replace it with --overwrite" if known.is_file() else "it is not replaced"
        raise FileExistsError(f"{folder} exists already, and was not made in this way: {hint}.")
    check_file(known, overwrite)
    bar, total, sizes = bars.open(f"augmenting {task.name}"), count * (1 + settings.copies), {}
    record = {"command": "augment", "source": source, "output": str(output), "task": task.name, **made}
    with folder_for(folder, overwrite=overwrite) as fresh:
        for split, name in FILES.items():
            examples = augmented(model, params, task, settings) if split == "train" else task.rows(split)
            sizes[split] = 0
            with (fresh / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for sizes[split], example in enumerate(examples, 1):
                    file.write(json.dumps(_fields(task, example), ensure_ascii=False) + "\n")
                    if split == "train" and sizes[split] % 1000 == 0:
                        bar(sizes[split], total)
            if not sizes[split]:
                (fresh / f"{name}.jsonl").unlink()
        bar(total, total, f"{sizes['train']:,} rows")
        record |= {"train_rows": count, "sizes": sizes, "examples": _first_copies(fresh / "train.jsonl", count)}
        (fresh / AUGMENTATION).write_bytes(as_file(record))
    return record


def _fields(task: jp.Task, example: Example) -> dict[str, Any]:
    """An example as a row of a file that `load_task` reads."""
    from jaxprune.data.records import PAIR
    from jaxprune.data.tasks import TASKS

    texts = (example.text,) if example.pair is None else (example.text, example.pair)
    columns = TASKS[task.name].columns if task.name in TASKS else PAIR if len(texts) == 2 else ("sentence",)
    label = example.label if task.regression else task.labels[int(example.label or 0)]
    return dict(zip(columns, texts, strict=True)) | {"label": label}


def _first_copies(file: Path, rows: int) -> list[dict[str, Any]]:
    """The first row and the first copies."""
    with file.open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
        return [first, *map(json.loads, itertools.islice(lines, max(0, rows - 1), rows + 2))]

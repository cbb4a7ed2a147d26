"""Trains a student and writes its folder: the steps behind `sparsify` and `distill`."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxprune.checkpoints.folder import as_loaded, check_destination, load, model_digest, save
from jaxprune.checkpoints.shared import pruning_of, split_task
from jaxprune.cli.render.cards import CARD, LEARNED, student_card
from jaxprune.cli.render.pictures import training_picture
from jaxprune.cli.render.tables import exam_line
from jaxprune.cli.workflow import Data, Measuring, Watch, measure
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Task, remove_leaks
from jaxprune.evaluation.evaluate import Evaluation, fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import file_size, parameters
from jaxprune.scoring.scores import describe
from jaxprune.sparse.masks import sparsity_of
from jaxprune.sparse.matrices import linear_maps
from jaxprune.training.distillation import Sparsification, distill, surviving_heads
from jaxprune.training.joint_loss import Distillation
from jaxprune.training.loop import Step, Training
from jaxprune.units import Params, widths

DISTILLATION = "distillation.json"  # in the folder of a student: how it was taught, and how well it did


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """What a student learns, and how it becomes sparse; see `distill`."""

    settings: Callable[[bool], Distillation]  # of whether the task is a regression
    sparsification: Sparsification = Sparsification()


def teach_model(
    source: str,
    teacher: str,
    data: Data,
    output: Path,
    training: Training,
    how: Schooling,
    *,
    measuring: Measuring,
    dtype: str | None = None,
    packed: Literal["exact", "int8"] | None = None,
    overwrite: bool = False,
    watch: Watch,
) -> dict[str, Any]:
    """Teaches a student, and writes its folder; an interrupted run goes on where it was.

    The run is kept in `OUTPUT.state` until the folder is written. Teacher and student are tested in the end, if
    `measuring` says so and the task has test rows; the student as it is written, rounded if it is.
    """
    check_destination(output, overwrite)
    state = output.with_name(f"{output.name}.state")
    model, student = load(source)
    teacher_model, theirs = load(teacher)
    task = data.load(watch)
    settings, pruning = how.settings(task.regression), pruning_of(source, model)
    name = fitting_head(teacher_model, task, settings.head)
    bar = watch.open("distilling")

    def progress(step: Step) -> None:
        sparse = "" if how.sparsification.schedule is None else f", {100 * _sparsity(how, step):.1f} % zero"
        bar(step.step, step.steps, f"epoch {step.epoch}, loss {step.loss:.4f}{sparse}")
        if step.evaluation is not None:
            watch.say(exam_line(step.evaluation))

    done = distill(
        (model, student),
        (teacher_model, theirs),
        task,
        replace(settings, head=name, heads=_heads(pruning, model, student, teacher_model, theirs)),
        training,
        sparsification=how.sparsification,
        state=state,
        progress=progress,
    )
    if done.fresh_head:
        watch.say(f"the student had no task head for {task.name}: it got a fresh one in the teacher's form")
    if done.leaks:
        watch.say(f"{task.name}: {done.leaks:,} train rows dropped, held out")
    written = as_loaded(done.model, done.params, dtype=dtype, packed=packed)
    asked = replace(measuring, head=name, max_length=training.max_length)
    pairs = {"teacher": (teacher_model, theirs), "student": (done.model, written)}
    known = {"student": done.evaluations[done.best].evaluation} if written is done.params else {}
    prompt = prompt_of(done.model, task)
    record = {
        "command": "distill" if how.sparsification.schedule is None else "sparsify",
        "source": source,
        "teacher": teacher,
        "output": str(output),
        "task": task.name,
        "head": name,
        "heads": list(done.model.heads),
        "labels": list(task.labels),
        "prompt": None if prompt is None else prompt.to_json(),
        "recipe": training.to_json(),
        "settings": describe(replace(settings, head=None)),
        "thinning": how.sparsification.to_json(done.steps),
        "keep_zeros": how.sparsification.keep_zeros,
        "stored": {"dtype": dtype or "float32", "packed": packed},
        "steps": done.steps,
        "exams": [evaluation.to_json() for evaluation in done.evaluations],
        "best": done.best,
        "leaks": done.leaks,
        "fresh_head": done.fresh_head,
        "rows": task.sizes,
        "digests": {split: task.digest(split) for split in task.splits},
        "results": _tested(pairs, task, asked, training.dev_limit, known, watch),
        "weights": {who: count_weights(*pair) for who, pair in pairs.items()},
        "models": {
            "student": model_digest(model, student),
            "teacher": model_digest(teacher_model, theirs),
            "result": model_digest(done.model, written),
        },
    }
    on_hub = not Path(split_task(source)[0]).expanduser().is_dir()
    extra = {
        DISTILLATION: (json.dumps(record, indent=1) + "\n").encode(),
        CARD: student_card(record, on_hub=on_hub).encode(),
        LEARNED: training_picture(record),
    }
    if pruning is not None:
        pruning = {part: own for part, own in pruning.items() if part != "pruned"}  # `save` says that anew
    own = {"pruning": pruning, "overwrite": overwrite, "dtype": dtype, "extra": extra, "packed": packed}
    save(output, done.model, done.params, **own)
    state.unlink(missing_ok=True)
    return record | {"file_bytes": file_size(output)}


def _tested(
    pairs: Mapping[str, tuple[Model, Params]],
    task: Task,
    measuring: Measuring,
    dev_limit: int | None,
    known: Mapping[str, Evaluation],
    watch: Watch,
) -> dict[str, dict[str, Any]]:
    """Every model on dev, where it is not `known` already, and on test, if that is asked for and there are rows."""
    (clean,), _ = remove_leaks([task])
    limits = {"dev": dev_limit, "test": measuring.limit}
    found: dict[str, dict[str, Any]] = {who: {} for who in pairs}
    for who, pair in pairs.items():
        for split in ("dev", "test") if measuring.evaluate and clean.rows("test") else ("dev",):
            if split == "dev" and who in known:
                own = known[who]
            else:
                bar = watch.open(f"testing the {who} on {split}")
                own = measure(*pair, clean, replace(measuring, limit=limits[split]), bar, split)
            found[who][split] = own.to_json()
    return found


def count_weights(model: Model, params: Params) -> dict[str, int]:
    """How many weights there are, and how many are not zero: in the linear maps of the layers, and in the model."""
    maps = sparsity_of(params, linear_maps(model))
    every = sparsity_of(params)
    return {
        "linear_maps": maps.size,
        "linear_maps_not_zero": maps.size - maps.zeros,
        "parameters": parameters(params),
        "parameters_not_zero": every.size - every.zeros,
    }


def _sparsity(how: Schooling, step: Step) -> float:
    """The sparsity that the schedule asks for after a step."""
    schedule = how.sparsification.schedule_of(step.steps)
    done = bisect.bisect_right(schedule.steps, step.step)
    return schedule.sparsities[done - 1] if done else 0.0


def _heads(
    record: Mapping[str, Any] | None, model: Model, student: Params, teacher_model: Model, teacher: Params
) -> Mapping[str, tuple[int, ...]]:
    """Which of the teacher's heads a pruned student has, by its record, where it has fewer and was cut from as many."""
    if record is None or "sites" not in record:
        return {}
    ours, theirs = (widths(own.axes, p, ("heads",)) for own, p in ((model, student), (teacher_model, teacher)))
    return {
        site: which
        for site, which in surviving_heads(record).items()
        if ours.get(site) != theirs.get(site) == record["sites"][site]["had"]
    }

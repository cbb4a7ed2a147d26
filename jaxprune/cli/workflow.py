"""The steps behind the commands: settings in, files written, and a record out that JSON can hold."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxprune.checkpoints.files import check_file
from jaxprune.checkpoints.folder import digest_keeper, load, model_digest
from jaxprune.checkpoints.tensors import FLOATS
from jaxprune.checkpoints.weights import open_tensors
from jaxprune.data.batches import default_length, usable_rows
from jaxprune.data.prompts import STYLES, fit, prompt_for, prompt_of, read_prompt
from jaxprune.data.records import MISPLACED, MISSING
from jaxprune.data.splits import digest
from jaxprune.data.tasks import Rows, Task, draw, load_task, seed_words
from jaxprune.evaluation.evaluate import Evaluation, evaluate, fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import (
    Length,
    checked_length,
    flops,
    memory,
    parameters,
    prunable_parameters,
)
from jaxprune.pruning.latency import compare_latency
from jaxprune.scoring.run import EXAMPLES, Scoring, score
from jaxprune.scoring.scores import Scores, describe, load_scores, save_scores
from jaxprune.units import KINDS, UNITS, Params, sites, widths

RATIOS = ("units", "prunable_parameters", "parameters", "memory", "flops", "file_bytes")  # what remains after by before


class Progress(Protocol):
    """The progress of one stage."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Shows what is done, of how much, and a note."""
        ...


class Watch(Protocol):
    """Whoever watches a command at work."""

    def open(self, label: str) -> Progress:
        """Opens a new stage."""
        ...

    def say(self, message: Any) -> None:
        """Shows a line, or a table."""
        ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """A task, and where its rows come from; see `load_task`."""

    task: str
    data: Path | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    prompt: str | None = None  # a style of the built-in prompts, or a file; None: the model's task heads, or T5's own

    def load(self, watch: Watch) -> Task:
        """Reads the rows, and says which answers cannot be used."""
        task = load_task(
            self.task, data=self.data, text=self.text, text_pair=self.text_pair, label=self.label, labels=self.labels
        )
        for reason in (MISPLACED, MISSING):
            if count := task.dropped.get(reason):
                watch.say(f"{task.name}: {count:,} rows left out, {reason}")
        if self.prompt is None:
            return task
        own = prompt_for(task, self.prompt) if self.prompt in STYLES else fit(read_prompt(self.prompt), task)
        return replace(task, prompt=own)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured of a pruned model."""

    evaluate: bool = True  # on the test rows of the task, if there is one
    head: str | None = None  # by default the one of the task's name, else the only one
    limit: int | None = None  # the most test rows
    batch_size: int = 32
    max_length: int | None = None
    batches: tuple[int, ...] = (1, 32)  # examples per timed pass; empty: no latency
    repeats: int = 20


def score_model(
    source: str,
    data: Data,
    output: Path,
    scoring: Scoring,
    *,
    overwrite: bool = False,
    memory: Path | None = None,
    watch: Watch,
) -> dict[str, Any]:
    """Scores a model for a task and writes the score file; an interrupted run goes on where it was.

    In the folder `memory` the model's digest is remembered, so that budgets can be tried without reading all weights.
    """
    check_file(output, overwrite)
    known = None if memory is None else digest_keeper(source, memory)
    model, params = load(source)
    scores = _score(model, params, data.load(watch), scoring, output, watch)
    save_scores(output, scores)
    if known is not None:
        known(scores.header["model"])
    header = {name: value for name, value in scores.header.items() if name != "rows"}
    return {
        "command": "score",
        "source": source,
        "output": str(output),
        **header,
        "units": sum(value.size for value in scores.values.values()),
        "sites": len(scores.values),
        "means": scores.means is not None,
    }


def costs(model: Model, params: Params, length: Length) -> dict[str, Any]:
    """What a model costs by count."""
    return {
        "units": sum(widths(model.axes, params).values()),
        "prunable_parameters": prunable_parameters(model, params),
        "parameters": parameters(params),
        "memory": memory(params),
        "flops": flops(model, params, length),
        "length": length,
    }


def measure_latency(
    model: Model, params: Sequence[Params], length: Length, head: str, measuring: Measuring, watch: Watch
) -> list[list[tuple[Any, float]]]:
    """Latency and speed-up over the first, for each of `params` at each batch size, measured in turns."""
    tokens = whole_tokens(model, length)
    bar = watch.open("measuring latency")
    found: list[list[tuple[Any, float]]] = [[] for _ in params]
    for done, batch in enumerate(measuring.batches, 1):
        pairs = [(model, own) for own in params]
        compared = compare_latency(pairs, batch=batch, length=tokens, head=head, repeats=measuring.repeats)
        for own, pair in zip(found, zip(*compared, strict=True), strict=True):
            own.append(pair)
        bar(done, len(measuring.batches))
    return found


def whole_tokens(model: Model, length: Length) -> int | tuple[int, int]:
    """A mean length as tokens that can be run: rounded up, and no more than the model reads."""
    rounded = [
        max(1, min(math.ceil(own), model.max_length))
        for own in np.atleast_1d(np.asarray(checked_length(model, length)))
    ]
    return (rounded[0], rounded[1]) if len(model.stacks) > 1 else rounded[0]


def ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """The fraction that remains, of everything that is counted."""
    return {name: after[name] / before[name] for name in RATIOS if before.get(name)}


def speedups(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """By FLOPs, and measured at each batch size."""
    measured = [{"batch": own["batch"], "speedup": own["speedup"]} for own in after.get("latency", ())]
    return {"theoretical": before["flops"] / after["flops"] if after["flops"] else None, "measured": measured}


def stored_type(model: Model) -> str:
    """The type of the weights in the file that a model was loaded from; float32 if there are several."""
    if model.source is None:
        return "float32"
    with contextlib.ExitStack() as files:
        kinds = {source.entry.dtype for source in open_tensors(model.source, files).values()} & set(FLOATS)
    return str(FLOATS[kinds.pop()]) if len(kinds) == 1 else "float32"


def kinds_of(model: Model, params: Params, scored: Any) -> tuple[str, ...]:
    """The kinds of units that scores are of, or that a scoring run will score."""
    if isinstance(scored, Scores):
        return tuple(
            dict.fromkeys(site.kind for site in sites(model.axes, params, KINDS) if site.name in scored.values)
        )
    return getattr(scored.criterion, "kinds", UNITS)


def _score(model: Model, params: Params, task: Task, scoring: Scoring, output: Path, watch: Watch) -> Scores:
    output.parent.mkdir(parents=True, exist_ok=True)
    scores = score(
        model,
        params,
        task,
        scoring,
        progress=watch.open(f"scoring {task.name}") if scoring.criterion.examples is not None else None,
        resume=output.with_name(f"{output.name}.partial"),
    )
    if count := scores.header.get("cut_off"):
        watch.say(f"{task.name}: {count:,} rows left out, their answers are cut off; --max-length reaches further")
    return scores


def score_once(model: Model, params: Params, task: Task, scoring: Scoring, kept: Path, watch: Watch) -> Scores:
    """Scores and writes the file, unless it holds what would come out."""
    if kept.is_file():
        found, rows = load_scores(kept), scoring.rows
        key = jax.random.key(rows.key) if isinstance(rows.key, int) else rows.key
        count = EXAMPLES if rows.examples is None else rows.examples
        own = usable_rows(model, task, rows).task
        drawn = draw(own, count, key) if scoring.criterion.examples is not None else ()
        wanted = {
            "criterion": describe(scoring.criterion),
            "task": task.name,
            "head": fitting_head(model, task, scoring.head),
            "examples": len(drawn),
            "keys": [list(seed_words(key))],
            "model": model_digest(model, params),
            "data": [digest(drawn)] if drawn else [],
            "max_length": rows.max_length or default_length(model, task.spans),
            "prompt": None if (prompt := prompt_of(model, task)) is None else prompt.to_json(),
        }
        if all(found.header.get(name) == value for name, value in wanted.items()):
            watch.say(f"scores: {kept}, of an earlier run with the same settings")
            return found
    scores = _score(model, params, task, scoring, kept, watch)
    save_scores(kept, scores)
    return load_scores(kept)  # as the same command finds them after an interruption


def measure(
    model: Model,
    params: Params,
    task: Task,
    measuring: Measuring,
    progress: Progress,
    split: str = "test",
    *,
    exclude: Collection[str] = (),
    **more: Any,
) -> Evaluation:
    """Evaluates as `measuring` says on rows that are not in `exclude`; `more` are other arguments of `evaluate`."""
    rows = Rows(
        examples=measuring.limit,
        split=split,
        exclude=exclude,
        batch_size=measuring.batch_size,
        max_length=measuring.max_length,
    )
    return evaluate(model, params, task, rows=rows, head=measuring.head, progress=progress, **more)

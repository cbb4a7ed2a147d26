"""The steps behind the commands: settings in, files written, and a record out that JSON can hold."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxprune.checkpoints.files import check_file
from jaxprune.checkpoints.folder import digest_keeper, load
from jaxprune.checkpoints.tensors import FLOATS
from jaxprune.checkpoints.weights import open_tensors
from jaxprune.data.prompts import STYLES, fit, prompt_for, read_prompt
from jaxprune.data.records import MISPLACED, MISSING
from jaxprune.data.tasks import Rows, Task, load_task
from jaxprune.evaluation.evaluate import Evaluation, evaluate
from jaxprune.models import Model
from jaxprune.models.cost import Length
from jaxprune.pruning.latency import compare_latency, whole_tokens
from jaxprune.pruning.prune import Progress, Watch, score_into
from jaxprune.scoring.run import Scoring
from jaxprune.units import Params


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
    scores = score_into(model, params, data.load(watch), scoring, output, watch)
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

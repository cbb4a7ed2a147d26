"""The demo: the bundled model is pruned for one task, offline, and compared with weaker ways to choose what stays."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from jaxprune.bundled import bundled_data, bundled_model
from jaxprune.checkpoints.files import write_atomic
from jaxprune.checkpoints.folder import check_destination, load, save
from jaxprune.cli.render.pictures import comparison_figure
from jaxprune.cli.workflow import Measuring, Watch, measure_latency, speedups, stored_type
from jaxprune.compaction import compact
from jaxprune.data.prompts import PROMPTS
from jaxprune.data.tasks import Rows, Task, load_task
from jaxprune.evaluation.evaluate import evaluate, fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import file_size
from jaxprune.pruning.budgets import Flops, Rules
from jaxprune.pruning.record import costs, pruning_record, ratios, settings_of
from jaxprune.pruning.selection import select
from jaxprune.scoring.attribution import Criterion, IntegratedGradients
from jaxprune.scoring.baselines import Magnitude, Random
from jaxprune.scoring.run import Scoring, score
from jaxprune.scoring.scores import Scores, save_scores
from jaxprune.units import Gates, Params

CRITERIA: dict[str, Criterion] = {
    "attribution": IntegratedGradients(),
    "magnitude": Magnitude(),
    "random": Random(),
}
VARIANTS = ("dense", *CRITERIA)
FLOPS = 0.5  # of the layers, what may stay
MULTIPLE_OF = {"neurons": 8}
OTHER_ROWS = 150  # test examples of each other task
LATENCY_BATCH = 32

EXPLANATION = (
    "One model, {tasks}. {examples} examples of {task} show which attention heads and neurons {task} needs; the best "
    "are kept within half the FLOPs, the others are cut away. Nothing is trained.",
    "- attribution: {criterion}. magnitude chooses by the size of the weights, random by lot; they keep as many heads "
    "and neurons in every layer, so they cost the same.",
    "- {about}",
    "- One model, one draw: {n} rows tell the accuracy on {task} to about {margin:.0f} points (95%).",
)
OTHERS = (
    "- Nobody asked for the other tasks: one that falls needed what was cut, one that holds on uses what {task} uses. "
    "Where a baseline keeps up with attribution, it did not matter which units stay."
)
ABOUT = {
    "sst2": "sst2: the model learned sentiment from film reviews (SST-2). These rows are sentences of product, film "
    "and restaurant reviews (UCI), which it has never seen: an unfamiliar domain."
}
ABOUT_OTHERS = "{task}: the rows for testing are neither those for scoring nor any that the model was trained on."


def demo(
    output: Path,
    *,
    chosen: str = "sst2",
    source: str | None = None,
    data: Path | None = None,
    examples: int = 128,
    watch: Watch,
) -> dict[str, Any]:
    """Prunes a multi-task model for one task in three ways, tests all of its tasks, and writes model and picture.

    Args:
        output: Folder for the results; those of an earlier run are replaced.
        chosen: The task to keep.
        source: The model; by default the bundled one.
        data: Folder of the tasks; by default the bundled one. Other tasks that the model cannot do are left out.
        examples: Calibration rows to score with.
        watch: Shows the progress.

    Returns:
        What was measured, and the names of the files.

    Raises:
        ValueError: If the task is unknown, or the model has no head for it.
        FileExistsError: If the output folder has a `model` that jaxprune did not save.
    """
    begun = time.monotonic()
    source, data = source or str(bundled_model()), data or bundled_data()
    check_destination(output / "model", True)
    task = load_task(chosen, data=data)
    model, params = load(source)
    head = fitting_head(model, task)
    known = PROMPTS if model.answers_in_text else model.heads
    names = sorted(folder.name for folder in data.iterdir() if folder.is_dir() and folder.name in known)
    others = [load_task(name, data=data) for name in names if name != task.name]

    scores = _scores(model, params, task, examples, watch)
    length = scores["attribution"].header["mean_length"]
    budget, rules = Flops(FLOPS, length=length), Rules(multiple_of=MULTIPLE_OF)
    gates = {name: select(model, params, own, budget, rules=rules) for name, own in scores.items()}
    variants = {"dense": params} | {name: compact(model, params, own) for name, own in gates.items()}
    small = variants["attribution"]
    rows = _test(model, variants, [task, *others], scores["attribution"].header["rows"], watch)

    before, after = costs(model, params, length), costs(model, small, length)
    pair = [params, small]
    measured = measure_latency(model, pair, length, head, Measuring(batches=(LATENCY_BATCH,)), watch)
    for found, own in zip((before, after), measured, strict=True):
        found["latency"] = [{**latency._asdict(), "speedup": speedup} for latency, speedup in own]
    save(
        output / "model",
        model,
        small,
        pruning=pruning_record(scores["attribution"], gates["attribution"], budget, rules),
        overwrite=True,
        dtype=stored_type(model),
    )
    before["file_bytes"], after["file_bytes"] = file_size(model.source or source), file_size(output / "model")
    scores_file = save_scores(output / f"{task.name}.scores.safetensors", scores["attribution"])
    record = {
        "command": "demo",
        "task": task.name,
        "examples": examples,
        "source": source,
        "data": str(data),
        "criterion": scores["attribution"].header["criterion"],
        "selection": settings_of(budget, rules),
        "tasks": rows,
        "before": before,
        "after": after,
        "kept": ratios(before, after),
        "speedup": speedups(before, after),
        "files": {
            "model": str(output / "model"),
            "scores": str(scores_file),
            "picture": str(draw(output / "comparison.png", rows, gates["attribution"], examples)),
            "record": str(output / "results.json"),
        },
        "versions": scores["attribution"].header["versions"],
        "seconds": time.monotonic() - begun,
    }
    write_atomic(output / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    return record


def explain(record: dict[str, Any]) -> str:
    """What the demo shows, and what it does not."""
    chosen, *others = record["tasks"]
    share = chosen["values"]["dense"]
    facts = {
        "tasks": f"{1 + len(others)} tasks" if others else "one task",
        "examples": record["examples"],
        "task": record["task"],
        "criterion": f"integrated gradients, {record['criterion']['nodes']} nodes",
        "about": ABOUT.get(record["task"], ABOUT_OTHERS.format(task=record["task"])),
        "n": chosen["n"],
        "margin": 100 * 1.96 * math.sqrt(share * (1 - share) / chosen["n"]),  # half of the normal interval
    }
    parts = [*EXPLANATION, OTHERS] if others else EXPLANATION
    lines = (fill(part.format(**facts), 80, subsequent_indent="  " * (i > 0)) for i, part in enumerate(parts))
    return "\n".join(lines)


def next_steps(record: dict[str, Any]) -> list[str]:
    """Commands to type next."""
    task, files = record["task"], record["files"]
    return [
        f"jaxprune evaluate {files['model']} --task {task} --data {record['data']}",
        f"jaxprune prune {record['source']} --scores {files['scores']} --flops 0.3 -o {task}-smaller",
        "jaxprune prune YOUR_MODEL --task YOUR_ROWS.csv --text COLUMN --label COLUMN --flops 0.5 -o smaller",
    ]


def draw(path: Path, rows: list[dict[str, Any]], gates: Gates, examples: int) -> Path:
    """Writes the picture of the comparison."""
    layers: dict[str, dict[str, list[float]]] = {}
    for site, gate in gates.items():
        *layer, _, kind = site.split(".")
        layers.setdefault(" ".join(layer), {"heads": [], "neurons": []})[kind] += np.asarray(gate).tolist()
    title = f"pruned for {rows[0]['task']} to half the FLOPs with {examples} examples, without training"
    comparison_figure(path, rows, VARIANTS, layers, title=title)
    return path


def _scores(model: Model, params: Params, task: Task, examples: int, watch: Watch) -> dict[str, Scores]:
    """By each criterion, from the same rows."""
    found = {}
    for name, criterion in CRITERIA.items():
        bar = watch.open(f"scoring {task.name}") if criterion.examples is not None else None
        found[name] = score(
            model, params, task, Scoring(criterion=criterion, rows=Rows(examples=examples)), progress=bar
        )
    return found


def _test(
    model: Model, variants: dict[str, Params], tasks: list[Task], scored: list[str], watch: Watch
) -> list[dict[str, Any]]:
    """The primary metric of every variant on every task; of the first, which was scored, with all test rows."""
    bar = watch.open("testing")
    rows, done = [], 0
    for task in tasks:
        limit = None if task is tasks[0] else OTHER_ROWS
        values, results = {}, []
        for name, params in variants.items():
            results.append(evaluate(model, params, task, rows=Rows(examples=limit, exclude=scored)))
            values[name] = results[-1].primary[1]
            done += 1
            bar(done, len(tasks) * len(variants), f"{task.name}, {name}")
        first = results[0]
        rows.append(
            {"task": task.name, "n": first.n, "metric": first.primary[0], "chance": first.chance, "values": values}
        )
    return rows

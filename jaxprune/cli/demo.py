"""The demo: a multi-task model is pruned for one task, offline, and compared with weaker ways to choose what stays."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import jaxprune as jp
from jaxprune.cli import terminal
from jaxprune.cli.options import Json, find, option

if TYPE_CHECKING:
    from jaxprune.models import Model
    from jaxprune.scoring.scores import Scores
    from jaxprune.units import Gates, Params

CRITERIA = {"attribution": "integrated-gradients", "magnitude": "magnitude", "random": "random"}
VARIANTS = ("dense", *CRITERIA)
FLOPS = 0.5  # of the layers, what may stay
MULTIPLE_OF = {"neurons": 8}
EXAMPLES = 128  # calibration rows to score with
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
    output: Annotated[Path, option("Folder for the results.", "--output", "-o")] = Path("jaxprune-demo"),
    task: Annotated[str, option("The task to keep.")] = "sst2",
    model: Annotated[str | None, option("Another model; by default the bundled one.")] = None,
    data: Annotated[Path | None, option("Other data; by default the bundled rows.")] = None,
    as_json: Json = False,
) -> None:
    """Prunes the bundled multi-task model for one task, offline, against two baselines: about a minute.

    Example: [cyan]jaxprune demo --task snips[/cyan]
    """
    with terminal.working() as bars:
        from jaxprune.cli.render import tables

        record = run_demo(output, task, model or str(jp.bundled_model()), data or jp.bundled_data(), bars)
    shown = tables.comparison_table(record["tasks"], VARIANTS, record["task"]), tables.before_after_table(record)
    files = (f"{title.capitalize() + ':':9}{file}" for title, file in record["files"].items())
    lines = (explain(record), "", *files, "", "Next:", *next_steps(record))
    terminal.show(record, *shown, *lines, as_json=as_json)


def run_demo(output: Path, chosen: str, source: str, data: Path, bars: terminal.Bars) -> dict[str, Any]:
    """Prunes a multi-task model for one task in three ways, tests all of its tasks, and writes model and picture.

    Results of an earlier run are replaced. Other tasks that the model cannot do are left out.

    Raises:
        ValueError: If the task is unknown, or the model has no head for it.
        FileExistsError: If the output folder has a `model` that jaxprune did not save.
    """
    from jaxprune.checkpoints.files import check_file, write_atomic
    from jaxprune.checkpoints.folder import check_destination
    from jaxprune.checkpoints.weights import stored_type
    from jaxprune.cli.pruning import measured_costs
    from jaxprune.evaluation.evaluate import fitting_head
    from jaxprune.models.cost import compared, file_size
    from jaxprune.pruning.selection import settings_of

    begun = time.monotonic()
    check_destination(output / "model", True)
    check_file(output / "results.json", True)
    task = jp.load_task(chosen, data=data)
    model, params = jp.load(source)
    head = fitting_head(model, task)
    scores = _scores(model, params, task, bars)
    best = scores["attribution"]
    budget, rules = jp.budgets.Flops(FLOPS, length=best.header["mean_length"]), jp.Rules(multiple_of=MULTIPLE_OF)
    gates = {name: jp.select(model, params, each, budget, rules=rules) for name, each in scores.items()}
    variants = {"dense": params} | {name: jp.compact(model, params, each) for name, each in gates.items()}
    small = variants["attribution"]
    rows = _test(model, variants, [task, *_other_tasks(model, task, data)], best.rows, bars)
    pruning = jp.pruning_record(best, gates["attribution"], budget, rules)
    costs = measured_costs(model, params, small, pruning, head, (LATENCY_BATCH,), bars)
    jp.save(output / "model", model, small, pruning=pruning, overwrite=True, dtype=stored_type(model))
    for when, folder in (("before", model.source or source), ("after", output / "model")):
        costs[when]["file_bytes"] = file_size(folder)
    draw(output / "comparison.png", rows, gates["attribution"])
    files = {"model": "model", "scores": f"{task.name}.scores.safetensors", "picture": "comparison.png"}
    record = {
        "command": "demo",
        "task": task.name,
        "source": source,
        "data": str(data),
        "examples": EXAMPLES,
        "criterion": best.header["criterion"],
        "selection": settings_of(budget, rules),
        "tasks": rows,
        **compared(costs["before"], costs["after"]),
        "files": {title: str(output / name) for title, name in (files | {"record": "results.json"}).items()},
        "versions": best.header["versions"],
        "seconds": time.monotonic() - begun,
    }
    jp.save_scores(record["files"]["scores"], best)
    write_atomic(output / "results.json", (json.dumps(record, indent=1) + "\n").encode())
    return record


def _other_tasks(model: Model, task: jp.Task, data: Path) -> list[jp.Task]:
    """The other tasks in a folder that a model can do."""
    from jaxprune.data.prompts import PROMPTS

    known = PROMPTS if model.answers_in_text else model.heads
    names = sorted(folder.name for folder in data.iterdir() if folder.is_dir() and folder.name in known)
    return [jp.load_task(name, data=data) for name in names if name != task.name]


def _scores(model: Model, params: Params, task: jp.Task, bars: terminal.Bars) -> dict[str, Scores]:
    """Scores by each criterion, from the same rows."""
    bar, scores = bars.open(f"scoring {task.name}"), {}
    for name, criterion in CRITERIA.items():
        scoring = jp.Scoring(criterion=find("criterion", criterion)(), rows=jp.Rows(examples=EXAMPLES))
        scores[name] = jp.score(model, params, task, scoring, progress=bar if name == "attribution" else None)
    return scores


def _test(
    model: Model, variants: Mapping[str, Params], tasks: Sequence[jp.Task], scored: Sequence[str], bars: terminal.Bars
) -> list[dict[str, Any]]:
    """The primary metric of every variant on every task; of the first, which was scored, with all test rows."""
    bar, rows = bars.open("testing"), []
    for i, task in enumerate(tasks):
        limit, results = OTHER_ROWS if i else None, {}
        for j, (name, params) in enumerate(variants.items(), 1):
            results[name] = jp.evaluate(model, params, task, rows=jp.Rows(examples=limit, exclude=scored))
            bar(i * len(variants) + j, len(tasks) * len(variants), f"{task.name}, {name}")
        dense = results["dense"]
        facts = {"task": task.name, "n": dense.n, "metric": dense.primary[0], "chance": dense.chance}
        rows.append(facts | {"values": {name: result.primary[1] for name, result in results.items()}})
    return rows


def explain(record: dict[str, Any]) -> str:
    """Says what the demo shows, and what it does not."""
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


def draw(path: Path, rows: Sequence[Mapping[str, Any]], gates: Gates) -> None:
    """Writes the picture of the comparison."""
    import numpy as np

    from jaxprune.cli.render.pictures import comparison_figure

    layers: dict[str, dict[str, list[float]]] = {}
    for site, gate in gates.items():
        *layer, _, kind = site.split(".")
        layers.setdefault(" ".join(layer), {"heads": [], "neurons": []})[kind] += np.asarray(gate).tolist()
    title = f"pruned for {rows[0]['task']} to half the FLOPs with {EXAMPLES} examples, without training"
    comparison_figure(path, rows, VARIANTS, layers, title=title)

"""The demo: a multi-task model is pruned for one task, offline, and compared with weaker ways to choose what stays."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

VARIANTS = ("dense", "attribution", "magnitude", "random")
MULTIPLE_OF = {"neurons": 8}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a demo; the defaults are for a model with task heads."""

    criterion: str = "integrated-gradients"
    flops: float = 0.5  # of the layers, what may stay
    share: str = "half the FLOPs"  # the same in words
    allocation: str = "per_layer"
    examples: int = 128  # calibration rows to score with
    rows: int | None = None  # test examples of the task; None: all
    other_rows: int = 150  # of each other task
    batch: int = 32  # whose latency is measured


# A decoder is many times as large, and what it lost in half of its FLOPs without repair it would not answer from.
DECODER = Plan(
    criterion="gradient-activation", flops=0.8, share="four fifths of the FLOPs", allocation="per_kind", examples=64,
    rows=200, other_rows=60, batch=8,
)  # fmt: skip
TEXT = "dbpedia_14"  # whose texts are told as running text
WINDOW, WINDOWS = 256, 8
ASKED = "Name three things one can see in the night sky."
WRITTEN = 48  # tokens of an answer

EXPLANATION = (
    "One model, {tasks}. {examples} examples of {task} show which attention heads and neurons {task} needs; the best "
    "are kept within {share}, the others are cut away. Nothing is trained.",
    "- attribution: {criterion}. magnitude chooses by the size of the weights, random by lot; they keep as many heads "
    "and neurons {where}, so they cost the same.",
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
ABOUT_DECODERS = (
    "{task}: the model answers with the likeliest of the labels' words, calibrated by unlabelled rows. What it was "
    "trained on is not known here."
)
ABOUT_TEXT = (
    "- as text: texts of other rows as running text, log-likelihood of a token in nats; less negative is better."
)


def demo(
    output: Annotated[Path, option("Folder for the results.", "--output", "-o")] = Path("jaxprune-demo"),
    task: Annotated[str, option("The task to keep.")] = "sst2",
    model: Annotated[str | None, option("Another model; by default the bundled one.")] = None,
    data: Annotated[Path | None, option("Other data; by default the bundled rows.")] = None,
    as_json: Json = False,
) -> None:
    """Prunes the bundled multi-task model for one task, offline, against two baselines: about a minute.

    Of a decoder (a folder or a GGUF) also a text's likelihood and an answer are compared: minutes.

    Example: [cyan]jaxprune demo --task snips[/cyan]
    """
    with terminal.working() as bars:
        from jaxprune.cli.render import tables

        record = run_demo(output, task, model or str(jp.bundled_model()), data or jp.bundled_data(), bars)
    shown = tables.comparison_table(record["tasks"], VARIANTS, record["task"]), tables.before_after_table(record)
    files = (f"{title.capitalize() + ':':9}{file}" for title, file in record["files"].items())
    said = [f"{name.capitalize() + ':':13}{text}" for name, text in record.get("answers", {}).items()]
    lines = (explain(record), "", *said, *[""] * bool(said), *files, "", "Next:", *next_steps(record))
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
    model, params = jp.load(source)
    plan = DECODER if model.continues else Plan()
    task = _calibrated(model, jp.load_task(chosen, data=data))
    head = fitting_head(model, task)
    scores = _scores(model, params, task, plan, bars)
    best = scores["attribution"]
    budget = jp.budgets.Flops(plan.flops, length=best.header["mean_length"])
    rules = jp.Rules(allocation=plan.allocation, multiple_of=MULTIPLE_OF)
    gates = {name: jp.select(model, params, each, budget, rules=rules) for name, each in scores.items()}
    variants = {"dense": params} | {name: jp.compact(model, params, each) for name, each in gates.items()}
    small = variants["attribution"]
    tasks = [task, *_other_tasks(model, task, data)]
    rows = _test(model, variants, tasks, plan, best.rows, bars)
    pruning = jp.pruning_record(best, gates["attribution"], budget, rules)
    costs = measured_costs((model, params), (model, small), pruning, head, (plan.batch,), bars)
    jp.save(output / "model", model, small, pruning=pruning, overwrite=True, dtype=stored_type(model))
    for when, folder in (("before", model.source or source), ("after", output / "model")):
        costs[when]["file_bytes"] = file_size(folder)
    draw(output / "comparison.png", rows, gates["attribution"], plan)
    files = {"model": "model", "scores": f"{task.name}.scores.safetensors", "picture": "comparison.png"}
    record = {
        "command": "demo",
        "task": task.name,
        "source": source,
        "data": str(data),
        "examples": plan.examples,
        "criterion": best.header["criterion"],
        "selection": settings_of(budget, rules),
        "kinds": list(dict.fromkeys(name.rpartition(".")[2] for name in gates["attribution"])),
        "tasks": rows,
        **({"answers": _answers(model, variants)} if model.continues else {}),
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

    style = "plain" if model.continues else "t5"
    known = [name for name in PROMPTS if style in PROMPTS[name]] if model.answers_in_text else model.heads
    names = sorted(folder.name for folder in data.iterdir() if folder.is_dir() and folder.name in known)
    others = [_calibrated(model, jp.load_task(name, data=data)) for name in names if name != task.name]
    return [*others, *([_text(model, data)] if model.continues and (data / TEXT).is_dir() else [])]


def _calibrated(model: Model, task: jp.Task) -> jp.Task:
    """The task, with a decoder's answers calibrated by unlabelled rows."""
    from jaxprune.data.prompts import prompt_of

    prompt = prompt_of(model, task) if model.continues else None
    return task if prompt is None else replace(task, prompt=replace(prompt, calibration="batch"))


def _text(model: Model, data: Path) -> jp.Task:
    """The texts of some rows as running text."""
    from jaxprune.data.splits import Example

    rows = jp.load_task(TEXT, data=data)
    text = Example("\n\n".join(row.text for row in rows.rows("test")[:100]))
    nothing = {"train": (), "calibration": (), "dev": ()}
    task = jp.Task(name=f"{TEXT} as text", splits={**nothing, "test": (text,)}, labels=("text",), running=True)
    cut = jp.windows(model, replace(task, metric="likelihood"), tokens=min(WINDOW, model.max_length))
    return replace(cut, splits=nothing | {"test": cut.rows("test")[:WINDOWS]})


def _answers(model: Model, variants: Mapping[str, Params]) -> dict[str, str]:
    """The answers of the dense and of the pruned model."""
    from jaxprune.evaluation.text import encode_prompts, stop_tokens, texts

    batch = encode_prompts(model, [ASKED], chat=bool(getattr(model.tokenizer, "chat_template", None)))
    room = min(WRITTEN, model.max_length - batch["input_ids"].shape[1])
    written = {"asked": ASKED}
    for name in ("dense", "attribution"):
        tokens = jp.generate(model, variants[name], batch, max_new_tokens=room, stop=stop_tokens(model))
        (text,) = texts(model, tokens)
        written[name] = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return written


def _scores(model: Model, params: Params, task: jp.Task, plan: Plan, bars: terminal.Bars) -> dict[str, Scores]:
    """Scores by each criterion, from the same rows."""
    bar, scores = bars.open(f"scoring {task.name}"), {}
    attribution = find("criterion", plan.criterion)()
    if model.continues:
        attribution = replace(attribution, objective=jp.objectives.log_probability)
    criteria = {"attribution": attribution} | {name: find("criterion", name)() for name in VARIANTS[2:]}
    for name, criterion in criteria.items():
        scoring = jp.Scoring(criterion=criterion, rows=jp.Rows(examples=plan.examples))
        scores[name] = jp.score(model, params, task, scoring, progress=bar if name == "attribution" else None)
    return scores


def _test(
    model: Model,
    variants: Mapping[str, Params],
    tasks: Sequence[jp.Task],
    plan: Plan,
    scored: Sequence[str],
    bars: terminal.Bars,
) -> list[dict[str, Any]]:
    """The primary metric of every variant on every task, the one that was scored first."""
    bar, rows = bars.open("testing"), []
    for i, task in enumerate(tasks):
        limit, results = plan.other_rows if i else plan.rows, {}
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
    share, decoder = chosen["values"]["dense"], "answers" in record
    about = ABOUT_DECODERS if decoder else ABOUT.get(record["task"], ABOUT_OTHERS)
    nodes, plan = record["criterion"].get("nodes"), DECODER if decoder else Plan()
    facts = {
        "tasks": f"{1 + len(others) - decoder} tasks" if len(others) > decoder else "one task",
        "examples": record["examples"],
        "task": record["task"],
        "criterion": f"integrated gradients, {nodes} nodes" if nodes else "gradient x activation",
        "share": plan.share,
        "where": "in all" if decoder else "in every layer",
        "about": about.format(task=record["task"]),
        "n": chosen["n"],
        "margin": 100 * 1.96 * math.sqrt(share * (1 - share) / chosen["n"]),  # half of the normal interval
    }
    parts = [*EXPLANATION, *[OTHERS] * bool(others), *[ABOUT_TEXT] * decoder]
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


def draw(path: Path, rows: Sequence[Mapping[str, Any]], gates: Gates, plan: Plan) -> None:
    """Writes the picture of the comparison, of those tasks whose metric is a share."""
    import numpy as np

    from jaxprune.cli.render.pictures import comparison_figure
    from jaxprune.evaluation import scale_of

    layers: dict[str, dict[str, list[float]]] = {}
    for site, gate in gates.items():
        *layer, _, kind = site.split(".")
        row = layers.setdefault(" ".join(layer), {})
        row[kind] = row.get(kind, []) + np.asarray(gate).tolist()
    shares = [row for row in rows if scale_of(row["metric"])[0] > 1]
    title = f"pruned for {rows[0]['task']} to {plan.share} with {plan.examples} examples, without training"
    comparison_figure(path, shares, VARIANTS, layers, title=title)

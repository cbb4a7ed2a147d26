"""The commands that look at models, measure and compare them, and change nothing: inspect, evaluate, sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxprune.cli import terminal
from jaxprune.cli.options import (
    BatchOptions,
    CriterionOptions,
    Dark,
    Head,
    Json,
    ModelName,
    PictureOptions,
    RowOptions,
    SelectionOptions,
    Tasks,
    choice,
    grouped,
    measured,
    option,
    read_fractions,
    rows,
    scoring,
    selecting,
)

if TYPE_CHECKING:
    from jaxprune.data.tasks import Task
    from jaxprune.models import Model
    from jaxprune.pruning.sweep import Sweeping
    from jaxprune.units import Params

BUDGETS = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2"
STRAY = 1e-3  # a smaller share of zeros is no sparsity


@grouped
def inspect(
    model: ModelName,
    picture: PictureOptions,
    scores: Annotated[Path | None, option("A score file of the model.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Shows what each layer has, had before pruning, and costs; with scores, where they are.

    Example: [cyan]jaxprune inspect small -o small.png[/cyan]
    """
    with terminal.working():
        from jaxprune.cli.render import tables

        record = inspect_model(model, scores, picture)
    lines = [tables.inspection_note(record)]
    if picture.picture is not None:
        lines.append(f"Picture: {picture.picture}")
    terminal.show(record, tables.inspection_table(record), *lines, as_json=as_json)


def inspect_model(source: str, scores: Path | None, picture: PictureOptions) -> dict[str, Any]:
    """Counts what a model has in every layer; see `jaxprune.pruning.inspection.inspect`."""
    from jaxprune.checkpoints.folder import load
    from jaxprune.checkpoints.shared import pruning_of
    from jaxprune.cli.render.pictures import inspection_figure
    from jaxprune.models.cost import parameters
    from jaxprune.pruning.inspection import inspect
    from jaxprune.scoring.scores import load_scores

    picture.check()
    loaded = None if scores is None else load_scores(scores)
    model, params = load(source)
    pruning = pruning_of(source, model)
    layers, ranks = inspect(model, params, pruning=pruning, scores=loaded)
    zeros = _zeros(model, params)
    for row in (*layers["layers"], layers["total"]):
        row["zeros"] = zeros.get(row["layer"])
    record = {
        "command": "inspect",
        "source": source,
        "model_type": model.config.model_type,
        "heads": list(model.heads),
        "tasks": _tasks(source, model),
        "parameters": parameters(params),
        "pruned": None if pruning is None else pruning.get("settings"),
        "scores": None if scores is None else str(scores),
        **layers,
    }
    picture.draw(inspection_figure, record, ranks)
    return record


def _tasks(source: str, model: Model) -> list[str]:
    """The tasks whose gates are stored beside the dense model."""
    from jaxprune.checkpoints.folder import split_task
    from jaxprune.checkpoints.gate_file import GATES, read_gates

    file = None if model.source is None or split_task(source)[1] is not None else model.source / GATES
    return sorted(read_gates(file).tasks) if file is not None and file.is_file() else []


def _zeros(model: Model, params: Params) -> dict[str, float]:
    """The share of zeros in the linear maps of each layer, and of all; nothing if there is no more than a stray one."""
    from jaxprune.sparse.masks import sparsity_of
    from jaxprune.sparse.matrices import linear_maps
    from jaxprune.units import flatten

    maps = linear_maps(model)
    if not any(maps(path, array) for path, array in flatten(params).items()):
        return {}  # it has no layers
    sparsity = sparsity_of(params, maps)
    if sparsity.fraction < STRAY:
        return {}
    counts: dict[str, list[int]] = {}
    for name, array in sparsity.arrays.items():
        stack, _, rest = name.rpartition("layers.")
        for place in (f"{stack.strip('.')} {rest.split('.')[0]}".strip(), "all"):
            counts[place] = [a + b for a, b in zip(counts.get(place, [0, 0]), array, strict=True)]
    return {place: zeros / size for place, (zeros, size) in counts.items() if size}


@grouped
def evaluate(
    model: ModelName,
    task: Tasks,
    rows: RowOptions,
    batches: BatchOptions,
    split: Annotated[str, rows("train, calibration, dev (for choices) or test (to report).")] = "test",
    head: Head = None,
    limit: Annotated[int | None, rows("The most examples of each task.")] = None,
    generate: Annotated[bool, rows("Text-to-text models: they have to write the label's words.", "--generate")] = False,
    as_json: Json = False,
) -> None:
    """Measures a model on one or several tasks.

    Example: [cyan]jaxprune evaluate small --task sst2 --task mrpc --data data[/cyan]
    """
    with terminal.working() as bars:
        from jaxprune.checkpoints.folder import load
        from jaxprune.cli.render import tables
        from jaxprune.data.tasks import Rows
        from jaxprune.evaluation import evaluate as library

        loaded, params = load(model)
        if generate and not loaded.answers_in_text:
            raise ValueError(f"{model} has task heads and writes no text: leave --generate out.")
        tasks = [rows.load(name, bars) for name in task]
        for each in tasks:  # all of them before the first is measured
            each.rows(split)
            library.fitting_head(loaded, each, head)
        settings = {"rows": Rows(examples=limit, split=split, **asdict(batches)), "head": head, "generated": generate}
        results = [
            library.evaluate(loaded, params, each, **settings, progress=bars.open(f"testing {each.name}")).to_json()
            for each in tasks
        ]
    record = {"command": "evaluate", "source": model, "results": results}
    terminal.show(record, tables.evaluation_table(results), as_json=as_json)


@grouped
def sweep(
    model: ModelName,
    task: Tasks,
    criterion: Annotated[list[str], choice("criterion", "As often as there are criteria")],
    output: Annotated[Path, option("Folder for the results; a sweep in it resumes.", "--output", "-o")],
    selection: SelectionOptions,
    rows: RowOptions,
    batches: BatchOptions,
    settings: CriterionOptions,
    flops: Annotated[str, selecting("Fractions of the FLOPs that may stay.", metavar="A,B,...")] = BUDGETS,
    seeds: Annotated[int, scoring("Draws of the calibration rows: seeds 0, 1 and so on.")] = 3,
    examples: Annotated[int, scoring("Calibration rows to score with, stratified by label.")] = 128,
    head: Head = None,
    split: Annotated[str, measured("Rows to test on: dev to choose by, test to report.")] = "test",
    limit: Annotated[int | None, measured("The most rows to test on.")] = None,
    dark: Dark = False,
    as_json: Json = False,
) -> None:
    """Compares criteria at many budgets, and draws quality over FLOPs; one scoring run serves all budgets.

    Example: [cyan]jaxprune sweep multi --task sst2 --criterion integrated-gradients --criterion magnitude
    --data data -o sweep[/cyan]

    Choices belong to --split dev: what was chosen on test rows looks better there than it is.
    """
    with terminal.working() as bars:
        from jaxprune.cli.render import tables
        from jaxprune.data.tasks import Rows
        from jaxprune.pruning.sweep import Sweeping

        sweeping = Sweeping(
            criteria=settings.build(*criterion),
            budgets=read_fractions("--flops", flops),
            seeds=seeds,
            examples=examples,
            length=selection.tokens(),
            rules=selection.build(),
            rows=Rows(split=split, examples=limit, **asdict(batches)),
            head=head,
        )
        record = sweep_model(model, lambda: [rows.load(name, bars) for name in task], sweeping, output, dark, bars)
    files = (f"{title.capitalize() + ':':10}{', '.join(names)}" for title, names in record["files"].items())
    terminal.show(record, *tables.sweep_tables(record), tables.sweep_note(record), "", *files, as_json=as_json)


def sweep_model(
    source: str,
    load_tasks: Callable[[], list[Task]],
    sweeping: Sweeping,
    output: Path,
    dark: bool,
    bars: terminal.Bars,
) -> dict[str, Any]:
    """Prunes a model in every combination, tests it, and writes a table and a picture per task."""
    from jaxprune.checkpoints.files import check_file, file_stem
    from jaxprune.checkpoints.folder import load
    from jaxprune.cli.render.pictures import FORMATS, sweep_figure
    from jaxprune.pruning.sweep import RESULTS, TABLE, check_budgets, sweep

    check_file(output / RESULTS, overwrite=True)
    model, params = load(source)
    check_budgets(model, params, sweeping)
    record = sweep(model, params, load_tasks(), sweeping, output, about={"source": source}, watch=bars)
    pictures = []
    for task in record["settings"]["tasks"]:
        rows = [row for row in record["rows"] if row["task"] == task]
        for ending in FORMATS:
            pictures.append(output / f"{file_stem(task)}.{ending}")
            sweep_figure(pictures[-1], rows, split=record["settings"]["split"], dark=dark)
    files = {"table": [output / TABLE], "record": [output / RESULTS], "pictures": pictures}
    return record | {"files": {title: list(map(str, paths)) for title, paths in files.items()}}

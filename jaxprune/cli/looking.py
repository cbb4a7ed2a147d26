"""The commands that look at models and scores, measure and compare them, and change nothing; see `jaxprune.cli.app`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jaxprune.cli import terminal
from jaxprune.cli.options import (
    BatchOptions,
    CriterionOptions,
    Dark,
    Head,
    Json,
    ModelName,
    OneTask,
    Overwrite,
    RowOptions,
    SelectionOptions,
    Tasks,
    choice,
    kept,
    measured,
    option,
    read_fractions,
    rows,
    scoring,
)

FRACTIONS = "0.7,0.5,0.3"
DELETED = "0.1,0.3,0.5,0.7,0.9"
BUDGETS = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2"


@terminal.grouped
def sweep(
    model: ModelName,
    task: Tasks,
    criterion: Annotated[list[str], choice("criterion", "As often as there are criteria")],
    output: Annotated[Path, option("Folder for the results; a sweep in it goes on.", "--output", "-o")],
    selection: SelectionOptions,
    rows: RowOptions,
    batches: BatchOptions,
    settings: CriterionOptions,
    flops: Annotated[str, kept("Fractions of the FLOPs that may stay.", metavar="A,B,...")] = BUDGETS,
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
        from jaxprune.cli import sweep, workflow
        from jaxprune.cli.render import tables

        record = sweep.sweep_model(
            model,
            [rows.of(name) for name in task],
            settings.build(*criterion),
            output,
            selection.build(),
            length=selection.tokens(),
            budgets=read_fractions("--flops", flops),
            seeds=seeds,
            examples=examples,
            split=split,
            measuring=workflow.Measuring(head=head, limit=limit, **asdict(batches)),
            dark=dark,
            watch=bars,
        )
    files = (f"{title.capitalize() + ':':10}{', '.join(names)}" for title, names in record["files"].items())
    terminal.show(record, *tables.sweep_tables(record), tables.sweep_note(record), "", *files, as_json=as_json)


def inspect(
    model: ModelName,
    scores: Annotated[Path | None, option("A score file of the model.", metavar="FILE")] = None,
    picture: Annotated[
        Path | None, option("A picture to write, .png or .svg.", "--output", "-o", metavar="PICTURE")
    ] = None,
    dark: Dark = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Shows what each layer has, had before pruning, and costs; with scores, where they are.

    Example: [cyan]jaxprune inspect small -o small.png[/cyan]
    """
    with terminal.working():
        from jaxprune.cli import inspection
        from jaxprune.cli.render import tables

        record = inspection.inspect_model(model, scores=scores, picture=picture, dark=dark, overwrite=overwrite)
    lines = [tables.inspection_note(record)] + ([] if picture is None else [f"Picture: {picture}"])
    terminal.show(record, tables.inspection_table(record), *lines, as_json=as_json)


def compare(
    scores: Annotated[list[Path], typer.Argument(help="Score files of one model, one per task.", metavar="FILE...")],
    fractions: Annotated[str, option("Fractions of the units that are kept.", metavar="A,B,...")] = FRACTIONS,
    picture: Annotated[
        Path | None, option("A heat map to write, .png or .svg.", "--output", "-o", metavar="PICTURE")
    ] = None,
    dark: Dark = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Shows how far tasks need the same heads and neurons: rank correlation and overlap, layer by layer.

    Example: [cyan]jaxprune compare sst2.safetensors mrpc.safetensors -o overlap.png[/cyan]
    """
    with terminal.working():
        from jaxprune.cli import comparison
        from jaxprune.cli.render import tables

        kept = read_fractions("--fractions", fractions)
        record = comparison.compare_scores(scores, fractions=kept, picture=picture, dark=dark, overwrite=overwrite)
    lines = [tables.overlap_note(record)] + ([] if picture is None else [f"Picture: {picture}"])
    terminal.show(record, *tables.overlap_tables(record), *lines, as_json=as_json)


@terminal.grouped
def check(
    model: ModelName,
    task: OneTask,
    scores: Annotated[Path, option("The score file to check.", metavar="FILE")],
    rows: RowOptions,
    units: Annotated[int, measured("Units of each kind that are removed, one at a time.")] = 64,
    examples: Annotated[int, measured("The most calibration rows on which they are removed.")] = 64,
    orders: Annotated[int, measured("Random orders of deletion, 2 to 10.")] = 5,
    fractions: Annotated[str, measured("Of the units that are deleted.", metavar="A,B,...")] = DELETED,
    split: Annotated[str, measured("Rows to test on while units are deleted.")] = "dev",
    limit: Annotated[int, measured("The most of them.")] = 256,
    seed: Annotated[int, measured("Of the sample of units and of the random orders.")] = 0,
    batch_size: Annotated[int, measured("Examples in a batch.")] = 32,
    chunk: Annotated[int, measured("Units closed together, for accelerators with room.")] = 1,
    picture: Annotated[
        Path | None, option("A picture to write, .png or .svg.", "--output", "-o", metavar="PICTURE")
    ] = None,
    dark: Dark = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Checks whether scores can be trusted: completeness, true removal of units, deletion against random orders.

    Example: [cyan]jaxprune check multi --scores sst2.safetensors --task sst2 --data data[/cyan]

    The exit code is 1 if a check fails, and 0 if none does.
    """
    with terminal.working() as bars:
        from jaxprune.cli.checking import check_model
        from jaxprune.cli.render import tables
        from jaxprune.pruning import checks

        checking = checks.Checking(
            units=units,
            examples=examples,
            chunk=chunk,
            orders=orders,
            fractions=read_fractions("--fractions", fractions)[::-1],
            split=split,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
        )
        how = {"picture": picture, "dark": dark, "overwrite": overwrite, "watch": bars}
        record = check_model(model, scores, rows.of(task), checking, **how)
    lines = [f"Verdict: {record['verdict']}"] + ([] if picture is None else [f"Picture: {picture}"])
    terminal.show(record, *tables.check_tables(record), *lines, as_json=as_json)
    if record["verdict"] == checks.FAIL:
        raise typer.Exit(1)


@terminal.grouped
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
        from jaxprune.cli import workflow
        from jaxprune.cli.render import tables

        measuring = workflow.Measuring(head=head, limit=limit, **asdict(batches))
        record = workflow.evaluate_model(
            model, [rows.of(name) for name in task], split=split, generated=generate, measuring=measuring, watch=bars
        )
    terminal.show(record, tables.evaluation_table(record["results"]), as_json=as_json)

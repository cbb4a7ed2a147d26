"""The commands. Heavy packages are imported only when a command runs, so `--help` answers at once."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jaxprune import __version__
from jaxprune.cli import looking, terminal, training
from jaxprune.cli import scoring as scores
from jaxprune.cli.options import (
    BatchOptions,
    BudgetOptions,
    CriterionOptions,
    Folder,
    Head,
    Json,
    ModelName,
    OneTask,
    Overwrite,
    ReceiptOptions,
    RecoveryOptions,
    RowOptions,
    ScoringOptions,
    SelectionOptions,
    choice,
    find,
    given,
    grouped,
    kept,
    measured,
    option,
    rows,
    scoring,
)

EPILOG = (
    "Long-running commands resume after an interruption: run the same one again. Bad input ends with exit code 2 and "
    "one line on stderr; JAXPRUNE_TRACEBACK=1 shows where it came from. Compiled programs, latency tables and digests "
    "of models are kept in ~/.cache/jaxprune; JAX_COMPILATION_CACHE_DIR names another folder for the programs."
)

BAD_INPUT = (ValueError, TypeError, OSError, MemoryError)  # what is raised for a wrong argument, file or folder


def complain(message: str) -> None:
    """Prints an error in one line on stderr."""
    print(f"jaxprune: error: {terminal.visible(' '.join(message.split()))}", file=sys.stderr)


def describe(error: BaseException) -> str:
    """An error in words; of the system's errors the reason and the file."""
    if isinstance(error, OSError) and error.strerror:
        files = [str(name) for name in (error.filename, error.filename2) if name]
        return f"{error.strerror}: {' and '.join(files)}" if files else error.strerror
    return str(error) or type(error).__name__


class Commands(TyperGroup):
    """Turns errors into one line on stderr and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs a command: exit code 2 for bad input, 130 after Ctrl-C."""
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            hint = f" See `{context.command_path} --help`." if context is not None else ""
            complain(error.format_message() + hint)
            code = 2
        except BAD_INPUT as error:
            if os.environ.get("JAXPRUNE_TRACEBACK"):
                raise
            complain(describe(error))
            code = 2
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or os.environ.get("JAXPRUNE_TRACEBACK"):
                raise
            complain(f"out of memory: use a smaller --batch-size ({str(error).splitlines()[0]})")
            code = 2
        if code == 130:
            print("interrupted; run the same command again to resume", file=sys.stderr)
        if standalone_mode:
            sys.exit(code or 0)
        return code


app = typer.Typer(
    cls=Commands, add_completion=False, rich_markup_mode="rich", epilog=EPILOG, pretty_exceptions_enable=False
)


@app.callback(invoke_without_command=True)
def jaxprune(
    context: typer.Context, version: Annotated[bool, option("Print the version.", "--version")] = False
) -> None:
    """Makes a multi-task language model small for one task, in minutes, without training.

    Begin with: [cyan]jaxprune demo[/cyan]
    """
    if version:
        typer.echo(f"jaxprune {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@grouped
def score(
    model: ModelName,
    task: OneTask,
    output: Annotated[Path, option("The score file to write.", "--output", "-o", metavar="FILE")],
    rows: RowOptions,
    batches: BatchOptions,
    scoring: ScoringOptions,
    settings: CriterionOptions,
    until_stable: Annotated[
        float | None,
        scoring("Stop when another run would rank units so similarly; --examples is the most.", metavar="0.95"),
    ] = None,
    head: Head = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Scores every head and neuron by how much a task needs it; one score file serves every budget.

    Example: [cyan]jaxprune score multi --task sst2 --data data -o sst2.safetensors[/cyan]
    """
    with terminal.working() as bars:
        from jaxprune.cli import workflow
        from jaxprune.cli.render import tables

        how = replace(scoring.build(settings, head, batches), until_stable=until_stable)
        memory = terminal.digests_folder()
        record = workflow.score_model(model, rows.of(task), output, how, overwrite=overwrite, memory=memory, watch=bars)
    lines = (f"Scores: {output}", f"Next:   jaxprune prune {model} --scores {output} --flops 0.5 -o smaller")
    terminal.show(record, tables.scores_table(record), *tables.stability_tables(record), *lines, as_json=as_json)


@app.command()
@grouped
def prune(
    context: typer.Context,
    model: ModelName,
    output: Folder,
    budget: BudgetOptions,
    selection: SelectionOptions,
    rows: RowOptions,
    batches: BatchOptions,
    scoring: ScoringOptions,
    settings: CriterionOptions,
    recovery: RecoveryOptions,
    receipts: ReceiptOptions,
    scores: Annotated[
        list[Path] | None, option("A score file, or one per task; otherwise --task is scored.", metavar="FILE")
    ] = None,
    task: Annotated[
        list[str] | None, rows("The task to score, and to test before and after; repeat it for several.")
    ] = None,
    together: Annotated[
        str | None,
        choice("together", "Several tasks: mean scores (default), or units that any or all keep.", "Selection"),
    ] = None,
    rounds: Annotated[
        int, kept("Rounds to the budget; the rest is scored again before each.", "--rounds", metavar="N")
    ] = 1,
    head: Head = None,
    evaluate: Annotated[bool, measured("Test before and after.", "--evaluate/--no-evaluate")] = True,
    limit: Annotated[int | None, measured("The most test examples.")] = None,
    measure: Annotated[str, measured("Examples per timed pass; 0: none.", metavar="1,32")] = "1,32",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Removes what a task does not need, to a budget, and shows before and after.

    Examples: [cyan]jaxprune prune multi --task sst2 --data data --flops 0.5 -o small[/cyan] scores on the way.
    [cyan]jaxprune prune multi --scores sst2.safetensors --flops 0.5 -o small[/cyan] needs no data.
    [cyan]jaxprune prune multi --task sst2 --task mrpc --flops 0.5 -o small[/cyan] keeps what both need.
    [cyan]jaxprune prune multi --scores sst2.safetensors --latency 12ms -o small[/cyan] measures modules first.
    [cyan]jaxprune prune multi --task sst2 --data data --flops 0.2 --rounds 3 -o small[/cyan] scores in each round.
    """
    with terminal.working() as bars:
        scores, task = scores or [], task or []
        if not scores and not task:
            raise ValueError("name the task to score with --task, or a score file with --scores.")
        if scores and (unused := given(context, ScoringOptions, CriterionOptions)):
            raise ValueError(f"{unused}: for scoring, but --scores gives scores that are made already.")
        if not task and (unused := given(context, RowOptions, "head", "limit")):
            raise ValueError(f"{unused}: for testing, but there is no --task to test on.")
        if together is not None and len(scores or task) < 2:
            raise ValueError("--together is for several tasks: name more of them with --task, or of --scores.")
        timed = measure.split(",")
        if not all(part.strip().isdigit() for part in timed):
            raise ValueError(f"--measure takes whole numbers, such as 1,32 (0: none), got {measure!r}.")
        from jaxprune.cli.pruning import prune_model
        from jaxprune.cli.render import tables
        from jaxprune.cli.workflow import Measuring
        from jaxprune.pruning.prune import Pruning

        pruning = Pruning(
            scoring=scoring.build(settings, head, batches),
            rules=selection.build(),
            recovery=recovery.build(scoring.seed, batches, rounds, scoring=not scores),
            rounds=rounds,
            recover_each_round=recovery.recover_rounds == "each",
            together=find("together", together or "pooled"),
            report_loss=receipts.receipt,
            reselect=receipts.receipt_rounds,
        )
        sizes = tuple(int(part) for part in timed if int(part))
        measuring = Measuring(evaluate=evaluate, head=head, limit=limit, batches=sizes, **asdict(batches))
        record = prune_model(
            model,
            output,
            budget.build(selection.tokens()),
            pruning,
            tasks=[rows.of(name) for name in task],
            scored=scores,
            measuring=measuring,
            overwrite=overwrite,
            watch=bars,
        )
    lines = [*tables.before_after_notes(record), *tables.headless_notes(record)]
    for own in tables.receipts_of(record):
        lines += [tables.receipt_table(own), *tables.receipt_notes(own)]
    lines += ["", f"Model:  {output}"]
    if not scores:
        files = ", ".join(own["scores"] for own in record.get("tasks", [record]))
        lines.append(f"Scores: {files} (other budgets: --scores)")
    terminal.show(record, tables.before_after_table(record), *lines, as_json=as_json)


@app.command()
@grouped
def share(
    model: ModelName,
    scores: Annotated[list[Path], option("A score file of the model, one per task.", "--scores", metavar="FILE")],
    budget: BudgetOptions,
    selection: SelectionOptions,
    output: Annotated[
        Path | None,
        option("The folder to write; without it the tasks are added to MODEL.", "--output", "-o", metavar="FOLDER"),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Puts many tasks into one folder: the weights once, and about a kilobyte of gates per task, each to the budget.

    Examples: [cyan]jaxprune share multi --scores sst2.safetensors --scores qnli.safetensors --flops 0.5 -o all[/cyan]
    [cyan]jaxprune share all --scores rte.safetensors --flops 0.3[/cyan] adds a task, the weights stay as they are.
    [cyan]jaxprune evaluate all#sst2 --task sst2[/cyan] takes the model of one task, as every command does.

    Gates say which units stay, no more: a model that is repaired (prune --recover) needs a folder of its own.
    """
    with terminal.working() as bars:
        from jaxprune.cli import sharing
        from jaxprune.cli.render import tables

        chosen = budget.build(selection.tokens()), selection.build()
        record = sharing.share_model(model, scores, *chosen, output, overwrite=overwrite, watch=bars)
    folder, task = record["output"], record["tasks"][0]["task"]
    lines = (tables.share_note(record), "", f"Next: jaxprune inspect {folder}#{task}")
    terminal.show(record, tables.share_table(record), *lines, as_json=as_json)


@app.command()
@grouped
def plan(
    model: ModelName,
    scores: Annotated[Path, option("A score file of the model.", "--scores", metavar="FILE")],
    budget: BudgetOptions,
    selection: SelectionOptions,
    as_json: Json = False,
) -> None:
    """Shows what a budget would leave, layer by layer, and what that would cost; needs no data and writes no model.

    Example: [cyan]jaxprune plan multi --scores sst2.safetensors --latency 0.5[/cyan]

    For a latency, the modules are measured on this device, once: the table is kept.
    """
    with terminal.working() as bars:
        from jaxprune.cli import planning
        from jaxprune.cli.render import tables

        length, memory = selection.tokens(), terminal.digests_folder()
        how = {"timing": budget.timing(length), "memory": memory, "watch": bars}
        record = planning.plan_model(model, scores, budget.build(length), selection.build(), **how)
    terminal.show(record, *tables.plan_tables(record), *tables.plan_notes(record), as_json=as_json)


for command in (
    *(looking.sweep, looking.inspect, scores.compare, scores.check, looking.evaluate),
    *(training.finetune, training.sparsify, training.distill, training.augment),
):
    app.command()(command)


@app.command()
def pack(
    model: ModelName,
    output: Folder,
    values: Annotated[str, option("Keep every bit, or round the layers to a byte.", metavar="exact|int8")] = "exact",
    unpack: Annotated[bool, option("Write a dense file instead.", "--unpack")] = False,
    half: Annotated[bool, option("Cast the weights to half precision first.", "--half")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Writes a sparse model without its zeros, and shows what that saves; every command reads it as before.

    Examples: [cyan]jaxprune pack sparse -o packed[/cyan] keeps every bit.
    [cyan]jaxprune pack packed --unpack -o dense[/cyan] gives them back, for programs that read dense files.
    """
    with terminal.working():
        if values not in ("exact", "int8"):
            raise ValueError(f"--values is exact or int8, got {values!r}.")
        if unpack and values != "exact":
            raise ValueError("--values says how to pack, but --unpack writes a dense file: give one of them.")
        from jaxprune.cli import storage
        from jaxprune.cli.render import tables

        how = {"values": None if unpack else values, "dtype": "float16" if half else None, "overwrite": overwrite}
        record = storage.pack_model(model, output, **how)
    lines = (tables.storage_note(record), f"Model: {output}")
    terminal.show(record, tables.storage_table(record), *lines, as_json=as_json)


@app.command()
@grouped
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
        from jaxprune.cli import demo
        from jaxprune.cli.render import tables

        record = demo.demo(output, chosen=task, source=model, data=data, watch=bars)
    shown = (
        tables.comparison_table(record["tasks"], demo.VARIANTS, record["task"]),
        tables.before_after_table(record),
    )
    files = (f"{title.capitalize() + ':':9}{file}" for title, file in record["files"].items())
    terminal.show(
        record, *shown, demo.explain(record), "", *files, "", "Next:", *demo.next_steps(record), as_json=as_json
    )


def main() -> None:
    """Runs the command line."""
    app(prog_name="jaxprune")

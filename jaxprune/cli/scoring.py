"""The commands about scores: score, check, compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxprune.cli import terminal
from jaxprune.cli.options import (
    BatchOptions,
    CriterionOptions,
    Head,
    Json,
    ModelName,
    OneTask,
    Overwrite,
    PictureOptions,
    RowOptions,
    ScoringOptions,
    build,
    check_different,
    grouped,
    measured,
    option,
    read_fractions,
    scoring,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxprune.data.tasks import Task
    from jaxprune.pruning.checks import Checking
    from jaxprune.scoring.run import Scoring

FRACTIONS = "0.7,0.5,0.3"
DELETED = "0.1,0.3,0.5,0.7,0.9"


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
        from jaxprune.cli.render import tables

        chosen = replace(scoring.build(settings, head, batches), until_stable=until_stable)
        record = score_model(model, lambda: rows.load(task, bars), output, chosen, overwrite, bars)
    lines = (f"Scores: {output}", f"Next:   jaxprune prune {model} --scores {output} --flops 0.5 -o smaller")
    terminal.show(record, tables.scores_table(record), *tables.stability_tables(record), *lines, as_json=as_json)


def score_model(
    source: str, load_task: Callable[[], Task], output: Path, scoring: Scoring, overwrite: bool, bars: terminal.Bars
) -> dict[str, Any]:
    """Scores a model for a task and writes the score file; an interrupted run resumes.

    The model's digest is remembered, so that budgets can be tried without reading all weights.
    """
    from jaxprune.checkpoints.files import check_file
    from jaxprune.checkpoints.folder import digest_keeper, load
    from jaxprune.pruning.prune import score_into

    check_file(output, overwrite)
    memory = terminal.digests_folder()
    remember = None if memory is None else digest_keeper(source, memory)
    model, params = load(source)
    scores = score_into(model, params, load_task(), scoring, output, bars)
    if remember is not None:
        remember(scores.header["model"])
    return {
        "command": "score",
        "source": source,
        "output": str(output),
        **scores.header,
        "units": sum(value.size for value in scores.values.values()),
        "sites": len(scores.values),
        "means": scores.means is not None,
    }


@dataclass(frozen=True, kw_only=True)
class CheckingOptions:
    """The effort of the checks."""

    units: Annotated[int, measured("Units of each kind that are removed, one at a time.")] = 64
    examples: Annotated[int, measured("The most calibration rows on which they are removed.")] = 64
    orders: Annotated[int, measured("Random orders of deletion, at least 2.")] = 5
    fractions: Annotated[str, measured("Of the units that are deleted.", metavar="A,B,...")] = DELETED
    split: Annotated[str, measured("Rows to test on while units are deleted.")] = "dev"
    limit: Annotated[int, measured("The most of them.")] = 256
    seed: Annotated[int, measured("Of the sample of units and of the random orders.")] = 0
    batch_size: Annotated[int, measured("Examples in a batch.")] = 32
    chunk: Annotated[int, measured("Units closed together, for accelerators with room.")] = 1


@grouped
def check(
    model: ModelName,
    task: OneTask,
    scores: Annotated[Path, option("The score file to check.", metavar="FILE")],
    rows: RowOptions,
    picture: PictureOptions,
    options: CheckingOptions,
    as_json: Json = False,
) -> None:
    """Checks whether scores can be trusted: completeness, true removal of units, deletion against random orders.

    Example: [cyan]jaxprune check multi --scores sst2.safetensors --task sst2 --data data[/cyan]

    The exit code is 1 if a check fails, and 0 if none does.
    """
    with terminal.working() as bars:
        from jaxprune.cli.render import tables
        from jaxprune.cli.render.pictures import deletion_figure
        from jaxprune.pruning import checks

        fractions = read_fractions("--fractions", options.fractions)[::-1]
        checking = build(checks.Checking, options, fractions=fractions)
        picture.check()
        record = check_model(model, scores, lambda: rows.load(task, bars), checking, bars)
        picture.draw(deletion_figure, record)
    lines = [f"Verdict: {record['verdict']}"] + ([f"Picture: {picture.picture}"] if "picture" in record else [])
    terminal.show(record, *tables.check_tables(record), *lines, as_json=as_json)
    if record["verdict"] == checks.FAIL:
        raise typer.Exit(1)


def check_model(
    source: str, file: Path, load_task: Callable[[], Task], checking: Checking, bars: terminal.Bars
) -> dict[str, Any]:
    """Checks a score file; the verdict is fail if one check fails, pass if one passes and none fails."""
    from jaxprune.checkpoints.folder import load
    from jaxprune.pruning.checks import FAIL, PASS, UNDECIDED, check
    from jaxprune.scoring.scores import load_scores

    scores = load_scores(file)
    model, params = load(source)
    task = load_task()

    def progress(done: int, total: int, note: str) -> None:
        stages[note] = stages.get(note) or bars.open(f"checking {note}")
        stages[note](done, total)

    stages: dict[str, Any] = {}

    results = check(model, params, task, scores, checking=checking, progress=progress)
    verdicts = [each.verdict for each in results]
    return {
        "command": "check",
        "source": source,
        "scores": str(file),
        "task": task.name,
        "criterion": scores.header["criterion"],
        "settings": asdict(checking) | {"fractions": [*checking.fractions]},
        "checks": [each._asdict() for each in results],
        "verdict": FAIL if FAIL in verdicts else PASS if PASS in verdicts else UNDECIDED,
    }


@grouped
def compare(
    scores: Annotated[list[Path], typer.Argument(help="Score files of one model, one per task.", metavar="FILE...")],
    picture: PictureOptions,
    fractions: Annotated[str, option("Fractions of the units that are kept.", metavar="A,B,...")] = FRACTIONS,
    as_json: Json = False,
) -> None:
    """Shows how far tasks need the same heads and neurons: rank correlation and overlap, layer by layer.

    Example: [cyan]jaxprune compare sst2.safetensors mrpc.safetensors -o overlap.png[/cyan]
    """
    with terminal.working():
        from jaxprune.cli.render import tables
        from jaxprune.cli.render.pictures import overlap_figure

        picture.check()
        record = compare_files(scores, read_fractions("--fractions", fractions))
        picture.draw(overlap_figure, record)
    lines = [tables.overlap_note(record)] + ([f"Picture: {picture.picture}"] if "picture" in record else [])
    terminal.show(record, *tables.overlap_tables(record), *lines, as_json=as_json)


def compare_files(files: Sequence[Path], fractions: Sequence[float]) -> dict[str, Any]:
    """Compares at least two score files of one model, pair by pair; see `jaxprune.pruning.comparison.compare`."""
    from jaxprune.pruning.comparison import compare
    from jaxprune.scoring.scores import check_same_model, load_scores

    if len(files) < 2:
        raise ValueError(f"a comparison takes two or more score files, got {files[0]}.")
    check_different(files)
    scores = {str(file): load_scores(file) for file in files}
    check_same_model(scores)  # here, under the names of their files
    names = _names(files, [each.header["task"] for each in scores.values()])
    return {
        "command": "compare",
        "model": next(iter(scores.values())).header["model"],
        "files": [
            {"name": name, "file": file} | {key: each.header[key] for key in ("task", "criterion", "examples")}
            for name, (file, each) in zip(names, scores.items(), strict=True)
        ],
        **compare(dict(zip(names, scores.values(), strict=True)), fractions),
    }


def _names(files: Sequence[Path], tasks: Sequence[str]) -> list[str]:
    """Names of files: their task, the beginning of their name, or their path, whichever differs for all."""
    for names in (list(tasks), [file.stem for file in files]):
        if len(set(names)) == len(files):
            return names
    return list(map(str, files))

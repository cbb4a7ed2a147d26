"""The commands that measure and change no model: score, check, compare, inspect, evaluate, sweep."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import jaxprune as jp
from jaxprune.cli import terminal
from jaxprune.cli.options import (
    MOST_TOGETHER,
    BatchOptions,
    CriterionOptions,
    Dark,
    Head,
    Json,
    ModelName,
    OneTask,
    Overwrite,
    PictureOptions,
    RowOptions,
    ScoringOptions,
    SelectionOptions,
    Tasks,
    build,
    check_different,
    choice,
    grouped,
    measured,
    option,
    read_fractions,
    rows,
    say_fewer,
    scoring,
    selecting,
)

if TYPE_CHECKING:
    from jaxprune.models import Model
    from jaxprune.units import Params

FRACTIONS = "0.7,0.5,0.3"
DELETED = "0.1,0.3,0.5,0.7,0.9"
BUDGETS = "0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2"
STRAY = 1e-3  # a smaller share of zeros is no sparsity


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
        from jaxprune.checkpoints.files import check_file
        from jaxprune.checkpoints.folder import digest_keeper
        from jaxprune.cli.render import tables
        from jaxprune.pruning.prune import score_into

        chosen = replace(scoring.build(settings, head, batches), until_stable=until_stable)
        check_file(output, overwrite)
        memory = terminal.digests_folder()
        remember = None if memory is None else digest_keeper(model, memory)
        loaded, params = jp.load(model)
        scores = score_into(loaded, params, rows.load(task, bars, loaded, head), chosen, output, bars)
        if remember is not None:  # so that budgets can be tried without reading all weights
            remember(scores.header["model"])
    record = {
        "command": "score",
        "source": model,
        "output": str(output),
        **scores.header,
        "units": sum(value.size for value in scores.values.values()),
        "sites": len(scores.values),
        "means": scores.means is not None,
    }
    lines = (f"Scores: {output}", f"Next:   jaxprune prune {model} --scores {output} --flops 0.5 -o smaller")
    terminal.show(record, tables.scores_table(record), *tables.stability_tables(record), *lines, as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class CheckingOptions:
    """The effort of the checks."""

    units: Annotated[int, measured("Units of each kind that are removed, one at a time.")] = 64
    examples: Annotated[int, measured("The most calibration rows on which they are removed.")] = 64
    orders: Annotated[int, measured("Random orders of deletion, at least 2.")] = 5
    fractions: Annotated[str, measured("Of the units that are deleted.", metavar="A,B,...")] = DELETED
    split: Annotated[str, measured("Rows to test on while units are deleted.")] = "dev"
    limit: Annotated[int, measured("The most of them.")] = 256
    seed: Annotated[int, measured("Of the sample of units and of the random orders.", least=0)] = 0
    batch_size: Annotated[int, measured("Examples in a batch.", most=MOST_TOGETHER)] = 32
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
        from jaxprune.pruning.checks import FAIL, PASS, UNDECIDED

        fractions = read_fractions("--fractions", options.fractions)[::-1]
        checking = build(jp.Checking, options, fractions=fractions)
        picture.check()
        checked = jp.load_scores(scores)
        loaded, params = jp.load(model)
        rows_of_task = rows.load(task, bars, loaded, checked.header["head"])
        stages: dict[str, Any] = {}

        def progress(done: int, total: int, note: str) -> None:
            stages[note] = stages.get(note) or bars.open(f"checking {note}")
            stages[note](done, total)

        if 0 < (scored := checked.header["examples"]) < options.examples != CheckingOptions.examples:
            bars.say(f"{rows_of_task.name}: --examples is {options.examples:,}, and {scored:,} rows were scored")
        say_fewer(bars, options.limit, rows_of_task, options.split, CheckingOptions.limit)
        results = jp.check(loaded, params, rows_of_task, checked, checking=checking, progress=progress)
        verdicts = [each.verdict for each in results]
        record = {
            "command": "check",
            "source": model,
            "scores": str(scores),
            "task": rows_of_task.name,
            "criterion": checked.header["criterion"],
            "settings": asdict(checking) | {"fractions": [*checking.fractions]},
            "checks": [each._asdict() for each in results],
            "verdict": FAIL if FAIL in verdicts else PASS if PASS in verdicts else UNDECIDED,
        }
        picture.draw(deletion_figure, record)
    lines = (f"Verdict: {record['verdict']}", *picture.lines())
    terminal.show(record, *tables.check_tables(record), *lines, as_json=as_json)
    if record["verdict"] == FAIL:
        raise typer.Exit(1)


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
        from jaxprune.scoring.scores import check_same_model

        picture.check()
        kept = read_fractions("--fractions", fractions)
        if len(scores) < 2:
            raise ValueError(f"a comparison takes two or more score files, got {scores[0]}.")
        check_different(scores)
        loaded = {str(file): jp.load_scores(file) for file in scores}
        check_same_model(loaded)  # here, under the names of their files
        headers = [each.header for each in loaded.values()]
        names = _names(scores, [header["task"] for header in headers])
        record = {
            "command": "compare",
            "model": headers[0]["model"],
            "files": [
                {"name": name, "file": file} | {key: header[key] for key in ("task", "criterion", "examples")}
                for name, file, header in zip(names, loaded, headers, strict=True)
            ],
            **jp.compare(dict(zip(names, loaded.values(), strict=True)), kept),
        }
        picture.draw(overlap_figure, record)
    lines = (tables.overlap_note(record), *picture.lines())
    terminal.show(record, *tables.overlap_tables(record), *lines, as_json=as_json)


def _names(files: Sequence[Path], tasks: Sequence[str]) -> list[str]:
    """Names of files: their task, the beginning of their name, or their path, whichever differs for all."""
    for names in (list(tasks), [file.stem for file in files]):
        if len(set(names)) == len(files):
            return names
    return list(map(str, files))


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
        from jaxprune.checkpoints.gates import PRUNING
        from jaxprune.checkpoints.shared import pruning_of
        from jaxprune.checkpoints.tensors import model_digest
        from jaxprune.cli.render import tables
        from jaxprune.cli.render.pictures import inspection_figure
        from jaxprune.pruning.inspection import inspect

        picture.check()
        given = None if scores is None else jp.load_scores(scores)
        loaded, params = jp.load(model)
        pruning, zeros = pruning_of(model, loaded), _zeros(loaded, params)
        layers, ranks = inspect(loaded, params, pruning=pruning, scores=given)
        written = (pruning or {}).get("pruned")
        if isinstance(written, Mapping) and written.get("digest") != model_digest(loaded, params):
            warnings.warn(f"the weights of {model} are not those that its {PRUNING} was written with.", stacklevel=2)
        for row in (*layers["layers"], layers["total"]):
            row["zeros"] = zeros.get(row["layer"])
        record = {
            "command": "inspect",
            "source": model,
            "model_type": loaded.config.model_type,
            "heads": list(loaded.heads),
            "tasks": _tasks(model, loaded),
            "parameters": jp.parameters(params),
            "pruned": None if pruning is None else pruning.get("settings"),
            "scores": None if scores is None else str(scores),
            **layers,
        }
        picture.draw(inspection_figure, record, ranks)
    lines = (tables.inspection_note(record), *picture.lines())
    terminal.show(record, tables.inspection_table(record), *lines, as_json=as_json)


def _tasks(source: str, model: Model) -> list[str]:
    """The tasks whose gates are stored beside the dense model."""
    from jaxprune.checkpoints.folder import split_task
    from jaxprune.checkpoints.gates import GATES, read_gates

    file = None if model.source is None or split_task(source)[1] is not None else model.source / GATES
    return sorted(read_gates(file).tasks) if file is not None and file.is_file() else []


def _zeros(model: Model, params: Params) -> dict[str, float]:
    """The share of zeros in the linear maps of each layer, and of all; nothing if there is no more than a stray one."""
    from jaxprune.sparse.masks import sparsity_of
    from jaxprune.sparse.patterns import linear_maps
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
        from jaxprune.cli.render import tables
        from jaxprune.evaluation.evaluate import fitting_head

        loaded, params = jp.load(model)
        if generate and not loaded.answers_in_text:
            raise ValueError(f"{model} has task heads and writes no text: leave --generate out.")
        tasks = [rows.load(name, bars, loaded, head) for name in task]
        for each in tasks:  # all of them before the first is measured
            each.rows(split)
            fitting_head(loaded, each, head)
            say_fewer(bars, limit, each, split)
        tested, results = jp.Rows(examples=limit, split=split, **asdict(batches)), []
        for each in tasks:
            bar = bars.open(f"testing {each.name}")
            result = jp.evaluate(loaded, params, each, rows=tested, head=head, generated=generate, progress=bar)
            results.append(result.to_json())
    record = {"command": "evaluate", "source": model, "results": results}
    terminal.show(record, tables.evaluation_table(results), as_json=as_json)


def generate(
    model: ModelName,
    prompt: Annotated[list[str], typer.Argument(help="What the text goes on from, or answers; once or more.")],
    max_new_tokens: Annotated[int, option("The most tokens to write.", most=MOST_TOGETHER)] = 64,
    temperature: Annotated[float | None, option("Draw tokens, likely ones more often below 1; else greedy.")] = None,
    top_p: Annotated[float | None, option("Draw among the likeliest tokens of this probability.")] = None,
    seed: Annotated[int, option("Of what is drawn.", least=0)] = 0,
    chat: Annotated[bool, option("Put each prompt into the model's chat template.", "--chat")] = False,
    as_json: Json = False,
) -> None:
    """Writes text with a model: a look at what pruning did to its words.

    Example: [cyan]jaxprune generate small "The capital of France is" --max-new-tokens 8[/cyan]
    """
    with terminal.working():
        from jaxprune.evaluation.text import Sampling, encode_prompts, stop_tokens, texts

        drawn = {"temperature": temperature, "top_p": top_p}
        given = {name: value for name, value in drawn.items() if value is not None}
        sampling = Sampling(**given, key=seed) if given else None
        loaded, params = jp.load(model)
        if not loaded.answers_in_text:
            raise ValueError(f"{model} has task heads and writes no text: use evaluate.")
        batch, stop = encode_prompts(loaded, prompt, chat=chat), stop_tokens(loaded)
        tokens = jp.generate(loaded, params, batch, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
        answers = [
            {"prompt": text, "text": written} for text, written in zip(prompt, texts(loaded, tokens), strict=True)
        ]
    settings = {"max_new_tokens": max_new_tokens, "sampling": given and given | {"seed": seed}, "chat": chat}
    record = {"command": "generate", "source": model, "settings": settings, "results": answers}
    terminal.show(record, *(f"{each['prompt']}\n  -> {each['text']}\n" for each in answers), as_json=as_json)


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
        from jaxprune.checkpoints.files import check_file, file_stem
        from jaxprune.cli.render import tables
        from jaxprune.cli.render.pictures import FORMATS, sweep_figure
        from jaxprune.pruning.inspection import RESULTS, TABLE, Sweeping, check_budgets, sweep

        sweeping = Sweeping(
            criteria=settings.build(*criterion),
            budgets=read_fractions("--flops", flops),
            seeds=seeds,
            examples=examples,
            length=selection.tokens(),
            rules=selection.build(),
            rows=jp.Rows(split=split, examples=limit, **asdict(batches)),
            head=head,
        )
        for name in (RESULTS, TABLE):
            check_file(output / name, overwrite=True)
        loaded, params = jp.load(model)
        check_budgets(loaded, params, sweeping)
        tasks = [rows.load(name, bars, loaded, head) for name in task]
        for each in tasks:
            say_fewer(bars, limit, each, split)
        record = sweep(loaded, params, tasks, sweeping, output, about={"source": model}, watch=bars)
        files = {"table": [output / TABLE], "record": [output / RESULTS], "pictures": []}
        for name in record["settings"]["tasks"]:
            points = [row for row in record["rows"] if row["task"] == name]
            for ending in FORMATS:
                files["pictures"].append(output / f"{file_stem(name)}.{ending}")
                sweep_figure(files["pictures"][-1], points, split=split, dark=dark)
        record |= {"files": {title: list(map(str, paths)) for title, paths in files.items()}}
    lines = (f"{title.capitalize() + ':':10}{', '.join(names)}" for title, names in record["files"].items())
    terminal.show(record, *tables.sweep_tables(record), tables.sweep_note(record), "", *lines, as_json=as_json)

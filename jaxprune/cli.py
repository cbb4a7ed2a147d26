"""The commands. Heavy packages are imported only when a command runs, so `--help` answers at once."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from jaxprune import __version__, terminal

if TYPE_CHECKING:
    from jaxprune.workflow import Data, Scoring, Selection

# What the names on the command line stand for: option -> name -> function or class, imported when it is asked for.
FUNCTIONS: Mapping[str, Mapping[str, str]] = {
    "criterion": {
        "integrated-gradients": "attribution:IntegratedGradients",
        "gradient-activation": "attribution:GradientActivation",
        "random": "baselines:Random",
        "magnitude": "baselines:Magnitude",
        "activation": "baselines:Activation",
        "wanda": "baselines:Wanda",
        "gradient": "baselines:Gradient",
        "taylor": "baselines:Taylor",
        "fisher": "baselines:Fisher",
        "top-layers": "baselines:TopLayers",
        "leave-one-out": "baselines:LeaveOneOut",
    },
    "path": {"joint": "attribution:joint", "layer": "attribution:layer"},
    "rule": {
        "gauss-legendre": "integration:gauss_legendre",
        "riemann": "integration:riemann",
        "trapezoid": "integration:trapezoid",
    },
    "objective": {
        "probability": "objectives:probability",
        "log-probability": "objectives:log_probability",
        "margin": "objectives:margin",
        "squared-error": "objectives:negative_squared_error",
    },
    "labels": {
        "gold": "objectives:gold",
        "predicted": "objectives:predicted",
        "every": "objectives:every",
        "sampled": "objectives:sampled",
    },
    "tokens": {
        "sum": "models.layers:sum_tokens",
        "absolute": "models.layers:absolute_tokens",
        "squared": "models.layers:squared_tokens",
        "max": "models.layers:max_tokens",
    },
    "examples-reduction": {
        "absolute": "objectives:absolute",
        "signed": "objectives:signed",
        "squared": "objectives:squared",
        "maximum": "objectives:maximum",
    },
    "closed": {"zero": "activations:zero", "mean": "activations:calibration_means"},
    "normalise": {"l2": "selection:per_layer_l2"},
}
SETTINGS = {  # option -> the setting of a criterion that it sets
    "nodes": "nodes",
    "chunk": "chunk",
    "path": "path",
    "start": "start",
    "rule": "rule",
    "objective": "objective",
    "labels": "labels",
    "tokens": "tokens",
    "examples-reduction": "examples",
    "closed": "closed",
}

EPILOG = (
    "Long commands go on where they were interrupted: run the same one again. Bad input ends with exit code 2 and one "
    "line on stderr; JAXPRUNE_TRACEBACK=1 shows where it came from. Compiled programs are kept in ~/.cache/jaxprune; "
    "JAX_COMPILATION_CACHE_DIR names another folder."
)

app = typer.Typer(
    cls=terminal.Commands, add_completion=False, rich_markup_mode="rich", epilog=EPILOG, pretty_exceptions_enable=False
)


def choice(option: str, text: str, panel: str = "Scoring") -> Any:
    """An option whose values are the names in `FUNCTIONS`."""
    names = list(FUNCTIONS[option])

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            close = difflib.get_close_matches(value, names, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"--{option} {value!r} is none of {', '.join(names)}.{hint}")
        return value

    if len(names) > 4:
        return typer.Option(help=f"{text}: {', '.join(names)}.", callback=check, metavar="NAME", rich_help_panel=panel)
    return typer.Option(help=text, callback=check, metavar="|".join(names), rich_help_panel=panel)


def option(text: str, *names: str, metavar: str | None = None, panel: str | None = None) -> Any:
    """An option and its help."""
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)


def find(option: str, name: str) -> Any:
    """The function or class that a name on the command line stands for."""
    return pkgutil.resolve_name(f"jaxprune.{FUNCTIONS[option][name]}")


rows = partial(option, panel="Task and data")
scoring = partial(option, panel="Scoring")
kept = partial(option, panel="What stays")
measured = partial(option, panel="What is measured")
training = partial(option, panel="Training")

ModelName: TypeAlias = Annotated[str, typer.Argument(help="A model folder, or a name on the Hugging Face hub.")]
OneTask: TypeAlias = Annotated[str, rows("A built-in task, a folder in --data, or your own file or folder.", "--task")]
Tasks: TypeAlias = Annotated[
    list[str], rows("As often as there are tasks: a built-in one, or your own file.", "--task")
]
Folder: TypeAlias = Annotated[Path, option("The folder to write.", "--output", "-o", metavar="FOLDER")]
Head: TypeAlias = Annotated[str | None, rows("The task head; by default the one of the task's name, or the only one.")]
Json: TypeAlias = Annotated[bool, option("One JSON object on stdout, and nothing else.", "--json")]
Overwrite: TypeAlias = Annotated[bool, option("Replace what is there.", "--overwrite")]


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Where the rows of a task come from."""

    data: Annotated[Path | None, rows("Folder with TASK/train.jsonl and so on. Without it: the hub.")] = None
    text: Annotated[str | None, rows("Own files: column of the text.", metavar="COLUMN")] = None
    text_pair: Annotated[str | None, rows("Own files: column of the second text.", metavar="COLUMN")] = None
    label: Annotated[str | None, rows("Own files: column of the label.", metavar="COLUMN")] = None
    label_names: Annotated[str | None, rows("Own files: names in the order of the task head.", metavar="A,B,...")] = (
        None
    )

    def of(self, task: str) -> Data:
        """The task, not read yet."""
        from jaxprune.workflow import Data

        labels = None if self.label_names is None else tuple(self.label_names.split(","))
        return Data(
            task=task, data=self.data, text=self.text, text_pair=self.text_pair, label=self.label, labels=labels
        )


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How texts are batched."""

    batch_size: Annotated[int, rows("Examples in a batch.")] = 32
    max_length: Annotated[int | None, rows("Tokens to which texts are cut; 128 by default.")] = None


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How units are scored. What is None is the criterion's own default."""

    criterion: Annotated[str, choice("criterion", "How units are scored")] = "integrated-gradients"
    examples: Annotated[int, scoring("Calibration rows to score with, stratified by label.")] = 128
    seed: Annotated[int, scoring("Of the draw of the rows, and of criteria that draw.")] = 0
    nodes: Annotated[int | None, scoring("Quadrature nodes of integrated gradients; 8 by default.")] = None
    chunk: Annotated[int | None, scoring("Nodes, or heads left out, evaluated together; 1 by default.")] = None
    path: Annotated[str | None, choice("path", "All gates together (default), or one module at a time: slower.")] = None
    start: Annotated[float | None, scoring("Where the path starts, in [0, 1); 0 by default.")] = None
    rule: Annotated[str | None, choice("rule", "The quadrature; gauss-legendre by default.")] = None
    objective: Annotated[
        str | None, choice("objective", "What must be kept; probability by default, squared-error in a regression.")
    ] = None
    labels: Annotated[str | None, choice("labels", "For which label; gold by default, sampled for fisher.")] = None
    tokens: Annotated[str | None, choice("tokens", "Over the tokens of an example; sum by default.")] = None
    examples_reduction: Annotated[
        str | None, choice("examples-reduction", "Over the examples; absolute by default.")
    ] = None
    closed: Annotated[str | None, choice("closed", "What a removed unit is replaced by; zero by default.")] = None

    def build(self, head: str | None, batches: BatchOptions) -> Scoring:
        """The settings of a scoring run.

        Raises:
            ValueError: If the criterion does not have one of the options.
        """
        from jaxprune.workflow import Scoring

        kind = find("criterion", self.criterion)
        has = {field.name for field in fields(kind) if field.init}
        given = {name: value for name in SETTINGS if (value := getattr(self, name.replace("-", "_"))) is not None}
        if wrong := [f"--{name}" for name in given if SETTINGS[name] not in has]:
            known = ", ".join(f"--{name}" for name, field in SETTINGS.items() if field in has)
            raise ValueError(f"criterion {self.criterion} has no {', '.join(wrong)}; it has {known or 'no options'}.")
        chosen = {SETTINGS[name]: find(name, value) if name in FUNCTIONS else value for name, value in given.items()}
        return Scoring(criterion=kind(**chosen), examples=self.examples, seed=self.seed, head=head, **asdict(batches))


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Which units stay."""

    flops: Annotated[float | None, kept("Fraction of the FLOPs that may stay.")] = None
    parameters: Annotated[float | None, kept("Fraction of the units' parameters that may stay.")] = None
    units: Annotated[float | None, kept("Fraction of the units that may stay.")] = None
    length: Annotated[float | None, kept("Tokens of an example, for FLOPs; by default as scored.")] = None
    per_layer: Annotated[bool, kept("The same fraction everywhere, or all units compete.", "--per-layer/--global")] = (
        True
    )
    multiple_of: Annotated[list[str] | None, kept("Round widths down to a multiple.", metavar="neurons=8")] = None
    floor: Annotated[list[str] | None, kept("What stays in each layer at least.", metavar="heads=1")] = None
    protect: Annotated[list[str] | None, kept("Layers (0) and sites (3.ffn.neurons) that stay whole.")] = None
    normalise: Annotated[str | None, choice("normalise", "Divide each site's scores by their norm.", "What stays")] = (
        None
    )

    def build(self) -> Selection:
        """The arguments of `select`."""
        from jaxprune.workflow import Selection

        return Selection(
            units=self.units,
            parameters=self.parameters,
            flops=self.flops,
            length=self.length,
            per_layer=self.per_layer,
            multiple_of=by_kind("--multiple-of", self.multiple_of),
            floor=by_kind("--floor", self.floor),
            protect=tuple(int(item) if item.isdigit() else item for item in self.protect or ()),
            normalise=None if self.normalise is None else find("normalise", self.normalise),
        )


def by_kind(name: str, values: list[str] | None) -> int | dict[str, int] | None:
    """Reads `8`, or `neurons=8` and `heads=2`."""
    if values and len(values) == 1 and values[0].isdigit():
        return int(values[0])
    return numbers(name, values) or None


def numbers(name: str, values: list[str] | None) -> dict[str, int]:
    """Reads `NAME=NUMBER`, each name once."""
    found: dict[str, int] = {}
    for value in values or ():
        key, _, number = value.partition("=")
        if not key or not number.isdigit() or key in found:
            raise ValueError(f"{name} takes NAME=NUMBER, each name once; got {value!r}.")
        found[key] = int(number)
    return found


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
@terminal.grouped
def score(
    model: ModelName,
    task: OneTask,
    output: Annotated[Path, option("The score file to write.", "--output", "-o", metavar="FILE")],
    rows: RowOptions,
    batches: BatchOptions,
    scoring: ScoringOptions,
    head: Head = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Scores every head and neuron by how much a task needs it; one score file serves every budget.

    Example: [cyan]jaxprune score multi --task sst2 --data data -o sst2.safetensors[/cyan]
    """
    with terminal.working() as bars:
        from jaxprune import report, workflow

        settings = scoring.build(head, batches)
        record = workflow.score_model(model, rows.of(task), output, settings, overwrite=overwrite, watch=bars)
    lines = (f"Scores: {output}", f"Next:   jaxprune prune {model} --scores {output} --flops 0.5 -o smaller")
    terminal.show(record, report.scores_table(record), *lines, as_json=as_json)


@app.command()
@terminal.grouped
def prune(
    context: typer.Context,
    model: ModelName,
    output: Folder,
    selection: SelectionOptions,
    rows: RowOptions,
    batches: BatchOptions,
    scoring: ScoringOptions,
    scores: Annotated[Path | None, option("A score file; without it --task is scored.", metavar="FILE")] = None,
    task: Annotated[str | None, rows("What to score, and to test before and after.")] = None,
    head: Head = None,
    evaluate: Annotated[bool, measured("Test before and after.", "--evaluate/--no-evaluate")] = True,
    limit: Annotated[int | None, measured("The most test examples.")] = None,
    latency: Annotated[str, measured("Examples per timed pass; 0: none.", metavar="1,32")] = "1,32",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Removes what a task does not need, to a budget, and shows before and after.

    Examples: [cyan]jaxprune prune multi --task sst2 --data data --flops 0.5 -o small[/cyan] scores on the way.
    [cyan]jaxprune prune multi --scores sst2.safetensors --flops 0.5 -o small[/cyan] needs no data.
    """
    with terminal.working() as bars:
        if scores is None and task is None:
            raise ValueError("name the task to score with --task, or a score file with --scores.")
        if scores is not None and (unused := given(context, ScoringOptions)):
            raise ValueError(f"{unused}: for scoring, but --scores gives scores that are made already.")
        if task is None and (unused := given(context, RowOptions, "head", "limit")):
            raise ValueError(f"{unused}: for testing, but there is no --task to test on.")
        timed = latency.split(",")
        if not all(part.strip().isdigit() for part in timed):
            raise ValueError(f"--latency takes whole numbers, such as 1,32 (0: none), got {latency!r}.")
        from jaxprune import report, workflow

        record = workflow.prune_model(
            model,
            output,
            selection.build(),
            scored=scoring.build(head, batches) if scores is None else scores,
            data=None if task is None else rows.of(task),
            measuring=workflow.Measuring(
                evaluate=evaluate,
                head=head,
                limit=limit,
                batches=tuple(int(part) for part in timed if int(part)),
                **asdict(batches),
            ),
            overwrite=overwrite,
            watch=bars,
        )
    lines = [*report.before_after_notes(record), "", f"Model:  {output}"]
    if scores is None:
        lines.append(f"Scores: {record['scores']} (other budgets: --scores)")
    terminal.show(record, report.before_after_table(record), *lines, as_json=as_json)


def given(context: typer.Context, group: type, *more: str) -> str:
    """The options of a group, and some more, that are on the command line."""
    found = []
    for name in (*(field.name for field in fields(group)), *more):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            found.append("--" + name.replace("_", "-"))
    return ", ".join(found)


@app.command()
@terminal.grouped
def evaluate(
    model: ModelName,
    task: Tasks,
    rows: RowOptions,
    batches: BatchOptions,
    split: Annotated[str, rows("train, calibration, dev (for choices) or test (to report).")] = "test",
    head: Head = None,
    limit: Annotated[int | None, rows("The most examples of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Measures a model on one or several tasks.

    Example: [cyan]jaxprune evaluate small --task sst2 --task mrpc --data data[/cyan]
    """
    with terminal.working() as bars:
        from jaxprune import report, workflow

        measuring = workflow.Measuring(head=head, limit=limit, **asdict(batches))
        record = workflow.evaluate_model(
            model, [rows.of(name) for name in task], split=split, measuring=measuring, watch=bars
        )
    terminal.show(record, report.evaluation_table(record["results"]), as_json=as_json)


@app.command()
@terminal.grouped
def finetune(
    encoder: ModelName,
    task: Tasks,
    output: Folder,
    rows: RowOptions,
    batches: BatchOptions,
    epochs: Annotated[int, training("Passes over the rows.")] = 3,
    learning_rate: Annotated[float, training("At its peak.")] = 5e-5,
    rows_of: Annotated[
        list[str] | None, training("Rows of a task in an epoch; all by default.", "--rows", metavar="sst2=20000")
    ] = None,
    pooling: Annotated[str, training("Of the new task heads.", metavar="first|mean")] = "mean",
    dense: Annotated[
        str | None, training("A layer before their output, by its activation.", metavar="tanh|relu")
    ] = None,
    seed: Annotated[int, training("Of the new heads, the order of the rows and dropout.")] = 0,
    dev_limit: Annotated[int, training("The most dev rows of a task to test on after an epoch.")] = 1000,
    half: Annotated[bool, training("Write the weights in half precision.", "--half")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tunes one encoder on several tasks at once, with one task head each.

    Example: [cyan]jaxprune finetune ENCODER --task sst2 --task mrpc --data data -o multi[/cyan]

    Rows that any of the tasks holds out are dropped from the training rows of all. The run is kept in OUTPUT.state.
    """
    with terminal.working() as bars:
        from jaxprune import report, workflow
        from jaxprune.training import Recipe

        recipe = Recipe(
            epochs=epochs,
            learning_rate=learning_rate,
            rows=numbers("--rows", rows_of) or None,
            pooling=pooling,
            dense=dense,
            seed=seed,
            **asdict(batches),
        )
        record = workflow.finetune_model(
            encoder,
            [rows.of(name) for name in task],
            output,
            recipe,
            dev_limit=dev_limit,
            dtype="float16" if half else None,
            overwrite=overwrite,
            watch=bars,
        )
    best = record["best_epoch"]
    table = report.evaluation_table(record["epochs"][best - 1], f"epoch {best}, the best on dev")
    terminal.show(record, table, f"Model: {output}", as_json=as_json)


@app.command()
@terminal.grouped
def demo(
    output: Annotated[Path, option("Folder for the results.", "--output", "-o")] = Path("jaxprune-demo"),
    task: Annotated[str, option("The task to keep.")] = "sst2",
    model: Annotated[Path | None, option("Another model; by default the bundled one.")] = None,
    data: Annotated[Path | None, option("Other data; by default the bundled rows.")] = None,
    as_json: Json = False,
) -> None:
    """Prunes the bundled multi-task model for one task, offline, against two baselines: about a minute.

    Example: [cyan]jaxprune demo --task snips[/cyan]
    """
    with terminal.working() as bars:
        from jaxprune import demo, report

        record = demo.demo(output, chosen=task, source=model, data=data, watch=bars)
    tables = (
        report.comparison_table(record["tasks"], demo.VARIANTS, record["task"]),
        report.before_after_table(record),
    )
    files = (f"{title.capitalize() + ':':9}{file}" for title, file in record["files"].items())
    terminal.show(
        record, *tables, demo.explain(record), "", *files, "", "Next:", *demo.next_steps(record), as_json=as_json
    )


def main() -> None:
    """Runs the command line."""
    app(prog_name="jaxprune")

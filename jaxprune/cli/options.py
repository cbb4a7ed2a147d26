"""The options of the commands, in groups that several commands share, and the meaning of the names in them.

The library is imported only when an option is put to use, so `--help` answers at once.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import os
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast, get_args, get_type_hints

import typer

if TYPE_CHECKING:
    from jaxprune.data.tasks import Task
    from jaxprune.models import Model
    from jaxprune.models.cost import Length
    from jaxprune.pruning.budgets import Budget, Latency, Rules
    from jaxprune.pruning.prune import Watch
    from jaxprune.pruning.recoveries import Recovery
    from jaxprune.scoring.attribution import Criterion
    from jaxprune.scoring.run import Scoring

# Option -> name on the command line -> the function or class that it means, imported when it is needed.
FUNCTIONS: Mapping[str, Mapping[str, str]] = {
    "criterion": {
        "integrated-gradients": "scoring.attribution:IntegratedGradients",
        "gradient-activation": "scoring.attribution:GradientActivation",
        "random": "scoring.criteria:Random",
        "magnitude": "scoring.criteria:Magnitude",
        "activation": "scoring.criteria:Activation",
        "wanda": "scoring.criteria:Wanda",
        "gradient": "scoring.criteria:Gradient",
        "taylor": "scoring.criteria:Taylor",
        "fisher": "scoring.criteria:Fisher",
        "top-layers": "scoring.criteria:TopLayers",
        "block-influence": "scoring.criteria:BlockInfluence",
        "leave-one-out": "scoring.criteria:LeaveOneOut",
    },
    "calibration": {"none": "", "content-free": "", "batch": ""},  # of prompts, by name
    "path": {"joint": "scoring.attribution:joint", "layer": "scoring.attribution:layer"},
    "rule": {
        "gauss-legendre": "scoring.attribution:gauss_legendre",
        "riemann": "scoring.attribution:riemann",
        "trapezoid": "scoring.attribution:trapezoid",
    },
    "objective": {
        "probability": "scoring.objectives:probability",
        "log-probability": "scoring.objectives:log_probability",
        "margin": "scoring.objectives:margin",
        "squared-error": "scoring.objectives:negative_squared_error",
    },
    "labels": {
        "gold": "scoring.objectives:gold",
        "predicted": "scoring.objectives:predicted",
        "every": "scoring.objectives:every",
        "sampled": "scoring.objectives:sampled",
    },
    "tokens": {
        "sum": "models.layers:sum_tokens",
        "absolute": "models.layers:absolute_tokens",
        "squared": "models.layers:squared_tokens",
        "max": "models.layers:max_tokens",
    },
    "examples-reduction": {
        "absolute": "scoring.objectives:absolute",
        "signed": "scoring.objectives:signed",
        "squared": "scoring.objectives:squared",
        "maximum": "scoring.objectives:maximum",
    },
    "closed": {"zero": "scoring.objectives:zero", "mean": "scoring.objectives:calibration_means"},
    "together": {
        "pooled": "pruning.pooling:pooled",
        "union": "pruning.pooling:kept_by_any",
        "intersection": "pruning.pooling:kept_by_all",
    },
    "recover": {
        "none": "",
        "bias": "pruning.recoveries:BiasCompensation",
        "rescale": "pruning.recoveries:Rescaling",
        "reconstruct": "pruning.recoveries:Reconstruction",
    },
    "normalise": {"l2": "pruning.selection:per_layer_l2"},
    "allocation": dict.fromkeys(("auto", "measured", "per-layer", "per-kind", "global"), ""),
    "to": {"hf": "", "gguf": "", "onnx": "", "stablehlo": ""},
    "dtype": dict.fromkeys(("float32", "bfloat16", "float16", "q8_0"), ""),
    "layers": {
        "one-to-one": "training.joint_loss:one_to_one",
        "uniform": "training.joint_loss:uniform",
        "last": "training.joint_loss:last",
    },
    "schedule": {
        "cubic": "sparse.schedules:cubic_schedule",
        "linear": "sparse.schedules:linear_schedule",
        "one-shot": "sparse.schedules:one_shot_schedule",
    },
    "weights": {
        "magnitude": "sparse.masks:WeightMagnitude",
        "movement": "sparse.masks:WeightMovement",
        "fisher": "sparse.masks:WeightFisher",
    },
}
MOST = 2**31 - 1  # the largest whole number on the command line
LARGEST = 1e15  # bytes, seconds or anything else
MOST_TOGETHER = 2**16  # the most that is held in memory at once, in numbers of rows
MOST_SHOTS = 256  # demonstrations of a prompt
MOST_NODES = 2**12  # a rule of n nodes is found in a matrix of n x n
BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
NAMED_ALIKE = ("nodes", "chunk", "path", "start", "rule", "objective", "labels", "tokens", "closed", "kinds")
SETTINGS = {name: name for name in NAMED_ALIKE} | {"examples-reduction": "examples"}  # option -> setting of a criterion


def choice(option: str, text: str, panel: str = "Scoring") -> Any:
    """An option whose values are the names in `FUNCTIONS`."""
    names = list(FUNCTIONS[option])

    def check(value: Any) -> Any:
        for name in value if isinstance(value, list | tuple) else () if value is None else (value,):
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"--{option} {name!r} is none of {', '.join(names)}.{hint}")
        return value

    if len(names) > 4:
        return typer.Option(help=f"{text}: {', '.join(names)}.", callback=check, metavar="NAME", rich_help_panel=panel)
    return typer.Option(help=text, callback=check, metavar="|".join(names), rich_help_panel=panel)


def option(
    text: str,
    *names: str,
    metavar: str | None = None,
    panel: str | None = None,
    least: int = 1,
    most: int = MOST,
) -> Any:
    """An option and its help; whole numbers lie in a range, fractions are finite and not negative."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if type(value) is int:
            check_range(param.opts[0], value, least, most)
        elif type(value) is float and not 0 <= value < LARGEST:
            raise ValueError(f"{param.opts[0]} must be a finite number of at least 0, got {value}.")
        return value

    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel, callback=check)


def check_range(name: str, value: int, least: int, most: int) -> None:
    """Refuses a number on the command line that is too small or too large for anything."""
    if not least <= value <= most:
        raise ValueError(f"{name} must be at least {least} and at most {most:,}, got {value}.")


def is_number(text: str) -> bool:
    """True for a whole number in plain digits: Python would also read those of other scripts."""
    return text.isascii() and text.isdecimal()


def whole(name: str, text: str, least: int = 0) -> int:
    """Reads a whole number that stands in the text of an option."""
    if not is_number(text.strip()) or len(text) > 20:
        raise ValueError(f"{name} takes whole numbers up to {MOST:,}, got {text[:40]!r}.")
    value = int(text)
    check_range(name, value, least, MOST)
    return value


def find(option: str, name: str) -> Any:
    """The function or class that a name on the command line stands for; of `none` it is None."""
    place = FUNCTIONS[option][name]
    return pkgutil.resolve_name(f"jaxprune.{place}") if place else None


rows = partial(option, panel="Task and data")
scoring = partial(option, panel="Scoring")
selecting = partial(option, panel="Selection")
measured = partial(option, panel="Testing")
training = partial(option, panel="Training")

ModelName: TypeAlias = Annotated[
    str,
    typer.Argument(help="A model folder, a .gguf file, or a name on the hub; FOLDER#TASK: a task of a shared one."),
]
OneTask: TypeAlias = Annotated[str, rows("A built-in task, a folder in --data, your own file, or NAME=FILE.", "--task")]
Tasks: TypeAlias = Annotated[list[str], rows("A built-in task, your own file, or NAME=FILE; once or more.", "--task")]
Folder: TypeAlias = Annotated[Path, option("The folder to write.", "--output", "-o", metavar="FOLDER")]
Head: TypeAlias = Annotated[str | None, rows("The task head; by default the one named like the task, or the only one.")]
Dark: TypeAlias = Annotated[bool, option("Draw for a dark page.", "--dark")]
Json: TypeAlias = Annotated[bool, option("Print one JSON object on stdout, and nothing else.", "--json")]
Overwrite: TypeAlias = Annotated[bool, option("Replace existing output.", "--overwrite")]


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """A picture of what a command shows."""

    picture: Annotated[Path | None, option("A .png or .svg to write.", "--output", "-o", metavar="PICTURE")] = None
    dark: Dark = False
    overwrite: Overwrite = False

    def check(self) -> None:
        """Refuses a picture that cannot be written, before any work is done."""
        if self.picture is not None:
            from jaxprune.checkpoints.files import check_file
            from jaxprune.cli.render.pictures import check_picture

            check_picture(self.picture)
            check_file(self.picture, self.overwrite)

    def draw(self, figure: Callable[..., None], record: dict[str, Any], *more: Any) -> None:
        """Writes the picture, if one is asked for, and adds it to the record."""
        if self.picture is not None:
            figure(self.picture, record, *more, dark=self.dark)
            record["picture"] = str(self.picture)

    def lines(self) -> list[str]:
        """The place of the picture, for the terminal."""
        return [] if self.picture is None else [f"Picture: {self.picture}"]


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The source of a task's rows."""

    data: Annotated[Path | None, rows("Folder with TASK/train.jsonl and so on; by default the hub.")] = None
    text: Annotated[str | None, rows("Your own files: column of the text or the question.", metavar="COLUMN")] = None
    text_pair: Annotated[str | None, rows("Your own files: column of text 2 or the context.", metavar="COLUMN")] = None
    label: Annotated[str | None, rows("Your own files: column of the label or the answers.", metavar="COLUMN")] = None
    label_names: Annotated[
        str | None,
        rows("Your own files: labels, as the task head has them; one: a regression.", metavar="A,B,..."),
    ] = None
    prompt: Annotated[
        str | None,
        rows("Models that answer in text: t5, flan, plain, or a YAML file of your own.", metavar="PROMPT"),
    ] = None
    calibration: Annotated[
        str | None,
        choice("calibration", "Of the words to answer with; by default the prompt's, or none.", "Rows"),
    ] = None
    shots: Annotated[int | None, rows("Training rows that a prompt shows with their words.", most=MOST_SHOTS)] = None
    shots_seed: Annotated[int, rows("The choice of these rows.", least=0)] = 0
    window: Annotated[int | None, rows("Running text: tokens of a window; by default 512.")] = None
    stride: Annotated[int | None, rows("Running text: tokens between windows; by default as many.")] = None

    def load(self, name: str, bars: Watch, model: Model | None = None, head: str | None = None) -> Task:
        """Reads the rows of a task, for a model's head if there is one, and says what of them is not used.

        A name before the path (`reviews=train.csv`) is the task's.
        """
        from jaxprune.data.batches import windows
        from jaxprune.data.prompts import STYLES, fit, prompt_for, prompt_of, read_prompt, with_shots
        from jaxprune.data.tasks import load_task

        given = re.fullmatch(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)", name)
        title, name = (given[1], given[2]) if given and not Path(name).exists() else (None, name)
        if model is not None and head is None and title in model.heads:
            head = title
        labels: Any = model
        if self.label_names is not None:
            labels = tuple(self.label_names.split(","))
        elif model is not None and head is not None and not model.answers_in_text:
            labels = model.head(head)
        task = load_task(
            name, data=self.data, text=self.text, text_pair=self.text_pair, label=self.label, labels=labels
        )
        if title is not None:
            task = replace(task, name=title, notes=tuple(note for note in task.notes if " is called " not in note))
        for note in task.notes:
            bars.say(f"{task.name}: {note}")
        if task.running and model is not None and model.continues:
            task = windows(model, task, tokens=self.window, stride=self.stride)
            bars.say(f"{task.name}: {task.windows}.")
        elif self.window is not None or self.stride is not None:
            raise ValueError(f"--window and --stride are of running text, read by a decoder; {task.name!r} is not.")
        if self.prompt is not None:
            prompt = prompt_for(task, self.prompt) if self.prompt in STYLES else fit(read_prompt(self.prompt), task)
            task = replace(task, prompt=prompt)
        if self.calibration is None and self.shots is None:
            return task
        prompt = task.prompt if model is None else prompt_of(model, task)
        if prompt is None:
            name = "--calibration" if self.shots is None else "--shots"
            raise ValueError(f"{name} is of a prompt's words: give --prompt, or a model that answers in text.")
        if self.shots is not None:
            prompt = with_shots(prompt, task, self.shots, self.shots_seed)
        return replace(task, prompt=replace(prompt, calibration=self.calibration or prompt.calibration))


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batches of texts."""

    batch_size: Annotated[int, rows("Examples in a batch.", most=MOST_TOGETHER)] = 32
    max_length: Annotated[int | None, rows("Tokens after which texts are cut; by default 128, for spans 384.")] = None


@dataclass(frozen=True, kw_only=True)
class CriterionOptions:
    """The settings of criteria; None is the criterion's own default."""

    nodes: Annotated[
        int | None, scoring("Quadrature nodes of integrated gradients; by default 8.", most=MOST_NODES)
    ] = None
    chunk: Annotated[int | None, scoring("Nodes, or heads left out, evaluated together; by default 1.")] = None
    path: Annotated[str | None, choice("path", "All gates together (default), or one module at a time: slower.")] = None
    start: Annotated[float | None, scoring("Start of the path, in [0, 1); by default 0.")] = None
    rule: Annotated[str | None, choice("rule", "The quadrature; by default gauss-legendre.")] = None
    objective: Annotated[str | None, choice("objective", "By default probability, in a regression squared-error.")] = (
        None
    )
    labels: Annotated[str | None, choice("labels", "The label; by default gold, for fisher sampled.")] = None
    tokens: Annotated[str | None, choice("tokens", "How tokens of an example combine; by default sum.")] = None
    examples_reduction: Annotated[
        str | None, choice("examples-reduction", "How examples combine; by default absolute.")
    ] = None
    closed: Annotated[str | None, choice("closed", "What replaces a removed unit; by default zero.")] = None
    kinds: Annotated[
        str | None, scoring("Of heads,neurons (default), channels, query_channels.", metavar="channels,neurons")
    ] = None

    def build(self, *names: str) -> dict[str, Criterion]:
        """Criteria by their names, each with those of the options that it has.

        Raises:
            ValueError: If a name occurs twice, or none of the criteria has one of the options.
        """
        kinds = {name: find("criterion", name) for name in names}
        if len(kinds) < len(names):
            raise ValueError(f"--criterion names one twice: {', '.join(names)}.")
        has = {name: {field.name for field in fields(kind) if field.init} for name, kind in kinds.items()}
        given = {name: value for name in SETTINGS if (value := getattr(self, name.replace("-", "_"))) is not None}
        every = set().union(*has.values())
        if unknown := [f"--{name}" for name in given if SETTINGS[name] not in every]:
            known = ", ".join(f"--{name}" for name, field in SETTINGS.items() if field in every)
            asked = " or ".join(names)
            raise ValueError(f"criterion {asked} has no {', '.join(unknown)}; it has {known or 'no options'}.")
        chosen = {SETTINGS[name]: find(name, value) if name in FUNCTIONS else value for name, value in given.items()}
        if self.kinds is not None:
            chosen["kinds"] = tuple(self.kinds.split(","))
        return {
            name: kind(**{field: value for field, value in chosen.items() if field in has[name]})
            for name, kind in kinds.items()
        }


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """The criterion, and the rows to score with."""

    criterion: Annotated[str, choice("criterion", "How units are scored")] = "integrated-gradients"
    examples: Annotated[int | None, scoring("Calibration rows to score with, stratified; by default 128.")] = None
    seed: Annotated[int, scoring("Seed of the draw of rows, and of random criteria.", least=0)] = 0

    def build(self, settings: CriterionOptions, head: str | None, batches: BatchOptions) -> Scoring:
        """The settings of a scoring run.

        Raises:
            ValueError: If the criterion does not have one of the options.
        """
        from jaxprune.data.tasks import Rows
        from jaxprune.scoring.run import Scoring

        criterion = settings.build(self.criterion)[self.criterion]
        rows = Rows(examples=self.examples, key=self.seed, **asdict(batches))
        return Scoring(criterion=criterion, rows=rows, head=head)


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """The repair of the pruned model."""

    recover: Annotated[
        str | None, choice("recover", "Repair without labels; by default reconstruct, with --scores none.", "Selection")
    ] = None
    recover_examples: Annotated[int, selecting("Calibration rows to repair with.")] = 256
    recover_rounds: Annotated[
        str | None, selecting("With --rounds: repair after the last (default), or after each.", metavar="last|each")
    ] = None

    def build(self, seed: int, batches: BatchOptions, rounds: int = 1, *, scoring: bool = True) -> Recovery | None:
        """The settings; None: no repair, which is the default where nothing is scored: score files need no rows.

        Raises:
            ValueError: If `--recover-rounds` is none of its words, or there is nothing that it could be about.
        """
        from jaxprune.data.tasks import Rows
        from jaxprune.pruning.recoveries import HELD_OUT, Recovery

        if self.recover_rounds not in (None, "last", "each"):
            raise ValueError(f"--recover-rounds {self.recover_rounds!r} is none of last, each.")
        chosen = self.recover or ("reconstruct" if scoring else "none")
        if self.recover_rounds is not None and (rounds < 2 or chosen == "none"):
            raise ValueError("--recover-rounds is for --recover in several --rounds: give both, or leave it out.")
        if chosen == "none":
            return None
        if self.recover is None:  # a default refuses no batch size
            batches = replace(batches, batch_size=max(batches.batch_size, HELD_OUT))
        rows = Rows(examples=self.recover_examples, key=seed, **asdict(batches))
        return Recovery(method=find("recover", chosen)(), rows=rows)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The loss of a selection."""

    loss_report: Annotated[
        bool,
        measured(
            "What of the objective is lost on the scored rows, by layer, predicted and true.",
            "--loss-report",
            "--receipt",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """The budget: how much stays."""

    flops: Annotated[float | None, selecting("Fraction of the FLOPs that may stay.")] = None
    parameters: Annotated[float | None, selecting("Fraction of the units' parameters that may stay.")] = None
    units: Annotated[float | None, selecting("Fraction of the units that may stay.")] = None
    cache: Annotated[float | None, selecting("Fraction of a decoder's cache of keys and values that may stay.")] = None
    memory: Annotated[
        str | None, selecting("Memory that all weights may take, or the fraction that may stay.", metavar="40MB|0.5")
    ] = None
    latency: Annotated[
        str | None, selecting("Time that a forward pass may take on this device, or the fraction.", metavar="12ms|0.5")
    ] = None
    latency_batch: Annotated[int | None, selecting("Examples in that pass; by default 1.", most=MOST_TOGETHER)] = None
    latency_table: Annotated[
        Path | None, selecting("Its table; by default the one in the cache, measured if needed.", metavar="FILE")
    ] = None

    def build(self, length: Length | None) -> Budget:
        """The one budget that is given, for examples of so many tokens.

        Raises:
            ValueError: If there is not exactly one.
        """
        from jaxprune.pruning.budgets import Latency, read_budget

        budget = read_budget(
            {
                "flops": self.flops,
                "parameters": self.parameters,
                "units": self.units,
                "cache": self.cache,
                **read_amount("memory", self.memory, "bytes", BYTES),
                **read_amount("latency", self.latency, "seconds", SECONDS),
                "length": length,
            }
        )
        if not isinstance(budget, Latency):
            return budget
        return replace(self.timing(length), fraction=budget.fraction, seconds=budget.seconds)

    def timing(self, length: Length | None) -> Latency:
        """A latency, whatever the budget is of."""
        from jaxprune.cli.terminal import cache_folder
        from jaxprune.pruning.budgets import Latency
        from jaxprune.pruning.latency import read_table

        table = None if self.latency_table is None else read_table(self.latency_table)
        return Latency(1.0, length=length, table=table, batch=self.latency_batch, folder=cache_folder("latency"))


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """The units that stay, within a budget."""

    length: Annotated[
        str | None, selecting("Tokens per example, for FLOPs; by default as scored. T5: read,written.", metavar="128")
    ] = None
    allocation: Annotated[
        str, choice("allocation", "Widths of modules by measured answers, or by where units compete", "Selection")
    ] = "auto"
    multiple_of: Annotated[list[str] | None, selecting("Round widths down to a multiple.", metavar="neurons=8")] = None
    floor: Annotated[list[str] | None, selecting("The least that stays in each layer.", metavar="heads=1")] = None
    protect: Annotated[list[str] | None, selecting("Layers (0) and sites (3.ffn.neurons) that stay whole.")] = None
    normalise: Annotated[str | None, choice("normalise", "Divide scores by each site's norm.", "Selection")] = None
    uniform: Annotated[bool, selecting("The same widths in all layers, as exports need them.", "--uniform")] = False

    def tokens(self) -> Length | None:
        """The tokens of an example; None are those of the examples that are scored."""
        return None if self.length is None else read_length(self.length)

    def build(self) -> Rules:
        """The rules of a selection."""
        from jaxprune.pruning.budgets import Rules

        return build(
            Rules,
            self,
            allocation=self.allocation.replace("-", "_"),
            multiple_of=by_kind("--multiple-of", self.multiple_of, least=1),
            floor=by_kind("--floor", self.floor),
            protect=tuple(whole("--protect", item) if is_number(item) else item for item in self.protect or ()),
            normalise=None if self.normalise is None else find("normalise", self.normalise),
        )


def build(settings: Any, *groups: Any, **more: Any) -> Any:
    """Settings of the library, a dataclass, from the options of the same names and from what is given by name."""
    names = {field.name for field in fields(settings) if field.init} - more.keys()
    given = {name: value for group in groups for name, value in vars(group).items() if name in names}
    return settings(**given, **more)


def read_length(text: str) -> Length:
    """Reads `128`, or `128,4` of a model that writes text."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number <= MOST for number in numbers):
        raise ValueError(f"--length {text!r} is no number of tokens; write 128, or 128,4 for T5.")
    return numbers[0] if len(numbers) == 1 else numbers


def read_amount(name: str, text: str | None, unit: str, factors: Mapping[str, float]) -> dict[str, float]:
    """Reads `0.5` as the budget `NAME`, and `40MB` as `NAME_UNIT`.

    Raises:
        ValueError: If it is neither, or not above 0.
    """
    if text is None:
        return {}
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d+))?\s*([A-Za-z]*)", text.strip(), re.ASCII)
    words = f"a fraction in (0, 1], or a number and one of {', '.join(factors)}"
    if match is None or (match[3] and match[3] not in factors):
        raise ValueError(f"--{name} takes {words}; got {text!r}.")
    value = float(f"{match[1]}e{match[2] or 0}") * factors.get(match[3], 1.0)
    if not 0 < value < LARGEST:
        raise ValueError(f"--{name} must lie above 0, and be no more than there is: {words}; got {text!r}.")
    if not match[3] and value > 1:
        raise ValueError(f"--{name} needs a unit: {words}; got {text!r}.")
    return {f"{name}_{unit}" if match[3] else name: value}


def by_kind(name: str, values: list[str] | None, least: int = 0) -> int | dict[str, int] | None:
    """Reads `8`, or `neurons=8` and `heads=2`."""
    if values and len(values) == 1 and is_number(values[0]):
        return whole(name, values[0], least)
    return numbers(name, values, least) or None


def numbers(name: str, values: list[str] | None, least: int = 0) -> dict[str, int]:
    """Reads `NAME=NUMBER`, each name once."""
    numbers_by_name: dict[str, int] = {}
    for value in values or ():
        key, _, number = value.partition("=")
        if not key or not is_number(number) or key in numbers_by_name:
            raise ValueError(f"{name} takes NAME=NUMBER, each name once; got {value!r}.")
        numbers_by_name[key] = whole(name, number, least)
    return numbers_by_name


def read_fractions(name: str, text: str) -> tuple[float, ...]:
    """Reads `0.9,0.5`, each number once; the order does not matter.

    Raises:
        ValueError: If it is something else.
    """
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    if not fractions or len(set(fractions)) < len(fractions) or not all(0 <= each <= 1 for each in fractions):
        raise ValueError(f"{name} takes fractions in 0 to 1 such as 0.9,0.5, each once; got {text!r}.")
    return tuple(sorted(fractions, reverse=True))


def check_different(files: Sequence[Path]) -> None:
    """Refuses to take one score file twice."""
    resolved = [os.path.realpath(file) for file in files]  # of links that lead to each other, too
    if twice := [file for i, file in enumerate(files) if resolved[i] in resolved[:i]]:
        raise ValueError(f"{twice[0]} is named twice: name files of different tasks.")


def say_fewer(bars: Watch, asked: int | None, task: Task, split: str, usual: int | None = None, name: str = "--limit"):
    """Says how many rows there are, if more are asked for than these; the usual number is a most, and said to be."""
    if asked not in (None, usual) and asked > (rows := len(task.rows(split))):
        bars.say(f"{task.name}: {name} is {asked:,}, and there are {rows:,} {split} rows: all of them are taken")


def given(context: typer.Context, *options: str | type) -> str:
    """The options, of those named and of groups of options, that are on the command line."""
    named = [[it] if isinstance(it, str) else [field.name for field in fields(it)] for it in options]
    names = []
    for name in (name for group in named for name in group):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            names.append("--" + name.replace("_", "-"))
    return ", ".join(names)


def plain(kind: type[int] | type[float]) -> Callable[[Any], Any]:
    """Reads a number on the command line, in plain digits: Python would also read `1_0` and those of other scripts."""

    def read(text: Any) -> Any:
        try:
            return kind("" if isinstance(text, str) and ("_" in text or not text.isascii()) else text)
        except ValueError as error:
            what = "whole number" if kind is int else "number"
            raise ValueError(f"{text[:40]!r} is no {what} in plain digits") from error

    read.__name__ = kind.__name__  # shown in help
    return read


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take groups of options: of a parameter that is a dataclass, every field becomes an option."""
    declared = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {name: p.annotation for name, p in declared.items() if is_dataclass(p.annotation)}
    parameters = []
    for name, parameter in declared.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields(groups[name])
        ]

    @wraps(command)
    def run(**given: Any) -> None:
        packed = {
            name: cast(Any, group)(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **packed)

    for kind, parameter in itertools.product((int, float), parameters):
        declared_as, *about = get_args(parameter.annotation) or (None,)
        if kind in (declared_as, *get_args(declared_as)):
            about[0].parser = plain(kind)
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run

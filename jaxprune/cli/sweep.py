"""A sweep: several criteria, seeds and budgets compared on tasks, from one scoring run per task, criterion and seed.

Results are written after every combination, so a sweep that was killed goes on where it was, to the same bits. If all
layers keep the same fraction, pruned models are tested as they would be saved: few widths occur, each is compiled once.
If all units compete, every model has its own widths; then the dense model is tested with closed gates, which computes
the same.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import __version__
from jaxprune.checkpoints.digests import model_digest
from jaxprune.checkpoints.files import check_file, file_stem, read_json, write_atomic
from jaxprune.checkpoints.folder import load
from jaxprune.cli.render.pictures import sweep_figure
from jaxprune.cli.workflow import Data, Measuring, Progress, Watch, measure
from jaxprune.compaction import compact
from jaxprune.data.tasks import Rows, Task
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import Length, elements, matmul_flops, parameters, unit_costs
from jaxprune.pruning.budgets import NAMES, Flops, Rules
from jaxprune.pruning.prune import score_once
from jaxprune.pruning.record import pruning_record
from jaxprune.pruning.selection import check_selection, select
from jaxprune.scoring.attribution import Criterion
from jaxprune.scoring.baselines import Magnitude, TopLayers
from jaxprune.scoring.run import Scoring
from jaxprune.scoring.scores import describe
from jaxprune.units import KINDS, Gates, Intervention, Params, widths

ONE_SEED = (Magnitude, TopLayers)  # they read no example and draw nothing: every seed gives the same scores
RESULTS = "results.json"
TABLE = "results.csv"
SCORES = "scores"  # the folder of the score files
Row = dict[str, Any]  # one combination and what came out; see `_row`


class Combination(NamedTuple):
    """What is pruned for, how, and how far."""

    task: str
    criterion: str
    seed: int
    flops: float  # fraction of the FLOPs that may stay


def combinations(
    tasks: Iterable[str], criteria: Mapping[str, Criterion], seeds: int, budgets: Sequence[float]
) -> list[Combination]:
    """All combinations in the order of the results; criteria that no seed changes have one seed.

    Raises:
        ValueError: If there is no seed.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    return [
        Combination(task, name, seed, budget)
        for task in tasks
        for name, criterion in criteria.items()
        for seed in range(1 if isinstance(criterion, ONE_SEED) else seeds)
        for budget in budgets
    ]


def sweep_model(
    source: str,
    tasks: Sequence[Data],
    criteria: Mapping[str, Criterion],
    output: Path,
    rules: Rules,
    *,
    length: Length | None = None,
    budgets: Sequence[float],
    seeds: int = 3,
    examples: int = 128,
    split: str = "test",
    measuring: Measuring,
    dark: bool = False,
    watch: Watch,
) -> dict[str, Any]:
    """Prunes a model in every combination, tests it, and writes a table and a picture per task.

    Args:
        source: The model.
        tasks: What to prune for; every task is also what is tested.
        criteria: Criteria by their names in the results.
        output: Folder for the results. A sweep with the same settings that is there goes on.
        rules: How units are chosen within a budget. `TopLayers` always compares all layers together.
        length: Tokens of an example; None: the mean of those scored.
        budgets: Fractions of the FLOPs that may stay.
        seeds: How often the calibration rows are drawn.
        examples: Calibration rows to score with.
        split: What is tested; choices belong to `dev`.
        measuring: How it is tested.
        dark: Whether the pictures are for dark pages.
        watch: Shows the progress.

    Returns:
        The settings, one row per combination, and the names of the files.

    Raises:
        ValueError: If a setting is wrong, or the folder holds another sweep; the error says what differs.
    """
    check_file(output / RESULTS, overwrite=True)
    model, params = load(source)
    for budget in budgets:
        check_selection(model, params, Flops(budget, length=length), rules, widths(model.axes, params))
    loaded = {task.name: task for task in (data.load(watch) for data in tasks)}
    stems = {name: file_stem(name) for name in loaded}
    if len(set(stems.values())) < len(tasks):
        given = ", ".join(data.task for data in tasks)
        raise ValueError(f"tasks must differ in their names, in those of files too; got {given}.")
    for task in loaded.values():
        task.rows(split)
        fitting_head(model, task, measuring.head)
    plan = combinations(loaded, criteria, seeds, budgets)
    settings = _settings(model, params, list(loaded.values()), criteria, rules, measuring, split)
    settings["selection"]["length"] = length
    settings |= {"budgets": list(budgets), "seeds": seeds, "examples": examples}
    book = _Book.open(output, {"command": "sweep", "source": source, "settings": settings}, plan)

    bar, scoring = watch.open("sweeping"), _OneBar(watch, "scoring")

    def testing(what: str) -> Progress:
        return lambda done, total, note="": bar(len(book.rows), len(plan), f"{what}, batch {done} of {total}")

    bar(len(book.rows), len(plan))
    for task in loaded.values():
        missing = [one for one in plan if one.task == task.name and one not in book.rows]
        if not missing:
            continue
        dense = measure(model, params, task, measuring, testing(f"{task.name}, dense"), split)
        for name, seed in dict.fromkeys((one.criterion, one.seed) for one in missing):
            how = Scoring(
                criterion=criteria[name],
                rows=Rows(
                    examples=examples, key=seed, batch_size=measuring.batch_size, max_length=measuring.max_length
                ),
                head=measuring.head,
            )
            file = output / SCORES / f"{stems[task.name]}.{name}.{seed}.safetensors"
            scores = score_once(model, params, task, how, file, scoring)
            tokens = scores.header["mean_length"] if length is None else length
            per_layer = rules.per_layer and not isinstance(criteria[name], TopLayers)
            for one in (one for one in missing if (one.criterion, one.seed) == (name, seed)):
                budget = Flops(one.flops, length=tokens)
                gates = select(model, params, scores, budget, rules=replace(rules, per_layer=per_layer))
                if per_layer:
                    small, closed = compact(model, params, gates, scores.means), {}
                else:
                    small, closed = params, {"intervention": Intervention(gates, scores.means)}
                progress, scored = testing(f"{task.name}, {name}, seed {seed}"), scores.header["rows"]
                found = measure(model, small, task, measuring, progress, split, exclude=scored, **closed)
                metric, value = found.primary
                facts = {"metric": metric, "value": value, "n": found.n, "chance": found.chance}
                book.add(one, {**kept(model, params, gates, tokens), **facts, "dense": dense[metric]})
                bar(len(book.rows), len(plan))

    record = book.record()
    pictures = []
    for task, stem in stems.items():
        rows = [row for row in record["rows"] if row["task"] == task]
        for ending in ("png", "svg"):
            sweep_figure(output / f"{stem}.{ending}", rows, split=split, dark=dark)
            pictures.append(str(output / f"{stem}.{ending}"))
    files = {"table": [str(output / TABLE)], "record": [str(output / RESULTS)], "pictures": pictures}
    return record | {"files": files}


def kept(model: Model, params: Params, gates: Gates, length: Length) -> dict[str, float]:
    """The fractions of FLOPs, units and parameters (embeddings included) that a compacted model would have."""
    had = {name: len(gate) for name, gate in gates.items()}
    left = {name: int(np.count_nonzero(np.asarray(gate))) for name, gate in gates.items()}

    def total(costs: Mapping[str, float], units: Mapping[str, int]) -> float:
        return sum(costs[name] * units[name] for name in had)

    flops, sizes = (unit_costs(model, params, measure, KINDS) for measure in (matmul_flops(model, length), elements))
    every = parameters(params)
    return {
        "flops_kept": total(flops, left) / total(flops, had),
        "units_kept": sum(left.values()) / sum(had.values()),
        "parameters_kept": (every - total(sizes, had) + total(sizes, left)) / every,
    }


def _settings(
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    criteria: Mapping[str, Criterion],
    rules: Rules,
    measuring: Measuring,
    split: str,
) -> dict[str, Any]:
    """All that the results depend on, as JSON holds it."""
    return {
        "model": model_digest(model, params),
        "tasks": {
            task.name: {
                "head": fitting_head(model, task, measuring.head),
                "calibration": task.digest("calibration"),
                split: task.digest(split),
            }
            for task in tasks
        },
        "criteria": {name: describe(criterion) for name, criterion in criteria.items()},
        "selection": dict.fromkeys((*NAMES, "length")) | pruning_record({}, {}, rules=rules)["settings"],
        "split": split,
        "limit": measuring.limit,
        "batch_size": measuring.batch_size,
        "max_length": measuring.max_length,
        "versions": {"jaxprune": __version__, "jax": jax.__version__},
    }


@dataclass(frozen=True)
class _Book:
    """The results so far, and the files that hold them."""

    folder: Path
    head: Mapping[str, Any]  # what the files say beside the rows
    plan: Sequence[Combination]
    rows: dict[Combination, Row]

    @classmethod
    def open(cls, folder: Path, head: Mapping[str, Any], plan: Sequence[Combination]) -> _Book:
        """The results of an earlier run with the same settings, or none.

        Raises:
            ValueError: If the folder holds something else.
        """
        file, head = folder / RESULTS, json.loads(json.dumps(head))
        rows: dict[Combination, Row] = {}
        if file.exists():
            found = read_json(file)
            if found.get("command") != "sweep" or not isinstance(found.get("settings"), dict):
                raise ValueError(f"{file} holds no sweep: choose another folder.")
            if differences := list(_differences("", found["settings"], head["settings"])):
                raise ValueError(f"{folder} holds another sweep: {'; '.join(differences)}. Choose another folder.")
            try:
                rows = {Combination(*(row[name] for name in Combination._fields)): row for row in found["rows"]}
            except (KeyError, TypeError) as error:
                raise ValueError(f"{file} is damaged ({error!r}): remove it to start anew.") from error
        return cls(folder, head, plan, rows)

    def add(self, one: Combination, found: Mapping[str, Any]) -> None:
        """Writes one more row to the files, which afterwards are the old ones or the new ones."""
        self.rows[one] = {**one._asdict(), **found}
        record = self.record()
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[one]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(record["rows"])
        write_atomic(self.folder / TABLE, table.getvalue().encode())
        write_atomic(self.folder / RESULTS, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())

    def record(self) -> dict[str, Any]:
        """What the JSON file holds: rows in the order of the plan."""
        return {**self.head, "rows": [self.rows[one] for one in self.plan if one in self.rows]}


class _OneBar:
    """Shows all stages of a kind in one bar, from the first one on."""

    def __init__(self, watch: Watch, label: str):
        self._watch, self._label = watch, label
        self._bar: Progress | None = None

    def open(self, label: str) -> Progress:
        self._bar = self._bar or self._watch.open(self._label)
        return self._bar

    def say(self, message: Any) -> None:
        self._watch.say(message)


def _differences(where: str, old: Any, new: Any) -> Iterable[str]:
    """What differs between two JSON values, by name: `limit is 5, was 10`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            yield from _differences(f"{where}.{name}".lstrip("."), old.get(name), new.get(name))
    elif old != new:
        yield f"{where} is {_short(new)}, was {_short(old)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

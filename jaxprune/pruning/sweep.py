"""A sweep: several criteria, seeds and budgets compared on tasks, from one scoring run per task, criterion and seed.

Results are written after every combination, so a sweep that was killed resumes, to the same bits. If all layers keep
the same fraction, pruned models are tested as they would be saved: few widths occur, each is compiled once. If all
units compete, every model has its own widths; then the dense model is tested with closed gates, which computes the
same.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import __version__
from jaxprune.checkpoints.digests import model_digest
from jaxprune.checkpoints.files import file_stem, read_json, write_atomic
from jaxprune.compaction import compact
from jaxprune.data.tasks import Rows, Task
from jaxprune.evaluation.evaluate import Evaluation, evaluate, fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import Length, elements, matmul_flops, parameters, unit_costs
from jaxprune.pruning.budgets import NAMES, Flops, Rules
from jaxprune.pruning.prune import Watch, score_once
from jaxprune.pruning.record import settings_of
from jaxprune.pruning.selection import check_selection, select
from jaxprune.scoring.attribution import Criterion
from jaxprune.scoring.run import Scoring
from jaxprune.scoring.scores import Scores, describe
from jaxprune.units import KINDS, Gates, Intervention, Params, widths

RESULTS = "results.json"
TABLE = "results.csv"
SCORES = "scores"  # the folder of the score files


@dataclass(frozen=True, kw_only=True)
class Sweeping:
    """The settings of a sweep; see `sweep`."""

    criteria: Mapping[str, Criterion]  # by their names in the results
    budgets: Sequence[float]  # fractions of the FLOPs that may stay
    seeds: int = 3  # draws of the calibration rows; criteria that no seed changes have one
    examples: int = 128  # calibration rows to score with
    length: Length | None = None  # tokens of an example; None: the mean of those scored
    rules: Rules = Rules()  # how units are chosen within a budget; criteria that rank layers let all layers compete
    rows: Rows = Rows(split="test")  # what is tested; choices belong to `dev`
    head: str | None = None

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}.")


class Combination(NamedTuple):
    """One task to prune for, one criterion, one draw of its rows and one budget."""

    task: str
    criterion: str
    seed: int
    flops: float  # fraction of the FLOPs that may stay


def combinations(tasks: Iterable[str], sweeping: Sweeping) -> list[Combination]:
    """All combinations in the order of the results."""
    return [
        Combination(task, name, seed, budget)
        for task in tasks
        for name, criterion in sweeping.criteria.items()
        for seed in range(sweeping.seeds if criterion.seeded else 1)
        for budget in sweeping.budgets
    ]


def sweep(
    model: Model,
    params: Params,
    tasks: Sequence[Task],
    sweeping: Sweeping,
    folder: Path,
    *,
    about: Mapping[str, Any] | None = None,
    watch: Watch,
) -> dict[str, Any]:
    """Prunes a model in every combination, tests it, and writes the results as JSON and as a table.

    Args:
        model: The architecture.
        params: The dense parameters.
        tasks: What to prune for; every task is also what is tested.
        sweeping: What is compared.
        folder: Folder for the results. A sweep with the same settings that is there resumes.
        about: What the results say beside their settings, such as the name of the model.
        watch: Shows the progress.

    Returns:
        What the JSON file holds: the settings, and one row per combination.

    Raises:
        ValueError: If a setting is wrong, or the folder holds another sweep; the error says what differs.
    """
    stems = {task.name: file_stem(task.name) for task in tasks}
    if len(set(stems.values())) < len(tasks):
        given = ", ".join(task.name for task in tasks)
        raise ValueError(f"tasks must differ in their names, in those of files too; got {given}.")
    for task in tasks:
        task.rows(sweeping.rows.split or "test")
        fitting_head(model, task, sweeping.head)
    plan = combinations(stems, sweeping)
    head = {"command": "sweep", **(about or {}), "settings": _settings(model, params, tasks, sweeping)}
    results = _Results.open(folder, head, plan)
    bar = watch.open("sweeping")
    bar(len(results.rows), len(plan))

    def test(
        params: Params, task: Task, what: str, scores: Scores | None = None, gates: Gates | None = None
    ) -> Evaluation:
        rows, closed = sweeping.rows, Intervention()
        if scores is not None:
            rows = replace(rows, exclude=scores.rows)
            closed = Intervention(gates, scores.means) if gates is not None else closed

        def progress(done: int, total: int) -> None:
            bar(len(results.rows), len(plan), f"{task.name}, {what}, batch {done} of {total}")

        return evaluate(model, params, task, rows=rows, head=sweeping.head, intervention=closed, progress=progress)

    for task in tasks:
        missing = [one for one in plan if one.task == task.name and one not in results.rows]
        dense = test(params, task, "dense") if missing else None
        for name, seed in dict.fromkeys((one.criterion, one.seed) for one in missing):
            criterion, rows = (
                sweeping.criteria[name],
                replace(sweeping.rows, split=None, examples=sweeping.examples, key=seed),
            )
            scoring = Scoring(criterion=criterion, rows=rows, head=sweeping.head)
            file = folder / SCORES / f"{stems[task.name]}.{name}.{seed}.safetensors"
            scores = score_once(model, params, task, scoring, file, watch)
            rules = replace(sweeping.rules, per_layer=sweeping.rules.per_layer and criterion.by_layer)
            length = scores.header["mean_length"] if sweeping.length is None else sweeping.length
            for one in (one for one in missing if (one.criterion, one.seed) == (name, seed)):
                gates, what = (
                    select(model, params, scores, Flops(one.flops, length=length), rules=rules),
                    f"{name}, seed {seed}",
                )
                if rules.per_layer:
                    result = test(compact(model, params, gates, scores.means), task, what, scores)
                else:
                    result = test(params, task, what, scores, gates)
                results.add(one, {**fractions_left(model, params, gates, length), **_measured(result, dense)})
                bar(len(results.rows), len(plan))
    return results.record()


def check_budgets(model: Model, params: Params, sweeping: Sweeping) -> None:
    """Refuses budgets that cannot be reached, before any row is read."""
    for budget in sweeping.budgets:
        check_selection(
            model, params, Flops(budget, length=sweeping.length), sweeping.rules, widths(model.axes, params)
        )


def fractions_left(model: Model, params: Params, gates: Gates, length: Length) -> dict[str, float]:
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


def _measured(result: Evaluation, dense: Evaluation | None) -> dict[str, Any]:
    metric, value = result.primary
    facts = {"metric": metric, "value": value, "n": result.n, "chance": result.chance}
    return facts | {"dense": None if dense is None else dense[metric]}


def _settings(model: Model, params: Params, tasks: Sequence[Task], sweeping: Sweeping) -> dict[str, Any]:
    """All that the results depend on, as JSON holds it."""
    rows = sweeping.rows
    split = rows.split or "test"
    return {
        "model": model_digest(model, params),
        "tasks": {
            task.name: {
                "head": fitting_head(model, task, sweeping.head),
                "calibration": task.digest("calibration"),
                split: task.digest(split),
            }
            for task in tasks
        },
        "criteria": {name: describe(criterion) for name, criterion in sweeping.criteria.items()},
        "selection": dict.fromkeys(NAMES) | settings_of(None, sweeping.rules) | {"length": sweeping.length},
        "split": split,
        "limit": rows.examples,
        "batch_size": rows.batch_size,
        "max_length": rows.max_length,
        "versions": {"jaxprune": __version__, "jax": jax.__version__},
        "budgets": list(sweeping.budgets),
        "seeds": sweeping.seeds,
        "examples": sweeping.examples,
    }


@dataclass(frozen=True)
class _Results:
    """The results so far, and the files that hold them."""

    folder: Path
    head: Mapping[str, Any]  # what the files say beside the rows
    plan: Sequence[Combination]
    rows: dict[Combination, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, head: Mapping[str, Any], plan: Sequence[Combination]) -> _Results:
        """The results of an earlier run with the same settings, or none.

        Raises:
            ValueError: If the folder holds something else.
        """
        file, head = folder / RESULTS, json.loads(json.dumps(head))
        results = cls(folder, head, plan)
        if not file.exists():
            return results
        earlier = read_json(file)
        if earlier.get("command") != "sweep" or not isinstance(earlier.get("settings"), dict):
            raise ValueError(f"{file} holds no sweep: choose another folder.")
        if differences := list(_differences("", earlier["settings"], head["settings"])):
            raise ValueError(f"{folder} holds another sweep: {'; '.join(differences)}. Choose another folder.")
        try:
            results.rows.update(
                {Combination(*(row[name] for name in Combination._fields)): row for row in earlier["rows"]}
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error!r}): remove it to start again.") from error
        return results

    def add(self, one: Combination, facts: Mapping[str, Any]) -> None:
        """Writes one more row to the files, which afterwards are the old ones or the new ones."""
        self.rows[one] = {**one._asdict(), **facts}
        record, table = self.record(), io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[one]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(record["rows"])
        write_atomic(self.folder / TABLE, table.getvalue().encode())
        write_atomic(self.folder / RESULTS, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())

    def record(self) -> dict[str, Any]:
        """The content of the JSON file: rows in the order of the plan."""
        return {**self.head, "rows": [self.rows[one] for one in self.plan if one in self.rows]}


def _differences(where: str, old: Any, new: Any) -> Iterator[str]:
    """The differences between two JSON values, by name: `limit is 5, was 10`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            yield from _differences(f"{where}.{name}".lstrip("."), old.get(name), new.get(name))
    elif old != new:
        yield f"{where} is {_short(new)}, was {_short(old)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

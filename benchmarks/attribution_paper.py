"""The settings of the first paper (arXiv 2205.04157) on one multi-task model: many labels, few, none, another domain.

    python benchmarks/attribution_paper.py --model MODEL --data DATA --work WORK -o attribution_paper.json

Attribution beside every baseline, from 10 to 90 % removed, per layer and over all layers together. Made for a
text-to-text model, whose tasks are told apart by prompts; it runs on a model with task heads as well. Every scoring
run and every tested model is kept in `WORK`, so an interrupted run goes on where it was. Choices are made on dev, all
other figures are those of test; the rules are in `evidence.py`.

Parts, for `--only`:
    scopes        on dev, for every criterion: the same share of every module, or all compete, normalised or not
    objectives    on dev: the paper's sum of the answer's token probabilities, or something else
    supervised    all criteria, each in the scope that is its best on dev, labelled examples, half the FLOPs
    curves        all budgets, per layer and over all layers together
    few           1, 4, 16, 64 and 256 labelled examples per class
    unsupervised  no labels: what the model predicts, and every answer by its probability
    unseen        scored on one task, tested in another domain
    cost          seconds and memory of every criterion
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from accuracy import ATTRIBUTION, CRITERIA, UNSEEN
from bench import Bench, Method
from evidence import Cell, compare, summary
from parts import asked, begun, each, keep
from timing import growth, peak_of_child

import jaxprune as jp
from jaxprune.pruning.selection import per_layer_l2
from jaxprune.scoring import objectives

TASKS = ("sst2", "ag_news", "mrpc", "rte", "qnli", "subj", "trec", "dbpedia_14", "snips")
KEPT = (0.9, 0.7, 0.5, 0.3, 0.1)  # of the FLOPs of encoder and decoder
ENDPOINT = 0.5
PER_CLASS = (1, 4, 16, 64, 256)
EXAMPLES = 128  # of a calibration set, where their number is not what is looked at
MOST = 256  # examples where it is
ROWS = 300  # of dev and test, at most
DRAWS = 5
DRAWS_FOR_CHOICES = 1
DRAWS_UNSEEN = 2
CURVE_DRAWS = 1
FEWER = ("integrated gradients", "gradient x activation", "Wanda", "magnitude", "random")  # in unseen domains
SCOPES: dict[str, dict[str, Any]] = {
    "per layer": {"allocation": "per_layer"},
    "all layers": {"allocation": "global"},
    "all layers, L2": {"allocation": "global", "normalise": per_layer_l2},
}
READING = ("integrated gradients", "Wanda")  # those that look at examples and keep most
OBJECTIVES = {
    "sum of probabilities": None,
    "sum of log-probabilities": jp.objectives.log_probability,
    "sum of margins": jp.objectives.margin,
}
LABELS = {"predicted": objectives.predicted, "every": objectives.every}
MOST_LABELS = 10  # of a task whose every answer is attributed: each costs a pass
MADE = {
    "integrated gradients": jp.criteria.IntegratedGradients,
    "gradient x activation": jp.criteria.GradientActivation,
}


class Paper:
    """The bench, with the test figures of the dense model at hand, and the scope of every criterion."""

    def __init__(self, bench: Bench, examples: int, record: Mapping[str, Any]) -> None:
        self.bench, self.examples, self.tasks, self.record = bench, examples, bench.able, record
        self.dense, self.chance = bench.dense(self.tasks, "test"), bench.chances(self.tasks, "test")

    def count(self, task: str, wanted: int | None = None) -> int:
        """As many calibration rows as there are, at most so many."""
        return min(wanted or self.examples, len(self.bench.task(task).rows("calibration")))

    def cells(
        self,
        method: Method,
        budget: float = ENDPOINT,
        draws: int = DRAWS,
        tasks: Sequence[str] | None = None,
        examples: Callable[[str], int] | None = None,
        split: str = "test",
    ) -> dict[str, list[Cell]]:
        """By task, some draws of its examples."""
        count = examples or self.count
        found: dict[str, list[Cell]] = {}
        for task in self.tasks if tasks is None else tasks:
            found |= self.bench.cells_of(replace(method, examples=count(task)), [task], split, budget, draws)
        return found

    def summary(self, cells: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
        """Accuracies and the primary metric."""
        return summary(cells, self.dense, self.chance)

    def compare(self, one: Mapping[str, Sequence[Cell]], other: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
        """The difference of the primary metric, with its interval."""
        return compare(one, other, self.dense, self.chance)

    def on_dev(self, method: Method) -> dict[str, Any]:
        """Accuracies and the primary metric on dev."""
        dense, chance = self.bench.dense(self.tasks, "dev"), self.bench.chances(self.tasks, "dev")
        return summary(self.cells(method, draws=DRAWS_FOR_CHOICES, split="dev"), dense, chance)

    @cached_property
    def scopes(self) -> dict[str, dict[str, Any]]:
        """Every criterion in every scope, on dev; once recorded for as many rows and examples, it stays chosen."""
        known = self.record.get("scopes", {})
        if (known.get("at_most_rows"), known.get("at_most_examples")) == (self.bench.rows, self.examples):
            return known["rows"]
        found: dict[str, dict[str, Any]] = {}
        for name, criterion in CRITERIA.items():
            rows = {scope: self.on_dev(Method(criterion, **how)) for scope, how in SCOPES.items() if _fits(name, scope)}
            found[name] = {"rows": rows, "best": max(rows, key=lambda scope: rows[scope]["retained"])}
        return found

    def method(self, name: str, criterion: Any = None) -> Method:
        """A criterion in the scope that is its best on dev, or another of its settings in the same scope."""
        return Method(criterion or CRITERIA[name], **SCOPES[self.scopes[name]["best"]])


def _fits(name: str, scope: str) -> bool:
    """True if a criterion fits a scope: top layers rank layers, and random scores need no normalising."""
    return scope == "all layers" or name not in ("top layers", "random") or (name == "random" and scope == "per layer")


def scopes(paper: Paper) -> dict[str, Any]:
    """The units that compete, chosen on dev for every criterion."""
    return {"rows": paper.scopes, "split": "dev", "draws": DRAWS_FOR_CHOICES}


def objectives_on_dev(paper: Paper) -> dict[str, Any]:
    """The objectives, compared on dev."""
    rows = {
        name: {what: paper.on_dev(paper.method(name, make(objective=own))) for what, own in OBJECTIVES.items()}
        for name, make in MADE.items()
    }
    return {"rows": rows, "split": "dev", "draws": DRAWS_FOR_CHOICES}


def supervised(paper: Paper) -> dict[str, Any]:
    """All criteria at the endpoint, each in its scope, with labelled examples."""
    ends = {name: paper.cells(paper.method(name)) for name in CRITERIA}
    pairs = [(one, other) for one in ATTRIBUTION for other in CRITERIA if other not in ATTRIBUTION]
    return {
        "examples": {task: paper.count(task) for task in paper.tasks},
        "rows": {name: paper.summary(own) for name, own in ends.items()},
        "claims": {f"{a} - {b}": paper.compare(ends[a], ends[b]) for a, b in [*pairs, ATTRIBUTION]},
    }


def curves(paper: Paper) -> dict[str, Any]:
    """All criteria at all budgets, per layer and over all layers together."""
    rows: dict[str, Any] = {}
    for scope in ("per layer", "all layers"):
        rows[scope] = {}
        for name, criterion in CRITERIA.items():
            if _fits(name, scope):
                found = {kept: paper.cells(Method(criterion, **SCOPES[scope]), kept, CURVE_DRAWS) for kept in KEPT}
                rows[scope][name] = {str(kept): paper.summary(cells) for kept, cells in found.items()}
    return {"rows": rows}


def few(paper: Paper) -> dict[str, Any]:
    """So many labelled examples per class, with the spread over the draws."""
    rows: dict[str, Any] = {}
    cells: dict[int, dict[str, dict[str, list[Cell]]]] = {}
    for per_class in PER_CLASS:

        def examples(task: str, per_class: int = per_class) -> int:
            return paper.count(task, min(per_class * len(paper.bench.task(task).labels), MOST))

        cells[per_class] = {name: paper.cells(paper.method(name), examples=examples) for name in READING}
    for per_class, found in cells.items():
        rows[str(per_class)] = {
            name: paper.summary(own) | {"all_minus_this": paper.compare(cells[PER_CLASS[-1]][name], own)}
            for name, own in found.items()
        }
    return {"rows": rows, "at_most": MOST}


def unsupervised(paper: Paper) -> dict[str, Any]:
    """Without labels: for what the model predicts, and for every answer by its probability."""
    rows: dict[str, Any] = {}
    for name, make in MADE.items():
        gold = paper.cells(paper.method(name))
        rows[name] = {"gold": paper.summary(gold)}
        for label, function in LABELS.items():
            few_labels = [task for task in paper.tasks if len(paper.bench.task(task).labels) <= MOST_LABELS]
            if label == "every" and make is jp.criteria.IntegratedGradients:
                continue  # nodes times answers
            tasks = few_labels if label == "every" else paper.tasks
            own = paper.cells(paper.method(name, make(labels=function)), tasks=tasks)
            same = {task: gold[task] for task in tasks}
            rows[name][label] = paper.summary(own) | {"gold_minus_this": paper.compare(same, own)}
    return {"rows": rows}


def unseen(paper: Paper) -> dict[str, Any]:
    """Scored on one task, tested in domains that neither fine-tuning nor scoring has seen."""
    methods = {name: replace(paper.method(name), examples=paper.examples) for name in FEWER}
    pairs = [(task, domain) for task, domains in UNSEEN.items() for domain in domains if task in paper.tasks]
    left_out = [task for task in UNSEEN if task not in paper.tasks]
    return {"rows": paper.bench.elsewhere(pairs, methods, ENDPOINT, DRAWS_UNSEEN), "left_out": left_out}


def cost(paper: Paper) -> dict[str, Any]:
    """The time of every criterion for one task, in turns, without the round that compiles; and its peak memory."""
    task, count, rounds = paper.bench.task(paper.tasks[0]), 64, 3
    seconds: dict[str, list[float]] = {name: [] for name in CRITERIA}
    for turn in range(rounds + 1):
        for name, criterion in CRITERIA.items():
            begun = time.perf_counter()
            found = jp.score(
                paper.bench.model,
                paper.bench.params,
                task,
                jp.Scoring(criterion=criterion, rows=jp.Rows(examples=count, key=turn)),
            )
            jax.block_until_ready(found.values)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    places = str(paper.bench.source), str(paper.bench.data), task.name
    memory = {
        name: peak_of_child([sys.executable, __file__, "--measure-memory", name, *places, str(count)])
        for name in CRITERIA
    }
    unit = "gradient x activation"
    least = memory[unit]
    return {
        "task": task.name,
        "examples": count,
        "rows": {
            name: {
                "seconds": float(np.median(own)),
                "time": float(np.median(np.divide(own, seconds[unit]))),
                "bytes": memory[name],
                "memory": own_peak / least if (own_peak := memory[name]) and least else None,
            }
            for name, own in seconds.items()
        },
    }


PARTS: dict[str, Callable[[Paper], dict[str, Any]]] = {
    "scopes": scopes,
    "objectives": objectives_on_dev,
    "supervised": supervised,
    "cost": cost,
    "unsupervised": unsupervised,
    "unseen": unseen,
    "few": few,
    "curves": curves,
}


def measure_memory(name: str, model: str, data: str, task: str, examples: str) -> None:
    """Prints by how many bytes scoring makes a process grow: run by `cost`."""
    loaded, params = jp.load(model)
    own = jp.load_task(task, data=data)

    def run() -> None:
        jax.block_until_ready(
            jp.score(
                loaded, params, own, jp.Scoring(criterion=CRITERIA[name], rows=jp.Rows(examples=int(examples)))
            ).values
        )

    print(growth(run))


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model that does all the tasks")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--tasks", default=",".join(TASKS), help="the tasks, by commas")
    parser.add_argument("--rows", type=int, default=ROWS, help="test rows of each task, at most")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="attribution examples of each task, at most")
    arguments, chosen = asked(parser, PARTS)
    tasks = tuple(arguments.tasks.split(","))
    bench = Bench(arguments.model, arguments.data, arguments.work, arguments.rows, tasks)
    found = begun(parser, arguments.output, bench.digest)
    paper = Paper(bench, arguments.examples, {} if "scopes" in chosen else found)
    for name in each(chosen):
        own = PARTS[name](paper) | {"at_most_rows": bench.rows, "at_most_examples": paper.examples}
        facts = {
            "command": "python benchmarks/attribution_paper.py --model MODEL --data DATA --work WORK -o OUTPUT "
            f"--rows {bench.rows} --examples {paper.examples}",
            "model": bench.digest,
            "models": 1,
            "tasks": _tasks(paper, tasks),
            "draws": DRAWS,
            "endpoint": ENDPOINT,
        }
        keep(arguments.output, found, name, own, facts)


def _tasks(paper: Paper, tasks: Sequence[str]) -> dict[str, Any]:
    """The dense model's accuracy, and the tasks that are too close to chance on dev to count."""
    bench, found = paper.bench, {}
    for task in tasks:
        found[task] = {
            "dense_dev": float(bench.cell(task, "dev").hits.mean()),
            "chance_dev": bench.chance(task, "dev"),
            "used": task in paper.tasks,
        }
        if task in paper.tasks:
            hits = paper.dense[task].hits
            found[task] |= {"dense": float(hits.mean()), "chance": paper.chance[task], "n": len(hits)}
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure-memory"]:
        measure_memory(*sys.argv[2:])
    else:
        main()

"""A real decoder pruned for one task without training: attribution beside every baseline, repaired and not.

    python benchmarks/decoders.py --model smollm2 --data DATA --work WORK -o benchmarks/results/decoders.json

`--model` is a folder or a GGUF of an instruction model that nobody fine-tuned for these tasks; its prompts are the
built-in ones. Budgets are of the layers' FLOPs. Every scoring run and every tested model is kept in `WORK` as soon as
it is done; an interrupted run goes on where it was. The calibration of the label words is chosen on dev, figures are
those of test. What counts as "beats" is in `evidence.py`; the endpoints were fixed before any figure was seen.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import Bench, Method
from evidence import compare, retained, summary
from parts import asked, begun, each, keep

import jaxprune as jp
from jaxprune.data.prompts import CALIBRATIONS, Prompt, prompt_of

TASKS = ("sst2", "mr", "cr", "ag_news", "subj", "snips", "trec", "dbpedia_14")
POLARITY = Prompt(template="Review: {text}\nSentiment:", words=(" negative", " positive"))
PROMPTS = dict.fromkeys(("cr", "amazon_books"), POLARITY)  # of tasks that are not built in
ENDPOINT, HALF, OWN = 0.8, 0.5, 0.7  # without repair; with it; where scores of other tasks are compared
BUDGETS = (0.9, 0.8, 0.7, 0.5, 0.3)
EXAMPLES = 64  # calibration rows to score with
DRAWS = 3
ROWS = 300  # of dev and of test, at most
UNSEEN = ("imdb", "yelp_polarity", "amazon_books", "cr")  # scored on sst2
PARTS = ("dense", "endpoint", "half", "matrix", "curves", "labels", "few", "unseen")

LOG = jp.objectives.log_probability
GLOBAL = Method(jp.criteria.GradientActivation(objective=LOG), per_layer=False, examples=EXAMPLES)
OURS = "gradient x activation"
METHODS = {
    OURS: GLOBAL,
    "integrated gradients": replace(GLOBAL, criterion=jp.criteria.IntegratedGradients(objective=LOG, nodes=4)),
    "Taylor": replace(GLOBAL, criterion=jp.criteria.Taylor()),
    "Fisher": replace(GLOBAL, criterion=jp.criteria.Fisher()),
    "Wanda": replace(GLOBAL, criterion=jp.criteria.Wanda()),
    "Wanda, per layer": replace(GLOBAL, criterion=jp.criteria.Wanda(), per_layer=True),
    "activation": replace(GLOBAL, criterion=jp.criteria.Activation()),
    "block influence": replace(GLOBAL, criterion=jp.criteria.BlockInfluence()),
    "magnitude": replace(GLOBAL, criterion=jp.criteria.Magnitude()),
    "random": replace(GLOBAL, criterion=jp.criteria.Random()),
}


def repaired(method: Method) -> Method:
    """The same, with its modules fitted to the dense model's outputs."""
    return replace(method, recovery=jp.recoveries.Reconstruction(), recovery_examples=256)


class Decoders(Bench):
    """The tasks with their prompts, whose calibration is the best on dev."""

    def task(self, name: str) -> jp.Task:
        """See `Bench`."""
        if name not in self.tasks:
            task = super().task(name)
            task = replace(task, prompt=PROMPTS[name]) if name in PROMPTS else task
            prompt, found = prompt_of(self.model, task), {}
            assert prompt is not None
            for calibration in CALIBRATIONS:
                self.tasks[name] = replace(task, prompt=replace(prompt, calibration=calibration))
                found[calibration] = self.cell(name, "dev").hits.mean()
            best = max(found, key=lambda calibration: found[calibration])
            self.tasks[name] = replace(task, prompt=replace(prompt, calibration=best))
        return self.tasks[name]


def dense(bench: Bench) -> dict[str, Any]:
    """The model as it is, by task: those that it does at least 10 points above chance on dev are used."""
    rows = {}
    for task in bench.names:
        cell, prompt = bench.cell(task, "test"), bench.task(task).prompt
        assert prompt is not None
        rows[task] = {
            "accuracy": float(cell.hits.mean()),
            "chance": bench.chance(task, "test"),
            "n": len(cell.hits),
            "calibration": prompt.calibration,
            "used": task in bench.able,
        }
    return {"rows": rows}


def beside(
    bench: Bench, methods: dict[str, Method], budget: float, draws: int = DRAWS, tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """Methods at one budget, on test, and what ours is ahead of each."""
    tasks = tasks or bench.able
    whole, chance = bench.dense(tasks, "test"), bench.chances(tasks, "test")
    cells = {name: bench.cells_of(own, tasks, "test", budget, draws) for name, own in methods.items()}
    return {
        "budget": budget,
        "rows": {name: summary(own, whole, chance) for name, own in cells.items()},
        "claims": {
            f"{OURS} - {name}": compare(cells[OURS], own, whole, chance) for name, own in cells.items() if name != OURS
        },
    }


def curves(bench: Bench) -> dict[str, Any]:
    """All methods at all budgets, without repair and with it; one draw."""
    return {
        f"{budget}{name}": beside(bench, {key: change(own) for key, own in METHODS.items()}, budget, 1)["rows"]
        for budget in BUDGETS
        for name, change in (("", lambda own: own), (", repaired", repaired))
    }


def matrix(bench: Bench) -> dict[str, Any]:
    """Scored on one task, tested on another: is what is kept the task's own? One draw."""
    tasks = bench.able
    whole, chance = bench.dense(tasks, "test"), bench.chances(tasks, "test")
    cells = {
        (a, b): [bench.cell(b, "test", method=GLOBAL, scored_on=a, budget=OWN)]
        for a, b in itertools.product(tasks, tasks)
    }
    own = {b: cells[b, b] for b in tasks}
    others = {b: [cell for a in tasks if a != b for cell in cells[a, b]] for b in tasks}
    return {
        "budget": OWN,
        "retained": {a: {b: retained({b: cells[a, b]}, whole, chance) for b in tasks} for a in tasks},
        "own_minus_other": compare(own, others, whole, chance),
    }


def labels(bench: Bench) -> dict[str, Any]:
    """With labels, and with the model's own answers in their place; at half, repaired."""
    free = jp.criteria.GradientActivation(objective=LOG, labels=jp.objectives.predicted)
    methods = {OURS: repaired(GLOBAL), "unlabelled": repaired(replace(GLOBAL, criterion=free))}
    return beside(bench, methods, HALF)


def few(bench: Bench) -> dict[str, Any]:
    """1, 4, 16 and 64 rows per class, at the endpoint."""
    rows: dict[str, Any] = {}
    for count in (1, 4, 16, 64):
        for task in bench.able:
            many = min(count * len(bench.task(task).labels), len(bench.task(task).rows("calibration")))
            own = beside(bench, {OURS: replace(GLOBAL, examples=many)}, ENDPOINT, DRAWS, [task])["rows"][OURS]
            rows.setdefault(str(count), {})[task] = {"examples": many, "retained": own["retained"]}
    return {"budget": ENDPOINT, "rows": rows}


def unseen(bench: Bench) -> dict[str, Any]:
    """Scored on sst2, tested on reviews of other kinds; at the endpoint."""
    methods = {name: METHODS[name] for name in (OURS, "Wanda, per layer", "random")}
    return {"rows": bench.elsewhere([("sst2", domain) for domain in UNSEEN], methods, ENDPOINT, 1)}


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder or GGUF of a decoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of each split, at most ({ROWS})")
    parser.add_argument("--tasks", default=",".join(TASKS), help="those to use")
    arguments, chosen = asked(parser, PARTS)
    names = tuple(arguments.tasks.split(","))
    bench = Decoders(arguments.model, arguments.data, arguments.work, arguments.rows, names)
    found = begun(parser, arguments.output, bench.digest)
    run: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "dense": dense,
        "endpoint": lambda bench: beside(bench, METHODS, ENDPOINT),
        "half": lambda bench: beside(bench, {name: repaired(own) for name, own in METHODS.items()}, HALF),
        "matrix": matrix,
        "curves": curves,
        "labels": labels,
        "few": few,
        "unseen": unseen,
    }
    facts = {
        "command": "python benchmarks/decoders.py --model MODEL --data DATA --work WORK -o OUTPUT",
        "model": bench.digest,
        "examples": EXAMPLES,
        "draws": DRAWS,
        "at_most_rows": arguments.rows,
        "endpoint": ENDPOINT,
    }
    for part in each(chosen):
        keep(arguments.output, found, part, run[part](bench), facts)


if __name__ == "__main__":
    main()

"""A real decoder pruned for one task without training: attribution beside every baseline, repaired and not.

    python benchmarks/decoders.py --model smollm2 --data DATA --work WORK -o benchmarks/results/decoders.json

`--model` is a folder or a GGUF of an instruction model that nobody fine-tuned for these tasks; its prompts are the
built-in ones. Budgets are of the layers' FLOPs. Every scoring run and every tested model is kept in `WORK` as soon as
it is done; an interrupted run goes on where it was. The calibration of the label words is chosen on dev, and so are the
units and the allocation of every method (`choices`, on two of the tasks); figures are those of test. What counts as
"beats" is in `evidence.py`; the endpoints were fixed before any figure was seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench import Bench, Method
from evidence import Cell, compare, retained, summary
from parts import asked, begun, each, keep

import jaxprune as jp
from jaxprune.data.prompts import CALIBRATIONS, Prompt, prompt_of
from jaxprune.evaluation.evaluate import calibrate, fitting_head, predict

TASKS = ("sst2", "mr", "cr", "ag_news", "subj", "snips", "trec", "dbpedia_14")
POLARITY = Prompt(template="Review: {text}\nSentiment:", words=(" negative", " positive"))
PROMPTS = dict.fromkeys(("cr", "amazon_books"), POLARITY)  # of tasks that are not built in
ENDPOINT, HALF, OWN = 0.8, 0.5, 0.7  # without repair; with it; where scores of other tasks are compared
BUDGETS = (0.9, 0.8, 0.7, 0.5, 0.3)
EXAMPLES = 64  # calibration rows to score with
DRAWS = 3
ROWS = 300  # of dev and of test, at most
UNSEEN = ("imdb", "yelp_polarity", "amazon_books", "cr")  # scored on sst2
PARTS = (
    "dense", "choices", "variants", "endpoint", "half", "baselines", "matrix", "curves", "labels", "few", "unseen",
    "measured",
)  # fmt: skip
CHOSEN_ON, CHOICE_ROWS = ("sst2", "snips"), 128  # dev rows of these
KINDS = {"groups": ("groups", "neurons"), "query heads": ("query_heads", "neurons")}

LOG = jp.objectives.log_probability
BASE = Method(jp.criteria.GradientActivation(objective=LOG), allocation="per_kind", examples=EXAMPLES)
OURS = "gradient x activation"
CRITERIA = {
    OURS: BASE.criterion,
    "random": jp.criteria.Random(),
    "magnitude": jp.criteria.Magnitude(),
    "integrated gradients": jp.criteria.IntegratedGradients(objective=LOG, nodes=4),
    "Wanda": jp.criteria.Wanda(),
    "activation": jp.criteria.Activation(),
    "Taylor": jp.criteria.Taylor(),
    "Fisher": jp.criteria.Fisher(),
    "block influence": jp.criteria.BlockInfluence(),
}
FIRST = (OURS, "random", "magnitude")  # those of the endpoint


def candidates(name: str) -> dict[str, Method]:
    """The ways to use a criterion, of which the best on dev is taken."""
    criterion = CRITERIA[name]
    found = {}
    for units, kinds in KINDS.items():
        for allocation in ("per_layer", "per_kind", "global") if criterion.by_layer else ("global",):
            method = replace(BASE, criterion=replace(criterion, kinds=kinds), allocation=allocation)
            found[f"{units}, {allocation}"] = method
    return found


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
            prompt = prompt_of(self.model, task)
            file = self.work / f"calibration.{name}.{self.rows}.json"
            assert prompt is not None
            if not file.exists():
                self.tasks[name] = task
                encoded, found = self.rows_of(name, "dev"), {}
                head = fitting_head(self.model, task)
                logits = predict(self.model, self.params, encoded, head=head, batch_size=64)
                own = np.asarray(jax.nn.log_softmax(logits, axis=1))
                for calibration in CALIBRATIONS:
                    asked = replace(task, prompt=replace(prompt, calibration=calibration))
                    bias = calibrate(self.model, self.params, asked, encoded, head=head).bias
                    hits = (own + (0 if bias is None else bias)).argmax(1) == encoded.labels
                    found[calibration], self.tasks[name] = float(hits.mean()), asked
                    self.keep_cell(self.key_of(name, "dev"), Cell(hits, 1.0))
                file.write_text(json.dumps(found))
            found = json.loads(file.read_text())
            best = max(found, key=lambda calibration: found[calibration])
            self.tasks[name] = replace(task, prompt=replace(prompt, calibration=best))
        return self.tasks[name]

    def method(self, name: str) -> Method:
        """A criterion with the units and the allocation that are best for it on dev, at the endpoint, unrepaired."""
        return candidates(name)[max(self.tried(name).items(), key=lambda item: item[1])[0]]

    @cached_property
    def small(self) -> Bench:
        """The same with fewer rows, to choose by."""
        return self.with_rows(min(self.rows, CHOICE_ROWS))

    def tried(self, name: str) -> dict[str, float]:
        """What is kept on dev in every way, mean over two tasks; one draw."""
        tasks, few = [task for task in CHOSEN_ON if task in self.names], self.small
        whole, chance = few.dense(tasks, "dev"), few.chances(tasks, "dev")
        return {
            how: retained(few.cells_of(method, tasks, "dev", ENDPOINT, 1), whole, chance)
            for how, method in candidates(name).items()
        }

    def methods(self, names: Sequence[str] = tuple(CRITERIA)) -> dict[str, Method]:
        """Several of them."""
        return {name: self.method(name) for name in names}


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


def variants(bench: Decoders) -> dict[str, Any]:
    """Other settings of attribution, one at a time, on dev and at the endpoint; one draw."""
    own, objectives = bench.method(OURS), jp.objectives
    along = jp.criteria.IntegratedGradients(objective=LOG, nodes=4, kinds=own.criterion.kinds)
    changed = {
        OURS: own,
        "objective: margin": replace(own, criterion=replace(own.criterion, objective=objectives.margin)),
        "objective: probability": replace(own, criterion=replace(own.criterion, objective=objectives.probability)),
        "labels: every": replace(own, criterion=replace(own.criterion, labels=objectives.every)),
        "labels: predicted": replace(own, criterion=replace(own.criterion, labels=objectives.predicted)),
        "examples: squared": replace(own, criterion=replace(own.criterion, examples=objectives.squared)),
        "examples: 256": replace(own, examples=256),
        "integrated gradients, 4 nodes": replace(own, criterion=along),
    }
    whole, chance = bench.small.dense(bench.able, "dev"), bench.small.chances(bench.able, "dev")
    found = {}
    for name, method in changed.items():
        cells = bench.small.cells_of(method, bench.able, "dev", ENDPOINT, 1)
        found[name] = {"retained": retained(cells, whole, chance)} | {
            "tasks": {task: retained({task: cells[task]}, whole, chance) for task in cells}
        }
    return {"split": "dev", "rows": found}


def curves(bench: Decoders) -> dict[str, Any]:
    """All methods at all budgets, without repair and with it; one draw."""
    return {
        f"{budget}{name}": beside(bench, {key: change(own) for key, own in bench.methods().items()}, budget, 1)["rows"]
        for budget in BUDGETS
        for name, change in (("", lambda own: own), (", repaired", repaired))
    }


def matrix(bench: Decoders) -> dict[str, Any]:
    """Scored on one task, tested on another: is what is kept the task's own? One draw."""
    tasks = bench.able
    whole, chance = bench.dense(tasks, "test"), bench.chances(tasks, "test")
    cells = {
        (a, b): [bench.cell(b, "test", method=bench.method(OURS), scored_on=a, budget=OWN)]
        for a, b in itertools.product(tasks, tasks)
    }
    own = {b: cells[b, b] for b in tasks}
    others = {b: [cell for a in tasks if a != b for cell in cells[a, b]] for b in tasks}
    return {
        "budget": OWN,
        "retained": {a: {b: retained({b: cells[a, b]}, whole, chance) for b in tasks} for a in tasks},
        "own_minus_other": compare(own, others, whole, chance),
    }


def labels(bench: Decoders) -> dict[str, Any]:
    """With labels, and with the model's own answers in their place; at the endpoint."""
    own = bench.method(OURS)
    free = replace(own.criterion, labels=jp.objectives.predicted)
    return beside(bench, {OURS: own, "unlabelled": replace(own, criterion=free)}, ENDPOINT)


def few(bench: Decoders) -> dict[str, Any]:
    """1, 4, 16 and 64 rows per class, at the endpoint."""
    rows: dict[str, Any] = {}
    for count in (1, 4, 16, 64):
        for task in bench.able:
            many = min(count * len(bench.task(task).labels), len(bench.task(task).rows("calibration")))
            own = beside(bench, {OURS: replace(bench.method(OURS), examples=many)}, ENDPOINT, DRAWS, [task])["rows"][
                OURS
            ]
            rows.setdefault(str(count), {})[task] = {"examples": many, "retained": own["retained"]}
    return {"budget": ENDPOINT, "rows": rows}


def unseen(bench: Decoders) -> dict[str, Any]:
    """Scored on sst2, tested on reviews of other kinds; at the endpoint."""
    methods = bench.methods((OURS, "Wanda", "random"))
    return {"rows": bench.elsewhere([("sst2", domain) for domain in UNSEEN], methods, ENDPOINT, 1)}


def measured(bench: Decoders) -> dict[str, Any]:
    """Widths by the model's measured answers beside the best other allocation: unrepaired, and at half repaired."""
    found = {}
    for budget, change in ((OWN, lambda own: own), (HALF, repaired)):
        own = bench.method(OURS)
        methods = {OURS: change(replace(own, allocation="measured")), own.allocation: change(own)}
        found[str(budget)] = beside(bench, methods, budget, 1)
    return found


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder or GGUF of a decoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of each split, at most ({ROWS})")
    parser.add_argument("--tasks", default=",".join(TASKS), help="those to use")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    arguments, chosen = asked(parser, PARTS)
    names = tuple(arguments.tasks.split(","))
    bench = Decoders(arguments.model, arguments.data, arguments.work, arguments.rows, names, arguments.precision)
    found = begun(parser, arguments.output, bench.digest)
    run: dict[str, Callable[[Decoders], dict[str, Any]]] = {
        "dense": dense,
        "choices": lambda bench: {"tasks": CHOSEN_ON, "split": "dev", "retained": {n: bench.tried(n) for n in FIRST}},
        "variants": variants,
        "endpoint": lambda bench: beside(bench, bench.methods(FIRST), ENDPOINT),
        "half": lambda bench: beside(bench, {name: repaired(own) for name, own in bench.methods(FIRST).items()}, HALF),
        "baselines": lambda bench: beside(bench, bench.methods(), ENDPOINT),
        "matrix": matrix,
        "curves": curves,
        "labels": labels,
        "few": few,
        "unseen": unseen,
        "measured": measured,
    }
    facts = {
        "command": "python benchmarks/decoders.py --model MODEL --data DATA --work WORK -o OUTPUT"
        + "".join(f" --precision {own}" for own in bench.other),
        "model": bench.digest,
        "precision": arguments.precision,
        "examples": EXAMPLES,
        "draws": DRAWS,
        "at_most_rows": arguments.rows,
        "budget": ENDPOINT,
    }
    for part in each(chosen):
        keep(arguments.output, found, part, run[part](bench), facts)


if __name__ == "__main__":
    main()

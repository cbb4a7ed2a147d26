"""The settings of the first paper (arXiv 2205.04157) on one multi-task model: many labels, few, none, another domain.

    python benchmarks/attribution_paper.py --model MODEL --data DATA --work WORK -o attribution_paper.json

Attribution beside every baseline, from 10 to 90 % removed, per layer and over all layers together. Made for a
text-to-text model, whose tasks are told apart by prompts; it runs on a model with task heads as well. Every scoring
run and every tested model is kept in `WORK`, so an interrupted run goes on where it was. Figures are those of test; the
rules are in `evidence.py`, the settings that are compared were fixed beforehand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from accuracy import ATTRIBUTION, CRITERIA, UNSEEN, commit
from bench import Bench, Method
from evidence import compare, summary

import jaxprune as jp
from jaxprune import objectives
from jaxprune.files import write_atomic
from jaxprune.selection import per_layer_l2

TASKS = ("sst2", "ag_news", "mrpc", "rte", "qnli", "subj", "trec", "dbpedia_14", "banking77", "snips")
KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of the FLOPs of encoder and decoder
ENDPOINT = 0.5
PER_CLASS = (1, 4, 16, 64, 256)
MOST = 2_048  # examples of a calibration set
ROWS = 300  # of test, at most
DRAWS = 5
CURVE_DRAWS = 1
PARTS = ("supervised", "few", "unsupervised", "unseen", "cost")
CLOSE = ("integrated gradients", "gradient x activation", "Taylor", "Fisher", "Wanda", "magnitude", "random")
LABEL_FREE = {"predicted": objectives.predicted, "every": objectives.every}
GOLD = {"integrated gradients": jp.IntegratedGradients, "gradient x activation": jp.GradientActivation}


def examples_of(bench: Bench, task: str, wanted: int) -> int:
    """As many calibration rows as there are, at most so many."""
    return min(wanted, len(bench.task(task).rows("calibration")))


def cells(bench: Bench, task: str, method: Method, budget: float, draws: int, examples: int) -> list[Any]:
    """One task, one method, some draws of so many examples."""
    own = replace(method, examples=examples_of(bench, task, examples))
    return bench.cells_of(own, [task], "test", budget, draws)[task]


def supervised(bench: Bench, examples: int) -> dict[str, Any]:
    """All criteria at all budgets, with all labelled examples; per layer, and over all layers together."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    found: dict[str, Any] = {}
    for scope in ("per layer", "global"):
        rows = {}
        for name, criterion in CRITERIA.items():
            if name == "top layers" and scope == "per layer":
                continue  # it ranks layers
            method = Method(criterion, per_layer=scope == "per layer", normalise=None)
            if scope == "global" and name not in ("top layers", "random"):
                method = replace(method, normalise=per_layer_l2)
            rows[name] = {
                str(kept): summary(
                    {task: cells(bench, task, method, kept, CURVE_DRAWS, examples) for task in bench.able},
                    dense,
                    chance,
                )
                for kept in KEPT
            }
        found[scope] = rows
    methods = {name: Method(criterion, per_layer=name != "top layers") for name, criterion in CRITERIA.items()}
    ends = {
        name: {task: cells(bench, task, method, ENDPOINT, DRAWS, examples) for task in bench.able}
        for name, method in methods.items()
    }
    pairs = [(one, other) for one in ATTRIBUTION for other in methods if other not in ATTRIBUTION] + [ATTRIBUTION]
    return {
        "examples": {task: examples_of(bench, task, examples) for task in bench.able},
        "rows": found,
        "endpoint": {name: summary(own, dense, chance) for name, own in ends.items()},
        "claims": {f"{one} - {other}": compare(ends[one], ends[other], dense, chance) for one, other in pairs},
    }


def few(bench: Bench, examples: int) -> dict[str, Any]:
    """So many labelled examples per class, with the spread over the draws."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    rows: dict[str, Any] = {}
    for per_class in PER_CLASS:
        own = {}
        for name in CLOSE:
            found = {}
            for task in bench.able:
                count = min(per_class * len(bench.task(task).labels), examples)
                found[task] = cells(bench, task, Method(CRITERIA[name]), ENDPOINT, DRAWS, count)
            own[name] = summary(found, dense, chance)
        rows[str(per_class)] = own
    return {"rows": rows, "at_most": examples}


def unsupervised(bench: Bench, examples: int) -> dict[str, Any]:
    """Without labels: for what the model predicts, and for every label by its probability."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    rows: dict[str, Any] = {}
    for name, make in GOLD.items():
        gold = {task: cells(bench, task, Method(make()), ENDPOINT, DRAWS, examples) for task in bench.able}
        rows[name] = {"gold": summary(gold, dense, chance)}
        for label, function in LABEL_FREE.items():
            tasks = [t for t in bench.able if label != "every" or len(bench.task(t).labels) <= 10]  # a pass per label
            own = {task: cells(bench, task, Method(make(labels=function)), ENDPOINT, DRAWS, examples) for task in tasks}
            some = {task: gold[task] for task in tasks}
            rows[name][label] = summary(own, dense, chance) | {"gold_minus_this": compare(some, own, dense, chance)}
    return {"rows": rows}


def unseen(bench: Bench, examples: int) -> dict[str, Any]:
    """Scored on one task, tested in domains that neither fine-tuning nor scoring has seen."""
    rows: dict[str, Any] = {}
    for source, domains in UNSEEN.items():
        for domain in domains:
            bench.ask_as(domain, source)
            head = None if bench.model.writes_text else source
            dense, chance = {domain: bench.cell(domain, "test", head=head)}, {domain: bench.chance(domain, "test")}
            own: dict[str, Any] = {}
            for name in CLOSE:
                method = Method(CRITERIA[name], examples=examples_of(bench, source, examples))
                seen = bench.cells_of(method, [domain], "test", ENDPOINT, DRAWS, scored_on=source, head=head)
                own[name] = summary(seen, dense, chance)["tasks"][domain]
            rows[domain] = {
                "scored_on": source,
                "dense": float(dense[domain].hits.mean()),
                "chance": chance[domain],
                "n": len(dense[domain].hits),
                "accuracy": own,
            }
    return {"rows": rows}


def cost(bench: Bench, examples: int) -> dict[str, Any]:
    """How long a criterion takes for one task, in turns; the first round, which compiles, is not counted."""
    task, count, rounds = bench.task(bench.able[0]), 64, 3
    seconds: dict[str, list[float]] = {name: [] for name in CRITERIA}
    for turn in range(rounds + 1):
        for name, criterion in CRITERIA.items():
            begun = time.perf_counter()
            found = jp.score(bench.model, bench.params, task, criterion=criterion, examples=count, key=turn)
            jax.block_until_ready(found.values)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    least = float(np.median(seconds["gradient x activation"]))
    return {
        "task": task.name,
        "examples": count,
        "seconds": {name: float(np.median(own)) for name, own in seconds.items()},
        "relative": {name: float(np.median(own)) / least for name, own in seconds.items()},
    }


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model that does all the tasks")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the record to write (JSON)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="the tasks, by commas")
    parser.add_argument("--rows", type=int, default=ROWS, help="test rows of each task, at most")
    parser.add_argument("--examples", type=int, default=MOST, help="attribution examples of each task, at most")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run; the others are kept from the record")
    arguments = parser.parse_args()
    chosen, tasks = arguments.only.split(","), tuple(arguments.tasks.split(","))
    if wrong := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(wrong)}")
    bench = Bench(arguments.model, arguments.data, arguments.work, arguments.rows, tasks)
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if found.get("model", bench.digest) != bench.digest:
        parser.error(f"{arguments.output} is of another model: name another file")
    run: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
        "supervised": supervised,
        "few": few,
        "unsupervised": unsupervised,
        "unseen": unseen,
        "cost": cost,
    }
    for part in PARTS:
        if part in chosen:
            print(f"== {part}", file=sys.stderr, flush=True)
            own = run[part](bench, arguments.examples)
            found[part] = own | {"at_most_rows": bench.rows, "commit": commit()}
            found |= {
                "command": "python benchmarks/attribution_paper.py --model MODEL --data DATA --work WORK -o OUTPUT",
                "model": bench.digest,
                "models": 1,
                "tasks": _tasks(bench, tasks),
                "draws": DRAWS,
                "endpoint": ENDPOINT,
                "device": jax.devices()[0].device_kind,
                "versions": {name: version(name) for name in ("jaxprune", "jax", "flax", "numpy")},
            }
            write_atomic(arguments.output, (json.dumps(found, indent=1) + "\n").encode())


def _tasks(bench: Bench, tasks: Sequence[str]) -> dict[str, Any]:
    """What the dense model scores on dev, and which tasks are too near to chance to say anything."""
    return {
        task: {
            "dense_dev": float(bench.cell(task, "dev").hits.mean()),
            "chance_dev": bench.chance(task, "dev"),
            "used": task in bench.able,
        }
        for task in tasks
    }


if __name__ == "__main__":
    main()

"""What pruning costs in accuracy: attribution against every baseline, with few labels or none, in unseen domains.

    python benchmarks/accuracy.py --model MODEL --data DATA --work WORK -o benchmarks/results/accuracy.json

`DATA` has one folder per task with `train|validation|test.jsonl[.gz]`. Every scoring run and every tested model is kept
in `WORK` as soon as it is done; an interrupted run goes on where it was, and a finished one only makes the tables anew.
Choices are made on dev, figures are those of test. What counts as "beats" or "within" is in `evidence.py`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from evidence import Cell, compare, retained, summary

import jaxprune as jp
from jaxprune import activations, attribution, objectives
from jaxprune.batches import encode
from jaxprune.checkpoint import model_digest
from jaxprune.evaluation import fitting_head, predict
from jaxprune.files import write_atomic
from jaxprune.scores import describe
from jaxprune.selection import per_layer_l2
from jaxprune.tasks import draw

TASKS = ("sst2", "ag_news", "mrpc", "qnli", "trec", "banking77", "snips")
FACTOR_TASKS = ("sst2", "ag_news", "qnli")  # a short text, a long one, a pair
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
FACTOR_BUDGETS = (0.5, 0.3)
ENDPOINT = 0.5  # of the FLOPs: the primary endpoint, fixed before any figure was seen
EXAMPLES = 128
EXAMPLES_FOR_NODES = 64  # 128 nodes of the reference are dear
DRAWS = 5
DRAWS_FOR_CHOICES = 2
MANY_DRAWS = 20  # of chance, and of few examples
ROWS = 300  # of dev and of test, at most
FEW = (8, 32)
UNSEEN = {  # scored on: never trained on, never scored on
    "sst2": (
        "imdb",
        "amazon_books",
        "amazon_dvd",
        "amazon_electronics",
        "uci_amazon_sentences",
        "uci_imdb_sentences",
        "uci_yelp_sentences",
        "yelp_polarity_1k",
    ),
    "mrpc": ("qqp_subset", "pawsx_en"),
}
PARTS = ("main", "labels", "matrix", "factors", "curves", "unseen", "few", "nodes")


@dataclass(frozen=True)
class Method:
    """How units are chosen."""

    criterion: Any
    per_layer: bool = True
    normalise: Callable[..., Any] | None = None
    examples: int = EXAMPLES


DEFAULT = Method(jp.IntegratedGradients())
FACTORS = {  # one setting at a time, the others as in DEFAULT
    "default": DEFAULT,
    "path: layer": Method(jp.IntegratedGradients(path=attribution.layer)),
    "start: 0.5": Method(jp.IntegratedGradients(start=0.5)),
    "nodes: 2": Method(jp.IntegratedGradients(nodes=2)),
    "gradient x activation": Method(jp.GradientActivation()),
    "objective: log-probability": Method(jp.IntegratedGradients(objective=jp.log_probability)),
    "objective: margin": Method(jp.IntegratedGradients(objective=jp.margin)),
    "examples: signed": Method(jp.IntegratedGradients(examples=objectives.signed)),
    "examples: squared": Method(jp.IntegratedGradients(examples=objectives.squared)),
    "examples: maximum": Method(jp.IntegratedGradients(examples=objectives.maximum)),
    "closed: mean": Method(jp.IntegratedGradients(closed=activations.calibration_means)),
    "scope: global": replace(DEFAULT, per_layer=False),
    "scope: global, L2": replace(DEFAULT, per_layer=False, normalise=per_layer_l2),
}
CRITERIA = {
    "integrated gradients": jp.IntegratedGradients(),
    "gradient x activation": jp.GradientActivation(),
    "Taylor": jp.Taylor(),
    "Fisher": jp.Fisher(),
    "gradient": jp.Gradient(),
    "Wanda": jp.Wanda(),
    "activation": jp.Activation(),
    "magnitude": jp.Magnitude(),
    "top layers": jp.TopLayers(),
    "random": jp.Random(),
}
ATTRIBUTION = ("integrated gradients", "gradient x activation")
# All with the same widths in every layer, where no normalisation within a layer changes the ranking; dropping layers
# is by its nature global.
METHODS = {name: Method(criterion, per_layer=name != "top layers") for name, criterion in CRITERIA.items()}


@dataclass
class Bench:
    """The model, its tasks, and what is kept of the work done."""

    source: Path
    data: Path
    work: Path
    rows: int
    tasks: dict[str, jp.Task] = field(default_factory=dict)
    encoded: dict[tuple[str, str], Any] = field(default_factory=dict)
    scored: dict[str, jp.Scores] = field(default_factory=dict)

    def __post_init__(self):
        self.model, self.params = jp.load(self.source)
        self.digest = model_digest(self.model, self.params)
        self.work.mkdir(parents=True, exist_ok=True)
        self.file = self.work / "cells.jsonl"
        self.cells: dict[str, Cell] = {}
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                try:
                    found = json.loads(line)
                except ValueError:
                    continue  # a line that was being written when the run was stopped
                hits = np.unpackbits(np.frombuffer(base64.b64decode(found["hits"]), np.uint8))[: found["n"]]
                self.cells[found["key"]] = Cell(hits.astype(bool), found["flops"])
        self.begun, self.made = time.monotonic(), 0

    def task(self, name: str) -> jp.Task:
        """A task, read once."""
        if name not in self.tasks:
            self.tasks[name] = jp.load_task(name, data=self.data)
        return self.tasks[name]

    def rows_of(self, name: str, split: str) -> Any:
        """The tokenised rows to test on: a draw that is always the same."""
        if (name, split) not in self.encoded:
            task = self.task(name)
            rows = task.rows(split)
            self.encoded[name, split] = encode(
                self.model, draw(task, self.rows, 0, split=split) if self.rows < len(rows) else rows
            )
        return self.encoded[name, split]

    def chance(self, name: str, split: str) -> float:
        """The share of the most frequent label."""
        labels = self.rows_of(name, split).labels
        return float(np.bincount(labels).max() / len(labels))

    def scores(self, task: str, criterion: Any, examples: int, seed: int) -> jp.Scores:
        """Scores of a task, made once."""
        settings = json.dumps([self.digest, task, describe(criterion), examples, seed], sort_keys=True)
        name = hashlib.sha256(settings.encode()).hexdigest()[:24]
        if name not in self.scored:
            path = self.work / "scores" / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                found = jp.score(
                    self.model, self.params, self.task(task), criterion=criterion, examples=examples, key=seed
                )
                jp.save_scores(path, found)
            self.scored[name] = jp.load_scores(path)
        return self.scored[name]

    def pooled(self, tasks: Sequence[str], method: Method, seed: int) -> dict[str, Any]:
        """The mean of several tasks' scores, each divided by its total, so that every task weighs the same."""
        total: dict[str, Any] = {}
        for task in tasks:
            own = self.scores(task, method.criterion, method.examples, seed).values
            whole = sum(float(jnp.abs(value).sum()) for value in own.values())
            total = {name: total.get(name, 0.0) + value / whole for name, value in own.items()}
        return total

    def cell(
        self,
        task: str,
        split: str,
        *,
        method: Method | None = None,
        scored_on: str | tuple[str, ...] | None = None,
        budget: float = 1.0,
        seed: int = 0,
        head: str | None = None,
    ) -> Cell:
        """Which rows of a task a pruned model gets right; without a method, the dense one.

        Args:
            task: What to test on.
            split: Its rows: dev for choices, test for figures.
            method: How to prune.
            scored_on: The task, or several to pool; by default the one that is tested.
            budget: Fraction of the FLOPs.
            seed: Of the draw of the calibration rows.
            head: The task head; by default the task's own.
        """
        source = scored_on or task
        what = None
        if method is not None:
            normalise = None if method.normalise is None else method.normalise.__name__
            what = [describe(method.criterion), method.per_layer, normalise, method.examples, source, budget, seed]
        key = json.dumps([self.digest, self.rows, task, split, head, what], sort_keys=True)
        if key not in self.cells:
            params, gates, means, kept = self.params, None, None, 1.0
            if method is not None:
                first = source if isinstance(source, str) else source[0]
                scores = self.scores(first, method.criterion, method.examples, seed)
                length = self.length(first)
                values = scores if isinstance(source, str) else self.pooled(source, method, seed)
                gates = jp.select(
                    self.model,
                    self.params,
                    values,
                    flops=budget,
                    length=length,
                    per_layer=method.per_layer,
                    normalise=method.normalise,
                )
                small = jp.compact(self.model, self.params, gates, scores.means)
                kept = jp.flops(self.model, small, length) / jp.flops(self.model, self.params, length)
                means = scores.means
                if method.per_layer:  # all methods share these widths: they are compiled once
                    params, gates, means = small, None, None
            encoded = self.rows_of(task, split)
            head = fitting_head(self.model, self.task(task), head)
            logits = predict(self.model, params, encoded, head=head, gates=gates, means=means, batch_size=64)
            hits = logits.argmax(1) == encoded.labels
            self.cells[key] = Cell(hits, kept)
            with self.file.open("a") as stream:
                packed = base64.b64encode(np.packbits(hits).tobytes()).decode()
                stream.write(json.dumps({"key": key, "hits": packed, "n": len(hits), "flops": kept}) + "\n")
            self.made += 1
            if self.made % 20 == 0:
                print(
                    f"{self.made:,} models tested, {time.monotonic() - self.begun:.0f} s", file=sys.stderr, flush=True
                )
        return self.cells[key]

    def length(self, task: str) -> float:
        """Tokens per calibration row: one number for all methods, so that a budget means the same to each."""
        return self.scores(task, DEFAULT.criterion, EXAMPLES, 0).header["mean_length"]

    def cells_of(
        self, method: Method, tasks: Iterable[str], split: str, budget: float, draws: int, **more: Any
    ) -> dict[str, list[Cell]]:
        """Cells by task, one per draw; one only where the draw changes nothing."""
        reads = method.criterion.examples is not None or isinstance(method.criterion, jp.Random)
        seeds = range(draws if reads else 1)
        return {
            task: [self.cell(task, split, method=method, budget=budget, seed=seed, **more) for seed in seeds]
            for task in tasks
        }

    def dense(self, tasks: Iterable[str], split: str) -> dict[str, Cell]:
        """The unpruned model."""
        return {task: self.cell(task, split) for task in tasks}

    def chances(self, tasks: Iterable[str], split: str) -> dict[str, float]:
        """Chance by task."""
        return {task: self.chance(task, split) for task in tasks}

    @cached_property
    def able(self) -> tuple[str, ...]:
        """The tasks that the dense model does at least 10 points above chance, on dev: the others say nothing."""
        dense, chance = self.dense(TASKS, "dev"), self.chances(TASKS, "dev")
        return tuple(task for task in TASKS if dense[task].hits.mean() - chance[task] >= 0.1)


def kept_sets(bench: Bench, task: str, criterion: Any, budget: float, seed: int = 0) -> np.ndarray:
    """Which units stay, as one array of booleans."""
    scores = bench.scores(task, criterion, EXAMPLES_FOR_NODES, seed)
    gates = jp.select(bench.model, bench.params, scores, flops=budget, length=bench.length(task))
    return np.concatenate([np.asarray(gate) > 0 for gate in gates.values()])


def nodes(bench: Bench) -> dict[str, Any]:
    """How many quadrature nodes are enough: kept sets, accuracy and completeness against 128 nodes, on dev."""
    rows = []
    reference = jp.IntegratedGradients(nodes=128)
    for count in (1, 2, 4, 8, 16, 32):
        criterion = jp.IntegratedGradients(nodes=count)
        overlap, errors = {}, []
        for budget in (0.7, 0.5, 0.3):
            pairs = [[kept_sets(bench, task, one, budget) for one in (criterion, reference)] for task in FACTOR_TASKS]
            overlap[str(budget)] = float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))
        for task in FACTOR_TASKS:
            own = bench.scores(task, criterion, EXAMPLES_FOR_NODES, 0).header["completeness"]
            errors.append(own["relative"])
        pair = [Method(one, examples=EXAMPLES_FOR_NODES) for one in (criterion, reference)]
        found = compared(bench, *pair, FACTOR_TASKS, "dev", ENDPOINT, 1)
        rows.append({"nodes": count, "jaccard": overlap, "completeness": errors, "against_128": found})
    enough = [row["nodes"] for row in rows if min(row["jaccard"].values()) >= 0.98]
    return {
        "tasks": FACTOR_TASKS,
        "examples": EXAMPLES_FOR_NODES,
        "rows": rows,
        "enough": min(enough, default=None),
    }


def compared(
    bench: Bench,
    one: Method,
    other: Method,
    tasks: Sequence[str],
    split: str,
    budget: float,
    draws: int,
    other_draws: int | None = None,
) -> dict[str, Any]:
    """The difference of two methods in the primary metric, with its interval."""
    ours = bench.cells_of(one, tasks, split, budget, draws)
    theirs = bench.cells_of(other, tasks, split, budget, other_draws or draws)
    return compare(ours, theirs, bench.dense(tasks, split), bench.chances(tasks, split))


def mean_retained(bench: Bench, method: Method, tasks: Sequence[str], split: str, budget: float, draws: int) -> float:
    """The primary metric."""
    cells = bench.cells_of(method, tasks, split, budget, draws)
    return retained(cells, bench.dense(tasks, split), bench.chances(tasks, split))


def factors(bench: Bench) -> dict[str, Any]:
    """One setting at a time round the default, on dev."""
    rows = {}
    for name, method in FACTORS.items():
        own = {str(b): mean_retained(bench, method, FACTOR_TASKS, "dev", b, DRAWS_FOR_CHOICES) for b in FACTOR_BUDGETS}
        against = compared(bench, method, DEFAULT, FACTOR_TASKS, "dev", ENDPOINT, DRAWS_FOR_CHOICES)
        rows[name] = {"retained": own, "mean": float(np.mean(list(own.values()))), "against_default": against}
    return {"tasks": FACTOR_TASKS, "draws": DRAWS_FOR_CHOICES, "rows": rows}


def main_part(bench: Bench) -> dict[str, Any]:
    """All criteria at the endpoint, on test."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    draws = {name: MANY_DRAWS if name == "random" else DRAWS for name in METHODS}
    cells = {name: bench.cells_of(own, bench.able, "test", ENDPOINT, draws[name]) for name, own in METHODS.items()}
    pairs = [(one, other) for one in ATTRIBUTION for other in METHODS if other not in ATTRIBUTION] + [ATTRIBUTION]
    tasks = {
        task: {"dense": float(dense[task].hits.mean()), "chance": chance[task], "n": len(dense[task].hits)}
        for task in bench.able
    }
    left_out = {
        task: {"dense": float(bench.cell(task, "dev").hits.mean()), "chance": bench.chance(task, "dev")}
        for task in TASKS
        if task not in bench.able
    }
    return {
        "tasks": tasks,
        "left_out_on_dev": left_out,
        "rows": {name: summary(own, dense, chance) for name, own in cells.items()},
        "claims": {f"{one} - {other}": compare(cells[one], cells[other], dense, chance) for one, other in pairs},
    }


def curves(bench: Bench) -> dict[str, Any]:
    """All criteria at all budgets, on test; one draw."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    return {
        "draws": 1,
        "rows": {
            name: {str(b): summary(bench.cells_of(own, bench.able, "test", b, 1), dense, chance) for b in BUDGETS}
            for name, own in METHODS.items()
        },
    }


def labels(bench: Bench) -> dict[str, Any]:
    """Without labels, for the model's own predictions; test, at the endpoint."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    gold = bench.cells_of(DEFAULT, bench.able, "test", ENDPOINT, DRAWS)
    method = Method(jp.IntegratedGradients(labels=objectives.predicted))
    cells = bench.cells_of(method, bench.able, "test", ENDPOINT, DRAWS)
    rows = {
        "gold": summary(gold, dense, chance),
        "predicted": summary(cells, dense, chance) | {"gold_minus_this": compare(gold, cells, dense, chance)},
    }
    return {"rows": rows}


def few(bench: Bench) -> dict[str, Any]:
    """Few labelled examples against all there are, up to 512; test, at the endpoint."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    sizes = {task: min(512, len(bench.task(task).rows("calibration"))) for task in bench.able}
    everything = {
        task: bench.cells_of(replace(DEFAULT, examples=count), [task], "test", ENDPOINT, 1)[task]
        for task, count in sizes.items()
    }
    rows: dict[str, Any] = {"all": summary(everything, dense, chance) | {"examples": sizes}}
    for count in (*FEW, EXAMPLES):
        draws = MANY_DRAWS if count <= 32 else DRAWS
        cells = bench.cells_of(replace(DEFAULT, examples=count), bench.able, "test", ENDPOINT, draws)
        loss = compare(everything, cells, dense, chance)
        rows[str(count)] = summary(cells, dense, chance) | {"all_minus_this": loss}
    return {"rows": rows}


def unseen(bench: Bench) -> dict[str, Any]:
    """Scored on one task, tested in domains that neither fine-tuning nor scoring has seen; at the endpoint."""
    rows: dict[str, Any] = {}
    for source, domains in UNSEEN.items():
        for domain in domains:
            own: dict[str, Any] = {}
            dense = {domain: bench.cell(domain, "test", head=source)}
            chance = {domain: bench.chance(domain, "test")}
            for name in ("integrated gradients", "gradient x activation", "Taylor", "Wanda", "random"):
                seen = bench.cells_of(METHODS[name], [domain], "test", ENDPOINT, DRAWS, scored_on=source, head=source)
                own[name] = summary(seen, dense, chance)["tasks"][domain]
            rows[domain] = {
                "scored_on": source,
                "dense": float(dense[domain].hits.mean()),
                "chance": chance[domain],
                "n": len(dense[domain].hits),
                "accuracy": own,
            }
    return {"rows": rows}


def matrix(bench: Bench, draws: int = 3) -> dict[str, Any]:
    """Scored on one task, tested on another: is what is kept the task's own? At the endpoint, on test."""
    tasks = bench.able
    dense, chance = bench.dense(tasks, "test"), bench.chances(tasks, "test")
    cells = {
        (a, b): [bench.cell(b, "test", method=DEFAULT, scored_on=a, budget=ENDPOINT, seed=s) for s in range(draws)]
        for a, b in itertools.product([*tasks, tasks], tasks)
    }
    own = {b: cells[b, b] for b in tasks}
    pooled = {b: cells[tasks, b] for b in tasks}
    others = {b: [cell for a in tasks if a != b for cell in cells[a, b]] for b in tasks}
    rows = {
        "pooled" if a == tasks else str(a): {b: retained({b: cells[a, b]}, dense, chance) for b in tasks}
        for a in [*tasks, tasks]
    }
    return {
        "tasks": tasks,
        "draws": draws,
        "retained": rows,
        "own_minus_other": compare(own, others, dense, chance),
        "own_minus_pooled": compare(own, pooled, dense, chance),
    }


def commit() -> str:
    """The commit that this was run with."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with a head for every task")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the record to write (JSON)")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of dev and of test of each task, at most")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run; the others are kept from the record")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if wrong := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(wrong)}")
    bench = Bench(arguments.model, arguments.data, arguments.work, arguments.rows)
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if found.get("model", bench.digest) != bench.digest or found.get("rows", bench.rows) != bench.rows:
        parser.error(f"{arguments.output} is of another model or number of rows: name another file")
    run: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "main": main_part,
        "labels": labels,
        "matrix": matrix,
        "factors": factors,
        "curves": curves,
        "unseen": unseen,
        "few": few,
        "nodes": nodes,
    }
    for part in PARTS:
        if part in chosen:
            print(f"== {part}", file=sys.stderr, flush=True)
            found[part] = run[part](bench)
            found |= {
                "command": "python benchmarks/accuracy.py --model MODEL --data DATA --work WORK -o OUTPUT",
                "model": bench.digest,
                "models": 1,
                "rows": bench.rows,
                "examples": EXAMPLES,
                "draws": DRAWS,
                "endpoint": ENDPOINT,
                "device": jax.devices()[0].device_kind,
                "versions": {name: version(name) for name in ("jaxprune", "jax", "flax", "numpy")},
                "commit": commit(),
            }
            write_atomic(arguments.output, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

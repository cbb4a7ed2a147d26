"""The cost of pruning in accuracy: attribution against every baseline, with few labels or none, in unseen domains.

    python benchmarks/accuracy.py --model MODEL --data DATA --work WORK -o benchmarks/results/accuracy.json

`DATA` has one folder per task with `train|validation|test.jsonl[.gz]`. Every scoring run and every tested model is kept
in `WORK` as soon as it is done; an interrupted run goes on where it was, and a finished one only makes the tables anew.
Choices are made on dev, figures are those of test. What counts as "beats" or "within" is in `evidence.py`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import EXAMPLES, Bench, Method
from evidence import compare, retained, summary
from parts import asked, begun, each, keep

import jaxprune as jp
from jaxprune.pruning.selection import per_layer_l2
from jaxprune.scoring import attribution, objectives
from jaxprune.scoring import objectives as activations

TASKS = ("sst2", "ag_news", "mrpc", "qnli", "trec", "banking77", "snips")
FACTOR_TASKS = ("sst2", "ag_news", "qnli")  # a short text, a long one, a pair
BUDGETS = (0.9, 0.7, 0.5, 0.3, 0.2)
FACTOR_BUDGETS = (0.5, 0.3)
ENDPOINT = 0.5  # of the FLOPs: the primary endpoint, fixed before any figure was seen
TIGHT = 0.3  # where methods are further apart; secondary, added after the endpoint had been seen
EXAMPLES_FOR_CHOICES = 64  # the 128 nodes of the reference are dear
DRAWS = 5
DRAWS_FOR_CHOICES = 2
DRAWS_UNSEEN = 2
MANY_DRAWS = 20  # of chance
MOST_EXAMPLES = 256
ROWS = 300  # of dev and of test, at most
MORE_ROWS = 1000  # where a claim is made
CLAIMS = ("main", "labels", "few")
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
PARTS = ("nodes", "factors", "main", "labels", "matrix", "tight", "curves", "unseen", "few")  # choices first


DEFAULT = Method(jp.criteria.IntegratedGradients())
FACTORS = {  # one setting at a time, the others as in DEFAULT
    "default": DEFAULT,
    "path: layer, nodes: 2": Method(
        jp.criteria.IntegratedGradients(path=attribution.layer, nodes=2)
    ),  # a path per module: dear
    "start: 0.5": Method(jp.criteria.IntegratedGradients(start=0.5)),
    "nodes: 2": Method(jp.criteria.IntegratedGradients(nodes=2)),
    "gradient x activation": Method(jp.criteria.GradientActivation()),
    "objective: log-probability": Method(jp.criteria.IntegratedGradients(objective=jp.objectives.log_probability)),
    "objective: margin": Method(jp.criteria.IntegratedGradients(objective=jp.objectives.margin)),
    "examples: signed": Method(jp.criteria.IntegratedGradients(examples=objectives.signed)),
    "examples: squared": Method(jp.criteria.IntegratedGradients(examples=objectives.squared)),
    "examples: maximum": Method(jp.criteria.IntegratedGradients(examples=objectives.maximum)),
    "closed: mean": Method(jp.criteria.IntegratedGradients(closed=activations.calibration_means)),
    "scope: global": replace(DEFAULT, allocation="global"),
    "scope: global, L2": replace(DEFAULT, allocation="global", normalise=per_layer_l2),
}
CRITERIA = {
    "integrated gradients": jp.criteria.IntegratedGradients(),
    "gradient x activation": jp.criteria.GradientActivation(),
    "Taylor": jp.criteria.Taylor(),
    "Fisher": jp.criteria.Fisher(),
    "gradient": jp.criteria.Gradient(),
    "Wanda": jp.criteria.Wanda(),
    "activation": jp.criteria.Activation(),
    "magnitude": jp.criteria.Magnitude(),
    "top layers": jp.criteria.TopLayers(),
    "random": jp.criteria.Random(),
}
ATTRIBUTION = ("integrated gradients", "gradient x activation")
# All with the same widths in every layer, where no normalisation within a layer changes the ranking; dropping layers
# is by its nature global.
METHODS = {
    name: Method(criterion, allocation="global" if name == "top layers" else "per_layer")
    for name, criterion in CRITERIA.items()
}


def kept_sets(bench: Bench, task: str, criterion: Any, budget: float, seed: int = 0) -> np.ndarray:
    """The units that stay, as one array of booleans."""
    scores = bench.scores(task, criterion, EXAMPLES_FOR_CHOICES, seed)
    gates = jp.select(bench.model, bench.params, scores, jp.budgets.Flops(budget, length=bench.length(task)))
    return np.concatenate([np.asarray(gate) > 0 for gate in gates.values()])


def nodes(bench: Bench) -> dict[str, Any]:
    """The number of quadrature nodes that is enough: kept sets, accuracy and completeness against 128 nodes, on dev."""
    rows = []
    reference = jp.criteria.IntegratedGradients(nodes=128)
    for count in (1, 2, 4, 8, 16):
        criterion = jp.criteria.IntegratedGradients(nodes=count)
        overlap, errors = {}, []
        for budget in (0.7, 0.5, 0.3):
            pairs = [[kept_sets(bench, task, one, budget) for one in (criterion, reference)] for task in FACTOR_TASKS]
            overlap[str(budget)] = float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))
        for task in FACTOR_TASKS:
            own = bench.scores(task, criterion, EXAMPLES_FOR_CHOICES, 0).header["completeness"]
            errors.append(own["relative"])
        own, most = (Method(one, examples=EXAMPLES_FOR_CHOICES) for one in (criterion, reference))
        found = compared(bench, own, most, FACTOR_TASKS, "dev", ENDPOINT, 1)
        rows.append({"nodes": count, "jaccard": overlap, "completeness": errors, "against_128": found})
    enough = [row["nodes"] for row in rows if min(row["jaccard"].values()) >= 0.98]
    return {
        "tasks": FACTOR_TASKS,
        "examples": EXAMPLES_FOR_CHOICES,
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
    rows, default = {}, replace(DEFAULT, examples=EXAMPLES_FOR_CHOICES)
    for name, full in FACTORS.items():
        method = replace(full, examples=EXAMPLES_FOR_CHOICES)
        own = {str(b): mean_retained(bench, method, FACTOR_TASKS, "dev", b, DRAWS_FOR_CHOICES) for b in FACTOR_BUDGETS}
        against = compared(bench, method, default, FACTOR_TASKS, "dev", ENDPOINT, DRAWS_FOR_CHOICES)
        rows[name] = {"retained": own, "mean": float(np.mean(list(own.values()))), "against_default": against}
    return {
        "tasks": FACTOR_TASKS,
        "draws": DRAWS_FOR_CHOICES,
        "examples": EXAMPLES_FOR_CHOICES,
        "rows": rows,
    }


def main_part(bench: Bench, budget: float = ENDPOINT, names: Sequence[str] = tuple(METHODS)) -> dict[str, Any]:
    """Criteria at one budget, on test."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    methods = {name: METHODS[name] for name in names}
    draws = {name: MANY_DRAWS if name == "random" else DRAWS for name in methods}
    cells = {name: bench.cells_of(own, bench.able, "test", budget, draws[name]) for name, own in methods.items()}
    pairs = [(one, other) for one in ATTRIBUTION for other in methods if other not in ATTRIBUTION] + [ATTRIBUTION]
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
        "budget": budget,
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
    method = Method(jp.criteria.IntegratedGradients(labels=objectives.predicted))
    cells = bench.cells_of(method, bench.able, "test", ENDPOINT, DRAWS)
    rows = {
        "gold": summary(gold, dense, chance),
        "predicted": summary(cells, dense, chance) | {"gold_minus_this": compare(gold, cells, dense, chance)},
    }
    return {"rows": rows}


def few(bench: Bench) -> dict[str, Any]:
    """Few labelled examples against all there are, up to 256; test, at the endpoint."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    sizes = {task: min(MOST_EXAMPLES, len(bench.task(task).rows("calibration"))) for task in bench.able}
    everything = {
        task: bench.cells_of(replace(DEFAULT, examples=count), [task], "test", ENDPOINT, 1)[task]
        for task, count in sizes.items()
    }
    rows: dict[str, Any] = {"all": summary(everything, dense, chance) | {"examples": sizes}}
    for count in (*FEW, EXAMPLES):
        cells = bench.cells_of(replace(DEFAULT, examples=count), bench.able, "test", ENDPOINT, DRAWS)
        loss = compare(everything, cells, dense, chance)
        rows[str(count)] = summary(cells, dense, chance) | {"all_minus_this": loss}
    return {"rows": rows}


def unseen(bench: Bench) -> dict[str, Any]:
    """Scored on one task, tested in domains that neither fine-tuning nor scoring has seen; at the endpoint."""
    names = ("integrated gradients", "gradient x activation", "Taylor", "Wanda", "random")
    pairs = [(source, domain) for source, domains in UNSEEN.items() for domain in domains]
    return {"rows": bench.elsewhere(pairs, {name: METHODS[name] for name in names}, ENDPOINT, DRAWS_UNSEEN)}


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


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with a head for every task")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--rows", type=int, help=f"rows of each split, at most ({ROWS}; {MORE_ROWS} for the claims)")
    arguments, chosen = asked(parser, PARTS)
    bench = Bench(arguments.model, arguments.data, arguments.work, arguments.rows or ROWS, TASKS)
    found = begun(parser, arguments.output, bench.digest)
    run: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "main": main_part,
        "labels": labels,
        "matrix": matrix,
        "tight": lambda bench: main_part(bench, TIGHT, (*ATTRIBUTION, "Wanda", "Taylor")),
        "factors": factors,
        "curves": curves,
        "unseen": unseen,
        "few": few,
        "nodes": nodes,
    }
    facts = {
        "command": "python benchmarks/accuracy.py --model MODEL --data DATA --work WORK -o OUTPUT",
        "model": bench.digest,
        "models": 1,
        "examples": EXAMPLES,
        "draws": DRAWS,
        "endpoint": ENDPOINT,
    }
    for part in each(chosen):
        rows = arguments.rows or (MORE_ROWS if part in CLAIMS else ROWS)
        own = run[part](bench.with_rows(rows)) | {"at_most_rows": rows}
        keep(arguments.output, found, part, own, facts)


if __name__ == "__main__":
    main()

"""Budgets of latency: what was asked, what the table predicted, and what the pruned model then took, in one run.

    python benchmarks/latency_budget.py --model jaxprune/bundled/model -o benchmarks/results/latency_budget.json

One table of the modules is measured. For every budget, once with the same fraction everywhere and once with all
units competing, the units are selected by it, the smaller model runs in turns with the dense one, and the budget is
corrected, as `prune` does it. Both the quickest passes and the medians are recorded: on a machine that others use they
differ. Scores are random without `--scores`, which changes which units stay, but not what a width takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from speed import SIZES, environment, random_model
from timing import Setting, say

import jaxprune as jp
from jaxprune.checkpoints.files import write_atomic
from jaxprune.models import Model
from jaxprune.pruning.latency import (
    LatencyComparison,
    LatencyTable,
    Tokens,
    compare_latency,
    measure_latency_table,
    search_latency,
)
from jaxprune.pruning.prune import TRIES
from jaxprune.pruning.selection import least_latency
from jaxprune.units import Gates, Params, widths

SCOPES = {"same fraction": "per_layer", "competing": "global"}  # name -> allocation


def measure(
    model: Model, params: Params, scores: Any, budgets: list[float], *, batch: int, length: Tokens, repeats: int
) -> dict[str, Any]:
    """Measures a table, then models that were selected by it."""
    begun = time.perf_counter()
    table = measure_latency_table(model, params, batch=batch, length=length)
    seconds = time.perf_counter() - begun
    say(f"table: {seconds:.1f} s")
    rows = []
    for budget in budgets:
        for name, allocation in SCOPES.items():
            rows.append(
                {"budget": budget, "scope": name} | _budget(model, params, scores, table, budget, allocation, repeats)
            )
            say(f"{budget:g}, {name}: {rows[-1]}")
    return {
        "table": {
            "seconds": seconds,
            "device": table.conditions.device,
            "fixed": table.fixed,
            "scale": table.scale,
            "wholes": [list(pair) for pair in table.wholes],
            "rows": [
                {"sites": len(row.sites), "first": row.sites[0], "widths": row.widths, "seconds": row.seconds}
                for row in table.rows
            ],
        },
        "rows": rows,
    }


def _budget(
    model: Model, params: Params, scores: Any, table: LatencyTable, budget: float, allocation: str, repeats: int
) -> dict[str, Any]:
    """Selects by one budget, as `jaxprune prune` does, and measures what is left beside the dense model.

    The first try is what the table says by itself; what is kept is measured once more, so that it is not the quickest
    of several measurements of itself.
    """
    known, spent = table.conditions, 0.0
    head = next(iter(model.heads), None)

    def choose(asked: float) -> Gates:
        nonlocal spent
        begun = time.perf_counter()
        gates = jp.select(
            model, params, scores, jp.budgets.Latency(asked, table=table), rules=jp.Rules(allocation=allocation)
        )
        spent = time.perf_counter() - begun
        return gates

    def compared(gates: Gates) -> LatencyComparison:
        pairs = [(model, params), (model, jp.compact(model, params, gates))]
        return compare_latency(pairs, batch=known.batch, length=known.length, head=head, repeats=repeats)

    def measured(gates: Gates) -> float:
        dense, pruned = compared(gates).latencies
        return pruned.least / dense.least

    dense_seconds = table.predict(widths(model.axes, params))
    least = 1.001 * least_latency(model, params, scores, table) / dense_seconds
    search = search_latency(choose, measured, budget, least=least, most=1.0, tries=TRIES)
    found = compared(search.gates)
    dense, pruned = found.latencies
    width = widths(model.axes, jp.compact(model, params, search.gates))
    return {
        "predicted": table.predict(width) / dense_seconds,
        "by_table": search.trials[0].measured,
        "tries": [[own.asked, own.measured] for own in search.trials],
        "measured": pruned.least / dense.least,
        "measured_seconds": pruned.least,
        "by_medians": 1.0 / found.speedups[1],
        "select_seconds": spent,
        "empty_modules": sum(units == 0 for units in width.values()),
    }


def show(found: dict[str, Any]) -> None:
    """Prints a table of all budgets."""
    shown = Table(title="Fractions of the dense model's latency")
    for column in ("budget", "scope", "by the table", "measured", "by medians", "tries", "empty modules"):
        shown.add_column(column, justify="left" if column == "scope" else "right", no_wrap=column == "scope")
    for row in found["rows"]:
        numbers = (f"{row[name]:.3f}" for name in ("by_table", "measured", "by_medians"))
        cells = (f"{row['budget']:g}", row["scope"], *numbers, str(len(row["tries"])), str(row["empty_modules"]))
        shown.add_row(*cells)
    Console().print(shown)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=jp.bundled_model(), help="folder or hub id")
    parser.add_argument("--random", choices=SIZES, help="random weights in this size instead")
    parser.add_argument("--scores", type=Path, help="a score file of the model; random scores without")
    parser.add_argument("--budgets", default="0.8,0.6,0.5,0.4,0.3", help="fractions of the dense model's latency")
    parser.add_argument("--batch", type=int, default=1, help="examples in a pass")
    parser.add_argument("--length", type=int, default=128, help="tokens per example; of T5 it writes four")
    parser.add_argument("--repeats", type=int, default=40, help="timed passes of each model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    size = SIZES.get(arguments.random)
    model, params = jp.load(arguments.model) if size is None else random_model(size)
    random = np.random.default_rng(0)
    scores: Any = {name: random.random(units) for name, units in widths(model.axes, params).items()}
    if arguments.scores is not None:
        scores = jp.load_scores(arguments.scores)
    setting = Setting(
        model=model,
        params=params,
        head=next(iter(model.heads), None),
        folder=f"random weights, {arguments.random}" if size else Path(arguments.model).name,
        batch=arguments.batch,
        length=arguments.length,
        repeats=arguments.repeats,
    )
    budgets = [float(budget) for budget in arguments.budgets.split(",")]
    found = measure(
        model, params, scores, budgets, batch=arguments.batch, length=setting.lengths, repeats=arguments.repeats
    )
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    record = {"command": " ".join(["python", *sys.argv]), **environment(setting, threads), **found}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
    show(found)


if __name__ == "__main__":
    main()

"""What decides how much is kept: the criterion, the allocation of widths over modules, or the repair?

    python benchmarks/allocation.py --model MODEL --data DATA --work WORK --tasks TASKS -o RECORD.json

The same calibration rows for all. Units are ranked within their modules by a criterion; modules get their widths by the
same share, by competition, or by the model's measured answers; what is left is repaired by reconstruction, or not.
Every tested model is kept in `WORK`, and an interrupted run goes on. Nothing is chosen on test; the budgets, of the
FLOPs, and the endpoints were fixed before. What counts as "beats" is in `evidence.py`.

Parts, for `--only`:
    allocations  integrated gradients with every allocation, repaired and not, at every budget
    criteria     every criterion with measured widths, repaired and not, where little stays
    choices      on dev: every allocation, and the ridge by which modules are fitted while widths are measured of
                 what will be repaired
    further      a further budget from the answers that were kept of another one, beside its own measurement
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

BUDGETS = (0.7, 0.5, 0.3, 0.2)  # of the FLOPs
TIGHT = (0.5, 0.3)  # where criteria are compared
ALLOCATIONS = ("per_layer", "global", "measured")
ALL = ("per_layer", "per_kind", "global", "measured")
EXAMPLES = 64  # calibration rows, of scoring and of measuring
REPAIRED_BY = 256  # rows
DRAWS = 3
ROWS = 300  # of dev and of test, at most
RIDGES = (None, 0.1, 1.0)
OURS = "integrated gradients"
CRITERIA = {
    OURS: jp.criteria.IntegratedGradients(nodes=8),
    "gradient x activation": jp.criteria.GradientActivation(),
    "Wanda": jp.criteria.Wanda(),
    "Taylor": jp.criteria.Taylor(),
    "magnitude": jp.criteria.Magnitude(),
    "random": jp.criteria.Random(),
}
REPAIRS = {"": None, ", repaired": jp.recoveries.Reconstruction()}


def method(name: str, allocation: str, repair: str) -> Method:
    """One way to prune."""
    own = Method(CRITERIA[name], allocation=allocation, examples=EXAMPLES)
    return replace(own, recovery=REPAIRS[repair], recovery_examples=REPAIRED_BY)


def beside(bench: Bench, methods: dict[str, Method], budget: float, draws: int, ours: str) -> dict[str, Any]:
    """Several ways at one budget, on test, and what one of them is ahead of the others with the same repair."""
    whole, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    cells = {name: bench.cells_of(own, bench.able, "test", budget, draws) for name, own in methods.items()}
    claims = {}
    for name, repair in itertools.product(methods, REPAIRS):
        if name.endswith(repair) and (repair or ", repaired" not in name) and name != f"{ours}{repair}":
            claims[f"{ours}{repair} - {name}"] = compare(cells[f"{ours}{repair}"], cells[name], whole, chance)
    return {"rows": {name: summary(own, whole, chance) for name, own in cells.items()}, "claims": claims}


def allocations(bench: Bench) -> dict[str, Any]:
    """Every allocation of the same scores."""
    methods = {f"{how}{repair}": method(OURS, how, repair) for how in ALLOCATIONS for repair in REPAIRS}
    return {str(budget): beside(bench, methods, budget, DRAWS, "measured") for budget in BUDGETS}


def criteria(bench: Bench) -> dict[str, Any]:
    """Every criterion with the widths that are measured for it; one draw."""
    methods = {f"{name}{repair}": method(name, "measured", repair) for name in CRITERIA for repair in REPAIRS}
    return {str(budget): beside(bench, methods, budget, 1, OURS) for budget in TIGHT}


def choices(bench: Bench) -> dict[str, Any]:
    """What becomes the default: every allocation, measured widths with modules fitted or not; on dev, one draw."""
    whole, chance = bench.dense(bench.able, "dev"), bench.chances(bench.able, "dev")
    ways = {f"{how}{repair}": method(OURS, how, repair) for how in ALL for repair in REPAIRS}
    fitted = ways.pop("measured, repaired")
    ways |= {f"measured, repaired, ridge {ridge}": replace(fitted, fitted=ridge) for ridge in RIDGES}
    found = {
        str(budget): {
            name: retained(bench.cells_of(own, bench.able, "dev", budget, 1), whole, chance)
            for name, own in ways.items()
        }
        for budget in (0.3, 0.2)
    }
    return {"split": "dev", "retained": found}


def further(bench: Bench) -> dict[str, Any]:
    """Budgets after half, from what was measured for half; one draw, unrepaired."""
    whole, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    own = method(OURS, "measured", "")
    return {
        str(budget): {
            name: summary(bench.cells_of(how, bench.able, "test", budget, 1), whole, chance)
            for name, how in {"its own": own, "that of half": replace(own, known_at=0.5)}.items()
        }
        for budget in BUDGETS
        if budget != 0.5
    }


def main() -> None:
    """Runs what is asked for."""
    parts: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "choices": choices,
        "allocations": allocations,
        "criteria": criteria,
        "further": further,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with heads, or text to text")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of each split, at most ({ROWS})")
    arguments, chosen = asked(parser, parts)
    names: Sequence[str] = arguments.tasks.split(",")
    bench = Bench(arguments.model, arguments.data, arguments.work, arguments.rows, tuple(names))
    found = begun(parser, arguments.output, bench.digest)
    facts = {
        "command": "python benchmarks/allocation.py --model MODEL --data DATA --work WORK --tasks TASKS -o OUTPUT",
        "model": bench.digest,
        "tasks": bench.able,
        "examples": EXAMPLES,
        "repaired_by": REPAIRED_BY,
        "draws": DRAWS,
        "at_most_rows": arguments.rows,
    }
    for part in each(chosen):
        keep(arguments.output, found, part, parts[part](bench), facts)


if __name__ == "__main__":
    main()

"""Accuracy kept by closed-form recovery: criteria x recovery x budgets, beside re-implemented Kwon et al. and K-prune.

    python benchmarks/recovery.py --model MODEL --data DATA --work WORK -o benchmarks/results/recovery.json

Every scoring run and every tested model is kept in `WORK`; an interrupted run resumes. Choices are made on
dev, all other figures are those of test; the rules are in `evidence.py`. Recovery reads no labels.

Parts, for `--only`:
    choice     on dev: which method of recovery, and with how many examples
    rivals     on dev: the weight of K-prune's representational knowledge, which its rows do not carry over
    claims     on test: several draws at 0.7, 0.5 and 0.3 of the FLOPs, and their intervals
    budgets    on test: criteria with and without recovery, and the rivals, from 0.8 to 0.2 of the FLOPs
    floor      on test: the smallest budget with a head kept in every attention
    cost       seconds of scoring, of recovery and of the rivals, in turns
    memory     what recovery takes of the host's memory, each in a process of its own
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench import Bench, Method
from evidence import Cell, compare, summary
from parts import asked, begun, each, keep
from rivals import k_prune, kwon

import jaxprune as jp
from jaxprune.data.tasks import draw
from jaxprune.models.cost import memory as memory_of

TASKS = ("sst2", "ag_news", "mrpc", "qnli", "trec", "banking77", "snips")
BUDGETS = (0.8, 0.7, 0.5, 0.3, 0.2)  # of the FLOPs
CLAIMED = (0.7, 0.5, 0.3)
CHOSEN_AT = (0.5, 0.3)
ROWS = 300  # of dev and of test, at most
EXAMPLES = 256  # without labels, to recover with
DRAWS = 2
CONTESTED = 0.3  # where a rival's setting is chosen
RIVAL_BUDGETS = (CONTESTED,)  # each of their models takes minutes
SWEPT = ("sst2", "trec")  # tasks on which a rival's setting is chosen
COMPARED = ("integrated gradients", "Wanda", "Wanda + recovery")  # in the claims, beside ours and the rivals
REPRESENTATIONAL = (2.5e-4, 2.5e-2, 2.5)  # the first is published, for other rows and another model
RECOVERY = jp.recoveries.Reconstruction()
CHOICES: dict[str, dict[str, Any]] = {
    "none": {},
    "bias": {"recovery": jp.recoveries.BiasCompensation()},
    "rescale": {"recovery": jp.recoveries.Rescaling()},
    "reconstruct": {"recovery": RECOVERY},
    "reconstruct, 64 examples": {"recovery": RECOVERY, "recovery_examples": 64},
}
CRITERIA = {
    "integrated gradients": Method(jp.criteria.IntegratedGradients()),
    "Wanda": Method(jp.criteria.Wanda()),
    "magnitude": Method(jp.criteria.Magnitude()),
}
OURS = "integrated gradients + recovery"
KWON, K_PRUNE = "Kwon et al., re-implemented", "K-prune, re-implemented"


def choice(bench: Bench, record: Mapping[str, Any]) -> dict[str, Any]:
    """The methods of recovery, on dev, for the default criterion."""
    dense, chance = bench.dense(bench.able, "dev"), bench.chances(bench.able, "dev")
    base, rows = CRITERIA["integrated gradients"], {}
    for name, how in CHOICES.items():
        if name == "bias" and bench.model.answers_in_text:
            continue  # T5 has no biases
        rows[name] = {
            str(budget): summary(bench.cells_of(replace(base, **how), bench.able, "dev", budget, 1), dense, chance)
            for budget in CHOSEN_AT
        }
    return {"rows": rows, "split": "dev", "draws": 1}


def rivals(bench: Bench, record: Mapping[str, Any]) -> dict[str, Any]:
    """The setting of K-prune that this model asks for, on dev, where other choices are made, too."""
    tasks = [task for task in bench.able if task in SWEPT]
    dense, chance = bench.dense(tasks, "dev"), bench.chances(tasks, "dev")
    rows = {
        f"{weight:g}": summary(bench.cells_of(_k_prune(weight), tasks, "dev", CONTESTED, 1), dense, chance)
        for weight in REPRESENTATIONAL
    }
    best = max(REPRESENTATIONAL, key=lambda weight: rows[f"{weight:g}"]["retained"])
    return {"rows": rows, "best": best, "split": "dev", "draws": 1, "budget": CONTESTED}


def _k_prune(weight: float) -> Method:
    return Method(rival=partial(k_prune, representational=weight), examples=EXAMPLES)


def methods(bench: Bench, record: Mapping[str, Any]) -> dict[str, Method]:
    """The methods compared: every criterion as it is and repaired, and the rivals, which are for encoders.

    The rivals read as many rows as recovery does, Kwon et al. their labels, too.
    """
    plain = {name: CRITERIA[name] for name in record["criteria"]}
    repaired = {f"{name} + recovery": replace(own, recovery=RECOVERY) for name, own in plain.items()}
    if bench.model.answers_in_text:
        return plain | repaired
    weight = record["rivals"]["best"] if "rivals" in record else REPRESENTATIONAL[0]
    return plain | repaired | {KWON: Method(rival=kwon, examples=EXAMPLES), K_PRUNE: _k_prune(weight)}


def budgets(bench: Bench, record: Mapping[str, Any]) -> dict[str, Any]:
    """All criteria at all budgets, as they are and repaired; the rivals where they are contested."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    rows = {
        name: {
            str(b): summary(bench.cells_of(own, bench.able, "test", b, 1), dense, chance)
            for b in BUDGETS
            if own.rival is None or b in RIVAL_BUDGETS
        }
        for name, own in methods(bench, record).items()
    }
    return {"rows": rows, "draws": 1}


def floor(bench: Bench, record: Mapping[str, Any]) -> dict[str, Any]:
    """The effect of keeping a head in every attention where an equal share would leave some without one."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    kept = {
        f"{name}{', a head kept' if least else ''}": replace(own, floor=least)
        for name, own in methods(bench, record).items()
        if own.recovery is not None and name.startswith("integrated gradients")
        for least in (None, 1)
    }
    rows = {
        name: summary(bench.cells_of(own, bench.able, "test", BUDGETS[-1], 1), dense, chance)
        for name, own in kept.items()
    }
    return {"rows": rows, "budget": BUDGETS[-1], "draws": 1}


def claims(bench: Bench, record: Mapping[str, Any]) -> dict[str, Any]:
    """The gain of recovery, and the loss relative to the dense model, with intervals."""
    dense, chance = bench.dense(bench.able, "test"), bench.chances(bench.able, "test")
    whole = {task: [cell] for task, cell in dense.items()}
    named = (*COMPARED, OURS, KWON, K_PRUNE)
    compared = {name: own for name, own in methods(bench, record).items() if name in named}
    found: dict[str, Any] = {}
    for budget in CLAIMED:
        cells: dict[str, Mapping[str, Sequence[Cell]]] = {
            name: bench.cells_of(own, bench.able, "test", budget, DRAWS)
            for name, own in compared.items()
            if own.rival is None or budget in RIVAL_BUDGETS
        }
        best = cells[OURS]
        found[str(budget)] = {
            "rows": {name: summary(own, dense, chance) for name, own in cells.items()},
            "dense_minus_this": {name: compare(whole, own, dense, chance) for name, own in cells.items()},
            "claims": {
                f"{OURS} - {name}": compare(best, own, dense, chance) for name, own in cells.items() if own is not best
            },
        }
    return {"budgets": found, "draws": DRAWS}


def cost(bench: Bench, record: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds for one task, in turns, without the round that compiles."""
    task, count, rounds = bench.task(bench.able[0]), 512, 2
    count = min(count, len(task.rows("calibration")))
    rows = draw(task, count, 0)
    scores = bench.scores(task.name, jp.criteria.IntegratedGradients(), 128, 0)
    gates = jp.select(bench.model, bench.params, scores, jp.budgets.Flops(0.5, length=bench.length(task.name)))
    small = jp.compact(bench.model, bench.params, gates, scores.means)
    twenty = jp.criteria.IntegratedGradients(nodes=20)
    fitted = jp.Rows(examples=rows)
    work: dict[str, Callable[[], Any]] = {
        "scoring, 20 nodes": lambda: (
            jp.score(bench.model, bench.params, task, jp.Scoring(criterion=twenty, rows=fitted)).values
        ),
        "reconstruct": lambda: jp.recover(bench.model, bench.params, small, task, jp.Recovery(rows=fitted))[0],
        "rescale": lambda: jp.recover(
            bench.model, bench.params, small, task, jp.Recovery(method=jp.recoveries.Rescaling(), rows=fitted)
        )[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, run in work.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    unit = seconds["scoring, 20 nodes"]
    return {
        "task": task.name,
        "examples": count,
        "rounds": rounds,
        "rows": {
            name: {"seconds": float(np.median(own)), "of_scoring": float(np.median(np.divide(own, unit)))}
            for name, own in seconds.items()
        },
    }


def memory(bench: Bench, record: Mapping[str, Any]) -> dict[str, Any]:
    """The peak of a process above what it had before: of scoring and of recovery, with few examples and with many."""
    name, rows = bench.able[0], {}
    for count in (128, 512):
        for what in ("scoring", "reconstruct"):
            asked = (bench.source, bench.data, name, min(count, len(bench.task(name).rows("calibration"))), what)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows[f"{what}, {asked[3]} examples"] = pool.submit(_peak, *asked).result()
    return {"task": name, "rows": rows, "parameters": memory_of(bench.params)}


def _peak(source: Path, data: Path, name: str, count: int, what: str) -> int:
    """Bytes that a process took at most, above what it had with the dense and the pruned model in memory."""
    model, params = jp.load(source)
    task = jp.load_task(name, data=data)
    rows = draw(task, count, 0)
    scores = jp.score(
        model, params, task, jp.Scoring(criterion=jp.criteria.Magnitude(), rows=jp.Rows(examples=rows[:8]))
    )
    small = jp.compact(model, params, jp.select(model, params, scores, jp.budgets.Flops(0.5)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "scoring":
        jax.block_until_ready(
            jp.score(
                model,
                params,
                task,
                jp.Scoring(criterion=jp.criteria.IntegratedGradients(), rows=jp.Rows(examples=rows)),
            ).values
        )
    else:
        jax.block_until_ready(jp.recover(model, params, small, task, jp.Recovery(rows=jp.Rows(examples=rows)))[0])
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


PARTS: dict[str, Callable[[Bench, Mapping[str, Any]], dict[str, Any]]] = {
    "choice": choice,
    "rivals": rivals,
    "claims": claims,
    "budgets": budgets,
    "floor": floor,
    "cost": cost,
    "memory": memory,
}


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model that does all the tasks")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--tasks", default=",".join(TASKS), help="the tasks, by commas")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of dev and test of each task, at most")
    parser.add_argument("--criteria", default=",".join(CRITERIA), help="those of `budgets` and `claims`, by commas")
    arguments, chosen = asked(parser, PARTS)
    if wrong := sorted(set(arguments.criteria.split(",")) - set(CRITERIA)):
        parser.error(f"--criteria knows {', '.join(CRITERIA)}, not {', '.join(wrong)}")
    warnings.filterwarnings("ignore", message=".*more inputs than there are tokens")
    bench = Bench(arguments.model, arguments.data, arguments.work, arguments.rows, tuple(arguments.tasks.split(",")))
    found = begun(parser, arguments.output, bench.digest) | {"criteria": arguments.criteria.split(",")}
    for name in each(chosen):
        own = PARTS[name](bench, found) | {"at_most_rows": bench.rows}
        facts = {
            "command": "python benchmarks/recovery.py --model MODEL --data DATA --work WORK -o OUTPUT "
            f"--rows {bench.rows} --criteria '{arguments.criteria}'",
            "model": bench.digest,
            "models": 1,
            "tasks": bench.able,
            "recovery_examples": EXAMPLES,
        }
        keep(arguments.output, found, name, own, facts)


if __name__ == "__main__":
    main()

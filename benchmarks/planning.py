"""The time that `jaxprune plan` takes to show what a budget would leave, from the start of the process.

    python benchmarks/planning.py -o benchmarks/results/planning.json

The model has the size of BERT-base and random weights; their values do not matter here. Budgets of all kinds are
asked for one after the other, round by round. Beside the clock stand the seconds of the processor: where others use the
machine, they are what a plan itself takes. *First* is a plan with nothing remembered of the model, so that all weights
are read.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from parts import asked, keep
from speed import SIZES, random_model
from timing import spread

import jaxprune as jp
from jaxprune.checkpoints import files as stamps
from jaxprune.checkpoints.folder import load

BUDGETS = (
    ("--flops", "0.5"),
    ("--parameters", "0.7", "--allocation=global"),
    ("--memory", "200MB"),
    ("--units", "0.3"),
)
FIRST = "first"  # the budget of FLOPs, with nothing remembered


def prepare(folder: Path) -> tuple[Path, Path]:
    """Writes the model and scores of it."""
    model, params = random_model(SIZES["bert-base"])
    where = jp.save(folder / "model", replace(model, source=jp.bundled_model()), params)
    tasks = jp.load_task("sst2", data=jp.bundled_data())
    criterion = jp.criteria.GradientActivation(objective=jp.objectives.probability)
    scores = jp.score(*load(where), tasks, jp.Scoring(criterion=criterion, rows=jp.Rows(examples=8), head="task"))
    return where, jp.save_scores(folder / "scores", scores)


def plan(model: Path, scores: Path, budget: tuple[str, ...], cache: Path) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    command = [Path(sys.executable).with_name("jaxprune"), "plan", model, "--scores", scores, *budget]
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, used


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """All budgets in turns; the first round is not counted."""
    model, scores = prepare(folder)
    time.sleep(stamps.SETTLED + 1)  # files that were written just now are not remembered
    cache, found = folder / "cache", {name: [] for name in (FIRST, *map(" ".join, BUDGETS))}
    for turn in range(repeats + 1):
        shutil.rmtree(cache, ignore_errors=True)
        for name, budget in zip(found, (BUDGETS[0], *BUDGETS), strict=True):
            seconds = plan(model, scores, budget, cache)
            print(f"  {name}: {seconds[0]:.2f} s, of the processor {seconds[1]:.2f} s", file=sys.stderr, flush=True)
            if turn:
                found[name].append(seconds)
    return {
        name: {
            what: spread(own) | {"most": float(own.max())}
            for what, own in zip(("clock", "processor"), np.array(seconds).T, strict=True)
        }
        for name, seconds in found.items()
    }


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are counted")
    arguments, _ = asked(parser, ["plans"])
    with tempfile.TemporaryDirectory() as place:
        own = {"rows": measure(Path(place), arguments.repeats), "repeats": arguments.repeats}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    keep(arguments.output, {}, "plans", own, {"cores": cores})


if __name__ == "__main__":
    main()

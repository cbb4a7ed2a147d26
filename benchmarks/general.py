"""A decoder pruned on general text: WikiText-2's perplexity and seven zero-shot tasks, beside every baseline.

    python benchmarks/general.py --model smollm2 --data DATA --work WORK -o benchmarks/results/general.json

Scored, and repaired, on windows of C4 and Wikipedia, never on WikiText. Units and allocation of every criterion are
those with the smallest perplexity on a part of that text that is kept apart (`choices`). Perplexity is that of whole
windows of the test text, one after the other; tasks are asked in lm-evaluation-harness's forms, without examples, and
count as it does (`acc` or `acc_norm`). Everything that is measured is kept in `WORK`; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench import Method
from decoders import CRITERIA, KINDS
from parts import asked, begun, each, keep
from rivals import Fluctuation, standardised

import jaxprune as jp
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.scoring.scores import Scores, describe
from jaxprune.units import Intervention

TEXT, SOURCES = "wikitext2_raw", ("calib_c4", "calib_wikipedia")
TASKS = {
    "boolq": "accuracy",
    "piqa": "accuracy_norm",
    "hellaswag": "accuracy_norm",
    "winogrande": "accuracy",
    "arc_easy": "accuracy",
    "arc_challenge": "accuracy_norm",
    "openbookqa": "accuracy_norm",
}
BUDGETS = (0.9, 0.8, 0.7)
CHOSEN_AT = 0.8
WINDOW = 512  # tokens
WINDOWS = {"score": 64, "dev": 16, "test": 128, "repair": 128}
ROWS = 100  # of every task
FLAP = "FLAP"
EVERY = CRITERIA | {FLAP: Fluctuation()}
UNUSED = ("Fisher", "activation", "integrated gradients")  # the table of one task has them
PARTS = ("dense", "choices", "budgets", "repaired")


class General:
    """The model, its texts and tasks, and what is kept of the work done."""

    def __init__(self, arguments: argparse.Namespace):
        jax.config.update("jax_default_matmul_precision", arguments.precision)
        self.model, self.params = jp.load(arguments.model)
        self.digest = model_digest(self.model, self.params)
        self.data, self.work, self.rows = arguments.data, arguments.work, arguments.rows
        self.settings = [self.digest, arguments.precision, WINDOW, *WINDOWS.values(), self.rows]
        self.work.mkdir(parents=True, exist_ok=True)
        self.file, self.begun = self.work / "general.jsonl", time.monotonic()
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.cells: dict[str, Any] = dict(json.loads(line) for line in lines if line.endswith("]"))

    def kept(self, what: Sequence[Any], measure: Callable[[], Any]) -> Any:
        """What was measured before under this name, or is now."""
        key = json.dumps([*self.settings, *what])
        if key not in self.cells:
            self.cells[key] = measure()
            with self.file.open("a") as stream:
                stream.write(json.dumps([key, self.cells[key]]) + "\n")
            print(f"{time.monotonic() - self.begun:.0f} s: {what[0]} {what[-1]}", file=sys.stderr, flush=True)
        return self.cells[key]

    @cached_property
    def text(self) -> jp.Task:
        """The text to calibrate with, a tenth of its passages kept apart as dev."""
        folder = self.work / "general"
        folder.mkdir(exist_ok=True)
        split: dict[str, list[str]] = {"calibration": [], "validation": []}
        for source in SOURCES:
            with gzip.open(self.data / source / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
                for text in (json.loads(line)["text"] for line in lines):
                    apart = hashlib.sha256(text.encode()).digest()[0] < 256 // 10
                    split["validation" if apart else "calibration"].append(text)
        for name, texts in (*split.items(), ("test", split["validation"][:1])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return jp.windows(self.model, jp.load_task(folder), tokens=WINDOW)

    @cached_property
    def tasks(self) -> dict[str, jp.Task]:
        """The text whose perplexity counts, and the tasks."""
        named = {
            name: jp.load_task(self.data / name) for name in (TEXT, *TASKS)
        }  # paths: BoolQ is built in in another form
        return named | {TEXT: jp.windows(self.model, named[TEXT], tokens=WINDOW)}

    def scores(self, criterion: Any) -> Scores:
        """Scores on the text, made once."""
        own = json.dumps([*self.settings, describe(criterion)], sort_keys=True)
        path = self.work / "general" / f"{hashlib.sha256(own.encode()).hexdigest()[:24]}.safetensors"
        if not path.exists():
            rows = jp.Rows(examples=WINDOWS["score"], batch_size=8)
            jp.save_scores(
                path, jp.score(self.model, self.params, self.text, jp.Scoring(criterion=criterion, rows=rows))
            )
        return jp.load_scores(path)

    def pruned(self, method: Method, budget: float) -> tuple[Any, Intervention, float, float]:
        """Parameters, what closes their units, and the shares of all and of the prunable parameters that are gone."""
        scores = self.scores(method.criterion)
        limit = jp.budgets.Flops(budget, length=WINDOW)
        gates = jp.select(self.model, self.params, scores, limit, rules=method.rules)
        small = jp.compact(self.model, self.params, gates)  # a bias for means to go into is not there
        whole, left = (sum(leaf.size for leaf in jax.tree.leaves(own)) for own in (self.params, small))
        costs = jp.budgets.Parameters(0.5).unit_costs(self.model, self.params)
        prunable = sum(costs[name] * len(gate) for name, gate in gates.items())
        shares = (whole - left) / whole, (whole - left) / prunable
        if method.recovery is None:
            return self.params, Intervention(gates, scores.means), *shares
        rows = jp.Rows(examples=WINDOWS["repair"], batch_size=8)
        small, _ = jp.recover(self.model, self.params, small, self.text, jp.Recovery(method=method.recovery, rows=rows))
        return small, Intervention(), *shares

    def perplexity(self, task: jp.Task, split: str, params: Any, intervention: Intervention) -> float:
        """Of the first windows of a text."""
        rows = jp.Rows(examples=task.rows(split)[: WINDOWS[split]], split=split, batch_size=8)
        found = jp.evaluate(self.model, params, task, rows=rows, intervention=intervention)
        return float(found.metrics["perplexity"])

    def measured(self, what: Sequence[Any], make: Callable[[], tuple[Any, ...]]) -> dict[str, Any]:
        """The perplexity and the accuracy of every task."""

        def measure() -> dict[str, Any]:
            params, intervention, *shares = make()
            found: dict[str, Any] = {"perplexity": self.perplexity(self.tasks[TEXT], "test", params, intervention)}
            for name, metric in TASKS.items():
                rows = jp.Rows(examples=self.rows, batch_size=16)
                own = jp.evaluate(self.model, params, self.tasks[name], rows=rows, intervention=intervention)
                found[name] = {"accuracy": float(own.metrics[metric]), "chance": own.chance, "n": own.n}
            accuracies = [found[name]["accuracy"] for name in TASKS]
            error = math.sqrt(sum(a * (1 - a) / found[t]["n"] for t, a in zip(TASKS, accuracies, strict=True)))
            removed = dict(zip(("removed_of_all", "removed_of_prunable"), shares, strict=True))
            return found | {"mean": float(np.mean(accuracies)), "standard_error": error / len(TASKS)} | removed

        return self.kept(what, measure)

    def tried(self, name: str) -> dict[str, float]:
        """The perplexity on dev by units and allocation."""
        criterion, found = EVERY[name], {}
        for units, kinds in KINDS.items():
            by_layer = criterion.by_layer and name != FLAP  # which has a way of its own
            for allocation in ("per_layer", "per_kind", "global") if by_layer else ("global",):
                normalise = standardised if name == FLAP else None
                method = Method(replace(criterion, kinds=kinds), allocation=allocation, normalise=normalise)

                def measure(method: Method = method) -> float:
                    params, intervention, *_ = self.pruned(method, CHOSEN_AT)
                    return self.perplexity(self.text, "dev", params, intervention)

                what = ("choices", describe(method.criterion), allocation, f"{name}, {units}, {allocation}")
                found[f"{units}, {allocation}"] = (self.kept(what, measure), method)
        self.ways[name] = min(found.values(), key=lambda own: own[0])[1]
        return {how: own for how, (own, _) in found.items()}

    @cached_property
    def ways(self) -> dict[str, Method]:
        """The best way to use every criterion, filled by `tried`."""
        return {}

    def beside(self, recovery: Any = None) -> dict[str, Any]:
        """All criteria at all budgets."""
        found = {}
        for budget in BUDGETS:
            rows = found[str(budget)] = {}
            for name in names():
                if name not in self.ways:
                    self.tried(name)
                method = replace(self.ways[name], recovery=recovery)
                own = [describe(method.criterion), method.allocation, None if recovery is None else describe(recovery)]
                what = ("budgets", *own, f"{name}, {budget}")
                rows[name] = self.measured(what, lambda method=method, budget=budget: self.pruned(method, budget))
        return {"rows": found}


def names() -> list[str]:
    """The criteria that are compared."""
    return [name for name in EVERY if name not in UNUSED]


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder or GGUF of a decoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of every task, at most ({ROWS})")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    arguments, chosen = asked(parser, PARTS)
    general = General(arguments)
    found = begun(parser, arguments.output, general.digest)
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "dense": lambda: general.measured(["dense"], lambda: (general.params, Intervention(), 0.0, 0.0)),
        "choices": lambda: {"budget": CHOSEN_AT, "perplexity": {name: general.tried(name) for name in names()}},
        "budgets": general.beside,
        "repaired": lambda: general.beside(jp.recoveries.Reconstruction()),
    }
    facts = {
        "command": "python benchmarks/general.py --model MODEL --data DATA --work WORK -o OUTPUT",
        "model": general.digest,
        "precision": arguments.precision,
        "windows": {"tokens": WINDOW, **WINDOWS},
        "calibrated_on": SOURCES,
    }
    for name in each(chosen):
        keep(arguments.output, found, name, run[name](), facts)


if __name__ == "__main__":
    main()

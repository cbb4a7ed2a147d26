"""Models pruned in many ways and tested on many tasks, with every scoring run and every tested model kept on disk."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from evidence import Cell, summary

import jaxprune as jp
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.data.batches import encode
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import draw
from jaxprune.evaluation.evaluate import calibrate, fitting_head, predict
from jaxprune.models.cost import Length
from jaxprune.pruning.allocation import Measuring, allocate
from jaxprune.pruning.prune import RIDGE
from jaxprune.scoring.scores import Scores, describe
from jaxprune.units import Intervention, lengths, resize

EXAMPLES = 128  # calibration rows


# (model, params, task, *, rows, flops, length) -> smaller parameters
Rival: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """A way to choose units, and to repair what is left."""

    criterion: Any = None  # None: a rival has its own
    allocation: str = "per_layer"
    normalise: Callable[..., Any] | None = None
    floor: int | None = None  # heads that every attention keeps at least
    examples: int = EXAMPLES
    recovery: Any = None  # how what is left is repaired; None: it stays as it is
    recovery_examples: int = 256
    fitted: float | None = RIDGE  # the ridge of the modules while widths are measured of what will be repaired
    known_at: float | None = None  # the budget that the effects of measured widths are taken from
    rival: Rival | None = None  # prunes and repairs in its own way: then only `examples` counts

    @property
    def draws(self) -> bool:
        """Whether the seed changes anything."""
        free = (self.rival, self.recovery) == (None, None)
        return not free or self.criterion.examples is not None or isinstance(self.criterion, jp.criteria.Random)

    def described(self, source: str | tuple[str, ...], budget: float, seed: int) -> list[Any]:
        """All that a pruned model depends on, for JSON."""
        if self.rival is not None:
            own = self.rival if isinstance(self.rival, partial) else partial(self.rival)
            return [own.func.__name__, *own.keywords.items(), self.examples, source, budget, seed]
        normalise = None if self.normalise is None else self.normalise.__name__
        found = [describe(self.criterion), self.allocation, normalise, self.examples, source, budget, seed]
        found += [] if self.recovery is None else [describe(self.recovery), self.recovery_examples]
        if self.allocation == "measured":
            found.append({"fitted": self.fitted if self.recovery else None, "known_at": self.known_at})
        return found if self.floor is None else [*found, {"floor": self.floor}]

    @property
    def rules(self) -> jp.Rules:
        """The rules of a selection."""
        floor = None if self.floor is None else {"heads": self.floor}
        return jp.Rules(allocation=self.allocation, normalise=self.normalise, floor=floor)


@dataclass
class Bench:
    """The model, its tasks, and what is kept of the work done."""

    source: Path
    data: Path
    work: Path
    rows: int
    names: tuple[str, ...]  # of the tasks
    precision: str = "float32"  # of matrix products
    tasks: dict[str, jp.Task] = field(default_factory=dict)
    encoded: dict[tuple[str, str], Any] = field(default_factory=dict)
    scored: dict[str, Scores] = field(default_factory=dict)
    lengths: dict[str, Length] = field(default_factory=dict)

    def __post_init__(self):
        jax.config.update("jax_default_matmul_precision", self.precision)
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

    @property
    def other(self) -> list[str]:
        """The precision, where it is not the usual one."""
        return [] if self.precision == "float32" else [self.precision]

    def with_rows(self, rows: int) -> Bench:
        """The same with another number of rows to test on."""
        return (
            self
            if rows == self.rows
            else type(self)(self.source, self.data, self.work, rows, self.names, self.precision)
        )

    def task(self, name: str) -> jp.Task:
        """A task, read once."""
        if name not in self.tasks:
            self.tasks[name] = jp.load_task(name, data=self.data)
        return self.tasks[name]

    def ask_as(self, name: str, source: str) -> None:
        """Asks a text-to-text model about a task of another domain in the words of the one it was scored on."""
        if self.model.answers_in_text:
            own = self.task(source)  # its labels, too: another domain may only number them
            self.tasks[name] = replace(self.task(name), labels=own.labels, prompt=prompt_of(self.model, own))

    def rows_of(self, name: str, split: str) -> Any:
        """The tokenised rows to test on: a draw that is always the same."""
        if (name, split) not in self.encoded:
            task = self.task(name)
            rows = task.rows(split)
            self.encoded[name, split] = encode(
                self.model,
                draw(task, self.rows, 0, split=split) if self.rows < len(rows) else rows,
                prompt=prompt_of(self.model, task),
            )
        return self.encoded[name, split]

    def chance(self, name: str, split: str) -> float:
        """The share of the most frequent label."""
        labels = self.rows_of(name, split).labels
        return float(np.bincount(labels).max() / len(labels))

    def scores(self, task: str, criterion: Any, examples: int, seed: int) -> Scores:
        """Scores of a task, made once."""
        settings = json.dumps([self.digest, task, describe(criterion), examples, seed, *self.other], sort_keys=True)
        name = hashlib.sha256(settings.encode()).hexdigest()[:24]
        if name not in self.scored:
            path = self.work / "scores" / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                found = jp.score(
                    self.model,
                    self.params,
                    self.task(task),
                    jp.Scoring(criterion=criterion, rows=jp.Rows(examples=examples, key=seed)),
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
        """The rows of a task that a pruned model gets right; without a method, the dense one.

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
            what = method.described(source, budget, seed)
        key = self.key_of(task, split, head, what)
        if key not in self.cells:
            params, gates, means, kept = self.params, None, None, 1.0
            if method is not None and (method.rival is not None or method.recovery is not None):
                params, kept = self.repaired(method, source, budget, seed)
                params = resize(self.model.axes, params, lengths(self.model.axes, self.params))  # compiled once for all
            elif method is not None:
                first = source if isinstance(source, str) else source[0]
                scores = self.scores(first, method.criterion, method.examples, seed)
                length = self.length(first)
                values = scores if isinstance(source, str) else self.pooled(source, method, seed)
                gates = self.gates(method, first, values, budget, seed)
                small = jp.compact(self.model, self.params, gates, scores.means)
                kept = jp.flops(self.model, small, length) / jp.flops(self.model, self.params, length)
                means = scores.means
                if method.allocation == "per_layer":  # all methods share these widths: they are compiled once
                    params, gates, means = small, None, None
            encoded = self.rows_of(task, split)
            head = fitting_head(self.model, self.task(task), head)
            left = Intervention(gates, means)
            ready = calibrate(self.model, params, self.task(task), encoded, head=head, intervention=left)
            logits = predict(self.model, params, ready, head=head, batch_size=64, intervention=left)
            self.keep_cell(key, Cell(logits.argmax(1) == encoded.labels, kept))
            self.made += 1
            if self.made % 20 == 0:
                print(
                    f"{self.made:,} models tested, {time.monotonic() - self.begun:.0f} s", file=sys.stderr, flush=True
                )
        return self.cells[key]

    def key_of(self, task: str, split: str, head: str | None = None, what: Any = None) -> str:
        """The name of a tested model among the cells; without `what` is pruned, that of the dense one."""
        prompt = self.task(task).prompt
        asked = [] if prompt is None or prompt.calibration == "none" else [prompt.calibration]
        asked += self.other
        return json.dumps([self.digest, self.rows, task, split, head, what, *asked], sort_keys=True)

    def keep_cell(self, key: str, cell: Cell) -> None:
        """Keeps a tested model, on disk too."""
        self.cells[key] = cell
        with self.file.open("a") as stream:
            packed = base64.b64encode(np.packbits(cell.hits).tobytes()).decode()
            stream.write(json.dumps({"key": key, "hits": packed, "n": len(cell.hits), "flops": cell.flops}) + "\n")

    def repaired(self, method: Method, source: str | tuple[str, ...], budget: float, seed: int) -> tuple[Any, float]:
        """Smaller parameters after recovery, or a rival's, and the fraction of the FLOPs that they keep."""
        if not isinstance(source, str):
            raise TypeError(f"recovery is for the scores of one task, not {source}.")
        task, length = self.task(source), self.length(source)
        if method.rival is not None:
            rows = draw(task, min(method.examples, len(task.rows("calibration"))), seed)
            small = method.rival(self.model, self.params, task, rows=rows, flops=budget, length=length)
        else:
            scores = self.scores(source, method.criterion, method.examples, seed)
            gates = self.gates(method, source, scores, budget, seed)
            small = jp.compact(self.model, self.params, gates, scores.means)
            recovery = jp.Recovery(method=method.recovery, rows=jp.Rows(examples=method.recovery_examples, key=seed))
            small, _ = jp.recover(self.model, self.params, small, task, recovery)
        return small, jp.flops(self.model, small, length) / jp.flops(self.model, self.params, length)

    def gates(self, method: Method, source: str, scores: Any, budget: float, seed: int) -> Any:
        """The units that stay."""
        limits = [jp.budgets.Flops(own, length=self.length(source)) for own in (method.known_at, budget) if own]
        if method.allocation != "measured":
            return jp.select(self.model, self.params, scores, limits[-1], rules=method.rules)
        with TemporaryDirectory() as folder:
            measuring = Measuring(
                rows=jp.Rows(examples=min(method.examples, len(self.task(source).rows("calibration"))), key=seed),
                ridge=None if method.recovery is None else method.fitted,
                file=Path(folder) / "answers.safetensors" if method.known_at else None,
            )
            for limit in limits:
                found = allocate(self.model, self.params, self.task(source), scores, limit, measuring)
        return found.gates

    def length(self, task: str) -> Length:
        """Tokens per calibration row: the same for all methods, so that a budget means the same to each."""
        if task not in self.lengths:
            own = self.task(task)
            rows = draw(own, min(EXAMPLES, len(own.rows("calibration"))), 0)
            self.lengths[task] = encode(self.model, rows, prompt=prompt_of(self.model, own)).mean_length
        return self.lengths[task]

    def cells_of(
        self, method: Method, tasks: Iterable[str], split: str, budget: float, draws: int, **more: Any
    ) -> dict[str, list[Cell]]:
        """Cells by task, one per draw; one only where the draw changes nothing."""
        seeds = range(draws if method.draws else 1)
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

    def elsewhere(
        self, pairs: Iterable[tuple[str, str]], methods: Mapping[str, Method], budget: float, draws: int
    ) -> dict[str, Any]:
        """Scored on one task, tested in a domain that neither fine-tuning nor scoring has seen.

        Args:
            pairs: The task and the domain, which has the same labels.
            methods: How to prune; those with more examples than the task has take all of them.
            budget: Fraction of the FLOPs.
            draws: Of the calibration rows.
        """
        found: dict[str, Any] = {}
        for source, domain in pairs:
            self.ask_as(domain, source)
            head = None if self.model.answers_in_text else source
            dense, chance = {domain: self.cell(domain, "test", head=head)}, {domain: self.chance(domain, "test")}
            own: dict[str, Any] = {}
            for name, method in methods.items():
                method = replace(method, examples=min(method.examples, len(self.task(source).rows("calibration"))))
                seen = self.cells_of(method, [domain], "test", budget, draws, scored_on=source, head=head)
                own[name] = summary(seen, dense, chance)["tasks"][domain]
            found[domain] = {
                "scored_on": source,
                "dense": float(dense[domain].hits.mean()),
                "chance": chance[domain],
                "n": len(dense[domain].hits),
                "accuracy": own,
            }
        return found

    @cached_property
    def able(self) -> tuple[str, ...]:
        """The tasks that the dense model does at least 10 points above chance, on dev: the others say nothing."""
        dense, chance = self.dense(self.names, "dev"), self.chances(self.names, "dev")
        return tuple(task for task in self.names if dense[task].hits.mean() - chance[task] >= 0.1)

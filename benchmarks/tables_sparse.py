"""The tables of sparse weights: pruning while distilling beside other orders, and what zeros do to the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pages import percent, points, record, table

METHOD, PLAIN = "prune while distilling", "prune while fine-tuning"
COUNTS = ("kept of the teacher, %", "weights of linear maps", "of all parameters")


MAIN, LONG, FALLING, LONG_FALLING, TASKS, RTE, TASKS_LONG_FALLING = (
    "sparsebert",
    "sparsebert_long",
    "sparsebert_decay",
    "sparsebert_long_decay",
    "sparsebert_tasks",
    "sparsebert_rte",
    "sparsebert_tasks_decay",
)  # the records of sparsebert.py


def setting(name: str = MAIN) -> str:
    """The setting of the figures."""
    found = record(name)
    parts = {name: own for name, own in found.items() if isinstance(own, dict) and "steps" in own}
    steps = sorted({own["steps"] for own in parts.values()})
    commits = dict.fromkeys(own["commit"][:10] for own in parts.values())
    return (
        f"Tasks: {', '.join(found['tasks'])}; {' and '.join(map(str, steps))} steps of {found['batch_size']} rows and "
        f"{found['prunings']} prunings per student; {_teachers(found)}{found['device']}, jax "
        f"{found['versions']['jax']}; commit {', '.join(commits)}.\n"
    )


def _teachers(found: Mapping[str, Any]) -> str:
    steps, falls = found.get("teacher_steps"), "the learning rate falls to 0; " * found.get("decay", False)
    return f"teachers of {steps:,} steps; {falls}" if steps else falls


def rates(name: str = MAIN) -> str:
    """The learning rate of every order, on dev."""
    found = record(name)["rates"]
    tried = sorted({rate for rows in found["rows"].values() for rate in rows}, key=float)
    rows = [
        [order, *(percent(own[rate]["dev"]) if rate in own else "–" for rate in tried), f"{found['best'][order]:g}"]
        for order, own in found["rows"].items()
    ]
    heading = f"{found['task']}, {100 * found['sparsity']:g} % zeros; on dev, %, with a learning rate of"
    return table([heading, *tried, "taken"], rows)


def _cells(own: Mapping[str, Any]) -> list[str]:
    values, kept = sorted(own["values"]), f"{own['not_zero']:,} of {own['linear_maps']:,}"
    spread = f", {len(values)} from {percent(values[0])} to {percent(values[-1])}" if len(values) > 1 else ""
    whole = f"{own['parameters_not_zero'] / 1e6:.2f} of {own['parameters'] / 1e6:.2f} M"
    return [percent(own["value"]) + spread, percent(own["kept"]), kept, whole]


def orders(name: str = MAIN) -> str:
    """The orders of pruning and distilling, by task."""
    rows = []
    for sparsity, found in record(name)["orders"]["sparsities"].items():
        for order, tasks in found["rows"].items():
            for task, own in tasks.items():
                zeros = f"{100 * float(sparsity):g} %"
                rows.append([f"{zeros}, {order}", f"{task}, {own['metric']}", percent(own["teacher"]), *_cells(own)])
    return table(["zeros, order", "task, metric", "teacher, %", "student, %", *COUNTS], rows)


def claims(name: str = MAIN) -> str:
    """The method's advantage in accuracy over the other orders."""
    rows = [
        [f"{100 * float(sparsity):g} %, {METHOD} - {order}", points(own)]
        + [points(found["by_task"][task][order]) if task in found["by_task"] else "–" for task in record(name)["tasks"]]
        for sparsity, found in record(name)["orders"]["sparsities"].items()
        for order, own in found["claims"].items()
    ]
    return table(["zeros, difference, points of accuracy [95 %]", "all", *record(name)["tasks"]], rows)


def sparsities(name: str = MAIN) -> str:
    """The method at several sparsities."""
    found = record(name)["sparsities"]
    first = next(iter(found["rows"].values()))
    heading = [f"zeros; {found['task']}, teacher {percent(first['teacher'])} %", "student, %", *COUNTS]
    return table(heading, [[f"{100 * float(s):g} %", *_cells(own)] for s, own in found["rows"].items()])


def variants(name: str = MAIN) -> str:
    """Changes of the method."""
    found = record(name)["variants"]
    first = next(iter(found["rows"].values()))
    where = f"{found['task']}, {100 * found['sparsity']:g} % zeros, {first['metric']}"
    heading = [f"{where}, teacher {percent(first['teacher'])} %", "student, %", *COUNTS]
    return table(heading, [[name, *_cells(own)] for name, own in found["rows"].items()])


def sizes(name: str = MAIN) -> str:
    """The remaining FLOPs and file sizes."""
    rows = []
    found = record(name)["sizes"]["rows"]
    for sparsity, own in found.items():
        share = f"{own['flops_not_zero'] / 1e6:,.0f} of {own['flops'] / 1e6:,.0f} M"
        stored = [f"{own[way]['file'] / 1e6:.2f} of {own['dense']['file'] / 1e6:.2f} MB" for way in ("exact", "int8")]
        rows.append([f"{100 * float(sparsity):g} %", share, *stored])
    length = next(iter(found.values()))["length"]
    heading = ["file packed, exact", "int8"]
    return table(["zeros", f"FLOPs of {length} tokens by weights that are not zero", *heading], rows)


def cost(name: str = MAIN) -> str:
    """The time that pruning adds to a step."""
    found = record(name)["cost"]
    ratio = found["ratio"]
    rows, tokens = found["batch"]
    times = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratio)
    return (
        f"A step of {rows} x {tokens} tokens takes {times} times as long with pruning as without, one pruning in "
        f"{found['steps_per_turn']} steps, {found['turns']} turns.\n"
    )


def compute() -> str:
    """The speed of sparse products relative to dense ones."""
    found = record("sparse_compute")["rows"]
    names = list(dict.fromkeys(name for row in found for name in row["ways"] if name != "dense"))
    rows = [
        [
            f"{row['tokens']:,} tokens, {100 * row['sparsity']:g} %",
            f"{1e3 * row['ways']['dense']['seconds']['median']:.2f}",
        ]
        + [_ratio(row["ways"].get(name)) for name in names]
        for row in found
    ]
    return table(["zeros", "dense, ms", *(f"{name}: times as fast" for name in names)], rows)


def _ratio(own: Mapping[str, Any] | None) -> str:
    return "–" if own is None else f"{own['ratio']['median']:.2f}"


def compute_setting() -> str:
    """The setting of the products."""
    found = record("sparse_compute")
    shape, versions = " x ".join(map(str, found["shape"])), found["versions"]
    return (
        f"{shape}, float32, {found['settings']['repeats']} rounds, {found['threads']} threads, {found['device']}, jax "
        f"{versions['jax']}. Commit {found['commit'][:10]}.\n"
    )


def sparse_row(name: str = MAIN) -> list[str]:
    """The headline of pruning while distilling."""
    found = record(name)["sparsities"]
    rows = found["rows"]
    teacher = next(iter(rows.values()))["teacher"]
    values = ", ".join(f"{percent(own['value'])} at {100 * float(s):g} % zeros" for s, own in rows.items())
    if "orders" in record(name):  # the way to beat, where it has most to lose
        compared = record(name)["orders"]["sparsities"]
        most = max(compared, key=float)
        plain = compared[most]["rows"][PLAIN][found["task"]]
        values += f"; pruned while it is fine-tuned {percent(plain['value'])} at {100 * float(most):g} %"
    return [
        f"{found['task']}: a student pruned while it learns from its teacher, {found['steps']} steps only",
        f"teacher {percent(teacher)}, student {values}",
        "`python benchmarks/sparsebert.py …`",
        "[sparsebert](benchmarks/results/sparsebert.json)",
    ]


SPARSE_TABLES: Mapping[str, Callable[[], str]] = {
    "sparsebert-setting": setting,
    "sparsebert-rates": rates,
    "sparsebert-orders": orders,
    "sparsebert-claims": claims,
    "sparsebert-sparsities": sparsities,
    "sparsebert-variants": variants,
    "sparsebert-sizes": sizes,
    "sparsebert-cost": cost,
    "sparsebert-tasks-setting": partial(setting, TASKS),
    "sparsebert-tasks-orders": partial(orders, TASKS),
    "sparsebert-tasks-claims": partial(claims, TASKS),
    "sparsebert-rte-setting": partial(setting, RTE),
    "sparsebert-rte-orders": partial(orders, RTE),
    "sparsebert-rte-claims": partial(claims, RTE),
    "sparsebert-long-setting": partial(setting, LONG),
    "sparsebert-long": partial(sparsities, LONG),
    "sparsebert-falling-setting": partial(setting, FALLING),
    "sparsebert-falling": partial(sparsities, FALLING),
    "sparsebert-both-setting": partial(setting, LONG_FALLING),
    "sparsebert-both": partial(sparsities, LONG_FALLING),
    "sparsebert-both-tasks-setting": partial(setting, TASKS_LONG_FALLING),
    "sparsebert-both-tasks": partial(orders, TASKS_LONG_FALLING),
    "sparse-compute": compute,
    "sparse-compute-setting": compute_setting,
}

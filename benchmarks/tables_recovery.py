"""The tables of recovery: which method, at which budget, and beside whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pages import best_first, percent, points, record, spread, table, within

OURS = "integrated gradients + recovery"
CONTESTED = "0.3"  # where all methods were tested


BERT, TEXT = "recovery", "recovery_text"  # the records of recovery.py


def setting(name: str = BERT) -> str:
    """The setting of the figures."""
    found = record(name)
    parts = {part: own for part, own in found.items() if isinstance(own, dict) and "at_most_rows" in own}
    rows = sorted({own["at_most_rows"] for own in parts.values()})
    commits = dict.fromkeys(own["commit"][:10] for own in parts.values())
    return (
        f"{len(found['tasks'])} tasks ({', '.join(found['tasks'])}), {found['models']} fine-tuned model; at most "
        f"{found['recovery_examples']} examples to recover with and {' and '.join(map(str, rows))} rows to test; "
        f"{found['device']}, jax {found['versions']['jax']}; commit {', '.join(commits)}.\n"
    )


def choice(name: str = BERT) -> str:
    """The methods of recovery, on dev."""
    found = record(name)["choice"]["rows"]
    budgets = list(next(iter(found.values())))
    tasks = list(found["none"][budgets[-1]]["tasks"])
    rows = [
        [how, *(percent(own[b]["retained"]) for b in budgets)]
        + [percent(own[budgets[-1]]["tasks"][task]["accuracy"]) for task in tasks]
        for how, own in found.items()
    ]
    heading = [f"on dev; kept, %, at {float(b):g}" if not i else f"at {float(b):g}" for i, b in enumerate(budgets)]
    return table(["recovery", *heading, *(f"{task}, at {float(budgets[-1]):g}" for task in tasks)], rows)


def rivals(name: str = BERT) -> str:
    """K-prune's weight of what a module adds, on dev."""
    found = record(name)["rivals"]
    tasks = list(next(iter(found["rows"].values()))["tasks"])
    rows = [
        [weight, percent(own["retained"]), *(percent(own["tasks"][task]["accuracy"]) for task in tasks)]
        for weight, own in found["rows"].items()
    ]
    heading = f"weight of representational knowledge; on dev, at {found['budget']:g}"
    return table([heading, "kept, %", *tasks], rows)


def budgets(name: str = BERT) -> str:
    """The primary metric at every budget."""
    found = record(name)["budgets"]["rows"]
    columns = list(found[OURS])
    order = sorted(found, key=lambda method: -found[method][CONTESTED]["retained"])
    rows = [
        [method, *(percent(found[method][b]["retained"]) if b in found[method] else "–" for b in columns)]
        for method in order
    ]
    return table(["kept, %, at this share of the FLOPs", *(f"{float(b):g}" for b in columns)], rows)


def recovery_curves(name: str = BERT) -> tuple[Mapping[str, Any], Sequence[int]]:
    """The curves of what was tested at every budget, the best at the lowest first, and the rows of every task."""
    found = record(name)["budgets"]
    lines = {method: own for method, own in found["rows"].items() if len(own) > 1}
    lowest = min(lines[OURS], key=float)
    order = sorted(lines, key=lambda method: -lines[method][lowest]["retained"])
    return {method: lines[method] for method in order}, [found["at_most_rows"]] * len(record(name)["tasks"])


def accuracy(name: str = BERT) -> str:
    """Accuracy by task at every claimed budget."""
    found = record(name)["claims"]["budgets"]
    tasks = list(next(iter(found.values()))["rows"][OURS]["tasks"])
    rows = [
        [f"{float(b):g}, {name}", percent(own["retained"]), *(spread(own["tasks"][task]) for task in tasks)]
        for b, each in found.items()
        for name, own in best_first(each["rows"])
    ]
    return table(["FLOPs, method", "kept, %", *tasks], rows)


def lost(name: str = BERT) -> str:
    """The loss relative to the dense model."""
    found = record(name)["claims"]["budgets"]
    names = [name for name, _ in best_first(next(reversed(found.values()))["rows"])]
    lost = [own["dense_minus_this"] for own in found.values()]
    rows = [[name, *(within(own[name], 1) if name in own else "–" for own in lost)] for name in names]
    return table(["dense minus this, points [95 %], at", *(f"{float(b):g}" for b in found)], rows)


def claims(name: str = BERT) -> str:
    """The default with recovery against everything else."""
    found = record(name)["claims"]["budgets"]
    differences = [own["claims"] for own in found.values()]
    names = list(dict.fromkeys(name for own in differences for name in own))
    rows = [[name, *(points(own[name]) if name in own else "–" for own in differences)] for name in names]
    return table(["difference, points [95 %], at", *(f"{float(b):g}" for b in found)], rows)


def cost(name: str = BERT) -> str:
    """The cost of recovery."""
    found = record(name)["cost"]
    rows = [[name, f"{own['seconds']:.1f}", f"{own['of_scoring']:.2f}"] for name, own in found["rows"].items()]
    return table([f"{found['examples']} examples of {found['task']}", "seconds", "of scoring"], rows)


def floor(name: str = BERT) -> str:
    """The smallest budget with and without a head in every attention."""
    found = record(name)["floor"]
    tasks = list(next(iter(found["rows"].values()))["tasks"])
    rows = [
        [method, percent(own["retained"]), *(percent(own["tasks"][task]["accuracy"]) for task in tasks)]
        for method, own in found["rows"].items()
    ]
    return table([f"at {found['budget']:g} of the FLOPs", "kept, %", *tasks], rows)


def memory(name: str = BERT) -> str:
    """The memory that recovery takes."""
    found = record(name)["memory"]
    rows = [[what, f"{taken / 1e6:,.0f}"] for what, taken in found["rows"].items()]
    heading = f"{found['task']}; parameters of {found['parameters'] / 1e6:,.0f} MB"
    return table([heading, "peak above that before, MB"], rows)


def _row(name: str, what: str) -> list[str]:
    found = record(name)
    rows = found["claims"]["budgets"][CONTESTED]["rows"]
    kept = ", ".join(f"{method} {percent(own['retained'])}" for method, own in best_first(rows))
    return [
        f"{len(found['tasks'])} tasks of {what}, {100 * float(CONTESTED):g} % of the FLOPs, repaired in closed form "
        "without labels: accuracy above chance that is kept",
        f"{kept} %",
        "`python benchmarks/recovery.py …`",
        f"[{name}](benchmarks/results/{name}.json)",
    ]


def recovery_row() -> list[str]:
    """The headline of the BERT."""
    return _row(BERT, "the BERT")


def text_recovery_row() -> list[str]:
    """The headline of the T5."""
    return _row(TEXT, "the T5")


def spans_setting() -> str:
    """The setting of the figures of spans, and the dense model's metrics."""
    found = record("spans")
    own, dense = found["budgets"], found["dense"]
    tested = "; ".join(
        f"{split}: F1 {each['f1']:.1f}, exact match {each['exact_match']:.1f}"
        for split, each in dense.items()
        if split in ("dev", "test")
    )
    counted = "it counts in means over tasks" if dense["enough"] else "too low to count in means over tasks"
    return (
        f"Dense, {tested}: {counted}. {dense['rows']['train']:,} rows to train, {dense['rows']['test']:,} to test; "
        f"draws: {own['draws']}, of at most {own['scored']} rows to score and {own['recovered']} to recover with; "
        f"{found['device']}, jax {found['versions']['jax']}; commit {own['commit'][:10]}.\n"
    )


def spans() -> str:
    """F1 and exact match of answers as spans at every budget, by draw."""
    found = record("spans")["budgets"]["rows"]
    columns = list(next(iter(found.values())))
    rows = [
        [f"{way}, {title}", *(" and ".join(f"{value:.1f}" for value in own[b][metric]) for b in columns)]
        for metric, title in (("f1", "F1"), ("exact_match", "exact match"))
        for way, own in found.items()
    ]
    return table(["test, %, at this share of the FLOPs", *(f"{float(b):g}" for b in columns)], rows)


RECOVERY_TABLES: Mapping[str, Callable[[], str]] = {
    "recovery-setting": setting,
    "recovery-choice": choice,
    "recovery-rivals": rivals,
    "recovery-budgets": budgets,
    "recovery-lost": lost,
    "recovery-claims": claims,
    "recovery-tasks": accuracy,
    "recovery-cost": cost,
    "recovery-memory": memory,
    "spans-setting": spans_setting,
    "spans": spans,
    "recovery-text-setting": partial(setting, TEXT),
    "recovery-text-choice": partial(choice, TEXT),
    "recovery-text-budgets": partial(budgets, TEXT),
    "recovery-text-floor": partial(floor, TEXT),
    "recovery-text-lost": partial(lost, TEXT),
    "recovery-text-claims": partial(claims, TEXT),
    "recovery-text-tasks": partial(accuracy, TEXT),
}

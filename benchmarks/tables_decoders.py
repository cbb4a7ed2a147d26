"""The tables of decoders: their tasks, the endpoint beside weaker choices, and what scoring and a pruned model cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pages import best_first, elsewhere, percent, points, record, spread, table
from timing import wanted


def decoders() -> dict[str, Any]:
    """The record of decoders.py."""
    return record("decoders")


def setting() -> str:
    """The setting of the figures."""
    found = decoders()
    parts = {name: own for name, own in found.items() if isinstance(own, dict) and "commit" in own}
    commits = dict.fromkeys(own["commit"][:10] for own in parts.values())
    used = [task for task, own in found["dense"]["rows"].items() if own["used"]]
    return (
        f"{len(used)} tasks ({', '.join(used)}), {found['examples']} calibration examples, {found['draws']} draws, "
        f"at most {found['at_most_rows']} rows of each split, {found['precision']} products; "
        f"{found['device']}, jax {found['versions']['jax']}; "
        f"commit {', '.join(commits)}.\n"
    )


def dense() -> str:
    """The model as it is."""
    rows = [
        [task, str(own["n"]), percent(own["chance"]), percent(own["accuracy"]), own["calibration"]]
        for task, own in decoders()["dense"]["rows"].items()
    ]
    return table(["task", "rows", "chance, %", "accuracy, %", "calibration chosen on dev"], rows)


def choices() -> str:
    """What is kept on dev by units and allocation."""
    found = decoders()["choices"]["retained"]
    ways = list(next(iter(found.values())))
    rows = [[name, *(percent(own[way]) for way in ways)] for name, own in found.items()]
    return table(["accuracy above chance kept, dev, %", *ways], rows)


def endpoint() -> str:
    """Attribution beside weaker choices, without repair."""
    return _beside("endpoint")


def half() -> str:
    """The same at half, repaired."""
    return _beside("half")


def baselines() -> str:
    """All criteria at the endpoint."""
    return _beside("baselines")


def labels() -> str:
    """Without labels, at the endpoint."""
    return _beside("labels")


def unseen() -> str:
    """In domains that no row to score with came from."""
    return elsewhere(decoders()["unseen"]["rows"])


def matrix() -> str:
    """Scored on a task, tested on another."""
    found = decoders()["matrix"]
    rows = [[a, *map(percent, own.values())] for a, own in found["retained"].items()]
    heading = [f"{100 * found['budget']:.0f} % of the FLOPs; scored on ↓, tested on →; kept, %"]
    own = f"\nOwn minus other tasks' scores: {points(found['own_minus_other'])}.\n"
    return table([*heading, *found["retained"]], rows) + own


def _beside(part: str) -> str:
    found = decoders()[part]
    ours = next(name.partition(" - ")[0] for name in found["claims"])
    rows = [
        [
            name,
            percent(own["retained"]),
            percent(own["accuracy"]),
            percent(own["flops"]),
            "" if name == ours else points(found["claims"][f"{ours} - {name}"]),
        ]
        for name, own in best_first(found["rows"])
    ]
    heading = [
        f"{100 * found['budget']:.0f} % of the layers' FLOPs",
        "accuracy above chance kept, %",
        "mean accuracy, %",
    ]
    return table([*heading, "FLOPs kept, %", f"{ours} is ahead by, points [95 %]"], rows)


def tasks() -> str:
    """Accuracy by task at the endpoint."""
    found = decoders()
    best = [name for name, _ in best_first(found["endpoint"]["rows"])]
    rows = [
        [task, percent(own["chance"]), percent(own["accuracy"])]
        + [spread(found["endpoint"]["rows"][name]["tasks"][task]) for name in best]
        for task, own in found["dense"]["rows"].items()
        if own["used"]
    ]
    return table(["accuracy, %", "chance", "dense", *best], rows)


def costs() -> str:
    """What scoring and a pruned model cost."""
    found, rows = record("decoder_costs"), []

    def add(name: str, ratio: Mapping[str, Any]) -> None:
        low, high = ratio.get("quartiles", (None, None))
        between = "" if low is None else f" [{low:.2f}, {high:.2f}]"
        rows.append([name, f"{ratio['median']:.2f}{between}", wanted(ratio)])

    add("scoring 64 rows of 32 tokens / a forward pass", found["score"]["ratios"]["scoring / forward"])
    layers = list(found["compile"]["layers"])
    add(f"seconds of compilation, {layers[1]} layers / {layers[0]}", found["compile"]["deep / shallow"])
    add("peak memory of scoring 16 x 64 tokens / weights", found["memory"]["peak / weights"])
    for name, ratio in found["prefill"]["ratios"].items():
        add(f"prefill, 8 x 128 tokens, dense / {name}", ratio)
    for batch, own in found["decode"].items():
        for name, ratio in own.get("ratios", {}).items() if isinstance(own, dict) else ():
            add(f"decoding, batch {batch}, dense / {name}", ratio)
    return table(["ratio", "median [quartiles]", "asked for"], rows)


def decoder_row() -> list[str]:
    """The line of the README."""
    found = decoders()["endpoint"]
    kept = ", ".join(f"{name} {percent(own['retained'])}" for name, own in best_first(found["rows"]))
    used = sum(own["used"] for own in decoders()["dense"]["rows"].values())
    return [
        f"{used} tasks of SmolLM2-135M-Instruct, 80 % of the layers' FLOPs, 64 rows, no training and no repair: "
        "accuracy above chance that is kept",
        f"{kept} %",
        "`python benchmarks/decoders.py …`",
        "[decoders](benchmarks/results/decoders.json)",
    ]


DECODER_TABLES: Mapping[str, Callable[[], str]] = {
    "decoders-setting": setting,
    "decoders-dense": dense,
    "decoders-choices": choices,
    "decoders-endpoint": endpoint,
    "decoders-tasks": tasks,
    "decoders-labels": labels,
    "decoders-matrix": matrix,
    "decoders-unseen": unseen,
    "decoders-half": half,
    "decoders-baselines": baselines,
    "decoder-costs": costs,
}

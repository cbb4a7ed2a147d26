"""The tables of the text-to-text model: its tasks, the first paper's settings, and its speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import best_first, elsewhere, percent, points, record, spread, table, within
from timing import wanted

BUNDLED = Path(__file__).parents[1] / "jaxprune" / "bundled"


def paper() -> dict[str, Any]:
    """The record of attribution_paper.py."""
    return record("attribution_paper")


def setting() -> str:
    """The setting of the first paper's figures."""
    found = paper()
    used = [task for task, own in found["tasks"].items() if own["used"]]
    parts = {name: own for name, own in found.items() if isinstance(own, dict) and "at_most_rows" in own}
    sizes = {(own["at_most_examples"], own["at_most_rows"]) for own in parts.values()}
    limits = [f"at most {examples} examples to score and {rows} rows to test" for examples, rows in sorted(sizes)]
    commits = dict.fromkeys(own["commit"][:10] for own in parts.values())
    text = (
        f"{len(used)} tasks ({', '.join(used)}), {found['models']} fine-tuned model, {found['draws']} draws; "
        f"{' and '.join(limits)}; {found['device']}, jax {found['versions']['jax']}; commit {', '.join(commits)}.\n"
    )
    for name, own in found["tasks"].items():
        if not own["used"]:
            text += (
                f"Left out: {name}, {percent(own['dense_dev'])} on dev, less than 10 points above chance "
                f"({percent(own['chance_dev'])}).\n"
            )
    return text


def bundled_text() -> str:
    """The tasks of the text-to-text model beside the bundled BERT's."""
    text, bert = (
        json.loads((BUNDLED / name / "results.json").read_text())["tasks"] for name in ("text_model", "model")
    )

    def accuracy(found: Mapping[str, Any], task: str, split: str) -> str:
        own = found.get(task, {}).get(split)
        return percent(own["metrics"]["accuracy"] if own else None)

    rows = [
        [
            task,
            accuracy(text, task, "dev"),
            accuracy(text, task, "test"),
            accuracy(bert, task, "test"),
            percent(own["dev"]["chance"]),
        ]
        for task, own in text.items()
    ]
    return table(["accuracy, %", "dev", "test", "BERT, test", "chance, dev"], rows)


def scopes() -> str:
    """The units that compete, on dev."""
    found = paper()["scopes"]["rows"]
    names = list(dict.fromkeys(scope for own in found.values() for scope in own["rows"]))
    rows = [
        [name]
        + [
            ("**{}**" if scope == own["best"] else "{}").format(percent(own["rows"][scope]["retained"]))
            if scope in own["rows"]
            else "–"
            for scope in names
        ]
        for name, own in found.items()
    ]
    return table(["half the FLOPs, on dev; kept, %", *names], rows)


def objectives() -> str:
    """The objectives, compared on dev."""
    found = paper()["objectives"]["rows"]
    names = list(next(iter(found.values())))
    rows = [[name, *(percent(own[what]["retained"]) for what in names)] for name, own in found.items()]
    return table(["half the FLOPs, on dev; kept, %", *names], rows)


def endpoint() -> str:
    """Every criterion at the endpoint, best first, with its accuracy by task."""
    found = paper()
    used = {task: own for task, own in found["tasks"].items() if own["used"]}
    scopes_of = found["scopes"]["rows"]
    rows = [
        ["dense", "–", "100.0", *(percent(own["dense"]) for own in used.values())],
        *(
            [name, scopes_of[name]["best"], percent(own["retained"]), *(spread(own["tasks"][task]) for task in used)]
            for name, own in best_first(found["supervised"]["rows"])
        ),
        ["chance", "–", "0.0", *(percent(own["chance"]) for own in used.values())],
    ]
    return table(["half the FLOPs, %", "units compete", "kept", *used], rows)


def claims() -> str:
    """Attribution against every baseline at the endpoint."""
    rows = [[name, points(own)] for name, own in paper()["supervised"]["claims"].items()]
    return table(["difference at half the FLOPs", "points [95 %]"], rows)


def curves() -> str:
    """The primary metric at every budget, per layer and over all layers."""
    found = paper()["curves"]["rows"]
    budgets = list(next(iter(found["per layer"].values())))
    rows = [
        [f"{name}, {scope}", *(percent(each[name][b]["retained"]) for b in budgets)]
        for scope, each in found.items()
        for name in _order()
        if name in each
    ]
    return table(["kept, %, at this share of the FLOPs", *(f"{float(b):g}" for b in budgets)], rows)


def _order() -> list[str]:
    """The criteria, the best at the endpoint first."""
    return [name for name, _ in best_first(paper()["supervised"]["rows"])]


def paper_curves() -> tuple[Mapping[str, Any], Sequence[int]]:
    """The curves over all layers, the best at the endpoint first, and the rows of every task."""
    found = paper()
    sizes = [own["n"] for own in found["tasks"].values() if own["used"]]
    every = found["curves"]["rows"]["all layers"]
    return {name: every[name] for name in _order() if name in every}, sizes


def few() -> str:
    """With few labelled examples per class."""
    found = paper()["few"]["rows"]
    names = list(next(iter(found.values())))
    rows = []
    for per_class, each in found.items():
        kept = [f"{percent(each[name]['retained'])} ± {100 * _deviation(each[name]):.1f}" for name in names]
        most = per_class == list(found)[-1]
        rows.append([per_class, *kept, "–" if most else within(each[names[0]]["all_minus_this"], 2)])
    return table(["per class; kept, %, ± over draws", *names, f"all minus this, {names[0]}, points [95 %]"], rows)


def _deviation(found: Mapping[str, Any]) -> float:
    """The mean over the tasks of the accuracy's standard deviation over the draws."""
    own = [task["deviation"] or 0.0 for task in found["tasks"].values()]
    return sum(own) / len(own)


def unsupervised() -> str:
    """Without labels: in all, and by task."""
    found = paper()["unsupervised"]["rows"]
    tasks = list(next(iter(found.values()))["gold"]["tasks"])
    rows = [
        [
            f"{name}, {label}",
            str(len(own["tasks"])),
            percent(own["retained"]),
            percent(own["accuracy"]),
            "–" if label == "gold" else within(own["gold_minus_this"], 1),
        ]
        for name, each in found.items()
        for label, own in each.items()
    ]
    by_task = [
        [f"{name}, {label}", *(spread(own["tasks"][task]) if task in own["tasks"] else "–" for task in tasks)]
        for name, each in found.items()
        for label, own in each.items()
    ]
    heading = ["labels", "tasks", "kept, %", "accuracy, %", "gold minus this, points [95 %]"]
    return table(heading, rows) + "\n" + table(["accuracy, %", *tasks], by_task)


def unseen() -> str:
    """In unseen domains."""
    found = paper()["unseen"]
    left = "".join(f"\nLeft out: {task}, on which the model is near chance.\n" for task in found["left_out"])
    return elsewhere(found["rows"]) + left


def cost() -> str:
    """The cost of scoring."""
    found = paper()["cost"]
    rows = [
        [name, f"{own['seconds']:.2f}", f"{own['time']:.2f}"]
        + (["–", "–"] if own["bytes"] is None else [f"{own['bytes'] / 2**20:.0f}", f"{own['memory']:.2f}"])
        for name, own in found["rows"].items()
    ]
    heading = [f"{found['examples']} examples of {found['task']}", "seconds", "ratio", "MiB more", "ratio"]
    return table(heading, rows)


def speed() -> str:
    """Speed and memory on a model of FLAN-T5-small's size."""
    found = record("speed_text")
    used = found["settings"]
    rows = []
    for part, own in found["parts"].items():
        for name, ratio in own["ratios"].items():
            quartiles = " [{:.2f}, {:.2f}]".format(*ratio["quartiles"]) if "quartiles" in ratio else ""
            rows.append([part, name, f"{ratio['median']:.2f}{quartiles}", wanted(ratio)])
    how = (
        f"{used['folder']}, {used['batch']} examples of {used['length']} tokens read and {used['written']} written, "
        f"{used['nodes']} nodes, float32, {found['threads']} threads; {found['device']}, {found['machine']}, "
        f"jax {found['versions']['jax']}.\n\n"
    )
    return how + table(["part", "ratio", "median of the rounds [quartiles]", "expected"], rows)


def paper_row() -> list[str]:
    """The headline of the README."""
    found = paper()["supervised"]
    tasks, (best, _) = next(iter(found["rows"].values()))["tasks"], best_first(found["rows"])[0]
    shown = dict.fromkeys((best, "integrated gradients", "gradient x activation", "Wanda", "magnitude", "random"))
    return [
        f"{len(tasks)} tasks of one T5 told apart by prompts, half the FLOPs: accuracy above chance that is kept",
        ", ".join(f"{name} {percent(found['rows'][name]['retained'])}" for name in shown) + " %",
        "`python benchmarks/attribution_paper.py …`",
        "[attribution_paper](benchmarks/results/attribution_paper.json)",
    ]


TEXT_TABLES: Mapping[str, Callable[[], str]] = {
    "bundled-text": bundled_text,
    "paper-setting": setting,
    "paper-scopes": scopes,
    "paper-objectives": objectives,
    "paper-endpoint": endpoint,
    "paper-claims": claims,
    "paper-curves": curves,
    "paper-few": few,
    "paper-labels": unsupervised,
    "paper-unseen": unseen,
    "paper-cost": cost,
    "speed-text": speed,
}

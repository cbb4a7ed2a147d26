"""Writes the tables of README.md and benchmarks/README.md, and draws the curves, from benchmarks/results.

    python benchmarks/tables.py

A table is placed between `<!-- table: NAME -->` and `<!-- end -->`; nothing else in the pages has a measured figure. A
test compares the pages with the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pages import RESULTS, best_first, elsewhere, percent, points, record, spread, table, within
from tables_allocation import ALLOCATION_TABLES
from tables_decoders import DECODER_TABLES, decoder_row
from tables_exports import EXPORT_TABLES
from tables_recovery import RECOVERY_TABLES, recovery_curves, recovery_row, text_recovery_row
from tables_sparse import SPARSE_TABLES, sparse_row
from tables_text import TEXT_TABLES, paper_curves, paper_row
from timing import wanted

from jaxprune.cli.render.pictures import FORMATS, sweep_figure

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MARK = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main_rows() -> str:
    """The primary metric of every criterion at the endpoint, best first."""
    rows = [
        [name, percent(own["retained"]), percent(own["accuracy"]), percent(own["flops"])]
        for name, own in best_first(record("accuracy")["main"]["rows"])
    ]
    return table(["half the FLOPs, %", "accuracy above chance kept", "mean accuracy", "FLOPs kept"], rows)


def main_budgets() -> str:
    """The primary metric of every criterion at every budget."""
    found = record("accuracy")
    budgets = sorted(next(iter(found["curves"]["rows"].values())), key=float, reverse=True)
    order = [name for name, _ in best_first(found["main"]["rows"])]
    rows = [[name, *(percent(found["curves"]["rows"][name][b]["retained"]) for b in budgets)] for name in order]
    return table(["accuracy above chance kept, %, at", *(f"{float(b):g}" for b in budgets)], rows)


def main_claims(part: str = "main") -> str:
    """Attribution against every baseline, by default at the endpoint."""
    found = record("accuracy")[part]
    rows = [[name, points(own)] for name, own in found["claims"].items()]
    return table([f"difference at {100 * found.get('budget', 0.5):.0f} % of the FLOPs", "points [95 %]"], rows)


def tight_claims() -> str:
    """The same where less may stay."""
    return main_claims("tight")


def main_tasks() -> str:
    """Raw accuracy per task at the endpoint."""
    found = record("accuracy")["main"]
    best = [name for name, _ in best_first(found["rows"])]
    rows = []
    for task, own in found["tasks"].items():
        cells = [spread(found["rows"][name]["tasks"][task]) for name in best]
        rows.append([task, str(own["n"]), percent(own["chance"]), percent(own["dense"]), *cells])
    return table(["accuracy, %", "rows", "chance", "dense", *best], rows)


def factors() -> str:
    """One setting at a time."""
    found = record("accuracy")["factors"]["rows"]
    budgets = list(next(iter(found.values()))["retained"])
    rows = [
        [
            name,
            *(percent(own["retained"][b]) for b in budgets),
            percent(own["mean"]),
            points(own["against_default"]) if name != "default" else "–",
        ]
        for name, own in found.items()
    ]
    heading = ["kept on dev, %, at", *(f"{float(b):g}" for b in budgets), "mean", "against the default, at half"]
    return table(heading, rows)


def defaults() -> str:
    """The effect of other settings, the best first."""
    found = record("accuracy")["factors"]["rows"]
    others = sorted(
        (name for name in found if name != "default"), key=lambda n: -found[n]["against_default"]["difference"]
    )
    return "; ".join(f"{name} {points(found[name]['against_default'])}" for name in others) + ".\n"


def nodes() -> str:
    """The number of nodes that is enough."""
    found = record("accuracy")["nodes"]
    budgets = list(found["rows"][0]["jaccard"])
    rows = [
        [
            str(own["nodes"]),
            *(f"{own['jaccard'][b]:.3f}" for b in budgets),
            ", ".join(_two_digits(100 * error) for error in own["completeness"]),
            points(own["against_128"]),
        ]
        for own in found["rows"]
    ]
    kept = [f"Jaccard at {float(b):g}" for b in budgets]
    return table(["nodes", *kept, "completeness error, %, by task", "accuracy against 128, dev"], rows)


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def labels() -> str:
    """Without labels."""
    rows = [
        [
            name,
            percent(own["retained"]),
            percent(own["accuracy"]),
            within(own["gold_minus_this"], 1) if "gold_minus_this" in own else "–",
        ]
        for name, own in record("accuracy")["labels"]["rows"].items()
    ]
    return table(["labels", "kept, %", "accuracy, %", "gold minus this, points [95 %]"], rows)


def few() -> str:
    """With few labelled examples."""
    rows = [
        [
            name,
            percent(own["retained"]),
            percent(own["accuracy"]),
            within(own["all_minus_this"], 2) if "all_minus_this" in own else "–",
        ]
        for name, own in record("accuracy")["few"]["rows"].items()
    ]
    return table(["examples", "kept, %", "accuracy, %", "all minus this, points [95 %]"], rows)


def unseen() -> str:
    """In unseen domains."""
    return elsewhere(record("accuracy")["unseen"]["rows"])


def matrix() -> str:
    """Scored on a task, tested on another."""
    found = record("accuracy")["matrix"]
    rows = [
        [f"**{a}**" if a == "pooled" else a, *(percent(own[b]) for b in found["tasks"])]
        for a, own in found["retained"].items()
    ]
    return table(["scored on ↓, tested on →; kept, %", *found["tasks"]], rows) + (
        f"\nOwn minus other tasks' scores: {points(found['own_minus_other'])}. "
        f"Own minus pooled: {points(found['own_minus_pooled'])}.\n"
    )


def speed() -> str:
    """Times beside PyTorch and captum, beside a dense model, and beside the device's limit."""
    rows = []
    for part, found in record("speed")["parts"].items():
        for name, own in found["ratios"].items():
            quartiles = " [{:.2f}, {:.2f}]".format(*own["quartiles"]) if "quartiles" in own else ""
            rows.append([part, name, f"{own['median']:.2f}{quartiles}", wanted(own)])
    return table(["part", "ratio", "median of the rounds [quartiles]", "expected"], rows)


def speed_setting() -> str:
    """The setting of the timings."""
    found = record("speed")
    used, versions = found["settings"], found["versions"]
    made: dict[tuple[int, str], list[str]] = {}
    for name, own in found["parts"].items():
        made.setdefault((own["facts"].get("rounds", own["repeats"]), own["commit"][:10]), []).append(name)
    return (
        f"Folder {used['folder']}, {used['batch']} examples of {used['length']} tokens, {used['nodes']} nodes, "
        f"float32, {found['threads']} threads; {found['device']}, {found['machine']}, "
        + ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "captum"))
        + ". Rounds and commit: "
        + "; ".join(f"{', '.join(names)} {how[0]}, {how[1]}" for how, names in made.items())
        + ".\n"
    )


def faults() -> str:
    """The cases of the fault campaign, and their outcomes."""
    rows = []
    for name, own in sorted(record("faults").items()):
        counts = {what: value for what, value in own.items() if what not in ("outcomes", "by_file")}
        counts |= own.get("outcomes", {})
        if name != "versions":
            numbers = {what: len(value) if isinstance(value, list) else value for what, value in counts.items()}
            shown = ", ".join(f"{what.replace('_', ' ')}: {value}" for what, value in numbers.items())
            rows.append(f"| {name.replace('_', ' ')} | {shown} |\n")
    return "| campaign | settings and counts |\n| --- | --- |\n" + "".join(rows)


def setting() -> str:
    """The setting of the accuracy figures."""
    found = record("accuracy")
    used, out = found["main"]["tasks"], found["main"]["left_out_on_dev"]
    by_rows: dict[int, list[str]] = {}
    for name, own in found.items():
        if isinstance(own, dict) and "at_most_rows" in own:
            by_rows.setdefault(own["at_most_rows"], []).append(name)
    text = (
        f"{len(used)} tasks, {found['models']} fine-tuned model, {found['examples']} calibration examples, "
        f"{found['draws']} draws of them; {found['device']}, jax {found['versions']['jax']}. "
        "Rows of each split, at most: "
        + "; ".join(f"{', '.join(parts)} {rows}" for rows, parts in by_rows.items())
        + ".\n"
    )
    for name, own in out.items():
        text += (
            f"Left out: {name}, {percent(own['dense'])} on dev, less than 10 points above chance "
            f"({percent(own['chance'])}).\n"
        )
    return text


def bundled() -> str:
    """The bundled model's tasks."""
    found = json.loads((ROOT / "jaxprune" / "bundled" / "model" / "results.json").read_text())["tasks"]
    rows = [
        [name, *(percent(own[s]["metrics"][own[s]["primary"]]) for s in ("dev", "test")), percent(own["dev"]["chance"])]
        for name, own in found.items()
    ]
    return table(["accuracy, %", "dev", "test", "chance, dev"], rows)


def headline() -> str:
    """The claims of the README, each with the command that makes it and the record it is read from."""
    heading = ["what", "result", "command", "record"]
    makers = (
        _pruned_row, _demo_row, decoder_row, _accuracy_row, recovery_row, paper_row, text_recovery_row, sparse_row,
        _speed_row,
    )  # fmt: skip
    rows = [row for made in makers if (row := _unless_missing(made))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * 4, *rows)) + "\n"


def _unless_missing(made: Callable[[], list[str]]) -> list[str]:
    try:
        return made()
    except (FileNotFoundError, KeyError):  # the record, or the part of it, is not there yet
        return []


def _pruned_row() -> list[str]:
    prune = record("prune_sst2")
    before, after = (prune[when]["evaluation"]["metrics"]["accuracy"] for when in ("before", "after"))
    speed = {own["batch"]: own["speedup"] for own in prune["speedup"]["measured"]}
    return [
        "sst2, half the FLOPs, no training",
        f"{percent(before)} → {percent(after)} % accuracy; {100 * prune['kept']['units']:.0f} % of the units and "
        f"{100 * prune['kept']['parameters']:.0f} % of all parameters stay; "
        f"{prune['speedup']['theoretical']:.2f} x fewer FLOPs, measured {speed[32]:.2f} x faster at batch 32, "
        f"{speed[1]:.2f} x at batch 1",
        "`jaxprune prune jaxprune/bundled/model --task sst2 --data DATA --flops 0.5 --multiple-of neurons=8 -o small`",
        "[prune_sst2](benchmarks/results/prune_sst2.json)",
    ]


def _demo_row() -> list[str]:
    demo = record("demo")
    own = next(row for row in demo["tasks"] if row["task"] == demo["task"])["values"]
    return [
        "the same in an unfamiliar domain, beside weaker choices",
        ", ".join(f"{name} {percent(value)}" for name, value in own.items()) + " % accuracy",
        "`make demo`",
        "[demo](benchmarks/results/demo.json)",
    ]


def _accuracy_row() -> list[str]:
    accuracy = record("accuracy")
    main = accuracy["main"]["rows"]
    kept = {name: own["retained"] for name, own in main.items()}
    best = max((name for name in kept if name not in OURS), key=lambda name: kept[name])
    shown = ("integrated gradients", "gradient x activation", best, "magnitude", "random")
    return [
        f"{len(accuracy['main']['tasks'])} tasks, half the FLOPs: accuracy above chance that is kept",
        ", ".join(f"{name} {percent(kept[name])}" for name in dict.fromkeys(shown)) + " %",
        "`python benchmarks/accuracy.py …`",
        "[accuracy](benchmarks/results/accuracy.json)",
    ]


def _speed_row() -> list[str]:
    parts = record("speed")["parts"]
    by_layer, joint, memory = (parts[name]["ratios"] for name in ("layer", "joint", "memory"))
    return [
        "integrated gradients beside PyTorch, the same numbers, one CPU",
        f"{by_layer['captum / jaxprune']['median']:.2f} x as fast as captum one module at a time; all gates at once "
        f"{joint['autograd / jaxprune']['median']:.2f} x as fast as a gradient written by hand; "
        f"{memory['integrated / gradient']['median']:.2f} x the memory of one gradient",
        "`make bench-reference`",
        "[speed](benchmarks/results/speed.json)",
    ]


OURS = ("integrated gradients", "gradient x activation")


def latency_budget() -> str:
    """Budgets of latency beside what the pruned models took."""
    rows = [
        [
            f"{percent(own['budget'])}, {own['scope']}",
            *(percent(own[name]) for name in ("by_table", "measured", "by_medians")),
            f"{100 * (own['measured'] / own['budget'] - 1):+.1f}",
            str(len(own["tries"])),
            str(own["empty_modules"]),
        ]
        for own in record("latency_budget")["rows"]
    ]
    heading = ["budget, % of the dense model's latency", "by the table", "in the end", "by medians", "off by, %"]
    heading += ["tries", "empty modules"]
    return table(heading, rows)


def latency_budget_setting() -> str:
    """The setting of the budgets of latency."""
    found = record("latency_budget")
    settings, measured = found["settings"], found["table"]
    errors = ", ".join(f"{100 * (predicted / took - 1):+.0f}" for predicted, took in measured["wholes"])
    return (
        f"{settings['folder']}, {settings['batch']} x {settings['length']} tokens, {measured['device']}, jax "
        f"{found['versions']['jax']}; rows scaled by {measured['scale']:.2f}, predictions of whole models off by "
        f"{errors} % (the last was not used to scale). Commit {found['commit'][:10]}.\n"
    )


def plans() -> str:
    """The time that a plan takes."""
    found = record("planning")["plans"]
    rows = [
        [
            name,
            *(f"{own[what]['median']:.1f} [{', '.join(f'{q:.1f}' for q in own[what]['quartiles'])}]" for what in own),
            f"{own['clock']['most']:.1f}",
        ]
        for name, own in found["rows"].items()
    ]
    return table(["plan of BERT-base, seconds", "clock, median [quartiles]", "processor", "the longest"], rows)


def plans_setting() -> str:
    """The setting of the plans."""
    found = record("planning")
    return (
        f"{found['plans']['repeats']} rounds; {found['device']}, {found['cores']} cores, jax "
        f"{found['versions']['jax']}; commit {found['plans']['commit'][:10]}.\n"
    )


def packing() -> str:
    """The sizes of compressed files of sparse weights, and the time to read them."""
    rows = []
    for row in record("packing")["rows"]:
        for name, way in row["ways"].items():
            times = (_median_and_quartiles(way[kind]) for kind in ("read_processor", "read_clock"))
            sizes = (f"{size / 1e6:.2f}" for size in (row["plain_bytes"], row["packed_bytes"], way["bytes"]))
            zeros = f"{100 * row['sparsity']:g} %, {row['values']}, {name}"
            rows.append([zeros, *sizes, f"{way['size']:.2f}", *times, f"{way['write_seconds']:.1f}"])
    heading = ["zeros, values, compressor", "plain, MB", "packed, MB", "compressed, MB", "compressed / packed"]
    return table([*heading, "time to read / packed, processor", "clock", "to write, s"], rows)


def _median_and_quartiles(found: Mapping[str, Any]) -> str:
    return "{median:.2f} [{quartiles[0]:.2f}, {quartiles[1]:.2f}]".format(**found)


def packing_setting() -> str:
    """The setting of the compressed files."""
    found = record("packing")
    versions = {name: found["versions"][name] for name in ("python", "numpy", "pyarrow", "safetensors")}
    return (
        f"Folder {found['settings']['folder']}; {found['settings']['repeats']} rounds, {found['threads']} threads, "
        f"{found['device']}, {', '.join(f'{name} {version}' for name, version in versions.items())}. "
        f"Commit {found['commit'][:10]}.\n"
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "headline": headline,
    "bundled": bundled,
    "setting": setting,
    "main-rows": main_rows,
    "main-budgets": main_budgets,
    "main-claims": main_claims,
    "tight-claims": tight_claims,
    "main-tasks": main_tasks,
    "factors": factors,
    "defaults": defaults,
    "faults": faults,
    "latency-budget": latency_budget,
    "latency-budget-setting": latency_budget_setting,
    "plans": plans,
    "plans-setting": plans_setting,
    "packing": packing,
    "packing-setting": packing_setting,
    "nodes": nodes,
    "labels": labels,
    "few": few,
    "unseen": unseen,
    "matrix": matrix,
    "speed": speed,
    "speed-setting": speed_setting,
    **TEXT_TABLES,
    **ALLOCATION_TABLES,
    **EXPORT_TABLES,
    **DECODER_TABLES,
    **RECOVERY_TABLES,
    **SPARSE_TABLES,
}


def render(text: str) -> str:
    """A page with its tables made from the records; a table whose record is not there yet says so."""

    def fill(found: re.Match[str]) -> str:
        try:
            made = TABLES[found[2]]()
        except FileNotFoundError as error:
            made = f"*Not measured yet: there is no {Path(error.filename).name}.*\n"
        except KeyError as error:
            made = f"*Not measured yet: the record has no part {error}.*\n"
        return f"{found[1]}{made}{found[4]}"

    return MARK.sub(fill, text)


Curves = Mapping[str, Mapping[str, Mapping[str, Any]]]  # criterion, budget, summary


def accuracy_curves() -> tuple[Curves, Sequence[int]]:
    """Curves of the bundled BERT, the best at the endpoint first, and the rows of every task."""
    found = record("accuracy")
    order = [name for name, _ in best_first(found["main"]["rows"])]
    return {name: found["curves"]["rows"][name] for name in order}, [
        own["n"] for own in found["main"]["tasks"].values()
    ]


def draw_curves(path: Path, curves: Curves, sizes: Sequence[int], *, dark: bool = False) -> None:
    """Draws the primary metric over the budget, one line per criterion."""
    rows = [
        {
            "task": f"mean of {len(sizes)} tasks",
            "metric": "accuracy above chance that is kept",
            "n": sum(sizes),
            "criterion": name,
            "flops": float(budget),
            "flops_kept": found["flops"],
            "value": found["retained"],
            "dense": 1.0,
            "chance": 0.0,
            "seed": 0,
        }
        for name, budgets in curves.items()
        for budget, found in budgets.items()
    ]
    sweep_figure(path, rows, split="test", dark=dark)


def main() -> None:
    """Writes all pages and pictures."""
    for page in PAGES:
        page.write_text(render(page.read_text()))
    for name, part, curves, endings in (
        ("accuracy", "curves", accuracy_curves, FORMATS),
        ("attribution_paper", "curves", paper_curves, FORMATS),
        ("recovery", "budgets", recovery_curves, ("png",)),
        ("recovery_text", "budgets", partial(recovery_curves, "recovery_text"), ("png",)),
    ):
        if (RESULTS / f"{name}.json").exists() and part in record(name):
            for ending in endings:
                draw_curves(RESULTS / f"{name}.{ending}", *curves())
                draw_curves(RESULTS / f"{name}_dark.{ending}", *curves(), dark=True)


if __name__ == "__main__":
    main()

"""The tables of exports.py: what others compute with a model that was pruned here, and what fewer tokens save."""

from __future__ import annotations

from functools import partial

from pages import percent, record, table


def setting() -> str:
    """The setting of the figures."""
    found = record("exports")
    commits = dict.fromkeys(found[part]["commit"][:10] for part in ("formats", "uneven", "latency", "vocabulary"))
    return (
        f"{found['task']}, {found['examples']} calibration rows, {percent(found['budget'])} % of the FLOPs; "
        f"{found['device']}, jax {found['versions']['jax']}; commit {', '.join(commits)}.\n"
    )


def formats(part: str = "formats") -> str:
    """Every model in every form that it has."""
    rows = []
    for name, own in record("exports")[part]["rows"].items():
        for program, made in own.items():
            if isinstance(made, dict):
                size = f"{made['bytes'] / 1e6:.1f}"
                counts = [f"{own['parameters'] / 1e6:.2f}", f"{made['written'] / 1e6:.2f}"]
                same = f"{made['same_answers']} of {made['rows']}"
                rows.append([name, program, made["class"], *counts, size, f"{made['error']:.1e}", same])
    heading = [
        "model",
        "read by",
        "as",
        "parameters, M",
        "as written, M",
        "MB in float32",
        "largest error",
        "same answers",
    ]
    return table(heading, rows)


def latency() -> str:
    """One forward pass of each program, dense and pruned."""
    rows = []
    for name, own in record("exports")["latency"]["rows"].items():
        taken = {run: each["median"] for run, each in own["seconds"].items()}
        for program in dict.fromkeys(run.partition(",")[0] for run in taken):
            dense, pruned = (taken[f"{program}, {state}"] for state in ("dense", "pruned"))
            times = [f"{1e3 * dense:.0f}", f"{1e3 * pruned:.0f}", f"{dense / pruned:.2f}"]
            rows.append([f"{name}, {own['rows']} x {own['tokens']} tokens", program, *times])
    return table(["model", "program", "dense, ms", "pruned, ms", "times as fast"], rows)


def vocabulary() -> str:
    """The tokens that a task needs."""
    rows = []
    for name, own in record("exports")["vocabulary"]["rows"].items():
        for tokens, made in own.items():
            same = [percent(made["as_before"]), percent(made["unknown"]["after"])] if "tested" in made else ["", ""]
            what = {"dense": "all", "data": "those that its rows need"}.get(tokens, "the most needed")
            sizes = [f"{made['vocab']:,}", f"{made['parameters'] / 1e6:.2f}", f"{made['bytes'] / 1e6:.1f}"]
            rows.append([f"{name}: {what}", *sizes, percent(made["accuracy"]), *same])
    heading = ["tokens", "number", "parameters, M", "MB in bfloat16", "accuracy, %"]
    return table([*heading, "test rows split as before, %", "unknown, %"], rows)


EXPORT_TABLES = {"exports-setting": setting, "exports-formats": formats, "exports-vocabulary": vocabulary}
EXPORT_TABLES |= {"exports-uneven": partial(formats, "uneven"), "exports-latency": latency}

"""The tables of allocation.py: what decides how much is kept."""

from __future__ import annotations

from pages import percent, record, table

RECORDS = {"BERT": "allocation", "T5": "allocation_text"}


def setting() -> str:
    """The setting of the figures."""
    lines = []
    for name, file in RECORDS.items():
        found = record(file)
        rows = (
            f"{found['examples']} calibration rows to score and to measure with, {found['repaired_by']} to repair with"
        )
        lines.append(
            f"{name}: {len(found['tasks'])} tasks ({', '.join(found['tasks'])}), {rows}, at most "
            f"{found['at_most_rows']} rows of each split; {found['device']}, jax {found['versions']['jax']}; commit "
            f"{found['choices']['commit'][:10]}.\n"
        )
    return "\n".join(lines)


def choices() -> str:
    """Every allocation, and the ridge of the modules while widths are measured, on dev."""
    every = {name: record(file)["choices"]["retained"] for name, file in RECORDS.items()}
    ways = list(next(iter(every["BERT"].values())))
    rows = [
        [
            way.replace("_", " ").replace("ridge None", "modules as they are"),
            *(percent(own[way]) for found in every.values() for own in found.values()),
        ]
        for way in ways
    ]
    heading = [f"{name}, {float(budget):g}" for name, found in every.items() for budget in found]
    return table(["accuracy above chance kept, dev, %", *heading], rows)


ALLOCATION_TABLES = {"allocation-setting": setting, "allocation-choices": choices}

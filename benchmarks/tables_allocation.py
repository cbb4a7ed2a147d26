"""The tables of allocation.py: what decides how much is kept."""

from __future__ import annotations

from pages import percent, record, table


def setting() -> str:
    """The setting of the figures."""
    found = record("allocation")
    return (
        f"{len(found['tasks'])} tasks ({', '.join(found['tasks'])}), {found['examples']} calibration rows to score and "
        f"to measure with, {found['repaired_by']} to repair with, at most {found['at_most_rows']} rows of each split; "
        f"{found['device']}, jax {found['versions']['jax']}; commit {found['choices']['commit'][:10]}.\n"
    )


def choices() -> str:
    """The ridge of the modules while widths are measured, on dev."""
    found = record("allocation")["choices"]["retained"]
    ridges = list(next(iter(found.values())))
    names = ["as they are" if ridge == "None" else f"fitted, ridge {ridge}" for ridge in ridges]
    rows = [[f"{float(budget):g}", *(percent(own[ridge]) for ridge in ridges)] for budget, own in found.items()]
    return table(["accuracy above chance kept after repair, dev, %, at", *names], rows)


ALLOCATION_TABLES = {"allocation-setting": setting, "allocation-choices": choices}

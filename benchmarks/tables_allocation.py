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
    """Every allocation, and the ridge of the modules while widths are measured, on dev."""
    found = record("allocation")["choices"]["retained"]
    names = {name: name.replace("_", " ").replace("ridge None", "modules as they are") for name in found["0.3"]}
    rows = [[names[way], *(percent(own[way]) for own in found.values())] for way in names]
    return table(["accuracy above chance kept, dev, %, at", *(f"{float(budget):g}" for budget in found)], rows)


ALLOCATION_TABLES = {"allocation-setting": setting, "allocation-choices": choices}

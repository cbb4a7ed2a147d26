"""Tables and notes on how far scores can be trusted: how stable they are, and what checks of them found.

Nothing is measured here: records of plain values go in. Every table fits into 80 columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from textwrap import fill
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from jaxprune.cli.render.report import Record


def stability_tables(record: Record) -> list[Table | str]:
    """How far scores would change with other examples: a table, what it means, and what would be enough.

    Args:
        record: As from `score_model`. Of scores without stability only a line says so, or nothing if no example was
            read.
    """
    found = record["stability"]
    if found is None:
        why = "the largest of the examples decides" if record["largest"] else "there are too few examples"
        return [f"Stability: not known, {why}."] if record["examples"] else []
    table = _table("stability")
    table.add_column("")
    for heading in ("between\nhalves", "second\nrun", f"examples\nfor {found['target']:g}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for fraction in found["fractions"]:
        table.add_column(f"kept at\n{fraction:g}", justify="right", no_wrap=True)
    for kind, own in found["kinds"].items():
        wanted = "" if own["needed"] is None else f"{own['needed']:,}"
        table.add_row(
            kind, _two(own["spearman"]), _two(own["reliability"]), wanted, *(_two(value) for value in own["overlap"])
        )
        table.add_row("  chance", "", "", "", *(_two(value) for value in own["chance"]))
    one, other = found["halves"]
    note = (
        f"between halves: Spearman's rank correlation of the scores of {one} and of {other} examples within a site, "
        f"mean over the sites. second run: the same of all {one + other} and of as many others, estimated. kept at: "
        "units that both halves keep, of those that either keeps (Jaccard)."
    )
    return [table, fill(note, 80), fill(_enough(record, found), 80)]


def _enough(record: Record, found: Mapping[str, Any]) -> str:
    """Whether there are enough examples, or how many more there should be."""
    examples, own = found["examples"], record.get("until_stable")
    target, reached = found["target"], found["reliability"]
    if own is not None and reached is not None:
        how = f"Stopped after {examples:,} of" if examples < own["most"] else "Scored all"
        verdict = "reaches" if own["reached"] else "is below"
        return f"{how} {own['most']:,} examples: {reached:.3f} {verdict} {target:g}.{_more(found)}"
    if reached is not None and reached >= target:
        return f"Stable: {reached:.3f} reaches {target:g}."
    return f"Not stable at {target:g} with {examples:,} examples.{_more(found)}"


def _more(found: Mapping[str, Any]) -> str:
    if found["needed"] is None:
        return " The halves do not agree at all, so no number can be told."
    missing = found["needed"] - found["examples"]
    return f" About {missing:,} more are needed for {found['target']:g}." if missing > 0 else ""


def check_tables(record: Record) -> list[Table | str]:
    """The checks with their verdicts and rules, and the quality while units are deleted.

    Args:
        record: As from `check_model`.
    """
    table = _table(f"checks of {record['scores']}: {record['criterion']['name']}, {record['task']}")
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("beside", overflow="fold")
    for own in record["checks"]:
        style = {"pass": "green", "fail": "bold red"}.get(own["verdict"])
        value = "" if own["value"] is None else f"{own['value']:.3g}"
        table.add_row(own["name"], Text(own["verdict"], style=style or ""), value, _beside(own))
    rules = dict.fromkeys(f"{own['name'].split()[0]}: {own['rule']}." for own in record["checks"])
    facts = record["checks"][-1]["facts"]
    curves = _table(f"{facts['metric']}, %, of {facts['examples']:,} {facts['split']} rows with units deleted")
    curves.padding = (0, 1, 0, 0)
    curves.add_column("deleted")
    for fraction in facts["fractions"]:
        curves.add_column(f"{100 * fraction:.0f} %", justify="right", no_wrap=True)
    random = [own for name, own in facts["curves"].items() if name.startswith("random")]
    shown = {name: facts["curves"][name] for name in ("lowest first", "highest first")}
    shown[f"random, mean of {len(random)}"] = [mean(values) for values in zip(*random, strict=True)]
    for name, values in shown.items():
        curves.add_row(name, *(f"{100 * value:.1f}" for value in values))
    return [table, *(fill(rule, 80, subsequent_indent="  ") for rule in rules), curves]


def _beside(own: Record) -> str:
    """What the value of a check is to be read beside."""
    facts = own["facts"]
    if not facts:
        return ""
    if "curves" in facts:
        areas = facts["areas"]
        return (
            f"random {facts['random']:.3g} (up to {facts['random_reaches']:.3g}), highest first "
            f"{areas['highest first']:.3g}, dense {facts['dense']:.3g}, chance {facts['chance']:.3g}"
        )
    if "interval" in facts:
        interval = facts["interval"]
        between = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}; "
        return f"{between}{facts['units']} units of {facts['sites']} sites, {facts['examples']} examples"
    return f"error {facts['error']:.2g} of {facts['size']:.2g}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False, padding=(0, 1))


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

"""Records as tables: what the pages are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@cache
def record(name: str) -> dict[str, Any]:
    """A record of benchmarks/results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *rows)) + "\n"


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return "–" if value is None else f"{100 * value:.1f}"


def points(found: Mapping[str, Any]) -> str:
    """A difference with its interval and its verdict, in points of the primary metric."""
    return (
        f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}] {found['verdict']}"
    )


def within(found: Mapping[str, Any], margin: float) -> str:
    """A loss with its interval, and whether it is certainly below a margin."""
    low, high = 100 * found["low"], 100 * found["high"]
    word = f"within {margin:g}" if high < margin else f"more than {margin:g}" if low > margin else "undecided"
    return f"{100 * found['difference']:+.1f} [{low:+.1f}, {high:+.1f}] {word}"


def best_first(rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Rows by the primary metric."""
    return sorted(rows.items(), key=lambda item: -item[1]["retained"])


def spread(found: Mapping[str, Any]) -> str:
    """Accuracy and its standard deviation over the draws."""
    deviation = found["deviation"]
    return percent(found["accuracy"]) + (f" ± {100 * deviation:.1f}" if deviation is not None else "")


def elsewhere(found: Mapping[str, Any]) -> str:
    """Scored on one task, tested in other domains."""
    names = list(next(iter(found.values()))["accuracy"])
    rows = [
        [f"{own['scored_on']} → {domain}", str(own["n"]), percent(own["chance"]), percent(own["dense"])]
        + [spread(own["accuracy"][name]) for name in names]
        for domain, own in found.items()
    ]
    return table(["accuracy, %", "rows", "chance", "dense", *names], rows)

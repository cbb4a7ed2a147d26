"""The figures in the pages are those of the records in benchmarks/results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tables

PAGES = {str(page.relative_to(tables.ROOT)): page for page in tables.PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_are_those_of_the_records(name: str):
    text = PAGES[name].read_text()
    assert tables.MARK.search(text)
    assert tables.render(text) == text, "run: python benchmarks/tables.py"


@pytest.mark.parametrize("name", PAGES)
def test_no_measured_figure_stands_outside_of_a_table(name: str):
    text = tables.MARK.sub("", PAGES[name].read_text())
    prose = re.sub(
        r"```.*?```|`[^`]*`|\[[^]]*\]\([^)]*\)|arXiv \d+\.\d+|Apache-2\.0|Python 3\.\d+", "", text, flags=re.DOTALL
    )
    assert re.findall(r"\d+\.\d+|\d+(?:\.\d+)? ?x\b", prose) == []


def test_a_changed_record_is_noticed(monkeypatch: pytest.MonkeyPatch):
    page = "<!-- table: nodes -->\n<!-- end -->"
    row = {"nodes": 4, "jaccard": {"0.5": 0.9}, "completeness": [0.01]}
    row["against_128"] = {"difference": 0.0, "low": -0.1, "high": 0.1, "verdict": "undecided"}
    shown = []
    for overlap in (0.9, 0.91):
        record = {"nodes": {"rows": [row | {"jaccard": {"0.5": overlap}}]}}
        monkeypatch.setattr(tables, "record", lambda name, record=record: record)
        shown.append(tables.render(page))
    assert "0.900" in shown[0] and "0.910" in shown[1] and shown[0].replace("0.900", "0.910") == shown[1]


def test_every_record_is_named_in_the_page():
    page = PAGES["benchmarks/README.md"].read_text()
    records = {path.stem for path in Path(tables.RESULTS).glob("*.json")}
    assert {name for name in records if f"results/{name}.json" not in page} == set()

"""Tables and pictures show the figures that they are given."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from jaxprune import report

LATENCY = {"batch": 32, "length": 24, "median": 0.0614, "p95": 0.0702, "device": "2-core CPU", "speedup": 1.0}
BEFORE = {
    "units": 9_288,
    "prunable_parameters": 10_634_112,
    "parameters": 15_501_234,
    "flops": 519.4e6,
    "length": 23.75,
    "file_bytes": 31_004_500,
    "latency": [LATENCY],
    "evaluation": {
        "task": "sst2",
        "split": "test",
        "head": "sst2",
        "metrics": {"accuracy": 0.912, "f1": 0.9},
        "chance": 0.509,
        "n": 1_821,
        "truncated": 0,
        "primary": "accuracy",
    },
}
AFTER = BEFORE | {
    "units": 4_644,
    "flops": 259.7e6,
    "latency": [LATENCY | {"median": 0.033, "p95": 0.041, "speedup": 1.86}],
    "evaluation": BEFORE["evaluation"] | {"metrics": {"accuracy": 0.893, "f1": 0.88}},
}
PRUNED = {
    "before": BEFORE,
    "after": AFTER,
    "kept": {"units": 0.5, "flops": 0.5, "parameters": 1.0, "prunable_parameters": 1.0, "file_bytes": 1.0},
    "speedup": {"theoretical": 2.0, "measured": [{"batch": 32, "speedup": 1.86}]},
}
ROWS = [
    {"task": "sst2", "n": 384, "metric": "accuracy", "chance": 0.5, "values": {"dense": 0.9, "random": 0.61}},
    {"task": "qnli", "n": 150, "metric": "accuracy", "chance": 0.52, "values": {"dense": 0.8, "random": 0.5}},
]


def text(table) -> list[str]:
    """The rows of a table, one space between words, after making sure that it fits into 80 columns."""
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue] a StringIO
    assert all("…" not in line for line in lines)
    return [" ".join(line.split()) for line in lines if line.strip()]


def test_before_and_after():
    lines = text(report.before_after_table(PRUNED))
    assert "accuracy, % (chance 50.9) 91.2 89.3" in lines
    assert "f1, % 90.0 88.0" in lines
    assert "units: heads and neurons 9,288 4,644 50.0 %" in lines
    assert "MFLOPs, 23.75 tokens 519.4 259.7 50.0 % 2.00 x" in lines
    assert "weights on disk, MB 31.00 31.00 100.0 %" in lines
    assert "latency, ms, 32 x 24 tokens 61.40 33.00 1.86 x" in lines
    assert "95th percentile 70.20 41.00" in lines
    assert "sst2, 1,821 test examples" in lines
    assert "2-core CPU" in " ".join(report.before_after_notes(PRUNED))


def test_before_and_after_without_what_was_not_measured():
    short = {name: value for name, value in BEFORE.items() if name not in ("latency", "evaluation", "file_bytes")}
    lines = text(report.before_after_table(PRUNED | {"before": short, "after": short}))
    assert {line.split()[0] for line in lines} & {"latency,", "accuracy,", "weights"} == set()
    assert len(report.before_after_notes({"before": short})) == 1


def test_nothing_left_has_no_speedup():
    empty = PRUNED | {"after": AFTER | {"flops": 0.0}, "speedup": {"theoretical": None, "measured": []}}
    assert "MFLOPs, 23.75 tokens 519.4 0.0 50.0 %" in text(report.before_after_table(empty))


def test_evaluations():
    lines = text(report.evaluation_table([BEFORE["evaluation"], BEFORE["evaluation"] | {"truncated": 7}], "both"))
    assert "sst2 test 1,821 accuracy 91.2, f1 90.0 50.9" in lines
    assert "sst2 test 1,821 (7 cut) accuracy 91.2, f1 90.0 50.9" in lines
    assert lines[0] == "both"


def test_a_comparison_puts_the_chosen_task_apart():
    lines = text(report.comparison_table(ROWS, ("dense", "random"), "sst2"))
    assert "sst2 384 90.0 61.0 50.0" in lines
    assert "qnli 150 80.0 50.0 52.0" in lines


def test_scores():
    record = {
        "source": "multi",
        "task": "sst2",
        "head": "sst2",
        "examples": 128,
        "split": "calibration",
        "mean_length": 23.75,
        "criterion": {"name": "IntegratedGradients", "nodes": 8, "objective": None, "kinds": ["heads", "neurons"]},
        "completeness": {"expected": 0.4, "found": 0.41, "error": 0.002, "size": 0.4, "relative": 0.005},
        "units": 9_288,
        "sites": 12,
    }
    lines = text(report.scores_table(record))
    assert "nodes 8" in lines
    assert "kinds heads, neurons" in lines
    assert "completeness error 0.002 of 0.4 (0.5 %), means over the examples" in lines
    none = text(report.scores_table(record | {"examples": 0, "completeness": None}))
    assert "examples none are read" in none


@pytest.mark.parametrize("variants", [("dense", "random"), ("dense",)])
def test_a_picture_is_drawn(tmp_path, variants):
    kept = {"0.attention.heads": [1, 0, 1], "0.ffn.neurons": [1] * 5 + [0] * 4, "1.attention.heads": []}
    file = report.comparison_figure(tmp_path / "a.png", ROWS, variants, kept, title="what is shown")
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
    assert (width, height) == (1320, 552)


def test_tables_need_neither_arrays_nor_matplotlib():
    code = "import sys, jaxprune.report; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"jax", "numpy", "matplotlib"} == set()

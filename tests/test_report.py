"""Tables and pictures show the figures that they are given."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console

from jaxprune.cli.render import pictures, tables
from jaxprune.cli.render.cards import model_card

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
    lines = text(tables.before_after_table(PRUNED))
    assert "accuracy, % (chance 50.9) 91.2 89.3" in lines
    assert "f1, % 90.0 88.0" in lines
    assert "units: heads and neurons 9,288 4,644 50.0 %" in lines
    assert "MFLOPs, 23.75 tokens 519.4 259.7 50.0 % 2.00 x" in lines
    assert "weights on disk, MB 31.00 31.00 100.0 %" in lines
    assert "latency, ms, 32 x 24 tokens 61.40 33.00 1.86 x" in lines
    assert "95th percentile 70.20 41.00" in lines
    assert "sst2, 1,821 test examples" in lines
    assert "2-core CPU" in " ".join(tables.before_after_notes(PRUNED))


def test_before_and_after_without_what_was_not_measured():
    short = {name: value for name, value in BEFORE.items() if name not in ("latency", "evaluation", "file_bytes")}
    lines = text(tables.before_after_table(PRUNED | {"before": short, "after": short}))
    assert {line.split()[0] for line in lines} & {"latency,", "accuracy,", "weights"} == set()
    assert len(tables.before_after_notes({"before": short})) == 1


PREDICTED = {
    "estimate": 0.0512,
    "at_most": 1.23,
    "everything": 0.396,
    "layers": {"0": {"estimate": 0.03, "at_most": 0.6}, "1": {"estimate": 0.0212, "at_most": 0.63}},
    "meaning": "first order",
}
RECEIPT = {
    "task": "sst2",
    "objective": "log_probability",
    "examples": 128,
    "nodes": 8,
    "lost": 0.0396,
    "found": 0.0397,
    "error": 0.0012,
    "layers": {"0": 0.02, "1": 0.0197},
    "prediction": PREDICTED,
}


def test_a_receipt_shows_prediction_beside_truth():
    lines = text(tables.loss_table(RECEIPT))
    assert lines[0] == "sst2: log probability lost, mean of 128 examples"
    assert "layer predicted lost" in lines
    assert "0 0.0300 0.0200" in lines and "all 0.0512 0.0396" in lines
    notes = " ".join(" ".join(tables.loss_notes(RECEIPT)).split())
    for part in ("first order. Their sizes sum to 1.2300. All scored units together lose 0.3960.", "by 0.0012 (mean)"):
        assert part in notes


def test_a_receipt_without_signs_and_without_a_prediction():
    sizes = PREDICTED | {"estimate": None, "everything": None}
    assert "all 1.2300 0.0396" in text(tables.loss_table(RECEIPT | {"prediction": sizes}))
    none = sizes | {"at_most": None, "layers": {}, "meaning": "Magnitude attributes no objective to units"}
    again = RECEIPT | {"prediction": none}
    assert "layer lost" in (lines := text(tables.loss_table(again))) and "all 0.0396" in lines
    assert tables.loss_notes(again)[0].startswith("No prediction of the loss: Magnitude")
    assert len(tables.loss_notes(again)) == 2


def test_nothing_left_has_no_speedup():
    empty = PRUNED | {"after": AFTER | {"flops": 0.0}, "speedup": {"theoretical": None, "measured": []}}
    assert "MFLOPs, 23.75 tokens 519.4 0.0 50.0 %" in text(tables.before_after_table(empty))


def test_evaluations():
    lines = text(tables.evaluation_table([BEFORE["evaluation"], BEFORE["evaluation"] | {"truncated": 7}], "both"))
    assert "sst2 test 1,821 accuracy 91.2, f1 90.0 50.9" in lines
    assert "sst2 test 1,821 (7 cut) accuracy 91.2, f1 90.0 50.9" in lines
    assert lines[0] == "both"


def test_a_comparison_puts_the_chosen_task_apart():
    lines = text(tables.comparison_table(ROWS, ("dense", "random"), "sst2"))
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
    lines = text(tables.scores_table(record))
    assert "nodes 8" in lines
    assert "kinds heads, neurons" in lines
    assert "completeness error 0.002 of 0.4 (0.5 %), means over the examples" in lines
    none = text(tables.scores_table(record | {"examples": 0, "completeness": None}))
    assert "examples none needed" in none


SWEPT = {
    "settings": {"split": "dev", "tasks": {"sst2": {}}},
    "rows": [
        {
            "task": "sst2", "criterion": name, "seed": seed, "flops": 0.5, "flops_kept": 0.49, "units_kept": 0.48,
            "parameters_kept": 0.7, "metric": "accuracy", "value": value, "n": 126, "chance": 0.5, "dense": 0.92,
        }
        for name, seed, value in (("taylor", 0, 0.8), ("taylor", 1, 0.9), ("magnitude", 0, 0.6))
    ],
}  # fmt: skip


def test_a_sweep():
    (table,) = tables.sweep_tables(SWEPT)
    lines = text(table)
    assert lines[0] == "sst2: accuracy, %; dense 92.0, chance 50.0, n = 126"
    assert "taylor 49.0 % 48.0 % 2 85.0 80.0 90.0" in lines
    assert "magnitude 49.0 % 48.0 % 1 60.0 60.0 60.0" in lines
    assert tables.sweep_note(SWEPT) == "Tested on split dev: to choose by; report on test."


LAYER = {
    "layer": "11",
    "heads": [12, 12],
    "neurons": [264, 3072],
    "parameters": 11_812_864,
    "flops_share": 0.1416,
    "mean_scores": {"heads": 8.1534e-7, "neurons": None},
    "score_share": 0.1117,
}
INSPECTED = {
    "source": "small",
    "model_type": "bert",
    "heads": [],
    "kinds": ["heads", "neurons"],
    "length": 18.5625,
    "pruned": {"flops": 0.4},
    "tasks": [],
    "scores": "s.safetensors",
    "layers": [LAYER],
    "total": LAYER | {"layer": "all", "heads": [192, 384], "neurons": [49_152, 98_304], "parameters": 311_812_864},
}


def test_an_inspection():
    lines = text(tables.inspection_table(INSPECTED))
    assert "11 12 264/3,072 11,812,864 14.2 8.15e-07 11.2" in lines
    assert "all 192/384 49,152/98,304 311,812,864 14.2 8.15e-07 11.2" in lines
    assert "Task heads: none. Parameters and FLOPs of the units, 18.56 tokens." in tables.inspection_note(INSPECTED)
    without = text(tables.inspection_table(INSPECTED | {"scores": None, "pruned": None}))
    assert "11 12 264/3,072 11,812,864 14.2" in without


CARD = PRUNED | {
    "kinds": ["heads", "neurons"],
    "source": "owner/multi",
    "task": "sst2",
    "head": "sst2",
    "labels": ["negative", "positive"],
    "prompt": None,
    "criterion": {"name": "IntegratedGradients", "nodes": 8},
    "examples": 128,
    "selection": {"flops": 0.5, "units": None, "allocation": "per_layer", "multiple_of": {"neurons": 8}},
    "widths": {"0.attention.heads": [12, 6], "0.ffn.neurons": [1536, 768]},
}
HOSTILE = "a`b|c ``` \n# d\r\n---\nlicense: mit\n<script>x</script> [e](f) $g$ \u202e'\"\\ : - |"


def rendered(card: str) -> tuple[dict[str, Any], list[Token]]:
    """The front matter, and what a Markdown reader makes of the rest."""
    found = ModelCard(card, ignore_metadata_errors=False)
    return found.data.to_dict(), MarkdownIt("commonmark").enable("table").parse(found.text)


def cells(tokens: list[Token]) -> list[list[str]]:
    """The rows of all tables."""
    rows: list[list[str]] = []
    for before, token in pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            rows[-1].append("".join(part.content for part in token.children or ()))
    return rows


def test_a_model_card_says_what_was_cut_and_what_it_costs():
    facts, tokens = rendered(model_card(CARD, on_hub=True))
    assert facts["library_name"] == "jaxprune"
    assert facts["base_model"] == "owner/multi"
    rows = cells(tokens)
    assert ["MFLOPs, 23.75 tokens", "519.4", "259.7", "50.0 %", "2.00 x"] in rows
    assert ["accuracy, % (chance 50.9)", "91.2", "89.3", "", ""] in rows
    assert ["0.ffn.neurons", "1,536", "768"] in rows
    terminal = [line for line in text(tables.before_after_table(PRUNED)) if not line.startswith(("before", "──"))]
    assert [" ".join(" ".join(row).split()) for row in rows if len(row) == 5][1:] == terminal
    content = " ".join(token.content for token in tokens)
    refused = "transformers refuses this folder, whose `model_type` is"
    for word in (
        refused,
        "128 calibration examples",
        "`nodes 8`",
        "`flops 0.5, allocation per_layer",
        "evaluate FOLDER --task sst2",
    ):
        assert word in content
    ast.parse(next(token.content for token in tokens if token.info == "python"))


def test_a_model_card_says_what_was_lost():
    hostile = RECEIPT | {"task": HOSTILE, "objective": HOSTILE}
    plain = shape_of(rendered(model_card(CARD | {"receipt": RECEIPT}, on_hub=True))[1])
    _, tokens = rendered(model_card(CARD | {"receipts": [RECEIPT]}, on_hub=True))
    assert ["all", "0.0512", "0.0396"] in cells(tokens) and shape_of(tokens) == plain
    assert shape_of(rendered(model_card(CARD | {"receipt": hostile}, on_hub=True))[1]) == plain
    assert len(rendered(model_card(CARD, on_hub=True))[1]) < len(tokens)


@pytest.mark.parametrize("field", ["task", "head", "source", "labels", "criterion"])
def test_names_do_not_break_a_model_card(field):
    value = {"labels": [HOSTILE, "b"], "criterion": {"name": HOSTILE, HOSTILE: HOSTILE}}.get(field, HOSTILE)
    record = CARD | {"source": "folder", field: value}
    if field == "task":
        record["before"] = BEFORE | {"evaluation": BEFORE["evaluation"] | {"task": HOSTILE, "metrics": {HOSTILE: 1.0}}}
        record["after"] = AFTER | {"evaluation": record["before"]["evaluation"]}
    facts, tokens = rendered(model_card(record, on_hub=False))
    plain_facts, plain = rendered(model_card(CARD | {"source": "folder"}, on_hub=False))
    assert facts == plain_facts and "base_model" not in facts and "license" not in facts
    shape = shape_of(tokens)
    if field == "task":  # one metric instead of two
        assert {len(row) for row in cells(tokens)} == {5, 3}
        assert [kind for kind in shape if kind[1] == "h1"] == [kind for kind in shape_of(plain) if kind[1] == "h1"]
    else:
        assert shape == shape_of(plain)
    inline = {part.type for token in tokens for part in token.children or ()}
    assert inline <= {"text", "code_inline", "softbreak", "text_special"}
    ast.parse(next(token.content for token in tokens if token.info == "python"))


def test_the_card_of_a_text_to_text_model_asks_its_prompt():
    hostile = {"template": f'"""\n```\n{HOSTILE} {{text}} {{pair}}', "words": ["'''", HOSTILE]}
    for prompt in ({"template": "sst2 sentence: {text}", "words": ["negative", "positive"]}, hostile):
        facts, tokens = rendered(model_card(CARD | {"prompt": prompt}, on_hub=True))
        code = next(token.content for token in tokens if token.info == "python")
        tree = ast.parse(code)
        call = next(
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jp.prompts.Prompt"
        )
        found = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert found == {"template": prompt["template"], "words": tuple(prompt["words"])}
        assert ("pair=" in code) == ("{pair}" in prompt["template"])
        assert "task head" not in " ".join(token.content for token in tokens) and facts["base_model"] == "owner/multi"


def shape_of(tokens: list[Token]) -> list[tuple[str, str, int]]:
    return [(token.type, token.tag, token.level) for token in tokens]


def test_a_folder_is_named_without_its_place():
    card = model_card(CARD | {"source": "/home/me/secret/multi/"}, on_hub=False)
    assert "`multi`" in card and "secret" not in card


@pytest.mark.parametrize("dark", [False, True])
def test_a_sweep_is_drawn(tmp_path, dark):
    rows = [
        row | {"criterion": f"{row['criterion']} {i}", "task": "a $ task"} for row in SWEPT["rows"] for i in range(5)
    ]
    for name in ("a.png", "a.svg", "b.svg"):
        pictures.sweep_figure(tmp_path / name, rows, split="dev", dark=dark)
    from matplotlib.image import imread

    corner = tuple(round(255 * float(part)) for part in imread(tmp_path / "a.png")[0, 0])
    assert corner == ((20, 23, 28, 255) if dark else (255, 255, 255, 255))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("variants", [("dense", "random"), ("dense",)])
def test_a_picture_is_drawn(tmp_path, variants):
    units = {"0": {"heads": [1, 0, 1], "neurons": [1] * 5 + [0] * 4}, "decoder 1": {"heads": [], "neurons": []}}
    pictures.comparison_figure(tmp_path / "a.png", ROWS, variants, units, title="what is shown")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
    assert (width, height) == (1320, 552)


def test_tables_need_neither_arrays_nor_matplotlib():
    code = "import sys, jaxprune.cli.render.tables; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"jax", "numpy", "matplotlib"} == set()

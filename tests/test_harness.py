"""lm-evaluation-harness asks a pruned decoder what it asks transformers' models (make test-reference)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_decoders import ANSWERS
from tiny import random_gates, tiny_model

import jaxprune as jp

pytestmark = pytest.mark.reference
lm_eval: Any = pytest.importorskip("lm_eval")
HARNESS = "jaxprune.evaluation.harness"

CHOICES = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITES = """task: writes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
READS = """task: reads
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder with random widths, and as transformers can load it."""
    place = tmp_path_factory.mktemp("harness")
    model, params = tiny_model("llama")
    model = replace(model, source=ANSWERS)
    small = jp.compact(model, params, random_gates(model, params, seed=3))
    jp.save(place / "small", model, small)
    jp.export(place / "plain", *jp.load(place / "small"))
    rows = [
        {"question": f"the {thing} is", "choices": [" red", " blue as the sea", " green"], "label": i % 3}
        for i, thing in enumerate(("sky", "grass in a wet spring", "wall", "old car of my uncle", "sea"))
    ]
    rows = [
        row | {"text": " ".join([row["question"], *row["choices"]] * (4 + 9 * (i == 2)))} for i, row in enumerate(rows)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "tasks").mkdir()
    for name, text in (("colours", CHOICES), ("writes", WRITES), ("reads", READS)):
        (place / "tasks" / f"{name}.yaml").write_text(text.format(rows=place / "rows.jsonl"))
    return place


def asked(place: Path, model: str, arguments: str) -> dict[str, Any]:
    """What the harness says of a model: metrics, and the answers to every row."""
    __import__("lm_eval.models")  # makes them known
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    __import__(HARNESS)
    found: Any = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["colours", "writes", "reads"],
        task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_harness_finds_what_it_finds_of_the_export_in_transformers(uneven: Path):
    ours = asked(uneven, "jaxprune", f"path={uneven / 'small'}")
    theirs = asked(uneven, "hf", f"pretrained={uneven / 'plain'},dtype=float32")
    for task in ("colours", "writes", "reads"):
        mine, other = ({s["doc_id"]: s["resps"] for s in found["samples"][task]} for found in (ours, theirs))
        assert mine.keys() == other.keys() == {*range(5)}
        for row, answers in mine.items():
            if task == "writes":
                assert answers == other[row]
                continue
            values, expected = (
                np.array([np.ravel(each[0])[0] for each in found], float) for found in (answers, other[row])
            )
            np.testing.assert_allclose(values, expected, rtol=1e-4)
        metrics = [name for name in theirs["results"][task] if "," in name and "stderr" not in name]
        assert metrics
        for name in metrics:
            assert ours["results"][task][name] == pytest.approx(theirs["results"][task][name], rel=1e-4)


def test_its_command_line(uneven: Path):
    done = subprocess.run(
        [sys.executable, "-m", HARNESS, "run", "--model", "jaxprune", "--model_args", f"path={uneven / 'small'}",
         "--tasks", "colours", "--include_path", str(uneven / "tasks"), "--batch_size", "2"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|colours" in done.stdout and "acc_norm" in done.stdout


def test_long_contexts_lose_their_beginning(uneven: Path):
    harness = __import__(HARNESS, fromlist=["HarnessModel"])
    own = harness.HarnessModel(path=str(uneven / "small"), batch_size=2)
    most = own.model.max_length
    tokens = [5 + i % 20 for i in range(3 * most)]
    whole = own._loglikelihood_tokens([("", tokens, [7, 8]), ("", [5], tokens), ("", [6], [9])], disable_tqdm=True)
    cut = own._loglikelihood_tokens(
        [("", tokens[-(most - 1) :], [7, 8]), ("", tokens[-most - 1 : -most], tokens[-most:])], disable_tqdm=True
    )
    np.testing.assert_allclose([whole[0][0], whole[1][0]], [each[0] for each in cut], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pretrained": "x"}, "model_args of jaxprune have no pretrained"),
        ({"batch_size": "auto"}, "batch_size must be a positive number, got 'auto'"),
    ],
)
def test_settings_that_it_does_not_know(uneven: Path, arguments, says):
    harness = __import__(HARNESS, fromlist=["HarnessModel"])
    with pytest.raises(ValueError, match=says):
        harness.HarnessModel(path=str(uneven / "small"), **arguments)


def test_an_encoder_is_refused():
    harness = __import__(HARNESS, fromlist=["HarnessModel"])
    with pytest.raises(ValueError, match="is a bert model: the harness asks decoders alone"):
        harness.HarnessModel(path=str(jp.bundled_model()))

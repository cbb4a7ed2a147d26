"""Scores on four devices equal those on one. The four are forced on the host, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxprune.scoring.scores import load_scores

SCRIPT = """
import dataclasses, sys
from pathlib import Path

import conftest  # strict dtype promotion
import jax
from test_likelihood import ANSWERS
from test_scores import HEADS, WORDS, texts
from tiny import tiny_model

from jaxprune.scoring.objectives import calibration_means
from jaxprune.scoring.attribution import GradientActivation, IntegratedGradients
from jaxprune.scoring.criteria import LeaveOneOut
from jaxprune.scoring.objectives import every, margin, sampled
from jaxprune.data.prompts import Prompt
from jaxprune.scoring.scores import save_scores
from jaxprune.scoring.run import Scoring, score
from jaxprune.data.tasks import Rows, Task

assert len(jax.devices()) == 4, jax.devices()
model, params = tiny_model(layers=1, heads=HEADS)
model = dataclasses.replace(model, source=WORDS)
task = Task(name="moods", splits={"calibration": texts(30)}, labels=("sad", "glad"))
text, weights = tiny_model("t5", layers=1)
text = dataclasses.replace(text, source=ANSWERS)
asked = dataclasses.replace(task, prompt=Prompt(template="mood {text}", words=("bad", "very good")))
models = {"answers": (text, weights, asked)}
criteria = {
    "answers": IntegratedGradients(nodes=2, labels=every),
    "integrated": IntegratedGradients(nodes=3, chunk=2),
    "drawn": GradientActivation(labels=sampled, closed=calibration_means, objective=margin),
    "leave_one_out": LeaveOneOut(chunk=2),
}
for name, criterion in criteria.items():
    for devices in (jax.devices()[:1], jax.devices()):
        # 13 examples in batches of 6, rounded up to 8: a device gets two rows, some of them only padding
        own = models.get(name, (model, params, task))
        found = score(*own, Scoring(criterion=criterion, rows=Rows(examples=13, batch_size=6)), devices=devices)
        assert all(len(value.devices()) == len(devices) for value in found.values.values()), name
        save_scores(Path(sys.argv[1]) / f"{name}-{len(devices)}", found)
"""
NAMES = ("answers", "integrated", "drawn", "leave_one_out")


@pytest.mark.slow
def test_scores_on_four_devices_equal_those_on_one(tmp_path: Path):
    here = Path(__file__).parent
    paths = os.pathsep.join(
        [str(here), str(here.parent), str(here.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in NAMES:
        one, four = (load_scores(tmp_path / f"{name}-{count}") for count in (1, 4))
        assert one.values.keys() == four.values.keys()
        for site, value in one.values.items():
            np.testing.assert_allclose(four.values[site], value, rtol=1e-4, atol=1e-6)
            assert one.variance is not None and four.variance is not None
            np.testing.assert_allclose(four.variance[site], one.variance[site], rtol=1e-3, atol=1e-8)
            assert one.halves is not None and four.halves is not None
            np.testing.assert_allclose(four.halves[site], one.halves[site], rtol=1e-4, atol=1e-6)
        for site, mean in (one.means or {}).items():
            np.testing.assert_allclose((four.means or {})[site], mean, rtol=1e-5, atol=1e-6)
        assert one.rows == four.rows and one.header["halves"] == four.header["halves"]
        for field, value in (one.header["completeness"] or {}).items():
            assert four.header["completeness"][field] == pytest.approx(value, rel=1e-4, abs=1e-6)

"""The protocol of criteria: one that is defined here works everywhere with nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_scores import HEADS, WORDS, texts
from tiny import tiny_model

from jaxprune.data.tasks import Rows, Task
from jaxprune.models import Model
from jaxprune.pruning.budgets import Rules, Units
from jaxprune.pruning.inspection import Sweeping, combinations
from jaxprune.pruning.loss import predict_loss
from jaxprune.pruning.prune import check_scope
from jaxprune.pruning.selection import pruning_record, select
from jaxprune.scoring.attribution import Criterion, Measured
from jaxprune.scoring.criteria import Random
from jaxprune.scoring.objectives import margin, signed
from jaxprune.scoring.run import Scoring, score
from jaxprune.scoring.scores import load_scores, objective_name, properties_of, save_scores
from jaxprune.units import Params, widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descending(Criterion):
    """The first units of a layer are worth the most, in every example alike."""

    step: float = 0.5
    examples = signed
    objective = margin
    by_layer = False
    seeded = False
    meaning = "by its place"

    def __call__(self, model: Model, params: Params, batch: Mapping[str, Any], context: Any = None) -> Measured:
        rows = batch["input_ids"].shape[0]
        sizes = widths(model.axes, params, self.kinds)
        return Measured(
            {site: jnp.tile(-self.step * jnp.arange(n, dtype=jnp.float32), (rows, 1)) for site, n in sizes.items()}, {}
        )


@pytest.fixture(scope="module")
def model_and_params() -> tuple[Model, Params]:
    model, params = tiny_model(layers=1, heads=HEADS)
    return dataclasses.replace(model, source=WORDS), params


def test_a_criterion_of_ones_own_goes_all_the_way(model_and_params: tuple[Model, Params], tmp_path: Path):
    model, params = model_and_params
    task = Task(name="moods", splits={"calibration": texts(9)}, labels=("sad", "glad"))
    scoring = Scoring(criterion=Descending(step=0.25), rows=Rows(examples=8, batch_size=4))
    made = score(model, params, task, scoring)
    scores = load_scores(save_scores(tmp_path / "scores.safetensors", made))
    assert scores.header == made.header and scores.rows == made.rows and len(scores.rows) == 8
    assert list(scores.values) == list(made.values)  # in the same order, so that records have the same bytes
    assert json.dumps(scores.header) == json.dumps(made.header)
    np.testing.assert_allclose(scores.values["0.attention.heads"], [0, -0.25, -0.5, -0.75], atol=1e-7)
    assert scores.header["criterion"] == {"name": "Descending", "step": 0.25}
    assert objective_name(scores, model.head("moods")) == "margin"

    gates = select(model, params, scores, Units(0.5), rules=Rules(allocation="per_layer"))
    assert np.asarray(gates["0.attention.heads"]).tolist() == [1, 1, 0, 0]
    record = pruning_record(scores, gates, Units(0.5))
    assert record["scores"]["criterion"]["name"] == "Descending" and record["units"]["kept"] == 18

    for properties in (properties_of(scoring.criterion), scores.properties):  # before and after the work
        with pytest.raises(ValueError, match="let all layers compete"):
            check_scope(properties, Rules(allocation="per_layer"))
        check_scope(properties, Rules(allocation="global"))
    sweeping = Sweeping(criteria={"own": Descending(), "random": Random()}, seeds=3, budgets=(0.5,))
    assert len(combinations(["moods"], sweeping)) == 1 + 3
    assert predict_loss(scores, gates).meaning.startswith("by its place")

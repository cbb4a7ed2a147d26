"""Every kernel lowers for TPU and CUDA from a machine that has neither: nothing depends on one backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from tiny import tiny_model

from jaxprune.evaluation.text import generate
from jaxprune.models import TaskHead
from jaxprune.models.layers import max_tokens
from jaxprune.scoring import run as totals
from jaxprune.scoring.attribution import GradientActivation, IntegratedGradients, layer
from jaxprune.scoring.criteria import BlockInfluence, Fisher, Gradient, LeaveOneOut, Wanda
from jaxprune.scoring.objectives import every, margin, maximum, site_statistics, token_sum

HEADS = (TaskHead(name="task", labels=("no", "maybe", "yes"), dense="tanh"),)


@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(
    ("criterion", "layers"),
    [
        (IntegratedGradients(nodes=3, chunk=2), 2),  # embedding, blocks there and back, readout, quadrature
        (IntegratedGradients(nodes=1, path=layer, labels=every, objective=margin), 1),
        (GradientActivation(tokens=max_tokens, examples=maximum), 1),
        (Fisher(), 1),
        (Gradient(), 1),
        (Wanda(), 1),
        (BlockInfluence(), 1),
        (LeaveOneOut(chunk=2), 1),
    ],
)
def test_a_batch_of_every_criterion_lowers(criterion: Any, layers: int, dtype: Any):
    """From the tokens to the running totals, in one program."""
    model, params = tiny_model(layers=layers, heads=HEADS)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    tokens, row = jax.ShapeDtypeStruct((4, 9), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = dict.fromkeys(names, tokens) | {"labels": row, "index": row}

    def run(params: Any, batch: Any, weight: Any) -> Any:
        found = criterion(model, params, batch)
        largest = criterion.examples.largest
        return totals.add(largest, totals.nothing(largest, found), found, weight, weight)

    exported = export.export(jax.jit(run), platforms=("tpu", "cuda"))
    assert exported(params, batch, jax.ShapeDtypeStruct((4,), jnp.float32)).platforms == ("tpu", "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "criterion",
    [
        IntegratedGradients(nodes=2),
        GradientActivation(labels=every, tokens=max_tokens, kinds=("channels", "query_channels", "neurons")),
        Wanda(),
    ],
)
def test_a_batch_of_a_text_to_text_model_lowers(criterion: Any, dtype: Any):
    """Encoder, decoder and the attention between them, with the answers of every row."""
    model, params = tiny_model("mt5", layers=1)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    tokens, row = jax.ShapeDtypeStruct((4, 9), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    batch = {"input_ids": tokens, "attention_mask": tokens, "labels": row, "index": row}
    batch["candidates"] = jax.ShapeDtypeStruct((4, 2, 3), jnp.int32)

    def run(params: Any, batch: Any) -> Any:
        return criterion(model, params, batch)

    exported = export.export(jax.jit(run), platforms=("tpu", "cuda"))
    assert exported(params, batch).platforms == ("tpu", "cuda")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_generation_lowers(dtype: Any):
    model, params = tiny_model("t5", layers=1)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    batch = dict.fromkeys(("input_ids", "attention_mask"), jax.ShapeDtypeStruct((4, 9), jnp.int32))

    def run(params: Any, batch: Any) -> Any:
        return generate(model, params, batch, max_new_tokens=5)

    assert export.export(jax.jit(run), platforms=("tpu", "cuda"))(params, batch).platforms == ("tpu", "cuda")


def test_calibration_means_lower():
    model, params = tiny_model(layers=1)
    tokens = jax.ShapeDtypeStruct((4, 9), jnp.int32)
    batch = dict.fromkeys(("input_ids", "attention_mask"), tokens)

    def run(params: Any, batch: Any) -> Any:
        return site_statistics(model, params, batch, token_sum)

    export.export(jax.jit(run), platforms=("tpu", "cuda"))(params, batch)

"""The laws for models that answer in text, and what is theirs alone: relative positions, shared tables, two stacks."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cost import dot_flops
from tiny import TEXT_TYPES, random_gates, tiny_batch, tiny_config, tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.tensors import params_digest
from jaxprune.compaction import compact
from jaxprune.models import BlockSettings, Mask, Model, State, family
from jaxprune.models.cost import flops
from jaxprune.models.running import Gradients, Prefix, forward
from jaxprune.models.t5 import bucket_of
from jaxprune.pruning.budgets import Flops, Rules
from jaxprune.pruning.latency import compare_latency, latency
from jaxprune.pruning.selection import select
from jaxprune.scoring.attribution import IntegratedGradients, joint, layer
from jaxprune.scoring.objectives import log_probability, signed
from jaxprune.scoring.run import score_batches
from jaxprune.training.loop import share_gradients
from jaxprune.units import Gates, Intervention, Params, flatten, open_gates, sites, subtree, unflatten, widths


def logits(model: Model, params: Params, batch: Any, gates: Gates | None = None) -> np.ndarray:
    """The logits where the decoder has a token."""
    found = model.apply(params, batch, gates).logits
    assert found is not None
    return np.asarray(found)[batch["decoder_attention_mask"] > 0]


def asked(model: Model, labels: int = 3, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """A batch with answers to choose from, of one to three tokens and the end of sequence."""
    random = np.random.default_rng(seed)
    batch = {name: array for name, array in tiny_batch(model, **sizes).items() if "decoder" not in name}
    rows = len(batch["input_ids"])
    candidates = np.full((labels, 4), -100)
    for i, row in enumerate(candidates):
        row[: i % 3 + 2] = [*random.choice(np.arange(2, 60), i % 3 + 1, replace=False), 1]
    return batch | {
        "candidates": np.broadcast_to(candidates, (rows, *candidates.shape)).astype(np.int32),
        "labels": random.integers(labels, size=rows).astype(np.int32),
    }


def gentle(params: Params) -> Params:
    """The same parameters, smaller: paths without cliffs, on which few nodes are enough."""
    return unflatten({p: 0.4 * a if p[-1] == "kernel" else a for p, a in flatten(params).items()})


# The laws


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_compaction_keeps_the_function(model_type: str, fractional: bool):
    for seed in range(3):
        model, params = tiny_model(model_type, seed=seed)
        batch, gates = tiny_batch(model, seed=seed), random_gates(model, params, seed, fractional)
        expected = logits(model, params, batch, gates)
        found = logits(model, compact(model, params, gates), batch)
        assert np.abs(expected - logits(model, params, batch)).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_modules_without_units_are_skipped(model_type: str, kind: str):
    model, params = tiny_model(model_type)
    batch = tiny_batch(model)
    gates = {name: jnp.zeros(n) for name, n in widths(model.axes, params).items() if name.endswith(kind)}
    small = compact(model, params, gates)
    assert {n for name, n in widths(model.axes, small).items() if name.endswith(kind)} == {0}
    expected = logits(model, params, batch, gates)
    np.testing.assert_allclose(logits(model, small, batch), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    table = small["encoder"]["layers"][0]["attention"]["relative"]["embedding"]
    assert table.shape == ((8, 0) if kind == "heads" else (8, 4))  # a head takes its column along


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_gradient_times_activation(model_type: str):
    """A gate's gradient is `sum h dh`, which the reading kernel knows, too: `W dW` summed over what it writes."""
    model, params = tiny_model(model_type)
    batch = tiny_batch(model)
    toward = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 60)), jnp.float32)
    toward = toward * batch["decoder_attention_mask"][..., None].astype(np.float32)
    _, pull = forward(
        model,
        params,
        batch,
        Intervention(open_gates(model, params)),
        gradients=Gradients(weights=True),
    )
    gates, grads = pull(toward)
    assert grads is not None and list(gates) == list(widths(model.axes, params))
    for site in sites(model.axes, params):
        reader = "down" if site.kind == "neurons" else "out"
        kernel, slope = (subtree(tree, (*site.module, reader, "kernel")) for tree in (params, grads))
        expected = (kernel * slope).reshape(len(kernel), -1).sum(1)
        np.testing.assert_allclose(gates[site.name], expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.reference  # whole-program gradients of two stacks take long to compile
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_gradients_block_by_block_equal_those_of_apply(model_type: str):
    model, params = tiny_model(model_type)
    batch, gates = tiny_batch(model), random_gates(model, params, fractional=True)
    toward = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 60)), jnp.float32)

    def total(gates: Gates, params: Params) -> jax.Array:
        found = model.apply(params, batch, gates).logits
        assert found is not None
        return (found * toward).sum()

    expected = jax.jit(jax.grad(total, (0, 1)))(gates, params)
    found = forward(model, params, batch, Intervention(gates), gradients=Gradients(weights=True))[1](toward)
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-3, atol=1e-4 * (1e-3 + float(jnp.abs(other).max())))


@pytest.mark.parametrize("path", [joint, layer])
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_completeness(model_type: str, path: Any):
    model, params = tiny_model(model_type, layers=1)
    params, batch = gentle(params), asked(model)
    errors = []
    for nodes in (4, 24):
        criterion = IntegratedGradients(nodes=nodes, path=path, objective=log_probability, examples=signed)
        found = criterion(model, params, batch).completeness
        errors.append(float(found["error"].mean() / found["size"].mean()))
    rounding = 1e-5  # of sums in float32: all that is left where four nodes are enough
    assert errors[1] < 2e-3 and errors[1] < max(errors[0], rounding)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_padding_reordering_and_splitting_change_nothing(model_type: str):
    model, params = tiny_model(model_type, layers=1)
    batch, criterion = asked(model, rows=4), IntegratedGradients(nodes=3, examples=signed)
    expected = {name: np.asarray(rows) for name, rows in criterion(model, params, batch).scores.items()}
    order = np.array([2, 0, 3, 1])
    moved = {name: array[order] for name, array in batch.items()}
    wide = dict(batch)
    for name in ("input_ids", "attention_mask"):
        wide[name] = np.pad(batch[name], [(0, 0), (0, 3)])
    wide["candidates"] = np.pad(batch["candidates"], [(0, 0), (0, 0), (0, 2)], constant_values=-100)
    halves = [{name: array[part] for name, array in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    parts = [criterion(model, params, half).scores for half in halves]
    for name, rows in expected.items():
        scale = np.abs(rows).max() + 1e-6
        np.testing.assert_allclose(criterion(model, params, moved).scores[name], rows[order], atol=1e-4 * scale)
        np.testing.assert_allclose(criterion(model, params, wide).scores[name], rows, atol=1e-4 * scale)
        np.testing.assert_allclose(np.concatenate([own[name] for own in parts]), rows, atol=1e-4 * scale)
    whole = score_batches(model, params, [batch], criterion)[0]
    for name, rows in expected.items():
        np.testing.assert_allclose(whole[name], rows.mean(0), rtol=1e-4, atol=1e-5 * (np.abs(rows).max() + 1e-6))


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_save_then_load_is_bit_exact(model_type: str, tmp_path: Path):
    model, params = tiny_model(model_type)
    small = compact(model, params, random_gates(model, params))
    again, loaded = load(save(tmp_path / "model", model, small))
    assert again == model and params_digest(loaded) == params_digest(small)
    batch = tiny_batch(model)
    np.testing.assert_array_equal(logits(again, loaded, batch), logits(model, small, batch))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_flops_are_those_of_the_program(model_type: str, seed: int):
    model, params = tiny_model(model_type, seed=seed)
    small = compact(model, params, random_gates(model, params, seed) | {"decoder.1.cross.heads": np.zeros(4)})
    read, written = 7 + seed, 3
    hidden, memory = jnp.ones((1, written, 16)), jnp.ones((1, read, 16))
    states = {"encoder": State(memory), "decoder": State(hidden, memory)}
    masks = {
        "encoder": Mask(jnp.ones((1, read), bool)),
        "decoder": Mask(jnp.ones((1, written), bool), jnp.ones((1, read), bool)),
    }
    for tree in (params, small):
        found = sum(
            dot_flops(
                jax.make_jaxpr(
                    lambda p, s=stack: model.block(p, states[s], masks[s], settings=BlockSettings(kind=s))[0].hidden
                )(own).jaxpr
            )
            for stack in states
            for own in tree[stack]["layers"].values()
        )
        assert flops(model, tree, (read, written)) == found
    with pytest.raises(ValueError, match="length must be two numbers, tokens read and tokens written, got 8"):
        flops(model, params, 8)


def test_a_flops_budget_is_the_largest_below_it():
    model, params = tiny_model("t5")
    random = np.random.default_rng(0)
    scores = {name: random.random(n) for name, n in widths(model.axes, params).items()}
    for allocation in ("per_layer", "global"):
        kept = []
        for budget in (0.3, 0.5, 0.8):
            gates = select(model, params, scores, Flops(budget, length=(9, 3)), rules=Rules(allocation=allocation))
            small = compact(model, params, gates)
            assert flops(model, small, (9, 3)) <= budget * flops(model, params, (9, 3))
            kept.append({name: set(np.flatnonzero(gate)) for name, gate in gates.items()})
        assert all(one[name] <= two[name] for one, two in pairwise(kept) for name in one)


# What is theirs alone


def test_buckets_of_relative_positions_by_hand():
    """32 buckets both ways up to 128: single positions to 7, then eight that grow, the last for all beyond."""
    distance = np.array([0, -1, -7, -8, -12, -127, -500, 1, 7, 8, 127, 500])
    found = bucket_of(distance, 32, 128, both_ways=True)
    assert found.tolist() == [0, 1, 7, 8, 9, 15, 15, 17, 23, 24, 31, 31]
    one_way = bucket_of(np.array([3, 0, -1, -15, -16, -31, -127, -1000]), 32, 128, both_ways=False)
    assert one_way.tolist() == [0, 0, 1, 15, 16, 16 + int(math.log(31 / 16) / math.log(8) * 16), 31, 31]


def test_a_decoder_sees_nothing_to_its_right_and_no_padding():
    model, params = tiny_model("t5")
    batch = tiny_batch(model)
    whole = np.asarray(model.apply(params, batch).logits)
    changed = {name: array.copy() for name, array in batch.items()}
    changed["decoder_input_ids"][:, 3] = 7
    found = np.asarray(model.apply(params, changed).logits)
    np.testing.assert_array_equal(found[:, :3], whole[:, :3])
    assert np.abs(found[0, 3] - whole[0, 3]).max() > 0.01
    changed = {name: array.copy() for name, array in batch.items()}
    changed["input_ids"][batch["attention_mask"] == 0] = 9
    np.testing.assert_allclose(logits(model, params, changed), logits(model, params, batch), rtol=1e-5, atol=1e-5)


def test_a_forward_pass_can_start_at_any_layer():
    model, params = tiny_model("mt5")
    batch = tiny_batch(model)
    expected = np.asarray(model.apply(params, batch).logits)
    states = model.apply(params, batch, returns=("hidden",)).hidden
    assert states is not None and len(states) == 3 + 4
    np.testing.assert_allclose(
        forward(model, params, batch, prefix=Prefix(State(states[1]), 1))[0], expected, rtol=1e-5, atol=1e-5
    )
    gates = random_gates(model, params, fractional=True)
    later = {name: gate for name, gate in gates.items() if name.startswith("decoder.1")}
    _, pull = forward(model, params, batch, Intervention(later))
    assert [step.layer for step in pull.steps] == ["decoder.1", "decoder.2", None]
    _, pull = forward(model, params, batch, Intervention({"encoder.1.ffn.neurons": gates["encoder.1.ffn.neurons"]}))
    assert [step.layer for step in pull.steps] == ["encoder.1", None, "decoder.0", "decoder.1", "decoder.2", None]


def test_parts_of_a_text_to_text_model():
    model, params = tiny_model("t5")
    output = model.apply(params, tiny_batch(model), returns=("sites", "scores"))
    assert output.sites is not None and list(output.sites) == list(widths(model.axes, params))
    assert output.scores is not None and len(output.scores) == 2 + 2 * 3  # decoder layers attend twice
    assert output.sites["decoder.0.cross.heads"].shape == (3, 5, 4, 3)
    assert model.heads == () and model.head().name == "language"
    with pytest.raises(ValueError, match="no task head 'task'"):
        model.head("task")


def test_tables_of_relative_positions_stay_the_same_in_all_layers():
    model, params = tiny_model("t5")
    params = model.initialise(jax.random.key(0))
    batch = tiny_batch(model)
    _, pull = forward(model, params, batch, gradients=Gradients(weights=True))
    grads = pull(jnp.ones((3, 5, 60)))[1]
    assert grads is not None
    shared = share_gradients(model, grads)
    own = [grads["decoder"]["layers"][i]["attention"]["relative"]["embedding"] for i in range(3)]
    found = [shared["decoder"]["layers"][i]["attention"]["relative"]["embedding"] for i in range(3)]
    assert np.abs(own[0] - own[1]).max() > 1e-6
    for each in found:
        np.testing.assert_allclose(each, own[0] + own[1] + own[2], rtol=1e-5, atol=1e-6)
    tables = [params["encoder"]["layers"][i]["attention"]["relative"]["embedding"] for i in range(2)]
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_kv": None}, "d_kv is None, expected a positive integer"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"feed_forward_proj": "gated-maybe"}, "feed_forward_proj is 'gated-maybe'"),
        ({"relative_attention_num_buckets": 6}, "expected a multiple of 4"),
        ({"relative_attention_max_distance": 3}, "expected more than half of the buckets"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False, supported: True, None"),
        ({"eos_token_id": 60}, "eos_token_id is 60, expected the index of a token"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0"),
    ],
)
def test_a_configuration_that_cannot_be_used(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        family("t5").parse_config(tiny_config("t5") | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_input_ids": None}, "no 'decoder_input_ids'"),
        ({"decoder_input_ids": np.ones((2, 5), int)}, "decoder_input_ids have 2 rows, input_ids have 3"),
        ({"decoder_input_ids": np.full((3, 5), 60)}, "decoder_input_ids go from 60 to 60"),
        ({"decoder_attention_mask": np.ones((3, 4))}, "decoder_attention_mask must be an array of shape"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(changes: dict[str, Any], message: str):
    model, params = tiny_model("t5")
    batch = {name: array for name, array in (tiny_batch(model) | changes).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        model.apply(params, batch)


def test_latency_reads_and_writes():
    model, params = tiny_model("t5")
    found = latency(model, params, batch=2, length=(6, 2), repeats=2, warmup=1)
    assert found.length == (6, 2) and found.median > 0
    small = compact(model, params, random_gates(model, params))
    assert len(compare_latency([(model, params), (model, small)], length=(6, 2), repeats=2).speedups) == 2


def test_nothing_is_computed_in_float16():
    model, params = tiny_model("t5")
    half = jax.tree.map(lambda array: array.astype(jnp.float16), params)
    with pytest.raises(TypeError, match="overflow in float16: load the model in float32 or bfloat16"):
        model.apply(half, tiny_batch(model))

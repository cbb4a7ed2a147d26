"""Every baseline against its formula, computed another way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import logits_of, sites_of, token_slopes
from tiny import tiny_batch, tiny_model

from jaxprune.models import Model, TaskHead
from jaxprune.scoring.attribution import Context
from jaxprune.scoring.criteria import (
    Activation,
    Fisher,
    Gradient,
    LeaveOneOut,
    Magnitude,
    Random,
    Taylor,
    TopLayers,
    Wanda,
)
from jaxprune.scoring.objectives import calibration_means, every, gold, log_probability, predicted, probability, signed
from jaxprune.scoring.run import score_batches
from jaxprune.units import Gates, Params, open_gates, sites, subtree, widths

ROWS = 4


@pytest.fixture(scope="module")
def model_and_params() -> tuple[Model, Params]:
    return tiny_model()


@pytest.fixture(scope="module")
def batch(model_and_params: tuple[Model, Params]) -> dict[str, np.ndarray]:
    return tiny_batch(model_and_params[0], ROWS) | {"labels": np.array([0, 1, 2, 1], np.int32)}


@pytest.fixture(scope="module")
def values(model_and_params: tuple[Model, Params], batch: Any) -> dict[str, list[np.ndarray]]:
    """Site name to one array `[tokens, units(, head_dim)]` per example, without padding."""
    model, params = model_and_params
    found = sites_of(model, params, batch)
    mask = batch["attention_mask"] > 0
    return {name: [np.asarray(array[i])[mask[i]] for i in range(ROWS)] for name, array in found.items()}


@pytest.fixture(scope="module")
def slopes(model_and_params: tuple[Model, Params], batch: Any) -> Gates:
    """The gradient of every example's log-likelihood with respect to gates, [labels, examples, units]."""
    model, params = model_and_params
    rows = {name: jnp.ones((ROWS, units)) for name, units in widths(model.axes, params).items()}

    @jax.jit
    def of(label: jax.Array) -> Gates:
        target = jnp.full(ROWS, label)
        return jax.grad(lambda g: log_probability(logits_of(model, params, batch, g), target).sum())(rows)

    found = [of(jnp.int32(label)) for label in range(3)]
    return {name: jnp.stack([slope[name] for slope in found]) for name in rows}


def mean_of(model_and_params: tuple[Model, Params], batch: Any, criterion: Any) -> Gates:
    return score_batches(*model_and_params, [batch], criterion)[0]


def test_random_scores_depend_on_the_key_alone(model_and_params: tuple[Model, Params]):
    model, params = model_and_params
    one, same, other = (
        score_batches(model, params, (), Random(), Context(key=jax.random.key(seed)))[0] for seed in (0, 0, 1)
    )
    assert {name: value.shape for name, value in one.items()} == {
        name: (units,) for name, units in widths(model.axes, params).items()
    }
    for name, value in one.items():
        np.testing.assert_array_equal(value, same[name])
        assert (np.asarray(value) != np.asarray(other[name])).any()
        assert 0 <= float(value.min()) < float(value.max()) < 1


def test_magnitude_is_the_product_of_two_norms(model_and_params: tuple[Model, Params]):
    model, params = model_and_params
    found = score_batches(model, params, (), Magnitude())[0]
    for layer, own in params["layers"].items():
        up, down = np.asarray(own["ffn"]["up"]["kernel"]), np.asarray(own["ffn"]["down"]["kernel"])
        expected = [np.linalg.norm(up[:, i]) * np.linalg.norm(down[i]) for i in range(up.shape[1])]
        np.testing.assert_allclose(found[f"{layer}.ffn.neurons"], expected, rtol=1e-5)
        attention = own["attention"]
        makes = np.concatenate([np.asarray(attention[part]["kernel"]) for part in ("query", "key", "value")], axis=2)
        out = np.asarray(attention["out"]["kernel"])
        expected = [np.linalg.norm(makes[:, i]) * np.linalg.norm(out[i]) for i in range(out.shape[0])]
        np.testing.assert_allclose(found[f"{layer}.attention.heads"], expected, rtol=1e-5)


def test_top_layers_go_first():
    model, params = tiny_model(layers=3, embed=16)
    found = score_batches(model, params, (), TopLayers())[0]
    assert {site.name: set(np.asarray(found[site.name]).tolist()) for site in sites(model.axes, params)} == {
        site.name: {3.0 - site.layer} for site in sites(model.axes, params)
    }
    assert not TopLayers.per_cost and not TopLayers.by_layer


def test_activation_is_the_mean_size(model_and_params: tuple[Model, Params], batch: Any, values: Any):
    found = mean_of(model_and_params, batch, Activation())
    for name, examples in values.items():
        sizes = [np.linalg.norm(v, axis=-1) if v.ndim == 3 else np.abs(v) for v in examples]
        np.testing.assert_allclose(found[name], np.mean([size.mean(0) for size in sizes], axis=0), rtol=1e-5)


def test_wanda_is_the_mean_square_times_the_reading_weights(
    model_and_params: tuple[Model, Params], batch: Any, values: Any
):
    model, params = model_and_params
    found = mean_of(model_and_params, batch, Wanda())
    for site in sites(model.axes, params):
        square = np.mean([(v**2).mean(0) for v in values[site.name]], axis=0)
        reader = subtree(params, (*site.module, "out" if site.kind == "heads" else "down", "kernel"))
        expected = square * (np.asarray(reader) ** 2).sum(-1)
        np.testing.assert_allclose(found[site.name], expected.reshape(square.shape[0], -1).sum(1), rtol=1e-5)


def test_wanda_about_the_means_is_a_fluctuation(model_and_params: tuple[Model, Params], batch: Any, values: Any):
    model, params = model_and_params
    criterion = Wanda(closed=calibration_means)
    means = calibration_means(model, params, [batch])
    found = criterion(model, params, batch, Context(means=means)).scores
    for site in sites(model.axes, params):
        mean = np.concatenate(values[site.name]).mean(0)
        square = np.mean([((v - mean) ** 2).mean(0) for v in values[site.name]], axis=0)
        reader = subtree(params, (*site.module, "out" if site.kind == "heads" else "down", "kernel"))
        expected = (square * (np.asarray(reader) ** 2).sum(-1)).reshape(square.shape[0], -1).sum(1)
        np.testing.assert_allclose(found[site.name].mean(0), expected, rtol=1e-4)


def test_gradient_is_the_mean_size_over_the_tokens(model_and_params: tuple[Model, Params], batch: Any):
    model, params = model_and_params
    found = mean_of(model_and_params, batch, Gradient())
    labels, mask = jnp.asarray(batch["labels"]), batch["attention_mask"][..., None]
    slopes = token_slopes(model, params, batch, lambda logits: log_probability(logits, labels).sum())
    for name, slope in slopes.items():
        size = np.linalg.norm(slope, axis=-1) if slope.ndim == 4 else np.abs(slope)
        expected = ((size * mask).sum(1) / mask.sum(1)).mean(0)
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-7)


def test_taylor_is_the_mean_absolute_gate_gradient(model_and_params: tuple[Model, Params], batch: Any, slopes: Gates):
    found = mean_of(model_and_params, batch, Taylor())
    for name, slope in slopes.items():
        own = slope[batch["labels"], jnp.arange(ROWS)]
        np.testing.assert_allclose(found[name], jnp.abs(own).mean(0), rtol=1e-4, atol=1e-6)


def test_fisher_is_the_mean_square_per_example(model_and_params: tuple[Model, Params], batch: Any, slopes: Gates):
    model, params = model_and_params
    own = mean_of(model_and_params, batch, Fisher(labels=gold))
    exact = mean_of(model_and_params, batch, Fisher(labels=every))
    weights = jax.nn.softmax(logits_of(model, params, batch)).T
    for name, slope in slopes.items():
        picked = slope[batch["labels"], jnp.arange(ROWS)]
        np.testing.assert_allclose(own[name], jnp.square(picked).mean(0), rtol=1e-4, atol=1e-6)
        expected = (weights[..., None] * jnp.square(slope)).sum(0).mean(0)
        np.testing.assert_allclose(exact[name], expected, rtol=1e-4, atol=1e-6)


def test_fisher_with_drawn_labels_is_near_its_exact_mean(model_and_params: tuple[Model, Params], batch: Any):
    many = {name: np.repeat(array, 100, axis=0) for name, array in batch.items()}
    many["index"] = np.arange(100 * ROWS, dtype=np.int32)
    drawn, exact = (mean_of(model_and_params, many, Fisher(labels=labels)) for labels in (Fisher().labels, every))
    total, expected = (sum(float(v.sum()) for v in found.values()) for found in (drawn, exact))
    assert total == pytest.approx(expected, rel=0.2)  # 400 draws


@pytest.mark.parametrize("criterion", [Gradient(), Taylor(), Fisher(labels=gold)])
def test_gradients_of_a_regression_are_of_the_squared_error(criterion: Any):
    model, params = tiny_model(layers=1, heads=(TaskHead(name="task", labels=("score",), regression=True),))
    batch = tiny_batch(model) | {"labels": np.array([0.5, -1.0, 2.0], np.float32)}
    found = criterion(model, params, batch).scores
    far = criterion(model, params, batch | {"labels": batch["labels"] + 100}).scores
    assert all(float(far[name].sum()) > float(found[name].sum()) for name in found)


@pytest.mark.parametrize("chunk", [3, 8])
def test_leave_one_out_is_what_removing_a_head_does(model_and_params: tuple[Model, Params], batch: Any, chunk: int):
    model, params = model_and_params
    found = LeaveOneOut(chunk=chunk, examples=signed)(model, params, batch).scores
    ones, target = open_gates(model, params), jnp.asarray(batch["labels"])
    end = probability(logits_of(model, params, batch, ones), target)
    assert set(found) == {"0.attention.heads", "1.attention.heads"}
    for name, lost in found.items():
        for head in range(4):
            without = logits_of(model, params, batch, ones | {name: ones[name].at[head].set(0.0)})
            np.testing.assert_allclose(lost[:, head], end - probability(without, target), atol=1e-5)


def test_leave_one_out_with_means_and_without_labels(model_and_params: tuple[Model, Params], batch: Any):
    model, params = model_and_params
    means = calibration_means(model, params, [batch])
    criterion = LeaveOneOut(labels=predicted, objective=log_probability, examples=signed)
    lost = criterion(model, params, batch, Context(means=means)).scores["1.attention.heads"]
    gates, logits = open_gates(model, params), logits_of(model, params, batch)
    gates["1.attention.heads"] = jnp.array([1.0, 1.0, 0.0, 1.0])
    target = logits.argmax(1)
    without = log_probability(logits_of(model, params, batch, gates, means=means), target)
    np.testing.assert_allclose(lost[:, 2], log_probability(logits, target) - without, atol=1e-5)


def test_leave_one_out_refuses_an_empty_chunk():
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        LeaveOneOut(chunk=0)

"""Laws 2, 3, 4 and 7: what attributions of units are, what they sum to, and what does not change them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import logits_of, sites_of, token_slopes
from tiny import NUMERIC_TYPES, tiny_batch, tiny_model

from jaxprune.models import Model, TaskHead, bert
from jaxprune.models.layers import absolute_tokens, contribution, max_tokens, squared_tokens, sum_tokens
from jaxprune.scoring.attribution import (
    Context,
    GradientActivation,
    IntegratedGradients,
    gauss_legendre,
    integrate,
    joint,
    layer,
    quadrature,
    riemann,
    trapezoid,
)
from jaxprune.scoring.criteria import BlockInfluence
from jaxprune.scoring.objectives import (
    absolute,
    calibration_means,
    every,
    gold,
    log_probability,
    margin,
    maximum,
    negative_squared_error,
    predicted,
    probability,
    sampled,
    signed,
    squared,
)
from jaxprune.scoring.run import score_batches
from jaxprune.units import UNITS, Gates, Params, axes_of, flatten, open_gates, sites, unflatten

SMOOTH = (TaskHead(name="task", labels=("no", "maybe", "yes"), dense="tanh"),)  # DistilBERT's has a kink, its ReLU
REGRESSION = (TaskHead(name="task", labels=("score",), regression=True, pooling="mean"),)


def labelled(model: Model, rows: int = 4, length: int = 9, seed: int = 0, labels: int = 3) -> dict[str, np.ndarray]:
    batch = tiny_batch(model, rows, length, seed)
    return batch | {"labels": (np.arange(rows) % labels).astype(np.int32)}


def objective_of(model: Model, params: Params, batch: Any, gates: Gates, objective: Any = probability) -> jax.Array:
    """The objective of every example, by `Model.apply`."""
    return objective(logits_of(model, params, batch, gates), jnp.asarray(batch["labels"]))


def cut(batch: dict[str, np.ndarray], rows: Any) -> dict[str, np.ndarray]:
    return {name: array[rows] for name, array in batch.items()}


def padded(batch: dict[str, np.ndarray], *, tokens: int = 0, rows: int = 0) -> dict[str, np.ndarray]:
    """The batch with more padding tokens, and padding rows of weight 0."""
    weight = np.ones(len(batch["labels"]), np.float32)
    wide = {name: np.pad(array, [(0, rows), *[(0, tokens)] * (array.ndim - 1)]) for name, array in batch.items()}
    return wide | {"weight": np.pad(weight, (0, rows))}


def without_units(params: Params, kind: str) -> Params:
    """The parameters of a BERT, with no units of one kind in the first layer."""
    flat = flatten(params)
    for path, array in flat.items():
        axes = axes_of(bert.AXES, path)
        if kind in axes and path[1] == 0:
            flat[path] = jnp.take(array, jnp.arange(0), axis=axes.index(kind))
    return unflatten(flat)


# Law 2


@pytest.mark.parametrize("model_type", NUMERIC_TYPES)
def test_gradient_times_activation(model_type: str):
    model, params = tiny_model(model_type)
    batch = labelled(model)
    found = GradientActivation(examples=signed)(model, params, batch).scores
    labels = jnp.asarray(batch["labels"])
    slopes = token_slopes(model, params, batch, lambda logits: probability(logits, labels).sum())
    values = sites_of(model, params, batch)
    for name, slope in slopes.items():
        product = np.where(batch["attention_mask"][..., None] > 0, contribution(values[name], slope), 0.0)
        np.testing.assert_allclose(found[name], product.sum(1), rtol=1e-4, atol=1e-6)


def test_token_reductions_by_hand():
    values = jnp.array([[[1.0, 2.0], [3.0, -4.0], [9.0, 9.0]]])  # one example, three tokens, two units
    cotangent = jnp.array([[[1.0, 1.0], [-2.0, 1.0], [9.0, 9.0]]])
    mask = jnp.array([[True, True, False]])
    expected = {sum_tokens: [-5, -2], absolute_tokens: [7, 6], squared_tokens: [37, 20], max_tokens: [1, 2]}
    for reduction, numbers in expected.items():
        np.testing.assert_array_equal(reduction(values, cotangent, mask)[0], numbers)


def test_token_reductions_equal_those_of_explicit_tokens():
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    labels, mask = jnp.asarray(batch["labels"]), jnp.asarray(batch["attention_mask"]) > 0
    slopes = token_slopes(model, params, batch, lambda logits: probability(logits, labels).sum())
    values = sites_of(model, params, batch)
    for tokens in (absolute_tokens, squared_tokens, max_tokens):
        found = GradientActivation(tokens=tokens, examples=signed)(model, params, batch).scores
        for name, slope in slopes.items():
            np.testing.assert_allclose(found[name], tokens(values[name], slope, mask), rtol=1e-4, atol=1e-6)


def test_gradient_activation_is_the_gradient_at_open_gates():
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    found = GradientActivation(examples=signed)(model, params, batch).scores
    rows = {name: jnp.broadcast_to(gate, (4, gate.size)) for name, gate in open_gates(model, params).items()}
    expected = jax.jit(jax.grad(lambda g: objective_of(model, params, batch, g).sum()))(rows)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)


# Law 3


@pytest.mark.parametrize(
    ("model_type", "path", "kinds"),
    [(model_type, path, UNITS) for model_type in NUMERIC_TYPES for path in (joint, layer)]
    + [("bert", joint, ("heads",)), ("bert", joint, ("neurons",))],
)
def test_completeness(model_type: str, path: Any, kinds: tuple[str, ...]):
    model, params = tiny_model(model_type, heads=SMOOTH)
    batch = labelled(model)
    # 40 nodes: the tiny models are far from smooth, real ones need fewer.
    criterion = IntegratedGradients(nodes=40, chunk=20, path=path, kinds=kinds, objective=log_probability)
    [found], completeness, _ = criterion.attributions(model, params, batch)
    ones = open_gates(model, params)
    groups = path([site for site in sites(model.axes, params) if site.kind in kinds])
    assert len(groups) == len(completeness) == (1 if path is joint else 2 * len({*kinds} & {"heads", "neurons"}))
    end = objective_of(model, params, batch, ones, log_probability)
    for group, [complete] in zip(groups, completeness, strict=True):
        closed = ones | {site.name: jnp.zeros_like(ones[site.name]) for site in group}
        expected = end - objective_of(model, params, batch, closed, log_probability)
        np.testing.assert_allclose(complete.expected, expected, atol=1e-5)
        total = sum(found[site.name].sum(1) for site in group)
        np.testing.assert_allclose(complete.found, total, atol=1e-6)
        np.testing.assert_allclose(total, expected, atol=2e-4)  # the error of the quadrature, in nats
    assert set(found) == {site.name for group in groups for site in group}


@pytest.mark.parametrize("path", [joint, layer])
def test_completeness_from_a_later_start(path: Any):
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    criterion = IntegratedGradients(nodes=16, path=path, start=0.5, objective=margin)
    [found], completeness, _ = criterion.attributions(model, params, batch)
    ones = open_gates(model, params)
    end = objective_of(model, params, batch, ones, margin)
    for group, [complete] in zip(path(sites(model.axes, params)), completeness, strict=True):
        start = ones | {site.name: 0.5 * ones[site.name] for site in group}
        expected = end - objective_of(model, params, batch, start, margin)
        np.testing.assert_allclose(complete.expected, expected, atol=1e-5)
        np.testing.assert_allclose(sum(found[site.name].sum(1) for site in group), expected, atol=1e-4)


def test_completeness_towards_the_means():
    """With means, the path leads to the model whose closed units are worth their mean."""
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    means = calibration_means(model, params, [batch])
    [found], [[complete]], _ = IntegratedGradients(nodes=24).attributions(model, params, batch, Context(means=means))
    ones = open_gates(model, params)
    closed = {name: jnp.zeros_like(gate) for name, gate in ones.items()}
    outputs = [logits_of(model, params, batch, gates, means=means) for gates in (ones, closed)]
    end, start = (probability(logits, jnp.asarray(batch["labels"])) for logits in outputs)
    np.testing.assert_allclose(complete.expected, end - start, atol=1e-6)
    np.testing.assert_allclose(sum(value.sum(1) for value in found.values()), end - start, atol=1e-4)


def test_completeness_is_averaged_over_examples():
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    criterion = IntegratedGradients(nodes=3, path=layer)
    found: Any
    values, found, _ = score_batches(model, params, [batch], dataclasses.replace(criterion, examples=signed))
    _, paths, _ = criterion.attributions(model, params, batch)
    expected = np.array([complete.expected for [complete] in paths])
    attributed = np.array([complete.found for [complete] in paths])
    assert found["relative"] == pytest.approx(np.abs(attributed - expected).mean() / np.abs(expected).mean(), rel=1e-4)
    np.testing.assert_allclose(found["expected"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["error"], np.abs(attributed - expected).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["size"], np.abs(expected).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["found"] * len(paths), sum(float(v.sum()) for v in values.values()), rtol=1e-5)


# Law 4


@pytest.mark.parametrize("criterion", [GradientActivation(examples=signed), IntegratedGradients(examples=signed)])
def test_per_example_scores_sum_to_the_batch(criterion: Any):
    model, params = tiny_model()
    batch = labelled(model)
    ones = open_gates(model, params)

    def total(gates: Gates) -> jax.Array:
        return objective_of(model, params, batch, gates).sum()

    is_integral = isinstance(criterion, IntegratedGradients)
    whole = (lambda g: integrate(total, g, nodes=8, chunk=8)[0]) if is_integral else jax.grad(total)
    expected = jax.jit(whole)(ones)
    found = criterion(model, params, batch).scores
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].sum(0), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", [joint, layer])
@pytest.mark.parametrize("chunk", [3, 8])
def test_chunked_quadrature_equals_all_at_once(path: Any, chunk: int):
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    one, many = (IntegratedGradients(nodes=8, chunk=k, path=path)(model, params, batch) for k in (1, chunk))
    for name, value in one.scores.items():
        np.testing.assert_allclose(many.scores[name], value, rtol=1e-4, atol=1e-6)
    for name, value in one.completeness.items():
        np.testing.assert_allclose(many.completeness[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "criterion"),
    [
        ("bert", IntegratedGradients(nodes=3)),
        pytest.param("roberta", IntegratedGradients(nodes=3), marks=pytest.mark.slow),
        ("bert", GradientActivation()),
        ("distilbert", IntegratedGradients(nodes=2, path=layer, labels=predicted)),
        ("bert", GradientActivation(tokens=absolute_tokens, examples=maximum)),
        ("bert", GradientActivation(tokens=max_tokens, labels=every, closed=calibration_means)),
        ("bert", GradientActivation(labels=sampled, objective=log_probability, examples=squared)),
        ("bert", BlockInfluence()),
    ],
)
def test_padding_reordering_and_splitting_change_nothing(model_type: str, criterion: Any):
    model, params = tiny_model(model_type, layers=1)
    batch = labelled(model) | {"index": np.arange(4, dtype=np.int32)}
    variants = {
        "padding": [padded(batch, tokens=4)],
        "reordering": [cut(batch, np.array([3, 0, 2, 1]))],
        "splitting": [padded(cut(batch, slice(0, 1)), rows=3), padded(cut(batch, slice(1, 4)), rows=1)],
    }
    expected, complete, _ = score_batches(model, params, [batch], criterion)
    for batches in variants.values():
        found, also, _ = score_batches(model, params, batches, criterion)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-6)
        assert complete is None or also == pytest.approx(complete, rel=1e-4, abs=1e-6)


# Law 7


@pytest.mark.parametrize(
    "criterion", [IntegratedGradients(nodes=2), GradientActivation(labels=sampled, objective=log_probability)]
)
def test_same_seed_same_bits(criterion: Any):
    model, params = tiny_model(layers=1)
    batches = [labelled(model, seed=0), labelled(model, seed=1)]
    runs = [score_batches(model, params, batches, criterion, Context(key=jax.random.key(5))) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    for name, value in runs[0][0].items():
        np.testing.assert_array_equal(value, runs[1][0][name])


def test_another_key_draws_other_labels():
    model, params = tiny_model(layers=1)
    batch = labelled(model, rows=8)
    criterion = GradientActivation(labels=sampled, objective=log_probability)
    one, other = (criterion(model, params, batch, Context(key=jax.random.key(seed))).scores for seed in (0, 1))
    assert any((np.asarray(one[name]) != np.asarray(other[name])).any() for name in one)


# Objectives and labels


def test_objectives_by_hand():
    logits, target = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.7, 0.2]])), jnp.array([0, 2])
    np.testing.assert_allclose(probability(logits, target), [0.5, 0.2], rtol=1e-6)
    np.testing.assert_allclose(log_probability(logits, target), np.log([0.5, 0.2]), rtol=1e-6)
    np.testing.assert_allclose(margin(logits, target), np.log([0.5 / 0.5, 0.2 / 0.8]), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(negative_squared_error(jnp.array([[3.0]]), jnp.array([1.0])), [-4.0])


def test_the_attributions_of_all_labels_sum_to_zero():
    """`sum_y P(y) = 1` has no gradient, so this sum is no label-free score."""
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    for criterion in (GradientActivation(examples=signed), IntegratedGradients(examples=signed)):
        found = [criterion(model, params, batch | {"labels": np.full(4, label, np.int32)}).scores for label in range(3)]
        for name in found[0]:
            scale = float(jnp.abs(found[0][name]).max())
            np.testing.assert_allclose(sum(scores[name] for scores in found), 0.0, atol=2e-6 * max(scale, 1.0))


@pytest.mark.parametrize("criterion", [GradientActivation(labels=every), IntegratedGradients(labels=every)])
def test_label_free_scores_weigh_the_labels_by_their_probability(criterion: Any):
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    weights = jax.nn.softmax(logits_of(model, params, batch))
    unlabelled = {name: array for name, array in batch.items() if name != "labels"}
    found = criterion(model, params, unlabelled)
    own = dataclasses.replace(criterion, labels=gold)
    single = [own(model, params, batch | {"labels": np.full(4, label, np.int32)}) for label in range(3)]
    for name, value in found.scores.items():
        expected = sum(weights[:, label, None] * one.scores[name] for label, one in enumerate(single))
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    for name, value in found.completeness.items():
        expected = sum(weights[:, label] * one.completeness[name] for label, one in enumerate(single))
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


def test_predicted_labels_are_the_largest_logits():
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    own = np.asarray(logits_of(model, params, batch).argmax(1), np.int32)
    found = GradientActivation(labels=predicted)(model, params, batch).scores
    expected = GradientActivation()(model, params, batch | {"labels": own}).scores
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_regression_keeps_its_prediction():
    model, params = tiny_model(layers=1, heads=REGRESSION)
    batch = tiny_batch(model) | {"labels": np.array([0.5, -1.0, 2.0], np.float32)}
    found = GradientActivation(examples=signed)(model, params, batch).scores

    def total(gates: Gates) -> jax.Array:
        return -jnp.square(logits_of(model, params, batch, gates)[:, 0] - batch["labels"]).sum()

    for name, value in jax.jit(jax.grad(total))(open_gates(model, params)).items():
        np.testing.assert_allclose(found[name].sum(0), value, rtol=1e-4, atol=1e-5)
    integrated = IntegratedGradients(labels=predicted)(model, params, batch)  # how far removal moves the prediction
    assert float(integrated.completeness["expected"].min()) > 0


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (GradientActivation(objective=margin), "objective margin does not fit task head 'task', which is a regression"),
        (GradientActivation(labels=every), "labels=every needs a classifier"),
        (GradientActivation(labels=sampled), "labels=sampled needs a classifier"),
        (GradientActivation(labels=predicted), "no gradient at the prediction itself"),
    ],
)
def test_a_regression_refuses_what_needs_classes(criterion: Any, message: str):
    model, params = tiny_model(heads=REGRESSION)
    with pytest.raises(ValueError, match=message):
        criterion(model, params, tiny_batch(model) | {"labels": np.zeros(3, np.float32)})


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="nodes must be at least 1, got 0"):
        IntegratedGradients(nodes=0)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        IntegratedGradients(chunk=0)
    with pytest.raises(ValueError, match=r"start must lie in \[0, 1\), got 1.0"):
        IntegratedGradients(start=1.0)
    with pytest.raises(ValueError, match="tokens=max_tokens is not possible with integrated gradients"):
        IntegratedGradients(tokens=max_tokens)
    with pytest.raises(ValueError, match="trapezoidal rule needs at least 2 nodes, got 1"):
        IntegratedGradients(nodes=1, rule=trapezoid)
    with pytest.raises(ValueError, match=r"kinds must be some of heads, groups, neurons, .*, got \('layers',\)"):
        GradientActivation(kinds=("layers",))
    model, params = tiny_model()
    with pytest.raises(ValueError, match="the batch has no 'labels'"):
        GradientActivation()(model, params, tiny_batch(model))
    with pytest.raises(ValueError, match="objective negative_squared_error does not fit task head 'task'"):
        GradientActivation(objective=negative_squared_error)(model, params, labelled(model))


# Closed gates, widths, types


def test_calibration_means_are_over_all_tokens_that_are_not_padding():
    model, params = tiny_model(layers=1)
    batches = [tiny_batch(model, rows=3, length=9), tiny_batch(model, rows=2, length=5, seed=1)]
    means = calibration_means(model, params, batches)
    outputs = [sites_of(model, params, batch) for batch in batches]
    for name, mean in means.items():
        tokens = [out[name][batch["attention_mask"] > 0] for out, batch in zip(outputs, batches, strict=True)]
        np.testing.assert_allclose(mean, jnp.concatenate(tokens).mean(0), rtol=1e-5, atol=1e-6)


def test_means_move_the_scores_by_the_gradient_alone():
    """Gradient x activation with means is `(h - mean) * dh`: `h * dh` minus the mean times the gradient."""
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    means = calibration_means(model, params, [batch])
    zero, moved = (
        GradientActivation(examples=signed)(model, params, batch, Context(means=m)).scores for m in ({}, means)
    )

    def times_mean(values: jax.Array, cotangent: jax.Array, mask: jax.Array) -> jax.Array:
        mean = means["0.attention.heads" if values.ndim == 4 else "0.ffn.neurons"]
        both = jnp.where(mask.reshape(*mask.shape, *[1] * (values.ndim - 2)), mean * cotangent, 0.0).sum(1)
        return both.sum(-1) if both.ndim == 3 else both

    product = GradientActivation(tokens=times_mean, examples=signed)(model, params, batch).scores
    for name in ("0.attention.heads", "0.ffn.neurons"):
        np.testing.assert_allclose(moved[name], zero[name] - product[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("path", [joint, layer])
def test_modules_without_units_are_left_out(path: Any):
    model, params = tiny_model(layers=1)
    params = without_units(params, "neurons")
    found = IntegratedGradients(nodes=24, path=path)(model, params, labelled(model))
    assert found.scores["0.ffn.neurons"].shape == (4, 0)
    np.testing.assert_allclose(found.completeness["found"], found.completeness["expected"], atol=1e-3)


def test_a_model_without_units_cannot_be_integrated():
    model, params = tiny_model(layers=1)
    with pytest.raises(ValueError, match="the model has no heads: there is nothing to score"):
        IntegratedGradients(kinds=("heads",))(model, without_units(params, "heads"), labelled(model))


def test_scores_of_a_bfloat16_model_are_float32_and_close():
    model, params = tiny_model(layers=1)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batch = labelled(model)
    small = IntegratedGradients(nodes=4)(model, params, batch).scores
    large = IntegratedGradients(nodes=4)(model, jax.tree.map(lambda x: x.astype(jnp.float32), params), batch).scores
    for name, value in small.items():
        assert value.dtype == jnp.float32
        scale = float(jnp.abs(large[name]).max())
        np.testing.assert_allclose(value, large[name], atol=0.15 * scale)  # bfloat16 has 8 bits


def test_example_reductions_by_hand():
    attribution = jnp.array([[1.0, -3.0], [-2.0, 1.0]])
    assert [f.each(attribution).tolist() for f in (signed, absolute, squared, maximum)] == [
        [[1, -3], [-2, 1]],
        [[1, 3], [2, 1]],
        [[1, 9], [4, 1]],
        [[1, -3], [-2, 1]],
    ]
    assert [f.largest for f in (signed, absolute, squared, maximum)] == [False, False, False, True]


def test_the_largest_example_decides():
    model, params = tiny_model(layers=1)
    batch = labelled(model)
    rows = GradientActivation(examples=signed)(model, params, batch).scores
    found, _, _ = score_batches(
        model,
        params,
        [padded(batch, tokens=4), padded(cut(batch, slice(0, 2)), rows=2)],
        GradientActivation(examples=maximum),
    )
    for name, value in found.items():
        np.testing.assert_allclose(value, rows[name].max(0), rtol=1e-4, atol=1e-7)


# Integration of any function


def test_integrals_by_hand():
    gates = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    found, complete = integrate(lambda g: (g["a"] ** 2).sum() + g["a"][0] * g["b"][0], gates, nodes=2)
    np.testing.assert_allclose(found["a"], [1 + 1.5, 4.0], rtol=1e-6)  # a product is shared half and half
    np.testing.assert_allclose(found["b"], [1.5], rtol=1e-6)
    np.testing.assert_allclose([complete.expected, complete.found], [8.0, 8.0], rtol=1e-6)


def test_an_integral_from_a_later_start():
    found, complete = integrate(lambda g: (g["a"] ** 2).sum(), {"a": jnp.array([1.0, 2.0])}, nodes=1, start=0.5)
    np.testing.assert_allclose(found["a"], [0.75, 3.0], rtol=1e-6)  # g^2 - (g / 2)^2
    np.testing.assert_allclose(complete.expected, 3.75, rtol=1e-6)


def test_one_node_is_the_midpoint_and_not_gradient_times_activation():
    gates = {"a": jnp.array([2.0])}
    for rule in (gauss_legendre, riemann):
        found, _ = integrate(lambda g: (g["a"] ** 3).sum(), gates, nodes=1, rule=rule)
        np.testing.assert_allclose(found["a"], [2 * 3 * 1.0**2], rtol=1e-6)


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_gauss_legendre_is_exact_for_polynomials(nodes: int):
    points, weights = gauss_legendre(nodes)
    for degree in range(2 * nodes):
        np.testing.assert_allclose((weights * points**degree).sum(), 1 / (degree + 1), rtol=1e-12)


def test_rules_by_hand():
    np.testing.assert_allclose(riemann(4), [[1 / 8, 3 / 8, 5 / 8, 7 / 8], [1 / 4] * 4])
    np.testing.assert_allclose(trapezoid(3), [[0, 1 / 2, 1], [1 / 4, 1 / 2, 1 / 4]])
    points, weights = quadrature(riemann, 2, start=0.5)
    np.testing.assert_allclose([points, weights], [[5 / 8, 7 / 8], [1 / 4, 1 / 4]])
    assert points.dtype == weights.dtype == np.float32


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_a_chunked_integral_of_any_function_equals_all_at_once(chunk: int):
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.standard_normal((5, 3)), jnp.float32)
    gates = {"a": jnp.asarray(random.random(5), jnp.float32)}

    def objective(g: Gates) -> jax.Array:
        return jnp.tanh(g["a"] @ kernel).sum()

    expected, _ = integrate(objective, gates, nodes=8, chunk=8)
    found, complete = integrate(objective, gates, nodes=8, chunk=chunk)
    np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-5)
    np.testing.assert_allclose(complete.found, complete.expected, rtol=1e-5)
    np.testing.assert_allclose(complete.expected, objective(gates), rtol=1e-5)


def test_integrals_refuse_what_makes_no_sense():
    gates = {"a": jnp.ones(1)}
    with pytest.raises(ValueError, match="nodes must be at least 1, got 0"):
        integrate(lambda g: g["a"].sum(), gates, nodes=0)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        integrate(lambda g: g["a"].sum(), gates, chunk=0)

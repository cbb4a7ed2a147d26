"""Recovery is least squares, sees no padding, makes no module worse on rows held out, and leaves what is whole."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from commands import Place, place
from tiny import random_gates, tiny_batch, tiny_model

import jaxprune as jp
from jaxprune.compaction import compact
from jaxprune.data.tasks import Rows, draw, row_key
from jaxprune.models import Model
from jaxprune.pruning import recoveries
from jaxprune.pruning.recoveries import (
    EVERY,
    BiasCompensation,
    Fit,
    Moments,
    Reconstruction,
    Recovery,
    Rescaling,
    check_method,
    fit_module,
    recover_batches,
)
from jaxprune.units import flatten, open_gates, unflatten

__all__ = ["place"]  # a fixture


def batches_of(model: Model, count: int = 3, rows: int = 16, length: int = 9) -> list[dict[str, np.ndarray]]:
    return [tiny_batch(model, rows, length, seed) for seed in range(count)]


def moments_of(inputs: np.ndarray, targets: np.ndarray) -> Moments:
    return Moments(
        inputs.T @ inputs,
        inputs.T @ targets,
        targets.T @ targets,
        inputs.sum(0),
        targets.sum(0),
        float(len(inputs)),
    )


def error_of(model: Model, params: Any, small: Any, batch: Any) -> float:
    """The mean squared difference of the logits."""
    one, other = (model.apply(own, batch).logits for own in (params, small))
    return float(jnp.square(jnp.asarray(one) - jnp.asarray(other)).mean())


@pytest.mark.parametrize("model_type", ["bert", "t5", "mt5"])
def test_nothing_removed_leaves_the_weights_unchanged(model_type: str):
    model, params = tiny_model(model_type)
    found, repairs = recover_batches(model, params, params, batches_of(model))
    assert all(set(repair.chosen) == {"none"} for repair in repairs)
    for path, array in flatten(params).items():
        np.testing.assert_allclose(flatten(found)[path], array, atol=1e-5)


def test_a_removed_copy_of_a_unit_comes_back_as_the_ridge_goes_to_zero():
    model, params = tiny_model(layers=1)
    flat = flatten(params)
    up = ("layers", 0, "ffn", "up")
    for leaf in ("kernel", "bias"):
        flat[(*up, leaf)] = flat[(*up, leaf)].at[..., 5].set(flat[(*up, leaf)][..., 4])
    params = unflatten(flat)
    gates = {"0.ffn.neurons": jnp.ones(32).at[5].set(0.0)}
    small, batch = compact(model, params, gates), tiny_batch(model, 16, 9, 7)
    lost = error_of(model, params, small, batch)
    errors = []
    for ridge in (1e-1, 1e-3, 1e-6):
        method = Reconstruction(ridges=(ridge,))
        errors.append(
            error_of(model, params, recover_batches(model, params, small, batches_of(model), method=method)[0], batch)
        )
    assert lost > errors[0] > errors[1] > errors[2] and errors[2] < 1e-6 * lost


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        ("bert", Rescaling()),
        ("bert", Reconstruction()),
        ("bert", Reconstruction(drift=False)),
        ("t5", Reconstruction()),
        ("mt5", Rescaling()),
    ],
)
def test_no_module_gets_worse_and_the_model_gets_better(model_type: str, method: Any):
    model, params = tiny_model(model_type, layers=2 if model_type == "bert" else 1)
    small = compact(model, params, random_gates(model, params, 1))
    found, repairs = recover_batches(model, params, small, batches_of(model, 6), method=method)
    assert len(repairs) == (2 * 2 if model_type == "bert" else 1 * 2 + 2 * 3)
    assert all(repair.after <= repair.before for repair in repairs)
    assert any(repair.after < 0.9 * repair.before for repair in repairs)
    if isinstance(method, Reconstruction):
        batch = tiny_batch(model, 16, 9, 99)
        assert error_of(model, params, found, batch) < error_of(model, params, small, batch)


def test_the_mean_of_what_is_missing_goes_into_the_bias():
    model, params = tiny_model()
    small = compact(model, params, random_gates(model, params, 1))
    found, repairs = recover_batches(model, params, small, batches_of(model), method=BiasCompensation())
    assert {name for repair in repairs for name in repair.chosen} <= {"none", "bias"}
    changed = {path for path, array in flatten(found).items() if not jnp.array_equal(array, flatten(small)[path])}
    assert changed and all(path[-1] == "bias" for path in changed)


def test_a_model_without_biases_has_nowhere_to_put_a_mean():
    model, params = tiny_model("t5")
    with pytest.raises(ValueError, match="has no biases"):
        recover_batches(model, params, params, batches_of(model), method=BiasCompensation())


def test_a_method_without_a_place_is_refused_before_any_work():
    for model_type, refused in (("bert", False), ("t5", True)):
        model, params = tiny_model(model_type)
        for method in (Rescaling(), Reconstruction()):
            check_method(model, params, method)
        with pytest.raises(ValueError, match="has no biases") if refused else contextlib.nullcontext():
            check_method(model, params, BiasCompensation())


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_padding_changes_nothing(model_type: str):
    model, params = tiny_model(model_type)
    small = compact(model, params, random_gates(model, params, 1))
    batches = batches_of(model)
    padded = []
    for batch in batches:
        wide = {name: np.pad(own, ((0, 4), (0, 3)), constant_values=1) for name, own in batch.items()}
        for name in wide:
            if name.endswith("mask"):
                wide[name][:, batch[name].shape[1] :] = 0
        wide["weight"] = np.pad(np.ones(16, np.float32), (0, 4))
        padded.append(wide)
    one, other = (flatten(recover_batches(model, params, small, own)[0]) for own in (batches, padded))
    for path, array in one.items():
        np.testing.assert_allclose(other[path], array, rtol=1e-3, atol=1e-4)


def test_reconstruction_is_ridge_regression_towards_the_old_weights():
    random = np.random.default_rng(0)
    inputs, targets = random.standard_normal((50, 6)) + 1.0, random.standard_normal((50, 3))
    old = Fit(random.standard_normal((6, 3)), np.zeros(3))
    found = Reconstruction(ridges=(0.1,))(moments_of(inputs, targets), old, np.arange(6))["ridge 0.1"](EVERY)
    a, y = inputs - inputs.mean(0), targets - targets.mean(0)
    ridge = 0.1 * np.square(a).sum() / 6
    stacked = np.concatenate([a, np.sqrt(ridge) * np.eye(6)])
    expected = np.linalg.lstsq(stacked, np.concatenate([y, np.sqrt(ridge) * old.kernel]), rcond=None)[0]
    np.testing.assert_allclose(found.kernel, expected, rtol=1e-9)
    assert found.bias is not None
    np.testing.assert_allclose(found.bias, targets.mean(0) - inputs.mean(0) @ expected, rtol=1e-9, atol=1e-12)


def test_units_are_rescaled_by_least_squares():
    """Two heads of two channels each, without a bias: two numbers, found by hand from what each head adds."""
    random = np.random.default_rng(0)
    inputs, kernel = random.standard_normal((40, 4)), random.standard_normal((4, 3))
    first, second = inputs[:, :2] @ kernel[:2], inputs[:, 2:] @ kernel[2:]
    targets = 2.0 * first + 0.5 * second
    method = Rescaling(ridges=(0.0,))
    found = method(moments_of(inputs, targets), Fit(kernel, None), np.array([0, 0, 1, 1]))["ridge 0"](EVERY)
    np.testing.assert_allclose(found.kernel, kernel * np.array([2.0, 2.0, 0.5, 0.5])[:, None], rtol=1e-9)
    assert found.bias is None


def test_each_direction_of_the_output_has_its_own_ridge():
    """One output is a clean function of the inputs, the other is noise: only the first moves."""
    random = np.random.default_rng(0)
    kernel, old = random.standard_normal((30, 2)), Fit(np.zeros((30, 2)), np.zeros(2))
    inputs = [random.standard_normal((40, 30)) for _ in range(2)]
    targets = [own @ (kernel * np.array([1.0, 0.0])) + random.standard_normal((40, 2)) * (0.0, 3.0) for own in inputs]
    fit, held = (moments_of(*pair) for pair in zip(inputs, targets, strict=True))
    found = fit_module(fit, held, old, np.arange(30), Reconstruction())
    assert found.fit is not None and found.after < found.before and len(found.chosen) == 2
    clean, noise = np.square(found.fit.kernel - kernel * np.array([1.0, 0.0])).sum(0)
    assert clean < 0.05 * np.square(kernel[:, 0]).sum() and noise < 1.0
    together = Reconstruction(ridges=(1e-3,))(fit, old, np.arange(30))["ridge 0.001"](EVERY)
    assert np.square(together.kernel[:, 1]).sum() > 10 * noise


def test_one_decomposition_serves_all_ridges(monkeypatch):
    """One for the rows that fit, and one for all rows: no ridge is solved for by itself."""
    random, decomposed = np.random.default_rng(0), []
    inputs, targets = random.standard_normal((2, 40, 30)), random.standard_normal((2, 40, 3))
    fit, held = (moments_of(*pair) for pair in zip(inputs, targets, strict=True))
    for module, name in ((np.linalg, "eigh"), (scipy.linalg, "cho_factor")):
        original = getattr(module, name)

        def counted(matrix: Any, *args: Any, original: Any = original, **settings: Any) -> Any:
            decomposed.append(len(matrix))
            return original(matrix, *args, **settings)

        monkeypatch.setattr(module, name, counted)
    for method in (Reconstruction(), Rescaling()):
        decomposed.clear()
        fit_module(fit, held, Fit(np.zeros((30, 3)), np.zeros(3)), np.arange(30), method)
        assert decomposed.count(30) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_what_is_chosen_is_never_worse_on_the_rows_held_out(seed: int):
    random = np.random.default_rng(seed)
    old = Fit(random.standard_normal((8, 3)), random.standard_normal(3))
    rows = [(own := random.standard_normal((12, 8)), own @ old.kernel + random.standard_normal((12, 3))) for _ in "ab"]
    for method in (BiasCompensation(), Rescaling(), Reconstruction()):
        found = fit_module(moments_of(*rows[0]), moments_of(*rows[1]), old, np.arange(8), method)
        assert found.after <= found.before
        if found.fit is not None:
            (inputs, targets), fitted = rows[1], found.fit
            errors = [
                np.square(inputs @ own.kernel + own.bias - targets).sum()  # type: ignore[operator]
                for own in (fitted, old)
            ]
            assert errors[0] <= errors[1]


def test_fewer_tokens_than_inputs_are_carried_by_the_ridge():
    model, params = tiny_model(layers=1, neurons=64)
    small = compact(model, params, random_gates(model, params, 1))
    with pytest.warns(UserWarning, match="only the ridge makes their fit unique"):
        _, repairs = recover_batches(model, params, small, [tiny_batch(model, 4, 5)])
    assert all(repair.after <= repair.before for repair in repairs)


def test_what_is_not_finite_is_refused():
    model, params = tiny_model(layers=1)
    small = jax.tree.map(jnp.copy, params)
    small["layers"][0]["attention"]["value"]["bias"] = (
        small["layers"][0]["attention"]["value"]["bias"].at[0].set(jnp.nan)
    )
    with pytest.raises(ValueError, match=r"activations of 0\.attention are not finite"):
        recover_batches(model, params, small, batches_of(model))
    with pytest.raises(ValueError, match="at least 4 rows"):
        recover_batches(model, params, params, [tiny_batch(model, 3)])


def test_examples_of_several_tasks_are_drawn_from_each(place: Place):
    model, params = jp.load(place.model)
    tasks = [jp.load_task(name, data=place.data) for name in ("mood", "topic")]
    small = compact(model, params, random_gates(model, params, 1))
    _, report = jp.recover(
        model, params, small, tasks, Recovery(method=jp.recoveries.BiasCompensation(), rows=Rows(examples=12))
    )
    assert report.method == {"name": "BiasCompensation", "drift": True}
    drawn = [row for task in tasks for row in draw(task, 12, jax.random.key(0))]  # a seed is the key that it makes
    assert report.examples == 24 and report.rows == tuple(sorted(map(row_key, drawn)))
    with pytest.raises(ValueError, match="examples of 2 tasks cannot be told apart"):
        jp.recover(model, params, small, tasks, Recovery(rows=Rows(examples=tasks[0].rows("calibration")[:8])))
    with pytest.raises(ValueError, match="nothing to recover with"):
        jp.recover(model, params, small, [])


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_layers_of_nearly_equal_widths_share_programs_and_nothing_else(model_type: str, monkeypatch):
    """Zero units that fill a layer up to a shared width do not change what is fitted."""
    model, params = tiny_model(model_type)
    gates = {name: np.array(gate) for name, gate in open_gates(model, params).items()}
    for i, gate in enumerate(gates.values()):
        gate[: i % len(gate)] = 0.0
    small, method = compact(model, params, gates), Reconstruction(ridges=(0.1,))
    answers = {"labels": np.full(16, -1), "candidates": np.tile(np.arange(5, 7)[:, None], (16, 1, 1))}
    batches = [batch | (answers if model.answers_in_text else {}) for batch in batches_of(model)]
    found, _ = recover_batches(model, params, small, batches, method=method)
    monkeypatch.setattr(recoveries, "fewer_shapes", lambda model, params, small: small)  # every layer its own
    alone, _ = recover_batches(model, params, small, batches, method=method)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, small)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)

"""The rivals do what their descriptions say: every number is worked out again in plain NumPy, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from climb import Calibration, Sums, Visit, allowance, climb, open_masks
from flap import Fluctuation, standardised
from k_prune import above_threshold, k_prune, k_prune_batches, knowledge, tune
from kwon import batch_gradients, importance, kwon, kwon_batches, rearrange, rescale, split, unit_scales
from passes import logits_of
from scipy.special import erf
from tiny import tiny_batch, tiny_model

import jaxprune as jp
from jaxprune.bundled import bundled_data, bundled_model
from jaxprune.data.batches import encode
from jaxprune.data.tasks import Example, draw
from jaxprune.models import Model, TaskHead
from jaxprune.pruning.budgets import Rules
from jaxprune.scoring.run import score_batches
from jaxprune.scoring.scores import Scores, properties_of
from jaxprune.units import flatten, unflatten, widths

pytestmark = pytest.mark.slow
LENGTH = 7
SITES = ("0.attention.heads", "0.ffn.neurons", "1.attention.heads", "1.ffn.neurons")  # as they run
METHODS = {"kwon": kwon_batches, "k_prune": k_prune_batches}


def small_model() -> tuple[Model, Any]:
    return tiny_model(embed=8, attention_heads=2, neurons=6, seed=3)


def calibration(model: Model, params: Any, flops: float, rows: int = 10) -> Calibration:
    """Two batches whose rows are shuffled; the last row of the second is a filler."""
    order = np.random.default_rng(5).permutation(2 * rows)
    batches = []
    for i in range(2):
        batch = tiny_batch(model, rows, LENGTH, 10 + i)
        batch |= {"labels": np.arange(rows, dtype=np.int32) % 3, "weight": np.ones(rows, np.float32)}
        batches.append(batch | {"index": order[i * rows : (i + 1) * rows].astype(np.int32)})
    last = int(batches[1]["index"][-1])
    for batch in batches:
        batch["index"] -= batch["index"] > last
    batches[1]["index"][-1], batches[1]["weight"][-1], batches[1]["attention_mask"][-1] = -1, 0, 0
    return Calibration("task", tuple(batches), *allowance(model, params, flops, LENGTH))


def rows_of(found: Calibration) -> dict[str, np.ndarray]:
    """All rows that are no filler, by index."""
    together = {name: np.concatenate([batch[name] for batch in found.batches]) for name in found.batches[0]}
    real = together["weight"] > 0
    order = np.argsort(together["index"][real])
    return {name: array[real][order] for name, array in together.items()}


def norm(x: np.ndarray, own: Mapping[str, Any]) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-12) * own["scale"] + own["bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def affine(x: np.ndarray, own: Mapping[str, np.ndarray], form: str) -> np.ndarray:
    return np.einsum(form, x, own["kernel"]) + own["bias"]


class Run:
    """BERT in NumPy: logits, and by site the gated values, what they are added to, and the sum."""

    def __init__(self, params: Any, batch: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray] | None = None):
        params = unflatten({path: np.asarray(array, np.float64) for path, array in flatten(params).items()})
        self.values, self.residual, self.sums = {}, {}, {}
        masks, tables = masks or {}, params["embeddings"]
        x = (
            tables["word"]["embedding"][batch["input_ids"]]
            + tables["position"]["embedding"][: batch["input_ids"].shape[1]]
        )
        x = x + tables["token_type"]["embedding"][batch["token_type_ids"]]
        x = norm(x, tables["norm"])
        for i, layer in params["layers"].items():
            own, ffn = layer["attention"], layer["ffn"]
            query, key, value = (affine(x, own[name], "btd,dnh->btnh") for name in ("query", "key", "value"))
            raw = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
            raw = np.where(batch["attention_mask"][:, None, None] > 0, raw, -1e30)
            mixed = np.einsum("bnts,bsnh->btnh", softmax(raw), value)
            mask = masks.get(f"{i}.attention.heads", np.ones(1))
            mixed = mixed * (mask[:, None] if np.ndim(mask) == 1 else mask)  # one per head, or one per channel
            x = norm(
                self.keep(f"{i}.attention.heads", mixed, x, affine(mixed, own["out"], "btnh,nhd->btd")), own["norm"]
            )
            inner = affine(x, ffn["up"], "btd,df->btf")
            inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2))) * masks.get(f"{i}.ffn.neurons", 1.0)
            x = norm(self.keep(f"{i}.ffn.neurons", inner, x, affine(inner, ffn["down"], "btf,fd->btd")), ffn["norm"])
        head = params["heads"]["task"]
        self.logits = affine(np.tanh(affine(x[:, 0], head["dense"], "bd,de->be")), head["out"], "be,el->bl")

    def keep(self, site: str, values: np.ndarray, residual: np.ndarray, added: np.ndarray) -> np.ndarray:
        self.values[site], self.residual[site], self.sums[site] = values, residual, residual + added
        return self.sums[site]


def slopes(loss: Any, masks: Mapping[str, np.ndarray], site: str) -> np.ndarray:
    """Central differences of a loss per row with respect to one mask: `[rows, units]`, or `[rows, heads, channels]`."""
    found = np.empty((*loss(masks).shape, *masks[site].shape))
    for unit in np.ndindex(masks[site].shape):
        ends = []
        for step in (1e-5, -1e-5):
            moved = masks[site].astype(np.float64)
            moved[unit] += step
            ends.append(loss({**masks, site: moved}))
        found[:, *unit] = (ends[0] - ends[1]) / 2e-5
    return found


def reader(params: Any, site: str) -> tuple[np.ndarray, np.ndarray]:
    """The kernel and the bias behind a site."""
    layer, module, _ = site.split(".")
    own = params["layers"][int(layer)][module]["out" if module == "attention" else "down"]
    return np.asarray(own["kernel"], np.float64), np.asarray(own["bias"], np.float64)


def tokens(batch: Mapping[str, np.ndarray], values: np.ndarray) -> np.ndarray:
    return values[batch["attention_mask"] > 0]


def missing(params: Any, batch: Mapping[str, np.ndarray], site: str, dense: Run, now: Run) -> np.ndarray:
    """The sum that a module's units should add up to."""
    return tokens(batch, dense.sums[site] - now.residual[site]) - reader(params, site)[1]


def test_the_numpy_model_is_the_model():
    model, params = small_model()
    batch = tiny_batch(model, 4, LENGTH)
    masks = {"0.attention.heads": np.array([0.5, 1.0]), "1.ffn.neurons": np.array([1, 0, 1, 1, 2, 1.0])}
    gates = {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}
    expected = logits_of(model, params, batch, gates)
    np.testing.assert_allclose(Run(params, batch, masks).logits, expected, atol=1e-5)


def test_kwon_importance_is_that_of_batches_of_rows_in_their_order():
    model, params = small_model()
    found = calibration(model, params, 0.5)
    rows = rows_of(found)

    def loss(masks: Mapping[str, np.ndarray]) -> np.ndarray:
        return -np.log(softmax(Run(params, rows, masks).logits))[np.arange(19), rows["labels"]]

    gradients = batch_gradients(model, params, found, size=8)
    scores = importance(gradients)
    assert tuple(gradients) == SITES
    for site, mask in open_masks(model, params).items():
        each = slopes(loss, {site: mask}, site)
        means = np.stack([each[:8].mean(0), each[8:16].mean(0), each[16:].mean(0)])
        np.testing.assert_allclose(gradients[site], means, atol=1e-5)
        np.testing.assert_allclose(scores[site], means[0] ** 2 + means[1] ** 2 + means[2] ** 2, rtol=1e-3, atol=1e-6)


def test_kwon_splits_the_budget_between_heads_and_neurons_by_hand():
    scores = {
        "0.attention.heads": np.array([9.0, 1.0]),
        "0.ffn.neurons": np.array([5.0, 3.0, 1.0]),
        "1.attention.heads": np.array([2.0, 4.0]),
        "1.ffn.neurons": np.array([6.0, 0.5, 2.0]),
    }
    costs = {name: 3.0 if name.endswith("heads") else 1.0 for name in scores}
    # At 8: no head 17.5, one 9 + 17 with five neurons, two 13 + 11 with two; three heads cost 9.
    masks = split(scores, costs, 8.0)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "0.attention.heads": [1, 0],
        "0.ffn.neurons": [1, 1, 1],
        "1.attention.heads": [0, 0],
        "1.ffn.neurons": [1, 0, 1],
    }
    assert sum(mask.sum() for mask in split(scores, costs, 2.0).values()) == 2  # no head: one costs more than there is
    assert all(mask.all() for mask in split(dict.fromkeys(scores, np.zeros(2)), costs, 100.0).values())  # a tie


def test_kwon_exchanges_units_whose_gradients_cancel():
    gradients = np.array([[1.0, 1.1, -1.2, 3.0], [0.0, 0.0, 0.0, 3.0]])
    # 0 and 1 add up to 2.1; 2 is offered: without 0 it is -0.1, without 1 -0.2; then 3 only makes it worse
    assert rearrange(np.array([0.0, 0.0, 1.0, 1.0]), gradients).tolist() == [1, 0, 0, 1]
    assert rearrange(np.ones(4), gradients).tolist() == [1, 1, 1, 1]
    assert rearrange(np.zeros(4), gradients).tolist() == [0, 0, 0, 0]
    random = np.random.default_rng(0)
    for _ in range(20):
        gradients, mask = random.standard_normal((3, 12)), np.ones(12)
        mask[np.argsort(np.square(gradients).sum(0))[:5]] = 0
        found = rearrange(mask, gradients)
        assert found.sum() == 7
        before, after = (np.square(gradients @ (1 - own)).sum() for own in (mask, found))
        assert after <= before + 1e-12


def test_kwon_rescales_by_damped_least_squares_in_the_rescaled_model():
    model, params = small_model()
    found = calibration(model, params, 0.5)
    rows = rows_of(found)
    masks = open_masks(model, params)
    masks["0.attention.heads"][1] = masks["1.attention.heads"][0] = 0
    for name in ("0.ffn.neurons", "1.ffn.neurons"):
        masks[name][[0, 4]] = 0
    _, rescaled = climb(model, params, masks, found.batches, rescale)
    dense, below = Run(params, rows), dict(masks)
    for site in SITES:
        now, kept = Run(params, rows, below), np.flatnonzero(masks[site])
        values, kernel = tokens(rows, now.values[site]), reader(params, site)[0]
        added = [np.tensordot(values[:, i], kernel[i], int(kernel.ndim == 3)) for i in kept]
        if kernel.ndim == 2:
            added = [np.outer(values[:, i], kernel[i]) for i in kept]
        a = np.stack([one.ravel() for one in added], axis=1)
        y = missing(params, rows, site, dense, now).ravel()
        expected = np.linalg.lstsq(np.vstack([a, np.eye(len(kept))]), np.concatenate([y, np.ones(len(kept))]))[0]
        np.testing.assert_allclose(rescaled[site][kept], expected, rtol=1e-4)
        assert not rescaled[site][masks[site] == 0].any() and np.abs(expected - 1).max() > 0.01
        below[site] = rescaled[site].astype(np.float64)


def test_kwon_skips_a_module_whose_numbers_exceed_ten():
    kernel, mask = np.ones((2, 1)), np.array([1, 0], np.float32)
    for wanted, left in ((9.0, False), (12.0, True), (-12.0, True), (np.inf, True)):
        sums = Sums(np.diag([1e9, 0.0]), np.array([[wanted * 1e9], [0.0]]))
        visit = Visit("0.ffn.neurons", 0, {}, {"0.ffn.neurons": mask}, kernel, [], lambda _, sums=sums: sums)
        assert rescale(visit)[0].tolist() == pytest.approx([1 if left else wanted, 0])
    assert unit_scales(Sums(np.zeros((2, 2)), np.zeros((2, 1))), kernel, np.array([0, 1])).tolist() == [1, 1]


def known(params: Any, rows: Mapping[str, np.ndarray], site: str, masks: Any, dense: Run) -> tuple[Any, Any]:
    """Both kinds of K-prune's knowledge of one site in a model, T = 2."""
    teacher = softmax(dense.logits / 2)

    def divergence(masks: Mapping[str, np.ndarray]) -> np.ndarray:
        return 4 * (teacher * (np.log(teacher) - np.log(softmax(Run(params, rows, masks).logits / 2)))).sum(1)

    kernel = reader(params, site)[0]
    full = np.broadcast_to(masks[site].reshape(-1, *[1] * (kernel.ndim - 2)), kernel.shape[:-1])  # heads: per channel
    lost = 0.5 * np.square(slopes(divergence, {**masks, site: full}, site)).sum(0)
    values = tokens(rows, Run(params, rows, masks).values[site])
    shown = np.square(values).mean(0) * np.square(kernel).mean(-1)
    return (lost.mean(1), shown.mean(1)) if kernel.ndim == 3 else (lost, shown)


def test_k_prune_measures_knowledge_in_the_current_model():
    model, params = small_model()
    found = calibration(model, params, 0.5)
    rows, dense, seen = rows_of(found), Run(params, rows_of(found)), []
    teacher = [np.asarray(logits_of(model, params, batch)) for batch in found.batches]

    def decide(visit: Visit) -> Any:
        measured = knowledge(model, visit, found, teacher, 2.0)
        assert tuple(measured) == SITES[SITES.index(visit.site) :]
        for site, own in measured.items():
            lost, shown = known(visit.params, rows, site, visit.masks, dense)
            np.testing.assert_allclose(own.representational, shown, rtol=1e-4)
            np.testing.assert_allclose(own.predictive, lost, rtol=2e-3, atol=1e-9)
            assert own.predictive.max() < 1e-9 if visit.site == SITES[0] else own.predictive.max() > 1e-6
        seen.append(visit.site)
        mask = visit.masks[visit.site].copy()
        mask[0] = 0
        return mask, 1.1 * visit.kernel

    climb(model, params, open_masks(model, params), found.batches, decide)
    assert tuple(seen) == SITES


def test_k_prune_keeps_what_is_above_the_threshold():
    scores = {
        "0.ffn.neurons": np.array([3.0, 1.0]),
        "1.attention.heads": np.array([2.0]),
        "1.ffn.neurons": np.array([0.5, 4.0]),
    }
    costs = {"0.ffn.neurons": 1.0, "1.attention.heads": 3.0, "1.ffn.neurons": 1.0}

    def kept(budget: float) -> list[list[float]]:
        return [mask.tolist() for mask in above_threshold(scores, costs, budget).values()]

    assert kept(5.0) == [[1, 0], [1], [0, 1]]
    assert kept(4.9) == [[1, 0], [0], [0, 1]]  # no unit below the head, though one would fit
    assert kept(7.0) == [[1, 1], [1], [1, 1]]
    assert kept(0.5) == [[0, 0], [0], [0, 0]]


def test_k_prune_tunes_by_least_squares():
    random = np.random.default_rng(0)
    kernel, mask = random.standard_normal((3, 2, 4)), np.array([1, 0, 1], np.float32)
    a, y = random.standard_normal((50, 6)), random.standard_normal((50, 4))
    rows = np.array([0, 1, 4, 5])
    found = tune(Sums(a.T @ a, a.T @ y), kernel, mask, ridge=1e-12)
    np.testing.assert_allclose(found.reshape(6, 4)[rows], np.linalg.lstsq(a[:, rows], y)[0], atol=1e-9)
    np.testing.assert_array_equal(found[1], kernel[1])
    assert np.isfinite(tune(Sums(np.zeros((6, 6)), np.zeros((6, 4))), kernel, mask, ridge=1e-5)).all()


@pytest.mark.parametrize("flops", [0.5, 0.75])
def test_k_prune_is_its_steps_in_numpy(flops: float):
    model, params = small_model()
    found = calibration(model, params, flops)
    rows, batch = rows_of(found), tiny_batch(model, 4, LENGTH, 99)
    dense, masks, left = Run(params, rows), open_masks(model, params), found.budget
    now = {path: np.asarray(array) for path, array in flatten(params).items()}
    for place, site in enumerate(SITES):
        current = unflatten(now)
        ranked = []
        for other in SITES[place:]:
            lost, shown = known(current, rows, other, masks, dense)
            weight = 4 if other.endswith("heads") else 1
            ranked += [
                (weight * (own + 0.01 * more) / found.costs[other], other, unit)
                for unit, (own, more) in enumerate(zip(lost, shown, strict=True))
            ]
        spare, kept = left, []
        for _, other, unit in sorted(ranked, reverse=True):
            spare -= found.costs[other]
            if spare < 0:
                break
            kept += [unit] if other == site else []
        masks[site] = np.isin(np.arange(len(masks[site])), kept).astype(np.float64)
        left -= len(kept) * found.costs[site]
        if kept:
            run = Run(current, rows, masks)
            kernel = reader(current, site)[0]
            values = tokens(rows, run.values[site])[:, kept]
            target = missing(current, rows, site, dense, run)
            fitted = np.linalg.lstsq(values.reshape(len(target), -1), target)[0]
            kernel[kept] = fitted.reshape(-1, *kernel.shape[1:])
            layer, module, _ = site.split(".")
            now["layers", int(layer), module, "out" if module == "attention" else "down", "kernel"] = kernel
    small = k_prune_batches(model, params, found, representational=0.01, ridge=1e-9)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == widths(model.axes, small)
    expected = Run(unflatten(now), batch, masks).logits
    np.testing.assert_allclose(logits_of(model, small, batch), expected, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_never_exceeds_its_budget_and_stays_finite(method: str):
    model, params = small_model()
    for flops in (0.12, 0.4, 0.7):
        found = calibration(model, params, flops)
        small = METHODS[method](model, params, found)
        share = jp.flops(model, small, LENGTH) / jp.flops(model, params, LENGTH)
        assert share <= flops * (1 + 1e-6)
        assert share > flops - max(found.costs.values()) / jp.flops(model, params, LENGTH)
        assert np.isfinite(Run(small, rows_of(found)).logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_where_everything_fits(method: str):
    model, params = small_model()
    small = METHODS[method](model, params, calibration(model, params, 1.0))
    for path, array in flatten(params).items():
        np.testing.assert_array_equal(flatten(small)[path], array)


def test_both_run_on_the_rows_of_a_task():
    task = jp.load_task("sst2", data=bundled_data())
    head = TaskHead(name="sst2", labels=task.labels)
    model, params = tiny_model(vocab=12_000, heads=(head,))
    model = replace(model, source=bundled_model())
    rows = draw(task, 12, 0)
    length = encode(model, rows).mean_length
    for method in (kwon, k_prune):
        found = method(model, params, task, rows=rows, flops=0.5, batch_size=12)
        assert jp.flops(model, found, length) <= 0.5 * jp.flops(model, params, length)
    with pytest.raises(ValueError, match="flops must lie in"):
        kwon(model, params, task, rows=rows, flops=0.0)
    with pytest.raises(ValueError, match="give rows that have one"):
        kwon(model, params, task, rows=[Example("no label")], flops=0.5)


def test_what_they_were_not_made_for_is_refused():
    model, params = tiny_model("t5")
    nothing = Calibration("language", (), {}, 0.0)
    for method in METHODS.values():
        with pytest.raises(ValueError, match="the model answers in text"):
            method(model, params, nothing)
    model, params = tiny_model(heads=(TaskHead(name="task", labels=("score",), regression=True),))
    with pytest.raises(ValueError, match="is a regression"):
        k_prune_batches(model, params, Calibration("task", (), {}, 0.0))


def test_flap_keeps_what_fluctuates_most_among_all_modules():
    """As by hand: deviations from means, weighed, standardised in every module, and the best of all of them stay."""
    model, params = tiny_model("bert")
    batch = tiny_batch(model, 8, 7, 0)
    values, _, means = score_batches(model, params, [batch], Fluctuation())
    table = Scores(values, {"properties": properties_of(Fluctuation())}, means)
    found = jp.select(
        model, params, table, jp.budgets.Units(0.5), rules=Rules(allocation="global", normalise=standardised)
    )
    own = {name: np.asarray(value, np.float64) for name, value in values.items()}
    fluctuation = {name: (value - value.mean()) / value.std(ddof=1) for name, value in own.items()}
    every = np.sort(np.concatenate([*fluctuation.values()]))[::-1]
    least = every[len(every) // 2 - 1]
    for name, value in fluctuation.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value >= least)

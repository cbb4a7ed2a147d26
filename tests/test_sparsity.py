"""Schedules, what is pruned, criteria, patterns and pruning once: exact counts and numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_model

import jaxprune as jp
from jaxprune.sparse.patterns import Matrix, find_matrices, pruned_of
from jaxprune.units import flatten, path_name


def kernels(path: tuple[Any, ...], array: Any) -> bool:
    return path[-1] == "kernel"


def mlp(kind: str = "random", seed: int = 0) -> dict[str, Any]:
    """Two kernels, their biases and an embedding."""
    random = np.random.default_rng(seed)
    draw = {
        "random": lambda *shape: random.standard_normal(shape),
        "tied": lambda *shape: random.integers(-2, 3, shape),
        "constant": lambda *shape: np.ones(shape),
    }[kind]
    shapes = {"in": {"kernel": (8, 12), "bias": (12,)}, "out": {"kernel": (12, 6)}, "words": (9, 8)}
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(*shape), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


# Schedules


def test_the_cubic_schedule_by_hand():
    schedule = jp.schedules.cubic_schedule(0.8, 10, prunings=4)  # at 2.5, 5, 7.5 and 10, rounded down
    assert schedule.steps == (2, 5, 7, 10)
    by_hand = [0.8 - 0.8 * left**3 for left in (0.8, 0.5, 0.3, 0.0)]  # 0.3904, 0.7, 0.7784, 0.8
    np.testing.assert_allclose(schedule.sparsities, by_hand, rtol=1e-12)
    assert schedule.final == 0.8
    values = [float(schedule(step)) for step in range(12)]
    expected = [0, 0, 0.3904, 0.3904, 0.3904, 0.7, 0.7, 0.7784, 0.7784, 0.7784, 0.8, 0.8]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(jax.vmap(schedule))(jnp.arange(12)), np.asarray(values, np.float32))


def test_a_schedule_starts_late_and_from_another_sparsity():
    schedule = jp.schedules.linear_schedule(0.9, 30, start=10, initial=0.5, prunings=2)
    assert schedule.steps == (20, 30)
    np.testing.assert_allclose(schedule.sparsities, [0.7, 0.9], rtol=1e-12)
    cubic = jp.schedules.cubic_schedule(0.9, 30, start=10, initial=0.5, prunings=2)
    np.testing.assert_allclose(cubic.sparsities, [0.9 - 0.4 / 8, 0.9], rtol=1e-12)


def test_the_papers_schedule_prunes_a_hundred_times():
    schedule = jp.schedules.cubic_schedule(0.95, 84_612)  # MRPC, arXiv 2104.08682
    assert len(schedule.steps) == 100 and schedule.steps[0] == 846 and schedule.steps[-1] == 84_612
    assert schedule.final == 0.95 and schedule.sparsities == tuple(sorted(set(schedule.sparsities)))


def test_fewer_steps_than_prunings_prune_at_each():
    assert jp.schedules.cubic_schedule(0.5, 3).steps == (1, 2, 3)
    assert jp.schedules.one_shot_schedule(0.5, 7) == jp.schedules.Schedule(steps=(7,), sparsities=(0.5,))


def test_a_schedule_knows_when_it_is_due():
    schedule = jp.schedules.one_shot_schedule(0.5, 2)
    assert [bool(schedule.due(step)) for step in range(4)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.schedules.cubic_schedule(1.0, 10), r"final must lie in \[0, 1\).* got 1.0"),
        (lambda: jp.schedules.cubic_schedule(0.5, 10, initial=0.6), r"initial must be at most final \(0.5\), got 0.6"),
        (lambda: jp.schedules.linear_schedule(0.5, 10, start=10), r"start must be .* less than steps \(10\), got 10"),
        (lambda: jp.schedules.linear_schedule(0.5, 10, prunings=0), "prunings must be at least 1, got 0"),
        (lambda: jp.schedules.one_shot_schedule(0.5, 0), "steps must rise from at least 1"),
        (lambda: jp.schedules.Schedule(steps=(1, 1), sparsities=(0.1, 0.2)), "steps must rise"),
        (lambda: jp.schedules.Schedule(steps=(1, 2), sparsities=(0.2, 0.1)), "sparsities must not fall"),
        (lambda: jp.schedules.Schedule(steps=(1, 2), sparsities=(0.2,)), "must be as many, at least one, got 2 and 1"),
    ],
)
def test_wrong_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# What is pruned


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "t5", "mt5"])
def test_the_linear_maps_of_every_layer_are_pruned_and_nothing_else(model_type):
    model, params = tiny_model(model_type)
    found = [matrix for matrix in find_matrices(params, jp.sparse.linear_maps(model)) if matrix]
    attentions = {"attention"} if model_type not in ("t5", "mt5") else {"attention", "cross"}
    expected = {
        path_name(path)
        for path in flatten(params)
        if "layers" in path and path[-1] == "kernel" and path[-3] in {*attentions, "ffn"}
    }
    assert {matrix.name for matrix in found} == expected
    per_layer = {"bert": 6, "distilbert": 6}.get(model_type)
    assert per_layer is None or len(found) == 2 * per_layer
    inputs = {matrix.name: matrix.inputs for matrix in found}
    assert {name.split(".")[-2] for name, count in inputs.items() if count == 2} == {"out"}
    assert {matrix.sides[0] for matrix in found if matrix.name.endswith(("query.kernel", "up.kernel"))} == {16}


def test_prunable_may_be_a_pytree():
    params = mlp()
    chosen = {"in": {"kernel": True, "bias": False}, "out": {"kernel": 0}, "words": 1}
    assert find_matrices(params, chosen) == (None, Matrix("in.kernel", (8, 12), 1), None, Matrix("words", (9, 8), 1))
    assert find_matrices([jnp.zeros((2, 3, 4))], lambda path, array: 2) == (Matrix("0", (2, 3, 4), 2),)
    assert find_matrices(jnp.zeros((2, 3)), lambda path, array: True) == (Matrix("the array", (2, 3), 1),)


@pytest.mark.parametrize(
    ("prunable", "message"),
    [
        (lambda path, array: True, r"in.bias has shape \(12,\)"),
        (lambda path, array: False, "prunable names none of the 4 parameters"),
        (lambda path, array: 2 * (path[-1] == "kernel"), r"in.kernel has shape \(8, 12\), got 2"),
        (lambda path, array: "yes", "got 'yes'"),
        ({"in": True}, "prunable must have the structure of the parameters"),
    ],
)
def test_what_cannot_be_pruned_is_refused(prunable, message):
    with pytest.raises(ValueError, match=message):
        jp.sparse.one_shot(mlp(), 0.5, prunable=prunable)


def test_only_floats_are_pruned():
    with pytest.raises(TypeError, match="words is int32"):
        find_matrices({"words": jnp.zeros((2, 2), jnp.int32)}, lambda path, array: True)


# Pruning once


@pytest.mark.parametrize("kind", ["random", "tied", "constant"])
def test_counts_are_exact_and_a_larger_sparsity_prunes_a_superset(kind):
    params = mlp(kind)
    before: Any = None
    for sparsity in (0.0, 0.1, 1 / 3, 0.5, 0.95, 0.999):
        pruned, masks = jp.sparse.one_shot(params, sparsity, prunable=kernels)
        counts = jp.sparse.sparsity_of(masks)
        assert counts.arrays == {
            "in.kernel": (pruned_of(sparsity, 96), 96),
            "out.kernel": (pruned_of(sparsity, 72), 72),
        }
        for name in ("in", "out"):
            mask, old = masks[name]["kernel"], params[name]["kernel"]
            np.testing.assert_array_equal(pruned[name]["kernel"], np.where(mask, old, 0))
            assert before is None or not (mask & ~before[name]["kernel"]).any()
        np.testing.assert_array_equal(pruned["words"], params["words"])
        before = masks
    last, _ = jp.sparse.one_shot(params, 0.95, prunable=kernels, masks=before)  # fewer are to be pruned than there are
    assert jp.sparse.sparsity_of(last, kernels).fraction >= jp.sparse.sparsity_of(before).fraction


def test_halves_are_rounded_up():
    assert [pruned_of(0.5, size) for size in (1, 2, 3)] == [1, 1, 2]
    assert pruned_of(0.95, 589_824) == 560_333  # 560332.8: an FFN matrix of MiniLM
    assert pruned_of(0.95, 84_934_656) == 80_687_923  # 80687923.2: all of BERT-base, more than float32 counts


def test_together_the_matrices_compete():
    params = mlp()
    params["out"]["kernel"] = params["out"]["kernel"] + 100
    _, masks = jp.sparse.one_shot(params, 0.5, prunable=kernels, together=True)
    assert jp.sparse.sparsity_of(masks) == (84, 168, {"in.kernel": (84, 96), "out.kernel": (0, 72)})


def test_one_shot_in_a_compiled_program_is_the_same():
    params = mlp()
    eager = jp.sparse.one_shot(params, 0.7, prunable=kernels)
    compiled = jax.jit(lambda own: jp.sparse.one_shot(own, 0.7, prunable=kernels))(params)
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_was_pruned_stays_pruned():
    params = mlp()
    _, masks = jp.sparse.one_shot(
        params, 0.5, prunable=kernels, criterion=jp.sparse.WeightMovement(), gradients=mlp(seed=1)
    )
    _, after = jp.sparse.one_shot(params, 0.6, prunable=kernels, masks=masks)
    assert jp.sparse.sparsity_of(after).arrays == {"in.kernel": (58, 96), "out.kernel": (43, 72)}
    assert all(not (new & ~old).any() for new, old in zip(*map(jax.tree.leaves, (after, masks)), strict=True))


def test_criteria_by_hand():
    weights, gradients = (
        {"kernel": jnp.asarray([[1.0, -2.0, 3.0, -4.0]])},
        {"kernel": jnp.asarray([[4.0, -1.0, -2.0, 0.5]])},
    )

    def kept(criterion: Any) -> list[bool]:
        _, masks = jp.sparse.one_shot(weights, 0.5, prunable=kernels, criterion=criterion, gradients=gradients)
        return masks["kernel"][0].tolist()

    assert kept(jp.sparse.WeightMagnitude()) == [False, False, True, True]
    assert kept(jp.sparse.WeightMovement()) == [False, False, True, True]  # -4, -2, 6, 2
    assert kept(jp.sparse.WeightFisher()) == [
        True,
        False,
        True,
        False,
    ]  # 16, 4, 36, 4: half of it times a factor
    total = jnp.zeros(2)
    fisher, movement = jp.sparse.WeightFisher(decay=0.5), jp.sparse.WeightMovement()
    for gradient in ([2.0, 0.0], [4.0, 2.0]):
        total = fisher.add(total, jnp.ones(2), jnp.asarray(gradient))
    np.testing.assert_allclose(fisher(jnp.asarray([2.0, 3.0]), total), [18.0, 9.0])  # E[g^2]: 1 + 8, 0 + 2
    np.testing.assert_allclose(movement.add(jnp.ones(2), jnp.asarray([2.0, 3.0]), jnp.asarray([4.0, -1.0])), [-7, 4])


def test_a_criterion_asks_for_its_gradients():
    with pytest.raises(ValueError, match="WeightFisher scores weights by gradients: give gradients"):
        jp.sparse.one_shot(mlp(), 0.5, prunable=kernels, criterion=jp.sparse.WeightFisher())
    for make in (jp.sparse.WeightMovement, jp.sparse.WeightFisher):
        with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\], got 0"):
            make(decay=0)


# Patterns


def test_two_of_four_by_hand():
    column = jnp.asarray([1.0, -3.0, 2.0, 0.5, 7.0, 7.0, 7.0, 7.0])
    weights = {"kernel": jnp.stack([column, column[::-1]], axis=1)}  # [8 inputs, 2 outputs]
    _, masks = jp.sparse.one_shot(weights, 0.5, prunable=kernels, pattern=jp.patterns.NM())
    assert masks["kernel"].T.astype(int).tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("kind", ["random", "tied", "constant"])
def test_every_group_of_inputs_keeps_n(n, m, kind):
    model, _ = tiny_model(layers=1)
    random = np.random.default_rng(0)
    draws = {"random": random.standard_normal, "constant": np.ones, "tied": lambda shape: random.integers(-1, 2, shape)}
    params = jax.eval_shape(model.initialise, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(draws[kind](a.shape), jnp.float32), params)
    _, masks = jp.sparse.one_shot(
        params, 1 - n / m, prunable=jp.sparse.linear_maps(model), pattern=jp.patterns.NM(n=n, m=m)
    )
    layer = masks["layers"][0]
    query, out = layer["attention"]["query"]["kernel"], layer["attention"]["out"]["kernel"]
    assert query.shape == (16, 4, 4) and out.shape == (4, 4, 16)
    assert (query.reshape(16 // m, m, 16).sum(1) == n).all()  # the inputs are the first axis
    assert (out.reshape(16 // m, m, 16).sum(1) == n).all()  # the inputs are the heads and their channels
    assert (layer["ffn"]["down"]["kernel"].reshape(32 // m, m, 16).sum(1) == n).all()


def test_blocks_by_hand():
    weights = {"kernel": jnp.asarray([[1.0, 2.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0, 1, 1], [0, 0, 1, 1]])}
    _, masks = jp.sparse.one_shot(weights, 0.5, prunable=kernels, pattern=jp.patterns.Block(inputs=2, outputs=2))
    # The blocks sum to 3, 9, 3 and 4: of equals the first would stay
    assert masks["kernel"].astype(int).tolist() == [[0, 0, 1, 1]] * 2 + [[0, 0, 1, 1]] * 2
    _, masks = jp.sparse.one_shot(weights, 0.25, prunable=kernels, pattern=jp.patterns.Block(inputs=2, outputs=2))
    assert masks["kernel"].astype(int).tolist() == [[1, 1, 1, 1]] * 2 + [[0, 0, 1, 1]] * 2


def test_blocks_of_one_weight_are_unstructured():
    for together in (False, True):
        found = [
            jp.sparse.one_shot(mlp(), 0.6, prunable=kernels, pattern=own, together=together)[1]
            for own in (jp.patterns.Block(inputs=1, outputs=1), jp.patterns.Unstructured())
        ]
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        (jp.patterns.NM(), {"sparsity": 0.95}, "2 of 4 weights stay, a sparsity of 0.5, got 0.95: give that sparsity"),
        (
            jp.patterns.NM(n=1, m=5),
            {"sparsity": 0.8},
            "the inputs .* multiple of 5: in.kernel has 8, out.kernel has 12. Leave",
        ),
        (jp.patterns.NM(), {"together": True}, "together must be False"),
        (
            jp.patterns.Block(inputs=2, outputs=4),
            {},
            "the outputs of every matrix must be a multiple of 4: out.kernel has 6",
        ),
        (jp.patterns.Unstructured(), {"sparsity": 1.0}, r"sparsity must lie in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_a_pattern_is_refused(pattern, settings, message):
    with pytest.raises(ValueError, match=message):
        jp.sparse.one_shot(mlp(), **{"sparsity": 0.5, "prunable": kernels, "pattern": pattern} | settings)


def test_wrong_patterns_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1 and less than m, got n=4 and m=4"):
        jp.patterns.NM(n=4, m=4)
    with pytest.raises(ValueError, match="outputs must be at least 1, got 0"):
        jp.patterns.Block(inputs=1, outputs=0)


# Masks


def test_masks_and_counts():
    params = {"kernel": jnp.asarray([[0.0, -0.0, 2.0], [np.nan, np.inf, 1e-45]]), "bias": jnp.zeros(4)}
    masks = jp.sparse.masks_of(params, kernels)
    assert isinstance(masks["bias"], optax.MaskedNode) and len(jax.tree.leaves(masks)) == 1
    assert masks["kernel"].tolist() == [[False, False, True], [True, True, True]]
    assert jp.sparse.sparsity_of(masks) == (2, 6, {"kernel": (2, 6)})
    assert jp.sparse.sparsity_of(params) == (6, 10, {"bias": (4, 4), "kernel": (2, 6)})  # of all parameters
    assert jp.sparse.sparsity_of(params, kernels).fraction == 2 / 6
    assert jp.sparse.sparsity_of({}).fraction == 0.0
    closed = jp.sparse.apply_masks(params, jax.tree.map(jnp.zeros_like, masks))
    assert (closed["kernel"] == 0).all()  # also where no number stood
    assert closed["bias"] is params["bias"]


def test_masks_of_other_parameters_are_refused():
    _, masks = jp.sparse.one_shot(mlp(), 0.5, prunable=kernels)
    with pytest.raises(ValueError, match="masks must be of the parameters that are pruned"):
        jp.sparse.one_shot(mlp(), 0.5, prunable=kernels, masks={"in": True})
    masks["out"]["kernel"] = masks["out"]["kernel"].T
    with pytest.raises(ValueError, match=r"shapes of their parameters; those of out.kernel do not"):
        jp.sparse.one_shot(mlp(), 0.5, prunable=kernels, masks=masks)

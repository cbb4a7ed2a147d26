"""Pruning while an optimizer trains: exact counts at every step, exact zeros, the rest as if they were not there."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from test_bisection import by_sorting
from test_sparsity import kernels, mlp
from tiny import tiny_model

import jaxprune as jp
from jaxprune.sparse import masks as sparse_training
from jaxprune.sparse.masks import SparseState
from jaxprune.sparse.patterns import pruned_of

SCHEDULE = jp.schedules.cubic_schedule(0.9, 12, prunings=4)  # at 3, 6, 9 and 12
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.adam(1e-2)),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "masked": lambda: optax.chain(optax.masked(optax.adam(1e-2), kernels_of), optax.scale(1.0)),
    "partitioned": lambda: optax.partition({True: optax.adam(1e-2), False: optax.sgd(1e-2, 0.9)}, kernels_of),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}


def kernels_of(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: kernels(tuple(step.key for step in path), leaf), params)


def loss(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["words"]) @ params["in"]["kernel"] + params["in"]["bias"]
    return jnp.mean(jnp.square(jnp.tanh(hidden) @ params["out"]["kernel"] - x[:, :6]))


def batch(step: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(step).standard_normal((5, 9)), jnp.float32)


def start(optimizer: optax.GradientTransformation, params: Any) -> Any:
    return optimizer.init(params)  # its type in optax is that of every state


def trainer(
    optimizer: optax.GradientTransformation, *, compiled: bool = True, objective: Callable[..., jax.Array] = loss
) -> Callable[..., tuple[Any, Any]]:
    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(objective)(params, x)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer count
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)) if compiled else step


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for own, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_their_moments_stay_zero(name):
    params = mlp()
    optimizer = jp.sparse_optimizer(OPTIMIZERS[name](), schedule=SCHEDULE, prunable=kernels)
    state = start(optimizer, params)
    step = trainer(optimizer)
    before = state.masks
    done = 0
    for number in range(1, 20):
        params, state = step(params, jax.tree.map(jnp.copy, state), batch(number))
        done = sum(own <= number for own in SCHEDULE.steps)
        sparsity = (0.0, *SCHEDULE.sparsities)[done]
        for part in ("in", "out"):
            mask, kernel = np.asarray(state.masks[part]["kernel"]), np.asarray(params[part]["kernel"])
            assert (~mask).sum() == pruned_of(sparsity, mask.size)
            assert (kernel[~mask] == 0).all() and (kernel[mask] != 0).all()
            assert not (mask & ~np.asarray(before[part]["kernel"])).any()
            moments = [a for a in jax.tree.leaves(state.inner) if a.shape == mask.shape]
            assert moments and all((np.asarray(moment)[~mask] == 0).all() for moment in moments)
            assert any((np.asarray(moment)[mask] != 0).any() for moment in moments) or name == "accumulated"
        before = jax.tree.map(np.asarray, state.masks)
    assert done == 4 and int(state.step) == 19


@pytest.mark.parametrize("kind", ["tied", "constant"])
def test_counts_are_exact_whatever_the_ties(kind):
    params = mlp(kind)
    optimizer = jp.sparse_optimizer(optax.sgd(0.0), schedule=jp.schedules.linear_schedule(0.95, 5), prunable=kernels)
    state = start(optimizer, params)
    step = trainer(optimizer)
    for number in range(1, 6):
        params, state = step(params, state, batch(number))
        sparsity = number * 0.95 / 5
        counts = {"in.kernel": (pruned_of(sparsity, 96), 96), "out.kernel": (pruned_of(sparsity, 72), 72)}
        assert jp.sparse.sparsity_of(state.masks).arrays == counts


def test_the_masks_are_those_of_a_stable_sort():
    """Of the weights as they stand before the update."""
    params = mlp()
    optimizer = jp.sparse_optimizer(optax.sgd(0.1), schedule=jp.schedules.one_shot_schedule(0.6, 3), prunable=kernels)
    state, step = start(optimizer, params), trainer(optimizer)
    for number in range(1, 4):
        before = jax.tree.map(np.asarray, params)
        params, state = step(params, state, batch(number))
    for part in ("in", "out"):
        own = before[part]["kernel"]
        expected = by_sorting(np.abs(own), np.ones(own.shape, bool), own.size - pruned_of(0.6, own.size))
        np.testing.assert_array_equal(state.masks[part]["kernel"], expected)


def test_before_the_first_pruning_it_is_the_optimizer_alone():
    inner = optax.adamw(1e-2)
    wrapped = jp.sparse_optimizer(inner, schedule=jp.schedules.one_shot_schedule(0.5, 100), prunable=kernels)
    plain, own = mlp(), mlp()
    plain_state, own_state = inner.init(plain), start(wrapped, own)
    alone, together = trainer(inner), trainer(wrapped)
    for number in range(3):
        plain, plain_state = alone(plain, plain_state, batch(number))
        own, own_state = together(own, own_state, batch(number))
    same((plain, plain_state), (own, own_state.inner))


def test_a_pruned_weight_counts_for_the_optimizer_as_if_it_were_not_there():
    """Training a masked model by its own gradients, from the start with these masks, is the same."""
    dense = mlp()
    pruned, masks = jp.sparse.one_shot(dense, 0.5, prunable=kernels)
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    optimizer = jp.sparse_optimizer(
        inner, schedule=jp.schedules.one_shot_schedule(0.9, 100), prunable=kernels, masks=masks
    )
    alone = trainer(inner, objective=lambda params, x: loss(jp.sparse.apply_masks(params, masks), x))
    plain, plain_state = jax.tree.map(jnp.copy, pruned), inner.init(pruned)
    own, state = jax.tree.map(jnp.copy, pruned), start(optimizer, pruned)
    for number in range(3):
        plain, plain_state = alone(plain, plain_state, batch(number))
        own, state = trainer(optimizer)(own, state, batch(number))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain_state, state.inner)
    assert jp.sparse.sparsity_of(own, kernels) == jp.sparse.sparsity_of(masks)


def test_masks_hold_from_the_first_update_on():
    dense = mlp()
    _, masks = jp.sparse.one_shot(dense, 0.5, prunable=kernels)
    optimizer = jp.sparse_optimizer(
        optax.sgd(0.1), schedule=jp.schedules.one_shot_schedule(0.9, 9), prunable=kernels, masks=masks
    )
    params, state = trainer(optimizer)(dense, start(optimizer, dense), batch(0))  # donates the masks of the state
    assert jp.sparse.sparsity_of(params, kernels) == jp.sparse.sparsity_of(masks) == jp.sparse.sparsity_of(state.masks)


@pytest.mark.parametrize(
    ("criterion", "pattern", "final"),
    [
        (jp.sparse.WeightMovement(), jp.patterns.Unstructured(), 0.9),
        (jp.sparse.WeightFisher(decay=0.9), jp.patterns.Block(inputs=2, outputs=3), 0.8),
        (jp.sparse.WeightMagnitude(), jp.patterns.NM(n=1, m=4), 0.75),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted_and_compiled_equals_eager(criterion, pattern, final):
    optimizer = jp.sparse_optimizer(
        optax.adamw(1e-2),
        schedule=jp.schedules.cubic_schedule(final, 6, prunings=3),
        prunable=kernels,
        criterion=criterion,
        pattern=pattern,
    )
    step = trainer(optimizer)

    def train(now: tuple[Any, Any], numbers: range) -> tuple[Any, Any]:
        for number in numbers:
            now = step(*now, batch(number))
        return now

    whole = train((mlp(), start(optimizer, mlp())), range(8))
    half = train((mlp(), start(optimizer, mlp())), range(3))
    stored = [np.asarray(leaf) for leaf in jax.tree.leaves(half)]  # as a checkpoint keeps them
    fresh = jax.eval_shape(lambda: (mlp(), start(optimizer, mlp())))
    loaded = jax.tree.unflatten(jax.tree.structure(fresh), [jnp.asarray(array) for array in stored])
    same(train(loaded, range(3, 8)), whole)
    # Of 96 and 72 weights, or of 16 and 12 blocks of 6: 13 and 10
    counts = {"Unstructured": [86, 65], "Block": [78, 60], "NM": [72, 54]}[type(pattern).__name__]
    assert [zeros for zeros, _ in jp.sparse.sparsity_of(whole[1].masks).arrays.values()] == counts

    eager = mlp(), start(optimizer, mlp())
    for number in range(8):
        eager = trainer(optimizer, compiled=False)(*eager, batch(number))
    same(eager[1].masks, whole[1].masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager[0], whole[0])


def test_n_of_m_is_reached_in_steps():
    optimizer = jp.sparse_optimizer(
        optax.sgd(0.1),
        schedule=jp.schedules.linear_schedule(0.5, 4),
        prunable=kernels,
        pattern=jp.patterns.NM(n=2, m=4),
    )
    params = mlp()
    state, step, kept = start(optimizer, params), trainer(optimizer), []
    for number in range(4):
        params, state = step(params, state, batch(number))
        groups = state.masks["in"]["kernel"].reshape(2, 4, 12).sum(1)
        assert (groups == groups[0, 0]).all()
        kept.append(int(groups[0, 0]))
    assert kept == [3, 3, 2, 2]  # floor(4 s + 1/2) of 4 are zero at 0.125, 0.25, 0.375, 0.5


def test_movement_sums_over_the_steps():
    optimizer = jp.sparse_optimizer(
        optax.sgd(0.5),
        schedule=jp.schedules.one_shot_schedule(0.5, 2),
        prunable=kernels,
        criterion=jp.sparse.WeightMovement(),
    )
    params: Any = {"kernel": jnp.asarray([[1.0, 1.0], [-1.0, 2.0]])}
    state: Any = start(optimizer, params)
    for _ in range(2):
        updates, state = optimizer.update({"kernel": jnp.asarray([[1.0, -1.0], [1.0, 0.5]])}, state, params)
        params = optax.apply_updates(params, updates)
    # -w g: -1, 1, 1, -1 at first; then the weights are 0.5, 1.5, -1.5, 1.75
    np.testing.assert_allclose(state.totals[0], [[-1.5, 2.5], [2.5, -1.875]])
    np.testing.assert_allclose(params["kernel"], [[0.0, 2.0], [-2.0, 0.0]])


def test_half_precision_weights_become_exactly_zero():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), mlp())
    optimizer = jp.sparse_optimizer(
        optax.sgd(0.1, 0.9), schedule=jp.schedules.one_shot_schedule(0.5, 1), prunable=kernels
    )
    state = start(optimizer, params)
    updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state, params)
    moved = optax.apply_updates(params, updates)
    assert jp.sparse.sparsity_of(moved, kernels) == jp.sparse.sparsity_of(state.masks)
    assert jax.tree.map(lambda a: a.dtype, moved) == jax.tree.map(lambda a: a.dtype, params)


def test_factored_moments_are_left():
    inner = optax.adafactor(1e-2, min_dim_size_to_factor=4)
    optimizer = jp.sparse_optimizer(inner, schedule=jp.schedules.one_shot_schedule(0.5, 1), prunable=kernels)
    params, state = trainer(optimizer)(mlp(), start(optimizer, mlp()), batch(0))
    assert jp.sparse.sparsity_of(params, kernels) == jp.sparse.sparsity_of(state.masks)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.inner)}
    assert {(8,), (12,), (6,)} <= shapes and (8, 12) not in shapes  # rows and columns


def test_it_prunes_a_model_of_this_package():
    model, params = tiny_model(layers=1)
    optimizer = jp.sparse_optimizer(
        optax.sgd(0.1), schedule=jp.schedules.cubic_schedule(0.95, 2), prunable=jp.sparse.linear_maps(model)
    )
    state = start(optimizer, params)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:  # of weight decay alone
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state)
    counts = jp.sparse.sparsity_of(state.masks).arrays
    assert len(counts) == 6 and set(counts.values()) == {(243, 256), (486, 512)}  # 243.2 and 486.4
    assert jp.sparse.sparsity_of(params, jp.sparse.linear_maps(model)).arrays == counts


def test_ranking_is_behind_a_condition():
    """A step on which nothing is pruned searches for no threshold: all loops of the program are inside the branch."""
    optimizer = jp.sparse_optimizer(optax.sgd(0.1), schedule=SCHEDULE, prunable=kernels)
    params = mlp()
    program = jax.make_jaxpr(optimizer.update)(params, start(optimizer, params), params)

    def loops(jaxpr: Any, inside: bool = False) -> list[bool]:
        found = [inside for equation in jaxpr.eqns if equation.primitive.name == "while"]
        for equation in jaxpr.eqns:
            branch = inside or equation.primitive.name == "cond"
            for inner in jaxprs_in_params(equation.params):
                found += loops(inner, branch)
        return found

    found = loops(program.jaxpr)
    assert found and all(found)


def test_wrong_uses_are_refused():
    optimizer = jp.sparse_optimizer(optax.sgd(0.1), schedule=SCHEDULE, prunable=kernels)
    params = mlp()
    with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
        optimizer.update(params, start(optimizer, params))
    with pytest.raises(ValueError, match=r"2 of 4 weights stay, a sparsity of 0.5, got 0.9"):
        jp.sparse_optimizer(optax.sgd(0.1), schedule=SCHEDULE, prunable=kernels, pattern=jp.patterns.NM())
    with pytest.raises(ValueError, match="the inputs of every matrix must be a multiple of 5"):
        late = jp.sparse_optimizer(
            optax.sgd(0.1), schedule=SCHEDULE, prunable=kernels, pattern=jp.patterns.Block(inputs=5, outputs=1)
        )
        late.init(params)  # before the first step


def test_the_state_is_a_pytree_of_arrays():
    optimizer = jp.sparse_optimizer(
        optax.adam(1e-2), schedule=SCHEDULE, prunable=kernels, criterion=jp.sparse.WeightMovement()
    )
    state = start(optimizer, mlp())
    assert isinstance(state, SparseState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state)) is not None
    assert optax.tree_utils.tree_get((state, ()), "masks") is state.masks


def test_the_example_of_the_docstring_runs():
    with jax.numpy_dtype_promotion("standard"):  # as its reader would run it
        found = doctest.testmod(sparse_training)
    assert found.attempted >= 8 and found.failed == 0


DEVICES = """
import conftest  # strict dtype promotion
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_sparse_training import batch, same, trainer
from test_sparsity import kernels, mlp

import jaxprune as jp

assert len(jax.devices()) == 4, jax.devices()
mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
places = {
    "in": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")},
    "out": {"kernel": PartitionSpec("model", None)},
    "words": PartitionSpec(),
}
places = jax.tree.map(lambda place: NamedSharding(mesh, place), places)
for together in (False, True):
    settings = dict(prunable=kernels, together=together)
    whole, masks = jp.sparse.one_shot(mlp("tied"), 0.7, **settings)
    split, split_masks = jp.sparse.one_shot(jax.device_put(mlp("tied"), places), 0.7, **settings)
    same((whole, masks), (split, split_masks))
    assert jp.sparse.sparsity_of(split_masks).zeros == (118 if together else 67 + 50)
schedule = jp.schedules.cubic_schedule(0.9, 4, prunings=2)
optimizer = jp.sparse_optimizer(optax.adamw(1e-2), schedule=schedule, prunable=kernels)
params = jax.device_put(mlp(), places)
state = optimizer.init(params)
assert state.masks["in"]["kernel"].sharding == places["in"]["kernel"]  # nothing is gathered
step, alone = trainer(optimizer), (mlp(), optimizer.init(mlp()))
for number in range(5):
    params, state = step(params, state, batch(number))
    alone = trainer(optimizer)(*alone, batch(number))
assert len(state.masks["out"]["kernel"].sharding.device_set) == 4
same(alone[1].masks, state.masks)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone[0], params)
"""


@pytest.mark.slow
def test_sharded_equals_unsharded():
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

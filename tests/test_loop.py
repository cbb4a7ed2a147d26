"""The training loop on a problem of a few numbers: it resumes to the same bits, and refuses what is not its state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune.training.loop import Run, Step, Training, TrainingState, read_state, train, trainable, update, write_state
from jaxprune.units import Params

SETTINGS = Training(learning_rate=0.1, warmup=0.2, decay=True)
STEPS = 33
OPTIMIZER = SETTINGS.optimizer_of(STEPS)


def start() -> TrainingState:
    random = np.random.default_rng(0)
    params = trainable({"a": {"kernel": random.standard_normal((3, 2))}, "b": {"bias": random.standard_normal(4)}})
    return TrainingState(params, OPTIMIZER.init(params))


@jax.jit
def loss_and_gradients(params: Params, batch: jax.Array) -> tuple[jax.Array, Params]:
    return jax.value_and_grad(
        lambda p: jnp.square(batch @ p["a"]["kernel"] - 1.0).mean() + jnp.square(p["b"]["bias"] - batch.sum()).mean()
    )(params)


def step(now: TrainingState, batch: np.ndarray) -> tuple[TrainingState, jax.Array]:
    loss, grads = loss_and_gradients(now.params, jnp.asarray(batch))
    return update(OPTIMIZER, now, grads), loss


def batches(epoch: int) -> list[np.ndarray]:
    return list(np.random.default_rng(epoch).standard_normal((7, 5, 3)).astype(np.float32))


def evaluate(now: TrainingState) -> dict[str, Any]:
    return {"value": float(jnp.sin(20 * now.params["a"]["kernel"]).sum())}  # up and down


RUN = Run(
    identity={"seed": 0, "steps": STEPS},
    steps=STEPS,
    batches=batches,
    step=step,
    evaluate=evaluate,
    evaluate_every=5,
    quality=lambda evaluation: evaluation["value"],
)


def same(one: TrainingState, other: TrainingState) -> None:
    jax.tree.map(np.testing.assert_array_equal, one._replace(history=()), other._replace(history=()))
    assert one.history == other.history


def stop_at(when: int, what: type[BaseException] = KeyboardInterrupt) -> Callable[[Step], None]:
    def stop(report: Step) -> None:
        if report.step == when:
            raise what

    return stop


@pytest.fixture(scope="module")
def whole() -> TrainingState:
    return train(RUN, start())


def test_it_evaluates_on_the_way_and_keeps_the_best(whole: TrainingState):
    assert [entry["step"] for entry in whole.history] == [5, 10, 15, 20, 25, 30, 33]
    values = [entry["value"] for entry in whole.history]
    best = RUN.best(whole.history)
    assert best == int(np.argmax(values)) and 0 < best < 6
    assert evaluate(whole._replace(params=whole.best))["value"] == values[best]
    assert RUN._replace(quality=lambda entry: -np.inf).best(whole.history) == -1


def test_it_reports_every_ten_steps_at_evaluations_and_in_the_end():
    seen: list[Step] = []
    train(RUN, start(), progress=seen.append)
    assert [s.step for s in seen if s.evaluation is None] == [10, 20, 30, 33]
    assert [s.step for s in seen if s.evaluation is not None] == [5, 10, 15, 20, 25, 30, 33]
    assert [s.epoch for s in seen if s.evaluation is not None] == [1, 2, 3, 3, 4, 5, 5]
    assert seen[-1].loss < seen[0].loss and {s.steps for s in seen} == {33}


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemError])
@pytest.mark.parametrize("when", [5, 10, 25, 33])
def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path: Path, when: int, what: type[BaseException]):
    file = tmp_path / "state"
    with pytest.raises(what):
        train(RUN, start(), file=file, progress=stop_at(when, what))
    seen: list[int] = []
    same(train(RUN, start(), file=file, progress=lambda report: seen.append(report.step)), whole)
    assert all(done >= when for done in seen)
    same(train(RUN, start(), file=file), whole)  # a finished run is not run again


def test_an_evaluation_that_was_interrupted_is_done_again(whole, tmp_path: Path):
    def interrupted(now: TrainingState) -> dict[str, Any]:
        if now.done == 15:
            raise KeyboardInterrupt
        return evaluate(now)

    with pytest.raises(KeyboardInterrupt):
        train(RUN._replace(evaluate=interrupted), start(), file=tmp_path / "state")
    same(train(RUN, start(), file=tmp_path / "state"), whole)


def test_an_update_that_was_interrupted_leaves_the_file_as_it_was(whole, tmp_path: Path):
    def broken(now: TrainingState, batch: np.ndarray) -> tuple[TrainingState, jax.Array]:
        after = step(now, batch)  # has used up what was before it
        if now.done == 12:
            raise KeyboardInterrupt
        return after

    file = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        train(RUN._replace(step=broken), start(), file=file, save_every=4)
    assert read_state(file, start(), RUN.identity).done == 12
    same(train(RUN, start(), file=file), whole)


def test_without_evaluations_the_last_state_is_written(tmp_path: Path):
    bare = RUN._replace(evaluate=None)
    done = train(bare, start(), file=tmp_path / "state")
    assert done.best == {} and done.history == ()
    same(read_state(tmp_path / "state", start(), RUN.identity), done)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_loop import *
def stop(report):
    if report.step == 20:
        os.kill(os.getpid(), signal.SIGKILL)
train(RUN._replace(evaluate_every=50), start(), file=Path({state!r}), save_every=7, progress=stop)
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path):
    run, file = RUN._replace(evaluate_every=50), tmp_path / "state"
    code = KILLED.format(tests=str(Path(__file__).parent), state=str(file))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_state(file, start(), run.identity).done == 14
    same(train(run, start(), file=file), train(run, start()))


def test_a_loss_that_is_not_finite_stops_the_run():
    def broken(now: TrainingState, batch: np.ndarray) -> tuple[TrainingState, jax.Array]:
        return now._replace(done=now.done + 1), jnp.asarray(jnp.nan)

    with pytest.raises(ValueError, match="the loss is nan at step 10: lower the learning rate"):
        train(RUN._replace(step=broken, evaluate_every=20), start())


# State files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        train(RUN, start(), file=tmp_path / "state", progress=stop_at(10))
    return tmp_path / "state"


def rewritten(file: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], **header: Any) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as stored:
        facts = json.loads(stored.metadata()["jaxprune_training"]) | header
    save_file(change(load_file(file)), file, {"jaxprune_training": json.dumps(facts)})


def test_a_state_of_another_run_is_refused(file: Path):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"another run \(seed is 1, was 0\)"):
        train(RUN._replace(identity={"seed": 1, "steps": STEPS}), start(), file=file)
    assert file.read_bytes() == before
    for damaged in (before[: len(before) // 2], b"", b"\0" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="no state of a run"):
            train(RUN, start(), file=file)


def test_a_state_of_an_earlier_version_is_refused(file: Path):
    """Its moments are named by their position."""
    rewritten(file, lambda arrays: {f"moments.{i}": array for i, array in enumerate(arrays.values())}, version=None)
    with pytest.raises(ValueError, match="another version of jaxprune: remove it to start again"):
        train(RUN, start(), file=file)


MU, NU, BIAS = "moments.1.mu.a.kernel", "moments.1.nu.a.kernel", "moments.1.mu.b.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own | {MU: own[BIAS], BIAS: own[MU]}, rf"2 of its arrays, such as {MU}: expected float32\[3, 2\]"),
        (lambda own: own | {MU: own[MU].T.copy()}, r"expected float32\[3, 2\], got float32\[2, 3\]: remove it"),
        (lambda own: own | {MU: own[MU].astype(np.float16)}, "got float16"),
        (lambda own: {name: array for name, array in own.items() if name != NU}, rf"{NU}: expected .* got none"),
        (lambda own: own | {"moments.1.extra": own[MU]}, "moments.1.extra: expected none"),
        (lambda own: own | {"params.a.kernel": own["params.b.bias"]}, r"params.a.kernel: expected float32\[3, 2\]"),
    ],
    ids=["permuted", "another shape", "another type", "missing", "unknown", "parameters"],
)
def test_arrays_that_do_not_fit_are_refused(file: Path, change: Any, message: str):
    rewritten(file, change)
    with pytest.raises(ValueError, match=message):
        train(RUN, start(), file=file)


def test_arrays_that_do_not_fit_are_not_read(file: Path):
    rewritten(file, lambda own: own | {MU: np.zeros(2**24, np.float32)})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"such as {MU}: expected float32\[3, 2\], got float32\[16777216\]"):
            read_state(file, start(), RUN.identity)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_value_that_changed_in_the_file_is_found(file: Path):
    rewritten(file, lambda own: own | {MU: own[MU] + np.float32(1e-3)})
    with pytest.raises(ValueError, match="damaged, its checksum is another than that of what it holds: remove it"):
        train(RUN, start(), file=file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"done": 3}, "its evaluations are after the steps .*, of 3"),
        ({"done": 26}, "checksum"),
        ({"done": -1}, "done is -1, expected a count"),
        ({"done": None}, "done is None"),
        ({"done": 10**30}, "done is 1000"),
        ({"history": 5}, "history is 5, expected a list"),
        ({"history": [{}]}, r"history\[0\].step is missing"),
        ({"history": [{"step": 20}, {"step": 5}]}, r"its evaluations are after the steps \[20, 5\]"),
        ({"history": [{"step": 99}]}, r"its evaluations are after the steps \[99\], of 25"),
        ({"run": []}, "run is .*, expected an object"),
        ({"more": 1}, "more is unknown"),
    ],
)
def test_a_header_that_was_edited_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    file = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        train(RUN, start(), file=file, progress=stop_at(25))
    rewritten(file, lambda own: own, **changes)
    with pytest.raises(ValueError, match=message):
        train(RUN, start(), file=file)


def test_a_state_of_more_steps_than_the_run_has_is_refused(tmp_path: Path):
    train(RUN, start(), file=tmp_path / "state")
    with pytest.raises(ValueError, match="has 33 steps of a run of 20"):
        train(RUN._replace(steps=20), start(), file=tmp_path / "state")


class Rising(NamedTuple):
    first: Params
    second: Params


class Falling(NamedTuple):  # the same parts; as leaves they are in another order
    second: Params
    first: Params


def test_moments_are_restored_by_name_not_by_position(tmp_path: Path):
    params = start().params
    first, second = (jax.tree.map(lambda a, n=n: jnp.full_like(a, n), params) for n in (1.0, 2.0))
    write_state(tmp_path / "state", TrainingState(params, Rising(first, second)), {})
    restored = read_state(tmp_path / "state", TrainingState(params, Falling(params, params)), {})
    jax.tree.map(np.testing.assert_array_equal, restored.moments, Falling(first=first, second=second))


# Settings


def test_the_rate_rises_and_falls():
    def rates(**settings: Any) -> list[float]:
        with jax.numpy_dtype_promotion("standard"):  # as inside of optax
            return np.asarray(Training(learning_rate=1.0, **settings).rate(8)(np.arange(9))).tolist()

    rising = rates(warmup=0.25, decay=True)
    np.testing.assert_allclose(rising, [0, 0.5, 1, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6, 0], atol=1e-6)
    np.testing.assert_allclose(rates(decay=True), 1 - np.arange(9) / 8, atol=1e-6)
    np.testing.assert_allclose(rates(warmup=1.0, decay=True), np.arange(9) / 8, atol=1e-6)
    np.testing.assert_allclose(rates(warmup=0.25), [0, 0.5, *[1.0] * 7], atol=1e-6)


def test_the_optimizer_follows_the_rate():
    params = {"weight": jnp.ones(3)}
    optimizer = Training(learning_rate=0.1, decay=True, weight_decay=0.0, clip=1e9).optimizer_of(8)
    state, sizes = optimizer.init(params), []
    for _ in range(8):  # the same gradient, so that Adam's step is the rate
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            updates, state = optimizer.update({"weight": jnp.full(3, 0.5)}, state, params)
        sizes.append(-float(jax.tree.leaves(updates)[0][0]))
    np.testing.assert_allclose(sizes, 0.1 * (1 - np.arange(8) / 8), rtol=1e-4)


def test_an_update_is_one_of_clipped_adamw():
    settings = Training(learning_rate=1e-2, weight_decay=0.1, clip=0.5)
    # biases may have two axes, as those of attention: they are not decayed
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2, 3))}
    grads = {"kernel": jnp.full((2, 2), 0.3), "bias": jnp.full((2, 3), -0.2)}
    mask = {"kernel": True, "bias": False}
    adamw = optax.adamw(1e-2, eps=1e-6, weight_decay=0.1, mask=mask)
    reference = optax.chain(optax.clip_by_global_norm(0.5), adamw)
    expected, state = params, reference.init(params)
    now = TrainingState(trainable(params), settings.optimizer_of(5).init(params))
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = reference.update(grads, state, expected)
        expected: Any = optax.apply_updates(expected, updates)
        now = update(settings.optimizer_of(5), now, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), expected, now.params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"learning_rate": 0.0}, "^learning_rate must be above 0, got 0.0"),
        ({"clip": 0.0}, "^clip must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay be at least 0"),
        ({"warmup": 1.5}, "warmup must lie in"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adafactor"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Training(**settings)


def test_settings_that_do_not_change_the_result_do_not_name_a_run():
    assert replace(SETTINGS, save_every=7).to_json() == SETTINGS.to_json()
    assert replace(SETTINGS, seed=7).to_json() != SETTINGS.to_json()

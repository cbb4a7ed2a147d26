"""Fine-tuning: an optimizer step by hand, fresh heads that learn, and runs that resume to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_model

from jaxprune.checkpoints.folder import digest
from jaxprune.data.batches import encode
from jaxprune.data.tasks import Example, Task
from jaxprune.evaluation.evaluate import Evaluation
from jaxprune.models import Model
from jaxprune.training.finetuning import Finetuned, Recipe, _best, _plan, _rate, _update, finetune, start_training
from jaxprune.training.loop import Step, read_state, write_state
from jaxprune.units import Params

DATA = Path(__file__).parent / "data"
RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=5e-3, warmup=0.1)


def encoder() -> tuple[Model, Params]:
    model, _ = tiny_model(layers=2, embed=32, neurons=64, heads=())
    return replace(model, source=DATA / "words"), model.initialise(jax.random.key(0))


WORDS = ["the", "a", "film", "book", "dog", "sun", "is", "was", "not", "very", "long", "old"]


def moods(name: str = "moods") -> Task:
    """Whether a text says good or bad, among other words; no text occurs twice."""
    random = np.random.default_rng(0)
    rows: dict[str, Example] = {}
    while len(rows) < 440:
        label = int(random.integers(2))
        words = list(random.choice(WORDS, random.integers(2, 12)))
        words.insert(int(random.integers(len(words) + 1)), ("bad", "good")[label])
        rows[" ".join(words)] = Example(text=" ".join(words), label=label)
    every = tuple(rows.values())
    splits = {"train": every[:320], "calibration": every[320:340], "dev": every[340:400], "test": every[400:]}
    return Task(name=name, splits=splits, labels=("bad", "good"))


def lengths(task: Task) -> Task:
    """A regression: how many words a text has, in tens."""
    rows = {s: tuple(replace(row, label=len(row.text.split()) / 10) for row in own) for s, own in task.splits.items()}
    return replace(task, name="lengths", splits=rows, labels=("score",), regression=True, metric="pearson_spearman")


def run(tasks: list[Task], **settings: Any) -> Finetuned:
    model, params = encoder()
    return finetune(model, params, tasks, **{"recipe": RECIPE, **settings})


@pytest.fixture(scope="module")
def whole() -> Finetuned:
    return run([moods(), lengths(moods())])


def test_fresh_heads_learn_their_tasks(whole: Finetuned):
    assert whole.model.heads == ("moods", "lengths") and set(whole.params["heads"]) == {"moods", "lengths"}
    mood, length = whole.epochs[whole.best - 1]
    assert mood["accuracy"] > mood.chance + 0.2
    assert length["pearson"] > 0.5


def test_the_best_epoch_is_kept(whole: Finetuned):
    means = [np.mean([result.primary[1] for result in results]) for results in whole.epochs]
    assert len(means) == RECIPE.epochs and whole.best == int(np.argmax(means)) + 1


def test_same_seed_same_bits(whole: Finetuned):
    assert digest(run([moods(), lengths(moods())]).params) == digest(whole.params)
    other = run([moods(), lengths(moods())], recipe=replace(RECIPE, seed=1, epochs=1))
    assert digest(other.params) != digest(whole.params)


@pytest.mark.parametrize(("when", "what"), [(10, KeyboardInterrupt), (50, SystemError)])
def test_interrupted_and_resumed_equals_uninterrupted(
    whole: Finetuned, tmp_path: Path, when: int, what: type[BaseException]
):
    def interrupt(step: Step) -> None:
        if step.step == when:
            raise what

    tasks, state = [moods(), lengths(moods())], tmp_path / "state"
    with pytest.raises(what):
        run(tasks, state=state, progress=interrupt)
    assert state.exists()
    seen: list[int] = []
    resumed = run(tasks, state=state, progress=lambda step: seen.append(step.step))
    assert seen[0] == when + 10
    assert digest(resumed.params) == digest(whole.params)
    assert resumed.epochs == whole.epochs
    first, again = ([[one.primary for one in own] for own in done.epochs] for done in (whole, resumed))
    assert again == first
    assert digest(run(tasks, state=state).params) == digest(whole.params)  # a finished run is not run again


def test_the_best_epoch_of_a_resumed_run_is_by_the_primary_metric(tmp_path: Path):
    """CoLA's primary metric does not come first in the alphabet, and is smaller than the one that does."""
    epochs = [{"matthews": 0.16, "accuracy": 0.71}, {"matthews": 0.24, "accuracy": 0.69}]
    facts = {"task": "cola", "split": "dev", "head": "cola", "chance": 0.0, "n": 60}
    history = [[Evaluation(metrics=metrics, **facts).to_json()] for metrics in epochs]
    params = encoder()[1]
    now = start_training(params, "adamw")._replace(best=params)
    write_state(tmp_path / "state", now, {}, history[:1])
    _, read = read_state(tmp_path / "state", now, {})
    assert _best([*read, *history[1:]]) == _best(history) == 2


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_training import *
def stop(step):
    if step.step == 30:
        os.kill(os.getpid(), signal.SIGKILL)
run([moods(), lengths(moods())], state={state!r}, save_every=7, progress=stop)
"""


def test_killed_and_resumed_equals_uninterrupted(whole: Finetuned, tmp_path: Path):
    state = tmp_path / "state"
    code = KILLED.format(tests=str(Path(__file__).parent), state=str(state))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert digest(run([moods(), lengths(moods())], state=state, save_every=7).params) == digest(whole.params)


def test_a_state_of_another_run_is_refused(tmp_path: Path):
    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        run([moods()], state=state, progress=interrupt)
    before = state.read_bytes()
    with pytest.raises(ValueError, match=r"another run \(recipe differ\)"):
        run([moods()], state=state, recipe=replace(RECIPE, learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"another run \(tasks differ\)"):
        run([moods("other")], state=state)
    assert state.read_bytes() == before
    state.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="no state of a run"):
        run([moods()], state=state)
    state.write_bytes(b"")
    with pytest.raises(ValueError, match="no state of a run"):
        run([moods()], state=state)


def test_held_out_rows_of_one_task_are_not_trained_on_in_another():
    task = moods()
    held = task.rows("dev")[:5]
    thief = replace(task, name="thief", splits={**task.splits, "train": (*task.rows("train"), *held)})
    done = run([task, thief], recipe=replace(RECIPE, epochs=1))
    assert done.leaks["thief", "moods"] == 5


def test_rows_are_drawn_or_repeated():
    model, _ = encoder()
    encoded = {"a": encode(model, moods().rows("train")), "b": encode(model, moods().rows("train"))}
    count = len(encoded["a"])
    recipe = Recipe(batch_size=16, rows={"a": 32, "b": 2 * count})
    batches, order = _plan(encoded, recipe, 0)
    visits = [batches[name][turn][index] for name, turn, index in order if name == "a"]
    assert sum(int(batch["weight"].sum()) for batch in visits) <= 32
    assert len(visits) == 2 and len(set(order)) == len(order)
    assert sum(name == "b" for name, _, _ in order) == -(-2 * count // 16)
    _, again = _plan(encoded, recipe, 0)
    _, other = _plan(encoded, recipe, 1)
    assert order == again and order != other


def test_an_update_is_one_of_adamw():
    recipe = Recipe(weight_decay=0.1, clip=0.5)
    random = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    params, grads = ({n: jnp.asarray(random.standard_normal(s), jnp.float32) for n, s in shapes.items()} for _ in "ab")
    # biases may have two axes, as those of attention: they are not decayed
    head = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2, 3))}
    head_grads = {"kernel": jnp.full((2, 2), 0.3), "bias": jnp.full((2, 3), -0.2)}
    reference = optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(
            1e-2,
            eps=1e-6,
            weight_decay=recipe.weight_decay,
            mask=tuple({"kernel": True, "bias": False} for _ in "ab"),
        ),
    )
    both, state = (params, head), reference.init((params, head))
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6)
    copies = jax.tree.map(jnp.copy, (params, head))
    now: Any = (copies, (adam.init(params), adam.init(head)))
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = reference.update((grads, head_grads), state, both)
        both: Any = optax.apply_updates(both, updates)
        now = _update(adam, recipe.weight_decay, recipe.clip, now, (grads, head_grads), jnp.float32(1e-2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), both, now[0])


def test_the_rate_rises_and_falls():
    recipe = Recipe(learning_rate=1.0, warmup=0.25)
    assert [_rate(f, recipe) for f in (0.0, 0.125, 0.25, 0.625, 1.0)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert _rate(0.5, Recipe(learning_rate=1.0, warmup=0.0)) == 0.5
    assert _rate(0.5, Recipe(learning_rate=1.0, warmup=1.0)) == 0.5


def test_the_callers_parameters_are_left_alone():
    model, params = encoder()
    before = digest(params)
    finetune(model, params, [moods()], recipe=replace(RECIPE, epochs=1))
    assert digest(params) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"warmup": 1.5}, "warmup in"),
        ({"rows": {"a": 0}}, "rows of 'a'"),
    ],
)
def test_impossible_recipes_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_impossible_tasks_are_refused():
    task = moods()
    with pytest.raises(ValueError, match="different names"):
        run([task, task])
    with pytest.raises(ValueError, match="different names"):
        run([])
    with pytest.raises(ValueError, match="no train rows"):
        run([replace(task, splits={**task.splits, "train": ()})])
    with pytest.raises(ValueError, match="rows names nothing"):
        run([task], recipe=replace(RECIPE, rows={"nothing": 5}))


def test_a_loss_that_is_not_finite_stops_the_run():
    task = lengths(moods())
    rows = tuple(Example(text=row.text, label=1e30) for row in task.rows("train"))
    with pytest.raises(ValueError, match="the loss is"):
        run([replace(task, splits={**task.splits, "train": rows})])


def test_history_is_plain_json(whole: Finetuned):
    assert json.loads(json.dumps([result.to_json() for result in whole.epochs[0]]))[0]["task"] == "moods"

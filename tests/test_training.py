"""Fine-tuning: an optimizer step by hand, fresh heads that learn, and runs that resume to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_model

from jaxprune.checkpoints.tensors import params_digest
from jaxprune.data.batches import encode
from jaxprune.data.tasks import Example, Task
from jaxprune.evaluation.evaluate import Evaluation
from jaxprune.models import Model
from jaxprune.training.finetuning import (
    Finetuned,
    FineTuning,
    _optimizer,
    _quality,
    _update,
    _visits,
    finetune,
)
from jaxprune.training.loop import Step
from jaxprune.units import Params

DATA = Path(__file__).parent / "data"
TRAINING = FineTuning(epochs=2, batch_size=16, learning_rate=5e-3, warmup=0.1)


def encoder(layers: int = 1) -> tuple[Model, Params]:
    model, _ = tiny_model(layers=layers, embed=32, neurons=64, heads=())
    return replace(model, source=DATA / "words"), model.initialise(jax.random.key(0))


WORDS = ["the", "a", "film", "book", "dog", "sun", "is", "was", "not", "very", "long", "old"]


def moods(name: str = "moods") -> Task:
    """Rows in which a text says good or bad, among other words; no text occurs twice."""
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


def run(tasks: list[Task], training: FineTuning = TRAINING, **settings: Any) -> Finetuned:
    model, params = encoder()
    return finetune(model, params, tasks, training, **settings)


@pytest.fixture(scope="module")
def whole() -> Finetuned:
    return run([moods(), lengths(moods())])


def test_fresh_heads_learn_their_tasks(whole: Finetuned):
    assert whole.model.heads == ("moods", "lengths") and set(whole.params["heads"]) == {"moods", "lengths"}
    mood, length = whole.evaluations[whole.best]
    assert mood["accuracy"] > mood.chance + 0.2
    assert length["pearson"] > 0.5


def test_the_best_epoch_is_kept(whole: Finetuned):
    means = [np.mean([result.primary[1] for result in results]) for results in whole.evaluations]
    assert len(means) == TRAINING.epochs and whole.best == int(np.argmax(means))


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path):
    def interrupt(step: Step) -> None:
        if step.step == 4:
            raise KeyboardInterrupt

    tasks, state = [moods(), lengths(moods())], tmp_path / "state"
    short = replace(TRAINING, steps=8, evaluate_every=4)
    expected = run(tasks, short)
    with pytest.raises(KeyboardInterrupt):
        run(tasks, short, state=state, progress=interrupt)
    resumed = run(tasks, short, state=state)
    assert params_digest(resumed.params) == params_digest(expected.params)
    assert resumed.evaluations == expected.evaluations and resumed.best == expected.best
    first, again = ([[one.primary for one in own] for own in done.evaluations] for done in (expected, resumed))
    assert again == first
    other = run(tasks, replace(short, seed=1))
    assert params_digest(other.params) != params_digest(expected.params)
    with pytest.raises(ValueError, match=r"another run \(training.learning_rate is 0.001, was 0.005\)"):
        run(tasks, replace(short, learning_rate=1e-3), state=state)
    with pytest.raises(ValueError, match=r"another run \(tasks\.lengths is null, was "):
        run([tasks[0], replace(tasks[1], name="other")], short, state=state)


def test_rows_that_changed_do_not_go_on_from_a_state(tmp_path: Path):
    """Another order, another spelling, other dev rows: the texts without case and punctuation may be the same."""
    task, state = moods(), tmp_path / "state"
    short = replace(TRAINING, steps=2)

    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([task], short, state=state, progress=interrupt)
    before = state.read_bytes()
    train, dev = task.rows("train"), task.rows("dev")
    others = {
        "train": [train[::-1], tuple(replace(row, text=row.text.upper()) for row in train)],
        "dev": [dev[::-1], (replace(dev[0], text=f"{dev[0].text}!"), *dev[1:])],
    }
    for split, changes in others.items():
        for rows in changes:
            other = replace(task, splits={**task.splits, split: rows})
            with pytest.raises(ValueError, match=rf"another run \(tasks\.moods\.{split} is "):
                run([other], short, state=state)
    with pytest.raises(ValueError, match="labels is"):
        run([replace(task, labels=("good", "bad"))], short, state=state)
    assert state.read_bytes() == before


def test_the_best_epoch_is_by_the_primary_metric():
    """CoLA's primary metric does not come first in the alphabet, and is smaller than the one that does."""
    epochs = [{"matthews": 0.16, "accuracy": 0.71}, {"matthews": 0.24, "accuracy": 0.69}]
    facts = {"task": "cola", "split": "dev", "head": "cola", "chance": 0.0, "n": 60}
    entries = [{"results": [Evaluation(metrics=metrics, **facts).to_json()]} for metrics in epochs]
    assert list(map(_quality, json.loads(json.dumps(entries, sort_keys=True)))) == [0.16, 0.24]


def test_held_out_rows_of_one_task_are_not_trained_on_in_another():
    task = moods()
    held = task.rows("dev")[:5]
    thief = replace(task, name="thief", splits={**task.splits, "train": (*task.rows("train"), *held)})
    done = run([task, thief], replace(TRAINING, steps=1))
    assert done.leaks["thief", "moods"] == 5


def test_rows_are_drawn_or_repeated():
    model, _ = encoder()
    encoded = {"a": encode(model, moods().rows("train")), "b": encode(model, moods().rows("train"))}
    count = len(encoded["a"])
    settings = FineTuning(batch_size=16, rows={"a": 32, "b": 2 * count})
    visits = _visits(encoded, settings, 0)
    drawn = [batches[index] for name, batches, index in visits if name == "a"]
    assert sum(int(batch["weight"].sum()) for batch in drawn) <= 32 and len(drawn) == 2
    assert sum(name == "b" for name, _, _ in visits) == -(-2 * count // 16)
    places = [(name, id(batches), index) for name, batches, index in visits]
    assert len(set(places)) == len(visits)
    order, again, other = (
        [(name, index) for name, _, index in own]
        for own in (visits, _visits(encoded, settings, 0), _visits(encoded, settings, 1))
    )
    assert order == again and order != other


def test_texts_that_are_cut_are_counted():
    with (
        pytest.warns(UserWarning, match=r"^(\d+) of 320 train texts of 'moods' are cut to 8 tokens \(max_length\)\.$"),
        pytest.raises(KeyboardInterrupt),
    ):
        run([moods()], replace(TRAINING, max_length=8, steps=1), progress=stop)


def stop(step: Step) -> None:
    raise KeyboardInterrupt


def test_an_update_is_one_of_adamw():
    """Of the encoder and one head, clipped by their common norm."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,)}
    params, grads = ({n: jnp.asarray(random.standard_normal(s), jnp.float32) for n, s in shapes.items()} for _ in "ab")
    head = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2, 3))}
    head_grads = {"kernel": jnp.full((2, 2), 0.3), "bias": jnp.full((2, 3), -0.2)}
    mask = tuple({"kernel": True, "bias": False} for _ in "ab")
    reference = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, eps=1e-6, weight_decay=0.1, mask=mask))
    expected, state = (params, head), reference.init((params, head))
    optimizer = _optimizer("adamw", 0.1)
    found = jax.tree.map(jnp.copy, (params, head))
    moments: Any = (optimizer.init(params), optimizer.init(head))
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = reference.update((grads, head_grads), state, expected)
        expected: Any = optax.apply_updates(expected, updates)
        found, moments = _update(optimizer, 0.5, found, moments, (grads, head_grads), jnp.float32(1e-2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), expected, found)


def test_the_callers_parameters_are_left_alone():
    model, params = encoder()
    before = params_digest(params)
    finetune(model, params, [moods()], replace(TRAINING, steps=1))
    assert params_digest(params) == before


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="rows of 'a' must be at least 1"):
        FineTuning(rows={"a": 0})
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        FineTuning(epochs=0)


def test_impossible_tasks_are_refused():
    task = moods()
    with pytest.raises(ValueError, match="different names"):
        run([task, task])
    with pytest.raises(ValueError, match="different names"):
        run([])
    with pytest.raises(ValueError, match="no train rows"):
        run([replace(task, splits={**task.splits, "train": ()})])
    with pytest.raises(ValueError, match="rows names nothing"):
        run([task], replace(TRAINING, rows={"nothing": 5}))


def test_a_loss_that_is_not_finite_stops_the_run():
    task = lengths(moods())
    rows = tuple(Example(text=row.text, label=1e30) for row in task.rows("train"))
    with pytest.raises(ValueError, match="the loss is"):
        run([replace(task, splits={**task.splits, "train": rows})], replace(TRAINING, steps=10))

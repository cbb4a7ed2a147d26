"""The joint loss: settings, losses by hand, every part by whole forward passes, padding that never leaks, learning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from passes import logits_of
from tiny import lively, random_gates, tiny_batch, tiny_model

import jaxprune as jp
from jaxprune.checkpoints.tensors import params_digest
from jaxprune.models import Mask, Model, TaskHead, score_mask
from jaxprune.training.distillation import surviving_heads
from jaxprune.training.joint_loss import (
    Distillation,
    head_index,
    initialise_projection,
    joint_loss,
    joint_loss_and_gradients,
    label_loss,
    last,
    match_layers,
    mean_squared_error,
    mean_where,
    one_to_one,
    soft_cross_entropy,
    uniform,
    without_projection,
)
from jaxprune.training.loop import TrainingState, share_gradients, trainable, update
from jaxprune.units import Params, flatten

ALL = Distillation(attention=0.5, embeddings=2.0, hidden=3.0, logits=0.7, labels=1.3, temperature=2.0)


def batch_of(model: Model, seed: int = 0) -> dict[str, Any]:
    """Three examples, the last without a label."""
    batch = tiny_batch(model, 3, 9, seed) | {"labels": np.array([2, 0, -1], np.int32)}
    if model.answers_in_text:
        answers = np.array([[5, 6, 1, -100], [7, 1, -100, -100], [8, 9, 4, 1]], np.int32)
        batch = {name: own for name, own in batch.items() if not name.startswith("decoder")}
        batch["candidates"] = np.broadcast_to(answers, (3, *answers.shape))
    return batch


def pair(model_type: str = "bert", **settings: Any) -> tuple[Model, Params, Params]:
    """A student and a teacher of one architecture."""
    model, params = tiny_model(model_type, **settings)
    return model, params, lively(model, 1)


def padded(model: Model, batch: dict[str, Any]) -> dict[str, Any]:
    """Two more columns and one more row, of which only the weight says that it is no example."""
    wide = {"input_ids": model.config.pad_id, "attention_mask": 0, "token_type_ids": 0}
    found = {}
    for name, array in batch.items():
        columns = 2 if name in wide else 0
        fill = [(0, 1), *[(0, columns)] * (array.ndim - 1)]
        fill = [*fill[:2], *[(0, 0)] * (array.ndim - 2)]
        found[name] = np.pad(array, fill, constant_values=wide.get(name, 0))
        found[name][-1] = array[0] if not columns else found[name][0]
    return found | {"weight": np.array([1, 1, 1, 0], np.float32)}


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for path, own in flatten(expected).items():
        scale = max(1.0, float(jnp.abs(own).max()))
        np.testing.assert_allclose(flatten(found)[path], own, rtol=0, atol=tolerance * scale, err_msg=str(path))


def mean(values: Any, mask: np.ndarray) -> float:
    return float(np.asarray(values)[np.broadcast_to(mask, values.shape)].mean())


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_parts_equal_those_of_whole_forward_passes(model_type: str):
    model, params, teacher = pair(model_type)
    batch = batch_of(model)
    total, parts = joint_loss((model, params), (model, teacher), batch, ALL)
    ours, theirs = (model.apply(own, batch, returns=("hidden", "scores")) for own in (params, teacher))
    assert ours.hidden and theirs.hidden and ours.scores and theirs.scores
    real = batch["attention_mask"].astype(bool)
    hidden = [mean((a - b) ** 2, real[:, :, None]) for a, b in zip(ours.hidden, theirs.hidden, strict=True)]
    pairs = real[:, None, :, None] & real[:, None, None, :]
    attention = [mean((a - b) ** 2, pairs) for a, b in zip(ours.scores, theirs.scores, strict=True)]
    logits, wanted = (logits_of(model, own, batch) for own in (params, teacher))
    soft = -4.0 * (jax.nn.softmax(wanted / 2) * jax.nn.log_softmax(logits / 2)).sum(-1)
    hard = -jax.nn.log_softmax(logits)[np.arange(2), batch["labels"][:2]]
    expected = {
        "attention": sum(attention),
        "embeddings": hidden[0],
        "hidden": sum(hidden[1:]),
        "logits": float(soft.mean()),
        "labels": float(hard.mean()),
    }
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(sum(w * expected[name] for name, w in ALL.weights.items()), rel=1e-5)


def test_parts_of_a_text_to_text_model_equal_those_of_whole_forward_passes():
    model, params, teacher = pair("t5", layers=1)
    batch = batch_of(model) | {"labels": np.array([2, 0, 1], np.int32)}
    settings = replace(ALL, temperature=1.0)
    _, parts = joint_loss((model, params), (model, teacher), batch, settings)
    targets = batch["candidates"][np.arange(3), batch["labels"]]
    own = targets >= 0
    shifted = np.concatenate([np.full((3, 1), model.config.start_id), np.where(own, targets, 0)[:, :-1]], 1)
    forced = batch | {"decoder_input_ids": shifted.astype(np.int32), "decoder_attention_mask": own}
    ours, theirs = (model.apply(p, forced, returns=("hidden", "scores")) for p in (params, teacher))
    assert ours.hidden and theirs.hidden and ours.scores and theirs.scores
    read, earlier = batch["attention_mask"].astype(bool), np.tri(4, dtype=bool)
    masks = [
        read[:, :, None] & read[:, None],
        own[:, :, None] & own[:, None] & earlier,
        own[:, :, None] & read[:, None],
    ]
    order = [0, 1, 2, 1, 2]  # the encoder's layer; the decoder's layers, each to itself and to the encoder
    attention = [
        mean((a - b) ** 2, masks[i][:, None]) for i, a, b in zip(order, ours.scores, theirs.scores, strict=True)
    ]
    tokens = [read, read, own, own, own]
    hidden = [mean((a - b) ** 2, m[..., None]) for m, a, b in zip(tokens, ours.hidden, theirs.hidden, strict=True)]
    logits, wanted = (logits_of(model, own, forced) for own in (params, teacher))
    soft = -(jax.nn.softmax(wanted) * jax.nn.log_softmax(logits)).sum(-1)
    hard = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.maximum(targets, 0)[..., None], -1)
    expected = {
        "attention": sum(attention),
        "embeddings": hidden[0] + hidden[2],
        "hidden": hidden[1] + hidden[3] + hidden[4],
        "logits": mean(soft, own),
        "labels": mean(hard[..., 0], own),
    }
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_padding_never_leaks(model_type: str):
    model, params, teacher = pair(model_type, layers=1)
    batch = batch_of(model)
    (total, parts), grads = joint_loss_and_gradients((model, params), (model, teacher), batch, ALL)
    more = padded(model, batch)
    assert more["input_ids"].shape == (4, 11)
    (found, own), slopes = joint_loss_and_gradients((model, params), (model, teacher), more, ALL)
    assert float(found) == pytest.approx(float(total), rel=1e-5)
    assert {n: float(part) for n, part in own.items()} == pytest.approx(
        {n: float(p) for n, p in parts.items()}, rel=1e-5
    )
    assert_same(slopes, grads, 2e-5)  # sums of another length


def test_gradients_equal_those_of_automatic_differentiation():
    """With another depth, another width, heads that are gone, and a task head that is not used."""
    heads = tuple(TaskHead(name=name, labels=("a", "b", "c")) for name in ("task", "other"))
    teacher_model, teacher = tiny_model(layers=2, heads=heads[:1], seed=1)
    model, params = tiny_model(layers=1, embed=8, attention_heads=4, heads=heads)
    gates = {"0.attention.heads": np.array([1, 0, 0, 1], np.float32)}
    params = jp.compact(model, params, gates)
    student = params | {"projection": initialise_projection(model, teacher_model, jax.random.key(0))}
    heads = surviving_heads(jp.pruning_record(gates, gates))
    batch, settings = batch_of(model), replace(ALL, layers=uniform, head="task", heads=heads)

    def loss(student: Params) -> Any:
        return joint_loss((model, student), (teacher_model, teacher), batch, settings)

    (total, parts), grads = joint_loss_and_gradients((model, student), (teacher_model, teacher), batch, settings)
    (expected, others), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(student)
    assert {n: float(part) for n, part in parts.items()} == pytest.approx({n: float(p) for n, p in others.items()})
    assert_same(grads, slopes)
    assert not any(jnp.any(own) for own in jax.tree.leaves(grads["heads"]["other"]))
    assert all(jnp.any(own) for own in jax.tree.leaves(grads["projection"]))


def test_gradients_of_a_text_to_text_model_equal_those_of_automatic_differentiation():
    model, params, teacher = pair("t5", layers=1)
    batch = batch_of(model) | {"labels": np.array([2, 0, 1], np.int32)}
    _, grads = joint_loss_and_gradients((model, params), (model, teacher), batch, ALL)
    slopes = jax.jit(jax.grad(lambda own: joint_loss((model, own), (model, teacher), batch, ALL)[0]))(params)
    assert_same(grads, share_gradients(model, slopes))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    model, _, teacher = pair()
    batch = batch_of(model)
    (_, parts), grads = joint_loss_and_gradients(
        (model, teacher), (model, teacher), batch, Distillation(temperature=3.0)
    )
    logits = logits_of(model, teacher, batch)
    entropy = -9.0 * (jax.nn.softmax(logits / 3) * jax.nn.log_softmax(logits / 3)).sum(-1).mean()
    np.testing.assert_allclose(parts.pop("logits"), entropy, rtol=1e-5)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(dict.fromkeys(parts, 0.0), abs=1e-9)
    assert_same(grads, jax.tree.map(jnp.zeros_like, grads))


def test_the_teacher_gets_no_gradient():
    model, params, teacher = pair(layers=1)
    batch = batch_of(model)
    slopes = jax.jit(jax.grad(lambda own: joint_loss((model, params), (model, own), batch)[0]))(teacher)
    assert not any(jnp.any(own) for own in jax.tree.leaves(slopes))


def test_a_step_may_be_compiled_as_one_program():
    model, params, teacher = pair(layers=1)
    batch = batch_of(model)
    expected = joint_loss_and_gradients((model, params), (model, teacher), batch)
    compiled = jax.jit(lambda *own: joint_loss_and_gradients((model, own[0]), (model, own[1]), own[2]))
    found = compiled(params, teacher, batch)
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-5)
    assert_same(found[1], expected[1])


def test_a_layer_map_of_one_to_one_is_the_default():
    model, params, teacher = pair()
    batch = batch_of(model)
    expected = joint_loss((model, params), (model, teacher), batch)[0]
    for layers in (uniform, last, lambda *_: (0, 1)):
        assert joint_loss((model, params), (model, teacher), batch, Distillation(layers=layers))[0] == expected


def test_a_layer_that_learns_from_none_adds_nothing():
    model, params, teacher = pair()
    batch = batch_of(model)
    only = [
        joint_loss((model, params), (model, teacher), batch, Distillation(logits=0.0, layers=lambda *_, m=m: m))[1]
        for m in ((0, None), (None, 1), (0, 1))
    ]
    for name in ("attention", "hidden"):
        assert float(only[0][name] + only[1][name]) == pytest.approx(float(only[2][name]), rel=1e-6)


def test_surviving_heads_learn_from_themselves():
    """In the first layer nothing else has changed: each head that is left has the scores that it had."""
    model, params = tiny_model(layers=1)
    for seed in (1, 2):
        gates = random_gates(model, params, seed)
        small = jp.compact(model, params, gates)
        heads = surviving_heads(jp.pruning_record(gates, gates))
        settings = Distillation(embeddings=0.0, hidden=0.0, logits=0.0, heads=heads)
        _, parts = joint_loss((model, small), (model, params), batch_of(model), settings)
        assert 0 < len(heads["0.attention.heads"]) < 4
        assert float(parts["attention"]) == pytest.approx(0.0, abs=1e-9)
    none = jp.compact(model, params, {"0.attention.heads": np.zeros(4, np.float32)})
    settings = Distillation(heads={"0.attention.heads": ()})
    (_, parts), grads = joint_loss_and_gradients((model, none), (model, params), batch_of(model), settings)
    assert float(parts["attention"]) == 0.0 and all(jnp.isfinite(own).all() for own in jax.tree.leaves(grads))


def test_a_regression_learns_from_its_hard_labels():
    head = TaskHead(name="task", labels=("score",), regression=True)
    model, params, teacher = pair(layers=1, heads=(head,))
    batch = batch_of(model) | {"labels": np.array([0.5, 1.5, 2.5], np.float32)}
    _, parts = joint_loss((model, params), (model, teacher), batch)
    logits, wanted = (logits_of(model, own, batch) for own in (params, teacher))
    assert set(parts) == {"attention", "embeddings", "hidden", "labels"}
    np.testing.assert_allclose(parts["labels"], jnp.square(logits[:, 0] - batch["labels"]).mean(), rtol=1e-5)
    soft = Distillation(attention=0.0, embeddings=0.0, hidden=0.0)
    found, _ = joint_loss((model, params), (model, teacher), batch, soft)
    np.testing.assert_allclose(found, jnp.square(logits - wanted).mean(), rtol=1e-5)


def test_logits_may_come_with_the_batch():
    model, params, teacher = pair()
    batch, settings = batch_of(model), Distillation(attention=0.0, embeddings=0.0, hidden=0.0)
    expected = joint_loss((model, params), (model, teacher), batch, settings)[0]
    known = batch | {"teacher_logits": np.asarray(logits_of(model, teacher, batch))}
    other = lively(model, 2)
    np.testing.assert_allclose(joint_loss((model, params), (model, other), known, settings)[0], expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"logits have the shape \(3, 3\), the teacher's \(3, 2\)"):
        joint_loss(
            (model, params), (model, teacher), known | {"teacher_logits": np.zeros((3, 2), np.float32)}, settings
        )


def test_the_student_alone_drops_out():
    model, params, teacher = pair()
    noisy = replace(model, config=replace(model.config, hidden_dropout=0.3, attention_dropout=0.3))
    batch = batch_of(model)
    plain = joint_loss((model, params), (model, teacher), batch)[0]
    assert joint_loss((noisy, params), (noisy, teacher), batch)[0] == plain
    found = [joint_loss((noisy, params), (noisy, teacher), batch, key=jax.random.key(i))[0] for i in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    quiet = joint_loss((noisy, params), (model, teacher), batch, key=jax.random.key(0))[0]
    assert quiet == found[0]  # the teacher's dropout was off


def taught(model: Model, params: Params, teacher: Params, optimizer: Any, steps: int) -> tuple[Params, list[float]]:
    student, losses = trainable(params), []
    now, batch = TrainingState(student, optimizer.init(student)), batch_of(model)
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        (loss, _), grads = joint_loss_and_gradients((model, now.params), (model, teacher), batch, key=key)
        now = update(optimizer, now, grads)
        losses.append(float(loss))
    assert now.done == steps
    return now.params, losses


def test_steps_reduce_the_loss_with_the_same_bits_each_time():
    model, params, teacher = pair(layers=1)
    model = replace(model, config=replace(model.config, hidden_dropout=0.1))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(3e-2, 1e-2, 8)))
    before = params_digest(params)
    found, losses = taught(model, params, teacher, optimizer, 8)
    assert losses[-1] < 0.8 * losses[0]
    again, _ = taught(model, params, teacher, optimizer, 8)
    assert params_digest(found) == params_digest(again) and params_digest(params) == before


def test_an_optimizer_may_prune():
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g, p: jnp.where(jnp.abs(p) < 0.1, -p, -0.01 * g), updates, params), state

    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    model, params, teacher = pair(layers=1)
    found, _ = taught(model, params, teacher, optimizer, 1)
    for path, own in flatten(found).items():
        assert ((np.asarray(own) == 0) >= (np.abs(flatten(params)[path]) < 0.1)).all()


def test_spans_are_refused():
    model, params = tiny_model(layers=1)
    spans = model.with_heads((TaskHead(name="find", labels=("start", "end"), pooling="none"),))
    with pytest.raises(ValueError, match="'find' is for spans, and losses are of labels"):
        joint_loss((spans, params), (spans, params), tiny_batch(model))


def test_a_projection_is_not_pruned():
    model, _ = tiny_model(layers=1)
    assert jp.sparse.linear_maps(model)(("projection", "embeddings"), np.zeros((4, 4))) == 0


def test_what_does_not_match_is_refused():
    model, params, teacher = pair(layers=1)
    batch = batch_of(model)
    other, others = tiny_model(layers=1, heads=(TaskHead(name="task", labels=("yes", "no", "maybe")),))
    with pytest.raises(
        ValueError, match=r"student's task head is 'task' \(no, maybe, yes\), the teacher's 'task' \(yes"
    ):
        joint_loss((model, params), (other, others), batch)
    wide, wider = tiny_model(layers=1, embed=24)
    with pytest.raises(ValueError, match=r"have the width 16, the teacher's 24: train params \|"):
        joint_loss((model, params), (wide, wider), batch)
    with pytest.raises(ValueError, match=r"hard labels needs 'labels' in the batch"):
        del batch["labels"]
        joint_loss((model, params), (model, teacher), batch, ALL)
    deep, deeper = tiny_model(layers=3)
    with pytest.raises(ValueError, match="choose a layer map"):
        joint_loss((model, params), (deep, deeper), batch)
    assert set(without_projection(params)) == set(params)


# Settings


def test_the_defaults_are_those_of_sparse_bert():
    assert Distillation() == Distillation.sparse_bert()
    assert Distillation().weights == {"attention": 1.0, "embeddings": 1.0, "hidden": 1.0, "logits": 1.0}
    regression = Distillation.sparse_bert(regression=True).weights
    assert regression == {"attention": 1.0, "embeddings": 1.0, "hidden": 1.0, "labels": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": -1.0}, "weights must be at least 0"),
        ({"labels": float("nan")}, "weights must be at least 0"),
        ({"attention": 0.0, "embeddings": 0.0, "hidden": 0.0, "logits": 0.0}, "one of them positive"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


def test_layer_maps():
    assert one_to_one(3, 3) == uniform(3, 3) == last(3, 3) == (0, 1, 2)
    assert uniform(3, 12) == (3, 7, 11) and uniform(4, 6) == (0, 2, 3, 5)
    assert last(2, 6) == (4, 5)
    with pytest.raises(ValueError, match="student has 2 layers, the teacher 3: choose a layer map"):
        one_to_one(2, 3)
    for layers in (uniform, last):
        with pytest.raises(ValueError, match="student has 4 layers, the teacher only 3"):
            layers(4, 3)


def test_layers_are_matched_stack_by_stack():
    model, teacher = tiny_model("t5", layers=1)[0], tiny_model("t5", layers=3)[0]
    assert match_layers(last, model, teacher) == {
        "encoder.0": "encoder.2",
        "decoder.0": "decoder.2",
        "decoder.1": "decoder.3",
    }
    encoder = tiny_model(layers=2)[0]
    assert match_layers(lambda *_: (None, 1), encoder, encoder) == {"0": None, "1": "1"}
    with pytest.raises(ValueError, match="both be encoders or both text-to-text"):
        match_layers(one_to_one, encoder, teacher)
    for wrong in ((0,), (1, 0), (0, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match=r"must give 2 rising numbers below 2 \(or None\), got"):
            match_layers(lambda *_, wrong=wrong: wrong, encoder, encoder)


def test_surviving_heads_are_those_of_the_record():
    model, params = tiny_model()
    gates = random_gates(model, params, seed=3)
    gates["1.attention.heads"] = jnp.zeros(4)
    record = jp.pruning_record({name: np.ones(len(gate), np.float32) for name, gate in gates.items()}, gates)
    found = surviving_heads(record)
    assert found == {n: tuple(np.flatnonzero(g)) for n, g in gates.items() if n.endswith("heads")}
    assert found["1.attention.heads"] == ()
    assert surviving_heads(
        {"sites": {"0.attention.heads": {"had": 9, "which": "0-2,5,7-8"}, "0.ffn.neurons": {"had": 2, "which": "1"}}}
    ) == {"0.attention.heads": (0, 1, 2, 5, 7, 8)}
    with pytest.raises(ValueError, match="a record of a pruning has 'sites'"):
        surviving_heads({})


def test_heads_are_matched_or_refused():
    assert head_index("x", 3, 3, {}) is head_index("x", 3, 3, {"x": (0, 1, 2)}) is None
    assert np.asarray(head_index("x", 2, 3, {"x": (0, 2)})).tolist() == [0, 2]
    assert np.asarray(head_index("x", 0, 3, {"x": ()})).tolist() == []
    with pytest.raises(ValueError, match=r"x: the student has 2 heads, the teacher 3. .*attention=0"):
        head_index("x", 2, 3, {})
    for wrong in ((0,), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="x: heads must name 2 of the teacher's 3 heads"):
            head_index("x", 2, 3, {"x": wrong})


def test_a_projection_goes_from_width_to_width_and_is_dropped():
    (model, params), (teacher, _) = tiny_model(embed=8), tiny_model(embed=16)
    found = initialise_projection(model, teacher, jax.random.key(0))
    assert {name: own.shape for name, own in found.items()} == {"embeddings": (8, 16), "hidden": (8, 16)}
    assert without_projection(params | {"projection": found}) == params


# Losses on plain arrays


def test_soft_cross_entropy_by_hand():
    student, teacher = jnp.array([[np.log(3.0), 0.0], [5.0, 5.0]]), jnp.array([[2.0, 2.0], [0.0, np.log(3.0)]])
    # the student says (3/4, 1/4) where the teacher says (1/2, 1/2), then (1/2, 1/2) where it says (1/4, 3/4)
    expected = np.array([-0.5 * np.log(3 / 16), np.log(2.0)], np.float32)
    np.testing.assert_allclose(soft_cross_entropy(student, teacher), expected, rtol=1e-6)
    np.testing.assert_allclose(soft_cross_entropy(2 * student, 2 * teacher, 2.0), 4 * expected, rtol=1e-6)


def test_soft_cross_entropy_has_no_gradient_at_equality():
    teacher = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5)), jnp.float32)
    at_equality = jax.grad(lambda s: soft_cross_entropy(s, teacher, 3.0).sum())(teacher)
    np.testing.assert_allclose(at_equality, jnp.zeros((4, 5)), atol=1e-6)


def test_hard_labels_by_hand():
    each, known = label_loss(jnp.array([[np.log(3.0), 0.0], [0.0, 0.0]]), jnp.array([1, -1]))
    np.testing.assert_allclose(each[0], np.log(4.0), rtol=1e-6)
    assert known.tolist() == [True, False]
    each, known = label_loss(jnp.array([[1.5], [2.0]]), jnp.array([1.0, -1.0]), regression=True)
    np.testing.assert_allclose(each, [0.25, 9.0])
    assert known.tolist() == [True, True]


def test_mean_squared_error_by_hand():
    student = jnp.arange(12, dtype=jnp.float32).reshape(2, 3, 2)
    teacher = jnp.zeros((2, 3, 2))
    mask = jnp.array([[True, True, False], [True, False, False]])
    # the entries 0 1 2 3 and 6 7: (0 + 1 + 4 + 9 + 36 + 49) / 6; a mean of all twelve would be half of it
    assert float(mean_squared_error(student, teacher, mask[:, :, None])) == 16.5
    assert float(mean_squared_error(student, teacher, jnp.zeros((2, 3, 1), bool))) == 0.0
    with pytest.raises(ValueError, match="must have one shape"):
        mean_squared_error(student, teacher[:1], mask[:, :, None])


def test_scores_count_where_query_and_key_are_tokens():
    mask = jnp.array([[True, True, False]])
    found = score_mask(Mask(mask), mask)
    assert found[0, 0].astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    scores = jnp.arange(18, dtype=jnp.float32).reshape(1, 2, 3, 3)
    # 0 1 3 4 of the first head, 9 10 12 13 of the second
    assert float(mean_squared_error(scores, jnp.zeros_like(scores), found)) == (26 + 81 + 100 + 144 + 169) / 8
    memory = jnp.array([[True, False]])
    decoder, earlier = Mask(mask, memory), mask[:, None] & np.tri(3, dtype=bool)
    assert score_mask(decoder, earlier)[0, 0].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert score_mask(decoder, memory)[0, 0].astype(int).tolist() == [[1, 0], [1, 0], [0, 0]]


def test_what_is_masked_may_be_anything_and_gets_no_gradient():
    values, mask = jnp.array([1.0, jnp.inf, jnp.nan, 3.0]), jnp.array([True, False, False, True])
    found, slope = jax.value_and_grad(lambda v: mean_where(v, mask))(values)
    assert float(found) == 2.0 and slope.tolist() == [0.5, 0.0, 0.0, 0.5]


@pytest.mark.reference
def test_losses_equal_pytorch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    random = np.random.default_rng(0)
    student, teacher = (random.standard_normal((6, 4)).astype(np.float32) for _ in "ab")
    ours, theirs = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    temperature = 2.5
    targets = functional.softmax(theirs / temperature, dim=-1)
    reference = functional.cross_entropy(ours / temperature, targets)
    found, slope = jax.value_and_grad(lambda s: soft_cross_entropy(s, jnp.asarray(teacher), temperature).mean())(
        student
    )
    np.testing.assert_allclose(found, temperature**2 * reference.item(), rtol=1e-5)
    (expected,) = torch.autograd.grad(temperature**2 * reference, ours)
    np.testing.assert_allclose(slope, expected.numpy(), atol=1e-6)
    labels = random.integers(0, 4, 6)
    found, known = label_loss(jnp.asarray(student), jnp.asarray(labels, jnp.int32))
    assert known.all()
    np.testing.assert_allclose(found.mean(), functional.cross_entropy(ours, torch.tensor(labels)).item(), rtol=1e-5)

    lengths = np.array([7, 3, 5])
    mask = np.arange(7) < lengths[:, None]
    hidden = [random.standard_normal((3, 7, 8)).astype(np.float32) for _ in "ab"]
    scores = [random.standard_normal((3, 2, 7, 7)).astype(np.float32) for _ in "ab"]
    pairs = [mask[:, None, :, None] & mask[:, None, None, :], mask[:, :, None]]
    for (first, second), chosen, own in zip(
        (scores, hidden), pairs, (lambda mask: score_mask(Mask(mask), mask), lambda mask: mask[:, :, None]), strict=True
    ):
        real = torch.tensor(np.broadcast_to(chosen, first.shape).copy())
        expected = functional.mse_loss(torch.tensor(first)[real], torch.tensor(second)[real]).item()
        found = mean_squared_error(jnp.asarray(first), jnp.asarray(second), own(jnp.asarray(mask)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)

"""Models: pure functions of parameters, batch and gates, whatever the widths; and what they refuse."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    DECODER_TYPES,
    LENGTH,
    MODEL_TYPES,
    TEXT_TYPES,
    lively,
    random_gates,
    tiny_batch,
    tiny_config,
    tiny_model,
)

from jaxprune import models
from jaxprune.compaction import compact
from jaxprune.models import BlockSettings, Mask, Model, Output, State, TaskHead, families, family, model_inputs, running
from jaxprune.models import bert as bert_family
from jaxprune.models.layers import Affine, attend, bind, describe, dropout, fused_attention, has_fused_attention, pool
from jaxprune.units import UNITS, Intervention, Params, flatten, open_gates, unflatten

HEADS = (TaskHead(name="task", labels=("no", "yes")),)
DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "roberta": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "distilbert": {"dropout": 0.5, "attention_dropout": 0.5, "seq_classif_dropout": 0.5},
}


def model_with(model_type: str, **settings: Any) -> tuple[Model, Params]:
    """A tiny model with other settings."""
    module = family(model_type)
    model = Model(module.parse_config(tiny_config(model_type) | settings, HEADS))
    return model, lively(model)


def logits(model: Model, params: Params, batch: Any, *args: Any, **settings: Any) -> np.ndarray:
    return np.asarray(model.apply(params, batch, *args, **settings).logits)


def renamed(params: Params, names: dict[Any, Any]) -> Params:
    """The parameters with some steps of their paths renamed."""
    return unflatten({tuple(names.get(step, step) for step in path): a for path, a in flatten(params).items()})


# What a model is


def test_models_are_equal_by_value(tmp_path: Path):
    model, other = tiny_model()[0], tiny_model()[0]
    assert model is not other and model == other and hash(model) == hash(other)
    moved = dataclasses.replace(model, source=tmp_path)
    assert moved == model and hash(moved) == hash(model)
    for different in (tiny_model(layers=3)[0], tiny_model("roberta")[0], model.with_heads(HEADS)):
        assert different != model


def test_a_model_is_a_static_argument_of_jit():
    traced = []

    def run(model: Model, params: Params, batch: Any) -> Any:
        traced.append(model)
        return model.apply(params, batch).logits

    compiled = jax.jit(run, static_argnums=0)
    model, params = tiny_model()
    batch = tiny_batch(model)
    expected = logits(model, params, batch)
    for same in (model, tiny_model()[0]):
        np.testing.assert_allclose(compiled(same, params, batch), expected, rtol=1e-5, atol=1e-5)
    assert len(traced) == 1


def test_no_width_is_stored():
    config = tiny_model()[0].config
    other = dataclasses.replace(config, neurons=5, attention_heads=2, vocab=9, positions=8)
    for make in (bert_family.Embeddings, bert_family.Block):
        one, two = (describe(lambda rngs, m=make, c=c: m(c, rngs=rngs)) for c in (config, other))
        assert one == two and hash(one) == hash(two)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_apply_composes_embed_block_and_readout(model_type: str):
    model, params = tiny_model(model_type)
    batch = tiny_batch(model)
    inputs = {name: jnp.asarray(array) for name, array in batch.items()}
    mask = Mask(inputs["attention_mask"] > 0)
    gates = random_gates(model, params)
    states = [model.embed(params["embeddings"], inputs)]
    settings = BlockSettings(returns=UNITS)
    values = {}
    for i, layer in params["layers"].items():
        local = Intervention({name: gates[f"{i}.{name}"] for name in ("attention.heads", "ffn.neurons")})
        state, found = model.block(layer, states[-1], mask, local, settings=settings)
        states.append(state)
        values |= {f"{i}.{name}": value for name, value in found.items()}
    expected = model.readout(params["heads"]["task"], states[-1], mask, model.head())
    output = model.apply(params, batch, gates, returns=("hidden", "sites"))
    assert output.hidden is not None and output.sites is not None
    np.testing.assert_allclose(np.asarray(output.logits), expected, rtol=1e-5, atol=1e-5)  # another order
    assert list(output.sites) == list(values) == list(gates)
    for found, value in zip(
        (*output.hidden, *output.sites.values()), (*(state.hidden for state in states), *values.values()), strict=True
    ):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)


def test_parts_that_were_not_asked_for_are_none():
    model, params = tiny_model()
    output = model.apply(params, tiny_batch(model))
    assert output == Output(output.logits)
    assert model.apply(params, tiny_batch(model), returns=("scores",)).sites is None


def test_layers_run_in_the_order_of_their_numbers():
    model, params = tiny_model(layers=3)
    batch = tiny_batch(model)
    shuffled = params | {"layers": {i: params["layers"][i] for i in (2, 0, 1)}}
    np.testing.assert_array_equal(logits(model, shuffled, batch), logits(model, params, batch))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fresh_parameters_are_random_and_differ(model_type: str):
    heads = (*HEADS, TaskHead(name="other", labels=("no", "yes"), dense="tanh"))
    model = tiny_model(model_type, heads=heads)[0]
    params = model.initialise(jax.random.key(0))
    drawn = [np.ravel(array)[:16] for path, array in flatten(params).items() if path[-1] in ("kernel", "embedding")]
    assert len({draw.tobytes() for draw in drawn}) == len(drawn)  # no random number is used twice
    assert np.isfinite(logits(model, params, tiny_batch(model), head="other")).all()
    again = model.initialise(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    fresh = model.initialise_head("other", jax.random.key(1))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params["heads"]["other"])


# What a batch is


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_changes_nothing(model_type: str, pooling: str):
    heads = (TaskHead(name="task", labels=("no", "yes"), pooling=pooling),)
    model, params = tiny_model(model_type, heads=heads)
    batch = tiny_batch(model)
    pad = {"input_ids": model.config.pad_id}
    wide = {name: np.pad(a, [(0, 1), (0, 4)], constant_values=pad.get(name, 0)) for name, a in batch.items()}
    found = logits(model, params, wide)
    np.testing.assert_allclose(found[:3], logits(model, params, batch), rtol=1e-5, atol=1e-5)
    assert np.isfinite(found).all()  # the last row has no token at all
    other = {name: array.copy() for name, array in wide.items()}
    if model_type in ("bert", "distilbert"):  # RoBERTa's positions depend on the padding's index
        other["input_ids"][wide["attention_mask"] == 0] = 17
        np.testing.assert_allclose(logits(model, params, other)[:3], found[:3], rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_has_finite_gradients():
    model, params = tiny_model()
    batch = tiny_batch(model)
    empty = {name: array * 0 for name, array in batch.items()}
    for returns in ((), ("scores",)):

        def total(params: Params, returns: tuple[str, ...] = returns) -> jax.Array:
            found = model.apply(params, empty, returns=returns).logits
            assert found is not None
            return found.sum()

        assert all(np.isfinite(slope).all() for slope in flatten(jax.grad(total)(params)).values())


def test_other_keys_of_a_batch_are_ignored():
    model, params = tiny_model()
    batch = tiny_batch(model)
    expected = logits(model, params, batch)
    np.testing.assert_array_equal(logits(model, params, batch | {"labels": np.zeros(3), "text": ["a"]}), expected)
    wide = {name: array.astype(np.int64) for name, array in batch.items()}  # what tokenizers return
    np.testing.assert_array_equal(logits(model, params, wide), expected)
    np.testing.assert_array_equal(logits(model, params, jax.tree.map(jnp.asarray, batch)), expected)


def test_segments_are_optional():
    model, params = tiny_model()
    batch = tiny_batch(model)
    none = {name: batch[name] for name in ("input_ids", "attention_mask")}
    zeros = batch | {"token_type_ids": batch["token_type_ids"] * 0}
    np.testing.assert_array_equal(logits(model, params, none), logits(model, params, zeros))
    assert np.abs(logits(model, params, none) - logits(model, params, batch)).max() > 0.01


def test_a_model_without_segments_ignores_them():
    model, params = tiny_model("distilbert")
    batch = tiny_batch(model)
    segments = batch | {"token_type_ids": np.ones_like(batch["input_ids"])}
    np.testing.assert_array_equal(logits(model, params, segments), logits(model, params, batch))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_longest_batch_fits(model_type: str):
    model, params = tiny_model(model_type, layers=1)
    assert model.max_length == LENGTH
    assert np.isfinite(logits(model, params, tiny_batch(model, 1, LENGTH))).all()
    with pytest.raises(ValueError, match="the batch has 65 tokens and the model reads 1 to 64: truncate the text"):
        model.apply(params, tiny_batch(model, 1, LENGTH + 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": None}, ValueError, r"no 'input_ids'; it has \['attention_mask', 'token_type_ids'\]"),
        ({"attention_mask": None}, ValueError, "no 'attention_mask'"),
        ({"input_ids": [[1, 2], [3]]}, ValueError, "tokenize with padding=True"),
        ({"input_ids": np.ones(9, int)}, ValueError, r"must be a \[batch, length\] array"),
        ({"input_ids": np.ones((3, 0), int)}, ValueError, "the batch has 0 tokens"),
        ({"input_ids": np.ones((3, 9))}, TypeError, "input_ids must be integers, got float32"),
        ({"input_ids": np.full((3, 9), 60)}, ValueError, "input_ids go from 60 to 60, the model knows 0 to 59"),
        ({"input_ids": np.full((3, 9), -1)}, ValueError, "input_ids go from -1 to -1"),
        ({"token_type_ids": np.full((3, 9), 2)}, ValueError, "token_type_ids go from 2 to 2, the model knows 0 to 1"),
        ({"attention_mask": np.ones((3, 8), int)}, ValueError, r"of shape \(3, 9\), as input_ids, got \(3, 8\)"),
        ({"attention_mask": [[1] * 9] * 3}, ValueError, "attention_mask must be an array of shape .*, got list"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception], message: str):
    model, params = tiny_model()
    batch = {name: array for name, array in (tiny_batch(model) | changes).items() if array is not None}
    with pytest.raises(error, match=message):
        model.apply(params, batch)


# Task heads


def test_several_task_heads():
    heads = (*HEADS, TaskHead(name="other", labels=("a", "b", "c"), dense="tanh", pooling="mean"))
    model, params = tiny_model(heads=heads)
    batch = tiny_batch(model)
    assert model.heads == ("task", "other")
    assert logits(model, params, batch, head="task").shape == (3, 2)
    assert logits(model, params, batch, head="other").shape == (3, 3)
    with pytest.raises(ValueError, match=r"has 2 task heads \(task, other\): name one with head="):
        model.apply(params, batch)
    with pytest.raises(ValueError, match="no task head 'third'; it has: task, other"):
        model.apply(params, batch, head="third")
    one = model.with_heads(HEADS)
    np.testing.assert_array_equal(logits(one, params, batch), logits(model, params, batch, head="task"))


def test_every_array_of_a_batch_is_transferred_once(monkeypatch):
    transferred = []

    def counted(array: Any) -> jax.Array:
        transferred.append(array)
        return jnp.array(array)

    monkeypatch.setattr(running, "jnp", SimpleNamespace(**vars(jnp) | {"asarray": counted}))
    for model_type in ("bert", "t5"):
        model, params = tiny_model(model_type)
        batch = tiny_batch(model)
        model_inputs(model, params, batch)
        assert len(transferred) == len(batch)
        transferred.clear()


def test_the_last_token_may_stand_for_the_text():
    hidden = jnp.arange(18, dtype=jnp.float32).reshape(3, 3, 2)
    mask = jnp.array([[True, True, False], [False, True, True], [False, False, False]])
    np.testing.assert_array_equal(pool(hidden, mask, "last"), [[2, 3], [10, 11], [12, 13]])
    np.testing.assert_array_equal(pool(hidden, mask, "first"), hidden[:, 0])


def test_facts_of_a_family():
    encoder, text = tiny_model("bert")[0], tiny_model("t5")[0]
    assert (encoder.answers_in_text, encoder.causal) == (False, False)
    assert (text.answers_in_text, text.causal) == (True, True)


def test_an_encoder_without_task_heads():
    model, params = tiny_model(heads=())
    output = model.apply(params, tiny_batch(model), returns=("hidden",))
    assert output.logits is None and output.hidden is not None
    with pytest.raises(ValueError, match="no task head 'task': fine-tune it first"):
        model.apply(params, tiny_batch(model), head="task")
    with pytest.raises(ValueError, match="the parameters have no 'heads'"):
        model.with_heads(HEADS).apply(params, tiny_batch(model))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((TaskHead(name="a", labels=("x",)), TaskHead(name="a", labels=("y",))), "names must differ"),
        ((TaskHead(name="a.b", labels=("x",)),), "made of letters"),
        ((TaskHead(name="1", labels=("x",)),), "letter first"),
        ((TaskHead(name="a", labels=()),), "has 0 labels"),
        ((TaskHead(name="a", labels=("x", "y"), regression=True),), "has 2 labels"),
        (
            (TaskHead(name="a", labels=("x",), pooling="max"),),
            "pooling must be 'first', 'mean', 'last' or 'none'",
        ),
        ((TaskHead(name="a", labels=("x",), dense="sine"),), "dense must be None or an activation, got 'sine'"),
    ],
)
def test_task_heads_that_cannot_be_are_refused(heads: tuple[TaskHead, ...], message: str):
    with pytest.raises(ValueError, match=message):
        tiny_model()[0].with_heads(heads)


def test_a_model_that_was_not_loaded_has_no_tokenizer(tmp_path: Path):
    model = tiny_model()[0]
    with pytest.raises(FileNotFoundError, match="was not loaded from a folder"):
        _ = model.tokenizer


# Parameters


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"word": "words"}, r"unknown \['words.embedding'\], missing \['word.embedding'\]"),
        ({"query": "queries"}, r"unknown \['attention.queries.bias', 'attention.queries.kernel'\], missing"),
        ({"scale": "weight"}, r"unknown \['norm.weight'\], missing \['norm.scale'\]"),
        ({"out": "zzz"}, "unknown"),  # sorts to another place, which merging by position would not notice
        ({"embeddings": "embedding"}, "the parameters have no 'embeddings'; there they have: embedding, heads, layers"),
        ({"layers": "layer"}, "the parameters have no 'layers'"),
        ({"heads": "head"}, "the parameters have no 'heads'"),
        ({"task": "default"}, r"the parameters have no 'heads\.task'; there they have: default"),
        ({1: 2}, r"the parameters have the layers \[0, 2\], the model 0 to 1"),
        ({0: "0", 1: "1"}, r"the parameters have the layers \['0', '1'\], the model 0 to 1 \(as integers\)"),
    ],
)
def test_renamed_parameters_are_refused(names: dict[Any, Any], message: str):
    model, params = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.apply(renamed(params, names), tiny_batch(model))


def test_missing_and_unknown_parameters_are_refused():
    model, params = tiny_model()
    batch = tiny_batch(model)
    flat = flatten(params)
    del flat["layers", 1, "ffn", "up", "bias"]
    with pytest.raises(ValueError, match=r"unknown \[\], missing \['ffn\.up\.bias'\]"):
        model.apply(unflatten(flat), batch)
    flat = flatten(params) | {("embeddings", "token_type", "bias"): jnp.zeros(16)}
    with pytest.raises(ValueError, match=r"unknown \['token_type\.bias'\], missing \[\]"):
        model.apply(unflatten(flat), batch)
    for layers in ({0: params["layers"][0]}, params["layers"] | {2: params["layers"][0]}):
        with pytest.raises(ValueError, match="the parameters have the layers"):
            model.apply(params | {"layers": layers}, batch)


def test_parameters_are_bound_by_name():
    part = describe(lambda rngs: Affine((2, 3), (3,), rngs=rngs))
    module = bind(part, {"kernel": jnp.ones((2, 4)), "bias": jnp.arange(4.0)})  # of another width
    np.testing.assert_array_equal(module(jnp.ones((1, 2))), [[2.0, 3, 4, 5]])
    module = bind(part, {"bias": jnp.arange(4.0), "kernel": jnp.ones((2, 4))})  # in another order
    np.testing.assert_array_equal(module(jnp.ones((1, 2))), [[2.0, 3, 4, 5]])
    with pytest.raises(ValueError, match="parameters and module disagree: unknown"):
        bind(part, {"kernel": jnp.ones((2, 4)), "shift": jnp.arange(4.0)})


# Configurations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"position_embedding_type": "relative_key"},
            "type is 'relative_key', supported: 'absolute'",
        ),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
        ({"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_classification'"),
        ({"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast', expected one of gelu, gelu_new"),
        ({"hidden_act": ["gelu"]}, "hidden_act is"),
        ({"num_attention_heads": 3}, "hidden_size is 16, expected a multiple of the 3 heads"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a positive integer"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"intermediate_size": 3.5}, "intermediate_size is 3.5"),
        ({"hidden_size": None}, "hidden_size is None, expected a positive integer"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648"),
        ({"type_vocab_size": -1}, "type_vocab_size is -1"),
        ({"type_vocab_size": True}, "type_vocab_size is True"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob is 1.0, expected a number in \[0, 1\)"),
        ({"classifier_dropout": "0.1"}, "classifier_dropout is '0.1'"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"pad_token_id": 60}, "pad_token_id is 60, expected one of the 60 tokens"),
    ],
)
def test_settings_that_are_not_supported_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"config.json of a bert model cannot be used: .*{message}"):
        bert_family.parse_config(tiny_config("bert") | settings)


def test_every_wrong_setting_is_in_one_error():
    raw = tiny_config("bert") | {"is_decoder": True, "vocab_size": 0}
    del raw["hidden_size"]
    with pytest.raises(ValueError, match=r"is_decoder is True.*; vocab_size is 0.*; hidden_size is missing") as caught:
        bert_family.parse_config(raw)
    assert str(caught.value).count("hidden_size") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, r"id2label has the keys \['0', '2'\], expected 0 to 1"),
        ({"id2label": ["a", "b"]}, r"id2label is \['a', 'b'\]"),
        ({"num_labels": "three"}, "num_labels is 'three'"),
        ({"problem_type": "regression"}, "problem_type is regression with 2 outputs"),
    ],
)
def test_labels_that_make_no_sense_are_refused(settings: dict[str, Any], message: str):
    raw = tiny_config("bert") | {"architectures": ["BertForSequenceClassification"]} | settings
    with pytest.raises(ValueError, match=message):
        bert_family.parse_config(raw)


@pytest.mark.parametrize("pad", [1, 7])
def test_roberta_needs_positions_after_that_of_the_padding(pad: int):
    raw = tiny_config("roberta") | {"pad_token_id": pad}
    assert bert_family.parse_config(raw).max_length == LENGTH + 1 - pad
    with pytest.raises(ValueError, match=f"max_position_embeddings is {pad + 1}, expected over {pad + 1}"):
        bert_family.parse_config(raw | {"max_position_embeddings": pad + 1})
    with pytest.raises(ValueError, match="pad_token_id is None"):
        bert_family.parse_config(raw | {"pad_token_id": None})


def test_distilbert_norms_do_not_depend_on_a_setting():
    assert bert_family.parse_config(tiny_config("distilbert") | {"layer_norm_eps": 0.1}).eps == 1e-12


@pytest.mark.parametrize("model_type", ["gpt2", "", None, 3, ["bert"]])
def test_other_model_types_are_refused(model_type: Any):
    known = ", ".join(sorted(families()))
    with pytest.raises(ValueError, match=f"is not supported; supported: {known}"):
        family(model_type)


def test_a_family_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sequoia.py").write_text('"""A family."""\n\nMODEL_TYPES = ("sequoia", "redwood")\n')
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    families.cache_clear()
    try:
        assert {*MODEL_TYPES, *TEXT_TYPES, *DECODER_TYPES, "sequoia", "redwood"} <= set(families())
        assert family("redwood").__name__ == "jaxprune.models.sequoia"
    finally:
        sys.modules.pop("jaxprune.models.sequoia", None)
        families.cache_clear()


# Dropout


@pytest.mark.parametrize("model_type", DROPOUT)
def test_dropout_needs_a_key_and_is_the_same_for_the_same_key(model_type: str):
    model, params = model_with(model_type, **DROPOUT[model_type])
    none, none_params = model_with(model_type)
    batch = tiny_batch(model)
    np.testing.assert_array_equal(logits(model, params, batch), logits(none, none_params, batch))
    one, again, other = (logits(model, params, batch, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01 and np.abs(one - logits(model, params, batch)).max() > 0.01
    np.testing.assert_array_equal(
        logits(none, none_params, batch, key=jax.random.key(1)), logits(none, none_params, batch)
    )


def test_dropout_keeps_the_mean():
    values = jnp.full(100_000, 3.0)
    found = np.asarray(dropout(values, 0.25, jax.random.key(0)))
    assert set(np.unique(found)) == {0.0, 4.0}
    assert abs(found.mean() - 3.0) < 4 * found.std() / np.sqrt(found.size)
    assert dropout(values, 0.25, None) is values and dropout(values, 0.0, jax.random.key(0)) is values


def test_layers_draw_different_dropout():
    model, params = model_with("bert", hidden_dropout_prob=0.5)
    same = params | {"layers": {0: params["layers"][0], 1: params["layers"][0]}}
    output = model.apply(same, tiny_batch(model), returns=("hidden",), key=jax.random.key(0))
    assert output.hidden is not None
    mask = Mask(jnp.asarray(tiny_batch(model)["attention_mask"]) > 0)
    drawn = [
        np.asarray(model.block(params["layers"][0], State(output.hidden[0]), mask, key=key)[0].hidden)
        for key in jax.random.split(jax.random.key(0), 4)
    ]
    np.testing.assert_allclose(output.hidden[1], drawn[0], rtol=1e-5, atol=1e-5)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


# Attention


def attention_inputs(dtype: Any, length: int = 10) -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    query, key, value = (jnp.asarray(random.standard_normal((3, length, 2, 8)), dtype) for _ in range(3))
    mask = jnp.asarray(np.arange(length) < np.array([[length], [length // 2], [0]]))  # the last row is all padding
    return query, key, value, mask


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_fused_attention_equals_our_own(dtype: Any):
    query, key, value, mask = attention_inputs(dtype)
    own, raw = attend(query, key, value, mask)
    fused = fused_attention(query, key, value, mask, implementation="xla")
    assert raw is None and own.dtype == fused.dtype == dtype
    exact = attend(query.astype(jnp.float32), key.astype(jnp.float32), value.astype(jnp.float32), mask)[0]
    tolerance = 1e-5 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)  # a few roundings of numbers near 1
    for found in (own, fused):
        np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=0, atol=tolerance)
    np.testing.assert_allclose(exact[2], np.broadcast_to(value[2].astype(jnp.float32).mean(0), (10, 2, 8)), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fused_attention_has_the_same_gradient(dtype: Any):
    *arrays, mask = attention_inputs(dtype)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((3, 10, 2, 8)), jnp.float32)

    def slopes(attention: Any) -> Any:
        return jax.jit(jax.grad(lambda a: (attention(*a, mask).astype(jnp.float32) * weights).sum()))(tuple(arrays))

    own = slopes(lambda *a: attend(*a)[0])
    with jax.numpy_dtype_promotion("standard"):  # the library's backward pass mixes types, as its forward pass does
        fused = slopes(lambda *a: fused_attention(*a, implementation="xla"))
    tolerance = 1e-5 if dtype == jnp.float32 else 8 * float(jnp.finfo(dtype).eps)
    for one, other in zip(own, fused, strict=True):
        scale = np.abs(np.asarray(other, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0, atol=tolerance * scale
        )


def test_attention_scores_are_before_mask_and_softmax():
    query, key, value, mask = attention_inputs(jnp.float32)
    mixed, raw = attend(query, key, value, mask, scores=True)
    expected = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8)
    np.testing.assert_allclose(np.asarray(raw), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed, attend(query, key, value, mask)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fused", "query", "value", "dtype", "capability"),
    [
        (True, (2, 16, 4, 64), (2, 16, 4, 64), jnp.bfloat16, 8.0),
        (True, (2, 16, 4, 128), (2, 16, 4, 128), jnp.float16, 9.0),
        (False, (2, 16, 4, 64), (2, 16, 4, 64), jnp.float32, 9.0),
        (False, (2, 16, 4, 64), (2, 16, 4, 64), jnp.bfloat16, 7.5),
        (False, (2, 16, 0, 64), (2, 16, 0, 64), jnp.bfloat16, 9.0),  # no head is left
        (False, (2, 16, 4, 12), (2, 16, 4, 12), jnp.bfloat16, 9.0),
        (False, (2, 16, 4, 136), (2, 16, 4, 136), jnp.bfloat16, 9.0),
        (False, (2, 16, 4, 64), (2, 16, 4, 32), jnp.bfloat16, 9.0),
        (False, (2, 15, 4, 64), (2, 15, 4, 64), jnp.bfloat16, 9.0),  # its backward pass would refuse
        (False, (2, 16, 4, 64), (2, 16, 4, 64), jnp.bfloat16, None),  # the device of this test, if it is a CPU
    ],
)
def test_where_attention_is_fused(fused: bool, query: Any, value: Any, dtype: Any, capability: float | None):
    if capability is None and jax.default_backend() != "cpu":
        pytest.skip("the default device is not a CPU")
    assert has_fused_attention(jnp.zeros(query, dtype), jnp.zeros(value, dtype), capability) is fused


# Types


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_close(dtype: Any):
    model, params = tiny_model()
    batch = tiny_batch(model)
    half = jax.tree.map(lambda array: array.astype(dtype), params)
    output = model.apply(half, batch, random_gates(model, params), returns=("hidden",))
    assert output.logits is not None and output.hidden is not None
    assert output.logits.dtype == jnp.float32 and output.hidden[-1].dtype == dtype
    expected = logits(model, params, batch, random_gates(model, params))
    tolerance = 16 * float(jnp.finfo(dtype).eps)  # two layers of roundings
    np.testing.assert_allclose(np.asarray(output.logits), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_a_pruned_copy_runs_in_the_same_model():
    model, params = tiny_model()
    batch = tiny_batch(model)
    gates = random_gates(model, params)
    small = compact(model, params, gates)
    np.testing.assert_allclose(
        logits(model, small, batch, open_gates(model, small)), logits(model, params, batch, gates), rtol=1e-4, atol=1e-5
    )

"""Decoders: configurations, positions, the laws with groups, query heads and neurons, generated and ranked answers."""

from __future__ import annotations

from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cost import dot_flops
from tiny import DECODER_TYPES, random_gates, tiny_batch, tiny_config, tiny_model

import jaxprune as jp
from jaxprune.compaction import compact
from jaxprune.data.batches import IGNORED
from jaxprune.data.prompts import prompt_of
from jaxprune.evaluation.text import generate, rank
from jaxprune.models import BlockSettings, Mask, Model, State, family
from jaxprune.models.cost import flops, parameters
from jaxprune.models.running import forward
from jaxprune.units import Intervention, Params, open_gates, sites, widths

UNITS = (("groups", "neurons"), ("query_heads", "neurons"))
TOLERANCE = 2e-5  # of the logits' scale: float32, other order of sums


@lru_cache
def tiny(model_type: str) -> tuple[Model, Params]:
    return tiny_model(model_type, attention_heads=8, layers=3)


def real(batch: dict[str, np.ndarray]) -> np.ndarray:
    return batch["attention_mask"].astype(bool)


def logits_of(model: Model, params: Params, batch: Any, **settings: Any) -> np.ndarray:
    return np.asarray(model.apply(params, batch, **settings).logits)


def aligned(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same rows, padded on the left."""
    order = np.argsort(batch["attention_mask"], axis=1, kind="stable")
    return {name: np.take_along_axis(array, order, axis=1) for name, array in batch.items()}


@pytest.mark.parametrize("model_type", DECODER_TYPES)
def test_padding_changes_nothing(model_type: str):
    model, params = tiny(model_type)
    batch = tiny_batch(model, rows=4)
    expected = logits_of(model, params, batch)
    left = aligned(batch)
    np.testing.assert_allclose(
        logits_of(model, params, left)[real(left)], expected[real(batch)], atol=TOLERANCE * np.abs(expected).max()
    )
    longer = {name: np.pad(array, [(0, 0), (2, 3)]) for name, array in batch.items()}
    np.testing.assert_allclose(
        logits_of(model, params, longer)[real(longer)], expected[real(batch)], atol=TOLERANCE * np.abs(expected).max()
    )


@pytest.mark.parametrize("model_type", DECODER_TYPES)
def test_no_token_sees_those_after_it(model_type: str):
    model, params = tiny(model_type)
    batch = tiny_batch(model, rows=1)
    changed = {**batch, "input_ids": batch["input_ids"].copy()}
    changed["input_ids"][:, 6:] = 2 + (changed["input_ids"][:, 6:] + 7) % 50
    before, after = (logits_of(model, params, each) for each in (batch, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.allclose(before[:, 6:], after[:, 6:])


def test_a_window_ends():
    model, params = mistral()
    batch = tiny_batch(model, rows=1)
    changed = {**batch, "input_ids": batch["input_ids"].copy()}
    changed["input_ids"][:, 0] = 2 + (changed["input_ids"][:, 0] + 7) % 50
    before, after = (logits_of(model, params, each) for each in (batch, changed))
    assert not np.allclose(before[:, 2], after[:, 2])
    np.testing.assert_allclose(before[:, 3:], after[:, 3:], rtol=0, atol=TOLERANCE * np.abs(before).max())


@pytest.mark.parametrize("kinds", UNITS)
@pytest.mark.parametrize("model_type", DECODER_TYPES)
def test_compaction_keeps_the_function(model_type: str, kinds: tuple[str, ...]):
    model, params = tiny(model_type)
    gates = random_gates(model, params, 0, True, kinds)
    closed = {name: jnp.zeros_like(gate) for name, gate in gates.items() if name.startswith("1.")}
    batch = tiny_batch(model)
    for each in (gates, gates | closed):
        expected = logits_of(model, params, batch, gates=each)
        small = compact(model, params, each)
        np.testing.assert_allclose(
            logits_of(model, small, batch)[real(batch)], expected[real(batch)], atol=TOLERANCE * np.abs(expected).max()
        )
        assert parameters(small) < parameters(params)


@pytest.mark.parametrize("kinds", UNITS)
@pytest.mark.parametrize("model_type", DECODER_TYPES)
def test_gradients_equal_those_of_apply(model_type: str, kinds: tuple[str, ...]):
    model, params = tiny(model_type)
    batch, gates = tiny_batch(model), open_gates(model, params, kinds)
    logits, pull = forward(model, params, batch, Intervention(gates))
    weights = batch["attention_mask"][..., None].astype(np.float32)
    cotangent = jax.random.normal(jax.random.key(0), logits.shape) * weights
    expected = jax.grad(lambda gates: (jnp.asarray(model.apply(params, batch, gates).logits) * cotangent).sum())(gates)
    for name, gradient in pull(cotangent)[0].items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-4 * float(jnp.abs(expected[name]).max()))


@pytest.mark.parametrize("closed", [(), ("groups",), ("neurons",)])
@pytest.mark.parametrize("model_type", DECODER_TYPES)
def test_flops_are_those_of_the_program(model_type: str, closed: tuple[str, ...]):
    model, params = tiny(model_type)
    gates = {
        site.name: np.arange(units) >= (units if site.kind in closed else units // 2)
        for site, units in zip(sites(model.axes, params), widths(model.axes, params).values(), strict=True)
    }
    small = compact(model, params, {name: jnp.asarray(gate, jnp.float32) for name, gate in gates.items()})
    state, mask = State(jnp.ones((1, 11, 16))), Mask(jnp.ones((1, 11), bool))
    counted = 0
    for kind, layer in zip(model.stacks[0].kinds, small["layers"].values(), strict=True):
        run = partial(model.block, state=state, mask=mask, settings=BlockSettings(kind=kind))
        counted += dot_flops(jax.make_jaxpr(lambda p, run=run: run(p)[0].hidden)(layer).jaxpr)
    assert flops(model, small, 11) == counted


@pytest.mark.parametrize("model_type", DECODER_TYPES)
def test_save_and_load_are_bit_exact(model_type: str, tmp_path: Any):
    model, params = tiny(model_type)
    for kinds in UNITS:
        small = compact(model, params, random_gates(model, params, 1, True, kinds))
        again, loaded = jp.load(jp.save(tmp_path / kinds[0], model, small))
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, loaded, small)


@pytest.mark.parametrize("model_type", DECODER_TYPES)
def test_generated_text_is_the_likeliest_token_by_token(model_type: str):
    model, params = tiny(model_type)
    batch, count = tiny_batch(model, rows=4), 5
    gates = random_gates(model, params, 3, True)
    for settings, tree in (({}, params), ({"gates": gates}, params), ({}, compact(model, params, gates))):
        written = np.asarray(generate(model, tree, batch, max_new_tokens=count, intervention=Intervention(**settings)))
        for row, tokens in enumerate(written):
            text = batch["input_ids"][row][real(batch)[row]]
            for token in tokens:
                ids = np.pad(text, (0, 16 - len(text)))[None]
                here = {"input_ids": ids, "attention_mask": (np.arange(16) < len(text))[None]}
                assert token == logits_of(model, tree, here, **settings)[0, len(text) - 1].argmax()
                text = np.append(text, token)
                if token in model.config.end_ids:
                    break


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("model_type", DECODER_TYPES)
def test_candidates_are_ranked_by_their_likelihood(model_type: str, tokens: int):
    model, params = tiny(model_type)
    batch = tiny_batch(model, rows=3)
    candidates = np.random.default_rng(0).integers(2, 60, (3, 4, tokens)).astype(np.int32)
    candidates[:, 1, 1:] = IGNORED  # a shorter answer
    ranked = np.asarray(rank(model, params, batch, candidates))
    for row, answers in enumerate(candidates):
        text = batch["input_ids"][row][real(batch)[row]]
        for label, answer in enumerate(answers):
            answer = answer[answer >= 0]
            ids = np.pad(np.concatenate([text, answer]), (0, 16))[None, :16]
            mask = (np.arange(16) < len(text) + len(answer))[None]
            logits = logits_of(model, params, {"input_ids": ids, "attention_mask": mask})[0]
            each = jax.nn.log_softmax(logits)[len(text) - 1 + np.arange(len(answer)), answer]
            np.testing.assert_allclose(ranked[row, label], each.sum(), atol=2e-4)


@lru_cache
def mistral() -> tuple[Model, Params]:
    """One layer with a window of three tokens."""
    raw = tiny_config("llama", layers=1) | {"model_type": "mistral", "sliding_window": 3}
    model = Model(family("mistral").parse_config(raw, ()))
    return model, model.initialise(jax.random.key(0))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads is 5, expected a multiple of the 2 key-value heads"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "are 'yarn', supported: default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, r"\(linear\) have \[\], expected \['factor'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, r"have \['beta', 'factor'\]"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor is 1.0 and high_freq_factor 1.0"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "expected positive numbers"),
        ({"rope_parameters": "default"}, "are 'default', expected an object"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"eos_token_id": [1, 600]}, "eos_token_id is 600, expected the index of a token"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"supported: one \.\.\.ForCausalLM"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None, expected true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ],
)
def test_configurations_that_cannot_be_used(changes: dict[str, Any], expected: str):
    with pytest.raises(ValueError, match=expected):
        family("llama").parse_config(tiny_config("llama") | changes, ())


def test_layer_types_need_a_window():
    raw = tiny_config("qwen3") | {"layer_types": ["sliding_attention", "full_attention"]}
    with pytest.raises(ValueError, match="no sliding_window says how many"):
        family("qwen3").parse_config(raw, ())
    config = family("qwen3").parse_config(raw | {"use_sliding_window": True, "sliding_window": 7}, ())
    assert config.kinds == ("sliding_attention", "full_attention") and config.window == 7


def test_float16_is_refused():
    model, params = tiny("llama")
    half = jax.tree.map(lambda array: array.astype(jnp.float16), params)
    with pytest.raises(TypeError, match="overflows in float16"):
        model.apply(half, tiny_batch(model))


def test_prompts_of_t5_are_not_taken_in_silence():
    model, _ = tiny("llama")
    task: Any = SimpleNamespace(name="sst2", prompt=None)
    with pytest.raises(ValueError, match=r"goes on from its prompt, and the built-in ones are T5's: give 'sst2' one"):
        prompt_of(model, task)

"""Decoders: configurations, positions, the laws with groups, query heads and neurons, generated and ranked answers."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import record_of, run
from test_cost import dot_flops
from test_prompts import built_in
from test_training import moods
from tiny import DECODER_TYPES, random_gates, tiny_batch, tiny_config, tiny_model

import jaxprune as jp
from jaxprune.compaction import compact
from jaxprune.data.batches import IGNORED
from jaxprune.data.prompts import Prompt, prompt_of, read_prompt
from jaxprune.data.tasks import Example, Rows, Task
from jaxprune.evaluation.evaluate import Evaluation, evaluate, fitting_head, predict
from jaxprune.evaluation.text import Sampling, encode_prompts, generate, rank, texts
from jaxprune.models import BlockSettings, Mask, Model, State, family
from jaxprune.models.cost import flops, parameters
from jaxprune.models.running import forward
from jaxprune.scoring.attribution import Context, GradientActivation, IntegratedGradients
from jaxprune.scoring.objectives import every, gold, log_probability, predicted, signed
from jaxprune.scoring.run import Scoring, score
from jaxprune.units import Intervention, Params, open_gates, sites, widths

UNITS = (("groups", "neurons"), ("query_heads", "neurons"))
ANSWERS = Path(__file__).parent / "data" / "answers"
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


# Drawn texts


def test_tokens_are_drawn_by_their_probability():
    model, params = tiny("llama")
    batch = {name: np.repeat(array[:1], 4000, axis=0) for name, array in tiny_batch(model, rows=1).items()}
    logits = logits_of(model, params, {name: array[:1] for name, array in batch.items()})[0]
    logits = logits[int(batch["attention_mask"][0].sum()) - 1]

    def shares(sampling: Sampling) -> np.ndarray:
        drawn = np.asarray(generate(model, params, batch, max_new_tokens=1, sampling=sampling))[:, 0]
        return np.bincount(drawn, minlength=len(logits)) / len(drawn)

    warm = np.asarray(jax.nn.softmax(logits / 2.0))
    np.testing.assert_allclose(shares(Sampling(temperature=2.0, key=3)), warm, atol=0.03)
    order = np.argsort(-warm)
    nucleus = order[: int((np.cumsum(warm[order]) < 0.5).sum()) + 1]
    expected = np.zeros_like(warm)
    expected[nucleus] = warm[nucleus] / warm[nucleus].sum()
    found = shares(Sampling(temperature=2.0, top_p=0.5))
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert set(np.flatnonzero(found)) <= set(nucleus) and len(nucleus) > 2


def test_what_is_drawn_depends_on_key_and_row():
    model, params = tiny("llama")
    batch = tiny_batch(model, rows=3)
    write = partial(generate, model, params, max_new_tokens=8)
    warm = Sampling(temperature=3.0)
    first = np.asarray(write(batch, sampling=warm))
    np.testing.assert_array_equal(write(batch, sampling=replace(warm, key=jax.random.key(0))), first)
    assert not np.array_equal(write(batch, sampling=replace(warm, key=1)), first)
    alone = {name: array[:1] for name, array in batch.items()}
    np.testing.assert_array_equal(write(alone, sampling=warm), first[:1])
    np.testing.assert_array_equal(write(batch, sampling=Sampling(top_p=1e-6)), write(batch))
    text = np.asarray(write(batch))[0]
    stopped = np.asarray(write(alone, stop=(int(text[2]),)))[0]
    assert stopped[:3].tolist() == text[:3].tolist() and not stopped[3:].any()
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens and 64 are to follow; the model reads 64"):
        write(batch, max_new_tokens=model.max_length)
    for name, wrong in (("temperature", 0.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5)):
        with pytest.raises(ValueError, match=rf"^{name} must"):
            replace(warm, **{name: wrong})


def test_the_command_writes_text(tmp_path: Path):
    model, params, _ = speaker("llama")
    jp.save(tmp_path / "model", model, params)
    asked = ("generate", tmp_path / "model", "the film was", "good", "--max-new-tokens", 5)
    record = record_of(*asked)
    batch = encode_prompts(model, ["the film was", "good"])
    expected = texts(model, generate(model, params, batch, max_new_tokens=5))
    assert [each["text"] for each in record["results"]] == expected
    assert record_of(*asked, "--temperature", 2, "--seed", 1)["settings"]["sampling"] == {"temperature": 2.0, "seed": 1}
    assert "no chat template" in run(*asked, "--chat").stderr
    assert "--temperature must be" in run(*asked, "--temperature", 0).stderr
    config = tmp_path / "model" / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [1, 600]}))
    refused = run(*asked)
    assert refused.exit_code == 2 and "eos_token_id in" in refused.stderr
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} ?{% endfor %}"
    talked = encode_prompts(model, ["the film"], chat=True)
    assert talked["input_ids"].tolist() == encode_prompts(model, ["the film ?"])["input_ids"][:, :-1].tolist()


# Label words and their calibration


@pytest.mark.parametrize("labels", [gold, predicted, every])
def test_label_words_are_attributed_among_themselves(labels: Any):
    model, params = tiny("llama")
    batch = tiny_batch(model, rows=3)
    words = np.array([7, 21, 40])
    candidates = np.full((3, 3, 2), IGNORED, np.int32)
    candidates[:, :, 0], candidates[:, 2, 1] = words, 9  # of the longer one only the first token is read
    bias = np.tile(np.array([0.5, -1.0, 0.0], np.float32), (3, 1))
    batch |= {"labels": np.array([2, 0, 1]), "candidates": candidates, "label_bias": bias}
    last = real(batch).sum(1) - 1

    def among(gates: Any) -> jax.Array:
        logits: Any = model.apply(params, batch, gates).logits
        return logits[np.arange(3), last][:, words] + bias

    ones = open_gates(model, params, UNITS[0])
    shares = jax.nn.softmax(among(ones))
    rows = {gold: batch["labels"], predicted: np.asarray(shares).argmax(1)}
    each = range(3) if labels is every else [rows[labels]]

    def chosen(label: Any, gates: Any) -> jax.Array:
        weights = shares[:, label] if labels is every else jnp.ones(3)
        return (weights * jax.nn.log_softmax(among(gates))[np.arange(3), label]).sum()

    slopes = [jax.grad(partial(chosen, label))(ones) for label in each]
    criterion = GradientActivation(objective=log_probability, labels=labels, kinds=UNITS[0], examples=signed)
    scores = criterion(model, params, batch, Context("words")).scores
    assert sorted(scores) == sorted(ones)
    for name, rows_of_site in scores.items():
        np.testing.assert_allclose(rows_of_site.sum(0), sum(s[name] for s in slopes), rtol=1e-3, atol=1e-5)
    if labels is gold:
        along = IntegratedGradients(nodes=128, chunk=64, kinds=UNITS[0])(model, params, batch, Context("words"))
        np.testing.assert_allclose(along.completeness["found"], along.completeness["expected"], atol=1e-5)


ASKED = Prompt(template="{text} is", words=("bad", "good"))


def speaker(model_type: str) -> tuple[Model, Params, Task]:
    """A model with a tokenizer, and a task."""
    model, params = tiny_model(model_type)
    return replace(model, source=ANSWERS), params, replace(moods(), prompt=ASKED)


def test_label_words_need_different_first_tokens():
    model, params, task = speaker("llama")
    assert fitting_head(model, task) == "words" and fitting_head(model, task, "language") == "language"
    alike = replace(task, prompt=Prompt(template="{text} is", words=("very bad", "very good")))
    assert fitting_head(model, alike) == "language"
    with pytest.raises(ValueError, match=r"'very bad' and 'very good' begin with the same token.*use the head 'l"):
        score(model, params, alike, Scoring(head="words"))
    with pytest.raises(ValueError, match="has no 'label_words'"):
        model.apply(params, tiny_batch(model), head="words")
    other, _, task = speaker("t5")
    assert fitting_head(other, task) == "language"


@pytest.mark.parametrize(("model_type", "head"), [("llama", "words"), ("llama", "language"), ("t5", "words")])
def test_calibration_takes_off_what_a_word_has_anyway(model_type: str, head: str):
    model, params, task = speaker(model_type)
    test, others = task.rows("test"), task.rows("calibration")
    plain = jax.nn.log_softmax(predict(model, params, test, head=head, prompt=ASKED))
    known = jax.nn.log_softmax(predict(model, params, others, head=head, prompt=ASKED))
    free = predict(model, params, [Example(text) for text in ("N/A", "[MASK]", "")], head=head, prompt=ASKED)
    offsets = {"none": np.zeros(2), "batch": known.mean(0), "content-free": jnp.log(jax.nn.softmax(free).mean(0))}
    truth = np.array([row.label for row in test])
    for name, offset in offsets.items():
        asked = replace(task, prompt=replace(ASKED, calibration=name))
        found = evaluate(model, params, asked, head=head)
        assert found.calibration == name and Evaluation.from_json(found.to_json()) == found
        assert found["accuracy"] == pytest.approx(np.mean((plain - offset).argmax(1) == truth))
        assert (f"{name} calibration" in str(found)) == (name != "none")
    assert len({np.asarray((plain - offset).argmax(1)).tobytes() for offset in offsets.values()}) > 1
    scoring = Scoring(criterion=GradientActivation(labels=predicted), rows=Rows(examples=8), head=head)
    free_of_bias, biased = (
        score(model, params, replace(task, prompt=replace(ASKED, calibration=name)), scoring)
        for name in ("none", "batch")
    )
    assert biased.header["prompt"]["calibration"] == "batch" and "calibration" not in free_of_bias.header["prompt"]
    changed = [not np.array_equal(biased.values[name], rows) for name, rows in free_of_bias.values.items()]
    assert any(changed) or head == "language"  # there the objective is the whole vocabulary's


def test_a_file_of_a_prompt_says_how_to_calibrate(tmp_path: Path):
    file = tmp_path / "prompt.yaml"
    file.write_text('template: "{text} is"\nwords: [" bad", " good"]\ncalibration: batch\n')
    assert read_prompt(file).calibration == "batch"
    file.write_text(file.read_text().replace("batch", "both"))
    with pytest.raises(ValueError, match=r"prompt.yaml:3: calibration must be one of none, content-free, batch, got"):
        read_prompt(file)


def test_decoders_have_prompts_of_their_own():
    model, _ = tiny("llama")
    chosen = prompt_of(model, built_in("ag_news"))
    assert chosen is not None and (chosen.name, chosen.words[0]) == ("plain", " politics")
    with pytest.raises(ValueError, match=r"goes on from its prompt, and there is no built-in one .* for 'rte'"):
        prompt_of(model, built_in("rte"))


def test_the_backward_pass_of_a_layer_keeps_what_its_products_return_alone():
    model, params = tiny("llama")
    config, batch = model.config, tiny_batch(model, rows=2)
    _, pull = forward(model, params, batch, Intervention(open_gates(model, params, UNITS[0])))
    (layer,) = (step for step in pull.steps if step.layer == "1")
    weights = {id(leaf) for leaf in jax.tree.leaves(params)}
    kept = [leaf for leaf in jax.tree.leaves(layer.pullback) if id(leaf) not in weights]
    tokens = batch["input_ids"].size
    heads = 2 * config.attention_heads + 2 * config.groups  # queries and what they mix, keys and values
    products = heads * config.head_dim + config.embed + 2 * config.neurons
    room = config.embed + config.head_dim  # the layer's input, and masks, gates and rates
    assert products * tokens <= sum(leaf.size for leaf in kept) <= (products + room) * tokens

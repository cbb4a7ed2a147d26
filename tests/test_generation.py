"""Greedy text: cached steps, padding, ends, gates, widths, compilation and errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TEXT_TYPES, random_gates, tiny_batch, tiny_model

from jaxprune.compaction import compact
from jaxprune.evaluation.text import generate, texts
from jaxprune.models import BlockSettings, Mask, Model, Output, State, block_compiled
from jaxprune.units import Intervention, Params, flatten, open_gates, unflatten, widths

COMPILED = "/jax/core/compile/backend_compile_duration"  # one event per program


def written(model: Model, params: Any, batch: Any, length: int = 12, **options: Any) -> np.ndarray:
    return np.asarray(generate(model, params, batch, max_new_tokens=length, intervention=Intervention(**options)))


def writer(kind: str, *, layers: int = 1, neurons: int = 32, seed: int = 4) -> tuple[Model, Params]:
    """A tiny model that goes on to the limit and does not say the same all the time.

    One with tied embeddings likes to repeat the token that it reads: smaller embeddings, and a larger say for places.
    """
    model, params = tiny_model(kind, layers=layers, neurons=neurons, seed=seed)
    factors = {"word": 0.3, "relative": 3.0}
    flat = {path: factors.get(str(path[-2]), 1.0) * leaf for path, leaf in flatten(params).items()}
    return endless(model), unflatten(flat)


def endless(model: Model) -> Model:
    """The same model with an end token that is not in its vocabulary: every row is written to the limit."""
    return replace(model, config=replace(model.config, end_id=model.config.vocab))


def forced(model: Model, params: Any, batch: Any, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """The logits at every place of a text, all places at once and without a cache, by `Model.apply`."""
    start = np.full((len(tokens), 1), model.config.start_id, np.int32)
    decoded = {"decoder_input_ids": np.concatenate([start, tokens[:, :-1]], 1)}
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output: Output = model.apply(params, source | decoded, **options)
    return np.asarray(output.logits)


def assert_greedy(model: Model, params: Any, batch: Any, tokens: np.ndarray, **options: Any) -> None:
    """Every token is the most likely one after those before it, and the text is not the same token throughout."""
    np.testing.assert_array_equal(tokens, forced(model, params, batch, tokens, **options).argmax(-1))
    assert np.unique(tokens).size > 2


@pytest.mark.parametrize("seed", [1, 4, 5])
@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_cached_steps_write_what_the_model_finds_most_likely_without_a_cache(kind: str, seed: int):
    model, params = writer(kind, layers=2, seed=seed)
    batch = tiny_batch(model, seed=seed)
    tokens = written(model, params, batch, 30)  # beyond the distance from which on positions share a bucket
    assert tokens.shape == (3, 30) and tokens.dtype == np.int32
    assert_greedy(model, params, batch, tokens)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_a_step_computes_what_the_block_does_at_its_place(kind: str, dtype: Any):
    model, params = tiny_model(kind)
    layer = jax.tree.map(lambda leaf: leaf.astype(dtype), params["decoder"]["layers"][1])
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((2, 26, 16)), dtype)
    memory, mask = jnp.asarray(random.standard_normal((2, 7, 16)), dtype), jnp.arange(7) < jnp.array([[7], [4]])
    gates = {
        "attention.heads": jnp.array([1.0, 0.5, 0.0, 2.0]),
        "cross.heads": jnp.array([[0.0, 1, 1, 1], [1, 1, 1, 0]]),
    }
    gates |= {"ffn.neurons": jnp.linspace(0.0, 1.0, 32)}
    means = {"attention.heads": jnp.ones((4, 3)), "ffn.neurons": jnp.ones(32)}
    given, masks = State(hidden, memory), Mask(jnp.ones((2, 26), bool), mask)
    intervention, settings = Intervention(gates, means), BlockSettings(kind="decoder")
    state, _ = block_compiled(model, settings, layer, given, masks, intervention, None)
    step = jax.jit(model.step)
    cache = jax.jit(model.prepare, static_argnums=2)(layer, State(hidden, memory), 26)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}
    assert [leaf.shape for leaf in cache.tokens] == [(2, 26, 4, 3)] * 2
    for place in range(26):
        token = State(hidden[:, place : place + 1], memory)
        (output, _), cache = step(layer, token, cache, jnp.int32(place), masks, intervention)
        expected = np.asarray(state.hidden[:, place : place + 1], np.float32)
        atol = (1e-5 if dtype == jnp.float32 else 0.03) * np.abs(expected).max()  # bfloat16 has 8 bits
        np.testing.assert_allclose(np.asarray(output, np.float32), expected, rtol=0, atol=atol)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_bfloat16_parameters_write_nearly_the_most_likely_tokens(kind: str):
    model, params = writer(kind)
    batch = tiny_batch(model)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tokens = written(model, small, batch)
    logits = forced(model, small, batch, tokens)
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    assert (logits.max(-1) - chosen <= 0.05 * np.abs(logits).max()).all()  # bfloat16 has 8 bits
    assert np.unique(tokens).size > 2


def test_padding_on_any_side_changes_nothing():
    model, params = writer("t5")
    batch = tiny_batch(model, rows=4, length=9)
    tokens = written(model, params, batch)
    rows = [batch["input_ids"][i][batch["attention_mask"][i] > 0] for i in range(4)]
    for left in (0, 1, 3):
        ids, mask = np.full((4, 15), 5, np.int32), np.zeros((4, 15), np.int32)  # what stands at padding does not matter
        for i, row in enumerate(rows):
            ids[i, left : left + len(row)], mask[i, left : left + len(row)] = row, 1
        np.testing.assert_array_equal(written(model, params, {"input_ids": ids, "attention_mask": mask}), tokens)
    assert len({len(row) for row in rows}) > 1 and len({tuple(row) for row in tokens}) == 4


def test_a_row_is_the_same_alone_and_in_any_order():
    model, params = writer("mt5")
    batch = tiny_batch(model, rows=5)
    first = written(model, params, batch)
    model = replace(model, config=replace(model.config, end_id=int(first[2, 3])))  # some rows end, others go on
    tokens = written(model, params, batch)
    assert len({tuple(row) for row in tokens}) == 5
    order = np.array([3, 0, 4, 1, 2])
    moved = {name: array[order] for name, array in batch.items()}
    np.testing.assert_array_equal(written(model, params, moved), tokens[order])
    for i in range(5):
        alone = {name: array[i : i + 1] for name, array in batch.items()}
        np.testing.assert_array_equal(written(model, params, alone), tokens[i : i + 1])


def test_what_the_batch_says_of_the_decoder_is_ignored():
    model, params = writer("t5")
    batch = tiny_batch(model)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    other = batch | {"decoder_input_ids": np.full((1, 1), -7), "labels": np.zeros(3)}
    np.testing.assert_array_equal(written(model, params, other), written(model, params, source))


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_the_end_token_is_kept_and_padding_follows(kind: str):
    model, params = writer(kind)
    batch = tiny_batch(model, rows=4)
    free = written(model, params, batch, 14)
    end = int(free[1, 4])
    ends = replace(model, config=replace(model.config, end_id=end, pad_id=3))
    expected = free.copy()
    for row in expected:
        places = np.flatnonzero(row == end)
        if places.size:
            row[places[0] + 1 :] = 3
    assert (expected != free).any(1).any() and (expected[1, 5:] == 3).all()
    np.testing.assert_array_equal(written(ends, params, batch, 14), expected)
    alone = {name: array[1:2] for name, array in batch.items()}  # writing stops before the limit
    np.testing.assert_array_equal(written(ends, params, alone, 14), expected[1:2])


def test_writing_stops_when_all_rows_have_ended(monkeypatch: pytest.MonkeyPatch):
    model, params = writer("t5")
    batch = {name: array[:1] for name, array in tiny_batch(model).items()}
    free = written(model, params, batch, 17)[0]
    ends = replace(model, config=replace(model.config, end_id=int(free[2])))
    needed = int(np.flatnonzero(free == free[2])[0]) + 1
    steps, readout = [], Model.readout

    def counted(*args: Any, **options: Any) -> Any:
        jax.debug.callback(lambda: steps.append(1))
        return readout(*args, **options)

    monkeypatch.setattr(Model, "readout", counted)
    written(ends, params, batch, 19)  # lengths of its own: nothing is compiled yet
    jax.effects_barrier()
    assert len(steps) == needed < 17
    steps.clear()
    written(model, params, batch, 19)
    jax.effects_barrier()
    assert len(steps) == 19


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_gates_write_what_the_compacted_model_writes(kind: str, fractional: bool):
    model, params = writer(kind)
    batch = tiny_batch(model)
    gates = random_gates(model, params, 3, fractional)
    small = compact(model, params, gates)
    tokens = written(model, params, batch, gates=gates)
    np.testing.assert_array_equal(tokens, written(model, small, batch))
    assert_greedy(model, small, batch, tokens)
    assert len(set(widths(model.axes, small).values())) > 3  # layers of different widths
    assert (tokens != written(model, params, batch)).any()
    np.testing.assert_array_equal(
        written(model, params, batch, gates=open_gates(model, params)), written(model, params, batch)
    )


def test_gates_per_example_are_one_model_per_row():
    model, params = writer("t5")
    batch = tiny_batch(model)
    own = [random_gates(model, params, seed) for seed in range(3)]
    gates = {name: jnp.stack([one[name] for one in own]) for name in own[0]}
    tokens = written(model, params, batch, gates=gates)
    for i, one in enumerate(own):
        expected = written(model, compact(model, params, one), batch)
        np.testing.assert_array_equal(tokens[i], expected[i])
        assert (expected[i] != expected[(i + 1) % 3]).any()


def test_means_replace_closed_units_in_every_step():
    model, params = writer("t5")
    batch = tiny_batch(model)
    gates = random_gates(model, params, 1)
    names = ("encoder.0.ffn.neurons", "decoder.0.ffn.neurons", "decoder.1.attention.heads", "decoder.1.cross.heads")
    means = {name: jnp.ones((4, 3) if name.endswith("heads") else 32) for name in names}
    tokens = written(model, params, batch, gates=gates, means=means)
    assert_greedy(model, params, batch, tokens, gates=gates, means=means)
    assert (tokens != written(model, params, batch, gates=gates)).any()


@pytest.mark.parametrize(
    "closed",
    [
        ("decoder.0.attention.heads",),
        ("decoder.1.cross.heads", "decoder.0.ffn.neurons"),
        ("encoder.0.attention.heads", "encoder.0.ffn.neurons", "decoder.1.attention.heads", "decoder.1.cross.heads"),
        None,  # all
    ],
)
def test_modules_without_units_are_left_out(closed: tuple[str, ...] | None):
    model, params = writer("t5")
    batch = tiny_batch(model)
    gates = open_gates(model, params)
    gates |= {name: jnp.zeros_like(gates[name]) for name in closed or gates}
    small = compact(model, params, gates)
    assert all(widths(model.axes, small)[name] == 0 for name in closed or gates)
    tokens = written(model, small, batch)
    np.testing.assert_array_equal(tokens, written(model, params, batch, gates=gates))
    np.testing.assert_array_equal(tokens, forced(model, small, batch, tokens).argmax(-1))
    assert (tokens != written(model, params, batch)).any()


def test_inside_jit_it_writes_the_same():
    model, params = writer("mt5")
    batch, gates = tiny_batch(model), random_gates(model, params)
    inside = jax.jit(partial(generate, max_new_tokens=9), static_argnums=0)
    np.testing.assert_array_equal(inside(model, params, batch), written(model, params, batch, 9))
    np.testing.assert_array_equal(
        inside(model, params, batch, intervention=Intervention(gates)), written(model, params, batch, 9, gates=gates)
    )


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The programs that are compiled during a test."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_equal_shapes_compile_once_and_a_new_limit_one_program(compiled: list[str]):
    model, params = writer("t5", neurons=20)  # widths of its own: nothing is compiled yet
    batch, other = tiny_batch(model, seed=0), tiny_batch(model, seed=1)
    _, others = writer("t5", neurons=20, seed=2)
    written(model, params, batch, 6)
    assert compiled
    compiled.clear()
    written(model, others, other, 6)
    assert not compiled
    written(model, params, batch, 7)
    assert len(compiled) == 1


def test_one_token_is_the_least_that_is_written():
    model, params = writer("t5")
    batch = tiny_batch(model)
    long = written(model, params, batch, 4)
    np.testing.assert_array_equal(written(model, params, batch, 1), long[:, :1])
    for number in (0, -1, model.max_length + 1):
        with pytest.raises(ValueError, match=f"max_new_tokens must lie in 1 to .*, got {number}"):
            generate(model, params, batch, max_new_tokens=number)
    for number in (True, 2.0, "3"):
        with pytest.raises(TypeError, match=f"max_new_tokens must be an integer, got {type(number).__name__}"):
            generate(model, params, batch, max_new_tokens=number)  # pyright: ignore[reportArgumentType]
    number: Any = np.int64(4)
    np.testing.assert_array_equal(generate(model, params, batch, max_new_tokens=number), long)


def test_a_model_that_does_not_write_is_refused():
    model, params = tiny_model("bert")
    with pytest.raises(ValueError, match="a bert model does not answer in text"):
        generate(model, params, tiny_batch(model), max_new_tokens=3)


def test_batches_gates_and_parameters_that_do_not_fit_are_refused():
    model, params = tiny_model("t5")
    batch = tiny_batch(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    run = partial(generate, model, params, max_new_tokens=3)
    for name in ("input_ids", "attention_mask"):
        with pytest.raises(ValueError, match=f"the batch has no {name!r}"):
            run({other: array for other, array in batch.items() if other != name})
    with pytest.raises(ValueError, match="must be an array of shape"):
        run({"input_ids": ids, "attention_mask": mask[:, 1:]})
    with pytest.raises(ValueError, match="the model knows 0 to 59"):
        run({"input_ids": ids + 60, "attention_mask": mask})
    with pytest.raises(TypeError, match="input_ids must be integers"):
        run({"input_ids": ids.astype(np.float32), "attention_mask": mask})
    with pytest.raises(ValueError, match=r"encoder\.0\.ffn\.neurons has 3 gates for 32 units"):
        run(batch, intervention=Intervention({"encoder.0.ffn.neurons": jnp.ones(3)}))
    with pytest.raises(ValueError, match=r"decoder\.0\.cross\.heads has gates for 2 examples, the batch has 3"):
        run(batch, intervention=Intervention({"decoder.0.cross.heads": jnp.ones((2, 4))}))
    with pytest.raises(ValueError, match=r"decoder\.9\.cross\.heads is not a site"):
        run(batch, intervention=Intervention(means={"decoder.9.cross.heads": jnp.ones((4, 3))}))
    layers = {i: own for i, own in params["decoder"]["layers"].items() if i != 1}
    with pytest.raises(ValueError, match="decoder layers"):
        generate(model, params | {"decoder": params["decoder"] | {"layers": layers}}, batch, max_new_tokens=3)


def test_texts_are_decoded_without_special_tokens(tmp_path: Path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "not": 3, "good": 4, "bad": 5}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    own = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    own.save_pretrained(str(tmp_path))
    model, _ = tiny_model("t5")
    tokens = jnp.array([[3, 4, 1, 0], [5, 1, 0, 0], [1, 0, 0, 0]], jnp.int32)
    assert texts(replace(model, source=tmp_path), tokens) == ["not good", "bad", ""]
    assert texts(replace(model, source=tmp_path), np.asarray(tokens)[:0]) == []
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        texts(model, tokens)

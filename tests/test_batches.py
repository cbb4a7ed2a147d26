"""Tokenising ahead, few fixed shapes, and a training order that is a function of seed and epoch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import tiny_model
from transformers import AutoTokenizer

from jaxprune.data.batches import BUCKETS, Batch, Encoded, encode, make_batches, pack, training_batches
from jaxprune.data.tasks import Example

WORDS = Path(__file__).parent / "data" / "words"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WORDS)


def texts(*lengths: int) -> list[Example]:
    """Examples of these lengths in tokens, special tokens included; each has other words."""
    words = ["the", "a", "this", "that", "film", "book", "day", "dog", "cat", "sun"]
    return [
        Example(" ".join(words[(row + i) % 10] for i in range(length - 2)), None, row % 3)
        for row, length in enumerate(lengths)
    ]


def random_texts(rows: int, seed: int = 0, most: int = 60) -> list[Example]:
    return texts(*np.random.default_rng(seed).integers(3, most + 1, rows).tolist())


def rows_of(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["index"] if i >= 0]


def test_encode_gives_what_the_tokenizer_gives(tokenizer: Any):
    examples = [Example("The film was good.", "A dog!", 1), Example("A very long day", "not red?", 0)]
    encoded = encode(tokenizer, examples)
    for row, example in enumerate(examples):
        expected = tokenizer(example.text, example.pair)
        at = slice(encoded.offsets[row], encoded.offsets[row + 1])
        assert encoded.input_ids[at].tolist() == expected["input_ids"]
        assert encoded.token_type_ids is not None
        assert encoded.token_type_ids[at].tolist() == expected["token_type_ids"]
    assert encoded.lengths.tolist() == [11, 10] and encoded.mean_length == 10.5
    assert encoded.labels.tolist() == [1, 0] and encoded.labels.dtype == np.int32
    assert len(encoded) == 2 and encoded.truncated == 0


def test_labels_of_a_regression_are_floats(tokenizer: Any):
    encoded = encode(tokenizer, [Example("a", None, 2.5), Example("b", None, 3.0)])
    assert encoded.labels.dtype == np.float32 and encoded.labels.tolist() == [2.5, 3.0]
    assert encode(tokenizer, [Example("a"), Example("b")]).labels.tolist() == [-1, -1]


def test_long_texts_are_cut_and_counted(tokenizer: Any):
    encoded = encode(tokenizer, texts(12, 30, 10, 31), max_length=12)
    assert encoded.truncated == 2 and encoded.lengths.tolist() == [12, 12, 10, 12]
    whole = tokenizer(texts(12, 30)[1].text)["input_ids"]
    assert encoded.input_ids[12:24].tolist() == [*whole[:11], tokenizer.sep_token_id]
    # of a pair the longer text is cut first: 4 words and 1 remain beside 3 special tokens
    pair = encode(tokenizer, [Example("the film was not very good", "dog", 0)], max_length=8)
    assert pair.token_type_ids is not None and pair.token_type_ids.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_a_max_length_beyond_the_models_positions_is_an_error_that_names_both(tokenizer: Any):
    model = replace(tiny_model("bert")[0], source=WORDS)
    assert encode(model, texts(5)).max_length == 64  # the default, 128, is more than this model reads
    with pytest.raises(ValueError, match="max_length is 65, but the model has only 64 positions"):
        encode(model, texts(5), max_length=65)
    with pytest.raises(ValueError, match="max_length is 512, but the model has only 64"):
        encode(tokenizer, texts(5), max_length=512)


@pytest.mark.parametrize(
    ("examples", "length", "message"),
    [
        ([], None, "no examples"),
        ([Example("a", "b"), Example("a")], None, "example 1 has no second text"),
        ([Example("a", None, 1), Example("a")], None, "example 1 has no label"),
        ([Example("a")], 2, "must exceed the 2 special tokens"),
    ],
)
def test_what_cannot_be_encoded(tokenizer: Any, examples: list[Example], length: int | None, message: str):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, examples, max_length=length)


def test_a_batch_worked_out_by_hand(tokenizer: Any):
    [batch] = make_batches(tokenizer, [Example("a dog", None, 1), Example("the sun is", None, 0)], batch_size=3)
    # [CLS] is 2, [SEP] 3, the 5, a 6, dog 12, sun 14, is 15; row 2 only fills up
    expected = np.zeros((3, 16), np.int32)
    expected[0, :4], expected[1, :5] = [2, 6, 12, 3], [2, 5, 14, 15, 3]
    np.testing.assert_array_equal(batch["input_ids"], expected)
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [4, 5, 0])
    np.testing.assert_array_equal(batch["attention_mask"], expected > 0)
    np.testing.assert_array_equal(batch["token_type_ids"], np.zeros((3, 16)))
    assert batch["labels"].tolist() == [1, 0, 0]
    assert batch["weight"].tolist() == [1.0, 1.0, 0.0] and batch["weight"].dtype == np.float32
    assert batch["index"].tolist() == [0, 1, -1]
    assert {array.dtype for name, array in batch.items() if name != "weight"} == {np.dtype(np.int32)}


def test_models_without_segments_get_none():
    tokenizer = AutoTokenizer.from_pretrained(WORDS)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # as DistilBERT's and RoBERTa's
    [batch] = make_batches(tokenizer, texts(5, 6))
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_batch_with_all_its_tokens(tokenizer: Any, seed: int):
    examples = random_texts(77, seed)
    encoded = encode(tokenizer, examples)
    for batches in (pack(encoded, batch_size=8), training_batches(encoded, batch_size=8, key=seed, epoch=1)):
        assert len(batches) == 10  # 77 / 8, rounded up: only one batch is incomplete
        assert sorted(rows_of(batches)) == list(range(77))
        assert {batch["input_ids"].shape for batch in batches} == set(batches.shapes)
        for batch in batches:
            for place, row in enumerate(batch["index"]):
                tokens = batch["input_ids"][place][batch["attention_mask"][place] > 0]
                if row < 0:
                    assert not len(tokens) and batch["weight"][place] == 0
                else:
                    own = encoded.input_ids[encoded.offsets[row] : encoded.offsets[row + 1]]
                    assert tokens.tolist() == own.tolist()
                    assert batch["labels"][place] == examples[row].label and batch["weight"][place] == 1


def test_shapes_are_few_and_no_longer_than_the_model(tokenizer: Any):
    examples = texts(*[10] * 64, *[40] * 64)
    assert pack(encode(tokenizer, examples), shape_cost=0).shapes == ((32, 16), (32, 48))
    # padding 64 rows from 16 to 48 tokens costs 2,048 tokens; another shape has to save more than that
    assert pack(encode(tokenizer, examples), shape_cost=2_047).shapes == ((32, 16), (32, 48))
    assert pack(encode(tokenizer, examples), shape_cost=2_049).shapes == ((32, 48),)
    assert pack(encode(tokenizer, examples)).shapes == ((32, 48),)
    assert pack(encode(tokenizer, examples), buckets=(20, 50, 500), shape_cost=0).shapes == ((32, 20), (32, 50))
    # no bucket of the default between 48 and 52: the longest is max_length itself
    assert pack(encode(tokenizer, texts(50), max_length=52)).shapes == ((32, 52),)
    assert pack(encode(tokenizer, texts(3), max_length=10)).shapes == ((32, 10),)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        pack(encode(tokenizer, texts(3)), batch_size=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_shapes_chosen_cost_least(seed: int):
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 513, 40)
    cost = int(random.integers(0, 4_000))
    encoded = Encoded(
        input_ids=np.ones(lengths.sum(), np.int32), token_type_ids=None, offsets=np.cumsum([0, *lengths]),
        labels=np.zeros(40, np.int32), max_length=512, cut=np.zeros(40, bool), padding=0,
    )  # fmt: skip
    # with one row per batch the shapes' cost is exactly the padded tokens and the number of shapes
    plan = pack(encoded, batch_size=1, shape_cost=cost).plan
    found = sum(length for _, length in plan) + cost * len({length for _, length in plan})

    def price(chosen: int) -> float:
        steps = np.array([bucket for i, bucket in enumerate(BUCKETS) if chosen >> i & 1])
        if not len(steps) or steps[-1] < lengths.max():
            return np.inf
        padded = steps[np.searchsorted(steps, lengths)]
        return padded.sum() + cost * len(np.unique(padded))

    assert found == min(price(chosen) for chosen in range(2 ** len(BUCKETS)))


def test_packing_is_in_a_fixed_order_longest_first(tokenizer: Any):
    encoded = encode(tokenizer, texts(10, 40, 11, 41, 12))
    batches = pack(encoded, batch_size=2, shape_cost=0)
    assert [batch["index"].tolist() for batch in batches] == [[1, 3], [0, 2], [4, -1]]
    assert [batch["input_ids"].shape for batch in batches] == [(2, 48), (2, 16), (2, 16)]
    assert len(batches[1:]) == 2 and rows_of(batches[1:]) == [0, 2, 4]


def test_training_batches_are_a_function_of_seed_and_epoch(tokenizer: Any):
    encoded = encode(tokenizer, random_texts(100))

    def order(key: Any, epoch: int) -> list[int]:
        return rows_of(training_batches(encoded, batch_size=8, key=key, epoch=epoch, shape_cost=0))

    orders = [order(key, epoch) for key in (0, 1, jax.random.key(1)) for epoch in range(3)]
    assert order(1, 2) == orders[5] and order(jax.random.key(1), 0) == orders[6]
    assert len({tuple(found) for found in orders}) == len(orders)
    shapes = {
        tuple(sorted(batch["input_ids"].shape for batch in training_batches(encoded, batch_size=8, key=0, epoch=epoch)))
        for epoch in range(4)
    }
    assert len(shapes) == 1  # nothing to compile after the first epoch


def test_training_shuffles_within_and_across_shapes(tokenizer: Any):
    encoded = encode(tokenizer, texts(*[10] * 32, *[40] * 32))
    batches = training_batches(encoded, batch_size=8, key=0, epoch=0, shape_cost=0)
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert sorted(lengths) == [16] * 4 + [48] * 4 and lengths != sorted(lengths) != lengths[::-1]
    short = [row for batch in batches if batch["input_ids"].shape[1] == 16 for row in batch["index"]]
    assert sorted(short) == list(range(32)) != short


def test_an_encoding_serves_many_epochs(tokenizer: Any):
    encoded = encode(tokenizer, random_texts(30))
    before = encoded.input_ids.copy()
    for epoch in range(3):
        batch: Batch = training_batches(encoded, batch_size=4, key=0, epoch=epoch)[0]
        batch["input_ids"][:] = 9
    np.testing.assert_array_equal(encoded.input_ids, before)

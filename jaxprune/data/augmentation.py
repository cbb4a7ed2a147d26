"""Copies of training texts in which words are exchanged for others with a similar vector (after TinyBERT).

The vectors are rows of the model's own embedding table. Labels are copied, but they may no longer be true: the copies
are for students that learn from a teacher's answers. Only train rows are copied; dev, test and calibration stay as they
are, and no copy may be one of their texts.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxprune.data.splits import Example, marks, row_key, rows_of
from jaxprune.data.tasks import Task, remove_leaks
from jaxprune.models import Model
from jaxprune.models.tokenizers import run_tokenizer
from jaxprune.units import Params

WORD = re.compile(r"[^\W\d_]+")  # letters only
BLOCK = 1024  # words whose neighbours are searched at once


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The settings of copies of training texts.

    References:
        Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2020, algorithm 1, where a masked
        language model proposes the words and these vectors (GloVe there) stand in for it.
    """

    copies: int = 20  # of a row, before those that occur already are left out
    probability: float = 0.4  # that a word is exchanged
    candidates: int = 15  # words that it may be exchanged for, equally likely
    frequent: int = 50  # the most frequent words of the train texts, which always stay
    seed: int = 0

    def __post_init__(self):
        if self.copies < 1 or self.candidates < 1 or self.frequent < 0 or self.seed < 0:
            raise ValueError(
                f"copies and candidates must be at least 1, frequent and seed at least 0, got {self.copies}, "
                f"{self.candidates}, {self.frequent} and {self.seed}."
            )
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must lie in (0, 1], got {self.probability}.")


def word_candidates(
    model: Model, params: Params, texts: Sequence[str], settings: Augmentation
) -> dict[str, tuple[str, ...]]:
    """The words that may take the place of each word of some texts, in lower case, the most similar first.

    Words are compared by the cosine of their rows in the embedding table. A word of several tokens has no vector, and
    stays; so do the most frequent ones. Only words with candidates are listed.
    """
    counts = Counter(word.casefold() for text in texts for word in WORD.findall(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    wanted = sorted(ranked[settings.frequent :])
    vocabulary = _whole_words(model.tokenizer)
    known = sorted(vocabulary)
    if len(known) < 2:
        return {}
    table = np.asarray(params["embeddings"]["word"]["embedding"], np.float32)
    vectors = table[[vocabulary[word] for word in known]]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = {word: index for index, word in enumerate(known)}
    wanted = [word for word in wanted if word in place]
    candidates: dict[str, tuple[str, ...]] = {}
    most = min(settings.candidates, len(known) - 1)
    for begin in range(0, len(wanted), BLOCK):
        rows = np.array([place[word] for word in wanted[begin : begin + BLOCK]])
        likeness = vectors[rows] @ vectors.T
        likeness[np.arange(len(rows)), rows] = -np.inf  # a word is no candidate for itself
        nearest = np.sort(np.argpartition(-likeness, most - 1, axis=1)[:, :most], axis=1)
        order = np.argsort(-np.take_along_axis(likeness, nearest, axis=1), axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, axis=1)
        candidates |= {known[row]: tuple(known[i] for i in near) for row, near in zip(rows, nearest, strict=True)}
    return candidates


def copies_of(
    examples: Sequence[Example], candidates: Mapping[str, Sequence[str]], settings: Augmentation, held_out: set[str]
) -> Iterator[Example]:
    """The distinct copies of some examples, one after another; none has a held-out text.

    The copies of an example depend on its text and the seed alone, not on the others or their order. Both texts of a
    pair are copied. `held_out` are the keys (`row_key`) of texts that may not occur.
    """
    seen = held_out | {row_key(example) for example in examples}
    for example in examples:
        random = np.random.default_rng([settings.seed, int(row_key(example), 16)])
        for _ in range(settings.copies):
            text = _exchanged(example.text, candidates, settings.probability, random)
            pair = None if example.pair is None else _exchanged(example.pair, candidates, settings.probability, random)
            copy = replace(example, text=text, pair=pair)
            if (key := row_key(copy)) not in seen:
                seen.add(key)
                yield copy


def augment(model: Model, params: Params, task: Task, settings: Augmentation | None = None) -> Task:
    """The task with copies of its train rows behind them.

    Args:
        model: The model whose word embeddings say which words are similar.

    Raises:
        ValueError: If the task is for spans or has no train rows, or no word of them can be exchanged.
    """
    rows = tuple(augmented(model, params, task, settings or Augmentation()))
    return replace(task, splits={**task.splits, "train": rows})


def augmented(model: Model, params: Params, task: Task, settings: Augmentation) -> Iterator[Example]:
    """The train rows without leaks, then their copies, one at a time."""
    if task.spans:
        raise ValueError(f"{task.name!r} asks for spans: their answers would be lost in other words.")
    (clean,), _ = remove_leaks([task])
    rows = clean.rows("train")
    if not rows:
        raise ValueError(f"{task.name!r} has no train rows to copy.")
    texts = [text for row in rows for text in (row.text, row.pair) if text is not None]
    candidates = word_candidates(model, params, texts, settings)
    if not candidates:
        raise ValueError(
            f"no word of the train rows of {task.name!r} can be exchanged: the words that are not among the "
            f"{settings.frequent} most frequent have no vector of their own in the model."
        )
    held = [row for split in ("calibration", "dev", "test") for row in clean.rows(split)]
    return itertools.chain(rows, copies_of(rows, candidates, settings, marks(rows_of(held, clean.grouped))))


def _exchanged(
    text: str, candidates: Mapping[str, Sequence[str]], probability: float, random: np.random.Generator
) -> str:
    """The text with some of its words exchanged; a capital at the beginning of a word stays."""

    def exchange(match: re.Match[str]) -> str:
        word = match[0]
        others = candidates.get(word.casefold())
        if others is None or random.random() >= probability:
            return word
        other = others[int(random.integers(len(others)))]
        return other.capitalize() if word[0].isupper() else other

    return WORD.sub(exchange, text)


def _whole_words(tokenizer: Any) -> dict[str, int]:
    """The lower-case words that are one token when they follow a space."""
    special = set(tokenizer.all_special_ids)
    texts = enumerate(run_tokenizer(tokenizer.batch_decode, [[i] for i in range(len(tokenizer))]))
    words = [(i, text.strip()) for i, text in texts if i not in special and WORD.fullmatch(text.strip())]
    if not words:
        return {}
    whole: dict[str, int] = {}
    read = run_tokenizer(tokenizer, [f" {text}" for _, text in words], add_special_tokens=False)["input_ids"]
    for (i, text), tokens in zip(words, read, strict=True):
        if list(tokens) == [i]:
            whole.setdefault(text.casefold(), i)
    return whole

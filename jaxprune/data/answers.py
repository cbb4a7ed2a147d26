"""Answers that stand in a text: how they are stored, and SQuAD's measures of how well one is found.

A question's *context* is the text that holds its answer. Data in SQuAD's format have the answers of a row as
`{"text": ["in 1912", ...], "answer_start": [37, ...]}`, each with the place of its first character in the context.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

COLUMNS = ("question", "context")
COLUMN = "answers"
MISSING, MISPLACED = "no answer", "no answer stands where it says"  # why rows are left out
EXPECTED = 'an object such as {"text": ["in 1912"], "answer_start": [37]}'
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Answer(NamedTuple):
    """A part of a context."""

    start: int  # the place of its first character
    text: str


def read_answers(stored: Any, where: str) -> tuple[Answer, ...]:
    """The answers of a row in SQuAD's format; none where the question has none, as in SQuAD 2.

    Args:
        stored: The cell.
        where: Its place, for the error.

    Raises:
        ValueError: If it is something else.
    """
    cell: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
    texts: Any = cell.get("text")
    starts: Any = cell.get("answer_start")
    fits = isinstance(texts, list | tuple) and isinstance(starts, list | tuple) and len(texts) == len(starts)
    if not fits or not all(isinstance(text, str) for text in texts) or not all(map(_is_place, starts)):
        shown = repr(stored)
        raise ValueError(f"{where}: the answers must be {EXPECTED}, got {shown[:77]}{'...' * (len(shown) > 77)}.")
    return tuple(Answer(start, text) for text, start in zip(texts, starts, strict=True))


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def standing(answers: Sequence[Answer], context: str) -> tuple[Answer, ...]:
    """Those of the answers that are in the context where they say, and are more than white space."""
    return tuple(
        answer
        for answer in answers
        if answer.text.strip() and answer.start >= 0 and context.startswith(answer.text, answer.start)
    )


def plain(text: str) -> str:
    """What SQuAD compares: lower case, without punctuation, the articles a, an, the, and repeated white space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(found: str, text: str) -> float:
    """1 if two answers are the same when made plain, else 0."""
    return float(plain(found) == plain(text))


def word_f1(found: str, text: str) -> float:
    """F1 of the words that two answers share when made plain; 0 if they share none."""
    ours, theirs = plain(found).split(), plain(text).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def squad(found: Sequence[str], answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Mean F1 and exact match, each example by the answer that suits it best, as SQuAD 1.1's own script computes them.

    References:
        Rajpurkar, Zhang, Lopyrev and Liang, SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016.
    """
    pairs = list(zip(found, answers, strict=True))
    return {
        name: sum(max((measure(text, answer.text) for answer in own), default=0.0) for text, own in pairs) / len(pairs)
        for name, measure in (("f1", word_f1), ("exact_match", exact_match))
    }

"""Examples and their texts: which texts are the same, and splits that share none.

Two texts are the same if a reader would say so: they are equal without case, white space and punctuation, so that
differently tokenised copies of a sentence match, but what tells texts apart stays (see `normalise`); the two texts of a
pair may swap places. Rows are chosen by the hash of their text: the choice does not depend on their order, and a
smaller choice is part of a larger one as far as the proportions of the labels allow.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jax

SPLITS = ("train", "calibration", "dev", "test")  # a text found in several of them stays in the last one
MOST_ROWS = 2_048  # of a split that is cut from another one
SURPLUS = "copies, or more calibration rows than are used"


class Answer(NamedTuple):
    """A part of a context."""

    start: int  # the place of its first character
    text: str


class Window(NamedTuple):
    """A piece of running text as tokens."""

    read: tuple[int, ...]  # the first ones, which are only read: the tokenizer's BOS, and what windows before end with
    asked: tuple[int, ...]  # those after them, each to be told from all before it


@dataclass(frozen=True, slots=True)
class Example:
    """A text or a pair of texts with its label; or a question, its context and its answers, or its choices."""

    text: str
    pair: str | None = None
    label: int | float | None = None  # an index into the task's labels; a float in a regression
    answers: tuple[Answer, ...] | None = None  # of a question; () if they are not known
    choices: tuple[str, ...] | None = None  # what may follow the text; the label is the place of the right one
    suffix: str | None = None  # what follows every choice; then only its likelihood counts, behind each of them
    window: Window | None = None  # of running text: its tokens


class Row(NamedTuple):
    """An example with what decides to which split it may go."""

    example: Example
    key: str
    group: str  # rows of one group stay on one side: the key of the passage in a grouped task, else the row's own
    lot: str  # its place in a draw comes from this, see `_lot`


# Punctuation that tells texts apart: C# and 5 %, 1.5 and 15, -5 and 5, :) and :(
_TELLING = re.compile(r"[#%&@]|[.,:/-](?<=\d.)(?=\d)|-(?<!\w-)(?=\d)|[:;=]['^-]?[()\[\]]+(?!\w)")


class _Table(dict[int, int | None]):
    """Keeps letters, marks, digits and symbols, and drops the rest; a character is looked up when it first occurs."""

    def __missing__(self, code: int) -> int | None:
        kind = unicodedata.category(chr(code))
        # a quotation mark of old files, the selectors of an emoji's or a sign's variant, what is not seen
        dropped = kind[0] in "PZ" or kind in ("Cc", "Cf") or chr(code) in "`\xb4" or 0xFE00 <= code <= 0xFE0F
        self[code] = None if dropped else code
        return self[code]


_TABLE = _Table()


def _fold(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()


def normalise(text: str) -> str:
    """The text without case, white space and punctuation; of punctuation alone, the punctuation is kept.

    Vowel signs and accents, emoji and other symbols stay, and punctuation that tells texts apart, as in C#, 1.5 or :).
    """
    plain = _fold(text)
    # private characters stand for telling punctuation, so that it stays
    marked = _TELLING.sub(lambda match: "".join(chr(0xF0000 + ord(sign)) for sign in match[0]), plain)
    return marked.translate(_TABLE) or re.sub(r"\s+", "", plain)


def _hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\x1f".join(sorted(texts)).encode()).hexdigest()[:16]


def _texts(example: Example) -> tuple[str, ...]:
    more = [text for text in (example.pair, example.suffix) if text is not None]
    return (example.text, *more, *(example.choices or ()))


def row_key(example: Example) -> str:
    """The 16 hexadecimal digits that stand for an example's text: equal if the normalised texts are.

    The two texts of a pair may swap places. The label does not matter.
    """
    return _hash(map(normalise, _texts(example)))


def _lot(texts: Iterable[str], normalised: Iterable[str]) -> str:
    """The 16 hexadecimal digits that decide on draws: those of the letters and digits alone.

    Texts that differ in symbols share them. Draws have always gone by these, and are to stay the same.
    """
    plain = (
        known if known.isalnum() else re.sub(r"[\W_]+", "", _fold(text)) or re.sub(r"\s+", "", _fold(text))
        for text, known in zip(texts, normalised, strict=True)
    )
    return _hash(plain)


def half_of(example: Example) -> int:
    """0 or 1, a bit of the hash of an example's text: its half does not depend on the other examples or their order."""
    return int(rows_of([example])[0].lot[-1], 16) % 2


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over the normalised texts and the labels or answers; the order of the examples does not matter."""
    rows = sorted(
        f"{normalise(e.text)}\x1f{normalise(e.pair or ' '.join((*(e.choices or ()), e.suffix or '')))}\x1f{_target(e)}"
        for e in examples
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _target(example: Example) -> str:
    return str(example.label if example.answers is None else [tuple(answer) for answer in example.answers])


def rows_of(examples: Iterable[Example], grouped: bool = False) -> list[Row]:
    """The examples with their keys; in a grouped task rows with the same second text belong together."""
    rows = []
    for example in examples:
        texts = _texts(example)
        normalised = tuple(map(normalise, texts))
        key = group = _hash(normalised)
        if grouped and example.pair is not None:
            texts, normalised = texts[1:], normalised[1:]
            group = _hash(normalised)
        lot = group if all(map(str.isalnum, normalised)) else _lot(texts, normalised)
        rows.append(Row(example, key, group, lot))
    return rows


def marks(rows: Iterable[Row]) -> set[str]:
    """The keys and groups of some rows."""
    return {mark for row in rows for mark in (row.key, row.group)}


def without(rows: Sequence[Row], taken: set[str]) -> list[Row]:
    """The rows of which neither the key nor the group is taken."""
    return [row for row in rows if row.key not in taken and row.group not in taken]


def choose(
    rows: Sequence[Row],
    count: int,
    salt: str,
    *,
    regression: bool = False,
    stratified: bool = True,
    distinct: bool = True,
) -> list[Row]:
    """Takes rows by the hash of their text, in its order, whatever order they come in.

    Args:
        rows: Where to choose from.
        count: How many to take; fewer if there are not as many. Of a text with different labels, a drawn copy first.
        salt: Makes one choice different from another.
        regression: Whether labels are numbers; then the fifths of their distribution take the place of classes.
        stratified: Whether the labels keep their proportions.
        distinct: Whether to take a text only once.
    """
    ranked = sorted(rows, key=lambda row: (_rank(row.lot, salt), row.key, _target(row.example), row.example.text))
    if odd := contradictory(ranked):  # whatever the first label is called, it has no better chance than another
        count_of: Counter[tuple[str, str]] = Counter()
        chances = []
        for row in ranked:
            target = (row.key, _target(row.example))
            count_of[target] += 1
            chances.append(_rank(f"{target}:{count_of[target]}", salt) if row.key in odd else "")
        order = sorted(range(len(ranked)), key=lambda i: (_rank(ranked[i].lot, salt), ranked[i].key, chances[i]))
        ranked = [ranked[i] for i in order]
    if distinct:
        ranked = list({row.key: row for row in reversed(ranked)}.values())[::-1]
    if not stratified or len(ranked) <= count:
        return ranked[:count]
    strata = _strata(ranked, regression)
    left = _quotas(strata, count, salt)
    chosen = []
    for row, stratum in zip(ranked, strata, strict=True):
        if left[stratum] > 0:
            left[stratum] -= 1
            chosen.append(row)
    return chosen


def contradictory(rows: Iterable[Row]) -> set[str]:
    """The keys of texts that occur with different labels or answers."""
    first: dict[str, Example] = {}
    odd = set()
    for row in rows:
        other = first.setdefault(row.key, row.example)
        if other.label != row.example.label or other.answers != row.example.answers:
            odd.add(row.key)
    return odd


def _rank(mark: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}:{mark}".encode()).hexdigest()


def _strata(rows: Sequence[Row], regression: bool) -> list[int]:
    labels = [row.example.label or 0 for row in rows]
    if not regression:
        return [int(label) for label in labels]
    ordered = sorted(labels)
    edges = [ordered[len(ordered) * i // 5] for i in range(1, 5)]
    return [sum(label >= edge for edge in edges) for label in labels]


def _quotas(strata: Sequence[int], count: int, salt: str) -> Counter[int]:
    """Shares out `count` in proportion to the strata, by largest remainder; ties are drawn."""
    exact = {stratum: count * size / len(strata) for stratum, size in Counter(strata).items()}
    quotas = Counter({stratum: math.floor(share) for stratum, share in exact.items()})
    by_remainder = sorted(exact, key=lambda s: (quotas[s] - exact[s], _rank(str(s), salt)))
    quotas.update(by_remainder[: count - quotas.total()])
    return quotas


def seed_words(key: int | jax.Array) -> tuple[int, ...]:
    """The whole numbers that a seed, or a JAX random key, stands for.

    Raises:
        TypeError: If it is neither.
        ValueError: If a seed is negative.
    """
    if isinstance(key, int) and not isinstance(key, bool):
        if key < 0:
            raise ValueError(f"a seed must be at least 0, got {key}.")
        return (key,)
    import jax

    if not isinstance(key, jax.Array):
        raise TypeError(f"expected a whole number or a jax.random.key, got {type(key).__name__}.")
    return tuple(int(word) for word in jax.random.key_data(key).ravel())


class Division(NamedTuple):
    """The rows of a source in four splits."""

    splits: dict[str, tuple[Example, ...]]
    dropped: dict[str, int]  # rows left out: by split because their text is in a later one, or by reason
    contradictory: int  # texts that occur with different labels


def divide(
    given: Mapping[str, Sequence[Example]],
    *,
    grouped: bool = False,
    regression: bool = False,
    seed: int = 0,
    max_calibration: int = MOST_ROWS,
) -> Division:
    """Divides the rows of a source into train, calibration, dev and test; no text is in two of them.

    A cut takes a tenth of the different texts (of a small set up to a quarter, until 256) and at most 2,048: 256 rows
    are twice what scoring takes by default, and show an accuracy to within 6 points (95 %).

    Args:
        given: The source's `train`, `validation`, `test` and `calibration` examples, those of them it has.
        grouped: Whether rows with the same second text must stay on one side.
        regression: Whether labels are numbers.
        max_calibration: The most calibration rows.

    Raises:
        ValueError: If there are too few rows.
    """
    pool, dev, test, calibration = (
        rows_of(given.get(split, ()), grouped) for split in ("train", "validation", "test", "calibration")
    )
    everything = [*pool, *dev, *test, *calibration]
    dropped: Counter[str] = Counter()

    def drop(rows: list[Row], others: Sequence[Row], split: str) -> list[Row]:
        left = without(rows, marks(others))
        dropped[split] += len(rows) - len(left)
        return left

    def cut(count: int, split: str) -> list[Row]:
        nonlocal pool
        chosen = choose(pool, count, f"{split}:{seed}", regression=regression)
        taken = set(map(id, chosen))
        pool = drop([row for row in pool if id(row) not in taken], chosen, rest)
        return chosen

    rest = "train"  # the split that gets what is left of the pool
    if not pool and dev and test:
        pool, dev, rest = dev, [], "dev"
    elif not pool:
        pool, dev, test, rest = dev or test, [], [], "test"
    elif not test:
        dev, test = [], dev
    rows, texts = len(pool), len({row.key for row in pool})
    size = max(1, min(MOST_ROWS, max(texts // 10, min(256, texts // 4))))
    if not test and rest != "test":
        test = cut(size, "test")
    dev, pool = drop(dev, test, "dev"), drop(pool, test, rest)
    if not dev and rest != "dev":
        dev = cut(size, "dev")
    pool = drop(pool, dev, rest)
    if calibration:
        left = drop(calibration, [*dev, *test, *(pool if rest != "train" else [])], "calibration")
        calibration = choose(left, max_calibration, f"calibration:{seed}", regression=regression)
        dropped[SURPLUS] += len(left) - len(calibration)
        pool = drop(pool, calibration, rest)
    else:
        calibration = cut(min(size, max_calibration), "calibration")
    parts = {"train": [], "calibration": calibration, "dev": dev, "test": test} | {rest: pool}
    if not (calibration and parts["dev"] and parts["test"]):
        raise ValueError(
            f"{rows} rows are too few to cut calibration, dev and test from; give at least 8 of each label."
        )
    return Division(
        {split: tuple(row.example for row in parts[split]) for split in SPLITS},
        dict(+dropped),
        len(contradictory(everything)),
    )

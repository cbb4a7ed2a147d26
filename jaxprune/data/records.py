"""Reads rows of text and their labels or answers from JSON lines, CSV, TSV and Parquet files.

Every fault of a file is one `ValueError` with the file, the line and what was expected there. Answers are stored in
SQuAD's format, `{"text": ["in 1912", ...], "answer_start": [37, ...]}`: each with the place of its first character in
the *context*, the text that holds it.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jaxprune.data.splits import Answer, Example

PAIR = ("sentence1", "sentence2")
SPAN_COLUMNS = ("question", "context")
ANSWERS = "answers"
MISSING, MISPLACED = "no answer", "no answer stands where it says"  # why rows are left out
HIDDEN = -1  # what the hub writes where a label is kept secret
KINDS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
FILES = {  # split -> file names, without their ending
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
    "calibration": ("calibration",),
}


@dataclass(frozen=True)
class Records:
    """The rows of one split, as they are stored."""

    where: str  # the file or the hub's split, for messages
    columns: tuple[str, ...]
    rows: list[tuple[int, Mapping[str, Any]]]  # line or row number; column -> value
    unit: str = "line"  # what the number counts

    def place(self, number: int) -> str:
        """Names a row in a message."""
        return f"{self.where}, {self.unit} {number}"


def kind_of(path: Path) -> str:
    """The ending by which a file is read; empty if it is none of those known."""
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if path.name.endswith(kind)), "")


def read(path: Path) -> Records:
    """Reads one file.

    Raises:
        ValueError: If the file is empty, broken, not UTF-8 or of an unknown kind.
    """
    kind = kind_of(path).removesuffix(".gz")
    if not kind:
        raise ValueError(f"{path} is none of {', '.join(KINDS)}.")
    if kind == ".jsonl":
        records = _read_jsonl(path)
    elif kind == ".parquet":
        records = _read_parquet(path)
    else:
        records = _read_csv(path, "," if kind == ".csv" else "\t")
    if not records.rows:
        raise ValueError(f"{path} has no rows.")
    return records


def read_folder(folder: Path) -> dict[str, Records]:
    """Reads the train, validation, test and calibration files of a folder, those of them it has.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If one of them is broken, or there are two for one split.
    """
    records: dict[str, Records] = {}
    for split, names in FILES.items():
        paths = [folder / f"{name}{kind}" for name in names for kind in KINDS if (folder / f"{name}{kind}").is_file()]
        if len(paths) > 1:
            raise ValueError(f"{folder} has {' and '.join(path.name for path in paths)}: keep one of them.")
        if paths:
            records[split] = read(paths[0])
    if not records:
        raise FileNotFoundError(
            f"{folder} has no train.jsonl, validation.jsonl or test.jsonl (or .jsonl.gz, .csv, ...)."
        )
    return records


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert it first.") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}.") from error


def _refuse_twice(columns: Sequence[str], where: str) -> None:
    for column, count in Counter(columns).items():
        if count > 1:
            raise ValueError(f"{where}: column {column!r} occurs {count} times; rename or remove one.")


def _read_jsonl(path: Path) -> Records:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"

        def row(cells: list[tuple[str, Any]], where: str = where) -> dict[str, Any]:
            _refuse_twice([name for name, _ in cells], where)
            return dict(cells)

        try:
            cells = json.loads(line, object_pairs_hook=row)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: broken JSON, {error.msg} at character {error.pos + 1}.") from error
        except RecursionError as error:
            raise ValueError(f"{where}: broken JSON, nested too deeply.") from error
        if not isinstance(cells, dict):
            raise ValueError(f'{where}: expected an object such as {{"sentence": "...", "label": 0}}.')
        try:
            if "\\u" in line:
                json.dumps(cells, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: half of a character (such as \\ud800) is no text: remove it.") from error
        rows.append((number, cells))
    return Records(str(path), tuple(rows[0][1]) if rows else (), rows)


def _read_csv(path: Path, separator: str) -> Records:
    reader = csv.reader(_lines(path), delimiter=separator, strict=True)
    rows: list[tuple[int, Mapping[str, Any]]] = []
    try:
        header = next(reader, [])
        _refuse_twice(header, str(path))
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells under {len(header)} column names."
                )
            if cells:
                rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: broken CSV, {error}.") from error
    return Records(str(path), tuple(header), rows)


def _read_parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
        _refuse_twice(columns, str(path))
        rows = cast(list[Mapping[str, Any]], pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    return Records(str(path), tuple(columns), list(enumerate(rows, 1)), "row")


@dataclass(frozen=True)
class Labels:
    """The reading of stored labels."""

    names: tuple[str, ...]  # ("score",) in a regression
    regression: bool = False
    index: Mapping[str, int] = field(default_factory=dict)  # a stored label, as text -> its index

    @staticmethod
    def of(names: Sequence[str], regression: bool = False) -> Labels:
        """Labels that are stored by name, or by their place among the names.

        Raises:
            ValueError: If there is no name, or one twice.
        """
        if not names or len(set(names)) < len(names):
            raise ValueError(f"label names must be given and differ, got {list(names)}.")
        places = {str(place): place for place in range(len(names))}
        return Labels(tuple(names), regression, places | {name: place for place, name in enumerate(names)})

    @staticmethod
    def found(records: Iterable[Records], column: str) -> Labels:
        """The labels in the data, sorted (whole numbers as numbers); fractions make a regression."""
        texts = {_label_text(cells.get(column), r.place(number)) for r in records for number, cells in r.rows}
        numbers = [_number(text) for text in texts]
        if None in numbers:
            names = sorted(texts)
        elif all(number is not None and number.is_integer() for number in numbers):
            names = sorted(texts, key=int)
        else:
            return Labels(("score",), True)
        return Labels(tuple(names), False, {name: place for place, name in enumerate(names)})

    def renamed(self, names: Sequence[str]) -> Labels:
        """The same stored labels under other names; the same names in another order reorder the classes.

        Raises:
            ValueError: If there are more or fewer names, or two are the same.
        """
        if len(set(names)) != len(self.names) or len(names) != len(self.names):
            count = len(self.names)
            raise ValueError(f"expected {count} different label names, for {', '.join(self.names)}; got {list(names)}.")
        place = {name.casefold(): i for i, name in enumerate(names)}
        old = [name.casefold() for name in self.names]
        new = [place[name] for name in old] if set(place) == set(old) else range(len(old))
        return Labels(tuple(names), self.regression, {text: new[i] for text, i in self.index.items()})

    def read(self, value: Any, where: str) -> int | float:
        """A stored label as an index, or as a float in a regression.

        Raises:
            ValueError: If the label is missing or not one of these.
        """
        text = _label_text(value, where)
        if self.regression:
            number = _number(text)
            if number is None:
                raise ValueError(f"{where}: the label {value!r} is not a finite number, and this is a regression.")
            return number
        if text not in self.index:
            some = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            last = len(self.names) - 1
            raise ValueError(f"{where}: the label {value!r} is none of {some}, nor one of the places 0 to {last}.")
        return self.index[text]


def pair_labels(labels: Sequence[str], others: Sequence[str]) -> tuple[int, ...] | None:
    """The place of each label among others: by name, else by place if one side is generic; None if they do not pair.

    Case counts only if labels differ in nothing else. Generic are `LABEL_0`, `LABEL_1` and so on, and rising numbers.
    """
    if len(labels) != len(others):
        return None
    for same in (str, str.casefold):
        place = {same(other): i for i, other in enumerate(others)}
        if len(place) == len(others) and set(map(same, labels)) == set(place):
            return tuple(place[same(label)] for label in labels)
    return tuple(range(len(others))) if _generic(labels) or _generic(others) else None


def _generic(labels: Sequence[str]) -> bool:
    """True if labels say nothing but their places."""
    numbers = [re.fullmatch(r"(?:LABEL_)?(\d{1,9})", label, re.ASCII | re.IGNORECASE) for label in labels]
    places = [int(number[1]) for number in numbers if number is not None]
    return len(places) == len(labels) and places == sorted(set(places))


def _number(text: str) -> float | None:
    number = float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) else math.nan
    return number if math.isfinite(number) else None


def _label_text(value: Any, where: str) -> str:
    """A stored label as text; a whole number reads the same whether it was 1, 1.0 or "1"."""
    if value is None or str(value).strip().lower() in ("", "nan"):
        raise ValueError(f"{where}: the label is missing (empty or NaN).")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: a label must be text or a number, got {type(value).__name__}.")
    text = str(value).strip()
    number = _number(text)
    return str(int(number)) if number is not None and number.is_integer() else text


def text_columns(records: Mapping[str, Records], wanted: tuple[str, ...] | None, label: str) -> tuple[str, ...]:
    """The text columns, after making sure that they and the label are in every file."""
    first = next(iter(records.values()))
    usual = (PAIR, ("sentence",), ("text",), SPAN_COLUMNS)
    columns = wanted or next((c for c in usual if set(c) <= set(first.columns)), None)
    if columns is None:
        raise ValueError(f"{first.where} has the columns {list(first.columns)}: name the text with text=, text_pair=.")
    for given in records.values():
        for column in (*columns, label):
            if column not in given.columns:
                raise ValueError(f"{given.where} has no column {column!r}; it has {list(given.columns)}.")
    return columns


def read_answers(stored: Any, where: str) -> tuple[Answer, ...]:
    """The answers of a row in SQuAD's format; none where the question has none, as in SQuAD 2.

    Raises:
        ValueError: If it is something else; `where` names the cell.
    """
    cell: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
    texts: Any = cell.get("text")
    starts: Any = cell.get("answer_start")
    lists = isinstance(texts, list | tuple) and isinstance(starts, list | tuple) and len(texts) == len(starts)
    if not lists or not all(isinstance(text, str) for text in texts) or not all(type(start) is int for start in starts):
        shown, example = repr(stored), '{"text": ["in 1912"], "answer_start": [37]}'
        raise ValueError(
            f"{where}: the answers must be an object such as {example}, got {shown[:77]}{'...' * (len(shown) > 77)}."
        )
    return tuple(Answer(start, text) for text, start in zip(texts, starts, strict=True))


def standing(answers: Sequence[Answer], context: str) -> tuple[Answer, ...]:
    """Those of the answers that are in the context where they say, and are more than white space."""
    return tuple(
        answer
        for answer in answers
        if answer.text.strip() and answer.start >= 0 and context.startswith(answer.text, answer.start)
    )


def read_examples(
    records: Records, columns: tuple[str, ...], label: str, codec: Labels | None, skip_empty: bool
) -> tuple[list[Example], Counter[str]]:
    """The examples of one file, and how many rows were left out, by reason.

    Args:
        records: The rows.
        columns: Those of the text or the two texts.
        label: That of the label, or of the answers.
        codec: How labels are read; None: they are answers in SQuAD's format.
        skip_empty: Whether rows without a text are left out: the hub's QQP has some.

    Raises:
        ValueError: If a row has no text or no label, or they are not what they should be.
    """
    examples, left_out = [], Counter[str]()
    for number, cells in records.rows:
        where = records.place(number)
        missing = [column for column in (*columns, label) if column not in cells]
        if missing:
            raise ValueError(f"{where}: no column {missing[0]!r}; it has {list(cells)}.")
        texts = [cells[column] for column in columns]
        empty = [c for c, text in zip(columns, texts, strict=True) if text is None or not str(text).strip()]
        if empty and skip_empty:
            left_out["empty"] += 1
            continue
        if empty:
            raise ValueError(f"{where}: {empty[0]!r} is empty.")
        for column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{where}: {column!r} must be text, got {text!r}.")
        if codec is not None:
            examples.append(Example(texts[0], texts[1] if len(texts) == 2 else None, codec.read(cells[label], where)))
            continue
        given = read_answers(cells[label], where)
        if answers := standing(given, texts[1]):
            examples.append(Example(texts[0], texts[1], answers=answers))
        else:
            left_out[MISPLACED if given else MISSING] += 1
    return examples, left_out

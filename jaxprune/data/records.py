"""Reads rows of text and their labels or answers from JSON, CSV, TSV and Parquet files, as far as they are asked for.

Every fault of a file is one `ValueError` with the file, the line and what was expected there. Whatever a file claims to
hold, what is read of it is bounded. Answers are stored in SQuAD's format, `{"text": ["in 1912", ...], "answer_start":
[37, ...]}`: each with the place of its first character in the *context*, the text that holds it.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.data.splits import Answer, Example

PAIR = ("sentence1", "sentence2")
SPAN_COLUMNS = ("question", "context")
ANSWERS = "answers"
CHOICES = ("context", "choices")  # lm-evaluation-harness's
SUFFIX = "suffix"  # of WinoGrande: what follows a choice
RUNNING = "text"  # the column of running text
ASKED = ("question", "answer")  # columns of questions that are answered freely
MISSING, MISPLACED, EMPTY = "no answer", "no answer stands where it says", "empty"  # why rows are left out
STRAY = "stray"  # answers that are left out, of rows that have others
HIDDEN = -1  # what the hub writes where a label is kept secret
KINDS = (
    ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz", ".parquet",
)  # fmt: skip
FILES = {  # split -> file names, without their ending
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "validation_matched", "dev_matched"),
    "test": ("test", "testing"),
    "calibration": ("calibration",),
}
NAME = re.compile(r"(.+?)(?:-v\d[\d.]*|-(\d{5})-of-(\d{5}))?")  # train, train-v1.1, train-00000-of-00002

MOST_LINE = 50_000_000  # characters, also of JSON that is not in lines; SQuAD 2.0 has 42 million in one
MOST_UNPACKED, RATIO = 1 << 30, 64  # characters that a file may have, and how many more for every byte on the disk
MOST_HELD, ROW = 1 << 31, 256  # bytes of texts that are held beside the size of the file; of a row beside its texts
LINE = 32  # characters for which a line counts beside its own: it takes time, even if it is empty
BATCH = 8192  # rows of a Parquet file that are read at once
csv.field_size_limit(MOST_LINE)


@dataclass(frozen=True)
class Records:
    """The rows of one split, read when they are asked for."""

    where: str  # the file or the hub's split, for messages
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[tuple[int | str, Mapping[str, Any]]]]  # the number and cells of every row
    unit: str = "line"  # what the number counts
    typed: bool = True  # False: every cell is text, numbers too, as in CSV
    size: int = 0  # bytes on the disk
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # columns whose cells are places among names

    @property
    def rows(self) -> list[tuple[int | str, Mapping[str, Any]]]:
        """All rows with all columns."""
        return list(self.read(self.columns))

    def place(self, number: int | str) -> str:
        """Names a row in a message."""
        return f"{self.where}, {self.unit} {number}"


def kind_of(path: Path) -> str:
    """The ending by which a file is read; empty if it is none of those known."""
    return next((kind for kind in sorted(KINDS, key=len, reverse=True) if path.name.lower().endswith(kind)), "")


def read(path: Path, header: Sequence[str] = ()) -> Records:
    """Opens one file; `header` are the columns of a TSV file that does not name them.

    Raises:
        ValueError: If the file is empty, broken, not UTF-8 or of an unknown kind.
    """
    kind = kind_of(path).removesuffix(".gz")
    if not kind:
        raise ValueError(f"{path} is none of {', '.join(KINDS)}.")
    if kind in (".json", ".jsonl"):
        records = _read_json(path, kind)
    elif kind == ".parquet":
        records = _read_parquet(path)
    elif kind == ".txt":
        records = Records(str(path), (RUNNING,), lambda columns: _paragraphs(path), typed=False)
    else:
        records = _read_cells(path, _csv_rows if kind == ".csv" else _tsv_rows, header)
    if next(records.read(records.columns[:1]), None) is None:
        raise ValueError(f"{path} has no rows.")
    return replace(records, size=path.stat().st_size)


def split_of(path: Path) -> tuple[str, tuple[int, int] | None]:
    """The split that a file is named after, or nothing, and its place among shards, if it is one."""
    match = NAME.fullmatch(path.name[: len(path.name) - len(kind_of(path))].lower())
    name, shard, shards = match.groups() if match and kind_of(path) else ("", None, None)
    split = next((split for split, names in FILES.items() if name in names), "")
    return split, (int(shard), int(shards)) if shard and shards else None


def read_folder(folder: Path, header: Sequence[str] = ()) -> tuple[dict[str, Records], list[str]]:
    """Opens the train, validation, test and calibration files of a folder, or of its folder `data`, as the hub has it.

    Returns:
        The splits, and the names of data files that belong to none of them, or cannot be read.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If one of them is broken, a shard is missing, or there are two for one split.
    """
    files: dict[str, list[tuple[tuple[int, int] | None, Path]]] = {}
    unused = []
    for place in (folder, folder / "data"):
        done = bool(files)
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if kind_of(path) and path.is_file():
                split, shard = split_of(path)
                if split and not done:
                    files.setdefault(split, []).append((shard, path))
                else:
                    unused.append(str(path.relative_to(folder)))
            elif split_of(path.with_name(f"{path.name.partition('.')[0]}.jsonl"))[0]:  # a folder, or of another kind
                unused.append(str(path.relative_to(folder)))
    kinds = {kind_of(path).startswith(".txt") for found in files.values() for _, path in found}
    if len(kinds) > 1:  # beside tables, text files are notes
        notes = {path for found in files.values() for _, path in found if kind_of(path).startswith(".txt")}
        unused += [str(path.relative_to(folder)) for path in notes]
        files = {split: [it for it in found if it[1] not in notes] for split, found in files.items()}
        files = {split: found for split, found in files.items() if found}
    if not files:
        raise FileNotFoundError(
            f"{folder} has no train.jsonl, validation.jsonl or test.jsonl (or .jsonl.gz, .csv, ...)."
        )
    records = {
        split: _joined(split, [read(path, header) for path in _parts(folder, split, files[split])])
        for split in FILES
        if split in files
    }
    return records, sorted(unused, key=lambda name: (name.count("/"), name))


def _parts(folder: Path, split: str, files: Sequence[tuple[tuple[int, int] | None, Path]]) -> list[Path]:
    """The files of a split: one, or all the shards of one set, in their order."""
    paths, shards = [path for _, path in files], [shard for shard, _ in files if shard is not None]
    counts = {count for _, count in shards}
    if len(counts) > 1 or len(paths) - len(shards) > (not shards):
        raise ValueError(f"{folder} has {' and '.join(path.name for path in paths)}: keep one of them.")
    if shards and [place for place, _ in shards] != list(range(*counts)):
        raise ValueError(f"{folder} has {len(paths)} of the {max(counts)} parts of {split}: add the others.")
    return paths


def _joined(split: str, parts: Sequence[Records]) -> Records:
    """The shards of a split as one."""
    first = parts[0]
    for part in parts[1:]:
        if (set(part.columns), part.classes, part.typed) != (set(first.columns), first.classes, first.typed):
            raise ValueError(f"{part.where} has the columns {list(part.columns)}, {first.where} {list(first.columns)}.")

    def rows(columns: Sequence[str]) -> Iterator[tuple[int | str, Mapping[str, Any]]]:
        for part in parts:
            for number, cells in part.read(columns):
                yield f"{number} of {Path(part.where).name}", cells

    where = f"{Path(first.where).parent} ({split})"
    return first if len(parts) == 1 else replace(first, where=where, read=rows, size=sum(part.size for part in parts))


def _lines(path: Path, most: int | None = None) -> Iterator[str]:
    """The lines of a file with their ends; it is refused once it has unpacked to more than there is room for."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    most = MOST_UNPACKED + RATIO * path.stat().st_size if most is None else most
    number = unpacked = 0
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(iter(partial(file.readline, MOST_LINE + 1), ""), 1):
                unpacked += len(line) + LINE
                if len(line) > MOST_LINE or unpacked > most:
                    what = f"a line of more than {MOST_LINE:,}" if len(line) > MOST_LINE else f"more than {most:,}"
                    raise ValueError(f"{path}, line {number}: {what} characters; is this a data file?")
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason}, in line {number + 1} or later): convert it first."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error} (after line {number}).") from error


def _refuse_twice(columns: Sequence[str], where: str) -> None:
    for column, count in Counter(columns).items():
        if count > 1 and column:  # pandas' index has no name, and is not asked for
            raise ValueError(f"{where}: column {column!r} occurs {count} times; rename or remove one.")


def _parsed(text: str, where: str) -> Any:
    """JSON, of which no object may have a name twice."""

    def row(cells: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(cells)
        if len(named) < len(cells):
            _refuse_twice([name for name, _ in cells], where)
        return named

    try:
        value = json.loads(text, object_pairs_hook=row)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON, {error.msg} at character {error.pos + 1}.") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a character (such as \\ud800) is no text: remove it.") from error
    except ValueError as error:  # a row that names a column twice, or a number with thousands of digits
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {one_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: broken JSON, nested too deeply.") from error
    return value


def _read_json(path: Path, kind: str) -> Records:
    """JSON lines; or a document, which is an array of rows or SQuAD's nested data."""
    lines = ((number, line) for number, line in enumerate(_lines(path), 1) if line.strip())
    number, first = next(lines, (1, ""))
    if not first:
        return Records(str(path), (), lambda columns: iter(()))
    try:
        row = _parsed(first, f"{path}, line {number}")
    except ValueError:
        if kind == ".jsonl":
            raise
        row = None  # the first line of a document
    if isinstance(row, dict) and not isinstance(row.get("data"), list):
        return Records(str(path), tuple(row), lambda columns: _json_rows(path))
    if kind == ".jsonl" and not isinstance(row, dict):
        raise ValueError(f'{path}, line {number}: expected an object such as {{"sentence": "...", "label": 0}}.')
    if row is not None and (more := next(lines, None)):
        raise ValueError(f"{path}, line {more[0]}: expected nothing after the first line, which is a whole document.")
    document = _parsed("".join(_lines(path, MOST_LINE)), str(path)) if row is None else row
    rows = document if isinstance(document, list) else list(_squad_rows(document, path))
    if not all(isinstance(cells, dict) for cells in rows):
        raise ValueError(f"{path}: expected JSON lines, an array of objects, or SQuAD's own format.")
    return Records(
        str(path), tuple(rows[0]) if rows else (), lambda columns: iter(list(enumerate(rows, 1))), unit="row"
    )


def _json_rows(path: Path) -> Iterator[tuple[int | str, Mapping[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            cells = _parsed(line, where := f"{path}, line {number}")
            if not isinstance(cells, dict):
                raise ValueError(f'{where}: expected an object such as {{"sentence": "...", "label": 0}}.')
            yield number, cells


def _squad_rows(document: Any, path: Path) -> Iterator[dict[str, Any]]:
    """The questions of SQuAD's own nested files, each with its context and its answers."""
    try:
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    yield {
                        "question": asked["question"],
                        "context": paragraph["context"],
                        ANSWERS: asked.get("answers") or [],
                    }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected JSON lines, an array of objects, or SQuAD's own format (data, paragraphs, qas)."
        ) from error


Cells = Iterator[tuple[int, list[str]]]  # the number of a row's last line, and its cells


def _csv_rows(path: Path) -> Cells:
    reader, begin = csv.reader(_lines(path), strict=True), 0
    try:
        for cells in reader:
            begin = reader.line_num
            if cells:
                yield begin, cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {begin + 1}: broken CSV, {error}.") from error


def _tsv_rows(path: Path) -> Cells:
    """Rows of a TSV file, which is literal: a quotation mark is one, and every line is a row."""
    for number, line in enumerate(_lines(path), 1):
        if line := line.rstrip("\r\n"):
            yield number, line.split("\t")


def _paragraphs(path: Path) -> Iterator[tuple[int | str, Mapping[str, Any]]]:
    """The paragraphs of a text file, between which blank lines stand."""
    part: list[str] = []
    for number, line in enumerate(itertools.chain(_lines(path), [""]), 1):
        if line.strip():
            part.append(line.rstrip("\r\n"))
        elif part:
            yield number - len(part), {RUNNING: "\n".join(part)}
            part = []


def _read_cells(path: Path, rows: Callable[[Path], Cells], header: Sequence[str]) -> Records:
    """A file whose first row names the columns, or which has the columns of `header` and does not name them."""
    names = next((cells for _, cells in rows(path)), [])
    named = not header or len(names) != len(header) or bool(set(names) & set(header))
    names = names if named else list(header)
    _refuse_twice(names, str(path))
    literal = " (a TSV file is read as it stands: cells in quotes need CSV)" if rows is _tsv_rows else ""

    def read(columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        places = [(column, names.index(column)) for column in columns if column in names]
        for number, cells in itertools.islice(rows(path), int(named), None):
            if len(cells) != len(names):
                raise ValueError(f"{path}, line {number}: {len(cells)} cells under {len(names)} column names{literal}.")
            yield number, {column: cells[place] for column, place in places}

    return Records(str(path), tuple(names), read, typed=False)


def _read_parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet
    from pyarrow import types

    compute: Any = pyarrow.compute  # its functions are made when it is imported

    broken = (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = schema.names
            classes = _class_names(schema.metadata or {})
    except broken as error:
        raise ValueError(f"{path} cannot be read as Parquet: {one_line(error)}") from error
    _refuse_twice(names, str(path))

    def read(columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        number, columns = 0, [column for column in columns if column in names]
        try:
            # texts that repeat stay so until their size is known
            texts = [name for name in columns if types.is_string(schema.field(name).type)]
            with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
                for batch in file.iter_batches(BATCH, columns=columns):
                    cells = []
                    for column in map(batch.column, columns):
                        if types.is_dictionary(column.type):
                            lengths = compute.binary_length(column.dictionary.cast("string"))
                            if (compute.sum(lengths.take(column.indices)).as_py() or 0) > MOST_UNPACKED:
                                raise ValueError(f"more than {MOST_UNPACKED:,} characters in {BATCH:,} rows")
                            column = column.dictionary_decode()
                        cells.append(column.to_pylist())
                    for row in zip(*cells, strict=True):
                        number += 1
                        yield number, dict(zip(columns, row, strict=True))
        except broken as error:
            raise ValueError(f"{path} cannot be read as Parquet after row {number}: {one_line(error)}") from error

    return Records(str(path), tuple(names), read, unit="row", classes=classes)


def one_line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The names of the classes in the columns of a file from the hub, which stores their places."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: tuple(kind["names"]) for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):  # not the hub's: whole numbers are labels
        return {}


_WHOLE = re.compile(r"(0|-?[1-9][0-9]{0,999})(\.0)?")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Labels:
    """The reading of stored labels."""

    names: tuple[str, ...]  # ("score",) in a regression
    regression: bool = False
    index: Mapping[str, int] = field(default_factory=dict)  # a stored label as `label_text` -> its index

    @staticmethod
    def of(names: Sequence[str], regression: bool = False) -> Labels:
        """Labels that are stored by name, or by their place among the names unless these are numbers themselves.

        Raises:
            ValueError: If there is no name, or one twice.
        """
        index = {label_text(name): place for place, name in enumerate(names)}
        if not names or len(index) < len(names):
            raise ValueError(f"label names must be given and differ, got {list(names)}.")
        numbers = any(_WHOLE.fullmatch(name) for name in index)
        places = {} if numbers else {str(place): place for place in range(len(names))}
        return Labels(tuple(names), regression, places | index)

    @staticmethod
    def found(given: Sequence[tuple[Records, Sequence[Stored]]], where: str, *, classes: bool = False) -> Labels:
        """The labels in the data, sorted (whole numbers as numbers); numbers with fractions make a regression.

        Text is a number only in files that hold nothing but text, such as CSV.

        Args:
            given: The files and their rows.
            where: The data, for messages.
            classes: Whether they are classes in any case.

        Raises:
            ValueError: If a label is missing or of another type, or there are more than make sense.
        """
        names: dict[str, str] = {}
        numbers = []
        for records, rows in given:
            for (kind, value), number in _distinct(records, rows).items():
                try:
                    key = label_text(value)
                except ValueError as error:
                    raise ValueError(f"{records.place(number)}: {error}") from error
                as_text = records.typed and kind is str
                name = value.strip() if as_text else key
                names[key] = name if names.get(key, name) == name else key
                numbers.append(None if as_text else _number(key))
        rows = sum(len(some) for _, some in given)
        if not classes and None not in numbers and not all(number is None or number.is_integer() for number in numbers):
            return Labels(("score",), True)
        keys = sorted(names, key=int) if all(map(_WHOLE.fullmatch, names)) else sorted(names)
        if len(keys) > 2 and 2 * len(keys) > rows:
            raise ValueError(
                f"{where} has {len(keys):,} different labels in {rows:,} rows, such as {names[keys[0]][:40]!r}: is "
                "this the column of the labels? Name it with label=; for numbers to predict, give labels=('score',)."
            )
        return Labels(tuple(names[key] for key in keys), False, {key: place for place, key in enumerate(keys)})

    def renamed(self, names: Sequence[str]) -> Labels:
        """The same stored labels under other names; the same names in another order reorder the classes.

        Raises:
            ValueError: If there are more or fewer names, or two are the same.
        """
        if len(set(names)) != len(self.names) or len(names) != len(self.names):
            count = len(self.names)
            raise ValueError(f"expected {count} different label names, for {', '.join(self.names)}; got {list(names)}.")
        new = pair_labels(self.names, names) or range(len(names))
        return Labels(tuple(names), self.regression, {text: new[i] for text, i in self.index.items()})

    def ordered_as(self, others: Sequence[str]) -> Labels:
        """The same labels among others and in their order, or as they are where the two do not pair."""
        places = pair_labels(self.names, others)
        if places is None:
            return self
        names = list(others)
        for name, place in zip(self.names, places, strict=True):
            names[place] = name
        return Labels(tuple(names), self.regression, {text: places[i] for text, i in self.index.items()})

    def read(self, value: Any) -> int | float:
        """A stored label as an index, or as a float in a regression.

        Raises:
            ValueError: If the label is missing or not one of these.
        """
        text = label_text(value)
        if self.regression:
            number = _number(text)
            if number is None:
                raise ValueError(f"the label {value!r} is not a finite number, and this is a regression.")
            return number
        if text not in self.index:
            some = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            places = f", nor one of the places 0 to {len(self.names) - 1}" if len(self.index) > len(self.names) else ""
            raise ValueError(f"the label {value!r} is none of {some}{places}.")
        return self.index[text]


def pair_labels(labels: Sequence[str], others: Sequence[str]) -> tuple[int, ...] | None:
    """The place of each label among others: by name, else by place if one side is generic; None if they do not pair.

    By name the others may be more. Case counts only if labels differ in nothing else. Generic are `LABEL_0`, `LABEL_1`
    and so on, and rising numbers.
    """
    for same in (str, str.casefold):
        place = {same(other): i for i, other in enumerate(others)}
        if len(place) == len(others) and len(set(map(same, labels)) & set(place)) == len(labels):
            return tuple(place[same(label)] for label in labels)
    by_place = len(labels) == len(others) and (_generic(labels) or _generic(others))
    return tuple(range(len(others))) if by_place else None


def _generic(labels: Sequence[str]) -> bool:
    """True if labels say nothing but their places."""
    numbers = [re.fullmatch(r"(?:LABEL_)?(\d{1,9})", label, re.ASCII | re.IGNORECASE) for label in labels]
    places = [int(number[1]) for number in numbers if number is not None]
    return len(places) == len(labels) and places == sorted(set(places))


def _number(text: str) -> float | None:
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def is_blank(value: Any) -> bool:
    """True if a label is missing: nothing, empty or not a number."""
    return value is None or (str(value).strip().lower() in ("", "nan") if isinstance(value, str | float) else False)


def label_text(value: Any) -> str:
    """A stored label as text, as it is written; a whole number reads the same whether it was 1, 1.0 or "1".

    Raises:
        ValueError: If the label is missing, or neither text nor a number.
    """
    if is_blank(value):
        raise ValueError("the label is missing (empty or NaN).")
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if not isinstance(value, str | int):
        raise ValueError(f"a label must be text or a number, got {type(value).__name__}.")
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def text_columns(
    records: Mapping[str, Records], wanted: Sequence[tuple[str, ...]], labels: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    """The columns of the text and of the label, after making sure that every file has them.

    Args:
        records: The splits. That of the test may have no labels.
        wanted: Columns of the text that may be meant, the first that are there are taken.
        labels: Likewise, of the label.
    """
    first = next(iter(records.values()))
    columns = next((columns for columns in wanted if set(columns) <= set(first.columns)), wanted[0])
    label = next((name for name in labels if name in first.columns), labels[0])
    for split, given in records.items():
        for column in columns if split == "test" and len(records) > 1 else (*columns, label):
            if column not in given.columns:
                raise ValueError(f"{given.where} has no column {column!r}; it has {list(given.columns)}.")
    return columns, label


def _distinct(records: Records, rows: Iterable[Stored]) -> dict[tuple[type, Any], int | str]:
    """The different labels of a file, with their types, and the number of the first row of each."""
    first: dict[tuple[type, Any], int | str] = {}
    for row in rows:
        try:
            first.setdefault((type(row.label), row.label), row.number)
        except TypeError as error:  # a list or an object
            kind = type(row.label).__name__
            raise ValueError(f"{records.place(row.number)}: a label must be text or a number, got {kind}.") from error
    return first


def read_answers(stored: Any, where: str) -> tuple[Answer, ...]:
    """The answers of a row in SQuAD's format, or in that of its own files, a list of texts with their starts.

    There are none where the question has none, as in SQuAD 2.

    Raises:
        ValueError: If it is something else; `where` names the cell.
    """
    if isinstance(stored, list) and all(isinstance(answer, Mapping) for answer in stored):
        stored = {name: [answer.get(name) for answer in stored] for name in ("text", "answer_start")}
    cell: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
    texts: Any = cell.get("text")
    starts: Any = cell.get("answer_start")
    lists = isinstance(texts, list | tuple) and isinstance(starts, list | tuple) and len(texts) == len(starts)
    whole = lists and all(type(start) is int or (type(start) is float and start.is_integer()) for start in starts)
    if not whole or not all(isinstance(text, str) for text in texts):
        shown, example = repr(stored), '{"text": ["in 1912"], "answer_start": [37]}'
        hint = ": a cell of CSV cannot hold them, use JSON lines or Parquet" if isinstance(stored, str) else ""
        raise ValueError(
            f"{where}: the answers must be an object such as {example}, got {shown[:77]}{'...' * (len(shown) > 77)}"
            f"{hint}."
        )
    return tuple(Answer(int(start), text) for text, start in zip(texts, starts, strict=True))


def standing(answers: Sequence[Answer], context: str) -> tuple[Answer, ...]:
    """Those of the answers that are in the context where they say, and are more than white space."""
    return tuple(
        answer
        for answer in answers
        if answer.text.strip() and answer.start >= 0 and context.startswith(answer.text, answer.start)
    )


def is_choices(value: Any) -> bool:
    """True if a cell holds two texts or more to choose from."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) and text.strip() for text in value)


class Stored(NamedTuple):
    """A row as it is stored."""

    number: int | str
    texts: tuple[Any, ...]  # of the second column the choices, if it holds such
    label: Any  # or the answers


def read_rows(
    records: Records, columns: tuple[str, ...], label: str, *, spans: bool, skip_empty: bool
) -> tuple[list[Stored], Counter[str]]:
    """The texts and the labels of one file, and how many rows (and `STRAY` answers) were left out, by reason.

    Args:
        records: The file.
        columns: Those of the text or the two texts.
        label: That of the label, or of the answers.
        spans: Whether it holds answers in SQuAD's format.
        skip_empty: Whether rows without a text are left out: the hub's QQP has some.

    Raises:
        ValueError: If a row has no text or no label, or there is too much to be held.
    """
    rows, left_out, held = [], Counter[str](), 0
    classes = records.classes.get(label)
    for number, cells in records.read((*columns, label)):
        try:
            texts, stored = tuple(cells[column] for column in columns), cells[label]
        except KeyError as error:
            raise ValueError(f"{records.place(number)}: no column {error}; it has {list(cells)}.") from error
        held += ROW
        for column, text in zip(columns, texts, strict=True):
            if text is None or (isinstance(text, str) and not text.strip()):
                if skip_empty:
                    left_out[EMPTY] += 1
                    break
                raise ValueError(f"{records.place(number)}: {column!r} is empty.")
            if columns[:2] == CHOICES and column == CHOICES[1]:
                if not is_choices(text):
                    raise ValueError(f"{records.place(number)}: {column!r} must be two texts or more, got {text!r}.")
                held += ROW * len(text) + sum(map(len, text))
                continue
            if not isinstance(text, str):
                raise ValueError(f"{records.place(number)}: {column!r} must be text, got {text!r}.")
            held += len(text)
        else:
            if spans:
                answers = read_answers(stored, records.place(number))
                stored = standing(answers, texts[1])
                held += ROW * len(stored)
                left_out[STRAY] += len(answers) - len(stored) if stored else 0
                if not stored:
                    left_out[MISPLACED if answers else MISSING] += 1
                    continue
            elif classes is not None and isinstance(stored, int):
                stored = classes[stored] if 0 <= stored < len(classes) else stored
            if held > MOST_HELD + records.size:
                raise ValueError(
                    f"{records.place(number)}: the rows take {held:,} bytes, which is too much: split them."
                )
            rows.append(Stored(number, texts, stored))
    return rows, left_out


def read_texts(records: Records, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The texts of one file that has no labels; those of `RUNNING` may be blank.

    Raises:
        ValueError: If one is no text, all are blank, or there is too much to be held.
    """
    rows, held = [], 0
    for number, cells in records.read(columns):
        for column in columns:
            text = cells.get(column)
            if not isinstance(text, str) or not (text.strip() or column == RUNNING):
                raise ValueError(f"{records.place(number)}: {column!r} must be text, got {text!r}.")
            held += ROW + len(text)
        if held > MOST_HELD + records.size:
            raise ValueError(f"{records.place(number)}: the rows take {held:,} bytes, which is too much: split them.")
        rows.append(tuple(cells[column] for column in columns))
    if not any(text.strip() for row in rows for text in row):
        raise ValueError(f"{records.where} has no text.")
    return rows


def examples_of(records: Records, rows: Sequence[Stored], codec: Labels | None) -> list[Example]:
    """The examples of one file; `codec` reads their labels, None: they have answers."""
    if codec is None:
        return [Example(row.texts[0], *row.texts[1:2], answers=row.label) for row in rows]
    known = {}
    for label, number in _distinct(records, rows).items():
        try:
            known[label] = codec.read(label[1])
        except ValueError as error:
            raise ValueError(f"{records.place(number)}: {error}") from error
    examples = []
    for row in rows:
        label, (text, *more) = known[type(row.label), row.label], row.texts
        if not more or not isinstance(more[0], list):
            examples.append(Example(text, *more, label=label))
        elif label < len(more[0]):
            examples.append(Example(text, label=label, choices=tuple(more[0]), suffix=next(iter(more[1:]), None)))
        else:
            where = records.place(row.number)
            raise ValueError(f"{where}: the label is {row.label!r}, of {len(more[0])} choices, counted from 0.")
    return examples

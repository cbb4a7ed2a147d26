"""Files as people bring them: every row and label is read as it stands, or refused, or its loss is said."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxprune.data import records
from jaxprune.data.records import read
from jaxprune.data.splits import SPLITS, Example, choose, divide, normalise, row_key, rows_of
from jaxprune.data.tasks import Task, load_task

TEXTS = [f"text number {i}" for i in range(60)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(texts: list[str], separator: str = ",", names: tuple[str, ...] = ("text", "label")) -> str:
    rows = [names, *((text, str(i % 2)) for i, text in enumerate(texts))]
    return "".join(separator.join(row) + "\n" for row in rows)


def all_rows(task: Task) -> list[Example]:
    return [example for split in SPLITS for example in task.rows(split)]


# Texts


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("दिन", "दीन"), ("किला", "कला"), ("சிலை", "சாலை"), ("কাল", "কলি"), ("กิน", "กัน"), ("résumé", "resume"),
        ("ok 😀", "ok 😡"), ("C++", "C#"), ("c", "C++"), ("+5", "-5"), ("1.5", "15"), ("5 %", "5"), ("$5", "€5"),
        ("fine :)", "fine :("), ("9/11", "911"),
    ],
)  # fmt: skip
def test_marks_emoji_and_telling_symbols_tell_texts_apart(one: str, other: str):
    assert row_key(Example(one)) != row_key(Example(other))
    assert row_key(Example("a", one)) != row_key(Example("a", other))


@pytest.mark.parametrize(
    ("one", "other"),
    [("``well'' , he said", '"Well", he said.'), ("❤️ it", "❤ it"), ("so\u00adlong", "solong"), ("x - y", "x–y")],
)
def test_what_a_reader_does_not_see_tells_nothing_apart(one: str, other: str):
    assert normalise(one) == normalise(other)


def test_draws_go_by_letters_and_digits():
    """The rows that are drawn from plain texts are those of versions that dropped all symbols from them."""
    rows = [Example(f"{'$' * (i % 2)}row {i}", None, i % 3) for i in range(300)]
    plain = [Example(row.text.strip("$"), None, row.label) for row in rows]
    one, other = (choose(rows_of(some), 40, "salt") for some in (rows, plain))
    assert [row.example.text.strip("$") for row in one] == [row.example.text for row in other]


def test_words_with_vowel_signs_are_all_kept(tmp_path: Path):
    vowels = ["", "ा", "ि", "ी", "ु", "ू", "े", "ै", "ो", "ौ"]
    rows = [
        {"text": a + vowel + b, "label": ("ठंडा", "गर्म")[i % 2]}
        for a in "कखगचजटडतद" for i, vowel in enumerate(vowels) for b in "कखग"
    ]  # fmt: skip
    task = load_task(write(tmp_path / "words.jsonl", lines(rows)))
    assert {row.text for row in all_rows(task)} == {row["text"] for row in rows} and not task.dropped


def test_of_a_text_with_two_labels_either_is_drawn_and_it_is_said(tmp_path: Path):
    rows = [Example(f"row {i}", None, label) for i in range(200) for label in (0, 1)]
    taken = Counter(row.example.label for row in choose(rows_of(rows), 200, "salt"))
    assert 70 < taken[0] < 130 and taken.total() == 200
    often = [row for row in rows for _ in range(3 if row.label else 1)]
    taken = Counter(row.example.label for row in choose(rows_of(often), 200, "salt"))
    assert 130 < taken[1] < 170  # three copies of four
    assert choose(rows_of(often[::-1]), 200, "salt") == choose(rows_of(often), 200, "salt")
    assert divide({"train": rows}).contradictory == 200
    path = write(tmp_path / "odd.jsonl", lines([{"text": row.text, "label": row.label} for row in rows]))
    assert "200 texts occur with different labels" in " ".join(load_task(path).notes)
    assert not load_task(write(tmp_path / "plain.csv", table(TEXTS))).notes


def test_a_split_of_one_class_is_refused(tmp_path: Path):
    write(tmp_path / "t" / "train.csv", table(TEXTS))
    write(tmp_path / "t" / "test.csv", "text,label\n" + "".join(f"other {i},1\n" for i in range(9)))
    with pytest.raises(ValueError, match="t: all 9 test rows have the label '1'"):
        load_task(tmp_path / "t")


def test_rows_that_are_left_out_are_said(tmp_path: Path):
    write(tmp_path / "t" / "train.csv", table(TEXTS))
    write(tmp_path / "t" / "test.csv", table(TEXTS[:10]))
    task = load_task(tmp_path / "t")
    assert task.notes == ("10 rows left out, whose text is in another split, too (train).",)
    assert sum(task.sizes.values()) + task.dropped["train"] == 70


# Files


@pytest.mark.parametrize("names", [("text", "label"), ("label", "text")])
def test_tab_separated_cells_are_literal(tmp_path: Path, names: tuple[str, ...]):
    odd = {
        10: '" i never said that',
        14: 'but you meant it "',
        20: '"Alien" is the best',
        30: 'a 40" screen',
        40: '"x"',
    }
    texts = [odd.get(i, text) for i, text in enumerate(TEXTS)]
    rows = [{"text": text, "label": str(i % 2)} for i, text in enumerate(texts)]
    path = tmp_path / "t.tsv"
    path.write_text("\n".join("\t".join(row[name] for name in names) for row in ({n: n for n in names}, *rows)) + "\n")
    assert [cells for _, cells in read(path).rows] == rows
    assert sorted(row.text for row in all_rows(load_task(path))) == sorted(texts)
    path.write_text("text\tlabel\na\t1\t\n")
    with pytest.raises(ValueError, match=r"t.tsv, line 2: 3 cells under 2 .*as it stands: cells in quotes need CSV"):
        load_task(path)


def test_a_cell_may_be_long(tmp_path: Path):
    path = write(tmp_path / "t.csv", table(["word " * 100_000, *TEXTS]))
    assert max(len(row.text) for row in all_rows(load_task(path))) == 500_000


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + table(TEXTS).replace("\n", "\r\n"),  # a spreadsheet's
        table(TEXTS).replace("\n", "\r"),
        ",text,label\n" + "".join(f"{i},{text},{i % 2}\n" for i, text in enumerate(TEXTS)),  # pandas'
        ",,text,label\n" + "".join(f"{i},{i},{text},{i % 2}\n" for i, text in enumerate(TEXTS)),
        table(TEXTS).replace(",0\n", ",0.0\n").replace(",1\n", ",1.0\n"),
    ],
)
def test_csv_as_other_programs_write_it(tmp_path: Path, content: str):
    task = load_task(write(tmp_path / "t.csv", content))
    assert task.labels == ("0", "1") and sorted(row.text for row in all_rows(task)) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["val", "valid", "dev", "eval", "Validation"])
def test_the_usual_names_of_splits(tmp_path: Path, name: str):
    write(tmp_path / "t" / "train.csv", table(TEXTS))
    write(tmp_path / "t" / f"{name}.csv", table([f"held {i}" for i in range(20)]))
    write(tmp_path / "t" / "test.csv", table([f"test {i}" for i in range(20)]))
    task = load_task(tmp_path / "t")
    assert {row.text[:4] for row in task.rows("dev")} == {"held"} and not task.notes


@pytest.mark.parametrize("content", ["index\ttext\n0\ta\n1\tb\n", "text\tlabel\na\t\nb\t\n", "text\tlabel\na\t-1\n"])
def test_a_test_file_without_labels_is_not_used_and_that_is_said(tmp_path: Path, content: str):
    write(tmp_path / "t" / "train.tsv", table(TEXTS, "\t"))
    write(tmp_path / "t" / "dev.tsv", table([f"held {i}" for i in range(20)], "\t"))
    write(tmp_path / "t" / "test.tsv", content)
    task = load_task(tmp_path / "t")
    assert {row.text[:4] for row in task.rows("test")} == {"held"}
    assert re.search(r"test.tsv has no labels: it is not used", task.notes[0])


def test_files_that_are_not_used_are_named(tmp_path: Path):
    for name in ("train", "extra", "test_mismatched"):
        write(tmp_path / "t" / f"{name}.csv", table(TEXTS))
    write(tmp_path / "t" / "data" / "validation.csv", table(TEXTS))
    write(tmp_path / "t" / "README.md", "text")
    write(tmp_path / "t" / "dev.txt", "text")
    write(tmp_path / "t" / "test" / "part.csv", table(TEXTS))
    (note,) = load_task(tmp_path / "t").notes
    assert note == "t has dev.txt, extra.csv, test, test_mismatched.csv, data/validation.csv, not used."


def test_columns_that_could_be_the_text_are_named(tmp_path: Path):
    rows = [{"text": f"other {i}", "sentence": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    task = load_task(write(tmp_path / "both.jsonl", lines(rows)))
    assert task.notes == ("the texts are read from sentence, not from text: name them with text=.",)
    assert not load_task(tmp_path / "both.jsonl", text="text").notes


def test_shards_and_class_names_of_the_hub(tmp_path: Path):
    names = datasets.ClassLabel(names=["positive", "negative"])  # not in the order of the built-in task
    features = datasets.Features(sentence=datasets.Value("string"), label=names)
    columns = {"sentence": TEXTS, "label": [i % 2 for i in range(60)]}
    odd = pyarrow.table(columns | {"label": [7] * 60}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(odd, tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match="the label 7 is none of positive, negative, nor one of the places 0 to 1"):
        load_task(tmp_path / "odd.parquet")
    whole = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path / "data" / "sst2" / "data"
    for shard in range(2):
        whole.shard(2, shard).to_parquet(folder / f"train-{shard:05d}-of-00002.parquet")
    task = load_task("sst2", data=tmp_path / "data")
    stored = dict(zip(*columns.values(), strict=True))
    assert len(all_rows(task)) == 60 and task.labels == ("negative", "positive")
    assert all(row.label == 1 - stored[row.text] for row in all_rows(task))
    assert load_task(tmp_path / "data" / "sst2").labels == ("positive", "negative")  # as the file has them
    datasets.DatasetDict({"train": whole, "rest": whole}).save_to_disk(tmp_path / "saved")
    task = load_task(tmp_path / "saved")
    assert len(all_rows(task)) == 60 and task.notes == ("saved has rest, not used.",)
    one = load_task(folder / "train-00000-of-00002.parquet")
    assert one.notes[0].startswith("train-00000-of-00002.parquet is one of 2 parts")
    (folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="sst2 has 1 of the 2 parts of train"):
        load_task("sst2", data=tmp_path / "data")


def test_a_saved_data_set_that_cannot_be_read_is_one_error(tmp_path: Path):
    rows = datasets.Dataset.from_list([{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)])
    datasets.DatasetDict({"rest": rows}).save_to_disk(tmp_path / "rest")
    with pytest.raises(ValueError, match=r"rest has the splits \['rest'\], expected train, validation or test"):
        load_task(tmp_path / "rest")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": {"train": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"saved is no data set of the library `datasets`: maximum recursion depth"):
        load_task(tmp_path / "saved")


def test_the_files_that_glue_offers(tmp_path: Path):
    cola = "".join(f'gj04\t{i % 2}\t{"*" * (1 - i % 2)}\t{text} ," she said\n' for i, text in enumerate(TEXTS))
    write(tmp_path / "CoLA" / "train.tsv", cola)  # without names of columns
    write(tmp_path / "CoLA" / "test.tsv", "index\tsentence\n0\ta\n")
    task = load_task("cola", data=tmp_path)
    assert len(all_rows(task)) == 60 and {row.text[-10:] for row in all_rows(task)} == {'," she said'[-10:]}
    pairs = "".join(f"{i % 2}\t1\t2\t{text}\tb {i}\n" for i, text in enumerate(TEXTS))
    write(tmp_path / "MRPC" / "train.tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + pairs)
    assert load_task("mrpc", data=tmp_path).columns == ("#1 String", "#2 String")
    premises = "".join(f"{text}\th {i}\t{('neutral', 'entailment')[i % 2]}\n" for i, text in enumerate(TEXTS))
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(tmp_path / "MNLI" / f"{name}.tsv", f"sentence1\tsentence2\tgold_label\n{premises.replace('text', name)}")
    task = load_task("mnli", data=tmp_path)
    assert {row.text[:11] for row in task.rows("test")} == {"dev_matched"}
    assert task.notes == ("MNLI has dev_mismatched.tsv, not used.",)


def test_squads_own_files_and_other_json(tmp_path: Path):
    rows = []
    for i in range(60):
        context = f"In {1900 + i} the town {i} had a mill."
        answers = {"text": [str(1900 + i)], "answer_start": [3]}
        rows.append({"question": f"When had town {i} a mill?", "context": context, "answers": answers})
    own = [{"text": "1900", "answer_start": 3}]
    paragraphs = []
    for row in rows:
        answers = [{"text": row["answers"]["text"][0], "answer_start": 3}]
        paragraphs.append({"context": row["context"], "qas": [{"question": row["question"], "answers": answers}]})
    nested = {"version": "1.1", "data": [{"title": "towns", "paragraphs": paragraphs}]}
    expected = load_task(write(tmp_path / "flat.jsonl", lines(rows))).digest("test")
    for name, content in {
        "train-v1.1.json": json.dumps(nested), "indented.json": json.dumps(nested, indent=1),
        "nested.jsonl": json.dumps(nested), "array.json": json.dumps(rows), "lines.json": lines(rows),
    }.items():  # fmt: skip
        assert load_task(write(tmp_path / name, content)).digest("test") == expected
    listed = [row | {"answers": [own[0] | {"text": row["answers"]["text"][0]}]} for row in rows]
    assert load_task(write(tmp_path / "listed.jsonl", lines(listed))).digest("test") == expected
    for row in listed[:7]:
        row["answers"].append({"text": "mill", "answer_start": 0})
    strayed = load_task(write(tmp_path / "strayed.jsonl", lines(listed)))
    assert strayed.digest("test") == expected and not strayed.dropped
    assert strayed.notes == ("7 answers left out, which do not stand where they say; their rows have others.",)
    write(tmp_path / "d" / "squad" / "train-v1.1.json", json.dumps(nested))
    assert load_task("squad", data=tmp_path / "d").digest("test") == expected
    text = "question,context,answers\n" + "".join(f'q {i},c {i},"{{\'text\': [""c""]}}"\n' for i in range(60))
    with pytest.raises(ValueError, match=r"pandas.csv, line 2: the answers .* a cell of CSV cannot hold them"):
        load_task(write(tmp_path / "pandas.csv", text))


def test_names_that_a_head_can_have(tmp_path: Path):
    for name, expected in {
        "customer reviews.csv": "customer_reviews", "2024.csv": "task_2024", "отзывы.csv": "task",
        "v1.2-final.csv": "v1_2-final", "topic/train.csv": "topic", "plain.csv": "plain",
    }.items():  # fmt: skip
        task = load_task(write(tmp_path / name, table(TEXTS)))
        assert task.name == expected
        assert bool(task.notes) == (expected not in ("plain", "topic"))


# Labels


@pytest.mark.parametrize(
    "labels",
    [
        ("0101", "0102", "101", "102"), ("0111", "0112"), ("1E30", "1E31", "CA40"), ("+1", "-1", "1"),
        ("1234567890123456788", "1234567890123456789"), ("1.0", "1.1", "2.0"), ("No", "no", "yes"),
    ],
)  # fmt: skip
def test_labels_stay_as_they_are_written(tmp_path: Path, labels: tuple[str, ...]):
    rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(TEXTS)]
    task = load_task(write(tmp_path / "t.jsonl", lines(rows)))
    stored = {row["text"]: row["label"] for row in rows}
    assert sorted(task.labels) == sorted(labels) and not task.regression
    assert any("nothing but case" in note for note in task.notes) == ("no" in labels)
    assert all(task.labels[int(row.label or 0)] == stored[row.text] for row in all_rows(task))
    if "1.1" not in labels:  # in CSV a number is what looks like one
        content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in stored.items())
        assert load_task(write(tmp_path / "t.csv", content)).labels == task.labels


def test_whole_numbers_are_exact(tmp_path: Path):
    numbers = [1234567890123456788, 1234567890123456789, -(10**30)]
    rows = [{"text": text, "label": numbers[i % 3]} for i, text in enumerate(TEXTS)]
    assert load_task(write(tmp_path / "t.jsonl", lines(rows))).labels == tuple(map(str, sorted(numbers)))
    mixed = [{"text": text, "label": (1, 1.0, "1", 2)[i % 4]} for i, text in enumerate(TEXTS)]
    assert load_task(write(tmp_path / "m.jsonl", lines(mixed))).labels == ("1", "2")


def test_names_that_are_numbers_are_no_places(tmp_path: Path):
    """With the labels 1 and 2, a stored 1 is the first, and 0 is none."""
    path = write(tmp_path / "t.jsonl", lines([{"text": t, "label": 1 + i % 2} for i, t in enumerate(TEXTS)]))
    assert Counter(row.label for row in all_rows(load_task(path, labels=("1", "2")))) == {0: 30, 1: 30}
    with pytest.raises(ValueError, match=r"line 1: the label 1 is none of 2, 3\."):
        load_task(path, labels=("2", "3"))


def test_one_label_name_makes_a_regression(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", lines([{"text": t, "label": 1 + i % 5} for i, t in enumerate(TEXTS)]))
    task = load_task(path, labels=("score",))
    assert task.regression and task.labels == ("score",) and {row.label for row in all_rows(task)} == {1, 2, 3, 4, 5}
    assert len(load_task(path).labels) == 5


@pytest.mark.parametrize("value", ["answer number {}", "{}"])
def test_more_labels_than_make_sense_are_refused(tmp_path: Path, value: str):
    content = "text,label\n" + "".join(f"{text},{value.format(i)}\n" for i, text in enumerate(TEXTS))
    with pytest.raises(ValueError, match=r"t has 60 different labels in 60 rows, such as .*label="):
        load_task(write(tmp_path / "t.csv", content))


# Bounds


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path):
    odd = pyarrow.array([2**62] * 60, pyarrow.timestamp("us", "Nowhere/Land"))
    columns = {
        "text": TEXTS,
        "label": [i % 2 for i in range(60)],
        "when": odd,
        "far": odd.cast(pyarrow.timestamp("us")),
    }
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert len(all_rows(load_task(path))) == 60
    with pytest.raises(ValueError, match=r"t.parquet cannot be read as Parquet after row 0"):
        load_task(path, label="far")
    names = ("text", "label", "\0", "")
    pyarrow.parquet.write_table(pyarrow.table(list(columns.values()), names), path)
    with pytest.raises(ValueError, match=r"t.parquet cannot be read as Parquet"):
        read(path).rows  # noqa: B018


def test_what_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "MOST_LINE", 1000)
    monkeypatch.setattr(records, "MOST_UNPACKED", 100_000)
    long = {
        "jsonl": lines([{"text": "x" * 2000, "label": 0}]), "csv": table([*TEXTS, "x" * 2000]),
        "tsv": table([*TEXTS, "x" * 2000], "\t"), "json": "[" + "1," * 2000,
    }  # fmt: skip
    for kind, content in long.items():
        for ending in (kind, f"{kind}.gz"):
            with pytest.raises(ValueError, match=rf"{ending}, line \d+: a line of more than 1,000 characters"):
                load_task(write(tmp_path / f"t.{ending}", content))
    with pytest.raises(ValueError, match=r"long.json, line \d+: more than 1,000 characters"):
        load_task(write(tmp_path / "long.json", "[" + "\n1," * 200))
    with pytest.raises(ValueError, match=r"two.json, line 2: expected nothing after the first line"):
        load_task(write(tmp_path / "two.json", "[]\n[]\n"))
    with pytest.raises(ValueError, match=r"bomb.csv.gz, line \d+: more than [\d,]+ characters; is this a data file"):
        load_task(write(tmp_path / "bomb.csv.gz", "text,label\n" + "\n" * 100_000))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["x" * 90] * 5000, "label": [0, 1] * 2500}), tmp_path / "b.parquet"
    )
    with pytest.raises(ValueError, match=r"b.parquet cannot be read as Parquet after row 0: more than 100,000"):
        load_task(tmp_path / "b.parquet")
    monkeypatch.setattr(records, "MOST_HELD", 0)
    with pytest.raises(ValueError, match=r"t.jsonl.gz, line \d+: the rows take [\d,]+ bytes, which is too much"):
        load_task(write(tmp_path / "t.jsonl.gz", lines([{"text": t, "label": 0} for t in TEXTS])))


def test_a_damaged_body_of_a_gzip_file_is_one_error(tmp_path: Path):
    whole = bytearray(gzip.compress(random.Random(0).randbytes(5000).hex().encode()))
    for place in range(20, len(whole) - 8, 200):
        damaged = bytes(whole[:place]) + bytes([whole[place] ^ 255]) + bytes(whole[place + 1 :])
        path = tmp_path / "t.csv.gz"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t.csv.gz"):
            load_task(path)

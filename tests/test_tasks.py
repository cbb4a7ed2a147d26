"""Data hygiene: which texts are the same, splits that share none, and every way in which data can be bad."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_model

from jaxprune.data.records import Records, read_rows
from jaxprune.data.splits import choose, divide, normalise, rows_of
from jaxprune.data.tasks import (
    SPLITS,
    TASKS,
    Example,
    Source,
    Task,
    draw,
    from_hub,
    load_task,
    remove_leaks,
    row_key,
    seed_words,
)
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import TaskHead

DATA = Path(__file__).parent / "data"
ROWS = [{"sentence": f"sentence number {i}", "label": i % 2} for i in range(40)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def sentences(name: str, count: int, labels: int = 2, start: int = 0) -> list[dict[str, Any]]:
    return [{"sentence": f"{name} {i}", "label": i % labels} for i in range(start, start + count)]


def task(name: str, *, grouped: bool = False, **rows: list[Example]) -> Task:
    splits = {split: tuple(rows.get(split, ())) for split in SPLITS}
    return Task(name=name, splits=splits, labels=("no", "yes"), grouped=grouped)


# Texts and keys


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A plane is taking off.", "a  PLANE is taking off"),
        ("it ca n't be , really", "It can't be, really!"),
        ("Straße – eins", "STRASSE eins"),
        ("caf\u00e9", "cafe\u0301"),  # composed and decomposed
        ("... ?", "...?"),
    ],
)
def test_case_white_space_and_punctuation_do_not_tell_texts_apart(one: str, other: str):
    assert row_key(Example(one)) == row_key(Example(other))


def test_other_texts_have_other_keys():
    texts = ["a plane", "a plan", "?", "!", "the plane", "1.5"]
    assert len({row_key(Example(text)) for text in texts}) == len(texts)
    assert normalise("A, b_c!") == "abc"
    assert len(row_key(Example("a"))) == 16


def test_pairs_in_either_order_have_one_key():
    one, other = Example("A dog.", "A cat.", 1), Example("a cat", "a dog", 0)
    assert row_key(one) == row_key(other)
    assert row_key(one) not in (row_key(Example("a dog a cat")), row_key(Example("a dog")))


def test_digest_sees_texts_and_labels_but_not_their_order():
    rows = [Example("one", None, 0), Example("two", None, 1)]
    digest = task("t", train=rows).digest("train")
    assert digest == task("u", train=[Example("Two!", None, 1), rows[0]]).digest("train")
    assert digest != task("t", train=[Example("one", None, 1), Example("two", None, 0)]).digest("train")
    assert len(digest) == 64
    with pytest.raises(ValueError, match="no split 'validation'"):
        task("t").digest("validation")


# Splits


def overlap(rows: Sequence[Example], others: Sequence[Example]) -> set[str]:
    return {row_key(row) for row in rows} & {row_key(row) for row in others}


def shares_nothing(task: Task) -> bool:
    return not any(overlap(task.rows(a), task.rows(b)) for a, b in itertools.combinations(SPLITS, 2))


def test_splits_of_a_source_with_train_validation_and_test():
    task = load_task(DATA / "intents", labels=TASKS["snips"].labels)
    # a tenth of 280 is 28, but a small set gives up to a quarter: 70
    assert task.sizes == {"train": 210, "calibration": 70, "dev": 56, "test": 56}
    assert shares_nothing(task)
    assert task.labels[0] == "AddToPlaylist" and task.metric == "accuracy" and not task.regression
    stored = [json.loads(line) for line in (DATA / "intents" / "test.jsonl").read_text().splitlines()]
    assert [(e.text, e.label) for e in task.rows("test")] == [(row["sentence"], row["label"]) for row in stored]


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_one_held_out_split_is_the_test_and_dev_is_cut_from_train(tmp_path: Path, held_out: str):
    write(tmp_path / "mine" / "train.jsonl", sentences("train", 4_000))
    write(tmp_path / "mine" / f"{held_out}.jsonl", sentences("held", 50))
    task = load_task("mine", data=tmp_path)
    assert task.sizes == {"train": 3_200, "calibration": 400, "dev": 400, "test": 50}
    assert all(example.text.startswith("held") for example in task.rows("test"))
    assert shares_nothing(task)


def test_one_file_is_cut_in_four(tmp_path: Path):
    task = load_task(write(tmp_path / "mine.jsonl", sentences("row", 400)))
    assert task.name == "mine" and task.source == "file mine.jsonl"
    assert task.sizes == {"train": 100, "calibration": 100, "dev": 100, "test": 100}
    assert shares_nothing(task)


@pytest.mark.parametrize("only", ["validation", "test"])
def test_an_evaluation_set_has_no_train(tmp_path: Path, only: str):
    write(tmp_path / "mine" / f"{only}.jsonl", sentences("row", 1_000))
    task = load_task("mine", data=tmp_path)
    assert task.sizes == {"train": 0, "calibration": 250, "dev": 250, "test": 500}
    assert shares_nothing(task)


def test_validation_and_test_without_train(tmp_path: Path):
    write(tmp_path / "mine" / "validation.jsonl", sentences("dev", 200))
    write(tmp_path / "mine" / "test.jsonl", sentences("test", 100))
    task = load_task("mine", data=tmp_path)
    assert task.sizes == {"train": 0, "calibration": 50, "dev": 150, "test": 100}


def test_a_folder_may_bring_its_own_calibration_rows(tmp_path: Path):
    write(tmp_path / "mine" / "calibration.jsonl", [*sentences("row", 150), *sentences("held", 1)])
    write(tmp_path / "mine" / "test.jsonl", sentences("held", 300))
    task = load_task("mine", data=tmp_path)
    assert task.sizes == {"train": 0, "calibration": 150, "dev": 75, "test": 225}
    assert shares_nothing(task) and task.dropped == {"calibration": 1}
    write(tmp_path / "mine" / "train.jsonl", sentences("row", 400))
    task = load_task("mine", data=tmp_path, max_calibration=100)
    assert task.sizes["calibration"] == 100 and task.rows("test")[0].text == "held 0"
    assert {example.text for example in task.rows("calibration")} <= {f"row {i}" for i in range(150)}
    assert shares_nothing(task)


def test_at_most_2048_rows_are_cut_and_max_calibration_holds():
    rows = [Example(f"row {i}", None, i % 2) for i in range(30_000)]
    splits, *_ = divide({"train": rows})
    assert {name: len(found) for name, found in splits.items()} == {
        "train": 30_000 - 3 * 2_048, "calibration": 2_048, "dev": 2_048, "test": 2_048
    }  # fmt: skip
    fewer, *_ = divide({"train": rows}, max_calibration=500)
    assert len(fewer["calibration"]) == 500
    assert set(fewer["calibration"]) < set(splits["calibration"])
    assert (fewer["dev"], fewer["test"]) == (splits["dev"], splits["test"])


def test_a_cut_depends_on_the_texts_and_the_seed_only():
    rows = [Example(f"row {i % 350}", None, i % 3) for i in range(400)]
    shuffled = random.Random(0).sample(rows, len(rows))
    first, again = divide({"train": rows})[0], divide({"train": shuffled})[0]
    other = divide({"train": rows}, seed=1)[0]
    for split in SPLITS:
        assert Counter(first[split]) == Counter(again[split])
        assert Counter(first[split]) != Counter(other[split])


def test_cuts_keep_the_proportions_of_the_labels():
    rows = [Example(f"row {i}", None, 0 if i % 10 else 1) for i in range(1_000)]
    splits, *_ = divide({"train": rows})
    for split in ("calibration", "dev", "test"):
        assert Counter(example.label for example in splits[split]) == {0: 225, 1: 25}


def test_a_text_stays_in_the_last_split_it_occurs_in():
    train = [Example(f"row {i}", None, i % 2) for i in range(100)]
    given = {
        "train": [*train, Example("In Dev!", None, 0), Example("in test", None, 1), Example("in both", None, 1)],
        "validation": [Example("in dev", None, 0), Example("in both", None, 1), Example("dev only", None, 0)],
        "test": [Example("in test", None, 1), Example("In both.", None, 0)],
    }
    splits, dropped, _ = divide(given)
    assert [example.text for example in splits["dev"]] == ["in dev", "dev only"]
    assert splits["test"] == tuple(given["test"])
    assert len(splits["train"]) + len(splits["calibration"]) == 100
    assert dropped == {"dev": 1, "train": 3}


def test_duplicates_stay_in_train_but_not_beside_calibration():
    rows = [Example(f"row {i % 50}", None, i % 2) for i in range(100)]
    splits, dropped, _ = divide({"train": rows, "test": [Example("held", None, 0)]})
    # a quarter of the 50 different texts, with no double of them left in train
    for split in ("dev", "calibration"):
        assert len(splits[split]) == 12 and len(set(map(row_key, splits[split]))) == 12
    assert dropped == {"train": 24}
    assert len(splits["train"]) == 52 and len(set(map(row_key, splits["train"]))) == 26
    assert not overlap(splits["train"], splits["calibration"])


def test_a_grouped_task_is_split_by_passage():
    rows = [Example(f"question {i}", f"passage {i % 60}", i % 2) for i in range(240)]
    splits, dropped, _ = divide({"train": rows, "validation": [Example("new question", "Passage 7.", 0)]}, grouped=True)
    passages = [{example.pair for example in splits[split]} for split in SPLITS]
    assert passages[3] == {"Passage 7."} and not any("passage 7" in found for found in passages)
    assert all(not a & b for a, b in itertools.combinations(passages, 2))
    assert dropped["train"] >= 4  # the four questions on passage 7
    plain, none, _ = divide({"train": rows, "validation": [Example("new question", "Passage 7.", 0)]})
    assert not none and sum(map(len, plain.values())) == 241


def test_stratified_choice_of_a_regression_takes_every_fifth_of_the_scores():
    rows = rows_of(Example(f"row {i}", None, i / 100) for i in range(500))
    chosen = [row.example.label for row in choose(rows, 50, "salt", regression=True)]
    assert Counter(int(label) for label in chosen if label is not None) == {fifth: 10 for fifth in range(5)}


def test_ties_between_small_classes_are_drawn():
    rows = rows_of(Example(f"row {i}", None, i % 50) for i in range(100))  # 50 classes, 10 places
    taken = {salt: {row.example.label for row in choose(rows, 10, salt)} for salt in ("a", "b")}
    assert len(taken["a"]) == 10 and taken["a"] != taken["b"]


# Drawing


def test_draw_is_deterministic_stratified_and_without_repetition():
    rows = [Example(f"row {i}", None, int(i < 30)) for i in range(120)]
    drawn = task("t", calibration=rows)
    one = draw(drawn, 40, jax.random.key(7))
    assert one == draw(task("t", calibration=rows[::-1]), 40, jax.random.key(7))
    assert one != draw(drawn, 40, jax.random.key(8)) != draw(drawn, 40, 7)
    assert len(set(one)) == 40 and Counter(example.label for example in one) == {0: 30, 1: 10}
    free = [Counter(example.label for example in draw(drawn, 40, seed, stratified=False)) for seed in range(4)]
    assert any(count != {0: 30, 1: 10} for count in free)
    assert sorted(draw(drawn, 120, 0), key=str) == sorted(rows, key=str)
    with pytest.raises(ValueError, match="1 to 120, the calibration rows of 't', got 121"):
        draw(drawn, 121, 0)


def test_seeds_and_keys_are_numbers():
    assert seed_words(3) == (3,)
    assert seed_words(jax.random.key(3)) == (0, 3)
    with pytest.raises(ValueError, match="at least 0"):
        seed_words(-1)
    with pytest.raises(TypeError, match=r"whole number or a jax.random.key"):
        seed_words("0")  # pyright: ignore[reportArgumentType]


# Leaks


def test_remove_leaks_drops_what_another_task_holds_out():
    a = task("a", train=[Example("One.", None, 0), Example("two", None, 1), Example("kept", None, 0)],
             calibration=[Example("three", None, 0), Example("four", None, 1)])  # fmt: skip
    b = task("b", train=[Example("four", None, 0), Example("five", None, 0)], dev=[Example("one", None, 1)],
             test=[Example("THREE", None, 1), Example("two", None, 1)])  # fmt: skip
    (clean_a, clean_b), counts = remove_leaks([a, b])
    assert [e.text for e in clean_a.rows("train")] == ["kept"]
    assert [e.text for e in clean_a.rows("calibration")] == ["four"]
    # "four" is a calibration row of a: no model may be fine-tuned on it
    assert [e.text for e in clean_b.rows("train")] == ["five"]
    assert counts == {("a", "b"): 3, ("b", "a"): 1}
    assert clean_a.dropped == {"leaks.train": 2, "leaks.calibration": 1}
    assert clean_b.rows("test") == b.rows("test") and clean_b.rows("dev") == b.rows("dev")


def test_remove_leaks_compares_pairs_in_either_order_and_passages():
    pairs = task("pairs", train=[Example("x", "y", 0), Example("x", "z", 0), Example("q2", "The passage", 1)])
    questions = task("questions", grouped=True, train=[Example("q3", "passage 2", 0), Example("q4", "fresh", 0)],
                     test=[Example("q1", "the passage", 0)])  # fmt: skip
    other = task("other", dev=[Example("Y", "X", 1)], test=[Example("passage 2", None, 1)])
    (clean, clean_questions, _), counts = remove_leaks([pairs, questions, other])
    # only the whole pair counts in a task that is not grouped
    assert [e.pair for e in clean.rows("train")] == ["z", "The passage"]
    assert [e.text for e in clean_questions.rows("train")] == ["q4"]
    assert counts == {("pairs", "other"): 1, ("questions", "other"): 1}


def test_remove_leaks_refuses_two_tasks_of_one_name():
    with pytest.raises(ValueError, match="two tasks are named 'a'"):
        remove_leaks([task("a"), task("a")])


# Sources


def test_the_table_names_what_is_built_in():
    glue = {"sst2", "mrpc", "rte", "qnli", "cola", "stsb", "mnli", "qqp", "wnli"}
    reviews = {"subj", "mr", "imdb", "yelp_polarity"}
    topics = {"ag_news", "boolq", "trec", "emotion", "banking77", "dbpedia_14", "snips"}
    spans = {"squad", "mlqa"}
    assert glue | reviews | topics | spans == set(TASKS)
    assert {name for name, source in TASKS.items() if source.spans} == spans
    assert {name for name, source in TASKS.items() if source.grouped} == {"qnli", "boolq"} | spans
    for name, source in TASKS.items():
        assert len(set(source.labels)) == len(source.labels) >= (1 if source.regression else 2), name
        assert len(source.columns) == len(source.hub_columns) and source.folders[0] == name, name
        assert len(source.hub_labels or source.labels) == len(source.labels), name


def test_a_built_in_task_finds_its_folder(tmp_path: Path):
    rows = [{"sentence1": f"q {i}", "sentence2": f"p {i // 2}", "label": i % 2} for i in range(80)]
    write(tmp_path / "qnli_devsplit" / "train.jsonl.gz", rows)
    write(tmp_path / "qnli_devsplit" / "validation.jsonl", [{"sentence1": "q", "sentence2": "p", "label": 1}])
    task = load_task("qnli", data=tmp_path)
    assert task.name == "qnli" and task.labels == ("entailment", "not_entailment") and task.grouped
    assert task.source == "folder qnli_devsplit" and task.license == "CC BY-SA 4.0"
    assert task.columns == ("sentence1", "sentence2")
    assert task.rows("test") == (Example("q", "p", 1),)
    by_folder = load_task("qnli_devsplit", data=tmp_path)
    assert by_folder.name == "qnli_devsplit" and by_folder.grouped and by_folder.labels == task.labels


def test_a_regression_has_float_labels(tmp_path: Path):
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 6} for i in range(60)]
    write(tmp_path / "stsb" / "train.jsonl", rows)
    task = load_task("stsb", data=tmp_path)
    assert task.regression and task.labels == ("score",) and task.metric == "pearson_spearman"
    assert all(isinstance(example.label, float) for split in SPLITS for example in task.rows(split))


def test_labels_of_a_built_in_task_can_be_renamed_and_reordered(tmp_path: Path):
    write(tmp_path / "mnli" / "train.jsonl", [
        {"sentence1": f"a {i}", "sentence2": f"b {i % 3}", "label": i % 3} for i in range(60)
    ])  # fmt: skip
    reordered = load_task("mnli", data=tmp_path, labels=("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    for example in reordered.rows("train"):  # stored: 0 entailment, 1 neutral, 2 contradiction
        assert example.pair is not None and example.label == 2 - int(example.pair[-1])
    renamed = load_task("mnli", data=tmp_path, labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    for example in renamed.rows("train"):
        assert example.pair is not None and example.label == int(example.pair[-1])
    with pytest.raises(ValueError, match="expected 3 different label names, for entailment, neutral, contradiction"):
        load_task("mnli", data=tmp_path, labels=("yes", "no"))


def test_f1_is_not_computed_of_the_wrong_class(tmp_path: Path):
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2} for i in range(60)]
    write(tmp_path / "mrpc" / "train.jsonl", rows)
    assert load_task("mrpc", data=tmp_path).metric == "accuracy_f1"
    assert load_task("mrpc", data=tmp_path, labels=("no", "yes")).metric == "accuracy_f1"
    assert load_task("mrpc", data=tmp_path, labels=("equivalent", "not_equivalent")).metric == "accuracy"


def test_hidden_test_labels_make_validation_the_test(tmp_path: Path):
    write(tmp_path / "sst2" / "train.jsonl", sentences("train", 80))
    write(tmp_path / "sst2" / "validation.jsonl", sentences("validation", 10))
    write(tmp_path / "sst2" / "test.jsonl", [row | {"label": -1} for row in sentences("test", 10)])
    assert {example.text.split()[0] for example in load_task("sst2", data=tmp_path).rows("test")} == {"validation"}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_your_own_file(tmp_path: Path, ending: str):
    gap = " " if ending == "tsv" else "\n"
    rows = [
        {"id": i, "body": f'"say {i}" ,{gap}please', "title": f"t {i}", "mood": ("good", "bad")[i % 2]}
        for i in range(80)
    ]
    path = tmp_path / f"reviews.{ending}"
    if "jsonl" in ending:
        write(path, rows)
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "csv":
        write_csv(path, rows)
    else:
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in (rows[0], *(r.values() for r in rows))))
    task = load_task(path, text="body", text_pair="title", label="mood")
    assert task.name == "reviews" and task.labels == ("bad", "good") and task.columns == ("body", "title")
    assert sum(task.sizes.values()) == 80
    for example in task.rows("train"):
        number = int(example.text.split()[1].strip('"'))
        assert example == Example(f'"say {number}" ,{gap}please', f"t {number}", 1 - number % 2)
    assert load_task(path, text="body", label="mood", labels=("good", "bad")).labels == ("good", "bad")


@pytest.mark.parametrize(
    ("values", "labels", "regression"),
    [
        ([1, 2], ("1", "2"), False),
        (["10", "9"], ("9", "10"), False),  # by value, not by letter
        ([1.0, 0.0], ("0", "1"), False),
        ([True, False], ("False", "True"), False),
        (["b", "a", "2"], ("2", "a", "b"), False),
        ([-1, 1], ("-1", "1"), False),
        ([0.5, 3], ("score",), True),
        (["0.5", "1e-1"], ("0.5", "1e-1"), False),  # text stays as it is written
    ],
)
def test_label_names_come_from_the_data(tmp_path: Path, values: list[Any], labels: tuple[str, ...], regression: bool):
    rows = [{"text": f"row {i}", "label": values[i % len(values)]} for i in range(48)]
    task = load_task(write(tmp_path / "own.jsonl", rows))
    assert task.labels == labels and task.regression == regression
    assert task.metric == ("pearson_spearman" if regression else "accuracy")
    stored = {row["text"]: row["label"] for row in rows}
    for example in task.rows("test"):
        value = stored[example.text]
        assert example.label is not None
        if regression:
            assert example.label == float(value)
        else:
            assert task.labels[int(example.label)] == (str(int(value)) if isinstance(value, float) else str(value))


def test_a_csv_from_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path: Path):
    path = write_csv(tmp_path / "own.csv", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_task(path).columns == ("sentence",)


# The hub


def hub_rows(**splits: datasets.Dataset) -> dict[str, datasets.Dataset]:
    return splits


def stored_labels(records: Records) -> list[Any]:
    rows, _ = read_rows(records, ("text",), "label", spans=False, skip_empty=False)
    return [row.label for row in rows]


def test_hub_labels_are_read_by_name():
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["objective", "subjective"])
    )
    found = hub_rows(test=datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features))
    source = Source(hub="some/set", labels=("subjective", "objective"), folders=("set",))
    assert stored_labels(from_hub(source, found)["test"]) == ["objective", "subjective"]
    named = dataclasses.replace(source, labels=("yes", "no"), hub_labels=("subjective", "objective"))
    assert stored_labels(from_hub(named, found)["test"]) == ["no", "yes"]
    with pytest.raises(ValueError, match=r"has the labels \['objective', 'subjective'\], expected \['no', 'yes'\]"):
        from_hub(dataclasses.replace(source, labels=("yes", "no")), found)


def test_hub_splits_may_be_hidden_renamed_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = TASKS["mnli"]
    features = datasets.Features(
        premise=datasets.Value("string"), hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
    )  # fmt: skip

    def rows(name: str, count: int, hidden: bool = False) -> datasets.Dataset:
        labels = [-1 if hidden else i % 3 for i in range(count)]
        texts = [f"{name} {i}" for i in range(count)]
        columns = {"premise": texts, "hypothesis": ["" if i == 4 else "h" for i in range(count)], "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    found = hub_rows(train=rows("train", 60), validation_matched=rows("dev", 9), test_matched=rows("test", 9, True))
    assert sorted(from_hub(source, found)) == ["train", "validation"]
    records = from_hub(source, hub_rows(test=rows("test", 3, hidden=True)))
    assert [row["label"] for _, row in records["test"].rows] == [-1, -1, -1]
    with pytest.raises(ValueError, match=r"nyu-mll/glue has the splits \['other'\]"):
        from_hub(source, hub_rows(other=rows("train", 3)))
    # the whole way: what `datasets` caches and reads from a folder is what it reads from the hub
    folder = tmp_path / "hub"
    for name, split in found.items():
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    local = dataclasses.replace(source, hub=str(folder), config=None)
    monkeypatch.setattr("jaxprune.data.tasks.TASKS", {"mnli": local})
    task = load_task("mnli")
    assert len(task.rows("test")) == 8 and task.rows("test")[1] == Example("dev 1", "h", 1)
    assert task.dropped["empty"] == 2  # the hub's QQP has questions without text; they are left out and counted
    assert task.columns == ("premise", "hypothesis") and task.source == f"hub {folder}"


def test_without_a_network_the_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'rte' could not be fetched from the hub: .*glue.* rte/train.jsonl"):
        load_task("rte")


# Bad input


def bad_folder(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    write(tmp_path / "sst2" / "train.jsonl", ROWS)
    write(tmp_path / "sst2" / "validation.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"sentence": "a", "label": 2},
            "line 2: the label 2 is none of negative, positive, nor one of the places 0 to 1",
        ),
        ({"sentence": "a", "label": "good"}, "line 2: the label 'good' is none of"),
        ({"sentence": "a", "label": 0.5}, "line 2: the label 0.5 is none of"),
        ({"sentence": "a", "label": float("nan")}, "line 2: the label is missing"),
        ({"sentence": "a", "label": None}, "line 2: the label is missing"),
        ({"sentence": "a", "label": [1]}, "line 2: a label must be text or a number, got list"),
        ({"sentence": " ", "label": 1}, "line 2: 'sentence' is empty"),
        ({"sentence": None, "label": 1}, "line 2: 'sentence' is empty"),
        ({"sentence": 5, "label": 1}, "line 2: 'sentence' must be text, got 5"),
        ({"text": "a", "label": 1}, r"line 2: no column 'sentence'; it has \['text', 'label'\]"),
        ({"sentence": "a"}, "line 2: no column 'label'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"validation.jsonl, {message}"):
        load_task("sst2", data=bad_folder(tmp_path, [{"sentence": "fine", "label": 1}, row]))


def test_a_missing_column_is_named_with_those_found(tmp_path: Path):
    with pytest.raises(ValueError, match=r"validation.jsonl has no column 'sentence'; it has \['text', 'label'\]"):
        load_task("sst2", data=bad_folder(tmp_path, [{"text": "a", "label": 1}]))
    path = write_csv(tmp_path / "own.csv", [{"body": "a", "mood": "good"}])
    with pytest.raises(ValueError, match=r"has the columns \['body', 'mood'\]: name the text with text="):
        load_task(path)
    with pytest.raises(ValueError, match=r"no column 'label'; it has \['body', 'mood'\]"):
        load_task(path, text="body")
    with pytest.raises(ValueError, match="needs text="):
        load_task(path, text_pair="body")


def test_a_regression_needs_numbers(tmp_path: Path):
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i / 7} for i in range(40)]
    for label in ("high", float("inf")):
        write(tmp_path / "stsb" / "train.jsonl", [*rows, {"sentence1": "a", "sentence2": "b", "label": label}])
        with pytest.raises(ValueError, match=r"line 41: the label .* is not a finite number"):
            load_task("stsb", data=tmp_path)


def test_empty_data_and_one_class(tmp_path: Path):
    for ending in ("jsonl", "csv"):
        (tmp_path / f"empty.{ending}").write_text("\n")
        with pytest.raises(ValueError, match=f"empty.{ending} has no rows"):
            load_task(tmp_path / f"empty.{ending}")
    (tmp_path / "header.csv").write_text("sentence,label\n")
    with pytest.raises(ValueError, match=r"header.csv has no rows"):
        load_task(tmp_path / "header.csv")
    one = write(tmp_path / "one.jsonl", [row | {"label": 1} for row in ROWS])
    with pytest.raises(ValueError, match="one: every label is '1'; a task needs two different ones"):
        load_task(one)
    hidden = write(tmp_path / "hidden.jsonl", [row | {"label": -1} for row in ROWS])
    with pytest.raises(ValueError, match="every label is -1, which means hidden"):
        load_task(hidden)


def test_too_few_rows(tmp_path: Path):
    with pytest.raises(ValueError, match="few: 2 rows are too few to cut calibration, dev and test"):
        load_task(write(tmp_path / "few.jsonl", ROWS[:2]))
    same = [row | {"sentence": "the same"} for row in ROWS]
    with pytest.raises(ValueError, match="too few"):
        load_task(write(tmp_path / "same.jsonl", same))


def test_broken_json(tmp_path: Path):
    path = write(tmp_path / "own.jsonl", ROWS)
    for line, message in (
        ('{"sentence": "a", "label"', "line 41: broken JSON"),
        ("[1, 2]", "line 41: expected an object"),
        ('{"sentence": "a", "label": 1, "label": 0}', "line 41: column 'label' occurs 2 times"),
    ):
        write(path, ROWS)
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(ValueError, match=f"own.jsonl, {message}"):
            load_task(path)


def test_broken_csv(tmp_path: Path):
    path = tmp_path / "own.csv"
    for text, message in (
        ("sentence,label\na,1\nb,0,0\n", "own.csv, line 3: 3 cells under 2 column names"),
        ("sentence,sentence,label\na,b,1\n", "own.csv: column 'sentence' occurs 2 times"),
        ('sentence,label\n"a"x,1\n', "own.csv, line 2: broken CSV"),
        ('sentence,label\n"a,1\n', "own.csv, line 2: broken CSV, unexpected end of data"),
        ("sentence,label\na,\n", "own.csv, line 2: the label is missing"),
        ("sentence,label\na,NaN\n", "own.csv, line 2: the label is missing"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_task(path)


def test_files_that_are_not_what_they_seem(tmp_path: Path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"sentence": "café", "label": 1}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl is not UTF-8"):
        load_task(latin)
    whole = write(tmp_path / "own.jsonl.gz", ROWS).read_bytes()
    for content in (whole[:-20], b"not gzip"):
        (tmp_path / "own.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"own.jsonl.gz is not a whole gzip file"):
            load_task(tmp_path / "own.jsonl.gz")
    (tmp_path / "own.parquet").write_bytes(b"PAR1 broken PAR1")
    with pytest.raises(ValueError, match=r"own.parquet cannot be read as Parquet"):
        load_task(tmp_path / "own.parquet")
    (tmp_path / "own.doc").write_text("text")
    with pytest.raises(ValueError, match=r"own.doc is none of .jsonl"):
        load_task(tmp_path / "own.doc")


def test_parquet_with_a_column_twice(tmp_path: Path):
    table = pyarrow.table([["a"], ["b"], [1]], names=["text", "text", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="column 'text' occurs 2 times"):
        load_task(tmp_path / "own.parquet")


def test_folders_that_are_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"data folder .*nowhere does not exist"):
        load_task("sst2", data=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no folder for task 'qnli' in .*: looked for qnli, qnli_devsplit"):
        load_task("qnli", data=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere.csv"):
        load_task(tmp_path / "nowhere.csv")
    (tmp_path / "sst2").mkdir()
    with pytest.raises(FileNotFoundError, match=r"sst2 has no train.jsonl"):
        load_task("sst2", data=tmp_path)
    write(tmp_path / "sst2" / "train.jsonl", ROWS)
    write(tmp_path / "sst2" / "train.jsonl.gz", ROWS)
    with pytest.raises(ValueError, match=r"sst2 has train.jsonl and train.jsonl.gz: keep one"):
        load_task("sst2", data=tmp_path)


def test_an_unknown_task_lists_those_there_are(tmp_path: Path):
    (tmp_path / "my_set").mkdir()
    with pytest.raises(ValueError, match=r"unknown task 'SST-2'. Did you mean 'sst2'.* Built in: ag_news, banking77"):
        load_task("SST-2")
    with pytest.raises(ValueError, match=r"Did you mean 'my_set'\?.* In .*: my_set\."):
        load_task("my_sets", data=tmp_path)
    with pytest.raises(ValueError, match="max_calibration must be at least 1, got 0"):
        load_task("sst2", max_calibration=0)


def test_a_built_in_task_with_a_folder_is_suggested_once(tmp_path):
    (tmp_path / "snips").mkdir()
    with pytest.raises(ValueError, match=r"Did you mean 'snips'\? Built in"):
        load_task("snip", data=tmp_path)


# The head that a task is for


def rated(file: Path, labels: Sequence[Any]) -> Path:
    return write(file, [{"text": f"film number {i}", "label": labels[i % len(labels)]} for i in range(60)])


RATING = TaskHead(name="rating", labels=("score",), regression=True)


@pytest.mark.parametrize("values", [(1, 2, 3, 4, 5), (1.0, 2.0), (0, 1), tuple(range(60))])
def test_a_head_or_one_label_name_makes_a_regression_of_whole_numbers(tmp_path: Path, values: tuple[float, ...]):
    file = rated(tmp_path / "rating.jsonl", values)
    model, _ = tiny_model(heads=(RATING, TaskHead(name="other", labels=("a", "b"))))
    for labels in (RATING, model, ("score",)):
        task = load_task(file, labels=labels)
        assert task.regression and task.labels == ("score",) and task.metric == "pearson_spearman"
        assert {example.label for split in task.splits.values() for example in split} <= set(map(float, values))
        assert fitting_head(model, task) == "rating"
    if len(values) < 60:
        assert not load_task(file).regression
        with pytest.raises(ValueError, match=r"is a regression, but 'rating' is a classification.*one name in labels="):
            fitting_head(model, load_task(file))


def test_a_head_makes_classes_of_fractions(tmp_path: Path):
    file, head = rated(tmp_path / "version.jsonl", (1.5, 2.0)), TaskHead(name="version", labels=("2.0", "1.5"))
    assert load_task(file).regression
    task = load_task(file, labels=head)
    assert not task.regression and len(task.labels) == 2


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (("POSITIVE", "NEGATIVE"), ("positive", "negative")),
        (("positive", "neutral", "negative"), ("positive", "neutral", "negative")),  # one has no rows
        (("LABEL_0", "LABEL_1"), ("negative", "positive")),
        (("good", "bad"), ("negative", "positive")),  # do not pair: as they are, for a refusal
    ],
)
def test_labels_are_in_the_order_of_the_head_that_they_pair_with(
    tmp_path: Path, labels: tuple[str, ...], wanted: tuple[str, ...]
):
    file, head = rated(tmp_path / "mood.jsonl", ("positive", "negative")), TaskHead(name="mood", labels=labels)
    task = load_task(file, labels=head)
    assert task.labels == wanted and not task.ordered
    for example in task.rows("test"):
        assert task.labels[int(example.label or 0)] == ("positive", "negative")[int(example.text.split()[-1]) % 2]
    model, _ = tiny_model(heads=(head,))
    if labels == ("good", "bad"):
        with pytest.raises(ValueError, match="2 labels, good, bad; 'mood' has others, negative, positive"):
            fitting_head(model, task)
    else:
        by_place = pytest.warns(UserWarning, match="by their places: negative, positive of 'mood' are LABEL_0, LABEL_1")
        with by_place if labels[0] == "LABEL_0" else contextlib.nullcontext():
            assert fitting_head(model, task) == "mood"

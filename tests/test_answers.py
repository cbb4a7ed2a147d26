"""Answers in SQuAD's format: how they are read, compared by exact match and F1, and split by context."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from jaxprune.data.records import MISPLACED, MISSING, read_answers, standing
from jaxprune.data.splits import SPLITS, Answer, Example, digest, row_key
from jaxprune.data.tasks import TASKS, draw, from_hub, load_task, remove_leaks
from jaxprune.evaluation.evaluate import exact_match, plain, squad, word_f1

CONTEXT = "The dog was old. Its owner, a baker from York, was not."


def row(question: str, context: str, text: str, start: int | None = None, **more: Any) -> dict[str, Any]:
    start = context.index(text) if start is None else start
    return {"question": question, "context": context, "answers": {"text": [text], "answer_start": [start]}, **more}


def rows(contexts: int, each: int = 3, name: str = "town") -> list[dict[str, Any]]:
    texts = [f"The {name} {i} has a red gate." for i in range(contexts)]
    return [row(f"what is there in {j}, {i}?", text, "red gate") for i, text in enumerate(texts) for j in range(each)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(own) + "\n" for own in content), encoding="utf-8")
    return path


# Comparing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Old Dog!", "old dog"),
        ("a man, an ox & the-end", "man ox theend"),  # punctuation goes before articles are looked for
        ("(1,000 km²)", "1000 km²"),
        ("theatre", "theatre"),
        ("An", ""),
    ],
)
def test_plain_texts_by_hand(text: str, expected: str):
    assert plain(text) == expected


def test_exact_match_and_f1_by_hand():
    assert exact_match("the Old dog.", "old dog") == 1.0 and exact_match("dog", "old dog") == 0.0
    assert word_f1("the Old dog.", "old dog") == 1.0 and word_f1("cat", "old dog") == 0.0
    # 1 word shared: precision 1/3, recall 1/2: 2 * 1 / (3 + 2)
    assert word_f1("very good dog", "old dog") == pytest.approx(2 / 5)
    # a word counts as often as it occurs in both: "no no" and "no" share one
    assert word_f1("no no", "no") == pytest.approx(2 / 3)
    assert word_f1("", "dog") == 0.0 and word_f1("the", "a") == 0.0 and exact_match("the", "a") == 1.0


def test_the_answer_that_suits_best_counts():
    answers = [(Answer(0, "old dog"), Answer(9, "dog")), (Answer(3, "York"),), ()]
    found = squad(["a dog", "from York", "something"], answers)
    assert list(found) == ["f1", "exact_match"]  # the first is the one to report
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["exact_match"] == pytest.approx(1 / 3)


# Reading


def test_answers_are_read_with_their_places():
    stored = {"text": ["baker", "York"], "answer_start": [CONTEXT.index("baker"), 0]}
    answers = read_answers(stored, "file, line 1")
    assert answers == (Answer(30, "baker"), Answer(0, "York"))
    assert standing(answers, CONTEXT) == answers[:1]
    assert standing((Answer(-4, "not."), Answer(3, " "), Answer(99, "x"), Answer(0, "")), CONTEXT) == ()
    assert read_answers({"text": [], "answer_start": []}, "file, line 1") == ()


@pytest.mark.parametrize(
    "stored",
    [None, "York", 3, ["York"], {}, {"text": ["York"]}, {"text": "York", "answer_start": 3},
     {"text": ["York"], "answer_start": []}, {"text": [3], "answer_start": [3]},
     {"text": ["York"], "answer_start": ["3"]}, {"text": ["York"], "answer_start": [True]},
     {"text": ["York"], "answer_start": [3.5]}],
)  # fmt: skip
def test_other_cells_are_refused_with_their_place(tmp_path: Path, stored: Any):
    content = [*rows(20), {"question": "who?", "context": CONTEXT, "answers": stored}]
    with pytest.raises(ValueError, match=r"own.jsonl, line 61: the answers must be an object such as .*, got "):
        load_task(write(tmp_path / "own.jsonl", content))


# Tasks


def test_a_file_in_squads_format_is_known_by_its_columns(tmp_path: Path):
    task = load_task(write(tmp_path / "own.jsonl", rows(40)))
    assert task.spans and task.grouped and not task.regression
    assert task.labels == ("start", "end") and task.metric == "squad" and task.columns == ("question", "context")
    assert sum(task.sizes.values()) + task.dropped.get("train", 0) == 120
    example = task.rows("test")[0]
    assert example.pair is not None and example.label is None
    assert example.answers == (Answer(example.pair.index("red"), "red gate"),)
    contexts = [{example.pair for example in task.rows(split)} for split in SPLITS]
    assert all(contexts) and not any(a & b for a, b in itertools.combinations(contexts, 2))
    named = [{"q": own["question"], "c": own["context"], "a": own["answers"]} for own in rows(40)]
    same = load_task(write(tmp_path / "named.jsonl", named), text="q", text_pair="c", label="a")
    assert same.spans and same.digest("test") == task.digest("test")
    assert draw(task, 9, 0) == draw(task, 9, 0) and len(set(draw(task, 9, 0))) == 9


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path):
    content = [
        *rows(40),
        row("who?", CONTEXT, "York", start=3),
        {"question": "why?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
        {"question": "where?", "context": CONTEXT, "answers": {"text": ["x", "York"], "answer_start": [0, 41]}},
    ]
    task = load_task(write(tmp_path / "own.jsonl", content))
    assert task.dropped[MISPLACED] == 1 and task.dropped[MISSING] == 1
    found = [example for split in SPLITS for example in task.rows(split) if example.pair == CONTEXT]
    assert found == [Example("where?", CONTEXT, answers=(Answer(41, "York"),))]
    with pytest.raises(ValueError, match=r"none: no row has an answer that occurs in its .*: {'no answer stands"):
        load_task(write(tmp_path / "none.jsonl", [row("who?", CONTEXT, "York", start=i) for i in range(20)]))


def test_built_in_tasks_find_their_folders(tmp_path: Path):
    write(tmp_path / "squad_v1_xquad_en" / "validation.jsonl", rows(60))
    write(tmp_path / "mlqa_en_dev" / "validation.jsonl", rows(60, name="village"))
    squad_task, mlqa = load_task("squad", data=tmp_path), load_task("mlqa_en_dev", data=tmp_path)
    assert squad_task.name == "squad" and squad_task.license == "CC BY-SA 4.0" and squad_task.sizes["train"] == 0
    # MLQA has nothing to train with but its validation rows
    assert mlqa.name == "mlqa_en_dev" and mlqa.spans and mlqa.sizes["train"] > 0
    assert load_task("mlqa", data=tmp_path).digest("train") == mlqa.digest("train")
    write(tmp_path / "mlqa" / "train.jsonl", rows(30, name="train"))
    write(tmp_path / "mlqa" / "validation.jsonl", rows(10, name="held"))
    assert {own.pair and own.pair[:8] for own in load_task("mlqa", data=tmp_path).rows("test")} == {"The held"}


def test_answers_on_the_hub_are_stored_alike(tmp_path: Path):
    content = rows(2)
    features = datasets.Features(
        question=datasets.Value("string"), context=datasets.Value("string"),
        answers=datasets.Sequence({"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}),
    )  # fmt: skip
    columns = {name: [own[name] for own in content] for name in features}
    stored = datasets.Dataset.from_dict(columns, features=features)
    found = from_hub(TASKS["squad"], {"train": stored})["train"]
    assert [cells for _, cells in found.rows] == content


def test_a_context_that_another_task_holds_out_is_not_trained_on(tmp_path: Path):
    first = load_task(write(tmp_path / "first.jsonl", rows(40)))
    held = first.rows("test")[0]
    write(tmp_path / "second.jsonl", [*rows(40, name="village"), row("another question?", held.pair or "", "red gate")])
    second = load_task(tmp_path / "second.jsonl")
    where = next(split for split in SPLITS if any(own.pair == held.pair for own in second.rows(split)))
    moved = {**second.splits, where: tuple(own for own in second.rows(where) if own.pair != held.pair)}
    moved["train"] = (*moved["train"], Example("another question?", held.pair, answers=held.answers))
    (_, cleaned), leaks = remove_leaks([first, type(second)(**{**vars(second), "splits": moved})])
    assert leaks["second", "first"] == 1 and not any(own.pair == held.pair for own in cleaned.rows("train"))


def test_the_digest_sees_the_answers():
    one = Example("who?", CONTEXT, answers=(Answer(30, "baker"),))
    other = Example("who?", CONTEXT, answers=(Answer(41, "York"),))
    assert digest([one]) != digest([other]) and row_key(one) == row_key(other)


def test_what_does_not_go_with_answers_is_refused(tmp_path: Path):
    file = write(tmp_path / "own.jsonl", rows(40))
    with pytest.raises(ValueError, match=r"own: answers need a question, its context and no label names"):
        load_task(file, labels=("a", "b"))
    with pytest.raises(ValueError, match=r"answers need a question, its context and no label names; .*'context'"):
        load_task(file, text="context")
    write(tmp_path / "squad" / "train.jsonl", [{"question": "q", "answers": {}}])
    with pytest.raises(ValueError, match=r"train.jsonl has no column 'context'; it has \['question', 'answers'\]"):
        load_task("squad", data=tmp_path)

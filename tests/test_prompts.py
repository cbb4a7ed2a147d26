"""Prompts: built-in ones fit their tasks, texts stay as they are, and a prompt's file is refused with file and line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from jaxprune.data.prompts import PROMPTS, Prompt, fit, prompt_for, read_prompt, with_shots
from jaxprune.data.splits import Example
from jaxprune.data.tasks import SPLITS, TASKS, Task, load_task

CLASSIFICATION = [name for name, source in TASKS.items() if not source.regression and not source.spans]
HOSTILE = [
    "{pair}",
    "{{text}}",
    "{0.__class__}",
    "a\nb\r\n\tc",
    "\x00\x1b[31m\x7f",
    "%s $text \\1 \\g<0>",
    "}{",
    "é😀 ",
]


def task(
    name: str = "own",
    labels: tuple[str, ...] = ("no", "yes"),
    columns: tuple[str, ...] = ("sentence",),
    regression: bool = False,
) -> Task:
    splits = {split: () for split in SPLITS}
    return Task(name=name, splits=splits, labels=labels, columns=columns, regression=regression)


def built_in(name: str, labels: tuple[str, ...] | None = None, hub: bool = False) -> Task:
    """A built-in task without its rows."""
    source = TASKS[name]
    columns = source.hub_columns if hub else source.columns
    return task(name, source.labels if labels is None else labels, columns, source.regression)


def prompt(template: str = "{text}", words: tuple[str, ...] = ("no", "yes"), labels: tuple[str, ...] = ()) -> Prompt:
    return Prompt(template=template, words=words, labels=labels)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompt.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Rendering


@pytest.mark.parametrize("hostile", HOSTILE)
def test_texts_are_put_in_as_they_are(hostile: str):
    assert prompt("a {text} b").render(Example(hostile)) == f"a {hostile} b"
    pair = prompt("{pair}|{text}|{pair}")
    assert pair.render(Example(hostile, "second")) == f"second|{hostile}|second"
    assert pair.render(Example("first", hostile)) == f"{hostile}|first|{hostile}"


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{{text}} {text}", "{text} T"),
        ("{{{text}}}", "{T}"),
        ("{text}}}", "T}"),
        ("{{{{ {text}", "{{ T"),
        ("{text}{text}", "TT"),
        ("a\n{text}\n", "a\nT\n"),
    ],
)
def test_double_braces_stand_for_braces_also_once_bound(template: str, rendered: str):
    assert prompt(template).render(Example("T")) == rendered
    bound = prompt(template.replace("{text}", "{body}") if "{{text}}" not in template else template)
    assert bound.bound(("body",), ("no", "yes")).render(Example("T")) == rendered


@pytest.mark.parametrize(
    ("template", "brace", "character"),
    [("{text", "{", 1), ("a {text} }", "}", 10), ("{}", "{", 1), ("{{text}", "}", 7), ("{a{text}}", "{", 1)],
)
def test_unbalanced_braces_are_refused_by_their_place(template: str, brace: str, character: int):
    message = f"the template has a lone '{brace}' at character {character}; write {{text}} for a field, {brace * 2}"
    with pytest.raises(ValueError, match=re.escape(message)):
        prompt(template)


def test_an_example_with_other_texts_is_refused():
    with pytest.raises(ValueError, match="the prompt's fields are pair, text, the example's are text; fit the prompt"):
        prompt("{text} {pair}").render(Example("a"))
    with pytest.raises(ValueError, match="the prompt's fields are text, the example's are text, pair"):
        prompt("{text}").render(Example("a", "b"))
    with pytest.raises(ValueError, match="the prompt's fields are question, the example's are text"):
        prompt("{question}").render(Example("a"))


# Fitting


@pytest.mark.parametrize(
    "template", ["q {text} p {pair}", "q {title} p {body}", "q {text} p {body}", "q {title} p {pair}"]
)
def test_columns_and_places_name_the_same_texts(template: str):
    fitted = fit(prompt(template), task(columns=("title", "body")))
    assert fitted == prompt("q {text} p {pair}", labels=("no", "yes"))
    assert fitted.render(Example("one", "two")) == "q one p two"
    assert fit(fitted, task(columns=("title", "body"))) == fitted


def test_text_and_pair_are_places_even_where_a_column_has_such_a_name():
    assert prompt("{title} {pair}").bound(("title", "text"), ("no", "yes")).template == "{text} {pair}"
    assert prompt("{pair}").bound(("pair",), ("no", "yes")).template == "{text}"
    with pytest.raises(ValueError, match=r"never uses the text of the column 'text'; put \{pair\} into its template"):
        prompt("{title} {text}").bound(("title", "text"), ("no", "yes"))


@pytest.mark.parametrize(
    ("given", "columns", "message"),
    [
        (
            prompt("{sentence1} {x}"),
            ("sentence1", "sentence2"),
            "the prompt names the column 'x'; the task has sentence1, sentence2, text, pair: write one of these.",
        ),
        (prompt("{text!r}"), ("sentence",), "names the column 'text!r'; the task has sentence, text: write"),
        (prompt("{text.x}"), ("sentence",), "names the column 'text.x'"),
        (prompt("{label} {text}"), ("sentence",), "names the column 'label'"),  # the answer is no part of the question
        (prompt("{text} {pair}"), ("sentence",), "names the column 'pair'"),
        (prompt("{text}"), ("a", "b"), "never uses the text of the column 'b'; put {pair} into its template."),
        (prompt("{b}"), ("a", "b"), "never uses the text of the column 'a'; put {text} into its template."),
        (prompt("no field"), ("a",), "never uses the text of the column 'a'"),
        (prompt(words=("x",)), ("a",), "the prompt has 1 words for 2 labels (no, yes); give one word per label."),
        (prompt(words=("x", "y", "z")), ("a",), "the prompt has 3 words for 2 labels"),
        (prompt(labels=("a\nb", "yes")), ("a",), "has words for the labels 'a\\nb', yes, but"),
        (
            prompt(labels=("bad", "yes")),
            ("a",),
            "has words for the labels bad, yes, but the task's labels are no, yes; give a word for each of these.",
        ),
    ],
)
def test_a_prompt_that_does_not_fit_says_why(given: Prompt, columns: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=f"^task 'own': .*{re.escape(message)}") as caught:
        fit(given, task(columns=columns))
    assert "\n" not in str(caught.value)


def test_a_regression_is_refused():
    regression = built_in("stsb")
    for refused in (lambda: fit(prompt("{text} {pair}", ()), regression), lambda: prompt_for(regression)):
        with pytest.raises(ValueError, match="task 'stsb' is a regression; a prompt needs a task with labels"):
            refused()


def test_without_words_the_answer_is_free():
    fitted = fit(prompt("{sentence}", ()), task())
    assert fitted == prompt("{text}", ())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("no", "yes"), ("n", "y")),
        (("yes", "no"), ("y", "n")),
        (("Yes", "NO"), ("y", "n")),
    ],
)
def test_words_follow_named_labels(labels: tuple[str, ...], words: tuple[str, ...]):
    fitted = fit(prompt(words=("n", "y"), labels=("no", "yes")), task(labels=labels))
    assert fitted.words == words and fitted.labels == labels


def test_labels_that_differ_in_case_alone_are_told_apart():
    given = prompt(words=("small", "large"), labels=("a", "A"))
    assert fit(given, task(labels=("A", "a"))).words == ("large", "small")
    with pytest.raises(ValueError, match="has words for the labels a, A"):
        fit(given, task(labels=("a", "b")))
    with pytest.raises(ValueError, match="but the task's labels are a, A"):
        fit(prompt(labels=("a", "b")), task(labels=("a", "A")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", ""), "a word must not be empty"),
        (("a", " \n"), "a word must not be empty"),
        (("a", "a"), "the word 'a' stands for two labels; words must differ"),
        (("a b", " a  b"), "the word ' a  b' stands for two labels"),  # a tokenizer does not see the difference
    ],
)
def test_words_differ_and_are_not_empty(words: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        prompt(words=words)


def test_words_and_labels_are_tuples_of_as_many_texts():
    for wrong in ("yes", ["no", "yes"], (1, 2)):
        with pytest.raises(TypeError, match="words must be a tuple of texts, got"):
            prompt(words=wrong)  # pyright: ignore[reportArgumentType]
    for labels in (("a",), ("a", "a"), ("a", "b", "c")):
        with pytest.raises(ValueError, match="labels must be as many as the words and differ, got 2 words for a"):
            prompt(labels=labels)


def test_prompts_are_settings():
    one, other = prompt(), prompt()
    assert one == other and hash(one) == hash(other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.template = ""  # pyright: ignore[reportAttributeAccessIssue]


def test_the_header_does_not_tell_how_columns_or_labels_were_written():
    own = task(columns=("title", "body"), labels=("no", "yes"))
    one = fit(prompt("{title}: {body}", ("n", "y")), own)
    other = fit(prompt("{text}: {pair}", ("y", "n"), ("Yes", "No")), own)
    assert one.to_json() == other.to_json()
    stored = {"name": "", "template": "{text}: {pair}", "words": ["n", "y"], "labels": ["no", "yes"]}
    assert json.loads(json.dumps(one.to_json())) == stored


# Built-in prompts


def test_every_classification_task_has_its_prompts():
    assert list(PROMPTS) == CLASSIFICATION
    assert {tuple(styles)[:2] for styles in PROMPTS.values()} == {("t5", "flan")}


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("style", ["t5", "flan"])
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_built_in_prompts_fit_their_tasks(name: str, style: str, hub: bool):
    own = built_in(name, hub=hub)
    fitted = prompt_for(own, style)
    assert fitted == PROMPTS[name][style] == fit(fitted, own)
    assert fitted.name == style and fitted.labels == own.labels and len(fitted.words) == len(own.labels)
    example = Example("<one>", "<two>") if len(own.columns) == 2 else Example("<one>")
    rendered = fitted.render(example)
    assert rendered.count("<one>") == 1 and rendered.count("<two>") == len(own.columns) - 1
    assert "\n" not in rendered and "  " not in rendered  # a tokenizer would not see it


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_words_that_were_chosen_for_reading_can_be_read(name: str):
    words = {word for style, found in PROMPTS[name].items() for word in found.words if style == "flan"}
    if name not in ("mrpc", "qqp", "qnli", "rte", "wnli", "cola", "mnli", "boolq"):  # these have T5's own words
        words |= set(PROMPTS[name]["t5"].words)
    assert {word for word in words if not re.fullmatch(r"[a-z]+( [a-z]+)*", word)} == set()


@pytest.mark.parametrize("name", [name for name in CLASSIFICATION if name != "banking77"])  # it has too many
def test_an_instruction_lists_the_answers_before_the_text(name: str):
    flan = PROMPTS[name]["flan"]
    instruction = flan.template.split("{")[0]
    assert [word for word in flan.words if not re.search(rf"\b{word}\b", instruction)] == []


# What T5 was trained with: written out by hand, to be read side by side with the paper.
@pytest.mark.parametrize(
    ("name", "rendered", "words"),
    [
        ("sst2", "sst2 sentence: A", {"negative": "negative", "positive": "positive"}),
        ("cola", "cola sentence: A", {"unacceptable": "unacceptable", "acceptable": "acceptable"}),
        ("mrpc", "mrpc sentence1: A sentence2: B", {"not_equivalent": "not_equivalent", "equivalent": "equivalent"}),
        ("qqp", "qqp question1: A question2: B", {"not_duplicate": "not_duplicate", "duplicate": "duplicate"}),
        (
            "mnli",
            "mnli hypothesis: B premise: A",
            {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"},
        ),
        ("qnli", "qnli question: A sentence: B", {"entailment": "entailment", "not_entailment": "not_entailment"}),
        ("rte", "rte sentence1: A sentence2: B", {"entailment": "entailment", "not_entailment": "not_entailment"}),
        ("boolq", "boolq passage: B question: A", {"False": "False", "True": "True"}),
    ],
)
def test_the_prompts_of_t5(name: str, rendered: str, words: dict[str, str]):
    fitted = prompt_for(built_in(name))
    assert fitted.render(Example("A", "B" if "B" in rendered else None)) == rendered
    assert dict(zip(fitted.labels, fitted.words, strict=True)) == words


@pytest.mark.parametrize(
    ("name", "style", "words"),
    [
        ("cola", "flan", {"unacceptable": "no", "acceptable": "yes"}),
        ("mrpc", "flan", {"not_equivalent": "no", "equivalent": "yes"}),
        ("qqp", "flan", {"not_duplicate": "no", "duplicate": "yes"}),
        ("mnli", "flan", {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}),
        ("qnli", "flan", {"entailment": "yes", "not_entailment": "no"}),
        ("rte", "flan", {"entailment": "yes", "not_entailment": "no"}),
        ("wnli", "flan", {"not_entailment": "no", "entailment": "yes"}),
        ("boolq", "flan", {"False": "no", "True": "yes"}),
        ("subj", "flan", {"subjective": "opinion", "objective": "fact"}),
        ("imdb", "flan", {"negative": "no", "positive": "yes"}),
        ("yelp_polarity", "flan", {"negative": "no", "positive": "yes"}),
        ("mr", "flan", {"negative": "negative", "positive": "positive"}),
        ("ag_news", "t5", {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"}),
        (
            "trec",
            "t5",
            {
                "ABBR": "abbreviation",
                "ENTY": "entity",
                "DESC": "description",
                "HUM": "human",
                "LOC": "location",
                "NUM": "number",
            },
        ),
        (
            "dbpedia_14",
            "t5",
            {
                "Company": "company",
                "EducationalInstitution": "educational institution",
                "OfficeHolder": "office holder",
                "MeanOfTransportation": "means of transportation",
                "NaturalPlace": "natural place",
                "WrittenWork": "written work",
            },
        ),
        ("snips", "t5", {"AddToPlaylist": "add to playlist", "SearchScreeningEvent": "search screening event"}),
        (
            "banking77",
            "t5",
            {
                "activate_my_card": "activate my card",
                "Refund_not_showing_up": "refund not showing up",
                "reverted_card_payment?": "reverted card payment",
                "visa_or_mastercard": "visa or mastercard",
            },
        ),
    ],
)
def test_words_stand_for_the_right_labels(name: str, style: str, words: dict[str, str]):
    fitted = prompt_for(built_in(name), style)
    assert dict(zip(fitted.labels, fitted.words, strict=True)).items() >= words.items()


@pytest.mark.parametrize("style", ["t5", "flan"])
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_words_follow_reordered_labels(name: str, style: str):
    labels = tuple(label.upper() for label in TASKS[name].labels[1:] + TASKS[name].labels[:1])
    fitted, usual = prompt_for(built_in(name, labels), style), PROMPTS[name][style].words
    assert fitted.words == usual[1:] + usual[:1] and fitted.labels == labels


def test_words_follow_the_labels_of_a_loaded_task(tmp_path: Path):
    rows = [{"sentence": f"row {i} {('bad', 'good')[i % 2]}", "label": i % 2} for i in range(40)]
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for labels in (None, ("positive", "negative")):
        loaded = load_task("sst2", data=tmp_path, labels=labels)
        words = prompt_for(loaded).words
        for example in loaded.rows("train"):
            assert words[int(example.label or 0)] == {"bad": "negative", "good": "positive"}[example.text.split()[-1]]


def test_words_for_renamed_labels_are_not_guessed():
    renamed = built_in("mnli", ("LABEL_0", "LABEL_1", "LABEL_2"))
    with pytest.raises(
        ValueError, match=r"entailment, neutral, contradiction, but .* LABEL_0, .* YAML file of your own"
    ):
        prompt_for(renamed)
    with pytest.raises(ValueError, match=r"has 3 words for 2 labels"):
        prompt_for(built_in("mnli", ("entailment", "neutral")))


def test_texts_in_the_other_order_are_refused():
    swapped = task("mnli", TASKS["mnli"].labels, ("hypothesis", "premise"))
    message = (
        "'mnli': its texts are in the order hypothesis, premise, but the built-in prompt takes premise, hypothesis"
    )
    with pytest.raises(ValueError, match=message):
        prompt_for(swapped)
    single = task("mnli", TASKS["mnli"].labels, ("premise",))
    with pytest.raises(ValueError, match="names the column 'pair'; the task has premise, text"):
        prompt_for(single)


def test_an_unknown_task_or_style_is_refused():
    with pytest.raises(
        ValueError, match=r"no built-in prompt for the task 'own'; give one in a YAML file .*sst2, cola,"
    ):
        prompt_for(task())
    with pytest.raises(ValueError, match="no prompt style 'T5'; expected one of t5, flan"):
        prompt_for(built_in("sst2"), "T5")


# Files


def test_a_prompt_from_a_file(tmp_path: Path):
    content = '# mine\ntemplate: "review: {text}"\nwords:\n- bad # label 0\n- very good\nname: mine\n'
    given = Prompt(template="review: {text}", words=("bad", "very good"), name="mine")
    assert read_prompt(write(tmp_path, content)) == given
    assert read_prompt(str(write(tmp_path, b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode()))) == given
    json_content = '{"template": "review: {text}", "words": ["bad", "very good"], "name": "mine"}'
    assert read_prompt(write(tmp_path, json_content)) == given  # JSON is YAML


def test_words_by_label_are_resolved_when_fitted(tmp_path: Path):
    content = 'template: "{question} {text}"\nwords: {"yes": right, "no": wrong}\n'
    given = read_prompt(write(tmp_path, content.replace("{question} ", "")))
    assert given.words == ("right", "wrong") and given.labels == ("yes", "no")
    assert fit(given, task()).words == ("wrong", "right")
    with pytest.raises(ValueError, match="has words for the labels yes, no, but the task's labels are good, bad"):
        fit(given, task(labels=("good", "bad")))


@pytest.mark.parametrize(
    ("content", "template"),
    [
        ("template: 'a: {text} # b'\nwords: []", "a: {text} # b"),
        ("template: a {text}#b\nwords: []", "a {text}#b"),
        ("template: |\n  a: {text}\n  b\nwords: []", "a: {text}\nb\n"),
        ("template: >-\n  a: {text}\n  b\nwords: []", "a: {text} b"),
        ('template: "\\a {text} \\u00e9"\nwords: []', "\x07 {text} é"),
        ("---\ntemplate: a {text}\nwords: []\n...\n", "a {text}"),
    ],
)
def test_every_way_to_write_a_text(tmp_path: Path, content: str, template: str):
    assert read_prompt(write(tmp_path, content)) == Prompt(template=template, words=())


GOOD = "template: a {text}\n"
WORDS = "words: [a, b]\n"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        # keys
        ("", 1, "the file is empty; expected template: and words:."),
        ("# a comment\n\n", 1, "the file is empty"),
        ("---\n", 1, "the file is empty"),
        ("~\n", 1, "expected a mapping"),
        ("\n- a\n- b\n", 2, "expected a mapping with template: and words:"),
        ("sst2 sentence\n", 1, "expected a mapping"),
        ("\n" + WORDS, 2, "the key 'template' is missing"),
        (GOOD, 1, "the key 'words' is missing"),
        (
            GOOD + "wrods: [a, b]\n",
            2,
            "unknown key 'wrods'; did you mean 'words'? the keys are template, words, name, cal",
        ),
        (GOOD + WORDS + "Name: x\n", 3, "unknown key 'Name'; did you mean 'name'?"),
        (
            GOOD + WORDS + "verbalizer: x\n",
            3,
            "unknown key 'verbalizer'; the keys are template, words, name, cal",
        ),
        (GOOD + WORDS + "\ntemplate: b {text}\n", 4, "the key 'template' occurs twice, first in line 1; remove one."),
        (GOOD + WORDS + "1: x\n", 3, "a key: YAML reads '1' as int; put it in quotes."),
        (GOOD + WORDS + "? [a]\n: x\n", 3, "a key must be text, got a list"),
        # kinds
        ("template: {text}\n" + WORDS, 1, "template must be text, got a mapping; put it in quotes."),
        ("template: [text]\n" + WORDS, 1, "template must be text, got a list"),
        ("template: 5\n" + WORDS, 1, "template: YAML reads '5' as int; put it in quotes."),
        ("template:\n" + WORDS, 1, "template has no value; expected text."),
        (GOOD + "words: a\n", 2, "words must be a list, or a mapping of labels to words; [] for free text."),
        (GOOD + "words:\n", 2, "words must be a list, or a mapping"),
        (GOOD + WORDS + "name: 2024-01-01\n", 3, "name: YAML reads '2024-01-01' as timestamp; put it in quotes."),
        (GOOD + "words:\n- a\n- [b]\n", 4, "nested too deeply: a word is one text; put texts in quotes."),
        (GOOD + "words:\n- a\n- b: c\n", 4, "nested too deeply: a word is one text; put texts in quotes."),
        (GOOD + "words:\n- a\n-\n", 4, "a word has no value; expected text."),
        # YAML's traps
        (GOOD + "words:\n- no\n- yes\n", 3, "a word: YAML reads 'no' as bool; put it in quotes."),
        (GOOD + "words:\n- 'no'\n- On\n", 4, "a word: YAML reads 'On' as bool"),
        (GOOD + "words: [False, True]\n", 2, "a word: YAML reads 'False' as bool"),
        (GOOD + "words:\n- a\n- 0x1F\n", 4, "a word: YAML reads '0x1F' as int"),
        (GOOD + "words:\n- a\n- 1.5\n", 4, "a word: YAML reads '1.5' as float"),
        (GOOD + "words:\n- a\n- ~\n", 4, "a word: YAML reads '~' as null"),
        (GOOD + "words:\n- a\n- null\n", 4, "a word: YAML reads 'null' as null"),
        (GOOD + "words:\n- 12:30\n", 3, "a word: YAML reads '12:30' as int"),
        (GOOD + "words:\n  no: a\n  yes: b\n", 3, "a label: YAML reads 'no' as bool"),
        (GOOD + "words:\n  0: a\n  1: b\n", 3, "a label: YAML reads '0' as int"),
        (GOOD + "words:\n  a: x\n  <<: {b: y}\n", 4, "nested too deeply"),
        (GOOD + "words:\n  a: x\n  <<: y\n", 4, "a label: YAML reads '<<' as merge"),
        ("template: a {text} # b\n" + WORDS, 1, "template: YAML takes what follows ' #' for a comment; put"),
        ("template: a\n  {text}   # b\n" + WORDS, 2, "template: YAML takes what follows ' #' for a comment"),
        # words
        (GOOD + "words:\n- a\n- ''\n", 4, "a word must not be empty; give what the model answers for the label."),
        (GOOD + "words:\n- a\n- b\n- a\n", 5, "the word 'a' stands for two labels; words must differ."),
        (GOOD + "words:\n  x: a\n  y: a\n", 4, "the word 'a' stands for two labels"),
        (GOOD + "words:\n  x: a\n  x: b\n", 4, "the label 'x' occurs twice, first in line 3; remove one."),
        # templates
        ("\ntemplate: a {text\n" + WORDS, 2, "the template has a lone '{' at character 3; write {text} for a field"),
        ("template: a {text}}\n" + WORDS, 1, "the template has a lone '}' at character 9"),
        (WORDS + "template: '{}'\n", 2, "the template has a lone '{' at character 1"),
        # not YAML
        (
            "template: sst2 sentence: {text}\n" + WORDS,
            1,
            "not YAML (mapping values are not allowed here); put texts in",
        ),
        ("template: {text} good?\n" + WORDS, 1, "not YAML (expected <block end>, but found '<scalar>'); put texts in"),
        (GOOD + "words: [a, b\n", 3, "not YAML (expected ',' or ']', but got '<stream end>')"),
        (GOOD + 'words: ["a, b]\n', 3, "not YAML (found unexpected end of stream)"),
        (GOOD + "words:\n\t- a\n", 3, "not YAML (found character '\\t' that cannot start any token)"),
        (GOOD + "words:\n- @a\n", 3, "not YAML (found character '@' that cannot start any token)"),
        (GOOD + WORDS + "name: a\x07\n", 3, "not YAML: it has the character '\\x07'; remove it."),
        (GOOD + 'words: [a, "\\q"]\n', 2, "not YAML (found unknown escape character 'q')"),
        ('template: "\\ud800 {text}"\n' + WORDS, 1, "template: half of a character (such as \\ud800) is no text"),
        (GOOD + 'words:\n- a\n- "\\U00110000"\n', 4, "not YAML (chr() arg not in range(0x110000))"),
        (GOOD + 'words:\n- a\n- "\\UFFFFFFFF"\n', 4, "not YAML ("),
        ("%YAML 1." + "1" * 5_000 + "\n---\n" + GOOD, 1, "not YAML (Exceeds the limit"),
        ("%YAML 2.0\n---\n" + GOOD, 1, "not YAML (found incompatible YAML document"),
        (GOOD + "words: !" + "x" * 5_000 + "!y a\n", 2, "not YAML (found undefined tag handle"),
        # more than data
        (GOOD + "words: &w [a, b]\n", 2, "anchors (&) and aliases (*) are refused; put texts in quotes."),
        (GOOD + "words:\n- &w a\n- b\n", 3, "anchors (&) and aliases (*) are refused"),
        (GOOD + "words:\n- a\n- *w\n", 4, "anchors (&) and aliases (*) are refused"),
        ("template: !!str a {text}\n" + WORDS, 1, "tags (!) are refused"),
        (GOOD + "words:\n- a\n- ! b\n", 4, "tags (!) are refused"),
        (GOOD + "words: !!python/object/apply:os.system [ls]\n", 2, "tags (!) are refused"),
        ("!!python/name:os.system\n", 1, "tags (!) are refused"),
        (GOOD + "words:\n- [[a]]\n", 3, "nested too deeply: a word is one text; put texts in quotes."),
        (GOOD + "words: " + "[" * 60_000, 2, "nested too deeply"),
        (GOOD + "words: " + "{a: " * 15_000, 2, "nested too deeply"),
        ("- " * 30_000, 1, "nested too deeply"),
        (GOOD + WORDS + "---\n" + GOOD, 3, "a second document begins; a file holds one prompt."),
        # not text
        (b"template: a {text}\nwords: [caf\xe9, b]\n", 2, "not UTF-8 (invalid continuation byte): convert it first."),
        ("template: a {text}\n".encode("utf-16"), 1, "not UTF-8"),
        (GOOD + WORDS + "#" * 70_000, 1, "a prompt's file has at most 65,536 bytes"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_line(tmp_path: Path, content: str | bytes, line: int, message: str):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:{line}: {message}')}") as caught:
        read_prompt(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200


def test_a_file_of_the_largest_size_is_read(tmp_path: Path):
    words = [f"w{i:06}" for i in range(6_000)]
    content = 'template: "{text}"\nwords:\n' + "".join(f"- {word}\n" for word in words)
    content += "#" * (65_536 - len(content))
    assert read_prompt(write(tmp_path, content)).words == tuple(words)


def test_a_file_that_is_not_there(tmp_path: Path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"there is no prompt file {path}.")):
            read_prompt(path)


# Demonstrations


def test_demonstrations_are_balanced_training_rows(tmp_path: Path):
    rows = "".join(json.dumps({"text": f"text {{{i}}} of it", "label": "ab"[i % 3 == 0]}) + "\n" for i in range(90))
    (tmp_path / "odd.jsonl").write_text(rows)
    task = load_task(tmp_path / "odd.jsonl")
    asked = Prompt(template="Say: {text}\nSo:", words=(" no", " yes"))
    shown = with_shots(asked, task, 5, seed=1)
    *demonstrations, own = shown.render(Example("{x}")).split("\n\n")
    assert own == "Say: {x}\nSo:" and shown.name == "own, 5 shots, seed 1"
    counts = Counter(text.rpartition(":")[2] for text in demonstrations)
    assert sorted(counts) == [" no", " yes"] and sorted(counts.values()) == [2, 3]
    label = {asked.render(row): asked.words[int(row.label or 0)] for row in task.rows("train")}
    assert all(
        label[text.removesuffix(word)] == word for text in demonstrations for word in asked.words if text.endswith(word)
    )
    assert with_shots(asked, task, 5, seed=1) == shown != with_shots(asked, task, 5, seed=2)
    assert fit(shown, task).render(Example("{x}")) == shown.render(Example("{x}"))
    for shots, expected in ((0, "cannot have 0 demonstrations"), (80, "more training rows of")):
        with pytest.raises(ValueError, match=expected):
            with_shots(asked, task, shots)
    with pytest.raises(ValueError, match="cannot have 2"):
        with_shots(Prompt(template="{text}", words=()), task, 2)

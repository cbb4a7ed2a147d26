"""Prompts, those of built-in tasks included: the text that a text-to-text model reads, and the words it answers with.

A *template* is the model's input with fields in braces: `{text}` and `{pair}` stand for an example's first and second
text, and so do the names of their columns, such as `{sentence1}`. *Words* are the answers, one per label. A prompt is
*fitted* to a task before it is used: then its fields and its words are known to be those the task needs.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from jaxprune.data.splits import Example
from jaxprune.data.tasks import TASKS, Task
from jaxprune.models import Model

STYLES = ("t5", "flan", "plain")  # of the built-in prompts
CALIBRATIONS = ("none", "content-free", "batch")  # of the labels' words
FIELDS = ("text", "pair")  # what the fields of a fitted prompt are called
KEYS = ("template", "words", "name", "calibration")  # of a prompt's file
MOST_BYTES = 65_536  # of a prompt's file
TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The input of a text-to-text model, and its answer for each label."""

    template: str  # "sst2 sentence: {text}"; {{ and }} stand for braces
    words: tuple[str, ...]  # one per label; () if the answer is free text
    labels: tuple[str, ...] = ()  # what the words stand for; () is the task's labels in their order
    name: str = ""
    calibration: str = "none"  # what is taken off a label's log-probability, see `evaluate.calibrate`

    def __post_init__(self):
        if self.calibration not in CALIBRATIONS:
            raise ValueError(f"calibration must be one of {', '.join(CALIBRATIONS)}, got {self.calibration!r}.")
        for what, given in (("words", self.words), ("labels", self.labels)):
            if not isinstance(given, tuple) or not all(isinstance(text, str) for text in given):
                raise TypeError(f"{what} must be a tuple of texts, got {given!r}.")
        _parts(self.template)
        known: set[str] = set()
        for word in self.words:
            _add_word(word, known)
        if self.labels and (len(self.labels) != len(self.words) or len(set(self.labels)) != len(self.labels)):
            raise ValueError(
                f"labels must be as many as the words and differ, got {len(self.words)} words for {_some(self.labels)}."
            )

    def render(self, example: Example) -> str:
        """The template with the example's texts put in as they are: what they contain is never interpreted.

        Raises:
            ValueError: If the template names other fields than the example's texts, or leaves one of them out.
        """
        texts = {"text": example.text} if example.pair is None else {"text": example.text, "pair": example.pair}
        parts = _parts(self.template)
        fields = {part for is_field, part in parts if is_field}
        if fields != set(texts):
            raise ValueError(
                f"the prompt's fields are {_some(sorted(fields))}, the example's are {_some(texts)}; "
                "fit the prompt to the task first."
            )
        return "".join(texts[part] if is_field else part for is_field, part in parts)

    def bound(self, columns: Sequence[str], labels: Sequence[str]) -> Prompt:
        """The same prompt with `{text}` and `{pair}` for its fields and with its words in the order of the labels.

        `{text}` and `{pair}` always are the first and the second text, even where a column has such a name.

        Args:
            columns: Columns of an example's one or two texts.
            labels: Label names. Words for named labels are found by the name, whatever its case.

        Raises:
            ValueError: If the template names something else, leaves a text out, or the words are not one per label.
        """
        fixed = FIELDS[: len(columns)]
        meaning = dict(zip(columns, fixed, strict=True)) | dict(zip(fixed, fixed, strict=True))
        parts = _parts(self.template)
        fields = [part for is_field, part in parts if is_field]
        for field in fields:
            if field not in meaning:
                raise ValueError(
                    f"the prompt names the column {field!r}; the task has {_some(meaning)}: write one of these."
                )
        for field, column in zip(fixed, columns, strict=True):
            if field not in map(meaning.get, fields):
                raise ValueError(
                    f"the prompt never uses the text of the column {column!r}; put {{{field}}} into its template."
                )
        template = "".join(
            f"{{{meaning[part]}}}" if is_field else part.replace("{", "{{").replace("}", "}}")
            for is_field, part in parts
        )
        if not self.words:
            return replace(self, template=template)
        if len(self.words) != len(labels):
            raise ValueError(
                f"the prompt has {len(self.words)} words for {len(labels)} labels ({_some(labels)}); "
                "give one word per label."
            )
        words = self.words if not self.labels else self._words_for(labels)
        return replace(self, template=template, words=words, labels=tuple(labels))

    def _words_for(self, labels: Sequence[str]) -> tuple[str, ...]:
        for same in (str, str.casefold):
            words = dict(zip(map(same, self.labels), self.words, strict=True))
            if len(words) == len(labels) and set(words) == set(map(same, labels)):
                return tuple(words[same(label)] for label in labels)
        raise ValueError(
            f"the prompt has words for the labels {_some(self.labels)}, but the task's labels are {_some(labels)}; "
            "give a word for each of these."
        )

    def to_json(self) -> dict[str, Any]:
        """The prompt as plain values, for the header of a file."""
        record = {"name": self.name, "template": self.template, "words": list(self.words), "labels": list(self.labels)}
        return record if self.calibration == "none" else record | {"calibration": self.calibration}


def _some(names: Sequence[str] | Mapping[str, str]) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "") if shown else "none"


def _parts(template: str) -> list[tuple[bool, str]]:
    """A template cut into literal texts (False) and names of fields (True)."""
    parts, end = [], 0
    for match in TOKEN.finditer(template):
        token = match.group()
        if token in ("{", "}"):
            raise ValueError(
                f"the template has a lone {token!r} at character {match.start() + 1}; "
                f"write {{text}} for a field, {token * 2} for a brace."
            )
        parts.append((False, template[end : match.start()]))
        parts.append((False, token[0]) if match[1] is None else (True, match[1]))
        end = match.end()
    return [*parts, (False, template[end:])]


def _add_word(word: str, known: set[str]) -> None:
    """Refuses a word that a tokenizer, which does not see how much white space there is, takes for another one."""
    plain = " ".join(word.split())
    if not plain:
        raise ValueError("a word must not be empty; give what the model answers for the label.")
    if plain in known:
        raise ValueError(f"the word {word[:40]!r} stands for two labels; words must differ.")
    known.add(plain)


# fmt: off
def _styles(task: str, t5: str, flan: str, words: str = "", flan_words: str = "") -> dict[str, Prompt]:
    """A task's prompts. By default its labels are the words, and FLAN's words are T5's."""
    labels = TASKS[task].labels
    spelled = tuple(re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", label).strip("?").lower() for label in labels)
    chosen = spelled if words == "spelled" else tuple(words.split("|")) if words else labels
    instructed = tuple(flan_words.split("|")) if flan_words else chosen
    return {
        "t5": Prompt(template=t5, words=chosen, labels=labels, name="t5"),
        "flan": Prompt(template=flan, words=instructed, labels=labels, name="flan"),
    }


# Task -> style -> prompt. `t5`: for GLUE and BoolQ what T5 was trained with (Raffel et al. 2020, appendix D), else the
# same manner. `flan`: an instruction; it comes first, because a text that is too long is cut at its end.
PROMPTS: Mapping[str, dict[str, Prompt]] = {task: _styles(task, *facts) for task, facts in {
    "sst2": ("sst2 sentence: {text}", "Say whether the writer of this sentence sounds positive or negative: {text}"),
    "cola": ("cola sentence: {text}",
             "Would a native speaker of English accept this sentence, yes or no? {text}", "", "no|yes"),
    "mrpc": ("mrpc sentence1: {text} sentence2: {pair}",
             "Do both sentences report the same, yes or no? First: {text} Second: {pair}", "", "no|yes"),
    "qqp": ("qqp question1: {text} question2: {pair}",
            "Would one answer settle both questions, yes or no? First: {text} Second: {pair}", "", "no|yes"),
    "mnli": ("mnli hypothesis: {pair} premise: {text}",  # the first text is the premise
             "Must the hypothesis be true where the premise is: yes, maybe or no? Hypothesis: {pair} Premise: {text}",
             "", "yes|maybe|no"),
    "qnli": ("qnli question: {text} sentence: {pair}",
             "Is the answer to the question found in the sentence, yes or no? Question: {text} Sentence: {pair}",
             "", "yes|no"),
    "rte": ("rte sentence1: {text} sentence2: {pair}",
            "Does the text make the claim certain, yes or no? Claim: {pair} Text: {text}", "", "yes|no"),
    "wnli": ("wnli sentence1: {text} sentence2: {pair}",
             "After reading the text, is the claim right, yes or no? Claim: {pair} Text: {text}", "", "no|yes"),
    "boolq": ("boolq passage: {pair} question: {text}",
              "Reply yes or no, relying on the passage. Question: {text} Passage: {pair}", "", "no|yes"),
    "ag_news": ("ag_news text: {text}",
                "Which part of a newspaper prints this: world, sports, business or technology? {text}",
                "world|sports|business|technology"),
    "subj": ("subj sentence: {text}", "Does this sentence state an opinion or a fact? {text}", "", "opinion|fact"),
    "mr": ("mr sentence: {text}", "What does the critic make of the film, positive or negative? {text}"),
    "imdb": ("imdb text: {text}", "Did this viewer like the film, yes or no? {text}", "", "no|yes"),
    "yelp_polarity": ("yelp_polarity text: {text}",
                      "Would this customer come again, yes or no? {text}", "", "no|yes"),
    "trec": ("trec question: {text}", "What does this question ask for: an abbreviation, an entity, a description, "
             "a human, a location or a number? {text}", "abbreviation|entity|description|human|location|number"),
    "emotion": ("emotion text: {text}",
                "Which feeling speaks from this text: sadness, joy, love, anger, fear or surprise? {text}"),
    "banking77": ("banking77 text: {text}",
                  "Name in a few words what this customer of a bank needs help with: {text}", "spelled"),
    "dbpedia_14": ("dbpedia_14 text: {text}",
                   "Is this about a company, an educational institution, an artist, an athlete, an office holder, "
                   "a means of transportation, a building, a natural place, a village, an animal, a plant, an album, "
                   "a film or a written work? {text}",
                   "company|educational institution|artist|athlete|office holder|means of transportation|building|"
                   "natural place|village|animal|plant|album|film|written work"),
    "snips": ("snips text: {text}",
              "Is this request to add to playlist, book restaurant, get weather, play music, rate book, "
              "search creative work or search screening event? {text}", "spelled"),
}.items()}

# Prompts that a language model goes on from, each word with the space before it. For an instruction that lists the
# words, `words` is put in.
_PLAIN: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("sst2", "mr", "imdb", "yelp_polarity"), ("Review: {text}\nSentiment:", "negative|positive")),
    "ag_news": ("{text}\nThis news is about", "politics|sports|business|technology"),
    "subj": ("Sentence: {text}\nAnswer:", "opinion|fact"),
    "trec": ("Say what the question asks for: words.\nQuestion: {text}\nType:",
             "abbreviation|thing|description|person|place|number"),
    "dbpedia_14": ("Say what the text is about: words.\nText: {text}\nCategory:",
                   "company|school|artist|athlete|politician|vehicle|building|nature|village|animal|plant|album|film|book"),
    "snips": ("Request: {text}\nIntent:", "playlist|restaurant|weather|music|rating|search|movie"),
}
# fmt: on
for _name, (_template, _answers) in _PLAIN.items():
    PROMPTS[_name]["plain"] = Prompt(
        template=_template.replace("words", _answers.replace("|", ", ")),
        words=tuple(f" {word}" for word in _answers.split("|")),
        labels=TASKS[_name].labels,
        name="plain",
    )


AS_IT_IS = Prompt(template="{text}", words=())  # of rows that have their own choices, and of running text
ASKING = Prompt(template="Question: {text}\nAnswer:", words=(), name="question")  # of answers in free words


def fit(prompt: Prompt, task: Task) -> Prompt:
    """Fits a prompt to a task: `Prompt.bound` with the task's columns and labels.

    Raises:
        ValueError: If the task is a regression, or prompt and task do not go together.
    """
    _refuse_regression(task)
    try:
        return prompt.bound(task.columns, task.labels)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error}") from error


def with_shots(prompt: Prompt, task: Task, shots: int, seed: int = 0) -> Prompt:
    """The prompt with demonstrations before it: training rows with their words, equally many of every label.

    Rows with choices of their own, or free answers, are shown with the right one.

    Args:
        prompt: The prompt.
        task: Its training rows are drawn from.
        shots: How many rows to show in all; where they do not divide by the labels, some labels have one more.
        seed: Chooses the rows, and their order.

    Raises:
        ValueError: If the prompt does not fit the task, or there are too few training rows of a label.
    """
    prompt = fit(prompt, task)
    if shots < 1 or task.running or not (prompt.words or task.choices):
        raise ValueError(f"task {task.name!r}: its prompt cannot have {shots} demonstrations.")
    classes = 1 if task.choices else len(prompt.words)

    def order(*what: object) -> str:
        return hashlib.sha256(repr((seed, *what)).encode()).hexdigest()

    labels = sorted(range(classes), key=lambda label: order("label", label))
    wanted = Counter(labels[place % len(labels)] for place in range(shots))
    shown: list[Example] = []
    for row in sorted(task.rows("train"), key=lambda row: order(row.text, row.pair)):
        label = min(int(row.label or 0), classes - 1)
        if wanted[label] > 0:
            wanted[label] -= 1
            shown.append(row)
    if missing := +wanted:
        label, count = next(iter(missing.items()))
        raise ValueError(
            f"task {task.name!r}: {count} more training rows of {task.labels[label]!r} are needed for {shots} shots."
        )
    texts = []
    for row in shown:
        asked, word = prompt.render(row), (prompt.words or row.choices or ())[int(row.label or 0)]
        texts.append(f"{asked}{'' if word[:1].isspace() else ' '}{word}".replace("{", "{{").replace("}", "}}"))
    named = f"{prompt.name or 'own'}, {shots} shots, seed {seed}"
    return replace(prompt, template="\n\n".join([*texts, prompt.template]), name=named)


def _refuse_regression(task: Task) -> None:
    if task.choices and task.prompt is not None and task.prompt.words:
        raise ValueError(f"task {task.name!r} has choices of its own; give its prompt words: [].")
    if task.regression or task.spans:
        kind = "a regression" if task.regression else "for spans"
        raise ValueError(f"task {task.name!r} is {kind}; a prompt needs a task with labels, one word for each.")


def prompt_of(model: Model, task: Task) -> Prompt | None:
    """The prompt of a model for a task: the task's own, or the one built in; None if the model has task heads.

    Raises:
        ValueError: If a text-to-text model has no prompt for the task, or the prompt does not fit it.
    """
    if task.running:
        _check_running(model, task)
        return replace(AS_IT_IS, name=str(task.windows))
    if not model.answers_in_text:
        if task.prompt is not None:
            raise ValueError(f"the model has task heads, it does not answer prompts: load {task.name!r} without one.")
        return None
    if task.prompt is not None or task.choices:
        return fit(task.prompt or (ASKING if task.metric == "exact_match" else AS_IT_IS), task)
    if model.continues and task.name not in _PLAIN:
        raise ValueError(
            f"a {model.config.model_type} model goes on from its prompt, and there is no built-in one of that style "
            f"for {task.name!r}: give one in a YAML file with template: and words:, each word with the space before it."
        )
    return prompt_for(task, "plain" if model.continues else "t5")


def _check_running(model: Model, task: Task) -> None:
    if not model.continues:
        raise ValueError(
            f"{task.name!r} has no labels (name their column with label=): it is running text, which decoders alone "
            f"tell token by token, and this is a {model.config.model_type} model."
        )
    if task.prompt is not None:
        raise ValueError(f"{task.name!r} is running text, which takes no prompt.")
    if task.windows is None:
        raise ValueError(f"{task.name!r} is running text: cut it into windows first, jp.windows(model, task).")


def prompt_for(task: Task, style: str = "t5") -> Prompt:
    """The built-in prompt of a task, fitted to it.

    Args:
        task: A built-in task. Its labels may be in another order, but not renamed.
        style: `t5` for models trained with T5's own tasks, `flan` for those that follow instructions, `plain` for
            language models, which go on from the prompt.

    Raises:
        ValueError: If there is no such prompt, or the task's texts or labels are not the built-in ones.
    """
    _refuse_regression(task)
    if task.name not in PROMPTS:
        raise ValueError(
            f"there is no built-in prompt for the task {task.name!r}; give one in a YAML file with template: "
            f"and words:. Built in: {', '.join(PROMPTS)}."
        )
    styles, source = PROMPTS[task.name], TASKS[task.name]
    if style not in styles:
        raise ValueError(f"there is no prompt style {style!r}; expected one of {', '.join(styles)}.")
    if len(task.columns) == 2 and task.columns[::-1] in (source.columns, source.hub_columns):
        raise ValueError(
            f"task {task.name!r}: its texts are in the order {', '.join(task.columns)}, "
            f"but the built-in prompt takes {', '.join(task.columns[::-1])}; swap text= and text_pair=."
        )
    try:
        return fit(styles[style], task)
    except ValueError as error:
        raise ValueError(f"{error} Do so in a YAML file of your own.") from error


def read_prompt(path: str | os.PathLike[str]) -> Prompt:
    """Reads a prompt from a YAML file. Only plain data is accepted: text, a list or mapping of words.

    ```yaml
    template: "review: {text} question: {pair}"
    words: {bad: "no", good: "yes"}  # by label, or a list in the order of the labels; [] for free text
    name: mine  # may be left out, as may
    calibration: batch  # or content-free, or none: of the words' probabilities
    ```

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file. The message begins with the file and the line.
    """
    text = _content(Path(path))
    try:
        return _prompt(text)
    except _FileError as error:
        raise ValueError(f"{path}:{error}") from error
    except yaml.reader.ReaderError as error:
        line, character = text.count("\n", 0, error.position) + 1, ascii(chr(error.character))
        raise ValueError(f"{path}:{line}: not YAML: it has the character {character}; remove it.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{path}:{line}: not YAML ({str(error.problem)[:80]}); put texts in quotes.") from error


class _FileError(ValueError):
    """An error with its line in front."""

    def __init__(self, mark: yaml.Mark | None, message: str):
        super().__init__(f"{mark.line + 1 if mark else 1}: {message}")


def _content(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}.")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}:1: a prompt's file has at most {MOST_BYTES:,} bytes; is this another file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}): convert it first.") from error


def _prompt(text: str) -> Prompt:
    _refuse_more_than_data(text)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None or (root.tag.endswith(":null") and not root.value):
        raise _FileError(None, "the file is empty; expected template: and words:.")
    if not isinstance(root, yaml.MappingNode):
        raise _FileError(root.start_mark, "expected a mapping with template: and words:.")
    entries = _entries(root, "key")
    for key, (mark, _) in entries.items():
        if key not in KEYS:
            close = difflib.get_close_matches(key.lower(), KEYS, 1)
            hint = f" did you mean {close[0]!r}?" if close else ""
            raise _FileError(mark, f"unknown key {key[:40]!r};{hint} the keys are {', '.join(KEYS)}.")
    for key in KEYS[:2]:
        if key not in entries:
            raise _FileError(root.start_mark, f"the key {key!r} is missing.")
    node = entries["template"][1]
    template = _text(node, "template")
    if isinstance(node, yaml.ScalarNode) and node.style is None and re.match(r"[ \t]+#", text[node.end_mark.index :]):
        raise _FileError(
            node.end_mark, "template: YAML takes what follows ' #' for a comment; put the template in quotes."
        )
    try:
        _parts(template)
    except ValueError as error:
        raise _FileError(node.start_mark, str(error)) from error
    labels, words = _words(entries["words"][1])
    name = _text(entries["name"][1], "name") if "name" in entries else ""
    calibration = "none"
    if "calibration" in entries:
        mark, node = entries["calibration"]
        calibration = _text(node, "calibration")
        if calibration not in CALIBRATIONS:
            raise _FileError(mark, f"calibration must be one of {', '.join(CALIBRATIONS)}, got {calibration[:40]!r}.")
    return Prompt(template=template, words=words, labels=labels, name=name, calibration=calibration)


def _refuse_more_than_data(text: str) -> None:
    """Looks at the stream of events, which needs no recursion, before nodes are made of it."""
    loader, depth, documents = yaml.SafeLoader(text), 0, 0
    while True:
        try:
            if not loader.check_event():
                return
            event = loader.get_event()
        except (OverflowError, ValueError) as error:  # a number that PyYAML does not check, as in "\\UFFFFFFFF"
            raise _FileError(loader.get_mark(), f"not YAML ({error}); put texts in quotes.") from error
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        anchor, tag = (getattr(event, name, None) is not None for name in ("anchor", "tag"))
        for refused, what in (
            (anchor, "anchors (&) and aliases (*) are refused; put texts in quotes."),
            (tag, "tags (!) are refused; put texts in quotes."),
            (depth > 2, "nested too deeply: a word is one text; put texts in quotes."),
            (documents > 1, "a second document begins; a file holds one prompt."),
        ):
            if refused:
                raise _FileError(event.start_mark, what)


def _text(node: yaml.Node, what: str) -> str:
    kind = node.tag.rpartition(":")[2]
    if not isinstance(node, yaml.ScalarNode):
        raise _FileError(
            node.start_mark, f"{what} must be text, got a {'list' if kind == 'seq' else 'mapping'}; put it in quotes."
        )
    if kind == "null" and not node.value:
        raise _FileError(node.start_mark, f"{what} has no value; expected text.")
    if kind != "str":
        raise _FileError(node.start_mark, f"{what}: YAML reads {node.value[:40]!r} as {kind}; put it in quotes.")
    if any("\ud800" <= character <= "\udfff" for character in node.value):
        raise _FileError(node.start_mark, f"{what}: half of a character (such as \\ud800) is no text; remove it.")
    return node.value


def _entries(node: yaml.MappingNode, what: str) -> dict[str, tuple[yaml.Mark, yaml.Node]]:
    entries: dict[str, tuple[yaml.Mark, yaml.Node]] = {}
    for key, value in node.value:
        name = _text(key, f"a {what}")
        if name in entries:
            first = entries[name][0].line + 1
            raise _FileError(
                key.start_mark, f"the {what} {name[:40]!r} occurs twice, first in line {first}; remove one."
            )
        entries[name] = key.start_mark, value
    return entries


def _words(node: yaml.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels, if the words have any, and the words."""
    if isinstance(node, yaml.MappingNode):
        entries = _entries(node, "label")
        labels, nodes = tuple(entries), [value for _, value in entries.values()]
    elif isinstance(node, yaml.SequenceNode):
        labels, nodes = (), node.value
    else:
        raise _FileError(node.start_mark, "words must be a list, or a mapping of labels to words; [] for free text.")
    words, known = tuple(_text(value, "a word") for value in nodes), set[str]()
    for word, value in zip(words, nodes, strict=True):
        try:
            _add_word(word, known)
        except ValueError as error:
            raise _FileError(value.start_mark, str(error)) from error
    return labels, words

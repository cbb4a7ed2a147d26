"""Data sets as tasks: texts, label names, a metric, and four splits that share no text.

*train* is for fine-tuning. *calibration* are training rows that no model is fine-tuned on, the only ones used for
scoring and recovery. Every choice is made on *dev*. *test* is what is reported.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxprune.data import splits
from jaxprune.data.records import (
    ANSWERS,
    ASKED,
    CHOICES,
    EMPTY,
    HIDDEN,
    PAIR,
    RUNNING,
    SPAN_COLUMNS,
    STRAY,
    SUFFIX,
    Labels,
    Records,
    Stored,
    examples_of,
    is_blank,
    kind_of,
    one_line,
    read,
    read_answers,
    read_folder,
    read_rows,
    read_texts,
    split_of,
    text_columns,
)
from jaxprune.data.splits import MOST_ROWS, SPLITS, Example, Row, row_key, seed_words
from jaxprune.models import ENDS, Model, TaskHead

if TYPE_CHECKING:
    import jax

    from jaxprune.data.prompts import Prompt

__all__ = [
    "SPLITS", "TASKS", "Example", "Rows", "Source", "Task", "draw", "from_hub", "load_task", "remove_leaks", "row_key",
    "seed_words",
]  # fmt: skip


@dataclass(frozen=True)
class Windowing:
    """The windows that running text was cut into."""

    tokens: int  # of a window, with what it only reads
    stride: int  # tokens from the beginning of one window to that of the next
    bos: bool  # whether every window begins with the tokenizer's BOS

    def __str__(self) -> str:
        begin = "after BOS" if self.bos else "no BOS"
        return f"windows of {self.tokens:,} tokens, stride {self.stride:,}, {begin}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples in four splits that share no text, and what their labels mean."""

    name: str
    splits: Mapping[str, tuple[Example, ...]]  # train, calibration, dev, test
    labels: tuple[str, ...]  # ("score",) in a regression, ("start", "end") of spans
    columns: tuple[str, ...] = ("sentence",)  # where the text, or the pair of texts, came from
    regression: bool = False
    spans: bool = False  # whether the answer to a question is a part of its context
    choices: bool = False  # whether every text has its own choices, one of which is to follow it
    running: bool = False  # whether it is running text, to be told token by token; see `jaxprune.windows`
    windows: Windowing | None = None  # those that its running text has been cut into
    metric: str = "accuracy"  # a key of `jaxprune.evaluation.evaluate.METRICS`
    grouped: bool = False  # rows with the same second text are kept on one side
    source: str = ""  # where the rows came from, in words
    license: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)  # rows left out, by split or reason
    ordered: bool = False  # the labels were named by the user, in the order of the model's logits
    notes: tuple[str, ...] = ()  # what of the data was not used, or not as it stands, in sentences
    prompt: Prompt | None = None  # what a text-to-text model is asked; None: what is built in for the task's name

    @property
    def sizes(self) -> dict[str, int]:
        """Rows in each split."""
        return {split: len(self.splits[split]) for split in SPLITS}

    def rows(self, split: str) -> tuple[Example, ...]:
        """The examples of a split.

        Raises:
            ValueError: If there is no such split.
        """
        if split not in self.splits:
            raise ValueError(f"there is no split {split!r}; expected one of {', '.join(SPLITS)}.")
        return self.splits[split]

    def digest(self, split: str) -> str:
        """SHA-256 over the normalised texts and the labels of a split; the order of the rows does not matter."""
        return splits.digest(self.rows(split))


@dataclass(frozen=True, kw_only=True)
class Source:
    """The origin of a built-in task, and the meaning of its files."""

    labels: tuple[str, ...]  # in the order of the local files
    folders: tuple[str, ...]  # names of the local folder; the first that exists is read
    columns: tuple[str, ...] = ("sentence",)  # in the local files
    hub: str  # data set on the Hugging Face hub
    config: str | None = None
    revision: str | None = None
    hub_columns: tuple[str, ...] = ("text",)
    hub_label: str = "label"
    hub_labels: tuple[str, ...] | None = None  # the hub's names, in the order of `labels`; None: the same names
    hub_validation: str = "validation"
    original: tuple[str, ...] = ()  # columns of the text and of the label in the files that GLUE offers
    header: tuple[str, ...] = ()  # the columns of those that do not name them
    pool: str = "train"  # the split that stands for train where there is none
    metric: str = "accuracy"
    regression: bool = False
    spans: bool = False
    grouped: bool = False
    license: str = "research use, no formal licence"


GLUE = "nyu-mll/glue"
# Usual columns of the texts: the first of these that a file has are read
TEXTS = [CHOICES, PAIR, ("sentence",), ("text",), SPAN_COLUMNS]
POLARITY = ("negative", "positive")
ENTAILMENT = ("entailment", "not_entailment")
SPANS: Mapping[str, Any] = {
    "columns": SPAN_COLUMNS, "hub_label": ANSWERS, "labels": ENDS, "metric": "squad", "spans": True,
    "grouped": True,
}  # fmt: skip

# fmt: off
TASKS: Mapping[str, Source] = {
    "sst2": Source(hub=GLUE, config="sst2", hub_columns=("sentence",), folders=("sst2",), labels=POLARITY),
    "cola": Source(
        hub=GLUE, config="cola", hub_columns=("sentence",), folders=("cola",), labels=("unacceptable", "acceptable"),
        metric="matthews", header=("source", "label", "mark", "sentence"),
    ),
    "mrpc": Source(
        hub=GLUE, config="mrpc", hub_columns=PAIR, folders=("mrpc",), columns=PAIR,
        labels=("not_equivalent", "equivalent"), metric="accuracy_f1", license="Microsoft Research licence terms",
        original=("#1 String", "#2 String", "Quality"),
    ),
    "qqp": Source(
        hub=GLUE, config="qqp", hub_columns=("question1", "question2"), folders=("qqp", "qqp_subset"), columns=PAIR,
        labels=("not_duplicate", "duplicate"), metric="accuracy_f1", license="Quora terms of service, non-commercial",
        original=("question1", "question2", "is_duplicate"),
    ),
    "stsb": Source(
        hub=GLUE, config="stsb", hub_columns=PAIR, folders=("stsb",), columns=PAIR, labels=("score",), regression=True,
        original=(*PAIR, "score"), metric="pearson_spearman",
        license="scores CC BY-SA 4.0, each part's texts under their own licence",
    ),
    "mnli": Source(
        hub=GLUE, config="mnli", hub_columns=("premise", "hypothesis"), hub_validation="validation_matched",
        folders=("mnli", "mnli_m_1k"), columns=PAIR, labels=("entailment", "neutral", "contradiction"),
        license="OANC and other licences, research use", original=(*PAIR, "gold_label"),
    ),
    # sentence1 is the question, sentence2 the passage, which serves several questions
    "qnli": Source(
        hub=GLUE, config="qnli", hub_columns=("question", "sentence"), folders=("qnli", "qnli_devsplit"), columns=PAIR,
        labels=ENTAILMENT, grouped=True, license="CC BY-SA 4.0", original=("question", "sentence", "label"),
    ),
    "rte": Source(hub=GLUE, config="rte", hub_columns=PAIR, folders=("rte",), columns=PAIR, labels=ENTAILMENT),
    "wnli": Source(
        hub=GLUE, config="wnli", hub_columns=PAIR, folders=("wnli",), columns=PAIR,
        labels=("not_entailment", "entailment"), license="CC BY 4.0",
    ),
    "boolq": Source(
        hub="google/boolq", hub_columns=("question", "passage"), hub_label="answer",
        folders=("boolq", "boolq_devsplit"), columns=PAIR, labels=("False", "True"), grouped=True,
        license="CC BY-SA 3.0",
    ),
    "ag_news": Source(
        hub="fancyzhx/ag_news", folders=("ag_news",), labels=("World", "Sports", "Business", "Sci/Tech"),
        license="research and other non-commercial use",
    ),
    # a context serves several questions
    "squad": Source(
        hub="rajpurkar/squad", hub_columns=SPAN_COLUMNS, folders=("squad", "squad_v1_xquad_en"), **SPANS,
        license="CC BY-SA 4.0",
    ),
    # there is nothing to train with but what was meant for validation; the main revision is a script
    "mlqa": Source(
        hub="facebook/mlqa", config="mlqa.en.en", revision="refs/convert/parquet", hub_columns=SPAN_COLUMNS,
        folders=("mlqa", "mlqa_en_dev"), pool="validation", **SPANS, license="CC BY-SA 3.0",
    ),
    # the hub's copies have the labels in the other order, so they are read by name
    "subj": Source(hub="SetFit/subj", hub_label="label_text", folders=("subj",), labels=("subjective", "objective")),
    "mr": Source(
        hub="cornell-movie-review-data/rotten_tomatoes", hub_labels=("neg", "pos"), folders=("mr",), labels=POLARITY,
    ),
    "imdb": Source(hub="stanfordnlp/imdb", hub_labels=("neg", "pos"), folders=("imdb",), labels=POLARITY),
    "yelp_polarity": Source(
        hub="fancyzhx/yelp_polarity", hub_labels=("1", "2"), folders=("yelp_polarity", "yelp_polarity_augpe"),
        labels=POLARITY, license="Yelp data set terms, academic use",
    ),
    # the main revision is a script, which `datasets` no longer runs
    "trec": Source(
        hub="CogComp/trec", revision="refs/convert/parquet", hub_label="coarse_label", folders=("trec", "trec6"),
        labels=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
    ),
    "emotion": Source(
        hub="dair-ai/emotion", config="split", folders=("emotion",),
        labels=("sadness", "joy", "love", "anger", "fear", "surprise"), license="educational and research use",
    ),
    "banking77": Source(
        hub="legacy-datasets/banking77", folders=("banking77",), license="CC BY 4.0", labels=(
            "activate_my_card", "age_limit", "apple_pay_or_google_pay", "atm_support", "automatic_top_up",
            "balance_not_updated_after_bank_transfer", "balance_not_updated_after_cheque_or_cash_deposit",
            "beneficiary_not_allowed", "cancel_transfer", "card_about_to_expire", "card_acceptance", "card_arrival",
            "card_delivery_estimate", "card_linking", "card_not_working", "card_payment_fee_charged",
            "card_payment_not_recognised", "card_payment_wrong_exchange_rate", "card_swallowed",
            "cash_withdrawal_charge", "cash_withdrawal_not_recognised", "change_pin", "compromised_card",
            "contactless_not_working", "country_support", "declined_card_payment", "declined_cash_withdrawal",
            "declined_transfer", "direct_debit_payment_not_recognised", "disposable_card_limits",
            "edit_personal_details", "exchange_charge", "exchange_rate", "exchange_via_app",
            "extra_charge_on_statement", "failed_transfer", "fiat_currency_support", "get_disposable_virtual_card",
            "get_physical_card", "getting_spare_card", "getting_virtual_card", "lost_or_stolen_card",
            "lost_or_stolen_phone", "order_physical_card", "passcode_forgotten", "pending_card_payment",
            "pending_cash_withdrawal", "pending_top_up", "pending_transfer", "pin_blocked", "receiving_money",
            "Refund_not_showing_up", "request_refund", "reverted_card_payment?", "supported_cards_and_currencies",
            "terminate_account", "top_up_by_bank_transfer_charge", "top_up_by_card_charge",
            "top_up_by_cash_or_cheque", "top_up_failed", "top_up_limits", "top_up_reverted", "topping_up_by_card",
            "transaction_charged_twice", "transfer_fee_charged", "transfer_into_account",
            "transfer_not_received_by_recipient", "transfer_timing", "unable_to_verify_identity",
            "verify_my_identity", "verify_source_of_funds", "verify_top_up", "virtual_card_not_working",
            "visa_or_mastercard", "why_verify_identity", "wrong_amount_of_cash_received",
            "wrong_exchange_rate_for_cash_withdrawal",
        ),
    ),
    "dbpedia_14": Source(
        hub="fancyzhx/dbpedia_14", hub_columns=("content",), folders=("dbpedia_14", "dbpedia14"),
        license="CC BY-SA 3.0 or GFDL", labels=(
            "Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation",
            "Building", "NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork",
        ),
    ),
    "snips": Source(
        hub="benayas/snips", hub_label="category", folders=("snips",), license="CC0", labels=(
            "AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork",
            "SearchScreeningEvent",
        ),
    ),
}
# fmt: on


def load_task(
    name: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    labels: Sequence[str] | TaskHead | Model | None = None,
    seed: int = 0,
    max_calibration: int = MOST_ROWS,
) -> Task:
    """Loads a task and cuts it into four splits that share no text.

    If the source has labelled train, validation and test rows, dev is its validation and test its test. If one of those
    two is missing, the other is test and dev is cut from train; without either, both are cut from train. Calibration is
    cut from train, unless a folder has a calibration file. Without train rows (an evaluation set), what is missing of
    calibration and dev is cut from what there is, and train is empty.

    A cut takes a tenth of the texts (of a small set up to a quarter, until 256) and at most 2,048, stratified by label,
    by the hash of their text, whatever the order of the rows. A text that occurs in several splits stays in the last
    of train, calibration, dev, test; `Task.dropped` counts the others, `Task.notes` say all that was not used. In QNLI
    and BoolQ the passage alone decides, in span tasks the context. Span tasks are data in SQuAD's format (see
    `jaxprune.data.records`); rows without an answer, or whose answers are not where they say, are left out and counted.
    Multiple-choice tasks have the columns `context`, `choices` and as `label` the place of the right one, from 0; with
    a `suffix` (WinoGrande) each choice is judged by the likelihood of what follows it.
    A column `text` without one of labels, and a `.txt` file, are running text for language models: the rows, or the
    paragraphs, are joined by blank lines and cut in passages of some 8,000 characters; see `windows`.
    Questions with an `answer` in words and no context are answered freely. A test file without labels is not used.

    Args:
        name: A built-in task (`TASKS`), the name of a folder in `data`, or the path of your own file or folder. A
            folder holds train, validation and test files; a single file is split by hash.
        data: Folder of data sets, each a folder with `{train,validation,test}.jsonl[.gz]` (or CSV, TSV, Parquet).
            Without it a built-in task comes from the Hugging Face hub.
        text: Column of the text. By default `sentence`, `sentence1`, `text` or `question`.
        text_pair: Column of the second text of a pair, or of the context.
        label: Column of the label; by default `label`, else `answers`. Names, or whole numbers; fractions make a
            regression, objects with `text` and `answer_start` answers.
        labels: Label names in the order of the model's logits. By default the built-in task's, or those found, sorted.
            Other names for a built-in task rename its labels, the same names in another order reorder them. One name,
            such as `("score",)`, makes a regression of whole numbers, too. A task head, or a model with one for the
            task, decides that itself, and the order of labels that pair with its own by name.
        seed: Chooses the rows of each cut. Use one seed for fine-tuning, scoring and testing.
        max_calibration: The most calibration rows.

    Raises:
        FileNotFoundError: If there is no such file or folder, or the hub cannot be reached.
        ValueError: If the name is unknown, or the data is empty, broken, misses a column, or has a split of one class.
    """
    if max_calibration < 1:
        raise ValueError(f"max_calibration must be at least 1, got {max_calibration}.")
    if text_pair is not None and text is None:
        raise ValueError(f"text_pair={text_pair!r} needs text= as well.")
    found = _find(str(name), None if data is None else Path(data))
    title, source, records = found.title, found.source, found.records
    hub, notes = found.origin.startswith("hub "), list(found.notes)
    if text is None and label is None and (unlabelled := _unlabelled(found)):
        return _without_labels(found, unlabelled, labels, seed, max_calibration)
    columns, label = _columns(found, text, text_pair, label)
    notes += [] if text is not None or source is not None else _other_texts(found, columns)
    hidden = [split for split, given in records.items() if label not in given.columns]
    spans = source.spans if source is not None else _has_answers(records, columns, label)
    if isinstance(labels, Model):
        labels = _head_of(labels, title)
    ordered = labels is not None and not isinstance(labels, TaskHead)
    choices = columns == CHOICES and not spans
    if choices and all(SUFFIX in given.columns for given in records.values()):
        columns = (*columns, SUFFIX)
    elif choices and (some := [given.where for given in records.values() if SUFFIX in given.columns]):
        raise ValueError(f"{title}: {some[0]} has a column {SUFFIX!r}, and other splits have none: add or remove it.")
    if choices and ordered:
        raise ValueError(f"{title}: the rows have choices of their own, so there are no label names to give.")
    if spans and (ordered or len(columns) != 2):
        raise ValueError(f"{title}: answers need a question, its context and no label names; got the texts {columns}.")
    rows: dict[str, list[Stored]] = {}
    left_out = Counter[str]()
    for split, given in records.items():
        if split not in hidden:
            rows[split], unusable = read_rows(given, columns, label, spans=spans, skip_empty=hub)
            left_out += unusable
            if not spans and all(_is_hidden(row.label, split) for row in rows[split]):
                hidden.append(split)
    notes += [f"{records[split].where} has no labels: it is not used." for split in hidden]
    labelled = {split: some for split, some in rows.items() if split not in hidden}
    if not labelled:
        raise ValueError(f"{title}: every label is {HIDDEN}, which means hidden; there is nothing to learn from.")
    if choices:
        most = max((len(row.texts[1]) for some in labelled.values() for row in some), default=0)
        labels = tuple(map(str, range(most)))
    codec = _codec(found, spans, labels, label, labelled)
    examples = {split: examples_of(records[split], some, None if spans else codec) for split, some in labelled.items()}
    distinct = {example.label for some in examples.values() for example in some}
    if spans and not any(examples.values()):
        raise ValueError(f"{title}: no row has an answer that occurs in its context; left out: {dict(left_out)}.")
    if not spans and len(distinct) < 2:
        only = "score" if codec.regression else codec.names[int(next(iter(distinct)) or 0)]
        raise ValueError(f"{title}: every label is {only!r}; a task needs two different ones.")
    grouped = spans or (source is not None and source.grouped and len(columns) == 2)
    try:
        division = splits.divide(
            examples, grouped=grouped, regression=codec.regression, seed=seed, max_calibration=max_calibration
        )
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from error
    for split, some in division.splits.items():
        classes = {example.label for example in some}
        if not spans and len(classes) == 1 < len(some):
            one = some[0].label if codec.regression else codec.names[int(some[0].label or 0)]
            raise ValueError(
                f"{title}: all {len(some)} {split} rows have the label {one!r}, which no score can tell from chance; "
                f"give {split} rows of two labels."
            )
    if stray := left_out.pop(STRAY, 0):
        notes.append(f"{stray:,} answers left out, which do not stand where they say; their rows have others.")
    dropped = division.dropped | dict(left_out)
    notes += [f"{count:,} rows left out, {_REASONS.get(why, why)}." for why, count in dropped.items()]
    if len({name.casefold() for name in codec.names}) < len(codec.names):
        notes.append(f"of the labels {', '.join(codec.names[:8])} some differ in nothing but case.")
    if division.contradictory and not spans:
        notes.append(
            f"{division.contradictory:,} texts occur with different labels; where one copy is used, it is drawn."
        )
    return Task(
        name=title,
        splits=division.splits,
        labels=codec.names,
        columns=columns[:1] if choices else columns,
        regression=codec.regression,
        spans=spans,
        choices=choices,
        metric="squad" if spans else _metric(source, codec),
        grouped=grouped,
        source=found.origin,
        license=source.license if source is not None else "",
        ordered=ordered,
        dropped=dropped,
        notes=tuple(notes),
    )


_REASONS = {split: f"whose text is in another split, too ({split})" for split in SPLITS} | {EMPTY: "without a text"}


class _Found(NamedTuple):
    """The files of a task."""

    title: str
    source: Source | None  # None: it is not built in
    records: dict[str, Records]
    origin: str  # in words
    notes: tuple[str, ...] = ()


# Columns by whose names people mean labels: with one of them a text is not taken for running text
_LABELS = re.compile(
    r"(.*_)?(label|class|categor|target|sentiment|score|rating|stars|intent|topic|answer)", re.IGNORECASE
)
PASSAGE = 8192  # characters of running text that stay together
PASSAGES = 64  # in which a text is cut at least


def _unlabelled(found: _Found) -> tuple[str, ...]:
    """The columns of rows that have no labels, only a text or a question with its answer in words; else none."""
    columns = {column for given in found.records.values() for column in given.columns}
    shared = columns.intersection(*(given.columns for given in found.records.values()))
    if found.source is None and shared >= {*ASKED} and not columns & {"label", "context", ANSWERS}:
        return ASKED
    running = found.source is None and RUNNING in shared and not any(map(_LABELS.match, columns))
    return (RUNNING,) if running else ()


def _without_labels(found: _Found, columns: tuple[str, ...], labels: Any, seed: int, max_calibration: int) -> Task:
    """A task of running text, whose examples are passages, or of questions that are answered freely."""
    title, running = found.title, columns == (RUNNING,)
    if labels is not None and not isinstance(labels, Model):
        first = next(iter(found.records.values()))
        raise ValueError(f"{title}: label names were given, but {first.where} has the columns {list(first.columns)}.")
    examples = {}
    for split, records in found.records.items():
        rows = read_texts(records, columns)
        if running:
            texts = [text for (text,) in rows]
            passages = _passages(texts, min(PASSAGE, sum(map(len, texts)) // PASSAGES))
            examples[split] = list(map(Example, passages))
        else:
            examples[split] = [Example(question, label=0, choices=(answer,)) for question, answer in rows]
    try:
        division = splits.divide(examples, seed=seed, max_calibration=max_calibration)
    except ValueError as error:
        hint = " (it is cut between rows, or paragraphs with blank lines between them)" if running else ""
        raise ValueError(f"{title}: there is too little to cut calibration, dev and test from{hint}.") from error
    what = "the text is read as running text" if running else "the answers are read as they are written"
    notes = [f"there is no column of labels: {what}."]
    if other := sorted({column for records in found.records.values() for column in records.columns} - {*columns}):
        notes.append(f"the columns {', '.join(other)} are not used.")
    what = "passages" if running else "rows"
    notes += [f"{count:,} {what} left out, {_REASONS.get(why, why)}." for why, count in division.dropped.items()]
    return Task(
        name=title,
        splits=division.splits,
        labels=columns[-1:],
        columns=columns[:1],
        choices=not running,
        running=running,
        metric="likelihood" if running else "exact_match",
        source=found.origin,
        dropped=division.dropped,
        notes=(*found.notes, *notes),
    )


def _passages(texts: Sequence[str], characters: int) -> list[str]:
    """Consecutive texts, joined by blank lines until they have so many characters."""
    passages, part, size = [], [], 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= max(characters, 1):
            passages.append("\n\n".join(part))
            part, size = [], 0
    if part and passages:
        passages[-1] = "\n\n".join([passages[-1], *part])
    return passages


def _columns(found: _Found, text: str | None, text_pair: str | None, label: str | None) -> tuple[tuple[str, ...], str]:
    """The columns of the texts and of the label: those asked for, or those that the task's files usually have."""
    source = found.source
    if text is not None:
        texts = [(text,) if text_pair is None else (text, text_pair)]
    elif source is None:
        texts = TEXTS
        first = next(iter(found.records.values()))
        if not any(set(columns) <= set(first.columns) for columns in texts):
            raise ValueError(
                f"{first.where} has the columns {list(first.columns)}: name the text with text=, text_pair=."
            )
    else:
        texts = [source.hub_columns if found.origin.startswith("hub ") else source.columns]
        texts += [columns for columns in (source.hub_columns, source.original[:-1]) if columns]
    names = ["label", ANSWERS]
    if label is not None:
        names = [label]
    elif source is not None:
        names = [source.hub_label] if found.origin.startswith("hub ") or source.spans else ["label", source.hub_label]
        names += source.original[-1:]
    return text_columns(found.records, texts, names)


def _other_texts(found: _Found, columns: Sequence[str]) -> list[str]:
    """A note on columns that could be the text as well, if there are any."""
    left = {*next(iter(found.records.values())).columns} - {*columns}
    others = [", ".join(texts) for texts in TEXTS if {*texts} <= left]
    read = ", ".join(columns)
    return [f"the texts are read from {read}, not from {others[0]}: name them with text=."] if others else []


def _has_answers(records: Mapping[str, Records], columns: tuple[str, ...], label: str) -> bool:
    """True if the rows hold answers in their contexts; text among the answers is refused."""
    given = next(given for given in records.values() if label in given.columns)
    number, cells = next(given.read((label,)))
    stored = cells.get(label)
    if label == ANSWERS and columns == SPAN_COLUMNS and not isinstance(stored, Mapping | list):
        read_answers(stored, given.place(number))
    return isinstance(stored, Mapping) or (isinstance(stored, list) and label == ANSWERS)


def _is_hidden(label: Any, split: str) -> bool:
    return label in (HIDDEN, str(HIDDEN)) or (split == "test" and is_blank(label))


def _head_of(model: Model, task: str) -> TaskHead | None:
    """The model's head of the task's name, else its only one."""
    if model.answers_in_text or (task not in model.heads and len(model.heads) != 1):
        return None
    return model.head(task if task in model.heads else None)


def _codec(
    found: _Found,
    spans: bool,
    labels: Sequence[str] | TaskHead | None,
    label: str,
    rows: Mapping[str, Sequence[Stored]],
) -> Labels:
    """The way in which labels of a task are read: as the user or the head says, else as they are."""
    if spans:
        return Labels.of(ENDS)
    if isinstance(labels, TaskHead):
        codec = _codec_for(found, labels, label, rows)
        return codec if codec.regression else codec.ordered_as(labels.labels)
    if found.source is None and labels is not None:
        return Labels.of(labels, regression=len(labels) == 1)
    codec = _codec_for(found, None, label, rows)
    return codec if labels is None else codec.renamed(labels)


def _codec_for(found: _Found, head: TaskHead | None, label: str, rows: Mapping[str, Sequence[Stored]]) -> Labels:
    """The labels of a built-in task, or those in the data, which are classes or numbers as the head is."""
    if found.source is not None:
        return Labels.of(found.source.labels, found.source.regression)
    stored = {found.records[split].classes.get(label, ()) for split in rows}
    if len(stored) > 1:
        raise ValueError(f"{found.title}: the files name different labels: {', '.join(map(str, stored))}.")
    (names,) = stored
    if names:
        return Labels.of(names)
    if head is not None and head.regression:
        return Labels(("score",), True)
    given = [(found.records[split], some) for split, some in rows.items()]
    return Labels.found(given, found.title, classes=head is not None and not head.spans)


def remove_leaks(tasks: Sequence[Task]) -> tuple[tuple[Task, ...], dict[tuple[str, str], int]]:
    """Drops what training on one task would reveal of the held-out rows of another; call it before fine-tuning.

    A row leaves train and calibration if its whole text (pairs in either order) occurs in the dev or test rows of any
    task, and leaves train if it occurs in the calibration rows of any task, which no model may be fine-tuned on. Where
    the passage alone decides (QNLI, BoolQ), the passage is compared too. That a sentence is one half of another task's
    pair is not a leak: it says nothing about the pair's label.

    Returns:
        The tasks in the same order, and for (task, other) how many rows of `task` were dropped because they occur in
        `other`. A row that occurs in two others counts for both.

    Raises:
        ValueError: If two tasks have the same name.
    """
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise ValueError(
            f"two tasks are named {twice[0]!r}; task names must differ: write --task NAME=FILE, or rename a file."
        )
    rows = {t.name: {split: splits.rows_of(t.splits[split], t.grouped) for split in SPLITS} for t in tasks}
    held = {name: splits.marks([*parts["dev"], *parts["test"]]) for name, parts in rows.items()}
    counts: Counter[tuple[str, str]] = Counter()
    dropped = {task.name: Counter(task.dropped) for task in tasks}

    def clean(split: str, held: Mapping[str, set[str]]) -> None:
        for name, parts in rows.items():
            left: list[Row] = parts[split]
            for other, marks in held.items():
                counts[name, other] += len(parts[split]) - len(splits.without(parts[split], marks))
                left = splits.without(left, marks)
            dropped[name][f"leaks.{split}"] += len(parts[split]) - len(left)
            parts[split] = left

    clean("calibration", held)
    clean("train", {name: held[name] | splits.marks(parts["calibration"]) for name, parts in rows.items()})
    cleaned = tuple(
        replace(
            task,
            splits={split: tuple(row.example for row in rows[task.name][split]) for split in SPLITS},
            dropped=dict(+dropped[task.name]),
        )
        for task in tasks
    )
    return cleaned, dict(+counts)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a task that are read, and how they are batched; every function that reads rows takes these."""

    examples: int | tuple[Example, ...] | None = None  # how many to draw, or the rows; None: as many as is usual
    split: str | None = None  # None: the calibration rows to score and to repair with, the test rows to evaluate
    key: int | jax.Array = 0  # a seed or a `jax.random.key`, for the draw and for what else is random
    exclude: Collection[str] = ()  # keys of rows (`row_key`) that are not drawn; an evaluation refuses to meet them
    batch_size: int = 32
    max_length: int | None = None  # tokens to which a text is cut; None: 128, for spans 384, or all the model reads

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}.")

    @property
    def random(self) -> jax.Array:
        """The `jax.random.key` of `key`."""
        import jax  # slow to import

        return jax.random.key(self.key) if isinstance(self.key, int) else self.key


def draw(
    task: Task, examples: int, key: int | jax.Array, *, split: str = "calibration", stratified: bool = True
) -> tuple[Example, ...]:
    """Draws examples of a split, without repetition, in random order.

    The draw depends on the texts and the key, not on the order of the rows.

    Args:
        split: Where from.
        stratified: Whether the labels keep their proportions (in a regression the fifths of the distribution).

    Raises:
        ValueError: If the split has fewer examples.
    """
    rows = task.rows(split)
    if not 1 <= examples <= len(rows):
        raise ValueError(f"examples must lie in 1 to {len(rows)}, the {split} rows of {task.name!r}, got {examples}.")
    salt = "draw:" + ".".join(map(str, seed_words(key)))
    chosen = splits.choose(
        splits.rows_of(rows), examples, salt, regression=task.regression, stratified=stratified, distinct=False
    )
    return tuple(row.example for row in chosen)


def from_hub(source: Source, stored: Mapping[str, Any]) -> dict[str, Records]:
    """Turns what `datasets.load_dataset` returns into records, with class labels by name.

    Raises:
        ValueError: If the splits or the label names are not those expected.
    """
    records = {}
    for split, hub_split in {"train": "train", "validation": source.hub_validation, "test": "test"}.items():
        if hub_split in stored:
            given = _hub_records(stored[hub_split], f"{source.hub} ({hub_split})")
            records[split] = _classes_of(source, given)
    if not records:
        expected = f"train, {source.hub_validation}, test"
        raise ValueError(f"{source.hub} has the splits {sorted(stored)}, expected {expected}.")
    return records


def _hub_records(stored: Any, where: str) -> Records:
    """One split of a data set of the library `datasets`."""
    names = {name: getattr(kind, "names", None) for name, kind in stored.features.items()}

    def rows(columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        present, number = [column for column in columns if column in names], 0
        try:
            for number, cells in enumerate(stored.select_columns(present), 1):
                yield number, cells
        except Exception as error:  # likewise
            raise ValueError(f"{where} cannot be read after row {number}: {one_line(error)}") from error

    classes = {name: tuple(some) for name, some in names.items() if some is not None}
    return Records(where, tuple(names), rows, unit="row", classes=classes)


def _classes_of(source: Source, records: Records) -> Records:
    """The records of a built-in task, with its own label names in the place of those that a file from the hub has.

    Raises:
        ValueError: If these are other ones.
    """
    names = records.classes.get(source.hub_label)
    if names is None:
        return records
    ours = dict(zip(source.hub_labels or source.labels, source.labels, strict=True))
    if set(ours) != set(names):
        raise ValueError(f"{records.where} has the labels {sorted(names)}, expected {sorted(ours)}.")
    return replace(records, classes={source.hub_label: tuple(ours[name] for name in names)})


def _download(name: str, source: Source) -> _Found:
    import datasets

    try:
        stored: Any = datasets.load_dataset(source.hub, name=source.config, revision=source.revision)
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"task {name!r} could not be fetched from the hub: {error}. "
            f"Without a network, give a folder that has {source.folders[0]}/train.jsonl with data=."
        ) from error
    used = {"train", source.hub_validation, "test"}
    notes = tuple(f"the hub's split {split} is not used." for split in stored if split not in used)
    return _Found(name, source, _pooled(source, from_hub(source, stored)), f"hub {source.hub}", notes)


def _find(name: str, data: Path | None) -> _Found:
    """Finds a task's rows."""
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"the data folder {data} does not exist.")
    if name in TASKS and data is None:
        return _download(name, TASKS[name])
    if data is not None and (name in TASKS or (data / name).is_dir()):
        folders = TASKS[name].folders if name in TASKS else (name,)
        folder = next((data / folder for folder in folders if (data / folder).is_dir()), None)
        if folder is None:  # GLUE's own folders are CoLA, SST-2 and so on
            alike = [entry for entry in sorted(data.iterdir()) if _plain(entry.name) in map(_plain, folders)]
            folder = next((entry for entry in alike if entry.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"no folder for task {name!r} in {data}: looked for {', '.join(folders)}.")
        source = TASKS.get(name) or next((source for source in TASKS.values() if name in source.folders), None)
        return _in_folder(folder, name if name in TASKS else Path(name).name, source)
    path = Path(name)
    if path.is_dir():
        return _in_folder(path, path.resolve().name, None)
    if path.is_file():
        split, shard = split_of(path)
        stem = path.name[: len(path.name) - len(kind_of(path))]
        if split or shard:  # train.csv says nothing, its folder does
            stem = path.resolve().parent.name
        notes = (f"{path.name} is one of {shard[1]} parts: give its folder for all of them.",) if shard else ()
        return _named(stem, None, {"train": read(path)}, f"file {path.name}", notes)
    if kind_of(path) or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no file or folder {name}.")
    folders = sorted(entry.name for entry in data.iterdir() if entry.is_dir()) if data is not None else []
    close = difflib.get_close_matches(name.lower(), dict.fromkeys([*TASKS, *folders]), 3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    more = f" In {data}: {', '.join(folders)}." if folders else ""
    raise ValueError(f"unknown task {name!r}.{hint} Built in: {', '.join(sorted(TASKS))}.{more}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _in_folder(folder: Path, title: str, source: Source | None) -> _Found:
    """The files of a folder, or a data set that the library `datasets` saved there."""
    if (folder / "dataset_dict.json").is_file():
        import datasets

        try:
            stored: Any = datasets.load_from_disk(str(folder))
        except Exception as error:  # a damaged file raises whatever the library happens to meet
            raise ValueError(f"{folder} is no data set of the library `datasets`: {one_line(error)}") from error
        splits_in = {split_of(Path(f"{split}.jsonl"))[0]: split for split in stored}
        records = {
            split: _hub_records(stored[given], f"{folder} ({given})") for split, given in splits_in.items() if split
        }
        if not records:
            raise ValueError(f"{folder} has the splits {sorted(stored)}, expected train, validation or test.")
        unused = [
            given for given in stored if given not in splits_in.values() or not split_of(Path(f"{given}.jsonl"))[0]
        ]
    else:
        records, unused = read_folder(folder, () if source is None else source.header)
    if source is not None:
        records = {split: _classes_of(source, given) for split, given in records.items()}
    notes = (f"{folder.name} has {', '.join(unused[:8])}{', ...' * (len(unused) > 8)}, not used.",) if unused else ()
    return _named(title, source, _pooled(source, records), f"folder {folder.resolve().name}", notes)


def _named(
    stem: str, source: Source | None, records: dict[str, Records], origin: str, notes: tuple[str, ...]
) -> _Found:
    """The task with a name that a task head can have."""
    title = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")
    title = title if re.match("[A-Za-z]", title) else f"task_{title}".rstrip("_")
    if title != stem:
        notes = (*notes, f"{stem!r} is called {title!r}, since names are of letters, digits, _ and -.")
    return _Found(title, source, records, origin, notes)


def _pooled(source: Source | None, records: dict[str, Records]) -> dict[str, Records]:
    """The rows by split; without train rows, those of the pool take their place."""
    if source is None or "train" in records or source.pool not in records:
        return records
    return {"train" if split == source.pool else split: rows for split, rows in records.items()}


def _metric(source: Source | None, labels: Labels) -> str:
    if source is None:
        return "pearson_spearman" if labels.regression else "accuracy"
    # F1 is of the second class: with the labels in another order it would be of the wrong one
    moved = source.metric == "accuracy_f1" and labels.index[source.labels[1]] != 1
    return "accuracy" if moved else source.metric

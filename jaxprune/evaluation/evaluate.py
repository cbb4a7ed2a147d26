"""Evaluation of a model on a task: its predictions, and the task's metrics beside the chance level.

`predict` gives the logits of examples in their order, however they are batched; `evaluate` compares them with labels.
"""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.checkpoints.files import COUNT, misfits_of
from jaxprune.data.batches import IGNORED, Batch, Encoded, encode, encode_words, find_spans, pack, text_of
from jaxprune.data.prompts import Prompt, prompt_of
from jaxprune.data.records import pair_labels
from jaxprune.data.splits import Answer
from jaxprune.data.tasks import Example, Rows, Task, Windowing, draw, row_key
from jaxprune.evaluation import shown
from jaxprune.evaluation.text import candidates_in, generate, rank, stop_tokens, texts, worded
from jaxprune.models import INPUTS, LANGUAGE, NOWHERE, WORDS, Model, TaskHead
from jaxprune.units import Intervention, Params

Metric: TypeAlias = Callable[[Any, Any], dict[str, float]]  # (predictions, labels), an entry per example
Progress: TypeAlias = Callable[[int, int], None]  # (batches sent to the device, all batches)

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The share of labels that are predicted."""
    return float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, `2 TP / (2 TP + FP + FN)`; 0 if nothing is positive.

    Raises:
        ValueError: If there are other classes than 0 and 1.
    """
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"F1 is of two classes, 0 and 1; the labels reach {int(labels.max())}.")
    hits = np.sum((predicted == 1) & (labels == 1))
    errors = np.sum((predicted == 1) != (labels == 1))
    return float(2 * hits / (2 * hits + errors)) if hits else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The Matthews correlation, for any number of classes; 0 if all predictions or all labels are the same.

    References:
        Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004.
    """
    classes = np.arange(max(predicted.max(), labels.max()) + 1)
    p, y = predicted[:, None] == classes, labels[:, None] == classes
    return _correlation(p - p.mean(0), y - y.mean(0))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The linear correlation; 0 if one of the two is constant, where that of SciPy is not a number."""
    p, y = predicted.astype(np.float64), labels.astype(np.float64)
    return _correlation(p - p.mean(), y - y.mean())


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The correlation of the ranks; equal values share their mean rank."""
    from scipy.stats import rankdata  # slow to import

    return pearson(rankdata(predicted), rankdata(labels))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of two centred arrays; 0 if one of them is zero."""
    scale = float(np.sum(a * a)) ** 0.5 * float(np.sum(b * b)) ** 0.5
    return float(np.sum(a * b)) / scale if scale else 0.0


def plain(text: str) -> str:
    """The text as SQuAD compares it: lower case, no punctuation, no articles (a, an, the), single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, text: str) -> float:
    """1 if two answers are equal after `plain`, else 0."""
    return float(plain(predicted) == plain(text))


def final(text: str) -> str:
    """An answer as free ones are compared: as in GSM8K what follows "####" in its line, else the first paragraph.

    Of the former, commas, dollars and a full stop at the end do not count; of the latter, all that `plain` drops.
    """
    if marked := re.search(r"####([^\n]*)", text):
        return re.sub(r"[,$]", "", marked[1]).strip().removesuffix(".").casefold()
    return plain(text.strip().partition("\n\n")[0])


def free_match(predicted: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """The share of free answers that are the right ones, by what `final` makes of them."""
    same = [final(text) == final(answer) for text, answer in zip(predicted, answers, strict=True)]
    return {"exact_match": sum(same) / len(same)}


def word_f1(predicted: str, text: str) -> float:
    """F1 of the words that two answers share after `plain`; 0 if they share none."""
    ours, theirs = plain(predicted).split(), plain(text).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def squad(predicted: Sequence[str], answers: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Mean F1 and exact match, each example by its best-matching answer, as in SQuAD 1.1's script.

    References:
        Rajpurkar, Zhang, Lopyrev and Liang, SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016.
    """
    pairs = list(zip(predicted, answers, strict=True))
    return {
        name: sum(max((measure(text, true.text) for true in known), default=0.0) for text, known in pairs) / len(pairs)
        for name, measure in (("f1", word_f1), ("exact_match", exact_match))
    }


def _pearson_spearman(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    both = {"pearson": pearson(predicted, labels), "spearman": spearman(predicted, labels)}
    return {"pearson_spearman": sum(both.values()) / 2} | both


def likelihood(predicted: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """The mean log-likelihood of a token, in nats, and the perplexity, its negative's exponential.

    Args:
        predicted: The log-likelihood of every window.
        tokens: How many tokens it is of.
    """
    mean = float(predicted.sum(dtype=np.float64) / tokens.sum())
    return {"log_likelihood": mean, "perplexity": math.exp(min(-mean, 700.0))}


# The metrics of GLUE, and SQuAD's of texts and answers, by the name that a task gives; the first of each is the primary
# one: more of it is better. For MRPC and QQP it is accuracy: always answering "equivalent" has an F1 of 81 on MRPC.
METRICS: Mapping[str, Metric] = {
    "accuracy": lambda predicted, labels: {"accuracy": accuracy(predicted, labels)},
    "accuracy_f1": lambda p, labels: {"accuracy": accuracy(p, labels), "f1": f1(p, labels)},
    "matthews": lambda p, labels: {"matthews": matthews(p, labels), "accuracy": accuracy(p, labels)},
    "pearson_spearman": _pearson_spearman,
    "squad": squad,
    "likelihood": likelihood,
    "exact_match": free_match,
}


_RECORD = {  # of an `Evaluation`
    **dict.fromkeys(("task", "split", "head", "primary"), str),
    "metrics": {...: float},
    "chance": float,
    "n": COUNT,
    "truncated?": COUNT,
    "generated?": bool,
    "calibration?": str,
    "windows?": ({"tokens": COUNT, "stride": COUNT, "bos": bool}, None),
    ...: object,
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of a model on a split of a task."""

    task: str
    split: str
    head: str
    metrics: Mapping[str, float]  # the primary one first; fractions, not percent
    # primary metric of always predicting the most frequent label (a constant, in a regression); 0 for spans; of running
    # text, that of equally likely tokens
    chance: float
    n: int  # examples
    truncated: int = 0  # how many of them were cut to the maximal length
    generated: bool = False  # whether answers were generated, not chosen among the labels
    calibration: str = "none"  # of the labels' words, see `Prompt`
    windows: Windowing | None = None  # of running text

    @property
    def primary(self) -> tuple[str, float]:
        """The name and value of the metric to report."""
        return next(iter(self.metrics.items()))

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric]

    def __str__(self) -> str:
        values = ", ".join(f"{name} {shown(name, value)}" for name, value in self.metrics.items())
        cut = f", {self.truncated} truncated" if self.truncated else ""
        written = ", generated" if self.generated else ""
        written += "" if self.calibration == "none" else f", {self.calibration} calibration"
        cut += "" if self.windows is None else f", {self.windows}"
        chance = shown(self.primary[0], self.chance)
        return f"{self.task} {self.split}{written}: {values} (chance {chance}, {self.n:,} examples{cut})"

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, ready for `json.dumps`."""
        record = asdict(self) | {"metrics": dict(self.metrics), "primary": self.primary[0]}
        if self.windows is None:
            del record["windows"]
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Evaluation:
        """The evaluation from its `to_json`, in any order of names.

        Raises:
            ValueError: If it is not one.
        """
        if problems := misfits_of(record, _RECORD):
            raise ValueError(f"an evaluation is damaged: {'; '.join(problems)}")
        if record["primary"] not in record["metrics"]:
            raise ValueError(f"an evaluation is damaged: {record['primary']!r} is none of its metrics")
        first = record["primary"]
        metrics = {first: record["metrics"][first]} | record["metrics"]
        fields = {name: value for name, value in record.items() if name in cls.__dataclass_fields__}
        if fields.get("windows") is not None:
            fields["windows"] = Windowing(**fields["windows"])
        return cls(**fields | {"metrics": metrics})


def predict(
    model: Model,
    params: Params,
    examples: Sequence[Example] | Encoded,
    *,
    head: str | None = None,
    intervention: Intervention = Intervention(),
    batch_size: int = 32,
    prompt: Prompt | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """The logits of examples, `[examples, labels]` in float32, in the order of the examples.

    Text-to-text models give the log-likelihoods of the labels' words, by the head `words` the logits of the tokens that
    these begin with; heads for spans `[examples, 2, tokens]`, with
    -1e9 where none may start or end.

    Args:
        examples: The examples, or what `encode` made of them (with another `max_length`, say).

    Raises:
        ValueError: If a logit is not finite.
    """
    encoded = examples if isinstance(examples, Encoded) else encode(model, examples, prompt=prompt)
    longest = int(encoded.lengths.max())

    def run(batch: Batch) -> Any:
        inputs = _inputs(batch)
        if model.answers_in_text and model.head(head) == LANGUAGE:
            inputs |= {name: batch[name] for name in ("candidates_read",) if name in batch}
            return rank(model, params, inputs, candidates_in(batch), intervention)
        if model.answers_in_text:
            inputs = worded(model, params, batch)
        logits: Any = model.apply(params, inputs, intervention.gates, head=head, means=intervention.means).logits
        if not model.head(head).spans:
            return logits
        padded = np.full((*np.shape(logits)[:2], longest), NOWHERE, np.float32)
        padded[..., : np.shape(logits)[2]] = np.asarray(logits)[..., :longest]
        return padded

    logits = _in_order(encoded, batch_size, run, progress).astype(np.float32)
    _refuse_broken(np.isfinite(logits).reshape(len(encoded), -1).all(axis=1))
    return logits


def find_answers(
    model: Model,
    params: Params,
    examples: Sequence[Example],
    *,
    encoded: Encoded | None = None,
    head: str | None = None,
    intervention: Intervention = Intervention(),
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[str]:
    """Answers to questions, word for word from their contexts: the likeliest spans, of at most 30 tokens.

    Args:
        examples: The questions: `Example(question, context, answers=())`, or with the answers that are known.
        encoded: What `encode` made of them; None: contexts are cut after 384 tokens.
        head: The task head, one for spans; None is the only one.

    Raises:
        ValueError: If the head is not for spans, the examples have no answers in the place of labels, or a logit is not
            finite.
    """
    chosen = model.head(head)
    encoded = encode(model, examples) if encoded is None else encoded
    if not chosen.spans or encoded.characters is None:
        what = "its examples have no answers" if chosen.spans else f"task head {chosen.name!r} is {chosen.kind}"
        raise ValueError(f"answers are found by a head for spans, in examples with answers=() or known ones; {what}.")

    def run(batch: Batch) -> Any:
        logits = model.apply(params, _inputs(batch), intervention.gates, head=head, means=intervention.means).logits
        return find_spans(logits)

    spans = _in_order(encoded, batch_size, run, progress)
    _refuse_broken(spans[:, 2] == 1)
    characters = np.split(encoded.characters, encoded.offsets[1:-1])
    return [text_of(*row) for row in zip(examples, characters, spans, strict=True)]


def _write_answers(
    model: Model,
    params: Params,
    encoded: Encoded,
    *,
    intervention: Intervention = Intervention(),
    batch_size: int = 32,
    progress: Progress | None = None,
) -> np.ndarray:
    """The labels whose words a text-to-text model generates, int32 `[examples]`; -1 for any other text."""
    if encoded.candidates is None:
        raise ValueError("the examples were encoded without a prompt: there are no words to compare answers with.")
    words = np.where(encoded.candidates == IGNORED, model.config.pad_id, encoded.candidates)

    def run(batch: Batch) -> Any:
        return generate(model, params, batch, max_new_tokens=words.shape[1], intervention=intervention)

    same = (_in_order(encoded, batch_size, run, progress)[:, None] == words).all(-1)
    return np.where(same.any(1), same.argmax(1), -1).astype(np.int32)


MOST_WRITTEN = 256  # tokens of a free answer


def _write_texts(
    model: Model,
    params: Params,
    encoded: Encoded,
    *,
    intervention: Intervention = Intervention(),
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[str]:
    """The texts that a model writes, up to its end of a text."""
    stop = stop_tokens(model)

    def run(batch: Batch) -> Any:
        room = min(MOST_WRITTEN, model.max_length - batch["input_ids"].shape[1])
        if room < 1:
            raise ValueError(f"the prompts take the {model.max_length} tokens that the model reads: set max_length.")
        written = generate(model, params, batch, max_new_tokens=room, stop=stop, intervention=intervention)
        return jnp.pad(written, ((0, 0), (0, MOST_WRITTEN - room)), constant_values=model.config.pad_id)

    return texts(model, _in_order(encoded, batch_size, run, progress))


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in INPUTS if name in batch}


def _refuse_broken(finite: Any) -> None:
    if broken := int((~finite).sum()):
        raise ValueError(f"the logits of {broken} of {len(finite)} examples are not finite: the model is broken.")


def _in_order(encoded: Encoded, batch_size: int, run: Callable[[Batch], Any], progress: Progress | None) -> np.ndarray:
    """The results of a function on batches, row by row in the order of the examples."""
    batches = pack(encoded, batch_size=batch_size)
    indices, results = [], []
    for done, batch in enumerate(batches, 1):
        results.append(run(batch))  # stays on the device
        indices.append(batch["index"])
        if progress is not None:
            progress(done, len(batches))
    rows, index = np.concatenate(jax.device_get(results)), np.concatenate(indices)
    ordered = np.empty((len(encoded), *rows.shape[1:]), rows.dtype)
    ordered[index[index >= 0]] = rows[index >= 0]
    return ordered


def evaluate(
    model: Model,
    params: Params,
    task: Task,
    *,
    rows: Rows = Rows(),
    head: str | None = None,
    intervention: Intervention = Intervention(),
    generated: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a model on a split of a task.

    For span tasks: exact match and F1 of the likeliest span. An answer that is cut off counts as not found. For choices
    also the accuracy of likelihoods per character, lm-evaluation-harness's `acc_norm`; chance is a blind draw. Free
    answers are generated, greedily and of at most 256 tokens, and compared as GSM8K's are, see `final`. Of running
    text: the perplexity of its windows.

    Args:
        rows: The rows to evaluate on, by default all test rows; choose on `dev`, report `test`. Fewer `examples` are a
            stratified draw, the same for the same `key`. No row may be in `exclude`, such as those used for scoring.
        head: The task head; by default the one of the task's name, else the only one.
        generated: Whether a text-to-text model has to write the words of the label by itself; otherwise the likeliest
            of the labels is what it predicts.

    Raises:
        ValueError: If the head does not fit the task, the split is empty, a row is in `exclude`, or the logits are not
            finite.
    """
    head = fitting_head(model, task, head)
    split, scored = rows.split or "test", frozenset(rows.exclude)
    examples = rows.examples if isinstance(rows.examples, tuple) else task.rows(split)
    if not examples:
        raise ValueError(f"{task.name!r} has no {split} rows.")
    if scored and (seen := sum(row_key(example) in scored for example in examples)):
        raise ValueError(
            f"{seen} of the {len(examples)} {split} rows of {task.name!r} are among the {len(scored)} rows used for "
            "scoring; score on calibration rows and evaluate on dev or test, loaded with the same seed."
        )
    if isinstance(rows.examples, int) and rows.examples < len(examples):
        examples = draw(task, rows.examples, rows.key, split=split)
    prompt = prompt_of(model, task)
    encoded = encode(model, examples, max_length=rows.max_length, prompt=prompt)
    settings: dict[str, Any] = {"intervention": intervention, "batch_size": rows.batch_size, "progress": progress}
    labels: Any = encoded.labels
    more: dict[str, float] = {}
    if task.metric == "exact_match":
        generated = True
        labels = [(example.choices or ("",))[0] for example in examples]
        predicted, constant = _write_texts(model, params, encoded, **settings), [""] * len(labels)
    elif task.spans:
        labels = [example.answers for example in examples]
        predicted: Any = find_answers(model, params, examples, encoded=encoded, head=head, **settings)
        constant: Any = [""] * len(labels)
    else:
        if generated:
            predicted = _write_answers(model, params, encoded, **settings)
        else:
            ready = calibrate(model, params, task, encoded, head=head, intervention=intervention)
            logits = predict(model, params, ready, head=head, **settings)
            predicted = logits[:, 0] if task.regression or task.windows is not None else logits.argmax(1)
            if task.choices and all(example.suffix is None for example in examples):
                sizes = np.ones(logits.shape)
                for row, example in zip(sizes, examples, strict=True):
                    row[: len(example.choices or ())] = list(map(len, example.choices or ()))
                more["accuracy_norm"] = accuracy((logits / sizes).argmax(1), labels)
        values, counts = np.unique(labels, return_counts=True)
        constant = np.full_like(labels, values[counts.argmax()])
        if task.windows is not None:
            labels = (np.asarray(encoded.candidates) != IGNORED).sum((1, 2))
            constant = -math.log(model.config.vocab) * labels
    measure = METRICS[task.metric]
    return Evaluation(
        task=task.name,
        split=split,
        head=head,
        metrics=measure(predicted, labels) | more,
        chance=float(np.mean([1 / len(example.choices or ()) for example in examples]))
        if task.choices and not generated
        else next(iter(measure(constant, labels).values())),
        n=len(encoded),
        truncated=encoded.truncated,
        generated=generated,
        calibration=prompt.calibration if prompt is not None and not generated else "none",
        windows=task.windows,
    )


def fitting_head(model: Model, task: Task, head: str | None = None) -> str:
    """The name of the task head to use: the one given, else the one of the task's name, else the only one.

    Models whose answers go on from their prompts use `words` wherever the first tokens of the words differ, others
    that answer in text use `language`.

    Raises:
        ValueError: If there is no such head, or its labels are not the task's; of a text-to-text model, if there is no
            prompt for the task, or `words` are asked for and two of them begin alike.
    """
    if (prompt := prompt_of(model, task)) is not None:
        return _reading(model, prompt, head).name
    chosen = model.head(task.name if head is None and task.name in model.heads else head)
    kind = "a regression" if task.regression else "for spans" if task.spans else "a classification"
    if chosen.kind != kind:
        raise ValueError(
            f"the head {chosen.name!r} is {chosen.kind}, but {task.name!r} is {kind}. A file's numbers are read as the "
            "head is if no labels= are given; one name in labels= makes a regression, several make classes."
        )
    if task.spans or task.regression:
        return chosen.name
    given = task.ordered and len(task.labels) == len(chosen.labels)
    places, in_order = pair_labels(task.labels, chosen.labels), tuple(range(len(chosen.labels)))
    if places != in_order and not (places is None and given):
        why = "the same in another order" if sorted(places or ()) == list(in_order) else "others"
        raise ValueError(
            f"the head {chosen.name!r} has {len(chosen.labels)} labels, {', '.join(chosen.labels)}; {task.name!r} has "
            f"{why}, {', '.join(task.labels)}. Load the task with labels= in the order of the head's, each under the "
            "name that the data has for it."
        )
    if not given and _named(task.labels) != _named(chosen.labels):
        warnings.warn(
            f"labels are paired by their places: {', '.join(task.labels)} of {task.name!r} are "
            f"{', '.join(chosen.labels)} of the head {chosen.name!r}.",
            stacklevel=2,
        )
    return chosen.name


def _named(labels: Sequence[str]) -> list[str]:
    """Names without the word that is put before numbers."""
    return [label.casefold().removeprefix("label_") for label in labels]


def _reading(model: Model, prompt: Prompt, head: str | None) -> TaskHead:
    """The head that reads the answers to a prompt."""
    if head == LANGUAGE.name or not prompt.words or (head is None and not model.continues):
        return model.head(head)
    words: dict[int, str] = {}
    for word, tokens in zip(prompt.words, encode_words(model, prompt.words), strict=True):
        other = words.setdefault(int(tokens[0]), word)
        if other != word and head is None:
            return LANGUAGE
        if other != word:
            raise ValueError(
                f"the words {other!r} and {word!r} begin with the same token, by which the head 'words' tells labels "
                "apart: choose others, or use the head 'language', which reads whole words."
            )
    return model.head(WORDS.name if head is None else head)


FREE = ("N/A", "[MASK]", "")  # texts without content, those of Zhao et al. 2021
CALIBRATED_BY = 128  # rows, unless asked otherwise


def calibrate(
    model: Model,
    params: Params,
    task: Task,
    encoded: Encoded,
    *,
    head: str | None = None,
    intervention: Intervention = Intervention(),
    batch_size: int = 32,
) -> Encoded:
    """The examples with the bias of labels that the task's prompt asks for (`Prompt.calibration`).

    "batch" subtracts from each label's log-probability among the labels its mean over 128 calibration rows, whose
    labels are not read; a task with very uneven labels loses by that. "content-free" subtracts the logarithm of its
    mean probability for texts that say nothing.

    Raises:
        ValueError: If "batch" is asked for and the task has no calibration rows.

    References:
        Zhao, Wallace, Feng, Klein and Singh, Calibrate Before Use, 2021. Zhou et al., Batch Calibration, 2024.
    """
    prompt = prompt_of(model, task)
    if prompt is None or prompt.calibration == "none":
        return encoded
    if prompt.calibration == "batch":
        rows = task.rows("calibration")
        chosen = np.random.default_rng(0).permutation(len(rows))[:CALIBRATED_BY]
        examples = [rows[i] for i in np.sort(chosen)]
        if not examples:
            raise ValueError(f"{task.name!r} has no calibration rows to calibrate the labels' words with.")
    else:
        examples = [Example(text, text if len(task.columns) == 2 else None) for text in FREE]
    read = encode(model, examples, max_length=encoded.max_length, prompt=prompt)
    logits = predict(model, params, read, head=head, intervention=intervention, batch_size=batch_size)
    shares = np.asarray(jax.nn.log_softmax(logits, axis=1))
    mean = shares.mean(0) if prompt.calibration == "batch" else np.log(np.exp(shares).mean(0))
    return replace(encoded, bias=(-mean).astype(np.float32))

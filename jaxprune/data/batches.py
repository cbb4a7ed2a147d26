"""Texts to batches: tokenised once, ahead of the device, then padded to few fixed shapes.

`encode` turns examples into token indices; `pack` and `training_batches` arrange these into *batches*: plain dicts of
NumPy arrays that all have `batch_size` rows and one of a few lengths, so that few programs are compiled. A row that
only fills up the last batch is all padding: attention mask 0, weight 0, index -1. Batching changes no result: each
example has its `index`, and padding its weight of 0.

For spans, a question comes first, then its context; only the context holds answers, and only the context is cut where
the two are too long. A row whose answer is cut off is no example to learn or to score from, and in an evaluation it is
wrong.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.data.prompts import Prompt, prompt_of
from jaxprune.data.splits import SPLITS, Window
from jaxprune.data.tasks import Example, Rows, Task, Windowing, row_key, seed_words
from jaxprune.models import Model
from jaxprune.models.cost import Length
from jaxprune.models.tokenizers import run_tokenizer

# BERT's own settings for SQuAD (Devlin et al. 2019)
MAX_SPAN_LENGTH = 384  # tokens of question and context, unless asked otherwise
QUESTION = 64  # tokens of a question at most; what comes after them is cut
LONGEST = 30  # tokens of an answer that is found, at most
UNKNOWN = -1  # the start and the end of an answer that is not among the tokens


class Tokens(NamedTuple):
    """A question and its context as tokens."""

    ids: Int[np.ndarray, " t"]
    types: Int[np.ndarray, " t"]
    characters: Int[np.ndarray, "t 2"]  # where in the context a token begins and ends; (0, 0): it is not of it
    target: tuple[int, int]  # first and last token of the first answer that is not cut off; or `UNKNOWN`
    cut: bool  # whether there was too much


def tokenise(tokenizer: Any, examples: Sequence[Example], length: int) -> list[Tokens]:
    """Tokenises questions with their contexts.

    Args:
        tokenizer: A fast Hugging Face tokenizer: others do not know the places of tokens.
        length: The most tokens of an example.

    Raises:
        ValueError: If the tokenizer is not a fast one, or the question leaves no room for the context.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where its tokens stand: spans need a fast tokenizer."
        )
    read = run_tokenizer(
        tokenizer,
        [example.text for example in examples],
        [example.pair for example in examples],
        return_offsets_mapping=True,
        return_token_type_ids=True,
        return_attention_mask=False,
        verbose=False,
    )
    rows = []
    for i, example in enumerate(examples):
        parts = np.array([-1 if part is None else part for part in read.sequence_ids(i)])
        places = np.where(parts[:, None] == 1, np.array(read["offset_mapping"][i], np.int32), 0)
        staying = _staying(parts, length)
        if (parts == 1).any() and not (parts[staying] == 1).any():
            raise ValueError(f"max_length must leave room for the context beside the question, got {length}.")
        whole = len(staying) == len(parts)
        target = _target(example, places[staying], whole)
        ids, types = (np.array(read[name][i], np.int32)[staying] for name in ("input_ids", "token_type_ids"))
        rows.append(Tokens(ids, types, places[staying], target, not whole))
    return rows


def _staying(parts: Int[np.ndarray, " t"], length: int) -> Int[np.ndarray, " k"]:
    """The tokens that stay: the first of the question, and as many of the context's first as there is room for."""
    question, context = np.flatnonzero(parts == 0), np.flatnonzero(parts == 1)
    room = length - (len(parts) - len(context) - len(question[QUESTION:]))
    return np.setdiff1d(np.arange(len(parts)), np.concatenate([question[QUESTION:], context[max(room, 0) :]]))


def _target(example: Example, places: Int[np.ndarray, "t 2"], whole: bool) -> tuple[int, int]:
    """The first and the last token of the first answer that is not cut off; if nothing is, `whole`."""
    for start, text in example.answers or ():
        first, last = start + len(text) - len(text.lstrip()), start + len(text.rstrip())  # characters
        inside = np.flatnonzero((places[:, 1] > first) & (places[:, 0] < last))
        if len(inside) and (whole or places[inside[-1], 1] >= last):
            return int(inside[0]), int(inside[-1])
    return UNKNOWN, UNKNOWN


def cut_off(examples: Sequence[Example], targets: Int[np.ndarray, "b 2"]) -> list[bool]:
    """True for every example that has answers, none of which is among its tokens."""
    pairs = zip(examples, targets, strict=True)
    return [bool(example.answers) and int(target[0]) == UNKNOWN for example, target in pairs]


def best_spans(logits: Float[Array, "b 2 t"], longest: int = LONGEST) -> Int[Array, "b 2"]:
    """The first and the last token of the span with the largest sum of its start's and its end's logit.

    It ends no earlier than it starts, and has at most `longest` tokens. Of equals the earliest, then the shortest.
    """
    tokens = logits.shape[2]
    length = jnp.arange(tokens) - jnp.arange(tokens)[:, None]  # from every start to every end
    total = logits[:, 0, :, None] + logits[:, 1, None, :]
    total = jnp.where((length >= 0) & (length < longest), total, -jnp.inf)
    best = jnp.argmax(total.reshape(len(logits), tokens * tokens), axis=1).astype(jnp.int32)
    return jnp.stack([best // tokens, best % tokens], axis=1)


@jax.jit
def find_spans(logits: Float[Array, "b 2 t"]) -> Int[Array, "b 3"]:
    """`best_spans`, compiled, and whether the logits are finite."""
    finite = jnp.isfinite(logits).all((1, 2)).astype(jnp.int32)
    return jnp.concatenate([best_spans(logits), finite[:, None]], axis=1)


def text_of(example: Example, characters: Int[np.ndarray, "t 2"], span: Sequence[int]) -> str:
    """The text of a span of tokens, as it is written in the example's context."""
    return (example.pair or "")[characters[span[0], 0] : characters[span[1], 1]]


# input_ids, attention_mask, (token_type_ids), labels, weight, index; with a prompt candidates, for spans answerable
Batch: TypeAlias = dict[str, np.ndarray]

IGNORED = -100  # no token: Hugging Face's index of what a loss leaves out
MAX_ANSWER = 32  # tokens of a label's words, end of sequence included
MAX_LENGTH = 128  # tokens, unless asked otherwise: what GLUE is usually run with
WINDOW = 512  # tokens of a window of running text, unless asked otherwise
MOST_LOGITS = 2**27  # of a batch of windows: half a gigabyte
# Beyond 32 tokens less than a third of a row is padding, and 10 shapes serve every text. BERT reads at most 512 tokens.
BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Padded tokens that cost as much as compiling one more shape: 0.7 s at 12,000 tokens/s, a forward pass of MiniLM-L6 on
# two CPU cores. A shape that saves less padding is merged into the next longer one.
SHAPE_COST = 8_192


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised examples, of which batches are made as often as needed."""

    input_ids: np.ndarray  # the tokens of all examples, end to end
    token_type_ids: np.ndarray | None  # their segments, if the tokenizer has any
    offsets: np.ndarray  # example i has the tokens offsets[i] to offsets[i + 1]
    labels: np.ndarray  # int32, or float32 in a regression; for spans [examples, 2] tokens; -1 where there is none
    max_length: int
    cut: np.ndarray  # bool, by example: whether it was cut to max_length tokens
    padding: int  # index of the padding token
    # what a model may answer, filled up with `IGNORED`: [labels, tokens], or [examples, labels, tokens] of choices
    candidates: np.ndarray | None = None
    read: np.ndarray | None = None  # [examples, labels]: how many first tokens of a candidate are read, not asked for
    characters: np.ndarray | None = None  # for spans [all tokens, 2]: the place of a token in its context, see `spans`
    continued: bool = False  # whether answers go on from their prompts, in the same stack
    bias: np.ndarray | None = None  # [labels] float32: what calibration adds to the logits of the labels' words
    most_rows: int | None = None  # of a batch, where each token of an answer has logits of the whole vocabulary

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def truncated(self) -> int:
        """The number of examples that were cut to `max_length` tokens."""
        return int(self.cut.sum())

    def warn_if_cut(self, of: str) -> None:
        """Warns of texts that were cut; `of` names them."""
        if self.truncated:
            what = f"{self.truncated:,} of {len(self):,} {of} are cut to {self.max_length} tokens (max_length)."
            warnings.warn(what, stacklevel=3)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, without padding."""
        return np.diff(self.offsets)

    @property
    def mean_length(self) -> Length:
        """Mean number of tokens of an example, without padding; for text-to-text models that of its answer, too."""
        return self.mean_length_of(len(self))

    def mean_length_of(self, count: int) -> Length:
        """The same of the first examples alone."""
        read = float(self.lengths[:count].mean())
        if self.candidates is None:
            return read
        tokens, labels = (self.candidates != IGNORED).sum(-1), self.labels[:count]
        known = labels >= 0
        if tokens.ndim == 2:
            tokens = tokens[:count]
            written = float(tokens[known, labels[known]].mean() if known.any() else tokens[tokens > 0].mean())
        else:
            written = float(tokens[labels[known]].mean() if known.any() else tokens.mean())
        return read + written - 1 if self.continued else [read, written]  # of an answer the last token is not read

    @property
    def own_choices(self) -> bool:
        """True if every example has candidates of its own."""
        return self.candidates is not None and self.candidates.ndim == 3

    def _chosen(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The candidates of some examples, cut to the longest of them, up to a power of two for few shapes."""
        assert self.candidates is not None
        chosen = self.candidates[np.asarray(rows, np.int64)]
        longest = int((chosen != IGNORED).sum(-1).max())
        return chosen[..., : 1 << (longest - 1).bit_length()]

    def take(self, rows: Sequence[int] | np.ndarray) -> Encoded:
        """Some of the examples, in this order."""
        places = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        tokens = np.concatenate(places)
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[tokens],
            offsets=np.cumsum([0, *map(len, places)]),
            labels=self.labels[rows],
            cut=self.cut[rows],
            candidates=self._chosen(rows) if self.own_choices else self.candidates,
            read=None if self.read is None else self.read[np.asarray(rows, np.int64)],
            characters=None if self.characters is None else self.characters[tokens],
        )

    def batch(self, rows: Sequence[int] | np.ndarray, length: int, batch_size: int) -> Batch:
        """Puts examples into one batch of `batch_size` rows and `length` tokens."""
        ids = np.full((batch_size, length), self.padding, np.int32)
        mask = np.zeros((batch_size, length), np.int32)
        types = np.zeros((batch_size, length), np.int32)
        answerable = np.zeros((batch_size, length), bool)
        for place, row in enumerate(rows):
            start, stop = self.offsets[row], self.offsets[row + 1]
            ids[place, : stop - start] = self.input_ids[start:stop]
            mask[place, : stop - start] = 1
            if self.token_type_ids is not None:
                types[place, : stop - start] = self.token_type_ids[start:stop]
            if self.characters is not None:
                answerable[place, : stop - start] = np.diff(self.characters[start:stop])[:, 0] > 0
        fill = batch_size - len(rows)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.token_type_ids is not None:
            batch["token_type_ids"] = types
        if self.own_choices:
            batch["candidates"] = self._chosen([*rows, *[rows[0]] * fill])
        elif self.candidates is not None:
            batch["candidates"] = np.broadcast_to(self.candidates, (batch_size, *self.candidates.shape))
        if self.read is not None:
            batch["candidates_read"] = self.read[np.asarray([*rows, *[rows[0]] * fill], np.int64)]
        if self.bias is not None:
            batch["label_bias"] = np.broadcast_to(self.bias, (batch_size, *self.bias.shape))
        if self.characters is not None:
            batch["answerable"] = answerable
        return batch | {
            "labels": np.concatenate([self.labels[rows], np.zeros((fill, *self.labels.shape[1:]), self.labels.dtype)]),
            "weight": np.repeat(np.array([1, 0], np.float32), [len(rows), fill]),
            "index": np.concatenate([np.asarray(rows, np.int32), np.full(fill, -1, np.int32)]),
        }


def digest_encoded(encoded: Encoded, examples: Sequence[Example]) -> str:
    """SHA-256 of rows in their order: their exact texts, labels and answers, and the tokens that these became."""
    rows = [(example.text, example.pair, example.label, example.answers) for example in examples]
    sha = hashlib.sha256(json.dumps(rows, default=float).encode())
    for name, value in vars(encoded).items():
        if name == "bias":  # made from other rows, by the model and the prompt
            continue
        array = np.ascontiguousarray(0 if value is None else value)
        sha.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sha.hexdigest()


def digest_rows(model: Model, task: Task, rows: Rows, split: str = "calibration") -> str:
    """`digest_encoded` of the rows that are given, or of the whole split they are drawn from, as a model reads them."""
    examples = rows.examples if isinstance(rows.examples, tuple) else task.rows(rows.split or split)
    if not examples:
        return hashlib.sha256().hexdigest()
    return digest_encoded(encode(model, examples, max_length=rows.max_length, prompt=prompt_of(model, task)), examples)


class Batches(Sequence[Batch]):
    """Batches that are put together on demand."""

    def __init__(self, encoded: Encoded, plan: list[tuple[np.ndarray, int]], batch_size: int) -> None:
        self.encoded, self.plan, self.batch_size = encoded, plan, batch_size

    def __len__(self) -> int:
        return len(self.plan)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> Batch | Batches:
        if isinstance(index, slice):
            return Batches(self.encoded, self.plan[index], self.batch_size)
        rows, length = self.plan[index]
        return self.encoded.batch(rows, length, self.batch_size)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The different shapes (rows, tokens), by length."""
        return tuple((self.batch_size, length) for length in sorted({length for _, length in self.plan}))


def encode(
    model_or_tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    prompt: Prompt | None = None,
) -> Encoded:
    """Tokenises examples. A longer text is truncated (of a pair, the longer one first) and counted.

    Of questions and their contexts the context is truncated, and a label is the first and the last token of the first
    answer that is not cut off, or -1 and -1.

    Args:
        model_or_tokenizer: A model, or a Hugging Face tokenizer.
        max_length: The most tokens of an example, special ones included; None is `default_length`.
        prompt: The prompt of a text-to-text model, fitted to the task. Its own words are never cut.

    Raises:
        ValueError: If there is no example, if only some have a label or a second text, or if the model has fewer
            positions than `max_length`; if a text-to-text model has no prompt, a word of the prompt no tokens of its
            own, or the tokenizer is not the model's.
    """
    tokenizer, most, model = _reader(model_or_tokenizer)
    if not examples:
        raise ValueError("there are no examples to tokenise.")
    if prompt is None and model is not None and model.answers_in_text:
        raise ValueError("the model answers in text: say with prompt= what it is asked, see jaxprune.data.prompts.")
    paired = _all_or_none([example.pair is not None for example in examples], "second text")
    labelled = _all_or_none([example.label is not None for example in examples], "label")
    answered = _all_or_none([example.answers is not None for example in examples], "answers")
    choosing = _all_or_none([example.choices is not None for example in examples], "choices")
    if _all_or_none([example.window is not None for example in examples], "window"):
        return _encode_windows(model, [example.window for example in examples if example.window], max_length)
    if choosing and (prompt is None or model is None or not model.continues):
        raise ValueError("the examples have choices, which are to follow their texts: use a decoder.")
    if answered and not paired:
        raise ValueError("the examples have answers, but no second text: give the context that they are in.")
    if answered and prompt is not None:
        raise ValueError("the examples have answers, and a prompt asks for labels: use a model with a head for spans.")
    length = default_length(model_or_tokenizer, answered or choosing) if max_length is None else max_length
    special = tokenizer.num_special_tokens_to_add(pair=paired and prompt is None)
    if length > most:
        raise ValueError(
            f"max_length is {length}, but the model has only {most} positions; longer texts are cut anyway."
        )
    if length <= special:
        raise ValueError(f"max_length must exceed the {special} special tokens of an example, got {length}.")
    candidates = together = suffixed = None
    if choosing:
        suffixes = [example.suffix for example in examples]
        candidates, suffixed = _encode_choices(tokenizer, [example.choices or () for example in examples], suffixes)
        length = min(length, most + 1 - candidates.shape[2])
        if length <= special:
            raise ValueError(f"a choice has {candidates.shape[2]} tokens, the model reads {most} in all.")
        together = max(1, MOST_LOGITS // (candidates.shape[2] * len(tokenizer)))
    elif prompt is not None:
        candidates = encode_words(model_or_tokenizer, prompt.words)
    characters, labels = None, [example.label for example in examples] if labelled else [-1] * len(examples)
    if answered:
        rows = tokenise(tokenizer, examples, length)
        ids, types, characters, labels, cut = zip(*rows, strict=True)
    elif prompt is not None:
        rendered = [prompt.render(example) for example in examples]  # a choice brings its own space
        ids, _ = _tokenise(tokenizer, [text.rstrip(" ") if choosing else text for text in rendered])
        cut = [len(row) > length for row in ids]
        ids = [
            row
            if not long
            else np.concatenate([row[:special], row[special - length :]])
            if choosing  # they follow its end
            else _shortened(tokenizer, prompt, example, length)
            for row, example, long in zip(ids, examples, cut, strict=True)
        ]
        types = [np.zeros_like(row) for row in ids]
    else:
        texts = [(example.text, example.pair) for example in examples]
        ids, types = _tokenise(tokenizer, *_columns(texts))
        cut = [len(row) > length for row in ids]
        if any(cut):
            shorter = _tokenise(tokenizer, *_columns(list(itertools.compress(texts, cut))), length)
            for place, row, segments in zip(np.flatnonzero(cut), *shorter, strict=True):
                ids[place], types[place] = row, segments
    return Encoded(
        input_ids=np.concatenate(ids),
        token_type_ids=np.concatenate(types) if "token_type_ids" in tokenizer.model_input_names else None,
        offsets=np.cumsum([0, *map(len, ids)]),
        labels=np.array(labels, np.float32 if any(isinstance(label, float) for label in labels) else np.int32),
        max_length=length,
        cut=np.array(cut),
        padding=tokenizer.pad_token_id or 0,
        candidates=candidates,
        read=suffixed,
        characters=None if characters is None else np.concatenate(characters),
        continued=model is not None and model.continues,
        most_rows=together,
    )


def _encode_windows(model: Model | None, given: Sequence[Window], max_length: int | None) -> Encoded:
    """Windows as examples: what they only read is the prompt, what they are asked for its one candidate."""
    if model is None or not model.continues:
        raise ValueError("the examples are windows of running text: use a decoder.")
    longest = max(len(window.read) + len(window.asked) for window in given)
    if longest > (model.max_length if max_length is None else max_length):
        raise ValueError(f"the windows have up to {longest} tokens: cut shorter ones instead of setting max_length.")
    asked = max(len(window.asked) for window in given)
    candidates = np.full((len(given), 1, asked), IGNORED, np.int32)
    for row, window in zip(candidates, given, strict=True):
        row[0, : len(window.asked)] = window.asked
    read = [len(window.read) for window in given]
    return Encoded(
        input_ids=np.concatenate([np.array(window.read, np.int32) for window in given]),
        token_type_ids=None,
        offsets=np.cumsum([0, *read]),
        labels=np.zeros(len(given), np.int32),
        max_length=max(read),
        cut=np.zeros(len(given), bool),
        padding=model.config.pad_id,
        candidates=candidates,
        continued=True,
        most_rows=max(1, MOST_LOGITS // (asked * model.config.vocab)),
    )


def windows(model: Model, task: Task, *, tokens: int | None = None, stride: int | None = None) -> Task:
    """Cuts running text into windows, which are the examples that a decoder is scored, repaired and evaluated on.

    The passages of a split are joined by blank lines and tokenised as one text. Every window begins with the
    tokenizer's BOS if it puts one before a text; otherwise the first token of the text, and of every window that does
    not overlap the one before, is read but not asked for. The last window may be shorter.

    Args:
        model: A decoder with its tokenizer.
        task: One of running text, see `load_task`.
        tokens: Tokens of a window, BOS included; None: 512, or all that the model reads.
        stride: Tokens from the beginning of one window to that of the next. None: windows do not overlap. Fewer give
            every token that is asked for more to go by, and cost as many times more.

    Returns:
        The task with windows as examples, each with one label, 0.

    Raises:
        ValueError: If the task is not running text or already cut, the model is no decoder, or a number is out of
            range.
    """
    if not task.running or task.windows is not None:
        raise ValueError(f"{task.name!r} {'is cut into windows already' if task.running else 'is no running text'}.")
    if not model.continues:
        raise ValueError(f"running text is for decoders, and this is a {model.config.model_type} model.")
    tokenizer = model.tokenizer
    first = run_tokenizer(tokenizer, [""], verbose=False)["input_ids"][0]
    bos = [tokenizer.bos_token_id] if first and first[0] == tokenizer.bos_token_id else []
    tokens = min(WINDOW, model.max_length) if tokens is None else tokens
    if not 2 <= tokens <= model.max_length:
        raise ValueError(f"a window has 2 to {model.max_length} tokens, got {tokens}.")
    new = tokens - len(bos)
    stride = new if stride is None else stride
    if not 1 <= stride <= new:
        raise ValueError(f"the stride must lie in 1 to {new}, the tokens of a window, got {stride}.")
    cut = {split: _cut(tokenizer, task.rows(split), bos, new, stride) if task.rows(split) else () for split in SPLITS}
    return replace(task, splits=cut, windows=Windowing(tokens, stride, bool(bos)))


def _cut(tokenizer: Any, passages: Sequence[Example], bos: list[int], new: int, stride: int) -> tuple[Example, ...]:
    text = "\n\n".join(passage.text for passage in passages)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not say where its tokens stand: use a fast tokenizer.")
    read = run_tokenizer(tokenizer, [text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = read["input_ids"][0], read["offset_mapping"][0]
    examples, begin = [], 0 if bos else 1
    for start in range(0, len(ids), stride):
        end = min(start + new, len(ids))
        begin = max(begin, start if bos else start + 1)
        if begin < end:
            window = Window((*bos, *ids[start:begin]), tuple(ids[begin:end]))
            examples.append(Example(text[places[begin][0] : places[end - 1][1]], label=0, window=window))
        if end == len(ids):
            break
        begin = end
    return tuple(examples)


def _reader(model_or_tokenizer: Any) -> tuple[Any, int, Model | None]:
    """The tokenizer, the most tokens that can be read, and the model if there is one."""
    if isinstance(model_or_tokenizer, Model):
        return model_or_tokenizer.tokenizer, model_or_tokenizer.max_length, model_or_tokenizer
    return model_or_tokenizer, model_or_tokenizer.model_max_length, None


def default_length(model_or_tokenizer: Any, answers: bool) -> int:
    """The default limit of tokens per example: 128, with answers in a context 384, or what the model reads."""
    return min(MAX_SPAN_LENGTH if answers else MAX_LENGTH, _reader(model_or_tokenizer)[1])


class UsableRows(NamedTuple):
    """The rows of a split that training and scoring can use."""

    task: Task  # the task with these rows alone in the split
    cut_off: int  # how many rows were left out because their answers are cut off; 0 without spans
    encode: Callable[[Sequence[Example]], Encoded]  # tokenises some of them, those for spans only once


def usable_rows(model: Model, task: Task, rows: Rows, *, split: str = "calibration") -> UsableRows:
    """Finds the usable rows of a split: every use of a task's rows except evaluation begins here.

    Rows in `rows.exclude` are left out. For span tasks, so are those whose answers are all cut off: what is left of
    their contexts holds nothing to learn or to score from. Rows that are given are taken as they are.

    Args:
        rows: The settings; how many are drawn is up to the caller.
        split: The split unless the settings name one.

    Raises:
        ValueError: If the answers of all rows are cut off, or the model has no prompt for the task.
    """
    read = partial(encode, model, max_length=rows.max_length, prompt=prompt_of(model, task))
    if isinstance(rows.examples, tuple):
        return UsableRows(task, 0, read)
    split, excluded = rows.split or split, frozenset(rows.exclude)
    examples = task.rows(split)
    if excluded:
        examples = tuple(row for row in examples if row_key(row) not in excluded)
        task = replace(task, splits={**task.splits, split: examples})
    if not task.spans or not examples:
        return UsableRows(task, 0, read)
    encoded = read(examples)
    lost = cut_off(examples, encoded.labels)
    if all(lost):
        raise ValueError(f"the answers of all {split} rows of {task.name!r} are cut off: raise max_length.")
    whole = tuple(row for row, cut in zip(examples, lost, strict=True) if not cut)
    places = {example: place for place, example in enumerate(examples)}
    return UsableRows(
        replace(task, splits={**task.splits, split: whole}),
        sum(lost),
        lambda chosen: encoded.take([places[example] for example in chosen]),
    )


def encode_words(model_or_tokenizer: Any, words: Sequence[str]) -> np.ndarray:
    """The tokens of the words that a text-to-text model may answer, `[labels, tokens]`, with their end if it has one.

    Raises:
        ValueError: If there are no words, one has no tokens or unknown ones, is longer than 32 tokens, or two have the
            same tokens; or if the tokenizer's special tokens are not those of the model.
    """
    tokenizer, _, model = _reader(model_or_tokenizer)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = model is None or model.config.ends_answers
    if model is not None and ends and ((end,), padding) != (model.config.end_ids, model.config.pad_id):
        raise ValueError(
            f"the tokenizer ends a text with {end} and pads with {padding}, the model with "
            f"{model.config.end_ids[0]} and {model.config.pad_id}: is this its tokenizer?"
        )
    if model is not None and len(tokenizer) > model.config.vocab:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model {model.config.vocab:,}: is this its own?"
        )
    if not words:
        raise ValueError("the prompt has no words to answer with: give one per label.")
    known: dict[tuple[int, ...], str] = {}
    for word in words:
        tokens = tuple(run_tokenizer(tokenizer, word, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise ValueError(f"the word {word!r} has no tokens: choose another one for its label.")
        if tokenizer.unk_token_id in tokens:
            raise ValueError(f"the word {word!r} has characters that the tokenizer does not know: choose another one.")
        if len(tokens) >= MAX_ANSWER:
            raise ValueError(f"the word {word[:40]!r} has {len(tokens)} tokens, at most {MAX_ANSWER - 1} are possible.")
        if tokens in known:
            raise ValueError(f"the words {known[tokens]!r} and {word!r} have the same tokens: choose others.")
        known[tokens] = word
    candidates = np.full((len(known), max(map(len, known)) + ends), IGNORED, np.int32)
    for row, tokens in zip(candidates, known, strict=True):
        row[: len(tokens) + ends] = (*tokens, end) if ends else tokens
    return candidates


def _encode_choices(
    tokenizer: Any, choices: Sequence[Sequence[str]], suffixes: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens of every example's choices, each after a space and before its suffix; `[examples, choices, tokens]`.

    Also, where there are suffixes, how many tokens come before them; `[examples, choices]`.
    """
    suffixed = _all_or_none([suffix is not None for suffix in suffixes], "suffix")

    def tokens(texts: Sequence[str | None]) -> list[list[int]]:
        spaced = [f" {(text or '').lstrip()}" for text in texts]
        ids = run_tokenizer(tokenizer, spaced, add_special_tokens=False, padding=False, verbose=False)["input_ids"]
        if not all(ids):
            raise ValueError(f"the choice {spaced[[bool(row) for row in ids].index(False)]!r} has no tokens.")
        return ids

    ends = tokens(suffixes) if suffixed else [[]] * len(choices)
    ids = iter(tokens([choice for some in choices for choice in some]))
    rows = [[(own, end) for _, own in zip(some, ids, strict=False)] for some, end in zip(choices, ends, strict=True)]
    longest = max(len(own) + len(end) for some in rows for own, end in some)
    candidates = np.full((len(choices), max(map(len, choices)), longest), IGNORED, np.int32)
    read = np.zeros(candidates.shape[:2], np.int32)
    for example, before, some in zip(candidates, read, rows, strict=True):
        for label, (own, end) in enumerate(some):
            example[label, : len(own) + len(end)] = own + end
            before[label] = len(own)
    return candidates, read if suffixed else None


def _shortened(tokenizer: Any, prompt: Prompt, example: Example, length: int) -> np.ndarray:
    """The tokens of a prompt with its longer text cut at the end until all of it fits."""
    texts = [example.text] if example.pair is None else [example.text, example.pair]
    while True:
        (tokens,), _ = _tokenise(tokenizer, [prompt.render(Example(texts[0], texts[1] if len(texts) == 2 else None))])
        excess = len(tokens) - length
        if excess <= 0:
            return tokens
        sizes = [len(run_tokenizer(tokenizer, text, add_special_tokens=False)["input_ids"]) for text in texts]
        longest = int(np.argmax(sizes))
        if not sizes[longest]:
            raise ValueError(f"the prompt alone has {len(tokens)} tokens, max_length is {length}: make that longer.")
        text = texts[longest]
        places = run_tokenizer(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        begin, _ = places[max(0, len(places) - excess)]
        texts[longest] = text[: min(begin, len(text) - 1)]  # always shorter, whatever the tokenizer says


def _all_or_none(have: list[bool], what: str) -> bool:
    if any(have) and not all(have):
        raise ValueError(f"example {have.index(False)} has no {what}, but others have; give all or none.")
    return have[0]


def _columns(texts: Sequence[tuple[str, str | None]]) -> tuple[list[str], list[Any] | None]:
    """First and second texts; None if there are no second ones."""
    first, second = map(list, zip(*texts, strict=True))
    return first, None if second[0] is None else second


def _tokenise(
    tokenizer: Any, texts: list[str], pairs: list[Any] | None = None, max_length: int | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token indices and segments of each text. Without `max_length` nothing is cut, whatever the tokenizer says."""
    read = run_tokenizer(
        tokenizer,
        texts,
        pairs,
        padding=False,
        truncation=max_length is not None,
        max_length=max_length,
        return_token_type_ids=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids, types = ([np.array(row, np.int32) for row in read[name]] for name in ("input_ids", "token_type_ids"))
    return ids, types


def _shapes(lengths: np.ndarray, buckets: Sequence[int], max_length: int, shape_cost: int) -> np.ndarray:
    """The length to which each row is padded: those buckets for which padding and compiling together cost least."""
    steps = np.array(sorted({bucket for bucket in buckets if 0 < bucket < max_length} | {max_length}))
    shortest = np.searchsorted(steps, lengths)  # the shortest bucket that holds the row
    last = int(shortest.max())
    rows = np.concatenate([[0], np.cumsum(np.bincount(shortest, minlength=last + 1))])
    # cheapest[j]: cost of all rows that fit in fewer than j buckets, the last of them being used; dynamic programming
    cheapest, before = [0.0], [0]
    for j in range(1, last + 2):
        costs = [cheapest[i] + float((rows[j] - rows[i]) * steps[j - 1]) + shape_cost for i in range(j)]
        before.append(int(np.argmin(costs)))
        cheapest.append(min(costs))
    used, j = [], last + 1
    while j > 0:
        used.append(int(steps[j - 1]))
        j = before[j]
    chosen = np.array(used[::-1])
    return chosen[np.searchsorted(chosen, lengths)]


def _plan(order: np.ndarray, padded: np.ndarray, batch_size: int) -> list[tuple[np.ndarray, int]]:
    """Cuts the rows, longest shape first, into batches; only the last one is incomplete.

    A batch that the rows of one shape do not fill takes rows of the next shorter one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    order = order[np.argsort(-padded[order], kind="stable")]
    cuts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [(rows, int(padded[rows[0]])) for rows in cuts]


def pack(
    encoded: Encoded,
    *,
    batch_size: int = 32,
    buckets: Sequence[int] = BUCKETS,
    shape_cost: int = SHAPE_COST,
    steps: Sequence[int] = (),
) -> Batches:
    """Arranges examples into batches in a fixed order, the longest first: what does not fit in memory fails at once.

    Args:
        buckets: Lengths to choose from; `max_length` is always one.
        shape_cost: Padded tokens that one more shape must save. 0 uses every bucket.
        steps: Numbers of examples, growing. The batches of the first so many come before those of the others, which all
            have the same shapes.
    """
    if encoded.most_rows is not None:
        batch_size = max(1, min(batch_size, encoded.most_rows))
    padded = _shapes(encoded.lengths, buckets, encoded.max_length, shape_cost)
    parts = np.split(np.arange(len(encoded)), list(steps))
    return Batches(encoded, [batch for rows in parts for batch in _plan(rows, padded, batch_size)], batch_size)


def make_batches(
    model_or_tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    prompt: Prompt | None = None,
) -> list[Batch]:
    """`encode`, then `pack`: the batches of some examples, all at once."""
    return list(pack(encode(model_or_tokenizer, examples, max_length=max_length, prompt=prompt), batch_size=batch_size))


def training_batches(
    encoded: Encoded,
    *,
    batch_size: int,
    key: int | jax.Array,
    epoch: int,
    shape_cost: int = SHAPE_COST,
) -> Batches:
    """The batches of one epoch: rows shuffled within their shape, then the batches shuffled.

    A function of its arguments alone, so an interrupted epoch can be resumed. Each epoch, counted from 0, has another
    order and the same shapes. `key` is a seed or a `jax.random.key`, `shape_cost` as of `pack`.
    """
    generator = np.random.default_rng([epoch, *seed_words(key)])
    padded = _shapes(encoded.lengths, BUCKETS, encoded.max_length, shape_cost)
    plan = _plan(generator.permutation(len(encoded)), padded, batch_size)
    return Batches(encoded, [plan[i] for i in generator.permutation(len(plan))], batch_size)


def tokens_needed(model: Any, tasks: Sequence[Task], rows: Rows) -> np.ndarray:
    """Counts each token in the rows of some tasks, those of test aside, and in their answers: `[vocab]`."""
    counts = np.zeros(model.config.vocab, np.int64)
    for task in tasks:
        for split in ("train", "calibration", "dev"):
            if not task.rows(split):
                continue
            encoded = usable_rows(model, task, rows).encode(task.rows(split))
            counts += np.bincount(encoded.input_ids, minlength=len(counts))
            if encoded.candidates is not None:
                answers = encoded.candidates[encoded.candidates >= 0]
                counts += np.bincount(answers, minlength=len(counts))
    return counts


def tokens_changed(model: Any, small: Any, kept: np.ndarray, tasks: Sequence[Task], rows: Rows) -> dict[str, Any]:
    """Compares rows for testing under two vocabularies: how many are split as before, and the share of unknown tokens.

    Args:
        model: The model with all tokens.
        small: The model with those that were `kept`.
        kept: The indices that they had.
        tasks: Their rows, a thousand at most of each.
        rows: How rows are read.
    """
    same, unknown, total = 0, np.zeros(2), np.zeros(2)
    count = 0
    for task in tasks:
        tested = task.rows("test")[:1000]
        if not tested:
            continue
        pair = [usable_rows(each, task, rows).encode(tested) for each in (model, small)]
        pieces = [np.split(each.input_ids, each.offsets[1:-1]) for each in pair]
        same += sum(np.array_equal(one, kept[other]) for one, other in zip(*pieces, strict=True))
        count += len(tested)
        for i, (each, encoded) in enumerate(zip((model, small), pair, strict=True)):
            unknown[i] += np.count_nonzero(encoded.input_ids == each.tokenizer.unk_token_id)
            total[i] += len(encoded.input_ids)
    shares = (unknown / np.maximum(total, 1)).tolist()
    return {"tested": count, "as_before": same / max(count, 1), "unknown": {"before": shares[0], "after": shares[1]}}

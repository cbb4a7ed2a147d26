"""Spans among tokens: questions and contexts tokenised, the tokens of an answer, and the likeliest span.

A question comes first, then its context; only the context holds answers, and only the context is cut where the two are
too long. A row whose answer is cut off is no example to learn or to score from, and in an evaluation it is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.data.splits import Example

# BERT's own settings for SQuAD (Devlin et al. 2019)
MAX_LENGTH = 384  # tokens of question and context, unless asked otherwise
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
        examples: Question, context and answers.
        length: The most tokens of an example.

    Raises:
        ValueError: If the tokenizer is not a fast one, or the question leaves no room for the context.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where its tokens stand: spans need a fast tokenizer."
        )
    read = tokenizer(
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

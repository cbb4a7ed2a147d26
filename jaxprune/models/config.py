"""A configuration read setting by setting, listing all that does not fit, and the task heads it describes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxprune.models.layers import ACTIVATIONS, Affine, dropout

_REQUIRED = object()  # a setting that has no default


def is_number(value: Any) -> bool:
    """True if a value of a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """True if a value of a JSON file is an integer of at least 0, small enough for an index."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


class ConfigReader:
    """Reads a configuration value by value, and collects what is wrong with it.

    Args:
        raw: The content of `config.json`.
        supported: The values that settings which change the computation may have, where they are there at all.
    """

    def __init__(self, raw: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]):
        self.raw = raw
        self.problems = [
            f"{name} is {raw[name]!r}, supported: {', '.join(map(repr, values))}"
            for name, values in supported.items()
            if name in raw and raw[name] not in values
        ]

    def get(self, name: str, fits: Callable[[Any], bool], expected: str, default: Any = _REQUIRED) -> Any:
        """A value, which must fit; `default` if the file has none."""
        value = self.raw.get(name, default)
        if value is _REQUIRED:
            self.problems.append(f"{name} is missing")
            return None
        self.expect(name, value, fits(value), expected)
        return value

    def expect(self, name: str, value: Any, fits: bool, expected: str) -> None:
        """Records a value that does not fit."""
        if not fits:
            self.problems.append(f"{name} is {value!r}, expected {expected}")

    def size(self, name: str, default: Any = _REQUIRED) -> Any:
        """A positive integer."""
        return self.get(name, lambda value: is_count(value) and value > 0, "a positive integer", default)

    def rate(self, name: str, default: Any) -> Any:
        """A dropout rate."""
        return self.get(name, lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)", default)

    def eps(self, name: str, default: float) -> Any:
        """The constant that keeps a norm finite."""
        return self.get(name, lambda value: is_number(value) and 0 < value < 1, "a small positive number", default)

    def activation(self, name: str, default: str) -> Any:
        """The name of a non-linearity."""
        known = f"one of {', '.join(ACTIVATIONS)}"
        return self.get(name, lambda value: isinstance(value, str) and value in ACTIVATIONS, known, default)

    def check(self) -> None:
        """Refuses the configuration if anything was wrong.

        Raises:
            ValueError: Listing all of it.
        """
        if self.problems:
            problems = "; ".join(dict.fromkeys(self.problems))
            raise ValueError(f"config.json of a {self.raw['model_type']} model cannot be used: {problems}.")


ENDS = ("start", "end")  # the labels of a head for spans
NOWHERE = -1e9  # the logit of a token that no span may start or end at: finite, so that sums of logits are numbers
POOLINGS = ("first", "mean", "last", "none")


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """A classifier or regressor on hidden states, or a marker of the start and the end of a span."""

    name: str
    labels: tuple[str, ...]  # one name per logit; ("start", "end") of spans
    regression: bool = False
    pooling: str = "first"  # the vector of the "first" or "last" token, the "mean" over tokens; "none": spans
    dense: str | None = None  # activation of the layer before the output; None: there is none

    @property
    def spans(self) -> bool:
        """True if every token has its logits, for a span's start and end."""
        return self.pooling == "none"

    @property
    def kind(self) -> str:
        """The head's purpose, in words."""
        return "a regression" if self.regression else "for spans" if self.spans else "a classification"


# The task head of a model that answers in text: the next token, one logit per entry of the vocabulary.
LANGUAGE = TaskHead(name="language", labels=())


def check_heads(heads: Sequence[TaskHead]) -> None:
    """Refuses task heads that a model cannot have.

    Raises:
        ValueError: If two heads share a name or a head is not usable.
    """
    names = Counter(head.name for head in heads)
    for head in heads:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", head.name) or names[head.name] > 1:
            raise ValueError(
                f"task head {head.name!r}: names must differ and be made of letters, digits, _ and -, letter first."
            )
        if not head.labels or (head.regression and len(head.labels) != 1):
            raise ValueError(f"task head {head.name!r} has {len(head.labels)} labels.")
        if head.pooling not in POOLINGS:
            choices = f"{', '.join(map(repr, POOLINGS[:-1]))} or {POOLINGS[-1]!r}"
            raise ValueError(f"task head {head.name!r}: pooling must be {choices}, got {head.pooling!r}.")
        if head.spans and (head.labels != ENDS or head.regression):
            raise ValueError(f"task head {head.name!r} is for spans: its labels are {ENDS}, got {head.labels}.")
        if head.dense is not None and head.dense not in ACTIVATIONS:
            raise ValueError(f"task head {head.name!r}: dense must be None or an activation, got {head.dense!r}.")


class Classifier(nnx.Module):
    """A task head on the pooled hidden state, or for spans on that of every token."""

    def __init__(self, embed: int, head: TaskHead, rate: float, *, rngs: nnx.Rngs):
        if head.dense is not None:
            self.dense = Affine((embed, embed), (embed,), rngs=rngs)
        self.out = Affine((embed, len(head.labels)), (len(head.labels),), rngs=rngs)
        self.activation = head.dense
        self.pooling = head.pooling
        self.rate = 0.0 if head.spans else rate  # BERT's own head for SQuAD drops nothing

    def __call__(
        self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"], key: Array | None
    ) -> Float[Array, "b l"] | Float[Array, "b l t"]:
        pooled = pool(hidden.astype(jnp.float32), mask, self.pooling)
        if self.activation is not None:
            pooled = ACTIVATIONS[self.activation](self.dense(pooled))
        logits = self.out(dropout(pooled, self.rate, key))
        return jnp.where(mask[:, None], logits.swapaxes(1, 2), NOWHERE) if self.pooling == "none" else logits


def pool(hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"], pooling: str) -> Float[Array, "b *t d"]:
    """One vector per example, as `TaskHead.pooling` says; with "none" the hidden states themselves."""
    if pooling == "none":
        return hidden
    if pooling == "mean":
        tokens = jnp.maximum(mask.sum(1, keepdims=True), 1).astype(jnp.float32)
        return jnp.where(mask[..., None], hidden, 0.0).sum(1) / tokens
    if pooling == "last":
        last = jnp.where(mask, jnp.arange(mask.shape[1]), 0).max(1)  # of a row without tokens the first
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return hidden[:, 0]

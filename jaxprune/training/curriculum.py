"""What a student learns, and from which layers, heads and widths of its teacher.

A *layer map* is a function of the two depths that gives, for each layer of the student, the teacher's layer it learns
from. Attention scores are compared head by head, so a student that has lost heads says which are left. Hidden states of
another width are compared through a *projection*: two matrices that are trained with the student, and dropped before it
is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array

from jaxprune.models import Model
from jaxprune.units import Params

# (layers of the student, of the teacher) -> for each of the student's the teacher's, rising; None learns from none
LayerMap: TypeAlias = Callable[[int, int], Sequence[int | None]]

PROJECTION = "projection"  # where the matrices stand, beside the student's parameters
WEIGHTS = ("attention", "embeddings", "hidden", "logits", "labels")  # of `Distillation`, in the order of its fields


def one_to_one(student: int, teacher: int) -> tuple[int, ...]:
    """Every layer learns from the one in its place.

    Raises:
        ValueError: If the depths differ.
    """
    if student != teacher:
        raise ValueError(
            f"the student has {student} layers, the teacher {teacher}: choose a layer map such as uniform or last."
        )
    return tuple(range(student))


def uniform(student: int, teacher: int) -> tuple[int, ...]:
    """The teacher's layers at equal distances, its last one included: of 12 the layers 3, 7 and 11.

    Raises:
        ValueError: If the student is deeper than the teacher.

    References:
        Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
    """
    _check_depths(student, teacher)
    return tuple((i + 1) * teacher // student - 1 for i in range(student))


def last(student: int, teacher: int) -> tuple[int, ...]:
    """The teacher's last layers.

    Raises:
        ValueError: If the student is deeper than the teacher.
    """
    _check_depths(student, teacher)
    return tuple(range(teacher - student, teacher))


def _check_depths(student: int, teacher: int) -> None:
    if student > teacher:
        raise ValueError(f"the student has {student} layers, the teacher only {teacher}: write your own layer map.")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a student learns: the weight of each loss. A loss of weight 0 is not computed.

    The defaults are those of SparseBERT (`sparse_bert`): every weight 1, temperature 1, no hard labels.

    With `real` entries those whose tokens, as query and as key, are not padding, and in examples of weight above 0:

    - `attention`: the sum over the layers of the mean squared error of the attention scores, scaled, before mask and
      softmax, over the real entries of all heads. A decoder's layers have two such terms, for their attention to
      themselves, with no key after the query, and to the encoder.
    - `embeddings`: the same of the embedding output, over the real entries `[b, t, d]`.
    - `hidden`: the sum over the layers of the same of their outputs.
    - `logits`: the mean over the examples of `soft_cross_entropy`, in a regression of the squared error; of a
      text-to-text model the mean over the tokens of the answers.
    - `labels`: the mean of the loss towards the hard labels, over the examples that have one: cross-entropy, in a
      regression the squared error; of a text-to-text model over the tokens of the right answers.
    """

    attention: float = 1.0
    embeddings: float = 1.0
    hidden: float = 1.0
    logits: float = 1.0
    labels: float = 0.0
    temperature: float = 1.0  # of `logits`
    layers: LayerMap = one_to_one

    def __post_init__(self):
        given = {name: getattr(self, name) for name in WEIGHTS}
        if not all(np.isfinite(weight) and weight >= 0 for weight in given.values()) or not any(given.values()):
            raise ValueError(f"weights must be at least 0, finite, and one of them positive, got {given}.")
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive, got {self.temperature}.")

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by name."""
        return {name: getattr(self, name) for name in WEIGHTS if getattr(self, name)}

    @classmethod
    def sparse_bert(cls, *, regression: bool = False) -> Distillation:
        """The joint loss of SparseBERT: all four at once; in a regression the hard label in place of the logits.

        The released code differs from the paper's text, and from this: it divides by padded entries, too, counts the
        scores of padded queries and the hidden states of padded tokens, and divides the soft cross-entropy by the
        number of labels (`Distillation(logits=1 / labels)`).

        References:
            Xu, Yen, Zhao and Xiao, Rethinking Network Pruning under the Pre-train and Fine-tune Paradigm, 2021.
        """
        return cls(logits=0.0, labels=1.0) if regression else cls()


def match_layers(layers: LayerMap, model: Model, teacher_model: Model) -> dict[str, str | None]:
    """Which of the teacher's layers each of the student's learns from, by name; the map is asked once per stack.

    Raises:
        ValueError: If one has other stacks than the other, or the map is not one of these layers.
    """
    ours, theirs = model.stacks, teacher_model.stacks
    if [stack.name for stack in ours] != [stack.name for stack in theirs]:
        raise ValueError("student and teacher must both be encoders or both text-to-text models.")
    found: dict[str, str | None] = {}
    for own, other in zip(ours, theirs, strict=True):
        places = tuple(layers(own.layers, other.layers))
        used = [place for place in places if place is not None]
        if len(places) != own.layers or used != sorted(set(used)) or not set(used) <= set(range(other.layers)):
            raise ValueError(
                f"a layer map must give {own.layers} rising numbers below {other.layers} (or None), got {places}."
            )
        prefix = f"{own.name}." if own.name else ""
        found |= {f"{prefix}{i}": None if p is None else f"{prefix}{p}" for i, p in enumerate(places)}
    return found


def surviving_heads(record: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Which heads of the dense model a pruned one has, from the record of one pruning.

    Args:
        record: What `pruning_record` returns, or `read_pruning` reads from a folder.

    Returns:
        For every site of heads (`"3.attention.heads"`) the indices in the dense model.

    Raises:
        ValueError: If the record has no sites.
    """
    if "sites" not in record:
        raise ValueError(f"a record of a pruning has 'sites', this one has {sorted(record)}.")
    return {name: tuple(_numbers(site["which"])) for name, site in record["sites"].items() if name.endswith(".heads")}


def _numbers(ranges: str) -> Iterator[int]:
    """The numbers of `0-3,7`."""
    for run in filter(None, ranges.split(",")):
        first, _, end = run.partition("-")
        yield from range(int(first), int(end or first) + 1)


def head_index(name: str, ours: int, theirs: int, heads: Mapping[str, Sequence[int]]) -> np.ndarray | None:
    """The teacher's heads that those of one site of the student learn from; None: all, in order.

    Raises:
        ValueError: If that is not known, or does not fit.
    """
    if name not in heads:
        if ours == theirs:
            return None
        raise ValueError(
            f"{name}: the student has {ours} heads, the teacher {theirs}. Say which are left with "
            "heads=surviving_heads(record), or leave attention scores out with attention=0."
        )
    index = np.asarray(heads[name], np.int32).reshape(-1)
    if len(index) != ours or (ours and not 0 <= index.min() <= index.max() < theirs):
        raise ValueError(f"{name}: heads must name {ours} of the teacher's {theirs} heads, got {list(heads[name])}.")
    return None if np.array_equal(index, np.arange(theirs)) else index


def initialise_projection(model: Model, teacher_model: Model, key: Array) -> Params:
    """Random matrices from the student's width to the teacher's, for a student of another width.

    Train `params | {"projection": ...}` in place of `params`.

    Args:
        model: The student.
        teacher_model: The teacher.
        key: The randomness.

    Returns:
        Two matrices `[student's width, teacher's width]`, as in TinyBERT: one for the embedding output, and one for the
        outputs of all layers.
    """
    shape = model.config.embed, teacher_model.config.embed
    scale = shape[0] ** -0.5  # what is projected keeps its size
    keys = jax.random.split(key)
    return {name: scale * jax.random.normal(k, shape) for name, k in zip(("embeddings", "hidden"), keys, strict=True)}


def without_projection(student: Params) -> Params:
    """The student's own parameters: what to evaluate and to save."""
    return {name: own for name, own in student.items() if name != PROJECTION}

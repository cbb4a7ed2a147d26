"""What a criterion asks a model: for which labels or answers of a batch the objective is attributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.evaluation.likelihood import candidates_in, candidates_of, rank, teacher_forced, without_end
from jaxprune.models import Model, model_inputs
from jaxprune.models.backward import Pull
from jaxprune.scoring.objectives import Labels, find_targets, gold
from jaxprune.units import Params


class Question(NamedTuple):
    """What a criterion asks the model: the objective of these targets, one value per example and target."""

    batch: dict[str, Array]  # the model's inputs
    logits: Array
    pull: Pull  # back to the gates, if there are any
    targets: tuple[Array, ...]  # labels [b]; of a text-to-text model one, the tokens [b, u] of an answer
    weights: tuple[Float[Array, " b"], ...]  # what the attribution for each of the targets is multiplied by


def questions(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    labels: Labels,
    regression: bool,
    key: Array | None,
    run: Callable[[dict[str, Array]], tuple[Array, Pull]],
) -> Iterator[Question]:
    """Asks for the targets that `labels` chooses: all at once of a task head, one answer after the other of a text.

    Args:
        model: The architecture.
        params: Parameters.
        batch: As for a criterion.
        labels: For which labels.
        regression: Whether they are numbers.
        key: Randomness of the labels; None is that of seed 0.
        run: The forward pass of open gates, whose logits may choose the labels.

    Raises:
        ValueError: If labels are needed and there are none.
    """
    given = examples_of(batch, labels, regression)
    if model.writes_text:
        for answer in answers_of(model, params, batch, labels, given, key):
            yield Question(answer.batch, *run(answer.batch), (answer.target,), (answer.weight,))
    else:
        inputs = model_inputs(model, params, batch)
        logits, pull = run(inputs)
        yield Question(inputs, logits, pull, *find_targets(labels, logits, *given, key_or_default(key)))


class Answer(NamedTuple):
    """An answer of a text-to-text model, one per example, whose objective is attributed."""

    batch: dict[str, Array]  # the model's inputs, with this answer for the decoder to read
    target: Int[Array, "b u"]  # its tokens without the end of the sequence
    weight: Float[Array, " b"]  # what the attribution is multiplied by


def answers_of(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    labels: Labels,
    given: tuple[Array, Array],
    key: Array | None,
) -> list[Answer]:
    """The answers to attribute, one per label and row that `labels` chooses, from the candidates of a batch."""
    candidates = candidates_in(batch)
    if labels is gold:
        likelihoods = jnp.zeros(candidates.shape[:2], jnp.float32)
    else:
        likelihoods = rank(model, params, batch, candidates)
    chosen, weights = find_targets(labels, likelihoods, *given, key_or_default(key))
    found = []
    for label, weight in zip(chosen, weights, strict=True):
        target = candidates_of(candidates, label)
        inputs = model_inputs(model, params, teacher_forced(model, batch, target))
        found.append(Answer(inputs, without_end(target, model.config.end_id), weight))
    return found


def examples_of(batch: Mapping[str, Any], labels: Labels, regression: bool) -> tuple[Array, Array]:
    """The labels and indices of a batch; zeros where it has no labels, 0, 1, 2... where it has no index.

    Raises:
        ValueError: If labels are needed and there are none.
    """
    rows = batch["input_ids"].shape[0]
    kind = jnp.float32 if regression else jnp.int32
    if labels is gold and "labels" not in batch:
        raise ValueError("the batch has no 'labels': add them, or use labels=predicted, sampled or every.")
    given = jnp.asarray(batch["labels"] if "labels" in batch else np.zeros(rows)).astype(kind)
    return given, jnp.asarray(batch.get("index", np.arange(rows))).astype(jnp.int32)


def key_or_default(key: Array | None) -> Array:
    """The key, or that of seed 0."""
    return jax.random.key(0) if key is None else key

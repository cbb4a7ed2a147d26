"""Objectives of scoring, the labels they are taken for, and how attributions of single examples become one score.

An *objective* is what must be kept, higher is better: attributions of a loss would rank upside down. All of these are
functions to pass to a criterion; your own may take their place.

The statistics of gated values are collected one layer at a time. A closed unit is worth zero, or its mean over the
calibration tokens: `g * h + (1 - g) * mean`. Scoring and compaction must use the same, so the means are kept with the
scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxprune.data.batches import IGNORED, UNKNOWN, best_spans
from jaxprune.evaluation.text import (
    answered,
    asked_for,
    candidates_in,
    candidates_of,
    rank,
    teacher_forced,
    without_end,
    worded,
)
from jaxprune.models import (
    LANGUAGE,
    WORDS,
    BlockSettings,
    Mask,
    Model,
    State,
    TaskHead,
    enter,
    mask_of,
    model_inputs,
    model_layers,
)
from jaxprune.models.running import Pull
from jaxprune.units import UNITS, UNREAD, Gates, Params, sites

# (values [b, t, units(, channels)] float32, mask [b, t]) -> [b, units] or [b, units, channels]
Statistic: TypeAlias = Callable[[Array, Array], Array]

# (model, params, batches, kinds of units) -> what a closed unit is replaced by; a missing site is zero
Closed: TypeAlias = Callable[[Model, Params, Iterable[Mapping[str, Any]], tuple[str, ...]], Gates]


def magnitudes(values: Array) -> Float[Array, "b t u"]:
    """The size of each unit's value at each token: `|h|` of a neuron, the norm over the channels of a head."""
    return jnp.abs(values) if values.ndim == 3 else jnp.sqrt(jnp.square(values).sum(tuple(range(3, values.ndim))))


def token_mean(values: Array, mask: Bool[Array, "b t"]) -> Array:
    """The mean over each example's own tokens; 0 for a row without tokens."""
    tokens = jnp.maximum(mask.sum(1), 1).astype(jnp.float32)
    return token_sum(values, mask) / tokens.reshape(-1, *[1] * (values.ndim - 2))


def token_sum(values: Array, mask: Bool[Array, "b t"]) -> Array:
    """The sum over each example's tokens."""
    return jnp.where(mask.reshape(*mask.shape, *[1] * (values.ndim - 2)), values, 0.0).sum(1)


def site_statistics(
    model: Model, params: Params, batch: Mapping[str, Any], statistic: Statistic, kinds: tuple[str, ...] = UNITS
) -> dict[str, Array]:
    """One statistic of the gated values at every site, for every example. Only one layer's values exist at a time.

    Args:
        batch: As for `Model.apply`; of a text-to-text model with `candidates` and `labels`, see `answered`.
        statistic: Takes the values `[b, t, units]` (heads: `[b, t, units, channels]`) in float32 and the mask `[b, t]`.
        kinds: Kinds of units.

    Returns:
        Site name to what `statistic` returns.
    """
    inputs = answered(model, params, batch)
    state, statistics = None, {}
    for layer in model_layers(model, params):
        state = enter(model, layer, inputs, state)
        settings = BlockSettings(kind=layer.kind, returns=kinds)
        state, values = _block_statistics(model, settings, statistic, layer.params, state, mask_of(layer, inputs))
        statistics |= {f"{layer.name}.{name}": value for name, value in values.items()}
    return statistics


@partial(jax.jit, static_argnums=(0, 1, 2))
def _block_statistics(
    model: Model, settings: BlockSettings, statistic: Statistic, params: Params, state: State, mask: Mask
) -> tuple[State, dict[str, Array]]:
    state, values = model.block(params, state, mask, settings=settings)
    return state, {name: statistic(value.astype(jnp.float32), mask.tokens) for name, value in values.items()}


def zero(model: Model, params: Params, batches: Iterable[Mapping[str, Any]], kinds: tuple[str, ...] = UNITS) -> Gates:
    """A closed unit is worth nothing."""
    return {}


def calibration_means(
    model: Model, params: Params, batches: Iterable[Mapping[str, Any]], kinds: tuple[str, ...] = UNITS
) -> Gates:
    """A closed unit is worth its mean over all tokens of the batches, padding left out. Costs one forward pass.

    Returns:
        Site name to `[units]`, for heads to `[heads, channels]`, float32.

    Raises:
        ValueError: If the batches hold no token, or query channels are asked for: their values are multiplied with the
            keys, and no bias behind them can stand for a mean.
    """
    if set(UNREAD) & set(kinds):
        raise ValueError("a closed query channel has no mean to be worth, since no kernel reads it: use closed=zero.")
    sums: dict[str, Array] = {}
    tokens: list[dict[str, Array]] = []
    for batch in batches:
        batch = answered(model, params, batch)
        sums = _add_rows(sums, site_statistics(model, params, batch, token_sum, kinds))
        tokens.append({stack.name: batch[stack.inputs[1]].sum() for stack in model.stacks})
    counts = {name: sum(int(counted[name]) for counted in tokens) for name in (tokens[0] if tokens else {})}
    if not counts or not all(counts.values()):
        raise ValueError("the batches hold no token: there is nothing to take means of.")
    return {site.name: sums[site.name] / counts[site.stack] for site in sites(model.axes, params, kinds)}


@jax.jit
def _add_rows(sums: dict[str, Array], more: dict[str, Array]) -> dict[str, Array]:
    return {name: value.sum(0) + sums.get(name, 0.0) for name, value in more.items()}


Objective: TypeAlias = Callable[[Array, Array], Array]  # (logits [b, l], target [b]) -> [b] float32


def log_probability(logits: Float[Array, "b l"], target: Shaped[Array, " b"]) -> Float[Array, " b"]:
    """The log-probability of the target, in nats."""
    return _pick(jax.nn.log_softmax(logits, axis=1), target)


def probability(logits: Float[Array, "b l"], target: Shaped[Array, " b"]) -> Float[Array, " b"]:
    """The probability of the target. It saturates: examples the model is sure of hardly count."""
    return jnp.exp(log_probability(logits, target))


def margin(logits: Float[Array, "b l"], target: Shaped[Array, " b"]) -> Float[Array, " b"]:
    """The target's logit minus the logsumexp of the others: the log-odds of the target, which do not saturate."""
    others = jnp.arange(logits.shape[1]) != target[:, None]
    return _pick(logits, target) - jax.nn.logsumexp(logits, axis=1, where=others)


def negative_squared_error(logits: Float[Array, "b l"], target: Shaped[Array, " b"]) -> Float[Array, " b"]:
    """`-(prediction - target)^2`, for regression."""
    return -jnp.square(logits[:, 0] - target)


@dataclass(frozen=True)
class OfSpan:
    """The mean of an objective for the start and for the end of a span, each among all tokens; 0 if it is unknown."""

    each: Objective

    @property
    def name(self) -> str:
        """That of the objective of each end."""
        return name_of(self.each)

    def __call__(self, logits: Float[Array, "b 2 t"], target: Int[Array, "b 2"]) -> Float[Array, " b"]:
        """The mean of both ends; see `Objective`."""
        ends = [self.each(logits[:, i], jnp.maximum(target[:, i], 0)) for i in range(2)]
        return jnp.where(target[:, 0] == UNKNOWN, 0.0, (ends[0] + ends[1]) / 2)


def _pick(values: Float[Array, "b l"], target: Shaped[Array, " b"]) -> Float[Array, " b"]:
    return jnp.take_along_axis(values, target[:, None], axis=1)[:, 0]


def objective_for(objective: Objective | None, head: TaskHead) -> Objective:
    """The objective for a task head: None is `probability`, or `negative_squared_error` where the head is a regression.

    For spans it is the mean of their start and their end (`OfSpan`).

    Raises:
        ValueError: If an objective of one kind of head was given for the other.
    """
    if objective is None:
        objective = negative_squared_error if head.regression else probability
    unfit = (probability, log_probability, margin) if head.regression else (negative_squared_error,)
    if objective in unfit:
        raise ValueError(f"objective {name_of(objective)} does not fit task head {head.name!r}, which is {head.kind}.")
    return OfSpan(objective) if head.spans else objective


class Targets(NamedTuple):
    """The labels whose objective is attributed, and how much each counts: one backward pass per row."""

    labels: Shaped[Array, "y b"]  # int32, or float32 in a regression; of spans [y, b, 2]
    weights: Float[Array, "y b"]  # what the example's attribution for this label is multiplied by


# Chooses them: (logits of the open model [b, l], labels [b], one random key per example [b]) -> Targets
Labels: TypeAlias = Callable[[Array, Array, Array], Targets]


def gold(logits: Float[Array, "b l"], labels: Shaped[Array, " b"], keys: Array) -> Targets:
    """The example's own label."""
    return _one(labels)


def predicted(logits: Float[Array, "b l"], labels: Shaped[Array, " b"], keys: Array) -> Targets:
    """The label that the open model predicts: no labels are needed."""
    if logits.ndim == 3:
        return _one(best_spans(logits))
    return _one(logits[:, 0] if logits.shape[1] == 1 else jnp.argmax(logits, axis=1).astype(jnp.int32))


def sampled(logits: Float[Array, "b l"], labels: Shaped[Array, " b"], keys: Array) -> Targets:
    """A label drawn from the open model's distribution, as Fisher information asks for: no labels are needed.

    For spans, the start and the end are drawn separately.
    """
    _refuse_regression(logits, "sampled")
    if logits.ndim == 3:
        return _one(jnp.argmax(logits + jax.vmap(partial(_noise, logits.shape[2]))(keys), axis=2).astype(jnp.int32))
    return _one(jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32))


def _noise(tokens: int, key: Array) -> Float[Array, "2 t"]:
    """Noise that turns the largest logit into a draw; a token's does not depend on how many come after it."""
    return jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i), (2,)))(jnp.arange(tokens)).T


def every(logits: Float[Array, "b l"], labels: Shaped[Array, " b"], keys: Array) -> Targets:
    """Every label, weighted by its probability in the open model: the score of an example is `sum_y P(y) f(A^y)`.

    No labels are needed; `f` is the reduction of the examples, such as the absolute value. The plain sum of the
    attributions of all labels' probabilities would be zero, because the probabilities always sum to 1. The weights are
    not differentiated. It costs one backward pass per label.
    """
    _refuse_regression(logits, "every")
    if logits.ndim == 3:
        raise ValueError("labels=every would take a backward pass for every span: use labels=predicted or sampled.")
    labels = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32)[:, None], logits.shape[::-1])
    return Targets(labels, jax.nn.softmax(logits, axis=1).T)


def _one(labels: Shaped[Array, " b"]) -> Targets:
    return Targets(labels[None], jnp.ones((1, labels.shape[0]), jnp.float32))


def _refuse_regression(logits: Float[Array, "b l"], name: str) -> None:
    if logits.shape[1] == 1:
        raise ValueError(f"labels={name} needs a classifier; for a regression use labels=gold or labels=predicted.")


@dataclass(frozen=True)
class ExampleReduction:
    """A way in which the attributions of single examples become one score."""

    name: str
    each: Callable[[Array], Array]  # what is taken of every example's attribution (and every label's)
    largest: bool = False  # whether the largest of the examples decides; otherwise their mean


def _same(attribution: Array) -> Array:
    return attribution


signed = ExampleReduction("signed", _same)  # mean A: units that act for and against the target cancel
absolute = ExampleReduction("absolute", jnp.abs)  # mean |A|
squared = ExampleReduction("squared", jnp.square)  # mean A^2
maximum = ExampleReduction("maximum", _same, largest=True)  # the largest A, signs kept


@partial(jax.jit, static_argnums=0)
def weigh(each: Callable[[Array], Array], attributions: list[Gates], weights: tuple[Float[Array, " b"], ...]) -> Gates:
    """The score of every unit in every example: `sum_y w_y f(A^y)`.

    Args:
        each: `f`.
        attributions: One entry per label: site name to `[b, units]`.
        weights: One entry per label.
    """
    scores = {name: jnp.zeros_like(value) for name, value in attributions[0].items()}
    for weight, attribution in zip(weights, attributions, strict=True):
        scores = {name: scores[name] + weight[:, None] * each(value) for name, value in attribution.items()}
    return scores


@partial(jax.jit, static_argnums=0)
def find_targets(
    labels: Labels, logits: Float[Array, "b l"], given: Shaped[Array, " b"], index: Int[Array, " b"], key: Array
) -> tuple[tuple[Shaped[Array, " b"], ...], tuple[Float[Array, " b"], ...]]:
    """The labels to attribute and their weights, row by row, from the open model's logits.

    What is drawn for an example depends on the key and its index alone, not on its batch.
    """
    targets = labels(logits, given, jax.vmap(partial(jax.random.fold_in, key))(index))
    return tuple(targets.labels), tuple(targets.weights)


@partial(jax.jit, static_argnums=0)
def value_and_cotangent(
    objective: Objective, logits: Float[Array, "b *u l"], target: Shaped[Array, " b *u"]
) -> tuple[Float[Array, " b"], Float[Array, "b *u l"]]:
    """The objective of every example, and its gradient with respect to the logits.

    For a text it is the sum over the target's tokens, each given those before it (Yang et al. 2023).
    """
    of_text = logits.ndim == 3 and not isinstance(objective, OfSpan)
    value, pull = jax.vjp(lambda z: _of_text(objective, z, target) if of_text else objective(z, target), logits)
    return value, pull(jnp.ones_like(value))[0]


def _of_text(objective: Objective, logits: Float[Array, "b u v"], target: Int[Array, "b u"]) -> Float[Array, " b"]:
    each = objective(logits.reshape(-1, logits.shape[-1]), jnp.maximum(target, 0).reshape(-1)).reshape(target.shape)
    return jnp.where(target != IGNORED, each, 0.0).sum(1)


def name_of(setting: object) -> str:
    """The name of a setting in a file's header: a function's own name, a number or a name as it is."""
    name = getattr(setting, "name", None) or getattr(setting, "__name__", None)
    return str(setting if name is None else name)


class OpenPass(NamedTuple):
    """A forward pass of the open model, and the targets whose objective is attributed, one value per example each."""

    batch: dict[str, Array]  # the model's inputs
    logits: Array
    pull: Pull  # back to the gates, if there are any
    targets: tuple[Array, ...]  # labels [b]; of a text-to-text model one, the tokens [b, u] of an answer
    weights: tuple[Float[Array, " b"], ...]  # what the attribution for each of the targets is multiplied by


def open_passes(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    labels: Labels,
    head: TaskHead,
    key: Array | None,
    run: Callable[[dict[str, Array]], tuple[Array, Pull]],
) -> Iterator[OpenPass]:
    """Runs the open model for the targets that `labels` chooses: once for a task head, once per answer of a text.

    Args:
        head: The task head; of `WORDS` the targets are labels, of `LANGUAGE` the tokens of an answer.
        key: Randomness of the labels; None is that of seed 0.
        run: The forward pass; its logits may choose the labels.

    Raises:
        ValueError: If labels are needed and there are none.
    """
    given = examples_of(batch, labels, head.regression)
    if head == LANGUAGE:
        for answer in answers_of(model, params, batch, labels, given, key):
            yield OpenPass(answer.batch, *run(answer.batch), (answer.target,), (answer.weight,))
    else:
        inputs = worded(model, params, batch) if head == WORDS else model_inputs(model, params, batch)
        logits, pull = run(inputs)
        yield OpenPass(inputs, logits, pull, *find_targets(labels, logits, *given, key_or_default(key)))


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
    answers = []
    for label, weight in zip(chosen, weights, strict=True):
        inputs = model_inputs(model, params, teacher_forced(model, batch, candidates_of(candidates, label)))
        target = candidates_of(asked_for(candidates, batch.get("candidates_read")), label)
        answers.append(Answer(inputs, without_end(target, model.config.end_ids), weight))
    return answers


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

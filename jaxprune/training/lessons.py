"""Runs a student beside its teacher, layer by layer, and compares them on the way.

As in `jaxprune.models.backward` a layer is one compiled program, here with its own losses in it, and layers of equal
shape share it. The teacher is run in evaluation mode and only as far as the student's next lesson: its attention scores
are there for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.data.batches import IGNORED
from jaxprune.evaluation.likelihood import answered, candidates_in, candidates_of
from jaxprune.models import (
    Layer,
    Mask,
    Model,
    Places,
    State,
    TaskHead,
    block_compiled,
    enter,
    entry_key,
    hidden_of,
    layer_keys,
    mask_of,
    model_inputs,
    model_layers,
    part,
    readout_compiled,
)
from jaxprune.models.backward import Saved
from jaxprune.training.curriculum import PROJECTION, Distillation, head_index, match_layers, without_projection
from jaxprune.training.losses import (
    hidden_mask,
    label_loss,
    mean_squared_error,
    mean_where,
    score_mask,
    soft_cross_entropy,
)
from jaxprune.units import Params, widths

LOGITS = "logits"  # the last lesson; the others have the names of layers, or of what comes before the first
Terms: TypeAlias = dict[str, Array]  # losses by the name of their weight


class Lesson(NamedTuple):
    """What the teacher has at one place."""

    values: Array  # its embedding output or the output of a layer, [b, t, d], or its logits
    scores: Mapping[str, Float[Array, "b n t s"]] = {}  # of a layer: by local name, such as "attention.scores"


class Moved(NamedTuple):
    """What a program differentiates."""

    state: Any  # what it reads, a `State`; None before the first layer
    params: Params
    matrix: Float[Array, "d e"] | None  # of the projection; None: the widths are equal


class Given(NamedTuple):
    """What else it reads."""

    inputs: Any  # of embeddings the batch, else the mask
    counts: Any  # the mask of its losses: as the layer's, or `[b]`, in a text-to-text model `[b, t]`, of the logits
    lesson: Lesson | None
    key: Array | None
    heads: Mapping[str, Array] = {}  # by local name of the scores: which of the teacher's; a missing one is all
    labels: Array | None = None
    temperature: float | Array = 1.0


class Step(NamedTuple):
    """One program of the student's forward pass, on its way back."""

    output: State | None
    places: Places  # of the parameters it reads
    matrix: str  # the name of its matrix in the projection
    terms: tuple[str, ...]  # the losses in it
    pullback: Any


class Run(NamedTuple):
    """One forward pass of a student."""

    total: Float[Array, ""]
    parts: Terms
    steps: tuple[Step, ...]  # empty if it is not differentiated


def run(
    model: Model,
    student: Params,
    teacher_model: Model,
    teacher: Params,
    batch: Mapping[str, Any],
    settings: Distillation,
    *,
    head: str | None,
    heads: Mapping[str, Sequence[int]],
    key: Array | None,
    differentiated: bool,
) -> Run:
    """Runs both models; see `jaxprune.training.distillation.joint_loss`."""
    params, projection = without_projection(student), student.get(PROJECTION, {})
    chosen = _check_heads(model.head(head), teacher_model.head(head))
    teacher_inputs = answered(teacher_model, teacher, batch)
    inputs = model_inputs(model, params, {**teacher_inputs, **batch})  # of the teacher's the answers alone are new
    counts = _counted(inputs, batch.get("weight"))
    pairs = match_layers(settings.layers, model, teacher_model) if settings.attention or settings.hidden else {}
    taught = {own for own in pairs.values() if own is not None} if settings.attention else set()
    known = widths(model.axes, params, ("heads",)) if taught else {}
    coming = _lessons(teacher_model, teacher, teacher_inputs, teacher_model.head(head), taught)
    terms: list[Terms] = []
    steps: list[Step] = []

    def call(program: Program, static: tuple, moved: Moved, given: Given, places: Places, matrix: str = "") -> Any:
        if differentiated:
            (output, own), saved = _value_and_pullback(program, static, moved, given)
            steps.append(Step(output, places, matrix, tuple(own), saved.restore((moved, given))))
        else:
            output, own = _value(program, static, moved, given)
        terms.append(own)
        return output

    def lesson_of(layer: Layer) -> tuple[Lesson | None, dict[str, Array]]:
        name = pairs.get(layer.name)
        if name is None:
            return None, {}
        lesson, index = _until(coming, name), {}
        for local, scores in lesson.scores.items():
            site = f"{layer.name}.{local.removesuffix('scores')}heads"
            own = head_index(site, known[site], scores.shape[1], heads)
            index |= {} if own is None else {local: own}
        return lesson, index

    layers = model_layers(model, params)
    keys = layer_keys(key, len(layers))
    state = None
    for layer, own_key in zip(layers, keys, strict=False):
        own_counts = mask_of(layer, counts)
        if layer.entry is not None:
            lesson = _until(coming, _entry_name(layer.stack)) if settings.embeddings else None
            moved = Moved(state, layer.entry, projection.get("embeddings"))
            given = Given(inputs, own_counts, lesson, entry_key(keys, layer))
            places = model.embed_places(layer.stack)
            state = call(_enter, (model, layer.stack), moved, given, places, "embeddings")
        lesson, index = lesson_of(layer)
        moved = Moved(state, layer.params, projection.get("hidden"))
        given = Given(mask_of(layer, inputs), own_counts, lesson, own_key, index)
        state = call(_layer, (model, bool(settings.hidden)), moved, given, layer.path, "hidden")
    if settings.logits or settings.labels:
        lesson = None
        if settings.logits and "teacher_logits" in batch:
            lesson = Lesson(jnp.asarray(batch["teacher_logits"]))
        elif settings.logits:
            lesson = _until(coming, LOGITS)
        labels = _labels(model, batch) if settings.labels else None
        places = model.readout_places(chosen)
        rows = counts["decoder_attention_mask"] if model.writes_text else counts["attention_mask"].any(1)
        moved = Moved(state, part(params, places), None)
        given = Given(mask_of(layers[-1], inputs), rows, lesson, keys[-2], {}, labels, settings.temperature)
        call(_finish, (model, chosen), moved, given, places)
    total, parts = _sum_up(terms, settings.weights)
    return Run(total, parts, tuple(steps))


def _check_heads(ours: TaskHead, theirs: TaskHead) -> TaskHead:
    """The student's task head.

    Raises:
        ValueError: If the teacher's answers another question, or they are for spans.
    """
    if ours.spans or theirs.spans:
        name = (ours if ours.spans else theirs).name
        raise ValueError(f"task head {name!r} is for spans, and losses are of labels: distil with another task head.")
    if (ours.labels, ours.regression) != (theirs.labels, theirs.regression):
        what = [
            f"{head.name!r} ({', '.join(head.labels)}{', regression' * head.regression})" for head in (ours, theirs)
        ]
        raise ValueError(f"the student's task head is {what[0]}, the teacher's {what[1]}: labels and kind must agree.")
    return ours


def _lessons(
    model: Model, params: Params, inputs: dict[str, Array], head: TaskHead, scores: Collection[str]
) -> Iterator[tuple[str, Lesson]]:
    """What the teacher has, by name and in order, computed when it is asked for; scores of the layers named."""
    state, layers = None, model_layers(model, params)
    for layer in layers:
        state = enter(model, layer, inputs, state)
        if layer.entry is not None:
            yield _entry_name(layer.stack), Lesson(hidden_of(state))
        wanted = layer.name in scores
        state, found = block_compiled(model, layer.params, state, mask_of(layer, inputs), {}, {}, None, wanted)
        yield layer.name, Lesson(hidden_of(state), found)
    own = part(params, model.readout_places(head))
    yield LOGITS, Lesson(readout_compiled(model, head, own, state, mask_of(layers[-1], inputs), None))


def _entry_name(stack: str) -> str:
    return f"{stack}.embeddings"


def _until(coming: Iterator[tuple[str, Lesson]], name: str) -> Lesson:
    return next(lesson for own, lesson in coming if own == name)


@jax.jit
def _counted(inputs: dict[str, Array], weight: Array | None) -> dict[str, Bool[Array, "b t"]]:
    """The masks of a batch, without the rows that are no examples."""
    rows = inputs["attention_mask"].any(1)
    rows = rows if weight is None else rows & (weight > 0)
    return {name: mask & rows[:, None] for name, mask in inputs.items() if name.endswith("attention_mask")}


def _labels(model: Model, batch: Mapping[str, Any]) -> Array:
    """The hard labels `[b]`, or the tokens of the right answers `[b, u]`; negative where there is none."""
    if "labels" not in batch:
        raise ValueError(f"the loss towards hard labels needs 'labels' in the batch; it has {sorted(batch)}.")
    labels = jnp.asarray(batch["labels"])
    if not model.writes_text:
        return labels
    return jnp.where(labels[:, None] < 0, IGNORED, candidates_of(candidates_in(batch), labels))


# (static arguments..., Moved, Given) -> what the next program reads, and losses
Program: TypeAlias = Callable[..., tuple[State | None, Terms]]


def _enter(model: Model, stack: str, moved: Moved, given: Given) -> tuple[State, Terms]:
    state = model.embed(moved.params, given.inputs, stack=stack, before=moved.state, key=given.key)
    if given.lesson is None:
        return state, {}
    return state, {"embeddings": _hidden_loss(state, given.lesson, moved.matrix, given.counts)}


def _layer(model: Model, hidden: bool, moved: Moved, given: Given) -> tuple[State, Terms]:
    lesson = given.lesson
    scores = bool(lesson and lesson.scores)
    state, found = model.block(moved.params, moved.state, given.inputs, key=given.key, scores=scores, kinds=())
    terms: Terms = {}
    if lesson is not None and hidden:
        terms["hidden"] = _hidden_loss(state, lesson, moved.matrix, given.counts)
    if lesson is not None and scores:
        each = []
        for name, theirs in lesson.scores.items():
            theirs = theirs[:, given.heads[name]] if name in given.heads else theirs
            mask = score_mask(given.counts, name.removesuffix(".scores"))
            each.append(mean_squared_error(found[name], jax.lax.stop_gradient(theirs), mask))
        terms["attention"] = jnp.stack(each).sum()
    return state, terms


def _finish(model: Model, head: TaskHead, moved: Moved, given: Given) -> tuple[None, Terms]:
    logits = model.readout(moved.params, moved.state, given.inputs, head, key=given.key)
    terms: Terms = {}
    if given.lesson is not None:
        theirs = jax.lax.stop_gradient(given.lesson.values)
        if theirs.shape != logits.shape:
            raise ValueError(f"the student's logits have the shape {logits.shape}, the teacher's {theirs.shape}.")
        soft = jnp.square(logits - theirs).sum(-1) if head.regression else None
        each = soft_cross_entropy(logits, theirs, given.temperature) if soft is None else soft
        terms["logits"] = mean_where(each, given.counts)
    if given.labels is not None:
        each, known = label_loss(logits, given.labels, regression=head.regression)
        terms["labels"] = mean_where(each, known & given.counts)
    return None, terms


def _hidden_loss(state: State, lesson: Lesson, matrix: Array | None, counts: Mask) -> Array:
    ours, theirs = hidden_of(state), jax.lax.stop_gradient(lesson.values)
    if matrix is not None:
        ours = jnp.einsum("btd,de->bte", ours.astype(jnp.float32), matrix)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the student's hidden states have the width {ours.shape[-1]}, the teacher's {theirs.shape[-1]}: train "
            'params | {"projection": initialise_projection(model, teacher_model, key)}.'
        )
    return mean_squared_error(ours, theirs, hidden_mask(counts))


@partial(jax.jit, static_argnums=(0, 1))
def _value(program: Program, static: tuple, moved: Moved, given: Given) -> tuple[State | None, Terms]:
    return program(*static, moved, given)


@partial(jax.jit, static_argnums=(0, 1))
def _value_and_pullback(program: Program, static: tuple, moved: Moved, given: Given) -> tuple[Any, Saved]:
    found, pullback = jax.vjp(lambda moved: program(*static, moved, given), moved)
    return found, Saved.of(pullback, (moved, given))


@jax.jit
def _sum_up(terms: Sequence[Terms], weights: Mapping[str, float]) -> tuple[Array, Terms]:
    """The weighted sum of all losses, and the sum of each kind."""
    names = [name for name in weights if any(name in own for own in terms)]
    parts = {name: jnp.stack([own[name] for own in terms if name in own]).sum() for name in names}
    return jnp.stack([weights[name] * parts[name] for name in names]).sum(), parts

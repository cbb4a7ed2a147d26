"""The loss by which a student learns from its teacher: logits, embeddings, hidden states and attention scores.

Both models run side by side, layer by layer: a layer is one compiled program with its own losses in it, which layers of
equal shape share. The teacher is run in evaluation mode, only as far as the student's next layer needs it, and nothing
of it is stored. An outer `jax.jit` may trace the whole loss as one program.

A *mask* is true where an entry counts. Means divide by the number of entries that count, so padding a batch further
changes nothing. All sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.data.batches import IGNORED
from jaxprune.evaluation.text import answered, candidates_in, candidates_of
from jaxprune.models import (
    BlockSettings,
    Layer,
    Mask,
    Model,
    Places,
    State,
    TaskHead,
    enter,
    entry_key,
    layer_keys,
    mask_of,
    model_inputs,
    model_layers,
    part,
    readout_compiled,
    run_layer,
    score_mask,
)
from jaxprune.models.running import Saved, gradients_at
from jaxprune.sparse.patterns import PROJECTION
from jaxprune.training.loop import share_gradients
from jaxprune.units import Params, Path, flatten, unflatten, widths

Pair: TypeAlias = tuple[Model, Params]  # what `load` returns
LayerMap: TypeAlias = Callable[[int, int], Sequence[int | None]]  # see `Distillation.layers`
WEIGHTS = ("attention", "embeddings", "hidden", "logits", "labels")  # of `Distillation`, in the order of its fields


# Settings


def one_to_one(student: int, teacher: int) -> tuple[int, ...]:
    """Every layer learns from the one in its place; the depths must be equal."""
    if student != teacher:
        raise ValueError(
            f"the student has {student} layers, the teacher {teacher}: choose a layer map such as uniform or last."
        )
    return tuple(range(student))


def uniform(student: int, teacher: int) -> tuple[int, ...]:
    """The teacher's layers at equal distances, its last one included: of 12 the layers 3, 7 and 11.

    References:
        Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
    """
    _check_depths(student, teacher)
    return tuple((i + 1) * teacher // student - 1 for i in range(student))


def last(student: int, teacher: int) -> tuple[int, ...]:
    """The teacher's last layers."""
    _check_depths(student, teacher)
    return tuple(range(teacher - student, teacher))


def _check_depths(student: int, teacher: int) -> None:
    if student > teacher:
        raise ValueError(f"the student has {student} layers, the teacher only {teacher}: write your own layer map.")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The weight of each loss, and the parts of the teacher that a student learns from. A weight of 0 costs nothing.

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
    layers: LayerMap = (
        one_to_one  # (depth of the student, of the teacher) -> a teacher's layer or None for each, rising
    )
    head: str | None = field(default=None, metadata={"if_changed": True})  # None: the task's, or the only one
    # Of a pruned student: site name -> the teacher's heads that are left, see `surviving_heads`. Others have them all.
    heads: Mapping[str, Sequence[int]] | None = field(default=None, metadata={"if_changed": True})

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
    """The teacher's layer that each of the student's learns from, by name; the map is asked once per stack."""
    if [stack.name for stack in model.stacks] != [stack.name for stack in teacher_model.stacks]:
        raise ValueError("student and teacher must both be encoders or both text-to-text models.")
    matched: dict[str, str | None] = {}
    for ours, theirs in zip(model.stacks, teacher_model.stacks, strict=True):
        places = tuple(layers(ours.layers, theirs.layers))
        used = [place for place in places if place is not None]
        if len(places) != ours.layers or used != sorted(set(used)) or not set(used) <= set(range(theirs.layers)):
            raise ValueError(
                f"a layer map must give {ours.layers} rising numbers below {theirs.layers} (or None), got {places}."
            )
        prefix = f"{ours.name}." if ours.name else ""
        matched |= {f"{prefix}{i}": None if p is None else f"{prefix}{p}" for i, p in enumerate(places)}
    return matched


HEADS = ("heads", "query_heads")  # kinds of units that have attention scores, one kind in every module


def head_index(site: str, ours: int, theirs: int, heads: Mapping[str, Sequence[int]]) -> np.ndarray | None:
    """The teacher's heads that those of one site of the student learn from; None: all, in order."""
    if site not in heads:
        if ours == theirs:
            return None
        raise ValueError(
            f"{site}: the student has {ours} heads, the teacher {theirs}. Say which are left with "
            "heads=surviving_heads(record), or leave attention scores out with attention=0."
        )
    index = np.asarray(heads[site], np.int32).reshape(-1)
    if len(index) != ours or (ours and not 0 <= index.min() <= index.max() < theirs):
        raise ValueError(f"{site}: heads must name {ours} of the teacher's {theirs} heads, got {list(heads[site])}.")
    return None if np.array_equal(index, np.arange(theirs)) else index


def initialise_projection(model: Model, teacher_model: Model, key: Array) -> Params:
    """Random matrices `[student's width, teacher's width]`: train `params | {"projection": ...}` in place of `params`.

    There are two, as in TinyBERT: one for the embedding output, and one for the outputs of all layers.
    """
    shape = model.config.embed, teacher_model.config.embed
    scale = shape[0] ** -0.5  # what is projected keeps its size
    keys = jax.random.split(key)
    return {name: scale * jax.random.normal(k, shape) for name, k in zip(("embeddings", "hidden"), keys, strict=True)}


def without_projection(student: Params) -> Params:
    """The parameters of the student itself: what to evaluate and to save."""
    return {name: part for name, part in student.items() if name != PROJECTION}


# Losses on plain arrays


def soft_cross_entropy(
    student: Float[Array, "*b l"], teacher: Float[Array, "*b l"], temperature: float | Array = 1.0
) -> Float[Array, "*b"]:
    """The cross-entropy of the student's distribution under the teacher's, per example, in nats.

    `-T^2 sum_l softmax(teacher / T)_l log softmax(student / T)_l`. It is smallest where the two distributions are
    equal: there it is `T^2` times the entropy of the teacher's. The factor `T^2` keeps the size of the gradient as `T`
    grows.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    targets = jax.nn.softmax(teacher.astype(jnp.float32) / temperature)
    return -(temperature**2) * (targets * jax.nn.log_softmax(student.astype(jnp.float32) / temperature)).sum(-1)


def label_loss(
    logits: Float[Array, "*b l"], labels: Array, *, regression: bool = False
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """The loss towards hard labels, per example, and which examples have one: those whose index is not negative.

    It is the cross-entropy; in a regression the squared error of the first logit, and all examples have a label.
    """
    if regression:
        return jnp.square(logits[..., 0].astype(jnp.float32) - labels.astype(jnp.float32)), jnp.ones(labels.shape, bool)
    index = jnp.maximum(labels, 0)[..., None]
    each = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), index, axis=-1)[..., 0]
    return -each, labels >= 0


def mean_squared_error(
    student: Float[Array, "*shape"], teacher: Float[Array, "*shape"], mask: Bool[Array, ...]
) -> Float[Array, ""]:
    """The mean of `(student - teacher)^2` over the entries that the mask allows, see `mean_where`."""
    if student.shape != teacher.shape:
        raise ValueError(f"the student has {student.shape}, the teacher {teacher.shape}: they must have one shape.")
    return mean_where(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), mask)


def mean_where(values: Float[Array, "*shape"], mask: Bool[Array, ...]) -> Float[Array, ""]:
    """The mean of the values that a mask allows, which broadcasts to their shape; 0 if it allows none.

    Values that it does not allow may be anything, infinite too, and get no gradient.
    """
    repeats = values.size // max(mask.size, 1)  # of every entry of the mask
    count = mask.sum().astype(jnp.float32) * repeats
    return jnp.where(mask, values, 0.0).sum(dtype=jnp.float32) / jnp.maximum(count, 1.0)


# The joint loss

Parts: TypeAlias = dict[str, Float[Array, ""]]  # name of a weight of `Distillation` -> that loss, before its weight


def joint_loss(
    student: Pair,
    teacher: Pair,
    batch: Mapping[str, Any],
    distillation: Distillation | None = None,
    *,
    key: Array | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """The weighted sum of all losses, and each of them.

    Padding never leaks: more padded tokens or rows change nothing. The teacher gets no gradient. A student with the
    teacher's parameters has losses of 0, but for the logits': that is the entropy of the teacher's answer, and its
    gradient 0.

    Args:
        student: Its model and parameters; those of `initialise_projection` under "projection" if its width differs.
        teacher: Its model and parameters.
        batch: As for `Model.apply`, and: `weight`, 0 for rows that are no examples; `labels` or `candidates`, as of
            `make_batches`, if the loss or a text-to-text model needs them (an answer that is missing is the teacher's
            likeliest); `teacher_logits`, if they are known.
        distillation: What to learn; None: `Distillation.sparse_bert`, for the task head.
        key: Switches the student's dropout on.

    Returns:
        The sum, and what it is the sum of, before the weights.

    Raises:
        ValueError: If student and teacher do not match, or the batch does not fit them.
    """
    distillation = distillation or Distillation.sparse_bert(regression=student[0].head().regression)
    return _run(student, teacher, batch, distillation, key, differentiated=False)[:2]


def joint_loss_and_gradients(
    student: Pair,
    teacher: Pair,
    batch: Mapping[str, Any],
    distillation: Distillation | None = None,
    *,
    key: Array | None = None,
) -> tuple[tuple[Float[Array, ""], Parts], Params]:
    """`joint_loss` and its gradient with respect to the student, as `jax.value_and_grad` returns them.

    It compiles no more for a deep student than for a shallow one. Parameters that are not used, such as other task
    heads, get a gradient of 0; those that are one in the original model all get the sum of theirs.
    """
    model, params = student
    distillation = distillation or Distillation.sparse_bert(regression=model.head().regression)
    total, parts, stages = _run(student, teacher, batch, distillation, key, differentiated=True)
    flat: dict[Path, Array] = {}
    cotangent = None
    for stage in reversed(stages):
        if cotangent is None:  # nothing is learned from what comes after
            cotangent = jax.tree.map(jnp.zeros_like, stage.output)
        weights = {name: np.float32(distillation.weights[name]) for name in stage.losses}
        (slopes,) = _pull(stage.pullback, (cotangent, weights))
        cotangent = slopes.state
        gradients = gradients_at(stage.places, slopes.params)
        if slopes.matrix is not None:
            gradients[PROJECTION, stage.matrix] = slopes.matrix
        for path, slope in gradients.items():
            flat[path] = flat[path] + slope if path in flat else slope
    unused = {path: jnp.zeros_like(array) for path, array in flatten(params).items() if path not in flat}
    return (total, parts), share_gradients(model, unflatten(flat | unused))


class Target(NamedTuple):
    """The teacher's values at one place, for the student to match."""

    values: Array  # its embedding output or the output of a layer, [b, t, d], or its logits
    scores: Mapping[str, Float[Array, "b n t s"]] = {}  # of a layer: by local name, such as "attention.scores"


class _Differentiated(NamedTuple):
    """The inputs of a program with respect to which it is differentiated."""

    state: Any  # a `State`; None before the first layer
    params: Params
    matrix: Float[Array, "d e"] | None = None  # of the projection; None: the widths are equal


class _Fixed(NamedTuple):
    """The other inputs of a program."""

    inputs: Any  # of embeddings the batch, else the mask
    counts: Any  # the mask of its losses: as the layer's, or `[b]`, in a text-to-text model `[b, t]`, of the logits
    target: Target | None
    key: Array | None
    heads: Mapping[str, Array] = {}  # by local name of the scores: which of the teacher's; a missing one is all
    labels: Array | None = None
    temperature: float | Array = 1.0


class _Stage(NamedTuple):
    """One program of the student's forward pass, on its way back."""

    output: State | None
    places: Places  # of the parameters it reads
    matrix: str  # the name of its matrix in the projection
    losses: tuple[str, ...]  # in it
    pullback: Any


# (static arguments..., _Differentiated, _Fixed) -> what the next program reads, and losses by name of their weight
_Program: TypeAlias = Callable[..., tuple[State | None, Parts]]


def _run(
    student: Pair, teacher: Pair, batch: Mapping[str, Any], distillation: Distillation, key: Array | None, *,
    differentiated: bool,
) -> tuple[Array, Parts, list[_Stage]]:  # fmt: skip
    """One forward pass of both models: the joint loss, its parts, and the way back if it is differentiated."""
    (model, params), (teacher_model, teacher_params) = student, teacher
    params, projection = without_projection(params), params.get(PROJECTION, {})
    head, teacher_head = (reader.head(distillation.head) for reader in (model, teacher_model))
    _check_heads(head, teacher_head)
    teacher_inputs = answered(teacher_model, teacher_params, batch)
    inputs = model_inputs(model, params, {**teacher_inputs, **batch})  # of the teacher's the answers alone are new
    counts = _counted(inputs, batch.get("weight"))
    pairs = {}
    if distillation.attention or distillation.hidden:
        pairs = match_layers(distillation.layers, model, teacher_model)
    scored = {theirs for theirs in pairs.values() if theirs is not None} if distillation.attention else set()
    head_counts = widths(model.axes, params, HEADS) if scored else {}
    targets = _targets((teacher_model, teacher_params), teacher_inputs, teacher_head, scored)
    losses: list[Parts] = []
    stages: list[_Stage] = []

    def call(
        program: _Program, static: tuple, moved: _Differentiated, fixed: _Fixed, places: Places, matrix: str = ""
    ) -> Any:
        if differentiated:
            (output, parts), saved = _value_and_pullback(program, static, moved, fixed)
            stages.append(_Stage(output, places, matrix, tuple(parts), saved.restore((moved, fixed))))
        else:
            output, parts = _value(program, static, moved, fixed)
        losses.append(parts)
        return output

    def target_of(layer: Layer) -> tuple[Target | None, dict[str, Array]]:
        name = pairs.get(layer.name)
        if name is None:
            return None, {}
        target, index = _next(targets, name), {}
        for local, scores in target.scores.items():
            names = [f"{layer.name}.{local.removesuffix('scores')}{kind}" for kind in HEADS]
            site = next(name for name in names if name in head_counts)
            chosen = head_index(site, head_counts[site], scores.shape[1], distillation.heads or {})
            index |= {} if chosen is None else {local: chosen}
        return target, index

    layers = model_layers(model, params)
    keys = layer_keys(key, len(layers))
    state = None
    for layer, layer_key in zip(layers, keys, strict=False):
        layer_counts = mask_of(layer, counts)
        if layer.entry is not None:
            target = _next(targets, f"{layer.stack.name}.embeddings") if distillation.embeddings else None
            moved = _Differentiated(state, layer.entry, projection.get("embeddings"))
            fixed = _Fixed(inputs, layer_counts, target, entry_key(keys, layer))
            places = model.embed_places(layer.stack.name)
            state = call(_embed, (model, layer.stack.name), moved, fixed, places, "embeddings")
        target, index = target_of(layer)
        moved = _Differentiated(state, layer.params, projection.get("hidden"))
        fixed = _Fixed(mask_of(layer, inputs), layer_counts, target, layer_key, index)
        state = call(_block, (model, layer.kind, bool(distillation.hidden)), moved, fixed, layer.path, "hidden")
    if distillation.logits or distillation.labels:
        target = None
        if distillation.logits and "teacher_logits" in batch:
            target = Target(jnp.asarray(batch["teacher_logits"]))
        elif distillation.logits:
            target = _next(targets, LOGITS)
        labels = _labels(model, batch) if distillation.labels else None
        places = model.readout_places(head)
        tokens = mask_of(layers[-1], counts).tokens
        answers = tokens if model.answers_in_text else tokens.any(1)
        fixed = _Fixed(mask_of(layers[-1], inputs), answers, target, keys[-2], {}, labels, distillation.temperature)
        call(_readout, (model, head), _Differentiated(state, part(params, places)), fixed, places)
    total, parts = _sum_up(losses, distillation.weights)
    return total, parts, stages


def _check_heads(ours: TaskHead, theirs: TaskHead) -> None:
    """Refuses heads for spans, and heads whose labels differ."""
    if ours.spans or theirs.spans:
        name = (ours if ours.spans else theirs).name
        raise ValueError(f"task head {name!r} is for spans, and losses are of labels: distill with another task head.")
    if (ours.labels, ours.regression) != (theirs.labels, theirs.regression):
        what = [
            f"{head.name!r} ({', '.join(head.labels)}{', regression' * head.regression})" for head in (ours, theirs)
        ]
        raise ValueError(f"the student's task head is {what[0]}, the teacher's {what[1]}: labels and kind must agree.")


LOGITS = "logits"  # the last target; the others have the names of layers, or of the embeddings before the first


def _targets(
    teacher: Pair, inputs: dict[str, Array], head: TaskHead, scored: Collection[str]
) -> Iterator[tuple[str, Target]]:
    """The teacher's values by name and in order, computed when they are asked for; scores of some layers alone."""
    model, params = teacher
    state, layers = None, model_layers(model, params)
    for layer in layers:
        state = enter(model, layer, inputs, state)
        if layer.entry is not None:
            yield f"{layer.stack.name}.embeddings", Target(state.hidden)
        wanted = ("scores",) if layer.name in scored else ()
        state, scores = run_layer(model, layer, inputs, state, returns=wanted)
        yield layer.name, Target(state.hidden, scores)
    readout = part(params, model.readout_places(head))
    yield LOGITS, Target(readout_compiled(model, head, readout, state, mask_of(layers[-1], inputs), None))


def _next(targets: Iterator[tuple[str, Target]], name: str) -> Target:
    return next(target for other, target in targets if other == name)


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
    if not model.answers_in_text:
        return labels
    return jnp.where(labels[:, None] < 0, IGNORED, candidates_of(candidates_in(batch), labels))


def _embed(model: Model, stack: str, moved: _Differentiated, fixed: _Fixed) -> tuple[State, Parts]:
    state = model.embed(moved.params, fixed.inputs, stack=stack, before=moved.state, key=fixed.key)
    if fixed.target is None:
        return state, {}
    return state, {"embeddings": _hidden_loss(state, fixed.target, moved.matrix, fixed.counts)}


def _block(model: Model, kind: str, hidden: bool, moved: _Differentiated, fixed: _Fixed) -> tuple[State, Parts]:
    target = fixed.target
    scored = bool(target and target.scores)
    settings = BlockSettings(kind=kind, returns=("scores", "allowed") if scored else ())
    state, values = model.block(moved.params, moved.state, fixed.inputs, settings=settings, key=fixed.key)
    losses: Parts = {}
    if target is not None and hidden:
        losses["hidden"] = _hidden_loss(state, target, moved.matrix, fixed.counts)
    if target is not None and scored:
        each = []
        for name, theirs in target.scores.items():
            theirs = theirs[:, fixed.heads[name]] if name in fixed.heads else theirs
            mask = score_mask(fixed.counts, values[name.removesuffix("scores") + "allowed"])
            each.append(mean_squared_error(values[name], jax.lax.stop_gradient(theirs), mask))
        losses["attention"] = jnp.stack(each).sum()
    return state, losses


def _readout(model: Model, head: TaskHead, moved: _Differentiated, fixed: _Fixed) -> tuple[None, Parts]:
    logits = model.readout(moved.params, moved.state, fixed.inputs, head, key=fixed.key)
    losses: Parts = {}
    if fixed.target is not None:
        theirs = jax.lax.stop_gradient(fixed.target.values)
        if theirs.shape != logits.shape:
            raise ValueError(f"the student's logits have the shape {logits.shape}, the teacher's {theirs.shape}.")
        if head.regression:
            each = jnp.square(logits - theirs).sum(-1)
        else:
            each = soft_cross_entropy(logits, theirs, fixed.temperature)
        losses["logits"] = mean_where(each, fixed.counts)
    if fixed.labels is not None:
        each, known = label_loss(logits, fixed.labels, regression=head.regression)
        losses["labels"] = mean_where(each, known & fixed.counts)
    return None, losses


def _hidden_loss(state: State, target: Target, matrix: Array | None, counts: Mask) -> Array:
    ours, theirs = state.hidden, jax.lax.stop_gradient(target.values)
    if matrix is not None:
        ours = jnp.einsum("btd,de->bte", ours.astype(jnp.float32), matrix)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the student's hidden states have the width {ours.shape[-1]}, the teacher's {theirs.shape[-1]}: train "
            'params | {"projection": initialise_projection(model, teacher_model, key)}.'
        )
    return mean_squared_error(ours, theirs, counts.tokens[:, :, None])


@partial(jax.jit, static_argnums=(0, 1))
def _value(program: _Program, static: tuple, moved: _Differentiated, fixed: _Fixed) -> tuple[State | None, Parts]:
    return program(*static, moved, fixed)


@partial(jax.jit, static_argnums=(0, 1))
def _value_and_pullback(
    program: _Program, static: tuple, moved: _Differentiated, fixed: _Fixed
) -> tuple[tuple[State | None, Parts], Saved]:
    value, pullback = jax.vjp(lambda moved: program(*static, moved, fixed), moved)
    return value, Saved.of(pullback, (moved, fixed))


@jax.jit
def _pull(pullback: Any, cotangent: Any) -> Any:
    return pullback(cotangent)


@jax.jit
def _sum_up(losses: Sequence[Parts], weights: Mapping[str, float]) -> tuple[Array, Parts]:
    """The weighted sum of all losses, and the sum of each kind."""
    names = [name for name in weights if any(name in stage for stage in losses)]
    parts = {name: jnp.stack([stage[name] for stage in losses if name in stage]).sum() for name in names}
    return jnp.stack([weights[name] * parts[name] for name in names]).sum(), parts

"""Teaches a small or sparse model, the student, what a larger one, the teacher, computes on the way to its answer.

The student learns the teacher's logits, and on the way its embedding output, the output of every layer and its
attention scores before the softmax. The teacher runs in the same step, without dropout, and nothing of it is stored;
its logits alone may come with the batch. A `Distillation` says what is learned, and with which weight.

A step is a few compiled programs, one for all layers of equal shape. An outer `jax.jit` may trace it as one.

How far a student is from its teacher: losses on plain arrays, over the entries that are not padding.

A *mask* here is true where an entry counts. Means divide by the number of entries that count, so padding a batch
further changes nothing. All sums are float32.

What a student learns, and from which layers, heads and widths of its teacher.

A *layer map* is a function of the two depths that gives, for each layer of the student, the teacher's layer it learns
from. Attention scores are compared head by head, so a student that has lost heads says which are left. Hidden states of
another width are compared through a *projection*: two matrices that are trained with the student, and dropped before it
is saved.

Runs a student beside its teacher, layer by layer, and compares them on the way.

As in `jaxprune.models.backward` a layer is one compiled program, here with its own losses in it, and layers of equal
shape share it. The teacher is run in evaluation mode and only as far as the student's next lesson: its attention scores
are there for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from jaxprune.data.batches import IGNORED
from jaxprune.evaluation.likelihood import answered, candidates_in, candidates_of
from jaxprune.models import (
    Layer,
    Mask,
    Masks,
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
from jaxprune.models.backward import Saved, gradients_at
from jaxprune.training.loop import TrainingState, share_gradients
from jaxprune.units import Params, Path, flatten, unflatten, widths


def soft_cross_entropy(
    student: Float[Array, "*b l"], teacher: Float[Array, "*b l"], temperature: float | Array = 1.0
) -> Float[Array, "*b"]:
    """The cross-entropy of the student's distribution under the teacher's, per example, in nats.

    `-T^2 sum_l softmax(teacher / T)_l log softmax(student / T)_l`. It is smallest where the two distributions are
    equal: there it is `T^2` times the entropy of the teacher's. The factor `T^2` keeps the size of the gradient as `T`
    grows.

    Args:
        student: Logits.
        teacher: Logits.
        temperature: What both are divided by.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    targets = jax.nn.softmax(teacher.astype(jnp.float32) / temperature)
    return -(temperature**2) * (targets * jax.nn.log_softmax(student.astype(jnp.float32) / temperature)).sum(-1)


def kl_divergence(
    student: Float[Array, "*b l"], teacher: Float[Array, "*b l"], temperature: float | Array = 1.0
) -> Float[Array, "*b"]:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, per example, in nats.

    `soft_cross_entropy` minus what it is at least: its gradient with respect to the student is the same, and it is 0
    where the distributions are equal.

    Args:
        student: Logits.
        teacher: Logits.
        temperature: What both are divided by.
    """
    ours, theirs = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (student, teacher))
    return temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(-1)


def label_loss(
    logits: Float[Array, "*b l"], labels: Array, *, regression: bool = False
) -> tuple[Float[Array, "*b"], Bool[Array, "*b"]]:
    """The loss towards hard labels, per example, and which examples have one.

    Args:
        logits: One number per label; in a regression the first is the prediction.
        labels: `[*b]`. Indices, negative where there is none; in a regression numbers, and all of them count.
        regression: Whether the loss is the squared error instead of the cross-entropy.
    """
    if regression:
        return jnp.square(logits[..., 0].astype(jnp.float32) - labels.astype(jnp.float32)), jnp.ones(labels.shape, bool)
    index = jnp.maximum(labels, 0)[..., None]
    each = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), index, axis=-1)[..., 0]
    return -each, labels >= 0


def mean_squared_error(
    student: Float[Array, "*shape"], teacher: Float[Array, "*shape"], mask: Bool[Array, ...]
) -> Float[Array, ""]:
    """The mean of `(student - teacher)^2` over the entries that the mask allows; 0 if it allows none.

    A plain mean that counts masked entries as 0 is this times the fraction of entries that the mask allows: it shrinks
    when a batch is padded further.

    Args:
        student: Hidden states `[b, t, d]` or attention scores `[b, n, t, s]`.
        teacher: The same shape.
        mask: Broadcasts to that shape: `hidden_mask(mask)` or `score_mask(mask)`.

    Raises:
        ValueError: If the shapes differ.
    """
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


def hidden_mask(mask: Mask) -> Bool[Array, "b t 1"]:
    """Which hidden states `[b, t, d]` count: those of tokens."""
    own = mask.own if isinstance(mask, Masks) else mask
    return own[:, :, None]


def score_mask(mask: Mask, module: str = "attention") -> Bool[Array, "b 1 t s"]:
    """Which attention scores `[b, n, t, s]` count: those that the softmax reads, of queries that are tokens.

    In an encoder that is where query and key are tokens; in a decoder's attention to itself, where the key comes no
    later than the query, too; in its attention to the encoder (`cross`), where the key is a token of the encoder.

    Args:
        mask: What the layer reads.
        module: The attention whose scores they are: "attention" or "cross".
    """
    if not isinstance(mask, Masks):
        return mask[:, None, :, None] & mask[:, None, None, :]
    if module == "cross":
        return mask.own[:, None, :, None] & mask.memory[:, None, None, :]
    places = jnp.arange(mask.own.shape[1])
    return score_mask(mask.own) & (places[None, :] <= places[:, None])


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
        rows = counts["decoder_attention_mask"] if len(model.stacks) > 1 else counts["attention_mask"].any(1)
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
    if not model.answers_in_text:
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


Parts: TypeAlias = dict[str, Float[Array, ""]]  # name of a weight of `Distillation` -> that loss, before its weight


def joint_loss(
    model: Model,
    student: Params,
    teacher_model: Model,
    teacher: Params,
    batch: Mapping[str, Any],
    settings: Distillation | None = None,
    *,
    head: str | None = None,
    heads: Mapping[str, Sequence[int]] | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """The weighted sum of all losses, and each of them.

    Padding never leaks: more padded tokens or rows change nothing. The teacher gets no gradient. A student with the
    teacher's parameters has losses of 0, but for the logits': that is the entropy of the teacher's answer, and its
    gradient 0.

    Args:
        model: The student's architecture.
        student: Its parameters; those of `initialise_projection` under "projection" if its width differs.
        teacher_model: The teacher's architecture.
        teacher: Its parameters.
        batch: As for `Model.apply`, and: `weight`, 0 for rows that are no examples; `labels` or `candidates`, as of
            `make_batches`, if the loss or a text-to-text model needs them (an answer that is missing is the teacher's
            likeliest); `teacher_logits`, if they are known.
        settings: What to learn; None: `Distillation.sparse_bert`, for the task head.
        head: The task head of both; None: the only one of each.
        heads: Which of the teacher's heads the student has, see `surviving_heads`; sites that are not named have all.
        key: Switches the student's dropout on.

    Returns:
        The sum, and what it is the sum of, before the weights.

    Raises:
        ValueError: If student and teacher do not match, or the batch does not fit them.
    """
    settings = settings or Distillation.sparse_bert(regression=model.head(head).regression)
    how = {"head": head, "heads": heads or {}, "key": key, "differentiated": False}
    done = run(model, student, teacher_model, teacher, batch, settings, **how)
    return done.total, done.parts


def joint_loss_and_gradients(
    model: Model,
    student: Params,
    teacher_model: Model,
    teacher: Params,
    batch: Mapping[str, Any],
    settings: Distillation | None = None,
    *,
    head: str | None = None,
    heads: Mapping[str, Sequence[int]] | None = None,
    key: Array | None = None,
) -> tuple[tuple[Float[Array, ""], Parts], Params]:
    """`joint_loss` and its gradient with respect to the student, as `jax.value_and_grad` returns them.

    It compiles no more for a deep student than for a shallow one. Parameters that are not used, such as other task
    heads, get a gradient of 0; those that are one in the original model all get the sum of theirs.
    """
    settings = settings or Distillation.sparse_bert(regression=model.head(head).regression)
    how = {"head": head, "heads": heads or {}, "key": key, "differentiated": True}
    done = run(model, student, teacher_model, teacher, batch, settings, **how)
    flat: dict[Path, Array] = {}
    cotangent = None
    for step in reversed(done.steps):
        if cotangent is None:  # nothing is learned from what comes after
            cotangent = jax.tree.map(jnp.zeros_like, step.output)
        weights = {name: np.float32(settings.weights[name]) for name in step.terms}
        (slopes,) = _pull(step.pullback, (cotangent, weights))
        cotangent = slopes.state
        found = gradients_at(step.places, slopes.params)
        if slopes.matrix is not None:
            found[PROJECTION, step.matrix] = slopes.matrix
        for path, slope in found.items():
            flat[path] = flat[path] + slope if path in flat else slope
    unused = {path: jnp.zeros_like(own) for path, own in flatten(student).items() if path not in flat}
    return (done.total, done.parts), share_gradients(model, unflatten(flat | unused))


@jax.jit
def _pull(pullback: Any, cotangent: Any) -> Any:
    return pullback(cotangent)


def start_student(student: Params, optimizer: optax.GradientTransformation) -> TrainingState:
    """The state before the first step: a copy of the parameters in float32, and the optimizer's state."""
    own = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), student)
    return TrainingState(own, {"student": optimizer.init(own)}, {}, 0)


def distil_step(
    model: Model,
    teacher_model: Model,
    optimizer: optax.GradientTransformation,
    settings: Distillation,
    now: TrainingState,
    teacher: Params,
    batch: Mapping[str, Any],
    key: Array | None,
    *,
    head: str | None = None,
    heads: Mapping[str, Sequence[int]] | None = None,
) -> tuple[TrainingState, tuple[Float[Array, ""], Parts]]:
    """One step of the student. Uses up the state before it.

    Args:
        model: The student's architecture.
        teacher_model: The teacher's.
        optimizer: Any of optax, the whole of it: clipping, learning rate and weight decay included. It is given the
            parameters, so it may be one that prunes. Make it once: another object is compiled again.
        settings: What to learn.
        now: What the step before returned, or `start_student`.
        teacher: The teacher's parameters.
        batch: As for `joint_loss`.
        key: The student's dropout; None: there is none.
        head: The task head of both; None: the only one of each.
        heads: As for `joint_loss`.

    Returns:
        The state after it; the loss before it, and its parts.
    """
    loss, grads = joint_loss_and_gradients(
        model, now.params, teacher_model, teacher, batch, settings, head=head, heads=heads, key=key
    )
    params, moments = _update(optimizer, now.params, now.moments["student"], grads)
    return now._replace(params=params, moments={"student": moments}, done=now.done + 1), loss


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _update(
    optimizer: optax.GradientTransformation, params: Params, moments: optax.OptState, grads: Params
) -> tuple[Params, optax.OptState]:
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer count
        updates, moments = optimizer.update(grads, moments, params)
    moved: Any = optax.apply_updates(params, updates)
    return moved, moments

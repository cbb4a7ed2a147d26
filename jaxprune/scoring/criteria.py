"""All criteria under one name, `jp.criteria`: here those that attribution has to beat, each a formula in its docstring.

A new one is written beside these and listed in `__all__`.

`h` is the gated value of a unit: a neuron's activation, a head's mixed values, one per channel, or one of these
channels; of a query channel that of the query. `W_in` are the kernels that make it (for a head its query, key and
value), `W_out` the one that reads it. `L = -log P(label)`, in a regression the squared error. `E` is the mean over the
tokens of an example and over the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.evaluation.text import answered
from jaxprune.models import Model, TaskHead, advance, enter, mask_of, model_layers, repeat_rows
from jaxprune.models.layers import sum_tokens
from jaxprune.models.running import Prefix, forward
from jaxprune.scoring.attribution import (
    AnyBatch,
    Context,
    Criterion,
    GradientActivation,
    IntegratedGradients,
    Measured,
    open_prefixes,
    reduce,
)
from jaxprune.scoring.objectives import (
    Closed,
    ExampleReduction,
    Labels,
    Objective,
    OpenPass,
    absolute,
    gold,
    key_or_default,
    log_probability,
    magnitudes,
    negative_squared_error,
    objective_for,
    open_passes,
    sampled,
    site_statistics,
    squared,
    token_mean,
    value_and_cotangent,
    zero,
)
from jaxprune.units import (
    KINDS,
    UNITS,
    UNREAD,
    Gates,
    Intervention,
    Params,
    axes_of,
    check_kinds,
    flatten,
    has_units,
    merge_units,
    reads,
    sites,
    subtree,
    takes_gate,
    widths,
)

__all__ = [
    "Activation",
    "BlockInfluence",
    "Fisher",
    "Gradient",
    "GradientActivation",
    "IntegratedGradients",
    "LeaveOneOut",
    "Magnitude",
    "Random",
    "Taylor",
    "TopLayers",
    "Wanda",
]


@dataclass(frozen=True, kw_only=True)
class _OneByOne(Criterion):
    """A criterion that closes units one at a time."""

    chunk: int = 1  # units closed together, each in separate rows; sets the memory, not the result
    objective: Objective | None = None  # None: probability, or negative_squared_error in a regression
    labels: Labels = gold
    examples: ExampleReduction = absolute  # f, and the mean or the maximum over the examples
    closed: Closed = zero

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Removal(_OneByOne):
    """`s_i = f(O(all open) - O(unit i closed))` of chosen units: a criterion whose sites have these units alone.

    A unit costs a forward pass from its layer up. Which units they are is an argument of the compiled programs.
    """

    units: Mapping[str, Sequence[int]]  # site name to the units to close, one at a time

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`.

        Raises:
            ValueError: If there is no such site or unit.
        """
        self._check(model, params)
        chosen = model.head(context.head)
        objective = self.objective_of(chosen)
        run = partial(forward, model, params, head=chosen.name)
        losses, weights = [], ()
        for opened in open_passes(model, params, batch, self.labels, chosen, context.key, run):
            losses += self._losses(model, params, opened, objective, chosen.name, context.means)
            weights += opened.weights
        return reduce(self.examples, losses, weights)

    def _check(self, model: Model, params: Params) -> None:
        have = widths(model.axes, params, KINDS)
        for name, units in self.units.items():
            if name not in have:
                raise ValueError(f"{name} is not a site of the model; its sites are such as {next(iter(have))}.")
            if outside := [unit for unit in units if not 0 <= unit < have[name]]:
                raise ValueError(f"{name} has the units 0 to {have[name] - 1}, got {outside[0]}.")

    def _losses(
        self, model: Model, params: Params, opened: OpenPass, objective: Objective, head: str, means: Gates | None
    ) -> list[Gates]:
        """The loss of every target with each unit."""
        batch, targets = opened.batch, opened.targets
        ends = [value_and_cotangent(objective, opened.logits, target)[0] for target in targets]
        places = [site for site in sites(model.axes, params, KINDS) if site.name in self.units]
        prefixes = open_prefixes(model, params, batch, {site.layer_name for site in places})
        have = widths(model.axes, params, KINDS)
        losses: list[Gates] = [{} for _ in targets]
        for site in places:
            units = np.asarray(self.units[site.name], np.int32)
            together = max(1, min(self.chunk, len(units)))
            prefix = prefixes[site.layer_name]
            rows, state, aims = repeat_rows((batch, prefix.state, targets), together)
            lost: list[list[Array]] = [[] for _ in targets]
            for first in range(0, len(units), together):
                some = np.pad(units[first : first + together], (0, max(0, first + together - len(units))), mode="edge")
                gates = {site.name: _all_but(have[site.name], some, batch["input_ids"])}
                logits = _finish(model, params, rows, Prefix(state, prefix.layer), gates, means, head)
                for i, aim in enumerate(aims):
                    lost[i].append(_lost(ends[i], value_and_cotangent(objective, logits, aim)[0]))
            for i, parts in enumerate(lost):
                empty = [jnp.zeros((ends[i].shape[0], 0), jnp.float32)]
                losses[i][site.name] = jnp.concatenate(parts or empty, axis=1)[:, : len(units)]
        return losses


def _finish(
    model: Model,
    params: Params,
    batch: dict[str, Array],
    prefix: Prefix,
    gates: Gates,
    means: Gates | None,
    head: str,
) -> Float[Array, "b l"]:
    """The logits, from a prefix on, without keeping anything for a backward pass."""
    layers = model_layers(model, params)
    state = advance(model, layers[prefix.layer :], batch, prefix.state, Intervention(gates, means))
    return forward(model, params, batch, head=head, prefix=Prefix(state, len(layers)))[0]


@partial(jax.jit, static_argnums=0)
def _all_but(width: int, closed: Int[Array, " k"], rows: Array) -> Float[Array, "bk n"]:
    """For every row: gates with the first of some units closed, then with the next one closed, and so on."""
    gates = jnp.asarray(closed)[:, None] != jnp.arange(width)
    return jnp.tile(gates.astype(jnp.float32), (rows.shape[0], 1))


@jax.jit
def _lost(end: Float[Array, " b"], closed: Float[Array, " bk"]) -> Float[Array, "b k"]:
    return end[:, None] - closed.reshape(end.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class _OfKinds(Criterion):
    """A criterion that scores units of chosen kinds; score files record them if they are not the usual ones."""

    kinds: tuple[str, ...] = field(default=UNITS, metadata={"if_changed": True})  # units to score

    def __post_init__(self):
        check_kinds(self.kinds)


@dataclass(frozen=True, kw_only=True)
class Random(_OfKinds):
    """`s_i ~ U(0, 1)`, by the key alone. Reads no example."""

    examples: None = field(default=None, init=False)

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        units = widths(model.axes, params, self.kinds)
        keys = jax.random.split(key_or_default(context.key), len(units))
        drawn = {name: jax.random.uniform(k, (1, n)) for k, (name, n) in zip(keys, units.items(), strict=True)}
        return Measured(drawn, {})


@dataclass(frozen=True, kw_only=True)
class Magnitude(_OfKinds):
    """`s_i = |W_in,i| |W_out,i|`, Euclidean norms. Reads no example.

    For a head, `|W_in,i|` is over its query, key and value kernels together. For a query channel, the two norms are
    those of its column in the query and in the key kernel.
    """

    examples: None = field(default=None, init=False)

    seeded = False

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        scores = {}
        for site in sites(model.axes, params, self.kinds):
            squares = {False: jnp.zeros(()), True: jnp.zeros(())}  # of what makes the unit, of what reads it
            for axes, path, array in _arrays_of(model, params, site.name):
                if path[-1] == "kernel":
                    merged, axis = merge_units(array, axes, site.kind)
                    square = jnp.square(merged.astype(jnp.float32))
                    others = tuple(i for i in range(square.ndim) if i != axis)
                    squares[takes_gate(axes, site.kind)] += square.sum(others)
            scores[site.name] = jnp.sqrt(squares[False] * squares[True])[None]
        return Measured(scores, {})


@dataclass(frozen=True, kw_only=True)
class TopLayers(Criterion):
    """Drops the last layers first: `s_i` is the number of layers from the unit's own to the last.

    Units of a layer share the score, and it is not divided by what they cost. Reads no example.
    """

    examples: None = field(default=None, init=False)

    by_layer = False
    per_cost = False
    seeded = False

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        units, scores = widths(model.axes, params), {}
        for site in sites(model.axes, params):
            left = next(stack.layers for stack in model.stacks if stack.name in (site.stack, "")) - site.layer
            scores[site.name] = jnp.full((1, units[site.name]), left, jnp.float32)
        return Measured(scores, {})


@dataclass(frozen=True, kw_only=True)
class BlockInfluence(_OfKinds):
    """Drops the layers first that change their input least: `s_i = 1 - E[cos(x, y)]` (ShortGPT, Men et al. 2024).

    `x` is what the unit's layer reads at a token and `y` what it returns: the residual stream before and after, in BERT
    the normalised states. Units of a layer share the score, and it is not divided by what they cost, so a budget takes
    whole layers, and of the last one only what is still too much. Needs no labels.
    """

    examples: ExampleReduction = field(default=absolute, init=False)

    by_layer = False
    per_cost = False

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        inputs, state, influence = answered(model, params, batch), None, {}
        for layer in model_layers(model, params):
            before = enter(model, layer, inputs, state)
            state = advance(model, [layer], inputs, before)
            influence[layer.name] = _influence(before.hidden, state.hidden, mask_of(layer, inputs).tokens)
        units = widths(model.axes, params, self.kinds)
        each = ((site.name, influence[site.layer_name]) for site in sites(model.axes, params, self.kinds))
        return Measured({name: jnp.repeat(own[:, None], units[name], axis=1) for name, own in each}, {})


@jax.jit
def _influence(x: Float[Array, "b t d"], y: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Float[Array, " b"]:
    x, y = (each.astype(jnp.float32) for each in (x, y))
    sizes = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return 1.0 - token_mean((x * y).sum(-1, keepdims=True) / jnp.maximum(sizes, 1e-30)[..., None], mask)[:, 0]


@dataclass(frozen=True, kw_only=True)
class Activation(_OfKinds):
    """`s_i = E|h_i|`; for a head the norm over its channels. Needs no labels."""

    examples: ExampleReduction = field(default=absolute, init=False)

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        return Measured(site_statistics(model, params, batch, _mean_magnitude, self.kinds), {})


@dataclass(frozen=True, kw_only=True)
class Wanda(_OfKinds):
    """`s_i = E[h_i^2] |W_out,i|^2`; for a head the sum of this over its channels. Needs no labels (Sun et al. 2023).

    With `closed=calibration_means` the squares are those of `h_i - E[h_i]`: the fluctuation of FLAP (An et al. 2024).
    Query channels have no `W_out`, so they cannot be scored.
    """

    closed: Closed = field(default=zero, metadata={"if_changed": True})
    examples: ExampleReduction = field(default=absolute, init=False)

    def __post_init__(self):
        super().__post_init__()
        if set(UNREAD) & set(self.kinds):
            raise ValueError("Wanda weighs a unit by the kernel that reads it, and none reads query channels.")

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        moments = site_statistics(model, params, batch, _moments, self.kinds)
        readers = {
            site.name: merge_units(array, axes, site.kind)[0]
            for site in sites(model.axes, params, self.kinds)
            for axes, path, array in _arrays_of(model, params, site.name)
            if reads(axes)
        }
        return Measured(_times_reader(moments, readers, context.means or {}), {})


@dataclass(frozen=True, kw_only=True)
class _OfLikelihood(_OfKinds):
    """A criterion that reads gradients of the log-likelihood; in a regression, of the negative squared error."""

    labels: Labels = gold

    tokens = staticmethod(sum_tokens)  # over an example's tokens

    def objective_of(self, head: TaskHead) -> Objective:
        """See `Criterion`."""
        return objective_for(negative_squared_error if head.regression else log_probability, head)

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        regression = model.head(context.head).regression
        gradients = GradientActivation(
            objective=negative_squared_error if regression else log_probability,
            labels=self.labels,
            tokens=self.tokens,
            examples=self.examples or absolute,
            kinds=self.kinds,
        )
        return gradients(model, params, batch, context)


def _mean_gradient(values: Array, cotangent: Array, mask: Bool[Array, "b t"]) -> Float[Array, "b u"]:
    return token_mean(magnitudes(cotangent), mask)


@dataclass(frozen=True, kw_only=True)
class Gradient(_OfLikelihood):
    """`s_i = E|dL/dh_i|`; for a head the norm over its channels."""

    examples: ExampleReduction = field(default=absolute, init=False)

    tokens = staticmethod(_mean_gradient)


@dataclass(frozen=True, kw_only=True)
class Taylor(_OfLikelihood):
    """`s_i = E|g_i dL/dg_i|` at `g = 1`, the absolute value taken per example (Michel et al. 2019)."""

    closed: Closed = zero
    examples: ExampleReduction = field(default=absolute, init=False)

    meaning = "first order, at open gates"


@dataclass(frozen=True, kw_only=True)
class Fisher(_OfLikelihood):
    """`s_i = E[(d log P(y)/dg_i)^2]`, squared per example, `y` drawn from the model; `labels=every` is its exact mean.

    A regression has no labels to draw: use `labels=gold`.
    """

    labels: Labels = sampled
    closed: Closed = zero
    examples: ExampleReduction = field(default=squared, init=False)

    meaning = "first order, at open gates"


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(_OneByOne):
    """`s_i = f(O(all open) - O(head i closed))`, the loss from removing one head.

    Heads only: one forward pass from the head's layer up for every head. Neurons get no score, and selection leaves
    what has no score open.
    """

    meaning = "the removed heads one at a time, all else open"

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        heads = {name: range(count) for name, count in widths(model.axes, params, ("heads",)).items()}
        return Removal(units=heads, **{field.name: getattr(self, field.name) for field in fields(self)})(
            model, params, batch, context
        )


def _mean_magnitude(values: Array, mask: Bool[Array, "b t"]) -> Float[Array, "b u"]:
    return token_mean(magnitudes(values), mask)


def _moments(values: Array, mask: Bool[Array, "b t"]) -> Array:
    """The mean and the mean square, `[b, 2, ...]`."""
    return jnp.stack([token_mean(values, mask), token_mean(jnp.square(values), mask)], axis=1)


@jax.jit
def _times_reader(moments: dict[str, Array], readers: dict[str, Array], means: Gates) -> Gates:
    scores = {}
    for name, moment in moments.items():
        mean, square = moment[:, 0], moment[:, 1]
        if name in means:
            square = square - 2.0 * means[name] * mean + jnp.square(means[name])
        product = square * jnp.square(readers[name].astype(jnp.float32)).sum(-1)
        scores[name] = product.sum(tuple(range(2, product.ndim)))
    return scores


def _arrays_of(model: Model, params: Params, name: str) -> list[tuple[tuple[str, ...], tuple[Any, ...], Array]]:
    """The parameters that have the unit axis of a site: axis names, path and array."""
    site = next(site for site in sites(model.axes, params, KINDS) if site.name == name)
    arrays = []
    for path, array in flatten(subtree(params, site.module)).items():
        axes = axes_of(model.axes, (*site.module, *path))
        if has_units(axes, site.kind):
            arrays.append((axes, path, array))
    return arrays

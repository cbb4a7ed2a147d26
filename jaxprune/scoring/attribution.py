"""Criteria, and those that attribute the objective to units: gradient x activation and integrated gradients.

A *criterion* is a frozen dataclass of settings that is called on one batch and returns one score per unit and example;
`jaxprune.scoring.run.score` calls it on all batches. Gates have one row per example, so one backward pass of the summed
objective gives the attributions of every example. Weights are not differentiated: a node costs two forward passes.
`integrate` is the path integral of a gradient for any function of gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.models import (
    BlockSettings,
    Model,
    TaskHead,
    advance,
    enter,
    mask_of,
    model_layers,
    repeat_rows,
    values_compiled,
)
from jaxprune.models.layers import TokenReduction, sum_tokens
from jaxprune.models.running import Gradients, Prefix, Pull, forward
from jaxprune.scoring.objectives import (
    Closed,
    ExampleReduction,
    Labels,
    Objective,
    absolute,
    gold,
    name_of,
    negative_squared_error,
    objective_for,
    open_passes,
    predicted,
    signed,
    value_and_cotangent,
    weigh,
    zero,
)
from jaxprune.units import (
    KINDS,
    UNITS,
    Gates,
    Intervention,
    Params,
    Site,
    check_kinds,
    check_sharing,
    open_gates,
    readers,
    sites,
    without,
)

Points: TypeAlias = tuple[np.ndarray, np.ndarray]  # nodes in [0, 1] and weights that sum to 1, float64
Rule: TypeAlias = Callable[[int], Points]


class Completeness(NamedTuple):
    """The sum of attributions beside what they should sum to."""

    expected: Float[Array, ...]  # objective(end of the path) - objective(its start)
    found: Float[Array, ...]  # sum of all attributions


def gauss_legendre(nodes: int) -> Points:
    """Gauss-Legendre: exact for polynomials of degree `2 nodes - 1`, never at the ends of the path."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return (points + 1) / 2, weights / 2


def riemann(nodes: int) -> Points:
    """The Riemann sum with the midpoints of `nodes` equal steps, as in captum's `riemann_middle`."""
    return (np.arange(nodes) + 0.5) / nodes, np.full(nodes, 1 / nodes)


def trapezoid(nodes: int) -> Points:
    """The trapezoidal rule, both ends included: half the weight at the ends, `1 / (nodes - 1)` inside.

    captum divides by `nodes` instead, so its weights sum to less than 1.

    Raises:
        ValueError: If there are fewer than two nodes.
    """
    if nodes < 2:
        raise ValueError(f"the trapezoidal rule needs at least 2 nodes, got {nodes}.")
    weights = np.full(nodes, 1 / (nodes - 1))
    weights[[0, -1]] /= 2
    return np.linspace(0, 1, nodes), weights


def quadrature(rule: Rule, nodes: int, start: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of `∫ f(α) dα` over [start, 1], in float32.

    Raises:
        ValueError: If `nodes` is less than 1 or `start` is outside [0, 1).
    """
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}.")
    if not 0 <= start < 1:
        raise ValueError(f"start must lie in [0, 1), got {start}.")
    points, weights = rule(nodes)
    return (start + (1 - start) * points).astype(np.float32), ((1 - start) * weights).astype(np.float32)


def integrate(
    objective: Callable[[Gates], Float[Array, ""]],
    gates: Gates,
    *,
    nodes: int = 8,
    chunk: int = 1,
    start: float = 0.0,
    rule: Rule = gauss_legendre,
) -> tuple[Gates, Completeness]:
    """Integrates the gradient of `objective` along the straight path from `start * gates` to `gates`.

    Computes `g · ∫ ∇objective(αg) dα` over α in [start, 1], in float32. The attributions carry the unit of `objective`:
    nats when it is a log-probability. They sum to `objective(gates) - objective(start * gates)`, up to the error of
    the quadrature.

    Args:
        objective: The quantity to keep, a pure function of the gates; it must be differentiable by JAX.
        gates: End of the path, normally all ones.
        nodes: Quadrature nodes. Each costs one forward and one backward pass.
        chunk: Nodes evaluated together. Sets the memory, not the result.
        start: Where the path starts, as a fraction of `gates`.
        rule: Makes the nodes and weights.

    Returns:
        One signed attribution per gate, in the structure of `gates`, and their completeness.

    Raises:
        ValueError: If `nodes` or `chunk` is less than 1, or `start` is outside [0, 1).

    References:
        Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, 2017.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    points, weights = quadrature(rule, nodes, start)
    end = jax.tree.map(lambda g: jnp.asarray(g).astype(jnp.float32), gates)

    def at(alpha: Array) -> Gates:
        return jax.tree.map(lambda g: alpha * g, end)

    slopes = jax.lax.map(lambda alpha: jax.grad(objective)(at(alpha)), jnp.asarray(points), batch_size=chunk)
    average = jax.tree.map(lambda s: jnp.einsum("k,k...->...", weights, s, precision=jax.lax.Precision.HIGHEST), slopes)
    attributions = jax.tree.map(jnp.multiply, end, average)
    total = sum((a.sum() for a in jax.tree.leaves(attributions)), jnp.zeros((), jnp.float32))
    return attributions, Completeness(objective(end) - objective(at(jnp.float32(start))), total)


def attributions(
    objective: Callable[[Any, Gates, Any], Float[Array, ""]],
    params: Any,
    gates: Gates,
    examples: Any,
    *,
    nodes: int | None = 8,
    chunk: int = 1,
) -> tuple[Gates, Completeness | None]:
    """Attributes the objective of every example to gates, for any function of parameters, gates and one example.

    One program for examples of the same shape, and for the same `objective`: define it once, outside of loops.

    Args:
        objective: The quantity to keep, as a function of parameters, gates and one example.
        params: Any pytree.
        gates: End of the path, normally all ones.
        examples: A pytree of arrays whose first axis is the examples'.
        nodes: Quadrature nodes of integrated gradients; None for gradient x activation, the gradient at the end of the
            path times the gates.
        chunk: Nodes evaluated together. Sets the memory, not the result.

    Returns:
        Signed attributions in the structure of `gates`, `[examples, units]` each, and the completeness `[examples]` of
        integrated gradients. The usual score is the mean of their absolute values over the examples.

    Raises:
        ValueError: As `integrate`.
    """
    return _each(objective, params, gates, examples, nodes, chunk)


@partial(jax.jit, static_argnums=(0, 4, 5))
def _each(
    objective: Callable[..., Any], params: Any, gates: Gates, examples: Any, nodes: int | None, chunk: int
) -> tuple[Gates, Completeness | None]:
    def one(example: Any) -> tuple[Gates, Completeness | None]:
        def of(opened: Gates) -> Array:
            return objective(params, opened, example)

        if nodes is None:
            return jax.tree.map(jnp.multiply, gates, jax.grad(of)(gates)), None
        return integrate(of, gates, nodes=nodes, chunk=chunk)

    return jax.vmap(one)(examples)


Path: TypeAlias = Callable[[Sequence[Site]], tuple[tuple[Site, ...], ...]]  # sites that are scaled together, each once


class Measured(NamedTuple):
    """The result of a criterion for a batch."""

    scores: Gates  # site name to [b, units]; a missing site has no score and stays open
    completeness: dict[str, Float[Array, " b"]]  # of integrated gradients: expected, found, error, size
    signed: Mapping[str, Array] = {}  # attributions [b, units] with their signs, where the scores have lost them


AnyBatch: TypeAlias = Mapping[str, Any]  # input_ids and so on, as for `Model.apply`


class Context(NamedTuple):
    """The settings that all batches of a scoring run share."""

    head: str | None = None  # the task head; None is the only one
    key: Array | None = None  # randomness, of which every example takes its own by its index
    means: Gates | None = None  # what closed units are replaced by; None: zero


class Criterion(Protocol):
    """Everything that the library asks of a criterion, with defaults for all but the call.

    A criterion is a frozen dataclass that inherits from this class; its fields are its settings, and score files hold
    them. One line in `jaxprune.cli.options` gives it a name on the command line.
    """

    examples: ExampleReduction | None = absolute  # how examples become one score; None: none is read, one row comes out
    objective: Objective | None = None  # what is attributed; None: the usual one of the task head
    labels: Labels | None = None  # for which label; None: for none
    closed: Closed = staticmethod(zero)  # what closed units are replaced by
    kinds: tuple[str, ...] = UNITS  # units to score
    passes: int = 3  # through the model for a batch, backward ones too: what they cost decides on the shapes of batches
    by_layer: bool = True  # whether units of one layer can be ranked; otherwise all layers must compete
    per_cost: bool = True  # whether units that compete are compared by their score per cost; else by the score itself
    seeded: bool = True  # whether another key, or other examples, gives other scores
    meaning: str | None = None  # what the sum of several units' attributions is; None: they attribute no objective

    def objective_of(self, head: TaskHead) -> Objective:
        """The objective for a task head, as a function of logits and targets."""
        return objective_for(self.objective, head)

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores the examples of a batch.

        Args:
            batch: As for `Model.apply`, with `labels` `[b]` if they are used, and the examples' `index` `[b]`.
            context: What all batches share.
        """
        ...


def joint(places: Sequence[Site]) -> tuple[tuple[Site, ...], ...]:
    """One path: all gates are scaled together; those of one kind of unit per tensor, others are refused."""
    return (tuple(places),)


def layer(places: Sequence[Site]) -> tuple[tuple[Site, ...], ...]:
    """One path per module (an attention or a feed-forward network): its gates are scaled, all others stay open.

    The layers below the module are computed once. It costs about as many times more as the model has layers.
    """
    modules = dict.fromkeys(site.module for site in places)
    return tuple(tuple(site for site in places if site.module == module) for module in modules)


@dataclass(frozen=True, kw_only=True)
class GradientActivation(Criterion):
    """Scores units by `f(R_t(h * dO/dh))`: value times gradient of the objective, one forward and one backward pass.

    With the defaults, the mean over the examples of `|sum_t h dP(label)/dh|`. With `examples=signed` it is Yang et al.
    2023 read literally, with `tokens=max_tokens` too their later work.
    """

    objective: Objective | None = None  # None: probability, or negative_squared_error in a regression
    labels: Labels = gold
    tokens: TokenReduction = sum_tokens  # R: over an example's tokens; all but the sum are no gradients of gates
    examples: ExampleReduction = absolute  # f, and the mean or the maximum over the examples
    closed: Closed = zero  # calibration_means: h above becomes h - mean
    kinds: tuple[str, ...] = UNITS  # units to score

    meaning = "first order, at open gates"

    def __post_init__(self):
        check_kinds(self.kinds)

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        chosen = model.head(context.head)
        objective = self.objective_of(chosen)
        if objective is negative_squared_error and self.labels is predicted:
            raise ValueError("the squared error has no gradient at the prediction itself: use labels=gold.")
        _, gates = _open_rows(model, params, batch, self.kinds)
        gradients = Gradients(tokens=self.tokens)
        intervention = Intervention(gates, context.means)
        run = partial(forward, model, params, intervention=intervention, head=chosen.name, gradients=gradients)
        slopes, weights = [], ()
        for opened in open_passes(model, params, batch, self.labels, chosen, context.key, run):
            slopes += [_slope(opened.pull, objective, opened.logits, target) for target in opened.targets]
            weights += opened.weights
        return reduce(self.examples, slopes, weights, attributions=self.tokens is sum_tokens)


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(Criterion):
    """Scores units by the path integral of the objective's gradient: `f(∫ dO/dg(α) dα)`, α from `start` to 1.

    References:
        Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, 2017.
    """

    nodes: int = 8  # quadrature nodes; each costs one forward and one backward pass
    chunk: int = 1  # nodes evaluated together; sets the memory, not the result
    path: Path = joint  # or layer: one module at a time
    start: float = 0.0  # 0: from everything removed; the budget itself (0.5 for a half) asks only about what must go
    rule: Rule = gauss_legendre
    objective: Objective | None = None  # None: probability, or negative_squared_error in a regression
    labels: Labels = gold
    tokens: TokenReduction = sum_tokens  # no other is possible
    examples: ExampleReduction = absolute  # f, and the mean or the maximum over the examples
    closed: Closed = zero  # calibration_means: gates lead to the mean instead of to zero
    kinds: tuple[str, ...] = UNITS  # units to scale and score; the others stay open

    meaning = "what the removed units take on the path from closed to open gates"

    @property
    def passes(self) -> int:
        """Two for each node, and one that gives the labels."""
        return 2 * self.nodes + 1

    def __post_init__(self):
        check_kinds(self.kinds)
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}.")
        if self.tokens is not sum_tokens:
            raise ValueError(
                f"tokens={name_of(self.tokens)} is not possible with integrated gradients: all tokens share a gate, so "
                "the integral along its path is known only as their sum. Use sum_tokens, or GradientActivation."
            )
        quadrature(self.rule, self.nodes, self.start)

    def __call__(self, model: Model, params: Params, batch: AnyBatch, context: Context = Context()) -> Measured:
        """Scores a batch; see `Criterion`."""
        attributions, completeness, weights = self.attributions(model, params, batch, context)
        return reduce(self.examples, attributions, weights, _summary(completeness, weights))

    def attributions(
        self, model: Model, params: Params, batch: Mapping[str, Any], context: Context = Context()
    ) -> tuple[list[Gates], list[list[Completeness]], tuple[Float[Array, " b"], ...]]:
        """The signed attributions of a batch, before they are reduced.

        Returns:
            One entry per label, each: site name to `[b, units]`. Their completeness `[b]`, one list per path with one
            entry per label. The weight of every label.
        """
        chosen = model.head(context.head)
        objective = self.objective_of(chosen)
        ones, gates = _open_rows(model, params, batch, self.kinds)
        paths = self.path(sites(model.axes, params, self.kinds))
        paths = [path for path in paths if any(ones[site.name].size for site in path)]
        if not paths:
            raise ValueError(f"the model has no {' and no '.join(self.kinds)}: there is nothing to score.")
        for path in paths:
            check_sharing(model.axes, params, [site.name for site in path])
        scaled = [{site.name: ones[site.name] for site in path} for path in paths]
        along = partial(self._along, model, params, paths, scaled, objective, context._replace(head=chosen.name))
        run = partial(forward, model, params, intervention=Intervention(means=context.means), head=chosen.name)
        attributions, weights = [], ()
        completeness: list[list[Completeness]] = [[] for _ in paths]
        for opened in open_passes(model, params, batch, self.labels, chosen, context.key, run):
            along_paths, parts = along(opened.batch, opened.logits, opened.targets)
            attributions += along_paths
            weights += opened.weights
            completeness = [[*before, *part] for before, part in zip(completeness, parts, strict=True)]
        closed = {name: jnp.zeros_like(rows) for name, rows in gates.items()}
        return [closed | attribution for attribution in attributions], completeness, weights

    def _along(
        self,
        model: Model,
        params: Params,
        paths: Sequence[Sequence[Site]],
        scaled: Sequence[Gates],
        objective: Objective,
        context: Context,
        batch: dict[str, Array],
        logits: Array,
        targets: tuple[Array, ...],
    ) -> tuple[list[Gates], list[list[Completeness]]]:
        """The attributions of every target along all paths of open gates, and their completeness by path and target."""
        head, means = context.head, context.means
        run = partial(forward, model, params, head=head)
        groups = _groups(self.rule, self.nodes, self.start, self.chunk)
        lowest = [_lowest(model, params, path) for path in paths]
        prefixes = open_prefixes(model, params, batch, set(lowest))
        ends = [value_and_cotangent(objective, logits, target)[0] for target in targets]
        attributions: list[Gates] = [{} for _ in targets]
        completeness = []
        for path, end, layer_name in zip(paths, scaled, lowest, strict=True):
            prefix = prefixes[layer_name]
            if self.start == 0.0 and not means:  # nothing of the path is left: a model without its units is cheaper
                logits = forward(model, without(model.axes, params, path), batch, head=head, prefix=prefix)[0]
            else:
                gates = _scale(end, np.array([self.start], np.float32), batch["input_ids"])
                logits = run(batch, Intervention(gates, means), prefix=prefix)[0]
            starts = [value_and_cotangent(objective, logits, target)[0] for target in targets]
            known = _known(model, params, batch, prefix, path)
            tiled, shared, aims = repeat_rows((batch, (prefix.state, known), targets), groups[0][0].size)
            start = Prefix(shared[0], prefix.layer, shared[1])
            nothing = _scale(end, np.zeros(1, np.float32), batch["input_ids"])
            totals = [nothing for _ in targets]
            for points, shares in groups:
                gates = _scale(end, points, batch["input_ids"])
                logits, pull = run(tiled, Intervention(gates, means), prefix=start)
                for i, aim in enumerate(aims):
                    totals[i] = _add(totals[i], _slope(pull, objective, logits, aim), shares)
                del logits, pull  # before the next node needs the memory
            attributions = [before | total for before, total in zip(attributions, totals, strict=True)]
            parts = zip(ends, starts, totals, strict=True)
            completeness.append([_complete(one, other, list(total.values())) for one, other, total in parts])
        return attributions, completeness


def reduce(
    examples: ExampleReduction,
    values: list[Gates],
    weights: tuple[Array, ...],
    completeness: Mapping[str, Array] | None = None,
    *,
    attributions: bool = True,
) -> Measured:
    """The scores of a batch, and beside them its attributions with their signs, if the scores lose them.

    Args:
        values: One entry per label: site name to `[b, units]`.
        weights: One entry per label.
        completeness: Of integrated gradients.
        attributions: Whether `values` are attributions, which add up to a change of the objective.
    """
    keeps_signs = examples.each is signed.each and not examples.largest
    signs = weigh(signed.each, values, weights) if attributions and not keeps_signs else {}
    return Measured(weigh(examples.each, values, weights), dict(completeness or {}), signs)


def _lowest(model: Model, params: Params, path: Sequence[Site]) -> str:
    """The name of the layer that runs first."""
    gated = {site.layer_name for site in path}
    return next(layer.name for layer in model_layers(model, params) if layer.name in gated)


def _open_rows(model: Model, params: Params, batch: Mapping[str, Any], kinds: tuple[str, ...]) -> tuple[Gates, Gates]:
    """Open gates of these kinds, and the same with one row per example."""
    ones = open_gates(model, params, kinds)
    return ones, _scale(ones, np.ones(1, np.float32), jnp.asarray(batch["input_ids"]))


def open_prefixes(model: Model, params: Params, batch: dict[str, Array], layers: set[str]) -> dict[str, Prefix]:
    """The inputs of these layers, all gates open."""
    state: Any = None
    prefixes = {}
    for place, layer in enumerate(model_layers(model, params)):
        state = enter(model, layer, batch, state)
        if layer.name in layers:
            prefixes[layer.name] = Prefix(state, place)
        if len(prefixes) == len(layers):
            break
        state = advance(model, [layer], batch, state)
    return prefixes


def _known(
    model: Model, params: Params, batch: dict[str, Array], prefix: Prefix, path: Sequence[Site]
) -> dict[str, Array]:
    """The values that the lowest layer's gates multiply first, if nothing below changes them: the same at all nodes."""
    layer = model_layers(model, params)[prefix.layer]
    kernels = readers(model.axes, params, KINDS)
    first = next(site for site in sites(model.axes, params) if site.layer_name == layer.name)
    gated = [site.name for site in path if site.module == first.module]
    if not gated or not set(gated) <= set(kernels):
        return {}
    settings = BlockSettings(kind=layer.kind, returns=(first.name.removeprefix(f"{layer.name}."),))
    return values_compiled(model, settings, layer.params, prefix.state, mask_of(layer, batch))


def _groups(rule: Rule, nodes: int, start: float, chunk: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Nodes and weights in groups of equal size, at most `chunk`; the last may be filled up with weights of zero."""
    points, weights = quadrature(rule, nodes, start)
    count = -(-nodes // chunk)
    size = -(-nodes // count)
    missing = count * size - nodes
    points = np.pad(points, (0, missing), mode="edge").reshape(count, size)
    weights = np.pad(weights, (0, missing)).reshape(count, size)
    return list(zip(points, weights, strict=True))


def _slope(pull: Pull, objective: Objective, logits: Float[Array, "b l"], target: Array) -> Gates:
    return pull(value_and_cotangent(objective, logits, target)[1])[0]


# The programs below take gates without the names of their sites: modules of equal widths share them.


def _scale(ones: Gates, points: Float[np.ndarray, " k"], rows: Array) -> Gates:
    """Gates `[b * k, units]` scaled by each of the points, for every one of the rows."""
    return dict(zip(ones, _scaled(list(ones.values()), points, rows), strict=True))


@jax.jit
def _scaled(ones: list[Array], points: Float[np.ndarray, " k"], rows: Array) -> list[Array]:
    scales = jnp.tile(points, rows.shape[0])
    return [scales[:, None] * gate for gate in ones]


def _add(total: Gates, slopes: Gates, weights: Float[np.ndarray, " k"]) -> Gates:
    """Adds the weighted slopes `[b * k, units]` of a group of nodes to `[b, units]`."""
    return dict(zip(total, _added(list(total.values()), [slopes[name] for name in total], weights), strict=True))


@jax.jit
def _added(total: list[Array], slopes: list[Array], weights: Float[np.ndarray, " k"]) -> list[Array]:
    shares = weights[:, None]
    return [
        value + (shares * slope.reshape(value.shape[0], weights.shape[0], value.shape[1])).sum(1)
        for value, slope in zip(total, slopes, strict=True)
    ]


@jax.jit
def _complete(end: Float[Array, " b"], start: Float[Array, " b"], attribution: list[Array]) -> Completeness:
    return Completeness(end - start, jnp.stack([value.sum(1) for value in attribution]).sum(0))


@jax.jit
def _summary(paths: list[list[Completeness]], weights: tuple[Array, ...]) -> dict[str, Float[Array, " b"]]:
    """Per example, summed over labels by weight, the mean over paths: expected, found, their difference, their size."""
    measures = {
        "expected": lambda c: c.expected,
        "found": lambda c: c.found,
        "error": lambda c: jnp.abs(c.found - c.expected),
        "size": lambda c: jnp.abs(c.expected),
    }
    return {
        name: jnp.stack([w * of(c) for path in paths for w, c in zip(weights, path, strict=True)]).sum(0) / len(paths)
        for name, of in measures.items()
    }

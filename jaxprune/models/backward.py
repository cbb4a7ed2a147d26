"""Gradients with respect to gates, weights or both, compiled one block at a time.

A Python loop over the layers inside one `jit` makes the gradient's compile time grow faster than the depth. Here every
layer runs through one compiled forward block, whose pullback comes back as arrays, and one compiled pull: layers of
equal shape share both programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models import (
    BlockSettings,
    Mask,
    Model,
    Places,
    State,
    TaskHead,
    check_intervention,
    embed_compiled,
    entry_key,
    layer_entries,
    layer_intervention,
    layer_keys,
    mask_of,
    model_inputs,
    model_layers,
    part,
    readout_mask,
    run_layer,
)
from jaxprune.models.layers import TokenReduction, sum_tokens
from jaxprune.units import Gates, Intervention, Params, Path, flatten, unflatten


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradients that a backward pass is to give."""

    weights: bool = False  # of the parameters too; gates alone cost one forward pass less
    tokens: TokenReduction = sum_tokens  # of gates over tokens; all others are no gradients but a criterion's business


class Prefix(NamedTuple):
    """A forward pass up to one layer: start here instead of at the embeddings."""

    state: State  # input of `layer`
    layer: int  # its place among the layers of all stacks
    known: Mapping[str, Array] = {}  # values in this layer that its gates do not change, see `Model.block`


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["tree", "sources"])
@dataclass(frozen=True)
class Saved:
    """A pullback on its way out of a compiled program, without the arrays that went in: they would be copied."""

    arrays: list[Array]
    tree: Any  # the pullback's structure
    sources: tuple[int | None, ...]  # for every leaf, which input it is; None: it is in `arrays`

    @classmethod
    def of(cls, pullback: Any, inputs: Any) -> Saved:
        """Leaves out the inputs, while the program is traced."""
        places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(inputs))}
        leaves, tree = jax.tree.flatten(pullback)
        sources = tuple(places.get(id(leaf)) for leaf in leaves)
        return cls([leaf for leaf, i in zip(leaves, sources, strict=True) if i is None], tree, sources)

    def restore(self, inputs: Any) -> Any:
        """The pullback, when the program has been called with these inputs."""
        given, saved = jax.tree.leaves(inputs), iter(self.arrays)
        return jax.tree.unflatten(self.tree, [next(saved) if i is None else given[i] for i in self.sources])


class Step(NamedTuple):
    """The pullback of one compiled program: of a layer, or of the embeddings before the first layer of a stack."""

    layer: str | None  # the layer's name
    places: Places  # of the parameters it reads
    inner: bool  # whether what it reads is differentiated
    pullback: Any


class Pull(NamedTuple):
    """The backward pass of one forward pass: call it with the cotangent of the logits, once or several times."""

    weights: bool
    steps: tuple[Step, ...]

    def __call__(self, cotangent: Array) -> tuple[Gates, Params | None]:
        """Pulls a cotangent back.

        Args:
            cotangent: `[b, labels]` float32, the gradient of what is differentiated with respect to the logits; of a
                text-to-text model `[b, tokens, vocab]`, of spans `[b, 2, tokens]`.

        Returns:
            Site name to gate gradients, in the shape of the gates; and the gradients of the parameters in use, in their
            structure, if the forward pass was asked for them.
        """
        flat: dict[Path, Array] = {}
        gates: list[Gates] = []
        for layer, places, inner, pullback in reversed(self.steps):
            slopes = list(_pull(pullback, cotangent))  # of the gates, of what the step reads, of its parameters
            if layer is not None:
                gates.append({f"{layer}.{name}": slope for name, slope in slopes.pop(0).items()})
            if inner:
                cotangent = slopes.pop(0)
            if self.weights:
                for path, slope in gradients_at(places, slopes.pop(0)).items():
                    flat[path] = flat[path] + slope if path in flat else slope
        named = {name: slope for local in reversed(gates) for name, slope in local.items()}
        return named, unflatten({path: flat[path] for path in sorted(flat)}) if self.weights else None


def gradients_at(places: Places, grads: Params) -> dict[Path, Array]:
    """The gradients of the parameters at some places, by path."""
    if isinstance(places, tuple):
        return {(*places, *path): slope for path, slope in flatten(grads).items()}
    return {(*places[name], *path): slope for name, local in grads.items() for path, slope in flatten(local).items()}


def forward(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    intervention: Intervention = Intervention(),
    *,
    head: str | None = None,
    gradients: Gradients = Gradients(),
    key: Array | None = None,
    prefix: Prefix | None = None,
) -> tuple[Float[Array, "b l"], Pull]:
    """Runs the model and stores the inputs of the backward pass.

    Layers below the lowest gated one are run without a backward pass, unless weights are differentiated.

    Args:
        model: The architecture.
        params: Parameters.
        batch: As for `Model.apply`.
        intervention: The gates to differentiate, and the means; sites that are not named are open and cost nothing.
        head: The task head; None is the only one.
        gradients: Whether to differentiate the parameters too, and how gate gradients reduce over tokens.
        key: Switches dropout on.
        prefix: A forward pass up to some layer, to start from; not if weights are differentiated.

    Returns:
        The logits `[b, labels]` in float32, and the backward pass.

    Raises:
        TypeError: If the gates or means are not dicts of arrays.
        ValueError: If a gate lies below the prefix, weights are asked for from a prefix, or something does not fit
            the model as in `Model.apply`.
    """
    chosen, weights = model.head(head), gradients.weights
    inputs = model_inputs(model, params, batch)
    check_intervention(model, params, inputs, intervention)
    gates = {name: jnp.asarray(gate, jnp.float32) for name, gate in (intervention.gates or {}).items()}
    intervention = Intervention(gates, intervention.means)
    layers = model_layers(model, params)
    keys = layer_keys(key, len(layers))
    gated = [i for i, layer in enumerate(layers) if layer_entries(gates, layer.name)]
    lowest = -1 if weights else min(gated, default=len(layers))
    first = 0 if prefix is None else prefix.layer
    if prefix is not None and (weights or lowest < first):
        below = "the weights" if weights else f"gates of layer {lowest}"
        raise ValueError(f"cannot start at layer {first}: {below} come before it.")
    state: Any = None if prefix is None else prefix.state
    steps: list[Step] = []
    for i, layer in enumerate(layers[first:], first):
        differentiated = weights or i > lowest  # whether a gate or a weight lies below
        if layer.entry is not None and (prefix is None or i > first):
            entry_args = (layer.entry, inputs, state, entry_key(keys, layer))
            if differentiated:
                inner = state is not None
                state, pullback = _embed_forward(model, layer.stack.name, weights, *entry_args)
                steps.append(Step(None, model.embed_places(layer.stack.name), inner, pullback))
            else:
                state = embed_compiled(model, layer.stack.name, *entry_args)
        if i < lowest:
            state, _ = run_layer(model, layer, inputs, state, intervention, key=keys[i])
            continue
        known = prefix.known if prefix is not None and i == first else {}
        before = (layer.params, state, known)
        settings = BlockSettings(kind=layer.kind, tokens=gradients.tokens)
        args = mask_of(layer, inputs), layer_intervention(intervention, layer.name), keys[i]
        state, saved = _block_forward(model, settings, weights, differentiated, before, *args)
        steps.append(Step(layer.name, layer.path, differentiated, saved.restore(before)))
    places = model.readout_places(chosen)
    before = (part(params, places), state)
    mask = readout_mask(chosen, layers[-1], inputs)
    logits, saved = _readout_forward(model, chosen, weights, *before, mask, keys[-2])
    steps.append(Step(None, places, True, saved.restore(before)))
    return logits, Pull(weights, tuple(steps))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_forward(
    model: Model,
    stack: str,
    weights: bool,
    params: Params,
    batch: dict[str, Array],
    before: State | None,
    key: Array | None,
):
    def run(before: State | None = before, params: Params = params) -> State:
        return model.embed(params, batch, stack=stack, before=before, key=key)

    if before is None:
        return jax.vjp(lambda params: run(params=params), params)
    return jax.vjp(run, before, params) if weights else jax.vjp(run, before)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _block_forward(
    model: Model,
    settings: BlockSettings,
    weights: bool,
    inner: bool,  # whether the layer's input is differentiated
    before: tuple[Params, State, Mapping[str, Array]],  # the layer's parameters, its input, and known values in it
    mask: Mask,
    intervention: Intervention,
    key: Array | None,
) -> tuple[State, Saved]:
    params, state, known = before

    def run(gates: Gates, state: State = state, params: Params = params) -> State:
        gated = Intervention(gates, intervention.means)
        return model.block(params, state, mask, gated, settings=settings, key=key, known=known)[0]

    gates = intervention.gates
    differentiated = (gates, state, params) if weights else (gates, state) if inner else (gates,)
    output, pullback = jax.vjp(run, *differentiated)
    return output, Saved.of(pullback, before)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _readout_forward(
    model: Model, head: TaskHead, weights: bool, params: Params, state: State, mask: Mask, key: Array | None
):
    def run(state: State, params: Params = params) -> Array:
        return model.readout(params, state, mask, head, key=key)

    logits, pullback = jax.vjp(run, state, params) if weights else jax.vjp(run, state)
    return logits, Saved.of(pullback, (params, state))


@jax.jit
def _pull(pullback: Any, cotangent: Any) -> tuple[Any, ...]:
    return pullback(cotangent)

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

from jaxprune.gates import Gates, Params, subtree
from jaxprune.models import (
    Model,
    TaskHead,
    block_compiled,
    check_intervention,
    embed_compiled,
    layer_entries,
    layer_keys,
    model_inputs,
    model_layers,
)
from jaxprune.models.layers import TokenReduction, sum_tokens


class Prefix(NamedTuple):
    """A forward pass up to one layer: start here instead of at the embeddings."""

    hidden: Float[Array, "b t d"]  # input of `layer`
    layer: int


@partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["tree", "sources"])
@dataclass(frozen=True)
class Saved:
    """A pullback on its way out of a compiled program, without the arrays that went in: they would be copied."""

    kept: list[Array]
    tree: Any  # the pullback's structure
    sources: tuple[int | None, ...]  # for every leaf, which input it is; None: it is in `kept`

    @classmethod
    def of(cls, pullback: Any, inputs: Any) -> Saved:
        """Takes out what is an input, while the program is traced."""
        places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(inputs))}
        leaves, tree = jax.tree.flatten(pullback)
        sources = tuple(places.get(id(leaf)) for leaf in leaves)
        return cls([leaf for leaf, i in zip(leaves, sources, strict=True) if i is None], tree, sources)

    def restore(self, inputs: Any) -> Any:
        """The pullback, when the program has been called with these inputs."""
        given, kept = jax.tree.leaves(inputs), iter(self.kept)
        return jax.tree.unflatten(self.tree, [next(kept) if i is None else given[i] for i in self.sources])


class Pull(NamedTuple):
    """The backward pass of one forward pass: call it with the cotangent of the logits, once or several times."""

    model: Model
    head: TaskHead
    weights: bool
    embeddings: Any  # pullbacks; None where nothing is differentiated
    blocks: tuple[tuple[int, Any], ...]
    readout: Any

    def __call__(self, cotangent: Float[Array, "b l"]) -> tuple[Gates, Params | None]:
        """Pulls a cotangent back.

        Args:
            cotangent: `[b, labels]` float32, the gradient of what is differentiated with respect to the logits.

        Returns:
            Site name to gate gradients, in the shape of the gates; and the gradients of the parameters in use, in their
            structure, if the forward pass was asked for them.
        """
        grads: Params = {"layers": {}}
        gates: dict[int, Gates] = {}
        if self.weights:
            hidden, own = _pull(self.readout, cotangent)
            grads["heads"] = {self.head.name: own}
        else:
            (hidden,) = _pull(self.readout, cotangent)
        for layer, pullback in reversed(self.blocks):
            found = _pull(pullback, hidden)
            gates[layer], hidden = found[0], found[1] if len(found) > 1 else hidden
            if self.weights:
                grads["layers"][layer] = found[2]
        if self.weights:
            (grads["embeddings"],) = _pull(self.embeddings, hidden)
            grads["layers"] = {i: grads["layers"][i] for i in sorted(grads["layers"])}
        named = {f"{i}.{name}": g for i in sorted(gates) for name, g in gates[i].items()}
        return named, grads if self.weights else None


def forward(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    gates: Gates | None = None,
    *,
    head: str | None = None,
    means: Gates | None = None,
    tokens: TokenReduction = sum_tokens,
    weights: bool = False,
    key: Array | None = None,
    prefix: Prefix | None = None,
) -> tuple[Float[Array, "b l"], Pull]:
    """Runs the model and keeps what the backward pass needs.

    Layers below the lowest gated one are run without a backward pass, unless weights are differentiated.

    Args:
        model: The architecture.
        params: Parameters.
        batch: As for `Model.apply`.
        gates: The gates to differentiate; sites that are not named are open and cost nothing.
        head: The task head; None is the only one.
        means: What closed units are replaced by; a missing one is zero.
        tokens: How gate gradients reduce over tokens; all but `sum_tokens` are no gradients but a criterion's business.
        weights: Whether to differentiate the parameters too. Gates alone cost one forward pass less.
        key: Switches dropout on.
        prefix: A forward pass up to some layer, to start from; not with `weights`.

    Returns:
        The logits `[b, labels]` in float32, and the backward pass.

    Raises:
        TypeError: If the gates or means are not dicts of arrays.
        ValueError: If a gate lies below the prefix, weights are asked for from a prefix, or something does not fit
            the model as in `Model.apply`.
    """
    chosen = model.head(head)
    inputs = model_inputs(model, params, batch)
    check_intervention(model, params, inputs, gates, means)
    gates = {name: jnp.asarray(gate, jnp.float32) for name, gate in (gates or {}).items()}
    layers, mask = model_layers(model, params), inputs["attention_mask"]
    keys = layer_keys(key, len(layers))
    gated = [layer for layer in range(len(layers)) if layer_entries(gates, layer)]
    lowest = -1 if weights else min(gated, default=len(layers))
    first = 0 if prefix is None else prefix.layer
    if prefix is not None and (weights or lowest < first):
        below = "the weights" if weights else f"gates of layer {lowest}"
        raise ValueError(f"cannot start at layer {first}: {below} come before it.")
    embeddings = None
    if prefix is not None:
        hidden = prefix.hidden
    elif weights:
        hidden, embeddings = _embed_forward(model, params["embeddings"], inputs, keys[-1])
    else:
        hidden = embed_compiled(model, params["embeddings"], inputs, keys[-1])
    blocks = []
    for layer in range(first, len(layers)):
        own, own_means = layer_entries(gates, layer), layer_entries(means, layer)
        args = (layers[layer], hidden, mask, own, own_means, keys[layer])
        if layer < lowest:
            hidden, _ = block_compiled(model, *args)
        else:
            before = (layers[layer], hidden)
            hidden, saved = _block_forward(model, tokens, weights, layer != lowest, *args)
            blocks.append((layer, saved.restore(before)))
    own = subtree(params, ("heads", chosen.name))
    logits, readout = _readout_forward(model, chosen, weights, own, hidden, mask, keys[-2])
    return logits, Pull(model, chosen, weights, embeddings, tuple(blocks), readout)


@partial(jax.jit, static_argnums=0)
def _embed_forward(model: Model, params: Params, batch: dict[str, Array], key: Array | None):
    return jax.vjp(lambda p: model.embed(p, batch, key=key), params)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _block_forward(
    model: Model,
    tokens: TokenReduction,
    weights: bool,
    inner: bool,  # whether the layer's input is differentiated
    params: Params,
    hidden: Array,
    mask: Array,
    gates: Gates,
    means: Gates,
    key: Array | None,
) -> tuple[Array, Saved]:
    def run(gates: Gates, hidden: Array = hidden, params: Params = params) -> Array:
        return model.block(params, hidden, mask, gates, means=means, tokens=tokens, key=key)[0]

    differentiated = (gates, hidden, params) if weights else (gates, hidden) if inner else (gates,)
    output, pullback = jax.vjp(run, *differentiated)
    return output, Saved.of(pullback, (params, hidden))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _readout_forward(
    model: Model, head: TaskHead, weights: bool, params: Params, hidden: Array, mask: Array, key: Array | None
):
    def run(hidden: Array, params: Params = params) -> Array:
        return model.readout(params, hidden, mask, head, key=key)

    return jax.vjp(run, hidden, params) if weights else jax.vjp(run, hidden)


@jax.jit
def _pull(pullback: Any, cotangent: Array) -> tuple[Any, ...]:
    return pullback(cotangent)

"""Forward passes, and gradients with respect to every gated value, token by token, computed without gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.models import Model
from jaxprune.units import Gates, Params

READERS = {"attention.heads": ("attention", "out"), "ffn.neurons": ("ffn", "down")}  # who reads the gated values


def logits_of(model: Model, params: Params, batch: Any, gates: Gates | None = None, **options: Any) -> jax.Array:
    """The logits, by `Model.apply`."""
    logits = model.apply(params, batch, gates, **options).logits
    assert logits is not None
    return logits


def sites_of(model: Model, params: Params, batch: Any) -> dict[str, jax.Array]:
    """The gated values, by `Model.apply`."""
    return model.apply(params, batch, returns=("sites",)).sites or {}


def token_slopes(model: Model, params: Params, batch: Any, objective: Callable[[jax.Array], jax.Array]) -> Any:
    """The gradient of an objective of the logits with respect to all gated values.

    What reaches a gated value is what reaches the sum it is added to, times the kernel that reads it. That sum's
    gradient, token by token, is the gradient of a bias with one entry per token.

    Returns:
        Site name to `[b, t, neurons]` or `[b, t, heads, head_dim]`.
    """

    def total(biases: Any) -> jax.Array:
        layers = {layer: dict(own) for layer, own in params["layers"].items()}
        for layer, own in layers.items():
            for module, reader in READERS.values():
                own[module] = own[module] | {reader: own[module][reader] | {"bias": biases[layer][module]}}
        return objective(logits_of(model, params | {"layers": layers}, batch))

    shape = batch["input_ids"].shape
    biases = {
        layer: {
            module: jnp.broadcast_to(own[module][reader]["bias"], (*shape, own[module][reader]["bias"].size))
            for module, reader in READERS.values()
        }
        for layer, own in params["layers"].items()
    }
    slopes = jax.jit(jax.grad(total))(biases)
    found = {}
    for layer, own in params["layers"].items():
        for kind, (module, reader) in READERS.items():
            kernel = own[module][reader]["kernel"]
            found[f"{layer}.{kind}"] = jnp.tensordot(slopes[layer][module], kernel, [[2], [kernel.ndim - 1]])
    return found

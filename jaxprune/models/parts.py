"""Splits a Flax module into a static description and plain arrays, and puts the two together again by name.

The one place that merges: `nnx.merge` matches arrays to variables by position, so a renamed key would silently permute
the weights. `bind` compares the full key paths first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.core import Tracer

from jaxprune.units import Params, Path, flatten, path_name


class Part(NamedTuple):
    """A module without its arrays: hashable, and the same for every width."""

    graphdef: Any
    paths: tuple[Path, ...]  # where its arrays go, sorted


def describe(make: Callable[[nnx.Rngs], nnx.Module]) -> Part:
    """The static description of a module, made without computing anything."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return Part(graphdef, tuple(flatten(nnx.to_pure_dict(state))))


def initialise(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
    """Fresh arrays for a module, as a plain nested dict. Layers that share one `make` are traced once."""
    return (_traced_once if isinstance(key, Tracer) else _initialise)(make, key)


def _initialise(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1])


_traced_once = jax.jit(_initialise, static_argnums=0)  # under a trace; by itself it would be compiled for each width


def bind(part: Part, params: Params) -> Any:
    """The module with these arrays.

    Raises:
        ValueError: If the names of the parameters are not exactly those of the module.
    """
    found = tuple(flatten(params))
    if found != part.paths:
        unknown = [path_name(p) for p in found if p not in part.paths]
        missing = [path_name(p) for p in part.paths if p not in found]
        raise ValueError(f"parameters and module disagree: unknown {unknown}, missing {missing}.")
    return nnx.merge(part.graphdef, params)

"""What is passed from layer to layer: hidden states, masks, and what a decoder keeps while it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from jaxtyping import Array, Bool, Float

from jaxprune.units import Params, subtree
from jaxprune.units import Path as ParamPath


class Stack(NamedTuple):
    """Layers that run one after the other: an encoder or a decoder."""

    name: str  # "" in a model with one stack, else "encoder" or "decoder"
    layers: int
    path: ParamPath  # of its layers in the parameters


class Decoding(NamedTuple):
    """The state of a decoder: what its layers pass on, and what they all read."""

    hidden: Float[Array, "b t d"]
    memory: Float[Array, "b s d"]  # the encoder's output


class Masks(NamedTuple):
    """Where a decoder's tokens are, and the encoder's."""

    own: Bool[Array, "b t"]
    memory: Bool[Array, "b s"]


class KeysValues(NamedTuple):
    """What attention reads."""

    keys: Float[Array, "b s n h"]
    values: Float[Array, "b s n h"]


class Cache(NamedTuple):
    """What a decoder layer keeps from one token to the next."""

    own: KeysValues  # of the tokens before; room for all that are to come
    memory: KeysValues  # of the encoder's output


Places: TypeAlias = ParamPath | Mapping[str, ParamPath]  # a subtree of the parameters, or several by local name
State: TypeAlias = Array | Decoding  # an encoder's hidden states [b, t, d], or a decoder's
Mask: TypeAlias = Array | Masks  # an encoder's [b, t], or a decoder's


def part(params: Params, places: Places) -> Params:
    """The parameters at some places, for a program that reads nothing else."""
    if isinstance(places, tuple):
        return subtree(params, places)
    return {name: subtree(params, path) for name, path in places.items()}


def own_mask(mask: Mask) -> Bool[Array, "b t"]:
    """Where the tokens are that a layer computes."""
    return mask.own if isinstance(mask, Masks) else mask


def hidden_of(state: State) -> Float[Array, "b t d"]:
    """The hidden states that a layer passes on."""
    return state.hidden if isinstance(state, Decoding) else state

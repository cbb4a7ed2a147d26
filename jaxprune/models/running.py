"""Runs a model layer by layer: one compiled program for all layers of equal shape, whatever stack they stand in.

What is passed from layer to layer: hidden states, masks, and what a decoder keeps while it writes.

The arrays of a batch that a model reads, checked before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.units import Gates, Params, check_gates, check_means, subtree
from jaxprune.units import Path as ParamPath

if TYPE_CHECKING:
    from jaxprune.models import Model, TaskHead


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


def score_mask(mask: Mask, module: str = "attention") -> Bool[Array, "b 1 t s"]:
    """Where attention scores `[b, n, t, s]` count: those that the softmax reads, of queries that are tokens.

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


def hidden_of(state: State) -> Float[Array, "b t d"]:
    """The hidden states that a layer passes on."""
    return state.hidden if isinstance(state, Decoding) else state


# What a model reads from a batch, as Hugging Face calls it; other keys are ignored.
INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "answerable", "decoder_input_ids", "decoder_attention_mask",
)  # fmt: skip


class _Sequence(NamedTuple):
    """The arrays of a batch that describe one sequence of tokens; the first has the indices, the second is the mask."""

    names: tuple[str, ...]
    tables: Mapping[str, str]  # of those that are indices: the part of the embeddings that they look up


_ENCODED = _Sequence(INPUTS[:4], {"input_ids": "word", "token_type_ids": "token_type"})
_DECODED = _Sequence(INPUTS[4:], {"decoder_input_ids": "word"})


def model_inputs(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a batch that the model reads: indices as int32, masks as bool.

    Raises:
        TypeError: If indices are not integers.
        ValueError: If one is missing or has another shape, the batch is longer than the model's positions, or
            (for arrays on the host) an index is outside its table.
    """
    inputs = encoder_inputs(model, params, batch)
    if len(model.stacks) == 1:
        return inputs
    _check_there(batch, _DECODED.names[:1])
    ids = batch["decoder_input_ids"]
    if getattr(ids, "ndim", None) == 2 and ids.shape[0] != inputs["input_ids"].shape[0]:
        raise ValueError(
            f"decoder_input_ids have {ids.shape[0]} rows, input_ids have {inputs['input_ids'].shape[0]}: give one each."
        )
    if "decoder_attention_mask" not in batch and hasattr(ids, "shape"):
        batch = {**batch, "decoder_attention_mask": np.ones(ids.shape, bool)}
    return inputs | _sequence(model, params, batch, _DECODED)


def encoder_inputs(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a batch that its first stack reads; see `model_inputs`."""
    _check_there(batch, _ENCODED.names[:2])
    return _sequence(model, params, batch, _ENCODED)


def _check_there(batch: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; it has {sorted(batch)}: pass what the tokenizer returns.")


def _sequence(model: Model, params: Params, batch: Mapping[str, Any], kind: _Sequence) -> dict[str, Array]:
    embeddings = subtree(params, ("embeddings",))
    first = kind.names[0]
    ids = batch[first]
    if getattr(ids, "ndim", None) != 2:
        raise ValueError(f"{first} must be a [batch, length] array: tokenize with padding=True, return_tensors='np'.")
    if not 0 < ids.shape[1] <= model.max_length:
        raise ValueError(
            f"the batch has {ids.shape[1]} tokens and the model reads 1 to {model.max_length}: truncate the text."
        )
    inputs: dict[str, Array] = {}
    for name, array in ((name, batch[name]) for name in kind.names if name in batch):
        shape = getattr(array, "shape", type(array).__name__)
        if shape != ids.shape:
            raise ValueError(f"{name} must be an array of shape {ids.shape}, as {first}, got {shape}.")
        found = jnp.asarray(array)
        if name in kind.tables:
            if not jnp.issubdtype(found.dtype, jnp.integer):
                raise TypeError(f"{name} must be integers, got {found.dtype}.")
            if isinstance(array, np.ndarray) and array.size and kind.tables[name] in embeddings:
                _check_indices(name, array, embeddings[kind.tables[name]]["embedding"].shape[0])
        inputs[name] = found.astype(jnp.int32 if name in kind.tables else jnp.bool_)
    return inputs


def _check_indices(name: str, indices: np.ndarray, rows: int) -> None:
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= rows:
        raise ValueError(f"{name} go from {low} to {high}, the model knows 0 to {rows - 1}: is this its tokenizer?")


@partial(jax.jit, static_argnums=(0, 1))
def embed_compiled(
    model: Model, stack: str, params: Params, batch: dict[str, Array], before: State | None, key: Array | None
) -> State:
    """`Model.embed`, compiled."""
    return model.embed(params, batch, stack=stack, before=before, key=key)


@partial(jax.jit, static_argnums=(0, 7, 8))
def block_compiled(
    model: Model,
    params: Params,
    hidden: State,
    mask: Mask,
    gates: Gates,
    means: Gates,
    key: Array | None,
    scores: bool = False,
    kinds: tuple[str, ...] = (),
) -> tuple[State, dict[str, Array]]:
    """`Model.block`, compiled: one program for all layers of equal shape. It returns no gated values unless asked."""
    return model.block(params, hidden, mask, gates, means=means, key=key, scores=scores, kinds=kinds)


@partial(jax.jit, static_argnums=(0, 1))
def values_compiled(
    model: Model, names: tuple[str, ...], params: Params, hidden: State, mask: Mask
) -> dict[str, Array]:
    """The values of some sites of an open layer, by local name; what comes after them is not computed."""
    found = model.block(params, hidden, mask)[1]
    return {name: found[name] for name in names}


@partial(jax.jit, static_argnums=(0, 1))
def readout_compiled(
    model: Model, head: TaskHead, params: Params, hidden: State, mask: Mask, key: Array | None
) -> Array:
    """`Model.readout`, compiled."""
    return model.readout(params, hidden, mask, head, key=key)


class Layer(NamedTuple):
    """One layer among those of all stacks."""

    name: str  # "3" or "decoder.3": what the names of its sites begin with
    stack: str
    path: ParamPath  # where its parameters are
    params: Params
    entry: Params | None  # of the first layer of a stack: what `embed` reads


def model_layers(model: Model, params: Params) -> list[Layer]:
    """The layers of all stacks, in the order in which they run.

    Raises:
        ValueError: If they are not the layers that the model has, numbered from 0.
    """
    found = []
    for stack in model.stacks:
        layers = subtree(params, stack.path)
        if set(layers) != set(range(stack.layers)):
            where = f"{stack.name} layers" if stack.name else "layers"
            raise ValueError(
                f"the parameters have the {where} {list(layers)}, the model 0 to {stack.layers - 1} (as integers)."
            )
        prefix = f"{stack.name}." if stack.name else ""
        for i in range(stack.layers):
            entry = part(params, model.embed_places(stack.name)) if i == 0 else None
            found.append(Layer(f"{prefix}{i}", stack.name, (*stack.path, i), layers[i], entry))
    return found


def mask_of(layer: Layer, inputs: Mapping[str, Array]) -> Mask:
    """The mask that a layer reads."""
    if layer.stack == "decoder":
        return Masks(inputs["decoder_attention_mask"], inputs["attention_mask"])
    return inputs["attention_mask"]


def readout_mask(head: TaskHead, layer: Layer, inputs: Mapping[str, Array]) -> Mask:
    """The mask that a task head reads after the last layer; of spans, the tokens at which one may start or end."""
    return inputs["answerable"] if head.spans and "answerable" in inputs else mask_of(layer, inputs)


def check_intervention(
    model: Model, params: Params, inputs: Mapping[str, Array], gates: Gates | None, means: Gates | None
) -> None:
    """Refuses gates and means that do not belong to these parameters, or gates for another number of examples.

    Raises:
        TypeError: If they are not dicts of arrays.
        ValueError: Naming everything that does not fit.
    """
    if gates is not None:
        check_gates(model, params, gates, rows=inputs["input_ids"].shape[0])
    if means is not None:
        check_means(model, params, means)


def enter(model: Model, layer: Layer, inputs: dict[str, Array], state: State | None, key: Array | None = None) -> State:
    """What a layer reads: `state` itself, unless the layer is the first of a stack that `state` has not entered."""
    entered = state is not None and (layer.stack != "decoder" or isinstance(state, Decoding))
    if state is not None and (entered or layer.entry is None):
        return state
    if layer.entry is None:
        raise ValueError(f"layer {layer.name} is not the first of its stack: it needs what the layer before returned.")
    return embed_compiled(model, layer.stack, layer.entry, inputs, state, key)


def advance(
    model: Model,
    layers: Sequence[Layer],
    inputs: dict[str, Array],
    state: State | None = None,
    gates: Gates | None = None,
    means: Gates | None = None,
) -> State:
    """Runs some layers one after the other, without dropout and without keeping anything for a backward pass.

    Args:
        model: The architecture.
        layers: Consecutive layers of `model_layers`, at least one.
        inputs: What `model_inputs` returns.
        state: What the layer before them returned; None: they are the first.
        gates: Site name to gates.
        means: What closed units are replaced by.
    """
    for layer in layers:
        own, own_means = layer_entries(gates, layer.name), layer_entries(means, layer.name)
        state = enter(model, layer, inputs, state)
        state, _ = block_compiled(model, layer.params, state, mask_of(layer, inputs), own, own_means, None)
    if state is None:
        raise ValueError("there are no layers to run.")
    return state


def layer_entries(entries: Mapping[str, Any] | None, layer: str) -> dict[str, Any]:
    """The entries of one layer, by local name: `{"3.ffn.neurons": g}` gives `{"ffn.neurons": g}` for layer "3"."""
    prefix = f"{layer}."
    return {name[len(prefix) :]: value for name, value in (entries or {}).items() if name.startswith(prefix)}


def layer_keys(key: Array | None, layers: int) -> list[Array | None]:
    """One random key per layer, then one for the task head and one for the embeddings; all None without a key."""
    if key is None:
        return [None] * (layers + 2)
    return list(jax.random.split(key, layers + 2))


def entry_key(keys: list[Array | None], layer: Layer) -> Array | None:
    """The random key for the embeddings of a layer's stack."""
    return jax.random.fold_in(keys[-1], 1) if layer.stack == "decoder" and keys[-1] is not None else keys[-1]


def repeat_rows(tree: Any, times: int) -> Any:
    """Every row of every array `times` times in succession, so that rows stay on their device."""
    return tree if times == 1 else _repeat(times, tree)


@partial(jax.jit, static_argnums=0)
def _repeat(times: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)

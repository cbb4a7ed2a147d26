"""Models layer by layer: checked inputs, what layers pass on, and one program for layers of equal kind and shape.

A stack says what it reads of a batch and whether it attends causally, a layer has a static kind. All of that comes from
the model's family; what runs them is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.models.layers import TokenReduction, sum_tokens
from jaxprune.units import Intervention, Params, check_gates, check_means, subtree
from jaxprune.units import Path as ParamPath

if TYPE_CHECKING:
    from jaxprune.models.config import TaskHead
    from jaxprune.models.model import Model


class Stack(NamedTuple):
    """Layers that run one after the other."""

    name: str  # "" in a model with one stack
    path: ParamPath  # of its layers in the parameters
    kinds: tuple[str, ...]  # of its layers: those of equal kind and shape share one compiled program
    inputs: tuple[str, ...]  # what it reads of a batch: first its tokens, second their mask
    memory: str | None = None  # the mask of what the stack before returns, if its layers read that, too
    causal: bool = False  # whether a token attends to itself and to those before alone

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.kinds)


class State(NamedTuple):
    """The values that the layers of a stack pass on."""

    hidden: Float[Array, "b t d"]
    memory: Float[Array, "b s d"] | None = None  # what the stack before has returned, if they all read it


class Mask(NamedTuple):
    """The places of tokens."""

    tokens: Bool[Array, "b t"]  # among those that a layer computes
    memory: Bool[Array, "b s"] | None = None  # among those of the stack before


class KeysValues(NamedTuple):
    """The keys and values that attention reads."""

    keys: Float[Array, "b s n h"]
    values: Float[Array, "b s n h"]

    @classmethod
    def empty(cls, like: State, length: int, shapes: Iterable[tuple[int, ...]]) -> KeysValues:
        """Room for the keys and values of `length` tokens."""
        rows, kind = like.hidden.shape[0], like.hidden.dtype
        return cls(*(jnp.zeros((rows, length, *shape), kind) for shape in shapes))


class Cache(NamedTuple):
    """The keys and values that a layer keeps from one token to the next."""

    tokens: KeysValues  # of the tokens before; room for all that are to come
    memory: KeysValues | None = None  # of what the stack before has returned

    def extended(self, position: Array, new: KeysValues) -> Cache:
        """The cache with the keys and values of some tokens, the first of them at `position`."""
        pairs = zip(self.tokens, new, strict=True)
        return Cache(
            KeysValues(*(jax.lax.dynamic_update_slice_in_dim(old, some, position, axis=1) for old, some in pairs)),
            self.memory,
        )


Places: TypeAlias = ParamPath | Mapping[str, ParamPath]  # a subtree of the parameters, or several by local name


def part(params: Params, places: Places) -> Params:
    """The parameters at some places, for a program that reads nothing else."""
    if isinstance(places, tuple):
        return subtree(params, places)
    return {name: subtree(params, path) for name, path in places.items()}


def score_mask(mask: Mask, allowed: Bool[Array, "b *t s"]) -> Bool[Array, "b 1 t s"]:
    """The attention scores `[b, n, t, s]` that count: those that the softmax reads, of queries that are tokens.

    Args:
        mask: What the layer reads.
        allowed: What the softmax reads, which `Model.block` returns: the same for all queries, or query by query.
    """
    keys = allowed[:, None, None, :] if allowed.ndim == 2 else allowed[:, None]
    return mask.tokens[:, None, :, None] & keys


# What models read from a batch, as Hugging Face calls it; other keys are ignored.
INPUTS = (
    "input_ids", "attention_mask", "token_type_ids", "answerable", "decoder_input_ids", "decoder_attention_mask",
    "answer_mask",
)  # fmt: skip
ANSWER = "answer_mask"  # `[b, u]`: the last u tokens are those whose next ones are wanted; else all are
# Of those that are indices: the part of the embeddings that they look up
_TABLES = {"input_ids": "word", "token_type_ids": "token_type", "decoder_input_ids": "word"}


def model_inputs(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a batch that the model reads: indices as int32, masks as bool.

    Raises:
        TypeError: If indices are not integers.
        ValueError: If one is missing or has another shape, the batch is longer than the model's positions, or
            (for arrays on the host) an index is outside its table.
    """
    inputs = prompt_inputs(model, params, batch)
    first = model.stacks[0].inputs[0]
    for stack in model.stacks[1:]:
        name, mask = stack.inputs[:2]
        _check_there(batch, [name])
        ids, rows = batch[name], inputs[first].shape[0]
        if getattr(ids, "ndim", None) == 2 and ids.shape[0] != rows:
            raise ValueError(f"{name} have {ids.shape[0]} rows, {first} have {rows}: give one each.")
        if mask not in batch and hasattr(ids, "shape"):
            batch = {**batch, mask: np.ones(ids.shape, bool)}
        inputs |= _stack_inputs(model, params, batch, stack)
    return inputs


def prompt_inputs(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a batch that its first stack reads: all but the answer in text; see `model_inputs`."""
    stack = model.stacks[0]
    _check_there(batch, stack.inputs[:2])
    return _stack_inputs(model, params, batch, stack)


def _check_there(batch: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; it has {sorted(batch)}: pass what the tokenizer returns.")


def _stack_inputs(model: Model, params: Params, batch: Mapping[str, Any], stack: Stack) -> dict[str, Array]:
    embeddings = subtree(params, ("embeddings",))
    first = stack.inputs[0]
    ids = batch[first]
    if getattr(ids, "ndim", None) != 2:
        raise ValueError(f"{first} must be a [batch, length] array: tokenize with padding=True, return_tensors='np'.")
    if not 0 < ids.shape[1] <= model.max_length:
        raise ValueError(
            f"the batch has {ids.shape[1]} tokens and the model reads 1 to {model.max_length}: truncate the text."
        )
    inputs: dict[str, Array] = {}
    for name, given in ((name, batch[name]) for name in stack.inputs if name in batch):
        shape = getattr(given, "shape", type(given).__name__)
        if name == ANSWER and isinstance(shape, tuple) and len(shape) == 2:
            shape = (shape[0], ids.shape[1]) if shape[1] <= ids.shape[1] else shape
        if shape != ids.shape:
            raise ValueError(f"{name} must be an array of shape {ids.shape}, as {first}, got {shape}.")
        array, table = jnp.asarray(given), _TABLES.get(name)
        if table is not None:
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise TypeError(f"{name} must be integers, got {array.dtype}.")
            if isinstance(given, np.ndarray) and given.size and table in embeddings:
                _check_indices(name, given, embeddings[table]["embedding"].shape[0])
        inputs[name] = array.astype(jnp.bool_ if table is None else jnp.int32)
    return inputs


def _check_indices(name: str, indices: np.ndarray, rows: int) -> None:
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= rows:
        raise ValueError(f"{name} go from {low} to {high}, the model knows 0 to {rows - 1}: is this its tokenizer?")


def check_intervention(model: Model, params: Params, inputs: Mapping[str, Array], intervention: Intervention) -> None:
    """Refuses gates and means that do not belong to these parameters, or gates for another number of examples.

    Raises:
        TypeError: If they are not dicts of arrays.
        ValueError: Naming everything that does not fit.
    """
    if intervention.gates is not None:
        check_gates(model, params, intervention.gates, rows=inputs[model.stacks[0].inputs[0]].shape[0])
    if intervention.means is not None:
        check_means(model, params, intervention.means)


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """The static settings of a layer that runs."""

    kind: str = ""  # of the layer, see `Stack.kinds`
    tokens: TokenReduction = sum_tokens  # how gate gradients reduce over tokens
    # The values to return by local name: whole names, or what they end with: kinds of units (the gated values),
    # "scores" (attention scores before mask and softmax), "allowed" (what the softmax reads) and "residual" (what a
    # module's output is added to)
    returns: tuple[str, ...] = ()


@partial(jax.jit, static_argnums=(0, 1))
def embed_compiled(
    model: Model, stack: str, params: Params, batch: dict[str, Array], before: State | None, key: Array | None
) -> State:
    """`Model.embed`, compiled."""
    return model.embed(params, batch, stack=stack, before=before, key=key)


@partial(jax.jit, static_argnums=(0, 1))
def block_compiled(
    model: Model,
    settings: BlockSettings,
    params: Params,
    state: State,
    mask: Mask,
    intervention: Intervention,
    key: Array | None,
) -> tuple[State, dict[str, Array]]:
    """`Model.block`, compiled: one program for all layers of equal kind and shape."""
    return model.block(params, state, mask, intervention, settings=settings, key=key)


@partial(jax.jit, static_argnums=(0, 1))
def values_compiled(
    model: Model, settings: BlockSettings, params: Params, state: State, mask: Mask
) -> dict[str, Array]:
    """The values that an open layer returns beside its output; what comes after them is not computed."""
    return model.block(params, state, mask, settings=settings)[1]


@partial(jax.jit, static_argnums=(0, 1))
def readout_compiled(
    model: Model, head: TaskHead, params: Params, state: State, mask: Mask, key: Array | None
) -> Array:
    """`Model.readout`, compiled."""
    return model.readout(params, state, mask, head, key=key)


class Layer(NamedTuple):
    """One layer among those of all stacks."""

    name: str  # "3", or with its stack "encoder.3": what the names of its sites begin with
    stack: Stack
    kind: str  # see `Stack.kinds`
    path: ParamPath  # where its parameters are
    params: Params
    entry: Params | None  # of the first layer of a stack: what `embed` reads


def model_layers(model: Model, params: Params) -> list[Layer]:
    """The layers of all stacks, in the order in which they run.

    Raises:
        ValueError: If they are not the layers that the model has, numbered from 0.
    """
    every = []
    for stack in model.stacks:
        layers = subtree(params, stack.path)
        if set(layers) != set(range(stack.layers)):
            where = f"{stack.name} layers" if stack.name else "layers"
            raise ValueError(
                f"the parameters have the {where} {list(layers)}, the model 0 to {stack.layers - 1} (as integers)."
            )
        prefix = f"{stack.name}." if stack.name else ""
        for i, kind in enumerate(stack.kinds):
            entry = part(params, model.embed_places(stack.name)) if i == 0 else None
            every.append(Layer(f"{prefix}{i}", stack, kind, (*stack.path, i), layers[i], entry))
    return every


def mask_of(layer: Layer, inputs: Mapping[str, Array]) -> Mask:
    """The mask that a layer reads."""
    memory = layer.stack.memory
    return Mask(inputs[layer.stack.inputs[1]], None if memory is None else inputs[memory])


def readout_mask(head: TaskHead, layer: Layer, inputs: Mapping[str, Array]) -> Mask:
    """The mask that a task head reads after the last layer.

    Of spans these are the tokens at which one may start or end; of an answer behind its prompt, the last ones.
    """
    name = "answerable" if head.spans else ANSWER
    return Mask(inputs[name]) if name in inputs else mask_of(layer, inputs)


def enter(model: Model, layer: Layer, inputs: dict[str, Array], state: State | None, key: Array | None = None) -> State:
    """The input of a layer: `state` itself, unless the layer is the first of a stack that `state` has not entered."""
    entered = state is not None and (layer.stack.memory is None or state.memory is not None)
    if state is not None and (entered or layer.entry is None):
        return state
    if layer.entry is None:
        raise ValueError(f"layer {layer.name} is not the first of its stack: it needs what the layer before returned.")
    return embed_compiled(model, layer.stack.name, layer.entry, inputs, state, key)


def run_layer(
    model: Model,
    layer: Layer,
    inputs: Mapping[str, Array],
    state: State,
    intervention: Intervention = Intervention(),
    *,
    returns: tuple[str, ...] = (),
    key: Array | None = None,
) -> tuple[State, dict[str, Array]]:
    """Runs one layer on what `enter` returns: its output, and the values to return (see `BlockSettings`) by local name.

    Gates and means have the names of their sites; those of other layers are left out. A key switches dropout on.
    """
    settings, local = BlockSettings(kind=layer.kind, returns=returns), layer_intervention(intervention, layer.name)
    return block_compiled(model, settings, layer.params, state, mask_of(layer, inputs), local, key)


def advance(
    model: Model,
    layers: Sequence[Layer],
    inputs: dict[str, Array],
    state: State | None = None,
    intervention: Intervention = Intervention(),
) -> State:
    """Runs consecutive layers, without dropout and without keeping anything for a backward pass.

    `state` is what the layer before them returned; None: they are the first.
    """
    result: Any = state  # without layers, what came in
    for layer in layers:
        result, _ = run_layer(model, layer, inputs, enter(model, layer, inputs, result), intervention)
    return result


def layer_entries(entries: Mapping[str, Any] | None, layer: str) -> dict[str, Any]:
    """The entries of one layer, by local name: `{"3.ffn.neurons": g}` gives `{"ffn.neurons": g}` for layer "3"."""
    prefix = f"{layer}."
    return {name[len(prefix) :]: value for name, value in (entries or {}).items() if name.startswith(prefix)}


def layer_intervention(intervention: Intervention, layer: str) -> Intervention:
    """Gates and means of one layer, by local name."""
    return Intervention(*(layer_entries(entries, layer) for entries in intervention))


def layer_keys(key: Array | None, layers: int) -> list[Array | None]:
    """One random key per layer, then one for the task head and one for the embeddings; all None without a key."""
    if key is None:
        return [None] * (layers + 2)
    return list(jax.random.split(key, layers + 2))


def entry_key(keys: list[Array | None], layer: Layer) -> Array | None:
    """The random key for the embeddings of a layer's stack."""
    return keys[-1] if layer.stack.memory is None or keys[-1] is None else jax.random.fold_in(keys[-1], 1)


def repeat_rows(tree: Any, times: int) -> Any:
    """Every row of every array `times` times in succession, so that rows stay on their device."""
    return tree if times == 1 else _repeat(times, tree)


@partial(jax.jit, static_argnums=0)
def _repeat(times: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)

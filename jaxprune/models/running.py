"""Models layer by layer, forwards and backwards: checked inputs, and one program for layers of equal kind and shape.

A stack says what it reads of a batch and whether it attends causally, a layer has a static kind. All of that comes from
the model's family; what runs them is here.

A Python loop over the layers inside one `jit` makes the gradient's compile time grow faster than the depth. Here every
layer runs through one compiled forward block, whose pullback comes back as arrays, and one compiled pull: layers of
equal shape share both programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.models.layers import PRODUCT, WORDS, TaskHead, TokenReduction, sum_tokens
from jaxprune.units import Gates, Intervention, Params, check_gates, check_means, flatten, subtree, unflatten
from jaxprune.units import Path as ParamPath

if TYPE_CHECKING:
    from jaxprune.models.model import Model


class Stack(NamedTuple):
    """Layers that run one after the other."""

    name: str  # "" in a model with one stack
    path: ParamPath  # of its layers in the parameters
    kinds: tuple[str, ...]  # of its layers: those of equal kind and shape share one compiled program
    inputs: tuple[str, ...]  # what it reads of a batch: first its tokens, second their mask
    memory: str | None = None  # the mask of what the stack before returns, if its layers read that, too
    causal: bool = False  # whether a token attends to itself and to those before alone
    # Whether the backward pass keeps of a layer what its matrix products return alone, and computes the rest again:
    # half the memory where feed-forward networks are gated, as fast where that rest is cheap (an `erf` is not)
    recomputes: bool = False

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.kinds)


class State(NamedTuple):
    """The values that the layers of a stack pass on."""

    hidden: Float[Array, "b t d"]
    # What the stack before has returned, if they all read it; of fewer rows where several next to each other share them
    memory: Float[Array, "r s d"] | None = None


class LabelWords(NamedTuple):
    """The tokens that stand for labels."""

    tokens: Int[Array, "b l"]
    bias: Float[Array, "b l"]  # what is added to their logits


class Mask(NamedTuple):
    """The places of tokens."""

    tokens: Bool[Array, "b t"]  # among those that a layer computes
    memory: Bool[Array, "b s"] | None = None  # among those of the stack before
    words: LabelWords | None = None  # what the head `WORDS` reads out


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
    "answer_mask", "label_words", "label_bias",
)  # fmt: skip
LABELS = ("label_words", "label_bias")  # `[b, labels]`: `LabelWords`
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
    return inputs | {name: jnp.asarray(batch[name]) for name in LABELS if name in batch}


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
    recomputes: bool = False  # see `Stack.recomputes`
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
    mask = Mask(inputs[name]) if name in inputs else mask_of(layer, inputs)
    if head != WORDS:
        return mask
    _check_there(inputs, LABELS)
    return mask._replace(words=LabelWords(*(inputs[name] for name in LABELS)))


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
        flat: dict[ParamPath, Array] = {}
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


def gradients_at(places: Places, grads: Params) -> dict[ParamPath, Array]:
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
        settings = BlockSettings(kind=layer.kind, recomputes=layer.stack.recomputes, tokens=gradients.tokens)
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


_PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)


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
    kept = jax.checkpoint(run, prevent_cse=False, policy=_PRODUCTS) if settings.recomputes else run
    output, pullback = jax.vjp(kept, *differentiated)
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

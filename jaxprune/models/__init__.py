"""Transformer models as pure functions of `(params, batch, gates)`; one file per family.

A `Model` holds no arrays and no widths, so one model serves the dense parameters and every pruned copy of them, and it
is a static argument of `jax.jit`. Compiled programs are one block large: `apply` runs as it is, or inside your own jit.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.gates import AxisTable, Gates, Params, check_gates, check_means, subtree
from jaxprune.gates import Path as ParamPath
from jaxprune.models.layers import TokenReduction, sum_tokens

# What a model reads from a batch, as Hugging Face calls it; other keys are ignored.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """A classifier (or regressor) on the encoder."""

    name: str
    labels: tuple[str, ...]  # one name per logit
    regression: bool = False
    pooling: str = "first"  # "first": the first token's vector; "mean": the mean over tokens
    dense: str | None = None  # activation of the layer before the output; None: there is none


# The task head of a text-to-text model: the next token, one logit per entry of the vocabulary.
LANGUAGE = TaskHead(name="language", labels=())


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


class Output(NamedTuple):
    """What `Model.apply` returns; parts that were not asked for are None. An encoder's come before a decoder's."""

    logits: Float[Array, "b l"] | Float[Array, "b t v"] | None  # None if the model has no task head
    hidden: tuple[Float[Array, "b t d"], ...] | None = None  # of each stack: its embedding output, every layer's output
    sites: dict[str, Array] | None = None  # gated values: heads [b, t, units, head_dim], neurons [b, t, units]
    scores: tuple[Float[Array, "b n t s"], ...] | None = None  # attention scores before mask and softmax


@lru_cache
def families() -> dict[str, ModuleType]:
    """Model type to the module that builds it: every module of this package that declares `MODEL_TYPES`."""
    found: dict[str, ModuleType] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        found |= {model_type: module for model_type in getattr(module, "MODEL_TYPES", ())}
    return found


def family(model_type: Any) -> ModuleType:
    """The module that builds models of this type.

    Raises:
        ValueError: If there is none, with the list of those there are.
    """
    if not isinstance(model_type, str) or model_type not in families():
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(families()))}.")
    return families()[model_type]


@dataclass(frozen=True)
class Model:
    """An architecture: pure functions over parameters, equal and hash-equal whenever the configuration is."""

    config: Any  # the family's frozen configuration
    source: Path | None = field(default=None, compare=False, repr=False)  # folder with the tokenizer's files

    @property
    def _family(self) -> ModuleType:
        return family(self.config.model_type)

    @property
    def axes(self) -> AxisTable:
        """The names of every parameter's axes."""
        return self._family.AXES

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the task heads."""
        return tuple(head.name for head in self.config.task_heads)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of layers, in the order in which they run."""
        return self._family.stacks(self.config)

    @property
    def writes_text(self) -> bool:
        """Whether the model answers in text, token by token, and has no task heads."""
        return len(self.stacks) > 1

    @property
    def max_length(self) -> int:
        """The most tokens an example may have."""
        return self.config.max_length

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer that came with the model, read when first asked for or when its files changed.

        Raises:
            FileNotFoundError: If the model was not loaded from a folder, or the folder has no tokenizer.
        """
        if self.source is None:
            raise FileNotFoundError(
                "this model was not loaded from a folder, so it has no tokenizer; use jp.load(path)."
            )
        return _tokenizer(self.source, _versions(self.source))

    def head(self, name: str | None = None) -> TaskHead:
        """The task head of this name; None is the only one. A text-to-text model has one, `LANGUAGE`, and no other.

        Raises:
            ValueError: If there is no such head, or no name was given and there are several; it lists them.
        """
        if self.writes_text and name in (None, LANGUAGE.name):
            return LANGUAGE
        if name is None and len(self.heads) == 1:
            return self.config.task_heads[0]
        for head in self.config.task_heads:
            if head.name == name:
                return head
        have = ", ".join(self.heads) or "none"
        if name is None:
            raise ValueError(f"the model has {len(self.heads)} task heads ({have}): name one with head=.")
        raise ValueError(f"the model has no task head {name!r}; it has: {have}.")

    def with_heads(self, heads: tuple[TaskHead, ...]) -> Model:
        """The same architecture with other task heads; `initialise_head` makes their parameters.

        Raises:
            ValueError: If two heads have the same name, or a name is not made of letters, digits, `_` and `-`.
        """
        return replace(self, config=self._family.with_heads(self.config, heads))

    def initialise(self, key: Array) -> Params:
        """Random float32 parameters, for tests and for training from scratch."""
        return self._family.initialise(self.config, key)

    def initialise_head(self, name: str, key: Array) -> Params:
        """Random float32 parameters of one task head."""
        return self._family.initialise_head(self.config, self.head(name), key)

    def embed(
        self,
        params: Params,
        batch: Mapping[str, Array],
        *,
        stack: str = "",
        before: State | None = None,
        key: Array | None = None,
    ) -> State:
        """What the first layer of a stack reads.

        Args:
            params: What is at `embed_places`; in a model with one stack the `embeddings` part.
            batch: The inputs.
            stack: The stack.
            before: What the stack before it has returned.
            key: Switches dropout on.
        """
        return self._family.embed(self.config, params, batch, stack, before, key)

    def embed_places(self, stack: str = "") -> Places:
        """Where the parameters are that `embed` reads; `part` takes them out."""
        return self._family.embed_places(self.config, stack)

    def block(
        self,
        params: Params,
        hidden: State,
        mask: Mask,
        gates: Gates | None = None,
        *,
        means: Gates | None = None,
        tokens: TokenReduction = sum_tokens,
        key: Array | None = None,
        scores: bool = False,
    ) -> tuple[State, dict[str, Array]]:
        """One layer.

        Args:
            params: The layer's parameters, such as `params["layers"][i]`.
            hidden: The layer's input.
            mask: True where there is a token.
            gates: The layer's gates by local name (`"attention.heads"`); a missing one is open.
            means: What closed units are replaced by; a missing one is zero.
            tokens: How gate gradients reduce over tokens.
            key: Switches dropout on.
            scores: Whether to return the attention scores, as `"attention.scores"` among the sites.

        Returns:
            The layer's output and its gated values by local name.
        """
        return self._family.block(self.config, params, hidden, mask, gates or {}, means or {}, tokens, key, scores)

    def prepare(self, params: Params, memory: Float[Array, "b s d"], length: int) -> Cache:
        """What one decoder layer keeps while text is written, before the first token.

        Args:
            params: The layer's parameters, such as `params["decoder"]["layers"][i]`.
            memory: The encoder's output, as in `Decoding`.
            length: The most tokens that `step` will read.
        """
        return self._family.prepare(self.config, params, memory, length)

    def step(
        self,
        params: Params,
        hidden: Float[Array, "b 1 d"],
        cache: Cache,
        position: Array,
        mask: Bool[Array, "b s"],
        gates: Gates | None = None,
        *,
        means: Gates | None = None,
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """One decoder layer for one token: what `block` computes there, given the tokens before.

        Args:
            params: The layer's parameters.
            hidden: The layer's input at this token.
            cache: What the step before has returned, or `prepare`.
            position: The token's place: steps go from 0 upwards.
            mask: True where the encoder has a token.
            gates: The layer's gates by local name (`"cross.heads"`); a missing one is open.
            means: What closed units are replaced by; a missing one is zero.

        Returns:
            The layer's output at this token, and the cache for the next.
        """
        return self._family.step(self.config, params, hidden, cache, position, mask, gates or {}, means or {})

    def readout(
        self, params: Params, hidden: State, mask: Mask, head: TaskHead, *, key: Array | None = None
    ) -> Float[Array, "b l"] | Float[Array, "b t v"]:
        """The logits of one task head, in float32. `params` is what is at `readout_places`, often `heads.NAME`."""
        return self._family.readout(self.config, params, hidden, mask, head, key)

    def readout_places(self, head: TaskHead) -> Places:
        """Where the parameters are that `readout` reads; `part` takes them out."""
        return self._family.readout_places(self.config, head)

    def apply(
        self,
        params: Params,
        batch: Mapping[str, Any],
        gates: Gates | None = None,
        *,
        head: str | None = None,
        means: Gates | None = None,
        hidden: bool = False,
        sites: bool = False,
        scores: bool = False,
        key: Array | None = None,
    ) -> Output:
        """Runs the model.

        Args:
            params: Parameters of any widths.
            batch: What a Hugging Face tokenizer returns, padded: `input_ids`, `attention_mask` and, for models that
                know segments, `token_type_ids`, each `[b, t]`. Other keys are ignored.
            gates: Site name to gates `[units]`, or `[b, units]` for one row per example. None multiplies nothing.
            head: The task head; None is the only one.
            means: Site name to what a closed unit is replaced by; a missing one is zero.
            hidden: Whether to return the hidden states.
            sites: Whether to return the gated values.
            scores: Whether to return the attention scores.
            key: Switches dropout on, for training.

        Returns:
            The logits, in float32, and what else was asked for.

        Raises:
            TypeError: If the gates or means are not dicts of arrays.
            ValueError: If the batch is longer than the model's positions or holds tokens outside the vocabulary, if the
                gates or means do not fit the parameters, or the parameters are not this model's.
        """
        inputs = model_inputs(self, params, batch)
        check_intervention(self, params, inputs, gates, means)
        layers = model_layers(self, params)
        keys = layer_keys(key, len(layers))
        state, states, values, raw = None, [], {}, []
        for layer, own_key in zip(layers, keys, strict=False):
            if layer.entry is not None:
                state = embed_compiled(self, layer.stack, layer.entry, inputs, state, entry_key(keys, layer))
                states.append(hidden_of(state))
            own, own_means = layer_entries(gates, layer.name), layer_entries(means, layer.name)
            mask = mask_of(layer, inputs)
            state, found = block_compiled(self, layer.params, state, mask, own, own_means, own_key, scores, sites)
            for name, value in found.items():
                if name.endswith(".scores"):
                    raw.append(value)
                else:
                    values[f"{layer.name}.{name}"] = value
            if hidden:
                states.append(hidden_of(state))
        logits = None
        if self.heads or self.writes_text or head is not None:
            chosen = self.head(head)
            own = part(params, self.readout_places(chosen))
            logits = _readout(self, chosen, own, state, mask_of(layers[-1], inputs), keys[-2])
        return Output(
            logits,
            hidden=tuple(states) if hidden else None,
            sites=values if sites else None,
            scores=tuple(raw) if scores else None,
        )


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
    sites: bool = False,
) -> tuple[State, dict[str, Array]]:
    """`Model.block`, compiled: one program for all layers of equal shape."""
    hidden, found = model.block(params, hidden, mask, gates, means=means, key=key, scores=scores)
    return hidden, {name: value for name, value in found.items() if sites or (scores and name.endswith(".scores"))}


@partial(jax.jit, static_argnums=(0, 1))
def _readout(model: Model, head: TaskHead, params: Params, hidden: State, mask: Mask, key: Array | None) -> Array:
    return model.readout(params, hidden, mask, head, key=key)


class _Sequence(NamedTuple):
    """The arrays of a batch that describe one sequence of tokens; the first has the indices, the second is the mask."""

    names: tuple[str, ...]
    tables: Mapping[str, str]  # of those that are indices: the part of the embeddings that they look up


_ENCODED = _Sequence(INPUTS[:3], {"input_ids": "word", "token_type_ids": "token_type"})
_DECODED = _Sequence(INPUTS[3:], {"decoder_input_ids": "word"})


def model_inputs(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a batch that the model reads: indices as int32, masks as bool.

    Raises:
        TypeError: If indices are not integers.
        ValueError: If one is missing or has another shape, the batch is longer than the model's positions, or
            (for arrays on the host) an index is outside its table.
    """
    if model.writes_text:
        _require(batch, (*INPUTS[:2], _DECODED.names[0]))
    inputs = encoder_inputs(model, params, batch)
    if not model.writes_text:
        return inputs
    ids = batch["decoder_input_ids"]
    if getattr(ids, "ndim", None) == 2 and ids.shape[0] != inputs["input_ids"].shape[0]:
        raise ValueError(
            f"decoder_input_ids have {ids.shape[0]} rows, input_ids have {inputs['input_ids'].shape[0]}: give one each."
        )
    if "decoder_attention_mask" not in batch and hasattr(ids, "shape"):
        batch = {**batch, "decoder_attention_mask": np.ones(ids.shape, bool)}
    return inputs | _sequence(model, params, batch, _DECODED)


def encoder_inputs(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """As `model_inputs`, for the first stack alone."""
    _require(batch, INPUTS[:2])
    return _sequence(model, params, batch, _ENCODED)


def _require(batch: Mapping[str, Any], names: tuple[str, ...]) -> None:
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


_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")


def _versions(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells a changed file of a folder from the one before: name, place on the disk, size and time."""
    try:
        found = {file.name: file.stat() for file in folder.iterdir() if file.is_file()}
    except OSError as error:
        raise FileNotFoundError(f"no tokenizer could be read from {folder}: {error}") from error
    if not found.keys() & set(_VOCABULARIES):  # transformers would make one up that knows no word
        raise FileNotFoundError(f"no tokenizer could be read from {folder}: it has none of {', '.join(_VOCABULARIES)}.")
    return tuple((name, own.st_ino, own.st_size, own.st_mtime_ns) for name, own in sorted(found.items()))


@lru_cache(maxsize=8)
def _tokenizer(source: Path, versions: tuple[tuple[str, int, int, int], ...]) -> Any:
    from transformers import AutoTokenizer

    try:  # never run code that comes with a model, nor ask whether to
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever the parser happens to meet, plain Exception included
        raise FileNotFoundError(f"no tokenizer could be read from {source}: {error}") from error

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.gates import AxisTable, Gates, Params, check_gates, check_means, subtree
from jaxprune.models.layers import TokenReduction, sum_tokens

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what a model reads from a batch; other keys are ignored


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """A classifier (or regressor) on the encoder."""

    name: str
    labels: tuple[str, ...]  # one name per logit
    regression: bool = False
    pooling: str = "first"  # "first": the first token's vector; "mean": the mean over tokens
    dense: str | None = None  # activation of the layer before the output; None: there is none


class Output(NamedTuple):
    """What `Model.apply` returns; parts that were not asked for are None."""

    logits: Float[Array, "b l"] | None  # None if the model has no task head
    hidden: tuple[Float[Array, "b t d"], ...] | None = None  # the embedding output, then every layer's output
    sites: dict[str, Array] | None = None  # gated values: heads [b, t, units, head_dim], neurons [b, t, units]
    scores: tuple[Float[Array, "b n t s"], ...] | None = None  # scaled attention scores before mask and softmax


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
        """The task head of this name; None is the only one.

        Raises:
            ValueError: If there is no such head, or no name was given and there are several; it lists them.
        """
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

    def embed(self, params: Params, batch: Mapping[str, Array], *, key: Array | None = None) -> Float[Array, "b t d"]:
        """The embedding output. `params` is the `embeddings` part; `key` switches dropout on."""
        return self._family.embed(self.config, params, batch, key)

    def block(
        self,
        params: Params,
        hidden: Float[Array, "b t d"],
        mask: Bool[Array, "b t"],
        gates: Gates | None = None,
        *,
        means: Gates | None = None,
        tokens: TokenReduction = sum_tokens,
        key: Array | None = None,
        scores: bool = False,
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """One layer.

        Args:
            params: The layer's parameters, `params["layers"][i]`.
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

    def readout(
        self,
        params: Params,
        hidden: Float[Array, "b t d"],
        mask: Bool[Array, "b t"],
        head: TaskHead,
        *,
        key: Array | None = None,
    ) -> Float[Array, "b l"]:
        """The logits of one task head, in float32. `params` is that head's part, `params["heads"][name]`."""
        return self._family.readout(self.config, params, hidden, mask, head, key)

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
        layers, mask = model_layers(self, params), inputs["attention_mask"]
        keys = layer_keys(key, len(layers))
        state = embed_compiled(self, params["embeddings"], inputs, keys[-1])
        states, values, raw = [state], {}, []
        for i, layer in enumerate(layers):
            own, own_means = layer_entries(gates, i), layer_entries(means, i)
            state, found = block_compiled(self, layer, state, mask, own, own_means, keys[i], scores, sites)
            if scores:
                raw.append(found.pop("attention.scores"))
            if sites:
                values |= {f"{i}.{name}": value for name, value in found.items()}
            if hidden:
                states.append(state)
        logits = None
        if self.heads or head is not None:
            chosen = self.head(head)
            logits = _readout(self, chosen, subtree(params, ("heads", chosen.name)), state, mask, keys[-2])
        return Output(
            logits,
            hidden=tuple(states) if hidden else None,
            sites=values if sites else None,
            scores=tuple(raw) if scores else None,
        )


@partial(jax.jit, static_argnums=0)
def embed_compiled(model: Model, params: Params, batch: dict[str, Array], key: Array | None) -> Array:
    """`Model.embed`, compiled."""
    return model.embed(params, batch, key=key)


@partial(jax.jit, static_argnums=(0, 7, 8))
def block_compiled(
    model: Model,
    params: Params,
    hidden: Array,
    mask: Array,
    gates: Gates,
    means: Gates,
    key: Array | None,
    scores: bool = False,
    sites: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """`Model.block`, compiled: one program for all layers of equal shape."""
    hidden, found = model.block(params, hidden, mask, gates, means=means, key=key, scores=scores)
    return hidden, {name: value for name, value in found.items() if sites or (scores and name == "attention.scores")}


@partial(jax.jit, static_argnums=(0, 1))
def _readout(model: Model, head: TaskHead, params: Params, hidden: Array, mask: Array, key: Array | None) -> Array:
    return model.readout(params, hidden, mask, head, key=key)


def model_inputs(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a batch that the model reads: indices as int32, the mask as bool.

    Raises:
        TypeError: If indices are not integers.
        ValueError: If one is missing or has another shape, the batch is longer than the model's positions, or
            (for arrays on the host) an index is outside its table.
    """
    for name in INPUTS[:2]:
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; it has {sorted(batch)}: pass what the tokenizer returns.")
    embeddings = subtree(params, ("embeddings",))
    given = {name: batch[name] for name in INPUTS if name in batch}
    ids = given["input_ids"]
    if getattr(ids, "ndim", None) != 2:
        raise ValueError("input_ids must be a [batch, length] array: tokenize with padding=True, return_tensors='np'.")
    if not 0 < ids.shape[1] <= model.max_length:
        raise ValueError(
            f"the batch has {ids.shape[1]} tokens and the model reads 1 to {model.max_length}: truncate the text."
        )
    inputs: dict[str, Array] = {}
    for name, array in given.items():
        shape = getattr(array, "shape", type(array).__name__)
        if shape != ids.shape:
            raise ValueError(f"{name} must be an array of shape {ids.shape}, as input_ids, got {shape}.")
        found = jnp.asarray(array)
        if name in _TABLES:
            if not jnp.issubdtype(found.dtype, jnp.integer):
                raise TypeError(f"{name} must be integers, got {found.dtype}.")
            if isinstance(array, np.ndarray) and array.size and _TABLES[name] in embeddings:
                _check_indices(name, array, embeddings[_TABLES[name]]["embedding"].shape[0])
        inputs[name] = found.astype(jnp.int32 if name in _TABLES else jnp.bool_)
    return inputs


_TABLES = {"input_ids": "word", "token_type_ids": "token_type"}  # the part of the embeddings that an index looks up


def _check_indices(name: str, indices: np.ndarray, rows: int) -> None:
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= rows:
        raise ValueError(f"{name} go from {low} to {high}, the model knows 0 to {rows - 1}: is this its tokenizer?")


def model_layers(model: Model, params: Params) -> list[Params]:
    """The parameters of every layer, in order.

    Raises:
        ValueError: If they are not the layers that the model has, numbered from 0.
    """
    layers, count = subtree(params, ("layers",)), model.config.layers
    if set(layers) != set(range(count)):
        raise ValueError(f"the parameters have the layers {list(layers)}, the model 0 to {count - 1} (as integers).")
    return [layers[i] for i in range(count)]


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


def layer_entries(entries: Mapping[str, Any] | None, layer: int) -> dict[str, Any]:
    """The entries of one layer, by local name: `{"3.ffn.neurons": g}` gives `{"ffn.neurons": g}` for layer 3."""
    prefix = f"{layer}."
    return {name[len(prefix) :]: value for name, value in (entries or {}).items() if name.startswith(prefix)}


def layer_keys(key: Array | None, layers: int) -> list[Array | None]:
    """One random key per layer, then one for the task head and one for the embeddings; all None without a key."""
    if key is None:
        return [None] * (layers + 2)
    return list(jax.random.split(key, layers + 2))


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

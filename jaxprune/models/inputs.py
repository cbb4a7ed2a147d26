"""The arrays of a batch that a model reads, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.units import Params, subtree

if TYPE_CHECKING:
    from jaxprune.models import Model

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
    inputs = encoder_inputs(model, params, batch)
    if not model.writes_text:
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

"""The likelihood of given answers under a text-to-text model: label words ranked by it, and teacher forcing.

A *target* is the tokens of an answer, end of sequence included, `[b, u]`; `IGNORED` fills it up. The candidates of an
example, one per label, are `[b, labels, u]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxprune.data.batches import IGNORED
from jaxprune.models import (
    LANGUAGE,
    Model,
    advance,
    check_intervention,
    mask_of,
    model_inputs,
    model_layers,
    part,
    prompt_inputs,
    readout_compiled,
    repeat_rows,
)
from jaxprune.units import Intervention, Params

MOST_ROWS = 512  # answers that are decoded together: it sets the memory, not the result


def teacher_forced(model: Model, batch: Mapping[str, Any], targets: Int[Array, "b u"] | np.ndarray) -> dict[str, Any]:
    """The batch with the decoder's inputs for a target: the start token, then the target but for its last token."""
    return {**batch, **_shifted(model.config.start_id, model.config.pad_id, jnp.asarray(targets))}


@partial(jax.jit, static_argnums=(0, 1))
def _shifted(start: int, pad: int, targets: Int[Array, "b u"]) -> dict[str, Array]:
    real = targets != IGNORED
    first = jnp.full((targets.shape[0], 1), start, jnp.int32)
    inputs = jnp.concatenate([first, jnp.where(real, targets, pad)[:, :-1].astype(jnp.int32)], axis=1)
    return {"decoder_input_ids": inputs, "decoder_attention_mask": real}


def rank(
    model: Model,
    params: Params,
    batch: Mapping[str, Any],
    candidates: Int[Array, "b l u"] | np.ndarray,
    intervention: Intervention = Intervention(),
) -> Float[Array, "b l"]:
    """The log-likelihood, in nats, of every candidate answer. The encoder runs once for all of them.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        batch: `input_ids` and `attention_mask`.
        candidates: The tokens of the answers.
        intervention: Gates by site name, and what closed units are replaced by.
    """
    candidates = jnp.asarray(candidates)
    rows, labels, length = candidates.shape
    encoded = prompt_inputs(model, params, batch)
    check_intervention(model, params, encoded, intervention)
    layers, last = model_layers(model, params), model.stacks[-1].layers
    memory = advance(model, layers[:-last], encoded, None, intervention)
    output = part(params, model.readout_places(LANGUAGE))
    together = max(1, min(labels, MOST_ROWS // rows))
    likelihoods = []
    for first in range(0, labels, together):
        some = _filled(candidates[:, first : first + together], together)
        state, tiled = repeat_rows((memory, encoded), together)
        targets = some.reshape(rows * together, length)
        tiled = model_inputs(model, params, teacher_forced(model, tiled, targets))
        state = advance(model, layers[-last:], tiled, state, intervention)
        logits = readout_compiled(model, LANGUAGE, output, state, mask_of(layers[-1], tiled), None)
        likelihoods.append(_log_likelihood(logits, targets).reshape(rows, together))
    return jnp.concatenate(likelihoods, axis=1)[:, :labels]


def _filled(candidates: Int[Array, "b l u"], labels: int) -> Int[Array, "b k u"]:
    """The last group of labels, filled up to the size of the others so that they share their programs."""
    missing = labels - candidates.shape[1]
    return jnp.pad(candidates, [(0, 0), (0, missing), (0, 0)], mode="edge") if missing else candidates


@jax.jit
def _log_likelihood(logits: Float[Array, "b u v"], targets: Int[Array, "b u"]) -> Float[Array, " b"]:
    index = jnp.maximum(targets, 0)[..., None]
    each = jnp.take_along_axis(logits, index, axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(targets != IGNORED, each, 0.0).sum(1)


def answered(model: Model, params: Params, batch: Mapping[str, Any]) -> dict[str, Array]:
    """The model's inputs, with the answer that the decoder is to read.

    This is the answer of the example's label, or without one (label -1) the likeliest candidate. A batch that has
    decoder inputs, and one of a model that does not answer in text, stay as they are.
    """
    if not model.answers_in_text or "decoder_input_ids" in batch:
        return model_inputs(model, params, batch)
    candidates = candidates_in(batch)
    labels = jnp.asarray(batch["labels"], jnp.int32)

    def likeliest() -> Int[Array, " b"]:
        return jnp.where(labels < 0, rank(model, params, batch, candidates).argmax(1).astype(jnp.int32), labels)

    if isinstance(labels, Tracer):
        labels = jax.lax.cond((labels < 0).any(), likeliest, lambda: labels)
    elif (np.asarray(labels) < 0).any():
        labels = likeliest()
    return model_inputs(model, params, teacher_forced(model, batch, candidates_of(candidates, labels)))


def candidates_in(batch: Mapping[str, Any]) -> Int[Array, "b l u"]:
    """The candidates of a batch.

    Raises:
        ValueError: If there are none.
    """
    if "candidates" not in batch:
        raise ValueError(f"the batch has no 'candidates' [batch, labels, tokens]; it has {sorted(batch)}.")
    return jnp.asarray(batch["candidates"], jnp.int32)


@jax.jit
def candidates_of(candidates: Int[Array, "b l u"] | np.ndarray, labels: Int[Array, " b"]) -> Int[Array, "b u"]:
    """One candidate of every example."""
    return jnp.take_along_axis(candidates, labels[:, None, None], axis=1)[:, 0]


def without_end(targets: Int[Array, "b u"], end: int) -> Int[Array, "b u"]:
    """The targets without their last token if it is the end of the sequence."""
    return jnp.where(targets == end, IGNORED, targets)

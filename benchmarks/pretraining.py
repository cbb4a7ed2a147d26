"""Span corruption: text-to-text pre-training on bare texts, resumable to the same bits (Raffel et al. 2020).

Texts stand end to end in one stream, cut into windows of equal length. In each window some spans of tokens are replaced
by sentinels, and the target gives them back: every step has the same two shapes, and nothing is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Int

from jaxprune.checkpoints.tensors import model_digest
from jaxprune.models import Model
from jaxprune.training.finetuning import loss_and_gradients
from jaxprune.training.loop import OPTIMIZERS, Run, Step, TrainingState, train, trainable, update
from jaxprune.units import Params


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """The rule by which windows of text become inputs and targets."""

    window: int = 96  # tokens of text
    noise: float = 0.15  # of them are replaced
    span: float = 3.0  # tokens per replaced span, in the mean

    def __post_init__(self):
        if self.window < 4 or not 0 < self.noise < 1 or not self.span >= 1:
            raise ValueError("window must be at least 4 tokens, noise in (0, 1), span at least 1 token.")

    @property
    def counts(self) -> tuple[int, int]:
        """Replaced tokens and spans of a window."""
        tokens = min(max(round(self.window * self.noise), 1), self.window - 1)
        return tokens, min(max(round(tokens / self.span), 1), tokens, self.window - tokens)


class Pretraining(NamedTuple):
    """The settings of a pre-training."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-2  # at its peak, relative to the size of each parameter
    warmup: float = 0.05  # fraction of the steps
    clip: float = 1.0
    corruption: Corruption = Corruption()
    seed: int = 0

    def rate(self) -> optax.Schedule:
        """The learning rate: it rises, stays, and falls over the last third or so."""
        ends: list[Any] = [fraction * self.steps for fraction in (self.warmup, 0.7, 0.3)]
        flat = optax.constant_schedule(self.learning_rate)
        flat = optax.linear_schedule(0.0, self.learning_rate, ends[0]) if self.warmup else flat
        return optax.join_schedules([flat, optax.linear_schedule(self.learning_rate, 0.0, ends[2])], [ends[1]])


def corrupt(
    windows: Int[np.ndarray, "b w"],
    corruption: Corruption,
    sentinels: Int[np.ndarray, " n"],
    end: int,
    random: np.random.Generator,
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b u"]]:
    """Replaces spans of every window by sentinels, and gives the spans as targets.

    Inputs are what is left, a sentinel in the place of each span, and the end of sequence; targets are each sentinel
    and its span, and the end of sequence. All spans have at least one token, and at least one token stands before each.

    Args:
        windows: Tokens.
        corruption: How much is replaced.
        sentinels: The tokens that stand for the first span, the second one and so on.
        end: The end of sequence.
        random: Chooses the spans.

    Raises:
        ValueError: If there are fewer sentinels than spans.
    """
    rows, width = windows.shape
    noise, spans = corruption.counts
    if spans > len(sentinels):
        raise ValueError(f"a window has {spans} spans, the tokenizer has {len(sentinels)} sentinels for them.")
    kept = _parts(width - noise, spans, rows, random)
    gone = _parts(noise, spans, rows, random)
    inputs = np.full((rows, width - noise + spans + 1), end, np.int32)
    targets = np.full((rows, noise + spans + 1), end, np.int32)
    for row in range(rows):
        read = into = out = 0
        for i in range(spans):
            size, taken = kept[row, i], gone[row, i]
            inputs[row, into : into + size] = windows[row, read : read + size]
            inputs[row, into + size] = targets[row, out] = sentinels[i]
            targets[row, out + 1 : out + 1 + taken] = windows[row, read + size : read + size + taken]
            read, into, out = read + size + taken, into + size + 1, out + 1 + taken
    return inputs, targets


def _parts(total: int, parts: int, rows: int, random: np.random.Generator) -> Int[np.ndarray, "b n"]:
    """Cuts `total` into positive whole numbers, every way equally likely."""
    cuts = np.argsort(random.random((rows, total - 1)), axis=1)[:, : parts - 1] + 1
    edges = np.concatenate([np.zeros((rows, 1), int), np.sort(cuts, axis=1), np.full((rows, 1), total)], axis=1)
    return np.diff(edges, axis=1)


def pretrain(
    model: Model,
    params: Params,
    stream: Int[np.ndarray, " tokens"],
    sentinels: Int[np.ndarray, " n"],
    recipe: Pretraining,
    *,
    state: str | Path | None = None,
    save_every: int = 200,
    progress: Callable[[Step], None] | None = None,
) -> Params:
    """Pre-trains a text-to-text model by span corruption, with Adafactor.

    The same call with the same `state` resumes an interrupted run, to the same bits.

    Args:
        model: The architecture.
        params: Its parameters.
        stream: The tokens of all texts, end to end.
        sentinels: The tokens that stand for spans.
        recipe: How to pre-train.
        state: File that holds a run in progress; None: it cannot be resumed. It is left in place at the end.
        save_every: Steps between two writings of the state.
        progress: Called every ten steps; its epoch is the pass over the stream.

    Raises:
        ValueError: If the stream is shorter than one batch, or the loss is not finite.
        KeyboardInterrupt: After the state was written, if there is a file for it.
    """
    corruption = recipe.corruption
    windows = len(stream) // corruption.window
    if windows < recipe.batch_size:
        raise ValueError(f"the texts give {windows} windows of {corruption.window} tokens, a batch has more rows.")
    key = jax.random.key(recipe.seed)
    optimizer = optax.chain(
        optax.clip_by_global_norm(recipe.clip), OPTIMIZERS["adafactor"](), optax.scale_by_learning_rate(recipe.rate())
    )

    def batches(epoch: int) -> list[Int[np.ndarray, " b"]]:
        order = np.random.default_rng([recipe.seed, epoch]).permutation(windows)
        return list(order[: windows // recipe.batch_size * recipe.batch_size].reshape(-1, recipe.batch_size))

    def step(now: TrainingState, rows: Int[np.ndarray, " b"]) -> tuple[TrainingState, Array]:
        text = stream[rows[:, None] * corruption.window + np.arange(corruption.window)]
        random = np.random.default_rng([recipe.seed, now.done, 1])
        ids, targets = corrupt(text, corruption, sentinels, model.config.end_id, random)
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "weight": np.ones(len(ids), np.float32)}
        dropout = jax.random.fold_in(key, now.done)
        loss, grads = loss_and_gradients(model, now.params, batch, targets, key=dropout)
        return update(optimizer, now, grads), loss

    identity = {
        "recipe": recipe._asdict() | {"corruption": asdict(corruption)},
        "model": model_digest(model, params),
        "tokens": len(stream),
    }
    fresh = trainable(params)
    run = Run(identity=identity, steps=recipe.steps, batches=batches, step=step)
    begun, file = TrainingState(fresh, optimizer.init(fresh)), None if state is None else Path(state)
    return train(run, begun, file=file, save_every=save_every, progress=progress).params

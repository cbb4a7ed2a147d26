"""Transformer models as pure functions of `(params, batch, gates)`; one file per family.

A `Model` holds no arrays and no widths, so one model serves the dense parameters and every pruned copy of them, and it
is a static argument of `jax.jit`. Compiled programs are one block large: `apply` runs as it is, or inside your own jit.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float

from jaxprune.models.layers import TokenReduction, sum_tokens
from jaxprune.models.running import (
    INPUTS,
    Cache,
    Decoding,
    KeysValues,
    Layer,
    Mask,
    Masks,
    Places,
    Stack,
    State,
    advance,
    block_compiled,
    check_intervention,
    embed_compiled,
    encoder_inputs,
    enter,
    entry_key,
    hidden_of,
    layer_entries,
    layer_keys,
    mask_of,
    model_inputs,
    model_layers,
    own_mask,
    part,
    readout_compiled,
    readout_mask,
    repeat_rows,
    score_mask,
    values_compiled,
)
from jaxprune.models.tokenizer import read_tokenizer
from jaxprune.units import UNITS, AxisTable, Gates, Params
from jaxprune.units import Path as ParamPath

__all__ = [
    "INPUTS",
    "LANGUAGE",
    "NOWHERE",
    "Cache",
    "Decoding",
    "KeysValues",
    "Layer",
    "Mask",
    "Masks",
    "Model",
    "Output",
    "Places",
    "Stack",
    "State",
    "TaskHead",
    "advance",
    "block_compiled",
    "check_intervention",
    "embed_compiled",
    "encoder_inputs",
    "enter",
    "entry_key",
    "families",
    "family",
    "hidden_of",
    "layer_entries",
    "layer_keys",
    "mask_of",
    "model_inputs",
    "model_layers",
    "own_mask",
    "part",
    "readout_compiled",
    "readout_mask",
    "repeat_rows",
    "score_mask",
    "values_compiled",
]


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """A classifier (or regressor) on the encoder, or what marks the start and the end of a span."""

    name: str
    labels: tuple[str, ...]  # one name per logit; ("start", "end") of spans
    regression: bool = False
    pooling: str = "first"  # "first": the first token's vector; "mean": the mean over tokens; "none": spans
    dense: str | None = None  # activation of the layer before the output; None: there is none

    @property
    def spans(self) -> bool:
        """Whether every token has logits of its own, for a span's start and its end."""
        return self.pooling == "none"

    @property
    def kind(self) -> str:
        """What the head does, in words."""
        return "a regression" if self.regression else "for spans" if self.spans else "a classification"


ENDS = ("start", "end")  # the labels of a head for spans
NOWHERE = -1e9  # the logit of a token that no span may start or end at: finite, so that sums of logits are numbers


# The task head of a text-to-text model: the next token, one logit per entry of the vocabulary.
LANGUAGE = TaskHead(name="language", labels=())


class Output(NamedTuple):
    """What `Model.apply` returns; parts that were not asked for are None. An encoder's come before a decoder's."""

    # None if the model has no task head; of spans [b, 2, t], starts before ends
    logits: Float[Array, "b l"] | Float[Array, "b t v"] | None
    hidden: tuple[Float[Array, "b t d"], ...] | None = None  # of each stack: its embedding output, every layer's output
    sites: dict[str, Array] | None = None  # gated values [b, t, units]; those of heads [b, t, units, channels]
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
    def answers_in_text(self) -> bool:
        """Whether the model answers in text, token by token, and not by task heads."""
        return self.config.answers_in_text

    @property
    def causal(self) -> bool:
        """Whether the tokens of the last stack attend to themselves and to those before alone."""
        return self.config.causal

    @property
    def tied_places(self) -> tuple[tuple[ParamPath, ...], ...]:
        """Groups of parameters that are one in the original model: training must give them the same gradient."""
        return self._family.tied_places(self.config)

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
        return read_tokenizer(self.source)

    def head(self, name: str | None = None) -> TaskHead:
        """The task head of this name; None is the only one. A text-to-text model has one, `LANGUAGE`, and no other.

        Raises:
            ValueError: If there is no such head, or no name was given and there are several; it lists them.
        """
        if self.answers_in_text and name in (None, LANGUAGE.name):
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
        kinds: tuple[str, ...] = UNITS,
        known: Mapping[str, Array] | None = None,
        residuals: bool = False,
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
            kinds: The units whose gated values to return.
            known: Values before their gates by local name, as an open layer returned them for the same input: what
                computes them is left out of the compiled program.
            residuals: Whether to return what each module's output is added to, as `"ffn.residual"` among the sites.

        Returns:
            The layer's output and its gated values by local name.
        """
        state, found = self._family.block(
            self.config, params, hidden, mask, gates or {}, means or {}, tokens, key, scores, known or {}
        )
        wanted = (*kinds, "scores", *["residual"] * residuals)
        return state, {name: value for name, value in found.items() if name.rpartition(".")[2] in wanted}

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
        """The logits of one task head, in float32. `params` is what is at `readout_places`, often `heads.NAME`.

        Of spans `mask` says where they may start and end, see `readout_mask`; elsewhere the logits are `NOWHERE`.
        """
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
        sites: bool | tuple[str, ...] = False,
        scores: bool = False,
        key: Array | None = None,
    ) -> Output:
        """Runs the model.

        Args:
            params: Parameters of any widths.
            batch: What a Hugging Face tokenizer returns, padded: `input_ids`, `attention_mask` and, for models that
                know segments, `token_type_ids`, each `[b, t]`. For spans also `answerable` `[b, t]`: where they may
                start and end; without it at all tokens but padding. Other keys are ignored.
            gates: Site name to gates `[units]`, or `[b, units]` for one row per example. None multiplies nothing.
            head: The task head; None is the only one.
            means: Site name to what a closed unit is replaced by; a missing one is zero.
            hidden: Whether to return the hidden states.
            sites: Whether to return the gated values; or of which kinds of units, such as `("query_channels",)`.
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
        kinds = UNITS if sites is True else tuple(sites or ())
        state, states, values, raw = None, [], {}, []
        for layer, own_key in zip(layers, keys, strict=False):
            state = enter(self, layer, inputs, state, entry_key(keys, layer))
            if layer.entry is not None:
                states.append(hidden_of(state))
            own, own_means = layer_entries(gates, layer.name), layer_entries(means, layer.name)
            mask = mask_of(layer, inputs)
            state, found = block_compiled(self, layer.params, state, mask, own, own_means, own_key, scores, kinds)
            for name, value in found.items():
                if name.endswith(".scores"):
                    raw.append(value)
                else:
                    values[f"{layer.name}.{name}"] = value
            if hidden:
                states.append(hidden_of(state))
        logits = None
        if self.heads or self.answers_in_text or head is not None:
            chosen = self.head(head)
            own = part(params, self.readout_places(chosen))
            mask = readout_mask(chosen, layers[-1], inputs)
            logits = readout_compiled(self, chosen, own, state, mask, keys[-2])
        return Output(
            logits,
            hidden=tuple(states) if hidden else None,
            sites=values if sites else None,
            scores=tuple(raw) if scores else None,
        )

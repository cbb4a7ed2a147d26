"""The `Model` that every function takes: a configuration with its family's pure functions of `(params, batch, gates)`.

A `Model` holds no arrays and no widths, so one model serves the dense parameters and every pruned copy of them, and it
is a static argument of `jax.jit`. Compiled programs are one block large: `apply` runs as it is, or inside your own jit.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.models.layers import LANGUAGE, WORDS, Sites, TaskHead
from jaxprune.models.running import (
    BlockSettings,
    Cache,
    Mask,
    Places,
    Stack,
    State,
    check_intervention,
    enter,
    entry_key,
    layer_keys,
    model_inputs,
    model_layers,
    part,
    readout_compiled,
    readout_mask,
    run_layer,
)
from jaxprune.models.tokenizers import open_tokenizer, versions_of
from jaxprune.units import KINDS, UNITS, AxisTable, Gates, Intervention, Params, Site, named_sites
from jaxprune.units import Path as ParamPath


class Output(NamedTuple):
    """The results of `Model.apply`; parts that were not asked for are None. The first stack's come first."""

    # None if the model has no task head; of spans [b, 2, t], starts before ends
    logits: Float[Array, "b l"] | Float[Array, "b t v"] | None
    hidden: tuple[Float[Array, "b t d"], ...] | None = None  # of each stack: its embedding output, every layer's output
    sites: dict[str, Array] | None = None  # gated values [b, t, units]; those of heads [b, t, units, channels]
    scores: tuple[Float[Array, "b n t s"], ...] | None = None  # attention scores before mask and softmax


@lru_cache
def families() -> dict[str, ModuleType]:
    """Model type to the module that builds it: every module of this package that declares `MODEL_TYPES`."""
    package = __name__.rpartition(".")[0]
    modules: dict[str, ModuleType] = {}
    for entry in pkgutil.iter_modules(sys.modules[package].__path__):
        module = importlib.import_module(f"{package}.{entry.name}")
        modules |= dict.fromkeys(getattr(module, "MODEL_TYPES", ()), module)
    return modules


def family(model_type: Any) -> ModuleType:
    """The module that builds models of this type.

    Raises:
        ValueError: If there is none, with the list of those there are.
    """
    if not isinstance(model_type, str) or model_type not in families():
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(families()))}.")
    return families()[model_type]


def order_sites(names: Iterable[str]) -> tuple[Site, ...]:
    """The sites of some names, in the order of a model that has them, but without a model.

    Raises:
        ValueError: If one is no name of a site, or no family has them all.
    """
    return named_sites([module.AXES for module in dict.fromkeys(families().values())], names)


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
        """Whether the model answers in text, token by token, rather than by task heads."""
        return self.config.answers_in_text

    @property
    def continues(self) -> bool:
        """True if an answer in text goes on from its prompt, in the same stack."""
        return self.answers_in_text and self.stacks[-1].memory is None

    @property
    def causal(self) -> bool:
        """Whether the tokens of the last stack attend only to themselves and to earlier ones."""
        return self.stacks[-1].causal

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
        return open_tokenizer(self.source, self.config.raw, versions_of(self.source))

    def head(self, name: str | None = None) -> TaskHead:
        """The task head of this name, or the only one if None.

        A model that answers in text has `LANGUAGE`, its only one if None, and `WORDS` besides.

        Raises:
            ValueError: If there is no such head, or no name was given and there are several; it lists them.
        """
        if self.answers_in_text and name in (None, LANGUAGE.name, WORDS.name):
            return WORDS if name == WORDS.name else LANGUAGE
        if name is None and len(self.heads) == 1:
            return self.config.task_heads[0]
        for head in self.config.task_heads:
            if head.name == name:
                return head
        if not self.heads and not self.answers_in_text:
            asked = "" if name is None else f" {name!r}"
            raise ValueError(f"the model has no task head{asked}: fine-tune it first (`finetune`), which adds one.")
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
        """The input of a stack's first layer.

        Args:
            params: What is at `embed_places`; in a model with one stack the `embeddings` part.
            batch: The inputs.
            stack: The name of the stack.
            before: What the stack before it has returned.
            key: Switches dropout on.
        """
        return self._family.embed(self.config, params, batch, stack, before, key)

    def embed_places(self, stack: str = "") -> Places:
        """The places of the parameters that `embed` reads; `part` takes them out."""
        return self._family.embed_places(self.config, stack)

    def block(
        self,
        params: Params,
        state: State,
        mask: Mask,
        intervention: Intervention = Intervention(),
        *,
        settings: BlockSettings = BlockSettings(),
        key: Array | None = None,
        known: Mapping[str, Array] | None = None,
    ) -> tuple[State, dict[str, Array]]:
        """One layer.

        Args:
            params: The layer's parameters, such as `params["layers"][i]`.
            state: The layer's input.
            mask: True where there is a token.
            intervention: The layer's gates and means by local name (`"attention.heads"`); a missing gate is open, a
                missing mean zero.
            settings: The layer's kind, and the values to return.
            key: Switches dropout on.
            known: Values before their gates by local name, as an open layer returned them for the same input: what
                computes them is left out of the compiled program.

        Returns:
            The layer's output, and the values that the settings ask for by local name.
        """
        sites = Sites(intervention, mask.tokens, settings.tokens, settings.returns, known or {})
        return self._family.block(self.config, settings.kind, params, state, mask, sites, key), sites.values

    def prepare(self, params: Params, state: State, length: int) -> Cache:
        """The cache of one layer of the last stack before its first token.

        Args:
            params: The layer's parameters.
            state: The input of the stack's first layer, of any number of tokens.
            length: The most tokens that `step` will read.
        """
        return self._family.prepare(self.config, params, state, length)

    def step(
        self,
        params: Params,
        state: State,
        cache: Cache,
        position: Array,
        mask: Mask,
        intervention: Intervention = Intervention(),
        *,
        kind: str = "",
    ) -> tuple[State, Cache]:
        """One layer of the last stack for the next tokens: the same as `block`, given the tokens before.

        Args:
            params: The layer's parameters.
            state: The layer's input at these tokens.
            cache: What the step before has returned, or `prepare`.
            position: The place of the first of these tokens; the first of all is at 0.
            mask: True where there is a token, among all that the cache has room for.
            intervention: The layer's gates and means by local name.
            kind: The layer's, see `Stack.kinds`.

        Returns:
            The layer's output at these tokens, and the cache for the next.
        """
        return self._family.step(self.config, kind, params, state, cache, position, mask, intervention)

    def readout(
        self, params: Params, state: State, mask: Mask, head: TaskHead, *, key: Array | None = None
    ) -> Float[Array, "b l"] | Float[Array, "b t v"]:
        """The logits of one task head, in float32. `params` is what is at `readout_places`, often `heads.NAME`.

        Of spans `mask` says where they may start and end, see `readout_mask`; elsewhere the logits are `NOWHERE`. Of
        `WORDS` it says which tokens stand for the labels.
        """
        logits = self._family.readout(self.config, params, state, mask, head, key)
        if mask.words is None:
            return logits
        return jnp.take_along_axis(logits[:, -1], mask.words.tokens, axis=1) + mask.words.bias

    def readout_places(self, head: TaskHead) -> Places:
        """The places of the parameters that `readout` reads; `part` takes them out."""
        return self._family.readout_places(self.config, head)

    def products(self, path: ParamPath, lengths: tuple[float, ...]) -> tuple[float, float, float]:
        """The number of products of a layer's kernel, for its FLOPs.

        Args:
            path: Where the kernel is.
            lengths: Tokens per example of every stack.

        Returns:
            The tokens that it multiplies; and the queries and keys whose pairs attention multiplies along each of its
            channels, booked half on either factor. Zero keys outside attention.
        """
        return self._family.products(path, lengths)

    def apply(
        self,
        params: Params,
        batch: Mapping[str, Any],
        gates: Gates | None = None,
        *,
        head: str | None = None,
        means: Gates | None = None,
        returns: Collection[str] = (),
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
            returns: What to return beside the logits: "hidden" states, attention "scores", and the gated values of
                "sites" or of kinds of units, such as "query_channels".
            key: Switches dropout on, for training.

        Returns:
            The logits, in float32, and what else was asked for.

        Raises:
            TypeError: If the gates or means are not dicts of arrays.
            ValueError: If the batch is longer than the model's positions or holds tokens outside the vocabulary, if the
                gates or means do not fit the parameters, or the parameters are not this model's.
        """
        if isinstance(returns, str) or not set(returns) <= {*RETURNS, *KINDS}:
            raise ValueError(f"returns must be some of {', '.join((*RETURNS, *KINDS))}, got {returns!r}.")
        kinds = tuple(kind for kind in KINDS if kind in returns or ("sites" in returns and kind in UNITS))
        asked = (*kinds, "scores") if "scores" in returns else kinds
        inputs, intervention = model_inputs(self, params, batch), Intervention(gates, means)
        check_intervention(self, params, inputs, intervention)
        layers = model_layers(self, params)
        keys = layer_keys(key, len(layers))
        state, states, values, scores = None, [], {}, []
        for layer, layer_key in zip(layers, keys, strict=False):
            state = enter(self, layer, inputs, state, entry_key(keys, layer))
            if layer.entry is not None and "hidden" in returns:
                states.append(state.hidden)
            state, local = run_layer(self, layer, inputs, state, intervention, returns=asked, key=layer_key)
            if "hidden" in returns:
                states.append(state.hidden)
            for name, value in local.items():
                if name.endswith(".scores"):
                    scores.append(value)
                else:
                    values[f"{layer.name}.{name}"] = value
        logits = None
        if self.heads or self.answers_in_text or head is not None:
            chosen = self.head(head)
            places = part(params, self.readout_places(chosen))
            logits = readout_compiled(self, chosen, places, state, readout_mask(chosen, layers[-1], inputs), keys[-2])
        return Output(
            logits,
            hidden=tuple(states) if "hidden" in returns else None,
            sites=values if kinds else None,
            scores=tuple(scores) if "scores" in returns else None,
        )


RETURNS = ("hidden", "sites", "scores")  # what `Model.apply` returns on request, and gated values by kind of unit

"""What a T5-family configuration says, and what of it is supported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxprune.models import TaskHead
from jaxprune.models.layers import ACTIVATIONS

MAX_LENGTH = 1 << 20  # tokens; relative positions know no end, this only refuses nonsense


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """What the architecture is. Sizes are those of fresh parameters; running a model reads them from the arrays."""

    model_type: str
    vocab: int
    embed: int
    head_dim: int
    attention_heads: int
    neurons: int
    encoder_layers: int
    decoder_layers: int
    buckets: int  # of relative positions
    max_distance: int  # tokens; all beyond share a bucket
    activation: str
    gated: bool  # whether the neurons are `activation(gating(x)) * up(x)`
    tied: bool  # whether the embeddings are the output layer too
    scaled: bool  # whether the decoder's output is divided by the square root of its size
    eps: float
    pad_id: int
    start_id: int  # the decoder's first input
    end_id: int
    dropout: float
    raw: str  # the Hugging Face configuration as read, canonical JSON

    task_heads: tuple[TaskHead, ...] = ()  # there are none: tasks are told apart by their prompts

    @property
    def layers(self) -> int:
        """The layers of the deeper stack."""
        return max(self.encoder_layers, self.decoder_layers)

    @property
    def segments(self) -> int:
        """There are no segment embeddings."""
        return 0

    @property
    def max_length(self) -> int:
        """The most tokens an example may have."""
        return MAX_LENGTH


_NAMES = {
    "vocab": "vocab_size",
    "embed": "d_model",
    "head_dim": "d_kv",
    "attention_heads": "num_heads",
    "neurons": "d_ff",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
_DEFAULTS = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # settings that change what is computed
    "is_decoder": (False, None),
    "is_encoder_decoder": (True, None),
    "pruned_heads": ({}, None),
}


def parse_config(raw: Mapping[str, Any], task_heads: tuple[TaskHead, ...] | None = None) -> T5Config:
    """Reads a Hugging Face configuration.

    Args:
        raw: The content of `config.json`, without a `jaxprune` section.
        task_heads: Must be empty or None: a text-to-text model has none.

    Raises:
        ValueError: Listing every value that is missing or not supported.
    """
    kind = raw["model_type"]
    value = {ours: raw.get(theirs, _DEFAULTS.get(theirs)) for ours, theirs in _NAMES.items()}
    if value["decoder_layers"] is None:
        value["decoder_layers"] = value["encoder_layers"]
    wrong = [
        f"{name} is {raw[name]!r}, supported: {', '.join(map(repr, values))}"
        for name, values in _SUPPORTED.items()
        if name in raw and raw[name] not in values
    ]

    def expect(name: str, found: Any, fits: bool, expected: str) -> None:
        if found is None and name not in raw:
            wrong.append(f"{name} is missing")
        elif not fits:
            wrong.append(f"{name} is {found!r}, expected {expected}")

    for ours, theirs in _NAMES.items():
        expect(theirs, value[ours], _is_count(value[ours]) and value[ours] > 0, "a positive integer")
    expect("relative_attention_num_buckets", value["buckets"], _divides(4, value["buckets"]), "a multiple of 4")
    if _is_count(value["buckets"]) and _is_count(value["max_distance"]):
        fits = value["max_distance"] > value["buckets"] // 2
        expect("relative_attention_max_distance", value["max_distance"], fits, "more than half of the buckets")
    rate, eps = raw.get("dropout_rate", 0.1), raw.get("layer_norm_epsilon", 1e-6)
    expect("dropout_rate", rate, _is_number(rate) and 0 <= rate < 1, "a number in [0, 1)")
    expect("layer_norm_epsilon", eps, _is_number(eps) and 0 < eps < 1, "a small positive number")
    projection = raw.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    gated, activation = str(projection).startswith("gated-"), str(projection).removeprefix("gated-")
    activation = "gelu_new" if projection == "gated-gelu" else activation  # the approximation by tanh, as in T5 1.1
    expect("feed_forward_proj", projection, activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}, or gated-…")
    tokens = {
        "pad_token_id": raw.get("pad_token_id", 0),
        "decoder_start_token_id": raw.get("decoder_start_token_id", raw.get("pad_token_id", 0)),
        "eos_token_id": raw.get("eos_token_id", 1),
    }
    for name, index in tokens.items():
        fits = _is_count(index) and (not _is_count(value["vocab"]) or index < value["vocab"])
        expect(name, index, fits, "the index of a token")
    tied, scaled = raw.get("tie_word_embeddings", True), raw.get("scale_decoder_outputs")
    expect("tie_word_embeddings", tied, isinstance(tied, bool), "true or false")
    expect("scale_decoder_outputs", scaled or False, scaled in (True, False, None), "true or false")
    if task_heads:
        wrong.append(f"it has the task heads {', '.join(head.name for head in task_heads)}, supported: none")
    if wrong:
        raise ValueError(f"config.json of a {kind} model cannot be used: {'; '.join(dict.fromkeys(wrong))}.")
    # T5 1.0 shares one table and scales by it; T5 1.1 does neither. Newer files always say "tied" and keep the scaling.
    untied = tied is False or scaled is False
    return T5Config(
        model_type=kind,
        **value,
        activation=activation,
        gated=gated,
        tied=not untied,
        scaled=not untied,
        eps=float(eps),
        pad_id=tokens["pad_token_id"],
        start_id=tokens["decoder_start_token_id"],
        end_id=tokens["eos_token_id"],
        dropout=float(rate),
        raw=json.dumps(raw, sort_keys=True),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _divides(divisor: int, value: Any) -> bool:
    return _is_count(value) and value > 0 and value % divisor == 0


def with_heads(config: T5Config, task_heads: tuple[TaskHead, ...]) -> T5Config:
    """The configuration itself.

    Raises:
        ValueError: If there are task heads.
    """
    if task_heads:
        raise ValueError(
            f"a {config.model_type} model answers in text and has no task heads, got "
            f"{', '.join(head.name for head in task_heads)}: give the task a prompt instead."
        )
    return config

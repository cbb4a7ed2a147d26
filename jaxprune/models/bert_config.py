"""What a BERT-family configuration says, and what of it is supported."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxprune.models import ENDS, TaskHead
from jaxprune.models.layers import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the architecture is. Sizes are those of fresh parameters; running a model reads them from the arrays."""

    model_type: str
    vocab: int
    positions: int
    segments: int  # 0: no segment embeddings
    embed: int
    layers: int
    attention_heads: int
    neurons: int
    activation: str
    eps: float
    pad_id: int
    first_position: int  # index of the first token's position
    hidden_dropout: float
    attention_dropout: float
    head_dropout: float
    task_heads: tuple[TaskHead, ...]
    raw: str  # the Hugging Face configuration as read, canonical JSON

    @property
    def max_length(self) -> int:
        """The most tokens an example may have."""
        return self.positions - self.first_position

    @property
    def head_dim(self) -> int:
        """The size of a head, before any of its channels is removed."""
        return self.embed // self.attention_heads


def parse_config(raw: Mapping[str, Any], task_heads: tuple[TaskHead, ...] | None = None) -> EncoderConfig:
    """Reads a Hugging Face configuration.

    Args:
        raw: The content of `config.json`, without a `jaxprune` section.
        task_heads: The heads; None reads the one of a `...ForSequenceClassification` or `...ForQuestionAnswering`
            model, if it is one.

    Raises:
        ValueError: Listing every value that is missing or not supported.
    """
    kind = raw["model_type"]
    names = _DISTILBERT_NAMES if kind == "distilbert" else _BERT_NAMES
    value = {ours: raw.get(theirs, _DEFAULTS.get(theirs)) for ours, theirs in names.items()}
    wrong = [f"{name} is missing" for name in names.values() if name not in raw and name not in _DEFAULTS]
    wrong += [
        f"{name} is {raw[name]!r}, supported: {', '.join(map(repr, values))}"
        for name, values in _SUPPORTED.items()
        if name in raw and raw[name] not in values
    ]

    def expect(name: str, found: Any, fits: bool, expected: str) -> None:
        if not fits and f"{name} is missing" not in wrong:
            wrong.append(f"{name} is {found!r}, expected {expected}")

    for ours in ("vocab", "positions", "embed", "layers", "attention_heads", "neurons"):
        expect(names[ours], value[ours], _is_count(value[ours]) and value[ours] > 0, "a positive integer")
    head_dropout_name = "seq_classif_dropout" if kind == "distilbert" else "classifier_dropout"
    head_dropout = raw.get(head_dropout_name, _DEFAULTS.get(head_dropout_name))
    head_dropout = value["hidden_dropout"] if head_dropout is None else head_dropout
    rates = {names[ours]: value[ours] for ours in ("hidden_dropout", "attention_dropout")}
    for name, rate in (rates | {head_dropout_name: head_dropout}).items():
        expect(name, rate, _is_number(rate) and 0 <= rate < 1, "a number in [0, 1)")
    activation = value["activation"]
    known = isinstance(activation, str) and activation in ACTIVATIONS
    expect(names["activation"], activation, known, f"one of {', '.join(ACTIVATIONS)}")
    eps = 1e-12 if kind == "distilbert" else raw.get("layer_norm_eps", 1e-12)  # DistilBERT's is not a setting
    expect("layer_norm_eps", eps, _is_number(eps) and 0 < eps < 1, "a small positive number")
    segments = 0 if kind == "distilbert" else raw.get("type_vocab_size", 2)
    expect("type_vocab_size", segments, _is_count(segments), "a number of segments")
    counts_from_padding = kind in ("roberta", "xlm-roberta")
    pad_id = raw.get("pad_token_id", 1 if counts_from_padding else 0)
    if pad_id is None and not counts_from_padding:
        pad_id = 0  # a model without padding: only RoBERTa's positions depend on it
    expect("pad_token_id", pad_id, _is_count(pad_id), "a token index")
    value.update(pad_id=pad_id)
    first_position = 0
    if not wrong:
        first_position = value["pad_id"] + 1 if counts_from_padding else 0
        heads = value["attention_heads"]
        expect("pad_token_id", pad_id, value["pad_id"] < value["vocab"], f"one of the {value['vocab']} tokens")
        expect(names["positions"], value["positions"], value["positions"] > first_position, f"over {first_position}")
        expect(names["embed"], value["embed"], value["embed"] % heads == 0, f"a multiple of the {heads} heads")
    if task_heads is None and not wrong:
        task_heads, refused = _head_of(raw)
        wrong += refused
    if wrong:
        raise ValueError(f"config.json of a {kind} model cannot be used: {'; '.join(wrong)}.")
    config = EncoderConfig(
        model_type=kind,
        **value,
        segments=segments,
        eps=float(eps),
        first_position=first_position,
        head_dropout=float(head_dropout),
        task_heads=(),
        raw=json.dumps(raw, sort_keys=True),
    )
    return with_heads(config, task_heads or ())


_BERT_NAMES = {
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "attention_heads": "num_attention_heads",
    "neurons": "intermediate_size",
    "activation": "hidden_act",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_DISTILBERT_NAMES = _BERT_NAMES | {
    "embed": "dim",
    "layers": "n_layers",
    "attention_heads": "n_heads",
    "neurons": "hidden_dim",
    "activation": "activation",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
}
_DEFAULTS = {  # what Hugging Face assumes where a file does not say
    "hidden_act": "gelu",
    "activation": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "max_position_embeddings": 512,
}
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # settings that change what is computed
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "problem_type": (None, "single_label_classification", "regression"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _head_of(raw: Mapping[str, Any]) -> tuple[tuple[TaskHead, ...], list[str]]:
    """The task head of a Hugging Face model, named "default", and what is wrong with its description."""
    if "ForQuestionAnswering" in str(raw.get("architectures")):
        return (TaskHead(name="default", labels=ENDS, pooling="none"),), []
    if "ForSequenceClassification" not in str(raw.get("architectures")):
        return (), []
    names, count = raw.get("id2label"), raw.get("num_labels", 2)
    if not names and not (_is_count(count) and count < 2**20):  # beyond, they are not made up before they are found
        return (), [f"num_labels is {count!r}, expected a number of labels below {2**20:,}"]
    names = names or {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(names, Mapping):
        return (), [f"id2label is {names!r}, expected an object from index to label"]
    if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        return (), [f"id2label has the keys {sorted(names)}, expected 0 to {len(names) - 1}"]
    by_index = {int(i): str(label) for i, label in names.items()}
    labels = tuple(by_index[i] for i in range(len(by_index)))
    problem = raw.get("problem_type")
    regression = problem == "regression" or (problem is None and len(labels) == 1)
    if regression and len(labels) != 1:
        return (), [f"problem_type is regression with {len(labels)} outputs, supported: 1"]
    dense = "relu" if raw["model_type"] == "distilbert" else "tanh"
    return (TaskHead(name="default", labels=labels, regression=regression, dense=dense),), []


def with_heads(config: EncoderConfig, task_heads: tuple[TaskHead, ...]) -> EncoderConfig:
    """The same architecture with other task heads.

    Raises:
        ValueError: If two heads share a name or a head is not usable.
    """
    names = Counter(head.name for head in task_heads)
    for head in task_heads:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", head.name) or names[head.name] > 1:
            raise ValueError(
                f"task head {head.name!r}: names must differ and be made of letters, digits, _ and -, letter first."
            )
        if not head.labels or (head.regression and len(head.labels) != 1):
            raise ValueError(f"task head {head.name!r} has {len(head.labels)} labels.")
        if head.pooling not in ("first", "mean", "none"):
            raise ValueError(
                f"task head {head.name!r}: pooling must be 'first', 'mean' or 'none', got {head.pooling!r}."
            )
        if head.spans and (head.labels != ENDS or head.regression):
            raise ValueError(f"task head {head.name!r} is for spans: its labels are {ENDS}, got {head.labels}.")
        if head.dense is not None and head.dense not in ACTIVATIONS:
            raise ValueError(f"task head {head.name!r}: dense must be None or an activation, got {head.dense!r}.")
    return replace(config, task_heads=tuple(task_heads))

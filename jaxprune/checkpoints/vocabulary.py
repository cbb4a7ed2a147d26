"""Vocabularies cut to the tokens that are needed: embeddings, output layer and tokenizer become smaller together.

A text that used kept tokens alone is split into the same tokens as before, and the model computes the same. WordPiece
takes the longest piece that there is and Unigram the likeliest split, so fewer others change nothing; byte pairs keep
every merge by which a kept token comes about. Special tokens always stay, and single characters of ASCII (of bytes, all
of them), so that other texts can still be spelt.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.models import Model, family
from jaxprune.units import Params, axes_of, flatten, unflatten

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class CutVocabulary(NamedTuple):
    """A model with fewer tokens."""

    model: Model  # its tokenizer knows the kept tokens alone
    params: Params
    kept: np.ndarray  # their indices before, in order: the first is token 0 now


def cut_vocabulary(
    model: Model, params: Params, counts: Sequence[int] | np.ndarray, most: int | None = None
) -> CutVocabulary:
    """Keeps the tokens that were counted, and those that always stay.

    Args:
        model: The model, with its tokenizer.
        params: Its parameters, of any widths.
        counts: How often each token is needed, `[vocab]`.
        most: The most tokens that may stay: those that are needed most often; None keeps all that are needed.

    Returns:
        The smaller model. Its tokenizer lies in a temporary folder until it is saved.

    Raises:
        FileNotFoundError: If the model has no tokenizer.
        ValueError: If the tokenizer is of another kind than WordPiece, Unigram or byte pairs, or more must stay.
    """
    tokenizer = model.tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = _words(content)
    counted = np.zeros(model.config.vocab, np.int64)
    counted[: len(counts)] = counts
    needs = _needs(content, words)
    kept = _always(model, content, words)
    kept |= {part for token in kept for part in needs(token)}
    if most is not None and len(kept) > most:
        raise ValueError(
            f"a vocabulary of {most:,} tokens cannot be reached: special tokens and single characters alone are "
            f"{len(kept):,}."
        )
    for token in np.argsort(-counted, kind="stable")[: np.count_nonzero(counted)].tolist():
        more = needs(token) - kept
        if most is None or len(kept) + len(more) <= most:
            kept |= more
    order = np.array(sorted(kept))
    raw = _renamed(json.loads(model.config.raw) | {"pad_token_id": model.config.pad_id}, order) | {
        "vocab_size": len(order)
    }
    heads = model.config.task_heads
    folder = _folder(model, tokenizer, _cut(content, words, order), order)
    config = family(model.config.model_type).parse_config(raw, heads)
    flat = flatten(params)
    for path, array in flat.items():
        axes = axes_of(model.axes, path)
        if "vocab" in axes:
            flat[path] = jnp.take(jnp.asarray(array), order, axis=axes.index("vocab"))
    return CutVocabulary(replace(model, config=config, source=folder), unflatten(flat), order)


def _words(content: dict[str, Any]) -> list[str]:
    """The tokens by index."""
    model, found = content["model"], {}
    if model["type"] == "Unigram":
        found = {i: piece for i, (piece, _) in enumerate(model["vocab"])}
    elif model["type"] in ("WordPiece", "BPE"):
        found = {i: word for word, i in model["vocab"].items()}
    else:
        raise ValueError(
            f"the tokenizer is a {model['type']}; only the vocabularies of WordPiece, Unigram and BPE can be cut."
        )
    found |= {token["id"]: token["content"] for token in content["added_tokens"]}
    return [found.get(i, "") for i in range(1 + max(found))]


def _always(model: Model, content: dict[str, Any], words: Sequence[str]) -> set[int]:
    """The tokens that stay in any case."""
    raw, kind, index = json.loads(model.config.raw), content["model"], {word: i for i, word in enumerate(words)}
    pad = model.config.pad_id
    kept = {token["id"] for token in content["added_tokens"]} | {pad}
    kept |= set() if model.answers_in_text else set(range(pad))  # RoBERTa counts positions from the padding's index
    for name, value in raw.items():
        if name.endswith("_token_id"):
            kept |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    kept |= {index[kind["unk_token"]]} if kind.get("unk_token") in index else set()
    kept |= {kind["unk_id"]} if kind.get("unk_id") is not None else set()
    prefix = kind.get("continuing_subword_prefix") or ""
    letters = kind["type"] == "BPE" and not kind.get("byte_fallback")  # what stands for bytes, and for nothing else
    for i, word in enumerate(words):
        plain = word.removeprefix(prefix).removeprefix("▁") or word
        spelling = len(plain) == 1 and (plain.isascii() or plain == "▁" or letters)
        if spelling or _BYTE.fullmatch(word):
            kept.add(i)
    return kept


def _needs(content: dict[str, Any], words: Sequence[str]) -> Callable[[int], set[int]]:
    """Makes a function from a token to all that it needs: itself, and of byte pairs its parts."""
    if content["model"]["type"] != "BPE":
        return lambda token: {token}
    index, ranks = {word: i for i, word in enumerate(words)}, _ranks(content)

    def needs(token: int) -> set[int]:
        parts, found = [*words[token]], {token}
        while len(parts) > 1:
            pairs = [(ranks.get((a, b), len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))]
            rank, i = min(pairs)
            if rank == len(ranks):
                break  # it is no result of merges: an added token
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            found.add(index[parts[i]])
        return found | {index[part] for part in parts if part in index}

    return needs


def _ranks(content: dict[str, Any]) -> dict[tuple[str, str], int]:
    merges = content["model"]["merges"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return {(a, b): rank for rank, (a, b) in enumerate(pairs)}


def _cut(content: dict[str, Any], words: Sequence[str], order: np.ndarray) -> dict[str, Any]:
    """The tokenizer with the kept tokens alone."""
    kind, number = content["model"], {int(old): new for new, old in enumerate(order)}
    kept = {words[old] for old in number if old < len(words)}
    if kind["type"] == "Unigram":
        cut = {
            "vocab": [kind["vocab"][old] for old in number if old < len(kind["vocab"])],
            "unk_id": number.get(kind["unk_id"]),
        }
    else:
        cut: dict[str, Any] = {"vocab": {word: number[old] for word, old in kind["vocab"].items() if old in number}}
    if kind["type"] == "BPE":
        cut["merges"] = [[a, b] for a, b in _ranks(content) if {a, b, a + b} <= kept]
    added = [token | {"id": number[token["id"]]} for token in content["added_tokens"]]
    processor = content.get("post_processor")
    return content | {"model": kind | cut, "added_tokens": added, "post_processor": _processor(processor, number)}


def _processor(steps: Any, number: dict[int, int]) -> Any:
    """The steps that put tokens around a text, with the new indices."""
    if isinstance(steps, list):
        return [_processor(step, number) for step in steps]
    if not isinstance(steps, dict):
        return steps
    found = {name: _processor(value, number) for name, value in steps.items()}
    if isinstance(found.get("ids"), list):  # of a template
        found["ids"] = [number[i] for i in found["ids"]]
    for name in ("sep", "cls"):  # of BERT's and RoBERTa's: a token and its index
        if isinstance(found.get(name), list) and len(found[name]) == 2:
            found[name] = [found[name][0], number[found[name][1]]]
    return found


def _renamed(settings: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    """Settings with the new indices of tokens; one that is gone is left out."""
    number = {int(old): new for new, old in enumerate(order)}
    found = dict(settings)
    for name, value in settings.items():
        if name.endswith("_token_id") and isinstance(value, int):
            found[name] = number[value]
        elif name.endswith("_token_id") and isinstance(value, list):
            found[name] = [number[i] for i in value if i in number]
    return found


def _folder(model: Model, tokenizer: Any, content: dict[str, Any], order: np.ndarray) -> Path:
    """A folder with the tokenizer, which lasts as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="jaxprune-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.model_max_length, **named}
    settings |= {"model_input_names": tokenizer.model_input_names, "padding_side": tokenizer.padding_side}
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    if model.source is not None and (file := model.source / "generation_config.json").is_file():
        (folder / file.name).write_text(json.dumps(_renamed(json.loads(file.read_text()), order), indent=1) + "\n")
    return folder

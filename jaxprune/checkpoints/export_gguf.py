"""Writes decoders as GGUF files, the models of llama.cpp: `jaxprune.checkpoints.gguf`, the other way round."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.checkpoints.files import check_file, write_atomic
from jaxprune.checkpoints.folder import load
from jaxprune.checkpoints.gguf import FUSED, INNER, INNER_OF, OUTER, PARTS, SPLITS, TURNED
from jaxprune.checkpoints.tensors import FLOATS
from jaxprune.checkpoints.uniform import Filled, compared, described, runner, tensors_of, uniform
from jaxprune.checkpoints.weights import stored_type
from jaxprune.models import Model
from jaxprune.models.decoder import SLIDING, Rotary
from jaxprune.units import Params, flatten, lengths, path_name, resize, unflatten

ARCHITECTURES = {  # model type to the names of llama.cpp: where all layers are alike, and where they differ
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "seed_oss": ("seed_oss", "deci"),
    "qwen3": ("qwen3", "openelm"),
    "gemma3_text": ("gemma3", None),
}
ROUNDED = "q8_0"
ROUNDING = 220  # by this part of its largest a weight may differ: half of 1/127, and what float16 rounds off the scale
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", ROUNDED: "Q8_0"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # as llama.cpp calls the whole
_NO_WORDS = {"tokenizer.ggml.model": "none"}
_NORMAL, _UNKNOWN, _CONTROL, _ADDED, _UNUSED, _BYTE = range(1, 7)  # kinds of tokens
_TRIED = "Two films, 1 café: great!"


def export_gguf(
    path: str | Path,
    model: Model,
    params: Params,
    *,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a GGUF file, which llama.cpp and the programs built on it load, tokenizer included.

    Its matrices have the type that is asked for; vectors are float32. The file is read back, and compared.

    Layers of different widths keep them in the architectures `deci`, which llama, mistral, qwen2 and seed_oss become,
    and `openelm`, which a qwen3 becomes that has neither biases nor an output layer of its own. Those of all others are
    filled up with zeros to the widest.

    Args:
        path: The file.
        model: A decoder; the tokenizer is that of where it was loaded from, if it has one.
        params: Its parameters, of any widths.
        dtype: float32, bfloat16, float16 or q8_0; None is that of the file the model came from.
        check: Whether the file is read back and compared: logits of random tokens may differ by 1e-4 of the largest; in
            q8_0 weights by 1/220 of a parameter's largest.
        overwrite: Whether a file may be replaced.

    Returns:
        What was written.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        ValueError: If llama.cpp has no such model or tokenizer, or the file does not compute the same.
    """
    path, dtype = Path(path), dtype or stored_type(model)
    check_file(path, overwrite)
    if dtype not in _KINDS:
        raise ValueError(f"dtype of a GGUF file must be one of {', '.join(_KINDS)}, got {dtype!r}.")
    if not model.continues:
        raise ValueError(f"a {model.config.model_type} model is no decoder: llama.cpp cannot run it. Export it to hf.")
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need another package: pip install 'jaxprune[gguf]'.") from error
    made, architecture = _fitted(model, params, 32 if dtype == ROUNDED else 1)  # rounded blocks have 32 weights
    settings, tensors, kind = _settings(made), tensors_of(made.model, made.params), _KINDS[dtype]
    words = _tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_key_value("general.file_type", _FILE_TYPES[kind], gguf.GGUFValueType.UINT32)
        for name, value in {**settings, **words}.items():
            _add(writer, name, value)
        for name, array in _named(made, architecture, tensors):
            whole = array.ndim == 1 or (kind == "Q8_0" and array.shape[1] % 32)
            own = "F32" if array.ndim == 1 else "F16" if whole else kind
            given = gguf.quants.quantize(np.asarray(array, np.float32), gguf.GGMLQuantizationType[own])
            writer.add_tensor(name, given, raw_dtype=gguf.GGMLQuantizationType[own])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        record = {"format": "gguf", "class": architecture, **described(model, params, made), "dtype": dtype}
        record["check"] = _checked(model, params, made, file, dtype, words != _NO_WORDS) if check else None
        with open(file, "rb") as content:
            write_atomic(path, lambda out: shutil.copyfileobj(content, out))
    return record


def _fitted(model: Model, params: Params, multiple_of: int) -> tuple[Filled, str]:
    """The model with layers as llama.cpp can have them, and the architecture: one for different layers if they are."""
    made = uniform(model, params, multiple_of=multiple_of)
    config = made.model.config
    alike, other = ARCHITECTURES[config.model_type]
    if other is None or (other == "openelm" and (any(config.biases) or not config.tied)):
        return made, alike
    narrow = _narrowed(made, multiple_of, empty=other == "deci")
    return (made, alike) if all(each.written is not None for each in narrow.units.values()) else (narrow, other)


def _narrowed(made: Filled, multiple_of: int, *, empty: bool) -> Filled:
    """The model with as few units in every layer as llama.cpp computes correctly.

    It leaves out the whole layer where there are no neurons. An attention without heads may be `empty`, but not in the
    first layer, whose heads it takes the size of all from, and not with a bias of its output, which it would leave out.
    """
    config, before, widths = made.model.config, made.before, {}
    places = {(site.layer, site.kind): site for site in before}
    flat = flatten(made.params)
    for layer in range(config.layers):
        sites = [places[layer, kind] for kind in ("groups", "query_heads", "neurons")]
        groups, queries, neurons = (before[site] for site in sites)
        if not groups * queries:
            groups, queries = int(not empty or layer == 0 or config.biases[1]), 1
        if not groups:  # neither is its norm written, nor read
            flat["layers", layer, "attention", "norm", "scale"] = np.ones(config.embed, np.float32)
        neurons = -(-max(1, neurons) // multiple_of) * multiple_of
        widths |= zip(sites, (groups, queries, neurons), strict=True)
    return replace(made, params=resize(made.model.axes, unflatten(flat), widths))


def _add(writer: Any, name: str, value: Any) -> None:
    """One setting, by its type."""
    from gguf import GGUFValueType as Kind

    name = name if name.startswith(("general.", "tokenizer.")) else f"{writer.arch}.{name}"
    if isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, bool):
        writer.add_key_value(name, value, Kind.BOOL)
    else:
        kinds = {int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
        writer.add_key_value(name, value, kinds[type(value)])


def _settings(made: Filled) -> dict[str, Any]:
    """The settings of the architecture; those of units are lists where layers differ."""

    def by_layer(counts: list[int]) -> int | list[int]:
        return counts if len({*counts}) > 1 else counts[0]

    units: dict[str, list[int]] = {}
    for site, count in lengths(made.model.axes, made.params).items():
        units.setdefault(site.kind, []).append(count)
    groups, queries, neurons = (units[kind] for kind in ("groups", "query_heads", "neurons"))
    config, raw = made.model.config, json.loads(made.model.config.raw)
    gemma, kinds = config.type.gemma, dict(config.rotary)
    usual = "gelu_pytorch_tanh" if gemma else "silu"
    if config.activation != usual:
        raise ValueError(f"llama.cpp has {usual} in this architecture, not {config.activation}: export it to hf.")
    if SLIDING in config.kinds and not gemma:
        raise ValueError("llama.cpp has no sliding windows in this architecture: export it to hf.")
    rotary: Rotary = (
        next(own for kind, own in kinds.items() if kind != SLIDING) if len(kinds) > 1 else config.rotary[0][1]
    )
    found: dict[str, Any] = {
        "general.type": "model",
        "block_count": config.layers,
        "context_length": config.positions,
        "embedding_length": config.embed,
        "feed_forward_length": by_layer(neurons),
        "attention.head_count": by_layer([one * other for one, other in zip(groups, queries, strict=True)]),
        "attention.head_count_kv": by_layer(groups),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.eps,
        "rope.freq_base": rotary.theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab,
    }
    if rotary.kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rotary.factor}
    if gemma:
        if config.scale != config.head_dim**-0.5:
            raise ValueError(
                f"llama.cpp scales attention by the size of a head, not by {raw['query_pre_attn_scalar']}."
            )
        pattern = [kind == SLIDING for kind in config.kinds]
        found["attention.sliding_window"] = config.window
        if pattern != [bool((i + 1) % 6) for i in range(config.layers)]:
            found["attention.sliding_window_pattern"] = pattern
        if SLIDING in kinds and kinds[SLIDING].theta != 10_000.0:
            found["rope.freq_base_swa"] = kinds[SLIDING].theta
        if config.cap is not None:
            found["final_logit_softcapping"] = config.cap
    return found


def _named(made: Filled, architecture: str, tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by the names of llama.cpp, in its layout; those of an attention without heads are left out."""
    config = made.model.config
    inner = {theirs: name for name, theirs in INNER_OF.get(architecture, INNER).items()}
    outer = {theirs: name for name, theirs in OUTER.items()}
    rotary = config.rotary[0][1]
    if rotary.kind == "llama3":
        plain = Rotary(rotary.theta).frequencies(config.head_dim)
        yield "rope_freqs.weight", (plain / rotary.frequencies(config.head_dim)).astype(np.float32)
    for name, array in tensors.items():
        if config.type.gemma and name.endswith("norm.weight"):
            array = array.astype(np.float32) + 1
        if name in outer:
            yield outer[name], array
            continue
        layer, module, leaf = (
            name.removeprefix("model.layers.").partition(".")[0],
            *name.split(".", 3)[3].rsplit(".", 1),
        )
        if inner[module].startswith("attn") and not tensors[f"model.layers.{layer}.{PARTS[0]}.weight"].size:
            continue
        if architecture == "openelm" and module in PARTS:
            if module != PARTS[0]:
                continue
            array = np.concatenate([tensors[name.replace(module, part)] for part in PARTS])
            module = FUSED
        if architecture in TURNED and module in PARTS[:2]:  # channels i and i + half side by side
            pairs = array.reshape(-1, 2, config.head_dim // 2, *array.shape[1:])
            array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
        yield f"blk.{layer}.{inner[module]}.{leaf}", array


def _checked(model: Model, params: Params, made: Filled, file: Path, dtype: str, words: bool) -> dict[str, Any]:
    """The difference of the logits; the tokens are the same, and rounded weights are near what they were."""
    read, arrays = load(file)
    if dtype == ROUNDED:
        written = flatten(made.params)
        far = [
            path_name(path)
            for path, array in flatten(arrays).items()
            if np.abs(np.asarray(array) - written[path]).max(initial=0.0)
            > np.abs(written[path]).max(initial=0.0) / ROUNDING
        ]
        if far:
            raise ValueError(f"the export is not written: {', '.join(far[:8])} differ by more than 8 bits. Report it.")
        found = compared(model, params, runner(read, arrays, None), None, tolerance=None)
    else:
        kind = FLOATS[_KINDS[dtype]]
        flat = {
            path: jnp.asarray(array, jnp.float32) if path[-1] in ("scale", "bias") else jnp.asarray(array).astype(kind)
            for path, array in flatten(params).items()
        }
        expected = unflatten({path: array.astype(jnp.float32) for path, array in flat.items()})
        found = compared(model, expected, runner(read, arrays, None), None)
    if words and read.tokenizer(_TRIED)["input_ids"] != model.tokenizer(_TRIED)["input_ids"]:
        raise ValueError("the export is not written: its tokenizer finds other tokens. Please report it.")
    return found


def _tokenizer(model: Model) -> dict[str, Any]:
    """The settings of the tokenizer; that there is none, if the model has none.

    Raises:
        ValueError: If llama.cpp has no such tokenizer.
    """
    try:
        tokenizer = model.tokenizer
    except FileNotFoundError:
        return _NO_WORDS
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, vocab = content["model"], {**content["model"]["vocab"]} if content["model"]["type"] == "BPE" else {}
    pieces = bool(kind.get("byte_fallback"))
    split = "" if pieces else _split(content["pre_tokenizer"])
    if not vocab or not (pieces or split):
        raise ValueError(
            f"llama.cpp has no name that is known here for how the tokenizer, a {kind['type']}, splits texts; it has "
            f"{', '.join(SPLITS)}, and pieces with byte fallback. Export it to hf."
        )
    kinds = dict.fromkeys(vocab.values(), _NORMAL)
    for token in content["added_tokens"]:
        vocab[token["content"]] = token["id"]
        kinds[token["id"]] = _CONTROL if token["special"] else _ADDED
    count = max(model.config.vocab, 1 + max(vocab.values()))
    tokens = {i: token for token, i in vocab.items()}
    names = [tokens.get(i, f"[UNUSED{i}]") for i in range(count)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in kind["merges"]]
    ids = {name: getattr(tokenizer, f"{theirs}_token_id") for name, theirs in _SPECIAL.items()}
    if pieces:
        for i, token in tokens.items():
            if kinds[i] == _NORMAL and len(token) == 6 and token.startswith("<0x"):
                kinds[i] = _BYTE
        if ids["unknown"] is not None:
            kinds[ids["unknown"]] = _UNKNOWN
    first, *_ = tokenizer("a")["input_ids"]
    found: dict[str, Any] = {
        "model": "llama" if pieces else "gpt2",
        "pre": "default" if pieces else split,
        "tokens": names,
        "token_type": [kinds.get(i, _UNUSED) for i in range(count)],
        **{f"{name}_token_id": i for name, i in ids.items() if i is not None},
        "add_bos_token": first == ids["bos"],
    }
    if pieces:
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        found["scores"] = [-float(ranks.get(name, len(merges))) for name in names]
        found["add_space_prefix"] = '"Prepend"' in json.dumps(content["normalizer"])
    else:
        found["merges"] = merges
    settings = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    template = getattr(tokenizer, "chat_template", None)
    return settings | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def _split(steps: Any) -> str:
    """The name of llama.cpp for a way to split texts; "" if there is none."""

    def plain(steps: Any) -> list[Any]:
        many = steps.get("pretokenizers", [steps]) if steps else []
        unimportant = ("trim_offsets", "add_prefix_space")
        return [{name: value for name, value in step.items() if name not in unimportant} for step in many]

    return next((name for name, known in SPLITS.items() if plain({"pretokenizers": known}) == plain(steps)), "")

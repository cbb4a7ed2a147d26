"""Reads GGUF files, the models of llama.cpp, as if they were folders of Hugging Face's.

A GGUF file is one header (settings, the tokenizer, name, type and place of every tensor) and the bytes of the tensors,
most of them rounded in blocks. `unpacked` writes what the header says into a temporary folder, as `config.json` and
`tokenizer.json` beside a link to the file; `GGUFFile` makes the tensors when they are read, some rows at a time.

A file may give every layer its own number of heads and neurons, as `deci` and `openelm` do. An attention without heads
has no tensors then.

The header is not trusted: what it counts must lie within the file, and no two tensors share bytes. Settings of the
architecture and tensors that are not known are refused, as they may change what the model computes.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import reprlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxprune.checkpoints.tensors import FLOATS, Entry, TensorFile
from jaxprune.models.decoder import GLOBAL, SLIDING, Rotary

GGUF = "model.gguf"  # the link in a folder that `unpacked` makes
_MAX_HEADER = 2**25  # bytes; the largest vocabularies need a fifth
_LONGEST = 1000  # characters of a token: its merges are found by trying all places
_SLICE = 2**19  # weights that are made at once
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9  # kinds of values
_NORMAL, _CONTROL, _ADDED = 1, 3, 4  # kinds of tokens
_ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
_GEMMA = "gemma3"
TURNED = ("llama", "deci")  # architectures in which channels i and i + half of a head are neighbours
_TYPES = {  # architecture to the model type and `...ForCausalLM`; a deci with biases is as a seed_oss
    "llama": ("llama", "Llama"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "seed_oss": ("seed_oss", "SeedOss"),
    _GEMMA: ("gemma3_text", "Gemma3"),
    "deci": ("llama", "Llama"),
    "openelm": ("qwen3", "Qwen3"),
}
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
}
_UNITS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # by layer, or one for all
_NUMBER, _COUNTS = (int, float), (int, np.ndarray)
_SETTINGS = {  # those of an architecture that are read, with their types
    **dict.fromkeys((*_SIZES, *_UNITS, "attention.key_length"), _COUNTS),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"), _NUMBER),
    "rope.scaling.type": str,
}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_OF_GEMMA = {
    **dict.fromkeys(("attention.sliding_window", "attention.sliding_window_pattern"), _COUNTS),
    **dict.fromkeys((*_CAPS, "rope.freq_base_swa"), _NUMBER),
}
_FIXED = {  # that have one value; None is the size of a head
    **dict.fromkeys(("attention.value_length", "rope.dimension_count")),
    **{"attention.causal": True, "expert_count": 0, "expert_used_count": 0},
}
_UNUSED = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
_OTHERS = {
    **{"general.alignment": int, "split.count": int, "tokenizer.chat_template": str},
    **{f"tokenizer.ggml.{name}": str for name in ("model", "pre")},
    **{f"tokenizer.ggml.{name}": list for name in ("tokens", "merges")},
    **{f"tokenizer.ggml.{name}": np.ndarray for name in ("scores", "token_type")},
    **{f"tokenizer.ggml.{name}": bool for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
    **{f"tokenizer.ggml.{name}_token_id": int for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
}
_CALLED = {str: "text", list: "texts", np.ndarray: "numbers", int: "a whole number", bool: "true or false"}
_FREQUENCIES = "rope_freqs.weight"
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
INNER_OF = {  # where an architecture has other names
    _GEMMA: INNER
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "seed_oss": {name: theirs for name, theirs in INNER.items() if name != "ffn_norm"}
    | {"post_attention_norm": "post_attention_layernorm"},
}
FUSED, PARTS = "self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class _Tensor(NamedTuple):
    kind: str  # as GGUF calls its type: "Q4_K"
    shape: tuple[int, ...]
    start: int
    stop: int


class _Header(NamedTuple):
    settings: dict[str, Any]  # those of the architecture without its name, too; arrays of numbers are NumPy's
    tensors: dict[str, _Tensor]
    kind: str  # the architecture

    @property
    def gemma(self) -> bool:
        return self.kind == _GEMMA

    @property
    def head_dim(self) -> int:
        if "attention.key_length" in self.settings:
            return self.count("attention.key_length")
        return self.count("embedding_length") // max(1, self.counts("attention.head_count", 0)[0])

    @property
    def layers(self) -> int:
        layers = self.count("block_count")
        if layers > len(self.tensors):
            raise ValueError(f"it has {layers:,} layers, but {len(self.tensors):,} tensors")
        return layers

    @property
    def units(self) -> dict[str, list[int]]:
        """The units of every layer by kind; `query_heads` are those of one group."""
        heads, shared = self.counts("attention.head_count", 0), "attention.head_count_kv"
        groups = self.counts(shared, 0) if shared in self.settings else heads
        queries = [count // max(1, few) for count, few in zip(heads, groups, strict=True)]
        for layer, (count, few, each) in enumerate(zip(heads, groups, queries, strict=True)):
            if count != few * each or (few and not each):
                raise ValueError(f"its layer {layer} has {count} heads for {few} key-value heads, expected a multiple")
        queries = [max(1, each) for each in queries]
        return {"groups": groups, "query_heads": queries, "neurons": self.counts("feed_forward_length")}

    def count(self, name: str) -> int:
        """The count of something, which is the same in all layers."""
        value = self.settings.get(name)
        if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:
            value = value[0].item()
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"its {name} is {_shown(value)}, expected a count, the same for all layers")
        return value

    def counts(self, name: str, least: int = 1) -> list[int]:
        """The count of something in every layer."""
        value, layers = self.settings.get(name), self.layers
        values: list[Any] = value.tolist() if isinstance(value, np.ndarray) else [value] * layers
        if len(values) != layers or any(type(each) is not int or not least <= each < 2**31 for each in values):
            raise ValueError(f"its {name} is {_shown(value)}, expected one of at least {least}, or {layers} such")
        return values

    def token(self, name: str) -> int | None:
        """The index of a special token."""
        usual = {"bos": 1, "eos": 2, "unknown": 0} if self.settings.get("tokenizer.ggml.model") == "llama" else {}
        index = self.settings.get(f"tokenizer.ggml.{name}_token_id", usual.get(name))
        tokens = self.settings.get("tokenizer.ggml.tokens", [])
        if index is not None and not 0 <= index < len(tokens):
            raise ValueError(f"its {name}_token_id is {index}, but it has {len(tokens):,} tokens")
        return index


def _shown(value: Any) -> str:
    return "missing" if value is None else reprlib.repr(value)[:80]


class _Reader:
    """The numbers and texts of a header, one after the other."""

    def __init__(self, file: BinaryIO):
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self._left = min(self.size, _MAX_HEADER)

    def take(self, count: int) -> bytes:
        if count > self._left or len(content := self._file.read(count)) < count:
            raise ValueError(f"its header does not end within {min(self.size, _MAX_HEADER):,} bytes: it is truncated")
        self._left -= count
        return content

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.number(8)).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.number(4), self.number(8)
            return [self.text() for _ in range(count)] if kind == _TEXT else self._numbers(kind, count)
        value = self._numbers(kind, 1)[0]
        return float(str(value)) if kind == _FLOAT32 else value.item()  # 1e-05, and not 9.999999747378752e-06

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"its header has a value of type {kind}, expected 0 to 12, in arrays another one than 9")
        return np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])


def _read_header(file: BinaryIO) -> _Header:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kinds = {GGMLQuantizationType[name].value: name for name in (*FLOATS, *_ROUNDED)}
    reader = _Reader(file)
    if reader.take(4) != b"GGUF" or reader.number(4) not in (2, 3):
        raise ValueError("it does not begin as a GGUF file of version 2 or 3")
    tensors, count = reader.number(8), reader.number(8)
    settings = [(reader.text(), reader.value(reader.number(4))) for _ in range(count)]
    places = []
    for _ in range(tensors):
        name, axes = reader.text(), reader.number(4)
        shape = tuple(reader.number(8) for _ in range(min(axes, 5)))[::-1]
        kind, start = reader.number(4), reader.number(8)
        if axes not in (1, 2) or not 0 < math.prod(shape) < 2**48:
            raise ValueError(f"its tensor {name!r} has the shape {_shown(shape)}, expected one or two sizes above 0")
        if kind not in kinds:
            raise ValueError(f"its tensor {name!r} has type {kind}, supported: {', '.join(kinds.values())}")
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape[-1] % weights:
            raise ValueError(f"its tensor {name!r} of shape {shape} has no whole blocks of {weights} ({kinds[kind]})")
        places.append((start, name, kinds[kind], shape, math.prod(shape) // weights * size))
    names = Counter([name for name, _ in settings] + [name for _, name, *_ in places])
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"its header names twice: {', '.join(twice[:8])}")
    return _checked(dict(settings), places, file.tell(), reader.size)


def _checked(settings: dict[str, Any], places: list[tuple[Any, ...]], end: int, size: int) -> _Header:
    """The header, if its settings have the right types and its tensors their own bytes of the file."""
    architecture = settings.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _TYPES:
        raise ValueError(f"its general.architecture is {_shown(architecture)}, supported: {', '.join(_TYPES)}")
    prefix, known = f"{architecture}.", {*_SETTINGS, *_FIXED, *_UNUSED, *(_OF_GEMMA if architecture == _GEMMA else ())}
    own = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    if unknown := [name for name in own if name not in known]:
        raise ValueError(f"its settings {', '.join(unknown[:8])} of a {architecture} are not known")
    settings |= own
    for name, kind in {**_OTHERS, **_SETTINGS, **_OF_GEMMA}.items():
        if name in settings and not isinstance(settings[name], kind):
            raise ValueError(f"its {name} is {_shown(settings[name])}, expected {_CALLED.get(kind, 'a number')}")
    alignment = settings.get("general.alignment", 32)
    if not 0 < alignment <= 2**16:
        raise ValueError(f"its general.alignment is {alignment}, expected a number of bytes")
    first = last = -(-end // alignment) * alignment
    tensors = {}
    for start, name, kind, shape, count in sorted(places):
        if not last <= first + start <= first + start + count <= size:
            raise ValueError(
                f"its tensor {name!r} takes the bytes {first + start:,} to {first + start + count:,}, expected some "
                f"from {last:,} to {size:,}, where the file ends: it is truncated, or tensors overlap"
            )
        last = first + start + count
        tensors[name] = _Tensor(kind, shape, first + start, last)
    return _Header(settings, tensors, architecture)


class GGUFFile(TensorFile):
    """An open GGUF file, its tensors as Hugging Face names and lays them out."""

    def __init__(self, path: Path):
        """Opens a file and checks its header.

        Raises:
            ValueError: If it is damaged or not supported, or the package that reads it is missing.
        """
        self.path = Path(os.path.realpath(path))
        self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115
        self._stream, self.metadata = None, {}
        try:
            self.header = _read_header(self._file)
            self._half = self.header.head_dim // 2 if self.header.kind in TURNED else 0
            self.units = self.header.units
            self._tensors = self._named()
        except (ValueError, ImportError) as error:
            self._file.close()
            if isinstance(error, ImportError):
                raise ValueError(f"{path} needs another package: pip install 'jaxprune[gguf]'.") from error
            raise ValueError(f"{path} cannot be read: {error}.") from error
        self.entries = {
            name: Entry(kind if kind in FLOATS and not self._is_shifted(name) else "F32", shape, start, stop)
            for name, (kind, shape, start, stop) in self._tensors.items()
        }
        self._stored = self.entries

    def _named(self) -> dict[str, _Tensor]:
        modules, tensors, unknown = INNER_OF.get(self.header.kind, INNER), {}, []
        groups = self.units["groups"]

        def is_known(layer: int, module: str) -> bool:
            return module in modules and layer < len(groups) and (groups[layer] > 0 or not module.startswith("attn"))

        for name, tensor in self.header.tensors.items():
            inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
            if inner and is_known(int(inner[1]), inner[2]):
                tensors[f"model.layers.{inner[1]}.{modules[inner[2]]}.{inner[3]}"] = tensor
            elif name in OUTER:
                tensors[OUTER[name]] = tensor
            elif name != _FREQUENCIES or self.header.kind not in TURNED:
                unknown.append(name)
        if unknown:
            raise ValueError(f"it has tensors that a {self.header.kind} has not: {', '.join(unknown[:8])}")
        for name in [name for name in tensors if name.endswith(f"{FUSED}.weight")]:
            tensors |= self._split(name, tensors.pop(name))
        return tensors | self._empty(tensors)

    def _split(self, name: str, whole: _Tensor) -> dict[str, _Tensor]:
        """Queries, keys and values, which are one after the other in one tensor."""
        layer = name.split(".")[2]
        groups, queries = (self.units[kind][int(layer)] for kind in ("groups", "query_heads"))
        rows = [count * self.header.head_dim for count in (groups * queries, groups, groups)]
        if len(whole.shape) != 2 or sum(rows) != whole.shape[0]:
            raise ValueError(f"its attn_qkv of layer {layer} has the shape {whole.shape}, expected {sum(rows)} rows")
        size, parts, start = (whole.stop - whole.start) // whole.shape[0], {}, whole.start
        for part, count in zip(PARTS, rows, strict=True):
            stop = start + count * size
            parts[name.replace(FUSED, part)] = _Tensor(whole.kind, (count, whole.shape[1]), start, stop)
            start = stop
        return parts

    def _empty(self, tensors: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
        """The tensors of attentions without heads, by the names of all others."""
        width, names = self.header.count("embedding_length"), {name.split(".", 3)[-1] for name in tensors}
        shapes = {"input_layernorm.weight": (width,), "self_attn.o_proj.weight": (width, 0)}
        shapes |= {f"{part}.weight": (0, width) for part in PARTS} | {f"{part}.bias": (0,) for part in PARTS}
        return {
            f"model.layers.{layer}.{name}": _Tensor("F32", shape, 0, 0)
            for layer, groups in enumerate(self.units["groups"])
            for name, shape in shapes.items()
            if not groups and name in names
        }

    def _is_shifted(self, name: str) -> bool:
        """True for a norm that is stored with 1 added."""
        return self.header.gemma and name.endswith("norm.weight")

    def slices(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """The blocks of rows, as those of `TensorFile`; a vector is one. The norm before no heads is all ones."""
        kind, shape, start, stop = self._tensors[name]
        if start == stop:
            yield slice(0, shape[0]), np.ones(shape, np.float32)
            return
        rows, step = (shape[0], max(1, _SLICE // shape[1])) if len(shape) > 1 else (1, 1)
        turned = self._half and re.search(r"\.[qk]_proj\.", name)  # channels i and i + half of a head are neighbours
        step += -step % (2 * self._half) if turned else 0
        size = (stop - start) // rows
        for first in range(0, rows, step):
            count = min(step, rows - first)
            block = _made(kind, self._bytes(start + first * size, count * size).reshape(count, size))
            block = block.reshape(-1, *shape[1:])
            if turned:
                block = block.reshape(-1, self._half, 2, *shape[1:]).swapaxes(1, 2).reshape(block.shape)
            if self._is_shifted(name):
                block = block.astype(np.float32) - 1
            yield slice(first, first + len(block)), block

    def frequencies(self) -> np.ndarray | None:
        """The divisors of the frequencies of the rotary positions."""
        tensor = self.header.tensors.get(_FREQUENCIES)
        return None if tensor is None else _made(tensor.kind, self._bytes(tensor.start, tensor.stop - tensor.start))


def _made(kind: str, content: np.ndarray) -> np.ndarray:
    if kind in FLOATS:
        return content.view(FLOATS[kind])
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales; whoever reads the weights refuses those
        return dequantize(content, GGMLQuantizationType[kind])


def unpacked(path: Path) -> Path:
    """A folder as Hugging Face's for a GGUF file, which lasts as long as the process.

    Raises:
        ValueError: If the file is damaged or not supported, or the package that reads it is missing.
    """
    status = path.stat()
    return _unpacked(path.absolute(), (status.st_ino, status.st_size, status.st_mtime_ns))


@cache
def _unpacked(path: Path, stamp: tuple[int, ...]) -> Path:
    with GGUFFile(path) as file:
        try:
            config = _config(file)
            files = {"config.json": config} | _tokenizer(file.header, config)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
    above = tempfile.mkdtemp(prefix="jaxprune-")
    atexit.register(shutil.rmtree, above, ignore_errors=True)
    folder = Path(above) / path.name  # errors name it
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / GGUF).symlink_to(path.resolve())
    return folder


def _config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` of a model."""
    header, names = file.header, file.entries
    own, head_dim, layers = header.settings, header.head_dim, header.layers
    for name, only in {**_FIXED, "general.type": "model", "split.count": 1}.items():
        only = head_dim if only is None else only
        if own.get(name, only) != only:
            raise ValueError(f"its {name} is {_shown(own[name])}, supported: {only}")
    if (eps := own.get("attention.layer_norm_rms_epsilon")) is None:
        raise ValueError("its attention.layer_norm_rms_epsilon is missing")
    if "model.embed_tokens.weight" not in names:
        raise ValueError("it has no tensor 'token_embd.weight'")
    biases = {
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "attention_out_bias": "model.layers.0.self_attn.o_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
    }
    model_type, name = _TYPES["seed_oss" if header.kind == "deci" and any(biases.values()) else header.kind]
    groups, queries, neurons = (max(counts) for counts in file.units.values())
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": names["model.embed_tokens.weight"].shape[0],
        "head_dim": head_dim,
        "rms_norm_eps": eps,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "rope_parameters": _rotary(file),
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "intermediate_size": neurons,
        **biases,
        **{theirs: header.count(name) for name, theirs in _SIZES.items()},
    }
    if header.gemma:
        pattern = own.get("attention.sliding_window_pattern", 6)
        if isinstance(pattern, int):
            pattern = np.array([pattern < 1 or (i + 1) % pattern for i in range(layers)])
        local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10_000.0)}
        # llama.cpp divides by another number where there are 62 layers, which is Gemma 3 27B
        scalar = header.count("embedding_length") // header.count("attention.head_count") if layers == 62 else head_dim
        config |= {
            "sliding_window": header.count("attention.sliding_window"),
            "layer_types": [SLIDING if each else GLOBAL for each in pattern.tolist()],
            "query_pre_attn_scalar": scalar,
            "rope_parameters": {GLOBAL: config["rope_parameters"], SLIDING: local},
            **{name: own[name] for name in _CAPS if name in own},
        }
    ends = [index for name in ("eos", "eot", "eom") if (index := header.token(name)) is not None]
    ends = [*dict.fromkeys(ends)]
    config |= {"bos_token_id": header.token("bos"), "pad_token_id": header.token("padding")}
    return config | {"eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}


def _rotary(file: GGUFFile) -> dict[str, Any]:
    """The rotary positions; of those of Llama 3 only what they come to is stored, a divisor for each frequency."""
    own, head_dim, divisors = file.header.settings, file.header.head_dim, file.frequencies()
    theta, factor = own.get("rope.freq_base", 10_000.0), own.get("rope.scaling.factor")
    kind = own.get("rope.scaling.type", "none" if factor is None else "linear")
    if divisors is None:
        scaling = {"rope_type": "default"} if kind == "none" else {"rope_type": kind, "factor": factor}
        return {"rope_theta": theta, **scaling}
    found = divisors.shape == (head_dim // 2,) and theta > 0 and kind == "none" and divisors.min() > 0
    for length in (8192, *(2**i for i in range(10, 18))) if found else ():
        stretched = Rotary(theta, "llama3", float(divisors.max()), 1.0, 4.0, length)
        frequencies = Rotary(theta).frequencies(head_dim) / divisors
        if np.allclose(stretched.frequencies(head_dim), frequencies, rtol=1e-4, atol=0):
            names = {"rope_type": "llama3", "rope_theta": theta, "factor": stretched.factor}
            names |= {"low_freq_factor": stretched.low, "high_freq_factor": stretched.high}
            return names | {"original_max_position_embeddings": length}
    raise ValueError(f"its {_FREQUENCIES} does not stretch positions as Llama 3 does, which is all that is supported")


# What a text is split into before tokens are found in it, by the names of llama.cpp
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    **{
        name: [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _BYTES]
        for name, pattern in {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}.items()
    },
}


def _tokenizer(header: _Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The files of the tokenizer; there are none if the header has none."""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in header.settings.items()}
    kind, tokens = own.get("model", "none"), own.get("tokens", [])
    kinds = own.get("token_type", np.full(len(tokens), _NORMAL))
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "none":
        return {}
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and own.get("pre") not in SPLITS):
        raise ValueError(
            f"its tokenizer is {kind}, {_shown(own.get('pre'))}, supported: llama, and gpt2 with {', '.join(SPLITS)}"
        )
    if not len(vocab) == len(tokens) == len(kinds) <= config["vocab_size"]:
        raise ValueError(
            f"it has {len(tokens):,} tokens, {len(vocab):,} of them different, {len(kinds):,} kinds of tokens and "
            f"{config['vocab_size']:,} embeddings"
        )
    special = {name: header.token(name) for name in ("bos", "eos", "unknown", "padding")}
    named = {name: tokens[i] for name, i in special.items() if i is not None}
    if kind == "gpt2":
        whole = own["pre"] == "llama-bpe"
        merges = [merge.split(" ") for merge in own.get("merges", [])]
        model = {"merges": merges, "ignore_merges": whole}  # a word that is a token is not put together
        steps = _byte_steps(own["pre"])
    else:
        whole = True
        model = {"merges": _merges(vocab, kinds, own.get("scores")), "unk_token": named.get("unknown")}
        model |= {"fuse_unk": True, "byte_fallback": True}
        steps = _piece_steps(own.get("add_space_prefix", True))
    ends = [name for name in ("bos", "eos") if name in named and own.get(f"add_{name}_token", whole and name == "bos")]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], **added, "special": bool(kinds[i] == _CONTROL)}
            for i in np.flatnonzero((kinds == _CONTROL) | (kinds == _ADDED)).tolist()
        ],
        **steps,
        "post_processor": _ends({name: (named[name], special[name]) for name in ends}),
        "model": {"type": "BPE", "vocab": vocab, **model},
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings = {name: named[each] for name, each in names.items() if each in named}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
    if "tokenizer.chat_template" in header.settings:
        settings["chat_template"] = header.settings["tokenizer.chat_template"]
    return {"tokenizer.json": content, "tokenizer_config.json": settings}


def _byte_steps(split: str) -> dict[str, Any]:
    """The steps before and after a vocabulary of bytes."""
    normalizer = {"type": "NFC"} if split == "qwen2" else None
    before = {"type": "Sequence", "pretokenizers": SPLITS[split]}
    return dict(normalizer=normalizer, pre_tokenizer=before, decoder=_GPT2)


def _piece_steps(prefix: bool) -> dict[str, Any]:
    """The steps before and after a vocabulary of SentencePiece, in which ▁ is a space."""

    def replace(one: str, other: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"String": one}, "content": other}

    first = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    steps = [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return dict(
        normalizer={"type": "Sequence", "normalizers": [*first, replace(" ", "▁")]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": steps},
    )


def _merges(vocab: Mapping[str, int], kinds: np.ndarray, scores: Any) -> list[Any]:
    """All pairs of usual tokens that make a third one, by its score: SentencePiece stores nothing else."""
    usual = {token: i for token, i in vocab.items() if kinds[i] == _NORMAL}
    if scores is None or len(scores) != len(vocab) or max(map(len, usual), default=0) > _LONGEST:
        raise ValueError(f"its tokens have no scores, or more than {_LONGEST:,} characters")
    found = []
    for token, i in usual.items():
        pairs = ((token[:place], token[place:]) for place in range(1, len(token)))
        found += [(-float(scores[i]), i, usual[a], usual[b], a, b) for a, b in pairs if a in usual and b in usual]
    return [each[-2:] for each in sorted(found)]


def _ends(ends: Mapping[str, tuple[str, int | None]]) -> dict[str, Any]:
    """The tokens put around a text."""

    def around(part: str, kind: int) -> list[Any]:
        special = {name: {"SpecialToken": {"id": token, "type_id": kind}} for name, (token, _) in ends.items()}
        parts = special.get("bos"), {"Sequence": {"id": part, "type_id": kind}}, special.get("eos")
        return [each for each in parts if each]

    special = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ends.values()}
    pair = around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": special}

"""Damaged files of every format that is read, drawn from a seed, and a worker that judges how they are taken.

A campaign makes whole files, damages copies of them, and reads each by the library, by a command, or both. Run as a
script, it takes the cases of a campaign one by one under a limit on memory and time, and prints one JSON line before
and after each. A case that crashes or hangs ends the process, and the last line says which it was.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
from checkpoints import classifier_config, classifier_tensors, safetensors_bytes, write_checkpoint
from commands import run
from hand_tables import hand_table
from pyarrow import parquet
from safetensors.numpy import load_file
from tiny import random_gates, tiny_model

from jaxprune.checkpoints.files import recall
from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import GATES, PRUNING, read_pruning
from jaxprune.checkpoints.shared import save_shared
from jaxprune.checkpoints.tensors import model_digest, params_digest
from jaxprune.compaction import compact
from jaxprune.data.prompts import read_prompt
from jaxprune.data.records import KINDS
from jaxprune.data.splits import SPLITS
from jaxprune.data.tasks import load_task
from jaxprune.models import TaskHead, family
from jaxprune.pruning.latency import read_table, write_table
from jaxprune.pruning.prune import Workspace
from jaxprune.pruning.selection import pruning_record
from jaxprune.scoring.run import Totals, TotalsFile
from jaxprune.scoring.scores import Scores, load_scores, save_scores
from jaxprune.training.loop import OPTIMIZERS, TrainingState, read_state, write_state
from jaxprune.units import flatten, path_name, unflatten, widths

DATA = Path(__file__).parent / "data"
BEFORE = DATA / "before"
MEMORY = 2**31  # bytes that a case may ask for beyond what the worker has
SECONDS = 60  # that a case may take
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 3, 7, 2**20, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.5, 16.0, 1e300, 1e-300,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
THINGS: tuple[Any, ...] = (None, True, False, "", "16", "bert", [], [16], {}, {"0": 1}, "\ud800", "\x00", "a" * 10_000)
PIECES = (
    b'"', b"\t", b",", b"\n", b"\r", b"\x00", b"\xff", b"{", b"[" * 3000, b"1" * 5000, b"null", b"NaN", b"1e999",
    b"\\ud800", b"\xef\xbb\xbf", b"-1", b'"label"', b"\xf0\x9f\x98\x80", b"true", b"9" * 20, b"{}", b"", b"&a", b"*a",
    b"!!python/object:os.system", b"- ", b": ", b"#", b"'", b"|\n",
)  # fmt: skip
RAW = (  # in the place of a JSON value
    "1e999", "-1e999", "9" * 5000, "NaN", "-Infinity", "1e-999", '"\\ud800"', "01", "'x'", "", "1, 2",
    f'"{"x" * 10**6}"',
)  # fmt: skip
ADDED = (  # names that mean something somewhere
    "num_labels", "architectures", "id2label", "label2id", "jaxprune", "tokenizer_class", "auto_map", "extra_ids",
    "vocab", "rope_scaling",
    "rope_parameters", "layer_types", "quantization_config", "torch_dtype", "problem_type", "format",
    "data", "sentence", "label", "packed", "int8", "means", "rows", "checksum", "__metadata__", "pruned", "settings",
)  # fmt: skip
LABELS = ("bad", "good")
ANSWER = {"answer_start": 3}
CLEAR = "model|the head|pruning.json|prompt|the word|latency"  # in an error, as good as the name of the only such file
ENDS = ("equal", "read", "refused")  # of a case; all others are faults
NOTES = re.compile(r"(?!.*(Error|Traceback|panicked)).+: .+|Ignored unknown kwarg option .+")  # beside an error
MEANS = {"0.ffn.neurons": np.arange(32, dtype=np.float32)}  # of one of the shared tasks
PLACES = ("length", "header", "data", "cut", "shape", "offsets", "type", "name", "duplicate", "extra")


def split(file: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file, and its data."""
    length = int.from_bytes(file[:8], "little")
    return file[8 : 8 + length], file[8 + length :]


def expanded(content: bytes) -> bytes:
    """The content that zstd compressed."""
    with pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd") as stream:
        return stream.read()


def compressed(content: bytes) -> bytes:
    """The content as zstd compresses it."""
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def damaged_tensors(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The change made to a safetensors file, and the file."""
    place = draw.choice(PLACES)
    text, data = split(whole)
    changed = bytearray(whole)
    if place in ("length", "header", "data"):
        first, last = {"length": (0, 8), "header": (8, 8 + len(text)), "data": (8 + len(text), len(whole))}[place]
        for _ in range(draw.choice((1, 1, 1, 8))):
            changed[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
        return f"bits of the {place}", bytes(changed)
    if place == "cut":
        return place, whole[: draw.randrange(len(whole))] + b"\0" * draw.choice((0, 0, 1, 4096))
    header = json.loads(text)
    described = [key for key, value in header.get("__metadata__", {}).items() if value.startswith("{")]
    if described and draw.random() < 0.4:
        text = header["__metadata__"][key := draw.choice(described)].encode()
        place, content = damaged_json(text, draw)
        header["__metadata__"][key] = content.decode(errors="replace")
        return f"{key}: {place}", safetensors_bytes(header, data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    if place == "shape":
        axes, numbers = entry["shape"], (*NUMBERS, *THINGS)
        options: tuple[Callable[[], Any], ...] = (
            lambda: axes[::-1],
            lambda: [*axes, 1],
            lambda: [int(np.prod(axes))],
            lambda: [draw.choice(numbers) for _ in axes],
            lambda: [1] * draw.choice((63, 64, 65, 1000)),
            lambda: draw.choice(numbers),
        )
        entry["shape"] = draw.choice(options)()
    elif place == "offsets":
        entry["data_offsets"][draw.randrange(2)] = draw.choice((*NUMBERS, *THINGS, draw.randrange(len(data))))
    elif place == "type":
        entry["dtype"] = draw.choice(("F16", "BF16", "F64", "I32", "U32", "BOOL", "F8_E4M3", "F4", *THINGS))
    elif place == "name":
        other = draw.choice((*map(str, THINGS), name.replace("0", "1"), name.upper(), f"x.{name}", "layers.9" * 200))
        header = {other if own == name else own: value for own, value in header.items()}
    elif place == "duplicate":
        again = json.dumps({name: header[draw.choice([own for own in header if own != "__metadata__"])]})
        return place, safetensors_bytes(text.rstrip()[:-1] + b"," + again[1:].encode(), data)
    else:
        size = draw.choice((0, 4, 64))
        header["extra"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    return place, safetensors_bytes(header, data)


def damaged_json(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The change made somewhere in a JSON file, and the file."""
    content = [json.loads(whole)]
    holder, key = cast(Any, content), cast(Any, 0)
    while (value := holder[key]) and isinstance(value, dict | list) and (holder is content or draw.random() < 0.7):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        holder, key = cast(Any, value), cast(Any, draw.choice(keys))
    kinds = ("value", "value", "near", "gone", "swapped", "deep", "raw")
    kind = draw.choice((*kinds, "name", "twice", "added") if isinstance(holder, dict) else kinds)
    held, text = holder[key], ""
    if kind == "value":
        holder[key] = draw.choice((*NUMBERS, *THINGS))
    elif kind == "near":
        holder[key] = held + draw.choice((-1, 1)) if isinstance(held, int | float) else [held, held]
        if isinstance(held, str | list) and held:
            holder[key] = draw.choice((held[:-1], held[::-1], held * 2, held[1:], held * (3000 // len(held) + 1)))
    elif kind == "gone" and holder is not content:
        del holder[key]
    elif kind == "swapped":
        other = draw.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], held
    elif kind == "name":
        holder[draw.choice((*map(str, THINGS), key.upper(), f"{key}x"))] = holder.pop(key)
    elif kind == "added":
        holder[draw.choice(ADDED)] = draw.choice((*NUMBERS, *THINGS, ["X"], {"a": 1, "b": 2}))
    else:
        holder[key], levels = "@here@", draw.choice((3, 50, 300, 900, 990, 1100, 100_000))
        text = {
            "deep": draw.choice(("[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels)),
            "raw": draw.choice(RAW),
            "twice": f"{json.dumps(held)}, {json.dumps(key)}: {json.dumps(draw.choice((held, *NUMBERS, *THINGS)))}",
        }.get(kind, "")
    return kind, json.dumps(content[0]).replace('"@here@"', text).encode()


def damaged_table(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The change made to a Parquet file, and the file."""
    table = parquet.read_table(pyarrow.BufferReader(whole))
    place, kind = draw.randrange(table.num_columns), draw.choice(("cells", "cells", "names", "none", "rows", "classes"))
    if kind == "cells":
        cell = draw.choice(
            (None, b"\xff", [1], {"a": 1}, Decimal("1.5"), True, 2**63 - 1, float("nan"), "", "x" * 10**6)
        )
        cells = [draw.choice((cell, None)) for _ in range(table.num_rows)]
        cells = cells if draw.random() < 0.3 else [cell] * table.num_rows
        table = table.set_column(place, table.column_names[place], pyarrow.array(cells))
    elif kind == "names":
        table = table.rename_columns(
            [draw.choice((*table.column_names, "", "\0", "x" * 10**5)) for _ in table.column_names]
        )
    elif kind == "none":
        table = table.remove_column(place)
    elif kind == "rows":
        table = draw.choice((table.slice(0, 0), table.slice(0, 1), pyarrow.concat_tables([table] * 100)))
    else:
        names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["bad", "good"]}}}}
        table = table.replace_schema_metadata({"huggingface": damaged_json(json.dumps(names).encode(), draw)[1]})
    parquet.write_table(table, sink := pyarrow.BufferOutputStream())
    return kind, sink.getvalue().to_pybytes()


def damaged_lines(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The change made to a line of a text, and the text."""
    rows = whole.splitlines(keepends=True)
    place, kind = draw.randrange(len(rows)), draw.choice(("line gone", "line twice", "lines moved", "cell", "cell"))
    if rows[place][:1] == b"{" and draw.random() < 0.7:
        kind, row = damaged_json(rows[place], draw)
        rows[place] = row + b"\n"
    elif kind == "cell":
        cells = re.split(rb"([,\t:])", rows[place])
        things = [str(each).encode(errors="replace") for each in (*NUMBERS, *THINGS)]
        cells[draw.randrange(len(cells))] = draw.choice((*PIECES, *things))
        rows[place] = b"".join(cells)
    elif kind == "lines moved":
        rows.insert(draw.randrange(len(rows)), rows.pop(place))
    else:
        rows[place] = b"" if kind == "line gone" else rows[place] * draw.choice((2, 5000))
    return kind, b"".join(rows)


def damaged_bytes(whole: bytes, draw: random.Random) -> bytes:
    """A file with bytes or pieces changed, cut, doubled or put elsewhere."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 8))):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((0, 1, 4, 50)))
        data[start:stop] = draw.choice((draw.choice(PIECES), draw.randbytes(stop - start), bytes(data[start:stop]) * 3))
    return bytes(data[: draw.randrange(len(data) + 1)] if draw.random() < 0.15 else data)


def damaged_gguf(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The change made to a GGUF file, mostly to its header, and the file."""
    data, kind = bytearray(whole), draw.choice(("cut", "bits of the data", *("bits", "number") * 4))
    place = draw.randrange(len(data) if kind in ("cut", "bits of the data") else whole.rindex(b"output.weight"))
    if kind == "cut":
        data = data[:place]
    elif kind == "number":
        number = draw.choice([each for each in NUMBERS if isinstance(each, int)]) % 2**64
        data[place : place + 8] = number.to_bytes(8, "little")
    else:
        data[place] ^= 1 << draw.randrange(8)
    return kind, bytes(data)


def make_gguf(folder: Path) -> Path:
    """A whole GGUF file, with a tokenizer."""
    from gguf_files import config_of, tensors_of, write_gguf

    config, own = config_of("llama"), {"model": "llama", "scores": [0.0] * 40, "token_type": [1] * 40}
    folder.mkdir()
    settings = {f"tokenizer.ggml.{name}": value for name, value in own.items()}
    write_gguf(folder / "whole.gguf", config, tensors_of(config), kind="Q8_0", settings=settings)
    return folder / "whole.gguf"


def outcome_of_gguf(file: Path, what: str) -> str:
    """Loads a damaged GGUF file; other names and numbers are as good as those that were written."""
    try:
        load(file)[0].tokenizer  # noqa: B018
    except (ValueError, FileNotFoundError) as error:
        return "refused" if file.name in str(error) else f"the error names no file: {error}"
    return "a part is read as the whole" if what.endswith("cut") else "equal"


def damaged(name: str, whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The change made to a file of any format, and the file."""
    stem, _, ending = name.rpartition(".")
    if ending == "gguf":
        return damaged_gguf(whole, draw)
    if draw.random() < 0.2 or ending in ("model", "arrow"):
        return "bytes", damaged_bytes(whole, draw)
    if ending in ("gz", "zst"):
        unpack, pack = (gzip.decompress, gzip.compress) if ending == "gz" else (expanded, compressed)
        what, content = damaged(stem, unpack(whole), draw)
        return what, pack(content)
    of_kind = damaged_tensors if whole[8:9] == b"{" else damaged_table if whole[:4] == b"PAR1" else damaged_lines
    return (damaged_json if ending == "json" else of_kind)(whole, draw)


def damage(place: Path, files: str, draw: random.Random) -> str:
    """Damages a file, or one file of a folder that matches a pattern, and says which and how."""
    found = [file for pattern in files.split() for file in sorted(place.glob(pattern))] if files else [place]
    file = draw.choice(found)
    what, content = damaged(file.name, file.read_bytes(), draw)
    file.write_bytes(content)
    return f"{file.name if files else ''.join(file.suffixes)}: {what}"


def ran(command: str, case: Path) -> str:
    """Runs a command on a damaged file: "read", "refused" in one line, or what is wrong with its end."""
    out, written = case.with_name("out"), os.fstat(2).st_size
    names = {"case": case, "before": BEFORE, "out": out}
    result = run(*(word.format(**names) for word in command.split()))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    left = [entry.name for entry in case.parent.iterdir() if entry.name.startswith((".out", f".{case.name}"))]
    ends, made = result.exit_code, out.exists()
    shutil.rmtree(out, ignore_errors=True)
    *before, last = result.stderr.splitlines() or [""]
    if left or made != (ends == 0 and "{out}" in command):
        return f"exit code {ends}, and it left {[*left, *['out'] * made]}: {last}"
    past = Path("/proc/self/fd/2").read_bytes()[written:].decode(errors="replace")  # what did not pass through Python
    before += past.splitlines()
    if not all(map(NOTES.fullmatch, before)):
        return f"it also wrote {before[:3]}"
    if ends == 0:
        return "read"
    if ends != 2 or result.stdout or not last.startswith("jaxprune: error: "):
        return f"exit code {ends}: {last[-300:]}"
    if re.search("emory|allocat", last) or not re.search(rf"\b({case.name.split('.')[0]}|{CLEAR})\b", last):
        return f"the error names no file, or memory: {last[:300]}"
    return "refused"


def make_models(folder: Path) -> list[Path]:
    """A folder of our own, and two of Hugging Face's: one file, and several with an index."""
    heads = (TaskHead(name="mood", labels=LABELS, dense="tanh"),)
    model, params = tiny_model(layers=1, heads=heads)
    config = classifier_config("bert") | {"id2label": dict(enumerate(LABELS))}
    tensors = classifier_tensors(config)
    tensors |= {name: tensors[name][:2] for name in ("classifier.weight", "classifier.bias")}
    places = [save(folder / "own", model, params, pruning={"seed": 0})]
    places += [write_checkpoint(folder / f"hf{shards}", config, tensors, shards=shards) for shards in (1, 3)]
    for place in places:
        shutil.copytree(DATA / "words", place, dirs_exist_ok=True)
    return places


def outcome(folder: Path, kind: str) -> str:
    """Loads everything of a damaged folder: "refused", "equal", or what is wrong with the answer."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*are no part of the model: ")  # a tensor more, as it should say
            model, params = load(folder)
        if kind.startswith("pruning.json"):
            read_pruning(folder)
        if kind.startswith(("tokenizer", "vocab")):
            model.tokenizer  # noqa: B018
    except (ValueError, FileNotFoundError) as error:
        named = str(folder) in str(error)
        return "refused" if named else f"the error names no file: {type(error).__name__}: {str(error)[:300]}"
    plain = {name: array for file in folder.glob("model*.safetensors") for name, array in load_file(file).items()}
    flat = {path: np.asarray(array) for path, array in flatten(params).items()}
    if json.loads((folder / "config.json").read_bytes()).get("jaxprune") is not None:
        expected = {path: plain[path_name(path)] for path in flat}
    else:  # PyTorch keeps [out, in], and heads and head size as one axis
        names = family(model.config.model_type).checkpoint_names(model.config)
        plain = {name.removeprefix("bert."): array for name, array in plain.items()}
        found = {path: plain[names[path][0]] for path in flat}
        expected = {path: (a.T if path[-1] == "kernel" else a).reshape(flat[path].shape) for path, a in found.items()}
    wrong = [path for path, array in flat.items() if array.tobytes() != expected[path].astype(np.float32).tobytes()]
    return f"wrong weights: {wrong}" if wrong else "equal"


def make_texts(folder: Path) -> list[Path]:
    """An encoder with a decoder, and a decoder alone."""
    model, params = tiny_model("llama", layers=1)
    places = [save(folder / "llama", replace(model, source=DATA / "answers"), params)]
    places.append(Path(shutil.copytree(BEFORE / "t5", folder / "t5")))
    for place in places:
        (place / "generation_config.json").write_text('{"max_length": 20, "eos_token_id": 1, "num_beams": 1}')
    return places


def make_tokenizers(folder: Path) -> list[Path]:
    """A model with tokenizers of every kind of file."""
    import sentencepiece

    folder.mkdir()
    (text := folder / "text.txt").write_text("\n".join(f"the film number {i} was good bad long" for i in range(99)))
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        input=str(text), model_prefix=str(folder / "m"), vocab_size=34, minloglevel=2, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1,
    )  # fmt: skip
    pieces, config = (folder / "m.model").read_bytes(), (BEFORE / "bert" / "config.json").read_bytes()
    words = [*"abcdefghijklmnopqrstuvwxyz", "\u0120", "\u0120g", "oo", "ood", "<s>", "</s>", "<unk>", "<pad>", "<mask>"]
    whole = json.loads((DATA / "answers" / "tokenizer.json").read_bytes()) | {"normalizer": {"type": "Lowercase"}}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    files: dict[str, dict[str, bytes | Any]] = {
        "words": {
            **{file.name: file.read_bytes() for file in (DATA / "words").iterdir()},
            "special_tokens_map.json": {"unk_token": "[UNK]", "mask_token": {"content": "[MASK]", "lstrip": True}},
            "added_tokens.json": {"[MASK]": 4},
        },
        "answers": {
            "tokenizer.json": whole,
            "tokenizer_config.json": (DATA / "answers" / "tokenizer_config.json").read_bytes(),
        },
        "pairs": {
            "vocab.json": {word: i for i, word in enumerate(words)},
            "merges.txt": "#version: 0.2\no o\noo d\n\u0120 g\n".encode(),
            "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer", "model_max_length": 64, **special},
        },
        "t5": {"spiece.model": pieces, "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}},
        "xlmr": {
            "sentencepiece.bpe.model": pieces,
            "tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 64},
        },
    }
    for name, own in files.items():
        (folder / name).mkdir()
        weights = (BEFORE / "bert" / "model.safetensors").read_bytes()
        for file, content in (own | {"config.json": config, "model.safetensors": weights}).items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / name / file).write_bytes(content)
    return [folder / name for name in files]


def make_packed(folder: Path) -> list[Path]:
    """Whole packed folders, exact and int8, of today and of version 0.1; beside each what is in it."""
    model, params = tiny_model(layers=1, embed=32, neurons=64)
    random, flat = np.random.default_rng(0), flatten(params)
    for path, array in flat.items():
        if path[-1] == "kernel" and "layers" in path:
            flat[path] = np.where(random.random(array.shape) < 0.1, np.asarray(array), np.float32(0))
    folders = [save(folder / values, model, unflatten(flat), packed=values) for values in ("exact", "int8")]
    for name in ("packed_exact", "packed_int8"):
        folders.append(Path(shutil.copytree(BEFORE / name, folder / name)))
    for whole in folders:
        arrays: dict[str, Any] = {path_name(p): np.asarray(a) for p, a in flatten(load(whole)[1]).items()}
        np.savez(whole / "whole.npz", **arrays)
    return folders


def outcome_of_packed(folder: Path, what: str) -> str:
    """Loads a damaged packed folder: "refused", "equal", or what is wrong with the answer."""
    try:
        found = {path_name(path): np.asarray(array) for path, array in flatten(load(folder)[1]).items()}
    except (ValueError, FileNotFoundError) as error:
        return "refused" if str(folder) in str(error) else f"the error names no file: {error}"
    if what.endswith((": bits of the data", ": bytes")):  # other values are as good as those that were written
        return "equal"
    with np.load(folder / "whole.npz") as whole:
        wrong = [name for name, array in found.items() if array.tobytes() != whole[name].tobytes()]
    return f"wrong weights: {wrong}" if wrong else "equal"


def make_scores(folder: Path) -> Path:
    """A whole score file."""
    model, params = load(BEFORE / "bert")
    generator = np.random.default_rng(0)
    values = {
        name: generator.standard_normal(units).astype(np.float32) for name, units in widths(model.axes, params).items()
    }
    header = {
        "format": 1, "criterion": {"name": "Random"}, "task": "mood", "split": "calibration", "head": "mood",
        "examples": 4, "largest": False, "keys": [[0, 1]], "model": model_digest(model, params), "data": ["1"],
        "max_length": 64, "mean_length": 7.5, "completeness": None, "versions": {"jax": "0"},
    }  # fmt: skip
    gates = {name: jnp.asarray(value) for name, value in values.items()}
    means = {name: gate[:, None] * jnp.ones(4) if "heads" in name else gate for name, gate in gates.items()}
    return save_scores(folder / "scores.safetensors", Scores(gates, header, means=means, rows=("0" * 16, "a" * 16)))


def outcome_of_scores(file: Path, kind: str) -> str:
    """Loads a damaged score file: "refused", "equal", or what is wrong with the answer."""
    try:
        found = load_scores(file)
    except (ValueError, FileNotFoundError) as error:
        return "refused" if str(file) in str(error) else f"the error names no file: {error}"
    whole = make_scores(Path(tempfile.mkdtemp(dir=file.parent)))  # a checksum tells apart what was written
    plain = load_file(whole)
    shutil.rmtree(whole.parent)
    values: dict[str, Any] = {**found.values, **{f"means:{name}": array for name, array in (found.means or {}).items()}}
    values["rows"] = np.frombuffer(bytes.fromhex("".join(found.rows)), np.uint8)
    equal = values.keys() == plain.keys() and all(np.asarray(values[n]).tobytes() == plain[n].tobytes() for n in plain)
    return "equal" if equal else "wrong scores"


def make_shared(folder: Path) -> Path:
    """A whole shared folder with two tasks, one of them with means."""
    model, params = tiny_model(layers=1)
    gates = random_gates(model, params)
    return save_shared(folder / "shared", model, params, {"a": gates, "b": gates}, means={"b": MEANS})


@cache
def _digests_of_tasks() -> dict[str, str]:
    """The result of compaction for them."""
    model, params = tiny_model(layers=1)
    gates = random_gates(model, params)
    return {task: params_digest(compact(model, params, gates, means)) for task, means in (("a", None), ("b", MEANS))}


def outcome_of_gates(folder: Path, kind: str) -> str:
    """Loads the tasks of a damaged shared folder: "refused", "equal", or what is wrong with the answer."""
    for task, wanted in _digests_of_tasks().items():
        try:
            found = load(folder, task=task)[1]
        except (ValueError, FileNotFoundError) as error:
            return "refused" if str(folder) in str(error) else f"the error names no file: {error}"
        if params_digest(found) != wanted:
            return f"wrong weights of {task}"
    return "equal"


SETTINGS = {"criterion": {"name": "Taylor"}, "batch_size": 4, "rounds": 3}  # of a run in progress


def _totals() -> Totals:
    units = {"0.attention.heads": 4, "0.ffn.neurons": 32}
    draw = np.random.default_rng(0)
    rows = {name: jnp.asarray(draw.random(count), jnp.float32) for name, count in units.items()}
    halves = {name: jnp.stack([row, row]) for name, row in rows.items()}
    return Totals(rows, {"expected": jnp.ones(())}, jnp.ones(()) * 8, rows, halves, jnp.ones(2) * 4, rows)


def make_totals(folder: Path) -> Path:
    """The running totals of a scoring run."""
    folder.mkdir()
    TotalsFile(file := folder / "scores.partial", SETTINGS).save(_totals(), 2)
    return file


def outcome_of_totals(file: Path, kind: str) -> str:
    """Reads damaged totals: "refused", "equal", or what is wrong with the answer."""
    return _same_or_refused(file, lambda: TotalsFile(file, SETTINGS).load(), (_totals(), 2))


def _state() -> TrainingState:
    params = {"a": {"kernel": jnp.arange(12.0).reshape(4, 3)}, "b": {"bias": jnp.ones(3)}}
    history = ({"step": 2, "value": 0.5}, {"step": 4, "value": 0.25})
    return TrainingState(params, OPTIMIZERS["adamw"]().init(params), params, 5, history)


def make_states(folder: Path) -> Path:
    """The state of a training."""
    folder.mkdir()
    write_state(file := folder / "run.state", _state(), SETTINGS)
    return file


def outcome_of_states(file: Path, kind: str) -> str:
    """Reads a damaged state: "refused", "equal", or what is wrong with the answer."""
    state = _state()
    return _same_or_refused(
        file, lambda: read_state(file, state._replace(best={}, history=(), done=0), SETTINGS), state
    )


def make_tables(folder: Path) -> Path:
    """A latency table."""
    return write_table(folder / "table.json", hand_table(*load(BEFORE / "bert")))


def outcome_of_tables(file: Path, kind: str) -> str:
    """Reads a damaged table: "refused", "equal" to what is in the file, or what is wrong with the answer."""
    try:
        table = read_table(file)
    except ValueError as error:
        return "refused" if str(file) in str(error) else f"the error names no file: {error}"
    same = json.loads(json.dumps({"format": 1, **asdict(table)})) == json.loads(file.read_text(errors="replace"))
    return "equal" if same else "wrong table"


def make_rounds(folder: Path) -> Path:
    """The folder of a pruning in rounds that was interrupted after the first."""
    model, params = tiny_model(layers=1)
    gates = random_gates(model, params)
    record = pruning_record({}, gates) | {"rounds": [{"round": 1, "budget": 0.5}], "run": SETTINGS}
    workspace = Workspace(folder / "out")
    workspace.save(model, compact(model, params, gates), record)
    return workspace.folder


def outcome_of_rounds(folder: Path, kind: str) -> str:
    """Resumes from damaged rounds: "refused", "equal", or what is wrong with the answer."""
    target = folder.with_name("out.rounds")  # where a run looks for it
    folder.rename(target)
    model, params = tiny_model(layers=1)
    gates = {name: np.asarray(gate) for name, gate in random_gates(model, params).items()}
    small = compact(model, params, gates)
    expected = {name: (gate > 0).astype(np.float32) for name, gate in gates.items()}, small

    def resume() -> Any:
        after = Workspace(folder.with_name("out")).load(SETTINGS)[1]
        return None if after is None else (after.gates, after.params)

    met = _same_or_refused(target, resume, expected)
    target.rename(folder)
    return met


def _same_or_refused(place: Path, read: Callable[[], Any], expected: Any) -> str:
    """Reads something: "refused" with an error that names it, "equal" to what is expected, or what is wrong."""
    try:
        found = read()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        return "refused" if str(place) in str(error) else f"the error names no file: {type(error).__name__}: {error}"
    leaves, wanted = (jax.tree.leaves_with_path(tree) for tree in (found, expected))
    same = [path for path, _ in leaves] == [path for path, _ in wanted]
    same = same and all(np.array_equal(a, b) for (_, a), (_, b) in zip(leaves, wanted, strict=True))
    return "equal" if same else "wrong values"


def make_rows(folder: Path) -> list[Path]:
    """A small file of every kind, SQuAD's own, and a data set that `datasets` saved."""
    import datasets

    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"text": f'say "{i}"', "pair": f"b {i}", "label": LABELS[i % 2], "when": 1.5} for i in range(24)
    ]
    csv = "".join(f'"say ""{i}""",b {i},{LABELS[i % 2]}\n' for i in range(24))
    tsv = "".join(f'say "{i}"\tb {i}\t{LABELS[i % 2]}\n' for i in range(24))
    asked = [
        {
            "context": f"In {1900 + i} it was.",
            "qas": [{"question": f"When {i}?", "answers": [ANSWER | {"text": f"{1900 + i}"}]}],
        }
        for i in range(24)
    ]
    content = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows), "rows.json": json.dumps(rows),
        "rows.csv": f"text,pair,label\n{csv}", "rows.tsv": f"text\tpair\tlabel\n{tsv}",
        "rows.txt": "".join(f"It was {i} and\nsome more.\n\n" for i in range(24)),
    }  # fmt: skip
    for name, text in content.items():
        (folder / name).write_text(text)
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    assert {"".join(file.suffixes) for file in folder.iterdir()} == set(KINDS)
    plain = [{"text": f"It was {i}."} for i in range(24)], [{"question": f"{i}?", "answer": f"{i}!"} for i in range(24)]
    for name, each in zip(("running", "asked"), plain, strict=True):
        (folder / f"rows.{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (folder / "rows.squad.json").write_text(
        json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": asked}]})
    )
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder / "saved")
    return sorted(folder.iterdir())


def outcome_of_rows(place: Path, what: str) -> str:
    """Reads damaged rows: "equal" if they are texts, "refused" in one line, or what is wrong."""
    alone = what.startswith((".squad", ".txt", ".running", ".asked"))
    columns: dict[str, Any] = {} if alone else {"text": "text", "label": "label"}
    try:
        task = load_task(place, **columns)
    except ValueError as error:
        named = "\n" not in str(error) and re.search(rf"\b{place.name.split('.')[0]}(\b|_)", str(error))
        return "refused" if named else f"the error names no file: {error}"
    good = all(isinstance(row.text, str) and row.text.strip() for split in SPLITS for row in task.rows(split))
    return "equal" if good else "no texts"


def make_prompts(folder: Path) -> list[Path]:
    """Files of prompts."""
    folder.mkdir()
    (folder / "list.yaml").write_text(
        "template: >\n  mood :\n  {sentence} ?\nwords: [\"no\", 'very good']\nname: mine\n"
    )
    return [Path(shutil.copy(BEFORE / "prompt.yaml", folder)), folder / "list.yaml"]


def outcome_of_prompts(file: Path, what: str) -> str:
    """Reads a damaged prompt."""
    try:
        read_prompt(file)
    except ValueError as error:
        return "refused" if str(error).startswith(f"{file}:") else f"the error names no file: {error}"
    return "equal"


def made_by(command: str) -> Callable[[Path], Path]:
    """Makes what a command writes."""

    def make(folder: Path) -> Path:
        folder.mkdir()
        assert ran(command, folder / "own") == "read"
        return folder / "own"

    return make


def make_caches(folder: Path) -> Path:
    """The digest of a model in a cache."""
    folder.mkdir(mode=0o700)
    (folder / "known.json").write_text(json.dumps({"digest": "0" * 64}))
    return folder


def outcome_of_caches(folder: Path, what: str) -> str:
    """Reads a damaged digest, which is no error: there is none, or one."""
    found = recall(folder, "known")
    return "refused" if found is None else "equal" if re.fullmatch("[0-9a-f]{64}", found) else "no digest"


def cases(folder: Path, campaign: str, seed: int, first: int, last: int, commands: bool = True) -> Iterator[Any]:
    """The cases of a campaign: (number, what was done, None), then (number, what was done, outcome)."""
    make, files, check, command = CAMPAIGNS[campaign]
    whole = made if isinstance(made := make(folder / "whole"), list) else [made]

    def outcome_of(case: Path, what: str) -> str:
        met = "read" if check is None else check(case, what)
        if met in ENDS and commands and command:
            found = ran(command, case)
            met = met if check and found in ENDS else found
        return met

    for place in whole:  # once undamaged: compiles, and shows that the comparison holds
        met = outcome_of(place, f"{''.join(place.suffixes)}: nothing")
        assert met in ENDS[:2], (place, met)
    yield -1, "", "ready"
    for number in range(first, last):
        draw = random.Random(f"{seed} {number}")
        source = whole[number % len(whole)]
        case = folder / f"case{number}{''.join(source.suffixes)}"
        shutil.copytree(source, case) if source.is_dir() else shutil.copy(source, case)
        what = damage(case, files if case.is_dir() else "", draw)
        yield number, what, None
        yield number, what, _met(lambda case=case, what=what: outcome_of(case, what))
        shutil.rmtree(case) if case.is_dir() else case.unlink()


class Campaign(NamedTuple):
    """What is damaged, and what reads it."""

    make: Callable[[Path], Any]  # whole files or folders
    files: str = ""  # patterns of the files of a folder that are damaged
    check: Callable[[Path, str], str] | None = None  # reads them by the library
    command: str = ""


BERT, ROWS = "{before}/bert", "--task mood --data {before}/rows"
EVALUATE = f"evaluate {{case}} {ROWS} --limit 8"
PRUNE = f"prune {BERT} --recover none --measure 0 -o {{out}}"
SWEEP = f"sweep {BERT} {ROWS} --criterion random --flops 0.5 --seeds 1 --examples 8 --limit 8 -o {{case}}"
AUGMENT = f"augment {BERT} {ROWS} --copies 1 --frequent 0 -o {{case}}"
CAMPAIGNS = {
    "models": Campaign(make_models, "config.json config.json model*.safetensors model*.s* *", outcome, EVALUATE),
    "texts": Campaign(
        make_texts, "config.json config.json generation*", None, f"{EVALUATE} --prompt {{before}}/prompt.yaml"
    ),
    "tokenizers": Campaign(make_tokenizers, "[!cm]* merges.txt", None, EVALUATE),
    "scores": Campaign(make_scores, "", outcome_of_scores, f"{PRUNE} --flops 0.5 --scores {{case}}"),
    "gates": Campaign(make_shared, GATES, outcome_of_gates, "pack {case}#b -o {out}"),
    "packed": Campaign(make_packed, "model.safetensors*", outcome_of_packed, "pack {case} --unpack -o {out}"),
    "totals": Campaign(make_totals, "", outcome_of_totals),
    "states": Campaign(make_states, "", outcome_of_states),
    "tables": Campaign(
        make_tables, "", outcome_of_tables,
        f"{PRUNE} --scores {{before}}/mood.safetensors --latency 0.9 --latency-table {{case}}",
    ),
    "rounds": Campaign(make_rounds, "pruning.json config.json model.safetensors", outcome_of_rounds),
    "rows": Campaign(
        make_rows, "*.json */*", outcome_of_rows,
        f"evaluate {BERT} --head mood --task {{case}} --text text --label label --limit 8",
    ),
    "prompts": Campaign(
        make_prompts, "", outcome_of_prompts, f"evaluate {{before}}/t5 {ROWS} --limit 8 --prompt {{case}}"
    ),
    "pruned": Campaign(lambda folder: shutil.copytree(BEFORE / "pruned", folder), PRUNING, None, "inspect {case}"),
    "sweeps": Campaign(made_by(SWEEP), "results.json", None, SWEEP),
    "augmented": Campaign(made_by(AUGMENT), "mood/*.json", None, AUGMENT),
    "gguf": Campaign(make_gguf, "", outcome_of_gguf, "inspect {case}"),
    "caches": Campaign(make_caches, "*", outcome_of_caches),
}  # fmt: skip


def _met(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(where.filename).name}, line {where.lineno}: {str(error)[:300]}"


def _limit(most: int) -> None:
    """Lets this process have so many more bytes of data, and no more."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + most, resource.RLIM_INFINITY))


def main() -> None:
    """Takes FOLDER, CAMPAIGN, SEED, FIRST and LAST, and prints every case twice."""
    folder, campaign, seed, first, last = sys.argv[1:]
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where whatever else is written is met
    for number, what, found in cases(Path(folder), campaign, int(seed), int(first), int(last)):
        print(json.dumps([number, what, found]), file=lines, flush=True)
        _limit(MEMORY)
        signal.setitimer(signal.ITIMER_REAL, SECONDS if found is None else 0)  # SIGALRM ends the process


if __name__ == "__main__":
    main()

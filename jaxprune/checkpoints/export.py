"""Writes models for other programs, and reads them back before they take their place.

`hf` is a folder that transformers loads without code of ours; all layers have the same widths there:
`jaxprune.checkpoints.uniform` fills them up. `gguf` is a file for llama.cpp, at the widths that the layers have if it
has an architecture for that. `onnx` and `stablehlo` are programs at these widths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.checkpoints.export_gguf import ROUNDED, export_gguf
from jaxprune.checkpoints.export_onnx import export_onnx
from jaxprune.checkpoints.export_stablehlo import export_stablehlo
from jaxprune.checkpoints.files import check_file, check_writable, folder_for
from jaxprune.checkpoints.folder import (
    as_loaded,
    check_tokenizer,
    checked_type,
    files_of_tokenizer,
    json_bytes,
    load,
    tokenizer_of,
)
from jaxprune.checkpoints.tensors import write_tensors
from jaxprune.checkpoints.uniform import Filled, compared, described, runner, tensors_of, uniform
from jaxprune.checkpoints.weights import CONFIG, WEIGHTS, stored_type
from jaxprune.models import Model
from jaxprune.units import Params, flatten, path_name

EXPORT = "export.json"  # in a folder: how it was made
HEADS = "heads.safetensors"  # task heads of a form that no class of transformers has
FORMATS = ("hf", "gguf", "onnx", "stablehlo")


def export(
    path: str | Path,
    model: Model,
    params: Params,
    *,
    to: str = "hf",
    head: str | None = None,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a model for other programs, and compares what they will compute with what it computes.

    `hf` is a folder that transformers loads without code of ours. Llama and Qwen2 with other heads than their width
    says are written as Mistral or Seed-OSS, which have the same blocks. Of task heads those of a form that transformers
    has are inside; others stand beside an encoder without head, in `heads.safetensors`, under the names that they have
    in `params`. `export.json` says what was done. `gguf` is a file that llama.cpp loads. `onnx` is a program for one
    head, or for the next tokens, which onnxruntime runs: see `jaxprune.checkpoints.export_onnx`. `stablehlo` is one
    that jax alone runs: see `jaxprune.checkpoints.export_stablehlo`.

    Args:
        path: The folder, or the file.
        model: The model; the tokenizer is that of where it was loaded from.
        params: Its parameters, of any widths.
        to: "hf", "gguf", "onnx" or "stablehlo".
        head: The task head to keep; None keeps all, or the only one in a program.
        dtype: Type of the weights: float32, bfloat16, float16, or "q8_0" in GGUF files; None is that of the file the
            model came from, and float32 in a program. StableHLO computes in it, ONNX in float32.
        check: Whether the export is read back, as what others wrote would be, and compared on random tokens: logits, or
            of an encoder without head the last hidden states, may differ by 1e-4 of the largest; in q8_0 it is weights
            that may differ, by 1/220 of a parameter's largest.
        overwrite: Whether a folder that this function wrote, or a file, may be replaced. No other folder ever is.

    Returns:
        What was written, as `export.json` holds it.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        ValueError: If there is no such format or head, the other program has no such model, the values do not fit the
            type, or the export does not compute the same.
    """
    check_format(to, head, dtype)
    if to == "gguf":
        return export_gguf(path, model, params, dtype=dtype, check=check, overwrite=overwrite)
    if to == "onnx":
        return export_onnx(path, model, params, head=head, dtype=dtype, check=check, overwrite=overwrite)
    if to == "stablehlo":
        return export_stablehlo(path, model, params, head=head, dtype=dtype, check=check, overwrite=overwrite)
    path, target = Path(path), checked_type(stored_type(model) if dtype is None else dtype)
    check_exportable(path, overwrite)
    made = uniform(model, params, head)
    raw = json.loads(made.model.config.raw)
    raw.pop("torch_dtype", None)
    raw |= {"dtype": str(target), "transformers_version": version("transformers")}
    tokenizer = tokenizer_of(model)
    record = {
        "format": "hf",
        "class": raw["architectures"][0],
        **described(model, params, made),
        "dtype": str(target),
    }
    files = files_of_tokenizer(model, tokenizer)
    with folder_for(path, overwrite=overwrite) as folder:
        files[CONFIG] = json_bytes(dict(sorted(raw.items())))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        _write(folder / WEIGHTS, tensors_of(made.model, made.params), target)
        if made.heads:
            _write(folder / HEADS, {path_name(p): np.asarray(a) for p, a in flatten(made.heads).items()}, target)
        check_tokenizer(model, tokenizer, folder, path)
        record["check"] = _checked(model, as_loaded(model, params, dtype=target), made, folder) if check else None
        (folder / EXPORT).write_bytes(json_bytes(record))
    return record


def _checked(model: Model, params: Params, made: Filled, folder: Path) -> dict[str, Any]:
    """The difference between the model and the folder."""
    read, arrays = load(folder)
    hidden = not (read.answers_in_text or read.heads)
    return compared(model, params, runner(read, arrays, None, hidden), made.head, hidden=hidden)


def check_format(to: str, head: str | None, dtype: str | None) -> None:
    """Refuses a format that there is not, and a head or a type that it has not."""
    if to not in FORMATS:
        raise ValueError(f"a model is exported to one of {', '.join(FORMATS)}, got {to!r}.")
    if to == "gguf" and head is not None:
        raise ValueError(f"decoders have no task heads: leave head {head!r} out.")
    if to != "gguf" and dtype == ROUNDED:
        raise ValueError(f"{ROUNDED} is a type of GGUF files alone: give another dtype, or export to gguf.")


def check_exportable(path: Path, overwrite: bool, to: str = "hf") -> None:
    """Refuses a place that cannot be written, and to replace anything but an export."""
    if to != "hf":
        check_file(path, overwrite)
        return
    check_writable(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or replace it with --overwrite.")
    if not path.is_dir() or not (path / EXPORT).is_file():
        raise FileExistsError(f"{path} is not a folder that was exported: it is not replaced, choose another name.")


def _write(file: Path, tensors: Mapping[str, Any], dtype: np.dtype | None) -> None:
    with open(file, "wb") as stream:
        write_tensors(stream, tensors, {"format": "pt"}, dtypes={} if dtype is None else dict.fromkeys(tensors, dtype))

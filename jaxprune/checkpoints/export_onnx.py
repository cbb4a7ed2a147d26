"""Writes models as ONNX, for onnxruntime and whatever else runs such files: one file, for batches of any size.

    session = onnxruntime.InferenceSession("model.onnx")
    (logits,) = session.run(None, {"input_ids": ids, "attention_mask": mask})  # int64 [batch, length], of any numbers

The weights are in the file, at whatever widths the layers have: nothing is filled up. There is no tokenizer in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.checkpoints.export_stablehlo import input_shapes
from jaxprune.checkpoints.files import check_file, write_atomic
from jaxprune.checkpoints.folder import as_loaded, checked_type
from jaxprune.checkpoints.onnx_graph import OPSET, graph_file
from jaxprune.checkpoints.uniform import compared, described
from jaxprune.models import Model
from jaxprune.units import Params


def export_onnx(
    path: str | Path,
    model: Model,
    params: Params,
    *,
    head: str | None = None,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the graph that gives the logits of a head, or of the next tokens, for any number of rows and tokens.

    Its inputs are int64 and have the names that tokenizers give them; all are needed. Its output is `logits`, float32.
    Tokens outside the vocabulary and texts longer than a table of positions make onnxruntime stop with an error. Where
    positions are rotary or relative there is no table: the caller has to keep to the length that the model knows.

    Args:
        path: The file.
        model: The architecture.
        params: Its parameters, of any widths.
        head: The task head; None is the only one, or the next tokens.
        dtype: Type of the weights in the file, which computes in float32; None is float32.
        check: Whether onnxruntime runs the file on random tokens: logits may differ by 1e-4 of the largest.
        overwrite: Whether a file may be replaced.

    Returns:
        What was written.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        ValueError: If there is no such head, or several and none is named; if a package is missing, the weights take
            more than 2 GiB, or onnxruntime computes something else.
    """
    path, kind, chosen = Path(path), checked_type(dtype or "float32"), model.head(head)
    check_file(path, overwrite)
    _needs("onnx", "ONNX files need another package: pip install 'jaxprune[onnx]'.")
    if check:
        _needs(
            "onnxruntime",
            "an ONNX file is checked by another package: pip install 'jaxprune[onnx]', or leave the check out "
            "(check=False, --no-check).",
        )
    params, shapes = as_loaded(model, params, dtype=kind), input_shapes(model)

    def logits(params: Params, batch: Mapping[str, Any]) -> Any:
        return model.apply(params, batch, head=chosen.name).logits

    with jax.default_matmul_precision("float32"):  # whatever the machine is set to
        content = graph_file(logits, params, shapes, str(kind))
        record = {
            "format": "onnx",
            "class": model.config.model_type,
            **described(model, params, None, head=None if model.answers_in_text else chosen.name),
            "dtype": str(kind),
            "opset": OPSET,
            "inputs": {name: str(shape.shape) for name, shape in shapes.items()},
            "file_bytes": len(content),
        }
        record["check"] = compared(model, params, _reader(content, [*shapes]), chosen.name) if check else None
    write_atomic(path, content)
    return record


def _needs(package: str, message: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise ValueError(message) from error


def _reader(content: bytes, names: Sequence[str]) -> Callable[[Mapping[str, Any]], Any]:
    """Makes a function from a batch to what onnxruntime computes of it."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(batch: Mapping[str, Any]) -> Any:
        given = {name: batch.get(name, np.zeros_like(batch["input_ids"])) for name in names}
        return session.run(None, {name: np.asarray(ids, np.int64) for name, ids in given.items()})[0]

    return run

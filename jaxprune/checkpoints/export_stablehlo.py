"""Writes models as StableHLO, the portable programs of XLA: one file that jax alone runs on CPUs, GPUs and TPUs.

    program = jax.export.deserialize(open("model.stablehlo", "rb").read())
    logits = program.call({"input_ids": ids, "attention_mask": mask})  # int32 [rows, tokens], of any numbers

The weights are in the file, at whatever widths the layers have: nothing is filled up. There is no tokenizer in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxprune.checkpoints.files import check_file, write_atomic
from jaxprune.checkpoints.folder import checked_type
from jaxprune.checkpoints.uniform import compared, described
from jaxprune.models import Model
from jaxprune.units import Params

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    path: str | Path,
    model: Model,
    params: Params,
    *,
    head: str | None = None,
    dtype: str | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the program that gives the logits of a head, for any number of rows and tokens.

    Args:
        path: The file.
        model: The architecture.
        params: Its parameters, of any widths.
        head: The task head; None is the only one, or the next tokens.
        dtype: Type of the weights, in which it computes; None is float32.
        check: Whether the file is read back and run on random tokens: logits may differ by 1e-4 of the largest.
        overwrite: Whether a file may be replaced.

    Returns:
        What was written.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        ValueError: If there is no such head, or several and none is named, or the program computes something else.
    """
    path, kind, chosen = Path(path), checked_type(dtype or "float32"), model.head(head)
    check_file(path, overwrite)
    params = jax.tree.map(lambda array: jnp.asarray(array).astype(kind), params)

    def logits(batch: Mapping[str, Any]) -> Any:
        return model.apply(params, batch, head=chosen.name).logits

    shapes = input_shapes(model)
    try:
        content = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(shapes).serialize()
    except ImportError as error:
        raise ValueError("StableHLO files need another package: pip install 'jaxprune[export]'.") from error
    record = {
        "format": "stablehlo",
        "class": model.config.model_type,
        **described(model, params, None, head=None if model.answers_in_text else chosen.name),
        "dtype": str(kind),
        "platforms": list(PLATFORMS),
        "inputs": {name: str(shape.shape) for name, shape in shapes.items()},
    }
    read = jax.export.deserialize(bytearray(content))

    def run(batch: Mapping[str, Any]) -> Any:
        rows = {name: jnp.asarray(batch.get(name, np.zeros_like(batch["input_ids"])), jnp.int32) for name in shapes}
        return read.call(rows)

    record["check"] = compared(model, params, run, chosen.name) if check else None
    write_atomic(path, bytes(content))
    return record


def input_shapes(model: Model) -> dict[str, Any]:
    """The inputs of a program: int32 `(batch, length)`, both of any size up to the number of the model's positions."""
    several = len(model.stacks) > 1
    lengths = ("length", "decoder_length")[: len(model.stacks)]
    most = [f"{length} <= {model.max_length}" for length in lengths]
    sizes = jax.export.symbolic_shape(", ".join(("batch", *lengths)), constraints=most)
    names = {name: sizes[1] for name in ("input_ids", "attention_mask")}
    names |= {"token_type_ids": sizes[1]} if model.config.segments > 1 else {}
    names |= {f"decoder_{name}": sizes[2] for name in ("input_ids", "attention_mask")} if several else {}
    return {name: jax.ShapeDtypeStruct((sizes[0], length), jnp.int32) for name, length in names.items()}

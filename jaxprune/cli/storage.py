"""Writes a model anew with its weights packed or unpacked, and says what that makes of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxprune.checkpoints.files import read_json
from jaxprune.checkpoints.folder import PRUNING, check_destination, load, read_pruning, save
from jaxprune.checkpoints.int8 import linear_maps
from jaxprune.checkpoints.tensors import COMPRESSED
from jaxprune.checkpoints.weights import CONFIG, WEIGHTS
from jaxprune.models.cost import file_size
from jaxprune.units import flatten, path_name


def pack_model(
    source: str,
    output: Path,
    *,
    values: Literal["exact", "int8"] | None = "exact",
    dtype: Literal["float16", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a model packed, or dense if `values` is None, with all other files of its folder.

    Args:
        source: The model, dense or packed.
        output: The folder to write.
        values: "exact" keeps every bit, "int8" rounds the layers' kernels; None writes a dense file.
        dtype: Casts the weights first; None keeps the types that they have in their file.
        overwrite: Whether a model that is there is replaced.

    Returns:
        The bytes of the weights' file before and after, and the share of the layers' weights that are not zero.
    """
    check_destination(output, overwrite)
    model, params = load(source, dtype=None)
    folder = Path(model.source or source)
    extra, pruning = _other_files(folder)
    before = file_size(folder)  # now: the output may be the same folder
    save(output, model, params, pruning=pruning, overwrite=overwrite, dtype=dtype, extra=extra, packed=values)
    after = file_size(output)
    names = linear_maps(model.axes, params)
    weights = [array for path, array in flatten(params).items() if path_name(path) in names]
    count, nonzero = sum(array.size for array in weights), sum(int(np.count_nonzero(array)) for array in weights)
    return {
        "command": "pack",
        "source": source,
        "output": str(output),
        "values": values,
        "dtype": dtype,
        "linear_weights": count,
        "density": nonzero / count if count else None,
        "before": {"file": before},
        "after": {"file": after},
        "ratios": {"file": before / after},
    }


def _other_files(folder: Path) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """What `save` wrote into a folder beside the model, and the record of the pruning."""
    listed = read_json(folder / CONFIG).get("jaxprune", {}).get("files", [])
    written = (CONFIG, WEIGHTS, WEIGHTS + COMPRESSED, PRUNING)
    others = (name for name in listed if isinstance(name, str) and name not in written)
    names = [name for name in others if Path(name).name == name]
    extra = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if PRUNING not in listed:
        return extra, None
    return extra, {name: value for name, value in read_pruning(folder).items() if name != "pruned"}

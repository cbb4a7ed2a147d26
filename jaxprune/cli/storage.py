"""Writes a model anew with its zeros packed or unpacked, and says what that makes of its file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxprune.checkpoints.files import read_json
from jaxprune.checkpoints.folder import PRUNING, check_destination, load, read_pruning, save
from jaxprune.checkpoints.sparse_file import linear_maps
from jaxprune.checkpoints.weights import CONFIG, WEIGHTS, open_tensors
from jaxprune.models import Model
from jaxprune.models.cost import file_size
from jaxprune.units import Params, flatten, path_name


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
        The bytes of the linear maps and of the whole file before and after, and the share of weights that are not zero.
    """
    check_destination(output, overwrite)
    model, params = load(source, dtype=None)
    folder = Path(model.source or source)
    extra, pruning = _other_files(folder)
    before = disk_sizes(model, params, folder)  # now: the output may be the same folder
    save(output, model, params, pruning=pruning, overwrite=overwrite, dtype=dtype, extra=extra, packed=values)
    after = disk_sizes(model, params, output)
    names = linear_maps(model.axes, params)
    weights = [array for path, array in flatten(params).items() if path_name(path) in names]
    count, kept = sum(array.size for array in weights), sum(int(np.count_nonzero(array)) for array in weights)
    ratios = {name: before[name] / after[name] if after[name] else None for name in before}
    return {
        "command": "pack",
        "source": source,
        "output": str(output),
        "values": values,
        "dtype": dtype,
        "linear_weights": count,
        "density": kept / count if count else None,
        "before": before,
        "after": after,
        "ratios": ratios,
    }


def disk_sizes(model: Model, params: Params, folder: Path) -> dict[str, int]:
    """The bytes in a folder of the linear maps (the kernels of the layers) and of the whole file of weights.

    Args:
        model: The model in the folder.
        params: Its parameters, in the types that they have there.
        folder: The folder.
    """
    names = linear_maps(model.axes, params)
    dense = {path_name(path): array.nbytes for path, array in flatten(params).items() if path_name(path) in names}
    with contextlib.ExitStack() as files:
        found = open_tensors(folder, files)  # those of Hugging Face have other names and are never packed
        stored = (found[n].file.stored_bytes(n) if n in found else size for n, size in dense.items())
        return {"linear_maps": sum(stored), "file": file_size(folder)}


def _other_files(folder: Path) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """What `save` wrote into a folder beside the model, and the record of the pruning."""
    listed = read_json(folder / CONFIG).get("jaxprune", {}).get("files", [])
    own = (name for name in listed if isinstance(name, str) and name not in (CONFIG, WEIGHTS, PRUNING))
    names = [name for name in own if Path(name).name == name]
    extra = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if PRUNING not in listed:
        return extra, None
    return extra, {name: value for name, value in read_pruning(folder).items() if name != "pruned"}

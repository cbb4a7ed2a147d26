"""Packed files: how small they are at each sparsity, and how long loading takes beside a dense file, in turns.

    python benchmarks/packing.py -o benchmarks/results/packing.json

In each kernel of the layers the same share of the smallest weights of the bundled BERT is set to zero. That model is no
good, but its file is as large as that of a good one. Sizes are exact, against dense float32. Every round loads each
folder once, from the page cache; a ratio of times is the median over the rounds. Seconds of the processor are recorded
beside those of the clock: on a machine that others use, they are what the load itself takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from speed import environment
from timing import Setting, in_turns, spread

import jaxprune as jp
from jaxprune.checkpoints.files import write_atomic
from jaxprune.checkpoints.sparse_file import RUN, PackedFile, linear_maps
from jaxprune.cli.storage import disk_sizes
from jaxprune.models import Model
from jaxprune.units import Params, flatten, path_name, unflatten

SPARSITIES = "0.5,0.8,0.9,0.95,0.97"
WAYS: Mapping[str, Mapping[str, Any]] = {  # name -> arguments of `save`
    "float32": {"packed": "exact"},
    "float16": {"packed": "exact", "dtype": "float16"},
    "bfloat16": {"packed": "exact", "dtype": "bfloat16"},
    "int8": {"packed": "int8"},
}
TIMED = ("float32", "int8")  # they are loaded as float32, as is the dense file


def sparsified(model: Model, params: Params, sparsity: float) -> Params:
    """The parameters without this share of the smallest weights of each kernel in the layers."""
    names, flat = linear_maps(model.axes, params), flatten(params)
    for path, array in flat.items():
        if path_name(path) in names:
            weights = np.array(array)
            smallest = np.argpartition(np.abs(weights), round(sparsity * weights.size), axis=None)
            weights.reshape(-1)[smallest[: round(sparsity * weights.size)]] = 0
            flat[path] = weights
    return unflatten(flat)


def measure(model: Model, params: Params, sparsities: list[float], *, repeats: int) -> list[dict[str, Any]]:
    """Saves the model at every sparsity in every way, and loads it in turns with the dense file."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for sparsity in sparsities:
            own, folder = sparsified(model, params, sparsity), Path(place) / f"{sparsity:g}"
            jp.save(folder / "dense", model, own)
            dense = disk_sizes(model, own, folder / "dense")
            ways = {name: _sizes(model, own, folder / name, dense, how) for name, how in WAYS.items()}
            folders = {"dense": folder / "dense", **{name: folder / name for name in TIMED}}
            spent: dict[str, list[float]] = {name: [] for name in folders}
            clock = in_turns({name: partial(_load, path, spent[name]) for name, path in folders.items()}, repeats)
            processor = {name: np.array(seconds[1:]) for name, seconds in spent.items()}  # as `in_turns` counts
            for name in TIMED:
                for what, seconds in {"clock": clock, "processor": processor}.items():
                    ways[name][f"load_{what}"] = spread(seconds[name] / seconds["dense"])
            dense_load = {"clock": spread(clock["dense"]), "processor": spread(processor["dense"])}
            rows.append({"sparsity": sparsity, "dense": dense, "dense_load_seconds": dense_load, "ways": ways})
    return rows


def _load(folder: Path, spent: list[float]) -> None:
    begun = time.process_time()
    jax.block_until_ready(jp.load(folder)[1])
    spent.append(time.process_time() - begun)


def _sizes(
    model: Model, params: Params, folder: Path, dense: Mapping[str, int], how: Mapping[str, Any]
) -> dict[str, Any]:
    jp.save(folder, model, params, **how)
    kinds = {name: np.dtype(how.get("dtype", "float32")) for name in linear_maps(model.axes, params)}
    typed = unflatten({path: _typed(array, kinds.get(path_name(path))) for path, array in flatten(params).items()})
    own = disk_sizes(model, typed, folder)
    with PackedFile(folder / "model.safetensors") as file:
        index = {name: _index_bytes(file, name) for name in file.packed}
        used = sorted({packed.how.encoding for packed in file.packed.values()})
        chosen = sum(index[name][packed.how.encoding] for name, packed in file.packed.items())
    by_encoding = {
        encoding: dense["linear_maps"] / (own["linear_maps"] - chosen + sum(each[encoding] for each in index.values()))
        for encoding in ("bits", "deltas")
    }
    ratios = {name: dense[name] / own[name] for name in own}
    return {**own, "encodings": used, "ratios": ratios, "linear_maps_by_encoding": by_encoding}


def _typed(array: Any, dtype: np.dtype | None) -> Any:
    return array if dtype is None else np.asarray(array).astype(dtype)


def _index_bytes(file: PackedFile, name: str) -> dict[str, int]:
    """What it takes to say where the values of a tensor are, in either encoding."""
    how, (places, _) = file.packed[name].how, file.nonzeros(name)
    zeros = np.diff(places, prepend=-1, append=how.size) - 1
    return {"all": 0, "bits": -(-how.size // 8), "deltas": how.count + int((zeros // RUN).sum())}


def show(found: Mapping[str, Any]) -> None:
    """Prints a table of all sparsities."""
    shown = Table(title="Times smaller than dense float32, and time to load beside the dense file")
    for column in ("zeros", "values", "encoding", "linear maps", "bits", "deltas", "whole file", "load", "processor"):
        shown.add_column(
            column, justify="left" if column in ("values", "encoding") else "right", no_wrap=column == "values"
        )
    for row in found["rows"]:
        for name, own in row["ways"].items():
            ratios, other = own["ratios"], own["linear_maps_by_encoding"]
            numbers = (ratios["linear_maps"], other["bits"], other["deltas"], ratios["file"])
            loads = (f"{own[name]['median']:.2f}" if name in own else "" for name in ("load_clock", "load_processor"))
            shown.add_row(
                f"{row['sparsity']:.0%}", name, ", ".join(own["encodings"]), *(f"{n:.2f}" for n in numbers), *loads
            )
    Console().print(shown)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=jp.bundled_model(), help="folder or hub id")
    parser.add_argument("--sparsities", default=SPARSITIES, help="shares of the weights that are zero")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    model, params = jp.load(arguments.model)
    setting = Setting(
        model=model,
        params=params,
        head=next(iter(model.heads), None),
        folder=Path(arguments.model).name,
        repeats=arguments.repeats,
    )
    sparsities = [float(sparsity) for sparsity in arguments.sparsities.split(",")]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    record = {"command": " ".join(["python", *sys.argv]), **environment(setting, threads)}
    record["settings"] = {name: record["settings"][name] for name in ("folder", "repeats")}
    record["rows"] = measure(model, params, sparsities, repeats=arguments.repeats)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
    show(record)


if __name__ == "__main__":
    main()

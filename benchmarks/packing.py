"""Sparse weights on disk: safetensors under a standard compressor, beside the layout without zeros of version 0.1.

    python benchmarks/packing.py -o benchmarks/results/packing.json

The linear maps of the bundled BERT lose the same share of their smallest weights each. Their stored values are float16;
for float32 they get random lower bits, since values of fewer bits would flatter the compressors. `packed` is the
layout of version 0.1 (`former_layout`): the values that are not zero, and a bit or a byte each to say where they are.
Every round reads each file once from the page cache into dense NumPy arrays; the ratio of times is the median over the
rounds. Processor time is recorded beside clock time: on a machine that others use, it is what reading itself takes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import safetensors.numpy
from rich.console import Console
from rich.table import Table
from speed import environment
from timing import Setting, in_turns, spread

import jaxprune as jp
from jaxprune.checkpoints.files import write_atomic
from jaxprune.checkpoints.weights import WeightFile, linear_maps, output_scales, round_to_int8
from jaxprune.models import Model
from jaxprune.units import Params, flatten, path_name

SPARSITIES = "0.8,0.9,0.95"
VALUES = ("float32", "float16", "int8")
LEVELS = (3, 9, 19)  # of zstd
NAMES = {"float32": "F32", "float16": "F16", "int8": "I8"}  # as safetensors calls them

Tensors = dict[str, np.ndarray]


def sparsified(model: Model, params: Params, sparsity: float) -> Tensors:
    """The linear maps of the layers without this share of the smallest weights of each."""
    names, tensors = linear_maps(model.axes, params), {}
    for path, array in flatten(params).items():
        if path_name(path) in names:
            weights = np.array(array)
            count = round(sparsity * weights.size)
            weights.reshape(-1)[np.argpartition(np.abs(weights), count, axis=None)[:count]] = 0
            tensors[path_name(path)] = weights
    return tensors


def stored(tensors: Tensors, values: str, outputs: Mapping[str, int]) -> tuple[Tensors, Tensors]:
    """The tensors in the type of a file, and the scales of their outputs if that is int8."""
    if values == "int8":
        scales = {name: output_scales(array, outputs[name]) for name, array in tensors.items()}
        return {name: round_to_int8(array, scales[name]) for name, array in tensors.items()}, scales
    random = np.random.default_rng(0)
    noise = 2.0**-12 if values == "float32" else 0.0  # below the last bit of float16
    return {
        name: (array * (1 + noise * random.standard_normal(array.shape)) + 0.0).astype(values)
        for name, array in tensors.items()
    }, {}


def former_layout(tensors: Tensors, scales: Tensors) -> tuple[Tensors, str]:
    """The tensors as version 0.1 packed them, and their description for the metadata; what does not shrink is whole."""
    parts, described = {}, {}
    for name, array in tensors.items():
        flat = array.reshape(-1)
        nonzero = flat.view(f"u{array.itemsize}") != 0  # -0.0 is a value
        places, kind = np.flatnonzero(nonzero), NAMES[str(array.dtype)]
        zeros = np.diff(places, prepend=-1, append=flat.size) - 1
        counts = zeros // 255 + 1  # bytes: 255 for 255 zeros and no weight, then the zeros that are left before one
        counts[-1] -= 1
        deltas = np.full(counts.sum(), 255, np.uint8)
        deltas[np.cumsum(counts)[:-1] - 1] = zeros[:-1] % 255
        where = {"bits": np.packbits(nonzero, bitorder="little")}
        if len(deltas) < len(where["bits"]):
            where = {"deltas": deltas}
        encoding, values = next(iter(where)), flat[places]
        if values.nbytes + len(where[encoding]) >= flat.nbytes:
            encoding, where, values = "all", {}, flat
        parts |= {f"{name}.values": values, **{f"{name}.{part}": index for part, index in where.items()}}
        parts |= {f"{name}.scales": scales[name]} if name in scales else {}
        described[name] = {
            "dtype": "F32" if name in scales else kind,
            "shape": list(array.shape),
            "values": kind,
            "encoding": encoding,
            "count": len(values),
        }
    return parts, json.dumps({"version": 1, "tensors": described}, separators=(",", ":"))


def read_plain(file: Path, expand: Callable[[bytes], bytes], scales: Mapping[str, Any]) -> Tensors:
    """Every tensor of a compressed safetensors file, dense."""
    tensors = safetensors.numpy.load(expand(file.read_bytes()))
    products = {name: (tensors[name], tensors[f"{name}.scales"]) for name in scales}
    return tensors | {
        name: (array.astype(np.float32).reshape(-1, len(scale)) * scale).reshape(array.shape)
        for name, (array, scale) in products.items()
    }


def read_packed(file: Path) -> Tensors:
    """Every tensor of a file of version 0.1, dense."""
    with WeightFile(file) as opened:
        return {name: opened.read(name) for name in opened.entries}


def measure(model: Model, params: Params, sparsities: list[float], *, repeats: int) -> list[dict[str, Any]]:
    """Writes the linear maps at every sparsity in every way, and reads the files in turns."""
    outputs, rows = linear_maps(model.axes, params), []
    for sparsity in sparsities:
        dense = sparsified(model, params, sparsity)
        for values in VALUES:
            tensors, scales = stored(dense, values, outputs)
            plain = safetensors.numpy.save(tensors | {f"{name}.scales": scale for name, scale in scales.items()})
            with tempfile.TemporaryDirectory() as place:
                rows.append(
                    {"sparsity": sparsity, "values": values, "plain_bytes": len(plain)}
                    | _compare(Path(place), tensors, scales, plain, repeats)
                )
    return rows


def _compare(folder: Path, tensors: Tensors, scales: Tensors, plain: bytes, repeats: int) -> dict[str, Any]:
    parts, text = former_layout(tensors, scales)
    safetensors.numpy.save_file(parts, folder / "packed", {"packed": text})
    runs: dict[str, Callable[[], Tensors]] = {"packed": partial(read_packed, folder / "packed")}
    compressors: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        "xz": (lzma.compress, lzma.decompress)
    }
    for level in LEVELS:
        codec = pyarrow.Codec("zstd", compression_level=level)
        compressors[f"zstd {level}"] = (
            partial(codec.compress, asbytes=True),
            partial(codec.decompress, decompressed_size=len(plain), asbytes=True),
        )
    seconds_to_write = {}
    for name, (compress, expand) in compressors.items():
        begun = time.process_time()
        (folder / name).write_bytes(compress(plain))
        seconds_to_write[name] = time.process_time() - begun
        runs[name] = partial(read_plain, folder / name, expand, scales)
    expected = {name: array.tobytes() for name, array in runs["packed"]().items()}
    for name, run in runs.items():
        found = run()
        if any(found[tensor].tobytes() != content for tensor, content in expected.items()):
            raise ValueError(f"{name} does not give back what was written.")
    spent: dict[str, list[float]] = {name: [] for name in runs}
    clock = in_turns({name: partial(_timed, run, spent[name]) for name, run in runs.items()}, repeats)
    processor = {name: np.array(seconds[1:]) for name, seconds in spent.items()}  # as `in_turns` counts
    size = {name: (folder / name).stat().st_size for name in runs}
    return {
        "packed_bytes": size["packed"],
        "packed_read_seconds": {"clock": spread(clock["packed"]), "processor": spread(processor["packed"])},
        "ways": {
            name: {
                "bytes": size[name],
                "size": size[name] / size["packed"],
                "read_clock": spread(clock[name] / clock["packed"]),
                "read_processor": spread(processor[name] / processor["packed"]),
                "write_seconds": seconds,
            }
            for name, seconds in seconds_to_write.items()
        },
    }


def _timed(run: Callable[[], Any], spent: list[float]) -> None:
    begun = time.process_time()
    run()
    spent.append(time.process_time() - begun)


def show(record: Mapping[str, Any]) -> None:
    """Prints a table of all files."""
    table = Table(title="Compressed safetensors beside the packed layout of version 0.1")
    for column in ("zeros", "values", "packed, MB", "compressor", "size / packed", "read / packed", "write, s"):
        table.add_column(column, justify="left" if column in ("values", "compressor") else "right")
    for row in record["rows"]:
        for name, way in row["ways"].items():
            numbers = (way["size"], way["read_processor"]["median"], way["write_seconds"])
            packed = f"{row['packed_bytes'] / 1e6:.2f}"
            table.add_row(f"{row['sparsity']:.0%}", row["values"], packed, name, *(f"{n:.2f}" for n in numbers))
    Console().print(table)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=jp.bundled_model(), help="folder or hub id")
    parser.add_argument("--sparsities", default=SPARSITIES, help="shares of the weights that are zero")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    model, params = jp.load(arguments.model)
    params = jax.tree.map(np.asarray, params)
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
    record["versions"] |= {"pyarrow": pyarrow.__version__, "safetensors": safetensors.__version__}
    record["settings"] = {name: record["settings"][name] for name in ("folder", "repeats")}
    record["rows"] = measure(model, params, sparsities, repeats=arguments.repeats)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
    show(record)


if __name__ == "__main__":
    main()

"""Times the scoring kernels beside a forward pass, in one run: what one gradient and one node of integration cost.

    python benchmarks/kernels.py --model jaxprune/bundled/model -o benchmarks/results/kernels.json

Medians and quartiles of interleaved repeats; the ratios are what to quote, the times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from jaxprune.cost import flops
from jaxprune.files import write_atomic


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=jp.bundled_model(), help="folder or hub id; the first task head is used")
    parser.add_argument("--batch", type=int, default=32, help="examples in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens per example, no padding")
    parser.add_argument("--nodes", type=int, default=8, help="quadrature nodes")
    parser.add_argument("--repeats", type=int, default=9, help="counted repeats, after one warm-up")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()

    model, params = jp.load(arguments.model)
    head = model.heads[0]
    rows = arguments.batch, arguments.length
    tokens = np.random.default_rng(0).integers(1, model.config.vocab, rows, dtype=np.int32)
    batch = {"input_ids": tokens, "attention_mask": np.ones(rows, np.int32), "labels": np.zeros(rows[0], np.int32)}

    def scored(criterion: Any) -> Callable[[], Any]:
        return lambda: criterion(model, params, batch, head=head, key=None, means=None)

    kernels: dict[str, tuple[Callable[[], Any], float]] = {  # name: what to run, its cost in forward passes
        "forward": (lambda: model.apply(params, batch, head=head).logits, 1),
        "gradient x activation": (scored(jp.GradientActivation()), 2),
        f"integrated gradients, {arguments.nodes} nodes": (
            scored(jp.IntegratedGradients(nodes=arguments.nodes)),
            2 * arguments.nodes + 2,  # and the objective at both ends of the path
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for repeat in range(arguments.repeats + 1):
        for name, (kernel, _) in kernels.items():
            begin = time.perf_counter()
            jax.block_until_ready(kernel())
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    work = flops(model, params, arguments.length) * arguments.batch
    forward = np.asarray(seconds["forward"])
    results = {}
    for name, (_, passes) in kernels.items():
        quartiles = np.quantile(seconds[name], [0.25, 0.5, 0.75])
        results[name] = {
            "median_s": quartiles[1],
            "quartiles_s": [quartiles[0], quartiles[2]],
            "forward_passes_expected": passes,
            "forward_passes_measured": float(np.median(np.asarray(seconds[name]) / forward)),
            "gflops_per_s": passes * work / quartiles[1] / 1e9,
        }
        print(f"{name:34} {1e3 * quartiles[1]:9.1f} ms  {results[name]['forward_passes_measured']:6.2f} forward passes")
    record = {
        "command": "python benchmarks/kernels.py",
        "model": Path(arguments.model).name,
        "batch": arguments.batch,
        "length": arguments.length,
        "repeats": arguments.repeats,
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("jaxprune", "jax", "jaxlib", "flax")},
        "kernels": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

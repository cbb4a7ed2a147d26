"""The speed of linear maps with zeros on this device: dense, BCSR, 2:4 and blocks, at 50 to 99 %, in turns.

    python benchmarks/sparse_compute.py -o benchmarks/results/sparse_compute.json

`y = x w`, float32, with `x` of some tokens and `w` of an FFN's size. Every way is checked against the dense product of
the same weights first. A ratio is the median over the rounds of the dense time by its own: above 1 the zeros pay.

    dense         XLA, zeros included: what jaxprune does
    2:4           the same, as JAX has no operation for it; the weights are in the pattern
    BCSR          `jax.experimental.sparse`
    SciPy CSR     on the host, where the device is a processor: what a sparse library takes
    blocks, XLA   32 x 32 blocks, as many in each column of blocks: they are gathered and multiplied
    blocks, Pallas  the same in a kernel; timed on a GPU, elsewhere only interpreted and checked
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import sparse
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table
from speed import environment
from timing import Setting, in_turns, spread

import jaxprune as jp
from jaxprune.checkpoints.files import write_atomic

SPARSITIES = "0.5,0.8,0.9,0.95,0.99"
TOKENS = "32,4096"
SHAPE = (768, 3072)  # of BERT-base's FFN
BLOCK = 32
TILE = 32  # tokens of one program of the kernel


@jax.jit
def dense(x: Float[Array, "t i"], w: Float[Array, "i o"]) -> Float[Array, "t o"]:
    """The product with all zeros."""
    return x @ w


@jax.jit
def by_bcsr(x: Float[Array, "t i"], w: Any) -> Float[Array, "t o"]:
    """The product with `w` transposed, `[o, i]`, as BCSR."""
    return (w @ x.T).T


@jax.jit
def by_gathers(
    x: Float[Array, "t i"], blocks: Float[Array, "o k a b"], index: Int[Array, "o k"]
) -> Float[Array, "t o*b"]:
    """The product with the blocks that are not zero: `k` of every column of blocks, and the rows they stand in."""
    size = blocks.shape[2]
    gathered = x.reshape(len(x), -1, size)[:, index]  # [t, o, k, a]
    return jnp.einsum("toka,okab->tob", gathered, blocks).reshape(len(x), -1)


@partial(jax.jit, static_argnames="interpret")
def by_pallas(
    x: Float[Array, "t i"], blocks: Float[Array, "o k a b"], index: Int[Array, "o k"], interpret: bool
) -> Float[Array, "t o*b"]:
    """The same in a kernel: a program for every tile of tokens and column of blocks."""
    columns, kept, size, width = blocks.shape

    def kernel(index_ref: Any, x_ref: Any, blocks_ref: Any, y_ref: Any) -> None:
        def add(k: Array, total: Array) -> Array:
            part = x_ref[:, pl.ds(index_ref[0, k] * size, size)]
            return total + jnp.dot(part, blocks_ref[0, k], preferred_element_type=jnp.float32)

        y_ref[...] = jax.lax.fori_loop(0, kept, add, jnp.zeros(y_ref.shape, jnp.float32))

    return pl.pallas_call(
        kernel,
        grid=(len(x) // TILE, columns),
        in_specs=[
            pl.BlockSpec((1, kept), lambda t, o: (o, 0)),
            pl.BlockSpec((TILE, x.shape[1]), lambda t, o: (t, 0)),
            pl.BlockSpec((1, kept, size, width), lambda t, o: (o, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((TILE, width), lambda t, o: (t, o)),
        out_shape=jax.ShapeDtypeStruct((len(x), columns * width), jnp.float32),
        interpret=interpret,
    )(index, x, blocks)


def in_blocks(w: np.ndarray, sparsity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keeps the blocks with the largest sums in each column of blocks: the weights, the blocks and their rows."""
    rows, columns = (side // BLOCK for side in w.shape)
    tiles = w.reshape(rows, BLOCK, columns, BLOCK).transpose(2, 0, 1, 3)  # [o, i, a, b]
    kept = max(1, round((1 - sparsity) * rows))
    index = np.sort(np.argsort(-np.abs(tiles).sum((2, 3)), axis=1)[:, :kept], axis=1)
    blocks = np.take_along_axis(tiles, index[:, :, None, None], axis=1)
    whole = np.zeros_like(tiles)
    np.put_along_axis(whole, index[:, :, None, None], blocks, axis=1)
    return whole.transpose(1, 2, 0, 3).reshape(w.shape), blocks, index.astype(np.int32)


def measure(
    sparsities: list[float], tokens: list[int], *, shape: tuple[int, int], repeats: int
) -> list[dict[str, Any]]:
    """All ways at all sparsities and numbers of tokens.

    Raises:
        ValueError: If a way does not compute the dense product.
    """
    random = np.random.default_rng(0)
    w = random.standard_normal(shape).astype(np.float32) / shape[0] ** 0.5
    on_gpu, on_cpu = (jax.default_backend() == name for name in ("gpu", "cpu"))
    found = []
    for count in tokens:
        x = jnp.asarray(random.standard_normal((count, shape[0])), jnp.float32)
        for sparsity in sparsities:
            masked, _ = jp.sparse.one_shot({"w": w}, sparsity, prunable=lambda *_: 1)
            pruned = np.asarray(masked["w"])
            blocky, blocks, index = in_blocks(w, sparsity)
            ways: dict[str, tuple[Callable[[], Any], np.ndarray]] = {
                "dense": (partial(dense, x, jnp.asarray(pruned)), pruned),
                "BCSR": (partial(by_bcsr, x, sparse.BCSR.fromdense(jnp.asarray(pruned.T))), pruned),
                "blocks, XLA": (partial(by_gathers, x, jnp.asarray(blocks), jnp.asarray(index)), blocky),
            }
            kernel = partial(by_pallas, x, jnp.asarray(blocks), jnp.asarray(index))
            if on_gpu:
                ways["blocks, Pallas"] = partial(kernel, interpret=False), blocky
            if on_cpu:
                from scipy.sparse import csr_array

                ways["SciPy CSR"] = partial(_host, csr_array(pruned.T), np.asarray(x)), pruned
            if sparsity == 0.5:
                half, _ = jp.sparse.one_shot({"w": w}, 0.5, prunable=lambda *_: 1, pattern=jp.patterns.NM(n=2, m=4))
                ways["2:4"] = partial(dense, x, half["w"]), np.asarray(half["w"])
            for name, (run, weights) in ways.items():
                check(name, run(), np.asarray(x) @ weights)
            if not on_gpu and count <= 64:
                check("blocks, Pallas", kernel(interpret=True), np.asarray(x) @ blocky)
            runs = {name: partial(_wait, run) for name, (run, _) in ways.items()}
            seconds = in_turns(runs, repeats)
            rows = {
                name: {
                    "seconds": spread(own),
                    "ratio": spread(seconds["dense"] / own),
                    "zeros": float((ways[name][1] == 0).mean()),
                }
                for name, own in seconds.items()
            }
            found.append({"tokens": count, "sparsity": sparsity, "ways": rows})
    return found


def check(name: str, found: Any, expected: np.ndarray) -> None:
    """Refuses another product."""
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    if not error < 1e-4:
        raise ValueError(f"{name} differs from the dense product by {error:.1e} of its largest entry.")


def _host(w: Any, x: np.ndarray) -> np.ndarray:
    return (w @ x.T).T


def _wait(run: Callable[[], Any]) -> None:
    jax.block_until_ready(run())


def show(record: Mapping[str, Any]) -> None:
    """Prints a table of all ratios."""
    table = Table(title=f"Times as fast as dense, {record['shape'][0]} x {record['shape'][1]}, {record['device']}")
    for column in ("tokens", "zeros", "way", "ms", "times as fast"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in record["rows"]:
        for name, own in row["ways"].items():
            ratio = own["ratio"]["median"]
            milliseconds = f"{1e3 * own['seconds']['median']:.3f}"
            table.add_row(f"{row['tokens']:,}", f"{own['zeros']:.0%}", name, milliseconds, f"{ratio:.2f}")
    Console().print(table)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsities", default=SPARSITIES, help="shares of the weights that are zero")
    parser.add_argument("--tokens", default=TOKENS, help="tokens in a product, by commas")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    sparsities = [float(sparsity) for sparsity in arguments.sparsities.split(",")]
    tokens = [int(count) for count in arguments.tokens.split(",")]
    if any(count % TILE for count in tokens):
        parser.error(f"--tokens takes multiples of {TILE}, got {arguments.tokens}")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model, params = jp.load(jp.bundled_model())  # for the description of the machine alone
    setting = Setting(model=model, params=params, head="sst2", folder="none", repeats=arguments.repeats)
    record = {"command": " ".join(["python", *sys.argv]), **environment(setting, threads)}
    record["settings"] = {"repeats": arguments.repeats, "block": BLOCK}
    record |= {"shape": list(SHAPE), "rows": measure(sparsities, tokens, shape=SHAPE, repeats=arguments.repeats)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
    show(record)


if __name__ == "__main__":
    main()

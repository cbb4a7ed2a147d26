"""Timing of functions in turns, beside the same in PyTorch if that is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import Model
from jaxprune.scoring.attribution import Context
from jaxprune.units import Params

AGREEMENT = 1e-4  # of the largest attribution, in float32
PEERS = ("torch", "captum")

Runs = Mapping[str, Callable[[], Any]]
Part = dict[str, Any]  # "seconds", "ratios" and "facts", by what they are of


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The model and the batch that are measured."""

    model: Model
    params: Params
    head: str | None  # None: a text-to-text model
    folder: str  # the model's, or its name
    batch: int = 16  # examples per batch
    batches: int = 1  # of the joint path
    length: int = 128  # tokens per example, no padding
    written: int = 4  # tokens of an answer, if the model writes text
    nodes: int = 8
    repeats: int = 5
    compiled: bool = False  # whether PyTorch compiles its model

    @property
    def lengths(self) -> int | tuple[int, int]:
        """Tokens per example, as the library's costs take them."""
        return (self.length, self.written) if len(self.model.stacks) > 1 else self.length

    def rows(self, batch: int | None = None, length: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
        """Random tokens and labels; of a text-to-text model two random answers to choose from."""
        shape = batch or self.batch, length or self.length
        random = np.random.default_rng(seed)
        vocab, text = self.model.config.vocab, self.model.answers_in_text
        count = 2 if text else len(self.model.head(self.head).labels)
        labels = random.integers(0, count, shape[0], dtype=np.int32)
        tokens = random.integers(1, vocab, shape, dtype=np.int32)
        rows = {"input_ids": tokens, "attention_mask": np.ones(shape, np.int32), "labels": labels}
        if text:
            rows["candidates"] = random.integers(2, vocab, (shape[0], count, self.written), dtype=np.int32)
            rows["candidates"][:, :, -1] = self.model.config.end_id
            rows["decoder_input_ids"] = random.integers(2, vocab, (shape[0], self.written), dtype=np.int32)
        return rows

    def score(self, criterion: Any, batches: Sequence[Mapping[str, np.ndarray]] = ()) -> Callable[[], Any]:
        """A function that calls a criterion on batches and keeps the sums over examples, as scoring does."""
        given = [jax.device_put(dict(batch)) for batch in batches or [self.rows()]]

        def run() -> Any:
            total: Any = None
            for batch in given:
                found = criterion(self.model, self.params, batch, Context(self.head)).scores
                sums = _sums(found)
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            return jax.block_until_ready(total)

        return run


@jax.jit
def _sums(scores: Any) -> Any:
    return jax.tree.map(lambda value: value.sum(0), scores)


def in_turns(runs: Runs, repeats: int) -> dict[str, np.ndarray]:
    """Seconds `[repeats]` of every run, in rounds in which each runs once; the first round is not counted."""
    seconds = np.empty((repeats + 1, len(runs)))
    for i in range(repeats + 1):
        for j, (name, run) in enumerate(runs.items()):
            begin = time.perf_counter()
            run()
            seconds[i, j] = time.perf_counter() - begin
            say(f"  {name}: {seconds[i, j]:.3f} s{'' if i else ' (not counted)'}")
    return dict(zip(runs, seconds[1:].T, strict=True))


def spread(values: Any, **more: Any) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "quartiles": [float(low), float(high)], **more}


def wanted(ratio: Mapping[str, Any]) -> str:
    """The expected size of a ratio, in words."""
    known = {"target": "at least", "at_most": "at most", "flops_ratio": "FLOPs", "expected": "about"}
    return ", ".join(f"{word} {ratio[key]:.2f}" for key, word in known.items() if key in ratio)


def part(seconds: Mapping[str, np.ndarray], ratios: Mapping[str, Any], facts: Mapping[str, Any]) -> Part:
    """The record of a part."""
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": dict(ratios),
        "facts": dict(facts),
    }


def disagreement(found: Mapping[str, Any], expected: Sequence[Any]) -> float:
    """The largest difference of attributions `[b, units]`, relative to the largest of PyTorch's."""
    theirs = [np.asarray(value.cpu()) for value in expected]
    pairs = zip(found.values(), theirs, strict=True)
    return max(float(np.abs(np.asarray(a) - b).max()) for a, b in pairs) / max(float(np.abs(b).max()) for b in theirs)


def agreement(setting: Setting, found: Mapping[str, Any], theirs: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """The largest differences of the numbers, by name of the other side.

    Raises:
        ValueError: If they differ by more than `AGREEMENT` in float32.
    """
    facts = {f"difference from {name}": disagreement(found, values) for name, values in theirs.items()}
    if precision(setting) == "float32" and max(facts.values(), default=0.0) > AGREEMENT:
        raise ValueError(f"the numbers do not agree to {AGREEMENT}, so their times are not comparable: {facts}.")
    return facts


def precision(setting: Setting) -> str:
    """The type of the parameters."""
    return str(jax.tree.leaves(setting.params)[0].dtype)


def peer(setting: Setting) -> Any:
    """The PyTorch side on the same weights; None if it is not installed or knows no such model."""
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing or setting.model.config.model_type != "bert" or setting.head is None:
        why = f"{' and '.join(missing)} not installed" if missing else "it is made for BERT alone"
        say(f"  PyTorch is left out: {why}. `make bench-reference` installs what is needed.")
        return None
    from gated_torch import Peer

    return Peer(setting.model, setting.params, setting.head, setting.rows(), compiled=setting.compiled)


def peak_of_child(command: Sequence[str]) -> int | None:
    """The memory growth that a separate process prints; None where it cannot be measured."""
    if jax.default_backend() == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    # glibc: large arrays are mapped, so what is freed leaves the process at once
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables).stdout)


def growth(run: Callable[[], Any]) -> int:
    """By how many bytes a function makes this process (or the GPU's memory) grow when it is called a second time."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        before = (device.memory_stats() or {})["bytes_in_use"]
        run()
        return (device.memory_stats() or {})["peak_bytes_in_use"] - before
    run()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return 1024 * (_status("VmHWM") - before)


def _status(field: str) -> int:
    """A field of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def say(text: str) -> None:
    """Prints progress."""
    print(text, file=sys.stderr, flush=True)

"""What a model costs: parameters, FLOPs, bytes in memory and on disk, and measured latency.

Costs are additive over units: with one length, every unit of a site costs the same, and what can be pruned costs
`sum(width * cost of one unit)` over the sites. All of it is read from the axis table and the shapes of the arrays.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import Model
from jaxprune.units import UNITS, Params, axes_of, flatten, sites, subtree, unit_axes, widths
from jaxprune.units import Path as ParameterPath


class Slice(NamedTuple):
    """The part of one parameter that belongs to one unit."""

    path: ParameterPath  # of the parameter
    kind: str  # of the unit
    axes: tuple[str, ...]  # without the unit axes
    shape: tuple[int, ...]  # without the unit axes

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


Length: TypeAlias = float | Sequence[float]  # tokens; of a text-to-text model those it reads and those it writes
Measure: TypeAlias = Callable[[Slice], float]  # what one parameter adds to the cost of one unit


def parameters(params: Params) -> int:
    """The number of all parameters, embeddings and task heads included."""
    return sum(math.prod(array.shape) for array in flatten(params).values())


def memory(params: Params) -> int:
    """The bytes of all parameters, in the types that they have."""
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in flatten(params).values())


def prunable_parameters(model: Model, params: Params) -> int:
    """The number of weights and biases that carry a unit axis: what goes when every unit goes."""
    return round(_total(model, params, elements))


def flops(model: Model, params: Params, length: Length) -> float:
    """FLOPs of one example: the layers' matrix products, 2 per multiply-add.

    Embeddings, norms, biases, activations, softmax, pooler and task heads are not counted.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        length: Tokens per example, which may be means: one number; of a text-to-text model two, those it reads and
            those it writes.

    Returns:
        The FLOPs, with the attention terms that grow with the square of the length.

    Raises:
        ValueError: If `length` is not positive, or not the one number or the two that the model needs.
    """
    return _total(model, params, matmul_flops(checked_length(model, length)))


def usual_length(model: Model) -> Length:
    """Tokens per example where none are named: 128, or what the model reads; of a text-to-text model 4 are written."""
    read = min(128, model.max_length)
    return [read, 4] if len(model.stacks) > 1 else read


def checked_length(model: Model, length: Length) -> Length:
    """The length as it was given.

    Raises:
        ValueError: If it is not what this model needs.
    """
    given = np.size(length)
    if given != len(model.stacks):
        needed = "two numbers, tokens read and tokens written" if len(model.stacks) > 1 else "one number of tokens"
        raise ValueError(f"length must be {needed}, got {length!r}.")
    return length


def unit_costs(model: Model, params: Params, measure: Measure, kinds: Collection[str] = UNITS) -> dict[str, float]:
    """The cost of one unit at every site.

    Args:
        model: The architecture.
        params: Parameters of any widths; a site without units has a cost, too.
        measure: What one parameter adds to the cost: `elements`, `weight_bytes(params)` or `matmul_flops(length)`.
        kinds: Kinds of units. A head costs what its channels and query channels cost together.

    Returns:
        Site name to cost, in site order.
    """
    costs = dict.fromkeys(widths(model.axes, params, kinds), 0.0)
    for name, part in _slices(model, params, kinds):
        costs[name] += measure(part)
    return costs


def elements(part: Slice) -> float:
    """Measures parameters: weights and biases."""
    return part.size


def weight_bytes(params: Params) -> Measure:
    """Measures bytes: weights and biases in the types that they have."""
    return lambda part: part.size * np.dtype(subtree(params, part.path).dtype).itemsize


def matmul_flops(length: Length) -> Measure:
    """Measures FLOPs per example at this many tokens; two numbers are those of an encoder and of a decoder.

    A kernel costs `2 * length` per element. Attention multiplies queries with keys and probabilities with values, each
    `2 * length^2` per channel. Half of it is booked on either factor (the second product's result is what the output
    kernel reads), so each of the four kernels of a head adds `length^2` per channel. Where a decoder attends to the
    encoder's output, keys and values are made of the encoder's tokens, and the square becomes a product.

    Raises:
        ValueError: If `length` is not positive.
    """
    lengths = [float(own) for own in np.atleast_1d(np.asarray(length, np.float64))]
    if not all(math.isfinite(own) and own > 0 for own in lengths):
        raise ValueError(f"length must be a positive number of tokens, got {length}.")
    read, written = lengths[0], lengths[-1]

    def measure(part: Slice) -> float:
        if part.path[-1] != "kernel":
            return 0.0
        own = written if part.path[0] == "decoder" else read
        seen = read if "cross" in part.path else own
        tokens = seen if part.path[-2] in ("key", "value") else own
        channels = 0 if part.kind == "neurons" else part.size // part.shape[part.axes.index("embed")]  # 1, or a head's
        return 2.0 * tokens * part.size + channels * own * seen

    return measure


def file_size(path: str | Path) -> int:
    """Bytes of a file, or of the weights (`*.safetensors`) in a folder.

    Raises:
        FileNotFoundError: If there is no such file, or the folder holds no weights.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} has no *.safetensors file.")
    return sum(file.stat().st_size for file in files)


class Latency(NamedTuple):
    """How long one forward pass takes, in seconds."""

    median: float
    p95: float  # 95th percentile
    batch: int  # examples per pass
    length: int | tuple[int, int]  # tokens per example, none of them padding; of text-to-text those written, too
    device: str
    least: float  # the quickest pass: what else the machine did can only have added to the others


class LatencyComparison(NamedTuple):
    """Several models measured in turns."""

    latencies: tuple[Latency, ...]
    speedups: tuple[float, ...]  # median over the rounds of (time of the first model) / (time of this one)


def latency(
    model: Model,
    params: Params,
    *,
    batch: int = 1,
    length: int | tuple[int, int] = 128,
    head: str | None = None,
    repeats: int = 20,
    warmup: int = 3,
) -> Latency:
    """Measures the forward pass, compiled as one program.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        batch: Examples per pass.
        length: Tokens per example; of a text-to-text model those it reads and those it writes.
        head: The task head; None is the only one. A model without task heads is measured up to its last hidden state.
        repeats: Passes that are timed.
        warmup: Passes before, the first of which compiles.

    Returns:
        Median and 95th percentile in seconds, of passes that are waited for one by one.

    Raises:
        ValueError: If a number is less than 1, or the model cannot read that many tokens.
    """
    compared = compare_latency([(model, params)], batch=batch, length=length, head=head, repeats=repeats, warmup=warmup)
    return compared.latencies[0]


def compare_latency(
    models: Sequence[tuple[Model, Params]],
    *,
    batch: int = 1,
    length: int | tuple[int, int] = 128,
    head: str | None = None,
    repeats: int = 20,
    warmup: int = 3,
) -> LatencyComparison:
    """Measures several models side by side: A B A B, so that a change of the machine's load meets all of them.

    Args:
        models: Pairs of a model and its parameters; the first is what the others are compared with.
        batch: Examples per pass.
        length: Tokens per example; of a text-to-text model those it reads and those it writes.
        head: The task head; None is the only one.
        repeats: Rounds that are timed; in a round every model runs once.
        warmup: Rounds before, the first of which compiles.

    Returns:
        One `Latency` and one speed-up per model.

    Raises:
        ValueError: If there is no model, a number is less than 1, or a model cannot read that many tokens.
    """
    if not models:
        raise ValueError("there is no model to measure.")
    for name, value in (("batch", batch), ("length", length), ("repeats", repeats), ("warmup", warmup)):
        if np.min(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    passes = [forward_pass(model, params, batch, length, head) for model, params in models]
    for _ in range(warmup):
        for run in passes:
            run()
    seconds = np.empty((repeats, len(passes)))
    for i in range(repeats):
        for j, run in enumerate(passes):
            start = time.perf_counter()
            run()
            seconds[i, j] = time.perf_counter() - start
    device = _device_name()
    return LatencyComparison(
        tuple(
            Latency(float(np.median(own)), float(np.percentile(own, 95)), batch, length, device, float(own.min()))
            for own in seconds.T
        ),
        tuple(float(ratio) for ratio in np.median(seconds[:, :1] / seconds, axis=0)),
    )


def forward_pass(
    model: Model, params: Params, batch: int, length: int | tuple[int, int], head: str | None
) -> Callable[[], Any]:
    """A function that runs one forward pass and waits for it; its inputs are on the device already.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        batch: Examples per pass.
        length: Tokens per example; of a text-to-text model those it reads and those it writes.
        head: The task head; None is the only one. A model without task heads runs up to its last hidden state.
    """
    inputs = pass_inputs(model, batch, length)
    params = jax.device_put(params)
    return lambda: jax.block_until_ready(_forward(model, params, inputs, head))


def pass_inputs(model: Model, batch: int, length: int | tuple[int, int]) -> dict[str, jax.Array]:
    """A batch without padding to measure with, `[batch, length]` tokens that are all the same.

    Raises:
        ValueError: If `length` is not the one number or the two that the model needs.
    """
    inputs = {}
    for prefix, tokens in zip(("", "decoder_"), np.atleast_1d(np.asarray(checked_length(model, length))), strict=False):
        inputs[f"{prefix}input_ids"] = jnp.full((batch, int(tokens)), model.config.pad_id + 1, jnp.int32)
        inputs[f"{prefix}attention_mask"] = jnp.ones((batch, int(tokens)), jnp.int32)
    return inputs


def _slices(model: Model, params: Params, kinds: Collection[str]) -> Iterator[tuple[str, Slice]]:
    """Site name and slice, for every parameter that carries a unit axis."""
    for site in sites(model.axes, params, kinds):
        for local, array in flatten(subtree(params, site.module)).items():
            path = (*site.module, *local)
            axes = axes_of(model.axes, path)
            if site.kind in axes:
                units, shape = unit_axes(axes, site.kind), tuple(array.shape)
                rest = axes[: units.start] + axes[units.stop :], shape[: units.start] + shape[units.stop :]
                yield site.name, Slice(path, site.kind, *rest)


def _total(model: Model, params: Params, measure: Measure) -> float:
    costs = unit_costs(model, params, measure)
    return math.fsum(units * costs[name] for name, units in widths(model.axes, params).items())


@partial(jax.jit, static_argnums=(0, 3))
def _forward(model: Model, params: Params, batch: dict[str, jax.Array], head: str | None) -> Any:
    """The logits; the hidden states of a model without task heads, of which XLA would otherwise compute nothing."""
    output = model.apply(params, batch, head=head, hidden=not (model.heads or model.answers_in_text))
    return output.logits, output.hidden


def _device_name() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()}-core CPU" if device.platform == "cpu" else device.device_kind

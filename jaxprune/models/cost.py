"""The costs of a model and of its units: parameters, FLOPs, and bytes in memory, in the cache and on disk.

Costs are additive over units: with one length, every unit of a site costs the same, and what can be pruned costs
`sum(width * cost of one unit)` over the sites. All of it is read from the axis table and the shapes of the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxprune.models import Model
from jaxprune.units import (
    UNITS,
    AnyModel,
    Params,
    axes_of,
    flatten,
    has_units,
    is_kernel,
    sites,
    subtree,
    unit_axes,
    widths,
)
from jaxprune.units import Path as ParameterPath


class Slice(NamedTuple):
    """The part of one parameter that belongs to one unit."""

    path: ParameterPath  # of the parameter
    axes: tuple[str, ...]  # without the unit axes
    shape: tuple[int, ...]  # without the unit axes

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


Length: TypeAlias = float | Sequence[float]  # tokens; of a text-to-text model those it reads and those it writes
COUNTED = ("units", "prunable_parameters", "parameters", "memory", "cache", "flops", "file_bytes")
Measure: TypeAlias = Callable[[Slice], float]  # what one parameter adds to the cost of one unit


def parameters(params: Params) -> int:
    """The number of all parameters, embeddings and task heads included."""
    return sum(math.prod(array.shape) for array in flatten(params).values())


def memory(params: Params) -> int:
    """The bytes of all parameters, in their types."""
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in flatten(params).values())


def prunable_parameters(model: AnyModel, params: Params) -> int:
    """The number of weights and biases with a unit axis: those removed if every unit is."""
    return round(_total(model, params, elements))


def cache(model: AnyModel, params: Params) -> int:
    """The bytes of keys and values that stay in memory for one token while a text is written; 0 where none is.

    A decoder keeps them of all tokens, its prompt's included. A text-to-text model keeps those of a token that it has
    written and, for cross-attention, those of one that it has read: this is the sum of both. A layer with a sliding
    window counts like any other.
    """
    return round(_total(model, params, cache_bytes(model, params)))


def flops(model: AnyModel, params: Params, length: Length) -> float:
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
    return _total(model, params, matmul_flops(model, length))


def usual_length(model: Model) -> Length:
    """Default tokens per example: 128, or as many as the model reads; a text-to-text model generates 4."""
    read = min(128, model.max_length)
    return [read, 4] if len(model.stacks) > 1 else read


def checked_length(model: AnyModel, length: Length) -> Length:
    """The length as it was given.

    Raises:
        ValueError: If it is not what this model needs.
    """
    given = np.size(length)
    if given != len(model.stacks):
        needed = "two numbers, tokens read and tokens written" if len(model.stacks) > 1 else "one number of tokens"
        raise ValueError(f"length must be {needed}, got {length!r}.")
    return length


def unit_costs(model: AnyModel, params: Params, measure: Measure, kinds: Collection[str] = UNITS) -> dict[str, float]:
    """The cost of one unit at every site.

    Args:
        model: The architecture.
        params: Parameters of any widths; a site without units has a cost, too.
        measure: The cost that a parameter adds: `elements`, `weight_bytes(params)`, `cache_bytes(model, params)` or
            `matmul_flops(model, length)`.
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
    """Measures bytes: weights and biases in their types."""
    return lambda part: part.size * np.dtype(subtree(params, part.path).dtype).itemsize


def cache_bytes(model: AnyModel, params: Params) -> Measure:
    """Measures bytes of the cache per token, see `cache`: one element for every output of a key or value kernel."""
    stack = model.stacks[-1]

    def measure(part: Slice) -> float:
        cached = stack.causal and part.path[: len(stack.path)] == stack.path
        if not cached or not is_kernel(part.axes) or part.path[-2] not in ("key", "value"):
            return 0.0
        return part.size // part.shape[part.axes.index("embed")] * np.dtype(subtree(params, part.path).dtype).itemsize

    return measure


def matmul_flops(model: AnyModel, length: Length) -> Measure:
    """Measures FLOPs per example at this many tokens.

    A kernel costs `2 * tokens` per element. Attention multiplies queries with keys and probabilities with values, each
    `2 * queries * keys` per channel. Half of it is booked on either factor (the second product's result is what the
    output kernel reads), so the four kernels of a head add `queries * keys` per channel each; see `Model.products`.

    Raises:
        ValueError: If `length` is not positive, or not the one number or the two that the model needs.
    """
    lengths = tuple(float(tokens) for tokens in np.atleast_1d(np.asarray(checked_length(model, length), np.float64)))
    if not all(math.isfinite(tokens) and tokens > 0 for tokens in lengths):
        raise ValueError(f"length must be a positive number of tokens, got {length}.")

    def measure(part: Slice) -> float:
        if not is_kernel(part.axes):
            return 0.0
        tokens, queries, keys = model.products(part.path, lengths)
        channels = part.size // part.shape[part.axes.index("embed")]  # 1, or a head's
        return 2.0 * tokens * part.size + channels * queries * keys

    return measure


def file_size(path: str | Path) -> int:
    """Bytes of a file, or of the weights (`*.safetensors`, compressed or not, else `*.gguf`) in a folder.

    Raises:
        FileNotFoundError: If there is no such file, or the folder holds no weights.
    """
    path = Path(path)
    files = [*path.glob("*.safetensors"), *path.glob("*.safetensors.zst")] if path.is_dir() else [path]
    if not (files := files or [*path.glob("*.gguf")]):
        raise FileNotFoundError(f"{path} has no *.safetensors file.")
    return sum(file.stat().st_size for file in files)


def costs(model: AnyModel, params: Params, length: Length) -> dict[str, Any]:
    """The costs of a model by count, for examples of so many tokens."""
    return {
        "units": sum(widths(model.axes, params).values()),
        "prunable_parameters": prunable_parameters(model, params),
        "parameters": parameters(params),
        "memory": memory(params),
        **({"cache": cache(model, params)} if model.causal else {}),
        "flops": flops(model, params, length),
        "length": length,
    }


def ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """The fraction that remains of everything that is counted."""
    return {name: after[name] / before[name] for name in COUNTED if before.get(name)}


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Costs before and after, the fractions that remain, and speed-ups by FLOPs and as measured at each batch size."""
    measured = [{"batch": timing["batch"], "speedup": timing["speedup"]} for timing in after.get("latency", ())]
    theoretical = before["flops"] / after["flops"] if after["flops"] else None
    speedup = {"theoretical": theoretical, "measured": measured}
    return {"before": before, "after": after, "kept": ratios(before, after), "speedup": speedup}


def _slices(model: AnyModel, params: Params, kinds: Collection[str]) -> Iterator[tuple[str, Slice]]:
    """Site name and slice, for every parameter that carries a unit axis."""
    for site in sites(model.axes, params, kinds):
        for local, array in flatten(subtree(params, site.module)).items():
            path = (*site.module, *local)
            axes = axes_of(model.axes, path)
            if has_units(axes, site.kind):
                units = unit_axes(axes, site.kind)
                rest = [i for i in range(len(axes)) if i not in units]
                yield site.name, Slice(path, tuple(axes[i] for i in rest), tuple(array.shape[i] for i in rest))


def _total(model: AnyModel, params: Params, measure: Measure) -> float:
    costs = unit_costs(model, params, measure)
    return math.fsum(units * costs[name] for name, units in widths(model.axes, params).items())

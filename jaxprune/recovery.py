"""Closed-form repair of a pruned model: its output maps are fitted to what the dense model does, module by module.

From the bottom up, each module (an attention, a feed-forward network) of the pruned model is given new weights for what
reads its units, and a new bias, so that what it adds to its own residual comes close to the dense model's sum there:
what was lost below is made up for, too. All of it is least squares on sums over tokens: no gradient steps, no labels.

References:
    Kwon et al., A Fast Post-Training Pruning Framework for Transformers, 2022 (rescaled units).
    Park et al., Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models, 2024 (reconstruction).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import cho_factor, cho_solve

from jaxprune.attribution import key_or_default
from jaxprune.batches import encode, pack
from jaxprune.gates import UNITS, Params, Path, axes_of, flatten, reads, unflatten
from jaxprune.likelihood import answered
from jaxprune.models import Layer, Mask, Model, State, block_compiled, enter, mask_of, model_layers, own_mask
from jaxprune.objectives import name_of
from jaxprune.prompts import prompt_of
from jaxprune.tasks import Example, Task, draw, row_key

HELD_OUT = 4  # every fourth row only chooses between candidates
ROUNDING = 1e-6  # of the spread of what is fitted: a smaller gain is none
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of the inputs


class Moments(NamedTuple):
    """Sums over tokens, float64: all that least squares of targets `y [e]` on inputs `a [k]` needs."""

    gram: Float[np.ndarray, "k k"]
    cross: Float[np.ndarray, "k e"]
    inputs: Float[np.ndarray, " k"]
    outputs: Float[np.ndarray, " e"]
    squares: float  # of the targets
    tokens: float

    @classmethod
    def nothing(cls, inputs: int, outputs: int) -> Moments:
        """No token."""
        return cls(
            np.zeros((inputs, inputs)), np.zeros((inputs, outputs)), np.zeros(inputs), np.zeros(outputs), 0.0, 0.0
        )

    def plus(self, sums: Sequence[Any]) -> Moments:
        """With the sums of more tokens."""
        return Moments(*(mine + np.asarray(own, np.float64) for mine, own in zip(self, sums, strict=True)))


class Fit(NamedTuple):
    """A map from a module's inner values to its output."""

    kernel: Float[np.ndarray, "k e"]
    bias: Float[np.ndarray, " e"] | None  # None: the module has none


class Repair(NamedTuple):
    """What was done to one module."""

    module: str  # "3.ffn"
    before: float  # squared error on the rows held out, as a share of the spread of the target
    after: float
    how: str  # what the chosen candidate was called


class Recovery(NamedTuple):
    """How a model was repaired."""

    method: str
    examples: int
    rows: tuple[str, ...]  # their keys: none of them may be tested on
    modules: tuple[Repair, ...]


# (moments of the fitting rows, the weights as they are, the unit of each input) -> candidates by name
Method: TypeAlias = Callable[[Moments, Fit, np.ndarray], Iterable[tuple[str, Fit]]]


def none(moments: Moments, old: Fit, units: np.ndarray) -> Iterable[tuple[str, Fit]]:
    """Nothing is repaired."""
    return ()


def bias(moments: Moments, old: Fit, units: np.ndarray) -> Iterable[tuple[str, Fit]]:
    """The mean of what is missing goes into the bias.

    Raises:
        ValueError: If the module has no bias.
    """
    if old.bias is None:
        raise ValueError(
            "this model has no biases, so nothing can be put into them: recover by rescale or reconstruct."
        )
    yield "bias", Fit(old.kernel, _mean_bias(moments, old.kernel, old.bias))


def rescale(
    moments: Moments, old: Fit, units: np.ndarray, ridges: Sequence[float] = RIDGES
) -> Iterable[tuple[str, Fit]]:
    """Every unit that stays is multiplied by a number: least squares, damped towards 1. A bias is fitted, too."""
    gram, cross = _centred(moments, old)
    if not len(units):
        return
    count = int(units.max()) + 1
    member = (units[:, None] == np.arange(count)[None, :]).astype(np.float64)  # [k, units]
    between = member.T @ (gram * (old.kernel @ old.kernel.T)) @ member
    towards = member.T @ (cross * old.kernel).sum(1)
    for ridge in ridges:
        scales = 1.0 + _solve(between, towards - between.sum(1), ridge)
        kernel = old.kernel * (member @ scales)[:, None]
        yield f"rescale, ridge {ridge:g}", Fit(kernel, _mean_bias(moments, kernel, old.bias))


def reconstruct(
    moments: Moments, old: Fit, units: np.ndarray, ridges: Sequence[float] = RIDGES
) -> Iterable[tuple[str, Fit]]:
    """New weights by ridge regression towards the old ones, with a fitted bias: `min |a W - y|^2 + r |W - W_old|^2`."""
    gram, cross = _centred(moments, old)
    missing = cross - gram @ old.kernel
    for ridge in ridges if len(units) else ():
        kernel = old.kernel + _solve(gram, missing, ridge)
        yield f"reconstruct, ridge {ridge:g}", Fit(kernel, _mean_bias(moments, kernel, old.bias))
    if old.bias is not None:
        yield from bias(moments, old, units)


def recover(
    model: Model,
    params: Params,
    small: Params,
    task: Task,
    *,
    method: Method = reconstruct,
    examples: int | Sequence[Example] = 256,
    key: Array | int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Params, Recovery]:
    """Repairs a pruned model with examples of a task, whose labels are not read.

    Args:
        model: The architecture.
        params: The dense parameters.
        small: The pruned ones, from `compact`.
        task: The task; its calibration rows are drawn from.
        method: How a module is fitted: `bias`, `rescale` or `reconstruct`.
        examples: How many to draw, or the examples themselves.
        key: A seed or a `jax.random.key` for the draw; None is 0.
        batch_size: Examples in a batch.
        max_length: Tokens to which a text is cut; by default 128, or what the model reads if that is less.
        progress: Called with the layers done and all layers.

    Returns:
        The repaired parameters, in the structure of `small`, and what was done.

    Raises:
        ValueError: If there are too few examples, or as `recover_batches`.
    """
    key = jax.random.key(key) if isinstance(key, int) else key_or_default(key)
    rows = tuple(examples) if isinstance(examples, Sequence) else draw(task, examples, key)
    encoded = encode(model, rows, max_length=max_length, prompt=prompt_of(model, task))
    batches = [
        {**batch, "labels": np.full(len(batch["input_ids"]), -1, np.int32)}
        for batch in pack(encoded, batch_size=batch_size)
    ]
    fitted, repairs = recover_batches(model, params, small, batches, method=method, progress=progress)
    return fitted, Recovery(name_of(method), len(rows), tuple(sorted(map(row_key, rows))), repairs)


def recover_batches(
    model: Model,
    params: Params,
    small: Params,
    batches: Sequence[Mapping[str, Any]],
    *,
    method: Method = reconstruct,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Params, tuple[Repair, ...]]:
    """Fits what reads the units of a pruned model to what the dense one does.

    Of the candidates that `method` makes for a module, and the weights as they are, the one with the least error on
    every fourth row is taken, which no candidate has seen: a module never gets worse there. Only tokens count that are
    no padding. Device memory does not grow with the number of batches; hidden states wait on the host.

    Args:
        model: The architecture.
        params: The dense parameters.
        small: The pruned ones, from `compact`.
        batches: Batches as from `make_batches`, of at least four rows. Labels are not read, but by a text-to-text
            model, which reads the answers of the labels, or its own likeliest where they are -1.
        method: How candidates are made: `bias`, `rescale` or `reconstruct`.
        progress: Called with the layers done and all layers.

    Returns:
        The repaired parameters, and what was done to each module.

    Raises:
        ValueError: If there is no batch or one of less than four rows, an activation is not finite, or the method needs
            a bias and there is none.
    """
    if not batches or min(len(batch["input_ids"]) for batch in batches) < HELD_OUT:
        raise ValueError(f"recovery needs batches of at least {HELD_OUT} rows: one of four chooses, the others fit.")
    inputs = [answered(model, params, batch) for batch in batches]
    weights = [jnp.asarray(batch.get("weight", np.ones(len(batch["input_ids"])))) > 0 for batch in batches]
    dense: list[State | None] = [None] * len(inputs)
    current: list[State | None] = [None] * len(inputs)
    flat, repairs = flatten(small), []
    whole = model_layers(model, params)
    for place, big in enumerate(whole):
        readers, targets = _readers(model, big), []
        for i, batch in enumerate(inputs):
            state = enter(model, big, batch, dense[i])
            dense[i], sums = jax.device_get(_sums(model, readers, big.params, state, mask_of(big, batch)))
            targets.append(sums)
        for reader in readers:
            layer = model_layers(model, unflatten(flat))[place]
            *units, outputs = _leaf(layer.params, reader.kernel).shape
            found = [Moments.nothing(math.prod(units), outputs)] * 2
            for i, batch in enumerate(inputs):
                state, mask = enter(model, layer, batch, current[i]), mask_of(layer, batch)
                own = _moments(model, reader, layer.params, state, mask, weights[i], targets[i][reader.module])
                found = [total.plus(one) for total, one in zip(found, own, strict=True)]
            fitted, repair = _fit(f"{layer.name}.{reader.module}", reader, layer.params, *found, method)
            flat |= {(*layer.path, *path): array for path, array in fitted.items()}
            repairs.append(repair)
        layer = model_layers(model, unflatten(flat))[place]
        for i, batch in enumerate(inputs):
            state = enter(model, layer, batch, current[i])
            current[i] = jax.device_get(
                block_compiled(model, layer.params, state, mask_of(layer, batch), {}, {}, None)[0]
            )
        if progress is not None:
            progress(place + 1, len(whole))
    return unflatten(flat), tuple(repairs)


class _Reader(NamedTuple):
    """What reads the units of one module of a layer, by local names."""

    module: str  # "ffn"
    site: str  # "ffn.neurons"
    kernel: Path  # ("ffn", "down", "kernel")


def _readers(model: Model, layer: Layer) -> tuple[_Reader, ...]:
    """The readers of a layer, in the order in which its modules run; the axis table knows them."""
    found = []
    for path in flatten(layer.params):
        axes = axes_of(model.axes, (*layer.path, *path))
        if reads(axes, path):
            module = ".".join(map(str, path[:-2]))
            found.append(_Reader(module, f"{module}.{axes[0]}", path))
    return tuple(sorted(found, key=lambda reader: _ORDER.index(reader.module)))


_ORDER = ("attention", "cross", "ffn")


def _leaf(params: Params, path: Path) -> Any:
    for step in path:
        params = params[step]
    return params


def _bias_of(reader: _Reader) -> Path:
    return (*reader.kernel[:-1], "bias")


@partial(jax.jit, static_argnums=(0, 1))
def _sums(
    model: Model, readers: tuple[_Reader, ...], params: Params, state: State, mask: Mask
) -> tuple[State, dict[str, Float[Array, "b t e"]]]:
    """What the layer returns, and by module its output and what that is added to."""
    after, found = model.block(params, state, mask, kinds=UNITS, residuals=True)
    flat, sums = flatten(params), {}
    for module, site, kernel in readers:
        values, weight = found[site].astype(jnp.float32), flat[kernel].astype(jnp.float32)
        output = jnp.tensordot(values, weight, weight.ndim - 1, precision="highest")
        offset = flat.get((*kernel[:-1], "bias"))
        sums[module] = found[f"{module}.residual"] + output + (0.0 if offset is None else offset)
    return after, sums


@partial(jax.jit, static_argnums=(0, 1))
def _moments(
    model: Model,
    reader: _Reader,
    params: Params,
    state: State,
    mask: Mask,
    weight: Array,
    target: Float[Array, "b t e"],
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The sums of the rows that fit, and of those that choose."""
    found = model.block(params, state, mask, kinds=UNITS, residuals=True)[1]
    values = found[reader.site].astype(jnp.float32)
    values = values.reshape(*target.shape[:2], math.prod(values.shape[2:]))
    missing = target - found[f"{reader.module}.residual"].astype(jnp.float32)
    there = (own_mask(mask).astype(bool) & weight[:, None]).astype(jnp.float32)[..., None]
    rows = np.arange(target.shape[0]) % HELD_OUT == HELD_OUT - 1

    def sums(rows: np.ndarray) -> tuple[Array, ...]:
        a, y, w = (
            array[rows].reshape(rows.size * array.shape[1], array.shape[-1])
            for array in (values * there, missing * there, there)
        )
        product = partial(jnp.matmul, precision="highest")
        return product(a.T, a), product(a.T, y), a.sum(0), y.sum(0), jnp.square(y).sum(), w.sum()

    return sums(np.flatnonzero(~rows)), sums(np.flatnonzero(rows))


def _fit(
    name: str, reader: _Reader, params: Params, fit: Moments, held: Moments, method: Method
) -> tuple[dict[Path, Array], Repair]:
    """The weights of one module, by local path, and what was done to it."""
    if not all(np.isfinite(array).all() for array in (*fit, *held)):
        raise ValueError(f"the activations of {name} are not finite: is the dense model sound in this precision?")
    kernel, offset = _leaf(params, reader.kernel), flatten(params).get(_bias_of(reader))
    inputs = math.prod(kernel.shape[:-1])
    if fit.tokens < inputs:
        warnings.warn(
            f"{name}: {fit.tokens:.0f} tokens for {inputs} inputs: only the ridge makes the fit unique, use more rows.",
            stacklevel=3,
        )
    old = Fit(
        np.asarray(kernel, np.float64).reshape(inputs, kernel.shape[-1]),
        None if offset is None else np.asarray(offset, np.float64),
    )
    units = np.repeat(np.arange(kernel.shape[0]), inputs // max(kernel.shape[0], 1))
    spread = max(
        held.squares - (held.outputs @ held.outputs / max(held.tokens, 1.0) if offset is not None else 0.0), 1e-30
    )
    before = _error(held, old)
    how, best, least = "none", old, before
    for label, own in method(fit, old, units):
        error = _error(held, own)
        if error < least and before - error > ROUNDING * spread:
            how, best, least = label, own, error
    fitted = {reader.kernel: jnp.asarray(best.kernel.reshape(kernel.shape), kernel.dtype)} if best is not old else {}
    if best is not old and best.bias is not None and offset is not None:
        fitted[_bias_of(reader)] = jnp.asarray(best.bias, offset.dtype)
    return fitted, Repair(name, before / spread, least / spread, how)


def _error(moments: Moments, fit: Fit) -> float:
    """The squared error, summed over tokens and outputs."""
    total = (fit.kernel * (moments.gram @ fit.kernel - 2.0 * moments.cross)).sum() + moments.squares
    if fit.bias is not None:
        total += 2.0 * fit.bias @ (fit.kernel.T @ moments.inputs - moments.outputs)
        total += moments.tokens * fit.bias @ fit.bias
    return max(float(total), 0.0)


def _centred(moments: Moments, old: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix and cross products of the deviations from the means; of the values themselves without a bias."""
    if old.bias is None or not moments.tokens:
        return moments.gram, moments.cross
    mean = moments.inputs / moments.tokens
    return moments.gram - np.outer(mean, moments.inputs), moments.cross - np.outer(mean, moments.outputs)


def _mean_bias(moments: Moments, kernel: np.ndarray, old: np.ndarray | None) -> np.ndarray | None:
    """The bias with which the mean error is zero."""
    if old is None or not moments.tokens:
        return old
    return (moments.outputs - moments.inputs @ kernel) / moments.tokens


def _solve(gram: np.ndarray, right: np.ndarray, ridge: float) -> np.ndarray:
    """Solves `(gram + ridge * mean diagonal) x = right`."""
    size = float(np.trace(gram)) / len(gram)
    if size <= 0.0:
        return np.zeros_like(right)
    return cho_solve(cho_factor(gram + ridge * size * np.eye(len(gram)), lower=True), right)

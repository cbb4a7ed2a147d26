"""Closed-form repair of a pruned model: its output maps are fitted to what the dense model does, module by module.

From the bottom up, each module (an attention, a feed-forward network) of the pruned model is given new weights for what
reads its units, and a new bias, so that what it adds to its own residual comes close to the dense model's sum there:
what was lost below is made up for, too. All of it is least squares on sums over tokens: no gradient steps, no labels.

References:
    Kwon et al., A Fast Post-Training Pruning Framework for Transformers, 2022 (rescaled units).
    Park et al., Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models, 2024 (reconstruction).

Least squares for one module, from sums over tokens: new weights for what reads its units, and a new bias.

A method makes candidates from the rows that fit; the rows held out choose between them and the weights as they are.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.data.batches import encode, pack
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Example, Rows, Task, draw, row_key
from jaxprune.evaluation.likelihood import answered
from jaxprune.models import Layer, Mask, Model, State, block_compiled, enter, mask_of, model_layers, own_mask
from jaxprune.scoring.scores import describe
from jaxprune.units import UNITS, Params, Path, axes_of, flatten, reads, unflatten

ROUNDING = 1e-6  # of the spread of what is fitted: a smaller gain is none
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the mean square of the inputs


class Moments(NamedTuple):
    """Sums over tokens, float64: all that least squares of targets `y [e]` on inputs `a [k]` needs."""

    gram: Float[np.ndarray, "k k"]  # of the inputs
    cross: Float[np.ndarray, "k e"]
    targets: Float[np.ndarray, "e e"]  # the gram matrix of the targets
    inputs: Float[np.ndarray, " k"]
    outputs: Float[np.ndarray, " e"]
    tokens: float

    @classmethod
    def nothing(cls, k: int, e: int) -> Moments:
        """No token."""
        return cls(np.zeros((k, k)), np.zeros((k, e)), np.zeros((e, e)), np.zeros(k), np.zeros(e), 0.0)

    def plus(self, sums: Sequence[Any]) -> Moments:
        """With the sums of more tokens."""
        return Moments._make(mine + np.asarray(own, np.float64) for mine, own in zip(self, sums, strict=True))


class Fit(NamedTuple):
    """A map from a module's inner values to its output."""

    kernel: Float[np.ndarray, "k e"]
    bias: Float[np.ndarray, " e"] | None  # None: the module has none


class Method(Protocol):
    """How a module is fitted."""

    by_direction: ClassVar[bool]  # whether each direction of the output may choose a candidate of its own

    @property
    def drift(self) -> bool:
        """Whether the target is the dense sum less the residual as it is now, or just the dense module's output."""
        ...

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> dict[str, Fit]:
        """Candidates by name: of the sums of tokens, the weights as they are, and the unit of each input `[k]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Untouched:
    """Nothing is repaired."""

    drift: bool = True
    by_direction: ClassVar[bool] = False

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> dict[str, Fit]:
        """No candidate."""
        return {}


@dataclass(frozen=True, kw_only=True)
class BiasCompensation:
    """The mean of what is missing goes into the bias."""

    drift: bool = True
    by_direction: ClassVar[bool] = False

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> dict[str, Fit]:
        """Candidates.

        Raises:
            ValueError: If the module has no bias.
        """
        if old.bias is None:
            raise ValueError(
                "this model has no biases, so nothing can be put into them: recover by rescale or reconstruct."
            )
        return {"bias": Fit(old.kernel, _mean_bias(moments, old.kernel, old.bias))}


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """Every unit that stays is multiplied by a number: least squares, damped towards 1. A bias is fitted, too."""

    ridges: tuple[float, ...] = RIDGES
    drift: bool = True
    by_direction: ClassVar[bool] = False

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> dict[str, Fit]:
        """Candidates, one for each ridge."""
        if not len(units):
            return {}
        gram, cross = _centred(moments, old)
        member = (units[:, None] == np.arange(int(units.max()) + 1)[None, :]).astype(np.float64)  # [k, units]
        between = member.T @ (gram * (old.kernel @ old.kernel.T)) @ member
        towards = member.T @ (cross * old.kernel).sum(1)
        found = {}
        for ridge in self.ridges:
            scales = 1.0 + _solve(between, towards - between.sum(1), ridge)
            kernel = old.kernel * (member @ scales)[:, None]
            found[f"ridge {ridge:g}"] = Fit(kernel, _mean_bias(moments, kernel, old.bias))
        return found


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """New weights by ridge regression towards the old ones, with a fitted bias: `min |a W - y|^2 + r |W - W_old|^2`.

    Ridge regression treats each direction of the output by itself, so each may have a ridge of its own: much where
    the rows say little.
    """

    ridges: tuple[float, ...] = RIDGES
    drift: bool = True
    by_direction: ClassVar[bool] = True

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> dict[str, Fit]:
        """Candidates, one for each ridge, and one with nothing but the bias."""
        gram, cross = _centred(moments, old)
        missing, found = cross - gram @ old.kernel, {}
        for ridge in self.ridges if len(units) else ():
            kernel = old.kernel + _solve(gram, missing, ridge)
            found[f"ridge {ridge:g}"] = Fit(kernel, _mean_bias(moments, kernel, old.bias))
        if old.bias is not None:
            found["bias"] = Fit(old.kernel, _mean_bias(moments, old.kernel, old.bias))
        return found


class Choice(NamedTuple):
    """What was fitted to one module."""

    fit: Fit | None  # None: nothing is better than what is there
    before: float  # squared error on the rows held out, as a share of the spread of the target
    after: float  # the same with what was fitted to the other rows
    chosen: Mapping[str, int]  # how many directions of the output each candidate was chosen for


def choose(fit: Moments, held: Moments, old: Fit, units: np.ndarray, method: Method) -> Choice:
    """Fits a module to some rows, and lets the others choose between the candidates and the weights as they are.

    On the rows held out the chosen weights are never worse than the old ones.

    Args:
        fit: The sums of the rows that candidates are made from.
        held: The sums of the rows that choose.
        old: The weights as they are.
        units: The unit of each input, `[k]`.
        method: How candidates are made.

    Returns:
        The weights, made once more from all rows with what was chosen unless that is worse on the rows held out.
    """
    basis = _directions(fit, old) if method.by_direction else None
    if basis is not None:  # least squares is the same in any basis of the output; in this one a direction is a column
        fit, held, old = _turned(fit, basis), _turned(held, basis), _in_basis(old, basis)
    candidates = {"none": old} | method(fit, old, units)
    names = list(candidates)
    errors = np.stack([_errors(held, own) for own in candidates.values()])  # [candidates, outputs]
    if basis is None:
        errors = errors.sum(1, keepdims=True)
    mean = held.outputs if old.bias is not None else np.zeros_like(held.outputs)
    spread = max(float(np.trace(held.targets) - mean @ mean / max(held.tokens, 1.0)), 1e-30)
    bar = np.zeros((len(names), 1))
    bar[0] = ROUNDING * spread / errors.shape[1]
    picked = (errors - bar).argmin(0)
    before, after = float(errors[0].sum()), float(np.take_along_axis(errors, picked[None], 0).sum())
    chosen = Counter(names[i] for i in picked)
    best = None
    if set(chosen) != {"none"}:
        best = _mixed([old, *method(fit.plus(held), old, units).values()], picked)
        if _errors(held, best).sum() > before:
            best = _mixed(list(candidates.values()), picked)
        best = best if basis is None else _in_basis(best, basis.T)
    return Choice(best, before / spread, after / spread, dict(chosen))


def _directions(moments: Moments, old: Fit) -> Float[np.ndarray, "e e"]:
    """The directions of the output in which what is missing does not correlate: the columns."""
    kernel, bias = old.kernel, _mean_bias(moments, old.kernel, old.bias)
    cross = kernel.T @ moments.cross
    missing = moments.targets - cross - cross.T + kernel.T @ (moments.gram @ kernel)
    if bias is not None:
        shift = np.outer(bias, moments.inputs @ kernel - moments.outputs)
        missing += shift + shift.T + moments.tokens * np.outer(bias, bias)
    return np.linalg.eigh(missing)[1]


def _turned(moments: Moments, basis: np.ndarray) -> Moments:
    """The moments of targets in another basis."""
    targets = basis.T @ moments.targets @ basis
    return moments._replace(cross=moments.cross @ basis, targets=targets, outputs=moments.outputs @ basis)


def _in_basis(fit: Fit, basis: np.ndarray) -> Fit:
    return Fit(fit.kernel @ basis, None if fit.bias is None else fit.bias @ basis)


def _errors(moments: Moments, fit: Fit) -> Float[np.ndarray, " e"]:
    """The squared error of every output, summed over tokens."""
    found = np.diag(moments.targets) + (fit.kernel * (moments.gram @ fit.kernel - 2.0 * moments.cross)).sum(0)
    if fit.bias is not None:
        found = found + fit.bias * (2.0 * (moments.inputs @ fit.kernel - moments.outputs) + moments.tokens * fit.bias)
    return np.maximum(found, 0.0)


def _mixed(candidates: Sequence[Fit], picked: np.ndarray) -> Fit:
    """For each output the candidate that was picked for it, or one for all."""
    if len(picked) == 1:
        return candidates[picked[0]]
    columns = np.arange(len(picked))
    kernel = np.stack([own.kernel for own in candidates])[picked, :, columns].T
    biases = [own.bias for own in candidates if own.bias is not None]
    return Fit(kernel, np.stack(biases)[picked, columns] if biases else None)


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
    from scipy.linalg import cho_factor, cho_solve  # slow to import, and most commands fit nothing

    return cho_solve(cho_factor(gram + ridge * size * np.eye(len(gram)), lower=True), right)


EXAMPLES = 256  # to repair with, unless asked otherwise
HELD_OUT = 4  # every fourth row only chooses between candidates


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a pruned model is repaired."""

    method: Method = Reconstruction()  # how a module is fitted
    rows: Rows = Rows(examples=EXAMPLES)  # calibration rows of each task, at most so many as the smallest task has

    def __post_init__(self):
        count = self.rows.examples
        for name, value in (("examples", count), ("batch_size", self.rows.batch_size)):
            if isinstance(value, int) and value < HELD_OUT:
                rule = "one row of four chooses, the others fit"
                raise ValueError(f"recovery needs {name} of at least {HELD_OUT}: {rule}; got {value}.")


class Repair(NamedTuple):
    """The repair of one module."""

    module: str  # "3.ffn"
    before: float  # squared error on the rows held out, as a share of the spread of the target
    after: float  # the same with what was fitted to the other rows
    chosen: Mapping[str, int]  # how many directions of the output each candidate was chosen for


class RecoveryReport(NamedTuple):
    """The repairs of a model, and the rows that they were made with."""

    method: Mapping[str, Any]
    examples: int
    rows: tuple[str, ...]  # their keys: none of them may be tested on
    modules: tuple[Repair, ...]


def recover(
    model: Model,
    params: Params,
    small: Params,
    tasks: Task | Sequence[Task],
    recovery: Recovery = Recovery(),
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Params, RecoveryReport]:
    """Repairs a pruned model with rows of one or several tasks, whose labels are not read.

    Args:
        model: The architecture.
        params: The dense parameters.
        small: The pruned ones, from `compact`.
        tasks: The task, or several; as many rows of each are drawn.
        recovery: How modules are fitted, and to which rows.
        progress: Called with the layers done and all layers.

    Returns:
        The repaired parameters, in the structure of `small`, and a report.

    Raises:
        ValueError: If there is no task, the rows of several tasks are given, or as `recover_batches`.
    """
    several = [tasks] if isinstance(tasks, Task) else list(tasks)
    settings = recovery.rows
    if not several:
        raise ValueError("there is nothing to recover with: name a task, or leave recovery out.")
    if isinstance(settings.examples, tuple) and len(several) != 1:
        raise ValueError(f"examples of {len(several)} tasks cannot be told apart: give how many to draw of each.")
    rows, batches = [], []
    for task, drawn in zip(several, _drawn(several, settings), strict=True):
        rows.extend(drawn)
        encoded = encode(model, drawn, max_length=settings.max_length, prompt=prompt_of(model, task))
        for batch in pack(encoded, batch_size=settings.batch_size):
            batches.append({**batch, "labels": np.full(len(batch["input_ids"]), -1, np.int32)})
    repaired, repairs = recover_batches(model, params, small, batches, method=recovery.method, progress=progress)
    return repaired, RecoveryReport(describe(recovery.method), len(rows), tuple(sorted(map(row_key, rows))), repairs)


def _drawn(tasks: Sequence[Task], rows: Rows) -> list[tuple[Example, ...]]:
    """As many rows of each task."""
    if isinstance(rows.examples, tuple):
        return [rows.examples]
    split = rows.split or "calibration"
    left = [
        replace(task, splits={split: tuple(row for row in task.rows(split) if row_key(row) not in rows.exclude)})
        for task in tasks
    ]
    count = min(EXAMPLES if rows.examples is None else rows.examples, *(len(task.rows(split)) for task in left))
    return [draw(task, count, rows.key, split=split) for task in left]


def recover_batches(
    model: Model,
    params: Params,
    small: Params,
    batches: Sequence[Mapping[str, Any]],
    *,
    method: Method = Reconstruction(),
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
        method: How a module is fitted: `BiasCompensation`, `Rescaling` or `Reconstruction`.
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
    scarce: dict[str, tuple[float, int]] = {}  # modules with fewer tokens than inputs
    dense: list[State | None] = [None] * len(inputs)
    current: list[State | None] = [None] * len(inputs)
    flat, repairs = flatten(small), []
    whole = model_layers(model, params)
    for place, big in enumerate(whole):
        readers, targets = _readers(model, big), []
        for i, batch in enumerate(inputs):
            state = enter(model, big, batch, dense[i])
            found = _targets(model, readers, big.params, state, mask_of(big, batch), method.drift)
            dense[i], sums = jax.device_get(found)
            targets.append(sums)
        for reader in readers:
            layer = model_layers(model, unflatten(flat))[place]
            *units, outputs = _leaf(layer.params, reader.kernel).shape
            found = [Moments.nothing(math.prod(units), outputs)] * 2
            for i, batch in enumerate(inputs):
                state, mask = enter(model, layer, batch, current[i]), mask_of(layer, batch)
                own = _moments(
                    model, reader, layer.params, state, mask, weights[i], targets[i][reader.module], method.drift
                )
                found = [total.plus(one) for total, one in zip(found, own, strict=True)]
            fitted, repair = _fit(f"{layer.name}.{reader.module}", reader, layer.params, *found, method)
            if found[0].tokens < len(found[0].gram):
                scarce[repair.module] = found[0].tokens, len(found[0].gram)
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
    if scarce:
        name, (tokens, width) = next(iter(scarce.items()))
        warnings.warn(
            f"{len(scarce)} modules have more inputs than there are tokens ({name}: {width} and {tokens:.0f}): only "
            "the ridge makes their fit unique; recover with more examples.",
            stacklevel=2,
        )
    return unflatten(flat), tuple(repairs)


def check_method(model: Model, params: Params, method: Method) -> None:
    """Refuses a method that this model cannot be repaired by, before any work is done.

    Raises:
        ValueError: If it needs a bias and there is none.
    """
    for layer in model_layers(model, params):
        flat = flatten(layer.params)
        for _, _, kernel in _readers(model, layer):
            outputs, bias = flat[kernel].shape[-1], (*kernel[:-1], "bias") in flat
            nothing = Fit(np.zeros((0, outputs)), np.zeros(outputs) if bias else None)
            method(Moments.nothing(0, outputs), nothing, np.zeros(0, int))


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


@partial(jax.jit, static_argnums=(0, 1, 5))
def _targets(
    model: Model, readers: tuple[_Reader, ...], params: Params, state: State, mask: Mask, drift: bool
) -> tuple[State, dict[str, Float[Array, "b t e"]]]:
    """What the layer returns, and by module its output, with what it is added to if drift is to be made up for."""
    after, found = model.block(params, state, mask, kinds=UNITS, residuals=True)
    flat, sums = flatten(params), {}
    for module, site, kernel in readers:
        values, weight = found[site].astype(jnp.float32), flat[kernel].astype(jnp.float32)
        output = jnp.tensordot(values, weight, weight.ndim - 1, precision="highest")
        offset = flat.get((*kernel[:-1], "bias"))
        residual = found[f"{module}.residual"].astype(jnp.float32) if drift else 0.0
        sums[module] = residual + output + (0.0 if offset is None else offset)
    return after, sums


@partial(jax.jit, static_argnums=(0, 1, 7))
def _moments(
    model: Model,
    reader: _Reader,
    params: Params,
    state: State,
    mask: Mask,
    weight: Array,
    target: Float[Array, "b t e"],
    drift: bool,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The sums of the rows that fit, and of those that choose."""
    found = model.block(params, state, mask, kinds=UNITS, residuals=True)[1]
    values = found[reader.site].astype(jnp.float32)
    values = values.reshape(*target.shape[:2], math.prod(values.shape[2:]))
    missing = target - (found[f"{reader.module}.residual"].astype(jnp.float32) if drift else 0.0)
    there = (own_mask(mask).astype(bool) & weight[:, None]).astype(jnp.float32)[..., None]
    rows = np.arange(target.shape[0]) % HELD_OUT == HELD_OUT - 1

    def sums(rows: np.ndarray) -> tuple[Array, ...]:
        a, y, w = (
            array[rows].reshape(rows.size * array.shape[1], array.shape[-1])
            for array in (values * there, missing * there, there)
        )
        product = partial(jnp.matmul, precision="highest")
        return product(a.T, a), product(a.T, y), product(y.T, y), a.sum(0), y.sum(0), w.sum()

    return sums(np.flatnonzero(~rows)), sums(np.flatnonzero(rows))


def _fit(
    name: str, reader: _Reader, params: Params, fit: Moments, held: Moments, method: Method
) -> tuple[dict[Path, Array], Repair]:
    """The weights of one module, by local path, and what was done to it."""
    if not all(np.isfinite(array).all() for array in (*fit, *held)):
        raise ValueError(f"the activations of {name} are not finite: is the dense model sound in this precision?")
    kernel, place = _leaf(params, reader.kernel), (*reader.kernel[:-1], "bias")
    offset = flatten(params).get(place)
    inputs = math.prod(kernel.shape[:-1])
    old = Fit(
        np.asarray(kernel, np.float64).reshape(inputs, kernel.shape[-1]),
        None if offset is None else np.asarray(offset, np.float64),
    )
    units = np.repeat(np.arange(kernel.shape[0]), inputs // max(kernel.shape[0], 1))
    best, before, after, chosen = choose(fit, held, old, units, method)
    repair = Repair(name, before, after, chosen)
    if best is None:
        return {}, repair
    fitted = {reader.kernel: jnp.asarray(best.kernel.reshape(kernel.shape), kernel.dtype)}
    if best.bias is not None and offset is not None:
        fitted[place] = jnp.asarray(best.bias, offset.dtype)
    return fitted, repair

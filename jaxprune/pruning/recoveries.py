"""Closed-form repair of a pruned model: the output maps of its modules are fitted to what the dense model does.

From the bottom up, each module (an attention, a feed-forward network) of the pruned model is given new weights for what
reads its units, and a new bias, so that what it adds to its residual comes close to the dense model's sum there: what
was lost below is made up for, too. All of it is least squares on sums over tokens: no gradient steps, no labels. A
method makes candidates from the rows that fit; the rows held out choose between them and the weights as they are.

References:
    Kwon et al., A Fast Post-Training Pruning Framework for Transformers, 2022 (rescaled units).
    Park et al., Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models, 2024 (reconstruction).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.compaction import fewer_shapes
from jaxprune.data.batches import pack, usable_rows
from jaxprune.data.tasks import Rows, Task, draw, row_key
from jaxprune.evaluation.text import answered
from jaxprune.models import (
    BlockSettings,
    Layer,
    Mask,
    Model,
    State,
    advance,
    enter,
    layer_entries,
    mask_of,
    model_layers,
)
from jaxprune.scoring.scores import describe
from jaxprune.units import UNITS, UNREAD, Params, Path, fill, flatten, subtree, unflatten
from jaxprune.units import readers as readers_of

ROUNDING = 1e-6  # of the spread of what is fitted: a smaller gain is none


RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the mean square of the inputs


EVERY = slice(None)  # output


class Moments(NamedTuple):
    """Sums over tokens: all that least squares of targets `y [e]` on inputs `a [k]` needs."""

    gram: Float[np.ndarray, "k k"]  # of the inputs
    cross: Float[np.ndarray, "k e"]
    targets: Float[np.ndarray, "e e"]  # the gram matrix of the targets
    inputs: Float[np.ndarray, " k"]
    outputs: Float[np.ndarray, " e"]
    tokens: float

    @classmethod
    def zeros(cls, k: int, e: int) -> Moments:
        """The sums over no token, float32."""
        shapes = (k, k), (k, e), (e, e), (k,), (e,), ()
        return cls._make(np.zeros(shape, np.float32) for shape in shapes)

    def plus(self, more: Moments) -> Moments:
        """The sums over both."""
        return Moments._make(a + b for a, b in zip(self, more, strict=True))

    def of_inputs(self, places: np.ndarray) -> Moments:
        """The sums of some inputs alone, float64."""
        gram, cross, targets, inputs, outputs, tokens = (np.asarray(sums, np.float64) for sums in self)
        return Moments(gram[np.ix_(places, places)], cross[places], targets, inputs[places], outputs, float(tokens))


class Fit(NamedTuple):
    """A map from a module's inner values to its output."""

    kernel: Float[np.ndarray, "k e"]
    bias: Float[np.ndarray, " e"] | None  # None: the module has none


Candidate: TypeAlias = Callable[[Any], Fit]  # an index of outputs -> the fit for these


class Method(Protocol):
    """A way to fit a module."""

    by_direction: ClassVar[bool]  # whether each direction of the output may choose a different candidate

    @property
    def drift(self) -> bool:
        """Whether the target is the dense sum less the residual as it is now, or just the dense module's output."""
        ...

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> Mapping[str, Candidate]:
        """Candidates by name, from the sums over tokens, the weights as they are, and the unit of each input `[k]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class BiasCompensation:
    """Puts the mean of what is missing into the bias."""

    drift: bool = True
    by_direction: ClassVar[bool] = False

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> Mapping[str, Candidate]:
        """The one candidate.

        Raises:
            ValueError: If the module has no bias.
        """
        if old.bias is None:
            raise ValueError(
                "this model has no biases, so nothing can be put into them: recover by rescale or reconstruct."
            )
        return {"bias": partial(_fitted, moments, old)}


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """Multiplies every unit that stays by a number: least squares, damped towards 1. A bias is fitted, too."""

    ridges: tuple[float, ...] = RIDGES
    drift: bool = True
    by_direction: ClassVar[bool] = False

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> Mapping[str, Candidate]:
        """Candidates, one for each ridge."""
        if not len(units):
            return {}
        gram, cross = _centred(moments, old)
        member = (units[:, None] == np.arange(int(units.max()) + 1)[None, :]).astype(np.float64)  # [k, units]
        between = member.T @ (gram * (old.kernel @ old.kernel.T)) @ member
        towards = member.T @ (cross * old.kernel).sum(1)
        change = _ridge_path(between, (towards - between.sum(1))[:, None])

        def rescaled(ridge: float, outputs: Any) -> Fit:
            return _fitted(moments, old, outputs, old.kernel[:, outputs] * (member @ change(ridge, EVERY)))

        return {f"ridge {ridge:g}": partial(rescaled, ridge) for ridge in self.ridges}


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """New weights by ridge regression towards the old ones, with a fitted bias: `min |a W - y|^2 + r |W - W_old|^2`.

    Ridge regression treats each direction of the output by itself, so each may have a ridge of its own: much where
    the rows say little.
    """

    ridges: tuple[float, ...] = RIDGES
    drift: bool = True
    by_direction: ClassVar[bool] = True

    def __call__(self, moments: Moments, old: Fit, units: np.ndarray) -> Mapping[str, Candidate]:
        """Candidates, one for each ridge, and one with nothing but the bias."""
        candidates: dict[str, Candidate] = {}
        if len(units):
            gram, cross = _centred(moments, old)
            change = _ridge_path(gram, cross - gram @ old.kernel)

            def reconstructed(ridge: float, outputs: Any) -> Fit:
                return _fitted(moments, old, outputs, change(ridge, outputs))

            candidates = {f"ridge {ridge:g}": partial(reconstructed, ridge) for ridge in self.ridges}
        return candidates if old.bias is None else candidates | {"bias": partial(_fitted, moments, old)}


def _ridge_path(gram: np.ndarray, right: np.ndarray) -> Callable[[float, Any], np.ndarray]:
    """Solves `(gram + ridge * mean diagonal) x = right[:, columns]` for any ridge, by one eigendecomposition."""
    size = float(np.trace(gram)) / len(gram)
    if size <= 0.0:
        return lambda ridge, columns: np.zeros_like(right[:, columns])
    values, vectors = np.linalg.eigh(gram)
    turned = vectors.T @ right
    least = len(gram) * np.finfo(np.float64).eps * values[-1]  # what is smaller is rounding: no change along it

    def solve(ridge: float, columns: Any) -> np.ndarray:
        damped = values + ridge * size
        inverse = np.divide(1.0, damped, out=np.zeros_like(damped), where=damped > least)
        return vectors @ (inverse[:, None] * turned[:, columns])

    return solve


def _centred(moments: Moments, old: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix and cross products of the deviations from the means; of the values themselves without a bias."""
    if old.bias is None or not moments.tokens:
        return moments.gram, moments.cross
    mean = moments.inputs / moments.tokens
    return moments.gram - np.outer(mean, moments.inputs), moments.cross - np.outer(mean, moments.outputs)


def _fitted(moments: Moments, old: Fit, outputs: Any, change: np.ndarray | float = 0.0) -> Fit:
    """Some outputs of a kernel that is changed, with the bias that makes their mean error zero."""
    kernel = old.kernel[:, outputs] + change
    if old.bias is None or not moments.tokens:
        return Fit(kernel, None if old.bias is None else old.bias[outputs])
    return Fit(kernel, (moments.outputs[outputs] - moments.inputs @ kernel) / moments.tokens)


class Choice(NamedTuple):
    """The fit of one module."""

    fit: Fit | None  # None: nothing is better than what is there
    before: float  # squared error on the rows held out, as a share of the spread of the target
    after: float  # the same with what was fitted to the other rows
    chosen: Mapping[str, int]  # how many directions of the output each candidate was chosen for


def fit_module(fit: Moments, held: Moments, old: Fit, units: np.ndarray, method: Method) -> Choice:
    """Fits a module to some rows, and lets the others choose between the candidates and the weights as they are.

    On the rows held out the chosen weights are never worse than the old ones.

    Args:
        fit: The sums over the rows that candidates are made from.
        held: The sums over the rows that choose.
        old: The weights as they are.
        units: The unit of each input, `[k]`.
        method: How candidates are made.

    Returns:
        The weights, made once more from all rows with what was chosen unless that is worse on the rows held out.
    """
    basis = _directions(fit, old) if method.by_direction else None
    if basis is not None:  # least squares is the same in any basis of the output; in this one a direction is a column
        fit, held, old = _turned(fit, basis), _turned(held, basis), _in_basis(old, basis)
    candidates = {"none": lambda outputs: old, **method(fit, old, units)}
    errors = np.stack([_errors(held, candidate(EVERY)) for candidate in candidates.values()])  # [candidates, outputs]
    if basis is None:
        errors = errors.sum(1, keepdims=True)
    mean = held.outputs if old.bias is not None else np.zeros_like(held.outputs)
    spread = max(float(np.trace(held.targets) - mean @ mean / max(held.tokens, 1.0)), 1e-30)
    bar = np.zeros((len(errors), 1))
    bar[0] = ROUNDING * spread / errors.shape[1]
    lowest = (errors - bar).argmin(0)
    before, after = float(errors[0].sum()), float(np.take_along_axis(errors, lowest[None], 0).sum())
    picked = [[*candidates][i] for i in lowest]
    best = None
    if set(picked) != {"none"}:
        best = _mixed(old, method(fit.plus(held), old, units), picked)
        if _errors(held, best).sum() > before:
            best = _mixed(old, candidates, picked)
        best = best if basis is None else _in_basis(best, basis.T)
    return Choice(best, before / spread, after / spread, dict(Counter(picked)))


def _directions(moments: Moments, old: Fit) -> Float[np.ndarray, "e e"]:
    """The directions of the output in which what is missing does not correlate: the columns."""
    kernel, bias = _fitted(moments, old, EVERY)
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
    errors = np.diag(moments.targets) + (fit.kernel * (moments.gram @ fit.kernel - 2.0 * moments.cross)).sum(0)
    if fit.bias is not None:
        errors = errors + fit.bias * (2.0 * (moments.inputs @ fit.kernel - moments.outputs) + moments.tokens * fit.bias)
    return np.maximum(errors, 0.0)


def _mixed(old: Fit, candidates: Mapping[str, Candidate], picked: Sequence[str]) -> Fit:
    """For each output the candidate that was picked for it, or one for all."""
    if len(picked) == 1:
        return candidates[picked[0]](EVERY)
    kernel, bias = old.kernel.copy(), None if old.bias is None else old.bias.copy()
    for name in {*picked} - {"none"}:
        outputs = np.flatnonzero(np.array(picked) == name)
        part = candidates[name](outputs)
        kernel[:, outputs] = part.kernel
        if bias is not None and part.bias is not None:
            bias[outputs] = part.bias
    return Fit(kernel, bias)


EXAMPLES = 256  # to repair with, unless asked otherwise


FITS = 4  # of every module that are kept, at most


HELD_OUT = 4  # every fourth row only chooses between candidates


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The settings of a repair of a pruned model; see `recover`."""

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
    cut_off: int  # rows of span tasks that were left out, because their answers are cut off
    truncated: int = 0  # examples whose texts were cut


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
    split, usable = settings.split or "calibration", [usable_rows(model, task, settings) for task in several]
    rows, batches, truncated = [], [], 0
    for task, _, encode in usable:
        drawn = settings.examples
        if not isinstance(drawn, tuple):
            count = min(EXAMPLES if drawn is None else drawn, *(len(other.task.rows(split)) for other in usable))
            drawn = draw(task, count, settings.random, split=split)
        rows.extend(drawn)
        encoded = encode(drawn)
        truncated += encoded.truncated
        for batch in pack(encoded, batch_size=settings.batch_size):
            batches.append({**batch, "labels": np.full(len(batch["input_ids"]), -1, np.int32)})
    repaired, repairs = recover_batches(model, params, small, batches, method=recovery.method, progress=progress)
    keys, cut_off = tuple(sorted(map(row_key, rows))), sum(each.cut_off for each in usable)
    return repaired, RecoveryReport(describe(recovery.method), len(rows), keys, repairs, cut_off, truncated)


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
    wide = flatten(fewer_shapes(model, params, small))
    layers = model_layers(model, params)
    for place, whole in enumerate(layers):
        readers, targets = _readers(model, whole), []
        for i, batch in enumerate(inputs):
            state, mask = enter(model, whole, batch, dense[i]), mask_of(whole, batch)
            outputs = _targets(model, whole.kind, readers, whole.params, state, mask, method.drift)
            dense[i], sums = jax.device_get(outputs)
            targets.append(sums)
        for reader in readers:
            layer = model_layers(model, unflatten(wide))[place]
            *units, outputs = subtree(layer.params, reader.kernel).shape
            sums = (Moments.zeros(math.prod(units), outputs),) * 2  # over the rows that fit, and those that choose
            for i, batch in enumerate(inputs):
                state, mask = enter(model, layer, batch, current[i]), mask_of(layer, batch)
                rows = _Rows(state, mask, weights[i], targets[i][reader.module])
                sums = _moments(model, layer.kind, reader, method.drift, layer.params, rows, sums)
            own = subtree(unflatten(flat), layer.path)
            real = np.flatnonzero(fill(np.ones(subtree(own, reader.kernel).shape[:-1], bool), tuple(units)))
            fit, held = (total.of_inputs(real) for total in sums)
            arrays, repair = _repair(f"{layer.name}.{reader.module}", reader, own, fit, held, method)
            if fit.tokens < len(real):
                scarce[repair.module] = fit.tokens, len(real)
            for path, array in arrays.items():
                whole_path = (*layer.path, *path)
                flat[whole_path], wide[whole_path] = array, jax.device_put(fill(array, wide[whole_path].shape))
            repairs.append(repair)
        layer = model_layers(model, unflatten(wide))[place]
        for i, batch in enumerate(inputs):
            current[i] = jax.device_get(advance(model, [layer], batch, current[i]))
        if progress is not None:
            progress(place + 1, len(layers))
    if scarce:
        name, (tokens, width) = next(iter(scarce.items()))
        warnings.warn(
            f"{len(scarce)} modules have more inputs than there are tokens ({name}: {width} and {tokens:.0f}): only "
            "the ridge makes their fit unique; recover with more examples.",
            stacklevel=2,
        )
    return unflatten(flat), tuple(repairs)


class DenseModules:
    """What every module of a dense model reads and gives, summed over tokens: what its narrower ones are fitted to.

    A module at some width is the dense one with the kernel that reads its units fitted to the dense output, by one
    ridge: about what a reconstruction will make of it, without the drift from the modules below.
    """

    def __init__(self, model: Model, ridge: float):
        self.model, self.ridge = model, ridge
        self.sums: dict[str, dict[str, tuple[Array, Array, Array]]] = {}  # by layer and module
        self.moments: dict[tuple[str, str], Moments] = {}  # of all inputs, by layer and module
        self.fits: OrderedDict[Any, dict[Path, Array]] = OrderedDict()  # those used last

    def add(self, layer: Layer, state: State, mask: Mask, real: Any) -> State:
        """Adds the tokens of one batch, in one layer whose input is `state`; returns its output."""
        readers = _readers(self.model, layer)
        sums = self.sums.get(layer.name) or {
            reader.module: tuple(np.zeros(shape, np.float32) for shape in ((rows, rows), (rows,), ()))
            for reader in readers
            for rows in [math.prod(subtree(layer.params, reader.kernel).shape[:-1])]
        }
        after, self.sums[layer.name] = _inner(
            self.model, layer.kind, readers, layer.params, state, mask, jnp.asarray(real), sums
        )
        return after

    def layer(self, layer: Layer, gates: Mapping[str, Any]) -> Layer:
        """A layer whose modules with closed units are fitted to the dense ones."""
        changed, local = {}, layer_entries(gates, layer.name)
        for reader in _readers(self.model, layer):
            inputs, opened = math.prod(subtree(layer.params, reader.kernel).shape[:-1]), np.ones((), bool)
            for name, gate in local.items():
                module, _, kind = name.rpartition(".")
                if module == reader.module and kind not in UNREAD:
                    opened = opened & np.repeat(np.asarray(gate) > 0, inputs // len(gate))
            if not opened.all():
                changed |= self._fit(layer, reader, opened)
        return layer._replace(params=unflatten(flatten(layer.params) | changed)) if changed else layer

    def _fit(self, layer: Layer, reader: _Reader, opened: np.ndarray) -> dict[Path, Array]:
        """The kernel of a module, with rows of zero for what is closed, and the bias behind it, by local path."""
        key = layer.name, reader.module, opened.tobytes()
        if key not in self.fits:
            path = (*reader.kernel[:-1], "bias")
            kernel, bias = subtree(layer.params, reader.kernel), flatten(layer.params).get(path)
            added = None if bias is None else np.asarray(bias, np.float64)
            whole = np.asarray(kernel, np.float64).reshape(opened.size, -1)
            kept, rows = np.flatnonzero(opened), np.zeros(whole.shape)
            old, moments = Fit(whole[kept], added), self._moments(layer, reader, whole, added).of_inputs(kept)
            gram, cross = _centred(moments, old)
            change: np.ndarray | float = 0.0  # nothing is left but the bias, or nothing is read
            if len(kept) and np.trace(gram) > 0:
                damped = gram + self.ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
                change = np.linalg.solve(damped, cross - gram @ old.kernel)
            fit = _fitted(moments, old, EVERY, change)
            rows[kept] = fit.kernel
            fitted = {reader.kernel: jax.device_put(rows.reshape(kernel.shape).astype(kernel.dtype))}
            if bias is not None and fit.bias is not None:
                fitted[path] = jax.device_put(fit.bias.astype(bias.dtype))
            self.fits[key] = fitted
            while len(self.fits) > FITS * sum(map(len, self.sums.values())):
                self.fits.popitem(last=False)
        self.fits.move_to_end(key)
        return self.fits[key]

    def _moments(self, layer: Layer, reader: _Reader, kernel: np.ndarray, bias: np.ndarray | None) -> Moments:
        """Those of the module's inputs and of the dense output, without its Gram matrix."""
        key = layer.name, reader.module
        if key not in self.moments:
            gram, inputs, tokens = map(np.asarray, self.sums[layer.name][reader.module])
            cross, outputs = gram @ kernel, inputs @ kernel  # float64, as the kernel
            if bias is not None:
                cross, outputs = cross + np.outer(inputs, bias), outputs + tokens * bias
            every = gram, cross.astype(np.float32), np.zeros((0, 0)), inputs, outputs, tokens
            self.moments[key] = Moments._make(every)
        return self.moments[key]


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=7)
def _inner(
    model: Model,
    kind: str,
    readers: tuple[_Reader, ...],
    params: Params,
    state: State,
    mask: Mask,
    real: Array,
    before: dict[str, tuple[Array, ...]],
) -> tuple[State, dict[str, tuple[Array, ...]]]:
    """The state after the layer; of every module the Gram matrix of its inner values, their sums and the tokens."""
    after, values_of = model.block(params, state, mask, settings=BlockSettings(kind=kind, returns=UNITS))
    tokens = (mask.tokens.astype(bool) & real[:, None]).astype(jnp.float32).reshape(-1, 1)
    sums = {}
    for reader in readers:
        a = values_of[reader.site].astype(jnp.float32).reshape(len(tokens), -1) * tokens
        more = jnp.matmul(a.T, a, precision="highest"), a.sum(0), tokens.sum()
        sums[reader.module] = tuple(x + y for x, y in zip(before[reader.module], more, strict=True))
    return after, sums


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
            method(Moments.zeros(0, outputs), nothing, np.zeros(0, int))


class _Reader(NamedTuple):
    """The kernel that reads the units of one module of a layer, by local names."""

    module: str  # "ffn"
    site: str  # "ffn.neurons"
    kernel: Path  # ("ffn", "down", "kernel")


def _readers(model: Model, layer: Layer) -> tuple[_Reader, ...]:
    """The readers of a layer, in the order in which its modules run: that of the axis table."""
    whole = unflatten({(*layer.path, *path): array for path, array in flatten(layer.params).items()})
    kernels = layer_entries(readers_of(model.axes, whole), layer.name)
    return tuple(_Reader(site.rpartition(".")[0], site, path[len(layer.path) :]) for site, path in kernels.items())


_RETURNS = (*UNITS, "residual")  # of a block


@partial(jax.jit, static_argnums=(0, 1, 2, 6))
def _targets(
    model: Model, kind: str, readers: tuple[_Reader, ...], params: Params, state: State, mask: Mask, drift: bool
) -> tuple[State, dict[str, Float[Array, "b t e"]]]:
    """The state after the layer, and by module its output, with what it is added to if drift is to be made up for."""
    after, values_of = model.block(params, state, mask, settings=BlockSettings(kind=kind, returns=_RETURNS))
    flat, sums = flatten(params), {}
    for module, site, kernel in readers:
        values, weight = values_of[site].astype(jnp.float32), flat[kernel].astype(jnp.float32)
        output = jnp.tensordot(values, weight, weight.ndim - 1, precision="highest")
        offset = flat.get((*kernel[:-1], "bias"))
        residual = values_of[f"{module}.residual"].astype(jnp.float32) if drift else 0.0
        sums[module] = residual + output + (0.0 if offset is None else offset)
    return after, sums


class _Rows(NamedTuple):
    """What one batch is fitted to."""

    state: State  # before the layer
    mask: Mask
    real: Array  # [b] whether a row is an example
    targets: Float[Array, "b t e"]


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6)
def _moments(
    model: Model,
    kind: str,
    reader: _Reader,
    drift: bool,
    params: Params,
    batch: _Rows,
    before: tuple[Moments, ...],
) -> tuple[Moments, ...]:
    """The sums over the rows that fit, and over those that choose, with those of the batches before."""
    state, mask, real, target = batch
    values_of = model.block(params, state, mask, settings=BlockSettings(kind=kind, returns=_RETURNS))[1]
    values = values_of[reader.site].astype(jnp.float32)
    values = values.reshape(*target.shape[:2], math.prod(values.shape[2:]))
    missing = target - (values_of[f"{reader.module}.residual"].astype(jnp.float32) if drift else 0.0)
    tokens = (mask.tokens.astype(bool) & real[:, None]).astype(jnp.float32)[..., None]
    rows = np.arange(target.shape[0]) % HELD_OUT == HELD_OUT - 1

    def sums(rows: np.ndarray) -> Moments:
        a, y, w = (
            array[rows].reshape(rows.size * array.shape[1], array.shape[-1])
            for array in (values * tokens, missing * tokens, tokens)
        )
        product = partial(jnp.matmul, precision="highest")
        return Moments._make((product(a.T, a), product(a.T, y), product(y.T, y), a.sum(0), y.sum(0), w.sum()))

    parts = sums(np.flatnonzero(~rows)), sums(np.flatnonzero(rows))
    return tuple(total.plus(part) for total, part in zip(before, parts, strict=True))


def _repair(
    name: str, reader: _Reader, params: Params, fit: Moments, held: Moments, method: Method
) -> tuple[dict[Path, Array], Repair]:
    """The new weights of one module, by local path, and a report of them."""
    if not all(np.isfinite(array).all() for array in (*fit, *held)):
        raise ValueError(f"the activations of {name} are not finite: is the dense model sound in this precision?")
    kernel, bias_path = subtree(params, reader.kernel), (*reader.kernel[:-1], "bias")
    bias = flatten(params).get(bias_path)
    inputs = math.prod(kernel.shape[:-1])
    old = Fit(
        np.asarray(kernel, np.float64).reshape(inputs, kernel.shape[-1]),
        None if bias is None else np.asarray(bias, np.float64),
    )
    units = np.repeat(np.arange(kernel.shape[0]), inputs // max(kernel.shape[0], 1))
    best, before, after, chosen = fit_module(fit, held, old, units, method)
    arrays = {}
    if best is not None:
        arrays[reader.kernel] = jax.device_put(best.kernel.reshape(kernel.shape).astype(kernel.dtype))
        if bias is not None and best.bias is not None:
            arrays[bias_path] = jax.device_put(best.bias.astype(bias.dtype))
    return arrays, Repair(name, before, after, chosen)


def recovery_record(report: RecoveryReport) -> dict[str, Any]:
    """A recovery as records hold it."""
    modules = {it.module: {"before": it.before, "after": it.after, "chosen": it.chosen} for it in report.modules}
    left_out = {"cut_off": report.cut_off} if report.cut_off else {}
    return {"method": report.method, "examples": report.examples, **left_out, "modules": modules}

"""The ways to fit one module of a pruned model to the dense one, by least squares on sums over tokens.

References:
    Kwon et al., A Fast Post-Training Pruning Framework for Transformers, 2022 (rescaled units).
    Park et al., Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models, 2024 (reconstruction).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float

ROUNDING = 1e-6  # of the spread of what is fitted: a smaller gain is none


RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the mean square of the inputs


EVERY = slice(None)  # output


class Moments(NamedTuple):
    """Sums over tokens, float64: all that least squares of targets `y [e]` on inputs `a [k]` needs."""

    gram: Float[np.ndarray, "k k"]  # of the inputs
    cross: Float[np.ndarray, "k e"]
    targets: Float[np.ndarray, "e e"]  # the gram matrix of the targets
    inputs: Float[np.ndarray, " k"]
    outputs: Float[np.ndarray, " e"]
    tokens: float

    @classmethod
    def zeros(cls, k: int, e: int) -> Moments:
        """The sums over no token."""
        return cls(np.zeros((k, k)), np.zeros((k, e)), np.zeros((e, e)), np.zeros(k), np.zeros(e), 0.0)

    def plus(self, more: Sequence[Any]) -> Moments:
        """The sums with those over more tokens."""
        return Moments._make(a + np.asarray(b, np.float64) for a, b in zip(self, more, strict=True))


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

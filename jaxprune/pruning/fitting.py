"""Least squares for one module, from sums over tokens: new weights for what reads its units, and a new bias.

A method makes candidates from the rows that fit; the rows held out choose between them and the weights as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

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

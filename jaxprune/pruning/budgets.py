"""Budgets, how much of a model may stay, and the rules by which the units within a budget are chosen."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np

from jaxprune.models import Model
from jaxprune.models.cost import Length, cache_bytes, elements, matmul_flops, unit_costs, weight_bytes
from jaxprune.pruning.latency import LatencyTable, check_table, kept_table, measure_latency_table, whole_tokens
from jaxprune.units import KINDS, AnyModel, Params, widths

SLACK = 1e-9  # of the total cost: 0.29 * 100 is 28.999999999999996 in binary and means 29

Normalise: TypeAlias = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Budget(ABC):
    """The cost that may remain: a fraction, in (0, 1], of the model's cost, or an amount in bytes or seconds."""

    fraction: float | None = None
    length: Length | None = field(default=None, kw_only=True)  # tokens per example; None: the mean of those scored

    counted: ClassVar[str]  # "flops"
    unit: ClassVar[str | None] = None  # the field that holds an amount instead of a fraction

    def __post_init__(self):
        given = {name: value for name, value in self._amounts().items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self._amounts())}; got {', '.join(given) or 'none'}.")
        ((name, value),) = given.items()
        rule = "in (0, 1]" if self.is_fraction else "above 0"
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{name} must be a number {rule}, got {value!r}.")
        if not 0 < value < math.inf or (self.is_fraction and value > 1):
            raise ValueError(f"{name} must lie {rule}, got {value}.")

    def _amounts(self) -> dict[str, float | None]:
        amounts = {self.counted: self.fraction}
        return amounts if self.unit is None else amounts | {f"{self.counted}_{self.unit}": getattr(self, self.unit)}

    @property
    def is_fraction(self) -> bool:
        """True if it is a fraction of the whole model's cost."""
        return self.fraction is not None

    @property
    def name(self) -> str:
        """Its name in records, such as `flops` or `memory_bytes`."""
        return self.counted if self.is_fraction else f"{self.counted}_{self.unit}"

    @property
    def amount(self) -> float:
        """The fraction, or the bytes or seconds."""
        return next(float(value) for value in self._amounts().values() if value is not None)

    def at(self, amount: float) -> Self:
        """The same budget with another amount."""
        return replace(self, **{"fraction" if self.is_fraction else str(self.unit): amount})

    def with_length(self, length: Length | None) -> Self:
        """The same budget for examples of this mean length, unless it names one."""
        return replace(self, length=length) if self.length is None else self

    def limit(self, total: float) -> float:
        """The cost that may remain, in the unit of `total`, which is the whole."""
        return (self.amount * total if self.is_fraction else self.amount) + SLACK * total

    @abstractmethod
    def unit_costs(self, model: AnyModel, params: Params) -> dict[str, float]:
        """The cost of one unit at every site, of all kinds."""

    def settings(self) -> dict[str, Any]:
        """Its amount by its name in records, and the length."""
        return {self.name: self.amount, "length": self.length}


@dataclass(frozen=True)
class Units(Budget):
    """A fraction of the heads and neurons (or channels) may stay."""

    counted = "units"

    def unit_costs(self, model: AnyModel, params: Params) -> dict[str, float]:
        """One."""
        return dict.fromkeys(widths(model.axes, params, KINDS), 1.0)


@dataclass(frozen=True)
class Parameters(Budget):
    """A fraction of the prunable parameters, weights and biases of units, may stay."""

    counted = "parameters"

    def unit_costs(self, model: AnyModel, params: Params) -> dict[str, float]:
        """Weights and biases."""
        return unit_costs(model, params, elements, KINDS)


@dataclass(frozen=True)
class Flops(Budget):
    """A fraction of the FLOPs per example may stay; see `jaxprune.models.cost.flops`."""

    counted = "flops"

    def unit_costs(self, model: AnyModel, params: Params) -> dict[str, float]:
        """FLOPs per example."""
        if self.length is None:
            raise ValueError(
                "a FLOPs budget needs length=, tokens per example: these scores do not say their mean length."
            )
        return unit_costs(model, params, matmul_flops(model, self.length), KINDS)


@dataclass(frozen=True)
class Memory(Budget):
    """A fraction of the bytes of all parameters, embeddings included, may stay, or so many bytes."""

    bytes: float | None = field(default=None, kw_only=True)

    counted = "memory"
    unit = "bytes"

    def unit_costs(self, model: AnyModel, params: Params) -> dict[str, float]:
        """Bytes."""
        return unit_costs(model, params, weight_bytes(params), KINDS)


@dataclass(frozen=True)
class Cache(Budget):
    """A fraction of the bytes that generation keeps for one token may stay; see `jaxprune.models.cost.cache`.

    Only units with keys and values cost any: all others stay.
    """

    counted = "cache"

    def unit_costs(self, model: AnyModel, params: Params) -> dict[str, float]:
        """Bytes per token."""
        if not model.causal:
            raise ValueError(
                "the model writes no text, so it keeps no cache: give a budget of flops, parameters, units, memory or "
                "latency."
            )
        return unit_costs(model, params, cache_bytes(model, params), KINDS)


@dataclass(frozen=True)
class Latency(Budget):
    """A fraction of the time of a forward pass may stay, or so many seconds, as a table predicts."""

    seconds: float | None = field(default=None, kw_only=True)
    table: LatencyTable | None = field(default=None, kw_only=True)  # of the dense model; None: `prune` measures one
    batch: int | None = field(default=None, kw_only=True)  # examples per pass; None: those of the table, or 1
    folder: Path | None = field(default=None, kw_only=True)  # where measured tables are kept, and found again

    counted = "latency"
    unit = "seconds"

    def __post_init__(self):
        super().__post_init__()
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"the batch of a latency budget must be at least 1, got {self.batch}.")

    def with_length(self, length: Length | None) -> Self:
        """The same budget for examples of this mean length, unless it or its table names one."""
        return super().with_length(self.table.conditions.length if self.table is not None else length)

    def unit_costs(self, model: AnyModel, params: Params) -> dict[str, float]:
        """Refused: time is no sum over units."""
        raise ValueError("units have no threshold by latency: give a budget of units, parameters, flops or memory.")

    def measured(self, model: Model, params: Params, progress: Callable[[int, int], None] | None = None) -> Self:
        """The same budget with a table of the model on this device, which is measured if there is none.

        Raises:
            ValueError: If its table is of another device, model, batch or length, or it has no length.
        """
        if self.table is None:
            if self.length is None:
                raise ValueError("a latency budget needs length=, tokens per example, or table=.")
            measure = measure_latency_table if self.folder is None else partial(kept_table, self.folder)
            tokens = whole_tokens(model, self.length)
            return replace(self, table=measure(model, params, batch=self.batch or 1, length=tokens, progress=progress))
        check_table(self.table, model, params)
        known = self.table.conditions
        length = known.length if self.length is None else whole_tokens(model, self.length)
        if (self.batch or known.batch, length) != (known.batch, known.length):
            raise ValueError(
                f"the latency table is for {known.batch} examples of {known.length} tokens, but "
                f"{self.batch or known.batch} of {length} are asked for: name another table, or none to have one "
                "measured."
            )
        return self


KINDS_OF_BUDGETS = (Units, Parameters, Flops, Cache, Memory, Latency)
NAMES = ("units", "parameters", "flops", "cache", "memory", "memory_bytes", "latency", "latency_seconds")  # in records


def read_budget(settings: Mapping[str, Any]) -> Budget:
    """The one budget among settings as a record holds them, such as `{"flops": 0.5, "length": 128, "units": None}`.

    Raises:
        ValueError: If there is not exactly one, or it is out of range.
    """
    given = {name: settings[name] for name in NAMES if settings.get(name) is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one budget of {', '.join(NAMES)}; got {', '.join(given) or 'none'}.")
    ((name, amount),) = given.items()
    counted, _, unit = name.partition("_")
    (kind,) = (kind for kind in KINDS_OF_BUDGETS if kind.counted == counted)
    return kind(**{unit or "fraction": amount}, length=settings.get("length"))


ALLOCATIONS = ("auto", "per_layer", "per_kind", "global", "measured")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules of a selection, beside its budget."""

    # Which units compete: those of one site, so that all sites keep about the same fraction; those of one kind, so that
    # all kinds do; or all units of the model, by their score per cost. Or the widths of the sites are found by the
    # model's measured answers, which is the business of `prune`, see `jaxprune.pruning.allocation`. By `auto` `prune`
    # measures where it can; elsewhere it is per_layer, and global of scores that rank whole layers.
    allocation: str = "auto"
    # Kept units of a site (channels: of a head) are a multiple of this, or all: one number, or one per kind of units.
    multiple_of: int | Mapping[str, int] | None = None
    # At least so many units of every site (channels: of every head) stay, or all it has: one number, or one per kind.
    floor: int | Mapping[str, int] | None = None
    # Layers (`0`) and sites (`"3.ffn.neurons"`) that keep all units.
    protect: Collection[int | str] = ()
    # All layers keep as many units of a kind, the best of each: other programs need it, see `jp.export`. Of scores that
    # rank whole layers, whole layers go.
    uniform: bool = False
    # Rescales the scores before they are compared, such as `per_layer_l2`.
    normalise: Normalise | None = None

    def __post_init__(self):
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {self.allocation!r}.")

    @property
    def measured(self) -> bool:
        """True if widths are found by the model's answers."""
        return self.allocation == "measured"

    def decided(self, properties: Mapping[str, Any] | None) -> Rules:
        """The same without `auto`, where no rows are at hand: for scores of these `properties`."""
        if self.allocation != "auto":
            return self
        by_layer = properties is None or properties.get("by_layer", True)
        return replace(self, allocation="per_layer" if by_layer else "global")

    def settings(self) -> dict[str, Any]:
        """All of them by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

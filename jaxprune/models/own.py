"""Models of your own: any function of parameters, a batch and gates, and Flax modules that multiply by their gates.

    class FeedForward(nnx.Module):
        def __init__(self, embed, neurons, rngs):
            self.up, self.down = nnx.Linear(embed, neurons, rngs=rngs), nnx.Linear(neurons, embed, rngs=rngs)
            self.neurons = jp.own.Gate(jnp.ones(neurons))  # named after its kind of unit

        def __call__(self, x):
            return self.down(nnx.gelu(self.up(x)) * self.neurons[...])  # after the non-linearity, once

    model, params = jp.own.from_nnx(module, {"layers.*.up.kernel": ("embed", "neurons"), ...})

A unit that is removed leaves arrays that are smaller, so a module must read its widths from their shapes. Every layer
has its own arrays: those that `nnx.scan` stacks cannot have widths of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx

from jaxprune.models.running import Stack
from jaxprune.units import (
    KINDS,
    UNITS,
    AxisTable,
    Gates,
    Params,
    Path,
    axes_of,
    flatten,
    path_name,
    pattern_of,
    readers,
    sites,
    unflatten,
    widths,
)


class Gate(nnx.Variable):
    """The gates of a module's units, `[units]`, ones to begin with; the attribute is named after the kind of unit."""


Shape: TypeAlias = tuple[int, ...]
Names: TypeAlias = tuple[str | tuple[str, ...], ...]  # of an array's axes; several that are one in it stand in a tuple


@dataclass(frozen=True, eq=False)
class Architecture:
    """The axes of a model's parameters, which is all that `select`, `compact`, `flops` and gates need of one.

    Parameters are a nested dict, `{"layers": {0: {"ffn": {"up": {"kernel": array}}}}}`; layers have integer keys, or
    names that end in their number, `block_3`. All arrays that have units of one kind in common stand two steps below
    their module, here `ffn`. The axis `embed` is that of the residual stream, which kernels read and write: one whose
    first axis is that of the units, with `embed` behind it, reads them. Units are `heads` or `neurons`; with grouped
    queries they are `groups`, each with its `queries`.
    """

    axes: AxisTable  # "layers.*.ffn.up.kernel" -> ("embed", "neurons"); * is any one step

    stacks = (Stack("", ("layers",), (), ()),)
    causal = False  # no cache is counted

    def products(self, path: Path, lengths: tuple[float, ...]) -> tuple[float, float, float]:
        """The number of products of a kernel, see `jaxprune.models.Model.products`; all tokens attend to all."""
        (tokens,) = lengths
        axes = axes_of(self.axes, path)
        return tokens, tokens, tokens if "heads" in axes else 2.0 * tokens if "queries" in axes else 0.0


@dataclass(frozen=True, eq=False)
class NNXModel(Architecture):
    """A Flax module without its gates and the arrays that have axes; `from_nnx` makes it."""

    graphdef: Any
    others: Any  # what else the module holds: counts, keys, statistics
    gates: Mapping[str, Path]  # site name to the place of its variable
    places: Mapping[Path, tuple[Path, Names]]  # of every parameter: its place in the module, and its axes there

    def merge(self, params: Params, gates: Gates | None = None) -> Any:
        """The module with these parameters.

        Args:
            params: Those of `from_nnx`, of any widths.
            gates: Site name to gates `[units]`; a missing one is open.

        Raises:
            ValueError: If the module has other parameters, or has not these gates.
        """
        flat = flatten(params)
        unknown, missing = (_listed(a - b) for a, b in ((flat.keys(), self.places.keys()), (self.places.keys(), flat)))
        if unknown or missing:
            raise ValueError(f"the parameters are not this module's: unknown {unknown}, missing {missing}.")
        if other := (gates or {}).keys() - self.gates.keys():
            raise ValueError(f"the module has no gates {', '.join(sorted(other))}; it has {', '.join(self.gates)}.")
        width = widths(self.axes, params, KINDS)
        opened = {path: jnp.ones(width[name]) for name, path in self.gates.items()}
        opened |= {self.gates[name]: gate for name, gate in (gates or {}).items()}
        arrays = {place: _fused(flat[path], names) for path, (place, names) in self.places.items()}
        return nnx.merge(self.graphdef, unflatten(opened), unflatten(arrays), self.others)

    def apply(self, params: Params, *inputs: Any, gates: Gates | None = None, **options: Any) -> Any:
        """Runs the module: `merge(params, gates)(*inputs, **options)`. What it changes in itself is lost."""
        return self.merge(params, gates)(*inputs, **options)


def from_nnx(
    module: nnx.Module, axes: Mapping[str, Names], *, sizes: Mapping[str, int] | None = None
) -> tuple[NNXModel, Params]:
    """Takes a Flax module apart, so that its units can be scored, selected and removed.

    The module multiplies the units of every site by a `Gate`: heads before the kernel that reads them, neurons after
    their non-linearity. `jaxprune.verify` finds out whether it does.

    Args:
        module: As it is to be run: after `module.eval()` where it has dropout.
        axes: The names of every parameter's axes, see `Architecture`. Where several are one in the array, they stand in
            a tuple: `("embed", ("heads", "head_dim"))` is what `nnx.Linear(embed, heads * head_dim)` holds. Variables
            that are no `nnx.Param` may be named, too; others stay as they are.
        sizes: The sizes of axes that no array shows by themselves: `{"head_dim": 64}`.

    Returns:
        The architecture, and the parameters: a nested dict of arrays in which every axis stands by itself.

    Raises:
        ValueError: If a parameter has no axes, or other ones; a site has no gate, or no kernel that reads its units; a
            gate is not named after units of its module; or a size is not known. All of them are named.
    """

    def named(path: Any, variable: Any) -> bool:
        return isinstance(variable, nnx.Param) or _pattern(axes, tuple(path)) is not None

    graphdef, opened, kept, others = nnx.split(module, Gate, named, ...)
    variables, arrays = (flatten(nnx.to_pure_dict(state)) for state in (opened, kept))
    patterns = {path: _pattern(axes, path) for path in arrays}
    _refuse(f"{path_name(path)} {arrays[path].shape} has no axes" for path, found in patterns.items() if found is None)
    _refuse(f"no parameter is named {pattern}" for pattern in axes.keys() - patterns.values())
    known = {path: axes[pattern] for path, pattern in patterns.items() if pattern is not None}
    _refuse(
        f"{path_name(path)} {arrays[path].shape} has not the axes {names}"
        for path, names in known.items()
        if arrays[path].ndim != len(names)
    )
    inside = {path[:-1] for path in variables}  # modules with gates: their own arrays get one more step, as others have
    places = {(*path, "array") if path[:-1] in inside else path: (path, names) for path, names in known.items()}
    table = {path_name(path): tuple(_flat(names)) for path, (_, names) in places.items()}
    shapes = _shapes({path: (arrays[place].shape, names) for path, (place, names) in places.items()}, sizes or {})
    params = unflatten({path: arrays[place].reshape(shapes[path]) for path, (place, _) in places.items()})
    return NNXModel(table, graphdef, others, _sites(table, params, variables), places), params


def _sites(table: AxisTable, params: Params, variables: Mapping[Path, Any]) -> dict[str, Path]:
    """The place of the gates of every site."""
    found = {path_name(tuple(step for step in path if step != "layers")): path for path in variables}
    width, read = widths(table, params, KINDS), readers(table, params, KINDS)
    gated = {site.module for site in sites(table, params, KINDS) if site.name in found}
    there = ", ".join(widths(table, params))
    _refuse(f"{name} is a gate of no site; there are {there}" for name in found if name not in width)
    _refuse(
        f"{site.name} has no gate of its own: {path_name(site.module)} needs a Gate {site.kind} of {width[site.name]}"
        for site in sites(table, params, UNITS)
        if site.module not in gated
    )
    _refuse(f"{name} is read by no kernel, whose axes are (units, ..., embed)" for name in found if name not in read)
    _refuse(
        f"{name} has gates {variables[path].shape} for {width[name]} units"
        for name, path in found.items()
        if variables[path].shape != (width[name],)
    )
    return found


def _shapes(arrays: Mapping[Path, tuple[tuple[int, ...], Names]], sizes: Mapping[str, int]) -> dict[Path, Shape]:
    """The shapes in which every axis stands by itself. Sizes are found out module by module."""
    known: dict[tuple[Path, str], int] = {}
    before = -1
    while len(known) > before:
        before = len(known)
        for path, (shape, names) in arrays.items():
            for size, group in zip(shape, map(_flat, names), strict=True):
                own = [(path[:-2], name) for name in group]
                known |= {key: sizes[key[1]] for key in own if key[1] in sizes}
                if len(unknown := [key for key in own if key not in known]) == 1:
                    rest = math.prod(known[key] for key in own if key in known)
                    known[unknown[0]] = size // rest if rest else 0
    problems, found = [], {}
    for path, (shape, names) in arrays.items():
        groups = [[known.get((path[:-2], name)) for name in _flat(group)] for group in names]
        found[path] = tuple(size for group in groups for size in group if size is not None)
        if missing := [name for name in _flat(names) if (path[:-2], name) not in known]:
            problems.append(f"{path_name(path)} {shape} does not say the size of {', '.join(missing)}: see sizes=")
        elif shape != tuple(math.prod(size or 0 for size in group) for group in groups):
            problems.append(f"{path_name(path)} {shape} has not the axes {names} of sizes {found[path]}")
    _refuse(problems)
    return found


def _fused(array: Any, names: Names) -> Any:
    """The array as the module has it."""
    ends = itertools.accumulate((len(_flat(group)) for group in names), initial=0)
    return array.reshape([math.prod(array.shape[i:k]) for i, k in itertools.pairwise(ends)])


def _flat(names: str | Iterable[Any]) -> list[str]:
    return [names] if isinstance(names, str) else [name for group in names for name in _flat(group)]


def _pattern(axes: Mapping[str, Any], path: Path) -> str | None:
    try:
        return pattern_of(tuple(axes), path)
    except ValueError:
        return None


def _listed(paths: Iterable[Path]) -> list[str]:
    return sorted(map(path_name, paths))


def _refuse(problems: Iterable[str]) -> None:
    if problems := [*problems]:
        raise ValueError(f"the module cannot be taken apart: {'; '.join(problems)}.")

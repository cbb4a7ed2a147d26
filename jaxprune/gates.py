"""What can be removed from a model: units, the sites where they are gated, and the names of every parameter's axes.

A *unit* is removed as a whole: an FFN neuron or an attention head. A *site* is a place in the model where units of one
kind are gated, named by its key in `Gates` (`"3.ffn.neurons"`). A *gate* is the multiplier of a unit: 1 is open, 0 is
closed. All of it is read from one axis table per model family, which names every axis of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxprune.models import Model

UNITS = ("heads", "neurons")  # axis names whose entries are units

Params: TypeAlias = dict[Any, Any]  # nested dict of arrays; layers have int keys
Path: TypeAlias = tuple[str | int, ...]
Gates: TypeAlias = dict[str, jax.Array]  # site name -> [units] (or [batch, units]) float32; a missing site is open
AxisTable: TypeAlias = Mapping[str, tuple[str, ...]]  # "layers.*.ffn.up.kernel" -> ("embed", "neurons")


class Site(NamedTuple):
    """A place where the units of one kind are gated."""

    name: str  # key in `Gates`, such as "3.ffn.neurons" or "decoder.3.cross.heads"
    kind: str  # the unit axis: "heads" or "neurons"
    module: Path  # where in the parameters the arrays with this axis are: ("layers", 3, "ffn")
    layer: int  # index of the layer within its stack
    stack: str  # "" in an encoder-only or decoder-only model, else "encoder" or "decoder"

    @property
    def layer_name(self) -> str:
        """What the names of all sites of its layer begin with: "3" or "decoder.3"."""
        return f"{self.stack}.{self.layer}" if self.stack else str(self.layer)


def flatten(params: Mapping[Any, Any]) -> dict[Path, Any]:
    """Lists the leaves of a nested dict by path, sorted; integers sort as numbers."""
    flat: dict[Path, Any] = {}

    def walk(node: Mapping[Any, Any], path: Path) -> None:
        for key in sorted(node):
            if isinstance(node[key], Mapping):
                walk(node[key], (*path, key))
            else:
                flat[(*path, key)] = node[key]

    walk(params, ())
    return flat


def unflatten(flat: Mapping[Path, Any]) -> Params:
    """Builds the nested dict that `flatten` lists."""
    params: Params = {}
    for path, leaf in flat.items():
        node = params
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = leaf
    return params


def subtree(params: Params, path: Path) -> Any:
    """The part of `params` at `path`.

    Raises:
        ValueError: If there is none, with what there is instead.
    """
    node: Any = params
    for depth, step in enumerate(path):
        if not isinstance(node, Mapping) or step not in node:
            have = _some(map(str, node)) if isinstance(node, Mapping) and node else "nothing"
            raise ValueError(f"the parameters have no {path_name(path[: depth + 1])!r}; there they have: {have}.")
        node = node[step]
    return node


def path_name(path: Path) -> str:
    """The dotted name of a path: `("layers", 3, "ffn")` is `"layers.3.ffn"`."""
    return ".".join(map(str, path))


def _matches(pattern: str, path: Path) -> bool:
    steps = pattern.split(".")
    return len(steps) == len(path) and all(s in ("*", str(p)) for s, p in zip(steps, path, strict=True))


def axes_of(table: AxisTable, path: Path) -> tuple[str, ...]:
    """The names of the axes of the parameter at `path`.

    Args:
        table: The family's axis table; `*` in a pattern stands for one step of the path.
        path: Where the parameter is.

    Returns:
        One name per axis, such as `("embed", "heads", "head_dim")`.

    Raises:
        ValueError: If no pattern of the table matches.
    """
    return table[_pattern_of(table, path)]


def _pattern_of(table: AxisTable, path: Path) -> str:
    for pattern in table:
        if _matches(pattern, path):
            return pattern
    raise ValueError(f"no axis names for parameter {path_name(path)!r}: the family's axis table has no such pattern.")


def reads(axes: tuple[str, ...], path: Path) -> bool:
    """Whether a parameter contracts gated values: a kernel whose first axis is a unit axis."""
    return path[-1] == "kernel" and axes[0] in UNITS


def sites(table: AxisTable, params: Params) -> tuple[Site, ...]:
    """All sites of a model, layer by layer, in the order of the axis table."""
    return tuple(place.site for place in _places(table, flatten(params)))


def widths(table: AxisTable, params: Params) -> dict[str, int]:
    """The number of units at every site, in site order."""
    flat = flatten(params)
    return {place.site.name: int(flat[place.path].shape[place.axis]) for place in _places(table, flat)}


class _Place(NamedTuple):
    """A site and the arrays that show its units."""

    site: Site
    path: Path  # an array with the unit axis
    axis: int  # which of its axes that is
    reader: Path | None  # the kernel that contracts the gated values


def _places(table: AxisTable, flat: Mapping[Path, Any]) -> tuple[_Place, ...]:
    return _find_places(tuple(table.items()), tuple(flat))


@lru_cache(maxsize=64)  # every gated forward pass asks, and the answer depends on names alone
def _find_places(table: tuple[tuple[str, tuple[str, ...]], ...], paths: tuple[Path, ...]) -> tuple[_Place, ...]:
    axes = dict(table)
    order = {pattern: index for index, pattern in enumerate(axes)}
    members: dict[Site, list[tuple[int, Path, str]]] = {}
    for path in paths:
        pattern = _pattern_of(axes, path)
        for kind in UNITS:
            if kind in axes[pattern]:
                members.setdefault(_site(kind, path[:-2]), []).append((order[pattern], path, pattern))
    found = []
    for site, arrays in members.items():
        first, path, pattern = min(arrays)
        reader = next((path for _, path, pattern in arrays if reads(axes[pattern], path)), None)
        stack = "" if site.stack == "encoder" else site.stack  # comes first
        found.append(((stack, site.layer, first), _Place(site, path, axes[pattern].index(site.kind), reader)))
    return tuple(place for _, place in sorted(found, key=lambda item: item[0]))


def _site(kind: str, module: Path) -> Site:
    """The site of the units of one kind in `module`, the path without the affine map's name and the leaf's."""
    layer = next((step for step in module if isinstance(step, int)), None)
    if layer is None:
        raise ValueError(f"{path_name(module)!r} has {kind} and is in no layer: layers have integer keys.")
    stack = "" if module[0] == "layers" else str(module[0])
    return Site(path_name((*(step for step in module if step != "layers"), kind)), kind, module, layer, stack)


def site_of(name: str) -> Site:
    """The site of a name, such as `"3.ffn.neurons"` or `"decoder.1.cross.heads"`, without a model.

    The same as `sites` gives; sorted by `site_order` they stand in the order of a model's sites.

    Raises:
        ValueError: If it is no such name.
    """
    *steps, kind = name.split(".")
    at = next((i for i, step in enumerate(steps) if step.isdecimal()), None)
    if kind not in UNITS or at not in (0, 1) or len(steps) != at + 2 or not all(steps):
        raise ValueError(f"{name!r} is not the name of a site, such as 3.ffn.neurons or decoder.1.cross.heads.")
    return _site(kind, (*steps[:at], "layers", int(steps[at]), *steps[at + 1 :]))


def site_order(site: Site) -> tuple[Any, ...]:
    """Sorts sites: the encoder first, layer by layer, and within a layer attention, cross-attention, FFN."""
    return "" if site.stack == "encoder" else site.stack, site.layer, site.module, site.kind


def without(table: AxisTable, params: Params, emptied: Sequence[Site]) -> Params:
    """The parameters with no unit left at some sites: what gates of 0 leave of them, and computed at no cost."""
    kinds = {(site.module, site.kind) for site in emptied}

    def cut(path: Path, leaf: Any) -> Any:
        axes = axes_of(table, path)
        gone = [any(name == kind and path[: len(module)] == module for module, kind in kinds) for name in axes]
        shape = [0 if empty else size for empty, size in zip(gone, leaf.shape, strict=True)]
        return np.zeros(shape, leaf.dtype) if any(gone) else leaf

    return unflatten({path: cut(path, leaf) for path, leaf in flatten(params).items()})


def open_gates(model: Model, params: Params) -> Gates:
    """Gates of ones for every site of the model: nothing is removed.

    Returns:
        Site name to float32 ones of shape `[units]`.
    """
    return {name: jnp.ones(units, jnp.float32) for name, units in widths(model.axes, params).items()}


def check_gates(model: Model, params: Params, gates: Mapping[str, Any], *, rows: int | None = None) -> None:
    """Refuses gates that do not belong to these parameters.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        gates: Site name to gates `[units]` or `[batch, units]`.
        rows: The size of the batch; None: it is not known.

    Raises:
        TypeError: If `gates` is not a dict of arrays.
        ValueError: Naming every unknown site and every wrong number of units or rows.
    """
    _check_arrays("gates", gates)
    expected = widths(model.axes, params)
    wrong = []
    for name, gate in gates.items():
        if name not in expected:
            wrong.append(f"{name} is not a site")
        elif gate.ndim not in (1, 2):
            wrong.append(f"{name} has {gate.ndim} axes, expected [units] or [batch, units]")
        elif gate.shape[-1] != expected[name]:
            wrong.append(f"{name} has {gate.shape[-1]} gates for {expected[name]} units")
        elif gate.ndim == 2 and rows is not None and gate.shape[0] != rows:
            wrong.append(f"{name} has gates for {gate.shape[0]} examples, the batch has {rows}")
    if wrong:
        raise ValueError(f"gates do not fit the parameters: {'; '.join(wrong)}. Sites: {_some(expected)}.")


def check_means(model: Model, params: Params, means: Mapping[str, Any]) -> None:
    """Refuses values for closed units that do not belong to these parameters.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        means: Site name to `[neurons]` or `[heads, head_dim]`.

    Raises:
        TypeError: If `means` is not a dict of arrays.
        ValueError: Naming every unknown site and every wrong shape.
    """
    _check_arrays("means", means)
    readers = {place.site.name: place.reader for place in _places(model.axes, flatten(params))}
    wrong = [f"{name} is not a site" for name in means if name not in readers]
    for name, mean in means.items():
        reader = readers.get(name)
        if reader is not None:
            expected = subtree(params, reader).shape[:-1]
            if mean.shape != expected:
                wrong.append(f"{name} has shape {tuple(mean.shape)}, expected {expected}")
    if wrong:
        raise ValueError(f"means do not fit the parameters: {'; '.join(wrong)}. Sites: {_some(readers)}.")


def _check_arrays(what: str, entries: Any) -> None:
    if not isinstance(entries, Mapping):
        raise TypeError(f"{what} must be a dict from site name to array, got {type(entries).__name__}.")
    other = [f"{name} is a {type(value).__name__}" for name, value in entries.items() if not hasattr(value, "ndim")]
    if other:
        raise TypeError(f"{what} must be arrays, but {'; '.join(other)}: use jnp.asarray.")


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

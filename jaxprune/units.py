"""What can be removed from a model: units, the sites where they are gated, and the names of every parameter's axes.

A *unit* is removed as a whole: an FFN neuron, an attention head, or a channel inside a head. A *site* is a place in the
model where units of one kind are gated, named by its key in `Gates` (`"3.ffn.neurons"`). A *gate* is the multiplier of
a unit: 1 is open, 0 is closed. All of it is read from one axis table per model family, which names every axis of every
parameter.

Units are heads and neurons unless channels are asked for. `channels` are those of the values, which the output kernel
reads; a `query_channel` is a channel of the query and of the key, whose product its gate multiplies. Their gates stand
head by head, and all heads of a module keep as many, so that arrays stay rectangular. Rotary embeddings couple query
channels in pairs: a family that has them gives this axis another name, and then it has no such units.

There is one kind of unit per tensor: gates of two sites that share a parameter, such as a module's heads and its
channels, are refused. Channels and query channels share none and go together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxprune.models import Model

# Kind of unit -> the axes its units stand along, side by side in every parameter that has them; the last is its own
KINDS: Mapping[str, tuple[str, ...]] = {
    "heads": ("heads",),
    "neurons": ("neurons",),
    "channels": ("heads", "channels"),
    "query_channels": ("heads", "query_channels"),
}
UNITS = ("heads", "neurons")  # the kinds that are meant where none are named

Params: TypeAlias = dict[Any, Any]  # nested dict of arrays; layers have int keys
Path: TypeAlias = tuple[str | int, ...]
Gates: TypeAlias = dict[str, jax.Array]  # site name -> [units] (or [batch, units]) float32; a missing site is open
AxisTable: TypeAlias = Mapping[str, tuple[str, ...]]  # "layers.*.ffn.up.kernel" -> ("embed", "neurons")


class Intervention(NamedTuple):
    """What is done to the units of a model while it runs."""

    gates: Gates | None = None  # None: all are open
    means: Gates | None = None  # what closed units are replaced by; None: zero


class Site(NamedTuple):
    """A place where the units of one kind are gated."""

    name: str  # key in `Gates`, such as "3.ffn.neurons" or "decoder.3.cross.heads"
    kind: str  # a key of `KINDS`
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
        One name per axis, such as `("embed", "heads", "channels")`.

    Raises:
        ValueError: If no pattern of the table matches.
    """
    return table[_pattern_of(table, path)]


def _pattern_of(table: AxisTable, path: Path) -> str:
    found = _first_match(tuple(table), path)
    if found is None:
        raise ValueError(
            f"no axis names for parameter {path_name(path)!r}: the family's axis table has no such pattern."
        )
    return found


@lru_cache(maxsize=4096)
def _first_match(patterns: tuple[str, ...], path: Path) -> str | None:
    return next((pattern for pattern in patterns if _matches(pattern, path)), None)


def reads(axes: tuple[str, ...], path: Path) -> bool:
    """Whether a parameter contracts gated values: a kernel whose first axis is a unit axis."""
    return path[-1] == "kernel" and axes[0] in UNITS


def takes_gate(axes: tuple[str, ...], path: Path, kind: str) -> bool:
    """Whether multiplying this parameter's units by their gates does what the gates do.

    That is the kernel that reads them; what makes the queries, for query channels, which no kernel reads.
    """
    return path[-2] == "query" if kind == "query_channels" else reads(axes, path)


def unit_axes(axes: tuple[str, ...], kind: str) -> slice:
    """Which axes of a parameter the units of a kind stand along."""
    stop = axes.index(kind) + 1
    return slice(stop - len(KINDS[kind]), stop)


def merge_units(array: Any, axes: tuple[str, ...], kind: str) -> Any:
    """The array with one axis for the units of a kind, where it may have two: heads, then their channels."""
    return array.reshape(_merged(array.shape, axes, kind))


def _merged(shape: tuple[int, ...], axes: tuple[str, ...], kind: str) -> tuple[int, ...]:
    units = unit_axes(axes, kind)
    return *shape[: units.start], math.prod(shape[units]), *shape[units.stop :]


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Refuses kinds of units that do not exist.

    Raises:
        ValueError: If there is one, or no kind at all.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {kinds!r}.")


def sites(table: AxisTable, params: Params, kinds: Collection[str] = UNITS) -> tuple[Site, ...]:
    """All sites of a model with units of these kinds, layer by layer, in the order of the axis table."""
    return tuple(place.site for place in _places(table, flatten(params), kinds))


def widths(table: AxisTable, params: Params, kinds: Collection[str] = UNITS) -> dict[str, int]:
    """The number of units at every site, in site order."""
    flat = flatten(params)
    return {place.site.name: math.prod(flat[place.path].shape[place.units]) for place in _places(table, flat, kinds)}


def check_sharing(table: AxisTable, params: Params, names: Collection[str]) -> None:
    """Refuses sites that may not be gated together: there is one kind of unit per tensor.

    Raises:
        ValueError: Naming every two sites that share a parameter.
    """
    owners: dict[Path, str] = {}
    shared: dict[str, None] = {}
    for place in _places(table, flatten(params), KINDS):
        for path in place.arrays if place.site.name in names else ():
            owner = owners.setdefault(path, place.site.name)
            if owner != place.site.name:
                shared[f"{owner} and {place.site.name}"] = None
    if shared:
        raise ValueError(
            f"units of two kinds that share a parameter cannot be gated together: {_some(shared, 2)}. "
            "Take the heads of a module, or its channels."
        )


class _Place(NamedTuple):
    """A site and the arrays that show its units."""

    site: Site
    path: Path  # an array with the unit axes
    units: slice  # which of its axes those are
    reader: Path | None  # the kernel that contracts the gated values
    arrays: tuple[Path, ...]  # all arrays with the unit axes


def _places(table: AxisTable, flat: Mapping[Path, Any], kinds: Collection[str]) -> tuple[_Place, ...]:
    return tuple(place for place in _find_places(tuple(table.items()), tuple(flat)) if place.site.kind in kinds)


@lru_cache(maxsize=64)  # every gated forward pass asks, and the answer depends on names alone
def _find_places(table: tuple[tuple[str, tuple[str, ...]], ...], paths: tuple[Path, ...]) -> tuple[_Place, ...]:
    axes = dict(table)
    order = {pattern: index for index, pattern in enumerate(axes)}
    members: dict[Site, list[tuple[int, Path, str]]] = {}
    for path in paths:
        pattern = _pattern_of(axes, path)
        for kind in KINDS:
            if kind in axes[pattern]:
                members.setdefault(_site(kind, path[:-2]), []).append((order[pattern], path, pattern))
    found = []
    for site, arrays in members.items():
        first, path, pattern = min(arrays)
        reader = next((path for _, path, pattern in arrays if reads(axes[pattern], path)), None)
        stack = "" if site.stack == "encoder" else site.stack  # comes first
        place = _Place(site, path, unit_axes(axes[pattern], site.kind), reader, tuple(own for _, own, _ in arrays))
        found.append(((stack, site.layer, first), place))
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
    if kind in KINDS and kind not in UNITS:
        raise ValueError(f"{name!r} has {kind}: only scores of {' and '.join(UNITS)} are compared without a model.")
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


def narrow(table: AxisTable, params: Params, kept: Mapping[Site, int]) -> Params:
    """The parameters with the first units alone at some sites: a model of other widths, to be measured.

    Args:
        table: The family's axis table.
        params: Parameters of any widths; they are not changed.
        kept: Heads or neurons of every site; the sites that are not named stay as they are.

    Returns:
        NumPy arrays where something was cut, else the same objects as in `params`.
    """
    units = {(site.module, site.kind): count for site, count in kept.items()}

    def cut(path: Path, leaf: Any) -> Any:
        axes = axes_of(table, path)
        own = {kind: count for (module, kind), count in units.items() if path[: len(module)] == module}
        if all(own.get(name, size) >= size for name, size in zip(axes, leaf.shape, strict=True)):
            return leaf
        return np.ascontiguousarray(np.asarray(leaf)[tuple(slice(own.get(name)) for name in axes)])

    return unflatten({path: cut(path, leaf) for path, leaf in flatten(params).items()})


def open_gates(model: Model, params: Params, kinds: tuple[str, ...] = UNITS) -> Gates:
    """Gates of ones for every site with units of these kinds: nothing is removed.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        kinds: Kinds of units, such as `("channels", "query_channels", "neurons")`.

    Returns:
        Site name to float32 ones of shape `[units]`.

    Raises:
        ValueError: If a kind does not exist.
    """
    check_kinds(kinds)
    return {name: jnp.ones(units, jnp.float32) for name, units in widths(model.axes, params, kinds).items()}


def check_gates(model: Model, params: Params, gates: Mapping[str, Any], *, rows: int | None = None) -> None:
    """Refuses gates that do not belong to these parameters.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        gates: Site name to gates `[units]` or `[batch, units]`.
        rows: The size of the batch; None: it is not known.

    Raises:
        TypeError: If `gates` is not a dict of arrays.
        ValueError: Naming every unknown site, every wrong number of units or rows, or sites that share a parameter.
    """
    _check_arrays("gates", gates)
    expected = widths(model.axes, params, KINDS)
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
    check_sharing(model.axes, params, gates)


def mean_shapes(table: AxisTable, params: Params) -> dict[str, tuple[int, ...]]:
    """The shape of what closed units are replaced by, for every site whose units a kernel reads.

    It is `[units]`, and `[heads, channels]` for heads. Of the parameters only the shapes are read.
    """
    flat = flatten(params)
    return {
        place.site.name: _merged(flat[place.reader].shape, axes_of(table, place.reader), place.site.kind)[:-1]
        for place in _places(table, flat, KINDS)
        if place.reader is not None
    }


def check_means(model: Model, params: Params, means: Mapping[str, Any]) -> None:
    """Refuses values for closed units that do not belong to these parameters.

    Args:
        model: The architecture.
        params: Parameters of any widths.
        means: Site name to `[units]`, for heads to `[heads, channels]`.

    Raises:
        TypeError: If `means` is not a dict of arrays.
        ValueError: Naming every unknown site, every one whose units have no means, and every wrong shape.
    """
    _check_arrays("means", means)
    places = [site.name for site in sites(model.axes, params, KINDS)]
    expected = mean_shapes(model.axes, params)
    wrong = [f"{name} is not a site" for name in means if name not in places]
    for name, mean in means.items():
        if name in places and name not in expected:
            wrong.append(f"{name} has none: no kernel reads its units")
        elif name in expected and mean.shape != expected[name]:
            wrong.append(f"{name} has shape {tuple(mean.shape)}, expected {expected[name]}")
    if wrong:
        raise ValueError(f"means do not fit the parameters: {'; '.join(wrong)}. Sites: {_some(places)}.")


def _check_arrays(what: str, entries: Any) -> None:
    if not isinstance(entries, Mapping):
        raise TypeError(f"{what} must be a dict from site name to array, got {type(entries).__name__}.")
    other = [f"{name} is a {type(value).__name__}" for name, value in entries.items() if not hasattr(value, "ndim")]
    if other:
        raise TypeError(f"{what} must be arrays, but {'; '.join(other)}: use jnp.asarray.")


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

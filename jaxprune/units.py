"""Units that can be removed from a model, the sites where they are gated, and the names of every parameter's axes.

A *unit* is removed as a whole: an FFN neuron, an attention head, or a channel inside a head. A *site* is a place in the
model where units of one kind are gated, named by its key in `Gates` (`"3.ffn.neurons"`). A *gate* is the multiplier of
a unit: 1 is open, 0 is closed. All of it is read from one axis table per model family, which names every axis of every
parameter.

Units are heads and neurons unless channels are asked for. `channels` are those of the values, which the output kernel
reads; a `query_channel` is a channel of the query and of the key, whose product its gate multiplies. Their gates stand
head by head, and all heads of a module keep as many, so that arrays stay rectangular. Rotary embeddings couple query
channels in pairs: a family that has them gives this axis another name, and then it has no such units.

The axes of a kind of units need not be adjacent, and a family names all other axes freely: its table says all that is
known of its units.

Each tensor has at most one kind of unit: gates of two sites that share a parameter, such as a module's heads and its
channels, are refused. Channels and query channels share none and go together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

# Kind of unit -> the axes its units stand along, in every parameter that has all of them. Along all but the last, as
# many units stay in every entry: channels in every head.
KINDS: Mapping[str, tuple[str, ...]] = {
    "heads": ("heads",),
    "groups": ("groups",),
    "neurons": ("neurons",),
    "channels": ("heads", "channels"),
    "query_channels": ("heads", "query_channels"),
    "query_heads": ("groups", "queries"),
}
UNITS = ("heads", "groups", "neurons")  # whole units, which are meant where no kinds are named; no model has all
UNIT_AXES = frozenset(axis for axes in KINDS.values() for axis in axes)
UNREAD = ("query_channels",)  # the kinds that no kernel reads

Params: TypeAlias = dict[Any, Any]  # nested dict of arrays; layers have int keys
Path: TypeAlias = tuple[str | int, ...]
Gates: TypeAlias = dict[str, jax.Array]  # site name -> [units] (or [batch, units]) float32; a missing site is open
AxisTable: TypeAlias = Mapping[str, tuple[str, ...]]  # "layers.*.ffn.up.kernel" -> ("embed", "neurons")


class AnyModel(Protocol):
    """What units, selection, compaction and costs ask of a model: `jaxprune.models.Model`, or one of your own."""

    @property
    def axes(self) -> AxisTable:
        """The names of every parameter's axes."""
        ...

    @property
    def stacks(self) -> Sequence[Any]:
        """The stacks of layers, each with its own number of tokens."""
        ...

    @property
    def causal(self) -> bool:
        """Whether keys and values of earlier tokens are kept while a text is written."""
        ...

    def products(self, path: Path, lengths: tuple[float, ...]) -> tuple[float, float, float]:
        """The number of products of a layer's kernel; see `jaxprune.models.Model.products`."""
        ...


class TakesGate(tuple[str, ...]):
    """The axes of a parameter whose units are multiplied by their gates when these are folded into the weights.

    Only units that no kernel reads need one: where a kernel does, it is that kernel.
    """


class Intervention(NamedTuple):
    """The gates of a model's units, and what takes the place of closed ones."""

    gates: Gates | None = None  # None: all are open
    means: Gates | None = None  # what closed units are replaced by; None: zero


class Site(NamedTuple):
    """A place where the units of one kind are gated."""

    name: str  # key in `Gates`, such as "3.ffn.neurons"; of a model with several stacks "encoder.3.ffn.neurons"
    kind: str  # a key of `KINDS`
    module: Path  # where in the parameters the arrays with these units are: ("layers", 3, "ffn")
    layer: int  # index of the layer within its stack
    stack: str  # its name; "" in a model with one stack

    @property
    def layer_name(self) -> str:
        """The beginning of the names of all sites of its layer: "3" or "encoder.3"."""
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


def axes_of(table: AxisTable, path: Path) -> tuple[str, ...]:
    """The names of the axes of the parameter at `path`; `*` in a pattern stands for one step of the path.

    Raises:
        ValueError: If no pattern of the table matches.
    """
    return table[pattern_of(tuple(table), path)]


@lru_cache(maxsize=4096)
def pattern_of(patterns: tuple[str, ...], path: Path) -> str:
    """The first of the patterns that a path matches; see `axes_of`."""
    for pattern in patterns:
        steps = pattern.split(".")
        if len(steps) == len(path) and _matches(steps, path):
            return pattern
    raise ValueError(f"no axis names for parameter {path_name(path)!r}: the family's axis table has no such pattern.")


def _matches(steps: Sequence[str], path: Path) -> bool:
    return all(pattern in ("*", str(step)) for pattern, step in zip(steps, path, strict=False))


def has_units(axes: tuple[str, ...], kind: str) -> bool:
    """True if a parameter has the axes along which units of this kind lie."""
    return set(KINDS[kind]) <= set(axes)


def is_kernel(axes: tuple[str, ...]) -> bool:
    """True if a parameter with units is multiplied by what it reads: it has them and the embedding's axis."""
    return "embed" in axes


def reads(axes: tuple[str, ...]) -> bool:
    """True if a parameter contracts gated values: a kernel whose first axis is a unit axis."""
    return is_kernel(axes) and axes[0] in UNIT_AXES


def input_axes(axes: tuple[str, ...]) -> int:
    """The number of leading axes of a kernel that are summed over: all before the embedding, else one."""
    return (axes.index("embed") if "embed" in axes else 0) or 1


def takes_gate(axes: tuple[str, ...], kind: str) -> bool:
    """True if gates are folded into this parameter: the kernel that reads the units, else what the table marks."""
    return isinstance(axes, TakesGate) if kind in UNREAD else reads(axes)


def unit_axes(axes: tuple[str, ...], kind: str) -> tuple[int, ...]:
    """The axes of a parameter that the units of a kind stand along, in the order of `KINDS`."""
    return tuple(map(axes.index, KINDS[kind]))


def merge_units(array: Any, axes: tuple[str, ...], kind: str) -> tuple[Any, int]:
    """The array with one axis for the units of a kind, where it may have several, and which axis that is."""
    order, first = _side_by_side(axes, kind)
    return array.transpose(order).reshape(_merged(array.shape, axes, kind)), first


def take_units(array: np.ndarray, axes: tuple[str, ...], kind: str, units: np.ndarray, gate: Any = 1.0) -> np.ndarray:
    """Some units of an array, each multiplied by its gate in float32.

    The indices `units` and the float32 gates are shaped as the remaining units are along the axes of their kind.
    """
    order, first = _side_by_side(axes, kind)
    merged, _ = merge_units(array, axes, kind)
    taken = np.take(merged, units, first)
    if not np.all(gate == 1.0):
        after = [1] * (array.ndim - first - units.ndim)
        taken = (taken.astype(np.float32) * gate.reshape(*units.shape, *after)).astype(array.dtype)
    return np.ascontiguousarray(taken.transpose(np.argsort(order)))


def _side_by_side(axes: tuple[str, ...], kind: str) -> tuple[tuple[int, ...], int]:
    """The order of axes in which those of the units stand side by side, and where they begin."""
    units = unit_axes(axes, kind)
    rest = [i for i in range(len(axes)) if i not in units]
    first = sum(i < units[0] for i in rest)
    return (*rest[:first], *units, *rest[first:]), first


def _merged(shape: tuple[int, ...], axes: tuple[str, ...], kind: str) -> tuple[int, ...]:
    order, first = _side_by_side(axes, kind)
    sizes, last = [shape[i] for i in order], first + len(KINDS[kind])
    return *sizes[:first], math.prod(sizes[first:last]), *sizes[last:]


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
    return {
        place.site.name: math.prod(flat[place.path].shape[i] for i in place.units)
        for place in _places(table, flat, kinds)
    }


def readers(table: AxisTable, params: Params, kinds: Collection[str] = UNITS) -> dict[str, Path]:
    """The places of the kernels that read the units of each site, in site order; unread units are left out."""
    places = _places(table, flatten(params), kinds)
    return {place.site.name: place.reader for place in places if place.reader is not None}


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
    units: tuple[int, ...]  # which of its axes those are
    reader: Path | None  # the kernel that contracts the gated values
    arrays: tuple[Path, ...]  # all arrays with the unit axes


def _places(table: AxisTable, flat: Mapping[Path, Any], kinds: Collection[str]) -> tuple[_Place, ...]:
    return tuple(place for place in _find_places(tuple(table.items()), tuple(flat)) if place.site.kind in kinds)


@lru_cache(maxsize=64)  # every gated forward pass asks, and the answer depends on names alone
def _find_places(table: tuple[tuple[str, tuple[str, ...]], ...], paths: tuple[Path, ...]) -> tuple[_Place, ...]:
    axes = dict(table)
    members: dict[Site, dict[Path, tuple[str, ...]]] = {}
    for path in paths:
        names = axes_of(axes, path)
        for kind in KINDS:
            if has_units(names, kind):
                members.setdefault(_site(kind, path[:-2]), {})[path] = names
    places = []
    for site, arrays in members.items():
        first = min(arrays, key=lambda path: list(axes).index(pattern_of(tuple(axes), path)))
        reader = next((path for path, names in arrays.items() if reads(names)), None)
        places.append(_Place(site, first, unit_axes(arrays[first], site.kind), reader, tuple(arrays)))
    return tuple(sorted(places, key=lambda place: _order(axes, place.site) or ()))


def _order(table: AxisTable, site: Site) -> tuple[int, int, int] | None:
    """Sorts sites: stacks and modules as in the table, layers by number; None if the table has no such site."""
    patterns = [pattern.split(".") for pattern in table]
    for i, (steps, axes) in enumerate(zip(patterns, table.values(), strict=True)):
        if len(steps) == len(site.module) + 2 and has_units(axes, site.kind) and _matches(steps, site.module):
            return next(k for k, other in enumerate(patterns) if other[0] == steps[0]), site.layer, i
    return None


def _site(kind: str, module: Path) -> Site:
    """The site of the units of one kind in `module`, the path without the affine map's name and the leaf's."""
    layer, before = 0, []  # of a module that is in no layer
    for i, step in enumerate(module):
        name, _, number = str(step).rpartition("_")
        if number.isdecimal():
            layer, before = int(number), [*module[:i], name]
            break
    stack = path_name(tuple(step for step in before if step not in ("layers", "")))
    return Site(path_name((*(step for step in module if step != "layers"), kind)), kind, module, layer, stack)


def site_of(name: str) -> Site:
    """The site of a name, such as `"3.ffn.neurons"` or `"encoder.1.ffn.neurons"`, without a model.

    Raises:
        ValueError: If it is no such name.
    """
    *steps, kind = name.split(".")
    at = next((i for i, step in enumerate(steps) if step.isdecimal()), None)
    if kind in KINDS and kind not in UNITS:
        raise ValueError(f"{name!r} has {kind}: only scores of {' or '.join(UNITS)} are compared without a model.")
    if kind not in UNITS or at not in (0, 1) or len(steps) != at + 2 or not all(steps):
        raise ValueError(f"{name!r} is not the name of a site, such as 3.ffn.neurons or encoder.1.ffn.neurons.")
    return _site(kind, (*steps[:at], "layers", int(steps[at]), *steps[at + 1 :]))


def named_sites(tables: Iterable[AxisTable], names: Iterable[str]) -> tuple[Site, ...]:
    """The sites of some names, in the order of a model that has them, but without a model.

    Args:
        tables: The axis tables that there are; the first that has all sites says their order.
        names: The names of sites, in any order.

    Raises:
        ValueError: If one is no such name, or no table has them all.
    """
    places = [site_of(name) for name in names]
    for table in tables:
        order = {site: _order(table, site) for site in places}
        if None not in order.values():
            return tuple(sorted(places, key=lambda site: order[site] or ()))
    raise ValueError(f"no family of models has the sites {_some(site.name for site in places)}.")


def without(table: AxisTable, params: Params, emptied: Sequence[Site]) -> Params:
    """The parameters with no unit left at some sites: what gates of 0 leave of them, and computed at no cost."""
    return resize(table, params, dict.fromkeys(emptied, 0))


def lengths(table: AxisTable, params: Params) -> dict[Site, int]:
    """Units of every kind at every site, along the last of their axes: what `resize` changes."""
    flat = flatten(params)
    return {place.site: flat[place.path].shape[place.units[-1]] for place in _places(table, flat, KINDS)}


def resize(table: AxisTable, params: Params, widths: Mapping[Site, int]) -> Params:
    """The parameters with other widths: only the first units of a site, or more, whose weights are zero.

    More units change nothing that the model computes.

    Args:
        table: The family's axis table.
        params: Parameters of any widths; they are not changed.
        widths: Units to have at a site (along the last of several axes); sites that are not named stay as they are.

    Returns:
        NumPy arrays where something was changed, else the same objects as in `params`.
    """
    shapes, flat = shapes_at(table, params, widths), flatten(params)
    return unflatten(
        {path: leaf if leaf.shape == shapes[path] else fill(leaf, shapes[path]) for path, leaf in flat.items()}
    )


def shapes_at(table: AxisTable, params: Params, widths: Mapping[Site, int]) -> dict[Path, tuple[int, ...]]:
    """The shape of every parameter at other widths; see `resize`. Of the parameters only the shapes are read."""
    shapes = {}
    for path, leaf in flatten(params).items():
        axes = axes_of(table, path)
        wanted = {
            KINDS[site.kind][-1]: count
            for site, count in widths.items()
            if path[: len(site.module)] == site.module and has_units(axes, site.kind)
        }
        shapes[path] = tuple(wanted.get(name, size) for name, size in zip(axes, leaf.shape, strict=True))
    return shapes


def fill(array: Any, shape: Sequence[int]) -> np.ndarray:
    """An array of another shape: what there is room for, then zeros."""
    filled, common = np.zeros(shape, array.dtype), tuple(map(slice, map(min, array.shape, shape)))
    if filled.size:
        filled[common] = np.asarray(array)[common]
    return filled


def open_gates(model: AnyModel, params: Params, kinds: tuple[str, ...] = UNITS) -> Gates:
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


def check_gates(model: AnyModel, params: Params, gates: Mapping[str, Any], *, rows: int | None = None) -> None:
    """Refuses gates `[units]` or `[rows, units]` that do not belong to these parameters.

    Raises:
        TypeError: If `gates` is not a dict of arrays.
        ValueError: Naming every unknown site, every wrong number of units or rows, or sites that share a parameter.
    """
    _check_arrays("gates", gates)
    expected = widths(model.axes, params, KINDS)
    problems = []
    for name, gate in gates.items():
        if name not in expected:
            problems.append(f"{name} is not a site")
        elif gate.ndim not in (1, 2):
            problems.append(f"{name} has {gate.ndim} axes, expected [units] or [batch, units]")
        elif gate.shape[-1] != expected[name]:
            problems.append(f"{name} has {gate.shape[-1]} gates for {expected[name]} units")
        elif gate.ndim == 2 and rows is not None and gate.shape[0] != rows:
            problems.append(f"{name} has gates for {gate.shape[0]} examples, the batch has {rows}")
    if problems:
        raise ValueError(f"gates do not fit the parameters: {'; '.join(problems)}. Sites: {_some(expected)}.")
    check_sharing(model.axes, params, gates)


def mean_shapes(table: AxisTable, params: Params) -> dict[str, tuple[int, ...]]:
    """The shapes of what closed units are replaced by, for every site whose units a kernel reads.

    It is `[units]`, and `[heads, channels]` for heads. Of the parameters only the shapes are read.
    """
    flat = flatten(params)
    return {
        place.site.name: _merged(flat[place.reader].shape, axes_of(table, place.reader), place.site.kind)[:-1]
        for place in _places(table, flat, KINDS)
        if place.reader is not None
    }


def check_means(model: AnyModel, params: Params, means: Mapping[str, Any]) -> None:
    """Refuses values for closed units, `[units]` or for heads `[heads, channels]`, that do not fit these parameters.

    Raises:
        TypeError: If `means` is not a dict of arrays.
        ValueError: Naming every unknown site, every one whose units have no means, and every wrong shape.
    """
    _check_arrays("means", means)
    places = [site.name for site in sites(model.axes, params, KINDS)]
    expected = mean_shapes(model.axes, params)
    problems = [f"{name} is not a site" for name in means if name not in places]
    for name, mean in means.items():
        if name in places and name not in expected:
            problems.append(f"{name} has none: no kernel reads its units")
        elif name in expected and mean.shape != expected[name]:
            problems.append(f"{name} has shape {tuple(mean.shape)}, expected {expected[name]}")
    if problems:
        raise ValueError(f"means do not fit the parameters: {'; '.join(problems)}. Sites: {_some(places)}.")


def _check_arrays(what: str, entries: Any) -> None:
    if not isinstance(entries, Mapping):
        raise TypeError(f"{what} must be a dict from site name to array, got {type(entries).__name__}.")
    other = [f"{name} is a {type(value).__name__}" for name, value in entries.items() if not hasattr(value, "ndim")]
    if other:
        raise TypeError(f"{what} must be arrays, but {'; '.join(other)}: use jnp.asarray.")


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

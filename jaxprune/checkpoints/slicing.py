"""Reads a model's parameters from its files and compacts them on the way, so that the dense model never is in memory.

The result has the bits that `compact` gives for the dense parameters. One array, or one module where means are folded
in, is read, cut and put on the device before the next one is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import jax
import numpy as np

from jaxprune.checkpoints.weights import Parameter, read_arrays
from jaxprune.compaction import compact_site
from jaxprune.models import Model
from jaxprune.units import KINDS, Params, Site, sites, unflatten
from jaxprune.units import Path as ParamPath


def shapes_of(parameters: list[Parameter]) -> Params:
    """The shapes of parameters that were not read yet, in the place of the arrays."""
    return unflatten({own.path: jax.ShapeDtypeStruct(own.shape, np.float32) for own in parameters})


def read_compacted(
    model: Model,
    parameters: list[Parameter],
    gates: Mapping[str, np.ndarray],
    means: Mapping[str, np.ndarray],
    dtype: np.dtype | None,
    folder: Path,
) -> Params:
    """Reads the parameters without the units whose gate is 0.

    Equals `compact(model, convert(parameters, dtype, folder), gates, means)`, bit by bit. Besides the result at most
    one dense module is in memory.

    Args:
        model: The architecture.
        parameters: What to read, in the order of `flatten`.
        gates: Site name to gates, float32 `[units]`, which fit the parameters.
        means: Site name to what its closed units are replaced by; a missing one is zero.
        dtype: The type of the arrays; None is each tensor's own.
        folder: For the error.

    Raises:
        ValueError: Naming every tensor with a value that is NaN, infinite or too large for `dtype`, even where it is
            cut away.
    """
    gated: dict[ParamPath, list[Site]] = {}
    for site in sites(model.axes, shapes_of(parameters), KINDS):
        if site.name in gates:
            gated.setdefault(site.module, []).append(site)

    def module(path: ParamPath) -> ParamPath:
        """The gated module that a parameter belongs to; none is at the root."""
        return next((path[:size] for size in range(len(path)) if path[:size] in gated), ())

    def together(path: ParamPath) -> ParamPath:
        """What is the same for arrays that must be cut together: means go through a kernel into a bias."""
        place = module(path)
        return place if any(site.name in means for site in gated.get(place, ())) else path

    def cut(arrays: dict[ParamPath, np.ndarray]) -> dict[ParamPath, np.ndarray]:
        place = module(next(iter(arrays)))
        local = {path[len(place) :]: array for path, array in arrays.items()}
        for site in gated.get(place, ()):  # each cuts other arrays: there is one kind of unit per tensor
            arrays |= compact_site(model.axes, local, site, gates[site.name], means.get(site.name))
        return arrays

    flat: dict[ParamPath, jax.Array] = {}
    for _, read in groupby(read_arrays(parameters, dtype, folder), lambda item: together(item[0])):
        for path, array in cut(dict(read)).items():  # no name here keeps a dense array alive
            flat[path] = jax.device_put(array)
    return unflatten(flat)

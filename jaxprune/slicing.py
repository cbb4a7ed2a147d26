"""Reads a model's parameters from its files and compacts them on the way, so that the dense model never is in memory.

The result has the bits that `compact` gives for the dense parameters. One module is read, cut and put on the device
before the next one is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import jax
import numpy as np

from jaxprune.compaction import compact_site
from jaxprune.gates import KINDS, Params, Site, sites, unflatten
from jaxprune.gates import Path as ParamPath
from jaxprune.models import Model
from jaxprune.weights import Parameter, read_arrays


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

    Equals `compact(model, convert(parameters, dtype, folder), gates, means)`, bit by bit. Besides the result one dense
    module is in memory at a time.

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
        """The gated module that a parameter belongs to; of any other parameter its own path."""
        return next((path[:size] for size in range(len(path)) if path[:size] in gated), path)

    flat: dict[ParamPath, jax.Array] = {}
    for place, read in groupby(read_arrays(parameters, dtype, folder), lambda item: module(item[0])):
        arrays = dict(read)
        local = {path[len(place) :]: array for path, array in arrays.items()}
        for site in gated.get(place, ()):  # each cuts other arrays: there is one kind of unit per tensor
            arrays |= compact_site(model.axes, local, site, gates[site.name], means.get(site.name))
        flat |= {path: jax.device_put(array) for path, array in arrays.items()}
    return unflatten(flat)

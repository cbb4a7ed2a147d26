"""The file `pruning.json` of a pruned model: which of the dense model's units stay, and how they were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.checkpoints.files import read_json
from jaxprune.units import Gates

PRUNING = "pruning.json"


def read_pruning(path: str | Path) -> dict[str, Any]:
    """The record that `save` wrote of how a model was pruned.

    Raises:
        FileNotFoundError: If the folder has no such record.
        ValueError: If it cannot be read.
    """
    file = Path(path) / PRUNING
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: the model was not pruned, or not saved by jaxprune.")
    return read_json(file)


def units_record(remaining: Mapping[str, np.ndarray], had: Mapping[str, int]) -> dict[str, Any]:
    """The part of the record that says which units stay.

    Args:
        remaining: Site name to the indices of the units that stay, rising.
        had: Site name to the number of units before.
    """
    return {
        "units": {"had": sum(had.values()), "kept": sum(len(index) for index in remaining.values())},
        "sites": {
            name: {"had": had[name], "kept": len(index), "which": _ranges(index)} for name, index in remaining.items()
        },
    }


def kept_units(name: str, site: Any) -> tuple[int, np.ndarray]:
    """The number of units that a site had, and those that stay, from its entry: `{"had": 12, "which": "0-3,7"}`.

    Raises:
        ValueError: If the entry says something else.
    """
    try:
        pairs = [part.split("-") for part in site["which"].split(",") if part]
        units = [unit for pair in pairs for unit in range(int(pair[0]), int(pair[-1]) + 1)]
        fits = units == sorted(set(units)) and (not units or units[-1] < site["had"])
    except (KeyError, TypeError, ValueError, AttributeError):
        units, fits = [], False
    if not fits:
        raise ValueError(f"pruning.json says of {name} {str(site)[:80]!r}: expected the units it had, and which stay.")
    return int(site["had"]), np.asarray(units, int)


def recorded_gates(record: Mapping[str, Any]) -> Gates:
    """The gates of a record: 1 where a unit stays and 0 elsewhere.

    Raises:
        ValueError: If the record does not say which units stay.
    """
    sites = {name: kept_units(name, site) for name, site in record["sites"].items()}
    return {
        name: jnp.asarray(np.isin(np.arange(had), units).astype(np.float32)) for name, (had, units) in sites.items()
    }


def _ranges(index: np.ndarray) -> str:
    """Sorted whole numbers in short: `0-3,7`."""
    runs = np.split(index, np.flatnonzero(np.diff(index) > 1) + 1) if len(index) else []
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)

"""Says how a pruned model was made, in a record that JSON can hold: settings, digests, and which units stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxprune.checkpoints.folder import digest
from jaxprune.checkpoints.gate_file import units_record
from jaxprune.pruning.selection import Values, parts_of

if TYPE_CHECKING:
    from jaxprune.scoring.scores import Scores


def pruning_record(scores: Scores | Values, gates: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Says how a pruned model was made, for `save(..., pruning=...)`.

    Args:
        scores: The scores that were selected by.
        gates: What `select` returned.
        **settings: The arguments of `select`, such as `flops=0.5, length=128`, and what else is worth keeping.
            Functions are recorded by name.

    Returns:
        A dict that JSON can hold: the settings, the header of the scores without the keys of single examples, digests
        of scores, means and gates, and for every site the units it had, how many it keeps and which (`"0-3,7"`; a unit
        with a fractional gate is kept).

    Raises:
        TypeError: If a setting cannot be written as JSON.
    """
    values, header = parts_of(scores)
    means = None if isinstance(scores, Mapping) else scores.means
    arrays = {name: np.asarray(gate) for name, gate in gates.items()}
    kept = {name: np.flatnonzero(gate) for name, gate in arrays.items()}
    for name, value in values.items():  # a site without gates is open
        kept.setdefault(name, np.arange(len(value)))
    had = {name: len(arrays[name]) if name in arrays else len(values[name]) for name in kept}
    return {
        "settings": {name: _plain(value, name) for name, value in settings.items()},
        "scores": {name: _plain(value, name) for name, value in header.items() if name != "rows"},
        "digests": {
            "scores": digest(dict(values)),
            "means": digest(means) if means else None,  # what closed units are replaced by; None is zero
            "gates": digest(arrays),
        },
        **units_record(kept, had),
    }


def _plain(value: Any, name: str) -> Any:
    """A value as JSON can hold it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, name) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax
        return np.asarray(value).tolist()
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    raise TypeError(f"{name} cannot be written as JSON: {value!r}.")

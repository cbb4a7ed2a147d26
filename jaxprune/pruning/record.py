"""Builds the record of a pruning, which `checkpoints/gates.py` stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune.checkpoints.gates import PRUNING, kept_units, units_record
from jaxprune.checkpoints.tensors import params_digest
from jaxprune.models import Model
from jaxprune.models.cost import Length, flops, memory, parameters, prunable_parameters
from jaxprune.pruning.budgets import NAMES, Budget, Rules
from jaxprune.pruning.recoveries import RecoveryReport
from jaxprune.pruning.selection import Values, parts_of
from jaxprune.scoring.scores import Scores
from jaxprune.units import Params, widths

COUNTED = ("units", "prunable_parameters", "parameters", "memory", "flops", "file_bytes")


def pruning_record(
    scores: Scores | Values,
    gates: Mapping[str, Any],
    budget: Budget | None = None,
    rules: Rules | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Says how a pruned model was made, for `save(..., pruning=...)`.

    Args:
        scores: The scores that were selected by.
        gates: What `select` returned.
        budget: The budget, and
        rules: the rules that were selected by.
        **more: What else is worth keeping. Functions are recorded by name.

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
    remaining = {name: np.flatnonzero(gate) for name, gate in arrays.items()}
    for name, value in values.items():  # a site without gates is open
        remaining.setdefault(name, np.arange(len(value)))
    had = {name: len(arrays[name]) if name in arrays else len(values[name]) for name in remaining}
    kept = _kept_gates(remaining, had)
    whole = kept.keys() == arrays.keys() and all(np.array_equal(kept[name], arrays[name]) for name in kept)
    return {
        "settings": {name: _plain(value, name) for name, value in settings_of(budget, rules, **more).items()},
        "scores": {name: _plain(value, name) for name, value in header.items()},
        "digests": {
            "scores": params_digest(dict(values)),
            "means": params_digest(means) if means else None,  # what closed units are replaced by; None is zero
            "gates": params_digest(arrays),
            **({} if whole else {"sites": params_digest(kept)}),  # what `sites` says, where that is not the gates
        },
        **units_record(remaining, had),
    }


def _kept_gates(remaining: Mapping[str, np.ndarray], had: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Gates that are 1 where a unit stays and 0 elsewhere."""
    gates = {name: np.zeros(units, np.float32) for name, units in had.items()}
    for name, units in remaining.items():
        gates[name][units] = 1.0
    return gates


def check_record(record: Mapping[str, Any]) -> None:
    """Refuses a record whose sites are not those that its digest of the gates is of.

    Raises:
        ValueError: If it does not say which units stay, or says something else than when it was written.
    """
    digests = record.get("digests")
    expected = digests.get("sites", digests.get("gates")) if isinstance(digests, Mapping) else None
    units = {name: kept_units(name, site) for name, site in record.get("sites", {}).items()}
    had, remaining = {name: unit[0] for name, unit in units.items()}, {name: unit[1] for name, unit in units.items()}
    if expected and expected != params_digest(_kept_gates(remaining, had)):
        raise ValueError(
            f"{PRUNING} names other units than when it was written: its sites have not the digest that it holds of "
            "them. Take the file from where the model came from, or prune again."
        )


def settings_of(budget: Budget | None = None, rules: Rules | None = None, **more: Any) -> dict[str, Any]:
    """A budget and rules in one flat dict, as records hold them."""
    amounts = {} if budget is None else dict.fromkeys((*NAMES, "length")) | budget.settings()
    return amounts | ({} if rules is None else rules.settings()) | more


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


def recovery_record(report: RecoveryReport) -> dict[str, Any]:
    """A recovery as records hold it."""
    modules = {it.module: {"before": it.before, "after": it.after, "chosen": it.chosen} for it in report.modules}
    left_out = {"cut_off": report.cut_off} if report.cut_off else {}
    return {"method": report.method, "examples": report.examples, **left_out, "modules": modules}


def costs(model: Model, params: Params, length: Length) -> dict[str, Any]:
    """The costs of a model by count, for examples of so many tokens."""
    return {
        "units": sum(widths(model.axes, params).values()),
        "prunable_parameters": prunable_parameters(model, params),
        "parameters": parameters(params),
        "memory": memory(params),
        "flops": flops(model, params, length),
        "length": length,
    }


def ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """The fraction that remains of everything that is counted."""
    return {name: after[name] / before[name] for name in COUNTED if before.get(name)}


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Costs before and after, the fractions that remain, and speed-ups by FLOPs and as measured at each batch size."""
    measured = [{"batch": timing["batch"], "speedup": timing["speedup"]} for timing in after.get("latency", ())]
    theoretical = before["flops"] / after["flops"] if after["flops"] else None
    speedup = {"theoretical": theoretical, "measured": measured}
    return {"before": before, "after": after, "kept": ratios(before, after), "speedup": speedup}

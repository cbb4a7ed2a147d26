"""One model for several tasks under one budget: their scores pooled, or the union or intersection of what each keeps.

Whatever the way, what stays costs at most the budget, a larger budget keeps all of a smaller one, and every setting of
`select` holds for the result, but one: `per_layer` says how each task selects by itself. So a union keeps more, and an
intersection less, in layers where the tasks differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxprune.budgets.provenance import pruning_record
from jaxprune.checkpoint import digest, load
from jaxprune.commands.accounting import Account, Accounting, account_for
from jaxprune.commands.planning import Tables, asked_of_table, met, outcome, settle, timed
from jaxprune.commands.pruning import check_scope, facts_of, measure_both, recovery_record, write_pruned
from jaxprune.commands.workflow import (
    Data,
    Measuring,
    Recovering,
    Scoring,
    Selection,
    Watch,
    check_folder,
    repair,
    score_once,
    try_selection,
)
from jaxprune.compaction import compact
from jaxprune.data.batches import Length
from jaxprune.evaluation import fitting_head
from jaxprune.formats.files import file_stem
from jaxprune.gates import Gates, Params
from jaxprune.models import Model
from jaxprune.recovery import check_method
from jaxprune.scores import Scores, check_same_model, load_scores
from jaxprune.selection import Values, select, site_costs, some, thresholds
from jaxprune.tasks import Task, remove_leaks

Way: TypeAlias = Callable[..., Gates]  # (model, params, scores of every task, **arguments of `select`) -> gates


def pooled(model: Model, params: Params, scores: Sequence[Values], **settings: Any) -> Gates:
    """Selects by the mean of the tasks' scores, each divided by its total, so that every task weighs the same."""
    return select(model, params, mean_scores(scores), **settings)


def kept_by_any(model: Model, params: Params, scores: Sequence[Values], **settings: Any) -> Gates:
    """The union of what the tasks keep, each at the same budget of its own: the largest that fits.

    Every task by itself keeps a unit from some budget on (`thresholds`). The union of the selections at a budget `b` of
    each task holds the units whose smallest threshold is at most `b`. So units are taken in the order of that until the
    budget of the union is spent, without a search for `b`, which is the smaller the more the tasks differ. Units with
    the same threshold, the last ones, may be taken for some of the tasks alone.
    """
    return _in_order(model, params, scores, np.minimum, settings)


def kept_by_all(model: Model, params: Params, scores: Sequence[Values], **settings: Any) -> Gates:
    """The intersection of what the tasks keep, each at the same budget of its own: the largest that fits.

    As `kept_by_any`, in the order of the largest threshold: the budgets of the tasks are larger than that of the
    intersection, which spends its budget nevertheless.
    """
    return _in_order(model, params, scores, np.maximum, settings)


def _in_order(
    model: Model, params: Params, scores: Sequence[Values], combine: np.ufunc, settings: Mapping[str, Any]
) -> Gates:
    """Keeps units in the order of their smallest or largest threshold, as many as the budget pays for."""
    rounding = {"multiple_of": None, "floor": settings.get("floor")}  # units are rounded once, in the end
    found = [thresholds(model, params, own, **{**settings, **rounding}) for own in scores]
    names = ("units", "parameters", "flops", "memory", "memory_bytes")
    (kind,) = (name.removesuffix("_bytes") for name in names if settings.get(name) is not None)
    costs = site_costs(model, params, kind, settings.get("length"))
    merged = {  # divided by their costs, as units that compete are, these have the order that is wanted
        site: (1.0 - combine.reduce([own[site] for own in found])) * costs[site] for site in scores[0]
    }
    return select(model, params, merged, **{**settings, "per_layer": False, "normalise": None})


def mean_scores(scores: Sequence[Values]) -> dict[str, np.ndarray]:
    """The mean of several tasks' scores, each divided by the sum of their sizes (by 1 if that is 0)."""
    arrays = [{site: np.asarray(value, np.float64) for site, value in own.items()} for own in scores]
    totals = [sum(float(np.abs(value).sum()) for value in own.values()) or 1.0 for own in arrays]
    return {
        site: np.mean([own[site] / total for own, total in zip(arrays, totals, strict=True)], axis=0)
        for site in arrays[0]
    }


def mean_closed(scores: Sequence[Scores]) -> Gates | None:
    """What closed units are replaced by in a model for several tasks: the mean of the tasks' own.

    Raises:
        ValueError: If some of the scores replace closed units by means and others by zero, or at other sites.
    """
    means = [own.means or {} for own in scores]
    if len({frozenset(own) for own in means}) > 1:
        raise ValueError("some scores replace closed units by means, others by zero: score all with the same --closed.")
    return {site: jnp.mean(jnp.stack([own[site] for own in means]), axis=0) for site in means[0]} or None


def mean_length(scores: Sequence[Scores]) -> Length:
    """Tokens per example, every task weighing the same."""
    return np.mean([np.asarray(own.header["mean_length"], np.float64) for own in scores], axis=0).tolist()


def union(*gates: Mapping[str, Any]) -> Gates:
    """Open where any of several tasks' gates are: what all of the tasks together need. Contains each of them.

    Raises:
        ValueError: If there are none, they are of other sites or numbers of units, or a gate is neither 0 nor 1.
    """
    return {name: jnp.asarray(np.maximum.reduce(own)) for name, own in _same_sites(gates).items()}


def intersection(*gates: Mapping[str, Any]) -> Gates:
    """Open where all of several tasks' gates are: what each of the tasks needs. Contained in each of them.

    Raises:
        ValueError: If there are none, they are of other sites or numbers of units, or a gate is neither 0 nor 1.
    """
    return {name: jnp.asarray(np.minimum.reduce(own)) for name, own in _same_sites(gates).items()}


def _same_sites(gates: tuple[Mapping[str, Any], ...]) -> dict[str, list[np.ndarray]]:
    """Several gates, site by site."""
    if not gates:
        raise ValueError("give gates of at least one task.")
    arrays = [{name: np.asarray(gate, np.float32) for name, gate in own.items()} for own in gates]
    shapes = [{name: gate.shape for name, gate in own.items()} for own in arrays]
    names = dict.fromkeys(name for own in arrays for name in own)
    wrong = [
        f"{name} has the shapes {', '.join(str(own.get(name, 'none')) for own in shapes)}"
        for name in names
        if len({own.get(name) for own in shapes}) > 1
    ]
    wrong += [
        f"{name} holds {gate[~np.isin(gate, (0, 1))][0]}, expected 0 or 1"
        for own in arrays
        for name, gate in own.items()
        if not np.isin(gate, (0, 1)).all()
    ]
    if wrong:
        raise ValueError(f"these gates do not go together: {some(wrong)}.")
    return {name: [own[name] for own in arrays] for name in arrays[0]}


def prune_together(
    source: str,
    output: Path,
    selection: Selection,
    *,
    scored: Sequence[Path] | Scoring,
    tasks: Sequence[Data],
    way: Way = pooled,
    recovering: Recovering | None = None,
    accounting: Accounting | None = None,
    measuring: Measuring,
    tables: Tables | None = None,
    overwrite: bool = False,
    watch: Watch,
) -> dict[str, Any]:
    """Prunes a model for several tasks under one budget, writes its folder and compares the two on every task.

    FLOPs are counted at the mean of the tasks' lengths. If the tasks are scored, rows that one of them holds out are
    dropped from what the others are scored on, and the scores are kept beside the folder, as
    `OUTPUT.TASK.scores.safetensors`: the same command goes on after those that are finished.

    Args:
        source: The model.
        output: The folder to write.
        selection: The budget of what stays, and how it is selected.
        scored: A score file for each task, or how to score `tasks`.
        tasks: What to score, if there are no score files, and what to test before and after.
        way: How several tasks become one selection: `pooled`, `kept_by_any` (union) or `kept_by_all` (intersection).
        recovering: How what is left is repaired; None: it stays as it was.
        accounting: How the receipts of the tasks are made; None: there are none.
        measuring: What is measured.
        tables: The latency tables, for a budget of latency; only `pooled` can have one.
        overwrite: Whether a folder that is there is replaced.
        watch: Shows the progress.

    Returns:
        The record, as of `prune_model`; what is of one task stands in `tasks`.

    Raises:
        ValueError: If two tasks or files are the same, or the scores are not of one model and the same sites.
    """
    check_folder(output, overwrite)
    if accounting is not None and accounting.rounds:
        raise ValueError("several tasks have several losses: units are selected again by the receipt of one task only.")
    files = [] if isinstance(scored, Scoring) else list(scored)
    if twice := [file for i, file in enumerate(files) if file.resolve() in [it.resolve() for it in files[:i]]]:
        raise ValueError(f"{twice[0]} is named twice: name files of different tasks.")
    scores = [load_scores(file) for file in files]
    if scores:
        check_same_model(dict(zip(map(str, files), scores, strict=True)))
    for each in scores or [scored]:
        check_scope(each, selection)
    if selection.by_latency and way is not pooled:
        raise ValueError("a latency budget for several tasks needs pooled scores (--together pooled): it has no order.")
    model, params = load(source)
    try_selection(model, params, selection)
    if recovering is not None:
        check_method(model, params, recovering.method)
    loaded = _load_all(model, tasks, measuring.head)
    if accounting is not None:
        _check_named(scores, loaded)
    if isinstance(scored, Scoring):
        loaded, leaks = remove_leaks(loaded)
        for (task, other), count in leaks.items():
            watch.say(f"{task}: {count:,} rows dropped, held out in {other}")
        files = [output.with_name(f"{output.name}.{file_stem(task.name)}.scores.safetensors") for task in loaded]
        pairs = zip(loaded, files, strict=True)
        scores = [score_once(model, params, task, scored, file, watch) for task, file in pairs]
    select(model, params, scores[0], units=1.0)  # refuses scores of another model

    length, table = settle(model, params, selection, tables, mean_length(scores), watch)
    settings = {**selection.arguments(), "length": length}
    means, head = mean_closed(scores), model.head(scores[0].header["head"]).name
    each = [own.values for own in scores]
    tried = met(
        lambda **budget: way(model, params, each, **{**settings, **budget}, table=table),
        table,
        model,
        params,
        each[0],
        selection,
        means,
        head,
        measuring,
        watch,
    )
    by_table = asked_of_table(selection, tried).arguments() | {"length": length}
    gates = way(model, params, each, **by_table, table=table)
    small = compact(model, params, gates, means)
    accounts: list[Account] = []
    if accounting is not None:
        named = {task.name: task for task in loaded}
        for own in scores:
            task = named[own.header["task"]]
            accounts.append(account_for(model, params, task, own, gates, accounting, means=means, watch=watch))
    rows = {row for own in (*(it.header["rows"] for it in scores), *(it.rows for it in accounts)) for row in own}
    repaired = None
    if recovering is not None:
        small, repaired = repair(model, params, small, loaded, recovering, watch)
        rows |= set(repaired.rows)
    found = measure_both(model, params, small, loaded, length, head, rows, timed(measuring, table), watch)
    pruning = pruning_record(Scores(scores[0].values, _header(scores), means), gates, **settings, together=way)
    pruning["digests"]["scores"] = [digest(dict(own.values)) for own in scores]
    if repaired is not None:
        pruning["recovery"] = recovery_record(repaired)
    if accounts:
        pruning["receipts"] = [own.record for own in accounts]
    record = {
        "command": "prune",
        "source": source,
        "output": str(output),
        "recovery": pruning.get("recovery"),
        "receipts": pruning.get("receipts"),
        "together": pruning["settings"]["together"],
        "tasks": [facts_of(model, file, own) for file, own in zip(files, scores, strict=True)],
        **outcome(table, model, params, small, selection, tried, found),
    }
    return write_pruned(output, model, small, pruning, record, found, overwrite=overwrite)


def _load_all(model: Model, tasks: Sequence[Data], head: str | None) -> Sequence[Task]:
    """Reads the rows of all tasks, which differ in their names and fit the model."""
    loaded = [data.load() for data in tasks]
    stems = [file_stem(task.name) for task in loaded]
    if len(set(stems)) < len(stems):
        given = ", ".join(data.task for data in tasks)
        raise ValueError(f"tasks must differ in their names, in those of files too; got {given}.")
    for task in loaded:
        fitting_head(model, task, head)
    return loaded


def _check_named(scores: Sequence[Scores], tasks: Sequence[Task]) -> None:
    """Refuses score files of tasks that have no rows here."""
    missing = {own.header["task"] for own in scores} - {task.name for task in tasks}
    if missing or not tasks:
        what = f" of {', '.join(sorted(missing))}" if missing else ""
        raise ValueError(f"there is nothing to make a receipt{what} with: name the tasks, or leave the receipt out.")


def _header(scores: Sequence[Scores]) -> dict[str, Any]:
    """What `pruning.json` says of several scores."""
    headers = [{name: value for name, value in own.header.items() if name != "rows"} for own in scores]
    return {"model": headers[0]["model"], "versions": headers[0]["versions"], "tasks": headers}

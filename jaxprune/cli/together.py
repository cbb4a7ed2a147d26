"""Prunes a model folder for several tasks under one budget, and compares the two on every task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from jaxprune.checkpoints.files import file_stem
from jaxprune.checkpoints.folder import check_destination, digest, load
from jaxprune.cli.accounting import Account, Accounting, account_for
from jaxprune.cli.planning import Tables, asked_of_table, met, outcome, settle, timed
from jaxprune.cli.pruning import check_scope, facts_of, measure_both, recovery_record, write_pruned
from jaxprune.cli.workflow import Data, Measuring, Watch, score_once
from jaxprune.compaction import compact
from jaxprune.data.tasks import Task, remove_leaks
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import Length
from jaxprune.pruning.budgets import Budget, Latency, Rules
from jaxprune.pruning.pooling import mean_closed, mean_length, pooled
from jaxprune.pruning.record import pruning_record
from jaxprune.pruning.recovery import Recovery, check_method, recover
from jaxprune.pruning.selection import check_selection
from jaxprune.scoring.run import Scoring
from jaxprune.scoring.scores import Scores, check_same_model, check_scores, load_scores
from jaxprune.units import Gates

Way: TypeAlias = Callable[..., Gates]  # (model, params, scores of every task, **arguments of `select`) -> gates


def prune_together(
    source: str,
    output: Path,
    budget: Budget,
    rules: Rules,
    *,
    length: Length | None = None,
    scored: Sequence[Path] | Scoring,
    tasks: Sequence[Data],
    way: Way = pooled,
    recovery: Recovery | None = None,
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
        budget: How much may stay.
        rules: How units are chosen within the budget.
        length: Tokens of an example; None: the mean of the tasks.
        scored: A score file for each task, or how to score `tasks`.
        tasks: What to score, if there are no score files, and what to test before and after.
        way: How several tasks become one selection: `pooled`, `kept_by_any` (union) or `kept_by_all` (intersection).
        recovery: How what is left is repaired; None: it stays as it was.
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
    check_destination(output, overwrite)
    if accounting is not None and accounting.rounds:
        raise ValueError("several tasks have several losses: units are selected again by the receipt of one task only.")
    files = [] if isinstance(scored, Scoring) else list(scored)
    if twice := [file for i, file in enumerate(files) if file.resolve() in [it.resolve() for it in files[:i]]]:
        raise ValueError(f"{twice[0]} is named twice: name files of different tasks.")
    scores = [load_scores(file) for file in files]
    if scores:
        check_same_model(dict(zip(map(str, files), scores, strict=True)))
    for each in scores or [scored]:
        check_scope(each, rules)
    if isinstance(budget, Latency) and way is not pooled:
        raise ValueError("a latency budget for several tasks needs pooled scores (--together pooled): it has no order.")
    model, params = load(source)
    check_selection(model, params, budget, rules)
    if recovery is not None:
        check_method(model, params, recovery.method)
    loaded = _load_all(model, tasks, measuring.head, watch)
    if accounting is not None:
        _check_named(scores, loaded)
    if isinstance(scored, Scoring):
        loaded, leaks = remove_leaks(loaded)
        for (task, other), count in leaks.items():
            watch.say(f"{task}: {count:,} rows dropped, held out in {other}")
        files = [output.with_name(f"{output.name}.{file_stem(task.name)}.scores.safetensors") for task in loaded]
        pairs = zip(loaded, files, strict=True)
        scores = [score_once(model, params, task, scored, file, watch) for task, file in pairs]
    check_scores(model, params, scores[0])

    length, budget = settle(model, params, budget, tables, mean_length(scores), watch, length)
    means, head = mean_closed(scores), model.head(scores[0].header["head"]).name
    choose = partial(way, model, params, scores, rules=rules)
    tried = met(choose, budget, rules, model, params, scores[0], means, head, measuring, watch)
    gates = choose(asked_of_table(budget, tried))
    small = compact(model, params, gates, means)
    accounts: list[Account] = []
    if accounting is not None:
        named = {task.name: task for task in loaded}
        for own in scores:
            task = named[own.header["task"]]
            accounts.append(account_for(model, params, task, own, gates, accounting, means=means, watch=watch))
    rows = {row for own in (*(it.header["rows"] for it in scores), *(it.rows for it in accounts)) for row in own}
    repaired = None
    if recovery is not None:
        small, repaired = recover(model, params, small, loaded, recovery, progress=watch.open("recovering"))
        rows |= set(repaired.rows)
    found = measure_both(model, params, small, loaded, length, head, rows, timed(measuring, budget), watch)
    record_scores = Scores(scores[0].values, _header(scores), means)
    pruning = pruning_record(record_scores, gates, budget, rules, length=length, together=way)
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
        **outcome(budget, model, params, small, tried, found),
    }
    return write_pruned(output, model, small, pruning, record, found, overwrite=overwrite)


def _load_all(model: Model, tasks: Sequence[Data], head: str | None, watch: Watch) -> Sequence[Task]:
    """Reads the rows of all tasks, which differ in their names and fit the model."""
    loaded = [data.load(watch) for data in tasks]
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

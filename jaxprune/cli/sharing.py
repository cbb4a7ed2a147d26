"""Sharing a model among tasks: score files and a budget in, one folder with the gates of every task out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune.checkpoints.files import check_file
from jaxprune.checkpoints.folder import check_destination, load
from jaxprune.checkpoints.gate_file import GATES, read
from jaxprune.checkpoints.shared import add_gates, check_new, save_shared
from jaxprune.cli.workflow import Watch, stored_type
from jaxprune.compaction import compact
from jaxprune.models import Model
from jaxprune.models.cost import file_size
from jaxprune.pruning.budgets import Budget, Latency, Rules
from jaxprune.pruning.prune import check_scope
from jaxprune.pruning.record import costs, pruning_record, ratios
from jaxprune.pruning.selection import check_selection, select
from jaxprune.scoring.scores import Scores, check_scores, load_scores
from jaxprune.units import Params


def share_model(
    source: str,
    scored: Sequence[Path],
    budget: Budget,
    rules: Rules,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    watch: Watch,
) -> dict[str, Any]:
    """Selects for every task by itself, within the budget, and writes the gates of all beside one copy of the weights.

    Args:
        source: The model.
        scored: A score file of the model for each task.
        budget: How much may stay for each task.
        rules: How units are chosen within the budget.
        output: The folder to write; None adds the tasks to `source`, itself a shared folder.
        overwrite: Whether a folder that is there is replaced; without `output` whether tasks are.
        watch: Shows the progress.

    Returns:
        The record: per task its units, costs before and after, and the bytes of its gates.

    Raises:
        FileExistsError: If the folder, or in a shared folder one of the tasks, is there and may not be replaced.
        ValueError: If two score files are of one task, or they are not of this model.
    """
    if output is not None:
        check_destination(output, overwrite)
    files: dict[str, Path] = {}
    scores: dict[str, Scores] = {}
    for file in scored:
        own = load_scores(file)
        task = own.header["task"]
        if task in files:
            raise ValueError(f"{files[task]} and {file} are both of task {task!r}: name one score file per task.")
        files[task], scores[task] = file, own
    if output is None:
        check_new(Path(source).expanduser(), scores, overwrite)
        check_file(Path(source).expanduser() / GATES, True)
    for own in scores.values():
        check_scope(own.header["criterion"], rules)
    model, params = load(source)
    for task, own in scores.items():
        check_selection(model, params, budget, rules, own.values)
        try:
            check_scores(model, params, own)
        except ValueError as error:
            raise ValueError(f"{files[task]}: {error}") from error
    gates, records, rows = {}, {}, []
    for task, own in scores.items():
        settled = budget.with_length(own.header["mean_length"])
        if isinstance(settled, Latency):
            bar = watch.open("measuring modules") if settled.table is None else None
            settled = settled.measured(model, params, bar)
        gates[task] = select(model, params, own, settled, rules=rules)
        records[task] = pruning_record(own, gates[task], settled, rules)
        small = compact(model, params, gates[task], own.means)
        rows.append(_row(model, params, small, task, files[task], own, records[task]))
    what: dict[str, Any] = {"means": {task: own.means for task, own in scores.items()}, "records": records}
    if output is None:
        folder = add_gates(Path(source).expanduser(), gates, overwrite=overwrite, **what)
    else:
        kind = stored_type(model)
        folder = save_shared(output, model, params, gates, overwrite=overwrite, dtype=kind, **what)
    written = read(folder / GATES)
    for row in rows:
        row["gates_bytes"] = written.tasks[row["task"]].bits.nbytes
        row["means_bytes"] = written.tasks[row["task"]].values.nbytes
    return {
        "command": "share",
        "source": source,
        "output": str(folder),
        "added": output is None,
        "model": written.model,
        "tasks": rows,
        "all_tasks": sorted(written.tasks),
        "gates_file_bytes": (folder / GATES).stat().st_size,
        "weights_file_bytes": file_size(folder),
    }


def _row(
    model: Model,
    params: Params,
    small: Params,
    task: str,
    file: Path,
    scores: Scores,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """What the record says of one task."""
    before, after = (costs(model, each, record["settings"]["length"]) for each in (params, small))
    before["units"], after["units"] = record["units"]["had"], record["units"]["kept"]  # channels, if they were cut
    return {
        "task": task,
        "scores": str(file),
        "criterion": scores.header["criterion"],
        "selection": record["settings"],
        "before": before,
        "after": after,
        "kept": ratios(before, after),
    }

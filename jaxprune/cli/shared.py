"""The commands that write a model in another form: share it among tasks, pack its zeros."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jaxprune as jp
from jaxprune.cli import terminal
from jaxprune.cli.options import (
    BudgetOptions,
    Folder,
    Json,
    ModelName,
    Overwrite,
    SelectionOptions,
    grouped,
    option,
)

if TYPE_CHECKING:
    from jaxprune.models import Model
    from jaxprune.pruning.budgets import Budget
    from jaxprune.scoring.scores import Scores
    from jaxprune.units import Params


@grouped
def share(
    model: ModelName,
    scores: Annotated[list[Path], option("A score file of the model, one per task.", "--scores", metavar="FILE")],
    budget: BudgetOptions,
    selection: SelectionOptions,
    output: Annotated[
        Path | None,
        option("The folder to write; without it the tasks are added to MODEL.", "--output", "-o", metavar="FOLDER"),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Puts many tasks into one folder: the weights once, and about a kilobyte of gates per task, each to the budget.

    Examples: [cyan]jaxprune share multi --scores sst2.safetensors --scores qnli.safetensors --flops 0.5 -o all[/cyan]
    [cyan]jaxprune share all --scores rte.safetensors --flops 0.3[/cyan] adds a task, the weights stay as they are.
    [cyan]jaxprune evaluate all#sst2 --task sst2[/cyan] takes the model of one task, as every command does.

    Gates only say which units stay: a repaired model (prune --recover) needs a separate folder.
    """
    with terminal.working() as bars:
        from jaxprune.checkpoints.files import check_file
        from jaxprune.checkpoints.folder import check_destination
        from jaxprune.checkpoints.gates import GATES, read_gates
        from jaxprune.checkpoints.shared import check_new
        from jaxprune.checkpoints.weights import stored_type
        from jaxprune.cli.render import tables
        from jaxprune.models.cost import file_size

        asked, rules = budget.build(selection.tokens()), selection.build()
        by_task = scores_by_task(scores)
        folder = Path(model).expanduser() if output is None else output
        if output is None:
            check_new(folder, by_task, overwrite)
            check_file(folder / GATES, True)
        else:
            check_destination(output, overwrite)
        loaded, params = jp.load(model)
        check_fit(loaded, params, by_task, dict(zip(by_task, scores, strict=True)), asked, rules)
        gates, records, rows = {}, {}, []
        for (task, each), file in zip(by_task.items(), scores, strict=True):
            gates[task], records[task], costs = select_for(loaded, params, each, asked, rules, bars)
            about = {"task": task, "scores": str(file), "criterion": each.header["criterion"]}
            rows.append(about | {"selection": records[task]["settings"]} | costs)
        more: dict[str, Any] = {"means": {task: each.means for task, each in by_task.items()}, "records": records}
        if output is None:
            jp.add_gates(folder, gates, overwrite=overwrite, **more)
        else:
            jp.save_shared(output, loaded, params, gates, overwrite=overwrite, dtype=stored_type(loaded), **more)
        written = read_gates(folder / GATES)
        for row in rows:
            stored = written.tasks[row["task"]]
            row |= {"gates_bytes": stored.bits.nbytes, "means_bytes": stored.values.nbytes}
        record = {
            "command": "share",
            "source": model,
            "output": str(folder),
            "added": output is None,
            "model": written.model,
            "tasks": rows,
            "all_tasks": sorted(written.tasks),
            "gates_file_bytes": (folder / GATES).stat().st_size,
            "weights_file_bytes": file_size(folder),
        }
    lines = (tables.share_note(record), "", f"Next: jaxprune inspect {folder}#{rows[0]['task']}")
    terminal.show(record, tables.share_table(record), *lines, as_json=as_json)


def scores_by_task(files: Sequence[Path]) -> dict[str, Scores]:
    """The scores in some files by their tasks, each of which has one file."""
    scores: dict[str, Scores] = {}
    for i, file in enumerate(files):
        each = jp.load_scores(file)
        task = each.header["task"]
        if task in scores:
            other = files[list(scores).index(task)]
            raise ValueError(f"{other} and {files[i]} are both of task {task!r}: name one score file per task.")
        scores[task] = each
    return scores


def check_fit(
    model: Model, params: Params, scores: dict[str, Scores], files: dict[str, Path], budget: Budget, rules: jp.Rules
) -> None:
    """Refuses scores of another model, and budgets and rules that do not fit, before anything is measured."""
    from jaxprune.pruning.prune import check_scope
    from jaxprune.pruning.selection import check_selection
    from jaxprune.scoring.scores import check_scores

    for task, each in scores.items():
        check_scope(each.properties, rules)
        check_selection(model, params, budget, rules, each.values)
        try:
            check_scores(model, params, each)
        except ValueError as error:
            raise ValueError(f"{files[task]}: {error}") from error


def select_for(
    model: Model, params: Params, scores: Scores, budget: Budget, rules: jp.Rules, bars: terminal.Bars
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The gates of one task, the record of its pruning, and the costs before and after."""
    from jaxprune.cli.pruning import both_costs
    from jaxprune.pruning.record import ratios

    budget = budget.with_length(scores.header["mean_length"])
    if isinstance(budget, jp.budgets.Latency):
        budget = budget.measured(model, params, bars.open("measuring modules") if budget.table is None else None)
    gates = jp.select(model, params, scores, budget, rules=rules)
    record = jp.pruning_record(scores, gates, budget, rules)
    costs = both_costs(model, params, jp.compact(model, params, gates, scores.means), record)
    return gates, record, costs | {"kept": ratios(costs["before"], costs["after"])}


@grouped
def pack(
    model: ModelName,
    output: Folder,
    values: Annotated[str, option("Keep every bit, or round the layers to a byte.", metavar="exact|int8")] = "exact",
    unpack: Annotated[bool, option("Write a dense file instead.", "--unpack")] = False,
    half: Annotated[bool, option("Cast the weights to half precision first.", "--half")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Writes a sparse model without its zeros, and shows what that saves; every command reads it as before.

    Examples: [cyan]jaxprune pack sparse -o packed[/cyan] keeps every bit.
    [cyan]jaxprune pack packed --unpack -o dense[/cyan] gives them back, for programs that read dense files.
    """
    with terminal.working():
        if values not in ("exact", "int8"):
            raise ValueError(f"--values is exact or int8, got {values!r}.")
        if unpack and values != "exact":
            raise ValueError("--values says how to pack, but --unpack writes a dense file: give one of them.")
        from jaxprune.checkpoints.folder import check_destination
        from jaxprune.cli.render import tables
        from jaxprune.models.cost import file_size
        from jaxprune.sparse.masks import sparsity_of
        from jaxprune.sparse.patterns import linear_maps

        stored: dict[str, Any] = {"packed": None if unpack else values, "dtype": "float16" if half else None}
        check_destination(output, overwrite)
        loaded, params = jp.load(model, dtype=None)
        folder = Path(loaded.source or model)
        extra, pruning = _other_files(folder)
        before = file_size(folder)  # now: the output may be the same folder
        jp.save(output, loaded, params, pruning=pruning, overwrite=overwrite, extra=extra, **stored)
        sparsity, after = sparsity_of(params, linear_maps(loaded)), file_size(output)
        record = {
            "command": "pack",
            "source": model,
            "output": str(output),
            "values": stored["packed"],
            "dtype": stored["dtype"],
            "linear_weights": sparsity.size,
            "density": 1 - sparsity.zeros / sparsity.size if sparsity.size else None,
            "before": {"file": before},
            "after": {"file": after},
            "ratios": {"file": before / after},
        }
    lines = (tables.storage_note(record), f"Model: {output}")
    terminal.show(record, tables.storage_table(record), *lines, as_json=as_json)


def _other_files(folder: Path) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """The files that `save` wrote into a folder beside the model, and the record of the pruning."""
    from jaxprune.checkpoints.files import read_json
    from jaxprune.checkpoints.gates import PRUNING, read_pruning
    from jaxprune.checkpoints.tensors import COMPRESSED
    from jaxprune.checkpoints.weights import CONFIG, WEIGHTS

    listed = read_json(folder / CONFIG).get("jaxprune", {}).get("files", [])
    written = (CONFIG, WEIGHTS, WEIGHTS + COMPRESSED, PRUNING)
    others = (name for name in listed if isinstance(name, str) and name not in written)
    names = [name for name in others if Path(name).name == name]
    extra = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if PRUNING not in listed:
        return extra, None
    return extra, {name: value for name, value in read_pruning(folder).items() if name != "pruned"}

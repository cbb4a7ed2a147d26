"""The commands that write a model in another form: share it among tasks, pack its zeros."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from jaxprune.pruning.budgets import Budget, Rules
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
        from jaxprune.cli.render import tables

        chosen = budget.build(selection.tokens()), selection.build()
        record = share_model(model, scores, *chosen, output, overwrite=overwrite, bars=bars)
    lines = (tables.share_note(record), "", f"Next: jaxprune inspect {record['output']}#{record['tasks'][0]['task']}")
    terminal.show(record, tables.share_table(record), *lines, as_json=as_json)


def share_model(
    source: str,
    scored: Sequence[Path],
    budget: Budget,
    rules: Rules,
    output: Path | None,
    *,
    overwrite: bool,
    bars: terminal.Bars,
) -> dict[str, Any]:
    """Selects for every task by itself, within the budget, and writes the gates of all beside one copy of the weights.

    Without an output the tasks are added to the source, itself a shared folder, and `overwrite` replaces tasks there.
    """
    from jaxprune.checkpoints.files import check_file
    from jaxprune.checkpoints.folder import check_destination, load
    from jaxprune.checkpoints.gates import GATES, read_gates
    from jaxprune.checkpoints.shared import add_gates, check_new, save_shared
    from jaxprune.checkpoints.weights import stored_type
    from jaxprune.models.cost import file_size

    scores = scores_by_task(scored)
    folder = Path(source).expanduser() if output is None else output
    if output is None:
        check_new(folder, scores, overwrite)
        check_file(folder / GATES, True)
    else:
        check_destination(output, overwrite)
    model, params = load(source)
    check_fit(model, params, scores, dict(zip(scores, scored, strict=True)), budget, rules)
    gates, records, rows = {}, {}, []
    for (task, each), file in zip(scores.items(), scored, strict=True):
        gates[task], records[task], costs = select_for(model, params, each, budget, rules, bars)
        about = {"task": task, "scores": str(file), "criterion": each.header["criterion"]}
        rows.append(about | {"selection": records[task]["settings"]} | costs)
    more: dict[str, Any] = {"means": {task: each.means for task, each in scores.items()}, "records": records}
    if output is None:
        add_gates(folder, gates, overwrite=overwrite, **more)
    else:
        save_shared(output, model, params, gates, overwrite=overwrite, dtype=stored_type(model), **more)
    written = read_gates(folder / GATES)
    for row in rows:
        task = written.tasks[row["task"]]
        row |= {"gates_bytes": task.bits.nbytes, "means_bytes": task.values.nbytes}
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


def scores_by_task(files: Sequence[Path]) -> dict[str, Scores]:
    """The scores in some files by their tasks, each of which has one file."""
    from jaxprune.scoring.scores import load_scores

    scores: dict[str, Scores] = {}
    for i, file in enumerate(files):
        each = load_scores(file)
        task = each.header["task"]
        if task in scores:
            other = files[list(scores).index(task)]
            raise ValueError(f"{other} and {files[i]} are both of task {task!r}: name one score file per task.")
        scores[task] = each
    return scores


def check_fit(
    model: Model, params: Params, scores: dict[str, Scores], files: dict[str, Path], budget: Budget, rules: Rules
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
    model: Model, params: Params, scores: Scores, budget: Budget, rules: Rules, bars: terminal.Bars
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The gates of one task, the record of its pruning, and the costs before and after."""
    from jaxprune.compaction import compact
    from jaxprune.pruning.budgets import Latency
    from jaxprune.pruning.record import costs, pruning_record, ratios
    from jaxprune.pruning.selection import select

    budget = budget.with_length(scores.header["mean_length"])
    if isinstance(budget, Latency):
        budget = budget.measured(model, params, bars.open("measuring modules") if budget.table is None else None)
    gates = select(model, params, scores, budget, rules=rules)
    record = pruning_record(scores, gates, budget, rules)
    small, length = compact(model, params, gates, scores.means), record["settings"]["length"]
    before, after = costs(model, params, length), costs(model, small, length)
    before["units"], after["units"] = record["units"]["had"], record["units"]["kept"]  # channels, if they were cut
    return gates, record, {"before": before, "after": after, "kept": ratios(before, after)}


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
        from jaxprune.cli.render import tables

        stored = {"packed": None if unpack else values, "dtype": "float16" if half else None}
        record = pack_model(model, output, overwrite=overwrite, **stored)
    lines = (tables.storage_note(record), f"Model: {output}")
    terminal.show(record, tables.storage_table(record), *lines, as_json=as_json)


def pack_model(source: str, output: Path, *, packed: Any, dtype: Any, overwrite: bool) -> dict[str, Any]:
    """Writes a model packed or dense, with all other files of its folder, and counts bytes before and after."""
    from jaxprune.checkpoints.folder import check_destination, load, save
    from jaxprune.models.cost import file_size
    from jaxprune.sparse.masks import sparsity_of
    from jaxprune.sparse.patterns import linear_maps

    check_destination(output, overwrite)
    model, params = load(source, dtype=None)
    folder = Path(model.source or source)
    extra, pruning = _other_files(folder)
    before = file_size(folder)  # now: the output may be the same folder
    save(output, model, params, pruning=pruning, overwrite=overwrite, dtype=dtype, extra=extra, packed=packed)
    sparsity, after = sparsity_of(params, linear_maps(model)), file_size(output)
    return {
        "command": "pack",
        "source": source,
        "output": str(output),
        "values": packed,
        "dtype": dtype,
        "linear_weights": sparsity.size,
        "density": 1 - sparsity.zeros / sparsity.size if sparsity.size else None,
        "before": {"file": before},
        "after": {"file": after},
        "ratios": {"file": before / after},
    }


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

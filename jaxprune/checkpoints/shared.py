"""One folder for many tasks: the dense weights once, and about a kilobyte of gates per task.

A shared folder is an ordinary model folder with `gates.safetensors` beside the weights, see
`jaxprune.checkpoints.gates`. `load(path)` gives the dense model, `load(path, task="sst2")` that of a task, cut
out as the weights are read.

Only what gates can say is shared: which units are closed, and what closed ones are replaced by. A model whose weights
were changed after pruning, by recovery or training, needs a separate folder (`save`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxprune.checkpoints.files import alone, write_atomic
from jaxprune.checkpoints.folder import check_belongs, opened, opened_digest, save, saved_digest, split_task
from jaxprune.checkpoints.gates import (
    GATES,
    GateFile,
    StoredGates,
    check_name,
    pack_gates,
    read_gates,
    read_pruning,
    to_bytes,
    units_record,
    unpack_gates,
)
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.checkpoints.weights import CONFIG, shapes_of
from jaxprune.models import Model
from jaxprune.units import Gates, Params

_SCORES = ("criterion", "task", "split", "head", "prompt", "examples", "keys")  # kept of a score file's header


class TaskGates(NamedTuple):
    """The part of a shared folder that belongs to one task."""

    gates: Gates  # 0 or 1; a missing site is open
    means: Gates | None  # what closed units are replaced by, 0 at open units; None is zero everywhere
    record: Mapping[str, Any]  # how the gates were made


def save_shared(
    path: str | Path,
    model: Model,
    params: Params,
    gates: Mapping[str, Mapping[str, Any]],
    *,
    means: Mapping[str, Mapping[str, Any] | None] | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    dtype: DTypeLike | None = None,
) -> Path:
    """Writes the dense model and the gates of several tasks. A crash leaves the folder that was there, or the new one.

    Then `load(path, task=task)[1]` equals `compact(*load(path), gates[task], means[task])`, bit by bit.

    Args:
        path: The folder.
        model: The model; the tokenizer's files are copied from where it was loaded.
        params: The dense parameters.
        gates: Task to gates of 0 and 1, such as `select` returns.
        means: Task to what its closed units are replaced by, such as `scores.means`; a missing one is zero.
        records: Task to how its gates were made, such as `pruning_record` returns. The criterion, the budget and the
            digest of the scores are kept; which units stay, the gates say.
        overwrite: Whether a folder that `save` wrote may be replaced, with all of its tasks. No other folder ever is.
        dtype: Type of the weights in the file: float32, bfloat16, float16, or None for each array's own.

    Returns:
        The path.

    Raises:
        FileExistsError: If something is there and may not be replaced.
        ValueError: If there is no task, or the name of one cannot be used; if gates or means do not fit the model, or
            cannot be shared; if a record is of another model, or of one that was repaired.
        TypeError: If a record cannot be written as JSON.
    """
    saved = saved_digest(model, params, dtype)
    known = {saved, model_digest(model, params)} if records else ()
    tasks = _stored(model, params, gates, means, records, known)
    content = to_bytes(GateFile(saved, tasks))
    return save(path, model, params, overwrite=overwrite, dtype=dtype, extra={GATES: content})


def add_gates(
    path: str | Path,
    gates: Mapping[str, Mapping[str, Any]],
    *,
    means: Mapping[str, Mapping[str, Any] | None] | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Adds tasks to a shared folder. The weights are not written again; the other tasks keep their bits.

    A crash leaves the gates that were there, or the new ones. Two processes that add to one folder take turns.

    Args:
        path: The folder.
        gates: Task to gates, as for `save_shared`, made with the model in this folder.
        means: Task to what its closed units are replaced by.
        records: Task to how its gates were made.
        overwrite: Whether a task that is there may be replaced.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If the folder is not a shared one.
        FileExistsError: If it has one of the tasks, which may not be replaced.
        ValueError: As `save_shared`; if the gates in the folder are damaged or belong to other weights.
    """
    folder = Path(path).expanduser()
    check_new(folder, gates, overwrite)
    with alone(folder / CONFIG), opened(folder) as files:
        file = check_new(folder, gates, overwrite)
        check_belongs(file, files)
        known = {file.model, opened_digest(files, None)} if records else ()
        tasks = _stored(files.model, shapes_of(files.parameters), gates, means, records, known)
        write_atomic(folder / GATES, to_bytes(GateFile(file.model, {**file.tasks, **tasks})))
    return Path(path)


def check_new(folder: Path, tasks: Collection[str], overwrite: bool) -> GateFile:
    """Refuses to add tasks to a folder that has them, unless they may be replaced; gives the gates that it has.

    Raises:
        FileNotFoundError: If the folder is not a shared one.
        FileExistsError: If it has one of the tasks.
        ValueError: If the gates in the folder are damaged.
    """
    file = read_gates(folder / GATES)
    if (taken := sorted(set(tasks) & set(file.tasks))) and not overwrite:
        raise FileExistsError(f"{folder} has gates of {', '.join(taken)} already: replace them with --overwrite.")
    return file


def load_gates(path: str | Path) -> dict[str, TaskGates]:
    """Reads the gates of all tasks of a shared folder, to be used with its dense model.

    One dense model in memory can serve all tasks: `model.apply(params, batch, gates)` computes what the smaller model
    does, and takes one row of gates per example, but saves no time.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: If the folder is not a shared one.
        ValueError: If the gates are damaged, or belong to other weights.
    """
    with opened(path) as files:
        file = read_gates(files.folder / GATES)
        check_belongs(file, files)
        shapes = shapes_of(files.parameters)
        tasks = {}
        for name, stored in sorted(file.tasks.items()):
            gates, means = (
                None if part is None else {site: jnp.asarray(array) for site, array in part.items()}
                for part in unpack_gates(files.model, shapes, stored)
            )
            tasks[name] = TaskGates(gates or {}, means, stored.record)
    return tasks


def task_record(path: str | Path, task: str) -> dict[str, Any]:
    """The record that `read_pruning` would give of a task's model if it had a separate folder."""
    folder = Path(path)
    file = read_gates(folder / GATES)
    stored = file.task(task, folder / GATES)
    with opened(folder) as files:
        gates, _ = unpack_gates(files.model, shapes_of(files.parameters), stored)
    remaining = {name: np.flatnonzero(gate) for name, gate in gates.items()}
    settings, scores = (
        dict(part) if isinstance(part := stored.record.get(name), Mapping) else {} for name in ("settings", "scores")
    )
    units = units_record(remaining, {name: len(gate) for name, gate in gates.items()})
    return {"settings": settings, "scores": scores | {"model": file.model}, **units}


def pruning_of(source: str, model: Model) -> dict[str, Any] | None:
    """The record of the pruning of a model that was loaded from `source`, a shared folder's task or not."""
    task = split_task(source)[1]
    if model.source is not None and task is not None:
        return task_record(model.source, task)
    try:
        return None if model.source is None else read_pruning(model.source)
    except FileNotFoundError:
        return None


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a pruning record that is kept with the gates: what they do not say themselves."""
    short = {name: value for name, value in record.items() if name not in ("units", "sites")}
    if isinstance(settings := short.get("settings"), Mapping):
        short["settings"] = {name: value for name, value in settings.items() if value not in (None, [])}
    if isinstance(scores := short.get("scores"), Mapping):
        tasks = (
            {"tasks": [_made(header) for header in scores["tasks"]]} if "tasks" in scores else {}
        )  # of several together
        short["scores"] = _made(scores) | tasks
    if isinstance(digests := short.get("digests"), Mapping):
        short["digests"] = {name: value for name, value in digests.items() if name == "scores"}
    return short


def _made(header: Mapping[str, Any]) -> dict[str, Any]:
    return {name: header[name] for name in _SCORES if header.get(name) is not None}


def _stored(
    model: Model,
    params: Params,
    gates: Mapping[str, Mapping[str, Any]],
    means: Mapping[str, Mapping[str, Any] | None] | None,
    records: Mapping[str, Mapping[str, Any]] | None,
    known: Collection[str],
) -> dict[str, StoredGates]:
    """The gates of several tasks, after everything that cannot be shared was refused."""
    means, records = means or {}, records or {}
    if not gates:
        raise ValueError("gates must be of at least one task, got none.")
    if unknown := sorted({*means, *records} - set(gates)):
        raise ValueError(f"means or records are of tasks without gates: {', '.join(unknown)}.")
    tasks = {}
    for task, task_gates in gates.items():
        check_name(task)
        record = records.get(task, {})
        _check_record(task, record, bool(means.get(task)), known)
        try:
            tasks[task] = pack_gates(model, params, task_gates, means.get(task), brief(record))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"task {task!r}: {error}") from error
    return tasks


def _check_record(task: str, record: Mapping[str, Any], with_means: bool, known: Collection[str]) -> None:
    """Refuses a record that says that gates alone do not make this model; `known` are digests of the model."""
    scores, digests = (part if isinstance(part := record.get(name), Mapping) else {} for name in ("scores", "digests"))
    if record.get("recovery"):
        raise ValueError(
            f"task {task!r} was repaired after pruning, so its weights are not those that are shared: give it a folder "
            "of its own (jp.save, `jaxprune prune`), or share its gates without the repair."
        )
    if scores.get("model") and scores["model"] not in known:
        raise ValueError(
            f"the gates of task {task!r} were made with another model ({scores['model'][:12]}): score the one that is "
            "shared, as `load` gives it."
        )
    if digests.get("means") and not with_means:
        raise ValueError(
            f"closed units of task {task!r} are replaced by means: give them, too (means={{{task!r}: scores.means}})."
        )

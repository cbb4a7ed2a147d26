"""Pruning by command: loads a model, prunes it, writes the folder of the smaller one, and compares the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxprune.checkpoints.folder import check_destination, load, save, split_task
from jaxprune.cli.planning import predicted
from jaxprune.cli.render.cards import CARD, model_card
from jaxprune.cli.workflow import (
    Data,
    Measuring,
    Watch,
    measure,
    measure_latency,
    speedups,
    stored_type,
)
from jaxprune.data.tasks import Task
from jaxprune.models import Model
from jaxprune.models.cost import Length, file_size
from jaxprune.pruning.budgets import Budget, Latency
from jaxprune.pruning.prune import Pruned, Pruning, State, prune
from jaxprune.pruning.record import costs, ratios
from jaxprune.scoring.scores import Scores, check_same_model, load_scores
from jaxprune.units import KINDS, Params


def prune_model(
    source: str,
    output: Path,
    budget: Budget,
    pruning: Pruning,
    *,
    tasks: Sequence[Data] = (),
    scored: Sequence[Path] = (),
    measuring: Measuring,
    overwrite: bool = False,
    watch: Watch,
) -> dict[str, Any]:
    """Prunes a model for one or several tasks, writes its folder and compares the two.

    With score files in `scored`, nothing is scored, and `tasks` are only needed to test, to repair and to measure the
    loss. Otherwise scores are kept beside the folder, as `State` says, for the same command after an interruption and
    for other budgets. A budget of latency is measured in the end.
    """
    check_destination(output, overwrite)
    if twice := [file for i, file in enumerate(scored) if file.resolve() in [it.resolve() for it in scored[:i]]]:
        raise ValueError(f"{twice[0]} is named twice: name files of different tasks.")
    scores = [load_scores(file) for file in scored]
    if scores:
        check_same_model(dict(zip(map(str, scored), scores, strict=True)))
    model, params = load(source)
    loaded = [data.load(watch) for data in tasks]
    state = State(output, overwrite)
    pruned = prune(model, params, loaded, budget, pruning, scores=scores or None, state=state, watch=watch)
    files = list(scored) or state.score_files(loaded)
    found = _measure_both(model, params, pruned, loaded, measuring, watch)
    record = pruned.record
    together = record["settings"].get("together")
    facts = [_facts(model, file, each) for file, each in zip(files, pruned.scores, strict=True)]
    complete = {
        "command": "prune",
        "source": source,
        "output": str(output),
        "recovery": record.get("recovery"),
        **{name: record[name] for name in ("receipt", "receipts", "rounds") if name in record},
        **({"together": together, "tasks": facts} if together else facts[0]),
        **_latency_budget(model, params, pruned, found),
    }
    complete = _write(output, model, pruned, complete, found, overwrite=overwrite)
    state.remove()
    return complete


def _facts(model: Model, file: Path, scores: Scores) -> dict[str, Any]:
    """The task and its scores, for the record and the model card."""
    header, prompt = scores.header, scores.header.get("prompt")
    head = model.head(header["head"])
    return {
        "scores": str(file),
        "task": header["task"],
        "criterion": header["criterion"],
        "head": head.name,
        "labels": prompt["labels"] if prompt else list(head.labels),
        "prompt": prompt,
        "spans": head.spans,
        "examples": header["examples"],
    }


def _measure_both(
    model: Model, params: Params, pruned: Pruned, tasks: Sequence[Task], measuring: Measuring, watch: Watch
) -> dict[str, Any]:
    """The costs and the quality of a model before and after pruning; rows that were read for it are not tested on."""
    length: Length = pruned.record["settings"]["length"]
    models = {"before": params, "after": pruned.params}
    found = {name: costs(model, each, length) for name, each in models.items()}
    if tasks and measuring.evaluate:
        for name, each in models.items():
            results = []
            for task in tasks:
                bar = watch.open(f"testing {name}" if len(tasks) == 1 else f"testing {name}, {task.name}")
                results.append(measure(model, each, task, measuring, bar, exclude=pruned.rows).to_json())
            found[name] |= {"evaluation": results[0]} if len(tasks) == 1 else {"evaluations": results}
    if isinstance(pruned.budget, Latency) and pruned.budget.table is not None:
        batch = pruned.budget.table.conditions.batch
        if batch not in measuring.batches:
            measuring = replace(measuring, batches=(batch, *measuring.batches))
    if measuring.batches:
        head = model.head(pruned.scores[0].header["head"]).name
        latencies = measure_latency(model, [params, pruned.params], length, head, measuring, watch)
        for name, each in zip(models, latencies, strict=True):
            found[name]["latency"] = [{**timing._asdict(), "speedup": speedup} for timing, speedup in each]
    return found


def _latency_budget(model: Model, params: Params, pruned: Pruned, found: Mapping[str, Any]) -> dict[str, Any]:
    """For a budget of latency, what was asked for, predicted and measured."""
    budget, met = pruned.budget, pruned.latency
    if met is None or not isinstance(budget, Latency) or budget.table is None:
        return {}
    batch = budget.table.conditions.batch
    before, after = (next(it for it in found[name]["latency"] if it["batch"] == batch) for name in ("before", "after"))
    measured = {
        "before": before["least"],
        "after": after["least"],
        "ratio": after["least"] / before["least"],
        "median_ratio": 1.0 / after["speedup"],
    }
    tries = [{"asked": it.asked, "measured": it.measured} for it in met.tries]
    more = {"measured": measured, "tries": tries, "best": met.best}
    return {"latency_budget": predicted(budget.table, model, params, pruned.params, budget) | more}


def _write(
    output: Path, model: Model, pruned: Pruned, record: Mapping[str, Any], found: dict[str, Any], *, overwrite: bool
) -> dict[str, Any]:
    """Writes the folder of a pruned model, with `pruning.json` and a card, and completes its record."""
    pruning, before, after = pruned.record, found["before"], found["after"]
    before["units"], after["units"] = pruning["units"]["had"], pruning["units"]["kept"]  # channels, if they were cut
    named = {name.rpartition(".")[2] for name in pruning["sites"]}
    complete = {
        **record,
        "kinds": [kind for kind in KINDS if kind in named],
        "selection": pruning["settings"],
        "before": before,
        "after": after,
        "kept": ratios(before, after),
        "speedup": speedups(before, after),
        "widths": {name: [site["had"], site["kept"]] for name, site in pruning["sites"].items()},
        "versions": pruning["scores"]["versions"],
    }
    on_hub = not Path(split_task(record["source"])[0]).expanduser().is_dir()
    save(
        output,
        model,
        pruned.params,
        pruning={**pruning, "results": found},
        overwrite=overwrite,
        dtype=stored_type(model),
        extra={CARD: model_card(complete, on_hub=on_hub).encode()},
    )
    for name, folder in (("before", model.source), ("after", output)):
        found[name]["file_bytes"] = None if folder is None else file_size(folder)
    return complete | {"kept": ratios(before, after)}

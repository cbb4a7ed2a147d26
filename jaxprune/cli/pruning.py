"""Pruning for one task: scores and a budget in, the folder of a smaller model out, compared with the dense one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxprune.checkpoints.folder import check_destination, load, save, split_task
from jaxprune.cli.accounting import Accounting, account_for, check_accounting
from jaxprune.cli.planning import Tables, asked_of_table, met, outcome, settle, timed
from jaxprune.cli.render.cards import CARD, model_card
from jaxprune.cli.workflow import (
    Data,
    Measuring,
    Watch,
    costs,
    kinds_of,
    measure,
    measure_latency,
    ratios,
    score_once,
    speedups,
    stored_type,
)
from jaxprune.compaction import compact
from jaxprune.data.tasks import Task
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import Length, file_size
from jaxprune.pruning.budgets import Budget, Rules
from jaxprune.pruning.record import pruning_record
from jaxprune.pruning.recovery import Recovery, RecoveryReport, check_method, recover
from jaxprune.pruning.selection import check_selection, select
from jaxprune.scoring.baselines import TopLayers
from jaxprune.scoring.run import Scoring
from jaxprune.scoring.scores import Scores, check_scores, describe, load_scores
from jaxprune.units import KINDS, Params


def prune_model(
    source: str,
    output: Path,
    budget: Budget,
    rules: Rules,
    *,
    length: Length | None = None,
    scored: Path | Scoring,
    data: Data | None = None,
    recovery: Recovery | None = None,
    accounting: Accounting | None = None,
    measuring: Measuring,
    tables: Tables | None = None,
    overwrite: bool = False,
    watch: Watch,
) -> dict[str, Any]:
    """Prunes a model, writes its folder and compares the two.

    With `scored` a score file, nothing is scored; a tokenizer is needed only to evaluate. Otherwise `data` is scored,
    and the scores are kept beside the folder, as `OUTPUT.scores.safetensors`, for the same command after an
    interruption and for other budgets. A budget of latency goes by one of the `tables`, and is measured in the end.
    With `accounting` the rows that were scored say what the selection loses, and perhaps lead to a better one.
    """
    check_destination(output, overwrite)
    kept = scored if isinstance(scored, Path) else output.with_name(f"{output.name}.scores.safetensors")
    scores = load_scores(scored) if isinstance(scored, Path) else None
    check_scope(scored if scores is None else scores, rules)
    check_accounting(scored if scores is None else scores, accounting)
    if accounting is not None and data is None:
        raise ValueError("there is nothing to make a receipt with: name the task, or leave the receipt out.")
    model, params = load(source)
    check_selection(model, params, budget, rules, kinds_of(model, params, scored if scores is None else scores))
    if recovery is not None:
        check_method(model, params, recovery.method)
    task = None if data is None else data.load(watch)
    if task is not None:
        fitting_head(model, task, measuring.head)
    if isinstance(scored, Scoring):
        if task is None:
            raise ValueError("there is nothing to score with: name a task, or a score file.")
        scores = score_once(model, params, task, scored, kept, watch)
    if scores is None:
        raise TypeError(f"scored must be a Path or Scoring, got {type(scored).__name__}.")
    head = model.head(scores.header["head"]).name
    check_scores(model, params, scores)
    length, budget = settle(model, params, budget, tables, scores.header["mean_length"], watch, length)
    choose = partial(select, model, params, scores, rules=rules)
    tried = met(choose, budget, rules, model, params, scores, scores.means, head, measuring, watch)
    choose = partial(select, model, params, budget=asked_of_table(budget, tried), rules=rules)
    gates, account = choose(scores), None
    if accounting is not None and task is not None:
        account = account_for(model, params, task, scores, gates, accounting, choose=choose, watch=watch)
        gates = account.gates
    small = compact(model, params, gates, scores.means)

    tasks, rows, repaired = [] if task is None else [task], scores.header["rows"], None
    if recovery is not None:
        small, repaired = recover(model, params, small, tasks, recovery, progress=watch.open("recovering"))
        rows = sorted({*rows, *repaired.rows})
    if account is not None:
        rows = sorted({*rows, *account.rows})
    found = measure_both(model, params, small, tasks, length, head, rows, timed(measuring, budget), watch)
    pruning = pruning_record(scores, gates, budget, rules, length=length)
    if repaired is not None:
        pruning["recovery"] = recovery_record(repaired)
    if account is not None:
        pruning["receipt"] = account.record
    record = {
        "command": "prune",
        "source": source,
        "output": str(output),
        "recovery": pruning.get("recovery"),
        "receipt": pruning.get("receipt"),
        **facts_of(model, kept, scores),
        **outcome(budget, model, params, small, tried, found),
    }
    return write_pruned(output, model, small, pruning, record, found, overwrite=overwrite)


def facts_of(model: Model, file: Path, scores: Scores) -> dict[str, Any]:
    """What the record and the model card say of a task and its scores."""
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


def recovery_record(found: RecoveryReport) -> dict[str, Any]:
    """What `pruning.json` and the record say of a recovery."""
    modules = {own.module: {"before": own.before, "after": own.after, "chosen": own.chosen} for own in found.modules}
    return {"method": found.method, "examples": found.examples, "modules": modules}


def measure_both(
    model: Model,
    params: Params,
    small: Params,
    tasks: Sequence[Task],
    length: Length,
    head: str,
    scored: Collection[str],
    measuring: Measuring,
    watch: Watch,
) -> dict[str, Any]:
    """What a model costs and does before and after pruning; `scored` are rows that must not be tested on."""
    models = {"before": params, "after": small}
    found = {name: costs(model, own, length) for name, own in models.items()}
    if tasks and measuring.evaluate:
        for name, own in models.items():
            results = []
            for task in tasks:
                bar = watch.open(f"testing {name}" if len(tasks) == 1 else f"testing {name}, {task.name}")
                results.append(measure(model, own, task, measuring, bar, exclude=scored).to_json())
            found[name] |= {"evaluation": results[0]} if len(tasks) == 1 else {"evaluations": results}
    if measuring.batches:
        latencies = measure_latency(model, [params, small], length, head, measuring, watch)
        for i, name in enumerate(models):
            found[name]["latency"] = [{**own._asdict(), "speedup": speedup} for own, speedup in latencies[i]]
    return found


def write_pruned(
    output: Path,
    model: Model,
    small: Params,
    pruning: Mapping[str, Any],
    record: Mapping[str, Any],
    found: dict[str, Any],
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Writes the folder of a pruned model, with `pruning.json` and a card, and completes its record."""
    before, after = found["before"], found["after"]
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
        "widths": {name: [own["had"], own["kept"]] for name, own in pruning["sites"].items()},
        "versions": pruning["scores"]["versions"],
    }
    on_hub = not Path(split_task(record["source"])[0]).expanduser().is_dir()
    save(
        output,
        model,
        small,
        pruning={**pruning, "results": found},
        overwrite=overwrite,
        dtype=stored_type(model),
        extra={CARD: model_card(complete, on_hub=on_hub).encode()},
    )
    for name, folder in (("before", model.source), ("after", output)):
        found[name]["file_bytes"] = None if folder is None else file_size(folder)
    return complete | {"kept": ratios(before, after)}


def check_scope(scored: Any, rules: Rules) -> None:
    """Refuses scores that cannot be selected by like this."""
    criterion = scored.header["criterion"] if isinstance(scored, Scores) else describe(scored.criterion)
    if rules.per_layer and criterion["name"] == TopLayers.__name__:
        raise ValueError(
            "top-layers ranks layers, and all units within a layer alike: let all layers compete (--global in the "
            "command line, per_layer=False in Python)."
        )

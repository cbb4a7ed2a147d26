"""What a budget would do to a model before it is done, and what a budget of latency did: predicted beside measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.checkpoints.folder import load, outline
from jaxprune.cli.workflow import (
    Measuring,
    Watch,
    costs,
    kinds_of,
    ratios,
    speedups,
    whole_tokens,
)
from jaxprune.compaction import compact, compacted_shapes
from jaxprune.models import Model
from jaxprune.models.cost import Length
from jaxprune.pruning.budgets import Budget, Latency, Rules
from jaxprune.pruning.latency import (
    LatencyTable,
    Met,
    check_table,
    compare_latency,
    conditions,
    kept_table,
    meet,
    read_table,
    table_file,
)
from jaxprune.pruning.loss import predict_loss
from jaxprune.pruning.record import objective_name, pruning_record
from jaxprune.pruning.selection import Values, check_selection, least_latency, select
from jaxprune.scoring.scores import Scores, check_scores, load_scores
from jaxprune.units import KINDS, Gates, Params, sites, widths

TRIES = 4  # selections by a budget of latency that are measured at most


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Where latency tables are."""

    folder: Path  # where they are kept, and found again
    file: Path | None = None  # one of them, instead
    batch: int | None = None  # examples per pass; None: those of `file`, else 1


def settle(
    model: Model,
    params: Params,
    budget: Budget,
    tables: Tables | None,
    scored: Length,
    watch: Watch,
    length: Length | None = None,
) -> tuple[Length, Budget]:
    """The tokens of an example that count, and the budget with them and with its latency table, measured if needed.

    Args:
        model: The architecture.
        params: The parameters to be pruned.
        budget: The budget.
        tables: Where latency tables are.
        scored: Mean tokens of the examples that were scored.
        watch: Shows the progress.
        length: Tokens that count instead.

    Raises:
        ValueError: If there is no place for tables, or the one that is named is of another device, model, batch or
            length.
    """
    asked, length = length, scored if length is None else length
    if not isinstance(budget, Latency):
        return length, budget.with_length(length)
    if tables is None:
        raise ValueError("a latency budget needs tables=, the folder where latency tables are kept.")
    if tables.batch is not None and tables.batch < 1:
        raise ValueError(f"the batch of a latency budget must be at least 1, got {tables.batch}.")
    if tables.file is None:
        tokens, bar = whole_tokens(model, length), watch.open("measuring modules")
        table = kept_table(tables.folder, model, params, batch=tables.batch or 1, length=tokens, progress=bar)
        return length, replace(budget, table=table)
    table = read_table(tables.file)
    check_table(table, model, params)
    own = table.conditions
    wanted = own.length if asked is None else whole_tokens(model, asked)
    if (tables.batch or own.batch, wanted) != (own.batch, own.length):
        raise ValueError(
            f"{tables.file} is for {own.batch} examples of {own.length} tokens, but {tables.batch or own.batch} of "
            f"{wanted} are asked for: name another table, or none to have one measured."
        )
    return own.length, replace(budget, table=table)


def timed(measuring: Measuring, budget: Budget) -> Measuring:
    """The same, with the batch of the latency table among those that are timed."""
    table = budget.table if isinstance(budget, Latency) else None
    if table is None or table.conditions.batch in measuring.batches:
        return measuring
    return replace(measuring, batches=(table.conditions.batch, *measuring.batches))


def met(
    choose: Callable[[Budget], Gates],
    budget: Budget,
    rules: Rules,
    model: Model,
    params: Params,
    scores: Scores | Values,
    means: Gates | None,
    head: str,
    measuring: Measuring,
    watch: Watch,
) -> Met | None:
    """Selections by a budget of latency that were measured, each beside the dense model; see `meet`.

    Args:
        choose: Selects by the budget that it is given.
        budget: The budget, with its table; another than latency needs no measurements.
        rules: How units are chosen within the budget.
        model: The architecture.
        params: The dense parameters.
        scores: Of the units; of several tasks any of them.
        means: What closed units are replaced by.
        head: The task head.
        measuring: How often passes are repeated.
        watch: Shows the progress.
    """
    if not isinstance(budget, Latency) or budget.table is None:
        return None
    table = budget.table
    dense = table.predict(widths(model.axes, params)) if budget.is_fraction else 1.0
    least = least_latency(model, params, scores, table, rules=rules)
    known, bar, count = table.conditions, watch.open("meeting the latency"), 0

    def measure(gates: Gates) -> float:
        nonlocal count
        pairs = [(model, params), (model, compact(model, params, gates, means))]
        batch, length = known.batch, known.length
        found = compare_latency(pairs, batch=batch, length=length, head=head, repeats=measuring.repeats).latencies
        count += 1
        bar(count, TRIES, f"{found[1].least * 1e3:.2f} ms")
        return found[1].least / (found[0].least if budget.is_fraction else 1.0)

    # one thousandth more than the least: what it is divided and multiplied by must not make it unreachable
    bounds = {"least": 1.001 * least / dense, "most": 1.0 if budget.is_fraction else math.inf}
    found = meet(lambda amount: choose(budget.at(amount)), measure, budget.amount, **bounds, tries=TRIES)
    bar(TRIES, TRIES)
    return found


def asked_of_table(budget: Budget, found: Met | None) -> Budget:
    """The budget that the table was asked for in the nearest try."""
    return budget if found is None else budget.at(found.tries[found.best].asked)


def outcome(
    budget: Budget,
    model: Model,
    params: Params,
    small: Params,
    tried: Met | None,
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """For the record of a pruning, what its budget of latency was, what was predicted and what was measured.

    Args:
        budget: The budget, with its table; of another than latency there is nothing to say.
        model: The architecture.
        params: The parameters before.
        small: And after.
        tried: The selections that were measured on the way.
        found: What was measured `before` and `after`.
    """
    if not isinstance(budget, Latency) or budget.table is None or tried is None:
        return {}
    batch = budget.table.conditions.batch
    before, after = (
        next(own for own in found[name]["latency"] if own["batch"] == batch) for name in ("before", "after")
    )
    measured = {
        "before": before["least"],
        "after": after["least"],
        "ratio": after["least"] / before["least"],
        "median_ratio": 1.0 / after["speedup"],
    }
    tries = [{"asked": own.asked, "measured": own.measured} for own in tried.tries]
    more = {"measured": measured, "tries": tries, "best": tried.best}
    return {"latency_budget": _predicted(budget.table, model, params, small, budget) | more}


def plan_model(
    source: str,
    scored: Path,
    budget: Budget,
    rules: Rules,
    *,
    length: Length | None = None,
    tables: Tables | None = None,
    memory: Path | None = None,
    watch: Watch,
) -> dict[str, Any]:
    """What `prune_model` would leave of a model. Shapes are enough; weights are loaded where a table may be missing.

    Nothing is written but the latency table then, and what is remembered.

    Args:
        source: The model.
        scored: Its score file.
        budget: How much may stay.
        rules: How units are chosen within the budget.
        length: Tokens of an example; None: the mean of those scored.
        tables: Where latency tables are. For other budgets the latency is predicted if there is a table already.
        memory: Folder where the digests of models are remembered, see `outline`.
        watch: Shows the progress.

    Returns:
        Widths per site and layer, counts before and after, predicted latency and loss of the objective, and the share
        of the scores that is kept, scores below zero counting as zero.
    """
    scores = load_scores(scored)
    model, params, digest = outline(source, memory=memory)  # shapes in the place of the parameters
    check_selection(model, params, budget, rules, kinds_of(model, params, scores))
    check_scores(model, params, scores, digest=digest)
    whole = load(source) if isinstance(budget, Latency) else (model, params)
    length, budget = settle(*whole, budget, tables, scores.header["mean_length"], watch, length)
    gates = select(model, params, scores, budget, rules=rules)
    small = compacted_shapes(model, params, gates)
    table = budget.table if isinstance(budget, Latency) else _known(model, params, length, tables)
    pruning = pruning_record(scores, gates, budget, rules, length=length)
    before, after = costs(model, params, length), costs(model, small, length)
    before["units"], after["units"] = pruning["units"]["had"], pruning["units"]["kept"]
    named = {name.rpartition(".")[2] for name in gates}
    record = {
        "command": "plan",
        "source": source,
        "scores": str(scored),
        "selection": pruning["settings"],
        "kinds": [kind for kind in KINDS if kind in named],
        "before": before,
        "after": after,
        "kept": ratios(before, after),
        "speedup": speedups(before, after),
        "widths": {name: [own["had"], own["kept"]] for name, own in pruning["sites"].items()},
        "layers": _layers(model, params, scores, gates),
        "latency": None if table is None else _predicted(table, model, params, small, budget),
        "objective": objective_name(model, scores),
        "prediction": predict_loss(scores, gates).to_json(),
    }
    record["score_kept"] = record["layers"][-1]["score_kept"]
    return record


def _predicted(table: LatencyTable, model: Model, params: Params, small: Params, budget: Budget) -> dict[str, Any]:
    """What a table says of a model before and after, and how far it is to be trusted."""
    before, after = (table.predict(widths(model.axes, own)) for own in (params, small))
    known = table.conditions
    asked = budget.settings() if isinstance(budget, Latency) else {}
    return {
        "asked": asked,
        "batch": known.batch,
        "length": known.length,
        "device": known.device,
        "predicted": {"before": before, "after": after, "ratio": after / before},
        "table": {
            "fixed": table.fixed,
            "scale": table.scale,
            "wholes": [{"predicted": predicted, "measured": measured} for predicted, measured in table.wholes],
            "rows": [
                {"sites": list(row.sites), "widths": list(row.widths), "seconds": list(row.seconds)}
                for row in table.rows
            ],
        },
    }


def _known(model: Model, params: Params, length: Length, tables: Tables | None) -> LatencyTable | None:
    """A table that was measured before."""
    if tables is None:
        return None
    known = conditions(model, params, batch=tables.batch or 1, length=whole_tokens(model, length))
    file = tables.file or table_file(tables.folder, known)
    table = read_table(file) if tables.file or file.is_file() else None
    if table is not None:
        check_table(table, model, params)
    return table


def _layers(model: Model, params: Params, scores: Scores, gates: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per layer, and in the end of all: units of every kind `[kept, had]`, and the share of the scores that is kept."""
    places = [site for site in sites(model.axes, params, KINDS) if site.name in gates]
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in places)]
    names = list(dict.fromkeys(site.layer_name for site in places))
    rows = []
    for name in (*names, None):
        own = [site for site in places if name in (None, site.layer_name)]
        had, kept = 0.0, 0.0
        for site in own:
            if site.name in scores.values:
                value = np.maximum(np.asarray(scores.values[site.name], np.float64), 0.0)
                had, kept = had + float(value.sum()), kept + float(value @ np.asarray(gates[site.name], np.float64))
        counts = {
            kind: [
                sum(int(np.asarray(gates[site.name]).sum()) for site in own if site.kind == kind),
                sum(len(gates[site.name]) for site in own if site.kind == kind),
            ]
            for kind in kinds
        }
        rows.append({"layer": "all" if name is None else name, **counts, "score_kept": kept / had if had else None})
    return rows

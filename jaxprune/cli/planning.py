"""The plan of a pruning: what a budget would leave of a model, and what that would cost, before it is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.checkpoints.folder import load, outline
from jaxprune.cli.workflow import Watch, speedups
from jaxprune.compaction import compacted_shapes
from jaxprune.models import Model
from jaxprune.models.cost import Length
from jaxprune.pruning.budgets import Budget, Latency, Rules
from jaxprune.pruning.latency import LatencyTable, check_table, conditions, read_table, table_file, whole_tokens
from jaxprune.pruning.loss import predict_loss
from jaxprune.pruning.record import costs, objective_name, pruning_record, ratios
from jaxprune.pruning.selection import check_selection, select
from jaxprune.scoring.scores import Scores, check_scores, load_scores
from jaxprune.units import KINDS, Params, sites, widths


def plan_model(
    source: str,
    scored: Path,
    budget: Budget,
    rules: Rules,
    *,
    timing: Latency | None = None,
    memory: Path | None = None,
    watch: Watch,
) -> dict[str, Any]:
    """Predicts what `prune_model` would leave of a model. Weights are loaded only where a latency table may be missing.

    Nothing is written but the latency table then, and what is remembered.

    Args:
        source: The model.
        scored: Its score file.
        budget: How much may stay.
        rules: How units are chosen within the budget.
        timing: A latency that is predicted beside another budget, if there is a table already.
        memory: Folder where the digests of models are remembered, see `outline`.
        watch: Shows the progress.

    Returns:
        Widths per site and layer, counts before and after, predicted latency and loss of the objective, and the share
        of the scores that is kept, scores below zero counting as zero.
    """
    scores = load_scores(scored)
    model, params, digest = outline(source, memory=memory)  # shapes in the place of the parameters
    check_selection(model, params, budget, rules, scores.values)
    check_scores(model, params, scores, digest=digest)
    length: Length = scores.header["mean_length"]
    budget = budget.with_length(length)
    if isinstance(budget, Latency):
        bar = watch.open("measuring modules") if budget.table is None else None
        budget = budget.measured(*load(source), bar)
    length = budget.length or length
    gates = select(model, params, scores, budget, rules=rules)
    small = compacted_shapes(model, params, gates)
    table = budget.table if isinstance(budget, Latency) else _known(timing, model, params, length)
    pruning = pruning_record(scores, gates, budget, rules)
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
        "latency": None if table is None else predicted(table, model, params, small, budget),
        "objective": objective_name(model, scores),
        "prediction": predict_loss(scores, gates).to_json(),
    }
    record["score_kept"] = record["layers"][-1]["score_kept"]
    return record


def predicted(table: LatencyTable, model: Model, params: Params, small: Params, budget: Budget) -> dict[str, Any]:
    """The seconds that a table predicts for a model before and after, and how far it is to be trusted."""
    before, after = (table.predict(widths(model.axes, each)) for each in (params, small))
    known = table.conditions
    return {
        "asked": {budget.name: budget.amount} if isinstance(budget, Latency) else {},
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


def _known(timing: Latency | None, model: Model, params: Params, length: Length) -> LatencyTable | None:
    """The table of a latency, if it was measured before."""
    if timing is None:
        return None
    table, tokens = timing.table, whole_tokens(model, length)
    if table is None and timing.folder is not None:
        file = table_file(timing.folder, conditions(model, params, batch=timing.batch or 1, length=tokens))
        table = read_table(file) if file.is_file() else None
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

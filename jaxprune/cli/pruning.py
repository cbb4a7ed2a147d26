"""The commands that prune: prune, and plan, which shows the outcome beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import jaxprune as jp
from jaxprune.cli import terminal
from jaxprune.cli.options import (
    MOST_TOGETHER,
    BatchOptions,
    BudgetOptions,
    CriterionOptions,
    Folder,
    Head,
    Json,
    LossOptions,
    ModelName,
    Overwrite,
    RecoveryOptions,
    RowOptions,
    ScoringOptions,
    SelectionOptions,
    check_different,
    check_range,
    choice,
    find,
    given,
    grouped,
    measured,
    option,
    rows,
    selecting,
    whole,
)

if TYPE_CHECKING:
    from jaxprune.models import Model
    from jaxprune.models.cost import Length
    from jaxprune.pruning.budgets import Budget, Latency
    from jaxprune.pruning.latency import LatencyTable
    from jaxprune.pruning.prune import Pruned, Watch
    from jaxprune.scoring.scores import Scores
    from jaxprune.units import Gates, Params


@dataclass(frozen=True, kw_only=True)
class TestOptions:
    """The comparison of a model before and after."""

    evaluate: Annotated[bool, measured("Test before and after.", "--evaluate/--no-evaluate")] = True
    limit: Annotated[int | None, measured("The most test examples.")] = None
    measure: Annotated[str, measured("Examples per timed pass; 0: none.", metavar="1,32")] = "1,32"

    def timed(self) -> tuple[int, ...]:
        """The numbers of examples in timed passes."""
        sizes = [whole("--measure", size) for size in self.measure.split(",")]
        for size in sizes:
            check_range("--measure", size, 0, MOST_TOGETHER)
        return tuple(size for size in sizes if size)


@grouped
def prune(
    context: typer.Context,
    model: ModelName,
    output: Folder,
    budget: BudgetOptions,
    selection: SelectionOptions,
    rows: RowOptions,
    batches: BatchOptions,
    scoring: ScoringOptions,
    settings: CriterionOptions,
    recovery: RecoveryOptions,
    losses: LossOptions,
    testing: TestOptions,
    scores: Annotated[
        list[Path] | None, option("A score file, or one per task; otherwise --task is scored.", metavar="FILE")
    ] = None,
    task: Annotated[
        list[str] | None, rows("The task to score, and to test before and after; repeat it for several.")
    ] = None,
    together: Annotated[
        str | None,
        choice("together", "Several tasks: mean scores (default), or units that any or all keep.", "Selection"),
    ] = None,
    rounds: Annotated[
        int, selecting("Rounds to the budget; the rest is scored again before each.", "--rounds", metavar="N")
    ] = 1,
    head: Head = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Removes what a task does not need, to a budget, and shows before and after.

    Examples: [cyan]jaxprune prune multi --task sst2 --data data --flops 0.5 -o small[/cyan] scores on the way.
    [cyan]jaxprune prune multi --scores sst2.safetensors --flops 0.5 -o small[/cyan] needs no data.
    [cyan]jaxprune prune multi --task sst2 --task mrpc --flops 0.5 -o small[/cyan] keeps what both need.
    [cyan]jaxprune prune multi --scores sst2.safetensors --latency 12ms -o small[/cyan] measures modules first.
    [cyan]jaxprune prune multi --task sst2 --data data --flops 0.2 --rounds 3 -o small[/cyan] scores in each round.
    """
    with terminal.working() as bars:
        files, names = scores or [], task or []
        check_sources(context, files, names, together)
        sizes = testing.timed()
        pruning = jp.Pruning(
            scoring=scoring.build(settings, head, batches),
            rules=selection.build(),
            recovery=recovery.build(scoring.seed, batches, rounds, scoring=not files),
            rounds=rounds,
            recover_each_round=recovery.recover_rounds == "each",
            together=find("together", together or "pooled"),
            report_loss=losses.loss_report,
            reselect=losses.reselect,
        )
        tested = jp.Rows(split="test", examples=testing.limit, **asdict(batches)) if testing.evaluate else None
        job = PruneCommand(model, output, files, tested, sizes, overwrite)
        load_tasks = lambda of: [rows.load(name, bars, of, head) for name in names]  # noqa: E731
        record = job.run(budget.build(selection.tokens()), pruning, load_tasks, bars)
    show_pruned(record, output, as_json, scored=not files)


def check_sources(context: typer.Context, files: Sequence[Path], names: Sequence[str], together: str | None) -> None:
    """Refuses options that are about scoring or testing where there is none."""
    if not files and not names:
        raise ValueError("name the task to score with --task, or a score file with --scores.")
    if files and (unused := given(context, ScoringOptions, CriterionOptions)):
        raise ValueError(f"{unused}: for scoring, but --scores gives scores that are made already.")
    if not names and (unused := given(context, RowOptions, "head", "limit")):
        raise ValueError(f"{unused}: for testing, but there is no --task to test on.")
    if together is not None and len(files or names) < 2:
        raise ValueError("--together is for several tasks: name more of them with --task, or of --scores.")


def show_pruned(record: dict[str, Any], output: Path, as_json: bool, *, scored: bool) -> None:
    """Shows a model before and after."""
    from jaxprune.cli.render import tables

    lines = [*tables.before_after_notes(record), *tables.headless_notes(record)]
    for report in tables.loss_reports(record):
        lines += [tables.loss_table(report), *tables.loss_notes(report)]
    lines += ["", f"Model:  {output}"]
    if scored:
        files = ", ".join(task["scores"] for task in record.get("tasks", [record]))
        lines.append(f"Scores: {files} (other budgets: --scores)")
    terminal.show(record, tables.before_after_table(record), *lines, as_json=as_json)


@dataclass(frozen=True)
class PruneCommand:
    """The files of a pruning, and the measurements before and after it."""

    source: str
    output: Path
    files: Sequence[Path]  # score files; with none, the tasks are scored
    tested: jp.Rows | None  # None: it is not tested
    sizes: Sequence[int]  # examples in timed passes
    overwrite: bool

    def run(
        self, budget: Budget, pruning: jp.Pruning, load_tasks: Callable[[Model], Sequence[jp.Task]], bars: Watch
    ) -> dict[str, Any]:
        """Prunes the model, writes its folder and compares the two.

        With score files nothing is scored, and tasks are only needed to test, to repair and to measure the loss.
        Otherwise scores are kept beside the folder, for the same command after an interruption and for other budgets.
        """
        from jaxprune.checkpoints.folder import check_destination
        from jaxprune.scoring.scores import check_same_model

        check_destination(self.output, self.overwrite)
        check_different(self.files)
        scores = [jp.load_scores(file) for file in self.files]
        if scores:
            check_same_model(dict(zip(map(str, self.files), scores, strict=True)))
        model, params = jp.load(self.source)
        tasks, workspace = load_tasks(model), jp.Workspace(self.output, self.overwrite)
        pruned = jp.prune(model, params, tasks, budget, pruning, scores=scores or None, workspace=workspace, watch=bars)
        costs = self._measure(model, params, pruned, tasks, pruning.scoring.head, bars)
        files, made = list(self.files) or workspace.score_files(tasks), pruned.record
        facts = [_facts(model, file, each) for file, each in zip(files, pruned.scores, strict=True)]
        together = made["settings"].get("together")
        record = {
            "command": "prune",
            "source": self.source,
            "output": str(self.output),
            "recovery": made.get("recovery"),
            **{name: made[name] for name in ("receipt", "receipts", "rounds") if name in made},
            **({"together": together, "tasks": facts} if together else facts[0]),
            **_latency_budget(model, params, pruned, costs),
        }
        record = self._write(model, pruned, record, costs)
        workspace.remove()
        return record

    def _measure(
        self, model: Model, params: Params, pruned: Pruned, tasks: Sequence[jp.Task], head: str | None, bars: Watch
    ) -> dict[str, Any]:
        """The costs and the quality of a model before and after; rows that were read for it are not tested on."""
        sizes = list(self.sizes)
        if isinstance(pruned.budget, jp.budgets.Latency) and pruned.budget.table is not None:
            batch = pruned.budget.table.conditions.batch
            sizes = sizes if batch in sizes else [batch, *sizes]
        scored_head = model.head(pruned.scores[0].header["head"]).name
        costs = measured_costs(model, params, pruned.params, pruned.record, scored_head, sizes, bars)
        if self.tested is None or not tasks:
            return costs
        rows = replace(self.tested, exclude=pruned.rows)
        for when, each in (("before", params), ("after", pruned.params)):
            results = []
            for task in tasks:
                bar = bars.open(f"testing {when}" if len(tasks) == 1 else f"testing {when}, {task.name}")
                results.append(jp.evaluate(model, each, task, rows=rows, head=head, progress=bar).to_json())
            costs[when] |= {"evaluation": results[0]} if len(tasks) == 1 else {"evaluations": results}
        return costs

    def _write(self, model: Model, pruned: Pruned, record: Mapping[str, Any], costs: dict[str, Any]) -> dict[str, Any]:
        """Writes the folder of a pruned model, with `pruning.json` and a card, and completes its record."""
        from jaxprune.checkpoints.folder import split_task
        from jaxprune.checkpoints.weights import stored_type
        from jaxprune.cli.render.cards import CARD, model_card
        from jaxprune.models.cost import file_size
        from jaxprune.pruning.record import compared, ratios

        pruning, before, after = pruned.record, costs["before"], costs["after"]
        complete = {
            **record,
            "kinds": kinds_of(pruning["sites"]),
            "selection": pruning["settings"],
            **compared(before, after),
            "widths": {name: [site["had"], site["kept"]] for name, site in pruning["sites"].items()},
            "versions": pruning["scores"]["versions"],
        }
        on_hub = not Path(split_task(self.source)[0]).expanduser().is_dir()
        jp.save(
            self.output,
            model,
            pruned.params,
            pruning={**pruning, "results": costs},
            overwrite=self.overwrite,
            dtype=stored_type(model),
            extra={CARD: model_card(complete, on_hub=on_hub).encode()},
        )
        for each, folder in ((before, model.source), (after, self.output)):
            each["file_bytes"] = None if folder is None else file_size(folder)
        return complete | {"kept": ratios(before, after)}


def kinds_of(sites: Mapping[str, Any]) -> list[str]:
    """The kinds of units at some sites."""
    from jaxprune.units import KINDS

    named = {name.rpartition(".")[2] for name in sites}
    return [kind for kind in KINDS if kind in named]


def both_costs(model: Model, params: Params, small: Params, pruning: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The costs of a model before and after by count; the units are those of the record, which counts channels too."""
    from jaxprune.pruning.record import costs

    length, units = pruning["settings"]["length"], pruning["units"]
    before, after = costs(model, params, length), costs(model, small, length)
    return {"before": before | {"units": units["had"]}, "after": after | {"units": units["kept"]}}


def measured_costs(
    model: Model,
    params: Params,
    small: Params,
    pruning: Mapping[str, Any],
    head: str,
    sizes: Sequence[int],
    bars: Watch,
) -> dict[str, dict[str, Any]]:
    """The costs of a model before and after, with the latency at each batch size."""
    from jaxprune.pruning.latency import compare_latencies

    costs = both_costs(model, params, small, pruning)
    if sizes:
        bar, length = bars.open("measuring latency"), pruning["settings"]["length"]
        timings = compare_latencies(model, (params, small), sizes, length=length, head=head, progress=bar)
        for each, timing in zip(costs.values(), timings, strict=True):
            each["latency"] = timing
    return costs


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


def _latency_budget(model: Model, params: Params, pruned: Pruned, costs: Mapping[str, Any]) -> dict[str, Any]:
    """For a budget of latency, what was asked for, predicted and measured."""
    budget, search = pruned.budget, pruned.latency
    if search is None or not isinstance(budget, jp.budgets.Latency) or budget.table is None:
        return {}
    batch = budget.table.conditions.batch
    before, after = (next(it for it in costs[when]["latency"] if it["batch"] == batch) for when in ("before", "after"))
    measured = {
        "before": before["least"],
        "after": after["least"],
        "ratio": after["least"] / before["least"],
        "median_ratio": 1.0 / after["speedup"],
    }
    tries = [{"asked": it.asked, "measured": it.measured} for it in search.trials]
    more = {"measured": measured, "tries": tries, "best": search.best}
    return {"latency_budget": predicted(budget.table, model, params, pruned.params, budget) | more}


@grouped
def plan(
    model: ModelName,
    scores: Annotated[Path, option("A score file of the model.", "--scores", metavar="FILE")],
    budget: BudgetOptions,
    selection: SelectionOptions,
    as_json: Json = False,
) -> None:
    """Shows what a budget would leave, layer by layer, and what that would cost; needs no data and writes no model.

    Example: [cyan]jaxprune plan multi --scores sst2.safetensors --latency 0.5[/cyan]

    For a latency, the modules are measured on this device, once: the table is kept.
    """
    with terminal.working() as bars:
        from jaxprune.checkpoints.folder import outline
        from jaxprune.cli.render import tables
        from jaxprune.compaction import compacted_shapes
        from jaxprune.pruning.loss import predict_loss
        from jaxprune.pruning.record import compared
        from jaxprune.pruning.selection import check_selection
        from jaxprune.scoring.scores import check_scores, objective_name

        tokens, rules = selection.tokens(), selection.build()
        asked, timing = budget.build(tokens), budget.timing(tokens)
        scored = jp.load_scores(scores)
        shapes, params, digest = outline(model, memory=terminal.digests_folder())
        check_selection(shapes, params, asked, rules, scored.values)
        check_scores(shapes, params, scored, digest=digest)
        asked = asked.with_length(scored.header["mean_length"])
        if isinstance(asked, jp.budgets.Latency):  # weights are loaded only where a table may be missing
            asked = asked.measured(*jp.load(model), bars.open("measuring modules") if asked.table is None else None)
            table = asked.table
        else:
            table = _known_table(timing, shapes, params, asked.length or scored.header["mean_length"])
        gates = jp.select(shapes, params, scored, asked, rules=rules)
        small = compacted_shapes(shapes, params, gates)
        pruning, layers = jp.pruning_record(scored, gates, asked, rules), _layers(scored, gates)
        record = {
            "command": "plan",
            "source": model,
            "scores": str(scores),
            "selection": pruning["settings"],
            "kinds": kinds_of(gates),
            **compared(**both_costs(shapes, params, small, pruning)),
            "widths": {name: [site["had"], site["kept"]] for name, site in pruning["sites"].items()},
            "layers": layers,
            "latency": None if table is None else predicted(table, shapes, params, small, asked),
            "objective": objective_name(scored, shapes.head(scored.header["head"])),
            "prediction": predict_loss(scored, gates).to_json(),
            "score_kept": layers[-1]["score_kept"],
        }
    terminal.show(record, *tables.plan_tables(record), *tables.plan_notes(record), as_json=as_json)


def predicted(table: LatencyTable, model: Model, params: Params, small: Params, budget: Budget) -> dict[str, Any]:
    """The seconds that a table predicts for a model before and after, and how far it is to be trusted."""
    from jaxprune.units import widths

    before, after = (table.predict(widths(model.axes, each)) for each in (params, small))
    known = table.conditions
    return {
        "asked": {budget.name: budget.amount} if isinstance(budget, jp.budgets.Latency) else {},
        "batch": known.batch,
        "length": known.length,
        "device": known.device,
        "predicted": {"before": before, "after": after, "ratio": after / before},
        "table": {
            "fixed": table.fixed,
            "scale": table.scale,
            "wholes": [{"predicted": seconds, "measured": measured} for seconds, measured in table.wholes],
            "rows": [{name: list(getattr(row, name)) for name in ("sites", "widths", "seconds")} for row in table.rows],
        },
    }


def _known_table(timing: Latency, model: Model, params: Params, length: Length) -> LatencyTable | None:
    """The table of a latency, if it was measured before."""
    from jaxprune.pruning.latency import check_table, conditions, known_table, whole_tokens

    table = timing.table
    if table is None and timing.folder is not None:
        known = conditions(model, params, batch=timing.batch or 1, length=whole_tokens(model, length))
        table = known_table(timing.folder, known)
    if table is not None:
        check_table(table, model, params)
    return table


def _layers(scores: Scores, gates: Gates) -> list[dict[str, Any]]:
    """Per layer, and finally in all: units of every kind `[kept, had]`, and the share of the scores that is kept."""
    import numpy as np

    kinds = kinds_of(gates)
    layers: dict[str, list[str]] = {}
    for name in gates:
        layers.setdefault(".".join(name.split(".")[:-2]), []).append(name)
    rows = []
    for layer, names in (*layers.items(), ("all", list(gates))):
        counts = {kind: [0, 0] for kind in kinds}
        had = left = 0.0
        for name in names:
            gate, count = np.asarray(gates[name], np.float64), counts[name.rpartition(".")[2]]
            count[0], count[1] = count[0] + int(gate.sum()), count[1] + len(gate)
            if name in scores.values:
                value = np.maximum(np.asarray(scores.values[name], np.float64), 0.0)
                had, left = had + float(value.sum()), left + float(value @ gate)
        rows.append({"layer": layer, **counts, "score_kept": left / had if had else None})
    return rows

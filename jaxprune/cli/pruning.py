"""The commands that make a model smaller: prune, plan its outcome, share it among tasks, pack its zeros."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import jaxprune as jp
from jaxprune.cli import terminal
from jaxprune.cli.options import (
    MOST,
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
    say_fewer,
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
    effort: Annotated[
        int,
        selecting("Rounds of measuring widths, each about as long as scoring twice.", least=1, metavar="N"),
    ] = 2,
    vocabulary: Annotated[
        str | None,
        selecting("Keep the tokens alone that the tasks' rows need, or the N most needed.", metavar="data|N"),
    ] = None,
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
    from jaxprune.pruning.allocation import EXAMPLES, Measuring

    with terminal.working() as bars:
        files, names = scores or [], task or []
        check_sources(context, files, names, together, vocabulary)
        if selection.allocation not in ("auto", "measured") and (unused := given(context, "effort")):
            raise ValueError(f"{unused}: rounds of measuring widths, but --allocation is {selection.allocation}.")
        sizes = testing.timed()
        pruning = jp.Pruning(
            scoring=scoring.build(settings, head, batches),
            rules=selection.build(),
            measuring=Measuring(
                rows=jp.Rows(examples=EXAMPLES, key=scoring.seed, **asdict(batches)),
                rounds=effort,
                file=answers_beside(files),
            ),
            recovery=recovery.build(scoring.seed, batches, rounds, scoring=not files),
            rounds=rounds,
            recover_each_round=recovery.recover_rounds == "each",
            together=find("together", together or "pooled"),
            report_loss=losses.loss_report,
        )
        tested = jp.Rows(split="test", examples=testing.limit, **asdict(batches)) if testing.evaluate else None
        job = PruneCommand(model, output, files, tested, sizes, overwrite, vocabulary)
        load_tasks = lambda of: [rows.load(name, bars, of, head) for name in names]  # noqa: E731
        record = job.run(budget.build(selection.tokens()), pruning, load_tasks, bars)
    show_pruned(record, output, as_json, scored=not files)


def answers_beside(files: Sequence[Path]) -> Path | None:
    """The file of measured answers that belongs to score files: budgets that they serve can share what it holds."""
    if not files or not os.access(files[0].parent, os.W_OK):
        return None
    stem = files[0].name.removesuffix(".safetensors").removesuffix(".scores")
    return files[0].with_name(f"{stem}.answers.safetensors")


def check_sources(
    context: typer.Context, files: Sequence[Path], names: Sequence[str], together: str | None, vocabulary: str | None
) -> None:
    """Refuses options that are about scoring or testing where there is none."""
    if not files and not names:
        raise ValueError("name the task to score with --task, or a score file with --scores.")
    if files and (unused := given(context, ScoringOptions, CriterionOptions)):
        raise ValueError(f"{unused}: for scoring, but --scores gives scores that are made already.")
    if not names and (unused := given(context, RowOptions, "head", "limit")):
        raise ValueError(f"{unused}: for testing, but there is no --task to test on.")
    if vocabulary is not None and not names:
        raise ValueError("--vocabulary needs rows whose tokens stay: name a task with --task.")
    if vocabulary not in (None, "data"):
        check_range("--vocabulary", whole("--vocabulary", vocabulary), 1, MOST)
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
    vocabulary: str | None = None  # "data", or the most tokens that stay; None: all

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
        for task in tasks:
            if self.tested is not None and isinstance(self.tested.examples, int):
                say_fewer(bars, self.tested.examples, task, "test")
            if pruning.recovery is not None and isinstance(pruning.recovery.rows.examples, int):
                asked, usual = pruning.recovery.rows.examples, RecoveryOptions.recover_examples
                say_fewer(bars, asked, task, "calibration", usual, "--recover-examples")
        pruned = jp.prune(model, params, tasks, budget, pruning, scores=scores or None, workspace=workspace, watch=bars)
        small, pruned, words = self._cut_vocabulary(model, pruned, tasks, pruning.scoring.rows)
        costs = self._measure((model, params), (small, pruned.params), pruned, tasks, pruning.scoring.head, bars)
        files, made = list(self.files) or workspace.score_files(tasks), pruned.record
        facts = [_facts(model, file, each) for file, each in zip(files, pruned.scores, strict=True)]
        together = made["settings"].get("together")
        record = {
            "command": "prune",
            "source": self.source,
            "output": str(self.output),
            "recovery": made.get("recovery"),
            **{name: made[name] for name in ("allocation", "receipt", "receipts", "rounds") if name in made},
            **({"together": together, "tasks": facts} if together else facts[0]),
            **_latency_budget(model, params, pruned, costs),
            **({"vocabulary": words} if words else {}),
        }
        record = self._write(model, small, pruned, record, costs)
        workspace.remove()
        return record

    def _cut_vocabulary(
        self, model: Model, pruned: Pruned, tasks: Sequence[jp.Task], rows: jp.Rows
    ) -> tuple[Model, Pruned, dict[str, Any]]:
        """The pruned model with the tokens alone that rows of the tasks need, those for testing aside, if wanted."""
        if self.vocabulary is None:
            return model, pruned, {}
        from jaxprune.checkpoints.vocabulary import cut_vocabulary
        from jaxprune.data.batches import tokens_changed, tokens_needed

        counts = tokens_needed(model, tasks, rows)
        most = None if self.vocabulary == "data" else whole("--vocabulary", self.vocabulary)
        made = cut_vocabulary(model, pruned.params, counts, most)
        words = {
            "before": model.config.vocab,
            "after": len(made.kept),
            "needed": int((counts > 0).sum()),
            "covered": float(counts[made.kept].sum() / max(counts.sum(), 1)),
            **tokens_changed(model, made.model, made.kept, tasks, rows),
        }
        return made.model, pruned._replace(params=made.params, record=pruned.record | {"vocabulary": words}), words

    def _measure(
        self,
        whole: tuple[Model, Params],
        small: tuple[Model, Params],
        pruned: Pruned,
        tasks: Sequence[jp.Task],
        head: str | None,
        bars: Watch,
    ) -> dict[str, Any]:
        """The costs and the quality of a model before and after; rows that were read for it are not tested on."""
        sizes = list(self.sizes)
        if isinstance(pruned.budget, jp.budgets.Latency) and pruned.budget.table is not None:
            batch = pruned.budget.table.conditions.batch
            sizes = sizes if batch in sizes else [batch, *sizes]
        scored_head = whole[0].head(pruned.scores[0].header["head"]).name
        costs = measured_costs(whole, small, pruned.record, scored_head, sizes, bars)
        if self.tested is None or not tasks:
            return costs
        rows = replace(self.tested, exclude=pruned.rows)
        for when, each in (("before", whole), ("after", small)):
            results = []
            for task in tasks:
                bar = bars.open(f"testing {when}" if len(tasks) == 1 else f"testing {when}, {task.name}")
                results.append(jp.evaluate(*each, task, rows=rows, head=head, progress=bar).to_json())
            costs[when] |= {"evaluation": results[0]} if len(tasks) == 1 else {"evaluations": results}
        return costs

    def _write(
        self, model: Model, small: Model, pruned: Pruned, record: Mapping[str, Any], costs: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes the folder of a pruned model, with `pruning.json` and a card, and completes its record."""
        from jaxprune.checkpoints.folder import split_task
        from jaxprune.checkpoints.weights import stored_type
        from jaxprune.cli.render.cards import CARD, model_card
        from jaxprune.models.cost import compared, file_size, ratios

        pruning, before, after = pruned.record, costs["before"], costs["after"]
        complete = {
            **record,
            "kinds": kinds_of(pruning["sites"]),
            "selection": pruning["settings"],
            **compared(before, after),
            "widths": {name: [site["had"], site["kept"]] for name, site in pruning["sites"].items()},
            "versions": pruning["scores"]["versions"],
        }
        on_hub = not Path(split_task(self.source)[0]).expanduser().exists()
        jp.save(
            self.output,
            small,
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


def both_costs(
    whole: tuple[Model, Params], small: tuple[Model, Params], pruning: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The costs of a model before and after by count; the units are those of the record, which counts channels too."""
    from jaxprune.models.cost import costs

    length, units = pruning["settings"]["length"], pruning["units"]
    before, after = costs(*whole, length), costs(*small, length)
    return {"before": before | {"units": units["had"]}, "after": after | {"units": units["kept"]}}


def measured_costs(
    whole: tuple[Model, Params],
    small: tuple[Model, Params],
    pruning: Mapping[str, Any],
    head: str,
    sizes: Sequence[int],
    bars: Watch,
) -> dict[str, dict[str, Any]]:
    """The costs of a model before and after, with the latency at each batch size."""
    from jaxprune.pruning.latency import compare_latencies

    costs = both_costs(whole, small, pruning)
    if sizes:
        bar, length = bars.open("measuring latency"), pruning["settings"]["length"]
        timings = compare_latencies((whole, small), sizes, length=length, head=head, progress=bar)
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
        from jaxprune.models.cost import compared
        from jaxprune.pruning.loss import predict_loss
        from jaxprune.pruning.prune import check_scope
        from jaxprune.pruning.selection import check_selection
        from jaxprune.scoring.scores import check_scores, objective_name

        tokens, rules = selection.tokens(), selection.build()
        asked, timing = budget.build(tokens), budget.timing(tokens)
        scored = jp.load_scores(scores)
        shapes, params, digest = outline(model, memory=terminal.digests_folder())
        check_scope(scored.properties, rules)
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
            "measures": rules.allocation == "auto" and scored.properties["by_layer"],  # what `prune` would do here
            "kinds": kinds_of(gates),
            **compared(**both_costs((shapes, params), (shapes, small), pruning)),
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
    from jaxprune.models.cost import ratios

    budget = budget.with_length(scores.header["mean_length"])
    if isinstance(budget, jp.budgets.Latency):
        budget = budget.measured(model, params, bars.open("measuring modules") if budget.table is None else None)
    gates = jp.select(model, params, scores, budget, rules=rules)
    record = jp.pruning_record(scores, gates, budget, rules)
    small = jp.compact(model, params, gates, scores.means)
    costs = both_costs((model, params), (model, small), record)
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
        from jaxprune.checkpoints.gates import GATES
        from jaxprune.cli.render import tables
        from jaxprune.models.cost import file_size
        from jaxprune.sparse.masks import sparsity_of
        from jaxprune.sparse.patterns import linear_maps

        stored: dict[str, Any] = {"packed": None if unpack else values, "dtype": "float16" if half else None}
        check_destination(output, overwrite)
        loaded, params = jp.load(model, dtype=None)
        folder = Path(loaded.source or model)
        extra, pruning = _other_files(folder)
        if "#" in model:  # of one task, whose gates have been applied
            extra.pop(GATES, None)
        if GATES in extra and (half or values == "int8"):
            raise ValueError(
                f"the gates in {folder} belong to its exact weights, which --half and --values int8 change: "
                "pack one task of it (FOLDER#TASK), or keep every bit."
            )
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
    """The files that `save` wrote into a folder beside the model, and the record of the pruning; others are named."""
    from jaxprune.checkpoints.files import is_leftover, read_json
    from jaxprune.checkpoints.gates import PRUNING, read_pruning
    from jaxprune.checkpoints.tensors import COMPRESSED
    from jaxprune.checkpoints.weights import CONFIG, WEIGHTS

    listed = read_json(folder / CONFIG).get("jaxprune", {}).get("files", [])
    written = (CONFIG, WEIGHTS, WEIGHTS + COMPRESSED, PRUNING)
    if odd := [name for name in listed if Path(name).name != name]:
        raise ValueError(f"{folder / CONFIG} lists {odd[0]!r} among its files: remove it, a folder holds names alone.")
    extra = {name: (folder / name).read_bytes() for name in listed if name not in written and (folder / name).is_file()}
    there = {entry.name for entry in folder.iterdir() if not is_leftover(entry.name, listed)} if listed else set()
    kinds = {"that are not there": {*listed} - there, f"that its {CONFIG} does not list": there - {*listed}}
    for what, names in kinds.items():
        if names:
            warnings.warn(f"{folder} has files {what}, which are left out: {', '.join(sorted(names))}.", stacklevel=2)
    if PRUNING not in listed:
        return extra, None
    return extra, {name: value for name, value in read_pruning(folder).items() if name != "pruned"}

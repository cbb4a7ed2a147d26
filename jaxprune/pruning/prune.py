"""Pruning as one resumable recipe: score, select, compact, repair, record; one task or several, at once or in rounds.

In rounds, what is left is scored again, cut further and, if wanted, repaired, until it fits the budget. In every round
the selection is made among all units of the dense model, with those that are gone ranked below all others. So budgets,
floors, multiples, protected layers and the fractions that are kept of each layer mean in every round what they mean in
one, and the units of all rounds have the indices of the dense model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np

from jaxprune.checkpoints.files import COUNT, DIGEST, differences, file_stem, misfits_of, parse_header, remove_folder
from jaxprune.checkpoints.folder import check_destination, load, save
from jaxprune.checkpoints.gates import PRUNING, recorded_gates
from jaxprune.checkpoints.tensors import is_sealed, model_digest, params_digest, sealed, versions
from jaxprune.compaction import compact
from jaxprune.data.batches import digest_rows
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Task, remove_leaks
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import costs, memory, ratios
from jaxprune.pruning.allocation import FEWEST, Allocation, Measuring, allocate
from jaxprune.pruning.budgets import Budget, Latency, Rules
from jaxprune.pruning.latency import LatencySearch, compare_latency, search_latency
from jaxprune.pruning.loss import ScoredLoss
from jaxprune.pruning.pooling import mean_closed, mean_length, pooled
from jaxprune.pruning.recoveries import (
    Reconstruction,
    Recovery,
    RecoveryReport,
    check_method,
    recover,
    recovery_record,
)
from jaxprune.pruning.selection import (
    Values,
    check_selection,
    least_latency,
    parts_of,
    pruning_record,
    select,
    settings_of,
)
from jaxprune.scoring.objectives import name_of
from jaxprune.scoring.run import Scoring, kept_scores, score
from jaxprune.scoring.scores import Scores, check_same_model, check_scores, describe, properties_of, save_scores
from jaxprune.units import Gates, Params, flatten, path_name, widths

BELOW = 1e9  # times the largest score: units that are gone stay last, whatever the units of a site cost
RIDGE = 1.0  # by which modules are fitted while widths are measured of what a reconstruction will repair
TRIES = 4  # selections by a budget of latency that are measured at most
ONE_ROUND = (
    "a budget of latency is met in one round: its widths come from a table of the dense model, and those of a smaller "
    "budget need not lie within those of a larger one. Give flops, or one round."
)

Together: TypeAlias = Callable[..., Gates]  # (model, params, scores of every task, budget, rules=) -> gates


class Progress(Protocol):
    """The progress of one stage."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Shows what is done, of how much, and a note."""
        ...


class Watch(Protocol):
    """Whoever watches long work."""

    def open(self, label: str) -> Progress:
        """Opens a new stage."""
        ...

    def say(self, message: Any) -> None:
        """Shows a line, or a table."""
        ...


@dataclass(frozen=True)
class _Stage:
    """A watch that says in which round a stage is; without one to tell, it is silent."""

    watch: Watch | None
    label: str = ""

    def open(self, label: str) -> Progress:
        return (lambda done, total, note="": None) if self.watch is None else self.watch.open(f"{self.label}{label}")

    def say(self, message: Any) -> None:
        if self.watch is not None:
            self.watch.say(message)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """The settings of a pruning, beside its budget; see `prune`."""

    scoring: Scoring = Scoring()
    rules: Rules = Rules()  # by the allocation `auto` widths are measured where they can be
    measuring: Measuring = Measuring()
    recovery: Recovery | None = Recovery()  # None: the remaining weights stay as they were
    rounds: int = 1  # steps to the budget; the remaining units are scored again before each
    recover_each_round: bool = False  # else once, in the end
    together: Together = pooled  # how several tasks become one selection; also `kept_by_any` and `kept_by_all`
    report_loss: bool = False  # measure what is lost of the objective, beside what the scores predict
    nodes: int = 8  # quadrature nodes of that measurement
    repeats: int = 20  # passes per measurement, for a budget of latency

    def __post_init__(self):
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int):
            raise TypeError(f"rounds must be a whole number, got {self.rounds!r}.")
        for name, least in (("rounds", 1), ("nodes", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.rounds > 1 and self.report_loss:
            raise ValueError("the loss is measured of one selection, rounds make several: leave one of them out.")
        if self.recover_each_round and (self.rounds == 1 or self.recovery is None):
            raise ValueError("recover_each_round is for a recovery in several rounds: give both, or leave it out.")


@dataclass(frozen=True)
class Workspace:
    """The place of intermediate results, so that the same pruning resumes after an interruption.

    Scores are kept as `PATH.scores.safetensors`, of several tasks as `PATH.TASK.scores.safetensors`; measured answers
    as `PATH.answers.safetensors`. The model that the last finished round left is in the folder `PATH.rounds`, until all
    rounds are finished.
    """

    path: Path
    overwrite: bool = False  # whether scores and rounds with other settings are discarded, not refused

    def score_files(self, tasks: Sequence[Task]) -> list[Path]:
        """The score file of every task."""
        stems = [""] if len(tasks) == 1 else [f".{file_stem(task.name)}" for task in tasks]
        return [self.path.with_name(f"{self.path.name}{stem}.scores.safetensors") for stem in stems]

    @property
    def answers_file(self) -> Path:
        """The file of what an allocation measured; see `Measuring`."""
        return self.path.with_name(f"{self.path.name}.answers.safetensors")

    @property
    def folder(self) -> Path:
        """The model folder of the last finished round."""
        return self.path.with_name(f"{self.path.name}.rounds")

    @property
    def next_scores(self) -> Path:
        """The score file of the next round."""
        return self.folder.with_name(f"{self.folder.name}.scores.safetensors")

    def load(self, settings: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Round | None]:
        """The records of the finished rounds, and the last of these; none if there is no folder.

        Args:
            settings: All that the rounds depend on.

        Raises:
            FileExistsError: If the folder is something else.
            ValueError: If the rounds have other settings.
        """
        check_destination(self.folder, True)
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return [], None
        file = self.folder / PRUNING
        problems, pruning = parse_header(file.read_text("utf-8", "replace") if file.is_file() else "{}", {...: object})
        if problems:
            raise ValueError(f"{file} is damaged ({'; '.join(problems)}): move {self.folder} away to start again.")
        if "run" not in pruning:
            raise FileExistsError(
                f"{self.folder} is a model and not what an interrupted run in rounds left: move it away, or choose "
                "another output."
            )
        problem, params = "", {}
        if other := differences(pruning["run"], settings):
            problem = f"was begun with other settings ({other})"
        elif misfits := misfits_of(pruning, _ROUNDS):
            problem = f"is damaged ({'; '.join(misfits)})"
        else:
            _, params = load(self.folder, dtype=None)
            pruning.pop("pruned", None)  # what `save` adds
            if not is_sealed(pruning, _arrays(params)) or not 0 < len(pruning["rounds"]) < settings["rounds"]:
                problem = "is damaged (its checksum is another than that of what it holds)"
        if problem and not self.overwrite:
            raise ValueError(
                f"{self.folder} {problem}: give the settings that it was begun with, or another output, or start again "
                "with --overwrite."
            )
        if problem:
            self.remove()
            return [], None
        records = pruning["rounds"]
        return records, Round(len(records), records[-1]["budget"], {}, recorded_gates(pruning), params, None)

    def save(self, model: Model, params: Params, record: Mapping[str, Any]) -> None:
        """Writes the model that a finished round left, and its record, with a checksum."""
        save(self.folder, model, params, pruning=sealed(record, _arrays(params)), overwrite=True)

    def remove(self) -> None:
        """Removes the rounds."""
        for file in (self.next_scores, self.next_scores.with_name(f"{self.next_scores.name}.partial")):
            file.unlink(missing_ok=True)
        remove_folder(self.folder)


_ROUNDS = {  # `pruning.json` of an interrupted run
    "run": {...: object},
    "rounds": [{"round": COUNT, "budget": float, ...: object}],
    "sites": {...: object},
    "checksum": DIGEST,
    ...: object,
}


def _arrays(params: Params) -> dict[str, Any]:
    return {path_name(path): array for path, array in flatten(params).items()}


class Pruned(NamedTuple):
    """A pruned model, and how it was made."""

    params: Params
    gates: Gates  # of all units of the dense model: 1 where one is left
    scores: tuple[Scores, ...]  # of the dense model, for each task
    record: dict[str, Any]  # for `save(..., pruning=...)`
    rows: tuple[str, ...]  # keys of all rows that were read: none of them may be tested on
    budget: Budget  # with the length and the table that it was completed by
    recovery: RecoveryReport | None = None
    latency: LatencySearch | None = None  # the selections that were measured for a budget of latency


def prune(
    model: Model,
    params: Params,
    tasks: Task | Sequence[Task],
    budget: Budget,
    pruning: Pruning = Pruning(),
    *,
    scores: Scores | Sequence[Scores] | None = None,
    workspace: Workspace | None = None,
    watch: Watch | None = None,
) -> Pruned:
    """Makes a model smaller for one or several tasks: scores, selects, compacts and repairs it.

    Whatever can be refused is refused before anything is scored. Of several tasks, rows that one of them holds out are
    dropped from what the others are scored on; FLOPs are counted at the mean of their lengths.

    ```python
    pruned = jp.prune(model, params, task, jp.budgets.Flops(0.5))
    jp.save("small", model, pruned.params, pruning=pruned.record)
    ```

    Args:
        model: The architecture.
        params: The dense parameters.
        tasks: The task to keep, or several. With `scores`, rows are only needed to repair and to measure the loss.
        budget: How much may stay. For a latency without a table, one is measured.
        pruning: All other settings.
        scores: Of the dense model for every task; None: they are made.
        workspace: Where intermediate results are kept; None: nowhere.
        watch: Shows the progress.

    Returns:
        The small parameters, and how they were made.

    Raises:
        ValueError: If the settings do not fit the model, the tasks or the scores, or the budget cannot be reached.
    """
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    given = [] if scores is None else [scores] if isinstance(scores, Scores) else list(scores)
    watch = _Stage(None) if watch is None else watch
    pruning, note = _decided(tasks, pruning, given)
    _check(model, params, tasks, budget, pruning, given)
    if len(tasks) > 1 and not given:
        tasks, leaks = remove_leaks(tasks)
        for (task, other), count in leaks.items():
            watch.say(f"{task}: {count:,} rows dropped, held out in {other}")
    run = _Run(model, params, tasks, pruning, workspace, watch, note)
    return run.in_rounds(budget) if pruning.rounds > 1 else run.at_once(budget, given or run.scored())


def _check(
    model: Model, params: Params, tasks: Sequence[Task], budget: Budget, pruning: Pruning, scores: Sequence[Scores]
) -> None:
    """Refuses whatever can be refused before any work is done."""
    names = [task.name for task in tasks]
    if len(set(map(file_stem, names))) < len(names):
        raise ValueError(f"tasks must differ in their names, in those of files too; got {', '.join(names)}.")
    if not (tasks or scores):
        raise ValueError("there is nothing to score with: name a task, or give scores.")
    if not tasks and pruning.recovery is not None:
        raise ValueError("there is nothing to recover with: name a task, or leave recovery out.")
    several = max(len(tasks), len(scores)) > 1
    if pruning.rules.measured and (why := _unmeasurable(tasks, pruning, scores)):
        raise ValueError(f"widths cannot be measured here: {why}. Use another allocation.")
    if pruning.rounds > 1 and (scores or several):
        what = "scores are of the dense model alone" if scores else f"{len(tasks)} tasks are pruned for in one"
        raise ValueError(f"{pruning.rounds} rounds need one task to score in each, and no scores: {what}.")
    if pruning.rounds > 1 and isinstance(budget, Latency):
        raise ValueError(ONE_ROUND)
    if several and isinstance(budget, Latency) and pruning.together is not pooled:
        raise ValueError("a latency budget for several tasks needs pooled scores (--together pooled): it has no order.")
    criterion = pruning.scoring.criterion
    for properties in [each.properties for each in scores] or [properties_of(criterion)]:
        check_scope(properties, pruning.rules)
    if pruning.report_loss and (missing := {each.header["task"] for each in scores} - {*names}):
        raise ValueError(
            f"there is nothing to measure the loss of {', '.join(sorted(missing))} with: name the task, or leave the "
            "loss report out."
        )
    for task in tasks:
        fitting_head(model, task, pruning.scoring.head)
    for each in scores:
        check_selection(model, params, budget, pruning.rules, each.values)
    if not scores:
        scored = widths(model.axes, params, criterion.kinds)
        check_selection(model, params, budget, pruning.rules, scored)
    if pruning.recovery is not None:
        check_method(model, params, pruning.recovery.method)
    if scores:
        check_same_model({f"scores {i} of {each.header['task']!r}": each for i, each in enumerate(scores, 1)})
        check_scores(model, params, scores[0])


def _decided(tasks: Sequence[Task], pruning: Pruning, scores: Sequence[Scores]) -> tuple[Pruning, str]:
    """The settings without `auto`: widths are measured where they can be; and a note where they are not."""
    if pruning.rules.allocation != "auto":
        return pruning, ""
    properties = scores[0].properties if scores else properties_of(pruning.scoring.criterion)
    rules, rows = pruning.rules.decided(properties), pruning.measuring.rows
    split = rows.split or "calibration"
    few = [] if isinstance(rows.examples, tuple) else [task for task in tasks if len(task.rows(split)) < FEWEST]
    why = (
        "the scores rank whole layers"
        if not properties["by_layer"]
        else f"{few[0].name} has fewer than {FEWEST} {split} rows"
        if few
        else _unmeasurable(tasks, pruning, scores)
    )
    if not why:
        return replace(pruning, rules=replace(rules, allocation="measured")), ""
    name = rules.allocation.replace("_", "-")
    return replace(pruning, rules=rules), f"allocation {name}, as widths cannot be measured: {why}"


def _unmeasurable(tasks: Sequence[Task], pruning: Pruning, scores: Sequence[Scores]) -> str:
    """Why widths cannot be measured; empty if they can."""
    if scores and len(scores) != len(tasks):
        return f"{len(scores)} score files for {len(tasks)} tasks, whose rows would be read"
    if other := {each.header["task"] for each in scores} - {task.name for task in tasks}:
        return f"the scores are of {', '.join(sorted(other))}, which is not among the tasks"
    if len(tasks) > 1 and pruning.together is not pooled:
        return "several tasks are ranked by pooled scores alone (--together pooled)"
    return "in rounds the model changes between them" if pruning.rounds > 1 else ""


def check_scope(properties: Mapping[str, Any], rules: Rules) -> None:
    """Refuses rules that scores of a criterion, by its `properties`, cannot be selected by."""
    rules = rules.decided(properties)
    if (rules.allocation in ("per_layer", "measured") or rules.normalise is not None) and not properties["by_layer"]:
        raise ValueError(
            "top-layers and block-influence rank layers, and all units within a layer alike: let all layers compete by "
            "the scores as they are (--allocation global without --normalise; in Python Rules(allocation='global'))."
        )


@dataclass(frozen=True)
class _Run:
    """A pruning whose settings were checked."""

    model: Model
    params: Params
    tasks: Sequence[Task]
    pruning: Pruning
    workspace: Workspace | None
    watch: Watch
    note: str = ""

    def say_note(self) -> None:
        """Says why the allocation is not the usual one."""
        if self.note:
            self.watch.say(self.note)

    def scored(self, watch: Watch | None = None) -> list[Scores]:
        """The scores of the dense model for every task."""
        files = [None] * len(self.tasks) if self.workspace is None else self.workspace.score_files(self.tasks)
        scoring, overwrite = self.pruning.scoring, self.workspace is None or self.workspace.overwrite
        for task, file in zip(self.tasks, files, strict=True):
            if file is not None and not overwrite:  # refused before the first is scored
                kept_scores(file, self.model, self.params, task, scoring, replace_others=False)
        return [
            score_once(self.model, self.params, task, scoring, file, watch or self.watch)
            for task, file in zip(self.tasks, files, strict=True)
        ]

    def at_once(self, budget: Budget, scores: Sequence[Scores]) -> Pruned:
        """Selects and compacts in one step."""
        model, params, rules = self.model, self.params, self.pruning.rules
        budget = budget.with_length(mean_length(scores))
        if isinstance(budget, Latency):
            bar = self.watch.open("measuring modules") if budget.table is None else None
            budget = budget.measured(model, params, bar)
        several = {"together": self.pruning.together} if max(len(scores), len(self.tasks)) > 1 else {}
        means = mean_closed(scores)
        self.say_note()
        search, allocations = None, []

        def choose(budget: Budget) -> Gates:
            if rules.measured:
                allocations.append(self._allocated(scores, budget, file))
                return allocations[-1].gates
            if several:
                return self.pruning.together(model, params, scores, budget, rules=rules)
            return select(model, params, scores[0], budget, rules=rules)

        with TemporaryDirectory() as folder:  # for the answers that several budgets share, where nothing else is kept
            file = Path(folder) / "answers.safetensors" if isinstance(budget, Latency) else None
            if isinstance(budget, Latency):
                search = self._search(budget, scores, means, choose)
                gates = search.trials[search.best].gates
            else:
                gates = choose(budget)
        found = next((own for own in allocations if own.gates is gates), None)
        if found is not None:
            self._say_allocated(found)
        losses, rows = self._losses(scores, gates, means)
        small = compact(model, params, gates, means)
        record = pruning_record(_joined(scores, means), gates, budget, rules, **several)
        if several:
            record["digests"]["scores"] = [params_digest(dict(each.values)) for each in scores]
        if losses:
            record |= {"receipts": losses} if several else {"receipt": losses[0]}
        if found is not None:
            record["allocation"] = found.to_json()
            rows |= set(found.rows)
        rows |= {row for each in scores for row in each.rows}
        return self._recovered(Pruned(small, gates, tuple(scores), record, tuple(rows), budget, None, search))

    def _allocated(self, scores: Sequence[Scores], budget: Budget, file: Path | None) -> Allocation:
        """The selection by measured answers, which are kept in a file."""
        measuring = self.pruning.measuring
        if measuring.file is None:
            measuring = replace(measuring, file=file if self.workspace is None else self.workspace.answers_file)
        if measuring.ridge is None and self._reconstructs:
            measuring = replace(measuring, ridge=RIDGE)  # what will be repaired, and how, decides who gives
        named = {task.name: task for task in self.tasks}
        return allocate(
            self.model,
            self.params,
            [named.get(own.header["task"], task) for own, task in zip(scores, self.tasks, strict=True)],
            scores,
            budget,
            measuring,
            rules=self.pruning.rules,
            progress=self.watch.open("measuring widths"),
        )

    @property
    def _reconstructs(self) -> bool:
        recovery = self.pruning.recovery
        return recovery is not None and isinstance(recovery.method, Reconstruction)

    def _say_allocated(self, found: Allocation) -> None:
        """Says what was tried, and what was predicted of it."""
        if found.cut_off or found.truncated:
            what = f"{found.cut_off:,} rows left out, their answers are cut off, and {found.truncated:,} texts cut"
            self.watch.say(f"measuring widths: {what}; --max-length reaches further")
        others = ", ".join(f"{name} {loss:.4g}" for name, loss in found.starts.items())
        rounds = ", ".join(f"{each.predicted:.4g} and {each.measured:.4g}" for each in found.rounds)
        fitted = ", modules fitted" if self._reconstructs or self.pruning.measuring.ridge else ""
        self.watch.say(f"measured widths lose {found.loss:.4g} nats per answer{fitted}; {others}")
        self.watch.say(f"predicted and measured: {rounds}")
        if found.known is not None:
            self.watch.say("the effects of single modules are those that were measured for another budget")

    def _recovered(self, pruned: Pruned) -> Pruned:
        """Repairs the pruned model, unless that is done or not wanted, and completes the record."""
        report, small, recovery = pruned.recovery, pruned.params, self.pruning.recovery
        if recovery is not None and report is None:
            bar = self.watch.open("recovering")
            small, report = recover(self.model, self.params, small, self.tasks, recovery, progress=bar)
        if report is not None and (report.cut_off or report.truncated):
            what = f"{report.cut_off:,} rows left out, their answers are cut off, and {report.truncated:,} texts cut"
            self.watch.say(f"recovery: {what}; --max-length reaches further")
        record = pruned.record | ({} if report is None else {"recovery": recovery_record(report)})
        rows = tuple(sorted({*pruned.rows, *(() if report is None else report.rows)}))
        return pruned._replace(params=small, record=record, rows=rows, recovery=report)

    def _search(self, budget: Latency, scores: Sequence[Scores], means: Gates | None, choose: Any) -> LatencySearch:
        """Selections by a budget of latency that were measured, each beside the dense model; see `search_latency`."""
        model, params, table = self.model, self.params, budget.table
        if table is None:
            raise ValueError("a latency budget needs table=.")
        dense = table.predict(widths(model.axes, params)) if budget.is_fraction else 1.0
        least = least_latency(model, params, scores[0], table, rules=self.pruning.rules)
        head = model.head(scores[0].header["head"]).name
        known, bar, count = table.conditions, self.watch.open("meeting the latency"), 0

        def measure(gates: Gates) -> float:
            nonlocal count
            pairs = [(model, params), (model, compact(model, params, gates, means))]
            batch, length, repeats = known.batch, known.length, self.pruning.repeats
            whole, left = compare_latency(pairs, batch=batch, length=length, head=head, repeats=repeats).latencies
            count += 1
            bar(count, TRIES, f"{left.least * 1e3:.2f} ms")
            return left.least / (whole.least if budget.is_fraction else 1.0)

        # one thousandth more than the least: what it is divided and multiplied by must not make it unreachable
        bounds = {"least": 1.001 * least / dense, "most": 1.0 if budget.is_fraction else math.inf}
        search = search_latency(lambda amount: choose(budget.at(amount)), measure, budget.amount, **bounds, tries=TRIES)
        bar(TRIES, TRIES)
        return search

    def _losses(
        self, scores: Sequence[Scores], gates: Gates, means: Gates | None
    ) -> tuple[list[dict[str, Any]], set[str]]:
        """The records of what a selection loses, and the rows of these."""
        records, rows, named = [], set(), {task.name: task for task in self.tasks}
        for each in scores if self.pruning.report_loss else ():
            loss = ScoredLoss(
                self.model,
                self.params,
                named[each.header["task"]],
                each,
                means=means,
                nodes=self.pruning.nodes,
                batch_size=self.pruning.scoring.rows.batch_size,
                open_bar=self.watch.open,
            )
            measured = loss(gates)
            records.append(loss.record(gates, measured))
            rows |= set(measured.rows)
        return records, rows

    def in_rounds(self, budget: Budget) -> Pruned:
        """Scores, selects and compacts in rounds."""
        model, params, pruning, (task,) = self.model, self.params, self.pruning, self.tasks
        workspace, count = self.workspace, pruning.rounds
        settings = _settings(model, params, task, budget, pruning)
        records, after = ([], None) if workspace is None else workspace.load(settings)
        if workspace is not None and after is not None:
            at = f"round {after.number} of {count}: {workspace.folder}"
            self.watch.say(f"{at}, of an earlier run with the same settings")
        (first,) = self.scored(_Stage(self.watch, f"round 1 of {count}, "))
        self.say_note()
        budget = budget.with_length(length := first.header["mean_length"])
        dense = costs(model, params, budget.length or length)

        def stage() -> _Stage:
            return _Stage(self.watch, f"round {len(records) + 1} of {count}, ")

        def score_left(small: Params) -> Scores:
            file = None if workspace is None else workspace.next_scores
            return first if small is params else score_once(model, small, task, pruning.scoring, file, stage())

        def repair(small: Params) -> tuple[Params, RecoveryReport]:
            recovery, bar = pruning.recovery or Recovery(), stage().open("recovering")
            return recover(model, params, small, task, recovery, progress=bar)

        def record_of(gates: Gates) -> dict[str, Any]:
            return pruning_record(first, gates, budget, pruning.rules, rounds=count) | {"rounds": records}

        each = repair if pruning.recover_each_round else None
        steps = prune_in_rounds(
            model, params, score_left, budget, rules=pruning.rules, rounds=count, repair=each, after=after
        )
        last = after
        for last in steps:
            records.append(_round_record(last, dense, costs(model, last.params, budget.length or length)))
            self.watch.say(f"round {last.number} of {count}: {records[-1]['units']:,} units are left")
            if workspace is not None and last.number < count:
                workspace.save(model, last.params, record_of(last.gates) | {"run": settings})
                workspace.next_scores.unlink(missing_ok=True)  # of this round
        if last is None:
            raise ValueError(f"rounds must be at least 1, got {count}.")
        rows, record = first.rows, record_of(last.gates)
        return self._recovered(Pruned(last.params, last.gates, (first,), record, rows, budget, last.recovery))


def score_once(model: Model, params: Params, task: Task, scoring: Scoring, file: Path | None, watch: Watch) -> Scores:
    """Scores and writes the file, unless it holds what would come out."""
    if file is not None and (scores := kept_scores(file, model, params, task, scoring)) is not None:
        watch.say(f"scores: {file}, of an earlier run with the same settings")
        return scores
    if file is not None and file.is_file():
        watch.say(f"scores: {file} was made with other settings, and is replaced")
    return score_into(model, params, task, scoring, file, watch)


def score_into(model: Model, params: Params, task: Task, scoring: Scoring, file: Path | None, watch: Watch) -> Scores:
    """Scores and writes the file; an interrupted run resumes where it was."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    totals = None if file is None else file.with_name(f"{file.name}.partial")
    bar = watch.open(f"scoring {task.name}") if scoring.criterion.examples is not None else None
    scores = score(model, params, task, scoring, progress=bar, resume=totals)
    if count := scores.header.get("cut_off"):
        watch.say(f"{task.name}: {count:,} rows left out, their answers are cut off; --max-length reaches further")
    if count := scores.header.get("truncated"):
        length = scores.header["max_length"]
        watch.say(f"{task.name}: {count:,} texts cut to {length} tokens; --max-length reaches further")
    if file is not None:
        save_scores(file, scores)
    return scores


def _joined(scores: Sequence[Scores], means: Gates | None) -> Scores:
    """The scores of several tasks as a record describes them."""
    if len(scores) == 1:
        return scores[0]
    headers = [dict(each.header) for each in scores]
    header = {"model": headers[0]["model"], "versions": headers[0].get("versions"), "tasks": headers}
    return Scores(scores[0].values, header, means)


def _settings(model: Model, params: Params, task: Task, budget: Budget, pruning: Pruning) -> dict[str, Any]:
    """All that rounds depend on, as JSON holds it."""
    prompt, scoring, recovery = prompt_of(model, task), pruning.scoring, pruning.recovery
    read, described = [scoring.rows], None
    if recovery is not None:
        read, every = [*read, recovery.rows], pruning.recover_each_round
        described = {"method": describe(recovery.method), "rows": describe(recovery.rows), "each_round": every}
    settings = {
        **settings_of(budget, pruning.rules, rounds=pruning.rounds),
        **describe(scoring.rows),
        "until_stable": scoring.until_stable,
        "head": scoring.head,
        "name": task.name,
        "criterion": describe(scoring.criterion),
        "recovery": described,
        "model": model_digest(model, params),
        "data": [digest_rows(model, task, rows) for rows in read],
        "prompt": None if prompt is None else prompt.to_json(),
        "versions": versions(),
        "devices": jax.local_device_count(),
    }
    return json.loads(json.dumps(settings, default=name_of))


def _round_record(done: Round, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """A round as records hold it; `before` and `after` are costs, of the dense model first."""
    values, header = parts_of(done.scores)
    means = done.scores.means if isinstance(done.scores, Scores) else None
    units, had = (sum(counts) for counts in zip(*((int(g.sum()), len(g)) for g in done.gates.values()), strict=True))
    return {
        "round": done.number,
        "budget": done.budget,
        "units": units,
        "kept": ratios(before, after) | {"units": units / had},
        "model": header.get("model"),  # the one that was scored
        "scores": params_digest(dict(values)),
        "means": params_digest(means) if means else None,
        "gates": params_digest(dict(done.gates)),
        "recovery": None if done.recovery is None else recovery_record(done.recovery),
    }


class Round(NamedTuple):
    """The results of one round."""

    number: int  # from 1
    budget: float  # what might stay after it, in the unit of the budget that was given
    scores: Scores | Values  # of the units that were left before it
    gates: Gates  # of all units of the dense model: 1 where one is left
    params: Params  # of the pruned model, repaired if that was asked for
    recovery: RecoveryReport | None


def prune_in_rounds(
    model: Model,
    params: Params,
    score: Callable[[Params], Scores | Values],
    budget: Budget,
    *,
    rules: Rules = Rules(),
    rounds: int,
    repair: Callable[[Params], tuple[Params, RecoveryReport]] | None = None,
    after: Round | None = None,
) -> Iterator[Round]:
    """Prunes to a budget in rounds; the remaining units are scored again in each.

    The last round meets the budget by the law of `select`: what stays costs at most that, and is short of it by less
    than the next block; by allocation `per_layer` it has the widths that one round would give it. One round is `select`
    and `compact`. What a round leaves is `compact(model, params, its gates)`, bit for bit, if nothing is repaired and
    closed units are zero.

    ```python
    def score(small):
        return jp.score(model, small, task)


    *_, last = prune_in_rounds(model, params, score, jp.budgets.Flops(0.3), rounds=3)  # last.params, last.gates
    ```

    Args:
        model: The architecture.
        params: The dense parameters.
        score: Scores the remaining units; the first time it is called with `params`.
        budget: What may stay in the end, of the dense model. A budget of FLOPs needs a length if the scores do not say
            the mean length of their examples, or say another one in each round.
        rules: How units are chosen within the budget.
        rounds: How many; their budgets are a `geometric` sequence.
        repair: Repairs what is left after a round, such as `lambda small: jp.recover(model, params, small, task)`.
        after: Continue after this round of an earlier run with the same arguments.

    Yields:
        Each round when it is finished.

    Raises:
        ValueError: If `rounds` is less than 1, the budget is one of latency, or as `select`.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds must be a whole number, got {rounds!r}.")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    if isinstance(budget, Latency):
        raise ValueError(ONE_ROUND)
    amounts = geometric(rounds, budget.amount, 1.0 if budget.is_fraction else float(memory(params)))

    def steps() -> Iterator[Round]:
        left: Gates = {} if after is None else after.gates
        small, done = (params, 0) if after is None else (after.params, after.number)
        for number, amount in enumerate(amounts[done:], done + 1):
            scores, recovery = score(small), None
            check_scores(model, small, scores)
            gates = select_left(model, params, scores, left, budget.at(amount), rules)
            means = scores.means if isinstance(scores, Scores) else None
            small, left = compact(model, small, units_left(gates, left), means), gates
            if repair is not None:
                small, recovery = repair(small)
            yield Round(number, amount, scores, gates, small, recovery)

    return steps()


def geometric(rounds: int, end: float, start: float = 1.0) -> tuple[float, ...]:
    """Budgets from `start`, which is not among them, to exactly `end`: every round keeps an equal share.

    So no round changes the model more than another does. With equal differences, the last round would remove a larger
    share of what is left than any before it.
    """
    return (*(start * (end / start) ** (number / rounds) for number in range(1, rounds)), end)


def select_left(
    model: Model,
    params: Params,
    scores: Scores | Values,
    left: Gates,
    budget: Budget,
    rules: Rules,
) -> Gates:
    """Selects to a budget of the dense model, among the units that are `left` open by an earlier, larger budget."""
    values, header = parts_of(scores)
    normalise = rules.normalise

    def normalise_left(every: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:  # no norm contains what is gone
        return every if normalise is None else with_gone(normalise(units_left(every, left)), left)

    rules = rules if normalise is None else replace(rules, normalise=normalise_left)
    budget = budget.with_length(header.get("mean_length"))
    every: Any = with_gone(values, left)
    every = every if isinstance(scores, Mapping) else replace(scores, values=every)
    gates = select(model, params, every, budget, rules=rules)
    return {name: jax.device_put(np.minimum(gate, left.get(name, 1.0))) for name, gate in gates.items()}


def with_gone(values: Values, left: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores of the units that are left, as scores of all units: those that are gone rank below all others."""
    arrays = {name: np.asarray(value, np.float64) for name, value in values.items()}
    lowest = -BELOW * (1.0 + max((float(np.abs(value).max(initial=0.0)) for value in arrays.values()), default=0.0))
    padded = {}
    for name, value in arrays.items():
        padded[name] = value if name not in left else np.full(len(left[name]), lowest)
        if name in left:
            padded[name][np.flatnonzero(left[name])] = value
    return padded


def units_left(values: Mapping[str, Any], left: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores or gates of all units, as those of the units that are left, in order."""
    return {
        name: np.asarray(value)[np.flatnonzero(left[name])] if name in left else np.asarray(value)
        for name, value in values.items()
    }

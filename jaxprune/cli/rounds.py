"""Prunes a model folder in rounds; what the last finished one left is kept, and gone on from."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxprune import __version__
from jaxprune.checkpoints.files import read_json, remove_folder
from jaxprune.checkpoints.folder import PRUNING, check_destination, digest, load, model_digest, save
from jaxprune.checkpoints.gate_file import recorded_gates
from jaxprune.cli.pruning import check_scope, facts_of, measure_both, recovery_record, write_pruned
from jaxprune.cli.workflow import Data, Measuring, Progress, Watch, costs, kinds_of, ratios, score_once
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Task
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.models import Model
from jaxprune.models.cost import Length
from jaxprune.pruning.budgets import Budget, Rules
from jaxprune.pruning.prune import Round, prune_in_rounds
from jaxprune.pruning.record import pruning_record, settings_of
from jaxprune.pruning.recovery import Recovery, RecoveryReport, recover
from jaxprune.pruning.selection import check_selection, parts_of
from jaxprune.scoring.objectives import name_of
from jaxprune.scoring.run import Scoring
from jaxprune.scoring.scores import Scores, describe
from jaxprune.units import Gates, Params


def prune_model_in_rounds(
    source: str,
    output: Path,
    budget: Budget,
    rules: Rules,
    *,
    length: Length | None = None,
    rounds: int,
    scoring: Scoring,
    data: Data,
    recovery: Recovery | None = None,
    recover_each_round: bool = False,
    measuring: Measuring,
    overwrite: bool = False,
    watch: Watch,
) -> dict[str, Any]:
    """Prunes a model in rounds, writes its folder and compares the two; see `prune_model`.

    What the last finished round left is kept as `OUTPUT.rounds`, a model folder like any other, until the output is
    written: the same command goes on after that round. The scores of the dense model stay as
    `OUTPUT.scores.safetensors`; those of later rounds go with `OUTPUT.rounds`.

    Raises:
        ValueError: As `prune_in_rounds`, or if `OUTPUT.rounds` belongs to another command and may not be replaced.
    """
    check_destination(output, overwrite)
    check_scope(scoring, rules)
    model, params = load(source)
    check_selection(model, params, budget, rules, kinds_of(model, params, scoring))
    prune_in_rounds(model, params, lambda _: {}, budget, rounds=rounds)  # refuses what cannot be done before any work
    arguments = {**settings_of(budget, rules, length=length), "rounds": rounds}
    task = data.load(watch)
    fitting_head(model, task, measuring.head)
    state = _State(
        folder=output.with_name(f"{output.name}.rounds"),
        settings=_settings(model, params, task, arguments, scoring, _described(recovery, recover_each_round)),
    )
    records, after = state.load(overwrite)
    if after is not None:
        watch.say(f"round {after.number} of {rounds}: {state.folder}, of an earlier run with the same settings")
    kept = output.with_name(f"{output.name}.scores.safetensors")
    first = score_once(model, params, task, scoring, kept, _Stage(watch, 1, rounds))
    tokens: Length = first.header["mean_length"] if length is None else length
    budget = budget.with_length(tokens)
    dense = costs(model, params, tokens)

    def made(gates: Gates) -> dict[str, Any]:
        return pruning_record(first, gates, budget, rules, length=tokens, rounds=rounds)

    def score(small: Params) -> Scores:
        stage = _Stage(watch, len(records) + 1, rounds)
        return first if small is params else score_once(model, small, task, scoring, state.scores, stage)

    def repair(small: Params, recovery: Recovery) -> tuple[Params, RecoveryReport]:
        stage = _Stage(watch, len(records) + 1, rounds) if recover_each_round else watch
        return recover(model, params, small, task, recovery, progress=stage.open("recovering"))

    def keep(done: Round) -> Round:
        records.append(_record(done, dense, costs(model, done.params, tokens)))
        watch.say(f"round {done.number} of {rounds}: {records[-1]['units']:,} units are left")
        if done.number < rounds:
            state.save(model, done, made(done.gates) | {"rounds": records})
        return done

    every = partial(repair, recovery=recovery) if recovery is not None and recover_each_round else None
    steps = prune_in_rounds(model, params, score, budget, rules=rules, rounds=rounds, repair=every, after=after)
    last = deque(map(keep, steps), maxlen=1).pop()
    small, repaired = last.params, last.recovery
    if recovery is not None and every is None:
        small, repaired = repair(small, recovery)
    pruning = made(last.gates) | {"rounds": records}
    rows = set(first.header["rows"])
    if repaired is not None:
        pruning["recovery"] = recovery_record(repaired)
        rows |= set(repaired.rows)
    facts = facts_of(model, kept, first)
    found = measure_both(model, params, small, [task], tokens, facts["head"], rows, measuring, watch)
    record = {
        "command": "prune",
        "source": source,
        "output": str(output),
        "recovery": pruning.get("recovery"),
        "rounds": records,
        **facts,
    }
    complete = write_pruned(output, model, small, pruning, record, found, overwrite=overwrite)
    state.remove()
    return complete


@dataclass(frozen=True, kw_only=True)
class _State:
    """What the last finished round left, beside the output, until all rounds are finished."""

    folder: Path
    settings: Mapping[str, Any]  # all that the rounds depend on

    @property
    def scores(self) -> Path:
        """The score file of the next round."""
        return self.folder.with_name(f"{self.folder.name}.scores.safetensors")

    def save(self, model: Model, done: Round, pruning: Mapping[str, Any]) -> None:
        """Puts a finished round in place of the one before it, in one step."""
        save(self.folder, model, done.params, pruning={**pruning, "run": self.settings}, overwrite=True)

    def load(self, overwrite: bool) -> tuple[list[dict[str, Any]], Round | None]:
        """The records of the rounds that are finished, and the last of these; none if there is no folder."""
        check_destination(self.folder, True)
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return [], None
        found = read_json(self.folder / PRUNING) if (self.folder / PRUNING).is_file() else {}
        if "run" not in found:
            raise FileExistsError(
                f"{self.folder} is a model and not what an interrupted run in rounds left: move it away, or choose "
                "another output."
            )
        if other := [name for name, value in self.settings.items() if found["run"].get(name) != value]:
            if not overwrite:
                raise ValueError(
                    f"{self.folder} was begun with other settings ({', '.join(other)}): give those to go on, or "
                    "another output, or start anew with --overwrite."
                )
            self.remove()
            return [], None
        records, (_, params) = found["rounds"], load(self.folder, dtype=None)
        return records, Round(len(records), records[-1]["budget"], {}, recorded_gates(found), params, None)

    def remove(self) -> None:
        """Removes what is beside the output."""
        for file in (self.scores, self.scores.with_name(f"{self.scores.name}.partial")):
            file.unlink(missing_ok=True)
        remove_folder(self.folder)


@dataclass(frozen=True)
class _Stage:
    """A watch that says in which round a stage is."""

    watch: Watch
    number: int
    rounds: int

    def open(self, label: str) -> Progress:
        """Opens a new stage."""
        return self.watch.open(f"round {self.number} of {self.rounds}, {label}")

    def say(self, message: Any) -> None:
        """Shows a line, or a table."""
        self.watch.say(message)


def _described(recovery: Recovery | None, each_round: bool) -> dict[str, Any] | None:
    """Recovery as JSON holds it, under the names that it has always had there."""
    if recovery is None:
        return None
    rows = recovery.rows
    return {
        "name": "Recovering",
        "method": describe(recovery.method),
        "examples": rows.examples,
        "seed": rows.key,
        "batch_size": rows.batch_size,
        "max_length": rows.max_length,
        "every_round": each_round,
    }


def _settings(
    model: Model,
    params: Params,
    task: Task,
    arguments: Mapping[str, Any],
    scoring: Scoring,
    recovery: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that the rounds of a command depend on, as JSON holds it."""
    prompt = prompt_of(model, task)
    found = {
        **arguments,
        **describe(scoring.rows),
        "until_stable": scoring.until_stable,
        "head": scoring.head,
        "name": task.name,
        "criterion": describe(scoring.criterion),
        "recovery": recovery,
        "model": model_digest(model, params),
        "rows": task.digest("calibration"),
        "prompt": None if prompt is None else prompt.to_json(),
        "versions": {"jaxprune": __version__, "jax": jax.__version__},
        "devices": jax.local_device_count(),
    }
    return json.loads(json.dumps(found, default=name_of))


def _record(done: Round, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What `pruning.json` and the record say of a round; `before` and `after` are costs, of the dense model first."""
    values, header = parts_of(done.scores)
    means = done.scores.means if isinstance(done.scores, Scores) else None
    units, had = (sum(own) for own in zip(*((int(g.sum()), len(g)) for g in done.gates.values()), strict=True))
    return {
        "round": done.number,
        "budget": done.budget,
        "units": units,
        "kept": ratios(before, after) | {"units": units / had},
        "model": header.get("model"),  # the one that was scored
        "scores": digest(dict(values)),
        "means": digest(means) if means else None,
        "gates": digest(dict(done.gates)),
        "recovery": None if done.recovery is None else recovery_record(done.recovery),
    }

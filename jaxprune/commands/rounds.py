"""Pruning in rounds: what is left is scored again, cut further and, if wanted, repaired, until it fits the budget.

In every round the selection is made among all units of the dense model, with those that are gone ranked below all
others. So budgets, floors, multiples, protected layers and the fractions that are kept of each layer mean in every
round what they mean in one, and the units of all rounds have the indices of the dense model.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import __version__
from jaxprune.budgets.provenance import pruning_record, recorded_gates
from jaxprune.checkpoint import PRUNING, check_destination, digest, load, model_digest, save
from jaxprune.commands.pruning import check_scope, facts_of, measure_both, recovery_record, write_pruned
from jaxprune.commands.workflow import (
    Data,
    Measuring,
    Progress,
    Recovering,
    Scoring,
    Selection,
    Watch,
    check_folder,
    costs,
    kinds_of,
    ratios,
    repair,
    score_once,
    try_selection,
)
from jaxprune.compaction import compact
from jaxprune.cost import memory
from jaxprune.criteria.objectives import name_of
from jaxprune.data.prompts import prompt_of
from jaxprune.evaluation import fitting_head
from jaxprune.formats.files import read_json, remove_folder
from jaxprune.gates import Gates, Params
from jaxprune.models import Model
from jaxprune.recovery import Recovery
from jaxprune.scores import Scores, describe
from jaxprune.selection import AMOUNTS, SHARES, Values, only_budget, parts_of, select
from jaxprune.tasks import Task

BELOW = 1e9  # times the largest score: units that are gone stay last, whatever the units of a site cost


class Round(NamedTuple):
    """What one round found, and what it left."""

    number: int  # from 1
    budget: float  # what might stay after it, in the unit of the budget that was given
    scores: Scores | Values  # of the units that were left before it
    gates: Gates  # of all units of the dense model: 1 where one is left
    params: Params  # what is left, repaired if that was asked for
    recovery: Recovery | None


def prune_in_rounds(
    model: Model,
    params: Params,
    score: Callable[[Params], Scores | Values],
    *,
    rounds: int,
    repair: Callable[[Params], tuple[Params, Recovery]] | None = None,
    after: Round | None = None,
    **selection: Any,
) -> Iterator[Round]:
    """Prunes to a budget in rounds, in each of which what is left is scored again.

    The last round meets the budget by the law of `select`: what stays costs at most that, and is short of it by less
    than the next block; with `per_layer` it has the widths that one round would give it. One round is `select` and
    `compact`. What a round leaves is `compact(model, params, its gates)`, bit for bit, if nothing is repaired and
    closed units are zero.

    ```python
    steps = jp.prune_in_rounds(model, params, lambda small: jp.score(model, small, task), rounds=3, flops=0.3)
    *_, last = steps  # last.params, last.gates
    ```

    Args:
        model: The architecture.
        params: The dense parameters.
        score: Scores what is left; the first time it is called with `params`.
        rounds: How many; their budgets are a `geometric` sequence.
        repair: Repairs what is left after a round, such as `lambda small: jp.recover(model, params, small, task)`.
        after: Go on after this round of an earlier run with the same arguments.
        **selection: The arguments of `select`. The budget is what may stay in the end, of the dense model. A budget of
            FLOPs needs `length` if the scores do not say the mean length of their examples, or say another one in each
            round.

    Yields:
        Each round when it is finished.

    Raises:
        ValueError: If `rounds` is less than 1, the budget is one of latency, or as `select`.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds must be a whole number, got {rounds!r}.")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    budget = only_budget(**{name: selection.get(name) for name in (*SHARES, *AMOUNTS)})
    if budget.kind == "latency":
        raise ValueError(
            "a budget of latency is met in one round: its widths come from a table of the dense model, and those of a "
            "smaller budget need not lie within those of a larger one. Give flops, or one round."
        )
    budgets = geometric(rounds, budget.value, 1.0 if budget.name in SHARES else float(memory(params)))
    steps = [{**selection, budget.name: value} for value in budgets]
    return _rounds(model, params, score, budgets, steps, repair, after)


def geometric(rounds: int, end: float, start: float = 1.0) -> tuple[float, ...]:
    """Budgets from `start`, which is not among them, to exactly `end`: every round keeps an equal share.

    So no round changes the model more than another does. With equal differences, the last round would remove a larger
    share of what is left than any before it.
    """
    return (*(start * (end / start) ** (number / rounds) for number in range(1, rounds)), end)


def select_left(model: Model, params: Params, scores: Scores | Values, left: Gates, **selection: Any) -> Gates:
    """Selects among the units that are left, to a budget that is one of the dense model.

    Args:
        model: The architecture.
        params: The dense parameters.
        scores: Of the units that are left.
        left: What this returned at a larger budget, with the same rules. A site that is not named is whole.
        **selection: The arguments of `select`.

    Returns:
        Gates of the units of the dense model: open only where `left` is.
    """
    values, header = parts_of(scores)
    if selection.get("length") is None:
        selection["length"] = header.get("mean_length")
    normalise = selection.pop("normalise", None)

    def own(every: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:  # units that are gone belong to no norm
        return with_gone(normalise(units_left(every, left)), left)

    gates = select(model, params, with_gone(values, left), **selection, normalise=None if normalise is None else own)
    return {name: jnp.asarray(np.minimum(gate, left.get(name, 1.0))) for name, gate in gates.items()}


def with_gone(values: Values, left: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores of the units that are left, as scores of all units: those that are gone rank below all others."""
    arrays = {name: np.asarray(value, np.float64) for name, value in values.items()}
    lowest = -BELOW * (1.0 + max((float(np.abs(value).max(initial=0.0)) for value in arrays.values()), default=0.0))
    found = {}
    for name, value in arrays.items():
        found[name] = value if name not in left else np.full(len(left[name]), lowest)
        if name in left:
            found[name][np.flatnonzero(left[name])] = value
    return found


def units_left(values: Mapping[str, Any], left: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores or gates of all units, as those of the units that are left, in order."""
    return {
        name: np.asarray(value)[np.flatnonzero(left[name])] if name in left else np.asarray(value)
        for name, value in values.items()
    }


def _rounds(
    model: Model,
    params: Params,
    score: Callable[[Params], Scores | Values],
    budgets: tuple[float, ...],
    steps: list[dict[str, Any]],
    repair: Callable[[Params], tuple[Params, Recovery]] | None,
    after: Round | None,
) -> Iterator[Round]:
    left: Gates = {} if after is None else after.gates
    small, done = (params, 0) if after is None else (after.params, after.number)
    for number, (budget, step) in enumerate(zip(budgets, steps, strict=True), 1):
        if number <= done:
            continue
        scores = score(small)
        select(model, small, scores, units=1.0)  # refuses scores of another model
        gates = select_left(model, params, scores, left, **step)
        means = scores.means if isinstance(scores, Scores) else None
        small, found = compact(model, small, units_left(gates, left), means), None
        if repair is not None:
            small, found = repair(small)
        left = gates
        yield Round(number, budget, scores, gates, small, found)


def prune_model_in_rounds(
    source: str,
    output: Path,
    selection: Selection,
    *,
    rounds: int,
    scoring: Scoring,
    data: Data,
    recovering: Recovering | None = None,
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
    check_folder(output, overwrite)
    check_scope(scoring, selection)
    model, params = load(source)
    try_selection(model, params, selection, kinds_of(model, params, scoring))
    arguments: dict[str, Any] = {**selection.arguments(), "rounds": rounds}
    prune_in_rounds(model, params, lambda _: {}, **arguments)  # refuses what cannot be done before any work
    task = data.load()
    fitting_head(model, task, measuring.head)
    state = _State(
        folder=output.with_name(f"{output.name}.rounds"),
        settings=_settings(model, params, task, arguments, scoring, recovering),
    )
    records, after = state.load(overwrite)
    if after is not None:
        watch.say(f"round {after.number} of {rounds}: {state.folder}, of an earlier run with the same settings")
    kept = output.with_name(f"{output.name}.scores.safetensors")
    first = score_once(model, params, task, scoring, kept, _Stage(watch, 1, rounds))
    arguments["length"] = length = first.header["mean_length"] if selection.length is None else selection.length
    dense = costs(model, params, length)

    def score(small: Params) -> Scores:
        stage = _Stage(watch, len(records) + 1, rounds)
        return first if small is params else score_once(model, small, task, scoring, state.scores, stage)

    def mend(small: Params, how: Recovering) -> tuple[Params, Recovery]:
        stage = _Stage(watch, len(records) + 1, rounds) if how.every_round else watch
        return repair(model, params, small, [task], how, stage)

    def keep(done: Round) -> Round:
        records.append(_record(done, dense, costs(model, done.params, length)))
        watch.say(f"round {done.number} of {rounds}: {records[-1]['units']:,} units are left")
        if done.number < rounds:
            state.save(model, done, pruning_record(first, done.gates, **arguments) | {"rounds": records})
        return done

    every = None if recovering is None or not recovering.every_round else partial(mend, how=recovering)
    steps = prune_in_rounds(model, params, score, repair=every, after=after, **arguments)
    last = deque(map(keep, steps), maxlen=1).pop()
    small, repaired = last.params, last.recovery
    if recovering is not None and every is None:
        small, repaired = mend(small, recovering)
    pruning = pruning_record(first, last.gates, **arguments) | {"rounds": records}
    rows = set(first.header["rows"])
    if repaired is not None:
        pruning["recovery"] = recovery_record(repaired)
        rows |= set(repaired.rows)
    facts = facts_of(model, kept, first)
    found = measure_both(model, params, small, [task], length, facts["head"], rows, measuring, watch)
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


def _settings(
    model: Model,
    params: Params,
    task: Task,
    arguments: Mapping[str, Any],
    scoring: Scoring,
    recovering: Recovering | None,
) -> dict[str, Any]:
    """All that the rounds of a command depend on, as JSON holds it."""
    prompt = prompt_of(model, task)
    found = {
        **arguments,
        **describe(scoring),
        "name": task.name,
        "criterion": describe(scoring.criterion),
        "recovery": None if recovering is None else describe(recovering),
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

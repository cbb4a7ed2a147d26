"""Allocation by measured answers: how many units each module keeps, by what closing the others does to the model.

Within a module units are ranked by their scores, as everywhere. How many of them stay is found on calibration rows:
from the best of the other allocations on, every module is made a little wider and a little narrower, one at a time, and
the model's answers are measured. *Losses* of several modules do not add up, but *changes of the answers' logits* nearly
do: their sum predicts the answers of any widths among those measured, and so the loss. Exchanges of width between
modules lessen that prediction at the same cost, as far as they can; what they lead to is measured, and the next round,
with finer steps, begins there if it is better. So the result never loses more than what it began with, on these rows.

What a repair can mend is not what hurts: where the model will be repaired by reconstruction, every module is measured
as that will leave it, its output kernel fitted to what the dense module gives, by sums over the same rows.

A layer's change needs only the layers from it on: those before it have run once. All answers that were measured can be
kept in a file, by widths: an interrupted search goes on there, and other budgets begin with what it holds.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.checkpoints.files import DIGEST, check_file, differences, parse_header, write_atomic
from jaxprune.checkpoints.tensors import (
    TensorFile,
    is_sealed,
    model_digest,
    params_digest,
    sealed,
    versions,
    write_tensors,
)
from jaxprune.compaction import compact, fewer_shapes
from jaxprune.data.batches import IGNORED, Encoded, digest_encoded, pack, usable_rows
from jaxprune.data.prompts import prompt_of
from jaxprune.data.tasks import Rows, Task, draw, row_key
from jaxprune.evaluation.evaluate import fitting_head
from jaxprune.evaluation.text import asked_for, candidates_in, likelihood_of, teacher_forced, worded
from jaxprune.models import Model
from jaxprune.models.layers import LANGUAGE
from jaxprune.models.running import (
    Layer,
    State,
    enter,
    layer_entries,
    mask_of,
    model_inputs,
    model_layers,
    part,
    prompt_inputs,
    readout_compiled,
    readout_mask,
    repeat_rows,
    run_layer,
)
from jaxprune.pruning.budgets import Budget, Latency, Rules
from jaxprune.pruning.pooling import mean_closed, mean_scores
from jaxprune.pruning.recoveries import DenseModules
from jaxprune.pruning.selection import Choices, Ladders, Values, ladders, parts_of, per_cost, select
from jaxprune.scoring.scores import Scores
from jaxprune.units import Gates, Intervention, Params, flatten, unflatten

EXAMPLES = 64  # rows that answers are measured on, unless asked otherwise
FEWEST = 8  # rows: the answers of fewer say too little
STARTS = ("per_layer", "per_kind", "global")  # the allocations that it begins with the best of
STEPS = 10  # parts of a module that are moved in the first round; twice as many in each round after it
REACH = (-2, 2)  # parts by which a module is made narrower and wider
LIKELIEST, TOKENS = 16, 4096  # of running text: next tokens that are told apart, and places where they are
MOST_LOGITS = 2**27
MOST_EXCHANGES = 1000
BACK = 3  # times that a way is shortened to its first half, while what it leads to is no better
VERIFIED = 16  # exchanges, the best by a quadratic estimate, whose prediction is computed
SAVE_EVERY = 30  # seconds
KEPT = "jaxprune_answers"  # in the file's metadata
_KEPT = {"settings": {...: object}, "finished": [{"budget": {...: object}, "places": [int]}], "checksum": DIGEST}


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """The settings of an allocation by measured answers."""

    rows: Rows = Rows(examples=EXAMPLES)  # of each task
    rounds: int = 2  # in each, all modules are measured at some other widths
    labelled: bool = False  # lose the labels' log-probability, not the agreement with the dense model's answers
    # None: modules are measured as `compact` leaves them. A number: as a reconstruction will, by one ridge of so much
    ridge: float | None = None
    file: Path | None = None  # where answers are kept: to go on after an interruption, and for other budgets

    def __post_init__(self):
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int):
            raise TypeError(f"rounds of an allocation must be a whole number, got {self.rounds!r}.")
        if self.rounds < 1:
            raise ValueError(
                f"rounds of an allocation must be at least 1, got {self.rounds}: give per_layer or global."
            )
        if self.ridge is not None and not 0 < self.ridge < math.inf:
            raise ValueError(f"the ridge that modules are fitted by must be above 0, or None, got {self.ridge}.")
        few = self.rows.examples if isinstance(self.rows.examples, int) else len(self.rows.examples or ()) or EXAMPLES
        if few < FEWEST:
            raise ValueError(f"answers are measured on at least {FEWEST} rows, got {few}: give more.")


class AllocationRound(NamedTuple):
    """One round of an allocation."""

    passes: int  # answers measured of all rows
    predicted: float  # loss of the widths that the exchanges led to
    measured: float


class Allocation(NamedTuple):
    """The widths that were found, and what they lose."""

    gates: Gates
    loss: float  # nats per answer, measured, mean over the tasks
    starts: Mapping[str, float]  # the same of the other allocations at this budget
    rounds: tuple[AllocationRound, ...]
    rows: tuple[str, ...]  # keys of the rows that were measured
    known: Mapping[str, Any] | None = None  # the budget that the widths' effects were measured at, if at another
    cut_off: int = 0  # rows of span tasks that were not drawn from, because their answers are cut off
    truncated: int = 0  # rows whose texts are cut

    def to_json(self) -> dict[str, Any]:
        """All but gates and rows as plain values."""
        rounds = [each._asdict() for each in self.rounds]
        found = {"loss": self.loss, "starts": dict(self.starts), "rounds": rounds, "examples": len(self.rows)}
        return found | {"measured_at": self.known, "cut_off": self.cut_off, "truncated": self.truncated}


def allocate(
    model: Model,
    params: Params,
    tasks: Task | Sequence[Task],
    scores: Scores | Values | Sequence[Scores],
    budget: Budget,
    measuring: Measuring = Measuring(),
    *,
    rules: Rules = Rules(),
    progress: Callable[[int, int], None] | None = None,
) -> Allocation:
    """Selects units by scores within every module, and the modules' widths by the model's measured answers.

    The loss is the mean over the rows of the divergence from the dense model's answers: `KL(dense || pruned)` among the
    labels or the label words (of these their means over the rows are taken off, where the prompt calibrates by batch;
    content-free calibration is not applied), of spans among the tokens, of running text among the likeliest next tokens
    and all others together; in a regression the squared difference over the variance. No labels are read unless
    `measuring.labelled`. Of several tasks it is the mean of theirs.

    What stays costs at most the budget, and is short of it by less than the largest next block of a module. The same
    arguments give the same result. The loss is never larger than that of any other allocation, on these rows.

    With a file that already holds what was measured for another budget, no module is measured again: its effects are
    taken from there, and only what they lead to is measured.

    Args:
        model: The architecture.
        params: The dense parameters.
        tasks: The task, or several; their calibration rows are drawn from.
        scores: Higher means more needed, within a module; or those of every task, which are pooled. Their means replace
            closed units, if they have any. One for several tasks is the ranking for all of them.
        budget: How much may stay; a latency is what its table predicts.
        measuring: The rows, and how long to look.
        rules: As for `select`; the allocation is ignored.
        progress: Called with the number of passes that are finished, and the most there can be.

    Raises:
        ValueError: As `select`; also if there are fewer than 8 rows, labels are wanted of rows without, or the file is
            damaged or holds answers of another model, other rows or scores.
    """
    several = [tasks] if isinstance(tasks, Task) else list(tasks)
    each: list[Any] = [scores] if isinstance(scores, Scores | Mapping) else list(scores)
    if len(each) not in (1, len(several)):
        raise ValueError(f"give scores of every task: {len(several)} tasks, {len(each)} scores.")
    ranked: Any = each[0] if len(each) == 1 else _ranking(each)
    means = mean_closed(each) if all(isinstance(own, Scores) for own in each) else None
    heads = [parts_of(own)[1].get("head") for own in each] if len(each) == len(several) else [None] * len(several)
    asked = [_Asked.of(model, task, head, measuring.rows) for task, head in zip(several, heads, strict=True)]
    choices = ladders(model, params, ranked, budget, rules)
    answers = _Answers(model, params, asked, measuring, means, choices)
    starts = {
        name: choices.places(select(model, params, ranked, budget, rules=replace(rules, allocation=name)))
        for name in STARTS
        if name != "per_kind" or not isinstance(budget, Latency)
    }
    known = answers.other_budget(budget)
    sweep = 0 if known else 1 + len(REACH) * len(choices.sites)
    bar = _Counter(progress, len(starts) + measuring.rounds * (sweep + BACK) + (0 if known else len(choices.sites)))
    measured = {name: answers.loss(answers(at, bar)) for name, at in starts.items()}
    best = min(measured, key=lambda name: measured[name])
    at, lost, rounds = starts[best], measured[best], []
    for number in range(measuring.rounds):
        before = bar.done
        if known is not None:
            moves = answers.known_moves(known["places"], at, bar)
        else:
            offered = [
                _offered(steps, int(place), STEPS * 2**number, whole=number == 0)
                for steps, place in zip(choices.steps, at, strict=True)
            ]
            moves = answers.moves(at, offered, bar)
        path = _exchanged(choices, moves, answers)
        for tries in range(BACK):  # the further the widths are away, the less the predictions are worth
            found = _filled(choices, moves, path[len(path) // 2**tries - 1], answers.loss)
            predicted, true = answers.loss(moves.answers(found)), answers.loss(answers(found, bar))
            if true < lost or len(path) <= 2**tries:
                break
        rounds.append(AllocationRound(bar.done - before, predicted, true))
        if true < lost:
            at, lost = found, true
        if known is None:
            answers.finished(budget, moves.at)
    answers.save()
    bar.end()
    rows = tuple(sorted({row_key(row) for own in asked for row in own.rows}))
    left_out = (sum(own.cut_off for own in asked), sum(own.encoded.truncated for own in asked))
    return Allocation(
        choices.gates(at), lost, measured, tuple(rounds), rows, None if known is None else known["budget"], *left_out
    )


def _ranking(scores: Sequence[Scores]) -> Scores:
    """Scores that rank the units of every module for several tasks."""
    values: Any = mean_scores(scores)
    return Scores(values, {"properties": {"per_cost": any(map(per_cost, scores))}})


class _Asked(NamedTuple):
    """A task, and the rows that its answers are measured on."""

    task: Task
    head: str
    rows: tuple[Any, ...]
    encoded: Encoded
    cut_off: int

    @classmethod
    def of(cls, model: Model, task: Task, head: str | None, settings: Rows) -> _Asked:
        """Draws the rows.

        Raises:
            ValueError: If there are too few.
        """
        head = fitting_head(model, task, head)
        usable, rows = usable_rows(model, task, settings), settings.examples
        if not isinstance(rows, tuple):
            split = settings.split or "calibration"
            there = len(usable.task.rows(split))
            if there < FEWEST:
                raise ValueError(
                    f"answers are measured on at least {FEWEST} rows; {task.name!r} has {there} {split} rows."
                )
            rows = draw(usable.task, min(rows or EXAMPLES, there), settings.random, split=split)
        return cls(task, head, rows, usable.encode(rows), usable.cut_off)


class _Counter:
    """The passes that are done."""

    def __init__(self, progress: Callable[[int, int], None] | None, most: int):
        self.progress, self.most, self.done = progress, most, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.most), self.most)

    def end(self) -> None:
        if self.progress is not None:
            self.progress(self.most, self.most)


class _Answers:
    """The model's answers in all tasks, one after the other in one vector, by the widths of its modules.

    Widths are places on the ladders of the sites. Whatever was measured is not measured again.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        asked: Sequence[_Asked],
        measuring: Measuring,
        means: Gates | None,
        choices: Ladders,
    ):
        size = measuring.rows.batch_size
        self.choices, self.file = choices, measuring.file
        self.model, self.params, self.means = model, params, means
        self.readers = [_Reader(model, params, own.encoded, own.head, size) for own in asked]
        dense = [reader.answers() for reader in self.readers]
        self.losses = [
            _Loss.of(model, own.task, reader, answers, measuring.labelled)
            for own, reader, answers in zip(asked, self.readers, dense, strict=True)
        ]
        self.ends = np.cumsum([answers.size for answers in dense])
        self.shapes = [answers.shape for answers in dense]
        self.fitted: DenseModules | None = None  # what modules are fitted to that are not whole
        if measuring.ridge is not None:
            self.fitted = DenseModules(model, measuring.ridge)
            for reader in self.readers:
                reader.add_to(self.fitted)
        self.points: dict[bytes, np.ndarray] = {}
        self.known: list[dict[str, Any]] = []  # the budgets that the effects of all modules were measured for
        self.saved = time.monotonic()
        if self.file is not None:
            ranking = {name: np.asarray(units) for name, units in choices.candidates.ranking.items()}
            steps = zip(choices.sites, choices.steps, strict=True)
            ladder = {" ".join(site.name for site in sites): each.widths for sites, each in steps}
            self.settings = {
                "model": model_digest(model, params),
                "tasks": [[own.task.name, own.head, digest_encoded(own.encoded, own.rows)] for own in asked],
                "units": params_digest({"ranking": ranking, "widths": ladder}),
                "means": None if means is None else params_digest(dict(means)),
                "ridge": measuring.ridge,
                "precision": jax.config.values["jax_default_matmul_precision"],
                "versions": versions(),
            }
            self._load(self.file)

    def _load(self, file: Path) -> None:
        """Takes up what a file holds; of other settings it is of no use."""
        check_file(file, True)
        if not file.exists():
            return
        with TensorFile(file) as kept:
            problems, header = parse_header(kept.metadata.get(KEPT, "{}"), _KEPT)
            problems += [f"no {name}" for name in ("places", "answers") if name not in kept.entries]
            arrays = {} if problems else {name: kept.read(name) for name in kept.entries}
        if not problems and not is_sealed(header, arrays):
            problems.append("its checksum is another than that of what it holds")
        if problems:
            raise ValueError(f"{file} is damaged ({'; '.join(problems)}): remove it to measure again.")
        if other := differences(header["settings"], json.loads(json.dumps(self.settings))):
            warnings.warn(f"{file} holds answers of other settings ({other}): it is begun anew.", stacklevel=4)
            return
        self.known = header["finished"]
        self.points = {place.tobytes(): row for place, row in zip(arrays["places"], arrays["answers"], strict=True)}

    def save(self) -> None:
        """Writes what was measured to the file, if there is one."""
        if self.file is None:
            return
        places = np.frombuffer(b"".join(self.points), np.uint8).reshape(len(self.points), -1)
        arrays = {"places": places, "answers": np.stack([*self.points.values()])}
        text = json.dumps(sealed({"settings": self.settings, "finished": self.known}, arrays))
        write_atomic(self.file, partial(write_tensors, tensors=arrays, metadata={KEPT: text}))
        self.saved = time.monotonic()

    def _keep(self, at: np.ndarray, answers: np.ndarray) -> np.ndarray:
        self.points[at.astype(np.int32).tobytes()] = answers
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()
        return answers

    def _kept(self, at: np.ndarray) -> np.ndarray | None:
        return self.points.get(at.astype(np.int32).tobytes())

    def __call__(self, at: np.ndarray, count: Callable[[], None]) -> np.ndarray:
        """The answers at some widths."""
        count()
        if (kept := self._kept(at)) is not None:
            return kept
        way = self._gated(self.choices.gates(at))
        return self._keep(at, np.concatenate([reader.answers(way).ravel() for reader in self.readers]))

    def _gated(self, gates: Gates) -> list[_Step]:
        """The dense layers under gates."""
        return [self._gated_layer(layer, gates) for layer in self.readers[0].layers]

    def _gated_layer(self, layer: Layer, gates: Gates) -> _Step:
        return _Step(layer if self.fitted is None else self.fitted.layer(layer, gates), Intervention(gates, self.means))

    def _compacted(self, gates: Gates) -> list[_Step]:
        """The layers without the units that gates close: as many compiled programs, but less to compute."""
        flat = flatten(self.params)
        for layer in () if self.fitted is None else self.readers[0].layers:
            local = flatten(self._gated_layer(layer, gates).layer.params)
            flat |= {(*layer.path, *path): array for path, array in local.items()}
        small = compact(self.model, unflatten(flat), gates, self.means if self.fitted is None else None)
        layers = model_layers(self.model, fewer_shapes(self.model, self.params, small))
        return [_Step(layer, Intervention()) for layer in layers]

    def moves(self, at: np.ndarray, offered: Sequence[Sequence[int]], count: Callable[[], None]) -> _Moves:
        """Measures the model with one module at a time at the widths that are offered for it.

        What comes before the layer of that module runs once, and what comes after it without the closed units.
        """
        gates, whole = self.choices.gates(at), self(at, count)
        way: list[_Step] = []
        found: list[tuple[int, int, np.ndarray]] = [(i, int(place), np.zeros_like(whole)) for i, place in enumerate(at)]
        layers = self.readers[0].layers
        states: list[Any] = [reader.states() for reader in self.readers]
        run = 0  # layers that the states have run through
        own = [dict.fromkeys(site.name for site in sites) for sites in self.choices.sites]
        first = [next(k for k, layer in enumerate(layers) if layer_entries(names, layer.name)) for names in own]
        for number in range(len(layers)):
            for i, names in enumerate(own):
                for place in offered[i] if first[i] == number else ():
                    moved = at.copy()
                    moved[i] = place
                    answers = self._kept(moved)
                    if answers is None:
                        way = way or self._compacted(gates)
                        while run < number:
                            states = [r.advanced(run, s, way) for r, s in zip(self.readers, states, strict=True)]
                            run += 1
                        moved_gates = gates | self.choices.gates_of(i, place)
                        changed = [
                            self._gated_layer(each, moved_gates) if layer_entries(names, each.name) else step
                            for each, step in zip(layers, way, strict=True)
                        ]
                        pairs = zip(self.readers, states, strict=True)
                        parts = [reader.answers(changed, number, state).ravel() for reader, state in pairs]
                        answers = self._keep(moved, np.concatenate(parts))
                    count()
                    found.append((i, place, answers - whole))
        site, place, change = zip(*found, strict=True)
        return _Moves(at, whole, np.array(site, int), np.array(place, int), np.stack(change))

    def finished(self, budget: Budget, at: np.ndarray) -> None:
        """Notes that the effects of all modules were measured about some widths, for a budget."""
        own = {"budget": budget.settings(), "places": at.tolist()}
        self.known = [each for each in self.known if each["budget"] != own["budget"]] + [own]

    def other_budget(self, budget: Budget) -> dict[str, Any] | None:
        """The last budget that effects were measured for, unless they were for this one."""
        own = json.loads(json.dumps(budget.settings()))
        return None if not self.known or any(each["budget"] == own for each in self.known) else self.known[-1]

    def known_moves(self, begun: Sequence[int], at: np.ndarray, count: Callable[[], None]) -> _Moves:
        """What is known of single modules about some widths, taken for what they do about others."""
        base = np.array(begun)
        places = np.frombuffer(b"".join(self.points), np.int32).reshape(len(self.points), -1)
        answers, first = [*self.points.values()], self.points[base.astype(np.int32).tobytes()]
        near = [(i, np.flatnonzero(own != base)) for i, own in enumerate(places)]
        near = [(i, moved[0]) for i, moved in near if len(moved) == 1]
        still = range(len(base))
        known = _Moves(
            base,
            first,
            np.array([*still, *(site for _, site in near)]),
            np.array([*base, *(places[i, site] for i, site in near)]),
            np.stack([*(np.zeros_like(first) for _ in still), *(answers[i] - first for i, _ in near)]),
        )
        own = [known.of(i, int(place)) for i, place in enumerate(at)]
        site = np.array([*known.site, *still])
        change = np.stack(
            [*(move - own[i] for i, move in zip(known.site, known.change, strict=True)), *known.change[: len(base)]]
        )
        return _Moves(at, self(at, count), site, np.array([*known.place, *at]), change)

    def _split(self, answers: np.ndarray) -> list[np.ndarray]:
        """The answers of every task, `[n, k]`; also of several changes, `[m, n, k]`."""
        parts = np.split(answers, self.ends[:-1], axis=-1)
        return [own.reshape(*answers.shape[:-1], *shape) for own, shape in zip(parts, self.shapes, strict=True)]

    def loss(self, answers: np.ndarray) -> float:
        """The mean of the tasks' losses."""
        return float(np.mean([loss(own) for loss, own in zip(self.losses, self._split(answers), strict=True)]))

    def quadratic(self, answers: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slope of the loss along each of some changes `[m, ...]`, and the curvature along each two of them."""
        pairs = zip(self.losses, self._split(answers), self._split(changes), strict=True)
        slopes, curves = zip(*(loss.quadratic(own, change) for loss, own, change in pairs), strict=True)
        return np.mean(slopes, axis=0), np.mean(curves, axis=0)


class _Step(NamedTuple):
    """A layer as it runs: dense under gates, or compacted."""

    layer: Layer
    intervention: Intervention = Intervention()


class _Phase(NamedTuple):
    """Layers that read the same inputs."""

    first: int  # layer
    inputs: dict[str, Array]  # of a decoder every row several times, one for every label


class _Batch(NamedTuple):
    """A batch on its way through the layers."""

    rows: np.ndarray  # [b] that are examples, not padding
    phases: tuple[_Phase, ...]
    targets: Array | None  # [b * labels, u] tokens whose likelihood is an answer; None: the logits are
    likeliest: Array | None = None  # [b, u, k] of running text


class _Reader:
    """Measures the answers of a model whose layers change, on rows that stay the same."""

    def __init__(self, model: Model, params: Params, encoded: Encoded, head: str, batch_size: int):
        self.model, self.params = model, params
        self.head, self.layers = model.head(head), model_layers(model, params)
        self.whole = [_Step(layer) for layer in self.layers]
        self.output = part(params, model.readout_places(self.head))
        self.in_text = model.answers_in_text and self.head == LANGUAGE
        self.windows = self.in_text and encoded.candidates is not None and encoded.candidates.shape[-2] == 1
        if self.in_text and encoded.candidates is not None:
            labels, length = encoded.candidates.shape[-2:]
            batch_size = max(1, min(batch_size, MOST_LOGITS // (labels * length * model.config.vocab)))
        batches = list(pack(encoded, batch_size=batch_size))
        self.batches = [self._prepared(batch) for batch in batches]
        self.labels = np.concatenate([batch["labels"][batch["index"] >= 0] for batch in batches])
        if self.windows:
            self.batches = [
                batch._replace(likeliest=_likeliest(self._logits(batch, self._through(batch, 0, None, self.whole))))
                for batch in self.batches
            ]

    def _prepared(self, batch: Mapping[str, Any]) -> _Batch:
        model, real = self.model, np.asarray(batch["index"]) >= 0
        if not self.in_text:
            inputs = (
                worded(model, self.params, batch) if model.answers_in_text else model_inputs(model, self.params, batch)
            )
            return _Batch(real, (_Phase(0, inputs),), None)
        candidates = candidates_in(batch)
        rows, labels, length = candidates.shape
        words = candidates.reshape(rows * labels, length)
        targets = asked_for(candidates, batch.get("candidates_read")).reshape(rows * labels, length)
        prompts = prompt_inputs(model, self.params, batch)
        tiled = model_inputs(model, self.params, teacher_forced(model, repeat_rows(prompts, labels), words))
        if model.continues:
            return _Batch(real, (_Phase(0, tiled),), targets)
        last = len(self.layers) - model.stacks[-1].layers
        return _Batch(real, (_Phase(0, prompts), _Phase(last, tiled)), targets)

    def _run(self, batch: _Batch, number: int, state: State | None, way: Sequence[_Step]) -> State:
        """One layer."""
        inputs, entered = self._entered(batch, number, state)
        return run_layer(self.model, way[number].layer, inputs, entered, way[number].intervention)[0]

    def _entered(self, batch: _Batch, number: int, state: State | None) -> tuple[dict[str, Array], State]:
        """The inputs of a layer, and the state that it begins with."""
        layer, phase = self.layers[number], [each for each in batch.phases if each.first <= number][-1]
        return phase.inputs, enter(self.model, layer, phase.inputs, state)

    def _through(self, batch: _Batch, first: int, state: State | None, way: Sequence[_Step]) -> State:
        """All layers from one on."""
        for number in range(first, len(self.layers)):
            state = self._run(batch, number, state, way)
        assert state is not None
        return state

    def _logits(self, batch: _Batch, state: State) -> Array:
        mask = readout_mask(self.head, self.layers[-1], batch.phases[-1].inputs)
        return readout_compiled(self.model, self.head, self.output, state, mask, None)

    def _read(self, batch: _Batch, state: State) -> np.ndarray:
        """The answers of a batch, `[answers, choices]`."""
        logits = self._logits(batch, state)
        if batch.targets is None:
            answers = np.asarray(logits, np.float32)[batch.rows]
            return answers.reshape(-1, answers.shape[-1])  # of spans, starts and ends are answers of their own
        if batch.likeliest is not None:
            asked = np.asarray(batch.targets != IGNORED) & batch.rows[:, None]
            return np.asarray(_among(logits, batch.likeliest), np.float32)[asked]
        found = np.asarray(likelihood_of(logits, batch.targets), np.float32)
        return found.reshape(len(batch.rows), -1)[batch.rows]

    def _joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        widest = max(each.shape[1] for each in parts)  # spans: tokens
        pads = [((0, 0), (0, widest - each.shape[1])) for each in parts]
        answers = np.concatenate([np.pad(a, pad, constant_values=-1e9) for a, pad in zip(parts, pads, strict=True)])
        if self.windows and len(answers) > TOKENS:  # evenly over all windows
            answers = answers[np.linspace(0, len(answers) - 1, TOKENS).astype(int)]
        return answers

    def answers(
        self, way: Sequence[_Step] | None = None, first: int = 0, states: Sequence[Any] | None = None
    ) -> np.ndarray:
        """The answers, `[answers, choices]` logits, in an order that stays the same.

        Args:
            way: All layers; None: those of the dense model.
            first: The layer to begin with.
            states: What the layers before it have returned for every batch.
        """
        pairs = zip(self.batches, states or self.states(), strict=True)
        steps = self.whole if way is None else way
        return self._joined([self._read(batch, self._through(batch, first, state, steps)) for batch, state in pairs])

    def states(self) -> list[Any]:
        """The states of all batches before the first layer."""
        return [None] * len(self.batches)

    def advanced(self, number: int, states: Sequence[Any], way: Sequence[_Step]) -> list[Any]:
        """The states of all batches after one more layer."""
        return [self._run(batch, number, state, way) for batch, state in zip(self.batches, states, strict=True)]

    def add_to(self, modules: DenseModules) -> None:
        """Adds what the modules of the dense model read and give on these rows."""
        for batch in self.batches:
            state = None
            for number, layer in enumerate(self.layers):
                inputs, state = self._entered(batch, number, state)
                tiles = inputs[layer.stack.inputs[1]].shape[0] // len(batch.rows)
                state = modules.add(layer, state, mask_of(layer, inputs), np.repeat(batch.rows, tiles))


@jax.jit
def _likeliest(logits: Float[Array, "b u v"]) -> Array:
    return jax.lax.top_k(logits, min(LIKELIEST, logits.shape[-1] - 1))[1]


@jax.jit
def _among(logits: Float[Array, "b u v"], likeliest: Array) -> Float[Array, "b u k"]:
    """The log-probabilities of some tokens, and of all others together."""
    each = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), likeliest, axis=-1)
    others = jnp.log1p(-jnp.minimum(jnp.exp(each).sum(-1, keepdims=True), 1.0 - 1e-6))
    return jnp.concatenate([each, others], axis=-1)


@dataclass(frozen=True)
class _Loss:
    """The mean loss of answers `[n, k]`, and its derivatives; smaller is better, and 0 is that of the dense model."""

    targets: np.ndarray  # [n, k]: probabilities; in a regression the values that are wanted
    least: float  # the entropy of the targets
    centred: bool  # whether the mean over the rows is taken off every answer, as the prompt's calibration does
    scale: float | None = None  # in a regression: one over the variance

    @classmethod
    def of(cls, model: Model, task: Task, reader: _Reader, dense: np.ndarray, labelled: bool) -> _Loss:
        """The loss of answers that differ from the dense model's, or from the labels."""
        prompt = prompt_of(model, task)
        centred = prompt is not None and prompt.calibration == "batch" and not (reader.windows or task.choices)
        if labelled and (reader.windows or task.spans or (reader.labels < 0).any()):
            raise ValueError(f"not all rows of {task.name!r} have one label among several: leave labelled out.")
        if task.regression:
            wanted = reader.labels[:, None].astype(np.float64) if labelled else dense.astype(np.float64)
            return cls(wanted, 0.0, False, 1.0 / max(float(wanted.var()), 1e-12))
        if labelled:
            return cls(np.eye(dense.shape[1])[reader.labels.astype(int)], 0.0, centred)
        logs = _log_softmax(cls(dense, 0.0, centred).adjusted(dense))
        targets = np.exp(logs)
        return cls(targets, -float((targets * np.where(targets > 0, logs, 0.0)).sum(1).mean()), centred)

    def adjusted(self, answers: np.ndarray) -> np.ndarray:
        """The answers as they count: linear in what they are."""
        answers = answers.astype(np.float64)
        return answers - answers.mean(0, keepdims=True) if self.centred else answers

    def __call__(self, answers: np.ndarray) -> float:
        """The loss."""
        z = self.adjusted(answers)
        if self.scale is not None:
            return float(self.scale * np.square(z - self.targets).mean())
        return -float((self.targets * np.maximum(_log_softmax(z), -1e9)).sum(1).mean()) - self.least

    def quadratic(self, answers: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slope along each of some changes `[m, n, k]`, and the curvature along each two of them."""
        z, d = self.adjusted(answers), changes.astype(np.float64)
        d = d - d.mean(1, keepdims=True) if self.centred else d
        count, n = len(d), z.shape[0]
        if self.scale is not None:
            flat = d.reshape(count, -1)
            weight = 2 * self.scale / z.size
            return weight * flat @ (z - self.targets).reshape(-1), weight * flat @ flat.T
        q = np.exp(_log_softmax(z))
        slopes = np.tensordot(d, (q - self.targets) / n, 2)
        spread = (d * np.sqrt(q / n)).reshape(count, -1)
        mean = (d * q).sum(2) / math.sqrt(n)
        return slopes, spread @ spread.T - mean @ mean.T


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


class _Moves(NamedTuple):
    """Other widths of single modules, and what each changes of the answers."""

    at: np.ndarray  # [sites] the widths that were begun with, as places on the sites' ladders
    whole: np.ndarray  # [n] their answers
    site: np.ndarray  # [moves]
    place: np.ndarray  # [moves] on the site's ladder; that of `at` is among them, and changes nothing
    change: np.ndarray  # [moves, n]

    def of(self, site: int, place: int) -> np.ndarray:
        """The predicted change by another width of a module: between two that were measured, on a straight line."""
        own = np.flatnonzero(self.site == site)
        own = own[np.argsort(self.place[own])]
        shares = [np.interp(place, self.place[own], np.arange(len(own)) == j) for j in range(len(own))]
        return np.tensordot(np.array(shares, np.float32), self.change[own], 1)

    def answers(self, at: np.ndarray) -> np.ndarray:
        """The predicted answers."""
        moved = np.flatnonzero(at != self.at)
        return self.whole.astype(np.float64) + sum(self.of(int(i), int(at[i])) for i in moved)


def _offered(choices: Choices, place: int, steps: int, *, whole: bool) -> list[int]:
    """Places on a ladder, some parts away from one; and its lower end, where the whole module may go."""
    last = len(choices.widths) - 1
    stride = max(1, round(last / steps))
    near = {min(max(place + by * stride, 0), last) for by in REACH}
    return sorted(near.union([0] if whole else []) - {place})


def _exchanged(choices: Ladders, moves: _Moves, model: _Answers) -> list[np.ndarray]:
    """The way to a smaller predicted loss, within the budget: one module gets wider, another narrower, or either."""
    at, answers = moves.at.copy(), moves.whole.astype(np.float64)
    cost = np.array([choices.steps[i].costs[place] for i, place in zip(moves.site, moves.place, strict=True)])
    taken = np.array([np.flatnonzero((moves.site == i) & (moves.place == place))[0] for i, place in enumerate(at)])
    room, lost, path = choices.limit - choices.cost(at), model.loss(answers), [at]
    for _ in range(MOST_EXCHANGES):
        change, more = moves.change - moves.change[taken[moves.site]], cost - cost[taken[moves.site]]
        slope, curve = model.quadratic(answers, change)
        alone = slope + 0.5 * np.diag(curve)
        gain = alone[:, None] + alone[None, :] + curve
        gain[(moves.site[:, None] == moves.site[None, :]) | (more[:, None] + more[None, :] > room)] = np.inf
        gain[np.diag_indices(len(alone))] = np.where(more <= room, alone, np.inf)
        tried = [np.unravel_index(i, gain.shape) for i in np.argsort(gain, axis=None, kind="stable")[:VERIFIED]]
        pairs = [sorted({int(a), int(b)}) for a, b in tried if np.isfinite(gain[a, b])]
        values = [model.loss(answers + change[pair].sum(0)) for pair in pairs]
        if not values or min(values) >= lost - 1e-9:
            break
        pair = pairs[int(np.argmin(values))]
        answers, lost = answers + change[pair].sum(0), min(values)
        room -= float(more[pair].sum())
        taken[moves.site[pair]] = pair
        path.append(moves.place[taken])
    return path


def _filled(choices: Ladders, moves: _Moves, at: np.ndarray, loss: Callable[[np.ndarray], float]) -> np.ndarray:
    """The widths with what is left of the budget: as many blocks as fit go to the module where they lose least."""
    at = at.copy()
    while True:
        room, answers = choices.limit - choices.cost(at), moves.answers(at)
        wider = {}
        for i, (each, place) in enumerate(zip(choices.steps, at, strict=True)):
            most = int(np.searchsorted(each.costs, each.costs[place] + room, side="right")) - 1
            if most > place:
                change = moves.of(i, most) - moves.of(i, int(place))
                wider[loss(answers + change), i] = most
        if not wider:
            return at
        (_, i), most = min(wider.items())
        at[i] = most

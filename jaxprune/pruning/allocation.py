"""Allocation by measured answers: how many units each module keeps, by what closing the others does to the model.

Within a module units are ranked by their scores, as everywhere. How many of them stay is found on calibration rows:
from the best of the other allocations on, every module is made a little wider and a little narrower, one at a time, and
the model's answers are measured. *Losses* of several modules do not add up, but *changes of the answers' logits* nearly
do: their sum predicts the answers of any widths among those measured, and so the loss. Exchanges of width between
modules lessen that prediction at the same cost, as far as they can; what they lead to is measured, and the next round,
with finer steps, begins there if it is better. So the result never loses more than what it began with, on these rows.

A layer's change needs only the layers from it on: those before it have run once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.data.batches import IGNORED, Encoded, pack, usable_rows
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
    model_inputs,
    model_layers,
    part,
    prompt_inputs,
    readout_compiled,
    readout_mask,
    repeat_rows,
    run_layer,
)
from jaxprune.pruning.budgets import Budget, Rules
from jaxprune.pruning.selection import Choices, Ladders, Values, ladders, parts_of, select
from jaxprune.scoring.scores import Scores
from jaxprune.units import Gates, Intervention, Params

EXAMPLES = 64  # rows that answers are measured on, unless asked otherwise
FEWEST = 8  # rows: the answers of fewer say too little
STARTS = ("per_layer", "per_kind", "global")  # the allocations that it begins with the best of
STEPS = 10  # parts of a module that are moved in the first round; twice as many in each round after it
REACH = (-3, -1, 1, 3)  # parts by which a module is made narrower and wider
LIKELIEST, TOKENS = 16, 4096  # of running text: next tokens that are told apart, and places where they are
MOST_LOGITS = 2**27
MOST_EXCHANGES = 1000
BACK = 3  # times that a way is shortened to its first half, while what it leads to is no better
VERIFIED = 16  # exchanges, the best by a quadratic estimate, whose prediction is computed


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """The settings of an allocation by measured answers."""

    rows: Rows = Rows(examples=EXAMPLES)
    rounds: int = 2  # in each, all modules are measured at some four other widths
    labelled: bool = False  # lose the labels' log-probability, not the agreement with the dense model's answers

    def __post_init__(self):
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int):
            raise TypeError(f"rounds of an allocation must be a whole number, got {self.rounds!r}.")
        if self.rounds < 1:
            raise ValueError(
                f"rounds of an allocation must be at least 1, got {self.rounds}: give per_layer or global."
            )
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
    loss: float  # nats per answer, measured
    starts: Mapping[str, float]  # the same of the other allocations at this budget
    rounds: tuple[AllocationRound, ...]
    rows: tuple[str, ...]  # keys of the rows that were measured
    cut_off: int = 0  # rows of span tasks that were not drawn from, because their answers are cut off
    truncated: int = 0  # rows whose texts are cut

    def to_json(self) -> dict[str, Any]:
        """All but gates and rows as plain values."""
        rounds = [each._asdict() for each in self.rounds]
        found = {"loss": self.loss, "starts": dict(self.starts), "rounds": rounds, "examples": len(self.rows)}
        return found | {"cut_off": self.cut_off, "truncated": self.truncated}


def allocate(
    model: Model,
    params: Params,
    task: Task,
    scores: Scores | Values,
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
    `measuring.labelled`.

    What stays costs at most the budget, and is short of it by less than the largest next block of a module. The same
    arguments give the same result. The loss is never larger than that of any other allocation, on these rows.

    Args:
        model: The architecture.
        params: The dense parameters.
        task: The task; its calibration rows are drawn from.
        scores: Higher means more needed, within a module. Their means replace closed units, if they have any.
        budget: How much may stay; not of latency.
        measuring: The rows, and how long to look.
        rules: As for `select`; the allocation is ignored.
        progress: Called with the number of passes that are finished, and the most there can be.

    Raises:
        ValueError: As `select`; also if there are fewer than 8 rows, or labels are wanted of rows without.
    """
    head = fitting_head(model, task, parts_of(scores)[1].get("head"))
    settings = measuring.rows
    usable = usable_rows(model, task, settings)
    rows = settings.examples
    if not isinstance(rows, tuple):
        split = settings.split or "calibration"
        there = len(usable.task.rows(split))
        if there < FEWEST:
            raise ValueError(f"answers are measured on at least {FEWEST} rows; {task.name!r} has {there} {split} rows.")
        rows = draw(usable.task, min(rows or EXAMPLES, there), settings.random, split=split)
    encoded = usable.encode(rows)
    left_out = usable.cut_off, encoded.truncated
    means = scores.means if isinstance(scores, Scores) else None
    reader = _Reader(model, params, encoded, head, settings.batch_size, means)
    loss = _Loss.of(model, task, reader, measuring.labelled)
    choices = ladders(model, params, scores, budget, rules)
    starts = {
        name: choices.places(select(model, params, scores, budget, rules=replace(rules, allocation=name)))
        for name in STARTS
    }
    bar = _Counter(
        progress, len(starts) + measuring.rounds * (1 + BACK + len(REACH) * len(choices.sites)) + len(choices.sites)
    )
    measured = {name: loss(reader.answers(choices.gates(at), bar)) for name, at in starts.items()}
    best = min(measured, key=lambda name: measured[name])
    at, lost, rounds = starts[best], measured[best], []
    for number in range(measuring.rounds):
        before = bar.done
        offered = [
            _offered(each, int(place), STEPS * 2**number, whole=number == 0)
            for each, place in zip(choices.steps, at, strict=True)
        ]
        moves = _Moves.measured(reader, choices, at, offered, bar)
        path = _exchanged(choices, moves, loss)
        for tries in range(BACK):  # the further the widths are away, the less the predictions are worth
            found = _filled(choices, moves, path[len(path) // 2**tries - 1], loss)
            predicted, true = loss(moves.answers(found)), loss(reader.answers(choices.gates(found), bar))
            if true < lost or len(path) <= 2**tries:
                break
        rounds.append(AllocationRound(bar.done - before, predicted, true))
        if true < lost:
            at, lost = found, true
    bar.end()
    return Allocation(choices.gates(at), lost, measured, tuple(rounds), tuple(sorted(map(row_key, rows))), *left_out)


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


class _Phase(NamedTuple):
    """Layers that read the same inputs."""

    first: int  # layer
    inputs: dict[str, Array]
    tiles: int  # how often every row stands in it


class _Batch(NamedTuple):
    """A batch on its way through the layers."""

    rows: np.ndarray  # [b] that are examples, not padding
    phases: tuple[_Phase, ...]
    targets: Array | None  # [b * labels, u] tokens whose likelihood is an answer; None: the logits are
    likeliest: Array | None = None  # [b, u, k] of running text


class _Reader:
    """Measures the answers of a model under gates, on rows that stay the same."""

    def __init__(self, model: Model, params: Params, encoded: Encoded, head: str, batch_size: int, means: Gates | None):
        self.model, self.params, self.means = model, params, means
        self.head, self.layers = model.head(head), model_layers(model, params)
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
                batch._replace(likeliest=_likeliest(self._logits(batch, self._through(batch, 0, None, {}))))
                for batch in self.batches
            ]

    def _prepared(self, batch: Mapping[str, Any]) -> _Batch:
        model, real = self.model, np.asarray(batch["index"]) >= 0
        if not self.in_text:
            inputs = (
                worded(model, self.params, batch) if model.answers_in_text else model_inputs(model, self.params, batch)
            )
            return _Batch(real, (_Phase(0, inputs, 1),), None)
        candidates = candidates_in(batch)
        rows, labels, length = candidates.shape
        words = candidates.reshape(rows * labels, length)
        targets = asked_for(candidates, batch.get("candidates_read")).reshape(rows * labels, length)
        prompts = prompt_inputs(model, self.params, batch)
        tiled = model_inputs(model, self.params, teacher_forced(model, repeat_rows(prompts, labels), words))
        if model.continues:
            return _Batch(real, (_Phase(0, tiled, labels),), targets)
        last = len(self.layers) - model.stacks[-1].layers
        return _Batch(real, (_Phase(0, prompts, 1), _Phase(last, tiled, labels)), targets)

    def _run(self, batch: _Batch, number: int, state: State | None, gates: Mapping[str, Any]) -> State:
        """One layer."""
        layer, phase = self.layers[number], [each for each in batch.phases if each.first <= number][-1]
        if phase.first == number and number:
            state = repeat_rows(state, phase.tiles)
        state = enter(self.model, layer, phase.inputs, state)
        return run_layer(self.model, layer, phase.inputs, state, Intervention(dict(gates), self.means))[0]

    def _through(self, batch: _Batch, first: int, state: State | None, gates: Mapping[str, Any]) -> State:
        """All layers from one on."""
        for number in range(first, len(self.layers)):
            state = self._run(batch, number, state, gates)
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

    def answers(self, gates: Gates, count: Callable[[], None] | None = None) -> np.ndarray:
        """The answers of a model under gates, `[answers, choices]` logits, in an order that stays the same."""
        parts = [self._read(batch, self._through(batch, 0, None, gates)) for batch in self.batches]
        if count is not None:
            count()
        return self._joined(parts)

    def changed(
        self, gates: Gates, others: Callable[[Layer], Sequence[Mapping[str, Any]]], count: Callable[[], None]
    ) -> Iterator[tuple[Layer, list[np.ndarray]]]:
        """The answers with other gates in one layer at a time: what comes before that layer has run once.

        Args:
            gates: Those of all layers.
            others: The other gates of a layer to try.
            count: Called after each of them.
        """
        states: list[Any] = [None] * len(self.batches)
        for number, layer in enumerate(self.layers):
            found = []
            for other in others(layer):
                pairs = zip(self.batches, states, strict=True)
                found.append(
                    self._joined([self._read(b, self._through(b, number, s, {**gates, **other})) for b, s in pairs])
                )
                count()
            states = [self._run(batch, number, state, gates) for batch, state in zip(self.batches, states, strict=True)]
            yield layer, found


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
    def of(cls, model: Model, task: Task, reader: _Reader, labelled: bool) -> _Loss:
        """The loss of answers that differ from the dense model's, or from the labels."""
        dense = reader.answers({})
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
    whole: np.ndarray  # [n, k] their answers
    site: np.ndarray  # [moves]
    place: np.ndarray  # [moves] on the site's ladder; that of `at` is among them, and changes nothing
    change: np.ndarray  # [moves, n, k]

    @classmethod
    def measured(
        cls,
        reader: _Reader,
        choices: Ladders,
        at: np.ndarray,
        offered: Sequence[Sequence[int]],
        count: Callable[[], None],
    ) -> _Moves:
        """Measures the model with one module at a time at the widths that are offered for it."""
        gates = choices.gates(at)
        tried: list[tuple[int, int]] = []

        def others(layer: Layer) -> list[Mapping[str, Any]]:
            own = [i for i, site in enumerate(choices.sites) if layer_entries({site.name: 0}, layer.name)]
            new = [(i, place) for i in own for place in offered[i]]
            tried.extend(new)
            return [choices.gates_of(i, place) for i, place in new]

        whole = reader.answers(gates, count)
        found = [answers for _, own in reader.changed(gates, others, count) for answers in own]
        still = [(i, int(place)) for i, place in enumerate(at)]
        change = np.stack([*(answers - whole for answers in found), *(np.zeros_like(whole) for _ in still)])
        site, place = (np.array(column, int) for column in zip(*tried, *still, strict=True))
        return cls(at, whole, site, place, change)

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


def _exchanged(choices: Ladders, moves: _Moves, loss: _Loss) -> list[np.ndarray]:
    """The way to a smaller predicted loss, within the budget: one module gets wider, another narrower, or either."""
    at, answers = moves.at.copy(), moves.whole.astype(np.float64)
    cost = np.array([choices.steps[i].costs[place] for i, place in zip(moves.site, moves.place, strict=True)])
    taken = np.array([np.flatnonzero((moves.site == i) & (moves.place == place))[0] for i, place in enumerate(at)])
    room, lost, path = choices.limit - choices.cost(at), loss(answers), [at]
    for _ in range(MOST_EXCHANGES):
        change, more = moves.change - moves.change[taken[moves.site]], cost - cost[taken[moves.site]]
        slope, curve = loss.quadratic(answers, change)
        alone = slope + 0.5 * np.diag(curve)
        gain = alone[:, None] + alone[None, :] + curve
        gain[(moves.site[:, None] == moves.site[None, :]) | (more[:, None] + more[None, :] > room)] = np.inf
        gain[np.diag_indices(len(alone))] = np.where(more <= room, alone, np.inf)
        tried = [np.unravel_index(i, gain.shape) for i in np.argsort(gain, axis=None, kind="stable")[:VERIFIED]]
        pairs = [sorted({int(a), int(b)}) for a, b in tried if np.isfinite(gain[a, b])]
        values = [loss(answers + change[pair].sum(0)) for pair in pairs]
        if not values or min(values) >= lost - 1e-9:
            break
        pair = pairs[int(np.argmin(values))]
        answers, lost = answers + change[pair].sum(0), min(values)
        room -= float(more[pair].sum())
        taken[moves.site[pair]] = pair
        path.append(moves.place[taken])
    return path


def _filled(choices: Ladders, moves: _Moves, at: np.ndarray, loss: _Loss) -> np.ndarray:
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

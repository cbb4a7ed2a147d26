"""The scoring run, resumable: draws examples, batches them, calls a criterion on every batch and adds up the results.

The totals are added up on the device, and every batch is spread over all devices. They have six numbers per unit,
however many examples there are: the variance over the examples and the scores of their two halves come from the same
pass. With `resume` the running totals are kept in a file, and an interrupted run resumes to the same bits. With
`until_stable` more and more examples are scored, none twice, until another run would rank the units nearly the same.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxprune.checkpoints.files import COUNT, DIGEST, check_file, differences, parse_header, write_atomic
from jaxprune.checkpoints.tensors import TensorFile, is_sealed, model_digest, sealed, versions, write_tensors
from jaxprune.data.batches import SHAPE_COST, Encoded, default_length, digest_encoded, pack, usable_rows
from jaxprune.data.prompts import prompt_of
from jaxprune.data.splits import Example, digest, half_of, row_key
from jaxprune.data.tasks import Rows, Task, draw, seed_words
from jaxprune.evaluation.evaluate import calibrate, fitting_head
from jaxprune.models import Model, model_inputs, prompt_inputs
from jaxprune.scoring.attribution import Context, Criterion, IntegratedGradients, Measured
from jaxprune.scoring.objectives import gold, name_of, zero
from jaxprune.scoring.scores import (
    FORMAT,
    Scores,
    describe,
    in_order,
    load_scores,
    properties_of,
    with_relative,
    with_stability,
)
from jaxprune.scoring.stability import TARGET, check_target, least_reliability
from jaxprune.units import Gates, Params

PARTIAL = "jaxprune_partial_scores"
_PARTIAL = {"settings": {...: object}, "done": COUNT, "checksum": DIGEST}


class Totals(NamedTuple):
    """The sums over the batches so far; for largest scores there are neither deviations nor halves."""

    scores: Gates  # [units]: sums, or the largest
    completeness: dict[str, Float[Array, ""]]
    weight: Float[Array, ""]  # examples
    deviations: Gates  # [units]: sums of squared deviations from the mean
    halves: Gates  # [2, units]: the sums of each half
    counts: Float[Array, " halves"]  # examples in each half
    signed: Mapping[str, Array] = {}  # [units]: sums of attributions with their signs


def nothing(largest: bool, measured: Measured) -> Totals:
    """The totals of no batch, for the sites and units in the result of one."""
    start = -jnp.inf if largest else 0.0
    units = {name: value.shape[1] for name, value in measured.scores.items()}
    spread = {} if largest else units
    return Totals(
        {name: jnp.full(count, start, jnp.float32) for name, count in units.items()},
        {name: jnp.zeros(()) for name in measured.completeness},
        jnp.zeros(()),
        {name: jnp.zeros(count) for name, count in spread.items()},
        {name: jnp.zeros((2, count)) for name, count in spread.items()},
        jnp.zeros(2),
        {name: jnp.zeros(value.shape[1]) for name, value in measured.signed.items()},
    )


@partial(jax.jit, static_argnums=0)
def add(
    largest: bool, totals: Totals, measured: Measured, weight: Float[Array, " b"], second: Float[Array, " b"]
) -> Totals:
    """Adds a batch.

    Deviations of the batch are from its own mean, and combine with those before by the distance of the two means, so
    that nothing large is subtracted from anything large.

    Args:
        largest: Whether scores are the largest over the examples.
        totals: Of the batches before.
        measured: The result of the criterion.
        weight: 1 for an example, 0 for padding.
        second: 1 where the example is of the second half, 0 where it is of the first.

    References:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    real = weight[:, None] > 0
    shares = jnp.stack([1.0 - second, second]) * weight
    count, before = weight.sum(), totals.weight

    def sum_up(total: Array, rows: Array) -> Array:
        return total + jnp.where(real, weight[:, None] * rows, 0.0).sum(0)

    def combine(total: Array, rows: Array) -> Array:
        return jnp.maximum(total, jnp.where(real, rows, -jnp.inf).max(0)) if largest else sum_up(total, rows)

    def deviate(deviations: Array, total: Array, rows: Array) -> Array:
        mean = jnp.where(real, weight[:, None] * rows, 0.0).sum(0) / jnp.maximum(count, 1.0)
        within = jnp.where(real, weight[:, None] * jnp.square(rows - mean), 0.0).sum(0)
        apart = mean - total / jnp.maximum(before, 1.0)
        return deviations + within + jnp.square(apart) * (before * count / jnp.maximum(before + count, 1.0))

    def part(sums: Array, rows: Array) -> Array:
        return sums + jnp.stack([jnp.where(real, share[:, None] * rows, 0.0).sum(0) for share in shares])

    return Totals(
        {name: combine(total, measured.scores[name]) for name, total in totals.scores.items()},
        {name: total + (weight * measured.completeness[name]).sum() for name, total in totals.completeness.items()},
        before + count,
        {name: deviate(value, totals.scores[name], measured.scores[name]) for name, value in totals.deviations.items()},
        {name: part(sums, measured.scores[name]) for name, sums in totals.halves.items()},
        totals.counts + shares.sum(1),
        {name: sum_up(total, measured.signed[name]) for name, total in totals.signed.items()},
    )


def finish(largest: bool, totals: Totals) -> Gates:
    """The scores, `[units]`: means over the examples, or the largest.

    Raises:
        ValueError: If a score is not finite.
    """
    count = jnp.ones(()) if largest else totals.weight
    values = {name: total / count for name, total in totals.scores.items()}
    broken = [name for name, value in values.items() if not np.isfinite(np.asarray(value)).all()]
    if broken:
        raise ValueError(f"scores of {', '.join(broken)} are not finite: does the model give finite logits?")
    return values


def variance_of(totals: Totals) -> Gates | None:
    """The variance of a unit's score over the examples, `[units]`, of all of which these are a sample.

    None of fewer than two examples, of largest scores, and where a square is too large for float32.
    """
    count = float(totals.weight)
    if not totals.deviations or count < 2:
        return None
    variance = {name: value / (count - 1) for name, value in totals.deviations.items()}
    return variance if all(np.isfinite(np.asarray(value)).all() for value in variance.values()) else None


def halves_of(totals: Totals) -> Gates | None:
    """The scores of each half of the examples, `[2, units]`; 0 of a half without examples. None of largest scores."""
    counts = jnp.maximum(totals.counts, 1.0)[:, None]
    return {name: sums / counts for name, sums in totals.halves.items()} or None


def signed_of(totals: Totals) -> Gates | None:
    """The mean attribution of every unit with its sign, `[units]`; None where scores are it, or are none."""
    return {name: total / totals.weight for name, total in totals.signed.items()} or None


def completeness_of(totals: Totals) -> dict[str, float | None] | None:
    """The mean over the examples, see `with_relative`; None of a criterion that has none."""
    if not totals.completeness:
        return None
    return with_relative({name: float(total / totals.weight) for name, total in totals.completeness.items()})


class TotalsFile:
    """The file that keeps the running totals of one run."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        check_file(self.path, True)

    def save(self, totals: Totals, done: int) -> None:
        """Writes the totals after `done` batches, atomically."""
        arrays = {}
        for field, value in totals._asdict().items():
            if isinstance(value, dict):
                arrays |= {f"{field}:{site}": np.asarray(array) for site, array in value.items()}
            else:
                arrays[field] = np.asarray(value)
        metadata = {PARTIAL: json.dumps(sealed({"settings": self.settings, "done": done}, arrays))}
        write_atomic(self.path, partial(write_tensors, tensors=arrays, metadata=metadata))

    def load(self) -> tuple[Totals | None, int]:
        """The totals and the number of batches in them; none if there is no file.

        Raises:
            ValueError: If the file is damaged, something else, or belongs to a run with other settings.
        """
        if not self.path.exists():
            return None, 0
        with TensorFile(self.path) as file:
            if PARTIAL not in file.metadata:
                raise ValueError(f"{self.path} does not hold an interrupted scoring run: name another file.")
            problems, header = parse_header(file.metadata[PARTIAL], _PARTIAL)
            if header and (other := differences(header["settings"], self.settings)):
                raise ValueError(
                    f"{self.path} was begun with other settings ({other}): remove it, or name another file."
                )
            strange = [name for name in file.entries if name.partition(":")[0] not in Totals._fields]
            problems += [f"it holds {name!r}" for name in strange]
            problems += [f"no {name}" for name in ("weight", "counts") if name not in file.entries]
            problems += [f"{name} is {entry.dtype}" for name, entry in file.entries.items() if entry.dtype != "F32"]
            arrays = {} if problems else {name: file.read(name) for name in file.entries}
        if not problems and not is_sealed(header, arrays):
            problems.append("its checksum is another than that of what it holds")
        if problems:
            raise ValueError(f"{self.path} is damaged ({'; '.join(problems)}): remove it to start again.")
        parts: dict[str, Any] = {name: {} for name in Totals._fields}
        for name, array in arrays.items():
            field, _, site = name.partition(":")
            parts[field] = {**parts[field], site: jnp.asarray(array)} if site else jnp.asarray(array)
        return Totals(**parts), header["done"]


Devices: TypeAlias = Sequence[Any]  # such as jax.devices()

EXAMPLES = 128  # what is scored unless asked otherwise
FIRST = 32  # examples before the stability is looked at first; then after twice as many, and so on
SAVE_EVERY = 4  # batches between two saves of the running totals


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The settings of a scoring run; see `score`."""

    criterion: Criterion = IntegratedGradients()
    rows: Rows = Rows()  # examples=None: 128, with `until_stable` all of the split; the key also is the criterion's
    until_stable: float | None = None  # the stability at which to stop, in (0, 1)
    head: str | None = None  # the task head; None: the one of the task's name, else the only one

    def __post_init__(self):
        if self.until_stable is not None:
            _check_stable(self.criterion, self.until_stable)


def score(
    model: Model,
    params: Params,
    task: Task,
    scoring: Scoring = Scoring(),
    *,
    means: Gates | None = None,
    devices: Devices | None = None,
    progress: Callable[[int, int], None] | None = None,
    resume: str | Path | None = None,
) -> Scores:
    """Scores every unit of a model by how much a task needs it.

    Examples are drawn from the split stratified by label. For span tasks, rows whose answer is cut off are left out;
    the header counts them (`cut_off`).

    With `until_stable`, 32 of the examples are scored, then 64, 128 and so on, none twice, until the estimated rank
    correlation with another run (see `jaxprune.scoring.stability`) reaches it. The estimate is looked at several times,
    so a first one above the target is a little too high on average.

    Args:
        scoring: The criterion, and the rows to score with.
        means: What closed units are replaced by, if `criterion.closed` is not `zero`; by default `criterion.closed`
            computes it from all of the examples, in a separate forward pass.
        devices: Devices over which the rows of every batch are spread; the batch size is rounded up to a multiple of
            their number. By default all of this process.
        resume: File that keeps the running totals; an existing one is continued, and it is removed at the end.

    Returns:
        The scores, with all that is needed to make them again.

    Raises:
        ValueError: If the head does not fit the task, there are too few examples or labels, a score is not finite, or
            the file to resume from is damaged or belongs to a run with other settings.
    """
    criterion, chosen, until_stable = scoring.criterion, scoring.rows, scoring.until_stable
    key = chosen.random
    head = fitting_head(model, task, scoring.head)
    reads = criterion.examples is not None
    usable = usable_rows(model, task, chosen)
    task = usable.task
    rows, steps = _choose(task, replace(chosen, key=key), reads, until_stable is not None)
    _check_labels(criterion, model, head, len(task.labels), rows)
    encoded = usable.encode(rows)
    if task.spans and criterion.labels is gold and (lost := int((encoded.labels < 0).any(1).sum())):
        raise ValueError(
            f"{lost} of {len(rows)} examples have no answer within {encoded.max_length} tokens: leave them out, raise "
            "max_length, or use labels=predicted."
        )
    settings = _settings(model, params, task, scoring, key) | {
        "format": FORMAT,
        "largest": criterion.examples is not None and criterion.examples.largest,
        "versions": versions(),
        **({"cut_off": usable.cut_off} if task.spans else {}),
    }
    devices = jax.local_devices() if devices is None else devices
    most = chosen.batch_size if encoded.most_rows is None else min(chosen.batch_size, encoded.most_rows)
    batch_size, encoded = -(-most // len(devices)) * len(devices), replace(encoded, most_rows=None)
    run = settings | _facts(rows, encoded, reads)
    run |= {"batch_size": batch_size, "devices": len(devices), "until": until_stable}
    file = None if resume is None else TotalsFile(resume, run)
    # to compile a gradient takes about three times as long as to compile a forward pass
    shape_cost = 3 * SHAPE_COST // criterion.passes
    ready = calibrate(model, params, task, encoded, head=head) if reads and criterion.labels is not None else encoded
    batches = pack(ready, batch_size=batch_size, shape_cost=shape_cost, steps=steps) if reads else ()
    values, totals, means = _accumulate(
        model,
        params,
        batches,
        criterion,
        Context(head, key, means),
        _Run(
            devices=devices,
            progress=progress,
            file=file,
            second=np.array([half_of(row) for row in rows], np.float32),
            # batches that a step ends with
            looks=np.cumsum([-(-size // batch_size) for size in np.diff([0, *steps])]).tolist(),
            target=1.0 if until_stable is None else until_stable,
        ),
    )
    if file is not None:
        file.path.unlink(missing_ok=True)
    used = rows if totals is None else rows[: round(float(totals.weight))]
    header = settings | _facts(used, encoded, reads) | {"mean_length": encoded.mean_length_of(len(used))}
    if truncated := int(encoded.cut[: len(used)].sum()) if reads else 0:
        header["truncated"] = truncated
    header |= {"objective": name_of(criterion.objective_of(model.head(head))), "properties": properties_of(criterion)}
    if totals is None:
        return in_order(
            Scores(values, header | {"completeness": None, "halves": None, "stability": None}, means or None)
        )
    if until_stable is not None:
        reached = (_reliability(totals) or 0.0) >= until_stable
        header["until_stable"] = {"target": until_stable, "reached": reached, "most": len(rows)}
    header |= {"completeness": completeness_of(totals), "halves": None}
    if halves := halves_of(totals):
        header["halves"] = np.asarray(totals.counts).round().astype(int).tolist()
    keys = tuple(sorted(map(row_key, used)))
    scores = Scores(values, header, means or None, variance_of(totals), halves, signed_of(totals), keys)
    return in_order(with_stability(scores, TARGET if until_stable is None else until_stable))


def _settings(model: Model, params: Params, task: Task, scoring: Scoring, key: Array) -> dict[str, Any]:
    """The part of a header that the settings determine, apart from the rows."""
    rows, prompt = scoring.rows, prompt_of(model, task)
    return {
        "criterion": describe(scoring.criterion),
        "task": task.name,
        "split": "given" if isinstance(rows.examples, tuple) else rows.split or "calibration",
        "head": fitting_head(model, task, scoring.head),
        "keys": [list(seed_words(key))],
        "model": model_digest(model, params),
        "max_length": rows.max_length or (task.windows.tokens if task.windows else default_length(model, task.spans)),
        "prompt": None if prompt is None else prompt.to_json(),
    }


def kept_scores(
    file: Path, model: Model, params: Params, task: Task, scoring: Scoring = Scoring(), *, replace_others: bool = True
) -> Scores | None:
    """The scores in a file, if they are what `score` would return with these settings.

    Raises:
        FileExistsError: If they are not, and may not be replaced; with what differs.
    """
    if not file.is_file():
        return None
    scores, chosen, criterion = load_scores(file), scoring.rows, scoring.criterion
    key = chosen.random
    reads, growing = criterion.examples is not None, scoring.until_stable is not None
    usable = usable_rows(model, task, chosen)
    rows, _ = _choose(usable.task, replace(chosen, key=key), reads, growing)
    wanted = _settings(model, params, task, scoring, key) | _facts(rows, usable.encode(rows), reads)
    wanted["versions"] = versions()
    other = differences({name: scores.header.get(name) for name in wanted}, wanted)
    if other and not replace_others:
        raise FileExistsError(
            f"{file} holds scores that were made with other settings ({other}): give those, or another output, or "
            "replace it with --overwrite."
        )
    return None if other else scores


def score_batches(
    model: Model,
    params: Params,
    batches: Sequence[Mapping[str, Any]],
    criterion: Criterion,
    context: Context = Context(),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Gates, dict[str, float | None] | None, Gates]:
    """Calls a criterion on every batch and combines the examples.

    Args:
        batches: Batches as from `make_batches`; rows of `weight` 0 count for nothing.
        criterion: How scores are made.
        context: The task head, the randomness of the criterion, and what closed units are replaced by (see `score`).

    Returns:
        The scores by site; of integrated gradients the completeness (see `with_relative`); the means.

    Raises:
        ValueError: If there is no example, or a score is not finite.
    """
    run = _Run(progress=progress)
    values, totals, closed = _accumulate(model, params, batches, criterion, context, run)
    return values, None if totals is None else completeness_of(totals), closed


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The devices of a run over batches, its progress, its file, and when it stops."""

    devices: Devices | None = None  # over which the rows of every batch are spread; None: the default device
    progress: Callable[[int, int], None] | None = None
    file: TotalsFile | None = None  # keeps the running totals
    second: np.ndarray | None = None  # by index, 1 for examples of the second half, else 0; None: odd indices
    looks: Collection[int] = ()  # numbers of batches after which the stability is estimated
    target: float = 1.0  # the stability at which the other batches are left out


def _accumulate(
    model: Model,
    params: Params,
    batches: Sequence[Mapping[str, Any]],
    criterion: Criterion,
    context: Context,
    run: _Run,
) -> tuple[Gates, Totals | None, Gates]:
    """The scores, the totals they come from (None if no example is read), and the means."""
    if criterion.examples is None:
        measured = criterion(model, params, {}, context._replace(means={}))
        return {name: value[0] for name, value in measured.scores.items()}, None, {}
    largest, progress = criterion.examples.largest, run.progress
    params, place = _placement(model, params, run.devices or jax.local_devices()[:1])
    closed = place.everywhere(_means(model, params, batches, criterion, context.means, place))
    context = context._replace(means=closed)
    totals, done = (None, 0) if run.file is None else run.file.load()
    begun = done
    if totals is not None and float(totals.weight) != sum(float(batch["weight"].sum()) for batch in batches[:done]):
        raise ValueError("the file to resume from counts other examples than this run: remove it to start again.")
    while done < len(batches):
        if totals is not None and done in run.looks and (_reliability(totals) or 0.0) >= run.target:
            break
        batch = place.batch(batches[done], run.second)
        measured = criterion(model, params, batch, context)
        if totals is not None:
            jax.block_until_ready(totals)  # the batch before: one is being computed, one is waiting
            if progress is not None:
                progress(done, len(batches))
        start = nothing(largest, measured)
        if done == begun and totals is not None and _shapes(totals) != _shapes(start):
            raise ValueError("the file to resume from holds totals of other sites or units: remove it to start again.")
        totals = add(largest, totals or start, measured, batch["weight"], batch["second"])
        done += 1
        if run.file is not None and done % SAVE_EVERY == 0:
            run.file.save(totals, done)
    if totals is None or not float(totals.weight):
        raise ValueError("there are no examples to score.")
    if progress is not None:
        progress(done, done)
    return finish(largest, totals), totals, closed


def _shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


class _Placement(NamedTuple):
    """The placement of arrays: the rows of a batch over all devices, everything else on each of them."""

    model: Model
    params: Params
    rows: NamedSharding | None  # None: one device, the default one
    whole: NamedSharding | None

    def batch(self, batch: Mapping[str, Any], seconds: np.ndarray | None = None) -> dict[str, Array]:
        """The arrays of a batch where they belong; `seconds` says by index which examples are of the second half."""
        count = batch["input_ids"].shape[0]
        given = {"weight": np.ones(count, np.float32), "index": np.arange(count, dtype=np.int32)}
        kept = ("labels", "weight", "index", "candidates", "candidates_read", "label_bias")
        given |= {name: batch[name] for name in kept if name in batch}
        index = np.asarray(given["index"])
        given["second"] = (index % 2).astype(np.float32) if seconds is None else seconds[index]  # any half for padding
        read = prompt_inputs if self.model.answers_in_text else model_inputs
        arrays: dict[str, Any] = read(self.model, self.params, batch) | given
        return jax.device_put(arrays, self.rows) if self.rows is not None else jax.tree.map(jnp.asarray, arrays)

    def everywhere(self, tree: Any) -> Any:
        return tree if self.whole is None else jax.device_put(tree, self.whole)


def _placement(model: Model, params: Params, devices: Devices) -> tuple[Params, _Placement]:
    if len(devices) == 1 and devices[0] == jax.local_devices()[0]:
        return params, _Placement(model, params, None, None)
    mesh = Mesh(np.asarray(devices), ("rows",))
    place = _Placement(model, params, NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec()))
    return place.everywhere(params), place


def _means(
    model: Model,
    params: Params,
    batches: Sequence[Mapping[str, Any]],
    criterion: Criterion,
    means: Gates | None,
    place: _Placement,
) -> Gates:
    if means is None:
        return criterion.closed(model, params, map(place.batch, batches), criterion.kinds)
    if criterion.closed is zero:
        raise ValueError("means were given, but this criterion closes units to zero: set closed=calibration_means.")
    return means


def _choose(task: Task, chosen: Rows, reads: bool, growing: bool) -> tuple[tuple[Example, ...], list[int]]:
    """The examples, and if their number grows how many the steps end with, all of them last.

    Every step is what `draw` would draw by itself, as far as draws of one key contain each other. They do, but for
    single examples when the labels' shares are rounded.
    """
    if isinstance(chosen.examples, Sequence):
        return chosen.examples, _steps(len(chosen.examples)) if growing else []
    split = chosen.split or "calibration"
    most = len(task.rows(split))
    if not growing:
        wanted = EXAMPLES if chosen.examples is None else chosen.examples
        # if none is read, they only say how long the texts are
        return draw(task, wanted if reads else min(wanted, most), chosen.key, split=split), []
    steps = _steps(most if chosen.examples is None else chosen.examples)
    taken: list[Example] = []
    for size in steps:
        known, new = Counter(taken), []
        for row in draw(task, size, chosen.key, split=split):
            known[row] -= 1
            if known[row] < 0:
                new.append(row)
        taken += new[: size - len(taken)]
    return tuple(taken), steps


def _steps(most: int) -> list[int]:
    """32, 64, 128 and so on, and the most."""
    doublings = max(0, math.ceil(math.log2(max(most, 1) / FIRST)))
    return [*(FIRST * 2**i for i in range(doublings)), most]


def _facts(rows: Sequence[Example], encoded: Encoded, reads: bool) -> dict[str, Any]:
    """The entries of a header about the examples that were read, the first of those that are `encoded`."""
    first = encoded if len(rows) == len(encoded) else encoded.take(range(len(rows)))
    facts = {"examples": len(rows) if reads else 0, "data": [digest(rows)] if reads else []}
    return facts | {"encoded": digest_encoded(first, rows)}


def _reliability(totals: Totals) -> float | None:
    """The estimated rank correlation with another run, of the kind of units that has the least; None: it has none."""
    return least_reliability(halves_of(totals) or {}, np.asarray(totals.counts).tolist())


def _check_stable(criterion: Criterion, target: float) -> None:
    check_target(target)
    if criterion.examples is None or criterion.examples.largest:
        reason = "reads no example" if criterion.examples is None else "takes the largest of the examples"
        raise ValueError(
            f"criterion {type(criterion).__name__} {reason}: more examples do not make its scores stable, so leave "
            "until_stable out."
        )


def _check_labels(criterion: Criterion, model: Model, head: str, labels: int, rows: Sequence[Example]) -> None:
    if criterion.labels is not gold:
        return
    chosen = model.head(head)
    missing = sum(row.label is None and not row.answers for row in rows)
    if missing:
        raise ValueError(f"{missing} of {len(rows)} examples have no label: use labels=predicted, sampled or every.")
    count = labels if model.answers_in_text else len(chosen.labels)
    if chosen.spans or chosen.regression:
        return
    outside = [row.label for row in rows if row.label not in range(count)]
    if outside:
        raise ValueError(f"label {outside[0]!r} is outside 0 to {count - 1}, the labels of head {head!r}.")

"""Scores a model for a task: draws examples, batches them, calls a criterion on every batch and adds up the results.

Results are added up on the device, and the batch is shared out over all devices. With `resume` the running totals are
kept in a file, and an interrupted run goes on to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxprune import __version__
from jaxprune.activations import zero
from jaxprune.attribution import Criterion, IntegratedGradients, Measured, key_or_default
from jaxprune.batches import SHAPE_COST, encode, pack
from jaxprune.checkpoint import model_digest
from jaxprune.evaluation import fitting_head
from jaxprune.files import write_atomic
from jaxprune.gates import UNITS, Gates, Params
from jaxprune.models import Model, encoder_inputs, model_inputs
from jaxprune.objectives import gold
from jaxprune.prompts import prompt_of
from jaxprune.scores import Scores, describe, with_relative
from jaxprune.splits import Example, digest, row_key
from jaxprune.tasks import Task, draw, seed_words
from jaxprune.tensors import TensorFile, write_tensors

Devices: TypeAlias = Sequence[Any]  # such as jax.devices()

PARTIAL = "jaxprune_partial_scores"
SAVE_EVERY = 4  # batches between two saves of the running totals


class Totals(NamedTuple):
    """What the batches so far add up to."""

    scores: Gates  # [units]: sums, or the largest
    completeness: dict[str, Float[Array, ""]]
    weight: Float[Array, ""]  # examples


def score(
    model: Model,
    params: Params,
    task: Task,
    *,
    criterion: Criterion = IntegratedGradients(),
    examples: int | Sequence[Example] = 128,
    key: int | Array | None = None,
    head: str | None = None,
    split: str = "calibration",
    batch_size: int = 32,
    max_length: int | None = None,
    devices: Devices | None = None,
    means: Gates | None = None,
    progress: Callable[[int, int], None] | None = None,
    resume: str | Path | None = None,
) -> Scores:
    """Scores every unit of a model by how much a task needs it.

    Args:
        model: The architecture.
        params: Parameters.
        task: The task.
        criterion: How scores are made.
        examples: How many to draw from the split, stratified by label; or the examples themselves.
        key: A seed or a `jax.random.key`, for the draw and for criteria that draw; None is 0.
        head: The task head; by default the one of the task's name, else the only one.
        split: Where to draw from.
        batch_size: Examples in a batch, rounded up to a multiple of the number of devices.
        max_length: Tokens to which a text is cut; by default 128, or what the model reads if that is less.
        devices: Devices to share every batch out over; by default all of this process.
        means: What closed units are replaced by, if `criterion.closed` is not `zero`; by default `criterion.closed`
            computes it from the examples, in a forward pass of its own.
        progress: Called with the number of batches that are finished, and of all.
        resume: File that keeps the running totals; the run goes on from it if it is there, and removes it at the end.

    Returns:
        The scores, with all that is needed to make them again.

    Raises:
        ValueError: If the head does not fit the task, there are too few examples or labels, a score is not finite, or
            the file to resume from is damaged or belongs to a run with other settings.
    """
    key = jax.random.key(key) if isinstance(key, int) else key_or_default(key)
    head = fitting_head(model, task, head)
    reads = criterion.examples is not None
    if isinstance(examples, Sequence):
        rows, split = tuple(examples), "given"
    else:  # if none is read, they only say how long the texts are
        rows = draw(task, examples if reads else min(examples, len(task.rows(split))), key, split=split)
    _check_labels(criterion, model, head, len(task.labels), rows)
    prompt = prompt_of(model, task)
    encoded = encode(model, rows, max_length=max_length, prompt=prompt)
    header: dict[str, Any] = {
        "format": 1,
        "criterion": describe(criterion),
        "task": task.name,
        "split": split,
        "head": head,
        "examples": len(rows) if reads else 0,
        "largest": criterion.examples is not None and criterion.examples.largest,
        "keys": [list(seed_words(key))],
        "model": model_digest(model, params),
        "data": [digest(rows)] if reads else [],
        "rows": sorted(map(row_key, rows)) if reads else [],
        "max_length": encoded.max_length,
        "mean_length": encoded.mean_length,
        "versions": {"jaxprune": __version__, "jax": jax.__version__},
        "prompt": None if prompt is None else prompt.to_json(),
    }
    devices = jax.local_devices() if devices is None else devices
    batch_size = -(-batch_size // len(devices)) * len(devices)
    kept = None if resume is None else _Partial(resume, header | {"batch_size": batch_size, "devices": len(devices)})
    values, completeness, means = score_batches(
        model,
        params,
        pack(encoded, batch_size=batch_size, shape_cost=_shape_cost(criterion)) if reads else (),
        criterion,
        head=head,
        key=key,
        means=means,
        devices=devices,
        progress=progress,
        keep=kept,
    )
    if kept is not None:
        kept.path.unlink(missing_ok=True)
    return Scores(values, header | {"completeness": completeness}, means or None)


def score_batches(
    model: Model,
    params: Params,
    batches: Sequence[Mapping[str, Any]],
    criterion: Criterion,
    *,
    head: str | None = None,
    key: Array | None = None,
    means: Gates | None = None,
    devices: Devices | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep: _Partial | None = None,
) -> tuple[Gates, dict[str, float | None] | None, Gates]:
    """Calls a criterion on every batch and combines the examples.

    Args:
        model: The architecture.
        params: Parameters.
        batches: Batches as from `make_batches`; rows of `weight` 0 count for nothing.
        criterion: How scores are made.
        head: The task head; None is the only one.
        key: Randomness of the criterion.
        means: See `score`.
        devices: Devices to share every batch out over; None is the default device.
        progress: See `score`.
        keep: The file that keeps the running totals.

    Returns:
        The scores by site; of integrated gradients the completeness (see `with_relative`); the means.

    Raises:
        ValueError: If there is no example, or a score is not finite.
    """
    if criterion.examples is None:
        found = criterion(model, params, {}, head=head, key=key, means={})
        return {name: value[0] for name, value in found.scores.items()}, None, {}
    largest = criterion.examples.largest
    params, place = _placement(model, params, devices or jax.local_devices()[:1])
    closed = place.everywhere(_means(model, params, batches, criterion, means, place))
    totals, done = (None, 0) if keep is None else keep.load()
    for i in range(done, len(batches)):
        batch = place.batch(batches[i])
        found = criterion(model, params, batch, head=head, key=key, means=closed)
        if totals is not None:
            jax.block_until_ready(totals)  # the batch before: one is being computed, one is waiting
            if progress is not None:
                progress(i, len(batches))
        totals = _add(largest, totals or _nothing(largest, found), found, batch["weight"])
        if keep is not None and (i + 1) % SAVE_EVERY == 0:
            keep.save(totals, i + 1)
    if totals is None or not float(totals.weight):
        raise ValueError("there are no examples to score.")
    if progress is not None:
        progress(len(batches), len(batches))
    return _finish(largest, totals), _completeness(totals), closed


class _Placement(NamedTuple):
    """Where arrays go: the rows of a batch over all devices, everything else on each of them."""

    model: Model
    params: Params
    rows: NamedSharding | None  # None: one device, the default one
    whole: NamedSharding | None

    def batch(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        count = batch["input_ids"].shape[0]
        given = {"weight": np.ones(count, np.float32), "index": np.arange(count, dtype=np.int32)}
        given |= {name: batch[name] for name in ("labels", "weight", "index", "candidates") if name in batch}
        read = encoder_inputs if self.model.writes_text else model_inputs
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
    closed = getattr(criterion, "closed", zero)
    if means is None:
        return closed(model, params, map(place.batch, batches), getattr(criterion, "kinds", UNITS))
    if closed is zero:
        raise ValueError("means were given, but this criterion closes units to zero: set closed=calibration_means.")
    return means


def _shape_cost(criterion: Criterion) -> int:
    """Padded tokens that one more shape must save: the fewer, the more passes a token goes through.

    To compile a gradient takes about three times as long as to compile a forward pass; a node is two passes, and one
    more gives the labels.
    """
    return 3 * SHAPE_COST // (2 * getattr(criterion, "nodes", 1) + 1)


def _check_labels(criterion: Criterion, model: Model, head: str, labels: int, rows: Sequence[Example]) -> None:
    if getattr(criterion, "labels", None) is not gold:
        return
    chosen = model.head(head)
    missing = sum(row.label is None for row in rows)
    if missing:
        raise ValueError(f"{missing} of {len(rows)} examples have no label: use labels=predicted, sampled or every.")
    count = labels if model.writes_text else len(chosen.labels)
    wrong = [row.label for row in rows if not chosen.regression and row.label not in range(count)]
    if wrong:
        raise ValueError(f"label {wrong[0]!r} is outside 0 to {count - 1}, the labels of head {head!r}.")


def _nothing(largest: bool, found: Measured) -> Totals:
    start = -jnp.inf if largest else 0.0
    scores = {name: jnp.full(value.shape[1:], start, jnp.float32) for name, value in found.scores.items()}
    return Totals(scores, {name: jnp.zeros(()) for name in found.completeness}, jnp.zeros(()))


@partial(jax.jit, static_argnums=0)
def _add(largest: bool, totals: Totals, found: Measured, weight: Float[Array, " b"]) -> Totals:
    def combine(total: Array, rows: Array) -> Array:
        if largest:
            return jnp.maximum(total, jnp.where(weight[:, None] > 0, rows, -jnp.inf).max(0))
        return total + jnp.where(weight[:, None] > 0, weight[:, None] * rows, 0.0).sum(0)

    return Totals(
        {name: combine(total, found.scores[name]) for name, total in totals.scores.items()},
        {name: total + (weight * found.completeness[name]).sum() for name, total in totals.completeness.items()},
        totals.weight + weight.sum(),
    )


def _finish(largest: bool, totals: Totals) -> Gates:
    count = jnp.ones(()) if largest else totals.weight
    values = {name: total / count for name, total in totals.scores.items()}
    broken = [name for name, value in values.items() if not np.isfinite(np.asarray(value)).all()]
    if broken:
        raise ValueError(f"scores of {', '.join(broken)} are not finite: does the model give finite logits?")
    return values


def _completeness(totals: Totals) -> dict[str, float | None] | None:
    if not totals.completeness:
        return None
    return with_relative({name: float(total / totals.weight) for name, total in totals.completeness.items()})


class _Partial:
    """The file that keeps the running totals of one run."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))

    def save(self, totals: Totals, done: int) -> None:
        """Writes the totals after `done` batches, atomically."""
        tensors = {f"scores:{name}": value for name, value in totals.scores.items()}
        tensors |= {f"completeness:{name}": value for name, value in totals.completeness.items()}
        arrays = {name: np.asarray(value) for name, value in (tensors | {"weight": totals.weight}).items()}
        metadata = {PARTIAL: json.dumps({"settings": self.settings, "done": done})}
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
            try:
                found = json.loads(file.metadata[PARTIAL])
                settings, done = dict(found["settings"]), int(found["done"])
                weight = jnp.asarray(file.read("weight"))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{self.path} is damaged ({error!r}): remove it to start anew.") from error
            other = [name for name, value in self.settings.items() if settings.get(name) != value]
            if other:
                raise ValueError(
                    f"{self.path} was begun with other settings ({', '.join(other)}): remove it, or name another file."
                )
            arrays = {name: jnp.asarray(file.read(name)) for name in file.entries}
        parts = {kind: {} for kind in ("scores", "completeness")}
        for name, array in arrays.items():
            kind, _, rest = name.partition(":")
            if rest:
                parts[kind][rest] = array
        return Totals(parts["scores"], parts["completeness"], weight), done

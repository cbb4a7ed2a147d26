"""The one training loop, under fine-tuning, distillation and pre-training: resumable at any step, to the same bits.

A `Run` holds what differs between them: the batches, the step and the evaluation. The order of the rows and the dropout
are functions of the seed and the step alone, so an interrupted run continues exactly where its state file says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from jaxprune.checkpoints.files import COUNT, DIGEST, check_file, differences, misfits_of, write_atomic
from jaxprune.checkpoints.tensors import is_sealed, sealed
from jaxprune.models import Model
from jaxprune.units import Params, flatten, unflatten

VERSION = 3  # of the state files; those of version 2 had no checksum
_HEADER = {
    "version": COUNT,
    "run": {...: object},
    "done": COUNT,
    "history": [{"step": COUNT, ...: object}],
    "checksum": DIGEST,
}
REPORT_EVERY = 10  # steps

OPTIMIZERS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6),
    "adafactor": lambda: optax.chain(  # Shazeer and Stern 2018
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    ),
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a training run; the defaults are SparseBERT's: AdamW at a constant rate."""

    epochs: int = 5
    steps: int | None = None  # instead of epochs
    batch_size: int = 32
    learning_rate: float = 3e-5  # at its peak; per step
    warmup: float = 0.0  # fraction of the steps in which the rate rises from 0
    decay: bool = False  # whether the rate then falls linearly, to 0 after the last step
    weight_decay: float = 0.01  # decoupled; kernels and embeddings only
    optimizer: str = "adamw"  # or "adafactor", whose learning rate is relative to the size of each parameter
    clip: float = 1.0  # largest norm of the gradient over all parameters of a step
    dropout: bool = True
    max_length: int | None = None  # tokens; None: 128, for spans 384, or what the model reads if that is less
    seed: int = 0
    evaluate_every: int | None = None  # steps between two evaluations on dev; None: one after each epoch
    dev_limit: int | None = 1000  # the most dev rows of each task to evaluate
    save_every: int = 200  # steps between two writings of the state file

    def __post_init__(self):
        for name in ("epochs", "batch_size", "save_every", "steps", "evaluate_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}.")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.warmup <= 1 or self.weight_decay < 0:
            raise ValueError("warmup must lie in [0, 1], and weight_decay be at least 0.")

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate of a run of so many steps."""
        return _rate(self.learning_rate, self.warmup, self.decay, steps)

    def optimizer_of(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of so many steps; the same object for the same settings, so it is compiled once."""
        return _optimizer(
            self.optimizer, self.clip, self.weight_decay, self.learning_rate, self.warmup, self.decay, steps
        )

    def to_json(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "save_every"}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


@lru_cache
def _rate(peak: float, warmup: float, decay: bool, steps: int) -> optax.Schedule:
    rise: Any = warmup * steps  # a fraction of a step counts, too
    after = optax.linear_schedule(peak, 0.0, steps - rise) if decay else optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), after], [rise]) if rise else after


@lru_cache
def _optimizer(name: str, clip: float, weight_decay: float, *rate: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(clip),
        *(OPTIMIZERS[name](), optax.add_decayed_weights(weight_decay, decayed)),
        optax.scale_by_learning_rate(_rate(*rate)),
    )


def decayed(params: Params) -> Params:
    """The parameters that are subject to weight decay: kernels and embeddings, not biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def share_gradients(model: Model, grads: Params) -> Params:
    """Gives parameters that are one in the original model the sum of their gradients, so that they stay equal."""
    flat = flatten(grads)
    for places in model.tied_places:
        total = sum((flat[path] for path in places[1:]), flat[places[0]])
        flat |= dict.fromkeys(places, total)
    return unflatten(flat) if model.tied_places else grads


class TrainingState(NamedTuple):
    """All that a run needs to continue; replaced as a whole, so that an interruption never finds half of a step."""

    params: Params
    moments: Any  # the optimizer's state
    best: Params = {}  # noqa: RUF012 (no one writes into it); the parameters of the best evaluation, if there is one
    done: int = 0  # steps
    history: tuple[dict[str, Any], ...] = ()  # the evaluations, each with its "step"

    @property
    def donated(self) -> bool:
        """True if an interruption fell into an update, which uses up the state before it."""
        return any(array.is_deleted() for array in jax.tree.leaves((self.params, self.moments)))


def trainable(params: Params) -> Params:
    """A copy in float32: an update uses up the arrays that it is given."""
    return jax.tree.map(lambda array: jnp.array(array, jnp.float32, copy=True), params)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _updated(
    optimizer: optax.GradientTransformation, params: Params, moments: Any, grads: Params
) -> tuple[Params, Any]:
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer count
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments  # pyright: ignore[reportReturnType]


def update(optimizer: optax.GradientTransformation, state: TrainingState, grads: Params) -> TrainingState:
    """The state after one step of an optimizer. Uses up the arrays of the state before it."""
    params, moments = _updated(optimizer, state.params, state.moments, grads)
    return state._replace(params=params, moments=moments, done=state.done + 1)


class Step(NamedTuple):
    """A report on a run: every ten steps, and after each evaluation."""

    step: int  # steps done
    steps: int  # of the whole run
    epoch: int  # counts from 1
    loss: float  # the mean over the steps since the last report
    evaluation: Mapping[str, Any] | None = None  # plain values, if there was one just now


class Run(NamedTuple):
    """The parts of a training loop that differ from run to run."""

    identity: Mapping[str, Any]  # plain values; a state file with others is refused
    steps: int
    batches: Callable[[int], Sequence[Any]]  # of an epoch, from 0: a function of the epoch alone, as many in each
    step: Callable[[TrainingState, Any], tuple[TrainingState, Array]]  # updates with a batch; the loss before it
    evaluate: Callable[[TrainingState], dict[str, Any]] | None = None  # returns plain values
    evaluate_every: int = 0  # steps; there is always an evaluation after the last one
    quality: Callable[[Mapping[str, Any]], float] = lambda evaluation: -np.inf  # -inf is never the best

    def best(self, history: Sequence[Mapping[str, Any]]) -> int:
        """The index of the best evaluation, the first of equals; -1 if there is none."""
        values = [self.quality(evaluation) for evaluation in history]
        return -1 if np.isneginf(values).all() else int(np.argmax(values))


def train(
    run: Run,
    state: TrainingState,
    *,
    file: Path | None = None,
    save_every: int = 200,
    progress: Callable[[Step], None] | None = None,
) -> TrainingState:
    """Trains to the end, from the state file if there is one.

    Args:
        run: What to do.
        state: The state before the first step.
        file: Holds the run in progress, and is left in place at the end; None: the run cannot be resumed.
        save_every: Steps between two writings of the file; it is also written after each evaluation.
        progress: Called with reports; it may raise `KeyboardInterrupt` to end the run.

    Returns:
        The state after the last step, in which `best` holds the parameters of the best evaluation.

    Raises:
        ValueError: If the loss is not finite, or the file belongs to another run.
        KeyboardInterrupt: After the state was written; one that fell into an update leaves the file as it was.
    """
    if file is not None:
        check_file(file, True)
    if file is not None and file.exists():
        state = read_state(file, state, run.identity)
        if state.done > run.steps:
            raise ValueError(f"{file} has {state.done} steps of a run of {run.steps}: remove it to start again.")
        try:
            run.best(state.history)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} has a history that cannot be read ({error}): remove it to start again."
            ) from error

    def save() -> None:
        if file is not None:
            write_state(file, state, run.identity)

    def report(evaluation: Mapping[str, Any] | None = None) -> None:
        nonlocal mean
        if losses:
            mean = float(np.mean([float(loss) for loss in losses]))
            losses.clear()
        if not np.isfinite(mean):
            raise ValueError(f"the loss is {mean} at step {state.done}: lower the learning rate.")
        if progress is not None:
            progress(Step(state.done, run.steps, max(state.done - 1, 0) // per_epoch + 1, mean, evaluation))

    losses: list[Array] = []
    mean, saved = 0.0, state.done
    epoch, batches = 0, run.batches(0)
    per_epoch = len(batches)
    try:
        while True:
            if run.evaluate is not None and _evaluation_due(run, state):
                history = (*state.history, {"step": state.done} | run.evaluate(state))
                best = run.best(history) == len(history) - 1
                params = jax.tree.map(jnp.copy, state.params) if best else state.best
                state = state._replace(best=params, history=history)
                save()
                report(history[-1])
            elif state.done % save_every == 0 and state.done > saved:
                save()
            if state.done >= run.steps:
                break
            if state.done // per_epoch != epoch:
                epoch = state.done // per_epoch
                batches = run.batches(epoch)
            state, loss = run.step(state, batches[state.done % per_epoch])
            losses.append(loss)
            if state.done % REPORT_EVERY == 0 or state.done == run.steps:
                report()
    except (KeyboardInterrupt, SystemError):  # C code that called Python's may make the second of the first
        if not state.donated:
            save()
        raise
    if run.evaluate is None:
        save()
    return state


def _evaluation_due(run: Run, state: TrainingState) -> bool:
    taken = bool(state.history) and state.history[-1]["step"] == state.done
    return state.done > 0 and not taken and (state.done % run.evaluate_every == 0 or state.done >= run.steps)


def _arrays(state: TrainingState) -> dict[str, Any]:
    return {"params": state.params, "moments": state.moments, "best": state.best}


def _named(tree: Any) -> dict[str, Any]:
    """All arrays by their place, such as `moments.encoder.0.mu.layers.3.ffn.up.kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def write_state(file: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Writes a run in progress, atomically."""
    header = {"version": VERSION, "run": identity, "done": state.done, "history": state.history}
    arrays = {name: np.asarray(array) for name, array in _named(_arrays(state)).items()}
    write_atomic(file, to_safetensors(arrays, {"jaxprune_training": json.dumps(sealed(header, arrays))}))


def _kind(stored: Any) -> str:
    """The type and the shape of an array that is not read yet, as NumPy calls them."""
    kind, letters = stored.get_dtype(), stored.get_dtype().rstrip("0123456789")
    names = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}
    return f"{names.get(letters, letters)}{kind[len(letters) :]}{list(stored.get_shape())}"


def read_state(file: Path, state: TrainingState, identity: Mapping[str, Any]) -> TrainingState:
    """Reads a run in progress: every array by its name, into the structure of `state`; refuses what does not fit."""
    anew = "remove it to start again."
    try:
        with safe_open(file, framework="numpy") as stored:
            header = json.loads((stored.metadata() or {})["jaxprune_training"])
            if header.get("version") != VERSION:
                raise ValueError(f"{file} is the state of a run of another version of jaxprune: {anew}")
            problems = misfits_of(header, _HEADER)
            if not problems and (other := differences(header["run"], json.loads(json.dumps(identity)))):
                raise ValueError(f"{file} is the state of another run ({other}): {anew}")
            begun = any(name.startswith("best.") for name in stored.keys())  # noqa: SIM118
            structure = _arrays(state._replace(best=state.params if begun else {}))
            expected = _named(structure)
            kinds = {name: _kind(stored.get_slice(name)) for name in stored.keys()}  # noqa: SIM118
            wanted = {name: f"{array.dtype}{list(array.shape)}" for name, array in expected.items()}
            differing = sorted(name for name in kinds | wanted if kinds.get(name) != wanted.get(name))
            arrays = {} if problems or differing else {name: stored.get_tensor(name) for name in kinds}
    except (SafetensorError, KeyError, AttributeError, TypeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no state of a run ({error!r}): {anew}") from error
    if not problems:
        taken, done = [entry["step"] for entry in header["history"]], header["done"]
        if taken != sorted(set(taken)) or not all(0 < step <= done for step in taken):
            problems.append(f"its evaluations are after the steps {taken}, of {done}")
    if problems:
        raise ValueError(f"{file} is no state of a run ({'; '.join(problems)}): {anew}")
    if differing:
        name = differing[0]
        raise ValueError(
            f"{file} does not fit this run in {len(differing)} of its arrays, such as {name}: expected "
            f"{wanted.get(name, 'none')}, got {kinds.get(name, 'none')}: {anew}"
        )
    if not is_sealed(header, arrays):
        raise ValueError(f"{file} is damaged, its checksum is another than that of what it holds: {anew}")
    restored = jax.tree.unflatten(jax.tree.structure(structure), [jnp.array(arrays[name]) for name in expected])
    return TrainingState(**restored, done=header["done"], history=tuple(header["history"]))

"""A training run: its state, the loop over its steps, and the file that it goes on from after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from jaxprune.checkpoints.files import write_atomic
from jaxprune.models import Model
from jaxprune.units import Params, flatten, path_name, unflatten


class Step(NamedTuple):
    """Where a run is."""

    step: int  # steps done
    steps: int  # of all epochs
    epoch: int  # counts from 1
    loss: float  # mean since the last report


class TrainingState(NamedTuple):
    """All that a run needs to go on."""

    params: Params
    moments: dict[str, optax.OptState]  # of "encoder" (a text-to-text model as a whole) and of every head
    best: Params
    done: int  # steps; in here so that an interruption finds the number and the arrays of the same step

    @property
    def donated(self) -> bool:
        """Whether an interruption fell into an update, which uses up the state before it."""
        return any(array.is_deleted() for array in jax.tree.leaves((self.params, self.moments)))


def run_steps(
    step: Callable[[TrainingState], tuple[TrainingState, Array]],
    now: TrainingState,
    end: int,
    steps: int,
    epoch: int,
    save: Callable[[TrainingState], None] | None,
    save_every: int,
    progress: Callable[[Step], None] | None,
) -> TrainingState:
    """Trains until `end` of `steps` are done, and saves on the way, but not at the end.

    Args:
        step: One step: the state after it, and its loss. It may use up the state before it.
        now: Where the run is.
        end: Steps done when this returns.
        steps: Of the whole run.
        epoch: For the progress.
        save: Writes a state; None: nothing is written.
        save_every: Steps between two writings.
        progress: Called every ten steps.

    Raises:
        ValueError: If the loss is not finite.
        KeyboardInterrupt: After the state was written; one that fell into an update finds it in the file.
    """
    losses: list[Array] = []
    try:
        while now.done < end:
            now, loss = step(now)
            losses.append(loss)
            if now.done % 10 == 0:
                mean = float(np.mean([float(loss) for loss in losses]))
                losses.clear()
                if not np.isfinite(mean):
                    raise ValueError(f"the loss is {mean} at step {now.done}: lower the learning rate.")
                if progress is not None:
                    progress(Step(now.done, steps, epoch, mean))
            if save is not None and now.done % save_every == 0 and now.done < end:
                save(now)
    except (KeyboardInterrupt, SystemError):  # C code that called Python's may make the second of the first
        if save is not None and not now.donated:
            save(now)
        raise
    return now


def decayed(params: Params) -> Params:
    """Which parameters are subject to weight decay: kernels and embeddings, not biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def share_gradients(model: Model, grads: Params) -> Params:
    """Gives parameters that are one in the original model the sum of their gradients, so that they stay equal."""
    flat = flatten(grads)
    for places in model.tied_places:
        total = sum((flat[path] for path in places[1:]), flat[places[0]])
        flat |= dict.fromkeys(places, total)
    return unflatten(flat) if model.tied_places else grads


def _arrays(now: TrainingState) -> dict[str, Any]:
    found = {f"params.{path_name(path)}": a for path, a in flatten(now.params).items()}
    found |= {f"best.{path_name(path)}": a for path, a in flatten(now.best).items()}
    return found | {f"moments.{i}": a for i, a in enumerate(jax.tree.leaves(now.moments))}


def write_state(file: Path, now: TrainingState, run: Mapping[str, Any], history: list[Any]) -> None:
    """Writes a run in progress, atomically."""
    header = {"jaxprune_training": json.dumps({"run": run, "done": now.done, "history": history})}
    arrays = {name: np.asarray(array) for name, array in _arrays(now).items()}
    write_atomic(file, to_safetensors(arrays, header))


def read_state(file: Path, now: TrainingState, run: Mapping[str, Any]) -> tuple[TrainingState, list[Any]]:
    """Reads a run in progress: its state, in the structure of `now`, and the evaluations so far.

    Raises:
        ValueError: If the file is damaged, something else, or the state of another run.
    """
    try:
        with safe_open(file, framework="numpy") as stored:
            header = json.loads((stored.metadata() or {})["jaxprune_training"])
            if header.get("run") != json.loads(json.dumps(run)):
                known = header.get("run", {})
                other = [part for part in run if known.get(part) != json.loads(json.dumps(run[part]))]
                raise ValueError(
                    f"{file} is the state of another run ({', '.join(other)} differ): remove it to start anew."
                )
            arrays = {name: jnp.array(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no state of a run ({error!r}): remove it to start anew.") from error

    def take(prefix: str) -> Params:
        named = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
        return unflatten({tuple(int(s) if s.isdigit() else s for s in name.split(".")): a for name, a in named.items()})

    leaves, structure = jax.tree.flatten(now.moments)
    moments = jax.tree.unflatten(structure, [arrays[f"moments.{i}"] for i in range(len(leaves))])
    return TrainingState(take("params."), moments, take("best."), header["done"]), header["history"]

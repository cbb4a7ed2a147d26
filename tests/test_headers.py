"""Any edit of the JSON in our files is refused with one line that names the file, or reads as something that works."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import safetensors_bytes
from mutations import NUMBERS, THINGS, make_scores, split
from tiny import random_gates, tiny_model

from jaxprune.checkpoints.files import COUNT, DIGEST, misfits_of, parse_header
from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import GATES, read_gates, read_pruning, recorded_gates, units_record
from jaxprune.checkpoints.shared import save_shared, task_record
from jaxprune.checkpoints.tensors import sealed
from jaxprune.evaluation.evaluate import Evaluation
from jaxprune.scoring.scores import load_scores, objective_name
from jaxprune.training.loop import Run, TrainingState, read_state, train, write_state

EDITS = 60  # of each file


@pytest.mark.parametrize(
    ("value", "schema", "problem"),
    [
        (True, COUNT, "it is True, expected a count"),
        (-1, COUNT, "it is -1"),
        (2**63, COUNT, "expected a count"),
        (1.0, int, "it is 1.0, expected a whole number"),
        (float("nan"), float, "it is nan, expected a finite number"),
        (10**400, float, "expected a finite number"),
        ("F", DIGEST, "it is 'F', expected a digest"),
        ([1, "a"], [int], "it[1] is 'a', expected a whole number"),
        ({"a": {"b": None}}, {"a": {"b": str}}, "a.b is None, expected text"),
        ({}, {"a": str, "b?": str}, "a is missing"),
        ({"a": 1, "c": 2}, {"a": int, "b?": int}, "c is unknown, expected a, b"),
        ({"c": "x"}, {"b?": int, ...: int}, "c is 'x', expected a whole number"),
        ([{"a": 1}], (None, [{"a": str}]), "it[0].a is 1, expected text"),
        (3, (str, None), "it is 3, expected text or null"),
    ],
)
def test_a_misfit_is_named_with_its_place_and_what_was_expected(value, schema, problem):
    (found,) = misfits_of(value, schema, "it" if not isinstance(value, dict) else "")
    assert problem in found


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (0, COUNT), (1, float), (-0.5, float), ("a" * 64, DIGEST), (None, (str, None)), ([], [int]), ({}, {"a?": int}),
        ({"a": 1, "b": {}}, {"a": int, ...: object}), ([[1.5], None], [([float], None)]), (5, range(5, 6)),
    ],
)  # fmt: skip
def test_what_fits_has_no_misfits(value, schema):
    assert misfits_of(value, schema) == []


NO_JSON = ["", "{", "[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": "\\ud800"}', "9" * 9999]


@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_no_json_is_one_problem(text):
    ((problem,), header) = parse_header(text, {...: object})
    assert header is None and "its header is not JSON" in problem


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all entries of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in entries:
        yield (*path, name)
        yield from places(each, (*path, name))


def edited(value: Any, draw: random.Random) -> Any:
    """A JSON value with one entry that is gone, renamed or something else."""
    value = json.loads(json.dumps(value))
    *path, name = draw.choice(list(places(value)))
    owner = value
    for step in path:
        owner = owner[step]
    kind = draw.choice(("value", "value", "value", "gone", "renamed"))
    if kind == "value":
        owner[name] = draw.choice((*NUMBERS, *THINGS, "0-9999999999", [[]], [10**30], {"a": None}))
    else:
        old = owner.pop(name)
        if kind == "renamed" and isinstance(owner, dict):
            owner[f"{name}_"] = old
    return value


def edit_metadata(file: Path, name: str, change: Callable[[Any], Any]) -> None:
    text, data = split(file.read_bytes())
    header = json.loads(text)
    header["__metadata__"][name] = json.dumps(change(json.loads(header["__metadata__"][name])))
    file.write_bytes(safetensors_bytes(header, data))


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


EVALUATION = Evaluation(task="mood", split="dev", head="mood", metrics={"accuracy": 0.5}, chance=0.5, n=8)
RUN = Run(
    {"seed": 0, "data": ["a", "b"]},
    2,
    lambda epoch: [None],
    lambda state, batch: (state._replace(done=state.done + 1), jnp.zeros(())),
    quality=lambda entry: Evaluation.from_json(entry["result"]).primary[1],
)
START = TrainingState({"a": jnp.ones(3)}, optax.EmptyState())


def make(folder: Path, kind: str) -> tuple[Path, Callable[[Any], None], Callable[[], object]]:
    """A whole file, what edits the JSON in it, and what reads it and uses what it says."""
    model, params = tiny_model(layers=1)
    if kind == "gates":
        file = save_shared(folder / "out", model, params, {"a": random_gates(model, params)}, means={"a": {}}) / GATES
        read = lambda: (read_gates(file), task_record(file.parent, "a"))  # noqa: E731
        return file, lambda change: edit_metadata(file, "jaxprune_gates", change), read
    if kind == "scores":
        file = make_scores(folder)

        def read_scores() -> None:
            scores = load_scores(file)
            objective_name(scores, model.head())
            assert scores.properties["by_layer"] in (True, False)

        return file, lambda change: edit_metadata(file, "jaxprune_scores", reseal(file, change)), read_scores
    if kind == "state":
        file = folder / "state.safetensors"
        history = ({"step": 1, "result": EVALUATION.to_json()},)
        write_state(file, START._replace(done=1, history=history), RUN.identity)
        return (
            file,
            lambda change: edit_metadata(file, "jaxprune_training", reseal(file, change)),
            lambda: (read_state(file, START, RUN.identity), train(RUN, START, file=file)),
        )
    remaining = {name: np.arange(2) for name in ("0.attention.heads", "0.ffn.neurons")}
    record = units_record(remaining, dict.fromkeys(remaining, 4)) | {"settings": {"length": 16}}
    out = save(folder / "out", model, params, pruning=record)
    file = out / ("pruning.json" if kind == "pruning" else "config.json")
    if kind == "pruning":
        return file, lambda change: edit_json(file, change), lambda: recorded_gates({"sites": {}} | read_pruning(out))
    return file, lambda change: edit_json(file, change), lambda: load(out)


def reseal(file: Path, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The change, after which the checksum is right again where the header still is an object."""
    from safetensors.numpy import load_file

    arrays = load_file(file)

    def resealed(header: Any) -> Any:
        header = change(header)
        return sealed(header, arrays) if isinstance(header, dict) and "checksum" in header else header

    return resealed


@pytest.mark.parametrize("kind", ["gates", "scores", "state", "pruning", "config"])
def test_any_edit_is_refused_in_one_line_or_works(tmp_path, kind: str):
    file, edit, read = make(tmp_path, kind)
    whole, draw, refused = file.read_bytes(), random.Random(f"{kind} 20261130"), 0
    read()
    for _ in range(EDITS):
        edit(lambda value: edited(value, draw))
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            text, refused = str(error), refused + 1
            assert file.name in text and "\n" not in text and len(text) < 3000, text
            assert not any(name in text for name in ("Error(", "object is not", "object has no")), text
        file.write_bytes(whole)
    assert refused > EDITS // 4
    read()

"""Latency tables: rows rise, files are exact, and a table of another device, version or model is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from hand_tables import FIXED, HEAD, NEURON, hand_table
from tiny import random_gates, tiny_model

from jaxprune.compaction import compact
from jaxprune.pruning import latency as latency_table
from jaxprune.pruning.latency import (
    LatencyTable,
    Row,
    check_table,
    compare_latency,
    conditions,
    kept_table,
    known_table,
    latency,
    measure_latency_table,
    read_table,
    table_file,
    write_table,
)
from jaxprune.units import resize, sites, widths


def row(*seconds: float) -> Row:
    return Row(sites=("0.ffn.neurons",), widths=tuple(8 * i for i in range(len(seconds))), seconds=seconds)


def test_rows_rise_by_hand():
    assert row(0.0, 1.0, 3.0, 2.0, 4.0).rising().tolist() == [0.0, 1.0, 2.5, 2.5, 4.0]
    assert row(0.0, 3.0, 2.0, 1.0).rising().tolist() == [0.0, 2.0, 2.0, 2.0]
    assert row(0.0, -1.0, 2.0).rising().tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize("seed", range(10))
def test_rows_rise_and_keep_what_rises(seed):
    random = np.random.default_rng(seed)
    found = row(0.0, *random.random(12)).rising()
    assert (np.diff(found) >= 0).all() and found[0] == 0.0
    rising = (0.0, *np.cumsum(random.random(12)).tolist())
    assert row(*rising).rising().tolist() == list(rising)


def test_widths_that_are_no_quicker_than_a_wider_one_are_not_offered():
    model, params = tiny_model()
    table = hand_table(model, params, seconds=lambda kind, units: 1e-3 * (-(-units // 16)))  # steps of 16
    assert table.steps("0.ffn.neurons", 32) == [(0, 0.0), (16, 1e-3), (32, 2e-3)]
    assert table.steps("1.attention.heads", 4) == [(0, 0.0), (4, 1e-3)]
    assert table.steps("0.ffn.neurons", 20)[-1] == (20, pytest.approx(1.5e-3))  # between those that were measured


def test_a_prediction_is_the_sum_of_its_modules():
    model, params = tiny_model()
    table, width = hand_table(model, params), widths(model.axes, params)
    assert table.predict(width) == pytest.approx(FIXED + 2 * (4 * HEAD + 32 * NEURON))
    assert table.predict(dict.fromkeys(width, 0)) == FIXED
    assert table.predict(width | {"0.ffn.neurons": 12}) == pytest.approx(FIXED + 8 * HEAD + 44 * NEURON)
    with pytest.raises(ValueError, match=r"no row for 7\.ffn\.neurons"):
        table.predict({"7.ffn.neurons": 1})


def test_a_table_is_read_as_it_was_written(tmp_path):
    for model_type, length in (("bert", 12), ("t5", (12, 3))):
        model, params = tiny_model(model_type)
        table = hand_table(model, params, length=length)
        assert read_table(write_table(tmp_path / "deep" / f"{model_type}.json", table)) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"format": 2}, "its format is 2"),
        (lambda content: content | {"more": 1}, "more is unknown"),
        (lambda content: {name: value for name, value in content.items() if name != "fixed"}, "fixed is missing"),
        (lambda content: content | {"fixed": -1.0}, "expected seconds from 0"),
        (lambda content: content | {"fixed": "soon"}, "fixed is .soon., expected a finite number"),
        (lambda content: content | {"rows": [content["rows"][0] | {"widths": [0, 2, 1, 3, 4]}]}, "rising widths"),
        (lambda content: content | {"rows": [content["rows"][0] | {"seconds": [0.0]}]}, "seconds of each"),
        (lambda content: content | {"rows": 5}, "rows is 5, expected a list"),
        (lambda content: content | {"conditions": {}}, "conditions.length is missing"),
        (lambda content: [content], "its format is "),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, change, message):
    model, params = tiny_model()
    file = write_table(tmp_path / "table.json", hand_table(model, params))
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=f"is no latency table: .*{message}"):
        read_table(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is no latency table"):
        read_table(file)
    with pytest.raises(FileNotFoundError, match="no latency table"):
        read_table(tmp_path / "missing.json")


def test_a_poisoned_table_in_the_cache_is_measured_anew(tmp_path, monkeypatch):
    model, params = tiny_model()
    table = hand_table(model, params)
    known, measured = table.conditions, []

    def measure(*_: Any, **__: Any) -> LatencyTable:
        measured.append(table)
        return table

    monkeypatch.setattr(latency_table, "measure_latency_table", measure)
    folder, kept = tmp_path / "cache", partial(kept_table, tmp_path / "cache", model, params)
    assert kept(batch=known.batch, length=known.length) == table and len(measured) == 1
    assert kept(batch=known.batch, length=known.length) == table and len(measured) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    file = table_file(folder, known)
    good = file.read_text()
    other = replace(table, conditions=replace(known, device="another"))
    (tmp_path / "other.json").write_text(good)
    for content in ("", "{", good.replace('"fixed"', '"broken"'), write_table(tmp_path / "x.json", other).read_text()):
        file.write_text(content)
        assert known_table(folder, known) is None
    file.unlink()
    file.symlink_to(tmp_path / "other.json")
    assert known_table(folder, known) is None
    assert kept(batch=known.batch, length=known.length) == table and len(measured) == 2
    assert not file.is_symlink() and known_table(folder, known) == table


def test_another_table_is_for_another_device_version_model_and_shape(monkeypatch):
    model, params = tiny_model()
    other, wider = tiny_model(neurons=40)
    small = compact(model, params, random_gates(model, params))
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)

    def key(model: Any = model, params: Any = params, batch: int = 1, length: Any = 12) -> str:
        return conditions(model, params, batch=batch, length=length).key

    keys = [key(), key(batch=2), key(length=13), key(other, wider), key(params=small), key(params=half)]
    monkeypatch.setattr(latency_table, "device_label", lambda: "another device")
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "--another")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    other_values = jax.tree.map(lambda leaf: leaf + 1, params)
    assert key(params=other_values) == keys[0]  # another fine-tuned copy takes as long


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("device", "another device", "measured on 'another device', this is"),
        ("jax", "0.0.1", "measured with jax '0.0.1', this is"),
        ("flags", "--fast", "measured with XLA_FLAGS '--fast', this is"),
        ("model", "0" * 64, "measured for a model with the shapes '000000000000', this is"),
    ],
)
def test_a_table_that_does_not_hold_here_is_refused(name, value, message):
    model, params = tiny_model()
    table = hand_table(model, params)
    check_table(table, model, params)
    with pytest.raises(ValueError, match=f"does not hold here: it was {message}"):
        check_table(replace(table, conditions=replace(table.conditions, **{name: value})), model, params)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_narrow_models_keep_the_first_units(model_type):
    model, params = tiny_model(model_type)
    every = sites(model.axes, params)
    gates = {site.name: np.arange(widths(model.axes, params)[site.name]) < 3 for site in every}
    for found, expected in zip(
        jax.tree.leaves(resize(model.axes, params, dict.fromkeys(every, 3))),
        jax.tree.leaves(compact(model, params, {name: gate.astype(np.float32) for name, gate in gates.items()})),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_a_model_is_measured_once(model_type, tmp_path, monkeypatch):
    """Seconds are not tested, but what was run: every width of one module of each shape."""
    monkeypatch.setattr(latency_table, "LEAST", 1)
    monkeypatch.setattr(latency_table, "ENOUGH", 0.0)
    model, params = tiny_model(model_type, neurons=24)
    length, seen = (7, 3) if model_type == "t5" else 7, []
    table = kept_table(
        tmp_path, model, params, batch=2, length=length, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1]
    shapes = {"bert": 2, "t5": 5}[model_type]  # of T5 attention, cross-attention and FFN of encoder and decoder
    assert len(table.rows) == shapes
    assert {name for own in table.rows for name in own.sites} == set(widths(model.axes, params))
    for own in table.rows:
        kind = own.sites[0].rpartition(".")[2]
        assert own.widths == ((0, 1, 2, 3, 4) if kind == "heads" else (0, 8, 16, 24))
        assert own.seconds[0] == 0.0 and np.isfinite(own.seconds).all()
    assert table.fixed > 0 and len(table.wholes) == latency_table.WHOLES
    assert table.conditions == conditions(model, params, batch=2, length=length)
    assert read_table(table_file(tmp_path, table.conditions)) == table

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(latency_table, "measure_latency_table", never)
    assert kept_table(tmp_path, model, params, batch=2, length=length) == table


def test_a_pruned_model_can_be_measured(monkeypatch):
    monkeypatch.setattr(latency_table, "LEAST", 1)
    monkeypatch.setattr(latency_table, "ENOUGH", 0.0)
    model, params = tiny_model(neurons=24)
    gates = {"0.ffn.neurons": np.arange(24) < 13, "1.attention.heads": np.zeros(4)}
    small = compact(model, params, {name: np.float32(gate) for name, gate in gates.items()})
    table = measure_latency_table(model, small, length=5)
    assert {own.sites: own.widths for own in table.rows} == {
        ("0.attention.heads", "1.attention.heads"): (0, 1, 2, 3, 4),
        ("1.ffn.neurons", "0.ffn.neurons"): (0, 8, 16, 24),  # the widest first
    }
    empty = compact(model, params, {name: np.zeros(n, np.float32) for name, n in widths(model.axes, params).items()})
    with pytest.raises(ValueError, match="has no units"):
        measure_latency_table(model, empty, length=5)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"length": 0}, {"points": 0}, {"rounds": 0}])
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1, got 0"):
        measure_latency_table(*tiny_model(), **wrong)


def test_latency_says_what_was_measured():
    model, params = tiny_model("bert")
    measured = latency(model, params, batch=2, length=5, repeats=4, warmup=1)
    assert (measured.batch, measured.length) == (2, 5)
    assert 0 < measured.median <= measured.p95
    assert measured.device


def test_latencies_are_compared_side_by_side():
    model, params = tiny_model("bert")
    small = compact(model, params, random_gates(model, params))
    compared = compare_latency([(model, params), (model, small)], length=5, repeats=3, warmup=1)
    assert len(compared.latencies) == len(compared.speedups) == 2
    assert compared.speedups[0] == 1.0
    assert compared.speedups[1] > 0


def test_latency_without_task_heads():
    model, params = tiny_model("bert", heads=())
    assert latency(model, params, length=5, repeats=1, warmup=1).median > 0


@pytest.mark.parametrize("name", ["batch", "length", "repeats", "warmup"])
def test_latency_needs_positive_numbers(name):
    model, params = tiny_model("bert")
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        latency(model, params, **settings)


def test_latency_needs_a_model_that_reads_that_many_tokens():
    model, params = tiny_model("bert")
    with pytest.raises(ValueError, match="the model reads 1 to 64"):
        latency(model, params, length=65)
    with pytest.raises(ValueError, match="no model"):
        compare_latency([])


def test_a_decoder_is_measured_up_to_its_label_words():
    model, params = tiny_model("llama")
    (timing,), _ = compare_latency([(model, params)], batch=1, length=4, head="words", repeats=1, warmup=1)
    assert timing.median > 0

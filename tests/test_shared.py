"""One folder for many tasks: slicing at load equals compaction, and whatever is not known or not whole is refused."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import safetensors_bytes, write_classifier
from choices import chosen
from mutations import split
from safetensors import safe_open
from test_checkpoint import assert_same, cast
from tiny import random_gates, tiny_batch, tiny_model

from jaxprune.bundled import bundled_model
from jaxprune.checkpoints.folder import load, opened, opened_digest, save, saved_digest
from jaxprune.checkpoints.gates import GATES, METADATA
from jaxprune.checkpoints.shared import add_gates, load_gates, save_shared
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.compaction import compact
from jaxprune.models import Model
from jaxprune.pruning.selection import pruning_record, select
from jaxprune.units import Gates, Params, mean_shapes, open_gates, widths

ALL = ("channels", "query_channels", "neurons")


def gates_of(model: Model, params: Params, seed: int = 0, kinds: tuple[str, ...] = ("heads", "neurons")) -> Gates:
    """Random gates; no unit stays in the first attention, all stay in the last FFN, and one site is not named."""
    gates = random_gates(model, params, seed, kinds=kinds)
    names = list(gates)
    gates[names[0]] = jnp.zeros_like(gates[names[0]])
    gates[names[-1]] = jnp.ones_like(gates[names[-1]])
    del gates[names[1]]
    return gates


def means_of(model: Model, params: Params, gates: Gates, seed: int = 0) -> Gates:
    random = np.random.default_rng(seed)
    shapes = mean_shapes(model.axes, params)
    return {name: jnp.asarray(random.standard_normal(shapes[name]), jnp.float32) for name in gates if name in shapes}


def make(folder: Path, model_type: str = "bert", **how: Any) -> tuple[Path, Model, Params, dict[str, Gates]]:
    """A shared folder with the tasks "mood" and "topic"."""
    model, params = tiny_model(model_type)
    gates = {task: gates_of(model, params, seed) for seed, task in enumerate(("mood", "topic"))}
    return save_shared(folder / "shared", model, params, gates, **how), model, params, gates


def same_gates(found: Gates, wanted: Gates, model: Model, params: Params) -> None:
    """Equal gates, where a site that is not named is open."""
    whole = open_gates(model, params, tuple({name.rpartition(".")[2] for name in {**found, **wanted}}))
    for name in whole:
        np.testing.assert_array_equal(found.get(name, whole[name]), wanted.get(name, whole[name]))


# Slicing at load


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [(name, kinds) for name in ("bert", "t5") for kinds in (("heads", "neurons"), ALL, ("query_channels",))]
    + [(name, ("heads", "neurons")) for name in ("roberta", "distilbert", "mt5")],
)
def test_slicing_at_load_equals_compaction(tmp_path, model_type, kinds):
    model, params = tiny_model(model_type)
    gates = gates_of(model, params, 1, kinds)
    path = save_shared(tmp_path / "shared", model, params, {"mood": gates, "dense": {}})
    again, small = load(path, task="mood")
    assert again == model and again.source == path
    assert_same(small, compact(model, params, gates))
    assert_same(load(f"{path}#mood")[1], small)
    assert_same(load(path, task="dense")[1], params)
    assert_same(load(path)[1], params)


def test_heads_of_some_modules_and_channels_of_others(tmp_path):
    model, params = tiny_model()
    gates = random_gates(model, params, 2, kinds=("heads", "neurons", "channels", "query_channels"))
    for name in ("0.attention.heads", "1.attention.channels", "1.attention.query_channels"):
        del gates[name]
    path = save_shared(tmp_path / "shared", model, params, {"mood": gates})
    assert_same(load(path, task="mood")[1], compact(model, params, gates))


def test_heads_that_keep_other_numbers_of_channels(tmp_path):
    """Closed channels that stay because another head has more are zero, with the sign that compaction gives them."""
    model, params = tiny_model()
    gate = jnp.asarray([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], jnp.float32).reshape(-1)
    gates = {"0.attention.channels": gate, "1.attention.query_channels": gate}
    path = save_shared(tmp_path / "shared", model, params, {"mood": gates})
    assert_same(load(path, task="mood")[1], compact(model, params, gates))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", None])
def test_slicing_at_load_equals_compaction_whatever_the_types(tmp_path, stored, asked):
    model, params = tiny_model()
    gates = gates_of(model, params)
    means = means_of(model, params, gates)
    path = save_shared(tmp_path / "shared", model, params, {"a": gates}, means={"a": means}, dtype=stored)
    assert_same(load(path, task="a", dtype=asked)[1], compact(model, load(path, dtype=asked)[1], gates, means))


@pytest.mark.parametrize("kinds", [("heads", "neurons"), ALL])
def test_means_of_closed_units_are_folded_in_as_by_compaction(tmp_path, kinds):
    model, params = tiny_model()
    gates = gates_of(model, params, 3, kinds)
    means = means_of(model, params, gates)
    some = dict(list(means.items())[1:])
    path = save_shared(
        tmp_path / "shared", model, params, {"all": gates, "some": gates}, means={"all": means, "some": some}
    )
    assert_same(load(path, task="all")[1], compact(model, params, gates, means))
    assert_same(load(path, task="some")[1], compact(model, params, gates, some))
    found = load_gates(path)["all"]
    assert found.means is not None
    assert_same(compact(model, params, found.gates, found.means), load(path, task="all")[1])


def test_the_gates_themselves_can_be_read_and_used_with_the_dense_model(tmp_path):
    path, model, params, gates = make(tmp_path)
    found = load_gates(path)
    assert list(found) == ["mood", "topic"] and found["mood"].means is None
    for task, own in gates.items():
        same_gates(found[task].gates, own, model, params)
    batch = tiny_batch(model)
    gated = np.asarray(model.apply(params, batch, found["mood"].gates).logits)
    sliced = np.asarray(model.apply(load(path, task="mood")[1], batch).logits)
    np.testing.assert_allclose(sliced, gated, atol=2e-5)  # sums in another order


# The file


@pytest.mark.slow
def test_a_task_of_the_bundled_model_takes_about_a_kilobyte(tmp_path):
    model, params = load(bundled_model())
    scores = {
        name: np.random.default_rng(i).random(units)
        for i, (name, units) in enumerate(widths(model.axes, params).items())
    }
    how = {"flops": 0.5, "length": 128, "allocation": "per_layer", "multiple_of": {"neurons": 8}}
    gates = select(model, params, scores, **chosen(**how))
    records = {task: pruning_record(scores, gates, **chosen(**how)) for task in ("sst2", "mrpc")}
    path = save_shared(tmp_path / "one", model, params, {"sst2": gates}, records={"sst2": records["sst2"]})
    one = (path / GATES).stat().st_size
    add_gates(path, {"mrpc": gates}, records={"mrpc": records["mrpc"]})
    with safe_open(path / GATES, "np") as file:  # other programs read it
        bits = file.get_tensor("gates:sst2")
    assert bits.nbytes == (72 + 9216) // 8 == 1161
    assert one < 2200 and (path / GATES).stat().st_size - one < 1900
    whole = np.concatenate([np.asarray(gates[name]) for name in widths(model.axes, params)])
    np.testing.assert_array_equal(np.unpackbits(bits, bitorder="little"), whole)


def test_the_same_tasks_give_the_same_bytes(tmp_path):
    path, model, params, gates = make(tmp_path)
    other = save_shared(tmp_path / "other", model, params, {"topic": gates["topic"]})
    add_gates(other, {"mood": gates["mood"]})
    assert (other / GATES).read_bytes() == (path / GATES).read_bytes()


def test_the_digest_is_that_of_the_model_as_it_is_loaded(tmp_path):
    model, params = tiny_model()
    for dtype in (None, "float16", "bfloat16"):
        path = save_shared(tmp_path / str(dtype), model, params, {"a": {}}, dtype=dtype)
        wanted = model_digest(*load(path))
        assert saved_digest(model, params, dtype) == wanted
        with opened(path) as found:
            assert opened_digest(found) == wanted
            assert opened_digest(found, None) == model_digest(*load(path, dtype=None))
        assert (wanted == model_digest(model, params)) == (dtype is None)


def test_a_shared_folder_is_an_ordinary_model_folder(tmp_path):
    path, model, params, _ = make(tmp_path)
    plain = save(tmp_path / "plain", model, params)
    assert (path / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    config = json.loads((path / "config.json").read_text())
    assert config["jaxprune"]["files"] == sorted(file.name for file in path.iterdir())
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_shared(path, model, params, {"mood": {}})
    assert list(load_gates(path)) == ["mood", "topic"]
    save_shared(path, model, params, {"other": {}}, overwrite=True)
    assert list(load_gates(path)) == ["other"]
    small = save(tmp_path / "small", *load(path, task="other"))  # a folder of its own again
    assert not (small / GATES).exists()
    (path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"not saved with the model: \['mine.txt'\]"):
        save_shared(path, model, params, {"other": {}}, overwrite=True)


def test_a_folder_with_a_hash_in_its_name_is_a_folder(tmp_path):
    model, params = tiny_model()
    save(tmp_path / "a#mood", model, params)
    assert_same(load(str(tmp_path / "a#mood"))[1], params)


# Adding tasks


def test_adding_a_task_keeps_the_others_bit_exact(tmp_path):
    path, model, params, gates = make(tmp_path)
    before = {task: load(path, task=task)[1] for task in gates}
    weights = (path / "model.safetensors").stat()
    new = gates_of(model, params, 7, ALL)
    add_gates(path, {"new": new}, means={"new": means_of(model, params, new)}, records={"new": {"seed": 7}})
    for task, own in before.items():
        assert_same(load(path, task=task)[1], own)
    assert_same(load(path, task="new")[1], compact(model, params, new, means_of(model, params, new)))
    after = (path / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns)
    assert load_gates(path)["new"].record == {"seed": 7}


def test_a_task_is_replaced_only_if_asked(tmp_path):
    path, model, params, gates = make(tmp_path)
    whole = (path / GATES).read_bytes()
    with pytest.raises(FileExistsError, match="has gates of mood already: replace them with --overwrite"):
        add_gates(path, {"mood": gates["topic"], "new": gates["topic"]})
    assert (path / GATES).read_bytes() == whole
    add_gates(path, {"mood": gates["topic"]}, overwrite=True)
    assert_same(load(path, task="mood")[1], compact(model, params, gates["topic"]))


def test_tasks_that_are_added_at_once_are_all_there(tmp_path):
    path, *_ = make(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: add_gates(path, {f"task {i}": {}}), range(8)))
    assert list(load_gates(path)) == ["mood", *(f"task {i}" for i in range(8)), "topic"]


ADDER = """
import itertools, sys
import jaxprune as jp
gates = {task: own.gates for task, own in jp.load_gates(sys.argv[1]).items()}
print("ready", flush=True)
for one, other in itertools.cycle((("mood", "topic"), ("topic", "mood"))):
    jp.add_gates(sys.argv[1], {"mood": gates[one], "topic": gates[other]}, overwrite=True)
"""


@pytest.mark.slow
def test_kill_9_while_a_task_is_added_leaves_the_old_gates_or_the_new_ones(tmp_path):
    path, model, params, _ = make(tmp_path)
    (path / f".{GATES}.saving-0123abcd").touch()  # as of one that was killed before
    old = [jax.tree.map(np.asarray, load(path, task=task)[1]) for task in ("mood", "topic")]
    adder = subprocess.Popen([sys.executable, "-c", ADDER, str(path)], stdout=subprocess.PIPE)
    assert adder.stdout is not None and adder.stdout.readline() == b"ready\n"
    time.sleep(random.Random(0).uniform(0.05, 0.2))
    adder.send_signal(signal.SIGKILL)
    adder.communicate()
    found = [load(path, task=task)[1] for task in ("mood", "topic")]
    swapped = model_digest(model, found[0]) != model_digest(model, old[0])
    for ours, theirs in zip(found, old[::-1] if swapped else old, strict=True):
        assert_same(ours, theirs)
    (path / f".{GATES}.saving-0123abcd").touch()
    save_shared(path, model, params, {"mood": {}}, overwrite=True)  # what was left behind is nobody's
    assert sorted(file.name for file in path.iterdir()) == ["config.json", GATES, "model.safetensors"]


FULL = """
import resource, sys
import jaxprune as jp
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # bytes; the gates have more
try:
    jp.add_gates(sys.argv[1], {"new": {}})
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
def test_a_disk_without_room_leaves_the_old_gates_and_nothing_else(tmp_path):
    path, *_ = make(tmp_path)
    whole, names = (path / GATES).read_bytes(), sorted(path.iterdir())
    run = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert "File too large" in run.stdout and GATES in run.stdout
    assert (path / GATES).read_bytes() == whole and sorted(path.iterdir()) == names


# What is refused


def test_an_unknown_task_names_those_there_are(tmp_path):
    path, *_ = make(tmp_path)
    with pytest.raises(ValueError, match=r"has no task 'moods'; it has: mood, topic. Did you mean 'mood'\?"):
        load(path, task="moods")
    with pytest.raises(ValueError, match=r"has no task ''; it has: mood, topic.$"):
        load(f"{path}#")


def test_a_folder_without_gates_has_no_tasks(tmp_path):
    model, params = tiny_model()
    path = save(tmp_path / "plain", model, params)
    for ask in (lambda: load(path, task="mood"), lambda: add_gates(path, {"mood": {}}), lambda: load_gates(path)):
        with pytest.raises(FileNotFoundError, match=r"plain is not a shared folder: .*`jaxprune share`"):
            ask()
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        load(f"{tmp_path / 'absent'}#mood")
    assert not (tmp_path / "absent").exists()


def test_gates_of_other_weights_are_refused(tmp_path):
    path, *_ = make(tmp_path)
    other = save(tmp_path / "other", *tiny_model(seed=1))
    (path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    for ask in (lambda: load(path, task="mood"), lambda: add_gates(path, {"new": {}}), lambda: load_gates(path)):
        with pytest.raises(
            ValueError, match=f"{GATES} belongs to another model: its gates were made for [0-9a-f]{{12}}"
        ):
            ask()
    load(path)  # the dense model is whole
    narrow, params = tiny_model(neurons=24)
    save_shared(tmp_path / "narrow", narrow, params, {"mood": {"0.ffn.neurons": jnp.zeros(24)}})
    (tmp_path / "narrow" / GATES).rename(path / GATES)
    with pytest.raises(
        ValueError, match=r"'mood' in .* do not fit the weights: they are for 48 neurons.* which has 64"
    ):
        load(path, task="mood")


def test_gates_beside_weights_that_jaxprune_did_not_save_are_refused(tmp_path):
    path, *_ = make(tmp_path)
    foreign = write_classifier(tmp_path / "hf")
    (path / GATES).rename(foreign / GATES)
    with pytest.raises(ValueError, match=r"not the weights of a folder that jaxprune saved|do not fit the weights"):
        load(foreign, task="mood")


@pytest.mark.parametrize(
    ("gates", "means", "message"),
    [
        ({"0.ffn.neurons": np.full(32, 0.5)}, {}, "neither 0 nor 1: 0.ffn.neurons holds 0.5"),
        ({"0.ffn.neurons": np.full(32, np.nan)}, {}, "neither 0 nor 1: 0.ffn.neurons holds nan"),
        ({"0.ffn.neurons": np.ones((2, 32))}, {}, "one row per example: 0.ffn.neurons"),
        (
            {"0.ffn.neurons": np.ones(31), "9.ffn.neurons": np.ones(3)},
            {},
            "31 gates for 32 units; 9.ffn.neurons is not",
        ),
        ({"0.attention.heads": np.ones(4), "0.attention.channels": np.ones(16)}, {}, "cannot be gated together"),
        ({"0.ffn.neurons": np.zeros(32)}, {"0.ffn.neurons": np.ones(3)}, r"has shape \(3,\), expected \(32,\)"),
        ({"0.ffn.neurons": np.zeros(32)}, {"0.ffn.neurons": np.full(32, np.inf)}, "not finite: 0.ffn.neurons"),
    ],
)
def test_gates_that_cannot_be_shared_are_refused(tmp_path, gates, means, message):
    model, params = tiny_model()
    with pytest.raises(ValueError, match=f"^task 'mood': .*{message}"):
        save_shared(tmp_path / "shared", model, params, {"mood": gates}, means={"mood": means})
    assert not list(tmp_path.iterdir())


def test_means_need_a_bias(tmp_path):
    model, params = tiny_model("t5")
    gates = gates_of(model, params)
    with pytest.raises(ValueError, match=r"task 'mood': .* means of .* have nowhere to go: .* has no bias"):
        save_shared(tmp_path / "a", model, params, {"mood": gates}, means={"mood": means_of(model, params, gates)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["", "a#b", "a\nb", "a\x00", "\ud800"])
def test_names_that_cannot_be_asked_for_are_refused(tmp_path, task):
    model, params = tiny_model()
    with pytest.raises(ValueError, match=r"the task's name .* must have at least one letter"):
        save_shared(tmp_path / "a", model, params, {task: {}})
    assert not list(tmp_path.iterdir())


def test_any_other_name_is_kept(tmp_path):
    model, params = tiny_model()
    names = ("__metadata__", "gates:a", "größe 2", "a/b", "means:gates:a", " ", "x" * 300)
    gates = {task: gates_of(model, params, i) for i, task in enumerate(names)}
    path = save_shared(tmp_path / "a", model, params, gates)
    assert list(load_gates(path)) == sorted(names)
    assert_same(load(path, task="gates:a")[1], compact(model, params, gates["gates:a"]))


def test_no_task_at_all_is_refused(tmp_path):
    model, params = tiny_model()
    with pytest.raises(ValueError, match="at least one task, got none"):
        save_shared(tmp_path / "a", model, params, {})
    with pytest.raises(ValueError, match="tasks without gates: other, topic"):
        save_shared(tmp_path / "a", model, params, {"mood": {}}, records={"topic": {}}, means={"other": None})


def test_a_record_that_gates_do_not_tell_is_refused(tmp_path):
    path, model, params, gates = make(tmp_path)
    own = {"scores": {"model": model_digest(model, params)}, "digests": {"scores": "0", "means": None}}
    add_gates(path, {"fits": gates["mood"]}, records={"fits": own})
    with pytest.raises(TypeError, match=r"^task 'new': .* not JSON"):
        add_gates(path, {"new": {}}, records={"new": {"a": {1}}})
    for record, message in (
        ({"seed": float("inf")}, "^task 'new': .* not JSON"),
        ({"recovery": {"method": {}}}, "'new' was repaired after pruning.*a folder of its own"),
        ({"scores": {"model": "0123456789abcdef"}}, r"made with another model \(0123456789ab\)"),
        (own | {"digests": {"means": "0"}}, "replaced by means: give them, too"),
    ):
        with pytest.raises(ValueError, match=message):
            add_gates(path, {"new": gates["mood"]}, records={"new": record})
        with pytest.raises(ValueError, match=message):
            save_shared(tmp_path / "new", model, params, {"new": gates["mood"]}, records={"new": record})
    assert list(load_gates(path)) == ["fits", "mood", "topic"] and not (tmp_path / "new").exists()


def test_half_precision_weights_know_scores_of_both_types(tmp_path):
    model, params = tiny_model()
    path = save_shared(tmp_path / "a", model, params, {"a": {}}, dtype="bfloat16")
    for i, dtype in enumerate(("float32", None)):
        record = {"scores": {"model": model_digest(*load(path, dtype=dtype))}}
        add_gates(path, {str(i): {}}, records={str(i): record})
    with pytest.raises(ValueError, match="made with another model"):
        add_gates(path, {"b": {}}, records={"b": {"scores": {"model": model_digest(model, cast(params, "float16"))}}})


# Damaged files


def header_of(file: Path) -> dict[str, Any]:
    return json.loads(split(file.read_bytes())[0])


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the description of the gates in the metadata."""
    text, data = split(file.read_bytes())
    header = json.loads(text)
    own = json.loads(header["__metadata__"][METADATA])
    change(own)
    header["__metadata__"][METADATA] = json.dumps(own)
    file.write_bytes(safetensors_bytes(header, data))


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer format": (lambda own: own.update(format=2), "its format is 2, this version of jaxprune reads 1"),
    "no format": (lambda own: own.pop("format"), "its format is None"),
    "more than is known": (lambda own: own.update(sparsity=1), "sparsity is unknown, expected format, model, tasks"),
    "no tasks": (lambda own: own.update(tasks=[]), r"tasks is \[\], expected an object"),
    "other model": (lambda own: own.update(model="0" * 64), "'mood' are not those that were written.*'topic' are not"),
    "task without fields": (
        lambda own: own["tasks"].update(mood={}),
        "tasks.mood.kinds is missing; tasks.mood.units is missing; .*tasks.mood.checksum is missing",
    ),
    "kinds": (
        lambda own: own["tasks"]["mood"].update(kinds=["layers"]),
        r"tasks.mood.kinds\[0\] is 'layers', expected text such as heads\|",
    ),
    "order of kinds": (lambda own: own["tasks"]["mood"].update(kinds=["neurons", "heads"]), "kinds"),
    "units": (lambda own: own["tasks"]["mood"].update(units=True), "tasks.mood.units is True, expected a count"),
    "other units": (lambda own: own["tasks"]["mood"].update(units=71), "'mood' are not those that were written"),
    "other record": (lambda own: own["tasks"]["mood"].update(record={"a": 1}), "'mood' are not those that were"),
    "record with NaN": (lambda own: own["tasks"]["mood"].update(record={"a": float("nan")}), "not JSON"),
    "means": (lambda own: own["tasks"]["mood"].update(means=[3]), r"mood.means\[0\] is 3, expected text"),
    "means that are not there": (lambda own: own["tasks"]["mood"].update(means=[]), "means:mood is in its header"),
    "gone": (lambda own: own["tasks"].pop("mood"), "gates:mood is not in its header"),
    "renamed": (
        lambda own: own["tasks"].update(mode=own["tasks"].pop("mood")),
        "gates:mode is in its header and not in its tensors; gates:mood is not in its header",
    ),
    "swapped": (
        lambda own: own.update(tasks=dict(zip(own["tasks"], reversed(own["tasks"].values()), strict=True))),
        "'mood' are not those that were written",
    ),
}


@pytest.mark.parametrize("damage", EDITS)
def test_a_description_that_is_not_understood_is_refused(tmp_path, damage):
    path, *_ = make(tmp_path)
    change, message = EDITS[damage]
    edit(path / GATES, change)
    whole = (path / GATES).read_bytes()
    for ask in (lambda: load(path, task="topic"), lambda: add_gates(path, {"new": {}})):
        with pytest.raises(ValueError, match=message) as error:
            ask()
        assert str(error.value).startswith(f"{path / GATES} cannot be used: ")
        assert str(error.value).endswith(". Share the tasks again.")
    assert (path / GATES).read_bytes() == whole


def test_a_damaged_file_of_gates_is_refused(tmp_path):
    path, *_ = make(tmp_path)
    file = path / GATES
    whole = file.read_bytes()
    text, data = split(whole)
    header = header_of(file)
    first = header["gates:mood"]["data_offsets"]
    assert first == [0, 9]  # 2 x (4 + 32) units
    flipped = bytearray(data)
    flipped[3] ^= 4
    narrow = header | {"gates:mood": {"dtype": "U8", "shape": [3, 3], "data_offsets": first}}
    other = header | {"gates:mood": {"dtype": "I8", "shape": [9], "data_offsets": first}}
    for content, message in (
        (whole[:-1], "not a complete safetensors file"),
        (b"", "only 0 bytes"),
        (safetensors_bytes(text, bytes(flipped)), "'mood' are not those that were written: their checksum is another"),
        (safetensors_bytes(narrow, data), r"gates:mood is U8 of shape \[3, 3\], expected U8 with one axis"),
        (safetensors_bytes(other, data), "gates:mood is I8"),
        (safetensors_bytes({**header, "__metadata__": {}}, data), "it holds no gates"),
        ((path / "model.safetensors").read_bytes(), "it holds no gates"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load(path, task="topic")
        assert str(file) in str(error.value)


def test_weights_that_changed_only_where_the_task_has_no_units_are_refused(tmp_path):
    model, params = tiny_model()
    path = save_shared(tmp_path / "a", model, params, {"none": {"0.ffn.neurons": jnp.zeros(32)}})
    with opened(path) as found:
        start = next(own.source.entry.start for own in found.parameters if own.source.name == "layers.0.ffn.up.bias")
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[start] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="belongs to another model"):
        load(path, task="none")

"""Law 6: save then load is bit-exact, and load refuses what it does not know, in one error that lists everything."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    LABELS,
    PREFIX,
    classifier_config,
    classifier_tensors,
    safetensors_bytes,
    write_checkpoint,
    write_classifier,
)
from safetensors.numpy import load_file, save_file
from tiny import MODEL_TYPES, tiny_batch, tiny_config, tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import read_pruning
from jaxprune.checkpoints.tensors import model_digest, params_digest
from jaxprune.compaction import compact
from jaxprune.models import Model, TaskHead
from jaxprune.models.tokenizers import TOKENIZER_FILES
from jaxprune.units import Params, axes_of, flatten, open_gates, path_name, unflatten, widths

HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(jnp.bfloat16)}


def uneven(model: Model, params: Params) -> Params:
    """Other widths in every layer: no heads in the first, no neurons in the second."""
    gates = {name: np.ones(gate.shape, np.float32) for name, gate in open_gates(model, params).items()}
    gates["0.attention.heads"][:] = 0
    gates["0.ffn.neurons"][::3] = 0
    gates["1.attention.heads"][1] = 0
    gates["1.ffn.neurons"][:] = 0
    return compact(model, params, {name: jnp.asarray(gate) for name, gate in gates.items()})


def cast(params: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda a: a.astype(dtype), params)


def assert_same(found: Params, expected: Params) -> None:
    """Equal names, shapes, types and bits."""
    ours, theirs = flatten(found), flatten(expected)
    assert list(ours) == list(theirs)
    for path, array in ours.items():
        assert (array.shape, array.dtype) == (theirs[path].shape, theirs[path].dtype), path
        assert np.asarray(array).tobytes() == np.asarray(theirs[path]).tobytes(), path


# Law 6, first half


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", ["dense", "uneven"])
def test_save_then_load_is_bit_exact(tmp_path, model_type, dtype, shape):
    model, params = tiny_model(model_type)
    params = cast(uneven(model, params) if shape == "uneven" else params, dtype)
    again, found = load(save(tmp_path / "out", model, params), dtype=None)
    assert again == model and hash(again) == hash(model)
    assert_same(found, params)
    _, single = load(tmp_path / "out")  # the default is float32, whatever the file holds: a widening loses nothing
    assert_same(single, cast(params, jnp.float32))


def test_a_pruned_model_computes_the_same_after_loading(tmp_path):
    model, params = tiny_model()
    small = uneven(model, params)
    again, found = load(save(tmp_path / "out", model, small))
    batch = tiny_batch(model)
    expected, logits = model.apply(small, batch).logits, again.apply(found, batch).logits
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(expected))


def test_several_heads_and_their_settings_are_kept(tmp_path):
    heads = (
        TaskHead(name="sst2", labels=("bad", "good"), dense="tanh"),
        TaskHead(name="stsb", labels=("score",), regression=True, pooling="mean"),
    )
    model, params = tiny_model(heads=heads)
    again, found = load(save(tmp_path / "out", model, params))
    assert again.heads == ("sst2", "stsb") and again.head("stsb") == heads[1]
    assert again == model
    assert_same(found, params)


def test_an_encoder_without_heads_can_be_saved(tmp_path):
    model, params = tiny_model(heads=())
    again, found = load(save(tmp_path / "out", model, params))
    assert again.heads == ()
    assert_same(found, params)


def test_arrays_of_different_types_keep_theirs_and_stay_aligned(tmp_path):
    model, params = tiny_model()
    params["heads"] = cast(params["heads"], jnp.bfloat16)  # three biases: six bytes, after which float32 is not aligned
    _, found = load(save(tmp_path / "out", model, params), dtype=None)
    assert_same(found, params)
    header, _ = header_and_data((tmp_path / "out" / "model.safetensors").read_bytes())
    size = {"F32": 4, "BF16": 2}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert all(entry["data_offsets"][0] % size[entry["dtype"]] == 0 for entry in entries)


def test_half_precision_files_are_half_as_large_and_stay_the_same(tmp_path):
    model, params = tiny_model()
    full = save(tmp_path / "full", model, params) / "model.safetensors"
    half = save(tmp_path / "half", model, params, dtype=jnp.float16) / "model.safetensors"
    assert half.stat().st_size < 0.6 * full.stat().st_size
    _, once = load(tmp_path / "half")
    assert_same(once, cast(cast(params, jnp.float16), jnp.float32))
    save(tmp_path / "again", model, once, dtype=jnp.float16)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == half.read_bytes()


def test_other_programs_read_our_files(tmp_path):
    model, params = tiny_model()
    small = uneven(model, params)
    save(tmp_path / "out", model, small)
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {path_name(path): array for path, array in flatten(small).items()}
    assert sorted(found) == sorted(expected)
    assert found["layers.0.attention.query.kernel"].shape == (16, 0, 4)
    for name, array in found.items():
        np.testing.assert_array_equal(array, np.asarray(expected[name]))


def test_parameters_do_not_share_memory_with_the_file(tmp_path):
    model, params = tiny_model()
    _, found = load(save(tmp_path / "out", model, params))
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert_same(found, params)


def test_layers_come_back_in_the_order_of_their_numbers(tmp_path):
    model, params = tiny_model(layers=11)
    _, found = load(save(tmp_path / "out", model, params))
    assert list(found["layers"]) == list(range(11))  # as names, 10 would come before 2
    assert_same(found, params)


@pytest.mark.filterwarnings("ignore:no tokenizer could be read")  # it is tried where transformers is imported already
def test_the_tokenizer_is_copied_byte_by_byte(tmp_path):
    source = write_classifier(tmp_path / "hf")
    for name in ("vocab.txt", "tokenizer_config.json", "training_args.bin", "README.md"):
        (source / name).write_bytes(b"\x00 " + name.encode() + b"\r\n")
    model, params = load(source)
    out = save(tmp_path / "out", model, params)
    files = {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == files
    assert (out / "vocab.txt").read_bytes() == (source / "vocab.txt").read_bytes()
    assert load(out)[0].source == out
    assert "tokenizer.json" in TOKENIZER_FILES


def test_the_configuration_is_kept_as_it_was_read(tmp_path):
    config = classifier_config("roberta") | {"_name_or_path": "somebody/model", "transformers_version": "4.8.2"}
    source = write_checkpoint(tmp_path / "hf", config, classifier_tensors(config))
    out = save(tmp_path / "out", *load(source))
    content = json.loads((out / "config.json").read_text())
    section = content.pop("jaxprune")
    assert content == config | {"model_type": "jaxprune"}
    assert section == {
        "format": 1,
        "model_type": "roberta",
        "dtype": "float32",
        "heads": [
            {"name": "default", "labels": list(LABELS), "regression": False, "pooling": "first", "dense": "tanh"}
        ],
        "files": ["config.json", "model.safetensors"],
    }


@pytest.mark.slow
def test_saving_and_loading_do_not_import_transformers(tmp_path):
    source = write_classifier(tmp_path / "hf")
    code = (
        f"import sys, jaxprune as jp; jp.save({str(tmp_path / 'out')!r}, *jp.load({str(source)!r}))\n"
        "sys.exit(bool({'transformers', 'datasets', 'huggingface_hub', 'torch'} & set(sys.modules)))"
    )
    run_python(code)


# Hugging Face checkpoints


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_weight_arrives_in_its_place(tmp_path, model_type):
    config = classifier_config(model_type)
    tensors = classifier_tensors(config)
    model, params = load(write_checkpoint(tmp_path / "hf", config, tensors))
    theirs = {name.removeprefix(PREFIX[model_type]): tensor for name, tensor in tensors.items()}
    assert sum(a.size for a in flatten(params).values()) == sum(a.size for a in tensors.values())
    distil = model_type == "distilbert"
    layer = "transformer.layer.1." if distil else "encoder.layer.1."
    own, head_dim = params["layers"][1], 4

    def equal(ours: jax.Array, expected: np.ndarray) -> None:
        np.testing.assert_array_equal(np.asarray(ours), expected)

    attention = {"query": "q_lin", "key": "k_lin", "value": "v_lin"} if distil else {n: n for n in ("query", "key")}
    for ours, name in attention.items():
        name = f"{layer}attention.{name}" if distil else f"{layer}attention.self.{name}"
        for head in range(4):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            equal(own["attention"][ours]["kernel"][:, head], theirs[f"{name}.weight"][rows].T)
            equal(own["attention"][ours]["bias"][head], theirs[f"{name}.bias"][rows])
    out = theirs[f"{layer}attention.{'out_lin' if distil else 'output.dense'}.weight"]
    for head in range(4):
        equal(own["attention"]["out"]["kernel"][head], out[:, head * head_dim : (head + 1) * head_dim].T)
    equal(own["ffn"]["up"]["kernel"], theirs[f"{layer}{'ffn.lin1' if distil else 'intermediate.dense'}.weight"].T)
    equal(own["ffn"]["down"]["kernel"], theirs[f"{layer}{'ffn.lin2' if distil else 'output.dense'}.weight"].T)
    equal(own["ffn"]["norm"]["scale"], theirs[f"{layer}{'output_layer_norm' if distil else 'output.LayerNorm'}.weight"])
    equal(
        own["attention"]["norm"]["bias"],
        theirs[f"{layer}{'sa_layer_norm' if distil else 'attention.output.LayerNorm'}.bias"],
    )
    equal(params["embeddings"]["word"]["embedding"], theirs["embeddings.word_embeddings.weight"])
    head = params["heads"]["default"]
    dense, logits = {"bert": ("pooler.dense", "classifier"), "distilbert": ("pre_classifier", "classifier")}.get(
        model_type, ("classifier.dense", "classifier.out_proj")
    )
    equal(head["dense"]["kernel"], theirs[f"{dense}.weight"].T)
    equal(head["out"]["kernel"], theirs[f"{logits}.weight"].T)
    assert model.head().labels == LABELS


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_checkpoints_load_as_float32(tmp_path, kind):
    config = classifier_config("bert")
    half = {name: tensor.astype(HALF[kind]) for name, tensor in classifier_tensors(config).items()}
    single = {name: tensor.astype(np.float32) for name, tensor in half.items()}
    _, expected = load(write_checkpoint(tmp_path / "single", config, single))
    source = write_checkpoint(tmp_path / "half", config, half)
    assert_same(load(source)[1], expected)
    assert_same(load(source, dtype=None)[1], cast(expected, kind))
    assert_same(load(source, dtype=kind)[1], cast(expected, kind))


def test_a_big_tensor_is_read_in_slices(tmp_path):
    config = classifier_config("bert", vocab=20_011)  # 20,011 rows of 16 float32: more than one slice of 1 MiB
    tensors = classifier_tensors(config)
    _, params = load(write_checkpoint(tmp_path / "hf", config, tensors))
    words = tensors["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(np.asarray(params["embeddings"]["word"]["embedding"]), words)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_base_prefix_is_optional(tmp_path, model_type):
    config = classifier_config(model_type)
    with_prefix = write_checkpoint(tmp_path / "with", config, classifier_tensors(config))
    without = write_checkpoint(tmp_path / "without", config, classifier_tensors(config, prefix=False))
    assert_same(load(without)[1], load(with_prefix)[1])


def test_sharded_checkpoints_load_like_single_ones(tmp_path):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    single = write_checkpoint(tmp_path / "single", config, tensors)
    sharded = write_checkpoint(tmp_path / "sharded", config, tensors, shards=3)
    assert_same(load(sharded)[1], load(single)[1])


def test_legacy_norm_names_load_like_todays(tmp_path):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert sum("gamma" in name for name in legacy) == 5
    expected = load(write_checkpoint(tmp_path / "today", config, tensors))[1]
    assert_same(load(write_checkpoint(tmp_path / "legacy", config, legacy))[1], expected)


def test_what_is_known_to_be_no_part_of_the_model_is_left_out(tmp_path):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    expected = load(write_checkpoint(tmp_path / "plain", config, tensors))[1]
    tensors["bert.embeddings.position_ids"] = np.arange(64, dtype=np.int64)[None]
    assert_same(load(write_checkpoint(tmp_path / "more", config, tensors))[1], expected)
    tensors["cls.predictions.bias"] = np.full(60, np.nan, np.float32)  # never read
    with pytest.warns(UserWarning, match=r"^1 tensors of .*head are no part of the model: cls\.predictions\.bias\.$"):
        assert_same(load(write_checkpoint(tmp_path / "head", config, tensors))[1], expected)


def test_a_bare_encoder_loads_without_its_pooler(tmp_path):
    config = tiny_config("bert") | {"architectures": ["BertModel"]}
    tensors = classifier_tensors(config, prefix=False)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    with pytest.warns(UserWarning, match=r"no part of the model: pooler\.dense\.bias, pooler\.dense\.weight"):
        model, params = load(write_checkpoint(tmp_path / "hf", config, tensors))
    assert model.heads == () and "heads" not in params


def test_tensors_that_a_model_does_not_need_are_named_and_left_out(tmp_path):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    expected = load(write_checkpoint(tmp_path / "plain", config, tensors))[1]
    more = {"loss_fct.weight": np.ones(3, np.float32), "bert.embeddings.token_type_ids": np.zeros(4, np.int64)}
    with pytest.warns(UserWarning, match=r"^2 tensors of .*more are no part of the model: .*loss_fct\.weight"):
        params = load(write_checkpoint(tmp_path / "more", config, tensors | more))[1]
    assert_same(params, expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_names_are_recognised(tmp_path, prefix):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    expected = load(write_checkpoint(tmp_path / "plain", config, tensors))[1]
    wrapped = write_checkpoint(tmp_path / "wrapped", config, {prefix + name: t for name, t in tensors.items()})
    with pytest.warns(UserWarning, match=f"are read without '{prefix}'"):
        assert_same(load(wrapped)[1], expected)


# Law 6, second half


def test_load_refuses_what_it_does_not_know(tmp_path):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    del tensors["bert.encoder.layer.0.output.dense.weight"], tensors["classifier.bias"]
    tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(16, np.float32)
    tensors["adapter.weight"] = np.zeros(3, np.float32)
    tensors["embeddings.LayerNorm.bias"] = np.zeros(16, np.float32)
    tensors["bert.pooler.dense.weight"] = np.zeros((16, 15), np.float32)
    tensors["bert.pooler.dense.bias"] = np.zeros(16, np.float64)
    tensors["bert.encoder.layer.1.output.dense.bias"] = np.zeros(16, np.int32)
    with pytest.raises(ValueError) as error:
        load(write_checkpoint(tmp_path / "hf", config, tensors))
    text = str(error.value)
    assert text.startswith(f"the weights in {tmp_path / 'hf'} do not fit its config.json; ")
    unknown, missing, twice, shape, kind = text.partition("; ")[2].split("; ")
    assert unknown.startswith("unknown: ")
    assert unknown == "unknown: bert.encoder.layer.2.output.dense.bias"  # `adapter.weight` is no part of the model
    assert missing == "missing: encoder.layer.0.output.dense.weight, classifier.bias"
    assert "embeddings.LayerNorm.bias" in twice and "bert.embeddings.LayerNorm.bias" in twice
    assert shape == "wrong shape: bert.pooler.dense.weight is [16, 15], expected [16, 16]"
    assert "bert.pooler.dense.bias is F64, expected F32, F16, BF16" in kind
    assert "bert.encoder.layer.1.output.dense.bias is I32" in kind


def test_load_refuses_a_changed_own_file(tmp_path):
    model, params = tiny_model()
    file = save(tmp_path / "out", model, uneven(model, params)) / "model.safetensors"
    tensors = load_file(file)
    tensors["layers.0.ffn.up.gain"] = np.zeros(3, np.float32)
    del tensors["layers.0.attention.norm.scale"]
    tensors["layers.1.attention.key.bias"] = np.zeros((2, 4), np.float32)  # 3 heads are left
    tensors["layers.1.ffn.up.bias"] = np.zeros(33, np.float32)  # there were 32
    tensors["heads.task.out.bias"] = np.zeros(2, np.float32)
    tensors["embeddings.norm.bias"] = np.zeros(16, np.int8)
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        load(tmp_path / "out")
    for part in (
        "unknown: layers.0.ffn.up.gain; missing: layers.0.attention.norm.scale; wrong shape: ",
        "layers.1.ffn.up.bias is [33], expected [32] or fewer heads or neurons",
        "heads.task.out.bias is [2], expected [3]",
        "layers.1.attention has a different number of heads in its arrays",
        "'layers.1.attention.key.bias': 2",
        "wrong type: embeddings.norm.bias is I8, expected F32, F16, BF16",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("model_type", ["gpt2", None, 3, ["bert"]])
def test_load_refuses_other_model_types_and_lists_those_it_knows(tmp_path, model_type):
    config = classifier_config("bert")
    folder = write_checkpoint(tmp_path / "hf", config | {"model_type": model_type}, classifier_tensors(config))
    with pytest.raises(ValueError, match=r"config.json: model_type .* supported: bert, .*llama.* xlm-roberta"):
        load(folder)


def test_load_refuses_settings_that_change_what_is_computed(tmp_path):
    config = classifier_config("bert")
    wrong = config | {"position_embedding_type": "relative_key", "hidden_act": "mish"}
    with pytest.raises(ValueError, match=r"position_embedding_type is 'relative_key'.*hidden_act is 'mish'"):
        load(write_checkpoint(tmp_path / "hf", wrong, classifier_tensors(config)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_load_refuses_nan_and_infinity_and_names_every_tensor(tmp_path, value):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    for name in ("bert.encoder.layer.1.intermediate.dense.weight", "bert.embeddings.LayerNorm.weight"):
        tensors[name].reshape(-1)[7] = value
    with pytest.raises(ValueError, match="NaN or infinite") as error:
        load(write_checkpoint(tmp_path / "hf", config, tensors))
    assert "bert.encoder.layer.1.intermediate.dense.weight" in str(error.value)
    assert "bert.embeddings.LayerNorm.weight" in str(error.value)
    assert "query" not in str(error.value)


def test_values_that_do_not_fit_the_type_are_refused(tmp_path):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    tensors["classifier.bias"][0] = 1e6  # float16 ends at 65,504
    source = write_checkpoint(tmp_path / "hf", config, tensors)
    model, params = load(source)
    with pytest.raises(ValueError, match=r"too large for float16: classifier.bias"):
        load(source, dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"too large for the type: heads.default.out.bias"):
        save(tmp_path / "out", model, params, dtype=jnp.float16)
    assert not (tmp_path / "out").exists()
    load(source, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float64", "int8", jnp.int32])
def test_other_types_are_refused(tmp_path, dtype):
    model, params = tiny_model()
    folder = save(tmp_path / "out", model, params)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16, float16 or None, got"):
        load(folder, dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16, float16 or None, got"):
        save(tmp_path / "other", model, params, dtype=dtype)


# Damaged files


def header_and_data(file: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def shifted(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The header with other fields in its first tensor."""
    name = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    return header | {name: header[name] | changes}


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda file: b"", "only 0 bytes"),
    "short": (lambda file: file[:5], "only 5 bytes"),
    "cut in the header": (lambda file: file[:100], "truncated"),
    "cut in the data": (lambda file: file[:-1], "truncated or too long"),
    "longer": (lambda file: file + b"\0", "truncated or too long"),
    "header too large": (lambda file: (10**9).to_bytes(8, "little") + file[8:], "more than the 100000000 allowed"),
    "header of 2^63": (lambda file: (2**63).to_bytes(8, "little") + file[8:], "more than the 100000000 allowed"),
    "header of nothing": (lambda file: bytes(8) + file[8:], "not JSON"),
    "web page": (lambda file: b"<!DOCTYPE html><html>404</html>", "header claims"),
    "not JSON": (lambda file: safetensors_bytes(b"{" * 40), "not JSON"),
    "not text": (lambda file: safetensors_bytes(b"\xff\xfe" * 40), "not JSON"),
    "deep": (lambda file: safetensors_bytes(b"[" * 100_000), "not JSON"),
    "a list": (lambda file: safetensors_bytes([1, 2]), "not a JSON object"),
    "a number of 9999 digits": (lambda file: safetensors_bytes(b'{"a":' + b"9" * 9999 + b"}"), "digits"),
    "metadata": (lambda file: safetensors_bytes({"__metadata__": {"a": 1}}), "metadata are not strings"),
    "no fields": (lambda file: safetensors_bytes({"a": {"dtype": "F32"}}), "expected dtype, shape and data_offsets"),
    "twice": (
        lambda file: safetensors_bytes(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        r"names twice: \['a'\]",
    ),
}
for _name, _changes, _message in (
    ("unknown type", {"dtype": "F128"}, "has type 'F128', known: "),
    ("negative shape", {"shape": [-1, -16]}, "expected counts"),
    ("fractional shape", {"shape": [1.5]}, "expected counts"),
    ("truth as shape", {"shape": [True]}, "expected counts"),
    ("huge shape", {"shape": [2**62, 2**62]}, "does not fill the bytes"),
    ("huge tensor", {"shape": [2**40], "data_offsets": [0, 2**42]}, "expected"),
    ("wrong bytes", {"shape": [1]}, "does not fill the bytes"),
    ("reversed", {"data_offsets": [64, 0]}, "does not fill the bytes"),
    ("negative offset", {"data_offsets": [-64, 0]}, "expected counts"),
    ("three offsets", {"data_offsets": [0, 64, 128]}, "expected counts"),
    ("overlap", {"data_offsets": [4, 68]}, "overlap or gap"),
    ("far away", {"data_offsets": [2**40, 2**40 + 64]}, "overlap or gap"),
):
    DAMAGE[_name] = (
        lambda file, changes=_changes: safetensors_bytes(
            shifted(header_and_data(file)[0], **changes), header_and_data(file)[1]
        ),
        _message,
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    folder = write_classifier(tmp_path / "hf")
    file = folder / "model.safetensors"
    change, message = DAMAGE[damage]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(f"{file} is not a complete safetensors file: ")


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_to_a_header_is_an_error_and_nothing_else(tmp_path, seed):
    """A flipped byte gives a ValueError or, within a name of `__metadata__`, changes nothing."""
    folder = write_classifier(tmp_path / "hf")
    file = folder / "model.safetensors"
    whole, random = file.read_bytes(), np.random.default_rng(seed)
    expected = params_digest(load(folder)[1])
    for _ in range(15):
        damaged = bytearray(whole)
        length = int.from_bytes(whole[:8], "little")
        damaged[random.integers(8 + length)] = random.integers(256)
        file.write_bytes(damaged)
        try:
            _, params = load(folder)
        except ValueError:
            continue
        assert params_digest(params) == expected


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd.safetensors", "sub/x.safetensors", "..", "..\\x.safetensors", "x.bin", ""],
)
def test_an_index_cannot_name_files_elsewhere(tmp_path, shard):
    config = classifier_config("bert")
    folder = write_checkpoint(tmp_path / "hf", config, classifier_tensors(config), shards=2)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["classifier.bias"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not safetensors files of this folder") as error:
        load(folder)
    assert repr(shard) in str(error.value)


def test_an_index_need_not_agree_on_what_is_not_needed(tmp_path):
    config = classifier_config("bert")
    tensors = classifier_tensors(config)
    folder = write_checkpoint(tmp_path / "hf", config, tensors, shards=2)
    expected, index = load(folder)[1], folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    file = names["classifier.bias"]
    index.write_text(json.dumps({"weight_map": names | {"adapter.weight": file}}))
    with pytest.warns(UserWarning, match=r"names more than its files hold, tensors .*: adapter\.weight in model"):
        assert_same(load(folder)[1], expected)
    del names["classifier.bias"]
    index.write_text(json.dumps({"weight_map": names}))
    with (
        pytest.warns(UserWarning, match=r"names less than its files hold, tensors .*: classifier\.bias"),
        pytest.raises(ValueError, match=r"missing: classifier\.bias"),
    ):
        load(folder)


def test_a_folder_with_two_files_of_all_weights_says_which_is_read(tmp_path):
    config = classifier_config("bert")
    folder = write_checkpoint(tmp_path / "hf", config, classifier_tensors(config))
    expected = load(folder)[1]
    write_checkpoint(folder, config, classifier_tensors(config, seed=1), shards=2)
    with pytest.warns(UserWarning, match=r"has model\.safetensors and .*index\.json: only model\.safetensors is read"):
        assert_same(load(folder)[1], expected)


def test_an_index_must_agree_with_its_files(tmp_path):
    config = classifier_config("bert")
    folder = write_checkpoint(tmp_path / "hf", config, classifier_tensors(config), shards=2)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    one, two = sorted(set(whole["weight_map"].values()))
    moved = next(name for name, file in whole["weight_map"].items() if file == one)
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {moved: two}}))
    with pytest.raises(ValueError) as error:
        load(folder)
    assert f"missing: {moved} in {two}; unknown: {moved} in {one}." in str(error.value)
    for broken in ({"weight_map": [one]}, {"weight_map": {"a": 3}}, {}):
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="has no weight_map from tensor to file"):
            load(folder)
    index.write_text(json.dumps(whole))
    (folder / two).unlink()
    with pytest.raises(FileNotFoundError, match=f"names files that are not there: .*{two}"):
        load(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"[1]", b"null", b""])
def test_a_damaged_configuration_is_refused_by_name(tmp_path, content):
    folder = write_classifier(tmp_path / "hf")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json (is not valid JSON|holds a)"):
        load(folder)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"format": 2, "heads": []}, "format 2, this version reads 1: update jaxprune"),
        ("yes", "format 'yes'"),
        ({"format": 1}, "jaxprune.heads is missing"),
        ({"format": 1, "heads": [], "sparsity": 0.5}, "jaxprune.sparsity is unknown"),
        ({"format": 1, "heads": [{"name": "task"}]}, r"jaxprune.heads\[0\].labels is missing"),
        (
            {
                "format": 1,
                "heads": [{"name": 3, "labels": ["a"], "regression": False, "pooling": "first", "dense": None}],
            },
            "3",
        ),
        (
            {
                "format": 1,
                "heads": [{"name": "x", "labels": [1], "regression": False, "pooling": "mean", "dense": None}],
            },
            r"jaxprune.heads\[0\].labels\[0\] is 1, expected text",
        ),
        (
            {
                "format": 1,
                "model_type": "bert",
                "heads": [{"name": "x", "labels": ["a"], "regression": False, "pooling": "max", "dense": None}],
            },
            "pooling must be",
        ),
    ],
)
def test_an_own_section_that_is_not_understood_is_refused(tmp_path, section, message):
    model, params = tiny_model()
    config = save(tmp_path / "out", model, params) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"jaxprune": section}))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "out")
    assert str(config) in str(error.value)


class _Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_never_opened_and_the_error_says_how_to_convert_them(tmp_path, name):
    folder = write_classifier(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Trap(str(tmp_path / "trapped"))))
    with pytest.raises(FileNotFoundError, match="a pickle: loading one can run any code") as error:
        load(folder)
    assert f"AutoModelForSequenceClassification.from_pretrained({str(folder)!r}).save_pretrained" in str(error.value)
    assert not (tmp_path / "trapped").exists()


def test_a_folder_without_weights_or_configuration_is_refused(tmp_path):
    folder = write_classifier(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json: it is not a model folder"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="is a file: give the folder"):
        load(write_classifier(tmp_path / "other") / "config.json")


def test_what_is_neither_a_folder_nor_on_the_hub_is_one_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder somebody/a-model, and the hub does not give it either: .*"):
        load("somebody/a-model")  # the tests are offline
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c", "~/absent/model"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*(absent|a/b/c)"):
            load(name)
    with pytest.raises(ValueError, match="is not on the hub: revision='main' is for those that are"):
        load(write_classifier(tmp_path / "hf"), revision="main")


@pytest.mark.slow
def test_a_model_in_the_hub_cache_loads_offline(tmp_path):
    """The cache's own layout: snapshots of symbolic links to blobs."""
    cached = tmp_path / "hub" / "models--somebody--a-model"
    source, commit = write_classifier(tmp_path / "hf"), "0123456789abcdef0123456789abcdef01234567"
    (cached / "blobs").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    for file in source.iterdir():
        (cached / "blobs" / file.name).write_bytes(file.read_bytes())
        (cached / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
    code = "import jaxprune as jp, sys; sys.exit(jp.load('somebody/a-model')[0].heads != ('default',))"
    run_python(code, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")


# Digests and records


def test_a_digest_depends_on_everything_but_the_order():
    _, params = tiny_model()
    flat = flatten(params)
    first = params_digest(params)
    assert params_digest(unflatten(dict(reversed(flat.items())))) == first
    assert params_digest(jax.tree.map(np.asarray, params)) == first
    assert len(first) == 64
    assert params_digest({"a": np.zeros(2, np.float16)}) != params_digest(
        {"a": np.zeros(2, HALF["bfloat16"])}
    )  # the same bytes
    path = ("layers", 0, "ffn", "up", "bias")
    changes = {
        "value": {path: flat[path].at[3].add(1e-6)},
        "shape": {path: flat[path][None]},
        "name": {(*path[:-1], "bios"): flat[path]},
    }
    others = {params_digest(unflatten(flat | change)) for change in changes.values()}
    assert len(others | {first}) == 4
    assert params_digest(jax.device_put(params, jax.devices()[-1])) == first


def test_a_model_digest_depends_on_the_configuration_and_the_heads(tmp_path):
    model, params = tiny_model()
    first = model_digest(model, params)
    assert model_digest(replace(model, source=tmp_path), params) == first
    other = model.with_heads((replace(model.head(), labels=("a", "b", "c")),))
    assert model_digest(other, params) != first
    assert model_digest(*load(save(tmp_path / "out", model, params))) == first


def test_the_pruning_record_is_kept_with_the_widths_and_the_digest(tmp_path):
    model, params = tiny_model()
    small = uneven(model, params)
    record = {"budget": {"flops": np.float32(0.5)}, "seed": 3, "kept": np.arange(3)}
    save(tmp_path / "out", model, small, pruning=record)
    found = read_pruning(tmp_path / "out")
    assert found == {
        "budget": {"flops": 0.5},
        "seed": 3,
        "kept": [0, 1, 2],
        "pruned": {"digest": model_digest(model, small), "widths": widths(model.axes, small)},
    }
    assert found["pruned"]["widths"]["0.attention.heads"] == 0
    save(tmp_path / "dense", model, params)
    with pytest.raises(FileNotFoundError, match=r"pruning.json does not exist: the model was not pruned"):
        read_pruning(tmp_path / "dense")
    with pytest.raises(TypeError, match="set cannot be written to JSON"):
        save(tmp_path / "other", model, params, pruning={"units": {1, 2}})
    assert not (tmp_path / "other").exists()


def test_save_refuses_parameters_of_another_model(tmp_path):
    model, params = tiny_model()
    wrong = unflatten({path: array for path, array in flatten(params).items() if path[0] != "heads"})
    wrong["layers"][2] = wrong["layers"][1]
    wrong["embeddings"]["norm"]["bias"] = jnp.zeros(15)
    with pytest.raises(
        ValueError, match=r"unknown: layers.2.*missing: heads.task.*wrong shape: embeddings.norm.bias is"
    ):
        save(tmp_path / "out", model, wrong)
    for packed in (None, "exact", "int8"):
        with pytest.raises(TypeError, match=r"only float32, float16 and bfloat16 can be saved, got .*int32"):
            save(tmp_path / "out", model, cast(params, jnp.int32), packed=packed)
    params["embeddings"]["norm"]["bias"] = params["embeddings"]["norm"]["bias"].at[2].set(jnp.nan)
    with pytest.raises(
        ValueError, match=r"cannot save NaN, infinity or values too large for the type: embeddings.norm.bias"
    ):
        save(tmp_path / "out", model, params)
    assert list(tmp_path.iterdir()) == []


def test_every_parameter_has_named_axes():
    for model_type in MODEL_TYPES:
        model, params = tiny_model(model_type)
        for path, array in flatten(params).items():
            assert len(axes_of(model.axes, path)) == array.ndim


def run_python(code: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr

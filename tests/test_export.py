"""Exports compute what the model computes, in the words of others; and whatever cannot be one is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import make_place, record_of, run
from test_decoders import ANSWERS
from tiny import lively, random_gates, tiny_batch, tiny_config, tiny_model

import jaxprune as jp
from jaxprune.checkpoints import export as module
from jaxprune.checkpoints.export import EXPORT, HEADS, uniform
from jaxprune.checkpoints.tensors import TensorFile
from jaxprune.compaction import compact
from jaxprune.models import Model, family
from jaxprune.models.layers import TaskHead
from jaxprune.units import Params, flatten, lengths, open_gates, widths

ENCODERS = ("bert", "roberta", "distilbert", "ernie")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "seed_oss", "gemma3_text")
DENSE = {"distilbert": "relu"}
KINDS = ("query_heads", "neurons")


def of_type(model_type: str, **sizes: Any) -> tuple[Model, Params]:
    if model_type not in ENCODERS:
        return tiny_model(model_type, heads=(), **sizes)
    dense = DENSE.get(model_type, "tanh")
    return tiny_model(model_type, heads=(TaskHead(name="mood", labels=("bad", "good"), dense=dense),), **sizes)


def logits(model: Model, params: Params, batch: Any, **settings: Any) -> np.ndarray:
    mask = batch.get("decoder_attention_mask", batch["attention_mask"])
    found = np.asarray(model.apply(params, batch, **settings).logits)
    if found.ndim == 3 and found.shape[1:] == (2, mask.shape[1]):  # of spans
        found = found.swapaxes(1, 2)
    return found[mask == 1] if found.ndim == 3 else found


def pruned(model: Model, params: Params, seed: int = 0, **settings: Any) -> Params:
    return compact(model, params, random_gates(model, params, seed, **settings))


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("model_type", [*ENCODERS, "t5", "mt5", *DECODERS])
def test_an_export_computes_the_same(model_type: str, tmp_path: Path):
    model, params = of_type(model_type, layers=3, **({"attention_heads": 8} if model_type in DECODERS else {}))
    small = pruned(model, params, 2)
    record = jp.export(tmp_path / "out", model, small)
    assert record["check"]["error"] < 1e-4 and json.loads((tmp_path / "out" / EXPORT).read_text()) == record
    read, arrays = jp.load(tmp_path / "out")
    batch = tiny_batch(model)
    assert_same(logits(read, arrays, batch), logits(model, small, batch))
    counts = widths(read.axes, arrays)
    assert len({units for name, units in counts.items() if name.endswith("neurons")}) == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "jaxprune" not in config and config["model_type"] != "jaxprune" and config["dtype"] == "float32"
    assert [*config] == sorted(config)


CLASSES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "fewer groups": ("llama", {}, ("groups", "neurons"), "MistralForCausalLM"),
    "with biases": ("llama", {"attention_bias": True}, ("groups", "neurons"), "SeedOssForCausalLM"),
    "neurons alone": ("llama", {}, ("neurons",), "LlamaForCausalLM"),
    "of qwen2": ("qwen2", {}, ("groups", "neurons"), "SeedOssForCausalLM"),
    "of qwen2, neurons alone": ("qwen2", {"head_dim": 2}, ("neurons",), "Qwen2ForCausalLM"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_another_class_stands_for_one_that_cannot_have_such_heads(case: str, tmp_path: Path):
    model_type, settings, kinds, name = CLASSES[case]
    raw = tiny_config(model_type, layers=3, embed=16, attention_heads=8, neurons=32, vocab=60) | settings
    model = Model(family(model_type).parse_config(raw, ()))
    params = lively(model)
    gates = {name: gate.at[: len(gate) // 4].set(0.0) for name, gate in open_gates(model, params, kinds).items()}
    record = jp.export(tmp_path / "out", model, compact(model, params, gates))
    assert record["class"] == name
    read, _ = jp.load(tmp_path / "out")
    assert read.config.groups == (3 if "groups" in kinds else 4) and read.config.neurons == 24


def test_gemma_has_heads_that_divide_its_width(tmp_path: Path):
    model, params = tiny_model("gemma3_text", attention_heads=8, heads=())
    gates = open_gates(model, params, ("groups",))
    record = jp.export(tmp_path / "out", model, compact(model, params, {n: g.at[0].set(0.0) for n, g in gates.items()}))
    assert record["units"]["groups"] == {"fewest": 3, "most": 3, "written": 4, "filled": 2}  # 6 heads do not divide 16


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "t5", "bert"])
def test_layers_without_units_are_left_out_where_they_do_nothing(model_type: str, tmp_path: Path):
    model, params = of_type(model_type, layers=3)
    gates = {name: gate * float(name.split(".")[-3] != "1") for name, gate in open_gates(model, params).items()}
    small = compact(model, params, gates)
    record = jp.export(tmp_path / "out", model, small)
    gone = {"bert": [], "t5": ["encoder.layers.1", "decoder.layers.1"]}.get(model_type, ["layers.1"])
    assert record["left_out"] == gone
    read, arrays = jp.load(tmp_path / "out")
    counts = [sum(stack.layers for stack in each.stacks) for each in (read, model)]
    assert counts[0] == counts[1] - len(gone)
    assert_same(logits(read, arrays, tiny_batch(model)), logits(model, small, tiny_batch(model)))


def test_heads_of_t5_stand_where_its_one_table_has_their_positions():
    model, params = tiny_model("t5", layers=2, attention_heads=4)
    table = np.random.default_rng(0).normal(size=(model.config.buckets, 4)).astype(np.float32)
    for stack in ("encoder", "decoder"):
        for layer in params[stack]["layers"].values():
            layer["attention"]["relative"]["embedding"] = table
    gates = open_gates(model, params, ("heads",))
    closed = {"encoder.0.attention.heads": [1, 2], "encoder.1.attention.heads": [1, 3], "decoder.1.cross.heads": [0]}
    gates |= {name: gates[name].at[np.array(units)].set(0.0) for name, units in closed.items()}
    made = uniform(model, compact(model, params, gates))
    tables = [made.params["encoder"]["layers"][i]["attention"]["relative"]["embedding"] for i in (0, 1)]
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_array_equal(tables[0][:, :3], table[:, [0, 3, 2]])  # of the first layer, then what is new
    assert made.units["heads"].written == 4  # of the decoder's


def test_heads_of_a_form_of_ones_own_stand_beside_the_encoder(tmp_path: Path):
    heads = tuple(TaskHead(name=name, labels=("bad", "good"), pooling="mean") for name in ("one", "two"))
    model, params = tiny_model("bert", heads=heads)
    record = jp.export(tmp_path / "out", model, pruned(model, params))
    assert record["class"] == "BertModel" and record["heads"] == {"inside": None, "beside": ["one", "two"]}
    assert record["check"]["of"] == "hidden states"
    with TensorFile(tmp_path / "out" / HEADS) as file:
        assert sorted(file.entries) == [f"{name}.out.{leaf}" for name in ("one", "two") for leaf in ("bias", "kernel")]
        np.testing.assert_array_equal(file.read("two.out.kernel"), params["heads"]["two"]["out"]["kernel"])
    one = jp.export(tmp_path / "one", model, params, head="two")
    assert one["heads"] == {"inside": None, "beside": ["two"]}


def test_one_of_several_heads_is_inside(tmp_path: Path):
    heads = (
        TaskHead(name="one", labels=("a", "b", "c"), dense="tanh"),
        TaskHead(name="span", labels=("start", "end"), pooling="none"),
        TaskHead(name="number", labels=("score",), regression=True, dense="tanh"),
    )
    model, params = tiny_model("bert", heads=heads)
    for head, form in (("one", "Sequence"), ("number", "Sequence"), ("span", "Question")):
        record = jp.export(tmp_path / head, model, params, head=head)
        assert record["heads"] == {"inside": head, "beside": []} and form in record["class"]
        read, arrays = jp.load(tmp_path / head)
        assert read.head().labels == model.head(head).labels and read.head().regression == model.head(head).regression
        batch = tiny_batch(model)
        assert_same(logits(read, arrays, batch), logits(model, params, batch, head=head))
    with pytest.raises(ValueError, match="no task head 'four'; it has: one, span, number"):
        jp.export(tmp_path / "four", model, params, head="four")
    assert not (tmp_path / "four").exists()


def test_types(tmp_path: Path):
    model, params = tiny_model("llama", heads=())
    record = jp.export(tmp_path / "half", model, params, dtype="bfloat16")
    assert record["dtype"] == "bfloat16" and record["check"]["error"] < 1e-4
    with TensorFile(tmp_path / "half" / "model.safetensors") as file:
        assert {entry.dtype for entry in file.entries.values()} == {"BF16"}
        assert file.metadata == {"format": "pt"}
    params["norm"]["scale"] = params["norm"]["scale"] * 1e6
    with pytest.raises(ValueError, match="too large for the type"):
        jp.export(tmp_path / "large", model, params, dtype="float16", check=False)
    assert not (tmp_path / "large").exists()


def test_what_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, params = tiny_model("llama", heads=())
    true = module.tensors_of
    monkeypatch.setattr(module, "tensors_of", lambda *own: {name: 1.01 * a for name, a in true(*own).items()})
    with pytest.raises(ValueError, match="the export is not written: read back"):
        jp.export(tmp_path / "out", model, params)
    assert [*tmp_path.iterdir()] == []
    assert jp.export(tmp_path / "out", model, params, check=False)["check"] is None


def test_nothing_but_an_export_is_replaced(tmp_path: Path):
    model, params = tiny_model("llama", heads=())
    jp.save(tmp_path / "own", model, params)
    with pytest.raises(FileExistsError, match="is not a folder that was exported"):
        jp.export(tmp_path / "own", model, params, overwrite=True)
    jp.export(tmp_path / "out", model, params)
    with pytest.raises(FileExistsError, match="--overwrite"):
        jp.export(tmp_path / "out", model, params)
    changed = {**params, "norm": {"scale": params["norm"]["scale"] * 2}}
    jp.export(tmp_path / "out", model, changed, overwrite=True)
    found = flatten(jp.load(tmp_path / "out")[1])["norm", "scale"]
    np.testing.assert_array_equal(found, changed["norm"]["scale"])


def test_what_texts_are_written_by_travels_along(tmp_path: Path):
    model, params = tiny_model("llama")
    files = {"chat_template.jinja": "{{ messages[0]['content'] }}", "generation_config.json": '{"eos_token_id": 1}'}
    shutil.copytree(ANSWERS, tmp_path / "dense")
    for name, content in files.items():
        (tmp_path / "dense" / name).write_text(content)
    model = replace(model, source=tmp_path / "dense")
    jp.save(tmp_path / "saved", model, params)
    jp.export(tmp_path / "out", jp.load(tmp_path / "saved")[0], params)
    for folder in ("saved", "out"):
        assert {name: (tmp_path / folder / name).read_text() for name in files} == files
        assert jp.load(tmp_path / folder)[0].tokenizer.chat_template == files["chat_template.jinja"]


# GGUF


GGUF = {  # model type to the architecture where all layers are alike
    "llama": "llama",
    "qwen2": "seed_oss",
    "qwen3": "qwen3",
    "seed_oss": "seed_oss",
    "gemma3_text": "gemma3",
}


@pytest.mark.parametrize("model_type", GGUF)
def test_a_gguf_file_computes_the_same(model_type: str, tmp_path: Path):
    pytest.importorskip("gguf")
    model, params = usual(model_type)
    small = alike(model, params)
    record = jp.export(tmp_path / "out.gguf", model, small, to="gguf")
    assert record["class"] == GGUF[model_type] and record["check"]["error"] < 1e-5
    read, arrays = jp.load(tmp_path / "out.gguf")
    assert_same(logits(read, arrays, tiny_batch(model)), logits(model, small, tiny_batch(model)))


def alike(model: Model, params: Params) -> Params:
    """The parameters without a quarter of the groups and neurons of every layer."""
    gates = open_gates(model, params, ("groups", "neurons"))
    return compact(model, params, {name: gate.at[: len(gate) // 4].set(0.0) for name, gate in gates.items()})


UNEVEN: dict[str, tuple[str, str, dict[str, Any]]] = {  # architecture, model type and what differs
    "llama": ("deci", "llama", {}),
    "llama with biases": ("deci", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without an output layer": ("deci", "llama", {"tie_word_embeddings": True}),
    "mistral": ("deci", "mistral", {"sliding_window": None}),
    "qwen2": ("deci", "qwen2", {}),
    "seed_oss": ("deci", "seed_oss", {"attention_out_bias": True}),
    "qwen3": ("openelm", "qwen3", {"tie_word_embeddings": True}),
    "qwen3 with an output layer": ("qwen3", "qwen3", {}),
    "gemma3_text": ("gemma3", "gemma3_text", {}),
}


def uneven(case: str, width: int = 16) -> tuple[Model, Params]:
    """A model of six layers, and what is left of it: no layer is as another, and some have lost modules."""
    _, model_type, changed = UNEVEN[case]
    sizes = {"num_hidden_layers": 6, "hidden_size": width, "intermediate_size": 96, "head_dim": 6}
    model, params = usual(model_type, num_key_value_heads=4, rope_theta=100.0, **sizes, **changed)
    left = {0: (0, 50), 1: (3, 0), 2: (0, 0), 3: (2, 96), 4: (0, 7), 5: (4, 33)}  # groups and neurons
    gates = open_gates(model, params, ("groups", "neurons"))
    for layer, counts in left.items():
        for name, count in zip((f"{layer}.attention.groups", f"{layer}.ffn.neurons"), counts, strict=True):
            gates[name] = gates[name].at[: len(gates[name]) - count].set(0.0)
    small = compact(model, params, gates)
    queries = {"3.attention.query_heads": jnp.array([1.0, 0.0, 0.0, 1.0])}  # one of each group: layer 5 keeps two
    return model, compact(model, small, queries)


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
@pytest.mark.parametrize("case", UNEVEN)
def test_layers_keep_their_widths_in_a_gguf_file(case: str, dtype: str, tmp_path: Path):
    pytest.importorskip("gguf")
    model, small = uneven(case, width=32 if dtype == "q8_0" else 16)
    record = jp.export(tmp_path / "out.gguf", model, small, to="gguf", dtype=dtype)
    assert record["class"] == UNEVEN[case][0]
    outer, ffn = model.config.biases[1:]
    assert record["left_out"] == ([] if outer or ffn else ["layers.2"])
    read, arrays = jp.load(tmp_path / "out.gguf")
    if dtype == "float32":
        assert_same(logits(read, arrays, tiny_batch(model)), logits(model, small, tiny_batch(model)))
    counts = lengths(read.axes, arrays).items()
    found = {kind: [count for site, count in counts if site.kind == kind] for kind in ("groups", "neurons")}
    layers = [i for i in range(6) if f"layers.{i}" not in record["left_out"]]
    if record["class"] in ("deci", "openelm"):
        headless = 0 if record["class"] == "deci" and not outer else 1
        expected = {"groups": [1, 3, headless, 2, headless, 4], "neurons": [50, 1, 1, 96, 7, 33]}
        if dtype == "q8_0":
            expected["neurons"] = [64, 32, 32, 96, 32, 64]
        assert found == {kind: [numbers[i] for i in layers] for kind, numbers in expected.items()}
        facts = record["units"]["groups"]
        assert (facts["fewest"], facts["most"], facts["written"]) == (0, 4, None)
        assert facts["filled"] == 1 + headless * (len(layers) - 4)
    else:
        assert all(len({*numbers}) == 1 for numbers in found.values())
        assert record["units"]["neurons"]["filled"] == len(layers) - 1


def usual(model_type: str, **changed: Any) -> tuple[Model, Params]:
    """A model with the activation that llama.cpp has for it."""
    raw = tiny_config(model_type, layers=3, embed=16, attention_heads=8, neurons=32, vocab=60)
    gemma = model_type == "gemma3_text"
    raw |= {"hidden_activation": "gelu_pytorch_tanh"} if gemma else {"hidden_act": "silu"}
    raw |= {"query_pre_attn_scalar": raw.get("head_dim", 256)} if gemma else {}
    model = Model(family(model_type).parse_config(raw | changed, ()))
    return model, lively(model)


def test_positions_that_llama_stretches(tmp_path: Path):
    pytest.importorskip("gguf")
    names = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for scaling in ({"rope_type": "llama3", "factor": 8.0, **names}, {"rope_type": "linear", "factor": 2.0}):
        model, params = usual("llama", rope_scaling=scaling, max_position_embeddings=8192)
        record = jp.export(tmp_path / "out.gguf", model, params, to="gguf", overwrite=True)
        assert record["check"]["error"] < 1e-5


def test_rounded_weights_are_near(tmp_path: Path):
    pytest.importorskip("gguf")
    model, params = tiny_model("llama", embed=32, heads=())
    model = Model(family("llama").parse_config(json.loads(model.config.raw) | {"hidden_act": "silu"}, ()))
    sizes = {}
    for dtype in ("float32", "bfloat16", "float16", "q8_0"):
        jp.export(tmp_path / dtype, model, pruned(model, params), to="gguf", dtype=dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert sizes["q8_0"] < sizes["float16"] == sizes["bfloat16"] < sizes["float32"]


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "an encoder": (lambda: tiny_model("bert"), {}, "a bert model is no decoder"),
    "an activation": (
        lambda: usual("llama", hidden_act="gelu"),
        {},
        "llama.cpp has silu in this architecture, not gelu",
    ),
    "a window": (lambda: usual("mistral", sliding_window=8), {}, "no sliding windows"),
    "a scale": (lambda: usual("gemma3_text", query_pre_attn_scalar=9), {}, "scales attention by the size of a head"),
    "a type": (lambda: usual("llama"), {"dtype": "q4_0"}, "must be one of float32, float16, bfloat16, q8_0"),
    "a head": (lambda: usual("llama"), {"head": "mood"}, "decoders have no task heads"),
    "a format": (lambda: usual("llama"), {"to": "pickle"}, "exported to one of hf, gguf, onnx, stablehlo"),
    "a type of others": (lambda: usual("llama"), {"to": "hf", "dtype": "q8_0"}, "q8_0 is a type of GGUF files alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_such_form_is_refused(case: str, tmp_path: Path):
    pytest.importorskip("gguf")
    make, settings, message = REFUSED[case]
    model, params = make()
    with pytest.raises(ValueError, match=message):
        jp.export(tmp_path / "out", model, params, **({"to": "gguf"} | settings))
    assert not [*tmp_path.iterdir()]


def test_the_command_says_that_layers_differ(tmp_path: Path):
    pytest.importorskip("gguf")
    jp.save(tmp_path / "small", *uneven("llama"))
    shown = run("export", tmp_path / "small", "--to", "gguf", "-o", tmp_path / "out.gguf").stdout
    assert "deci, float32" in shown and shown.count("each its own") == 3


# StableHLO


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "t5", "llama", "gemma3_text"])
def test_a_program_computes_the_same_for_any_batch(model_type: str, tmp_path: Path):
    pytest.importorskip("flatbuffers")
    model, params = of_type(model_type)
    small = pruned(model, params, 2)
    record = jp.export(tmp_path / "out", model, small, to="stablehlo")
    assert record["parameters"]["written"] == record["parameters"]["model"] and record["check"]["error"] < 1e-5
    program = jax.export.deserialize(bytearray((tmp_path / "out").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for rows, length in ((3, 9), (2, 5)):
        batch = tiny_batch(model, rows=rows, length=length)
        given = {name: np.asarray(batch[name], np.int32) for name in record["inputs"]}
        expected = np.asarray(model.apply(small, batch).logits)
        np.testing.assert_allclose(program.call(given), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_program_is_for_one_head(tmp_path: Path):
    pytest.importorskip("flatbuffers")
    heads = (TaskHead(name="one", labels=("a", "b")), TaskHead(name="span", labels=("start", "end"), pooling="none"))
    model, params = tiny_model("bert", heads=heads)
    with pytest.raises(ValueError, match="one, span"):
        jp.export(tmp_path / "out", model, params, to="stablehlo")
    record = jp.export(tmp_path / "out", model, params, to="stablehlo", head="span", dtype="bfloat16")
    assert record["heads"]["inside"] == "span" and record["dtype"] == "bfloat16"


# ONNX: what needs neither of its packages


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_packages_that_are_missing_are_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, params = tiny_model("bert")
    monkeypatch.setitem(sys.modules, "onnx", None if missing == "onnx" else json)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    also = r"" if missing == "onnx" else r", or leave the check out \(check=False, --no-check\)"
    with pytest.raises(ValueError, match=rf"another package: pip install 'jaxprune\[onnx\]'{also}\."):
        jp.export(tmp_path / "out", model, params, to="onnx")
    assert not [*tmp_path.iterdir()]


# The command


def test_the_command(tmp_path: Path):
    place = make_place(tmp_path)
    record = record_of("export", place.model, "-o", place.folder / "out", "--dtype", "float16")
    assert record["command"] == "export" and record["dtype"] == "float16" and record["file_bytes"] > 0
    card = (place.folder / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and f"{record['class']}.from_pretrained" in card
    assert {"vocab.txt", "config.json", "model.safetensors"} <= {file.name for file in (place.folder / "out").iterdir()}
    read, _ = jp.load(place.folder / "out")
    assert read.tokenizer("a film")["input_ids"] == jp.load(place.model)[0].tokenizer("a film")["input_ids"]
    few = ("--task", "mood", "--data", place.data, "--criterion", "magnitude", "--no-evaluate", "--measure", 0)
    record_of("prune", place.model, *few, "--flops", 0.5, "--uniform", "-o", place.folder / "small")
    small = record_of("export", place.folder / "small", "-o", place.folder / "plain")
    assert small["units"]["neurons"]["fewest"] == small["units"]["neurons"]["written"] < 32
    shown = run("export", place.model, "-o", place.folder / "out", "--overwrite", "--no-check")
    assert shown.exit_code == 0 and "Not checked" in shown.stdout
    for arguments, message in (
        ((), "exists already"),
        (("--to", "pickle"), "none of hf, gguf, onnx, stablehlo"),
        (("--to", "gguf"), "is a folder: name a file"),
        (("--dtype", "int4", "--overwrite"), "none of float32"),
    ):
        refused = run("export", place.model, "-o", place.folder / "out", *arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split())

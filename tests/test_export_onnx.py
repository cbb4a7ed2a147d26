"""ONNX files compute in onnxruntime what the model computes, for batches of any size (make test-runtimes)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import make_place, record_of, run
from test_export import of_type
from tiny import LENGTH, random_gates, tiny_batch, tiny_model

import jaxprune as jp
from jaxprune.checkpoints import onnx_graph
from jaxprune.compaction import compact
from jaxprune.models import Model
from jaxprune.models.layers import NOWHERE, TaskHead
from jaxprune.units import Params

onnx: Any = pytest.importorskip("onnx")
onnxruntime: Any = pytest.importorskip("onnxruntime")


def uneven(model: Model, params: Params) -> Params:
    """Random widths; the first layer has no attention to itself, the second no feed-forward network."""
    gone = {("0", "attention"), ("1", "ffn")}
    gates = random_gates(model, params, 2)
    gates = {n: gate * float(tuple(n.split(".")[-3:-1]) not in gone) for n, gate in gates.items()}
    return compact(model, params, gates)


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def computed(path: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    """What onnxruntime computes of what tokenizers return."""
    session = session_of(path)
    (found,) = session.run(["logits"], {each.name: batch[each.name].astype(np.int64) for each in session.get_inputs()})
    return found


def assert_same(path: Path, model: Model, params: Params, batch: dict[str, np.ndarray], **settings: Any) -> None:
    """Compares all logits, those of padding too."""
    found, expected = computed(path, batch), np.asarray(model.apply(params, batch, **settings).logits)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert (found == NOWHERE).tolist() == (expected == NOWHERE).tolist()
    scale = np.abs(expected[expected != NOWHERE]).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "distilbert", "t5", "mt5", "llama", "qwen2", "qwen3", "gemma3_text"]
)
def test_a_file_computes_the_same_for_any_batch(model_type: str, tmp_path: Path):
    model, params = of_type(model_type, layers=3, attention_heads=8)
    small, path = uneven(model, params), tmp_path / "model.onnx"
    record = jp.export(path, model, small, to="onnx")
    assert record["check"]["error"] < 1e-5 and record["opset"] == 20 and record["file_bytes"] == path.stat().st_size
    assert record["parameters"]["written"] == record["parameters"]["model"]
    onnx.checker.check_model(str(path), full_check=True)
    for rows, length in ((3, 9), (1, 1), (2, 40)):  # 40 is more than the relative positions of T5 tell apart
        assert_same(path, model, small, tiny_batch(model, rows=rows, length=length))
    free = {"input_ids": ["batch", "length"], "decoder_input_ids": ["batch", "decoder_length"]}
    shapes = {given.name: given.shape for given in session_of(path).get_inputs()}
    assert [*shapes] == [*record["inputs"]]
    assert all(shapes[name] == sizes for name, sizes in free.items() if name in shapes)


def test_a_file_is_for_one_head(tmp_path: Path):
    heads = (
        TaskHead(name="first", labels=("a", "b", "c"), dense="tanh"),
        TaskHead(name="mean", labels=("a", "b"), pooling="mean", dense="gelu"),
        TaskHead(name="last", labels=("a", "b"), pooling="last"),
        TaskHead(name="number", labels=("score",), regression=True),
        TaskHead(name="span", labels=("start", "end"), pooling="none"),
    )
    model, params = tiny_model("bert", heads=heads)
    for head in model.heads:
        record = jp.export(tmp_path / head, model, params, to="onnx", head=head)
        assert record["heads"] == {"inside": head, "beside": []}
        assert_same(tmp_path / head, model, params, tiny_batch(model), head=head)
    with pytest.raises(ValueError, match="no task head 'four'; it has: first, mean, last, number, span"):
        jp.export(tmp_path / "four", model, params, to="onnx", head="four")
    with pytest.raises(ValueError, match="5 task heads"):
        jp.export(tmp_path / "four", model, params, to="onnx")
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_a_smaller_type(dtype: str, tmp_path: Path):
    model, params = tiny_model("llama", embed=32, neurons=128)
    full = jp.export(tmp_path / "full", model, params, to="onnx")
    record = jp.export(tmp_path / "half", model, params, to="onnx", dtype=dtype)
    assert record["dtype"] == dtype and record["check"]["error"] < 1e-5  # it computes in float32
    weights = 4 * record["parameters"]["written"]
    assert 0.45 * weights < full["file_bytes"] - record["file_bytes"] <= 0.5 * weights


def test_equal_weights_and_equal_nodes_are_there_once(tmp_path: Path):
    model, params = tiny_model("gemma3_text", layers=4)  # embeddings and output layer are one
    record = jp.export(tmp_path / "out", model, params, to="onnx")
    graph = onnx.load(str(tmp_path / "out")).graph
    assert sum(int(np.prod(each.dims)) for each in graph.initializer) < record["parameters"]["written"] + 200
    counts = Counter(node.op_type for node in graph.node)
    assert counts["CumSum"] == 1 and counts["Cos"] == 2  # of sliding layers and of the others


def test_what_onnx_has_an_operator_for_is_that_operator(tmp_path: Path):
    model, params = tiny_model("bert", layers=3)
    jp.export(tmp_path / "out", model, params, to="onnx")
    counts = Counter(node.op_type for node in onnx.load(str(tmp_path / "out")).graph.node)
    assert {name: counts[name] for name in ("Gelu", "LayerNormalization", "Softmax", "Erf", "Exp", "Sqrt")} == {
        **{"Gelu": 3, "LayerNormalization": 7, "Softmax": 3},
        **dict.fromkeys(("Erf", "Exp", "Sqrt"), 0),
    }


def test_settings_of_the_machine_change_nothing(tmp_path: Path):
    model, params = tiny_model("bert")
    for precision in ("float32", "bfloat16"):
        with jax.default_matmul_precision(precision):
            jp.export(tmp_path / precision, model, params, to="onnx")
    assert (tmp_path / "float32").read_bytes() == (tmp_path / "bfloat16").read_bytes()


def test_inputs_outside_the_tables_are_refused(tmp_path: Path):
    model, params = tiny_model("bert")
    jp.export(tmp_path / "out", model, params, to="onnx")
    fits = tiny_batch(model, length=LENGTH)
    computed(tmp_path / "out", fits)
    long, unknown = tiny_batch(model, length=LENGTH + 1), fits | {"input_ids": fits["input_ids"] + model.config.vocab}
    for batch in (long, unknown):
        with pytest.raises(Exception, match="out of data bounds"):
            computed(tmp_path / "out", batch)


def test_what_cannot_be_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, params = tiny_model("bert")
    (tmp_path / "there").write_text("mine")
    with pytest.raises(FileExistsError):
        jp.export(tmp_path / "there", model, params, to="onnx")
    with pytest.raises(ValueError, match="computes 'sort', of which there is no ONNX export yet"):
        onnx_graph.graph_file(lambda params, batch: jnp.sort(params["x"]), {"x": jnp.ones(3)}, {}, "float32")
    with monkeypatch.context() as patched:
        patched.setattr(onnx_graph, "MOST_BYTES", 1000)
        with pytest.raises(ValueError, match="an ONNX file holds 2 GiB"):
            jp.export(tmp_path / "out", model, params, to="onnx")
    monkeypatch.setitem(onnx_graph._OPERATORS, "tanh", "Sin")
    with pytest.raises(ValueError, match="the export is not written: read back"):
        jp.export(tmp_path / "out", model, params, to="onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    assert jp.export(tmp_path / "out", model, params, to="onnx", check=False)["check"] is None


def test_the_command(tmp_path: Path):
    place = make_place(tmp_path)
    out = place.folder / "model.onnx"
    asked = ("export", place.model, "--to", "onnx", "--head", "mood", "-o", out)
    record = record_of(*asked, "--dtype", "float16")
    assert record["format"] == "onnx" and record["file_bytes"] == out.stat().st_size
    shown = run(*asked, "--overwrite")
    assert shown.exit_code == 0 and "operators of version 20" in shown.stdout
    model, params = jp.load(place.model)
    assert_same(out, model, params, tiny_batch(model, length=12), head="mood")

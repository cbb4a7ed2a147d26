"""Law 8: logits, hidden states and attention equal those of Hugging Face's PyTorch models, read through `load`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import LENGTHS, random_batch, random_classifier, random_gates, run, scale_columns
from tiny import MODEL_TYPES

from jaxprune.checkpoints.folder import load

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4  # of the scale: float32, other order of sums
SIZES: dict[str, Any] = {"embed": 48, "heads": 6, "neurons": 37, "layers": 3}


@pytest.fixture(scope="module", autouse=True)
def torch() -> Any:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def saved(folder: Path, model: Any, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


def assert_close(found: Any, expected: Any) -> None:
    expected = expected.numpy() if hasattr(expected, "numpy") else np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("task", ["SequenceClassification", "QuestionAnswering"])
@pytest.mark.parametrize("model_type", ["camembert", "data2vec-text", "electra", "ernie"])
def test_aliases_equal_hugging_face(model_type: str, task: str, tmp_path: Path):
    theirs = random_classifier(model_type, activation="gelu_new", labels=2, task=task)
    model, params = load(saved(tmp_path, theirs))
    batch = random_batch(theirs, 7)
    found, expected = np.asarray(model.apply(params, batch).logits), run(theirs, batch)
    if task == "SequenceClassification":
        assert_close(found, expected.logits)
    else:
        tokens = batch["attention_mask"] > 0
        for ours, other in zip(found.swapaxes(0, 1), (expected.start_logits, expected.end_logits), strict=True):
            assert_close(ours[tokens], other.numpy()[tokens])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_size": 8}, "embedding_size is 8"),
        ({"embedding_size": None}, "embedding_size is 128"),
        ({"use_task_id": True}, "use_task_id is True"),
    ],
)
def test_aliases_with_other_arrays_are_refused(change: dict[str, Any], message: str, tmp_path: Path):
    folder = saved(tmp_path, random_classifier("ernie" if "use_task_id" in change else "electra"))
    raw = json.loads((folder / "config.json").read_text()) | change
    raw = {name: value for name, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_equal_hugging_face(model_type: str, activation: str, tmp_path: Path):
    theirs = random_classifier(model_type, activation=activation, **SIZES)
    model, params = load(saved(tmp_path, theirs))
    for length in LENGTHS if activation == "gelu" else LENGTHS[1:2]:
        batch = random_batch(theirs, length)
        assert_close(model.apply(params, batch).logits, run(theirs, batch).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_hidden_states_and_attention_equal_hugging_face(model_type: str, tmp_path: Path):
    theirs = random_classifier(model_type, **SIZES)
    model, params = load(saved(tmp_path, theirs))
    batch = random_batch(theirs, 7)
    expected = run(theirs, batch, output_hidden_states=True, output_attentions=True)
    found = model.apply(params, batch, returns=("hidden", "scores"))
    assert found.hidden is not None and found.scores is not None
    assert len(found.hidden) == len(expected.hidden_states) == SIZES["layers"] + 1
    assert len(found.scores) == len(expected.attentions) == SIZES["layers"]
    for ours, other in zip(found.hidden, expected.hidden_states, strict=True):
        assert_close(ours, other)
    mask = batch["attention_mask"][:, None, None, :] > 0
    for raw, other in zip(found.scores, expected.attentions, strict=True):
        weights = np.where(mask, np.exp(raw - np.where(mask, raw, -np.inf).max(-1, keepdims=True)), 0.0)
        assert_close(weights / weights.sum(-1, keepdims=True), other)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gates_equal_scaled_columns_in_pytorch(model_type: str, tmp_path: Path):
    theirs = random_classifier(model_type, **SIZES)
    model, params = load(saved(tmp_path, theirs))
    batch, gates = random_batch(theirs, 7), random_gates(theirs)
    scale_columns(theirs, gates)
    found = model.apply(params, batch, {name: jnp.asarray(gate) for name, gate in gates.items()})
    assert_close(found.logits, run(theirs, batch).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_padding_on_the_left_and_between_equals_hugging_face(model_type: str, tmp_path: Path):
    theirs = random_classifier(model_type)
    model, params = load(saved(tmp_path, theirs))
    batch = random_batch(theirs, 7)
    left = {name: array[:, ::-1].copy() for name, array in batch.items()}
    between = {name: np.concatenate([array[:, :4], left[name][:, -3:]], axis=1) for name, array in batch.items()}
    assert (left["attention_mask"][:, 0] == 0).any() and (np.diff(between["attention_mask"]) > 0).any()
    for moved in (left, between):
        assert_close(model.apply(params, moved).logits, run(theirs, moved).logits)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_segments_may_be_left_out(model_type: str, tmp_path: Path):
    theirs = random_classifier(model_type)
    model, params = load(saved(tmp_path, theirs))
    batch = random_batch(theirs, 7)
    batch.pop("token_type_ids", None)
    assert_close(model.apply(params, batch).logits, run(theirs, batch).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_regression_equals_hugging_face(model_type: str, tmp_path: Path):
    theirs = random_classifier(model_type, labels=1)
    model, params = load(saved(tmp_path, theirs))
    assert model.head().regression
    batch = random_batch(theirs, 7)
    assert_close(model.apply(params, batch).logits, run(theirs, batch).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_starts_and_ends_of_spans_equal_hugging_face(model_type: str, tmp_path: Path):
    theirs = random_classifier(model_type, labels=2, task="QuestionAnswering", **SIZES)
    model, params = load(saved(tmp_path, theirs))
    assert model.head().spans
    for length in LENGTHS:
        batch = random_batch(theirs, length)
        found, expected = np.asarray(model.apply(params, batch).logits), run(theirs, batch)
        tokens = batch["attention_mask"] > 0  # at padding they have logits, too
        for ours, other in zip(found.swapaxes(0, 1), (expected.start_logits, expected.end_logits), strict=True):
            assert_close(ours[tokens], other.numpy()[tokens])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sharded_and_half_precision_files_equal_hugging_face(model_type: str, tmp_path: Path, torch: Any):
    theirs = random_classifier(model_type)
    batch = random_batch(theirs, 7)
    expected = run(theirs, batch).logits
    sharded = saved(tmp_path / "sharded", theirs, max_shard_size="10KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    model, params = load(sharded)
    assert_close(model.apply(params, batch).logits, expected)
    for kind in (torch.float16, torch.bfloat16):
        rounded = random_classifier(model_type).to(kind)
        model, params = load(saved(tmp_path / str(kind), rounded))
        assert_close(model.apply(params, batch).logits, run(rounded.float(), batch).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_a_config_leaves_out_is_what_hugging_face_assumes(model_type: str, tmp_path: Path):
    theirs = random_classifier(model_type)
    folder = saved(tmp_path, theirs)
    raw = json.loads((folder / "config.json").read_text())
    config, assumed = load(folder)[0].config, type(theirs.config)()
    for name in ("hidden_act", "activation", "pad_token_id", "hidden_dropout_prob", "dropout", "seq_classif_dropout"):
        if name in raw:
            raw.pop(name)
    (folder / "config.json").write_text(json.dumps(raw))
    config = load(folder)[0].config
    assert config.pad_id == assumed.pad_token_id
    if model_type == "distilbert":
        names = ("activation", "dropout", "seq_classif_dropout")
    else:
        names = ("hidden_act", "hidden_dropout_prob", "hidden_dropout_prob")  # of the head too
    expected = tuple(getattr(assumed, name) for name in names)
    assert (config.activation, config.hidden_dropout, config.head_dropout) == expected

"""Law 8 for the T5 family: logits, hidden states and gates equal those of Hugging Face's PyTorch models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import random_gates

from jaxprune.checkpoints.folder import load, save

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4  # of the scale: float32, other order of sums
SIZES: dict[str, Any] = {
    "vocab_size": 67, "d_model": 24, "d_kv": 5, "d_ff": 37, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "dropout_rate": 0.0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "t5 1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5 1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


@pytest.fixture(scope="module", autouse=True)
def torch() -> Any:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def random_t5(kind: str, seed: int = 0, **sizes: Any) -> Any:
    """A random PyTorch model in which everything matters; untied ones get an output layer of their own."""
    torch = pytest.importorskip("torch")
    from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

    make: Any = (MT5Config, MT5ForConditionalGeneration) if kind == "mt5" else (T5Config, T5ForConditionalGeneration)
    model = make[1](make[0](**SIZES, **KINDS[kind], **sizes)).eval()
    if not KINDS[kind]["tie_word_embeddings"]:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.scale_decoder_outputs = False
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 1.0 if "norm" in name else 0.0
            size = 0.2 if "norm" in name else 1.0 if weight.shape[0] in (67, 8) else weight.shape[1] ** -0.5
            weight.copy_(scale + size * torch.randn(weight.shape, generator=random))
    return model


def saved(folder: Path, kind: str, model: Any) -> Path:
    """The folder as the installed transformers saves it, whose flag always says that the table is the output layer."""
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != KINDS[kind]["tie_word_embeddings"]
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **settings: Any) -> Path:
    """The folder with other tensors, and with other settings of the configuration (None takes one out)."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | settings
    raw = {name: value for name, value in raw.items() if name not in settings or value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def assert_as_hugging_face(folder: Path) -> Any:
    """Loads a folder with both, compares the logits, and returns our configuration."""
    from transformers import AutoModelForSeq2SeqLM

    model, params = load(folder)
    batch = random_batch(7, 3)
    expected = run(AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), batch).logits
    assert_close(model.apply(params, batch).logits, expected, batch["decoder_attention_mask"] > 0)
    return model.config


def random_batch(length: int, targets: int, seed: int = 0, rows: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    mask = np.arange(length) < np.array([length, max(1, length // 2), max(1, length - 1)])[:rows, None]
    decoded = np.arange(targets) < np.array([targets, max(1, targets - 2), 1])[:rows, None]
    ids = np.where(mask, random.integers(2, 67, (rows, length)), 0)
    first = np.where(decoded, random.integers(2, 67, (rows, targets)), 0)
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "decoder_input_ids": first.astype(np.int32),
        "decoder_attention_mask": decoded.astype(np.int32),
    }


def run(model: Any, batch: dict[str, np.ndarray], **options: Any) -> Any:
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        return model(**{name: torch.from_numpy(array).long() for name, array in batch.items()}, **options)


def assert_close(found: Any, expected: Any, where: Any = None) -> None:
    expected, found = np.asarray(expected), np.asarray(found)
    if where is not None:
        expected, found = expected[where], found[where]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_hugging_face(kind: str, tmp_path: Path):
    theirs = random_t5(kind)
    model, params = load(saved(tmp_path, kind, theirs))
    for length, targets in ((1, 1), (7, 3), (33, 9)):
        batch = random_batch(length, targets)
        expected = run(theirs, batch, output_hidden_states=True)
        found = model.apply(params, batch, returns=("hidden",))
        own = batch["decoder_attention_mask"] > 0  # what stands at padding is nobody's business
        assert found.hidden is not None
        assert_close(found.logits, expected.logits, own)
        encoded = expected.encoder_hidden_states[:-1]  # theirs ends with the normalised state
        for ours, other in zip(found.hidden, encoded, strict=False):
            assert_close(ours, other, batch["attention_mask"] > 0)
        decoded = expected.decoder_hidden_states[:-1]
        for ours, other in zip(found.hidden[len(encoded) + 1 :], decoded, strict=False):
            assert_close(ours, other, own)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_equals_hugging_face(kind: str, tmp_path: Path):
    theirs = random_t5(kind)
    model, params = load(saved(tmp_path, kind, theirs))
    batch = random_batch(9, 5)
    left = {name: array[:, ::-1].copy() if "decoder" not in name else array for name, array in batch.items()}
    assert (left["attention_mask"][:, 0] == 0).any()
    found = model.apply(params, left).logits
    assert_close(found, run(theirs, left).logits, left["decoder_attention_mask"] > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_equal_scaled_columns_in_pytorch(kind: str, tmp_path: Path, torch: Any):
    theirs = random_t5(kind)
    model, params = load(saved(tmp_path, kind, theirs))
    batch, gates = random_batch(7, 4), random_gates(model, params, fractional=True)
    readers = {"attention": "SelfAttention.o", "cross": "EncDecAttention.o", "ffn": "DenseReluDense.wo"}
    with torch.no_grad():
        for name, gate in gates.items():
            stack, layer, module, _ = name.split(".")
            place = {"attention": 0, "cross": 1, "ffn": 2 if stack == "decoder" else 1}[module]
            reader = theirs.get_submodule(f"{stack}.block.{layer}.layer.{place}.{readers[module]}")
            wide = np.repeat(np.asarray(gate), reader.weight.shape[1] // len(gate))
            reader.weight *= torch.from_numpy(wide)[None]
    found = model.apply(params, batch, gates).logits
    assert_close(found, run(theirs, batch).logits, batch["decoder_attention_mask"] > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_close_as_hugging_face(kind: str, tmp_path: Path, torch: Any):
    """Both round in other places; ours must not be further from float32 than twice theirs."""
    theirs = random_t5(kind)
    folder, batch = saved(tmp_path, kind, theirs), random_batch(9, 5)
    own = batch["decoder_attention_mask"] > 0
    exact = np.asarray(run(theirs, batch).logits)[own]
    rounded = np.asarray(run(theirs.to(torch.bfloat16), batch).logits.float())[own]
    model, params = load(folder, dtype=jnp.bfloat16)
    found = model.apply(params, batch).logits
    assert found is not None and found.dtype == jnp.float32
    errors = [np.sqrt(np.mean(np.square(other - exact))) for other in (np.asarray(found)[own], rounded)]
    assert 0 < errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_any_of_its_names(kind: str, name: str, tmp_path: Path):
    folder = saved(tmp_path / "hf", kind, random_t5(kind))
    config = assert_as_hugging_face(changed(folder, lambda t: {name if k == "shared.weight" else k: t[k] for k in t}))
    assert config.tied == KINDS[kind]["tie_word_embeddings"]
    model, params = load(folder)
    small = save(tmp_path / "own", model, params)  # our own folder says the same
    assert (load(small)[0].config.tied, load(small)[0].config.scaled) == (config.tied, config.scaled)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_version_4_say_whether_they_are_tied(kind: str, tmp_path: Path):
    flag = KINDS[kind]["tie_word_embeddings"]
    folder = saved(tmp_path, kind, random_t5(kind))
    config = assert_as_hugging_face(changed(folder, lambda t: t, tie_word_embeddings=flag, scale_decoder_outputs=None))
    assert (config.tied, config.scaled) == (flag, kind == "t5 1.0")


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_layer_is_that_of_the_file_or_the_table(kind: str, tmp_path: Path):
    """Whatever the flag: one that differs is used, one that is equal or absent is the table."""
    folder = saved(tmp_path, kind, random_t5(kind))
    table = load_file(folder / "model.safetensors")["shared.weight"]
    for other, tied in ((table[::-1].copy(), False), (table, True)):
        assert assert_as_hugging_face(changed(folder, lambda t, o=other: t | {"lm_head.weight": o})).tied == tied
    without = changed(folder, lambda t: {k: t[k] for k in t if k != "lm_head.weight"}, tie_word_embeddings=False)
    assert assert_as_hugging_face(without).tied
    only = changed(folder, lambda t: {"lm_head.weight" if k == "shared.weight" else k: t[k] for k in t})
    assert assert_as_hugging_face(only).tied


def test_tables_that_differ_are_refused(tmp_path: Path):
    folder = saved(tmp_path, "t5 1.0", random_t5("t5 1.0"))
    changed(folder, lambda t: t | {"decoder.embed_tokens.weight": t["shared.weight"] + 1})
    with pytest.raises(ValueError, match=r"differ: shared\.weight and decoder\.embed_tokens\.weight"):
        load(folder)

"""Logits of checkpoints as transformers saves them: other names of a type, and T5's tables, tied and scaled or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxprune as jp

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4  # of the scale: float32, other order of sums
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 66,
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "camembert", "data2vec-text", "electra", "ernie")


def lively(model: Any, seed: int) -> Any:
    """The model with weights in which everything matters."""
    torch = pytest.importorskip("torch")

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder_config(model_type: str, random: np.random.Generator) -> dict[str, Any]:
    """Settings of a tiny encoder: what its type offers, drawn."""
    activation = str(random.choice(["gelu", "gelu_new", "relu"]))
    if model_type == "distilbert":
        return {"vocab_size": 60, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 20, "activation": activation}
    config = SIZES | {"hidden_act": activation, "layer_norm_eps": float(random.choice([1e-12, 1e-2]))}
    config["type_vocab_size"] = int(random.choice([1, 2]))
    return config | ({"embedding_size": 24} if model_type == "electra" else {})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_equal_hugging_face(model_type: str, seed: int, tmp_path: Path):
    torch = pytest.importorskip("torch")
    import transformers

    random = np.random.default_rng([seed, *model_type.encode()])
    kind = ["AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"][seed % 2]
    labels = 2 if "Question" in kind else int(random.integers(2, 5))
    config = transformers.AutoConfig.for_model(model_type, num_labels=labels, **encoder_config(model_type, random))
    theirs = lively(getattr(transformers, kind).from_config(config), seed)
    theirs.save_pretrained(tmp_path)
    model, params = jp.load(tmp_path)
    ids, mask = random.integers(4, 60, (3, 9)), np.ones((3, 9), np.int64)
    mask[1, 5:], ids[1, 5:] = 0, config.pad_token_id
    with torch.no_grad():
        output = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    spans = "Question" in kind
    expected = torch.stack([output.start_logits, output.end_logits], 1) if spans else output.logits
    ours, expected = (
        np.asarray(model.apply(params, {"input_ids": ids, "attention_mask": mask}).logits),
        expected.numpy(),
    )
    if spans:
        real = np.broadcast_to(mask[:, None] > 0, expected.shape)
        ours, expected = ours[real], expected[real]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def text_model(model_type: str, seed: int, **settings: Any) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=64,
        d_model=32,
        d_kv=6,
        num_heads=4,
        d_ff=24,
        num_layers=2,
        decoder_start_token_id=0,
        **settings,
    )
    return lively(transformers.AutoModelForSeq2SeqLM.from_config(config), seed)


def assert_alike(folder: Path) -> Any:
    """Compares the logits of a folder with those of transformers, which reads it too; returns our configuration."""
    torch = pytest.importorskip("torch")
    import transformers

    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).float().eval()
    ids = np.array([[5, 6, 7, 8, 1, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).astype(np.int64),
        "decoder_input_ids": np.array([[0, 9, 10]]),
    }
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(rows) for name, rows in batch.items()}).logits.numpy()
    model, params = jp.load(folder)
    ours = np.asarray(model.apply(params, batch).logits)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    again = jp.save(folder.with_name(folder.name + "_again"), model, params)
    loaded, same = jp.load(again)
    np.testing.assert_array_equal(np.asarray(loaded.apply(same, batch).logits), ours)
    return model.config


def rewrite(folder: Path, *, flag: bool | None = None, **changes: Any) -> None:
    """Changes a saved folder: the flag of its configuration, and its tensors, None taking one out."""
    raw = json.loads((folder / "config.json").read_text())
    if flag is not None:  # as version 4 wrote it
        raw.pop("scale_decoder_outputs", None)
        raw["tie_word_embeddings"] = flag
        (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: array for name, array in tensors.items() if array is not None}, folder / "model.safetensors")


OUTPUT = np.random.default_rng(9).standard_normal((64, 32)).astype(np.float32)


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_output_layers_equal_hugging_face(
    model_type: str, projection: str, output: bool, flag: bool | None, tmp_path: Path
):
    text_model(model_type, 0, feed_forward_proj=projection).save_pretrained(tmp_path / "a")
    rewrite(tmp_path / "a", flag=flag, **({"lm_head.weight": OUTPUT} if output else {}))
    config = assert_alike(tmp_path / "a")
    assert config.tied != output and (model_type == "t5" or not config.scaled)


def test_a_model_that_transformers_saves_again(tmp_path: Path):
    import transformers

    for model_type in ("t5", "mt5"):
        first, again = tmp_path / model_type, tmp_path / f"{model_type}_5"
        text_model(model_type, 1).save_pretrained(first)
        rewrite(first, flag=False, **{"lm_head.weight": OUTPUT})
        transformers.AutoModelForSeq2SeqLM.from_pretrained(first).save_pretrained(again)
        config = assert_alike(again)
        assert not config.tied and not config.scaled

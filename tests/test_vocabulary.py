"""Cut vocabularies: texts of kept tokens are split and computed as before, and everything special stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import make_place, record_of, run
from tiny import lively, tiny_config

import jaxprune as jp
from jaxprune.checkpoints.vocabulary import cut_vocabulary
from jaxprune.models import Model, family
from jaxprune.models.layers import TaskHead
from jaxprune.units import Params

CORPUS = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().split("\n")
KEPT, OTHERS = CORPUS[:20], CORPUS[20:90]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tokenizer_of(kind: str) -> Any:
    """A tokenizer that learned its tokens from a text of this repository."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    more: dict[str, Any] = {
        "vocab_size": 700 if "BPE" in kind else 400,
        "special_tokens": SPECIAL,
        "show_progress": False,
    }
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(**more)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**more, unk_token="<unk>")
    elif kind == "BPE of pieces":  # as of Llama 2 and Gemma: what is not in it is spelt in bytes
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        more["special_tokens"] = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(**more, initial_alphabet=[chr(0x4E00 + i) for i in range(60)])
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**more, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def model_of(kind: str, folder: Path, model_type: str = "bert") -> tuple[Model, Params]:
    """A tiny model with such a tokenizer."""
    tokenizer = tokenizer_of(kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | named))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "max_length": 20}))
    raw = tiny_config(
        model_type, layers=1, embed=16, attention_heads=4, neurons=8, vocab=tokenizer.get_vocab_size() + 3
    )
    raw |= {"pad_token_id": 0 if model_type != "roberta" else 1, "eos_token_id": 2}
    heads = () if model_type in ("llama", "t5") else (TaskHead(name="task", labels=("no", "yes")),)
    model = Model(family(model_type).parse_config(raw, heads), folder)
    return model, lively(model)


def counts_of(model: Model, texts: list[str]) -> np.ndarray:
    ids = [i for row in model.tokenizer(texts)["input_ids"] for i in row]
    return np.bincount(ids, minlength=model.config.vocab)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama", "t5"])
@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE", "BPE of pieces"])
def test_texts_of_kept_tokens_are_split_and_computed_as_before(kind: str, model_type: str, tmp_path: Path):
    model, params = model_of(kind, tmp_path, model_type)
    cut = cut_vocabulary(model, params, counts_of(model, KEPT))
    assert len(cut.kept) == cut.model.config.vocab < model.config.vocab - 20
    number, rows, checked = {int(old): new for new, old in enumerate(cut.kept)}, [], 0
    for text in [*KEPT, *OTHERS]:
        before, after = (each.tokenizer(text)["input_ids"] for each in (model, cut.model))
        if {*before} <= number.keys():
            checked += text in OTHERS
            assert after == [number[i] for i in before]
            assert cut.model.tokenizer.decode(after) == model.tokenizer.decode(before)
            rows += [before[:12]] * (len(before) >= 12)
    assert checked and len(rows) > 5  # some of the other texts need no other token
    wide, small = np.array(rows), np.array([[number[i] for i in row] for row in rows])
    expected, found = (
        np.asarray(each.apply(arrays, batch_of(each, ids)).logits)
        for each, arrays, ids in ((model, params, wide), (cut.model, cut.params, small))
    )
    expected = expected[..., cut.kept] if model.answers_in_text else expected
    np.testing.assert_allclose(found, expected, atol=1e-5)


def batch_of(model: Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return batch | ({"decoder_input_ids": ids[:, :3]} if len(model.stacks) > 1 else {})


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE", "BPE of pieces"])
def test_what_is_special_stays_and_other_texts_can_be_spelt(kind: str, tmp_path: Path):
    model, params = model_of(kind, tmp_path)
    cut = cut_vocabulary(model, params, np.zeros(0, int))
    for name in ("pad", "bos", "eos", "unk"):
        assert getattr(cut.model.tokenizer, f"{name}_token") == getattr(model.tokenizer, f"{name}_token")
    words = cut.model.tokenizer("many films")["input_ids"]
    assert cut.model.tokenizer.unk_token_id not in words and len(words) > len(
        model.tokenizer("many films")["input_ids"]
    )
    assert len(cut.kept) < model.config.vocab / (1 if kind.startswith("BPE") else 2)
    letters = [chr(0x4E00 + i) for i in range(60)]
    assert not {*letters} & cut.model.tokenizer.get_vocab().keys()


def test_the_most_needed_tokens_stay(tmp_path: Path):
    model, params = model_of("WordPiece", tmp_path)
    counts = counts_of(model, CORPUS)
    least = len(cut_vocabulary(model, params, np.zeros(0, int)).kept)
    cut = cut_vocabulary(model, params, counts, least + 20)
    assert len(cut.kept) == least + 20
    gone = sorted(set(range(model.config.vocab)) - {*cut.kept.tolist()})
    always = cut_vocabulary(model, params, np.zeros(0, int)).kept
    chosen = sorted({*cut.kept.tolist()} - {*always.tolist()})
    assert counts[chosen].min() >= counts[gone].max()
    with pytest.raises(ValueError, match=f"a vocabulary of 3 tokens cannot be reached.*{least}"):
        cut_vocabulary(model, params, counts, 3)


def test_it_is_saved_and_loaded_and_ids_are_renamed(tmp_path: Path):
    (tmp_path / "dense").mkdir()
    model, params = model_of("BPE", tmp_path / "dense", "llama")
    cut = cut_vocabulary(model, params, counts_of(model, KEPT))
    read, arrays = jp.load(jp.save(tmp_path / "small", cut.model, cut.params))
    assert read.config.vocab == arrays["embeddings"]["word"]["embedding"].shape[0] == len(cut.kept)
    ends = json.loads((tmp_path / "small" / "generation_config.json").read_text())["eos_token_id"]
    assert [int(cut.kept[i]) for i in ends] == [2, 1] and read.config.end_ids == (ends[0],)
    assert read.tokenizer(KEPT)["input_ids"] == cut.model.tokenizer(KEPT)["input_ids"]
    assert (
        len(jp.generate(read, arrays, {k: np.array(v) for k, v in read.tokenizer(["a"]).items()}, max_new_tokens=2))
        == 1
    )


def test_a_padding_token_at_the_end_keeps_no_others(tmp_path: Path):
    model, params = model_of("Unigram", tmp_path, "llama")
    last = model.config.vocab - 4
    raw = json.loads(model.config.raw) | {"pad_token_id": last}
    model = replace(model, config=family("llama").parse_config(raw, ()))
    cut = cut_vocabulary(model, params, np.zeros(0, int))
    assert len(cut.kept) < model.config.vocab / 2 and cut.kept[cut.model.config.pad_id] == last


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path):
    model, params = model_of("BPE", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the tokenizer is a WordLevel"):
        cut_vocabulary(replace(model), params, np.zeros(0, int))


def test_the_command(tmp_path: Path):
    place = make_place(tmp_path)
    few = ("--task", "mood", "--data", place.data, "--criterion", "magnitude", "--units", 0.5, "--recover", "none")
    record = record_of("prune", place.model, *few, "--measure", 2, "--vocabulary", "data", "-o", place.folder / "small")
    words = record["vocabulary"]
    assert words["after"] < words["before"] and words["covered"] == 1.0 and words["tested"] > 0
    read, _ = jp.load(place.folder / "small")
    assert read.config.vocab == words["after"]
    evaluated = record_of("evaluate", place.folder / "small", "--task", "mood", "--data", place.data)["results"][0]
    assert evaluated["metrics"] == record["after"]["evaluation"]["metrics"]
    for arguments, message in (
        (("--vocabulary", "many"), "--vocabulary"),
        (("--vocabulary", 2), "cannot be reached"),
        (("--vocabulary", 0), "--vocabulary"),
    ):
        refused = run("prune", place.model, *few, *arguments, "-o", place.folder / "other")
        assert refused.exit_code == 2 and message in refused.stderr and not (place.folder / "other").exists()

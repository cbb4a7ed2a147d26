"""Tokenizers of any folder: their own files travel, a hostile one ends in one error that names its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import classifier_config, classifier_tensors, write_checkpoint, write_classifier

from jaxprune.checkpoints import folder as folders
from jaxprune.checkpoints.folder import load, save
from jaxprune.data.batches import encode
from jaxprune.data.tasks import Example
from jaxprune.models import Model, tokenizers
from jaxprune.models.tokenizers import run_tokenizer

PIECES = [("T5Tokenizer", "spiece.model"), ("XLMRobertaTokenizer", "sentencepiece.bpe.model")]
WORDS = [f"{letter}@@" for letter in "abcdehimpy"] + [*"abcdehimpy", "phim", "hay"]


def write_phobert(folder: Path) -> Path:
    """A RoBERTa whose tokenizer has `bpe.codes` beside its words, and is named in `config.json` alone."""
    config = classifier_config("roberta") | {"tokenizer_class": "PhobertTokenizer"}
    write_checkpoint(folder, config, classifier_tensors(config))
    (folder / "vocab.txt").write_text("\n".join(f"{word} {1000 - i}" for i, word in enumerate(WORDS)))
    (folder / "bpe.codes").write_text("h a 10\np h 9\nha y</w> 8\nph i 7\nphi m</w> 6\n")
    return folder


def test_every_file_that_a_tokenizer_names_travels(tmp_path):
    source = write_phobert(tmp_path / "hf")
    model, params = load(source)
    copy = load(save(tmp_path / "out", model, params))[0]
    assert (tmp_path / "out" / "bpe.codes").read_bytes() == (source / "bpe.codes").read_bytes()
    assert copy.tokenizer.tokenize("phim hay") == model.tokenizer.tokenize("phim hay") == ["phim", "hay"]
    again = load(save(tmp_path / "again", copy, params))[0]  # its model type is one that transformers does not know
    assert again.tokenizer.tokenize("phim hay") == ["phim", "hay"]


def test_every_file_that_a_tokenizer_names_is_fetched_from_the_hub(tmp_path, monkeypatch):
    source, asked = write_phobert(tmp_path / "hf"), []

    def snapshot_download(name: str, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("vinai/phobert")[0].source == source
    assert "bpe.codes" in asked and not [name for name in asked if "bin" in name]


def test_nothing_is_saved_without_a_tokenizer_that_can_be_opened(tmp_path, monkeypatch):
    model, params = load(write_phobert(tmp_path / "hf"))
    monkeypatch.setattr(folders, "tokenizer_files", lambda tokenizer: ("vocab.txt",))
    with pytest.raises(ValueError, match=r"out is not saved, as its copy of the tokenizer cannot be opened: no"):
        save(tmp_path / "out", model, params)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_nothing_is_saved_with_another_tokenizer(tmp_path, monkeypatch):
    model, params = load(write_phobert(tmp_path / "hf"))
    monkeypatch.setattr(folders, "files_of_tokenizer", lambda *_: {"vocab.txt": b"hay 1\n", "bpe.codes": b"h a 1\n"})
    with pytest.raises(ValueError, match=r"out is not saved, as its copy of the tokenizer in .*hf is another one"):
        save(tmp_path / "out", model, params)
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("kind", "file"), [("T5Tokenizer", "spiece.model"), ("XLMRobertaTokenizer", "sentencepiece.bpe.model")]
)
def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path, kind, file):
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the film number {i} was {word}" for i in range(50) for word in ("good", "bad", "long")))
    special: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if kind == "T5Tokenizer" else {}
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=34, model_type="unigram", minloglevel=2, **special
    )
    folder = write_classifier(tmp_path / "hf")
    (folder / file).write_bytes((tmp_path / "m.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "extra_ids": 0}))
    model, params = load(folder)
    pieces = model.tokenizer.tokenize("the film was good")
    assert "".join(pieces) == "▁the▁film▁was▁good" and model.tokenizer.unk_token not in pieces
    assert load(save(tmp_path / "out", model, params))[0].tokenizer.tokenize("the film was good") == pieces


def hostile(folder: Path, **changes: Any) -> Model:
    """A model with a fast tokenizer of these parts."""
    write_classifier(folder)
    words = {"[UNK]": 0, "[PAD]": 1, "a": 2}
    parts = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(parts | changes))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load(folder)[0]


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


CHARSMAP = "AAAA////AAAAAAAA"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": sequence(*[replace({"String": "a"}, "aa")] * 64)}, "10,000 times as long"),
        ({"normalizer": sequence(*[replace({"Regex": "x*"}, "a")] * 64)}, "10,000 times as long"),
        ({"normalizer": replace({"String": "a"}, "a" * 20_000)}, "10,000 times as long"),
        ({"decoder": {"type": "Sequence", "decoders": [replace({"String": "a"}, "aaa")] * 40}}, "10,000 times as long"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "precompiled_charsmap"),
        ({"pre_tokenizer": split("(")}, "."),
    ],
    ids=["doubling", "between characters", "one step", "decoder", "broken character map", "broken regex"],
)
def test_a_hostile_tokenizer_is_not_opened(tmp_path, capfd, changes: dict[str, Any], message: str):
    model = hostile(tmp_path / "hf", **changes)
    with pytest.raises(FileNotFoundError, match=rf"^no tokenizer could be read from .*hf: [^\n]*{message}[^\n]*$"):
        model.tokenizer  # noqa: B018
    assert capfd.readouterr() == ("", "")


def test_a_regex_that_backtracks_too_long_is_one_error(tmp_path, capfd):
    model = hostile(tmp_path / "hf", pre_tokenizer=split("(a+)+b"))
    for text in ("a" * 100, "a" * 1000):  # without a thread, and with one
        with pytest.raises(
            ValueError, match=r"^the tokenizer of .*hf cannot read these texts: [^\n]*retry-limit[^\n]*$"
        ):
            encode(model, [Example(text)])
    assert capfd.readouterr() == ("", "")  # a panic writes its message and a backtrace


def test_a_tokenizer_that_does_not_come_to_an_end_is_left(tmp_path, monkeypatch):
    model = hostile(tmp_path / "hf", pre_tokenizer=split("(a+)+b"))
    tokenizer = model.tokenizer
    monkeypatch.setattr(tokenizers, "SECONDS", 0.1)
    monkeypatch.setattr(tokenizers, "CHARACTERS", 1e9)
    start = time.monotonic()
    with pytest.raises(ValueError, match="cannot read these texts: it takes longer than 0 seconds"):
        encode(model, [Example(("a" * 16 + " ") * 300)])
    assert time.monotonic() - start < 5
    assert run_tokenizer(tokenizer, "a")["input_ids"] == [2]


def test_a_tokenizer_that_cannot_be_opened_is_copied_and_said(tmp_path):
    model = hostile(tmp_path / "hf", pre_tokenizer=split("("))
    _, params = load(tmp_path / "hf")
    with pytest.warns(UserWarning, match=r"^no tokenizer could be read .*as it stands: tokenizer\.json, tok"):
        save(tmp_path / "out", model, params)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()


def test_numbers_of_a_tokenizer_are_bounded(tmp_path):
    folder = write_classifier(tmp_path / "hf")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 10**9, "model_max_length": 10**30}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(FileNotFoundError, match=r"hf: extra_ids in tokenizer_config.json is 1000000000, expected"):
        load(folder)[0].tokenizer  # noqa: B018


@pytest.mark.parametrize("odd", [{"problem_type": "odd"}, {"num_labels": 10**12}, {"id2label": 5}])
def test_only_what_tells_the_tokenizer_is_taken_of_a_configuration(tmp_path, odd):
    model = hostile(tmp_path / "hf")
    config = json.loads(model.config.raw) | odd  # transformers would make as many names of labels
    assert model.source and tokenizers.open_tokenizer(model.source, json.dumps(config), (("vocab", 0, 0, 0),))


def test_what_the_tokenizers_say_does_not_get_into_the_output(tmp_path, capfd):
    model = hostile(tmp_path / "hf")
    odd = {"mask_token": {"content": "[MASK]", "odd": 1}}
    (tmp_path / "hf" / "special_tokens_map.json").write_text(json.dumps(odd))
    assert model.tokenizer.mask_token == "[MASK]"
    assert capfd.readouterr() == ("", "Ignored unknown kwarg option odd\n")


@pytest.mark.parametrize("write", [lambda: print("for users", file=__import__("sys").stderr), lambda: None])
def test_what_is_written_to_standard_error_meanwhile_arrives(capfd, write: Callable[[], None]):
    tokenizers._bounded(write, 10.0)
    assert capfd.readouterr().err in ("for users\n", "")

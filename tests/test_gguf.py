"""GGUF files: the same model as the folder with these weights, its tokenizer, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import write_checkpoint
from commands import run
from gguf_files import ARCHITECTURES, config_of, tensors_of, write_gguf

import jaxprune as jp
from jaxprune.checkpoints.folder import outline
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.checkpoints.weights import stored_type
from jaxprune.models import Model
from jaxprune.units import Params

KINDS = ("BF16", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
MORE_KINDS = ("F16", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "IQ4_XS")


def assert_same(found: tuple[Model, Params], expected: tuple[Model, Params]) -> None:
    """The same bits, and the same configuration but for how it is written."""
    assert replace(found[0].config, raw="") == replace(expected[0].config, raw="")
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_file_is_the_folder_with_its_weights(architecture: str, tmp_path: Path):
    config, path = config_of(architecture), tmp_path / "tiny.gguf"
    tensors = tensors_of(config)
    held = write_gguf(path, config, tensors)
    for name, array in held.items():
        np.testing.assert_allclose(array, tensors[name], atol=2e-7)  # 1 is added to Gemma's norms, and taken away
    found, expected = jp.load(path), jp.load(write_checkpoint(tmp_path / "folder", config, held))
    assert_same(found, expected)
    assert outline(path).digest == model_digest(*found)
    assert stored_type(found[0]) == "float32"


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE_KINDS)])
def test_rounded_weights_are_those_of_the_package(kind: str, tmp_path: Path):
    config = config_of("llama", 256 if "K" in kind or "XS" in kind else 32)
    held = write_gguf(tmp_path / "tiny.gguf", config, tensors_of(config), kind=kind)
    assert_same(jp.load(tmp_path / "tiny.gguf"), jp.load(write_checkpoint(tmp_path / "folder", config, held)))


def test_rows_are_turned_back_across_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of("llama") | {"attention_bias": True}
    held = write_gguf(tmp_path / "tiny.gguf", config, tensors_of(config), kind="Q8_0")
    monkeypatch.setattr("jaxprune.checkpoints.gguf._SLICE", 100)
    assert_same(jp.load(tmp_path / "tiny.gguf"), jp.load(write_checkpoint(tmp_path / "folder", config, held)))


def test_queries_keys_and_values_in_one_tensor(tmp_path: Path):
    config, path = config_of("qwen3"), tmp_path / "tiny.gguf"
    tensors = tensors_of(config)
    parts = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    separate = tuple(f"blk.1.attn_{part}.weight" for part in "qkv")
    write_gguf(path, config, tensors, more={"blk.1.attn_qkv.weight": np.concatenate(parts)}, without=separate)
    assert_same(jp.load(path), jp.load(write_checkpoint(tmp_path / "folder", config, tensors)))
    for name, message in (("blk.1", "its attn_qkv of layer 1 has the shape (32, 32), expected 64 rows"),
                          ("blk.2", "it has tensors that a qwen3 has not: blk.2.attn_qkv.weight")):  # fmt: skip
        write_gguf(path, config, tensors, more={f"{name}.attn_qkv.weight": parts[0]}, without=separate)
        with pytest.raises(ValueError, match=re.escape(message)):
            jp.load(path)


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def divisors(config: dict[str, Any], factor: float, length: int) -> np.ndarray:
    """What llama.cpp stores of the positions of Llama 3."""
    rates = config["rope_theta"] ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((length * rates / (2 * np.pi) - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def test_positions_of_llama_3_are_found_in_what_they_come_to(tmp_path: Path):
    config = config_of("llama", 128) | {"rope_theta": 500_000.0}
    more = {"rope_freqs.weight": divisors(config, 8.0, 8192)}
    held = write_gguf(tmp_path / "tiny.gguf", config, tensors_of(config), more=more)
    config["rope_scaling"] = SCALED | {"original_max_position_embeddings": 8192}
    assert_same(jp.load(tmp_path / "tiny.gguf"), jp.load(write_checkpoint(tmp_path / "folder", config, held)))
    more["rope_freqs.weight"] = np.linspace(1, 8, 16, dtype=np.float32)
    write_gguf(tmp_path / "other.gguf", config, tensors_of(config), more=more)
    with pytest.raises(ValueError, match=r"other\.gguf cannot be read: its rope_freqs\.weight does not stretch"):
        jp.load(tmp_path / "other.gguf")


def test_linear_positions(tmp_path: Path):
    for architecture in ("qwen2", "gemma3"):
        config = config_of(architecture)
        settings = {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": 4.0}
        held = write_gguf(tmp_path / "tiny.gguf", config, tensors_of(config), settings=settings)
        config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
        folder = write_checkpoint(tmp_path / architecture, config, held)
        assert_same(jp.load(tmp_path / "tiny.gguf"), jp.load(folder))


def test_every_token_that_ends_a_text_is_known(tmp_path: Path):
    config = config_of("llama")
    settings = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.padding_token_id": 3, "somebody.made_it": "me"}
    write_gguf(tmp_path / "tiny.gguf", config, tensors_of(config), settings=settings)
    found = jp.load(tmp_path / "tiny.gguf")[0].config
    assert (found.end_ids, found.pad_id) == ((1, 7), 3)


REFUSED = [
    ({"llama.block_count": 3}, "it has 3 layers, and the names of the tensors number 2"),
    ({"llama.block_count": 2**31 - 1}, "it has 2,147,483,647 layers, but 21 tensors"),
    ({"llama.block_count": "two"}, "its block_count is 'two', expected a number"),
    ({"llama.block_count": None}, "its block_count is missing, expected a count, the same for all layers"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "its attention.layer_norm_rms_epsilon is missing"),
    ({"llama.embedding_length": 64}, "wrong shape: model.embed_tokens.weight is [40, 32], expected [40, 64]"),
    ({"llama.attention.head_count": [4, 2]}, "self_attn.q_proj.weight is [32, 32], expected [16, 32]"),
    ({"llama.attention.head_count": [4]}, "its attention.head_count is array([4], dtype=int32), expected one"),
    ({"llama.attention.head_count_kv": [2, 0]}, "its layer 1 has 4 heads for 0 key-value heads, expected a multiple"),
    ({"llama.attention.head_count_kv": [3, 2]}, "its layer 0 has 4 heads for 3 key-value heads, expected a multiple"),
    ({"llama.attention.head_count": [4, 0], "llama.attention.head_count_kv": [2, 0]},
     "it has tensors that a llama has not: blk.1."),
    ({"llama.attention.head_count": 0, "llama.attention.head_count_kv": 0}, "tensors that a llama has not: blk.0."),
    ({"llama.feed_forward_length": [64, 0]}, "its feed_forward_length is array([64, 0], dtype=int32), expected one of"),
    ({"llama.attention.key_length": 0}, "its attention.key_length is 0, expected a count"),
    ({"llama.rope.dimension_count": 4}, "its rope.dimension_count is 4, supported: 8"),
    ({"llama.rope.scaling.type": "yarn"}, "positions of full_attention are 'yarn', supported: default, linear"),
    ({"llama.expert_count": 8}, "its expert_count is 8, supported: 0"),
    ({"llama.logit_scale": 2.0}, "its settings logit_scale of a llama are not known"),
    ({"llama.attention.sliding_window": 8}, "its settings attention.sliding_window of a llama are not known"),
    ({"general.type": "adapter"}, "its general.type is 'adapter', supported: model"),
    ({"split.count": 2}, "its split.count is 2, supported: 1"),
    ({"general.alignment": 0}, "its general.alignment is 0, expected a number of bytes"),
    ({"tokenizer.ggml.eos_token_id": 40}, "its eos_token_id is 40, but it has 40 tokens"),
    ({"tokenizer.ggml.model": "bert"}, "its tokenizer is bert, missing, supported: llama, and gpt2 with gpt-2, smollm"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}, "its tokenizer is gpt2, 'new', supported"),
    ({"tokenizer.ggml.model": "llama"}, "its tokens have no scores, or more than 1,000 characters"),
    ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "a"]},
     "it has 2 tokens, 1 of them different, 2 kinds of tokens and 40 embeddings"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), REFUSED)
def test_settings_that_cannot_be_used(settings: dict[str, Any], expected: str, tmp_path: Path):
    config = config_of("llama")
    write_gguf(tmp_path / "tiny.gguf", config, tensors_of(config), settings=settings)
    result = run("inspect", tmp_path / "tiny.gguf")
    assert result.exit_code == 2
    assert expected in result.stderr and str(tmp_path / "tiny.gguf") in result.stderr
    assert result.stderr.count("\n") == 1 and not result.stdout


def test_tensors_that_cannot_be_used(tmp_path: Path):
    config, path = config_of("llama"), tmp_path / "tiny.gguf"
    tensors = tensors_of(config)
    write_gguf(path, config, tensors, without=("blk.1.ffn_up.weight",))
    with pytest.raises(ValueError, match=r"tiny\.gguf .*; missing: layers\.1\.mlp\.up_proj\.weight\."):
        jp.load(path)
    write_gguf(path, config, tensors, without=("token_embd.weight",))
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read: it has no tensor 'token_embd\.weight'"):
        jp.load(path)
    write_gguf(path, config, tensors, more={"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"tensors that a llama has not: blk\.0\.ffn_gate_exps\.weight"):
        jp.load(path)
    write_gguf(path, config, tensors, more={"rope_freqs.weight": np.ones((2, 2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"'rope_freqs\.weight' has the shape \(2, 2, 2\), expected one or two sizes"):
        jp.load(path)
    write_gguf(path, config, tensors, more={"blk.0.ffn_up.bias": np.ones(2, np.int32)})
    with pytest.raises(ValueError, match=r"'blk\.0\.ffn_up\.bias' has type 26, supported: F32, F16, BF16, Q4_0"):
        jp.load(path)
    write_gguf(path, config | {"model_type": "qwen3"}, tensors)
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"phi17"))
    with pytest.raises(
        ValueError, match=r"its general\.architecture is 'phi17', supported: llama, qwen2, qwen3, seed_oss, gemma3"
    ):
        jp.load(path)


TOKENS_KEY = b"tokenizer.ggml.tokens"


def test_counts_of_a_header_are_bounded_by_the_file(tmp_path: Path):
    config, path = config_of("llama"), tmp_path / "tiny.gguf"
    write_gguf(path, config, tensors_of(config))
    whole = path.read_bytes()
    for place in (8, 16, 24, whole.index(TOKENS_KEY) + len(TOKENS_KEY) + 8):  # tensors, settings, a name, tokens
        for count in (2**31, 2**62, 2**64 - 1):
            path.write_bytes(whole[:place] + count.to_bytes(8, "little") + whole[place + 8 :])
            with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read: "):
                jp.load(path)
    name = b"blk.0.ffn_up.weight"
    place = whole.index(name) + len(name) + 4 + 16 + 4  # of its first byte, after its axes and type
    path.write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
    with pytest.raises(ValueError, match=r"takes the bytes .*: it is truncated, or tensors overlap"):
        jp.load(path)
    for size in (0, 3, 20, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read: .*(truncated|does not begin)"):
            jp.load(path)


def test_the_package_that_reads_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(ValueError, match=r"tiny\.gguf needs another package: pip install 'jaxprune\[gguf\]'"):
        jp.load(tmp_path / "tiny.gguf")


def test_names_of_files(tmp_path: Path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"tiny\.gguf is not on the hub: revision='main' is"):
        jp.load(tmp_path / "tiny.gguf", revision="main")
    with pytest.raises(FileNotFoundError, match=r"other\.gguf"):
        jp.load(tmp_path / "other.gguf")


# Tokenizers


CORPUS = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().split("\n")
TEXTS = (
    "The dog isn't  here: 1234 words, café!",
    " leading",
    "\uff21\ufb01ne e\u0301 ☃",
    "a <bot>the<end> dog  ",
    "\n\ntests\n",
    "",
)


def saved_tokenizer(folder: Path, tokens: list[str], settings: dict[str, Any]) -> Any:
    """The tokenizer of a GGUF file, which is also that of the folder that the model is saved in."""
    config = config_of("llama") | {"vocab_size": len(tokens)}
    settings = {f"tokenizer.ggml.{name}": value for name, value in {"tokens": tokens, **settings}.items()}
    settings["tokenizer.chat_template"] = "{{ messages[0].content }}!"
    write_gguf(folder / "tiny.gguf", config, tensors_of(config), settings=settings)
    model, params = jp.load(folder / "tiny.gguf")
    saved = jp.load(jp.save(folder / "saved", model, params), dtype=None)
    jax.tree.map(np.testing.assert_array_equal, saved[1], params)
    for each in (model, saved[0]):
        assert each.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
    jp.export(folder / "again.gguf", *saved, to="gguf")
    again, _ = jp.load(folder / "again.gguf")
    for text in TEXTS:
        assert saved[0].tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
        assert again.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert again.tokenizer.special_tokens_map == model.tokenizer.special_tokens_map
    return model.tokenizer


def byte_vocabulary() -> tuple[Any, list[str], dict[str, Any]]:
    """A tokenizer as GPT-2's, its tokens, and what a GGUF file says of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<end>", "<bot>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokens = [str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    kinds = [3, 3, *[1] * (len(tokens) - 2)]
    named = {"bos_token_id": 1, "eos_token_id": 0, "padding_token_id": 0}
    return tokenizer, tokens, {"model": "gpt2", "pre": "gpt-2", "merges": merges, "token_type": kinds, **named}


def test_tokens_of_bytes(tmp_path: Path):
    reference, tokens, settings = byte_vocabulary()
    found = saved_tokenizer(tmp_path, tokens, settings)
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<bot>", "<end>", "<end>")
    for text in (*TEXTS, *CORPUS[:40]):
        assert found(text)["input_ids"] == reference.encode(text).ids
        assert found.decode(found(text)["input_ids"]) == text


def test_tokens_of_qwen(tmp_path: Path):
    from transformers import Qwen2Tokenizer

    _, tokens, settings = byte_vocabulary()
    found = saved_tokenizer(tmp_path, tokens, settings | {"pre": "qwen2"})
    merges: Any = [tuple(merge.split(" ")) for merge in settings["merges"]]
    reference = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, eos_token="<end>")
    reference.add_special_tokens({"additional_special_tokens": ["<end>", "<bot>"]})
    for text in (*TEXTS, *CORPUS[:40]):
        assert found(text)["input_ids"] == reference(text)["input_ids"]


def test_digits_and_whole_words(tmp_path: Path):
    _, tokens, settings = byte_vocabulary()
    settings["token_type"].append(1)
    words = {}
    for pre in ("gpt-2", "smollm", "llama-bpe"):
        (tmp_path / pre).mkdir()
        tokenizer = saved_tokenizer(tmp_path / pre, [*tokens, "123"], settings | {"pre": pre})  # no merge makes it
        words[pre] = tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"])
    assert words["smollm"] == ["1", "2", "3", "4"]
    assert words["llama-bpe"] == ["<bot>", "123", "4"]  # which begins its texts so, unless the file says otherwise
    assert "123" not in words["gpt-2"]


@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_of_sentencepiece(prefix: bool, tmp_path: Path):
    import sentencepiece

    own = [] if prefix else ["\n", "\n\n", "<bot>", "▁▁"]
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "sp"), model_type="bpe", vocab_size=500,
        byte_fallback=True, user_defined_symbols=own, add_dummy_prefix=prefix, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))  # pyright: ignore
    pieces = [reference.id_to_piece(i) for i in range(500)][::-1]  # the order is that of the scores, not of the tokens
    kinds, scores = [], [float(reference.get_score(i)) for i in range(500)][::-1]
    for i in range(499, -1, -1):
        kind = {reference.is_byte(i): 6, reference.is_control(i): 3, reference.is_unknown(i): 2}.get(True, 1)
        kinds.append(4 if reference.id_to_piece(i) in own else kind)
    tokens = [piece.replace("▁", " ") if kind == 4 else piece for piece, kind in zip(pieces, kinds, strict=True)]
    ends = {
        f"{name}_token_id": pieces.index(piece)
        for name, piece in (("bos", "<s>"), ("eos", "</s>"), ("unknown", "<unk>"))
    }
    about = {"model": "llama", "scores": scores, "token_type": kinds, "add_space_prefix": prefix, **ends}
    found = saved_tokenizer(tmp_path, tokens, about)
    for text in (*TEXTS, *CORPUS[:40]):
        assert found(text)["input_ids"] == [499 - i for i in (reference.bos_id(), *reference.encode(text))], text
        assert found.decode(found(text)["input_ids"], skip_special_tokens=True) == text

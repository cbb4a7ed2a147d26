"""Damaged files of every format are refused in one line that names them, or read as they are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from subprocess import PIPE

import pytest
from checkpoints import classifier_config, classifier_tensors, write_checkpoint, write_classifier
from commands import WORDS
from faults import record
from mutations import CAMPAIGNS, ENDS, cases

from jaxprune.checkpoints.folder import load
from jaxprune.checkpoints.tensors import TensorFile

SEED = 20260102
CASES = {
    "models": 800, "texts": 300, "tokenizers": 500, "scores": 400, "gates": 300, "packed": 400, "totals": 300,
    "states": 300, "tables": 250, "rounds": 300, "rows": 900, "prompts": 400, "pruned": 200, "sweeps": 100,
    "augmented": 100, "gguf": 500, "caches": 50,
}  # fmt: skip
FEW = {"rows": 100}  # with the other tests; else 20


def test_every_campaign_has_its_number_of_cases():
    assert CASES.keys() == CAMPAIGNS.keys() and sum(CASES.values()) > 5000


@pytest.mark.parametrize("campaign", [name for name, own in CAMPAIGNS.items() if own.check])
def test_a_few_damaged_files_are_refused_or_give_what_is_in_them(tmp_path, campaign):
    few = FEW.get(campaign, 20)
    met = [(what, found) for _, what, found in cases(tmp_path, campaign, SEED + 1, 0, few, commands=False) if found]
    assert len(met) == few + 1
    assert [case for case in met[1:] if case[1] not in ENDS] == []


@pytest.mark.faults
@pytest.mark.parametrize("campaign", CASES)
def test_damaged_files_never_crash_hang_fill_the_memory_or_give_wrong_values(tmp_path, campaign):
    counts: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    done, count = 0, CASES[campaign]
    while done < count:
        folder = tmp_path / str(done)
        folder.mkdir()
        command = [sys.executable, str(Path(__file__).with_name("mutations.py")), str(folder), campaign]
        with (tmp_path / "errors").open("w+") as errors:  # a file, whose size says whether a case wrote into it
            worker = subprocess.run([*command, str(SEED), str(done), str(count)], stdout=PIPE, stderr=errors, text=True)
            errors.seek(0)
            said = errors.read()[-2000:]
        lines = [json.loads(line) for line in worker.stdout.splitlines()]
        assert lines, said
        if worker.returncode:  # a case ended the worker
            assert lines[-1][2] is None, said
            lines[-1][2] = f"the worker ended with {worker.returncode}: {said[-300:]}"
        for number, what, found in lines:
            if found is not None and number >= 0:
                counts.setdefault(what.partition(":")[0], Counter())[found if found in ENDS else "wrong"] += 1
                done = number + 1
                if found not in ENDS:
                    wrong.append(f"{number}, {what}: {found}")
        shutil.rmtree(folder)
    totals = Counter(name for own in counts.values() for name in own.elements())
    print(json.dumps(totals), *wrong, sep="\n")
    assert sum(totals.values()) == count
    by_file = {name: dict(own) for name, own in sorted(counts.items())}
    record(f"mutated_{campaign}", {"seed": SEED, "cases": count, "outcomes": dict(totals), "by_file": by_file})
    assert wrong == []


# Holes that were found


def test_half_a_character_in_a_header_is_refused(tmp_path):
    header = b'{"a\\ud83d": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    header += b" " * (-len(header) % 8)
    file = tmp_path / "half.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="its header holds half of a character"):
        TensorFile(file)


@pytest.mark.parametrize("layers", [3, 2**31 - 1])
def test_more_layers_than_the_tensors_number_are_refused_before_any_is_described(tmp_path, layers):
    folder = write_classifier(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(
        ValueError, match=rf"it has {layers:,} layers, and the names of the tensors number 2\."
    ) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 2**31 - 1, "id2label": None}, "num_labels is 2147483647, expected a number of labels below"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": [3]}, "id2label is .3., expected an object"),
        ({"id2label": {"0": "a", "1": ["b"], "2": "c"}}, "id2label has a label of type list, expected text"),
    ],
)
def test_a_head_that_a_configuration_makes_up_is_refused(tmp_path, changes, message):
    config = classifier_config("bert")
    folder = write_checkpoint(tmp_path / "hf", config | changes, classifier_tensors(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def with_words(folder: Path, words: str) -> Path:
    write_classifier(folder)
    (folder / "vocab.txt").write_text(words)
    (folder / "tokenizer_config.json").write_bytes((WORDS / "tokenizer_config.json").read_bytes())
    return folder


SPECIAL = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"


def test_a_tokenizer_is_read_again_when_its_folder_is_replaced(tmp_path):
    folder = with_words(tmp_path / "hf", f"{SPECIAL}one\ntwo\n")
    assert load(folder)[0].tokenizer("two")["input_ids"][1] == 6
    kept = load(folder)[0].tokenizer
    assert load(folder)[0].tokenizer is kept
    folder.rename(tmp_path / "old")
    with_words(tmp_path / "hf", f"{SPECIAL}two\none\n")
    os.utime(folder / "vocab.txt", ns=(0, (tmp_path / "old" / "vocab.txt").stat().st_mtime_ns))
    assert load(folder)[0].tokenizer("two")["input_ids"][1] == 5


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"version": "1.0", "model": {"type": "no"}}'])
def test_a_damaged_tokenizer_is_an_error_that_names_its_folder(tmp_path, content):
    folder = write_classifier(tmp_path / "hf")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="no tokenizer could be read from") as error:
        load(folder)[0].tokenizer  # noqa: B018
    assert str(folder) in str(error.value)


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(tmp_path):
    folder = with_words(tmp_path / "hf", f"{SPECIAL}one\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\nclass Theirs: ...\n")
    with contextlib.suppress(FileNotFoundError):  # the library may know another class that reads the vocabulary
        load(folder)[0].tokenizer  # noqa: B018
    assert not (tmp_path / "trapped").exists()


def test_a_tokenizer_without_a_vocabulary_is_not_made_up(tmp_path):
    folder = write_classifier(tmp_path / "hf")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer could be read from .*: it has none of tokenizer\.json"):
        load(folder)[0].tokenizer  # noqa: B018

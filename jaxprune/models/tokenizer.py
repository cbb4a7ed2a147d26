"""Reads the tokenizer that lies beside a model's weights, once for every version of its files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")


def _versions(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells a changed file of a folder from the one before: name, place on the disk, size and time."""
    try:
        found = {file.name: file.stat() for file in folder.iterdir() if file.is_file()}
    except OSError as error:
        raise FileNotFoundError(f"no tokenizer could be read from {folder}: {error}") from error
    if not found.keys() & set(_VOCABULARIES):  # transformers would make one up that knows no word
        raise FileNotFoundError(f"no tokenizer could be read from {folder}: it has none of {', '.join(_VOCABULARIES)}.")
    return tuple((name, own.st_ino, own.st_size, own.st_mtime_ns) for name, own in sorted(found.items()))


def read_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer of a folder.

    Raises:
        FileNotFoundError: If there is none that can be read.
    """
    return _tokenizer(folder, _versions(folder))


@lru_cache(maxsize=8)
def _tokenizer(source: Path, versions: tuple[tuple[str, int, int, int], ...]) -> Any:
    from transformers import AutoTokenizer

    try:  # never run code that comes with a model, nor ask whether to
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever the parser happens to meet, plain Exception included
        raise FileNotFoundError(f"no tokenizer could be read from {source}: {error}") from error

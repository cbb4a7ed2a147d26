"""Opens the tokenizer of a model's folder and runs it, within bounds of time and growth: anybody may have made it.

No code of a folder is run, but its tokenizer is a small program: regular expressions that backtrack, replacements that
double a text, tables that are broken. Those end in one error that names the folder.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

# The files of usual tokenizers, and those by which texts are written; others say themselves which files they have
TOKENIZER_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
SECONDS = 60.0  # that a call may take, and
CHARACTERS = 20_000  # in each second beyond: a usual tokenizer reads fifty times as many
_FEW = 200  # characters: a thread would take longer than they do
LARGEST_GROWTH = 10_000  # times that a text may grow; ALBERT's grows up to 700 times
OTHER_FILES = re.compile(  # of a model's folder
    r"\..*|(generation_)?config\.json|(pruning|results)\.json|.+\.(bin|gguf|md|safetensors|index\.json|svg|zst)"
)
_TELLING = ("model_type", "tokenizer_class", "_name_or_path")  # of a configuration, which tokenizer it is
_MOST = 10**7  # tokens that a tokenizer's settings may ask for
_GROWTH = {"ByteLevel": 2, "Lowercase": 2, "BertNormalizer": 4, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18}
_streams = threading.RLock()
Result = TypeVar("Result")


def versions_of(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """The facts by which a changed file of a folder is noticed: name, place on the disk, size and time."""
    try:
        files = {file.name: file.stat() for file in folder.iterdir() if file.is_file()}
    except OSError as error:
        raise FileNotFoundError(f"no tokenizer could be read from {folder}: {error}") from error
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(files.items()))


@lru_cache(maxsize=8)
def open_tokenizer(folder: Path, config: str, versions: tuple[tuple[str, int, int, int], ...]) -> Any:
    """The Hugging Face tokenizer in a folder.

    Args:
        folder: The folder.
        config: The model's configuration in JSON: its model type names the kind of tokenizer if nothing else does.
        versions: What `versions_of` the folder gives: another one, and it is opened again.

    Raises:
        FileNotFoundError: If there is none, or it is damaged.
    """

    def read() -> Any:
        from transformers import AutoConfig, AutoTokenizer

        _check_numbers(folder / "tokenizer_config.json")
        told = {name: value for name, value in json.loads(config).items() if name in _TELLING}
        known = AutoConfig.for_model(**told)
        # never run code that comes with a model, nor ask whether to
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=known, trust_remote_code=False, local_files_only=True
        )
        _check_growth(tokenizer)
        return tokenizer

    message = f"no tokenizer could be read from {folder}: "
    if all(OTHER_FILES.fullmatch(name) for name, *_ in versions):
        raise FileNotFoundError(f"{message}it has none of {', '.join(TOKENIZER_FILES)}.")
    try:
        tokenizer = _bounded(read, SECONDS, held=(1, 2))
    except Exception as error:  # a damaged file raises whatever the parser happens to meet
        raise FileNotFoundError(message + _line(error)) from error
    names = dict.fromkeys(("tokenizer.json", *_own_files(tokenizer)))
    if _own_files(tokenizer) and not any((folder / name).is_file() for name in names):  # made up, it knows no word
        raise FileNotFoundError(f"{message}it has none of {', '.join(names)}.")
    return tokenizer


def tokenizer_files(tokenizer: Any) -> tuple[str, ...]:
    """The names of all files that a tokenizer may have been read from."""
    return tuple(dict.fromkeys((*TOKENIZER_FILES, *_own_files(tokenizer))))


def files_of_kind(folder: Path) -> tuple[str, ...]:
    """The files that the kind of tokenizer has which a folder names, by name, without opening it."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    files = (folder / name for name in ("tokenizer_config.json", "config.json"))
    settings = [json.loads(file.read_bytes()) for file in files if file.is_file()]
    kinds = [each.get("tokenizer_class") for each in settings if isinstance(each, dict)]
    kinds += [TOKENIZER_MAPPING_NAMES.get(str(each.get("model_type"))) for each in settings if isinstance(each, dict)]
    classes = [tokenizer_class_from_name(kind) for kind in kinds if isinstance(kind, str)]
    return tuple(dict.fromkeys(name for each in classes if each is not None for name in _own_files(each)))


def _own_files(tokenizer: Any) -> tuple[str, ...]:
    names = getattr(tokenizer, "vocab_files_names", {}).values()
    return tuple(name for name in names if Path(name).name == name)


def run_tokenizer(call: Callable[..., Result], texts: Any, *more: Any, **settings: Any) -> Result:
    """The result of a tokenizer, or of one of its methods, for texts or tokens.

    Raises:
        ValueError: If it fails or does not come to an end.
    """
    tokenizer = getattr(call, "__self__", call)
    characters = sum(len(text) if isinstance(text, str | list) else 1 for part in (texts, *more) for text in part or ())
    try:
        seconds = SECONDS + characters / CHARACTERS if characters > _FEW else None
        return _bounded(lambda: call(texts, *more, **settings), seconds)
    except Exception as error:
        where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(f"the tokenizer of {where} cannot read these texts: {_line(error)}") from error


def _bounded(call: Callable[[], Result], seconds: float | None, held: Sequence[int] = (2,)) -> Result:
    """Calls a function, in a thread that is left to itself after so many seconds; panics of Rust become errors.

    What is written meanwhile to the streams of the numbers `held` goes to standard error, unless there was an error.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    with _held(errors, held):
        if seconds is None:
            work()
        else:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(seconds)
    if errors and isinstance(errors[0], Exception | KeyboardInterrupt):
        raise errors[0]
    if errors:
        raise ValueError(_line(errors[0])) from errors[0]
    if not results:
        raise TimeoutError(f"it takes longer than {seconds:.0f} seconds")
    return results[0]


@contextlib.contextmanager
def _held(errors: Sequence[BaseException], streams: Sequence[int]) -> Iterator[None]:
    """Holds back what is written to streams until the end, where it is dropped if there were errors."""
    with _streams, contextlib.ExitStack() as stack:
        before: list[int] = []
        try:
            for stream in streams:
                before.append(os.dup(stream))
                stack.callback(os.close, before[-1])
        except OSError:  # it is closed
            yield
            return
        held = stack.enter_context(tempfile.TemporaryFile())
        for stream in streams:
            os.dup2(held.fileno(), stream)
        try:
            yield
        finally:
            for stream, each in zip(streams, before, strict=True):
                os.dup2(each, stream)
            held.seek(0)
            if not errors and (text := held.read()):
                os.write(2, text)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:500]


def _check_numbers(file: Path) -> None:
    settings = json.loads(file.read_bytes()) if file.is_file() else {}
    for name, value in settings.items():
        if type(value) in (int, float) and not abs(value) <= _MOST and name != "model_max_length":
            raise ValueError(f"{name} in {file.name} is {value!r}, expected at most {_MOST:,}")


def _check_growth(tokenizer: Any) -> None:
    """Refuses a tokenizer whose steps, one after the other, can make a text longer than `LARGEST_GROWTH` times."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # of a fast one; others are code of transformers
    if backend is None:
        return
    parts = backend.normalizer, backend.pre_tokenizer, backend.decoder
    before, between, after = (1.0 if part is None else _growth(json.loads(part.__getstate__())) for part in parts)
    if max(before * between, after) > LARGEST_GROWTH:
        raise ValueError(f"it can make a text more than {LARGEST_GROWTH:,} times as long")


def _growth(step: dict[str, Any]) -> float:
    """A bound on the times by which a step of a tokenizer makes a text longer."""
    if step["type"] == "Sequence":
        return math.prod(_growth(each) for steps in step.values() if isinstance(steps, list) for each in steps)
    if step["type"] == "Replace":
        kind, pattern = next(iter(step["pattern"].items()))
        content = len(step["content"])
        if kind == "String" and pattern:
            return max(1.0, content / len(pattern))
        return 1.0 + content if content > 1 or _matches_nothing(pattern) else 1.0
    if step["type"] == "Precompiled":  # a trie, then its texts, each with a zero at the end
        charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
        return float(max(1, *map(len, charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0"))))
    return float(_GROWTH.get(step["type"], 1)) + len(step.get("prepend", ""))


def _matches_nothing(pattern: str) -> bool:
    """True if a regular expression may match between two characters."""
    try:
        return re.compile(pattern).match("") is not None
    except (re.error, RecursionError, OverflowError):
        return True

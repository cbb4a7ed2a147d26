"""Remembers what was computed from whole files, for as long as the files stay as they are.

A *stamp* is what the file system says of files: where they are, their sizes, and when they were last written or
changed. A program that writes a file gets the time of the change into it, whatever it does to the time of writing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from jaxprune import __version__
from jaxprune.checkpoints.files import write_atomic

SETTLED = 2.0  # seconds: what changed just now may change again and keep its times, which have steps


def stamp_of(files: Iterable[Path]) -> str | None:
    """The stamp of files; None if one of them changed just now, or its time is not to be trusted."""
    known: list[object] = [__version__]  # another version may compute something else
    now = time.time()
    for file in sorted({file.resolve() for file in files}):
        found = file.stat()
        if max(found.st_mtime, found.st_ctime) > now - SETTLED:
            return None
        known.append([str(file), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns])
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def recall(folder: Path, stamp: str | None) -> str | None:
    """What was remembered for files of this stamp; None: nothing, or nothing that can be read."""
    if stamp is None:
        return None
    try:
        kept = json.loads((folder / f"{stamp}.json").read_text())
    except (OSError, ValueError):
        return None
    found = kept.get("digest") if isinstance(kept, dict) else None
    return found if isinstance(found, str) else None


def remember(folder: Path, stamp: str | None, files: Iterable[Path], digest: str) -> None:
    """Remembers a digest of files that had this stamp before they were read, unless they have another one now.

    A folder that cannot be written to, or files that are gone, change nothing: the digest is computed again.
    """
    with contextlib.suppress(OSError):
        if stamp is not None and stamp_of(files) == stamp:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / f"{stamp}.json", json.dumps({"digest": digest}).encode())

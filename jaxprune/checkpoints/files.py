"""Writes files and folders so that a crash leaves the old one or the new one, and remembers digests of whole files.

Everything is first written beside its destination under a hidden name (`.NAME.saving-1a2b3c4d`), forced to disk, and
then renamed. What a killed process left under such a name is removed by the next save of the same name; a lock tells it
from the work of a process that is still alive.

Digests are remembered by the *stamp* of their files, which is what the file system says of them: where they are, their
sizes, and when they were last written or changed. A program that writes a file gets the time of the change into it,
whatever it does to the time of writing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import operator
import os
import re
import reprlib
import secrets
import shutil
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

from jaxprune import __version__

if sys.platform != "win32":
    import fcntl

_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h, RENAME_SWAP of macOS' sys/stdio.h
SETTLED = 2.0  # seconds: what changed just now may change again and keep its times, which have steps
_CURRENT_FOLDER = -100  # AT_FDCWD of linux/fcntl.h


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> Path:
    """Writes one file, which afterwards is the old one or the new one, whatever happens in between.

    Args:
        path: Where to. An existing file is replaced and keeps its mode; missing folders are made.
        content: The bytes, or a function that writes them to an open file.

    Returns:
        The path.

    Raises:
        FileExistsError: If a device, a pipe or a socket is there.
    """
    target = real_path(path)  # a symbolic link stays; the file behind it changes
    check_replaceable(Path(path))
    with _claimed(target, folder=False) as fresh:
        with open(fresh, "r+b") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
        _force_to_disk(fresh)
        _keep_mode(fresh, target)
        os.replace(fresh, target)
        _force_to_disk(target.parent)
    return Path(path)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: it is not a model folder.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a JSON object.")
    return content


COUNT = range(2**63)  # in a schema: how many there are of something
DIGEST = re.compile("[0-9a-f]{64}")  # in a schema: a SHA-256


def parse_header(text: str, schema: Any) -> tuple[list[str], Any]:
    """The problems of a header in JSON, one line each, and what it holds: None if there are any; see `misfits_of`."""
    try:
        header = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=_refuse_constant)
        json.dumps(header, ensure_ascii=False).encode()  # refuses half of a character
    except (ValueError, RecursionError) as error:
        return [f"its header is not JSON ({error})"], None
    version = header.get("format") if isinstance(header, dict) else header
    if isinstance(schema, dict) and "format" in schema and misfits_of(version, schema["format"]):
        known = ", ".join(map(str, schema["format"]))
        return [f"its format is {_shown(version)}, this version of jaxprune reads {known}"], None
    problems = misfits_of(header, schema)
    return problems, None if problems else header


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON header.

    Raises:
        ValueError: If a name stands twice in it.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"its header names twice: {twice}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def misfits_of(value: Any, schema: Any, place: str = "") -> list[str]:
    """The entries of a JSON value that are not as its schema says, each with what was expected.

    A schema is a type (float: any finite number; object: anything), a `range` of whole numbers, a pattern of a whole
    text, None, a tuple of schemas of which one fits, a list with the schema of all items, or a dict of schemas by name,
    in which names that end in "?" may be missing, and `...` stands for all others.
    """
    if isinstance(schema, tuple):
        nested = [each for each in schema if isinstance(each, dict | list) and isinstance(value, type(each))]
        if nested:
            return misfits_of(value, nested[0], place)
        fits = any(not misfits_of(value, each) for each in schema)
    elif isinstance(schema, dict) and isinstance(value, dict):
        known = {name.removesuffix("?"): each for name, each in schema.items() if name is not ...}
        at = {name: f"{place}.{name}" if place else name for name in known | value}
        problems = [f"{at[name]} is missing" for name in schema if name in known and name not in value]
        for name, each in value.items():
            if name in known or ... in schema:
                problems += misfits_of(each, known[name] if name in known else schema[...], at[name])
            else:
                problems.append(f"{at[name]} is unknown, expected {', '.join(known)}")
        return problems
    elif isinstance(schema, list) and isinstance(value, list):
        return [problem for i, each in enumerate(value) for problem in misfits_of(each, schema[0], f"{place}[{i}]")]
    elif isinstance(schema, range):
        fits = type(value) is int and value in schema
    elif isinstance(schema, re.Pattern):
        fits = isinstance(value, str) and schema.fullmatch(value)
    elif schema is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max  # NaN is not
    else:
        fits = schema is object or (value is None if schema is None else type(value) is schema)
    return [] if fits else [f"{place or 'its header'} is {_shown(value)}, expected {_expected(schema)}"]


def _shown(value: Any) -> str:
    return str(reprlib.repr(value))[:80]


def _expected(schema: Any) -> str:
    if isinstance(schema, tuple):
        return " or ".join(map(_expected, schema))
    if isinstance(schema, range):
        return "a count" if schema == COUNT else f"a whole number from {schema[0]} to {schema[-1]}"
    if isinstance(schema, re.Pattern):
        return "a digest" if schema == DIGEST else f"text such as {schema.pattern}"
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", None: "null"}
    return "an object" if isinstance(schema, dict) else "a list" if isinstance(schema, list) else names[schema]


def differences(old: Any, new: Any, most: int = 6) -> str:
    """The differences between two JSON values in one line: `limit is 5, was 10; seed is 1, was 0`; or nothing."""
    lines = list(_differences(old, new, ""))
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more" if len(lines) > most else "")


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for each in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(each), new.get(each), f"{name}.{each}".lstrip("."))
    elif old != new:
        yield f"{name} is {_brief(new)}, was {_brief(old)}"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_file(path: Path, overwrite: bool) -> None:
    """Refuses an output file that cannot be written, before any work is done.

    Raises:
        FileExistsError: If the file is there and may not be replaced, or is a folder.
        PermissionError: If its folder cannot be written.
    """
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder: name a file.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or replace it with --overwrite.")
    check_writable(path)
    check_replaceable(path)


def check_replaceable(path: Path) -> None:
    """Refuses to replace anything but a file, or a folder of files and folders."""
    for entry in [path, *path.rglob("*")] if path.exists() else []:
        mode = (entry.stat() if entry == path else entry.lstat()).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            kind = next((name for name, test in _SPECIAL.items() if test(mode)), "no file")
            raise FileExistsError(f"{entry} is {kind}, which is never replaced: choose another name, or move it away.")


_SPECIAL = {
    "a symbolic link": stat.S_ISLNK,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def real_path(path: str | Path) -> Path:
    """The path without symbolic links.

    Raises:
        OSError: If links lead to each other.
    """
    try:
        return Path(path).resolve()
    except RuntimeError as error:  # what Python 3.11 raises then
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def check_writable(path: Path) -> None:
    """Refuses a file or folder whose place is no folder, or cannot be written."""
    above = real_path(path).parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {above} is not a folder.")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write into {above}.")


def file_stem(name: str) -> str:
    """A task's name as the beginning of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "task"


@contextlib.contextmanager
def folder_for(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new, empty folder that takes the place of `path` when the block ends; an error in the block removes it.

    With `overwrite` the old and the new folder change names in one step where the system can (Linux, macOS). Elsewhere
    it takes two renames; a crash between them leaves both folders complete, the old one as `.NAME.old-...`: the next
    save puts it back first, and `interrupted` finds it.

    Args:
        path: The destination. Missing folders above it are made.
        overwrite: Whether a folder that is there is replaced, with all that it holds. The new one has its mode and
            those of its files; a file of another name gets what all of them allow.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: If something that is not an empty folder is there and `overwrite` is false, or the folder holds
            something else than files and folders.
        ValueError: If the destination cannot be renamed: the current folder or a mount point.
    """
    target = real_path(path)
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        raise ValueError(f"{path} is the current folder, above it, or a mount point: save to a folder inside it.")
    check_replaceable(target)
    with _claimed(target, folder=True) as fresh:
        yield fresh
        for entry in (*fresh.rglob("*"), fresh):
            _force_to_disk(entry)
        _keep_modes(fresh, target)
        if overwrite and target.is_dir():
            _swap(fresh, target)
        else:
            _move(fresh, target)
        _force_to_disk(target.parent)


@contextlib.contextmanager
def alone(file: str | Path) -> Iterator[None]:
    """Waits until nobody else, in this process or another, is in such a block for the same file. Not on Windows."""
    with _locked(Path(file)):
        yield


def is_leftover(name: str, of: Collection[str]) -> bool:
    """True if a killed process left this file while it wrote one of the given files."""
    match = re.fullmatch(r"\.(.+)\.saving-[0-9a-f]{8}", name)
    return match is not None and match[1] in of


def remove_folder(path: str | Path) -> None:
    """Removes a folder, which is there whole or not at all, whatever happens in between; none may be there."""
    target = real_path(path)
    if target.parent.is_dir():
        _sweep(target)
    if target.is_dir():
        fresh = _hidden(target, "saving")  # what a crash leaves under this name is swept by the next one
        os.rename(target, fresh)
        _remove(fresh)


def interrupted(path: str | Path) -> Path | None:
    """The complete old folder that a save which was interrupted between two renames left in place of `path`."""
    target = real_path(path)
    if target.exists() or not target.parent.is_dir():
        return None
    return next(iter(_left_behind(target, "old")), None)


@contextlib.contextmanager
def _claimed(target: Path, *, folder: bool) -> Iterator[Path]:
    """A new, locked file or folder beside `target`; what is still under its name at the end is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _hidden(target, "saving")
    with contextlib.ExitStack() as locks:
        with _locked(target.parent):  # nobody sweeps between making it and locking it
            _sweep(target)
            fresh.mkdir() if folder else fresh.touch(exist_ok=False)
            if target.exists():  # private until it has the mode of what it replaces
                fresh.chmod(0o700 if folder else 0o600)
            locks.enter_context(_locked(fresh))
        try:
            yield fresh
        except OSError as error:
            if error.errno and error.filename is None:  # a write to an open file does not say to which
                error.filename = str(target)
            raise
        finally:
            _remove(fresh)  # after an error the new one, after a swap the old one, else nothing


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Locks a file or folder. Yields False if it is locked already and `wait` is false, or if there are no locks."""
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(handle)  # and with it the lock


def _keep_mode(fresh: Path, old: Path) -> None:
    """Gives a new file or folder the owner and the mode of the one that it replaces, if there is one."""
    if old.exists():
        known = old.stat()
        with contextlib.suppress(OSError, AttributeError):  # others' files, and Windows
            os.chown(fresh, known.st_uid, known.st_gid)
        fresh.chmod(stat.S_IMODE(known.st_mode))


def _keep_modes(fresh: Path, old: Path) -> None:
    files = [entry.stat().st_mode for entry in old.rglob("*") if entry.is_file()]
    allowed = reduce(operator.and_, files, 0o777)
    for entry in fresh.rglob("*"):
        if (old / entry.relative_to(fresh)).exists():
            _keep_mode(entry, old / entry.relative_to(fresh))
        elif entry.is_file():
            entry.chmod(stat.S_IMODE(entry.stat().st_mode & allowed))
    _keep_mode(fresh, old)


def _sweep(target: Path) -> None:
    """Puts back what an interrupted swap took away; removes what killed saves of this name left behind."""
    old = interrupted(target)
    if old is not None:
        os.rename(old, target)
    for left in (*_left_behind(target, "saving"), *_left_behind(target, "old")):
        with contextlib.suppress(FileNotFoundError), _locked(left, wait=False) as abandoned:
            if abandoned:
                _remove(left)


def _left_behind(target: Path, kind: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{target.name}.{kind}-") + "[0-9a-f]{8}")
    entries = (entry for entry in target.parent.iterdir() if pattern.fullmatch(entry.name))
    return sorted(entry for entry in entries if not entry.is_symlink() and (entry.is_file() or entry.is_dir()))


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # what stays is swept by the next save
    else:
        path.unlink(missing_ok=True)


def _move(fresh: Path, target: Path) -> None:
    try:
        os.rename(fresh, target)  # replaces an empty folder, nothing else
    except OSError as error:
        if target.exists():
            raise FileExistsError(f"{target} exists already and is not an empty folder.") from error
        raise


def _swap(fresh: Path, target: Path) -> None:
    """Afterwards `target` is the new folder; the old one has the hidden name, or is gone."""
    if not _exchange(fresh, target):
        _rename_twice(fresh, target)


def _rename_twice(fresh: Path, target: Path) -> None:
    old = _hidden(target, "old")
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(old, target)
        raise
    _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step. False if the system or the file system cannot."""
    if sys.platform not in ("linux", "darwin"):
        return False
    library, names = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other))
    if hasattr(library, "renameat2"):
        return library.renameat2(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0
    return hasattr(library, "renamex_np") and library.renamex_np(*names, _EXCHANGE) == 0


def _force_to_disk(path: Path) -> None:
    if sys.platform == "win32":  # folders cannot be opened there, nor files that are only read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stamp_of(files: Iterable[Path]) -> str | None:
    """The stamp of files; None if one of them changed just now, or its time is not to be trusted."""
    known: list[object] = [__version__]  # another version may compute something else
    now = time.time()
    for file in sorted({file.resolve() for file in files}):
        status = file.stat()
        if max(status.st_mtime, status.st_ctime) > now - SETTLED:
            return None
        known.append([str(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def recall(folder: Path, stamp: str | None) -> str | None:
    """The value remembered for files of this stamp; None if there is none, or it cannot be read."""
    content = None if stamp is None else read_private(folder / f"{stamp}.json")
    problems, known = parse_header((content or b"").decode(errors="replace"), {"digest": DIGEST})
    return None if problems else known["digest"]


def remember(folder: Path, stamp: str | None, files: Iterable[Path], digest: str) -> None:
    """Remembers a digest of files that had this stamp before they were read, unless they have another one now.

    A folder that cannot be written to, or files that are gone, change nothing: the digest is computed again.
    """
    with contextlib.suppress(OSError):
        if stamp is not None and stamp_of(files) == stamp:
            write_private(folder / f"{stamp}.json", json.dumps({"digest": digest}).encode())


_MOST_PRIVATE = 2**24  # bytes of a file in a cache; tables and digests have a few thousand


def private_folder(folder: Path, *, make: bool = True) -> bool:
    """Makes a folder of a cache, or closes it to others; False if it is missing or others are not kept out of it.

    It must be a folder of this user, and no link to one. Where others could write before, it must hold nothing but
    plain files of this user.
    """
    try:
        if make and not os.path.lexists(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        if sys.platform == "win32":
            return True
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        if status.st_mode & 0o077:
            folder.chmod(0o700)
        if status.st_mode & 0o022:
            return all(_is_own(entry.lstat()) for entry in folder.iterdir())
        return True
    except OSError:
        return False


def _is_own(status: os.stat_result) -> bool:
    """True for a plain file of this user that has no other name."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1


def read_private(path: Path) -> bytes | None:
    """A small plain file of this user in a folder of a cache; None if there is none, and no link is followed."""
    if not private_folder(path.parent, make=False):
        return None
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if (sys.platform != "win32" and not _is_own(status)) or status.st_size > _MOST_PRIVATE:
                return None
            return file.read(_MOST_PRIVATE)
    except OSError:
        return None


def write_private(path: Path, content: bytes) -> None:
    """Writes a file into a folder of a cache, in the place of whatever has its name; nothing if it is not private."""
    with contextlib.suppress(OSError):
        if private_folder(path.parent):
            if os.path.lexists(path) and not _is_own(path.lstat()):
                path.unlink()
            write_atomic(path, content)

"""The terminal of all commands: progress on stderr, results on stdout, one JSON object if asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LINE_EVERY = 30.0  # seconds between two lines of progress where stderr is not a terminal
MIN_COMPILE_TIME = 0.1  # seconds; what compiles faster is not worth a file in the cache

_QUIET = {  # third parties that would write between our lines; a value that is set already stays
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


class Messages:
    """The stream of messages, which drops what cannot be written: a terminal that is gone ends no run."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is left if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def keep_streams_apart() -> None:
    """Makes closed streams the null device: else `print` takes stdout for stderr, and a file may get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stderr = Messages(open(os.devnull, "w") if sys.stderr is None else sys.stderr)  # noqa: SIM115, for the process


class Bars:
    """Progress bars on stderr, one per stage; where stderr is no terminal, a line now and then."""

    def __init__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.interrupted = 0  # by which signal: SIGINT is Ctrl-C
        self._bars: dict[str, Bar] = {}
        self._console = plain_console(stderr=True)
        self._shown = self._console.is_terminal
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._shown)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._progress.stop()

    def open(self, label: str) -> Bar:
        """A stage; an existing one of the same name starts again."""
        bar = self._bars.get(label)
        if bar is None:
            bar = self._bars[label] = Bar(self, label)
        bar.restart()
        return bar

    def say(self, message: Any) -> None:
        """Prints a line, or a table, above the bars."""
        self._console.print(message, soft_wrap=isinstance(message, str))


class Bar:
    """The progress of one stage: call it with what is done and with what there is to do."""

    def __init__(self, bars: Bars, label: str):
        self._bars, self._label = bars, visible(label)
        self._task: Any = None  # shown from the first call on
        self.restart()

    def restart(self) -> None:
        """Begins to measure the time."""
        self._begun = self._said = time.monotonic()
        self._first: int | None = None  # what was done before: a run that is resumed

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Shows how far the stage is; stops if a signal came and what ran then swallowed its exception."""
        if self._bars.interrupted:
            raise KeyboardInterrupt(self._bars.interrupted)
        progress = self._bars._progress
        self._task = progress.add_task(self._label, total=None, note="") if self._task is None else self._task
        progress.update(self._task, completed=done, total=total, note=visible(note))
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if not self._bars._shown and (done == total or now - self._said >= LINE_EVERY):
            self._said = now
            spent = f"{now - self._begun:.0f} s"
            if done > self._first:
                spent += f", {(now - self._begun) / (done - self._first) * (total - done):.0f} s left"
            self._bars.say(f"{self._label}: {done:,} of {total:,}, {spent}{f', {note}' if note else ''}")


@contextlib.contextmanager
def working() -> Iterator[Bars]:
    """The surroundings of a command: bars, only our own warnings, nothing on stdout, compiled programs kept."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    keep_compiled_programs()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), Bars() as bars, _listening(bars):
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"jaxprune\.")
        say = cache(bars.say)  # once: a folder that is opened twice has the same to say
        warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}")
        yield bars


@contextlib.contextmanager
def _listening(bars: Bars) -> Iterator[None]:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a `KeyboardInterrupt` of the signal's number, and remembers it.

    An exception that is raised within a library's callback may never come out of it.
    """

    def stop(number: int, _: Any) -> None:
        bars.interrupted = number
        raise KeyboardInterrupt(number)

    usual = (signal.default_int_handler, signal.SIG_DFL)  # others: a background job, or a program with its own handler
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) in usual}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
        if bars.interrupted:  # what ran last swallowed it
            raise KeyboardInterrupt(bars.interrupted)
    except (Exception, KeyboardInterrupt) as error:  # C code that called Python's makes a SystemError of it
        if bars.interrupted and error.args != (bars.interrupted,):
            raise KeyboardInterrupt(bars.interrupted) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_compiled_programs() -> None:
    """Switches JAX's persistent compilation cache on, unless `JAX_COMPILATION_CACHE_DIR` says where it is."""
    import jax

    from jaxprune.checkpoints.files import private_folder

    folder = cache_folder()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and folder.is_absolute():  # it is not for a user without a home
        if private_folder(folder):
            jax.config.update("jax_compilation_cache_dir", str(folder))
        elif os.path.lexists(folder):
            print(f"{folder} is no folder of yours alone: compiled programs are not kept.", file=sys.stderr)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_TIME)


def cache_folder(what: str = "compiled") -> Path:
    """The folder of compiled programs, or of something else, by kind of processor: not all run on another."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    kind = hashlib.sha256(features.encode()).hexdigest()[:8]
    return Path(base) / "jaxprune" / what / f"{platform.machine()}-{kind}"


def digests_folder() -> Path | None:
    """The folder that remembers digests of models; None for a user without a home."""
    folder = cache_folder("digests")
    return folder if folder.is_absolute() else None


def show(record: Mapping[str, Any], *tables: Any, as_json: bool) -> None:
    """Prints tables on stdout; or, as JSON, the record on stdout in one line, and the tables on stderr."""
    console = plain_console(stderr=as_json)
    for table in tables:
        console.print(table, soft_wrap=isinstance(table, str))
    if as_json:
        print(json.dumps(record, allow_nan=False))


def visible(text: str) -> str:
    """A text whose control characters are spelt out: names that come from data must not steer the terminal."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def plain_console(*, stderr: bool) -> Any:
    """A rich console that prints texts as they are, in tables too: nothing in them is markup or an emoji."""
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **style: Any) -> Text:
            return super().render_str(visible(text), **style)

    return Plain(stderr=stderr, highlight=False, markup=False, emoji=False)

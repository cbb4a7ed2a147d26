"""Shared parts of the fault campaigns: commands that can be killed, limits on them, and a record of the outcomes.

Importing the package takes longer than a tiny model needs. A server imports it once and forks a child per command, so
that a child's whole life is work, and a kill at a random moment meets work.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from jaxprune import __main__ as cli
from jaxprune import __version__

RECORD = "JAXPRUNE_FAULTS_RECORD"  # names the file that counts are written to


class Ended(NamedTuple):
    """The end of a command."""

    code: int  # -9 after kill -9
    output: str  # stdout and stderr

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("jaxprune: error: ")]


class Server:
    """Runs commands in children of a process that has imported everything."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, *arguments: Any, **limits: Any) -> Child:
        """Starts a command. Limits: `file_bytes`, the most that a file may grow to; `user`, who runs it."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        return Child(self, self._ask(start=[str(a) for a in arguments], log=str(log), limits=limits), log)

    def wait(self, pid: int) -> int:
        """The exit code of a child; minus the signal's number if one ended it."""
        return self._ask(wait=pid)

    def run(self, *arguments: Any, **limits: Any) -> Ended:
        """Runs a command to its end."""
        return self.start(*arguments, **limits).wait()


class Child:
    """A command at work. Its process exists until `wait`, so a signal never meets another one."""

    def __init__(self, server: Server, pid: int, log: Path):
        self._server, self._pid, self._log = server, pid, log

    def kill(self) -> None:
        """Sends kill -9; nothing happens if the command has ended."""
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Waits for the end."""
        return Ended(self._server.wait(self._pid), self._log.read_text(errors="replace"))


def record(campaign: str, found: Mapping[str, Any]) -> None:
    """Adds what a campaign met to the file of records, if one is asked for."""
    name = os.environ.get(RECORD)
    if name is None:
        return
    versions = {"jaxprune": __version__, "jax": jax.__version__, "python": platform.python_version()}
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # two workers write to it
        stream.seek(0)
        content = json.loads(stream.read() or "{}") | {campaign: dict(found), "versions": versions}
        stream.truncate(0)
        stream.write(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _child(arguments: list[str], log: str, limits: Mapping[str, Any]) -> int:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(handle, standard)
    if "file_bytes" in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"],) * 2)
    if "user" in limits:
        os.setgroups([])
        os.setgid(limits["user"])
        os.setuid(limits["user"])
    sys.argv = ["jaxprune", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # whatever it is, the parent counts it as a crash and shows it: a forked child must end here
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    import transformers
    import transformers.models.bert  # its parts are imported when they are asked for

    from jaxprune.cli.render import tables  # noqa: F401
    from jaxprune.pruning import inspection, prune  # noqa: F401
    from jaxprune.scoring import attribution, criteria  # noqa: F401
    from jaxprune.training import distillation, finetuning  # noqa: F401

    transformers.AutoTokenizer  # noqa: B018
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                code = _child(request["start"], request["log"], request["limits"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()

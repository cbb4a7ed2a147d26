"""The `jaxprune` application: the groups of commands put together, and errors turned into exit codes.

Heavy packages are imported only when a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jaxprune import __version__
from jaxprune.cli import demo, exporting, measuring, pruning, terminal, training
from jaxprune.cli.options import option

EPILOG = (
    "Long-running commands resume after an interruption: run the same one again. Bad input ends with exit code 2 and "
    "one line on stderr; JAXPRUNE_TRACEBACK=1 shows where it came from. Compiled programs, latency tables and digests "
    "of models are kept in ~/.cache/jaxprune; JAX_COMPILATION_CACHE_DIR names another folder for the programs."
)

BAD_INPUT = (ValueError, TypeError, OSError, MemoryError)  # what is raised for a wrong argument, file or folder


def complain(message: str) -> None:
    """Prints an error in one line on stderr."""
    print(f"jaxprune: error: {terminal.visible(' '.join(message.split()))}", file=sys.stderr)


def describe(error: BaseException) -> str:
    """An error in words; of the system's errors the reason and the file."""
    if isinstance(error, OSError) and error.strerror:
        files = [str(name) for name in (error.filename, error.filename2) if name]
        return f"{error.strerror}: {' and '.join(files)}" if files else error.strerror
    return str(error) or type(error).__name__


class Commands(TyperGroup):
    """Turns errors into one line on stderr and an exit code."""

    def in_options(self, message: str, command: str | None) -> str:
        """A message of the library with a command's options in the place of arguments: `--max-length`, `labels=`."""
        params = self.commands[command].params if command is not None and command in self.commands else []
        options = {str(it.name): it.opts[0] for it in params if it.opts[0].startswith("--")}
        named = options | {"labels": options.get("label_names", "labels=")}  # of a task, not of a criterion

        def option(match: re.Match[str]) -> str:
            return named.get(match[1], match[0]) if match[1] else options.get(match[2], match[0])

        return re.sub(r"\b([a-z_]+)=(?=[\s.,;:)]|$)|^([a-z_]+)(?= must )", option, message)

    def invoke(self, ctx: typer.Context) -> Any:
        """Runs a command; after a signal the exit code is 128 and its number, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            print("interrupted; run the same command again to resume", file=sys.stderr)
            raise typer.Exit(128 + (error.args[0] if error.args else signal.SIGINT)) from error
        except BAD_INPUT as error:
            if os.environ.get("JAXPRUNE_TRACEBACK"):
                raise
            complain(self.in_options(describe(error), ctx.invoked_subcommand))
            raise typer.Exit(2) from error

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs a command: exit code 2 for bad input."""
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            hint = f" See `{context.command_path} --help`." if context is not None else ""
            complain(error.format_message() + hint)
            code = 2
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or os.environ.get("JAXPRUNE_TRACEBACK"):
                raise
            complain(f"out of memory: use a smaller --batch-size ({str(error).splitlines()[0]})")
            code = 2
        if standalone_mode:
            sys.exit(code or 0)
        return code


app = typer.Typer(
    cls=Commands, add_completion=False, rich_markup_mode="rich", epilog=EPILOG, pretty_exceptions_enable=False
)


@app.callback(invoke_without_command=True)
def jaxprune(
    context: typer.Context, version: Annotated[bool, option("Print the version.", "--version")] = False
) -> None:
    """Makes a multi-task language model small for one task, in minutes, without training.

    Begin with: [cyan]jaxprune demo[/cyan]
    """
    if version:
        typer.echo(f"jaxprune {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in (
    *(measuring.score, pruning.prune, pruning.share, pruning.plan),
    *(measuring.sweep, measuring.inspect, measuring.compare, measuring.check, measuring.evaluate, measuring.generate),
    *(training.finetune, training.sparsify, training.distill, training.augment),
    *(pruning.pack, exporting.export, exporting.push, demo.demo),
):
    app.command()(command)


def main() -> None:
    """Runs the command line."""
    terminal.keep_streams_apart()
    app(prog_name="jaxprune")


if __name__ == "__main__":
    main()

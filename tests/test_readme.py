"""The README tells the truth: its example runs, its commands, options and files exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxprune.__main__ import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
CODE = {name: re.findall(r"```(?:bash|sh)\n(.*?)```|`([^`\n]+)`", text, re.DOTALL) for name, text in PAGES.items()}


def commands(page: str, start: str) -> list[str]:
    """The commands of a page that start with a word, comments and line continuations removed."""
    lines = "\n".join(block or span for block, span in CODE[page]).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.startswith(f"{start} ")]


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len(example.splitlines()) <= 12
    usual = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as its reader would run it
    run = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=usual, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()  # it saves a model to "out"
    assert "accuracy" in run.stdout


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in commands(page, "make") for word in shlex.split(line)[1:] if "=" not in word}
    assert named
    assert named - targets == set()


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page, "jaxprune")}))
def test_commands_and_options_exist(line):
    command, *rest = line.split()[1:]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert shown.exit_code == 0, shown.output
    options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert options - set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown.output)) == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", PAGES[page])
    assert [target for target in targets if not (ROOT / target).exists()] == []

"""The rooms are layers, who may import what, and what `jaxprune --help` costs."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jaxprune

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxprune"

# From the ground up, as the page has them: a room imports only from those above it, and from itself.
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def name_of(file: Path) -> str:
    """`jaxprune/data/spans.py` is `jaxprune.data.batches`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def room(module: str) -> str:
    """The room of `jaxprune.data.batches` is `data`."""
    return [*module.split("."), ""][1]


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or in a function."""
    names = (name for name in imports(file) if name.split(".")[0] == "jaxprune")
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} - {"jaxprune", name_of(file)}


def imports(file: Path, *, top_level: bool = False) -> Iterator[str]:
    """Full names of what a file imports while it runs; with `top_level` only what importing the file itself imports."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.orelse:
                yield from walk(child)
            return
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import; write the full name."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(TREES[file])


def importers(package: str) -> set[str]:
    return {name_of(file) for file in FILES for name in imports(file) if name.split(".")[0] == package}


def test_the_rooms_are_those_of_the_page():
    assert {room(name) for name in MODULES} - {"", "__main__"} == set(ROOMS)
    assert len(ROOMS) == len(set(ROOMS)) == 12


def test_the_places_that_the_page_names_exist():
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", PAGE)
    assert named
    assert [name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()] == []


def test_a_room_imports_only_from_rooms_above_it():
    rank = {name: position for position, name in enumerate(ROOMS)}
    wrong = [
        f"{name} imports {other}"
        for name, file in MODULES.items()
        if room(name) in rank
        for other in imported(file)
        if rank.get(room(other), -1) > rank[room(name)]
    ]
    assert wrong == []


def test_imports_between_files_have_no_circles():
    sorter = graphlib.TopologicalSorter({name: imported(file) for name, file in MODULES.items()})
    sorter.prepare()  # raises CycleError, with the circle


def test_only_the_models_know_flax():
    assert {room(name) for name in importers("flax")} == {"models"}


def test_only_tasks_knows_datasets():
    assert importers("datasets") == {"jaxprune.data.tasks"}


def test_no_module_knows_torch():
    assert importers("torch") == set()


@pytest.mark.parametrize("package", ["transformers", "datasets", "matplotlib", "scipy.stats", "scipy.optimize"])
def test_slow_packages_are_imported_inside_functions(package):
    slow = [
        file.name for file in FILES for name in imports(file, top_level=True) if f"{name}.".startswith(f"{package}.")
    ]
    assert slow == []


def test_nothing_is_pickled_or_unpickled():
    banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert {name for file in FILES for name in imports(file) if name.split(".")[0] in banned} == set()
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    assert not [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"]
    assert not [
        node for node in nodes if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only")
    ]


def test_every_module_opens_with_a_docstring():
    assert [file.name for file, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[^A-Za-z0-9_-]", requirement, maxsplit=1)[0]
        for requirement in (
            *project["dependencies"],
            *(each for extra in ("gguf", "onnx", "harness") for each in extras[extra]),
        )
    }
    used = {name.split(".")[0] for file in FILES for name in imports(file)} - set(sys.stdlib_module_names)
    used = {{"yaml": "pyyaml"}.get(name, name) for name in used}  # the one that is imported by another name
    assert used - declared - {"jaxprune"} == set()


def test_public_names_resolve_and_are_few():
    package: Any = jaxprune
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    assert len(package.__all__) <= 61
    with pytest.raises(AttributeError, match="No jaxprune attribute pruned"):
        package.pruned  # noqa: B018


def test_version_is_the_installed_one():
    assert jaxprune.__version__ == importlib.metadata.version("jaxprune")


def imported_by(*arguments: str) -> set[str]:
    """The packages that `python -m jaxprune ARGUMENTS` has imported when it ends, in a process of its own."""
    script = f"""
import runpy, sys
sys.argv = ["jaxprune", *{list(arguments)!r}]
try:
    runpy.run_module("jaxprune", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
finally:
    print("IMPORTED", *sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.rpartition("IMPORTED ")[2].split())


SLOW = {"jax", "flax", "datasets", "transformers", "matplotlib", "torch"}


@pytest.mark.parametrize("arguments", [("--help",), ("prune", "--help")])
def test_help_imports_nothing_slow(arguments):
    assert imported_by(*arguments) & SLOW == set()


def test_importing_the_package_imports_nothing_slow():
    code = "import sys, jaxprune; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) & {*SLOW, "numpy"} == set()


def test_names_of_stacks_and_modules_stay_in_the_family_that_has_them():
    allowed = {PACKAGE / "models" / name for name in ("bert.py", "decoder.py", "t5.py")}
    names = {"encoder", "decoder", "cross", "query"}
    wrong = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        if file not in allowed
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert wrong == set()


@pytest.mark.parametrize("name", ["prompts", "criteria", "budgets"])
def test_a_namespace_is_found_first_thing(name: str):
    subprocess.run([sys.executable, "-c", f"import jaxprune; jaxprune.{name}"], check=True)

"""The order of the modules, who may import what, and what `jaxprune --help` costs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxprune

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxprune"

WHOLE = ("models", "bundled")  # packages that are one place

# From the ground up: a module imports only what stands above it in this list.
ORDER = (
    "data.answers",
    "gates",
    "trust.agreement",
    "trust.split_half",
    "models",
    "likelihood",
    "generation",
    "formats.files",
    "formats.stamps",
    "formats.tensors",
    "formats.packing",
    "formats.packed_file",
    "formats.weights",
    "compaction",
    "formats.slicing",
    "formats.gate_file",
    "checkpoint",
    "data.splits",
    "data.records",
    "tasks",
    "data.augmentation",
    "data.prompts",
    "data.spans",
    "data.batches",
    "evaluation",
    "cost",
    "budgets.latency_table",
    "budgets.latency_target",
    "criteria.objectives",
    "criteria.integration",
    "criteria.activations",
    "criteria.questions",
    "attribution",
    "criteria.removal",
    "criteria.baselines",
    "scores",
    "criteria.totals",
    "scoring",
    "budgets.allocation",
    "selection",
    "budgets.pooling",
    "budgets.provenance",
    "shared",
    "repair.receipt",
    "repair.prediction",
    "trust.origin",
    "repair.reselection",
    "repair.fitting",
    "recovery",
    "rounds",
    "sparse.bisection",
    "sparse.schedules",
    "sparse.matrices",
    "sparse.patterns",
    "sparse.saliency",
    "sparsity",
    "sparse.sparse_training",
    "learning.training_run",
    "training",
    "learning.losses",
    "learning.curriculum",
    "learning.lessons",
    "distillation",
    "learning.teaching",
    "learning.pretraining",
    "showing.report",
    "showing.receipt_report",
    "showing.student_report",
    "showing.cards",
    "showing.forecast",
    "showing.confidence",
    "showing.pictures",
    "commands.workflow",
    "commands.accounting",
    "commands.storage",
    "commands.augmentation",
    "commands.students",
    "commands.planning",
    "trust.checks",
    "commands.pruning",
    "commands.sweep",
    "commands.inspection",
    "commands.comparison",
    "commands.together",
    "commands.sharing",
    "commands.rounds",
    "bundled",
    "commands.demo",
    "commands.terminal",
    "commands.options",
    "commands.looking",
    "commands.learning",
    "cli",
    "__main__",
)

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def place(file: Path) -> str:
    """`jaxprune/data/spans.py` is in the place `data.spans`, all of `jaxprune/models` in `models`, a package in ``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in WHOLE:
        return parts[0]
    return "" if parts[-1] == "__init__" else ".".join(parts)


def owner(name: str) -> str:
    """The place of `jaxprune.data.spans.tokenise`."""
    parts = name.split(".")[1:]
    return next((known for n in (2, 1) if (known := ".".join(parts[:n])) in ORDER), parts[0])


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
    return {place(file) for file in FILES for name in imports(file) if name.split(".")[0] == package}


def test_every_module_has_a_place_in_the_order():
    assert {place(file) for file in FILES} - {""} == set(ORDER)


def test_a_module_imports_only_modules_above_it():
    rank = {name: position for position, name in enumerate(ORDER)}
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in FILES
        if place(file)
        for name in imports(file)
        if name.startswith("jaxprune.")
        and owner(name) != place(file)
        and rank.get(owner(name), -1) >= rank[place(file)]
    ]
    assert wrong == []


def test_only_the_models_know_flax():
    assert importers("flax") == {"models"}


def test_only_tasks_knows_datasets():
    assert importers("datasets") == {"tasks"}


def test_no_module_knows_torch():
    assert importers("torch") == set()


@pytest.mark.parametrize("package", ["transformers", "datasets", "matplotlib"])
def test_slow_packages_are_imported_inside_functions(package):
    slow = [file.name for file in FILES for name in imports(file, top_level=True) if name.split(".")[0] == package]
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


def test_the_map_for_contributors_names_every_module_once():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = []
    for row in page[page.index("| for | modules |") :].split("\n\n")[0].splitlines()[2:]:
        _, what, modules, _ = row.split("|")
        folder = re.search(r"`(\w+)/`", what)
        for name in re.findall(r"`(\w+)/?`", modules):
            inside = folder is not None and f"{folder[1]}.{name}" in ORDER
            named.append(f"{folder[1]}.{name}" if folder is not None and inside else name)
    assert sorted(named) == sorted(ORDER)


def test_no_file_is_longer_than_500_lines():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}


def test_every_import_is_a_declared_dependency():
    declared = {
        re.split(r"[^A-Za-z0-9_-]", requirement, maxsplit=1)[0]
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    used = {name.split(".")[0] for file in FILES for name in imports(file)} - set(sys.stdlib_module_names)
    used = {{"yaml": "pyyaml"}.get(name, name) for name in used}  # the one that is imported by another name
    assert used - declared - {"jaxprune"} == set()


def test_public_names_agree_and_resolve():
    checked = {  # what type checkers and editors see
        alias.name: node.module
        for block in TREES[PACKAGE / "__init__.py"].body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked == {name: f"jaxprune.{module}" for name, module in jaxprune._SOURCES.items()}
    assert set(jaxprune.__all__) == {*checked, "__version__"}
    assert set(jaxprune.__all__) <= set(dir(jaxprune))
    for name, module in checked.items():
        assert getattr(jaxprune, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="'jaxprune' has no attribute 'prune'"):
        jaxprune.prune  # noqa: B018


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

"""The parts of a benchmark: which are asked for, what is known of them already, and where what is found is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxprune.checkpoints.files import write_atomic

PACKAGES = ("jaxprune", "jax", "flax", "numpy")


def asked(parser: ArgumentParser, parts: Iterable[str]) -> tuple[Namespace, list[str]]:
    """The arguments, and the names of the parts that are to run, in their order."""
    known = list(parts)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the record to write (JSON)")
    parser.add_argument("--only", default=",".join(known), help="parts to run; the others are kept from the record")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if wrong := sorted(set(chosen) - set(known)):
        parser.error(f"--only knows {', '.join(known)}, not {', '.join(wrong)}")
    return arguments, [name for name in known if name in chosen]


def begun(parser: ArgumentParser, file: Path, digest: str, name: str = "model") -> dict[str, Any]:
    """The parts that a record has already; a record of another model is refused."""
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.get(name, digest) != digest:
        parser.error(f"{file} is of another model: name another file")
    return found


def each(chosen: Iterable[str]) -> Iterator[str]:
    """Says which part runs."""
    for name in chosen:
        print(f"== {name}", file=sys.stderr, flush=True)
        yield name


def keep(
    file: Path,
    found: dict[str, Any],
    name: str,
    own: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    packages: Sequence[str] = PACKAGES,
) -> None:
    """Writes a part into the record, with the commit, and the facts of the whole benchmark, with device and versions.

    Args:
        file: The record.
        found: What it holds; changed.
        name: Of the part.
        own: What was found.
        facts: Of the whole benchmark.
        packages: Whose versions count.
    """
    found |= {
        name: {**own, "commit": commit()},
        **facts,
        "device": jax.devices()[0].device_kind,
        "versions": {package: version(package) for package in packages},
    }
    write_atomic(file, (json.dumps(found, indent=1) + "\n").encode())


def commit() -> str:
    """The commit that this was run with."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"

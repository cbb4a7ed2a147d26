"""Settings of every test: no network, strict dtype promotion, full-precision matmuls, programs compiled once."""

from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported; child processes inherit it
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that PyTorch is missing, which is intended
# Compiled programs are kept from run to run and shared with workers and child processes; `make clean` removes them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(f"{__file__}/../../.pytest_cache/programs"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update(
    "jax_default_matmul_precision", "float32"
)  # GPU and TPU would multiply in less, and miss the tolerances


# Of a family's types, in the laws of numbers
SECOND_TYPES = {"distilbert", "t5", "llama", "qwen2", "qwen3"}
KEPT = {"reference", "faults", "test_golden.py"}  # these run for every type wherever they run at all


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves a law's second types of a family to the slow tier: `make test` runs it on BERT, mT5 and Gemma."""
    laws: dict[Any, list[tuple[pytest.Item, set[str]]]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not KEPT & set(item.keywords):
            laws.setdefault((item.parent, item.originalname), []).append((item, set(item.callspec.id.split("-"))))
    for cases in laws.values():
        if any({"bert", "mt5", "gemma3_text"} & words for _, words in cases):
            for item, words in cases:
                if SECOND_TYPES & words:
                    item.add_marker(pytest.mark.slow)

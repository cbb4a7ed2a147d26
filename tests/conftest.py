"""What holds for every test: no network, strict dtype promotion, full-precision matmuls, programs compiled once."""

from __future__ import annotations

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported; child processes inherit it
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that PyTorch is missing, which is intended
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and child processes share the folder of the first process
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxprune-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update(
    "jax_default_matmul_precision", "float32"
)  # GPU and TPU would multiply in less, and miss the tolerances


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the compiled programs, once all workers are done."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

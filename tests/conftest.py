"""Settings of every test: no network, strict dtype promotion, full-precision matmuls, programs compiled once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported; child processes inherit it
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that PyTorch is missing, which is intended
# Compiled programs are kept from run to run and shared with workers and child processes; `make clean` removes them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(f"{__file__}/../../.pytest_cache/programs"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update(
    "jax_default_matmul_precision", "float32"
)  # GPU and TPU would multiply in less, and miss the tolerances

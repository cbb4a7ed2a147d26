"""What holds for every test: no network, strict dtype promotion, full-precision matmuls."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported; child processes inherit it
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that PyTorch is missing, which is intended

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update(
    "jax_default_matmul_precision", "float32"
)  # GPU and TPU would multiply in less, and miss the tolerances

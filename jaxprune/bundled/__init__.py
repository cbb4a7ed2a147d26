"""The models and the data that come with the package: where the demo, the README and the benchmarks start."""

from __future__ import annotations

from pathlib import Path


def bundled_model() -> Path:
    """The folder of a small multi-task BERT, to be given to `load`; `README.md` in it is the model's card."""
    return Path(__file__).parent / "model"


def bundled_text_model() -> Path:
    """The folder of a small T5 that does ten tasks by their prompts; `README.md` in it is the model's card."""
    return Path(__file__).parent / "text_model"


def bundled_data() -> Path:
    """The folder with a few hundred real examples per task, to be given to `load_task`; sources are named in it."""
    return Path(__file__).parent / "data"

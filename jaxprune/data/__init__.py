"""Examples: columns to texts, splits that share none, prompts, answers as spans, and batches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, ["prompts"])

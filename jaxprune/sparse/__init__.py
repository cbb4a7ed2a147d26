"""Zeros among weights: how many when, which ones, in which pattern, and an optimizer that keeps them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    ["patterns", "saliency", "schedules"],
    {
        "masks": ["apply_masks", "masks_of", "one_shot", "sparsity_of"],
        "matrices": ["linear_maps"],
        "optimizer": ["sparse_optimizer"],
    },
)

"""Zeros among weights: how many when, which ones, in which pattern, and an optimizer that keeps them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Zeros among weights: how many when, which ones, in which pattern, and an optimizer that keeps them."""

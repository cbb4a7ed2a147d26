"""A model's answers, and how good they are."""

from __future__ import annotations


def scale_of(metric: str) -> tuple[float, str]:
    """The factor by which a metric is multiplied where it is shown, and its name there: in percent if it is a share."""
    return (1.0, metric) if metric in ("log_likelihood", "perplexity") else (100.0, f"{metric}, %")


def shown(metric: str, value: float) -> str:
    """The value of a metric as text, see `scale_of`."""
    scale, _ = scale_of(metric)
    return f"{scale * value:,.{1 if scale > 1 else 3}f}"

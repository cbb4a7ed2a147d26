"""Budgets and rules from flat settings, for tests that are run over many of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from jaxprune.pruning.budgets import Latency, Rules, read_budget


def chosen(table: Any = None, **settings: Any) -> dict[str, Any]:
    """The arguments `budget` and `rules` of `select`, from settings such as `flops=0.5, allocation="global"`."""
    rules = {field.name: settings[field.name] for field in fields(Rules) if field.name in settings}
    budget = read_budget(settings)
    if isinstance(budget, Latency):
        budget = type(budget)(budget.fraction, seconds=budget.seconds, table=table)
    return {"budget": budget, "rules": Rules(**rules)}

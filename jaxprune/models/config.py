"""Hugging Face configurations: reads the settings a family needs, and lists all that are missing or not supported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxprune.models.layers import ACTIVATIONS

_REQUIRED = object()  # a setting that has no default


def is_number(value: Any) -> bool:
    """True if a value of a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """True if a value of a JSON file is an integer of at least 0, small enough for an index."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


class ConfigReader:
    """Reads a configuration value by value, and collects what is wrong with it.

    Args:
        raw: The content of `config.json`.
        supported: The values that settings which change the computation may have, where they are there at all.
    """

    def __init__(self, raw: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]):
        self.raw = raw
        self.problems = [
            f"{name} is {raw[name]!r}, supported: {', '.join(map(repr, values))}"
            for name, values in supported.items()
            if name in raw and raw[name] not in values
        ]

    def get(self, name: str, fits: Callable[[Any], bool], expected: str, default: Any = _REQUIRED) -> Any:
        """A value, which must fit; `default` if the file has none."""
        value = self.raw.get(name, default)
        if value is _REQUIRED:
            self.problems.append(f"{name} is missing")
            return None
        self.expect(name, value, fits(value), expected)
        return value

    def expect(self, name: str, value: Any, fits: bool, expected: str) -> None:
        """Records a value that does not fit."""
        if not fits:
            self.problems.append(f"{name} is {value!r}, expected {expected}")

    def size(self, name: str, default: Any = _REQUIRED) -> Any:
        """A positive integer."""
        return self.get(name, lambda value: is_count(value) and value > 0, "a positive integer", default)

    def rate(self, name: str, default: Any) -> Any:
        """A dropout rate."""
        return self.get(name, lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)", default)

    def eps(self, name: str, default: float) -> Any:
        """The constant that keeps a norm finite."""
        return self.get(name, lambda value: is_number(value) and 0 < value < 1, "a small positive number", default)

    def activation(self, name: str, default: str) -> Any:
        """The name of a non-linearity."""
        known = f"one of {', '.join(ACTIVATIONS)}"
        return self.get(name, lambda value: isinstance(value, str) and value in ACTIVATIONS, known, default)

    def check(self) -> None:
        """Refuses the configuration if anything was wrong.

        Raises:
            ValueError: Listing all of it.
        """
        if self.problems:
            problems = "; ".join(dict.fromkeys(self.problems))
            raise ValueError(f"config.json of a {self.raw['model_type']} model cannot be used: {problems}.")

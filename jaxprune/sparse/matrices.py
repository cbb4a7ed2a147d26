"""Which parameters are pruned weight by weight, and which of their axes are inputs.

A parameter is taken as the matrix `[inputs, outputs]` of its linear map. The axes that the map contracts, the inputs,
come first: one axis of an attention's query kernel `[embed, heads, channels]`, two of its output kernel `[heads,
channels, embed]`. Inputs and outputs are numbered row by row over their axes.

What is pruned is said by `prunable`, for any pytree of parameters: a function of a parameter's path (`("layers", 3,
"ffn", "up", "kernel")`) and of the array, of which it may use shape and type, or a pytree in the structure of the
parameters. It gives the number of input axes, and 0 or False for a parameter that is not pruned; True is 1, a kernel
`[inputs, outputs]`. For the models of this package it is `linear_maps(model)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.units import UNITS, Path, axes_of, path_name

if TYPE_CHECKING:
    from jaxprune.models import Model

Prunable: TypeAlias = Callable[[Path, Any], int] | Any  # the function, or a pytree of its results


class Matrix(NamedTuple):
    """A parameter that is pruned."""

    name: str  # dotted path, such as "layers.3.ffn.up.kernel"
    shape: tuple[int, ...]
    inputs: int  # how many leading axes the linear map contracts

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def sides(self) -> tuple[int, int]:
        """The numbers of inputs and outputs."""
        return math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])


def linear_maps(model: Model) -> Callable[[Path, Any], int]:
    """Says what is pruned in a model of this package: the weights of the linear maps of all layers, and nothing else.

    These are the query, key, value and output kernels of every attention and the kernels of every FFN, as in arXiv
    2104.08682; not embeddings, biases, norms and task heads. It is read from the family's axis table.

    Args:
        model: The architecture.

    Returns:
        What to pass as `prunable`.
    """

    def inputs(path: Path, array: Any) -> int:
        if path[0] == "projection":  # a student's, in distillation; it goes before the student is saved
            return 0
        axes = axes_of(model.axes, path)
        if path[-1] != "kernel" or "embed" not in axes or not set(axes) & set(UNITS):
            return 0
        return axes.index("embed") or 1  # what stands before it is contracted, or it is itself

    return inputs


def find_matrices(params: Any, prunable: Prunable) -> tuple[Matrix | None, ...]:
    """Which leaves of a pytree are pruned, in the order of its leaves; None for those that are not.

    Raises:
        TypeError: If a parameter that is to be pruned is not a floating-point array.
        ValueError: If `prunable` gives what is no number of input axes for some parameter, has another structure than
            the parameters, or names none of them.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    if callable(prunable):
        said = [prunable(_plain(path), array) for path, array in leaves]
    else:
        said, given = jax.tree.flatten(prunable)
        if given != structure:
            raise ValueError(f"prunable must have the structure of the parameters, {structure}; got {given}.")
    found = []
    for (path, array), inputs in zip(leaves, said, strict=True):
        name = leaf_name(path)
        if not isinstance(inputs, int | np.integer | np.bool_) or inputs < 0 or 0 < array.ndim <= inputs:
            raise ValueError(
                f"prunable must give the number of leading axes that are inputs, fewer than there are, or False; "
                f"{name} has shape {tuple(array.shape)}, got {inputs!r}."
            )
        if inputs and array.ndim < 2:
            raise ValueError(f"a matrix has two axes or more; {name} has shape {tuple(array.shape)}: leave it out.")
        if inputs and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"only floating-point weights are pruned; {name} is {array.dtype}: leave it out.")
        found.append(Matrix(name, tuple(array.shape), int(inputs)) if inputs else None)
    if leaves and not any(found):
        raise ValueError(f"prunable names none of the {len(leaves)} parameters: nothing would be pruned.")
    return tuple(found)


def pruned_leaves(leaves: Sequence[Any], matrices: Sequence[Matrix | None]) -> list[Any]:
    """Those leaves that are pruned."""
    return [leaf for leaf, matrix in zip(leaves, matrices, strict=True) if matrix is not None]


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, from the path that JAX gives."""
    return path_name(_plain(path)) or "the array"


def _plain(path: tuple[Any, ...]) -> Path:
    """A path without the kinds of the containers."""
    names = ("key", "idx", "name")
    return tuple(next((getattr(step, name) for name in names if hasattr(step, name)), str(step)) for step in path)

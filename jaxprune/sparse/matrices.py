"""The parameters that are pruned weight by weight, and which of their axes are inputs.

A parameter is taken as the matrix `[inputs, outputs]` of its linear map. The axes that the map contracts, the inputs,
come first: one axis of an attention's query kernel `[embed, heads, channels]`, two of its output kernel `[heads,
channels, embed]`. Inputs and outputs are numbered row by row over their axes.

`prunable` says what is pruned, for any pytree of parameters: a function of a parameter's path (`("layers", 3, "ffn",
"up", "kernel")`) and of the array, of which it may use shape and type, or a pytree in the structure of the parameters.
It gives the number of input axes, and 0 or False for a parameter that is not pruned; True is 1, a kernel `[inputs,
outputs]`. For the models of this package it is `linear_maps(model)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.units import KINDS, Path, axes_of, has_units, input_axes, path_name

if TYPE_CHECKING:
    from jaxprune.models import Model

Prunable: TypeAlias = Callable[[Path, Any], int] | Any  # the function, or a pytree of its results
PROJECTION = "projection"  # a student's, in distillation, beside its parameters; it goes before the student is saved


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
    """Returns the `prunable` for a model of this package: the weights of the linear maps of all layers.

    These are the query, key, value and output kernels of every attention and the kernels of every FFN, as in arXiv
    2104.08682; not embeddings, biases, norms and task heads. It is read from the family's axis table.
    """

    def inputs(path: Path, array: Any) -> int:
        if path[0] == PROJECTION:
            return 0
        axes = axes_of(model.axes, path)
        prunable = path[-1] == "kernel" and "embed" in axes and any(has_units(axes, kind) for kind in KINDS)
        return input_axes(axes) if prunable else 0

    return inputs


def find_matrices(params: Any, prunable: Prunable) -> tuple[Matrix | None, ...]:
    """The leaves of a pytree that are pruned, in the order of its leaves; None for the others.

    Raises:
        TypeError: If a parameter that is to be pruned is not a floating-point array.
        ValueError: If `prunable` gives what is no number of input axes for some parameter, has another structure than
            the parameters, or names none of them.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    if callable(prunable):
        counts = [prunable(_plain(path), array) for path, array in leaves]
    else:
        counts, given = jax.tree.flatten(prunable)
        if given != structure:
            raise ValueError(f"prunable must have the structure of the parameters, {structure}; got {given}.")
    matrices = tuple(
        _matrix(leaf_name(path), array, inputs) for (path, array), inputs in zip(leaves, counts, strict=True)
    )
    if leaves and not any(matrices):
        raise ValueError(f"prunable names none of the {len(leaves)} parameters: nothing would be pruned.")
    return matrices


def _matrix(name: str, array: Any, inputs: Any) -> Matrix | None:
    """One parameter as a matrix; None if it is not pruned."""
    shape = tuple(array.shape)
    if not isinstance(inputs, int | np.integer | np.bool_) or inputs < 0 or 0 < len(shape) <= inputs:
        raise ValueError(
            f"prunable must give the number of leading axes that are inputs, fewer than there are, or False; "
            f"{name} has shape {shape}, got {inputs!r}."
        )
    if inputs and len(shape) < 2:
        raise ValueError(f"a matrix has two axes or more; {name} has shape {shape}: leave it out.")
    if inputs and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"only floating-point weights are pruned; {name} is {array.dtype}: leave it out.")
    return Matrix(name, shape, int(inputs)) if inputs else None


def pruned_leaves(leaves: Sequence[Any], matrices: Sequence[Matrix | None]) -> list[Any]:
    """The leaves that are pruned."""
    return [leaf for leaf, matrix in zip(leaves, matrices, strict=True) if matrix is not None]


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, from the path that JAX gives."""
    return path_name(_plain(path)) or "the array"


def _plain(path: tuple[Any, ...]) -> Path:
    """A path without the kinds of the containers: keys, indices and field names."""
    names = ("key", "idx", "name")
    return tuple(next((getattr(step, name) for name in names if hasattr(step, name)), str(step)) for step in path)

"""Building blocks that model families share: affine maps, norms, gates, attention, task heads, reading configurations.

Widths are read from the arrays.
A Flax module is split into a static description and plain arrays, and put together again by name. `nnx.merge` matches
arrays to variables by position, so a renamed key would silently permute the weights: `bind`, the one place that merges,
compares the full key paths first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxprune.units import KINDS, Intervention, Params, Path, flatten, path_name


class Part(NamedTuple):
    """A module without its arrays: hashable, and the same for every width."""

    graphdef: Any
    paths: tuple[Path, ...]  # where its arrays go, sorted


def describe(make: Callable[[nnx.Rngs], nnx.Module]) -> Part:
    """The static description of a module, made without computing anything."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return Part(graphdef, tuple(flatten(nnx.to_pure_dict(state))))


def initialise(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
    """Fresh arrays for a module, as a plain nested dict. Layers that share one `make` are traced once."""
    return (_traced_once if isinstance(key, Tracer) else _initialise)(make, key)


def _initialise(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1])


_traced_once = jax.jit(_initialise, static_argnums=0)  # under a trace; by itself it would be compiled for each width


def bind(part: Part, params: Params) -> Any:
    """The module with these arrays.

    Raises:
        ValueError: If the names of the parameters are not exactly those of the module.
    """
    paths = tuple(flatten(params))
    if paths != part.paths:
        unknown = [path_name(p) for p in paths if p not in part.paths]
        missing = [path_name(p) for p in part.paths if p not in paths]
        raise ValueError(f"parameters and module disagree: unknown {unknown}, missing {missing}.")
    return nnx.merge(part.graphdef, params)


# (values [b, t, units(, channels)], their cotangent, mask [b, t]) -> [b, units], all float32
TokenReduction: TypeAlias = Callable[[Array, Array, Array], Array]


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """`x Φ(x)`, with the error function (Hendrycks and Gimpel 2016). Its backward pass keeps the derivative alone."""
    return x * _phi(x)


@gelu.defjvp
def _gelu_tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    share = _phi(x)
    density = jnp.exp(-0.5 * jnp.square(x)) * (2.0 * math.pi) ** -0.5
    return x * share, tangent * (share + x * density)


def _phi(x: Array) -> Array:
    """The normal distribution function."""
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_jvp
def masked_softmax(scores: Float[Array, "b n t s"], mask: Bool[Array, "b *t s"]) -> Float[Array, "b n t s"]:
    """Softmax over the positions that the mask allows; evenly, and without gradients, where it allows none.

    The mask is the same for all queries, `[b, s]`, or differs, `[b, t, s]`. The backward pass keeps the result alone:
    automatic differentiation would keep four arrays of that size.
    """
    # A minimum becomes part of the product before it, where a choice would be one more pass over all scores.
    limit = jnp.where(_per_query(mask), jnp.inf, -1e9)  # finite, else a row were NaN
    return jax.nn.softmax(jnp.minimum(scores, limit), axis=-1)


@masked_softmax.defjvp
def _softmax_tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    weights = masked_softmax(*primals)
    tangent = tangents[0] * _per_query(primals[1]).any(-1, keepdims=True).astype(weights.dtype)
    return weights, weights * (tangent - (weights * tangent).sum(-1, keepdims=True))


def _per_query(mask: Bool[Array, "b *t s"]) -> Bool[Array, "b 1 q s"]:
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


PRODUCT = "product"  # the name of what a matrix product returns, see `Stack.recomputes`


class Affine(nnx.Module):
    """An affine map of the last axes, as many as the kernel has before those of the bias. Sums in float32."""

    def __init__(self, kernel: tuple[int, ...], bias: tuple[int, ...], *, rngs: nnx.Rngs):
        self.axes = len(kernel) - len(bias)
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), kernel))  # BERT's initializer_range
        self.bias = nnx.Param(jnp.zeros(bias))

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.kernel[...], self.bias[...]
        y = checkpoint_name(_product(self.axes, x.astype(kernel.dtype), kernel), PRODUCT)
        return (y + bias.astype(jnp.float32)).astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=0)  # else the other shape of the kernel is kept, a copy
def _product(axes: int, x: Array, kernel: Array) -> Array:
    """The sum over the last axes of `x`, as a matrix product: else the backward pass transposes the kernel."""
    rows, columns, summed = x.shape[: x.ndim - axes], kernel.shape[axes:], math.prod(kernel.shape[:axes])
    matrix = kernel.reshape(summed, math.prod(columns))
    return product(x.reshape(*rows, summed), matrix).reshape(*rows, *columns)


def product(x: Float[Array, "*rows k"], matrix: Float[Array, "k n"], axis: int = 0) -> Float[Array, "*rows n"]:
    """A matrix product, summed in float32 over the last axis of `x` and this one of the matrix.

    On a CPU with `jax_default_matmul_precision` "bfloat16" its operands are rounded to that type, those of its backward
    pass too, which matrix units (AMX) multiply several times faster. On TPUs and GPUs XLA heeds the setting by itself.
    """
    if jax.config.values["jax_default_matmul_precision"] == "bfloat16" and jax.default_backend() == "cpu":
        return _rounded_product(axis, x, matrix)
    return _contract(x, matrix, axis)


def _contract(x: Array, matrix: Array, axis: int) -> Array:
    sides = (((x.ndim - 1,), (axis,)), ((), ()))  # not `matrix.T`, which would be copied
    return jax.lax.dot_general(x, matrix, sides, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_product(axis: int, x: Array, matrix: Array) -> Array:
    return _contract(x.astype(jnp.bfloat16), matrix.astype(jnp.bfloat16), axis)


def _rounded_forward(axis: int, x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rounded_product(axis, x, matrix), (x, matrix)


def _rounded_backward(axis: int, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, matrix = (value.astype(jnp.bfloat16) for value in saved)
    slope = cotangent.astype(jnp.bfloat16)
    rows, slopes = (value.reshape(-1, value.shape[-1]) for value in (x, slope))
    d_matrix = _contract(slopes.T, rows, 0) if axis else _contract(rows.T, slopes, 0)
    return _contract(slope, matrix, 1 - axis).astype(saved[0].dtype), d_matrix.astype(saved[1].dtype)


_rounded_product.defvjp(_rounded_forward, _rounded_backward)


class Linear(nnx.Module):
    """A linear map of the last axes, as many as `inputs` says. Sums in float32, returns the type of `x`."""

    def __init__(self, kernel: tuple[int, ...], scale: float, inputs: int = 1, *, rngs: nnx.Rngs):
        self.inputs = inputs
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), kernel))

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        return checkpoint_name(_product(self.inputs, x.astype(kernel.dtype), kernel), PRODUCT).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, embed: int, eps: float, offset: float = 0.0):
        self.eps, self.offset = eps, offset  # the offset is added to the scale: 1 in Gemma
        self.scale = nnx.Param(jnp.full(embed, 1.0 - offset))

    def __call__(self, x: Float[Array, "b t *n d"]) -> Float[Array, "b t *n d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (y * (scale + self.offset if self.offset else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32 (Ba et al. 2016)."""

    def __init__(self, embed: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(embed))
        self.bias = nnx.Param(jnp.zeros(embed))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        y = normalise(x.astype(jnp.float32), self.eps)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalise(x: Float[Array, "b t d"], eps: float) -> Float[Array, "b t d"]:
    """Mean 0 and variance 1 over the last axis; `eps` is added to the variance."""
    return _normalise(x, eps)[0]


@normalise.defjvp
def _normalise_tangent(eps: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y, scale = _normalise(primals[0], eps)
    (tangent,) = tangents
    return y, scale * (tangent - tangent.mean(-1, keepdims=True) - y * (y * tangent).mean(-1, keepdims=True))


def _normalise(x: Array, eps: float) -> tuple[Array, Array]:
    y = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y * scale, scale


class Embedding(nnx.Module):
    """A table of vectors."""

    def __init__(self, rows: int, embed: int, scale: float = 0.02, *, rngs: nnx.Rngs):  # BERT's initializer_range
        self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), (rows, embed)))

    def __call__(self, index: Array) -> Array:
        return jnp.take(self.embedding[...], index, axis=0, mode="clip")


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; without a key or with rate 0 it returns `x` unchanged."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def dropout_of(rate: float, key: Array | None) -> Callable[[Array], Array] | None:
    """The dropout as a function; None where there is none."""
    return None if key is None or rate == 0.0 else lambda x: dropout(x, rate, key)


def contribution(values: Array, cotangent: Array) -> Float[Array, "b t u"]:
    """Each unit's first-order contribution at each token: `h * dh`, summed over a head's channels."""
    return (values * cotangent).sum(tuple(range(3, values.ndim)))


def sum_tokens(values: Array, cotangent: Array, mask: Bool[Array, "b t"]) -> Float[Array, "b u"]:
    """The sum of `h * dh` over the tokens, signs kept: the exact gradient with respect to a gate."""
    return jnp.where(mask[..., None], contribution(values, cotangent), 0.0).sum(1)


def absolute_tokens(values: Array, cotangent: Array, mask: Bool[Array, "b t"]) -> Float[Array, "b u"]:
    """The sum over the tokens of `|h * dh|`."""
    return jnp.where(mask[..., None], jnp.abs(contribution(values, cotangent)), 0.0).sum(1)


def squared_tokens(values: Array, cotangent: Array, mask: Bool[Array, "b t"]) -> Float[Array, "b u"]:
    """The sum over the tokens of `(h * dh)^2`."""
    return jnp.where(mask[..., None], jnp.square(contribution(values, cotangent)), 0.0).sum(1)


def max_tokens(values: Array, cotangent: Array, mask: Bool[Array, "b t"]) -> Float[Array, "b u"]:
    """The largest `h * dh` over the tokens, signs kept; 0 for a row without tokens."""
    largest = jnp.where(mask[..., None], contribution(values, cotangent), -jnp.inf).max(1)
    return jnp.where(mask.any(1)[:, None], largest, 0.0)


def merge_axes(values: Array, axes: int) -> Float[Array, "b t u *rest"]:
    """The values with one axis for units that have several."""
    b, t, *sizes = values.shape
    return values.reshape(b, t, math.prod(sizes[:axes]), *sizes[axes:])


def gate(
    values: Array,
    gates: Array | None,
    mean: Array | None,
    mask: Bool[Array, "b t"],
    tokens: TokenReduction = sum_tokens,
    axes: int = 1,
) -> Array:
    """Multiplies the units of a site by their gates: `g * h + (1 - g) * mean`, in float32.

    With `tokens` other than `sum_tokens` the forward pass is the same, but the gradient with respect to the gates
    becomes that reduction of `h - mean` and `dh`: it needs no gate per token.

    Args:
        values: `[b, t, units, ...]`, with one axis or several for the units; of heads the channels come after them.
        gates: `[units]` or one row per example `[b, units]`; None is open.
        mean: What a closed unit is replaced by, `[units]`, for heads `[heads, channels]`; None is zero.
        mask: `[b, t]`, true where there is a token.
        tokens: How the backward pass reduces over tokens.
        axes: The number of axes of the units: 2 for channels, which are numbered through all heads.

    Returns:
        The gated values, in the shape and type of `values`.
    """
    if gates is None:
        return values
    if axes > 1:
        return gate(merge_axes(values, axes), gates, mean, mask, tokens).reshape(values.shape)
    if tokens is sum_tokens:
        return _gated(values, gates, mean)
    return _reduced_gate(tokens, values, gates, mean, mask)


def _gated(values: Array, gates: Array, mean: Array | None) -> Array:
    g = gates.astype(jnp.float32)
    g = g[:, None] if g.ndim == 2 else g
    g = g.reshape(*g.shape, *[1] * (values.ndim - 3))
    gated = values.astype(jnp.float32) * g
    if mean is not None:
        gated = gated + (1.0 - g) * mean.astype(jnp.float32)
    return gated.astype(values.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduced_gate(tokens: TokenReduction, values: Array, gates: Array, mean: Array | None, mask: Array) -> Array:
    return _gated(values, gates, mean)


def _reduced_gate_forward(tokens: TokenReduction, values: Array, gates: Array, mean: Array | None, mask: Array):
    return _gated(values, gates, mean), (values, gates, mean, mask)


def _reduced_gate_backward(tokens: TokenReduction, residuals: tuple, cotangent: Array):
    values, gates, mean, mask = residuals
    above = values.astype(jnp.float32) - (0.0 if mean is None else mean.astype(jnp.float32))
    reduced = tokens(above, cotangent.astype(jnp.float32), mask)
    d_gates = reduced if gates.ndim == 2 else reduced.sum(0)
    d_mean = None if mean is None else jnp.zeros_like(mean)
    return _gated(cotangent, gates, None), d_gates.astype(gates.dtype), d_mean, None


_reduced_gate.defvjp(_reduced_gate_forward, _reduced_gate_backward)


class Sites:
    """The gated places of one layer while it runs: multiplies units by their gates, and keeps values on request.

    Args:
        intervention: The layer's gates and means, by local name (`"attention.heads"`).
        mask: `[b, t]`, true where there is a token.
        tokens: How gate gradients reduce over tokens.
        returns: The values to keep: local names, or what they end with.
        known: Values before their gates, by local name, that are taken instead of those computed.
    """

    def __init__(
        self,
        intervention: Intervention,
        mask: Bool[Array, "b t"],
        tokens: TokenReduction,
        returns: Collection[str],
        known: Mapping[str, Array],
    ):
        self.gates, self.means = intervention.gates or {}, intervention.means or {}
        self.mask, self.tokens, self.returns, self.known = mask, tokens, returns, known
        self.values: dict[str, Array] = {}

    def gate(self, name: str, values: Array) -> Array:
        """The values of a site times their gates. The axes of its units come first after `[b, t]`."""
        axes = len(KINDS[name.rpartition(".")[2]])
        values = self.known.get(name, values)
        return gate(values, self.gates.get(name), self.means.get(name), self.mask, self.tokens, axes)

    def wants(self, name: str) -> bool:
        """True if this value is to be kept."""
        return name in self.returns or name.rpartition(".")[2] in self.returns

    def keep(self, name: str, value: Array | None) -> None:
        """Keeps a value if it is wanted; a site's value gets one axis for its units."""
        if value is not None and self.wants(name):
            kind = name.rpartition(".")[2]
            self.values[name] = merge_axes(value, len(KINDS[kind])) if kind in KINDS else value

    def keep_attention(
        self,
        module: str,
        query: Float[Array, "b t *q h"],
        mixed: Float[Array, "b t *q v"],
        scores: Float[Array, "b n t s"] | None,
        allowed: Bool[Array, "b *t s"],
    ) -> None:
        """Keeps the wanted values of an attention: gated values, scores, and the mask of its softmax."""
        for name, value in (
            ("heads", mixed),
            ("channels", mixed),
            ("query_channels", query),
            ("scores", scores),
            ("allowed", allowed),
        ):
            self.keep(f"{module}.{name}", value)


def attend(
    query: Float[Array, "b t *q h"],
    key: Float[Array, "b s n h"],
    value: Float[Array, "b s n v"],
    mask: Bool[Array, "b *t s"],
    *,
    scale: float | None = None,
    bias: Float[Array, "n t s"] | None = None,
    drop: Callable[[Array], Array] | None = None,
    scores: bool = False,
) -> tuple[Float[Array, "b t *q v"], Float[Array, "b heads t s"] | None]:
    """Softmax attention; fused where the hardware has it.

    Args:
        query: Queries of every head, `[b, t, n, h]`; or `[b, t, n, m, h]`, where `m` of them share a key and a value.
        key: Keys.
        value: Values.
        mask: True where a position may be attended to, by all queries or query by query. A row with none attends
            evenly, so that it stays finite.
        scale: What the scores are multiplied by; None is one over the square root of the head size.
        bias: What is added to the scores, such as T5's relative positions.
        drop: The dropout of the attention probabilities; None is none.
        scores: Whether to return the scores before mask and softmax, scaled and with their bias.

    Returns:
        The mixed values per head, and the scores if asked for.
    """
    b, t, *heads, h = query.shape
    if bias is None and not scores and drop is None and has_fused_attention(query, value):
        mixed = fused_attention(
            query.reshape(b, t, math.prod(heads), h), key, value, mask, implementation="cudnn", scale=scale
        )
        return mixed.reshape(b, t, *heads, value.shape[-1]), None
    factor = h**-0.5 if scale is None else scale  # Vaswani et al. 2017, eq. 1
    if len(heads) == 2:  # queries that share a key stand one behind the other
        query = query.transpose(0, 3, 1, 2, 4).reshape(b, heads[1] * t, heads[0], h)
    query, key, value = (_heads_first(x) for x in (query, key, value))
    raw = jnp.einsum("bnth,bnsh->bnts", query, key, preferred_element_type=jnp.float32)
    raw = raw if factor == 1.0 else factor * raw
    raw = raw.reshape(b, math.prod(heads), t, raw.shape[-1])
    raw = raw if bias is None else raw + bias.astype(jnp.float32)
    weights = masked_softmax(raw, mask).astype(value.dtype)
    weights = weights if drop is None else drop(weights)
    weights = weights.reshape(*query.shape[:3], weights.shape[-1])
    mixed = jnp.einsum("bnts,bnsh->bnth", weights, value, preferred_element_type=jnp.float32)
    mixed = checkpoint_name(mixed, PRODUCT).astype(value.dtype)
    raw = raw if scores else None
    if len(heads) == 2:
        return mixed.reshape(b, *heads, t, value.shape[-1]).transpose(0, 3, 1, 2, 4), raw
    return mixed.transpose(0, 2, 1, 3), raw


def _heads_first(x: Float[Array, "b t n h"]) -> Float[Array, "b n t h"]:
    """The array, laid out once: without the barrier, compilers lay it out again for the backward pass.

    In three dimensions no layout but this one is left.
    """
    b, t, n, h = x.shape
    return jax.lax.optimization_barrier(x.transpose(0, 2, 1, 3).reshape(b * n, t, h)).reshape(b, n, t, h)


def fused_attention(
    query: Float[Array, "b t q h"],
    key: Float[Array, "b s n h"],
    value: Float[Array, "b s n h"],
    mask: Bool[Array, "b *t s"],
    *,
    implementation: Literal["cudnn", "xla"],
    scale: float | None = None,
) -> Float[Array, "b t n h"]:
    """The mixed values of `attend`, by one call into a library; `xla` runs everywhere and fuses nothing."""
    mask = jnp.broadcast_to(_per_query(mask), (mask.shape[0], 1, query.shape[1], mask.shape[-1]))
    with jax.numpy_dtype_promotion("standard"):  # the library mixes 16-bit values with float32 scores
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=implementation)


def has_fused_attention(
    query: Float[Array, "b t *n h"], value: Float[Array, "b s n h"], capability: float | None = None
) -> bool:
    """True if the device has a fused kernel for these shapes and types, and for their gradients.

    That is cuDNN's, on an NVIDIA GPU of compute capability 8.0 or more: 16-bit, head sizes equal and multiples of 8 up
    to 128 and, because there is a mask, even lengths in the backward pass.

    Args:
        query: Queries of every head.
        value: Values of every head.
        capability: The GPU's compute capability; None asks the default device.
    """
    head_dim = query.shape[-1]
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and query.dtype == value.dtype
        and query.size > 0
        and head_dim == value.shape[-1]
        and head_dim % 8 == 0
        and 0 < head_dim <= 128
        and query.shape[1] % 2 == 0
        and value.shape[1] % 2 == 0
        and (_compute_capability() if capability is None else capability) >= 8.0
    )


def _compute_capability() -> float:
    """The compute capability of the default device; 0 if it is not an NVIDIA GPU."""
    number = str(getattr(jax.devices()[0], "compute_capability", ""))  # "9.0"; AMD has names such as "gfx90a"
    return float(number) if re.fullmatch(r"\d+\.\d+", number) else 0.0


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


ENDS = ("start", "end")  # the labels of a head for spans
NOWHERE = -1e9  # the logit of a token that no span may start or end at: finite, so that sums of logits are numbers
POOLINGS = ("first", "mean", "last", "none")


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """A classifier or regressor on hidden states, or a marker of the start and the end of a span."""

    name: str
    labels: tuple[str, ...]  # one name per logit; ("start", "end") of spans
    regression: bool = False
    pooling: str = "first"  # the vector of the "first" or "last" token, the "mean" over tokens; "none": spans
    dense: str | None = None  # activation of the layer before the output; None: there is none

    @property
    def spans(self) -> bool:
        """True if every token has its logits, for a span's start and end."""
        return self.pooling == "none"

    @property
    def kind(self) -> str:
        """The head's purpose, in words."""
        return "a regression" if self.regression else "for spans" if self.spans else "a classification"


# The task head of a model that answers in text: the next token, one logit per entry of the vocabulary.
LANGUAGE = TaskHead(name="language", labels=())
# The same with one logit per label: those of the tokens with which the labels' words begin.
WORDS = TaskHead(name="words", labels=())


def check_heads(heads: Sequence[TaskHead]) -> None:
    """Refuses task heads that a model cannot have.

    Raises:
        ValueError: If two heads share a name or a head is not usable.
    """
    names = Counter(head.name for head in heads)
    for head in heads:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", head.name) or names[head.name] > 1:
            raise ValueError(
                f"task head {head.name!r}: names must differ and be made of letters, digits, _ and -, letter first."
            )
        if not head.labels or (head.regression and len(head.labels) != 1):
            raise ValueError(f"task head {head.name!r} has {len(head.labels)} labels.")
        if head.pooling not in POOLINGS:
            choices = f"{', '.join(map(repr, POOLINGS[:-1]))} or {POOLINGS[-1]!r}"
            raise ValueError(f"task head {head.name!r}: pooling must be {choices}, got {head.pooling!r}.")
        if head.spans and (head.labels != ENDS or head.regression):
            raise ValueError(f"task head {head.name!r} is for spans: its labels are {ENDS}, got {head.labels}.")
        if head.dense is not None and head.dense not in ACTIVATIONS:
            raise ValueError(f"task head {head.name!r}: dense must be None or an activation, got {head.dense!r}.")


class Classifier(nnx.Module):
    """A task head on the pooled hidden state, or for spans on that of every token."""

    def __init__(self, embed: int, head: TaskHead, rate: float, *, rngs: nnx.Rngs):
        if head.dense is not None:
            self.dense = Affine((embed, embed), (embed,), rngs=rngs)
        self.out = Affine((embed, len(head.labels)), (len(head.labels),), rngs=rngs)
        self.activation = head.dense
        self.pooling = head.pooling
        self.rate = 0.0 if head.spans else rate  # BERT's own head for SQuAD drops nothing

    def __call__(
        self, hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"], key: Array | None
    ) -> Float[Array, "b l"] | Float[Array, "b l t"]:
        pooled = pool(hidden.astype(jnp.float32), mask, self.pooling)
        if self.activation is not None:
            pooled = ACTIVATIONS[self.activation](self.dense(pooled))
        logits = self.out(dropout(pooled, self.rate, key))
        return jnp.where(mask[:, None], logits.swapaxes(1, 2), NOWHERE) if self.pooling == "none" else logits


def pool(hidden: Float[Array, "b t d"], mask: Bool[Array, "b t"], pooling: str) -> Float[Array, "b *t d"]:
    """One vector per example, as `TaskHead.pooling` says; with "none" the hidden states themselves."""
    if pooling == "none":
        return hidden
    if pooling == "mean":
        tokens = jnp.maximum(mask.sum(1, keepdims=True), 1).astype(jnp.float32)
        return jnp.where(mask[..., None], hidden, 0.0).sum(1) / tokens
    if pooling == "last":
        last = jnp.where(mask, jnp.arange(mask.shape[1]), 0).max(1)  # of a row without tokens the first
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return hidden[:, 0]

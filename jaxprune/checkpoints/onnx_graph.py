"""From a function in JAX to a graph of ONNX, which computes the same for batches of any size.

JAX traces the function, as it does before it compiles one, with sizes that have names. Every primitive of the trace
becomes an operator of ONNX by the tables below, and what they do not have is refused. So no family of models needs
anything of its own here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxprune.models.layers import gelu, masked_softmax, normalise
from jaxprune.units import Params

OPSET, IR = 20, 9  # versions of operators and file: what onnxruntime reads since 1.17, of 2024
MOST_BYTES = 2**31 - 2**20  # of weights: what protobuf puts into one file, less some room for the nodes
_TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}  # their numbers in ONNX


def graph_file(
    function: Callable[[Params, Mapping[str, Any]], Any], params: Params, inputs: Mapping[str, Any], dtype: str
) -> bytes:
    """The ONNX file that computes a function of parameters and a batch. Its output is named `logits`.

    Args:
        function: What it computes: one array of float32.
        params: The parameters, of float32, which become part of the file.
        inputs: Name to shape and type. A size that JAX knows by a name is free; the file has int64 where this has
            int32.
        dtype: Type of the weights in the file; those that it does not hold exactly stay float32.

    Raises:
        ValueError: If a primitive is not known here, or the weights are too large for one file.
    """
    outlines = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, np.float32), params)
    traced = jax.jit(function).trace(outlines, dict(inputs)).jaxpr
    graph = _Graph(dtype)
    weights = [graph.constant(np.asarray(array, np.float32)) for array in jax.tree.leaves(params)]
    given = [graph.input(name, inputs[name].shape) for name in sorted(inputs)]  # JAX's order of a dict
    (found,) = _convert(graph, traced, [*weights, *given])
    return graph.file([*inputs], found)


class _Value(NamedTuple):
    """A value of the graph: what it is called, and what is known of it."""

    name: str
    shape: tuple[Any, ...]  # numbers, and sizes that JAX knows by a name
    dtype: np.dtype
    array: np.ndarray | None = None  # of a constant
    before: _Value | None = None  # what was given this shape


class _Graph:
    """The nodes so far. Nothing is computed twice: all layers share their masks and positions."""

    def __init__(self, dtype: str):
        from onnx import helper  # pyright: ignore[reportMissingImports]

        self.make, self.dtype = helper, np.dtype(dtype)
        self.nodes: dict[Any, tuple[Any, tuple[str, ...]]] = {}  # what is computed -> its node, and what that returns
        self.arrays: dict[str, np.ndarray] = {}
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.sizes: dict[str, str] = {}  # a size by its name -> a vector that has this number

    def input(self, name: str, shape: tuple[Any, ...]) -> _Value:
        """An input of int64, read as int32."""
        self.inputs[name] = shape
        self.know(name, shape)
        return _Value(self.add("Cast", [name], to=_TYPES["int32"])[0], shape, np.dtype(np.int32))

    def constant(self, array: np.ndarray) -> _Value:
        """A constant; in the type of the weights if that holds it exactly."""
        with np.errstate(over="ignore"):
            stored = array.astype(self.dtype) if array.dtype == np.float32 and array.ndim else array
        stored = stored if np.array_equal(stored.astype(array.dtype), array) else array
        digest = hashlib.sha256(stored.tobytes()).hexdigest()[:16]
        name = "_".join(("constant", digest, str(stored.dtype), *map(str, stored.shape)))
        self.arrays[name] = stored
        if stored.dtype != array.dtype:
            (name,) = self.add("Cast", [name], to=_TYPES[str(array.dtype)])
        return _Value(name, array.shape, array.dtype, array)

    def numbers(self, numbers: Any) -> str:
        """The name of a constant of int64."""
        return self.constant(np.array(numbers, np.int64)).name

    def add(self, operator: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> tuple[str, ...]:
        """The names of what an operator returns."""
        key = (operator, *inputs, *attributes.items())
        if key not in self.nodes:
            names = tuple(f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs))
            self.nodes[key] = self.make.make_node(operator, inputs, names, **attributes), names
        return self.nodes[key][1]

    def know(self, name: str, shape: tuple[Any, ...]) -> None:
        """Notes the sizes that a value has."""
        for axis, size in enumerate(shape):
            if not isinstance(size, int) and str(size) not in self.sizes:
                (self.sizes[str(size)],) = self.add("Shape", [name], start=axis, end=axis + 1)

    def size(self, size: Any) -> str:
        """The name of a vector with one size."""
        if not isinstance(size, int) and str(size) not in self.sizes:
            raise ValueError(f"the size {size} of an array has no ONNX export yet: please report it.")
        return self.numbers([size]) if isinstance(size, int) else self.sizes[str(size)]

    def shape(self, sizes: Sequence[Any]) -> str:
        """The name of a vector with several sizes."""
        if all(isinstance(size, int) for size in sizes):
            return self.numbers(sizes)
        return self.add("Concat", [self.size(size) for size in sizes], axis=0)[0]

    def file(self, inputs: Sequence[str], output: _Value) -> bytes:
        """The file, with what the output needs alone."""
        make, needed, nodes = self.make, {output.name}, []
        for node, names in reversed(self.nodes.values()):
            if needed & {*names}:
                needed |= {*node.input}
                nodes.insert(0, node)
        nodes.append(make.make_node("Identity", [output.name], ["logits"]))
        arrays = {name: array for name, array in self.arrays.items() if name in needed}
        if (size := sum(array.nbytes for array in arrays.values())) > MOST_BYTES:
            raise ValueError(
                f"an ONNX file holds 2 GiB, and the weights take {size / 2**30:.1f} GiB in {self.dtype}: "
                f"give a smaller dtype, or export to stablehlo."
            )
        tensors = [
            make.make_tensor(name, _TYPES[str(array.dtype)], array.shape, array.tobytes(), raw=True)
            for name, array in arrays.items()
        ]

        def described(name: str, kind: str, shape: tuple[Any, ...]) -> Any:
            sizes = [size if isinstance(size, int) else str(size) for size in shape]
            return make.make_tensor_value_info(name, _TYPES[kind], sizes)

        given = [described(name, "int64", self.inputs[name]) for name in inputs]
        graph = make.make_graph(nodes, "model", given, [described("logits", "float32", output.shape)], tensors)
        opsets = [make.make_opsetid("", OPSET)]
        return make.make_model(graph, opset_imports=opsets, ir_version=IR, producer_name="jaxprune").SerializeToString()


def _convert(graph: _Graph, program: ClosedJaxpr | Jaxpr, arguments: Sequence[_Value]) -> list[_Value]:
    """Adds what a program computes to the graph."""
    jaxpr, constants = (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= {place: graph.constant(np.asarray(a)) for place, a in zip(jaxpr.constvars, constants, strict=True)}

    def read(atom: Any) -> _Value:
        return graph.constant(np.asarray(atom.val, _outline(atom).dtype)) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, [read(atom) for atom in equation.invars]
        if name in _CALLS:
            outputs = _call(graph, equation, inputs)
        elif name in _SAME:
            outputs = inputs
        elif name in _OPERATORS:
            outputs = _result(graph, equation, _OPERATORS[name], *inputs)
        elif name in _RULES:
            outputs = _RULES[name](graph, equation, *inputs)
        else:
            raise ValueError(f"the model computes {name!r}, of which there is no ONNX export yet: please report it.")
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _call(graph: _Graph, equation: JaxprEqn, inputs: Sequence[_Value]) -> list[_Value]:
    """The results of a function inside the program; a few functions are one operator."""
    inner = next(value for value in equation.params.values() if isinstance(value, ClosedJaxpr | Jaxpr))
    jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    if equation.primitive.name == "custom_jvp_call" and (rule := _FUNCTIONS.get(jaxpr.debug_info.func_name)):
        return rule(graph, equation, *inputs)
    return _convert(graph, inner, inputs)


def _result(graph: _Graph, equation: JaxprEqn, operator: str, *inputs: Any, **attributes: Any) -> list[_Value]:
    """The results of an operator, whose inputs are values, or names of constants that only ONNX has."""
    given = [each.name if isinstance(each, _Value) else each for each in inputs]
    names = graph.add(operator, given, len(equation.outvars), **attributes)
    outlines = map(_outline, equation.outvars)
    return [_Value(name, each.shape, each.dtype) for name, each in zip(names, outlines, strict=True)]


def _outline(atom: Any) -> Any:
    """The shape and the type of what the trace has."""
    return atom.aval


_CALLS = ("jit", "pjit", "remat2", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call")
_SAME = ("name", "stop_gradient", "optimization_barrier", "copy")
_OPERATORS = {  # with the same inputs, and nothing else to say
    "abs": "Abs", "add": "Add", "and": "And", "cos": "Cos", "div": "Div", "eq": "Equal", "erf": "Erf", "exp": "Exp",
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less",
    "max": "Max", "min": "Min", "mul": "Mul", "neg": "Neg", "sin": "Sin", "sqrt": "Sqrt", "sub": "Sub", "tanh": "Tanh",
}  # fmt: skip
_Rule: TypeAlias = Callable[..., list[_Value]]


def _as(graph: _Graph, x: _Value, dtype: Any) -> _Value:
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    if x.array is not None:
        return graph.constant(x.array.astype(dtype))
    return _Value(graph.add("Cast", [x.name], to=_TYPES[str(dtype)])[0], x.shape, dtype)


def _reshape(graph: _Graph, equation: JaxprEqn, x: _Value) -> list[_Value]:
    """Another shape. ONNX writes 0 for a size that stays in its place, and -1 for one that remains."""
    shape = _outline(equation.outvars[0]).shape
    if x.before is not None and x.before.shape == shape:
        return [x.before]
    if x.array is not None:
        return [graph.constant(x.array.reshape(shape))]
    graph.know(x.name, x.shape)
    stay = [i < len(x.shape) and size == x.shape[i] for i, size in enumerate(shape)]
    sizes = [0 if same else size for same, size in zip(stay, shape, strict=True)]
    free = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if free:
        sizes[next((i for i in free if str(sizes[i]) not in graph.sizes), free[0])] = -1
    return [_Value(graph.add("Reshape", [x.name, graph.shape(sizes)])[0], shape, x.dtype, before=x)]


def _broadcast(graph: _Graph, equation: JaxprEqn, x: _Value) -> list[_Value]:
    """New axes, and copies along axes of size 1."""
    shape, places = _outline(equation.outvars[0]).shape, equation.params["broadcast_dimensions"]
    added = [axis for axis in range(len(shape)) if axis not in places]
    if x.array is not None:
        x = graph.constant(np.expand_dims(x.array, added))
    elif added:
        (name,) = graph.add("Unsqueeze", [x.name, graph.numbers(added)])
        sizes = dict(zip(places, x.shape, strict=True))
        x = _Value(name, tuple(sizes.get(axis, 1) for axis in range(len(shape))), x.dtype)
    times = [1 if size == old else size for size, old in zip(shape, x.shape, strict=True)]
    return [x] if all(size == 1 for size in times) else _result(graph, equation, "Expand", x, graph.shape(times))


def _size(graph: _Graph, equation: JaxprEqn) -> list[_Value]:
    (name,) = graph.add("Squeeze", [graph.size(equation.params["dim"])])
    return [_as(graph, _Value(name, (), np.dtype(np.int64)), _outline(equation.outvars[0]).dtype)]


def _count(graph: _Graph, equation: JaxprEqn) -> list[_Value]:
    """The numbers from 0."""
    (size,) = equation.params["shape"]
    (end,) = graph.add("Squeeze", [graph.size(size)])
    (name,) = graph.add("Range", [graph.numbers(0), end, graph.numbers(1)])
    return [_as(graph, _Value(name, (size,), np.dtype(np.int64)), equation.params["dtype"])]


def _permuted(graph: _Graph, x: _Value, order: Sequence[int]) -> _Value:
    if [*order] == [*range(len(order))]:
        return x
    (name,) = graph.add("Transpose", [x.name], perm=tuple(order))
    return _Value(name, tuple(x.shape[i] for i in order), x.dtype)


def _product(graph: _Graph, equation: JaxprEqn, x: _Value, y: _Value) -> list[_Value]:
    """The products of two stacks of matrices, or of rows and one matrix, in float32."""
    (summed, summed_y), (stacked, stacked_y) = equation.params["dimension_numbers"]
    rows = [i for i in range(len(x.shape)) if i not in (*summed, *stacked)]
    columns = [i for i in range(len(y.shape)) if i not in (*summed_y, *stacked_y)]
    if len(summed) != 1 or len(columns) != 1 or (stacked and len(rows) != 1):
        raise ValueError(
            f"the product {equation.params['dimension_numbers']} has no ONNX export yet: please report it."
        )
    x = _permuted(graph, _as(graph, x, np.float32), [*stacked, *rows, *summed])
    y = _permuted(graph, _as(graph, y, np.float32), [*stacked_y, *summed_y, *columns])
    return _result(graph, equation, "MatMul", x, y)


def _gather(graph: _Graph, equation: JaxprEqn, table: _Value, index: _Value) -> list[_Value]:
    """The entries at places along one axis, the same in all rows or in each its own. Places outside are an error."""
    how, rank = equation.params["dimension_numbers"], len(_outline(equation.outvars[0]).shape)
    rows, (axis, *others) = len(how.operand_batching_dims), how.start_index_map
    whole = [size for i, size in enumerate(table.shape) if i != axis]
    taken = [size for i, size in enumerate(equation.params["slice_sizes"]) if i != axis]
    new = range(0 if rows else axis, (0 if rows else axis) + len(index.shape) - 1)  # axes of the index in the result
    known = (
        not others
        and how.collapsed_slice_dims == (axis,)
        and [*how.offset_dims] == [i for i in range(rank) if i not in new]
        and how.operand_batching_dims == how.start_indices_batching_dims == tuple(range(rows))
        and taken[rows:] == whole[rows:]
        and (not rows or axis == rows)
    )
    if not known:
        raise ValueError(f"{how} has no ONNX export yet: please report it.")
    if rows:
        return _result(graph, equation, "GatherND", table, _as(graph, index, np.int64), batch_dims=rows)
    places = graph.add("Squeeze", [index.name, graph.numbers([len(index.shape) - 1])])
    return _result(graph, equation, "Gather", table, *places, axis=axis)


def _over(operator: str) -> _Rule:
    """A rule for what goes over some axes."""

    def rule(graph: _Graph, equation: JaxprEqn, x: _Value) -> list[_Value]:
        return _result(graph, equation, operator, x, graph.numbers(equation.params["axes"]), keepdims=0)

    return rule


def _cumsum(graph: _Graph, equation: JaxprEqn, x: _Value) -> list[_Value]:
    axis, reverse = (int(equation.params[name]) for name in ("axis", "reverse"))
    return _result(graph, equation, "CumSum", x, graph.numbers(axis), reverse=reverse)


def _split(graph: _Graph, equation: JaxprEqn, x: _Value) -> list[_Value]:
    axis, sizes = int(equation.params["axis"]), graph.numbers(equation.params["sizes"])
    return _result(graph, equation, "Split", x, sizes, axis=axis)


def _power(graph: _Graph, equation: JaxprEqn, x: _Value) -> list[_Value]:
    return _result(graph, equation, "Pow", x, graph.constant(np.asarray(equation.params["y"], x.dtype)))


_RULES: dict[str, _Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda graph, e, *parts: _result(graph, e, "Concat", *parts, axis=int(e.params["dimension"])),
    "convert_element_type": lambda graph, e, x: [_as(graph, x, e.params["new_dtype"])],
    "cumsum": _cumsum,
    "dim_as_value": _size,
    "dot_general": _product,
    "gather": _gather,
    "integer_pow": _power,
    "iota": _count,
    "ne": lambda graph, e, x, y: _result(graph, e, "Not", *graph.add("Equal", [x.name, y.name])),
    "reduce_max": _over("ReduceMax"),
    "reduce_sum": _over("ReduceSum"),
    "reshape": _reshape,
    "rsqrt": lambda graph, e, x: _result(graph, e, "Reciprocal", *graph.add("Sqrt", [x.name])),
    "select_n": lambda graph, e, which, no, yes: _result(graph, e, "Where", which, yes, no),
    "split": _split,
    "square": lambda graph, e, x: _result(graph, e, "Mul", x, x),
    "transpose": lambda graph, e, x: [_permuted(graph, x, e.params["permutation"])],
}


def _softmax(graph: _Graph, equation: JaxprEqn, *inputs: _Value) -> list[_Value]:
    jaxpr = equation.params["call_jaxpr"].jaxpr
    largest = next(each for each in jaxpr.eqns if each.primitive.name == "reduce_max")
    (masked,) = _convert(graph, jaxpr.replace(outvars=largest.invars), inputs)  # what it takes the softmax of
    return _result(graph, equation, "Softmax", masked, axis=-1)


def _normalise(graph: _Graph, equation: JaxprEqn, x: _Value) -> list[_Value]:
    inner = equation.params["call_jaxpr"].eqns
    eps = next(float(each.invars[1].val) for each in inner if each.primitive.name == "add")  # to the variance
    scale = graph.constant(np.ones(x.shape[-1], np.float32))
    return _result(graph, equation, "LayerNormalization", x, scale, axis=-1, epsilon=eps)


_FUNCTIONS: dict[str, _Rule] = {  # those that are one operator, which is faster: BERT needs a tenth less time
    gelu.__name__: lambda graph, e, x: _result(graph, e, "Gelu", x),
    masked_softmax.__name__: _softmax,
    normalise.__name__: _normalise,
}

"""Models of your own: Flax modules with gates, and plain functions, are scored, selected and compacted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_models import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    LABELS,
    NEURONS,
    PATCHES,
    PIXELS,
    QWEN3_AXES,
    VISION_AXES,
    VISION_SIZES,
    VOCABULARY,
    FeedForward,
    Qwen3,
    VisionTransformer,
)

import jaxprune as jp
from jaxprune.units import flatten

IMAGES = jax.random.normal(jax.random.key(1), (5, PATCHES, PIXELS))
TOKENS = jax.random.randint(jax.random.key(2), (5, 9), 0, VOCABULARY)


def vision(**changes: Any) -> tuple[jp.own.NNXModel, Any, Any]:
    module = VisionTransformer(nnx.Rngs(0))
    module.eval()
    model, params = jp.own.from_nnx(module, VISION_AXES | changes, sizes=VISION_SIZES)
    return model, params, IMAGES


def qwen3() -> tuple[jp.own.NNXModel, Any, Any]:
    model, params = jp.own.from_nnx(Qwen3(nnx.Rngs(0)), QWEN3_AXES)
    return model, params, TOKENS


BOTH = pytest.mark.parametrize("make", [vision, qwen3])


def log_probability(model: jp.own.NNXModel) -> Any:
    """That of a label, or of the last token's successor, which is the label here."""

    def objective(params: Any, gates: Any, example: Any) -> Any:
        logits = model.apply(params, example["x"][None], gates=gates).reshape(-1, example["logits"])[-1]
        return jax.nn.log_softmax(logits)[example["label"]]

    return objective


def test_a_module_is_taken_apart_and_put_together():
    for model, params, inputs in (vision(), qwen3()):
        module: Any = VisionTransformer(nnx.Rngs(0)) if inputs is IMAGES else Qwen3(nnx.Rngs(0))
        module.eval()
        np.testing.assert_array_equal(model.apply(params, inputs), module(inputs))
        assert type(model.merge(params)) is type(module)
    shapes = {".".join(map(str, path)): array.shape for path, array in flatten(qwen3()[1]["layers"][0]["attn"]).items()}
    assert shapes["q_proj.w"][1:3] == (2, 3) and shapes["o_proj.w"][:2] == (2, 3)
    assert [*jp.open_gates(*vision()[:2])] == [
        f"blocks.{i}.{name}" for i in range(2) for name in ("attention.heads", "mlp.neurons")
    ]
    assert vision()[1]["blocks"][0]["attention"]["query"]["kernel"].shape[1:] == (HEADS, HEAD_DIM)


@BOTH
def test_compaction_keeps_the_function(make):
    model, params, inputs = make()
    error = jp.verify(model, params, lambda params, gates: model.apply(params, inputs, gates=gates))
    assert 0 <= error < 1e-5
    closed = {name: jnp.zeros(len(gate)) for name, gate in jp.open_gates(model, params).items()}
    for gates in (closed, {name: gate.at[0].set(1.0) for name, gate in closed.items()}):
        small = jp.compact(model, params, gates)
        expected = model.apply(params, inputs, gates=gates)
        np.testing.assert_allclose(model.apply(small, inputs), expected, atol=1e-5, rtol=0)


@BOTH
def test_completeness_of_every_example(make):
    model, params, inputs = make()
    gates, logits = jp.open_gates(model, params), LABELS if inputs is IMAGES else VOCABULARY
    count = len(inputs)
    examples = {"x": inputs, "label": jnp.arange(count), "logits": jnp.full(count, logits)}
    objective = lambda params, gates, example: log_probability(model)(params, gates, example | {"logits": logits})  # noqa: E731
    found, completeness = jp.attributions(objective, params, gates, examples, nodes=24)
    assert {name: value.shape for name, value in found.items()} == {
        name: (count, len(gate)) for name, gate in gates.items()
    }
    assert completeness is not None
    np.testing.assert_allclose(completeness.found, completeness.expected, atol=1e-4)
    rows = [jax.tree.map(lambda x, i=i: x[i], examples) for i in range(count)]
    one = jax.jit(objective)
    opened, closed = (
        np.array([one(params, end, row) for row in rows]) for end in (gates, {n: 0 * g for n, g in gates.items()})
    )
    np.testing.assert_allclose(completeness.expected, opened - closed, atol=1e-5)
    slopes, none = jp.attributions(objective, params, gates, examples, nodes=None)
    assert none is None
    slope = jax.jit(jax.grad(objective, argnums=1))(params, gates, rows[2])
    for name, value in slopes.items():
        np.testing.assert_allclose(value[2], slope[name], atol=1e-6)


@BOTH
@pytest.mark.parametrize("budget", [jp.budgets.Parameters(0.5), jp.budgets.Flops(0.5, length=9), jp.budgets.Units(0.5)])
def test_a_budget_of_every_kind_is_kept(make, budget):
    model, params, inputs = make()
    random = np.random.default_rng(0)
    scores = {name: random.random(len(gate)) for name, gate in jp.open_gates(model, params).items()}
    gates = jp.select(model, params, scores, budget, rules=jp.Rules(allocation="global"))
    small = jp.compact(model, params, gates)
    share = jp.flops(model, small, 9) / jp.flops(model, params, 9)
    assert share < 1 if budget.counted != "flops" else 0.4 < share <= 0.5
    module = model.merge(small)
    np.testing.assert_allclose(module(inputs), model.apply(params, inputs, gates=gates), atol=1e-5)
    again, once_more = jp.own.from_nnx(
        module, VISION_AXES if inputs is IMAGES else QWEN3_AXES, sizes=VISION_SIZES if inputs is IMAGES else None
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.ravel(), b.ravel()), once_more, small
    )  # 0 groups: 0 queries
    np.testing.assert_array_equal(again.apply(once_more, inputs), module(inputs))


def test_flops_are_those_of_the_matrix_products():
    model, params, _ = vision()
    tokens, width = 7, HEADS * HEAD_DIM
    kernels = sum(a.size for path, a in flatten(params["blocks"]).items() if path[-1] == "kernel")
    assert jp.flops(model, params, tokens) == 2 * tokens * kernels + 2 * 4 * tokens**2 * width
    model, params, _ = qwen3()
    kernels = sum(a.size for path, a in flatten(params["layers"]).items() if a.ndim > 1)
    assert jp.flops(model, params, tokens) == 2 * tokens * kernels + 2 * 4 * tokens**2 * 6 * HEAD_DIM
    with pytest.raises(ValueError, match="it keeps no cache"):
        jp.select(model, params, {}, jp.budgets.Cache(0.5))
    with pytest.raises(ValueError, match="only models of a family have latency tables"):
        jp.select(model, params, {}, jp.budgets.Latency(0.5))


def test_plain_functions_need_an_axis_table_alone():
    """Names that end in a number are layers, as Linen has them; arrays of a net without layers are in none."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "Dense_0": {"mlp": {"up": {"kernel": jax.random.normal(keys[0], (4, 8))}}},
        "Dense_1": {"mlp": {"up": {"kernel": jax.random.normal(keys[1], (4, 8))}}},
    }
    for name in params:
        params[name]["mlp"]["down"] = {"kernel": jax.random.normal(keys[2], (8, 4))}
    axes = {"*.mlp.up.kernel": ("embed", "neurons"), "*.mlp.down.kernel": ("neurons", "embed")}
    model, x = jp.own.Architecture(axes), jnp.ones((3, 4))

    def run(params: Any, gates: Any = None) -> Any:
        y = x
        for name, layer in params.items():
            hidden = jax.nn.relu(y @ layer["mlp"]["up"]["kernel"])
            gate = 1.0 if gates is None else gates.get(f"{name}.mlp.neurons", 1.0)
            y = y + (hidden * gate) @ layer["mlp"]["down"]["kernel"]
        return y

    assert jp.verify(model, params, run) < 1e-6
    places = jp.open_gates(model, params)
    assert [*places] == ["Dense_0.mlp.neurons", "Dense_1.mlp.neurons"]
    kept = jp.select(
        model, params, {name: np.arange(8.0) for name in places}, jp.budgets.Units(0.5), rules=jp.Rules(protect=(1,))
    )
    assert [int(gate.sum()) for gate in kept.values()] == [0, 8]
    net = {"up": {"kernel": params["Dense_0"]["mlp"]["up"]["kernel"]}, "down": params["Dense_0"]["mlp"]["down"]}
    model = jp.own.Architecture({"up.kernel": ("embed", "neurons"), "down.kernel": ("neurons", "embed")})
    assert [*jp.open_gates(model, net)] == ["neurons"]


def test_parameters_that_stand_in_the_gated_module_itself():
    class Direct(nnx.Module):
        def __init__(self):
            self.w_up = nnx.Param(jax.random.normal(jax.random.key(0), (4, 6)))
            self.w_down = nnx.Param(jax.random.normal(jax.random.key(1), (6, 4)))
            self.neurons = jp.own.Gate(jnp.ones(6))

        def __call__(self, x):
            return (nnx.relu(x @ self.w_up[...]) * self.neurons[...]) @ self.w_down[...]

    module, x = nnx.List([Direct(), Direct()]), jnp.ones((2, 4))
    model, params = jp.own.from_nnx(module, {"*.w_up": ("embed", "neurons"), "*.w_down": ("neurons", "embed")})

    def run(params: Any, gates: Any) -> Any:
        first, second = model.merge(params, gates)
        return second(first(x))

    assert jp.verify(model, params, run) < 1e-6
    assert params[0]["w_up"]["array"].shape == (4, 6)


def changed(attribute: str, value: Any) -> VisionTransformer:
    module = VisionTransformer(nnx.Rngs(0))
    *path, last = attribute.split(".")
    node: Any = module.blocks[1]
    for step in path:
        node = getattr(node, step)
    if value is None:
        delattr(node, last)
    else:
        setattr(node, last, value)
    return module


def without(*patterns: str) -> Any:
    return {pattern: names for pattern, names in VISION_AXES.items() if pattern not in patterns}


@pytest.mark.parametrize(
    ("module", "axes", "sizes", "says"),
    [
        (None, without("blocks.*.mlp.down.kernel"), VISION_SIZES, r"blocks.0.mlp.down.kernel \(24, 16\) has no axes"),
        (None, VISION_AXES | {"blocks.*.ffn": ("embed",)}, VISION_SIZES, r"no parameter is named blocks.\*.ffn"),
        (None, VISION_AXES | {"out.bias": ("embed", "labels")}, VISION_SIZES, r"out.bias \(5,\) has not the axes"),
        (None, VISION_AXES, {}, r"does not say the size of heads, head_dim: see sizes="),
        (None, VISION_AXES, {"head_dim": 5}, r"query.kernel \(16, 32\) has not the axes .* of sizes \(16, 6, 5\)"),
        (changed("mlp.neurons", None), VISION_AXES, VISION_SIZES, r"blocks.1.mlp.neurons has no gate of its own"),
        (
            changed("mlp.heads", jp.own.Gate(jnp.ones(3))),
            VISION_AXES,
            VISION_SIZES,
            "blocks.1.mlp.heads is a gate of no site; there are blocks.0.attention.heads",
        ),
        (
            changed("mlp.neurons", jp.own.Gate(jnp.ones(3))),
            VISION_AXES,
            VISION_SIZES,
            r"blocks.1.mlp.neurons has gates \(3,\) for 24 units",
        ),
        (
            None,
            VISION_AXES | {"blocks.*.mlp.down.kernel": ("embed", "neurons")},
            VISION_SIZES,
            "has not the axes",
        ),
        (
            None,
            VISION_AXES | {"blocks.*.mlp.down.kernel": ("neurons", "width")},
            VISION_SIZES,
            r"blocks.0.mlp.neurons is read by no kernel, whose axes are \(units, ..., embed\)",
        ),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_taken_apart(module, axes, sizes, says):
    with pytest.raises(ValueError, match=f"^the module cannot be taken apart: .*{says}"):
        jp.own.from_nnx(module or VisionTransformer(nnx.Rngs(0)), axes, sizes=sizes)


def test_a_gate_that_two_modules_share_is_refused():
    module = VisionTransformer(nnx.Rngs(0))
    module.blocks[1].mlp.neurons = module.blocks[0].mlp.neurons
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.neurons has no gate of its own"):
        jp.own.from_nnx(module, VISION_AXES, sizes=VISION_SIZES)


def test_parameters_and_gates_of_another_module():
    model, params, inputs = vision()
    less = {name: part for name, part in params.items() if name != "position"}
    with pytest.raises(ValueError, match=r"unknown \['more'\], missing \['position'\]"):
        model.merge(less | {"more": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"the module has no gates 3\.ffn\.neurons; it has blocks\.0"):
        model.apply(params, inputs, gates={"3.ffn.neurons": jnp.ones(2)})


class Twice(FeedForward):
    def __call__(self, x: Any) -> Any:
        return self.down(nnx.relu(self.up(self.norm(x)) * self.neurons[...]) * self.neurons[...])


class Never(FeedForward):
    def __call__(self, x: Any) -> Any:
        return self.down(nnx.gelu(self.up(self.norm(x))))


class Before(FeedForward):
    def __call__(self, x: Any) -> Any:
        return self.down(nnx.sigmoid(self.up(self.norm(x)) * self.neurons[...]))


class Stubborn(FeedForward):
    def __call__(self, x: Any) -> Any:
        hidden = nnx.gelu(self.up(self.norm(x)) * self.neurons[...])
        return self.down(hidden.reshape(*x.shape[:2], NEURONS))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Twice, "the gate of blocks.1.mlp.neurons multiplies twice"),
        (Never, "the gate of blocks.1.mlp.neurons multiplies nothing"),
        (Before, "the gate of blocks.1.mlp.neurons is not where the kernel with neurons as first axis reads them"),
        (Stubborn, "does not run without some units of .*: it must read widths from the shapes of its arrays"),
    ],
)
def test_verify_names_the_gate_that_is_wrong(kind, says):
    module = changed("mlp", kind(nnx.Rngs(3)))
    module.eval()
    model, params = jp.own.from_nnx(module, VISION_AXES, sizes=VISION_SIZES)
    with pytest.raises(ValueError, match=says):
        jp.verify(model, params, lambda params, gates: model.apply(params, IMAGES, gates=gates))


def test_what_is_not_pruned_stays():
    """Dropout's keys are in the module that comes back, and its rate."""
    model, params, _ = vision()
    module = model.merge(params)
    assert module.blocks[0].mlp.dropout.rate == 0.1
    assert module.blocks[0].mlp.dropout.deterministic
    assert len(qwen3()[0].merge(qwen3()[1]).layers[0].attn.groups[...]) == GROUPS

"""Units along axes that do not stand side by side: grouped queries, by a made-up axis table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import units
from jaxprune.compaction import compact, compacted_shapes
from jaxprune.models.cost import elements, parameters, unit_costs
from jaxprune.models.layers import attend, gate
from jaxprune.units import check_gates, flatten, mean_shapes, readers, resize, sites, widths

GROUPS, QUERIES, SIZE, EMBED = 3, 4, 2, 8
TABLE = {
    "layers.*.mixer.out.kernel": ("groups", "queries", "channels", "embed"),
    "layers.*.mixer.out.bias": ("embed",),
    "layers.*.mixer.query.kernel": ("embed", "groups", "queries", "products"),
    "layers.*.mixer.key.kernel": ("embed", "groups", "products"),
    "layers.*.mixer.value.kernel": ("embed", "groups", "channels"),
}
MODEL: Any = SimpleNamespace(axes=TABLE)
NAMES = ("groups", "query_heads", "group_channels")
UNITS = {"groups": GROUPS, "query_heads": GROUPS * QUERIES, "group_channels": GROUPS * SIZE}


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of units that a family with grouped queries would bring along."""
    for kind, axes in (
        ("groups", ("groups",)),
        ("query_heads", ("groups", "queries")),
        ("group_channels", ("groups", "channels")),
    ):
        monkeypatch.setitem(units.KINDS, kind, axes)  # pyright: ignore[reportArgumentType]


@pytest.fixture(name="params")
def fresh_params() -> Any:
    random = np.random.default_rng(0)
    shapes = {
        "query": (EMBED, GROUPS, QUERIES, SIZE),
        "key": (EMBED, GROUPS, SIZE),
        "value": (EMBED, GROUPS, SIZE),
        "out": (GROUPS, QUERIES, SIZE, EMBED),
    }
    mixer = {name: {"kernel": random.standard_normal(shape).astype(np.float32)} for name, shape in shapes.items()}
    mixer["out"]["bias"] = random.standard_normal(EMBED).astype(np.float32)
    return {"layers": {0: {"mixer": mixer}}}


def run(params: Any, gates: dict[str, np.ndarray], means: dict[str, np.ndarray]) -> np.ndarray:
    """The layer, with gates on the mixed values `[b, t, groups, queries, channels]`."""
    own, random = params["layers"][0]["mixer"], np.random.default_rng(1)
    x, mask = jnp.asarray(random.standard_normal((2, 5, EMBED)), jnp.float32), jnp.ones((2, 5), bool)
    query = jnp.einsum("btd,dgqh->btgqh", x, own["query"]["kernel"])
    key, value = (jnp.einsum("btd,dgh->btgh", x, own[name]["kernel"]) for name in ("key", "value"))
    mixed = attend(query, key, value, mask, scale=1.0)[0]
    for kind, name in ((kind, f"0.mixer.{kind}") for kind in NAMES):
        if name in gates:
            apart = kind == "group_channels"  # their axes do not stand side by side
            mixed = mixed.swapaxes(3, 4) if apart else mixed
            mean = jnp.asarray(means[name]) if name in means else None
            mixed = gate(mixed, jnp.asarray(gates[name]), mean, mask, axes=1 if kind == "groups" else 2)
            mixed = mixed.swapaxes(3, 4) if apart else mixed
    return np.asarray(jnp.einsum("btgqh,gqhd->btd", mixed, own["out"]["kernel"]) + own["out"]["bias"])


def random_gates(kind: str, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    closed = random.random(UNITS[kind]) < 0.5
    closed.reshape(1 if kind == "groups" else GROUPS, -1)[:, -1] = True  # else a group might keep all it has
    return {f"0.mixer.{kind}": np.where(closed, 0.0, random.choice([1.0, 0.3], UNITS[kind])).astype(np.float32)}


def test_sites_widths_and_readers(params: Any):
    assert [site.kind for site in sites(TABLE, params, NAMES)] == list(NAMES)
    assert widths(TABLE, params, NAMES) == {f"0.mixer.{kind}": count for kind, count in UNITS.items()}
    assert set(readers(TABLE, params, NAMES).values()) == {("layers", 0, "mixer", "out", "kernel")}
    assert mean_shapes(TABLE, params)["0.mixer.group_channels"] == (GROUPS * SIZE, QUERIES)
    with pytest.raises(ValueError, match="share a parameter"):
        check_gates(MODEL, params, {f"0.mixer.{kind}": np.ones(UNITS[kind]) for kind in NAMES[:2]})


@pytest.mark.parametrize("with_means", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", NAMES)
def test_compaction_keeps_the_function(params: Any, kind: str, seed: int, with_means: bool):
    gates, random = random_gates(kind, seed), np.random.default_rng(seed)
    shapes = mean_shapes(TABLE, params)
    means = {name: random.standard_normal(shapes[name]).astype(np.float32) for name in gates if with_means}
    small = compact(MODEL, params, gates, means)
    expected = run(params, gates, means)
    np.testing.assert_allclose(run(small, {}, {}), expected, atol=2e-5 * np.abs(expected).max())
    shapes = {path: array.shape for path, array in flatten(small).items()}
    assert {path: own.shape for path, own in flatten(compacted_shapes(MODEL, params, gates)).items()} == shapes
    kept = widths(TABLE, small, NAMES)[f"0.mixer.{kind}"]
    assert kept < UNITS[kind]
    costs = unit_costs(MODEL, params, elements, NAMES)
    assert parameters(params) - parameters(small) == (UNITS[kind] - kept) * costs[f"0.mixer.{kind}"]


def test_as_many_query_heads_stay_in_every_group(params: Any):
    gates = np.ones((GROUPS, QUERIES), np.float32)
    gates[0, 1:] = gates[1, :2] = gates[2] = 0.0
    small = compact(MODEL, params, {"0.mixer.query_heads": gates.reshape(-1)})
    mixer = small["layers"][0]["mixer"]
    assert mixer["query"]["kernel"].shape == (EMBED, GROUPS, 2, SIZE)
    assert mixer["key"]["kernel"] is not None and mixer["key"]["kernel"].shape == (EMBED, GROUPS, SIZE)
    place = next(site for site in sites(TABLE, params, NAMES) if site.kind == "query_heads")
    assert resize(TABLE, params, {place: 2})["layers"][0]["mixer"]["out"]["kernel"].shape == (GROUPS, 2, SIZE, EMBED)


def test_queries_that_share_a_key_attend_as_if_each_had_its_own():
    random = np.random.default_rng(2)
    query = jnp.asarray(random.standard_normal((2, 5, GROUPS, QUERIES, SIZE)), jnp.float32)
    key, value = (jnp.asarray(random.standard_normal((2, 6, GROUPS, SIZE)), jnp.float32) for _ in "kv")
    mask = jnp.arange(6) < jnp.array([[6], [4]])
    found, scores = attend(query, key, value, mask, scores=True)
    flat = query.reshape(2, 5, GROUPS * QUERIES, SIZE)
    expected, others = attend(flat, key.repeat(QUERIES, 2), value.repeat(QUERIES, 2), mask, scores=True)
    np.testing.assert_allclose(found.reshape(flat.shape), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(scores), np.asarray(others), rtol=1e-5, atol=1e-6)

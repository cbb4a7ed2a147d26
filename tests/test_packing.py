"""Packed files keep every bit, take few bytes, and round to int8 within its bound; damaged ones are refused.

Files in the layout of version 0.1 still load; `benchmarks/packing.py` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import safetensors_bytes, write_classifier
from jax.experimental.sparse import BCOO
from mutations import compressed, expanded, split
from packing import former_layout
from safetensors.numpy import load, save_file
from safetensors.numpy import save as to_bytes
from tiny import TEXT_TYPES, random_gates, tiny_batch, tiny_model

import jaxprune as jp
from jaxprune.checkpoints.folder import save
from jaxprune.checkpoints.gates import read_pruning
from jaxprune.checkpoints.tensors import model_digest, params_digest
from jaxprune.checkpoints.weights import WeightFile, densify, from_int8, linear_maps, output_scales, round_to_int8
from jaxprune.compaction import compact
from jaxprune.models import Model
from jaxprune.units import Params, flatten, path_name, unflatten

PAGE = Path(__file__).parents[1] / "docs" / "packed_files.md"
WEIGHTS = "model.safetensors.zst"


def sparse_array(shape: tuple[int, ...], density: float, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Normal numbers, of which a share is kept."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape).astype(dtype)
    return np.where(random.random(shape) < density, values, np.zeros((), dtype))


def sparsified(model: Model, params: Params, density: float, dtype: Any = None) -> Params:
    """The same share of the largest weights stays in each kernel of the layers."""
    names, flat = linear_maps(model.axes, params), flatten(params)
    for path, array in flat.items():
        weights = np.array(array)
        if path_name(path) in names and weights.size:
            order = np.argsort(np.abs(weights), axis=None)
            weights.reshape(-1)[order[: round((1 - density) * weights.size)]] = 0
        flat[path] = weights.astype(dtype or weights.dtype)
    return unflatten(flat)


def assert_same_bits(found: Params, expected: Params) -> None:
    assert params_digest(found) == params_digest(expected)  # names, types, shapes and bits


# int8


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_int8_is_within_half_a_scale_and_keeps_zeros(density, size):
    array = sparse_array((64, 6, 8), density) * np.float32(size)
    array[:, 2, 3] = 0  # an output without weights
    scales = output_scales(array, 48)
    values = round_to_int8(array, scales)
    rounded = from_int8(values, scales)
    error = np.abs(rounded.astype(np.float64) - array).reshape(64, 48)
    assert (error <= 0.5 * scales.astype(np.float64)).all()  # exact products, so not even a rounding beyond it
    assert (error <= np.abs(array).reshape(64, 48).max(0) / 253).all()
    assert not rounded[array == 0].any() and values.min() >= -127
    again = output_scales(rounded, 48)
    assert from_int8(round_to_int8(rounded, again), again).tobytes() == rounded.tobytes()


def test_int8_by_hand():
    array = np.array([[127, -254], [63.4, 0], [0.4, 1.9]], np.float32)
    scales = output_scales(array, 2)
    assert scales.tolist() == [1, 2]
    assert round_to_int8(array, scales).tolist() == [[127, -127], [63, 0], [0, 1]]
    assert from_int8(round_to_int8(array, scales), scales).tolist() == [[127, -254], [63, 0], [0, 2]]


def test_int8_of_the_smallest_floats_is_within_half_a_scale():
    array = np.arange(-90, 90, dtype=np.int32).astype(np.float32).reshape(-1, 2) * np.float32(1e-45)
    scales = output_scales(array, 2)
    error = np.abs(from_int8(round_to_int8(array, scales), scales).astype(np.float64) - array)
    assert (error <= 0.5 * scales.astype(np.float64)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4028235e38])
def test_int8_refuses_what_it_cannot_hold(value):
    array = sparse_array((6, 4), 0.5)
    array[2, 1] = value
    with pytest.raises(ValueError, match="cannot round NaN, infinity or values near the largest float to int8"):
        output_scales(array, 4)


def test_the_outputs_of_the_linear_maps():
    model, params = tiny_model()
    maps = linear_maps(model.axes, params)
    assert {name.removeprefix("layers.1."): size for name, size in maps.items() if "layers.1." in name} == {
        "attention.query.kernel": 16,
        "attention.key.kernel": 16,
        "attention.value.kernel": 16,
        "attention.out.kernel": 16,
        "ffn.up.kernel": 32,
        "ffn.down.kernel": 16,
    }
    assert len(maps) == 12


# files


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_save_packed_then_load_is_bit_exact(tmp_path, dtype, density):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, density, dtype)
    params["layers"][0]["ffn"]["up"]["kernel"][0, 0] = -0.0
    again, packed = jp.load(save(tmp_path / "out", model, params, packed="exact"), dtype=None)
    assert again == model
    assert_same_bits(packed, params)
    plain = save(tmp_path / "dense", model, params) / "model.safetensors"
    assert (
        expanded((tmp_path / "out" / WEIGHTS).read_bytes()) == plain.read_bytes()
    )  # nothing but the compressor is ours
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", WEIGHTS}
    assert (tmp_path / "out" / WEIGHTS).stat().st_size < plain.stat().st_size


@pytest.mark.parametrize("values", ["exact", "int8"])
@pytest.mark.parametrize("model_type", ["bert", *TEXT_TYPES])
def test_pruned_models_are_packed_too(tmp_path, model_type, values):
    model, params = tiny_model(model_type, embed=32, neurons=64)
    gates = random_gates(model, params)
    gates["0.ffn.neurons" if model_type == "bert" else "encoder.0.ffn.neurons"] *= 0  # a module without units
    small = sparsified(model, compact(model, params, gates), 0.1)
    save(tmp_path / "packed", model, small, packed=values)
    packed = jp.load(tmp_path / "packed")[1]
    if values == "exact":
        assert_same_bits(packed, small)
    names = linear_maps(model.axes, small)
    for path, array in flatten(packed).items():
        ours, theirs = np.asarray(array), np.asarray(flatten(small)[path])
        if path_name(path) not in names:
            assert ours.tobytes() == theirs.tobytes()
        else:
            outputs = names[path_name(path)]
            largest = np.abs(theirs).reshape(-1, outputs).max(0)
            assert (np.abs(ours - theirs).reshape(-1, outputs) <= largest / 253).all()
            assert not ours[theirs == 0].any()


@pytest.mark.parametrize("packed", ["exact", "int8"])
def test_a_cast_comes_before_packing(tmp_path, packed):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, 0.1)
    params["layers"][0]["ffn"]["up"]["kernel"][0, :8] = 1e-12
    save(tmp_path / "out", model, params, dtype=jnp.float16, packed=packed)
    _, again = jp.load(tmp_path / "out", dtype=None)
    assert {array.dtype for array in flatten(again).values()} == {np.dtype(np.float16)}
    if packed == "exact":
        assert_same_bits(again, jax.tree.map(lambda a: a.astype(jnp.float16), params))
    kernel = again["layers"][0]["ffn"]["up"]["kernel"]
    assert not np.asarray(kernel)[0, :8].any()  # too small for float16, and for int8 beside its neighbours


@pytest.mark.parametrize(("packed", "others"), [("exact", "embeddings.norm.bias, "), ("int8", "")])
def test_infinity_and_overflow_are_refused_and_nothing_is_left(tmp_path, packed, others):
    model, params = tiny_model()
    params = jax.tree.map(np.array, params)
    params["layers"][1]["ffn"]["up"]["kernel"][0, 0] = 1e6
    params["embeddings"]["norm"]["bias"][0] = np.nan
    with pytest.raises(ValueError, match=rf"too large for the type: {others}layers.1.ffn.up.kernel\."):
        save(tmp_path / "out", model, params, dtype=jnp.float16, packed=packed)
    assert list(tmp_path.iterdir()) == []


def test_packed_is_exact_or_int8(tmp_path):
    model, params = tiny_model()
    wrong: Any = "f16"
    with pytest.raises(ValueError, match="packed must be 'exact', 'int8' or None, got 'f16'"):
        save(tmp_path / "out", model, params, packed=wrong)


def test_the_record_of_pruning_has_the_digest_of_what_is_read(tmp_path):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, 0.05)
    for packed in ("exact", "int8"):
        save(tmp_path / packed, model, params, packed=packed, pruning={"seed": 0})
        assert read_pruning(tmp_path / packed)["pruned"]["digest"] == model_digest(*jp.load(tmp_path / packed))
    assert params_digest(jp.load(tmp_path / "exact")[1]) != params_digest(jp.load(tmp_path / "int8")[1])


def test_packing_int8_again_changes_nothing(tmp_path):
    model, params = tiny_model(embed=32, neurons=64)
    save(tmp_path / "one", model, sparsified(model, params, 0.05), packed="int8")
    save(tmp_path / "two", *jp.load(tmp_path / "one"), packed="int8")
    one, two = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_packed_folder_is_replaced_by_a_dense_one_and_back(tmp_path):
    model, params = tiny_model()
    for packed in ("exact", None, "int8"):
        save(tmp_path / "out", model, params, packed=packed, overwrite=True)
        names = {file.name for file in (tmp_path / "out").iterdir()}
        assert names == {"config.json", WEIGHTS if packed else "model.safetensors"}


# sparse arrays


@pytest.mark.parametrize("packed", [None, "exact", "int8"])
def test_sparse_parameters_are_the_dense_ones(tmp_path, packed):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, 0.05)
    save(tmp_path / "out", model, params, packed=packed)
    again, sparse = jp.load(tmp_path / "out", sparse=True)
    _, dense = jp.load(tmp_path / "out")
    flat = flatten(sparse)
    names = linear_maps(model.axes, params)
    assert {path_name(path) for path, array in flat.items() if isinstance(array, BCOO)} == set(names)
    assert linear_maps(model.axes, sparse) == names  # the shapes are the parameters'
    assert_same_bits(densify(sparse), dense)
    kernel = flat[("layers", 0, "ffn", "up", "kernel")]
    assert (kernel.nse, kernel.indices.dtype) == (round(0.05 * 32 * 64), np.int32)
    x = jnp.linspace(-1, 1, 96).reshape(3, 32)
    np.testing.assert_allclose(x @ kernel, x @ kernel.todense(), atol=1e-5)
    batch = tiny_batch(model)
    logits = jax.jit(lambda sparse: again.apply(densify(sparse), batch).logits)(sparse)
    expected: Any = model.apply(dense, batch).logits
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_sparse_parameters_of_another_type(tmp_path):
    model, params = tiny_model()
    params = sparsified(model, params, 0.05, jnp.bfloat16)
    save(tmp_path / "out", model, params, packed="exact")
    assert_same_bits(densify(jp.load(tmp_path / "out", sparse=True, dtype=None)[1]), params)
    assert_same_bits(densify(jp.load(tmp_path / "out", sparse=True)[1]), jp.load(tmp_path / "out")[1])
    params["layers"][0]["ffn"]["up"]["kernel"][0, 0] = 1e6
    save(tmp_path / "out", model, params, packed="exact", overwrite=True)
    with pytest.raises(ValueError, match=r"too large for float16: layers.0.ffn.up.kernel\."):
        jp.load(tmp_path / "out", sparse=True, dtype=jnp.float16)


def test_sparse_is_refused_where_nothing_is_sparse_and_where_dense_is_needed(tmp_path):
    model, params = tiny_model()
    with pytest.raises(ValueError, match=r"nothing in .*dense has so many zeros"):
        jp.load(save(tmp_path / "dense", model, params), sparse=True)
    with pytest.raises(ValueError, match=r"nothing in .*hf has so many zeros"):
        jp.load(write_classifier(tmp_path / "hf"), sparse=True)
    save(tmp_path / "packed", model, sparsified(model, params, 0.05), packed="exact")
    _, sparse = jp.load(tmp_path / "packed", sparse=True)
    with pytest.raises(TypeError, match=r"sparse parameters cannot be saved: layers.0.attention.key.kernel.*densify"):
        save(tmp_path / "out", model, sparse)


# the page


def code_with(words: str) -> str:
    return next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if words in block)


@pytest.mark.parametrize("values", ["exact", "int8"])
def test_the_reader_of_the_page_reads_what_save_wrote(tmp_path, values):
    reader: dict[str, Any] = {}
    exec(code_with("def read"), reader)
    model, params = tiny_model(embed=32, neurons=64)
    folder = save(tmp_path / "out", model, sparsified(model, params, 0.05), packed=values)
    tensors = reader["read"](str(folder / WEIGHTS))
    expected = {path_name(path): np.asarray(array) for path, array in flatten(jp.load(folder)[1]).items()}
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype and tensors[name].tobytes() == array.tobytes(), name


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    model, params = tiny_model()
    save(tmp_path / "packed", model, sparsified(model, params, 0.05), packed="exact")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code_with("jp.load"), names)
    batch = tiny_batch(model)
    expected: Any = model.apply(jp.load("packed")[1], batch).logits
    np.testing.assert_allclose(names["logits"](names["sparse"], batch), expected, atol=1e-5)


# damaged files

KERNEL = "layers.0.ffn.up.kernel"
OTHER = "layers.1.ffn.down.kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: b"", "only 0 bytes"),
        (lambda file: file[: len(file) // 2], "it cannot be expanded"),
        (lambda file: file + b"more", "it cannot be expanded"),
        (lambda file: b"PK" + file, "it cannot be expanded"),
        (lambda file: file + compressed(b"more"), "truncated or too long"),
        (lambda file: compressed(bytes(10**7)), "its header is not JSON"),
    ],
)
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, change, message):
    file = save(tmp_path / "out", *tiny_model(), packed="exact") / WEIGHTS
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        jp.load(tmp_path / "out")
    assert str(error.value).startswith(f"{file} is not a complete safetensors file: ")


def test_no_more_is_expanded_than_the_header_says(tmp_path):
    file = save(tmp_path / "out", *tiny_model(), packed="exact") / WEIGHTS
    whole = expanded(file.read_bytes())
    file.write_bytes(compressed(whole + bytes(10**8)))
    with pytest.raises(ValueError, match=f"and the file has {len(whole) + 1}: it is truncated or too long"):
        jp.load(tmp_path / "out")
    file.write_bytes(compressed(whole[:-1]))
    with pytest.raises(ValueError, match=f"and the file has {len(whole) - 1}: it is truncated or too long"):
        jp.load(tmp_path / "out")


def rewrite(file: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None]) -> None:
    """Changes the tensors and the metadata of a compressed file."""
    whole = expanded(file.read_bytes())
    tensors, metadata = load(whole), json.loads(split(whole)[0])["__metadata__"]
    change(tensors, metadata)
    file.write_bytes(compressed(to_bytes(tensors, metadata)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.update({f"{KERNEL}.scales": t[f"{KERNEL}.scales"][:-1]}), r"has scales of shape \[62\]"),
        (lambda t, m: t.update({f"{KERNEL}.scales": t[f"{KERNEL}.scales"][:0]}), r"has scales of shape \[0\]"),
        (lambda t, m: t.update({KERNEL: t[KERNEL].reshape(-1)}), r"of shape \[2016\] has scales"),
        (lambda t, m: t.update({f"{KERNEL}.scales": t[f"{KERNEL}.scales"].astype(np.float16)}), "with scales in F32"),
        (lambda t, m: t.update({f"{KERNEL}.scales": np.full(63, np.inf, np.float32)}), f"NaN or infinite: {KERNEL}"),
        (lambda t, m: t.pop(f"{KERNEL}.scales"), f"{KERNEL} must be I8, with scales in F32"),
        (lambda t, m: t.update({KERNEL: t[KERNEL].astype(np.float32)}), f"{KERNEL} must be I8"),
        (lambda t, m: m.update(int8=json.dumps({KERNEL: "F64"})), r"F64.*expected text such as F32\|F16\|BF16"),
        (lambda t, m: m.update(int8=json.dumps({KERNEL: ["F32"]})), r"expected text such as F32\|F16\|BF16"),
        (lambda t, m: m.update(int8="[1]"), "expected an object"),
        (lambda t, m: m.update(int8="{"), "cannot be read"),
        (lambda t, m: m.update(int8="[" * 100_000), "cannot be read"),
        (lambda t, m: m.update(int8='{"a": "F32", "a": "F32"}'), r"names twice: \['a'\]"),
        (lambda t, m: m.pop("int8"), f"unknown: .*{KERNEL}.scales.*wrong type: .*{KERNEL} is I8"),
    ],
)
def test_damaged_int8_values_are_refused(tmp_path, change, message):
    model, params = tiny_model(embed=32, neurons=63)
    file = save(tmp_path / "out", model, params, packed="int8") / WEIGHTS
    rewrite(file, change)
    with pytest.raises(ValueError, match=message) as error:
        jp.load(tmp_path / "out")
    assert str(tmp_path / "out") in str(error.value)


# files of version 0.1


def write_former(folder: Path, model: Model, params: Params, *, int8: bool = False, change: Any = None) -> Path:
    """A folder as version 0.1 packed it."""
    save(folder, model, params)
    arrays = {path_name(path): np.asarray(array) for path, array in flatten(params).items()}
    outputs = linear_maps(model.axes, params) if int8 else {}
    scales = {name: output_scales(arrays[name], count) for name, count in outputs.items()}
    arrays |= {name: round_to_int8(arrays[name], scale) for name, scale in scales.items()}
    packed = {name: array for name, array in arrays.items() if "layers" in name and array.dtype != jnp.bfloat16}
    parts, text = former_layout(packed, scales)
    tensors, described = parts | {name: arrays[name] for name in arrays.keys() - packed.keys()}, json.loads(text)
    if change is not None:
        change(tensors, described)
    save_file(tensors, folder / "model.safetensors", {"packed": json.dumps(described)})
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_packed_files_of_version_0_1_are_read_bit_by_bit(tmp_path, dtype, density):
    model, params = tiny_model(embed=32, neurons=63)
    params = sparsified(model, params, density, dtype)
    params["layers"][0]["ffn"]["up"]["kernel"][3, :2] = -0.0, 1e-7
    folder = write_former(tmp_path / "former", model, params)
    assert_same_bits(jp.load(folder, dtype=None)[1], params)
    with WeightFile(folder / "model.safetensors") as file:
        encodings = {fields["encoding"] for fields in file._packed.values()}
    assert {0.0: "deltas", 0.05: "deltas", 0.5: "bits", 1.0: "all"}[density] in encodings


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_int8_values_of_version_0_1_are_those_of_today(tmp_path, density):
    model, params = tiny_model(embed=32, neurons=63)
    params = sparsified(model, params, density)
    folder = write_former(tmp_path / "former", model, params, int8=True)
    assert_same_bits(jp.load(folder)[1], jp.load(save(tmp_path / "today", model, params, packed="int8"))[1])


def change_description(**changes: Any) -> Callable[..., None]:
    return lambda tensors, described: described["tensors"][KERNEL].update(changes)


def change_part(name: str, function: Callable[[np.ndarray], Any]) -> Callable[..., None]:
    return lambda tensors, described: tensors.update({name: np.ascontiguousarray(function(tensors[name]))})


def set_last(array: np.ndarray, value: int) -> np.ndarray:
    return np.concatenate([array[:-1], np.array([value], array.dtype)])


FORMER_DAMAGE: list[tuple[Callable[..., None], str]] = [
    (change_description(encoding="rle"), r"encoding is \'rle\', expected text such as all\|bits"),
    (change_description(encoding=["bits"]), r"encoding is \[\'bits\'\], expected text"),
    (change_description(dtype="F64"), "dtype is 'F64', expected text"),
    (change_description(values="F16"), "other types"),
    (change_description(count=-1), "count is -1, expected a count"),
    (change_description(count=True), "count is True"),
    (change_description(shape="32"), "shape is '32', expected a list"),
    (change_description(count=102), "has 101 values, expected 102"),
    (change_description(encoding="all"), "has 101 values, expected 101 for the shape"),
    (change_description(shape=[2**40, 2**40]), "claim tensors of 4,8[0-9,]{28,}, expected at most 75,"),
    (change_description(more=1), "more is unknown, expected dtype, shape, values, encoding, count"),
    (change_description(encoding="bits"), f"{KERNEL}.bits is missing"),
    (change_description(values="I8"), f"{KERNEL}.values is missing, or not I8"),
    (lambda t, d: d["tensors"].update({KERNEL: 3}), f"{KERNEL} is 3, expected an object"),
    (lambda t, d: d.update(version=2), "version is 2, expected"),
    (lambda t, d: d.pop("version"), "version is missing"),
    (lambda t, d: d.update(tensors=[]), r"tensors is \[\], expected an object"),
    (lambda t, d: t.update({KERNEL: np.zeros((32, 63), np.float32)}), "it is there as well"),
    (lambda t, d: d["tensors"].pop(KERNEL), f"unknown: .*{KERNEL}.deltas.*missing: {KERNEL}"),
    (lambda t, d: t.pop(f"{KERNEL}.values"), f"{KERNEL}.values is missing"),
    (change_part(f"{KERNEL}.values", lambda a: a[:-1]), r"has \d+ values, expected \d+"),
    (change_part(f"{KERNEL}.values", lambda a: a[None]), f"{KERNEL}.values is missing, or not F32 with one axis"),
    (change_part(f"{KERNEL}.values", lambda a: np.full_like(a, np.nan)), f"NaN or infinite: {KERNEL}"),
    (change_part(f"{KERNEL}.deltas", lambda a: a[:-1]), "is damaged: its deltas"),
    (change_part(f"{KERNEL}.deltas", lambda a: set_last(a, 254)), "is damaged: its deltas"),
    (change_part(f"{KERNEL}.deltas", lambda a: np.append(a, np.uint8(255))), "is damaged: its deltas"),
    (change_part(f"{OTHER}.bits", lambda a: a[:-1]), "is damaged: its bits"),
    (change_part(f"{OTHER}.bits", lambda a: set_last(a, a[-1] ^ 1)), "is damaged: its bits"),
]


@pytest.fixture(scope="module")
def uneven() -> tuple[Model, Params]:
    """Kernels with 5 % of their weights, and one with half."""
    model, dense = tiny_model(embed=32, neurons=63)
    params, half = (sparsified(model, dense, density) for density in (0.05, 0.5))
    params["layers"][1]["ffn"]["down"]["kernel"] = half["layers"][1]["ffn"]["down"]["kernel"]
    return model, params


@pytest.mark.parametrize("number", range(len(FORMER_DAMAGE)))
def test_a_damaged_packed_file_of_version_0_1_is_refused(uneven, tmp_path, number):
    change, message = FORMER_DAMAGE[number]
    folder = write_former(tmp_path / "out", *uneven, change=change)
    with pytest.raises(ValueError, match=message) as error:
        jp.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"version": 1, "version": 1, "tensors": {}}'])
def test_a_description_that_is_not_one_is_refused(uneven, tmp_path, text):
    file = write_former(tmp_path / "out", *uneven) / "model.safetensors"
    header, data = split(file.read_bytes())
    content = json.loads(header)
    content["__metadata__"]["packed"] = text
    file.write_bytes(safetensors_bytes(content, data))
    with pytest.raises(ValueError, match=r"packed tensors of .*model.safetensors cannot be read"):
        jp.load(tmp_path / "out")


def test_tensors_that_take_far_more_memory_than_their_file_are_refused(uneven, tmp_path):
    """Before, the memory was asked for, and then the file was found to end too early."""
    shape, message = [10**9, 4], r"claim tensors of 16,000,0[\d,]+, expected at most \d\d,"
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 16 * 10**9]}
    (tmp_path / WEIGHTS).write_bytes(compressed(safetensors_bytes({KERNEL: entry})))
    with pytest.raises(ValueError, match=message):
        WeightFile(tmp_path / WEIGHTS)
    former = write_former(tmp_path / "out", *uneven, change=change_description(shape=shape)) / "model.safetensors"
    with pytest.raises(ValueError, match=f"{former} cannot be read: .*{message}"):
        WeightFile(former)

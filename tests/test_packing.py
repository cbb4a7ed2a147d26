"""Packing keeps every bit, takes few bytes, and rounds to int8 within its bound; damaged files are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import safetensors_bytes, write_classifier
from jax.experimental.sparse import BCOO
from mutations import split
from safetensors.numpy import load_file, save_file
from tiny import TEXT_TYPES, random_gates, tiny_batch, tiny_model

from jaxprune.checkpoints.folder import digest, load, model_digest, read_pruning, save
from jaxprune.checkpoints.sparse_file import (
    METADATA,
    Description,
    PackedFile,
    column_scales,
    densify,
    linear_maps,
    pack,
    pack_tensors,
    runs,
    unpack,
)
from jaxprune.checkpoints.tensors import FLOATS, TensorFile
from jaxprune.compaction import compact
from jaxprune.models import Model
from jaxprune.units import Params, flatten, path_name, unflatten

PAGE = Path(__file__).parents[1] / "docs" / "packed_files.md"
SHAPES = [(), (1,), (7,), (8,), (5000,), (3, 5, 7), (0, 4), (16, 0, 4), (300, 257)]
DENSITIES = [0.0, "one", 0.002, 0.05, 0.5, 1.0]


def sparse_array(shape: tuple[int, ...], density: float | str, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Normal numbers, of which a share is kept, or one."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape).astype(dtype)
    kept = random.random(shape) < density if isinstance(density, float) else np.zeros(shape, bool)
    if density == "one" and kept.size:
        kept = (np.arange(kept.size) == random.integers(kept.size)).reshape(shape)
    return np.where(kept, values, np.zeros((), dtype))


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


def parts_of(array: np.ndarray, **how: Any) -> tuple[Description, dict[str, np.ndarray]]:
    packed = pack(array, **how)
    return packed.how, {name: np.asarray(part) for name, part in packed.parts.items()}


def assert_same_bits(found: Params, expected: Params) -> None:
    assert digest(found) == digest(expected)  # names, types, shapes and bits


# arrays


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_is_bit_exact(shape, density, dtype):
    array = sparse_array(shape, density, dtype)
    found = unpack(pack(array))
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    assert pack(array).nbytes <= array.nbytes


def test_zero_is_the_bit_pattern_of_plus_zero_alone():
    array = np.zeros(1000, np.float32)
    patterns = np.array([0x80000000, 0x00000001, 0x7FC00001, 0xFF800000, 0x7F800000], np.uint32)  # -0.0, tiny, NaN, ±∞
    array.view(np.uint32)[[3, 500, 501, 998, 999]] = patterns
    how, parts = parts_of(array)
    assert how.count == 5
    np.testing.assert_array_equal(parts["values"].view(np.uint32), patterns)
    assert unpack(pack(array)).tobytes() == array.tobytes()


def test_deltas_by_hand():
    array = np.zeros(2000, np.float32)
    array[[0, 1, 257, 513, 1024]] = [1, 2, 3, 4, 5]  # 0, 0, 255, 255 and 510 zeros before them, 975 behind
    how, parts = parts_of(array)
    assert how == Description("F32", (2000,), "F32", "deltas", 5)
    assert parts["values"].tolist() == [1, 2, 3, 4, 5]
    assert parts["deltas"].tolist() == [0, 0, 255, 0, 255, 0, 255, 255, 0, 255, 255, 255]
    array[:] = 0
    assert parts_of(array)[1]["deltas"].tolist() == [255] * 7  # 2000 = 7 x 255 + 215
    array[254] = 1
    assert parts_of(array)[1]["deltas"].tolist() == [254] + [255] * 6


def test_bits_by_hand():
    array = np.array([1, 0, 0, 2, 0, 0, 0, 0, 0, 3, 0], np.float32)
    how, parts = parts_of(array)
    assert (how.encoding, parts["bits"].tolist(), parts["values"].tolist()) == ("bits", [0b1001, 0b10], [1, 2, 3])


@pytest.mark.parametrize("density", [*DENSITIES, 0.1, 0.12, 0.13, 0.2, 0.9])
def test_the_smallest_encoding_is_chosen(density):
    array = sparse_array((90, 111), density)
    flat = array.reshape(-1)
    places = np.flatnonzero(flat)
    zeros = np.diff(places, prepend=-1, append=flat.size) - 1
    sizes = {
        "all": 4 * flat.size,
        "bits": -(-flat.size // 8) + 4 * len(places),
        "deltas": len(places) + int((zeros // 255).sum()) + 4 * len(places),
    }
    packed = pack(array)
    assert packed.nbytes == sizes[packed.how.encoding] == min(sizes.values())


@pytest.mark.parametrize("step", [1, 3, 8, 700, 10**6])
@pytest.mark.parametrize("density", [0.002, 0.05, 0.5])
@pytest.mark.parametrize("columns", [None, 10])
def test_runs_of_any_length_give_the_same(step, density, columns):
    array = sparse_array((70, 10), density)
    packed, found = pack(array, columns=columns), np.zeros(700, np.float32)
    for start, places, values in runs(packed, step):
        assert not len(places) or 0 <= places[0] <= places[-1] < step
        found[start + places] = values
    assert found.tobytes() == unpack(packed).tobytes()


def test_blocks_and_chunks_join_without_a_seam():
    array = sparse_array((2**19 + 11,), 0.06)  # several blocks of the array, several chunks of deltas
    array[2**18 - 700 : 2**18 + 700] = 0
    for dtype in FLOATS.values():
        packed = pack(array.astype(dtype))
        assert packed.how.encoding == "deltas" and len(packed.parts["deltas"]) > 2**14
        assert unpack(packed).tobytes() == array.astype(dtype).tobytes()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_int8_is_within_half_a_scale_and_keeps_zeros(density, size):
    array = sparse_array((64, 6, 8), density) * np.float32(size)
    array[:, 2, 3] = 0  # a column without weights
    packed = pack(array, columns=48)
    found, scales = unpack(packed), np.asarray(packed.parts["scales"])
    error = np.abs(found.astype(np.float64) - array).reshape(64, 48)
    assert (error <= 0.5 * scales.astype(np.float64)).all()  # exact products, so not even a rounding beyond it
    assert (error <= np.abs(array).reshape(64, 48).max(0) / 253).all()
    assert not found[array == 0].any()
    assert packed.how.count == (found.size if packed.how.encoding == "all" else np.count_nonzero(found))
    assert unpack(pack(found, columns=48)).tobytes() == found.tobytes()


def test_int8_by_hand():
    array = np.array([[127, -254], [63.4, 0], [0.4, 1.9]], np.float32)
    how, parts = parts_of(array, columns=2)
    assert parts["scales"].tolist() == [1, 2]
    assert how == Description("F32", (3, 2), "I8", "bits", 4)
    assert parts["values"].tolist() == [127, -127, 63, 1]  # 0.4 is rounded to zero
    assert unpack(pack(array, columns=2)).tolist() == [[127, -254], [63, 0], [0, 2]]


def test_int8_of_the_smallest_floats_is_within_half_a_scale():
    array = np.arange(-90, 90, dtype=np.int32).astype(np.float32).reshape(-1, 2) * np.float32(1e-45)
    scales = column_scales(array, 2).astype(np.float64)
    error = np.abs(unpack(pack(array, columns=2)).astype(np.float64) - array)
    assert (error <= 0.5 * scales).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4028235e38])
def test_int8_refuses_what_it_cannot_hold(value):
    array = sparse_array((6, 4), 0.5)
    array[2, 1] = value
    with pytest.raises(ValueError, match="cannot round NaN, infinity or values near the largest float to int8"):
        pack(array, columns=4)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int32])
def test_other_types_are_not_packed(dtype):
    with pytest.raises(TypeError, match="only float32, float16 and bfloat16 can be packed, got"):
        pack(np.zeros(3, dtype))


@pytest.mark.parametrize("values", ["exact", "int8"])
def test_at_95_percent_zeros_the_sizes_are_a_twelfth_and_a_twentieth(values):
    array = sparse_array((384, 1536), 0.05)
    packed = pack(array, columns=1536 if values == "int8" else None)
    assert array.nbytes / packed.nbytes >= {"exact": 12, "int8": 20}[values]
    assert packed.how.encoding == "deltas"


# files


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_save_packed_then_load_is_bit_exact(tmp_path, dtype, density):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, density, dtype)
    again, found = load(save(tmp_path / "out", model, params, packed="exact"), dtype=None)
    assert again == model
    assert_same_bits(found, params)
    save(tmp_path / "dense", model, params)
    assert_same_bits(load(tmp_path / "out")[1], load(tmp_path / "dense")[1])
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "dense")]
    assert sizes[0] < sizes[1] or density == 1


@pytest.mark.parametrize("values", ["exact", "int8"])
@pytest.mark.parametrize("model_type", ["bert", *TEXT_TYPES])
def test_pruned_models_are_packed_too(tmp_path, model_type, values):
    model, params = tiny_model(model_type, embed=32, neurons=64)
    gates = random_gates(model, params)
    gates["0.ffn.neurons" if model_type == "bert" else "encoder.0.ffn.neurons"] *= 0  # a module without units
    small = sparsified(model, compact(model, params, gates), 0.1)
    save(tmp_path / "dense", model, small)
    save(tmp_path / "packed", model, small, packed=values)
    found, expected = load(tmp_path / "packed")[1], load(tmp_path / "dense")[1]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("packed", "dense")]
    assert sizes[0] < 0.8 * sizes[1]
    if values == "exact":
        assert_same_bits(found, expected)
    names = linear_maps(model.axes, small)
    for path, array in flatten(found).items():
        ours, theirs = np.asarray(array), np.asarray(flatten(expected)[path])
        if path_name(path) not in names:
            assert ours.tobytes() == theirs.tobytes()
        elif theirs.size:
            columns = names[path_name(path)]
            largest = np.abs(theirs).reshape(-1, columns).max(0)
            assert (np.abs(ours - theirs).reshape(-1, columns) <= largest / 253).all()
            assert not ours[theirs == 0].any()


def test_the_columns_of_the_linear_maps_are_their_outputs():
    model, params = tiny_model()
    found = linear_maps(model.axes, params)
    assert {name.removeprefix("layers.1."): size for name, size in found.items() if "layers.1." in name} == {
        "attention.query.kernel": 16,
        "attention.key.kernel": 16,
        "attention.value.kernel": 16,
        "attention.out.kernel": 16,
        "ffn.up.kernel": 32,
        "ffn.down.kernel": 16,
    }
    assert len(found) == 12


def test_what_does_not_become_smaller_stays_plain(tmp_path):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, 0.05)
    plain = load_file(save(tmp_path / "dense", model, params) / "model.safetensors")
    stored = load_file(save(tmp_path / "packed", model, params, packed="exact") / "model.safetensors")
    names = linear_maps(model.axes, params)
    assert set(stored) == set(plain) - set(names) | {f"{n}.{part}" for n in names for part in ("values", "deltas")}
    for name in set(plain) - set(names):
        assert stored[name].tobytes() == plain[name].tobytes()


@pytest.mark.parametrize("packed", ["exact", "int8"])
def test_a_cast_comes_before_packing(tmp_path, packed):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, 0.1)
    params["layers"][0]["ffn"]["up"]["kernel"][0, :8] = 1e-12
    save(tmp_path / "out", model, params, dtype=jnp.float16, packed=packed)
    _, found = load(tmp_path / "out", dtype=None)
    assert {array.dtype for array in flatten(found).values()} == {np.dtype(np.float16)}
    if packed == "exact":
        assert_same_bits(found, jax.tree.map(lambda a: a.astype(jnp.float16), params))
    kernel = found["layers"][0]["ffn"]["up"]["kernel"]
    assert not np.asarray(kernel)[0, :8].any()  # too small for float16, and for int8 beside its neighbours


def test_infinity_and_overflow_are_refused_before_anything_is_written(tmp_path):
    model, params = tiny_model()
    params = jax.tree.map(np.array, params)
    params["layers"][1]["ffn"]["up"]["kernel"][0, 0] = 1e6
    params["embeddings"]["norm"]["bias"][0] = np.nan
    with pytest.raises(ValueError, match=r"too large for the type: embeddings.norm.bias, layers.1.ffn.up.kernel"):
        save(tmp_path / "out", model, params, dtype=jnp.float16, packed="exact")
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
        assert read_pruning(tmp_path / packed)["pruned"]["digest"] == model_digest(*load(tmp_path / packed))
    assert digest(load(tmp_path / "exact")[1]) != digest(load(tmp_path / "int8")[1])


def test_packing_int8_again_changes_nothing(tmp_path):
    model, params = tiny_model(embed=32, neurons=64)
    save(tmp_path / "one", model, sparsified(model, params, 0.05), packed="int8")
    save(tmp_path / "two", *load(tmp_path / "one"), packed="int8")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_packed_file_looks_like_a_plain_one(tmp_path):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, 0.05)
    plain, packed = (save(tmp_path / str(how), model, params, packed=how) for how in (None, "exact"))
    with TensorFile(plain / "model.safetensors") as one, PackedFile(packed / "model.safetensors") as two:
        assert set(one.entries) == set(two.entries)
        for name, entry in one.entries.items():
            assert two.entries[name][:2] == entry[:2]
            assert two.read(name).tobytes() == one.read(name).tobytes()
        total = sum(map(two.stored_bytes, two.entries))
    _, data = split((packed / "model.safetensors").read_bytes())
    assert total == len(data)


# sparse arrays


@pytest.mark.parametrize("packed", ["exact", "int8"])
def test_sparse_parameters_are_the_dense_ones(tmp_path, packed):
    model, params = tiny_model(embed=32, neurons=64)
    params = sparsified(model, params, 0.05)
    save(tmp_path / "out", model, params, packed=packed)
    again, sparse = load(tmp_path / "out", sparse=True)
    _, dense = load(tmp_path / "out")
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
    assert_same_bits(densify(load(tmp_path / "out", sparse=True, dtype=None)[1]), params)
    assert_same_bits(densify(load(tmp_path / "out", sparse=True)[1]), load(tmp_path / "out")[1])
    params["layers"][0]["ffn"]["up"]["kernel"][0, 0] = 1e6
    save(tmp_path / "out", model, params, packed="exact", overwrite=True)
    with pytest.raises(ValueError, match=r"too large for the type: layers.0.ffn.up.kernel\."):
        load(tmp_path / "out", sparse=True, dtype=jnp.float16)


def test_sparse_is_refused_where_nothing_is_packed_and_where_dense_is_needed(tmp_path):
    model, params = tiny_model()
    with pytest.raises(ValueError, match=r"nothing in .*dense is packed: save it with packed='exact'"):
        load(save(tmp_path / "dense", model, params), sparse=True)
    with pytest.raises(ValueError, match=r"nothing in .*hf is packed"):
        load(write_classifier(tmp_path / "hf"), sparse=True)
    save(tmp_path / "packed", model, sparsified(model, params, 0.05), packed="exact")
    _, sparse = load(tmp_path / "packed", sparse=True)
    with pytest.raises(
        TypeError, match=r"sparse parameters cannot be saved: layers.0.attention.key.kernel.*jp.densify"
    ):
        save(tmp_path / "out", model, sparse)


# the page


def test_the_reader_of_the_page_reads_what_save_wrote(tmp_path):
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "def read" in block
    )
    assert len(code.splitlines()) <= 40
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"json", "math", "numpy"}
    reader: dict[str, Any] = {}
    exec(code, reader)
    model, params = tiny_model(embed=32, neurons=64)
    kinds = set()
    for density, dtypes in ((0.05, (np.float32, np.float16, jnp.bfloat16)), (0.5, (np.float32,)), (1.0, (np.float16,))):
        for dtype in dtypes:
            for packed in ("exact", "int8"):
                folder = save(
                    tmp_path / "out", model, sparsified(model, params, density, dtype), packed=packed, overwrite=True
                )
                with PackedFile(folder / "model.safetensors") as file:
                    kinds |= {(own.how.encoding, own.how.values) for own in file.packed.values()}
                found, expected = reader["read"](folder / "model.safetensors"), load(folder, dtype=None)[1]
                assert set(found) == {path_name(path) for path in flatten(expected)}
                for path, array in flatten(expected).items():
                    ours, theirs = found[path_name(path)], np.asarray(array)
                    if ours.dtype == np.float32:  # of int8 values too
                        ours = ours.astype(theirs.dtype)
                    assert ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes(), path
    assert kinds >= {("bits", "F32"), ("deltas", "BF16"), ("all", "I8"), ("bits", "I8"), ("deltas", "I8")}


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "jp.load" in block
    )
    model, params = tiny_model()
    save(tmp_path / "packed", model, sparsified(model, params, 0.05), packed="exact")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    batch = tiny_batch(model)
    expected: Any = model.apply(load("packed")[1], batch).logits
    np.testing.assert_allclose(names["logits"](names["sparse"], batch), expected, atol=1e-5)


def test_the_description_on_the_page_is_the_one_that_is_written():
    found = json.loads(re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)[0])
    fields = found["tensors"]["layers.0.ffn.up.kernel"]
    assert found["version"] == 1 and list(fields) == list(Description._fields)
    assert fields["count"] == round(0.05 * 384 * 1536)


# damaged files

KERNEL = "layers.0.ffn.up.kernel"
OTHER = "layers.1.ffn.down.kernel"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exact and an int8 model, whose kernels have 5 % of their weights, and one of them half."""
    folder = tmp_path_factory.mktemp("whole")
    model, dense = tiny_model(embed=32, neurons=63)
    params, half = (sparsified(model, dense, density) for density in (0.05, 0.5))
    params["layers"][1]["ffn"]["down"]["kernel"] = half["layers"][1]["ffn"]["down"]["kernel"]
    save(folder / "exact", model, params, packed="exact")
    save(folder / "int8", model, params, packed="int8")
    return folder


def damaged(source: Path, folder: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> Path:
    """A copy of a folder in whose file parts, or the descriptions, were changed."""
    file = shutil.copytree(source, folder) / "model.safetensors"
    tensors = load_file(file)
    metadata = json.loads(split(file.read_bytes())[0])["__metadata__"]
    described = json.loads(metadata[METADATA])
    change(tensors, described)
    save_file(tensors, file, metadata | {METADATA: json.dumps(described)})
    return folder


def change_description(**changes: Any) -> Callable[..., None]:
    return lambda tensors, described: described["tensors"][KERNEL].update(changes)


def change_part(name: str, function: Callable[[np.ndarray], Any]) -> Callable[..., None]:
    return lambda tensors, described: tensors.update({name: np.ascontiguousarray(function(tensors[name]))})


def drop(name: str) -> Callable[..., None]:
    return lambda tensors, described: tensors.pop(name)


def set_last(array: np.ndarray, value: int) -> np.ndarray:
    return np.concatenate([array[:-1], np.array([value], array.dtype)])


DAMAGE: list[tuple[Callable[..., None], str]] = [
    (change_description(encoding="rle"), "encoding is 'rle', expected all, bits, deltas"),
    (change_description(encoding=["bits"]), "encoding is .*bits.*, expected all, bits, deltas"),
    (change_description(dtype="F64"), "dtype is 'F64', expected F32, F16, BF16"),
    (change_description(values="I4"), "values are 'I4', expected F32 or I8"),
    (change_description(values="F16"), "values are 'F16', expected F32 or I8"),
    (change_description(count=-1), r"shape is \[32, 63\] and count -1, expected counts"),
    (change_description(count=True), "count True, expected counts"),
    (change_description(count=7.0), "count 7.0, expected counts"),
    (change_description(count=102), "there are 101 values, expected 102"),
    (change_description(count=2017), "count is 2017, which does not fit the shape"),
    (change_description(encoding="all"), "which does not fit the shape .* with encoding all"),
    (change_description(shape="32"), "shape is 32 and count"),
    (change_description(shape=[2**40, 2**40]), "does not fit the shape"),
    (change_description(shape=[32, 640]), "deltas end at weight .* of 20480"),
    (change_description(shape=[1, 1, 101]), "deltas end at weight .* of 101"),
    (change_description(more=1), "expected dtype, shape, values, encoding, count"),
    (change_description(encoding="bits"), "bits are missing"),
    (change_description(values="I8"), "values are F32 of shape .*, expected I8 with one axis; .*scales are missing"),
    (lambda t, d: d["tensors"].update({KERNEL: 3}), f"{KERNEL}: it is described by 3"),
    (lambda t, d: d.update(version=2), "their layout has version '2', this version of jaxprune reads 1"),
    (lambda t, d: d.update(version=True), "their layout has version 'True'"),
    (lambda t, d: d.pop("version"), "their layout has version 'None'"),
    (lambda t, d: d.update(tensors=[]), "expected version and tensors"),
    (lambda t, d: d.update(more={}), "expected version and tensors"),
    (lambda t, d: t.update({KERNEL: np.zeros((32, 63), np.float32)}), f"there is a tensor {KERNEL} as well"),
    (lambda t, d: d["tensors"].pop(KERNEL), f"unknown: .*{KERNEL}.deltas.*missing: {KERNEL}"),
    (drop(f"{KERNEL}.values"), f"{KERNEL}: values are missing"),
    (drop(f"{KERNEL}.deltas"), f"{KERNEL}: deltas are missing"),
    (drop(f"{OTHER}.bits"), f"{OTHER}: bits are missing"),
    (change_part(f"{KERNEL}.values", lambda a: a[:-1]), r"there are \d+ values, expected \d+"),
    (change_part(f"{KERNEL}.values", lambda a: a.astype(np.float16)), "values are F16 of shape .*, expected F32"),
    (change_part(f"{KERNEL}.values", lambda a: a[None]), r"values are F32 of shape \[1, \d+\], expected F32 with one"),
    (change_part(f"{KERNEL}.deltas", lambda a: a[:-1]), r"deltas place \d+ values, and there are \d+"),
    (change_part(f"{KERNEL}.deltas", lambda a: set_last(a, 255)), "deltas place"),
    (change_part(f"{KERNEL}.deltas", lambda a: set_last(a, 254)), "deltas end at weight .* of 2016"),
    (change_part(f"{KERNEL}.deltas", lambda a: np.append(a, np.uint8(255))), "deltas end at weight .* of 2016"),
    (change_part(f"{KERNEL}.deltas", lambda a: a.astype(np.int8)), "deltas are I8 of shape .*, expected U8"),
    (change_part(f"{OTHER}.bits", lambda a: a[:-1]), "there are 251 bits, expected 252"),
    (change_part(f"{OTHER}.bits", lambda a: set_last(a, a[-1] ^ 1)), r"bits place \d+ values, and there are 1008"),
    (change_part(f"{KERNEL}.values", lambda a: np.full_like(a, np.nan)), f"NaN or infinite: {KERNEL}"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_damaged_packed_file_is_refused(whole, tmp_path, number):
    change, message = DAMAGE[number]
    folder = damaged(whole / "exact", tmp_path / "out", change)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_part(f"{KERNEL}.scales", lambda a: a[:-1]), "62 scales, which do not divide its 2016 weights"),
        (change_part(f"{KERNEL}.scales", lambda a: a[:0]), "there are 0 scales, which do not divide"),
        (change_part(f"{KERNEL}.scales", lambda a: a.astype(np.float16)), "scales are F16 of shape .*, expected F32"),
        (change_part(f"{KERNEL}.scales", lambda a: np.full_like(a, np.inf)), f"NaN or infinite: {KERNEL}"),
        (drop(f"{KERNEL}.scales"), "scales are missing"),
        (change_description(values="F32"), "values are I8 of shape .*, expected F32"),
    ],
)
def test_damaged_int8_values_are_refused(whole, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(damaged(whole / "int8", tmp_path / "out", change))


def test_everything_that_is_wrong_is_in_one_error(whole, tmp_path):
    def change(tensors: dict[str, np.ndarray], described: dict[str, Any]) -> None:
        del tensors[f"{KERNEL}.values"]
        tensors[f"{OTHER}.bits"] = tensors[f"{OTHER}.bits"][1:]
        described["tensors"]["layers.0.ffn.down.kernel"]["encoding"] = "zip"

    with pytest.raises(ValueError) as error:
        load(damaged(whole / "exact", tmp_path / "out", change))
    for part in (f"{KERNEL}: values are missing", f"{OTHER}: there are 251 bits", "layers.0.ffn.down.kernel: encoding"):
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"version": 1, "version": 1, "tensors": {}}'])
def test_a_description_that_is_not_one_is_refused(whole, tmp_path, text):
    file = shutil.copytree(whole / "exact", tmp_path / "out") / "model.safetensors"
    header, data = split(file.read_bytes())
    content = json.loads(header)
    content["__metadata__"][METADATA] = text
    file.write_bytes(safetensors_bytes(content, data))
    with pytest.raises(ValueError, match=r"the packed tensors of .*model.safetensors cannot be read"):
        load(tmp_path / "out")


def test_bits_behind_the_last_weight_are_refused(tmp_path):
    tensors, described = pack_tensors({"a": sparse_array((3, 7, 100 + 1), 0.5)})
    bits = np.asarray(tensors["a.bits"]).copy()
    assert described["a"].size % 8 == 1
    bits[-1] |= 0b10
    values = np.asarray(tensors["a.values"])
    text = json.dumps({"version": 1, "tensors": {"a": described["a"]._asdict()}})
    save_file({"a.bits": bits, "a.values": values}, tmp_path / "a.safetensors", {METADATA: text})
    with pytest.raises(ValueError, match="a: bits are set behind its last weight"):
        PackedFile(tmp_path / "a.safetensors")

"""Loading allocates at most 1.3 times the parameters' bytes, whatever the type in the file and the type asked for.

Of one task of a shared folder, those are the parameters that are left; one dense module comes on top.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import classifier_config, classifier_tensors, encoder_shapes, safetensors_bytes, write_checkpoint
from tiny import tiny_config

from jaxprune.checkpoints.folder import load, save

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}

# Peak memory of the process since `clear_refs`, the pages of mapped files included; what was there before is taken off.
# A tiny model goes first, so that what is imported and traced on the way is there already.
MEASURE = """
import sys
from pathlib import Path
import jax
import jaxprune as jp

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

tiny, big, dtype, out = sys.argv[1:]
jp.save(out, *jp.load(tiny, dtype=dtype))
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
model, params = jp.load(big, dtype=dtype)
jax.block_until_ready(params)
loaded = status("VmHWM") - before
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
jp.save(out, model, params, overwrite=True)
saved = status("VmHWM") - before
print(sum(array.nbytes for array in jax.tree.leaves(params)), loaded, saved)
"""


SHARE = """
import sys
import numpy as np
import jaxprune as jp
for source, out in zip(sys.argv[1::2], sys.argv[2::2]):
    model, params = jp.load(source)
    gates = {name: np.arange(gate.size) < gate.size / 8 for name, gate in jp.open_gates(model, params).items()}
    jp.save_shared(out, model, params, {"task": gates}, dtype="float16")
"""

SLICE = """
import sys
from pathlib import Path
import jax
import jaxprune as jp

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

jp.load(sys.argv[1], task="task")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
params = jax.block_until_ready(jp.load(sys.argv[2], task="task")[1])
print(sum(array.nbytes for array in jax.tree.leaves(params)), status("VmHWM") - before)
"""


def write_big(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """A checkpoint whose word embeddings are half of it and come last, so that a copy of them would show."""
    header, start = {}, 0
    for name, shape in reversed(encoder_shapes(config).items()):
        stop = start + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    piece = np.linspace(-1, 1, 2**18).astype(DTYPES[dtype]).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(safetensors_bytes(header))
        for first in range(0, start, len(piece)):
            file.write(piece[: start - first])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "asked"), [("F16", "float32"), ("BF16", "float32"), ("F32", "float32"), ("F32", "bfloat16")]
)
def test_loading_takes_at_most_1_3_times_the_parameters(tmp_path, stored, asked):
    config = tiny_config("bert", layers=6, embed=512, attention_heads=8, neurons=2048, vocab=40_000)
    write_big(tmp_path / "big", config, stored)
    tiny = classifier_config("bert")
    write_checkpoint(tmp_path / "tiny", tiny, classifier_tensors(tiny))
    command = [
        sys.executable,
        "-c",
        MEASURE,
        *(str(tmp_path / name) for name in ("tiny", "big")),
        asked,
        str(tmp_path / "out"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    size, loaded, saved = map(int, run.stdout.split())
    assert size > 75e6
    assert loaded < 1.3 * size, f"loading took {loaded / size:.2f} times the parameters"
    assert saved < 0.3 * size, f"saving took {saved / size:.2f} times the parameters"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_one_task_takes_at_most_1_3_times_what_is_left_and_one_dense_module(tmp_path):
    config = tiny_config("bert", layers=8, embed=512, attention_heads=8, neurons=2048, vocab=8000)
    write_big(tmp_path / "big", config, "F16")
    tiny = classifier_config("bert")
    write_checkpoint(tmp_path / "tiny", tiny, classifier_tensors(tiny))
    names = [str(tmp_path / name) for name in ("tiny", "shared tiny", "big", "shared big")]
    subprocess.run([sys.executable, "-c", SHARE, *names], check=True)
    run = subprocess.run([sys.executable, "-c", SLICE, *names[1::2]], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    left, loaded = map(int, run.stdout.split())
    module = 4 * (2 * 512 * 2048 + 2048 + 3 * 512)  # bytes of an FFN and its norm
    dense = left + 8 * 7 / 8 * 4 * (4 * 512 * 512 + 2 * 512 * 2048)
    assert dense > 110e6 and left < 35e6
    print(loaded / 1e6, left / 1e6, module / 1e6, dense / 1e6)
    assert loaded < 1.3 * left + module, f"loading took {loaded / 1e6:.0f} MB for {left / 1e6:.0f} MB"


PACK = """
import sys
import jax, numpy as np
import jaxprune as jp

big, out, share, packed = sys.argv[1:]
model, params = jp.load(big)
def thin(path, array):
    few = np.arange(array.size).reshape(array.shape) % int(share) == 0
    return np.where(few, array, np.float32(0)) if path[-1].key == "kernel" else array
jp.save(out, model, jax.tree_util.tree_map_with_path(thin, params), packed=packed)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("share", "packed"), [(2, "exact"), (20, "int8")])
def test_a_packed_file_takes_no_more_memory(tmp_path, share, packed):
    config = tiny_config("bert", layers=6, embed=512, attention_heads=8, neurons=2048, vocab=10_000)
    write_big(tmp_path / "big", config, "F32")
    arguments = [str(tmp_path / name) for name in ("big", "packed")]
    run = subprocess.run([sys.executable, "-c", PACK, *arguments, str(share), packed], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tiny = classifier_config("bert")
    save(tmp_path / "tiny", *load(write_checkpoint(tmp_path / "hf", tiny, classifier_tensors(tiny))), packed="exact")
    script = MEASURE.replace("overwrite=True)", f"overwrite=True, packed={packed!r})")
    command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in ("tiny", "packed"))]
    run = subprocess.run([*command, "float32", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    size, loaded, saved = map(int, run.stdout.split())
    assert size > 75e6
    assert loaded < 1.3 * size, f"loading took {loaded / size:.2f} times the parameters"
    assert saved < 0.3 * size, f"saving took {saved / size:.2f} times the parameters"

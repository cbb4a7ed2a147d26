"""Damaged models, packed or not, score files and gates of tasks, drawn from a seed, and a worker that judges them.

Run as a script, it takes the cases of a campaign one by one under a limit on memory and processor time, and prints one
JSON line before and after each. A case that crashes, hangs or asks for too much memory ends the process, and the last
line says which it was.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
from checkpoints import safetensors_bytes, write_classifier
from hand_tables import hand_table
from safetensors.numpy import load_file
from tiny import random_gates, tiny_model

from jaxprune.checkpoints.folder import load, save
from jaxprune.checkpoints.gates import GATES, read_pruning
from jaxprune.checkpoints.gates import METADATA as METADATA_OF_GATES
from jaxprune.checkpoints.shared import save_shared
from jaxprune.checkpoints.tensors import params_digest
from jaxprune.compaction import compact
from jaxprune.models import family
from jaxprune.pruning.latency import read_table, write_table
from jaxprune.pruning.prune import Workspace
from jaxprune.pruning.selection import pruning_record
from jaxprune.scoring.run import PARTIAL, Totals, TotalsFile
from jaxprune.scoring.scores import METADATA, Scores, load_scores, save_scores
from jaxprune.training.loop import OPTIMIZERS, TrainingState, read_state, write_state
from jaxprune.units import flatten, path_name, unflatten

MEMORY = 2**30  # bytes that a case may ask for beyond what the worker has
SECONDS = 10  # of processor time that a case may take
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 3, 7, 2**20, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.5, 16.0, 1e300, 1e-300,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
THINGS: tuple[Any, ...] = (None, True, False, "", "16", "bert", [], [16], {}, {"0": 1}, "\ud800", "\x00", "a" * 10_000)
TOKENIZER = ("vocab.txt", "tokenizer_config.json")
MEANS = {"0.ffn.neurons": np.arange(32, dtype=np.float32)}  # of one of the shared tasks
PLACES = ("length", "header", "data", "cut", "shape", "offsets", "type", "name", "duplicate", "extra")


def split(file: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file, and its data."""
    length = int.from_bytes(file[:8], "little")
    return file[8 : 8 + length], file[8 + length :]


def expanded(file: Path) -> bytes:
    """The content of a file that zstd compressed."""
    with pyarrow.input_stream(str(file), compression="zstd") as stream:
        return stream.read()


def compressed(content: bytes) -> bytes:
    """The content as zstd compresses it."""
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def damaged_tensors(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The change made to a safetensors file, and the file."""
    place = draw.choice(PLACES)
    text, data = split(whole)
    changed = bytearray(whole)
    if place in ("length", "header", "data"):
        first, last = {"length": (0, 8), "header": (8, 8 + len(text)), "data": (8 + len(text), len(whole))}[place]
        for _ in range(draw.choice((1, 1, 1, 8))):
            changed[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
        return f"bits of the {place}", bytes(changed)
    if place == "cut":
        return place, whole[: draw.randrange(len(whole))] + b"\0" * draw.choice((0, 0, 1, 4096))
    header = json.loads(text)
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    if place == "shape":
        axes, numbers = entry["shape"], (*NUMBERS, *THINGS)
        options: tuple[Callable[[], Any], ...] = (
            lambda: axes[::-1],
            lambda: [*axes, 1],
            lambda: [int(np.prod(axes))],
            lambda: [draw.choice(numbers) for _ in axes],
            lambda: [1] * draw.choice((63, 64, 65, 1000)),
            lambda: draw.choice(numbers),
        )
        entry["shape"] = draw.choice(options)()
    elif place == "offsets":
        entry["data_offsets"][draw.randrange(2)] = draw.choice((*NUMBERS, *THINGS, draw.randrange(len(data))))
    elif place == "type":
        entry["dtype"] = draw.choice(("F16", "BF16", "F64", "I32", "U32", "BOOL", "F8_E4M3", "F4", *THINGS))
    elif place == "name":
        other = draw.choice((*map(str, THINGS), name.replace("0", "1"), name.upper(), f"x.{name}", "layers.9" * 200))
        header = {other if own == name else own: value for own, value in header.items()}
    elif place == "duplicate":
        again = json.dumps({name: header[draw.choice([own for own in header if own != "__metadata__"])]})
        return place, safetensors_bytes(text.rstrip()[:-1] + b"," + again[1:].encode(), data)
    else:
        size = draw.choice((0, 4, 64))
        header["extra"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    return place, safetensors_bytes(header, data)


def damaged_json(whole: bytes, draw: random.Random) -> tuple[str, bytes]:
    """The change made to a JSON file, and the file."""
    kind = draw.choice(("value", "value", "value", "nested value", "gone", "deep", "bits", "cut", "duplicate"))
    if kind == "bits":
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        return kind, bytes(changed)
    if kind == "cut":
        return kind, whole[: draw.randrange(len(whole))]
    content = json.loads(whole)
    name = draw.choice(sorted(content))
    if kind == "duplicate":
        again = json.dumps({name: draw.choice((*NUMBERS, *THINGS))})
        return kind, whole.rstrip()[:-1] + b"," + again[1:].encode()
    if kind == "deep":
        levels = draw.choice((50, 300, 900, 990, 1100, 100_000))
        rest = {own: value for own, value in content.items() if own != name}
        return kind, json.dumps(rest).encode()[:-1] + f', "{name}": {"[" * levels}{"]" * levels}}}'.encode()
    if kind == "gone":
        del content[name]
    elif kind == "nested value" and content.get("jaxprune"):
        head = draw.choice(content["jaxprune"]["heads"])
        head[draw.choice(sorted(head))] = draw.choice((*NUMBERS, *THINGS, ["a"], ["a", "b", "c"], ["a"] * 3000))
    else:
        content[name] = draw.choice((*NUMBERS, *THINGS))
    if draw.random() < 0.2:  # the sizes that a head without names has
        content |= {
            "num_labels": draw.choice(NUMBERS),
            "architectures": draw.choice((["X"], 5, content.get("id2label"))),
        }
    return kind, json.dumps(content).encode()


def make_models(folder: Path) -> list[Path]:
    """A folder of our own and one of Hugging Face's, both whole."""
    model, params = tiny_model(layers=1)
    extra = {name: (Path(__file__).parent / "data" / "words" / name).read_bytes() for name in TOKENIZER}
    return [
        save(folder / "own", model, params, pruning={"seed": 0}, extra=extra),
        write_classifier(folder / "hf"),
    ]


def damage_model(folder: Path, draw: random.Random) -> str:
    """Damages one file of a model folder, and says what was done."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    own = (folder / "pruning.json").is_file()
    kind = draw.choices(("weights", "config", "pruning", "tokenizer"), (50, 45, 2 * own, 3 * own))[0]
    if kind == "weights":
        what, content = damaged_tensors(weights.read_bytes(), draw)
        weights.write_bytes(content)
    elif kind == "config":
        what, content = damaged_json(config.read_bytes(), draw)
        config.write_bytes(content)
    elif kind == "pruning":
        what, content = damaged_json((folder / "pruning.json").read_bytes(), draw)
        (folder / "pruning.json").write_bytes(content)
    else:
        what = draw.choice(TOKENIZER)
        if draw.random() < 0.3:
            (folder / what).unlink()
        else:
            (folder / what).write_bytes(
                draw.choice((b"", b"{", b"[]", b'{"model_max_length": []}', b"\xff\xfe", b"null"))
            )
    return f"{kind}: {what}"


def outcome(folder: Path, kind: str) -> str:
    """Loads everything of a damaged folder: "refused", "equal", or what is wrong with the answer."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*are no part of the model: ")  # a tensor more, as it should say
            model, params = load(folder)
        if kind.startswith("pruning"):
            read_pruning(folder)
        if kind.startswith("tokenizer"):
            model.tokenizer  # noqa: B018
    except (ValueError, FileNotFoundError) as error:
        named = str(folder) in str(error)
        return "refused" if named else f"the error names no file: {type(error).__name__}: {str(error)[:300]}"
    plain = load_file(folder / "model.safetensors")
    flat = {path: np.asarray(array) for path, array in flatten(params).items()}
    if (folder / "pruning.json").is_file():
        expected = {path: plain[path_name(path)] for path in flat}
    else:  # PyTorch keeps [out, in], and heads and head size as one axis
        names = family(model.config.model_type).checkpoint_names(model.config)
        plain = {name.removeprefix("bert."): array for name, array in plain.items()}
        found = {path: plain[names[path][0]] for path in flat}
        expected = {path: (a.T if path[-1] == "kernel" else a).reshape(flat[path].shape) for path, a in found.items()}
    wrong = [path for path, array in flat.items() if array.tobytes() != expected[path].astype(np.float32).tobytes()]
    return f"wrong weights: {wrong}" if wrong else "equal"


def make_packed(folder: Path) -> list[Path]:
    """Whole packed folders, exact and int8, of today and of version 0.1; beside each what is in it."""
    model, params = tiny_model(layers=1, embed=32, neurons=64)
    random, flat = np.random.default_rng(0), flatten(params)
    for path, array in flat.items():
        if path[-1] == "kernel" and "layers" in path:
            flat[path] = np.where(random.random(array.shape) < 0.1, np.asarray(array), np.float32(0))
    folders = [save(folder / values, model, unflatten(flat), packed=values) for values in ("exact", "int8")]
    for name in ("packed_exact", "packed_int8"):
        folders.append(Path(shutil.copytree(Path(__file__).parent / "data" / "before" / name, folder / name)))
    for whole in folders:
        arrays: dict[str, Any] = {path_name(p): np.asarray(a) for p, a in flatten(load(whole)[1]).items()}
        np.savez(whole / "whole.npz", **arrays)
    return folders


def damage_packed(folder: Path, draw: random.Random) -> str:
    """Damages the file of a packed folder, or the descriptions in it, and says what was done."""
    (file,) = folder.glob("model.safetensors*")
    former = file.suffix != ".zst"
    if not former and draw.random() < 0.3:
        whole = bytearray(file.read_bytes())
        if draw.random() < 0.5:
            file.write_bytes(whole[: draw.randrange(len(whole))])
            return "compressed: cut"
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(whole)
        return "compressed: bits"
    whole = file.read_bytes() if former else expanded(file)
    text, data = split(whole)
    header = json.loads(text)
    keys = sorted(header["__metadata__"].keys() & {"packed", "int8"})
    if not keys or draw.random() < 0.5:
        what, content = damaged_tensors(whole, draw)
    else:
        described = header["__metadata__"][keys[0]]
        if not former or draw.random() < 0.3:
            what, changed = damaged_json(described.encode(), draw)
            described = changed.decode(errors="replace")
        else:
            fields = json.loads(described)
            what = draw.choice(("dtype", "shape", "values", "encoding", "count"))
            own = fields["tensors"][draw.choice(sorted(fields["tensors"]))]
            near = {"shape": [[64, 32], [32, 65], [2048]], "count": [own["count"] + 1]}.get(what, ["F16", "I8", "bits"])
            own[what] = draw.choice((*NUMBERS, *THINGS, *near))
            described = json.dumps(fields)
        header["__metadata__"][keys[0]] = described
        what, content = f"description: {what}", safetensors_bytes(header, data)
    file.write_bytes(content if former else compressed(content))
    return what


def outcome_of_packed(folder: Path, what: str) -> str:
    """Loads a damaged packed folder: "refused", "equal", or what is wrong with the answer."""
    try:
        found = {path_name(path): np.asarray(array) for path, array in flatten(load(folder)[1]).items()}
    except (ValueError, FileNotFoundError) as error:
        return "refused" if str(folder) in str(error) else f"the error names no file: {error}"
    if what in ("bits of the data", "compressed: bits"):  # other values are as good as those that were written
        return "equal"
    with np.load(folder / "whole.npz") as whole:
        wrong = [name for name, array in found.items() if array.tobytes() != whole[name].tobytes()]
    return f"wrong weights: {wrong}" if wrong else "equal"


def make_scores(folder: Path) -> Path:
    """A whole score file."""
    generator = np.random.default_rng(0)
    values = {
        name: generator.standard_normal(units).astype(np.float32)
        for name, units in {"0.attention.heads": 4, "0.ffn.neurons": 32}.items()
    }
    header = {
        "format": 1, "criterion": {"name": "Random"}, "task": "mood", "split": "calibration", "head": "mood",
        "examples": 4, "largest": False, "keys": [[0, 1]], "model": "0" * 64, "data": ["1"],
        "max_length": 64, "mean_length": 7.5, "completeness": None, "versions": {"jax": "0"},
    }  # fmt: skip
    gates = {name: jnp.asarray(value) for name, value in values.items()}
    return save_scores(folder / "scores.safetensors", Scores(gates, header, means=gates, rows=("0" * 16, "a" * 16)))


def damage_scores(file: Path, draw: random.Random) -> str:
    """Damages a score file, or the header in its metadata, and says what was done."""
    return _damage_with_header(file, METADATA, draw)


def _damage_with_header(file: Path, name: str, draw: random.Random) -> str:
    whole = file.read_bytes()
    if draw.random() < 0.6:
        what, content = damaged_tensors(whole, draw)
    else:
        text, data = split(whole)
        header = json.loads(text)
        what, changed = damaged_json(header["__metadata__"][name].encode(), draw)
        header["__metadata__"][name] = changed.decode(errors="replace")
        what, content = f"header: {what}", safetensors_bytes(header, data)
    file.write_bytes(content)
    return what


def outcome_of_scores(file: Path, kind: str) -> str:
    """Loads a damaged score file: "refused", "equal", or what is wrong with the answer."""
    try:
        found = load_scores(file)
    except (ValueError, FileNotFoundError) as error:
        return "refused" if str(file) in str(error) else f"the error names no file: {error}"
    whole = make_scores(Path(tempfile.mkdtemp(dir=file.parent)))  # a checksum tells apart what was written
    plain = load_file(whole)
    shutil.rmtree(whole.parent)
    values: dict[str, Any] = {**found.values, **{f"means:{name}": array for name, array in (found.means or {}).items()}}
    values["rows"] = np.frombuffer(bytes.fromhex("".join(found.rows)), np.uint8)
    equal = values.keys() == plain.keys() and all(np.asarray(values[n]).tobytes() == plain[n].tobytes() for n in plain)
    return "equal" if equal else "wrong scores"


def make_shared(folder: Path) -> Path:
    """A whole shared folder with two tasks, one of them with means."""
    model, params = tiny_model(layers=1)
    gates = random_gates(model, params)
    return save_shared(folder / "shared", model, params, {"a": gates, "b": gates}, means={"b": MEANS})


@cache
def _digests_of_tasks() -> dict[str, str]:
    """The result of compaction for them."""
    model, params = tiny_model(layers=1)
    gates = random_gates(model, params)
    return {task: params_digest(compact(model, params, gates, means)) for task, means in (("a", None), ("b", MEANS))}


def damage_gates(folder: Path, draw: random.Random) -> str:
    """Damages the gates of a shared folder, or their description, and says what was done."""
    return _damage_with_header(folder / GATES, METADATA_OF_GATES, draw)


def outcome_of_gates(folder: Path, kind: str) -> str:
    """Loads the tasks of a damaged shared folder: "refused", "equal", or what is wrong with the answer."""
    for task, wanted in _digests_of_tasks().items():
        try:
            found = load(folder, task=task)[1]
        except (ValueError, FileNotFoundError) as error:
            return "refused" if str(folder) in str(error) else f"the error names no file: {error}"
        if params_digest(found) != wanted:
            return f"wrong weights of {task}"
    return "equal"


SETTINGS = {"criterion": {"name": "Taylor"}, "batch_size": 4, "rounds": 3}  # of a run in progress


def _totals() -> Totals:
    units = {"0.attention.heads": 4, "0.ffn.neurons": 32}
    draw = np.random.default_rng(0)
    rows = {name: jnp.asarray(draw.random(count), jnp.float32) for name, count in units.items()}
    halves = {name: jnp.stack([row, row]) for name, row in rows.items()}
    return Totals(rows, {"expected": jnp.ones(())}, jnp.ones(()) * 8, rows, halves, jnp.ones(2) * 4, rows)


def make_totals(folder: Path) -> Path:
    """The running totals of a scoring run."""
    folder.mkdir()
    TotalsFile(file := folder / "scores.partial", SETTINGS).save(_totals(), 2)
    return file


def damage_totals(file: Path, draw: random.Random) -> str:
    """Damages running totals, or their description, and says what was done."""
    return _damage_with_header(file, PARTIAL, draw)


def outcome_of_totals(file: Path, kind: str) -> str:
    """Reads damaged totals: "refused", "equal", or what is wrong with the answer."""
    return _same_or_refused(file, lambda: TotalsFile(file, SETTINGS).load(), (_totals(), 2))


def _state() -> TrainingState:
    params = {"a": {"kernel": jnp.arange(12.0).reshape(4, 3)}, "b": {"bias": jnp.ones(3)}}
    history = ({"step": 2, "value": 0.5}, {"step": 4, "value": 0.25})
    return TrainingState(params, OPTIMIZERS["adamw"]().init(params), params, 5, history)


def make_states(folder: Path) -> Path:
    """The state of a training."""
    folder.mkdir()
    write_state(file := folder / "run.state", _state(), SETTINGS)
    return file


def damage_states(file: Path, draw: random.Random) -> str:
    """Damages the state of a training, or its description, and says what was done."""
    return _damage_with_header(file, "jaxprune_training", draw)


def outcome_of_states(file: Path, kind: str) -> str:
    """Reads a damaged state: "refused", "equal", or what is wrong with the answer."""
    state = _state()
    return _same_or_refused(
        file, lambda: read_state(file, state._replace(best={}, history=(), done=0), SETTINGS), state
    )


def make_tables(folder: Path) -> Path:
    """A latency table."""
    return write_table(folder / "table.json", hand_table(*tiny_model(layers=1)))


def damage_tables(file: Path, draw: random.Random) -> str:
    """Damages a latency table, and says what was done."""
    what, content = damaged_json(file.read_bytes(), draw)
    file.write_bytes(content)
    return what


def outcome_of_tables(file: Path, kind: str) -> str:
    """Reads a damaged table: "refused", "equal" to what is in the file, or what is wrong with the answer."""
    try:
        table = read_table(file)
    except ValueError as error:
        return "refused" if str(file) in str(error) else f"the error names no file: {error}"
    same = json.loads(json.dumps({"format": 1, **asdict(table)})) == json.loads(file.read_text(errors="replace"))
    return "equal" if same else "wrong table"


def make_rounds(folder: Path) -> Path:
    """The folder of a pruning in rounds that was interrupted after the first."""
    model, params = tiny_model(layers=1)
    gates = random_gates(model, params)
    record = pruning_record({}, gates) | {"rounds": [{"round": 1, "budget": 0.5}], "run": SETTINGS}
    workspace = Workspace(folder / "out")
    workspace.save(model, compact(model, params, gates), record)
    return workspace.folder


def damage_rounds(folder: Path, draw: random.Random) -> str:
    """Damages the record or the weights of rounds, and says what was done."""
    name = draw.choice(("pruning.json", "pruning.json", "config.json", "model.safetensors"))
    damaged = damaged_tensors if name == "model.safetensors" else damaged_json
    what, content = damaged((folder / name).read_bytes(), draw)
    (folder / name).write_bytes(content)
    return f"{name}: {what}"


def outcome_of_rounds(folder: Path, kind: str) -> str:
    """Resumes from damaged rounds: "refused", "equal", or what is wrong with the answer."""
    target = folder.with_name("out.rounds")  # where a run looks for it
    folder.rename(target)
    model, params = tiny_model(layers=1)
    gates = {name: np.asarray(gate) for name, gate in random_gates(model, params).items()}
    small = compact(model, params, gates)
    expected = {name: (gate > 0).astype(np.float32) for name, gate in gates.items()}, small

    def resume() -> Any:
        after = Workspace(folder.with_name("out")).load(SETTINGS)[1]
        return None if after is None else (after.gates, after.params)

    met = _same_or_refused(target, resume, expected)
    target.rename(folder)
    return met


def _same_or_refused(place: Path, read: Callable[[], Any], expected: Any) -> str:
    """Reads something: "refused" with an error that names it, "equal" to what is expected, or what is wrong."""
    try:
        found = read()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        return "refused" if str(place) in str(error) else f"the error names no file: {type(error).__name__}: {error}"
    leaves, wanted = (jax.tree.leaves_with_path(tree) for tree in (found, expected))
    same = [path for path, _ in leaves] == [path for path, _ in wanted]
    same = same and all(np.array_equal(a, b) for (_, a), (_, b) in zip(leaves, wanted, strict=True))
    return "equal" if same else "wrong values"


def cases(folder: Path, campaign: str, seed: int, first: int, last: int) -> Iterator[tuple[int, str, str | None]]:
    """The cases of a campaign: (number, what was done, None), then (number, what was done, outcome)."""
    make, damage, check = CAMPAIGNS[campaign]
    whole = made if isinstance(made := make(folder / "whole"), list) else [made]
    for place in whole:  # once undamaged: compiles, and shows that the comparison holds
        assert check(place, "") == "equal"
    yield -1, "", "ready"
    for number in range(first, last):
        draw = random.Random(f"{seed} {number}")
        source = whole[number % len(whole)]
        target = folder / f"case{number}{source.suffix}"
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        what = damage(target, draw)
        yield number, what, None
        yield number, what, _met(lambda target=target, what=what: check(target, what))
        shutil.rmtree(target) if target.is_dir() else target.unlink()


CAMPAIGNS: dict[str, tuple[Callable[..., Any], Callable[..., str], Callable[..., str]]] = {
    "models": (make_models, damage_model, outcome),
    "scores": (make_scores, damage_scores, outcome_of_scores),
    "gates": (make_shared, damage_gates, outcome_of_gates),
    "packed": (make_packed, damage_packed, outcome_of_packed),
    "totals": (make_totals, damage_totals, outcome_of_totals),
    "states": (make_states, damage_states, outcome_of_states),
    "tables": (make_tables, damage_tables, outcome_of_tables),
    "rounds": (make_rounds, damage_rounds, outcome_of_rounds),
}


def _met(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(where.filename).name}, line {where.lineno}: {str(error)[:300]}"


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main() -> None:
    """Takes FOLDER, CAMPAIGN, SEED, FIRST and LAST, and prints every case twice."""
    folder, campaign, *numbers = sys.argv[1:]
    for number, what, found in cases(Path(folder), campaign, *map(int, numbers)):
        print(json.dumps([number, what, found]), flush=True)
        if number < 0:
            _limit()
        signal.setitimer(signal.ITIMER_PROF, SECONDS if found is None else 0)  # SIGPROF ends the process


if __name__ == "__main__":
    main()

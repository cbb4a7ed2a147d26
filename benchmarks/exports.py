"""What a pruned model computes once it has left the house: read by the programs that others use, and how large it is.

    python benchmarks/exports.py --model NAME=PATH --model NAME=PATH --data DATA -o benchmarks/results/exports.json

Every model is pruned for one task, with uniform widths, exported in all forms that it has, and loaded by the programs
these are for: transformers (with PyTorch), llama.cpp (the package llama-cpp-python), onnxruntime and jax without
jaxprune. The logits of test rows are compared in float32, and the answers. A program that is not installed is left out,
and said to be.

Parts, for `--only`:
    formats     exports, their sizes, errors and answers
    uneven      the same with widths that differ from layer to layer, where a format has them, beside what is filled up
    latency     one forward pass of each program, in turns
    vocabulary  the tokens that one task needs, kept alone; and the most needed ones
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from parts import asked, each, keep
from timing import in_turns, spread

import jaxprune as jp
from jaxprune.checkpoints.tensors import TensorFile
from jaxprune.checkpoints.vocabulary import cut_vocabulary
from jaxprune.data.batches import encode, tokens_changed, tokens_needed
from jaxprune.data.prompts import prompt_of
from jaxprune.models import Model
from jaxprune.units import Params

TASK, BUDGET, ROWS, EXAMPLES = "sst2", 0.7, 100, 64
UNIFORM = jp.Rules(uniform=True)
BATCH, TOKENS, REPEATS = 8, 128, 15  # of what is timed; a decoder reads one prompt
VOCABULARIES = (None, 20_000, 4_000)  # all that the task needs; the most needed
Read = Callable[[Mapping[str, np.ndarray]], Any]  # a batch -> logits, or the last hidden states


def pruned(model: Model, params: Params, task: jp.Task, rules: jp.Rules = UNIFORM) -> Params:
    """The model at 0.7 of the FLOPs, by default with all layers alike."""
    criterion = jp.criteria.GradientActivation()
    scores = jp.score(model, params, task, jp.Scoring(criterion=criterion, rows=jp.Rows(examples=EXAMPLES)))
    gates = jp.select(model, params, scores, jp.budgets.Flops(BUDGET), rules=rules)
    return jp.compact(model, params, gates)


def by_transformers(folder: Path) -> Read:
    """The folder, loaded by the class that its configuration names."""
    import torch
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    loaded = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()

    def read(batch: Mapping[str, np.ndarray]) -> Any:
        with torch.no_grad():
            out = loaded(**{key: torch.from_numpy(np.asarray(ids, np.int64)) for key, ids in batch.items()})
        return np.asarray(out["logits"] if "logits" in out else out["last_hidden_state"])

    return read


def by_llama_cpp(file: Path) -> Read:
    """A GGUF file, one row at a time, with a cache in float32."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    loaded = llama_cpp.Llama(
        str(file), n_ctx=512, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0, flash_attn=False
    )

    def read(batch: Mapping[str, np.ndarray]) -> Any:
        found = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            loaded.reset()
            loaded.eval([int(i) for i in ids[mask == 1]])
            scores = np.array(loaded.scores[: int(mask.sum())], np.float32)
            found.append(np.pad(scores, ((0, len(ids) - len(scores)), (0, 0))))
        return np.stack(found)

    return read


def by_jax(file: Path) -> Read:
    """A StableHLO program."""
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    names = program.in_tree.unflatten(list(range(program.in_tree.num_leaves)))[0][0]

    def read(batch: Mapping[str, np.ndarray]) -> Any:
        blank = np.zeros_like(batch["input_ids"])
        return np.asarray(program.call({name: np.asarray(batch.get(name, blank), np.int32) for name in names}))

    return read


def by_onnxruntime(file: Path) -> Read:
    """An ONNX file."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def read(batch: Mapping[str, np.ndarray]) -> Any:
        blank = np.zeros_like(batch["input_ids"])
        return session.run(None, {name: np.asarray(batch.get(name, blank), np.int64) for name in names})[0]

    return read


PROGRAMS: dict[str, tuple[str, str, Callable[[Path], Read]]] = {  # what is written, what is needed to read it
    "transformers": ("hf", "torch", by_transformers),
    "llama.cpp": ("gguf", "llama_cpp", by_llama_cpp),
    "onnxruntime": ("onnx", "onnxruntime", by_onnxruntime),
    "jax": ("stablehlo", "flatbuffers", by_jax),
}


def batches(model: Model, task: jp.Task) -> list[dict[str, np.ndarray]]:
    """Test rows one by one, of one length; a text-to-text model is asked for its first token."""
    encoded = encode(model, task.rows("test")[:ROWS], prompt=prompt_of(model, task))
    rows = np.split(encoded.input_ids, encoded.offsets[1:-1])
    longest, found = max(map(len, rows)), []
    for row in rows:
        ids = np.pad(row, (0, longest - len(row)), constant_values=model.config.pad_id)
        one = {"input_ids": ids[None], "attention_mask": (np.arange(longest) < len(row))[None].astype(np.int32)}
        if len(model.stacks) > 1:
            start = np.full((1, 1), model.config.start_id, np.int32)
            one |= {"decoder_input_ids": start, "decoder_attention_mask": np.ones_like(start)}
        found.append(one)
    return found


def at_the_end(batch: Mapping[str, np.ndarray], values: Any) -> np.ndarray:
    """The logits of a row: of a label, or of the token that comes next."""
    array, mask = np.asarray(values, np.float64), batch.get("decoder_attention_mask", batch["attention_mask"])
    return array[0, int(mask.sum()) - 1] if array.ndim == 3 else array[0]


def with_head(read: Read, folder: Path, task: str) -> Read:
    """An encoder without head, with the task head that stands beside it: as the card of the folder says."""
    with TensorFile(folder / "heads.safetensors") as file:
        kernel, bias = (file.read(f"{task}.out.{leaf}").astype(np.float32) for leaf in ("kernel", "bias"))

    def logits(batch: Mapping[str, np.ndarray]) -> Any:
        mask = batch["attention_mask"][..., None]
        return (read(batch) * mask).sum(1) / mask.sum(1) @ kernel + bias

    return logits


def formats(models: Mapping[str, str], task: jp.Task, rules: jp.Rules = UNIFORM) -> dict[str, Any]:
    """Every model in every form that it has."""
    rows: dict[str, Any] = {}
    for name, path in models.items():
        model, params = jp.load(path)
        small, head = pruned(model, params, task, rules), TASK if model.heads else None
        own: Read = lambda batch: model.apply(small, batch, head=head).logits  # noqa: B023, E731
        asked_rows = batches(model, task)
        expected = np.stack([at_the_end(row, own(row)) for row in asked_rows])
        rows[name] = {"parameters": jp.parameters(small), "dense": jp.parameters(params)}
        for program, (form, package, open_export) in PROGRAMS.items():
            if form == "gguf" and not model.continues:
                continue
            if find_spec(package) is None:
                rows[name][program] = None
                continue
            with tempfile.TemporaryDirectory() as folder:
                where = Path(folder) / "export"
                made = jp.export(
                    where, model, small, to=form, dtype="float32", head=head if form in ("onnx", "stablehlo") else None
                )
                size = sum(file.stat().st_size for file in ([where] if where.is_file() else where.iterdir()))
                read = open_export(where)
                read = with_head(read, where, TASK) if form == "hf" and made["heads"]["beside"] else read
                found = np.stack([at_the_end(row, read(row)) for row in asked_rows])
                rows[name][program] = {
                    "class": made["class"],
                    "bytes": size,
                    "written": made["parameters"]["written"],
                    "error": float(np.abs(found - expected).max() / np.abs(expected).max()),
                    "same_answers": int(np.sum(found.argmax(1) == expected.argmax(1))),
                    "rows": len(expected),
                }
    return {"rows": rows}


def uneven(models: Mapping[str, str], task: jp.Task) -> dict[str, Any]:
    """Every model with layers of different widths; units compete with their own kind in all of the model."""
    return formats(models, task, jp.Rules(allocation="per_kind"))


def latency(models: Mapping[str, str], task: jp.Task) -> dict[str, Any]:
    """Seconds of a forward pass of the dense and the pruned model: of a batch, or of a decoder's prompt."""
    rows: dict[str, Any] = {}
    for name, path in models.items():
        model, params = jp.load(path)
        head, count = (TASK, BATCH) if model.heads else (None, 1)
        ids = np.random.default_rng(0).integers(5, model.config.vocab, (count, TOKENS)).astype(np.int32)
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if len(model.stacks) > 1:
            start = np.full((count, 1), model.config.start_id, np.int32)
            batch |= {"decoder_input_ids": start, "decoder_attention_mask": np.ones_like(start)}
        runs: dict[str, Callable[[], Any]] = {}
        compiled = jax.jit(lambda params, batch, run=model.apply, head=head: run(params, batch, head=head).logits)
        with tempfile.TemporaryDirectory() as folder:
            for state, own in (("dense", params), ("pruned", pruned(model, params, task))):
                runs[f"jaxprune, {state}"] = partial(
                    lambda *given: given[0](*given[1:]).block_until_ready(), compiled, own, batch
                )
                for program in ("onnxruntime", "llama.cpp", "transformers"):
                    form, package, open_export = PROGRAMS[program]
                    if find_spec(package) is None or (form == "gguf" and not model.continues):
                        continue
                    where = Path(folder) / f"{program}-{state}"
                    jp.export(
                        where, model, own, to=form, dtype="float32", head=head if form == "onnx" else None, check=False
                    )
                    runs[f"{program}, {state}"] = partial(open_export(where), batch)
            seconds = {run: spread(each) for run, each in in_turns(runs, REPEATS).items()}
        rows[name] = {"rows": count, "tokens": TOKENS, "seconds": seconds}
    return {"rows": rows, "threads": os.cpu_count()}


def finished(run: Callable[..., Any], *given: Any) -> Any:
    """What a compiled function returns, once it is there."""
    return run(*given).block_until_ready()


def vocabulary(models: Mapping[str, str], task: jp.Task) -> dict[str, Any]:
    """The tokens that the task needs alone, in dense models."""
    found: dict[str, Any] = {}
    rows = jp.Rows(split="test", examples=300)
    for name, path in models.items():
        model, params = jp.load(path)
        counts = tokens_needed(model, [task], jp.Rows())
        found[name] = {"dense": facts(model, params, task, rows)}
        for most in VOCABULARIES:
            try:
                cut = cut_vocabulary(model, params, counts, most)
            except ValueError:
                continue
            if most is None or most < found[name]["data"]["vocab"]:
                changed = tokens_changed(model, cut.model, cut.kept, [task], jp.Rows())
                found[name]["data" if most is None else str(most)] = facts(cut.model, cut.params, task, rows) | changed
    return {"rows": found}


def facts(model: Model, params: Params, task: jp.Task, rows: jp.Rows) -> dict[str, Any]:
    """The size of a model and how well it does the task."""
    with tempfile.TemporaryDirectory() as folder:
        jp.save(Path(folder) / "model", model, params, dtype="bfloat16")
        size = sum(file.stat().st_size for file in (Path(folder) / "model").iterdir())
    metric, value = jp.evaluate(model, params, task, rows=rows, head=TASK if model.heads else None).primary
    return {"vocab": model.config.vocab, "parameters": jp.parameters(params), "bytes": size, metric: value}


def main() -> None:
    """Runs what is asked for."""
    parts = {"formats": formats, "uneven": uneven, "latency": latency, "vocabulary": vocabulary}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="NAME=PATH, several times")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    arguments, chosen = asked(parser, parts)
    models = dict(own.split("=", 1) for own in arguments.model)
    task = jp.load_task(TASK, data=arguments.data)
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    about = {
        "command": "python benchmarks/exports.py --model NAME=PATH … --data DATA -o OUTPUT",
        "task": TASK,
        "budget": BUDGET,
        "examples": EXAMPLES,
    }
    for part in each(chosen):
        keep(arguments.output, found, part, parts[part](models, task), about)


if __name__ == "__main__":
    main()

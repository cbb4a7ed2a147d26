"""Writes this folder's files with the commit that it stands for; see the README beside it.

    git worktree add ../old fbe8ef1
    cd ../old && PYTHONPATH=.:tests python THIS_FILE

Everything goes through the commands, so that the files are those that users have. It does not overwrite.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from tiny import tiny_batch, tiny_model

import jaxprune as jp
from jaxprune.models import TaskHead

HERE = Path(__file__).parent
TASKS = {"mood": ("bad", "good"), "topic": ("animal", "sky", "text")}
WORDS = ("the", "a", "film", "book", "dog", "sun", "is", "was", "not", "very", "good", "bad", "long", "old", "red")
PROMPT = 'template: "mood : {sentence} ?"\nwords:\n  good: very good\n  bad: bad\n'


def run(*arguments: object) -> dict:
    """The record that a command prints."""
    command = [sys.executable, "-m", "jaxprune", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=HERE).stdout)


def write_rows(task: str, labels: tuple[str, ...], seed: int) -> None:
    """Sentences of random words with random labels."""
    random = np.random.default_rng(seed)
    (HERE / "rows" / task).mkdir(parents=True)
    for split, rows in {"train": 60, "validation": 12, "test": 24}.items():
        with (HERE / "rows" / task / f"{split}.jsonl").open("w") as file:
            for i in range(rows):
                words = random.choice(WORDS, random.integers(4, 12))
                file.write(json.dumps({"sentence": " ".join(words), "label": labels[i % len(labels)]}) + "\n")


def sparse(params: dict) -> dict:
    """The parameters with a twentieth of the weights in most kernels; half of them in the first query's."""

    def thin(path: tuple, array: jax.Array) -> np.ndarray:
        names = [str(getattr(step, "key", step)) for step in path]
        if "layers" not in names or names[-1] != "kernel":
            return np.asarray(array)
        share = 0.5 if "query" in names else 0.95
        return np.where(np.abs(array) < np.quantile(np.abs(array), share), np.float32(0), array)

    return jax.tree_util.tree_map_with_path(thin, params)


def main() -> None:
    """Writes everything."""
    for i, (task, labels) in enumerate(TASKS.items()):
        write_rows(task, labels, i)
    (HERE / "prompt.yaml").write_text(PROMPT)
    heads = tuple(TaskHead(name=name, labels=labels, pooling="mean") for name, labels in TASKS.items())
    bert, params = tiny_model("bert", layers=1, heads=heads)
    bert = replace(bert, source=HERE.parent / "words")
    jp.save(HERE / "bert", bert, params)
    jp.save(HERE / "sparse", bert, sparse(params))
    t5, params = tiny_model("t5", layers=1, neurons=16)
    jp.save(HERE / "t5", replace(t5, source=HERE.parent / "answers"), params)

    for task in TASKS:
        closed = "mean" if task == "mood" else "zero"
        asked = ("--task", task, "--data", "rows", "--examples", 8, "--nodes", 4, "--closed", closed)
        run("score", "bert", *asked, "-o", f"{task}.safetensors")
    text = ("--task", "mood", "--data", "rows", "--prompt", "prompt.yaml")
    run("score", "t5", *text, "--examples", 8, "--nodes", 4, "-o", "text.safetensors")
    quick = ("--data", "rows", "--task", "mood", "--flops", 0.5, "--measure", 0)
    run("prune", "bert", *quick, "--scores", "mood.safetensors", "-o", "pruned")
    run("prune", "t5", *quick, "--prompt", "prompt.yaml", "--scores", "text.safetensors", "-o", "pruned_t5")
    run("pack", "sparse", "-o", "packed_exact")
    run("pack", "sparse", "-o", "packed_int8", "--values", "int8")
    shutil.rmtree(HERE / "sparse")
    run(
        "share", "bert", "--scores", "mood.safetensors", "--scores", "topic.safetensors", "--flops", 0.5, "-o", "shared"
    )

    arrays, facts = {}, {}
    models = ("bert", "t5", "pruned", "pruned_t5", "packed_exact", "packed_int8", "shared#mood", "shared#topic")
    for name in models:
        model, params = jp.load(str(HERE / name))
        batch = tiny_batch(model, seed=1)
        head = name.partition("#")[2] or "mood"
        arrays[name] = np.asarray(model.apply(params, batch, head=None if "t5" in name else head).logits)
        arrays |= {f"{'t5' if 't5' in name else 'bert'}:{key}": value for key, value in batch.items()}
        asked = (*text,) if "t5" in name else ("--task", head, "--data", "rows")
        [result] = run("evaluate", name, *asked)["results"]
        facts[name] = {"metrics": result["metrics"], "units": run("inspect", name)["total"]}
    np.savez_compressed(HERE / "expected.npz", **arrays)
    (HERE / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

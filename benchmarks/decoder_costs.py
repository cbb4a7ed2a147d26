"""What scoring and a pruned decoder cost: seconds beside forward passes, compilation by depth, memory, generation.

    python benchmarks/decoder_costs.py --model smollm2 -o benchmarks/results/decoder_costs.json

Times are of rounds in which every side runs once, and what is quoted are ratios within a round. Inputs are random
tokens. `compile` counts what XLA takes for the first batch of a model with all layers and with the first six of them;
`memory` is measured in a process of its own, as in `speed.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from parts import asked, begun, each, keep
from timing import growth, in_turns, part, peak_of_child, spread

import jaxprune as jp
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.evaluation.text import worded
from jaxprune.models import Model
from jaxprune.scoring.attribution import Context
from jaxprune.units import Params

PARTS = ("score", "compile", "memory", "prefill", "decode")
REPEATS = 7
SHALLOW = 6  # layers
CRITERION = jp.criteria.GradientActivation(objective=jp.objectives.log_probability, kinds=("groups", "neurons"))


def rows(model: Model, batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens, and two words to answer with."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, model.config.vocab, (batch, length), dtype=np.int32)
    words = np.array([[[5], [7]]], np.int32).repeat(batch, 0)
    labels = random.integers(0, 2, batch, dtype=np.int32)
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels, "candidates": words}


def scoring(model: Model, params: Params, batches: list[dict[str, np.ndarray]]) -> Callable[[], Any]:
    """Gradient x activation of all batches."""
    return lambda: jax.block_until_ready([CRITERION(model, params, it, Context("words")).scores for it in batches])


def reading(model: Model, params: Params, batches: list[dict[str, np.ndarray]]) -> Callable[[], Any]:
    """A forward pass of all batches, up to the logits of the words."""
    given = [{name: value for name, value in worded(model, params, it).items()} for it in batches]
    return lambda: jax.block_until_ready([model.apply(params, it, head="words").logits for it in given])


def score(model: Model, params: Params) -> dict[str, Any]:
    """64 rows of 32 tokens: scoring beside a forward pass."""
    batches = [rows(model, 32, 32, seed) for seed in range(2)]
    seconds = in_turns(
        {"scoring": scoring(model, params, batches), "forward": reading(model, params, batches)}, REPEATS
    )
    ratio = spread(seconds["scoring"] / seconds["forward"], at_most=3.0)
    return part(seconds, {"scoring / forward": ratio}, {"rows": 64, "tokens": 32})


def compile_(model: Model, params: Params) -> dict[str, Any]:
    """The seconds that XLA compiles for the first batch, by the number of layers."""
    taken: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: (
            taken.append(duration_secs) if event.endswith("backend_compile_duration") else None
        )
    )
    jax.config.update("jax_enable_compilation_cache", False)
    found = {}
    for layers in (SHALLOW, model.config.layers):
        some = replace(model, config=replace(model.config, kinds=model.config.kinds[:layers]))
        own = {**params, "layers": {i: params["layers"][i] for i in range(layers)}}
        jax.clear_caches()
        taken.clear()
        scoring(some, own, [rows(model, 8, 32)])()
        found[str(layers)] = {"seconds": sum(taken), "programs": len(taken)}
    shallow, deep = (found[str(layers)]["seconds"] for layers in (SHALLOW, model.config.layers))
    return {"layers": found, "deep / shallow": {"median": deep / shallow, "at_most": 1.5}}


def memory(model: Model, params: Params, source: Path) -> dict[str, Any]:
    """The peak beyond the weights while a batch of 16 x 64 is scored, and the bytes of the weights."""
    peak = peak_of_child([sys.executable, __file__, "--model", str(source), "--measure-memory", "-o", "-"])
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    whole = None if peak is None else (peak + weights) / weights
    return {"weights": weights, "growth": peak, "peak / weights": {"median": whole, "at_most": 2.5}}


def halves(model: Model, params: Params) -> dict[str, Params]:
    """The dense model, and what stays of it at half the FLOPs: the same in every layer, and whatever scores best."""
    found = scoring(model, params, [rows(model, 16, 32)])()[0]
    values = {name: np.asarray(value).mean(0) for name, value in found.items()}
    chosen = {"dense": params}
    for allocation in ("per_layer", "per_kind"):
        rules = jp.Rules(allocation=allocation, multiple_of={"neurons": 16})
        gates = jp.select(model, params, values, jp.budgets.Flops(0.5, length=128), rules=rules)
        chosen[f"half, {allocation}"] = jp.compact(model, params, gates)
    return chosen


def prefill(model: Model, params: Params) -> dict[str, Any]:
    """8 prompts of 128 tokens, up to the logits of the next token."""
    batch = [rows(model, 8, 128)]
    seconds = in_turns({name: reading(model, own, batch) for name, own in halves(model, params).items()}, REPEATS)
    ratios = {name: spread(seconds["dense"] / taken, target=1.6) for name, taken in seconds.items() if name != "dense"}
    return part(seconds, ratios, {"batch": 8, "tokens": 128})


def decode(model: Model, params: Params) -> dict[str, Any]:
    """32 tokens after prompts of 16, one at a time and eight together; no text ends before."""
    found, model = {}, replace(model, config=replace(model.config, end_ids=(model.config.vocab - 1,)))
    for batch in (1, 8):
        asked = {name: value for name, value in rows(model, batch, 16).items() if name.endswith(("ids", "mask"))}
        runs = {name: partial(_written, model, own, asked) for name, own in halves(model, params).items()}
        seconds = in_turns(runs, REPEATS)
        ratios = {name: spread(seconds["dense"] / taken) for name, taken in seconds.items() if name != "dense"}
        found[str(batch)] = part(seconds, ratios, {"batch": batch, "prompt": 16, "tokens": 32})
    return found


def _written(model: Model, params: Params, batch: dict[str, np.ndarray]) -> Any:
    return jax.block_until_ready(jp.generate(model, params, batch, max_new_tokens=32))


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder or GGUF of a decoder")
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    arguments, chosen = asked(parser, PARTS)
    model, params = jp.load(arguments.model)
    if arguments.measure_memory:
        print(growth(scoring(model, params, [rows(model, 16, 64)])))
        return
    digest = model_digest(model, params)
    found = begun(parser, arguments.output, digest)
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "score": partial(score, model, params),
        "compile": partial(compile_, model, params),
        "memory": partial(memory, model, params, arguments.model),
        "prefill": partial(prefill, model, params),
        "decode": partial(decode, model, params),
    }
    facts = {"command": "python benchmarks/decoder_costs.py --model MODEL -o OUTPUT", "model": digest}
    for name in each(chosen):
        keep(arguments.output, found, name, run[name](), facts)


if __name__ == "__main__":
    main()

"""Times scoring and the pruned model: beside PyTorch and captum, beside a forward pass, and beside the device's limit.

    python benchmarks/speed.py --model jaxprune/bundled/model -o benchmarks/results/speed.json

Everything that is compared runs in one process, on the same weights, batch and threads, in turns (A B A B ...), after a
round that is not counted; a ratio is the median of the rounds' ratios, with its quartiles. Before anything is timed
beside PyTorch, the numbers of both must agree to 1e-4 of the largest. On a GPU bfloat16 and chunk sizes are measured
too. `--random` takes a model with random weights instead, of the size of a well-known one. A text-to-text model reads
`--length` tokens and writes four; the parts that it has are gradient, memory, pruned and limit.

Parts, for `--only`:
    joint    integrated gradients, all gates on one path, beside autograd by hand and captum
    layer    integrated gradients, one site at a time, beside captum
    gradient gradient x activation beside autograd by hand
    memory   peak memory of integrated gradients beside gradient x activation
    pruned   latency of a model with half the FLOPs beside the dense one
    scaling  time by examples, nodes, layers and length
    limit    scoring beside a forward pass and beside the time that its matrix products take at the measured rate

Memory is measured in a fresh process per criterion: it loads the model and scores one batch, which compiles and touches
whatever stays; it gives freed memory back to the system, and then scores once more. On a CPU what counts is by how much
the process grows meanwhile (the kernel's peak counter, reset in between; Linux only), on a GPU the allocator's peak
less what was allocated before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from timing import (
    PEERS,
    Part,
    Runs,
    Setting,
    agreement,
    growth,
    in_turns,
    part,
    peak_of_child,
    peer,
    precision,
    say,
    spread,
    wanted,
)

import jaxprune as jp
from jaxprune.checkpoints.files import write_atomic
from jaxprune.models import Model, TaskHead, family
from jaxprune.models.cost import flops
from jaxprune.pruning.latency import compare_latency
from jaxprune.scoring.attribution import Context, gauss_legendre, layer, quadrature
from jaxprune.scoring.objectives import signed
from jaxprune.units import Params, widths

VERSIONS = ("jaxprune", "jax", "jaxlib", "flax", "numpy", "transformers", *PEERS)
SIZES = {
    "bert-base": {
        "model_type": "bert",
        "vocab_size": 30_522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3_072,
        "max_position_embeddings": 512,
    },
    "flan-t5-small": {
        "model_type": "t5",
        "vocab_size": 32_128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1_024,
        "num_layers": 8,
        "num_decoder_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}


def joint(setting: Setting) -> Part:
    """Integrated gradients of all gates at once."""
    criterion = jp.criteria.IntegratedGradients(nodes=setting.nodes)
    batches = [setting.rows(seed=i) for i in range(setting.batches)]
    runs: dict[str, Callable[[], Any]] = {"jaxprune": setting.score(criterion, batches)}
    theirs, facts = peer(setting), {"precision": precision(setting)}
    if theirs is not None:
        points, weights = quadrature(gauss_legendre, setting.nodes, 0.0)
        by_hand = partial(theirs.integrate, points, weights)
        others = {"autograd": by_hand} | (
            {} if setting.compiled else {"captum": partial(theirs.captum_joint, setting.nodes)}
        )
        [found], _, _ = criterion.attributions(
            setting.model, setting.params, setting.rows(), Context(head=setting.head)
        )
        facts |= agreement(setting, found, {name: run() for name, run in others.items()})
        for name, run in others.items():
            runs[name] = partial(_each, run, setting.batches)
    rounds = 3 * setting.repeats  # the two sides are close
    seconds = in_turns(runs, rounds)
    ratios = {
        f"{name} / jaxprune": spread(seconds[name] / seconds["jaxprune"], **target)
        for name, target in (("autograd", {"target": 1.0}), ("captum", {}))
        if name in seconds
    }
    examples = setting.batch * setting.batches
    facts |= {"examples": examples, "examples per second": examples / float(np.median(seconds["jaxprune"]))}
    return part(seconds, ratios, facts | {"rounds": rounds})


def _each(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def layers(setting: Setting) -> Part:
    """Integrated gradients of one site at a time, with two nodes: the ratio hardly depends on their number."""
    nodes, depth = min(2, setting.nodes), setting.model.config.layers
    criterion = jp.criteria.IntegratedGradients(nodes=nodes, path=layer)
    runs: dict[str, Callable[[], Any]] = {"jaxprune": setting.score(criterion)}
    theirs, facts = peer(setting), {"precision": precision(setting), "nodes": nodes}
    if theirs is not None:
        found, _, _ = criterion.attributions(setting.model, setting.params, setting.rows(), Context(head=setting.head))
        runs["captum"] = partial(theirs.captum_layers, nodes)
        facts |= agreement(setting, found[0], {"captum": runs["captum"]()})
    above = [depth - i for i in range(depth) for _ in range(2)]  # layers from a site's own upwards
    # Ours: layers above there and back, the start of every path, the open model and the prefixes.
    ours = sum((2 * nodes + 1) * n for n in above) + 2 * depth
    full = sum(nodes * (depth + n) + 2 * depth for n in above)  # captum: all layers there, those above back, both ends
    facts["layer passes of captum / jaxprune"] = full / ours
    seconds = in_turns(runs, setting.repeats)
    ratios = {}
    if theirs is not None:
        ratios["captum / jaxprune"] = spread(seconds["captum"] / seconds["jaxprune"], target=1.2)
    return part(seconds, ratios, facts)


def gradient(setting: Setting) -> Part:
    """Gradient x activation."""
    criterion = jp.criteria.GradientActivation(examples=signed)
    runs: dict[str, Callable[[], Any]] = {"jaxprune": setting.score(criterion)}
    theirs, facts, ratios = peer(setting), {"precision": precision(setting)}, {}
    if theirs is not None:
        found = criterion(setting.model, setting.params, setting.rows(), Context(head=setting.head)).scores
        runs["autograd"] = theirs.gradient
        facts |= agreement(setting, found, {"autograd": theirs.gradient()})
    seconds = in_turns(runs, setting.repeats)
    if theirs is not None:
        ratios["autograd / jaxprune"] = spread(seconds["autograd"] / seconds["jaxprune"])
    return part(seconds, ratios, facts)


def memory(setting: Setting) -> Part:
    """Peak memory of one batch, each criterion in a fresh process."""
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        jp.save(f"{folder}/model", setting.model, setting.params)
        for name in ("gradient", "integrated"):
            arguments = [name, f"{folder}/model", setting.head or "", setting.batch, setting.length, setting.nodes]
            peak = peak_of_child([sys.executable, __file__, "--measure-memory", *map(str, arguments)])
            if peak is None:
                say("  memory is left out: this system has no /proc to measure it with.")
                return part({}, {}, {})
            peaks[name] = peak
            say(f"  {name}: {peaks[name] / 2**20:.0f} MiB")
    facts = {f"{name}, MiB": peak / 2**20 for name, peak in peaks.items()}
    ratio = {"median": peaks["integrated"] / peaks["gradient"], "at_most": 1.1}
    return part({}, {"integrated / gradient": ratio}, facts)


def measure_memory(name: str, folder: str, head: str, batch: str, length: str, nodes: str) -> None:
    """Prints by how many bytes a criterion makes this process (or the GPU's memory) grow: run by `memory`."""
    model, params = jp.load(folder)
    setting = Setting(
        model=model, params=params, head=head or None, folder=folder, batch=int(batch), length=int(length)
    )
    integrated = jp.criteria.IntegratedGradients(nodes=int(nodes), chunk=1)
    print(growth(setting.score({"gradient": jp.criteria.GradientActivation(), "integrated": integrated}[name])))


def pruned(setting: Setting) -> Part:
    """The latency of a model with half the FLOPs, the same share of every site, neurons in multiples of 8."""
    model, params = setting.model, setting.params
    random = np.random.default_rng(0)
    scores = {name: random.random(units).astype(np.float32) for name, units in widths(model.axes, params).items()}
    ratios, seconds = {}, {}
    for length in sorted({min(32, setting.length), setting.length}):
        lengths = replace(setting, length=length).lengths
        gates = jp.select(
            model, params, scores, jp.budgets.Flops(0.5, length=lengths), rules=jp.Rules(multiple_of={"neurons": 8})
        )
        small = jp.compact(model, params, gates)
        expected = flops(model, params, lengths) / flops(model, small, lengths)
        for batch in (1, 32):
            name = f"batch {batch}, length {length}"
            found = [
                compare_latency([(model, params), (model, small)], batch=batch, length=lengths, head=setting.head)
                for _ in range(max(1, setting.repeats // 2))
            ]
            seconds[f"dense, {name}"] = np.array([one.latencies[0].median for one in found])
            seconds[f"pruned, {name}"] = np.array([one.latencies[1].median for one in found])
            speedup = [one.speedups[1] for one in found]
            target = {"target": 0.8 * expected} if (batch, length) == (32, 128) else {}
            ratios[f"dense / pruned, {name}"] = spread(speedup, flops_ratio=expected, **target)
            say(f"  {name}: {np.median(speedup):.2f} x, FLOPs {expected:.2f} x")
    return part(seconds, ratios, {})


def scaling(setting: Setting) -> Part:
    """Integrated gradients with one thing changed at a time."""
    small = replace(setting, batch=max(1, setting.batch // 4), nodes=2)
    runs: dict[str, Callable[[], Any]] = {}
    work: dict[str, float] = {}  # GFLOPs of the nodes

    def add(name: str, own: Setting) -> None:
        runs[name] = own.score(jp.criteria.IntegratedGradients(nodes=own.nodes))
        work[name] = 2e-9 * own.nodes * own.batch * flops(own.model, own.params, own.lengths)

    for times in (1, 2, 4):
        add(f"examples = {times * small.batch}", replace(small, batch=times * small.batch))
    for nodes in (4, 8):
        add(f"nodes = {nodes}", replace(small, nodes=nodes))
    for depth in (2, 4):
        model, params = random_model(json.loads(setting.model.config.raw) | {"num_hidden_layers": depth})
        add(f"layers = {depth}", replace(small, model=model, params=params, head=model.heads[0]))
    for length in (setting.length // 4, setting.length // 2):
        add(f"length = {length}", replace(small, length=length))
    seconds = in_turns(runs, setting.repeats)
    first = next(iter(runs))
    rate = {name: work[name] / times for name, times in seconds.items()}
    ratios = {f"rate of {name} / {first}": spread(rate[name] / rate[first]) for name in runs if name != first}
    facts = {"batch": small.batch, "nodes": small.nodes, "layers": setting.model.config.layers, "length": small.length}
    return part(seconds, ratios, facts)


def limit(setting: Setting) -> Part:
    """The cost of a gradient and of a node, in forward passes and in matrix products at the measured rate."""
    model, params, batch = setting.model, setting.params, setting.rows()
    tokens, embed, neurons = setting.batch * setting.length, model.config.embed, model.config.neurons
    kind = jax.tree.leaves(params)[0].dtype
    x, kernel = jnp.ones((tokens, embed), kind), jnp.ones((embed, neurons), kind)
    times = max(1, round(2e10 / (2 * tokens * embed * neurons)))  # long enough to be timed
    nodes = setting.nodes
    integrated = f"integrated gradients, {nodes} nodes"
    passes = {"forward": 1, "gradient x activation": 2, integrated: 2 * nodes + 1}  # the objective with all gates open

    def products() -> None:
        jax.block_until_ready([_product(x, kernel) for _ in range(times)][-1])

    runs: Runs = {
        "matrix product": products,
        "forward": lambda: jax.block_until_ready(model.apply(params, batch, head=setting.head).logits),
        "gradient x activation": setting.score(jp.criteria.GradientActivation()),
        integrated: setting.score(jp.criteria.IntegratedGradients(nodes=nodes)),
    }
    seconds = in_turns(runs, setting.repeats)
    rate = 2e-9 * times * tokens * embed * neurons / seconds["matrix product"]  # GFLOP/s
    work = 1e-9 * setting.batch * flops(model, params, setting.lengths)
    ratios = {
        f"{name}, in forward passes": spread(seconds[name] / seconds["forward"], expected=count)
        for name, count in passes.items()
        if name != "forward"
    }
    ratios["forward, share of the limit"] = spread(work / rate / seconds["forward"])
    ratios[f"{integrated}, share of the limit"] = spread(2 * nodes * work / rate / seconds[integrated])
    facts = {"precision": precision(setting), "matrix products, GFLOP/s": float(np.median(rate))}
    return part(seconds, ratios, facts)


@jax.jit
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def chunks(setting: Setting) -> Part:
    """Integrated gradients with more nodes evaluated together."""
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= setting.nodes]
    runs = {f"chunk {n}": setting.score(jp.criteria.IntegratedGradients(nodes=setting.nodes, chunk=n)) for n in sizes}
    seconds = in_turns(runs, setting.repeats)
    ratios = {f"chunk 1 / {name}": spread(seconds["chunk 1"] / own) for name, own in seconds.items()}
    return part(seconds, ratios, {"precision": precision(setting)})


PARTS: dict[str, Callable[[Setting], Part]] = {
    "joint": joint,
    "layer": layers,
    "gradient": gradient,
    "memory": memory,
    "pruned": pruned,
    "scaling": scaling,
    "limit": limit,
}
TEXT_PARTS = ("gradient", "memory", "pruned", "limit")
ACCELERATED = {"joint": joint, "gradient": gradient, "limit": limit, "chunks": chunks}  # in bfloat16 too


def measure(setting: Setting, only: Sequence[str] = tuple(PARTS)) -> dict[str, Part]:
    """Measures some parts; on an accelerator some of them in bfloat16 too, and chunk sizes."""
    found = {}
    for name in only:
        say(f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}")
        found[name] = PARTS[name](setting)
    if jax.default_backend() != "cpu":
        half = replace(setting, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), setting.params))
        for own in (setting, half):
            for name, run in ACCELERATED.items():
                if name == "chunks" or (name in only and own is half):
                    say(f"{name}, {precision(own)}")
                    found[f"{name}, {precision(own)}"] = run(own)
    return found


def random_model(raw: Mapping[str, Any]) -> tuple[Model, Params]:
    """A model of a Hugging Face configuration with one task head and random weights."""
    module = family(raw["model_type"])
    heads = () if raw.get("d_kv") else (TaskHead(name="task", labels=("negative", "positive"), pooling="mean"),)
    model = Model(module.parse_config(raw, heads))
    return model, model.initialise(jax.random.key(0))


def environment(setting: Setting, threads: int) -> dict[str, Any]:
    """The device, versions and settings of the measurement."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    names = ["folder", "head", "batch", "batches", "length", "nodes", "repeats", "compiled"]
    names += ["written"] if setting.model.answers_in_text else []
    return {
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {platform.system()}",
        "threads": threads,
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in VERSIONS}},
        "commit": commit,
        "settings": {name: getattr(setting, name) for name in names},
    }


def show(parts: Mapping[str, Part]) -> None:
    """Prints a table of all ratios and facts."""
    table = Table(title="Ratios: the median of the rounds, and their quartiles")
    for column in ("part", "what", "measured", "spread", "expected"):
        table.add_column(column)
    for name, found in parts.items():
        for what, ratio in found["ratios"].items():
            quartiles = " – ".join(f"{value:.3f}" for value in ratio.get("quartiles", ()))
            table.add_row(name, what, f"{ratio['median']:.3f}", quartiles, wanted(ratio))
        for what, fact in found["facts"].items():
            table.add_row(name, what, f"{fact:.4g}" if isinstance(fact, float) else str(fact), "", "")
    Console().print(table)


def limit_threads(threads: int) -> None:
    """Gives JAX and PyTorch this many threads; before JAX has found its devices, which is when it counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=jp.bundled_model(), help="folder or hub id; the first task head is used")
    parser.add_argument(
        "--random", choices=SIZES, help="random weights in this size instead, 20 nodes; bert-base: 2048 examples"
    )
    parser.add_argument("--batch", type=int, default=16, help="examples in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens per example, no padding")
    parser.add_argument("--nodes", type=int, help="quadrature nodes (8; 20 with --random)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="of JAX and PyTorch, on a CPU")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4 examples of 32 tokens, 2 nodes")
    parser.add_argument("--only", help=f"parts, by commas: {', '.join(PARTS)}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    limit_threads(arguments.threads)
    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu:
        jax.config.update("jax_default_matmul_precision", "float32")  # PyTorch's default too: no TF32
    size = SIZES.get(arguments.random)
    model, params = jp.load(arguments.model) if size is None else random_model(size)
    known = TEXT_PARTS if model.answers_in_text else tuple(PARTS)
    only = arguments.only.split(",") if arguments.only else list(known)
    if wrong := sorted(set(only) - set(known)):
        parser.error(f"--only has {', '.join(wrong)}; this model has {', '.join(known)}.")
    setting = Setting(
        model=model,
        params=params,
        head=next(iter(model.heads), None),
        folder=f"random weights, {arguments.random}" if size else Path(arguments.model).name,
        batch=arguments.batch,
        length=arguments.length,
        nodes=arguments.nodes or (20 if size else 8),
        repeats=arguments.repeats,
    )
    if arguments.random == "bert-base":
        setting = replace(setting, batches=max(1, 2048 // setting.batch), compiled=not on_cpu)
    if arguments.quick:
        setting = replace(setting, batch=4, batches=1, length=32, nodes=2, repeats=2)
    where = environment(setting, arguments.threads)
    commit, how = where.pop("commit"), where["settings"]
    kept = _kept(arguments.output, where, set(PARTS) - set(only))
    parts = measure(setting, only)
    parts = {**kept, **{name: own | {"commit": commit, "repeats": how["repeats"]} for name, own in parts.items()}}
    ordered = {name: parts[name] for name in (*PARTS, *parts) if name in parts}
    record = {"command": "python benchmarks/speed.py", **where, "parts": ordered}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
    show(parts)


def _kept(output: Path, where: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The parts of a record that are not measured anew, if it was made in the same place and with the same settings.

    Raises:
        ValueError: If it was not.
    """
    if not names or not output.exists():
        return {}
    found = json.loads(output.read_text())
    other = [name for name in where if name != "settings" and found.get(name) != where[name]]
    other += [n for n, v in where["settings"].items() if n != "repeats" and found["settings"].get(n) != v]
    if other:
        raise ValueError(
            f"{output} was made elsewhere or otherwise ({', '.join(other)}): name another file, or run all parts."
        )
    return {name: own for name, own in found["parts"].items() if name in names}


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch uses the same GPU
    if sys.argv[1:2] == ["--measure-memory"]:
        measure_memory(*sys.argv[2:])
    else:
        main()

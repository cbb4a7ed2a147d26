"""Tables and pictures of results. Nothing is measured here: records of plain values go in.

Every table fits into 80 columns, and names its units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from rich import box
from rich.table import Table

Record = Mapping[str, Any]

# Okabe and Ito, Color Universal Design, 2008: told apart with every kind of colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
GREY = "#999999"
COUNTS = {  # what a record counts -> its row in the table
    "units": "units: heads and neurons",
    "prunable_parameters": "parameters of units",
    "parameters": "parameters, all",
}


def scores_table(record: Record) -> Table:
    """What was scored, and how."""
    criterion = dict(record["criterion"])
    table = _table(f"scores of {record['source']}")
    table.show_header = False
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("task", f"{record['task']}, task head {record['head']}")
    examples = f"{record['examples']:,} of split {record['split']}" if record["examples"] else "none are read"
    table.add_row("examples", examples)
    if record["examples"]:
        table.add_row("mean length", f"{record['mean_length']:.1f} tokens")
    table.add_row("criterion", criterion.pop("name"))
    for name, value in criterion.items():
        table.add_row(f"  {name}", _plain(value))
    if record["completeness"]:
        table.add_row("completeness", _completeness(record["completeness"]))
    table.add_row("scores", f"{record['units']:,} units at {record['sites']} sites")
    return table


def before_after_table(record: Record) -> Table:
    """A model before and after pruning: quality, counts, FLOPs, file size and latency, with ratios and speed-ups."""
    before, after, kept = record["before"], record["after"], record["kept"]
    table = _table(None)
    table.add_column(no_wrap=True)
    for heading in ("before", "after", "kept", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    if "evaluation" in before:
        for row in _evaluation_rows(before["evaluation"], after["evaluation"]):
            table.add_row(*row)
        table.add_section()
    for name, title in COUNTS.items():
        table.add_row(title, f"{before[name]:,}", f"{after[name]:,}", _percent(kept.get(name)))
    flops = (f"{found['flops'] / 1e6:,.1f}" for found in (before, after))
    theoretical = _times(record["speedup"]["theoretical"])
    table.add_row(f"MFLOPs, {before['length']:.4g} tokens", *flops, _percent(kept.get("flops")), theoretical)
    if before.get("file_bytes"):
        sizes = (f"{found['file_bytes'] / 1e6:,.2f}" for found in (before, after))
        table.add_row("weights on disk, MB", *sizes, _percent(kept.get("file_bytes")))
    for old, new in zip(before.get("latency", ()), after.get("latency", ()), strict=True):
        table.add_section()
        shape = f"{old['batch']} x {old['length']} tokens"
        table.add_row(
            f"latency, ms, {shape}",
            _milliseconds(old["median"]),
            _milliseconds(new["median"]),
            "",
            _times(new["speedup"]),
        )
        table.add_row("  95th percentile", _milliseconds(old["p95"]), _milliseconds(new["p95"]))
    return table


def before_after_notes(record: Record) -> list[str]:
    """What the figures of `before_after_table` mean."""
    before = record["before"]
    notes = [
        "FLOPs: matrix products of the layers, of one example. Embeddings are never pruned, they stay in the file."
    ]
    if before.get("latency"):
        device = before["latency"][0]["device"]
        notes.append(f"Latency: median of passes in turns on {device}, no padding. Speed-ups: by FLOPs, and measured.")
    return [fill(note, 80, subsequent_indent="  ") for note in notes]


def evaluation_table(results: Sequence[Record], title: str | None = None) -> Table:
    """How well a model does on one or several tasks, in percent."""
    table = _table(title)
    table.add_column("task")
    table.add_column("split")
    table.add_column("examples", justify="right")
    table.add_column("metrics, %")
    table.add_column("chance", justify="right")
    for result in results:
        metrics = ", ".join(f"{name} {100 * value:.1f}" for name, value in result["metrics"].items())
        cut = f" ({result['truncated']:,} cut)" if result["truncated"] else ""
        table.add_row(
            result["task"], result["split"], f"{result['n']:,}{cut}", metrics, f"{100 * result['chance']:.1f}"
        )
    return table


def comparison_table(rows: Sequence[Record], variants: Sequence[str], chosen: str) -> Table:
    """Primary metrics in percent: one row per task, one column per variant of the model."""
    table = _table(None)
    table.add_column("task")
    table.add_column("examples", justify="right")
    for name in (*variants, "chance"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{100 * row['values'][name]:.1f}" for name in variants]
        style = "bold" if row["task"] == chosen else None
        table.add_row(row["task"], f"{row['n']:,}", *cells, f"{100 * row['chance']:.1f}", style=style)
        if row["task"] == chosen:
            table.add_section()
    return table


def comparison_figure(
    path: Path,
    rows: Sequence[Record],
    variants: Sequence[str],
    kept: Mapping[str, Sequence[float]],
    *,
    title: str,
) -> Path:
    """Writes a picture: bars per task and variant, and which heads and how many neurons stay in every layer.

    Args:
        path: The picture; its ending names the format.
        rows: As for `comparison_table`.
        variants: The names of the bars, in order.
        kept: Site name to gates `[units]`, such as `0.attention.heads` and `0.ffn.neurons`.
        title: What is shown.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    bars, grid = figure.subplots(1, 2, width_ratios=(3, 1))
    width = 0.8 / len(variants)
    places = np.arange(len(rows))
    for i, (name, colour) in enumerate(zip(variants, COLOURS, strict=False)):
        values = [100 * row["values"][name] for row in rows]
        offsets = places + (i - (len(variants) - 1) / 2) * width
        drawn = bars.bar(offsets, values, width, label=name, color=colour, edgecolor="white", linewidth=0.5)
        bars.bar_label(drawn, fmt="%.0f", fontsize=7, padding=1)
    for place, row in zip(places, rows, strict=True):
        chance = 100 * row["chance"]
        label = "chance" if place == 0 else None
        bars.hlines(chance, place - 0.45, place + 0.45, color="black", linewidth=1.2, linestyle="dashed", label=label)
    bars.set_xticks(places, [f"{row['task']}\n{row['metric']}, n = {row['n']}" for row in rows], fontsize=8)
    bars.set_ylabel("primary metric, %")
    bars.set_ylim(0, 108)
    bars.set_yticks(range(0, 101, 20))
    bars.set_title(title, fontsize=10, loc="left")
    bars.spines[["top", "right"]].set_visible(False)
    bars.legend(ncols=len(variants) + 1, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    _draw_units(grid, kept)
    figure.savefig(path)
    return path


def _draw_units(axes: Any, kept: Mapping[str, Sequence[float]]) -> None:
    """One row per layer: a square per head, filled if it stays, and the share of neurons that stay."""
    heads = {name.split(".")[0]: gates for name, gates in kept.items() if name.endswith(".heads")}
    neurons = {name.split(".")[0]: gates for name, gates in kept.items() if name.endswith(".neurons")}
    layers = sorted(heads.keys() | neurons.keys(), key=int)
    most = max((len(gates) for gates in heads.values()), default=0)
    for y, layer in enumerate(layers):
        for x, gate in enumerate(heads.get(layer, ())):
            colour = COLOURS[0] if gate else "white"
            axes.plot(x, y, "s", markersize=8, markerfacecolor=colour, markeredgecolor=COLOURS[0] if gate else GREY)
        own = neurons.get(layer, ())
        axes.text(most, y, f"{sum(gate > 0 for gate in own):,} of {len(own):,}", va="center", fontsize=8)
    axes.set_xlim(-0.7, most + 5.2)
    axes.set_ylim(-0.7, len(layers) - 0.3)
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers], fontsize=8)
    axes.set_xticks([(most - 1) / 2, most + 2], ["heads", "neurons"], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("what attribution keeps", fontsize=10, loc="left")


def _table(title: str | None) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False, padding=(0, 1))


def _evaluation_rows(before: Record, after: Record) -> list[tuple[str, ...]]:
    """A heading, then one row per metric; chance beside the first, which is the one to report."""
    rows = [(f"{before['task']}, {before['n']:,} {before['split']} examples", "", "", "", "")]
    for name, value in before["metrics"].items():
        chance = f" (chance {100 * before['chance']:.1f})" if len(rows) == 1 else ""
        rows.append((f"{name}, %{chance}", f"{100 * value:.1f}", f"{100 * after['metrics'][name]:.1f}", "", ""))
    return rows


def _completeness(found: Record) -> str:
    share = "" if found["relative"] is None else f" ({100 * found['relative']:.2g} %)"
    return f"error {found['error']:.2g} of {found['size']:.2g}{share}, means over the examples"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "default" if value is None else str(value)


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * ratio:.1f} %"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"

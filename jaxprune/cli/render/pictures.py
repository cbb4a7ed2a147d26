"""Pictures of results, for light and for dark pages. Nothing is measured here: records of plain values go in.

Lines differ in colour, marker and dashes, so that they are told apart without colours as well.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from jaxprune.checkpoints.files import write_atomic
from jaxprune.cli.render.tables import Record, by_budget

# Okabe and Ito, Color Universal Design, 2008: told apart with every kind of colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
MARKERS = "osD^vPX*<ph"  # one for each criterion
DASHES = ("-", (0, (6, 2)), (0, (3, 1, 1, 1)), (0, (1, 1)))
SCORES_MAP = "cividis"  # evenly brighter from blue to yellow, for every kind of colour vision
FORMATS = ("png", "svg")


class Page(NamedTuple):
    """The colours of a page."""

    background: str
    ink: str
    faint: str  # what is not there


LIGHT = Page("#ffffff", "#1a1a1a", "#b0b0b0")
DARK = Page("#14171c", "#e8e8e8", "#6a6f78")


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

    figure = _figure(11, 4.6, LIGHT)
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
    return _write(path, figure)


def _draw_units(axes: Any, kept: Mapping[str, Sequence[float]]) -> None:
    """One row per layer: a square per head, filled if it stays, and the share of neurons that stay."""
    heads = {name.split(".")[0]: gates for name, gates in kept.items() if name.endswith(".heads")}
    neurons = {name.split(".")[0]: gates for name, gates in kept.items() if name.endswith(".neurons")}
    layers = sorted(heads.keys() | neurons.keys(), key=int)
    most = max((len(gates) for gates in heads.values()), default=0)
    for y, layer in enumerate(layers):
        for x, gate in enumerate(heads.get(layer, ())):
            colour = COLOURS[0] if gate else LIGHT.background
            edge = COLOURS[0] if gate else LIGHT.faint
            axes.plot(x, y, "s", markersize=8, markerfacecolor=colour, markeredgecolor=edge)
        own = neurons.get(layer, ())
        axes.text(most, y, f"{sum(gate > 0 for gate in own):,} of {len(own):,}", va="center", fontsize=8)
    axes.set_xlim(-0.7, most + 5.2)
    axes.set_ylim(len(layers) - 0.3, -0.7)  # the first layer on top, as in a table
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers], fontsize=8)
    axes.set_xticks([(most - 1) / 2, most + 2], ["heads", "neurons"], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("what attribution keeps", fontsize=10, loc="left")


def sweep_figure(path: Path, rows: Sequence[Record], *, split: str, dark: bool = False) -> Path:
    """Writes a picture of one task of a sweep: its metric over the FLOPs that stay, a line per criterion.

    A line is the mean over the seeds, the band around it reaches from the smallest to the largest value.

    Args:
        path: The picture, `.png` or `.svg`.
        rows: The rows of one task, as `sweep_model` returns them.
        split: What was tested.
        dark: Whether it is for a dark page.

    Raises:
        ValueError: If the ending names another format.
    """
    page, first = DARK if dark else LIGHT, rows[0]
    figure = _figure(7.2, 4.8, page)
    axes = _axes(figure.subplots(), page)
    names = list(dict.fromkeys(row["criterion"] for row in rows))
    for i, name in enumerate(names):
        groups = [own for _, own in by_budget(row for row in rows if row["criterion"] == name)]
        x = [100 * mean(row["flops_kept"] for row in own) for own in groups]
        values = [[100 * row["value"] for row in own] for own in groups]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(
            x,
            list(map(mean, values)),
            color=colour,
            linestyle=DASHES[i % len(DASHES)],
            linewidth=1.8,
            marker=marker,
            markersize=6,
            markeredgecolor=page.ink,
            markeredgewidth=0.6,
            label=name,
        )
        axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.22, linewidth=0)
    axes.axhline(100 * first["dense"], color=page.ink, linewidth=1.1, label="dense")
    axes.axhline(100 * first["chance"], color=page.ink, linewidth=1.1, linestyle=(0, (5, 4)), label="chance")
    axes.set_xlabel("FLOPs kept, % of the dense model's layers")
    axes.set_ylabel(f"{first['metric']}, %")
    seeds = max(row["seed"] for row in rows) + 1
    axes.set_title(f"{_plain(first['task'])}, {split}, n = {first['n']:,}", fontsize=11, loc="left", color=page.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=page.faint, linewidth=0.4, alpha=0.6)
    spread = "one seed" if seeds == 1 else f"lines: mean over {seeds} seeds, bands: smallest to largest"
    legend = figure.legend(
        loc="outside lower center", ncols=4, fontsize=8, frameon=False, title=spread, title_fontsize=8, handlelength=3.5
    )
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_color(page.ink)
    return _write(path, figure)


def deletion_figure(path: Path, record: Record, *, dark: bool = False) -> Path:
    """Writes a picture of the deletion check: quality over the units that are deleted, in three kinds of order.

    Args:
        path: The picture, `.png` or `.svg`.
        record: As from `check_model`.
        dark: Whether it is for a dark page.

    Raises:
        ValueError: If the ending names another format.
    """
    page, facts = DARK if dark else LIGHT, record["checks"][-1]["facts"]
    figure = _figure(7.2, 4.8, page)
    axes = _axes(figure.subplots(), page)
    x = [0.0, *(100 * fraction for fraction in facts["fractions"])]
    curves = {name: [100 * value for value in (facts["dense"], *own)] for name, own in facts["curves"].items()}
    random = list(zip(*(own for name, own in curves.items() if name.startswith("random")), strict=True))
    shown = {"lowest first": curves["lowest first"], "random": list(map(mean, random))}
    shown["highest first"] = curves["highest first"]
    for i, (name, values) in enumerate(shown.items()):
        style = {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i], "markeredgecolor": page.ink}
        axes.plot(x, values, linewidth=1.8, markersize=6, markeredgewidth=0.6, label=name, **style)
    axes.fill_between(x, list(map(min, random)), list(map(max, random)), color=COLOURS[1], alpha=0.22, linewidth=0)
    axes.axhline(100 * facts["chance"], color=page.ink, linewidth=1.1, linestyle=(0, (5, 4)), label="chance")
    axes.set_xlabel("units deleted, % of every site")
    axes.set_ylabel(f"{facts['metric']}, %")
    title = f"{_plain(record['task'])}, {facts['split']}, n = {facts['examples']:,}"
    axes.set_title(title, fontsize=11, loc="left", color=page.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=page.faint, linewidth=0.4, alpha=0.6)
    legend = figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False, handlelength=3.5)
    for text in legend.get_texts():
        text.set_color(page.ink)
    return _write(path, figure)


def inspection_figure(path: Path, record: Record, units: Mapping[str, Sequence[Any]], *, dark: bool = False) -> Path:
    """Writes a picture of a model's units: per layer a cell for every head, and a strip for each other kind of units.

    Cells and strips are empty where units were removed. With scores, colours tell the rank of a unit among all of its
    kind in the model, and a strip is sorted by it.

    Args:
        path: The picture, `.png` or `.svg`.
        record: As from `inspect_model`.
        units: For `heads`, `neurons` and whatever else was cut: per layer an array `[units it had]`, NaN where a unit
            was removed, else its rank in [0, 1].
        dark: Whether it is for a dark page.

    Raises:
        ValueError: If the ending names another format.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Rectangle

    page, layers, scored = DARK if dark else LIGHT, record["layers"], record["scores"] is not None
    colours = mpl.colormaps[SCORES_MAP] if scored else ListedColormap([COLOURS[4]])
    most = max((len(own) for own in units["heads"]), default=0)
    strips = [kind for kind in units if kind != "heads"]
    figure = _figure(4.8 + 4.8 * len(strips), 1.5 + 0.32 * len(layers), page)
    heads, *others = panels = list(figure.subplots(1, 1 + len(strips), width_ratios=(1, *[1.6] * len(strips))))
    for axes, kind in zip(panels, ("heads", *strips), strict=True):
        _axes(axes, page)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_yticks(range(len(layers)), [f"layer {layer['layer']}" for layer in layers] if axes is heads else [])
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        name = kind.replace("_", " ")
        axes.set_title(f"{name}, best first" if scored and axes is not heads else name, fontsize=9, color=page.ink)
        axes.set_xticks([])
    for y, (own, layer) in enumerate(zip(units["heads"], layers, strict=True)):
        for x, rank in enumerate(own):
            face = "none" if np.isnan(rank) else colours(float(rank))
            edge = page.faint if np.isnan(rank) else page.ink
            heads.add_patch(Rectangle((x - 0.4, y - 0.36), 0.8, 0.72, facecolor=face, edgecolor=edge, lw=0.7))
        heads.text(most, y, _of(layer["heads"]), va="center", fontsize=8, color=page.ink)
    heads.set_xlim(-0.6, most + 2.2)
    for axes, kind in zip(others, strips, strict=True):
        widest = max((len(own) for own in units[kind]), default=0) or 1
        for y, (own, layer) in enumerate(zip(units[kind], layers, strict=True)):
            ranks = np.sort(np.asarray(own, float)[~np.isnan(own)])[::-1]
            if len(ranks):
                place = (0, len(ranks), y + 0.36, y - 0.36)
                axes.imshow(ranks[None], extent=place, aspect="auto", cmap=colours, vmin=0, vmax=1)
            if len(own):
                size = len(own), 0.72
                axes.add_patch(Rectangle((0, y - 0.36), *size, facecolor="none", edgecolor=page.faint, lw=0.7))
            axes.text(1.02 * widest, y, _of(layer[kind]), va="center", fontsize=8, color=page.ink)
        axes.set_xlim(-0.01 * widest, 1.3 * widest)
        axes.set_ylim(len(layers) - 0.4, -0.6)
    figure.suptitle(_plain(record["source"]), fontsize=10, color=page.ink, x=0.01, ha="left")
    if scored:
        bar = figure.colorbar(
            ScalarMappable(Normalize(0, 100), colours), ax=panels, location="bottom", shrink=0.5, aspect=45
        )
        bar.set_label("score: rank among all units of the kind, % (100: needed most)", fontsize=8, color=page.ink)
        bar.ax.tick_params(labelsize=8, colors=page.ink)
        bar.outline.set_edgecolor(page.faint)
    else:
        figure.supxlabel("filled: stays; empty: removed", fontsize=8, color=page.ink)
    return _write(path, figure)


def overlap_figure(path: Path, record: Record, *, dark: bool = False) -> Path:
    """Writes a heat map of a comparison: overlap of kept units by layer and fraction, heads and neurons apart.

    Of more than two tasks it has one of tasks x tasks above, at the fraction in the middle; layers then show the mean
    over the pairs. Every cell says its number, and what chance gives stands below.

    Args:
        path: The picture, `.png` or `.svg`.
        record: As from `compare_scores`.
        dark: Whether it is for a dark page.

    Raises:
        ValueError: If the ending names another format.
    """
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    page, groups, pairs = DARK if dark else LIGHT, record["groups"], record["pairs"]
    known = [file["name"] for file in record["files"]]
    names = list(map(_plain, known))
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    layers = list(dict.fromkeys(group["layer"] for group in groups if group["layer"] is not None))
    found = {(group["layer"], group["kind"]): i for i, group in enumerate(groups)}
    fractions = [f"{fraction:g}" for fraction in record["fractions"]]
    middle = len(fractions) // 2
    several = len(pairs) > 1
    tall = [0.9 + 0.42 * len(names)] * several + [0.9 + 0.3 * (len(layers) + 3)]
    wide = max(3.4, 1.0 + 0.6 * max(len(names) * several, len(fractions)))
    figure = _figure(0.9 + wide * len(kinds), 1.1 + sum(tall), page)
    panels = figure.subplots(len(tall), len(kinds), squeeze=False, height_ratios=tall)
    colours = mpl.colormaps[SCORES_MAP]
    for column, kind in enumerate(kinds):
        every = found[None, kind]
        if several:
            table: list[list[float | None]] = [[None] * len(names) for _ in names]
            for pair in pairs:
                i, j = (known.index(name) for name in pair["names"])
                table[i][j] = table[j][i] = pair["groups"][every]["overlap"][middle]
            axes = _heat_map(panels[0][column], table, names if column == 0 else [], names, colours, page)
            level = groups[every]["chance"][middle]
            note = "" if level is None else f" (chance {level:.2f})"
            axes.set_title(f"{kind}, {fractions[middle]} kept{note}", fontsize=9, color=page.ink)
        rows = {layer if " " in layer else f"layer {layer}": found.get((layer, kind)) for layer in layers}
        table = [[None] * len(fractions) if at is None else record["mean"][at]["overlap"] for at in rows.values()]
        one = next(group for group in groups if group["kind"] == kind)
        table += [record["mean"][every]["overlap"], groups[every]["chance"], one["chance"]]
        labels = [*rows, "all layers", "chance, all layers", f"chance, layer {one['layer']}"]
        axes = _heat_map(panels[-1][column], table, labels if column == 0 else [], fractions, colours, page)
        axes.axhline(len(rows) - 0.5, color=page.ink, linewidth=0.8)
        axes.set_title(f"{kind}, mean of {len(pairs)} pairs" if several else kind, fontsize=9, color=page.ink)
        axes.set_xlabel("fraction of the units that is kept", fontsize=8)
    title = "overlap of the units that are kept" + ("" if several else f": {names[0]} and {names[1]}")
    figure.suptitle(title, fontsize=10, color=page.ink, x=0.01, ha="left")
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), colours), ax=panels.ravel().tolist(), location="bottom", shrink=0.6, aspect=45
    )
    bar.set_label("units that both keep, of those that either keeps (Jaccard)", fontsize=8, color=page.ink)
    bar.ax.tick_params(labelsize=8, colors=page.ink)
    bar.outline.set_edgecolor(page.faint)
    return _write(path, figure)


def teaching_picture(record: Record, *, dark: bool = False) -> bytes:
    """A picture, as PNG, of how a student learned: its metric on dev, its zeros and its losses, over the steps.

    Args:
        record: As from `teach_model`.
        dark: Whether it is for a dark page.
    """
    page, exams, primary = DARK if dark else LIGHT, record["exams"], record["exams"][0]["evaluation"]["primary"]
    steps, best = [exam["step"] for exam in exams], exams[record["best"]]
    sparse = best["sparsity"] is not None
    figure = _figure(7.2, 4.6 + 1.6 * sparse, page)
    panels = [_axes(axes, page) for axes in figure.subplots(2 + sparse, 1, sharex=True)]
    metric, losses = panels[0], panels[-1]
    style = {"linewidth": 1.8, "markersize": 6, "markeredgecolor": page.ink, "markeredgewidth": 0.6}
    values = [100 * exam["evaluation"]["metrics"][primary] for exam in exams]
    metric.plot(steps, values, "o-", color=COLOURS[0], label="student", **style)
    taken = {"color": "none", "markeredgecolor": page.ink, "markeredgewidth": 1.6}
    metric.plot(best["step"], values[record["best"]], "o", markersize=13, label="the one that is kept", **taken)
    teacher = 100 * record["results"]["teacher"]["dev"]["metrics"][primary]
    metric.axhline(teacher, color=page.ink, linewidth=1.1, label="teacher")
    metric.set_ylabel(f"{primary} on dev, %")
    if sparse:
        zeros = [100 * exam["sparsity"] for exam in exams]
        panels[1].plot(steps, zeros, "s-", color=COLOURS[1], **style)
        panels[1].set_ylabel("zeros, %")
        panels[1].set_ylim(0, 104)
    for i, name in enumerate(exams[0]["losses"]):
        own = [exam["losses"][name] for exam in exams]
        look = {"color": COLOURS[i + 2], "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i + 2]}
        losses.plot(steps, own, label=name, **look, **style)
    if all(value > 0 for exam in exams for value in exam["losses"].values()):
        losses.set_yscale("log")
    losses.set_ylabel("losses on dev")
    losses.set_xlabel("step")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=page.faint, linewidth=0.4, alpha=0.6)
    for axes in (metric, losses):
        legend = axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3)
        for text in legend.get_texts():
            text.set_color(page.ink)
    rows = exams[0]["evaluation"]["n"]
    metric.set_title(f"{_plain(record['task'])}, dev, n = {rows:,}", fontsize=11, loc="left", color=page.ink)
    return _drawn(figure, "png")


def _heat_map(
    axes: Any,
    table: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    colours: Any,
    page: Page,
) -> Any:
    """Draws numbers in [0, 1] as coloured cells that say them; None stays empty."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    _axes(axes, page)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            face = "none" if value is None else colours(value)
            axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=face, edgecolor=page.faint, lw=0.4))
            if value is not None:
                red, green, blue = to_rgb(face)
                ink = "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.46 else "white"  # luminance, BT.709
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns, rotation=30 * (max(map(len, columns)) > 6), ha="center")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return axes


def _figure(width: float, height: float, page: Page) -> Any:
    """An empty figure, in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor=page.background)
    FigureCanvasAgg(figure)
    return figure


def _axes(axes: Any, page: Page) -> Any:
    axes.set_facecolor(page.background)
    axes.tick_params(colors=page.ink)
    axes.xaxis.label.set_color(page.ink)
    axes.yaxis.label.set_color(page.ink)
    for spine in axes.spines.values():
        spine.set_color(page.ink)
    return axes


def check_picture(path: Path) -> None:
    """Refuses a format that cannot be written.

    Raises:
        ValueError: If the ending of the name is not a format's.
    """
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise ValueError(f"{path} must end with .{' or .'.join(FORMATS)}: the ending names the picture's format.")


def _write(path: Path, figure: Any) -> Path:
    """Saves a figure in one step."""
    check_picture(path)
    return write_atomic(path, _drawn(figure, path.suffix.lower().lstrip(".")))


def _drawn(figure: Any, kind: str) -> bytes:
    """The figure as a file; the same figure gives the same bytes."""
    import matplotlib as mpl

    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "jaxprune"}):
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()


def _plain(text: str) -> str:
    """A name as it is: dollar signs do not begin a formula, and what cannot be printed is left out."""
    return "".join(letter for letter in text if letter.isprintable()).replace("$", r"\$")


def _of(counts: Sequence[int]) -> str:
    kept, had = counts
    return f"{kept:,}" if kept == had else f"{kept:,} of {had:,}"

"""Plots of results, for light and for dark pages: records go in, as the commands print them with `--json`.

A picture is a `.png` or a `.svg`, by the ending of its name; another ending is a ValueError. Lines differ in colour,
marker and dashes, so that they can be told apart without colours as well.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from jaxprune.checkpoints.files import write_atomic
from jaxprune.cli.render.tables import Record, by_budget, units_left
from jaxprune.evaluation import scale_of

# Okabe and Ito, Color Universal Design, 2008: told apart with every kind of colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
MARKERS = "osD^vPX*<ph"
DASHES = ("-", (0, (6, 2)), (0, (3, 1, 1, 1)), (0, (1, 1)))
SCORES_MAP = "cividis"  # evenly brighter from blue to yellow, for every kind of colour vision
FORMATS = ("png", "svg")
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left",
    "axes.titlesize": 11, "figure.dpi": 120, "grid.alpha": 0.6, "grid.linewidth": 0.4, "legend.fontsize": 8,
    "legend.frameon": False, "legend.handlelength": 3.5, "legend.title_fontsize": 8, "lines.linewidth": 1.8,
    "lines.markeredgewidth": 0.6, "lines.markersize": 6, "svg.hashsalt": "jaxprune",
}  # fmt: skip


class Page(NamedTuple):
    """The colours of a page."""

    background: str
    ink: str
    faint: str  # what is not there


LIGHT = Page("#ffffff", "#1a1a1a", "#b0b0b0")
DARK = Page("#14171c", "#e8e8e8", "#6a6f78")


def check_picture(path: Path) -> None:
    """Refuses a format that cannot be written."""
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise ValueError(f"{path} must end with .{' or .'.join(FORMATS)}: the ending names the picture's format.")


@contextlib.contextmanager
def _drawing(
    to: Path | io.BytesIO, width: float, height: float, rows: int = 1, columns: int = 1, *, dark: bool, **grid: Any
) -> Iterator[tuple[Any, Any, Page]]:
    """A figure, in inches, with its panels `[rows, columns]`; written in the end, the same figure to the same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if isinstance(to, Path):
        check_picture(to)
    page, kind = DARK if dark else LIGHT, to.suffix.lower().lstrip(".") if isinstance(to, Path) else "png"
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "lines.markeredgecolor")
    colours: dict[Any, Any] = dict.fromkeys(ink, page.ink) | dict.fromkeys(
        ("figure.facecolor", "axes.facecolor"), page.background
    )
    with mpl.rc_context({**STYLE, **colours, "grid.color": page.faint}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)  # needs no display
        yield figure, figure.subplots(rows, columns, squeeze=False, **grid), page
        content = io.BytesIO()
        figure.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else None)
    if isinstance(to, Path):
        write_atomic(to, content.getvalue())
    else:
        to.write(content.getvalue())


def _draw_line(
    axes: Any, number: int, x: Sequence[float], values: Sequence[Sequence[float]], label: str, scale: float = 100
) -> None:
    """The means of some values, and a band from the smallest to the largest, both in percent."""
    colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
    scaled = [[scale * value for value in each] for each in values]
    marker = MARKERS[number % len(MARKERS)]
    axes.plot(x, list(map(mean, scaled)), color=colour, linestyle=dashes, marker=marker, label=label)
    axes.fill_between(x, list(map(min, scaled)), list(map(max, scaled)), color=colour, alpha=0.22, linewidth=0)


def _draw_level(axes: Any, page: Page, value: float, label: str, *, dashed: bool = False, scale: float = 100) -> None:
    """A level to compare with, in percent."""
    axes.axhline(scale * value, color=page.ink, linewidth=1.1, linestyle=(0, (5, 4)) if dashed else "-", label=label)


def _draw_scale(figure: Any, panels: Any, colours: Any, most: float, label: str) -> None:
    """The meaning of the colours, from 0 to the most."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0, most), colours)
    bar = figure.colorbar(scale, ax=panels.ravel().tolist(), location="bottom", shrink=0.55, aspect=45)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _list_layers(axes: Any, names: Sequence[str], title: str) -> None:
    """Prepares a panel that has a row for every layer, the first on top."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)


def _draw_heads(axes: Any, page: Page, layers: Sequence[Sequence[float]], colours: Any) -> int:
    """A cell for every head by its rank in [0, 1], empty where it is NaN; returns the most heads of a layer."""
    from matplotlib.patches import Rectangle

    for y, ranks in enumerate(layers):
        for x, rank in enumerate(ranks):
            gone = rank != rank
            face, edge = ("none", page.faint) if gone else (colours(float(rank)), page.ink)
            axes.add_patch(Rectangle((x - 0.4, y - 0.36), 0.8, 0.72, lw=0.7, facecolor=face, edgecolor=edge))
    return max(map(len, layers), default=0)


def comparison_figure(
    path: Path, rows: Sequence[Record], variants: Sequence[str], units: Mapping[str, Mapping[str, Any]], *, title: str
) -> None:
    """Writes a picture: bars per task and variant, and the heads (or groups) and neurons that stay in every layer.

    The rows are those of `comparison_table`; a layer has gates `[units]` by their kind.
    """
    heads = next((kind for gates in units.values() for kind in gates if kind != "neurons"), "heads")
    width = 0.8 / len(variants)
    with _drawing(path, 11, 4.6, columns=2, width_ratios=(3, 1), dark=False) as (_, panels, page):
        bars, grid = panels[0]
        for i, name in enumerate(variants):
            values = [100 * row["values"][name] for row in rows]
            places = [place + (i - (len(variants) - 1) / 2) * width for place in range(len(rows))]
            drawn = bars.bar(places, values, width, label=name, color=COLOURS[i], edgecolor="white", linewidth=0.5)
            bars.bar_label(drawn, fmt="%.0f", fontsize=7, padding=1)
        for place, row in enumerate(rows):
            chance, label = 100 * row["chance"], None if place else "chance"
            bars.hlines(chance, place - 0.45, place + 0.45, page.ink, "dashed", label=label, linewidth=1.2)
        names = [f"{_plain(row['task'])}\n{row['metric']}, n = {row['n']}" for row in rows]
        bars.set_xticks(range(len(rows)), names, fontsize=8)
        bars.set_ylabel("primary metric, %")
        bars.set_ylim(0, 108)
        bars.set_yticks(range(0, 101, 20))
        bars.set_title(title, fontsize=10)
        bars.legend(ncols=len(variants) + 1, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        _list_layers(grid, [f"layer {_plain(layer)}" for layer in units], "what attribution keeps")
        open_heads = [[1.0 if gate else float("nan") for gate in gates.get(heads, ())] for gates in units.values()]
        most = _draw_heads(grid, page, open_heads, lambda _: COLOURS[0])
        for y, gates in enumerate(units.values()):
            neurons = gates.get("neurons", ())
            left, had = sum(gate > 0 for gate in neurons), len(neurons)
            grid.text(most, y, f"{left:,} of {had:,}", va="center", fontsize=8)
        grid.set_xlim(-0.7, most + 5.2)
        grid.set_xticks([(most - 1) / 2, most + 2], [heads, "neurons"])


def sweep_figure(path: Path, rows: Sequence[Record], *, split: str, dark: bool = False) -> None:
    """Writes a picture of a sweep's rows of one task: its metric over the FLOPs that stay, a line per criterion.

    A line is the mean over the seeds, the band around it reaches from the smallest to the largest value.
    """
    first, seeds = rows[0], max(row["seed"] for row in rows) + 1
    scale, title = scale_of(first["metric"])
    with _drawing(path, 7.2, 4.8, dark=dark) as (figure, panels, page):
        axes = panels[0, 0]
        for i, name in enumerate(dict.fromkeys(row["criterion"] for row in rows)):
            groups = by_budget(row for row in rows if row["criterion"] == name)
            x = [100 * mean(row["flops_kept"] for row in group) for group in groups]
            _draw_line(axes, i, x, [[row["value"] for row in group] for group in groups], name, scale)
        _draw_level(axes, page, first["dense"], "dense", scale=scale)
        _draw_level(axes, page, first["chance"], "chance", dashed=True, scale=scale)
        axes.set_xlabel("FLOPs kept, % of the dense model's layers")
        axes.set_ylabel(title)
        axes.set_title(f"{_plain(first['task'])}, {split}, n = {first['n']:,}")
        axes.grid(axis="y")
        spread = "one seed" if seeds == 1 else f"lines: mean over {seeds} seeds, bands: smallest to largest"
        figure.legend(loc="outside lower center", ncols=4, title=spread)


def deletion_figure(path: Path, record: Record, *, dark: bool = False) -> None:
    """Writes a picture of the deletion check: quality over the units that are deleted, in three kinds of order."""
    facts = record["checks"][-1]["facts"]
    x = [0.0, *(100 * fraction for fraction in facts["fractions"])]
    scale, title = scale_of(facts["metric"])
    with _drawing(path, 7.2, 4.8, dark=dark) as (figure, panels, page):
        axes = panels[0, 0]
        for i, label in enumerate(("lowest first", "random", "highest first")):
            curves = [[facts["dense"], *values] for name, values in facts["curves"].items() if name.startswith(label)]
            _draw_line(axes, i, x, list(zip(*curves, strict=True)), label, scale)
        _draw_level(axes, page, facts["chance"], "chance", dashed=True, scale=scale)
        axes.set_xlabel("units deleted, % of every site")
        axes.set_ylabel(title)
        axes.set_title(f"{_plain(record['task'])}, {facts['split']}, n = {facts['examples']:,}")
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=4)


def inspection_figure(path: Path, record: Record, units: Mapping[str, Sequence[Any]], *, dark: bool = False) -> None:
    """Writes a picture of a model's units: per layer a cell for every head or group, and a strip for every other kind.

    Cells and strips are empty where units were removed. With scores, colours tell the rank of a unit among all of its
    kind in the model, and a strip is sorted by it. `units`: for every kind, per layer an array `[units it had]`, NaN
    where a unit was removed, else its rank in [0, 1].
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    layers, scored, cells = record["layers"], record["scores"] is not None, next(iter(units))
    strips = [kind for kind in units if kind != cells]
    colours = mpl.colormaps[SCORES_MAP] if scored else ListedColormap([COLOURS[4]])
    size, ratios = (4.8 + 4.8 * len(strips), 1.5 + 0.32 * len(layers)), (1, *[1.6] * len(strips))
    with _drawing(path, *size, columns=1 + len(strips), dark=dark, width_ratios=ratios) as (figure, panels, page):
        heads, *others = panels[0]
        _list_layers(heads, [f"layer {layer['layer']}" for layer in layers], cells)
        most = _draw_heads(heads, page, units[cells], colours)
        heads.set_xlim(-0.6, most + 2.2)
        for y, layer in enumerate(layers):
            heads.text(most, y, units_left(layer[cells], " of "), va="center", fontsize=8)
        for axes, kind in zip(others, strips, strict=True):
            _list_layers(axes, [""] * len(layers), kind.replace("_", " ") + ", best first" * scored)
            widest = max(map(len, units[kind]), default=0) or 1
            for y, (ranks, layer) in enumerate(zip(units[kind], layers, strict=True)):
                left = np.sort(np.asarray(ranks, float)[~np.isnan(ranks)])[::-1]
                if len(left):
                    place = (0, len(left), y + 0.36, y - 0.36)
                    axes.imshow(left[None], extent=place, aspect="auto", cmap=colours, vmin=0, vmax=1)
                if len(ranks):
                    axes.add_patch(Rectangle((0, y - 0.36), len(ranks), 0.72, fill=False, edgecolor=page.faint, lw=0.7))
                axes.text(1.02 * widest, y, units_left(layer[kind], " of "), va="center", fontsize=8)
            axes.set_xlim(-0.01 * widest, 1.3 * widest)
            axes.set_ylim(len(layers) - 0.4, -0.6)
        figure.suptitle(_plain(record["source"]), fontsize=10, x=0.01, ha="left")
        if scored:
            label = "score: rank among all units of the kind, % (100: needed most)"
            _draw_scale(figure, panels, colours, 100, label)
        else:
            figure.supxlabel("filled: stays; empty: removed", fontsize=8)


def overlap_figure(path: Path, record: Record, *, dark: bool = False) -> None:
    """Writes a heat map of a comparison: overlap of kept units by layer and fraction, heads and neurons apart.

    Of more than two tasks it has one of tasks x tasks above, at the fraction in the middle; layers then show the mean
    over the pairs. Every cell shows its number, and the overlap by chance stands below.
    """
    groups, pairs, files = record["groups"], record["pairs"], [file["name"] for file in record["files"]]
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    layers = list(dict.fromkeys(group["layer"] for group in groups if group["layer"] is not None))
    places = {(group["layer"], group["kind"]): i for i, group in enumerate(groups)}
    names, fractions = list(map(_plain, files)), [f"{fraction:g}" for fraction in record["fractions"]]
    middle, several = len(fractions) // 2, len(pairs) > 1
    tall = [0.9 + 0.42 * len(names)] * several + [0.9 + 0.3 * (len(layers) + 3)]
    wide = max(3.4, 1.0 + 0.6 * max(len(names) * several, len(fractions)))
    size = 0.9 + wide * len(kinds), 1.1 + sum(tall)
    with _drawing(path, *size, len(tall), len(kinds), dark=dark, height_ratios=tall) as (figure, panels, page):
        for column, kind in enumerate(kinds):
            every = places[None, kind]
            if several:
                table: list[list[float | None]] = [[None] * len(names) for _ in names]
                for pair in pairs:
                    i, j = map(files.index, pair["names"])
                    table[i][j] = table[j][i] = pair["groups"][every]["overlap"][middle]
                level = groups[every]["chance"][middle]
                title = f"{kind}, {fractions[middle]} kept" + ("" if level is None else f" (chance {level:.2f})")
                _heat_map(panels[0][column], page, table, [] if column else names, names, title)
            rows = {layer if " " in layer else f"layer {layer}": places.get((layer, kind)) for layer in layers}
            table = [[None] * len(fractions) if at is None else record["mean"][at]["overlap"] for at in rows.values()]
            one = next(group for group in groups if group["kind"] == kind)
            table += [record["mean"][every]["overlap"], groups[every]["chance"], one["chance"]]
            labels = [*rows, "all layers", "chance, all layers", f"chance, layer {one['layer']}"]
            title = f"{kind}, mean of {len(pairs)} pairs" if several else kind
            _heat_map(panels[-1][column], page, table, [] if column else labels, fractions, title)
            panels[-1][column].axhline(len(rows) - 0.5, color=page.ink, linewidth=0.8)
            panels[-1][column].set_xlabel("fraction of the units that is kept", fontsize=8)
        title = "overlap of the units that are kept" + ("" if several else f": {names[0]} and {names[1]}")
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        label = "units that both keep, of those that either keeps (Jaccard)"
        _draw_scale(figure, panels, SCORES_MAP, 1, label)


def _heat_map(
    axes: Any,
    page: Page,
    table: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> None:
    """Draws numbers in [0, 1] as coloured cells that show them; None stays empty."""
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    for y, row in enumerate(table):
        for x, value in enumerate(row):
            face: Any = "none" if value is None else mpl.colormaps[SCORES_MAP](value)
            axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=face, edgecolor=page.faint, lw=0.4))
            if value is not None:
                red, green, blue, _ = face
                ink = "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.46 else "white"  # luminance, BT.709
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    _list_layers(axes, [""] * len(table), title)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xticks(range(len(columns)), columns, rotation=30 * (max(map(len, columns)) > 6), ha="center")
    axes.set_yticks(range(len(rows)), rows)


def training_picture(record: Record, *, dark: bool = False) -> bytes:
    """A picture, as PNG, of how a student learned: its metric on dev, its zeros and its losses, over the steps."""
    evaluations, best = record["exams"], record["exams"][record["best"]]
    primary, sparse, content = best["evaluation"]["primary"], best["sparsity"] is not None, io.BytesIO()
    steps = [each["step"] for each in evaluations]
    values = [each["evaluation"]["metrics"][primary] for each in evaluations]
    with _drawing(content, 7.2, 4.6 + 1.6 * sparse, 2 + sparse, dark=dark, sharex=True) as (_, panels, page):
        metric, losses = panels[0, 0], panels[-1, 0]
        _draw_line(metric, 0, steps, [[value] for value in values], "student")
        ring = {"color": "none", "markeredgewidth": 1.6, "markersize": 13}
        metric.plot(best["step"], 100 * values[record["best"]], "o", label="the one that is kept", **ring)
        _draw_level(metric, page, record["results"]["teacher"]["dev"]["metrics"][primary], "teacher")
        metric.set_ylabel(f"{primary} on dev, %")
        metric.set_title(f"{_plain(record['task'])}, dev, n = {best['evaluation']['n']:,}")
        if sparse:
            _draw_line(panels[1, 0], 1, steps, [[each["sparsity"]] for each in evaluations], "zeros")
            panels[1, 0].set_ylabel("zeros, %")
            panels[1, 0].set_ylim(0, 104)
        for i, name in enumerate(best["losses"]):
            look = {"color": COLOURS[i + 2], "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i + 2]}
            losses.plot(steps, [each["losses"][name] for each in evaluations], label=name, **look)
        if all(value > 0 for each in evaluations for value in each["losses"].values()):
            losses.set_yscale("log")
        losses.set_ylabel("losses on dev")
        losses.set_xlabel("step")
        for axes in panels.flat:
            axes.grid(axis="y")
        for axes in (metric, losses):
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return content.getvalue()


def _plain(text: str) -> str:
    """A name as it is: dollar signs do not begin a formula, and what cannot be printed is left out."""
    return "".join(letter for letter in text if letter.isprintable()).replace("$", r"\$")

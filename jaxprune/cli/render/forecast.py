"""Tables and notes on what a budget would do. Nothing is computed here: records of plain values go in."""

from __future__ import annotations

from textwrap import fill

from rich import box
from rich.table import Table

from jaxprune.cli.render.receipt_report import PREDICTED, predicted_by, prediction_note
from jaxprune.cli.render.report import Record, before_after_table, headless_notes, length_text


def plan_tables(record: Record) -> list[Table]:
    """The layers that a budget would leave, and what all of it costs before and after."""
    layers = Table(
        title=f"{record['source']}: what would stay",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE,
        pad_edge=False,
    )
    which = predicted_by(record["prediction"])
    loss = [] if which is None else [f"loss {PREDICTED[which]}"]
    for heading in ("layer", *(kind.replace("_", " ") for kind in record["kinds"]), "score kept", *loss):
        layers.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    for row in record["layers"]:
        if row is record["layers"][-1]:
            layers.add_section()
        units = (f"{kept:,}" if kept == had else f"{kept:,}/{had:,}" for kept, had in map(row.get, record["kinds"]))
        kept = "" if row["score_kept"] is None else f"{100 * row['score_kept']:.1f} %"
        own = record["prediction"] if row is record["layers"][-1] else record["prediction"]["layers"].get(row["layer"])
        lost = [] if which is None else ["" if own is None else f"{own[which]:.4f}"]
        layers.add_row(row["layer"], *units, kept, *lost)
    costs = before_after_table(record)
    if record["latency"] is not None:
        found = record["latency"]["predicted"]
        shape = f"{record['latency']['batch']} x {length_text(record['latency']['length'])}"
        cells = (f"{1e3 * found['before']:,.2f}", f"{1e3 * found['after']:,.2f}", f"{100 * found['ratio']:.1f} %")
        costs.add_section()
        costs.add_row(f"predicted ms, {shape}", *cells, f"{1 / found['ratio']:.2f} x")
    return [layers, costs]


def plan_notes(record: Record) -> list[str]:
    """What the figures of `plan_tables` mean, and the steps of the latency table."""
    notes = [
        "x/y: x of the y units would stay. Score kept: of the sum of all scores above zero.",
        prediction_note(record),
    ]
    if record["latency"] is None:
        notes.append("There is no latency table of this model, batch and length yet: --latency measures one.")
    else:
        table = record["latency"]["table"]
        notes.append(f"Latency: by a table measured on {record['latency']['device']}.")
        if table["wholes"]:
            predicted, measured = (f"{1e3 * table['wholes'][-1][name]:.2f} ms" for name in ("predicted", "measured"))
            notes.append(f"Of a model of other widths it says {predicted}; measured: {measured}.")
        for row in table["rows"]:
            steps = ", ".join(
                f"{width}: {1e3 * seconds:.3g}" for width, seconds in zip(row["widths"], row["seconds"], strict=True)
            )
            notes.append(f"{row['sites'][0]} and {len(row['sites']) - 1} more, ms by width: {steps}.")
    return [*(fill(note, 80, subsequent_indent="  ") for note in notes), *headless_notes(record)]

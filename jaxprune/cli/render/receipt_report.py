"""What a pruning lost of the objective, predicted and true, as a table for the terminal and for the model card."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from rich.table import Table

from jaxprune.cli.render.report import Record, new_table

PREDICTED = {"estimate": "predicted", "at_most": "at most"}  # what a prediction has -> its column


def receipts_of(record: Record) -> Sequence[Record]:
    """The receipts of a pruning for one or several tasks, or none."""
    return record.get("receipts") or ([record["receipt"]] if record.get("receipt") else [])


def receipt_table(receipt: Record) -> Table:
    """What was predicted to be lost, and what was lost, layer by layer."""
    title = f"{receipt['task']}: {_loss(receipt)} lost, mean of {receipt['examples']:,} examples"
    table = new_table(title)
    table.min_width = min(len(title) + 2, 80)
    headings, *rows = receipt_rows(receipt)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        table.add_row(*row)
    return table


def receipt_rows(receipt: Record) -> list[tuple[str, ...]]:
    """The headings, a row per layer, and one of all: predicted if there is a prediction, and lost.

    The layers' losses sum to what the nodes found, the last row is what was lost.
    """
    found = receipt["prediction"]
    which = predicted_by(found)
    totals = {name: lost for name, lost in receipt["layers"].items()} | {"all": receipt["lost"]}
    rows: list[tuple[str, ...]] = [("layer", "lost")] if which is None else [("layer", PREDICTED[which], "lost")]
    for name, lost in totals.items():
        own = found if name == "all" else found["layers"].get(name, {})
        rows.append((name, _amount(lost)) if which is None else (name, _amount(own.get(which)), _amount(lost)))
    return rows


def receipt_notes(receipt: Record) -> list[str]:
    """What the figures of a receipt mean, how exact they are, and what selecting again has changed."""
    notes = [
        prediction_note(receipt),
        f"Lost: by integrated gradients, {receipt['nodes']} nodes from the selected gates to open ones; the layers sum "
        f"to {_amount(receipt['found'])}, and miss an example's loss by {receipt['error']:.2g} (mean). Before any "
        "recovery.",
    ]
    if rounds := receipt["rounds"]:
        steps = ", ".join(f"{_amount(own['lost'])} ({own['changed']:,})" for own in rounds[1:]) or "the same again"
        chosen = "the first selection stays" if receipt["best"] == 0 else f"re-selection {receipt['best']} is kept"
        notes.append(
            f"Selected again at the same budget: lost {_amount(rounds[0]['lost'])}, then {steps} (units that changed "
            f"places); {chosen}. The same rows choose and tell, so other rows may lose more."
        )
    return [fill(note, 80, subsequent_indent="  ") for note in notes]


def prediction_note(record: Record) -> str:
    """What a prediction is, or why there is none.

    Args:
        record: With `objective` and `prediction`, as a receipt has them.
    """
    found = record["prediction"]
    which = predicted_by(found)
    if which is None:
        return f"No prediction of the loss: {found['meaning']}."
    if which == "at_most":
        text = f"At most: sums of sizes over the removed units, of {_loss(record)}; {found['meaning']}."
    else:
        text = f"Predicted: {_loss(record)}, summed over the removed units; {found['meaning']}."
        text += "" if found["at_most"] is None else f" Their sizes sum to {_amount(found['at_most'])}."
    whole = found["everything"]
    return text + ("" if whole is None else f" All scored units together lose {_amount(whole)}.")


def predicted_by(prediction: Record) -> str | None:
    """Which of its numbers a prediction is shown by: its estimate, else what bounds it; None if it has none."""
    return next((name for name in PREDICTED if prediction[name] is not None), None)


def _loss(record: Record) -> str:
    return str(record["objective"]).replace("_", " ")


def _amount(value: float | None) -> str:
    """An amount of the objective."""
    return "" if value is None else f"{value:.4f}"

"""Tables and notes on students and their teachers. Nothing is measured here: records of plain values go in."""

from __future__ import annotations

from textwrap import fill

from rich.table import Table

from jaxprune.cli.render.report import Record, new_table

LOSSES = {  # a loss of `Distillation` in words
    "attention": "attention scores",
    "embeddings": "embeddings",
    "hidden": "hidden states",
    "logits": "logits",
    "labels": "labels",
}

STUDENT = ("teacher", "student", "kept")  # columns


def exam_line(exam: Record) -> str:
    """One evaluation on dev, in a line."""
    sparse = "" if exam["sparsity"] is None else f"{100 * exam['sparsity']:.1f} % zero, "
    losses = ", ".join(f"{LOSSES[name]} {value:.3g}" for name, value in exam["losses"].items())
    return f"step {exam['step']:,}: {sparse}dev {_metrics(exam['evaluation'])}; losses: {losses}"


def exams_table(record: Record) -> Table:
    """All evaluations on dev, the one that is kept marked."""
    table = new_table(f"{record['task']}, dev: quality and losses on the way")
    losses = list(record["exams"][0]["losses"])
    primary = record["exams"][0]["evaluation"]["primary"]
    for heading in ("step", "zero, %", f"{primary}, %", *losses, ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, exam in enumerate(record["exams"]):
        sparse = "" if exam["sparsity"] is None else f"{100 * exam['sparsity']:.1f}"
        metric = f"{100 * exam['evaluation']['metrics'][primary]:.1f}"
        own = (f"{exam['losses'][name]:.3g}" for name in losses)
        table.add_row(f"{exam['step']:,}", sparse, metric, *own, "kept" if index == record["best"] else "")
    return table


def student_table(record: Record) -> Table:
    """The teacher beside the student: quality on dev and test, weights and how many of them are not zero."""
    table = new_table(f"{record['task']}: {record['steps']:,} steps")
    for heading in ("", *STUDENT):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for section in student_sections(record):
        for row in section:
            table.add_row(*row)
        table.add_section()
    return table


def student_sections(record: Record) -> list[list[list[str]]]:
    """The rows of `student_table`: quality, then weights."""
    quality, weights = [], []
    teacher, student = (record["results"][who] for who in ("teacher", "student"))
    for split, own in teacher.items():
        quality.append([f"{split}, {own['n']:,} examples", "", "", ""])
        for name, value in own["metrics"].items():
            other = student[split]["metrics"][name]
            kept = f"{100 * other / value:.1f} %" if value > 0 else ""
            quality.append([f"  {name}, %", f"{100 * value:.1f}", f"{100 * other:.1f}", kept])
    before, after = (record["weights"][who] for who in ("teacher", "student"))
    for name, title in {"linear_maps": "weights of linear maps", "parameters": "all parameters"}.items():
        weights.append([title, f"{before[name]:,}", f"{after[name]:,}", _share(after[name], before[name])])
        left = f"{name}_not_zero"
        weights.append(["  not zero", f"{before[left]:,}", f"{after[left]:,}", _share(after[left], before[left])])
    return [quality, weights]


def student_note(record: Record) -> str:
    """What the figures of `student_table` mean."""
    exam = record["exams"][record["best"]]
    note = f"Kept: the parameters after step {exam['step']:,}, the best on dev"
    if record["thinning"] is not None:
        note += f" of those after the last pruning, at step {record['thinning']['steps'][-1]:,}"
    note += ". Linear maps: the kernels of attention and FFN. "
    stored = record["stored"]
    if stored["packed"] is None:
        note += "Zeros take no room in a packed file (jaxprune pack)."
    else:
        note += "Zeros take no room in the file."
    rounded = [*(["int8"] if stored["packed"] == "int8" else []), *({stored["dtype"]} - {"float32"})]
    if rounded:
        note += f" The student's figures are those after rounding to {' and '.join(rounded)}."
    return fill(note, 80, subsequent_indent="  ")


def augmentation_table(record: Record) -> Table:
    """How many rows there were and are, and the first row with its first copies."""
    table = new_table(
        f"{record['task']}: {record['train_rows']:,} train rows, {record['sizes']['train']:,} with copies"
    )
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for number, example in enumerate(record["examples"]):
        texts = [str(value) for name, value in example.items() if name != "label"]
        table.add_row(f"copy {number}" if number else "a row", "\n".join(texts))
    return table


def _metrics(evaluation: Record) -> str:
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in evaluation["metrics"].items())


def _share(after: int, before: int) -> str:
    return f"{100 * after / before:.1f} %" if before else ""

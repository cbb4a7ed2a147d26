"""Tables and notes on results, for the terminal and the model card: plain records go in, 80 columns come out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import mean, median
from textwrap import fill
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from jaxprune.evaluation import scale_of, shown

Record = Mapping[str, Any]

BEFORE_AFTER = ("before", "after", "kept", "speed-up")
EXPORTED = {  # kinds of units whose numbers a configuration of other programs holds
    "heads": "attention heads",
    "groups": "key-value heads",
    "query_heads": "query heads of each",
    "neurons": "neurons",
}
STUDENT = ("teacher", "student", "kept")
LOSSES = {  # of a distillation, in words
    "attention": "attention scores",
    "embeddings": "embeddings",
    "hidden": "hidden states",
    "logits": "logits",
    "labels": "labels",
}
PREDICTED = {"estimate": "predicted", "at_most": "at most"}  # what a prediction has -> its column


# what all of them share


def make_table(
    title: str | None,
    headings: Sequence[str],
    *sections: Iterable[Sequence[str | Text]],
    words: Collection[int] = (0,),
    tight: bool = False,
) -> Table:
    """A table of sections of rows; the columns in `words` hold text that may wrap, all others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    table.show_header, table.padding = any(headings), (0, 1, 0, 0) if tight else (0, 1)
    for i, heading in enumerate(headings):
        text = i in words
        table.add_column(heading, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for rows in sections:
        table.add_section()
        for row in rows:
            table.add_row(*row)
    return table


def note(*sentences: str) -> str:
    """Sentences in lines of 80 columns."""
    return fill(" ".join(sentence for sentence in sentences if sentence), 80, subsequent_indent="  ")


def listed(names: Sequence[str]) -> str:
    """`a`, `b` and `c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "default" if value is None else str(value)


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:{form}}"


def percent(ratio: float | None, unit: str = " %") -> str:
    """A ratio in percent, or nothing."""
    return "" if ratio is None else f"{100 * ratio:.1f}{unit}"


def times(ratio: float | None) -> str:
    """A speed-up, or nothing."""
    return "" if ratio is None else f"{ratio:.2f} x"


def milliseconds(seconds: float) -> str:
    """A time in milliseconds."""
    return f"{1e3 * seconds:,.2f}"


def units_left(counts: Sequence[int], of: str = "/") -> str:
    """Units that stay, of those before if some were removed."""
    left, had = counts
    return f"{left:,}" if left == had else f"{left:,}{of}{had:,}"


def length_text(length: float | Sequence[float]) -> str:
    """A length in words: `128 tokens`, or `128 + 4 tokens` of those read and those written."""
    return " + ".join(f"{tokens:.4g}" for tokens in (length if isinstance(length, Sequence) else [length])) + " tokens"


def metrics_text(metrics: Record, unit: str = "") -> str:
    """Metrics in a line, shares in percent."""
    return ", ".join(
        f"{name} {shown(name, value)}{unit * scale_of(name)[1].endswith('%')}" for name, value in metrics.items()
    )


# score


def scores_table(record: Record) -> Table:
    """A scoring run: task, rows, criterion, completeness."""
    criterion, prompt, completeness = dict(record["criterion"]), record.get("prompt"), record["completeness"]
    rows = [("task", record["task"] if prompt else f"{record['task']}, task head {record['head']}")]
    if prompt:
        rows += [("prompt", prompt["template"])] if prompt["words"] else []
        rows += [("  words", plain(prompt["words"]))] if prompt["words"] else [("read in", prompt["name"] or "choices")]
        rows += [("  calibration", prompt["calibration"])] if "calibration" in prompt else []
    if record["examples"]:
        rows += [
            ("examples", f"{record['examples']:,} of split {record['split']}"),
            ("mean length", length_text(record["mean_length"])),
        ]
    else:
        rows.append(("examples", "none needed"))
    rows.append(("criterion", criterion.pop("name")))
    rows += [(f"  {name}", plain(value)) for name, value in criterion.items()]
    if completeness:
        share = "" if completeness["relative"] is None else f" ({100 * completeness['relative']:.2g} %)"
        error = f"error {completeness['error']:.2g} of {completeness['size']:.2g}{share}, means over the examples"
        rows.append(("completeness", error))
    rows.append(("scores", f"{record['units']:,} units at {record['sites']} sites"))
    return make_table(f"scores of {record['source']}", ("", ""), rows, words=(0, 1))


def stability_tables(record: Record) -> list[Table | str]:
    """The stability of scores, and the number of examples that would be enough.

    If that is not known, one line says why; nothing is said if no example was read.
    """
    stability = record["stability"]
    if stability is None:
        why = "the largest of the examples decides" if record["largest"] else "there are too few examples"
        return [f"Stability: not known, {why}."] if record["examples"] else []
    rows = []
    for kind, values in stability["kinds"].items():
        overlap = map(number, values["overlap"])
        rows.append(
            (kind, number(values["spearman"]), number(values["reliability"]), number(values["needed"], ","), *overlap)
        )
        rows.append(("  chance", "", "", "", *map(number, values["chance"])))
    headings = ("", "between\nhalves", "second\nrun", f"examples\nfor {stability['target']:g}")
    fractions = (f"kept at\n{fraction:g}" for fraction in stability["fractions"])
    one, other = stability["halves"]
    meaning = note(
        f"between halves: Spearman's rank correlation of the scores of {one} and of {other} examples within a site, "
        f"mean over the sites. second run: the estimated correlation of all {one + other} with as many others. "
        "kept at: units that both halves keep, of those that either keeps (Jaccard)."
    )
    return [make_table("stability", (*headings, *fractions), rows), meaning, note(_enough(record, stability))]


def _enough(record: Record, stability: Record) -> str:
    """A verdict: enough examples, or the number of those missing."""
    examples, target, reached = stability["examples"], stability["target"], stability["reliability"]
    if stability["needed"] is None:
        more = " The halves do not agree at all, so the number needed is unknown."
    else:
        missing = stability["needed"] - examples
        more = f" About {missing:,} more are needed for {target:g}." if missing > 0 else ""
    until = record.get("until_stable")
    if until is not None and reached is not None:
        begin = f"Stopped after {examples:,} of" if examples < until["most"] else "Scored all"
        verdict = "reaches" if until["reached"] else "is below"
        return f"{begin} {until['most']:,} examples: {reached:.3f} {verdict} {target:g}.{more}"
    if reached is not None and reached >= target:
        return f"Stable: {reached:.3f} reaches {target:g}."
    return f"Not stable at {target:g} with {examples:,} examples.{more}"


# check


def check_tables(record: Record) -> list[Table | str]:
    """The checks with their verdicts and rules, and the quality while units are deleted."""
    styles = {"pass": "green", "fail": "bold red"}
    rows = [
        (
            check["name"],
            Text(check["verdict"], style=styles.get(check["verdict"], "")),
            number(check["value"], ".3g"),
            _compared_with(check),
        )
        for check in record["checks"]
    ]
    title = f"checks of {record['scores']}: {record['criterion']['name']}, {record['task']}"
    rules = dict.fromkeys(f"{check['name'].split()[0]}: {check['rule']}." for check in record["checks"])
    facts = record["checks"][-1]["facts"]
    random = [values for name, values in facts["curves"].items() if name.startswith("random")]
    curves = {name: facts["curves"][name] for name in ("lowest first", "highest first")}
    curves[f"random, mean of {len(random)}"] = [mean(values) for values in zip(*random, strict=True)]
    deleted = make_table(
        f"{scale_of(facts['metric'])[1]}, of {facts['examples']:,} {facts['split']} rows with units deleted",
        ("deleted", *(f"{100 * fraction:.0f} %" for fraction in facts["fractions"])),
        [(name, *(shown(facts["metric"], value) for value in values)) for name, values in curves.items()],
        tight=True,
    )
    checks = make_table(title, ("check", "verdict", "value", "compared with"), rows, words=(0, 1, 3))
    checks.columns[0].no_wrap = True
    return [checks, *map(note, rules), deleted]


def _compared_with(check: Record) -> str:
    """The figures to compare the value of a check with."""
    facts = check["facts"]
    if not facts:
        return ""
    if "curves" in facts:
        return (
            f"random {facts['random']:.3g} (up to {facts['random_reaches']:.3g}), highest first "
            f"{facts['areas']['highest first']:.3g}, dense {facts['dense']:.3g}, chance {facts['chance']:.3g}"
        )
    if "interval" in facts:
        interval = facts["interval"]
        between = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}; "
        return f"{between}{facts['units']} units of {facts['sites']} sites, {facts['examples']} examples"
    return f"error {facts['error']:.2g} of {facts['size']:.2g}"


# compare


def overlap_tables(record: Record) -> list[Table]:
    """The agreement of tasks: a row per pair if there are several, then a row per layer."""
    groups, pairs, fractions = record["groups"], record["pairs"], record["fractions"]
    layers = list(dict.fromkeys(group["layer"] for group in groups))
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    places = {(group["layer"], group["kind"]): i for i, group in enumerate(groups)}
    nothing = {"spearman": None, "overlap": [None] * len(fractions)}
    chance = [{"spearman": None, "overlap": group["chance"]} for group in groups]
    columns = [text for kind in kinds for text in (f"{kind}\nranks", *(f"\n{fraction:g}" for fraction in fractions))]

    def row(name: str, results: Sequence[Record], layer: str | None) -> tuple[str, ...]:
        chosen = [results[places[layer, kind]] if (layer, kind) in places else nothing for kind in kinds]
        return name, *(number(value) for each in chosen for value in (each["spearman"], *each["overlap"]))

    tables = []
    if len(pairs) > 1:
        each = [row(", ".join(pair["names"]), pair["groups"], None) for pair in pairs]
        together = [row("mean", record["mean"], None), row("chance", chance, None)]
        tables.append(make_table("all layers", ("tasks", *columns), each, together, tight=True))
    title = ", ".join(pairs[0]["names"]) if len(pairs) == 1 else f"mean of {len(pairs)} pairs"
    by_layer = [row(layer, record["mean"], layer) for layer in layers if layer is not None]
    last = [
        row("all", record["mean"], None),
        row("chance, all", chance, None),
        row(f"chance, layer {layers[0]}", chance, layers[0]),
    ]
    return [*tables, make_table(title, ("layer", *columns), by_layer, last, tight=True)]


def overlap_note(record: Record) -> str:
    """The meaning of the figures in `overlap_tables`."""
    shown = ", ".join(f"{fraction:g}" for fraction in record["fractions"])
    return note(
        f"ranks: Spearman's rank correlation of the scores. {shown}: where this fraction of the units stays, the units "
        "that both tasks keep, of those that either keeps (Jaccard). chance: the same of random choices."
    )


# prune


def before_after_table(record: Record) -> Table:
    """A model before and after pruning: quality, counts, FLOPs, file size and latency, with ratios and speed-ups."""
    table = make_table(None, ("", *BEFORE_AFTER), *before_after_sections(record))
    table.columns[0].no_wrap = True
    return table


def before_after_sections(record: Record) -> list[list[tuple[str, ...]]]:
    """The rows of the comparison, in groups: a title, then the cells of `BEFORE_AFTER`."""
    before, after, ratios = record["before"], record["after"], record["kept"]
    sections = [_evaluation_rows(*pair) for pair in zip(*map(_evaluations, (before, after)), strict=True)]

    def row(title: str, name: str, form: str = ",.2f", unit: float = 1e6, speedup: str = "") -> tuple[str, ...]:
        return title, *(f"{costs[name] / unit:{form}}" for costs in (before, after)), percent(ratios.get(name)), speedup

    kinds = listed([kind.replace("_", " ") for kind in record.get("kinds", ("heads", "neurons"))])
    counts = {
        "units": f"units: {kinds}",
        "prunable_parameters": "parameters of units",
        "parameters": "parameters, all",
    }
    rows = [row(title, name, ",.0f", 1) for name, title in counts.items()]
    speedup = times(record["speedup"]["theoretical"])
    rows.append(row(f"MFLOPs, {length_text(before['length'])}", "flops", ",.1f", speedup=speedup))
    sizes = {"memory": "weights in memory, MB", "file_bytes": "weights on disk, MB"}
    rows += [row("cache, kB per token", "cache", unit=1e3)] if before.get("cache") else []
    sections.append(rows + [row(title, name) for name, title in sizes.items() if before.get(name)])
    for old, new in zip(before.get("latency", ()), after.get("latency", ()), strict=True):
        medians, late = ([milliseconds(latency[name]) for latency in (old, new)] for name in ("median", "p95"))
        shape = f"latency, ms, {old['batch']} x {length_text(old['length'])}"
        sections.append([(shape, *medians, "", times(new["speedup"])), ("  95th percentile", *late, "", "")])
    return sections


def _evaluations(costs: Record) -> Sequence[Record]:
    """The results of a model on one or several tasks, or none."""
    return costs.get("evaluations") or [costs[name] for name in ("evaluation",) if name in costs]


def _evaluation_rows(before: Record, after: Record) -> list[tuple[str, ...]]:
    """A heading, then one row per metric; chance beside the first, which is the one to report."""
    rows = [(f"{before['task']}, {before['n']:,} {before['split']} examples", "", "", "", "")]
    for name, value in before["metrics"].items():
        chance = f" (chance {shown(name, before['chance'])})" if len(rows) == 1 else ""
        small = after["metrics"][name]
        rows.append((f"{scale_of(name)[1]}{chance}", shown(name, value), shown(name, small), "", ""))
    return rows


def before_after_notes(record: Record) -> list[str]:
    """The meaning of the figures in `before_after_table`."""
    before, notes = record["before"], []
    never = "" if record.get("vocabulary") else " Embeddings are never pruned."
    notes.append(f"FLOPs: matrix products of the layers, for one example.{never}")
    if before.get("latency"):
        device = before["latency"][0]["device"]
        notes.append(
            f"Latency: median over alternating passes on {device}, no padding. Speed-ups: by FLOPs, and measured."
        )
    if rounds := record.get("rounds"):
        left = listed([f"{each['units']:,}" for each in rounds])
        when = "each" if rounds[-1]["recovery"] else "the last"
        repaired = f", and repaired after {when}" if record.get("recovery") else ""
        notes.append(f"{len(rounds)} rounds left {left} units; the rest was scored again before the next{repaired}.")
    if record.get("recovery"):
        notes.append(_recovery(record["recovery"]))
    if words := record.get("vocabulary"):
        notes.append(
            f"Vocabulary: {words['after']:,} of {words['before']:,} tokens stay, which are "
            f"{percent(words['covered'])} of those in the tasks' rows, test aside. Of {words['tested']:,} test rows "
            f"{percent(words['as_before'])} are split as before; unknown tokens: {percent(words['unknown']['before'])} "
            f"before, {percent(words['unknown']['after'])} after."
        )
    if record.get("latency_budget"):
        notes.append(_latency_budget(record["latency_budget"]))
    return list(map(note, notes))


def _recovery(recovery: Record) -> str:
    """The method of a repair, and how much nearer the modules came to the dense ones."""
    errors = ([module[when] for module in recovery["modules"].values()] for when in ("before", "after"))
    before, after = (percent(median(values)) for values in errors)
    return (
        f"{recovery['method']['name']} with {recovery['examples']:,} examples, without labels: on held-out rows, the "
        f"squared error of the modules' sums fell from {before} to {after} of their spread (medians)."
    )


def _latency_budget(budget: Record) -> str:
    """A budget of latency: asked, predicted and measured."""
    asked, predicted, measured = budget["asked"], budget["predicted"], budget["measured"]
    amount = percent(asked["latency"]) if "latency" in asked else f"{milliseconds(asked['latency_seconds'])} ms"
    return (
        f"Latency budget, {budget['batch']} x {length_text(budget['length'])}: {amount} asked; "
        f"{milliseconds(predicted['after'])} ms predicted, {percent(predicted['ratio'])}; "
        f"{milliseconds(measured['after'])} ms measured, {percent(measured['ratio'])}, by the quickest pass of each, "
        f"{percent(measured['median_ratio'])} by medians. {len(budget['tries'])} selections were measured, and the "
        "nearest was taken."
    )


def headless_notes(record: Record) -> list[str]:
    """The attentions that a selection leaves without a head, if there are any."""
    gone = [
        name.rpartition(".")[0]
        for name, (had, left) in record["widths"].items()
        if name.endswith((".heads", ".groups")) and had and not left
    ]
    if not gone:
        return []
    where = f"{gone[0]} and {len(gone) - 1} more" if len(gone) > 1 else gone[0]
    return [
        note(
            f"No head stays in {where}: tokens no longer see each other there. --floor heads=1 (of decoders groups=1) "
            "keeps one in each."
        )
    ]


# what a pruning lost of the objective


def loss_reports(record: Record) -> Sequence[Record]:
    """The loss reports of a pruning for one or several tasks, or none."""
    return record.get("receipts") or ([record["receipt"]] if record.get("receipt") else [])


def loss_table(report: Record) -> Table:
    """The loss, predicted and true, layer by layer."""
    title = f"{report['task']}: {_objective(report)} lost, mean of {report['examples']:,} examples"
    headings, *rows, last = loss_rows(report)
    table = make_table(title, headings, rows, [last])
    table.min_width = min(len(title) + 2, 80)
    return table


def loss_rows(report: Record) -> list[tuple[str, ...]]:
    """The headings, a row per layer, and one of all: predicted if there is a prediction, and lost.

    The layers' losses sum to what the nodes found, the last row is what was lost.
    """
    prediction = report["prediction"]
    shown = predicted_by(prediction)
    rows: list[tuple[str, ...]] = [("layer", "lost") if shown is None else ("layer", PREDICTED[shown], "lost")]
    for name, lost in {**report["layers"], "all": report["lost"]}.items():
        layer = prediction if name == "all" else prediction["layers"].get(name, {})
        predicted = () if shown is None else (number(layer.get(shown), ".4f"),)
        rows.append((name, *predicted, number(lost, ".4f")))
    return rows


def loss_notes(report: Record) -> list[str]:
    """The meaning of the figures, and their precision."""
    notes = [
        prediction_note(report),
        f"Lost: by integrated gradients, {report['nodes']} nodes from the selected gates to open ones; the layers sum "
        f"to {report['found']:.4f}, and miss an example's loss by {report['error']:.2g} (mean). Before any recovery.",
    ]
    if report.get("truncated"):
        notes.append(f"Of {report['examples']:,} texts {report['truncated']:,} are cut: --max-length reaches further.")
    return list(map(note, notes))


def prediction_note(record: Record) -> str:
    """The meaning of the `prediction` in a record, or why there is none."""
    prediction = record["prediction"]
    shown = predicted_by(prediction)
    if shown is None:
        return f"No prediction of the loss: {prediction['meaning']}."
    if shown == "at_most":
        text = f"At most: sums of sizes over the removed units, of {_objective(record)}; {prediction['meaning']}."
    else:
        text = f"Predicted: {_objective(record)}, summed over the removed units; {prediction['meaning']}."
        if prediction["at_most"] is not None:
            text += f" Their sizes sum to {prediction['at_most']:.4f}."
    whole = prediction["everything"]
    return text if whole is None else f"{text} All scored units together lose {whole:.4f}."


def predicted_by(prediction: Record) -> str | None:
    """The number that a prediction is shown by: its estimate, else what bounds it; None if it has none."""
    return next((name for name in PREDICTED if prediction[name] is not None), None)


def _objective(record: Record) -> str:
    return str(record["objective"]).replace("_", " ")


# plan


def plan_tables(record: Record) -> list[Table]:
    """The layers that a budget would leave, and what all of it costs before and after."""
    prediction, latency = record["prediction"], record["latency"]
    shown = predicted_by(prediction)
    rows = []
    for row in record["layers"]:
        units = (units_left(row[kind]) for kind in record["kinds"])
        layer = prediction if row is record["layers"][-1] else prediction["layers"].get(row["layer"], {})
        lost = [] if shown is None else [number(layer.get(shown), ".4f")]
        rows.append((row["layer"], *units, percent(row["score_kept"]), *lost))
    headings = ["layer", *(kind.replace("_", " ") for kind in record["kinds"]), "score kept"]
    headings += [] if shown is None else [f"loss {PREDICTED[shown]}"]
    layers = make_table(f"{record['source']}: what would stay", headings, rows[:-1], rows[-1:])
    costs = before_after_table(record)
    if latency is not None:
        predicted = latency["predicted"]
        cells = milliseconds(predicted["before"]), milliseconds(predicted["after"]), percent(predicted["ratio"])
        costs.add_section()
        shape = f"{latency['batch']} x {length_text(latency['length'])}"
        costs.add_row(f"predicted ms, {shape}", *cells, times(1 / predicted["ratio"]))
    return [layers, costs]


def plan_notes(record: Record) -> list[str]:
    """The meaning of the figures in `plan_tables`, and the steps of the latency table."""
    notes = [
        "x/y: x of the y units would stay. Score kept: of the sum of all scores above zero.",
        prediction_note(record),
    ]
    if record.get("measures"):
        notes.append(
            "All layers keep about the same share here; prune --task measures how wide each should be, at equal cost."
        )
    if record["latency"] is None:
        notes.append("There is no latency table of this model, batch and length yet: --latency measures one.")
    else:
        table = record["latency"]["table"]
        notes.append(f"Latency: by a table measured on {record['latency']['device']}.")
        if table["wholes"]:
            predicted, measured = (milliseconds(table["wholes"][-1][name]) for name in ("predicted", "measured"))
            notes.append(f"For a model of other widths it predicts {predicted} ms; measured: {measured} ms.")
        for row in table["rows"]:
            steps = (f"{width}: {1e3 * time:.3g}" for width, time in zip(row["widths"], row["seconds"], strict=True))
            notes.append(f"{row['sites'][0]} and {len(row['sites']) - 1} more, ms by width: {', '.join(steps)}.")
    return [*map(note, notes), *headless_notes(record)]


# evaluate, sweep, demo


def evaluation_table(results: Sequence[Record], title: str | None = None) -> Table:
    """The metrics of a model on one or several tasks, in percent."""
    rows = [
        (
            result["task"],
            f"{result['split']}{', written' if result.get('generated') else ''}",
            f"{result['n']:,}" + (f" ({result['truncated']:,} cut)" if result["truncated"] else ""),
            metrics_text(result["metrics"]),
            shown(result["primary"], result["chance"]),
        )
        for result in results
    ]
    return make_table(title, ("task", "split", "examples", "metrics, %", "chance"), rows, words=(0, 1, 3))


def sweep_tables(record: Record) -> list[Table]:
    """A table per task: the primary metric by criterion and budget, mean and extremes over the seeds."""
    tables = []
    for task in record["settings"]["tasks"]:
        rows = [row for row in record["rows"] if row["task"] == task]
        sections = []
        for name in dict.fromkeys(row["criterion"] for row in rows):
            section = []
            for same in by_budget(row for row in rows if row["criterion"] == name):
                values = [row["value"] for row in same]
                left = (percent(mean(row[which] for row in same)) for which in ("flops_kept", "units_kept"))
                metrics = (shown(same[0]["metric"], value) for value in (mean(values), min(values), max(values)))
                section.append(("" if section else name, *left, str(len(same)), *metrics))
            sections.append(section)
        first = rows[0]
        dense, chance = (f"{name} {shown(first['metric'], first[name])}" for name in ("dense", "chance"))
        title = f"{task}: {scale_of(first['metric'])[1]}; {dense}, {chance}, n = {first['n']:,}"
        headings = ("criterion", "FLOPs kept", "units kept", "seeds", "mean", "least", "most")
        tables.append(make_table(title, headings, *sections))
    return tables


def sweep_note(record: Record) -> str:
    """The split that was tested, and the use of the figures."""
    split = record["settings"]["split"]
    use = {"test": "to report; choices belong to dev.", "dev": "to choose by; report on test."}
    return note(f"Tested on split {split}: {use.get(split, 'rows that train or score.')}")


def by_budget(rows: Iterable[Record]) -> list[list[Record]]:
    """The rows of a sweep by their budget of FLOPs, in the order in which the budgets occur."""
    groups: dict[float, list[Record]] = {}
    for row in rows:
        groups.setdefault(row["flops"], []).append(row)
    return list(groups.values())


def comparison_table(rows: Sequence[Record], variants: Sequence[str], chosen: str) -> Table:
    """Primary metrics in percent: one row per task, the chosen one first, and one column per variant of the model."""
    sections: tuple[list, list] = [], []
    for row in rows:
        values = (*(row["values"][name] for name in variants), row["chance"])
        cells = (row["task"], f"{row['n']:,}", *(shown(row["metric"], value) for value in values))
        sections[row["task"] != chosen].append([Text(cell, "bold" if row["task"] == chosen else "") for cell in cells])
    return make_table(None, ("task", "examples", *variants, "chance"), *sections)


# inspect


def inspection_table(record: Record) -> Table:
    """The layers of a model: units of those it had, what they cost, and with scores how these are spread."""
    kinds, scored, sparse = record["kinds"], record["scores"] is not None, record["total"].get("zeros") is not None
    rows = []
    for layer in (*record["layers"], record["total"]):
        cells = [str(layer["layer"]), *(units_left(layer[kind]) for kind in kinds), f"{layer['parameters']:,}"]
        cells += [percent(layer.get("zeros"), "")] * sparse + [percent(layer["flops_share"], "")]
        if scored:
            cells += [*(number(layer["mean_scores"][kind], ".3g") for kind in kinds), percent(layer["score_share"], "")]
        rows.append(cells)
    words = [kind.replace("_", "\n") for kind in kinds]
    headings = ["layer", *words, "parameters", *["zeros\n%"] * sparse, "FLOPs\n%"]
    headings += [*(f"score of\n{word}" for word in words), "scores\n%"] * scored
    title = f"{record['source']}: {record['model_type']}"
    table = make_table(title, headings, rows[:-1], rows[-1:], tight=True)
    table.columns[0].no_wrap = True
    return table


def inspection_note(record: Record) -> str:
    """The meaning of the figures in `inspection_table`."""
    parts = [
        f"Task heads: {', '.join(record['heads']) or 'none'}.",
        f"Parameters and FLOPs of the units, {length_text(record['length'])}.",
    ]
    if record.get("cache"):
        parts.append(f"Cache: {record['cache']:,} bytes per token.")
    if record["total"].get("zeros") is not None:
        parts.append("Zeros: in the kernels of attention and FFN; they are counted as parameters and FLOPs.")
    if record["tasks"]:
        parts.append(f"Dense. Gates of {', '.join(record['tasks'])}: FOLDER#TASK is the model of one.")
    if record["pruned"] is not None:
        parts.append("x/y: x of the y units before pruning stay.")
    if record["scores"] is not None:
        parts.append("Scores: means over the units that stay, and shares of the sum of their sizes.")
    return note(*parts)


# share, pack


def share_table(record: Record) -> Table:
    """The tasks that were written into a shared folder: what each keeps, and what its gates take."""
    rows = []
    for row in record["tasks"]:
        size = f"{row['gates_bytes']:,}" + (f" + {row['means_bytes']:,}" if row["means_bytes"] else "")
        units = f"{row['after']['units']:,}/{row['before']['units']:,}"
        rows.append((row["task"], units, percent(row["kept"]["units"]), percent(row["kept"].get("flops")), size))
    title = f"{record['output']}: {'added' if record['added'] else 'shared'}"
    return make_table(title, ("task", "units kept", "", "FLOPs kept", "bytes of gates"), rows)


def share_note(record: Record) -> str:
    """The meaning of the figures in `share_table`, and the tasks in the folder."""
    means = " + means of closed units" if any(row["means_bytes"] for row in record["tasks"]) else ""
    return note(
        f"Bytes: one bit per unit{means}; all of gates.safetensors, with how the gates were made, takes "
        f"{record['gates_file_bytes']:,} bytes beside {record['weights_file_bytes'] / 1e6:,.2f} MB of weights.",
        f"Tasks in the folder: {', '.join(record['all_tasks'])}.",
    )


def storage_table(record: Record) -> Table:
    """The bytes of a model before and after it was packed."""
    sizes = (f"{record[when]['file'] / 1e6:,.3f}" for when in ("before", "after"))
    rows = [("the weights", *sizes, times(record["ratios"]["file"]))]
    return make_table(f"{record['source']}: {record['values'] or 'dense'}", ("MB", "before", "after", "smaller"), rows)


def storage_note(record: Record) -> str:
    """The share of weights that are not zero."""
    if record["density"] is None:
        return "The model has no layers: nothing can be packed."
    useless = record["values"] == "exact" and record["density"] > 0.99
    return note(
        f"{percent(record['density'])} of the {record['linear_weights']:,} weights in the linear maps (the kernels of "
        "the layers) are not zero.",
        "Without zeros little becomes smaller: --values int8 rounds to a byte per weight." * useless,
    )


# export


def export_table(record: Record) -> Table:
    """The units of every layer before and after it was filled up."""
    rows = []
    for kind, each in record["units"].items():
        written = "each its own" if each["written"] is None else f"{each['written']:,}"
        rows.append((EXPORTED[kind], f"{each['fewest']:,}", f"{each['most']:,}", written, f"{each['filled']:,}"))
    title = f"{record['source']}: {record['class']}, {record['dtype']}"
    return make_table(title, ("in a layer", "fewest", "most", "written", "filled up"), rows)


def export_notes(record: Record) -> list[str]:
    """The cost of filling up, what was left out, where the heads are, and how it was checked."""
    model, written = record["parameters"]["model"], record["parameters"]["written"]
    inside, beside, check = record["heads"]["inside"], record["heads"]["beside"], record["check"]
    return [
        *(
            note(f"A program for {listed(names)}, in {record['dtype']}.")
            for names in [record.get("platforms")]
            if names
        ),
        *(
            note(f"ONNX with operators of version {opset}; weights in {record['dtype']}.")
            for opset in [record.get("opset")]
            if opset
        ),
        note(
            f"{written:,} parameters, {record['file_bytes'] / 1e6:,.2f} MB; the model has {model:,}.",
            "The rest are zeros: other programs need them." * (written > model),
            f"Left out, as they do nothing: {', '.join(record['left_out'])}." * bool(record["left_out"]),
        ),
        *(note(f"Its task head is {name}.") for name in [inside] if name),
        *[note(f"No class of transformers has heads like {', '.join(beside)}: see README.md for their use.")]
        * bool(beside),
        note(
            f"Read back: {check['of']} of random tokens differ by {check['error']:.1e} of the largest"
            + (f" (at most {check['tolerance']:.0e})." if check["tolerance"] else ", as weights were rounded.")
            if check
            else "Not checked."
        ),
        f"Model: {record['output']}",
    ]


# sparsify, distill, augment


def evaluation_line(done: Record) -> str:
    """One evaluation on dev, in a line."""
    sparse = "" if done["sparsity"] is None else f"{percent(done['sparsity'])} zero, "
    losses = ", ".join(f"{LOSSES[name]} {value:.3g}" for name, value in done["losses"].items())
    return f"step {done['step']:,}: {sparse}dev {metrics_text(done['evaluation']['metrics'], ' %')}; losses: {losses}"


def evaluations_table(record: Record) -> Table:
    """All evaluations on dev, the one that is kept marked."""
    evaluations, best = record["exams"], record["exams"][record["best"]]
    losses, primary = list(best["losses"]), best["evaluation"]["primary"]
    rows = [
        (
            f"{each['step']:,}",
            percent(each["sparsity"], ""),
            percent(each["evaluation"]["metrics"][primary], ""),
            *(number(each["losses"][name], ".3g") for name in losses),
            "kept" * (each is best),
        )
        for each in evaluations
    ]
    title = f"{record['task']}, dev: quality and losses during training"
    return make_table(title, ("step", "zero, %", f"{primary}, %", *losses, ""), rows, words=())


def student_table(record: Record) -> Table:
    """The teacher beside the student: quality on dev and test, weights and how many of them are not zero."""
    title = f"{record['task']}: {record['steps']:,} steps"
    return make_table(title, ("", *STUDENT), *student_sections(record))


def student_sections(record: Record) -> list[list[tuple[str, ...]]]:
    """The rows of `student_table`: quality, then weights."""
    quality: list[tuple[str, ...]] = []
    teacher, student = (record["results"][who] for who in ("teacher", "student"))
    for split, result in teacher.items():
        quality.append((f"{split}, {result['n']:,} examples", "", "", ""))
        for name, value in result["metrics"].items():
            other = student[split]["metrics"][name]
            ratio = other / value if value > 0 else None
            quality.append((f"  {name}, %", percent(value, ""), percent(other, ""), percent(ratio)))
    before, after = (record["weights"][who] for who in ("teacher", "student"))
    titles = {
        "linear_maps": "weights of linear maps",
        "linear_maps_not_zero": "  not zero",
        "parameters": "all parameters",
        "parameters_not_zero": "  not zero",
    }
    weights = []
    for name, title in titles.items():
        ratio = after[name] / before[name] if before[name] else None
        weights.append((title, f"{before[name]:,}", f"{after[name]:,}", percent(ratio)))
    return [quality, weights]


def student_note(record: Record) -> str:
    """The meaning of the figures in `student_table`."""
    best, pruning, stored = record["exams"][record["best"]], record["thinning"], record["stored"]
    after = "" if pruning is None else f" of those after the last pruning, at step {pruning['steps'][-1]:,}"
    rounded = ["int8"] * (stored["packed"] == "int8") + [stored["dtype"]] * (stored["dtype"] != "float32")
    return note(
        f"Kept: the parameters after step {best['step']:,}, the best on dev{after}.",
        "Linear maps: the kernels of attention and FFN.",
        "Zeros take no room in " + ("a packed file (jaxprune pack)." if stored["packed"] is None else "the file."),
        f"The student's figures are those after rounding to {' and '.join(rounded)}." if rounded else "",
    )


def augmentation_table(record: Record) -> Table:
    """The number of rows before and after, and the first row with its first copies."""
    rows = []
    for i, example in enumerate(record["examples"]):
        texts = [str(value) for name, value in example.items() if name != "label"]
        rows.append((f"copy {i}" if i else "a row", "\n".join(texts)))
    title = f"{record['task']}: {record['train_rows']:,} train rows, {record['sizes']['train']:,} with copies"
    return make_table(title, ("", ""), rows, words=(0, 1))

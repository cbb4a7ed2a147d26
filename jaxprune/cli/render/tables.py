"""Tables and notes on results, for the terminal and the model card: plain records go in, 80 columns come out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median
from textwrap import fill
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]

BEFORE_AFTER = ("before", "after", "kept", "speed-up")
COUNTS = {  # what a record counts -> its row in the table
    "units": "units: {kinds}",
    "prunable_parameters": "parameters of units",
    "parameters": "parameters, all",
}


def length_text(length: float | Sequence[float]) -> str:
    """A length in words: `128 tokens`, or `128 + 4 tokens` of those read and those written."""
    own = length if isinstance(length, Sequence) else (length,)
    return " + ".join(f"{tokens:.4g}" for tokens in own) + " tokens"


def scores_table(record: Record) -> Table:
    """What was scored, and how."""
    criterion = dict(record["criterion"])
    table = new_table(f"scores of {record['source']}")
    table.show_header = False
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row(
        "task", f"{record['task']}, task head {record['head']}" if not record.get("prompt") else record["task"]
    )
    if record.get("prompt"):
        table.add_row("prompt", record["prompt"]["template"])
        table.add_row("  words", plain(record["prompt"]["words"]))
    examples = f"{record['examples']:,} of split {record['split']}" if record["examples"] else "none are read"
    table.add_row("examples", examples)
    if record["examples"]:
        table.add_row("mean length", length_text(record["mean_length"]))
    table.add_row("criterion", criterion.pop("name"))
    for name, value in criterion.items():
        table.add_row(f"  {name}", plain(value))
    if record["completeness"]:
        table.add_row("completeness", _completeness(record["completeness"]))
    table.add_row("scores", f"{record['units']:,} units at {record['sites']} sites")
    return table


def headless_notes(record: Record) -> list[str]:
    """Which attentions a selection leaves without a head, if there are any."""
    ending = ".heads"
    gone = [
        name.removesuffix(ending)
        for name, (had, kept) in record["widths"].items()
        if name.endswith(ending) and had and not kept
    ]
    if not gone:
        return []
    which = f"{gone[0]} and {len(gone) - 1} more" if len(gone) > 1 else gone[0]
    note = f"No head stays in {which}: tokens no longer see each other there. --floor heads=1 keeps one in each."
    return [fill(note, 80, subsequent_indent="  ")]


def before_after_table(record: Record) -> Table:
    """A model before and after pruning: quality, counts, FLOPs, file size and latency, with ratios and speed-ups."""
    table = new_table(None)
    table.add_column(no_wrap=True)
    for heading in BEFORE_AFTER:
        table.add_column(heading, justify="right", no_wrap=True)
    for section in before_after_sections(record):
        table.add_section()
        for row in section:
            table.add_row(*row)
    return table


def before_after_sections(record: Record) -> list[list[tuple[str, ...]]]:
    """The rows of the comparison, in groups: a title, then the cells of `BEFORE_AFTER`."""
    before, after, kept = record["before"], record["after"], record["kept"]
    sections = []
    for own, other in zip(*map(_evaluations, (before, after)), strict=True):
        sections.append(_evaluation_rows(own, other))
    kinds = listed([kind.replace("_", " ") for kind in record.get("kinds", ("heads", "neurons"))])
    rows = [
        (title.format(kinds=kinds), f"{before[name]:,}", f"{after[name]:,}", _percent(kept.get(name)), "")
        for name, title in COUNTS.items()
    ]
    old, new = (f"{found['flops'] / 1e6:,.1f}" for found in (before, after))
    speedup = _times(record["speedup"]["theoretical"])
    rows.append((f"MFLOPs, {length_text(before['length'])}", old, new, _percent(kept.get("flops")), speedup))
    if before.get("memory"):
        old, new = (f"{found['memory'] / 1e6:,.2f}" for found in (before, after))
        rows.append(("weights in memory, MB", old, new, _percent(kept.get("memory")), ""))
    if before.get("file_bytes"):
        old, new = (f"{found['file_bytes'] / 1e6:,.2f}" for found in (before, after))
        rows.append(("weights on disk, MB", old, new, _percent(kept.get("file_bytes")), ""))
    sections.append(rows)
    for own, other in zip(before.get("latency", ()), after.get("latency", ()), strict=True):
        shape = f"{own['batch']} x {length_text(own['length'])}"
        medians = (_milliseconds(found["median"]) for found in (own, other))
        late = (_milliseconds(found["p95"]) for found in (own, other))
        sections.append(
            [(f"latency, ms, {shape}", *medians, "", _times(other["speedup"])), ("  95th percentile", *late, "", "")]
        )
    return sections


def before_after_notes(record: Record) -> list[str]:
    """What the figures of `before_after_table` mean."""
    before = record["before"]
    notes = [
        "FLOPs: matrix products of the layers, of one example. Embeddings are never pruned, they stay in the file."
    ]
    if before.get("latency"):
        device = before["latency"][0]["device"]
        notes.append(f"Latency: median of passes in turns on {device}, no padding. Speed-ups: by FLOPs, and measured.")
    if record.get("rounds"):
        notes.append(_rounds(record))
    if record.get("recovery"):
        notes.append(_recovery(record["recovery"]))
    if budget := record.get("latency_budget"):
        predicted, found = budget["predicted"], budget["measured"]
        shape = f"{budget['batch']} x {length_text(budget['length'])}"
        notes.append(
            f"Latency budget, {shape}: {_asked(budget['asked'])} asked; "
            f"{_milliseconds(predicted['after'])} ms predicted, {_percent(predicted['ratio'])}; "
            f"{_milliseconds(found['after'])} ms measured, {_percent(found['ratio'])}, by the quickest pass of each, "
            f"{_percent(found['median_ratio'])} by medians. On the way {len(budget['tries'])} selections were "
            "measured, and the nearest was taken."
        )
    return [fill(note, 80, subsequent_indent="  ") for note in notes]


def _rounds(record: Record) -> str:
    """In how many rounds a model was pruned, what each left, and when it was repaired."""
    rounds = record["rounds"]
    left = listed([f"{own['units']:,}" for own in rounds])
    when = "each" if rounds[-1]["recovery"] else "the last"
    repaired = f", and repaired after {when}" if record.get("recovery") else ""
    return f"{len(rounds)} rounds left {left} units; what was left was scored again before the next{repaired}."


def _recovery(found: Record) -> str:
    """How a model was repaired, and how much nearer its modules came to the dense ones."""
    errors = ([own[when] for own in found["modules"].values()] for when in ("before", "after"))
    before, after = (f"{100 * median(own):.1f} %" for own in errors)
    return (
        f"{found['method']['name']} with {found['examples']:,} examples, without labels: on rows held out, the squared "
        f"error of the modules' sums went from {before} of their spread to {after} (medians)."
    )


def _asked(budget: Record) -> str:
    """A budget of latency in words."""
    return _percent(budget["latency"]) if "latency" in budget else f"{_milliseconds(budget['latency_seconds'])} ms"


def evaluation_table(results: Sequence[Record], title: str | None = None) -> Table:
    """How well a model does on one or several tasks, in percent."""
    table = new_table(title)
    table.add_column("task")
    table.add_column("split")
    table.add_column("examples", justify="right")
    table.add_column("metrics, %")
    table.add_column("chance", justify="right")
    for result in results:
        metrics = ", ".join(f"{name} {100 * value:.1f}" for name, value in result["metrics"].items())
        cut = f" ({result['truncated']:,} cut)" if result["truncated"] else ""
        written = ", written" if result.get("generated") else ""
        table.add_row(
            result["task"],
            f"{result['split']}{written}",
            f"{result['n']:,}{cut}",
            metrics,
            f"{100 * result['chance']:.1f}",
        )
    return table


def comparison_table(rows: Sequence[Record], variants: Sequence[str], chosen: str) -> Table:
    """Primary metrics in percent: one row per task, one column per variant of the model."""
    table = new_table(None)
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


def sweep_tables(record: Record) -> list[Table]:
    """A table per task: the primary metric by criterion and budget, mean and extremes over the seeds."""
    tables = []
    for task in record["settings"]["tasks"]:
        rows = [row for row in record["rows"] if row["task"] == task]
        first = rows[0]
        dense, chance = f"dense {100 * first['dense']:.1f}", f"chance {100 * first['chance']:.1f}"
        table = new_table(f"{task}: {first['metric']}, %; {dense}, {chance}, n = {first['n']:,}")
        table.add_column("criterion")
        for heading in ("FLOPs kept", "units kept", "seeds", "mean", "least", "most"):
            table.add_column(heading, justify="right")
        for name in dict.fromkeys(row["criterion"] for row in rows):
            for i, (_, own) in enumerate(by_budget(row for row in rows if row["criterion"] == name)):
                values = [row["value"] for row in own]
                table.add_row(
                    name if i == 0 else "",
                    _percent(mean(row["flops_kept"] for row in own)),
                    _percent(mean(row["units_kept"] for row in own)),
                    str(len(own)),
                    *(f"{100 * value:.1f}" for value in (mean(values), min(values), max(values))),
                )
            table.add_section()
        tables.append(table)
    return tables


def sweep_note(record: Record) -> str:
    """What was tested, and what the figures may be used for."""
    settings = record["settings"]
    use = {"test": "to report; choices belong to dev.", "dev": "to choose by; report on test."}
    return fill(f"Tested on split {settings['split']}: {use.get(settings['split'], 'rows that train or score.')}", 80)


def by_budget(rows: Iterable[Record]) -> list[tuple[float, list[Record]]]:
    """The rows of a sweep by their budget of FLOPs, in the order in which the budgets occur."""
    found: dict[float, list[Record]] = {}
    for row in rows:
        found.setdefault(row["flops"], []).append(row)
    return list(found.items())


def inspection_table(record: Record) -> Table:
    """The layers of a model: units of those it had, what they cost, and with scores how these are spread."""
    scored = record["scores"] is not None
    table = new_table(f"{record['source']}: {record['model_type']}")
    table.padding = (0, 1, 0, 0)
    table.add_column("layer", no_wrap=True)
    kinds: Sequence[str] = record["kinds"]
    words = [kind.replace("_", "\n") for kind in kinds]
    of_scores = (*(f"score of\n{word}" for word in words), "scores\n%")
    sparse = record["total"].get("zeros") is not None
    for heading in (*words, "parameters", *["zeros\n%"] * sparse, "FLOPs\n%", *of_scores * scored):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in (*record["layers"], record["total"]):
        if layer is record["total"]:
            table.add_section()
        zeros = [_share(layer.get("zeros"))] * sparse
        cells = [
            *(_of(layer[kind]) for kind in kinds),
            f"{layer['parameters']:,}",
            *zeros,
            _share(layer["flops_share"]),
        ]
        if scored:
            cells += [*(_small(layer["mean_scores"][kind]) for kind in kinds), _share(layer["score_share"])]
        table.add_row(str(layer["layer"]), *cells)
    return table


def inspection_note(record: Record) -> str:
    """What the figures of `inspection_table` mean."""
    parts = [
        f"Task heads: {', '.join(record['heads']) or 'none'}.",
        f"Parameters and FLOPs of heads and neurons, {length_text(record['length'])}.",
    ]
    if record["total"].get("zeros") is not None:
        parts.append("Zeros: in the kernels of attention and FFN; they are counted as parameters and FLOPs.")
    if record["tasks"]:
        parts.append(f"Dense. Gates of {', '.join(record['tasks'])}: FOLDER#TASK is the model of one.")
    if record["pruned"] is not None:
        parts.append("x/y: x of the y units before pruning stay.")
    if record["scores"] is not None:
        parts.append("Scores: means over the units that stay, and shares of the sum of their sizes.")
    return fill(" ".join(parts), 80)


def share_table(record: Record) -> Table:
    """The tasks of a shared folder that were written: what each keeps, and what its gates take."""
    table = new_table(f"{record['output']}: {'added' if record['added'] else 'shared'}")
    table.add_column("task", overflow="fold")
    for heading in ("units kept", "", "FLOPs kept", "bytes of gates"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in record["tasks"]:
        before, after, kept = row["before"], row["after"], row["kept"]
        size = f"{row['gates_bytes']:,}" + (f" + {row['means_bytes']:,}" if row["means_bytes"] else "")
        units = f"{after['units']:,}/{before['units']:,}"
        table.add_row(row["task"], units, _percent(kept["units"]), _percent(kept.get("flops")), size)
    return table


def share_note(record: Record) -> str:
    """What the figures of `share_table` mean, and how a task is asked for."""
    means = " + means of closed units" if any(row["means_bytes"] for row in record["tasks"]) else ""
    return fill(
        f"Bytes: one bit per unit{means}; all of gates.safetensors, with how the gates were made, "
        f"{record['gates_file_bytes']:,} bytes beside {record['weights_file_bytes'] / 1e6:,.2f} MB of weights. "
        f"Tasks in the folder: {', '.join(record['all_tasks'])}.",
        80,
    )


def overlap_tables(record: Record) -> list[Table]:
    """How far tasks need the same units: a row per pair if there are several, then a row per layer."""
    groups, pairs = record["groups"], record["pairs"]
    layers = list(dict.fromkeys(group["layer"] for group in groups))
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    found = dict(zip(((group["layer"], group["kind"]) for group in groups), range(len(groups)), strict=True))
    nothing = {"spearman": None, "overlap": [None] * len(record["fractions"])}

    def table(title: str, first: str) -> Table:
        made = new_table(title)
        made.padding = (0, 1, 0, 0)
        made.add_column(first, overflow="fold")
        for kind in kinds:
            for heading in (f"{kind}\nranks", *(f"\n{fraction:g}" for fraction in record["fractions"])):
                made.add_column(heading, justify="right", no_wrap=True)
        return made

    def cells(own: Sequence[Record], layer: str | None) -> list[str]:
        chosen = [own[found[layer, kind]] if (layer, kind) in found else nothing for kind in kinds]
        return [_two(value) for each in chosen for value in (each["spearman"], *each["overlap"])]

    chance = [{"spearman": None, "overlap": group["chance"]} for group in groups]
    tables = []
    if len(pairs) > 1:
        tables.append(table("all layers", "tasks"))
        for pair in pairs:
            tables[-1].add_row(", ".join(pair["names"]), *cells(pair["groups"], None))
        tables[-1].add_section()
        tables[-1].add_row("mean", *cells(record["mean"], None))
        tables[-1].add_row("chance", *cells(chance, None))
    title = ", ".join(pairs[0]["names"]) if len(pairs) == 1 else f"mean of {len(pairs)} pairs"
    tables.append(table(title, "layer"))
    for layer in layers:
        if layer is None:
            tables[-1].add_section()
        tables[-1].add_row("all" if layer is None else layer, *cells(record["mean"], layer))
    tables[-1].add_row("chance, all", *cells(chance, None))
    tables[-1].add_row(f"chance, layer {layers[0]}", *cells(chance, layers[0]))
    return tables


def overlap_note(record: Record) -> str:
    """What the figures of `overlap_tables` mean."""
    shown = ", ".join(f"{fraction:g}" for fraction in record["fractions"])
    return fill(
        f"ranks: Spearman's rank correlation of the scores. {shown}: where this fraction of the units stays, the units "
        "that both tasks keep, of those that either keeps (Jaccard). chance: the same of random choices.",
        80,
    )


def new_table(title: str | None) -> Table:
    """An empty table, as all of them look."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False, padding=(0, 1))


def _evaluations(found: Record) -> Sequence[Record]:
    """The results of a model on one or several tasks, or none."""
    return found.get("evaluations") or [found[name] for name in ("evaluation",) if name in found]


def _evaluation_rows(before: Record, after: Record) -> list[tuple[str, ...]]:
    """A heading, then one row per metric; chance beside the first, which is the one to report."""
    rows = [(f"{before['task']}, {before['n']:,} {before['split']} examples", "", "", "", "")]
    for name, value in before["metrics"].items():
        chance = f" (chance {100 * before['chance']:.1f})" if len(rows) == 1 else ""
        rows.append((f"{name}, %{chance}", f"{100 * value:.1f}", f"{100 * after['metrics'][name]:.1f}", "", ""))
    return rows


def storage_table(record: Record) -> Table:
    """The bytes of a model before and after it was packed."""
    table = new_table(f"{record['source']}: {plain(record['values']) if record['values'] else 'dense'}")
    for heading in ("MB", "before", "after", "smaller"):
        table.add_column(heading, justify="left" if heading == "MB" else "right", no_wrap=True)
    for name, title in {"linear_maps": "linear maps of the layers", "file": "the whole file"}.items():
        sizes = (f"{record[when][name] / 1e6:,.3f}" for when in ("before", "after"))
        table.add_row(title, *sizes, _times(record["ratios"][name]))
    return table


def storage_note(record: Record) -> str:
    """What the linear maps are, and how many of their weights are not zero."""
    if record["density"] is None:
        return "The model has no layers: nothing can be packed."
    note = (
        f"{_percent(record['density'])} of the {record['linear_weights']:,} weights in the linear maps (the kernels of "
        "the layers) are not zero."
    )
    if record["values"] == "exact" and record["ratios"]["linear_maps"] <= 1:
        note += " Without zeros nothing becomes smaller: --values int8 rounds to a byte per weight."
    return fill(note, 80)


def listed(names: Sequence[str]) -> str:
    """`a`, `b` and `c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _of(counts: Sequence[int]) -> str:
    kept, had = counts
    return f"{kept:,}" if kept == had else f"{kept:,}/{had:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _completeness(found: Record) -> str:
    share = "" if found["relative"] is None else f" ({100 * found['relative']:.2g} %)"
    return f"error {found['error']:.2g} of {found['size']:.2g}{share}, means over the examples"


def plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "default" if value is None else str(value)


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * ratio:.1f} %"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"


def stability_tables(record: Record) -> list[Table | str]:
    """How far scores would change with other examples: a table, what it means, and what would be enough.

    Args:
        record: As from `score_model`. Of scores without stability only a line says so, or nothing if no example was
            read.
    """
    found = record["stability"]
    if found is None:
        why = "the largest of the examples decides" if record["largest"] else "there are too few examples"
        return [f"Stability: not known, {why}."] if record["examples"] else []
    table = new_table("stability")
    table.add_column("")
    for heading in ("between\nhalves", "second\nrun", f"examples\nfor {found['target']:g}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for fraction in found["fractions"]:
        table.add_column(f"kept at\n{fraction:g}", justify="right", no_wrap=True)
    for kind, own in found["kinds"].items():
        wanted = "" if own["needed"] is None else f"{own['needed']:,}"
        table.add_row(
            kind, _two(own["spearman"]), _two(own["reliability"]), wanted, *(_two(value) for value in own["overlap"])
        )
        table.add_row("  chance", "", "", "", *(_two(value) for value in own["chance"]))
    one, other = found["halves"]
    note = (
        f"between halves: Spearman's rank correlation of the scores of {one} and of {other} examples within a site, "
        f"mean over the sites. second run: the same of all {one + other} and of as many others, estimated. kept at: "
        "units that both halves keep, of those that either keeps (Jaccard)."
    )
    return [table, fill(note, 80), fill(_enough(record, found), 80)]


def _enough(record: Record, found: Mapping[str, Any]) -> str:
    """Whether there are enough examples, or how many more there should be."""
    examples, own = found["examples"], record.get("until_stable")
    target, reached = found["target"], found["reliability"]
    if own is not None and reached is not None:
        how = f"Stopped after {examples:,} of" if examples < own["most"] else "Scored all"
        verdict = "reaches" if own["reached"] else "is below"
        return f"{how} {own['most']:,} examples: {reached:.3f} {verdict} {target:g}.{_more(found)}"
    if reached is not None and reached >= target:
        return f"Stable: {reached:.3f} reaches {target:g}."
    return f"Not stable at {target:g} with {examples:,} examples.{_more(found)}"


def _more(found: Mapping[str, Any]) -> str:
    if found["needed"] is None:
        return " The halves do not agree at all, so no number can be told."
    missing = found["needed"] - found["examples"]
    return f" About {missing:,} more are needed for {found['target']:g}." if missing > 0 else ""


def check_tables(record: Record) -> list[Table | str]:
    """The checks with their verdicts and rules, and the quality while units are deleted.

    Args:
        record: As from `check_model`.
    """
    table = new_table(f"checks of {record['scores']}: {record['criterion']['name']}, {record['task']}")
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("beside", overflow="fold")
    for own in record["checks"]:
        style = {"pass": "green", "fail": "bold red"}.get(own["verdict"])
        value = "" if own["value"] is None else f"{own['value']:.3g}"
        table.add_row(own["name"], Text(own["verdict"], style=style or ""), value, _beside(own))
    rules = dict.fromkeys(f"{own['name'].split()[0]}: {own['rule']}." for own in record["checks"])
    facts = record["checks"][-1]["facts"]
    curves = new_table(f"{facts['metric']}, %, of {facts['examples']:,} {facts['split']} rows with units deleted")
    curves.padding = (0, 1, 0, 0)
    curves.add_column("deleted")
    for fraction in facts["fractions"]:
        curves.add_column(f"{100 * fraction:.0f} %", justify="right", no_wrap=True)
    random = [own for name, own in facts["curves"].items() if name.startswith("random")]
    shown = {name: facts["curves"][name] for name in ("lowest first", "highest first")}
    shown[f"random, mean of {len(random)}"] = [mean(values) for values in zip(*random, strict=True)]
    for name, values in shown.items():
        curves.add_row(name, *(f"{100 * value:.1f}" for value in values))
    return [table, *(fill(rule, 80, subsequent_indent="  ") for rule in rules), curves]


def _beside(own: Record) -> str:
    """What the value of a check is to be read beside."""
    facts = own["facts"]
    if not facts:
        return ""
    if "curves" in facts:
        areas = facts["areas"]
        return (
            f"random {facts['random']:.3g} (up to {facts['random_reaches']:.3g}), highest first "
            f"{areas['highest first']:.3g}, dense {facts['dense']:.3g}, chance {facts['chance']:.3g}"
        )
    if "interval" in facts:
        interval = facts["interval"]
        between = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}; "
        return f"{between}{facts['units']} units of {facts['sites']} sites, {facts['examples']} examples"
    return f"error {facts['error']:.2g} of {facts['size']:.2g}"


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
        weights.append([title, f"{before[name]:,}", f"{after[name]:,}", _remaining(after[name], before[name])])
        left = f"{name}_not_zero"
        weights.append(["  not zero", f"{before[left]:,}", f"{after[left]:,}", _remaining(after[left], before[left])])
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


def _remaining(after: int, before: int) -> str:
    return f"{100 * after / before:.1f} %" if before else ""

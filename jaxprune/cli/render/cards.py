"""The card of a pruned model or a student: its README in Markdown, with what was done and how well it does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from jaxprune.cli.render.tables import (
    BEFORE_AFTER,
    EXPORTED,
    LOSSES,
    STUDENT,
    Record,
    before_after_notes,
    before_after_sections,
    listed,
    loss_notes,
    loss_reports,
    loss_rows,
    plain,
    student_note,
    student_sections,
)

CARD = "README.md"  # in the folder of a model
LEARNED = "training.png"  # in that of a student: how it learned
LOADING = """import jaxprune as jp
from jaxprune.data.splits import Example

model, params = jp.load("FOLDER")
"""
REFUSED = (
    "Load it with jaxprune. transformers refuses this folder, whose `model_type` is `jaxprune`: it does not know these "
    "arrays, and would fill a model of the usual size with random numbers. Other programs find the arrays of `params` "
    "in the safetensors file, under the same names."
)
EXPORT_LOADING = """from transformers import AutoTokenizer, {name}

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = {name}.from_pretrained("FOLDER")
"""
EXPORT_HEADS = """
from safetensors.torch import load_file

batch, heads = tokenizer(["a text"], padding=True, return_tensors="pt"), load_file("FOLDER/heads.safetensors")
mask = batch["attention_mask"][..., None]
pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)  # the mean over the tokens
logits = pooled @ heads["{head}.out.kernel"].to(pooled.dtype) + heads["{head}.out.bias"].to(pooled.dtype)
"""
PREDICTING = """logits = jp.predict(model, params, [Example(text="a text")], head={head})  # [examples, labels]"""
FINDING = """questions = [Example("a question", "its context", answers=())]
texts = jp.find_answers(model, params, questions, head={head})"""
PROMPTING = """prompt = jp.prompts.Prompt(
    template={template},
    words={words},
)
likelihoods = jp.predict(model, params, [Example({texts})], prompt=prompt)  # [examples, labels]"""
RUNNING = """task = jp.windows(model, jp.load_task("your text.txt"))
print(jp.evaluate(model, params, task))"""
CHOOSING = """print(jp.evaluate(model, params, jp.load_task("rows with context, choices and label.jsonl")))"""
WORDS = {  # kinds of units, in a sentence
    "heads": "attention heads",
    "neurons": "neurons",
    "channels": "channels of values",
    "query_channels": "channels of queries and keys",
    "groups": "key-value heads with their query heads",
    "query_heads": "query heads",
}


def model_card(record: Record, *, on_hub: bool) -> str:
    """The README of a pruned model, in Markdown with the front matter of the Hugging Face hub.

    Args:
        record: As `jaxprune prune --json` prints it. Whatever its names hold, they are shown as they are.
        on_hub: Whether the source is a name on the hub, and not a folder.
    """
    tasks = record.get("tasks", [record])
    source, names = _source(record, on_hub), listed([_code(task["task"]) for task in tasks])
    needed = f"the task {names} needs least" if len(tasks) == 1 else f"the tasks {names} together need least"
    rules = {
        name: value for name, value in record["selection"].items() if value not in (None, []) and value is not False
    }
    budget = _code(", ".join(f"{name} {plain(value)}" for name, value in rules.items()))
    widths = [[_code(name), f"{had:,}", f"{left:,}"] for name, (had, left) in record["widths"].items()]
    units = listed([WORDS[kind] for kind in record["kinds"]]).capitalize()
    steps = [
        *(_how_scored(task, len(tasks) > 1) for task in tasks),
        f"- Budget and selection: {budget}.",
        "- `pruning.json` has all settings, the versions, and which units stay.",
    ]
    reports = loss_reports(record)
    return _card(
        _front_matter(record, on_hub, "pruning", "structured-pruning"),
        f"# {source}, pruned for {names}",
        f"{units} that {needed} were cut out of {source} by jaxprune; nothing was trained. {_for_others(tasks)}",
        "## How it was made",
        "\n".join(steps),
        *_rounds(record),
        "## Before and after",
        _markdown(["", *BEFORE_AFTER], [row for section in before_after_sections(record) for row in section]),
        "\n".join(" ".join(note.split()) for note in before_after_notes(record)),
        *(["## What was lost"] if reports else []),
        *(part for report in reports for part in _lost(report)),
        "## Units",
        _markdown(["site", "before", "after"], widths),
        *_use(tasks),
    )


def student_card(record: Record, *, on_hub: bool) -> str:
    """The README of a student, in Markdown with the front matter of the Hugging Face hub.

    Args:
        record: As `jaxprune distill --json` prints it. Whatever its names hold, they are shown as they are.
        on_hub: Whether the student's source is a name on the hub, and not a folder.
    """
    source, teacher = _source(record, on_hub), _code(PurePath(record["teacher"]).name)
    pruning, best = record["thinning"], record["exams"][record["best"]]
    losses = [f"{name} {plain(weight)}" for name, weight in record["settings"].items() if name in LOSSES and weight]
    steps = [
        f"- Student: {source}; teacher: {teacher}; {record['rows']['train']:,} train rows.",
        f"- {record['steps']:,} steps of {record['recipe']['batch_size']} rows, learning rate "
        f"{record['recipe']['learning_rate']:g}; losses and their weights: {_code(', '.join(losses))}.",
    ]
    what = f"It learned by jaxprune to do what its teacher, {teacher}, does."
    if pruning is not None:
        what = f"{100 * best['sparsity']:.1f} % of the weights of its linear maps are zero. {what}"
        steps.append(
            f"- Criterion: {_code(pruning['criterion']['name'])}, pattern {_code(pruning['pattern']['name'])}, "
            f"{len(pruning['steps']):,} prunings until step {pruning['steps'][-1]:,}."
        )
    others = _for_others([record]) if record["prompt"] or len(record["heads"]) > 1 else ""
    return _card(
        _front_matter(record, on_hub, "knowledge-distillation", *(["pruning", "sparse"] if pruning else [])),
        f"# {source}, {'sparse' if pruning else 'distilled'} for {_code(record['task'])}",
        f"{what} {others}".rstrip(),
        "## How it was made",
        "\n".join([*steps, "- `distillation.json` has all settings, and every evaluation during training."]),
        f"![dev metric, zeros and losses over the steps]({LEARNED})",
        "## Teacher and student",
        _markdown(["", *STUDENT], [row for section in student_sections(record) for row in section]),
        _unbroken(" ".join(student_note(record).split())),
        *_use([record]),
    )


def export_card(record: Record, *, on_hub: bool = False) -> str:
    """The README of an export for transformers, in Markdown with the front matter of the Hugging Face hub."""
    source, name, beside = _source(record, on_hub), record["class"], record["heads"]["beside"]
    check, counts = record["check"], record["parameters"]
    rows = [[EXPORTED[kind], *(f"{number:,}" for number in each.values())] for kind, each in record["units"].items()]
    loading = EXPORT_LOADING.format(name=name)
    if beside:
        loading += EXPORT_HEADS.format(head=ascii(beside[0])[1:-1])
    checked = (
        f"Read back, its {check['of']} differed from those of the model by {check['error']:.1e} of the largest."
        if check
        else "It was not compared with the model."
    )
    return _card(
        _front_matter(record, on_hub, "pruning", library="transformers"),
        f"# {source}, for transformers",
        f"{source}, written by jaxprune as a {_code(name)}: it loads without jaxprune. {checked}",
        "## How to load it",
        f"```python\n{loading}\n```",
        "FOLDER is the folder of this file."
        + f" Heads: {', '.join(map(_code, beside))}, as `NAME.out.kernel` and `NAME.out.bias`." * bool(beside),
        "## Units of a layer",
        _markdown(["", "fewest", "most", "written", "filled up"], rows),
        f"{counts['model']:,} parameters, {counts['written']:,} as written: all layers have the same widths here, so "
        "narrower ones were filled up with zeros, which changes nothing that is computed. `export.json` has the rest.",
    )


def _source(record: Record, on_hub: bool) -> str:
    return _code(record["source"] if on_hub else PurePath(record["source"]).name)


def _front_matter(record: Record, on_hub: bool, *tags: str, library: str = "jaxprune") -> str:
    from huggingface_hub import ModelCardData

    base = record["source"] if on_hub else None
    facts = ModelCardData(library_name=library, base_model=base, tags=["jax", *tags, "model-compression"])
    return f"---\n{facts.to_yaml()}\n---"


def _card(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def _use(tasks: Sequence[Record]) -> list[str]:
    """The section of a card on how to load the model, and what the logits of its tasks are."""
    owners = [f" of {_code(task['task'])}" if len(tasks) > 1 else "" for task in tasks]
    options = [f" --task {_word(task['task'])}" for task in tasks]
    return [
        "## How to load it",
        REFUSED,
        f"```python\n{_loading(tasks[0])}\n```",
        *(
            f"Labels{of}, in the order of the logits: {', '.join(map(_code, task['labels']))}."
            for task, of in zip(tasks, owners, strict=True)
        ),
        f"```bash\njaxprune inspect FOLDER\njaxprune evaluate FOLDER{''.join(options)}\n"
        "jaxprune export FOLDER -o PLAIN\n```",
        "FOLDER is the folder of this file; PLAIN will be one that transformers loads by itself.",
    ]


def _how_scored(task: Record, named: bool) -> str:
    """The line of a card on how the scores of a task were made."""
    criterion = dict(task["criterion"])
    settings = ", ".join(
        f"{name} {plain(value)}" for name, value in criterion.items() if name != "name" and value is not None
    )
    examples = f"{task['examples']:,} calibration examples" if task["examples"] else "no example"
    what = f"- Criterion for {_code(task['task'])}" if named else "- Criterion"
    return f"{what}: {_code(criterion['name'])}{f' ({_code(settings)})' if settings else ''}, {examples}."


def _lost(report: Record) -> tuple[str, ...]:
    """The loss of a pruning for one task, predicted and true."""
    headings, *rows = loss_rows(report)
    what = f"Of {_code(report['objective'])} for {_code(report['task'])}, mean of {report['examples']:,} examples:"
    notes = "\n".join(f"- {_unbroken(' '.join(note.split()))}" for note in loss_notes(report))
    return what, _markdown(headings, rows), notes


def _rounds(record: Record) -> list[str]:
    """The section of a card on the rounds, if there were several."""
    rows = [
        [str(each["round"]), plain(each["budget"]), f"{each['units']:,}", _code(each["scores"][:12])]
        for each in record.get("rounds", ())
    ]
    return ["## Rounds", _markdown(["round", "budget", "units left", "digest of the scores"], rows)] if rows else []


def _for_others(tasks: Sequence[Record]) -> str:
    """A warning for those who ask the model for other tasks."""
    one = len(tasks) == 1
    if tasks[0]["prompt"] is not None and not tasks[0]["prompt"]["words"]:
        return "It goes on from texts such as those it was scored on; expect it to do worse with others."
    if tasks[0]["prompt"] is not None:
        what = "this task's prompt" if one else "the prompts of these tasks"
        return f"It answers {what}; expect it to do worse with others."
    heads = listed(list(dict.fromkeys(_code(task["head"]) for task in tasks)))
    which = f"head {heads} is for this task" if one else f"heads {heads} are for these tasks"
    return f"The task {which}; the other task heads are still there, but expect them to do worse."


def _loading(task: Record) -> str:
    prompt = task["prompt"]
    if prompt is None:
        return LOADING + (FINDING if task.get("spans") else PREDICTING).format(head=ascii(task["head"]))
    if not prompt["words"]:
        return LOADING + (RUNNING if prompt["name"].startswith("windows") else CHOOSING)
    texts = 'text="a text", pair="another one"' if "{pair}" in prompt["template"] else 'text="a text"'
    template, words = ascii(prompt["template"]), ascii(tuple(prompt["words"]))
    return LOADING + PROMPTING.format(template=template, words=words, texts=texts)


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: numbers to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, rule, *([cell.strip() for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(_unbroken(cell) for cell in line)} |" for line in lines)


def _unbroken(cell: str) -> str:
    """A cell that neither ends its column nor its row, and holds no markup outside of code."""
    flat = _printable(cell)
    return flat.replace("|", r"\|") if flat.startswith("`") else re.sub(r"([\\`*_<>\[\]&$~|])", r"\\\1", flat)


def _code(text: str) -> str:
    """A name as Markdown code, whatever is in it."""
    flat = _printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", flat)), default=0))
    space = " " if flat[:1] in ("`", "") or flat.endswith("`") else ""
    return f"{fence}{space}{flat}{space}{fence}"


def _printable(text: str) -> str:
    """Without line breaks, control characters and those that turn the direction of writing."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def _word(name: str) -> str:
    """A name that a shell takes as it is, or a placeholder."""
    return name if re.fullmatch(r"\w[\w.-]*", name) else "TASK"

"""Writes the rows of a task with copies of its train rows as a data set, which any command reads."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxprune.checkpoints.files import check_file, folder_for
from jaxprune.checkpoints.folder import digest, load
from jaxprune.cli.workflow import Data, Watch
from jaxprune.data.augmentation import Augmentation, augmented
from jaxprune.data.records import PAIR
from jaxprune.data.splits import Example
from jaxprune.data.tasks import TASKS, Task

RECORD = "augmentation.json"  # beside the rows: how they were made
FILES = {"train": "train", "calibration": "calibration", "dev": "validation", "test": "test"}


def augment_model(
    source: str, data: Data, output: Path, settings: Augmentation, *, overwrite: bool = False, watch: Watch
) -> dict[str, Any]:
    """Writes the rows of a task, with copies of the train rows, as a data set: `OUTPUT/TASK/train.jsonl` and so on.

    A data set that is there already and was made in the same way is left as it is.
    """
    model, params = load(source)
    task = data.load(watch)
    folder = output / task.name
    made = {
        "settings": asdict(settings),
        "embeddings": digest({"embeddings": params["embeddings"]["word"]}),
        "rows": {split: task.digest(split) for split in task.splits},
    }
    record: dict[str, Any] = {"command": "augment", "source": source, "output": str(output), "task": task.name, **made}
    known = folder / RECORD
    if known.is_file() and not overwrite:
        earlier = json.loads(known.read_text())
        if {name: earlier.get(name) for name in made} == made:
            watch.say(f"{folder}: of an earlier run with the same settings")
            return earlier
    if folder.exists() and not (overwrite and known.is_file()):
        hint = "choose another folder, or replace it with --overwrite" if known.is_file() else "it is not replaced"
        raise FileExistsError(f"{folder} exists already, and was not made in this way: {hint}.")
    check_file(known, overwrite)
    bar = watch.open(f"augmenting {task.name}")
    total = len(task.rows("train")) * (1 + settings.copies)
    sizes: dict[str, int] = {}
    with folder_for(folder, overwrite=overwrite) as fresh:
        rows = {split: iter(task.rows(split)) for split in FILES if split != "train"}
        rows["train"] = augmented(model, params, task, settings)
        for split, own in rows.items():
            with (fresh / f"{FILES[split]}.jsonl").open("w", encoding="utf-8") as file:
                count = 0
                for count, example in enumerate(own, 1):
                    file.write(json.dumps(_fields(task, example), ensure_ascii=False) + "\n")
                    if split == "train" and count % 1000 == 0:
                        bar(count, total)
            sizes[split] = count
            if not count:
                (fresh / f"{FILES[split]}.jsonl").unlink()
        bar(total, total, f"{sizes['train']:,} rows")
        record |= {
            "train_rows": len(task.rows("train")),
            "sizes": sizes,
            "examples": _shown(fresh / "train.jsonl", len(task.rows("train"))),
        }
        (fresh / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def _fields(task: Task, example: Example) -> dict[str, Any]:
    """An example as a row of a file that `load_task` reads."""
    texts = (example.text,) if example.pair is None else (example.text, example.pair)
    columns = TASKS[task.name].columns if task.name in TASKS else PAIR if len(texts) == 2 else ("sentence",)
    label = example.label if task.regression else task.labels[int(example.label or 0)]
    return dict(zip(columns, texts, strict=True)) | {"label": label}


def _shown(file: Path, rows: int) -> list[dict[str, Any]]:
    """The first row and the first copies."""
    with file.open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
        copies = itertools.islice(lines, max(0, rows - 1), rows + 2)
        return [first, *map(json.loads, copies)]

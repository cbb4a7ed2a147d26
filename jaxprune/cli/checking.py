"""The `check` command: checks a score file, and draws the curves of deletion."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxprune.checkpoints.folder import load
from jaxprune.cli.render.pictures import check_picture, deletion_figure
from jaxprune.cli.workflow import Data, Watch, check_file
from jaxprune.pruning.checks import FAIL, PASS, UNDECIDED, Checking, check
from jaxprune.scoring.scores import load_scores


def check_model(
    source: str,
    file: Path,
    data: Data,
    checking: Checking,
    *,
    picture: Path | None = None,
    dark: bool = False,
    overwrite: bool = False,
    watch: Watch,
) -> dict[str, Any]:
    """Checks a score file.

    Args:
        source: The model.
        file: The score file.
        data: The task the scores are of.
        checking: How much is measured.
        picture: Where to draw the curves of the deletion, `.png` or `.svg`.
        dark: Whether it is for a dark page.
        overwrite: Whether a picture that is there is replaced.
        watch: Shows the progress.

    Returns:
        The settings, the checks, and their verdict together: fail if one fails, pass if one passes and none fails.
    """
    if picture is not None:
        check_picture(picture)
        check_file(picture, overwrite)
    scores = load_scores(file)
    model, params = load(source)
    task = data.load(watch)
    bars: dict[str, Any] = {}

    def progress(done: int, total: int, note: str) -> None:
        bars[note] = bars.get(note) or watch.open(f"checking {note}")
        bars[note](done, total)

    found = check(model, params, task, scores, checking=checking, progress=progress)
    verdicts = [own.verdict for own in found]
    record = {
        "command": "check",
        "source": source,
        "scores": str(file),
        "task": task.name,
        "criterion": scores.header["criterion"],
        "settings": asdict(checking) | {"fractions": [*checking.fractions]},
        "checks": [own._asdict() for own in found],
        "verdict": FAIL if FAIL in verdicts else PASS if PASS in verdicts else UNDECIDED,
    }
    if picture is not None:
        deletion_figure(picture, record, dark=dark)
        record["picture"] = str(picture)
    return record

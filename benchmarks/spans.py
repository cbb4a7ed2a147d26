"""Answers as spans, pruned and repaired: exact match and F1 on SQuAD's English half of XQuAD.

    python benchmarks/spans.py --start START --data DATA --work WORK -o benchmarks/results/spans.json

`START` is a pre-trained encoder. A head for spans is trained on the English development rows of MLQA, the only ones at
hand that XQuAD does not hold; calibration, dev and test are rows of XQuAD, split by paragraph. The fine-tuned model and
its training state are kept in `WORK`.

Parts, for `--only`:
    dense      the fine-tuned model, on dev and test
    budgets    on test: integrated gradients with and without recovery, several draws, at 0.8 to 0.2 of the FLOPs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from parts import PACKAGES, asked, begun, each, keep

import jaxprune as jp
from jaxprune.checkpoints.tensors import model_digest
from jaxprune.data.batches import usable_rows
from jaxprune.data.tasks import Rows, draw, remove_leaks
from jaxprune.evaluation.evaluate import evaluate
from jaxprune.training.finetuning import FineTuning, finetune
from jaxprune.training.loop import Step

BUDGETS = (0.8, 0.7, 0.5, 0.3, 0.2)  # of the FLOPs
SCORED, RECOVERED = 128, 256  # examples, at most
ENOUGH = 40.0  # F1, in percent: a model below is left out of means over tasks
WAYS: Mapping[str, Any] = {
    "integrated gradients": None,
    "integrated gradients + recovery": jp.recoveries.Reconstruction(),
}


@dataclass
class Setting:
    """The start, the task, and the model that is fine-tuned once."""

    start: Path
    data: Path
    work: Path
    recipe: FineTuning
    draws: int

    def __post_init__(self):
        self.model, self.params = jp.load(self.start)
        self.digest = model_digest(self.model, self.params)
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def task(self) -> jp.Task:
        """XQuAD to score, choose and test on, all of MLQA to train with."""
        tested, trained = (jp.load_task(name, data=self.data) for name in ("squad", "mlqa"))
        rows = tuple(row for split in trained.splits.values() for row in split)
        (whole,), _ = remove_leaks([replace(tested, splits={**tested.splits, "train": rows})])
        return whole

    @cached_property
    def tuned(self) -> tuple[Any, Any]:
        """The model with its head for spans."""
        own = self.recipe
        folder = self.work / f"spans-{own.epochs}-{own.batch_size}-{own.learning_rate:g}-{self.digest[:8]}"
        if not folder.exists():
            state = folder.with_name(folder.name + ".state")
            done = finetune(
                self.model,
                self.params,
                [self.task],
                own,
                state=state,
                progress=_say,
            )
            jp.save(folder, done.model, done.params)
            state.unlink()
        return jp.load(folder)

    def tested(self, params: Any, split: str) -> dict[str, float]:
        """Exact match and F1, in percent."""
        found = evaluate(self.tuned[0], params, self.task, rows=Rows(split=split, max_length=self.recipe.max_length))
        return {name: 100 * value for name, value in found.metrics.items()}


def _say(step: Step) -> None:
    if step.step % 50 == 0:
        print(f"step {step.step:,} of {step.steps:,}, loss {step.loss:.3f}", file=sys.stderr, flush=True)
    if step.evaluation is not None:
        print(f"epoch {step.epoch}: {step.evaluation['results']}", file=sys.stderr, flush=True)


def dense(setting: Setting) -> dict[str, Any]:
    """The fine-tuned model's metrics, and whether they are high enough to count."""
    _, params = setting.tuned
    found = {split: setting.tested(params, split) for split in ("dev", "test")}
    return {
        **found,
        "rows": setting.task.sizes,
        "enough": found["dev"]["f1"] >= ENOUGH,
        "parameters": jp.parameters(params),
    }


def budgets(setting: Setting) -> dict[str, Any]:
    """The metrics at every budget, by draw."""
    model, params = setting.tuned
    length = setting.recipe.max_length
    usable = usable_rows(model, setting.task, Rows(max_length=length))  # without cut-off answers
    task = usable.task
    calibration = task.rows("calibration")
    rows: dict[str, dict[str, Any]] = {name: {} for name in WAYS}
    for seed in range(setting.draws):
        chosen = draw(task, min(SCORED, len(calibration)), seed)
        scores = jp.score(
            model,
            params,
            task,
            jp.Scoring(
                criterion=jp.criteria.IntegratedGradients(), rows=jp.Rows(examples=chosen, key=seed, max_length=length)
            ),
        )
        tokens = usable.encode(chosen).mean_length
        for budget in BUDGETS:
            gates = jp.select(model, params, scores, jp.budgets.Flops(budget, length=tokens))
            small = jp.compact(model, params, gates, scores.means)
            for name, method in WAYS.items():
                made = small
                if method is not None:
                    count = min(RECOVERED, len(calibration))
                    rows_to_fit = jp.Rows(examples=count, key=seed, max_length=length)
                    made, _ = jp.recover(model, params, small, task, jp.Recovery(method=method, rows=rows_to_fit))
                own = rows[name].setdefault(str(budget), {"f1": [], "exact_match": []})
                for metric, value in setting.tested(made, "test").items():
                    own[metric].append(value)
                own["flops"] = jp.flops(model, made, tokens) / jp.flops(model, params, tokens)
                print(f"{budget:g}, draw {seed}, {name}: F1 {own['f1'][-1]:.1f}", file=sys.stderr, flush=True)
    return {"rows": rows, "draws": setting.draws, "scored": SCORED, "recovered": min(RECOVERED, len(calibration))}


PARTS = {"dense": dense, "budgets": budgets}


def main() -> None:
    """Runs what is asked for, in the order of `PARTS`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", type=Path, required=True, help="folder of a pre-trained encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=384, help="tokens of question and context")
    parser.add_argument("--draws", type=int, default=2, help="of the calibration rows")
    arguments, chosen = asked(parser, PARTS)
    recipe = FineTuning(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        max_length=arguments.max_length,
        save_every=50,
    )
    setting = Setting(arguments.start, arguments.data, arguments.work, recipe, arguments.draws)
    found = begun(parser, arguments.output, setting.digest)
    for name in each(chosen):
        facts = {
            "command": "python benchmarks/spans.py --start START --data DATA --work WORK -o OUTPUT "
            f"--epochs {recipe.epochs} --batch-size {recipe.batch_size} --learning-rate {recipe.learning_rate:g} "
            f"--max-length {recipe.max_length} --draws {setting.draws}",
            "model": setting.digest,
            "models": 1,
        }
        keep(arguments.output, found, name, PARTS[name](setting), facts, packages=(*PACKAGES, "optax"))


if __name__ == "__main__":
    main()

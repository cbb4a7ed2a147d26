"""Makes a multi-task language model small for one task: score its units, select, compact; no training.

```
load -> score -> select -> compact -> save
```

Every name is imported on first use, so `import jaxprune` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxprune.bundled import bundled_data, bundled_model, bundled_text_model
    from jaxprune.checkpoints.folder import load, save
    from jaxprune.checkpoints.int8 import densify
    from jaxprune.checkpoints.shared import TaskGates, add_gates, load_gates, save_shared
    from jaxprune.compaction import compact
    from jaxprune.data.augmentation import Augmentation, augment
    from jaxprune.data.prompts import Prompt, prompt_for, read_prompt
    from jaxprune.data.splits import Example
    from jaxprune.data.tasks import Rows, Task, load_task
    from jaxprune.evaluation.evaluate import evaluate, find_answers, predict
    from jaxprune.evaluation.generation import generate
    from jaxprune.models import Model, Output
    from jaxprune.models.cost import flops, parameters
    from jaxprune.pruning import budgets
    from jaxprune.pruning.budgets import Rules
    from jaxprune.pruning.checks import Check, Checking, check
    from jaxprune.pruning.latency import LatencyTable, latency, measure_latency_table
    from jaxprune.pruning.loss import (
        LossReport,
        LossReporting,
        Prediction,
        Reselection,
        loss_report,
        predict_loss,
        reselect,
    )
    from jaxprune.pruning.prune import Pruned, Pruning, Round, Workspace, prune, prune_in_rounds
    from jaxprune.pruning.record import pruning_record
    from jaxprune.pruning.recovery import (
        BiasCompensation,
        Reconstruction,
        Recovery,
        Rescaling,
        recover,
        recover_batches,
    )
    from jaxprune.pruning.selection import select
    from jaxprune.scoring.attribution import GradientActivation, IntegratedGradients, integrate
    from jaxprune.scoring.baselines import (
        Activation,
        Fisher,
        Gradient,
        LeaveOneOut,
        Magnitude,
        Random,
        Taylor,
        TopLayers,
        Wanda,
    )
    from jaxprune.scoring.objectives import log_probability, margin, probability
    from jaxprune.scoring.run import Scoring, score
    from jaxprune.scoring.scores import Scores, load_scores, merge, save_scores
    from jaxprune.scoring.stability import Stability, stability
    from jaxprune.sparse.masks import Sparsity, apply_masks, masks_of, one_shot, sparsity_of
    from jaxprune.sparse.matrices import linear_maps
    from jaxprune.sparse.optimizer import sparse_optimizer
    from jaxprune.sparse.patterns import NM, Block, Unstructured
    from jaxprune.sparse.saliency import WeightFisher, WeightMagnitude, WeightMovement
    from jaxprune.sparse.schedules import Schedule, cubic_schedule, linear_schedule, one_shot_schedule
    from jaxprune.training.distillation import Sparsification, distill, surviving_heads
    from jaxprune.training.finetuning import FineTuning, finetune
    from jaxprune.training.joint_loss import Distillation, initialise_projection, joint_loss, joint_loss_and_gradients
    from jaxprune.training.loop import Training
    from jaxprune.units import Intervention, open_gates

__version__ = "0.1.0"

# Public name -> the module it comes from; the imports above are the same list, for editors and type checkers.
_SOURCES = {
    "Activation": "scoring.baselines",
    "Augmentation": "data.augmentation",
    "BiasCompensation": "pruning.recovery",
    "Block": "sparse.patterns",
    "Check": "pruning.checks",
    "Checking": "pruning.checks",
    "Distillation": "training.joint_loss",
    "Example": "data.splits",
    "FineTuning": "training.finetuning",
    "Fisher": "scoring.baselines",
    "Gradient": "scoring.baselines",
    "GradientActivation": "scoring.attribution",
    "IntegratedGradients": "scoring.attribution",
    "Intervention": "units",
    "LatencyTable": "pruning.latency",
    "LeaveOneOut": "scoring.baselines",
    "LossReport": "pruning.loss",
    "LossReporting": "pruning.loss",
    "Magnitude": "scoring.baselines",
    "Model": "models",
    "NM": "sparse.patterns",
    "Output": "models",
    "Prediction": "pruning.loss",
    "Prompt": "data.prompts",
    "Pruned": "pruning.prune",
    "Pruning": "pruning.prune",
    "Random": "scoring.baselines",
    "Reconstruction": "pruning.recovery",
    "Recovery": "pruning.recovery",
    "Rescaling": "pruning.recovery",
    "Reselection": "pruning.loss",
    "Round": "pruning.prune",
    "Rows": "data.tasks",
    "Rules": "pruning.budgets",
    "Schedule": "sparse.schedules",
    "Scores": "scoring.scores",
    "Scoring": "scoring.run",
    "Sparsification": "training.distillation",
    "Sparsity": "sparse.masks",
    "Stability": "scoring.stability",
    "Task": "data.tasks",
    "TaskGates": "checkpoints.shared",
    "Taylor": "scoring.baselines",
    "TopLayers": "scoring.baselines",
    "Training": "training.loop",
    "Unstructured": "sparse.patterns",
    "Wanda": "scoring.baselines",
    "WeightFisher": "sparse.saliency",
    "WeightMagnitude": "sparse.saliency",
    "WeightMovement": "sparse.saliency",
    "Workspace": "pruning.prune",
    "add_gates": "checkpoints.shared",
    "apply_masks": "sparse.masks",
    "augment": "data.augmentation",
    "budgets": "pruning",
    "bundled_data": "bundled",
    "bundled_model": "bundled",
    "bundled_text_model": "bundled",
    "check": "pruning.checks",
    "compact": "compaction",
    "cubic_schedule": "sparse.schedules",
    "densify": "checkpoints.int8",
    "distill": "training.distillation",
    "evaluate": "evaluation.evaluate",
    "find_answers": "evaluation.evaluate",
    "finetune": "training.finetuning",
    "flops": "models.cost",
    "generate": "evaluation.generation",
    "initialise_projection": "training.joint_loss",
    "integrate": "scoring.attribution",
    "joint_loss": "training.joint_loss",
    "joint_loss_and_gradients": "training.joint_loss",
    "latency": "pruning.latency",
    "linear_maps": "sparse.matrices",
    "linear_schedule": "sparse.schedules",
    "load": "checkpoints.folder",
    "load_gates": "checkpoints.shared",
    "load_scores": "scoring.scores",
    "load_task": "data.tasks",
    "log_probability": "scoring.objectives",
    "loss_report": "pruning.loss",
    "margin": "scoring.objectives",
    "masks_of": "sparse.masks",
    "measure_latency_table": "pruning.latency",
    "merge": "scoring.scores",
    "one_shot": "sparse.masks",
    "one_shot_schedule": "sparse.schedules",
    "open_gates": "units",
    "parameters": "models.cost",
    "predict": "evaluation.evaluate",
    "predict_loss": "pruning.loss",
    "probability": "scoring.objectives",
    "prompt_for": "data.prompts",
    "prune": "pruning.prune",
    "prune_in_rounds": "pruning.prune",
    "pruning_record": "pruning.record",
    "read_prompt": "data.prompts",
    "recover": "pruning.recovery",
    "recover_batches": "pruning.recovery",
    "reselect": "pruning.loss",
    "save": "checkpoints.folder",
    "save_scores": "scoring.scores",
    "save_shared": "checkpoints.shared",
    "score": "scoring.run",
    "select": "pruning.selection",
    "sparse_optimizer": "sparse.optimizer",
    "sparsity_of": "sparse.masks",
    "stability": "scoring.stability",
    "surviving_heads": "training.distillation",
}

__all__ = [
    "NM",
    "Activation",
    "Augmentation",
    "BiasCompensation",
    "Block",
    "Check",
    "Checking",
    "Distillation",
    "Example",
    "FineTuning",
    "Fisher",
    "Gradient",
    "GradientActivation",
    "IntegratedGradients",
    "Intervention",
    "LatencyTable",
    "LeaveOneOut",
    "LossReport",
    "LossReporting",
    "Magnitude",
    "Model",
    "Output",
    "Prediction",
    "Prompt",
    "Pruned",
    "Pruning",
    "Random",
    "Reconstruction",
    "Recovery",
    "Rescaling",
    "Reselection",
    "Round",
    "Rows",
    "Rules",
    "Schedule",
    "Scores",
    "Scoring",
    "Sparsification",
    "Sparsity",
    "Stability",
    "Task",
    "TaskGates",
    "Taylor",
    "TopLayers",
    "Training",
    "Unstructured",
    "Wanda",
    "WeightFisher",
    "WeightMagnitude",
    "WeightMovement",
    "Workspace",
    "__version__",
    "add_gates",
    "apply_masks",
    "augment",
    "budgets",
    "bundled_data",
    "bundled_model",
    "bundled_text_model",
    "check",
    "compact",
    "cubic_schedule",
    "densify",
    "distill",
    "evaluate",
    "find_answers",
    "finetune",
    "flops",
    "generate",
    "initialise_projection",
    "integrate",
    "joint_loss",
    "joint_loss_and_gradients",
    "latency",
    "linear_maps",
    "linear_schedule",
    "load",
    "load_gates",
    "load_scores",
    "load_task",
    "log_probability",
    "loss_report",
    "margin",
    "masks_of",
    "measure_latency_table",
    "merge",
    "one_shot",
    "one_shot_schedule",
    "open_gates",
    "parameters",
    "predict",
    "predict_loss",
    "probability",
    "prompt_for",
    "prune",
    "prune_in_rounds",
    "pruning_record",
    "read_prompt",
    "recover",
    "recover_batches",
    "reselect",
    "save",
    "save_scores",
    "save_shared",
    "score",
    "select",
    "sparse_optimizer",
    "sparsity_of",
    "stability",
    "surviving_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'jaxprune' has no attribute {name!r}.")
    source = f"jaxprune.{_SOURCES[name]}"
    module = importlib.import_module(source)
    value = getattr(module, name) if hasattr(module, name) else importlib.import_module(f"{source}.{name}")
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

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
    from jaxprune.attribution import GradientActivation, IntegratedGradients
    from jaxprune.budgets.latency_table import LatencyTable, measure_latency_table
    from jaxprune.budgets.provenance import pruning_record
    from jaxprune.bundled import bundled_data, bundled_model, bundled_text_model
    from jaxprune.checkpoint import load, save
    from jaxprune.compaction import compact
    from jaxprune.cost import flops, latency, parameters
    from jaxprune.criteria.baselines import (
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
    from jaxprune.criteria.integration import integrate
    from jaxprune.criteria.objectives import log_probability, margin, probability
    from jaxprune.data.augmentation import Augmentation, augment
    from jaxprune.data.prompts import Prompt, prompt_for, read_prompt
    from jaxprune.distillation import distil_step, joint_loss, joint_loss_and_gradients, start_student
    from jaxprune.evaluation import evaluate
    from jaxprune.formats.packing import densify
    from jaxprune.gates import open_gates
    from jaxprune.generation import generate
    from jaxprune.learning.curriculum import Distillation, initialise_projection, surviving_heads
    from jaxprune.learning.teaching import Exam, Taught, Teaching, Thinning, distil
    from jaxprune.models import Model, Output
    from jaxprune.recovery import recover, recover_batches
    from jaxprune.repair.fitting import BiasCompensation, Reconstruction, Rescaling
    from jaxprune.repair.prediction import Prediction, predict_loss
    from jaxprune.repair.receipt import Receipt, loss_receipt
    from jaxprune.repair.reselection import Reselection, reselect
    from jaxprune.rounds import Round, prune_in_rounds
    from jaxprune.scores import Scores, load_scores, merge, save_scores
    from jaxprune.scoring import score
    from jaxprune.selection import select
    from jaxprune.shared import TaskGates, add_gates, load_gates, save_shared
    from jaxprune.sparse.matrices import linear_maps
    from jaxprune.sparse.patterns import NM, Block, Unstructured
    from jaxprune.sparse.saliency import WeightFisher, WeightMagnitude, WeightMovement
    from jaxprune.sparse.schedules import Schedule, cubic_schedule, linear_schedule, one_shot_schedule
    from jaxprune.sparse.sparse_training import sparsify
    from jaxprune.sparsity import Sparsity, apply_masks, masks_of, one_shot, sparsity_of
    from jaxprune.tasks import Task, load_task
    from jaxprune.training import finetune
    from jaxprune.trust.checks import Check, Checking, check
    from jaxprune.trust.split_half import Stability, stability

__version__ = "0.1.0"

# Public name -> the module it comes from; the imports above are the same list, for editors and type checkers.
_SOURCES = {
    "Activation": "criteria.baselines",
    "Augmentation": "data.augmentation",
    "BiasCompensation": "repair.fitting",
    "Block": "sparse.patterns",
    "Check": "trust.checks",
    "Checking": "trust.checks",
    "Distillation": "learning.curriculum",
    "Exam": "learning.teaching",
    "Fisher": "criteria.baselines",
    "Gradient": "criteria.baselines",
    "GradientActivation": "attribution",
    "IntegratedGradients": "attribution",
    "LatencyTable": "budgets.latency_table",
    "LeaveOneOut": "criteria.baselines",
    "Magnitude": "criteria.baselines",
    "Model": "models",
    "NM": "sparse.patterns",
    "Output": "models",
    "Prediction": "repair.prediction",
    "Prompt": "data.prompts",
    "Random": "criteria.baselines",
    "Receipt": "repair.receipt",
    "Reconstruction": "repair.fitting",
    "Rescaling": "repair.fitting",
    "Reselection": "repair.reselection",
    "Round": "rounds",
    "Schedule": "sparse.schedules",
    "Scores": "scores",
    "Sparsity": "sparsity",
    "Stability": "trust.split_half",
    "Task": "tasks",
    "TaskGates": "shared",
    "Taught": "learning.teaching",
    "Taylor": "criteria.baselines",
    "Teaching": "learning.teaching",
    "Thinning": "learning.teaching",
    "TopLayers": "criteria.baselines",
    "Unstructured": "sparse.patterns",
    "Wanda": "criteria.baselines",
    "WeightFisher": "sparse.saliency",
    "WeightMagnitude": "sparse.saliency",
    "WeightMovement": "sparse.saliency",
    "add_gates": "shared",
    "apply_masks": "sparsity",
    "augment": "data.augmentation",
    "bundled_data": "bundled",
    "bundled_model": "bundled",
    "bundled_text_model": "bundled",
    "check": "trust.checks",
    "compact": "compaction",
    "cubic_schedule": "sparse.schedules",
    "densify": "formats.packing",
    "distil": "learning.teaching",
    "distil_step": "distillation",
    "evaluate": "evaluation",
    "finetune": "training",
    "flops": "cost",
    "generate": "generation",
    "initialise_projection": "learning.curriculum",
    "integrate": "criteria.integration",
    "joint_loss": "distillation",
    "joint_loss_and_gradients": "distillation",
    "latency": "cost",
    "linear_maps": "sparse.matrices",
    "linear_schedule": "sparse.schedules",
    "load": "checkpoint",
    "load_gates": "shared",
    "load_scores": "scores",
    "load_task": "tasks",
    "log_probability": "criteria.objectives",
    "loss_receipt": "repair.receipt",
    "margin": "criteria.objectives",
    "masks_of": "sparsity",
    "measure_latency_table": "budgets.latency_table",
    "merge": "scores",
    "one_shot": "sparsity",
    "one_shot_schedule": "sparse.schedules",
    "open_gates": "gates",
    "parameters": "cost",
    "predict_loss": "repair.prediction",
    "probability": "criteria.objectives",
    "prompt_for": "data.prompts",
    "prune_in_rounds": "rounds",
    "pruning_record": "budgets.provenance",
    "read_prompt": "data.prompts",
    "recover": "recovery",
    "recover_batches": "recovery",
    "reselect": "repair.reselection",
    "save": "checkpoint",
    "save_scores": "scores",
    "save_shared": "shared",
    "score": "scoring",
    "select": "selection",
    "sparsify": "sparse.sparse_training",
    "sparsity_of": "sparsity",
    "stability": "trust.split_half",
    "start_student": "distillation",
    "surviving_heads": "learning.curriculum",
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
    "Exam",
    "Fisher",
    "Gradient",
    "GradientActivation",
    "IntegratedGradients",
    "LatencyTable",
    "LeaveOneOut",
    "Magnitude",
    "Model",
    "Output",
    "Prediction",
    "Prompt",
    "Random",
    "Receipt",
    "Reconstruction",
    "Rescaling",
    "Reselection",
    "Round",
    "Schedule",
    "Scores",
    "Sparsity",
    "Stability",
    "Task",
    "TaskGates",
    "Taught",
    "Taylor",
    "Teaching",
    "Thinning",
    "TopLayers",
    "Unstructured",
    "Wanda",
    "WeightFisher",
    "WeightMagnitude",
    "WeightMovement",
    "__version__",
    "add_gates",
    "apply_masks",
    "augment",
    "bundled_data",
    "bundled_model",
    "bundled_text_model",
    "check",
    "compact",
    "cubic_schedule",
    "densify",
    "distil",
    "distil_step",
    "evaluate",
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
    "loss_receipt",
    "margin",
    "masks_of",
    "measure_latency_table",
    "merge",
    "one_shot",
    "one_shot_schedule",
    "open_gates",
    "parameters",
    "predict_loss",
    "probability",
    "prompt_for",
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
    "sparsify",
    "sparsity_of",
    "stability",
    "start_student",
    "surviving_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'jaxprune' has no attribute {name!r}.")
    value = getattr(importlib.import_module(f"jaxprune.{_SOURCES[name]}"), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

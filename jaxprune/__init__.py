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
    from jaxprune.augmentation import Augmentation, augment
    from jaxprune.baselines import (
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
    from jaxprune.bundled import bundled_data, bundled_model, bundled_text_model
    from jaxprune.checkpoint import load, save
    from jaxprune.checks import Check, Checking, check
    from jaxprune.compaction import compact
    from jaxprune.cost import flops, latency, parameters
    from jaxprune.curriculum import Distillation, initialise_projection, surviving_heads
    from jaxprune.distillation import distil_step, joint_loss, joint_loss_and_gradients, start_student
    from jaxprune.evaluation import evaluate
    from jaxprune.fitting import BiasCompensation, Reconstruction, Rescaling
    from jaxprune.gates import open_gates
    from jaxprune.generation import generate
    from jaxprune.integration import integrate
    from jaxprune.latency_table import LatencyTable, measure_latency_table
    from jaxprune.matrices import linear_maps
    from jaxprune.models import Model, Output
    from jaxprune.objectives import log_probability, margin, probability
    from jaxprune.packing import densify
    from jaxprune.patterns import NM, Block, Unstructured
    from jaxprune.prediction import Prediction, predict_loss
    from jaxprune.prompts import Prompt, prompt_for, read_prompt
    from jaxprune.provenance import pruning_record
    from jaxprune.receipt import Receipt, loss_receipt
    from jaxprune.recovery import recover, recover_batches
    from jaxprune.reselection import Reselection, reselect
    from jaxprune.rounds import Round, prune_in_rounds
    from jaxprune.saliency import WeightFisher, WeightMagnitude, WeightMovement
    from jaxprune.schedules import Schedule, cubic_schedule, linear_schedule, one_shot_schedule
    from jaxprune.scores import Scores, load_scores, merge, save_scores
    from jaxprune.scoring import score
    from jaxprune.selection import select
    from jaxprune.shared import TaskGates, add_gates, load_gates, save_shared
    from jaxprune.sparse_training import sparsify
    from jaxprune.sparsity import Sparsity, apply_masks, masks_of, one_shot, sparsity_of
    from jaxprune.split_half import Stability, stability
    from jaxprune.tasks import Task, load_task
    from jaxprune.teaching import Exam, Taught, Teaching, Thinning, distil
    from jaxprune.training import finetune

__version__ = "0.1.0"

# Public name -> the module it comes from; the imports above are the same list, for editors and type checkers.
_SOURCES = {
    "Activation": "baselines",
    "Augmentation": "augmentation",
    "BiasCompensation": "fitting",
    "Block": "patterns",
    "Check": "checks",
    "Checking": "checks",
    "Distillation": "curriculum",
    "Exam": "teaching",
    "Fisher": "baselines",
    "Gradient": "baselines",
    "GradientActivation": "attribution",
    "IntegratedGradients": "attribution",
    "LatencyTable": "latency_table",
    "LeaveOneOut": "baselines",
    "Magnitude": "baselines",
    "Model": "models",
    "NM": "patterns",
    "Output": "models",
    "Prediction": "prediction",
    "Prompt": "prompts",
    "Random": "baselines",
    "Receipt": "receipt",
    "Reconstruction": "fitting",
    "Rescaling": "fitting",
    "Reselection": "reselection",
    "Round": "rounds",
    "Schedule": "schedules",
    "Scores": "scores",
    "Sparsity": "sparsity",
    "Stability": "split_half",
    "Task": "tasks",
    "TaskGates": "shared",
    "Taught": "teaching",
    "Taylor": "baselines",
    "Teaching": "teaching",
    "Thinning": "teaching",
    "TopLayers": "baselines",
    "Unstructured": "patterns",
    "Wanda": "baselines",
    "WeightFisher": "saliency",
    "WeightMagnitude": "saliency",
    "WeightMovement": "saliency",
    "add_gates": "shared",
    "apply_masks": "sparsity",
    "augment": "augmentation",
    "bundled_data": "bundled",
    "bundled_model": "bundled",
    "bundled_text_model": "bundled",
    "check": "checks",
    "compact": "compaction",
    "cubic_schedule": "schedules",
    "densify": "packing",
    "distil": "teaching",
    "distil_step": "distillation",
    "evaluate": "evaluation",
    "finetune": "training",
    "flops": "cost",
    "generate": "generation",
    "initialise_projection": "curriculum",
    "integrate": "integration",
    "joint_loss": "distillation",
    "joint_loss_and_gradients": "distillation",
    "latency": "cost",
    "linear_maps": "matrices",
    "linear_schedule": "schedules",
    "load": "checkpoint",
    "load_gates": "shared",
    "load_scores": "scores",
    "load_task": "tasks",
    "log_probability": "objectives",
    "loss_receipt": "receipt",
    "margin": "objectives",
    "masks_of": "sparsity",
    "measure_latency_table": "latency_table",
    "merge": "scores",
    "one_shot": "sparsity",
    "one_shot_schedule": "schedules",
    "open_gates": "gates",
    "parameters": "cost",
    "predict_loss": "prediction",
    "probability": "objectives",
    "prompt_for": "prompts",
    "prune_in_rounds": "rounds",
    "pruning_record": "provenance",
    "read_prompt": "prompts",
    "recover": "recovery",
    "recover_batches": "recovery",
    "reselect": "reselection",
    "save": "checkpoint",
    "save_scores": "scores",
    "save_shared": "shared",
    "score": "scoring",
    "select": "selection",
    "sparsify": "sparse_training",
    "sparsity_of": "sparsity",
    "stability": "split_half",
    "start_student": "distillation",
    "surviving_heads": "curriculum",
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

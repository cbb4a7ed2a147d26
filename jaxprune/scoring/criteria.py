"""All criteria under one name, `jp.criteria`: a new one is written beside these and listed here."""

from jaxprune.scoring.attribution import GradientActivation, IntegratedGradients
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

__all__ = [
    "Activation",
    "Fisher",
    "Gradient",
    "GradientActivation",
    "IntegratedGradients",
    "LeaveOneOut",
    "Magnitude",
    "Random",
    "Taylor",
    "TopLayers",
    "Wanda",
]

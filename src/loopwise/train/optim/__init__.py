"""Optimizers whose state is keyed by parameter name, schedules, averaged weights and parametrisations."""

from loopwise.train.optim.adam_atan2 import AdamATan2Config
from loopwise.train.optim.adamw import AdamWConfig
from loopwise.train.optim.clip import clip_gradients
from loopwise.train.optim.ema import Ema
from loopwise.train.optim.muon import MuonConfig
from loopwise.train.optim.named import NamedOptimizer, OptimizerConfig
from loopwise.train.optim.parametrisation import (
    CompletePParametrisation,
    LayerNormScaling,
    Parametrisation,
    StandardParametrisation,
    scale_initial_values,
)
from loopwise.train.optim.roles import Multipliers, role_of, trainable
from loopwise.train.optim.schedule import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, WsdSchedule

__all__ = [
    "AdamATan2Config",
    "AdamWConfig",
    "CompletePParametrisation",
    "ConstantSchedule",
    "CosineSchedule",
    "Ema",
    "LayerNormScaling",
    "LinearSchedule",
    "Multipliers",
    "MuonConfig",
    "NamedOptimizer",
    "OptimizerConfig",
    "Parametrisation",
    "Schedule",
    "StandardParametrisation",
    "WsdSchedule",
    "clip_gradients",
    "role_of",
    "scale_initial_values",
    "trainable",
]

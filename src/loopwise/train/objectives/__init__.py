"""What a run learns: objectives over the iterations of a loop, terms that are added, and parts that are trained."""

from loopwise.loop.objective import Objective, ShortcutObjective
from loopwise.train.objectives.adapters import LoraConfig
from loopwise.train.objectives.compute import check_objective, compute_loss
from loopwise.train.objectives.cosine_tie import CosineTie
from loopwise.train.objectives.distillation import Distillation
from loopwise.train.objectives.forward import document_positions, forward_at
from loopwise.train.objectives.terms import LossTerm, Seen, Term, ZLoss, build_terms
from loopwise.train.objectives.trainable import trainable

__all__ = [
    "CosineTie",
    "Distillation",
    "LoraConfig",
    "LossTerm",
    "Objective",
    "Seen",
    "ShortcutObjective",
    "Term",
    "ZLoss",
    "build_terms",
    "check_objective",
    "compute_loss",
    "document_positions",
    "forward_at",
    "trainable",
]

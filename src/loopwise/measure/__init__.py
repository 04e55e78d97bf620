"""Measurements: what a plan costs, how well a model predicts, how alike layers are; all return numbers or arrays."""

from loopwise.measure.cost import Cost, LayerCost, VisitCost, cost_of, realised_depth
from loopwise.measure.influence import Influence
from loopwise.measure.loss_jump import LossJump, row_losses
from loopwise.measure.score import Score, perplexity
from loopwise.measure.similarity import WeightSimilarity, weight_similarity

__all__ = [
    "Cost",
    "Influence",
    "LayerCost",
    "LossJump",
    "Score",
    "VisitCost",
    "WeightSimilarity",
    "cost_of",
    "perplexity",
    "realised_depth",
    "row_losses",
    "weight_similarity",
]

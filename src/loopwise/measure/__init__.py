"""Measurements: what a plan costs and how well a model predicts. Functions return numbers and arrays."""

from loopwise.measure.cost import Cost, LayerCost, VisitCost, cost_of, realised_depth
from loopwise.measure.score import Score, perplexity

__all__ = ["Cost", "LayerCost", "Score", "VisitCost", "cost_of", "perplexity", "realised_depth"]

"""The plan language: which layers are visited in which order, and the algebra of such orders. Imports no torch."""

from loopwise.plan.algebra import Edit, drop, insert, loop, repeat, tie, unroll, untie
from loopwise.plan.errors import PlanError
from loopwise.plan.nodes import MAX_LAYER, MAX_LOOP_DEPTH, MAX_SLOTS, Loop, Node, Slot, Span
from loopwise.plan.plans import Plan

__all__ = [
    "MAX_LAYER",
    "MAX_LOOP_DEPTH",
    "MAX_SLOTS",
    "Edit",
    "Loop",
    "Node",
    "Plan",
    "PlanError",
    "Slot",
    "Span",
    "drop",
    "insert",
    "loop",
    "repeat",
    "tie",
    "unroll",
    "untie",
]

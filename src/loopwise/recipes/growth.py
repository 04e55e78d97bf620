"""Models that grow while they are trained, at sizes that two CPU cores train in about a minute.

The functions take sizes, so that claims and comparisons make their arms from them.
"""

from __future__ import annotations

from typing import Any

from loopwise.edit.operators import Midas, Operator
from loopwise.edit.schedule import at_fractions, prop_alpha
from loopwise.edit.surgery import Tie, Untie
from loopwise.plan import Loop, Plan, Span
from loopwise.recipes.reasoning import HOPS, on_task
from loopwise.train.config import RunConfig, Stage
from loopwise.train.growth import grow


def midas(
    block: int = 2, blocks: int = 3, alpha: float = 1.0, operator: Operator | None = None, **values: Any
) -> RunConfig:
    """p-hop with a model that grows from 2 to 6 layers: its middle block is copied beside itself (2409.19044).

    Args:
        block: layers b of the first stage, and of what an edit adds.
        blocks: stages, and blocks of the final model.
        alpha: of PROP-alpha, which says how long the stages are.
        operator: of the edits; None is MIDAS.
        **values: further arguments of `reasoning.on_task`.
    """
    settings = dict[str, Any](steps=600, batch_size=32) | values
    stages = grow(operator or Midas(b=block), prop_alpha(settings["steps"], blocks, alpha))
    return on_task("midas", HOPS, block, 1, stages=stages, **settings)


def life_cycle(iterations: int = 4, layers: int = 6, **values: Any) -> RunConfig:
    """p-hop with a model that loops, is untied, grows in the middle, and loops what it has grown there.

    1 layer x 4, then 4 layers, then 6, of which the three in the middle come from one; these become one again, x 3.

    Args:
        iterations: of the first loop, and layers once it is untied; at least 3.
        layers: once it has grown.
        **values: further arguments of `reasoning.on_task`.
    """
    settings = dict[str, Any](steps=600, batch_size=32) | values
    first, second, third, last = at_fractions(settings["steps"], [0.4, 0.6, 0.8]).steps
    grown, start = layers - iterations, (iterations + 1) // 2 - 1
    nodes = (Span(0, start - 1), Loop((Span(start, start),), grown + 1, "core"), Span(start + 1, iterations - 1))
    stages = (
        Stage(steps=first),
        Stage(steps=second, edit=(Untie(),), moments="halve"),
        Stage(steps=third, edit=(Midas(b=1),) * grown),
        Stage(steps=last, edit=(Tie(plan=str(Plan(nodes))),), moments="halve"),
    )
    return on_task("life_cycle", HOPS, 1, iterations, stages=stages, **settings)

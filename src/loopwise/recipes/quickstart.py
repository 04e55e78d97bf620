"""Does depth decide, and does it matter whether the layers differ? 1 layer, 1 layer looped and 4 layers on one task.

A row is a hop count k, the table of a random cycle over 8 symbols, and all symbols as starts; at each start the symbol
k hops further is to be said. One layer can look up one hop. `make quickstart` trains the three and compares them.
"""

from __future__ import annotations

from dataclasses import replace

from loopwise.recipes.reasoning import cycle_walk
from loopwise.tasks.cycle_walk import CycleWalk
from loopwise.train.config import RunConfig

HOPS = 4


def shallow() -> RunConfig:
    """Walks around a cycle with 1 layer."""
    return _walk("shallow", 1, 1)


def looped() -> RunConfig:
    """Walks around a cycle with 1 layer that runs 4 times."""
    return _walk("looped", 1, HOPS)


def deep() -> RunConfig:
    """Walks around a cycle with 4 layers."""
    return _walk("deep", HOPS, 1)


def _walk(name: str, layers: int, iterations: int) -> RunConfig:
    config = cycle_walk(layers, iterations, task=CycleWalk(nodes=8, hops=tuple(range(1, HOPS + 1))))
    return replace(config, name=name)

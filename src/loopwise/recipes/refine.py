"""A recurrent-depth model whose answers are long enough that the decoder matters: `benchmarks/decode_policies.py`.

A prelude, a core that re-reads its input at every iteration and starts from random noise, and random depths in training
(Huginn, 2502.05171; Parcae, 2604.12946), on tables of powers of a cycle: an answer is 13 tokens, written one after the
other, some of which need more iterations than others. There is no coda: what the core does not work out is not worked
out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loopwise.loop.depth import UniformDepth
from loopwise.loop.state import NormalState
from loopwise.loop.update import AddConfig
from loopwise.recipes.reasoning import on_task
from loopwise.tasks.base import Task
from loopwise.tasks.cycle_power import CyclePower
from loopwise.train.config import Evaluation, RunConfig
from loopwise.train.models import Loop

TASK = CyclePower()
LOOPS = 16
"""Iterations at inference, and the most in training."""


def refine() -> RunConfig:
    """A recurrent-depth model that writes powers of a cycle: prelude, core with injection, 3 to 16 iterations."""
    evaluation = Evaluation(every=1000, rows=512, loops=(1, 2, 4, 6, 8, 12, 16, 32))
    return recurrent("refine", TASK, steps=5000, batch_size=64, evaluation=evaluation)


def recurrent(name: str, task: Task, *, least: int = 3, most: int = LOOPS, **values: Any) -> RunConfig:
    """A run of a prelude of one layer and a core of one layer, on a task.

    Args:
        name: of the run.
        task: what to learn.
        least: fewest iterations in training.
        most: iterations of the plan, and the most in training; at most 8 of them carry a gradient.
        **values: of `on_task`, among them steps, batch_size, width and further fields of `RunConfig`.
    """
    settings: dict[str, Any] = {
        "placement": "stream",
        "positions": "learned",
        "loop": Loop(state=NormalState(std=0.5), update=AddConfig()),
        "depth": UniformDepth(low=least, high=most, max_grad=8),
    }
    config = on_task(name, task, 1, most, **settings | values)
    return replace(config, model=replace(config.model, layers=2, plan=f"0 core:(1)x{most}"))

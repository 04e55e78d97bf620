"""A recurrent-depth model whose answers are long enough that the decoder matters: `benchmarks/decode_policies.py`.

A prelude, a core that re-reads its input at every iteration and starts from random noise, and random depths in training
(Huginn, 2502.05171; Parcae, 2604.12946), on 6x6 Sudoku written cell by cell: an answer is 36 tokens, each follows from
the ones before, and some cells need more iterations than others. There is no coda: what the core does not work out is
not worked out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loopwise.loop.depth import UniformDepth
from loopwise.loop.state import NormalState
from loopwise.loop.update import AddConfig
from loopwise.recipes.reasoning import on_task
from loopwise.tasks.base import Task
from loopwise.tasks.sudoku import Sudoku
from loopwise.train.config import Evaluation, RunConfig
from loopwise.train.models import Loop
from loopwise.train.optim import WsdSchedule

TASK = Sudoku(size=6)
LOOPS = 16
"""Iterations at inference, and the most in training."""


def refine() -> RunConfig:
    """A recurrent-depth model for 6x6 Sudoku cell by cell: prelude, core with injection, 2 to 16 iterations."""
    settings: dict[str, Any] = {
        "steps": 4000,
        "batch_size": 32,
        "evaluation": Evaluation(every=1000, rows=512, loops=(1, 2, 4, 8, 16, 32)),
    }
    return recurrent("refine", TASK, **settings)


def recurrent(name: str, task: Task, *, width: int = 64, most: int = LOOPS, **values: Any) -> RunConfig:
    """A run of a prelude of one layer and a core of one layer at 2 to `most` iterations, on a task.

    Args:
        name: of the run.
        task: what to learn.
        width: D.
        most: iterations of the plan, and the most in training; at most 8 of them carry a gradient.
        **values: further fields of `RunConfig`, among them steps and batch_size.
    """
    settings: dict[str, Any] = {
        "lr": 5e-3,
        "placement": "stream",
        "positions": "learned",
        "loop": Loop(state=NormalState(std=0.5), update=AddConfig()),
        "depth": UniformDepth(low=2, high=most, max_grad=8),
        "schedule": WsdSchedule(warmup=0.05, decay=0.4),
    }
    config = on_task(name, task, 1, most, width=width, **settings | values)
    return replace(config, model=replace(config.model, layers=2, plan=f"0 core:(1)x{most}"))

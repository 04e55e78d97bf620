"""What it costs to keep keys and values of one iteration only, while decoding and from the prompt on.

Every trained model decodes the same puzzles under every policy. The arm "whole model" loops all of its layers 4 times
with the final norm inside the loop and no injection, as Ouro does, and decides; "recurrent core", which re-reads its
input and converges, is measured beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import loopwise
from loopwise.decode.sequential import decode_sequential
from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.reasoning import on_task
from loopwise.recipes.refine import recurrent
from loopwise.study.experiment import Effect
from loopwise.study.scoring import RunResult
from loopwise.study.stats import mean_interval
from loopwise.tasks.base import IGNORE, rows
from loopwise.tasks.sudoku import Sudoku
from loopwise.train.config import Evaluation, RunConfig
from loopwise.train.models import Loop
from loopwise.train.optim import WsdSchedule

TASK = Sudoku(size=6)
DECIDES = "whole model"
POLICIES = ("own", "own/last", "own/ring(2)", "own/first", "last", "first")
NUM_PUZZLES, BATCH = 512, 128


def arms(scale: str) -> dict[str, RunConfig]:
    """The two kinds of loop, with as many layers and steps."""
    large = scale == "gpu"
    size: dict[str, Any] = {"steps": 700, "batch_size": 32}
    if large:
        size = {"width": 192, "steps": 6000, "batch_size": 128}
    whole = on_task(
        "kv_sharing",
        TASK,
        2,
        4,
        lr=5e-3,
        placement="branch",
        positions="learned",
        loop=Loop(turn_norm=True),
        schedule=WsdSchedule(warmup=0.05, decay=0.4),
        **size,
    )
    made = {DECIDES: whole, "recurrent core": recurrent("kv_sharing", TASK, **size)}
    return {name: replace(config, evaluation=Evaluation(every=0, samples=0)) for name, config in made.items()}


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Solved puzzles under every policy, and what each loses against a store for every iteration."""
    solved = {
        name: {policy: [_solved(run.folder, policy) for run in found] for policy in POLICIES}
        for name, found in runs.items()
    }
    lost = {
        name: {policy: [own - one for own, one in zip(by["own"], by[policy], strict=True)] for policy in POLICIES}
        for name, by in solved.items()
    }
    first, own = mean_interval(lost[DECIDES]["own/first"]), mean_interval(solved[DECIDES]["own"])
    return Effect(
        interval=mean_interval(lost[DECIDES]["own/last"]),
        control_held=own.estimate >= 0.3 and first.low >= 0.05,
        control=(
            f"solved with a store for every iteration {own.estimate:.3f}; own/first loses {first.estimate:.3f} "
            f"[{first.low:.3f}, {first.high:.3f}]"
        ),
        scores={name: by["own"] for name, by in solved.items()},
        metric="share of puzzles solved by greedy decoding with a store for every iteration",
        panels=[_panel(name, by) for name, by in solved.items()],
        details={
            "solved by policy": solved,
            "lost by policy, mean and 95 % limits": {
                name: {policy: _limits(values) for policy, values in by.items()} for name, by in lost.items()
            },
            "puzzles": NUM_PUZZLES,
        },
    )


@cache
def _puzzles() -> tuple[list[list[int]], np.ndarray]:
    """Prompts and answers of test puzzles, the same for every model."""
    drawn = rows(TASK, seed=1, index=0, size=NUM_PUZZLES, split="test")
    scored = drawn.targets_BT != IGNORE
    start = int(scored[0].argmax()) + 1
    return drawn.tokens_BT[:, :start].tolist(), drawn.targets_BT[scored].reshape(NUM_PUZZLES, -1)


def _solved(folder: Path, policy: str) -> float:
    """Share of puzzles that a run's model fills in without a mistake."""
    torch.set_num_threads(1)
    prompts, answers = _puzzles()
    model = loopwise.load(folder / "model", dtype="float32").eval()
    tokens = []
    for first in range(0, NUM_PUZZLES, BATCH):
        batch = prompts[first : first + BATCH]
        tokens += decode_sequential(model, batch, max_new_tokens=answers.shape[1], cache=policy).tokens
    return float((np.array(tokens) == answers).all(axis=1).mean())


def _limits(values: Sequence[float]) -> list[float]:
    found = mean_interval(values)
    return [found.estimate, found.low, found.high]


def _panel(name: str, solved: Mapping[str, Sequence[float]]) -> Panel:
    """A line for each policy through the models of all seeds."""
    curves = [
        Curve(label=policy, x=list(range(1, len(shares) + 1)), y=list(shares), dashed=policy == "own/last")
        for policy, shares in solved.items()
    ]
    return Panel(curves=curves, x_label="trained model (seed)", y_label="share of puzzles solved", title=name)

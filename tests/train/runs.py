"""Small runs for tests, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from loopwise.loop.depth import PoissonDepth
from loopwise.loop.state import NormalState
from loopwise.loop.update import ConcatConfig
from loopwise.tasks.p_hop import PHop
from loopwise.train.config import Evaluation, RunConfig, Saving, Stage
from loopwise.train.data.generated import TaskData
from loopwise.train.models import DecoderModel, Loop
from loopwise.train.optim import AdamWConfig
from loopwise.train.run import Run


def tiny_config(**values: Any) -> RunConfig:
    """A looped model with random first states, sampled depths, a gradient window, dropout and averaged weights."""
    config = RunConfig(
        name="tiny",
        model=DecoderModel(
            layers=3,
            width=16,
            heads=2,
            plan="0 core:(1)x3 2",
            loop=Loop(state=NormalState(std=0.1), update=ConcatConfig()),
            dropout=0.1,
        ),
        data=TaskData(task=PHop(context=12, alphabet=3, hops=(1, 2))),
        steps=6,
        batch_size=4,
        micro_batch=2,
        optimizer=AdamWConfig(lr=3e-3),
        depth=PoissonDepth(mean=3, max_grad=2),
        ema=0.9,
        evaluation=Evaluation(rows=8, samples=1),
        saving=Saving(keep=3),
        log_every=1,
    )
    return replace(config, **values)


def two_stages(**values: Any) -> RunConfig:
    """A stage without the loop, then one with it."""
    stages = (Stage(steps=3, plan="0 core:(1)x1 2"), Stage(steps=3, plan="0 core:(1)x4 2", batch_size=8))
    return tiny_config(stages=stages, depth=None, **values)


def steps_of(run: Run, num_steps: int | None = None) -> list[dict[str, Any]]:
    """Train and return the values of every step, without what a clock says."""
    return [timeless(values) for values in run.train(num_steps)]


def timeless(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "time"}


def assert_same_state(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name

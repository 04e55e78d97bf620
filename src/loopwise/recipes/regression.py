"""In-context regression (2208.01066), looped as by Yang et al. (2311.12424), at sizes that one core trains in a minute.

The functions take sizes, so that claims and comparisons make their arms from them.
"""

from __future__ import annotations

from typing import Any

from loopwise.loop.depth import CurriculumDepth, DepthSampler, FixedDepth
from loopwise.loop.objective import LastMeanObjective
from loopwise.loop.state import ZerosState
from loopwise.loop.update import AddConfig
from loopwise.tasks.regression import LinearRegression, RegressionTask
from loopwise.train.config import Evaluation, RunConfig
from loopwise.train.data.generated import RegressionData
from loopwise.train.models import Loop, RegressionModel
from loopwise.train.optim import AdamWConfig, MuonConfig, WsdSchedule

LINEAR = LinearRegression(inputs=3, num_points=8)


def icl_looped(iterations: int = 6, window: int = 3, steps: int = 1400, **values: Any) -> RunConfig:
    """In-context linear regression with 1 layer that runs 6 times, adds the prompt each time and learns at the last 3.

    The number of iterations grows from `window` to `iterations` over the first 30 % of the steps.
    """
    depth: DepthSampler = FixedDepth(total=iterations, max_grad=window)
    if iterations > window:
        depth = CurriculumDepth(sampler=depth, steps=max(1, steps * 3 // 10), start=window)
    loop = Loop(state=ZerosState(), update=AddConfig(), turn_norm=True)
    settings = {"depth": depth, "objective": LastMeanObjective(window=window)}
    return on_points("icl_looped", f"core:(0)x{iterations}", steps=steps, loop=loop, **settings | values)


def icl_deep(layers: int = 6, steps: int = 1400, **values: Any) -> RunConfig:
    """In-context linear regression with as many layers of their own as the looped model has iterations."""
    section = f"(0-{layers - 1})" if layers > 1 else "(0)"
    settings = {"layers": layers, "objective": LastMeanObjective(window=1)}
    return on_points("icl_deep", f"core:{section}x1", steps=steps, **settings | values)


def on_points(
    name: str,
    plan: str,
    *,
    steps: int,
    task: RegressionTask = LINEAR,
    layers: int = 1,
    width: int = 32,
    heads: int = 4,
    lr: float = 1e-2,
    batch_size: int = 64,
    loop: Loop | None = None,
    **values: Any,
) -> RunConfig:
    """A run of a GPT-2-like block on prompts of points.

    Rotary positions stand for the learned ones of the papers, so that a value is at the same distance from its point
    everywhere in the prompt.

    Args:
        name: of the run.
        plan: plan text with the loop core.
        steps: optimizer steps.
        task: what the prompts are drawn from.
        layers: physical layers.
        width: D.
        heads: attention heads.
        lr: of Muon; AdamW, for the read-in, the read-out and vectors, has a fifth of it.
        batch_size: prompts of a step.
        loop: components of the loop.
        **values: further fields of `RunConfig`.
    """
    model = RegressionModel(
        inputs=task.inputs,
        layers=layers,
        width=width,
        heads=heads,
        activation="gelu",
        norm="layer",
        plan=plan,
        loop=loop,
        max_length=2 * task.num_points,
    )
    settings: dict[str, Any] = {
        "optimizer": MuonConfig(lr=lr, weight_decay=0.0, adamw=AdamWConfig(lr=lr / 5, beta2=0.98, weight_decay=0.0)),
        "schedule": WsdSchedule(warmup=0.05, decay=0.3),
        "evaluation": Evaluation(every=250, rows=512, samples=2),
        "log_every": 50,
    }
    return RunConfig(
        name=name, model=model, data=RegressionData(task=task), steps=steps, batch_size=batch_size, **settings | values
    )

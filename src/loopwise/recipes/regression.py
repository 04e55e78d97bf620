"""In-context regression (2208.01066), looped as by Yang et al. (2311.12424)."""

from __future__ import annotations

from loopwise.loop.depth import CurriculumDepth, FixedDepth
from loopwise.loop.objective import LastMeanObjective
from loopwise.loop.state import ZerosState
from loopwise.loop.update import AddConfig
from loopwise.tasks.regression import LinearRegression
from loopwise.train.config import Evaluation, RunConfig
from loopwise.train.data.generated import RegressionData
from loopwise.train.models import Loop, RegressionModel
from loopwise.train.optim import AdamWConfig


def icl_looped(iterations: int = 12, window: int = 6, steps: int = 4000) -> RunConfig:
    """One layer looped: every iteration adds the prompt to the state; the loss reads the last ones."""
    model = RegressionModel(
        inputs=5,
        layers=1,
        width=64,
        heads=4,
        activation="gelu",
        norm="layer",
        positions="learned",
        max_length=64,
        plan=f"core:(0)x{iterations}",
        loop=Loop(state=ZerosState(), update=AddConfig(), turn_norm=True),
    )
    depth = CurriculumDepth(sampler=FixedDepth(total=iterations, max_grad=window), steps=steps // 2, start=window)
    return _points("icl_looped", model, steps, depth=depth, objective=LastMeanObjective(window=window))


def icl_deep(layers: int = 12, steps: int = 4000) -> RunConfig:
    """The same with as many untied layers, each visited once."""
    model = RegressionModel(
        inputs=5,
        layers=layers,
        width=64,
        heads=4,
        activation="gelu",
        norm="layer",
        positions="learned",
        max_length=64,
        plan=f"core:(0-{layers - 1})x1",
    )
    return _points("icl_deep", model, steps, objective=LastMeanObjective(window=1))


def _points(name: str, model: RegressionModel, steps: int, **values) -> RunConfig:
    return RunConfig(
        name=name,
        model=model,
        data=RegressionData(task=LinearRegression(inputs=5, num_points=16)),
        steps=steps,
        batch_size=64,
        optimizer=AdamWConfig(lr=1e-3, weight_decay=0.0),
        evaluation=Evaluation(every=1000, rows=512, samples=2),
        **values,
    )

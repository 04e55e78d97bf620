"""In-context linear regression by one looped layer and by as many layers of their own, at equal training FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.regression import LINEAR, icl_deep, icl_looped
from loopwise.study.experiment import Effect
from loopwise.study.scoring import RunResult
from loopwise.study.stats import difference_interval, mean_interval
from loopwise.tasks.regression import Points, least_squares, squared_error
from loopwise.train.config import Evaluation, RunConfig

LABELS = {"looped": "1 layer looped", "deep": "as many layers"}


def arms(scale: str) -> dict[str, RunConfig]:
    """The two models; FLOPs are equal, steps are not."""
    evaluation = Evaluation(every=200, rows=512, samples=0)
    return {
        "looped": icl_looped(6, 3, 2200, lr=0.012, evaluation=evaluation),
        "deep": icl_deep(6, 1400, lr=0.02, evaluation=evaluation),
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Squared errors on the same test prompts, in the unit of what there is to learn about them."""
    result = runs["deep"][0]
    batch = result.config.data.open(seed=0).held_out(0, result.scores["rows"], "test")
    assert batch.points is not None
    prompts = Points(xs_BNI=batch.points.xs_BNI.numpy(), ys_BN=batch.points.ys_BN.numpy())
    least = float(squared_error(prompts, least_squares(prompts)).mean())
    zero = float(squared_error(prompts, np.zeros(prompts.ys_BN.shape)).mean())
    errors = {name: [run.score("loss") for run in found] for name, found in runs.items()}
    shares = {name: [error / (zero - least) for error in found] for name, found in errors.items()}
    excess = (mean_interval(errors["deep"]).estimate - least) / (zero - least)
    return Effect(
        interval=difference_interval(shares["looped"], shares["deep"]),
        control_held=excess <= 0.25,
        control=f"the deep arm is {excess:.3f} of the way from least squares to predicting 0",
        scores={name: [error / LINEAR.inputs for error in found] for name, found in errors.items()},
        metric="squared error / d (mean over all points; smaller is better)",
        panels=[
            Panel(
                curves=[_curve(name, found) for name, found in runs.items()],
                x_label="training FLOPs",
                y_label="squared error / d, held out",
                log_x=True,
                level=(least / LINEAR.inputs, "least squares"),
            )
        ],
        details={
            "squared error / d of least squares": least / LINEAR.inputs,
            "squared error / d of predicting 0": zero / LINEAR.inputs,
        },
    )


def _curve(name: str, found: Sequence[RunResult]) -> Curve:
    points = list(zip(*[run.curve("eval/loss") for run in found], strict=True))
    means = [mean_interval([value / LINEAR.inputs for _, _, value in point]) for point in points]
    return Curve(
        label=LABELS[name],
        x=[point[0][1] for point in points],
        y=[item.estimate for item in means],
        low=[max(0.0, item.low) for item in means],
        high=[item.high for item in means],
    )

"""In-context linear regression by one looped layer, by as many layers of their own, and by one layer that runs once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.regression import LINEAR, icl_deep, icl_looped
from loopwise.study.experiment import Effect
from loopwise.study.scoring import RunResult
from loopwise.study.stats import difference_interval, mean_interval
from loopwise.tasks.regression import LinearRegression, Points, least_squares, squared_error
from loopwise.train.config import Evaluation, RunConfig
from loopwise.train.data.generated import RegressionData

LOOPS = (1, 2, 3, 4, 6, 8, 12, 24)
LARGE = LinearRegression(inputs=10, num_points=21)
LABELS = {"looped": "1 layer looped", "deep": "as many layers", "shallow": "1 layer once"}


def arms(scale: str) -> dict[str, RunConfig]:
    """The three models at a size."""
    large = scale == "gpu"
    sizes = {"task": LARGE, "width": 256, "heads": 8, "lr": 2e-3, "batch_size": 256} if large else {"task": LINEAR}
    depth, window, steps = (12, 6, 20000) if large else (6, 3, 1400)
    evaluation = Evaluation(every=0, rows=512, samples=0)
    looped = icl_looped(depth, window, steps, evaluation=replace(evaluation, loops=LOOPS), **sizes)
    return {
        "looped": looped,
        "deep": icl_deep(depth, steps, evaluation=evaluation, **sizes),
        "shallow": icl_deep(1, steps, evaluation=evaluation, **sizes),
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Squared errors on the same test prompts, in the unit of what there is to learn about them."""
    config = runs["looped"][0].config
    least_N, zero_N = _bounds(config, runs["looped"][0].scores["rows"])
    inputs, span = config.data.task.inputs, float((zero_N - least_N).mean())  # type: ignore[attr-defined]
    errors = {name: [run.score("loss") for run in found] for name, found in runs.items()}
    effect = difference_interval(
        [error / span for error in errors["looped"]], [error / span for error in errors["deep"]]
    )
    excess = (mean_interval(errors["deep"]).estimate - float(least_N.mean())) / span
    gain = difference_interval(
        [error / span for error in errors["shallow"]], [error / span for error in errors["deep"]]
    )
    points = range(1, len(least_N) + 1)
    by_point = {
        name: {str(point): [run.score("loss", by=("point", point)) / inputs for run in found] for point in points}
        for name, found in runs.items()
    }
    by_loops = {count: [run.score("loss", loops=count) / inputs for run in runs["looped"]] for count in LOOPS}
    trained = config.depth.expected  # type: ignore[union-attr]
    return Effect(
        interval=effect,
        control_held=excess <= 0.25 and gain.low >= 0.3,
        control=(
            f"the deep arm is {excess:.3f} of the way from least squares to predicting 0; 1 layer once is "
            f"{gain.estimate:.3f} [{gain.low:.3f}, {gain.high:.3f}] behind it"
        ),
        scores={name: [error / inputs for error in found] for name, found in errors.items()},
        metric="squared error / d (mean over all points; smaller is better)",
        panels=[_by_point(by_point, least_N / inputs), _by_loops(by_loops, errors, float(least_N.mean()), inputs)],
        details={
            "squared error / d of least squares, all points": float(least_N.mean()) / inputs,
            "squared error / d of predicting 0, all points": float(zero_N.mean()) / inputs,
            "squared error / d of least squares by point": (least_N / inputs).tolist(),
            "squared error / d at the last point": {name: by[str(len(least_N))] for name, by in by_point.items()},
            "looped minus deep at the last point": _interval(by_point, str(len(least_N))),
            "squared error / d of the looped arm by iterations": by_loops,
            "looped arm: at twice its trained iterations minus at them": [
                twice - once for twice, once in zip(by_loops[2 * int(trained)], by_loops[int(trained)], strict=True)
            ],
            "forward FLOPs per token": {name: _forward_flops(found[0]) for name, found in runs.items()},
        },
    )


def _bounds(config: RunConfig, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared error at every point of least squares and of predicting 0, on the test prompts that score the runs."""
    assert isinstance(config.data, RegressionData)
    batch = config.data.open(seed=config.seed).held_out(0, rows, "test")
    assert batch.points is not None
    prompts = Points(xs_BNI=batch.points.xs_BNI.numpy(), ys_BN=batch.points.ys_BN.numpy())
    zero_BN = np.zeros(prompts.ys_BN.shape)
    return squared_error(prompts, least_squares(prompts)), squared_error(prompts, zero_BN)


def _interval(by_point: Mapping[str, Mapping[str, Sequence[float]]], point: str) -> list[float]:
    found = difference_interval(by_point["looped"][point], by_point["deep"][point])
    return [found.estimate, found.low, found.high]


def _forward_flops(run: RunResult) -> float:
    return run.scores["loops"][run.scores["plan_loops"]]["forward_flops_per_token"]


def _by_point(by_point: Mapping[str, Mapping[str, Sequence[float]]], least_N: np.ndarray) -> Panel:
    curves = [
        _curve(LABELS[name], {int(point): scores for point, scores in by.items()}) for name, by in by_point.items()
    ]
    x = list(range(1, len(least_N) + 1))
    curves.append(Curve(label="least squares", x=x, y=least_N.tolist(), colour=6, dashed=True))
    return Panel(
        curves=curves, x_label="point of the prompt", y_label="squared error / d", title="after training, by point"
    )


def _by_loops(
    by_loops: Mapping[int, Sequence[float]], errors: Mapping[str, Sequence[float]], least: float, inputs: int
) -> Panel:
    deep = mean_interval(errors["deep"]).estimate / inputs
    ends = [min(by_loops), max(by_loops)]
    return Panel(
        curves=[
            _curve(LABELS["looped"], by_loops),
            Curve(label=LABELS["deep"], x=ends, y=[deep, deep], colour=1, dashed=True),
            Curve(label="least squares", x=ends, y=[least / inputs, least / inputs], colour=6, dashed=True),
        ],
        x_label="iterations in the test",
        y_label="squared error / d",
        title="mean over all points, at other depths",
        log_x=True,
        log_y=True,
    )


def _curve(label: str, by: Mapping[int, Sequence[float]]) -> Curve:
    found = [mean_interval(scores) for scores in by.values()]
    return Curve(
        label=label,
        x=list(by),
        y=[item.estimate for item in found],
        low=[max(0.0, item.low) for item in found],
        high=[item.high for item in found],
    )

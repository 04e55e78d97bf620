"""Accuracy against effective depth, made by looping and made of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.reasoning import on_task, p_hop
from loopwise.study.experiment import Effect
from loopwise.study.scoring import RunResult
from loopwise.study.stats import log_slope, mean_interval, ratio_interval
from loopwise.tasks.p_hop import PHop
from loopwise.train.config import RunConfig

DEPTHS = (1, 2, 4, 6)
LARGE = PHop(context=128, hops=tuple(range(9)), scored_from=48)


def arms(scale: str) -> dict[str, RunConfig]:
    """Looped and plain models of every depth."""
    made = {f"looped {depth}": _config(1, depth, scale) for depth in DEPTHS}
    return made | {f"plain {depth}": _config(depth, 1, scale) for depth in DEPTHS}


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Slopes per seed and their ratio."""
    scores = {name: [run.score("token_accuracy") for run in found] for name, found in runs.items()}
    slopes = {
        kind: [log_slope(DEPTHS, [scores[f"{kind} {depth}"][seed] for depth in DEPTHS]) for seed in range(_seeds(runs))]
        for kind in ("looped", "plain")
    }
    plain = mean_interval(slopes["plain"])
    held = plain.low > 0.1
    by_hops = {
        name: {
            str(hops): sum(run.score("token_accuracy", by=("hops", hops)) for run in found) / len(found)
            for hops in range(6)
        }
        for name, found in runs.items()
    }
    return Effect(
        interval=ratio_interval(slopes["looped"], slopes["plain"]),
        control_held=held,
        control=f"slope of the plain models {plain.estimate:.3f} [{plain.low:.3f}, {plain.high:.3f}] per e-fold",
        scores=scores,
        metric="token accuracy",
        panels=[
            Panel(
                curves=[_curve(kind, scores) for kind in ("looped", "plain")],
                x_label="effective depth (visits of a layer)",
                y_label="share of letters that are right",
                log_x=True,
            ),
            Panel(
                curves=[_curve_by_params(kind, scores, runs) for kind in ("looped", "plain")],
                x_label="parameters",
                y_label="share of letters that are right",
                log_x=True,
            ),
        ],
        details={"slopes": slopes, "token accuracy by hops": by_hops},
    )


def _config(layers: int, iterations: int, scale: str) -> RunConfig:
    if scale == "gpu":
        return on_task("p_hop", LARGE, layers, iterations, steps=5000, batch_size=128, width=128, lr=5e-3)
    return p_hop(layers, iterations)


def _seeds(runs: Mapping[str, Sequence[RunResult]]) -> int:
    return min(len(found) for found in runs.values())


def _curve(kind: str, scores: Mapping[str, Sequence[float]]) -> Curve:
    found = [mean_interval(scores[f"{kind} {depth}"]) for depth in DEPTHS]
    label = "1 layer looped" if kind == "looped" else "as many layers"
    return Curve(
        label=label,
        x=list(DEPTHS),
        y=[item.estimate for item in found],
        low=[max(item.low, 0.0) for item in found],
        high=[min(item.high, 1.0) for item in found],
    )


def _curve_by_params(
    kind: str, scores: Mapping[str, Sequence[float]], runs: Mapping[str, Sequence[RunResult]]
) -> Curve:
    names = [f"{kind} {depth}" for depth in DEPTHS]
    label = "1 layer looped" if kind == "looped" else "as many layers"
    values = [math.fsum(scores[name]) / len(scores[name]) for name in names]
    return Curve(label=label, x=[runs[name][0].params for name in names], y=values)

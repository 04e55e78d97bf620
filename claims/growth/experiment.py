"""Growth by three operators against full depth and half depth, all at equal FLOPs.

Half depth decides nothing. It is there because a growing model makes more steps for its FLOPs, and so does a shallow
one: what growth gains over half depth is what it gains by more than cheap steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loopwise.edit.operators import GradStack, Lidas, Midas
from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.one_budget import BLOCK, LAYERS, grown, plain
from loopwise.study.experiment import Effect
from loopwise.study.scoring import RunResult
from loopwise.study.stats import Interval, difference_interval, mean_interval, ratio_interval
from loopwise.train.config import RunConfig
from loopwise.train.estimate import estimate_run

HOPS = range(8)
GROWN = ("grad_stack", "midas", "lidas")


def arms(scale: str) -> dict[str, RunConfig]:
    """Full depth, half depth and three ways to grow."""
    return {
        "full depth": plain(),
        "half depth": plain(LAYERS // 2),
        "grad_stack": grown(GradStack(b=BLOCK)),
        "midas": grown(Midas(b=BLOCK)),
        "lidas": grown(Lidas(b=BLOCK)),
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Scores at equal FLOPs, and what growth saves in FLOPs and in time."""
    scores = {name: [run.score("token_accuracy") for run in found] for name, found in runs.items()}
    losses = {name: [run.score("loss") for run in found] for name, found in runs.items()}
    means = {name: mean_interval(found).estimate for name, found in scores.items()}
    by_hops = {
        name: {hops: [run.score("token_accuracy", by=("hops", hops)) for run in found] for hops in HOPS}
        for name, found in runs.items()
    }
    differences = {
        f"{name} minus {other}": _numbers(difference_interval(scores[name], scores[other]))
        for name in GROWN
        for other in ("full depth", "half depth")
    }
    return Effect(
        interval=difference_interval(scores["midas"], scores["full depth"]),
        control_held=means["full depth"] > 0.55 and max(means.values()) < 0.98,
        control=f"full depth has {means['full depth']:.3f}, the best arm {max(means.values()):.3f}",
        scores=scores,
        metric="token accuracy",
        panels=[_panel(by_hops)],
        details={
            "loss in nats": losses,
            "difference in token accuracy": differences,
            "difference in loss, midas minus full depth": _numbers(
                difference_interval(losses["midas"], losses["full depth"])
            ),
            "token accuracy by hops": {
                name: {str(hops): sum(found) / len(found) for hops, found in by.items()} for name, by in by_hops.items()
            },
            "gain at equal steps": {name: _gains(runs["full depth"], runs[name]) for name in GROWN},
        },
    )


def _gains(full: Sequence[RunResult], grown_runs: Sequence[RunResult]) -> dict[str, object]:
    """How many times the FLOPs and the processor time of a growing run full depth takes for as many steps."""
    steps = full[0].config.num_steps, grown_runs[0].config.num_steps
    spent = [estimate_run(found[0].config, flops_per_second=1.0).flops for found in (full, grown_runs)]
    flops = (spent[0] / steps[0]) / (spent[1] / steps[1])
    seconds = ratio_interval(
        [run.scores["core_seconds"] / steps[0] for run in full],
        [run.scores["core_seconds"] / steps[1] for run in grown_runs],
    )
    return {
        "FLOPs": flops,
        "processor time": _numbers(seconds),
        "time gain / FLOP gain": [value / flops for value in _numbers(seconds)],
    }


def _numbers(found: Interval) -> list[float]:
    return [found.estimate, found.low, found.high]


def _panel(by_hops: Mapping[str, Mapping[int, Sequence[float]]]) -> Panel:
    curves = []
    for name, by in by_hops.items():
        found = [mean_interval(scores) for scores in by.values()]
        curves.append(
            Curve(
                label=name,
                x=list(by),
                y=[item.estimate for item in found],
                low=[max(item.low, 0.0) for item in found],
                high=[min(item.high, 1.0) for item in found],
                dashed=name.endswith("depth"),
            )
        )
    return Panel(curves=curves, x_label="hops", y_label="share of letters that are right", title="equal FLOPs")

"""Between a loop and untied layers: offsets that start at zero, a reward for being alike, a stack of copies.

The reward decides; the other arms are measured beside it at equal FLOPs. The strict loop is that of the claim
`life_cycle`, untied is full depth of the claim `growth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loopwise.measure.similarity import weight_similarity
from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.one_budget import LAYERS, cosine_tie, looped, offsets, plain, stacked
from loopwise.study.experiment import Effect
from loopwise.study.probe import weights_at
from loopwise.study.scoring import RunResult
from loopwise.study.stats import difference_interval, mean_interval
from loopwise.train.config import RunConfig

HOPS = range(8)
APART = LAYERS // 2


def arms(scale: str) -> dict[str, RunConfig]:
    """From tied to untied."""
    return {
        "strict loop": looped(),
        "offsets": offsets(),
        "cosine tie": cosine_tie(10.0),
        "stacked": stacked(0.35),
        "untied": plain(),
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Scores at equal FLOPs, and how alike the layers have become."""
    scores = {name: [run.score("token_accuracy") for run in found] for name, found in runs.items()}
    alike = {name: [_alike(run) for run in runs[name]] for name in ("cosine tie", "stacked", "untied")}
    level = mean_interval(scores["untied"]).estimate
    held = 0.55 < level < 0.98 and min(alike["cosine tie"]) >= 0.9 and max(alike["untied"]) < 0.1
    against = {
        f"{name} minus {other}": difference_interval(scores[name], scores[other])
        for other in ("untied", "strict loop")
        for name in scores
        if name != other
    }
    return Effect(
        interval=against["cosine tie minus untied"],
        control_held=held,
        control=(
            f"untied has {level:.3f}; the least mean cosine with the reward is {min(alike['cosine tie']):.3f}, the "
            f"largest without it {max(alike['untied']):.3f}"
        ),
        scores=scores,
        metric="token accuracy",
        panels=[_panel(runs)],
        details={
            "differences": {name: [item.estimate, item.low, item.high] for name, item in against.items()},
            "mean cosine of layers 4 apart": alike,
            "loss in nats": {name: [run.score("loss") for run in found] for name, found in runs.items()},
        },
    )


def _alike(run: RunResult) -> float:
    return weight_similarity(weights_at(run, run.config.num_steps)).mean().lag(APART)


def _panel(runs: Mapping[str, Sequence[RunResult]]) -> Panel:
    curves = []
    for name, found in runs.items():
        means = [mean_interval([run.score("token_accuracy", by=("hops", hops)) for run in found]) for hops in HOPS]
        curves.append(
            Curve(
                label=name,
                x=list(HOPS),
                y=[item.estimate for item in means],
                low=[max(item.low, 0.0) for item in means],
                high=[min(item.high, 1.0) for item in means],
                dashed=name == "untied",
            )
        )
    return Panel(curves=curves, x_label="hops", y_label="share of letters that are right", title="equal FLOPs")

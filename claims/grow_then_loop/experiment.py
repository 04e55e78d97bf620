"""Extra passes of the middle at inference: after growth, after full depth, and after a cooldown that trains them.

A cooldown spends the last 30 % of the same FLOPs on 10 visits instead of 8. Runs without it are those of the claim
`growth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loopwise.edit.operators import Midas
from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.one_budget import BLOCK, grown, looped_cooldown, plain
from loopwise.study.experiment import Effect
from loopwise.study.probe import scored_under
from loopwise.study.scoring import RunResult
from loopwise.study.stats import difference_interval, mean_interval
from loopwise.train.config import RunConfig

EXTRA = range(5)
COOLED = "midas, looped cooldown"
PLAN = "0-3 core:(4-5)x{} 6-7"
"""The second of the two middle blocks, which the cooldown trains."""


def arms(scale: str) -> dict[str, RunConfig]:
    """Grown and full depth, without and with a looped cooldown."""
    return {
        "full depth": plain(),
        "midas": grown(Midas(b=BLOCK)),
        "full depth, looped cooldown": looped_cooldown(),
        COOLED: looped_cooldown(Midas(b=BLOCK)),
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Scores with 0 to 4 extra passes."""
    by = {
        name: [scored_under(run, [PLAN.format(1 + extra) for extra in EXTRA]) for run in found]
        for name, found in runs.items()
    }
    scores = {
        name: {extra: [item[PLAN.format(1 + extra)]["token_accuracy"] for item in found] for extra in EXTRA}
        for name, found in by.items()
    }
    effect = mean_interval(_differences(scores["midas"][1], scores["midas"][0]))
    control = mean_interval(_differences(scores[COOLED][1], scores[COOLED][0]))
    trained = {name: [run.score("token_accuracy") for run in found] for name, found in runs.items()}
    cooled = difference_interval(trained[COOLED], trained["full depth, looped cooldown"])
    return Effect(
        interval=effect,
        control_held=control.low > 0,
        control=f"the pass of a cooldown gains {control.estimate:.4f} [{control.low:.4f}, {control.high:.4f}]",
        scores=trained,
        metric="token accuracy under the plan of the last stage",
        panels=[_panel(scores)],
        details={
            "token accuracy by extra passes": scores,
            "change by extra passes: mean, low, high": {
                name: {str(extra): _change(found[0], found[extra]) for extra in EXTRA if extra}
                for name, found in scores.items()
            },
            "by hops, 0 to 7, and extra passes": {
                name: {str(extra): _by_hops([item[PLAN.format(1 + extra)] for item in found]) for extra in EXTRA}
                for name, found in by.items()
            },
            "midas minus full depth, both with looped cooldown": [cooled.estimate, cooled.low, cooled.high],
        },
    )


def _by_hops(found: Sequence[Mapping[str, Any]]) -> list[float]:
    by = [item["token_by"]["hops"] for item in found]
    return [sum(item[hops] for item in by) / len(by) for hops in sorted(by[0], key=int)]


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def _change(before: Sequence[float], after: Sequence[float]) -> list[float]:
    found = mean_interval(_differences(after, before))
    return [found.estimate, found.low, found.high]


def _panel(scores: Mapping[str, Mapping[int, Sequence[float]]]) -> Panel:
    curves = []
    for name, by in scores.items():
        means = [mean_interval(found) for found in by.values()]
        curves.append(
            Curve(
                label=name,
                x=list(by),
                y=[item.estimate for item in means],
                low=[max(item.low, 0.0) for item in means],
                high=[min(item.high, 1.0) for item in means],
                dashed=name.startswith("full"),
            )
        )
    return Panel(curves=curves, x_label="extra passes of layers 4-5", y_label="share of letters that are right")

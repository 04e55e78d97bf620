"""When to loop: from the start, switched on, after training, after growth, or as a way to grow. All at equal FLOPs.

Every life ends with 8 visits of layers: 4 layers twice, or 8 layers. Midas and full depth are those of the claim
`growth`, for reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loopwise.edit.operators import Midas
from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.one_budget import (
    BLOCK,
    LAYERS,
    TWICE,
    grow_then_loop,
    grown,
    loop_untie_grow,
    looped,
    plain,
    switched_on,
)
from loopwise.study.experiment import Effect
from loopwise.study.probe import scored_under
from loopwise.study.scoring import RunResult
from loopwise.study.stats import difference_interval, mean_interval
from loopwise.train.config import RunConfig

HOPS = range(8)
START, AT_35, AFTER = "loop from the start", "loop on at 35 %", "loop after training"
ONCE = "core:(0-3)x1"


def arms(scale: str) -> dict[str, RunConfig]:
    """Six lives, and two references."""
    return {
        START: looped(),
        AT_35: switched_on(0.35),
        "loop on at 70 %": switched_on(0.7),
        AFTER: plain(LAYERS // 2),
        "grow then loop": grow_then_loop(),
        "loop, untie, grow": loop_untie_grow(),
        "midas": grown(Midas(b=BLOCK)),
        "full depth": plain(),
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Scores at the end of every life."""
    scores = {name: [run.score("token_accuracy") for run in found] for name, found in runs.items()}
    never = scores[AFTER]
    scores[AFTER] = _under(runs[AFTER], TWICE)
    used = mean_interval([twice - once for twice, once in zip(scores[AT_35], _under(runs[AT_35], ONCE), strict=True)])
    best = max(mean_interval(found).estimate for found in scores.values())
    against = {name: difference_interval(found, scores[START]) for name, found in scores.items() if name != START}
    return Effect(
        interval=against[AT_35],
        control_held=used.low > 0.05 and best < 0.98,
        control=(
            f"with one pass the arm loses {used.estimate:.3f} [{used.low:.3f}, {used.high:.3f}]; "
            f"the best arm has {best:.3f}"
        ),
        scores=scores,
        metric="token accuracy",
        panels=[_panel(runs)],
        details={
            "minus the loop from the start": {name: [it.estimate, it.low, it.high] for name, it in against.items()},
            "loop after training, when it is not looped": never,
            "loop on at 35 %, with one pass": _under(runs[AT_35], ONCE),
            "loss in nats": {name: [run.score("loss") for run in found] for name, found in runs.items()},
            "steps": {name: [stage.steps for stage in found[0].config.all_stages] for name, found in runs.items()},
        },
    )


def _under(found: Sequence[RunResult], plan: str) -> list[float]:
    return [scored_under(run, [plan])[plan]["token_accuracy"] for run in found]


def _panel(runs: Mapping[str, Sequence[RunResult]]) -> Panel:
    curves = []
    for name, found in runs.items():
        label, plan = name, TWICE if name == AFTER else None
        by = [_by_hops(run, plan) for run in found]
        mean = [sum(item[hops] for item in by) / len(by) for hops in HOPS]
        curves.append(Curve(label=label, x=list(HOPS), y=mean, dashed=name in ("midas", "full depth")))
    return Panel(curves=curves, x_label="hops", y_label="share of letters that are right", title="equal FLOPs")


def _by_hops(run: RunResult, plan: str | None) -> list[float]:
    if plan is None:
        return [run.score("token_accuracy", by=("hops", hops)) for hops in HOPS]
    return [scored_under(run, [plan])[plan]["token_by"]["hops"][str(hops)] for hops in HOPS]

"""Extra passes of the middle at inference: after growth, after full depth, and after a cooldown that trains them.

A cooldown spends the last 30 % of the same FLOPs on 10 visits instead of 8. Runs without it are those of the claim
`growth`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
BLOCKS = {
    "first middle block": "0-1 (2-3)x{} 4-7",
    "second middle block": "0-3 (4-5)x{} 6-7",
    "both": "0-1 (2-5)x{} 6-7",
}
LOOPED = "second middle block"
"""The one that the cooldown trains."""


def arms(scale: str) -> dict[str, RunConfig]:
    """Grown and full depth, without and with a looped cooldown."""
    return {
        "full depth": plain(),
        "midas": grown(Midas(b=BLOCK)),
        "full depth, looped cooldown": looped_cooldown(),
        COOLED: looped_cooldown(Midas(b=BLOCK)),
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """Scores with 0 to 4 extra passes of three parts of the middle."""
    scores = {
        block: {name: {extra: _scores(found, text, extra) for extra in EXTRA} for name, found in runs.items()}
        for block, text in BLOCKS.items()
    }
    here = scores[LOOPED]
    changes = {
        block: {name: {str(extra): _change(by[0], by[extra]) for extra in EXTRA if extra} for name, by in found.items()}
        for block, found in scores.items()
    }
    effect = mean_interval(_differences(here["midas"][1], here["midas"][0]))
    control = mean_interval(_differences(here[COOLED][1], here[COOLED][0]))
    trained = {name: [run.score("token_accuracy") for run in found] for name, found in runs.items()}
    cooled = difference_interval(trained[COOLED], trained["full depth, looped cooldown"])
    return Effect(
        interval=effect,
        control_held=control.low > 0,
        control=f"the pass that a cooldown has trained gains {control.estimate:.4f} [{control.low:.4f}, {control.high:.4f}]",
        scores=trained,
        metric="token accuracy under the plan of the last stage",
        panels=[_panel(block, found) for block, found in scores.items()],
        details={
            "change by extra passes: mean, low, high": changes,
            "by hops, midas, second middle block": {
                str(extra): _by_hops(runs["midas"], BLOCKS[LOOPED], extra) for extra in EXTRA
            },
            "midas minus full depth, both with looped cooldown": [cooled.estimate, cooled.low, cooled.high],
        },
    )


def _scores(found: Sequence[RunResult], text: str, extra: int) -> list[float]:
    plans = [text.format(1 + count) for count in EXTRA]
    return [scored_under(run, plans)[plans[extra]]["token_accuracy"] for run in found]


def _by_hops(found: Sequence[RunResult], text: str, extra: int) -> list[float]:
    plan = text.format(1 + extra)
    by = [scored_under(run, [plan])[plan]["token_by"]["hops"] for run in found]
    return [sum(item[hops] for item in by) / len(by) for hops in sorted(by[0], key=int)]


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def _change(before: Sequence[float], after: Sequence[float]) -> list[float]:
    found = mean_interval(_differences(after, before))
    return [found.estimate, found.low, found.high]


def _panel(block: str, found: Mapping[str, Mapping[int, Sequence[float]]]) -> Panel:
    curves = []
    for name, by in found.items():
        means = [mean_interval(scores) for scores in by.values()]
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
    return Panel(curves=curves, x_label="extra passes", y_label="share of letters that are right", title=block)

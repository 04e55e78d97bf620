"""Accuracy against the number of iterations, after training at one depth and at random depths.

The effect is measured on walks around a cycle. Two arms on p-hop induction and one without injection are measured
beside it and reported in the details; they decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.reasoning import HOPS, cycle_walk, on_task, random_depth
from loopwise.study.experiment import Effect
from loopwise.study.scoring import RunResult
from loopwise.study.stats import Interval, difference_interval, mean_interval
from loopwise.tasks.cycle_walk import CycleWalk
from loopwise.train.config import Evaluation, RunConfig

MOST = 8
LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 18, 24)
FIXED = {"cycle": 4, "hops": 6}


def arms(scale: str) -> dict[str, RunConfig]:
    """Random and fixed depth with the same block and injection; fixed depth without injection; both on p-hop."""
    large = scale == "gpu"
    loop = {name: value for name, value in random_depth(MOST).items() if name != "depth"}
    walk = {"steps": 6000, "batch_size": 256, "width": 128, "task": CycleWalk(nodes=16)} if large else {}
    hops = {"steps": 6000, "batch_size": 128, "width": 128} if large else {"steps": 1000, "batch_size": 32}
    made = {
        "cycle random": cycle_walk(1, FIXED["cycle"], **walk, **random_depth(MOST)),
        "cycle fixed": cycle_walk(1, FIXED["cycle"], **walk, **loop),
        "cycle fixed plain": cycle_walk(1, FIXED["cycle"], **walk),
        "hops random": on_task("p_hop", HOPS, 1, FIXED["hops"], **hops, **random_depth(MOST)),
        "hops fixed": on_task("p_hop", HOPS, 1, FIXED["hops"], **hops, **loop),
    }
    return {
        name: replace(config, evaluation=Evaluation(every=0, rows=512, loops=LOOPS, samples=0))
        for name, config in made.items()
    }


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """What each arm loses at three times its greatest trained depth."""
    curves = {
        name: {count: [run.score("token_accuracy", loops=count) for run in found] for count in LOOPS}
        for name, found in runs.items()
    }
    trained = {name: MOST if "random" in name else FIXED[name.split()[0]] for name in runs}
    lost = {
        name: [before - after for before, after in zip(by[trained[name]], by[3 * trained[name]], strict=True)]
        for name, by in curves.items()
    }
    effect = difference_interval(lost["cycle fixed"], lost["cycle random"])
    learned = {name: mean_interval(by[trained[name]]).estimate for name, by in curves.items()}
    gain = mean_interval(curves["cycle random"][MOST]).estimate - mean_interval(curves["cycle random"][1]).estimate
    held = learned["cycle random"] >= 0.9 and learned["cycle fixed"] >= 0.9 and gain >= 0.3
    return Effect(
        interval=effect,
        control_held=held,
        control=(
            f"accuracy at the trained depth {learned['cycle random']:.3f} (random) and {learned['cycle fixed']:.3f} "
            f"(fixed); random gains {gain:.3f} from 1 iteration to {MOST}"
        ),
        scores={name: by[trained[name]] for name, by in curves.items()},
        metric="token accuracy at the greatest trained depth",
        panels=[_panel("cycle", "walks of 1 to 4 steps", curves), _panel("hops", "0 to 5 hops", curves)],
        details={
            "greatest trained depth": trained,
            "accuracy by iterations": curves,
            "lost at three times the trained depth": lost,
            "difference without injection": _interval(
                difference_interval(lost["cycle fixed plain"], lost["cycle random"])
            ),
            "difference on p-hop": _interval(difference_interval(lost["hops fixed"], lost["hops random"])),
        },
    )


def _panel(task: str, title: str, curves: Mapping[str, Mapping[int, Sequence[float]]]) -> Panel:
    labels = {
        "random": f"random depth, 1 to {MOST}",
        "fixed": f"fixed depth ({FIXED['cycle']} on the left, {FIXED['hops']} on the right)",
        "fixed plain": "fixed depth without injection",
    }
    found = []
    for name, by in curves.items():
        if name.startswith(task):
            means = [mean_interval(values) for values in by.values()]
            found.append(
                Curve(
                    label=labels[name.removeprefix(task).strip()],
                    x=list(by),
                    y=[item.estimate for item in means],
                    low=[max(0.0, item.low) for item in means],
                    high=[min(1.0, item.high) for item in means],
                )
            )
    return Panel(curves=found, x_label="iterations", y_label="share of symbols that are right", title=title, log_x=True)


def _interval(found: Interval) -> list[float]:
    return [found.estimate, found.low, found.high]

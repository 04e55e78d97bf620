"""k layers looped L times against k layers and k L layers, on addition and on p-hop induction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loopwise.plots.curves import Curve, Panel
from loopwise.recipes.reasoning import addition, on_task, p_hop
from loopwise.study.experiment import Effect
from loopwise.study.scoring import RunResult
from loopwise.study.stats import difference_interval, mean_interval
from loopwise.tasks.addition import Addition
from loopwise.tasks.p_hop import PHop
from loopwise.train.config import RunConfig

LOOPS = {"addition": 4, "p_hop": 6}
METRIC = {"addition": "accuracy", "p_hop": "token_accuracy"}
SHOWN = {"addition": ("eval/accuracy", "exact sums"), "p_hop": ("eval/token_accuracy", "right letters")}


def arms(scale: str) -> dict[str, RunConfig]:
    """For each task 1 layer, 1 layer looped, and as many layers as it has iterations."""
    made = {}
    for task, depth in LOOPS.items():
        for layers, iterations in ((1, 1), (1, depth), (depth, 1)):
            made[f"{task} {layers}x{iterations}"] = _config(task, layers, iterations, scale)
    return made


def measure(runs: Mapping[str, Sequence[RunResult]]) -> Effect:
    """The looped model against the deep one, on the task where it does worse."""
    scores = {name: [run.score(METRIC[name.split()[0]]) for run in found] for name, found in runs.items()}
    against_deep, depth_decides = {}, {}
    for task, depth in LOOPS.items():
        shallow, looped, deep = (scores[f"{task} {arm}"] for arm in ("1x1", f"1x{depth}", f"{depth}x1"))
        against_deep[task] = difference_interval(looped, deep)
        depth_decides[task] = difference_interval(deep, shallow)
    worst = min(against_deep.values(), key=lambda interval: interval.low)
    gains = ", ".join(
        f"{task} {item.estimate:.3f} [{item.low:.3f}, {item.high:.3f}]" for task, item in depth_decides.items()
    )
    return Effect(
        interval=worst,
        control_held=all(item.low >= 0.2 for item in depth_decides.values()),
        control=f"L layers over 1 layer: {gains}",
        scores=scores,
        metric="exact accuracy (addition), token accuracy (p-hop)",
        panels=[_panel(task, runs) for task in LOOPS],
        details={
            "looped minus deep": {task: [item.estimate, item.low, item.high] for task, item in against_deep.items()},
            "deep minus shallow": {task: [item.estimate, item.low, item.high] for task, item in depth_decides.items()},
            "mean": {name: mean_interval(values).estimate for name, values in scores.items()},
        },
    )


def _config(task: str, layers: int, iterations: int, scale: str) -> RunConfig:
    if scale != "gpu":
        return (addition if task == "addition" else p_hop)(layers, iterations)
    if task == "addition":
        drawn = Addition(operands=(2, 4, 8, 16, 32))
        return on_task("addition", drawn, layers, iterations, steps=20000, batch_size=512, width=256, lr=5e-3)
    drawn = PHop(context=128, hops=tuple(range(9)), scored_from=48)
    return on_task("p_hop", drawn, layers, iterations, steps=5000, batch_size=128, width=128, lr=5e-3)


def _panel(task: str, runs: Mapping[str, Sequence[RunResult]]) -> Panel:
    name, what = SHOWN[task]
    depth, curves = LOOPS[task], []
    for arm, label in (("1x1", "1 layer"), (f"1x{depth}", "1 layer, L times"), (f"{depth}x1", "L layers")):
        found = [run.curve(name) for run in runs[f"{task} {arm}"]]
        points = list(zip(*found, strict=True))
        means = [mean_interval([value for _, _, value in point]) for point in points]
        curves.append(
            Curve(
                label=label,
                x=[point[0][1] for point in points],
                y=[item.estimate for item in means],
                low=[max(0.0, item.low) for item in means],
                high=[min(1.0, item.high) for item in means],
            )
        )
    return Panel(
        curves=curves, x_label="training FLOPs", y_label=f"share of {what}", log_x=True, title=f"{task}, L = {depth}"
    )

"""Train 1 layer, 1 layer looped and 4 layers on a task where depth decides, and compare them: `make quickstart`.

A row is a step count k, the successor of every symbol of a random cycle, and all symbols; at each of them the symbol k
steps further is to be said. Two processes train the three models, which takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from loopwise.io.amounts import amount
from loopwise.plots.curves import Curve, Panel, draw_panels
from loopwise.recipes.quickstart import HOPS, deep, looped, shallow
from loopwise.study.pool import Job, run_all

LABELS = {"shallow": "1 layer", "looped": f"1 layer, {HOPS} times", "deep": f"{HOPS} layers"}


def main() -> int:
    """Train, print the table, and return 0 if the looped model is what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("quickstart_out"), help="where runs and the picture go")
    parser.add_argument("--jobs", type=int, default=2, help="how many models are trained at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data")
    options = parser.parse_args()
    began = time.perf_counter()
    configs = {recipe.__name__: recipe() for recipe in (looped, deep, shallow)}
    jobs = [Job(name=name, config=replace(config, seed=options.seed)) for name, config in configs.items()]
    found = {result.name: result for result in run_all(jobs, options.out / "runs", num_workers=options.jobs)}
    runs = {name: found[name] for name in LABELS}
    print(f"\n{'':<18} {'parameters':>11} {'FLOPs':>9}  right symbols  by steps around the cycle")
    for name, run in runs.items():
        by = "  ".join(
            f"{steps}: {run.score('token_accuracy', by=('hops', steps)):.2f}" for steps in range(1, HOPS + 1)
        )
        share = run.score("token_accuracy")
        print(f"{LABELS[name]:<18} {amount(run.params):>11} {amount(run.flops):>9}  {share:>13.3f}  {by}")
    right = {name: run.score("token_accuracy") for name, run in runs.items()}
    picture = draw_panels([_panel(runs, "step"), _panel(runs, "FLOPs")], options.out / "quickstart.png")
    (options.out / "quickstart.json").write_text(json.dumps(right, indent=2) + "\n", encoding="utf-8")
    share = runs["looped"].params / runs["deep"].params
    seconds = time.perf_counter() - began
    print(f"\nThe looped model has {share:.0%} of the parameters of the deep one. {seconds:.0f} s; {picture}")
    matches = right["looped"] > right["deep"] - 0.05
    beats = right["looped"] > right["shallow"] + 0.2
    print(f"{'holds' if matches else 'FAILS'}: looped matches {HOPS} layers to 5 points")
    print(f"{'holds' if beats else 'FAILS'}: looped beats 1 layer by 20 points")
    return 0 if matches and beats else 1


def _panel(runs: dict, against: str) -> Panel:
    curves = []
    for name, run in runs.items():
        points = run.curve("eval/token_accuracy")
        x = [step if against == "step" else flops for step, flops, _ in points]
        curves.append(Curve(label=LABELS[name], x=x, y=[value for _, _, value in points]))
    label = "optimizer step" if against == "step" else "training FLOPs"
    return Panel(
        curves=curves, x_label=label, y_label="share of right symbols", log_x=against != "step", level=(1 / 8, "chance")
    )


if __name__ == "__main__":
    sys.exit(main())

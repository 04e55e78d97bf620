"""Whether growth saves as much time as FLOPs: training that grows by MIDAS beside training at full depth.

Both are the runs of the claim `growth`, cut to ten steps. One side trains 1, 2, 3 and 4 steps at 2, 4, 6 and 8 layers,
the other ten steps at 8, one right after the other. The three edits between the stages (with their probes) are timed
where they happen, and count as much as in the whole run: three of them in its hundreds of steps. The ratio is (time of
growing / time of full depth) over (FLOPs of growing / FLOPs of full depth): 1 is a gain in time as large as that in
FLOPs, 1 / 0.9 nine tenths of it.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from _timing import finish, interleaved_pairs, parser, ratio_entry, seconds

from loopwise.edit.operators import Midas
from loopwise.edit.schedule import prop_alpha
from loopwise.recipes.one_budget import BLOCK, LAYERS, TENTHS, grown, plain
from loopwise.train.config import RunConfig, Stage
from loopwise.train.growth import grow
from loopwise.train.run import Run

MIN_SHARE = 0.9


def trained(config: RunConfig, edit_weight: float) -> tuple[float, float]:
    """Seconds and FLOPs of a run in memory; edits count with a weight."""
    run = Run(config, None)
    spent = 0.0
    for index, stage in enumerate(config.all_stages):
        if index:
            spent += edit_weight * seconds(lambda index=index: run.begin_stage(index))
        for _ in range(stage.steps):
            spent += seconds(run.step)
    return spent, run.carry.flops


def main() -> int:
    """Measure and write the result; the exit code says whether the target holds."""
    options = parser(__doc__ or "", "growth").parse_args()
    torch.set_num_threads(1)
    whole = grown(Midas(b=BLOCK))
    growing = replace(whole, stages=grow(Midas(b=BLOCK), prop_alpha(TENTHS, LAYERS // BLOCK, 1)))
    full = replace(plain(), stages=(Stage(steps=TENTHS),))
    weight = TENTHS / whole.num_steps
    share = trained(growing, weight)[1] / trained(full, weight)[1]
    print(f"growing takes {share:.4f} of the FLOPs of full depth: a gain of {1 / share:.3f}")
    times = interleaved_pairs(
        lambda: trained(growing, weight)[0] / share, lambda: trained(full, weight)[0], pairs=options.pairs
    )
    entry = ratio_entry("growth: time over FLOPs, midas / full depth", times, target=round(1 / MIN_SHARE, 4))
    return finish([entry | {"flop_gain": round(1 / share, 4)}], options.out, "python benchmarks/growth.py")


if __name__ == "__main__":
    sys.exit(main())

"""Does depth decide, and does it matter whether the layers differ? 1 layer, 1 layer looped and 4 layers on one task.

A row is a hop count k, the table of a random cycle over 8 symbols, and all symbols as starts; at each start the symbol
k hops further is to be said. One layer can look up one hop. `make quickstart` trains the three and compares them.
"""

from __future__ import annotations

from loopwise.tasks.cycle_walk import CycleWalk
from loopwise.train.config import Evaluation, RunConfig, Saving
from loopwise.train.data.generated import TaskData
from loopwise.train.models import DecoderModel
from loopwise.train.optim import AdamWConfig, MuonConfig, WsdSchedule

HOPS = 4


def shallow() -> RunConfig:
    """Walks around a cycle with 1 layer."""
    return _walk("shallow", layers=1)


def looped() -> RunConfig:
    """Walks around a cycle with 1 layer that runs 4 times."""
    return _walk("looped", layers=1, plan=f"core:(0)x{HOPS}")


def deep() -> RunConfig:
    """Walks around a cycle with 4 layers."""
    return _walk("deep", layers=HOPS)


def _walk(name: str, **sizes) -> RunConfig:
    return RunConfig(
        name=name,
        model=DecoderModel(
            width=64, heads=4, activation="gelu", positions="learned", max_length=32, tie_embeddings=True, **sizes
        ),
        data=TaskData(task=CycleWalk(nodes=8, hops=tuple(range(1, HOPS + 1)))),
        steps=1200,
        batch_size=64,
        optimizer=MuonConfig(lr=1e-2, weight_decay=0.01, adamw=AdamWConfig(lr=2e-3, beta2=0.98, weight_decay=0.01)),
        schedule=WsdSchedule(warmup=0.04, decay=0.25, floor=0.0),
        evaluation=Evaluation(every=200, rows=512),
        saving=Saving(every=400),
        log_every=50,
    )

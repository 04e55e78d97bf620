"""Reasoning tasks on which depth decides, at sizes that two CPU cores train in a minute or two.

The functions take sizes, so that claims and comparisons make their arms from them.
"""

from __future__ import annotations

from typing import Any

from loopwise.loop.depth import UniformDepth
from loopwise.loop.state import ZerosState
from loopwise.loop.update import AddConfig
from loopwise.tasks.addition import Addition
from loopwise.tasks.base import Task
from loopwise.tasks.cycle_walk import CycleWalk
from loopwise.tasks.igsm import Igsm
from loopwise.tasks.p_hop import PHop
from loopwise.train.config import Evaluation, RunConfig, Saving
from loopwise.train.data.generated import TaskData
from loopwise.train.models import DecoderModel, Loop
from loopwise.train.optim import AdamWConfig, MuonConfig, WsdSchedule

HOPS = PHop(context=40, hops=tuple(range(6)), scored_from=16)


def p_hop(layers: int = 1, iterations: int = 6, **values: Any) -> RunConfig:
    """p-hop induction (2402.09268, 2502.17416) with 1 layer that runs 6 times: 0 to 5 hops in 40 letters."""
    return on_task("p_hop", HOPS, layers, iterations, **dict[str, Any](steps=800, batch_size=32) | values)


def cycle_walk(
    layers: int = 1, iterations: int = 4, task: Task | None = None, name: str = "cycle_walk", **values: Any
) -> RunConfig:
    """Walks of 1 to 4 steps around a cycle of 8 symbols with 1 layer that runs 4 times."""
    settings = {"steps": 1200, "batch_size": 64, "positions": "learned"} | values
    return on_task(name, task or CycleWalk(), layers, iterations, **settings)


def addition(layers: int = 1, iterations: int = 4, **values: Any) -> RunConfig:
    """n-ary addition (2502.17416) with 1 layer that runs 4 times: 2 or 3 numbers of 2 digits."""
    task = Addition(operands=(2, 3), digits=2)
    return on_task("addition", task, layers, iterations, **dict[str, Any](steps=2000, batch_size=64) | values)


def igsm(layers: int = 1, iterations: int = 4, **values: Any) -> RunConfig:
    """Symbolic i-GSM (2502.17416) with 1 layer that runs 4 times."""
    return on_task("igsm", Igsm(), layers, iterations, **dict[str, Any](steps=3000, batch_size=64) | values)


def tour() -> RunConfig:
    """The model of `loopwise tour`: walks with 1 to 8 iterations in training, so that answers form step by step."""
    settings = {"steps": 1400, "evaluation": Evaluation(every=200, rows=256, loops=(1, 2, 3, 4, 8))}
    return cycle_walk(1, 6, name="tour", **settings, **random_depth(8))


def random_depth(most: int = 8) -> dict[str, Any]:
    """Fields of a loop that is trained at 1 to `most` iterations, starts at zero and adds its input every time."""
    return {
        "depth": UniformDepth(low=1, high=most),
        "loop": Loop(state=ZerosState(), update=AddConfig()),
        "placement": "stream",
    }


def on_task(
    name: str,
    task: Task,
    layers: int,
    iterations: int,
    *,
    steps: int,
    batch_size: int,
    lr: float = 1e-2,
    width: int = 64,
    placement: str = "pre",
    loop: Loop | None = None,
    positions: str = "rope",
    **values: Any,
) -> RunConfig:
    """A run of `layers` layers that are visited `iterations` times, on a task.

    Args:
        name: of the run.
        task: what to learn.
        layers: physical layers k.
        iterations: L; the effective depth is k L.
        steps: optimizer steps.
        batch_size: rows of a step.
        lr: of Muon; AdamW, for embeddings and vectors, has a fifth of it.
        width: D, of heads of 16 channels.
        placement: where norms stand.
        positions: "rope" or "learned".
        loop: components of the loop.
        **values: further fields of `RunConfig`.
    """
    section = f"(0-{layers - 1})" if layers > 1 else "(0)"
    model = DecoderModel(
        layers=layers,
        width=width,
        heads=width // 16,
        activation="gelu",
        placement=placement,  # type: ignore[arg-type]
        positions=positions,  # type: ignore[arg-type]
        plan=f"core:{section}x{iterations}",
        loop=loop,
        max_length=task.length,
        tie_embeddings=True,
    )
    settings: dict[str, Any] = {
        "optimizer": MuonConfig(lr=lr, weight_decay=0.01, adamw=AdamWConfig(lr=lr / 5, beta2=0.98, weight_decay=0.01)),
        "schedule": WsdSchedule(warmup=0.05, decay=0.25),
        "evaluation": Evaluation(every=250, rows=512),
        "saving": Saving(every=500),
        "log_every": 50,
    }
    return RunConfig(
        name=name, model=model, data=TaskData(task=task), steps=steps, batch_size=batch_size, **settings | values
    )

"""One budget of FLOPs, many lives: models that are deep from the start, grow, loop and untie while they train.

All of them learn p-hop induction for as many FLOPs as `STEPS` steps of 8 layers take, and most end as 8 visits of
layers. The claims about growth and looping take their arms from here, so that equal runs are done once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from loopwise.edit.operators import BlockOperator, Midas, Operator, Stack
from loopwise.edit.schedule import prop_alpha
from loopwise.edit.surgery import Recursive, Untie
from loopwise.recipes.reasoning import on_task
from loopwise.tasks.p_hop import PHop
from loopwise.train.config import Evaluation, RunConfig, Saving, Stage
from loopwise.train.estimate import estimate_run
from loopwise.train.growth import grow
from loopwise.train.objectives import CosineTie

TASK = PHop(context=44, hops=tuple(range(8)), scored_from=20)
LAYERS, BLOCK = 8, 2
STEPS = 450
"""Steps of the plain model of 8 layers; their FLOPs are what every run spends."""
BATCH = 16
TENTHS = 10
"""PROP-1 with four stages ends its stages after 1, 3, 6 and 10 tenths of the steps."""
TWICE = "core:(0-3)x2"
COOLDOWN = "0-3 core:(4-5)x2 6-7"
"""The second of the two middle blocks runs twice: 10 visits."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a run.

    Attributes:
        share: of the FLOPs of the run.
        visits: of layers in one forward pass.
        edit, plan: as of a stage.
    """

    share: float
    visits: int
    edit: tuple[Operator, ...] = ()
    plan: str | None = None


def plain(layers: int = LAYERS, **values: Any) -> RunConfig:
    """A plain model; with fewer layers it makes more steps."""
    return in_parts(layers, "", [Part(share=1.0, visits=layers)], **values)


def grown(operator: BlockOperator, **values: Any) -> RunConfig:
    """2 layers that grow to 8 in four stages of 1, 2, 3 and 4 tenths of the steps (PROP-1, 2409.19044).

    Checkpoints of all tenths stay: what growing leaves in the weights is read from them.
    """
    stages = _growth(operator, 1.0)
    tenth = sum(stage.steps for stage in stages) // TENTHS
    return _config(BLOCK, "", **{"saving": Saving(every=tenth, keep_every=tenth)} | values, stages=stages)


def looped(**values: Any) -> RunConfig:
    """4 layers that run twice from the first step on."""
    return in_parts(4, TWICE, [Part(share=1.0, visits=8)], **values)


def switched_on(at: float, **values: Any) -> RunConfig:
    """4 layers that start to run twice when a part of the FLOPs is spent."""
    return in_parts(4, "core:(0-3)x1", [Part(share=at, visits=4), Part(share=1 - at, visits=8, plan=TWICE)], **values)


def grow_then_loop(**values: Any) -> RunConfig:
    """2 layers, grown to 4 by a copy of the block, which then run twice."""
    parts = [
        Part(share=0.15, visits=2),
        Part(share=0.35, visits=4, edit=(Midas(b=BLOCK),)),
        Part(share=0.5, visits=8, plan=TWICE),
    ]
    return in_parts(BLOCK, "", parts, **values)


def loop_untie_grow(**values: Any) -> RunConfig:
    """2 layers that run twice, then untied into 4, then grown by MIDAS to 6 and 8."""
    parts = [
        Part(share=0.15, visits=4),
        Part(share=0.15, visits=4, edit=(Untie(),)),
        Part(share=0.3, visits=6, edit=(Midas(b=BLOCK),)),
        Part(share=0.4, visits=8, edit=(Midas(b=BLOCK),)),
    ]
    return in_parts(BLOCK, "core:(0-1)x2", parts, **values)


def looped_cooldown(operator: BlockOperator | None = None, share: float = 0.3, **values: Any) -> RunConfig:
    """Full depth, or grown by an operator; for the last part of the FLOPs a middle block runs twice (10 visits)."""
    last = Part(share=share, visits=LAYERS + BLOCK, plan=COOLDOWN)
    if operator is None:
        return in_parts(LAYERS, "", [Part(share=1 - share, visits=LAYERS), last], **values)
    return _config(BLOCK, "", **values, stages=(*_growth(operator, 1 - share), _stage(last)))


def offsets(rank: int = 4, **values: Any) -> RunConfig:
    """4 layers that run twice, each pass with low-rank offsets of its own, which start at zero (2410.20672)."""
    # Untied copies are equal, so that what the relaxation gives back to every pass is nothing yet.
    relaxed = (Untie(), Recursive(loops=2, sharing="cycle", init="lower", rank=rank))
    # Offsets cost FLOPs of their own.
    one = estimate_run(_config(4, TWICE, stages=(Stage(steps=1, edit=relaxed),)), flops_per_second=1.0).flops
    return _config(4, TWICE, **values, stages=(Stage(steps=round(STEPS * _flops(LAYERS) / one), edit=relaxed),))


def cosine_tie(weight: float, **values: Any) -> RunConfig:
    """8 layers of which those 4 apart are rewarded for being alike (2502.17416)."""
    return plain(**values, terms=(CosineTie(block=4, weight=weight),))


def stacked(at: float, **values: Any) -> RunConfig:
    """4 layers, stacked into 8 when a part of the FLOPs is spent (2405.15319 with g = 2)."""
    return in_parts(4, "", [Part(share=at, visits=4), Part(share=1 - at, visits=8, edit=(Stack(g=2),))], **values)


def in_parts(layers: int, plan: str, parts: Sequence[Part], **values: Any) -> RunConfig:
    """A run whose stages spend parts of the common budget.

    Args:
        layers: that it starts with.
        plan: that it starts with; empty visits every layer once.
        parts: in order; their shares sum to 1.
        **values: further fields of `RunConfig`.
    """
    return _config(layers, plan, **values, stages=tuple(_stage(part) for part in parts))


def _stage(part: Part) -> Stage:
    steps = round(part.share * STEPS * _flops(LAYERS) / _flops(part.visits))
    return Stage(steps=steps, edit=part.edit, plan=part.plan)


def _growth(operator: BlockOperator, share: float) -> tuple[Stage, ...]:
    """Stages that spend a share of the budget; each is a number of tenths of their steps."""
    stages = range(1, LAYERS // BLOCK + 1)
    mean = sum(stage * _flops(stage * BLOCK) for stage in stages) / sum(stages)
    tenth = round(share * STEPS * _flops(LAYERS) / mean / TENTHS)
    return grow(operator, prop_alpha(TENTHS * tenth, len(stages), 1))


@lru_cache
def _flops(visits: int) -> float:
    """Training FLOPs of a step with so many visits, which all cost the same."""
    config = _config(visits, "", stages=(Stage(steps=1),))
    return estimate_run(config, flops_per_second=1.0).flops


def _config(layers: int, plan: str, *, stages: tuple[Stage, ...], **values: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "lr": 8e-3,
        "evaluation": Evaluation(every=0, rows=512, samples=0),
        "saving": Saving(every=150, keep=1),
    }
    config = on_task("one_budget", TASK, layers, 1, steps=1, batch_size=BATCH, **settings | values)
    # With normed queries and small first values 8 layers learn within the budget; without, they hardly start to.
    model = replace(config.model, plan=plan, qk_norm=True, init_std=0.05)  # type: ignore[call-arg]
    return replace(config, model=model, stages=stages)

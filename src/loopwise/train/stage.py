"""A stage of a run as data: what it trains, and how the model is edited when it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from loopwise.edit.operators import Operator
from loopwise.loop.config import Component
from loopwise.loop.depth import DepthSampler
from loopwise.loop.objective import Objective
from loopwise.plan import Plan
from loopwise.train.optim.schedule import Schedule

Mode = Literal["tie", "materialize", "alias"]
Moments = Literal["copy", "zero", "reset", "halve"]


@dataclass(frozen=True, kw_only=True)
class Stage(Component):
    """A stretch of a run.

    Attributes:
        steps: optimizer steps, at least 1.
        edit: operators that are applied to the model, one after the other, when the stage begins; then its plan.
        mode: how they are realised; None is as each operator says by itself.
        moments: what the optimizer knows of the parameters of the edited model, see `loopwise.train.moments`: "copy"
            (that of what they were made from), "zero" (new ones start at zero moments), "reset" (all start anew), or
            "halve" (copies share what their source had).
        lr: "continue" goes on with the schedule; "rewarm" rises from 0 to it over the first `warmup` steps; "rewind"
            goes back to where the run's schedule had warmed up, and spreads what follows over the steps that are left
            (MSG, 2305.02869, goes back too).
        warmup: steps of "rewarm".
        plan: plan text from here on; None goes on with the plan that there is.
        depth: sampler of loop counts; None is the run's.
        objective: what is learned; None is the run's.
        schedule: factor on the learning rate over the steps of this stage; None goes on with the run's, which covers
            all steps of the run.
        batch_size: rows of a step; None is the run's.
        trainable: patterns (`fnmatch`) of the names of parameters that are trained; empty trains all.
    """

    kind: ClassVar[str | None] = "stage"
    steps: int
    edit: tuple[Operator, ...] = ()
    mode: Mode | None = None
    moments: Moments = "copy"
    lr: Literal["continue", "rewarm", "rewind"] = "continue"
    warmup: int = 0
    plan: str | None = None
    depth: DepthSampler | None = None
    objective: Objective | None = None
    schedule: Schedule | None = None
    batch_size: int | None = None
    trainable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges and the plan text."""
        super().__post_init__()
        self.require(self.steps >= 1, "steps", "must be at least 1")
        self.require(self.batch_size is None or self.batch_size >= 1, "batch_size", "must be at least 1")
        self.require(bool(self.edit) or self.mode is None, "mode", "is how an edit is realised: give edit too")
        self.require(bool(self.edit) or self.moments == "copy", "moments", "move with an edit: give edit too")
        if self.lr == "rewarm":
            self.require(1 <= self.warmup <= self.steps, "warmup", "must be 1 to steps where lr is 'rewarm'")
        else:
            self.require(self.warmup == 0, "warmup", "is read with lr='rewarm' only")
        rule = "goes back in the run's schedule, and this stage has a schedule of its own: leave one out"
        self.require(self.lr != "rewind" or self.schedule is None, "lr", rule)
        if self.plan is not None:
            Plan.parse(self.plan)

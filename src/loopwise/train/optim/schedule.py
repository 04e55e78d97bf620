"""Factor on the learning rate as a function of the step.

Every schedule warms up linearly and holds afterwards what its class says. The 0-based step s of a run of S steps has
the factor f(s); f is continuous in s, the first step of a warm-up of w steps has 1 / w, and f(S) is exactly the end
value (the last step is S - 1, so a decay to 0 wastes no step).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True)
class Schedule(Component):
    """Base of the schedules, and the warm-up that they share.

    Attributes:
        warmup: steps until the factor is 1: from 1 on a number of steps, below 1 a part of the run.
    """

    kind: ClassVar[str | None] = None
    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.warmup >= 0, "warmup", "must be at least 0")

    def factor(self, step: float, num_steps: int) -> float:
        """The factor of a step, from 0 to 1; a pure function.

        Args:
            step: how many steps were made before, at least 0; past `num_steps` the end value holds.
            num_steps: steps that the schedule covers, at least 1.

        Raises:
            ValueError: a negative step, or a run that is too short for the warm-up (and decay).
        """
        if step < 0 or num_steps < 1:
            raise ValueError(f"{self.kind}: step={step!r} of num_steps={num_steps!r}; use a step from 0 of at least 1")
        warmup = length(self.warmup, num_steps)
        self.check_fits(warmup, num_steps)
        return min(1.0, (step + 1) / warmup if warmup else 1.0) * self.after_warmup(step, warmup, num_steps)

    def check_fits(self, warmup: int, num_steps: int) -> None:
        """Raise `ValueError` unless the run is long enough."""
        rule = f"is longer than the {num_steps} steps; use fewer, or a part of the run such as 0.05"
        self.require(warmup <= num_steps, "warmup", rule)

    def after_warmup(self, step: float, warmup: int, num_steps: int) -> float:
        """The factor without the warm-up; 1 until `warmup`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(Schedule):
    """1 after the warm-up."""

    kind: ClassVar[str | None] = "schedule.constant"

    def after_warmup(self, step: float, warmup: int, num_steps: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Schedule):
    """A straight line from 1 after the warm-up to the floor at the end.

    Attributes:
        floor: end value, from 0 to 1.
    """

    kind: ClassVar[str | None] = "schedule.linear"
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(0 <= self.floor <= 1, "floor", "must be between 0 and 1")

    def after_warmup(self, step: float, warmup: int, num_steps: int) -> float:
        """The line."""
        return descend("linear", step, warmup, num_steps, self.floor)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(LinearSchedule):
    """Half a period of the cosine from 1 after the warm-up to the floor at the end (1608.03983).

    Floor 1 is constant: what HRM (2506.21734) trains with.
    """

    kind: ClassVar[str | None] = "schedule.cosine"
    floor: float = 0.1

    def after_warmup(self, step: float, warmup: int, num_steps: int) -> float:
        """The curve."""
        return descend("cosine", step, warmup, num_steps, self.floor)


@dataclass(frozen=True, kw_only=True)
class WsdSchedule(Schedule):
    """Warm-up, stable, decay (2404.06395): 1 until the last `decay` steps, which go down to the floor.

    Attributes:
        decay: from 1 on a number of steps, below 1 a part of the run.
        shape: of the decay with x from 0 to 1: "linear" is 1 - x, "sqrt" is 1 - sqrt(x) (2405.18392), "cosine" is
            (1 + cos(pi x)) / 2.
        floor: end value, from 0 to 1.
    """

    kind: ClassVar[str | None] = "schedule.wsd"
    warmup: float = 0.02
    decay: float = 0.2
    shape: Literal["linear", "sqrt", "cosine"] = "linear"
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.decay >= 0, "decay", "must be at least 0")
        self.require(0 <= self.floor <= 1, "floor", "must be between 0 and 1")

    def check_fits(self, warmup: int, num_steps: int) -> None:
        """Warm-up and decay do not overlap."""
        super().check_fits(warmup, num_steps)
        rule = f"does not fit into {num_steps} steps after {warmup} of warm-up; use fewer, or a part of the run"
        self.require(warmup + length(self.decay, num_steps) <= num_steps, "decay", rule)

    def after_warmup(self, step: float, warmup: int, num_steps: int) -> float:
        """1, then the decay."""
        return descend(self.shape, step, num_steps - length(self.decay, num_steps), num_steps, self.floor)


def length(value: float, num_steps: int) -> int:
    """A number of steps: a value below 1 is a part of `num_steps`, rounded."""
    return round(value * num_steps if value < 1 else value)


def descend(shape: str, step: float, first: int, last: int, floor: float) -> float:
    """From exactly 1 at `first` and before, to exactly `floor` at `last` and after; 1 where there is no way between."""
    if step <= first or first >= last:
        return 1.0
    if step >= last:
        return floor
    x = (step - first) / (last - first)
    remains = {"linear": 1 - x, "sqrt": 1 - math.sqrt(x), "cosine": (1 + math.cos(math.pi * x)) / 2}[shape]
    return floor + (1 - floor) * remains

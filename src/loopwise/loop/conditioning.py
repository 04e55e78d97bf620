"""What tells the layers of a loop how far it has come: a vector made from the time of an iteration and its step size.

Shapes: D width, W width of the sinusoids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True)
class TimeConditionerConfig(Component):
    """Two embedders of a number, summed: of the time before the iteration, and of its step (LoopFormer, 2602.11451).

    The time is the sum of the steps before; steps that sum to 1 make any number of iterations one unit of time.

    Attributes:
        sinusoids: W, how many sinusoids describe a number.
        max_period: the slowest of them turns once per `2 pi max_period`; times are used as they are, in [0, 1].
    """

    kind: ClassVar[str | None] = "conditioner.time"
    sinusoids: int = 256
    max_period: float = 10000.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.sinusoids >= 2, "sinusoids", "must be at least 2")
        self.require(self.max_period > 0, "max_period", "must be above 0")

    def build(self, width: int) -> TimeConditioner:
        """The conditioner of layers that are conditioned by vectors of `width`."""
        return TimeConditioner(self, width)


class TimeConditioner(nn.Module):
    """See `TimeConditionerConfig`; submodules `time` and `step`."""

    def __init__(self, config: TimeConditionerConfig, width: int) -> None:
        super().__init__()
        self.time = NumberEmbedder(config, width)
        self.step = NumberEmbedder(config, width)

    def forward(self, time: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The conditioning `[1, D]`, or `[B, D]`, from numbers without axes, or `[B]`."""
        return self.time(time) + self.step(step)


class NumberEmbedder(nn.Module):
    """`W2 silu(W1 sinusoids(x) + b1) + b2`; parameters `inner` `[D, W]` and `outer` `[D, D]`, both with bias."""

    def __init__(self, config: TimeConditionerConfig, width: int) -> None:
        super().__init__()
        self.max_period = config.max_period
        self.inner = nn.Linear(config.sinusoids, width)
        self.outer = nn.Linear(width, width)

    def forward(self, number: torch.Tensor) -> torch.Tensor:
        """`[]` or `[B]` -> `[1 or B, D]`, in the dtype of the parameters."""
        waves = sinusoids(number.reshape(-1), self.inner.in_features, self.max_period)
        return self.outer(F.silu(self.inner(waves.to(self.inner.weight.dtype))))


def sinusoids(number_B: torch.Tensor, width: int, max_period: float) -> torch.Tensor:
    """`cos(x f_k)` then `sin(x f_k)`, `f_k = max_period^(-k / (W/2))`: float32 `[B, W]`, 0 at an odd end.

    The order of diffusion models' embeddings of time (2006.11239); positions of a text mostly have the sine first.
    """
    half = width // 2
    rate_k = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=number_B.device) / half)
    angle_Bk = number_B[:, None].float() * rate_k
    return F.pad(torch.cat([angle_Bk.cos(), angle_Bk.sin()], dim=-1), (0, width - 2 * half))

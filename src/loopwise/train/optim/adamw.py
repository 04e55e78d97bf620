"""AdamW (1711.05101), torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from loopwise.train.optim.named import OptimizerConfig, Part, Rules, adam_start


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay.

        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Attributes:
        beta1, beta2: decay of the two moments, from 0 to below 1.
        eps: added to the root of the second moment, at least 0.
        fused: one kernel per group instead of one per operation; last bits differ.
    """

    kind: ClassVar[str | None] = "optimizer.adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    fused: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        self.require(self.eps >= 0, "eps", "must be at least 0")

    def parts(self, parameters: Mapping[str, nn.Parameter], rules: Rules) -> list[Part]:
        """One `torch.optim.AdamW`."""
        groups = self.make_groups(parameters, rules, eps=self.eps)
        # None leaves the choice between its other two forms to torch
        optimizer = torch.optim.AdamW(groups, betas=(self.beta1, self.beta2), fused=self.fused or None)
        return [Part(optimizer=optimizer, start=partial(adam_start, fused=self.fused))]

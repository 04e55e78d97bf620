"""AdamW with an arctangent in the place of the division (2407.05872, section 4.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from loopwise.train.optim.named import OptimizerConfig, Part, Rules, adam_start


@dataclass(frozen=True, kw_only=True)
class AdamATan2Config(OptimizerConfig):
    """Adam without an epsilon: the update does not change when all gradients are multiplied by a number.

        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        inside   p <- p (1 - lr wd) - lr a atan2(m / (1 - b1^t), b sqrt(v / (1 - b2^t)))
        outside  p <- p (1 - lr wd) - lr a / (1 - b1^t) atan2(m, b sqrt(v / (1 - b2^t)))

    "inside" with a = 1.27, b = 1 is the form of 2407.05872: a is 4 / pi rounded, so that a step whose corrected moments
    agree (m^ = sqrt(v^)) has the size lr, as in Adam. HRM (2506.21734), TRM (2510.04871) and HRM-Text (2605.20613)
    train with "outside", a = 1, b = 1; learning rates published with them are meant for that form.

    Attributes:
        beta1, beta2: decay of the two moments, from 0 to below 1.
        a: factor on the arctangent, above 0.
        b: factor on the root of the second moment, above 0.
        correction: where the correction of the first moment's bias stands.
    """

    kind: ClassVar[str | None] = "optimizer.adam_atan2"
    beta1: float = 0.9
    beta2: float = 0.95
    a: float = 1.27
    b: float = 1.0
    correction: Literal["inside", "outside"] = "inside"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        for name in ("a", "b"):
            self.require(getattr(self, name) > 0, name, "must be above 0")

    def parts(self, parameters: Mapping[str, nn.Parameter], rules: Rules) -> list[Part]:
        """One `AdamATan2`."""
        return [Part(optimizer=AdamATan2(self.make_groups(parameters, rules), self), start=adam_start)]


class AdamATan2(torch.optim.Optimizer):
    """The torch optimizer of an `AdamATan2Config`; state as in torch's AdamW.

    Args:
        groups: parameter groups, each with `lr` and `weight_decay`.
        config: betas and the form of the update.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdamATan2Config):
        self.config = config
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group["lr"], group["weight_decay"])

    def _update(self, parameter: torch.Tensor, state: dict[str, torch.Tensor], lr: float, weight_decay: float) -> None:
        config, gradient = self.config, parameter.grad
        assert gradient is not None
        first, second = state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        count = state["step"].item()
        first.lerp_(gradient, 1 - config.beta1)
        second.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        first_correction, second_correction = 1 - config.beta1**count, 1 - config.beta2**count
        spread = second.sqrt().mul_(config.b / math.sqrt(second_correction))
        if config.correction == "inside":
            direction, size = torch.atan2(first / first_correction, spread), lr * config.a
        else:
            direction, size = torch.atan2(first, spread), lr * config.a / first_correction
        parameter.mul_(1 - lr * weight_decay).add_(direction, alpha=-size)

"""Normalisation: RMS and layer norm, with or without parameters.

`y = w * (x - m) / sqrt(mean((x - m)^2) + eps) + b` over the last axis, m = mean(x) for the layer norm and 0 for RMS.
Shapes: D width, or whatever the last axis is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from loopwise.models.fields import check_choice, check_types, refuse

FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A norm over the last axis.

    Attributes:
        type: "rms" (1910.07467) or "layer" (1607.06450).
        eps: added to the mean square; None is the float32 machine epsilon (what torch takes when none is given).
        weight: has a scale per channel.
        bias: has a shift per channel.
        weight_in_float32: multiply by the weight before the result is rounded to the input's dtype (OLMo-2, torch's own
            norms) instead of after (Llama, Huginn, Ouro). The two differ below float32 only.
    """

    type: str = "rms"
    eps: float | None = 1e-6
    weight: bool = True
    bias: bool = False
    weight_in_float32: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "type", ("rms", "layer"))
        if self.eps is not None and not self.eps >= 0:
            refuse(self, "eps", "use a number of at least 0, or None for the float32 epsilon")

    def build(self, size: int) -> RMSNorm | LayerNorm:
        """The norm of tensors whose last axis has `size` entries."""
        return RMSNorm(self, size) if self.type == "rms" else LayerNorm(self, size)


class _Norm(nn.Module):
    """What both norms share: statistics in float32 at least, parameters, dtype of the result."""

    def __init__(self, config: NormConfig, size: int):
        super().__init__()
        self.size = size
        self.eps = FLOAT32_EPS if config.eps is None else config.eps
        self.weight_in_float32 = config.weight_in_float32
        self.weight = nn.Parameter(torch.ones(size)) if config.weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if config.bias else None

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def normalise(self, wide: torch.Tensor) -> torch.Tensor:
        """The norm without parameters."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of a floating tensor `[..., size]`; same shape and dtype."""
        dtype = hidden.dtype
        result = self.normalise(hidden.to(torch.promote_types(dtype, torch.float32)))
        if not self.weight_in_float32:
            result = result.to(dtype)
        if self.weight is not None:
            result = result * self.weight
        if self.bias is not None:
            result = result + self.bias
        return result.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, weight={self.weight is not None}, bias={self.bias is not None}"


# transformers initialises norms by these two words in the class name.
class RMSNorm(_Norm):
    """Root-mean-square norm, 1910.07467."""

    def normalise(self, wide: torch.Tensor) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps)`."""
        return F.rms_norm(wide, (self.size,), None, self.eps)


class LayerNorm(_Norm):
    """Layer norm, 1607.06450."""

    def normalise(self, wide: torch.Tensor) -> torch.Tensor:
        """`(x - mean(x)) / sqrt(var(x) + eps)`."""
        return F.layer_norm(wide, (self.size,), None, None, self.eps)

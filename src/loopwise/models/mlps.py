"""The MLP of a block: gated or plain.

gated: `down(act(gate(x)) * up(x))` (SwiGLU, 2002.05202); plain: `down(act(up(x)))`.
Shapes: D width, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from loopwise.models.fields import check_choice, check_counts, check_probability, check_types


def relu2(hidden: torch.Tensor) -> torch.Tensor:
    """`max(x, 0)^2` (2109.08668)."""
    return F.relu(hidden).square()


def half_relu2(hidden: torch.Tensor) -> torch.Tensor:
    """`max(x, 0)^2 / 2`, what the code of Parcae computes under the name ReLU2."""
    return relu2(hidden) / 2


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu2,
    "half_relu2": half_relu2,
}


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """An MLP over the last axis; the defaults are SwiGLU.

    Attributes:
        intermediate_size: F.
        activation: "silu", "gelu" (exact), "gelu_tanh" (GPT-2, ALBERT's gelu_new), "relu", "relu2" or
            "half_relu2" (Parcae).
        gated: has a gate projection beside the up projection.
        bias: its projections have a bias.
        dropout: probability on its output in training.
    """

    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "intermediate_size")
        check_choice(self, "activation", ACTIVATIONS)
        check_probability(self, "dropout")

    def build(self, size: int) -> MLP:
        """The MLP of tensors whose last axis has `size` entries."""
        return MLP(self, size)


class MLP(nn.Module):
    """Parameters: `gate_proj` (gated only) and `up_proj` `[F, D]`, `down_proj` `[D, F]`.

    Checkpoints that fuse gate and up are split by their converters, so that adapters find the projections by the names
    that transformers uses.
    """

    def __init__(self, config: MLPConfig, size: int):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=config.bias) if config.gated else None
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., D]` -> `[..., D]`, same dtype."""
        inner = self.up_proj(hidden)
        if self.gate_proj is None:
            inner = self.activation(inner)
        else:
            inner = self.activation(self.gate_proj(hidden)) * inner
        return self.dropout(self.down_proj(inner))

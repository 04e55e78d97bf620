"""What makes the iterations of a loop differ although they share their layers.

Shapes: B batch rows, T tokens, D width, R iterations, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from loopwise.loop.config import Component

Beyond = Literal["refuse", "last", "cycle"]


@dataclass(frozen=True, kw_only=True)
class DeltaConfig(Component):
    """Base of the deltas.

    Attributes:
        beyond: what iterations past the last known one use: an error, the last one's values, or those of
            `iteration mod R`.
    """

    beyond: Beyond = "refuse"


@dataclass(frozen=True, kw_only=True)
class NoDelta(DeltaConfig):
    """Iterations differ only in their input."""

    kind: ClassVar[str | None] = "delta.none"


@dataclass(frozen=True, kw_only=True)
class LoraDelta(DeltaConfig):
    """A linear layer W becomes `W + B_i A_i` at iteration i (Relaxed Recursive Transformers, 2410.20672).

    The scale is exactly 1, with no alpha / r factor: factors from a singular value decomposition of a weight difference
    then reproduce it. B starts at zero (no difference at first), A as a torch linear layer.

    Attributes:
        rank: r, at least 1.
        targets: endings of the names of the linear layers inside a block; empty for all of them.
    """

    kind: ClassVar[str | None] = "delta.lora"
    rank: int
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.rank >= 1, "rank", "must be at least 1")

    def build(self, in_features: int, out_features: int, num_iterations: int) -> LoraOffsets:
        """The offsets of one linear layer."""
        return LoraOffsets(self, in_features, out_features, num_iterations)


@dataclass(frozen=True, kw_only=True)
class NormDelta(DeltaConfig):
    """An RMS norm with gains of its own for every iteration, starting at 1.

    Attributes:
        eps: added to the mean square.
    """

    kind: ClassVar[str | None] = "delta.norm"
    eps: float = 1e-6

    def build(self, width: int, num_iterations: int) -> IterationNorm:
        """The norm of a state of width D."""
        return IterationNorm(self, width, num_iterations)


@dataclass(frozen=True, kw_only=True)
class EmbeddingDelta(DeltaConfig):
    """A vector per iteration, added to the state before it (the step signal of the Universal Transformer, 1807.03819).

    Attributes:
        signal: a learned table, or sinusoids: sines in the first half of the channels and cosines in the second, as in
            tensor2tensor (the paper writes them interleaved). Sinusoids know every iteration: `beyond` is not used.
        std: deviation at the start of a learned table.
    """

    kind: ClassVar[str | None] = "delta.embedding"
    signal: Literal["learned", "sinusoid"] = "learned"
    std: float = 0.02

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.std >= 0, "std", "must be at least 0")

    def build(self, width: int, num_iterations: int) -> IterationEmbedding:
        """The embedding of a state of width D."""
        return IterationEmbedding(self, width, num_iterations)


class LoraOffsets(nn.Module):
    """See `LoraDelta`; parameters `A` `[R, r, in]` and `B` `[R, out, r]`."""

    def __init__(self, config: LoraDelta, in_features: int, out_features: int, num_iterations: int) -> None:
        super().__init__()
        self.beyond: Beyond = config.beyond
        self.A = nn.Parameter(torch.empty(num_iterations, config.rank, in_features))
        self.B = nn.Parameter(torch.zeros(num_iterations, out_features, config.rank))
        nn.init.uniform_(self.A, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    def forward(self, x: torch.Tensor, iteration: int) -> torch.Tensor:
        """`B_i A_i x`, to be added to the output of the linear layer: `[..., in]` -> `[..., out]`.

        Raises:
            ValueError: the iteration is past the last and `beyond` is "refuse".
        """
        index = known_iteration(iteration, len(self.A), self.beyond)
        return x @ self.A[index].mT @ self.B[index].mT

    def weight(self, iteration: int) -> torch.Tensor:
        """`B_i A_i`, to be added to the weight of the linear layer, `[out, in]`."""
        index = known_iteration(iteration, len(self.A), self.beyond)
        return self.B[index] @ self.A[index]


class IterationNorm(nn.Module):
    """See `NormDelta`; parameter `weight` `[R, D]`."""

    def __init__(self, config: NormDelta, width: int, num_iterations: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.beyond: Beyond = config.beyond
        self.weight = nn.Parameter(torch.ones(num_iterations, width))

    def forward(self, x_BTD: torch.Tensor, iteration: int) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight_i`, computed in float32: `[..., D]` -> `[..., D]`, same dtype.

        Raises:
            ValueError: the iteration is past the last and `beyond` is "refuse".
        """
        gain_D = self.weight[known_iteration(iteration, len(self.weight), self.beyond)]
        wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        scale = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return (wide_BTD * scale).to(x_BTD.dtype) * gain_D


class IterationEmbedding(nn.Module):
    """See `EmbeddingDelta`; parameter `weight` `[R, D]` if learned, none otherwise."""

    def __init__(self, config: EmbeddingDelta, width: int, num_iterations: int) -> None:
        super().__init__()
        self.beyond: Beyond = config.beyond
        if config.signal == "learned":
            self.weight = nn.Parameter(torch.empty(num_iterations, width))
            nn.init.normal_(self.weight, std=config.std)
        else:
            self.register_parameter("weight", None)

    def forward(self, state_BTD: torch.Tensor, iteration: int) -> torch.Tensor:
        """The state plus the iteration's vector, `[B, T, D]`.

        Raises:
            ValueError: the iteration is past the last of a learned table and `beyond` is "refuse".
        """
        if self.weight is None:
            return state_BTD + sinusoid(iteration, state_BTD.shape[-1]).to(state_BTD)
        return state_BTD + self.weight[known_iteration(iteration, len(self.weight), self.beyond)]


def sinusoid(position: int, width: int) -> torch.Tensor:
    """`sin(position * f_k)` then `cos(position * f_k)`, `f_k = 10000^(-k / (D/2 - 1))`: float64 `[D]`, 0 at an odd end.

    The timing signal of tensor2tensor (1807.03819).
    """
    half = width // 2
    rate_k = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / max(half - 1, 1)))
    signal = torch.cat([torch.sin(position * rate_k), torch.cos(position * rate_k)])
    return nn.functional.pad(signal, (0, width - 2 * half))


def known_iteration(iteration: int, num_iterations: int, beyond: Beyond) -> int:
    """The index below `num_iterations` that stands for `iteration`; see `DeltaConfig.beyond`.

    Raises:
        ValueError: it is past the last and `beyond` is "refuse".
    """
    if iteration < num_iterations:
        return iteration
    if beyond == "refuse":
        known = f"iteration {iteration} is past the {num_iterations} that this delta knows"
        raise ValueError(f"{known}; run fewer, or set beyond='last' or 'cycle'")
    return num_iterations - 1 if beyond == "last" else iteration % num_iterations

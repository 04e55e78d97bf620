"""Vectors that a loop adds to its state at the start of every iteration.

Shapes: D width, b selected rows, t selected tokens, N positions of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True)
class LearnedPositionsConfig(Component):
    """A learned vector per position, added again at every iteration (Yang et al., 2311.12424).

    Attributes:
        num_positions: N.
    """

    kind: ClassVar[str | None] = "signal.positions"
    num_positions: int

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.num_positions >= 1, "num_positions", "must be at least 1")

    def build(self, width: int) -> LearnedPositions:
        """The table for a state of width D."""
        return LearnedPositions(self, width)


class LearnedPositions(nn.Module):
    """See `LearnedPositionsConfig`; parameter `table.weight` `[N, D]`."""

    def __init__(self, config: LearnedPositionsConfig, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(config.num_positions, width)

    def forward(self, state_btD: torch.Tensor, iteration: int, position_ids_bt: torch.Tensor) -> torch.Tensor:
        """What is added to the state: `[b or 1, t, D]`, from positions, int64 `[b or 1, t]`.

        Raises:
            ValueError: a position past the table.
        """
        last = int(position_ids_bt.max())
        if last >= self.table.num_embeddings:
            raise ValueError(f"position {last} is past the {self.table.num_embeddings} that this model has learned")
        return self.table(position_ids_bt)


@dataclass(frozen=True, kw_only=True)
class CoordinatesConfig(Component):
    """Sinusoids of the position and of the iteration, summed (Universal Transformer, 1807.03819).

    `P_{i,t,2j} = sin(i f_j) + sin(t f_j)` and `P_{i,t,2j+1} = cos(i f_j) + cos(t f_j)`, `f_j = max_period^(-2j / D)`,
    for position i and iteration t = 1, 2, ... as in the paper. (tensor2tensor has all sines before all cosines, spaces
    the rates so that the slowest is exactly `1 / max_period`, and counts iterations from 0.)

    Attributes:
        max_period: the slowest channels turn once per about `2 pi max_period`.
    """

    kind: ClassVar[str | None] = "signal.coordinates"
    max_period: float = 10000.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.max_period > 1, "max_period", "must be above 1")

    def build(self, width: int) -> Coordinates:
        """The signal for a state of an even width D."""
        return Coordinates(self, width)


class Coordinates(nn.Module):
    """See `CoordinatesConfig`; no parameters.

    Raises:
        ValueError: an odd width.
    """

    def __init__(self, config: CoordinatesConfig, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"signal.coordinates: the width {width} is odd; channels are pairs of sine and cosine")
        self.max_period = config.max_period

    def forward(self, state_btD: torch.Tensor, iteration: int, position_ids_bt: torch.Tensor) -> torch.Tensor:
        """What is added to the state: `[b or 1, t, D]`, from positions, int64 `[b or 1, t]`, in the state's dtype."""
        dtype, width = torch.promote_types(state_btD.dtype, torch.float32), state_btD.shape[-1]
        powers = torch.arange(0, width, 2, device=state_btD.device, dtype=dtype) / width
        rates = self.max_period**-powers
        place_btd = position_ids_bt[..., None].to(dtype) * rates
        step_d = (iteration + 1) * rates
        waves = torch.stack([place_btd.sin() + step_d.sin(), place_btd.cos() + step_d.cos()], dim=-1)
        return waves.flatten(-2).to(state_btD.dtype)

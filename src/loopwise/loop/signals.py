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

"""What one training step reads.

Shapes: B rows, T tokens, N points, I numbers per point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch

IGNORE = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Prompts of in-context regression.

    Attributes:
        xs_BNI: points, floating `[B, N, I]`.
        ys_BN: their values, floating `[B, N]`.
    """

    xs_BNI: torch.Tensor
    ys_BN: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows of tokens with what is to be predicted, or points.

    Attributes:
        tokens_BT: what the model reads, int64 `[B, T]`; None for points.
        targets_BT: what the logits *at* a position should predict, int64 `[B, T]`; -100 is not scored. Already shifted.
        positions_BT: position of each token in its document, int64 `[B, T]`; None counts from 0 in every row.
        segments_BT: number of the document of each token within its row, int64 `[B, T]`; None is one document.
        points: prompts of regression in the place of tokens.
        keys: per row int64 `[B]`, by which scores are grouped.
    """

    tokens_BT: torch.Tensor | None = None
    targets_BT: torch.Tensor | None = None
    positions_BT: torch.Tensor | None = None
    segments_BT: torch.Tensor | None = None
    points: Points | None = None
    keys: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.points.ys_BN if self.points is not None else self._tokens)

    @property
    def num_items(self) -> int:
        """How many predictions are scored; sums of losses are divided by it."""
        if self.points is not None:
            return self.points.ys_BN.numel()
        assert self.targets_BT is not None
        return int((self.targets_BT != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        """How many tokens a model reads: B T, and two for each point."""
        return 2 * self.points.ys_BN.numel() if self.points is not None else self._tokens.numel()

    @property
    def _tokens(self) -> torch.Tensor:
        assert self.tokens_BT is not None, "a batch holds tokens or points"
        return self.tokens_BT

    def rows(self, first: int, stop: int) -> Batch:
        """Rows first to stop - 1."""
        cut = {
            item.name: value[first:stop]
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        points = self.points
        if points is not None:
            points = Points(xs_BNI=points.xs_BNI[first:stop], ys_BN=points.ys_BN[first:stop])
        return replace(self, **cut, points=points, keys={name: key[first:stop] for name, key in self.keys.items()})

    def micro(self, size: int) -> Iterator[Batch]:
        """Pieces of `size` rows in order; the last may be smaller."""
        for first in range(0, self.num_rows, size):
            yield self.rows(first, min(first + size, self.num_rows))

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; keys stay where they are."""
        moved = {
            item.name: value.to(device, non_blocking=True)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        points = self.points
        if points is not None:
            points = Points(xs_BNI=points.xs_BNI.to(device), ys_BN=points.ys_BN.to(device))
        return replace(self, **moved, points=points)

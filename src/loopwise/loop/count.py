"""How many iterations run, and how many of them carry a gradient: for a batch, or for each of its rows.

Shapes: B batch rows.
"""

# ruff: noqa: N802, N815 -- shape suffixes in the names of fields

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class LoopCount:
    """How many iterations run: first those without a gradient, then those with one.

    A bare number of iterations does not say which of them train the loop; a pair does.

    Attributes:
        no_grad: iterations without a gradient, at least 0.
        grad: iterations with one, at least 0.

    Raises:
        ValueError: a number is negative, or both are 0.
    """

    no_grad: int
    grad: int

    def __post_init__(self) -> None:
        """Check the range."""
        if self.no_grad < 0 or self.grad < 0 or self.total < 1:
            raise ValueError(f"LoopCount(no_grad={self.no_grad}, grad={self.grad}) must be non-negative and not empty")

    @property
    def total(self) -> int:
        """All iterations."""
        return self.no_grad + self.grad

    @classmethod
    def split(cls, total: int, max_grad: int | None = None) -> LoopCount:
        """`total` iterations of which the last `max_grad` at most carry a gradient (None: all of them)."""
        grad = total if max_grad is None else min(total, max_grad)
        return cls(no_grad=total - grad, grad=grad)

    def with_grad(self, iteration: int) -> bool:
        """Whether the iteration with this 0-based index carries a gradient."""
        return iteration >= self.no_grad


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopCounts:
    """One `LoopCount` per row of a batch, as int64 tensors `[B]` on the CPU.

    A batch runs `max(no_grad)` iterations without a gradient and then `max(grad)` with one; a row takes part in the
    first `no_grad[b]` of the former and the first `grad[b]` of the latter, and keeps its state in the others, as in
    Parcae (2604.12946).

    Attributes:
        no_grad_B: iterations without a gradient, at least 0.
        grad_B: iterations with one, at least 0.
    """

    no_grad_B: torch.Tensor
    grad_B: torch.Tensor

    @property
    def total_B(self) -> torch.Tensor:
        """All iterations of each row, int64 `[B]`."""
        return self.no_grad_B + self.grad_B

    @property
    def batch(self) -> LoopCount:
        """What the batch as a whole runs."""
        return LoopCount(no_grad=int(self.no_grad_B.max()), grad=int(self.grad_B.max()))

    @classmethod
    def split(cls, total_B: torch.Tensor, max_grad: int | None = None) -> LoopCounts:
        """Row totals, int64 `[B]` of at least 1, split as `LoopCount.split` does."""
        grad_B = total_B if max_grad is None else total_B.clamp(max=max_grad)
        return cls(no_grad_B=total_B - grad_B, grad_B=grad_B)

    def rows(self, first: int, stop: int) -> LoopCounts:
        """The counts of rows first to stop - 1: those of a rank or of a micro-batch."""
        return LoopCounts(no_grad_B=self.no_grad_B[first:stop], grad_B=self.grad_B[first:stop])

    def active(self, iteration: int) -> torch.Tensor:
        """Which rows take part in the batch's iteration with this 0-based index, bool `[B]`."""
        batch = self.batch
        if batch.with_grad(iteration):
            return iteration - batch.no_grad < self.grad_B
        return iteration < self.no_grad_B

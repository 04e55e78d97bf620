"""Offsets of one tensor, one for each visit of its layer, see `relaxation`.

Shapes: R visits, r rank, E experts.
"""

from __future__ import annotations

import math
import re
from typing import ClassVar

import torch
from torch import nn

from loopwise.loop.delta import LoraDelta, LoraOffsets
from loopwise.models.hub import Conv1D

# Two-axis parameters that multiply activations; decay matrices and tables of positions have other names.
_MATRIX = re.compile(r"(^|_)(weight|proj|fn)$")


class WholeOffset(nn.Module):
    """A whole tensor per visit, zero at first: parameter `offset` `[R, ...]`, or a buffer where a buffer is offset."""

    no_weight_decay: ClassVar[tuple[str, ...]] = ("offset",)

    def __init__(self, shape: torch.Size, num_visits: int, *, is_buffer: bool) -> None:
        super().__init__()
        offset = torch.zeros(num_visits, *shape)
        if is_buffer:
            self.register_buffer("offset", offset)
        else:
            self.offset = nn.Parameter(offset)

    def value(self, index: int) -> torch.Tensor:
        """The offset of a visit, `[...]`."""
        return self.offset[index]

    def applied(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """`tensor + offset`, `[...]`."""
        return tensor + self.offset[index]


class MatrixOffset(LoraOffsets):
    """Low-rank offsets of a matrix `[out, in]`, of one stored as `[in, out]`, or of E of them `[E, out, in]`.

    Parameters `A` `[R, r, in]` and `B` `[R, out, r]`, with E after R where there are several. B starts at zero.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: torch.Size, rank: int, num_visits: int, *, is_transposed: bool = False) -> None:
        *experts, num_out, num_in = reversed(shape) if is_transposed else shape
        super().__init__(LoraDelta(rank=rank), num_in, num_out, num_visits)
        self.is_transposed = is_transposed
        if experts:
            self.A = nn.Parameter(torch.empty(num_visits, *experts, rank, num_in))
            self.B = nn.Parameter(torch.zeros(num_visits, *experts, num_out, rank))
            nn.init.uniform_(self.A, -1 / math.sqrt(num_in), 1 / math.sqrt(num_in))

    def value(self, index: int) -> torch.Tensor:
        """The offset of a visit in the shape of the tensor."""
        offset = self.weight(index)
        return offset.mT if self.is_transposed else offset

    def applied(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """`tensor + offset`, the sum rounded once."""
        left, right = self.B[index], self.A[index]
        if self.is_transposed:
            left, right = right.mT, left.mT
        return torch.baddbmm(tensor, left, right) if tensor.ndim == 3 else torch.addmm(tensor, left, right)

    @property
    def num_weights(self) -> int:
        """Elements that multiply the activations of one visit."""
        return (self.A.numel() + self.B.numel()) // len(self.A)


def offset_of(
    module: nn.Module, attribute: str, tensor: torch.Tensor, rank: int | None, num_visits: int
) -> nn.Module | None:
    """The offsets of one tensor; None where it is to stay shared."""
    is_table = isinstance(module, nn.Embedding | nn.modules.conv._ConvNd) or type(module).__name__.endswith("Norm")
    is_matrix = tensor.ndim == 3 or (tensor.ndim == 2 and _MATRIX.search(attribute))
    if is_table or not is_matrix or attribute.endswith("bias") or not isinstance(tensor, nn.Parameter):
        return WholeOffset(tensor.shape, num_visits, is_buffer=not isinstance(tensor, nn.Parameter))
    largest = min(tensor.shape[-2:])
    rank = largest if rank is None else min(rank, largest)
    if rank == 0:
        return None
    return MatrixOffset(tensor.shape, rank, num_visits, is_transposed=isinstance(module, Conv1D))

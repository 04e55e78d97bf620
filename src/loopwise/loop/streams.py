"""First values of named streams, for recurrences of several levels (HRM, 2506.21734; HRM-Text, 2605.20613).

Shapes: D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

# Deviation of a standard normal cut at 2: draws are divided by it, so that the realised deviation is the wanted one.
_CUT_STD = 0.8796256610342398


class FirstValues(nn.Module):
    """A vector `[D]` per stream, reached as `first[name]`: a parameter where it is learned, else a persistent buffer.

    Args:
        width: D.
        learned: names of streams whose first value is trained; zeros at the start.
        fixed: names of streams whose first value is drawn once and kept: a standard normal cut at 2 deviations.
    """

    def __init__(self, width: int, *, learned: Iterable[str] = (), fixed: Iterable[str] = ()):
        super().__init__()
        self.names = (*learned, *fixed)
        for name in learned:
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))
        for name in fixed:
            self.register_buffer(name, torch.zeros(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Learned values zero, fixed ones drawn."""
        for value in self.parameters():
            nn.init.zeros_(value)
        for value in self.buffers():
            cut_normal_(value)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The first value of a stream, `[D]`."""
        return getattr(self, name)


@torch.no_grad()
def cut_normal_(tensor: torch.Tensor, std: float = 1.0) -> torch.Tensor:
    """Fill with a normal draw that is cut at 2 deviations; `std` is the deviation after the cut."""
    scale = std / _CUT_STD
    return nn.init.trunc_normal_(tensor, std=scale, a=-2 * scale, b=2 * scale)

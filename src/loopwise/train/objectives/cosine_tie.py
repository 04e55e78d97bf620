"""Layers that grow alike without being tied: the looping-inspired regulariser of Saunshi et al. (2502.17416).

    R_G(k) = 1/(L - k) sum_{l=0}^{L-k-1} cos(theta_G^(l), theta_G^(l+k))
    term   = weight (1 - mean over groups G of R_G(k))

Every layer is pulled towards the one k layers later. The paper prints `+ weight R`, which would push them apart; its
text and its cosines of 0.98 and more ask for a reward of similarity, which this is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cosine_similarity

from loopwise.models.hub import layer_list
from loopwise.train.objectives.forward import unwrapped
from loopwise.train.objectives.terms import LossTerm, Seen


@dataclass(frozen=True, kw_only=True)
class CosineTie(LossTerm):
    """Reward layers k apart for pointing the same way, weight matrix by weight matrix.

    Attributes:
        block: k, the number of layers of the block that the model is to look like a loop of.
        weight: lambda; 10 in the paper.
    """

    kind: ClassVar[str | None] = "loss.cosine_tie"
    block: int
    weight: float = 10.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.block >= 1, "block", "must be at least 1")

    def build(self, model: Any) -> Callable[[Seen], torch.Tensor]:
        """See `LossTerm.build`."""
        layers = layer_list(unwrapped(model)).layers
        count = len(layers)
        if self.block >= count:
            raise ValueError(
                f"loss.cosine_tie: block={self.block} leaves no two layers to compare, the model has {count}; use less"
            )
        if not weight_groups(layers, self.block):
            raise ValueError("loss.cosine_tie: no weight matrix has the same name and shape in layers to be compared")

        def value(seen: Seen) -> torch.Tensor:
            # Looked up every time: after a forward the parameters of a sharded model are gathered, and others.
            return seen.share * self.weight * (1 - similarity(layers, self.block))

        return value


def similarity(layers: nn.ModuleList, block: int) -> torch.Tensor:
    """The mean over weight groups of the mean cosine of layers `block` apart, a scalar in [-1, 1]."""
    means = [torch.stack([_cosine(*pair) for pair in pairs]).mean() for pairs in weight_groups(layers, block).values()]
    return torch.stack(means).mean()


def _cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    assert not isinstance(first, DTensor), "a forward leaves the parameters of a sharded model gathered"
    return cosine_similarity(first.flatten().float(), second.flatten().float(), dim=0)


def weight_groups(layers: nn.ModuleList, block: int) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Matrices of layers `block` apart by their name inside the layer; pairs of other shapes are left out."""
    named = [{name: p for name, p in layer.named_parameters() if p.ndim >= 2} for layer in layers]
    groups: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for first, second in zip(named, named[block:], strict=False):
        for name, weight in first.items():
            if name in second and second[name].shape == weight.shape:
                groups.setdefault(name, []).append((weight, second[name]))
    return groups

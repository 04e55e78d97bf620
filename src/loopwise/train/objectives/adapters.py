"""Low-rank adapters of PEFT on any model of a run, looped or not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from loopwise.loop.config import Component, suggest
from loopwise.models.hub import layer_list


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Component):
    """`W + alpha / r  B A` with W frozen (LoRA, 2106.09685).

    A layer that a plan visits several times has one adapter, whose gradient is the sum over the visits.

    Attributes:
        r: rank, at least 1.
        alpha: scale, above 0.
        targets: names of linear modules inside the layers, such as "q_proj"; empty takes every linear module in them.
        dropout: probability on what A reads, in training.
    """

    kind: ClassVar[str | None] = "adapters.lora"
    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.r >= 1, "r", "must be at least 1")
        self.require(self.alpha > 0, "alpha", "must be above 0")
        self.require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1")

    def build(self, model: Any, *, seed: int = 0) -> Any:
        """The model inside PEFT's: only adapters are trained; B is zero, so that nothing changes at first.

        Args:
            model: any with a plan; changed in place.
            seed: of the random A; the global generators of torch are left as they were.

        Raises:
            ValueError: PEFT is not installed, or no linear module has such a name.
        """
        try:
            import peft
        except ImportError:
            raise ValueError('adapters.lora needs the package peft: pip install "loopwise[peft]"') from None
        found = layer_list(model)
        names, is_transposed = _linear_names(found.layers)
        for target in self.targets:
            if target not in names:
                raise ValueError(f"adapters.lora: targets has {target!r}{suggest(target, names)}")
        chosen = "|".join(re.escape(name) for name in self.targets or sorted(names))
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] -- any number divides by r
            lora_dropout=self.dropout,
            fan_in_fan_out=is_transposed,
            target_modules=rf"{re.escape(found.path)}\.\d+\.(?:.*\.)?(?:{chosen})",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.get_peft_model(model, config)


def _linear_names(layers: nn.ModuleList) -> tuple[set[str], bool]:
    """Last parts of the names of linear modules inside some layers; and whether they are transposed, as in GPT-2."""
    found = {}
    for layer in layers:
        for name, module in layer.named_modules():
            if name and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
                found[name.rpartition(".")[2]] = not isinstance(module, nn.Linear)
    return set(found), any(found.values())

"""How a wavefront is set, and when its positions have settled.

Shapes: n positions of the wave, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True)
class WaveConfig(Component):
    """How the wavefront goes (2510.14961); the defaults are those of the published code, where not said otherwise.

    Attributes:
        inner: iterations of the core per outer pass (r').
        freeze: what settles a position: "latent" (relative change of its state over an outer pass below `threshold`),
            "acceleration" (relative second difference below it), "stable" (its prediction has been the same for
            `patience` further outer passes), or "fixed" (only the number of iterations). With every rule a position
            that has run all iterations of the loop has settled.
        threshold: of latent and acceleration.
        patience: of stable.
        rule: freeze the unbroken run of settled positions ("prefix", as the paper says), or everything up to the last
            settled one ("last", as the published code does).
        embed_ema: share of the previous injected tensor in the present one, from 0 to below 1 (0.1).
        state_noise: share of a fresh random state that is mixed in before an outer pass, from 0 to 1. Default 0 as in
            the paper's main table, the published code has 0.5. Needs a loop whose first state is random.
        noise_schedule: "dampened" divides the share by 1 + the iterations that the position has run.
        noise_mixer: "linear" weighs `1 - b, b`, "sqrt" weighs `sqrt(1 - b), sqrt(b)`, which keeps the variance.
        headway: new positions per outer pass; those beyond the first start from a random token.
        width: most positions in the wave of a row.
        max_passes: outer passes after which rows end with the reason "passes"; None for no limit, with which every row
            ends all the same (4096 where compat is "reference").
        continue_state: a new position starts from a copy of the last state in the place of a fresh one.
        restart: a position whose input token changed starts over, and all positions after it. Then "fixed" with cache
            own gives the tokens of sequential decoding. None keeps refining, as published, where something re-enters
            the loop, and restarts where nothing does, because a new token would not reach the state otherwise.
        compat: "reference" repeats the quirks of the published code, see `published`; None gives what the paper
            describes.

    Raises:
        ValueError: a field is out of its range, or does not go with compat.
    """

    inner: int = 4
    freeze: Literal["latent", "acceleration", "fixed", "stable"] = "latent"
    threshold: float = 0.03
    patience: int = 2
    rule: Literal["prefix", "last"] = "prefix"
    embed_ema: float = 0.1
    state_noise: float = 0.0
    noise_schedule: Literal["dampened", "constant"] = "dampened"
    noise_mixer: Literal["linear", "sqrt"] = "linear"
    headway: int = 1
    width: int = 128
    max_passes: int | None = None
    continue_state: bool = False
    restart: bool | None = None
    compat: Literal["reference"] | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("inner", "patience", "headway", "width"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(self.threshold >= 0, "threshold", "must be at least 0")
        self.require(0 <= self.embed_ema < 1, "embed_ema", "must be from 0 to below 1")
        self.require(0 <= self.state_noise <= 1, "state_noise", "must be from 0 to 1")
        self.require(self.max_passes is None or self.max_passes >= 1, "max_passes", "must be at least 1, or None")
        if self.compat is not None:
            self.require(self.freeze != "acceleration", "freeze", "has no compat: use latent, fixed or stable")
            self.require(not self.restart, "restart", "has no compat: use restart=False")


def latent_change(now_nD: torch.Tensor, before_nD: torch.Tensor) -> torch.Tensor:
    """`|z - z'| / |z|` of states floating `[n, D]`: float32 `[n]`."""
    now_nD, before_nD = now_nD.float(), before_nD.float()
    return (now_nD - before_nD).norm(dim=-1) / now_nD.norm(dim=-1).clamp(min=1e-12)


def acceleration(now_nD: torch.Tensor, before_nD: torch.Tensor, earlier_nD: torch.Tensor) -> torch.Tensor:
    """`|(z - z') - (z' - z'')| / |z|` of states floating `[n, D]`: float32 `[n]`."""
    now_nD, before_nD, earlier_nD = now_nD.float(), before_nD.float(), earlier_nD.float()
    return (now_nD - 2 * before_nD + earlier_nD).norm(dim=-1) / now_nD.norm(dim=-1).clamp(min=1e-12)


def frontier(rule: str, settled: Sequence[bool]) -> int:
    """How many positions freeze, from which of them have settled."""
    if rule == "last":
        return max((place + 1 for place, is_settled in enumerate(settled) if is_settled), default=0)
    return next((place for place, is_settled in enumerate(settled) if not is_settled), len(settled))


def mix_noise(config: WaveConfig, state_nD: torch.Tensor, fresh_nD: torch.Tensor, spent: Sequence[int]) -> torch.Tensor:
    """States `[n, D]` with a share of fresh ones, at positions that have run `spent` iterations."""
    share_n1 = state_nD.new_full((len(spent), 1), config.state_noise)
    if config.noise_schedule == "dampened":
        share_n1 = share_n1 / (1 + state_nD.new_tensor(list(spent))[:, None])
    if config.noise_mixer == "sqrt":
        return (1 - share_n1).sqrt() * state_nD + share_n1.sqrt() * fresh_nD
    return (1 - share_n1) * state_nD + share_n1 * fresh_nD

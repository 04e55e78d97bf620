"""Adaptive computation time: a token's output is a weighted mix of the outputs of its iterations.

Shapes: B batch rows, T tokens, D width.

Sources: ACT (1603.08983) and its use in the Universal Transformer (1807.03819; tensor2tensor). The probability p of an
iteration comes from the state before the block, after the step signal is added. A token stops at the first iteration N
at which its summed probabilities exceed `1 - epsilon`; the weight of that iteration is the remainder
`r = 1 - sum_{n<N} p_n`, so that the weights sum to 1.

Differences from the published code, on purpose: a token that reaches the last iteration takes its remainder there (in
tensor2tensor its weights do not sum to 1), and the convex mix is `w F + (1 - w) y` as its comments say (the line there
reads `w F + (y * 1 - w)`, a slip of operator precedence).
"""

# ruff: noqa: N802, N815 -- shape suffixes in the names of fields

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True, eq=False)
class ActState:
    """What adaptive computation time remembers of each token.

    Attributes:
        output_BTD: the mix so far, floating.
        mass_BT: sum of the weights so far, floating; 1 once halted.
        remainder_BT: weight of the last iteration, floating; 0 until halted.
        n_updates_BT: int64, iterations that the token has run.
        halted_BT: bool, the token has stopped.
        weight_BT: weight of the latest iteration, floating; 0 for tokens that did not run it.
    """

    output_BTD: torch.Tensor
    mass_BT: torch.Tensor
    remainder_BT: torch.Tensor
    n_updates_BT: torch.Tensor
    halted_BT: torch.Tensor
    weight_BT: torch.Tensor

    @property
    def all_halted(self) -> bool:
        """True when no token is left."""
        return bool(self.halted_BT.all())

    @property
    def ponder_BT(self) -> torch.Tensor:
        """The ponder cost `N + r` of each token, floating `[B, T]`; its gradient is that of r."""
        return self.n_updates_BT + self.remainder_BT


@dataclass(frozen=True, kw_only=True)
class ActHalting(Component):
    """Adaptive computation time, per token.

    Attributes:
        rule: "accumulated" is Graves' `y <- y + w F`; "basic" is the Universal Transformer's `y <- w F + (1 - w) y`, in
            which early iterations fade and the start of y keeps `prod (1 - w)` of the mix.
        epsilon: how far below 1 a token may stop, in (0, 1).
    """

    kind: ClassVar[str | None] = "halting.act"
    rule: Literal["accumulated", "basic"] = "accumulated"
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(0 < self.epsilon < 1, "epsilon", "must be between 0 and 1")

    def start(self, state_BTD: torch.Tensor, *, output_BTD: torch.Tensor | None = None) -> ActState:
        """No token halted, before the first iteration.

        Args:
            state_BTD: gives shape, dtype and device.
            output_BTD: where the mix starts; zeros, as published, if None.
        """
        zeros_BT = torch.zeros_like(state_BTD[..., 0])
        return ActState(
            output_BTD=torch.zeros_like(state_BTD) if output_BTD is None else output_BTD,
            mass_BT=zeros_BT,
            remainder_BT=zeros_BT,
            n_updates_BT=torch.zeros_like(zeros_BT, dtype=torch.int64),
            halted_BT=torch.zeros_like(zeros_BT, dtype=torch.bool),
            weight_BT=zeros_BT,
        )

    def step(self, state: ActState, p_BT: torch.Tensor, after_BTD: torch.Tensor, *, last: bool = False) -> ActState:
        """Mix in one iteration that all running tokens have just run.

        Args:
            state: before the iteration.
            p_BT: probabilities of stopping, floating `[B, T]`. Values of halted tokens are not read.
            after_BTD: the block's output, floating `[B, T, D]`. Values of halted tokens are not read.
            last: this was the last iteration: running tokens stop and take their remainder.

        Returns:
            The state after the iteration.
        """
        running_BT = ~state.halted_BT
        left_BT = 1 - state.mass_BT
        if last:
            stops_BT = running_BT
        else:
            stops_BT = running_BT & (state.mass_BT + p_BT > 1 - self.epsilon)
        zero_BT = torch.zeros_like(left_BT)
        weight_BT = torch.where(stops_BT, left_BT, torch.where(running_BT, p_BT, zero_BT))
        kept = 1.0 if self.rule == "accumulated" else 1 - weight_BT[..., None]
        mixed_BTD = weight_BT[..., None] * after_BTD + kept * state.output_BTD
        return ActState(
            output_BTD=torch.where(running_BT[..., None], mixed_BTD, state.output_BTD),
            mass_BT=state.mass_BT + weight_BT,
            remainder_BT=state.remainder_BT + torch.where(stops_BT, left_BT, zero_BT),
            n_updates_BT=state.n_updates_BT + running_BT,
            halted_BT=state.halted_BT | stops_BT,
            weight_BT=weight_BT,
        )

"""When a token leaves a loop, decided by a gate that is trained with the loop.

Shapes: B batch rows, T tokens, D width, R iterations.

A gate gives each token a probability lambda of stopping after an iteration, given that it has not stopped before (a
hazard). The stopping distribution is `p_t = lambda_t * S_{t-1}` with the survival `S_t = prod_{j<=t} (1 - lambda_j)`;
the last iteration takes what is left, so that the mass is 1 whatever the gate says.

Each rule is a config with `start` and `step`; `step` takes and returns an immutable `HaltState`:

    state = rule.start(mask_BT)
    for iteration in range(num_iterations):
        ...run the iteration for the tokens in ~state.halted_BT...
        state = rule.step(state, lambda_BT, last=iteration == num_iterations - 1)
"""

# ruff: noqa: N802, N815 -- shape suffixes in the names of fields

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True, eq=False)
class HaltState:
    """What a halting rule remembers of each token.

    Attributes:
        halted_BT: bool, the token has stopped.
        n_updates_BT: int64, iterations that the token has run; once halted, the index of its last iteration plus 1.
        survival_BT: floating, probability that the gate has not stopped the token yet.
    """

    halted_BT: torch.Tensor
    n_updates_BT: torch.Tensor
    survival_BT: torch.Tensor

    @property
    def all_halted(self) -> bool:
        """True when no token is left."""
        return bool(self.halted_BT.all())


@dataclass(frozen=True, kw_only=True)
class HaltingConfig(Component):
    """Base of the rules that a gate drives."""

    def start(self, like_BT: torch.Tensor) -> HaltState:
        """No token halted, before the first iteration.

        Args:
            like_BT: gives shape `[B, T]` and device; its dtype is that of the survival if it is floating.
        """
        dtype = like_BT.dtype if like_BT.is_floating_point() else torch.float32
        return HaltState(
            halted_BT=torch.zeros_like(like_BT, dtype=torch.bool),
            n_updates_BT=torch.zeros_like(like_BT, dtype=torch.int64),
            survival_BT=torch.ones_like(like_BT, dtype=dtype),
        )

    def step(
        self,
        state: HaltState,
        lambda_BT: torch.Tensor | None = None,
        *,
        last: bool = False,
        generator: torch.Generator | None = None,
    ) -> HaltState:
        """Account for one iteration that all running tokens have just run.

        Args:
            state: before the iteration.
            lambda_BT: the gate's probabilities after the iteration, floating `[B, T]`; those of halted tokens are not
                read and may be anything. Not needed by `halting.fixed`.
            last: this was the last iteration: every token stops.
            generator: source of the draws of `halting.ponder`.

        Returns:
            The state after the iteration.

        Raises:
            ValueError: the rule needs probabilities or a generator and has none.
        """
        running_BT = ~state.halted_BT
        survival_BT = state.survival_BT
        if lambda_BT is not None:
            survival_BT = torch.where(running_BT, survival_BT * (1 - lambda_BT), survival_BT)
        after = replace(state, survival_BT=survival_BT, n_updates_BT=state.n_updates_BT + running_BT)
        stops_BT = torch.ones_like(running_BT) if last else self._stops(after, lambda_BT, generator)
        return replace(after, halted_BT=state.halted_BT | stops_BT)

    def _stops(
        self, state: HaltState, lambda_BT: torch.Tensor | None, generator: torch.Generator | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def _needs(self, lambda_BT: torch.Tensor | None) -> torch.Tensor:
        if lambda_BT is None:
            raise ValueError(f"{self.kind}: lambda_BT is missing; pass the gate's probabilities with every step")
        return lambda_BT


@dataclass(frozen=True, kw_only=True)
class FixedHalting(HaltingConfig):
    """Every token runs every iteration."""

    kind: ClassVar[str | None] = "halting.fixed"

    def _stops(self, state, lambda_BT, generator) -> torch.Tensor:
        return torch.zeros_like(state.halted_BT)


@dataclass(frozen=True, kw_only=True)
class HazardHalting(HaltingConfig):
    """Stop after the first iteration whose cumulated probability `1 - S_t` reaches `threshold` (Ouro, 2510.25741).

    Attributes:
        threshold: q in [0, 1]. 0 stops after the first iteration. 1 never stops early, also where a gate saturates at
            exactly 1 or a sum of probabilities rounds up: the published file compares a cumulated sum and can stop.
    """

    kind: ClassVar[str | None] = "halting.hazard"
    threshold: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(0 <= self.threshold <= 1, "threshold", "must be from 0 to 1")

    def _stops(self, state, lambda_BT, generator) -> torch.Tensor:
        self._needs(lambda_BT)
        if self.threshold >= 1:
            return torch.zeros_like(state.halted_BT)
        return state.survival_BT <= 1 - self.threshold


@dataclass(frozen=True, kw_only=True)
class PonderHalting(HaltingConfig):
    """Stop at random with the gate's probability: depths follow the stopping distribution (PonderNet, 2107.05407)."""

    kind: ClassVar[str | None] = "halting.ponder"

    def _stops(self, state, lambda_BT, generator) -> torch.Tensor:
        lambda_BT = self._needs(lambda_BT)
        if generator is None:
            raise ValueError("halting.ponder: generator is None; pass a torch.Generator, or use halting.hazard")
        draw_BT = torch.rand(lambda_BT.shape, generator=generator, device=generator.device)
        return draw_BT.to(lambda_BT.device) < lambda_BT


class Gate(nn.Module):
    """`z = w . s + b`, the logit of a stopping probability `lambda = sigmoid(z)`; parameters `linear.{weight,bias}`."""

    def __init__(self, width: int, *, bias: float = 0.0) -> None:
        """Args: width D of the state; start of the bias (1 in the ACT of the Universal Transformer)."""
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.linear.__dict__["first_bias"] = bias  # for owners that initialise linear maps in their own way
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, state_BTD: torch.Tensor) -> torch.Tensor:
        """State, floating `[..., D]` -> logits `[...]`."""
        return self.linear(state_BTD).squeeze(-1)


def exit_log_pdf(gate_logits_RBT: torch.Tensor) -> torch.Tensor:
    """Logarithm of the stopping distribution, from gate logits.

    `log p_t = logsigmoid(z_t) + sum_{j<t} logsigmoid(-z_j)`; the last entry has only the sum, its own logit is not
    read. Finite with finite gradients wherever a gate saturates, which probabilities are not.

    Args:
        gate_logits_RBT: floating `[R, ...]`, R at least 1.

    Returns:
        Same shape; `exp` of it sums to 1 along the first axis.
    """
    stay_RBT = F.logsigmoid(-gate_logits_RBT[:-1]).cumsum(0)
    # survival before each iteration: 1 before the first
    before_RBT = torch.cat([torch.zeros_like(gate_logits_RBT[:1]), stay_RBT])
    return torch.cat([before_RBT[:-1] + F.logsigmoid(gate_logits_RBT[:-1]), before_RBT[-1:]])


def exit_pdf(lambda_RBT: torch.Tensor) -> torch.Tensor:
    """The stopping distribution, from stopping probabilities: `p_t = lambda_t S_{t-1}`, the last takes the rest.

    Args:
        lambda_RBT: floating `[R, ...]` in [0, 1], R at least 1; the last entry is not read.

    Returns:
        Same shape; sums to 1 along the first axis.
    """
    survival_RBT = (1 - lambda_RBT[:-1]).cumprod(0)
    before_RBT = torch.cat([torch.ones_like(lambda_RBT[:1]), survival_RBT])
    return torch.cat([before_RBT[:-1] * lambda_RBT[:-1], before_RBT[-1:]])


def cdf_exit(lambda_RBT: torch.Tensor, threshold: float) -> torch.Tensor:
    """The iteration after which each token stops under `HazardHalting`, for gates that are all known.

    Args:
        lambda_RBT: stopping probabilities, floating `[R, B, T]`.
        threshold: q in [0, 1].

    Returns:
        0-based iterations, int64 `[B, T]`.
    """
    rule = HazardHalting(threshold=threshold)
    state = rule.start(lambda_RBT[0])
    for iteration, lambda_BT in enumerate(lambda_RBT):
        state = rule.step(state, lambda_BT, last=iteration == len(lambda_RBT) - 1)
    return state.n_updates_BT - 1


def take_exit(values_RBTX: torch.Tensor, exit_BT: torch.Tensor) -> torch.Tensor:
    """Each token's value at the iteration where it stopped.

    Args:
        values_RBTX: values per iteration, `[R, B, T, ...]`.
        exit_BT: 0-based iterations, int64 `[B, T]`.

    Returns:
        `[B, T, ...]`.
    """
    rows, tokens = (torch.arange(size, device=exit_BT.device) for size in exit_BT.shape)
    return values_RBTX[exit_BT, rows[:, None], tokens]

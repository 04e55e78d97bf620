"""Training objectives of a loop as configs: each turns what a forward pass left behind into one scalar.

Shapes: B batch rows, T tokens, R iterations.

The formulas are in `loopwise.loop.readout`. Where an objective compares two forward passes, the caller makes the second
one (`ShortcutObjective`).
"""

# ruff: noqa: N802, N815 -- shape suffixes in the names of fields

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from loopwise.loop import readout
from loopwise.loop.config import Component
from loopwise.loop.depth import step_generator
from loopwise.loop.halting import exit_log_pdf


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """What a forward pass through a loop offers to an objective.

    Attributes:
        losses_RBT: loss of each token at each iteration, floating `[R, B, T]`; R = 1 when only the last is read.
        mask_BT: tokens that count, bool `[B, T]`.
        gate_logits_RBT: logits of the stopping probabilities, floating `[R, B, T]`, if the loop has a gate.
        ponder_BT: ponder cost of each token, floating `[B, T]`, if the loop has adaptive computation time.
        num_items: number of tokens that the sums are divided by; the valid tokens of this batch if None.
    """

    losses_RBT: torch.Tensor
    mask_BT: torch.Tensor
    gate_logits_RBT: torch.Tensor | None = None
    ponder_BT: torch.Tensor | None = None
    num_items: int | float | torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective(Component):
    """Base of the objectives.

    Attributes:
        every_iteration: class attribute, whether losses of earlier iterations are read (else R may be 1).
        needs_gate: class attribute, whether the stopping probabilities are read.
    """

    every_iteration: ClassVar[bool] = True
    needs_gate: ClassVar[bool] = False

    def loss(self, terms: Terms) -> torch.Tensor:
        """The scalar to minimise.

        Raises:
            ValueError: the forward pass lacks what the objective reads.
        """
        raise NotImplementedError

    def _gate(self, terms: Terms) -> torch.Tensor:
        if terms.gate_logits_RBT is None:
            raise ValueError(f"{self.kind}: gate_logits_RBT is missing; give the loop a gate or use readout.final")
        return terms.gate_logits_RBT


@dataclass(frozen=True, kw_only=True)
class FinalObjective(Objective):
    """Loss of the last iteration alone (Huginn, 2502.05171)."""

    kind: ClassVar[str | None] = "readout.final"
    every_iteration: ClassVar[bool] = False

    def loss(self, terms: Terms) -> torch.Tensor:
        """See `readout.final`."""
        return readout.final(terms.losses_RBT, terms.mask_BT, num_items=terms.num_items)


@dataclass(frozen=True, kw_only=True)
class LastMeanObjective(Objective):
    """Mean loss of the last iterations (Yang et al., 2311.12424).

    Attributes:
        window: how many, at least 1.
    """

    kind: ClassVar[str | None] = "readout.last_mean"
    window: int

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.window >= 1, "window", "must be at least 1")

    def loss(self, terms: Terms) -> torch.Tensor:
        """See `readout.last_mean`."""
        return readout.last_mean(terms.losses_RBT, terms.mask_BT, self.window, num_items=terms.num_items)


@dataclass(frozen=True, kw_only=True)
class DeepSupervisionObjective(Objective):
    """Weighted losses of all iterations; the fields are arguments of `readout.deep_supervision`."""

    kind: ClassVar[str | None] = "readout.deep_supervision"
    weights: Literal["uniform", "linear", "intermediate"] = "uniform"
    coefficient: float = 0.1

    def loss(self, terms: Terms) -> torch.Tensor:
        """See `readout.deep_supervision`."""
        return readout.deep_supervision(
            terms.losses_RBT, terms.mask_BT, self.weights, coefficient=self.coefficient, num_items=terms.num_items
        )


@dataclass(frozen=True, kw_only=True)
class ExpectedObjective(Objective):
    """Expected loss under the gate minus `beta` times its entropy: first stage of Ouro (2510.25741)."""

    kind: ClassVar[str | None] = "readout.expected"
    needs_gate: ClassVar[bool] = True
    beta: float = 0.1

    def loss(self, terms: Terms) -> torch.Tensor:
        """See `readout.expected`."""
        log_pdf_RBT = exit_log_pdf(self._gate(terms))
        return readout.expected(terms.losses_RBT, log_pdf_RBT, terms.mask_BT, beta=self.beta, num_items=terms.num_items)


@dataclass(frozen=True, kw_only=True)
class GateObjective(Objective):
    """The gate alone, from the gain of each iteration: second stage of Ouro; see `readout.gate_loss`."""

    kind: ClassVar[str | None] = "readout.gate"
    needs_gate: ClassVar[bool] = True
    slope: float = 50.0
    margin: float = 0.005

    def loss(self, terms: Terms) -> torch.Tensor:
        """See `readout.gate_loss`."""
        return readout.gate_loss(
            self._gate(terms),
            terms.losses_RBT,
            terms.mask_BT,
            slope=self.slope,
            margin=self.margin,
            num_items=terms.num_items,
        )


@dataclass(frozen=True, kw_only=True)
class PonderObjective(Objective):
    """Expected loss under the gate plus `beta KL(p || geometric)` (PonderNet, 2107.05407).

    Attributes:
        beta: weight of the divergence.
        rate: parameter of the geometric prior, in (0, 1); its mean, before it is cut at R, is 1 / rate.
    """

    kind: ClassVar[str | None] = "readout.ponder"
    needs_gate: ClassVar[bool] = True
    beta: float = 0.01
    rate: float = 0.2

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(0 < self.rate < 1, "rate", "must be between 0 and 1")

    def loss(self, terms: Terms) -> torch.Tensor:
        """See `readout.expected` and `readout.prior_kl`."""
        log_pdf_RBT = exit_log_pdf(self._gate(terms))
        prior_R = readout.geometric_log_prior(self.rate, len(log_pdf_RBT))
        task = readout.expected(terms.losses_RBT, log_pdf_RBT, terms.mask_BT, beta=0.0, num_items=terms.num_items)
        return task + self.beta * readout.prior_kl(log_pdf_RBT, prior_R, terms.mask_BT, num_items=terms.num_items)


@dataclass(frozen=True, kw_only=True)
class ActObjective(Objective):
    """Loss of the mixed output plus `weight` ponder costs (ACT, 1603.08983; 0.01 in the Universal Transformer)."""

    kind: ClassVar[str | None] = "readout.act"
    every_iteration: ClassVar[bool] = False
    weight: float = 0.01

    def loss(self, terms: Terms) -> torch.Tensor:
        """See `readout.final` and `readout.ponder_cost`."""
        if terms.ponder_BT is None:
            raise ValueError("readout.act: ponder_BT is missing; give the loop halting.act or use readout.final")
        task = readout.final(terms.losses_RBT, terms.mask_BT, num_items=terms.num_items)
        return task + self.weight * readout.ponder_cost(terms.ponder_BT, terms.mask_BT, num_items=terms.num_items)


@dataclass(frozen=True, kw_only=True)
class ShortcutObjective(FinalObjective):
    """The final loss, that of a random shorter schedule, and their difference in state (LoopFormer, 2602.11451).

    `loss` is the long schedule's alone; the caller runs `short` iterations besides and calls `join`.

    Attributes:
        short_weight: weight of the loss of the shorter schedule.
        consistency_weight: weight of the squared difference of the states after the final norm; no gradient flows into
            that of the long schedule.
        low: fewest iterations of the shorter schedule, at least 1.
    """

    kind: ClassVar[str | None] = "readout.shortcut"
    short_weight: float = 0.1
    consistency_weight: float = 0.1
    low: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("short_weight", "consistency_weight"):
            self.require(getattr(self, name) >= 0, name, "must be at least 0")
        self.require(self.low >= 1, "low", "must be at least 1")

    def short(self, total: int, *, seed: int, step: int) -> int | None:
        """A number of iterations from `low` to `total - 1`, all equally likely, a function of (seed, step); or None."""
        if total <= self.low:
            return None
        generator = step_generator(seed, step, "shortcut")
        return int(torch.randint(self.low, total, (), generator=generator))

    def join(self, long: Terms, short: Terms, long_BTD: torch.Tensor, short_BTD: torch.Tensor) -> torch.Tensor:
        """The whole loss, a scalar; see `readout.shortcut`.

        Args:
            long: what the forward of the long schedule offers.
            short: that of the shorter one, of the same tokens.
            long_BTD: output of the long schedule after the final norm, floating `[B, T, D]`.
            short_BTD: that of the shorter one.
        """
        return readout.shortcut(
            self.loss(long),
            self.loss(short),
            long_BTD,
            short_BTD,
            short_weight=self.short_weight,
            consistency_weight=self.consistency_weight,
            mask_BT=long.mask_BT,
            num_items=long.num_items,
        )

"""When a token leaves a loop, judged from how its state or prediction changes: no training needed.

Shapes: B batch rows, T tokens, D width, V vocabulary; every function works on any leading shape.

Sources: the evaluators of Huginn (2502.05171) for KL, min-p KL, entropy, latent, argmax and cosine with their default
thresholds; the second difference of 2509.23314; the confidence of CALM (2207.07061). Each token is judged by itself:
Huginn's file averages over positions where it judges a whole row.

A criterion is used call by call (`criterion.halts(prev, now)`) or as an object with `start` and `step` like the rules
of `loopwise.loop.halting`.
"""

# ruff: noqa: N802, N815 -- shape suffixes in the names of fields

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from loopwise.loop.config import Component


def kl_change(prev_BTV: torch.Tensor, now_BTV: torch.Tensor) -> torch.Tensor:
    """`KL(prev || now)` between the predictions of two logit tensors `[..., V]` -> `[...]`, in nats."""
    prev_BTV, now_BTV = F.log_softmax(prev_BTV, -1), F.log_softmax(now_BTV, -1)
    return F.kl_div(now_BTV, prev_BTV, reduction="none", log_target=True).sum(-1)


def minp_kl_change(prev_BTV: torch.Tensor, now_BTV: torch.Tensor, min_p: float = 0.1) -> torch.Tensor:
    """`KL(prev || now)` of what is likely in two logit tensors `[..., V]` -> `[...]`, in nats.

    Before they are compared, probabilities below `min_p` times the largest become 1/V and the rest is scaled so that
    the sum is 1: tokens that nobody would sample do not keep a loop running.
    """
    prev_BTV, now_BTV = _likely(prev_BTV, min_p).log(), _likely(now_BTV, min_p).log()
    return F.kl_div(now_BTV, prev_BTV, reduction="none", log_target=True).sum(-1)


def entropy_change(prev_BTV: torch.Tensor, now_BTV: torch.Tensor) -> torch.Tensor:
    """`|H(now) - H(prev)|` of the predictions of two logit tensors `[..., V]` -> `[...]`, in nats."""
    return (_entropy(now_BTV) - _entropy(prev_BTV)).abs()


def latent_change(prev_BTD: torch.Tensor, now_BTD: torch.Tensor) -> torch.Tensor:
    """`||now - prev|| / ||now||` of two states `[..., D]` -> `[...]`."""
    return (now_BTD - prev_BTD).norm(dim=-1) / now_BTD.norm(dim=-1)


def second_difference(before_BTD: torch.Tensor, prev_BTD: torch.Tensor, now_BTD: torch.Tensor) -> torch.Tensor:
    """Relative change of the step: `||(now - prev) - (prev - before)|| / ||now - prev||`, `[..., D]` -> `[...]`."""
    step_BTD = now_BTD - prev_BTD
    return (step_BTD - (prev_BTD - before_BTD)).norm(dim=-1) / step_BTD.norm(dim=-1)


def cosine_change(prev_BTD: torch.Tensor, now_BTD: torch.Tensor) -> torch.Tensor:
    """`1 - cos(prev, now)` of two states `[..., D]` -> `[...]`."""
    return 1 - F.cosine_similarity(prev_BTD, now_BTD, dim=-1)


def confidence(logits_BTV: torch.Tensor, measure: Literal["top", "gap"] = "top") -> torch.Tensor:
    """Largest probability ("top"), or its distance to the second largest ("gap"): `[..., V]` -> `[...]`."""
    first, *rest = logits_BTV.softmax(-1).topk(1 if measure == "top" else 2, dim=-1).values.unbind(-1)
    return first - rest[0] if rest else first


@dataclass(frozen=True, kw_only=True, eq=False)
class CriterionState:
    """What a criterion remembers of each token.

    Attributes:
        halted_BT: bool, the token has stopped.
        n_updates_BT: int64, iterations that the token has run.
        streak_BT: int64, for how many iterations in a row the criterion has held.
        value_BT: floating, the criterion's value at the latest iteration; not a number while there is no history.
        history: the latest signals, oldest first.
    """

    halted_BT: torch.Tensor
    n_updates_BT: torch.Tensor
    streak_BT: torch.Tensor
    value_BT: torch.Tensor
    history: tuple[torch.Tensor, ...] = ()

    @property
    def all_halted(self) -> bool:
        """True when no token is left."""
        return bool(self.halted_BT.all())


@dataclass(frozen=True, kw_only=True)
class Criterion(Component):
    """Base of the criteria.

    Attributes:
        threshold: a token stops when the value is below it (at or above it for `halting.confidence`).
        patience: for how many iterations in a row that must hold, at least 1.
        reads: class attribute, the signal: "logits" `[B, T, V]` or "state" `[B, T, D]`.
        num_signals: class attribute, how many signals in a row the value needs.
    """

    reads: ClassVar[Literal["logits", "state"]] = "state"
    num_signals: ClassVar[int] = 2
    threshold: float
    patience: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.threshold >= 0, "threshold", "must be at least 0")
        self.require(self.patience >= 1, "patience", "must be at least 1")

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """The criterion's value of each token from its latest signals, oldest first: `[B, T]`."""
        raise NotImplementedError

    def halts(self, *signals: torch.Tensor) -> torch.Tensor:
        """Whether the latest signals (oldest first) satisfy the criterion, bool `[B, T]`; patience is not counted."""
        return self._holds(self.value(*signals))

    def _holds(self, value_BT: torch.Tensor) -> torch.Tensor:
        return value_BT < self.threshold

    def start(self, like_BT: torch.Tensor) -> CriterionState:
        """No token halted, before the first iteration; `like_BT` gives shape and device."""
        counts_BT = torch.zeros_like(like_BT, dtype=torch.int64)
        return CriterionState(
            halted_BT=torch.zeros_like(like_BT, dtype=torch.bool),
            n_updates_BT=counts_BT,
            streak_BT=counts_BT,
            value_BT=torch.full_like(like_BT, torch.nan, dtype=torch.float32),
        )

    def step(self, state: CriterionState, signal: torch.Tensor, *, last: bool = False) -> CriterionState:
        """Account for one iteration that all running tokens have just run.

        Args:
            state: before the iteration.
            signal: what the criterion reads, after the iteration, `[B, T, ...]`. Values of halted tokens are not used.
                Starting from the state before the first iteration is allowed: pass it to `observe` first.
            last: this was the last iteration: every token stops.

        Returns:
            The state after the iteration.
        """
        running_BT = ~state.halted_BT
        state = self.observe(state, signal)
        streak_BT, value_BT = state.streak_BT, state.value_BT
        if len(state.history) == self.num_signals:
            value_BT = self.value(*state.history)
            streak_BT = torch.where(self._holds(value_BT), streak_BT + 1, 0)
        halted_BT = torch.ones_like(running_BT) if last else state.halted_BT | (streak_BT >= self.patience)
        n_updates_BT = state.n_updates_BT + running_BT
        return replace(state, halted_BT=halted_BT, n_updates_BT=n_updates_BT, streak_BT=streak_BT, value_BT=value_BT)

    def observe(self, state: CriterionState, signal: torch.Tensor) -> CriterionState:
        """Remember a signal without judging it: `[B, T, ...]`, detached."""
        return replace(state, history=(*state.history, signal.detach())[-self.num_signals :])


@dataclass(frozen=True, kw_only=True)
class KlHalting(Criterion):
    """Stop when `KL(prev || now)` of the predictions is small (Huginn, 2502.05171: 5e-4; 1e-3 in its code)."""

    kind: ClassVar[str | None] = "halting.kl"
    reads: ClassVar[Literal["logits", "state"]] = "logits"
    threshold: float = 5e-4

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """See `kl_change`."""
        return kl_change(*signals)


@dataclass(frozen=True, kw_only=True)
class MinpKlHalting(Criterion):
    """Stop when `KL(prev || now)` of the likely tokens is small (Huginn's "minp-kl").

    Attributes:
        min_p: see `minp_kl_change`, above 0 and at most 1.
    """

    kind: ClassVar[str | None] = "halting.minp_kl"
    reads: ClassVar[Literal["logits", "state"]] = "logits"
    threshold: float = 1e-5
    min_p: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(0 < self.min_p <= 1, "min_p", "must be above 0 and at most 1")

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """See `minp_kl_change`."""
        prev_BTV, now_BTV = signals
        return minp_kl_change(prev_BTV, now_BTV, self.min_p)


@dataclass(frozen=True, kw_only=True)
class EntropyHalting(Criterion):
    """Stop when the entropy of the prediction hardly changes (Huginn's "entropy-diff")."""

    kind: ClassVar[str | None] = "halting.entropy"
    reads: ClassVar[Literal["logits", "state"]] = "logits"
    threshold: float = 1e-3

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """See `entropy_change`."""
        return entropy_change(*signals)


@dataclass(frozen=True, kw_only=True)
class LatentHalting(Criterion):
    """Stop when the state hardly moves (Huginn's "latent-diff")."""

    kind: ClassVar[str | None] = "halting.latent"
    threshold: float = 0.03

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """See `latent_change`."""
        return latent_change(*signals)


@dataclass(frozen=True, kw_only=True)
class SecondDifferenceHalting(Criterion):
    """Stop when the step itself hardly changes from one iteration to the next (2509.23314)."""

    kind: ClassVar[str | None] = "halting.second_difference"
    num_signals: ClassVar[int] = 3
    threshold: float = 0.05

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """See `second_difference`."""
        return second_difference(*signals)


@dataclass(frozen=True, kw_only=True)
class CosineHalting(Criterion):
    """Stop when the direction of the state hardly changes (Huginn's "cosine"; CALM's "state")."""

    kind: ClassVar[str | None] = "halting.cosine"
    threshold: float = 1e-3

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """See `cosine_change`."""
        return cosine_change(*signals)


@dataclass(frozen=True, kw_only=True)
class ArgmaxHalting(Criterion):
    """Stop when the most probable token has not changed for `patience` iterations (Huginn's "argmax-stability").

    The value is 0 where it stayed and 1 where it changed.
    """

    kind: ClassVar[str | None] = "halting.argmax"
    reads: ClassVar[Literal["logits", "state"]] = "logits"
    threshold: float = 0.5
    patience: int = 5

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """1 where the argmax of two logit tensors `[..., V]` differs, else 0: `[...]`."""
        prev_BTV, now_BTV = signals
        return (prev_BTV.argmax(-1) != now_BTV.argmax(-1)).float()


@dataclass(frozen=True, kw_only=True)
class ConfidenceHalting(Criterion):
    """Stop when the prediction is confident enough (CALM, 2207.07061).

    Attributes:
        threshold: from 0 to 1; a token stops at or above it.
        measure: see `confidence`; CALM's paper has "gap", its code "top".
        decay: tau of CALM's threshold that falls while a text is decoded, see `threshold_at`; 0 keeps it, CALM has 4.
            Read by decoders, which know how far a text is.
    """

    kind: ClassVar[str | None] = "halting.confidence"
    reads: ClassVar[Literal["logits", "state"]] = "logits"
    num_signals: ClassVar[int] = 1
    threshold: float = 0.9
    measure: Literal["top", "gap"] = "top"
    decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.threshold <= 1, "threshold", "must be from 0 to 1")
        self.require(self.decay >= 0, "decay", "must be at least 0")

    def threshold_at(self, progress_B: torch.Tensor) -> torch.Tensor:
        """`threshold (0.9 + 0.1 exp(-decay progress))`, progress from 0 (first new token) to 1 (the last possible)."""
        return self.threshold * (0.9 + 0.1 * torch.exp(-self.decay * progress_B))

    def value(self, *signals: torch.Tensor) -> torch.Tensor:
        """See `confidence`."""
        return confidence(signals[-1], self.measure)

    def _holds(self, value_BT: torch.Tensor) -> torch.Tensor:
        return value_BT >= self.threshold


def _entropy(logits_BTV: torch.Tensor) -> torch.Tensor:
    log_p_BTV = F.log_softmax(logits_BTV, -1)
    return -(log_p_BTV.exp() * log_p_BTV).sum(-1)


def _likely(logits_BTV: torch.Tensor, min_p: float) -> torch.Tensor:
    p_BTV = logits_BTV.softmax(-1)
    kept_BTV = torch.where(p_BTV < min_p * p_BTV.amax(-1, keepdim=True), 1 / p_BTV.shape[-1], p_BTV)
    return kept_BTV / kept_BTV.sum(-1, keepdim=True)

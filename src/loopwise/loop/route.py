"""Which tokens run an iteration, chosen by a router: Mixture-of-Recursions (2507.10524).

Shapes: B batch rows, T tokens, D width, R iterations, b selected rows, t selected tokens.

Expert choice: each iteration scores its tokens and keeps the best few of each sequence; a token that was dropped does
not come back. Top-k looks at the whole sequence, so that it is not causal; a threshold on the score is, and an
auxiliary loss trains the scores for it. Token choice: one router decides once, token by token, how deep each goes.

A selected token gets `x + g * block(x)`, g being the router's weight and `block(x)` containing its own residual (with
token choice after its last iteration, x being the state before the first); the others keep x. Attention runs among the
selected tokens at their true positions.
"""

# ruff: noqa: N802, N815 -- shape suffixes in the names of fields

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The tokens that run an iteration.

    Attributes:
        active_BT: bool, the token runs.
        weights_BT: weight g of the block's output, floating; 0 for tokens that do not run.
        scores_BT: raw router scores, floating; not a number for tokens that were not candidates.
        candidates_BT: bool, tokens among which the choice was made.
    """

    active_BT: torch.Tensor
    weights_BT: torch.Tensor
    scores_BT: torch.Tensor
    candidates_BT: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """Selected token indices of each row, ascending, int64 `[B, t]`.

        Raises:
            ValueError: rows have selected different numbers of tokens; use `groups`.
        """
        counts = self.active_BT.sum(1)
        if not bool((counts == counts[:1]).all()):
            raise ValueError(f"rows selected different numbers of tokens {counts.tolist()}; iterate over groups()")
        return self.active_BT.nonzero()[:, 1].view(len(self.active_BT), -1)

    @property
    def weights(self) -> torch.Tensor:
        """Weights of the selected tokens in the order of `positions`, floating `[B, t]`."""
        return self.weights_BT.gather(1, self.positions)

    def groups(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows with equally many selected tokens together: (rows int64 `[b]`, positions int64 `[b, t]`), t >= 1.

        A visit can run each group as it is; no padding takes part in attention.
        """
        counts = self.active_BT.sum(1)
        for count in counts.unique().tolist():
            if count:
                rows = (counts == count).nonzero()[:, 0]
                yield rows, self.active_BT[rows].nonzero()[:, 1].view(-1, count)


def combine(before_BTD: torch.Tensor, after_BTD: torch.Tensor, selection: Selection) -> torch.Tensor:
    """`x + g * block(x)` for selected tokens, x for the others.

    Args:
        before_BTD: x, floating `[B, T, D]`.
        after_BTD: block outputs `[B, T, D]`; values of tokens that were not selected are not read.
        selection: who ran, and g.

    Returns:
        `[B, T, D]`.
    """
    routed_BTD = before_BTD + selection.weights_BT[..., None] * after_BTD
    return torch.where(selection.active_BT[..., None], routed_BTD, before_BTD)


def capacity_count(capacity: float, num_tokens: int) -> int:
    """How many of `num_tokens` tokens a capacity keeps, `max(1, int(capacity * T))`; T is the full length always."""
    return max(1, int(capacity * num_tokens))


def top_tokens(scores_BT: torch.Tensor, candidates_BT: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """The `count` best candidates of each row; of equal scores the earlier position wins.

    Not causal: whether a token is chosen depends on later ones.

    Args:
        scores_BT: floating `[B, T]`.
        candidates_BT: bool `[B, T]`.
        count: k, the same for every row, or int64 `[B]`.

    Returns:
        bool `[B, T]` with k true entries in each row.

    Raises:
        ValueError: a row has fewer candidates than k.
    """
    available = candidates_BT.sum(1)
    count_B = torch.as_tensor(count, device=available.device).expand(len(available))
    if bool((available < count_B).any()):
        row = int((available < count_B).nonzero()[0])
        few = f"row {row} has {int(available[row])} candidates, fewer than the {int(count_B[row])} to select"
        raise ValueError(f"{few}; lower the capacity, or leave padding out of the batch")
    ranked_BT = scores_BT.masked_fill(~candidates_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen_BT = torch.arange(scores_BT.shape[1], device=count_B.device) < count_B[:, None]
    return torch.zeros_like(candidates_BT).scatter(1, ranked_BT, chosen_BT)


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Component):
    """Each iteration selects tokens.

    Attributes:
        capacities: fraction of the sequence that each iteration keeps, in (0, 1], not increasing; empty for
            `(R - i) / R` (the published default).
        alpha: the weight of a selected token is `alpha * sigmoid(score)`.
        threshold: with `select="threshold"`, tokens with `sigmoid(score)` above it run.
        temperature: the router reads `state / temperature`.
        aux_weight: weight of `auxiliary_loss`.
        z_weight: weight of the mean squared score in training; 0 leaves it out.
        select: what a call does that does not say: "top" or "threshold".
        function: "sigmoid", or "tanh" in its place in the weight, or "none": the weight is the score, without alpha.
        gating: "weighted", or "additive": the weight of selected tokens is 1.
        router: "linear", or "mlp": `W2 gelu(W1 x)` with twice the width inside.
    """

    kind: ClassVar[str | None] = "route.expert"
    capacities: tuple[float, ...] = ()
    alpha: float = 0.1
    threshold: float = 0.5
    temperature: float = 1.0
    aux_weight: float = 0.001
    z_weight: float = 0.0
    select: Literal["top", "threshold"] = "top"
    function: Literal["sigmoid", "tanh", "none"] = "sigmoid"
    gating: Literal["weighted", "additive"] = "weighted"
    router: Literal["linear", "mlp"] = "linear"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        in_range = all(0 < capacity <= 1 for capacity in self.capacities)
        falling = all(a >= b for a, b in zip(self.capacities, self.capacities[1:], strict=False))
        self.require(in_range and falling, "capacities", "must be in (0, 1] and not increase")
        self.require(self.alpha > 0, "alpha", "must be above 0")
        self.require(0 <= self.threshold < 1, "threshold", "must be in [0, 1)")
        self.require(self.temperature > 0, "temperature", "must be above 0")

    def capacity(self, iteration: int, num_iterations: int) -> float:
        """Fraction of the sequence that an iteration keeps.

        Raises:
            ValueError: `capacities` are given for another number of iterations.
        """
        if not self.capacities:
            return (num_iterations - iteration) / num_iterations
        self.require(len(self.capacities) == num_iterations, "capacities", f"must be {num_iterations} numbers, or none")
        return self.capacities[iteration]

    def build(self, width: int, num_iterations: int) -> ExpertRouters:
        """The routers of a loop over a state of width D."""
        return ExpertRouters(self, width, num_iterations)


class ExpertRouters(nn.Module):
    """See `ExpertChoice`; one bias-free router per iteration, parameters `routers.{i}.weight` `[1, D]`.

    Those of a router "mlp" are `routers.{i}.{0,2}.weight`.
    """

    def __init__(self, config: ExpertChoice, width: int, num_iterations: int) -> None:
        super().__init__()
        self.config, self.num_iterations = config, num_iterations
        self.capacities = [config.capacity(iteration, num_iterations) for iteration in range(num_iterations)]
        self.routers = nn.ModuleList(_router(config.router, width, 1) for _ in range(num_iterations))

    def forward(
        self,
        state_BTD: torch.Tensor,
        iteration: int,
        *,
        candidates_BT: torch.Tensor | None = None,
        select: Literal["top", "threshold"] = "top",
        lengths_B: torch.Tensor | None = None,
    ) -> Selection:
        """Select the tokens of an iteration.

        Args:
            state_BTD: state before the iteration, floating `[B, T, D]`.
            iteration: its 0-based index.
            candidates_BT: bool `[B, T]`: `active_BT` of the iteration before, or a padding mask for the first; all if
                None.
            select: "top" keeps a fixed number of each row and is not causal; "threshold" compares each token with
                `config.threshold` and is. Published evaluation code uses "top", with which a prompt's later tokens
                change its earlier ones, and a single token in decoding runs every iteration.
            lengths_B: int64 `[B]`, the tokens of each row that are not padding, of which "top" keeps its fraction, so
                that a row does not depend on its batch mates; T if None.

        Returns:
            The selection; gradients flow through its weights and scores.

        Raises:
            ValueError: "top" with a row that has fewer candidates than the capacity asks for.
        """
        config = self.config
        scores_BT = self.routers[iteration](state_BTD / config.temperature).squeeze(-1)
        if candidates_BT is None:
            candidates_BT = torch.ones_like(scores_BT, dtype=torch.bool)
        if select == "top":
            count: int | torch.Tensor = capacity_count(self.capacities[iteration], scores_BT.shape[1])
            if lengths_B is not None:
                count = (self.capacities[iteration] * lengths_B.double()).long().clamp(min=1).minimum(lengths_B)
            active_BT = top_tokens(scores_BT.detach(), candidates_BT, count)
        else:
            active_BT = candidates_BT & (torch.sigmoid(scores_BT) > config.threshold)
        return Selection(
            active_BT=active_BT,
            weights_BT=torch.where(active_BT, self._weights(scores_BT), 0),
            scores_BT=torch.where(candidates_BT, scores_BT, torch.nan),
            candidates_BT=candidates_BT,
        )

    def _weights(self, scores_BT: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.gating == "additive":
            return torch.ones_like(scores_BT)
        if config.function == "none":
            return scores_BT
        return config.alpha * (torch.tanh(scores_BT) if config.function == "tanh" else torch.sigmoid(scores_BT))


def auxiliary_loss(selection: Selection) -> torch.Tensor:
    """Mean binary cross-entropy of raw scores against selected or not, over the candidates: a scalar, unweighted.

    It makes the threshold of one half agree with the top-k choice of training.
    """
    scores, targets = selection.scores_BT, selection.active_BT.to(selection.scores_BT)
    chosen = selection.candidates_BT
    return F.binary_cross_entropy_with_logits(scores[chosen], targets[chosen])


@dataclass(frozen=True, kw_only=True)
class TokenChoice(Component):
    """Each token selects its depth once, before the first iteration.

    Attributes:
        alpha: the weight of a token is `alpha *` the probability of its depth.
        balancing: "loss" trains with `balance_loss`, "loss_free" moves a bias that only the choice sees, "none".
        balance_weight: weight of `balance_loss`.
        bias_step: how far `update_bias` moves.
        z_weight: weight of `z_loss`; 0 leaves it out.
        temperature: the router reads `state / temperature`.
        function: "softmax" over the depths, or "sigmoid" of each.
        gating: "weighted", or "additive": the weight is 1.
        router: "linear", or "mlp": `W2 gelu(W1 x)` with twice the width inside.
    """

    kind: ClassVar[str | None] = "route.token"
    alpha: float = 1.0
    balancing: Literal["loss", "loss_free", "none"] = "loss"
    balance_weight: float = 0.1
    bias_step: float = 0.001
    z_weight: float = 0.0
    temperature: float = 1.0
    function: Literal["softmax", "sigmoid"] = "softmax"
    gating: Literal["weighted", "additive"] = "weighted"
    router: Literal["linear", "mlp"] = "linear"

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.alpha > 0, "alpha", "must be above 0")
        self.require(self.temperature > 0, "temperature", "must be above 0")

    def build(self, width: int, num_iterations: int) -> TokenRouter:
        """The router of a loop over a state of width D."""
        return TokenRouter(self, width, num_iterations)


@dataclass(frozen=True, kw_only=True, eq=False)
class DepthChoice:
    """The depth of each token.

    Attributes:
        depth_BT: int64, 0-based index of the last iteration that the token runs.
        weights_BT: weight of the block's output at that iteration, floating.
        logits_BTR: raw router scores of every depth, floating.
        mask_BT: bool, tokens that count (not padding).
    """

    depth_BT: torch.Tensor
    weights_BT: torch.Tensor
    logits_BTR: torch.Tensor
    mask_BT: torch.Tensor

    def selection(self, iteration: int) -> Selection:
        """Who runs an iteration: tokens of its depth or deeper.

        Inside the loop the block's output replaces the state of these tokens; `finish` applies the weight once.
        """
        active_BT = self.mask_BT & (self.depth_BT >= iteration)
        return Selection(
            active_BT=active_BT,
            weights_BT=torch.where(active_BT, self.weights_BT, 0),
            scores_BT=self.logits_BTR[..., iteration],
            candidates_BT=self.mask_BT,
        )

    def finish(self, start_BTD: torch.Tensor, state_BTD: torch.Tensor) -> torch.Tensor:
        """`x + w * out`, from the state before the loop and the one after it, in which each token kept its last output.

        Padding keeps x. Shapes `[B, T, D]`.
        """
        finished_BTD = start_BTD + self.weights_BT[..., None] * state_BTD
        return torch.where(self.mask_BT[..., None], finished_BTD, start_BTD)

    @property
    def counts(self) -> torch.Tensor:
        """How many tokens chose each depth, int64 `[R]`; sum them over ranks before `update_bias`."""
        return self.depth_BT[self.mask_BT].bincount(minlength=self.logits_BTR.shape[-1])


class TokenRouter(nn.Module):
    """See `TokenChoice`; parameter `router.weight` `[R, D]`, buffer `router_bias` `[R]` for loss-free balancing.

    The parameters of a router "mlp" are `router.{0,2}.weight`.
    """

    router_bias: torch.Tensor

    def __init__(self, config: TokenChoice, width: int, num_iterations: int) -> None:
        super().__init__()
        self.config, self.num_iterations = config, num_iterations
        self.router = _router(config.router, width, num_iterations)
        if config.balancing == "loss_free":
            self.register_buffer("router_bias", torch.zeros(num_iterations))

    def forward(self, state_BTD: torch.Tensor, *, mask_BT: torch.Tensor | None = None) -> DepthChoice:
        """Choose depths.

        Args:
            state_BTD: state before the loop, floating `[B, T, D]`.
            mask_BT: bool `[B, T]`, tokens that are not padding; all if None.

        Returns:
            The choice. A bias moves the choice and not the weight.
        """
        logits_BTR = self.router(state_BTD / self.config.temperature)
        chances_BTR = logits_BTR.sigmoid() if self.config.function == "sigmoid" else logits_BTR.softmax(-1)
        weighted_BTR = self.config.alpha * chances_BTR
        ranked_BTR = weighted_BTR.detach()
        if self.config.balancing == "loss_free":
            ranked_BTR = ranked_BTR + self.router_bias
        depth_BT = ranked_BTR.argmax(-1)
        if mask_BT is None:
            mask_BT = torch.ones_like(depth_BT, dtype=torch.bool)
        weights_BT = weighted_BTR.gather(-1, depth_BT[..., None]).squeeze(-1)
        if self.config.gating == "additive":
            weights_BT = torch.ones_like(weights_BT)
        return DepthChoice(depth_BT=depth_BT, weights_BT=weights_BT, logits_BTR=logits_BTR, mask_BT=mask_BT)

    @torch.no_grad()
    def update_bias(self, counts_R: torch.Tensor) -> None:
        """Move the bias of each depth by `bias_step` towards equal use: up if chosen less than the mean, else down.

        Call it once per optimizer step with the counts of all micro-batches and ranks (`DepthChoice.counts`).

        Raises:
            ValueError: the router is not balanced this way.
        """
        if self.config.balancing != "loss_free":
            raise ValueError(f"route.token: update_bias needs balancing='loss_free', not {self.config.balancing!r}")
        load_R = counts_R.to(self.router_bias)
        self.router_bias += self.config.bias_step * torch.sign(load_R.mean() - load_R)


def balance_loss(choice: DepthChoice) -> torch.Tensor:
    """`R sum_i P_i f_i`, P the mean probability of a depth and f the fraction that chose it: a scalar, unweighted.

    1 when both are uniform. P are probabilities: published code multiplies them by alpha, which is 1 there.
    """
    mean_R = choice.logits_BTR.softmax(-1)[choice.mask_BT].mean(0)
    fraction_R = choice.counts / choice.mask_BT.sum()
    return len(mean_R) * (mean_R * fraction_R).sum()


def z_loss(choice: DepthChoice) -> torch.Tensor:
    """Mean of `logsumexp(scores)^2` over tokens: keeps router scores small; a scalar, unweighted (2202.08906)."""
    return choice.logits_BTR.logsumexp(-1)[choice.mask_BT].square().mean()


def _router(kind: str, width: int, num_scores: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, num_scores, bias=False)
    inner = nn.Linear(width, 2 * width, bias=False)
    return nn.Sequential(inner, nn.GELU(), nn.Linear(2 * width, num_scores, bias=False))

"""What is read from the iterations of a loop and what is learned from them, as functions of losses and gates.

Shapes: B batch rows, T tokens, D width, R iterations, V vocabulary.

Losses are per token and per iteration, `losses_RBT`; `mask_BT` marks the tokens that count. Every loss is a mean over
those tokens, or their sum over `num_items` where a step is made of several batches and the caller knows the number of
tokens in all of them. With no valid token the loss is 0 and so is its gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn import functional as F

IGNORE = -100


def shift_labels(labels_BT: torch.Tensor, *, ignore_index: int = IGNORE) -> torch.Tensor:
    """The next token of each position: labels moved one to the left, `ignore_index` at the end; int64 `[B, T]`."""
    return F.pad(labels_BT[..., 1:], (0, 1), value=ignore_index)


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, *, ignore_index: int = IGNORE) -> torch.Tensor:
    """Cross-entropy of each token, in nats.

    Args:
        logits_BTV: floating `[B, T, V]` or `[R, B, T, V]`; half precision is computed in float32.
        labels_BT: the token that each position should predict (see `shift_labels`), int64 `[B, T]`.
        ignore_index: label of positions that do not count; their loss is 0.

    Returns:
        `[B, T]` or `[R, B, T]`.
    """
    if logits_BTV.dtype in (torch.float16, torch.bfloat16):
        logits_BTV = logits_BTV.float()
    labels = labels_BT.expand(logits_BTV.shape[:-1])
    flat = F.cross_entropy(logits_BTV.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    return flat.view(labels.shape)


def masked_mean(
    values_BT: torch.Tensor, mask_BT: torch.Tensor, num_items: int | float | torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of the valid entries of `values_BT` `[..., B, T]` over the last two axes, or their sum over `num_items`.

    Entries that do not count may be anything, not-a-number included.
    """
    total = torch.where(mask_BT, values_BT, 0).sum((-2, -1))
    return total / (mask_BT.sum().clamp(min=1) if num_items is None else num_items)


def final(losses_RBT: torch.Tensor, mask_BT: torch.Tensor, *, num_items=None) -> torch.Tensor:
    """Loss of the last iteration, a scalar."""
    return masked_mean(losses_RBT[-1], mask_BT, num_items)


def last_mean(losses_RBT: torch.Tensor, mask_BT: torch.Tensor, window: int, *, num_items=None) -> torch.Tensor:
    """Mean loss of the last `window` iterations, all of them if there are fewer (Yang et al., 2311.12424): a scalar."""
    return masked_mean(losses_RBT[-window:], mask_BT, num_items).mean()


def deep_supervision(
    losses_RBT: torch.Tensor,
    mask_BT: torch.Tensor,
    weights: Literal["uniform", "linear", "intermediate"] = "uniform",
    *,
    coefficient: float = 0.1,
    num_items=None,
) -> torch.Tensor:
    """Weighted sum of the losses of all iterations, a scalar.

    Args:
        losses_RBT: floating `[R, B, T]`.
        mask_BT: bool `[B, T]`.
        weights: `1 / R` each; "linear": `i / sum(i)`, i from 1 (CALM, 2207.07061); "intermediate": 1 for the last and
            `coefficient` for each earlier one (Relaxed Recursive Transformers, 2410.20672: 0.1).
        coefficient: see "intermediate".
        num_items: see the top of the file.
    """
    num_iterations = len(losses_RBT)
    if weights == "uniform":
        weight_R = torch.full([num_iterations], 1 / num_iterations)
    elif weights == "linear":
        weight_R = torch.arange(1, num_iterations + 1) / (num_iterations * (num_iterations + 1) / 2)
    else:
        weight_R = torch.tensor([coefficient] * (num_iterations - 1) + [1.0])
    return weight_R.to(losses_RBT) @ masked_mean(losses_RBT, mask_BT, num_items)


def entropy(log_pdf_RBT: torch.Tensor) -> torch.Tensor:
    """Entropy of stopping distributions given by their logarithm, `[R, ...]` -> `[...]`, in nats."""
    return -(log_pdf_RBT.exp() * log_pdf_RBT).sum(0)


def expected(
    losses_RBT: torch.Tensor, log_pdf_RBT: torch.Tensor, mask_BT: torch.Tensor, *, beta: float = 0.1, num_items=None
) -> torch.Tensor:
    """`sum_t p_t L_t - beta H(p)`, a scalar: the first stage of Ouro (2510.25741).

    The entropy term is a KL divergence to the uniform distribution up to the constant `log R`.

    Args:
        losses_RBT: floating `[R, B, T]`.
        log_pdf_RBT: logarithm of the stopping distribution (`halting.exit_log_pdf`), `[R, B, T]`.
        mask_BT: bool `[B, T]`.
        beta: weight of the entropy (0.1, later 0.05 in the paper).
        num_items: see the top of the file.
    """
    expected_BT = (log_pdf_RBT.exp() * losses_RBT).sum(0)
    return masked_mean(expected_BT - beta * entropy(log_pdf_RBT), mask_BT, num_items)


def expected_logits(logits_RBTV: torch.Tensor, log_pdf_RBT: torch.Tensor) -> torch.Tensor:
    """`sum_t p_t logits_t`, `[B, T, V]`: what the published Ouro file trains on and can read out, unlike its paper."""
    return (log_pdf_RBT.exp()[..., None] * logits_RBTV).sum(0)


def gate_loss(
    gate_logits_RBT: torch.Tensor,
    losses_RBT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    slope: float = 50.0,
    margin: float = 0.005,
    num_items=None,
) -> torch.Tensor:
    """Teach the gate to go on where another iteration helped, a scalar: the second stage of Ouro (2510.25741).

    `w_t = sigmoid(slope * (max(0, L_{t-1} - L_t) - margin))` is what the probability `1 - lambda_t` to go on should be;
    the loss is `1/R sum_{t=2}^{R} BCE(1 - lambda_t, w_t)`: R - 1 terms divided by R, as in the paper. The losses are
    detached; the layers that the gate reads are to be frozen by the caller, as in the paper.

    Args:
        gate_logits_RBT: `lambda = sigmoid(z)`, floating `[R, B, T]`; the first is not read.
        losses_RBT: floating `[R, B, T]`.
        mask_BT: bool `[B, T]`.
        slope: steepness of the target.
        margin: improvement in nats at which the target is one half.
        num_items: see the top of the file.
    """
    losses_RBT = losses_RBT.detach()
    gain_RBT = (losses_RBT[:-1] - losses_RBT[1:]).clamp(min=0)
    target_RBT = torch.sigmoid(slope * (gain_RBT - margin))
    bce_RBT = F.binary_cross_entropy_with_logits(-gate_logits_RBT[1:], target_RBT, reduction="none")
    return masked_mean(bce_RBT, mask_BT, num_items).sum() / len(losses_RBT)


def ponder_cost(ponder_BT: torch.Tensor, mask_BT: torch.Tensor, *, num_items=None) -> torch.Tensor:
    """Mean number of iterations plus remainder (`ActState.ponder_BT`), a scalar: ACT's time penalty (1603.08983).

    Its gradient is that of the remainder: each probability before the last iteration lowers it.
    """
    return masked_mean(ponder_BT, mask_BT, num_items)


def geometric_log_prior(rate: float, num_iterations: int) -> torch.Tensor:
    """Logarithm of `rate (1 - rate)^(n - 1)`, n = 1..R, divided by its sum: float64 `[R]`.

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate!r} of the geometric prior must be between 0 and 1")
    return F.log_softmax(torch.arange(num_iterations, dtype=torch.float64) * math.log1p(-rate), 0)


def prior_kl(
    log_pdf_RBT: torch.Tensor, log_prior_R: torch.Tensor, mask_BT: torch.Tensor, *, num_items=None
) -> torch.Tensor:
    """`KL(p || prior)`, a scalar: PonderNet's regulariser (2107.05407).

    The direction of the paper; a widely read implementation has `KL(prior || p)` and a prior that does not sum to 1.

    Args:
        log_pdf_RBT: logarithm of the stopping distribution, floating `[R, B, T]`.
        log_prior_R: logarithm of the prior, `[R]`.
        mask_BT: bool `[B, T]`.
        num_items: see the top of the file.
    """
    ratio_RBT = log_pdf_RBT - log_prior_R.to(log_pdf_RBT)[:, None, None]
    return masked_mean((log_pdf_RBT.exp() * ratio_RBT).sum(0), mask_BT, num_items)


def shortcut(
    long_loss: torch.Tensor,
    short_loss: torch.Tensor,
    long_BTD: torch.Tensor,
    short_BTD: torch.Tensor,
    *,
    short_weight: float = 0.1,
    consistency_weight: float = 0.1,
    mask_BT: torch.Tensor | None = None,
    num_items=None,
) -> torch.Tensor:
    """`L_long + 0.1 L_short + 0.1 MSE(stopgrad(long), short)`, a scalar: LoopFormer (2602.11451).

    Args:
        long_loss: loss of the full schedule, a scalar.
        short_loss: loss of the shorter schedule, a scalar.
        long_BTD: output of the full schedule after the final norm, floating `[B, T, D]`; no gradient flows into it.
        short_BTD: that of the shorter one.
        short_weight: weight of the short loss.
        consistency_weight: weight of the squared difference.
        mask_BT: tokens whose outputs are compared; all, as published, if None.
        num_items: see the top of the file; read where there is a mask.
    """
    square_BT = (long_BTD.detach() - short_BTD).square().mean(-1)
    consistency = square_BT.mean() if mask_BT is None else masked_mean(square_BT, mask_BT, num_items)
    return long_loss + short_weight * short_loss + consistency_weight * consistency


def distillation(
    student_BTV: torch.Tensor,
    teacher_BTV: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    temperature: float = 1.0,
    num_items=None,
) -> torch.Tensor:
    """`tau^2 KL(teacher || student)` of predictions softened by the temperature tau, a scalar (forward KL, 1503.02531).

    Args:
        student_BTV: logits, floating `[B, T, V]`.
        teacher_BTV: logits `[B, T, V]`; no gradient flows into them.
        mask_BT: bool `[B, T]`.
        temperature: tau, above 0.
        num_items: see the top of the file.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature!r} must be above 0")
    student_BTV = F.log_softmax(student_BTV / temperature, -1)
    teacher_BTV = F.log_softmax(teacher_BTV.detach() / temperature, -1)
    divergence_BT = F.kl_div(student_BTV, teacher_BTV, reduction="none", log_target=True).sum(-1)
    return temperature**2 * masked_mean(divergence_BT, mask_BT, num_items)

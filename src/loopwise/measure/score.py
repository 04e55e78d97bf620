"""How well a causal language model predicts a text: perplexity with every token counted exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loopwise.models.attach import eval_mode
from loopwise.models.loop_parts import needs_generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """Prediction of a text of T tokens.

    Attributes:
        tokens: number of predicted tokens, T - 1: the first has nothing before it.
        nll: mean negative log likelihood in nats per token.
        token_nll: float32 `[T - 1]` on the CPU, the value of every token after the first, for paired comparisons of two
            models on the same text. None unless asked for.
    """

    tokens: int
    nll: float
    token_nll: torch.Tensor | None = None

    @property
    def perplexity(self) -> float:
        """`exp(nll)`; infinite where that is no longer a number."""
        return math.exp(self.nll) if not self.nll > 709 else math.inf

    @property
    def bits_per_token(self) -> float:
        """`nll` in bits."""
        return self.nll / math.log(2)


def perplexity(
    model: nn.Module,
    input_ids: Any,
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 1,
    per_token: bool = False,
    seed: int = 0,
) -> Score:
    """Score one text under a model, with windows that slide over it.

    A window feeds `window` tokens and predicts the token after each of them. Windows start every `stride` tokens; of a
    later window only the predictions that no earlier one has made are counted, so they have at least `window - stride`
    tokens of context. Without overlap (`stride = window`) the first counted token of a window sees one token. Tokens
    2 .. T are each counted once, whatever the windows are.

    The model is scored in eval mode without gradient and put back. Losses are computed in fp32 and summed in fp64.

    Args:
        model: a transformers causal language model; logits at position t predict token t + 1.
        input_ids: one text, integers `[T]` or `[1, T]`, tensor or sequence.
        window: largest number of tokens fed at once, at least 1.
        stride: tokens between window starts, 1 .. `window`; None means `window`.
        batch_size: number of windows of equal length run together.
        per_token: also return the value of every token.
        seed: of first states that a loop draws at random.

    Returns:
        The score.

    Raises:
        ValueError: fewer than two tokens, more than one text, or numbers outside their range.
    """
    stride = window if stride is None else stride
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie in 1 .. window ({window}), got {stride}: a larger one would skip tokens")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ids_T = _one_text(input_ids).to(next(model.parameters()).device)
    num_predicted = len(ids_T) - 1
    options = dict(getattr(model, "causal_options", {}))  # a model that may look ahead must not do so here
    if needs_generator(model):
        options["generator"] = torch.Generator().manual_seed(seed)
    nll_T = torch.empty(num_predicted)
    with eval_mode(model):
        for windows in _batches(_windows(num_predicted, window, stride), batch_size):
            feed_BT = torch.stack([ids_T[start:end] for start, end, _ in windows])
            goal_BT = torch.stack([ids_T[start + 1 : end + 1] for start, end, _ in windows])
            logits_BTV = model(input_ids=feed_BT, use_cache=False, **options).logits
            loss_N = F.cross_entropy(logits_BTV.float().flatten(0, 1), goal_BT.flatten(), reduction="none")
            loss_BT = loss_N.view(goal_BT.shape).cpu()
            for (start, end, counted), loss_T in zip(windows, loss_BT, strict=True):
                nll_T[counted:end] = loss_T[counted - start :]
    return Score(
        tokens=num_predicted,
        nll=float(nll_T.double().mean()),
        token_nll=nll_T if per_token else None,
    )


def _one_text(input_ids: Any) -> torch.Tensor:
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"input_ids must hold one text, [T] or [1, T], got shape {list(ids.shape)}")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: at least 2 are needed, the first is not predicted")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers, got {ids.dtype}")
    return ids.long()


def _windows(num_predicted: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first counted) of every window: it feeds tokens start .. end - 1, which predict start + 1 .. end."""
    counted = 0
    for start in range(0, num_predicted, stride):
        end = min(start + window, num_predicted)
        yield start, end, counted
        if end == num_predicted:
            return
        counted = end


def _batches(windows: Iterator[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Up to `size` windows of equal length at a time, so that no padding is needed."""
    batch: list[tuple[int, int, int]] = []
    for item in windows:
        if batch and (len(batch) == size or item[1] - item[0] != batch[0][1] - batch[0][0]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch

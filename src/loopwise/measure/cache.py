"""What an approximate cache policy costs: its next-token distributions against those of policy `own`, which is exact.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loopwise.cache.policy import CachePolicy
from loopwise.models.attach import set_cache
from loopwise.models.hub import new_cache
from loopwise.models.playing import looping_of


@dataclass(frozen=True, kw_only=True)
class CacheError:
    """How far a policy is from exact, over the measured positions.

    Attributes:
        policy: the policy.
        tokens: number of positions.
        max_abs: largest difference of a logit.
        mean_kl: mean of KL(exact || policy) in nats.
        same_top1: share of positions with the same most likely token.
    """

    policy: str
    tokens: int
    max_abs: float
    mean_kl: float
    same_top1: float

    def __str__(self) -> str:
        if CachePolicy.parse(self.policy).is_exact:
            return f"cache policy {self.policy} is exact"
        return (
            f"cache policy {self.policy} is approximate: over {self.tokens} tokens the largest logit difference is "
            f"{self.max_abs:.3g}, mean KL {self.mean_kl:.3g} nats, same top token {self.same_top1:.1%}"
        )


@torch.no_grad()
def cache_error(model: Any, input_ids: torch.Tensor, policy: str, *, prefill: int | None = None) -> CacheError:
    """Measure a policy on given text, as decoding meets it: a prompt at once, then token by token.

    Args:
        model: a model with a plan; its own policy is put back afterwards.
        input_ids: int64 `[1, T]`, T >= 2.
        policy: the policy to measure, see `loopwise.cache.policy`.
        prefill: length of the prompt, default half of the tokens.

    Raises:
        ValueError: no plan, an unknown policy, or fewer than two tokens.
    """
    num_tokens = input_ids.shape[1]
    if input_ids.shape[0] != 1 or num_tokens < 2:
        raise ValueError(f"input_ids must have shape [1, T] with T >= 2, not {list(input_ids.shape)}")
    split = max(1, num_tokens // 2) if prefill is None else prefill
    if not 1 <= split <= num_tokens:
        raise ValueError(f"prefill is {prefill}: use a length from 1 to {num_tokens}")
    looping = looping_of(model)
    if looping is None:
        raise ValueError("this model has no plan: use loopwise.attach(model, plan) first")
    CachePolicy.parse(policy)
    before = looping.policy
    try:
        set_cache(model, "own")
        exact_TV = _decode(model, input_ids, split)
        set_cache(model, policy)
        got_TV = _decode(model, input_ids, split)
    finally:
        looping.policy = before
    log_exact, log_got = exact_TV.log_softmax(-1), got_TV.log_softmax(-1)
    kl_T = (log_exact.exp() * (log_exact - log_got)).sum(-1)
    return CacheError(
        policy=policy,
        tokens=num_tokens,
        max_abs=(exact_TV - got_TV).abs().max().item(),
        mean_kl=kl_T.mean().item(),
        same_top1=(exact_TV.argmax(-1) == got_TV.argmax(-1)).float().mean().item(),
    )


def _decode(model: Any, input_ids: torch.Tensor, split: int) -> torch.Tensor:
    """Logits `[T, V]` of a prompt of `split` tokens and of single tokens after it, in float32."""
    cache = new_cache(model)
    parts = [model(input_ids[:, :split], past_key_values=cache, use_cache=True).logits]
    for t in range(split, input_ids.shape[1]):
        parts.append(model(input_ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)[0].float()

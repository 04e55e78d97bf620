"""Attention written out, and the masks of attention.

Shapes: B batch, T tokens, S tokens that are seen (cached ones first), D width, H heads, K kv heads, d head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from loopwise.models.hub import decoder_mask

if TYPE_CHECKING:
    from loopwise.models.mixers import AttentionConfig


def attention_mask(
    mixer: AttentionConfig,
    model_config: Any,
    hidden_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    cache: Any = None,
    position_ids_BT: torch.Tensor | None = None,
    prefix_BT: torch.Tensor | None = None,
) -> Any:
    """The mask for a mixer, made once per forward and handed to all blocks with the same `mask` and `sliding_window`.

    See `loopwise.models.hub.decoder_mask` for arguments, result and errors.
    """
    return decoder_mask(
        mixer.mask,
        model_config,
        hidden_BTD,
        mask_BT,
        cache,
        position_ids_BT,
        prefix_BT=prefix_BT,
        sliding_window=mixer.sliding_window,
    )


def implied_mask(name: str, query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """What a missing mask of causal attention stands for, where the attention function would not know it by itself.

    SDPA is causal by itself but has no window; eager and flex see everything; flash knows both. A dense mask would do
    for flex too, but crashes its CPU kernel (torch 2.13).

    Args:
        name: the attention implementation.
        query: `[B, H, T, d]`, the last T of the S tokens.
        key: `[B, K, S, d]`.
        window: the sliding window, or None.

    Returns:
        An additive mask `[1, 1, T, S]` of the query's dtype, or None where the function needs none.

    Raises:
        ValueError: flex attention, which needs a mask of its own kind.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    beyond = window is not None and num_keys > window
    if not (beyond or (num_queries > 1 and name != "sdpa")) or name not in ("sdpa", "eager", "flex_attention"):
        return None
    if name == "flex_attention":
        raise ValueError("flex_attention needs an attention_mask: pass the one that attention_mask(mixer, ...) makes")
    positions = torch.arange(num_keys, device=query.device)
    distance = positions[num_keys - num_queries :, None] - positions
    hidden = (distance < 0) | (distance >= (window or num_keys))
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    return mask.masked_fill(hidden, torch.finfo(query.dtype).min)[None, None]


def eager_attention(
    module: Any,
    query_BHTd: torch.Tensor,
    key_BKSd: torch.Tensor,
    value_BKSd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: `softmax(q k' * scaling + mask) v`, the softmax in float32 at least.

    Returns:
        `[B, T, H, d]` and the weights `[B, H, T, S]`.
    """
    key = key_BKSd.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value_BKSd.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query_BHTd @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = F.dropout(weights.to(query_BHTd.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights

"""A cache entry that holds only the tokens that visited its slot (recursion-wise caching, MoR 2507.10524).

Rows may hold different numbers of tokens: they are stored from the left, each row in the order of its tokens, and
`where_BS` says which token of the sequence every place holds.

Shapes: B rows, K kv heads, S places, T tokens of a call, d head size, b visiting rows, t visiting tokens of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicLayer

from loopwise.loop.execute import Visit


class SelectedLayer(DynamicLayer):
    """Keys and values of the tokens that took part.

    Attributes:
        where_BS: index in the sequence (padding counted) of the token in every place, -1 in a place without one.
        seen: length of the sequence so far, tokens that did not take part counted.
        is_whole: every token so far took part, so that this is an ordinary entry.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.reset()

    def begin(self, num_tokens: int) -> None:
        """A call with `num_tokens` more tokens has begun, whether or not any of them will visit this slot."""
        self.past, self.seen = self.seen, self.seen + num_tokens
        self._coming = None
        self.has_been_visited = False

    def end(self) -> None:
        """The call is over."""
        self._coming = None
        self.is_whole &= self.has_been_visited or self.seen == self.past

    def expect(self, visit: Visit, num_rows: int, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Make room for the tokens of a visit, whose keys and values `update` brings next.

        Returns:
            Which token of the sequence every place of the visiting rows holds then, int64 `[b, S]`.
        """
        rows = torch.arange(num_rows, device=device) if visit.rows is None else visit.rows
        positions = torch.arange(num_tokens, device=device) if visit.positions is None else visit.positions
        positions = positions.expand(len(rows), -1)
        if self.where_BS is None:
            self.where_BS = torch.full((num_rows, 0), -1, device=device)
        first = (self.where_BS[rows] >= 0).sum(1, keepdim=True)
        places = first + torch.arange(positions.shape[1], device=device)
        size = max(self.where_BS.shape[1], int(places.max()) + 1)
        where_BS = F.pad(self.where_BS, (0, size - self.where_BS.shape[1]), value=-1)
        self.where_BS = where_BS.index_put((rows[:, None], places), positions + self.past)
        self._coming = rows, places, size, num_rows
        self.has_been_visited = True
        self.is_whole &= not visit.is_partial
        return self.where_BS[rows]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Store `[b, K, t, d]` of the visit announced by `expect`; returns all of its rows, `[b, K, S, d]` each."""
        assert self._coming is not None, "expect comes before update"
        (rows, places, size, num_rows), self._coming = self._coming, None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = key_states.new_zeros(num_rows, key_states.shape[1], 0, key_states.shape[3])
            self.values = value_states.new_zeros(num_rows, value_states.shape[1], 0, value_states.shape[3])
        assert self.keys is not None and self.values is not None
        where = rows[:, None], places
        self.keys, self.values = _put(self.keys, key_states, where, size), _put(self.values, value_states, where, size)
        if len(rows) == num_rows:
            return self.keys, self.values
        return self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        """Length of the sequence so far, which masks and positions go by."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of the sequence; a positive number keeps so many instead."""
        self.seen = min(self.seen, self.seen + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove)
        if self.where_BS is None:
            return
        self.where_BS = torch.where(self.where_BS < self.seen, self.where_BS, -1)
        size = int((self.where_BS >= 0).sum(1).max()) if self.where_BS.numel() else 0
        self._map(lambda tensor, axis: tensor.narrow(axis, 0, size))

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.where_BS = None
        self.is_initialized, self.is_whole, self.has_been_visited = False, True, False
        self.seen = self.past = 0
        self._coming = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Choose rows, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda tensor, _: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Choose rows."""
        self._map(lambda tensor, _: tensor[indices.to(tensor.device)])

    def _map(self, change: Any) -> None:
        """Change all tensors; `change` is told the axis of places."""
        if self.where_BS is not None:
            self.where_BS = change(self.where_BS, 1)
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys, 2), change(self.values, 2)


def selected_mask(
    mask: torch.Tensor | None, where_bS: torch.Tensor, visit: Visit, past: int, num_tokens: int
) -> torch.Tensor:
    """The attention mask of a visit over an entry that holds a part of the sequence.

    Args:
        mask: the mask of a whole visit, `[B or 1, 1, T, past + T]`, boolean (true is seen) or additive; None is causal.
        where_bS: what `SelectedLayer.expect` returned.
        visit: the visit.
        past: tokens of the sequence before this call.
        num_tokens: T.

    Returns:
        `[b, 1, t, S]`, of the kind and dtype of `mask`; boolean when there is none.

    Raises:
        ValueError: the attention function takes masks of another form.
    """
    num_rows, device = len(where_bS), where_bS.device
    positions = torch.arange(num_tokens, device=device) if visit.positions is None else visit.positions
    positions_bt = positions.expand(num_rows, -1)
    filled_b1S = (where_bS >= 0)[:, None]
    if mask is None:
        return (filled_b1S & (where_bS[:, None] <= positions_bt[..., None] + past))[:, None]
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError("visits by a part of the tokens with a cache need attention 'sdpa' or 'eager'")
    mask_BTS = mask[:, 0]
    if len(mask_BTS) > 1 and visit.rows is not None:
        mask_BTS = mask_BTS[visit.rows]
    rows = torch.arange(num_rows, device=device) if len(mask_BTS) > 1 else torch.zeros_like(positions_bt[:, 0])
    seen = mask_BTS[rows[:, None, None], positions_bt[..., None], where_bS.clamp(min=0)[:, None]]
    if seen.dtype == torch.bool:
        return (seen & filled_b1S)[:, None]
    return torch.where(filled_b1S, seen, torch.finfo(seen.dtype).min)[:, None]


def _put(whole: torch.Tensor, part: torch.Tensor, where: tuple[torch.Tensor, torch.Tensor], size: int) -> torch.Tensor:
    """`[B, K, size, d]`: what was there, and a part `[b, K, t, d]` in its places."""
    grown = F.pad(whole, (0, 0, 0, size - whole.shape[2]))
    return grown.transpose(1, 2).index_put(where, part.transpose(1, 2).to(whole.dtype)).transpose(1, 2)

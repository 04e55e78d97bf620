"""Keys and values by absolute position: a cache that rows at different depths share, allocated once.

A transformers cache grows at its end and holds what all rows have in common. Here every row and every token has a place
of its own from the start, `[stores, rows, K, capacity, d]`, and a call says where it writes. So tokens may be computed
again, rows may be at different iterations of a loop in one call, and a row may be given to another request.

Shapes: B rows of the cache, S capacity in tokens, b rows and t tokens of a call, K kv heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Tokens of some rows.

    Attributes:
        rows_b: rows of the cache, int64 `[b]`. A row may come several times with different positions: one pass can so
            have tokens of one row at different rungs.
        tokens_bt: int64 `[b, t]`.
        positions_bt: their positions from 0, int64 `[b, t]`, ascending in every row; -1 for places that hold no token.
    """

    rows_b: torch.Tensor
    tokens_bt: torch.Tensor
    positions_bt: torch.Tensor

    @property
    def valid_bt(self) -> torch.Tensor:
        """Which places hold a token, bool."""
        return self.positions_bt >= 0

    def take(self, index: torch.Tensor) -> Span:
        """Some of the rows, by their place in this span, int64 `[n]`."""
        return Span(rows_b=self.rows_b[index], tokens_bt=self.tokens_bt[index], positions_bt=self.positions_bt[index])


class SlotCache:
    """The stores of all visits.

    Args:
        num_rows: B.
        capacity: S.
        device: where they are.

    Attributes:
        bytes_allocated: of all stores so far; a store is made at its first use.
    """

    def __init__(self, num_rows: int, capacity: int, device: torch.device):
        self.num_rows, self.capacity, self.device = num_rows, capacity, device
        self._stores: dict[tuple[Any, int], list[torch.Tensor]] = {}

    @property
    def bytes_allocated(self) -> int:
        """Bytes of all stores."""
        return sum(tensor.numel() * tensor.element_size() for pair in self._stores.values() for tensor in pair)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token takes in all stores."""
        return self.bytes_allocated / (self.num_rows * (self.capacity + 1))

    def view(
        self,
        key: Any,
        num_places: int,
        places: int | torch.Tensor,
        span: Span,
        length: int,
        *,
        writes: bool | torch.Tensor = True,
        reads: torch.Tensor | None = None,
    ) -> _View:
        """What a layer finds in the place of its cache during one visit.

        Args:
            key: names the visit, without its place.
            num_places: stores of this visit.
            places: which of them each row of the span writes and reads: one for all, or int64 `[b]`.
            span: the tokens.
            length: how many positions are read, from 0.
            writes: False returns what is there and forgets the new keys and values; one for all, or bool `[b]`.
            reads: the store that each position is read from, int64 `[b, length]`, in the place of `places`.
        """
        return _View(self, key, num_places, places, span, length, writes, reads)

    def copy(
        self,
        key: Any,
        rows_n: torch.Tensor,
        positions_n: torch.Tensor,
        source_n: torch.Tensor,
        written_n: torch.Tensor,
    ) -> None:
        """Copy single tokens of a visit from one store to those that they have not reached.

        Args:
            key: names the visit.
            rows_n: rows of the tokens, int64 `[n]`.
            positions_n: their positions.
            source_n: the store that is copied.
            written_n: how many stores, from the first, each token has written.
        """
        for pair in self._pairs(key):
            for tensor in pair:
                num_places = tensor.shape[0]
                later = torch.arange(num_places, device=self.device)[:, None] >= written_n
                place, token = later.nonzero().unbind(1)
                rows, positions = rows_n[token], positions_n[token]
                tensor[place, rows, :, positions] = tensor[source_n[token], rows, :, positions]

    def copy_visit(self, source: Any, target: Any, rows_n: torch.Tensor, positions_n: torch.Tensor) -> None:
        """Copy single tokens of one visit to another of the same shape, each with a single store.

        Raises:
            ValueError: their keys and values have other shapes.
        """
        for pair, others in zip(self._pairs(target), self._pairs(source), strict=True):
            for tensor, other in zip(pair, others, strict=True):
                if tensor.shape != other.shape:
                    raise ValueError(
                        f"keys and values of one layer have shape {list(other.shape[2:])}, of another "
                        f"{list(tensor.shape[2:])}: they cannot be copied, use cache='propagate' or 'catch_up'"
                    )
                tensor[0, rows_n, :, positions_n] = other[0, rows_n, :, positions_n]

    def move(self, key: Any, rows_b: torch.Tensor, source: int, target: int) -> None:
        """Copy all tokens of some rows from one store of a visit to another."""
        for pair in self._pairs(key):
            for tensor in pair:
                tensor[target, rows_b] = tensor[source, rows_b]

    def clear(self, row: int) -> None:
        """Forget a row: masked positions are not read, but what is not finite there would still spoil a sum."""
        for pair in self._stores.values():
            for tensor in pair:
                tensor[:, row] = 0

    def _pairs(self, key: Any) -> list[list[torch.Tensor]]:
        return [pair for (name, _), pair in self._stores.items() if name == key]

    def _store(self, key: Any, index: int, num_places: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if (key, index) not in self._stores:
            # One position more than the capacity: what is computed for places without a token goes there.
            self._stores[key, index] = [
                new.new_zeros(num_places, self.num_rows, new.shape[1], self.capacity + 1, new.shape[3]) for new in like
            ]
        return self._stores[key, index]


class _View:
    """A cache, as attention sees one, of a single visit."""

    is_compileable = False
    only_writes = False

    class WrittenError(Exception):
        """Ends the run of a layer of which only keys and values were wanted."""

    def __init__(
        self,
        cache: SlotCache,
        key: Any,
        num_places: int,
        places: int | torch.Tensor,
        span: Span,
        length: int,
        writes: bool | torch.Tensor,
        reads: torch.Tensor | None,
    ):
        self._cache, self._key, self._num_places = cache, key, num_places
        self._places, self._span, self._length = places, span, length
        self._writes, self._reads = writes, reads

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions are read; what depends on it is given otherwise."""
        return self._length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[b, K, t, d]` at the positions of the span; returns `[b, K, length, d]`."""
        new = key_states, value_states
        store = self._cache._store(self._key, layer_idx, self._num_places, new)
        span = self._span
        places = self._places
        if isinstance(places, int):
            places = torch.full_like(span.rows_b, places)
        if self._writes is not False:
            valid_bt = span.valid_bt
            if isinstance(self._writes, torch.Tensor):
                valid_bt = valid_bt & self._writes[:, None]
            where = torch.where(valid_bt, span.positions_bt, self._cache.capacity)
            for tensor, part in zip(store, new, strict=True):
                # Indices apart from each other: the axis of heads comes last but one in what is assigned.
                tensor[places[:, None], span.rows_b[:, None], :, where] = part.transpose(1, 2).to(tensor.dtype)
        if self.only_writes:
            raise self.WrittenError
        key, value = (self._read(tensor, places) for tensor in store)
        return key, value

    def _read(self, tensor: torch.Tensor, places_b: torch.Tensor) -> torch.Tensor:
        rows_b, length = self._span.rows_b, self._length
        if self._reads is not None:
            positions = torch.arange(length, device=rows_b.device)
            return tensor[self._reads, rows_b[:, None], :, positions].transpose(1, 2)
        flat = tensor.flatten(0, 1)[:, :, :length]
        return flat.index_select(0, places_b * tensor.shape[1] + rows_b)

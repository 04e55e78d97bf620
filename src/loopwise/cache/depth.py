"""The depth cache: one store of keys and values (or recurrent state) per visit, inside a transformers cache.

A transformers cache holds one entry per *layer*; a plan needs one per *visit*. `DepthCache` rebuilds the entries of a
cache in place, on its first use, and remembers which entry belongs to which slot. Everything transformers does to all
entries (beam reorder, crop, batch operations, reset, deepcopy, offload) then does the right thing without knowing.

Order of the entries: the model's own code outside its layers asks single entries for lengths and mask sizes, by
physical layer number or as the first entry of a kind. So entry i is layer i's first visit wherever layer i is visited;
places of dropped layers are filled from the other visits.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from transformers import DynamicLayer

from loopwise.cache.policy import CachePolicy, Sharing, StoreKey
from loopwise.cache.selected import SelectedLayer, selected_mask
from loopwise.loop.execute import Visit
from loopwise.plan.nodes import Slot


class DepthCache:
    """Bookkeeping of a transformers cache whose entries are stores. Reached as `cache.depth`.

    Attributes:
        slots: store key (under policy own, the slot's key) -> position in `cache.layers`; also reached as
            `cache.slots`.
        index: (store key, cache index of the layer) -> position in `cache.layers`, for layers with several entries.
        complete: the stores that every call so far has visited, or None before the first call.
        module_state: store key -> recurrent state of layers that keep it on themselves instead of in the cache.
        inputs: an entry with the inputs of all tokens, kept for catching up, or None.
    """

    def __init__(self, cache: Any, policy: CachePolicy, indices: Sequence[tuple[int, ...]]):
        self.policy = policy
        self.indices = indices
        size = 1 + max((i for group in indices for i in group), default=0)
        entries = list(cache.layers)
        if cache.layer_class_to_replicate is not None:
            entries += [cache.layer_class_to_replicate() for _ in range(size - len(entries))]
        self.pristine = entries
        self.index: dict[tuple[StoreKey, int], int] = {}
        self.slots: dict[StoreKey, int] = {}
        self.sharing = policy.prefill
        self.complete: frozenset | None = None
        self.module_state: dict[StoreKey, list] = {}
        self.inputs: Any = None
        self._by_layer: list[Any] = []
        self._snapshots: dict[int, dict] = {}
        self._written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._selected: list[SelectedLayer] = []

    def begin(
        self,
        cache: Any,
        slots: Sequence[Slot],
        *,
        decoding: bool,
        routed: Collection[StoreKey] = (),
        num_tokens: int = 0,
    ) -> None:
        """Prepare for a call that visits `slots`.

        Lays the entries out on first use, and switches to the decode half of the policy at the first single token.
        Slots with a key in `routed` are visited by a part of the `num_tokens` tokens: under policy selected their
        entries hold those tokens only.

        Raises:
            ValueError: a slot is visited that earlier tokens in this cache did not visit, under a policy that refuses
                that; or those tokens were computed under another plan.
        """
        self.clear_if_emptied(cache, decoding=decoding)
        if self.complete is None:
            self._lay_out(cache, slots, routed)
        elif decoding and self.sharing != self.policy.decode:
            self._switch(cache, self.policy.decode)
        # Views share this list by layer index, so that a layer which reads another layer's store sees its latest visit.
        self._by_layer, self._snapshots, self._written = list(self.pristine), {}, {}
        visited = frozenset(self.sharing.store(slot) for slot in slots)
        if self.complete is not None and not visited <= self.complete:
            raise ValueError(
                "this call goes deeper than earlier tokens of its cache did: start a new cache, or use "
                "set_cache(model, ..., on_deeper='catch_up'), or a policy with shared stores (last, first)"
            )
        used = ((self.sharing.store(slot), i) for slot in slots for i in self.indices[slot.layer])
        if any(store not in self.index for store in used if store[1] < len(self.pristine)):
            raise ValueError("this cache was filled under another plan: start a new cache")
        self.complete = visited if self.complete is None else self.complete & visited
        stores = [(self.sharing.store(slot), i) for slot in slots for i in self.indices[slot.layer]]
        entries = [cache.layers[self.index[store]] for store in stores if store in self.index]
        self._selected = [entry for entry in entries if isinstance(entry, SelectedLayer)]
        for entry in self._selected:
            entry.begin(num_tokens)

    def goes_deeper(self, slots: Iterable[Slot], *, decoding: bool) -> bool:
        """True when earlier tokens in this cache lack one of these slots."""
        sharing = self.policy.decode if decoding else self.sharing
        if self.complete is None or sharing != self.sharing:
            return False
        return not all(sharing.store(slot) in self.complete for slot in slots)

    def clear(self, cache: Any) -> None:
        """Forget all tokens and the layout; the next call lays the entries out anew."""
        cache.layers[:] = copy.deepcopy(self.pristine)
        self._number([])
        self.module_state.clear()
        self.sharing, self.complete = self.policy.prefill, None

    def clear_if_emptied(self, cache: Any, *, decoding: bool) -> None:
        """Start anew where the caller has reset the cache, or cropped all of it away."""
        if self.complete is not None and not any(_holds_tokens(entry, decoding) for entry in cache.layers):
            self.clear(cache)

    def lets_leave(self, num_tokens: int) -> bool:
        """Whether tokens of a call may leave a loop before its last iteration.

        Where the current token's keys and values are those of its latest iteration, they are there for any that leaves;
        where each iteration has its own, policy selected keeps account of who is missing.

        Returns:
            False for calls that compute several tokens at once into stores in which all must be.

        Raises:
            ValueError: a policy that never lets them.
        """
        decode = self.policy.decode
        if decode.kind in ("own", "stride") or decode.size > 1:
            raise ValueError(
                f"tokens that leave a loop early would be missing in a cache of policy {self.policy}: use "
                "set_cache(model, 'selected'), 'last', 'first' or 'own/last', or on_exit='select'"
            )
        return self.sharing.kind == "selected" or (self.sharing.is_shared and num_tokens == 1)

    def view(self, cache: Any, slot: Slot, rows: torch.Tensor | None = None) -> Any:
        """A shallow copy of the cache in which the layer of `slot` finds the store of `slot` at its own index.

        With `rows`, int64 `[b]`, the layer runs for these rows only; the others keep what they have stored.
        """
        view = object.__new__(type(cache))
        view.__dict__.update(cache.__dict__)
        view.layers = self._by_layer
        view.layer_class_to_replicate = None
        store = self.sharing.store(slot)
        for i in self.indices[slot.layer]:
            place = self.index.get((store, i))
            if place is None:
                continue
            entry = cache.layers[place]
            if self.sharing.is_shared:
                entry = self._shared(place, entry, slot, rows)
            self._by_layer[i] = entry
        return view

    def select(self, cache: Any, visit: Visit, mask: Any, hidden_BTD: torch.Tensor) -> Any:
        """The attention mask of a visit by a part of the tokens, or by all of them to an entry that lacks some.

        Args:
            cache: the transformers cache.
            visit: the visit; its keys and values come next.
            mask: the mask of a whole visit, see `selected_mask`.
            hidden_BTD: the state of the call, of which only shape and device are read.

        Raises:
            ValueError: the visit leaves tokens out and its entry is not one for that, or the mask is of another form.
        """
        store = self.sharing.store(visit.slot)
        entries = [cache.layers[self.index[store, i]] for i in self.indices[visit.slot.layer]]
        if not all(isinstance(entry, SelectedLayer) for entry in entries):
            written = all(self.index[store, i] in self._written for i in self.indices[visit.slot.layer])
            if written and visit.positions is None:
                whole = not isinstance(mask, torch.Tensor) or len(mask) == 1 or visit.rows is None
                return mask if whole else mask[visit.rows]
            if visit.is_partial:
                raise ValueError(
                    "visits on a part of the rows or tokens are not available with a cache: use use_cache=False, or "
                    "cache policy selected for a loop with a router"
                )
            return mask
        narrowed = mask
        for entry in entries:
            where_bS = entry.expect(visit, *hidden_BTD.shape[:2], hidden_BTD.device)
            if not entry.is_whole:
                narrowed = selected_mask(mask, where_bS, visit, entry.past, hidden_BTD.shape[1])
        return narrowed

    def end(self) -> None:
        """Drop what only the running call needs."""
        for entry in self._selected:
            entry.end()
        self._by_layer, self._snapshots, self._written, self._selected = [], {}, {}, []

    def _lay_out(self, cache: Any, slots: Sequence[Slot], routed: Collection[StoreKey] = ()) -> None:
        stores = {
            (self.sharing.store(slot), i): None
            for slot in slots
            for i in self.indices[slot.layer]
            if i < len(self.pristine)
        }
        if self.sharing.is_shared:
            _refuse_unshareable([self.pristine[i] for _, i in stores])
        order = self._order(stores)
        selects = self.sharing.kind == "selected"
        cache.layers[:] = [
            _selected_layer(self.pristine[i]) if selects and store in routed else copy.deepcopy(self.pristine[i])
            for store, i in order
        ]
        cache.layer_class_to_replicate = None
        self._number(order)

    def _number(self, order: Sequence[tuple[StoreKey, int]]) -> None:
        self.index.clear()
        self.slots.clear()
        for place, (store, i) in enumerate(order):
            self.index[store, i] = place
            self.slots.setdefault(store, place)

    def _order(self, stores: Iterable[tuple[StoreKey, int]]) -> list[tuple[StoreKey, int]]:
        """Entry i is layer i's first store; the places of dropped layers are filled from others of the same kind.

        The first of a kind is asked for lengths: first iterations, which no call leaves out, fill the places before
        later ones do.
        """
        places: list[tuple[StoreKey, int] | None] = [None] * len(self.pristine)
        extra = []
        for store in stores:
            if places[store[1]] is None:
                places[store[1]] = store
            else:
                extra.append(store)
        kinds = [type(entry) for entry in self.pristine]
        for hole in range(len(places)):
            if places[hole] is None:
                later = [store for store in places[:hole:-1] if store is not None]
                always = [store for store in extra if not any(store[0][1])]
                donor = next((store for store in always + later + extra if kinds[store[1]] is kinds[hole]), None)
                if donor in extra:
                    extra.remove(donor)
                elif donor is not None:
                    places[places.index(donor)] = None
                places[hole] = donor
        return [store for store in places + extra if store is not None]

    def _switch(self, cache: Any, sharing: Sharing) -> None:
        """Keep of every group of visits that now share a store only the one that the new sharing would have kept."""
        kept: dict[tuple[StoreKey, int], int] = {}
        for ((position, iterations), i), place in sorted(self.index.items()):
            slot = Slot(position=position, iterations=iterations, layer=0)
            if slot.key in (self.complete or ()) and not sharing.reads_only(slot):
                kept[sharing.store(slot), i] = place
        entries = list(cache.layers)
        _refuse_unshareable([entries[place] for place in kept.values()])
        order = self._order(kept)
        cache.layers[:] = [entries[kept[store]] for store in order]
        self._number(order)
        self.sharing, self.complete = sharing, frozenset(store for store, _ in order)

    def _shared(self, place: int, entry: Any, slot: Slot, rows: torch.Tensor | None) -> Any:
        if self.sharing.reads_only(slot):
            return _Reader(entry, self._written[place], rows)
        if rows is not None:
            return _RowsWriter(entry, place, self._written, rows)
        if place in self._snapshots:
            entry.__dict__.update(self._snapshots[place])
        else:
            self._snapshots[place] = dict(entry.__dict__)
        return _Writer(entry, place, self._written)


class _Writer:
    """A store that also remembers what its update returned, for iterations that only read."""

    def __init__(self, entry: Any, place: int, written: dict):
        self._entry, self._place, self._written = entry, place, written

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._entry, name)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Write and return `(keys, values)`, each `[B, K, past + T, d]`."""
        self._written[self._place] = self._entry.update(key_states, value_states, *args, **kwargs)
        return self._written[self._place]


class _RowsWriter(_Writer):
    """A store that an earlier iteration has written for all rows, and that some rows write once more."""

    def __init__(self, entry: Any, place: int, written: dict, rows: torch.Tensor):
        super().__init__(entry, place, written)
        self._rows = rows

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Replace the latest tokens of the rows by `[b, K, T, d]`; returns all tokens of these rows."""
        new = key_states, value_states
        before = self._written[self._place]
        kept = self._entry.keys, self._entry.values
        after = [_with_rows(whole, self._rows, part) for whole, part in zip(before, new, strict=True)]
        if kept[0] is not before[0]:  # a window keeps fewer tokens than it returns
            kept = [_with_rows(whole, self._rows, part) for whole, part in zip(kept, new, strict=True)]
        else:
            kept = after
        self._entry.keys, self._entry.values = kept
        self._written[self._place] = after[0], after[1]
        return after[0][self._rows], after[1][self._rows]


class _Reader:
    """A store seen by an iteration that reads what iteration 0 wrote."""

    def __init__(self, entry: Any, written: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor | None = None):
        self._entry = entry
        self._read = written if rows is None else (written[0][rows], written[1][rows])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._entry, name)

    def update(self, *args: Any, **kwargs: Any):
        """Ignore the new keys and values; return the stored `(keys, values)`."""
        return self._read


def _with_rows(whole_BKSd: torch.Tensor, rows_b: torch.Tensor, part_bKTd: torch.Tensor) -> torch.Tensor:
    """A copy in which the last T tokens of some rows are replaced."""
    changed_BKSd = whole_BKSd.clone()
    changed_BKSd[rows_b, :, -part_bKTd.shape[2] :] = part_bKTd.to(whole_BKSd.dtype)
    return changed_BKSd


def _selected_layer(pristine: Any) -> SelectedLayer:
    if type(pristine) is not DynamicLayer:
        raise ValueError(
            f"cache policy selected needs growing attention caches without a window, this model uses "
            f"{type(pristine).__name__}: use use_cache=False"
        )
    return SelectedLayer()


def _holds_tokens(entry: Any, decoding: bool) -> bool:
    if any(getattr(entry, "has_previous_state", {}).values()):
        return True
    length = entry.get_seq_length() if hasattr(entry, "get_seq_length") else 0
    if decoding and isinstance(length, torch.Tensor):
        return True  # a static cache: reading its length at every token would wait for the device
    return int(length) > 0


def _refuse_unshareable(entries: Iterable[Any]) -> None:
    for entry in entries:
        if hasattr(entry, "recurrent_states") or not hasattr(entry, "keys") or getattr(entry, "is_compileable", False):
            raise ValueError(
                f"cache policies last, first and ring need growing attention caches, this model uses "
                f"{type(entry).__name__}: use policy own"
            )

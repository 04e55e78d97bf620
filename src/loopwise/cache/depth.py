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
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from loopwise.cache.policy import CachePolicy, Sharing, StoreKey
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

    def begin(self, cache: Any, slots: Sequence[Slot], *, decoding: bool) -> None:
        """Prepare for a call that visits `slots`.

        Lays the entries out on first use, and switches to the decode half of the policy at the first single token.

        Raises:
            ValueError: a slot is visited that earlier tokens in this cache did not visit, under a policy that refuses
                that; or those tokens were computed under another plan.
        """
        self.clear_if_emptied(cache, decoding=decoding)
        if self.complete is None:
            self._lay_out(cache, slots)
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

    def view(self, cache: Any, slot: Slot) -> Any:
        """A shallow copy of the cache in which the layer of `slot` finds the store of `slot` at its own index."""
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
            if self.sharing.kind != "own":
                entry = self._shared(place, entry, slot)
            self._by_layer[i] = entry
        return view

    def end(self) -> None:
        """Drop what only the running call needs."""
        self._by_layer, self._snapshots, self._written = [], {}, {}

    def _lay_out(self, cache: Any, slots: Sequence[Slot]) -> None:
        stores = {
            (self.sharing.store(slot), i): None
            for slot in slots
            for i in self.indices[slot.layer]
            if i < len(self.pristine)
        }
        if self.sharing.kind != "own":
            _refuse_unshareable([self.pristine[i] for _, i in stores])
        order = self._order(stores)
        cache.layers[:] = [copy.deepcopy(self.pristine[i]) for _, i in order]
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

    def _shared(self, place: int, entry: Any, slot: Slot) -> Any:
        if self.sharing.reads_only(slot):
            return _Reader(entry, self._written[place])
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


class _Reader:
    """A store seen by an iteration that reads what iteration 0 wrote."""

    def __init__(self, entry: Any, written: tuple[torch.Tensor, torch.Tensor]):
        self._entry, self._read = entry, written

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._entry, name)

    def update(self, *args: Any, **kwargs: Any):
        """Ignore the new keys and values; return the stored `(keys, values)`."""
        return self._read


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

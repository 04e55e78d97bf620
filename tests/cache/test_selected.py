"""A cache entry that holds a part of the tokens, against lists.

Shapes: B rows, K kv heads, T tokens of a call, d head size.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, StaticLayer

from loopwise.cache.depth import DepthCache
from loopwise.cache.policy import CachePolicy
from loopwise.cache.selected import SelectedLayer, selected_mask
from loopwise.loop.execute import Visit
from loopwise.plan import Plan, Slot

SLOT = Slot(position=(0,), iterations=(), layer=0)
HEADS, SIZE = 2, 3


class Lists:
    """What an entry should hold: per row, (index in the sequence, number of the token) of each token."""

    def __init__(self, num_rows):
        self.rows = [[] for _ in range(num_rows)]
        self.seen = 0


def parts_of(active_BT):
    """Visits by rows with equally many active tokens."""
    counts = active_BT.sum(1)
    for count in counts.unique().tolist():
        if count:
            rows = (counts == count).nonzero()[:, 0]
            yield Visit(slot=SLOT, rows=rows, positions=active_BT[rows].nonzero()[:, 1].view(-1, count))


def key_of(number):
    """A key or value that tells which token it is of."""
    return torch.full((HEADS, SIZE), float(number))


def call(entry, lists, active_BT, start):
    """One call with a token numbered `start + T b + t` at row b and place t."""
    num_rows, num_tokens = active_BT.shape
    entry.begin(num_tokens)
    for visit in parts_of(active_BT):
        where = entry.expect(visit, num_rows, num_tokens, active_BT.device)
        numbers = [
            [start + num_tokens * b + t for t in p]
            for b, p in zip(visit.rows.tolist(), visit.positions.tolist(), strict=True)
        ]
        new = torch.stack([torch.stack([key_of(n) for n in row], dim=1) for row in numbers])
        keys, values = entry.update(new, -new)
        assert torch.equal(values, -keys) and keys.shape[2] == where.shape[1]
        for i, b in enumerate(visit.rows.tolist()):
            added = [(lists.seen + t, n) for t, n in zip(visit.positions[i].tolist(), numbers[i], strict=True)]
            lists.rows[b] += added
            held = [(int(w), int(keys[i, 0, s, 0])) for s, w in enumerate(where[i]) if w >= 0]
            assert held == lists.rows[b]
    lists.seen += num_tokens
    entry.end()
    check(entry, lists)


def check(entry, lists):
    assert entry.get_seq_length() == lists.seen
    for b, row in enumerate(lists.rows):
        held = [] if entry.where_BS is None else [int(w) for w in entry.where_BS[b] if w >= 0]
        assert held == [index for index, _ in row]
        if entry.keys is not None:
            assert entry.keys[b, 1, : len(row), 2].tolist() == [number for _, number in row]
            assert entry.keys.shape[2] >= max(map(len, lists.rows))


STEPS = st.one_of(
    st.tuples(st.just("call"), st.integers(1, 4), st.integers(0, 2**16)),
    st.tuples(st.just("crop"), st.integers(0, 5)),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
)


@given(st.lists(STEPS, max_size=8))
@settings(max_examples=80, deadline=None)
def test_calls_crops_and_row_operations(steps):
    entry, lists, start = SelectedLayer(), Lists(2), 0
    for what, *arguments in steps:
        if what == "call":
            num_tokens, bits = arguments
            num_rows = len(lists.rows)
            flags = [bool(bits >> i & 1) for i in range(num_rows * num_tokens)]
            call(entry, lists, torch.tensor(flags).view(num_rows, num_tokens), start)
            start += num_rows * num_tokens
        elif what == "crop":
            removed = min(arguments[0], lists.seen)
            entry.crop(-removed)
            lists.seen -= removed
            lists.rows = [[item for item in row if item[0] < lists.seen] for row in lists.rows]
        elif what == "rows":
            chosen = [i % len(lists.rows) for i in arguments[0]]
            entry.reorder_cache(torch.tensor(chosen))
            lists.rows = [list(lists.rows[i]) for i in chosen]
        else:
            entry.batch_repeat_interleave(arguments[0])
            lists.rows = [list(row) for row in lists.rows for _ in range(arguments[0])]
        if entry.where_BS is not None:
            check(entry, lists)


def test_a_reset_entry_is_new():
    entry = SelectedLayer()
    call(entry, Lists(1), torch.tensor([[True, False]]), 0)
    entry.reset()
    assert entry.get_seq_length() == 0 and entry.keys is None
    call(entry, Lists(3), torch.tensor([[True, False]] * 3), 0)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_masks_are_the_whole_mask_at_the_places_held(kind):
    generator = torch.Generator().manual_seed(0)
    past, num_tokens = 3, 4
    causal = torch.arange(past + num_tokens) <= torch.arange(num_tokens)[:, None] + past
    seen = causal & (torch.rand(2, 1, num_tokens, past + num_tokens, generator=generator) > 0.3)
    whole = {"none": None, "bool": seen, "additive": torch.where(seen, 0.0, torch.finfo(torch.float32).min)}[kind]
    visit = Visit(slot=SLOT, rows=torch.tensor([1]), positions=torch.tensor([[0, 2, 3]]))
    where = torch.tensor([[0, 2, 3, 5, 6, -1]])
    got = selected_mask(whole, where, visit, past, num_tokens)
    assert got.shape == (1, 1, 3, 6) and (got.dtype == torch.bool) == (kind != "additive")
    for i, t in enumerate((0, 2, 3)):
        for s, w in enumerate(where[0].tolist()):
            want = w >= 0 and (bool(causal[t, w]) if kind == "none" else bool(seen[1, 0, t, w]))
            assert (bool(got[0, 0, i, s]) if kind != "additive" else got[0, 0, i, s] == 0) == want


def test_masks_of_another_form_are_refused():
    visit = Visit(slot=SLOT, positions=torch.tensor([0]))
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        selected_mask(torch.ones(1, 4), torch.tensor([[0]]), visit, 0, 4)


def test_only_growing_caches_without_a_window_can_be_selected():
    plan = Plan.parse("core:0x2")
    keys = {slot.key for slot in plan.slots}
    for layer in (StaticLayer(max_cache_len=8), DynamicSlidingWindowLayer(sliding_window=4)):
        cache = DynamicCache()
        cache.layers = [layer]
        depth = DepthCache(cache, CachePolicy.parse("selected"), ((0,),))
        with pytest.raises(ValueError, match=f"growing attention caches without a window.*{type(layer).__name__}"):
            depth.begin(cache, plan.slots, decoding=False, routed=keys, num_tokens=2)

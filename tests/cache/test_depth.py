"""The depth cache under policy own: one store per visit, exact for every plan and for changing depth.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from laws import TOLERANCE, assert_close, difference, looping_plan, odd_plan
from tiny import tiny_inputs, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import loopwise
from loopwise.models.attach import set_hooks
from loopwise.models.hub import text_config

LOOPED = looping_plan(6)
PLANS = [LOOPED, odd_plan(6), "0-4 1-5", "5-5 0-2", "2-4", "1 (3-4)x2", "3 3 3", "a:(0 b:(1-2)x2 3)x2 c:(4)x3 5"]
STATE = ["mamba2", "falcon_h1", "qwen3_next", "lfm2"]
CACHE_NAMES = {"mamba": "cache_params", "mamba2": "cache_params"}


def looped(model_type="llama", plan=LOOPED, **options):
    model = tiny_model(model_type)
    return loopwise.attach(model, plan, **options), tiny_inputs(model, length=12)


def new_cache(model):
    return DynamicCache(config=text_config(model))


@torch.no_grad()
def logits(model, ids_BT, cache=None, **options):
    if cache is None:
        return model(ids_BT, use_cache=False, **options).logits
    name = CACHE_NAMES.get(model.config.model_type, "past_key_values")
    return model(ids_BT, use_cache=True, **{name: cache}, **options).logits


def in_pieces(model, ids_BT, sizes, cache, counts=None):
    """Logits `[B, T, V]` of a sequence given in pieces, each with its own iteration count."""
    parts, start = [], 0
    for i, size in enumerate(sizes):
        loops = {} if counts is None else {"loops": counts[i]}
        parts.append(logits(model, ids_BT[:, start : start + size], cache, **loops))
        start += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "bloom", "gpt2", "opt"])
def test_cached_equals_recomputed_for_every_plan(model_type, plan):
    model, ids_BT = looped(model_type, plan)
    want = logits(model, ids_BT)
    assert_close(in_pieces(model, ids_BT, [1] * 12, new_cache(model)), want, "one by one")
    assert_close(in_pieces(model, ids_BT, [5, 4, 1, 1, 1], new_cache(model)), want, "in pieces")


@pytest.mark.parametrize("plan", [LOOPED, odd_plan(6), "5 0-2", "2-4 1-5"])
@pytest.mark.parametrize("model_type", [*STATE, "zamba", "mamba"])
def test_cached_state_equals_recomputed_for_every_plan(model_type, plan):
    model, ids_BT = looped(model_type, plan)

    def error(each):
        return difference(in_pieces(each, ids_BT, [6, *[1] * 6], new_cache(each)), logits(each, ids_BT), "cached")

    got = error(model)  # depth amplifies the rounding by which plain transformers differs from recomputation itself
    assert got <= TOLERANCE or got <= 2 * error(loopwise.materialize(model))


@pytest.mark.parametrize("plan", [LOOPED, odd_plan(6), "2-4", "0-4 1-5"])
def test_slots_names_one_entry_per_slot(plan):
    model, ids_BT = looped(plan=plan)
    cache = new_cache(model)
    logits(model, ids_BT, cache)
    slots = loopwise.plan_of(model).slots
    assert set(cache.slots) == {slot.key for slot in slots}
    assert sorted(cache.slots.values()) == list(range(len(slots))) and len(cache.layers) == len(slots)
    assert all(entry.keys.shape[2] == 12 for entry in cache.layers)
    keys = {entry.keys.data_ptr() for entry in cache.layers}
    assert len(keys) == len(slots), "two slots share a store"


def test_slots_hold_what_the_unrolled_model_holds():
    model, ids_BT = looped(plan=odd_plan(6))
    plain = loopwise.materialize(model)
    cache, flat = new_cache(model), new_cache(plain)
    logits(model, ids_BT, cache), logits(plain, ids_BT, flat)
    for i, slot in enumerate(loopwise.plan_of(model).slots):
        assert_close(cache.layers[cache.slots[slot.key]].keys, flat.layers[i].keys, f"keys of {slot}")


class Depths:
    """The reference: no cache, every token has its own depth, and deeper visits see only deeper tokens."""

    def __init__(self, depths_T):
        self.depths_T = torch.tensor(depths_T)

    def before(self, visit, state_BTD):
        iteration = max(visit.slot.iterations, default=0)
        positions = (self.depths_T > iteration).nonzero()[:, 0]
        if not len(positions):
            return None
        return visit if len(positions) == len(self.depths_T) else replace(visit, positions=positions)

    def after(self, visit, before_BTD, state_BTD):
        return state_BTD


DEPTHS = [
    [2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1],
    [3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1],
    [4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 1],
]


@pytest.mark.parametrize("depths", DEPTHS)
@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "bloom", "gemma3_text", "mixtral", "deepseek_v3", "opt", *STATE]
)
def test_fewer_loops_is_exact_where_every_token_has_its_own_depth(model_type, depths):
    model, ids_BT = looped(model_type)
    set_hooks(model, [Depths(depths)])
    want = logits(model, ids_BT, loops=depths[0])
    set_hooks(model, [])
    whole = logits(model, ids_BT, loops=depths[0])
    assert not torch.allclose(whole[:, -1], want[:, -1], atol=1e-3), "the depth has no effect"
    cache = new_cache(model)
    parts = [depths.count(count) for count in sorted(set(depths), reverse=True)]
    assert_close(in_pieces(model, ids_BT, parts, cache, sorted(set(depths), reverse=True)), want, "in pieces")
    one_by_one = in_pieces(model, ids_BT, [1] * 12, new_cache(model), depths)
    assert_close(one_by_one, want, "one by one")


@pytest.mark.parametrize("plan", ["2 core:(4-5)x2", "core:(1 4)x2 5", "3 core:(2)x2", "core:(5)x2"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "falcon_h1"])
def test_fewer_loops_where_the_plan_drops_early_layers(model_type, plan):
    """The model asks the first entries for lengths: they must be of visits that every token makes."""
    depths = DEPTHS[0]
    model, ids_BT = looped(model_type, plan)
    set_hooks(model, [Depths(depths)])
    want = logits(model, ids_BT)
    set_hooks(model, [])
    assert_close(in_pieces(model, ids_BT, [7, 2, 1, 1, 1], new_cache(model), [2, 1, 1, 1, 1]), want, "fewer loops")


def test_fewer_loops_with_a_static_cache():
    model, ids_BT = looped()
    cache = StaticCache(config=model.config, max_cache_len=16)
    want = in_pieces(model, ids_BT, [7, 1, 1, 3], new_cache(model), [3, 2, 2, 1])
    assert_close(in_pieces(model, ids_BT, [7, 1, 1, 3], cache, [3, 2, 2, 1]), want, "static")


def test_fewer_loops_with_left_padding():
    model, ids_BT = looped()
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache, alone = new_cache(model), new_cache(model)
    options = {"attention_mask": mask_BT[:, :7], "position_ids": positions_BT[:, :7]}
    logits(model, ids_BT[:, :7], cache, loops=3, **options)
    logits(model, ids_BT[:1, 3:7], alone, loops=3)
    for t in range(7, 12):
        options = {"attention_mask": mask_BT[:, : t + 1], "position_ids": positions_BT[:, t : t + 1]}
        got = logits(model, ids_BT[:, t : t + 1], cache, loops=2, **options)
        assert_close(got[:1], logits(model, ids_BT[:1, t : t + 1], alone, loops=2), f"token {t}")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", *STATE])
def test_more_loops_are_refused_and_the_cache_stays_usable(model_type):
    model, ids_BT = looped(model_type)
    cache, untouched = new_cache(model), new_cache(model)
    for each in (cache, untouched):
        logits(model, ids_BT[:, :8], each, loops=1)
    for size in (1, 3):
        with pytest.raises(ValueError, match="deeper than earlier tokens.*catch_up") as caught:
            logits(model, ids_BT[:, 8 : 8 + size], cache, loops=2)
        assert len(str(caught.value).splitlines()) == 1
    got = logits(model, ids_BT[:, 8:9], cache, loops=1)
    assert torch.equal(got, logits(model, ids_BT[:, 8:9], untouched, loops=1))


def test_more_loops_after_fewer_are_refused_too():
    model, ids_BT = looped()
    cache = new_cache(model)
    logits(model, ids_BT[:, :6], cache, loops=3)
    logits(model, ids_BT[:, 6:7], cache, loops=1)
    with pytest.raises(ValueError, match="deeper"):
        logits(model, ids_BT[:, 7:8], cache, loops=3)


def test_loops_of_their_own_name_are_told_apart():
    plan = "a:(0-1)x2 2 b:(3-4)x2 5"
    model, ids_BT = looped(plan=plan)
    cache = new_cache(model)
    logits(model, ids_BT[:, :6], cache, loops={"a": 3, "b": 1})
    with pytest.raises(ValueError, match="deeper"):
        logits(model, ids_BT[:, 6:7], cache, loops={"a": 1, "b": 2})
    logits(model, ids_BT[:, 6:7], cache, loops={"a": 3, "b": 1})
    assert loopwise.plan_of(model).counts == {"a": 2, "b": 2}


def test_keys_of_one_loop_do_not_move_when_another_loop_changes():
    model, ids_BT = looped(plan="a:(0-1)x2 2 b:(3-4)x2 5")
    cache = new_cache(model)
    logits(model, ids_BT[:, :6], cache)
    places = dict(cache.slots)
    logits(model, ids_BT[:, 6:7], cache, loops={"a": 1})
    assert cache.slots == places


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gemma3_text", "mixtral", "opt"])
def test_catching_up_is_exact(model_type):
    """Each call deeper than the cache recomputes all earlier tokens at the new depth."""
    model, ids_BT = looped(model_type, on_deeper="catch_up")
    cache = new_cache(model)
    logits(model, ids_BT[:, :5], cache, loops=1)
    for t, count in zip(range(5, 10), (2, 2, 3, 3, 5), strict=True):
        got = logits(model, ids_BT[:, t : t + 1], cache, loops=count)
        assert_close(got, logits(model, ids_BT[:, : t + 1], loops=count)[:, -1:], f"token {t}, {count} iterations")
    got = logits(model, ids_BT[:, 10:12], cache, loops=6)
    assert_close(got, logits(model, ids_BT, loops=6)[:, -2:], "two tokens at once")


@pytest.mark.parametrize("model_type", STATE)
def test_catching_up_recurrent_state_is_exact_or_refused_by_name(model_type):
    model, ids_BT = looped(model_type, on_deeper="catch_up")
    cache = new_cache(model)
    try:
        logits(model, ids_BT[:, :5], cache, loops=1)
        got = logits(model, ids_BT[:, 5:6], cache, loops=3)
    except ValueError as error:
        assert "catch" in str(error) and "not available" in str(error)
        return
    assert_close(got, logits(model, ids_BT[:, :6], loops=3)[:, -1:], "caught up")


def test_catching_up_with_left_padding():
    model, ids_BT = looped(on_deeper="catch_up")
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache = new_cache(model)
    options = {"attention_mask": mask_BT[:, :8], "position_ids": positions_BT[:, :8]}
    logits(model, ids_BT[:, :8], cache, loops=1, **options)
    options = {"attention_mask": mask_BT[:, :9], "position_ids": positions_BT[:, 8:9]}
    got = logits(model, ids_BT[:, 8:9], cache, loops=3, **options)
    assert_close(got[:1], logits(model, ids_BT[:1, 3:9], loops=3)[:, -1:], "the padded row")
    assert_close(got[1:], logits(model, ids_BT[1:, :9], loops=3)[:, -1:], "the other row")


def test_catching_up_after_beam_reorder_and_crop():
    model, ids_BT = looped(on_deeper="catch_up")
    cache = new_cache(model)
    logits(model, ids_BT[:, :7], cache, loops=1)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-2)
    got = logits(model, ids_BT.flip(0)[:, 5:6], cache, loops=2)
    assert_close(got, logits(model, ids_BT.flip(0)[:, :6], loops=2)[:, -1:], "reordered and cropped")
    cache.batch_repeat_interleave(2)
    twice_BT = ids_BT.flip(0).repeat_interleave(2, dim=0)
    got = logits(model, twice_BT[:, 6:7], cache, loops=4)
    assert_close(got, logits(model, twice_BT[:, :7], loops=4)[:, -1:], "repeated")


def test_a_cache_in_use_keeps_what_it_does_when_deeper():
    """A cache that did not remember its first tokens cannot catch up; one that did can, whatever the model does now."""
    model, ids_BT = looped()
    cache = new_cache(model)
    logits(model, ids_BT[:, :5], cache, loops=1)
    loopwise.set_cache(model, "own", on_deeper="catch_up")
    logits(model, ids_BT[:, 5:6], cache, loops=1)
    with pytest.raises(ValueError, match="deeper"):
        logits(model, ids_BT[:, 6:7], cache, loops=2)
    remembering = new_cache(model)
    logits(model, ids_BT[:, :5], remembering, loops=1)
    loopwise.set_cache(model, "own")
    logits(model, ids_BT[:, 5:6], remembering, loops=1)
    got = logits(model, ids_BT[:, 6:7], remembering, loops=2)
    assert_close(got, logits(model, ids_BT[:, :7], loops=2)[:, -1:], "caught up")


def test_catching_up_in_generation():
    model, ids_BT = looped(on_deeper="catch_up")
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids_BT)}
    first = model.generate(ids_BT, loops=1, max_new_tokens=3, return_dict_in_generate=True, **options)
    tokens = first.sequences
    options["attention_mask"] = torch.ones_like(tokens)
    got = model.generate(tokens, loops=3, max_new_tokens=4, past_key_values=first.past_key_values, **options)
    assert torch.equal(got, model.generate(tokens, loops=3, max_new_tokens=4, **options))


def test_the_output_of_a_prompt_does_not_change_by_being_remembered():
    model, ids_BT = looped()
    want = in_pieces(model, ids_BT, [9, 1, 1, 1], new_cache(model))
    loopwise.set_cache(model, "own", on_deeper="catch_up")
    assert torch.equal(in_pieces(model, ids_BT, [9, 1, 1, 1], new_cache(model)), want)


@pytest.mark.parametrize("on_deeper", ["refuse", "catch_up"])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("emptied_by", ["reset", "crop"])
def test_an_emptied_cache_may_be_used_deeper(emptied_by, size, on_deeper):
    model, ids_BT = looped(on_deeper=on_deeper)
    cache = new_cache(model)
    logits(model, ids_BT, cache, loops=1)
    if emptied_by == "reset":
        cache.reset()
    else:
        cache.crop(-12)
    got = in_pieces(model, ids_BT, [size, 12 - size], cache, [3, 3])
    assert_close(got, logits(model, ids_BT, loops=3), "after reset")


@pytest.mark.parametrize("model_type", ["mamba2", "qwen3_next", "falcon_h1"])
def test_an_emptied_state_cache_may_be_used_deeper(model_type):
    model, ids_BT = looped(model_type)
    cache = new_cache(model)
    logits(model, ids_BT, cache, loops=1)
    cache.reset()
    assert_close(logits(model, ids_BT, cache, loops=3), logits(model, ids_BT, loops=3), "after reset")


def test_an_emptied_static_cache_may_be_used_deeper():
    model, ids_BT = looped()
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits(model, ids_BT, cache, loops=1)
    cache.reset()
    assert_close(in_pieces(model, ids_BT, [5, 7], cache, [3, 3]), logits(model, ids_BT, loops=3), "after reset")


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_crop_takes_tokens_from_every_slot(model_type):
    model, ids_BT = looped(model_type)
    cache = new_cache(model)
    cache.activate_past_recording()
    logits(model, ids_BT[:, :3], cache)
    logits(model, ids_BT[:, 5:9], cache)
    cache.crop(-4)
    got = logits(model, ids_BT[:, 3:6], cache)
    assert_close(got, logits(model, ids_BT[:, :6])[:, 3:], "after crop")


def test_reorder_moves_rows_in_every_slot():
    model, ids_BT = looped(plan=odd_plan(6))
    cache = new_cache(model)
    logits(model, ids_BT[:, :8], cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    rows_BT = ids_BT[[1, 1]]
    assert_close(logits(model, rows_BT[:, 8:9], cache), logits(model, rows_BT[:, :9])[:, -1:], "reordered")


@pytest.mark.parametrize("on_deeper", ["refuse", "catch_up"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "recurrent_gemma"])
def test_a_cache_in_use_may_be_copied(model_type, on_deeper):
    model, ids_BT = looped(model_type, on_deeper=on_deeper)
    cache = new_cache(model)
    logits(model, ids_BT[:, :8], cache)
    twin = copy.deepcopy(cache)
    assert twin.slots is twin.depth.slots and twin.slots == cache.slots and twin.slots is not cache.slots
    position = {"position_ids": torch.tensor([[8]])}
    want = logits(model, ids_BT[:, 8:9], cache, **position)
    logits(model, ids_BT[:, 9:10], cache, position_ids=torch.tensor([[9]]))
    assert torch.equal(logits(model, ids_BT[:, 8:9], twin, **position), want)


def test_a_cache_filled_without_a_plan_is_refused():
    plain = tiny_model("llama")
    ids_BT = tiny_inputs(plain, length=12)
    cache = new_cache(plain)
    logits(plain, ids_BT[:, :4], cache)
    loopwise.attach(plain, LOOPED)
    with pytest.raises(ValueError, match="filled by a model without a plan"):
        logits(plain, ids_BT[:, 4:5], cache)
    cache.reset()
    assert_close(logits(plain, ids_BT, cache), logits(plain, ids_BT), "emptied")


@pytest.mark.parametrize(("first", "second"), [("0-5", "2-5"), ("0 (1-2)x2 3", "0 (3-4)x2 5"), ("0-5", "5 0-4")])
def test_a_cache_filled_under_another_plan_is_refused(first, second):
    """The keys of both plans agree; the layers do not."""
    model, ids_BT = looped(plan=first)
    cache = new_cache(model)
    logits(model, ids_BT[:, :6], cache)
    loopwise.attach(loopwise.detach(model), second)
    with pytest.raises(ValueError, match="start a new cache"):
        logits(model, ids_BT[:, 6:7], cache)
    assert_close(logits(model, ids_BT, new_cache(model)), logits(model, ids_BT), "a new cache")


def test_the_own_cache_class_of_a_model_is_refused_by_name():
    class Odd(DynamicCache):
        def update(self, *args, **kwargs):
            return super().update(*args, **kwargs)

    model, ids_BT = looped()
    with pytest.raises(ValueError, match="Odd"):
        logits(model, ids_BT, Odd(config=model.config))


def test_an_encoder_decoder_cache_works_by_its_self_attention():
    """BERT as a decoder makes one; the cache of its own tokens is laid out, the other one stays."""
    model, ids_BT = looped("bert")
    cache = EncoderDecoderCache(new_cache(model), DynamicCache())
    want = logits(model, ids_BT)
    got = in_pieces(model, ids_BT, [9, 1, 1, 1], cache)
    assert_close(got, want, "cached")
    assert len(cache.self_attention_cache.slots) == 10


def test_a_growing_cache_without_a_configuration():
    model, ids_BT = looped()
    assert_close(in_pieces(model, ids_BT, [9, 1, 1, 1], DynamicCache()), logits(model, ids_BT), "bare DynamicCache")


def test_nothing_of_a_finished_call_keeps_keys_alive():
    model, ids_BT = looped()
    cache = new_cache(model)
    logits(model, ids_BT, cache)
    depth = cache.depth
    assert not depth._by_layer and not depth._snapshots and not depth._written
    assert all(not getattr(entry, "is_initialized", False) for entry in depth.pristine)


def test_difference_of_depth_is_seen_by_the_reference():
    """The reference itself: at full depth it changes nothing, and skipping all iterations but one equals one loop."""
    model, ids_BT = looped()
    set_hooks(model, [Depths([2] * 12)])
    got = logits(model, ids_BT)
    set_hooks(model, [Depths([1] * 12)])
    one = logits(model, ids_BT)
    set_hooks(model, [])
    assert difference(got, logits(model, ids_BT), "full depth") == 0.0
    assert_close(one, logits(model, ids_BT, loops=1), "one iteration")

"""Cache policies against a slow oracle: a Llama written out token by token, with explicit lists of keys and values.

Shapes: B rows, T tokens, D width, H heads, K kv heads, d head width.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from laws import assert_close, difference, looping_plan
from tiny import tiny_inputs, tiny_model
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

import loopwise
from loopwise.cache.policy import CachePolicy, Sharing
from loopwise.models.hub import text_config
from loopwise.plan import Slot

LOOPED = looping_plan(6)
ORACLE = 5e-5  # the oracle sums in another order, over up to twenty visits
NESTED = "0 a:(1 b:(2-3)x2)x3 4-5"


def looped(model_type="llama", plan=LOOPED, length=10, **options):
    model = tiny_model(model_type)
    return loopwise.attach(model, plan, **options), tiny_inputs(model, length=length)


def new_cache(model):
    return DynamicCache(config=text_config(model))


@torch.no_grad()
def logits(model, ids_BT, cache=None, **options):
    return model(ids_BT, use_cache=cache is not None, past_key_values=cache, **options).logits


def in_pieces(model, ids_BT, sizes, cache, **options):
    parts = [logits(model, piece, cache, **options) for piece in ids_BT.split(sizes, dim=1)]
    return torch.cat(parts, dim=1)


class SlowLlama:
    """Llama, one token and one visit at a time. `stores[key]` is a list of (key, value) pairs, one pair a token."""

    def __init__(self, model, plan, policy):
        self.model, self.slots = model, loopwise.Plan.parse(plan).slots
        self.policy, self.stores, self.num_tokens = policy, {}, 0

    def run(self, ids_BT):
        """Logits `[B, T, V]` of further tokens."""
        return torch.stack([self.token(ids_B) for ids_B in ids_BT.T], dim=1)

    def token(self, ids_B):
        decoder = self.model.model
        state_BD = decoder.embed_tokens(ids_B)
        for slot in self.slots:
            state_BD = self.visit(slot, state_BD)
        self.num_tokens += 1
        return self.model.lm_head(decoder.norm(state_BD))

    def visit(self, slot, state_BD):
        layer, config = self.model.model.layers[slot.layer], self.model.config
        attention, width = layer.self_attn, config.head_dim
        normed_BD = layer.input_layernorm(state_BD)
        query_BHd = self.rotate(attention.q_proj(normed_BD).unflatten(-1, (-1, width)))
        key_BKd = self.rotate(attention.k_proj(normed_BD).unflatten(-1, (-1, width)))
        value_BKd = attention.v_proj(normed_BD).unflatten(-1, (-1, width))
        pairs = self.remember(slot, key_BKd, value_BKd)
        assert len(pairs) == self.num_tokens + 1
        keys, values = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))
        mixed_BHd = []
        for h in range(config.num_attention_heads):
            k = h * config.num_key_value_heads // config.num_attention_heads
            scores_BT = (query_BHd[:, None, h] * keys[:, :, k]).sum(-1) / math.sqrt(width)
            mixed_BHd.append((scores_BT.softmax(-1)[..., None] * values[:, :, k]).sum(1))
        state_BD = state_BD + attention.o_proj(torch.cat(mixed_BHd, dim=-1))
        normed_BD, mlp = layer.post_attention_layernorm(state_BD), layer.mlp
        return state_BD + mlp.down_proj(F.silu(mlp.gate_proj(normed_BD)) * mlp.up_proj(normed_BD))

    def rotate(self, heads_BHd):
        """Rotary embedding at position `num_tokens`, halves paired."""
        half = heads_BHd.shape[-1] // 2
        theta = self.model.config.rope_parameters["rope_theta"]
        angles_d = self.num_tokens * theta ** (-torch.arange(half).float() / half)
        a, b = heads_BHd[..., :half], heads_BHd[..., half:]
        return torch.cat([a * angles_d.cos() - b * angles_d.sin(), b * angles_d.cos() + a * angles_d.sin()], dim=-1)

    def remember(self, slot, key, value):
        """Write the pair of this token where the policy says; return what the visit attends to."""
        position, iterations = slot.key
        kind, size = self.policy
        if kind == "first" and any(iterations):
            return self.stores[position, tuple(0 for _ in iterations)]
        if kind == "ring":
            iterations = tuple(i % size for i in iterations)
        pairs = self.stores.setdefault((position, iterations), [])
        pairs[self.num_tokens :] = [(key, value)]
        return pairs

    def keep_last(self):
        """The change from own to last: of every group of visits only the deepest store stays."""
        kept = {}
        for position, iterations in sorted(self.stores):
            kept[position, tuple(0 for _ in iterations)] = self.stores[position, iterations]
        self.stores, self.policy = kept, ("ring", 1)

    @property
    def num_stores(self):
        return len(self.stores)


POLICIES = {
    "own": ("own", 0),
    "last": ("ring", 1),
    "first": ("first", 0),
    "ring(2)": ("ring", 2),
    "ring(3)": ("ring", 3),
}
PLANS = [LOOPED, "0 core:(1-3)x4 4-5", NESTED, "0-4 1-5", "2 core:(4-5)x3"]


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_what_its_oracle_says(policy, plan):
    model, ids_BT = looped(plan=plan, cache=policy)
    oracle = SlowLlama(tiny_model("llama"), plan, POLICIES[policy])
    want = oracle.run(ids_BT)
    assert_close(logits(model, ids_BT), want, "in one call, without a cache", ORACLE)
    for sizes in ([10], [1] * 10, [6, 1, 1, 1, 1], [3, 4, 1, 2]):
        cache = new_cache(model)
        assert_close(in_pieces(model, ids_BT, sizes, cache), want, f"in pieces {sizes}", ORACLE)
        assert len(cache.layers) == len(cache.slots) == oracle.num_stores


@torch.no_grad()
@pytest.mark.parametrize("plan", [LOOPED, "0 core:(1-3)x4 4-5", NESTED])
def test_own_then_last_is_what_its_oracle_says(plan):
    model, ids_BT = looped(plan=plan, cache="own/last")
    oracle = SlowLlama(tiny_model("llama"), plan, POLICIES["own"])
    prompt = oracle.run(ids_BT[:, :6])
    oracle.keep_last()
    want = torch.cat([prompt, oracle.run(ids_BT[:, 6:])], dim=1)
    cache = new_cache(model)
    assert_close(in_pieces(model, ids_BT, [6, 1, 1, 1, 1], cache), want, "own/last", ORACLE)
    cache = new_cache(model)
    assert_close(
        in_pieces(model, ids_BT, [3, 3, 1, 1, 2], cache), want, "a prompt in pieces, then a further question", ORACLE
    )


@torch.no_grad()
def test_own_then_last_from_the_first_token():
    model, ids_BT = looped(cache="own/last")
    oracle = SlowLlama(tiny_model("llama"), LOOPED, POLICIES["own"])
    first = oracle.run(ids_BT[:, :1])
    oracle.keep_last()
    want = torch.cat([first, oracle.run(ids_BT[:, 1:])], dim=1)
    assert_close(in_pieces(model, ids_BT, [1] * 10, new_cache(model)), want, "one by one", ORACLE)


def test_own_then_last_prefills_exactly_and_drops_stores_when_decoding():
    model, ids_BT = looped(cache="own/last")
    own, _ = looped()
    cache, exact = new_cache(model), new_cache(own)
    num_slots, num_shared = 10, 6
    assert torch.equal(logits(model, ids_BT[:, :8], cache), logits(own, ids_BT[:, :8], exact))
    assert len(cache.layers) == len(exact.layers) == num_slots
    deepest = {slot.position: exact.layers[exact.slots[slot.key]] for slot in loopwise.plan_of(own).slots}
    logits(model, ids_BT[:, 8:9], cache)
    assert len(cache.layers) == num_shared
    for (position, _), place in cache.slots.items():
        assert torch.equal(cache.layers[place].keys[:, :, :8], deepest[position].keys), "not the last iteration's"


def test_own_then_last_after_a_piece_of_fewer_loops_keeps_what_every_token_has():
    """The deepest store misses the tokens of the shallow piece: the deepest complete one takes its place."""
    model, ids_BT = looped(cache="own/last")
    cache = new_cache(model)
    logits(model, ids_BT[:, :4], cache, loops=3)
    logits(model, ids_BT[:, 4:8], cache, loops=1)
    got = logits(model, ids_BT[:, 8:9], cache, loops=2)
    assert torch.isfinite(got).all() and {entry.get_seq_length() for entry in cache.layers} == {9}


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gemma3_text", "mixtral", "opt", "deepseek_v3"])
def test_cached_equals_recomputed_under_the_same_policy(model_type, policy):
    plan = "0 core:(1-4)x3 5"
    model, ids_BT = looped(model_type, plan, cache=policy)
    want = logits(model, ids_BT)
    assert_close(in_pieces(model, ids_BT, [5, 3, 1, 1], new_cache(model)), want, "in pieces")
    exact, _ = looped(model_type, plan)
    assert difference(want, logits(exact, ids_BT), policy) > 1e-3, "the policy has no effect"
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids_BT)}
    assert torch.equal(model.generate(ids_BT, **options), model.generate(ids_BT, use_cache=False, **options))


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)", "own/last"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_a_plan_without_loops_is_the_same_under_every_policy(model_type, policy):
    model, ids_BT = looped(model_type, "0-4 1-5", cache=policy)
    own, _ = looped(model_type, "0-4 1-5")
    got, want = (in_pieces(each, ids_BT, [6, 1, 1, 1, 1], new_cache(each)) for each in (model, own))
    assert_close(got, want, policy)


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)", "own/last"])
def test_left_padding_and_batch_mates_do_not_matter(policy):
    model, ids_BT = looped(cache=policy)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both = model.generate(ids_BT, attention_mask=mask_BT, **options)
    for row, start in ((0, 3), (1, 0)):
        alone = model.generate(ids_BT[row : row + 1, start:], **options)
        assert torch.equal(both.sequences[row, 10:], alone.sequences[0, 10 - start :])
        for a, b in zip(both.logits, alone.logits, strict=True):
            assert_close(a[row : row + 1], b, f"row {row}")


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)"])
def test_later_tokens_do_not_change_earlier_logits(policy):
    model, ids_BT = looped(cache=policy)
    other_BT = ids_BT.clone()
    other_BT[:, 6] = (other_BT[:, 6] + 1) % 90
    got, want = logits(model, other_BT), logits(model, ids_BT)
    assert_close(got[:, :6], want[:, :6], "before the change")
    assert difference(got[:, 6:], want[:, 6:], "after the change") > 1e-3


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)"])
def test_beam_search_and_crop(policy):
    model, ids_BT = looped(cache=policy)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "attention_mask": torch.ones_like(ids_BT)}
    assert torch.equal(model.generate(ids_BT, **options), model.generate(ids_BT, use_cache=False, **options))
    cache = new_cache(model)
    logits(model, ids_BT[:, :7], cache)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    flipped_BT = ids_BT.flip(0)
    assert_close(logits(model, flipped_BT[:, 4:6], cache), logits(model, flipped_BT[:, :6])[:, 4:], "cropped")


@pytest.mark.parametrize(
    ("policy", "num_stores"), [("own", 18), ("ring(3)", 14), ("ring(2)", 10), ("last", 6), ("first", 6)]
)
def test_stores_and_bytes_of_four_iterations(policy, num_stores):
    model, ids_BT = looped(plan="0 core:(1-4)x4 5", cache=policy)
    cache = new_cache(model)
    logits(model, ids_BT, cache)
    assert len(cache.layers) == num_stores
    config = model.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * 4  # keys and values, in bytes of float32
    held = sum(entry.keys.nbytes + entry.values.nbytes for entry in cache.layers)
    assert held == num_stores * ids_BT.numel() * per_token
    assert {entry.get_seq_length() for entry in cache.layers} == {ids_BT.shape[1]}
    inside = [position for position, _ in cache.slots if position[0] == 1]
    assert {inside.count(position) for position in inside} == {(num_stores - 2) // 4} and len(set(inside)) == 4


@pytest.mark.parametrize("policy", ["last", "first"])
def test_shared_stores_take_any_number_of_iterations(policy):
    model, ids_BT = looped(cache=policy)
    cache = new_cache(model)
    for t, count in enumerate((2, 1, 3, 2, 4)):
        assert torch.isfinite(logits(model, ids_BT[:, t : t + 1], cache, loops=count)).all()
    assert len(cache.layers) == 6 and {entry.get_seq_length() for entry in cache.layers} == {5}


def test_a_ring_refuses_iterations_that_it_has_no_store_for():
    model, ids_BT = looped(cache="ring(2)")
    cache = new_cache(model)
    logits(model, ids_BT[:, :3], cache, loops=1)
    with pytest.raises(ValueError, match="deeper"):
        logits(model, ids_BT[:, 3:4], cache, loops=2)
    cache = new_cache(model)
    logits(model, ids_BT[:, :3], cache, loops=2)
    assert torch.isfinite(logits(model, ids_BT[:, 3:4], cache, loops=7)).all()


def test_a_cache_in_use_keeps_its_policy():
    model, ids_BT = looped()
    cache = new_cache(model)
    logits(model, ids_BT[:, :5], cache)
    want = logits(model, ids_BT[:, 5:6], copy.deepcopy(cache))
    loopwise.set_cache(model, "last")
    assert torch.equal(logits(model, ids_BT[:, 5:6], cache), want)
    shared = new_cache(model)
    logits(model, ids_BT[:, :5], shared)
    assert len(shared.layers) == 6
    want = logits(model, ids_BT[:, 5:8], copy.deepcopy(shared))
    loopwise.set_cache(model, "own")
    assert torch.equal(logits(model, ids_BT[:, 5:8], shared), want)


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)", "own/last"])
@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1", "qwen3_next", "lfm2"])
def test_shared_stores_of_recurrent_state_are_refused_by_name(model_type, policy):
    model, ids_BT = looped(model_type)
    want = logits_of_state(model, ids_BT)
    with pytest.raises(ValueError, match=r"policies last, first and ring|policy own") as caught:
        loopwise.set_cache(model, policy)
        model.generate(ids_BT, max_new_tokens=3, do_sample=False)
    assert len(str(caught.value).splitlines()) == 1
    loopwise.set_cache(model, "own")
    assert torch.equal(logits_of_state(model, ids_BT), want)


def logits_of_state(model, ids_BT):
    with torch.no_grad():
        return model(ids_BT).logits


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)", "own/last"])
def test_shared_stores_in_a_static_cache_are_refused_by_name(policy):
    model, ids_BT = looped(cache=policy)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match="StaticLayer: use policy own"):
        logits(model, ids_BT[:, :5], cache)
        logits(model, ids_BT[:, 5:6], cache)


def test_a_mask_of_four_dimensions_is_refused_where_tokens_go_one_by_one():
    model, ids_BT = looped(cache="last")
    mask = torch.zeros(2, 1, 10, 10).masked_fill(torch.ones(10, 10).triu(1).bool(), torch.finfo(torch.float32).min)
    with pytest.raises(ValueError, match="2-D attention mask"):
        logits(model, ids_BT, attention_mask=mask)


@pytest.mark.parametrize("policy", ["last", "first"])
def test_hidden_states_are_joined_over_tokens(policy):
    model, ids_BT = looped(cache=policy)
    with torch.no_grad():
        states = model(ids_BT, output_hidden_states=True).hidden_states
    assert len(states) == 11 and {tuple(state.shape) for state in states} == {(2, 10, 32)}
    assert_close(model.lm_head(states[-1]), logits(model, ids_BT), "the last hidden state")


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)"])
def test_gradient_checkpointing_is_refused_where_layers_need_their_cache(policy):
    model, ids_BT = looped(cache=policy)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="gradient checkpointing .* policy own"):
        model(ids_BT, labels=ids_BT)
    loopwise.set_cache(model, "own/last")  # a training step is a prefill
    model(ids_BT, labels=ids_BT).loss.backward()
    loopwise.set_cache(model, policy)
    assert torch.isfinite(logits(model.eval(), ids_BT)).all()


@pytest.mark.parametrize(("model_type", "name"), [("llama", "attentions"), ("mixtral", "router_logits")])
def test_outputs_that_cannot_be_joined_over_tokens_are_refused_by_name(model_type, name):
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    ids_BT = tiny_inputs(model)
    loopwise.attach(model, LOOPED, cache="last")
    with pytest.raises(ValueError, match=f"output {name} .* use own"):
        model(ids_BT, **{f"output_{name}": True})
    assert torch.isfinite(logits(model, ids_BT)).all()
    loopwise.set_cache(model, "first")
    with torch.no_grad():
        assert len(model(ids_BT, **{f"output_{name}": True})[name]) == 10


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)"])
def test_gradients_flow_through_shared_stores(policy):
    """In training there is no cache to give; the gradient is that of the oracle."""
    model, ids_BT = looped(cache=policy)
    twin = tiny_model("llama")
    weights = torch.randn(2, 10, 99, generator=torch.Generator().manual_seed(0))
    (model.train()(ids_BT).logits * weights).sum().backward()
    with torch.enable_grad():
        (SlowLlama(twin, LOOPED, POLICIES[policy]).run(ids_BT) * weights).sum().backward()
    for (name, parameter), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(parameter.grad, want.grad, name, 1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "lst",
        "",
        "ring",
        "ring(0)",
        "ring(-1)",
        "ring(2",
        "own/",
        "/last",
        "own/last/own",
        "last/own",
        "first/last",
        "OWN",
        " own",
    ],
)
def test_unknown_policies_are_refused(text):
    model, ids_BT = looped()
    with pytest.raises(ValueError, match="cache policy") as caught:
        loopwise.set_cache(model, text)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="cache policy"):
        loopwise.attach(tiny_model("llama"), LOOPED, cache=text)
    assert_close(in_pieces(model, ids_BT, [9, 1], new_cache(model)), logits(model, ids_BT), "still own")


@pytest.mark.parametrize("thing", [None, 3, Sharing()])
def test_policies_that_are_no_text_are_refused(thing):
    with pytest.raises(ValueError, match="must be text"):
        loopwise.set_cache(looped()[0], thing)


@pytest.mark.parametrize(("policy", "on_deeper"), [("own", "maybe"), ("last", "catch_up"), ("own/last", "catch_up")])
def test_what_to_do_when_deeper_is_checked(policy, on_deeper):
    model, _ = looped()
    with pytest.raises(ValueError, match="on_deeper"):
        loopwise.set_cache(model, policy, on_deeper=on_deeper)


@pytest.mark.parametrize("text", ["own", "last", "first", "ring(2)", "own/last", "own/first", "own/ring(3)"])
def test_policies_print_as_they_parse(text):
    want = text.replace("last", "ring(1)")
    assert str(CachePolicy.parse(text)) in (text, want)
    assert CachePolicy.parse(str(CachePolicy.parse(text))) == CachePolicy.parse(text)


def test_stores_of_slots():
    slot = Slot(position=(1, 0, 2), iterations=(3, 1), layer=5)
    stores = {text: Sharing.parse(text).store(slot) for text in ("own", "last", "first", "ring(2)")}
    assert stores["own"] == slot.key
    assert stores["last"] == stores["first"] == ((1, 0, 2), (0, 0))
    assert stores["ring(2)"] == ((1, 0, 2), (1, 1))
    assert Sharing.parse("first").reads_only(slot) and not Sharing.parse("last").reads_only(slot)
    assert [Sharing.parse(text).is_sequential for text in ("own", "first", "last", "ring(2)")] == [
        False,
        False,
        True,
        True,
    ]
    assert [CachePolicy.parse(text).is_exact for text in ("own", "own/last", "last")] == [True, False, False]

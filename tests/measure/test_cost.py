"""What a plan costs: sums over visits, training, recomputation, parameters, shares."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import tiny_inputs, tiny_model
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import loopwise
from loopwise.measure import cost_of, realised_depth
from loopwise.models.loop_parts import add_loops
from loopwise.models.relaxation import add_relaxation
from loopwise.plan import Plan

TOKENS = 8
LOOP = "0 core:(1-2)x4 3-5"


@pytest.fixture
def llama() -> nn.Module:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    return model


def trained_flops(model: nn.Module) -> int:
    ids = tiny_inputs(model, batch=1, length=TOKENS)
    counter = FlopCounterMode(display=False)
    with counter:
        model.train()(ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def test_one_linear_layer_by_hand() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    cost = cost_of(model, "0", context=100)
    projections = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    assert cost.layers[0].matmul_flops == 2 * projections
    assert cost.layers[0].attention_flops == 2 * 100 * 2 * (4 + 4)
    assert cost.outside_flops == 2 * 8 * 10
    assert cost.forward_flops_per_token == 2 * projections + 3200 + 160
    assert cost.training_flops_per_token == 3 * cost.forward_flops_per_token
    assert cost.cache_bytes_per_token == (4 + 4) * 4
    assert cost.state_bytes == 0
    norms = 3 * 8
    assert cost.parameters_unique == cost.parameters_unrolled == projections + norms + 2 * 80


def test_a_tied_head_costs_flops_but_no_parameters() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def cost(tied: bool):
        config = LlamaConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=10
        )
        config.tie_word_embeddings = tied
        return cost_of(LlamaForCausalLM(config))

    assert cost(True).forward_flops_per_token == cost(False).forward_flops_per_token
    assert cost(False).parameters_unique - cost(True).parameters_unique == 80


@pytest.mark.parametrize("plan", [LOOP, "0-5", "0-3 1-5", "5 0", "a:(0-1 b:(2 3)x2)x3"])
def test_a_plan_costs_the_sum_over_its_visits(llama: nn.Module, plan: str) -> None:
    cost = cost_of(llama, plan, context=TOKENS)
    per_layer = {layer.layer: layer for layer in cost.layers}
    assert [visit.layer for visit in cost.visits] == list(Plan.parse(plan).layers)
    assert list(per_layer) == list(Plan.parse(plan).unique_layers)
    total = sum(per_layer[layer].forward_flops for layer in Plan.parse(plan).layers)
    assert cost.forward_flops_per_token == cost.outside_flops + total
    assert cost.cache_bytes_per_token == sum(per_layer[v.layer].cache_bytes_per_token for v in cost.visits)


@pytest.mark.parametrize("plan", [LOOP, "0-3 1-5", "5 0"])
def test_an_attached_model_costs_what_the_counter_counts(llama: nn.Module, plan: str) -> None:
    loopwise.attach(llama, plan)
    cost = cost_of(llama, context=TOKENS)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        llama(tiny_inputs(llama, batch=1, length=TOKENS), use_cache=False)
    assert cost.plan == str(Plan.parse(plan))
    assert TOKENS * cost.forward_flops_per_token == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert TOKENS * cost.training_flops_per_token == pytest.approx(trained_flops(llama), rel=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "mixtral", "deepseek_v3"])
def test_training_flops_are_those_of_the_counter(model_type: str) -> None:
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    # The window of the tiny types is 4 keys; the counter counts the masked ones.
    cost = cost_of(model, context=TOKENS)
    masked = 3 * TOKENS * sum(2 * TOKENS * 4 * 16 - layer.attention_flops for layer in cost.layers)
    expected = trained_flops(model) - (masked if model_type == "phi3" else 0)
    assert TOKENS * cost.training_flops_per_token == pytest.approx(expected, rel=0.01)


def looped_by_hand(model: nn.Module, window: int, injected: bool) -> int:
    """FLOPs that the counter sees for `0 core:(1-2)x4 3-5` with gradient in the last `window` iterations only."""
    body, ids = model.model, tiny_inputs(model, batch=1, length=TOKENS)
    counter = FlopCounterMode(display=False)
    with counter:
        embedded = body.embed_tokens(ids)
        positions = torch.arange(TOKENS)[None]
        mask = torch.full((TOKENS, TOKENS), -1e9).triu(1)[None, None]
        tables = body.rotary_emb(embedded, position_ids=positions)

        def visit(layer: int, state: torch.Tensor) -> torch.Tensor:
            return body.layers[layer](state, attention_mask=mask, position_embeddings=tables, position_ids=positions)

        read = state = visit(0, embedded)
        for iteration in range(4):
            with torch.set_grad_enabled(iteration >= 4 - window):
                state = visit(2, visit(1, state + read if injected else state))
        for layer in (3, 4, 5):
            state = visit(layer, state)
        model.lm_head(body.norm(state)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("window", [1, 2, 4, 9])
@pytest.mark.parametrize("injected", [True, False])
def test_iterations_without_gradient_cost_their_forward(llama: nn.Module, window: int, injected: bool) -> None:
    cost = cost_of(llama, LOOP, context=TOKENS, grad_iterations=window, grad_prelude=injected)
    assert TOKENS * cost.training_flops_per_token == pytest.approx(looped_by_hand(llama, window, injected), rel=1e-3)
    assert sum(not visit.with_grad for visit in cost.visits) == 2 * max(0, 4 - window) + (window < 4 and not injected)


def test_no_iteration_with_gradient(llama: nn.Module) -> None:
    cost = cost_of(llama, LOOP, grad_iterations=0)
    assert [visit.with_grad for visit in cost.visits] == [True] + [False] * 8 + [True] * 3


def test_recomputation_costs_one_more_forward(llama: nn.Module) -> None:
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    cost = cost_of(llama, context=TOKENS, recompute=True)
    # By default the second forward stops at the last tensor that the backward needs.
    with set_checkpoint_early_stop(False):
        assert TOKENS * cost.training_flops_per_token == pytest.approx(trained_flops(llama), rel=1e-3)


def test_recomputing_the_loop_repeats_its_visits_with_gradient(llama: nn.Module) -> None:
    plain = cost_of(llama, LOOP, grad_iterations=2)
    again = cost_of(llama, LOOP, grad_iterations=2, recompute="loop")
    core = plain.visits[1].forward_flops
    assert again.training_flops_per_token - plain.training_flops_per_token == pytest.approx(4 * core)
    every = cost_of(llama, LOOP, grad_iterations=2, recompute=True)
    assert every.training_flops_per_token - plain.training_flops_per_token == pytest.approx(8 * core)


def test_the_main_loop_is_the_named_or_the_only_one(llama: nn.Module) -> None:
    only = cost_of(llama, "0 (1-2)x4 3-5", grad_iterations=1)
    assert only.training_flops_per_token == cost_of(llama, LOOP, grad_iterations=1).training_flops_per_token
    named = cost_of(llama, "(0)x2 core:(1-2)x4 3-5", grad_iterations=1)
    assert [visit.with_grad for visit in named.visits] == [True] * 2 + [False] * 6 + [True] * 5
    # Inside another loop the iterations are counted through.
    nested = cost_of(llama, "(0 core:(1)x3)x2", grad_iterations=2)
    assert [visit.with_grad for visit in nested.visits] == [True, False, False, False, True, False, True, True]


def test_parameters_unrolled_are_those_of_the_materialised_model(llama: nn.Module) -> None:
    cost = cost_of(llama, LOOP)
    assert cost.parameters_unique == sum(p.numel() for p in llama.parameters())
    loopwise.attach(llama, LOOP)
    twin = loopwise.materialize(llama)
    assert cost.parameters_unrolled == sum(p.numel() for p in twin.parameters())


def test_skipped_layers_are_no_parameters_of_the_plan(llama: nn.Module) -> None:
    whole, pruned = cost_of(llama), cost_of(llama, "0-1 4-5")
    assert whole.parameters_unique - pruned.parameters_unique == 2 * whole.layers[2].parameters
    assert pruned.parameters_unrolled == pruned.parameters_unique


def test_layers_that_share_tensors_count_them_once() -> None:
    model = tiny_model("zamba2")
    cost = cost_of(model)
    assert cost.parameters_unique == cost.parameters_unrolled == sum(p.numel() for p in model.parameters())


def test_causal_counts_the_visible_keys() -> None:
    # Windows of 4 keys in every other layer.
    model = tiny_model("gemma2")
    full, causal = cost_of(model, context=10), cost_of(model, context=10, causal=True)
    kinds = model.config.layer_types
    for kind, a, b in zip(kinds, full.layers, causal.layers, strict=True):
        seen = [min(t, 4 if kind == "sliding_attention" else t) for t in range(1, 11)]
        most = 4 if kind == "sliding_attention" else 10
        assert b.attention_flops / a.attention_flops == pytest.approx(sum(seen) / 10 / most)
    assert {"sliding_attention", "full_attention"} <= set(kinds)
    # Twice the context costs more only where the window is open.
    longer = cost_of(model, context=20)
    grown = [b.attention_flops / a.attention_flops for a, b in zip(full.layers, longer.layers, strict=True)]
    assert grown == [1.0 if kind == "sliding_attention" else 2.0 for kind in kinds]


def test_shares_weigh_the_visits(llama: nn.Module) -> None:
    plan = "0 core:(1-2)x2 3-5"
    visits = torch.ones(4, 8, dtype=torch.bool)
    visits[1:, 3:5] = False
    cost, whole = cost_of(llama, plan, visits=visits), cost_of(llama, plan)
    assert realised_depth(visits) == cost.realised_depth == 6 + 2 / 4
    assert whole.realised_depth == whole.num_slots == 8
    saved = 2 * 0.75 * whole.visits[3].forward_flops
    assert whole.forward_flops_per_token - cost.forward_flops_per_token == pytest.approx(saved)
    assert whole.training_flops_per_token - cost.training_flops_per_token == pytest.approx(3 * saved)
    # A share per slot says the same, and the cache is laid out for every slot.
    assert cost_of(llama, plan, visits=visits.float().mean(0)) == cost
    assert cost.cache_bytes_per_token == whole.cache_bytes_per_token


def test_realised_depth() -> None:
    assert realised_depth([[1, 1, 0], [1, 0, 0]]) == 1.5
    assert realised_depth([1.0, 0.25]) == 1.25


def test_cost_is_plain_data(llama: nn.Module) -> None:
    import json

    assert json.loads(json.dumps(dataclasses.asdict(cost_of(llama, LOOP))))["plan"] == LOOP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": "0-6"}, "layer 6"),
        ({"context": 0}, "context"),
        ({"grad_iterations": 2}, "no loop"),
        ({"plan": "a:(0)x2 b:(1)x2", "grad_iterations": 2}, "2 loops and none is named core"),
        ({"plan": LOOP, "grad_iterations": -1}, "grad_iterations"),
        ({"recompute": "some"}, "recompute"),
        ({"recompute": "loop"}, "no loop"),
        ({"visits": [1.0, 1.0]}, "2 slots"),
        ({"visits": [[[1.0]]]}, "shape"),
        ({"visits": [0, 0, 2, 0, 0, 0]}, "0 .. 1"),
        ({"visits": [float("nan")] * 6}, "0 .. 1"),
        ({"visits": torch.ones(0, 6)}, "empty"),
    ],
)
def test_bad_arguments(llama: nn.Module, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        cost_of(llama, **arguments)
    assert "\n" not in str(caught.value)


def test_experts_without_a_number_per_token_are_refused(llama: nn.Module) -> None:
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(4, 8, 8))

    llama.model.layers[0].mlp = Experts()
    with pytest.raises(ValueError, match="4 experts"):
        cost_of(llama)


def test_a_list_of_experts_costs_what_a_token_visits(llama: nn.Module) -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.top_k = 2
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    before = cost_of(llama).layers[0]
    gone = 2 * sum(p.numel() for p in llama.model.layers[0].mlp.parameters())
    llama.model.layers[0].mlp = Block()
    assert cost_of(llama).layers[0].matmul_flops == before.matmul_flops - gone + 2 * 2 * 32 * 32


def test_adapters_are_counted_with_what_they_wrap(llama: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    plain = cost_of(llama, context=TOKENS)
    targets = ["q_proj", "k_proj", "o_proj", "down_proj"]
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=targets))
    cost = cost_of(wrapped, context=TOKENS)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        wrapped(tiny_inputs(llama, batch=1, length=TOKENS), use_cache=False)
    assert TOKENS * cost.forward_flops_per_token == pytest.approx(counter.get_total_flops(), rel=1e-3)
    # Rank 2 on inputs and outputs of 32 -> 32, 32 -> 16, 32 -> 32 and 64 -> 32 features.
    added = 2 * (64 + 48 + 64 + 96)
    assert cost.parameters_unique - plain.parameters_unique == 6 * added
    assert cost.forward_flops_per_token - plain.forward_flops_per_token == 6 * 2 * added
    assert cost.cache_bytes_per_token == plain.cache_bytes_per_token


def test_offsets_per_visit_cost_their_factors(llama: nn.Module) -> None:
    loopwise.attach(llama, LOOP)
    without = cost_of(llama, context=TOKENS)
    add_relaxation(llama, 3)
    cost = cost_of(llama, context=TOKENS)
    counter = FlopCounterMode(display=False)
    ids = tiny_inputs(llama, batch=1, length=TOKENS)
    with counter, torch.no_grad():
        llama(ids, use_cache=False)
    assert counter.get_total_flops() == TOKENS * cost.forward_flops_per_token > TOKENS * without.forward_flops_per_token
    assert cost.parameters_unrolled == without.parameters_unrolled and cost.left_out == without.left_out
    offsets = sum(p.numel() for name, p in llama.named_parameters() if ".relaxation." in name)
    assert cost.parameters_unique == without.parameters_unique + offsets


def test_offsets_of_experts_cost_those_that_a_token_visits() -> None:
    model = loopwise.attach(tiny_model("mixtral"), LOOP)
    without = cost_of(model)
    add_relaxation(model, 1)
    shapes = {name: p.shape for name, p in model.model.layers[1].named_parameters() if "relaxation" not in name}
    sizes = [sum(shape[-2:]) * (2 if len(shape) == 3 else 1) for shape in shapes.values() if len(shape) > 1]
    got = cost_of(model).layers[1].matmul_flops - without.layers[1].matmul_flops
    assert got == 2 * sum(sizes)  # of 4 experts a token visits 2


@pytest.mark.parametrize("plan", [LOOP, "0 core:(1-2)x1 3-5"])
def test_an_adapter_of_a_loop_costs_every_iteration(llama: nn.Module, plan: str) -> None:
    add_loops(loopwise.attach(llama, plan), {"core": {"update": {"kind": "update.concat"}}})
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        llama(tiny_inputs(llama, batch=1, length=TOKENS), use_cache=False)
    assert counter.get_total_flops() == TOKENS * cost_of(llama, context=TOKENS).forward_flops_per_token

"""Tokens that leave a loop, against one row written out: injection, updates, norms at the turns, nested loops.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from loopwise.loop.act import ActHalting
from loopwise.loop.exits import Exits, running_parts
from loopwise.loop.halting import HazardHalting
from loopwise.models.attach import set_cache, set_hooks
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.rotary import RotaryConfig, rotary_tables
from loopwise.plan import Plan

IDS_BT = torch.tensor([[1, 4, 2, 9, 3, 3, 6], [5, 10, 7, 2, 2, 8, 1], [0, 0, 4, 4, 9, 9, 2]])
SLOT = Plan.parse("0").slots[0]
NORM = {"type": "rms", "eps": 1e-6}
# a prelude, two layers in the loop, a coda; something at every turn
FULL = {
    "state": {"kind": "zeros"},
    "update": {"kind": "chain", "parts": [{"kind": "update.concat"}, {"kind": "update.highway"}]},
    "entry": NORM,
    "turn": NORM,
    "exit": NORM,
    "gate": True,
}


def build(plan="0 core:(1-2)x4 3", loops=None, num_layers=4, **fields):
    torch.manual_seed(0)
    rope = RotaryConfig(dim=4)
    block = BlockConfig(
        hidden_size=8, mixer=AttentionConfig(num_heads=2, rope=rope), mlp=MLPConfig(intermediate_size=12)
    )
    model = LoopwiseForCausalLM(
        LoopwiseDecoderConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=num_layers,
            blocks=[block.to_dict()],
            plan=plan,
            loops={"core": FULL} if loops is None else loops,
            norm=NORM,
            **fields,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return model


def assert_close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)


class Count:
    def __init__(self, model):
        self.tokens = [0] * len(model.model.layers)
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda _, args, i=i: self.add(i, args[0]))

    def add(self, i, part):
        self.tokens[i] += part.shape[:2].numel()


def naive(model, ids_T, threshold, count=4):
    """One row under the plan `0 core:(1-2)x4 3` with the components of FULL; returns logits and exits."""
    core, layers = model.model.loops["core"], model.model.layers

    def run(layer, state_TD, tokens):
        tables = rotary_tables(torch.tensor([tokens]), layer.block_config.mixer.rope)
        return layer(state_TD[None], position_embeddings=tables)[0]

    everyone = list(range(len(ids_T)))
    prelude_TD = run(layers[0], model.model.embed_tokens(ids_T), everyone)
    e_TD = core.entry(prelude_TD)
    state_TD, after_TD = torch.zeros_like(e_TD), torch.zeros_like(e_TD)
    survival, running, exits = [1.0] * len(ids_T), everyone, [count - 1] * len(ids_T)
    for iteration in range(count):
        here = {"iteration": iteration, "num_iterations": count}
        before, e = state_TD[running], e_TD[running]
        inner = core.update(before, e, **here)
        for layer in layers[1:3]:
            inner = run(layer, inner, running)
        new = core.turn(core.update.leave(before, inner, e, **here))
        state_TD = state_TD.index_copy(0, torch.tensor(running), new)
        after_TD = after_TD.index_copy(0, torch.tensor(running), core.exit(new))
        stay = []
        for t, chance in zip(running, core.gate(new).sigmoid().tolist(), strict=True):
            survival[t] *= 1 - chance
            if iteration < count - 1 and survival[t] > 1 - threshold:
                stay.append(t)
            else:
                exits[t] = iteration
        running = stay
        if not running:
            break
    state_TD = run(layers[3], after_TD, everyone)
    return model.lm_head(model.model.norm(state_TD)), exits


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 0.95])
def test_skipping_equals_one_row_written_out(threshold):
    model = build()
    count = Count(model)
    output = model(IDS_BT, halting=HazardHalting(threshold=threshold), use_cache=False, output_loops=True)
    depth = int((output.exits + 1).sum())
    assert count.tokens == [21, depth, depth, 21]
    for b in range(3):
        logits, exits = naive(model, IDS_BT[b], threshold)
        assert_close(output.logits[b], logits)
        assert output.exits[b].tolist() == exits
    assert len(output.loop_states) == 4 and output.gates.shape == (3, 7, 4)
    ran = torch.arange(4) <= output.exits[..., None]
    assert torch.equal(output.gates.isnan(), ~ran)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["selected", "last"])
def test_skipping_with_a_cache(policy):
    model = build()
    set_cache(model, policy)
    options = {"halting": HazardHalting(threshold=0.8), "use_cache": True}
    whole, cache, logits = model(IDS_BT, **options), None, []
    assert whole.exits.unique().numel() > 2
    for t in range(7):
        output = model(IDS_BT[:, t : t + 1], past_key_values=cache, **options)
        cache = output.past_key_values
        logits.append(output.logits)
    assert_close(torch.cat(logits, 1), whole.logits)
    collected = model(IDS_BT, output_loops=True, **options)
    assert [state.shape for state in collected.loop_states] == [(3, 7, 8)] * 4
    assert collected.gates.shape == (3, 7, 4) and torch.equal(collected.exits, whole.exits)


@torch.no_grad()
def test_selecting_reads_each_token_where_it_left():
    model = build()
    every = model(IDS_BT, output_loops=True, use_cache=False)
    rule = HazardHalting(threshold=0.8)
    output = model(IDS_BT, halting=rule, on_exit="select", use_cache=False)
    chosen_BTD = torch.stack(every.loop_states)[output.exits, torch.arange(3)[:, None], torch.arange(7)]
    core = model.model.loops["core"]
    tables = rotary_tables(torch.arange(7)[None], model.model.layers[3].block_config.mixer.rope)
    want = model.model.layers[3](core.exit(chosen_BTD), position_embeddings=tables)
    assert_close(output.logits, model.lm_head(model.model.norm(want)))
    assert output.exits.unique().numel() > 2
    assert_close(model(IDS_BT, halting=rule, on_exit="select").logits, output.logits)


@torch.no_grad()
@pytest.mark.parametrize("on_exit", ["skip", "select"])
def test_a_loop_inside_a_loop_starts_anew(on_exit):
    """Tokens that left the inner loop are back when the outer one comes around."""
    model = build("0 outer:(core:(1-2)x3 3)x2")
    count = Count(model)
    output = model(IDS_BT, halting=HazardHalting(threshold=0.7), on_exit=on_exit, use_cache=False)
    assert count.tokens[3] == 2 * 21
    first = Count(model)
    model(IDS_BT, halting=HazardHalting(threshold=0.0), on_exit=on_exit, use_cache=False)
    assert first.tokens[1] == (2 * 21 if on_exit == "skip" else 6 * 21)
    for b in range(3):
        alone = model(IDS_BT[b : b + 1], halting=HazardHalting(threshold=0.7), on_exit=on_exit, use_cache=False)
        assert_close(output.logits[b : b + 1], alone.logits)


@torch.no_grad()
def test_exits_of_outer_and_inner_loops_add_up():
    """A token outside the outer loop is not visited by the inner one either."""
    gated = {"gate": True, "halting": {"kind": "hazard", "threshold": 0.6}}
    model = build("outer:(core:(0)x2 1)x3", {"core": gated, "outer": gated}, num_layers=2)
    count = Count(model)
    model(IDS_BT, use_cache=False)
    assert count.tokens[1] < 3 * 21 and count.tokens[1] < count.tokens[0] < 2 * count.tokens[1]


@torch.no_grad()
def test_the_configuration_may_hold_the_rule():
    model = build(loops={"core": FULL | {"halting": {"kind": "hazard", "threshold": 0.8}}})
    called = build()(IDS_BT, halting=HazardHalting(threshold=0.8), use_cache=False)
    configured = model(IDS_BT, use_cache=False)
    assert torch.equal(configured.logits, called.logits) and torch.equal(configured.exits, called.exits)
    never = model(IDS_BT, halting={"kind": "fixed"}, use_cache=False)
    assert torch.equal(never.logits, build()(IDS_BT, use_cache=False).logits)


def test_gradients_pass_through_the_visits_that_were_made():
    model = build()
    model(IDS_BT, halting=HazardHalting(threshold=0.8), use_cache=False).logits.square().mean().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert names == {"model.loops.core.gate.linear.weight", "model.loops.core.gate.linear.bias"}


@torch.no_grad()
def test_padding_does_not_change_a_row():
    model = build()
    rule = HazardHalting(threshold=0.8)
    ids_BT, mask_BT = IDS_BT.clone(), torch.ones_like(IDS_BT)
    mask_BT[1, :3] = 0
    positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
    padded = model(ids_BT, attention_mask=mask_BT, position_ids=positions, halting=rule, use_cache=False)
    alone = model(ids_BT[1:2, 3:], halting=rule, use_cache=False)
    assert_close(padded.logits[1:2, 3:], alone.logits)
    assert torch.equal(padded.exits[1:2, 3:], alone.exits)


@torch.no_grad()
def test_other_narrowing_hooks_are_refused_while_tokens_leave():
    class EvenTokens:
        def before(self, visit, state_BTD):
            return replace(visit, positions=torch.arange(0, state_BTD.shape[1], 2))

        def after(self, visit, before_BTD, state_BTD):
            return state_BTD

    model = build()
    set_hooks(model, [EvenTokens()])
    with pytest.raises(ValueError, match="narrow"):
        model(IDS_BT, halting=HazardHalting(threshold=0.8), use_cache=False)


@torch.no_grad()
def test_masks_of_flex_attention_are_refused():
    model = build()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention masks cannot be sliced"):
        model(IDS_BT, halting=HazardHalting(threshold=0.8), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_functions_agree(attention):
    model = build()
    rule = HazardHalting(threshold=0.8)
    want = model(IDS_BT, halting=rule, use_cache=False)
    model.set_attn_implementation(attention)
    assert_close(model(IDS_BT, halting=rule, use_cache=False).logits, want.logits)


def test_rows_with_equally_many_tokens_run_together():
    running_BT = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 1]]).bool()
    parts = list(running_parts(SLOT, running_BT))
    assert [(part.rows.tolist(), None if part.positions is None else part.positions.tolist()) for part in parts] == [
        ([0, 3], [[0, 2], [1, 2]]),
        ([2], None),
    ]
    assert list(running_parts(SLOT, torch.zeros(2, 3).bool())) == []
    (whole,) = running_parts(SLOT, torch.ones(2, 3).bool())
    assert not whole.is_partial


def test_a_rule_of_another_axis_is_refused():
    with pytest.raises(ValueError, match="halting.latent is not driven by a gate"):
        from loopwise.loop.config import from_dict

        Exits(nn.Linear(2, 1), from_dict({"kind": "halting.latent", "threshold": 0.1}))
    assert Exits(nn.Linear(2, 1), ActHalting(), skips=True).skips
    assert not Exits(nn.Linear(2, 1), None, skips=True).skips

"""Visits on a part of the grid equal the dense computation under the corresponding mask, on attached models.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laws import assert_close, looping_plan
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.loop.execute import Visit, execute, gather, scatter
from loopwise.models.attach import set_hooks
from loopwise.models.hub import layer_list
from loopwise.plan import Slot

# dense attention of many kinds: rotary, learned and ALiBi positions, sliding windows, MoE, MLA, parallel blocks
ATTENTION = [
    "llama",
    "gpt2",
    "bloom",
    "gpt_neox",
    "gemma3_text",
    "mixtral",
    "qwen3",
    "phi",
    "opt",
    "deepseek_v3",
    "cohere2",
    "bert",
]
RECURRENT = ["mamba2", "qwen3_next", "falcon_h1"]


class Narrow:
    """From the second iteration on, visit only some rows and positions."""

    def __init__(self, rows=None, positions=None):
        self.rows, self.positions, self.num_visits = rows, positions, 0

    def before(self, visit, state_BTD):
        if not any(visit.slot.iterations):
            return visit
        self.num_visits += 1
        return replace(visit, rows=self.rows, positions=self.positions)

    def after(self, visit, before_BTD, state_BTD):
        return state_BTD


class Dense:
    """The oracle: run all tokens, with the left-out ones masked away as keys, and give them their old state back."""

    def __init__(self, model, keep_BT):
        self.keep_BT, self.active, self.num_masks = keep_BT, False, 0
        for layer in layer_list(model).layers:
            layer.register_forward_pre_hook(self.mask, with_kwargs=True)

    def mask(self, layer, args, kwargs):
        if not self.active:
            return None
        allowed = torch.where(self.keep_BT[:, None, None, :], 0.0, torch.finfo(torch.float32).min)
        own = torch.eye(allowed.shape[-1], dtype=torch.bool)

        def forbid(value):
            if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-2:] == (allowed.shape[-1],) * 2:
                self.num_masks += 1
                return torch.where(own, value, (value + allowed).clamp(min=torch.finfo(torch.float32).min))
            return value

        return tuple(map(forbid, args)), {name: forbid(value) for name, value in kwargs.items()}

    def before(self, visit, state_BTD):
        self.active = any(visit.slot.iterations)
        return visit

    def after(self, visit, before_BTD, state_BTD):
        if not self.active:
            return state_BTD
        self.active = False
        return torch.where(self.keep_BT[..., None], state_BTD, before_BTD)


def looped(model_type, eager=False):
    model = tiny_model(model_type)
    if eager:
        model.set_attn_implementation("eager")
    ids_BT = tiny_inputs(model, batch=3, length=9)
    loopwise.attach(model, looping_plan(len(layer_list(model).layers)))
    return model, ids_BT


@torch.no_grad()
@pytest.mark.parametrize("model_type", ATTENTION + RECURRENT)
def test_rows_left_out_have_run_fewer_iterations(model_type):
    model, ids_BT = looped(model_type)
    want = torch.stack(
        [model(ids_BT[i : i + 1], use_cache=False, loops=loops).logits[0] for i, loops in enumerate((2, 1, 2))]
    )
    hook = Narrow(rows=torch.tensor([0, 2]))
    set_hooks(model, [hook])
    assert_close(model(ids_BT, use_cache=False).logits, want, "rows")
    assert hook.num_visits > 0


@torch.no_grad()
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("model_type", ATTENTION)
def test_positions_left_out_are_neither_queries_nor_keys(model_type, per_row):
    model, ids_BT = looped(model_type, eager=True)
    positions = torch.tensor([[0, 2, 3, 7], [1, 2, 5, 8], [0, 4, 6, 7]]) if per_row else torch.tensor([1, 3, 4, 8])
    keep_BT = torch.zeros(3, 9, dtype=torch.bool).scatter(1, positions.expand(3, -1), True)
    oracle = Dense(model, keep_BT)
    set_hooks(model, [oracle])
    want = model(ids_BT, use_cache=False).logits
    set_hooks(model, [])
    assert not torch.allclose(model(ids_BT, use_cache=False).logits, want, atol=1e-3), "leaving tokens out must matter"
    hook = Narrow(positions=positions)
    set_hooks(model, [hook])
    assert_close(model(ids_BT, use_cache=False).logits, want, "positions")
    assert hook.num_visits > 0 and oracle.num_masks > 0


@torch.no_grad()
def test_rows_and_positions_together_with_padding():
    model, ids_BT = looped("llama", eager=True)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[2, :3] = 0
    positions, rows = torch.tensor([[3, 4, 8], [3, 6, 8]]), torch.tensor([0, 2])
    keep_BT = torch.zeros(3, 9, dtype=torch.bool)
    keep_BT[rows[:, None], positions] = True
    set_hooks(model, [Dense(model, keep_BT)])
    want = model(ids_BT, attention_mask=mask_BT, use_cache=False).logits
    set_hooks(model, [Narrow(rows=rows, positions=positions)])
    got = model(ids_BT, attention_mask=mask_BT, use_cache=False).logits
    assert_close(got, want, "rows and positions")


def test_partial_visits_with_a_cache_are_refused_by_name():
    model, ids_BT = looped("llama")
    set_hooks(model, [Narrow(rows=torch.tensor([0]))])
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids_BT, use_cache=True)
    set_hooks(model, [])
    assert model(ids_BT).logits.shape[:2] == ids_BT.shape


def test_gradient_flows_only_through_visits_with_grad():
    model, ids_BT = looped("llama")

    class Window:
        def before(self, visit, state_BTD):
            return replace(visit, with_grad=visit.slot.iterations in ((), (1,)))

        def after(self, visit, before_BTD, state_BTD):
            return state_BTD

    set_hooks(model, [Window()])
    states = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: states.append(output))
    model(ids_BT, use_cache=False).logits.sum().backward()
    assert [state.requires_grad for state in states] == [False, True]


def test_skipping_a_visit_leaves_the_state():
    slots = (Slot(position=(0, 0), iterations=(), layer=0), Slot(position=(0, 1), iterations=(), layer=1))

    class SkipFirst:
        def before(self, visit, state_BTD):
            return None if visit.slot.layer == 0 else visit

        def after(self, visit, before_BTD, state_BTD):
            return state_BTD

    state = torch.ones(2, 3, 4)
    out = execute(
        state, (Visit(slot=slot) for slot in slots), lambda visit, part: part * (visit.slot.layer + 2), [SkipFirst()]
    )
    assert torch.equal(out, state * 3)


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize("positions", [None, torch.tensor([1, 3]), torch.tensor([[0, 1], [2, 4]])])
def test_scatter_puts_back_what_gather_took(rows, positions):
    if positions is not None and positions.ndim == 2 and rows is None:
        positions = positions[[0, 1, 0]]
    visit = Visit(slot=Slot(position=(0,), iterations=(), layer=0), rows=rows, positions=positions)
    state_BTD = torch.randn(3, 5, 2)
    part = gather(state_BTD, visit)
    assert torch.equal(scatter(state_BTD, part, visit), state_BTD)
    changed = scatter(state_BTD, part + 1, visit)
    assert (changed != state_BTD).sum() == part.numel()

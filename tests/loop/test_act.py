"""Adaptive computation time against the loop of the papers, token by token. Shapes: B rows, T tokens, D width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loopwise.loop.act import ActHalting
from loopwise.loop.halting import Gate
from loopwise.loop.readout import ponder_cost

RULES = ["accumulated", "basic"]


def oracle(probabilities, outputs, rule, epsilon):
    """(output, weights, number of updates, remainder) of one token with scalar outputs."""
    mass, mixed, weights = 0.0, 0.0, []
    for n, (p, out) in enumerate(zip(probabilities, outputs, strict=True)):
        stops = mass + p > 1 - epsilon or n == len(probabilities) - 1
        weight = 1 - mass if stops else p
        mixed = mixed + weight * out if rule == "accumulated" else weight * out + (1 - weight) * mixed
        mass += weight
        weights.append(weight)
        if stops:
            return mixed, weights, n + 1, weight
    raise AssertionError


def run(config, p_RBT, out_RBTD, poison=False):
    state, weights = config.start(out_RBTD[0]), []
    for iteration, (p_BT, out_BTD) in enumerate(zip(p_RBT, out_RBTD, strict=True)):
        if poison:
            p_BT = torch.where(state.halted_BT, torch.nan, p_BT)
            out_BTD = torch.where(state.halted_BT[..., None], torch.nan, out_BTD)
        state = config.step(state, p_BT, out_BTD, last=iteration == len(p_RBT) - 1)
        weights.append(state.weight_BT)
    return state, torch.stack(weights)


def random_inputs(num_iterations=6, scale=0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    p_RBT = torch.rand(num_iterations, 3, 5, generator=generator, dtype=dtype) * scale
    return p_RBT, torch.randn(num_iterations, 3, 5, 2, generator=generator, dtype=dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_both_rules_equal_the_papers(rule, scale, epsilon):
    config = ActHalting(rule=rule, epsilon=epsilon)
    p_RBT, out_RBTD = random_inputs(scale=scale)
    state, weights_RBT = run(config, p_RBT, out_RBTD, poison=True)
    assert state.all_halted
    for b in range(3):
        for t in range(5):
            for d in range(2):
                mixed, weights, updates, remainder = oracle(
                    p_RBT[:, b, t].tolist(), out_RBTD[:, b, t, d].tolist(), rule, epsilon
                )
                assert state.output_BTD[b, t, d].item() == pytest.approx(mixed, abs=1e-12)
            assert state.n_updates_BT[b, t] == updates
            assert state.remainder_BT[b, t].item() == pytest.approx(remainder, abs=1e-12)
            assert state.ponder_BT[b, t].item() == pytest.approx(updates + remainder, abs=1e-12)
            assert weights_RBT[:, b, t].tolist() == pytest.approx(weights + [0.0] * (6 - updates), abs=1e-12)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), st.sampled_from(RULES))
@settings(max_examples=100)
def test_mass_is_one_at_the_cap_too(probabilities, rule):
    p_RBT = torch.tensor(probabilities).view(-1, 1, 1)
    state, weights_RBT = run(ActHalting(rule=rule), p_RBT, torch.ones(*p_RBT.shape, 1))
    assert abs(weights_RBT.sum().item() - 1) < 1e-6 and abs(state.mass_BT.item() - 1) < 1e-6
    if rule == "accumulated":
        assert abs(state.output_BTD.item() - 1) < 1e-6


def test_a_low_gate_does_not_shrink_the_output():
    # four iterations of probability 0.05 without a remainder at the cap would scale the output by 0.2
    state, _ = run(ActHalting(), torch.full([4, 1, 1], 0.05), torch.ones(4, 1, 1, 1))
    assert state.output_BTD.item() == pytest.approx(1.0) and state.remainder_BT.item() == pytest.approx(0.85)


def test_the_convex_rule_keeps_a_share_of_its_start():
    config = ActHalting(rule="basic")
    state = config.start(torch.zeros(1, 1, 1), output_BTD=torch.full([1, 1, 1], 8.0))
    for last in (False, True):
        state = config.step(state, torch.full([1, 1], 0.5), torch.zeros(1, 1, 1), last=last)
    assert state.output_BTD.item() == pytest.approx(8 * 0.5 * 0.5)


class Tiny(nn.Module):
    """A Universal Transformer reduced to one nonlinear block and a gate."""

    def __init__(self, rule):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.gate, self.config = nn.Linear(3, 3), Gate(3, bias=-1.0), ActHalting(rule=rule)
        self.double()

    def forward(self, x_BTD, num_iterations=5):
        state, act = x_BTD, self.config.start(x_BTD)
        for iteration in range(num_iterations):
            p_BT = torch.sigmoid(self.gate(state))
            state = torch.tanh(self.block(state)) + state
            act = self.config.step(act, p_BT, state, last=iteration == num_iterations - 1)
        return act


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_output_and_ponder_cost_equal_finite_differences(rule):
    model, mask_BT = Tiny(rule), torch.tensor([[True, True, False, True]] * 2)
    x_BTD = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    act = model(x_BTD)
    # depths differ between tokens, and no decision is near its threshold, where the cost jumps
    assert act.n_updates_BT.unique().numel() > 1

    def loss():
        act = model(x_BTD)
        weighted = (act.output_BTD * torch.arange(3)).sum()
        return torch.stack([ponder_cost(act.ponder_BT, mask_BT), weighted])

    inputs = [x_BTD, *model.parameters()]
    for index in range(2):
        exact = torch.autograd.grad(loss()[index], inputs, allow_unused=True, materialize_grads=True)
        assert any(gradient.abs().max() > 1e-3 for gradient in exact)
        for tensor, gradient in zip(inputs, exact, strict=True):
            torch.testing.assert_close(gradient, central_difference(loss, index, tensor), rtol=1e-6, atol=1e-8)


@torch.no_grad()
def central_difference(loss, index, tensor, eps=1e-6):
    flat = tensor.view(-1)
    slopes = torch.empty_like(flat)
    for i in range(len(flat)):
        kept = flat[i].item()
        flat[i] = kept + eps
        above = loss()[index].item()
        flat[i] = kept - eps
        slopes[i] = (above - loss()[index].item()) / (2 * eps)
        flat[i] = kept
    return slopes.view(tensor.shape)


def test_gradients_of_tokens_that_stopped_are_not_poisoned():
    p_RBT, out_RBTD = (x.requires_grad_() for x in random_inputs())
    for rule in RULES:
        clean, _ = run(ActHalting(rule=rule), p_RBT, out_RBTD)
        dirty, _ = run(ActHalting(rule=rule), p_RBT, out_RBTD, poison=True)
        want = torch.autograd.grad(clean.output_BTD.sum() + clean.ponder_BT.sum(), (p_RBT, out_RBTD))
        got = torch.autograd.grad(dirty.output_BTD.sum() + dirty.ponder_BT.sum(), (p_RBT, out_RBTD))
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b)


def test_the_ponder_cost_falls_with_every_probability_before_the_last():
    p_RBT = torch.tensor([0.3, 0.4, 0.9, 0.5]).view(4, 1, 1).requires_grad_()
    state, _ = run(ActHalting(), p_RBT, torch.ones(4, 1, 1, 1))
    assert state.ponder_BT.item() == pytest.approx(3.3)
    state.ponder_BT.sum().backward()
    assert p_RBT.grad.flatten().tolist() == [-1.0, -1.0, 0.0, 0.0]

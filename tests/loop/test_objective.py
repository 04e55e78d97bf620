"""Objectives as configs: each is its formula of `readout`, and names what it misses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loopwise.loop import readout
from loopwise.loop.config import from_dict
from loopwise.loop.halting import Gate, exit_log_pdf
from loopwise.loop.objective import (
    ActObjective,
    DeepSupervisionObjective,
    ExpectedObjective,
    FinalObjective,
    GateObjective,
    LastMeanObjective,
    PonderObjective,
    Terms,
)


def terms(**given):
    generator = torch.Generator().manual_seed(0)
    losses, gate = (torch.rand(4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    ponder = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    offered = {"losses_RBT": losses, "mask_BT": mask, "gate_logits_RBT": gate, "ponder_BT": ponder, "num_items": 10}
    return Terms(**offered | given)


def formulas(x):
    log_pdf, common = exit_log_pdf(x.gate_logits_RBT), {"num_items": x.num_items}
    prior = readout.geometric_log_prior(0.3, 4)
    task = readout.expected(x.losses_RBT, log_pdf, x.mask_BT, beta=0.0, **common)
    return {
        FinalObjective(): readout.final(x.losses_RBT, x.mask_BT, **common),
        LastMeanObjective(window=2): readout.last_mean(x.losses_RBT, x.mask_BT, 2, **common),
        DeepSupervisionObjective(weights="intermediate", coefficient=0.3): readout.deep_supervision(
            x.losses_RBT, x.mask_BT, "intermediate", coefficient=0.3, **common
        ),
        ExpectedObjective(beta=0.05): readout.expected(x.losses_RBT, log_pdf, x.mask_BT, beta=0.05, **common),
        GateObjective(slope=9.0, margin=0.1): readout.gate_loss(
            x.gate_logits_RBT, x.losses_RBT, x.mask_BT, slope=9.0, margin=0.1, **common
        ),
        PonderObjective(beta=0.5, rate=0.3): task + 0.5 * readout.prior_kl(log_pdf, prior, x.mask_BT, **common),
        ActObjective(weight=0.2): readout.final(x.losses_RBT, x.mask_BT, **common)
        + 0.2 * readout.ponder_cost(x.ponder_BT, x.mask_BT, **common),
    }


@pytest.mark.parametrize("num_items", [None, 10, torch.tensor(7)], ids=str)
def test_each_objective_is_its_formula(num_items):
    offered = terms(num_items=num_items)
    values = formulas(offered)
    assert len({round(value.item(), 9) for value in values.values()}) == len(values)
    for objective, want in values.items():
        torch.testing.assert_close(objective.loss(offered), want)


def test_objectives_of_one_iteration_say_so():
    one = terms(losses_RBT=terms().losses_RBT[-1:])
    for objective in formulas(terms()):
        if not objective.every_iteration:
            torch.testing.assert_close(objective.loss(one), objective.loss(terms()))


@pytest.mark.parametrize("kind", ["expected", "gate", "ponder"])
def test_a_missing_gate_is_named(kind):
    objective = from_dict({"kind": kind}, axis="readout")
    with pytest.raises(ValueError, match=f"readout.{kind}: gate_logits_RBT is missing"):
        objective.loss(terms(gate_logits_RBT=None))


def test_a_missing_ponder_cost_and_bad_values_are_named():
    with pytest.raises(ValueError, match="readout.act: ponder_BT is missing"):
        ActObjective().loss(terms(ponder_BT=None))
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        LastMeanObjective(window=0)
    with pytest.raises(ValueError, match="rate=1.0 must be between 0 and 1"):
        PonderObjective(rate=1.0)


class Tiny(nn.Module):
    """A Universal Transformer reduced to one nonlinear block, a gate and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.gate, self.head = nn.Linear(3, 3), Gate(3, bias=-1.0), nn.Linear(3, 5)
        self.double()

    def forward(self, x_BTD, labels_BT):
        losses, gates = [], []
        for _ in range(4):
            x_BTD = torch.tanh(self.block(x_BTD)) + x_BTD
            gates.append(self.gate(x_BTD))
            losses.append(readout.token_losses(self.head(x_BTD), labels_BT))
        mask = labels_BT != readout.IGNORE
        return Terms(losses_RBT=torch.stack(losses), mask_BT=mask, gate_logits_RBT=torch.stack(gates))


@pytest.mark.parametrize(
    "objective",
    [PonderObjective(beta=0.5), ExpectedObjective(), LastMeanObjective(window=2), DeepSupervisionObjective()],
    ids=str,
)
def test_gradients_through_a_model_equal_finite_differences(objective):
    model, labels = Tiny(), torch.tensor([[1, 0, readout.IGNORE, 4], [2, 2, 3, readout.IGNORE]])
    x = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    names = [name for name, _ in model.named_parameters()]

    def loss(x, *parameters):
        terms = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x, labels))
        return objective.loss(terms)

    assert torch.autograd.gradcheck(loss, (x, *model.parameters()))


def test_the_gate_loss_does_not_reach_the_head():
    model, labels = Tiny(), torch.tensor([[1, 0, 2, 4]])
    x = torch.randn(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    GateObjective().loss(model(x, labels)).backward()
    assert model.head.weight.grad is None and model.gate.linear.weight.grad.abs().max() > 0


def test_ponder_training_moves_the_mean_depth_towards_the_prior():
    torch.manual_seed(0)
    gate = nn.Parameter(torch.zeros(8, 1, 1))
    optimizer = torch.optim.Adam([gate], lr=0.1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for _ in range(200):
        terms = Terms(losses_RBT=torch.zeros(8, 1, 1), mask_BT=mask, gate_logits_RBT=gate)
        optimizer.zero_grad()
        PonderObjective(beta=1.0, rate=0.3).loss(terms).backward()
        optimizer.step()
    learned = exit_log_pdf(gate).exp().flatten().detach()
    torch.testing.assert_close(learned, readout.geometric_log_prior(0.3, 8).exp().float(), rtol=0, atol=1e-2)

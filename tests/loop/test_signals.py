"""Signals added at every iteration, alone and inside a loop. Shapes: B rows, T tokens, D width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loopwise.loop.execute import Visit, execute
from loopwise.loop.passes import LoopModule, Passes
from loopwise.loop.signals import LearnedPositionsConfig
from loopwise.plan.plans import Plan


def positions(num_positions=6, width=4):
    torch.manual_seed(0)
    return LearnedPositionsConfig(num_positions=num_positions).build(width)


def test_positions_are_looked_up_whatever_the_iteration():
    signal = positions()
    ids_BT = torch.tensor([[0, 3], [5, 2]])
    for iteration in (0, 9):
        rows = signal(torch.zeros(2, 2, 4), iteration, ids_BT)
        assert torch.equal(rows, torch.stack([signal.table.weight[row] for row in ids_BT]))


def test_a_position_past_the_table_is_refused():
    with pytest.raises(ValueError, match="position 6 is past the 6"):
        positions()(torch.zeros(1, 1, 4), 0, torch.tensor([[6]]))
    with pytest.raises(ValueError, match="signal.positions: num_positions=0"):
        LearnedPositionsConfig(num_positions=0)


@pytest.mark.parametrize("given", [False, True])
def test_a_loop_adds_them_at_every_iteration_to_the_tokens_of_the_visit(given):
    """Against the loop written out: s <- 2 (s + positions), of which one visit takes some rows and tokens only."""
    signal, plan = positions(), Plan.parse("core:(0)x3")
    passes = Passes(plan, {"core": LoopModule(signal=signal)})
    ids_BT = torch.tensor([[1, 2, 3], [0, 1, 5]]) if given else torch.arange(3).expand(2, -1)
    passes.position_ids = ids_BT if given else None
    state_BTD = torch.randn(2, 3, 4)
    rows, columns = torch.tensor([1]), torch.tensor([0, 2])

    visits = [Visit(slot=slot) for slot in plan.slots]
    visits[1] = Visit(slot=plan.slots[1], rows=rows, positions=columns)

    def run(visit, part_btD):
        part_btD = 2 * passes.begin(visit, part_btD, 2, 3)
        return passes.end(visit, part_btD, 2, 3)

    wanted = state_BTD.clone()
    for taken in (
        torch.ones(2, 3, dtype=torch.bool),
        torch.tensor([[0, 0, 0], [1, 0, 1]]).bool(),
        torch.ones(2, 3).bool(),
    ):
        for b in range(2):
            for t in range(3):
                if taken[b, t]:
                    wanted[b, t] = 2 * (wanted[b, t] + signal.table.weight[ids_BT[b, t]])
    ours = execute(state_BTD, visits, run)
    torch.testing.assert_close(ours, wanted)
    ours.sum().backward()
    assert isinstance(signal, nn.Module) and signal.table.weight.grad.abs().sum() > 0

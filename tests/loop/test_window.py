"""The gradient window against loops written out with gradients switched off by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loopwise.loop.boundary import turns_of
from loopwise.loop.execute import Visit, execute
from loopwise.loop.passes import LoopModule, Passes
from loopwise.loop.update import AddConfig
from loopwise.loop.window import GradientWindow
from loopwise.plan.plans import Plan

PLAN = Plan.parse("0 cycle:(low:(1)x3 high:(2))x2 3")


def kept(plan: Plan, last: dict) -> list[int]:
    """Numbers of the visits that carry a gradient."""
    window = GradientWindow(plan, last)
    state = torch.zeros(1, 1, 1)
    return [i for i, slot in enumerate(plan.slots) if window.before(Visit(slot=slot), state).with_grad]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"cycle": 1}, [0, 5, 6, 7, 8, 9]),
        ({"cycle": 1, "low": 1}, [0, 7, 8, 9]),
        ({"low": 2}, [0, 2, 3, 4, 6, 7, 8, 9]),
        ({"low": 0}, [0, 4, 8, 9]),
        ({"cycle": 0}, [0, 9]),
        ({"low": 7}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"low": [1, 2]}, [0, 3, 4, 6, 7, 8, 9]),
        ({"low": [2]}, [0, 2, 3, 4, 6, 7, 8, 9]),
        ({"low": [3, 0, 1]}, [0, 4, 7, 8, 9]),
        ({"low": [0, 3], "high": [0, 1]}, [0, 5, 6, 7, 8, 9]),
    ],
)
def test_which_visits_carry_a_gradient(last: dict, expected: list[int]) -> None:
    assert kept(PLAN, last) == expected


def test_a_sequence_is_read_from_its_end() -> None:
    """So that a window that was written for some number of cycles goes with another."""
    assert kept(Plan.parse("cycle:(low:(0)x2)x3"), {"low": [1, 2]}) == [1, 3, 4, 5]
    assert kept(Plan.parse("cycle:(low:(0)x2)x1"), {"low": [1, 2]}) == [0, 1]


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({"lwo": 1}, "no loop 'lwo'"),
        ({"low": -1}, "-1"),
        ({"low": 1.5}, "1.5"),
        ({"low": True}, "True"),
        ({"low": [1, "2"]}, "'2'"),
        ({"low": []}, r"\[\]"),
        ({"cycle": [1, 2]}, "no loop around it"),
    ],
)
def test_bad_windows_are_refused(last: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GradientWindow(PLAN, last)


@pytest.mark.parametrize("last", [{}, {"cycle": 1}, {"cycle": 1, "low": 1}, {"low": [0, 2]}])
def test_gradients_equal_those_of_loops_by_hand(last: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 4, generator=generator).double().mul(0.5).requires_grad_() for _ in range(4)]
    start = torch.randn(2, 3, 4, generator=generator).double()

    def run(visit: Visit, part: torch.Tensor) -> torch.Tensor:
        return torch.tanh(part @ weights[visit.slot.layer])

    visits = [Visit(slot=slot) for slot in PLAN.slots]
    result = execute(start, visits, run, [GradientWindow(PLAN, last)])
    carrying, by_hand = set(kept(PLAN, last)), start
    for i, layer in enumerate(PLAN.layers):
        with torch.set_grad_enabled(i in carrying):
            by_hand = torch.tanh(by_hand @ weights[layer])
    assert torch.equal(result, by_hand)
    found, expected = (torch.autograd.grad(value.sum(), weights, allow_unused=True) for value in (result, by_hand))
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)


def played(plan: Plan, modules: dict[str, nn.Module], state: torch.Tensor, weight: torch.Tensor, **options) -> Passes:
    passes = Passes(plan, modules, **options)
    assert turns_of(plan)

    def run(visit: Visit, part: torch.Tensor) -> torch.Tensor:
        part = passes.begin(visit, part, *state.shape[:2])
        return passes.end(visit, torch.tanh(part @ weight), *state.shape[:2])

    passes.result = execute(state, [Visit(slot=slot) for slot in plan.slots], run, passes.hooks)
    return passes


def test_what_re_enters_keeps_its_gradient() -> None:
    """The entry norm runs at the first iteration, which has none; later ones still train it and what came before."""
    plan = Plan.parse("core:(0)x4")
    weight = torch.eye(3, dtype=torch.float64) * 0.3
    for grad, trained in ((1, True), (0, False)):
        entry = nn.Linear(3, 3, bias=False).double()
        state = torch.ones(1, 2, 3, dtype=torch.float64, requires_grad=True)
        modules = {"core": LoopModule(update=AddConfig().build(3), entry=entry, grad=grad)}
        result = played(plan, modules, state, weight).result
        assert result.requires_grad is trained
        if trained:
            state_grad, entry_grad = torch.autograd.grad(result.sum(), [state, entry.weight])
            assert state_grad.abs().min() > 0 and entry_grad.abs().min() > 0


def test_a_window_of_the_call_replaces_that_of_the_loop() -> None:
    plan = Plan.parse("core:(0)x4")
    state = torch.ones(1, 2, 3, requires_grad=True)
    modules = {"core": LoopModule(grad=0)}
    assert not played(plan, modules, state, torch.eye(3)).result.requires_grad
    assert played(plan, modules, state, torch.eye(3), window={"core": 4}).result.requires_grad


def test_nothing_is_switched_on_without_gradients() -> None:
    state = torch.ones(1, 2, 3, requires_grad=True)
    entry = nn.Linear(3, 3)
    with torch.no_grad():
        passes = played(Plan.parse("core:(0)x4"), {"core": LoopModule(entry=entry, grad=1)}, state, torch.eye(3))
    assert not passes.result.requires_grad

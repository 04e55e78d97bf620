"""Routers while a plan is played, on states and layers of a few numbers. Shapes: B rows, T tokens, D width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loopwise.loop.execute import Visit, execute, gather
from loopwise.loop.passes import LoopModule, Passes
from loopwise.loop.route import ExpertChoice, TokenChoice
from loopwise.loop.routing import Routing
from loopwise.plan import Plan

WIDTH = 4


def routed(config, num_iterations, seed=0):
    module = LoopModule(route=config.build(WIDTH, num_iterations).double())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        [torch.nn.init.normal_(parameter) for parameter in module.parameters()]
    return module


def states(batch=3, tokens=7, seed=1):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def play(plan, modules, state_BTD, layer=lambda x: torch.tanh(x) + 1, **options):
    """The last state, what was visited (slot, number of tokens), and the routing."""
    seen = []

    def run(visit, part_btD):
        seen.append((visit.slot.key, part_btD.shape[:2].numel()))
        return layer(part_btD)

    hook = Routing(plan, modules, **options)
    state_BTD = execute(state_BTD, [Visit(slot=slot) for slot in plan.slots], run, [hook])
    return state_BTD, seen, hook


@pytest.mark.parametrize("select", ["top", "threshold"])
def test_expert_choice_writes_only_what_was_chosen(select):
    plan, x = Plan.parse("core:(0-1)x3"), states()
    module = routed(ExpertChoice(alpha=0.5), 3)
    got, seen, hook = play(plan, {"core": module}, x, select=select, collect="core")
    active = None
    for i in range(3):
        selection = module.route(x, i, candidates_BT=active, select=select)
        active = selection.active_BT
        block = torch.tanh(torch.tanh(x) + 1) + 1
        x = torch.where(active[..., None], x + selection.weights_BT[..., None] * block, x)
        assert torch.equal(hook.states[i], x) and torch.equal(hook.routes[i].active_BT, active)
    assert torch.equal(got, x)
    counts = [int(route.active_BT.sum()) for route in hook.routes]
    assert sum(count for _, count in seen) == 2 * sum(counts) < 2 * 3 * 21
    assert hook.looks_ahead == (select == "top")


def test_token_choice_adds_once_at_the_end():
    plan, x = Plan.parse("core:(0)x3"), states()
    module = routed(TokenChoice(), 3)
    got, seen, hook = play(plan, {"core": module}, x)
    choice, inner = module.route(x), x
    for i in range(3):
        inner = torch.where((choice.depth_BT >= i)[..., None], torch.tanh(inner) + 1, inner)
    torch.testing.assert_close(got, x + choice.weights_BT[..., None] * inner)
    assert sum(count for _, count in seen) == int((choice.depth_BT + 1).sum())
    assert not hook.looks_ahead


def test_loops_that_follow_are_further_iterations():
    x, module = states(), routed(ExpertChoice(), 3)
    chain = {"a": module, "b": LoopModule(follows="a"), "c": LoopModule(follows="a")}
    one, seen_one, _ = play(Plan.parse("core:(0)x3"), {"core": module}, x)
    many, seen_many, _ = play(Plan.parse("a:(0)x1 b:(1)x1 c:(2)x1"), chain, x)
    assert torch.equal(one, many) and [n for _, n in seen_one] == [n for _, n in seen_many]
    token = routed(TokenChoice(), 3)
    one, _, _ = play(Plan.parse("core:(0)x3"), {"core": token}, x)
    many, _, _ = play(Plan.parse("a:(0)x2 b:(1)x1"), {"a": token, "b": LoopModule(follows="a")}, x)
    assert torch.equal(one, many)


def test_a_loop_around_starts_the_choice_anew():
    x, module = states(), routed(ExpertChoice(alpha=0.5), 2)
    inner, _, _ = play(Plan.parse("core:(0)x2"), {"core": module}, x)
    want, _, _ = play(Plan.parse("core:(0)x2"), {"core": module}, inner)
    got, _, hook = play(Plan.parse("(core:(0)x2)x2"), {"core": module}, x)
    assert torch.equal(got, want) and len(hook.routes) == 4


def test_nobody_chosen_is_nobody_visited():
    plan, x = Plan.parse("core:(0)x2 1"), states()
    module = routed(ExpertChoice(threshold=1 - 1e-12), 2)
    got, seen, hook = play(plan, {"core": module}, x, select="threshold", collect="core")
    assert not any(route.active_BT.any() for route in hook.routes)
    assert [n for _, n in seen] == [21] and torch.equal(hook.states[1], x)
    assert torch.equal(got, torch.tanh(x) + 1)


def test_padding_is_never_chosen_and_fractions_are_of_the_rest():
    plan, x = Plan.parse("core:(0)x2"), states()
    module = routed(ExpertChoice(capacities=(1.0, 0.5)), 2)
    hook = Routing(plan, {"core": module})
    hook.tokens_BT = torch.ones(3, 7, dtype=torch.bool)
    hook.tokens_BT[1, :3] = False
    got = execute(x, [Visit(slot=slot) for slot in plan.slots], lambda visit, part: torch.tanh(part) + 1, [hook])
    assert [route.active_BT.sum(1).tolist() for route in hook.routes] == [[7, 4, 7], [3, 2, 3]]
    assert torch.equal(got[1, :3], x[1, :3])
    alone, _, _ = play(plan, {"core": module}, x[1:2, 3:])
    torch.testing.assert_close(got[1:2, 3:], alone)


def test_gradients_flow_through_parts():
    plan, x = Plan.parse("core:(0)x2"), states(batch=3, tokens=5).requires_grad_()
    module = routed(ExpertChoice(alpha=1.0), 2)
    assert len({int(n) for n in module.route(x, 0, select="threshold").active_BT.sum(1)}) > 1
    assert torch.autograd.gradcheck(lambda x: play(plan, {"core": module}, x, select="threshold")[0], (x,))


def test_training_terms():
    x, expert = states(), routed(ExpertChoice(aux_weight=0.5, z_weight=0.25), 2)
    _, _, hook = play(Plan.parse("core:(0)x2"), {"core": expert}, x)
    want = 0.0
    for route in hook.routes:
        scores, active = route.scores_BT[route.candidates_BT], route.active_BT[route.candidates_BT].double()
        want += 0.5 * torch.nn.functional.binary_cross_entropy_with_logits(scores, active)
        want += 0.25 * scores.square().mean()
    torch.testing.assert_close(hook.loss(), want)
    token = routed(TokenChoice(balance_weight=2.0, z_weight=0.1), 2)
    _, _, hook = play(Plan.parse("core:(0)x2"), {"core": token}, x)
    choice = hook.routes[0]
    share = torch.stack([(choice.depth_BT == i).double().mean() for i in range(2)])
    balance = 2 * (choice.logits_BTR.softmax(-1).mean((0, 1)) * share).sum()
    torch.testing.assert_close(hook.loss(), 2.0 * balance + 0.1 * choice.logits_BTR.logsumexp(-1).square().mean())


def test_what_is_refused():
    module = routed(ExpertChoice(), 2)
    with pytest.raises(ValueError, match="loop 'core' has routers for 2 iterations and is to run 3"):
        Routing(Plan.parse("core:(0)x3"), {"core": module})
    with pytest.raises(ValueError, match="select='best'"):
        Routing(Plan.parse("core:(0)x2"), {"core": module}, select="best")
    with pytest.raises(ValueError, match="loop 'outer' has components and stands around"):
        Routing(Plan.parse("outer:(core:(0)x2)x2"), {"core": module, "outer": LoopModule()})
    passes = Passes(Plan.parse("core:(0)x2"), {"core": module})
    passes.route_tokens(None, 4, 0)
    with pytest.raises(ValueError, match="select='threshold'"):
        passes.route_tokens(None, 1, 4)


class Split:
    """A hook that divides visits."""

    def __init__(self, *parts):
        self.parts = parts

    def before(self, visit, state_BTD):
        return replace(visit, parts=tuple(replace(part, slot=visit.slot) for part in self.parts))

    def after(self, visit, before_BTD, state_BTD):
        self.ended = visit
        return state_BTD


def test_a_divided_visit_is_its_parts():
    slot = Plan.parse("0").slots[0]
    first = Visit(slot=slot, rows=torch.tensor([0, 2]), positions=torch.tensor([[0, 3], [1, 2]]))
    second = Visit(slot=slot, rows=torch.tensor([1]), positions=torch.tensor([[4]]))
    x, seen = states(), []

    def run(visit, part_btD):
        seen.append(part_btD.shape)
        return part_btD + 10

    hook = Split(first, second)
    got = execute(x, [Visit(slot=slot)], run, [hook])
    changed = torch.zeros(3, 7, dtype=torch.bool)
    changed[0, [0, 3]] = changed[2, [1, 2]] = changed[1, 4] = True
    assert torch.equal(got, torch.where(changed[..., None], x + 10, x))
    assert seen == [(2, 2, WIDTH), (1, 1, WIDTH)] and hook.ended.is_partial
    assert torch.equal(gather(got, second), x[1:2, 4:5] + 10)
    assert torch.equal(execute(x, [Visit(slot=slot)], run, [Split()]), x)


def test_a_divided_visit_is_not_narrowed_besides():
    slot = Plan.parse("0").slots[0]
    with pytest.raises(ValueError, match="narrow its parts"):
        replace(Visit(slot=slot, parts=()), rows=torch.tensor([0]))

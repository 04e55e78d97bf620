"""Token routing against loops over rows and tokens. Shapes: B rows, T tokens, D width, R iterations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loopwise.loop.route import (
    ExpertChoice,
    TokenChoice,
    auxiliary_loss,
    balance_loss,
    capacity_count,
    combine,
    top_tokens,
    z_loss,
)

GOLDEN = Path(__file__).parents[3] / "shared" / "goldens" / "mor_expert"


def states(batch=3, tokens=9, width=4, seed=0):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routers(config, width=4, num_iterations=3):
    built = config.build(width, num_iterations).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return built


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def best(scores, candidates, count):
    """Indices of the best candidates of one row, ascending."""
    ranked = sorted((-scores[t], t) for t in range(len(scores)) if candidates[t])
    return sorted(t for _, t in ranked[:count])


@pytest.mark.parametrize(
    ("capacity", "tokens", "want"),
    [(1.0, 12, 12), (0.667, 12, 8), (0.334, 12, 4), (0.1, 5, 1), (0.5, 1, 1), (2 / 3, 9, 6)],
)
def test_the_number_of_tokens_is_of_the_full_length(capacity, tokens, want):
    assert capacity_count(capacity, tokens) == want


@given(st.data(), st.integers(1, 10), st.integers(1, 4))
@settings(max_examples=60)
def test_top_tokens_are_the_best_and_the_earlier_of_equals(data, tokens, levels):
    scores = data.draw(st.lists(st.integers(0, levels), min_size=tokens, max_size=tokens))
    candidates = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any))
    count = data.draw(st.integers(1, sum(candidates)))
    chosen = top_tokens(torch.tensor([scores]).float(), torch.tensor([candidates]), count)
    assert chosen.nonzero()[:, 1].tolist() == best(scores, candidates, count)


def test_expert_choice_is_hierarchical():
    config = ExpertChoice(capacities=(0.8, 0.5, 0.3), alpha=0.3, temperature=2.0)
    built, active = routers(config), None
    for iteration, count in enumerate((7, 4, 2)):
        state = states(seed=iteration)
        selection = built(state, iteration, candidates_BT=active)
        before = torch.ones(3, 9, dtype=torch.bool) if active is None else active
        for b in range(3):
            scores = [
                sum((w * x / 2).item() for w, x in zip(built.routers[iteration].weight[0], row, strict=True))
                for row in state[b]
            ]
            want = best(scores, before[b].tolist(), count)
            assert selection.positions[b].tolist() == want
            gates = [0.3 * sigmoid(scores[t]) for t in want]
            assert selection.weights[b].tolist() == pytest.approx(gates)
            kept = selection.scores_BT[b][before[b]].tolist()
            assert kept == pytest.approx([s for t, s in enumerate(scores) if before[b, t]])
        assert not (selection.active_BT & ~before).any() and selection.scores_BT[~before].isnan().all()
        assert not selection.weights_BT[~selection.active_BT].any()
        active = selection.active_BT


def test_default_capacities_fall_evenly():
    config = ExpertChoice()
    assert [config.capacity(i, 4) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="must be 3 numbers"):
        ExpertChoice(capacities=(1.0, 0.5)).build(4, 3)


def test_combine_adds_the_weighted_block_to_selected_tokens_only():
    built, x = routers(ExpertChoice(capacities=(0.5,)), num_iterations=1), states()
    selection = built(x, 0)
    after = torch.where(selection.active_BT[..., None], torch.tanh(x), torch.nan)
    out = combine(x, after, selection)
    for b in range(3):
        for t in range(9):
            weight = 0.1 * sigmoid(selection.scores_BT[b, t].item())
            want = x[b, t] + weight * torch.tanh(x[b, t]) if selection.active_BT[b, t] else x[b, t]
            torch.testing.assert_close(out[b, t], want)


def test_gradients_reach_the_router_through_weights_and_auxiliary_loss():
    built, x = routers(ExpertChoice(capacities=(0.5,)), num_iterations=1), states().requires_grad_()
    weight = built.routers[0].weight

    def loss(x, weight):
        selection = torch.func.functional_call(built, {"routers.0.weight": weight}, (x, 0))
        return combine(x, torch.tanh(x), selection).sum(), auxiliary_loss(selection)

    assert torch.autograd.gradcheck(loss, (x, weight.detach().requires_grad_()))


def test_auxiliary_loss_is_the_cross_entropy_of_raw_scores():
    config = ExpertChoice(capacities=(0.8, 0.4))
    built = routers(config, num_iterations=2)
    first = built(states(), 0)
    second = built(states(seed=1), 1, candidates_BT=first.active_BT)
    terms = []
    for b in range(3):
        for t in range(9):
            if first.active_BT[b, t]:
                p = sigmoid(second.scores_BT[b, t].item())
                terms.append(-math.log(p if second.active_BT[b, t] else 1 - p))
    assert auxiliary_loss(second).item() == pytest.approx(sum(terms) / len(terms))
    assert len(terms) == 3 * 7


def route_all(built, x, select):
    """Three iterations with a causal block (a running mean), returning the last state."""
    active = None
    for iteration in range(3):
        selection = built(x, iteration, candidates_BT=active, select=select)
        active = selection.active_BT
        mask = active[..., None].to(x)
        block = torch.tanh((x * mask).cumsum(1) / mask.cumsum(1).clamp(min=1))
        x = combine(x, block, selection)
    return x


def changed_before_the_last(select):
    """In how many of 40 trials a change of the last token changes an earlier output."""
    built, trials = routers(ExpertChoice(capacities=(1.0, 0.667, 0.334), alpha=1.0)), 0
    for seed in range(40):
        x = states(batch=1, seed=seed)
        other = x.clone()
        other[:, -1] = states(batch=1, seed=1000 + seed)[:, -1]
        trials += not torch.equal(route_all(built, x, select)[:, :-1], route_all(built, other, select)[:, :-1])
    return trials


def test_threshold_is_causal_and_top_is_not():
    assert changed_before_the_last("threshold") == 0
    assert changed_before_the_last("top") > 10


def test_threshold_compares_each_candidate_alone():
    config = ExpertChoice(threshold=0.6)
    built, x = routers(config, num_iterations=1), states()
    candidates = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    selection = built(x, 0, candidates_BT=candidates, select="threshold")
    for b in range(3):
        for t in range(9):
            score = (built.routers[0].weight[0] * x[b, t]).sum().item()
            assert selection.active_BT[b, t].item() == (candidates[b, t].item() and sigmoid(score) > 0.6)


def test_rows_of_different_counts_come_in_groups():
    selection = routers(ExpertChoice(), num_iterations=1)(states(batch=6), 0, select="threshold")
    counts = selection.active_BT.sum(1)
    assert counts.unique().numel() > 1
    with pytest.raises(ValueError, match="different numbers of tokens .*; iterate over groups"):
        _ = selection.positions
    rebuilt = torch.zeros_like(selection.active_BT)
    for rows, positions in selection.groups():
        assert positions.shape == (len(rows), counts[rows[0]]) and (positions.diff(dim=1) > 0).all()
        rebuilt[rows[:, None], positions] = True
    assert torch.equal(rebuilt, selection.active_BT)


def test_padding_is_never_selected_and_too_much_of_it_is_refused():
    built, x = routers(ExpertChoice(capacities=(0.5,)), num_iterations=1), states()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :5] = False
    assert not (built(x, 0, candidates_BT=mask).active_BT & ~mask).any()
    mask[1, :6] = False
    with pytest.raises(ValueError, match="row 1 has 3 candidates, fewer than the 4 to select"):
        built(x, 0, candidates_BT=mask)


def test_token_choice_takes_the_most_probable_depth():
    built, x = routers(TokenChoice(alpha=0.7, temperature=2.0)), states()
    choice = built(x)
    for b in range(3):
        for t in range(9):
            logits = (built.router.weight @ x[b, t] / 2).tolist()
            probabilities = [math.exp(z) / sum(math.exp(y) for y in logits) for z in logits]
            assert choice.depth_BT[b, t] == probabilities.index(max(probabilities))
            assert choice.weights_BT[b, t].item() == pytest.approx(0.7 * max(probabilities))
    assert choice.counts.tolist() == [(choice.depth_BT == i).sum().item() for i in range(3)]


def test_a_token_runs_up_to_its_depth_and_is_weighted_once():
    built, start = routers(TokenChoice()), states()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :2] = False
    choice, x = built(start, mask_BT=mask), start
    for iteration in range(3):
        active = choice.selection(iteration).active_BT
        assert torch.equal(active, mask & (choice.depth_BT >= iteration))
        x = torch.where(active[..., None], torch.sin(x) + iteration, x)
    out = choice.finish(start, x)
    for b in range(3):
        for t in range(9):
            want, run = start[b, t], start[b, t]
            if mask[b, t]:
                for iteration in range(choice.depth_BT[b, t] + 1):
                    run = torch.sin(run) + iteration
                want = want + choice.weights_BT[b, t] * run
            torch.testing.assert_close(out[b, t], want)


def test_token_choice_is_causal():
    built, x = routers(TokenChoice()), states()
    other = x.clone()
    other[:, -1] += 5
    assert torch.equal(built(x).depth_BT[:, :-1], built(other).depth_BT[:, :-1])


def test_balance_and_z_losses():
    built, x = routers(TokenChoice()), states()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[2, 4:] = False
    choice = built(x, mask_BT=mask)
    chosen = [(b, t) for b in range(3) for t in range(9) if mask[b, t]]
    p, f, z = [0.0] * 3, [0.0] * 3, 0.0
    for b, t in chosen:
        logits = choice.logits_BTR[b, t].tolist()
        total = sum(math.exp(v) for v in logits)
        for i in range(3):
            p[i] += math.exp(logits[i]) / total / len(chosen)
        f[logits.index(max(logits))] += 1 / len(chosen)
        z += math.log(total) ** 2 / len(chosen)
    assert balance_loss(choice).item() == pytest.approx(3 * sum(a * b for a, b in zip(p, f, strict=True)))
    assert z_loss(choice).item() == pytest.approx(z)
    gradient = torch.autograd.grad(balance_loss(choice), built.router.weight)[0]
    assert gradient.abs().max() > 1e-4, "the balance loss must move the router"


def test_the_balance_loss_is_one_when_depths_are_used_evenly():
    built = routers(TokenChoice(), width=3)
    with torch.no_grad():
        built.router.weight.copy_(torch.eye(3))
    x = 1e-9 * torch.eye(3, dtype=torch.float64)[None]
    assert balance_loss(built(x)).item() == pytest.approx(1.0)


def test_a_bias_moves_the_choice_and_not_the_weight():
    built, x = routers(TokenChoice(balancing="loss_free", bias_step=0.01)), states(batch=8, tokens=50)
    before = built(x)
    imbalance = (before.counts / before.counts.sum() - 1 / 3).abs().max()
    for _ in range(200):
        built.update_bias(built(x).counts)
    after = built(x)
    assert (after.counts / after.counts.sum() - 1 / 3).abs().max() < 0.1 * imbalance
    probabilities = after.logits_BTR.softmax(-1)
    torch.testing.assert_close(after.weights_BT, probabilities.gather(-1, after.depth_BT[..., None]).squeeze(-1))
    assert "router_bias" in built.state_dict() and not built.router_bias.requires_grad


def test_one_bias_step_is_up_for_rare_depths():
    built = routers(TokenChoice(balancing="loss_free", bias_step=0.5))
    built.update_bias(torch.tensor([1, 2, 3]))
    assert built.router_bias.tolist() == [0.5, 0.0, -0.5]
    with pytest.raises(ValueError, match="update_bias needs balancing='loss_free', not 'loss'"):
        routers(TokenChoice()).update_bias(torch.tensor([1, 2, 3]))


@pytest.mark.skipif(not GOLDEN.exists(), reason="the reference outputs are not here")
@pytest.mark.parametrize("run", ["cap_full", "cap_hier"])
def test_published_expert_routers_choose_the_same_tokens(run):
    import json

    from safetensors.torch import load_file

    golden, weights = load_file(GOLDEN / "expected.safetensors"), load_file(GOLDEN / "model.safetensors")
    settings = json.loads((GOLDEN / "config.json").read_text())
    capacities = tuple(map(float, settings["capacity_full" if run == "cap_full" else "capacity_hier"].split(",")))
    built = ExpertChoice(capacities=capacities, alpha=settings["cfg"]["mor"]["expert"]["alpha"]).build(32, 3)
    with torch.no_grad():
        for iteration, router in enumerate(built.routers):
            router.weight.copy_(weights[f"model.layers.{iteration + 1}.mor_router.router.weight"])
    # the input of the first router is not among the outputs, those of the others are
    selected = golden[f"selected_tokens_depth0_{run}"]
    active = torch.zeros(2, 12, dtype=torch.bool).scatter(1, selected, True)
    for iteration in (1, 2):
        before, after = (golden[f"hidden_after_depth{i}_{run}"] for i in (iteration - 1, iteration))
        selection = built(before, iteration, candidates_BT=active)
        raw = golden[f"router_logits_depth{iteration}_{run}"]
        torch.testing.assert_close(selection.scores_BT[active].view(2, -1), raw, rtol=0, atol=2e-5)
        assert torch.equal(selection.positions, golden[f"selected_tokens_depth{iteration}_{run}"])
        # tokens that are not selected keep their state exactly
        assert torch.equal(before[~selection.active_BT], after[~selection.active_BT])
        assert not torch.equal(before, after)
        active = selection.active_BT

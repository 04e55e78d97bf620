"""Gates and stopping distributions. Shapes: B rows, T tokens, R iterations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopwise.loop.halting import (
    FixedHalting,
    Gate,
    HazardHalting,
    PonderHalting,
    cdf_exit,
    exit_log_pdf,
    exit_pdf,
    take_exit,
)

GOLDEN = Path(__file__).parents[3] / "shared" / "goldens" / "ouro"
PROBABILITIES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)


def pdf_oracle(lambdas):
    """The stopping distribution of one token, in Python floats."""
    pdf, survival = [], 1.0
    for lam in lambdas[:-1]:
        pdf.append(lam * survival)
        survival *= 1 - lam
    return [*pdf, survival]


def column(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1)


@given(PROBABILITIES)
def test_mass_is_one(lambdas):
    pdf_R = exit_pdf(column(lambdas)).flatten()
    assert abs(pdf_R.sum().item() - 1) < 1e-6 and (pdf_R >= 0).all()
    torch.testing.assert_close(
        pdf_R.double(), torch.tensor(pdf_oracle(lambdas), dtype=torch.float64), rtol=1e-5, atol=1e-7
    )


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=12))
def test_the_logarithm_is_finite_and_sums_to_one_where_gates_saturate(logits):
    logits_R = column(logits).requires_grad_()
    log_pdf_R = exit_log_pdf(logits_R)
    assert log_pdf_R.isfinite().all()
    assert abs(log_pdf_R.exp().sum().item() - 1) < 1e-5
    (log_pdf_R.exp() * log_pdf_R).sum().backward()
    assert logits_R.grad.isfinite().all()


def test_the_logarithm_is_that_of_the_distribution_with_its_gradients():
    logits = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(exit_log_pdf(logits).exp(), exit_pdf(torch.sigmoid(logits)))
    assert torch.autograd.gradcheck(exit_log_pdf, logits)
    assert torch.autograd.gradcheck(lambda z: exit_pdf(torch.sigmoid(z)), logits)


@given(PROBABILITIES, st.floats(0, 1))
def test_exit_is_the_first_iteration_whose_cdf_reaches_the_threshold(lambdas, threshold):
    exit_BT = cdf_exit(column(lambdas, torch.float64), threshold)
    survival, want = 1.0, len(lambdas) - 1
    for iteration, lam in enumerate(lambdas[:-1]):
        survival *= 1 - lam
        if threshold < 1 and survival <= 1 - threshold:
            want = iteration
            break
    assert exit_BT.item() == want


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=50))
def test_threshold_one_never_exits_early(lambdas):
    # gates of exactly 1 make the summed probability reach 1 at once, and rounding can make it exceed 1
    for values in (lambdas, [1.0] * len(lambdas), [1 / 3] * len(lambdas)):
        assert cdf_exit(column(values), 1.0).item() == len(values) - 1
        assert cdf_exit(column(values), 0.0).item() == 0


def test_halted_tokens_stay_halted_and_are_not_read():
    rule = HazardHalting(threshold=0.5)
    state = rule.start(torch.ones(1, 3, dtype=torch.bool))
    state = rule.step(state, torch.tensor([[0.6, 0.3, 0.0]]))
    assert state.halted_BT.tolist() == [[True, False, False]] and not state.all_halted
    state = rule.step(state, torch.tensor([[float("nan"), 0.3, 0.0]]))
    assert state.halted_BT.tolist() == [[True, True, False]]
    assert state.survival_BT[0, 0] == pytest.approx(0.4) and state.survival_BT.isfinite().all()
    state = rule.step(state, torch.tensor([[float("nan"), float("nan"), 0.0]]), last=True)
    assert state.all_halted and state.n_updates_BT.tolist() == [[1, 2, 3]]


def test_a_token_does_not_depend_on_its_batch():
    lambda_RBT = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = cdf_exit(lambda_RBT, 0.7)
    for b in range(3):
        for t in range(4):
            assert cdf_exit(lambda_RBT[:, b : b + 1, t : t + 1], 0.7).item() == whole[b, t]


def test_fixed_runs_everything():
    rule = FixedHalting()
    state = rule.start(torch.zeros(2, 2))
    for iteration in range(3):
        assert not state.halted_BT.any()
        state = rule.step(state, last=iteration == 2)
    assert state.all_halted and state.n_updates_BT.tolist() == [[3, 3], [3, 3]]


def test_sampled_depths_follow_the_distribution():
    lambdas, number = [0.2, 0.5, 0.1, 0.7], 20_000
    rule, generator = PonderHalting(), torch.Generator().manual_seed(0)
    state = rule.start(torch.zeros(1, number))
    for iteration, lam in enumerate(lambdas):
        state = rule.step(state, torch.full([1, number], lam), last=iteration == 3, generator=generator)
    frequency = state.n_updates_BT.flatten().bincount(minlength=5)[1:] / number
    torch.testing.assert_close(frequency, torch.tensor(pdf_oracle(lambdas)), rtol=0, atol=0.015)


def test_missing_arguments_are_named():
    state = HazardHalting().start(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="halting.hazard: lambda_BT is missing"):
        HazardHalting().step(state)
    with pytest.raises(ValueError, match="halting.ponder: generator is None"):
        PonderHalting().step(state, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="threshold=1.5 must be from 0 to 1"):
        HazardHalting(threshold=1.5)


def test_gate_is_a_linear_layer_with_a_chosen_start():
    gate = Gate(4, bias=1.0)
    state_BTD = torch.randn(2, 3, 4)
    want = (state_BTD * gate.linear.weight).sum(-1) + 1
    torch.testing.assert_close(gate(state_BTD), want)
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {
        "linear.weight": (1, 4),
        "linear.bias": (1,),
    }


def test_values_are_taken_where_each_token_stopped():
    values = torch.arange(4 * 2 * 3 * 5).view(4, 2, 3, 5)
    exit_BT = torch.tensor([[0, 3, 1], [2, 2, 0]])
    taken = take_exit(values, exit_BT)
    for b in range(2):
        for t in range(3):
            assert torch.equal(taken[b, t], values[exit_BT[b, t], b, t])


@pytest.mark.skipif(not GOLDEN.exists(), reason="the reference outputs are not here")
def test_published_ouro_gate():
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "expected.safetensors")
    lambda_RBT = golden["gate_lambda"].permute(2, 0, 1)
    torch.testing.assert_close(exit_pdf(lambda_RBT), golden["exit_pdf"].permute(2, 0, 1), rtol=0, atol=2e-6)
    logits_RBTV = torch.stack([golden[f"logits_loop{i}"] for i in (1, 2, 3, 4)])
    for threshold in (0.5, 0.75):
        exit_BT = cdf_exit(lambda_RBT, threshold)
        assert torch.equal(exit_BT, golden[f"exit_loop_threshold_{threshold}"].long())
        assert torch.equal(take_exit(logits_RBTV, exit_BT), golden[f"logits_threshold_{threshold}"])

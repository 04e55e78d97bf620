"""Loop counts in training: distributions, gradient windows, and draws that depend on (seed, step) only."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.loop.depth import (
    CurriculumDepth,
    FixedDepth,
    LoopCount,
    LoopCounts,
    PoissonDepth,
    PoissonLogNormalDepth,
    UniformDepth,
    step_generator,
)

SAMPLERS = [
    FixedDepth(total=5, max_grad=2),
    UniformDepth(low=2, high=9, max_grad=3),
    PoissonDepth(mean=1),
    PoissonDepth(mean=8, max_grad=4),
    PoissonDepth(mean=2, reference=True),
    PoissonLogNormalDepth(mean=1),
    PoissonLogNormalDepth(mean=32, max_grad=8),
    PoissonLogNormalDepth(mean=32, max_grad=8, reference=True),
    PoissonLogNormalDepth(mean=6, sigma=0.0),
]


@given(st.integers(1, 200), st.none() | st.integers(1, 50))
def test_a_count_is_split_into_the_window_and_the_rest(total, window):
    count = LoopCount.split(total, window)
    assert count.total == total and count.grad == min(total, window or total)
    assert [count.with_grad(i) for i in range(total)] == [False] * count.no_grad + [True] * count.grad


@pytest.mark.parametrize("pair", [(0, 0), (-1, 2), (2, -1)])
def test_empty_and_negative_counts_are_refused(pair):
    with pytest.raises(ValueError, match="must be non-negative and not empty"):
        LoopCount(no_grad=pair[0], grad=pair[1])
    with pytest.raises(TypeError):
        LoopCount(4)


def draws(sampler, number, seed=0):
    return torch.tensor([sampler.sample(step, seed=seed).total for step in range(number)], dtype=torch.float64)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_realised_mean_is_the_stated_one(sampler):
    # over steps, through the hash of (seed, step), and over the rows of one draw
    rows = replace(sampler, per="sequence").sample(0, seed=1, batch=40_000)
    assert isinstance(rows, LoopCounts)
    for totals in (draws(sampler, 4000), rows.total_B.double()):
        error = max(4 * totals.std().item() / math.sqrt(len(totals)), 1e-9)
        assert abs(totals.mean().item() - sampler.expected) < error
        assert totals.min() >= 1


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if not getattr(s, "reference", False)], ids=str)
def test_the_stated_mean_is_the_configured_one(sampler):
    configured = {"FixedDepth": 5, "UniformDepth": 5.5}.get(type(sampler).__name__) or sampler.mean
    assert sampler.expected == configured


def test_huginn_code_realises_one_more_and_its_percentiles():
    sampler = PoissonLogNormalDepth(mean=32, max_grad=8, reference=True, per="sequence")
    totals = sampler.sample(0, seed=0, batch=200_000).total_B.double()
    assert totals.mean() == pytest.approx(33, abs=0.15)
    for quantile, published in ((0.05, 12), (0.5, 29), (0.95, 67)):
        assert totals.kthvalue(int(quantile * len(totals))).values == pytest.approx(published, abs=1.01)


def test_parcae_clamp_moves_the_mean_by_the_mass_at_zero():
    assert PoissonDepth(mean=2, reference=True).expected == pytest.approx(2 + math.exp(-2))
    assert PoissonDepth(mean=2).expected == 2


def test_variances_tell_the_distributions_apart():
    def variance(sampler):
        return replace(sampler, per="sequence").sample(3, seed=0, batch=100_000).total_B.double().var().item()

    assert variance(PoissonDepth(mean=9)) == pytest.approx(8, rel=0.03)
    # a Poisson of rate X has variance E X + Var X
    want = 8 + 64 * (math.exp(0.25) - 1)
    assert variance(PoissonLogNormalDepth(mean=9)) == pytest.approx(want, rel=0.05)
    assert variance(UniformDepth(low=1, high=9)) == pytest.approx(80 / 12, rel=0.03)


@given(st.integers(-5, 2**40), st.integers(0, 2**40))
@settings(max_examples=50)
def test_a_draw_is_a_function_of_seed_and_step(seed, step):
    sampler = PoissonLogNormalDepth(mean=20, max_grad=8)
    before = torch.get_rng_state()
    first = sampler.sample(step, seed=seed)
    torch.manual_seed(step % 1000)
    assert sampler.sample(step, seed=seed) == first
    torch.set_rng_state(before)


def test_steps_and_seeds_are_unrelated():
    first = draws(PoissonLogNormalDepth(mean=20), 500, seed=0)
    shifted = draws(PoissonLogNormalDepth(mean=20), 501, seed=0)[1:]
    other = draws(PoissonLogNormalDepth(mean=20), 500, seed=1)
    for pair in ((first, shifted), (first, other)):
        assert torch.corrcoef(torch.stack(pair))[0, 1].abs() < 0.15
    assert step_generator(1, 23).initial_seed() != step_generator(12, 3).initial_seed()


def test_another_process_draws_the_same():
    code = (
        "from loopwise.loop.depth import PoissonLogNormalDepth as P; s = P(mean=20, max_grad=8);"
        "print([s.sample(i, seed=7).total for i in range(5)])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str([PoissonLogNormalDepth(mean=20, max_grad=8).sample(i, seed=7).total for i in range(5)])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_rows_have_their_own_depth_and_window(sampler):
    sampler = replace(sampler, per="sequence")
    counts = sampler.sample(4, seed=0, batch=16)
    assert isinstance(counts, LoopCounts)
    assert counts.no_grad_B.dtype == counts.grad_B.dtype == counts.total_B.dtype == torch.int64
    batch = counts.batch
    runs = torch.stack([counts.active(i) for i in range(batch.total)]).long()
    assert torch.equal(runs[: batch.no_grad].sum(0), counts.no_grad_B)
    assert torch.equal(runs[batch.no_grad :].sum(0), counts.grad_B)
    for total, grad in zip(counts.total_B.tolist(), counts.grad_B.tolist(), strict=True):
        assert LoopCount.split(total, sampler.max_grad).grad == grad
    with pytest.raises(ValueError, match="per='sequence' needs the number of sequences"):
        sampler.sample(4, seed=0)


@pytest.mark.parametrize("shape", ["linear", "one_minus_sqrt"])
@pytest.mark.parametrize(
    "inner",
    [FixedDepth(total=12, max_grad=3), PoissonLogNormalDepth(mean=32, max_grad=8), UniformDepth(low=3, high=10)],
)
def test_a_curriculum_ramps_the_mean(inner, shape):
    ramp = CurriculumDepth(sampler=inner, steps=50, start=2, shape=shape)
    means = [ramp.mean_at(step) for step in range(60)]
    assert means[0] == 2 and means == sorted(means) and means[50:] == [inner.expected] * 10
    for step, mean in enumerate(means[:50]):
        progress = step / 50 if shape == "linear" else 1 - math.sqrt(1 - step / 50)
        assert mean == min(max(2, math.ceil(progress * inner.expected)), inner.expected)
        assert inner.with_mean(mean).expected == mean
    for step in (0, 20, 49, 55):
        count = ramp.sample(step, seed=0)
        want = inner.with_mean(means[step]).sample(step, seed=0) if step < 50 else inner.sample(step, seed=0)
        assert count == want and isinstance(count, LoopCount)
        assert count.grad == min(count.total, inner.max_grad or count.total)


def test_the_two_ramps_differ_as_published():
    inner = FixedDepth(total=32)
    linear, late = (CurriculumDepth(sampler=inner, steps=100, shape=shape) for shape in ("linear", "one_minus_sqrt"))
    assert (linear.mean_at(50), late.mean_at(50)) == (16, math.ceil(32 * (1 - math.sqrt(0.5))))

"""The first state of a loop. Shapes: B rows, T tokens, D width."""

from __future__ import annotations

import math

import pytest
import torch

from loopwise.loop.state import GivenState, InputState, NormalState, OnesState, ZerosState, make


def injected(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_input_is_the_injected_tensor_itself():
    e_BTD = injected(2, 3, 4).requires_grad_()
    assert make(InputState(), e_BTD) is e_BTD


@pytest.mark.parametrize(
    ("config", "value"), [(ZerosState(), 0.0), (OnesState(), 1.0), (NormalState(std=1, scale=0), 0)]
)
def test_constants(config, value):
    e_BTD = injected(2, 3, 4, dtype=torch.bfloat16)
    state_BTD = make(config, e_BTD)
    assert torch.equal(state_BTD, torch.full_like(e_BTD, value)) and state_BTD.dtype == torch.bfloat16


def test_normal_is_cut_at_three_deviations_before_the_scale():
    e_BTD = injected(10, 100, 200)
    state_BTD = make(NormalState(std=0.5, scale=4.0), e_BTD, generator=generator())
    assert 5.9 < state_BTD.abs().max() <= 6.0
    # variance of a normal cut at c: 1 - 2 c phi(c) / (2 Phi(c) - 1)
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    std = 0.5 * 4 * math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))
    assert state_BTD.std() == pytest.approx(std, rel=0.01) and abs(state_BTD.mean()) < 0.02


def test_huginn_state_has_the_published_size():
    width = 5280
    config = NormalState.like_init(width, embedding_scale=math.sqrt(width))
    assert config.std * config.scale == pytest.approx(math.sqrt(2 / 5))
    assert NormalState.like_init(width).std == pytest.approx(0.0087, abs=5e-5)


def test_a_draw_depends_on_the_generator_only():
    config, e_BTD = NormalState(std=1.0), injected(2, 3, 16)
    torch.manual_seed(0)
    first = make(config, e_BTD, generator=generator(5))
    untouched = torch.get_rng_state()
    again = make(config, e_BTD, generator=generator(5))
    assert torch.equal(first, again) and torch.equal(untouched, torch.get_rng_state())
    assert not torch.equal(first, make(config, e_BTD, generator=generator(6)))
    half = make(config, e_BTD.half(), generator=generator(5))
    assert torch.equal(half, first.half())


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("config", [GivenState(), ZerosState(), NormalState(std=1.0)])
def test_a_given_state_wins_and_carries_gradients(config, shape):
    given = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    state_BTD = make(config, injected(2, 3, 5), initial_state=given)
    assert state_BTD.shape == (2, 3, 5) and state_BTD.dtype == torch.float32
    assert torch.equal(state_BTD, given.float().expand(2, 3, 5))
    state_BTD.sum().backward()
    assert torch.equal(given.grad, torch.full(shape, 30 / given.numel(), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4,), (2, 2, 5), (1, 2, 3, 5)])
def test_a_state_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="does not broadcast to"):
        make(GivenState(), injected(2, 3, 5), initial_state=torch.zeros(shape))


def test_missing_arguments_are_named():
    with pytest.raises(ValueError, match="state.normal: generator is None"):
        make(NormalState(std=1.0), injected(1, 1, 2))
    with pytest.raises(ValueError, match="state.given: initial_state is missing"):
        make(GivenState(), injected(1, 1, 2))

"""Time conditioning. Shapes: B rows, D width, W sinusoids."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from loopwise.loop.conditioning import TimeConditionerConfig, sinusoids


def naive_sinusoids(number: float, width: int, max_period: float) -> list[float]:
    half = width // 2
    angles = [number * max_period ** (-k / half) for k in range(half)]
    return [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (width % 2)


@pytest.mark.parametrize("width", [2, 7, 256])
@pytest.mark.parametrize("max_period", [10.0, 10000.0])
def test_sinusoids(width, max_period):
    numbers = [0.0, 0.125, 0.7, 1.0]
    wanted = torch.tensor([naive_sinusoids(number, width, max_period) for number in numbers])
    torch.testing.assert_close(sinusoids(torch.tensor(numbers), width, max_period), wanted, atol=1e-6, rtol=0)


def test_conditioner_against_the_formula_with_gradients():
    torch.manual_seed(0)
    conditioner = TimeConditionerConfig(sinusoids=6, max_period=100.0).build(5)
    time, step = torch.tensor([0.2, 0.9]), torch.tensor([0.5, 0.1])
    weights = {name: p.detach().clone().requires_grad_() for name, p in conditioner.named_parameters()}

    def embed(which: str, number: float) -> torch.Tensor:
        waves = torch.tensor(naive_sinusoids(number, 6, 100.0))
        inner = weights[f"{which}.inner.weight"] @ waves + weights[f"{which}.inner.bias"]
        return weights[f"{which}.outer.weight"] @ F.silu(inner) + weights[f"{which}.outer.bias"]

    wanted = torch.stack(
        [embed("time", t) + embed("step", s) for t, s in zip(time.tolist(), step.tolist(), strict=True)]
    )
    ours = conditioner(time, step)
    torch.testing.assert_close(ours, wanted)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in conditioner.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad)


def test_numbers_without_axes_make_one_row_in_the_dtype_of_the_parameters():
    conditioner = TimeConditionerConfig(sinusoids=4).build(3).to(torch.bfloat16)
    ours = conditioner(torch.tensor(0.25), torch.tensor(0.5))
    assert ours.shape == (1, 3) and ours.dtype == torch.bfloat16


@pytest.mark.parametrize("field", ["sinusoids", "max_period"])
def test_ranges(field):
    with pytest.raises(ValueError, match=rf"conditioner.time: {field}=0"):
        TimeConditionerConfig(**{field: 0})

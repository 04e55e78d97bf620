"""Averaged weights and clipping."""

import math

import pytest
import torch
from torch import nn

from loopwise.train.optim import AdamWConfig, Ema, clip_gradients
from tests.train.optim.naive import Small


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_its_formula(warmup: bool) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    ema = Ema({"weight": parameter}, decay=0.9, warmup=warmup)
    wanted = parameter.tolist()
    for step in range(30):
        with torch.no_grad():
            parameter.add_(torch.tensor([0.5, math.sin(step)], dtype=torch.float64))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        wanted = [decay * one + (1 - decay) * other for one, other in zip(wanted, parameter.tolist(), strict=True)]
    (average,) = ema.state().values()
    torch.testing.assert_close(average, torch.tensor(wanted, dtype=torch.float64), rtol=1e-13, atol=0)


def trained(dtype: torch.dtype = torch.float32, steps: int = 5) -> tuple[Small, Ema]:
    model = Small(dtype=dtype)
    optimizer, ema = AdamWConfig(lr=0.05).build(dict(model.named_parameters())), Ema(dict(model.named_parameters()))
    for step in range(steps):
        model.loss(step).backward()
        optimizer.step()
        ema.update(step)
    return model, ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_puts_averages_in_and_brings_every_bit_back(dtype: torch.dtype) -> None:
    model, ema = trained(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    with ema.swapped():
        assert all(
            torch.equal(value, ema.state()[f"{name}/average"].to(dtype)) for name, value in model.named_parameters()
        )
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    with pytest.raises(RuntimeError, match="stop"), ema.swapped():
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places


def test_swapped_and_update_are_refused_inside_swapped() -> None:
    model, ema = trained()
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match="entered twice"), ema.swapped(), ema.swapped():
        pass
    assert torch.equal(model.lm_head.weight, before)
    with pytest.raises(ValueError, match="outside swapped"), ema.swapped():
        ema.update(5)
    ema.update(5)


def test_small_changes_of_bfloat16_weights_are_not_rounded_away() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = Ema({"weight": parameter}, decay=0.9999)
    with torch.no_grad():
        parameter.mul_(2)
    for step in range(100):
        ema.update(step)
    assert ema.state()["weight/average"].item() == pytest.approx(2 - 0.9999**100, rel=1e-4)


@pytest.mark.parametrize("split", [0, 2, 5])
def test_averages_go_on_bit_for_bit(split: int) -> None:
    _, whole = trained(steps=5)
    model, first = trained(steps=split)
    later = Ema(dict(Small(seed=4).named_parameters()))
    later.load_state({key: value.clone() for key, value in first.state().items()})
    later.parameters = dict(model.named_parameters())
    reference = Small()
    optimizer = AdamWConfig(lr=0.05).build(dict(reference.named_parameters()))
    for step in range(5):
        reference.loss(step).backward()
        optimizer.step()
        if step >= split:
            model.load_state_dict(reference.state_dict())
            later.update(step)
    assert all(torch.equal(value, whole.state()[key]) for key, value in later.state().items())


def test_what_ema_refuses() -> None:
    model = Small()
    ema = Ema(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"decay=1.0 must be above 0 and below 1"):
        Ema(dict(model.named_parameters()), decay=1.0)
    with pytest.raises(ValueError, match="no parameter to average"):
        Ema({})
    full = dict(ema.state())
    with pytest.raises(ValueError, match=r"lacks 'spare.bias/average'"):
        ema.load_state({key: value for key, value in full.items() if key != "spare.bias/average"})
    with pytest.raises(ValueError, match=r"'spare.bia/average', which is not there to be filled; did you mean"):
        ema.load_state(full | {"spare.bia/average": torch.ones(3)})
    with pytest.raises(ValueError, match=r"'spare.bias/average' has shape and dtype \(\(2,\)"):
        ema.load_state(full | {"spare.bias/average": torch.ones(2)})


def test_a_tied_parameter_is_averaged_once() -> None:
    model = Small()
    model.lm_head.weight = model.embed_tokens.weight
    ema = Ema(dict(model.named_parameters(remove_duplicate=False)))
    assert "embed_tokens.weight/average" in ema.state() and "lm_head.weight/average" not in ema.state()


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_scales_all_gradients_alike(max_norm: float) -> None:
    model = Small(dtype=torch.float64)
    model.loss(0).backward()
    before = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    wanted = math.sqrt(sum(float(number) ** 2 for value in before.values() for number in value.flatten()))
    assert clip_gradients(model) == pytest.approx(wanted, rel=1e-12)
    assert clip_gradients(list(model.parameters()), max_norm) == pytest.approx(wanted, rel=1e-12)
    factor = min(1.0, max_norm / (wanted + 1e-6))
    for name, value in model.named_parameters():
        if name in before:
            assert value.grad is not None
            torch.testing.assert_close(value.grad, before[name] * factor, rtol=1e-12, atol=0)
    assert clip_gradients(model) <= max_norm


def test_the_norm_tells_of_a_bad_gradient_and_of_none() -> None:
    model = Small()
    assert clip_gradients(model, 1.0) == 0
    model.spare.weight.grad = torch.full((3, 3), math.nan)
    assert math.isnan(clip_gradients(model, 1.0))
    with pytest.raises(ValueError, match=r"max_norm=0.0 must be above 0"):
        clip_gradients(model, 0.0)

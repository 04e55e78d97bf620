"""Every optimizer against its formula, and against what torch itself would keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loopwise.train.optim import AdamATan2Config, AdamWConfig, MuonConfig, NamedOptimizer, OptimizerConfig
from tests.train.optim import naive

STEPS = 20


def leaves(*shape: int) -> tuple[nn.Parameter, list[torch.Tensor]]:
    """A float64 parameter and a gradient per step, over several orders of magnitude."""
    source = torch.Generator().manual_seed(3)
    draw = torch.randn(STEPS + 1, *shape, generator=source, dtype=torch.float64)
    scale = 10 ** (4 * torch.rand(shape, generator=source, dtype=torch.float64) - 3)
    return nn.Parameter(draw[0].clone()), [row * scale for row in draw[1:]]


def follow(
    config: OptimizerConfig, name: str, parameter: nn.Parameter, gradients: list[torch.Tensor]
) -> NamedOptimizer:
    optimizer = config.build({name: parameter})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("name", "decay"), [("layer.weight", 0.3), ("norm.weight", 0.0)])
def test_adamw_is_its_formula(name: str, decay: float) -> None:
    parameter, gradients = leaves(2, 3)
    start = parameter.detach().flatten().tolist()
    follow(AdamWConfig(lr=0.05, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-3), name, parameter, gradients)
    rows = [gradient.flatten().tolist() for gradient in gradients]
    wanted = naive.adamw(start, rows, lr=0.05, decay=decay, beta1=0.8, beta2=0.9, eps=1e-3)
    torch.testing.assert_close(
        parameter.detach().flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("correction", ["inside", "outside"])
def test_adam_atan2_is_its_formula(correction: str) -> None:
    parameter, gradients = leaves(2, 3)
    start = parameter.detach().flatten().tolist()
    config = AdamATan2Config(lr=0.05, weight_decay=0.3, beta1=0.8, beta2=0.9, a=1.3, b=0.7, correction=correction)
    follow(config, "layer.weight", parameter, gradients)
    wanted = naive.adam_atan2(
        start,
        [gradient.flatten().tolist() for gradient in gradients],
        lr=0.05,
        decay=0.3,
        beta1=0.8,
        beta2=0.9,
        a=1.3,
        b=0.7,
        inside=correction == "inside",
    )
    torch.testing.assert_close(
        parameter.detach().flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12
    )


@settings(deadline=None, max_examples=20)
@given(exponent=st.integers(-18, 18))
def test_adam_atan2_does_not_see_the_scale_of_the_gradient(exponent: int) -> None:
    one, gradients = leaves(2, 3)
    other = nn.Parameter(one.detach().clone())
    config = AdamATan2Config(lr=0.05)
    follow(config, "layer.weight", one, gradients)
    follow(config, "layer.weight", other, [gradient * 2.0**exponent for gradient in gradients])
    assert torch.equal(one, other)


def test_the_first_step_of_adam_atan2_has_the_size_of_the_learning_rate() -> None:
    parameter, gradients = leaves(4, 4)
    before = parameter.detach().clone()
    follow(AdamATan2Config(lr=0.01, weight_decay=0.0), "layer.weight", parameter, gradients[:1])
    # 1.27 is 4 / pi to 0.3 %
    torch.testing.assert_close(
        (parameter.detach() - before).abs(), torch.full((4, 4), 0.01).double(), rtol=3e-3, atol=0
    )


def test_adam_atan2_leaves_a_parameter_alone_whose_gradient_is_zero() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    follow(AdamATan2Config(weight_decay=0.0), "layer.weight", parameter, [torch.zeros(2, 2)] * 3)
    assert torch.equal(parameter, torch.ones(2, 2))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("shape", "scale"), [((8, 3), "original"), ((3, 8), "match_rms_adamw"), ((5, 5), "original")])
def test_muon_is_its_formula(shape: tuple[int, int], scale: str, nesterov: bool) -> None:
    parameter, gradients = leaves(*shape)
    start = parameter.detach().clone()
    config = MuonConfig(lr=0.05, weight_decay=0.3, momentum=0.8, nesterov=nesterov, scale=scale)
    follow(config, "layer.weight", parameter, gradients)
    wanted = naive.muon(
        start, gradients, lr=0.05, decay=0.3, momentum=0.8, nesterov=nesterov, original=scale == "original"
    )
    # torch iterates in bfloat16
    assert (parameter.detach() - wanted).norm() < 0.03 * (wanted - start).norm()


@pytest.mark.parametrize("name", ["layer.weight", "lm_head.weight", "layer.bias"])
@pytest.mark.parametrize("config", [AdamWConfig(), AdamATan2Config(), MuonConfig()])
def test_the_state_made_early_is_what_torch_makes_at_the_first_step(config: OptimizerConfig, name: str) -> None:
    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    optimizer = config.build({name: parameter})
    early = {key.rpartition("/")[2]: (value.shape, value.dtype) for key, value in optimizer.state().items()}
    is_muon = isinstance(config, MuonConfig) and name == "layer.weight"
    own = (torch.optim.Muon if is_muon else torch.optim.AdamW)([parameter])
    parameter.grad = torch.ones_like(parameter)
    own.step()
    assert early == {key: (value.shape, value.dtype) for key, value in own.state[parameter].items()}
    keys = optimizer.state().keys()
    optimizer.step()
    assert optimizer.state().keys() == keys


def test_the_factor_of_the_schedule_multiplies_every_learning_rate() -> None:
    model = naive.Small()
    optimizer = MuonConfig(lr=0.2, adamw=AdamWConfig(lr=0.01)).build(dict(model.named_parameters()))
    assert optimizer.lrs == {"matrix": 0.2, "embedding": 0.01, "vector": 0.01, "head": 0.01}
    model.loss(0).backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.step(0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    optimizer.step(0.5)
    assert optimizer.lrs == {"matrix": 0.1, "embedding": 0.005, "vector": 0.005, "head": 0.005}
    optimizer.step(1.0)
    assert optimizer.lrs == {"matrix": 0.2, "embedding": 0.01, "vector": 0.01, "head": 0.01}

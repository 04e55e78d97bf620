"""Updates against formulas written with explicit loops. Shapes: B rows, T tokens, D width, E input width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from loopwise.loop.update import (
    AddConfig,
    ChainConfig,
    ConcatConfig,
    DampedConfig,
    DecayConfig,
    GatedConfig,
    HighwayConfig,
    ProductConfig,
    ReplaceConfig,
)

WHERE = {"iteration": 1, "num_iterations": 4}
CONFIGS = [
    ReplaceConfig(),
    AddConfig(),
    ProductConfig(),
    ConcatConfig(),
    ConcatConfig(bias=True),
    GatedConfig(bias=-0.5),
    GatedConfig(candidate="linear"),
    HighwayConfig(),
    HighwayConfig(reads=("state", "block", "input"), coupled=False),
    DampedConfig(dt=0.25),
    DampedConfig(dt=0.25, learned="scalar"),
    DampedConfig(dt=0.25, learned="channel"),
    DecayConfig(),
    ChainConfig(parts=(ConcatConfig(), DampedConfig(dt=0.5))),
]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(x))


def linear(weight, bias, x):
    zero = [0.0] * len(weight)
    offsets = zero if bias is None else bias.tolist()
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight.tolist(), offsets, strict=True)
    ]


def enter_oracle(config, module, s, e):
    """What the block reads, for one token: lists of floats."""
    match config:
        case AddConfig():
            return [a + b for a, b in zip(s, e, strict=True)]
        case ProductConfig():
            return [a * b for a, b in zip(s, e, strict=True)]
        case ConcatConfig():
            return linear(module.adapter.weight, module.adapter.bias, s + e)
        case GatedConfig():
            gate = [sigmoid(z) for z in linear(module.gate.weight, module.gate.bias, s + e)]
            c = e if config.candidate == "input" else linear(module.candidate.weight, None, e)
            return [a + g * (b - a) for a, g, b in zip(s, gate, c, strict=True)]
        case DecayConfig():
            delta = [softplus(x) for x in module.dt_bias.tolist()]
            decay = [math.exp(d * -math.exp(a)) for d, a in zip(delta, module.A_log.tolist(), strict=True)]
            write = linear(module.B, None, e)
            return [k * a + d * w for k, a, d, w in zip(decay, s, delta, write, strict=True)]
        case ChainConfig():
            for part, child in zip(config.parts, module.parts, strict=True):
                s = enter_oracle(part, child, s, e)
    return s


def leave_oracle(config, module, s, f, e):
    """The next state, for one token."""
    match config:
        case HighwayConfig():
            read = [x for name in config.reads for x in {"state": s, "block": f, "input": e}[name]]
            gate = [sigmoid(z) for z in linear(module.transform.weight, module.transform.bias, read)]
            if config.coupled:
                carry = [1 - g for g in gate]
            else:
                carry = [sigmoid(z) for z in linear(module.carry.weight, module.carry.bias, read)]
            return [a * k + b * g for a, k, b, g in zip(s, carry, f, gate, strict=True)]
        case DampedConfig():
            theta = module.theta
            dt = [config.dt] * len(s) if theta is None else [sigmoid(x) for x in theta.expand(len(s)).tolist()]
            return [(1 - d) * a + d * b for d, a, b in zip(dt, s, f, strict=True)]
        case ChainConfig():
            for part, child in zip(config.parts, module.parts, strict=True):
                f = leave_oracle(part, child, s, f, e)
    return f


def randomise(module):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module.double()


def tensors(width=3, input_width=3):
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 4, width), (2, 4, input_width), (2, 4, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def over_tokens(function, *parts):
    rows = [[function(*(p[b, t].tolist() for p in parts)) for t in range(4)] for b in range(2)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_both_sides_equal_the_formulas(config):
    s_BTD, e_BTD, f_BTD = tensors()
    module = randomise(config.build(3))
    want = over_tokens(lambda s, e: enter_oracle(config, module, s, e), s_BTD, e_BTD)
    torch.testing.assert_close(module(s_BTD, e_BTD, **WHERE), want, rtol=0, atol=1e-12)
    want = over_tokens(lambda s, f, e: leave_oracle(config, module, s, f, e), s_BTD, f_BTD, e_BTD)
    torch.testing.assert_close(module.leave(s_BTD, f_BTD, e_BTD, **WHERE), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_updates_that_do_not_read_the_iteration_do_not_depend_on_it(config):
    update, (state, e, after) = config.build(4), torch.randn(3, 2, 3, 4)
    assert not update.reads_iteration
    other = {"iteration": 3, "num_iterations": 9}
    assert torch.equal(update(state, e, **WHERE), update(state, e, **other))
    assert torch.equal(update.leave(state, after, e, **WHERE), update.leave(state, after, e, **other))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_equal_finite_differences(config):
    s_BTD, e_BTD, f_BTD = tensors()
    module = randomise(config.build(3))
    names = list(dict(module.named_parameters()))

    def iterate(s, e, f, *parameters):
        kept = dict(zip(names, parameters, strict=True))

        def both(m):
            return m.leave(s, m(s, e, **WHERE) * f, e, **WHERE)

        return torch.func.functional_call(Both(module, both), {f"module.{name}": p for name, p in kept.items()}, ())

    assert torch.autograd.gradcheck(iterate, (s_BTD, e_BTD, f_BTD, *module.parameters()))


class Both(nn.Module):
    """Calls a function of a module, so that its parameters can be replaced for the call."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self):
        return self.function(self.module)


@pytest.mark.parametrize(
    "config", [ConcatConfig(), GatedConfig(candidate="linear"), HighwayConfig(), DecayConfig(), DampedConfig()], ids=str
)
def test_an_input_of_another_width(config):
    s_BTD, e_BTD, f_BTD = tensors(3, 5)
    module = config.build(3, 5).double()
    assert module(s_BTD, e_BTD, **WHERE).shape == module.leave(s_BTD, f_BTD, e_BTD, **WHERE).shape == (2, 4, 3)


@pytest.mark.parametrize(
    "config", [AddConfig(), ProductConfig(), GatedConfig(), ConcatConfig(init="pass_input")], ids=str
)
def test_an_input_of_another_width_is_refused_where_it_cannot_be(config):
    with pytest.raises(ValueError, match="width"):
        config.build(3, 5)


def test_starting_points():
    s_BTD, e_BTD, _ = tensors()
    for init, want in (("pass_state", s_BTD), ("pass_input", e_BTD)):
        module = ConcatConfig(init=init, bias=True).build(3).double()
        assert torch.equal(module(s_BTD, e_BTD, **WHERE), want)
    weight = ConcatConfig(init="normal").build(200).adapter.weight.detach()
    assert weight.shape == (200, 400) and weight.std() == pytest.approx(0.9866 * math.sqrt(2 / 1000), rel=0.02)
    highway = HighwayConfig(coupled=False, bias=-2.0).build(3)
    assert highway.transform.bias.tolist() == [-2.0] * 3 and highway.carry.bias.tolist() == [2.0] * 3
    damped = DampedConfig(dt=0.3, learned="channel").build(3)
    assert torch.allclose(torch.sigmoid(damped.theta), torch.full([3], 0.3))


def test_decay_starts_where_parcae_does_and_cannot_blow_up():
    module = DecayConfig().build(6)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "A_log": (6,),
        "dt_bias": (6,),
        "B": (6, 6),
    }
    assert set(module.no_weight_decay) == {"A_log", "dt_bias", "B"}
    delta = torch.nn.functional.softplus(module.dt_bias)
    assert torch.allclose(delta, torch.full([6], 0.80472), atol=1e-5)
    assert torch.allclose(module(torch.ones(1, 1, 6), torch.zeros(1, 1, 6), **WHERE), torch.tensor(math.sqrt(0.2)))
    randomise(module)
    state = torch.full([1, 1, 6], 1e6, dtype=torch.float64)
    for _ in range(1000):
        state = module(state, torch.zeros_like(state), **WHERE)
    assert state.abs().max() < 1e-3


def test_limits_are_plain_looping():
    s_BTD, e_BTD, f_BTD = tensors()
    assert torch.equal(DampedConfig(dt=1.0).build(3).leave(s_BTD, f_BTD, e_BTD, **WHERE), f_BTD)
    highway = HighwayConfig(bias=40.0).build(3).double()
    nn.init.zeros_(highway.transform.weight)
    assert torch.equal(highway.leave(s_BTD, f_BTD, e_BTD, **WHERE), f_BTD)
    gated = GatedConfig(bias=-40.0).build(3).double()
    nn.init.zeros_(gated.gate.weight)
    torch.testing.assert_close(gated(s_BTD, e_BTD, **WHERE), s_BTD)

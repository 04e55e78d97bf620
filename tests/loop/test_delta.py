"""What makes iterations differ. Shapes: B rows, T tokens, D width, R iterations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from loopwise.loop.delta import EmbeddingDelta, LoraDelta, NormDelta, known_iteration, sinusoid


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return module.double()


def test_offsets_are_added_with_a_scale_of_one():
    linear, offsets = nn.Linear(5, 3).double(), randomise(LoraDelta(rank=2).build(5, 3, 4))
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    for iteration in range(4):
        merged = linear.weight + torch.einsum("or,ri->oi", offsets.B[iteration], offsets.A[iteration])
        want = nn.functional.linear(x, merged, linear.bias)
        torch.testing.assert_close(linear(x) + offsets(x, iteration), want)
        torch.testing.assert_close(linear.weight + offsets.weight(iteration), merged)


def test_offsets_start_at_exactly_zero_and_learn():
    offsets = LoraDelta(rank=2).build(5, 3, 4)
    x = torch.randn(2, 5)
    assert not offsets(x, 1).any()
    offsets(x, 1).sum().backward()
    assert offsets.B.grad[1].any() and not offsets.B.grad[[0, 2, 3]].any()


def test_a_decomposed_difference_is_reproduced():
    difference = torch.randn(3, 5, dtype=torch.float64)
    offsets = LoraDelta(rank=3).build(5, 3, 2).double()
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    with torch.no_grad():
        offsets.B[1], offsets.A[1] = u * s, v
    torch.testing.assert_close(offsets.weight(1), difference)
    assert not offsets.weight(0).any()


def test_norms_have_gains_per_iteration():
    norm = randomise(NormDelta(eps=1e-3).build(4, 3))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    for iteration in range(3):
        want = torch.empty_like(x)
        for b in range(2):
            for t in range(5):
                scale = 1 / math.sqrt(sum(v * v for v in x[b, t].tolist()) / 4 + 1e-3)
                want[b, t] = x[b, t] * scale * norm.weight[iteration]
        torch.testing.assert_close(norm(x, iteration), want)
    start = NormDelta().build(4, 3)
    reference = nn.RMSNorm(4, eps=1e-6)
    torch.testing.assert_close(start(x.float(), 2), reference(x.float()))
    assert start.bfloat16()(x.bfloat16(), 0).dtype == torch.bfloat16


def test_embeddings_are_added():
    state = torch.randn(2, 5, 4)
    learned = EmbeddingDelta(std=0.5).build(4, 3)
    assert torch.equal(learned(state, 1), state + learned.weight[1])
    waves = EmbeddingDelta(signal="sinusoid").build(4, 3)
    assert not list(waves.parameters()) and waves(state, 50).shape == state.shape
    torch.testing.assert_close(waves(state, 2) - state, sinusoid(2, 4).float().expand(2, 5, 4))


@pytest.mark.parametrize(("position", "width"), [(0, 6), (3, 6), (7, 5), (2, 2), (4, 1)])
def test_the_timing_signal_is_sines_then_cosines(position, width):
    half = width // 2
    angles = [position / 10000 ** (k / max(half - 1, 1)) for k in range(half)]
    want = [math.sin(a) for a in angles] + [math.cos(a) for a in angles] + [0.0] * (width % 2)
    assert sinusoid(position, width).tolist() == pytest.approx(want)


def test_iterations_past_the_last():
    assert [known_iteration(i, 3, "last") for i in range(6)] == [0, 1, 2, 2, 2, 2]
    assert [known_iteration(i, 3, "cycle") for i in range(6)] == [0, 1, 2, 0, 1, 2]
    for build, shape in ((LoraDelta(rank=1).build(4, 4, 3), 4), (NormDelta().build(4, 3), 4)):
        with pytest.raises(ValueError, match="iteration 3 is past the 3 that this delta knows; run fewer"):
            build(torch.zeros(1, shape), 3)
    cycling = randomise(NormDelta(beyond="cycle").build(4, 3))
    x = torch.randn(1, 1, 4, dtype=torch.float64)
    assert torch.equal(cycling(x, 4), cycling(x, 1))


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="delta.lora: rank=0 must be at least 1"):
        LoraDelta(rank=0)
    with pytest.raises(ValueError, match="beyond='wrap' must be one of"):
        NormDelta(beyond="wrap")

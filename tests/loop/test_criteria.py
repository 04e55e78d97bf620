"""Exit criteria against definitions with explicit loops. Shapes: B rows, T tokens, D width, V vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from loopwise.loop.criteria import (
    ArgmaxHalting,
    ConfidenceHalting,
    CosineHalting,
    EntropyHalting,
    KlHalting,
    LatentHalting,
    MinpKlHalting,
    SecondDifferenceHalting,
)

CRITERIA = [
    KlHalting(threshold=0.03),
    MinpKlHalting(threshold=0.03, min_p=0.5),
    EntropyHalting(threshold=0.1),
    LatentHalting(threshold=0.6),
    SecondDifferenceHalting(threshold=1.4),
    CosineHalting(threshold=0.2),
    ArgmaxHalting(patience=2),
    ConfidenceHalting(threshold=0.5),
    ConfidenceHalting(threshold=0.2, measure="gap", patience=2),
]


def softmax(x):
    total = sum(math.exp(v) for v in x)
    return [math.exp(v) / total for v in x]


def likely(x, min_p):
    kept = [v if v >= min_p * max(x) else 1 / len(x) for v in x]
    return [v / sum(kept) for v in kept]


def norm(x):
    return math.sqrt(sum(v * v for v in x))


def minus(x, y):
    return [a - b for a, b in zip(x, y, strict=True)]


def value_oracle(config, signals):
    *_, now = signals
    prev = signals[-2] if len(signals) > 1 else None
    match config:
        case KlHalting():
            return sum(p * math.log(p / q) for p, q in zip(softmax(prev), softmax(now), strict=True))
        case MinpKlHalting():
            pair = zip(likely(softmax(prev), config.min_p), likely(softmax(now), config.min_p), strict=True)
            return sum(p * math.log(p / q) for p, q in pair)
        case EntropyHalting():
            return abs(sum(p * math.log(p) for p in softmax(prev)) - sum(p * math.log(p) for p in softmax(now)))
        case LatentHalting():
            return norm(minus(now, prev)) / norm(now)
        case SecondDifferenceHalting():
            return norm(minus(minus(now, prev), minus(prev, signals[-3]))) / norm(minus(now, prev))
        case CosineHalting():
            return 1 - sum(a * b for a, b in zip(prev, now, strict=True)) / norm(prev) / norm(now)
        case ArgmaxHalting():
            return float(prev.index(max(prev)) != now.index(max(now)))
        case ConfidenceHalting(measure="top"):
            return max(softmax(now))
        case ConfidenceHalting():
            first, second = sorted(softmax(now))[::-1][:2]
            return first - second


def exit_oracle(config, signals):
    """0-based iteration after which one token stops."""
    streak = 0
    for n in range(len(signals)):
        if n + 1 >= config.num_signals:
            value = value_oracle(config, signals[: n + 1])
            holds = value >= config.threshold if isinstance(config, ConfidenceHalting) else value < config.threshold
            streak = streak + 1 if holds else 0
        if streak >= config.patience:
            return n
    return len(signals) - 1


def trajectories(num_iterations=8):
    """Random walks that settle, at a pace that differs between tokens."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(num_iterations, 3, 6, 5, generator=generator, dtype=torch.float64)
    pace_BT = torch.linspace(0.1, 0.9, 18, dtype=torch.float64).view(3, 6, 1)
    shrink = torch.stack([pace_BT**i for i in range(num_iterations)])
    return (walk * shrink).cumsum(0)


def run(config, signals_RBTX, poison=False):
    state = config.start(signals_RBTX[0, ..., 0])
    for n, signal in enumerate(signals_RBTX):
        if poison:
            signal = torch.where(state.halted_BT[..., None], torch.nan, signal)
        state = config.step(state, signal, last=n == len(signals_RBTX) - 1)
    return state


@pytest.mark.parametrize("config", CRITERIA, ids=str)
def test_values_and_exits_equal_the_definitions(config):
    signals = trajectories()
    state = run(config, signals, poison=True)
    exits = state.n_updates_BT - 1
    assert state.all_halted and exits.unique().numel() > 2, "the criterion must decide something here"
    window = signals[:3][-config.num_signals :]
    for b in range(3):
        for t in range(6):
            path = signals[:, b, t].tolist()
            assert config.value(*window)[b, t].item() == pytest.approx(value_oracle(config, path[:3]), abs=1e-9)
            assert exits[b, t] == exit_oracle(config, path)


@pytest.mark.parametrize("config", CRITERIA, ids=str)
def test_a_token_does_not_depend_on_its_batch(config):
    signals = trajectories()
    whole = run(config, signals).n_updates_BT
    for b, t in ((0, 0), (1, 3), (2, 5)):
        assert run(config, signals[:, b : b + 1, t : t + 1]).n_updates_BT.item() == whole[b, t]


def test_halts_is_a_function_of_two_signals():
    prev, now = torch.zeros(1, 2, 3), torch.tensor([[[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
    assert KlHalting().halts(prev, now).tolist() == [[True, False]]
    assert ConfidenceHalting(threshold=0.9).halts(now).tolist() == [[False, True]]
    assert LatentHalting().halts(now, now).tolist() == [[False, True]]  # a state of zeros has no direction: 0 / 0


def test_nothing_stops_without_enough_history():
    same = torch.ones(1, 1, 3)
    for config, first in ((LatentHalting(), 2), (SecondDifferenceHalting(threshold=9), 3), (ArgmaxHalting(), 6)):
        moving = torch.stack(
            [same * 1.001**n if isinstance(config, SecondDifferenceHalting) else same for n in range(9)]
        )
        assert run(config, moving).n_updates_BT.item() == first


def test_a_signal_can_be_observed_before_the_first_iteration():
    config, same = LatentHalting(), torch.ones(1, 1, 3)
    state = config.observe(config.start(torch.zeros(1, 1)), same)
    state = config.step(state, same)
    assert state.halted_BT.item() and state.n_updates_BT.item() == 1 and state.value_BT.item() == 0


def test_patience_starts_again_after_a_change():
    config = ArgmaxHalting(patience=2)
    tokens = [0, 0, 1, 1, 0, 0, 0, 0]
    signals = torch.nn.functional.one_hot(torch.tensor(tokens), 2).float().view(-1, 1, 1, 2)
    assert run(config, signals).n_updates_BT.item() == 7


@pytest.mark.parametrize("field", [{"threshold": -0.1}, {"patience": 0}])
def test_bad_values_are_refused(field):
    with pytest.raises(ValueError, match="must be at least"):
        LatentHalting(**field)


def test_the_threshold_of_confidence_may_fall_while_a_text_is_decoded():
    at = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(ConfidenceHalting(threshold=0.8).threshold_at(at), torch.full((3,), 0.8))
    falling = ConfidenceHalting(threshold=0.8, decay=4.0).threshold_at(at).tolist()
    assert falling == pytest.approx([0.9 * 0.8 + 0.1 * 0.8 * math.exp(-4 * t) for t in (0, 0.5, 1)])

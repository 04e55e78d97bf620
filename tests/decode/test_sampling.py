"""Choosing tokens, against filters written out by hand and those of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from loopwise.decode.sampling import GREEDY, Samplers, Sampling

SHAPES = [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.6, 0, 0.6, 0.0), (1.3, 0, 1.0, 0.2), (0.9, 7, 0.8, 0.05)]


def random_logits(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(setting, logits):
    """One list of numbers: temperature, then top_k, min_p and top_p, each on what the one before left."""
    kept = {token: math.exp(logit / setting.temperature) for token, logit in enumerate(logits)}
    if setting.top_k:
        kept = dict(sorted(kept.items(), key=lambda item: -item[1])[: setting.top_k])
    largest = max(kept.values())
    kept = {token: weight for token, weight in kept.items() if weight >= setting.min_p * largest}
    total, reached, chosen = sum(kept.values()), 0.0, {}
    for token, weight in sorted(kept.items(), key=lambda item: -item[1]):
        if reached < setting.top_p * total:
            chosen[token] = weight
        reached += weight
    total = sum(chosen.values())
    return [chosen.get(token, 0.0) / total for token in range(len(logits))]


@pytest.mark.parametrize("values", SHAPES)
def test_filters_are_those_written_out_by_hand(values):
    setting = Sampling(**dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True)))
    logits_BV = random_logits(1, 20, 13)
    want_BV = torch.tensor([naive(setting, row) for row in logits_BV.tolist()])
    found_BV = setting.probabilities(logits_BV)
    torch.testing.assert_close(found_BV, want_BV, atol=1e-6, rtol=1e-5)
    assert torch.equal(found_BV > 0, want_BV > 0)


@pytest.mark.parametrize(
    ("field", "value", "filtered_by"),
    [("top_k", 4, TopKLogitsWarper), ("top_p", 0.55, TopPLogitsWarper), ("min_p", 0.15, MinPLogitsWarper)],
)
def test_each_filter_is_that_of_transformers(field, value, filtered_by):
    logits_BV = random_logits(2, 20, 13)
    want_BV = filtered_by(value)(None, logits_BV / 0.8).softmax(-1)
    found_BV = Sampling(temperature=0.8, **{field: value}).probabilities(logits_BV)
    torch.testing.assert_close(found_BV, want_BV, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("setting", [GREEDY, Sampling(temperature=0.0, top_p=0.1, top_k=3, seed=4)])
def test_greedy_is_the_largest_logit(setting):
    logits_BV = random_logits(3, 6, 11)
    p_BV = setting.probabilities(logits_BV)
    assert torch.equal(p_BV.argmax(-1), logits_BV.argmax(-1)) and torch.equal(p_BV.sum(-1), torch.ones(6))
    assert torch.equal(Samplers(setting, 6).pick(logits_BV), logits_BV.argmax(-1))


@pytest.mark.parametrize(
    "setting",
    [
        Sampling(temperature=1e-300),
        Sampling(temperature=1e-30),
        Sampling(temperature=1.0, top_p=1e-300),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, min_p=1.0),
    ],
)
def test_extreme_settings_are_greedy_and_finite(setting):
    logits_BV = random_logits(4, 6, 11) * 1e3
    p_BV = setting.probabilities(logits_BV)
    assert torch.equal(p_BV, GREEDY.probabilities(logits_BV))


def test_settings_that_keep_all_tokens_change_nothing():
    logits_BV = random_logits(5, 4, 9)
    for setting in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=9), Sampling(temperature=1.0, top_k=99)):
        torch.testing.assert_close(setting.probabilities(logits_BV), logits_BV.softmax(-1))
    flat_V = Sampling(temperature=1e30).probabilities(logits_BV[0])
    torch.testing.assert_close(flat_V, torch.full((9,), 1 / 9))


def test_low_precision_logits_give_float32_probabilities():
    logits_BV = random_logits(6, 3, 9).bfloat16()
    p_BV = Sampling(temperature=1.5, top_p=0.9).probabilities(logits_BV)
    assert p_BV.dtype == torch.float32
    torch.testing.assert_close(p_BV.sum(-1), torch.ones(3))


def test_draws_follow_the_probabilities():
    setting = Sampling(temperature=1.2, top_k=4, seed=0)
    logits_V = random_logits(7, 8)
    p_V = setting.probabilities(logits_V)
    num = 4000
    picked = Samplers(setting, num).pick(logits_V.expand(num, 8))
    counts_V = torch.bincount(picked, minlength=8)
    assert not counts_V[p_V == 0].any()
    deviation_V = (counts_V - num * p_V).abs() / (num * p_V * (1 - p_V)).sqrt().clamp(min=1)
    assert deviation_V.max() < 4
    wrong_V = setting.probabilities(1.3 * logits_V)
    assert ((counts_V - num * wrong_V).abs() / (num * wrong_V * (1 - wrong_V)).sqrt().clamp(min=1)).max() > 4


def test_a_row_draws_from_a_generator_of_its_own():
    logits_BV = random_logits(8, 3, 50) / 4
    settings = [Sampling(temperature=1.0, seed=seed) for seed in (7, 8, 7)]

    def picks(rows):
        samplers = Samplers([settings[row] for row in rows], len(rows))
        return torch.stack([samplers.pick(logits_BV[rows]) for _ in range(6)], dim=1)

    together = picks([0, 1, 2])
    for row in range(3):
        assert torch.equal(picks([row])[0], together[row])
    same = Samplers([settings[0], settings[2]], 2)
    assert len({int(token) for token in same.pick(logits_BV[:1].expand(2, -1))}) == 1


def test_one_setting_for_all_rows_gives_each_a_seed():
    one = Sampling(temperature=1.0, seed=5)
    assert [setting.seed for setting in Samplers(one, 3).rows] == [5, 6, 7]
    flat_BV = torch.zeros(8, 1000)
    assert len(set(Samplers(one, 8).pick(flat_BV).tolist())) > 4


def test_only_the_rows_that_are_named_draw():
    logits_BV = torch.zeros(2, 1000)
    samplers, other = (Samplers(Sampling(temperature=1.0, seed=1), 3) for _ in range(2))
    samplers.pick(logits_BV[:1], [1])
    assert samplers.uniform(0) == other.uniform(0) and samplers.uniform(2) == other.uniform(2)
    assert samplers.uniform(1) != other.uniform(1)
    assert 0 <= samplers.uniform(1) < 1


def test_greedy_rows_beside_sampled_ones_draw_nothing():
    logits_BV = torch.zeros(2, 1000)
    logits_BV[0, 3] = 1.0
    samplers = Samplers([GREEDY, Sampling(temperature=1.0)], 2)
    before = samplers.generators[0].get_state()
    assert int(samplers.pick(logits_BV)[0]) == 3
    assert torch.equal(samplers.generators[0].get_state(), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: "),
        ({"temperature": math.nan}, "temperature nan: "),
        ({"temperature": math.inf}, "temperature inf: "),
        ({"top_k": -1}, "top_k -1: "),
        ({"top_k": 2.0}, "top_k 2.0: "),
        ({"top_k": True}, "top_k True: "),
        ({"top_p": 0.0}, "top_p 0.0: "),
        ({"top_p": 1.1}, "top_p 1.1: "),
        ({"top_p": math.nan}, "top_p nan: "),
        ({"min_p": -0.1}, "min_p -0.1: "),
        ({"min_p": 1.1}, "min_p 1.1: "),
        ({"seed": 2**63}, "seed 9223372036854775808: "),
        ({"seed": 0.5}, "seed 0.5: "),
    ],
)
def test_bad_settings_are_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError) as caught:
        Sampling(**wrong)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_settings_of_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="2 rows for 3"):
        Samplers([GREEDY, GREEDY], 3)

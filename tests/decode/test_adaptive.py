"""Adaptive depth: what is computed, what is counted, and that it is full depth where nothing stops."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

import loopwise
from loopwise.checkpoints.loading import import_checkpoint
from loopwise.decode.adaptive import decode_adaptive, follow_adaptive
from loopwise.decode.result import prompt_span
from loopwise.decode.rules import SKIPPED
from loopwise.decode.runner import Runner
from loopwise.decode.sampling import Sampling
from loopwise.decode.sequential import decode_sequential
from loopwise.models.hub import layer_list
from tests.checkpoints.foreign import GOLDENS

PROMPTS = [[1, 5, 9, 2, 4], [3], [8, 8, 1]]
PLAN = "0 core:(1-3)x4 4-5"  # 1 visit before the loop, 3 in each iteration, 2 after it
STATE, LOGITS = "cosine(0.1)", "confidence(0.1)"


def looped(plan=PLAN):
    return loopwise.attach(tiny_model("llama"), plan)


class Count:
    """How many tokens pass through the real layers, counted there."""

    def __init__(self, model):
        self.tokens = 0
        for layer in layer_list(model).layers:
            layer.register_forward_pre_hook(self.add)

    def add(self, _, args):
        self.tokens += args[0].shape[:2].numel()


@pytest.mark.parametrize("rule", ["fixed", "fixed(4)", "latent(0)", "kl(0)", "confidence(1)"])
@pytest.mark.parametrize("cache", [*SKIPPED, "last", "first", "ring(2)", "stride(2)", "own/last"])
def test_where_nothing_stops_it_is_full_depth(rule, cache):
    model = looped()
    want = decode_sequential(model, PROMPTS, max_new_tokens=5, cache=cache)
    found = decode_adaptive(model, PROMPTS, halting=rule, max_new_tokens=5, cache=cache)
    assert found.tokens == want.tokens and found.depths == want.depths and found.passes == want.passes
    # At rungs 1 to 3 a prediction is read to judge it: that runs the tail once more. `kl` has none to compare before.
    assert found.visits - want.visits == (2 * found.notes["readouts"])
    assert found.notes["readouts"] == (0 if rule[0] in "fl" else 3 * 4 * 3)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["hazard", "hazard(1.0)"])
def test_a_gate_with_threshold_one_never_stops(rule):
    model = import_checkpoint(GOLDENS / "ouro")
    gate = model.model.loops["core"].gate.linear
    gate.weight.zero_()
    gate.bias.fill_(40.0)  # every gate says 1 in float32
    found = decode_adaptive(model, PROMPTS, halting=rule, max_new_tokens=4)
    assert found.depths == [[4] * 4] * 3
    assert decode_adaptive(model, PROMPTS, halting="hazard(0.99)", max_new_tokens=4).depths == [[4, 1, 1, 1]] * 3


@pytest.mark.parametrize("cache", ["copy", "latest", "absent", "monotone", "last", "first", "ring(2)"])
@pytest.mark.parametrize("rule", [STATE, LOGITS])
def test_rows_that_have_stopped_are_not_computed(rule, cache):
    model = looped()
    runner, count = Runner(model, num_rows=3, capacity=16, cache=cache), Count(model)
    runner.prefill(prompt_span(PROMPTS, runner.device))
    prompt_visits, count.tokens = count.tokens, 0
    found = decode_adaptive(model, PROMPTS, halting=rule, max_new_tokens=9, cache=cache)
    later = [row[1:] for row in found.depths]
    assert sum(map(sum, later)) < 4 * 3 * 8, "some must stop"
    tails = sum(map(sum, later)) if rule == LOGITS else 3 * 8
    assert found.visits == 3 * 8 + 3 * sum(map(sum, later)) + 2 * tails
    assert count.tokens - prompt_visits == found.visits, "as many tokens as are counted pass through the layers"
    assert found.passes == sum(max(depths) for depths in zip(*later, strict=True))


@pytest.mark.parametrize("exits", [None, [1, 2, 4]])
def test_early_tokens_of_a_plain_model_save_their_layers(exits):
    model = tiny_model("llama")
    found = decode_adaptive(model, PROMPTS, halting="cosine(0.2)", max_new_tokens=9, cache="propagate", exits=exits)
    after = [0, *(exits or range(1, 6)), 6]
    later = [depth for row in found.depths for depth in row[1:]]
    assert found.visits == sum(after[depth] for depth in later) < 6 * len(later)


def test_catching_up_costs_each_rung_of_a_token_at_most_once():
    model, depths = looped("core:(0-5)x4"), [[4, 1, 2, 1, 4, 1, 3]]
    got = follow_adaptive(model, PROMPTS[:1], [[7] * 7], halting="fixed", depths=depths, cache="catch_up")
    # Tokens 1 to 4 reach all four rungs with the fourth, the last two run three each: 1, then 3 and the 2 that waited.
    assert got.visits == 6 * (4 * 4 + 3 + 3)
    assert got.passes == sum(depths[0][1:])


@pytest.mark.parametrize("rule", ["latent(0.8)", LOGITS])
def test_fewest_and_most_rungs(rule):
    model = looped()
    free = decode_adaptive(model, PROMPTS, halting=rule, max_new_tokens=9)
    found = decode_adaptive(model, PROMPTS, halting=rule, max_new_tokens=9, min_rungs=2, max_rungs=3)
    later = [depth for row in found.depths for depth in row[1:]]
    assert {depth for row in free.depths for depth in row[1:]} - {2, 3} and set(later) <= {2, 3}
    assert all(row[0] == 4 for row in found.depths), "the prompt has full depth"
    if rule == LOGITS:  # nothing is read after the first rung, nor to judge what stops anyway
        assert found.notes["readouts"] == len(later)
    same = decode_adaptive(model, PROMPTS, halting="fixed(4)", max_new_tokens=9, min_rungs=2, max_rungs=2)
    assert same.depths == [[4, *[2] * 8]] * 3


@pytest.mark.parametrize("rule", ["kl(0.3, patience=2)", "argmax(2)", "confidence(0.1, patience=2)"])
def test_fewest_rungs_read_no_prediction_that_cannot_matter(rule):
    """The verdicts are those of reading all."""
    model = looped("core:(0-5)x6")
    prompt, text = PROMPTS[:1], [[7, 2, 9, 4, 4, 1]]
    less = follow_adaptive(model, prompt, text, halting=rule, min_rungs=5, cache="catch_up")
    every = [follow_adaptive(model, prompt, text, halting=rule, min_rungs=n, cache="catch_up") for n in (1, 5)]
    free = every[0].depths[0]
    assert all(depth == 5 for depth, other in zip(less.depths[0], free, strict=True) if other == 5)
    assert less.depths == every[1].depths and min(less.depths[0]) >= 5


def test_a_row_may_keep_the_depth_of_its_first_token():
    model = looped()
    free = decode_adaptive(model, PROMPTS, halting=STATE, max_new_tokens=9)
    found = decode_adaptive(model, PROMPTS, halting=STATE, max_new_tokens=9, per="row")
    assert all(len(set(row[1:])) == 1 for row in found.depths) and any(len(set(row[1:])) > 1 for row in free.depths)
    assert [row[1] for row in found.depths] == [row[1] for row in free.depths]
    read = decode_adaptive(model, PROMPTS, halting=LOGITS, max_new_tokens=9, per="row")
    assert read.notes["readouts"] == sum(min(row[1], 3) for row in read.depths), "only first tokens are judged"


def test_sampled_rows_stop_by_themselves_and_are_reported_as_they_come():
    model, settings = looped(), [Sampling(temperature=1.5, seed=seed) for seed in (3, 4, 5)]
    seen = []
    options = {"halting": STATE, "max_new_tokens": 12, "stop_ids": range(40)}
    found = decode_adaptive(
        model, PROMPTS, sampling=settings, on_token=lambda row, token: seen.append((row, token)), **options
    )
    assert len(set(map(len, found.tokens))) > 1 and "stop" in found.finish
    for row, one in enumerate(settings):
        alone = decode_adaptive(model, [PROMPTS[row]], sampling=[one], **options)
        assert alone.tokens[0] == found.tokens[row] == [token for which, token in seen if which == row]
        assert alone.depths[0] == found.depths[row] and len(found.depths[row]) == len(found.tokens[row])


def test_random_first_states_and_random_depths_depend_on_the_row_alone():
    model = import_checkpoint(GOLDENS / "huginn")
    options = {"halting": "latent(0.7)", "max_new_tokens": 6, "loops": 6}
    found = decode_adaptive(model, PROMPTS, seeds=[1, 2, 3], **options)
    for row, prompt in enumerate(PROMPTS):
        assert decode_adaptive(model, [prompt], seeds=[row + 1], **options).tokens[0] == found.tokens[row]
    ouro, options = import_checkpoint(GOLDENS / "ouro"), {"halting": "ponder", "max_new_tokens": 6}
    found = decode_adaptive(ouro, PROMPTS, sampling=[Sampling(seed=seed) for seed in (1, 2, 3)], **options)
    for row, prompt in enumerate(PROMPTS):
        alone = decode_adaptive(ouro, [prompt], sampling=[Sampling(seed=row + 1)], **options)
        assert alone.depths[0] == found.depths[row]
    assert len({depth for row in found.depths for depth in row[1:]}) > 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"halting": "kll"}, "unknown: use fixed"),
        ({"halting": "kl", "per": "batch"}, "per='batch': use token or row"),
        ({"halting": "kl", "min_rungs": 0}, "min_rungs 0: from 1 to 4"),
        ({"halting": "kl", "min_rungs": 5}, "min_rungs 5: from 1 to 4"),
        ({"halting": "kl", "max_rungs": 5}, "max_rungs 5: from min_rungs, 1, to 4"),
        ({"halting": "kl", "min_rungs": 3, "max_rungs": 2}, "max_rungs 2: from min_rungs, 3, to 4"),
        ({"halting": "kl", "cache": "lats"}, "cache policy 'lats' is unknown"),
        ({"halting": "kl", "max_new_tokens": 0}, "max_new_tokens 0"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        decode_adaptive(looped(), PROMPTS, **({"max_new_tokens": 2} | options))


def test_texts_must_fit_their_prompts():
    for texts in ([[1]], [[1], [], [2]]):
        with pytest.raises(ValueError, match="texts for 3 prompts"):
            follow_adaptive(looped(), PROMPTS, texts, halting="fixed")

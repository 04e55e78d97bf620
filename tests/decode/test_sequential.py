"""Decoding by parts is what `generate` gives."""

from __future__ import annotations

import pytest
import torch
from laws import looping_plan
from tiny import tiny_model

import loopwise
from loopwise.decode.runner import try_out
from loopwise.decode.sampling import Sampling
from loopwise.decode.sequential import decode_sequential

PROMPTS = [[1, 5, 9, 2], [3, 8, 7, 6]]
KINDS = ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3", "opt", "olmo2", "falcon", "deepseek_v3"]
POLICIES = ["own", "last", "first", "ring(2)", "stride(2)", "own/last", "own/ring(2)"]


def looped(model_type: str = "llama", count: int = 3):
    model = tiny_model(model_type)
    layers = len(loopwise.models.hub.layer_list(model).layers)
    return loopwise.attach(
        model, f"0 core:(1-{layers - 2})x{count} {layers - 1}" if layers > 2 else looping_plan(layers)
    )


def generated(model, prompts, **options):
    ids_BT = torch.tensor(prompts)
    found = model.generate(ids_BT, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    return found[:, ids_BT.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", KINDS)
def test_sequential_is_generate(model_type):
    model = looped(model_type)
    try_out(model)
    assert decode_sequential(model, PROMPTS, max_new_tokens=8).tokens == generated(model, PROMPTS)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_sharing_is_that_of_generate(policy):
    model = looped()
    found = decode_sequential(model, PROMPTS, max_new_tokens=8, cache=policy)
    loopwise.set_cache(model, policy)
    assert found.tokens == generated(model, PROMPTS)


def test_rows_of_other_lengths_are_independent():
    model, prompts = looped(), [[1, 5, 9, 2, 4, 4], [3], [8, 8, 1]]
    together = decode_sequential(model, prompts, max_new_tokens=6).tokens
    assert together == [decode_sequential(model, [prompt], max_new_tokens=6).tokens[0] for prompt in prompts]


def test_sampled_rows_do_not_depend_on_their_mates():
    model, settings = looped(), [Sampling(temperature=1.5, seed=seed) for seed in (3, 4)]
    together = decode_sequential(model, PROMPTS, max_new_tokens=8, sampling=settings).tokens
    alone = [
        decode_sequential(model, [prompt], max_new_tokens=8, sampling=[one]).tokens[0]
        for prompt, one in zip(PROMPTS, settings, strict=True)
    ]
    assert together == alone


def test_costs_are_counted():
    model = looped(count=3)
    found = decode_sequential(model, PROMPTS, max_new_tokens=5)
    per_token = len(loopwise.plan_of(model).slots)
    assert found.passes == 3 * 4
    assert found.visits == per_token * 4 * 2
    assert found.mean_depth == 3


def test_a_recurrent_model_is_refused():
    with pytest.raises(ValueError, match="by position"):
        decode_sequential(looped("mamba"), PROMPTS, max_new_tokens=2)

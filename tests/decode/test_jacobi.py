"""Jacobi decoding gives the tokens of sequential decoding, in at most as many passes."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny import tiny_model

import loopwise
from loopwise.checkpoints.loading import import_checkpoint
from loopwise.decode.jacobi import decode_jacobi
from loopwise.decode.sampling import Sampling
from loopwise.decode.sequential import decode_sequential
from tests.checkpoints.foreign import GOLDENS

PROMPTS = [[1, 5, 9, 2], [3, 8, 7, 6, 4, 11], [13]]
FAMILIES = ["huginn", "parcae", "retrofit_llama", "ouro", "loopformer"]
PLAIN = ["llama", "gpt2", "gemma3_text", "mixtral"]


@functools.cache
def model_of(name: str):
    return import_checkpoint(GOLDENS / name) if name in FAMILIES else tiny_model(name)


def both(name, *, prompts=PROMPTS, max_new_tokens=13, block=8, guess=None, **options):
    found = decode_jacobi(model_of(name), prompts, max_new_tokens=max_new_tokens, block=block, guess=guess, **options)
    return found, decode_sequential(model_of(name), prompts, max_new_tokens=max_new_tokens, **options)


@pytest.mark.parametrize("name", FAMILIES + PLAIN)
def test_jacobi_is_sequential(name):
    found, want = both(name)
    assert found.tokens == want.tokens
    assert found.depths == want.depths and found.finish == want.finish
    assert found.passes <= want.passes


@pytest.mark.parametrize("block", [1, 2, 5, 40])
def test_any_block_and_guess(block):
    for guess in (None, 0, 20):
        found, want = both("huginn", block=block, guess=guess)
        assert found.tokens == want.tokens
        assert found.passes <= want.passes


def test_a_block_of_one_is_sequential_pass_by_pass():
    found, want = both("huginn", block=1)
    assert (found.passes, found.visits) == (want.passes, want.visits)
    assert found.notes["drafted"] == 0


def test_right_guesses_save_passes():
    """A model that repeats itself is guessed right by repeating the last token."""
    model = loopwise.attach(tiny_model("llama"), "0 core:(1-2)x3 3")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = decode_jacobi(model, PROMPTS, max_new_tokens=17, block=8)
    assert found.tokens == [[0] * 17] * 3
    assert found.notes["outer_passes"] == 2 and found.passes == 2 * 3
    assert found.notes["drafted"] == found.notes["drafted_right"] == 3 * 14


def test_rows_do_not_depend_on_their_mates():
    together, _ = both("huginn", seeds=[1, 2, 3])
    for row, prompt in enumerate(PROMPTS):
        alone, _ = both("huginn", prompts=[prompt], seeds=[row + 1])
        assert alone.tokens[0] == together.tokens[row]


def test_stop_tokens_and_what_is_streamed():
    free, _ = both("retrofit_llama")
    seen = []
    stop = free.tokens[0][3]
    found, want = both("retrofit_llama", stop_ids=[stop])
    again = decode_jacobi(
        model_of("retrofit_llama"),
        PROMPTS,
        max_new_tokens=13,
        stop_ids=[stop],
        on_token=lambda row, token: seen.append((row, token)),
    )
    assert found.tokens == want.tokens == again.tokens and found.finish == want.finish
    assert [[token for r, token in seen if r == row] for row in range(3)] == found.tokens


def test_changes_are_counted():
    found, want = both("huginn", max_new_tokens=24)
    assert found.notes["right_to_wrong"] >= 0 and found.notes["wrong_to_right"] > 0
    again = decode_jacobi(model_of("huginn"), PROMPTS, max_new_tokens=24, reference=want.tokens)
    assert again.notes == found.notes


def test_shared_stores():
    found, want = both("huginn", cache="first")
    assert found.tokens == want.tokens
    with pytest.raises(ValueError, match="use own or first"):
        both("huginn", cache="own/last")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="temperature 0"):
        both("huginn", sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="block 0"):
        both("huginn", block=0)
    with pytest.raises(ValueError, match="at least one token"):
        both("huginn", prompts=[[]])

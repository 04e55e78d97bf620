"""Self-speculation is decoding at full depth: the same greedy tokens, the same distribution, fewer deep passes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

import loopwise
from loopwise.checkpoints.loading import import_checkpoint
from loopwise.decode import speculative
from loopwise.decode.sampling import Sampling
from loopwise.decode.sequential import decode_sequential
from loopwise.decode.speculative import decode_speculative
from tests.checkpoints.foreign import GOLDENS
from tests.decode.test_sequential import KINDS

RAGGED = [[1, 5, 9, 2], [3, 8, 7, 6, 11, 4], [7]]
LOOP = "0 core:(1-4)x4 5"
OWN_STORES = ["own", "latest", "propagate", "absent", "monotone", "catch_up", "first", "own/first"]


def looped(model_type="llama", plan=LOOP):
    return loopwise.attach(tiny_model(model_type), plan)


def without_late_layers(first=2):
    """A plain model of which the layers from `first` on do nothing, so that every draft is right."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers[first:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def with_one_answer():
    """A plain model whose last layer drowns all others, so that no draft is right."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        noise_D = torch.randn(32, generator=torch.Generator().manual_seed(1))
        model.transformer.h[5].mlp.c_proj.bias.copy_(50 * noise_D)
    return model


def assert_same(model, prompts=RAGGED, *, draft_rungs, lookahead=4, max_new_tokens=10, stop_ids=(), **options):
    limits = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    want = decode_sequential(model, prompts, **limits, **options)
    got = decode_speculative(model, prompts, draft_rungs=draft_rungs, lookahead=lookahead, **limits, **options)
    assert (got.tokens, got.finish, got.depths) == (want.tokens, want.finish, want.depths)
    return got


@pytest.mark.parametrize("model_type", KINDS)
def test_a_loop_gives_the_same_tokens(model_type):
    model = looped(model_type)
    for draft_rungs, lookahead in ((1, 2), (2, 5), (3, 3)):
        assert_same(model, draft_rungs=draft_rungs, lookahead=lookahead)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_plain_model_gives_the_same_tokens(model_type):
    """The rungs are its layers, or groups of them."""
    model = tiny_model(model_type)
    assert_same(model, draft_rungs=3, lookahead=3)
    assert_same(model, draft_rungs=1, exits=[4])


@pytest.mark.parametrize("draft_rungs", [1, 2, 3])
@pytest.mark.parametrize("lookahead", [1, 2, 3, 4, 5, 6])
def test_every_depth_of_drafts_and_lookahead(draft_rungs, lookahead):
    assert_same(looped("falcon"), draft_rungs=draft_rungs, lookahead=lookahead)


@pytest.mark.parametrize("golden", ["huginn", "parcae", "ouro", "loopformer", "retrofit_llama"])
def test_published_models(golden):
    """Random first states, gates, injections and times among them."""
    model = import_checkpoint(GOLDENS / golden)
    for draft_rungs in (1, 2, 3):
        assert_same(model, draft_rungs=draft_rungs, loops=4, seeds=[3, 1, 2])


@pytest.mark.parametrize("policy", OWN_STORES)
def test_policies_under_which_no_rung_loses_its_store(policy):
    model = looped()
    for draft_rungs in (1, 3):
        assert_same(model, draft_rungs=draft_rungs, cache=policy, max_new_tokens=8)


@pytest.mark.parametrize("lookahead", [1, 3, 6])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 8, 9])
def test_all_drafts_right(lookahead, max_new_tokens):
    """Every round but the last gives lookahead + 1 tokens."""
    model = without_late_layers()
    got = assert_same(model, draft_rungs=1, lookahead=lookahead, max_new_tokens=max_new_tokens, exits=[2])
    assert got.notes["accepted"] == got.notes["drafted"]
    rounds = math.ceil((max_new_tokens - 1) / (lookahead + 1))
    assert got.notes["full_passes"] == rounds
    assert got.notes["drafted"] == len(RAGGED) * (max_new_tokens - 1 - rounds)
    # Every token of a row runs the first rung on its own and the second in its round.
    assert got.passes == max_new_tokens - 1 + rounds
    assert got.notes["draft_passes"] == max_new_tokens - 1
    assert got.visits == decode_sequential(model, RAGGED, max_new_tokens=max_new_tokens).visits


@pytest.mark.parametrize("lookahead", [1, 4])
def test_all_drafts_wrong(lookahead):
    got = assert_same(with_one_answer(), draft_rungs=2, lookahead=lookahead)
    assert got.notes["accepted"] == 0 < got.notes["drafted"]
    assert got.notes["full_passes"] == 9 and got.notes["verifications"] == 9 * len(RAGGED)
    assert got.notes["full_passes_per_token"] == 0.9


def test_stop_tokens_anywhere():
    """Inside a block of drafts that are all right, and of rows that accept different numbers."""
    for model, exits in ((without_late_layers(), [2]), (looped("falcon"), None)):
        plain = decode_sequential(model, RAGGED, max_new_tokens=8)
        for stop in {row[place] for row in plain.tokens for place in (0, 3, 4, 7)}:
            got = assert_same(model, draft_rungs=1, lookahead=5, max_new_tokens=8, stop_ids=[stop], exits=exits)
            assert all(stop not in row[:-1] for row in got.tokens)


def test_nothing_is_drafted_after_a_stop_token():
    model = without_late_layers()
    tokens = decode_sequential(model, [[3, 8, 7]], max_new_tokens=6).tokens[0]
    at = next(place for place in range(2, 6) if tokens[place] not in tokens[:place])
    options = {"max_new_tokens": 20, "draft_rungs": 1, "lookahead": 12, "exits": [2]}
    got = decode_speculative(model, [[3, 8, 7]], stop_ids=[tokens[at]], **options)
    assert got.tokens == [tokens[: at + 1]] and got.finish == ["stop"]
    assert got.notes["drafted"] == got.notes["accepted"] == got.notes["draft_passes"] == at


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_row_does_not_depend_on_its_mates(temperature):
    model = looped("falcon")
    settings = [Sampling(temperature=temperature, seed=seed) for seed in (5, 6, 7)]
    options = {"max_new_tokens": 9, "draft_rungs": 2, "lookahead": 3}
    together = decode_speculative(model, RAGGED, sampling=settings, **options)
    alone = [
        decode_speculative(model, [prompt], sampling=[one], **options)
        for prompt, one in zip(RAGGED, settings, strict=True)
    ]
    assert together.tokens == [one.tokens[0] for one in alone]
    for name in ("drafted", "accepted", "verifications"):
        assert together.notes[name] == sum(one.notes[name] for one in alone)


def test_tokens_are_reported_once_in_order():
    seen = [[], [], []]
    got = decode_speculative(
        looped("falcon"),
        RAGGED,
        max_new_tokens=9,
        draft_rungs=2,
        on_token=lambda row, token: seen[row].append(token),
    )
    assert seen == got.tokens


def test_the_stores_after_a_round_are_those_of_full_depth(monkeypatch):
    """Also where drafts were thrown away: what is left for final tokens is what plain decoding leaves."""
    runners = []

    class Kept(speculative.Runner):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            runners.append(self)

    model, length = looped(), len(RAGGED[0]) + 9
    got = decode_speculative(model, RAGGED[:1], max_new_tokens=10, draft_rungs=2, lookahead=3)
    monkeypatch.setattr(speculative, "Runner", Kept)
    monkeypatch.setattr("loopwise.decode.sequential.Runner", Kept)
    decode_sequential(model, RAGGED[:1], max_new_tokens=10)
    again = decode_speculative(model, RAGGED[:1], max_new_tokens=10, draft_rungs=2, lookahead=3)
    assert again.tokens == got.tokens and 0 < again.notes["accepted"] < again.notes["drafted"]
    want, found = (runner.cache._stores for runner in runners)
    assert want.keys() == found.keys()
    for name, pair in want.items():
        for one, other in zip(pair, found[name], strict=True):
            torch.testing.assert_close(other[..., :length, :], one[..., :length, :], atol=2e-5, rtol=1e-4)


# The distribution of sampled tokens.

VOCABULARY, DRAWS = 3, 2000
SETTINGS = {
    "plain": Sampling(temperature=1.0),
    "cut": Sampling(temperature=1.0, top_p=0.85),
    "two": Sampling(temperature=1.0, top_k=2),
}


def small_model():
    """Three tokens; its drafts are far from full depth, and not hopeless."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return loopwise.attach(model.eval(), "0 core:(1)x3 2")


def exact(model, setting, prompt, length):
    """Probability of every continuation, from the model's own forward without a cache."""
    p = {}
    with torch.no_grad():
        for tokens in product(range(VOCABULARY), repeat=length):
            rows_V = setting.probabilities(model(torch.tensor([[*prompt, *tokens]])).logits[0])
            p[tokens] = math.prod(float(rows_V[len(prompt) - 1 + n, token]) for n, token in enumerate(tokens))
    return p


def surprise(model, setting, prompt=(0, 2), length=4):
    """How often chance alone is further from the exact distribution: p of the chi-square test. And the decoding.

    The first token comes from the prompt's logits, so a round has the others: two drafts and a token after them.
    """
    p = exact(model, setting, prompt, length)
    assert sum(p.values()) == pytest.approx(1)
    got = decode_speculative(
        model, [prompt] * DRAWS, max_new_tokens=length, draft_rungs=1, lookahead=2, sampling=setting
    )
    counts = dict.fromkeys(p, 0)
    for tokens in got.tokens:
        counts[tuple(tokens)] += 1
    if any(counts[tokens] for tokens in p if p[tokens] == 0):
        return 0.0, got
    # Rare continuations count as one, as the approximation needs.
    likely = [tokens for tokens in p if p[tokens] * DRAWS >= 5]
    cells = [(counts[tokens], p[tokens] * DRAWS) for tokens in likely]
    rest = DRAWS - sum(expected for _, expected in cells)
    if rest >= 5:
        cells.append((DRAWS - sum(count for count, _ in cells), rest))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1])), got


def keep_all(samplers, block, logits_tV):
    """Wrong: what was drafted is kept."""
    p_V = samplers.rows[block.row].probabilities(logits_tV[-1])
    return [*block.drafts, samplers.draw(block.row, p_V)], len(block.drafts)


def no_residual(samplers, block, logits_tV):
    """Wrong: after a rejection the draw is from p, which gives likely tokens of p a second chance."""
    p_tV = samplers.rows[block.row].probabilities(logits_tV)
    for kept, token in enumerate(block.drafts):
        if samplers.uniform(block.row) * float(block.chances[kept][token]) >= float(p_tV[kept][token]):
            return [*block.drafts[:kept], samplers.draw(block.row, p_tV[kept])], kept
    return [*block.drafts, samplers.draw(block.row, p_tV[-1])], len(block.drafts)


def likely_enough(samplers, block, logits_tV):
    """Wrong: a draft is kept when full depth finds it half as likely as its own choice (Huginn's threshold)."""
    p_tV = samplers.rows[block.row].probabilities(logits_tV)
    for kept, token in enumerate(block.drafts):
        if float(p_tV[kept][token]) < 0.5 * float(p_tV[kept].max()):
            return [*block.drafts[:kept], samplers.draw(block.row, p_tV[kept])], kept
    return [*block.drafts, samplers.draw(block.row, p_tV[-1])], len(block.drafts)


@pytest.mark.parametrize("name", SETTINGS)
def test_sampling_keeps_the_distribution_of_full_depth(name):
    p, got = surprise(small_model(), SETTINGS[name])
    assert 0.2 < got.notes["acceptance_rate"] < 0.95
    assert p > 1e-3


@pytest.mark.parametrize("wrong", [keep_all, no_residual, likely_enough])
def test_a_wrong_acceptance_would_show(monkeypatch, wrong):
    monkeypatch.setattr(speculative, "accept", wrong)
    p, _ = surprise(small_model(), SETTINGS["plain"])
    assert p < 1e-6


def test_sampled_rows_follow_their_seeds():
    model, options = looped(), {"max_new_tokens": 8, "draft_rungs": 2}
    first, again, other = (
        decode_speculative(model, RAGGED, sampling=Sampling(temperature=2.0, seed=seed), **options).tokens
        for seed in (1, 1, 9)
    )
    assert first == again != other


# Bad input.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"draft_rungs": 0}, "draft_rungs 0: from 1 to 3"),
        ({"draft_rungs": 4}, "draft_rungs 4: from 1 to 3"),
        ({"draft_rungs": True}, "draft_rungs True: a whole number"),
        ({"draft_rungs": 1.0}, "draft_rungs 1.0: a whole number"),
        ({"lookahead": 0}, "lookahead 0: at least 1"),
        ({"lookahead": "4"}, "lookahead '4': a whole number"),
        ({"loops": 1}, "needs 2 rungs or more"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: at least 1"),
        ({"cache": "last"}, "cache policy last: a token needs the last rungs"),
        ({"cache": "own/ring(2)"}, r"cache policy own/ring\(2\): a token needs the last rungs"),
        ({"cache": "stride(2)"}, r"cache policy stride\(2\): a token needs the last rungs"),
    ],
)
def test_bad_input_is_refused_in_one_line(wrong, message):
    options = {"max_new_tokens": 4, "draft_rungs": 1} | wrong
    with pytest.raises(ValueError, match=message) as caught:
        decode_speculative(looped(), RAGGED, **options)
    assert "\n" not in str(caught.value)

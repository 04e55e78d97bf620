"""The wavefront decoder: exact where it says so, the same for a row whatever its mates, and its rules one by one."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from laws import looping_plan
from tiny import tiny_model

import loopwise
from loopwise.checkpoints.loading import import_checkpoint
from loopwise.decode.freezing import acceleration, frontier, latent_change, mix_noise
from loopwise.decode.result import next_span, prompt_span
from loopwise.decode.runner import Runner
from loopwise.decode.sampling import Sampling
from loopwise.decode.sequential import decode_sequential
from loopwise.decode.wavefront import WaveConfig, decode_wavefront
from tests.checkpoints.foreign import GOLDENS

PROMPTS = [[1, 5, 9, 2], [3, 8, 7, 6, 4, 11], [13]]
SEEDS = [3, 4, 5]
FAMILIES = ["huginn", "parcae", "retrofit_llama", "ouro"]
ATTACHED = ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3"]
NEW = 9


@functools.cache
def model_of(name: str):
    if name in FAMILIES:
        return import_checkpoint(GOLDENS / name)
    model = tiny_model(name)
    layers = len(loopwise.models.hub.layer_list(model).layers)
    return loopwise.attach(model, f"0 core:(1-{layers - 2})x4 {layers - 1}" if layers > 2 else looping_plan(layers))


def wave_of(name, prompts=PROMPTS, *, seeds=SEEDS, max_new_tokens=NEW, options=(), **wave):
    return decode_wavefront(
        model_of(name),
        prompts,
        max_new_tokens=max_new_tokens,
        wave=WaveConfig(**wave),
        seeds=list(seeds),
        **dict(options),
    )


def sequential(name, prompts=PROMPTS, *, seeds=SEEDS, max_new_tokens=NEW, **options):
    return decode_sequential(model_of(name), prompts, max_new_tokens=max_new_tokens, seeds=list(seeds), **options)


# What is exact.


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("name", FAMILIES + ATTACHED)
def test_one_position_at_full_depth_is_sequential(name, inner):
    found, want = wave_of(name, freeze="fixed", width=1, inner=inner), sequential(name)
    assert found.tokens == want.tokens
    assert found.depths == want.depths
    assert found.passes == want.passes


@pytest.mark.parametrize("cache", ["own/last", "last", "first", "own/ring(2)", "stride(2)"])
def test_one_position_is_sequential_under_shared_stores(cache):
    found = wave_of("huginn", freeze="fixed", width=1, inner=2, options={"cache": cache})
    assert found.tokens == sequential("huginn", cache=cache).tokens


@pytest.mark.parametrize(
    "wave",
    [
        {"width": 5, "inner": 1},
        {"width": 128, "inner": 1},
        {"width": 3, "inner": 2},
        {"width": 6, "inner": 3, "headway": 2},
        {"width": 8, "inner": 4, "headway": 8},
        {"width": 8, "inner": 2, "rule": "last", "embed_ema": 0.5},
    ],
)
@pytest.mark.parametrize("name", [*FAMILIES, "llama"])
def test_starting_over_makes_any_width_sequential(name, wave):
    found = wave_of(name, freeze="fixed", restart=True, **wave)
    assert found.tokens == sequential(name).tokens


def test_a_wave_of_restarts_is_sequential_where_guesses_are_wrong():
    found, want = wave_of("huginn", freeze="fixed", restart=True, inner=1, max_new_tokens=24), None
    want = sequential("huginn", max_new_tokens=24)
    assert found.tokens == want.tokens
    assert found.notes["restarts"] > 0 and found.notes["wrong_to_right"] > 0
    assert found.passes < want.passes


def test_sampled_tokens_are_those_of_sequential_decoding():
    settings = [Sampling(temperature=0.8, seed=7), Sampling(), Sampling(temperature=2.0, top_k=20, seed=9)]
    want = sequential("huginn", sampling=settings).tokens
    for width in (1, 6):
        options = {"sampling": settings}
        assert wave_of("huginn", freeze="fixed", restart=True, inner=2, width=width, options=options).tokens == want


def test_keys_of_the_first_iteration_are_exact_too():
    found = wave_of("huginn", freeze="fixed", restart=True, inner=1, options={"cache": "first"})
    assert found.notes["restarts"] > 0
    assert found.tokens == sequential("huginn", cache="first").tokens


def test_keeping_stale_stores_is_another_computation():
    """Without starting over a revised position keeps keys of its old token in the shallow stores."""
    prompts = [[first, first + 2, 5] for first in range(1, 40, 3)]
    options = {"freeze": "fixed", "inner": 1, "max_new_tokens": 16, "seeds": [1] * len(prompts)}
    kept, started = (wave_of("huginn", prompts, restart=restart, **options) for restart in (False, True))
    assert started.tokens == sequential("huginn", prompts, seeds=[1] * len(prompts), max_new_tokens=16).tokens
    assert kept.notes["tokens_revised"] > 0 and kept.tokens != started.tokens
    assert kept.notes["restarts"] == 0 and kept.passes < started.passes


# What every setting keeps.

SETTINGS = [
    {},
    {"freeze": "latent", "threshold": 0.2, "rule": "last"},
    {"freeze": "acceleration", "threshold": 0.2, "inner": 1},
    {"freeze": "stable", "patience": 1, "inner": 1},
    {"freeze": "fixed", "inner": 2, "headway": 3},
    {"freeze": "latent", "threshold": 0.3, "inner": 2, "state_noise": 0.3},
    {"freeze": "latent", "threshold": 0.3, "inner": 1, "state_noise": 0.3, "noise_mixer": "sqrt", "headway": 2},
    {"freeze": "latent", "threshold": 0.3, "inner": 1, "continue_state": True, "headway": 2},
]


CACHES = ["own", "own/last", "latest", "propagate"]


@pytest.mark.parametrize(
    ("setting", "cache"),
    [(setting, CACHES[i % 2]) for i, setting in enumerate(SETTINGS)] + [(SETTINGS[0], c) for c in CACHES[1:]],
)
def test_rows_do_not_depend_on_their_mates(setting, cache):
    sampling = [Sampling(), Sampling(temperature=1.0, seed=5), Sampling()]
    found = wave_of("huginn", options={"cache": cache, "sampling": sampling}, **setting)
    assert all(len(row) == NEW for row in found.tokens) and found.finish == ["length"] * 3
    for row, prompt in enumerate(PROMPTS):
        options = {"cache": cache, "sampling": [sampling[row]]}
        alone = wave_of("huginn", [prompt], seeds=[SEEDS[row]], options=options, **setting)
        assert alone.tokens[0] == found.tokens[row]
        assert alone.depths[0] == found.depths[row]


def test_frozen_positions_leave_keys_of_every_iteration():
    """Copied to the stores that a position did not reach, they are what looking up its deepest store finds."""
    setting = {"freeze": "latent", "threshold": 0.6, "inner": 1, "width": 1, "max_new_tokens": 16}
    copied, latest, absent = (
        wave_of("huginn", options={"cache": cache, "loops": 8}, **setting) for cache in ("own", "latest", "absent")
    )
    assert len({depth for row in copied.depths for depth in row}) > 3
    assert copied.tokens == latest.tokens and copied.depths == latest.depths
    assert copied.tokens != absent.tokens


def latent(states, predicted):
    return (states[-1] - states[-2]).norm() / states[-1].norm() < 0.4


def accelerated(states, predicted):
    if len(states) < 3:
        return False
    return ((states[-1] - states[-2]) - (states[-2] - states[-3])).norm() / states[-1].norm() < 0.6


def stable(states, predicted):
    return len(predicted) > 2 and len(set(predicted[-3:])) == 1


@torch.no_grad()
def token_by_token(name, prompt, seed, rule, inner, cache):
    """A wave of one position, written down plainly."""
    runner = Runner(model_of(name), num_rows=1, capacity=40, loops=8, cache=cache, seeds=[seed])
    token = int(runner.prefill(prompt_span([prompt], runner.device))[1].argmax())
    tokens, depths = [token], [8]
    while len(tokens) < 12:
        span = next_span([0], [token], [len(prompt) + len(tokens) - 1], runner.device)
        carry = runner.enter(span)
        states, predicted, depth = [carry.state_btD], [], 0
        while depth < 8 and not (predicted and rule(states, predicted)):
            for _ in range(min(inner, 8 - depth)):
                carry = runner.climb(span, carry, depth)
                depth += 1
            states.append(carry.state_btD)
            predicted.append(int(runner.leave(span, carry).argmax()))
        runner.left(span, carry, depth)
        token = predicted[-1]
        tokens.append(token)
        depths.append(depth)
    return tokens, depths


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"freeze": "latent", "threshold": 0.4}, latent),
        ({"freeze": "acceleration", "threshold": 0.6}, accelerated),
        ({"freeze": "stable", "patience": 2}, stable),
    ],
    ids=["latent", "acceleration", "stable"],
)
@pytest.mark.parametrize(("inner", "cache"), [(1, "own"), (2, "own/last"), (3, "propagate")])
def test_every_rule_freezes_when_it_says(setting, rule, inner, cache):
    options = {"loops": 8, "cache": cache}
    found = wave_of("huginn", inner=inner, width=1, max_new_tokens=12, options=options, **setting)
    for row, prompt in enumerate(PROMPTS):
        want = token_by_token("huginn", prompt, SEEDS[row], rule, inner, cache)
        assert (found.tokens[row], found.depths[row]) == want
    if inner == 1:
        assert len({depth for depths in found.depths for depth in depths}) > 1


@pytest.mark.parametrize("setting", SETTINGS[:5], ids=lambda item: "-".join(map(str, item.values())) or "default")
def test_nothing_comes_after_a_stop_token(setting):
    free = wave_of("huginn", max_new_tokens=20, **setting)
    for place in (0, 1, 4, 19):
        stop = free.tokens[0][place]
        seen = []
        found = wave_of(
            "huginn",
            max_new_tokens=20,
            options={"stop_ids": [stop], "on_token": lambda row, token, seen=seen: seen.append((row, token))},
            **setting,
        )
        for row, tokens in enumerate(found.tokens):
            whole = free.tokens[row]
            end = whole.index(stop) + 1 if stop in whole else len(whole)
            assert tokens == whole[:end]
            assert found.finish[row] == ("stop" if stop in whole else "length")
            assert [token for r, token in seen if r == row] == tokens


@pytest.mark.parametrize("length", [1, 2, 5])
def test_no_more_tokens_than_asked_for(length):
    found = wave_of("huginn", max_new_tokens=length, headway=4, threshold=10.0)
    assert [len(row) for row in found.tokens] == [length] * 3
    assert [len(row) for row in found.depths] == [length] * 3


def test_passes_are_those_of_the_wave():
    """A steady wave freezes a token per outer pass, the first after loops / inner passes."""
    found = wave_of("huginn", [PROMPTS[0]], seeds=[0], freeze="fixed", inner=2, restart=False, options={"loops": 8})
    assert found.notes["outer_passes"] >= 4 + NEW - 2
    assert found.passes <= 2 * found.notes["outer_passes"]
    assert found.passes < sequential("huginn", [PROMPTS[0]], seeds=[0], loops=8).passes / 2
    assert found.notes["prefill_passes"] == 8
    assert all(depth == 8 for depth in found.depths[0])


def test_outer_passes_are_limited():
    found = wave_of("huginn", freeze="fixed", inner=1, width=1, max_passes=9)
    assert found.finish == ["passes"] * 3
    assert [len(row) for row in found.tokens] == [3] * 3


def test_width_bounds_the_wave():
    for width in (1, 2, 7):
        found = wave_of("huginn", freeze="fixed", inner=1, restart=False, width=width)
        per_pass = found.notes["iterations"] / found.passes
        assert per_pass <= 3 * width


# Injection.


def test_models_without_injection_start_over():
    found = wave_of("ouro", freeze="fixed", inner=1)
    assert found.notes["injects"] == 0
    assert found.tokens == sequential("ouro").tokens
    assert wave_of("huginn", freeze="fixed", inner=1).notes["injects"] == 1
    with pytest.raises(ValueError, match="injection"):
        wave_of("ouro", restart=False)


# The published code.

PUBLISHED = json.loads((Path(__file__).parent / "published_wave.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", PUBLISHED["cases"])
def test_the_published_code_gives_the_same_tokens(case):
    stop_ids = [] if case["stop"] is None else [case["stop"]]
    options = {"loops": 8, "initial_state": torch.zeros(1), "stop_ids": stop_ids}
    found = wave_of(
        "huginn", [case["prompt"]], seeds=[0], max_new_tokens=20, options=options, compat="reference", **case["wave"]
    )
    assert found.tokens[0] == case["tokens"]
    assert found.passes == case["passes"]


def test_a_published_wave_of_one_never_advances():
    found = wave_of("huginn", [[1, 5]], seeds=[0], compat="reference", width=1, threshold=10.0, max_passes=12)
    assert found.finish == ["passes"] and len(found.tokens[0]) == 1


# The parts.


def test_how_much_freezes():
    settled = [True, True, False, True, False]
    assert frontier("prefix", settled) == 2
    assert frontier("last", settled) == 4
    assert frontier("prefix", [False]) == frontier("last", [False]) == 0
    assert frontier("prefix", [True]) == frontier("last", [True]) == 1


def test_changes_of_states():
    now, before, earlier = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([[3.0, 2.5]])
    assert latent_change(now, before).item() == pytest.approx(0.2)
    assert acceleration(now, before, earlier).item() == pytest.approx(0.1)
    assert latent_change(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0


def test_noise_is_dampened_and_keeps_the_variance():
    state, fresh = torch.full((2, 1), 2.0), torch.full((2, 1), 10.0)
    linear = mix_noise(WaveConfig(state_noise=0.5), state, fresh, [0, 4])
    torch.testing.assert_close(linear, torch.tensor([[6.0], [2.8]]))
    constant = mix_noise(WaveConfig(state_noise=0.5, noise_schedule="constant"), state, fresh, [0, 4])
    torch.testing.assert_close(constant, torch.tensor([[6.0], [6.0]]))
    root = mix_noise(WaveConfig(state_noise=0.36, noise_mixer="sqrt"), state, fresh, [0, 0])
    torch.testing.assert_close(root, torch.full((2, 1), 1.6 + 6.0))


def test_revisions_are_counted_against_a_reference():
    found = wave_of("huginn", freeze="fixed", restart=True, inner=1, max_new_tokens=16)
    want = sequential("huginn", max_new_tokens=16).tokens
    again = decode_wavefront(
        model_of("huginn"),
        PROMPTS,
        max_new_tokens=16,
        wave=WaveConfig(freeze="fixed", restart=True, inner=1),
        seeds=SEEDS,
        reference=want,
    )
    assert again.notes == found.notes
    names = ("wrong_to_right", "right_to_wrong", "wrong_to_wrong")
    other = wave_of(
        "huginn",
        freeze="fixed",
        restart=True,
        inner=1,
        max_new_tokens=16,
        options={"reference": [[-1] * 16] * 3},
    )
    assert other.notes["wrong_to_wrong"] == sum(found.notes[name] for name in names)
    assert other.notes["wrong_to_right"] == other.notes["right_to_wrong"] == other.notes["drafted_right"] == 0


# Bad input.


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        ({"inner": 0}, "inner=0 must be at least 1"),
        ({"width": 0}, "width=0"),
        ({"freeze": "never"}, "freeze='never'"),
        ({"embed_ema": 1.0}, "embed_ema=1.0"),
        ({"state_noise": -0.1}, "state_noise=-0.1"),
        ({"max_passes": 0}, "max_passes=0"),
        ({"compat": "reference", "freeze": "acceleration"}, "no compat"),
        ({"compat": "reference", "restart": True}, "no compat"),
    ],
)
def test_bad_settings_are_named(wave, message):
    with pytest.raises(ValueError, match=message):
        WaveConfig(**wave)


def test_what_has_no_wavefront_is_named():
    plain = tiny_model("llama")
    with pytest.raises(ValueError, match="share weights"):
        decode_wavefront(plain, PROMPTS, max_new_tokens=2)
    with pytest.raises(ValueError, match="share weights"):
        decode_wavefront(import_checkpoint(GOLDENS / "loopformer"), PROMPTS, max_new_tokens=2)
    for cache in ("monotone", "catch_up"):
        with pytest.raises(ValueError, match=f"{cache} has no wavefront"):
            wave_of("huginn", options={"cache": cache})
    with pytest.raises(ValueError, match="not random"):
        wave_of("ouro", state_noise=0.5)
    with pytest.raises(ValueError, match="one prompt at a time"):
        wave_of("huginn", compat="reference")
    with pytest.raises(ValueError, match="reference has 1 rows"):
        wave_of("huginn", options={"reference": [[1]]})

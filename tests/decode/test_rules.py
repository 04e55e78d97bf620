"""Every rule for skipped depth against plain loops over explicit keys and values, and its independence of the batch.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model

import loopwise
from loopwise.checkpoints.loading import import_checkpoint
from loopwise.decode.adaptive import decode_adaptive, follow_adaptive, policy_error
from loopwise.decode.cache import SlotCache
from loopwise.decode.result import next_span, prompt_span
from loopwise.decode.rules import SKIPPED, StorePolicy
from loopwise.decode.runner import Runner
from loopwise.decode.skipped import SkippedDepth
from loopwise.loop.halting import HazardHalting
from loopwise.loop.update import ConcatConfig
from loopwise.train.models import DecoderModel, Loop
from tests.checkpoints.foreign import GOLDENS
from tests.decode.naive import NaiveLlama

PROMPTS = [[1, 5, 9, 2, 4], [3, 8]]
TEXTS = [[7, 1, 1, 6, 9, 2, 4], [2, 2, 7, 5, 3, 8, 1]]
DEPTHS = [[4, 2, 4, 1, 1, 3, 4], [4, 1, 2, 4, 3, 1, 4]]  # the first is the prompt's
FALLING = [[4, 4, 3, 3, 2, 1, 1], [4, 2, 2, 2, 1, 1, 1]]
SHARED = [*SKIPPED, "last", "first", "ring(2)", "ring(3)", "stride(2)", "stride(3)"]
# name of the model -> its plan (None: plain), exits, and head, rungs, tail for the oracle
MODELS = {
    "loop": ("0 core:(1-4)x4 5", None, ([0], [[1, 2, 3, 4]] * 4, [5])),
    "whole loop": ("core:(0-5)x4", None, ([], [[0, 1, 2, 3, 4, 5]] * 4, [])),
    "layers": (None, [1, 2, 4], ([], [[0], [1], [2, 3], [4, 5]], [])),
    "visits of a loop": ("0 core:(1-4)x2 5", [3, 5, 7], ([], [[0, 1, 2], [3, 4], [1, 2], [3, 4, 5]], [])),
}


def made(name):
    plan, exits, parts = MODELS[name]
    model = tiny_model("llama").double()  # in float32 24 visits of one random layer amplify rounding to 1e-4
    oracle = NaiveLlama(copy.deepcopy(model), *parts, shared=exits is None)
    if plan is not None:
        loopwise.attach(model, plan)
    return model, ({} if exits is None else {"exits": exits}), oracle


def assert_close(got, want, message, tolerance=1e-9):
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"{message}: relative difference {float(error):.1e}"


def depths_for(policy):
    return FALLING if policy == "monotone" else DEPTHS


CASES = [(name, policy) for name in MODELS for policy in (SKIPPED if MODELS[name][1] else SHARED)]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_a_rule_is_what_it_says(name, policy):
    model, options, oracle = made(name)
    depths = depths_for(policy)
    got = follow_adaptive(model, PROMPTS, TEXTS, halting="fixed", depths=depths, cache=policy, **options)
    assert got.depths == depths
    for prompt, text, row, logits_TV in zip(PROMPTS, TEXTS, depths, got.logits, strict=True):
        every = [4] * len(prompt) + row[1:]
        want_TV = oracle.logits([*prompt, *text[:-1]], every, policy)
        assert_close(logits_TV, want_TV[len(prompt) - 1 :], f"{name}, {policy}")


@pytest.mark.parametrize(("name", "policy"), [case for case in CASES if case[0] in ("loop", "layers")])
def test_a_row_does_not_depend_on_its_mates(name, policy):
    model, options, _ = made(name)
    options |= {"halting": "confidence(0.1)", "max_new_tokens": 6, "cache": policy}
    prompts = [[1, 5, 9, 2, 4], [3], [8, 8, 1]]
    found = decode_adaptive(model, prompts, **options)
    alone = [decode_adaptive(model, [prompt], **options) for prompt in prompts]
    assert found.tokens == [one.tokens[0] for one in alone] and found.depths == [one.depths[0] for one in alone]
    assert found.visits == sum(one.visits for one in alone)


def test_the_halting_of_that_test_gives_different_depths():
    for name in ("loop", "layers"):
        model, options, _ = made(name)
        found = decode_adaptive(model, PROMPTS, halting="confidence(0.1)", max_new_tokens=6, cache="copy", **options)
        assert len({depth for row in found.depths for depth in row[1:]}) > 1, name


# --- exact rules, on many architectures ------------------------------------------------------------------------------

MOE = ("mixtral", "deepseek_v3")  # float32, which 18 visits of random layers amplify: no grouped products in float64
KINDS = ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3", "opt", "olmo2", "falcon", "deepseek_v3"]


@torch.no_grad()
@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("policy", ["catch_up", "monotone"])
def test_exact_rules_equal_the_model_with_fewer_iterations(model_type, policy):
    """With nothing after the loop, the model of n iterations is what a token of depth n reads."""
    model = loopwise.attach(tiny_model(model_type), "0-1 core:(2-5)x4")
    model, tolerance = (model, 1e-4) if model_type in MOE else (model.double(), 1e-9)
    depths = depths_for(policy)
    got = follow_adaptive(model, PROMPTS, TEXTS, halting="fixed", depths=depths, cache=policy)
    for prompt, text, row, logits_TV in zip(PROMPTS, TEXTS, depths, got.logits, strict=True):
        ids_BT = torch.tensor([[*prompt, *text[:-1]]])
        for n, depth in enumerate(row):
            want_V = model(ids_BT, loops=depth).logits[0, len(prompt) - 1 + n]
            assert_close(logits_TV[n], want_V, f"{model_type}, token {n} of depth {depth}", tolerance)


@torch.no_grad()
@pytest.mark.parametrize("model_type", KINDS)
def test_catching_up_between_layers_equals_the_model_cut_short(model_type):
    plain = tiny_model(model_type)
    plain, tolerance = (plain, 1e-4) if model_type in MOE else (plain.double(), 1e-9)
    exits = [1, 2, 4, 6]
    cut = {n: loopwise.attach(copy.deepcopy(plain), f"0-{exits[n - 1] - 1}") for n in (1, 2, 3, 4)}
    got = follow_adaptive(plain, PROMPTS, TEXTS, halting="fixed", depths=DEPTHS, cache="catch_up", exits=exits)
    for prompt, text, row, logits_TV in zip(PROMPTS, TEXTS, DEPTHS, got.logits, strict=True):
        ids_BT = torch.tensor([[*prompt, *text[:-1]]])
        for n, depth in enumerate(row):
            want_V = cut[depth](ids_BT).logits[0, len(prompt) - 1 + n]
            assert_close(logits_TV[n], want_V, f"{model_type}, token {n}", tolerance)


@torch.no_grad()
def test_rows_at_other_rungs_are_caught_up_in_one_call():
    """As an engine has them: while one row is at rung 3 another begins, and both have tokens that wait."""
    model, _, oracle = made("loop")
    runner = Runner(model, num_rows=2, capacity=12, cache="catch_up")
    skipped = SkippedDepth(runner)
    runner.prefill(prompt_span(PROMPTS, runner.device))
    ends, at, tokens = [[1, 2, 4], [2, 1, 3]], [0, -3], [[], []]
    carries, logits = [None, None], [[], []]
    while min(len(done) for done in logits) < 3:
        busy = [row for row in (0, 1) if at[row] >= 0 and len(logits[row]) < 3]
        spans = {}
        for row in busy:
            n = len(logits[row])
            spans[row] = next_span([row], [TEXTS[row][n]], [len(PROMPTS[row]) + n], runner.device)
            if at[row] == 0:
                carries[row], tokens[row] = runner.enter(spans[row]), [*tokens[row], TEXTS[row][n]]
        if busy:
            span = next_span(
                busy,
                [int(spans[row].tokens_bt) for row in busy],
                [int(spans[row].positions_bt) for row in busy],
                runner.device,
            )
            both = carries[busy[0]] if len(busy) == 1 else joined(carries)
            both = skipped.climb(span, both, torch.tensor([at[row] for row in busy]))
            for place, row in enumerate(busy):
                carries[row] = both.take(torch.tensor([place]))
                if at[row] + 1 == ends[row][len(logits[row])]:
                    logits[row].append(runner.leave(spans[row], carries[row])[0, 0])
                    skipped.left(spans[row], carries[row], at[row] + 1)
                    at[row] = -1
        at = [rung + 1 for rung in at]
    for row in (0, 1):
        every = [4] * len(PROMPTS[row]) + ends[row]
        want_TV = oracle.logits([*PROMPTS[row], *tokens[row]], every, "catch_up")
        assert_close(torch.stack(logits[row]), want_TV[len(PROMPTS[row]) :], f"row {row}")
    assert skipped.num_waiting(0) == 0 and skipped.num_waiting(1) == 3
    skipped.forget(1)
    assert skipped.num_waiting(1) == 0


def joined(carries):
    state_btD = torch.cat([carry.state_btD for carry in carries])
    return type(carries[0])(state_btD=state_btD)


def test_monotone_depth_never_grows_and_lacks_nothing():
    model, options, _ = made("whole loop")
    found = decode_adaptive(model, PROMPTS, halting="confidence(0.1)", max_new_tokens=8, cache="monotone", **options)
    for row in found.depths:
        assert row == sorted(row, reverse=True) and 1 < len(set(row))
    assert policy_error(model, PROMPTS, found, cache="monotone").max_abs < 1e-9


# --- our own decoders ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_absent_is_what_our_decoder_does_with_tokens_that_have_left():
    model, rule = import_checkpoint(GOLDENS / "ouro").double(), HazardHalting(threshold=0.5)
    found = decode_adaptive(model, PROMPTS[:1], halting=rule, max_new_tokens=8, cache="absent")
    cache = loopwise.models.hub.new_cache(model)
    loopwise.set_cache(model, "selected")
    token = model(torch.tensor(PROMPTS[:1]), past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    tokens, depths = [token.item()], [4]
    while len(tokens) < 8:
        output = model(token, past_key_values=cache, use_cache=True, halting=rule, on_exit="skip")
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(token.item())
        depths.append(output.exits.item() + 1)
    assert found.tokens == [tokens] and found.depths == [depths]
    assert len(set(depths[1:])) > 1


@torch.no_grad()
@pytest.mark.parametrize("policy", ["propagate", "catch_up"])
def test_what_re_enters_a_loop_re_enters_at_skipped_depth_too(policy):
    """A core of one layer: at skipped depth `propagate` has its keys of the state with which the token left."""
    model, _ = DecoderModel(layers=3, width=16, heads=2, plan="0 core:(1)x4 2", loop=Loop(update=ConcatConfig())).build(
        11, seed=0
    )
    model.double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids_BT = torch.tensor([[*PROMPTS[0], *TEXTS[0][:-1]]])
    depths_T = torch.tensor([4] * len(PROMPTS[0]) + DEPTHS[0][1:])
    states = []

    def freeze(_, args, output_BTD):
        kept = policy == "propagate" and states
        states.append(torch.where((depths_T > len(states))[:, None], output_BTD, states[-1]) if kept else output_BTD)
        if policy == "catch_up" and len(states) == 4:  # keys are those of full depth, what leaves is not
            return torch.stack(states)[depths_T - 1, 0, torch.arange(len(depths_T))][None]
        return states[-1]

    handle = model.model.layers[1].register_forward_hook(freeze)
    want_TV = model(ids_BT).logits[0, len(PROMPTS[0]) - 1 :]
    handle.remove()
    got = follow_adaptive(model, PROMPTS[:1], TEXTS[:1], halting="fixed", depths=DEPTHS[:1], cache=policy)
    assert_close(got.logits[0], want_TV, policy)


# --- errors are measured, and what does not fit is refused -----------------------------------------------------------


@pytest.mark.parametrize("policy", ["copy", "propagate", "absent", "catch_up"])
@pytest.mark.parametrize("name", ["loop", "layers"])
def test_the_error_of_a_policy_is_measured_on_the_tokens_that_were_made(name, policy):
    model, options, oracle = made(name)
    found = decode_adaptive(model, PROMPTS, halting="confidence(0.1)", max_new_tokens=5, cache=policy, **options)
    error = policy_error(model, PROMPTS, found, cache=policy, **options)
    assert error.tokens == 10 and 1 <= error.mean_depth <= 4 and error.policy == policy
    largest = 0.0
    for prompt, tokens, row in zip(PROMPTS, found.tokens, found.depths, strict=True):
        every = [4] * len(prompt) + row[1:]
        got, exact = (oracle.logits([*prompt, *tokens[:-1]], every, kind) for kind in (policy, "catch_up"))
        largest = max(largest, (got - exact)[len(prompt) - 1 :].abs().max().item())
    assert error.max_abs == pytest.approx(largest, rel=1e-4, abs=1e-6)
    if StorePolicy.parse(policy).is_exact:
        assert (
            error.max_abs < 1e-5
            and error.same_top1 == 1
            and str(error) == (f"cache policy {policy} is exact at the depths that tokens have")
        )
    else:
        assert error.max_abs > 1e-3 and error.mean_kl > 0
        assert ("defines another model" if policy == "absent" else "is approximate") in str(error)


@pytest.mark.parametrize("policy", ["last", "first", "ring(2)", "stride(2)", "own/last"])
def test_stores_of_a_loop_are_refused_between_layers(policy):
    with pytest.raises(ValueError, match="weights of their own: use copy, latest, propagate"):
        decode_adaptive(tiny_model("llama"), PROMPTS, halting="fixed(2)", max_new_tokens=2, cache=policy)


def test_depths_that_monotone_does_not_have_are_refused():
    model, options, _ = made("loop")
    with pytest.raises(ValueError, match="no token goes deeper"):
        follow_adaptive(model, PROMPTS, TEXTS, halting="fixed", depths=DEPTHS, cache="monotone", **options)


def test_keys_of_another_shape_are_not_copied():
    cache, one = SlotCache(1, 4, torch.device("cpu")), torch.tensor([0])
    span = next_span([0], [1], [0], torch.device("cpu"))
    for name, heads in (("a", 2), ("b", 4)):
        cache.view(name, 1, 0, span, 1).update(torch.ones(1, heads, 1, 8), torch.ones(1, heads, 1, 8), 0)
    with pytest.raises(ValueError, match="cannot be copied, use cache='propagate' or 'catch_up'"):
        cache.copy_visit("a", "b", one, one)


@pytest.mark.parametrize("text", ["lats", "own/latest", "ring(0)", "selected", "last/own", ""])
def test_unknown_policies_are_refused_in_one_line(text):
    with pytest.raises(ValueError) as found:
        StorePolicy.parse(text)
    assert "\n" not in str(found.value)

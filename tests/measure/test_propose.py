"""Proposals: what is planted is found, what is said is what was measured, and the model stays as it was."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import loopwise
from loopwise.edit.operators import DepthOperator
from loopwise.edit.text import parse
from loopwise.measure.candidates import (
    Candidate,
    described,
    loop_candidates,
    merged,
    prune_candidates,
    tie_candidates,
)
from loopwise.measure.influence import influence
from loopwise.measure.loss_jump import row_losses
from loopwise.measure.propose import Proposals, propose
from loopwise.measure.similarity import weight_similarity
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.plan import Plan

TYPES = "llama gpt2 mixtral mamba2 jamba qwen3_next gemma3_text olmo2 bloom falcon_h1".split()


def ids(seed: int, rows: int = 4, tokens: int = 9) -> torch.Tensor:
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


CHOOSE, REPORT = [ids(0)], [ids(1)]


def ours(num_layers: int, plan: str) -> nn.Module:
    block = BlockConfig(hidden_size=16, mixer=AttentionConfig(num_heads=2), mlp=MLPConfig(intermediate_size=24))
    config = LoopwiseDecoderConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=num_layers,
        blocks=[block.to_dict()],
        plan=plan,
        norm={"type": "rms"},
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LoopwiseForCausalLM(config)


def by_kind(found: Proposals) -> dict:
    return {item.candidate.kind: item for item in found.proposals}


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_said_is_what_was_measured(model_type: str) -> None:
    model = tiny_model(model_type)
    twin = copy.deepcopy(model)
    found = propose(model, CHOOSE, REPORT)
    assert loopwise.plan_of(model) is None and not found.notes
    before = row_losses(twin, REPORT).mean
    for proposal in found.proposals:
        item = proposal.candidate
        operator = parse(item.text)
        assert operator == item.operator and isinstance(operator, DepthOperator)
        edit = operator.edit(Plan.identity(6), 6)
        if item.kind != "retrofit":
            assert edit.alias_plan() == item.alias
        assert proposal.loss.before == pytest.approx(before, abs=1e-6)
        loopwise.attach(twin, item.alias)
        assert proposal.loss.after == pytest.approx(row_losses(twin, REPORT).mean, abs=1e-6)
        assert proposal.choice.after == pytest.approx(row_losses(twin, CHOOSE).mean, abs=1e-6)
        loopwise.detach(twin)
        same = [jump.after for other, jump in found.measured if (other.kind, other.count) == (item.kind, item.count)]
        assert proposal.choice.after == min(same) and proposal.tried == len(same)
    assert {"prune", "loop", "tie", "tie_block"} <= {item.candidate.kind for item in found.proposals}
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [item["operator"] for item in read["proposals"]] == [item.candidate.text for item in found.proposals]
    assert len(read["influence"]["influence"]) == read["weights"]["num_layers"] == 6


def silenced(model: nn.Module, *layers: int, factor: float = 0.0) -> nn.Module:
    with torch.no_grad():
        for layer in layers:
            block = model.get_submodule(f"model.layers.{layer}")
            block.get_parameter("mlp.down_proj.weight").mul_(factor)
            block.get_parameter("self_attn.o_proj.weight").mul_(factor)
    return model


def test_layers_that_do_nothing_are_pruned() -> None:
    model = silenced(tiny_model("llama", num_layers=8), 3, 4)
    best = by_kind(propose(model, CHOOSE, REPORT, prune=[2], loop=[], tie=[]))["prune"]
    assert best.candidate.text == "prune(layers=[3, 4])" and best.tried == 1
    assert best.loss.jump == pytest.approx(0, abs=1e-6) and not best.loss.is_above_noise
    assert best.candidate.evidence["angular_distance_last"] == pytest.approx(0, abs=1e-6)
    # Three rules, one edit, all reasons.
    assert [word in best.candidate.reason for word in ("last tokens", "all tokens", "block influence")] == [True] * 3
    apart = silenced(tiny_model("llama", num_layers=8), 2, 5)
    measured = propose(apart, CHOOSE, REPORT, prune=[2], loop=[], tie=[]).measured
    jumps = {item.text: jump.jump for item, jump in measured}
    assert len(jumps) >= 2  # they are no block
    assert jumps["prune(layers=[2, 5])"] == pytest.approx(0, abs=1e-6)


def set_equal(model: nn.Module, *pairs: tuple[int, int]) -> nn.Module:
    for copied, source in pairs:
        state = model.get_submodule(f"model.layers.{source}").state_dict()
        model.get_submodule(f"model.layers.{copied}").load_state_dict(state)
    return model


def test_equal_blocks_are_tied() -> None:
    model = set_equal(tiny_model("llama", num_layers=16), (7, 5), (8, 6))
    found = propose(model, CHOOSE, REPORT, prune=[], loop=[], tie=[2])
    best = by_kind(found)["tie_block"]
    assert best.candidate.text == 'tie(plan="0-4 (5-6)x2 7-13", init=first)'
    assert best.loss.jump == pytest.approx(0, abs=1e-6)
    assert best.candidate.evidence["weight_cosine"] == pytest.approx(1)
    assert abs(best.candidate.evidence["weight_chance"]) < 0.01
    assert "layers 5-6 and layers 7-8 are most alike by weight" in best.candidate.reason


def test_a_stack_that_repeats_is_made_a_loop() -> None:
    model = set_equal(tiny_model("llama"), (3, 0), (4, 1), (5, 2))
    found = by_kind(propose(model, CHOOSE, REPORT, prune=[], loop=[], tie=[2, 3]))
    assert found["tie"].candidate.count == 3  # the last of the two counts
    texts = [item.candidate.text for item in propose(model, CHOOSE, REPORT, prune=[], loop=[], tie=[2]).proposals]
    # The cycle has the most alike layers; a stepwise start takes layers 0, 2 and 5, which are 0, 2 and 2.
    assert texts[0] in ("recursive(loops=2)", "recursive(loops=2, sharing=cycle)") or "sequence" in texts[0]
    candidates = tie_candidates(influence(model, CHOOSE), weight_similarity(model).mean(), 2)
    cycle = next(item for item in candidates if item.text == "recursive(loops=2, sharing=cycle)")
    assert cycle.evidence["weight_cosine"] == pytest.approx(1)


def test_the_loop_is_where_the_state_turns_least() -> None:
    model = silenced(tiny_model("llama", num_layers=16), *range(4, 12), factor=0.05)
    silenced(model, 6, 7, factor=0.0)
    for layer, factor in ((12, 4), (13, 8), (14, 16), (15, 32)):  # the state has grown on the way
        silenced(model, layer, factor=factor)
    found = influence(model, CHOOSE)
    split = found.split()
    assert split is not None and described(split) == "prelude layers 0-3, core layers 4-11, coda layers 12-15"
    texts = [item.text for item in loop_candidates(found, split, 3)]
    assert texts[0] == "repeat(i=4, j=12, times=3)" and "repeat(i=6, j=8, times=3)" in texts
    found = propose(model, CHOOSE, REPORT, prune=[], loop=[3], tie=[])
    jumps = {item.text: jump.jump for item, jump in found.measured if item.kind == "loop"}
    assert jumps["repeat(i=6, j=8, times=3)"] == pytest.approx(0, abs=1e-6)
    retrofit = by_kind(found)["retrofit"].candidate
    assert retrofit.text == "retrofit(prelude=4, core=8, coda=4)" and str(retrofit.alias) == "0-3 core:(4-11)x3 12-15"


def test_rows_that_choose_do_not_report() -> None:
    model = tiny_model("llama")
    one, other = (propose(model, CHOOSE, [ids(seed)], tie=[]) for seed in (1, 2))
    for a, b in zip(one.proposals, other.proposals, strict=True):
        assert a.candidate == b.candidate and a.choice.to_json() == b.choice.to_json()
        assert a.loss.before != b.loss.before
    np.testing.assert_array_equal(one.influence.angle, influence(model, CHOOSE).angle)


@pytest.mark.parametrize("num_layers", [2, 3, 4, 5, 7])
def test_small_stacks(num_layers: int) -> None:
    found = propose(tiny_model("llama", num_layers=num_layers), CHOOSE, REPORT)
    assert {"prune", "loop", "tie"} <= {item.candidate.kind for item in found.proposals}
    assert all(math.isfinite(item.loss.after) for item in found.proposals)


def test_attached_models_and_our_own() -> None:
    model = tiny_model("llama")
    want = [(item.candidate.text, item.loss.after) for item in propose(model, CHOOSE, REPORT).proposals]
    loopwise.attach(model, "0-5")
    got = [(item.candidate.text, item.loss.after) for item in propose(model, CHOOSE, REPORT).proposals]
    assert [text for text, _ in got] == [text for text, _ in want]
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in want], abs=1e-6)
    assert str(loopwise.plan_of(model)) == "0-5"
    decoder = ours(6, "0-5")
    found = propose(decoder, CHOOSE, REPORT)
    assert {"prune", "loop", "tie", "tie_block"} <= {item.candidate.kind for item in found.proposals}
    assert not found.notes and str(loopwise.plan_of(decoder)) == "0-5"


def test_plans_that_do_not_run_are_noted() -> None:
    """A later layer of this model reads which tokens layer 0 has chosen, though layer 0 here adds nothing."""
    model = silenced(tiny_model("glm_moe_dsa"), 0)
    found = propose(model, CHOOSE, REPORT, prune=[1], loop=[], tie=[2])
    assert len(found.notes) == 1 and found.notes[0].startswith("prune(layers=[0]) does not run: ")
    assert {"tie", "tie_block"} == {item.candidate.kind for item in found.proposals}
    assert loopwise.plan_of(model) is None


def test_reasons_of_one_edit_are_merged() -> None:
    found = influence(tiny_model("llama"), CHOOSE)
    items = list(prune_candidates(found, 2))
    once = merged([*items, *items])
    assert len({item.text for item in items}) == len(once)
    assert isinstance(once[0], Candidate) and once[0].reason.count("; ") >= 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"prune": [6]}, "prune 6: of 6 layers, leave out 1 to 5"),
        ({"prune": [0]}, "prune 0"),
        ({"loop": [1]}, "loop 1: .* at least 2 times"),
        ({"tie": [5]}, "tie 5: divides neither 6 layers nor the 4 between the ends, use one of 2, 3, 4, 6"),
        ({"tie": [1]}, "tie 1"),
    ],
)
def test_counts_that_no_edit_has(counts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propose(tiny_model("llama"), CHOOSE, REPORT, **counts)


def test_models_that_are_refused() -> None:
    with pytest.raises(ValueError, match="single layer"):
        propose(tiny_model("llama", num_layers=1), CHOOSE, REPORT)
    with pytest.raises(ValueError, match="looped already"):
        propose(ours(4, "0 core:(1-2)x2 3"), CHOOSE, REPORT)
    looped = tiny_model("llama")
    loopwise.attach(looped, "0 core:(1-4)x2 5")
    with pytest.raises(ValueError, match="looped already"):
        propose(looped, CHOOSE, REPORT)
    config = T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        propose(T5ForConditionalGeneration(config), CHOOSE, REPORT)

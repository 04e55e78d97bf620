"""What a model with a plan returns: tuples, precisions, hidden states, attentions."""

from __future__ import annotations

import pytest
import torch
from laws import assert_close
from tiny import tiny_inputs, tiny_model

import loopwise
from tests.models.common import BREADTH, LOOPED, logits, looped


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("model_type", BREADTH)
def test_returns_tuples_and_dicts_as_before(model_type, return_dict):
    model, ids_BT = looped(model_type)
    with torch.no_grad():
        output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), return_dict=return_dict)
    assert isinstance(output, tuple) is not return_dict
    assert torch.equal(output[0], logits(model, ids_BT, attention_mask=torch.ones_like(ids_BT)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "mamba2", "qwen3_next", "bloom"])
def test_dtype_changes_after_attach(model_type, dtype):
    model, ids_BT = looped(model_type)
    plain = loopwise.materialize(model).to(dtype)
    model.to(dtype)
    got, want = logits(model, ids_BT), logits(plain, ids_BT)
    assert got.dtype == want.dtype and {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(got, want), "the looped and the unrolled model differ in this precision"


def test_attach_in_half_precision():
    model = loopwise.attach(tiny_model("llama").to(torch.bfloat16), LOOPED)
    ids_BT = tiny_inputs(model)
    plain = loopwise.materialize(model)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(model, ids_BT), logits(plain, ids_BT))


SELF_COLLECTING = ["gpt2", "bloom", "mamba", "mamba2", "opt", "bert", "recurrent_gemma", "zamba"]
HOOK_COLLECTING = ["llama", "gemma3_text", "mixtral", "falcon_h1", "qwen3_next", "lfm2"]


@pytest.mark.parametrize("model_type", SELF_COLLECTING + HOOK_COLLECTING)
def test_hidden_states_are_those_of_the_unrolled_model(model_type):
    model, ids_BT = looped(model_type)
    num_slots = loopwise.plan_of(model).num_slots
    with torch.no_grad():
        got = model(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
        want = loopwise.materialize(model)(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
    assert len(got) == len(want) == num_slots + 1
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"hidden state {i}")


@pytest.mark.parametrize("plan", ["0", "(0)x2", "0-1", "core:(0-1)x2", "1 0"])
@pytest.mark.parametrize("model_type", ["llama", "bloom", "mamba"])
def test_hidden_states_of_shallow_models(model_type, plan):
    """Few layers leave little to tell what collected the states: the forward or hooks."""
    model = tiny_model(model_type, num_layers=2 if "1" in plan else 1)
    ids_BT = tiny_inputs(model)
    loopwise.attach(model, plan)
    with torch.no_grad():
        got = model(ids_BT, output_hidden_states=True).hidden_states
        want = loopwise.materialize(model)(ids_BT, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == loopwise.plan_of(model).num_slots + 1
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"hidden state {i}")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mamba2"])
def test_hidden_states_after_detach_are_those_of_the_plain_model(model_type):
    model, ids_BT = looped(model_type)
    with torch.no_grad():
        model(ids_BT, output_hidden_states=True)
        got = loopwise.detach(model)(ids_BT, output_hidden_states=True).hidden_states
        want = tiny_model(model_type)(ids_BT, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 7
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_hidden_states_follow_the_configuration_and_the_counts_of_the_call():
    model, ids_BT = looped("bloom")
    model.config.output_hidden_states = True
    assert len(model(ids_BT).hidden_states) == 11
    assert len(model(ids_BT, loops=1).hidden_states) == 7


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "bloom", "gemma3_text", "mixtral", "deepseek_v3", "opt", "bert"]
)
def test_attentions_are_those_of_the_unrolled_model_or_refused_by_name(model_type):
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    ids_BT = tiny_inputs(model)
    plan = "0-2 core:(3-4)x2 5" if model_type == "deepseek_v3" else LOOPED
    loopwise.attach(model, plan)
    with torch.no_grad():
        try:
            got = model(ids_BT, output_attentions=True).attentions
        except ValueError as error:
            assert "attentions" in str(error) and "not available under a plan" in str(error)
            assert torch.isfinite(logits(model, ids_BT)).all()
            return
        want = loopwise.materialize(model)(ids_BT, output_attentions=True).attentions
    assert len(got) == len(want) == loopwise.plan_of(model).num_slots
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"attention {i}")


def test_router_logits_are_those_of_the_unrolled_model():
    model, ids_BT = looped("mixtral")
    with torch.no_grad():
        got = model(ids_BT, output_router_logits=True).router_logits
        want = loopwise.materialize(model)(ids_BT, output_router_logits=True).router_logits
    assert len(got) == len(want) == 10
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"router logits {i}")

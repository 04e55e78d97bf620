"""Laws 2, 5 and 6 of edits over many architectures.

Law 2: alias, tied and materialised model compute the same, and the gradient of a tied layer is the sum over its copies.
Law 5: edits that claim to keep the function do. Law 6: untie and tie again of equal copies is the identity.
"""

from __future__ import annotations

import pytest
import torch
from laws import assert_close, unrolling
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.edit.apply import apply, plan_edit, tensor_sources
from loopwise.models.hub import layer_list
from loopwise.models.realise import LayerNames, tensors_of
from tests.models.common import logits

DENSE = ["llama", "qwen3", "phi3", "cohere2", "exaone4", "smollm3", "apertus"]
SANDWICH = ["gemma2", "gemma3_text", "olmo2", "glm4"]
BIASED = ["qwen2", "starcoder2", "stablelm", "phi", "jais2", "opt", "roberta-prelayernorm"]
GPT2_STYLE = ["gpt2", "gpt_neo", "gptj", "bloom", "falcon"]
EXPERTS = ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3", "dbrx"]
RECURRENT = ["mamba", "mamba2"]
HYBRID = ["recurrent_gemma", "bamba", "falcon_h1", "qwen3_next", "lfm2", "nemotron_h"]
TYPES = DENSE + SANDWICH + BIASED + GPT2_STYLE + EXPERTS + RECURRENT + HYBRID
# Visits 2 and 3 come twice: behind leading dense layers, and with kinds of layers in another order than before.
REPEAT = "repeat(2, 4, 2)"
LOOPED = "0-1 core:(2-3)x2 4-5"


def generate(model, ids_BT):
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)


def layer_storages(model):
    """Addresses of the parameters of each layer."""
    return [{p.untyped_storage().data_ptr() for p in layer.parameters()} for layer in layer_list(model).layers]


def test_the_architectures_are_many_and_of_all_sorts():
    assert len(set(TYPES)) == len(TYPES) >= 25


@pytest.mark.parametrize("model_type", TYPES)
def test_three_realisations_compute_the_same(model_type):
    ids_BT = tiny_inputs(tiny_model(model_type))
    alias, tied, plain = (apply(tiny_model(model_type), REPEAT, mode=mode) for mode in ("alias", "tie", "materialize"))
    assert loopwise.plan_of(alias) == loopwise.plan_of(tied) and loopwise.plan_of(plain) is None
    assert len(layer_list(tied).layers) == 6 and len(layer_list(plain).layers) == 8
    want = logits(alias, ids_BT)
    assert not torch.equal(want, logits(tiny_model(model_type), ids_BT)), "the edit changes nothing"
    assert_close(logits(tied, ids_BT), want, "tied")
    assert_close(logits(plain, ids_BT), want, "materialised")
    tokens = generate(alias, ids_BT)
    assert torch.equal(generate(tied, ids_BT), tokens) and torch.equal(generate(plain, ids_BT), tokens)
    unrolling(tied, plain, loopwise.plan_of(tied).layers, ids_BT)


@pytest.mark.parametrize("model_type", TYPES)
def test_zeroed_layers_keep_the_function_exactly_and_can_learn(model_type):
    model = tiny_model(model_type)
    ids_BT = tiny_inputs(model)
    edit = plan_edit(model, "llama_pro(every=3)")
    assert edit.promise == "exact"
    new = apply(model, "llama_pro(every=3)")
    assert len(layer_list(new).layers) == 8
    assert torch.equal(logits(new, ids_BT), logits(model, ids_BT)), "0.0 is promised"
    assert torch.equal(generate(new, ids_BT), generate(model, ids_BT))
    assert_close(logits(apply(new, "prune([3, 7])"), ids_BT), logits(model, ids_BT), "without them")
    new.train()
    logits_BTV = new(ids_BT, use_cache=False).logits
    (logits_BTV * torch.linspace(-1, 1, logits_BTV.numel()).view_as(logits_BTV)).sum().backward()
    split, sources = LayerNames(new).split, tensor_sources(model, new, edit)
    reached = set()
    for name, parameter in new.named_parameters():
        if sources[name].zero:
            assert not parameter.any(), f"{name} is to be zero"
            if parameter.grad is not None and parameter.grad.any():
                reached.add(split(name)[1])
    assert reached == {3, 7}, "no gradient reaches the new layers"


@pytest.mark.parametrize("model_type", TYPES)
def test_untying_keeps_the_looped_function_and_tying_again_gives_every_bit_back(model_type):
    looped = loopwise.attach(tiny_model(model_type), LOOPED)
    ids_BT = tiny_inputs(looped)
    before = {name: tensor.clone() for name, tensor in tensors_of(looped).items()}
    untied = apply(looped, "untie")
    assert_close(logits(untied, ids_BT, use_cache=False), logits(looped, ids_BT, use_cache=False), "untied")
    assert plan_edit(looped, "untie").promise == "exact"
    again = apply(untied, f'tie("{LOOPED}")')
    assert loopwise.plan_of(again) == loopwise.Plan.parse(LOOPED)
    after = tensors_of(again)
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    # Unique storages are what the plan says: one set per layer, nothing between layers or models.
    for model, num_layers in ((looped, 6), (untied, 8), (again, 6)):
        per_layer = layer_storages(model)
        assert len(per_layer) == num_layers
        assert len(set().union(*per_layer)) == sum(map(len, per_layer)), "layers share a tensor"
    everywhere = [set().union(*layer_storages(model)) for model in (looped, untied, again)]
    assert not everywhere[0] & everywhere[1] and not everywhere[1] & everywhere[2] and not everywhere[0] & everywhere[2]

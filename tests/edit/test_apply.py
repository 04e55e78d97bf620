"""Edits in memory: realisations, where tensors come from, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_inputs, tiny_model
from torch import nn

import loopwise
from loopwise.edit.apply import TensorSource, apply, plan_edit, realise, tensor_sources
from loopwise.edit.surgery import Order, Repeat
from loopwise.edit.width import Widen
from loopwise.models.hub import layer_list
from loopwise.models.relaxation import add_relaxation
from tests.models.common import logits


def same_tensors(one, two):
    """Whether two models have the same tensors bit for bit under the same names."""
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_alias_is_the_same_model_with_another_plan():
    model = tiny_model("llama")
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    assert apply(model, Repeat(i=1, j=3), mode="alias") is model
    assert str(loopwise.plan_of(model)) == "0 (1-2)x2 3-5"
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == {
        name: at for name, (at, _) in before.items()
    }
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


def test_alias_of_an_attached_model_keeps_its_policy_and_is_undone_by_a_refusal():
    model = loopwise.attach(tiny_model("gemma3n_text"), "0-5", cache="own", on_deeper="catch_up")
    with pytest.raises(ValueError, match="does not run under plan"):
        apply(model, "prune([0, 1, 2, 3])", mode="alias")
    assert str(loopwise.plan_of(model)) == "0-5"
    other = loopwise.attach(tiny_model("llama"), "0-5", cache="own", on_deeper="catch_up")
    apply(other, "double", mode="alias")
    assert other.model.loopwise.policy.on_deeper == "catch_up"
    assert loopwise.plan_of(apply(other, "untie")) is None


@pytest.mark.parametrize("mode", ["tie", "materialize"])
def test_new_models_leave_the_old_one_alone(mode):
    model = tiny_model("llama")
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    new = apply(model, "repeat(1, 3)", mode=mode)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert loopwise.plan_of(model) is None and model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_mode_dtype_training_flags_and_random_numbers_are_kept():
    model = tiny_model("llama").to(torch.bfloat16).train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.set_attn_implementation("eager")
    state = torch.get_rng_state()
    new = apply(model, Order(layers=(0, 1, 2, 2), zero=(3,)))
    assert torch.equal(torch.get_rng_state(), state), "global random numbers were drawn"
    assert new.training and [layer.training for layer in new.model.layers] == [True, False, True, True]
    assert new.dtype == torch.bfloat16
    flags = [layer.mlp.up_proj.weight.requires_grad for layer in new.model.layers]
    assert flags == [True, True, False, False]
    assert new.is_gradient_checkpointing and new.config._attn_implementation == "eager"
    assert type(new) is type(model) and len(new.model.layers) == new.config.num_hidden_layers == 4
    assert loopwise.plan_of(model) is None and model.training


def test_tensors_of_another_dtype_keep_theirs():
    model = tiny_model("mamba2").to(torch.bfloat16)
    for layer in model.backbone.layers:
        layer.mixer.A_log.data = layer.mixer.A_log.data.float() + 1e-4
    new = apply(model, "repeat(0, 2)", mode="materialize")
    assert new.dtype == torch.bfloat16 and new.backbone.layers[2].mixer.D.dtype == torch.bfloat16
    assert torch.equal(new.backbone.layers[2].mixer.A_log, model.backbone.layers[0].mixer.A_log)
    assert new.backbone.layers[2].mixer.A_log.dtype == torch.float32


@pytest.mark.parametrize("operator", ["llama_pro(every=2)", "recursive(2, init=average)"])
def test_tied_embeddings_stay_tied(operator):
    model = tiny_model("gpt2")
    new = apply(model, operator)
    assert new.lm_head.weight is new.transformer.wte.weight
    by_hand = tiny_model("llama")
    assert by_hand.lm_head.weight is not by_hand.model.embed_tokens.weight
    by_hand.lm_head.weight = by_hand.model.embed_tokens.weight
    new = apply(by_hand, operator)
    assert new.lm_head.weight is new.model.embed_tokens.weight
    apart = tiny_model("gpt2")
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight * 2)
    with pytest.raises(ValueError, match="ties tensor lm_head.weight, and here it is not tied"):
        apply(apart, operator)


def test_the_mean_is_that_of_the_tensors_and_of_equal_ones_exactly_the_one():
    model = tiny_model("llama")
    new = apply(model, "recursive(2, sharing=cycle, init=average)")
    old = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    for number in range(3):
        want = (old[number].double() + old[number + 3].double()) / 2
        got = new.model.layers[number].self_attn.q_proj.weight
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    equal = tiny_model("llama").to(torch.bfloat16)
    for layer in equal.model.layers:
        layer.load_state_dict(equal.model.layers[0].state_dict())
    mean = apply(equal, "recursive(3, sharing=cycle, init=average)")
    for number in range(2):
        ours = mean.model.layers[number].state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in equal.model.layers[0].state_dict().items())


def test_factors_multiply_the_first_fitting_tensors_but_not_zeroed_ones():
    model = tiny_model("llama")
    rules = ("1 down_proj 0.5", "1 * 2", "2 * 3")
    new = apply(model, Order(layers=(0, 1, 1), zero=(2,), scale=rules))
    old, halved, zeroed = model.model.layers[1], new.model.layers[1], new.model.layers[2]
    assert torch.equal(halved.mlp.down_proj.weight, old.mlp.down_proj.weight * 0.5)
    assert torch.equal(halved.mlp.up_proj.weight, old.mlp.up_proj.weight * 2)
    assert torch.equal(zeroed.mlp.up_proj.weight, old.mlp.up_proj.weight * 3)
    assert not zeroed.mlp.down_proj.weight.any() and not zeroed.self_attn.o_proj.weight.any()


def test_sources_say_where_every_parameter_comes_from():
    model = tiny_model("gpt2")
    edit = plan_edit(model, "llama_pro(every=3)")
    sources = tensor_sources(model, apply(model, "llama_pro(every=3)"), edit)
    assert sources["transformer.wte.weight"] == TensorSource(names=("transformer.wte.weight",))
    assert sources["transformer.h.4.mlp.c_fc.bias"] == TensorSource(names=("transformer.h.3.mlp.c_fc.bias",))
    assert sources["transformer.h.3.mlp.c_fc.bias"].is_copy
    zeroed = {name for name, source in sources.items() if source.zero}
    outputs = ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
    assert zeroed == {f"transformer.h.{number}.{name}" for number in (3, 7) for name in outputs}
    assert "lm_head.weight" not in sources, "names are those of named_parameters()"


def test_sources_of_means_of_materialised_models_and_of_the_alias():
    model = tiny_model("llama")
    edit = plan_edit(model, "recursive(2, init=average)")
    name = "model.layers.{}.self_attn.q_proj.weight"
    tied = tensor_sources(model, apply(model, "recursive(2, init=average)"), edit)
    assert tied[name.format(1)].names == (name.format(1), name.format(3))
    assert not tied[name.format(1)].is_copy and tied[name.format(0)].is_copy
    plain = tensor_sources(model, realise(model, edit, mode="materialize"), edit)
    assert [plain[name.format(n)].names[0][13] for n in range(6)] == list("012125")
    assert plain[name.format(3)] == tied[name.format(1)]
    alias = apply(model, "double", mode="alias")
    assert tensor_sources(model, alias, plan_edit(model, "untie")) == {
        name: TensorSource(names=(name,)) for name, _ in model.named_parameters()
    }
    with pytest.raises(ValueError, match="the new model has 6 layers, the edit makes 3"):
        tensor_sources(tiny_model("llama"), tiny_model("llama"), plan_edit(tiny_model("llama"), "prune([0, 1, 2])"))


def test_sources_of_shared_blocks_are_known_by_their_first_name():
    model = loopwise.attach(tiny_model("zamba"), "0-1 (2-3)x2 4-5")
    sources = tensor_sources(model, apply(model, "untie"), plan_edit(model, "untie"))
    known = {name for name, _ in model.named_parameters()}
    assert all(source.names and set(source.names) <= known for source in sources.values())


def test_several_operators_are_one_edit_where_they_can_be():
    model = tiny_model("llama")
    edit = plan_edit(model, ["double", "llama_pro(every=4)", "prune([0])"])
    assert (edit.num_layers, len(edit.layers)) == (6, 14)
    one = apply(model, ["double", "llama_pro(every=4)", "prune([0])"])
    step = apply(apply(apply(model, "double"), "llama_pro(every=4)"), "prune([0])")
    assert same_tensors(one, step)


def test_operators_that_cannot_be_one_edit_are_applied_one_by_one():
    model = tiny_model("llama")
    operators = ["llama_pro(every=3)", 'tie("(0-3)x2")']
    with pytest.raises(ValueError, match="one by one"):
        plan_edit(model, operators)
    both = apply(model, operators)
    assert str(loopwise.plan_of(both)) == "(0-3)x2"
    first, second = model.model.layers[0].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight
    torch.testing.assert_close(both.model.layers[0].mlp.up_proj.weight, (first + second) / 2)


def test_an_operator_of_width_may_stand_between_those_of_depth():
    model = tiny_model("llama")
    ids_BT = tiny_inputs(model)
    new = apply(model, ["llama_pro(every=3)", Widen(mlp=96)])
    assert new.config.num_hidden_layers == 8 and new.config.intermediate_size == 96
    torch.testing.assert_close(logits(new, ids_BT), logits(model, ids_BT), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="mode 'alias' is for edits of depth"):
        apply(model, Widen(mlp=96), mode="alias")
    with pytest.raises(ValueError, match="no operator of depth"):
        plan_edit(model, Widen(mlp=96))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_full_rank_offsets_give_the_old_function_back_tied_and_materialised(model_type):
    model = tiny_model(model_type)
    ids_BT = tiny_inputs(model)
    tied = apply(model, "recursive(2, init=average, rank=-1)")
    assert plan_edit(model, "recursive(2, init=average, rank=-1)").promise == "tolerance"
    want = logits(model, ids_BT)
    torch.testing.assert_close(logits(tied, ids_BT), want, rtol=1e-4, atol=1e-4)
    assert any(source.is_new for source in tensor_sources(model, tied, plan_edit(model, "recursive(2)")).values())
    for plain in (apply(tied, "untie"), apply(model, "recursive(2, init=average, rank=-1)", mode="materialize")):
        assert loopwise.plan_of(plain) is None and type(plain) is type(model)
        assert plain.state_dict().keys() == model.state_dict().keys()
        torch.testing.assert_close(logits(plain, ids_BT), want, rtol=1e-4, atol=1e-4)
    for operator, mode in (("prune([1])", None), ("repeat(0, 1)", "tie"), ("repeat(0, 1)", "alias")):
        with pytest.raises(ValueError, match="offsets per visit"):
            apply(tied, operator, mode=mode)
    again = apply(tied, ["untie", 'tie("(0-2)x2")'])
    assert str(loopwise.plan_of(again)) == "(0-2)x2"


def test_trained_offsets_of_each_visit_go_into_its_own_layer():
    model = loopwise.attach(tiny_model("llama"), "0 core:(1-2)x2 3")
    add_relaxation(model, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relaxation" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    ids_BT = tiny_inputs(model)
    untied = apply(model, "untie")
    torch.testing.assert_close(logits(untied, ids_BT), logits(model, ids_BT), rtol=1e-4, atol=1e-4)
    one, two = (untied.model.layers[number].mlp.up_proj.weight for number in (1, 3))
    assert not torch.equal(one, two), "the offsets of visits are lost"


def test_retrofit_with_the_identity_adapter_keeps_the_function():
    model = tiny_model("llama")
    ids_BT = tiny_inputs(model)
    state = torch.get_rng_state()
    new = apply(model, "retrofit(1, 4, 1)")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(new, ids_BT), logits(model, ids_BT))
    assert not torch.equal(logits(new, ids_BT, loops=2), logits(model, ids_BT))
    sources = tensor_sources(model, new, plan_edit(model, "retrofit(1, 4, 1)"))
    assert [name for name, source in sources.items() if source.is_new]
    one, two = (apply(model, "retrofit(1, 3, 1, adapter=random)") for _ in range(2))
    assert same_tensors(one, two), "the random adapter is drawn anew"
    with pytest.raises(ValueError, match="cannot be materialised"):
        apply(model, "retrofit(1, 4, 1)", mode="materialize")


def test_a_layer_without_visits_keeps_its_tensors():
    model = loopwise.attach(tiny_model("llama"), "0 2")
    tied = realise(model, plan_edit(model, "repeat(0, 1)"), mode="tie")
    assert len(layer_list(tied).layers) == 6 and str(loopwise.plan_of(tied)) == "(0)x2 2"
    assert torch.equal(tied.model.layers[5].mlp.up_proj.weight, model.model.layers[5].mlp.up_proj.weight)

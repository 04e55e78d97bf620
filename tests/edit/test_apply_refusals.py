"""What edits in memory refuse, and with which reason."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, T5Config, T5ForConditionalGeneration

import loopwise
from loopwise.edit.apply import apply, plan_edit, realise
from loopwise.models.hub import layer_list


def with_adapters():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))


def quantised():
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def hooked():
    model = loopwise.attach(tiny_model("llama"), "0-5")
    model.model.loopwise.hooks = [lambda visit, state: state]
    return model


def albert():
    return AlbertForMaskedLM(
        AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, embedding_size=8, vocab_size=40)
    ).eval()


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 40}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("make", "operator", "mode", "said"),
    [
        (with_adapters, "double", None, "carries adapters"),
        (quantised, "double", "tie", "quantised: use mode 'alias'"),
        (hooked, "untie", None, "hooks on its visits"),
        (albert, "double", None, "not called once and in order"),
        (t5, "double", None, "encoder-decoder"),
        (lambda: tiny_model("zamba2"), "double", None, "shares shared_transformer.* between its layers 1 and 4"),
        (lambda: tiny_model("zamba"), "llama_pro(every=1)", None, "shares .* cannot be changed on its own"),
        (lambda: tiny_model("diffllama"), "double", None, "depends on its number"),
        (lambda: tiny_model("diffllama"), "llama_pro(every=2)", None, "depends on its number"),
        (
            lambda: tiny_model("gemma3_text"),
            "recursive(2)",
            None,
            "layer_types is full_attention in layer 1 and sliding",
        ),
        (lambda: tiny_model("qwen3_next"), 'tie("(0)x6")', None, "mlp_only_layers is True in layer 0 and False"),
        (lambda: tiny_model("bert"), "llama_pro(every=2)", None, r"norms stand on the stream itself \(post-norm\)"),
        (lambda: tiny_model("xlnet"), "llama_pro(every=2)", None, "post-norm"),
        (lambda: tiny_model("doge"), "llama_pro(every=2)", None, "multiplies the stream"),
        (lambda: tiny_model("llama"), "llama_pro(every=2)", "alias", "an alias has the old tensors"),
        (lambda: tiny_model("llama"), "prune([0, 1, 2, 3, 4, 5])", None, "leaves nothing to visit"),
        (lambda: tiny_model("llama"), "llama_pro(every=4)", None, "does not divide 6 layers"),
        (lambda: tiny_model("llama"), "double", "copy", "mode is 'copy': use one of alias, tie, materialize"),
        (lambda: tiny_model("llama"), [], None, "no operator is given"),
        (lambda: nn.Linear(2, 2), "double", None, "contains no transformers model"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(make, operator, mode, said):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=said) as caught:
        apply(model, operator, mode=mode)
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_packed_weights_can_be_looped():
    assert str(loopwise.plan_of(apply(quantised(), "repeat(1, 3)", mode="alias"))) == "0 (1-2)x2 3-5"


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [("opt", "do_layer_norm_before", False), ("bloom", "apply_residual_connection_post_layernorm", True)],
)
def test_settings_that_norm_the_stream_are_refused_though_the_type_is_fine(model_type, field, value):
    config = tiny_model(model_type).config
    setattr(config, field, value)
    model = type(tiny_model(model_type))._from_config(config).eval()
    with pytest.raises(ValueError, match=f"{field}={value} a norm stands on the stream"):
        apply(model, "llama_pro(every=2)")


def test_an_edit_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the edit is of 6 layers under 0-5, the model has 6 under"):
        realise(loopwise.attach(tiny_model("llama"), "(0-5)x2"), plan_edit(tiny_model("llama"), "double"), mode="tie")


def test_layers_of_a_list_with_other_tensors_are_named():
    model = tiny_model("deepseek_v3")
    with pytest.raises(
        ValueError, match="layers 1 and 3 cannot become one, .*first_k_dense_replace is True in layer 1"
    ):
        apply(model, "recursive(2, init=average)")
    assert len(layer_list(apply(model, "prune([0])")).layers) == 5


def test_sharded_models_are_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        norm = model.model.norm
        norm.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(norm.weight.detach(), mesh))
        with pytest.raises(ValueError, match="this model is sharded: gather it"):
            apply(model, "double")
    finally:
        torch.distributed.destroy_process_group()

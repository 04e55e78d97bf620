"""Materialise: the unrolled model has the right configuration and tensors of its own, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from laws import assert_close, odd_plan
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.models.hub import layer_list, text_config
from loopwise.models.realise import expand_config
from tests.models.common import LOOPED, logits

# Layer 0 twice in a row, out of order, and layer 3 dropped: a list shifted by one, or left as it was, shows.
SHUFFLED = "0 0 5 (1-2)x2 4"
SOURCES = (0, 0, 5, 1, 2, 1, 2, 4)
TYPES = ["llama", "gpt2", "bloom", "gemma3_text", "mixtral", "mamba", "mamba2", "recurrent_gemma", "falcon_h1", "zamba"]
TYPES += ["qwen3_next", "lfm2", "opt", "bert", "llama4_text", "smollm3", "laguna", "nemotron_h", "granite_swa"]


def storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("plan", [LOOPED, SHUFFLED, odd_plan(6)])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_unrolled_model_is_plain_and_equal(model_type, plan):
    model = loopwise.attach(tiny_model(model_type), plan)
    ids_BT = tiny_inputs(model)
    twin = loopwise.materialize(model)
    assert type(twin) is type(model) and loopwise.plan_of(twin) is None
    layers = layer_list(twin).layers
    assert len(layers) == loopwise.plan_of(model).num_slots
    source = layer_list(model).layers
    for new, old in enumerate(loopwise.plan_of(model).layers):
        names = {name for name, _ in source[old].named_parameters()}
        assert {name for name, _ in layers[new].named_parameters()} == names
    assert_close(logits(twin, ids_BT, use_cache=False), logits(model, ids_BT, use_cache=False), "unrolled")


# model type -> field -> the tiny configuration's own list, written out
LISTS = {
    "gemma3_text": ["layer_types"],
    "qwen2": ["layer_types"],
    "qwen3_next": ["layer_types"],
    "smollm3": ["layer_types", "no_rope_layers"],
    "llama4_text": ["layer_types", "no_rope_layers"],
    "laguna": ["layer_types", "mlp_layer_types", "num_attention_heads_per_layer"],
    "granite_swa": ["layer_types", "layer_rope_theta"],
    "lfm2": ["layer_types"],
    "zamba": ["layers_block_type"],
    "nemotron_h": ["layers_block_type"],
    "gpt_neo": ["attention_layers"],
}
INDEX_LISTS = {
    "qwen2_moe": ["mlp_only_layers"],
    "qwen3_next": ["mlp_only_layers"],
    "llama4_text": ["moe_layers"],
    "bamba": ["attn_layer_indices"],
}


@pytest.mark.parametrize("model_type", LISTS)
def test_lists_with_one_item_per_layer_follow_the_visits(model_type):
    model = loopwise.attach(tiny_model(model_type), SHUFFLED)
    config = text_config(loopwise.materialize(model))
    for field in LISTS[model_type]:
        own = getattr(text_config(model), field)
        assert len(own) == 6 and len(set(map(str, own))) > 1, "the tiny configuration shows nothing"
        assert list(getattr(config, field)) == [own[layer] for layer in SOURCES], field


@pytest.mark.parametrize("model_type", INDEX_LISTS)
def test_lists_of_layer_numbers_follow_the_visits(model_type):
    model = loopwise.attach(tiny_model(model_type), SHUFFLED)
    config = text_config(loopwise.materialize(model))
    for field in INDEX_LISTS[model_type]:
        own = getattr(text_config(model), field)
        assert 0 < len(own) < 6, "the tiny configuration shows nothing"
        assert list(getattr(config, field)) == [new for new, layer in enumerate(SOURCES) if layer in own], field


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("opt", "num_hidden_layers"),
        ("gpt_neo", "num_layers"),
        ("bloom", "n_layer"),
    ],
)
def test_the_number_of_layers_is_that_of_visits(model_type, field):
    model = loopwise.attach(tiny_model(model_type), SHUFFLED)
    config = loopwise.materialize(model).config
    assert getattr(config, field) == config.num_hidden_layers == 8
    assert getattr(model.config, field) == 6


def test_a_repeated_pattern_becomes_a_list_of_its_own():
    """RecurrentGemma repeats `block_types` over its layers; under a plan the pattern no longer repeats."""
    model = loopwise.attach(tiny_model("recurrent_gemma"), SHUFFLED)
    pattern = model.config.block_types
    assert len(pattern) == 3
    assert list(loopwise.materialize(model).config.block_types) == [pattern[layer % 3] for layer in SOURCES]


@pytest.mark.parametrize(("model_type", "num_layers"), [("falcon_h1", 5), ("falcon_h1", 2), ("mamba2", 2)])
def test_lists_that_only_happen_to_be_as_long_as_the_layers_stay(model_type, num_layers):
    config = tiny_model(model_type, num_layers=num_layers).config
    if model_type == "falcon_h1":
        config.ssm_multipliers, config.mlp_multipliers = [1.0, 0.5, 2.0, 0.7, 1.3], [0.5, 2.0]
    sources = [0, *range(num_layers), 1]
    expanded = expand_config(config, sources, num_layers)
    assert expanded.num_hidden_layers == num_layers + 2
    for field in ("time_step_limit", "ssm_multipliers", "mlp_multipliers"):
        if hasattr(config, field):
            assert list(getattr(expanded, field)) == list(getattr(config, field)), field


def test_end_of_text_tokens_stay():
    config = tiny_model("llama", num_layers=3).config
    config.eos_token_id = [7, 8, 9]
    assert expand_config(config, [0, 1, 1, 2], 3).eos_token_id == [7, 8, 9]


def test_a_dense_prefix_stays_expressible_as_long_as_it_leads():
    model = loopwise.attach(tiny_model("deepseek_v3"), "0 (0-1)x2 2-5")
    twin = loopwise.materialize(model)
    assert model.config.first_k_dense_replace == 2 and twin.config.first_k_dense_replace == 5
    assert_close(logits(twin, tiny_inputs(model)), logits(model, tiny_inputs(model)), "unrolled")


@pytest.mark.parametrize(
    ("model_type", "plan", "reason"),
    [
        ("deepseek_v3", LOOPED, "first_k_dense_replace=2 .* cannot say that layer 5 is what layer 1 was"),
        ("deepseek_v3", "2 0-5", "first_k_dense_replace=2 .* cannot say that layer 1 is what layer 0 was"),
        ("diffllama", LOOPED, "its layers depend on their number"),
        ("jamba", LOOPED, "attn_layer_period=3 .* cannot say that layer 5 is what layer 1 was"),
        (
            "recurrent_gemma",
            "0 (1)x2",
            "only contain LinearAttention layers",
        ),  # plain transformers needs one of another kind
    ],
)
def test_what_a_configuration_cannot_express_is_refused_by_name(model_type, plan, reason):
    model = loopwise.attach(tiny_model(model_type), plan)
    ids_BT = tiny_inputs(model)
    want = logits(model, ids_BT)
    with pytest.raises(ValueError, match=reason) as caught:
        loopwise.materialize(model)
    assert type(model).__name__ in str(caught.value) and "cannot be unrolled" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(logits(model, ids_BT), want)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mamba2", "recurrent_gemma", "bloom", "mixtral"])
def test_tensors_are_its_own_and_the_source_is_untouched(model_type):
    model = loopwise.attach(tiny_model(model_type), LOOPED)
    ids_BT = tiny_inputs(model)
    want, config = logits(model, ids_BT), model.config.to_dict()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = loopwise.materialize(model)
    assert not storages(twin) & storages(model)
    assert twin.config is not model.config
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, ids_BT), want)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "mamba2", "bloom", "qwen3_next", "zamba"])
def test_a_loop_has_the_parameters_of_the_plain_model_and_its_twin_those_of_every_visit(model_type):
    """Law 6: unique storages are exactly what the plan says."""
    plain = tiny_model(model_type)
    model = loopwise.attach(tiny_model(model_type), LOOPED)
    twin = loopwise.materialize(model)

    def count(modules):
        unique = {p.data_ptr(): p.numel() for module in modules for p in module.parameters()}
        return len(unique), sum(unique.values())

    assert count([model]) == count([plain])
    assert len({id(module) for module in model.modules()}) == len({id(module) for module in plain.modules()})
    if model_type == "zamba":  # its hybrid layers share one attention block
        return
    tensors, numbers = count([plain])
    extra = [layer_list(model).layers[layer] for layer in (1, 2, 3, 4)]
    assert count([twin]) == (tensors + count(extra)[0], numbers + count(extra)[1])


def test_blocks_shared_by_layers_are_shared_by_copies():
    """Zamba's hybrid layers share one block; so must those of its unrolled model."""
    model = loopwise.attach(tiny_model("zamba"), LOOPED)
    twin = loopwise.materialize(model)
    for each in (model, twin):
        blocks = [layer.shared_transf for layer in layer_list(each).layers if hasattr(layer, "shared_transf")]
        assert len(blocks) > 2
        assert len({tuple(p.data_ptr() for p in block.parameters()) for block in blocks}) == 1


@pytest.mark.parametrize("model_type", ["bloom", "gemma3_text", "gpt2"])
def test_tied_embeddings_stay_tied(model_type):
    model = tiny_model(model_type)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "the tiny model is not tied"
    twin = loopwise.materialize(loopwise.attach(model, LOOPED))
    assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    untied = loopwise.materialize(loopwise.attach(tiny_model("mixtral"), LOOPED))
    assert untied.get_input_embeddings().weight is not untied.get_output_embeddings().weight


def test_a_plan_may_be_given_without_attaching():
    plain = tiny_model("llama")
    ids_BT = tiny_inputs(plain)
    want = logits(plain, ids_BT)
    twin = loopwise.materialize(plain, loopwise.Plan.parse(LOOPED))
    assert loopwise.plan_of(plain) is None and torch.equal(logits(plain, ids_BT), want)
    assert torch.equal(logits(twin, ids_BT), logits(loopwise.attach(plain, LOOPED), ids_BT))
    assert len(layer_list(loopwise.materialize(plain, loopwise.Plan.parse("0 5"))).layers) == 2
    with pytest.raises(ValueError, match="layer"):
        loopwise.materialize(plain, loopwise.Plan.parse("0-6"))


def test_mode_dtype_generation_settings_and_attention_are_kept():
    model = tiny_model("llama").to(torch.bfloat16).train()
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 3
    twin = loopwise.materialize(loopwise.attach(model, LOOPED))
    assert twin.training and twin.dtype == torch.bfloat16
    assert twin.config._attn_implementation == "eager"
    assert twin.generation_config.max_new_tokens == 3
    twin.generation_config.max_new_tokens = 4
    assert model.generation_config.max_new_tokens == 3


@pytest.mark.parametrize("model_type", ["deepseek_v3", "lfm2_moe"])
def test_state_in_buffers_is_copied(model_type):
    """Routing corrections are buffers that training writes; at their initial zero a forgotten copy would not show."""
    model = tiny_model(model_type)
    names = [name for name, _ in model.named_buffers() if name.endswith(("correction_bias", "expert_bias"))]
    assert names and all(model.get_buffer(name).any() for name in names)
    model = loopwise.attach(model, "0-2 core:(3)x2 4-5")
    try:
        twin = loopwise.materialize(model)
    except ValueError as error:
        pytest.fail(str(error))
    assert_close(logits(twin, tiny_inputs(model)), logits(model, tiny_inputs(model)), "unrolled")


def test_a_twin_may_be_looped_again():
    model = loopwise.attach(tiny_model("gemma3_text"), LOOPED)
    twin = loopwise.materialize(model)
    ids_BT = tiny_inputs(model)
    loopwise.attach(twin, "0-4 (5-8)x2 9")
    again = loopwise.materialize(twin)
    assert len(layer_list(again).layers) == 14
    assert_close(logits(twin, ids_BT), logits(model, ids_BT, loops=3), "three times around")
    assert_close(logits(again, ids_BT), logits(model, ids_BT, loops=3), "three times around, unrolled")

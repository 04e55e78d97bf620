"""The cost of tiny models of many types against torch's FLOP counter and against the caches that they fill.

Sliding windows and sparse selections of the tiny models span 4 keys, so texts of 4 tokens fill them exactly: the
counter counts masked keys too. What differs beyond 1 % is in `CAUSES` with its reason.
"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_inputs, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loopwise.measure import cost_of

DENSE = """
    bert bitnet bloom codegen cohere2 ctrl doge exaone4 falcon gemma gemma2 gemma3_text gemma4_text glm4 gpt2
    gpt_bigcode gpt_neo gpt_neox gptj granite llama mistral modernbert-decoder mpt nanochat olmo2 openai-gpt opt
    persimmon phi phi3 qwen2 qwen3 roformer seed_oss smollm3 stablelm starcoder2 xglm
""".split()
EXPERTS = """
    afmoe deepseek_v2 deepseek_v3 deepseek_v32 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss granitemoeshared
    jetmoe mimo_v2_flash minicpm3 minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe
""".split()
# type -> (least, largest ratio of our count to the counter's, why it is not 1)
CAUSES = {
    "diffllama": (0.97, 0.98, "computes its scores twice, once per half of the values"),
    "gemma3n_text": (0.98, 0.99, "predicts parallel streams by products of activations"),
    "llama4_text": (0.72, 0.73, "runs every expert on every token"),
    "longcat_flash": (1.0, 1.5, "a token may choose experts that do nothing"),
    "zamba2": (0.88, 0.89, "runs scans; of the adapters on its shared block a layer runs only its own"),
    "lfm2": (0.98, 1.0, "pads its causal convolution"),
}
RECURRENT = """
    bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 minimax nemotron_h
    olmo_hybrid qwen3_5_text qwen3_next recurrent_gemma zamba
""".split()
STATES = """
    bailing_hybrid bamba falcon_h1 granitemoehybrid jamba kimi_linear lfm2 nemotron_h olmo_hybrid qwen3_next zamba2
""".split()


def eager_model(model_type: str) -> nn.Module:
    """Eager attention and experts: torch counts neither CPU flash attention nor grouped products."""
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def counted(model: nn.Module, num_tokens: int) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(tiny_inputs(model, batch=1, length=num_tokens), use_cache=False)
    return counter


@pytest.mark.parametrize("model_type", [*DENSE, *EXPERTS])
def test_forward_flops_are_those_of_the_counter(model_type: str) -> None:
    model = eager_model(model_type)
    cost = cost_of(model, context=4)
    assert 4 * cost.forward_flops_per_token == pytest.approx(counted(model, 4).get_total_flops(), rel=0.01)
    assert cost.left_out == ()


@pytest.mark.parametrize("model_type", CAUSES)
def test_known_differences_stay_what_they_are(model_type: str) -> None:
    model = eager_model(model_type)
    least, largest, _ = CAUSES[model_type]
    ratio = 4 * cost_of(model, context=4).forward_flops_per_token / counted(model, 4).get_total_flops()
    assert least <= ratio <= largest


@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_layers_agree_except_for_their_scans(model_type: str) -> None:
    """The counter's sum over modules with matmul weights, convolutions without the padding that makes them longer."""
    model, num_tokens = eager_model(model_type), 8
    flops = counted(model, num_tokens).get_flop_counts()
    names = {f"{type(model).__name__}.{name}": module for name, module in model.named_modules()}
    expected = 0
    for name, module in names.items():
        if isinstance(module, nn.Conv1d):
            expected += 2 * num_tokens * module.weight.numel()
        elif name.endswith(("mamba.dt_proj", "mixer.dt_proj")):
            # Multiplied as a tensor, so the counter does not see the module.
            expected += 2 * num_tokens * module.weight.numel()
        elif isinstance(module, nn.Linear) or type(module).__name__.endswith(("Router", "Experts")):
            expected += sum(flops.get(name, {}).values())
        else:
            # Weights that a mixer multiplies by itself.
            own = [p for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and n.endswith("weight")]
            expected += 2 * num_tokens * sum(p.numel() for p in own)
    cost = cost_of(model, context=num_tokens)
    attention = sum(layer.attention_flops for layer in cost.layers)
    assert num_tokens * (cost.forward_flops_per_token - attention) == pytest.approx(expected, rel=1e-9)
    # Scans only add to what we count.
    assert num_tokens * cost.forward_flops_per_token < counted(model, num_tokens).get_total_flops()


def filled_cache_bytes(model: nn.Module, num_tokens: int = 24) -> tuple[float, int]:
    """Bytes per kept token and bytes of state that a real run leaves in the cache of one sequence."""
    with torch.no_grad():
        cache = model(tiny_inputs(model, batch=1, length=num_tokens), use_cache=True).past_key_values
    per_token, state = 0.0, 0
    for entry in cache.layers:
        for name in ("keys", "values", "indexer_keys"):
            tensor = getattr(entry, name, None)
            if tensor is not None and tensor.dim() > 2:
                per_token += tensor.numel() / tensor.shape[-2] * tensor.element_size()
        for name in ("conv_states", "recurrent_states"):
            for tensor in getattr(entry, name, {}).values():
                state += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return per_token, state


@pytest.mark.parametrize("model_type", [t for t in (*DENSE, *EXPERTS, *STATES) if t != "openai-gpt"])
def test_cache_bytes_are_those_of_a_filled_cache(model_type: str) -> None:
    model = tiny_model(model_type)
    cost = cost_of(model)
    assert (cost.cache_bytes_per_token, cost.state_bytes) == filled_cache_bytes(model)


def test_half_precision_halves_the_cache() -> None:
    model = tiny_model("llama")
    full = cost_of(model).cache_bytes_per_token
    assert cost_of(model.to(torch.bfloat16)).cache_bytes_per_token == full / 2 == filled_cache_bytes(model)[0]


def test_every_slot_of_a_plan_keeps_keys_and_values() -> None:
    import loopwise

    model = loopwise.attach(tiny_model("llama"), "0-1 (2-3)x3 4-5")
    cost = cost_of(model)
    assert cost.num_slots == 10
    assert cost.cache_bytes_per_token == filled_cache_bytes(model)[0]


def test_meta_models_can_be_costed() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_model("qwen3").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert cost_of(model) == cost_of(tiny_model("qwen3"))

"""Blocks against the layers of transformers, with their weights: outputs and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, GPT2Config, HrmTextConfig, LlamaConfig, Olmo2Config, Qwen3Config
from transformers.models.albert.modeling_albert import AlbertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.hrm_text.modeling_hrm_text import HrmTextDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from loopwise.models.attention import attention_mask
from loopwise.models.blocks import BlockConfig
from loopwise.models.mixers import AttentionConfig, QKNormConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig, rotary_tables

WIDTH, INNER, TOKENS = 32, 44, 7
ROPE = RotaryConfig(dim=8, theta=5000.0)
Tensors = dict[str, torch.Tensor]
LLAMA_STYLE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def llama_names(tensors: Tensors, norms: dict[str, str]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        renamed[f"{({'self_attn': 'mixer', 'mlp': 'mlp'} | norms)[part]}.{rest}"] = tensor
    return renamed


def pre_norm(tensors: Tensors) -> Tensors:
    return llama_names(tensors, {"input_layernorm": "mixer_norm_in", "post_attention_layernorm": "mlp_norm_in"})


def branch_out(tensors: Tensors) -> Tensors:
    return llama_names(
        tensors, {"post_attention_layernorm": "mixer_norm_out", "post_feedforward_layernorm": "mlp_norm_out"}
    )


def gpt2(tensors: Tensors) -> Tensors:
    names = {"ln_1": "mixer_norm_in", "ln_2": "mlp_norm_in", "attn.c_proj": "mixer.o_proj"}
    names |= {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        tensor = tensor.T if kind == "weight" and module[:2] != "ln" else tensor
        if module == "attn.c_attn":
            found |= {f"mixer.{p}_proj.{kind}": part for p, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            found[f"{names[module]}.{kind}"] = tensor
    return found


def albert(tensors: Tensors) -> Tensors:
    names = {f"attention.{name}": f"mixer.{name[0]}_proj" for name in ("query", "key", "value")}
    names |= {"attention.dense": "mixer.o_proj", "ffn": "mlp.up_proj", "ffn_output": "mlp.down_proj"}
    names |= {"attention.LayerNorm": "mixer_norm_out", "full_layer_layer_norm": "mlp_norm_out"}
    split = [(*name.rpartition(".")[::2], tensor) for name, tensor in tensors.items()]
    return {f"{names[module]}.{kind}": tensor for module, kind, tensor in split}


def swiglu(**fields: Any) -> MLPConfig:
    return MLPConfig(intermediate_size=INNER, **fields)


def plain_mlp() -> MLPConfig:
    return swiglu(activation="gelu_tanh", gated=False, bias=True)


def layer_norm(eps: float) -> NormConfig:
    return NormConfig(type="layer", eps=eps, bias=True, weight_in_float32=True)


def block_of(mixer: AttentionConfig, mlp: MLPConfig | None = None, **fields: Any) -> BlockConfig:
    return BlockConfig(
        **{"hidden_size": WIDTH, "norm": NormConfig(eps=1e-5), "mixer": mixer, "mlp": mlp or swiglu(), **fields}
    )


GQA: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": ROPE}
BIASES: dict[str, Any] = {"num_heads": 4, "qkv_bias": True, "out_bias": True}
FLOAT32_WEIGHT = NormConfig(eps=1e-5, weight_in_float32=True)

# name -> (their configuration, their layer, our block, from their names to ours)
CASES: dict[str, tuple[Callable, Callable, BlockConfig, Callable[[Tensors], Tensors]]] = {
    "llama": (lambda: LlamaConfig(**LLAMA_STYLE), LlamaDecoderLayer, block_of(AttentionConfig(**GQA)), pre_norm),
    "llama_biases": (
        lambda: LlamaConfig(**LLAMA_STYLE, attention_bias=True, mlp_bias=True),
        LlamaDecoderLayer,
        block_of(AttentionConfig(**GQA, qkv_bias=True, out_bias=True), swiglu(bias=True)),
        pre_norm,
    ),
    "qwen3": (
        lambda: Qwen3Config(**LLAMA_STYLE),
        Qwen3DecoderLayer,
        block_of(AttentionConfig(**GQA, qk_norm=QKNormConfig(norm=NormConfig(eps=1e-5)))),
        pre_norm,
    ),
    "qwen3_window": (
        lambda: Qwen3Config(**LLAMA_STYLE, use_sliding_window=True, sliding_window=3, max_window_layers=0),
        Qwen3DecoderLayer,
        block_of(AttentionConfig(**GQA, qk_norm=QKNormConfig(norm=NormConfig(eps=1e-5)), sliding_window=3)),
        pre_norm,
    ),
    "olmo2": (
        lambda: Olmo2Config(**LLAMA_STYLE),
        Olmo2DecoderLayer,
        block_of(
            AttentionConfig(**GQA, qk_norm=QKNormConfig(norm=FLOAT32_WEIGHT, over="width")),
            norm=FLOAT32_WEIGHT,
            placement="branch_out",
        ),
        branch_out,
    ),
    "hrm_text": (
        lambda: HrmTextConfig(**LLAMA_STYLE),
        HrmTextDecoderLayer,
        block_of(
            AttentionConfig(num_heads=4, head_dim=8, rope=ROPE, mask="prefix", output_gate="channel"),
            norm=NormConfig(eps=1e-5, weight=False),
        ),
        pre_norm,
    ),
    "gpt2": (
        lambda: GPT2Config(n_embd=WIDTH, n_head=4, n_inner=INNER, attn_pdrop=0.0, resid_pdrop=0.0),
        GPT2Block,
        block_of(AttentionConfig(**BIASES), plain_mlp(), norm=layer_norm(1e-5)),
        gpt2,
    ),
    "albert": (
        lambda: AlbertConfig(
            hidden_size=WIDTH, num_attention_heads=4, intermediate_size=INNER, hidden_act="gelu_new", embedding_size=8
        ),
        lambda config, _: AlbertLayer(config),
        block_of(
            AttentionConfig(**BIASES, mask="bidirectional"), plain_mlp(), norm=layer_norm(1e-12), placement="post"
        ),
        albert,
    ),
}


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def prefix_of(name: str) -> torch.Tensor | None:
    return torch.arange(TOKENS).expand(2, -1) < 3 if name == "hrm_text" else None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_layer_of_transformers(name: str, implementation: str) -> None:
    make_config, make_layer, config, rename = CASES[name]
    their_config = make_config()
    their_config._attn_implementation = implementation
    theirs = randomise(make_layer(their_config, 0))
    ours = config.build(their_config, 0).eval()
    ours.load_state_dict(rename(theirs.state_dict()))

    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(2, TOKENS, WIDTH, generator=generator)
    weight = torch.randn(2, TOKENS, WIDTH, generator=generator)
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[1, :2] = 0
    mask = attention_mask(config.mixer, their_config, hidden, padding, prefix_BT=prefix_of(name))
    kwargs: dict[str, Any] = {}
    if config.mixer.rope is not None:
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        kwargs["position_embeddings"] = LlamaRotaryEmbedding(LlamaConfig(**LLAMA_STYLE))(hidden, positions)
        tables = rotary_tables(positions, config.mixer.rope)
        assert all(torch.equal(*pair) for pair in zip(tables, kwargs["position_embeddings"], strict=True))

    results, gradients = [], []
    for module in (theirs, ours):
        leaf = hidden.clone().requires_grad_()
        result = module(leaf, attention_mask=mask, **kwargs)
        result = result if isinstance(result, torch.Tensor) else result[0]
        (result * weight)[padding.bool()].sum().backward()
        results.append(result[padding.bool()])
        gradients.append({n: p.grad for n, p in module.named_parameters()} | {"hidden": leaf.grad})
    torch.testing.assert_close(results[1], results[0], atol=1e-6 * results[0].abs().max().item(), rtol=0)
    their_hidden = gradients[0].pop("hidden")
    wanted = rename(gradients[0]) | {"hidden": their_hidden}
    assert wanted.keys() == gradients[1].keys()
    largest = max(value.abs().max().item() for value in wanted.values())
    for key, value in gradients[1].items():
        torch.testing.assert_close(value, wanted[key], atol=1e-6 * largest, rtol=0, msg=f"{name}.{key}")


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "default"},
        {"type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda scaling: str(scaling and (scaling.get("rope_type") or scaling["type"])),
)
def test_rotary_tables_equal_those_of_transformers(scaling: dict | None) -> None:
    like = LlamaConfig(
        **LLAMA_STYLE | {"rope_parameters": {"rope_theta": 5000.0, **(scaling or {})}}, max_position_embeddings=128
    )
    positions = torch.tensor([[0, 1, 2, 50, 127]])
    given = None if scaling is None else dict(scaling)
    ours = rotary_tables(positions, RotaryConfig(dim=8, theta=5000.0, scaling=given))
    theirs = LlamaRotaryEmbedding(like)(torch.zeros(1), positions)
    assert given == scaling
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert all(table.dtype == torch.float32 for table in ours)

"""Tiny random models of every type in transformers' causal-LM mapping.

One generic shrinker plus a table of what it cannot guess (`tiny_overrides.py`).
As a script it builds each type and checks plain transformers on it: `python tests/conformance/tiny.py [type ...]`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tiny_overrides import MLP, OVERRIDES, QUIRKS, SWA, UNAVAILABLE, WEIGHT_STD, Cycle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

__all__ = ["MODEL_TYPES", "QUIRKS", "UNAVAILABLE", "tiny_config", "tiny_inputs", "tiny_model"]

logging.set_verbosity_error()

MODEL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
NUM_LAYERS = 6
VOCAB = 99
PAD, BOS = 0, 1

# Cross-attention models count their encoder's layers as `num_hidden_layers`, which sizes the decoder's cache too.
LAYER_COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"
    " encoder_layers num_encoder_layers"
).split()

# value -> names of config fields that take it, wherever a config has them
_SIZES: tuple[tuple[Any, str], ...] = (
    (VOCAB, "vocab_size decoder_vocab_size"),
    (32, "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim lru_width"),
    (
        64,
        "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner n_inner"
        " ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size shared_experts_intermediate_size"
        " shared_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size intermediate_size_mlp"
        " prefix_dense_intermediate_size",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"
        " num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"
        " num_experts num_local_experts n_routed_experts moe_num_experts"
        " sliding_window sliding_window_size window_size attention_window_size conv_kernel mamba_d_conv"
        " qk_rope_head_dim rotary_dim time_step_rank mamba_dt_rank linear_num_value_heads linear_num_heads"
        " mamba_n_heads n_mamba_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk"
        " moe_k top_k_experts num_query_groups linear_num_key_heads",
    ),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    (
        8,
        "index_n_heads head_dim d_head dim_head kv_channels swa_head_dim qk_nope_head_dim v_head_dim linear_head_dim"
        " linear_key_head_dim linear_value_head_dim state_size ssm_state_size mamba_d_state index_head_dim"
        " chunk_size mamba_chunk_size",
    ),
    (2, "first_k_dense_replace"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions"),
    (
        0.0,
        "dropout attention_dropout activation_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob"
        " resid_pdrop embd_pdrop attn_pdrop emb_pdrop resid_dropout embed_dropout residual_dropout embedding_dropout"
        " dropout_p decoder_layerdrop layerdrop mlp_dropout router_jitter_noise input_jitter_noise",
    ),
    (0.35, "attention_multiplier"),  # 1 / sqrt(head_dim), as real ones have; the class default 1 amplifies rounding
    (PAD, "pad_token_id"),
    (BOS, "bos_token_id decoder_start_token_id"),
    (None, "eos_token_id forced_eos_token_id"),
    (True, "use_cache"),
    (False, "add_cross_attention"),
)
COMMON: dict[str, Any] = {name: value for value, names in _SIZES for name in names.split()}

# Recurrences keep what their own initialiser gave them, where another scale overflows or vanishes ...
_KEEP = ("time_decay", "time_first", "recurrent_param", "slope_rate")
# ... except these: usual decay rates and time steps forget everything, or remember nothing, within ten tokens.
_DECAY_RATES_AND_TIME_STEPS = ("A_log", "dt_bias", "dt_proj.bias")


def _resolve(value: Any, num_layers: int) -> Any:
    if isinstance(value, Cycle):
        return value.expand(num_layers)
    return value(num_layers) if callable(value) else value


def _fields(
    config_class: type[PreTrainedConfig], model_type: str, num_layers: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of the tiny config: shrunk defaults, then the table's values."""
    own = {name: _resolve(value, num_layers) for name, value in (OVERRIDES.get(model_type, {}) | extra).items()}
    try:
        default = config_class()
    except ValueError:  # the defaults of a few classes contradict each other
        default = config_class(**own)
    names = vars(default)
    latent_attention = "qk_rope_head_dim" in names and "kv_lora_rank" in names
    fields: dict[str, Any] = {}
    for name, value in names.items():
        if name in LAYER_COUNTS:
            fields[name] = num_layers
        elif name in ("n_group", "num_expert_group", "topk_group"):
            fields[name] = value and (1 if name == "topk_group" or value == 1 else 2)
        elif latent_attention and name == "head_dim":
            continue  # these types derive it from the rotary part
        elif latent_attention and name == "num_key_value_heads":
            fields[name] = 4
        elif name in ("layer_types", "mlp_layer_types"):
            if set(value or ()) == {"sliding_attention", "full_attention"}:
                fields[name] = SWA.expand(num_layers)
            elif set(value or ()) == {"dense", "sparse"}:
                fields[name] = MLP.expand(num_layers)
        elif name in COMMON:
            fields[name] = COMMON[name] if value is not None or name != "sliding_window" else None
        elif isinstance(value, PreTrainedConfig):
            layers = num_layers if name in ("text_config", "decoder", "global_config") else 2
            part = own.pop(name, {})
            fields[name] = tiny_config(value.model_type, num_layers=layers, config_class=type(value), extra=part)
    if "is_decoder" in names:
        fields["is_decoder"] = True
    return fields | own


def tiny_config(
    model_type: str,
    *,
    num_layers: int | None = None,
    config_class: type[PreTrainedConfig] | None = None,
    extra: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """The tiny configuration of a model type.

    `config_class` is for types that are a part of another config; `extra` fields go before the table's.
    """
    layers = num_layers or NUM_LAYERS
    config_class = config_class or CONFIG_MAPPING[model_type]
    return config_class(**_fields(config_class, model_type, layers, extra or {}))


def _model_class_and_config(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The mapping's class with the config it takes: of a wrapper some classes take the text or decoder part."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, model_class.config_class):
        parts = [part for part in vars(config).values() if isinstance(part, model_class.config_class)]
        config = parts[0] if parts else config  # two types are registered with another type's class
    return model_class, config


def _redraw(model: PreTrainedModel, generator: torch.Generator, std: float) -> None:
    """Random weights under which every layer matters; vectors stay near their initial value (norms near 1)."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or name.endswith(_KEEP):
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(_DECAY_RATES_AND_TIME_STEPS):
            parameter.copy_(0.5 * noise - 0.5)
        elif parameter.dim() < 2 or (parameter == 1).all():
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(std * noise)
    for name, buffer in model.named_buffers():
        # Learned state outside the parameters: left at its constant, a copy that forgets it would go unnoticed.
        if name.endswith(("e_score_correction_bias", "expert_bias", "layer_scalar")):
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("tid2eid"):  # token -> experts of hash routing
            scores = torch.rand((len(buffer), model.config.n_routed_experts), generator=generator)
            buffer.copy_(scores.topk(buffer.shape[1]).indices)
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not None:
        # The padding token is never the most likely one: types that derive positions from it would see a gap.
        head.weight[PAD] = 0.0


def tiny_model(model_type: str, *, num_layers: int | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny random causal language model, fp32, on the CPU, in eval mode; the same seed gives the same weights.

    `num_layers` defaults to `NUM_LAYERS`, which shows every block pattern of each type; hybrids need at least 3.
    Raises `KeyError` for a type outside `MODEL_TYPES` and `ValueError` for one in `UNAVAILABLE`.
    """
    if model_type not in MODEL_TYPES:
        raise KeyError(model_type)
    if model_type in UNAVAILABLE:
        raise ValueError(f"{model_type}: {UNAVAILABLE[model_type]}")
    model_class, config = _model_class_and_config(tiny_config(model_type, num_layers=num_layers))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=torch.float32)
        _redraw(model, torch.Generator().manual_seed(seed), WEIGHT_STD.get(model_type, 0.25))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def tiny_inputs(model: PreTrainedModel, *, batch: int = 2, length: int = 10, seed: int = 1) -> torch.Tensor:
    """Token ids `[batch, length]` (int64) without special tokens."""
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(5, min(vocab, VOCAB), (batch, length), generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    import tiny_check

    sys.exit(tiny_check.main(sys.argv[1:] or list(MODEL_TYPES)))

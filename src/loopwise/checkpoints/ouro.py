"""Ouro, looped language models (2510.25741).

    s_0 = embed(ids);  s_t = norm(layers(s_{t-1}));  lambda_t = sigmoid(w . s_t + b);  logits_t = head(s_t)

All layers are in the loop, and the final norm is too: what it gives is read by gate and head and fed back.
"""

from __future__ import annotations

from typing import Any

from loopwise.checkpoints.family import Config, Family, count, require
from loopwise.checkpoints.tensors import Rule
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import SHARED_NORM, LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
_NORMS = {
    "input_layernorm": "mixer_norm_in",
    "input_layernorm_2": "mixer_norm_out",
    "post_attention_layernorm": "mlp_norm_in",
    "post_attention_layernorm_2": "mlp_norm_out",
}


def _windows(config: Config) -> list[int | None]:
    """The sliding window of every layer, None where it sees everything."""
    num_layers = count(config, "num_hidden_layers")
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        return [window if i >= first else None for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        raise ValueError(f"config.json has layer_types={types!r}: give one for each of {num_layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"config.json has layer_types with {kind!r}: supported is full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise ValueError(
                "config.json has layer_types with 'sliding_attention' and no window: give sliding_window and "
                "use_sliding_window=true"
            )
    return [window if kind == "sliding_attention" else None for kind in types]


def _attention(config: Config, window: int | None) -> AttentionConfig:
    heads = count(config, "num_attention_heads")
    head_dim = config.get("head_dim") or count(config, "hidden_size") // heads
    settings = config.get("rope_parameters") or {}  # where transformers 5 writes both
    theta = require(settings if "rope_theta" in settings else config, "rope_theta")
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope=RotaryConfig(dim=head_dim, theta=float(theta), scaling=config.get("rope_scaling") or settings or None),
        sliding_window=window,
        dropout=float(config.get("attention_dropout", 0.0)),
    )


def _loop(config: Config) -> dict[str, Any]:
    loop: dict[str, Any] = {"turn": SHARED_NORM, "gate": True}
    threshold = config.get("early_exit_threshold")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"config.json has early_exit_threshold={threshold!r}: use a number from 0 to 1, or null")
    if threshold is not None and threshold < 1 and config.get("early_exit_step") is None:
        loop |= {"halting": {"kind": "halting.hazard", "threshold": float(threshold)}, "on_exit": "select"}
    return loop


def _num_loops(config: Config) -> int:
    """Iterations; the published file reads the state of a fixed step even though it runs those after it."""
    steps, step = count(config, "total_ut_steps"), config.get("early_exit_step")
    return steps if step is None or not 0 <= step < steps else step + 1


def _build(config: Config, names: frozenset[str]) -> LoopwiseForCausalLM:
    width, num_layers = count(config, "hidden_size"), count(config, "num_hidden_layers")
    activation = require(config, "hidden_act", *_ACTIVATIONS)
    norm = NormConfig(eps=float(config.get("rms_norm_eps", 1e-6)))
    blocks = [
        BlockConfig(
            hidden_size=width,
            mixer=_attention(config, window),
            mlp=MLPConfig(intermediate_size=count(config, "intermediate_size"), activation=_ACTIVATIONS[activation]),
            norm=norm,
            placement="branch",
        ).to_dict()
        for window in _windows(config)
    ]
    return LoopwiseForCausalLM(
        LoopwiseDecoderConfig(
            vocab_size=count(config, "vocab_size"),
            hidden_size=width,
            num_hidden_layers=num_layers,
            blocks=blocks,
            plan=f"core:(0-{num_layers - 1})x{_num_loops(config)}",
            loops={"core": _loop(config)},
            norm={"eps": norm.eps},
            norm_last=False,
            max_position_embeddings=config.get("max_position_embeddings", 32768),
            initializer_range=config.get("initializer_range", 0.02),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            pad_token_id=config.get("pad_token_id"),
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=config.get("eos_token_id"),
        )
    )


def _rules(config: Config, names: frozenset[str]) -> list[Rule]:
    gate = "model.loops.core.gate.linear"
    rules = [
        Rule(foreign="model.embed_tokens.weight", ours=("model.embed_tokens.weight",)),
        Rule(foreign="model.norm.weight", ours=("model.norm.weight",)),
        Rule(foreign="model.early_exit_gate.weight", ours=(f"{gate}.weight",)),
        Rule(foreign="model.early_exit_gate.bias", ours=(f"{gate}.bias",)),
    ]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        rules += [Rule(foreign=f"{layer}.{a}.weight", ours=(f"{layer}.{b}.weight",)) for a, b in _NORMS.items()]
        rules += [
            Rule(foreign=f"{layer}.self_attn.{p}_proj.weight", ours=(f"{layer}.mixer.{p}_proj.weight",)) for p in "qkvo"
        ]
        rules += [
            Rule(foreign=f"{layer}.mlp.{p}_proj.weight", ours=(f"{layer}.mlp.{p}_proj.weight",))
            for p in ("gate", "up", "down")
        ]
    if config.get("tie_word_embeddings", False):
        rules.append(Rule(foreign="lm_head.weight", tied_to="model.embed_tokens.weight"))
    else:
        rules.append(Rule(foreign="lm_head.weight", ours=("lm_head.weight",)))
    return rules


OURO = Family(
    name="ouro",
    source="2510.25741, ByteDance/Ouro",
    matches=lambda config, names: config.get("model_type") == "ouro",
    build=_build,
    rules=_rules,
    differs="The paper trains on the expected loss, the published file on the loss of the expected logits; the paper "
    "stops when the gate says so, the file runs every iteration and only reads an earlier one. Both are available.",
)

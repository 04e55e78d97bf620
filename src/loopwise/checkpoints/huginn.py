"""Huginn, recurrent depth (2502.05171), and the models retrofitted from Llama and OLMo-2 in its layout (2511.07384).

    e = prelude(embed(ids) * scale);  s_0 random;  s <- core(adapter [s; e]), r times;  logits = head(n(coda(s)))

Huginn's blocks norm the stream itself, its final norm also stands between core and coda, and its rotation is
interleaved. Retrofitted blocks are those of the source model; no norm stands before the coda.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from loopwise.checkpoints.family import Config, Family, require
from loopwise.checkpoints.tensors import Rule
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import SHARED_NORM, LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig, QKNormConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig

_NORMS = {"norm_1": "mixer_norm_in", "norm_2": "mixer_norm_out", "norm_3": "mlp_norm_in", "norm_4": "mlp_norm_out"}
_PRE_NORMS = {"norm_1": "mixer_norm_in", "norm_2": "mlp_norm_in"}
_OUT_NORMS = {"norm_1": "mixer_norm_out", "norm_2": "mlp_norm_out"}


def _is_raven(config: Config) -> bool:
    return config.get("model_type") == "huginn_raven"


def _is_sandwich(names: frozenset[str]) -> bool:
    return any(name.endswith(".norm_3.weight") for name in names)


def _is_olmo(names: frozenset[str]) -> bool:
    return any(name.endswith(".attn.q_norm.weight") for name in names)


def _sections(config: Config) -> list[tuple[str, int]]:
    """(foreign prefix, number within it) of every layer, in the order of ours."""
    counts = {
        "prelude": require(config, "n_layers_in_prelude"),
        "core_block": require(config, "n_layers_in_recurrent_block"),
        "coda": require(config, "n_layers_in_coda"),
    }
    return [(section, i) for section, count in counts.items() for i in range(count)]


def _attention(config: Config, names: frozenset[str]) -> AttentionConfig:
    heads = require(config, "n_heads")
    head_dim = config.get("head_dim") or require(config, "n_embd") // heads
    if _is_sandwich(names):
        rope = RotaryConfig(dim=head_dim, theta=float(require(config, "rope_base")), style="interleaved")
    else:
        rope = RotaryConfig(
            dim=head_dim, theta=float(require(config, "rope_theta")), scaling=config.get("rope_scaling")
        )
    eps = config.get("norm_eps", 1e-6)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope=rope,
        qk_bias=bool(config.get("qk_bias")) and _is_sandwich(names),
        qk_norm=QKNormConfig(norm=NormConfig(eps=eps), over="width") if _is_olmo(names) else None,
    )


def _build(config: Config, names: frozenset[str]) -> LoopwiseForCausalLM:
    require(config, "injection_type", "linear")
    width = require(config, "n_embd")
    sandwich = _is_sandwich(names)
    norm = NormConfig(eps=config.get("norm_eps", 1e-6))
    placement = "stream" if sandwich else ("branch_out" if _is_olmo(names) else "pre")
    block = BlockConfig(
        hidden_size=width,
        mixer=_attention(config, names),
        mlp=MLPConfig(intermediate_size=require(config, "intermediate_size")),
        norm=norm,
        placement=placement,
    )
    prelude, core = require(config, "n_layers_in_prelude"), require(config, "n_layers_in_recurrent_block")
    num_layers = len(_sections(config))
    plan = f"core:({prelude}-{prelude + core - 1})x{config.get('mean_recurrence', 1)}"
    plan = f"{_span(0, prelude - 1)} {plan} {_span(prelude + core, num_layers - 1)}".strip()
    scale = math.sqrt(width) if sandwich else float(config.get("init_values", {}).get("embed_scale", 1.0))
    return LoopwiseForCausalLM(
        LoopwiseDecoderConfig(
            vocab_size=config.get("padded_vocab_size") or require(config, "vocab_size"),
            hidden_size=width,
            num_hidden_layers=num_layers,
            blocks=[block.to_dict()],
            plan=plan,
            loops={"core": _loop(width, sandwich)},
            norm={"eps": norm.eps},
            embedding_scale=scale,
            max_position_embeddings=config.get("block_size", 4096),
            tie_word_embeddings=bool(config.get("tie_embeddings", True)),
        )
    )


def _loop(width: int, sandwich: bool) -> dict[str, Any]:
    # Retrofitted models keep Huginn's own number, sqrt(2 / (5 * 5280)), whatever their width.
    std = math.sqrt(2 / 5 / width) if sandwich else math.sqrt(2 / 5 / 5280)
    state = {"kind": "state.normal", "std": std, "scale": math.sqrt(width) if sandwich else 1.0}
    exit_norm = {"exit": SHARED_NORM} if sandwich else {}
    return {"state": state, "update": {"kind": "update.concat"}, **exit_norm}


def _span(first: int, last: int) -> str:
    return "" if last < first else f"{first}-{last}"


def _rules(config: Config, names: frozenset[str]) -> list[Rule]:
    norms = _NORMS if _is_sandwich(names) else (_OUT_NORMS if _is_olmo(names) else _PRE_NORMS)
    rules = [
        Rule(foreign="transformer.wte.weight", ours=("model.embed_tokens.weight",)),
        Rule(foreign="transformer.adapter.weight", ours=("model.loops.core.update.adapter.weight",)),
        Rule(foreign="transformer.ln_f.weight", ours=("model.norm.weight",)),
    ]
    for i, (section, j) in enumerate(_sections(config)):
        there, here = f"transformer.{section}.{j}", f"model.layers.{i}"
        rules += [Rule(foreign=f"{there}.{a}.weight", ours=(f"{here}.{b}.weight",)) for a, b in norms.items()]
        rules += [
            Rule(foreign=f"{there}.attn.Wqkv.weight", ours=tuple(f"{here}.mixer.{p}_proj.weight" for p in "qkv")),
            Rule(foreign=f"{there}.attn.proj.weight", ours=(f"{here}.mixer.o_proj.weight",)),
            Rule(foreign=f"{there}.mlp.fc.weight", ours=tuple(f"{here}.mlp.{p}_proj.weight" for p in ("gate", "up"))),
            Rule(foreign=f"{there}.mlp.proj.weight", ours=(f"{here}.mlp.down_proj.weight",)),
        ]
        if _is_olmo(names):
            rules += [
                Rule(foreign=f"{there}.attn.{p}_norm.weight", ours=(f"{here}.mixer.{p}_norm.weight",)) for p in "qk"
            ]
        if config.get("qk_bias") and _is_sandwich(names):
            rules.append(Rule(foreign=f"{there}.attn.qk_bias", ours=(f"{here}.mixer.qk_bias",)))
    if config.get("tie_embeddings", True):
        rules.append(Rule(foreign="lm_head.weight", tied_to="transformer.wte.weight"))
    else:
        rules.append(Rule(foreign="lm_head.weight", ours=("lm_head.weight",)))
    if _is_sandwich(names):
        rules.append(Rule(foreign="freqs_cis", derive=lambda: rotary_buffer(config)))
    return rules


def rotary_buffer(config: Config) -> torch.Tensor:
    """The table that Huginn stores: float32 `[1, positions, 1, head_dim / 2, 2]`, cosine and sine last."""
    head_dim = require(config, "n_embd") // (config.get("n_heads") or require(config, "num_attention_heads"))
    settings = {"rope_base": 50_000, "rope_condense_ratio": 1} | dict(config.get("rope_settings") or {})  # Parcae's
    base = config.get("rope_base") or settings["rope_base"]
    positions = config.get("randomize_positions_from") or require(config, "block_size")
    frequencies = 1.0 / (base ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim))
    angles = torch.outer(torch.arange(positions).float() / settings["rope_condense_ratio"], frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]


HUGINN = Family(
    name="huginn",
    source="2502.05171, seal-rg/recurrent-pretraining",
    matches=lambda config, names: _is_raven(config) and _is_sandwich(names),
    build=_build,
    rules=_rules,
    differs="The public file ignores the attention mask; ours masks padding. A random state takes a generator.",
)
RETROFIT = Family(
    name="retrofit",
    source="2511.07384, LoopedLMs/retrofitting-recurrence",
    matches=lambda config, names: _is_raven(config) and not _is_sandwich(names),
    build=_build,
    rules=_rules,
)

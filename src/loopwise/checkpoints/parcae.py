"""Parcae (2604.12946): a loop whose state decays by a stable diagonal map before the prelude's output is added.

    e = n(prelude(embed(ids)));  s_0 random;  s <- core(exp(-delta a) s + delta B e), r times
    logits = head(n(coda(C s)))

Blocks are pre-norm; queries and keys are normed after an interleaved rotation. Every other layer has a table of value
embeddings and every other layer a gate that lets them in. The file counts the layers in two ways for the two, so that
there may be tables that no gate lets in ("dead") and gates without a table; both are kept.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from loopwise.checkpoints.family import Config, Family, count, require
from loopwise.checkpoints.huginn import rotary_buffer
from loopwise.checkpoints.tensors import Rule
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig, QKNormConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig

_SECTIONS = {
    "prelude": "n_layers_in_prelude",
    "core_block": "n_layers_in_recurrent_block",
    "coda": "n_layers_in_coda",
}
_GATE_CHANNELS = 32
_NORMS = {"RMSNorm": "rms", "LayerNorm": "layer"}
_ACTIVATIONS = {"ReLU2": "half_relu2", "GELU": "gelu", "SiLU": "silu", "ReLU": "relu"}
# Field -> the values with which the forward of the public code is what we compute; absent fields have the first.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_class_name": ("TransformerPreNormBlock",),
    "norm_class_name": ("LayerNorm", "RMSNorm"),
    "mlp_class_name": ("BaseMLP", "GatedMLP"),
    "nonlin_name": ("GELU", "ReLU2", "SiLU", "ReLU"),
    "injection_type": ("diagonal", "linear", "add"),
    "state_init": ("like-init", "zero"),
    "init_strategy": ("scaled", "scaled-zero", "scaled-geiping", "scaled-stuck", "small", "takase"),
    "use_fused_head": ("pytorch", "cce", "full-triton"),
    "clip_qkv": (None,),
    "logit_softcap": (None,),
    "mup_model_scaling_factor": (1,),
}


def _get(config: Config, field: str) -> Any:
    """The value of a field of `_SUPPORTED`; `ValueError` when it is not supported."""
    allowed = _SUPPORTED[field]
    return require({field: allowed[0], **config}, field, *allowed)


def _check(config: Config) -> None:
    for field in _SUPPORTED:
        _get(config, field)
    width, heads = count(config, "n_embd"), count(config, "num_attention_heads")
    require({"recurrent_embedding_dimension": 1024, **config}, "recurrent_embedding_dimension", width)
    require({"recurrent_num_attention_heads": None, **config}, "recurrent_num_attention_heads", None, heads)
    if config.get("use_fused_head") == "full-triton" and not config.get("tie_embeddings", False):
        raise ValueError(
            "config.json has use_fused_head='full-triton' with an untied head: supported is 'pytorch', 'cce'"
        )


def _layers(config: Config) -> list[tuple[str, int]]:
    """(section, number within it) of every layer, in our order."""
    return [
        (section, i)
        for section, field in _SECTIONS.items()
        for i in range(count(config, field, least=1 if section == "core_block" else 0))
    ]


def _has_gate(config: Config, section: str, i: int) -> bool:
    """Whether a layer has a value gate.

    The public code asks for the parity of the last of `core layers * gradient window` layers, and numbers the layers of
    the coda as if the mean number of iterations were unrolled before them.
    """
    prelude, core = count(config, "n_layers_in_prelude", least=0), count(config, "n_layers_in_recurrent_block")
    before = {"prelude": 0, "core_block": prelude, "coda": prelude + core * count(config, "mean_recurrence")}
    last = core * count(config, "mean_backprop_depth") - 1
    return (before[section] + i) % 2 == last % 2


def _tables(config: Config) -> list[int]:
    """Layers that have a table of value embeddings: every other one, the last included."""
    num_layers = len(_layers(config))
    return [i for i in range(num_layers) if i % 2 == (num_layers - 1) % 2]


def _kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or count(config, "num_attention_heads")


def _norm(config: Config) -> NormConfig:
    kind = "RMSNorm" if config.get("simple_ops") else _get(config, "norm_class_name")
    is_layer = kind == "LayerNorm"
    return NormConfig(type=_NORMS[kind], eps=config.get("norm_eps", 1e-5), bias=is_layer, weight_in_float32=is_layer)


def _rope(config: Config) -> RotaryConfig | None:
    settings = {"use_rope": True, "rope_base": 50_000, "rope_condense_ratio": 1} | dict(
        config.get("rope_settings") or {}
    )
    if not settings["use_rope"]:
        return None
    ratio = settings["rope_condense_ratio"]
    return RotaryConfig(
        dim=count(config, "n_embd") // count(config, "num_attention_heads"),
        theta=float(settings["rope_base"]),
        style="interleaved",
        scaling=None if ratio == 1 else {"rope_type": "linear", "factor": float(ratio)},
    )


def _block(config: Config, section: str, i: int) -> BlockConfig:
    in_core = section == "core_block"
    heads = count(config, "num_attention_heads")
    bias = bool(config.get("bias", False))
    inner = "recurrent_intermediation_embedding_dimension" if in_core else "intermediate_size"
    normed = QKNormConfig(norm=NormConfig(eps=None, weight=False), when="after_rope")
    return BlockConfig(
        hidden_size=count(config, "n_embd"),
        mixer=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads if in_core else _kv_heads(config),
            rope=_rope(config),
            qkv_bias=bias,
            out_bias=bias,
            qk_bias=bool(config.get("qk_bias", False)),
            qk_norm=normed if config.get("qk_norm", False) else None,
            value_gate_channels=_GATE_CHANNELS if _has_gate(config, section, i) else None,
        ),
        mlp=MLPConfig(
            intermediate_size=count(config, inner),
            activation=_ACTIVATIONS[_get(config, "nonlin_name")],
            gated=_get(config, "mlp_class_name") == "GatedMLP",
            bias=bias,
        ),
        norm=_norm(config),
    )


def _loop(config: Config) -> dict[str, Any]:
    width, bias = count(config, "n_embd"), bool(config.get("bias", False))
    if _get(config, "state_init") == "zero":
        state: dict[str, Any] = {"kind": "state.zeros"}
    else:
        state = {"kind": "state.normal", "std": math.sqrt(2 / (5 * width)), "scale": _embedding_scale(config)}
    updates = {
        "diagonal": {"kind": "update.decay"},
        "linear": {"kind": "update.concat", "bias": bias},
        "add": {"kind": "update.add"},
    }
    return {
        "state": state,
        "update": updates[_get(config, "injection_type")],
        "entry": asdict(_norm(config)) if config.get("prelude_norm", False) else None,
        "exit_projection": "bias" if bias else True,
    }


def _embedding_scale(config: Config) -> float:
    return math.sqrt(count(config, "n_embd")) if _get(config, "init_strategy") == "takase" else 1.0


def _plan(config: Config) -> str:
    first = count(config, "n_layers_in_prelude", least=0)
    last = first + count(config, "n_layers_in_recurrent_block") - 1
    parts = [f"0-{first - 1}"] if first else []
    parts.append(f"core:({first}-{last})x{count(config, 'mean_recurrence')}")
    num_layers = len(_layers(config))
    return " ".join([*parts, f"{last + 1}-{num_layers - 1}"] if num_layers > last + 1 else parts)


def _build(config: Config, names: frozenset[str]) -> LoopwiseForCausalLM:
    _check(config)
    width, layers = count(config, "n_embd"), _layers(config)
    table_width = _kv_heads(config) * (width // count(config, "num_attention_heads"))
    return LoopwiseForCausalLM(
        LoopwiseDecoderConfig(
            vocab_size=_padded_vocab_size(config),
            hidden_size=width,
            num_hidden_layers=len(layers),
            blocks=[_block(config, section, i).to_dict() for section, i in layers],
            plan=_plan(config),
            loops={"core": _loop(config)},
            norm=asdict(_norm(config)),
            embedding_scale=_embedding_scale(config),
            value_embeddings={str(i): table_width for i in _tables(config)},
            max_position_embeddings=count(config, "block_size"),
            tie_word_embeddings=bool(config.get("tie_embeddings", False)),
        )
    )


def _padded_vocab_size(config: Config) -> int:
    if config.get("padded_vocab_size") is not None:
        return count(config, "padded_vocab_size")
    multiple = count({"padding_multiple": 512, **config}, "padding_multiple")
    return -(-count(config, "vocab_size") // multiple) * multiple


def _rules(config: Config, names: frozenset[str]) -> list[Rule]:
    kinds = ["weight", "bias"] if config.get("bias", False) else ["weight"]
    norm_kinds = ["weight", "bias"] if _norm(config).bias else ["weight"]
    core = "model.loops.core"

    def pairs(there: str, *here: str, kinds: list[str] = kinds) -> list[Rule]:
        return [Rule(foreign=f"{there}.{kind}", ours=tuple(f"{name}.{kind}" for name in here)) for kind in kinds]

    rules = [Rule(foreign="transformer.wte.weight", ours=("model.embed_tokens.weight",))]
    for i, (section, j) in enumerate(_layers(config)):
        there, here = f"transformer.{section}.{j}", f"model.layers.{i}"
        rules += pairs(f"{there}.norm_1", f"{here}.mixer_norm_in", kinds=norm_kinds)
        for name, ours in {"c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj"}.items():
            rules += pairs(f"{there}.attn.{name}", f"{here}.mixer.{ours}")
        if config.get("qk_bias", False):
            rules.append(Rule(foreign=f"{there}.attn.qk_bias", ours=(f"{here}.mixer.qk_bias",)))
        if _has_gate(config, section, j):
            rules += pairs(f"{there}.attn.ve_gate", f"{here}.mixer.value_gate", kinds=["weight"])
        inner = ("gate_proj", "up_proj") if _get(config, "mlp_class_name") == "GatedMLP" else ("up_proj",)
        rules += pairs(f"{there}.norm_2", f"{here}.mlp_norm_in", kinds=norm_kinds)
        rules += pairs(f"{there}.mlp.fc", *(f"{here}.mlp.{name}" for name in inner))
        rules += pairs(f"{there}.mlp.proj", f"{here}.mlp.down_proj")
    if config.get("prelude_norm", False):
        rules += pairs("transformer.ln_prelude", f"{core}.entry", kinds=norm_kinds)
    if _get(config, "injection_type") == "diagonal":
        rules += [
            Rule(foreign=f"transformer.adapter.{p}", ours=(f"{core}.update.{p}",)) for p in ("A_log", "dt_bias", "B")
        ]
    elif _get(config, "injection_type") == "linear":
        rules += pairs("transformer.adapter.adapter", f"{core}.update.adapter")
    rules += pairs("transformer.C", f"{core}.exit")
    rules += pairs("transformer.ln_f", "model.norm", kinds=norm_kinds)
    for i in _tables(config):
        rules += pairs(f"value_embeds.{i}", f"model.value_embeddings.{i}", kinds=["weight"])
    if config.get("tie_embeddings", False):
        rules.append(Rule(foreign="lm_head.weight", tied_to="transformer.wte.weight"))
    else:
        rules.append(Rule(foreign="lm_head.weight", ours=("lm_head.weight",)))
    rules.append(Rule(foreign="freqs_cis", derive=lambda: rotary_buffer(config)))
    return rules


PARCAE = Family(
    name="parcae",
    source="2604.12946, sandyresearch/parcae",
    matches=lambda config, names: (
        config.get("_class_name") == "ParcaeConfig" or ("injection_type" in config and "transformer.C.weight" in names)
    ),
    build=_build,
    rules=_rules,
    differs=(
        "The code halves ReLU^2. Its per-batch sampler does not take the gradient window off the depth; ours, like "
        "its per-sequence one, does. It ignores the attention mask and loads with missing tensors; ours does neither."
    ),
)

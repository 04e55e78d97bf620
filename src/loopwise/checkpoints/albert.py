"""ALBERT, an encoder whose layers share their parameters in groups (1909.11942).

    x = W norm(token + position + type) + b;   layer i is that of group int(i / (layers / groups))

A group has one or more inner layers, each `x <- n(x + attention(x)); x <- n(x + mlp(x))`.
"""

from __future__ import annotations

from itertools import groupby

import torch

from loopwise.checkpoints.family import Config, Family, count, require
from loopwise.checkpoints.tensors import Rule
from loopwise.models.blocks import BlockConfig
from loopwise.models.encoder import LoopwiseEncoder, LoopwiseEncoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
# fields that files of some versions leave out
_DEFAULTS = {
    "inner_group_num": 1,
    "num_hidden_groups": 1,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
}
_POOLER = "albert.pooler.weight"
_TOKENS = "predictions.dense.weight"
_ORDER = "sop_classifier.classifier.weight"
# foreign module -> ours, inside a layer
_LAYER = {
    "attention.query": "mixer.q_proj",
    "attention.key": "mixer.k_proj",
    "attention.value": "mixer.v_proj",
    "attention.dense": "mixer.o_proj",
    "attention.LayerNorm": "mixer_norm_out",
    "ffn": "mlp.up_proj",
    "ffn_output": "mlp.down_proj",
    "full_layer_layer_norm": "mlp_norm_out",
}


def _has(names: frozenset[str], name: str) -> bool:
    """Whether a checkpoint has a part; one without names, of which only the configuration is known, has all parts."""
    return not names or name in names


def plan_text(config: Config) -> str:
    """The plan of the layers: one loop per group, named core where there is only one, and group0, group1, ... else."""
    config = _DEFAULTS | dict(config)
    num_layers, num_groups = count(config, "num_hidden_layers"), count(config, "num_hidden_groups")
    inner = count(config, "inner_group_num")
    if num_groups > num_layers:
        raise ValueError(f"config.json has num_hidden_groups={num_groups}: use at most num_hidden_layers {num_layers}")
    order = [int(i / (num_layers / num_groups)) for i in range(num_layers)]
    loops = []
    for group, visits in groupby(order):
        body = f"{group * inner}-{(group + 1) * inner - 1}" if inner > 1 else f"{group}"
        name = "core" if num_groups == 1 else f"group{group}"
        loops.append(f"{name}:({body})x{len(list(visits))}")
    return " ".join(loops)


def _build(config: Config, names: frozenset[str]) -> LoopwiseEncoder:
    config = _DEFAULTS | dict(config)
    require(config, "tie_word_embeddings", True)
    require(config, "position_embedding_type", "absolute")
    width = count(config, "hidden_size")
    heads = count(config, "num_attention_heads")
    if width % heads:
        raise ValueError(f"config.json has num_attention_heads={heads}: use a divisor of hidden_size {width}")
    activation = _ACTIVATIONS[require(config, "hidden_act", *_ACTIVATIONS)]
    dropout = float(config.get("hidden_dropout_prob", 0.0))
    norm = {"type": "layer", "eps": float(config.get("layer_norm_eps", 1e-12)), "bias": True}
    block = BlockConfig(
        hidden_size=width,
        mixer=AttentionConfig(
            num_heads=heads,
            mask="bidirectional",
            qkv_bias=True,
            out_bias=True,
            dropout=float(config.get("attention_probs_dropout_prob", 0.0)),
            out_dropout=dropout,
        ),
        mlp=MLPConfig(
            intermediate_size=count(config, "intermediate_size"),
            activation=activation,
            gated=False,
            bias=True,
            dropout=dropout,
        ),
        norm=NormConfig(**norm),
        placement="post",
    )
    parts = {"tokens": _has(names, _TOKENS), "order": _has(names, _ORDER)}
    return LoopwiseEncoder(
        LoopwiseEncoderConfig(
            vocab_size=count(config, "vocab_size"),
            hidden_size=width,
            embedding_size=count(config, "embedding_size"),
            num_hidden_layers=count(config, "num_hidden_groups") * count(config, "inner_group_num"),
            blocks=[block.to_dict()],
            plan=plan_text(config),
            norm=None,
            num_positions=count(config, "max_position_embeddings"),
            max_position_embeddings=count(config, "max_position_embeddings"),
            num_token_types=count(config, "type_vocab_size"),
            embedding_norm=norm,
            embedding_dropout=dropout,
            heads=[head for head, has in parts.items() if has],
            head_norm=norm,
            head_activation=activation,
            head_dropout=float(config.get("classifier_dropout_prob", 0.0)),
            pools=_has(names, _POOLER) or parts["order"],
            initializer_range=config.get("initializer_range", 0.02),
            pad_token_id=config.get("pad_token_id"),
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=config.get("eos_token_id"),
        )
    )


def _both(foreign: str, ours: str) -> list[Rule]:
    return [Rule(foreign=f"{foreign}.{part}", ours=(f"{ours}.{part}",)) for part in ("weight", "bias")]


def _rules(config: Config, names: frozenset[str]) -> list[Rule]:
    embeddings = "albert.embeddings"
    rules = [
        Rule(foreign=f"{embeddings}.{theirs}_embeddings.weight", ours=(f"embeddings.{ours}.weight",))
        for theirs, ours in {"word": "tokens", "position": "positions", "token_type": "types"}.items()
    ]
    rules += _both(f"{embeddings}.LayerNorm", "embeddings.norm")
    rules += _both("albert.encoder.embedding_hidden_mapping_in", "embeddings.projection")
    config = _DEFAULTS | dict(config)
    inner = config["inner_group_num"]
    for group in range(config["num_hidden_groups"]):
        for j in range(inner):
            there = f"albert.encoder.albert_layer_groups.{group}.albert_layers.{j}"
            for theirs, ours in _LAYER.items():
                rules += _both(f"{there}.{theirs}", f"model.layers.{group * inner + j}.{ours}")
    if _has(names, _POOLER) or _has(names, _ORDER):
        rules += _both("albert.pooler", "pooler")
    if _has(names, _TOKENS):
        rules += _both("predictions.dense", "tokens_head.dense") + _both("predictions.LayerNorm", "tokens_head.norm")
        rules.append(Rule(foreign="predictions.bias", ours=("tokens_head.bias",)))
        rules.append(Rule(foreign="predictions.decoder.weight", tied_to=f"{embeddings}.word_embeddings.weight"))
        rules.append(Rule(foreign="predictions.decoder.bias", tied_to="predictions.bias"))
    if _has(names, _ORDER):
        rules += _both("sop_classifier.classifier", "order_head")
    if f"{embeddings}.position_ids" in names:  # a buffer that files of older versions hold
        size = config["max_position_embeddings"]
        rules.append(Rule(foreign=f"{embeddings}.position_ids", derive=lambda: torch.arange(size)[None]))
    return rules


def _matches(config: Config, names: frozenset[str]) -> bool:
    return config.get("model_type") == "albert" and any(name.startswith("albert.") for name in names)


ALBERT = Family(
    name="albert",
    source="1909.11942, transformers",
    matches=_matches,
    build=_build,
    rules=_rules,
    differs="The paper shares all layers; files may have several groups, and layers within a group.",
)

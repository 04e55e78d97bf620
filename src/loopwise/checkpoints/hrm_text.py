"""HRM-Text, a hierarchical language model (2605.20613), in the two layouts of transformers' `hrm_text`.

    z_H = embed(ids) * scale, z_L = a fixed vector;
    H_cycles times: (z_L <- n(L(z_L + z_H)), L_cycles times), z_H <- n(H(z_H + z_L));   logits = head(z_H)

L and H are stacks of pre-norm blocks with gated attention; n and all norms are without weight. Tokens of a prefix see
each other. Files hold split projections (what the class of transformers has in memory) or fused ones (the hub).
"""

from __future__ import annotations

from collections.abc import Sequence

from loopwise.checkpoints.family import Config, Family, count, require
from loopwise.checkpoints.tensors import Rule
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_STACKS = ("L_module", "H_module")


def _is_hrm_text(config: Config, names: frozenset[str]) -> bool:
    return config.get("model_type") == "hrm_text"


def _is_fused(names: frozenset[str]) -> bool:
    return any(name.endswith(".attn.gqkv_proj.weight") for name in names)


def _layers_per_stack(config: Config) -> int:
    # transformers writes the number of visits into num_hidden_layers and keeps the number of layers here.
    is_inflated = config.get("num_layers_per_stack") is not None
    return count(config, "num_layers_per_stack" if is_inflated else "num_hidden_layers")


def _cycles(config: Config) -> tuple[int, int]:
    config = {"H_cycles": 2, "L_cycles": 3, **config}
    return count(config, "H_cycles"), count(config, "L_cycles")


def _window(config: Config) -> list[int]:
    """Of every cycle, how many of its last calls of L carry a gradient."""
    field = "L_bp_cycles" if config.get("L_bp_cycles") is not None or "L_bp_steps" not in config else "L_bp_steps"
    last = config.get(field)
    last = [2] if last is None else last
    if not isinstance(last, Sequence) or isinstance(last, str) or not all(type(n) is int and n >= 0 for n in last):
        raise ValueError(f"config.json has {field}={last!r}: supported is a list of whole numbers of at least 0")
    cycles = _cycles(config)[0]
    return ([1] * (cycles - len(last)) + list(last))[:cycles]


def _rope(config: Config, head_dim: int) -> RotaryConfig:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return RotaryConfig(dim=head_dim, theta=theta)
    try:
        return RotaryConfig(dim=head_dim, theta=theta, scaling=rope)
    except ValueError as error:
        raise ValueError(f"config.json has an unsupported value in rope_parameters: {error}") from None


def _block(config: Config) -> BlockConfig:
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"config.json has hidden_act={activation!r}: supported is {', '.join(_ACTIVATIONS)}")
    head_dim = count({"head_dim": 128, **config}, "head_dim")
    if head_dim % 2:
        raise ValueError(f"config.json has head_dim={head_dim}: supported is an even number, channels turn in pairs")
    bias = bool(config.get("attention_bias", False))
    return BlockConfig(
        hidden_size=count(config, "hidden_size"),
        mixer=AttentionConfig(
            num_heads=count(config, "num_attention_heads"),
            head_dim=head_dim,
            mask="prefix" if config.get("prefix_lm", True) else "causal",
            rope=_rope(config, head_dim),
            qkv_bias=bias,
            out_bias=bias,
            output_gate="channel",
            dropout=config.get("attention_dropout") or 0.0,
        ),
        mlp=MLPConfig(
            intermediate_size=count(config, "intermediate_size"),
            activation=_ACTIVATIONS[activation],
            bias=bool(config.get("mlp_bias", False)),
        ),
        norm=NormConfig(eps=config.get("rms_norm_eps", 1e-6), weight=False),
        placement="pre",
    )


def _build(config: Config, names: frozenset[str]) -> LoopwiseForCausalLM:
    heads = require(config, "num_attention_heads")
    if config.get("num_key_value_heads", heads) != heads:
        require(config, "num_key_value_heads", heads)
    block, layers, (high, low) = _block(config), _layers_per_stack(config), _cycles(config)
    norm = {"eps": block.norm.eps, "weight": False}
    std = config.get("initializer_range", 0.02)
    scale = config.get("embedding_scale")
    lower = {"stream": "z_L", "reads": ["z_H"], "grad": _window(config)}
    upper = {"stream": "z_H", "reads": ["z_L"]}
    shared = {"update": {"kind": "update.add"}, "turn": norm}
    return LoopwiseForCausalLM(
        LoopwiseDecoderConfig(
            vocab_size=count(config, "vocab_size"),
            hidden_size=block.hidden_size,
            num_hidden_layers=2 * layers,
            blocks=[block.to_dict()],
            plan=f"cycle:(low:(0-{layers - 1})x{low} high:({layers}-{2 * layers - 1}))x{high}",
            loops={"low": lower | shared, "high": upper | shared},
            streams={"z_H": "input", "z_L": "fixed"},
            norm=None,
            norm_last=False,
            embedding_scale=1.0 / std if scale is None else float(scale),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            initializer_range=std,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            pad_token_id=config.get("pad_token_id"),
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=config.get("eos_token_id"),
        )
    )


def _rules(config: Config, names: frozenset[str]) -> list[Rule]:
    rules = [
        Rule(foreign="model.embed_tokens.weight", ours=("model.embed_tokens.weight",)),
        Rule(foreign="model.z_L_init", ours=("model.streams.z_L",)),
    ]
    per_stack = _layers_per_stack(config)
    for s, stack in enumerate(_STACKS):
        for i in range(per_stack):
            there, here = f"model.{stack}.layers.{i}", f"model.layers.{s * per_stack + i}"
            rules += _weights(there, here) if not _is_fused(names) else _fused_weights(there, here)
            rules += _biases(config, there, here, _is_fused(names))
    if config.get("tie_word_embeddings", False):
        rules.append(Rule(foreign="lm_head.weight", tied_to="model.embed_tokens.weight"))
    else:
        rules.append(Rule(foreign="lm_head.weight", ours=("lm_head.weight",)))
    return rules


def _weights(there: str, here: str) -> list[Rule]:
    attention = [(f"self_attn.{p}_proj", f"mixer.{p}_proj") for p in ("q", "k", "v", "gate", "o")]
    mlp = [(f"mlp.{p}_proj", f"mlp.{p}_proj") for p in ("gate", "up", "down")]
    return [Rule(foreign=f"{there}.{a}.weight", ours=(f"{here}.{b}.weight",)) for a, b in attention + mlp]


def _fused_weights(there: str, here: str) -> list[Rule]:
    gqkv = tuple(f"{here}.mixer.{p}_proj.weight" for p in ("gate", "q", "k", "v"))
    return [
        Rule(foreign=f"{there}.attn.gqkv_proj.weight", ours=gqkv),
        Rule(foreign=f"{there}.attn.o_proj.weight", ours=(f"{here}.mixer.o_proj.weight",)),
        Rule(
            foreign=f"{there}.mlp.gate_up_proj.weight",
            ours=tuple(f"{here}.mlp.{p}_proj.weight" for p in ("gate", "up")),
        ),
        Rule(foreign=f"{there}.mlp.down_proj.weight", ours=(f"{here}.mlp.down_proj.weight",)),
    ]


def _biases(config: Config, there: str, here: str, fused: bool) -> list[Rule]:
    """Biases are never fused; in the fused layout that of the output projection moves along with its weight."""
    rules = []
    if config.get("attention_bias", False):
        places = [(f"self_attn.{p}_proj", p) for p in ("q", "k", "v", "gate")]
        places.append(("attn.o_proj" if fused else "self_attn.o_proj", "o"))
        rules += [Rule(foreign=f"{there}.{a}.bias", ours=(f"{here}.mixer.{p}_proj.bias",)) for a, p in places]
    if config.get("mlp_bias", False):
        names = [f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")]
        rules += [Rule(foreign=f"{there}.{name}", ours=(f"{here}.{name}",)) for name in names]
    return rules


HRM_TEXT = Family(
    name="hrm_text",
    source="2605.20613, sapientinc/HRM-Text",
    matches=_is_hrm_text,
    build=_build,
    rules=_rules,
    differs="The converter upstream writes L_bp_steps, the class of transformers reads L_bp_cycles; ours reads either.",
)

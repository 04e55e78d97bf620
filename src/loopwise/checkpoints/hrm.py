"""HRM (2506.21734) and TRM (2510.04871): puzzle models of two recurrent stacks, or of one that plays both parts.

    x = sqrt(D) [puzzle ; embed(inputs)]
    H_cycles times: (z_L <- L(z_L + z_H + x), L_cycles times), z_H <- H(z_H + z_L);   logits = head(z_H)

Blocks are post-norm without weights. HRM keeps the gradient of the last call of each stack; TRM, where H is L, that of
the whole last cycle. A TRM block mixes tokens by attention or by an MLP over the length.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from loopwise.checkpoints.family import Config, Family, count, require
from loopwise.checkpoints.tensors import Rule
from loopwise.models.blocks import BlockConfig
from loopwise.models.mixers import AttentionConfig, TokenMixerConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.puzzle import LoopwisePuzzleConfig, LoopwisePuzzleModel
from loopwise.models.rotary import RotaryConfig

_INNER_MULTIPLE = 256
_DTYPES = ("bfloat16", "float16", "float32")


def _is_reasoner(config: Config, names: frozenset[str], *, two: bool) -> bool:
    """The published checkpoints have no model type: fields and names tell; a second stack (`two`) makes it HRM."""
    fields = {"H_cycles", "L_cycles", "seq_len"} <= set(config) and "model_type" not in config
    return fields and _has(names, "L_level.") and _has(names, "H_level.") == two


def _has(names: frozenset[str], part: str) -> bool:
    return any(part in name for name in names)


def _prefix(names: frozenset[str]) -> str:
    """What stands before every name: "inner.", or "_orig_mod.model.inner." as compiled training saves it."""
    return min((name[: name.index("L_level.")] for name in names if "L_level." in name), default="inner.")


def _inner_size(config: Config, size: int) -> int:
    """Width inside a SwiGLU over `size` entries: two thirds of the expansion, rounded up to a multiple."""
    expansion = require(config, "expansion")
    if not isinstance(expansion, int | float) or isinstance(expansion, bool) or not expansion > 0:
        raise ValueError(f"config.json has expansion={expansion!r}: supported is a number above 0")
    return math.ceil(round(expansion * size * 2 / 3) / _INNER_MULTIPLE) * _INNER_MULTIPLE


def _puzzle_positions(config: Config, two: bool) -> int:
    """P: what the vector needs, or (TRM) what the configuration says, 16 when it says nothing."""
    size, width = config.get("puzzle_emb_ndim", 0), count(config, "hidden_size")
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"config.json has puzzle_emb_ndim={size!r}: supported is a whole number of at least 0")
    needed = math.ceil(size / width)
    given = 0 if two else config.get("puzzle_emb_len", 16)
    if not isinstance(given, int) or (given and not size) or 0 != given < needed:
        raise ValueError(
            f"config.json has puzzle_emb_len={given!r}: with puzzle_emb_ndim={size} supported is "
            + (f"0 (for {needed}) or at least {needed}" if size else "0")
        )
    return given or needed


def _mixer(config: Config, two: bool) -> AttentionConfig | TokenMixerConfig:
    if config.get("mlp_t", False) and not two:
        length = count(config, "seq_len") + _puzzle_positions(config, two)
        mlp = MLPConfig(intermediate_size=_inner_size(config, length))
        return TokenMixerConfig(length=length, mlp=mlp)
    width, heads = count(config, "hidden_size"), count(config, "num_heads")
    positions = require(config, "pos_encodings", *_positions(two))
    if width % heads or (positions == "rope" and width // heads % 2):
        even = " with an even quotient" if positions == "rope" else ""
        raise ValueError(f"config.json has num_heads={heads}: supported is a divisor of hidden_size={width}{even}")
    rope = RotaryConfig(dim=width // heads, theta=float(config.get("rope_theta", 10000.0)))
    return AttentionConfig(num_heads=heads, mask="bidirectional", rope=rope if positions == "rope" else None)


def _positions(two: bool) -> tuple[str, ...]:
    return ("rope", "learned") if two else ("rope", "learned", "none")


def _stacks(config: Config, two: bool) -> list[tuple[str, int]]:
    """(foreign name, number of layers) of every stack, in the order of our layers."""
    stacks = [("L_level", count(config, "L_layers"))]
    return [*stacks, ("H_level", count(config, "H_layers"))] if two else stacks


def _plan(config: Config, two: bool) -> str:
    low, high = count(config, "L_cycles"), count(config, "H_cycles")
    (_, lower), *rest = _stacks(config, two)
    upper = f"{lower}-{lower + rest[0][1] - 1}" if rest else f"0-{lower - 1}"
    return f"cycle:(low:(0-{lower - 1})x{low} high:({upper}))x{high}"


def _loops(two: bool) -> dict[str, dict[str, Any]]:
    add = {"kind": "update.add"}
    low: dict[str, Any] = {"update": add, "stream": "z_L", "reads": ["z_H", "x"]}
    if two:
        low["grad"] = 1
    return {"cycle": {"grad": 1}, "low": low, "high": {"update": add, "stream": "z_H", "reads": ["z_L"]}}


def _build(config: Config, names: frozenset[str], *, two: bool) -> LoopwisePuzzleModel:
    if "forward_dtype" in config:
        require(config, "forward_dtype", *_DTYPES)
    width, eps = count(config, "hidden_size"), config.get("rms_norm_eps", 1e-5)
    block = BlockConfig(
        hidden_size=width,
        mixer=_mixer(config, two),
        mlp=MLPConfig(intermediate_size=_inner_size(config, width)),
        norm=NormConfig(eps=eps, weight=False),
        placement="post",
    )
    puzzle_positions = _puzzle_positions(config, two)
    length = count(config, "seq_len") + puzzle_positions
    learned = require(config, "pos_encodings", *_positions(two)) == "learned"
    compares = two or not config.get("no_ACT_continue", True)
    halting = {
        "kind": "halting.segments",
        "max_steps": count(config, "halt_max_steps"),
        "rule": "greater" if compares else "positive",
        "exploration": float(config.get("halt_exploration_prob", 0.0)),
    }
    return LoopwisePuzzleModel(
        LoopwisePuzzleConfig(
            vocab_size=count(config, "vocab_size"),
            hidden_size=width,
            num_hidden_layers=sum(size for _, size in _stacks(config, two)),
            blocks=[block.to_dict()],
            plan=_plan(config, two),
            loops=_loops(two),
            streams={"x": "input"},
            carried=["z_H", "z_L"],
            norm=None,
            embedding_scale=math.sqrt(width),
            max_position_embeddings=length,
            num_puzzles=count(config, "num_puzzle_identifiers") if puzzle_positions else 0,
            puzzle_size=config.get("puzzle_emb_ndim", 0),
            puzzle_positions=puzzle_positions,
            learned_positions=length if learned else None,
            halting=halting,
        )
    )


def _rules(config: Config, names: frozenset[str], *, two: bool) -> list[Rule]:
    prefix = _prefix(names)
    pairs = {
        "embed_tokens.embedding_weight": "model.embed_tokens.weight",
        "H_init": "first.z_H",
        "L_init": "first.z_L",
        "lm_head.weight": "lm_head.weight",
        "q_head.weight": "q_head.weight",
        "q_head.bias": "q_head.bias",
    }
    if config.get("puzzle_emb_ndim", 0):
        pairs["puzzle_emb.weights"] = "puzzles.weight"
    if config["pos_encodings"] == "learned":
        pairs["embed_pos.embedding_weight"] = "positions.weight"
    rules = [Rule(foreign=prefix + there, ours=(here,)) for there, here in pairs.items()]
    layers = [(stack, j) for stack, size in _stacks(config, two) for j in range(size)]
    for i, (stack, j) in enumerate(layers):
        there, here = f"{prefix}{stack}.layers.{j}", f"model.layers.{i}"
        if isinstance(_mixer(config, two), TokenMixerConfig):
            rules += _swiglu(f"{there}.mlp_t", f"{here}.mixer.mlp")
        else:
            qkv = tuple(f"{here}.mixer.{p}_proj.weight" for p in "qkv")
            rules.append(Rule(foreign=f"{there}.self_attn.qkv_proj.weight", ours=qkv))
            rules.append(Rule(foreign=f"{there}.self_attn.o_proj.weight", ours=(f"{here}.mixer.o_proj.weight",)))
        rules += _swiglu(f"{there}.mlp", f"{here}.mlp")
    return rules


def _swiglu(there: str, here: str) -> list[Rule]:
    return [
        Rule(foreign=f"{there}.gate_up_proj.weight", ours=(f"{here}.gate_proj.weight", f"{here}.up_proj.weight")),
        Rule(foreign=f"{there}.down_proj.weight", ours=(f"{here}.down_proj.weight",)),
    ]


HRM = Family(
    name="hrm",
    source="2506.21734, sapientinc/HRM",
    matches=partial(_is_reasoner, two=True),
    build=partial(_build, two=True),
    rules=partial(_rules, two=True),
    differs="The code keeps the gradient of the last call of each stack; it computes in forward_dtype, ours as loaded.",
)
TRM = Family(
    name="trm",
    source="2510.04871, SamsungSAILMontreal/TinyRecursiveModels",
    matches=partial(_is_reasoner, two=False),
    build=partial(_build, two=False),
    rules=partial(_rules, two=False),
    differs="The paper has a single stack and no continue logit; the code ignores H_layers and keeps the logit's row.",
)

"""LoopFormer (2602.11451): a loop over a schedule of steps, whose blocks are told the time and the step.

    x = embed(ids) + positions;  t = 0;  x <- blocks(x; time(t) + step(dt)), t <- t + dt, for every dt
    logits = head(n(x))

Steps sum to 1, so that a shorter schedule takes larger ones. Blocks are pre-norm without norm parameters; what enters
attention and MLP is scaled and what leaves them is gated, as the time and the step say.
"""

from __future__ import annotations

from dataclasses import asdict

from loopwise.checkpoints.family import Config, Family, count, require
from loopwise.checkpoints.tensors import Rule
from loopwise.models.blocks import AdaLNConfig, BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig

DEFAULT_LOOPS = 8  # the public forward's default schedule is 8 steps of 1/8; config.json does not say
# The public loader takes these names too, and tensors under these prefixes.
_ALIASES = {
    "block_size": ("n_positions", "max_position_embeddings"),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
    "intermediate_dim": ("n_inner",),
}
_PREFIXES = ("", "gpt.", "model.", "module.")
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_FINAL_NORM = NormConfig(eps=None, weight_in_float32=True)


def _count(config: Config, field: str) -> int:
    known = [name for name in (field, *_ALIASES.get(field, ())) if config.get(name) is not None]
    if not known and field == "intermediate_dim":
        return 4 * _count(config, "n_embd")
    return count(config, known[0] if known else field)


def _flag(config: Config, field: str) -> bool:
    return bool(require({field: False, **config}, field, True, False))


def _build(config: Config, names: frozenset[str]) -> LoopwiseForCausalLM:
    width, heads, num_layers = _count(config, "n_embd"), _count(config, "n_head"), _count(config, "n_layer")
    bias, dropout = _flag(config, "bias"), config.get("dropout", 0.0)
    block = BlockConfig(
        hidden_size=width,
        mixer=AttentionConfig(num_heads=heads, qkv_bias=bias, out_bias=bias, dropout=dropout, out_dropout=dropout),
        mlp=MLPConfig(
            intermediate_size=_count(config, "intermediate_dim"),
            activation="gelu",
            gated=False,
            bias=bias,
            dropout=dropout,
        ),
        norm=NormConfig(eps=None, weight=False),
        adaln=AdaLNConfig(),
    )
    return LoopwiseForCausalLM(
        LoopwiseDecoderConfig(
            vocab_size=_count(config, "vocab_size"),
            hidden_size=width,
            num_hidden_layers=num_layers,
            blocks=[block.to_dict()],
            plan=f"core:(0-{num_layers - 1})x{DEFAULT_LOOPS}",
            loops={"core": {"conditioner": {"kind": "conditioner.time"}}},
            norm=asdict(_FINAL_NORM),
            embedding_dropout=dropout,
            num_positions=_count(config, "block_size"),
            max_position_embeddings=_count(config, "block_size"),
            tie_word_embeddings=True,
        )
    )


def _prefix(names: frozenset[str]) -> str:
    return next((p for p in _PREFIXES if not names.isdisjoint((p + _EMBEDDING, p + _HEAD))), "")


def _rules(config: Config, names: frozenset[str]) -> list[Rule]:
    prefix = _prefix(names)
    kinds = ("weight", "bias") if _flag(config, "bias") else ("weight",)
    core = "model.loops.core.conditioner"

    def pairs(there: str, *here: str, kinds: tuple[str, ...] = kinds) -> list[Rule]:
        return [
            Rule(foreign=f"{prefix}{there}.{kind}", ours=tuple(f"{name}.{kind}" for name in here)) for kind in kinds
        ]

    kept, copy = (_HEAD, _EMBEDDING) if f"{prefix}{_HEAD}" in names else (_EMBEDDING, _HEAD)
    rules = [
        Rule(foreign=prefix + kept, ours=("model.embed_tokens.weight",)),
        Rule(foreign=prefix + copy, tied_to=prefix + kept),
        *pairs("transformer.wpe", "model.embed_positions", kinds=("weight",)),
    ]
    for i in range(_count(config, "n_layer")):
        there, here = f"transformer.h.blocks.{i}", f"model.layers.{i}"
        rules += [
            *pairs(f"{there}.adaLN_modulation.1", f"{here}.adaln", kinds=("weight", "bias")),
            *pairs(f"{there}.attn.c_attn", *(f"{here}.mixer.{name}_proj" for name in "qkv")),
            *pairs(f"{there}.attn.c_proj", f"{here}.mixer.o_proj"),
            *pairs(f"{there}.mlp.c_fc", f"{here}.mlp.up_proj"),
            *pairs(f"{there}.mlp.c_proj", f"{here}.mlp.down_proj"),
        ]
    rules += pairs("transformer.norm_f", "model.norm", kinds=("weight",))
    for there, here in (("time_embedder", "time"), ("dt_embedder", "step")):
        rules += pairs(f"{there}.mlp.0", f"{core}.{here}.inner", kinds=("weight", "bias"))
        rules += pairs(f"{there}.mlp.2", f"{core}.{here}.outer", kinds=("weight", "bias"))
    return rules


def _matches(config: Config, names: frozenset[str]) -> bool:
    return config.get("model_type") == "loopformer" or any(name.endswith("dt_embedder.mlp.0.weight") for name in names)


LOOPFORMER = Family(
    name="loopformer",
    source="2602.11451, armenjeddi/loopformer",
    matches=_matches,
    build=_build,
    rules=_rules,
    differs=(
        "The code sets the modulations to zero and then overwrites them by its general start; ours start at zero. It "
        "has no cache and its generate always takes 8 steps; ours has a cache and takes loops= and schedule=."
    ),
)

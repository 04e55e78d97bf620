"""Looped transformers that learn in context (2311.12424): a GPT-2 whose whole forward is what loops.

    e = read_in(x_1, y_1, ...);  s_0 = 0 (or 1);  s <- n(layers(s + e + positions)) (or s * e + positions), b times
    predictions after every iteration: read_out(s) at the x_i

Positions and final norm act in every iteration.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from loopwise.checkpoints.family import Config, Family, count, require
from loopwise.checkpoints.tensors import Rule
from loopwise.models.blocks import BlockConfig
from loopwise.models.decoder_config import SHARED_NORM
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.regression import LoopwiseForRegression, LoopwiseRegressionConfig

DEFAULT_LOOPS = 30  # config.json does not say; b of the published run on linear functions
# loop_func -> first state and update
_LOOPS: dict[str, tuple[str, str]] = {
    "z=f(x+z)": ("state.zeros", "update.add"),
    "z=f(x*z)": ("state.ones", "update.product"),
}
_OUTPUTS = {"regression": 1, "classification": 2}  # two classes are written into the public code
_NORM = NormConfig(type="layer", eps=1e-5, bias=True, weight_in_float32=True)


def _build(config: Config, names: frozenset[str]) -> LoopwiseForRegression:
    width, num_layers = count(config, "n_embd"), count(config, "n_layer")
    num_positions = 2 * count(config, "n_positions") + 1
    state, update = _LOOPS[require(config, "loop_func", *_LOOPS)]
    outputs = _OUTPUTS[require({"pred_type": "regression", **config}, "pred_type", *_OUTPUTS)]
    block = BlockConfig(
        hidden_size=width,
        mixer=AttentionConfig(num_heads=count(config, "n_head"), qkv_bias=True, out_bias=True),
        mlp=MLPConfig(intermediate_size=4 * width, activation="gelu_tanh", gated=False, bias=True),
        norm=_NORM,
    )
    loop: dict[str, Any] = {
        "state": {"kind": state},
        "update": {"kind": update},
        "signal": {"kind": "signal.positions", "num_positions": num_positions},
        "turn": SHARED_NORM,
    }
    return LoopwiseForRegression(
        LoopwiseRegressionConfig(
            num_inputs=count(config, "n_dims"),
            num_outputs=outputs,
            hidden_size=width,
            num_hidden_layers=num_layers,
            blocks=[block.to_dict()],
            plan=f"core:(0-{num_layers - 1})x{DEFAULT_LOOPS}",
            loops={"core": loop},
            norm=asdict(_NORM),
            norm_last=False,
            max_position_embeddings=num_positions,
            use_cache=False,
        )
    )


def _rules(config: Config, names: frozenset[str]) -> list[Rule]:
    def pairs(there: str, *here: str) -> list[Rule]:
        return [
            Rule(foreign=f"{there}.{kind}", ours=tuple(f"{name}.{kind}" for name in here))
            for kind in ("weight", "bias")
        ]

    backbone = "_backbone.transformer"
    rules = [
        *pairs("_read_in", "read_in"),
        Rule(foreign=f"{backbone}.wpe.weight", ours=("model.loops.core.signal.table.weight",)),
    ]
    for i in range(count(config, "n_layer")):
        there, here = f"{backbone}.h.{i}", f"model.layers.{i}"
        rules += [
            *pairs(f"{there}.ln_1", f"{here}.mixer_norm_in"),
            *pairs(f"{there}.attn.c_attn", *(f"{here}.mixer.{name}_proj" for name in "qkv")),
            *pairs(f"{there}.attn.c_proj", f"{here}.mixer.o_proj"),
            *pairs(f"{there}.ln_2", f"{here}.mlp_norm_in"),
            *pairs(f"{there}.mlp.c_fc", f"{here}.mlp.up_proj"),
            *pairs(f"{there}.mlp.c_proj", f"{here}.mlp.down_proj"),
        ]
    return [*rules, *pairs(f"{backbone}.ln_f", "model.norm"), *pairs("_read_out", "read_out")]


LOOPED_TRANSFORMER = Family(
    name="looped_transformer",
    source="2311.12424, Leiay/looped_transformer",
    matches=lambda config, names: "loop_func" in config or ("n_dims" in config and "_read_in.weight" in names),
    build=_build,
    rules=_rules,
    differs="The code's attention dropout is on in evaluation too (it is 0 in every published configuration).",
)

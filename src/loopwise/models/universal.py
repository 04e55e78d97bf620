"""The Universal Transformer (1807.03819) as a configuration of our own decoder.

    h_t = block(h_{t-1} + P_t),  t = 1..R;   block: x <- n(x + attention(x)); x <- n(x + transition(x))

One block is all there is; `P_t` says where and when it runs. With a gate, tokens take different numbers of iterations:
by adaptive computation time, whose gate reads `h_{t-1} + P_t`, or as in PonderNet (2107.05407), whose gate reads `h_t`.
"""

from __future__ import annotations

import math
from typing import Any

from loopwise.loop import config as components
from loopwise.loop.act import ActHalting
from loopwise.loop.config import Component
from loopwise.loop.signals import CoordinatesConfig
from loopwise.models.blocks import BlockConfig
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig

_ACT_BIAS = 1.0  # tensor2tensor starts with tokens that stop after about two iterations


def universal_transformer(
    *,
    vocab_size: int,
    hidden_size: int,
    num_heads: int,
    intermediate_size: int,
    num_iterations: int,
    num_layers: int = 1,
    halting: Component | None = None,
    gate: bool = False,
    dropout: float = 0.0,
    **fields: Any,
) -> LoopwiseDecoderConfig:
    """The configuration of a causal Universal Transformer, for `LoopwiseForCausalLM`.

    Args:
        vocab_size: V.
        hidden_size: D, even.
        num_heads: attention heads.
        intermediate_size: width of the transition.
        num_iterations: R, or the most iterations of a token where there is a halting rule.
        num_layers: layers inside the recurrence; 1 in the paper.
        halting: a rule that a gate drives, such as `ActHalting(rule="accumulated")`; None lets every token run R
            iterations. Every iteration runs for every token, as in training, unless a call says `on_exit="skip"`.
        gate: has a gate without a rule, for PonderNet's loss ("ponder") and for rules that come with a call.
        dropout: probability on attention weights and on both outputs of a block, in training.
        **fields: further fields of `LoopwiseDecoderConfig`.

    Raises:
        ValueError: sizes that do not fit.
    """
    if hidden_size % 2:
        raise ValueError(f"hidden_size={hidden_size} must be even: signals are pairs of sine and cosine")
    norm = NormConfig(type="layer", eps=1e-6, bias=True)
    block = BlockConfig(
        hidden_size=hidden_size,
        mixer=AttentionConfig(num_heads=num_heads, dropout=dropout, out_dropout=dropout),
        mlp=MLPConfig(intermediate_size=intermediate_size, activation="relu", gated=False, bias=True, dropout=dropout),
        norm=norm,
        placement="post",
    )
    loop: dict[str, Any] = {"signal": components.to_dict(CoordinatesConfig())}
    if gate or halting is not None:
        loop["gate"] = _ACT_BIAS if isinstance(halting, ActHalting) else True
    if halting is not None:
        loop |= {"halting": components.to_dict(halting), "on_exit": "select"}
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "blocks": [block.to_dict()],
        "plan": f"core:(0-{num_layers - 1})x{num_iterations}" if num_layers > 1 else f"core:(0)x{num_iterations}",
        "loops": {"core": loop},
        "norm": None,
        "norm_last": False,
        "embedding_scale": math.sqrt(hidden_size),
        "tie_word_embeddings": True,
        "initializer_range": 1 / math.sqrt(hidden_size),
    }
    return LoopwiseDecoderConfig(**(values | fields))

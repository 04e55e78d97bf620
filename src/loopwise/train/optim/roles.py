"""What a parameter is to an optimizer, read from its name and shape.

matrix      a linear map between hidden states (or a stack of such maps): what Muon orthogonalises
embedding   a table of vectors, or a map from inputs of fixed size into the width
head        a map from the width to logits or to a single number
vector      biases, weights of norms, decay rates, learned vectors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

Role: TypeAlias = Literal["matrix", "embedding", "head", "vector"]

# Words of the module that holds the parameter: those of our own models, and of the decoders of transformers.
_HEADS = ("lm_head", "embed_out", "head", "q_head", "order_head", "score", "classifier", "read_out")
_TABLES = ("wte", "wpe", "read_in", "tokens", "positions", "types", "puzzles", "table", "shared")
_TABLE_STEMS = ("embed", "value_embeddings")
# Parameters with several axes that still are one number per channel or per iteration, or such for every visit.
_VECTORS = ("qk_bias", "A_log", "dt_bias", "theta", "offset")
# What compiling and checkpointing put into names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Factors that a parametrisation puts on what an optimizer and the initialisation do to one parameter.

    Attributes:
        lr: on the learning rate.
        eps: on the epsilon of Adam.
        weight_decay: on the coefficient, which optimizers multiply by the learning rate.
        init_std: on the random first values.
    """

    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0
    init_std: float = 1.0


NEUTRAL = Multipliers()


def role_of(name: str, shape: Sequence[int]) -> Role:
    """The role of a parameter.

    A parameter with a bias, a norm or a decay rate in its name, or with fewer than two axes, is a vector; then the word
    before the last decides (`model.embed_tokens.weight` is a table, `lm_head.weight` a head). A matrix with one row
    reads out a number, thus is a head. Everything else is a matrix.

    Args:
        name: dotted name, such as "model.layers.0.mlp.up_proj.weight".
        shape: its full shape, also where it is sharded.
    """
    *path, last = name.split(".")
    holder = path[-1] if path else ""
    numbered = path[-2] if holder.isdigit() and len(path) > 1 else ""
    norms = "norm" in holder or holder == "ln" or holder.startswith("ln_")
    if len(shape) < 2 or last.endswith("bias") or last in _VECTORS or norms:
        return "vector"
    if holder in _HEADS:
        return "head"
    if holder in _TABLES or any(
        word.startswith(_TABLE_STEMS) or word.endswith("embeddings") for word in (holder, numbered)
    ):
        return "embedding"
    return "head" if len(shape) == 2 and shape[0] == 1 else "matrix"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that require a gradient, by name and each once.

    A tied parameter has the first of its names. What compiling or activation checkpointing of blocks puts into names
    is left out, so that the state of an optimizer fits a model with or without them.
    """
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if parameter.requires_grad:
            assert name not in found, f"two parameters are called {name}"
            found[name] = parameter
    return found


def rule_for(name: str, rules: Mapping[str, Any]) -> Multipliers:
    """The multipliers of a parameter; without an entry all are 1."""
    return rules.get(name, NEUTRAL)

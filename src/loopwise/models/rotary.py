"""Rotary position embedding (2104.09864), half-split and interleaved.

Pair i of channels (a, b) at position p turns by the angle `p * f_i`: `(a cos - b sin, b cos + a sin)`. The styles
differ in which channels are a pair: (i, i + d/2) for "half" (GPT-NeoX, Llama, Ouro, HRM), (2i, 2i + 1) for
"interleaved" (the original, Huginn, Parcae). A checkpoint of one style needs its q and k rows permuted for the other.

Shapes: B batch, T tokens, H heads, d rotated channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ROPE_INIT_FUNCTIONS, PreTrainedConfig

from loopwise.models.fields import check_choice, check_counts, check_types, refuse

# Their frequencies depend on the length of the text, so keys in a cache would be wrong as the text grows.
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_STATIC = tuple(name for name in ROPE_INIT_FUNCTIONS if name not in _LENGTH_DEPENDENT)


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Which channels of q and k turn, and how fast.

    Attributes:
        dim: the first `dim` channels of every head are rotated; the head's size, unless the rotation is partial.
        theta: `f_i = theta ** (-2 i / dim)` for pair i.
        style: "half" or "interleaved".
        scaling: the `rope_scaling` (or `rope_parameters`) dict of a transformers config, of a type whose frequencies
            are fixed ("linear", "yarn", "llama3"), or None.
    """

    dim: int
    theta: float = 10000.0
    style: str = "half"
    scaling: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "dim")
        check_choice(self, "style", ("half", "interleaved"))
        if self.dim % 2:
            refuse(self, "dim", "use an even number of channels, they turn in pairs")
        if not self.theta > 0:
            refuse(self, "theta", "use a base above 0")
        if self.scaling is not None:
            _check_scaling(self, self.scaling)
            try:
                with torch.device("cpu"):  # configurations are also read while models are made on the meta device
                    frequencies, _ = _frequencies(self, torch.device("cpu"))
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                refuse(self, "scaling", f"the formula of its type does not take these values ({error})")
            if not frequencies.isfinite().all():
                refuse(self, "scaling", "its frequencies are not finite; use other values")


def rotary_tables(position_ids_BT: torch.Tensor, config: RotaryConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for every token, made once per forward and handed to all blocks of the same `config`.

    Args:
        position_ids_BT: positions, int64 `[B, T]`, or `[1, T]` when they are the same in every row.
        config: the rotation.

    Returns:
        cos and sin, float32 `[B, T, d]`, each angle at both channels of its pair.
    """
    frequencies, amplitude = _frequencies(config, position_ids_BT.device)
    angles = position_ids_BT[..., None].float() * frequencies
    if config.style == "half":
        angles = torch.cat((angles, angles), dim=-1)
    else:
        angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(
    heads_BHTd: torch.Tensor, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor, config: RotaryConfig
) -> torch.Tensor:
    """Turn the first `config.dim` channels of every head, in float32 at least; same shape and dtype.

    Raises:
        ValueError: the tables are not of this rotation's width.
    """
    if cos_BTd.shape[-1] != config.dim:
        raise ValueError(
            f"position_embeddings have {cos_BTd.shape[-1]} channels but RotaryConfig.dim is {config.dim}: make them "
            "with rotary_tables(position_ids, config) of the same config"
        )
    turned, rest = heads_BHTd.split((config.dim, heads_BHTd.shape[-1] - config.dim), dim=-1)
    wide = turned.to(torch.promote_types(turned.dtype, torch.float32))
    if config.style == "half":
        first, second = wide.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    else:
        first, second = wide.unflatten(-1, (-1, 2)).unbind(dim=-1)
        partner = torch.stack((-second, first), dim=-1).flatten(-2)
    wide = wide * cos_BTd[:, None] + partner * sin_BTd[:, None]
    turned = wide.to(turned.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def half_split_order(dim: int) -> torch.Tensor:
    """The rows of an interleaved head in half-split order: `[0, 2, 4, ..., 1, 3, 5, ...]`, int64 `[dim]`.

    `weight.unflatten(0, (H, dim))[:, half_split_order(dim)].flatten(0, 1)` turns the q or k projection of an
    interleaved checkpoint into one for the half-split style; `argsort` of it goes back.
    """
    return torch.arange(dim).view(-1, 2).T.flatten()


def _frequencies(config: RotaryConfig, device: torch.device) -> tuple[torch.Tensor, float]:
    """Frequency of every pair, float32 `[d / 2]`, and the factor on cosines and sines."""
    if config.scaling is None or _scaling_type(config.scaling) == "default":
        exponents = torch.arange(0, config.dim, 2, device=device, dtype=torch.float32) / config.dim
        return 1.0 / config.theta**exponents, 1.0
    # Enough of a model's configuration for the library's formulas; they complete the dict, so they get a copy.
    like: Any = PreTrainedConfig()
    like.hidden_size, like.num_attention_heads, like.head_dim = config.dim, 1, config.dim
    like.max_position_embeddings = config.scaling.get("original_max_position_embeddings")
    kind = _scaling_type(config.scaling)
    like.rope_parameters = {**config.scaling, "rope_type": kind, "rope_theta": config.theta}
    return ROPE_INIT_FUNCTIONS[kind](like, device)


def _check_scaling(config: RotaryConfig, scaling: dict[str, Any]) -> None:
    kind = _scaling_type(scaling)
    if kind in _LENGTH_DEPENDENT:
        refuse(config, "scaling", f"type {kind} changes with the length of the text; use one of {', '.join(_STATIC)}")
    if kind != "default" and kind not in _STATIC:
        refuse(config, "scaling", f"type {kind} is not known; use one of {', '.join(_STATIC)}")
    if scaling.get("rope_theta", config.theta) != config.theta:
        refuse(config, "scaling", f"its rope_theta differs from theta {config.theta}; give it once, as theta")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(config, "scaling", "give the number of rotated channels as dim instead of partial_rotary_factor")
    needed = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
    needed["llama3"] = (*needed["yarn"], "low_freq_factor", "high_freq_factor")
    for key in needed.get(kind, ()):
        if scaling.get(key) is None:
            refuse(config, "scaling", f"type {kind} needs {key}")


def _scaling_type(scaling: dict[str, Any]) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"

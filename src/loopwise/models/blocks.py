"""A block of our own decoder: token mixer, MLP, and where the norms stand.

Every block is two residual steps, first with the mixer and then with the MLP as f. The placement says what a step is
(n, n_in, n_out are norms with parameters of their own):

    pre         x + f(n(x))                    GPT-2, Llama, HRM-Text, Parcae, LoopFormer
    post        n(x + f(x))                    ALBERT, HRM, TRM
    stream      n_out(x + f(n_in(x)))          Huginn's sandwich: the stream itself is normed
    branch      x + n_out(f(n_in(x)))          Ouro
    branch_out  x + n(f(x))                    OLMo-2

Shapes: B batch, T tokens, D width, C width of the conditioning, K kv heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GradientCheckpointingLayer

from loopwise.models import fields
from loopwise.models.mixers import AttentionConfig, TokenMixerConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import LayerNorm, NormConfig, RMSNorm

# placement -> has a norm before the function, has a norm after it
PLACEMENTS = {
    "pre": (True, False),
    "post": (False, True),
    "stream": (True, True),
    "branch": (True, True),
    "branch_out": (False, True),
}
_NORMS_THE_BRANCH = ("branch", "branch_out")

# What the axes of a block's arguments count, for visits by a part of the rows and tokens (see `slicing`).
BLOCK_AXES: dict[tuple[Any, ...], tuple[str | None, ...]] = {
    ("attention_mask",): ("rows", None, "tokens", "tokens"),
    ("position_ids",): ("rows", "tokens"),
    ("position_embeddings", 0): ("rows", "tokens", None),
    ("position_embeddings", 1): ("rows", "tokens", None),
    ("value_embeddings",): ("rows", "tokens", None),
}

Modulation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class AdaLNConfig:
    """Conditioning by adaptive norms: a vector scales what enters a step's function and gates what leaves it.

    A step becomes `x + gate * f((1 + scale) * n(x))`; gates and scales are `W silu(c) + b` (LoopFormer, 2602.11451;
    without the shift of DiT, 2212.09748).

    Attributes:
        conditioning_size: C; None is D.
    """

    conditioning_size: int | None = None

    def __post_init__(self) -> None:
        fields.check_types(self)
        fields.check_counts(self, "conditioning_size")

    def build(self, size: int) -> AdaLN:
        """The modulation of a block of width `size`."""
        return AdaLN(self, size)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A block.

    Attributes:
        hidden_size: D.
        mixer: attention, or an MLP over the length.
        mlp: the MLP over the width.
        norm: every norm of the block.
        placement: where the norms stand, see the top of this file.
        norm_scale: factor on what the norms before mixer and MLP give, such as 1 / sqrt(depth) (2502.05795).
        branch_scale: factor on what the residual step adds to the state, such as 1 / depth (2505.01618).
        adaln: conditioning by a vector, with placement "pre" only; None has none.
    """

    hidden_size: int
    mixer: AttentionConfig | TokenMixerConfig
    mlp: MLPConfig
    norm: NormConfig = field(default_factory=NormConfig)
    placement: str = "pre"
    norm_scale: float = 1.0
    branch_scale: float = 1.0
    adaln: AdaLNConfig | None = None

    def __post_init__(self) -> None:
        fields.check_types(self)
        fields.check_counts(self, "hidden_size")
        fields.check_choice(self, "placement", PLACEMENTS)
        if self.norm_scale != 1 and not PLACEMENTS[self.placement][0]:
            fields.refuse(self, "norm_scale", f"placement {self.placement!r} has no norm before the function; use 1")
        if self.adaln is not None and self.placement != "pre":
            fields.refuse(self, "placement", "adaln scales a normed input and gates the branch; use placement 'pre'")
        if self.adaln is not None and isinstance(self.mixer, TokenMixerConfig):
            fields.refuse(self, "adaln", "it scales the width, a token mixer norms the length; use attention or None")

    def build(self, model_config: Any, layer_idx: int) -> Block:
        """The block number `layer_idx` of a model whose transformers configuration is `model_config`.

        The configuration names the attention function (`_attn_implementation`), also when it is switched later.

        Raises:
            ValueError: head counts or gate channels that do not fit the width.
        """
        return Block(self, model_config, layer_idx)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return fields.to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockConfig:
        """The config that `to_dict` described; `ValueError` names an unknown or missing field."""
        return fields.from_dict(cls, data)


class AdaLN(nn.Module):
    """Parameters: `weight` `[4 D, C]` and `bias` `[4 D]`; rows are the gates of mixer and MLP, then their scales.

    Zero at the start, so that the block starts as the identity. LoopFormer's code means that too, but its general
    initialisation of linear layers comes after it; hence parameters here and no linear layer.
    """

    def __init__(self, config: AdaLNConfig, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4 * size, config.conditioning_size or size))
        self.bias = nn.Parameter(torch.zeros(4 * size))

    def reset_parameters(self) -> None:
        """Weight and bias zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, conditioning: torch.Tensor) -> tuple[Modulation, Modulation]:
        """(scale, gate) of the mixer and of the MLP from `[B, C]` or `[B, T, C]`, each `[B, 1 or T, D]`."""
        if conditioning.ndim == 2:
            conditioning = conditioning[:, None]
        rows = F.linear(F.silu(conditioning), self.weight, self.bias)
        gate_mixer, gate_mlp, scale_mixer, scale_mlp = rows.chunk(4, dim=-1)
        return (scale_mixer, gate_mixer), (scale_mlp, gate_mlp)


class Block(GradientCheckpointingLayer):
    """One layer, as a `BlockConfig` describes it.

    Submodules: `mixer`, `mlp`, `adaln`, and of `mixer_norm_in`, `mixer_norm_out`, `mlp_norm_in`, `mlp_norm_out` those
    that the placement has.
    """

    def __init__(self, config: BlockConfig, model_config: Any, layer_idx: int):
        super().__init__()
        self.block_config = config
        self.layer_idx = layer_idx
        self.over_length = isinstance(config.mixer, TokenMixerConfig)
        self.norms_the_branch = config.placement in _NORMS_THE_BRANCH
        size, has = config.hidden_size, PLACEMENTS[config.placement]
        length = config.mixer.length if isinstance(config.mixer, TokenMixerConfig) else size
        self.mixer_norm_in = config.norm.build(length) if has[0] else None
        self.mixer = config.mixer.build(size, model_config, layer_idx)
        self.mixer_norm_out = config.norm.build(length) if has[1] else None
        self.mlp_norm_in = config.norm.build(size) if has[0] else None
        self.mlp = config.mlp.build(size)
        self.mlp_norm_out = config.norm.build(size) if has[1] else None
        self.adaln = None if config.adaln is None else config.adaln.build(size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        conditioning: torch.Tensor | None = None,
        value_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One visit of this layer.

        Args:
            hidden_states: floating `[B, T, D]`.
            attention_mask: what `attention_mask` made for this block's mixer, or None (see `Attention.forward`).
            position_ids: int64 `[B, T]`, handed to the attention function only.
            past_key_values: a transformers cache, whose entry `layer_idx` is extended, or None.
            use_cache: not read; gradient checkpointing looks for it.
            position_embeddings: `rotary_tables` for this block's rotation.
            conditioning: `[B, C]` or per token `[B, T, C]`, for a block with adaln; others do not read it.
            value_embeddings: `[B, T, K d]`, for attention with a value gate; others do not read them.
            **kwargs: handed to the attention function.

        Returns:
            `[B, T, D]`, the dtype of hidden_states.

        Raises:
            ValueError: adaln without conditioning, or what the mixer refuses.
        """
        mixer_modulation = mlp_modulation = None
        if self.adaln is not None:
            if conditioning is None:
                fields.refuse(self.block_config, "adaln", "pass conditioning=, one vector per row")
            mixer_modulation, mlp_modulation = self.adaln(conditioning)

        def mix(normed: torch.Tensor) -> torch.Tensor:
            return self.mixer(
                normed,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                value_embeddings=value_embeddings,
                position_ids=position_ids,
                **kwargs,
            )[0]

        state = hidden_states.transpose(1, 2) if self.over_length else hidden_states
        state = self._step(state, mix, self.mixer_norm_in, self.mixer_norm_out, mixer_modulation)
        state = state.transpose(1, 2) if self.over_length else state
        return self._step(state, self.mlp, self.mlp_norm_in, self.mlp_norm_out, mlp_modulation)

    def _step(
        self,
        state: torch.Tensor,
        function: Callable[[torch.Tensor], torch.Tensor],
        norm_in: RMSNorm | LayerNorm | None,
        norm_out: RMSNorm | LayerNorm | None,
        modulation: Modulation | None,
    ) -> torch.Tensor:
        """One residual step, as the placement says."""
        config = self.block_config
        branch = state if norm_in is None else norm_in(state)
        if config.norm_scale != 1:
            branch = branch * config.norm_scale
        if modulation is not None:
            scale, gate = modulation
            branch = gate * function(branch * (1 + scale))
        else:
            branch = function(branch)
        if norm_out is not None and self.norms_the_branch:
            branch, norm_out = norm_out(branch), None
        if config.branch_scale != 1:
            branch = branch * config.branch_scale
        return state + branch if norm_out is None else norm_out(state + branch)

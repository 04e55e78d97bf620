"""What mixes tokens in a block: attention, or an MLP over the length axis.

Shapes: B batch, T tokens, S tokens that are seen (cached ones first), D width, H heads, K kv heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AttentionInterface

from loopwise.models.attention import eager_attention, implied_mask
from loopwise.models.fields import check_choice, check_counts, check_probability, check_types, refuse
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig, rotate


@dataclass(frozen=True, kw_only=True)
class QKNormConfig:
    """A norm on queries and keys.

    Attributes:
        norm: the norm.
        over: "head" (every head by itself: Qwen3, Parcae) or "width" (all heads together: OLMo-2).
        when: "before_rope" (Qwen3, OLMo-2) or "after_rope" (Parcae).
    """

    norm: NormConfig = field(default_factory=NormConfig)
    over: str = "head"
    when: str = "before_rope"

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "over", ("head", "width"))
        check_choice(self, "when", ("before_rope", "after_rope"))
        if self.over == "width" and self.when == "after_rope":
            refuse(self, "over", "after the rotation heads are apart; use over='head' or when='before_rope'")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head attention.

    Attributes:
        num_heads: H.
        num_kv_heads: K, a divisor of H; None is H.
        head_dim: d; None is D / H.
        mask: "causal", "bidirectional" or "prefix" (causal, and prefix tokens see each other).
        sliding_window: a token sees itself and this many tokens less one before it; None is all.
        scale: factor on the scores; None is `d ** -0.5`.
        rope: rotation of queries and keys, or None.
        qkv_bias: biases of the q, k, v (and output gate) projections.
        out_bias: bias of the output projection.
        qk_bias: a learned vector added to every query and key head before the rotation (Huginn).
        qk_norm: norm on queries and keys, or None.
        output_gate: "channel" multiplies the heads' outputs by the sigmoid of a projection of the layer's input
            (HRM-Text), before the output projection; None does not.
        value_gate_channels: adds `2 sigmoid(W x[:channels])` (one number per kv head) times the value embeddings to the
            values (Parcae); None has no such gate and ignores value embeddings.
        dropout: probability on attention weights in training.
        out_dropout: probability on the output in training.
    """

    kind: ClassVar[str] = "attention"

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mask: str = "causal"
    sliding_window: int | None = None
    scale: float | None = None
    rope: RotaryConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_bias: bool = False
    qk_norm: QKNormConfig | None = None
    output_gate: str | None = None
    value_gate_channels: int | None = None
    dropout: float = 0.0
    out_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "num_heads", "num_kv_heads", "head_dim", "sliding_window", "value_gate_channels")
        check_choice(self, "mask", ("causal", "bidirectional", "prefix"))
        check_probability(self, "dropout", "out_dropout")
        if self.output_gate is not None:
            check_choice(self, "output_gate", ("channel",))
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            refuse(self, "num_kv_heads", f"use a divisor of num_heads {self.num_heads}")
        if self.qk_bias and self.num_kv_heads not in (None, self.num_heads):
            refuse(self, "qk_bias", f"it holds one key bias per query head; use num_kv_heads {self.num_heads} or None")
        if self.sliding_window is not None and self.mask != "causal":
            refuse(self, "sliding_window", f"it is not available with mask {self.mask!r}; use mask 'causal' or None")
        if self.rope is not None and self.head_dim is not None and self.rope.dim > self.head_dim:
            refuse(self, "head_dim", f"the rotation takes {self.rope.dim} channels; use rope.dim of at most head_dim")

    def build(self, size: int, model_config: Any, layer_idx: int) -> Attention:
        """The attention of width `size`; `model_config` is the transformers configuration that names its function."""
        return Attention(self, size, model_config, layer_idx)


@dataclass(frozen=True, kw_only=True)
class TokenMixerConfig:
    """An MLP over the length axis, for inputs of one fixed length (TRM's `mlp_t`; MLP-Mixer, 2105.01601).

    The block hands it `[B, D, T]`, so its norms run over the length too. Every token sees every other; there is no
    cache and no padding.

    Attributes:
        length: T, puzzle positions included.
        mlp: the MLP over the T entries of one channel.
    """

    kind: ClassVar[str] = "token_mixer"

    length: int
    mlp: MLPConfig

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, "length")

    def build(self, size: int, model_config: Any, layer_idx: int) -> TokenMixer:
        """The mixer; width, model configuration and layer number do not matter to it."""
        return TokenMixer(self)


MixerConfig = AttentionConfig | TokenMixerConfig


class Attention(nn.Module):
    """Multi-head attention as an `AttentionConfig` describes it.

    Parameters: `q_proj` `[H d, D]`, `k_proj`, `v_proj` `[K d, D]`, `o_proj` `[D, H d]`; as configured `gate_proj`
    `[H d, D]`, `q_norm`, `k_norm`, `qk_bias` `[2, 1, H, d]` (query first), `value_gate` `[K, channels]`.
    Order: projections, value embeddings, norm before the rotation, qk_bias, rotation, norm after it, cache, attention,
    output gate, output projection.
    """

    def __init__(self, config: AttentionConfig, size: int, model_config: Any, layer_idx: int):
        super().__init__()
        self.mixer_config = config
        self.config = model_config  # attention functions read the implementation and the dtype there
        self.layer_idx = layer_idx
        heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        if config.head_dim is None and size % heads:
            refuse(config, "num_heads", f"use a divisor of hidden_size {size}, or give head_dim")
        self.head_dim = config.head_dim or size // heads
        if config.rope is not None and config.rope.dim > self.head_dim:
            refuse(config, "rope", f"its dim is above the head size {self.head_dim}; use at most that")
        channels = config.value_gate_channels
        if channels is not None and channels > size:
            refuse(config, "value_gate_channels", f"use at most hidden_size {size}")
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5 if config.scale is None else config.scale
        self.is_causal = config.mask != "bidirectional"
        self.q_proj = nn.Linear(size, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, size, bias=config.out_bias)
        self.gate_proj = None
        if config.output_gate is not None:
            self.gate_proj = nn.Linear(size, heads * self.head_dim, bias=config.qkv_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            by_head = config.qk_norm.over == "head"
            self.q_norm = config.qk_norm.norm.build(self.head_dim if by_head else heads * self.head_dim)
            self.k_norm = config.qk_norm.norm.build(self.head_dim if by_head else kv_heads * self.head_dim)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, heads, self.head_dim)) if config.qk_bias else None
        self.value_gate = None if channels is None else nn.Linear(channels, kv_heads, bias=False)
        self.out_dropout = nn.Dropout(config.out_dropout)

    def reset_parameters(self) -> None:
        """The parameter that is not inside a submodule: qk_bias zero."""
        if self.qk_bias is not None:
            nn.init.zeros_(self.qk_bias)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        value_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix tokens.

        Args:
            hidden_BTD: the (normed) input, floating `[B, T, D]`.
            attention_mask: what `attention_mask` made, or None: causal up to the last token, or no mask at all when
                bidirectional.
            past_key_values: a transformers cache; its entry `self.layer_idx` is extended.
            position_embeddings: cos and sin `[B or 1, T, rope.dim]` of `rotary_tables`.
            value_embeddings: `[B, T, K d]`, added to the values through the value gate.
            **kwargs: handed to the attention function.

        Returns:
            The mixed tokens `[B, T, D]`, and the attention weights `[B, H, T, S]` where the function gives them.

        Raises:
            ValueError: a rotation without position_embeddings, or a cache for a bidirectional mask.
        """
        if past_key_values is not None and not self.is_causal:
            refuse(self.mixer_config, "mask", "such attention has no cache; use use_cache=False")
        query, key, value = self._heads(hidden_BTD, position_embeddings, value_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = getattr(self.config, "_attn_implementation", None) or "eager"
        attend = AttentionInterface().get_interface(name, eager_attention)
        if attention_mask is None and self.is_causal:
            attention_mask = implied_mask(name, query, key, self.mixer_config.sliding_window)
        mixed_BTHd, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.mixer_config.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.mixer_config.sliding_window,
            **kwargs,
        )
        mixed = mixed_BTHd.flatten(-2)
        if self.gate_proj is not None:
            mixed = torch.sigmoid(self.gate_proj(hidden_BTD)) * mixed
        return self.out_dropout(self.o_proj(mixed)), weights

    def _heads(
        self,
        hidden_BTD: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
        value_embeddings: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, H, T, d]`, keys and values `[B, K, T, d]`."""
        config, split = self.mixer_config, (-1, self.head_dim)
        query, key = self.q_proj(hidden_BTD), self.k_proj(hidden_BTD)
        value = self.v_proj(hidden_BTD).unflatten(-1, split)
        if self.value_gate is not None and value_embeddings is not None:
            gate_BTK = 2 * torch.sigmoid(self.value_gate(hidden_BTD[..., : self.value_gate.in_features]))
            value = value + gate_BTK[..., None] * value_embeddings.unflatten(-1, split)
        style = config.qk_norm and (config.qk_norm.over, config.qk_norm.when)
        if style == ("width", "before_rope"):
            query, key = self._norm(query, key)
        query, key = query.unflatten(-1, split), key.unflatten(-1, split)
        if style == ("head", "before_rope"):
            query, key = self._norm(query, key)
        if self.qk_bias is not None:
            query, key = (query + self.qk_bias[0]).to(query.dtype), (key + self.qk_bias[1]).to(key.dtype)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if config.rope is not None:
            if tables is None:
                refuse(config, "rope", "pass position_embeddings=rotary_tables(position_ids, rope)")
            query, key = rotate(query, *tables, config.rope), rotate(key, *tables, config.rope)
        if style == ("head", "after_rope"):
            query, key = self._norm(query, key)
        return query, key, value

    def _norm(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.q_norm is not None and self.k_norm is not None
        return self.q_norm(query), self.k_norm(key)


class TokenMixer(nn.Module):
    """Parameters: those of the MLP, whose last axis is the length T."""

    def __init__(self, config: TokenMixerConfig):
        super().__init__()
        self.mixer_config = config
        self.mlp = config.mlp.build(config.length)

    def forward(
        self, hidden_BDT: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """Mix the tokens of every channel, `[B, D, T]` -> `[B, D, T]`; the second item is always None.

        Raises:
            ValueError: another length than the configured one, a mask or a cache.
        """
        if hidden_BDT.shape[-1] != self.mixer_config.length:
            refuse(self.mixer_config, "length", f"the input has {hidden_BDT.shape[-1]} tokens; pad or cut it")
        if attention_mask is not None or past_key_values is not None:
            raise ValueError("TokenMixerConfig takes no attention_mask and no past_key_values: use AttentionConfig")
        return self.mlp(hidden_BDT), None

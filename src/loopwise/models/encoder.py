"""Our encoder: every token sees every other, with heads for masked tokens and for the order of two segments (ALBERT).

    x = W norm(token + position + type) + b;  s = plan(x) over bidirectional blocks
    logits = E norm(act(W' s + b')) + c,  E the token embeddings;   order = V tanh(W'' s_first + b'') + d

Layers, loops and gates are those of `LoopwiseModel`; what is added is what surrounds it. The embeddings may be narrower
than the state (factorised, 1909.11942).

Shapes: B batch, T tokens, D width, E width of the embeddings, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loopwise.loop import config as components
from loopwise.loop.config import Component
from loopwise.models.decoder import LoopwiseModel, LoopwisePreTrainedModel, collected_loop
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.hub import ModelOutput
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import ACTIVATIONS
from loopwise.models.norms import NormConfig

HEADS = ("tokens", "order")


class LoopwiseEncoderConfig(LoopwiseDecoderConfig):
    """An encoder as data: a decoder's configuration with bidirectional blocks, and what surrounds it.

    Attributes:
        embedding_size: E.
        num_token_types: segments that have a vector of their own; 0 for none.
        embedding_norm: norm of the summed embeddings, a `NormConfig` dictionary.
        heads: which heads there are: "tokens" (masked tokens) and "order" (whether two segments are in order).
        head_norm: norm of the tokens head.
        head_activation: activation of the tokens head, one of `mlps.ACTIVATIONS`.
        pools: has the layer that the order head reads, also where that head is missing.
        head_dropout: probability on what the order head reads, in training.
    """

    model_type = "loopwise_encoder"

    embedding_size: int = 0
    num_token_types: int = 0
    embedding_norm: dict | None = None
    heads: list | None = None
    head_norm: dict | None = None
    head_activation: str = "gelu_tanh"
    pools: bool = True
    head_dropout: float = 0.0
    use_cache: bool = False


@dataclass
class EncoderOutput(ModelOutput):
    """Output of our encoder.

    Attributes:
        loss: sum of the mean losses of the heads that labels were given for.
        prediction_logits: `[B, T, V]`, of the tokens head.
        sop_logits: `[B, 2]`, of the order head: in order, swapped.
        last_hidden_state: `[B, T, D]`.
        pooler_output: `[B, D]`.
        hidden_states: the input of the first layer and the state after every visit, each `[B, T, D]`, on request.
        loop_states: states after every iteration of the collected loop, each `[B, T, D]`, on request.
        gate_logits: of an exit gate, `[B, T, R]`, see `LoopwiseOutput`.
        exits: int64 `[B, T]`, see `LoopwiseOutput`.
        ponder: `[B, T]`, see `LoopwiseOutput`.
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    sop_logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    loop_states: tuple[torch.Tensor, ...] | None = None
    gate_logits: torch.Tensor | None = None
    exits: torch.Tensor | None = None
    ponder: torch.Tensor | None = None


class Embeddings(nn.Module):
    """Parameters: `tokens` `[V, E]`, `positions` and `types` (where there are any), `norm`, `projection` `[D, E]`."""

    def __init__(self, config: LoopwiseEncoderConfig):
        super().__init__()
        size = config.embedding_size
        self.tokens = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.positions = nn.Embedding(config.num_positions, size) if config.num_positions else None
        self.types = nn.Embedding(config.num_token_types, size) if config.num_token_types else None
        self.norm = NormConfig(**config.embedding_norm).build(size) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.projection = nn.Linear(size, config.hidden_size)

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Tokens, segments and positions, int64 `[B, T]` (positions also `[1, T]`) -> `[B, T, D]`.

        Raises:
            ValueError: a position past the learned ones, or segments for a model without them.
        """
        summed_BTE = self.tokens(input_ids)
        if self.types is not None:
            summed_BTE = summed_BTE + self.types(
                torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            )
        elif token_type_ids is not None:
            raise ValueError("token_type_ids were given, but this model has num_token_types=0")
        if self.positions is not None:
            if int(position_ids.max()) >= self.positions.num_embeddings:
                raise ValueError(f"a position is past num_positions={self.positions.num_embeddings} of this model")
            summed_BTE = summed_BTE + self.positions(position_ids)
        return self.projection(self.dropout(self.norm(summed_BTE)))


class TokensHead(nn.Module):
    """`E norm(act(W s + b)) + c`; parameters `dense` `[E, D]` with bias, `norm`, `bias` `[V]`. E is not its own."""

    def __init__(self, config: LoopwiseEncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.activation = ACTIVATIONS[config.head_activation]
        self.norm = NormConfig(**config.head_norm).build(config.embedding_size) if config.head_norm else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def reset_parameters(self) -> None:
        """The bias zero; submodules are initialised by themselves."""
        nn.init.zeros_(self.bias)

    def forward(self, state_BTD: torch.Tensor, embeddings_VE: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` -> logits `[B, T, V]`."""
        return F.linear(self.norm(self.activation(self.dense(state_BTD))), embeddings_VE, self.bias)


class EncoderBackbone(LoopwiseModel):
    """`LoopwiseModel` that is called with embeddings only."""

    def __init__(self, config: LoopwiseEncoderConfig):
        super().__init__(config)
        self.embed_tokens = self.embed_positions = None
        self.embed_dropout = nn.Identity()


class LoopwiseEncoder(LoopwisePreTrainedModel):
    """The encoder with the heads that its configuration names."""

    config_class = LoopwiseEncoderConfig

    def __init__(self, config: LoopwiseEncoderConfig):
        super().__init__(config)
        _check(config)
        heads = config.heads or []
        self.embeddings = Embeddings(config)
        self.model = EncoderBackbone(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.pools else None
        self.tokens_head = TokensHead(config) if "tokens" in heads else None
        self.head_dropout = nn.Dropout(config.head_dropout)
        self.order_head = nn.Linear(config.hidden_size, 2) if "order" in heads else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, which is also the last matrix of the tokens head."""
        return self.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embeddings.tokens = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sentence_order_label: torch.Tensor | None = None,
        loops: int | Mapping[str, int] | None = None,
        halting: Component | Mapping[str, Any] | None = None,
        on_exit: str | None = None,
        output_loops: bool | str = False,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> EncoderOutput:
        """What the heads make of a text.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: 1 for tokens, 0 for padding, `[B, T]`.
            token_type_ids: segment of every token, int64 `[B, T]`; all 0 if None.
            position_ids: int64 `[B, T]`; counted from 0 if None.
            labels: the tokens behind the masks, int64 `[B, T]`, -100 is ignored.
            sentence_order_label: 0 for segments in order, 1 for swapped ones, int64 `[B]`.
            loops: iteration counts of this call.
            halting: see `LoopwiseForCausalLM`.
            on_exit: see `LoopwiseForCausalLM`.
            output_loops: True (the loop named core, or the only one) or a loop's name: also return its states.
            output_hidden_states: also return the state after every visit.
            **kwargs: handed to the layers.

        Raises:
            ValueError: a wrong loop name or count, labels for a head that is missing, or positions past the table.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rule = components.from_dict(halting, axis="halting") if isinstance(halting, Mapping) else halting
        output = self.model(
            inputs_embeds=self.embeddings(input_ids, token_type_ids, position_ids),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            loops=loops,
            loop_options={"collect": collected_loop(self.model, output_loops), "halting": rule, "on_exit": on_exit},
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        self.model.passes = None
        state_BTD = output.last_hidden_state
        pooled_BD = None if self.pooler is None else torch.tanh(self.pooler(state_BTD[:, 0]))
        tokens = None if self.tokens_head is None else self.tokens_head(state_BTD, self.embeddings.tokens.weight)
        order = None if self.order_head is None else self.order_head(self.head_dropout(pooled_BD))
        losses = [_loss("labels", tokens, labels), _loss("sentence_order_label", order, sentence_order_label)]
        losses = [loss for loss in losses if loss is not None]
        return EncoderOutput(
            loss=torch.stack(losses).sum() if losses else None,
            prediction_logits=tokens,
            sop_logits=order,
            last_hidden_state=state_BTD,
            pooler_output=pooled_BD,
            hidden_states=output.hidden_states,
            loop_states=output.loop_states,
            gate_logits=output.gate_logits,
            exits=output.exits,
            ponder=output.ponder,
        )


def _loss(name: str, logits: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor | None:
    if labels is None:
        return None
    if logits is None:
        raise ValueError(f"{name} were given, but this model lacks the head that they are for")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _check(config: LoopwiseEncoderConfig) -> None:
    """Refuse configurations whose parts do not fit."""
    for field in ("vocab_size", "embedding_size"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} is {getattr(config, field)}: use a whole number of at least 1")
    for head in config.heads or []:
        if head not in HEADS:
            raise ValueError(f"heads has {head!r}: use any of {', '.join(HEADS)}")
    if "order" in (config.heads or []) and not config.pools:
        raise ValueError("heads has 'order' with pools=false: that head reads the pooled state, use pools=true")
    if config.head_activation not in ACTIVATIONS:
        raise ValueError(f"head_activation is {config.head_activation!r}: use one of {', '.join(ACTIVATIONS)}")
    for block in config.block_configs():
        if isinstance(block.mixer, AttentionConfig) and block.mixer.mask != "bidirectional":
            raise ValueError(f"a block has mask {block.mixer.mask!r}: blocks of an encoder use mask 'bidirectional'")

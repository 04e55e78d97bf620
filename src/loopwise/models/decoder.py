"""Our own decoder: a plain stack of blocks over which a plan with loop components is played.

    x = embed(tokens) * scale (+ positions);  s = plan(x) over the blocks;  logits = head(norm(s))

Its forward iterates the layers once, like any decoder of transformers; visiting them in the order of the plan is the
work of the same record-and-play and the same executor (`playing`, `loop.execute`) that serve attached models. What a
loop adds is in `loops`, one `LoopModule` per named loop.

Shapes: B batch, T tokens, D width, V vocabulary, R iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from loopwise.cache.policy import CachePolicy
from loopwise.loop import config as components
from loopwise.loop.passes import LoopModule, Passes
from loopwise.loop.streams import FirstValues
from loopwise.models.attention import attention_mask as mask_for
from loopwise.models.blocks import BLOCK_AXES, Block
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.hub import BaseModelOutputWithPast, align, new_cache
from loopwise.models.loop_parts import build_loop
from loopwise.models.mixers import AttentionConfig
from loopwise.models.norms import NormConfig
from loopwise.models.playing import Looping, Returns, hook_owner, looping_of
from loopwise.models.relaxation import RelaxationConfig, install
from loopwise.models.rotary import rotary_tables
from loopwise.models.value_embeddings import ValueEmbeddings
from loopwise.plan.nodes import Loop
from loopwise.plan.plans import Plan


@dataclass
class LoopwiseModelOutput(BaseModelOutputWithPast):
    """Output of the decoder without its head; fields as in `LoopwiseOutput`.

    Attributes:
        route_loss: what training adds to the loss for the routers, a scalar; None where there are none.
    """

    by_token: ClassVar[tuple[str, ...]] = ("loop_states", "gate_logits", "exits", "ponder")

    loop_states: tuple[torch.Tensor, ...] | None = None
    gate_logits: torch.Tensor | None = None
    exits: torch.Tensor | None = None
    ponder: torch.Tensor | None = None
    routes: tuple | None = None
    route_loss: torch.Tensor | None = None


class LoopwisePreTrainedModel(PreTrainedModel):
    """What our models tell transformers."""

    config_class = LoopwiseDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what is loaded computes bit for bit what was saved."""
        loaded = super().from_pretrained(*args, **kwargs)
        align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; loop counts that were changed are saved."""
        looping = looping_of(self)
        if looping is not None:
            self.config.plan = str(looping.plan)
        super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal matrices, zero biases; modules with a start of their own take it."""
        if isinstance(module, (nn.Linear, nn.Embedding)) and not getattr(module, "has_start", False):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.constant_(module.bias, getattr(module, "first_bias", 0.0))
        else:
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()


class LoopwiseModel(LoopwisePreTrainedModel):
    """Embeddings, layers, loops and final norm."""

    def __init__(self, config: LoopwiseDecoderConfig):
        super().__init__(config)
        blocks = config.block_configs()
        plan = Plan.parse(config.plan).validate(len(blocks))
        size = config.vocab_size
        self.embed_tokens = nn.Embedding(size, config.hidden_size, config.pad_token_id) if size else None
        self.embed_dropout = nn.Dropout(config.embedding_dropout)
        positions = config.num_positions
        self.embed_positions = nn.Embedding(positions, config.hidden_size) if positions else None
        self.value_embeddings = ValueEmbeddings(config.value_embeddings or {}, size, blocks)
        self.layers = nn.ModuleList(block.build(config, i) for i, block in enumerate(blocks))
        self.norm = NormConfig(**config.norm).build(config.hidden_size) if config.norm is not None else nn.Identity()
        self.loops = nn.ModuleDict(
            {
                name: build_loop(name, config.loops or {}, plan, config.hidden_size, final_norm=self.norm)
                for name in config.loops or {}
            }
        )
        self.streams = _first_values(config)
        self.passes: Passes | None = None
        self.loopwise = Looping(
            name="layers",
            plan=plan,
            policy=CachePolicy.parse(config.cache),
            indices=tuple((i,) for i in range(len(blocks))),
            returns=(Returns(kind=torch.Tensor),) * len(blocks),
            state_names=(),
        )
        self.loopwise.axes = [BLOCK_AXES] * len(blocks)
        hook_owner(self, self.loopwise)
        if config.relaxation:
            install(self, self.loopwise, cast(RelaxationConfig, components.from_dict(config.relaxation, axis="delta")))
        self.post_init()

    def make_passes(self, plan: Plan, **options: Any) -> Passes:
        """The loop components of one forward, see `Passes`."""
        # Streams follow when the embeddings are known.
        self.passes = Passes(plan, cast(Mapping[str, nn.Module], self.loops), **options)
        return self.passes

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LoopwiseModelOutput:
        """One forward; arguments as in transformers, and `loops`, `loop_options` (see `Passes`).

        Layers with mask "prefix" read token_type_ids, int64 `[B, T]`, 1 for tokens of the prefix.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, tokens that are needed and not given, a position
                past the learned ones, or a prefix under an unfit cache policy or after cached tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None and self.embed_tokens is None:
            raise ValueError("this model has no vocabulary (vocab_size is 0): pass inputs_embeds")
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[misc]
        if self.config.embedding_scale != 1:
            hidden_BTD = hidden_BTD * self.config.embedding_scale
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self)
        given_ids = position_ids  # those that count up from 0 do not start again inside a row
        if position_ids is None:
            past: int = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) + past)[None]
        if self.embed_positions is not None:
            if int(position_ids.max()) >= self.config.num_positions:
                raise ValueError(f"a position is past num_positions={self.config.num_positions} of this model")
            hidden_BTD = hidden_BTD + self.embed_positions(position_ids)
        hidden_BTD = self.embed_dropout(hidden_BTD)
        if self.passes is not None:
            self.passes.position_ids = position_ids
            if self.passes.routing is not None:
                past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
                self.passes.route_tokens(attention_mask, hidden_BTD.shape[1], past)
            for name, start in (self.config.streams or {}).items():
                first = hidden_BTD if start == "input" else self.streams[name].expand_as(hidden_BTD)
                self.passes.streams.setdefault(name, first)
        prefix = self._prefix(token_type_ids, past_key_values)
        arguments = self._arguments(hidden_BTD, attention_mask, position_ids, past_key_values, prefix, given_ids)
        for layer, values_BTE in self.value_embeddings.look_up(input_ids).items():
            arguments[layer]["value_embeddings"] = values_BTE
        state_BTD = hidden_BTD
        seen = []  # under a plan, the states of all visits are put in the place of these
        for layer, own in zip(self.layers, arguments, strict=True):
            seen.append(state_BTD)
            state_BTD = layer(
                state_BTD,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **own,
                **kwargs,
            )
        if self.config.norm_last:
            state_BTD = self.norm(state_BTD)
        return LoopwiseModelOutput(
            last_hidden_state=state_BTD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*seen, state_BTD) if self._wants_states(output_hidden_states) else None,
            **({} if self.passes is None else collected(self.passes)),
        )

    def _wants_states(self, asked: bool | None) -> bool:
        return bool(self.config.output_hidden_states if asked is None else asked)

    def read_out(self, name: str, state_BTD: torch.Tensor) -> torch.Tensor | None:
        """What the head would read if a loop ended with this state; None where other layers come after the loop."""
        plan = self.loopwise.plan
        last = plan.nodes[-1]
        if not isinstance(last, Loop) or last.name != name:
            return None
        if name in self.loops:
            state_BTD = cast(LoopModule, self.loops[name]).exit(state_BTD)
        return self.norm(state_BTD) if self.config.norm_last else state_BTD

    def _prefix(self, types_BT: torch.Tensor | None, cache: Any) -> torch.Tensor | None:
        """Which tokens are of the prefix, bool `[B, T]`; None where no layer asks."""
        if types_BT is None:
            return None
        if all(getattr(layer.block_config.mixer, "mask", None) != "prefix" for layer in cast(Any, self.layers)):
            return None
        prefix_BT, policy = types_BT == 1, self.loopwise.policy
        if cache is None or not bool(prefix_BT.any()):
            return prefix_BT
        if int(cache.get_seq_length()) > 0:
            raise ValueError(
                "tokens of a prefix see each other, but some come after tokens that are in the cache already: give the "
                "whole prefix in the first call"
            )
        if policy.prefill.is_sequential or policy.on_deeper == "catch_up":
            raise ValueError(
                f"tokens of a prefix see later ones, which cache policy {policy} (on_deeper {policy.on_deeper!r}) does "
                "not provide for: use set_cache(model, 'own')"
            )
        return prefix_BT

    def _arguments(
        self,
        hidden_BTD: torch.Tensor,
        mask_BT: torch.Tensor | None,
        position_ids_BT: torch.Tensor,
        cache: Any,
        prefix_BT: torch.Tensor | None = None,
        given_ids_BT: torch.Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Mask and rotary tables of every layer; layers of the same kind share theirs.

        Rows are searched for several texts in `given_ids_BT`, the positions that the caller gave: None spares the look.
        """
        masks: dict[Any, Any] = {}
        tables: dict[Any, Any] = {None: None}
        arguments: list[dict[str, Any]] = []
        for layer in self.layers:
            mixer = cast(Block, layer).block_config.mixer
            if not isinstance(mixer, AttentionConfig):
                arguments.append({})
                continue
            kind = mixer.mask, mixer.sliding_window
            if kind not in masks:
                prefix = prefix_BT if mixer.mask == "prefix" else None
                masks[kind] = mask_for(mixer, self.config, hidden_BTD, mask_BT, cache, given_ids_BT, prefix)
            if mixer.rope is not None and mixer.rope not in tables:
                tables[mixer.rope] = rotary_tables(position_ids_BT, mixer.rope)
            arguments.append({"attention_mask": masks[kind], "position_embeddings": tables[mixer.rope]})
        return arguments


def collected_loop(model: LoopwiseModel, output_loops: bool | str) -> str | None:
    """The name of the loop whose states are asked for: True is the one named core, or else the first.

    Raises:
        ValueError: the plan has no such loop.
    """
    if not output_loops:
        return None
    loops = model.loopwise.plan.loops
    name = output_loops if isinstance(output_loops, str) else ("core" if "core" in loops else next(iter(loops), ""))
    if name not in loops:
        raise ValueError(f"output_loops: the plan has no loop {name!r}; named are {', '.join(loops) or 'none'}")
    return name


def collected(passes: Passes) -> dict[str, Any]:
    """What one forward leaves behind beside its state: fields of `LoopwiseModelOutput`."""
    found: dict[str, Any] = {"loop_states": tuple(passes.states) or None}
    if passes.routing is not None:
        found["routes"], found["route_loss"] = tuple(passes.routing.routes), passes.routing.loss()
    exits = passes.observed
    if exits is None or exits.state is None:
        return found
    found["gate_logits"] = torch.stack(exits.gate_logits, dim=-1)
    found["exits"] = exits.state.n_updates_BT - 1
    found["ponder"] = getattr(exits.state, "ponder_BT", None)
    return found


def _first_values(config: LoopwiseDecoderConfig) -> FirstValues:
    starts: dict[str, list[str]] = {"input": [], "learned": [], "fixed": []}
    for name, start in (config.streams or {}).items():
        if start not in starts:
            raise ValueError(f"stream {name!r} starts as {start!r}: use one of {', '.join(starts)}")
        starts[start].append(name)
    return FirstValues(config.hidden_size, learned=starts["learned"], fixed=starts["fixed"])

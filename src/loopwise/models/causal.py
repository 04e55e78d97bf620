"""Our decoder with a language modelling head.

Shapes: B batch, T tokens, D width, V vocabulary, R iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from loopwise.loop import config as components
from loopwise.loop.config import Component
from loopwise.loop.counts import Loops, Window
from loopwise.loop.route import ExpertRouters
from loopwise.loop.state import RowSeeds
from loopwise.models.decoder import LoopwiseModel, LoopwisePreTrainedModel, collected_loop
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.hub import CausalLMOutputWithPast


@dataclass
class LoopwiseOutput(CausalLMOutputWithPast):
    """Output of our decoder.

    Attributes:
        loop_states: states after every iteration of the collected loop, R tensors `[B, T, D]`, on request.
        loop_logits: what the head makes of each, R tensors `[B, T, V]`, on request where nothing comes after the loop.
        gates: exit gate of every iteration in (0, 1), `[B, T, R]`, on request where the loop has a gate. Not a number
            where a token was not visited.
        gate_logits: its logits, `[B, T, R]`.
        exits: 0-based iteration after which each token left, int64 `[B, T]`, where the loop has a gate.
        ponder: ponder cost of each token `[B, T]`, for adaptive computation time.
        routes: what the routers chose, on request: a `Selection` for every iteration with expert choice, a
            `DepthChoice` for token choice (`loopwise.loop.route`).
        route_loss: what training adds to the loss for the routers, a scalar; None where there are none.
        last_hidden_state: what the head reads, `[B, T, D]`.
    """

    loop_states: tuple[torch.Tensor, ...] | None = None
    loop_logits: tuple[torch.Tensor, ...] | None = None
    gates: torch.Tensor | None = None
    gate_logits: torch.Tensor | None = None
    exits: torch.Tensor | None = None
    ponder: torch.Tensor | None = None
    routes: tuple | None = None
    route_loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class LoopwiseForCausalLM(LoopwisePreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LoopwiseDecoderConfig):
        super().__init__(config)
        self.model = LoopwiseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loops: Loops = None,
        window: Window = None,
        initial_state: torch.Tensor | None = None,
        generator: torch.Generator | RowSeeds | None = None,
        schedule: torch.Tensor | None = None,
        output_loops: bool | str = False,
        halting: Component | Mapping[str, Any] | None = None,
        on_exit: str | None = None,
        select: str | None = None,
        **kwargs: Any,
    ) -> LoopwiseOutput:
        """Logits of every token, and on request what every iteration made.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: 1 for tokens, 0 for padding, `[B, past + T]`.
            position_ids: int64 `[B, T]`.
            past_key_values: a transformers cache.
            inputs_embeds: `[B, T, D]` in the place of input_ids.
            token_type_ids: int64 `[B, T]`, 1 for tokens of a prefix that see each other, for layers with mask "prefix";
                all of them in the first call of a cache.
            labels: int64 `[B, T]`, -100 is ignored; gives the shifted cross-entropy `loss`.
            use_cache: return a cache.
            logits_to_keep: number of last positions, or their indices, that get logits; 0 for all. A bool tensor
                `[B, T]` selects single tokens, whose logits are `[N, V]` in the order of the rows.
            loops: iteration counts of this call; a `LoopCount` also says which iterations carry a gradient,
                `LoopCounts` give every row of the batch a depth of its own.
            window: how many of the last iterations carry a gradient, of the main loop or by loop name; the values are
                the same. None is that of the configuration.
            initial_state: first state of the loop, broadcastable to `[B, T, D]`.
            generator: source of a random first state; needed where the loop starts at random, unless a state is given.
            schedule: step sizes of the iterations `[R]`, for loops conditioned on time.
            output_loops: True (the loop named core, or the only one) or a loop's name: also return its states, and
                what the head and the gate make of them.
            halting: the rule by which tokens leave loops that have a gate, such as `HazardHalting(threshold=0.5)` or
                its dictionary; None is that of the configuration.
            on_exit: "skip" does not visit a token that has left again, "select" runs every iteration and reads each
                token where it left; None is that of the configuration.
            select: how loops with expert choice select, "top" (as published: it sees later tokens) or "threshold"
                (causal); None is that of the configuration. `generate` takes "threshold" unless told otherwise.
            **kwargs: handed to the layers.

        Raises:
            ValueError: a wrong loop name or count, a random state without a generator, or misshapen arguments.
        """
        collect = collected_loop(self.model, output_loops)
        options = {"initial_state": initial_state, "generator": generator, "schedule": schedule, "collect": collect}
        rule = components.from_dict(halting, axis="halting") if isinstance(halting, Mapping) else halting
        options |= {"halting": rule, "on_exit": on_exit, "select": select}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            loops=loops,
            window=window,
            loop_options=options,
            **kwargs,
        )
        self.model.passes = None
        logits = self.lm_head(_kept(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and output.route_loss is not None:
                loss = loss + output.route_loss
        return LoopwiseOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            loop_states=output.loop_states,
            loop_logits=self._loop_logits(collect, output.loop_states, logits_to_keep),
            gates=None if output.gate_logits is None else output.gate_logits.sigmoid(),
            gate_logits=output.gate_logits,
            exits=output.exits,
            ponder=output.ponder,
            routes=output.routes if collect else None,
            route_loss=output.route_loss,
            last_hidden_state=output.last_hidden_state,
        )

    @property
    def causal_options(self) -> dict[str, Any]:
        """Arguments of a call with which no token sees a later one, where that takes any."""
        routers = [getattr(module, "route", None) for module in self.model.loops.values()]
        return {"select": "threshold"} if any(isinstance(router, ExpertRouters) for router in routers) else {}

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, with `causal_options` for what the caller leaves open."""
        base: Any = super()
        return self.causal_options | base.prepare_inputs_for_generation(*args, **kwargs)

    def _loop_logits(self, name: str | None, states: Any, keep: Any) -> tuple[torch.Tensor, ...] | None:
        if name is None:
            return None
        read = [self.model.read_out(name, _kept(state_BTD, keep)) for state_BTD in states]
        return tuple(self.lm_head(state_BTD) for state_BTD in read) if read[0] is not None else None

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor | None:
        """What `generate` asks for before a forward with a static cache: the mask as it is, `[B, past + T]`.

        Our forward makes the mask of each layer from it; one mask for all would have no windows and no prefix.
        """
        return attention_mask

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Generated tokens are of no prefix, whatever the last token of the prompt was."""
        prompt = model_kwargs.get("token_type_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if prompt is not None:
            added = model_kwargs["token_type_ids"].shape[-1] - prompt.shape[-1]
            model_kwargs["token_type_ids"] = torch.cat([prompt, prompt.new_zeros(*prompt.shape[:-1], added)], dim=-1)
        return model_kwargs


def _kept(states_BTD: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The states that the head reads, see `logits_to_keep`."""
    if isinstance(keep, int):
        return states_BTD[:, slice(-keep, None)]
    if keep.dtype != torch.bool:
        return states_BTD[:, keep]
    # What states_BTD[keep] is, with a backward pass of half the time.
    return states_BTD.flatten(0, 1).index_select(0, keep.flatten().nonzero()[:, 0])

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
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from loopwise.cache.policy import CachePolicy
from loopwise.loop import config as components
from loopwise.loop.config import Component
from loopwise.loop.halting import Gate
from loopwise.loop.passes import LoopModule, Passes
from loopwise.loop.route import ExpertChoice
from loopwise.loop.state import StateInit
from loopwise.loop.streams import FirstValues
from loopwise.models.attention import attention_mask as mask_for
from loopwise.models.blocks import BLOCK_AXES, Block, BlockConfig
from loopwise.models.hub import BaseModelOutputWithPast, CausalLMOutputWithPast, align, new_cache
from loopwise.models.mixers import AttentionConfig
from loopwise.models.norms import NormConfig
from loopwise.models.playing import Looping, Returns, hook_owner, looping_of
from loopwise.models.rotary import rotary_tables
from loopwise.models.value_embeddings import ValueEmbeddings
from loopwise.plan.nodes import Loop
from loopwise.plan.plans import Plan

SHARED_NORM = "norm"
_LOOP_FIELDS = ("state", "update", "entry", "turn", "exit", "exit_projection", "gate", "stream", "reads", "grad")
_LOOP_FIELDS += ("signal", "conditioner", "halting", "on_exit", "route", "follows", "iterations")


class LoopwiseDecoderConfig(PreTrainedConfig):
    """A decoder as data.

    Attributes:
        vocab_size: V; 0 for a model that is called with inputs_embeds only.
        hidden_size: D.
        num_hidden_layers: number of physical layers.
        blocks: a `BlockConfig` dictionary per layer, or one for all.
        plan: plan text.
        loops: per named loop a dictionary with any of `state`, `update`, `signal`, `conditioner` (loop
            components), `entry`, `turn`, `exit` (a norm's dictionary, or "norm" for the final norm itself),
            `exit_projection` (a linear map in the place of `exit`: true, or "bias" for one with a bias), `gate`
            (true, or the first value of its bias: an exit gate reads the state after every iteration), `halting` (a
            rule that the gate drives), `on_exit` ("skip" or "select", see `loopwise.loop.exits`), `stream` (name),
            `reads` (names of streams) and `grad` (how many last iterations carry a gradient, see `GradientWindow`). Or
            else `route` (routers that choose the tokens of every iteration, see `loopwise.loop.routing`) with
            `iterations` (how many there are routers for; as many as in the plan), or `follows` (name of the loop whose
            routers it goes on with) alone.
        streams: first values of named streams: "input" (the embeddings), "learned" (a vector `[D]`, a parameter) or
            "fixed" (the same as a buffer: it is not trained).
        norm: the final norm; None has none.
        norm_last: whether the final norm is applied before the head (Ouro applies it inside the loop only).
        embedding_scale: factor on the embeddings.
        embedding_dropout: probability on the embeddings in training.
        num_positions: size of a learned position table, or None.
        value_embeddings: layer number (as text) -> width of its table of value embeddings; None has none.
        max_position_embeddings: longest context, for information.
        cache: cache policy, see `loopwise.attach`.
    """

    model_type = "loopwise_decoder"

    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    blocks: list | None = None
    plan: str = ""
    loops: dict | None = None
    streams: dict | None = None
    norm: dict | None = None
    norm_last: bool = True
    embedding_scale: float = 1.0
    embedding_dropout: float = 0.0
    num_positions: int | None = None
    value_embeddings: dict | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    cache: str = "own"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def block_configs(self) -> list[BlockConfig]:
        """One config per physical layer.

        Raises:
            ValueError: another number of blocks than of layers.
        """
        blocks = [BlockConfig.from_dict(dict(block)) for block in self.blocks or ()]
        if len(blocks) == 1:
            blocks *= self.num_hidden_layers
        if not blocks or len(blocks) != self.num_hidden_layers:
            raise ValueError(
                f"blocks has {len(blocks)} entries, num_hidden_layers is {self.num_hidden_layers}: give one per layer"
            )
        return blocks


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
    """

    loop_states: tuple[torch.Tensor, ...] | None = None
    loop_logits: tuple[torch.Tensor, ...] | None = None
    gates: torch.Tensor | None = None
    gate_logits: torch.Tensor | None = None
    exits: torch.Tensor | None = None
    ponder: torch.Tensor | None = None
    routes: tuple | None = None


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


class Shared(nn.Module):
    """A module used in a second place, without being registered there."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.__dict__["of"] = (module,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does."""
        return self.__dict__["of"][0](*args, **kwargs)


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
        if isinstance(module, (nn.Linear, nn.Embedding)):
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
            {name: self._build_loop(name, spec, plan) for name, spec in (config.loops or {}).items()}
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
        self.post_init()

    def _build_loop(self, name: str, spec: Mapping[str, Any], plan: Plan) -> LoopModule:
        if name not in plan.loops:
            raise ValueError(f"loops names {name!r}, the plan {plan} has {', '.join(plan.loops) or 'no named loop'}")
        width = self.config.hidden_size

        def norm(key: str) -> nn.Module | None:
            value = spec.get(key)
            if value is None:
                return None
            return Shared(self.norm) if value == SHARED_NORM else NormConfig(**value).build(width)

        def component(key: str) -> Any:
            config: Any = components.from_dict(spec[key], axis=key) if spec.get(key) else None
            return None if config is None else config.build(width)

        unknown = sorted(set(spec) - set(_LOOP_FIELDS))
        if unknown:
            raise ValueError(f"loop {name!r} has an unknown component {unknown[0]!r}")
        if spec.get("route") or spec.get("follows"):
            return self._build_routed(name, spec, plan)
        projection = spec.get("exit_projection")
        exit_norm = nn.Linear(width, width, bias=projection == "bias") if projection else norm("exit")
        module = LoopModule(
            state=cast(StateInit, components.from_dict(spec["state"], axis="state")) if spec.get("state") else None,
            update=component("update"),
            entry=norm("entry"),
            signal=component("signal"),
            conditioner=component("conditioner"),
            turn=norm("turn"),
            exit=exit_norm,
            stream=spec.get("stream"),
            reads=tuple(spec.get("reads", ())),
            grad=spec.get("grad"),
            gate=_gate(name, spec.get("gate"), width),
            halting=components.from_dict(spec["halting"], axis="halting") if spec.get("halting") else None,
            on_exit=spec.get("on_exit", "skip"),
        )
        return module

    def _build_routed(self, name: str, spec: Mapping[str, Any], plan: Plan) -> LoopModule:
        loops = self.config.loops or {}
        others = sorted(set(spec) - ({"route", "iterations"} if spec.get("route") else {"follows"}))
        if others:
            raise ValueError(f"loop {name!r} has routers, which go with no other component: leave {others[0]!r} out")
        if spec.get("follows"):
            if not loops.get(spec["follows"], {}).get("route"):
                raise ValueError(f"loop {name!r} follows {spec['follows']!r}, which has no routers of its own")
            return LoopModule(follows=spec["follows"])
        members = [name, *(other for other, item in loops.items() if item.get("follows") == name)]
        route: Any = components.from_dict(spec["route"], axis="route")
        iterations = spec.get("iterations") or sum(plan.counts[member] for member in members)
        return LoopModule(route=route.build(self.config.hidden_size, iterations))

    def make_passes(self, plan: Plan, **options: Any) -> Passes:
        """The loop components of one forward, see `Passes`."""
        self.passes = Passes(plan, cast(Mapping[str, nn.Module], self.loops), **options)  # streams follow when the embeddings are known
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
        hidden_BTD = hidden_BTD * self.config.embedding_scale
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self)
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
        arguments = self._arguments(hidden_BTD, attention_mask, position_ids, past_key_values, prefix)
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
        kinds = {getattr(layer.block_config.mixer, "mask", None) for layer in cast(Any, self.layers)}
        if types_BT is None or "prefix" not in kinds:
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
    ) -> list[dict[str, Any]]:
        """Mask and rotary tables of every layer; layers of the same kind share theirs."""
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
                masks[kind] = mask_for(mixer, self.config, hidden_BTD, mask_BT, cache, position_ids_BT, prefix)
            if mixer.rope is not None and mixer.rope not in tables:
                tables[mixer.rope] = rotary_tables(position_ids_BT, mixer.rope)
            arguments.append({"attention_mask": masks[kind], "position_embeddings": tables[mixer.rope]})
        return arguments


def _gate(name: str, spec: Any, width: int) -> Gate | None:
    if spec in (None, False):
        return None
    if not isinstance(spec, bool | int | float):
        raise ValueError(f"loop {name!r} has gate={spec!r}: use true, or the first value of its bias")
    return Gate(width, bias=0.0 if spec is True else float(spec))


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
        loops: int | Mapping[str, int] | None = None,
        initial_state: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
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
            logits_to_keep: number of last positions, or indices, that get logits; 0 for all.
            loops: iteration counts of this call.
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
            loop_options=options,
            **kwargs,
        )
        self.model.passes = None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
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
            loop_logits=self._loop_logits(collect, output.loop_states, keep),
            gates=None if output.gate_logits is None else output.gate_logits.sigmoid(),
            gate_logits=output.gate_logits,
            exits=output.exits,
            ponder=output.ponder,
            routes=output.routes if collect else None,
        )

    @property
    def causal_options(self) -> dict[str, Any]:
        """Arguments of a call with which no token sees a later one, where that takes any."""
        loops = (self.config.loops or {}).values()
        routes = [components.from_dict(spec["route"], axis="route") for spec in loops if spec.get("route")]
        return {"select": "threshold"} if any(isinstance(route, ExpertChoice) for route in routes) else {}

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, with `causal_options` for what the caller leaves open."""
        base: Any = super()
        return self.causal_options | base.prepare_inputs_for_generation(*args, **kwargs)

    def _loop_logits(self, name: str | None, states: Any, keep: Any) -> tuple[torch.Tensor, ...] | None:
        if name is None:
            return None
        read = [self.model.read_out(name, state_BTD[:, keep]) for state_BTD in states]
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


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
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from loopwise.cache.policy import CachePolicy
from loopwise.loop import config as components
from loopwise.loop.passes import LoopModule, Passes
from loopwise.models.attention import attention_mask as mask_for
from loopwise.models.blocks import BlockConfig
from loopwise.models.hub import new_cache
from loopwise.models.mixers import AttentionConfig
from loopwise.models.norms import NormConfig
from loopwise.models.playing import Looping, Returns, hook_owner
from loopwise.models.rotary import rotary_tables
from loopwise.plan.plans import Plan

SHARED_NORM = "norm"
_LOOP_FIELDS = ("state", "update", "entry", "turn", "exit", "exit_projection", "gate", "stream", "reads")


class LoopwiseDecoderConfig(PreTrainedConfig):
    """A decoder as data.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        num_hidden_layers: number of physical layers.
        blocks: a `BlockConfig` dictionary per layer, or one for all.
        plan: plan text.
        loops: per named loop a dictionary with any of `state`, `update` (loop components), `entry`, `turn`, `exit` (a
            norm's dictionary, or "norm" for the final norm itself), `exit_projection` (bool), `gate` (bool: an exit
            gate reads the state after every iteration), `stream` (name) and `reads` (names of streams).
        streams: first values of named streams: "input" (the embeddings) or "learned" (a vector `[D]`, a parameter).
        norm: the final norm; None has none.
        norm_last: whether the final norm is applied before the head (Ouro applies it inside the loop only).
        embedding_scale: factor on the embeddings.
        num_positions: size of a learned position table, or None.
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
    num_positions: int | None = None
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
        loop_logits: what the head makes of each, R tensors `[B, T, V]`, on request.
        gates: exit gate of every iteration in (0, 1), `[B, T, R]`, on request where the loop has a gate.
    """

    loop_states: tuple[torch.Tensor, ...] | None = None
    loop_logits: tuple[torch.Tensor, ...] | None = None
    gates: torch.Tensor | None = None


class Shared(nn.Module):
    """A module used in a second place, without being registered there."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.__dict__["of"] = (module,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does."""
        return self.of[0](*args, **kwargs)


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

    def _init_weights(self, module: nn.Module) -> None:
        """Normal matrices, zero biases; modules with a start of their own take it."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()


class LoopwiseModel(LoopwisePreTrainedModel):
    """Embeddings, layers, loops and final norm."""

    def __init__(self, config: LoopwiseDecoderConfig):
        super().__init__(config)
        blocks = config.block_configs()
        plan = Plan.parse(config.plan).validate(len(blocks))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        positions = config.num_positions
        self.embed_positions = nn.Embedding(positions, config.hidden_size) if positions else None
        self.layers = nn.ModuleList(block.build(config, i) for i, block in enumerate(blocks))
        self.norm = NormConfig(**config.norm).build(config.hidden_size) if config.norm is not None else nn.Identity()
        self.loops = nn.ModuleDict(
            {name: self._build_loop(name, spec, plan) for name, spec in (config.loops or {}).items()}
        )
        starts = {name: start for name, start in (config.streams or {}).items() if start == "learned"}
        self.streams = nn.ParameterDict({name: nn.Parameter(torch.zeros(config.hidden_size)) for name in starts})
        self.passes: Passes | None = None
        self.loopwise = Looping(
            name="layers",
            plan=plan,
            policy=CachePolicy.parse(config.cache),
            indices=tuple((i,) for i in range(len(blocks))),
            returns=(Returns(kind=torch.Tensor),) * len(blocks),
            state_names=(),
        )
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

        unknown = sorted(set(spec) - set(_LOOP_FIELDS))
        if unknown:
            raise ValueError(f"loop {name!r} has an unknown component {unknown[0]!r}")
        exit_norm = nn.Linear(width, width, bias=False) if spec.get("exit_projection") else norm("exit")
        module = LoopModule(
            state=components.from_dict(spec["state"], axis="state") if spec.get("state") else None,
            update=components.from_dict(spec["update"], axis="update").build(width) if spec.get("update") else None,
            entry=norm("entry"),
            turn=norm("turn"),
            exit=exit_norm,
            stream=spec.get("stream"),
            reads=tuple(spec.get("reads", ())),
        )
        if spec.get("gate"):
            module.gate = nn.Linear(width, 1)
        return module

    def make_passes(self, plan: Plan, **options: Any) -> Passes:
        """The loop components of one forward, see `Passes`."""
        self.passes = Passes(plan, self.loops, **options)  # streams follow when the embeddings are known
        return self.passes

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """One forward; arguments as in transformers, and `loops`, `loop_options` (see `Passes`).

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_BTD = hidden_BTD * self.config.embedding_scale
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) + past)[None]
        if self.embed_positions is not None:
            hidden_BTD = hidden_BTD + self.embed_positions(position_ids)
        if self.passes is not None:
            for name, start in (self.config.streams or {}).items():
                first = hidden_BTD if start == "input" else self.streams[name].expand_as(hidden_BTD)
                self.passes.streams.setdefault(name, first)
        arguments = self._arguments(hidden_BTD, attention_mask, position_ids, past_key_values)
        state_BTD = hidden_BTD
        for layer, own in zip(self.layers, arguments, strict=True):
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
        return BaseModelOutputWithPast(
            last_hidden_state=state_BTD, past_key_values=past_key_values if use_cache else None
        )

    def _arguments(
        self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None, position_ids_BT: torch.Tensor, cache: Any
    ) -> list[dict[str, Any]]:
        """Mask and rotary tables of every layer; layers of the same kind share theirs."""
        masks: dict[Any, Any] = {}
        tables: dict[Any, Any] = {None: None}
        arguments: list[dict[str, Any]] = []
        for layer in self.layers:
            mixer = layer.block_config.mixer
            if not isinstance(mixer, AttentionConfig):
                arguments.append({})
                continue
            kind = mixer.mask, mixer.sliding_window
            if kind not in masks:
                masks[kind] = mask_for(mixer, self.config, hidden_BTD, mask_BT, cache, position_ids_BT)
            if mixer.rope not in tables:
                tables[mixer.rope] = rotary_tables(position_ids_BT, mixer.rope)
            arguments.append({"attention_mask": masks[kind], "position_embeddings": tables[mixer.rope]})
        return arguments


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
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loops: int | Mapping[str, int] | None = None,
        initial_state: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        schedule: torch.Tensor | None = None,
        output_loops: bool | str = False,
        **kwargs: Any,
    ) -> LoopwiseOutput:
        """Logits of every token, and on request what every iteration made.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: 1 for tokens, 0 for padding, `[B, past + T]`.
            position_ids: int64 `[B, T]`.
            past_key_values: a transformers cache.
            inputs_embeds: `[B, T, D]` in the place of input_ids.
            labels: int64 `[B, T]`, -100 is ignored; gives the shifted cross-entropy `loss`.
            use_cache: return a cache.
            logits_to_keep: number of last positions, or indices, that get logits; 0 for all.
            loops: iteration counts of this call.
            initial_state: first state of the loop, broadcastable to `[B, T, D]`.
            generator: source of a random first state; needed where the loop starts at random, unless a state is given.
            schedule: step sizes of the iterations `[R]`, for loops conditioned on time.
            output_loops: True (the loop named core, or the only one) or a loop's name: also return its states.
            **kwargs: handed to the layers.

        Raises:
            ValueError: a wrong loop name or count, a random state without a generator, or misshapen arguments.
        """
        collect = self._collected(output_loops)
        options = {"initial_state": initial_state, "generator": generator, "schedule": schedule, "collect": collect}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            loops=loops,
            loop_options=options,
            **kwargs,
        )
        states = tuple(self.model.passes.states) if collect and self.model.passes else None
        self.model.passes = None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LoopwiseOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            loop_states=states,
        )

    def _collected(self, output_loops: bool | str) -> str | None:
        if not output_loops:
            return None
        loops = self.model.loopwise.plan.loops
        name = output_loops if isinstance(output_loops, str) else ("core" if "core" in loops else next(iter(loops), ""))
        if name not in loops:
            raise ValueError(f"output_loops: the plan has no loop {name!r}; named are {', '.join(loops) or 'none'}")
        return name

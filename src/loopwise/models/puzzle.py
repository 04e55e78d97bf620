"""Puzzles: our decoder without a causal order, run in segments, with a head that says when to halt (HRM, TRM).

    x = sqrt(D) [puzzle vectors ; embed(inputs)];   one segment: named streams z <- plan(z, x)
    logits = head(z_first) without the puzzle positions;   (q_halt, q_continue) = q_head(z_first at position 0)

Layers, streams, loops and the gradient window are those of `LoopwiseModel`. What is added is what surrounds it: the
vectors of puzzles, the carry between segments, and the two heads.

Shapes: B batch, T tokens of the puzzle, P puzzle positions, S = P + T, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loopwise.loop import config as components
from loopwise.loop.carry import Carry, SegmentHalting
from loopwise.loop.streams import FirstValues, cut_normal_
from loopwise.models.decoder import LoopwiseModel, LoopwisePreTrainedModel
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.hub import ModelOutput
from loopwise.models.playing import looping_of

_Q_BIAS = -5.0


class LoopwisePuzzleConfig(LoopwiseDecoderConfig):
    """A puzzle model as data: a decoder's configuration and what surrounds it.

    Attributes:
        carried: names of the streams that go from segment to segment; the heads read the first.
        num_puzzles: puzzles that have a vector of their own; 0 for none.
        puzzle_size: width of such a vector; zeros fill it up to P D.
        puzzle_positions: P, positions in front of the tokens that the vectors fill.
        learned_positions: size of a learned position table, at least S; None has none. It is added before the scale,
            and the sum is divided by sqrt(2).
        halting: a `SegmentHalting` as a dictionary.
    """

    model_type = "loopwise_puzzle"

    carried: list | None = None
    num_puzzles: int = 0
    puzzle_size: int = 0
    puzzle_positions: int = 0
    learned_positions: int | None = None
    halting: dict | None = None
    norm_last: bool = False
    use_cache: bool = False


@dataclass
class PuzzleOutput(ModelOutput):
    """Output of one segment.

    Attributes:
        logits: `[B, T, V]`.
        q_halt_logits: float32 `[B]`.
        q_continue_logits: float32 `[B]`.
        carry: what the next segment starts from, detached.
        input_embeddings: what enters at every update, `[B, S, D]`, on request.
        loop_states: states after every iteration of the collected loop, each `[B, S, D]`, on request.
    """

    logits: torch.Tensor | None = None
    q_halt_logits: torch.Tensor | None = None
    q_continue_logits: torch.Tensor | None = None
    carry: Carry | None = None
    input_embeddings: torch.Tensor | None = None
    loop_states: tuple[torch.Tensor, ...] | None = None


class _PuzzleInit(LoopwisePreTrainedModel):
    """How the published models start: matrices `N(0, 1 / fan_in)`, embeddings `N(0, 1 / D)`, cut at 2 deviations."""

    config_class = LoopwisePuzzleConfig

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            cut_normal_(module.weight, module.weight.shape[1] ** -0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class PuzzleBackbone(_PuzzleInit, LoopwiseModel):
    """`LoopwiseModel` with the start of the published puzzle models."""


class LoopwisePuzzleModel(_PuzzleInit):
    """A hierarchical or tiny recursive reasoner over sequences of one length."""

    main_input_name = "inputs"

    def __init__(self, config: LoopwisePuzzleConfig):
        super().__init__(config)
        _check(config)
        width = config.hidden_size
        self.model = PuzzleBackbone(config)
        self.puzzles = nn.Embedding(config.num_puzzles, config.puzzle_size) if config.num_puzzles else None
        self.positions = nn.Embedding(config.learned_positions, width) if config.learned_positions else None
        self.first = FirstValues(width, fixed=config.carried or [])
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.q_head = nn.Linear(width, 2)
        halting = components.from_dict(config.halting or {"kind": "segments"}, axis="halting")
        if not isinstance(halting, SegmentHalting):
            raise ValueError(f"halting is {halting.kind}: a puzzle model halts by halting.segments")
        self.halting = halting
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Puzzle vectors zero; the heads that halt nearly constant, so that nothing halts at first."""
        if module is self.puzzles and isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight)
        elif module is self.q_head:
            nn.init.zeros_(self.q_head.weight)
            nn.init.constant_(self.q_head.bias, _Q_BIAS)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        assert self.model.embed_tokens is not None
        return self.model.embed_tokens

    def initial_carry(self, inputs: torch.Tensor) -> Carry:
        """The carry before the first segment of a batch of inputs `[B, T]`: first values, no steps, all halted."""
        num_rows, num_tokens = inputs.shape
        shape = (num_rows, self.config.puzzle_positions + num_tokens, self.config.hidden_size)
        return Carry(
            streams={name: value.to(self.dtype).expand(shape) for name, value in self._first().items()},
            steps=torch.zeros(num_rows, dtype=torch.int64, device=inputs.device),
            halted=torch.ones(num_rows, dtype=torch.bool, device=inputs.device),
        )

    def forward(
        self,
        inputs: torch.Tensor,
        puzzle_ids: torch.Tensor | None = None,
        carry: Carry | None = None,
        *,
        loops: Mapping[str, int] | None = None,
        gradient_window: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        output_embeddings: bool = False,
        output_loops: str | None = None,
    ) -> PuzzleOutput:
        """Run one segment.

        In training, rows whose carry has halted start anew, with the inputs of this call; who keeps the inputs of
        running rows is the caller. In evaluation no row is ever started anew, however many segments it has run.

        Args:
            inputs: integer `[B, T]`.
            puzzle_ids: integer `[B]`; left out where puzzles have no vectors.
            carry: what the segment before left; None starts.
            loops: iteration counts of this call, by loop name.
            gradient_window: replaces the configured one for this call, see `GradientWindow`.
            generator: source of the minimum number of segments, needed in training with exploration.
            output_embeddings: also return the input embeddings.
            output_loops: name of a loop whose states are also returned.

        Raises:
            ValueError: misshapen inputs, puzzle_ids or carry, a wrong loop name, or a missing generator.
        """
        if inputs.ndim != 2:
            raise ValueError(f"inputs has shape {list(inputs.shape)}: give rows of tokens, [batch, tokens]")
        hidden_BSD = self._embed(inputs, puzzle_ids)
        carry = self._started(self.initial_carry(inputs) if carry is None else carry, hidden_BSD)
        options = {"streams": carry.streams, "collect": self._loop(output_loops), "window": gradient_window}
        self.model(inputs_embeds=hidden_BSD, use_cache=False, loops=loops, loop_options=options)
        passes = self.model.passes
        assert passes is not None
        self.model.passes = None
        z_BSD = passes.streams[self.config.carried[0]]
        q_B2 = self.q_head(z_BSD[:, 0]).float()
        return PuzzleOutput(
            logits=self.lm_head(z_BSD[:, self.config.puzzle_positions :]),
            q_halt_logits=q_B2[:, 0],
            q_continue_logits=q_B2[:, 1],
            carry=self._next_carry(carry, passes.streams, q_B2, generator),
            input_embeddings=passes.streams["x"] if output_embeddings else None,
            loop_states=tuple(passes.states) if output_loops else None,
        )

    def _embed(self, inputs: torch.Tensor, puzzle_ids: torch.Tensor | None) -> torch.Tensor:
        """Puzzle vectors, tokens and positions, before the scale, `[B, S, D]`."""
        hidden_BSD = self.get_input_embeddings()(inputs)
        if self.puzzles is not None:
            if puzzle_ids is None or puzzle_ids.shape != inputs.shape[:1]:
                got = "missing" if puzzle_ids is None else f"of shape {list(puzzle_ids.shape)}"
                raise ValueError(f"puzzle_ids is {got}: give one number per row, [{inputs.shape[0]}]")
            vectors = self.puzzles(puzzle_ids)
            vectors = F.pad(vectors, (0, self.config.puzzle_positions * hidden_BSD.shape[-1] - vectors.shape[-1]))
            hidden_BSD = torch.cat([vectors.unflatten(-1, (-1, hidden_BSD.shape[-1])), hidden_BSD], dim=1)
        if self.positions is not None:
            length = hidden_BSD.shape[1]
            if length > self.positions.num_embeddings:
                raise ValueError(
                    f"the sequence has {length} positions, learned_positions is {self.positions.num_embeddings}"
                )
            # Divided so that the variance stays that of one of the two.
            hidden_BSD = math.sqrt(0.5) * (hidden_BSD + self.positions.weight[:length])
        return hidden_BSD

    def _started(self, carry: Carry, hidden_BSD: torch.Tensor) -> Carry:
        """The carry that the segment starts from, checked against the shape of the input."""
        names = self.config.carried
        if set(carry.streams) != set(names):
            raise ValueError(f"the carry has streams {', '.join(carry.streams)}, the model carries {', '.join(names)}")
        for name, value in carry.streams.items():
            if value.shape != hidden_BSD.shape:
                want, got = list(hidden_BSD.shape), list(value.shape)
                raise ValueError(f"stream {name} of the carry has shape {got}, this input asks for {want}")
        return carry.restart(carry.halted, self._first()) if self.training else carry

    def _next_carry(
        self, carry: Carry, streams: Mapping[str, torch.Tensor], q_B2: torch.Tensor, generator: torch.Generator | None
    ) -> Carry:
        steps_B = carry.steps + 1
        with torch.no_grad():
            halted_B = self.halting.halts(steps_B, q_B2[:, 0], q_B2[:, 1], training=self.training, generator=generator)
        return Carry(streams={name: streams[name].detach() for name in carry.streams}, steps=steps_B, halted=halted_B)

    def _first(self) -> dict[str, torch.Tensor]:
        return {name: self.first[name] for name in self.config.carried}

    def _loop(self, name: str | None) -> str | None:
        looping = looping_of(self.model)
        loops = looping.plan.loops if looping else {}
        if name is not None and name not in loops:
            raise ValueError(f"output_loops: the plan has no loop {name!r}; named are {', '.join(loops)}")
        return name


def _check(config: LoopwisePuzzleConfig) -> None:
    """Refuse configurations whose parts do not fit."""
    loops = (config.loops or {}).values()
    written = {loop["stream"] for loop in loops if loop.get("stream")}
    if not config.vocab_size:
        raise ValueError("vocab_size is 0: a puzzle model reads and writes tokens, give at least 1")
    if not config.carried or set(config.carried) != written:
        raise ValueError(f"carried is {config.carried}: name the streams of the loops, {sorted(written)}")
    if (config.streams or {}).get("x") != "input":
        raise ValueError(f"streams is {config.streams}: a puzzle model needs the stream x, with the value input")
    if bool(config.num_puzzles) != bool(config.puzzle_positions):
        raise ValueError(
            f"puzzle_positions is {config.puzzle_positions} with num_puzzles {config.num_puzzles}: "
            "puzzle positions hold puzzle vectors, give both or neither"
        )
    if config.num_puzzles and not 0 < config.puzzle_size <= config.puzzle_positions * config.hidden_size:
        room = config.puzzle_positions * config.hidden_size
        raise ValueError(f"puzzle_size is {config.puzzle_size}: the puzzle positions have room for 1 to {room}")

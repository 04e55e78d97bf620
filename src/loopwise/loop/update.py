"""How the state of a loop meets the injected tensor, before and after the block.

Shapes: B batch rows, T tokens, D width of the state, E width of the injected tensor (E = D unless said).

One iteration is `block_in = update(state, e)`, `block_out = block(block_in)`,
`state = update.leave(state, block_out, e)`. Most updates act on one side and leave the other alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from loopwise.loop.config import Component


class Update(nn.Module):
    """Base of the updates; by itself it changes nothing ("replace": the block's output is the next state).

    Attributes:
        no_weight_decay: names of own parameters that the method trains without weight decay.
        reads_iteration: whether its results depend on `iteration`, `num_iterations` or `time`. One that does must say
            so: rows at different iterations are otherwise updated in one call.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    reads_iteration: bool = False

    def forward(
        self,
        state_BTD: torch.Tensor,
        e_BTD: torch.Tensor,
        *,
        iteration: int,
        num_iterations: int,
        time: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """What the block reads.

        Args:
            state_BTD: state before the iteration, floating `[B, T, D]`.
            e_BTD: injected tensor, same dtype, `[B, T, E]`.
            iteration: 0-based index of the iteration.
            num_iterations: how many iterations the loop runs.
            time: position of the iteration on a schedule, for updates that are conditioned on it.

        Returns:
            Input of the block, `[B, T, D]`.
        """
        return state_BTD

    def leave(
        self,
        before_BTD: torch.Tensor,
        after_BTD: torch.Tensor,
        e_BTD: torch.Tensor,
        *,
        iteration: int,
        num_iterations: int,
        time: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """The next state, from the state before the iteration and the block's output, both `[B, T, D]`."""
        return after_BTD


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(Component):
    """Base of the update configs."""

    def build(self, width: int, input_width: int | None = None) -> Update:
        """The module for a state of `width` D and an injected tensor of `input_width` E (default D).

        Raises:
            ValueError: the update needs E = D and they differ.
        """
        input_width = width if input_width is None else input_width
        if input_width != width and not self._takes_other_width():
            raise ValueError(f"{self.kind}: input_width={input_width} differs from width={width}; use update.concat")
        return self._build(width, input_width)

    def _takes_other_width(self) -> bool:
        return False

    def _build(self, width: int, input_width: int) -> Update:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ReplaceConfig(UpdateConfig):
    """No injection: the block reads the state, and its output is the next state."""

    kind: ClassVar[str | None] = "update.replace"

    def _takes_other_width(self) -> bool:
        return True

    def _build(self, width: int, input_width: int) -> Update:
        return Update()


@dataclass(frozen=True, kw_only=True)
class AddConfig(UpdateConfig):
    """The block reads `s + e` (Yang et al., 2311.12424)."""

    kind: ClassVar[str | None] = "update.add"

    def _build(self, width: int, input_width: int) -> Update:
        return Add()


@dataclass(frozen=True, kw_only=True)
class ProductConfig(UpdateConfig):
    """The block reads `s * e`, elementwise (Yang et al., 2311.12424; Huginn's training code calls this "gate")."""

    kind: ClassVar[str | None] = "update.product"

    def _build(self, width: int, input_width: int) -> Update:
        return Product()


@dataclass(frozen=True, kw_only=True)
class ConcatConfig(UpdateConfig):
    """The block reads `W [s ; e]`, state first, W of shape `[D, D + E]` (Huginn, 2502.05171; retrofit, 2511.07384).

    Attributes:
        bias: whether the map has a bias (no published model has).
        init: start of W: "uniform" (the default of a torch linear layer; our own decoder draws it like its other
            matrices), "normal" (Huginn: truncated at 3 deviations, std `sqrt(2 / (5 D))`), "pass_state" `[I, 0]`, or
            "pass_input" `[0, I]`, with which one iteration of a retrofitted model equals its source layers.
    """

    kind: ClassVar[str | None] = "update.concat"
    bias: bool = False
    init: Literal["uniform", "normal", "pass_state", "pass_input"] = "uniform"

    def _takes_other_width(self) -> bool:
        return True

    def _build(self, width: int, input_width: int) -> Update:
        if self.init == "pass_input" and width != input_width:
            raise ValueError(f"update.concat: init='pass_input' needs input_width {input_width} equal to width {width}")
        return Concat(self, width, input_width)


@dataclass(frozen=True, kw_only=True)
class GatedConfig(UpdateConfig):
    """The block reads `s + g * (c - s)` with the gate `g = sigmoid(W [s ; e] + b)`.

    The coupled gate of Highway Networks (1505.00387), with the injected tensor in the place of the transform: g = 0
    carries the state, g = 1 replaces it.

    Attributes:
        candidate: c is e itself ("input") or a bias-free linear map of e ("linear").
        bias: start of b; negative carries the state at first.
    """

    kind: ClassVar[str | None] = "update.gated"
    candidate: Literal["input", "linear"] = "input"
    bias: float = 0.0

    def _takes_other_width(self) -> bool:
        return self.candidate == "linear"

    def _build(self, width: int, input_width: int) -> Update:
        return Gated(self, width, input_width)


@dataclass(frozen=True, kw_only=True)
class HighwayConfig(UpdateConfig):
    """The next state is `s * k + F * g` for the block's output F (Universal Transformer, recurrence type "highway").

    `g = sigmoid(W x + b)`, and the carry gate k is `1 - g` or a gate of its own, as in tensor2tensor; its layer norm
    and dropout around the gates are left out here, and s is the state before the step signal is added.

    Attributes:
        reads: what x concatenates, in this order: the state before the block, the block's output, the injected
            tensor (tensor2tensor's notes find the last alone to work best).
        coupled: k = 1 - g.
        bias: start of b; the carry gate of an uncoupled pair starts at -b.
    """

    kind: ClassVar[str | None] = "update.highway"
    reads: tuple[Literal["state", "block", "input"], ...] = ("input",)
    coupled: bool = True
    bias: float = -1.0

    def __post_init__(self) -> None:
        """Check that the gates read something, each tensor once."""
        super().__post_init__()
        self.require(0 < len(self.reads) == len(set(self.reads)), "reads", "must name one to three tensors, each once")

    def _takes_other_width(self) -> bool:
        return True

    def _build(self, width: int, input_width: int) -> Update:
        return Highway(self, width, input_width)


@dataclass(frozen=True, kw_only=True)
class DampedConfig(UpdateConfig):
    """The next state is `(1 - dt) * s + dt * F`: an Euler step towards the block's output (SCORE, 2603.10544).

    Attributes:
        dt: the (first) step size, in (0, 1]; 1 is "replace".
        learned: keep dt, or learn `dt = sigmoid(theta)` as one number or one per channel (then dt < 1).
    """

    kind: ClassVar[str | None] = "update.damped"
    dt: float = 0.5
    learned: Literal["no", "scalar", "channel"] = "no"

    def __post_init__(self) -> None:
        """Check the range of dt."""
        super().__post_init__()
        self.require(0 < self.dt <= 1, "dt", "must be in (0, 1]")
        self.require(self.learned == "no" or self.dt < 1, "dt", "must be below 1 when it is learned")

    def _takes_other_width(self) -> bool:
        return True

    def _build(self, width: int, input_width: int) -> Update:
        return Damped(self, width)


@dataclass(frozen=True, kw_only=True)
class DecayConfig(UpdateConfig):
    """The block reads `exp(delta * a) * s + delta * (B e)`, `delta = softplus(dt_bias)`, `a = -exp(A_log)` per channel.

    A diagonal linear recurrence that cannot blow up: each factor of s is below 1 (Parcae, 2604.12946).

    Attributes:
        decay: start of `exp(delta * a)`, in (0, 1); A_log starts at 0 and B at the identity (orthogonal if D != E).
    """

    kind: ClassVar[str | None] = "update.decay"
    decay: float = math.sqrt(1 / 5)

    def __post_init__(self) -> None:
        """Check the range of the decay."""
        super().__post_init__()
        self.require(0 < self.decay < 1, "decay", "must be in (0, 1)")

    def _takes_other_width(self) -> bool:
        return True

    def _build(self, width: int, input_width: int) -> Update:
        return Decay(self, width, input_width)


@dataclass(frozen=True, kw_only=True)
class ChainConfig(UpdateConfig):
    """Several updates one after the other on each side of the block, such as an injection and a damped exit.

    Attributes:
        parts: the updates, in the order in which they are applied on both sides.
    """

    kind: ClassVar[str | None] = "update.chain"
    parts: tuple[UpdateConfig, ...]

    def _takes_other_width(self) -> bool:
        return True

    def _build(self, width: int, input_width: int) -> Update:
        return Chain([part.build(width, input_width) for part in self.parts])


class Add(Update):
    """See `AddConfig`."""

    def forward(self, state_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """`s + e`, all `[B, T, D]`."""
        return state_BTD + e_BTD


class Product(Update):
    """See `ProductConfig`."""

    def forward(self, state_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """`s * e`, all `[B, T, D]`."""
        return state_BTD * e_BTD


class Adapter(nn.Linear):
    """The map of `ConcatConfig`.

    Attributes:
        has_start: whether it starts as its config says, where owners draw the values of linear maps in their own way.
    """

    def __init__(self, config: ConcatConfig, width: int, input_width: int) -> None:
        self._start, self.has_start = config.init, config.init != "uniform"
        super().__init__(width + input_width, width, bias=config.bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start that the config says."""
        weight, width = self.weight, self.out_features
        if self._start == "uniform":
            super().reset_parameters()
            return
        if self._start == "normal":
            std = math.sqrt(2 / (5 * width))
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        else:
            weight.zero_()
            half = weight[:, :width] if self._start == "pass_state" else weight[:, width:]
            half.copy_(torch.eye(width))
        if self.bias is not None:
            self.bias.zero_()


class Concat(Update):
    """See `ConcatConfig`; parameter `adapter.weight` of shape `[D, D + E]`, its left half multiplies the state."""

    def __init__(self, config: ConcatConfig, width: int, input_width: int) -> None:
        super().__init__()
        self.adapter = Adapter(config, width, input_width)

    def forward(self, state_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """`W [s ; e]`: `[B, T, D]`, `[B, T, E]` -> `[B, T, D]`."""
        return self.adapter(torch.cat([state_BTD, e_BTD], dim=-1))


class Gated(Update):
    """See `GatedConfig`; parameters `gate.{weight,bias}` and, for a linear candidate, `candidate.weight`."""

    def __init__(self, config: GatedConfig, width: int, input_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width + input_width, width)
        nn.init.constant_(self.gate.bias, config.bias)
        linear = config.candidate == "linear"
        self.candidate = nn.Linear(input_width, width, bias=False) if linear else nn.Identity()

    def forward(self, state_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """`s + g * (c - s)`: `[B, T, D]`, `[B, T, E]` -> `[B, T, D]`."""
        gate_BTD = torch.sigmoid(self.gate(torch.cat([state_BTD, e_BTD], dim=-1)))
        return state_BTD + gate_BTD * (self.candidate(e_BTD) - state_BTD)


class Highway(Update):
    """See `HighwayConfig`; parameters `transform.{weight,bias}` and, when not coupled, `carry.{weight,bias}`."""

    def __init__(self, config: HighwayConfig, width: int, input_width: int) -> None:
        super().__init__()
        self.reads = config.reads
        num_read = sum(input_width if name == "input" else width for name in config.reads)
        self.transform = nn.Linear(num_read, width)
        self.carry = None if config.coupled else nn.Linear(num_read, width)
        nn.init.constant_(self.transform.bias, config.bias)
        if self.carry is not None:
            nn.init.constant_(self.carry.bias, -config.bias)

    def leave(self, before_BTD, after_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """`s * k + F * g`, state and block output `[B, T, D]`."""
        sources = {"state": before_BTD, "block": after_BTD, "input": e_BTD}
        read = torch.cat([sources[name] for name in self.reads], dim=-1)
        gate_BTD = torch.sigmoid(self.transform(read))
        carry_BTD = 1 - gate_BTD if self.carry is None else torch.sigmoid(self.carry(read))
        return before_BTD * carry_BTD + after_BTD * gate_BTD


class Damped(Update):
    """See `DampedConfig`; parameter `theta` (`[]` or `[D]`) when the step size is learned."""

    no_weight_decay = ("theta",)

    def __init__(self, config: DampedConfig, width: int) -> None:
        super().__init__()
        self.dt = config.dt
        if config.learned == "no":
            self.register_parameter("theta", None)
        else:
            shape = [] if config.learned == "scalar" else [width]
            self.theta = nn.Parameter(torch.full(shape, math.log(config.dt / (1 - config.dt))))

    def leave(self, before_BTD, after_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """`(1 - dt) * s + dt * F`, all `[B, T, D]`."""
        dt = self.dt if self.theta is None else torch.sigmoid(self.theta)
        return (1 - dt) * before_BTD + dt * after_BTD


class Decay(Update):
    """See `DecayConfig`; parameters `A_log` `[D]`, `dt_bias` `[D]`, `B` `[D, E]`."""

    no_weight_decay = ("A_log", "dt_bias", "B")

    def __init__(self, config: DecayConfig, width: int, input_width: int) -> None:
        super().__init__()
        delta = -math.log(config.decay)
        self.A_log = nn.Parameter(torch.zeros(width))
        self.dt_bias = nn.Parameter(torch.full([width], math.log(math.expm1(delta))))
        self.B = nn.Parameter(torch.eye(width, input_width))
        if width != input_width:
            nn.init.orthogonal_(self.B)

    def forward(self, state_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """`exp(delta * a) * s + delta * (B e)`: `[B, T, D]`, `[B, T, E]` -> `[B, T, D]`."""
        delta_D = F.softplus(self.dt_bias)
        return torch.exp(-delta_D * torch.exp(self.A_log)) * state_BTD + delta_D * F.linear(e_BTD, self.B)


class Chain(Update):
    """See `ChainConfig`; the parts are `parts.0`, `parts.1`, ..."""

    def __init__(self, parts: Sequence[Update]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.reads_iteration = any(part.reads_iteration for part in parts)

    def forward(self, state_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """Apply the entry side of every part in order."""
        for part in self.parts:
            state_BTD = part(state_BTD, e_BTD, iteration=iteration, num_iterations=num_iterations, time=time)
        return state_BTD

    def leave(self, before_BTD, after_BTD, e_BTD, *, iteration, num_iterations, time=None) -> torch.Tensor:
        """Apply the exit side of every part in order; each sees the state before the iteration as `before_BTD`."""
        for part in self.parts:
            assert isinstance(part, Update)
            where = {"iteration": iteration, "num_iterations": num_iterations, "time": time}
            after_BTD = part.leave(before_BTD, after_BTD, e_BTD, **where)
        return after_BTD

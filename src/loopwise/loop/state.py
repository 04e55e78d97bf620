"""Where the state of a loop starts.

Shapes: B batch rows, T tokens, D width. `e_BTD` is the injected tensor (the output of the prelude).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from loopwise.loop.config import Component


@dataclass(frozen=True, kw_only=True)
class StateInit(Component):
    """Base of the choices for the first state."""


@dataclass(frozen=True, kw_only=True)
class InputState(StateInit):
    """The injected tensor itself: loops without a state of their own (Universal Transformer, Ouro, 2510.25741)."""

    kind: ClassVar[str | None] = "state.input"


@dataclass(frozen=True, kw_only=True)
class ZerosState(StateInit):
    """Zeros (Yang et al., 2311.12424)."""

    kind: ClassVar[str | None] = "state.zeros"


@dataclass(frozen=True, kw_only=True)
class OnesState(StateInit):
    """Ones: the neutral start of the product update (Yang et al., 2311.12424)."""

    kind: ClassVar[str | None] = "state.ones"


@dataclass(frozen=True, kw_only=True)
class NormalState(StateInit):
    """A fresh normal draw, cut at 3 standard deviations and then scaled: `scale * truncnormal(0, std)`.

    The cut makes the realised deviation `0.9866 * std * scale`.

    Attributes:
        std: deviation before the cut and the scale, above 0.
        scale: what the draw is multiplied by, at least 0; 0 gives zeros and draws nothing.
    """

    kind: ClassVar[str | None] = "state.normal"
    std: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.std > 0, "std", "must be above 0; use scale=0 or state.zeros for zeros")
        self.require(self.scale >= 0, "scale", "must be at least 0")

    @classmethod
    def like_init(cls, width: int, *, embedding_scale: float = 1.0) -> NormalState:
        """The draw of Huginn (2502.05171) and Parcae (2604.12946): std `sqrt(2 / (5 D))`, times the embedding scale.

        Huginn multiplies its embeddings by `sqrt(D)` and the state likewise, about 0.63 in all; Parcae by 1.

        Args:
            width: D.
            embedding_scale: what the model multiplies its embeddings by.
        """
        return cls(std=math.sqrt(2 / (5 * width)), scale=embedding_scale)


@dataclass(frozen=True, kw_only=True)
class GivenState(StateInit):
    """A tensor that comes with every call, such as a learned start vector (HRM, 2506.21734) or a carried state."""

    kind: ClassVar[str | None] = "state.given"


@dataclass(frozen=True, kw_only=True)
class RowSeeds:
    """Seeds of random first states in training: a row's state is a function of (seed, step, row) and of its loop alone.

    It does not depend on the micro-batch or the rank that the row is in, and drawing it again gives it again.

    Attributes:
        seed: of the run.
        step: index of the optimizer step.
        rows: numbers of the rows in the batch of the step.
        place: what further tells draws of the same step apart.
    """

    seed: int
    step: int
    rows: tuple[int, ...]
    place: str = ""

    def at(self, place: Any, index: torch.Tensor | None = None) -> RowSeeds:
        """The seeds of the rows at an index, int64 `[b]` (None: all), for draws at another place."""
        rows = self.rows if index is None else tuple(self.rows[row] for row in index.tolist())
        return replace(self, rows=rows, place=str(place))

    def common(self) -> torch.Generator:
        """One generator for draws that rows share."""
        return self._generator(self.rows[0], torch.device("cpu"))

    def draw(self, config: NormalState, e_BTD: torch.Tensor) -> torch.Tensor:
        """The first state of `config` for every row of `e_BTD`, in its shape, dtype and device.

        Raises:
            ValueError: there are more or fewer rows than seeds.
        """
        if len(self.rows) != len(e_BTD):
            raise ValueError(f"state.normal: seeds of {len(self.rows)} rows for a batch of {len(e_BTD)}")
        generators = [self._generator(row, e_BTD.device) for row in self.rows]
        return torch.stack([_draw(config, e_TD, own) for e_TD, own in zip(e_BTD, generators, strict=True)])

    def _generator(self, row: int, device: torch.device) -> torch.Generator:
        text = f"{self.seed}:{self.step}:{row}:{self.place}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        # manual_seed takes a signed 64-bit number
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def make(
    config: StateInit,
    e_BTD: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    generator: torch.Generator | RowSeeds | None = None,
) -> torch.Tensor:
    """The state before the first iteration.

    Args:
        config: where it starts.
        e_BTD: the injected tensor, floating `[B, T, D]`; gives shape, dtype and device.
        initial_state: used in place of the config's own start whatever the config is; any shape that broadcasts to
            that of `e_BTD` (`[D]`, `[T, D]`, `[B, T, D]`), cast to its dtype and device. Gradients flow into it.
        generator: source of the random draw. The draw is made in float32 on the generator's device and then cast, so
            that it does not depend on where and in which dtype the model runs. `RowSeeds` draw on
            the device of the model.

    Returns:
        The state, same shape, dtype and device as `e_BTD`.

    Raises:
        ValueError: `initial_state` is missing for `state.given` or does not fit; a draw has no generator.
    """
    if initial_state is not None:
        return _given(initial_state, e_BTD)
    match config:
        case InputState():
            return e_BTD
        case ZerosState() | NormalState(scale=0):
            return torch.zeros_like(e_BTD)
        case OnesState():
            return torch.ones_like(e_BTD)
        case NormalState():
            return _draw(config, e_BTD, generator)
        case GivenState():
            raise ValueError("state.given: initial_state is missing; pass a tensor with every call")
    raise ValueError(f"{type(config).__name__} is not a state init; choose a component of the axis 'state'")


def _given(initial_state: torch.Tensor, e_BTD: torch.Tensor) -> torch.Tensor:
    try:
        # one-sided: the state may grow to the shape of the input, never the other way round
        return initial_state.to(e_BTD).expand(e_BTD.shape)
    except RuntimeError:
        given, wanted = tuple(initial_state.shape), tuple(e_BTD.shape)
        raise ValueError(f"initial_state has shape {given}, which does not broadcast to {wanted}") from None


def _draw(config: NormalState, e_BTD: torch.Tensor, generator: torch.Generator | RowSeeds | None) -> torch.Tensor:
    if generator is None:
        raise ValueError("state.normal: generator is None; pass a torch.Generator, or set scale=0 to start from zeros")
    if isinstance(generator, RowSeeds):
        return generator.draw(config, e_BTD)
    draw_BTD = torch.empty(e_BTD.shape, dtype=torch.float32, device=generator.device)
    limit = 3 * config.std
    torch.nn.init.trunc_normal_(draw_BTD, std=config.std, a=-limit, b=limit, generator=generator)
    return (draw_BTD * config.scale).to(e_BTD)

"""The operators of growth: each turns a model's plan into the plan and the layers of a deeper model.

L is the number of layers of the old model. Layers and visits count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from loopwise.edit.maps import DepthEdit, NewLayer
from loopwise.loop.config import Component
from loopwise.plan import Loop, Plan, Span, algebra


@dataclass(frozen=True, kw_only=True)
class Operator(Component):
    """Base of everything that changes a model: operators of depth here and in `surgery`, of width in `width`."""

    kind: ClassVar[str | None] = None

    def text(self) -> str:
        """The operator as `text.parse` reads it."""
        given = [(item, getattr(self, item.name)) for item in fields(self)]
        shown = [f"{item.name}={_shown(value)}" for item, value in given if value != item.default]
        return f"{(self.kind or '').removeprefix('edit.')}({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True)
class DepthOperator(Operator):
    """Base of the operators of depth."""

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """What becomes of a model of so many layers under a plan.

        Raises:
            ValueError: a depth that the operator does not divide, layers that do not exist, or a plan with loops where
                the operator needs none.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Stack(DepthOperator):
    """All layers g times, one copy of the stack on top of the other (G_stack, 2405.15319).

    Attributes:
        g: growth factor, at least 2.
    """

    kind: ClassVar[str | None] = "edit.stack"
    g: int = 2

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.g >= 2, "g", "must be at least 2")

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`(0-(L-1))xg`."""
        return copies(self, plan, num_layers, Plan((Loop((Span(0, num_layers - 1),), self.g),)))


@dataclass(frozen=True, kw_only=True)
class Double(DepthOperator):
    """All layers twice (progressive stacking, Gong et al. 2019): `stack(2)`."""

    kind: ClassVar[str | None] = "edit.double"

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`(0-(L-1))x2`."""
        return copies(self, plan, num_layers, Plan((Loop((Span(0, num_layers - 1),), 2),)))


@dataclass(frozen=True, kw_only=True)
class Interleave(DepthOperator):
    """Every layer several times in a row: 0 0 1 1 2 2 (interpolation).

    Attributes:
        times: how often, at least 2.
    """

    kind: ClassVar[str | None] = "edit.interleave"
    times: int = 2

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.times >= 2, "times", "must be at least 2")

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`(0)xtimes (1)xtimes ...`."""
        loops = tuple(Loop((Span(layer, layer),), self.times) for layer in range(num_layers))
        return copies(self, plan, num_layers, Plan(loops))


@dataclass(frozen=True, kw_only=True)
class BlockOperator(DepthOperator):
    """Base of the operators that add one block of layers.

    Attributes:
        b: layers of a block, at least 1.
    """

    b: int

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.b >= 1, "b", "must be at least 1")

    def num_blocks(self, num_layers: int) -> int:
        """How many blocks the old model has; ValueError unless b divides L."""
        require_divisor(self, "b", self.b, num_layers)
        return num_layers // self.b

    def twice(self, plan: Plan, num_layers: int, start: int) -> DepthEdit:
        """The layers from `start` on, b of them, run twice."""
        return copies(self, plan, num_layers, algebra.repeat(Plan.identity(num_layers), start, start + self.b, 2))


@dataclass(frozen=True, kw_only=True)
class GradStack(BlockOperator):
    """A copy of the last b layers on top (gradual stacking, Reddi et al. 2023)."""

    kind: ClassVar[str | None] = "edit.grad_stack"

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`0..L-1, L-b..L-1`."""
        self.num_blocks(num_layers)
        return self.twice(plan, num_layers, num_layers - self.b)


@dataclass(frozen=True, kw_only=True)
class Midas(BlockOperator):
    """A copy of the middle block beside it (2409.19044): block m = ceil(n/2) - 1 of n."""

    kind: ClassVar[str | None] = "edit.midas"

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`0..(m+1)b-1, mb..L-1`."""
        num_blocks = self.num_blocks(num_layers)
        return self.twice(plan, num_layers, ((num_blocks + 1) // 2 - 1) * self.b)


@dataclass(frozen=True, kw_only=True)
class Lidas(BlockOperator):
    """A copy of the exact middle b layers (2512.08819), inserted at the middle of the stack.

    With two blocks the new one is the second half of the first and the first half of the second. For an odd number of
    blocks the copied layers are those of the middle block; the source does not say where they go in, here it is the
    middle of that block.
    """

    kind: ClassVar[str | None] = "edit.lidas"

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`0..h-1, h-b/2..h+b/2-1, h..L-1` with h = L / 2."""
        self.num_blocks(num_layers)
        self.require((num_layers - self.b) % 2 == 0, "b", f"layers have no exact middle among {num_layers}")
        start = (num_layers - self.b) // 2
        middle = start + self.b // 2
        order = [*range(middle), *range(start, start + self.b), *range(middle, num_layers)]
        return copies(self, plan, num_layers, Plan.from_layers(order))


@dataclass(frozen=True, kw_only=True)
class Solar(DepthOperator):
    """Two copies of the stack, the first without its last m layers, the second without its first m (2312.15166).

    Attributes:
        m: layers left out on each side of the seam, at least 0.
    """

    kind: ClassVar[str | None] = "edit.solar"
    m: int

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.m >= 0, "m", "must be at least 0")

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`0..L-m-1, m..L-1`."""
        self.require(self.m < num_layers, "m", f"leaves nothing of {num_layers} layers")
        order = Plan.from_layers([*range(num_layers - self.m), *range(self.m, num_layers)])
        return copies(self, plan, num_layers, order)


@dataclass(frozen=True, kw_only=True)
class LlamaPro(DepthOperator):
    """After every group of layers a copy of its last one, whose branches start at zero (LLaMA-Pro, 2401.02415).

    Attributes:
        every: layers of a group; L is a multiple.
    """

    kind: ClassVar[str | None] = "edit.llama_pro"
    every: int

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.every >= 1, "every", "must be at least 1")

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`0..M-1, zero M-1, M..2M-1, zero 2M-1, ...`."""
        require_divisor(self, "every", self.every, num_layers)
        layers: list[NewLayer] = []
        for layer in range(num_layers):
            layers.append(NewLayer(sources=(layer,)))
            if (layer + 1) % self.every == 0:
                layers.append(NewLayer(sources=(layer,), zero=True))
        return rearranged(self, plan, num_layers, Plan.identity(len(layers)), layers)


def copies_of(layers: Sequence[int]) -> tuple[NewLayer, ...]:
    """Plain copies of these old layers."""
    return tuple(NewLayer(sources=(layer,)) for layer in layers)


def same(num_layers: int) -> tuple[NewLayer, ...]:
    """Every old layer, as it is."""
    return copies_of(range(num_layers))


def copies(operator: DepthOperator, before: Plan, num_layers: int, plan: Plan) -> DepthEdit:
    """The old layers as they are, under another plan."""
    return rearranged(operator, before, num_layers, plan, same(num_layers))


def rearranged(
    operator: DepthOperator, before: Plan, num_layers: int, plan: Plan, layers: Sequence[NewLayer]
) -> DepthEdit:
    """New layers under a new plan, from a model that visits every layer once and in order.

    Raises:
        ValueError: its plan is another one.
    """
    if before.layers != tuple(range(num_layers)):
        raise ValueError(
            f"{operator.text()} needs every layer visited once and in order, the plan is {before}: untie() it first"
        )
    return DepthEdit(before=before, num_layers=num_layers, plan=plan, layers=tuple(layers))


def require_divisor(operator: DepthOperator, field: str, value: int, num_layers: int) -> None:
    """ValueError unless the value divides the number of layers."""
    rule = f"does not divide {num_layers} layers: use a divisor"
    operator.require(num_layers % value == 0, field, rule)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f'"{value}"' if isinstance(value, str) and not value.isidentifier() else str(value)

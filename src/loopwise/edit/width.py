"""The operators of width: more channels, MLP units, heads or experts, with the function kept (Net2Net, 1511.05641).

Units are copied, and what reads them is split among the copies. Nothing here loads torch; the work is done by
`widening` and `upcycling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from loopwise.edit.operators import Operator

if TYPE_CHECKING:
    from torch import nn

    from loopwise.edit.expand import WidthEdit

Split = Literal["unequal", "even"]


@dataclass(frozen=True, kw_only=True)
class WidthOperator(Operator):
    """Base of the operators of width."""

    def edit(self, model: nn.Module) -> WidthEdit:
        """The wider model, and where each of its tensors comes from; `model` is not changed.

        Raises:
            ValueError: the model cannot be widened so, with the reason in one line.
        """
        raise NotImplementedError

    def apply(self, model: nn.Module) -> nn.Module:
        """The wider model alone."""
        return self.edit(model).model

    def require_sizes(self, *names: str) -> None:
        """ValueError for a size below 1."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value >= 1, name, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Widen(WidthOperator):
    """Larger sizes of the same architecture; None keeps a size.

    Attributes:
        hidden: D. A whole multiple has copies of all channels. Any other size also has new channels, on which nothing
            is written at first and which new random weights read (as LEMON, 2310.07999, in turn). The size of a head
            stays what it is; types that derive it from D take whole multiples, and heads grow along.
        mlp: units of the MLPs, any size above the old one. In Mixtral's type those of the experts.
        expert_mlp: units of the experts, in types that count them apart.
        heads: query heads. Needs room for every old head in the groups that copy its group.
        kv_heads: heads of keys and values. New ones copy old ones with their query heads.
        split: what the copies of a unit contribute: "unequal" shares, so that they part in training, or "even" ones,
            with which they stay alike for ever unless something else tells them apart.
        seed: of the units that are copied, their shares, and new random numbers.
    """

    kind: ClassVar[str | None] = "edit.widen"
    hidden: int | None = None
    mlp: int | None = None
    expert_mlp: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    split: Split = "unequal"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        super().__post_init__()
        self.require_sizes(*self.sizes_named())
        if not self.sizes():
            raise ValueError(f"edit.widen: give at least one of {', '.join(self.sizes_named())}")

    @staticmethod
    def sizes_named() -> tuple[str, ...]:
        """The fields that are sizes."""
        return "hidden", "mlp", "expert_mlp", "heads", "kv_heads"

    def sizes(self) -> dict[str, int]:
        """The sizes that are given."""
        return {name: getattr(self, name) for name in self.sizes_named() if getattr(self, name) is not None}

    def edit(self, model: nn.Module) -> WidthEdit:
        """See the base class."""
        from loopwise.edit.widening import widen_edit

        return widen_edit(model, self)


@dataclass(frozen=True, kw_only=True)
class Upcycle(WidthOperator):
    """Experts: a dense MLP becomes several copies behind a router (sparse upcycling, 2212.05055), or experts multiply.

    From a dense model (Llama and Mistral to Mixtral's type, Qwen3 to Qwen3-MoE's) every expert is the old MLP, and the
    chosen ones weigh 1 together, so that the function stays whatever the router says. In a model that has experts
    already each is copied as often, its copies are chosen together, and `top_k` grows by the same factor.

    Attributes:
        experts: how many; for a model with experts a multiple.
        top_k: how many a token visits, default 2; for a model with experts it follows from the old number.
        router: "random" small weights, so that tokens spread over the experts of a dense model and these part, or
            "zero": all tokens then go to the same experts, and the others have no gradient at first.
        split: as in `Widen`, for a model with experts.
        seed: of the router, and of the shares.
    """

    kind: ClassVar[str | None] = "edit.upcycle"
    experts: int
    top_k: int | None = None
    router: Literal["random", "zero"] = "random"
    split: Split = "unequal"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require_sizes("experts", "top_k")
        self.require(self.experts >= 2, "experts", "must be at least 2")
        self.require(self.top_k is None or self.top_k <= self.experts, "top_k", f"is above experts={self.experts}")

    def edit(self, model: nn.Module) -> WidthEdit:
        """See the base class."""
        from loopwise.edit.upcycling import upcycle_edit

        return upcycle_edit(model, self)

"""Terms that are added to the loss of a run: configs, and what they are built into for a model.

Shapes: N scored positions, V vocabulary.
"""

# ruff: noqa: N815 -- shape suffixes in the names of fields

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loopwise.loop.config import Component
from loopwise.train.batch import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What a term may read.

    Attributes:
        batch: the (micro-)batch.
        logits_NV: of the last iteration where a target is scored, `[N, V]`; None for points.
        num_items: predictions in the whole step; sums over positions are divided by it.
        seed, step, first_row: see `compute_loss`.
    """

    batch: Batch
    logits_NV: torch.Tensor | None
    num_items: float
    seed: int = 0
    step: int = 0
    first_row: int = 0

    @property
    def share(self) -> float:
        """Which part of the step's predictions are in this batch: what terms that sum over no positions are times."""
        return self.batch.num_items / self.num_items if self.num_items else 0.0

    def mean(self, values_N: torch.Tensor) -> torch.Tensor:
        """The part of this batch in the mean over the step of values `[N]`, a scalar."""
        return values_N.sum() / (self.num_items or 1)


@dataclass(frozen=True, kw_only=True)
class LossTerm(Component):
    """Base of what is added to a loss.

    Attributes:
        weight: what the term is multiplied by, at least 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.weight >= 0, "weight", "must be at least 0")

    def build(self, model: Any) -> Callable[[Seen], torch.Tensor]:
        """The term for a model: a function of what a forward left behind, a scalar with its weight.

        Raises:
            ValueError: the model has no such thing.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """A term that is built for a model."""

    name: str
    value: Callable[[Seen], torch.Tensor]


def build_terms(model: Any, terms: Sequence[LossTerm | Term]) -> list[Term]:
    """Terms by name, the choice on their axis ("cosine_tie"); built ones are taken as they are.

    Raises:
        ValueError: a term does not fit the model, or two have one name.
    """
    built = []
    for term in terms:
        if not isinstance(term, Term):
            term = Term(name=(term.kind or "").split(".")[-1], value=term.build(model))
        built.append(term)
    names = [term.name for term in built]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"terms: loss.{twice} is given twice; leave one out")
    return built


@dataclass(frozen=True, kw_only=True)
class ZLoss(LossTerm):
    """`weight * mean(log(sum(exp(logits)))^2)`: keeps the normaliser of the softmax near 1 (PaLM, 2204.02311)."""

    kind: ClassVar[str | None] = "loss.z"
    weight: float = 1e-4

    def build(self, model: Any) -> Callable[[Seen], torch.Tensor]:
        """See `LossTerm.build`."""

        def value(seen: Seen) -> torch.Tensor:
            return self.weight * seen.mean(logits_of(seen, self).float().logsumexp(-1).square())

        return value


def logits_of(seen: Seen, term: LossTerm) -> torch.Tensor:
    """The logits `[N, V]` that a term reads.

    Raises:
        ValueError: the batch holds points, which have none.
    """
    if seen.logits_NV is None:
        raise ValueError(f"{term.kind} reads logits, a model of points has none: leave the term out")
    return seen.logits_NV

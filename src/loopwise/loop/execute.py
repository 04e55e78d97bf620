"""The executor: play a list of visits over a state.

Shapes: B batch rows, T tokens, D width, b selected rows, t selected tokens.

Everything that makes a method differ from another attaches to the boundary between two visits, as a `Hook`: it may
narrow a visit to some rows or tokens, skip it, switch its gradient off, or change the state after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from loopwise.plan.nodes import Slot


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One run of one layer over (a part of) the token grid.

    Attributes:
        slot: where in the plan this visit happens; its layer is `slot.layer`.
        rows: int64 tensor `[b]` of batch rows that take part, or None for all.
        positions: int64 tensor of token indices that take part, `[t]` (the same for every row) or `[b, t]` (per row,
            ascending), or None for all. Tokens left out are neither queries nor keys: they keep their state.
        with_grad: False runs the visit without recording a gradient.
        parts: where rows differ in how many of their tokens take part: visits of the same slot on disjoint rows, run
            one after another in the place of this one, possibly none. None runs the visit as it is.
    """

    slot: Slot
    rows: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    with_grad: bool = True
    parts: tuple[Visit, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse a divided visit that is narrowed besides."""
        if self.parts is not None and (self.rows is not None or self.positions is not None):
            raise ValueError(
                "a visit that is divided into parts has no rows and positions of its own: narrow its parts"
            )

    @property
    def is_partial(self) -> bool:
        """True when the visit leaves some rows or tokens out."""
        return self.rows is not None or self.positions is not None or self.parts is not None


class Hook(Protocol):
    """What may happen at a visit boundary."""

    def before(self, visit: Visit, state_BTD: torch.Tensor) -> Visit | None:
        """Return the visit to run (narrowed, or as it is), or None to skip it."""
        ...

    def after(self, visit: Visit, before_BTD: torch.Tensor, state_BTD: torch.Tensor) -> torch.Tensor:
        """Return the state that goes on, from the states before and after the visit."""
        ...


Run = Callable[[Visit, torch.Tensor], torch.Tensor]


def execute(state_BTD: torch.Tensor, visits: Iterable[Visit], run: Run, hooks: Sequence[Hook] = ()) -> torch.Tensor:
    """Play visits in order and return the last state.

    `state <- scatter(state, run(visit, gather(state, visit)), visit)` for every visit.

    Args:
        state_BTD: the state before the first visit, floating, `[B, T, D]`.
        visits: the visits in order.
        run: runs one layer: (visit, the selected part `[b, t, D]`) -> its new value, same shape.
        hooks: called around every visit in the given order.

    Returns:
        The state after the last visit, `[B, T, D]`.
    """
    for planned in visits:
        visit: Visit | None = planned
        for hook in hooks:
            visit = visit and hook.before(visit, state_BTD)
        if visit is None:
            continue
        before_BTD = state_BTD
        for part in (visit,) if visit.parts is None else visit.parts:
            # Taken and put back with the gradient: what is left out keeps it, and so does what is to re-enter a loop.
            part_btD = gather(state_BTD, part) if part.is_partial else state_BTD
            with nullcontext() if visit.with_grad else torch.no_grad():
                part_btD = run(part, part_btD)
            state_BTD = scatter(state_BTD, part_btD, part) if part.is_partial else part_btD
        for hook in hooks:
            state_BTD = hook.after(visit, before_BTD, state_BTD)
    return state_BTD


def gather(state_BTD: torch.Tensor, visit: Visit) -> torch.Tensor:
    """The part of a state that a visit works on: `[B, T, D]` -> `[b, t, D]`."""
    part = state_BTD if visit.rows is None else state_BTD[visit.rows]
    return take(part, 1, visit.positions)


def scatter(state_BTD: torch.Tensor, part_btD: torch.Tensor, visit: Visit) -> torch.Tensor:
    """A copy of a state with the visited part replaced (no in-place change: autograd and FSDP rely on it)."""
    num_rows, num_tokens = state_BTD.shape[:2]
    rows = torch.arange(num_rows, device=state_BTD.device) if visit.rows is None else visit.rows
    columns = torch.arange(num_tokens, device=state_BTD.device) if visit.positions is None else visit.positions
    if columns.ndim == 1:
        columns = columns.expand(len(rows), -1)
    return state_BTD.index_put((rows[:, None], columns), part_btD.to(state_BTD.dtype))


def take(tensor: torch.Tensor, axis: int, index: torch.Tensor | None) -> torch.Tensor:
    """Select along an axis by an index `[t]`, or by a per-row index `[b, t]` when axis 0 is the batch.

    A batch axis of size 1 is broadcast to the `b` rows of a per-row index.
    """
    if index is None:
        return tensor
    if index.ndim == 1:
        return tensor.index_select(axis, index)
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = index.shape
    full = [*tensor.shape]
    full[0], full[axis] = index.shape
    return tensor.expand(index.shape[0], *tensor.shape[1:]).gather(axis, index.view(shape).expand(full))

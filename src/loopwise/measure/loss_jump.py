"""What an edit does to the loss: before and after on the same tokens.

Legend: B rows of a batch, T tokens, V vocabulary, R rows in all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

from loopwise.measure.arrays import as_lists
from loopwise.measure.influence import Batch, call, read_batches
from loopwise.models.attach import eval_mode


@dataclass(frozen=True, kw_only=True, eq=False)
class RowLosses:
    """Losses of R rows.

    Attributes:
        sums: float64 `[R]`, summed negative log likelihood in nats.
        counts: int64 `[R]`, predicted tokens.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token over all rows."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True, kw_only=True)
class LossJump:
    """The loss before and after an edit, in nats per token.

    Attributes:
        before, after: means over all tokens.
        standard_error: of `jump`, from the differences of whole rows; NaN for a single row.
        rows, tokens: what was scored.
    """

    before: float
    after: float
    standard_error: float
    rows: int
    tokens: int

    @property
    def jump(self) -> float:
        """`after - before`."""
        return self.after - self.before

    @property
    def is_above_noise(self) -> bool:
        """Whether the loss is higher by more than two standard errors; for a single row, higher at all."""
        return self.jump > (0 if math.isnan(self.standard_error) else 2 * self.standard_error)

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" +- {self.standard_error:.3f}"
        return f"{self.before:.3f} -> {self.after:.3f} nats per token ({self.jump:+.3f}{error})"

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        values = {name: as_lists(getattr(self, name)) for name in ("before", "after", "jump", "standard_error")}
        return values | {"rows": self.rows, "tokens": self.tokens}


def row_losses(model: nn.Module, batches: Iterable[Batch]) -> RowLosses:
    """The loss of every row, in eval mode without gradient; float32 per token, summed in float64.

    Args:
        model: a causal language model: logits at position t predict token t + 1.
        batches: as in `influence`; predictions of and from padding do not count.

    Raises:
        ValueError: no batches, or a row with fewer than two tokens.
    """
    sums, counts = [], []
    with eval_mode(model):
        for ids_BT, mask_BT in read_batches(model, batches):
            counted_BT = (mask_BT[:, 1:] * mask_BT[:, :-1]).bool()
            if not counted_BT.any(1).all():
                raise ValueError("a row has fewer than two tokens, so none can be predicted: leave it out")
            logits_BTV = call(model, ids_BT, mask_BT).logits[:, :-1]
            loss_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), ids_BT[:, 1:], reduction="none").cpu()
            sums.append(loss_BT.double().where(counted_BT.cpu(), 0).sum(1).numpy())
            counts.append(counted_BT.sum(1).cpu().numpy())
    if not sums:
        raise ValueError("there is no batch to score: give at least one row of tokens")
    return RowLosses(sums=np.concatenate(sums), counts=np.concatenate(counts))


def loss_jump(before: nn.Module | RowLosses, after: nn.Module | RowLosses, batches: Iterable[Batch] = ()) -> LossJump:
    """What an edit does to the loss, paired: both sides score the same rows.

    The error is that of a ratio of sums over rows: tokens of one row are not independent.

    Args:
        before: the model, or its `row_losses` where the edit changes the model in place (a plan, for one).
        after: the edited one.
        batches: what the models score; not read where both sides are losses.

    Raises:
        ValueError: the same model twice, or rows that are not the same.
    """
    if before is after:
        raise ValueError("before and after are the same model: take row_losses(model, batches) before the edit")
    batches = list(batches)
    old, new = (side if isinstance(side, RowLosses) else row_losses(side, batches) for side in (before, after))
    if not np.array_equal(old.counts, new.counts):
        raise ValueError("before and after have not scored the same rows")
    difference, tokens, rows = new.sums - old.sums, int(old.counts.sum()), len(old.counts)
    left = difference - difference.sum() / tokens * old.counts
    error = math.sqrt(rows / (rows - 1) * float((left**2).sum())) / tokens if rows > 1 else math.nan
    return LossJump(before=old.mean, after=new.mean, standard_error=error, rows=rows, tokens=tokens)

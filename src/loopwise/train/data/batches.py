"""Rows out of batches, and batches out of batches.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from loopwise.train.batch import IGNORE, Batch, Points

_TENSORS = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")


def take(batch: Batch, index: torch.Tensor) -> Batch:
    """The rows of that index, int64 `[number of rows]`, in its order."""
    picked: dict[str, Any] = {name: value[index] for name in _TENSORS if (value := getattr(batch, name)) is not None}
    if batch.points is not None:
        picked["points"] = Points(xs_BNI=batch.points.xs_BNI[index], ys_BN=batch.points.ys_BN[index])
    return replace(batch, **picked, keys={name: key[index] for name, key in batch.keys.items()})


def join(batches: Sequence[Batch], *, length: int | None = None, pad: int = 0) -> Batch:
    """Batches one after the other.

    Shorter rows are filled up on the right, where nothing is scored; filling is a document of its own where documents
    are numbered. A key that a batch lacks is -1 there. Positions and segments are written out if one batch has them.

    Args:
        batches: at least one, all of tokens or all of points of one shape.
        length: tokens that rows get, at least those of the longest; None is the longest.
        pad: token that fills up.
    """
    if batches[0].points is not None:
        points = [batch.points for batch in batches if batch.points is not None]
        return Batch(
            points=Points(
                xs_BNI=torch.cat([one.xs_BNI for one in points]), ys_BN=torch.cat([one.ys_BN for one in points])
            ),
            keys=_joined_keys(batches),
        )
    length = max(length or 0, *(_tokens(batch).shape[1] for batch in batches))
    values: dict[str, Any] = {
        "tokens_BT": torch.cat([_filled(_tokens(batch), length, pad) for batch in batches]),
        "targets_BT": torch.cat([_filled(batch.targets_BT, length, IGNORE) for batch in batches]),
    }
    if any(batch.positions_BT is not None for batch in batches):
        values["positions_BT"] = torch.cat([_positions(batch, length) for batch in batches])
    if any(batch.segments_BT is not None for batch in batches):
        values["segments_BT"] = torch.cat([_segments(batch, length) for batch in batches])
    return Batch(**values, keys=_joined_keys(batches))


def _tokens(batch: Batch) -> torch.Tensor:
    assert batch.tokens_BT is not None, "tokens and points do not join"
    return batch.tokens_BT


def _filled(value_BT: torch.Tensor | None, length: int, fill: int) -> torch.Tensor:
    assert value_BT is not None
    return F.pad(value_BT, (0, length - value_BT.shape[1]), value=fill)


def _positions(batch: Batch, length: int) -> torch.Tensor:
    tokens_BT = _tokens(batch)
    known_BT = batch.positions_BT
    if known_BT is None:
        known_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    more_BT = torch.arange(length - tokens_BT.shape[1]).expand(len(tokens_BT), -1)
    return torch.cat([known_BT, more_BT], dim=1)


def _segments(batch: Batch, length: int) -> torch.Tensor:
    tokens_BT = _tokens(batch)
    known_BT = torch.zeros_like(tokens_BT) if batch.segments_BT is None else batch.segments_BT
    more_BT = (known_BT.amax(dim=1, keepdim=True) + 1).expand(-1, length - tokens_BT.shape[1])
    return torch.cat([known_BT, more_BT], dim=1)


def _joined_keys(batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(name for batch in batches for name in batch.keys)
    return {
        name: torch.cat([batch.keys.get(name, torch.full((batch.num_rows,), -1)) for batch in batches])
        for name in names
    }

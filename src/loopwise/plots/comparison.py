"""The picture of a comparison: what methods reach for what they spend, and where one overtakes another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopwise.plots.curves import Curve, Panel, draw_panels

_LABELS = {"loss": "held-out loss", "accuracy": "held-out exact accuracy"}


def comparison_picture(comparison: Mapping[str, Any], path: str | Path) -> Path:
    """Draw loss and, where rows are scored as right or wrong, accuracy against training FLOPs.

    Lines are means over seeds, bands go from the lowest to the highest seed; crossings carry the number that they have
    in the table.

    Args:
        comparison: as `loopwise.study.compare` writes it: "arms" with "name" and "curves", and "crossings".
        path: PNG to write.

    Raises:
        ValueError: no arm has a curve.
    """
    title = f"equal {comparison['equal']}, {_many(len(comparison['seeds']), 'seed')}"
    return draw_panels(comparison_panels(comparison), path, title=title)


def comparison_panels(comparison: Mapping[str, Any]) -> list[Panel]:
    """The panels of `comparison_picture`."""
    panels = []
    for metric, label in _LABELS.items():
        curves = [
            Curve(label=arm["name"], x=curve["flops"], y=curve["mean"], low=curve["low"], high=curve["high"])
            for arm in comparison["arms"]
            if (curve := arm["curves"].get(metric))
        ]
        if not curves:
            continue
        marks = [
            (crossing["flops"], crossing["value"], str(number))
            for number, crossing in enumerate(comparison["crossings"], start=1)
            if crossing["metric"] == metric
        ]
        panels.append(Panel(curves=curves, x_label="training FLOPs", y_label=label, log_x=True, marks=marks))
    if not panels:
        raise ValueError("there is no curve to draw: every run of every method has diverged")
    return panels


def crossings(
    one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], noise: float = 0.0
) -> list[tuple[float, float, bool]]:
    """Where two curves, straight between their points, change places, over the x that both have.

    Args:
        one: (x, y) of the first curve, x ascending.
        other: of the second.
        noise: a stretch between two crossings in which the curves never differ by more is no change of places.

    Returns:
        x, y and whether the first curve lies above the other from there on, in order.
    """
    import numpy as np

    (x_one, y_one), (x_other, y_other) = (np.array(curve, float).T for curve in (one, other))
    grid = np.unique(np.concatenate([x_one, x_other]))
    grid = grid[(grid >= max(x_one[0], x_other[0])) & (grid <= min(x_one[-1], x_other[-1]))]
    if len(grid) < 2:
        return []
    first, second = np.interp(grid, x_one, y_one), np.interp(grid, x_other, y_other)
    gap = first - second
    found, leader = [], 0
    for index in range(len(grid)):
        if abs(gap[index]) <= noise:
            continue
        sign = 1 if gap[index] > 0 else -1
        if leader == -sign:
            found.append((*_zero(grid, gap, first, last=index), sign > 0))
        leader = sign
    return found


def _zero(grid: Any, gap: Any, values: Any, *, last: int) -> tuple[float, float]:
    """The zero of the gap that is nearest before the point `last`."""
    index = last
    while gap[index - 1] * gap[last] > 0:
        index -= 1
    share = gap[index - 1] / (gap[index - 1] - gap[index])
    x = grid[index - 1] + share * (grid[index] - grid[index - 1])
    return float(x), float(values[index - 1] + share * (values[index] - values[index - 1]))


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

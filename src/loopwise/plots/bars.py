"""Scores of several plans side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopwise.plots.picture import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST, OTHERS, FAINT = "#555555", "#0072B2", "#666666"
# Above this ratio of the largest to the smallest value the small bars could no longer be compared on a linear axis.
LOG_FROM = 12.0
MAX_LABEL = 46
PLOT_INCHES, ROW_INCHES, COLUMN_INCHES = 4.6, 0.52, 0.75

Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def score_bars(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw perplexities as horizontal bars in a PNG, with what each plan costs beside them.

    Args:
        rows: one mapping per plan, drawn from top to bottom, the first as the one to compare with. `label` (text) and
            `perplexity` (positive; infinity and NaN are drawn as such) are needed; `plan` (text), `num_slots` (or
            `slots`), `unique_layers` (number or list) and `flops_per_token` are shown where rows have them.
        path: file to write, PNG whatever its suffix.

    Returns:
        The path.

    Raises:
        ValueError: no rows, a row without label or perplexity, or a perplexity that is not positive.
        OSError: the file cannot be written.
    """
    score_figure(rows).savefig(path, format="png", metadata={"Software": None})
    return Path(path)


def score_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The picture of `score_bars` as a matplotlib figure that no window manager knows."""
    from matplotlib.figure import Figure

    values = [_perplexity(index, row) for index, row in enumerate(rows)]
    if not values:
        raise ValueError("score_bars needs at least one row")
    names = [_name(row) for row in rows]
    columns = [column for column in _COLUMNS if any(column[1](row) for row in rows)]
    left = 0.3 + max(_inches(name) for name in names)
    right, above, below = 0.25 + COLUMN_INCHES * len(columns), 0.95, 0.6
    plot_height = ROW_INCHES * len(values)
    width, height = left + PLOT_INCHES + right, above + plot_height + below
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((left / width, below / height, PLOT_INCHES / width, plot_height / height))
    _draw_bars(axes, values)
    _write_names(axes, names)
    _write_columns(axes, columns, rows, plot_height)
    title = "Perplexity under each plan (lower is better)"
    figure.text(0.3 / width, 1 - 0.35 / height, title, fontsize=11, fontweight="bold")
    return figure


def _perplexity(index: int, row: Mapping[str, Any]) -> float:
    for key in ("label", "perplexity"):
        if key not in row:
            raise ValueError(f"row {index} of score_bars has no {key}")
    value = float(row["perplexity"])
    if value <= 0:
        raise ValueError(f"row {index} of score_bars has perplexity {value}; it must be positive")
    return value


def _name(row: Mapping[str, Any]) -> list[str]:
    """One or two lines: the label, and the plan where it says something else."""
    lines = [str(row["label"]), str(row.get("plan") or row["label"])]
    return [shorten(line, MAX_LABEL) for line in dict.fromkeys(lines)]


def _inches(name: list[str]) -> float:
    # Width of an average character of 10 points (8 in the second line).
    return max(len(line) * (0.085 if number == 0 else 0.068) for number, line in enumerate(name))


def _count(row: Mapping[str, Any], *keys: str) -> str:
    value = next((row[key] for key in keys if row.get(key) is not None), "")
    return str(value if isinstance(value, int | str) else len(value))


def _flops(row: Mapping[str, Any]) -> str:
    value = row.get("flops_per_token")
    if value is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


_COLUMNS: tuple[Column, ...] = (
    ("slots", lambda row: _count(row, "num_slots", "slots")),
    ("layers", lambda row: _count(row, "unique_layers")),
    ("FLOPs\nper token", _flops),
)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


def _draw_bars(axes: Axes, values: list[float]) -> None:
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(finite), max(finite)
    logarithmic = high / low > LOG_FROM
    if logarithmic:
        # A tenth of the axis for the smallest bar, and room for a number behind the longest.
        span = high / low
        start, end, unknown = low / span**0.12, high * span**0.42, high * span**0.25
        axes.set_xscale("log")
    else:
        start, end, unknown = 0.0, 1.36 * high, 1.2 * high
    axes.set_xlim(start, end)
    for y, value in enumerate(values):
        known = math.isfinite(value)
        reach = value if known else unknown
        style: dict[str, Any] = {} if known else dict(fill=False, hatch="////", edgecolor=FAINT, linewidth=0)
        axes.barh(y, reach - start, left=start, height=0.62, color=OTHERS if y else FIRST, **style)
        against = value / values[0]
        factor = f"  x{against:.3g}" if y and math.isfinite(against) else ""
        axes.annotate(
            _number(value) + factor,
            (reach, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel("perplexity (log scale)" if logarithmic else "perplexity")
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _write_names(axes: Axes, names: list[list[str]]) -> None:
    beside: Any = axes.get_yaxis_transform()
    for y, name in enumerate(names):
        for number, text in enumerate(name):
            offset = 0.36 * (number - (len(name) - 1) / 2)
            style: dict[str, Any] = dict(fontsize=8, color=FAINT) if number else dict(fontsize=10)
            axes.text(-0.1 / PLOT_INCHES, y + offset, text, transform=beside, ha="right", va="center", **style)


def _write_columns(axes: Axes, columns: list[Column], rows: Sequence[Mapping[str, Any]], plot_height: float) -> None:
    beside: Any = axes.get_yaxis_transform()
    for number, (title, show) in enumerate(columns, start=1):
        x = 1 + COLUMN_INCHES * number / PLOT_INCHES
        style: dict[str, Any] = dict(ha="right", fontsize=9)
        axes.text(x, 1 + 0.06 / plot_height, title, transform=axes.transAxes, va="bottom", color=FAINT, **style)
        for y, row in enumerate(rows):
            axes.text(x, y, show(row), transform=beside, va="center", **style)

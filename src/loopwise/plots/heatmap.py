"""Heat-maps of layers against layers, and bars of layers, side by side in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopwise.plots.picture import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAME = 26
BAR, MARKED, FAINT = "#0072B2", "#E69F00", "#666666"
UNKNOWN = "#EEEEEE"
COLUMNS, PANEL_INCHES = 3, (4.9, 3.9)
# Above this ratio of the largest to the smallest bar the small ones could not be told apart on a linear axis.
LOG_FROM = 12.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap:
    """A matrix as colours, row 0 at the bottom; NaN stays grey.

    Attributes:
        values: numbers `[rows, columns]`.
        title: what is shown.
        x_label, y_label: names of the axes.
        unit: name of the colour scale.
        first_x, first_y: number of the first column and row.
        low, high: ends of the colour scale, taken from the values where None.
        has_diagonal: False leaves the diagonal grey, where everything is like itself.
        rows: names of the rows, which take the place of their numbers.
    """

    values: Any
    title: str
    x_label: str = "layer"
    y_label: str = "layer"
    unit: str = "cosine"
    first_x: int = 0
    first_y: int = 0
    low: float | None = None
    high: float | None = None
    has_diagonal: bool = True
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBars:
    """One bar for every layer.

    Attributes:
        values: numbers `[L]`.
        title: what is shown.
        unit: name of the vertical axis.
        marked: first and one past the last layer of a part with a background of its own, None for none.
        note: what that part is, written above the bars.
    """

    values: Any
    title: str
    unit: str
    marked: tuple[int, int] | None = None
    note: str = ""


def draw_heatmaps(panels: Sequence[Heatmap | LayerBars], path: str | Path, *, title: str = "") -> Path:
    """Draw panels as a PNG, three in a row.

    Returns:
        The path.

    Raises:
        ValueError: no panels, or one without values.
        OSError: the file cannot be written.
    """
    heatmap_figure(panels, title=title).savefig(path, format="png", metadata={"Software": None})
    return Path(path)


def heatmap_figure(panels: Sequence[Heatmap | LayerBars], *, title: str = "") -> Figure:
    """The picture of `draw_heatmaps` as a matplotlib figure that no window manager knows."""
    import numpy as np
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("draw_heatmaps needs at least one panel")
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(columns * PANEL_INCHES[0], rows * PANEL_INCHES[1]), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        values = np.array(panel.values, dtype=float)
        if not values.size or values.ndim != (1 if isinstance(panel, LayerBars) else 2):
            raise ValueError(f"the panel {panel.title!r} has no values of the right shape: {list(values.shape)}")
        axes.set_title(panel.title, fontsize=10)
        if isinstance(panel, LayerBars):
            _draw_bars(axes, panel, values)
        else:
            _draw_heatmap(figure, axes, panel, values)
    return figure


def _draw_heatmap(figure: Figure, axes: Axes, panel: Heatmap, values: Any) -> None:
    import numpy as np
    from matplotlib import colormaps

    if not panel.has_diagonal:
        np.fill_diagonal(values, np.nan)
    colours = colormaps["viridis"].with_extremes(bad=UNKNOWN)
    rows, columns = values.shape
    image = axes.imshow(
        np.ma.masked_invalid(values),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=panel.low,
        vmax=panel.high,
        extent=(panel.first_x - 0.5, panel.first_x + columns - 0.5, panel.first_y - 0.5, panel.first_y + rows - 0.5),
    )
    if np.isfinite(values).any():
        figure.colorbar(image, ax=axes).set_label(panel.unit, fontsize=9)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    _whole_numbers(axes.xaxis, panel.first_x, panel.first_x + columns - 1)
    if panel.rows:
        names = [shorten(name, MAX_NAME) for name in panel.rows]
        axes.set_yticks(range(panel.first_y, panel.first_y + rows), names, fontsize=min(8, 150 / rows))
    else:
        _whole_numbers(axes.yaxis, panel.first_y, panel.first_y + rows - 1)


def _draw_bars(axes: Axes, panel: LayerBars, values: Any) -> None:
    axes.bar(range(len(values)), values, color=BAR, width=0.8, zorder=2)
    if panel.marked is not None:
        first, last = panel.marked[0] - 0.5, panel.marked[1] - 0.5
        axes.axvspan(first, last, color=MARKED, alpha=0.18, linewidth=0, zorder=0)
    if panel.note:
        axes.text(0.5, 1.0, panel.note, transform=axes.transAxes, ha="center", va="bottom", fontsize=8, color=FAINT)
        axes.set_title(panel.title, fontsize=10, pad=16)
    if values.min() > 0 and values.max() > LOG_FROM * values.min():
        axes.set_yscale("log")
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_xlabel("layer")
    axes.set_ylabel(panel.unit)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _whole_numbers(axes.xaxis, 0, len(values) - 1)


def _whole_numbers(axis: Any, first: int, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(nbins=8, integer=True, min_n_ticks=1).tick_values(first, last)
    axis.set_ticks([int(tick) for tick in ticks if first <= tick <= last and tick == int(tick)])

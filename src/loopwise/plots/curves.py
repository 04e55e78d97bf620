"""Curves of training: one run by itself, or several methods over steps and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopwise.io.amounts import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which readers with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_INCHES = (5.2, 3.4)
_MOST_POINTS = 6


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of one line.

    Attributes:
        label: what it is called.
        x, y: as many numbers each; those that are not finite are left out.
        low, high: limits of a band around it, or None.
        colour: index into `COLOURS`; None takes the next.
        dashed: drawn dashed.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int | None = None
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes.

    Attributes:
        curves: its lines.
        x_label, y_label: with units.
        log_x, log_y: logarithmic axes.
        title: above it.
        level: a horizontal line such as chance, and what it is called; None draws none.
        marks: (x, y, text) of points that stand out, such as crossings; each is a ring around its short text.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    title: str = ""
    level: tuple[float, str] | None = None
    marks: Sequence[tuple[float, float, str]] = ()


def draw_panels(panels: Sequence[Panel], path: str | Path, *, title: str = "") -> Path:
    """Draw panels side by side in a PNG, with one legend below them.

    Raises:
        ValueError: no panel.
        OSError: the file cannot be written.
    """
    panels_figure(panels, title=title).savefig(path, format="png", metadata={"Software": None})
    return Path(path)


def panels_figure(panels: Sequence[Panel], *, title: str = "") -> Figure:
    """The picture of `draw_panels` as a matplotlib figure that no window manager knows."""
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("draw_panels needs at least one panel")
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves if curve.label))
    width = _INCHES[0] * len(panels)
    columns = max(1, min(len(labels), int(width // 2.2)))
    legend_inches = 0.3 * math.ceil(len(labels) / columns) if len(labels) > 1 else 0.0
    figure = Figure(figsize=(width, _INCHES[1] + legend_inches), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel, labels)
    if len(labels) > 1:
        handles = {}
        for axes in all_axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        known = [label for label in labels if label in handles]
        figure.legend(
            [handles[label] for label in known], known, loc="outside lower center", ncols=columns, frameon=False
        )
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def draw_run(lines: Iterable[Mapping[str, Any]], folder: str | Path, *, title: str = "") -> list[Path]:
    """Draw the metrics of a run: `loss.png`, and `accuracy.png` where rows were scored.

    Args:
        lines: what `metrics.jsonl` holds, each with "step".
        folder: where the pictures go.
        title: name of the run.

    Returns:
        The files.
    """
    lines = list(lines)
    made = []
    trained = _series(lines, "loss", "training")
    held = [_series(lines, name, _scored_as(name)) for name in _names(lines, "eval/loss")]
    if trained.x:
        panel = Panel(curves=[trained, *held], x_label="optimizer step", y_label="loss (nats, or squared error)")
        made.append(draw_panels([panel], Path(folder) / "loss.png", title=title))
    scored = [_series(lines, name, _scored_as(name)) for name in _names(lines, "eval/accuracy")]
    if scored:
        panel = Panel(curves=scored, x_label="optimizer step", y_label="exact accuracy on held-out rows")
        made.append(draw_panels([panel], Path(folder) / "accuracy.png", title=title))
    return made


def _names(lines: Iterable[Mapping[str, Any]], stem: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line if name.partition("@")[0] == stem))


def _scored_as(name: str) -> str:
    loops = name.partition("@")[2]
    return f"held out, {loops} iteration{'s' * (loops != '1')}" if loops else "held out"


def _series(lines: Iterable[Mapping[str, Any]], name: str, label: str) -> Curve:
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    return Curve(label=label, x=[step for step, _ in points], y=[value for _, value in points])


def _draw(axes: Axes, panel: Panel, labels: Sequence[str]) -> None:
    for curve in panel.curves:
        colour = COLOURS[(labels.index(curve.label) if curve.colour is None else curve.colour) % len(COLOURS)]
        points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        marker = "o" if len(points) < 25 else None
        style = "--" if curve.dashed else "-"
        axes.plot(
            [x for x, _ in points], [y for _, y in points], style, color=colour, marker=marker, markersize=4,
            linewidth=1.4, label=curve.label,
        )  # fmt: skip
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    if panel.level is not None:
        axes.axhline(panel.level[0], color="#666666", linewidth=0.9, linestyle=":")
        axes.annotate(
            panel.level[1], (1.0, panel.level[0]), xycoords=("axes fraction", "data"), xytext=(-3, 3),
            textcoords="offset points", ha="right", fontsize=8, color="#666666",
        )  # fmt: skip
    for x, y, text in panel.marks:
        axes.plot(
            [x], [y], "o", color="#000000", markerfacecolor="#FFFFFF", markersize=11, markeredgewidth=1.0, zorder=5
        )
        axes.annotate(text, (x, y), ha="center", va="center_baseline", fontsize=8, zorder=6)
    axes.set_xscale("log" if panel.log_x else "linear")
    axes.set_yscale("log" if panel.log_y else "linear")
    if panel.log_y and panel.curves:
        _label_log(axes.yaxis, [y for curve in panel.curves for y in curve.y if y > 0])
    if panel.log_x and panel.curves:
        _label_log(axes.xaxis, [x for curve in panel.curves for x in curve.x if x > 0])
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _label_log(axis: Axis, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis with a prefix: at the points where these are few, else at round numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = sorted(set(values))
    if len(points) <= _MOST_POINTS:
        axis.set_ticks(points, [amount(value) for value in points])
        axis.set_ticks([], minor=True)
        return
    decades = math.log10(max(values) / min(values)) if values else 0.0
    between = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=between, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: amount(value).replace(".00", "")))
    axis.set_minor_formatter(NullFormatter())

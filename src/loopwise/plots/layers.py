"""What becomes of a model's layers, as a picture: old ones on the left, new ones on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loopwise.plan import Loop, Plan
from loopwise.plan.nodes import Node, visit_slots
from loopwise.plots.picture import PLAIN, shorten
from loopwise.plots.text import node_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["copy", "mean", "scaled", "zero"]
# In the order of the legend.
MEANINGS: dict[Kind, str] = {
    "copy": "copy",
    "mean": "mean of several",
    "scaled": "some tensors scaled",
    "zero": "starts as the identity",
}
GONE = "#D9D9D9"
# Inches: the two columns of boxes, the room for arrows between them, a bracket of a loop and its letters.
BOX, BETWEEN, BRACKET, LETTER = 0.9, 2.0, 0.24, 0.082
ROW, TALLEST, LABEL_ROW = 0.26, 14.0, 0.17


@dataclass(frozen=True, kw_only=True)
class NewBox:
    """A layer of the new model.

    Attributes:
        sources: the old layers that it is made of.
        kind: how.
    """

    sources: tuple[int, ...]
    kind: Kind = "copy"


def layers_picture(
    num_layers: int, new: Sequence[NewBox], path: str | Path, *, plan: Plan | str | None = None, title: str = ""
) -> Path:
    """Draw where the layers of an edited model come from, as a PNG.

    Every old layer has a colour, and the new layers made of it have that too; lines lead from one to the other. Layers
    that start as the identity are hatched, old layers that nothing is made of are grey, and a loop of the new plan has
    a bracket with its name and count beside the layers it covers.

    Args:
        num_layers: layers of the old model.
        new: the new layers, the first one first.
        path: file to write, PNG whatever its suffix.
        plan: in which order the new layers are visited, default once each.
        title: what is written above.

    Returns:
        The path.

    Raises:
        ValueError: no layers, or a source that does not exist.
        PlanError: the plan visits a layer that does not exist.
        OSError: the file cannot be written.
    """
    figure = layers_figure(num_layers, new, plan=plan, title=title)
    figure.savefig(path, format="png", metadata={"Software": None})
    return Path(path)


def layers_figure(num_layers: int, new: Sequence[NewBox], *, plan: Plan | str | None = None, title: str = "") -> Figure:
    """The picture of `layers_picture` as a matplotlib figure that no window manager knows."""
    from matplotlib.figure import Figure

    if num_layers < 1 or not new:
        raise ValueError("layers_picture needs old and new layers")
    bad = [source for box in new for source in box.sources if not 0 <= source < num_layers]
    if bad or not all(box.sources for box in new):
        raise ValueError(f"layers_picture: every new layer needs sources among the {num_layers} old ones")
    plan = Plan.identity(len(new)) if plan is None else Plan.parse(plan).validate(len(new))
    brackets = _in_columns(list(_brackets(plan.nodes)))
    tallest = max(num_layers, len(new))
    row = min(ROW, TALLEST / tallest)
    beside = max((BRACKET * (column + 1) + LETTER * len(text) for _, _, text, column in brackets), default=0.0)
    plot_width, plot_height = 2 * BOX + BETWEEN + beside, row * tallest
    left, right, above, below = 0.35, 0.35, 0.95, 0.75
    width, height = max(left + plot_width + right, 5.6), below + plot_height + above
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((left / width, below / height, plot_width / width, plot_height / height))
    axes.set_xlim(-0.02, plot_width + 0.02)
    axes.set_ylim(-0.5, tallest - 0.5)
    axes.set_axis_off()
    colours = _colours(num_layers)
    _draw_lines(axes, new, colours)
    used = {source for box in new for source in box.sources}
    for layer in range(num_layers):
        _draw_box(axes, 0.0, layer, colours[layer] if layer in used else GONE, "copy", row)
    for number, box in enumerate(new):
        _draw_box(axes, BOX + BETWEEN, number, _mean([colours[source] for source in box.sources]), box.kind, row)
    for first, last, text, column in brackets:
        _draw_bracket(axes, first, last, text, 2 * BOX + BETWEEN + BRACKET * (column + 0.4))
    for x, text in ((BOX / 2, f"old: {num_layers}"), (1.5 * BOX + BETWEEN, f"new: {len(new)}")):
        place: Any = dict(transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9, color=PLAIN)
        axes.text(x, 1 + 0.06 / plot_height, text, **place)
    heading = shorten(title or str(plan), int((width - left) / 0.105))
    figure.text(left / width, 1 - 0.3 / height, heading, fontsize=11, fontweight="bold")
    figure.text(left / width, 1 - 0.52 / height, _summary(num_layers, len(new), plan), fontsize=9, color=PLAIN)
    _legend(figure, new, len(used) < num_layers, left / width, 0.12 / height)
    return figure


def _colours(num_layers: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    # The darkest and the brightest end would hide numbers and lines.
    ramp = colormaps["viridis"]
    return [tuple(ramp(0.12 + 0.8 * layer / max(num_layers - 1, 1))[:3]) for layer in range(num_layers)]


def _mean(colours: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(channel) / len(colours) for channel in zip(*colours, strict=True))


def _draw_lines(axes: Axes, new: Sequence[NewBox], colours: Sequence[tuple[float, ...]]) -> None:
    from matplotlib.collections import LineCollection

    start, end = BOX + 0.04, BOX + BETWEEN - 0.04
    pairs = [(source, number) for number, box in enumerate(new) for source in box.sources]
    lines = [[(start, source), (end, number)] for source, number in pairs]
    thickness = 1.2 if len(pairs) <= 40 else 0.7
    styles = ["--" if new[number].kind == "zero" else "-" for _, number in pairs]
    tints = [colours[source] for source, _ in pairs]
    axes.add_collection(LineCollection(lines, colors=tints, linewidths=thickness, linestyles=styles, zorder=1))


def _draw_box(axes: Axes, x: float, layer: int, colour: Any, kind: Kind, row: float) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, layer - 0.42), BOX, 0.84, zorder=2, **_style(kind, colour)))
    every = max(1, -int(-LABEL_ROW // row))
    if layer % every:
        return
    red, green, blue = to_rgb(colour)
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.52 and kind != "zero"
    # A number on hatching needs a quiet ground.
    ground: dict[str, Any] = {"bbox": dict(facecolor="white", linewidth=0, pad=0.8)} if kind == "zero" else {}
    label: dict[str, Any] = dict(ha="center", va="center", fontsize=8, color="white" if dark else "black", zorder=3)
    axes.text(x + BOX / 2, layer, str(layer), **label, **ground)


def _style(kind: Kind, colour: Any) -> dict[str, Any]:
    if kind == "zero":
        return dict(facecolor="white", edgecolor=colour, hatch="////", linewidth=1.2)
    edge = {"copy": colour, "mean": "black", "scaled": "#D55E00"}[kind]
    return dict(facecolor=colour, edgecolor=edge, linewidth=0.8 if kind == "copy" else 1.4)


def _draw_bracket(axes: Axes, first: int, last: int, text: str, x: float) -> None:
    bottom, top = first - 0.4, last + 0.4
    axes.plot([x, x + 0.08, x + 0.08, x], [bottom, bottom, top, top], color=PLAIN, linewidth=1.2, solid_capstyle="butt")
    axes.text(x + 0.16, (first + last) / 2, text, ha="left", va="center", fontsize=9, color=PLAIN)


def _brackets(nodes: Sequence[Node]) -> Iterator[tuple[int, int, str]]:
    """(first layer, last layer, label) of every loop."""
    for node in nodes:
        if isinstance(node, Loop):
            layers = [slot.layer for slot in visit_slots(node.body)]
            yield min(layers), max(layers), shorten(node_title(node), 28)
            yield from _brackets(node.body)


def _in_columns(brackets: list[tuple[int, int, str]]) -> list[tuple[int, int, str, int]]:
    """The brackets, each with a column in which it and its label touch no other; short ones are next to the boxes."""
    placed: list[tuple[int, int, str, int]] = []
    for first, last, text in sorted(brackets, key=lambda item: (item[1] - item[0], item[0])):
        column = 0
        for other_first, other_last, other_text, other in placed:
            if first <= other_last and other_first <= last:
                # Past the label of the other one.
                column = max(column, other + 1 + round(LETTER * len(other_text) / BRACKET + 0.5))
        placed.append((first, last, text, column))
    return placed


def _summary(old: int, new: int, plan: Plan) -> str:
    visits = f", {plan.num_slots} visits" if plan.num_slots != new else ""
    return f"{old} layers become {new}{visits}"


def _legend(figure: Figure, new: Sequence[NewBox], gone: bool, x: float, y: float) -> None:
    from matplotlib.patches import Patch

    found = {box.kind for box in new}
    handles = [Patch(label=text, **_style(kind, "#7FB8A8")) for kind, text in MEANINGS.items() if kind in found]
    if gone:
        handles.append(Patch(facecolor=GONE, label="left out"))
    columns = min(len(handles), 3)
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(x, y), ncols=columns, fontsize=8, frameon=False)

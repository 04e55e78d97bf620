"""A plan as a picture: which physical layer is visited at which depth, with its loops marked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopwise.plan import Loop, Plan, Span
from loopwise.plots.text import node_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by most people who see colours differently.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PLAIN = "#555555"
# The narrowest plot is 5 inches wide and has to hold a label.
MAX_LABEL, LABEL_POINTS, LETTER_INCHES = 56, 9, 0.08
TITLE_POINTS, TITLE_LETTER_INCHES = 11, 0.105
ROW_INCHES = 0.3
# With more runs of loops than this only the first run of each gets a bracket.
MAX_BRACKETS = 200


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A loop at the `occurrence`-th time it is reached: slots `first` .. `last`, in `depth` other loops."""

    loop: Loop
    first: int
    last: int
    depth: int
    occurrence: int
    colour: str

    @property
    def label(self) -> str:
        return shorten(node_title(self.loop), MAX_LABEL) if self.occurrence == 0 else ""

    def label_span(self, inches_per_slot: float, num_slots: int) -> tuple[float, float]:
        """The slots over which the label is written: centred, but within the plot."""
        half = 0.5 * len(self.label) * LETTER_INCHES / inches_per_slot
        middle = max(half - 1, min((self.first + self.last) / 2, num_slots - half))
        return middle - half, middle + half


def plan_picture(plan: Plan | str, path: str | Path) -> Path:
    """Draw a plan as a PNG: visits from left to right, physical layers from bottom to top.

    Every visit is a square, coloured by the innermost loop around it and grey outside loops. Each loop has a bracket
    above the visits it covers, with its name and count, divided by its iterations; a nested loop is named once.

    Args:
        plan: the plan or its text.
        path: file to write, PNG whatever its suffix.

    Returns:
        The path.

    Raises:
        PlanError: the text is no plan.
        OSError: the file cannot be written.
    """
    plan_figure(plan).savefig(path, format="png", metadata={"Software": None})
    return Path(path)


def plan_figure(plan: Plan | str) -> Figure:
    """The picture of `plan_picture` as a matplotlib figure that no window manager knows."""
    from matplotlib.figure import Figure

    plan = Plan.parse(plan)
    layers = plan.layers
    low, high = min(layers), max(layers)
    plot_width = min(15.0, max(5.0, 0.16 * len(layers)))
    plot_height = min(7.0, max(2.2, 0.17 * (high - low + 1)))
    passes = list(_passes(plan))
    colours = _slot_colours(plan, passes)
    if len(passes) > MAX_BRACKETS:
        passes = [item for item in passes if item.occurrence == 0]
    inches_per_slot = plot_width / (len(layers) + 1)
    rows = _bracket_rows(passes, inches_per_slot, len(layers))
    above = 0.75 + ROW_INCHES * (1 + max(rows, default=-1))
    left, right, below = 0.75, 0.3, 0.6
    width, height = left + plot_width + right, below + plot_height + above
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((left / width, below / height, plot_width / width, plot_height / height))
    # Square enough to touch its neighbour at most, and visible in a plan of hundreds of visits.
    side = 72 * min(inches_per_slot, plot_height / (high - low + 2))
    size = min(11.0, max(1.5, 0.8 * side))
    axes.plot(range(len(layers)), layers, color="#BBBBBB", linewidth=min(1.0, size / 5), zorder=2)
    axes.scatter(range(len(layers)), layers, s=size**2, marker="s", c=colours, linewidths=0, zorder=3)
    for item, row in zip(passes, rows, strict=True):
        middle = sum(item.label_span(inches_per_slot, len(layers))) / 2
        _draw_bracket(axes, item, middle, 1 + (0.08 + ROW_INCHES * row) / plot_height, 0.08 / plot_height)
    _decorate(axes, plan)
    title = shorten(str(plan), int((plot_width + right) / TITLE_LETTER_INCHES))
    figure.text(left / width, 1 - 0.28 / height, title, fontsize=TITLE_POINTS, fontweight="bold")
    figure.text(left / width, 1 - 0.5 / height, _summary(plan), fontsize=9, color=PLAIN)
    return figure


def shorten(text: str, length: int) -> str:
    """The text, its middle replaced by dots where it is longer than `length` characters."""
    if len(text) <= length:
        return text
    head = (length - 3) * 2 // 3
    return f"{text[:head]}...{text[len(text) - (length - 3 - head) :]}"


def _passes(plan: Plan) -> Iterator[_Pass]:
    """Every run of every loop, outer ones before those inside."""
    colours: dict[Loop, str] = {}
    times: dict[tuple[int, ...], int] = {}

    def walk(nodes: tuple, prefix: tuple[int, ...], start: int, depth: int) -> Iterator[_Pass]:
        for index, node in enumerate(nodes):
            here = (*prefix, index)
            if isinstance(node, Loop):
                occurrence = times.get(here, 0)
                times[here] = occurrence + 1
                colour = colours.setdefault(node, COLOURS[len(colours) % len(COLOURS)])
                end = start + node.num_slots - 1
                yield _Pass(loop=node, first=start, last=end, depth=depth, occurrence=occurrence, colour=colour)
                inside = node.num_slots // node.count
                for iteration in range(node.count):
                    yield from walk(node.body, here, start + iteration * inside, depth + 1)
            start += node.num_slots

    yield from walk(plan.nodes, (), 0, 0)


def _bracket_rows(passes: list[_Pass], inches_per_slot: float, num_slots: int) -> list[int]:
    """A row above the plot for every bracket: above the brackets inside it, and beside no label that it would touch."""
    rows = [0] * len(passes)
    taken: list[list[tuple[float, float]]] = []
    # Inner loops first, so that outer ones come to lie above them.
    for index in sorted(range(len(passes)), key=lambda i: (-passes[i].depth, passes[i].first)):
        item = passes[index]
        inside = [
            rows[i]
            for i, other in enumerate(passes)
            if other.depth > item.depth and item.first <= other.first and other.last <= item.last
        ]
        label = item.label_span(inches_per_slot, num_slots)
        span = (min(item.first - 0.5, label[0]), max(item.last + 0.5, label[1]))
        row = 1 + max(inside, default=-1)
        while row < len(taken) and any(a < span[1] and span[0] < b for a, b in taken[row]):
            row += 1
        taken += [[] for _ in range(row + 1 - len(taken))]
        taken[row].append(span)
        rows[index] = row
    return rows


def _slot_colours(plan: Plan, passes: list[_Pass]) -> list[str]:
    colours = [PLAIN] * plan.num_slots
    for item in passes:
        colours[item.first : item.last + 1] = [item.colour] * (item.last - item.first + 1)
    return colours


def _draw_bracket(axes: Axes, item: _Pass, middle: float, y: float, tick: float) -> None:
    """A line above the plot over the visits of a loop, a tick at every iteration, the label on the line."""
    above: Any = axes.get_xaxis_transform()
    first, last = item.first - 0.4, item.last + 0.4
    style: dict[str, Any] = dict(color=item.colour, transform=above, clip_on=False, solid_capstyle="butt")
    axes.plot([first, first, last, last], [y, y + tick, y + tick, y], linewidth=1.2, **style)
    step = item.loop.num_slots // item.loop.count
    if item.loop.count <= 64:
        for start in range(item.first + step, item.last + 1, step):
            axes.plot([start - 0.5] * 2, [y, y + tick], linewidth=0.8, **style)
            if item.depth == 0:
                axes.axvline(start - 0.5, color=item.colour, linewidth=0.6, alpha=0.35, linestyle=":", zorder=1)
    if item.depth == 0:
        axes.axvspan(item.first - 0.5, item.last + 0.5, color=item.colour, alpha=0.07, linewidth=0, zorder=0)
    axes.text(
        middle,
        y + 1.3 * tick,
        item.label,
        transform=above,
        color=item.colour,
        fontsize=LABEL_POINTS,
        ha="center",
        va="bottom",
        clip_on=False,
    )


def _decorate(axes: Axes, plan: Plan) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = min(plan.layers), max(plan.layers)
    axes.set_xlim(-1, plan.num_slots)
    axes.set_ylim(low - 1, high + 1)
    for axis, first, last in ((axes.xaxis, 0, plan.num_slots - 1), (axes.yaxis, low, high)):
        ticks = MaxNLocator(nbins=10, integer=True, min_n_ticks=1).tick_values(first, last)
        axis.set_ticks([int(tick) for tick in ticks if first <= tick <= last and tick == int(tick)])
    axes.set_xlabel("slot (visit order)")
    axes.set_ylabel("physical layer")
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _summary(plan: Plan) -> str:
    """Number of visits and layers, and the layers below the highest one that the plan leaves out."""
    layers = plan.unique_layers
    text = f"{_many(plan.num_slots, 'slot')} over {_many(len(layers), 'layer')}"
    skipped = sorted(set(range(max(layers) + 1)) - set(layers))
    if not skipped:
        return text
    spans = Plan.from_layers(skipped).nodes
    names = ", ".join(node_title(span).split(" ", 1)[1] for span in spans if isinstance(span, Span))
    return f"{text}; not visited: {shorten(names, 40)}"

"""A depth map: text in which every token has the colour of the iterations that were spent on it."""

from __future__ import annotations

import bisect
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopwise.plots.picture import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.text import Text

# Nine points of the colour map viridis, from few iterations (light) to many (dark): readers with any colour vision see
# the order, and so does a printer without colours.
RAMP = ("#fde725", "#addc30", "#5ec962", "#28ae80", "#21918c", "#2c728e", "#3b528b", "#472d7b", "#440154")
FAINT = "#666666"
COLUMNS, MAX_LINES = 96, 80
_POINTS = 9
# A letter of DejaVu Sans Mono is 0.602 of its size wide; the rest keeps letters of neighbours apart.
_LETTER_INCHES, _LINE_INCHES = _POINTS / 72 * 0.64, 0.215
_NEWLINE, _UNKNOWN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\N{WHITE SQUARE}"


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What is written of a token on one line, from a column on."""

    text: str
    depth: int
    line: int
    column: int


def depth_map(
    tokens: Sequence[str],
    depths: Sequence[int],
    path: str | Path,
    *,
    most: int | None = None,
    unit: str = "iterations",
    title: str = "",
) -> Path:
    """Draw a text as a PNG, every token on the colour of its depth.

    Texts of more than `MAX_LINES` lines of `COLUMNS` letters are cut there, and the picture says so.

    Args:
        tokens: texts of the tokens in order, spaces and line breaks included.
        depths: as many numbers from 0: what each token used.
        path: file to write, PNG whatever its suffix.
        most: the largest depth there could be, the dark end of the scale; the largest that occurs if None.
        unit: what the depths count.
        title: above the picture.

    Returns:
        The path.

    Raises:
        ValueError: no token, not one depth per token, or a depth below 0 or above `most`.
        OSError: the file cannot be written.
    """
    figure = depth_map_figure(tokens, depths, most=most, unit=unit, title=title)
    figure.savefig(path, format="png", metadata={"Software": None})
    return Path(path)


def depth_map_figure(
    tokens: Sequence[str],
    depths: Sequence[int],
    *,
    most: int | None = None,
    unit: str = "iterations",
    title: str = "",
) -> Figure:
    """The picture of `depth_map` as a matplotlib figure that no window manager knows."""
    from matplotlib.figure import Figure

    most = _checked(tokens, depths, most)
    pieces, num_shown = _layout(tokens, depths)
    lines = 1 + max(piece.line for piece in pieces)
    left, right, above, below = 0.3, 0.3, 1.25, 0.3
    plot_width, plot_height = COLUMNS * _LETTER_INCHES, lines * _LINE_INCHES
    width, height = left + plot_width + right, above + plot_height + below
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((left / width, below / height, plot_width / width, plot_height / height))
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(lines, 0)
    axes.set_axis_off()
    _draw_pieces(axes, pieces, most)
    summary = _summary(depths, most, unit)
    if num_shown < len(tokens):
        summary += f"; the first {num_shown:,} are drawn"
    title = shorten(title or f"Depth map: {unit} of every token", 80)
    figure.text(left / width, 1 - 0.3 / height, title, fontsize=11, fontweight="bold", parse_math=False)
    figure.text(left / width, 1 - 0.53 / height, summary, fontsize=9, color=FAINT, parse_math=False)
    scale = figure.add_axes((left / width, 1 - 0.83 / height, 3.0 / width, 0.13 / height))
    _draw_scale(scale, sorted(set(depths)), most, unit)
    return figure


def depth_map_text(
    tokens: Sequence[str], depths: Sequence[int], *, most: int | None = None, unit: str = "iterations"
) -> Text:
    """The same for a terminal: a rich text, every token on the colour of its depth, with the scale below.

    Raises:
        ValueError: as `depth_map`.
    """
    from rich.text import Text

    most = _checked(tokens, depths, most)
    text = Text()
    for token, depth in zip(tokens, depths, strict=True):
        ground = colour_of(depth, most)
        text.append(_harmless(token), style=f"{ink_on(ground)} on {ground}")
    text.append("\n\n")
    low, high = min(depths), max(depths)
    steps = sorted({round(low + (high - low) * step / 7) for step in range(8)})
    for depth in steps:
        ground = colour_of(depth, most)
        text.append(f" {depth} ", style=f"{ink_on(ground)} on {ground}")
    text.append(f"  {_summary(depths, most, unit)}")
    return text


def depth_map_plain(tokens: Sequence[str], depths: Sequence[int]) -> str:
    """The same without colours: the depth in brackets behind every token."""
    _checked(tokens, depths, None)
    return "".join(f"{_harmless(token)}[{depth}]" for token, depth in zip(tokens, depths, strict=True))


def colour_of(depth: int, most: int) -> str:
    """Colour of a depth on the scale from 1 to `most`, as #rrggbb."""
    place = (len(RAMP) - 1) * min(1.0, max(0.0, (depth - 1) / max(1, most - 1)))
    index = min(int(place), len(RAMP) - 2)
    share = place - index
    one, other = (_channels(colour) for colour in RAMP[index : index + 2])
    mixed = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def ink_on(ground: str) -> str:
    """Black or white, whichever has the larger contrast on a colour (relative luminance of WCAG 2)."""
    parts = [value / 255 for value in _channels(ground)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def _channels(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue


def _checked(tokens: Sequence[str], depths: Sequence[int], most: int | None) -> int:
    if not tokens or len(tokens) != len(depths):
        raise ValueError(f"a depth map needs a depth for every token: {len(tokens)} tokens, {len(depths)} depths")
    largest = max(depths)
    if min(depths) < 0 or (most is not None and largest > most):
        raise ValueError(f"depths go from {min(depths)} to {largest}: numbers from 0 to {most} are needed")
    return largest if most is None else most


def _summary(depths: Sequence[int], most: int, unit: str) -> str:
    tokens = f"{len(depths):,} token{'s' * (len(depths) != 1)}"
    return f"{tokens}, {sum(depths) / len(depths):.2f} of {most} {unit} on average"


def _harmless(text: str) -> str:
    """Without control characters, which would steer a terminal; tabs and line breaks stay."""
    return "".join(c if c in "\n\t" or not unicodedata.category(c).startswith("C") else _UNKNOWN for c in text)


def _layout(tokens: Sequence[str], depths: Sequence[int]) -> tuple[list[_Piece], int]:
    """Break the text into lines; returns what is written where, and how many tokens are drawn."""
    pieces: list[_Piece] = []
    line = column = 0
    for number, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
        parts = token.expandtabs(4).replace("\r\n", "\n").splitlines(keepends=True) or [_UNKNOWN]
        for part in parts:
            text = part.rstrip("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
            breaks = len(text) < len(part)
            text += _NEWLINE * breaks
            if column and column + len(text) > COLUMNS:
                line, column = line + 1, 0
            for start in range(0, len(text), COLUMNS):  # longer than a line by itself
                chunk = text[start : start + COLUMNS]
                line += bool(start)
                column = 0 if start else column
                if line >= MAX_LINES:
                    return pieces, number
                pieces.append(_Piece(text=chunk, depth=depth, line=line, column=column))
                column += len(chunk)
            if breaks:
                line, column = line + 1, 0
    return pieces, len(tokens)


def _draw_pieces(axes: Axes, pieces: Sequence[_Piece], most: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    grounds = [colour_of(piece.depth, most) for piece in pieces]
    boxes = [Rectangle((piece.column, piece.line + 0.04), len(piece.text), 0.92) for piece in pieces]
    axes.add_collection(PatchCollection(boxes, facecolor=grounds, edgecolor="#FFFFFF", linewidth=0.5))
    known = _Glyphs()
    for piece, ground in zip(pieces, grounds, strict=True):
        colour = ink_on(ground)
        # Letter by letter the columns stay in line whatever hinting makes of their widths; words would drift.
        for offset, letter in enumerate(piece.text):
            if letter.isspace():
                continue
            axes.text(
                piece.column + offset + 0.5, piece.line + 0.5, known.or_square(letter), color=colour, fontsize=_POINTS,
                family="DejaVu Sans Mono", ha="center", va="center_baseline", parse_math=False,
            )  # fmt: skip


class _Glyphs:
    """What the font can draw: matplotlib comes with it, so a picture is the same on every machine."""

    def __init__(self) -> None:
        from matplotlib.font_manager import findfont, get_font

        self._codes = sorted(get_font(findfont("DejaVu Sans Mono")).get_charmap())

    def or_square(self, letter: str) -> str:
        """The letter, or a square where the font lacks it or it is a mark without a place of its own."""
        place = bisect.bisect_left(self._codes, ord(letter))
        known = place < len(self._codes) and self._codes[place] == ord(letter)
        return letter if known and unicodedata.category(letter)[0] not in "CM" else _UNKNOWN


def _draw_scale(axes: Axes, depths: Sequence[int], most: int, unit: str) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    first = min(1, depths[0])
    steps = min(256, most - first + 1)
    size = (most - first + 1) / steps
    for step in range(steps):
        start = first - 0.5 + step * size
        ground = colour_of(math.ceil(start), most)
        axes.add_patch(Rectangle((start, 0), size, 1, facecolor=ground, linewidth=0))
    axes.set_xlim(first - 0.5, most + 0.5)
    axes.set_ylim(0, 1)
    ticks = MaxNLocator(nbins=8, integer=True, min_n_ticks=1).tick_values(first, most)
    axes.set_xticks([int(tick) for tick in ticks if first <= tick <= most and tick == int(tick)])
    axes.tick_params(axis="x", labelsize=8, length=2, pad=2)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    beside: Any = axes.transAxes
    axes.text(1.03, 0.5, unit, transform=beside, va="center", fontsize=8, color=FAINT, parse_math=False)

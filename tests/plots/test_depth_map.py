"""Depth maps: every token has the colour of its depth, letters are readable, strange text does no harm."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from loopwise.plots.depth_map import (
    COLUMNS,
    MAX_LINES,
    RAMP,
    colour_of,
    depth_map,
    depth_map_figure,
    depth_map_plain,
    depth_map_text,
    ink_on,
)
from tests.plots.test_pictures import assert_readable, boxes

WORDS = "The river bends because water on the outside of a curve moves fast er,\n costs $5 and $6.".split(" ")


def text(num_tokens: int, most: int) -> tuple[list[str], list[int]]:
    rng = random.Random(0)
    words = itertools.islice(itertools.cycle(WORDS), num_tokens)
    return [f" {word}" for word in words], [rng.randint(1, most) for _ in range(num_tokens)]


def grounds(figure: Figure) -> list[tuple[float, float, str]]:
    """Column and line of every box with its colour."""
    (patches,) = figure.axes[0].findobj(PatchCollection)
    corners = [path.get_extents() for path in patches.get_paths()]
    colours = [to_hex(colour) for colour in patches.get_facecolors()]
    return [(box.x0, int(box.y0), colour) for box, colour in zip(corners, colours, strict=True)]


@pytest.mark.parametrize(("num_tokens", "most"), [(1, 1), (12, 3), (60, 16), (30, 1000)])
def test_maps_are_readable(num_tokens: int, most: int) -> None:
    assert_readable(depth_map_figure(*text(num_tokens, most), most=most, title="a " + "very " * 30 + "long title"))


def test_every_token_has_the_colour_of_its_depth() -> None:
    figure = depth_map_figure(["ab", " c", "d\n", "e"], [1, 2, 3, 2], most=3)
    one, two, three = (colour_of(depth, 3) for depth in (1, 2, 3))
    assert (one, three) == (RAMP[0], RAMP[-1])
    assert grounds(figure) == [(0, 0, one), (2, 0, two), (4, 0, three), (0, 1, two)]


def test_letters_are_those_of_the_text_in_order() -> None:
    tokens, depths = text(40, 4)
    drawn = figure_letters(depth_map_figure(tokens, depths))
    assert drawn == "".join(tokens).replace("\n", "↵").replace(" ", "")


def figure_letters(figure: Figure) -> str:
    letters = sorted((item for item in figure.axes[0].texts), key=lambda item: item.get_position()[::-1])
    return "".join(item.get_text() for item in letters)


def test_a_word_longer_than_a_line_goes_on_below() -> None:
    found = grounds(depth_map_figure(["a", "x" * (2 * COLUMNS + 1), "b"], [1, 2, 3]))
    assert [(x, y) for x, y, _ in found] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3)]


def test_long_texts_are_cut_and_the_picture_says_so() -> None:
    tokens = ["x" * (COLUMNS - 1) + "\n"] * (MAX_LINES + 5)
    figure = depth_map_figure(tokens[: MAX_LINES // 8] + ["\n"] * MAX_LINES, [1] * (MAX_LINES // 8 + MAX_LINES))
    (summary,) = (text for text, _ in boxes(figure) if "on average" in text)
    assert summary.endswith(f"the first {MAX_LINES} are drawn")
    assert max(y for _, y, _ in grounds(figure)) == MAX_LINES - 1


def test_letters_that_the_font_lacks_are_squares(recwarn: pytest.WarningsRecorder) -> None:
    figure = depth_map_figure(["漢", "e\u0301", "\x1b[31m", "", "\x00"], [1, 1, 1, 1, 1])
    assert figure_letters(figure) == "□e□□[31m□□"
    assert_readable(figure)
    assert not recwarn.list


def test_words_say_what_is_drawn() -> None:
    found = {item for item, _ in boxes(depth_map_figure(["a", "b"], [1, 4], most=8, unit="rungs", title="$x$"))}
    assert {"$x$", "2 tokens, 2.50 of 8 rungs on average", "rungs"} <= found


@pytest.mark.parametrize("most", [1, 2, 7, 32])
def test_deeper_is_darker_and_ink_is_readable(most: int) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    colours = [colour_of(depth, most) for depth in range(1, most + 1)]
    lights = [luminance(colour) for colour in colours]
    assert lights == sorted(lights, reverse=True) and len(set(colours)) == most
    for colour, light in zip(colours, lights, strict=True):
        high, low = sorted((light, luminance(ink_on(colour))), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_terminal_gets_the_same_colours() -> None:
    found = depth_map_text(["a", " b\n", "\x1bc"], [1, 3, 2])
    assert found.plain.startswith("a b\n□c\n\n")
    styles = {found.plain[span.start : span.end]: str(span.style) for span in found.spans}
    assert styles["a"].endswith(colour_of(1, 3)) and styles[" b\n"].endswith(colour_of(3, 3))
    assert found.plain.endswith("3 tokens, 2.00 of 3 iterations on average")


def test_without_colours_depths_are_written() -> None:
    assert depth_map_plain(["a", " b\n", "\x1bc"], [1, 3, 2]) == "a[1] b\n[3]□c[2]"


def test_files_are_png_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = (depth_map(*text(9, 3), tmp_path / name).read_bytes() for name in ("a.png", "b"))
    assert first.startswith(b"\x89PNG") and first == second


@pytest.mark.parametrize(
    ("tokens", "depths", "most", "message"),
    [
        ([], [], None, "0 tokens"),
        (["a"], [1, 2], None, "1 tokens, 2 depths"),
        (["a"], [-1], None, "from -1"),
        (["a"], [5], 4, "from 0 to 4"),
    ],
)
def test_bad_depths(tokens: list[str], depths: list[int], most: int | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        depth_map(tokens, depths, tmp_path / "a.png", most=most)
    with pytest.raises(ValueError, match=message):
        depth_map_text(tokens, depths, most=most)
    assert list(tmp_path.iterdir()) == []

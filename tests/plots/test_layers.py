"""The picture of an edit's layers: what it shows, that nothing overlaps, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle

from loopwise.plan import PlanError
from loopwise.plots import layers_picture
from loopwise.plots.layers import GONE, NewBox, layers_figure
from tests.plots.test_pictures import assert_readable, boxes


def copies(*sources: int) -> list[NewBox]:
    return [NewBox(sources=(source,)) for source in sources]


PICTURES = {
    "grown": (4, [*copies(0, 1), NewBox(sources=(1,), kind="zero"), *copies(2, 3)], None),
    "tied": (
        6, [*copies(0), NewBox(sources=(1, 3), kind="mean"), NewBox(sources=(2, 4), kind="mean")], "0 core:(1-2)x2"
    ),
    "scaled": (2, [NewBox(sources=(0,), kind="scaled"), *copies(1, 1)], None),
    "nested": (
        9, copies(*range(9)), "outer:(0-3 inner:(4-6 deep:(7)x3)x2 8)x4 one:(2)x2[read=everything, update=concat]"
    ),
    "rows": (3, copies(0, 1, 2), "(0)x2 (1)x2 (2)x2"),
    "tall": (80, copies(*range(80), *range(40, 80)), None),
    "one": (1, copies(0), None),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_pictures_are_readable(name: str) -> None:
    old, new, plan = PICTURES[name]
    assert_readable(layers_figure(old, new, plan=plan, title=name))


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_line_leads_from_every_source(name: str) -> None:
    old, new, plan = PICTURES[name]
    axes = layers_figure(old, new, plan=plan).axes[0]
    (lines,) = axes.findobj(LineCollection)
    ends = [(int(start[1]), int(end[1])) for start, end in lines.get_segments()]
    assert ends == [(source, number) for number, box in enumerate(new) for source in box.sources]


def test_boxes_show_how_layers_start() -> None:
    from matplotlib.colors import to_rgba

    old, new, _ = PICTURES["grown"]
    axes = layers_figure(old, [*new, NewBox(sources=(0, 3), kind="mean")]).axes[0]
    drawn = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    left, right = drawn[:old], drawn[old:]
    assert [bool(box.get_hatch()) for box in right] == [False, False, True, False, False, False]
    assert right[0].get_facecolor() == left[0].get_facecolor() and right[3].get_facecolor() == left[2].get_facecolor()
    mixed = [(a + b) / 2 for a, b in zip(left[0].get_facecolor(), left[3].get_facecolor(), strict=True)]
    assert right[5].get_facecolor() == pytest.approx(mixed)
    lonely = layers_figure(3, copies(0, 2)).axes[0].patches[1]
    assert lonely.get_facecolor() == to_rgba(GONE)


def test_words_say_what_is_drawn() -> None:
    old, new, plan = PICTURES["tied"]
    texts = {text for text, _ in boxes(layers_figure(old, new, plan=plan))}
    assert {"old: 6", "new: 3", "core x2", "6 layers become 3, 5 visits", "mean of several", "left out"} <= texts
    assert "starts as the identity" not in texts


def test_files_are_png_and_the_same_each_time(tmp_path: Path) -> None:
    old, new, plan = PICTURES["tied"]
    first, second = (layers_picture(old, new, tmp_path / f"{name}.png", plan=plan).read_bytes() for name in "ab")
    assert first.startswith(b"\x89PNG") and first == second


@pytest.mark.parametrize(
    ("old", "new", "plan", "message"),
    [
        (0, copies(0), None, "old and new layers"),
        (3, [], None, "old and new layers"),
        (3, copies(3), None, "sources among the 3 old ones"),
        (3, [NewBox(sources=())], None, "sources among the 3 old ones"),
    ],
)
def test_bad_layers(old: int, new: list[NewBox], plan: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        layers_picture(old, new, tmp_path / "a.png", plan=plan)
    with pytest.raises(PlanError):
        layers_picture(2, copies(0, 1), tmp_path / "a.png", plan="0-2")
    assert list(tmp_path.iterdir()) == []

"""Plans drawn as ASCII."""

from __future__ import annotations

import pytest

from loopwise.plan import Plan
from loopwise.plots import plan_text


def test_a_loop_is_a_box() -> None:
    assert plan_text("0-1 core:(2-5)x8[read=e, update=concat] 6").splitlines() == [
        "layers 0-1                             slots 0-1",
        "+- core x8 [read=e, update=concat] -+",
        "|  layers 2-5                       |  slots 2-33",
        "+-----------------------------------+",
        "layer 6                                slot 34",
    ]


def test_nested_loops_are_boxes_in_boxes() -> None:
    assert plan_text("a:(0-1 b:(2-3)x2[norm=every])x3 4[x=y]").splitlines() == [
        "+- a x3 --------------------+",
        "|  layers 0-1               |  slots 0-17",
        "|  +- b x2 [norm=every] -+  |",
        "|  |  layers 2-3         |  |",
        "|  +---------------------+  |",
        "+---------------------------+",
        "layer 4 [x=y]                  slot 18",
    ]


@pytest.mark.parametrize("plan", ["0", "0-9 5-14", "(((0)x2)x2)x2 long_name:(1-2)x3[a=b]", "5x3", "0-2 4 (3)x2 9"])
def test_lines_are_ascii_and_boxes_are_closed(plan: str) -> None:
    lines = plan_text(plan).splitlines()
    assert "\n".join(lines).isascii()
    assert all(line == line.rstrip() for line in lines)
    assert "".join(lines).count("+") == 4 * sum(line.count("+- ") for line in lines)
    # The ranges on the right number every slot once.
    ranges = [line.rsplit("slot", 1)[1].lstrip("s ") for line in lines if "slot" in line]
    slots = [n for text in ranges for n in range(int(text.split("-")[0]), int(text.split("-")[-1]) + 1)]
    assert slots == list(range(Plan.parse(plan).num_slots))


def test_plan_and_text_draw_alike() -> None:
    assert plan_text(Plan.parse("0 (1)x2")) == plan_text("0 (1)x2")

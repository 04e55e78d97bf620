"""The plan as text."""

from __future__ import annotations

import pytest

from loopwise import Plan
from loopwise.cli.draw import draw_plan

NESTED = """\
0-1
┌ outer x3  [read=e, update=concat]
│ 2
│ ┌ x2
│ │ 3-4
│ └
└
5"""


@pytest.mark.parametrize(
    ("plan", "drawn"),
    [("0-9", "0-9"), ("3 0", "3\n0"), ("0-1 outer:(2 (3-4)x2)x3[read=e, update=concat] 5", NESTED)],
)
def test_draw(plan: str, drawn: str) -> None:
    assert draw_plan(Plan.parse(plan)) == drawn

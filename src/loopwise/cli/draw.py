"""A plan as lines of text: loops are boxes, one inside the other."""

from __future__ import annotations

from collections.abc import Iterator

from loopwise.plan import Plan
from loopwise.plan.nodes import Loop, Node


def draw_plan(plan: Plan) -> str:
    """Draw a plan, one line per span and two more per loop.

    `0-1 core:(2-5)x8[read=e] 6-7` gives::

        0-1
        ┌ core x8  [read=e]
        │ 2-5
        └
        6-7
    """
    return "\n".join(_lines(plan.nodes))


def _lines(nodes: tuple[Node, ...]) -> Iterator[str]:
    for node in nodes:
        notes = f"  [{', '.join(f'{key}={value}' for key, value in node.annotations)}]" if node.annotations else ""
        if isinstance(node, Loop):
            yield "┌ " + " ".join(([node.name] if node.name else []) + [f"x{node.count}"]) + notes
            yield from (f"│ {line}" for line in _lines(node.body))
            yield "└"
        else:
            yield span_text(node.first, node.last) + notes


def span_text(first: int, last: int) -> str:
    """`3` or `3-7`."""
    return str(first) if first == last else f"{first}-{last}"

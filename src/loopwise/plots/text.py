"""A plan as lines of ASCII: loops are boxes, one inside the other."""

from __future__ import annotations

from collections.abc import Iterator

from loopwise.plan import Loop, Plan, Span


def plan_text(plan: Plan | str) -> str:
    """Draw a plan for a terminal, top to bottom in visit order.

    `0-1 core:(2-5)x8[read=e] 6-7` gives::

        layers 0-1              slots 0-1
        +- core x8 [read=e] -+
        |  layers 2-5        |  slots 2-33
        +--------------------+
        layers 6-7              slots 34-35

    Slots are numbered in visit order from 0; a loop's slots are named beside its first line inside.

    Raises:
        PlanError: the text is no plan.
    """
    plan = Plan.parse(plan)
    rows: list[tuple[str, str]] = []
    start = 0
    for node in plan.nodes:
        lines = list(_lines(node))
        slots = f"slot{'s' if node.num_slots > 1 else ''} {_range(start, start + node.num_slots - 1)}"
        beside = 1 if isinstance(node, Loop) else 0
        rows += [(line, slots if i == beside else "") for i, line in enumerate(lines)]
        start += node.num_slots
    width = max(len(line) for line, _ in rows)
    return "\n".join(f"{line:<{width}}  {slots}".rstrip() for line, slots in rows)


def node_title(node: Span | Loop) -> str:
    """What is written on a node: `layers 2-5`, `core x8 [read=e]`."""
    if isinstance(node, Loop):
        title = f"{node.name} x{node.count}" if node.name else f"x{node.count}"
    else:
        title = f"layer{'s' if node.num_slots > 1 else ''} {_range(node.first, node.last)}"
    notes = ", ".join(f"{key}={value}" for key, value in node.annotations)
    return f"{title} [{notes}]" if notes else title


def _lines(node: Span | Loop) -> Iterator[str]:
    title = node_title(node)
    if isinstance(node, Span):
        yield title
        return
    body = [line for child in node.body for line in _lines(child)]
    width = max(len(title), *(len(line) for line in body))
    yield f"+- {title} {'-' * (width - len(title))}-+"
    yield from (f"|  {line:<{width}}  |" for line in body)
    yield f"+-{'-' * (width + 2)}-+"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"

"""Plan: the order in which the layers of a decoder are visited."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeGuard

from loopwise.plan.errors import PlanError, quote_plan_text
from loopwise.plan.grammar import parse_nodes, print_nodes, printed_pieces
from loopwise.plan.nodes import (
    ImmutablePlanPart,
    Loop,
    Node,
    Slot,
    Span,
    check_loop_count,
    check_nodes,
    check_num_slots,
    plan_integer,
    visit_slots,
    walk_nodes,
)


@dataclass(frozen=True, repr=False)
class Plan(ImmutablePlanPart):
    """A tuple of spans and loops; immutable, hashable, equal when the nodes are equal. `str(plan)` parses back to it.

    Two plans with equal `layers` need not be equal: `(5)x2` and `5 5` have different slot keys. Every method that makes
    a plan raises PlanError when the result would be empty, name two loops alike or pass the caps of `nodes`.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self):
        object.__setattr__(self, "nodes", check_nodes(self.nodes, "a plan"))
        check_num_slots(sum(node.num_slots for node in self.nodes))
        names: set[str] = set()
        for name in (loop.name for loop in self._all_loops if loop.name is not None):
            if name in names:
                raise PlanError(f"the loop name '{quote_plan_text(name)[0]}' is used twice")
            names.add(name)

    @staticmethod
    def parse(text: str | Plan) -> Plan:
        """Read plan text (see `grammar`); a Plan is returned as it is. PlanError points at the character at fault."""
        return text if isinstance(text, Plan) else Plan(parse_nodes(text))

    @staticmethod
    def identity(num_layers: int) -> Plan:
        """Layers 0 to num_layers - 1, once each."""
        num_layers = plan_integer(num_layers, "the number of layers")
        if num_layers < 1:
            raise PlanError("a plan needs at least one layer")
        return Plan((Span(0, num_layers - 1),))

    @staticmethod
    def from_layers(layers: Iterable[int]) -> Plan:
        """The flat plan that visits `layers` in this order; runs of consecutive layers become one span."""
        nodes: list[Node] = []
        if not isinstance(layers, Iterable):
            raise PlanError(f"layers must be a sequence of integers, got {type(layers).__name__}")
        for layer in layers:
            add_node(nodes, Span(layer, layer))
        return Plan(tuple(nodes))

    @staticmethod
    def from_json(text: str) -> Plan:
        """The inverse of `to_json`."""
        return Plan.parse(text)

    def to_json(self) -> str:
        """A JSON value that describes the plan: its text."""
        return str(self)

    def __str__(self) -> str:
        return print_nodes(self.nodes)

    def __repr__(self) -> str:
        return f"Plan.parse({str(self)!r})"

    def __reduce__(self):
        return Plan, (self.nodes,)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All visits in order; computed once."""
        return tuple(visit_slots(self.nodes))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layer of every visit, in order."""
        return tuple(slot.layer for slot in self.slots)

    @cached_property
    def unique_layers(self) -> tuple[int, ...]:
        """The layers visited at least once, ascending."""
        spans = (node for node in walk_nodes(self.nodes) if isinstance(node, Span))
        return tuple(sorted({layer for span in spans for layer in range(span.first, span.last + 1)}))

    @property
    def num_slots(self) -> int:
        """Number of visits, known without unrolling."""
        return sum(node.num_slots for node in self.nodes)

    @cached_property
    def _all_loops(self) -> tuple[Loop, ...]:
        return tuple(node for node in walk_nodes(self.nodes) if isinstance(node, Loop))

    @property
    def loops(self) -> dict[str, Loop]:
        """The named loops in reading order."""
        return {loop.name: loop for loop in self._all_loops if loop.name is not None}

    @property
    def counts(self) -> dict[str, int]:
        """The repeat count of every named loop."""
        return {name: loop.count for name, loop in self.loops.items()}

    def node(self, position: tuple[int, ...]) -> Node:
        """The node at a path of child indices; the position of a slot leads to its span."""
        try:
            node = self.nodes[position[0]]
            for depth, index in enumerate(position[1:], start=2):
                if isinstance(node, Loop):
                    node = node.body[index]
                elif depth < len(position) or not 0 <= index < node.num_slots:
                    raise IndexError
        except (IndexError, TypeError):
            raise PlanError(f"the plan has no node at position {position!r}") from None
        return node

    def annotations(self, slot: Slot) -> dict[str, str]:
        """The annotations that hold at a slot: those of its loops and its span, where the inner one wins."""
        merged: dict[str, str] = {}
        for depth in range(1, len(slot.position)):
            merged.update(self.node(slot.position[:depth]).annotations)
        return merged

    def validate(self, num_layers: int) -> Plan:
        """The plan itself; PlanError that points at the first span outside of 0 to num_layers - 1."""
        start = 0
        for piece, span in printed_pieces(self.nodes):
            if span is not None and span.last >= num_layers:
                layer = max(span.first, num_layers)
                reason = f"layer {layer} does not exist, the model has layers 0-{num_layers - 1}"
                raise PlanError(reason, text=str(self), position=start)
            start += len(piece)
        return self

    def with_loops(self, counts: int | Mapping[str, int] | None = None, /, **named: int) -> Plan:
        """The plan with other repeat counts: `with_loops(core=4)`, `with_loops({"core": 4})` or `with_loops(4)`.

        A bare number is meant for the only loop of the plan, named or not, or else for the loop named `core`.
        Raises PlanError when there is no such loop or a count is not a positive integer.
        """
        if counts is None or isinstance(counts, Mapping):
            wanted = {name: check_loop_count(count) for name, count in {**(counts or {}), **named}.items()}
            for name in wanted:
                self._check_loop_exists(name)
            return Plan(_recount_loops(self.nodes, lambda loop: wanted.get(loop.name or "", loop.count)))
        if named:
            raise PlanError("give either one loop count or counts by name, not both")
        count = check_loop_count(counts)
        if len(self._all_loops) == 1:
            return Plan(_recount_loops(self.nodes, lambda loop: count))
        if "core" in self.loops:
            return Plan(_recount_loops(self.nodes, lambda loop: count if loop.name == "core" else loop.count))
        if not self._all_loops:
            raise PlanError("the plan has no loop; write one, for example 0-1 core:(2-5)x4 6-7")
        raise PlanError(f"the plan has {len(self._all_loops)} loops and none is named core; set counts by name")

    def capped(self, limit: int) -> Plan:
        """The plan with no loop run more than `limit` times: the same transitions between layers, in fewer visits."""
        return Plan(_recount_loops(self.nodes, lambda loop: min(loop.count, limit)))

    def _check_loop_exists(self, name: Any) -> None:
        loops = self.loops
        if name in loops:
            return
        if not loops:
            raise PlanError("the plan has no named loop; name one, for example core:(2-5)x4")
        near = difflib.get_close_matches(str(name), loops, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {quote_plan_text(', '.join(loops))[0]}"
        raise PlanError(f"the plan has no loop named '{quote_plan_text(str(name))[0]}'; {hint}")

    def canonical(self) -> Plan:
        """The normal form: same visits and same annotations at each, as few nodes as possible.

        Plain spans that continue each other are merged, loops that only group (no name, no annotation, count 1) are
        dissolved, a plain loop over nothing but a plain loop is one loop, annotations are sorted by key. Slot keys
        change where nodes do.
        """
        return Plan(_canonical_nodes(self.nodes))


def add_node(nodes: list[Node], node: Node) -> None:
    """Append `node`, or prolong the last span when both have no annotations and the layers go on."""
    last = nodes[-1] if nodes else None
    if isinstance(node, Span) and isinstance(last, Span) and not node.annotations and not last.annotations:
        if node.first == last.last + 1:
            nodes[-1] = Span(last.first, node.last)
            return
    nodes.append(node)


def _recount_loops(nodes: tuple[Node, ...], count_of: Callable[[Loop], int]) -> tuple[Node, ...]:
    return tuple(
        replace(node, body=_recount_loops(node.body, count_of), count=count_of(node))
        if isinstance(node, Loop)
        else node
        for node in nodes
    )


def _is_plain_loop(node: Node) -> TypeGuard[Loop]:
    return isinstance(node, Loop) and node.name is None and not node.annotations


def _canonical_nodes(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    result: list[Node] = []
    for node in nodes:
        node = replace(node, annotations=tuple(sorted(node.annotations)))
        if isinstance(node, Loop):
            body, count = _canonical_nodes(node.body), node.count
            only = body[0] if len(body) == 1 else None
            if _is_plain_loop(node) and only is not None and _is_plain_loop(only):
                body, count = only.body, count * only.count
            node = replace(node, body=body, count=count)
        for part in node.body if _is_plain_loop(node) and node.count == 1 else (node,):
            add_node(result, part)
    return tuple(result)

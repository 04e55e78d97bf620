"""The parts of a plan: spans of layers, loops over them, and the slots that they unroll to."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loopwise.plan.errors import PlanError, quote_plan_text

MAX_LAYER = 999_999
MAX_SLOTS = 100_000
MAX_LOOP_DEPTH = 32

Annotations: TypeAlias = tuple[tuple[str, str], ...]

PLAN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
# Read as a repeat count by a person, whatever the grammar makes of it.
_PLAN_COUNT_LOOKALIKE = re.compile(r"[xX][0-9]+")


def plan_integer(value: Any, what: str) -> int:
    """`value` as an int; PlanError when it is not an integer (a bool is not one)."""
    if isinstance(value, bool):
        raise PlanError(f"{what} must be an integer, got {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise PlanError(f"{what} must be an integer, got {type(value).__name__}") from None


def check_layer(layer: Any) -> int:
    """`layer` as an int between 0 and MAX_LAYER, else PlanError."""
    layer = plan_integer(layer, "a layer")
    if not 0 <= layer <= MAX_LAYER:
        raise PlanError(f"a layer must be between 0 and {MAX_LAYER}, got {_plan_number_text(layer)}")
    return layer


def check_loop_count(count: Any) -> int:
    """`count` as an int between 1 and MAX_SLOTS, else PlanError."""
    count = plan_integer(count, "a loop count")
    if not 1 <= count <= MAX_SLOTS:
        raise PlanError(f"a loop count must be between 1 and {MAX_SLOTS}, got {_plan_number_text(count)}")
    return count


def check_loop_name(name: Any) -> str:
    """`name` if it is an identifier that nobody can take for a count such as `x8`, else PlanError."""
    if not isinstance(name, str) or not PLAN_NAME.fullmatch(name):
        raise PlanError(f"a loop name is a letter or _ and then letters, digits, _ or -, got {_plan_value_text(name)}")
    if _PLAN_COUNT_LOOKALIKE.fullmatch(name):
        raise PlanError(f"the loop name {_plan_value_text(name)} looks like a count; choose another name")
    return name


def check_annotations(annotations: Any) -> Annotations:
    """A mapping or pairs of key and value as a tuple of pairs in the given order; PlanError on bad or repeated keys."""
    items = annotations.items() if isinstance(annotations, Mapping) else annotations
    try:
        pairs = tuple((key, value) for key, value in items)
    except (TypeError, ValueError):
        raise PlanError("annotations must be a mapping from keys to text") from None
    seen = set()
    for key, value in pairs:
        if not isinstance(key, str) or not PLAN_NAME.fullmatch(key):
            raise PlanError(f"an annotation key must be an identifier, got {_plan_value_text(key)}")
        if key in seen:
            raise PlanError(f"the annotation {_plan_value_text(key)} is given twice")
        if not isinstance(value, str):
            raise PlanError(f"the annotation {_plan_value_text(key)} must be text, got {type(value).__name__}")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise PlanError(f"the annotation {_plan_value_text(key)} holds half of a surrogate pair, which is not text")
        seen.add(key)
    return pairs


def check_num_slots(num_slots: int) -> int:
    """`num_slots` if it is at most MAX_SLOTS, else PlanError."""
    if num_slots > MAX_SLOTS:
        raise PlanError(f"the plan makes {num_slots} visits of layers, more than the {MAX_SLOTS} allowed")
    return num_slots


def check_nodes(nodes: Any, what: str) -> tuple[Node, ...]:
    """`nodes` as a non-empty tuple of spans and loops, else PlanError."""
    try:
        nodes = tuple(nodes)
    except TypeError:
        raise PlanError(f"{what} must be a sequence of spans and loops, got {type(nodes).__name__}") from None
    for node in nodes:
        if not isinstance(node, (Span, Loop)):
            raise PlanError(f"{what} may hold only spans and loops, got {type(node).__name__}")
    if not nodes:
        raise PlanError(f"{what} is empty; it must visit at least one layer")
    return nodes


class ImmutablePlanPart:
    """Copies of an immutable value are the value itself, so copying a model that holds a plan costs nothing."""

    __slots__ = ()

    def __copy__(self):
        return self

    def __deepcopy__(self, memo: dict):
        return self


@dataclass(frozen=True)
class Span(ImmutablePlanPart):
    """Layers `first` to `last`, both included, visited once each in ascending order."""

    first: int
    last: int
    annotations: Annotations = ()

    def __post_init__(self):
        first, last = check_layer(self.first), check_layer(self.last)
        if first > last:
            raise PlanError(f"the range {first}-{last} runs backwards; write {last}-{first} or list single layers")
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "last", last)
        object.__setattr__(self, "annotations", check_annotations(self.annotations))

    @property
    def num_slots(self) -> int:
        """Number of visits."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Loop(ImmutablePlanPart):
    """`body` visited `count` times in a row. `num_slots` counts visits, `depth` nested loops, itself included."""

    body: tuple[Node, ...]
    count: int = 1
    name: str | None = None
    annotations: Annotations = ()
    num_slots: int = field(init=False, repr=False, compare=False)
    depth: int = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        body, count = check_nodes(self.body, "a loop"), check_loop_count(self.count)
        depth = 1 + max(node.depth if isinstance(node, Loop) else 0 for node in body)
        if depth > MAX_LOOP_DEPTH:
            raise PlanError(f"loops are nested more than {MAX_LOOP_DEPTH} deep")
        num_slots = check_num_slots(count * sum(node.num_slots for node in body))
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "name", None if self.name is None else check_loop_name(self.name))
        object.__setattr__(self, "annotations", check_annotations(self.annotations))
        object.__setattr__(self, "num_slots", num_slots)
        object.__setattr__(self, "depth", depth)


Node: TypeAlias = Span | Loop


@dataclass(frozen=True, slots=True)
class Slot(ImmutablePlanPart):
    """One visit of one layer, with a time state of its own.

    `position` is the path of child indices from the top of the plan; its last element is the offset inside the span.
    `iterations` holds one index per enclosing loop, outermost first. The layer alone does not identify a visit
    (`0-9 5-14` visits layers 5 to 9 twice), the pair of the two does.
    """

    position: tuple[int, ...]
    iterations: tuple[int, ...]
    layer: int

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What identifies the slot, whatever the counts of other loops are."""
        return self.position, self.iterations


def visit_slots(
    nodes: tuple[Node, ...], position: tuple[int, ...] = (), iterations: tuple[int, ...] = ()
) -> Iterator[Slot]:
    """The meaning of a plan: its slots in the order in which they are visited."""
    for index, node in enumerate(nodes):
        here = (*position, index)
        if isinstance(node, Span):
            for offset in range(node.num_slots):
                yield Slot((*here, offset), iterations, node.first + offset)
        else:
            for iteration in range(node.count):
                yield from visit_slots(node.body, here, (*iterations, iteration))


def walk_nodes(nodes: tuple[Node, ...]) -> Iterator[Node]:
    """Every node of the tree once, in reading order."""
    for node in nodes:
        yield node
        if isinstance(node, Loop):
            yield from walk_nodes(node.body)


def _plan_number_text(number: int) -> str:
    # Python refuses to print integers of several thousand digits.
    return str(number) if abs(number) < 10**18 else "a huge number"


def _plan_value_text(value: Any) -> str:
    return f"'{quote_plan_text(value)[0]}'" if isinstance(value, str) else type(value).__name__

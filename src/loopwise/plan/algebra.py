"""Plans from plans. Where a result needs other layers than the old model has, an `Edit` says where they come from.

A flat index counts visits from 0 in the order of `plan.layers`. Every function takes a Plan or its text, returns
something new, and raises PlanError when the result would not be a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from loopwise.plan.errors import PlanError
from loopwise.plan.nodes import Loop, Node, Span, check_loop_count, plan_integer
from loopwise.plan.plans import Plan, add_node


@dataclass(frozen=True)
class Edit:
    """A plan for a new model and the layers it is made of: new layer n starts as a copy of old layer `sources[n]`."""

    plan: Plan
    sources: tuple[int, ...]

    def __post_init__(self):
        sources = tuple(plan_integer(layer, "a source layer") for layer in self.sources)
        if any(layer < 0 for layer in sources):
            raise PlanError("a source layer must not be negative")
        object.__setattr__(self, "sources", sources)
        self.plan.validate(len(sources))

    def then(self, later: Edit) -> Edit:
        """This edit followed by `later`, as one edit of the model that this one starts from."""
        if max(later.sources) >= len(self.sources):
            raise PlanError(f"the later edit reads layer {max(later.sources)}, the earlier makes {len(self.sources)}")
        return Edit(later.plan, tuple(self.sources[layer] for layer in later.sources))


def unroll(plan: Plan | str) -> Plan:
    """The same visits without any loop; every visit keeps the annotations that held for it."""
    nodes: list[Node] = []
    for span in _unrolled_spans(Plan.parse(plan).nodes, {}):
        add_node(nodes, span)
    return Plan(tuple(nodes))


def loop(plan: Plan | str, first: int, last: int, count: int, name: str | None = None) -> Plan:
    """Make the visits of layers `first`, `first` + 1, ..., `last` a loop that runs `count` times.

    The visits must follow each other at the top level, and once only; a whole loop may be among them.
    """
    plan, wanted = Plan.parse(plan), Span(first, last)
    places = list(_top_level_runs(plan, wanted))
    if not places:
        reason = f"layers {first}-{last} are not visited one after the other at the top level"
        raise PlanError(reason, text=str(plan))
    if len(places) > 1:
        raise PlanError(f"layers {first}-{last} are visited at {len(places)} places; use repeat, which takes indices")
    return _wrap_visits(plan, *places[0], count, name)


def repeat(plan: Plan | str, start: int, stop: int, times: int, name: str | None = None) -> Plan:
    """Run the visits with flat index `start` to `stop` - 1 `times` times in all, as a loop; once changes nothing.

    With layers L: L[:start] + L[start:stop] * times + L[stop:]. A loop that `start` or `stop` cuts through is unrolled.
    Repeating a block of a trained decoder without training is "repeat your self" (RYS) up-scaling.
    """
    plan = Plan.parse(plan)
    start, stop = plan_integer(start, "the start of a repeat"), plan_integer(stop, "the end of a repeat")
    if not 0 <= start < stop <= plan.num_slots:
        raise PlanError(f"visits {start} to {stop - 1} are not a part of the {plan.num_slots} visits of the plan")
    return plan if check_loop_count(times) == 1 else _wrap_visits(plan, start, stop, times, name)


def insert(plan: Plan | str, at: int, what: Plan | str | int | Iterable[int]) -> Plan:
    """Add visits before the visit with flat index `at` (at the end when it is the number of visits).

    `what` is a plan, its text, one layer or a sequence of layers. A loop that `at` cuts through is unrolled.
    """
    plan, at = Plan.parse(plan), plan_integer(at, "the place of an insertion")
    if not 0 <= at <= plan.num_slots:
        raise PlanError(f"cannot insert at {at}: the plan has {plan.num_slots} visits")
    if isinstance(what, (Plan, str)):
        added = Plan.parse(what)
    else:
        added = Plan.from_layers(what if isinstance(what, Iterable) else [what])
    before, after = _cut_nodes(plan.nodes, at)
    return Plan(before + added.nodes + after)


def drop(plan: Plan | str, layers: int | Iterable[int]) -> Plan:
    """Remove every visit of `layers`; loops that become empty go too. The other layers keep their numbers."""
    plan = Plan.parse(plan)
    gone = {plan_integer(layer, "a layer") for layer in (layers if isinstance(layers, Iterable) else [layers])}
    missing = gone.difference(plan.unique_layers)
    if missing:
        raise PlanError(f"cannot drop layer {min(missing)}: the plan does not visit it")
    nodes = _without_layers(plan.nodes, gone)
    if not nodes:
        raise PlanError("dropping these layers leaves nothing to visit")
    return Plan(nodes)


def untie(plan: Plan | str) -> Edit:
    """Give every visit a layer of its own: the identity plan, whose layer n comes from the layer of visit n."""
    plan = Plan.parse(plan)
    return Edit(Plan.identity(plan.num_slots), plan.layers)


def tie(plan: Plan | str, target: Plan | str) -> Edit:
    """Share layers between the visits of `plan` so that `target` results; both must have the same number of visits.

    Visit n of `plan` becomes visit n of `target`. All visits of one target layer become one layer, which comes from the
    first of them. The layers of the result are those of `target`, renumbered without gaps in the same order. Thus
    `tie(untie(p).plan, p).plan == p` when p visits all of 0, 1, ..., k, and the sources are the first visit of each.
    """
    plan, target = Plan.parse(plan), Plan.parse(target)
    if plan.num_slots != target.num_slots:
        raise PlanError(f"cannot tie {plan.num_slots} visits to a plan with {target.num_slots}")
    first_visit: dict[int, int] = {}
    for old, new in zip(plan.layers, target.layers, strict=True):
        first_visit.setdefault(new, old)
    number = {layer: index for index, layer in enumerate(target.unique_layers)}
    return Edit(Plan(_renumbered(target.nodes, number)), tuple(first_visit[layer] for layer in target.unique_layers))


def _unrolled_spans(nodes: tuple[Node, ...], outer: dict[str, str]) -> Iterator[Span]:
    for node in nodes:
        merged = {**outer, **dict(node.annotations)}
        if isinstance(node, Span):
            yield Span(node.first, node.last, tuple(merged.items()))
        else:
            for _ in range(node.count):
                yield from _unrolled_spans(node.body, merged)


def _cut_nodes(nodes: tuple[Node, ...], at: int) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The nodes before and from flat index `at`; the span or loop that it falls into is split or unrolled."""
    for index, node in enumerate(nodes):
        if at <= 0:
            return nodes[:index], nodes[index:]
        if at < node.num_slots:
            if isinstance(node, Span):
                middle = node.first + at
                head, tail = (replace(node, last=middle - 1),), (replace(node, first=middle),)
            else:
                head, tail = _cut_nodes(tuple(_unrolled_spans((node,), {})), at)
            return nodes[:index] + head, tail + nodes[index + 1 :]
        at -= node.num_slots
    return nodes, ()


def _wrap_visits(plan: Plan, start: int, stop: int, count: int, name: str | None) -> Plan:
    head, after = _cut_nodes(plan.nodes, stop)
    before, body = _cut_nodes(head, start)
    return Plan((*before, Loop(body, count, name), *after))


def _top_level_runs(plan: Plan, wanted: Span) -> Iterator[tuple[int, int]]:
    """Flat (start, stop) of every place at the top level where the layers of `wanted` follow each other."""
    units: list[tuple[int, int, int]] = []  # lowest layer, highest layer, number of visits
    for node in plan.nodes:
        if isinstance(node, Span):
            units += [(layer, layer, 1) for layer in range(node.first, node.last + 1)]
        else:
            layers = Plan((node,)).unique_layers
            gapless = layers[-1] - layers[0] + 1 == len(layers)
            units.append((layers[0], layers[-1] if gapless else -1, node.num_slots))
    start = 0
    for index, (low, _, num_slots) in enumerate(units):
        if low == wanted.first:
            stop, expected = start, low
            for unit_low, unit_high, unit_slots in units[index:]:
                if unit_low != expected or unit_high > wanted.last:
                    break
                stop, expected = stop + unit_slots, unit_high + 1
                if unit_high == wanted.last:
                    yield start, stop
                    break
        start += num_slots


def _without_layers(nodes: tuple[Node, ...], gone: set[int]) -> tuple[Node, ...]:
    kept: list[Node] = []
    for node in nodes:
        if isinstance(node, Loop):
            body = _without_layers(node.body, gone)
            kept += [replace(node, body=body)] if body else []
            continue
        first = node.first
        for layer in range(node.first, node.last + 2):
            if layer in gone or layer > node.last:
                kept += [replace(node, first=first, last=layer - 1)] if first < layer else []
                first = layer + 1
    return tuple(kept)


def _renumbered(nodes: tuple[Node, ...], number: Mapping[int, int]) -> tuple[Node, ...]:
    # The layers of a span are all visited, so they stay neighbours under numbers without gaps.
    return tuple(
        replace(node, body=_renumbered(node.body, number))
        if isinstance(node, Loop)
        else replace(node, first=number[node.first], last=number[node.last])
        for node in nodes
    )

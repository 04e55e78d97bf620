"""The operators of surgery on trained models: repeat, reorder, prune, tie, untie, make recursive, retrofit.

L is the number of layers of the old model. Layers and visits count from 0, the end of a range is exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from loopwise.edit.maps import DepthEdit, NewLayer, Relaxation
from loopwise.edit.operators import DepthOperator, copies_of, rearranged, same
from loopwise.plan import Loop, Plan, Span, algebra

Sharing = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]


@dataclass(frozen=True, kw_only=True)
class Repeat(DepthOperator):
    """Some visits several times ("repeat your self"): `i..j-1`; RYS's (i, j) is `repeat(i, j, 2)`.

    Attributes:
        i, j: first visit, and the one after the last.
        times: how often in all, at least 2.
    """

    kind: ClassVar[str | None] = "edit.repeat"
    i: int
    j: int
    times: int = 2

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        self.require(self.times >= 2, "times", "must be at least 2")

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """The plan with these visits as a loop."""
        layers = same(num_layers)
        return DepthEdit(
            before=plan,
            num_layers=num_layers,
            plan=algebra.repeat(plan, self.i, self.j, self.times),
            layers=layers,
        )


@dataclass(frozen=True, kw_only=True)
class Order(DepthOperator):
    """The layers in any order: an explicit list, such as passthrough merges and layer lists of other tools give.

    Attributes:
        layers: old layer of every new one; old layers may be missing, and come several times.
        zero: numbers of the new layers whose branches start at zero.
        scale: "NUMBER FILTER FACTOR" for tensors of the new layer NUMBER that are multiplied; FILTER is a part of the
            tensor's name, or `*`.
    """

    kind: ClassVar[str | None] = "edit.order"
    layers: tuple[int, ...]
    zero: tuple[int, ...] = ()
    scale: tuple[str, ...] = ()

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """The identity plan over the listed layers."""
        self.require(len(self.layers) > 0, "layers", "names no layer: a model needs at least one")
        bad = [layer for layer in self.layers if not 0 <= layer < num_layers]
        self.require(not bad, "layers", f"names layer {(bad or [0])[0]}, the model has 0 to {num_layers - 1}")
        wrong = [number for number in self.zero if not 0 <= number < len(self.layers)]
        self.require(not wrong, "zero", f"names a layer that is not among the {len(self.layers)} new ones")
        factors = self._factors()
        layers = [
            NewLayer(sources=(layer,), zero=number in self.zero, scale=factors.get(number, ()))
            for number, layer in enumerate(self.layers)
        ]
        return rearranged(self, plan, num_layers, Plan.identity(len(layers)), layers)

    def _factors(self) -> dict[int, tuple[tuple[str, float], ...]]:
        found: dict[int, tuple[tuple[str, float], ...]] = {}
        for rule in self.scale:
            words = rule.split()
            self.require(len(words) == 3, "scale", "must be texts of 'NUMBER FILTER FACTOR'")
            try:
                number, factor = int(words[0]), float(words[2])
            except ValueError:
                raise ValueError(f"edit.order: scale={rule!r} must be 'NUMBER FILTER FACTOR'") from None
            self.require(0 <= number < len(self.layers), "scale", f"names new layer {number}, which does not exist")
            found[number] = (*found.get(number, ()), ("" if words[1] == "*" else words[1], factor))
        return found


@dataclass(frozen=True, kw_only=True)
class Prune(DepthOperator):
    """Leave layers out.

    Attributes:
        layers: which.
    """

    kind: ClassVar[str | None] = "edit.prune"
    layers: tuple[int, ...]

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """The plan without their visits; the others are renumbered. Layers that no visit reaches stay out too."""
        left = algebra.drop(plan, self.layers) if self.layers else plan
        kept = left.unique_layers
        tied = algebra.tie(left, left)
        return DepthEdit(before=plan, num_layers=num_layers, plan=tied.plan, layers=copies_of(kept))


@dataclass(frozen=True, kw_only=True)
class Untie(DepthOperator):
    """A layer of its own for every visit: the function stays, copies may then differ."""

    kind: ClassVar[str | None] = "edit.untie"

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """The identity plan over the visited layers."""
        untied = algebra.untie(plan)
        return DepthEdit(before=plan, num_layers=num_layers, plan=untied.plan, layers=copies_of(untied.sources))


@dataclass(frozen=True, kw_only=True)
class Tie(DepthOperator):
    """Share layers between visits so that a plan results; the inverse of `untie` where the copies are equal.

    Attributes:
        plan: the plan of the new model, with as many visits as the old one has.
        init: "average" takes the mean of the layers that become one, "first" the first of them.
    """

    kind: ClassVar[str | None] = "edit.tie"
    plan: str
    init: Literal["average", "first"] = "average"

    def __post_init__(self) -> None:
        """Check the plan text."""
        super().__post_init__()
        Plan.parse(self.plan)

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """The wanted plan, renumbered without gaps."""
        target = algebra.tie(plan, self.plan).plan
        members: dict[int, list[int]] = {}
        for new, old in zip(target.layers, plan.layers, strict=True):
            if old not in members.setdefault(new, []):
                members[new].append(old)
        ends = {"average": None, "first": 1}[self.init]
        layers = tuple(NewLayer(sources=tuple(members[new][:ends])) for new in sorted(members))
        return DepthEdit(
            before=plan, num_layers=num_layers, plan=target, layers=layers, origins=plan.layers, default="tie"
        )


@dataclass(frozen=True, kw_only=True)
class Recursive(DepthOperator):
    """Make a stack a loop: R passes over K = L / R shared layers (2410.20672, 2507.10524).

    Attributes:
        loops: R, at least 2.
        sharing: which layers become one: "cycle" i, i + K, ...; "sequence" iR, iR + 1, ...; with "middle_" the first
            and the last layer stay on their own, and K = (L - 2) / R.
        init: what a shared layer starts as: "stepwise" (old layers at even distances, the best without relaxation),
            the "average" of those that it replaces (the best with one), or the "lower" or "upper" K layers.
        rank: offsets for every visit, of this rank; 0 has none for matrices, -1 is the full rank. None shares plainly.
    """

    kind: ClassVar[str | None] = "edit.recursive"
    loops: int
    sharing: Sharing = "middle_cycle"
    init: Literal["stepwise", "average", "lower", "upper"] = "stepwise"
    rank: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.loops >= 2, "loops", "must be at least 2")
        self.require(self.rank is None or self.rank >= -1, "rank", "must be at least 0, or -1 for the full rank")

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`core:(0-(K-1))xR`, or `(0)xR (1)xR ...` for "sequence"; with "middle_" between two layers of their own."""
        edge = 1 if self.sharing.startswith("middle_") else 0
        inner = num_layers - 2 * edge
        if inner < self.loops or inner % self.loops:
            what = f"{num_layers} layers" if not edge else f"the {max(inner, 0)} layers between the first and the last"
            raise ValueError(f"edit.recursive: loops={self.loops} does not divide {what}: use a divisor")
        size = inner // self.loops
        if self.sharing.endswith("cycle"):
            groups = [[edge + i + size * r for r in range(self.loops)] for i in range(size)]
            core: list[Any] = [Loop((Span(edge, edge + size - 1),), self.loops, "core")]
        else:
            groups = [[edge + i * self.loops + r for r in range(self.loops)] for i in range(size)]
            core = [Loop((Span(edge + i, edge + i),), self.loops) for i in range(size)]
        ends = ([Span(0, 0)], [Span(edge + size, edge + size)]) if edge else ([], [])
        shared = [NewLayer(sources=self._sources(group, i, edge, size, inner)) for i, group in enumerate(groups)]
        outer = copies_of([0]), copies_of([num_layers - 1])
        layers = (*outer[0], *shared, *outer[1]) if edge else tuple(shared)
        made = rearranged(self, plan, num_layers, Plan((*ends[0], *core, *ends[1])), layers)
        relaxation = None if self.rank is None else Relaxation(rank=None if self.rank == -1 else self.rank)
        return DepthEdit(
            before=plan,
            num_layers=num_layers,
            plan=made.plan,
            layers=made.layers,
            origins=tuple(range(num_layers)),
            relaxation=relaxation,
            default="tie",
        )

    def _sources(self, group: list[int], index: int, edge: int, size: int, inner: int) -> tuple[int, ...]:
        if self.init == "average":
            return tuple(group)
        if self.init == "stepwise":
            return (edge + (round(index * (inner - 1) / (size - 1)) if size > 1 else 0),)
        return (edge + index + (inner - size if self.init == "upper" else 0),)


@dataclass(frozen=True, kw_only=True)
class Retrofit(DepthOperator):
    """Make the middle of a stack a loop with an injection (2511.07384): prelude, core that can run many times, coda.

    The layers before the core that are neither in the prelude nor in it are dropped, as published: `retrofit(4, 8, 4)`
    keeps layers 0-3, 10-17 and 18-21 of 22. With the identity adapter and no layer dropped, one pass is the old model.

    Attributes:
        prelude, core, coda: numbers of layers.
        adapter: the map of (state, input) to the state before every pass: "identity" (keeps the state, learns to read
            the input), "random" (as published, with the first state drawn at random), or "none".
        iterations: passes of the new plan.
    """

    kind: ClassVar[str | None] = "edit.retrofit"
    prelude: int
    core: int
    coda: int
    adapter: Literal["identity", "random", "none"] = "identity"
    iterations: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name, least in (("prelude", 0), ("core", 1), ("coda", 0), ("iterations", 1)):
            self.require(getattr(self, name) >= least, name, f"must be at least {least}")

    def edit(self, plan: Plan, num_layers: int) -> DepthEdit:
        """`0-(p-1) core:(p-(p+c-1))xr ...`."""
        total = self.prelude + self.core + self.coda
        if total > num_layers:
            raise ValueError(f"edit.retrofit: {self.text()} needs {total} layers, the model has {num_layers}")
        after = self.prelude + self.core
        nodes = [Loop((Span(self.prelude, after - 1),), self.iterations, "core")]
        before = [Span(0, self.prelude - 1)] if self.prelude else []
        behind = [Span(after, total - 1)] if self.coda else []
        kept = [*range(self.prelude), *range(num_layers - self.core - self.coda, num_layers)]
        made = rearranged(self, plan, num_layers, Plan((*before, *nodes, *behind)), copies_of(kept))
        loops = {
            "none": (),
            "identity": (("core", {"update": {"kind": "update.concat", "init": "pass_state"}}),),
            "random": (
                ("core", {"state": {"kind": "state.normal", "std": 0.02}, "update": {"kind": "update.concat"}}),
            ),
        }[self.adapter]
        return DepthEdit(
            before=plan, num_layers=num_layers, plan=made.plan, layers=made.layers, loops=loops, default="tie"
        )

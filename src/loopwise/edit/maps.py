"""An edit of depth as data: the plan of the new model, and what each of its layers is made of.

An edit is kept in its *tied* form: `layers` holds every new layer once, `plan` visits them. The other two realisations
follow from it. Materialised, every visit gets a layer of its own (`unrolled`). Aliased, the old model's own tensors are
visited in that order (`alias_plan`), which needs layers that are plain copies.

Nothing here loads torch: edits on disk are planned and carried out without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from loopwise.plan import Plan, Span
from loopwise.plan.nodes import Loop, Node
from loopwise.plan.plans import add_node

Promise = Literal["exact", "tolerance", "none"]


@dataclass(frozen=True, kw_only=True)
class NewLayer:
    """What one layer of the new model starts as.

    Attributes:
        sources: layers of the old model: one is copied, the mean of several is taken tensor by tensor.
        zero: the output projections of its branches start at zero, so that the layer is the identity (LLaMA-Pro,
            2401.02415).
        scale: (filter, factor): a tensor is multiplied by the factor of the first filter that its name contains; the
            empty filter is for all. Not applied on top of `zero`.
    """

    sources: tuple[int, ...]
    zero: bool = False
    scale: tuple[tuple[str, float], ...] = ()

    @property
    def is_copy(self) -> bool:
        """Whether all tensors are those of one old layer, unchanged."""
        return len(self.sources) == 1 and not self.zero and all(factor == 1 for _, factor in self.scale)


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """Every visit of a shared layer gets back a part of what its own old layer had (2410.20672).

    Attributes:
        rank: rank r of the offsets of matrices, from the singular value decomposition of the difference; None is the
            full rank, with which the old function comes back. Other tensors (norms, biases) get the whole difference.
    """

    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class DepthEdit:
    """The result of an operator on a model of `num_layers` layers under the plan `before`.

    Attributes:
        before: the plan of the old model.
        num_layers: layers of the old model.
        plan: the plan of the new one.
        layers: what its layers are made of.
        origins: for every visit of `plan`, the old layer it stands for; what a relaxation gives back.
        relaxation: offsets per visit, None for none.
        loops: components of named loops of the new plan, as in `LoopwiseDecoderConfig.loops`; empty adds none.
        default: the realisation that users of the operator expect.
    """

    before: Plan
    num_layers: int
    plan: Plan
    layers: tuple[NewLayer, ...]
    origins: tuple[int, ...] = ()
    relaxation: Relaxation | None = None
    loops: tuple[tuple[str, Any], ...] = ()
    default: Literal["alias", "tie", "materialize"] = "materialize"

    def __post_init__(self) -> None:
        """Check that plans and layers fit; fill in the origins of visits of plain layers."""
        self.before.validate(self.num_layers)
        self.plan.validate(len(self.layers))
        for layer in self.layers:
            bad = [source for source in layer.sources if not 0 <= source < self.num_layers]
            assert layer.sources and not bad, "operators name layers that exist"
        if not self.origins:
            origins = tuple(self.layers[visited].sources[0] for visited in self.plan.layers)
            object.__setattr__(self, "origins", origins)
        assert len(self.origins) == self.plan.num_slots

    @cached_property
    def promise(self) -> Promise:
        """What holds of the new function: it is the old one ("exact", "tolerance"), or nothing is promised ("none")."""
        visits = [self.layers[visited] for visited in self.plan.layers]
        kept = [layer for layer in visits if not layer.zero]
        if all(layer.is_copy for layer in kept) and tuple(layer.sources[0] for layer in kept) == self.before.layers:
            return "exact"
        is_full = self.relaxation is not None and self.relaxation.rank is None
        return "tolerance" if is_full and self.origins == self.before.layers else "none"

    @property
    def is_copy(self) -> bool:
        """Whether every new layer is a plain copy of an old one, and nothing is added."""
        return all(layer.is_copy for layer in self.layers) and self.relaxation is None and not self.loops

    @property
    def is_same(self) -> bool:
        """Whether the old model's tensors are the new one's: nothing but the plan changes."""
        identity = tuple((n,) for n in range(self.num_layers))
        return self.is_copy and tuple(layer.sources for layer in self.layers) == identity

    def unrolled(self) -> DepthEdit:
        """The same edit with a layer of its own for every visit, under the identity plan.

        Raises:
            ValueError: components of loops, which need the loop.
        """
        if self.loops:
            raise ValueError(f"the loop {self.loops[0][0]!r} has components: it cannot be materialised, use mode 'tie'")
        layers = tuple(self.layers[visited] for visited in self.plan.layers)
        return replace(self, plan=Plan.identity(len(layers)), layers=layers, default="materialize")

    def alias_plan(self) -> Plan:
        """The plan under which the old model, its tensors untouched, does what the new one does.

        Raises:
            ValueError: a new layer that is no plain copy.
        """
        if not self.is_copy:
            raise ValueError("an alias has the old tensors, and this edit makes new ones: use 'tie' or 'materialize'")
        sources = [layer.sources[0] for layer in self.layers]
        return Plan(_renamed(self.plan.nodes, sources))

    def then(self, later: DepthEdit) -> DepthEdit:
        """This edit followed by another one, as one edit of the model that this one starts from.

        Raises:
            ValueError: the two cannot be one, such as a mean of layers that have been zeroed.
        """
        if later.num_layers != len(self.layers) or later.before.layers != self.plan.layers:
            raise ValueError(f"the later edit is of {later.num_layers} layers under {later.before}, not of {self.plan}")
        if self.relaxation is not None or self.loops:
            raise ValueError("an edit that adds offsets or loop components comes last: apply the two one by one")
        first_visit = {visited: self.origins[slot] for slot, visited in reversed(list(enumerate(self.plan.layers)))}
        origins = tuple(first_visit.get(old, self.layers[old].sources[0]) for old in later.origins)
        layers = tuple(_composed(layer, self.layers) for layer in later.layers)
        return replace(later, before=self.before, num_layers=self.num_layers, layers=layers, origins=origins)


def _composed(later: NewLayer, earlier: Sequence[NewLayer]) -> NewLayer:
    made = [earlier[source] for source in later.sources]
    if len(made) == 1:
        zero = made[0].zero or later.zero
        if later.scale and made[0].scale:
            raise ValueError("two edits that scale tensors cannot be one: apply them one by one")
        return replace(made[0], zero=zero, scale=later.scale or made[0].scale)
    if not all(layer.is_copy for layer in made):
        raise ValueError("a mean of layers that an earlier edit has changed cannot be one edit: apply them one by one")
    return replace(later, sources=tuple(layer.sources[0] for layer in made))


def _renamed(nodes: Sequence[Node], sources: Sequence[int]) -> tuple[Node, ...]:
    """The nodes with every layer n replaced by `sources[n]`."""
    renamed: list[Node] = []
    for node in nodes:
        if isinstance(node, Loop):
            renamed.append(replace(node, body=_renamed(node.body, sources)))
            continue
        for layer in range(node.first, node.last + 1):
            add_node(renamed, Span(sources[layer], sources[layer], node.annotations))
    return tuple(renamed)

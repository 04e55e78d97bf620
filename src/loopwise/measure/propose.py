"""Which layers of a trained stack to loop, tie or prune: candidates by published rules, measured on a text.

Every candidate is played as an alias: the model visits its own layers in another order, no weight changes. The best of
each kind on one part of the text is reported with its loss on the other part, because the best of several is flattered
by the rows that chose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from loopwise.measure.arrays import as_lists
from loopwise.measure.candidates import (
    Candidate,
    loop_candidates,
    merged,
    prune_candidates,
    retrofit_candidates,
    tie_block_candidates,
    tie_candidates,
)
from loopwise.measure.influence import Batch, Influence, influence
from loopwise.measure.loss_jump import LossJump, RowLosses, loss_jump, row_losses
from loopwise.measure.similarity import WeightSimilarity, weight_similarity
from loopwise.models.attach import attach, detach
from loopwise.models.hub import layer_list
from loopwise.models.playing import looping_of
from loopwise.plan import Plan

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The best measured edit of a kind.

    Attributes:
        candidate: the edit, and the number it rests on.
        choice: loss before and after on the rows that chose it.
        loss: loss before and after on the other rows.
        tried: candidates it was chosen from.
    """

    candidate: Candidate
    choice: LossJump
    loss: LossJump
    tried: int

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return _candidate_json(self.candidate, self.choice) | {"loss": self.loss.to_json(), "tried": self.tried}


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """What was measured, and what follows.

    Attributes:
        influence: states along depth, on the rows that choose.
        weights: weight similarity.
        measured: every candidate with its loss on the rows that choose.
        proposals: the best of every kind and count.
        notes: what could not be measured, and why.
    """

    influence: Influence
    weights: WeightSimilarity
    measured: tuple[tuple[Candidate, LossJump], ...]
    proposals: tuple[Proposal, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All arrays, candidates and proposals."""
        return {
            "proposals": [proposal.to_json() for proposal in self.proposals],
            "candidates": [_candidate_json(item, jump) for item, jump in self.measured],
            "notes": list(self.notes),
            "influence": self.influence.to_json(),
            "weights": self.weights.to_json(),
        }


def propose(
    model: nn.Module,
    choose: Sequence[Batch],
    report: Sequence[Batch],
    *,
    prune: Sequence[int] | None = None,
    loop: Sequence[int] | None = None,
    tie: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Proposals:
    """Propose edits of a stack of layers that are visited once each.

    Args:
        model: a causal language model; it is left as it was.
        choose: rows that measure the layers and choose among candidates, as in `influence`.
        report: rows that the chosen ones are scored on.
        prune: numbers of layers to leave out; default an eighth. Empty for none, as for the others.
        loop: how often a middle block is to run; default twice.
        tie: how many layers become one; default the smallest number that divides the stack, with or without its ends.
        progress: called before every piece of work with its index, the number of pieces, and what it is.

    Raises:
        ValueError: a single layer, a model that is looped already or cannot be, counts that make no sense.
    """
    num_layers = len(layer_list(model).layers)
    if num_layers < 2:
        raise ValueError(f"{type(model).__name__} has a single layer: there is nothing to choose among")
    looping = looping_of(model)
    if looping is not None and looping.plan.layers != tuple(range(num_layers)):
        raise ValueError(f"this model is looped already ({looping.plan}): proposals are for layers visited once")
    prune = (max(1, num_layers // 8),) if prune is None else prune
    loop = (2,) if loop is None else loop
    tie = _divisors(num_layers)[:1] if tie is None else tie
    check_counts(num_layers, prune, loop, tie)
    say = progress or (lambda *_: None)
    say(0, 0, "weights")
    weights = weight_similarity(model)
    say(0, 0, "hidden states")
    found = influence(model, choose)
    candidates = all_candidates(found, weights, prune, loop, tie)
    groups = list(dict.fromkeys((item.kind, item.count) for item in candidates))
    total = len({item.alias.layers for item in candidates}) + len(groups) + 2
    scorer = _Scorer(model, total, say)
    identity = Plan.identity(num_layers)
    base = scorer.base(identity, choose, "as it is")
    measured = []
    for item in candidates:
        losses = scorer.score(item.alias, choose, item.text)
        if losses is not None:
            measured.append((item, loss_jump(base, losses)))
    scorer.known.clear()
    base = scorer.base(identity, report, "as it is, other rows")
    proposals = []
    for group in groups:
        tried = [pair for pair in measured if (pair[0].kind, pair[0].count) == group]
        if not tried:
            continue
        best, choice = min(tried, key=lambda pair: pair[1].after if math.isfinite(pair[1].after) else math.inf)
        losses = scorer.score(best.alias, report, f"{best.text}, other rows")
        if losses is not None:
            loss = loss_jump(base, losses)
            proposals.append(Proposal(candidate=best, choice=choice, loss=loss, tried=len(tried)))
    return Proposals(
        influence=found,
        weights=weights,
        measured=tuple(measured),
        proposals=tuple(proposals),
        notes=tuple(scorer.notes),
    )


def check_counts(num_layers: int, prune: Sequence[int], loop: Sequence[int], tie: Sequence[int]) -> None:
    """Refuse counts that no edit of so many layers has; `ValueError` names the first."""
    for count in prune:
        if not 1 <= count < num_layers:
            raise ValueError(f"prune {count}: of {num_layers} layers, leave out 1 to {num_layers - 1}")
    for count in loop:
        if count < 2:
            raise ValueError(f"loop {count}: a block that is looped runs at least 2 times")
    for count in tie:
        if count not in _divisors(num_layers):
            known = ", ".join(map(str, _divisors(num_layers)))
            reason = f"divides neither {num_layers} layers nor the {num_layers - 2} between the ends"
            raise ValueError(f"tie {count}: {reason}, use one of {known}")


def all_candidates(
    found: Influence, weights: WeightSimilarity, prune: Sequence[int], loop: Sequence[int], tie: Sequence[int]
) -> list[Candidate]:
    """Every candidate once, by kind and count."""
    split, alike = found.split(), weights.mean()
    items = [item for count in prune for item in prune_candidates(found, count)]
    items += [item for count in loop for item in loop_candidates(found, split, count)]
    items += [item for count in loop[:1] for item in retrofit_candidates(found, split, count)]
    for count in tie:
        items += tie_candidates(found, alike, count)
        items += tie_block_candidates(found, alike, split, count)
    return merged(items)


def _divisors(num_layers: int) -> tuple[int, ...]:
    """How many layers can become one, over the whole stack or without its ends."""
    sizes = [size for size in (num_layers, num_layers - 2) if size > 1]
    return tuple(count for count in range(2, num_layers + 1) if any(size % count == 0 for size in sizes))


class _Scorer:
    """Scores plans of one model, each visit order once."""

    def __init__(self, model: nn.Module, total: int, say: Progress):
        self.model, self.total, self.say = model, total, say
        self.done = 0
        self.known: dict[tuple[int, ...], RowLosses | None] = {}
        self.notes: list[str] = []

    def score(self, plan: Plan, batches: Sequence[Batch], label: str) -> RowLosses | None:
        """Losses under a plan, or None with a note where the model does not run under it."""
        if plan.layers not in self.known:
            self.say(self.done, self.total, label)
            self.done += 1
            try:
                with _under(self.model, plan):
                    self.known[plan.layers] = row_losses(self.model, batches)
            except Exception as error:  # whatever layers say that miss what another was to compute
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.notes.append(f"{label} does not run: {reason}")
                self.known[plan.layers] = None
        return self.known[plan.layers]

    def base(self, plan: Plan, batches: Sequence[Batch], label: str) -> RowLosses:
        """Losses of the model as it is; ValueError where it does not run."""
        losses = self.score(plan, batches, label)
        if losses is None:
            raise ValueError(self.notes[-1])
        return losses


@contextmanager
def _under(model: nn.Module, plan: Plan) -> Iterator[None]:
    looping = looping_of(model)
    if looping is not None:
        with looping.scoped(plan):
            yield
        return
    attach(model, plan)
    try:
        yield
    finally:
        detach(model)


def _candidate_json(item: Candidate, choice: LossJump) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "operator": item.text,
        "plan": str(item.alias),
        "reason": item.reason,
        "evidence": {name: as_lists(value) for name, value in item.evidence.items()},
        "num_slots": item.alias.num_slots,
        "unique_layers": len(item.alias.unique_layers),
        "choice": choice.to_json(),
    }

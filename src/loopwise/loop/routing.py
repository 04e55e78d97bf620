"""Routers at work while a plan is played: each iteration of a loop visits the tokens that its router lets in.

Shapes: B batch rows, T tokens, D width.

A loop with routers goes over its iterations in one of two ways (see `route`): with expert choice each iteration has a
router that chooses among the tokens of the one before, and what it makes is added, weighted, to the state; with token
choice one router gives each token a depth, and what its last iteration made is added once. Loops that `follow` such a
loop go on with its routers, as if they were further iterations: so layers need not be shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loopwise.loop.boundary import SlotKey, Turn, turns_of
from loopwise.loop.execute import Visit
from loopwise.loop.route import (
    DepthChoice,
    ExpertRouters,
    Selection,
    auxiliary_loss,
    balance_loss,
    combine,
    z_loss,
)
from loopwise.plan.plans import Plan

SELECTS = ("top", "threshold")


@dataclass
class _Run:
    """One run of a loop: the state before it and before its present iteration, and who takes part in that."""

    start_BTD: torch.Tensor
    before_BTD: torch.Tensor
    selection: Selection
    choice: DepthChoice | None = None


class Routing:
    """Executor hook that narrows visits to the chosen tokens.

    Args:
        plan: the plan that is played.
        modules: loop modules by loop name, of which some have a `route` or `follow` another.
        select: "top" or "threshold" for loops with expert choice; None is what each was configured with.
        collect: name of a loop whose state after every iteration is kept.

    Attributes:
        slots: keys of the slots that it may narrow.
        states: the collected states, each `[B, T, D]`.
        tokens_BT: bool, tokens that are not padding; None is all.

    Raises:
        ValueError: more iterations than routers, a loop with components around one with routers, an unknown `select`.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[str, Any],
        *,
        select: str | None = None,
        collect: str | None = None,
    ):
        if select not in (None, *SELECTS):
            raise ValueError(f"select={select!r}: use {' or '.join(SELECTS)}")
        self._taken: list[tuple[str, Selection | DepthChoice]] = []
        self.states: list[torch.Tensor] = []
        self.tokens_BT: torch.Tensor | None = None
        self._select, self._collect = select, collect
        self._turns = turns_of(plan)
        self._heads = {name: module.follows or name for name, module in modules.items() if is_routed(module)}
        self._routers = {name: modules[name].route for name in self._heads.values()}
        self._first, self._totals = self._number(plan)
        self.slots = self._inside(plan, modules)
        self._runs: dict[str, _Run] = {}
        self._open: str | None = None

    @property
    def looks_ahead(self) -> bool:
        """True when a choice depends on later tokens."""
        return any(self._mode(router) == "top" for router in self._routers.values())

    def before(self, visit: Visit, state_BTD: torch.Tensor) -> Visit:
        """The visit, for the chosen tokens only."""
        turns = self._turns.get(visit.slot.key)
        for turn in turns.begin if turns else ():
            if turn.loop.name in self._heads:
                self._enter(turn, state_BTD)
        return visit if self._open is None else _narrowed(visit, self._runs[self._open].selection)

    def after(self, visit: Visit, before_BTD: torch.Tensor, state_BTD: torch.Tensor) -> torch.Tensor:
        """The state, with what the iteration made added where the visit is its last."""
        turns = self._turns.get(visit.slot.key)
        for turn in turns.end if turns else ():
            if turn.loop.name in self._heads:
                state_BTD = self._leave(turn, state_BTD)
        return state_BTD

    def loss(self) -> torch.Tensor | None:
        """What training adds to the loss for the routers, a weighted scalar; None where nothing was routed."""
        terms = [term for name, route in self._taken for term in _terms(self._routers[name].config, route)]
        return torch.stack(terms).sum() if terms else None

    @property
    def routes(self) -> list[Selection | DepthChoice]:
        """For every iteration with expert choice its selection, for every run with token choice its choice."""
        return [route for _, route in self._taken]

    def _enter(self, turn: Turn, state_BTD: torch.Tensor) -> None:
        name, index = self._index(turn)
        router, run = self._routers[name], self._runs.get(name)
        choice = None if run is None else run.choice
        if isinstance(router, ExpertRouters):
            candidates = self.tokens_BT if run is None or index == 0 else run.selection.active_BT
            lengths = None if self.tokens_BT is None else self.tokens_BT.sum(1)
            mode: Any = self._mode(router)
            selection = router(state_BTD, index, candidates_BT=candidates, select=mode, lengths_B=lengths)
            self._taken.append((name, selection))
        else:
            if choice is None or index == 0:
                choice = router(state_BTD, mask_BT=self.tokens_BT)
                self._taken.append((name, choice))
            selection = choice.selection(index)
        start_BTD = state_BTD if run is None or index == 0 else run.start_BTD
        self._runs[name] = _Run(start_BTD=start_BTD, before_BTD=state_BTD, selection=selection, choice=choice)
        self._open = name

    def _leave(self, turn: Turn, state_BTD: torch.Tensor) -> torch.Tensor:
        name, index = self._index(turn)
        run, self._open = self._runs[name], None
        if run.choice is None:
            state_BTD = combine(run.before_BTD, state_BTD, run.selection)
        elif index + 1 == self._totals[name]:
            state_BTD = run.choice.finish(run.start_BTD, state_BTD)
        if self._collect is not None and self._heads.get(self._collect) == name:
            self.states.append(state_BTD)
        return state_BTD

    def _mode(self, router: nn.Module) -> str | None:
        return (self._select or router.config.select) if isinstance(router, ExpertRouters) else None

    def _index(self, turn: Turn) -> tuple[str, int]:
        """The loop whose routers an iteration has, and the number of the iteration there."""
        loop = turn.loop.name or ""
        return self._heads[loop], self._first[loop] + turn.iteration

    def _number(self, plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
        """Of every routed loop the number of its first iteration, of every loop with routers how many there are."""
        first, totals = {}, dict.fromkeys(self._routers, 0)
        for name, count in plan.counts.items():
            if name in self._heads:
                first[name] = totals[self._heads[name]]
                totals[self._heads[name]] += count
        for name, total in totals.items():
            known = self._routers[name].num_iterations
            if total > known:
                raise ValueError(
                    f"loop {name!r} has routers for {known} iterations and is to run {total}: use at most {known}"
                )
        return first, totals

    def _inside(self, plan: Plan, modules: Mapping[str, Any]) -> set[SlotKey]:
        turns = [turn for found in self._turns.values() for turn in found.begin]
        routed = {turn.path for turn in turns if turn.loop.name in self._heads}
        for turn in turns:
            if turn.loop.name in modules and any(
                path != turn.path and path[: len(turn.path)] == turn.path for path in routed
            ):
                raise ValueError(
                    f"loop {turn.loop.name!r} has components and stands around a loop with routers: leave them out"
                )
        return {slot.key for slot in plan.slots if any(slot.position[: len(path)] == path for path in routed)}


def is_routed(module: Any) -> bool:
    """Whether a loop module chooses tokens, or follows one that does."""
    return getattr(module, "route", None) is not None or getattr(module, "follows", None) is not None


def _terms(config: Any, route: Selection | DepthChoice) -> list[torch.Tensor]:
    """What training adds to the loss for one selection or choice, weighted."""
    if isinstance(route, Selection):
        terms = [config.aux_weight * auxiliary_loss(route)] if config.aux_weight else []
        squares = route.scores_BT[route.candidates_BT].square() if config.z_weight else None
        return terms if squares is None else [*terms, config.z_weight * squares.mean()]
    terms = [config.balance_weight * balance_loss(route)] if config.balancing == "loss" else []
    return [*terms, config.z_weight * z_loss(route)] if config.z_weight else terms


def _narrowed(visit: Visit, selection: Selection) -> Visit:
    active_BT = selection.active_BT
    if bool(active_BT.all()):
        return visit
    groups = list(selection.groups())
    if len(groups) == 1 and len(groups[0][0]) == len(active_BT):
        return replace(visit, positions=groups[0][1])
    return replace(visit, parts=tuple(Visit(slot=visit.slot, rows=rows, positions=where) for rows, where in groups))

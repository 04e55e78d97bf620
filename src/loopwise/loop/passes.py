"""What a loop adds to its layers: the state that it carries, what re-enters, and what happens after every iteration.

Shapes: B batch rows, T tokens, D width, b selected rows, t selected tokens.

A named loop of a plan may own a `LoopModule`. `Passes` applies the modules at the turns of the loops (see `boundary`)
while the executor plays the plan, so the layers in between know nothing of them. Two forms:

* One state: at its first iteration the loop keeps the state that reaches it as the injected tensor `e` and starts its
  own; every iteration begins with `update(state, e)`; the last one leaves through `exit`.
* Named streams (hierarchical reasoners): an iteration begins with `update(streams[stream], sum of streams[reads])` and
  its result is the stream's new value.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from loopwise.loop.boundary import SlotKey, Turn, turns_of
from loopwise.loop.config import Component
from loopwise.loop.execute import Hook, Visit, gather, scatter
from loopwise.loop.exits import ON_EXIT, Exits, running_parts
from loopwise.loop.routing import Routing, is_routed
from loopwise.loop.rows import RowDepths, refuse_rows
from loopwise.loop.state import InputState, RowSeeds, StateInit, make
from loopwise.loop.update import Update
from loopwise.loop.window import GradientWindow, Last, by_name
from loopwise.plan.plans import Plan


class LoopModule(nn.Module):
    """The components of one loop.

    Args:
        state: where the state starts (one-state form).
        update: how it meets what re-enters.
        entry: applied to the injected tensor once, such as a norm; None for nothing.
        signal: called as `signal(state_btD, iteration, position_ids_bt)` and added at every iteration (positions, step
            embeddings).
        conditioner: called as `conditioner(time, step)`; what it returns reaches the loop's layers as `conditioning`.
        turn: applied to the state after every iteration, such as a norm; None for nothing.
        exit: applied once, after the last iteration; None for nothing.
        stream: name of the stream that the loop carries; None for the one-state form.
        reads: streams whose sum re-enters.
        grad: how many of the last iterations carry a gradient, see `GradientWindow`; None for all.
        gate: state `[..., D]` -> logits `[...]` of the probability to leave the loop after an iteration; None for none.
        halting: the rule that the gate drives, see `Exits`; None lets every token run every iteration.
        on_exit: "skip" or "select", what happens to a token that has left, see `exits`.
        route: the routers of its iterations, see `routing`; such a loop has no other components.
        follows: name of the loop whose routers this one goes on with.

    Raises:
        ValueError: an unknown `on_exit`, or a halting rule without a gate.
    """

    def __init__(
        self,
        *,
        state: StateInit | None = None,
        update: Update | None = None,
        entry: nn.Module | None = None,
        signal: nn.Module | None = None,
        conditioner: nn.Module | None = None,
        turn: nn.Module | None = None,
        exit: nn.Module | None = None,
        stream: str | None = None,
        reads: tuple[str, ...] = (),
        grad: Last | None = None,
        gate: nn.Module | None = None,
        halting: Component | None = None,
        on_exit: str = "skip",
        route: nn.Module | None = None,
        follows: str | None = None,
    ):
        super().__init__()
        if on_exit not in ON_EXIT:
            raise ValueError(f"on_exit={on_exit!r}: use {' or '.join(ON_EXIT)}")
        if halting is not None and gate is None:
            raise ValueError(f"{halting.kind} needs a gate that drives it: give the loop gate=true")
        self.state = state or InputState()
        self.update = update or Update()
        self.entry = entry or nn.Identity()
        self.signal = signal
        self.conditioner = conditioner
        self.turn = turn or nn.Identity()
        self.exit = exit or nn.Identity()
        self.stream, self.reads = stream, reads
        self.grad = grad
        self.gate, self.halting, self.on_exit = gate, halting, on_exit
        self.route, self.follows = route, follows


class Passes:
    """The loop components at work during one forward.

    Args:
        plan: the plan that is played.
        modules: loop modules by loop name; loops without one carry their state on unchanged.
        streams: initial values of named streams, each `[B, T, D]`.
        initial_state: first state of the loops of one-state form, broadcastable to `[B, T, D]`.
        generator: source of random first states and random exits, or seeds of one per row.
        schedule: step sizes `[R]` of the iterations, for conditioners; default 1/R each.
        collect: name of the loop whose state after every iteration is kept in `states`.
        window: by loop name, or of the main loop, replaces the `grad` of the modules for this forward.
        rows: a depth of its own for every row, for the main loop.
        halting: replaces the `halting` of all modules with a gate for this forward.
        on_exit: replaces the `on_exit` of the modules for this forward.
        select: how loops with expert choice select, "top" or "threshold", for this forward.

    Attributes:
        states: the collected states, each `[B, T, D]`.
        hooks: for the executor: the gradient window, and the skipping of tokens that have left, where there are such.
        exits: by loop name, what its gate did at the latest run; of loops that are collected or have a halting rule.
        routing: the routers at work, None where no loop has any.
        routed: keys of the slots that a part of the tokens may visit.
        may_skip: set by the player: False makes "skip" work as "select" for this forward.
        arguments: further arguments for the layers inside the present iteration.
        position_ids: int64 `[B or 1, T]`, set by the owner, for signals; None counts from 0.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[str, nn.Module],
        *,
        streams: Mapping[str, torch.Tensor] | None = None,
        initial_state: torch.Tensor | None = None,
        generator: torch.Generator | RowSeeds | None = None,
        schedule: torch.Tensor | None = None,
        collect: str | None = None,
        window: int | Mapping[str, Last] | None = None,
        rows: RowDepths | None = None,
        halting: Component | None = None,
        on_exit: str | None = None,
        select: str | None = None,
    ):
        self.modules = modules
        self.streams = dict(streams or {})
        self.states: list[torch.Tensor] = []
        self.arguments: dict[str, torch.Tensor] = {}
        self.position_ids: torch.Tensor | None = None
        self._schedule = schedule
        self._turns = turns_of(plan) if modules or collect else {}
        self._initial_state, self._source, self._collect = initial_state, generator, collect
        self._common: torch.Generator | None = None
        last = {name: module.grad for name, module in modules.items() if isinstance(module, LoopModule)}
        last = {name: count for name, count in last.items() if count is not None}
        asked = {} if window is None else by_name(plan, window)
        self.hooks: list[Hook] = [GradientWindow(plan, last | asked)] if last or asked else []
        self._rows = rows
        if rows is not None:
            refuse_rows(modules, collect, halting)
            self.hooks.append(rows)
        self._with_grad = torch.is_grad_enabled()
        if on_exit not in (None, *ON_EXIT):
            raise ValueError(f"on_exit={on_exit!r}: use {' or '.join(ON_EXIT)}")
        self._halting, self._on_exit = halting, on_exit
        self.may_skip = True
        self.exits: dict[str, Exits] = {}
        self._runs: dict[tuple[int, ...], tuple[tuple[int, ...], Exits]] = {}
        self._kept_at: SlotKey | None = None
        gated = [module for module in modules.values() if isinstance(module, LoopModule) and module.gate is not None]
        if halting is not None and not gated:
            raise ValueError(f"{halting.kind} needs a gate that drives it: no loop of this model has one")
        self.skips = any(self._skips(module) for module in gated)
        self.routed: set[SlotKey] = set()
        if self.skips:
            self.hooks.append(_LeaveOut(self))
            self.routed |= self._may_lack_tokens(plan)
        self.routing: Routing | None = None
        if any(is_routed(module) for module in modules.values()):
            self._route(Routing(plan, modules, select=select, collect=collect))
        self._entered: dict[tuple[int, ...], torch.Tensor] = {}
        self._carried: dict[tuple[int, ...], torch.Tensor] = {}

    def fork(self) -> Passes:
        """A copy that goes on from here on its own, for running visits again; loops with routers have none."""
        assert self.routing is None
        twin = copy.copy(self)
        for name in ("streams", "arguments", "exits", "_entered", "_carried"):
            setattr(twin, name, dict(getattr(self, name)))
        twin.states = list(self.states)
        twin._common = self.generator  # both go on with the same one
        twin._runs = {path: (run, exits.fork()) for path, (run, exits) in self._runs.items()}
        return twin

    @property
    def generator(self) -> torch.Generator | None:
        """Source of random first states and random exits."""
        if not isinstance(self._source, RowSeeds):
            return self._source
        if self._common is None:  # most forwards draw nothing from it
            self._common = self._source.common()
        return self._common

    def begin(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
        """What the layer of a visit reads, from the state that reaches it (both the visit's part `[b, t, D]`)."""
        turns = self._turns.get(visit.slot.key)
        for turn in turns.begin if turns else ():
            module = self._module(turn)
            if module is None:
                continue
            if module.stream is not None:
                part_btD = gather(self.streams[module.stream], visit)
            else:
                part_btD = self._enter(turn, module, visit, part_btD, num_rows, num_tokens)
            self._carried[turn.path] = _put(self._carried.get(turn.path), part_btD, visit, num_rows, num_tokens)
            part_btD = module.update(part_btD, self._injected(turn, module, visit), **_where(turn))
            if module.conditioner is not None:
                self.arguments["conditioning"] = self._conditioning(module.conditioner, turn, part_btD)
            if module.signal is not None:
                positions = self._positions(visit, part_btD, num_rows, num_tokens)
                if self._rows is None:
                    part_btD = part_btD + module.signal(part_btD, turn.iteration, positions)
                else:
                    part_btD = part_btD + self._rows.signal(turn, module.signal, visit, part_btD, positions)
            exits = self._exits(turn, module, visit)
            if exits is not None:
                exits.enter(visit, part_btD, num_rows, num_tokens)
        return part_btD

    def end(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
        """The state after a visit, from what its layer gave (both the visit's part `[b, t, D]`)."""
        turns = self._turns.get(visit.slot.key)
        for turn in turns.end if turns else ():
            module = self._module(turn)
            if module is not None:
                injected_btD = self._injected(turn, module, visit)
                carried_btD = gather(self._carried[turn.path], visit)
                part_btD = module.update.leave(carried_btD, part_btD, injected_btD, **_where(turn))
                part_btD = module.turn(part_btD)
                if module.stream is not None:
                    before = self.streams[module.stream]
                    self.streams[module.stream] = _put(before, part_btD, visit, num_rows, num_tokens)
            if turn.loop.name is not None and turn.loop.name == self._collect and not self._is_routed(turn):
                self._keep(visit, part_btD, num_rows, num_tokens)
            exits = None if module is None else self._exits(turn, module, visit)
            if module is not None and exits is not None:
                part_btD = exits.leave(visit, part_btD, num_rows, num_tokens, last=turn.is_last, exit=module.exit)
            elif module is not None and self._rows is not None:
                part_btD = self._rows.leave(turn, module.exit, visit, part_btD)
            elif module is not None and turn.is_last:
                part_btD = module.exit(part_btD)
            if module is not None and turn.is_last and not visit.is_partial:
                self.arguments.clear()
        return part_btD

    def _enter(
        self, turn: Turn, module: LoopModule, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int
    ) -> torch.Tensor:
        """Keep what re-enters and make the first state, for the rows of a visit that are in their first iteration."""
        index = None if self._rows is None else self._rows.starting(turn, visit)
        if not (turn.is_first if index is None else len(index)):
            return part_btD
        if index is None or len(index) == len(part_btD):
            begins, first_btD = visit, part_btD
        else:
            index = index.to(part_btD.device)
            begins, first_btD = replace(visit, rows=index if visit.rows is None else visit.rows[index]), part_btD[index]
        # What re-enters later iterations keeps its gradient, whether or not the first one carries one.
        with torch.set_grad_enabled(self._with_grad):
            entered_btD = module.entry(first_btD)
            self._entered[turn.path] = _put(self._entered.get(turn.path), entered_btD, begins, num_rows, num_tokens)
        started_btD = self._start(turn, module, entered_btD, begins)
        return started_btD if begins is visit else part_btD.index_put((index,), started_btD.to(part_btD.dtype))

    def _route(self, routing: Routing) -> None:
        if self.skips:
            raise ValueError("a model with routers has no halting that skips tokens besides: use on_exit='select'")
        self.routing = routing
        self.hooks.append(routing)
        routing.states = self.states
        self.routed |= routing.slots

    def route_tokens(self, mask: torch.Tensor | None, num_tokens: int, past: int) -> None:
        """Tell the routers which tokens there are.

        Args:
            mask: 1 for tokens, 0 for padding, `[B, past + T]`; of another form it says nothing.
            num_tokens: T.
            past: how many tokens are in a cache.

        Raises:
            ValueError: the choice among tokens would have to see those in the cache.
        """
        if self.routing is None:
            return
        if past and self.routing.looks_ahead:
            raise ValueError(
                "selecting the best tokens looks at the whole sequence, a cache cannot go on with it: pass "
                "select='threshold' from the first call on, as generate does"
            )
        if mask is not None and mask.ndim == 2:
            self.routing.tokens_BT = mask[:, -num_tokens:].bool()

    @property
    def observed(self) -> Exits | None:
        """What the gate of the collected loop did, or of the first loop with a halting rule."""
        return self.exits.get(self._collect or "") or next(iter(self.exits.values()), None)

    def narrow(self, visit: Visit) -> Visit:
        """A visit without the tokens that have left a loop around it.

        Raises:
            ValueError: the visit leaves out others besides.
        """
        running_BT = self._running(visit)
        if running_BT is None or bool(running_BT.all()):
            return visit
        if visit.is_partial:
            raise ValueError("tokens leave a loop whose visits are narrowed otherwise: use on_exit='select'")
        parts = tuple(running_parts(visit.slot, running_BT))
        turns = self._turns.get(visit.slot.key)
        for turn in turns.end if turns and not parts else ():
            if turn.loop.name is not None and turn.loop.name == self._collect:
                self.states.append(self.states[-1])
            if turn.path in self._runs:
                self._runs[turn.path][1].pass_over()
        if turns and any(turn.is_last for turn in turns.end) and not parts:
            self.arguments.clear()
        return replace(visit, parts=parts)

    def _running(self, visit: Visit) -> torch.Tensor | None:
        slot, running_BT = visit.slot, None
        for path, (run, exits) in self._runs.items():
            is_inside = slot.position[: len(path)] == path and slot.iterations[: len(run)] == run
            if is_inside and exits.skips and exits.running_BT is not None:
                running_BT = exits.running_BT if running_BT is None else running_BT & exits.running_BT
        return running_BT

    def _may_lack_tokens(self, plan: Plan) -> set[SlotKey]:
        turns = [turn for turns in self._turns.values() for turn in turns.begin]
        modules = {turn.path: self._module(turn) for turn in turns}
        paths = [path for path, module in modules.items() if module and module.gate and self._skips(module)]
        return {
            slot.key
            for slot in plan.slots
            for path in paths
            if slot.position[: len(path)] == path and slot.iterations[len(path) - 1] > 0
        }

    def _skips(self, module: LoopModule) -> bool:
        rule = module.halting if self._halting is None else self._halting
        return rule is not None and (self._on_exit or module.on_exit) == "skip"

    def _exits(self, turn: Turn, module: LoopModule, visit: Visit) -> Exits | None:
        """The gate at work in the present run of a loop, or None where nobody asks what it says."""
        rule = module.halting if self._halting is None else self._halting
        if module.gate is None or (rule is None and turn.loop.name != self._collect):
            return None
        run = visit.slot.iterations[: len(turn.path) - 1]  # iterations of the loops around this one
        if turn.path not in self._runs or self._runs[turn.path][0] != run:
            skips = self.may_skip and self._skips(module)
            exits = Exits(module.gate, rule, skips=skips, generator=self.generator)
            self._runs[turn.path] = run, exits
            self.exits[turn.loop.name or ""] = exits
        return self._runs[turn.path][1]

    def _keep(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> None:
        """Collect a state; further parts of the same visit go into the same one."""
        before = self.states[-1] if self.states else None
        if self._kept_at == visit.slot.key:
            self.states.pop()
        self._kept_at = visit.slot.key
        self.states.append(_put(before, part_btD, visit, num_rows, num_tokens))

    def _module(self, turn: Turn) -> LoopModule | None:
        name = turn.loop.name
        module = self.modules[name] if name is not None and name in self.modules else None
        assert module is None or isinstance(module, LoopModule)
        return None if is_routed(module) else module

    def _is_routed(self, turn: Turn) -> bool:
        name = turn.loop.name
        return name is not None and name in self.modules and is_routed(self.modules[name])

    def _start(self, turn: Turn, module: LoopModule, entered_btD: torch.Tensor, visit: Visit) -> torch.Tensor:
        given, source = self._initial_state, self._source
        if given is not None and given.ndim == 3 and visit.is_partial:
            given = gather(given, visit)
        if isinstance(source, RowSeeds):
            run = visit.slot.iterations[: len(turn.path) - 1]  # iterations of the loops around this one
            source = source.at((turn.path, run), visit.rows)
        return make(module.state, entered_btD, initial_state=given, generator=source)

    def _conditioning(self, conditioner: nn.Module, turn: Turn, part_btD: torch.Tensor) -> torch.Tensor:
        count = turn.loop.count
        steps = part_btD.new_full((count,), 1.0 / count) if self._schedule is None else self._schedule.to(part_btD)
        if steps.shape != (count,):
            raise ValueError(
                f"the schedule has {steps.shape[0]} steps, the loop {turn.loop.name} runs {count} iterations"
            )
        return conditioner(steps[: turn.iteration].sum(), steps[turn.iteration])

    def _positions(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
        positions = self.position_ids
        if positions is None:
            positions = torch.arange(num_tokens, device=part_btD.device)[None]
        return gather(positions.expand(num_rows, -1), visit) if visit.is_partial else positions

    def _injected(self, turn: Turn, module: LoopModule, visit: Visit) -> torch.Tensor:
        if module.stream is None:
            return gather(self._entered[turn.path], visit)
        parts = [gather(self.streams[name], visit) for name in module.reads]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


class _LeaveOut:
    """Executor hook: tokens that have left a loop are not visited."""

    def __init__(self, passes: Passes):
        self.passes = passes

    def before(self, visit: Visit, state_BTD: torch.Tensor) -> Visit:
        return self.passes.narrow(visit)

    def after(self, visit: Visit, before_BTD: torch.Tensor, state_BTD: torch.Tensor) -> torch.Tensor:
        return state_BTD


def _where(turn: Turn) -> dict[str, int]:
    return {"iteration": turn.iteration, "num_iterations": turn.loop.count}


def _put(
    whole_BTD: torch.Tensor | None, part_btD: torch.Tensor, visit: Visit, num_rows: int, num_tokens: int
) -> torch.Tensor:
    """A part in its place of the whole `[B, T, D]`; places never visited hold zeros."""
    if not visit.is_partial:
        return part_btD
    if whole_BTD is None:
        whole_BTD = part_btD.new_zeros(num_rows, num_tokens, part_btD.shape[-1])
    return scatter(whole_BTD, part_btD, visit)

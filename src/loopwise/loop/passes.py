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

from collections.abc import Mapping

import torch
from torch import nn

from loopwise.loop.boundary import Turn, turns_of
from loopwise.loop.execute import Visit, gather, scatter
from loopwise.loop.state import InputState, StateInit, make
from loopwise.loop.update import Update
from loopwise.plan.plans import Plan


class LoopModule(nn.Module):
    """The components of one loop.

    Args:
        state: where the state starts (one-state form).
        update: how it meets what re-enters.
        entry: applied to the injected tensor once, such as a norm; None for nothing.
        signal: called as `signal(state_btD, iteration)` and added at every iteration (positions, step embeddings).
        conditioner: called as `conditioner(time, step)`; what it returns reaches the loop's layers as `conditioning`.
        turn: applied to the state after every iteration, such as a norm; None for nothing.
        exit: applied once, after the last iteration; None for nothing.
        stream: name of the stream that the loop carries; None for the one-state form.
        reads: streams whose sum re-enters.
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
    ):
        super().__init__()
        self.state = state or InputState()
        self.update = update or Update()
        self.entry = entry or nn.Identity()
        self.signal = signal
        self.conditioner = conditioner
        self.turn = turn or nn.Identity()
        self.exit = exit or nn.Identity()
        self.stream, self.reads = stream, reads


class Passes:
    """The loop components at work during one forward.

    Args:
        plan: the plan that is played.
        modules: loop modules by loop name; loops without one carry their state on unchanged.
        streams: initial values of named streams, each `[B, T, D]`.
        initial_state: first state of the loops of one-state form, broadcastable to `[B, T, D]`.
        generator: source of random first states.
        schedule: step sizes `[R]` of the iterations, for conditioners; default 1/R each.
        collect: name of the loop whose state after every iteration is kept in `states`.

    Attributes:
        states: the collected states, each `[B, T, D]`.
        arguments: further arguments for the layers inside the present iteration.
    """

    def __init__(
        self,
        plan: Plan,
        modules: Mapping[str, nn.Module],
        *,
        streams: Mapping[str, torch.Tensor] | None = None,
        initial_state: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        schedule: torch.Tensor | None = None,
        collect: str | None = None,
    ):
        self.modules = modules
        self.streams = dict(streams or {})
        self.states: list[torch.Tensor] = []
        self.arguments: dict[str, torch.Tensor] = {}
        self._schedule = schedule
        self._turns = turns_of(plan) if modules or collect else {}
        self._initial_state, self._generator, self._collect = initial_state, generator, collect
        self._entered: dict[tuple[int, ...], torch.Tensor] = {}
        self._carried: dict[tuple[int, ...], torch.Tensor] = {}

    def begin(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
        """What the layer of a visit reads, from the state that reaches it (both the visit's part `[b, t, D]`)."""
        turns = self._turns.get(visit.slot.key)
        for turn in turns.begin if turns else ():
            module = self._module(turn)
            if module is None:
                continue
            if module.stream is not None:
                part_btD = gather(self.streams[module.stream], visit)
            elif turn.is_first:
                entered_btD = module.entry(part_btD)
                self._entered[turn.path] = _put(self._entered.get(turn.path), entered_btD, visit, num_rows, num_tokens)
                part_btD = self._start(module, entered_btD, visit)
            self._carried[turn.path] = part_btD
            part_btD = module.update(part_btD, self._injected(turn, module, visit), **_where(turn))
            if module.conditioner is not None:
                self.arguments["conditioning"] = self._conditioning(module.conditioner, turn, part_btD)
            if module.signal is not None:
                part_btD = part_btD + module.signal(part_btD, turn.iteration)
        return part_btD

    def end(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
        """The state after a visit, from what its layer gave (both the visit's part `[b, t, D]`)."""
        turns = self._turns.get(visit.slot.key)
        for turn in turns.end if turns else ():
            module = self._module(turn)
            if module is not None:
                injected_btD = self._injected(turn, module, visit)
                part_btD = module.update.leave(self._carried[turn.path], part_btD, injected_btD, **_where(turn))
                part_btD = module.turn(part_btD)
                if module.stream is not None:
                    before = self.streams[module.stream]
                    self.streams[module.stream] = _put(before, part_btD, visit, num_rows, num_tokens)
            if turn.loop.name is not None and turn.loop.name == self._collect:
                before = self.states[-1] if self.states else None
                self.states.append(_put(before, part_btD, visit, num_rows, num_tokens))
            if module is not None and turn.is_last:
                part_btD = module.exit(part_btD)
                self.arguments.clear()
        return part_btD

    def _module(self, turn: Turn) -> LoopModule | None:
        module = self.modules[turn.loop.name] if turn.loop.name in self.modules else None
        assert module is None or isinstance(module, LoopModule)
        return module

    def _start(self, module: LoopModule, entered_btD: torch.Tensor, visit: Visit) -> torch.Tensor:
        given = self._initial_state
        if given is not None and given.ndim == 3 and visit.is_partial:
            given = gather(given, visit)
        return make(module.state, entered_btD, initial_state=given, generator=self._generator)

    def _conditioning(self, conditioner: nn.Module, turn: Turn, part_btD: torch.Tensor) -> torch.Tensor:
        count = turn.loop.count
        steps = part_btD.new_full((count,), 1.0 / count) if self._schedule is None else self._schedule.to(part_btD)
        if steps.shape != (count,):
            raise ValueError(
                f"the schedule has {steps.shape[0]} steps, the loop {turn.loop.name} runs {count} iterations"
            )
        return conditioner(steps[: turn.iteration].sum(), steps[turn.iteration])

    def _injected(self, turn: Turn, module: LoopModule, visit: Visit) -> torch.Tensor:
        if module.stream is None:
            return gather(self._entered[turn.path], visit)
        parts = [gather(self.streams[name], visit) for name in module.reads]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


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

"""Record and play: run a transformers decoder's own forward, but visit its layers in the order of a plan.

The model's forward computes embeddings, masks and rotary tables and iterates its layer list. During that forward the list shows *recorders*: each
keeps the arguments meant for its layer and hands the hidden state on unchanged. The last one plays the plan over the real layers, every layer with
its own recorded arguments. Outside the forward the list is the real one, so saving, sharding and adapters see a normal model.

Shapes: B batch rows, T tokens, D width.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loopwise.cache.depth import DepthCache
from loopwise.cache.policy import CachePolicy
from loopwise.loop.execute import Hook, Visit, execute
from loopwise.models.hub import find_cache, past_length
from loopwise.models.rerun import Rerun, plan_rerun, remember_inputs
from loopwise.models.slicing import slice_call
from loopwise.plan.plans import Plan


@dataclass(frozen=True, kw_only=True)
class Returns:
    """What a layer returns: `kind` is the type (Tensor, tuple or list), `extras` which of the further items are tensors."""

    kind: type
    extras: tuple[bool, ...] = ()

    @classmethod
    def of(cls, output: Any) -> Returns:
        """Learn the structure from one output; the hidden state must be the first item."""
        if isinstance(output, torch.Tensor):
            return cls(kind=torch.Tensor)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
            return cls(kind=tuple if isinstance(output, tuple) else list, extras=tuple(item is not None for item in output[1:]))
        raise ValueError(f"its layers return {type(output).__name__}, which holds no hidden state in the first place")

    def pack(self, hidden_BTD: torch.Tensor, extras: Any) -> Any:
        """A hidden state in the structure that the model's forward expects."""
        return hidden_BTD if self.kind is torch.Tensor else self.kind((hidden_BTD, *extras))


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Stands for a further output of a layer until the layer is really run; read by later layers or collected by the forward."""

    layer: int
    item: int


@dataclass(kw_only=True, eq=False)
class Frame:
    """One running forward."""

    plan: Plan
    layers: nn.ModuleList
    rerun: Rerun | None = None
    hidden: torch.Tensor | None = None
    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    extras: dict[int, list] = field(default_factory=dict)
    states: list[torch.Tensor] | None = None
    cache: Any = None
    depth: DepthCache | None = None


class Recorder(nn.Module):
    """Takes the place of one layer while the model's forward runs; other attributes are the layer's."""

    def __init__(self, looping: Looping, index: int):
        super().__init__()
        self.looping, self.index = looping, index

    def __getattr__(self, name: str) -> Any:
        if name in ("looping", "index"):
            raise AttributeError(name)
        return getattr(self.looping.frame.layers[self.index], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call of this layer."""
        return self.looping.record(self.index, args, kwargs)


class Looping:
    """What `attach` leaves on the module that owns the layer list (`owner.loopwise`).

    Holds no module, so that it can be copied and pickled with the model; layers are resolved from the module that is called.
    """

    def __init__(self, *, name: str, plan: Plan, policy: CachePolicy, indices: tuple, returns: tuple[Returns, ...], state_names: tuple):
        self.name = name
        self.plan = plan
        self.policy = policy
        self.indices = indices
        self.returns = returns
        self.state_names = state_names
        self.hooks: list[Hook] = []
        self.axes: Any = None
        self.loops: Any = None
        self.frame: Frame | None = None
        self.recorders = nn.ModuleList(Recorder(self, i) for i in range(len(returns)))
        self._lock = threading.RLock()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "frame")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, frame=None, _lock=threading.RLock())

    def begin(self, owner: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the owner: show the recorders."""
        self._lock.acquire()
        loops = kwargs.pop("loops", None)
        loops = self.loops if loops is None else loops
        plan = self.plan if loops is None else self.plan.with_loops(loops)
        configured, self.plan, self.loops = (self.plan, self.loops), plan, None
        try:
            rerun, args, kwargs = plan_rerun(self.policy, plan, owner, args, kwargs)
        finally:
            self.plan, self.loops = configured
        layers = owner._modules[self.name]
        self.frame = Frame(plan=plan, layers=layers, rerun=rerun)
        if kwargs.get("output_hidden_states") or getattr(getattr(owner, "config", None), "output_hidden_states", False):
            self.frame.states = []
        owner._modules[self.name] = self.recorders
        return args, kwargs

    def end(self, owner: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward post-hook of the owner, called after errors too: show the real layers again."""
        frame, self.frame = self.frame, None
        try:
            if frame is None:
                return output
            owner._modules[self.name] = frame.layers
            if output is None:
                return None
            if self.policy.on_deeper == "catch_up" and frame.cache is not None:
                remember_inputs(owner, frame.cache, args, kwargs)
            output = _settle(output, frame)
            return frame.rerun.finish(output) if frame.rerun else output
        finally:
            self._lock.release()

    def record(self, index: int, args: tuple, kwargs: dict) -> Any:
        """Keep a layer's arguments; at the last layer, play the plan. Returns what the layer would return."""
        frame = self.frame
        hidden = args[0] if args else kwargs["hidden_states"]
        if index != len(frame.calls) or (index and hidden is not frame.hidden):
            raise ValueError("this model computes something between its layers, or does not call them once and in order: it cannot be looped")
        frame.hidden = hidden
        frame.calls.append((args, kwargs))
        if index + 1 < len(self.returns):
            flags = self.returns[index].extras
            return self.returns[index].pack(hidden, [Placeholder(index, k) if flag else None for k, flag in enumerate(flags)])
        hidden = self.play(frame)
        return self.returns[index].pack(hidden, frame.extras.get(index, [None] * len(self.returns[index].extras)))

    def play(self, frame: Frame) -> torch.Tensor:
        """Visit the slots of the plan with the real layers; returns the hidden state `[B, T, D]`."""
        slots = frame.plan.slots
        cache = find_cache(value for args, kwargs in frame.calls for value in (*args, *kwargs.values()))
        if cache is not None:
            frame.cache, frame.depth = cache, self._depth(cache)
            frame.depth.begin(cache, slots, decoding=frame.hidden.shape[1] == 1)
            frame.depth.start_views()
        if frame.states is not None:
            frame.states.append(frame.hidden)
        state = execute(frame.hidden, (Visit(slot=slot) for slot in slots), self.run, self.hooks)
        if frame.depth is not None:
            frame.depth.end_views()
        return state

    def run(self, visit: Visit, part: torch.Tensor) -> torch.Tensor:
        """Run one real layer on (a part of) the state with its recorded arguments."""
        frame, index = self.frame, visit.slot.layer
        args, kwargs = frame.calls[index]
        if visit.is_partial:
            args, kwargs = slice_call(self, frame, visit, args, kwargs)
        view = None if frame.depth is None else frame.depth.view(frame.cache, visit.slot)
        args = [self._argument(value, view) for value in args]
        kwargs = {key: self._argument(value, view) for key, value in kwargs.items()}
        if args:
            args[0] = part
        else:
            kwargs["hidden_states"] = part
        layer = frame.layers[index]
        bank = self._restore_state(layer, visit) if self.state_names else None
        output = layer(*args, **kwargs)
        if bank is not None:
            bank[:] = [getattr(layer.get_submodule(path), name) for path, name in self.state_names[index]]
        if not isinstance(output, torch.Tensor):
            frame.extras[index] = list(output[1:])
            output = output[0]
        if frame.states is not None:
            frame.states.append(output)
        return output

    def _argument(self, value: Any, view: Any) -> Any:
        if value is self.frame.cache and view is not None:
            return view
        if isinstance(value, Placeholder):
            played = self.frame.extras.get(value.layer)
            return None if played is None else played[value.item]
        return value

    def _depth(self, cache: Any) -> DepthCache:
        depth = getattr(cache, "depth", None)
        if depth is None:
            if past_length(cache):
                raise ValueError("the cache was filled by a model without a plan: start a new cache")
            depth = cache.depth = DepthCache(cache, self.policy, self.indices)
            cache.slots = depth.index
        return depth

    def _restore_state(self, layer: nn.Module, visit: Visit) -> list | None:
        """Put this slot's state on a layer that keeps its recurrent state on itself; returns the place to save it to."""
        depth, names = self.frame.depth, self.state_names[visit.slot.layer]
        if depth is None or not names:
            return None
        bank = depth.module_state.get(visit.slot.key)
        if bank is None:
            bank = depth.module_state[visit.slot.key] = [None] * len(names)
        for (path, name), value in zip(names, bank, strict=True):
            setattr(layer.get_submodule(path), name, value)
        return bank


def _settle(output: Any, frame: Frame) -> Any:
    """Put what was really computed in the place of recorded stand-ins collected by the model's forward."""
    items = output.items() if hasattr(output, "items") else []
    for key, value in list(items):
        if not isinstance(value, (tuple, list)):
            continue
        if key == "hidden_states" and frame.states and len(value) > 1 and all(item is frame.hidden for item in value[:-1]):
            output[key] = (*frame.states[:-1], value[-1])
        elif any(isinstance(item, Placeholder) for item in value):
            raise ValueError(f"output {key} of this model is collected layer by layer and is not available under a plan")
    return output


def looping_of(model: nn.Module) -> Looping | None:
    """What `attach` left on a model, or None."""
    return next((m.loopwise for m in model.modules() if isinstance(m.__dict__.get("loopwise"), Looping)), None)

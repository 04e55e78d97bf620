"""Record and play: run a transformers decoder's own forward, but visit its layers in the order of a plan.

The model's forward computes embeddings, masks and rotary tables and iterates its layer list. During that forward the
list shows *recorders*: each keeps the arguments meant for its layer and hands the hidden state on unchanged. The last
one plays the plan over the real layers, every layer with its own recorded arguments. Outside the forward the list is
the real one, so saving, sharding and adapters see a normal model.

Shapes: B batch rows, T tokens, D width.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import nn

from loopwise.cache.depth import DepthCache
from loopwise.cache.policy import CachePolicy
from loopwise.loop.boundary import SlotKey
from loopwise.loop.counts import Loops, Window, counted, hooks_of_call
from loopwise.loop.execute import Hook, Visit, execute
from loopwise.models.hub import find_cache, past_length, place_output_hooks, refuse_foreign_cache, with_view
from loopwise.models.recompute import Recompute, play_recomputed, run_recomputed
from loopwise.models.rerun import Rerun, parameter_names, plan_rerun, remember_inputs, without_cache
from loopwise.models.slicing import Axes, slice_call
from loopwise.plan.nodes import Slot
from loopwise.plan.plans import Plan

_OF_LOOPS = ("loops", "window", "loop_options")
_STATE = "hidden_states"
VISIT = "relaxation_visit"  # with this name a layer that has offsets is told which visit it is


class Passes(Protocol):
    """What an owner may add at the turns of its loops; made anew for every forward by `owner.make_passes(plan, ...)`.

    `arguments` reach the layers of the running iteration; `begin` and `end` map the part `[b, t, D]` of the state that
    a visit works on, before and after its layer.
    """

    arguments: dict[str, torch.Tensor]
    may_skip: bool

    def begin(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
        """What the layer reads."""
        ...

    def end(self, visit: Visit, part_btD: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
        """What goes on."""
        ...

    def fork(self) -> Passes:
        """A copy that goes on from here on its own."""
        ...


@dataclass(frozen=True, kw_only=True)
class Returns:
    """What a layer returns: `kind` is Tensor, tuple or list, `extras` says which further items are not None."""

    kind: type
    extras: tuple[bool, ...] = ()

    @classmethod
    def of(cls, output: Any) -> Returns:
        """Learn the structure from one output; the hidden state must be the first item."""
        if isinstance(output, torch.Tensor):
            return cls(kind=torch.Tensor)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
            return cls(
                kind=tuple if isinstance(output, tuple) else list, extras=tuple(item is not None for item in output[1:])
            )
        raise ValueError(f"its layers return {type(output).__name__}, which holds no hidden state in the first place")

    def pack(self, hidden_BTD: torch.Tensor, extras: Any) -> Any:
        """A hidden state in the structure that the model's forward expects."""
        return hidden_BTD if self.kind is torch.Tensor else self.kind((hidden_BTD, *extras))


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Stands for a further output of a layer until the layer is really run.

    What a layer hands to its neighbour (a router state, the tokens an indexer chose) goes from visit to visit under a
    plan.
    """

    layer: int
    item: int


class Frame:
    """One running forward: what was recorded, and the playing of the plan."""

    def __init__(
        self,
        looping: Looping,
        plan: Plan,
        owner: nn.Module,
        *,
        rerun: Rerun | None = None,
        passes: Passes | None = None,
        hooks: Sequence[Hook] = (),
        collect_states: bool = False,
        player: Player | None = None,
    ):
        self.looping = looping
        self.player = player
        self.plan = plan
        self.owner = owner
        self.layers = cast(nn.ModuleList, owner._modules[looping.name])
        self.visited = list(self.layers)  # a visit that asks the module list pays for its bookkeeping
        self.rerun = rerun
        self.passes = passes
        self.hooks = [*hooks, *looping.hooks]
        self.hidden = torch.empty(0)
        self.played = self.hidden
        self.calls: list[tuple[tuple, dict]] = []
        self.extras: dict[int, list] = {}
        self.has_placeholders = any(any(returns.extras) for returns in looping.returns)
        self.last_extras: list | None = None
        self.states: list[torch.Tensor] | None = [] if collect_states else None
        self.cache: Any = None
        self.depth: DepthCache | None = None
        self.recompute_layers = False
        self.visit_numbers = visit_numbers(plan) if looping.relaxed else {}

    def fork(self) -> Frame:
        """A frame that goes on from here on its own: what it notes on the way is not noted in this one."""
        twin = copy.copy(self)
        twin.extras, twin.states = dict(self.extras), None
        twin.passes = None if self.passes is None else self.passes.fork()
        return twin

    def record(self, index: int, args: tuple, kwargs: dict) -> Any:
        """Keep a layer's arguments; at the last layer, play the plan. Returns what the layer would return."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if index != len(self.calls) or (index and hidden is not self.hidden):
            raise ValueError(
                "its forward computes something between the layers, or does not call them once and in order"
            )
        self.hidden = hidden
        self.calls.append((args, kwargs))
        returns = self.looping.returns[index]
        if index + 1 < len(self.looping.returns):
            return returns.pack(
                hidden, [Placeholder(index, k) if flag else None for k, flag in enumerate(returns.extras)]
            )
        try:
            self.played = self.play() if self.player is None else self.player(self)
        except BaseException as error:
            if not isinstance(error, Exception):  # torch calls post-hooks after errors, but not after KeyboardInterrupt
                self.looping.leave()
            raise
        return returns.pack(self.played, self.extras.get(index, [None] * len(returns.extras)))

    def play(self) -> torch.Tensor:
        """Visit the slots of the plan with the real layers; returns the hidden state `[B, T, D]`."""
        slots = self.plan.slots
        self.cache = find_cache(value for args, kwargs in self.calls for value in (*args, *kwargs.values()))
        if self.cache is not None:
            self.depth = self.looping.depth_of(self.cache)
            num_tokens, routed = self.hidden.shape[1], getattr(self.passes, "routed", ())
            self.depth.begin(self.cache, slots, decoding=num_tokens == 1, routed=routed, num_tokens=num_tokens)
            if self.passes is not None and getattr(self.passes, "skips", False):
                self.passes.may_skip = self.depth.lets_leave(num_tokens)
        if self.states is not None:
            self.states.append(self.hidden)
        hooks = [*getattr(self.passes, "hooks", ()), *self.hooks]
        if self.looping.recompute is not None and torch.is_grad_enabled() and self.cache is None:
            state_BTD = play_recomputed(self, hooks, self.looping.recompute)
        else:
            state_BTD = execute(self.hidden, (Visit(slot=slot) for slot in slots), self.run, hooks)
        if self.depth is not None:
            self.depth.end()
        return state_BTD

    def run(self, visit: Visit, part_btD: torch.Tensor) -> torch.Tensor:
        """Run one real layer on (a part of) the state with its recorded arguments."""
        index = visit.slot.layer
        args, kwargs = self.calls[index]
        selected: dict[str, Any] = {}
        if self.depth is not None and (visit.is_partial or self.depth.sharing.kind == "selected"):
            kwargs = dict(kwargs)
            mask = kwargs.pop("attention_mask", None)
            selected = {"attention_mask": self.depth.select(self.cache, visit, mask, self.hidden)}
        if visit.is_partial:
            args, kwargs = slice_call(self.looping.axes[index], self.hidden, visit, args, kwargs)
        if self.passes is not None:
            part_btD = self.passes.begin(visit, part_btD, *self.hidden.shape[:2])
        view = None if self.depth is None else self.depth.view(self.cache, visit.slot, visit.rows)
        played, named = [*args], kwargs | selected
        if view is not None or self.has_placeholders:
            played = [self._argument(value, index, view) for value in played]
            named = {name: self._argument(value, index, view) for name, value in named.items()}
        if played:
            played[0] = part_btD
        else:
            named["hidden_states"] = part_btD
        if self.passes is not None:
            named |= self.passes.arguments
        if index in self.looping.relaxed:
            named[VISIT] = self.visit_numbers[visit.slot.key]
        if self.depth is not None and self.looping.state_names:
            with self._own_state(self.depth, visit.slot):
                output = self._call(visit.slot, played, named)
        else:
            output = self._call(visit.slot, played, named)
        if not isinstance(output, torch.Tensor):
            self.extras[index] = self.last_extras = list(output[1:])
            output = output[0]
        if self.passes is not None:
            output = self.passes.end(visit, output, *self.hidden.shape[:2])
        if self.states is not None:
            self.states.append(output)
        return output

    def run_alone(
        self, slot: Slot, state_BTD: torch.Tensor, *, cache: Any, mask: torch.Tensor, **more: Any
    ) -> torch.Tensor:
        """Run one real layer on the whole span of the call, for a player.

        Args:
            slot: the visit.
            state_BTD: what the layer reads.
            cache: what the layer finds in the place of the cache of the call.
            mask: attention mask in the place of the recorded one.
            **more: further arguments of the layer.
        """
        index = slot.layer
        args, kwargs = self.calls[index]
        names = parameter_names(type(self.visited[index]))
        named = dict(zip(names, args, strict=False)) | kwargs
        found = find_cache(named.values())
        if found is not None:
            named = {name: with_view(value, found, cache) for name, value in named.items()}
        named |= {"attention_mask": mask} | more
        if index in self.looping.relaxed:
            named[VISIT] = self.visit_numbers[slot.key]
        named = {name: value for name, value in named.items() if name not in (_STATE, names[0])}
        if any(isinstance(value, Placeholder) for value in named.values()):
            raise ValueError("its layers hand values on beside the state: use the model's own generate")
        output = self.visited[index](state_BTD, **named)
        return output if isinstance(output, torch.Tensor) else output[0]

    def _call(self, slot: Slot, args: list[Any], kwargs: dict[str, Any]) -> Any:
        layer = self.visited[slot.layer]
        return (
            run_recomputed(layer, args, kwargs) if self.recompute_layers and slot.iterations else layer(*args, **kwargs)
        )

    def _argument(self, value: Any, reader: int, view: Any) -> Any:
        if isinstance(value, Placeholder):
            played = self.last_extras if value.layer == reader - 1 else self.extras.get(value.layer)
            return None if played is None else played[value.item]
        return value if view is None else with_view(value, self.cache, view)

    @contextmanager
    def _own_state(self, depth: DepthCache, slot: Slot) -> Iterator[None]:
        """While a layer that keeps recurrent state on itself runs, it holds the state of this slot."""
        names = self.looping.state_names[slot.layer]
        if not names:
            yield
            return
        modules = [(self.layers[slot.layer].get_submodule(path), name) for path, name in names]
        bank = depth.module_state.get(slot.key, [None] * len(names))
        for (module, name), value in zip(modules, bank, strict=True):
            setattr(module, name, value)
        yield
        depth.module_state[slot.key] = [getattr(module, name) for module, name in modules]


Player = Callable[[Frame], torch.Tensor]


class Recorder(nn.Module):
    """Takes the place of one layer while the model's forward runs; other attributes are the layer's."""

    def __init__(self, looping: Looping, index: int):
        super().__init__()
        self.looping, self.index = looping, index

    def __getattr__(self, name: str) -> Any:
        frame = self.__dict__["looping"].frame if "looping" in self.__dict__ else None
        if frame is None:
            raise AttributeError(name)
        return getattr(frame.layers[self.index], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call of this layer."""
        frame = self.looping.frame
        assert frame is not None
        return frame.record(self.index, args, kwargs)


class Looping:
    """What `attach` leaves on the module that owns the layer list (`owner.loopwise`).

    Holds no layer, so that it can be copied and pickled with the model; layers are resolved from the module that is
    called.

    Attributes:
        name: the owner's attribute that holds the layers.
        plan: the plan.
        policy: the cache policy of caches to come.
        indices: per layer, the cache entries that it addresses.
        returns: per layer, what it returns.
        state_names: per layer, (module path, attribute) of recurrent state kept on modules; empty when no layer does.
        hooks: called around every visit.
        recompute: which loops are checkpointed when a gradient is recorded, None for none.
        axes: per layer, the meaning of the axes of its arguments (see `slicing`); learned when hooks are set.
        components: parts that were added beside the plan, by name, as JSON values.
        relaxed: layers that are told which of their visits it is.
        make_passes: called as `make_passes(owner, plan, ...)` where the owner has no such method of its own; None where
            its loops have no components.
        is_taken_apart: it has been tried whether decoders may run parts of the plan (`loopwise.decode.runner`).
        loops: iteration counts of the running call of this thread only.
    """

    def __init__(
        self,
        *,
        name: str,
        plan: Plan,
        policy: CachePolicy,
        indices: tuple,
        returns: tuple[Returns, ...],
        state_names: tuple,
    ):
        self.name = name
        self._calls = threading.local()
        self.plan = plan
        self.policy = policy
        self.indices = indices
        self.returns = returns
        self.state_names = state_names
        self.hooks: list[Hook] = []
        self.recompute: Recompute | None = None
        self.axes: Axes = []
        self.components: dict[str, Any] = {}
        self.relaxed: frozenset[int] = frozenset()
        self.make_passes: Callable[..., Passes] | None = None
        self.is_taken_apart = False
        self.frame: Frame | None = None
        self.recorders = nn.ModuleList(Recorder(self, i) for i in range(len(returns)))
        self._lock = threading.RLock()

    def __getstate__(self) -> dict:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_calls", "frame")}
        return state | {"_plan": self.plan}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, frame=None, _lock=threading.RLock(), _calls=threading.local())

    @property
    def plan(self) -> Plan:
        """The plan: within `scoped`, that of the present thread."""
        return getattr(self._calls, "plan", None) or self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        if getattr(self._calls, "plan", None) is None:
            self._plan = plan
        else:
            self._calls.plan = plan

    @contextmanager
    def scoped(self, plan: Plan) -> Iterator[None]:
        """Another plan for the calls of this thread."""
        outer = getattr(self._calls, "plan", None)
        self._calls.plan = plan
        try:
            yield
        finally:
            self._calls.plan = outer

    @property
    def loops(self) -> Loops:
        """Iteration counts of the running call of this thread only."""
        return getattr(self._calls, "loops", None)

    @loops.setter
    def loops(self, loops: Loops) -> None:
        self._calls.loops = loops

    @property
    def window(self) -> Window:
        """Gradient window of the running call of this thread only."""
        return getattr(self._calls, "window", None)

    @window.setter
    def window(self, window: Window) -> None:
        self._calls.window = window

    @property
    def options(self) -> dict[str, Any]:
        """What the running call of this thread tells the components of loops."""
        return getattr(self._calls, "options", None) or {}

    @options.setter
    def options(self, options: dict[str, Any]) -> None:
        self._calls.options = options

    @property
    def told(self) -> dict[str, Any]:
        """What all calls of this thread tell the components of loops, within `telling`."""
        return getattr(self._calls, "told", None) or {}

    @contextmanager
    def telling(self, options: dict[str, Any]) -> Iterator[None]:
        """Tell the components of loops something in all calls of this thread."""
        outer = self.told
        self._calls.told = outer | options
        try:
            yield
        finally:
            self._calls.told = outer

    @contextmanager
    def played_by(self, player: Player) -> Iterator[None]:
        """In calls of this thread, `player` makes the last state from what was recorded, in the place of the plan."""
        outer, self._calls.player = getattr(self._calls, "player", None), player
        try:
            yield
        finally:
            self._calls.player = outer

    @property
    def told_names(self) -> tuple[str, ...]:
        """Arguments of a call that are for the components of loops."""
        return () if self.make_passes is None else ("initial_state", "generator")

    def taken(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments, taken out of them."""
        return {name: kwargs.pop(name) for name in self.told_names if name in kwargs}

    def begin(self, owner: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the owner: show the recorders."""
        self._lock.acquire()  # recording is per module: one forward at a time
        try:
            if self.frame is not None:  # a call of this thread that KeyboardInterrupt ended before the layers ran
                self.leave()
            player = getattr(self._calls, "player", None)
            if player is not None:
                kwargs = {name: value for name, value in kwargs.items() if name not in _OF_LOOPS}
                if "passes" in owner.__dict__:
                    owner.passes = cast(Any, None)
                self._show(owner, Frame(self, self.plan, owner, player=player))
                return args, kwargs
            loops = kwargs.pop("loops", None)
            loops = self.loops if loops is None else loops
            window = kwargs.pop("window", None)
            window = self.window if window is None else window
            plan, window, rows = counted(self.plan, loops, window)
            if rows is not None and self.relaxed:
                raise ValueError("layers with offsets per visit run all rows at one visit: use one depth for the batch")
            if self.options:
                kwargs = kwargs | {"loop_options": self.options | kwargs.get("loop_options", {})}
            if self.recompute is not None and torch.is_grad_enabled():
                kwargs = without_cache(self.policy, owner, kwargs)
            asked = self.loops, self.window, self.options
            self.loops, self.window, self.options = None, None, {}
            try:
                with self.scoped(plan):
                    rerun, args, kwargs = plan_rerun(self.policy, plan, owner, args, kwargs)
            finally:
                self.loops, self.window, self.options = asked
            collect = kwargs.get("output_hidden_states") or getattr(
                getattr(owner, "config", None), "output_hidden_states", False
            )
            place_output_hooks(owner, kwargs)
            options = dict(kwargs.pop("loop_options", {}))  # calls that had to come first were given them too
            of_call = {"window": window, "rows": rows}
            of_call = options | {name: value for name, value in of_call.items() if value is not None}
            if hasattr(owner, "make_passes"):
                passes, hooks = cast(Any, owner).make_passes(plan, **of_call), []
            elif self.make_passes is not None:
                passes, hooks = self.make_passes(owner, plan, **of_call), []
            else:
                passes, hooks = None, hooks_of_call(plan, window, rows)
            frame = Frame(self, plan, owner, rerun=rerun, passes=passes, hooks=hooks, collect_states=bool(collect))
            self._show(owner, frame)
        except BaseException:
            self._lock.release()
            raise
        return args, kwargs

    def _show(self, owner: nn.Module, frame: Frame) -> None:
        self.frame = frame
        self._calls.is_open = True
        owner._modules[self.name] = self.recorders

    def end(self, owner: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward post-hook of the owner, called after errors too: show the real layers again."""
        if not getattr(self._calls, "is_open", False):  # the call failed before or in `begin`
            return output
        frame = self.leave()
        if output is None:
            return None
        if frame.depth is not None and frame.depth.policy.on_deeper == "catch_up":
            remember_inputs(owner, frame.cache, args, kwargs)
        output = _settle(output, frame)
        return frame.rerun.finish(output) if frame.rerun else output

    def leave(self) -> Frame:
        """Show the real layers again and let other threads in; returns the frame that has ended."""
        frame, self.frame = cast(Frame, self.frame), None
        frame.owner._modules[self.name] = frame.layers
        self._calls.is_open = False
        self._lock.release()
        return frame

    def depth_of(self, cache: Any) -> DepthCache:
        """The depth cache inside a transformers cache, made on first use.

        Raises:
            ValueError: the cache holds tokens of a model without a plan, or is of a class of its own.
        """
        depth = getattr(cache, "depth", None)
        if depth is None:
            if past_length(cache):
                raise ValueError("the cache was filled by a model without a plan: start a new cache")
            refuse_foreign_cache(cache)
            depth = cache.depth = DepthCache(cache, self.policy, self.indices)
            cache.slots = depth.slots
        return depth


def _settle(output: Any, frame: Frame) -> Any:
    """Put what was really computed in the place of recorded stand-ins collected by the model's forward."""
    items = output.items() if hasattr(output, "items") else []
    for key, value in list(items):
        if not isinstance(value, (tuple, list)):
            continue
        if key == "hidden_states" and frame.states and _is_collected_by_forward(value, frame):
            states = frame.states[:-1] if value[-2] is frame.hidden else frame.states[1:]
            output[key] = (*states, value[-1])
        elif any(isinstance(item, Placeholder) for item in value):
            raise ValueError(
                f"output {key} of this model is collected layer by layer and is not available under a plan"
            )
    return output


def _is_collected_by_forward(states: Any, frame: Frame) -> bool:
    """True for hidden states that the model's forward collected itself.

    It does so before (most) or after (Mamba) every layer, and then the last one. What hooks collected is right as is.
    """
    if len(states) != len(frame.layers) + 1 or not all(item is frame.hidden for item in states[:-2]):
        return False
    return states[-2] is frame.hidden or states[-2] is frame.played


def hook_owner(owner: nn.Module, looping: Looping) -> None:
    """Let a module's forward be recorded and played."""
    owner.__dict__["loopwise"] = looping
    owner.register_forward_pre_hook(looping.begin, with_kwargs=True)
    owner.register_forward_hook(looping.end, with_kwargs=True, always_call=True)


@lru_cache(maxsize=256)
def visit_numbers(plan: Plan) -> dict[SlotKey, int]:
    """For every slot key, how many visits of the same layer come before it in the plan."""
    seen: Counter[int] = Counter()
    numbers = {}
    for slot in plan.slots:
        numbers[slot.key] = seen[slot.layer]
        seen[slot.layer] += 1
    return numbers


def owner_of(model: nn.Module, looping: Looping) -> nn.Module:
    """The module that owns the layers which a plan visits."""
    return next(module for module in model.modules() if module.__dict__.get("loopwise") is looping)


def looping_of(model: nn.Module) -> Looping | None:
    """What `attach` left on a model, or None."""
    for module in model.modules():
        looping = module.__dict__.get("loopwise")
        if isinstance(looping, Looping):
            return looping
    return None

"""Components of loops from their JSON form: for our own decoder, and added to an attached model.

Shapes: D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import nn

from loopwise.loop import config as components
from loopwise.loop.halting import Gate
from loopwise.loop.passes import LoopModule, Passes
from loopwise.loop.state import NormalState, StateInit
from loopwise.models.attach import eval_mode
from loopwise.models.decoder_config import LOOP_FIELDS, SHARED_NORM
from loopwise.models.hub import probe_inputs, refuse_adapters
from loopwise.models.norms import NormConfig
from loopwise.models.playing import looping_of, owner_of
from loopwise.models.wrapper import COMPONENTS
from loopwise.plan.plans import Plan

NAME = "loops"
# What needs nothing of the model around the loop. The rest needs its outputs, its embeddings or its positions.
ATTACHED_FIELDS = ("state", "update", "entry", "turn", "exit", "exit_projection", "grad")
_CALL_OPTIONS = ("initial_state", "generator", "window", "rows")


class Shared(nn.Module):
    """A module used in a second place, without being registered there."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.__dict__["of"] = (module,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does."""
        return self.__dict__["of"][0](*args, **kwargs)


class Loops(nn.ModuleDict):
    """The `LoopModule`s that were added to an attached model, by loop name."""

    is_component = True


class AttachedPasses:
    """Makes the `Passes` of one forward of an attached model with loop components; holds no module."""

    def __call__(self, owner: nn.Module, plan: Plan, **options: Any) -> Passes:
        """The components of the named loops of a plan at work.

        Raises:
            ValueError: an option that needs what an attached model lacks.
        """
        for name in options:
            if name not in _CALL_OPTIONS:
                raise ValueError(f"{name}= is for models of loopwise, an attached model takes initial_state, generator")
        loops = cast(Mapping[str, nn.Module], owner._modules[NAME])
        return Passes(plan, {name: loops[name] for name in plan.loops if name in loops}, **options)


def build_loop(
    name: str,
    loops: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    width: int,
    *,
    final_norm: nn.Module | None = None,
    allowed: Collection[str] = LOOP_FIELDS,
) -> LoopModule:
    """The module of one loop.

    Args:
        name: of the loop.
        loops: the JSON form of all loops, see `LoopwiseDecoderConfig.loops`.
        plan: must have the loop.
        width: D.
        final_norm: what the text "norm" stands for; None knows no such norm.
        allowed: the fields that this kind of model has.

    Raises:
        ValueError: the plan lacks the loop, or a component is unknown or not available.
    """
    spec = loops[name]
    if name not in plan.loops:
        raise ValueError(f"loops names {name!r}, the plan {plan} has {', '.join(plan.loops) or 'no named loop'}")

    def norm(key: str) -> nn.Module | None:
        value = spec.get(key)
        if value is None:
            return None
        if value != SHARED_NORM:
            return NormConfig(**value).build(width)
        if final_norm is None:
            raise ValueError(f"loop {name!r} has {key}={value!r}: an attached model needs a norm's dictionary instead")
        return Shared(final_norm)

    def component(key: str) -> Any:
        config: Any = components.from_dict(spec[key], axis=key) if spec.get(key) else None
        return None if config is None else config.build(width)

    unknown = sorted(set(spec) - set(LOOP_FIELDS))
    if unknown:
        raise ValueError(f"loop {name!r} has an unknown component {unknown[0]!r}")
    missing = sorted(set(spec) - set(allowed))
    if missing:
        raise ValueError(f"loop {name!r} has {missing[0]!r}, which an attached model lacks: use {', '.join(allowed)}")
    if spec.get("route") or spec.get("follows"):
        return _build_routed(name, loops, plan, width)
    projection = spec.get("exit_projection")
    exit_norm = nn.Linear(width, width, bias=projection == "bias") if projection else norm("exit")
    return LoopModule(
        state=cast(StateInit, components.from_dict(spec["state"], axis="state")) if spec.get("state") else None,
        update=component("update"),
        entry=norm("entry"),
        signal=component("signal"),
        conditioner=component("conditioner"),
        turn=norm("turn"),
        exit=exit_norm,
        stream=spec.get("stream"),
        reads=tuple(spec.get("reads", ())),
        grad=spec.get("grad"),
        gate=_gate(name, spec.get("gate"), width),
        halting=components.from_dict(spec["halting"], axis="halting") if spec.get("halting") else None,
        on_exit=spec.get("on_exit", "skip"),
    )


def add_loops(model: nn.Module, loops: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give named loops of an attached model components: where the state starts, how the input re-enters; in place.

    The components are modules `loops` of the module that owns the layers, with parameters of their own, in the dtype of
    the model. Calls then also take `initial_state=` (a tensor that broadcasts to `[B, T, D]`) and `generator=`, the
    source of a random first state, without which such a model refuses to run. With
    `{"core": {"update": {"kind": "update.concat", "init": "pass_state"}}}` the function is exactly what it was.

    Args:
        model: with a plan that names the loops.
        loops: by loop name the JSON form of its components, as in `LoopwiseDecoderConfig.loops`; of those `state`,
            `update`, `entry`, `turn`, `exit`, `exit_projection` and `grad`.

    Returns:
        The model.

    Raises:
        ValueError: no plan, no such loop, a component that needs more than an attached model has, components or
            adapters or shards are there already, or one of our own decoders, whose configuration says it.
    """
    looping = looping_of(model)
    if looping is None:
        raise ValueError("this model has no plan: use loopwise.attach(model, plan) first")
    owner = owner_of(model, looping)
    if hasattr(owner, "make_passes"):
        raise ValueError(f"{type(model).__name__} is a model of loopwise: name its components in config.loops")
    refuse_adapters(model)
    if NAME in looping.components:
        raise ValueError("the loops of this model have components already: detach it first")
    if hasattr(owner, NAME):
        raise ValueError(f"{type(owner).__name__} has a part named {NAME!r} of its own: its loops take no components")
    if not loops:
        raise ValueError("add_loops: name at least one loop")
    layers = cast(nn.ModuleList, owner._modules[looping.name])
    like = next(parameter for parameter in layers.parameters() if parameter.is_floating_point())
    if type(like.data).__name__ == "DTensor":
        raise ValueError("this model is sharded: give its loops components before shard(model)")
    width = _width(model, layers[looping.plan.layers[0]])
    made = {name: build_loop(name, loops, looping.plan, width, allowed=ATTACHED_FIELDS) for name in loops}
    modules = Loops(made).to(like.device, like.dtype).train(owner.training)
    owner.add_module(NAME, modules)
    looping.make_passes = AttachedPasses()
    looping.components[NAME] = {name: _plain(spec) for name, spec in loops.items()}
    return model


COMPONENTS[NAME] = add_loops


def needs_generator(model: nn.Module) -> bool:
    """Whether a loop of a model starts at random, so that calls take a `generator=` (or an `initial_state=`)."""
    looping = looping_of(model)
    if looping is None:
        return False
    modules = owner_of(model, looping)._modules.get(NAME)
    found = modules.values() if isinstance(modules, nn.ModuleDict) else ()
    states = [module.state for module in found if isinstance(module, LoopModule)]
    return any(isinstance(state, NormalState) and state.scale > 0 for state in states)


def _width(model: nn.Module, layer: nn.Module) -> int:
    """D, learned from the state that reaches a layer in a call of a few tokens.

    Raises:
        ValueError: the state is not of the form `[B, T, D]`.
    """
    shapes = []

    def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
        shapes.append((args[0] if args else kwargs["hidden_states"]).shape)

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with eval_mode(model):
            model(**probe_inputs(model))
    finally:
        handle.remove()
    if len(shapes[0]) != 3:
        raise ValueError(f"states of {type(model).__name__} have {len(shapes[0])} axes: its loops take no components")
    return shapes[0][-1]


def _plain(value: Any) -> Any:
    """JSON values, with lists for tuples."""
    if isinstance(value, components.Component):
        return components.to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _build_routed(name: str, loops: Mapping[str, Mapping[str, Any]], plan: Plan, width: int) -> LoopModule:
    spec = loops[name]
    others = sorted(set(spec) - ({"route", "iterations"} if spec.get("route") else {"follows"}))
    if others:
        raise ValueError(f"loop {name!r} has routers, which go with no other component: leave {others[0]!r} out")
    if spec.get("follows"):
        if not loops.get(spec["follows"], {}).get("route"):
            raise ValueError(f"loop {name!r} follows {spec['follows']!r}, which has no routers of its own")
        return LoopModule(follows=spec["follows"])
    members = [name, *(other for other, item in loops.items() if item.get("follows") == name)]
    route: Any = components.from_dict(spec["route"], axis="route")
    iterations = spec.get("iterations") or sum(plan.counts[member] for member in members)
    return LoopModule(route=route.build(width, iterations))


def _gate(name: str, spec: Any, width: int) -> Gate | None:
    if spec in (None, False):
        return None
    if not isinstance(spec, bool | int | float):
        raise ValueError(f"loop {name!r} has gate={spec!r}: use true, or the first value of its bias")
    return Gate(width, bias=0.0 if spec is True else float(spec))

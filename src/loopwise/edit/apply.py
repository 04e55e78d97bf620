"""Edits of depth in memory, in their three realisations.

    alias        the same model visits its own tensors in another order: nothing is added, nothing is copied
    tie          a new model with every new layer once, and the plan attached: gradients of a layer's visits add up
    materialize  a new plain model with a layer of its own for every visit

All three compute the same (law 2). An edit that claims to keep the function is tried on a few tokens before it is given
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from torch import nn
from torch.distributed.tensor import DTensor

from loopwise.cache.policy import CachePolicy
from loopwise.edit.kinds import refuse_different_kinds, shared_tensor
from loopwise.edit.maps import DepthEdit, NewLayer
from loopwise.edit.operators import DepthOperator, Operator
from loopwise.edit.outputs import table, why_not_zero
from loopwise.edit.probe import probe_logits, refuse_other_function, refuse_unless_identity, under
from loopwise.edit.relax import relax
from loopwise.edit.sources import TensorSource, fill, sources_of, tensor_sources
from loopwise.edit.text import parse
from loopwise.models.attach import attach, detach
from loopwise.models.hub import base_model, layer_list, refuse_adapters, text_config
from loopwise.models.loop_parts import add_loops
from loopwise.models.playing import Looping, looping_of
from loopwise.models.realise import LayerNames, fixed_random_numbers, has_own_plan, materialize, rebuild, tensors_of
from loopwise.plan import Plan

__all__ = ["Mode", "TensorSource", "apply", "plan_edit", "realise", "tensor_sources"]

Mode = Literal["alias", "tie", "materialize"]
MODES = ("alias", "tie", "materialize")
Operators = Operator | str | Sequence[Operator | str]


def apply(model: nn.Module, operator: Operators, *, mode: Mode | None = None) -> Any:
    """Edit the depth of a causal language model.

    Args:
        model: a model that `attach` supports, with a plan or without one (every layer once), or a decoder of our own.
            "alias" changes it in place, the other modes leave it as it is.
        operator: what to do, or its text such as "llama_pro(every=4)", or several of them, one after the other.
        mode: the realisation of the (last) edit; None is the operator's own.

    Returns:
        The edited model. A new one has the class, mode, dtype and device of the old one. A tied model has its plan
        attached unless that plan visits every layer once and in order.

    Raises:
        ValueError: what the operator refuses; a mode that cannot hold the edit; adapters, packed weights, sharded
            tensors, an encoder-decoder; layers of different kinds that would become one; an architecture whose
            configuration cannot express the new layers, or whose layers depend on their number.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode is {mode!r}: use one of {', '.join(MODES)}")
    edit: DepthEdit | None = None
    for one in _operators(operator):
        if edit is not None and (_parts(model) or not isinstance(one, DepthOperator)):
            model, edit = realise(model, edit, mode=edit.default), None
        if not isinstance(one, DepthOperator):
            model = _widened(model, one, mode)
        elif edit is None:
            edit = one.edit(*_before(model))
        else:
            settled = _settled(edit)
            later = one.edit(settled.plan, len(settled.layers))
            try:
                edit = settled.then(later)
            except ValueError:  # the two cannot be one edit
                model = realise(model, edit, mode=edit.default)
                edit = one.edit(*_before(model))
    return model if edit is None else realise(model, edit, mode=mode or edit.default)


def plan_edit(model: nn.Module, operator: Operators) -> DepthEdit:
    """What `apply` would do, as data; several operators as one edit.

    Raises:
        ValueError: what the operators refuse, or operators that cannot be one edit.
    """
    edit: DepthEdit | None = None
    for one in _operators(operator):
        if not isinstance(one, DepthOperator):
            raise ValueError(f"{one.kind} is no operator of depth: apply it with apply()")
        if edit is None:
            edit = one.edit(*_before(model))
        else:
            edit = _settled(edit)
            edit = edit.then(one.edit(edit.plan, len(edit.layers)))
    assert edit is not None, "_operators gives at least one"
    return edit


def realise(model: nn.Module, edit: DepthEdit, *, mode: Mode) -> Any:
    """Carry out an edit that `plan_edit` made for this model; arguments, result and errors as of `apply`."""
    base = base_model(model)
    plan, num_layers = _before(model)
    if edit.num_layers != num_layers or edit.before.layers != plan.layers:
        raise ValueError(
            f"the edit is of {edit.num_layers} layers under {edit.before}, the model has {num_layers} under {plan}"
        )
    if mode == "alias":
        return _alias(model, edit.alias_plan())
    _refuse_what_cannot_be_rebuilt(model)
    if _parts(model):
        return _untied(model, edit, mode)
    if mode == "materialize":
        if edit.relaxation is not None:
            return materialize(realise(model, edit, mode="tie"))
        edit = edit.unrolled()
    refuse_different_kinds(base, edit)
    shared = shared_tensor(base)
    if shared is not None and not edit.is_copy:
        raise ValueError(f"{_shares(base, shared)}: a layer cannot be changed on its own")
    try:
        new = _rebuilt_decoder(base, edit) if has_own_plan(base) else _rebuilt(model, edit)
    except ValueError as error:
        if shared is None:
            raise
        raise ValueError(f"{_shares(base, shared)}: {error}") from error
    if edit.relaxation is not None:
        relax(model, new, edit)
    if edit.loops and not has_own_plan(new):
        with fixed_random_numbers():
            add_loops(new, dict(edit.loops))
    return new


def _untied(model: nn.Module, edit: DepthEdit, mode: Mode) -> nn.Module:
    """The materialised model of one with offsets per visit, whose visits are the only thing to make layers of."""
    unrolled = edit.unrolled()
    visits = tuple(layer.sources[0] for layer in unrolled.layers)
    if not unrolled.is_copy or visits != edit.before.layers or edit.plan != unrolled.plan and mode == "tie":
        raise ValueError("this model has offsets per visit, or components of loops: untie() it first")
    return materialize(model)


def _rebuilt(model: nn.Module, edit: DepthEdit) -> nn.Module:
    """The new model, from one of transformers."""
    base, looping = base_model(model), looping_of(model)
    firsts = tuple(NewLayer(sources=layer.sources[:1]) for layer in edit.layers)
    as_copies = replace(edit, layers=firsts, relaxation=None, loops=())
    with under(model, as_copies.alias_plan()):
        want = probe_logits(model)
        new = rebuild(base, [layer.sources[0] for layer in firsts])
    if edit.plan != Plan.identity(len(firsts)):
        policy = CachePolicy() if looping is None else looping.policy
        attach(new, edit.plan, cache=str(policy), on_deeper=policy.on_deeper)
        cast(Looping, looping_of(new)).recompute = None if looping is None else looping.recompute
    refuse_other_function(want, new, "what a layer does depends on its number")
    _fill(base, new, edit)
    zeroed = [number for number, layer in enumerate(edit.layers) if layer.zero]
    if zeroed:
        refuse_unless_identity(new, zeroed, _known_reason(base))
        if edit.promise == "exact":
            refuse_other_function(probe_logits(model), new, "its layers hand more than the state to the next one")
    return new


def _known_reason(base: nn.Module) -> str | None:
    """Why a layer that is tried and found not to be the identity is none, where the table knows."""
    config = text_config(base)
    return why_not_zero(config.model_type, config.to_dict()) if config.model_type in table() else None


def _rebuilt_decoder(base: Any, edit: DepthEdit) -> nn.Module:
    """The new model, from a decoder of our own: its layers do not know their number, and say what they are."""
    blocks = base.config.block_configs()
    for layer in edit.layers:
        told = {"blocks": [blocks[layer.sources[0]].to_dict()]}
        reason = why_not_zero("loopwise_decoder", told) if layer.zero else None
        if reason is not None:
            raise ValueError(f"layer {layer.sources[0]} cannot start as the identity: {reason}")
    new = rebuild(base, [layer.sources[0] for layer in edit.layers], edit.plan, loops=dict(edit.loops))
    cast(Looping, looping_of(new)).recompute = cast(Looping, looping_of(base)).recompute
    _fill(base, new, edit)
    return new


def _fill(base: nn.Module, new: nn.Module, edit: DepthEdit) -> None:
    """Means, zeros and factors; tensors that are not saved follow from the configuration."""
    split = LayerNames(new).split
    names = [name for name in new.state_dict() if split(name) is not None]
    fill(new, tensors_of(base), sources_of(base, edit.layers, names), names)


def _alias(model: nn.Module, plan: Plan) -> nn.Module:
    """The same model under another plan."""
    looping, base = looping_of(model), base_model(model)
    if looping is None:
        return attach(model, plan)
    if _parts(model):
        raise ValueError("this model has offsets per visit, or components of loops, which belong to its plan")
    if has_own_plan(base):
        lost = sorted(name for name, spec in (base.config.loops or {}).items() if spec and name not in plan.loops)
        if lost:
            raise ValueError(f"the plan {plan} has no loop {lost[0]!r}, which has components in this model")
        looping.plan = plan
        base.config.plan = str(plan)
        return model
    detach(model)
    kept: Any = {"cache": str(looping.policy), "on_deeper": looping.policy.on_deeper, "hooks": looping.hooks}
    try:
        attach(model, plan, **kept)
    except ValueError:
        attach(model, looping.plan, **kept)
        raise
    finally:
        cast(Looping, looping_of(model)).recompute = looping.recompute
    return model


def _refuse_what_cannot_be_rebuilt(model: nn.Module) -> None:
    refuse_adapters(model)
    base, looping = base_model(model), looping_of(model)
    if getattr(base.config, "quantization_config", None) is not None or getattr(base, "is_quantized", False):
        raise ValueError("the weights of this model are quantised: use mode 'alias', or load them dequantised")
    if any(isinstance(parameter, DTensor) for parameter in base.parameters()):
        raise ValueError("this model is sharded: gather it, edit the whole model, and shard it again")
    if looping is not None and looping.hooks:
        raise ValueError(
            "this model has hooks on its visits, which new layers would not have: set_hooks(model, []) first"
        )


def _before(model: nn.Module) -> tuple[Plan, int]:
    num_layers = len(layer_list(base_model(model)).layers)
    looping = looping_of(model)
    return (Plan.identity(num_layers) if looping is None else looping.plan), num_layers


def _operators(given: Operators) -> list[Operator]:
    listed = [given] if isinstance(given, (str, Operator)) else list(given)
    if not listed:
        raise ValueError("no operator is given: name at least one, such as 'stack(2)'")
    return [parse(one) if isinstance(one, str) else one for one in listed]


def _widened(model: nn.Module, operator: Operator, mode: Mode | None) -> nn.Module:
    """What an operator makes of a model that says itself how it is carried out, such as those of width."""
    carry_out: Any = getattr(operator, "apply", None)
    if carry_out is None:
        raise ValueError(f"{operator.kind} cannot be applied to a model in memory")
    if mode == "alias":
        raise ValueError(f"{operator.kind} makes new tensors: mode 'alias' is for edits of depth")
    return carry_out(model)


def _parts(model: nn.Module) -> bool:
    """Whether a model has parts beside its plan: offsets per visit, or components of loops that were added to it."""
    looping = looping_of(model)
    return looping is not None and bool(looping.components)


def _settled(edit: DepthEdit) -> DepthEdit:
    """The edit in its own realisation, as what a later operator starts from."""
    return edit.unrolled() if edit.default == "materialize" else edit


def _shares(base: nn.Module, shared: tuple[int, int, str]) -> str:
    one, two, name = shared
    return f"{type(base).__name__} shares {name} between its layers {one} and {two}"

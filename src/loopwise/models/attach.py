"""Give a transformers causal language model a plan, in place, and take it away again.

`attach` installs two hooks on the module that owns the decoder layers (see `playing`) and one on the model, nothing
else: the model stays an instance of its own class, with its own parameters under their own names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from loopwise.cache.policy import CachePolicy
from loopwise.loop.count import LoopCounts
from loopwise.loop.execute import Hook
from loopwise.models.hub import (
    LayerList,
    base_model,
    cache_indices,
    layer_lists,
    leak,
    probe_inputs,
    refuse_encoder_decoder,
)
from loopwise.models.playing import Looping, Returns, hook_owner, looping_of
from loopwise.models.slicing import learn_axes
from loopwise.models.wrapper import keep_plan_on_save, remove_components
from loopwise.plan.plans import Plan


def attach(
    model: nn.Module,
    plan: Plan | str,
    *,
    cache: str = "own",
    on_deeper: str = "refuse",
    loops: int | Mapping[str, int] | None = None,
    hooks: Sequence[Hook] = (),
) -> nn.Module:
    """Make a causal language model visit its layers in the order of a plan.

    The model is changed in place and returned. It is first tried on a few tokens: under the identity plan its logits
    must be bit for bit what they were. `generate`, training, `save_pretrained`, PEFT and deepcopy go on working;
    `model(input_ids, loops=2)` and `model.generate(..., loops=2)` change the iteration count of one call. In training,
    `model(input_ids, loops=8, window=2)` lets the last two iterations carry a gradient; loops may also be a `LoopCount`
    (both numbers in one) or `LoopCounts` (a depth for every row of the batch).

    Args:
        model: a transformers causal language model, or one wrapped by PEFT.
        plan: the plan, or its text, such as `0-9 (10-19)x2 20-29`.
        cache: cache policy, see `loopwise.cache.policy`: own (exact), last, first, ring(k), or a pair prefill/decode.
        on_deeper: "refuse" or "catch_up", what to do when a call goes deeper than the tokens already in its cache did.
        loops: iteration counts that replace those of the plan.
        hooks: called around every visit, see `loopwise.loop.execute.Hook`.

    Raises:
        ValueError: the plan names layers that do not exist, the model has a plan already, is an encoder-decoder, has no
            recognisable layer list, or computes something between its layers.
    """
    plan = _as_plan(plan)
    policy = CachePolicy.parse(cache, on_deeper)
    if loops is not None:
        plan = plan.with_loops(loops)
    refuse_encoder_decoder(model)
    if looping_of(model) is not None:
        raise ValueError("this model has a plan already: detach it first, or use set_loops to change counts")
    _warn_of_annotations(plan)
    found, looping, was_causal = _calibrate(model, plan)
    looping.policy = policy
    if hooks:
        looping.hooks = list(hooks)
        with eval_mode(model):
            looping.axes = learn_axes(model, found.layers)
    _install(model, found.owner, looping)
    looping.plan = plan
    _try_plan(model, plan, was_causal)
    keep_plan_on_save(base_model(model))
    base_model(model).__dict__["generate"] = Generate(base_model(model))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the plan away, and what was added to it, in place: the model is what it was before `attach`.

    Raises:
        ValueError: the model has no plan, or is one of our own decoders, whose plan is a part of it.
    """
    looping = _looping(model)
    if any(module.__dict__.get("loopwise") is looping and hasattr(module, "make_passes") for module in model.modules()):
        raise ValueError(f"the plan is a part of {type(model).__name__}: it cannot be taken away")
    for module in model.modules():
        _remove_hooks(module, looping)
        if module.__dict__.get("loopwise") is looping:
            del module.__dict__["loopwise"]
    remove_components(model)
    for name in ("save_pretrained", "generate"):
        base_model(model).__dict__.pop(name, None)
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """The plan of a model, or None when it has none."""
    looping = looping_of(model)
    return None if looping is None else looping.plan


def set_loops(model: nn.Module, loops: int | Mapping[str, int] | None = None, **named: int) -> nn.Module:
    """Change iteration counts from the next call on: `set_loops(model, 4)` or `set_loops(model, core=4)`.

    Raises:
        ValueError: no such loop (the message suggests the nearest name), a count below 1, or no plan.
    """
    looping = _looping(model)
    looping.plan = looping.plan.with_loops(*(() if loops is None else (loops,)), **named)
    return model


@contextmanager
def use_loops(model: nn.Module, loops: int | Mapping[str, int] | None = None, **named: int) -> Iterator[nn.Module]:
    """Change iteration counts within a `with` block, for the calls of the present thread."""
    looping = _looping(model)
    with looping.scoped(looping.plan.with_loops(*(() if loops is None else (loops,)), **named)):
        yield model


def set_cache(model: nn.Module, policy: str, on_deeper: str = "refuse") -> nn.Module:
    """Change the cache policy of caches to come; `ValueError` for an unknown policy."""
    _looping(model).policy = CachePolicy.parse(policy, on_deeper)
    return model


def set_hooks(model: nn.Module, hooks: Sequence[Hook]) -> nn.Module:
    """Replace the hooks that are called around every visit.

    The model is run on a few tokens to learn how to slice its arguments.
    """
    if hooks:
        learn_rows(model)
    _looping(model).hooks = list(hooks)
    return model


def learn_rows(model: nn.Module) -> None:
    """Learn, once, how to slice the arguments of a model's layers to some rows and tokens, by running a few tokens."""
    looping = _looping(model)
    if looping.axes:
        return
    with eval_mode(model), _identity(looping, ()):
        owner = next(m for m in model.modules() if m.__dict__.get("loopwise") is looping)
        looping.axes = learn_axes(model, cast(nn.ModuleList, owner._modules[looping.name]))


class Generate:
    """`generate` of an attached model: that of its class, with `loops=` for the length of the call."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, loops: int | Mapping[str, int] | None = None, **kwargs: Any) -> Any:
        """Arguments and result as in transformers; `initial_state=` and `generator=` where loops have components."""
        generate: Any = type(self.model).generate  # pyright: ignore[reportAttributeAccessIssue]
        looping = _looping(self.model)
        with looping.telling(looping.taken(kwargs)):
            if loops is None:
                return generate(self.model, *args, **kwargs)
            with use_loops(self.model, loops):
                return generate(self.model, *args, **kwargs)


class PerCallLoops:
    """Hooks on the model itself, which hand some of a call's arguments to the decoder.

    They take `loops=` and `window=`, and what the components of loops are told, out of the arguments.
    """

    def __init__(self, looping: Looping):
        self.looping = looping

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the model."""
        self.looping.loops, self.looping.window, self.looping.options = None, None, self.looping.told
        if not kwargs.keys() & {"loops", "window", *self.looping.told_names}:
            return None
        kwargs = dict(kwargs)
        loops, window, told = kwargs.pop("loops", None), kwargs.pop("window", None), self.looping.taken(kwargs)
        if isinstance(loops, LoopCounts):
            learn_rows(model)
        self.looping.loops, self.looping.window, self.looping.options = loops, window, self.looping.told | told
        return args, kwargs

    def end(self, _: nn.Module, __: tuple, ___: Any) -> None:
        """Forward post-hook of the model, called after errors too."""
        self.looping.loops, self.looping.window, self.looping.options = None, None, {}


def _calibrate(model: nn.Module, plan: Plan) -> tuple[LayerList, Looping, bool]:
    """Find the layer list and prove on a few tokens that playing the identity plan changes nothing."""
    reason = "it has no recognisable list of decoder layers"
    for found in layer_lists(model):
        try:
            with eval_mode(model):
                looping, was_causal = _try(model, found)
        except _NotThisListError as error:
            reason = str(error)
            continue
        plan.validate(len(found.layers))
        return found, looping, was_causal
    raise ValueError(f"{type(base_model(model)).__name__} cannot be looped: {reason}")


class _NotThisListError(ValueError):
    """A candidate is not the decoder's layer list."""


def _try(model: nn.Module, found: LayerList) -> tuple[Looping, bool]:
    layers = found.layers
    called: list[int] = []
    outputs: dict[int, Any] = {}

    def note(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            called.append(index)
            outputs[index] = output

        return hook

    before = _tensor_attributes(layers)
    handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(layers)]
    try:
        plain = getattr(model(**probe_inputs(model)), "logits", None)
    finally:
        for handle in handles:
            handle.remove()
    if plain is None:
        raise ValueError(f"{type(base_model(model)).__name__} returns no logits: only language models can be looped")
    if called != list(range(len(layers))):
        raise _NotThisListError(f"{found.path} is not called once and in order")
    looping = Looping(
        name=found.name,
        plan=Plan.identity(len(layers)),
        policy=CachePolicy(),  # others differ by rounding even under the identity plan
        indices=cache_indices(layers),
        returns=tuple(Returns.of(outputs[i]) for i in range(len(layers))),
        state_names=_changed_attributes(layers, before),
    )
    _put_back(layers, before)
    _install(model, found.owner, looping)
    try:
        with _identity(looping, ()):
            played = model(**probe_inputs(model)).logits
    except ValueError as error:
        raise _NotThisListError(str(error)) from error
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise _NotThisListError(
            f"its forward uses what its layers return beyond the hidden state ({type(error).__name__})"
        ) from error
    finally:
        _remove_hooks(model, looping)
        _remove_hooks(found.owner, looping)
        del found.owner.__dict__["loopwise"]
        _put_back(layers, before)
    if not torch.equal(plain, played):
        raise _NotThisListError("its forward does more between the layers than pass the hidden state on")
    return looping, leak(plain) < 1e-3


def _try_plan(model: nn.Module, plan: Plan, was_causal: bool) -> None:
    """Refuse a plan in which a layer lacks what another was to compute first, such as shared keys and values."""
    looping = _looping(model)
    hooks, looping.hooks, looping.plan = looping.hooks, [], plan.capped(2)
    try:
        with eval_mode(model):
            logits = model(**probe_inputs(model)).logits
        if was_causal and leak(logits) > 1e-2:
            raise ValueError("its layers hand the state of a whole sequence on, so that tokens would see later ones")
    except Exception as error:  # whatever the layers say
        detach(model)
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(
            f"{type(base_model(model)).__name__} does not run under plan {plan}: {type(error).__name__} {reason}"
        ) from error
    looping.hooks, looping.plan = hooks, plan


def _install(model: nn.Module, owner: nn.Module, looping: Looping) -> None:
    hook_owner(owner, looping)
    per_call = PerCallLoops(looping)
    model.register_forward_pre_hook(per_call.begin, with_kwargs=True)
    model.register_forward_hook(per_call.end, always_call=True)


def _remove_hooks(module: nn.Module, looping: Looping) -> None:
    tables = (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    )
    for hooks, flags in tables:
        for key, hook in list(hooks.items()):
            target = getattr(hook, "__self__", None)
            if target is looping or (isinstance(target, PerCallLoops) and target.looping is looping):
                for table in (hooks, *flags):
                    table.pop(key, None)


def _looping(model: nn.Module) -> Looping:
    looping = looping_of(model)
    if looping is None:
        raise ValueError("this model has no plan: use loopwise.attach(model, plan) first")
    return looping


def _warn_of_annotations(plan: Plan) -> None:
    unknown = sorted({name for slot in plan.capped(1).slots for name in plan.annotations(slot)})
    if unknown:
        warnings.warn(
            f"plan annotations {', '.join(unknown)} are kept with the plan, but have no effect on an attached model",
            stacklevel=3,
        )


def _as_plan(plan: Plan | str) -> Plan:
    return plan if isinstance(plan, Plan) else Plan.parse(plan)


@contextmanager
def _identity(looping: Looping, hooks: Sequence[Hook]) -> Iterator[None]:
    saved = looping.plan, looping.hooks
    looping.plan, looping.hooks = Plan.identity(len(looping.returns)), list(hooks)
    try:
        yield
    finally:
        looping.plan, looping.hooks = saved


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient, with every module's mode put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tensor_attributes(layers: nn.ModuleList) -> list[dict[tuple[str, str], Any]]:
    """Per layer, (module path, name) -> value of every plain attribute that is a tensor or None."""
    return [
        {
            (path, name): value
            for path, module in layer.named_modules()
            for name, value in module.__dict__.items()
            if value is None or isinstance(value, torch.Tensor)
        }
        for layer in layers
    ]


def _changed_attributes(layers: nn.ModuleList, before: list[dict]) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Per layer, the attributes in which it keeps state on itself; empty when no layer does."""
    now = _tensor_attributes(layers)
    changed = tuple(
        tuple(key for key, value in after.items() if isinstance(value, torch.Tensor) and old.get(key) is not value)
        for after, old in zip(now, before, strict=True)
    )
    return changed if any(changed) else ()


def _put_back(layers: nn.ModuleList, before: list[dict]) -> None:
    for layer, values in zip(layers, before, strict=True):
        for (path, name), value in values.items():
            setattr(layer.get_submodule(path), name, value)

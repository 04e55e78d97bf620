"""Materialise: the plain, unrolled model that a plan stands for.

An alias (what `attach` makes) visits one set of tensors many times. Its materialised twin is a model of the same class
with as many layers as the plan has slots, every visit with tensors of its own. The twin is *rebuilt from an expanded
configuration*, not patched: a patched copy keeps stale sizes in its modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loopwise.io.layer_fields import expand_values
from loopwise.models.attach import eval_mode
from loopwise.models.hub import base_model, build_model, layer_list, probe_inputs, refuse_adapters
from loopwise.models.loop_parts import build_loop
from loopwise.models.playing import looping_of, owner_of, visit_numbers
from loopwise.models.relaxation import NAME as RELAXATION
from loopwise.models.relaxation import relaxation_of
from loopwise.plan.plans import Plan


def materialize(model: nn.Module, plan: Plan | None = None) -> nn.Module:
    """The plain model, of the same class, that has one layer of its own per visit of the plan.

    Args:
        model: a causal language model with a plan (see `attach`), or a plain one when `plan` is given. It is not
            changed.
        plan: the plan to unroll, default the model's own.

    Returns:
        A new model with new tensors, in the same mode, dtype and place. Its logits are those of the looped model.

    Raises:
        ValueError: no plan, adapters are present, or the architecture ties what a layer does to its number in a way
            that its configuration cannot express (such a model loops, but cannot be exported).
    """
    base = base_model(model)
    looping = looping_of(model)
    if plan is None:
        if looping is None:
            raise ValueError("this model has no plan: use loopwise.attach(model, plan) first, or pass plan=")
        plan = looping.plan
    layers = layer_list(base).layers
    plan.validate(len(layers))
    if looping is not None and looping.components.keys() - {RELAXATION}:
        raise ValueError(f"{_refusal(base)}: its loops have components of their own")
    visits = visit_numbers(plan)
    twin = rebuild(model, plan.layers, visits=[visits[slot.key] for slot in plan.slots])
    if looping is not None and looping.plan == plan and not looping.hooks and not has_own_plan(model):
        _check(model, twin)
    return twin


def rebuild(
    model: nn.Module,
    sources: Sequence[int],
    plan: Plan | None = None,
    *,
    visits: Sequence[int] | None = None,
    loops: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model of the same class with other layers: layer n has copies of the tensors of layer `sources[n]`.

    Everything outside the layers is copied too, tied tensors stay tied, and so do modes, dtypes, the place, and whether
    a parameter is trained. The global random numbers are where they were. Whether the layers compute what they did is
    not tried here.

    Args:
        model: a causal language model, with a plan or without; it is not changed.
        sources: numbers of old layers, at least one.
        plan: for a decoder of our own, the plan that the new one is built with, default the identity. Others come back
            without a plan.
        visits: per new layer, which visit of its old layer it stands for: tensors with offsets per visit become those
            of that visit. None where there are no offsets.
        loops: for a decoder of our own, components that named loops get beside those that there are. What is random in
            them is the same every time.

    Raises:
        ValueError: adapters are present, or the configuration cannot express such layers.
    """
    base = base_model(model)
    refuse_adapters(model)
    found = layer_list(base)
    try:
        if has_own_plan(base):
            config = _decoder_config(base, sources, plan or Plan.identity(len(sources)), loops or {})
        else:
            config = expand_config(base.config, sources, len(found.layers))
        with fixed_random_numbers():
            twin = build_model(base, config)
    except _RefusedError:
        raise
    except Exception as error:  # whatever a configuration or model class says to a depth it does not expect
        raise ValueError(f"{_refusal(base)}: {_first_line(error)}") from error
    if loops:
        _start_loops(twin, loops)
    names = LayerNames(base)
    _copy_tensors(base, twin, names, sources, visits, tuple(loops or ()))
    _copy_modes(base, twin, names, sources)
    return twin


def has_own_plan(model: nn.Module) -> bool:
    """Whether the plan is a part of the model, as in our own decoders: it has one from the start and keeps it."""
    return any(hasattr(module, "make_passes") for module in model.modules())


class LayerNames:
    """Which names of tensors and modules belong to a layer, and to which.

    Beside the layers themselves these are the tables of value embeddings of our own decoder, which are kept by layer.
    """

    def __init__(self, model: nn.Module):
        found = layer_list(base_model(model))
        owner = found.path.removesuffix(found.name)
        self.path = f"{found.path}."
        self.prefixes = (self.path, f"{owner}value_embeddings.") if has_own_plan(model) else (self.path,)

    def split(self, name: str) -> tuple[str, int, str] | None:
        """(prefix, layer, rest) of a name, None for one outside the layers."""
        for prefix in self.prefixes:
            index, _, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and index.isdecimal():
                return prefix, int(index), rest
        return None

    def source(self, name: str, sources: Sequence[int]) -> str:
        """The old name of what a new name has, for new layers that are copies of these."""
        parts = self.split(name)
        if parts is None:
            return name
        prefix, layer, rest = parts
        return f"{prefix}{sources[layer]}.{rest}" if rest else f"{prefix}{sources[layer]}"


class _RefusedError(ValueError):
    """A refusal that says all there is to say."""


@contextmanager
def fixed_random_numbers() -> Iterator[None]:
    """The same random numbers inside every time, and the global generators afterwards where they were before."""
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would move the generators of all devices
        if device.type == "cuda":
            torch.cuda.manual_seed(0)
        yield


def _decoder_config(base: Any, sources: Sequence[int], plan: Plan, added: Mapping[str, Any]) -> Any:
    """`expand_config` for our own decoder, whose configuration holds the plan and what its loops add."""
    config, looping = base.config, looping_of(base)
    assert looping is not None, "our own decoders have a plan"
    lost = sorted(name for name, spec in (config.loops or {}).items() if spec and name not in plan.loops)
    if lost:
        raise _RefusedError(
            f"{_refusal(base)}: its loops have components of their own, and the plan {plan} has no loop {lost[0]!r}"
        )
    expanded = expand_config(config, sources, config.num_hidden_layers)
    expanded.plan, expanded.cache, expanded.relaxation = str(plan), str(looping.policy), None
    kept = {name: spec for name, spec in (config.loops or {}).items() if name in plan.loops}
    expanded.loops = {**kept, **added} or None
    if config.value_embeddings:
        widths = {int(layer): width for layer, width in config.value_embeddings.items()}
        expanded.value_embeddings = {str(new): widths[old] for new, old in enumerate(sources) if old in widths} or None
    return expanded


def expand_config(config: Any, sources: Sequence[int], num_layers: int) -> Any:
    """A configuration for `len(sources)` layers in which layer n is what layer `sources[n]` is in `config`.

    Rewritten are the number of layers, every list with one item per layer (`layer_types`, `mlp_layer_types`, RoPE
    lists, ...) and every list of layer numbers (`mlp_only_layers`, `hybrid_layer_ids`, ...).
    """
    values = config.to_dict()
    text = config.get_text_config(decoder=True)
    if text is config:
        values = expand_values(values, sources, num_layers)
    else:
        key = next(key for key in config.sub_configs if getattr(config, key, None) is text)
        values[key] = expand_values(values[key], sources, num_layers)
    return type(config).from_dict(values)


def _start_loops(twin: Any, loops: Mapping[str, Any]) -> None:
    """Give new components of loops the start that they say; the model's own start of linear layers came after it."""
    looping = looping_of(twin)
    assert looping is not None, "our own decoders have a plan"
    owner: Any = owner_of(twin, looping)
    for name in loops:
        with fixed_random_numbers():
            made = build_loop(name, loops, looping.plan, twin.config.hidden_size, final_norm=owner.norm)
        owner.loops[name].load_state_dict(made.state_dict())


def _copy_tensors(
    base: nn.Module,
    twin: nn.Module,
    names: LayerNames,
    sources: Sequence[int],
    visits: Sequence[int] | None,
    added: Sequence[str],
) -> None:
    layers = layer_list(base).layers
    offsets = {number: relaxation_of(layer) for number, layer in enumerate(layers)}
    if visits is None and any(offsets.values()):
        raise ValueError("this model has offsets per visit: untie() it first, which gives every visit its own tensors")
    old = tensors_of(base)
    new = tensors_of(twin)
    wanted = {names.source(name, sources) for name in new}
    for name in sorted(set(old) - wanted):
        parts = names.split(name)
        if parts is not None and offsets[parts[1]] is not None and parts[2].startswith(f"{RELAXATION}."):
            continue
        if parts is None or parts[1] in sources:
            raise ValueError(f"{_refusal(base)}: nothing there takes tensor {name}")
    filled: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for name, tensor in new.items():
            source = old.get(names.source(name, sources))
            if source is None and any(f"loops.{loop}." in name for loop in added):
                continue
            if source is None or source.shape != tensor.shape:
                raise ValueError(f"{_refusal(base)}: no source for tensor {name}")
            before = filled.setdefault(id(tensor), source)
            if before is not source and not torch.equal(before, source):
                raise ValueError(f"{_refusal(base)}: the configuration ties tensor {name}, and here it is not tied")
            if tensor.dtype != source.dtype:
                tensor.data = torch.empty_like(source, device=tensor.device)
            parts = names.split(name)
            relaxation = None if parts is None else offsets[sources[parts[1]]]
            if parts is not None and visits is not None and relaxation is not None and parts[2] in relaxation.names:
                tensor.copy_(relaxation.of(parts[2]).applied(source, relaxation.index(visits[parts[1]])))
            else:
                tensor.copy_(source)
            tensor.requires_grad_(source.requires_grad)
    _tie_again(old, twin, names)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model by name, tied ones under all their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _tie_again(old: Mapping[str, torch.Tensor], twin: nn.Module, names: LayerNames) -> None:
    """Tie what was tied by hand outside the layers, where the configuration does not say so."""
    first: dict[int, str] = {}
    for name, tensor in old.items():
        if names.split(name) is not None or not isinstance(tensor, nn.Parameter):
            continue
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            owner, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(owner), attribute, twin.get_parameter(kept))


def _copy_modes(base: nn.Module, twin: nn.Module, names: LayerNames, sources: Sequence[int]) -> None:
    """Training or evaluation, and gradient checkpointing, module by module."""
    old = dict(base.named_modules())
    for name, module in twin.named_modules():
        source = old.get(names.source(name, sources))
        module.training = base.training if source is None else source.training
        for kept in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if source is not None and kept in vars(source):
                setattr(module, kept, vars(source)[kept])


def _check(model: nn.Module, twin: nn.Module) -> None:
    """Refuse a twin that computes something else, because its layers depend on their number."""
    with eval_mode(model), eval_mode(twin):
        looped = model(**probe_inputs(model)).logits
        try:
            plain = twin(**probe_inputs(twin)).logits
        except Exception as error:  # whatever a model of that depth says
            raise ValueError(f"{_refusal(twin)}: {_first_line(error)}") from error
    error = (looped.float() - plain.float()).abs().max().item()
    scale = looped.float().abs().max().item()
    # With offsets per visit, the sum of tensor and offset is rounded once, the products of a visit are each rounded.
    coarse = 1e-1 if getattr(looping_of(model), "relaxed", None) else 2e-2
    tolerance = 1e-5 if looped.dtype == torch.float32 else coarse
    if not error <= tolerance * scale:
        raise ValueError(f"{_refusal(twin)}: its layers depend on their number (logits differ by {error:.2g})")


def _refusal(model: nn.Module) -> str:
    return f"{type(model).__name__} loops but cannot be unrolled into a plain model"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

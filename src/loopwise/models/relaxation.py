"""Relaxation: shared layers whose visits differ by offsets of their tensors ("tie + delta", 2410.20672).

At its k-th visit a layer computes with `W + B_k A_k` in the place of a matrix W, and with `p + o_k` in the place of any
other tensor p (gains, biases, kernels of convolutions, decay rates). The offsets are parameters of a module
`layer.relaxation`, so that they are saved, sharded and trained like those of the layer. They are put in place for the
length of a visit and taken away after it: between visits the layer is the shared one.

Linear layers get `x A^T B^T` beside their own product; of other matrices (experts, routers, weights that a layer reads
itself) the sum is formed first.

Shapes: R visits, r rank.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from loopwise.loop.config import from_dict, to_dict
from loopwise.loop.delta import Beyond, DeltaConfig, LoraOffsets, known_iteration
from loopwise.models.hub import Conv1D, base_model, refuse_adapters
from loopwise.models.offsets import MatrixOffset, WholeOffset, offset_of
from loopwise.models.playing import VISIT, Looping, looping_of, owner_of
from loopwise.models.wrapper import COMPONENTS

NAME = "relaxation"
_READ = re.compile(r"\.(\w+)(?:\[[^\]]*\])?\.weight\b")


@dataclass(frozen=True, kw_only=True)
class RelaxationConfig(DeltaConfig):
    """Offsets of some layers of a model.

    Attributes:
        rank: r of the offsets of matrices, at most their smaller size; None is that size, 0 leaves matrices shared.
        visits: number of a layer, as text -> R, how many visits have offsets of their own.
    """

    kind: ClassVar[str | None] = "delta.relaxation"
    rank: int | None = None
    visits: dict

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(self.rank is None or self.rank >= 0, "rank", "must be at least 0, or None for the full rank")
        wrong = [layer for layer, count in self.visits.items() if not str(layer).isdecimal() or not _is_count(count)]
        self.require(not wrong, "visits", "must map numbers of layers to numbers of visits of at least 1")


class Relaxation(nn.Module):
    """The offsets of one layer, in `offsets` by the name of the tensor with "/" for ".".

    Args:
        layer: the layer; its device and the dtype of each tensor are taken over.
        rank: see `RelaxationConfig`.
        num_visits: R.
        beyond: what visits past the last known one use, see `DeltaConfig`.
        shared: tensors by `id` that other layers have too: they get no offsets, and stay shared between layers.

    Raises:
        ValueError: a tensor that is quantised, or that the layer has under two names.
    """

    is_component = True

    def __init__(
        self,
        layer: nn.Module,
        rank: int | None,
        num_visits: int,
        beyond: Beyond,
        *,
        shared: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.num_visits = num_visits
        self.beyond: Beyond = beyond
        offsets: dict[str, nn.Module] = {}
        for name, tensor in _tensors(layer):
            if id(tensor) in shared:
                continue
            owner, attribute = _split(name)
            offset = offset_of(layer.get_submodule(owner), attribute, tensor, rank, num_visits)
            if offset is not None:
                offsets[name.replace(".", "/")] = offset.to(tensor.device, tensor.dtype)
        self.offsets = nn.ModuleDict(offsets)
        read = _read_by_layer(layer)
        self.called = tuple(name for name in self.names if _is_called(layer, name, read))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors of the layer that have offsets."""
        return tuple(key.replace("/", ".") for key in self.offsets)

    def of(self, name: str) -> WholeOffset | MatrixOffset:
        """The offsets of a tensor of the layer."""
        return cast(Any, self.offsets[name.replace(".", "/")])

    def index(self, visit: int) -> int:
        """The offsets that a visit uses; `ValueError` where it has none."""
        return known_iteration(visit, self.num_visits, self.beyond)

    @contextmanager
    def applied(self, layer: nn.Module, visit: int) -> Iterator[None]:
        """While the layer runs, its tensors are those of a visit, counted from 0.

        Raises:
            ValueError: the visit has no offsets, or a tensor is not where it was.
        """
        index = self.index(visit)
        before: list[tuple[dict, str, Any]] = []
        called = set(self.called)
        try:
            for name in self.names:
                offset, (module, attribute) = self.of(name), _place(layer, name)
                table = module._parameters if attribute in module._parameters else module._buffers
                tensor = cast(torch.Tensor, table[attribute])
                before.append((table, attribute, tensor))
                if name in called and "forward" not in module.__dict__:
                    before.append((module.__dict__, "forward", None))
                    module.__dict__["forward"] = _LinearWithOffset(module, tensor, cast(LoraOffsets, offset), index)
                    table[attribute] = cast(Any, None)  # who reads it past the offset shall fail
                else:
                    table[attribute] = _like(tensor, offset.applied(tensor, index))
            yield
        finally:
            for table, attribute, value in reversed(before):
                if value is None:
                    del table[attribute]
                else:
                    table[attribute] = value


class _LinearWithOffset:
    """The forward of a linear layer during a visit."""

    def __init__(self, module: nn.Module, weight: torch.Tensor, offset: LoraOffsets, index: int) -> None:
        self.module, self.weight, self.offset, self.index = module, weight, offset, index

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`W x + b + B A x`, `[..., in]` -> `[..., out]`."""
        bias = self.module._parameters.get("bias")
        if isinstance(self.module, Conv1D):
            flat = torch.addmm(cast(torch.Tensor, bias), x.reshape(-1, x.shape[-1]), self.weight)
            y = flat.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight, bias)
        return y + F.linear(F.linear(x, self.offset.A[self.index]), self.offset.B[self.index])


class RelaxedForward:
    """The forward of a layer that has offsets, in the place of the one of its class (or of whatever took that)."""

    is_component = True

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.inner = layer.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the layer; which visit it is comes with them.

        Raises:
            ValueError: the visit has no offsets, or the layer is run outside of a plan or is to be run again.
        """
        layer = self.layer
        visit = kwargs.pop(VISIT, None)
        if visit is None:
            raise ValueError(f"{type(layer).__name__} has offsets per visit: it runs as a part of its model only")
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing of transformers runs layers again without their offsets: call "
                "gradient_checkpointing_disable() and use checkpoint_loops(model)"
            )
        with cast(Relaxation, layer._modules[NAME]).applied(layer, visit):
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(layer).forward(layer, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there before."""
        if self.inner is None:
            del self.layer.__dict__["forward"]
        else:
            self.layer.__dict__["forward"] = self.inner


def add_relaxation(
    model: nn.Module,
    rank: int | None = None,
    *,
    visits: Mapping[int, int] | None = None,
    beyond: Beyond = "refuse",
) -> nn.Module:
    """Give layers of a model offsets of their own at every visit, zero at first; in place.

    The function stays what it is until the offsets are trained, or set (`loopwise.edit.relax`). Offsets are numbered
    by the visits of a layer in plan order, whatever loop they belong to.

    Args:
        model: with a plan.
        rank: of the offsets of matrices, at most their smaller size; None is the full rank, 0 leaves matrices shared.
            Other tensors always get whole offsets.
        visits: layer -> how many visits have offsets; None takes the layers that the plan visits several times.
        beyond: what visits past these use: "refuse", "last" or "cycle".

    Returns:
        The model.

    Raises:
        ValueError: no plan, adapters or shards are present, there are offsets already, or a layer that does not exist.
    """
    looping = looping_of(model)
    if looping is None:
        raise ValueError("this model has no plan: use loopwise.attach(model, plan) first")
    refuse_adapters(model)
    if NAME in looping.components:
        raise ValueError("this model has offsets per visit already: detach it first")
    if visits is None:
        visits = {layer: count for layer, count in Counter(looping.plan.layers).items() if count > 1}
    if not visits:
        raise ValueError(f"no layer is visited several times by the plan {looping.plan}: there is nothing to relax")
    config = RelaxationConfig(
        rank=rank, beyond=beyond, visits={str(layer): count for layer, count in sorted(visits.items())}
    )
    install(owner_of(model, looping), looping, config)
    config_of = base_model(model).config
    if hasattr(config_of, NAME):  # our own decoder, which keeps its parts in its configuration
        setattr(config_of, NAME, to_dict(config))
    return model


def install(owner: nn.Module, looping: Looping, config: RelaxationConfig) -> None:
    """Put the modules of a configuration on the layers of an owner."""
    layers = cast(nn.ModuleList, owner._modules[looping.name])
    wrong = [number for number in config.visits if int(number) >= len(layers)]
    if wrong:
        raise ValueError(f"{config.kind}: visits names layer {wrong[0]}, the model has 0 to {len(layers) - 1}")
    owned = Counter(id(tensor) for layer in layers for tensor in {*layer.parameters(), *layer.buffers()})
    shared = {key for key, count in owned.items() if count > 1}
    made = {
        int(number): Relaxation(layers[int(number)], config.rank, count, config.beyond, shared=shared)
        for number, count in config.visits.items()
    }
    for number, relaxation in made.items():
        layer = layers[number]
        if hasattr(layer, NAME):
            raise ValueError(f"{type(layer).__name__} has a part named {NAME!r} of its own: it cannot be relaxed")
        layer.add_module(NAME, relaxation.train(layer.training))
        layer.__dict__["forward"] = RelaxedForward(layer)
    looping.relaxed = frozenset(made)
    looping.components[NAME] = to_dict(config)


def _restore(model: nn.Module, spec: Mapping[str, Any]) -> nn.Module:
    config = cast(RelaxationConfig, from_dict(spec, axis="delta"))
    looping = looping_of(model)
    assert looping is not None
    install(owner_of(model, looping), looping, config)
    return model


COMPONENTS[NAME] = _restore


def relaxation_of(layer: nn.Module) -> Relaxation | None:
    """The offsets of a layer, or None."""
    found = layer._modules.get(NAME)
    return found if isinstance(found, Relaxation) else None


def _tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of a layer that can have an offset."""
    persistent = layer.state_dict(keep_vars=True)
    seen: dict[int, str] = {}
    for name, tensor in persistent.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if isinstance(tensor, nn.Parameter):
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise ValueError(f"{name} is quantised ({tensor.dtype}): offsets need weights in floating point")
            if type(tensor.data).__name__ == "DTensor":
                raise ValueError("this model is sharded: give it offsets before shard(model)")
            if seen.setdefault(id(tensor), name) != name:
                raise ValueError(f"{type(layer).__name__} has one tensor as {seen[id(tensor)]} and {name}")
        if tensor.is_floating_point():
            yield name, tensor


def _is_called(layer: nn.Module, name: str, read: frozenset[str] | None) -> bool:
    """Whether a tensor is the weight of a linear layer that is called, and not read by others."""
    owner, attribute = _split(name)
    module = layer.get_submodule(owner)
    is_linear = type(module).forward in (nn.Linear.forward, Conv1D.forward) and attribute == "weight"
    return is_linear and read is not None and not read & set(owner.split(".")[-2:])


def _read_by_layer(layer: nn.Module) -> frozenset[str] | None:
    """Names of the parts whose weights the code of a layer reads itself; None where its code is not to be had."""
    kinds = {kind for module in layer.modules() for kind in type(module).__mro__}
    found = [_read_by(kind) for kind in kinds if not kind.__module__.startswith(("torch.", "builtins"))]
    return None if any(names is None for names in found) else frozenset().union(*cast(Any, found))


@lru_cache(maxsize=4096)
def _read_by(kind: type) -> frozenset[str] | None:
    try:
        return frozenset(_READ.findall(inspect.getsource(kind)))
    except (OSError, TypeError):
        return None


def _like(tensor: torch.Tensor, moved: torch.Tensor) -> Any:
    """A sum that requires a gradient where the tensor does, recorded or not: torch chooses kernels by that."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return moved
    if tensor.requires_grad and not moved.requires_grad:
        moved.requires_grad_()
    return moved


def _place(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, inside adapters too, and the tensor's name there."""
    owner, attribute = _split(name)
    module = layer
    for part in owner.split(".") if owner else ():
        module = getattr(module, "base_layer", module)
        module = module._modules.get(part)
        if module is None:
            break
    module = getattr(module, "base_layer", module)
    if not isinstance(module, nn.Module) or not (attribute in module._parameters or attribute in module._buffers):
        raise ValueError(
            f"{name} is not where it was when {type(layer).__name__} got its offsets: undo what replaced it"
        )
    return module, attribute


def _split(name: str) -> tuple[str, str]:
    owner, _, attribute = name.rpartition(".")
    return owner, attribute


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

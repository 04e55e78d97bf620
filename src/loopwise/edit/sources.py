"""What every tensor of an edited model starts as, by name: what an edit fills in, and optimizer moments follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from loopwise.edit.maps import DepthEdit, NewLayer
from loopwise.edit.outputs import output_tensors
from loopwise.edit.values import mean
from loopwise.models.hub import base_model, layer_list
from loopwise.models.realise import LayerNames, tensors_of


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Where one tensor of the new model comes from.

    Attributes:
        names: tensors of the old model: one is copied, the mean of several is taken, none says that the tensor is new
            (an offset, an adapter).
        zero: it starts at zero instead; `names` is what the layer is a copy of.
        scale: factor on the copy or the mean.
    """

    names: tuple[str, ...]
    zero: bool = False
    scale: float = 1.0

    @property
    def is_copy(self) -> bool:
        """Whether it is one old tensor, unchanged."""
        return len(self.names) == 1 and not self.zero and self.scale == 1

    @property
    def is_new(self) -> bool:
        """Whether the old model has nothing like it."""
        return not self.names


def tensor_sources(old_model: nn.Module, new_model: nn.Module, edit: DepthEdit) -> dict[str, TensorSource]:
    """Where every parameter of an edited model comes from.

    Args:
        old_model: the model before the edit.
        new_model: what `apply` made of it, tied, materialised, or (alias) the old model itself.
        edit: the edit, see `plan_edit`.

    Returns:
        One entry per name of `new_model.named_parameters()`; the old names are those of `old_model.named_parameters()`,
        also where a tensor has several names.

    Raises:
        ValueError: the new model has another number of layers than the edit gives it.
    """
    old, new = base_model(old_model), base_model(new_model)
    shown = {id(parameter): name for name, parameter in old_model.named_parameters()}
    if old is new:
        return {name: TensorSource(names=(name,)) for name in shown.values()}
    owners = {name: shown[id(parameter)] for name, parameter in old.named_parameters(remove_duplicate=False)}
    found: dict[str, TensorSource] = {}
    sources = sources_of(old, _layers_of(new, edit), [name for name, _ in new.named_parameters()])
    outer = {id(parameter): name for name, parameter in new_model.named_parameters()}
    for name, parameter in new.named_parameters():
        source = sources[name]
        known = tuple(dict.fromkeys(owners[old_name] for old_name in source.names if old_name in owners))
        found[outer[id(parameter)]] = TensorSource(names=known, zero=source.zero, scale=source.scale)
    return found


def sources_of(model: nn.Module, layers: tuple[NewLayer, ...], names: Iterable[str]) -> dict[str, TensorSource]:
    """For tensors of a new model, by name, what they are made of; `model` is the old one."""
    split = LayerNames(model).split
    model_type = base_model(model).config.get_text_config(decoder=True).model_type
    found: dict[str, TensorSource] = {}
    parts = {name: split(name) for name in names}
    inside: dict[int, set[str]] = {number: set() for number in range(len(layers))}
    for part in parts.values():
        if part is not None:
            inside[part[1]].add(part[2])
    zeroed = {n: output_tensors(inside[n], model_type) if layer.zero else set() for n, layer in enumerate(layers)}
    for name, part in parts.items():
        if part is None:
            found[name] = TensorSource(names=(name,))
            continue
        prefix, number, rest = part
        layer = layers[number]
        olds = tuple(f"{prefix}{source}.{rest}" for source in layer.sources)
        is_zero = rest in zeroed[number]
        scale = 1.0 if is_zero else next((factor for part, factor in layer.scale if part in rest), 1.0)
        found[name] = TensorSource(names=olds, zero=is_zero, scale=scale)
    return found


@torch.no_grad()
def fill(
    new_model: nn.Module, old: Mapping[str, torch.Tensor], sources: Mapping[str, TensorSource], names: Iterable[str]
) -> None:
    """Give tensors of a new model, which hold copies of their first source, the values that their sources say.

    The mean is `first + mean(x_i - first)` in float32, so that the mean of equal tensors is exactly that tensor.

    Args:
        new_model: changed in place.
        old: tensors of the old model by name.
        sources: of every tensor.
        names: the names to look at.

    Raises:
        ValueError: tensors of a mean that are no numbers, and differ.
    """
    tensors = tensors_of(new_model)
    for name in names:
        source, tensor = sources[name], tensors[name]
        if source.is_copy or source.is_new:
            continue
        if source.zero:
            tensor.zero_()
            continue
        values = [old[known] for known in source.names]
        if tensor.is_floating_point():
            tensor.copy_(_scaled(mean(values), source.scale))
        elif any(not torch.equal(value, values[0]) for value in values[1:]):
            raise ValueError(f"no mean of {', '.join(source.names)}: they hold whole numbers, and differ")


def _scaled(value: torch.Tensor, factor: float) -> torch.Tensor:
    return value if factor == 1 else value * factor


def _layers_of(model: nn.Module, edit: DepthEdit) -> tuple[NewLayer, ...]:
    """The layers of the edit, one per visit where the model is the materialised one."""
    num_layers = len(layer_list(model).layers)
    if num_layers == len(edit.layers):
        return edit.layers
    if num_layers == edit.plan.num_slots:
        return edit.unrolled().layers
    raise ValueError(f"the new model has {num_layers} layers, the edit makes {len(edit.layers)}: it is of another edit")

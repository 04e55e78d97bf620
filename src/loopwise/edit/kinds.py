"""Which layers of a model are of one kind: layers that become one layer must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loopwise.edit.maps import DepthEdit
from loopwise.io.layer_fields import layer_kinds
from loopwise.models.hub import base_model, layer_list, text_config
from loopwise.models.realise import LayerNames


def refuse_different_kinds(model: nn.Module, edit: DepthEdit) -> None:
    """Raise `ValueError` where layers that become one differ in modules, tensors or per-layer configuration.

    Layers become one when a new layer is the mean of several, or stands for several at its visits.
    """
    groups: list[set[int]] = [set(layer.sources) for layer in edit.layers]
    for visited, origin in zip(edit.plan.layers, edit.origins, strict=True):
        groups[visited].add(origin)
    for sources, group in zip((layer.sources for layer in edit.layers), groups, strict=True):
        first = sources[0]
        for other in sorted(group - {first}):
            found = _difference(_kind(model, first), _kind(model, other))
            if found:
                what, one, two = found
                raise ValueError(
                    f"layers {first} and {other} cannot become one, they are of different kinds: {what} is {one} in "
                    f"layer {first} and {two} in layer {other}"
                )


def shared_tensor(model: nn.Module) -> tuple[int, int, str] | None:
    """Two layers and the name of a tensor that both have, of an architecture that shares blocks; None for most."""
    split = LayerNames(model).split
    first: dict[int, int] = {}
    for name, parameter in base_model(model).named_parameters(remove_duplicate=False):
        parts = split(name)
        if parts is not None and first.setdefault(id(parameter), parts[1]) != parts[1]:
            return first[id(parameter)], parts[1], parts[2]
    return None


def _kind(model: nn.Module, layer: int) -> dict[str, Any]:
    """What makes a layer's kind, by name: what the configuration says of it, classes of modules, shapes of tensors."""
    found = layer_list(model)
    module, values = found.layers[layer], text_config(model).to_dict()
    says = layer_kinds(values, len(found.layers))[layer]
    if isinstance(values.get("value_embeddings"), Mapping):
        says["value_embeddings"] = values["value_embeddings"].get(str(layer))
    modules = {f"module {path or 'itself'}": type(part).__name__ for path, part in module.named_modules()}
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    return says | modules | {f"the shape of {name}": tuple(tensor.shape) for name, tensor in tensors.items()}


def _difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for key in (*one, *(key for key in two if key not in one)):
        mine, other = one.get(key, "missing"), two.get(key, "missing")
        if mine != other:
            return key, str(mine)[:80], str(other)[:80]
    return None

"""Factors of our own decoder that follow the depth, after an edit: kept with their layers, or folded into tensors.

A block has a factor on what the norms before its branches give (`norm_scale`, such as 1 / sqrt(depth), 2502.05795) and
one on what a branch adds (`branch_scale`, such as 1 / depth, 2505.01618). An edit keeps the factors of a copied layer,
*frozen*: only so is the function the old one. To go on with the factors that the new depth asks for, they are set and
the tensors next to them divided by as much, *folded*: the function stays, and training sees the new factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loopwise.edit.outputs import output_tensors
from loopwise.models.hub import base_model, layer_list
from loopwise.models.realise import has_own_plan


def fold_factors(
    model: nn.Module, *, norm_scale: Sequence[float] | None = None, branch_scale: Sequence[float] | None = None
) -> nn.Module:
    """Set the factors of every layer to new values, in place, and keep the function (to rounding).

    What a factor is divided out of: `norm_scale` of the gain and bias of the norms before the branches, `branch_scale`
    of the output projections and their biases, or of the norms behind the branches where these stand before the factor.

    Args:
        model: a decoder of our own.
        norm_scale: one factor per layer, above 0; None leaves them. A parametrisation gives both as fields of
            `decoder_fields(...)["blocks"]` of the new depth.
        branch_scale: likewise.

    Returns:
        The model.

    Raises:
        ValueError: another model, another number of factors, or a factor with no tensor to be folded into.
    """
    base: Any = base_model(model)
    if not has_own_plan(base):
        raise ValueError(f"{type(base).__name__} keeps no factors per layer: folding is for decoders of loopwise")
    layers: list[Any] = list(layer_list(base).layers)
    given = {"norm_scale": norm_scale, "branch_scale": branch_scale}
    wanted = {name: list(values) for name, values in given.items() if values is not None}
    for name, values in wanted.items():
        if len(values) != len(layers):
            raise ValueError(f"{name} has {len(values)} factors, the model {len(layers)} layers: give one per layer")
        bad = [value for value in values if not 0 < value < float("inf")]
        if bad:
            raise ValueError(f"{name} has {bad[0]}: a factor must be above 0 and finite")
    tensors = {"norm_scale": _behind_norms, "branch_scale": _behind_branches}
    moves: list[tuple[list[torch.Tensor], float]] = []
    for name, values in wanted.items():
        for number, (layer, value) in enumerate(zip(layers, values, strict=True)):
            ratio = getattr(layer.block_config, name) / value
            if ratio != 1:
                moves.append((tensors[name](layer, number), ratio))
    with torch.no_grad():
        for found, ratio in moves:
            for tensor in found:
                tensor.mul_(ratio)
    for number, layer in enumerate(layers):
        layer.block_config = replace(layer.block_config, **{name: values[number] for name, values in wanted.items()})
    base.config.blocks = [layer.block_config.to_dict() for layer in layers]
    return model


def _behind_norms(layer: Any, number: int) -> list[torch.Tensor]:
    """Gains and biases of the norms whose output is multiplied by `norm_scale`."""
    return [tensor for norm in (layer.mixer_norm_in, layer.mlp_norm_in) for tensor in _of_norm(norm, number)]


def _behind_branches(layer: Any, number: int) -> list[torch.Tensor]:
    """The tensors that what `branch_scale` multiplies is linear in."""
    if layer.norms_the_branch:
        norms = [norm for norm in (layer.mixer_norm_out, layer.mlp_norm_out) if norm is not None]
        return [tensor for norm in norms for tensor in _of_norm(norm, number)]
    named = dict(layer.named_parameters())
    outputs = output_tensors(named, "loopwise_decoder")
    return [named[name] for name in sorted(outputs) if "_norm_out." not in name]


def _of_norm(norm: Any, number: int) -> list[torch.Tensor]:
    if norm is None or norm.weight is None:
        raise ValueError(f"layer {number} has a norm without a gain, which could take the factor: keep its factor")
    return [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]

"""The named tensors of a run, whole and in shards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, sharded ones gathered: every rank calls it."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().to("cpu", copy=True)
        for name, tensor in tensors.items()
    }


def like(tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors, sharded as the targets of the same names are; every rank has the whole, so nothing is sent."""
    found = {}
    for name, tensor in tensors.items():
        target = targets.get(name)
        if isinstance(target, DTensor):
            moved = tensor.to(target.device)
            found[name] = distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)
        else:
            found[name] = tensor
    return found

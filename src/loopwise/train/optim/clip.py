"""Clipping the gradient by its global norm (1211.5063)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_gradients(source: nn.Module | Iterable[nn.Parameter], max_norm: float = math.inf) -> float:
    """Scale all gradients by `min(1, max_norm / (norm + 1e-6))`, in place, and return the norm that they had.

    Args:
        source: a model or parameters, plain or sharded (DTensor), also mixed; a parameter without a gradient does not
            count. Plain gradients must already agree between ranks.
        max_norm: largest Euclidean norm over all gradients, above 0; infinity only measures.

    Returns:
        The norm before, the same on every rank; not finite where a gradient is not.

    Raises:
        ValueError: max_norm is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r} must be above 0; use infinity not to clip")
    # torch adds up norms within one mesh only
    by_mesh: dict[object, list[nn.Parameter]] = {}
    for parameter in source.parameters() if isinstance(source, nn.Module) else source:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    if not by_mesh:
        return 0.0
    norms = []
    for members in by_mesh.values():
        norm = nn.utils.get_total_norm([member.grad for member in members if member.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if not math.isinf(max_norm):
        for members in by_mesh.values():
            nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return float(total)

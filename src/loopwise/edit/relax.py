"""Give the visits of shared layers back what their own layers had (Relaxed Recursive Transformers, 2410.20672).

The offsets of a visit come from the singular value decomposition of the difference:

    W_old - W_new = U S V^T,    A = V_r^T,    B = U_r S_r

with a scale of exactly 1: at the full rank `W_new + B A` is the old matrix. Tensors that are no matrices get the whole
difference, whatever the rank.

Shapes: r rank, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from loopwise.edit.maps import DepthEdit
from loopwise.models.hub import base_model, layer_list
from loopwise.models.offsets import MatrixOffset
from loopwise.models.playing import looping_of
from loopwise.models.relaxation import add_relaxation, relaxation_of


def relax(old_model: nn.Module, new_model: nn.Module, edit: DepthEdit) -> None:
    """Add offsets to the layers of an edited model, in place, so that each visit comes close to its own old layer.

    For every visit of a new layer n that stands for the old layer o, the offsets of that visit are `W_old[o] -
    W_new[n]`, of the rank that `edit.relaxation` says. A layer that is visited once and equals its old layer gets none.

    Args:
        old_model: what the edit was made of; it is not changed.
        new_model: the edited model, with the plan `edit.plan` and a layer for each of `edit.layers`.
        edit: an edit with a relaxation.

    Raises:
        ValueError: the edit has no relaxation, the models are not those of the edit, or layers are of different kinds.
    """
    if edit.relaxation is None:
        raise ValueError("this edit has no relaxation: use an operator with a rank, such as recursive(2, rank=8)")
    looping = looping_of(new_model)
    if looping is None or looping.plan.layers != edit.plan.layers:
        raise ValueError(f"the new model does not run the plan {edit.plan} of the edit: attach that plan first")
    earlier = looping_of(old_model)
    if earlier is not None and earlier.components:
        raise ValueError("the old model has offsets or loop components of its own: materialize it first")
    old, new = layer_list(base_model(old_model)).layers, layer_list(base_model(new_model)).layers
    for layers, wanted, which in ((old, edit.num_layers, "old"), (new, len(edit.layers), "new")):
        if len(layers) != wanted:
            raise ValueError(f"the {which} model has {len(layers)} layers, the edit says {wanted}")
    origins: dict[int, list[int]] = {}
    for visited, origin in zip(edit.plan.layers, edit.origins, strict=True):
        origins.setdefault(visited, []).append(origin)
    for visited, visits in origins.items():
        for origin in dict.fromkeys(visits):
            _refuse_other_kind(old[origin], new[visited], f"layer {visited} cannot stand for layer {origin}")
    needed = {n: len(visits) for n, visits in origins.items() if len(visits) > 1 or _differ(old[visits[0]], new[n])}
    if not needed:
        return
    add_relaxation(new_model, edit.relaxation.rank, visits=needed)
    for visited in needed:
        for visit, origin in enumerate(origins[visited]):
            _set_offsets(new[visited], visit, old[origin], with_matrices=edit.relaxation.rank != 0)


def _set_offsets(layer: nn.Module, visit: int, old: nn.Module, *, with_matrices: bool) -> None:
    """Set the offsets of one visit so that the layer comes close to an old one."""
    relaxation = relaxation_of(layer)
    assert relaxation is not None
    theirs, ours = old.state_dict(), layer.state_dict()
    for name in sorted(set(theirs) - set(relaxation.names)):
        if with_matrices and not torch.equal(theirs[name], ours[name].to(theirs[name])):
            raise ValueError(f"{name} is a tensor of several layers: it has no offsets, and differs from the old one")
    for name in relaxation.names:
        offset, own = relaxation.of(name), ours[name]
        wide = torch.promote_types(own.dtype, torch.float32)
        difference = theirs[name].to(own.device, wide) - own.to(wide)
        if isinstance(offset, MatrixOffset):
            set_matrix(offset, visit, difference)
        else:
            with torch.no_grad():
                offset.offset[visit] = difference


def set_matrix(offset: MatrixOffset, visit: int, residual: torch.Tensor) -> None:
    """Set the factors of a visit to the best approximation of a residual, which has the shape of the matrix.

    The decomposition is that of the smaller Gram matrix in float64, many times faster than one of the residual and as
    exact as weights of 32 bits can tell: what it leaves out is below 1e-8 of the largest singular value. Signs are such
    that the largest entry of every row of A is positive; where a singular value is zero that row is a unit vector, so
    that training can go on from it.
    """
    residual = (residual.mT if offset.is_transposed else residual).double()
    num_out, num_in = residual.shape[-2:]
    rank = offset.A.shape[-2]
    if num_out <= num_in:
        left = _leading(residual @ residual.mT, rank)
        right = left.mT @ residual
        values = right.norm(dim=-1, keepdim=True)
        right, left = right / values.clamp(min=1e-300), left * values.mT
    else:
        right = _leading(residual.mT @ residual, rank).mT
        left = residual @ right.mT
        values = left.norm(dim=-2, keepdim=True).mT
    is_none = values <= 1e-12 * values.amax(-2, keepdim=True)
    right = torch.where(is_none, torch.eye(rank, num_in, dtype=right.dtype, device=right.device), right)
    largest = right.gather(-1, right.abs().argmax(-1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).double()
    with torch.no_grad():
        offset.A[visit] = (right * sign).to(offset.A.dtype)
        offset.B[visit] = (left * (sign * ~is_none).mT).to(offset.B.dtype)


def _leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The eigenvectors of the largest eigenvalues as columns, `[..., n, r]`, largest first."""
    return torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)


def _refuse_other_kind(old: nn.Module, new: nn.Module, what: str) -> None:
    """Raise `ValueError` for layers that offsets cannot make alike."""
    theirs, ours = old.state_dict(), new.state_dict()
    for name in sorted(set(theirs) ^ set(ours)):
        raise ValueError(f"{what} of the old model: only one of them has {name}")
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            shapes = f"{list(tensor.shape)} there and {list(ours[name].shape)} here"
            raise ValueError(f"{what} of the old model: {name} is {shapes}")
        if not tensor.is_floating_point() and not torch.equal(tensor, ours[name].to(tensor.device)):
            raise ValueError(f"{what} of the old model: {name} differs and is not in floating point")
    tables = dict(new.named_buffers())
    for name, tensor in old.named_buffers():
        if name not in theirs and name in tables and not torch.equal(tensor, tables[name].to(tensor)):
            raise ValueError(f"{what} of the old model: the table {name} differs")


def _differ(old: nn.Module, new: nn.Module) -> bool:
    ours = new.state_dict()
    return any(not torch.equal(tensor, ours[name].to(tensor)) for name, tensor in old.state_dict().items())
